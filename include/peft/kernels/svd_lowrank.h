// svd_lowrank: the leading singular triples of a matrix by random projection.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <tuple>

#include "peft/core/compat.h"

namespace peft::internal {

/// Left vectors, values and right vectors of a matrix M ≈ U diag(S) Vᵀ.
struct Triples {
  Tensor U;  ///< (rows, q)
  Tensor S;  ///< (q), descending
  Tensor V;  ///< (columns, q)
};

/// `torch.svd_lowrank(M, q, niter)` of PyTorch 2: the projection draws min(rows, columns) × q normal numbers,
/// from `generator` where one is given. C++ LibTorch lacks it.
/// Paper: Finding structure with randomness, arXiv 0909.4061, algorithms 4.4 and 5.1.
inline Triples svd_lowrank(const Tensor& matrix, int64_t q, int64_t niter,
                           const at::Generator& generator = {}) {
  const bool wide = matrix.size(0) < matrix.size(1);
  const auto M = wide ? matrix.t() : matrix;
  const auto kind = M.options().requires_grad(false);
  const auto projection = generator.defined() ? torch::randn({M.size(1), q}, generator, kind)
                                              : torch::randn({M.size(1), q}, kind);
  auto Q = std::get<0>(at::linalg_qr(M.mm(projection)));
  for (int64_t i = 0; i < niter; ++i) {
    Q = std::get<0>(at::linalg_qr(M.t().mm(Q)));
    Q = std::get<0>(at::linalg_qr(M.mm(Q)));
  }
  const auto [inner, S, Vh] = at::linalg_svd(Q.t().mm(M), /*full_matrices=*/false);
  const auto U = Q.mm(inner), V = Vh.t();
  return wide ? Triples{V, S, U} : Triples{U, S, V};
}

}  // namespace peft::internal
