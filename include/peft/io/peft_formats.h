// PEFT formats: the methods that have files, a line each.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "peft/io/formats/adalora.h"
#include "peft/io/formats/boft.h"
#include "peft/io/formats/ia3.h"
#include "peft/io/formats/increlora.h"
#include "peft/io/formats/ln_tuning.h"
#include "peft/io/formats/loha.h"
#include "peft/io/formats/lokr.h"
#include "peft/io/formats/lora.h"
#include "peft/io/formats/masked.h"
#include "peft/io/formats/multitask_prompt_tuning.h"
#include "peft/io/formats/new_bias.h"
#include "peft/io/formats/oft.h"
#include "peft/io/formats/p_tuning.h"
#include "peft/io/formats/prefix_tuning.h"
#include "peft/io/formats/prompt_tuning.h"
#include "peft/io/formats/trainable_tokens.h"
#include "peft/io/formats/vera.h"
#include "peft/io/peft_format.h"

namespace peft::internal {

/// The rows. Of several with one `peft_type` the first one reads its files; the others only write them.
inline const std::vector<std::unique_ptr<const PeftFormat>>& peft_formats() {
  static const auto table = [] {
    std::vector<std::unique_ptr<const PeftFormat>> rows;
    rows.push_back(
        std::make_unique<TrainableTokensFormat>());  // before LoRA, which writes them beside its own
    rows.push_back(std::make_unique<LoraFormat>());
    rows.push_back(std::make_unique<IncreLoraFormat>());
    rows.push_back(std::make_unique<AdaLoraFormat>());
    rows.push_back(std::make_unique<Ia3Format>());
    rows.push_back(std::make_unique<LayerNormTuningFormat>());
    rows.push_back(std::make_unique<LohaFormat>());
    rows.push_back(std::make_unique<LokrFormat>());
    rows.push_back(std::make_unique<VeraFormat>());
    rows.push_back(std::make_unique<OftFormat>());
    rows.push_back(std::make_unique<BoftFormat>());
    rows.push_back(std::make_unique<PromptTuningFormat>());
    rows.push_back(std::make_unique<PTuningFormat>());
    rows.push_back(std::make_unique<PrefixTuningFormat>());
    rows.push_back(std::make_unique<MultitaskPromptTuningFormat>());
    rows.push_back(std::make_unique<MaskedFormat>());
    rows.push_back(std::make_unique<RowsFormat>());
    rows.push_back(std::make_unique<NewBiasFormat>());
    return rows;
  }();
  return table;
}

/// The row that reads files of this type, or nullptr.
inline const PeftFormat* format_of(const std::string& peft_type) {
  for (const auto& format : peft_formats()) {
    if (format->peft_type() == peft_type) return format.get();
  }
  return nullptr;
}

/// The row that writes all of these pieces that any row writes, or nullptr.
inline const PeftFormat* format_of(const Entries& entries) {
  Entries methods;
  for (const auto& entry : entries) {
    const auto writes = [&](const auto& format) { return format->owns(*entry.piece); };
    if (std::any_of(peft_formats().begin(), peft_formats().end(), writes)) methods.push_back(entry);
  }
  for (const auto& format : peft_formats()) {
    const auto is_its = [&](const Adapter::Entry& entry) { return format->owns(*entry.piece); };
    if (!methods.empty() && std::all_of(methods.begin(), methods.end(), is_its)) return format.get();
  }
  return nullptr;
}

/// The row that writes pieces of this class, or nullptr.
inline const PeftFormat* format_of(const PieceImpl& piece) {
  for (const auto& format : peft_formats()) {
    if (format->owns(piece)) return format.get();
  }
  return nullptr;
}

}  // namespace peft::internal
