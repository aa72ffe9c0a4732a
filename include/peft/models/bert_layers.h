// What a BERT or a RoBERTa is made of: embeddings, attention, blocks and pooler, built from sites.
#pragma once

#include "peft/core/activation.h"
#include "peft/core/adapted.h"
#include "peft/core/attention.h"
#include "peft/core/checkpointing.h"
#include "peft/core/input.h"
#include "peft/core/project.h"
#include "peft/core/residual.h"
#include "peft/models/bert_config.h"
#include "peft/models/encoder.h"

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace peft::models {

// The parts of the model. Their weights have no values until the model they belong to draws or loads them.

/// Word, position and token type vectors, normed. Positions are counted from 0 (BERT), or, without the
/// padding, from the one after the padding's (RoBERTa).
class BertEmbeddingsImpl : public nn::Cloneable<BertEmbeddingsImpl> {
 public:
  explicit BertEmbeddingsImpl(BertConfig settings) : config(std::move(settings)) {
    BertEmbeddingsImpl::reset();
  }

  void reset() override {
    const auto width = config.hidden_size();
    const auto words = peft::internal::vocabulary(config.vocab_size(), width, config.pad_token_id());
    auto positions = nn::EmbeddingOptions(config.max_position_embeddings(), width);
    std::optional<int64_t> padding;
    if (config.counts_from_padding()) {
      padding = config.pad_token_id();
      positions.padding_idx(*padding);
    }
    const nn::EmbeddingOptions types(config.type_vocab_size(), width);
    word_embeddings = register_module("word_embeddings", peft::internal::unset_embedding(words));
    position_embeddings = register_module("position_embeddings", peft::internal::unset_embedding(positions));
    token_type_embeddings = register_module("token_type_embeddings", peft::internal::unset_embedding(types));
    LayerNorm = register_module("LayerNorm",
                                peft::LayerNorm(nn::LayerNormOptions({width}).eps(config.layer_norm_eps())));
    dropout = register_module("dropout", nn::Dropout(config.hidden_dropout_prob()));
    const auto sites = InputOptions(width)
                           .positions(config.positions())
                           .padding_position(padding)
                           .layers(config.num_hidden_layers())
                           .heads(config.num_attention_heads());
    input = register_module("input", InputEmbeddings(sites));
    output = register_module("output", EmbeddingOutput(sites));
    input->set_vocabulary(word_embeddings.ptr());
    output->set_vocabulary(word_embeddings.ptr());
  }

  /// The hidden states and the mask that belongs to them.
  Embedded forward(const EncoderInputs& inputs) {
    peft::internal::check_inputs(inputs, model());
    const auto batch = (inputs.input_ids.defined() ? inputs.input_ids : inputs.inputs_embeds).size(0);
    const auto each_branch = [times = input->branches(), batch](const Tensor& rows) {
      return peft::internal::repeated(rows, times, batch);
    };
    Embedded in{each_branch(inputs.inputs_embeds), each_branch(inputs.attention_mask),
                each_branch(inputs.position_ids), each_branch(inputs.token_type_ids)};
    if (inputs.input_ids.defined()) {
      const auto ids = each_branch(inputs.input_ids);
      in.values = peft::internal::lookup(word_embeddings, ids, "input_ids");
      if (config.counts_from_padding() && !in.positions.defined()) in.positions = count_without_padding(ids);
    }
    const bool given = inputs.position_ids.defined();
    in = input->forward(std::move(in));
    check_length(in, given);

    // One row of ids serves every row, unless each has adapters of its own.
    const auto rows = input->by_rows() ? in.values.size(0) : 1;
    const auto ids = torch::TensorOptions(torch::kLong).device(in.values.device());
    const auto types = in.types.defined() ? in.types : torch::zeros({rows, 1}, ids);
    const auto first = input->options.first_position();
    const auto positions = in.positions.defined()
                               ? in.positions
                               : torch::arange(first, first + in.values.size(1), ids).unsqueeze(0);
    auto x = in.values + peft::internal::lookup(token_type_embeddings, peft::internal::for_rows(types, rows),
                                                "token_type_ids");
    x = x + peft::internal::lookup(position_embeddings, peft::internal::for_rows(positions, rows),
                                   "position_ids");
    in.values = dropout->forward(LayerNorm->forward(x));
    return output->forward(std::move(in));
  }

  BertConfig config;
  peft::Embedding word_embeddings{nullptr}, position_embeddings{nullptr}, token_type_embeddings{nullptr};
  peft::LayerNorm LayerNorm{nullptr};
  nn::Dropout dropout{nullptr};
  InputEmbeddings input{nullptr};
  EmbeddingOutput output{nullptr};

 private:
  const char* model() const { return config.counts_from_padding() ? "RobertaModel" : "BertModel"; }

  /// The places of tokens among those that are no padding, which has its own.
  Tensor count_without_padding(const Tensor& ids) const {
    const auto padding = *config.pad_token_id();
    const auto real = ids.ne(padding);
    return real.cumsum(1, torch::kLong).mul_(real).add_(padding);
  }

  void check_length(const Embedded& in, bool given) const {
    const auto time = in.values.size(1);
    if (given || time <= config.positions()) return;
    // A text may have fewer tokens than places.
    const auto length = in.positions.defined()
                            ? in.positions.max().item<int64_t>() + 1 - input->options.first_position()
                            : time;
    TORCH_CHECK_VALUE(length <= config.positions(), model(), ": a text must have at most ",
                      config.positions(), " tokens, but got ", length,
                      in.virtual_tokens.defined() ? " with its virtual ones" : "");
  }
};
TORCH_MODULE(BertEmbeddings);

/// The projections and the attention between them.
class BertSelfAttentionImpl : public nn::Cloneable<BertSelfAttentionImpl> {
 public:
  BertSelfAttentionImpl(BertConfig settings, int64_t index) : config(std::move(settings)), layer(index) {
    BertSelfAttentionImpl::reset();
  }

  void reset() override {
    const auto width = config.hidden_size(), heads = config.num_attention_heads();
    query = register_module("query", peft::internal::unset_linear(width, width));
    key = register_module("key", peft::internal::unset_linear(width, width));
    value = register_module("value", peft::internal::unset_linear(width, width));
    attention = register_module("attention", Attention(AttentionOptions(heads, width / heads)
                                                           .layer(layer)
                                                           .dropout(config.attention_probs_dropout_prob())));
  }

  Tensor forward(const Tensor& x, const Tensor& bias) {
    const auto split = [&](const Tensor& y) {
      return y.view({y.size(0), y.size(1), config.num_attention_heads(), -1}).transpose(1, 2);
    };
    const auto [q, k, v] = project(x, query, key, value);
    return attention->forward(split(q), split(k), split(v), bias, /*cache=*/nullptr, x);
  }

  BertConfig config;
  int64_t layer;
  Linear query{nullptr}, key{nullptr}, value{nullptr};
  Attention attention{nullptr};
};
TORCH_MODULE(BertSelfAttention);

/// A projection, dropout, and the join with what came in.
class BertSublayerOutputImpl : public nn::Cloneable<BertSublayerOutputImpl> {
 public:
  BertSublayerOutputImpl(BertConfig settings, int64_t in, JoinPlace where)
      : config(std::move(settings)), width(in), place(where) {
    BertSublayerOutputImpl::reset();
  }

  void reset() override {
    dense = register_module("dense", peft::internal::unset_linear(width, config.hidden_size()));
    dropout = register_module("dropout", nn::Dropout(config.hidden_dropout_prob()));
    LayerNorm = register_module(
        "LayerNorm",
        Residual(nn::LayerNormOptions({config.hidden_size()}).eps(config.layer_norm_eps()), place));
  }

  Tensor forward(const Tensor& x, const Tensor& skip) {
    return LayerNorm->forward(dropout->forward(dense->forward(x)), skip);
  }

  BertConfig config;
  int64_t width;
  JoinPlace place;
  Linear dense{nullptr};
  nn::Dropout dropout{nullptr};
  Residual LayerNorm{nullptr};
};
TORCH_MODULE(BertSublayerOutput);

/// Self-attention and its join.
class BertAttentionImpl : public nn::Cloneable<BertAttentionImpl> {
 public:
  BertAttentionImpl(BertConfig settings, int64_t index) : config(std::move(settings)), layer(index) {
    BertAttentionImpl::reset();
  }

  void reset() override {
    self = register_module("self", BertSelfAttention(config, layer));
    output = register_module(
        "output", BertSublayerOutput(config, config.hidden_size(), JoinPlace{JoinRole::attention, layer}));
  }

  Tensor forward(const Tensor& x, const Tensor& bias) { return output->forward(self->forward(x, bias), x); }

  BertConfig config;
  int64_t layer;
  BertSelfAttention self{nullptr};
  BertSublayerOutput output{nullptr};
};
TORCH_MODULE(BertAttention);

/// The feed-forward's first half: a projection and the activation.
class BertIntermediateImpl : public nn::Cloneable<BertIntermediateImpl> {
 public:
  explicit BertIntermediateImpl(BertConfig settings)
      : config(std::move(settings)), activation(activation_function(config.hidden_act())) {
    BertIntermediateImpl::reset();
  }

  void reset() override {
    dense = register_module("dense",
                            peft::internal::unset_linear(config.hidden_size(), config.intermediate_size()));
  }

  Tensor forward(const Tensor& x) { return activation(dense->forward(x)); }

  BertConfig config;
  ActivationFunction activation;
  Linear dense{nullptr};
};
TORCH_MODULE(BertIntermediate);

/// One block: attention, then the feed-forward network.
class BertLayerImpl : public nn::Cloneable<BertLayerImpl> {
 public:
  BertLayerImpl(BertConfig settings, int64_t index) : config(std::move(settings)), layer(index) {
    BertLayerImpl::reset();
  }

  void reset() override {
    attention = register_module("attention", BertAttention(config, layer));
    intermediate = register_module("intermediate", BertIntermediate(config));
    output = register_module("output", BertSublayerOutput(config, config.intermediate_size(),
                                                          JoinPlace{JoinRole::feed_forward, layer}));
  }

  Tensor forward(const Tensor& x, const Tensor& bias) {
    const auto attended = attention->forward(x, bias);
    return output->forward(intermediate->forward(attended), attended);
  }

  BertConfig config;
  int64_t layer;
  BertAttention attention{nullptr};
  BertIntermediate intermediate{nullptr};
  BertSublayerOutput output{nullptr};
};
TORCH_MODULE(BertLayer);

/// The stack of blocks.
class BertEncoderImpl : public nn::Cloneable<BertEncoderImpl> {
 public:
  explicit BertEncoderImpl(BertConfig settings) : config(std::move(settings)) { BertEncoderImpl::reset(); }

  void reset() override {
    layer = register_module("layer", nn::ModuleList());
    for (int64_t i = 0; i < config.num_hidden_layers(); ++i) layer->push_back(BertLayer(config, i));
  }

  /// Appends every layer's input and the last output to `states` where there is one.
  Tensor forward(Tensor x, const Tensor& bias, std::vector<Tensor>* states) {
    if (states) states->push_back(x);
    for (const auto& block : *layer) {
      const auto run = [block](const Tensor& in, const Tensor& mask) {
        return block->as<BertLayer>()->forward(in, mask);
      };
      x = gradient_checkpointing && is_training() ? checkpoint(run, x, bias) : run(x, bias);
      if (states) states->push_back(x);
    }
    return x;
  }

  BertConfig config;
  bool gradient_checkpointing = false;
  nn::ModuleList layer{nullptr};
};
TORCH_MODULE(BertEncoder);

/// The first token's last hidden state through a projection and tanh.
class BertPoolerImpl : public nn::Cloneable<BertPoolerImpl> {
 public:
  explicit BertPoolerImpl(BertConfig settings) : config(std::move(settings)) { BertPoolerImpl::reset(); }
  void reset() override {
    dense =
        register_module("dense", peft::internal::unset_linear(config.hidden_size(), config.hidden_size()));
  }
  Tensor forward(const Tensor& hidden) { return dense->forward(hidden.select(1, 0)).tanh(); }

  BertConfig config;
  Linear dense{nullptr};
};
TORCH_MODULE(BertPooler);

/// A projection to the words' width, the activation and a norm, on every token.
class BertPredictionTransformImpl : public nn::Cloneable<BertPredictionTransformImpl> {
 public:
  BertPredictionTransformImpl(BertConfig settings, int64_t out)
      : config(std::move(settings)), width(out), activation(activation_function(config.hidden_act())) {
    BertPredictionTransformImpl::reset();
  }

  void reset() override {
    dense = register_module("dense", peft::internal::unset_linear(config.hidden_size(), width));
    LayerNorm = register_module("LayerNorm",
                                peft::LayerNorm(nn::LayerNormOptions({width}).eps(config.layer_norm_eps())));
  }

  Tensor forward(const Tensor& hidden) { return LayerNorm->forward(activation(dense->forward(hidden))); }

  BertConfig config;
  int64_t width;
  ActivationFunction activation;
  Linear dense{nullptr};
  peft::LayerNorm LayerNorm{nullptr};
};
TORCH_MODULE(BertPredictionTransform);

}  // namespace peft::models
