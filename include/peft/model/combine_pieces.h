// The arithmetic of each method: how the tensors of several pieces on one layer become those of one.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "peft/core/problems.h"
#include "peft/core/site.h"
#include "peft/kernels/merge_functions.h"
#include "peft/methods/bias.h"
#include "peft/methods/ia3.h"
#include "peft/methods/layer_norm_tuning.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"
#include "peft/model/combine_options.h"

namespace peft::internal {

/// The pieces of one method on one site.
struct Terms {
  struct Term {
    size_t adapter;  ///< its place in the recipe
    std::shared_ptr<PieceImpl> piece;
  };
  std::shared_ptr<SiteImpl> site;
  std::shared_ptr<const Origin> origin;
  std::vector<Term> list;

  const std::string& method() const { return list.front().piece->method(); }
  /// A tensor's name in `Adapter::named_tensors`.
  std::string key(const std::string& tensor) const {
    return (site->path().empty() ? "" : site->path() + ".") + method() + "." + tensor;
  }
};

/// What is to be done: with which adapters, by which weights.
struct Recipe {
  CombineOptions options;
  std::vector<std::string> names;
  std::vector<double> weights;
  /// Instead of weights, an elementwise one for each tensor of each adapter, by `<site>.<method>.<tensor>`.
  std::vector<std::map<std::string, Tensor>> factors;
  bool weights_only = false;  ///< the adapters are copies of layers and biases, nothing else
  int64_t rank = 0;           ///< of the new LoRA, where no layer has another
  LoraOptions lora;           ///< of the new one, all layers' ranks in it

  /// The new LoRA's options on a site: without a bias of its own where the layer takes none.
  LoraOptions lora_on(const SiteInfo& site) const {
    auto result = lora;
    if (result.lora_bias() && !refusal(result, site).empty()) result.lora_bias(false);
    return result;
  }
  std::vector<double> weights_of(const Terms& terms) const {
    std::vector<double> found;
    for (const auto& term : terms.list) found.push_back(weights.at(term.adapter));
    return found;
  }
  /// The same for one tensor of the terms' pieces, each with as many axes as that: what PEM arithmetic
  /// multiplies by. Elementwise ones add up to 1.
  std::vector<Tensor> coefficients(const Terms& terms, const std::string& tensor, const Tensor& like) const {
    std::vector<Tensor> found;
    for (const auto& term : terms.list) {
      if (factors.empty()) {
        found.push_back(torch::scalar_tensor(weights.at(term.adapter), like.options()));
      } else {
        found.push_back(factors.at(term.adapter).at(terms.key(tensor)).to(like.options()));
      }
    }
    if (factors.empty()) return found;
    const auto total = std::accumulate(found.begin() + 1, found.end(), found.front());
    for (auto& factor : found) factor = factor / total;
    return found;
  }
};

/// The merge function a type applies to tensors of one shape. Shapes: as each of them.
inline Tensor merge_tensors(std::vector<Tensor> tensors, const std::vector<double>& weights,
                            const CombineOptions& options) {
  const auto type = options.type();
  if (prunes(type)) {
    for (auto& tensor : tensors) {
      tensor = draws(type) ? prune_at_random(tensor, *options.density())
                           : prune_by_magnitude(tensor, *options.density());
    }
  }
  const auto stack = torch::stack(tensors);
  std::vector<int64_t> shape(static_cast<size_t>(stack.dim()), 1);
  shape.front() = -1;
  const auto w = torch::tensor(weights, torch::kDouble).to(stack.options()).view(shape);
  const bool elects = type == CombineType::ties || type == CombineType::ties_svd ||
                      type == CombineType::dare_ties || type == CombineType::dare_ties_svd;
  return elects ? elect_and_average(stack, w, options.sign() == Sign::frequency) : weighted_sum(stack, w);
}

/// Factors of one LoRA: ΔW = scaling · B A, and scaling · bias on the output.
struct Factors {
  Tensor A, B, bias;
  double scaling = 1;

