// LoRA+: other rates for B than for A.
#pragma once

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/train/optimizer.h"

namespace peft {

/// The parameter groups of LoRA+ for an adapter's optimizer: `ratio` times the rate for every B and every
/// tensor of one dimension (biases, DoRA's magnitudes), `embedding_rate` for the factors on embeddings, the
/// rate itself for the rest. Weight decay everywhere but on tensors of the second kind that are biases or
/// belong to a LayerNorm. Groups that would be empty are left out.
/// `options`: of A; its `weight_decay` is what decays (the reference's default is 0, torch's 0.01).
/// `ratio`: at least 1; the paper suggests 16.
/// Throws: c10::ValueError for a ratio below 1 or a negative rate.
/// Paper: LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354. Reference: Hugging Face
/// PEFT's create_loraplus_optimizer.
///
/// Example:
/// ```
/// const auto options = torch::optim::AdamWOptions(2e-4).weight_decay(0);
/// peft::AdamW optimizer(adapter, peft::lora_plus(adapter, options, /*ratio=*/16), options);
/// ```
inline std::vector<ParameterGroup> lora_plus(const Adapter& adapter,
                                             const torch::optim::AdamWOptions& options, double ratio,
                                             double embedding_rate = 1e-6) {
  TORCH_CHECK_VALUE(ratio >= 1 && std::isfinite(ratio), "lora_plus: ratio must be at least 1, but got ",
                    ratio);
  TORCH_CHECK_VALUE(embedding_rate >= 0 && std::isfinite(embedding_rate),
                    "lora_plus: embedding_rate must be at least 0, but got ", embedding_rate);
  std::set<std::string> rest, embeddings, fast, fast_undecayed;
  for (const auto& entry : adapter.entries()) {
    const auto& path = entry.site->path();
    const auto prefix = (path.empty() ? "" : path + ".") + entry.piece->method() + ".";
    const auto info = entry.site->info();
    for (const auto& item : entry.piece->named_parameters()) {
      if (!item.value().requires_grad()) continue;
      const auto has = [&](const char* word) { return item.key().find(word) != std::string::npos; };
      const bool factor = has("lora_A") || has("lora_B");
      auto& group = info.lookup && factor                                   ? embeddings
                    : !has("lora_B") && item.value().dim() != 1             ? rest
                    : has("bias") || (info.layer == "LayerNorm" && !factor) ? fast_undecayed
                                                                            : fast;
      group.insert(prefix + item.key());
    }
  }
  for (const auto& [name, tensor] : adapter.named_parameters()) {  // what pieces share
    const bool is_placed =
        rest.count(name) || embeddings.count(name) || fast.count(name) || fast_undecayed.count(name);
    if (is_placed) continue;
    const bool is_bias = name.find("bias") != std::string::npos;
    (tensor.dim() != 1 ? rest : is_bias ? fast_undecayed : fast).insert(name);
  }
  std::vector<ParameterGroup> groups;
  const auto add = [&](std::set<std::string> names, double rate, bool decays) {
    if (names.empty()) return;
    auto own = options;
    own.lr(rate);
    if (!decays) own.weight_decay(0);
    groups.push_back(
        {[names = std::move(names)](const std::string& name) { return names.count(name) > 0; }, own});
  };
  add(std::move(rest), options.lr(), true);
  add(std::move(embeddings), embedding_rate, true);
  add(std::move(fast), options.lr() * ratio, true);
  add(std::move(fast_undecayed), options.lr() * ratio, false);
  return groups;
}

}  // namespace peft
