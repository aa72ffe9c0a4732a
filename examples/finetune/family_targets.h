// The layers that methods adapt in a given model: by default in families beside BERT's, and never in the
// head.
#pragma once

#include <torch/nn/module.h>

#include <algorithm>
#include <cctype>
#include <regex>
#include <string>
#include <vector>

#include "method.h"
#include "peft/io/peft_formats.h"
#include "peft/methods/replace.h"
#include "peft/model/targets.h"

namespace finetune {

/// Hugging Face PEFT's default targets of a method for a family; of a method that goes where LoRA does,
/// LoRA's where it has none of its own; else the program's, in the family's names. Empty: those of the
/// program.
inline std::vector<std::string> family_targets(const std::string& method, const std::string& model_type) {
  auto own = internal::method_entry(method).default_targets;
  if (model_type == "bert" || own.empty() || method == "trainable_tokens") return {};
  std::vector<std::string> types{method};
  std::transform(method.begin(), method.end(), types[0].begin(),
                 [](unsigned char c) { return std::toupper(c); });
  if (own == std::vector<std::string>{"query", "value"}) types.emplace_back("LORA");
  for (const auto& type : types) {
    const auto* format = peft::internal::format_of(type);
    if (!format) continue;
    if (auto targets = format->default_targets(model_type); !targets.empty()) return targets;
  }
  if (model_type == "deberta-v2") {
    for (auto& target : own) {
      if (target == "query" || target == "key" || target == "value") target += "_proj";
    }
  }
  return own;
}

/// Leaves the task head out of the parts whose targets find layers inside it: what trains as a copy of its
/// own is not adapted as well, as in Hugging Face's peft. `heads`: paths.
inline void leave_out_heads(Method& method, const torch::nn::Module& model,
                            const std::vector<std::string>& heads) {
  std::vector<std::string> inside;
  for (const auto& item : model.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
    const auto lies_in = [&](const std::string& head) {
      return item.key() == head || item.key().starts_with(head + ".");
    };
    if (std::any_of(heads.begin(), heads.end(), lies_in)) inside.push_back(item.key());
  }
  for (auto& part : method.parts) {
    if (part.method == peft::ReplaceOptions::method) continue;
    const auto& origin = *part.target.origin();
    const auto finds = [&](const std::string& path) {
      if (!origin.pattern.empty()) return std::regex_match(path, std::regex(origin.pattern));
      return std::any_of(origin.names.begin(), origin.names.end(),
                         [&](const std::string& name) { return peft::internal::ends_in_name(path, name); });
    };
    if (std::none_of(inside.begin(), inside.end(), finds)) continue;
    auto exclude = origin.exclude;
    for (const auto& head : heads) {
      if (std::find(exclude.begin(), exclude.end(), head) == exclude.end()) exclude.push_back(head);
    }
    part.target = part.target.exclude(exclude);
  }
}

}  // namespace finetune
