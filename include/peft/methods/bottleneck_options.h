// BottleneckOptions: the settings of bottleneck adapters, and the named configurations.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "peft/core/activation_function.h"
#include "peft/core/site_traits.h"
#include "peft/methods/phm.h"

namespace peft {

/// Where a bottleneck's tensors start. Biases start at 0, norms at 1 and 0.
enum class BottleneckInit : std::uint8_t {
  bert,         ///< D, U, gate ~ N(0, 0.02²): close to no change, not none
  mam_adapter,  ///< D ~ U(±1/√width), U = 0, gate ~ N(0, 0.02²): no change
  houlsby,      ///< D, U ~ N(0, 0.01²) cut at ±0.02; the gate as torch.nn.Linear
};

/// Where the residual around a sequential bottleneck begins: AdapterHub's `residual_before_ln`.
enum class BottleneckResidual : std::uint8_t {
  output,  ///< at the sublayer's output, before the model's norm (true)
  sum,     ///< at output + skip, before the model's norm ("post_add"); needs `original_ln_before`
  input,   ///< at what the bottleneck reads (false)
};

/// A scaling that trains; it starts at 1.
enum class TrainedScaling : std::uint8_t {
  none,
  scalar,   ///< one factor
  channel,  ///< one a channel
};

/// Settings of `Bottleneck`. Defaults are those of AdapterHub's BnConfig. Example:
/// `add_adapter(*model, peft::BottleneckOptions().reduction_factor(8).non_linearity("gelu"), "topics")`.
struct BottleneckOptions {
  static constexpr AnyOf needs{Needs::residual, Needs::function};
  static constexpr const char* method = "bottleneck";
  using LayerFactors = std::map<int64_t, double>;

  BottleneckOptions() = default;
  /// A bottleneck of `size` channels, whatever the model's width.
  explicit BottleneckOptions(int64_t size) : size_(size) {}

  /// Without a target: after which sublayers of every layer.
  TORCH_ARG(std::vector<JoinRole>, places) = {JoinRole::attention, JoinRole::feed_forward};
  /// Layers, counted from 0, that get none; for joins that know their layer.
  TORCH_ARG(std::vector<int64_t>, leave_out) = {};

  /// The bottleneck has width // reduction_factor channels, at least 1. Positive, may be fractional, and
  /// below 1.
  TORCH_ARG(double, reduction_factor) = 16;
  /// Layers, counted from 0, with a factor of their own; for joins that know their layer.
  TORCH_ARG(LayerFactors, layer_factors) = {};
  /// Instead of a factor: the bottleneck's channels; 0: by factor.
  TORCH_ARG(int64_t, size) = 0;
  /// The last dimension of the activations, for a layer the library does not know; 0: the site knows it.
  TORCH_ARG(int64_t, width) = 0;

  /// The function f between the projections, by a name `activation_functions` has.
  TORCH_ARG(std::string, non_linearity) = "relu";
  /// The bottleneck reads the sublayer's input instead of its output, and is added to the output.
  TORCH_ARG(bool, parallel) = false;
  /// Factor s of what is added; finite.
  TORCH_ARG(double, scaling) = 1.0;
  /// A factor that trains, in place of `scaling`.
  TORCH_ARG(TrainedScaling, trained_scaling) = TrainedScaling::none;
  /// Multiplies by g = the mean over the tokens of σ(G h + g₀), one number a row.
  TORCH_ARG(bool, gating) = false;

  /// The model's join and norm before the bottleneck; not in a parallel one.
  TORCH_ARG(bool, original_ln_before) = false;
  /// The model's join and norm after it. False: the bottleneck's residual must carry the model's.
  TORCH_ARG(bool, original_ln_after) = true;
  TORCH_ARG(BottleneckResidual, residual) = BottleneckResidual::output;
  /// A LayerNorm of its own on what the bottleneck reads.
  TORCH_ARG(bool, ln_before) = false;
  /// A LayerNorm of its own on what it gives.
  TORCH_ARG(bool, ln_after) = false;
  /// That LayerNorm comes after the residual, not before; not in a parallel one.
  TORCH_ARG(bool, adapter_residual_before_ln) = false;

  /// Rate of dropout on what is added, in [0, 1).
  TORCH_ARG(double, dropout) = 0.0;
  /// Rate of dropout between f and the up-projection, in [0, 1).
  TORCH_ARG(double, hidden_dropout) = 0.0;
  /// Rate at which a row of the batch goes without, in training, in [0, 1); not in a parallel one.
  TORCH_ARG(double, stochastic_depth) = 0.0;

