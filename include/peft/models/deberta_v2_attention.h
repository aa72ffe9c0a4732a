// Disentangled attention: queries and keys meet by what they are and by how far apart they are.
#pragma once

#include "peft/core/adapted.h"
#include "peft/core/attention.h"
#include "peft/core/project.h"
#include "peft/models/deberta_v2_config.h"
#include "peft/models/encoder.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/nn/modules/dropout.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

namespace peft {
namespace internal {

/// Which row of its table stands for each distance, query − key, from 1 − time to time − 1: those near have
/// one each, those farther share one with others, and so do all beyond the farthest. Not decreasing;
/// (2 time − 1), on the CPU.
inline Tensor rows_of_distances(const models::DebertaV2Config& config, int64_t time) {
  auto distances = torch::arange(1 - time, time, torch::kLong);
  const auto span = config.position_span();
  if (config.position_buckets() > 0) {
    // In float32 as in transformers, whose rounding decides about the distances between two buckets.
    const auto near = config.position_buckets() / 2;
    const auto lengths = distances.abs().clamp_min(near - 1);
    const auto range = torch::tensor(static_cast<double>(config.farthest() - 1) / static_cast<double>(near),
                                     torch::kFloat32);
    const auto steps = (lengths.to(torch::kFloat32) / near).log() / range.log() * (near - 1);
    const auto buckets = (steps.ceil() + near) * distances.sign();
    distances = torch::where(lengths <= near, distances, buckets.to(torch::kLong));
  }
  return (distances + span).clamp(0, 2 * span - 1);
}

/// What hides the product of a query and a key: the lowest value.
inline double least_score(torch::ScalarType dtype) {
  if (dtype == torch::kFloat16) return std::numeric_limits<c10::Half>::lowest();
  if (dtype == torch::kBFloat16) return std::numeric_limits<c10::BFloat16>::lowest();
  return std::numeric_limits<float>::lowest();
}

/// The product of each token with the vector of its distance to each other one. Shapes: tokens (batch, heads,
/// time, width); vectors (batch or 1, heads, distances, width); index (time, time): which vector is that of
/// token and other; undefined: they are those of time − 1 (the first token to the last), …, 1 − time. (batch,
/// heads, time, time).
inline Tensor by_distance(const Tensor& tokens, const Tensor& vectors, const Tensor& index) {
  const auto batch = tokens.size(0), heads = tokens.size(1), time = tokens.size(2);
  Tensor products;
  if (vectors.size(0) == 1) {
    // One product a head for all rows: a batched one would copy the vectors for each row.
    const auto rows = tokens.transpose(0, 1).reshape({heads, batch * time, -1});
    products = at::bmm(rows, vectors[0].transpose(1, 2)).view({heads, batch, time, -1}).transpose(0, 1);
  } else {
    products = at::matmul(tokens, vectors.transpose(2, 3));
  }
  if (index.defined()) return products.gather(-1, index.expand({batch, heads, -1, -1}));
  // One row further down is one column further to the left: the pairs are a view, nothing is copied.
  const auto of = products.strides();
  return products.as_strided({batch, heads, time, time}, {of[0], of[1], of[2] - of[3], of[3]},
                             products.storage_offset() + (time - 1) * of[3]);
}

}  // namespace internal

namespace models {

/// The distances between the tokens of a text, which all blocks of a forward share; undefined where they look
/// at none.
struct RelativePositions {
  /// (batch or 1, distances, hidden), of the distances query − key that occur, falling.
  Tensor vectors;
  /// (time, time): which of them is that of query and key; undefined: each distance has its own.
  Tensor index;
};

/// Disentangled attention: softmax((q kᵀ + c2p + p2c) / sqrt(width · terms)) v, where c2p is each query's
/// product with the key vector of the distance to each key, and p2c each key's with the query vector of it.
/// Paper: DeBERTa, arXiv 2006.03654, §3.1, equations 2 to 4.
class DisentangledSelfAttentionImpl : public nn::Cloneable<DisentangledSelfAttentionImpl> {
 public:
  DisentangledSelfAttentionImpl(DebertaV2Config settings, int64_t index)
      : config(std::move(settings)), layer(index) {
    DisentangledSelfAttentionImpl::reset();
  }

