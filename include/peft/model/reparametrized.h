// Reparametrized: attention and recurrent layers that take adapters on their weights, and run on W′.
#pragma once

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/rnn.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/core/parameter_site.h"

namespace peft {
namespace internal {

/// A frozen layer that passes its weights to a function, so that no layer inside it could be wrapped. Each
/// weight is a site below this module; a forward runs on the sites' effective weights in a copy of the layer
/// that shares all other tensors: the layer itself is only read, by any number of threads.
///
/// Registers the layer's tensors under the layer's names.
template <class Layer, class Derived>
class ReparametrizedLayer : public nn::Module {
 public:
  explicit ReparametrizedLayer(Layer layer) : nn::Module(layer->name()), base(std::move(layer)) {
    for (const auto& item : base->named_parameters(/*recurse=*/false)) {
      register_parameter(item.key(), item.value(), item.value().requires_grad());
    }
    for (const auto& item : base->named_buffers(/*recurse=*/false)) register_buffer(item.key(), item.value());
  }

  void train(bool on = true) override {
    nn::Module::train(on);
    base->train(on);
  }
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    base->to(device, dtype, non_blocking);
    nn::Module::to(device, dtype, non_blocking);
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    base->to(dtype, non_blocking);
    nn::Module::to(dtype, non_blocking);
  }
  void to(torch::Device device, bool non_blocking = false) override {
    base->to(device, non_blocking);
    nn::Module::to(device, non_blocking);
  }

  /// Reads a checkpoint that may come from the plain layer, so lack the adapters.
  void load(torch::serialize::InputArchive& archive) override { load_into(*this, archive); }

  std::shared_ptr<nn::Module> clone(const OptionalDevice& device = {}) const override {
    torch::NoGradGuard no_grad;
    auto result = std::make_shared<Derived>(cloned_layer(base));
    for (size_t i = 0; i < weights_.size(); ++i) result->weights_[i]->copy_from(*weights_[i]);
    result->copy_sites(static_cast<const Derived&>(*this));
    result->train(is_training());
    if (device) result->to(*device);
    return result;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::";
    base->pretty_print(stream);
  }

  Layer base;

 protected:
  /// A site at `name` for tensors of the layer.
  std::shared_ptr<AdaptedImpl<Parameter>> add_weight(const std::string& key, const std::string& name,
                                                     const Weights& weights, SiteInfo kind) {
    kind.layer = "Linear";
    auto site = std::make_shared<AdaptedImpl<Parameter>>(ParameterOptions(name), weights, std::move(kind));
    weights_.push_back(register_module(key, site));
    return site;
  }
  /// Copies the adapters of sites that register tensors of their own.
  void copy_sites(const Derived&) {}

  std::vector<std::shared_ptr<AdaptedImpl<Parameter>>> weights_;

 private:
  void clone_(nn::Module& other, const OptionalDevice& device) final {
    auto copy = std::dynamic_pointer_cast<Derived>(other.clone(device));
    TORCH_CHECK(copy != nullptr, "clone: a ", name(), " was registered as another kind of layer");
    static_cast<Derived&>(*this) = *copy;
  }
};

/// The linear layer inside another that reads its weights only.
class ProjectionImpl : public LayerSite<nn::Linear, ProjectionImpl> {
 public:
  explicit ProjectionImpl(nn::Linear layer) : LayerSite<nn::Linear, ProjectionImpl>(std::move(layer)) {}
  SiteInfo base_info() const override {
    auto info = LayerSite<nn::Linear, ProjectionImpl>::base_info();
    info.offers = {Needs::weights};
    info.weights_only = info.ignores_dropout = true;
    info.files = {FileNames::Kind::part, "base_layer.out_proj."};
    return info;
  }
  void copy_from(const ProjectionImpl& other) { copy_weight_site(other); }
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
    : public internal::ReparametrizedLayer<nn::MultiheadAttention, MultiheadAttentionImpl> {
 public:
  explicit MultiheadAttentionImpl(nn::MultiheadAttention layer) : ReparametrizedLayer(std::move(layer)) {
    TORCH_CHECK_VALUE(base->_qkv_same_embed_dim,
                      "peft::MultiheadAttention: key and value must have the query's width, ",
                      base->options.embed_dim(), ", but got kdim ", base->options.kdim(), " and vdim ",
                      base->options.vdim());
    SiteInfo kind;
    kind.ignores_dropout = true;
    kind.files = {FileNames::Kind::part, "", "in_proj_weight", "in_proj_bias"};
    kind.drawn_before = base->out_proj->weight.sizes().vec();
    in_proj = add_weight("in_proj", "in_proj", {base->in_proj_weight, base->in_proj_bias}, std::move(kind));
    out_proj = register_module("out_proj", std::make_shared<internal::ProjectionImpl>(base->out_proj));
  }
  explicit MultiheadAttentionImpl(const nn::MultiheadAttentionOptions& options)
      : MultiheadAttentionImpl(nn::MultiheadAttention(options)) {}
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiheadAttentionImpl(nn::MultiheadAttentionOptions(embed_dim, num_heads)) {}

  /// The attended values, and the weights of the attention where they are asked for.
  std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& key_padding_mask = {}, bool need_weights = true,
                                     const Tensor& attn_mask = {}, bool average_attn_weights = true) {
    nn::MultiheadAttentionImpl run(*base);
    std::tie(run.in_proj_weight, run.in_proj_bias) = as_tuple(in_proj->effective());
    run.out_proj = nn::Linear(std::make_shared<nn::LinearImpl>(*base->out_proj));
    std::tie(run.out_proj->weight, run.out_proj->bias) = as_tuple(out_proj->effective());
    return run.forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights);
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, nn::AnyValue(Tensor())}, {4, nn::AnyValue(true)}, {5, nn::AnyValue(Tensor())},
                           {6, nn::AnyValue(true)})

 public:
  std::shared_ptr<AdaptedImpl<Parameter>> in_proj;
  std::shared_ptr<internal::ProjectionImpl> out_proj;

 private:
  friend ReparametrizedLayer;
  static std::tuple<Tensor, Tensor> as_tuple(const Weights& w) { return {w.weight, w.bias}; }
  void copy_sites(const MultiheadAttentionImpl& other) { out_proj->copy_from(*other.out_proj); }
};

