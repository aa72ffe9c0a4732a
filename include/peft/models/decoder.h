// What the families of decoders share: the cache of keys and values, the causal loss.
#pragma once

#include "peft/core/attention.h"
#include "peft/core/compat.h"
#include "peft/core/problems.h"

#include <cstdint>
#include <vector>

namespace peft::models {

/// Keys and values of the tokens a decoder has seen, as its attentions saw them: virtual tokens and prefixes
/// are in it, once. Give the one that a forward returned to the forward on the tokens that follow; it is a
/// value, so one beginning serves several continuations.
struct KeyValueCache {
  std::vector<KeyValues> layers;
  int64_t tokens = 0;    ///< that callers gave, each with its place in their masks
  int64_t unplaced = 0;  ///< keys that take no position

  /// Keys of every layer; 0 before the first token.
  int64_t length() const {
    return layers.empty() || !layers.front().k.defined() ? 0 : layers.front().k.size(2);
  }
};

/// The loss of transformers' causal language models: cross entropy, in float32, of each token given those
/// before it; label −100 is ignored. Shapes: logits (batch, time, vocabulary); labels (batch, the caller's
/// time), not shifted; virtual_tokens (batch or 1, time), as in a model's output, which have no label.
inline Tensor causal_loss(const Tensor& logits, Tensor labels, const Tensor& virtual_tokens = {}) {
  labels = labels.to(torch::kLong);
  if (virtual_tokens.defined()) {
    const auto real = virtual_tokens.logical_not().expand({logits.size(0), -1});
    if (labels.is_cpu()) {  // asking a device would make it wait
      TORCH_CHECK_VALUE(labels.numel() == real.sum().item<int64_t>(),
                        "causal_loss: labels must be one a real token, but got ",
                        peft::internal::shape_text(labels.sizes()));
    }
    labels = torch::full(real.sizes(), -100, labels.options()).masked_scatter(real, labels);
  }
  TORCH_CHECK_VALUE(labels.sizes() == logits.sizes().slice(0, 2), "causal_loss: labels must be one a token, ",
                    peft::internal::shape_text(logits.sizes().slice(0, 2)), ", but got ",
                    peft::internal::shape_text(labels.sizes()));
  const auto next = torch::constant_pad_nd(labels, {0, 1}, -100).slice(1, 1);
  return at::cross_entropy_loss(logits.flatten(0, 1).to(torch::kFloat32), next.reshape(-1));
}

}  // namespace peft::models
