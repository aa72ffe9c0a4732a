// Merge functions: pruning, sign election and truncation, by which tensors of one shape become one.
#pragma once

#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/quantile.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "peft/core/compat.h"

namespace peft::internal {

/// Zeroes all but the int(density · n) entries of largest magnitude. A density of 1 keeps everything.
inline Tensor prune_by_magnitude(const Tensor& tensor, double density) {
  if (density >= 1) return tensor;
  const auto kept = static_cast<int64_t>(density * static_cast<double>(tensor.numel()));
  const auto largest = std::get<1>(tensor.abs().reshape(-1).topk(kept));
  const auto mask = torch::zeros_like(tensor).reshape(-1).index_fill_(0, largest, 1);
  return tensor * mask.view(tensor.sizes());
}

/// Keeps each entry with probability `density` and divides those by it. Draws from the global generator as
/// the reference does, in the order of the tensor's memory; a density of 1 draws nothing.
/// Paper: Language Models are Super Mario (DARE), arXiv 2311.03099.
inline Tensor prune_at_random(const Tensor& tensor, double density) {
  if (density >= 1) return tensor;
  return tensor * torch::bernoulli(torch::full_like(tensor, density)) / density;
}

/// Σ w_i T_i. Shapes: stack (n, …); weights (n, 1, …).
inline Tensor weighted_sum(const Tensor& stack, const Tensor& weights) { return (stack * weights).sum(0); }

/// The mean, over the entries whose sign is the elected one, of w_i T_i. Elected is the sign of Σ T_i, or of
/// Σ sign T_i `by_frequency`; zero counts as plus, and no zero entry is kept. The weights do not vote.
/// Paper: TIES-Merging, arXiv 2306.01708 (there without weights).
inline Tensor elect_and_average(const Tensor& stack, const Tensor& weights, bool by_frequency) {
  const auto sign = stack.sign();
  const auto votes = (by_frequency ? sign : stack).sum(0);
  const auto elected = torch::where(votes >= 0, torch::ones_like(votes), -torch::ones_like(votes));
  const auto kept = sign == elected;
  return (stack * weights * kept).sum(0) / kept.sum(0).clamp_min(1);
}

/// What `truncate` may be told beside the rank.
struct TruncateOptions {
  std::optional<double> clamp;  ///< quantile of the pooled entries of both factors, at which they are cut
  bool full_matrices = true;
  std::string driver;  ///< cuSOLVER's, on CUDA
};

/// The nearest product of rank `rank`: A = V_rᵀ, B = U_r diag(S_r). Shapes: matrix (m, n), rank ≤ min(m, n);
/// A (rank, n), B (m, rank).
inline std::pair<Tensor, Tensor> truncate(const Tensor& matrix, int64_t rank,
                                          const TruncateOptions& options) {
  const auto [U, S, Vh] = options.driver.empty()
                              ? at::linalg_svd(matrix, options.full_matrices)
                              : at::linalg_svd(matrix, options.full_matrices, options.driver);
  auto B = at::matmul(U.narrow(1, 0, rank), torch::diag(S.narrow(0, 0, rank)));
  auto A = Vh.narrow(0, 0, rank);
  if (options.clamp) {
    const auto high = at::quantile(torch::cat({B.flatten(), A.flatten()}), *options.clamp);
    B = B.clamp(-high, high);
    A = A.clamp(-high, high);
  }
  return {A.contiguous(), B.contiguous()};
}

}  // namespace peft::internal
