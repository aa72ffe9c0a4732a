// Replace: the adapter's own copy of a layer (linear probing, top layers, full fine-tuning,
// `modules_to_save`).
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "peft/core/piece.h"

namespace peft {

/// Nothing to set: which layers train is the target's business.
struct ReplaceOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "replace";
};

/// W′, b′ = the adapter's own weights, copies of the layer's at the start. What lies below is not evaluated.
/// The common part of the methods that train a copy of a layer.
/// Shapes: weight, bias: as the layer's. Trains: both, in the base's floating type.
template <class Derived, class Options>
class OwnWeights : public Piece<Derived, Options> {
 public:
  OwnWeights(Options settings, const SiteInfo& site)
      : Piece<Derived, Options>(Options::method, std::move(settings), site) {
    const auto tensor_options = torch::dtype(site.dtype).device(site.device);
    weight = this->register_parameter("weight", torch::empty(site.weight_shape, tensor_options));
    if (site.has_bias()) {
      bias = this->register_parameter("bias", torch::empty(site.bias_shape, tensor_options));
    }
  }

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    return layer.base().apply(x, {weight, bias});
  }
  Weights effective(const Weights&, const LayerView&) const override { return {weight, bias}; }

  void initialize(const LayerView& base) override {
    torch::NoGradGuard no_grad;
    const auto from = base.weights();
    weight.copy_(from.weight);
    if (bias.defined()) bias.copy_(from.bias);
  }
  void place() override { this->to(this->site().device); }
  bool substitutes() const override { return true; }
  PieceImpl::Changed changed() const override { return {weight.numel(), bias.defined() ? bias.numel() : 0}; }

  Tensor weight, bias;
};

/// A copy of a layer that the adapter trains.
/// Reference: Hugging Face PEFT's `modules_to_save`.
class ReplaceImpl : public OwnWeights<ReplaceImpl, ReplaceOptions> {
 public:
  using OwnWeights::OwnWeights;
};

/// Why a site cannot take a `Replace`, or an empty string.
inline std::string refusal(const ReplaceOptions&, const SiteInfo&) { return {}; }

inline std::shared_ptr<PieceImpl> make_piece(const ReplaceOptions& options, const SiteInfo& site) {
  return std::make_shared<ReplaceImpl>(options, site);
}

}  // namespace peft
