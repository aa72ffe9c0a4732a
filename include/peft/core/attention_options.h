// AttentionOptions: what an attention is, and where it stands in its model.
#pragma once

#include <torch/arg.h>

#include <cstdint>

#include "peft/core/compat.h"

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
  /// Query t sees the keys up to its own: of K keys and Q queries, up to t + K − Q.
  TORCH_ARG(bool, causal) = false;
};

}  // namespace peft