  TORCH_ARG(BottleneckInit, init_weights) = BottleneckInit::bert;
  /// Reseeds the global generator before each bottleneck, so that all start alike; 0: does not.
  TORCH_ARG(int64_t, init_weights_seed) = 0;
  /// The projections are sums of Kronecker products (Compacter).
  TORCH_ARG(std::optional<PhmOptions>, phm) = {};
};

/// Throws c10::ValueError, naming the option, if one is out of range or two contradict each other.
inline void check(const BottleneckOptions& options) {
  const auto positive = [](double factor) { return std::isfinite(factor) && factor > 0; };
  const auto rate = [](const char* name, double value) {
    TORCH_CHECK_VALUE(value >= 0 && value < 1, "BottleneckOptions: ", name, " must be in [0, 1), but got ",
                      value);
  };
  TORCH_CHECK_VALUE(!options.places().empty(), "BottleneckOptions: places must not be empty");
  for (const auto layer : options.leave_out()) {
    TORCH_CHECK_VALUE(layer >= 0, "BottleneckOptions: leave_out must hold indices of layers, but got ",
                      layer);
  }
  TORCH_CHECK_VALUE(positive(options.reduction_factor()),
                    "BottleneckOptions: reduction_factor must be positive, but got ",
                    options.reduction_factor());
  for (const auto& [layer, factor] : options.layer_factors()) {
    TORCH_CHECK_VALUE(layer >= 0 && positive(factor),
                      "BottleneckOptions: layer_factors must give layers positive factors, but got ", factor,
                      " for layer ", layer);
  }
  TORCH_CHECK_VALUE(options.size() >= 0, "BottleneckOptions: size must not be negative, but got ",
                    options.size());
  TORCH_CHECK_VALUE(options.size() == 0 || options.layer_factors().empty(),
                    "BottleneckOptions: expected size or layer_factors, but got both");
  TORCH_CHECK_VALUE(options.width() >= 0, "BottleneckOptions: width must not be negative, but got ",
                    options.width());
  activation_function(options.non_linearity());
  TORCH_CHECK_VALUE(std::isfinite(options.scaling()), "BottleneckOptions: scaling must be finite, but got ",
                    options.scaling());
  TORCH_CHECK_VALUE(options.trained_scaling() == TrainedScaling::none || options.scaling() == 1.0,
                    "BottleneckOptions: a trained scaling starts at 1, so scaling must be 1, but got ",
                    options.scaling());
  TORCH_CHECK_VALUE(options.residual() != BottleneckResidual::sum || options.original_ln_before(),
                    "BottleneckOptions: residual 'sum' needs original_ln_before");
  rate("dropout", options.dropout());
  rate("hidden_dropout", options.hidden_dropout());
  rate("stochastic_depth", options.stochastic_depth());
  TORCH_CHECK_VALUE(options.init_weights_seed() >= 0,
                    "BottleneckOptions: init_weights_seed must not be negative, but got ",
                    options.init_weights_seed());
  if (!options.phm()) return;
  check(*options.phm());
  TORCH_CHECK_VALUE(options.init_weights() == BottleneckInit::bert,
                    "BottleneckOptions: PHM projections have a start of their own, so init_weights must be "
                    "bert");
}

/// Where a bottleneck goes that has no target.
inline bool goes_to(const BottleneckOptions& options, const SiteInfo& site) {
  const auto has = [](const auto& list, auto value) {
    return std::find(list.begin(), list.end(), value) != list.end();
  };
  return site.join && has(options.places(), site.join->role) && !has(options.leave_out(), site.join->layer);
}

/// After attention and after feed-forward: AdapterHub's `double_seq_bn`. Paper: Parameter-Efficient Transfer
/// Learning for NLP, arXiv 1902.00751, §2.1. (The paper also trains the norms and starts closer to the
/// identity.)
inline BottleneckOptions houlsby() { return BottleneckOptions().non_linearity("swish"); }

/// After feed-forward, on the model's normed sum: AdapterHub's `seq_bn`. Paper: AdapterFusion, arXiv
/// 2005.00247, §3.
inline BottleneckOptions pfeiffer() {
  return BottleneckOptions().places({JoinRole::feed_forward}).original_ln_before(true);
}

/// Beside feed-forward, scaled by 4: AdapterHub's `par_bn`. Paper: Towards a Unified View of
/// Parameter-Efficient Transfer Learning, arXiv 2110.04366, §4.
inline BottleneckOptions parallel_adapter() {
  return BottleneckOptions()
      .places({JoinRole::feed_forward})
      .reduction_factor(2)
      .parallel(true)
      .scaling(4.0)
      .init_weights(BottleneckInit::mam_adapter);
}

/// The same with a factor that trains from 1 on: AdapterHub's `scaled_par_bn`.
inline BottleneckOptions scaled_parallel_adapter() {
  return parallel_adapter().scaling(1.0).trained_scaling(TrainedScaling::scalar);
}

/// The parallel adapter as that paper's authors ran it: `size` channels (512 on XSum and translation, with
/// scaling 4; 16 on GLUE, with scaling 2), dropout on them at the model's own rate.
inline BottleneckOptions unified_view_adapter(int64_t size, double scaling = 4.0, double dropout = 0.1) {
  return parallel_adapter().size(size).scaling(scaling).hidden_dropout(dropout);
}

/// After feed-forward and its norm, scaled by channel: AdapterHub's `adapter_plus`. Paper: Adapters Strike
/// Back, arXiv 2406.06820, §3.
inline BottleneckOptions adapter_plus() {
  return BottleneckOptions()
      .places({JoinRole::feed_forward})
      .reduction_factor(96)
      .non_linearity("gelu")
      .original_ln_before(true)
      .original_ln_after(false)
      .residual(BottleneckResidual::input)
      .trained_scaling(TrainedScaling::channel)
      .stochastic_depth(0.1)
      .init_weights(BottleneckInit::houlsby);
}

}  // namespace peft
