// ReparametrizedLayers: attention and recurrent layers that take adapters on their weights, and run on W′.
#pragma once

#include <memory>
#include <tuple>
#include <utility>

#include "peft/model/reparametrized_sites.h"

namespace peft {
namespace internal {

/// A frozen layer that passes its weights to a function, so that no layer inside it could be wrapped. A
/// forward runs on the sites' effective weights in a copy of the layer that shares all other tensors: the
/// layer itself is only read, by any number of threads.
template <class Layer, class Derived>
class ReparametrizedLayer : public MirrorRoot<Layer, Derived> {
 public:
  explicit ReparametrizedLayer(std::shared_ptr<Layer> layer, std::vector<Member> members = {})
      : MirrorRoot<Layer, Derived>(std::move(layer), std::move(members)) {}

 protected:
  /// Puts effective weights into a copy of the module that the slot is of.
  static void put(const Slot& slot, nn::Module& copy) {
    const auto weights = slot.site->effective();
    *slot.weight(copy) = weights.weight;
    if (slot.bias) *slot.bias(copy) = weights.bias;
  }
};

}  // namespace internal

/// nn::MultiheadAttention with a site for the stacked query, key and value projections, `in_proj`, and one
/// for the output's, `out_proj`; a target that names the attention means both. A drop-in with the layer's
/// constructors and checkpoint keys. Methods act through W′, so dropout on their input has no effect, as in
/// the reference. Own ranks for query, key and value: `LoraOptions::enable({true, true, true})` on `in_proj`.
/// Shapes: query (target, batch, embed_dim); key, value (source, batch, embed_dim).
/// Throws: c10::ValueError for a layer whose keys or values have another width, as the reference does.
/// Reference: Hugging Face PEFT's lora.MultiheadAttention.
class MultiheadAttentionImpl
    : public internal::ReparametrizedLayer<nn::MultiheadAttentionImpl, MultiheadAttentionImpl> {
 public:
  explicit MultiheadAttentionImpl(std::shared_ptr<nn::MultiheadAttentionImpl> layer,
                                  std::vector<Member> members = {})
      : ReparametrizedLayer(checked(std::move(layer)), std::move(members)) {}
  explicit MultiheadAttentionImpl(const nn::MultiheadAttention& layer)
      : MultiheadAttentionImpl(layer.ptr()) {}
  explicit MultiheadAttentionImpl(const nn::MultiheadAttentionOptions& options)
      : MultiheadAttentionImpl(nn::MultiheadAttention(options)) {}
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiheadAttentionImpl(nn::MultiheadAttentionOptions(embed_dim, num_heads)) {}

  /// The attended values, and the weights of the attention where they are asked for.
  std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& key_padding_mask = {}, bool need_weights = true,
                                     const Tensor& attn_mask = {}, bool average_attn_weights = true) {
    nn::MultiheadAttentionImpl run(*base);
    run.out_proj = nn::Linear(std::make_shared<nn::LinearImpl>(*base->out_proj));
    for (const auto& slot : slots_) {
      put(slot, slot.module == base ? static_cast<nn::Module&>(run) : *run.out_proj);
    }
    return run.forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights);
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, nn::AnyValue(Tensor())}, {4, nn::AnyValue(true)}, {5, nn::AnyValue(Tensor())},
                           {6, nn::AnyValue(true)})

 private:
  static std::shared_ptr<nn::MultiheadAttentionImpl> checked(
      std::shared_ptr<nn::MultiheadAttentionImpl> layer) {
    const auto& options = layer->options;
    TORCH_CHECK_VALUE(layer->_qkv_same_embed_dim,
                      "peft::MultiheadAttention: key and value must have the query's width, ",
                      options.embed_dim(), ", but got kdim ", options.kdim(), " and vdim ", options.vdim());
    return layer;
  }
};