  int64_t rank() const { return A.size(0); }
  int64_t groups() const { return A.size(0) / B.size(1); }
};

inline Factors factors_of(const PieceImpl& piece) {
  const auto& lora = dynamic_cast<const LoraImpl&>(piece);
  TORCH_CHECK_VALUE(!lora.options.gating(), "'", lora.site().path,
                    "': LoRA with gating cannot be combined: its gate depends on the input");
  return {lora.full_A().detach(), lora.full_B().detach(),
          lora.lora_B_bias.defined() ? lora.lora_B_bias.detach() : Tensor(), lora.scaling()};
}

/// The same with zeros up to a rank.
inline Factors padded(const Factors& factors, int64_t rank) {
  const auto missing = rank - factors.rank();
  if (missing <= 0) return factors;
  const auto pad = [missing](const Tensor& tensor, int64_t axis) {
    auto shape = tensor.sizes().vec();
    shape[static_cast<size_t>(axis)] = missing;
    return torch::cat({tensor, torch::zeros(shape, tensor.options())}, axis);
  };
  return {pad(factors.A, 0), pad(factors.B, 1), factors.bias, factors.scaling};
}

/// Both stacked, for each group of a convolution apart: Σ w_i ΔW_i. Of `rank` at least.
inline Factors stack_factors(const std::vector<Factors>& terms, const std::vector<double>& weights,
                             int64_t rank) {
  const auto groups = terms.front().groups();
  std::vector<Tensor> A, B;
  for (size_t i = 0; i < terms.size(); ++i) {
    auto shape = terms[i].A.sizes().vec();
    shape.front() = shape.front() / groups;
    shape.insert(shape.begin(), groups);
    A.push_back((terms[i].A * (weights[i] * terms[i].scaling)).view(shape));
    B.push_back(terms[i].B);
  }
  return padded({torch::cat(A, 1).flatten(0, 1), torch::cat(B, 1), {}}, rank);
}

/// ΔW in the memory order the reference has it in, which is the order of its random draws.
inline Tensor product(const Factors& factors, bool lookup) {
  const auto& A = factors.A;
  const auto BA = at::mm(factors.B.flatten(1), A.flatten(1)) * factors.scaling;
  if (lookup) return BA.t();
  if (A.dim() == 2 || (A.dim() == 4 && A.size(2) == 1 && A.size(3) == 1)) return BA;
  auto shape = A.sizes().vec();
  shape.front() = BA.size(0);
  return BA.view(shape).transpose(0, 1).contiguous().transpose(0, 1);
}

/// The merged ΔW, truncated.
inline Factors truncate_factors(const std::vector<Factors>& terms, const std::vector<double>& weights,
                                const CombineOptions& options, int64_t rank, bool lookup) {
  std::vector<Tensor> products;
  for (const auto& term : terms) products.push_back(product(term, lookup));
  auto merged = merge_tensors(products, weights, options);
  merged = lookup ? merged.t() : merged.flatten(1);
  auto [A, B] =
      truncate(merged, rank, {options.svd_clamp(), options.svd_full_matrices(), options.svd_driver()});
  auto shape_A = terms.front().A.sizes().vec(), shape_B = terms.front().B.sizes().vec();
  shape_A[0] = shape_B[1] = rank;
  return {A.reshape(shape_A), B.reshape(shape_B), {}};
}

/// The rank of a layer in the new LoRA.
inline int64_t combined_rank(const std::vector<Factors>& terms, const Recipe& recipe) {
  const auto type = recipe.options.type();
  if (type == CombineType::cat || type == CombineType::exact) {
    int64_t total = 0;
    for (const auto& term : terms) total += term.rank();
    return type == CombineType::cat && terms.front().groups() == 1 ? std::max(total, recipe.rank) : total;
  }
  if (!truncates(type)) return terms.front().rank();
  const auto& A = terms.front().A;
  return std::min({recipe.rank, A.numel() / A.size(0), terms.front().B.size(0)});
}

inline std::vector<Factors> factors_of_terms(const Terms& terms) {
  std::vector<Factors> found;
  for (const auto& term : terms.list) found.push_back(factors_of(*term.piece));
  return found;
}

/// The new LoRA of a layer, with a scaling of 1. A LoRA's own bias is the merge function of the s_i b_i.
inline Factors combined_factors(const Terms& terms, const Recipe& recipe) {
  const auto& options = recipe.options;
  const auto type = options.type();
  const auto all = factors_of_terms(terms);
  const auto weights = recipe.weights_of(terms);
  const auto rank = combined_rank(all, recipe);
  Factors result;
  if (type == CombineType::cat || type == CombineType::exact) {
    result = stack_factors(all, weights, rank);
  } else if (truncates(type)) {
    result = truncate_factors(all, weights, options, rank, terms.site->info().lookup);
  } else {
    std::vector<Tensor> A, B;
    std::vector<double> weights_A, weights_B;
    for (size_t i = 0; i < all.size(); ++i) {
      const auto weight = type == CombineType::pem ? all[i].scaling : weights[i] * all[i].scaling;
      weights_B.push_back(std::sqrt(std::fabs(weight)));
      weights_A.push_back(weight >= 0 ? weights_B.back() : -weights_B.back());
      A.push_back(all[i].A);
      B.push_back(all[i].B);
    }
    if (type == CombineType::pem) {  // the sign is on B, and factors may be elementwise
      const auto on_A = recipe.coefficients(terms, "lora_A", A.front());
      const auto on_B = recipe.coefficients(terms, "lora_B", B.front());
      for (size_t i = 0; i < all.size(); ++i) {
        A[i] = A[i] * on_A[i].abs();
        B[i] = B[i] * on_B[i];
      }
    }
    result = {merge_tensors(A, weights_A, options), merge_tensors(B, weights_B, options), {}};
  }
  std::vector<Tensor> biases;
  for (const auto& term : all) {
    if (term.bias.defined()) biases.push_back(term.bias * term.scaling);
  }
  if (biases.empty()) return result;
  if (recipe.factors.empty()) {
    result.bias = merge_tensors(biases, weights, options);
  } else {
    const auto factors = recipe.coefficients(terms, "lora_B_bias", biases.front());
    for (size_t i = 0; i < biases.size(); ++i) biases[i] = biases[i] * factors[i];
    result.bias = torch::stack(biases).sum(0);
  }
  return result;
}

// One pair of functions a piece type: why its terms do not add up, or an empty string; and their sum.

inline std::string mismatch(const LoraImpl&, const Terms& terms, const Recipe& recipe) {
  const auto all = factors_of_terms(terms);
  const auto type = recipe.options.type();
  const auto& first = all.front();
  if (terms.site->info().bare) return "a bare parameter's LoRA has no arithmetic, as in the reference";
  if (truncates(type) && first.groups() > 1) {
    return "a convolution of several groups has no product to truncate (hint: cat or exact)";
  }
  for (size_t i = 0; i < all.size(); ++i) {
    const auto name = "'" + recipe.names[terms.list[i].adapter] + "'";
    if (dynamic_cast<const LoraImpl&>(*terms.list[i].piece).loftq_weight.defined()) {
      return "the LoRA of " + name + " runs on a quantised weight (LoftQ), and its change is no product";
    }
    if (all[i].bias.defined() != first.bias.defined()) return name + " and the first differ in lora_bias";
    if (truncates(type) || type == CombineType::cat || type == CombineType::exact) continue;
    if (all[i].rank() != first.rank()) {
      return "expected one rank for '" + std::string(to_string(type)) + "', but '" +
             recipe.names[terms.list.front().adapter] + "' has " + std::to_string(first.rank()) + " and " +
             name + " " + std::to_string(all[i].rank()) + " (hint: cat, svd or exact)";
    }
  }
  return {};
}

inline std::shared_ptr<PieceImpl> sum(const LoraImpl& first, const Terms& terms, const Recipe& recipe) {
  auto result = std::make_shared<LoraImpl>(recipe.lora_on(first.site()), first.site());
  // The parts of a module have one rank, the largest of theirs.
  const auto factors = padded(combined_factors(terms, recipe), result->lora_A.size(0));
  TORCH_INTERNAL_ASSERT(factors.A.sizes() == result->lora_A.sizes());
  result->to(first.lora_A.device(), first.lora_A.scalar_type());
  result->lora_A.copy_(factors.A);
  result->lora_B.copy_(factors.B);
  if (factors.bias.defined()) {
    result->lora_B_bias.copy_(factors.bias);
  } else if (result->lora_B_bias.defined()) {
    result->lora_B_bias.zero_();
  }
  return result;
}

inline std::string mismatch(const Ia3Impl& first, const Terms& terms, const Recipe& recipe) {
  const auto type = recipe.options.type();
  if (type != CombineType::linear && type != CombineType::exact && type != CombineType::pem) {
    return "(IA)³ vectors take 'linear', 'exact' or 'pem', but got '" + std::string(to_string(type)) + "'";
  }
  for (const auto& term : terms.list) {
    const auto& other = dynamic_cast<const Ia3Impl&>(*term.piece);
    if (other.feedforward == first.feedforward) continue;
    return "'" + recipe.names[terms.list.front().adapter] + "' and '" + recipe.names[term.adapter] +
           "' must scale the same side of the layer, but one scales the inputs (feedforward), the other the "
           "outputs";
  }
  return {};
}

/// Σ w_i l_i, the reference's; else 1 + Σ w_i (l_i − 1), for which a layer without a vector has ones.
inline std::shared_ptr<PieceImpl> sum(const Ia3Impl& first, const Terms& terms, const Recipe& recipe) {
  const auto coefficients = recipe.coefficients(terms, "ia3_l", first.ia3_l);
  const double neutral = recipe.options.type() == CombineType::linear ? 0 : 1;
  auto l = torch::full_like(first.ia3_l, neutral);
  for (size_t i = 0; i < coefficients.size(); ++i) {
    l = l + coefficients[i] * (dynamic_cast<const Ia3Impl&>(*terms.list[i].piece).ia3_l - neutral);
  }
  auto result = std::dynamic_pointer_cast<Ia3Impl>(first.copy());
  result->ia3_l.copy_(l);
  return result;
}

/// θ₀ + the merge function of the θ_i − θ₀, in float32 where the base is in less.
inline Tensor sum_of_changes(const Tensor& base, const std::string& tensor, const Terms& terms,
                             const Recipe& recipe) {
  const bool widen = base.element_size() < 4;
  const auto plain = widen ? base.detach().to(torch::kFloat32) : base.detach();
  std::vector<Tensor> changes;
  for (const auto& term : terms.list) {
    changes.push_back(term.piece->named_parameters()[tensor].detach().to(plain.options()) - plain);
  }
  if (recipe.weights_only && recipe.options.type() != CombineType::pem) {
    return plain + merge_tensors(changes, recipe.weights_of(terms), recipe.options);
  }
  const auto coefficients = recipe.coefficients(terms, tensor, plain);
  auto result = plain;
  for (size_t i = 0; i < changes.size(); ++i) result = result + coefficients[i] * changes[i];
  return result;
}

/// Why copies of a base's tensors take no such type, or an empty string.
inline std::string no_product(const Recipe& recipe) {
  const auto type = recipe.options.type();
  if (!recipe.weights_only || (!truncates(type) && type != CombineType::cat)) return {};
  return "'" + std::string(to_string(type)) +
         "' is for low-rank products, and a copy of a layer has none (hint: linear)";
}

inline std::string mismatch(const BiasImpl&, const Terms&, const Recipe& recipe) {
  return no_product(recipe);
}

inline std::shared_ptr<PieceImpl> sum(const BiasImpl& first, const Terms& terms, const Recipe& recipe) {
  auto result = std::dynamic_pointer_cast<BiasImpl>(first.copy());
  result->bias.copy_(sum_of_changes(terms.site->base_weights().bias, "bias", terms, recipe));
  return result;
}

/// Beside other pieces a copy of a layer is a task's head, which is no sum.
template <class Derived>
bool is_head(const Recipe& recipe) {
  return std::is_same_v<Derived, ReplaceImpl> && !recipe.weights_only;
}

template <class Derived, class Options>
std::string mismatch(const OwnWeights<Derived, Options>& first, const Terms& terms, const Recipe& recipe) {
  if (!is_head<Derived>(recipe)) return no_product(recipe);
  for (const auto& term : terms.list) {
    const auto& other = dynamic_cast<const Derived&>(*term.piece);
    if (other.weight.equal(first.weight) && (!first.bias.defined() || other.bias.equal(first.bias))) continue;
    return "'" + recipe.names[terms.list.front().adapter] + "' and '" + recipe.names[term.adapter] +
           "' each have their own copy of the layer (a task head), and these do not add up (hint: keep "
           "one's, "
           "CombineOptions::head)";
  }
  return {};
}

template <class Derived, class Options>
std::shared_ptr<PieceImpl> sum(const OwnWeights<Derived, Options>& first, const Terms& terms,
                               const Recipe& recipe) {
  auto result = std::dynamic_pointer_cast<Derived>(first.copy());
  if (is_head<Derived>(recipe)) return result;
  const auto base = terms.site->base_weights();
  result->weight.copy_(sum_of_changes(base.weight, "weight", terms, recipe));
  if (first.bias.defined()) result->bias.copy_(sum_of_changes(base.bias, "bias", terms, recipe));
  return result;
}

template <class Type, class Use>
bool as_type(const PieceImpl& piece, const Use& use) {
  const auto* typed = dynamic_cast<const Type*>(&piece);
  if (typed) use(*typed);
  return typed != nullptr;
}

/// Calls `use` with the piece as what it is. False where its method has no arithmetic.
template <class Use>
bool as_summable(const PieceImpl& piece, const Use& use) {
  return as_type<LoraImpl>(piece, use) || as_type<Ia3Impl>(piece, use) || as_type<BiasImpl>(piece, use) ||
         as_type<ReplaceImpl>(piece, use) || as_type<LayerNormTuningImpl>(piece, use);
}

}  // namespace peft::internal
