// LoRA-GA: starts LoRA from the gradient of the weight.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/kernels/svd_lowrank.h"
#include "peft/methods/lora_probes.h"

namespace peft {

/// Which singular vectors of the gradient go to A and to B, of the first 2 r.
enum class LoraGaDirection {
  ArB2r,   ///< A the first r, B the second
  A2rBr,   ///< the other way round
  ArBr,    ///< A those of odd, B those of even index
  random,  ///< both the same r, drawn
};

/// How the factors are scaled.
enum class LoraGaScale {
  stable,      ///< B times out^¼ / √gamma (Hugging Face's takes a Conv1D's inputs for its outputs)
  weight_svd,  ///< B so that its largest singular value is the weight's
  gd_scale,    ///< A and B divided by s
  unit,        ///< not at all
};

/// Settings of `initialize_lora_ga`. Defaults are Hugging Face's.
struct LoraGaOptions {
  TORCH_ARG(LoraGaDirection, direction) = LoraGaDirection::ArB2r;
  TORCH_ARG(LoraGaScale, scale) = LoraGaScale::stable;
  /// Of `LoraGaScale::stable`, positive.
  TORCH_ARG(double, stable_gamma) = 16;
};

/// Gives the LoRAs that were added with `LoraInit::lora_ga` their start: singular vectors of the weight's
/// gradient, so that the first steps move W as full fine-tuning would. `run` runs forward and backward on the
/// samples, with all adapters off and the model in training mode; gradients are averaged over the calls.
/// Throws: c10::ValueError for options out of range; c10::Error for a layer that got no gradient, an
/// optimizer that exists already. Paper: LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv
/// 2407.05000, algorithm 1.
inline void initialize_lora_ga(nn::Module& model, const Adapter& adapter, const std::function<void()>& run,
                               const LoraGaOptions& options = {}) {
  TORCH_CHECK_VALUE(options.stable_gamma() > 0 && std::isfinite(options.stable_gamma()),
                    "LoraGaOptions: stable_gamma must be positive, but got ", options.stable_gamma());
  const auto waiting = internal::waiting_for(LoraInit::lora_ga, adapter, "initialize_lora_ga");
  struct Gradient {
    Tensor weight;  ///< a leaf with the base's values
    int64_t calls = 0;
  };
  std::vector<Gradient> gradients(waiting.size());
  {
    torch::AutoGradMode with_gradients(true);
    internal::Probes probes(model, /*training=*/true);
    for (size_t i = 0; i < waiting.size(); ++i) {
      auto& gradient = gradients[i];
      gradient.weight = waiting[i].entry.site->base_weights().weight.detach().requires_grad_(true);
      probes.add(waiting[i].entry.site, [&gradient](const Tensor& x, const LayerView& layer) {
        auto y = layer.apply(x, {gradient.weight, layer.weights().bias});
        if (y.requires_grad()) y.register_hook([&gradient](const Tensor&) { ++gradient.calls; });
        return y;
      });
    }
    run();
  }
  internal::Problems problems;
  for (size_t i = 0; i < waiting.size(); ++i) {
    const auto& gradient = gradients[i].weight.grad();
    if (!gradient.defined()) {
      problems.add("'" + waiting[i].path() + "' got no gradient");
    } else if (!internal::is_finite(gradient)) {
      problems.add("the gradient of '" + waiting[i].path() + "' must be finite");
    }
  }
  problems.raise("initialize_lora_ga");
  torch::NoGradGuard no_grad;
  std::vector<internal::StartFactors> starts;
  for (size_t i = 0; i < waiting.size(); ++i) {
    const auto& lora = *waiting[i].lora;
    const auto r = lora.rank;
    auto G = (gradients[i].weight.grad() / gradients[i].calls).to(torch::kCPU, torch::kFloat32);
    if (lora.site().fan_in_fan_out) G = G.t();
    const auto found = internal::svd_lowrank(G, std::min(4 * r, std::min(G.size(0), G.size(1))), 4);
    auto for_A = torch::arange(0, r), for_B = torch::arange(r, 2 * r);
    if (options.direction() == LoraGaDirection::A2rBr) std::swap(for_A, for_B);
    if (options.direction() == LoraGaDirection::ArBr) {
      for_A = torch::arange(1, 2 * r, 2);
      for_B = torch::arange(0, 2 * r, 2);
    }
    if (options.direction() == LoraGaDirection::random)
      for_A = for_B = torch::randperm(2 * r).narrow(0, 0, r);
    const auto S = found.S.index_select(0, for_B);
    auto A = found.V.t().index_select(0, for_A);
    auto B = found.U.index_select(1, for_B) * S;
    if (options.scale() == LoraGaScale::stable) {
      B = B * (std::pow(static_cast<double>(G.size(0)), 0.25) / std::sqrt(options.stable_gamma()));
    } else if (options.scale() == LoraGaScale::weight_svd) {
      const auto largest = internal::svd_lowrank(waiting[i].weight(), r, 4).S[0];
      if (S[0].item<float>() > 0) B = B * (largest / S[0]);
    } else if (options.scale() == LoraGaScale::gd_scale) {
      A = A / lora.scaling();
      B = B / lora.scaling();
    }
    starts.push_back({A, B});
  }
  for (size_t i = 0; i < waiting.size(); ++i) waiting[i].lora->start_from(starts[i]);
}

}  // namespace peft
