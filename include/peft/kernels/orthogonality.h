// Orthogonality: how far matrices are from orthogonal, for all matrices of a model at once.
#pragma once

#include <cstdint>
#include <vector>

#include "peft/core/compat.h"

namespace peft::internal {

/// Calls `use(members, stack)` for each set of matrices of one shape, type and device: their indices, and
/// themselves as (count, rows, columns).
template <class Use>
void over_stacks(const std::vector<Tensor>& matrices, const Use& use) {
  std::vector<std::vector<size_t>> sets;
  for (size_t i = 0; i < matrices.size(); ++i) {
    size_t set = 0;
    const auto fits = [&](const Tensor& other) {
      return other.sizes() == matrices[i].sizes() && other.scalar_type() == matrices[i].scalar_type() &&
             other.device() == matrices[i].device();
    };
    while (set < sets.size() && !fits(matrices[sets[set].front()])) ++set;
    if (set == sets.size()) sets.emplace_back();
    sets[set].push_back(i);
  }
  for (const auto& set : sets) {
    std::vector<Tensor> members;
    for (const auto i : set) members.push_back(matrices[i]);
    use(set, torch::stack(members));
  }
}

/// P Pᵀ − I of each matrix P of a stack, or, `transposed`, of its transpose.
inline Tensor gram_difference(const Tensor& stack, bool transposed) {
  const auto other = stack.transpose(1, 2);
  auto difference = transposed ? at::bmm(other, stack) : at::bmm(stack, other);
  difference.diagonal(0, 1, 2).sub_(1);
  return difference;
}

/// Σ ‖P Pᵀ − I‖_F over matrices, or over their transposes: a scalar on the device of the first.
inline Tensor orthogonality(const std::vector<Tensor>& matrices, bool transposed) {
  auto total =
      matrices.empty() ? torch::zeros({}) : torch::zeros({}, matrices.front().options().requires_grad(false));
  over_stacks(matrices, [&](const std::vector<size_t>&, const Tensor& stack) {
    total = total + gram_difference(stack, transposed).flatten(1).norm(2, 1).sum().to(total.device());
  });
  return total;
}

/// The gradient of `weight` times that sum by each matrix, in closed form: 2 (P Pᵀ − I) P / ‖P Pᵀ − I‖_F. At
/// exact orthogonality, where there is none, it is 0, as torch's norm has it.
inline std::vector<Tensor> orthogonality_gradients(const std::vector<Tensor>& matrices, bool transposed,
                                                   double weight) {
  std::vector<Tensor> gradients(matrices.size());
  over_stacks(matrices, [&](const std::vector<size_t>& members, const Tensor& stack) {
    auto difference = gram_difference(stack, transposed);
    const auto norm = difference.flatten(1).norm(2, 1).view({-1, 1, 1});
    difference.mul_(torch::where(norm > 0, 2 * weight / norm, torch::zeros_like(norm)));
    const auto all = (transposed ? at::bmm(stack, difference) : at::bmm(difference, stack)).unbind();
    for (size_t i = 0; i < members.size(); ++i) gradients[members[i]] = all[i];
  });
  return gradients;
}

}  // namespace peft::internal
