// Draws: how the references start the small layers of an adapter.
#pragma once

#include <torch/nn/init.h>

#include <cmath>

#include "peft/core/compat.h"

namespace peft::internal {

/// torch.nn.Linear's: U(±1/√in), the weight first.
inline void draw_linear(const Tensor& weight, const Tensor& bias) {
  nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  const auto bound = 1.0 / std::sqrt(static_cast<double>(weight.size(1)));
  bias.uniform_(-bound, bound);
}

/// A gate's in AdapterHub: as a Linear, then a weight of N(0, 0.02²) in its place.
inline void draw_gate(const Tensor& weight, const Tensor& bias) {
  draw_linear(weight, bias);
  weight.normal_(0.0, 0.02);
}

}  // namespace peft::internal