/// Holder of `MultiheadAttentionImpl`.
class MultiheadAttention : public nn::ModuleHolder<MultiheadAttentionImpl> {
 public:
  using nn::ModuleHolder<MultiheadAttentionImpl>::ModuleHolder;
  using Impl = MultiheadAttentionImpl;
};

namespace internal {

/// What LSTM and GRU have in common: a site for each `weight_…`, with the bias of the same name.
template <class Layer, class Derived>
class RecurrentLayer : public ReparametrizedLayer<Layer, Derived> {
  using Base = ReparametrizedLayer<Layer, Derived>;

 public:
  explicit RecurrentLayer(Layer layer) : Base(std::move(layer)) {
    const auto tensors = this->base->named_parameters(/*recurse=*/false);
    for (const auto& item : tensors) {
      if (!item.key().starts_with("weight")) continue;
      const auto bias_name = "bias" + item.key().substr(std::string("weight").size());
      const auto* bias = tensors.find(bias_name);
      SiteInfo kind;
      kind.files = {FileNames::Kind::parameter, "", item.key(), bias_name};
      this->add_weight(item.key() + "_adapters", item.key(), {item.value(), bias ? *bias : Tensor()},
                       std::move(kind));
    }
  }

 protected:
  /// The layer on its effective weights.
  typename Layer::ContainedType effective_layer() const {
    std::map<std::string, Tensor> effective;
    for (const auto& site : this->weights_) {
      const auto weights = site->effective();
      const auto names = site->base_info().files;
      effective[names.weight] = weights.weight;
      effective[names.bias] = weights.bias;
    }
    typename Layer::ContainedType run(*this->base);
    run.*Open::flat_weights() = {};
    for (const auto& item : this->base->named_parameters(/*recurse=*/false)) {
      (run.*Open::flat_weights()).push_back(effective.at(item.key()));
    }
    return run;
  }

 private:
  /// Reaches the list of tensors a recurrent layer passes to its function.
  struct Open : Layer::ContainedType {
    static auto flat_weights() { return &Open::flat_weights_; }
  };
};

template <class Result, class Class, class First, class Second>
Second second_argument_of(Result (Class::*)(First, Second));

}  // namespace internal

/// nn::LSTM with a site for each weight matrix: `weight_ih_l0`, `weight_hh_l0`, `weight_hr_l0`, …,
/// `_reverse`, each with the bias of the same name. A drop-in with the layer's constructors and checkpoint
/// keys. Shapes: as nn::LSTM. Reference: Hugging Face PEFT's `target_parameters` on torch.nn.LSTM.
class LSTMImpl : public internal::RecurrentLayer<nn::LSTM, LSTMImpl> {
  using State = decltype(internal::second_argument_of(&nn::LSTMImpl::forward));

 public:
  explicit LSTMImpl(nn::LSTM layer) : RecurrentLayer(std::move(layer)) {}
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
class GRUImpl : public internal::RecurrentLayer<nn::GRU, GRUImpl> {
 public:
  explicit GRUImpl(nn::GRU layer) : RecurrentLayer(std::move(layer)) {}
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
