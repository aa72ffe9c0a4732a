// SiteTraits: how the library reads, runs and re-weights one kind of frozen layer. Specialise it for your own
// layer.
#pragma once

#include <torch/nn/functional/conv.h>
#include <torch/nn/functional/embedding.h>
#include <torch/nn/functional/padding.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "peft/core/attention_options.h"
#include "peft/core/compat.h"
#include "peft/core/input_options.h"
#include "peft/kernels/low_rank_linear.h"

namespace peft {

/// A layer's weights; `bias` is undefined where there is none.
struct Weights {
  Tensor weight, bias;
  bool finite = false;  ///< the weight is known to hold neither NaN nor infinity, so need not be looked at
};

/// What a method asks of a site.
enum class Needs : std::uint8_t {
  weights,    ///< W → W′: the layer's tensors
  function,   ///< x and F(x): any sublayer
  residual,   ///< (output, skip, norm): the join after a sublayer
  attention,  ///< q, k, v and the additive bias
  input,      ///< embedded tokens
};

/// A word for an error message.
inline const char* to_string(Needs needs) {
  switch (needs) {
    case Needs::weights:
      return "weights";
    case Needs::function:
      return "a function of one input";
    case Needs::residual:
      return "a residual join";
    case Needs::attention:
      return "an attention";
    case Needs::input:
      return "an embedding output";
  }
  return "?";
}

/// What a method asks of a site where any of several things will do. Example: `static constexpr AnyOf
/// needs{Needs::residual, Needs::function};`.
class AnyOf {
 public:
  constexpr AnyOf(Needs one) : AnyOf({one}) {}
  constexpr AnyOf(std::initializer_list<Needs> several) {
    for (const auto needs : several) bits_ |= bit(needs);
  }
  constexpr bool holds(Needs needs) const { return bits_ & bit(needs); }
  friend constexpr bool operator==(const AnyOf&, const AnyOf&) = default;

