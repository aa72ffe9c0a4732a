// AdapterHub formats: the methods that have files, a line each.
#pragma once

#include <memory>
#include <vector>

#include "peft/io/adapterhub_format.h"
#include "peft/io/adapterhub_formats/bottleneck.h"
#include "peft/io/adapterhub_formats/ia3.h"
#include "peft/io/adapterhub_formats/lora.h"
#include "peft/io/adapterhub_formats/prefix.h"
#include "peft/io/adapterhub_formats/prompt.h"

namespace peft::internal {

/// The rows, in the order in which a union lists them.
inline const std::vector<std::unique_ptr<const HubFormat>>& hub_formats() {
  static const auto table = [] {
    std::vector<std::unique_ptr<const HubFormat>> rows;
    rows.push_back(std::make_unique<HubPrefixFormat>());
    rows.push_back(std::make_unique<HubPromptFormat>());
    rows.push_back(std::make_unique<HubBottleneckFormat>());
    rows.push_back(std::make_unique<HubIa3Format>());
    rows.push_back(std::make_unique<HubLoraFormat>());
    return rows;
  }();
  return table;
}

/// The row that writes pieces of this class, or nullptr.
inline const HubFormat* hub_format_of(const PieceImpl& piece) {
  for (const auto& format : hub_formats()) {
    if (format->owns(piece)) return format.get();
  }
  return nullptr;
}

}  // namespace peft::internal
