// LayerNorm tuning: the adapter's own copy of a norm's weight and bias.
#pragma once

#include <memory>
#include <string>

#include "peft/core/piece.h"
#include "peft/methods/replace.h"

namespace peft {

/// Nothing to set: which norms train is the target's business; `all()` means every norm.
struct LayerNormTuningOptions {
  static constexpr Needs needs = Needs::weights;
  static constexpr const char* method = "ln_tuning";
};

/// y = (x − mean) / sqrt(var + eps) ⊙ w + b with the adapter's own w and b, copies of the norm's at the
/// start. Of several active adapters the last one counts.
/// Shapes: weight, bias: as the norm's. Trains: both, in float32 where the base is in a half type.
/// Paper: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420.
/// Reference: Hugging Face PEFT's LN_TUNING.
class LayerNormTuningImpl : public OwnWeights<LayerNormTuningImpl, LayerNormTuningOptions> {
 public:
  using OwnWeights::OwnWeights;

  Tensor forward(const Tensor& x, const LayerView& layer) override {
    const auto type = x.scalar_type(), own = weight.scalar_type();
    if (type == own || internal::autocasts(x.device().type())) return layer.base().apply(x, {weight, bias});
    return layer.base().apply(x.to(own), {weight, bias}).to(type);
  }
  Weights effective(const Weights& weights, const LayerView&) const override {
    const auto type = weights.weight.scalar_type();
    return {weight.to(type), bias.defined() ? bias.to(type) : bias};
  }
  void place() override { PieceImpl::place(); }
};

/// Why a site cannot take LayerNorm tuning, or an empty string.
inline std::string refusal(const LayerNormTuningOptions&, const SiteInfo& site) {
  if (site.fan_in.empty() && !site.bare) return {};
  return "a " + site.layer + " is no norm (hint: a `Replace` piece trains a copy of any layer)";
}

inline std::shared_ptr<PieceImpl> make_piece(const LayerNormTuningOptions& options, const SiteInfo& site) {
  return std::make_shared<LayerNormTuningImpl>(options, site);
}

}  // namespace peft