  void reset() override {
    const auto width = config.hidden_size(), heads = config.num_attention_heads();
    const auto add = [&](const char* name, bool has = true) {
      return has ? register_module(name, peft::internal::unset_linear(width, width)) : Linear(nullptr);
    };
    query_proj = add("query_proj");
    key_proj = add("key_proj");
    value_proj = add("value_proj");
    const bool own = config.relative_attention() && !config.share_att_key();
    pos_dropout = register_module("pos_dropout", nn::Dropout(config.hidden_dropout_prob()));
    pos_key_proj = add("pos_key_proj", own && config.attends("c2p"));
    pos_query_proj = add("pos_query_proj", own && config.attends("p2c"));
    attention = register_module("attention", Attention(AttentionOptions(heads, width / heads)
                                                           .layer(layer)
                                                           .dropout(config.attention_probs_dropout_prob())));
  }

  /// `hidden`: (batch, 1, queries, keys), true where they do not see each other, or undefined.
  Tensor forward(const Tensor& x, const Tensor& hidden, const RelativePositions& positions) {
    const auto [q, k, v] = project(x, query_proj, key_proj, value_proj);
    const auto queries = split(q), keys = split(k);
    auto bias = positions.vectors.defined() ? relative_bias(queries, keys, positions) : Tensor();
    if (hidden.defined()) {
      if (!bias.defined()) bias = torch::zeros(hidden.sizes(), q.options());
      bias = bias.masked_fill(hidden, peft::internal::least_score(bias.scalar_type()));
    }
    // The site divides by sqrt(width). A token that is hidden from all is hidden from itself: its products
    // are 0, so that it sees all alike, whatever the type, and nothing learns from what it sees. It sees a
    // prefix, and that alone where there is one.
    const auto factor = std::sqrt(static_cast<double>(queries.size(3))) / scale(queries.scalar_type());
    Tensor scaled;
    if (hidden.defined() && !attention->lengthened()) {
      const auto seen = hidden.diagonal(0, 2, 3).logical_not().unsqueeze(3);
      scaled = queries * seen.to(queries.scalar_type()).mul_(factor);
    } else {
      scaled = queries * factor;
    }
    return attention->forward(scaled, keys, split(v), bias, /*cache=*/nullptr, x);
  }

  /// True if one distance is looked at by the others too, so that `positions` must hold all there are.
  bool mixes_positions() const {
    const auto mixes = [](const Linear& own, const Linear& shared) {
      return (own ? own : shared)->mixes_positions();
    };
    return (config.attends("c2p") && mixes(pos_key_proj, key_proj)) ||
           (config.attends("p2c") && mixes(pos_query_proj, query_proj));
  }

  DebertaV2Config config;
  int64_t layer;
  Linear query_proj{nullptr}, key_proj{nullptr}, value_proj{nullptr};
  nn::Dropout pos_dropout{nullptr};
  Linear pos_key_proj{nullptr}, pos_query_proj{nullptr};
  Attention attention{nullptr};

 private:
  Tensor split(const Tensor& y) const {
    return y.view({y.size(0), y.size(1), config.num_attention_heads(), -1}).transpose(1, 2);
  }

  /// sqrt(width · terms), rounded to float32 and then to the type of what it divides, as in transformers.
  double scale(torch::ScalarType type) const {
    const auto width = config.hidden_size() / config.num_attention_heads();
    const auto terms = 1 + config.attends("c2p") + config.attends("p2c");
    const auto root = std::sqrt(static_cast<float>(width * terms));
    if (type == torch::kBFloat16) return static_cast<float>(c10::BFloat16(root));
    return type == torch::kHalf ? static_cast<float>(c10::Half(root)) : root;
  }

  /// c2p + p2c, scaled; undefined without either. Shapes: q, k (batch, heads, time, width). (batch, heads,
  /// time, time).
  Tensor relative_bias(const Tensor& q, const Tensor& k, const RelativePositions& positions) {
    const auto vectors = pos_dropout->forward(positions.vectors);
    const auto projected = [&](Linear& shared, Linear& own) {
      const auto y = own ? own->forward(vectors) : shared->forward_positions(vectors);
      return split(y / scale(y.scalar_type()));
    };
    const auto& of_queries = positions.index;
    Tensor bias;
    if (config.attends("c2p"))
      bias = peft::internal::by_distance(q, projected(key_proj, pos_key_proj), of_queries);
    if (config.attends("p2c")) {
      // Seen from a key, the distance to a query has the other sign.
      const auto seen = projected(query_proj, pos_query_proj);
      const auto term = of_queries.defined()
                            ? peft::internal::by_distance(k, seen, of_queries.t().contiguous())
                            : peft::internal::by_distance(k, seen.flip(2), {});
      bias = bias.defined() ? bias + term.transpose(2, 3) : term.transpose(2, 3);
    }
    return bias;
  }
};
TORCH_MODULE(DisentangledSelfAttention);

}  // namespace models
}  // namespace peft
