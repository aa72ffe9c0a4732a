// The layers that methods adapt by default in families beside BERT's.
#pragma once

#include <algorithm>
#include <cctype>
#include <string>
#include <vector>

#include "method.h"
#include "peft/io/peft_formats.h"

namespace finetune {

/// Hugging Face PEFT's default targets of a method for a family, LoRA's where it has none of its own; empty:
/// those of the program.
inline std::vector<std::string> family_targets(const std::string& method, const std::string& model_type) {
  auto targets = internal::method_entry(method).default_targets;
  if (model_type == "bert" || targets.empty() || method == "trainable_tokens") return {};
  if (method == "hifi") {  // not one of theirs
    for (auto& target : targets) target += model_type == "deberta-v2" ? "_proj" : "";
    return targets;
  }
  auto type = method;
  std::transform(type.begin(), type.end(), type.begin(), [](unsigned char c) { return std::toupper(c); });
  for (const auto& name : {type, std::string("LORA")}) {
    const auto* format = peft::internal::format_of(name);
    if (format) targets = format->default_targets(model_type);
    if (format && !targets.empty()) break;
  }
  return targets;
}

}  // namespace finetune
