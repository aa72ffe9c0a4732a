// Change: which of the base's values a merged adapter makes different, and the rank of the difference.
#pragma once

#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>

#include <algorithm>
#include <map>
#include <string>
#include <tuple>

#include "peft/core/adapter.h"
#include "peft/model/active.h"
#include "peft/model/merge.h"
#include "survey/method_row.h"

namespace survey {

namespace internal {

/// Rows and columns that are not all 0. They alone make the rank.
inline torch::Tensor without_zeros(const torch::Tensor& matrix) {
  const auto used = [](const torch::Tensor& of, int64_t dim) {
    return of.ne(0).any(dim).nonzero().squeeze(1);
  };
  const auto rows = matrix.index_select(0, used(matrix, 1));
  return rows.index_select(1, used(rows, 0));
}

/// The number of singular values above a billionth of the largest. In double precision what is not zero
/// through rounding alone lies six orders of magnitude below that.
/// Shapes: (rows, columns), double.
inline int64_t rank_of(const torch::Tensor& matrix) {
  constexpr double tolerance = 1e-9;
  auto kept = without_zeros(matrix);
  if (kept.size(0) < kept.size(1)) kept = kept.t();
  // The singular values of a tall matrix are those of its triangle.
  if (kept.size(0) > kept.size(1)) kept = std::get<1>(at::linalg_qr(kept));
  const auto values = std::get<1>(at::linalg_svd(kept, /*full_matrices=*/false));
  return values.gt(values.max() * tolerance).sum().item<int64_t>();
}

/// The base's parameters by path.
inline std::map<std::string, torch::Tensor> base_of(torch::nn::Module& model) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& node : peft::internal::walk(model)) {
    if (!node.site) continue;
    for (const auto& item : node.site->base_parameters())
      tensors.emplace(node.path + "." + item.key(), item.value().detach());
  }
  return tensors;
}

}  // namespace internal

/// Moves every trained value of an adapter a little, so that the change is what the method can make and not
/// what a few steps have made of it: a word that no text held would not have changed. Ranks that a
/// controller shares out stay as they are.
inline void stir(const peft::Adapter& adapter) {
  if (!adapter.record().controllers.empty()) return;
  constexpr double spread = 0.01;
  torch::NoGradGuard no_grad;
  for (auto& tensor : adapter.parameters()) tensor.add_(torch::randn_like(tensor), spread);
}

/// Merges the active adapter of a model in double precision and compares. Throws: what `merge` throws.
inline Change merge_and_compare(torch::nn::Module& model) {
  torch::NoGradGuard no_grad;
  const auto before = internal::base_of(model);
  peft::merge(model);
  Change change;
  change.rank_least = std::numeric_limits<int64_t>::max();
  for (const auto& [path, value] : internal::base_of(model)) {
    const auto& original = before.at(path);
    if (value.data_ptr() == original.data_ptr()) continue;
    auto difference = value - original;
    const auto entries = difference.count_nonzero().item<int64_t>();
    if (entries == 0) continue;
    change.entries += entries;
    if (difference.dim() < 2) {
      ++change.vectors;
      continue;
    }
    difference = difference.flatten(1);
    const auto rank = internal::rank_of(difference);
    ++change.matrices;
    change.rank_least = std::min(change.rank_least, rank);
    change.rank_most = std::max(change.rank_most, rank);
    if (rank == std::min(difference.size(0), difference.size(1))) ++change.full;
  }
  if (change.matrices == 0) change.rank_least = 0;
  return change;
}

}  // namespace survey
