// Bias: the adapter's own copy of a layer's bias (BitFit, `bias = "all"`, `bias = "lora_only"`).
#pragma once

#include <memory>
#include <string>

#include "peft/core/piece.h"

namespace peft {

/// Nothing to set: which biases train is the target's business.
struct BiasOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "bias";
};

/// W′ = W, b′ = the adapter's own bias, a copy of the layer's at the start.
/// Shapes: bias: as the layer's. Trains: the bias, in the base's floating type.
/// Paper: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models,
/// arXiv 2106.10199. The base's bias is not touched, so the adapter can be switched off.
class BiasImpl : public Piece<BiasImpl, BiasOptions> {
 public:
  BiasImpl(BiasOptions settings, const SiteInfo& site) : Piece(BiasOptions::method, settings, site) {
    bias = register_parameter("bias",
                              torch::empty(site.bias_shape, torch::dtype(site.dtype).device(site.device)));
  }

  Weights effective(const Weights& weights, const LayerView&) const override {
    return {weights.weight, bias};
  }

  void initialize(const LayerView& base) override {
    torch::NoGradGuard no_grad;
    bias.copy_(base.weights().bias);
  }
  void place() override { to(site().device); }
  bool substitutes() const override { return true; }
  Changed changed() const override { return {0, bias.numel()}; }

  Tensor bias;
};

/// Why a site cannot take a `Bias`, or an empty string.
inline std::string refusal(const BiasOptions&, const SiteInfo& site) {
  return site.has_bias() ? "" : "a " + site.layer + " without a bias";
}

inline std::shared_ptr<PieceImpl> make_piece(const BiasOptions& options, const SiteInfo& site) {
  return std::make_shared<BiasImpl>(options, site);
}

}  // namespace peft
