// GradScaler: scales the loss so that half-precision gradients do not vanish.
#pragma once

#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_amp_update_scale.h>
#include <torch/arg.h>
#include <torch/optim/optimizer.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/problems.h"
#include "peft/kernels/is_finite.h"
#include "peft/train/adapter_optimizer.h"

namespace peft {

/// Settings of `GradScaler`.
struct GradScalerOptions {
  /// The first scale; positive.
  TORCH_ARG(double, init_scale) = 65536;
  /// What the scale is multiplied by after `growth_interval` steps in a row without infinity; above 1.
  TORCH_ARG(double, growth_factor) = 2;
  /// And after a step with; in (0, 1).
  TORCH_ARG(double, backoff_factor) = 0.5;
  TORCH_ARG(int64_t, growth_interval) = 2000;
  /// False: everything passes through as it is.
  TORCH_ARG(bool, enabled) = true;
};

/// Scales the loss, and the gradients back before they are used; a step whose gradients are not finite is
/// left out and the scale becomes smaller. For float16 (`Autocast`, or a float16 base), whose gradients
/// underflow; bfloat16 needs none. The rules are those of `torch.amp.GradScaler`, and so is the one wait for
/// the device, in `step`. Clipping with `AdamW`'s `max_grad_norm` sees the gradients scaled back.
///
/// Throws: c10::ValueError for options out of range; c10::Error for steps out of order and gradients in
/// float16, which belong to weights that should be in float32. Paper: Mixed Precision Training, arXiv
/// 1710.03740, §3.2.
///
/// Example:
/// ```
/// peft::GradScaler scaler;
/// scaler.scale(loss).backward();
/// scaler.step(optimizer);
/// scaler.update();
/// ```
class GradScaler {
 public:
  explicit GradScaler(GradScalerOptions settings = {}) : options(settings) {
    internal::Problems problems;
    const auto complain = [&](const char* text, double value) {
      problems.add(std::string(text) + ", but got " + c10::str(value));
    };
    if (!(options.init_scale() > 0 && std::isfinite(options.init_scale())))
      complain("init_scale must be positive", options.init_scale());
    if (!(options.growth_factor() > 1 && std::isfinite(options.growth_factor())))
      complain("growth_factor must be above 1", options.growth_factor());
    if (!(options.backoff_factor() > 0 && options.backoff_factor() < 1))
      complain("backoff_factor must be in (0, 1)", options.backoff_factor());
    if (options.growth_interval() < 1)
      complain("growth_interval must be positive", static_cast<double>(options.growth_interval()));
    problems.raise("GradScaler");
    scale_ = torch::full({}, options.init_scale(), torch::kFloat32);
    successes_ = torch::zeros({}, torch::kInt32);
  }

  /// The loss times the scale.
  Tensor scale(const Tensor& loss) {
    if (!options.enabled()) return loss;
    if (scale_.device() != loss.device()) {
      scale_ = scale_.to(loss.device());
      successes_ = successes_.to(loss.device());
    }
    return loss * scale_;
  }

