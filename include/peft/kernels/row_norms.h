// Row norms: the length of each row of W + s B A, without the sum.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>

#include "peft/core/compat.h"
#include "peft/kernels/kept.h"

namespace peft::internal {

/// ‖W_j + s (B A)_j‖ for each row j, from ‖W_j‖² + 2 s B_j · (A Wᵀ)_j + s² B_j (A Aᵀ) B_jᵀ, whose first term
/// is kept until W changes: W is read once, and nothing of its size is written. In float or double, under
/// autocast too; the terms are added up in double. Where a row is shorter than W's own the error grows with
/// (‖W_j‖ / ‖V_j‖)²; on the CPU rows shorter than a quarter of it make all be measured as they are, so that
/// the error stays below 1e-6.
/// Shapes: W (out, in), A (rank, in), B (out, rank); the result (out), without a history.
class RowNorms {
 public:
  /// True for tensors the factored form is for.
  static bool fits(const Tensor& W, const Tensor& A, const Tensor& B) {
    const auto type = W.scalar_type();
    return W.dim() == 2 && A.dim() == 2 && B.dim() == 2 &&
           (type == torch::kFloat32 || type == torch::kFloat64) && A.scalar_type() == type &&
           B.scalar_type() == type && A.device() == W.device() && B.device() == W.device();
  }

  Tensor of(const Tensor& W, const Tensor& A, const Tensor& B, double s) const {
    const torch::NoGradGuard no_grad;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto own = squares_.of({W}, 0, [&] {
      return at::linalg_vector_norm(W, 2, at::IntArrayRef{1}, false, torch::kFloat64).square_();
    });
    auto product = at::mm(A, W.t());
    product.addmm_(at::mm(A, A.t()), B.t(), 2 * s, s * s);
    const auto squares = product.mul_(B.t()).sum(0, false, torch::kFloat64).add_(own);
    if (squares.is_cpu() && shrinks(squares, own)) {
      return at::linalg_vector_norm(at::addmm(W, B, A, 1, s), 2, at::IntArrayRef{1});
    }
    return squares.clamp_min(0).sqrt_().to(W.scalar_type());
  }

 private:
  static bool shrinks(const Tensor& squares, const Tensor& own) {
    const auto *now = squares.data_ptr<double>(), *before = own.data_ptr<double>();
    for (int64_t j = 0; j < squares.numel(); ++j) {
      if (now[j] < before[j] / 16) return true;
    }
    return false;
  }

  Kept squares_;
};

}  // namespace peft::internal
