// IncrementalPca: principal components of rows that arrive in batches.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <cstdint>

#include "peft/core/compat.h"
#include "peft/kernels/svd_lowrank.h"

namespace peft::internal {

/// The `count` directions in which the rows seen so far vary most. Every batch is reduced together with what
/// is known of the earlier ones: their components times their singular values, and the move of the mean.
/// Reference: Hugging Face PEFT's IncrementalPCA (after scikit-learn's), with its randomised SVD of 2 · count
/// directions and 4 iterations from a generator of its own; its types too: float32 for the first batch,
/// float64 for what comes after.
class IncrementalPca {
 public:
  explicit IncrementalPca(int64_t count) : count_(count) {}

  /// Takes a batch (rows, features) of float32 numbers on the CPU, rows and features at least `count`.
  void fit(const Tensor& batch) {
    const auto rows = batch.size(0);
    const auto total = seen_ + rows;
    const auto sum = batch.sum(0, /*keepdim=*/false, torch::kFloat64);
    const auto centred = batch - sum / rows;
    auto spread = centred.square().sum(0) - centred.sum(0).square() / rows;
    auto mean = sum / total;
    auto X = batch;
    if (seen_ == 0) {
      X = (batch - mean).to(torch::kFloat32);
    } else {
      const auto seen = static_cast<double>(seen_), added = static_cast<double>(rows);
      const auto before = mean_ * seen;
      mean = (before + sum) / total;
      spread = variance_ * seen + spread +
               seen / added / static_cast<double>(total) * (before / (seen / added) - sum).square();
      const auto batch_mean = batch.mean(0);
      const auto move = std::sqrt(seen / static_cast<double>(total) * added) * (mean_ - batch_mean);
      X = torch::cat({singular_values.view({-1, 1}) * components, batch - batch_mean, move.view({1, -1})});
    }
    const auto found = svd_lowrank(X, 2 * count_, 4, at::detail::createCPUGenerator(42));
    auto directions = found.V.t();
    // The largest entry of each direction is positive.
    directions = directions * directions.gather(1, directions.abs().argmax(1, /*keepdim=*/true)).sign();
    mean_ = mean;
    variance_ = spread / total;
    seen_ = total;
    components = directions.narrow(0, 0, count_);
    singular_values = found.S.narrow(0, 0, count_);
    explained_ratio = singular_values.square() / (variance_ * total).sum();
  }

  int64_t count() const { return count_; }

  Tensor components;       ///< (count, features), by falling variance; undefined before the first batch
  Tensor singular_values;  ///< (count)
  Tensor explained_ratio;  ///< (count): the share of all variance along each

 private:
  int64_t count_;
  int64_t seen_ = 0;
  Tensor mean_, variance_;
};

}  // namespace peft::internal
