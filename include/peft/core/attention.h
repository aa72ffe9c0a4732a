// Attention: the site between the projections, softmax(q kᵀ · scale + bias) v.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <limits>

#include "peft/core/activation_site.h"

namespace peft {

/// Where an attention stands in its model.
enum class AttentionRole : std::uint8_t { encoder, decoder, cross };

/// Settings of `Attention`.
struct AttentionOptions {
  /// `heads` query heads of `head_width` each.
  AttentionOptions(int64_t heads, int64_t head_width)
      : heads_(heads), kv_heads_(heads), head_width_(head_width) {}
  TORCH_ARG(int64_t, heads);
  /// Key and value heads; fewer than `heads` in grouped-query attention.
  TORCH_ARG(int64_t, kv_heads);
  TORCH_ARG(int64_t, head_width);
  /// Index of the layer in its stack.
  TORCH_ARG(int64_t, layer) = 0;
  TORCH_ARG(AttentionRole, role) = AttentionRole::encoder;
  /// Dropout on the attention probabilities, in training.
  TORCH_ARG(double, dropout) = 0.0;
  /// Query t sees keys up to t.
  TORCH_ARG(bool, causal) = false;
};

/// softmax(q kᵀ / sqrt(head_width) + bias) v, without tensors of its own.
/// Shapes: q (batch, heads, queries, head_width); k, v (batch, kv_heads, keys, head_width); bias
/// broadcastable to (batch, heads, queries, keys), additive, or undefined. Output: (batch, queries, heads ·
/// head_width).
class AttentionImpl : public internal::ActivationSite<AttentionImpl> {
 public:
  explicit AttentionImpl(AttentionOptions settings) : options(settings) {}

  SiteInfo base_info() const override {
    SiteInfo info;
    info.layer = "Attention";
    info.offers = {Needs::attention};
    return info;
  }

  Tensor forward(const Tensor& q, Tensor k, Tensor v, Tensor bias) {
    if (options.kv_heads() != options.heads()) {
      const auto times = options.heads() / options.kv_heads();
      k = k.repeat_interleave(times, 1);
      v = v.repeat_interleave(times, 1);
    }
    const auto dropout = is_training() ? options.dropout() : 0.0;
    auto causal = options.causal();
    if (causal && bias.defined()) {  // LibTorch takes one or the other
      const auto future = torch::ones({q.size(2), k.size(2)}, q.options().dtype(torch::kBool)).triu(1);
      bias = bias.masked_fill(future, -std::numeric_limits<double>::infinity());
      causal = false;
    }
    const auto y = internal::scaled_dot_product_attention(q, k, v, bias, dropout, causal);
    return y.transpose(1, 2).reshape({q.size(0), q.size(2), options.heads() * options.head_width()});
  }

  AttentionOptions options;
};

/// Holder of `AttentionImpl`.
class Attention : public nn::ModuleHolder<AttentionImpl> {
 public:
  using nn::ModuleHolder<AttentionImpl>::ModuleHolder;
  using Impl = AttentionImpl;
};

}  // namespace peft
