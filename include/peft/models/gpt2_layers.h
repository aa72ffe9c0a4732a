// What a GPT-2 is made of: its inputs and outputs, attention, feed-forward network and blocks, built from
// sites.
#pragma once

#include "peft/core/adapted.h"
#include "peft/core/attention.h"
#include "peft/core/conv1d.h"
#include "peft/core/residual.h"
#include "peft/models/decoder.h"
#include "peft/models/encoder.h"
#include "peft/models/gpt2_config.h"

#include <torch/nn/modules/dropout.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace peft::models {

/// One batch. Undefined members are absent.
struct GPT2Inputs {
  Tensor input_ids;      ///< (batch, time), or:
  Tensor inputs_embeds;  ///< (batch, time, n_embd), word vectors
  Tensor
      attention_mask;  ///< (batch, tokens in the cache + time), 0 where a token is padding; absent: none is
  Tensor token_type_ids;   ///< (batch or 1, time), looked up among the words; absent: none are added
  Tensor position_ids;     ///< (batch or 1, time); absent: go on from the cache's keys, padding counted
  Tensor labels;           ///< (batch, time), asks the language model for a loss; see `causal_loss`
  KeyValueCache cache;     ///< that an earlier forward returned: `input_ids` go on where it ended
  bool use_cache = false;  ///< asks for `GPT2Output::cache`
  bool output_hidden_states = false;  ///< asks for `GPT2Output::hidden_states`
  int64_t logits_to_keep = 0;         ///< of the last tokens only; 0: of all
};

/// What a forward gives. Undefined members are those the model does not have or was not asked for.
struct GPT2Output {
  Tensor last_hidden_state;           ///< (batch, time, n_embd), virtual tokens included
  std::vector<Tensor> hidden_states;  ///< of the embeddings and of every layer; the last is normed
  Tensor logits;                      ///< (batch, time, vocabulary)
  Tensor loss;                        ///< a scalar
  Tensor virtual_tokens;              ///< (batch or 1, time), true for those of a prompt; see `real_tokens`
  KeyValueCache cache;                ///< for the tokens that follow
  int64_t num_virtual_tokens = 0;     ///< how many `virtual_tokens` a row has
};

// The parts of the model. Their weights have no values until the model they belong to draws or loads them.

/// The projections and the attention between them.
class GPT2AttentionImpl : public nn::Cloneable<GPT2AttentionImpl> {
 public:
  GPT2AttentionImpl(GPT2Config settings, int64_t index) : config(std::move(settings)), layer(index) {
    GPT2AttentionImpl::reset();
  }

  void reset() override {
    const auto width = config.n_embd(), heads = config.n_head();
    c_attn = register_module("c_attn", peft::internal::unset_conv1d(width, 3 * width));
    c_proj = register_module("c_proj", peft::internal::unset_conv1d(width, width));
    attention = register_module("attention", Attention(AttentionOptions(heads, width / heads)
                                                           .layer(layer)
                                                           .role(AttentionRole::decoder)
                                                           .dropout(config.attn_pdrop())
                                                           .causal(true)));
    resid_dropout = register_module("resid_dropout", nn::Dropout(config.resid_pdrop()));
  }

  /// `cache`: of this layer, extended; or nullptr.
  Tensor forward(const Tensor& x, const Tensor& bias, KeyValues* cache) {
    const auto projected = c_attn->forward(x).split(config.n_embd(), 2);
    const auto heads = [&](const Tensor& y) {
      return y.view({y.size(0), y.size(1), config.n_head(), -1}).transpose(1, 2);
    };
    auto q = heads(projected[0]);
    if (rescale() != 1.0) q = q * rescale();
    const auto y = attention->forward(q, heads(projected[1]), heads(projected[2]), bias, cache, x);
    return resid_dropout->forward(c_proj->forward(y));
  }

  GPT2Config config;
  int64_t layer;
  Conv1D c_attn{nullptr}, c_proj{nullptr};
  Attention attention{nullptr};
  nn::Dropout resid_dropout{nullptr};

 private:
  /// By what the scores differ from qkᵀ / sqrt(head width).
  double rescale() const {
    const auto width = static_cast<double>(config.n_embd() / config.n_head());
    const double scale = config.scale_attn_weights() ? 1.0 : std::sqrt(width);
    return config.scale_attn_by_inverse_layer_idx() ? scale / static_cast<double>(layer + 1) : scale;
  }
};
TORCH_MODULE(GPT2Attention);

/// The feed-forward network.
class GPT2MLPImpl : public nn::Cloneable<GPT2MLPImpl> {
 public:
  explicit GPT2MLPImpl(GPT2Config settings)
      : config(std::move(settings)), activation(models::activation_function(config.activation_function())) {
    GPT2MLPImpl::reset();
  }

  void reset() override {
    c_fc = register_module("c_fc", peft::internal::unset_conv1d(config.n_embd(), config.inner()));
    c_proj = register_module("c_proj", peft::internal::unset_conv1d(config.inner(), config.n_embd()));
    dropout = register_module("dropout", nn::Dropout(config.resid_pdrop()));
  }

  Tensor forward(const Tensor& x) { return dropout->forward(c_proj->forward(activation(c_fc->forward(x)))); }

  GPT2Config config;
  ActivationFunction activation;
  Conv1D c_fc{nullptr}, c_proj{nullptr};
  nn::Dropout dropout{nullptr};
};
TORCH_MODULE(GPT2MLP);

/// One block: attention, then the feed-forward network, each on normed input and joined without a norm.
class GPT2BlockImpl : public nn::Cloneable<GPT2BlockImpl> {
 public:
  GPT2BlockImpl(GPT2Config settings, int64_t index) : config(std::move(settings)), layer(index) {
    GPT2BlockImpl::reset();
  }

  void reset() override {
    const auto norm = nn::LayerNormOptions({config.n_embd()}).eps(config.layer_norm_epsilon());
    const auto join = [this](JoinRole role) {
      return BareResidual(ResidualOptions(config.n_embd()).place(JoinPlace{role, layer}));
    };
    ln_1 = register_module("ln_1", LayerNorm(norm));
    attn = register_module("attn", GPT2Attention(config, layer));
    attn_residual = register_module("attn_residual", join(JoinRole::attention));
    ln_2 = register_module("ln_2", LayerNorm(norm));
    mlp = register_module("mlp", GPT2MLP(config));
    mlp_residual = register_module("mlp_residual", join(JoinRole::feed_forward));
  }

  Tensor forward(const Tensor& x, const Tensor& bias, KeyValues* cache) {
    const auto attended = attn_residual->forward(attn->forward(ln_1->forward(x), bias, cache), x);
    return mlp_residual->forward(mlp->forward(ln_2->forward(attended)), attended);
  }

  GPT2Config config;
  int64_t layer;
  LayerNorm ln_1{nullptr}, ln_2{nullptr};
  GPT2Attention attn{nullptr};
  GPT2MLP mlp{nullptr};
  BareResidual attn_residual{nullptr}, mlp_residual{nullptr};
};
TORCH_MODULE(GPT2Block);

}  // namespace peft::models
