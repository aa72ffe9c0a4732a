// combine: arithmetic on adapters; a new adapter from the weighted tensors of others.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "peft/model/combination.h"

namespace peft {
namespace internal {

/// Weights divided by their sum.
inline std::vector<WeightedAdapter> normalized(std::vector<WeightedAdapter> adapters, const char* verb) {
  double sum = 0;
  for (const auto& one : adapters) sum += one.weight;
  TORCH_CHECK_VALUE(adapters.empty() || (std::isfinite(sum) && sum != 0), verb,
                    ": the weights must be finite and their sum not 0, but got ", sum);
  for (auto& one : adapters) one.weight /= sum;
  return adapters;
}

}  // namespace internal

/// Makes a new adapter of others on the model: frozen, not active, the others untouched. What it means for
/// each method:
///
/// - LoRA: as the type says, a scaling of α / r = 1 (Hugging Face keeps `use_rslora` and so scales its result
///   by √r; ours is not rsLoRA). Ranks may differ between the layers, and for cat, exact and the truncated
///   types between the adapters. A layer that only some have gets the sum over those. Init, dropout and the
///   model's description are the first adapter's.
/// - (IA)³: `linear`: l = Σ w_i l_i, of which only weights that add up to 1 are sensible; `exact` and `pem`:
///   l = 1 + Σ w_i (l_i − 1), where a layer without a vector counts as ones.
/// - Copies of base tensors alone (BitFit, LayerNorm tuning, top layers, full fine-tuning) are task vectors:
///   θ₀ + the merge function of the θ_i − θ₀.
/// - Beside another method, biases and norms are θ₀ + Σ w_i (θ_i − θ₀), and a Replace is a task's head: it is
///   copied from the one adapter that has it, or from `CombineOptions::head`.
/// - No other method has an arithmetic: DoRA, LoHa, LoKr, OFT and the like change the weights by what is no
///   sum over their tensors.
///
/// One adapter alone is taken as `linear`. Random pruning draws what Hugging Face's does, so that one seed
/// gives one result.
///
/// Throws: c10::ValueError listing all problems, the model unchanged: options out of range; unknown adapters,
/// one twice, a name that is taken; weights or tensors that are not finite; adapters of different methods,
/// ranks, or sides of a layer; a method without an arithmetic; two heads on one layer; a merged model.
/// Reference: Hugging Face PEFT 0.21.2, `LoraModel.add_weighted_adapter`.
///
/// Example:
/// ```
/// auto both = peft::combine(*model, {{"news", 0.7}, {"spam", -0.3}},
///                           peft::CombineOptions(peft::CombineType::ties).density(0.5), "both");
/// peft::set_active(*model, {"both"});
/// ```
inline Adapter combine(nn::Module& model, const std::vector<WeightedAdapter>& adapters,
                       const CombineOptions& options, const std::string& name) {
  return internal::Combination(model, "combine", adapters, options, name).attach();
}

/// Settings of `addition`.
struct AdditionOptions {
  /// Products B_i A_i summed exactly, in a LoRA of rank Σ r_i; else A and B apart, as the paper does, which
  /// leaves cross terms B_i A_j and the rank as it was.
  TORCH_ARG(bool, exact) = false;
  /// One an adapter: the weight of an entry is λ_i F_i / ‖F_i‖, divided by their sum. The last one's F is at
  /// least 1e-6, as in the reference; the weights are positive. Not together with `exact`.
  TORCH_ARG(std::vector<Fisher>, fisher) = {};
};

/// Adds modules up: θ = Σ λ_i θ_i, the λ divided by their sum. For modules that were trained from one start.
/// Throws: as `combine`; weights whose sum is 0.
/// Paper: Composing Parameter-Efficient Modules with Arithmetic Operations, arXiv 2306.14870 (addition).
inline Adapter addition(nn::Module& model, const std::vector<WeightedAdapter>& adapters,
                        const std::string& name, const AdditionOptions& options = {}) {
  TORCH_CHECK_VALUE(!options.exact() || options.fisher().empty(),
                    "AdditionOptions: fisher weighs A and B apart, and cannot be combined with exact");
  const auto type = options.exact() ? CombineType::exact : CombineType::pem;
  internal::Combination combination(model, "addition", internal::normalized(adapters, "addition"),
                                    CombineOptions(type), name);
  if (!options.fisher().empty()) combination.weigh_by(options.fisher());
  return combination.attach();
}

/// The mean of the adapters' changes, exactly: LoRA's products without cross terms.
/// Throws: as `combine`.
inline Adapter average(nn::Module& model, const std::vector<std::string>& adapters, const std::string& name) {
  std::vector<WeightedAdapter> weighted;
  for (const auto& adapter : adapters)
    weighted.push_back({adapter, 1.0 / static_cast<double>(adapters.size())});
  return internal::Combination(model, "average", weighted, CombineOptions(CombineType::exact), name).attach();
}

/// Takes away what an adapter does: ΔW ← −λ ΔW, for (IA)³ l ← 1 − λ (l − 1), which is 2 − l for λ = 1; copies
/// of layers θ₀ − λ (θ − θ₀). With a λ below 1 that is unlearning as the paper does it.
/// Throws: as `combine`.
/// Paper: arXiv 2306.14870 (negation and unlearning).
inline Adapter negation(nn::Module& model, const std::string& adapter, const std::string& name,
                        double lambda = 1.0) {
  return internal::Combination(model, "negation", {{adapter, -lambda}}, CombineOptions(CombineType::exact),
                               name)
      .attach();
}

/// Carries a task to another domain: λ a + (1 − λ)(b − c), a trained on the task in domain 1, b and c
/// language models of domain 2 and 1. LoRA: A = λ A_a + (1 − λ)(A_b + A_c), B = λ B_a + (1 − λ)(B_b − B_c),
/// or with `exact` the sum of the products; (IA)³: l = 1 + λ (l_a − 1) + (1 − λ)(l_b − l_c); copies of layers
/// likewise about θ₀. Throws: as `combine`; λ outside [0, 1]. Paper: arXiv 2306.14870, §3.2 (domain
/// transfer).
inline Adapter analogy(nn::Module& model, const std::string& a, const std::string& b, const std::string& c,
                       double lambda, const std::string& name, bool exact = false) {
  TORCH_CHECK_VALUE(lambda >= 0 && lambda <= 1, "analogy: lambda must be in [0, 1], but got ", lambda);
  const auto type = exact ? CombineType::exact : CombineType::pem;
  return internal::Combination(model, "analogy", {{a, lambda}, {b, 1 - lambda}, {c, lambda - 1}},
                               CombineOptions(type), name)
      .attach();
}

}  // namespace peft
