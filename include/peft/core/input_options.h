// InputOptions: what a place where tokens enter a model is.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <optional>

#include "peft/core/compat.h"

namespace peft {

/// Settings of `InputEmbeddings` and `EmbeddingOutput`.
struct InputOptions {
  explicit InputOptions(int64_t width) : width_(width) {}
  /// Of a token's vector.
  TORCH_ARG(int64_t, width);
  /// Tokens that the model's position table has room for, virtual ones included; 0: it has none.
  TORCH_ARG(int64_t, positions) = 0;
  /// The position of padding, after which the first token's comes (RoBERTa); without one that is 0.
  TORCH_ARG(std::optional<int64_t>, padding_position);
  /// Whether a text keeps its token types beside virtual tokens, which then have type 0, as Hugging Face's
  /// classifiers do; else the types of both are dropped.
  TORCH_ARG(bool, keeps_types) = false;
  /// Whether the tokens have their positions, types and norm already.
  TORCH_ARG(bool, embedded) = false;
  /// Of the model, as Hugging Face's files of prompts say; 0: unknown.
  TORCH_ARG(int64_t, layers) = 0;
  TORCH_ARG(int64_t, heads) = 0;

 public:
  int64_t first_position() const { return padding_position_ ? *padding_position_ + 1 : 0; }
};

}  // namespace peft
