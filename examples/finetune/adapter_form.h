// The form that an adapter's files have.
#pragma once

#include <algorithm>

#include "peft/core/adapter.h"
#include "peft/io/adapterhub_formats.h"
#include "peft/io/peft_formats.h"

namespace finetune {

/// Methods that Hugging Face PEFT does not have are written as AdapterHub does.
inline bool in_adapterhub_form(const peft::Adapter& adapter) {
  return std::any_of(adapter.entries().begin(), adapter.entries().end(), [](const auto& entry) {
    return !peft::internal::format_of(*entry.piece) && peft::internal::hub_format_of(*entry.piece);
  });
}

}  // namespace finetune
