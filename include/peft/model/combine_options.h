// CombineOptions: how adapters are put together.
#pragma once

#include <torch/arg.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "peft/core/compat.h"

namespace peft {

/// How the tensors of several adapters become those of one. w_i: the weights; s_i, A_i, B_i: scale and
/// factors of a LoRA, ΔW_i = s_i B_i A_i. Names and arithmetic are those of Hugging Face PEFT 0.21.2's
/// `add_weighted_adapter`, but for the last two.
enum class CombineType : std::uint8_t {
  linear,       ///< A = Σ sign(w_i s_i) √|w_i s_i| A_i, B = Σ √|w_i s_i| B_i: holds cross terms B_i A_j
  cat,          ///< A and B stacked: Σ w_i ΔW_i exactly, of rank Σ r_i in every layer
  svd,          ///< Σ w_i ΔW_i, truncated
  ties,         ///< A and B apart: pruned by magnitude, signs elected, averaged where they agree
  ties_svd,     ///< the same on the ΔW_i, truncated
  dare_linear,  ///< A and B apart: pruned at random, rescaled, summed
  dare_linear_svd,      ///< the same on the ΔW_i, truncated
  dare_ties,            ///< A and B apart: pruned at random, then as ties
  dare_ties_svd,        ///< the same on the ΔW_i, truncated
  magnitude_prune,      ///< A and B apart: pruned by magnitude, summed
  magnitude_prune_svd,  ///< the same on the ΔW_i, truncated
  exact,  ///< Σ w_i ΔW_i exactly, each layer of the rank its own terms add up to; no cross terms
  pem,    ///< A = Σ |w_i| √s_i A_i, B = Σ w_i √s_i B_i (arXiv 2306.14870): holds cross terms
};

namespace internal {

inline constexpr std::array<std::pair<CombineType, const char*>, 13> combine_type_names{
    {{CombineType::linear, "linear"},
     {CombineType::cat, "cat"},
     {CombineType::svd, "svd"},
     {CombineType::ties, "ties"},
     {CombineType::ties_svd, "ties_svd"},
     {CombineType::dare_linear, "dare_linear"},
     {CombineType::dare_linear_svd, "dare_linear_svd"},
     {CombineType::dare_ties, "dare_ties"},
     {CombineType::dare_ties_svd, "dare_ties_svd"},
     {CombineType::magnitude_prune, "magnitude_prune"},
     {CombineType::magnitude_prune_svd, "magnitude_prune_svd"},
     {CombineType::exact, "exact"},
     {CombineType::pem, "pem"}}};

}  // namespace internal

/// The type's name in files and messages: Hugging Face's, where it has the type.
inline const char* to_string(CombineType type) {
  for (const auto& [known, name] : internal::combine_type_names) {
    if (known == type) return name;
  }
  return "?";
}

/// True for the types that truncate a sum of products to a rank.
inline bool truncates(CombineType type) {
  return type == CombineType::svd || std::string(to_string(type)).ends_with("_svd");
}
/// True for the types that drop entries, at random or by size.
inline bool prunes(CombineType type) {
  const std::string name = to_string(type);
  return name.starts_with("ties") || name.starts_with("dare") || name.starts_with("magnitude");
}
/// True for the types that draw from the random generator.
inline bool draws(CombineType type) { return std::string(to_string(type)).starts_with("dare"); }

/// What elects the sign of an entry: Σ T_i, or how many are positive and negative.
enum class Sign : std::uint8_t { total, frequency };

/// Settings of `combine`. Defaults are Hugging Face's. Example:
/// `CombineOptions(CombineType::ties).density(0.5)`.
struct CombineOptions {
  explicit CombineOptions(CombineType type = CombineType::svd) : type_(type) {}

  TORCH_ARG(CombineType, type);
  /// Part of the entries that survive pruning, in (0, 1]; `ties`, `dare_…` and `magnitude_prune` need it, the
  /// others take no notice of it.
  TORCH_ARG(std::optional<double>, density) = {};
  /// Rank of what is truncated, at least 1; by default the largest of the adapters'.
  TORCH_ARG(std::optional<int64_t>, rank) = {};
  /// Of `ties` and `dare_ties`.
  TORCH_ARG(Sign, sign) = Sign::total;
  /// Of what is truncated: both factors are cut at ± this quantile of all their entries, in (0, 1].
  TORCH_ARG(std::optional<double>, svd_clamp) = {};
  /// Of what is truncated: whether the full U and V are computed. The result is the same; false takes less
  /// memory where a matrix is long, as an embedding's.
  TORCH_ARG(bool, svd_full_matrices) = true;
  /// Of what is truncated on CUDA: "gesvd", "gesvdj" or "gesvda".
  TORCH_ARG(std::string, svd_driver) = {};
  /// The adapter whose own layers (task heads) the result gets, where several have some: these are no sums.
  TORCH_ARG(std::string, head) = {};
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const CombineOptions& options) {
  const auto& density = options.density();
  TORCH_CHECK_VALUE(density || !prunes(options.type()), "CombineOptions: density must be given for '",
                    to_string(options.type()), "', but got none");
  TORCH_CHECK_VALUE(!density || (*density > 0 && *density <= 1),
                    "CombineOptions: density must be in (0, 1], but got ", *density);
  TORCH_CHECK_VALUE(!options.rank() || *options.rank() >= 1,
                    "CombineOptions: rank must be at least 1, but got ", *options.rank());
  const auto& clamp = options.svd_clamp();
  TORCH_CHECK_VALUE(!clamp || (*clamp > 0 && *clamp <= 1),
                    "CombineOptions: svd_clamp must be in (0, 1], but got ", *clamp);
  const auto& driver = options.svd_driver();
  TORCH_CHECK_VALUE(driver.empty() || driver == "gesvd" || driver == "gesvdj" || driver == "gesvda",
                    "CombineOptions: svd_driver must be gesvd, gesvdj or gesvda, but got '", driver, "'");
}

}  // namespace peft
