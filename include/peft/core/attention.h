// Attention: the site between the projections, softmax(q kᵀ · scale + bias) v.
#pragma once

#include <limits>
#include <vector>

#include "peft/core/activation_site.h"
#include "peft/core/attention_options.h"

namespace peft {

/// Keys and values of the tokens seen so far, (batch, kv_heads, time, head_width), pieces' own among them;
/// undefined before the first.
struct KeyValues {
  Tensor k, v;
};

/// What an attention works on.
struct AttentionInputs {
  Tensor q, k, v;  ///< (batch, heads or kv_heads, time, head_width)
  Tensor bias;     ///< additive, broadcastable to (batch, heads, queries, keys), or undefined
  Tensor hidden;   ///< what q, k and v were projected from, (batch, queries, width), or undefined
};

/// A piece on an attention.
class AttentionPieceImpl : public ActivationPieceImpl {
 public:
  using ActivationPieceImpl::ActivationPieceImpl;

  /// Changes the inputs: longer keys and values. Once a text: not for the steps that follow with a cache,
  /// which holds what the piece added. A bias shorter than the keys lets every query see the keys on its
  /// left.
  virtual void extend(AttentionInputs&) {}
  /// True for a piece whose `extend` puts keys before those of the tokens.
  virtual bool lengthens() const { return false; }
  /// Changes the heads' outputs, (batch, heads, queries, head_width), made from these inputs.
  virtual Tensor heads(const Tensor& outputs, const AttentionInputs&) { return outputs; }
};

namespace internal {

/// Keys or values as often as there are query heads.
inline Tensor for_each_query_head(const Tensor& keys, const AttentionOptions& options) {
  const auto times = options.heads() / options.kv_heads();
  return times == 1 ? keys : keys.repeat_interleave(times, 1);
}

/// What is added to the products of all queries and keys, the causal mask in it; undefined where nothing is.
inline Tensor whole_bias(const AttentionInputs& in, const AttentionOptions& options) {
  const auto queries = in.q.size(2), keys = in.k.size(2);
  auto bias = in.bias;
  if (bias.defined() && bias.size(-1) < keys) {
    bias = torch::constant_pad_nd(bias, {keys - bias.size(-1), 0});
  }
  if (!options.causal() || queries == 1) return bias;
  const auto future =
      torch::ones({queries, keys}, in.q.options().dtype(torch::kBool)).triu(1 + keys - queries);
  if (!bias.defined()) bias = torch::zeros({queries, keys}, in.q.options());
  return bias.masked_fill(future, -std::numeric_limits<double>::infinity());
}

}  // namespace internal

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
    info.attention = options;
    info.dtype = dtype_;
    info.device = device_;
    return info;
  }

  /// `cache`: keys and values of earlier tokens, which come before these, and are extended by them. `hidden`:
  /// what q, k and v were projected from, for pieces that look at it.
  Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                 KeyValues* cache = nullptr, const Tensor& hidden = {}) {
    Flow in{q, k, v, bias, hidden};
    if (cache && cache->k.defined()) in.insert(in.end(), {cache->k, cache->v});
    const auto out = route(in, [this, cache](const Flow& flow, const PieceTree& tree) -> Flow {
      AttentionInputs inputs{flow[0], flow[1], flow[2], flow[3], flow[4]};
      const bool continues = flow.size() > 5;
      if (continues) {
        inputs.k = torch::cat({flow[5], inputs.k}, 2);
        inputs.v = torch::cat({flow[6], inputs.v}, 2);
      }
      std::vector<AttentionPieceImpl*> active;
      tree.each([&](PieceImpl& piece) { active.push_back(&dynamic_cast<AttentionPieceImpl&>(piece)); });
      for (auto* piece : active) {
        if (!continues) piece->extend(inputs);
      }
      auto y = attend(inputs);
      for (auto* piece : active) y = piece->heads(y, inputs);
      y = y.transpose(1, 2).reshape({y.size(0), y.size(2), options.heads() * options.head_width()});
      // Without a cache rows may have prefixes of different lengths.
      return cache ? Flow{y, inputs.k, inputs.v} : Flow{y};
    });
    if (cache) *cache = {out[1], out[2]};
    return out[0];
  }

  std::string refusal(const PieceTree& tree) const override { return internal::stacks_only(tree); }

  /// True if adapters put keys before those of the tokens now, which every query sees.
  bool lengthened() const {
    return uses(
        [](const PieceImpl& piece) { return dynamic_cast<const AttentionPieceImpl&>(piece).lengthens(); });
  }

  AttentionOptions options;

 private:
  Tensor attend(const AttentionInputs& in) const {
    const auto k = internal::for_each_query_head(in.k, options),
               v = internal::for_each_query_head(in.v, options);
    auto causal = options.causal() && in.q.size(2) > 1;
    const auto dropout = is_training() ? options.dropout() : 0.0;
    const auto queries = in.q.size(2), before = k.size(2) - queries;
    // LibTorch takes a bias or the square causal mask, not both. Rows of zeros make it square where few keys
    // come before the first query, and so keep the fast kernel, which a bias may not have.
    if (causal && !in.bias.defined() && before > 0 && before <= queries) {
      const auto q = torch::constant_pad_nd(in.q, {0, 0, before, 0});
      return internal::scaled_dot_product_attention(q, k, v, {}, dropout, true).slice(2, before);
    }
    causal = causal && !in.bias.defined() && before == 0;
    const auto bias = causal ? Tensor() : internal::whole_bias(in, options);
    return internal::scaled_dot_product_attention(in.q, k, v, bias, dropout, causal);
  }
};

/// Holder of `AttentionImpl`.
class Attention : public nn::ModuleHolder<AttentionImpl> {
 public:
  using nn::ModuleHolder<AttentionImpl>::ModuleHolder;
  using Impl = AttentionImpl;
};

}  // namespace peft