  /// Divides the gradients of an optimizer's parameters by the scale: what `step` does unless it was done
  /// before, for those who look at gradients or change them in between.
  void unscale(torch::optim::Optimizer& optimizer) {
    if (!options.enabled()) return;
    auto& state = optimizers_[&optimizer];
    TORCH_CHECK(state.stage == Stage::ready, "GradScaler::unscale: ",
                state.stage == Stage::unscaled ? "the gradients were divided already since the last update()"
                                               : "step() came before it");
    for (const auto& group : optimizer.param_groups()) {
      for (const auto& parameter : group.params()) {
        const auto& gradient = parameter.grad();
        if (!gradient.defined()) continue;
        TORCH_CHECK(gradient.scalar_type() != torch::kFloat16,
                    "GradScaler: gradients must be in float32, but got Half (hint: keep what trains in "
                    "float32)");
        TORCH_CHECK(gradient.device() == scale_.device(), "GradScaler: the loss was on ", scale_.device(),
                    ", but a gradient is on ", gradient.device());
      }
    }
    std::vector<Tensor> on_gpu;
    const torch::NoGradGuard no_grad;
    // In float64, so that the inverse of a scale that float32 holds is right to the last bit.
    const auto inverse = scale_.to(torch::kFloat64).reciprocal().to(torch::kFloat32);
    if (auto* own = dynamic_cast<AdapterOptimizer*>(&optimizer)) {
      own->drop_untouched_gradients();
      own->unscale_controllers(inverse);
    }
    state.not_finite = torch::zeros({}, scale_.options());
    for (const auto& group : optimizer.param_groups()) {
      for (const auto& parameter : group.params()) {
        auto gradient = parameter.grad();
        if (!gradient.defined()) continue;
        if (gradient.is_cuda()) {
          on_gpu.push_back(gradient);
        } else {
          gradient.mul_(inverse);
          if (!internal::is_finite(gradient)) state.not_finite.fill_(1);
        }
      }
    }
    if (!on_gpu.empty()) {
      at::_amp_foreach_non_finite_check_and_unscale_(on_gpu, state.not_finite, inverse);
    }
    state.stage = Stage::unscaled;
  }

  /// A step of the optimizer, unless a gradient is not finite. Returns whether there was one.
  bool step(torch::optim::Optimizer& optimizer) {
    if (!options.enabled()) {
      optimizer.step();
      return true;
    }
    auto& state = optimizers_[&optimizer];
    TORCH_CHECK(state.stage != Stage::stepped, "GradScaler::step was called already since the last update()");
    if (state.stage == Stage::ready) unscale(optimizer);
    state.stage = Stage::stepped;
    if (state.not_finite.item<float>() != 0) return false;
    optimizer.step();
    return true;
  }

  /// Makes the scale what the last steps ask for. Once an iteration, after all optimizers' steps.
  void update() {
    if (!options.enabled()) return;
    Tensor not_finite;
    for (const auto& [optimizer, state] : optimizers_) {
      if (!state.not_finite.defined()) continue;
      not_finite = not_finite.defined() ? not_finite + state.not_finite : state.not_finite;
    }
    TORCH_CHECK(not_finite.defined(), "GradScaler::update: there has been no step() or unscale() before it");
    const torch::NoGradGuard no_grad;
    if (scale_.is_cuda()) {
      at::_amp_update_scale_(scale_, successes_, not_finite, options.growth_factor(),
                             options.backoff_factor(), options.growth_interval());
    } else if (not_finite.item<float>() != 0) {
      scale_.mul_(options.backoff_factor());
      successes_.zero_();
    } else if (successes_.add_(1).item<int>() == options.growth_interval()) {
      const auto grown = scale_ * options.growth_factor();
      if (internal::is_finite(grown)) scale_.copy_(grown);
      successes_.zero_();
    }
    optimizers_.clear();
  }

  /// The scale. Waits for the device. 1 where it is not enabled.
  double get_scale() const { return options.enabled() ? scale_.item<double>() : 1.0; }

  /// What the next step depends on beside the options: `scale` and `successes`, the steps since the scale
  /// changed.
  std::vector<std::pair<std::string, Tensor>> state() const {
    return {{"scale", scale_.to(torch::kCPU)}, {"successes", successes_.to(torch::kCPU)}};
  }
  /// Takes over what `state` gave. Throws c10::ValueError where it is something else.
  void load_state(const std::map<std::string, Tensor>& given) {
    internal::Problems problems;
    internal::check_tensors(state(), given, problems);
    problems.raise("GradScaler::load_state: the state does not fit");
    const torch::NoGradGuard no_grad;
    scale_.copy_(given.at("scale"));
    successes_.copy_(given.at("successes"));
    optimizers_.clear();
  }

  GradScalerOptions options;

 private:
  enum class Stage : std::uint8_t { ready, unscaled, stepped };
  struct State {
    Stage stage = Stage::ready;
    Tensor not_finite;
  };

  Tensor scale_, successes_;
  std::map<const torch::optim::Optimizer*, State> optimizers_;
};

}  // namespace peft
