// Autocast: runs a stretch of code with automatic mixed precision.
#pragma once

#include <ATen/autocast_mode.h>

#include "peft/core/compat.h"

namespace peft {

/// While it lives, operations on `device` run in `dtype` where that is safe: `torch.autocast`. May be nested,
/// also to switch it off inside. Weights cast down are cached until the outermost one ends, so an optimizer's
/// step belongs outside. Backward too. `dtype`: bfloat16, on a GPU also float16, which needs its loss scaled
/// by the caller. Throws: c10::ValueError for another type.
///
/// Example:
/// ```
/// Tensor loss;
/// {
///   peft::Autocast autocast(torch::kCPU, torch::kBFloat16);
///   loss = torch::cross_entropy_loss(model->forward(inputs), labels);
/// }
/// loss.backward();
/// ```
class Autocast {
 public:
  explicit Autocast(torch::Device device, torch::ScalarType dtype = torch::kBFloat16, bool enabled = true)
      : device_(device.type()) {
    if (enabled) {
      TORCH_CHECK_VALUE(dtype == torch::kBFloat16 || (dtype == torch::kFloat16 && !device.is_cpu()),
                        "Autocast: on ", device.type(), " dtype must be BFloat16",
                        device.is_cpu() ? "" : " or Half", ", but got ", c10::toString(dtype));
    }
    was_enabled_ = internal::set_autocast(device_, enabled);
    was_dtype_ = internal::set_autocast_dtype(device_, dtype);
    if (!enabled) internal::set_autocast_dtype(device_, was_dtype_);
    at::autocast::increment_nesting();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    internal::set_autocast(device_, was_enabled_);
    internal::set_autocast_dtype(device_, was_dtype_);
  }

 private:
  torch::DeviceType device_;
  bool was_enabled_ = false;
  torch::ScalarType was_dtype_ = torch::kBFloat16;
};

}  // namespace peft
