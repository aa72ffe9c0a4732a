// New bias: a bias for a layer that has none (BitFit on T5 and Llama, as T-Few has it).
#pragma once

#include <memory>
#include <string>

#include "peft/core/piece.h"

namespace peft {

/// Nothing to set: which layers get a bias is the target's business.
struct NewBiasOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "new_bias";
};

/// y = F(x) + b, b zero at the start, of a layer without a bias. Several active adapters add theirs.
/// Shapes: bias (b): (fan_out). Trains: b. Count: fan_out. Nothing to merge it into: the layer has no bias.
/// Reference: `bitfit.py` of T-Few's code, with a learning rate of 3e-4, beside trained LayerNorm weights
/// (`ReplaceOptions` on the norms). OpenDelta draws such biases from ±1/√in, so that they change the model
/// before training; here they start at zero.
class NewBiasImpl : public Piece<NewBiasImpl, NewBiasOptions> {
 public:
  NewBiasImpl(NewBiasOptions settings, const SiteInfo& site) : Piece(NewBiasOptions::method, settings, site) {
    bias = register_parameter("bias", torch::zeros({site.fan_out}));
  }

  Weights effective(const Weights& weights, const LayerView&) const override {
    const auto own = bias.to(weights.weight.scalar_type());
    return {weights.weight, weights.bias.defined() ? weights.bias + own : own};
  }
  void initialize(const LayerView&) override {}
  std::string not_mergeable() const override {
    return "a bias of its own cannot be merged into a layer that has none";
  }
  Changed changed() const override { return {0, bias.numel()}; }

  Tensor bias;
};

/// Why a site cannot take a bias of its own, or an empty string.
inline std::string refusal(const NewBiasOptions&, const SiteInfo& site) {
  if (site.has_bias()) return "a " + site.layer + " that has a bias (hint: BiasOptions trains a copy of it)";
  const bool adds = !site.lookup && !site.fan_in.empty() && !site.bare && !site.weights_only;
  return adds ? "" : "a " + site.layer + " adds no bias";
}

inline std::shared_ptr<PieceImpl> make_piece(const NewBiasOptions& options, const SiteInfo& site) {
  return std::make_shared<NewBiasImpl>(options, site);
}

}  // namespace peft
