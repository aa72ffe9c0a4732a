// is_finite: whether a tensor holds NaN or infinity, in one pass.
#pragma once

#include <cmath>

#include "peft/core/compat.h"

namespace peft::internal {

/// True if no value is NaN or infinite. One such value makes the sum so, too; so does a sum that is too large
/// itself, after which the values are looked at. Waits for the device. Undefined: true.
inline bool is_finite(const Tensor& values) {
  if (!values.defined()) return true;
  const auto sum = values.element_size() < 4 ? values.sum(torch::kFloat32) : values.sum();
  return std::isfinite(sum.item<double>()) || values.isfinite().all().item<bool>();
}

}  // namespace peft::internal
