// CorDA: starts LoRA from the weight and the covariance of its inputs.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "peft/core/problems.h"
#include "peft/kernels/is_finite.h"
#include "peft/methods/lora_probes.h"

namespace peft {

/// Settings of `initialize_corda`.
struct CordaOptions {
  /// True: the r largest components, for the new task ("ipm"); false: the r smallest, to keep what the base
  /// knows ("kpm").
  TORCH_ARG(bool, largest) = true;
};

/// Gives the LoRAs that were added with `LoraInit::corda` their start: a singular value decomposition of W C,
/// C the covariance of the layer's inputs. `run` runs the model forward on the samples, with all adapters
/// off, dropout off and no gradients; each call of a layer counts the same. Throws: c10::Error for inputs
/// that are not finite or all zero, a layer the samples do not reach, an optimizer that exists already.
/// Paper: CorDA: Context-Oriented Decomposition Adaptation, arXiv 2406.05223, §3.2 and §3.3.
inline void initialize_corda(nn::Module& model, const Adapter& adapter, const std::function<void()>& run,
                             const CordaOptions& options = {}) {
  torch::NoGradGuard no_grad;
  const auto waiting = internal::waiting_for(LoraInit::corda, adapter, "initialize_corda");
  struct Covariance {
    Tensor sum;
    int64_t calls = 0;
  };
  std::vector<Covariance> covariances(waiting.size());
  {
    internal::Probes probes(model, /*training=*/false);
    for (size_t i = 0; i < waiting.size(); ++i) {
      probes.add(waiting[i].entry.site, [&, i](const Tensor& x, const LayerView& layer) {
        auto rows = x.detach().reshape({-1, x.size(-1)}).to(torch::kFloat32);
        rows = rows / rows.max().abs();
        const auto product = rows.t().mm(rows);
        TORCH_CHECK(internal::is_finite(product), "initialize_corda: the inputs of '", waiting[i].path(),
                    "' must be finite numbers, not all zero");
        auto& [sum, calls] = covariances[i];
        sum = sum.defined() ? sum + product : product;
        ++calls;
        return layer.forward(x);
      });
    }
    run();
  }
  internal::Problems problems;
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (covariances[i].calls == 0) problems.add("the samples did not reach '" + waiting[i].path() + "'");
  }
  problems.raise("initialize_corda");
  std::vector<internal::StartFactors> starts;
  for (size_t i = 0; i < waiting.size(); ++i) {
    const auto C = covariances[i].sum.to(torch::kCPU) / covariances[i].calls;
    const auto unit = torch::eye(C.size(0));
    const auto diagonal = C.diagonal().mean();
    auto damped = C, inverse = C;
    // More and more of it, until the inverse is good.
    for (double damp = 0.01, error = 1; error >= 0.05; damp *= 2) {
      damped = C + unit * (diagonal * damp);
      inverse = at::linalg_inv(damped);
      error = (damped.mm(inverse) - unit).norm().item<double>();
    }
    const auto [U, S, Vh] = at::linalg_svd(waiting[i].weight().mm(damped), /*full_matrices=*/false);
    const auto& lora = *waiting[i].lora;
    const auto first = options.largest() ? 0 : S.size(0) - lora.rank;
    starts.push_back(internal::split(U.narrow(1, first, lora.rank), S.narrow(0, first, lora.rank),
                                     Vh.mm(inverse).narrow(0, first, lora.rank), lora.scaling()));
  }
  for (size_t i = 0; i < waiting.size(); ++i) waiting[i].lora->start_from(starts[i]);
}

}  // namespace peft
