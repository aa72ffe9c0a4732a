// What a DeBERTa-v2 or -v3 is made of: its embeddings, blocks and convolution, built from sites.
#pragma once

#include "peft/core/adapted.h"
#include "peft/core/checkpointing.h"
#include "peft/core/input.h"
#include "peft/core/random_state.h"
#include "peft/models/bert_layers.h"
#include "peft/models/deberta_v2_attention.h"
#include "peft/models/deberta_v2_config.h"
#include "peft/models/encoder.h"

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace peft {
namespace internal {

/// A Conv1d over time whose values are not set yet; nothing is drawn.
inline Conv1d unset_convolution(int64_t width, int64_t kernel, int64_t groups) {
  const RandomStateGuard kept;  // the small layer draws
  nn::Conv1d layer(nn::Conv1dOptions(groups, groups, kernel).padding((kernel - 1) / 2).groups(groups));
  layer->options.in_channels(width).out_channels(width);
  layer->weight.set_data(torch::empty({width, width / groups, kernel}));
  layer->bias.set_data(torch::empty({width}));
  return Conv1d(layer);
}

}  // namespace internal

namespace models {

// The parts of the model. Their weights have no values until the model they belong to draws or loads them.

/// Word vectors, with positions and types where there are any, projected to the model's width where they have
/// another, and normed; 0 at padding.
class DebertaV2EmbeddingsImpl : public nn::Cloneable<DebertaV2EmbeddingsImpl> {
 public:
  explicit DebertaV2EmbeddingsImpl(DebertaV2Config settings) : config(std::move(settings)) {
    DebertaV2EmbeddingsImpl::reset();
  }

  void reset() override {
    const auto words = config.word_width(), width = config.hidden_size();
    const auto add = [&](const char* name, bool has, const nn::EmbeddingOptions& options) {
      return has ? register_module(name, peft::internal::unset_embedding(options)) : peft::Embedding(nullptr);
    };
    word_embeddings = add("word_embeddings", true,
                          peft::internal::vocabulary(config.vocab_size(), words, config.pad_token_id()));
    position_embeddings =
        add("position_embeddings", config.position_biased_input(), {config.max_position_embeddings(), words});
    token_type_embeddings =
        add("token_type_embeddings", config.type_vocab_size() > 0, {config.type_vocab_size(), words});
    embed_proj = words == width
                     ? Linear(nullptr)
                     : register_module("embed_proj", peft::internal::unset_linear(words, width, false));
    LayerNorm = register_module("LayerNorm",
                                peft::LayerNorm(nn::LayerNormOptions({width}).eps(config.layer_norm_eps())));
    dropout = register_module("dropout", nn::Dropout(config.hidden_dropout_prob()));
    const auto sites = InputOptions(words)
                           .positions(config.position_biased_input() ? config.max_position_embeddings() : 0)
                           .layers(config.num_hidden_layers())
                           .heads(config.num_attention_heads());
    input = register_module("input", InputEmbeddings(sites));
    output = register_module("output", EmbeddingOutput(InputOptions(sites).width(width)));
    input->set_vocabulary(word_embeddings.ptr());
    output->set_vocabulary(word_embeddings.ptr());
  }

  /// The hidden states and the mask that belongs to them.
  Embedded forward(const EncoderInputs& inputs) {
    peft::internal::check_inputs(inputs, "DebertaV2Model");
    const auto batch = (inputs.input_ids.defined() ? inputs.input_ids : inputs.inputs_embeds).size(0);
    const auto each_branch = [times = input->branches(), batch](const Tensor& rows) {
      return peft::internal::repeated(rows, times, batch);
    };
    Embedded in{each_branch(inputs.inputs_embeds), each_branch(inputs.attention_mask),
                each_branch(inputs.position_ids), each_branch(inputs.token_type_ids)};
    if (inputs.input_ids.defined()) {
      in.values = peft::internal::lookup(word_embeddings, each_branch(inputs.input_ids), "input_ids");
    }
    in = input->forward(std::move(in));

    // One row of ids serves every row, unless each has adapters of its own.
    const auto rows = input->by_rows() ? in.values.size(0) : 1;
    const auto ids = torch::TensorOptions(torch::kLong).device(in.values.device());
    auto x = in.values;
    if (position_embeddings) {
      TORCH_CHECK_VALUE(in.positions.defined() || x.size(1) <= config.max_position_embeddings(),
                        "DebertaV2Model: a text must have at most ", config.max_position_embeddings(),
                        " tokens, but got ", x.size(1),
                        in.virtual_tokens.defined() ? " with its virtual ones" : "");
      const auto positions =
          in.positions.defined() ? in.positions : torch::arange(x.size(1), ids).unsqueeze(0);
      x = x + peft::internal::lookup(position_embeddings, peft::internal::for_rows(positions, rows),
                                     "position_ids");
    }
    if (token_type_embeddings) {
      const auto types = in.types.defined() ? in.types : torch::zeros({rows, 1}, ids);
      x = x + peft::internal::lookup(token_type_embeddings, peft::internal::for_rows(types, rows),
                                     "token_type_ids");
    }
    if (embed_proj) x = embed_proj->forward(x);
    x = LayerNorm->forward(x);
    if (in.mask.defined()) x = x * in.mask.ne(0).to(x.scalar_type()).unsqueeze(2);
    in.values = dropout->forward(x);
    return output->forward(std::move(in));
  }

  DebertaV2Config config;
  peft::Embedding word_embeddings{nullptr}, position_embeddings{nullptr}, token_type_embeddings{nullptr};
  Linear embed_proj{nullptr};
  peft::LayerNorm LayerNorm{nullptr};
  nn::Dropout dropout{nullptr};
  InputEmbeddings input{nullptr};
  EmbeddingOutput output{nullptr};
};
TORCH_MODULE(DebertaV2Embeddings);

/// Self-attention and its join.
class DebertaV2AttentionImpl : public nn::Cloneable<DebertaV2AttentionImpl> {
 public:
  DebertaV2AttentionImpl(DebertaV2Config settings, int64_t index)
      : config(std::move(settings)), layer(index) {
    DebertaV2AttentionImpl::reset();
  }

  void reset() override {
    self = register_module("self", DisentangledSelfAttention(config, layer));
    output = register_module("output", BertSublayerOutput(config.of_blocks(), config.hidden_size(),
                                                          JoinPlace{JoinRole::attention, layer}));
  }

  Tensor forward(const Tensor& x, const Tensor& hidden, const RelativePositions& positions) {
    return output->forward(self->forward(x, hidden, positions), x);
  }

  DebertaV2Config config;
  int64_t layer;
  DisentangledSelfAttention self{nullptr};
  BertSublayerOutput output{nullptr};
};
TORCH_MODULE(DebertaV2Attention);

/// One block: attention, then the feed-forward network.
class DebertaV2LayerImpl : public nn::Cloneable<DebertaV2LayerImpl> {
 public:
  DebertaV2LayerImpl(DebertaV2Config settings, int64_t index) : config(std::move(settings)), layer(index) {
    DebertaV2LayerImpl::reset();
  }

  void reset() override {
    attention = register_module("attention", DebertaV2Attention(config, layer));
    intermediate = register_module("intermediate", BertIntermediate(config.of_blocks()));
    output = register_module("output", BertSublayerOutput(config.of_blocks(), config.intermediate_size(),
                                                          JoinPlace{JoinRole::feed_forward, layer}));
  }

  Tensor forward(const Tensor& x, const Tensor& hidden, const RelativePositions& positions) {
    const auto attended = attention->forward(x, hidden, positions);
    return output->forward(intermediate->forward(attended), attended);
  }

  DebertaV2Config config;
  int64_t layer;
  DebertaV2Attention attention{nullptr};
  BertIntermediate intermediate{nullptr};
  BertSublayerOutput output{nullptr};
};
TORCH_MODULE(DebertaV2Layer);

/// The convolution beside the first block: what it makes of that one's input is joined to its output.
class DebertaV2ConvolutionImpl : public nn::Cloneable<DebertaV2ConvolutionImpl> {
 public:
  explicit DebertaV2ConvolutionImpl(DebertaV2Config settings)
      : config(std::move(settings)), activation(activation_function(config.conv_act())) {
    DebertaV2ConvolutionImpl::reset();
  }

  void reset() override {
    const auto width = config.hidden_size();
    conv = register_module(
        "conv", peft::internal::unset_convolution(width, config.conv_kernel_size(), config.conv_groups()));
    LayerNorm = register_module("LayerNorm",
                                peft::LayerNorm(nn::LayerNormOptions({width}).eps(config.layer_norm_eps())));
    dropout = register_module("dropout", nn::Dropout(config.hidden_dropout_prob()));
  }

  /// `padding`: (batch, time), true at padding, or undefined.
  Tensor forward(const Tensor& in, const Tensor& out, const Tensor& padding) {
    auto x = conv->forward(in.transpose(1, 2)).transpose(1, 2);
    if (padding.defined()) x = x.masked_fill(padding.unsqueeze(2), 0);
    x = LayerNorm->forward(out + activation(dropout->forward(x)));
    return padding.defined() ? x.masked_fill(padding.unsqueeze(2), 0) : x;
  }

  DebertaV2Config config;
  ActivationFunction activation;
  peft::Conv1d conv{nullptr};
  peft::LayerNorm LayerNorm{nullptr};
  nn::Dropout dropout{nullptr};
};
TORCH_MODULE(DebertaV2Convolution);

/// The stack of blocks, and the vectors of distances that they share.
class DebertaV2EncoderImpl : public nn::Cloneable<DebertaV2EncoderImpl> {
 public:
  explicit DebertaV2EncoderImpl(DebertaV2Config settings) : config(std::move(settings)) {
    DebertaV2EncoderImpl::reset();
  }

  void reset() override {
    const auto width = config.hidden_size();
    layer = register_module("layer", nn::ModuleList());
    for (int64_t i = 0; i < config.num_hidden_layers(); ++i) layer->push_back(DebertaV2Layer(config, i));
    const bool relative = config.relative_attention(), normed = config.norm_rel_ebd() == "layer_norm";
    rel_embeddings =
        relative ? register_module("rel_embeddings",
                                   peft::internal::unset_embedding({2 * config.position_span(), width}))
                 : peft::Embedding(nullptr);
    LayerNorm =
        normed ? register_module("LayerNorm",
                                 peft::LayerNorm(nn::LayerNormOptions({width}).eps(config.layer_norm_eps())))
               : peft::LayerNorm(nullptr);
    if (rel_embeddings) rel_embeddings->stand_beside_blocks();
    if (LayerNorm) LayerNorm->stand_beside_blocks();
    conv = config.conv_kernel_size() > 0 ? register_module("conv", DebertaV2Convolution(config))
                                         : DebertaV2Convolution(nullptr);
  }

  /// Appends every layer's input and the last output to `states` where there is one. `mask`: (batch, time), 0
  /// at padding, which sees nothing and is not seen; or undefined.
  Tensor forward(Tensor x, const Tensor& mask, std::vector<Tensor>* states) {
    Tensor padding, hidden;
    if (mask.defined()) padding = mask.eq(0);
    // Asking a device would make it wait.
    if (padding.defined() && padding.is_cpu() && !padding.any().item<bool>()) padding = Tensor();
    if (padding.defined()) hidden = (padding.unsqueeze(1) | padding.unsqueeze(2)).unsqueeze(1);
    const auto positions = rel_embeddings ? relative_positions(x) : RelativePositions();

    if (states) states->push_back(x);
    const auto in = x;
    for (size_t i = 0; i < layer->size(); ++i) {
      const auto run = [block = layer->ptr(i)](const Tensor& from, const Tensor& unseen,
                                               const Tensor& vectors, const Tensor& index) {
        return block->as<DebertaV2Layer>()->forward(from, unseen, {vectors, index});
      };
      x = gradient_checkpointing && is_training()
              ? checkpoint(run, x, hidden, positions.vectors, positions.index)
              : run(x, hidden, positions.vectors, positions.index);
      if (i == 0 && conv) x = conv->forward(in, x, padding);
      if (states) states->push_back(x);
    }
    return x;
  }

  DebertaV2Config config;
  bool gradient_checkpointing = false;
  nn::ModuleList layer{nullptr};
  peft::Embedding rel_embeddings{nullptr};
  peft::LayerNorm LayerNorm{nullptr};
  DebertaV2Convolution conv{nullptr};

 private:
  /// Of a text as long as x, (batch, time, hidden): the vectors of those distances alone that occur in it,
  /// unless an adapter looks at all of them.
  RelativePositions relative_positions(const Tensor& x) {
    const auto time = x.size(1);
    const auto rows = peft::internal::rows_of_distances(config, time);
    auto first = rows[0].item<int64_t>(), last = rows[-1].item<int64_t>();
    const bool all = std::any_of(layer->begin(), layer->end(), [](const auto& block) {
      return block->template as<DebertaV2Layer>()->attention->self->mixes_positions();
    });
    if (all) {
      first = 0;
      last = 2 * config.position_span() - 1;
    }
    const auto options = torch::TensorOptions(torch::kLong).device(x.device());
    const auto each = rel_embeddings->by_rows() ? x.size(0) : 1;  // rows may have adapters of their own
    RelativePositions result;
    result.vectors =
        rel_embeddings->forward(torch::arange(last, first - 1, -1, options).unsqueeze(0).expand({each, -1}));
    if (LayerNorm) result.vectors = LayerNorm->forward(result.vectors);
    if (!rows.equal(torch::arange(first, last + 1, torch::kLong))) {
      // Row q of the windows over the falling distances, the last window first: q, q − 1, …, q − time + 1.
      const auto places = (last - rows).flip(0).to(x.device(), /*non_blocking=*/true);
      result.index = places.unfold(0, time, 1).flip(0);
    }
    return result;
  }
};
TORCH_MODULE(DebertaV2Encoder);

}  // namespace models
}  // namespace peft