/// Holder of `MultiheadAttentionImpl`.
class MultiheadAttention : public nn::ModuleHolder<MultiheadAttentionImpl> {
 public:
  using nn::ModuleHolder<MultiheadAttentionImpl>::ModuleHolder;
  using Impl = MultiheadAttentionImpl;
};

namespace internal {

/// What LSTM and GRU have in common.
template <class Layer, class Derived>
class RecurrentLayer : public ReparametrizedLayer<Layer, Derived> {
 public:
  using ReparametrizedLayer<Layer, Derived>::ReparametrizedLayer;

 protected:
  /// The layer on its effective weights.
  Layer effective_layer() const {
    Layer run(*this->base);
    for (const auto& slot : this->slots_) this->put(slot, run);
    return run;
  }
};

template <class Result, class Class, class First, class Second>
Second second_argument_of(Result (Class::*)(First, Second));

}  // namespace internal

/// nn::LSTM with a site for each weight matrix: `weight_ih_l0`, `weight_hh_l0`, `weight_hr_l0`, …,
/// `_reverse`, each with the bias of the same name. A drop-in with the layer's constructors and checkpoint
/// keys. Shapes: as nn::LSTM. Reference: Hugging Face PEFT's `target_parameters` on torch.nn.LSTM.
class LSTMImpl : public internal::RecurrentLayer<nn::LSTMImpl, LSTMImpl> {
  using State = decltype(internal::second_argument_of(&nn::LSTMImpl::forward));

 public:
  using RecurrentLayer::RecurrentLayer;
  explicit LSTMImpl(const nn::LSTM& layer) : RecurrentLayer(layer.ptr()) {}
  explicit LSTMImpl(const nn::LSTMOptions& options) : LSTMImpl(nn::LSTM(options)) {}
  LSTMImpl(int64_t input_size, int64_t hidden_size) : LSTMImpl(nn::LSTMOptions(input_size, hidden_size)) {}

  /// Outputs, and the last hidden and cell states.
  std::tuple<Tensor, std::tuple<Tensor, Tensor>> forward(const Tensor& input, State state = {}) {
    return effective_layer().forward(input, std::move(state));
  }
  std::tuple<nn::utils::rnn::PackedSequence, std::tuple<Tensor, Tensor>> forward_with_packed_input(
      const nn::utils::rnn::PackedSequence& input, State state = {}) {
    return effective_layer().forward_with_packed_input(input, std::move(state));
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, nn::AnyValue(State())})
};

/// nn::GRU with a site for each weight matrix, as `LSTM` has them. Shapes: as nn::GRU.
class GRUImpl : public internal::RecurrentLayer<nn::GRUImpl, GRUImpl> {
 public:
  using RecurrentLayer::RecurrentLayer;
  explicit GRUImpl(const nn::GRU& layer) : RecurrentLayer(layer.ptr()) {}
  explicit GRUImpl(const nn::GRUOptions& options) : GRUImpl(nn::GRU(options)) {}
  GRUImpl(int64_t input_size, int64_t hidden_size) : GRUImpl(nn::GRUOptions(input_size, hidden_size)) {}

  /// Outputs, and the last hidden state.
  std::tuple<Tensor, Tensor> forward(const Tensor& input, Tensor state = {}) {
    return effective_layer().forward(input, std::move(state));
  }
  std::tuple<nn::utils::rnn::PackedSequence, Tensor> forward_with_packed_input(
      const nn::utils::rnn::PackedSequence& input, Tensor state = {}) {
    return effective_layer().forward_with_packed_input(input, std::move(state));
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, nn::AnyValue(Tensor())})
};

/// Holder of `LSTMImpl`.
class LSTM : public nn::ModuleHolder<LSTMImpl> {
 public:
  using nn::ModuleHolder<LSTMImpl>::ModuleHolder;
  using Impl = LSTMImpl;
};
/// Holder of `GRUImpl`.
class GRU : public nn::ModuleHolder<GRUImpl> {
 public:
  using nn::ModuleHolder<GRUImpl>::ModuleHolder;
  using Impl = GRUImpl;
};

}  // namespace peft
