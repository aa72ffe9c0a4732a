// LowRankTerm: what a low-rank method adds to a linear layer, and whether one node may compute it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "peft/core/compat.h"
#include "peft/kernels/fast_paths.h"
#include "peft/kernels/hash_dropout.h"
#include "peft/kernels/thin_products.h"

namespace peft {

/// What a piece adds to a linear layer: s · drop(x) (A ⊙ E)ᵀ Bᵀ. The factors are of the layer's type, or in
/// float32 beside a layer in a half type: the sum is then in float32, and what is added to y is rounded once.
struct LowRankTerm {
  Tensor A;            ///< (rank, in)
  Tensor B;            ///< (out, rank)
  Tensor E;            ///< (rank, 1), or undefined: ones
  double scale = 1;    ///< s
  double dropout = 0;  ///< rate; 0 outside training
  /// Takes |s| Σ |B (A ⊙ E) ⊙ G| / √(in · out) in every backward, G the gradient of the layer's weight;
  /// undefined: nobody wants it.
  Tensor score;
};

/// A linear layer as it is: y = x Wᵀ + b.
struct PlainLinear {
  Tensor weight;  ///< (out, in), perhaps a view
  Tensor bias;    ///< (out), or undefined
};

namespace internal {

/// A layer with what is added to it, if anything.
struct LowRankLinear {
  PlainLinear linear;
  std::optional<LowRankTerm> term;
};

/// Whether the node may stand for these layers on this input: everything on one device, layers and input of
/// one floating type, the factors too or in another that has a kernel; W and b constant, no autocast, no
/// forward-mode derivatives, a kernel for the dropout, and one rate of it.
inline bool low_rank_linear_fits(const Tensor& x, const std::vector<LowRankLinear>& layers) {
  if (!FastPaths::enabled() || x.dim() == 0 || x.layout() != torch::kStrided ||
      !(x.is_cpu() || x.is_cuda()) || !x.is_floating_point() || autocasts(x.device().type())) {
    return false;
  }
  const auto alike = [&x](const Tensor& t, int64_t dim, torch::ScalarType type) {
    return t.dim() == dim && t.scalar_type() == type && t.device() == x.device() &&
           t.layout() == torch::kStrided && !t._fw_grad(0).defined();
  };
  const auto type = x.scalar_type();
  const auto constant = [](const Tensor& t) { return !(t.requires_grad() && torch::GradMode::is_enabled()); };
  if (x._fw_grad(0).defined()) return false;
  std::optional<double> rate;
  torch::ScalarType factors{};
  for (const auto& [linear, term] : layers) {
    const auto& [W, b] = linear;
    if (!alike(W, 2, type) || !constant(W) || W.size(1) != x.size(-1)) return false;
    if (b.defined() && (!alike(b, 1, type) || !constant(b))) return false;
    if (!term) continue;
    const auto& [A, B, E, scale, dropout, score] = *term;
    const auto own = A.scalar_type();
    if (!alike(A, 2, own) || !alike(B, 2, own) || (E.defined() && !alike(E, 2, own)) || A.size(0) == 0 ||
        A.size(1) != W.size(1) || B.size(0) != W.size(0)) {
      return false;
    }
    if (own != type && !has_thin_kernel(type, A)) return false;
    if (rate.value_or(dropout) != dropout || (dropout > 0 && !HashDropout::supports(x))) return false;
    if (rate && own != factors) return false;
    rate = dropout;
    factors = own;
  }
  return rate.has_value();
}

}  // namespace internal
}  // namespace peft