 private:
  static constexpr unsigned bit(Needs needs) { return 1U << static_cast<unsigned>(needs); }
  unsigned bits_ = 0;
};

/// Words for an error message: "a residual join or a function of one input".
inline std::string to_string(const AnyOf& any) {
  std::string text;
  for (const auto needs :
       {Needs::residual, Needs::attention, Needs::input, Needs::function, Needs::weights}) {
    if (any.holds(needs)) text += (text.empty() ? "" : " or ") + std::string(to_string(needs));
  }
  return text;
}

/// After which sublayer a residual join stands.
enum class JoinRole : std::uint8_t { attention, cross_attention, feed_forward };

/// Where a residual join stands in its model.
struct JoinPlace {
  JoinRole role;
  int64_t layer;  ///< its index in the stack
};

/// How Hugging Face PEFT's files name a site that is no module there.
struct FileNames {
  enum class Kind : std::uint8_t {
    layer,      ///< a module, named by its path
    part,       ///< a part of the module above, which is what targets name (MultiheadAttention)
    parameter,  ///< a parameter of the module above (`target_parameters`)
  };
  Kind kind = Kind::layer;
  std::string level;                             ///< of a part: between the module's path and a tensor's name
  std::string weight = "weight", bias = "bias";  ///< the site's own tensors
};

namespace internal {

/// The path of the module that holds a module or a tensor; empty: of none.
inline std::string module_above(const std::string& path) {
  const auto dot = path.rfind('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

}  // namespace internal

/// What a method may know of the layer it will sit on. Shapes of low-rank factors follow from it, for every
/// kind of layer: A (rank, *fan_in), B (fan_out, rank / groups, *ones), where `ones` has the length of fan_in
/// minus one.
struct SiteInfo {
  std::string path;                   ///< dotted path in the model
  std::string layer;                  ///< "Linear", "Conv2d", "Embedding", "LayerNorm", …
  std::vector<Needs> offers;          ///< what the site can give a method
  std::vector<int64_t> weight_shape;  ///< as stored; empty if there is no weight
  std::vector<int64_t> bias_shape;    ///< empty if there is no bias
  std::vector<int64_t>
      fan_in;  ///< inputs of one output: {in}, {C, kh, kw}, {num_embeddings}; empty: no low-rank form
  int64_t fan_out = 0;  ///< outputs: out, O, embedding_dim
  int64_t width =
      0;  ///< of the activations, their last dimension, where a method may work on them; 0: unknown
  int64_t groups = 1;            ///< of a convolution
  bool lookup = false;           ///< the input is indices, not activations
  int64_t padding_row = -1;      ///< of a lookup: the row that gets no gradient
  bool rescales_rows = false;    ///< of a lookup: by max_norm, or the gradients by frequency
  bool fan_in_fan_out = false;   ///< the weight is stored (in, out)
  bool weights_only = false;     ///< pieces act through W′ alone: the layer's input is out of their reach
  bool ignores_dropout = false;  ///< and dropout is accepted without effect, as in the reference
  bool bare = false;             ///< a tensor without a layer (Hugging Face's `target_parameters`)
  bool beside_blocks = false;    ///< every block reads what it gives, beside the text (relative positions)
  /// Of a 3-d weight: how many matrices it stacks, each (fan_out, expert_in). Of several, fan_in is empty.
  int64_t experts = 1, expert_in = 0;
  /// (out, in) of the layer whose low-rank factors the reference draws, and discards, before this one's.
  std::vector<int64_t> drawn_before;
  std::optional<AttentionOptions> attention;  ///< of an attention
  std::optional<InputOptions> input;          ///< of a place where tokens enter
  std::optional<JoinPlace> join;              ///< of a residual join whose model says where it stands
  torch::ScalarType dtype = torch::kFloat32;
  torch::Device device = torch::kCPU;
  FileNames files;
  std::vector<std::string> tied;  ///< paths of the sites whose weight is this one's too (a head, of words)

  /// What names in options and configs are compared with: the path, or that of the module above of a part.
  std::string target() const {
    return files.kind == FileNames::Kind::part ? internal::module_above(path) : path;
  }
  bool has_bias() const { return !bias_shape.empty(); }
  bool offers_to(const AnyOf& needs) const {
    return std::any_of(offers.begin(), offers.end(), [&](Needs offer) { return needs.holds(offer); });
  }
};

/// The primary template is constrained away: a layer without a specialisation offers only its function.
template <class Layer>
struct SiteTraits;

namespace internal {

/// What every weighted layer's info has in common.
inline SiteInfo weighted_info(std::string layer, const Weights& weights) {
  SiteInfo info;
  info.layer = std::move(layer);
  info.offers = {Needs::function};
  if (weights.bias.defined()) info.bias_shape = weights.bias.sizes().vec();
  if (weights.weight.defined()) {
    info.offers.push_back(Needs::weights);
    info.weight_shape = weights.weight.sizes().vec();
    info.dtype = weights.weight.scalar_type();
    info.device = weights.weight.device();
  }
  return info;
}

}  // namespace internal

/// Linear: y = x Wᵀ + b, W (out, in).
template <>
struct SiteTraits<nn::Linear> {
  static Weights weights(const nn::Linear& layer) { return {layer->weight, layer->bias}; }
  static Tensor apply(const nn::Linear&, const Tensor& x, const Weights& w) {
    return at::linear(x, w.weight, w.bias);
  }
  static Tensor low_rank(const nn::Linear&, const Tensor& x, const Tensor& A, const Tensor& B) {
    return at::linear(at::linear(x, A), B);
  }
  static Tensor fold(const Tensor& BA, const Tensor&) { return BA; }
  static PlainLinear plain_linear(const nn::Linear& layer) { return {layer->weight, layer->bias}; }
  static SiteInfo info(const nn::Linear& layer) {
    auto info = internal::weighted_info("Linear", weights(layer));
    info.fan_in = {layer->weight.size(1)};
    info.fan_out = layer->weight.size(0);
    info.width = info.fan_out;
    return info;
  }
};

/// Embedding: y = E[x], E (num_embeddings, embedding_dim). The factors adapt Eᵀ, as Hugging Face's do.
template <>
struct SiteTraits<nn::Embedding> {
  static Weights weights(const nn::Embedding& layer) { return {layer->weight, {}}; }
  static Tensor apply(const nn::Embedding& layer, const Tensor& x, const Weights& w) {
    const auto& o = layer->options;
    return nn::functional::embedding(x, w.weight,
                                     nn::functional::EmbeddingFuncOptions()
                                         .padding_idx(o.padding_idx())
                                         .max_norm(o.max_norm())
                                         .norm_type(o.norm_type())
                                         .scale_grad_by_freq(o.scale_grad_by_freq())
                                         .sparse(o.sparse()));
  }
  static Tensor low_rank(const nn::Embedding& layer, const Tensor& x, const Tensor& A, const Tensor& B) {
    return at::linear(apply(layer, x, {A.t(), {}}), B);
  }
  static Tensor fold(const Tensor& BA, const Tensor&) { return BA.t(); }
  static SiteInfo info(const nn::Embedding& layer) {
    auto info = internal::weighted_info("Embedding", weights(layer));
    info.fan_in = {layer->weight.size(0)};
    info.fan_out = layer->weight.size(1);
    info.lookup = true;
    info.padding_row = layer->options.padding_idx().value_or(-1);
    info.rescales_rows = layer->options.max_norm() || layer->options.scale_grad_by_freq();
    info.width = info.fan_out;
    return info;
  }
};

/// LayerNorm: y = (x − mean) / sqrt(var + eps) ⊙ w + b.
template <>
struct SiteTraits<nn::LayerNorm> {
  static Weights weights(const nn::LayerNorm& layer) { return {layer->weight, layer->bias}; }
  static Tensor apply(const nn::LayerNorm& layer, const Tensor& x, const Weights& w) {
    return at::layer_norm(x, layer->options.normalized_shape(), w.weight, w.bias, layer->options.eps());
  }
  static SiteInfo info(const nn::LayerNorm& layer) {
    auto info = internal::weighted_info("LayerNorm", weights(layer));
    info.width = layer->options.normalized_shape().back();
    return info;
  }
};

namespace internal {

/// Convolutions of one to three dimensions: y = W ∗ x + b, W (O, C / groups, *kernel). A low-rank A keeps the
/// layer's kernel, stride, padding, padding mode and dilation, has no groups; B is a 1×1 convolution with the
/// layer's groups. Hugging Face's A drops dilation and padding mode, so that its forward fails or differs
/// from its merge; ours keeps them.
template <class Holder, int dims>
struct ConvTraits {
  using Options = nn::detail::ConvNdOptions<dims>;

  static Weights weights(const Holder& layer) { return {layer->weight, layer->bias}; }

  static Tensor apply(const Holder& layer, const Tensor& x, const Weights& w) {
    const auto& o = layer->options;
    if (holds_alternative<torch::enumtype::kZeros>(o.padding_mode())) {
      return convolve(x, w.weight, w.bias, o, o.padding(), o.groups());
    }
    return convolve(pad(x, o), w.weight, w.bias, o, torch::ExpandingArray<dims>(0), o.groups());
  }
  static Tensor low_rank(const Holder& layer, const Tensor& x, const Tensor& A, const Tensor& B) {
    const auto& o = layer->options;
    const bool zeros = holds_alternative<torch::enumtype::kZeros>(o.padding_mode());
    const auto h = zeros ? convolve(x, A, {}, o, o.padding(), 1)
                         : convolve(pad(x, o), A, {}, o, torch::ExpandingArray<dims>(0), 1);
    const nn::functional::ConvFuncOptions<dims> pointwise =
        nn::functional::ConvFuncOptions<dims>().groups(o.groups());
    return run(h, B, pointwise);
  }
  static Tensor fold(const Tensor& BA, const Tensor& W) { return BA.reshape(W.sizes()); }
  static SiteInfo info(const Holder& layer) {
    auto info = weighted_info("Conv" + std::to_string(dims) + "d", weights(layer));
    info.fan_in = {layer->options.in_channels()};
    const auto kernel = layer->weight.sizes().slice(2);
    info.fan_in.insert(info.fan_in.end(), kernel.begin(), kernel.end());
    info.fan_out = layer->weight.size(0);
    info.groups = layer->options.groups();
    return info;
  }

 private:
  static Tensor run(const Tensor& x, const Tensor& w, const nn::functional::ConvFuncOptions<dims>& options) {
    if constexpr (dims == 1) return nn::functional::conv1d(x, w, options);
    if constexpr (dims == 2) return nn::functional::conv2d(x, w, options);
    if constexpr (dims == 3) return nn::functional::conv3d(x, w, options);
  }
  static Tensor convolve(const Tensor& x, const Tensor& w, const Tensor& b, const Options& o,
                         const typename nn::functional::ConvFuncOptions<dims>::padding_t& padding,
                         int64_t groups) {
    return run(x, w,
               nn::functional::ConvFuncOptions<dims>()
                   .bias(b)
                   .stride(o.stride())
                   .padding(padding)
                   .dilation(o.dilation())
                   .groups(groups));
  }
  /// What nn::Conv does before it convolves when its padding mode is not zeros: pad every axis on both sides.
  static Tensor pad(const Tensor& x, const Options& o) {
    std::vector<int64_t> amounts;
    for (int axis = dims - 1; axis >= 0; --axis) {
      const auto i = static_cast<size_t>(axis);
      int64_t before = 0, after = 0;
      if (const auto* fixed = get_if<torch::ExpandingArray<dims>>(&o.padding())) {
        before = after = (**fixed)[i];
      } else if (holds_alternative<torch::enumtype::kSame>(o.padding())) {
        const int64_t total = (*o.dilation())[i] * ((*o.kernel_size())[i] - 1);
        before = total / 2;
        after = total - before;
      }
      amounts.insert(amounts.end(), {before, after});
    }
    auto options = nn::functional::PadFuncOptions(amounts);
    if (holds_alternative<torch::enumtype::kReflect>(o.padding_mode())) options.mode(torch::kReflect);
    if (holds_alternative<torch::enumtype::kReplicate>(o.padding_mode())) options.mode(torch::kReplicate);
    if (holds_alternative<torch::enumtype::kCircular>(o.padding_mode())) options.mode(torch::kCircular);
    return nn::functional::pad(x, options);
  }
};

}  // namespace internal

template <>
struct SiteTraits<nn::Conv1d> : internal::ConvTraits<nn::Conv1d, 1> {};
template <>
struct SiteTraits<nn::Conv2d> : internal::ConvTraits<nn::Conv2d, 2> {};
template <>
struct SiteTraits<nn::Conv3d> : internal::ConvTraits<nn::Conv3d, 3> {};

/// A holder with a `forward(Tensor)`: bottleneck adapters can sit around it.
template <class Layer>
concept FunctionLayer = requires(Layer layer, const Tensor& x) {
  { layer->forward(x) } -> std::convertible_to<Tensor>;
};

/// A holder whose weights the library can read and replace.
template <class Layer>
concept WeightLayer = requires(const Layer& layer, const Tensor& x, const Weights& w) {
  { SiteTraits<Layer>::weights(layer) } -> std::same_as<Weights>;
  { SiteTraits<Layer>::apply(layer, x, w) } -> std::convertible_to<Tensor>;
  { SiteTraits<Layer>::info(layer) } -> std::same_as<SiteInfo>;
};

/// A weighted layer that is y = x Wᵀ + b, for which there are kernels.
template <class Layer>
concept PlainLinearLayer = WeightLayer<Layer> && requires(const Layer& layer) {
  { SiteTraits<Layer>::plain_linear(layer) } -> std::same_as<PlainLinear>;
};

/// A weighted layer that also knows a cheap form of x ↦ x (BA)ᵀ.
template <class Layer>
concept LowRankLayer = WeightLayer<Layer> && requires(const Layer& layer, const Tensor& t) {
  { SiteTraits<Layer>::low_rank(layer, t, t, t) } -> std::convertible_to<Tensor>;
  { SiteTraits<Layer>::fold(t, t) } -> std::convertible_to<Tensor>;
};

}  // namespace peft
