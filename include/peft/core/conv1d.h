// Conv1D: GPT-2's linear layer, whose weight is stored (in, out).
#pragma once

#include <ostream>

#include "peft/core/adapted.h"
#include "peft/core/site_traits.h"

namespace peft {

/// y = x W + b, W (in, out): `Conv1D` of transformers, no convolution but a linear layer turned over.
/// Initial values: W from N(0, 0.02²), b zero. Shapes: x (*, in); y (*, out).
class TransposedLinearImpl : public nn::Cloneable<TransposedLinearImpl> {
 public:
  TransposedLinearImpl(int64_t in, int64_t out) : in_features(in), out_features(out) {
    TransposedLinearImpl::reset();
  }

  void reset() override {
    weight = register_parameter("weight", torch::empty({in_features, out_features}));
    bias = register_parameter("bias", torch::zeros({out_features}));
    reset_parameters();
  }
  void reset_parameters() {
    torch::NoGradGuard no_grad;
    weight.normal_(0.0, 0.02);
    bias.zero_();
  }
  Tensor forward(const Tensor& x) const { return at::linear(x, weight.t(), bias); }
  void pretty_print(std::ostream& stream) const override {
    stream << "peft::TransposedLinear(in_features=" << in_features << ", out_features=" << out_features
           << ")";
  }

  int64_t in_features, out_features;
  Tensor weight, bias;
};
TORCH_MODULE(TransposedLinear);

/// A linear layer to every method, with its weight turned over.
template <>
struct SiteTraits<TransposedLinear> {
  static Weights weights(const TransposedLinear& layer) { return {layer->weight, layer->bias}; }
  static Tensor apply(const TransposedLinear&, const Tensor& x, const Weights& w) {
    return at::linear(x, w.weight.t(), w.bias);
  }
  static Tensor low_rank(const TransposedLinear&, const Tensor& x, const Tensor& A, const Tensor& B) {
    return at::linear(at::linear(x, A), B);
  }
  static Tensor fold(const Tensor& BA, const Tensor&) { return BA.t(); }
  static PlainLinear plain_linear(const TransposedLinear& layer) { return {layer->weight.t(), layer->bias}; }
  static SiteInfo info(const TransposedLinear& layer) {
    auto info = internal::weighted_info("Conv1D", weights(layer));
    info.fan_in = {layer->weight.size(0)};
    info.fan_out = layer->weight.size(1);
    info.width = info.fan_out;
    info.fan_in_fan_out = true;
    return info;
  }
};

/// A site of GPT-2's linear layer: `peft::Conv1D(in, out)`.
using Conv1D = Adapted<TransposedLinear>;

}  // namespace peft
