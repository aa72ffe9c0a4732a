// Adapted: a frozen layer that carries adapters; a drop-in for the layer where it carries none.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/core/random_state.h"
#include "peft/core/weight_site.h"

namespace peft {
namespace internal {

/// The untouched layer, remembering the type its first output had.
template <class Layer>
class BaseView final : public LayerView {
 public:
  explicit BaseView(const Layer& layer) : layer_(layer) {}

  Tensor forward(const Tensor& x) const override {
    if constexpr (WeightLayer<Layer>) {
      return noted(SiteTraits<Layer>::apply(layer_, x, weights()));
    } else {
      auto function = layer_;
      return noted(function->forward(x));
    }
  }
  Weights weights() const override {
    if constexpr (WeightLayer<Layer>) {
      return SiteTraits<Layer>::weights(layer_);
    } else {
      TORCH_CHECK(false, layer_->name(), " has no weights a method could change");
    }
  }
  Tensor apply(const Tensor& x, const Weights& given) const override {
    if constexpr (WeightLayer<Layer>) {
      auto y = SiteTraits<Layer>::apply(layer_, x, given);
      if (output_type_) return y;
      const auto own = weights().weight;
      return own.defined() && own.scalar_type() == given.weight.scalar_type() ? noted(std::move(y)) : y;
    } else {
      TORCH_CHECK(false, layer_->name(), " cannot run with other weights");
    }
  }
  Tensor low_rank(const Tensor& x, const Tensor& A, const Tensor& B) const override {
    if constexpr (LowRankLayer<Layer>) {
      return SiteTraits<Layer>::low_rank(layer_, x, A, B);
    } else {
      TORCH_CHECK(false, layer_->name(), " has no low-rank form");
    }
  }
  Tensor fold(const Tensor& BA) const override {
    if constexpr (LowRankLayer<Layer>) {
      return SiteTraits<Layer>::fold(BA, SiteTraits<Layer>::weights(layer_).weight);
    } else {
      TORCH_CHECK(false, layer_->name(), " has no low-rank form");
    }
  }
  std::optional<PlainLinear> plain_linear() const override {
    if constexpr (PlainLinearLayer<Layer>) return SiteTraits<Layer>::plain_linear(layer_);
    return {};
  }
  const LayerView& base() const override { return *this; }

  /// The type of the first output with weights of the base's type, which is the type the site returns: what
  /// pieces compute with other weights may be of another.
  std::optional<torch::ScalarType> output_type() const { return output_type_; }

 private:
  Tensor noted(Tensor y) const {
    if (!output_type_) output_type_ = y.scalar_type();
    return y;
  }
  const Layer& layer_;
  mutable std::optional<torch::ScalarType> output_type_;
};

/// A copy of a plain layer, as frozen as it is.
template <class Layer>
Layer cloned_layer(const Layer& base) {
  // A layer's clone() draws its weights before it copies them; the generator must not notice.
  const RandomStateGuard kept;
  Layer layer(std::dynamic_pointer_cast<typename Layer::ContainedType>(base->clone()));
  const auto from = base->named_parameters();
  auto into = layer->named_parameters();
  for (const auto& item : from) into[item.key()].set_requires_grad(item.value().requires_grad());
  return layer;
}

}  // namespace internal

/// What the weighted sites have in common: the base's tensors are registered as the site's own, so that
/// checkpoints, `parameters()` and `save` see the plain layer; forwards, merges and clones run over the
/// active pieces.
template <class Layer, class Derived>
class LayerSite : public internal::WeightSite {
 public:
  explicit LayerSite(Layer layer) : base(std::move(layer)) { register_base(); }

  SiteInfo base_info() const override {
    if constexpr (WeightLayer<Layer>) {
      return SiteTraits<Layer>::info(base);
    } else {
      SiteInfo info;
      info.layer = base->name();
      info.offers = {Needs::function};
      const auto parameters = base->parameters();
      if (!parameters.empty()) {
        info.dtype = parameters.front().scalar_type();
        info.device = parameters.front().device();
      }
      return info;
    }
  }

  std::unique_ptr<LayerView> base_view() const override {
    return std::make_unique<internal::BaseView<Layer>>(base);
  }

  Weights base_weights() const override { return internal::BaseView<Layer>(base).weights(); }

  torch::OrderedDict<std::string, Tensor> base_parameters() const override {
    return base->named_parameters();
  }

  std::vector<std::pair<std::string, std::shared_ptr<nn::Module>>> base_children() const override {
    return base->named_children().pairs();
  }

  void train(bool on = true) override {
    nn::Module::train(on);
    base->train(on);
  }
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    base->to(device, dtype, non_blocking);
    nn::Module::to(device, dtype, non_blocking);
    move_kept(
        [&](Tensor& t) { t = t.to(device, t.is_floating_point() ? dtype : t.scalar_type(), non_blocking); });
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    base->to(dtype, non_blocking);
    nn::Module::to(dtype, non_blocking);
    move_kept([&](Tensor& t) { t = t.to(dtype, non_blocking); });
  }
  void to(torch::Device device, bool non_blocking = false) override {
    base->to(device, non_blocking);
    nn::Module::to(device, non_blocking);
    move_kept([&](Tensor& t) { t = t.to(device, non_blocking); });
  }

  std::shared_ptr<nn::Module> clone(const internal::OptionalDevice& device = {}) const override {
    torch::NoGradGuard no_grad;
    auto result = std::make_shared<Derived>(internal::cloned_layer(base));
    result->copy_weight_site(*this);
    if (device) result->to(*device);
    return result;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Adapted<";
    base->pretty_print(stream);
    stream << ">";
  }

  Layer base;

 protected:
  /// The adapted F(x) of a single input.
  Tensor chain(const Tensor& x, bool positions = false) {
    return this
        ->route({x},
                [&](const SiteImpl::Flow& in, const PieceTree& tree) -> SiteImpl::Flow {
                  if (!positions) return {compose(in.front(), tree)};
                  return {compose(in.front(), tree.without([](const PieceImpl* piece) {
                    return !piece->adapts_positions();
                  }))};
                })
        .front();
  }

  /// F(x) under these pieces, in the type of the base's output.
  Tensor compose(const Tensor& x, const PieceTree& tree) const {
    const internal::BaseView<Layer> view(base);
    internal::Views views(path());
    const auto y = views.on(view, tree).forward(x);
    const auto type = view.output_type();
    return type && *type != y.scalar_type() ? y.to(*type) : y;
  }

 private:
  void register_base() {
    for (const auto& item : base->named_parameters(/*recurse=*/false)) {
      register_parameter(item.key(), item.value(), item.value().requires_grad());
    }
    for (const auto& item : base->named_buffers(/*recurse=*/false)) register_buffer(item.key(), item.value());
    for (const auto& child : base->named_children()) register_module(child.key(), child.value());
  }

  void clone_(nn::Module& other, const internal::OptionalDevice& device) final {
    auto copy = std::dynamic_pointer_cast<Derived>(other.clone(device));
    TORCH_CHECK(copy != nullptr, "clone: '", path(), "' was registered as another kind of site");
    static_cast<Derived&>(*this) = *copy;
  }
};

/// A frozen layer that carries adapters. `Adapted<nn::Linear>(768, 768)` is a drop-in for `nn::Linear(768,
/// 768)`; `Adapted(layer)` wraps a layer that is there already. Keys of checkpoints are the plain layer's.
template <class Layer>
class AdaptedImpl : public LayerSite<Layer, AdaptedImpl<Layer>> {
  static_assert(FunctionLayer<Layer>, "peft::Adapted<Layer> needs a module holder with a forward(Tensor)");

 public:
  explicit AdaptedImpl(Layer layer) : LayerSite<Layer, AdaptedImpl>(std::move(layer)) {}
  template <class... Arguments>
  requires(sizeof...(Arguments) > 0 && std::is_constructible_v<Layer, Arguments...> &&
           !(sizeof...(Arguments) == 1 && (std::is_same_v<std::remove_cvref_t<Arguments>, Layer> &&
                                           ...))) explicit AdaptedImpl(Arguments&&... arguments)
      : LayerSite<Layer, AdaptedImpl>(Layer(std::forward<Arguments>(arguments)...)) {}

  /// The adapted F(x).
  Tensor forward(const Tensor& x) { return this->chain(x); }
  /// The same for a model that also calls this layer on its relative positions (DeBERTa's shared
  /// projections): without the pieces that leave positions alone. Where rows have adapters of their own
  /// (`by_rows`), x has the positions once for each row.
  Tensor forward_positions(const Tensor& x) { return this->chain(x, /*positions=*/true); }
  /// True if `forward_positions` gives one position by the others too, so that x must hold all there are.
  bool mixes_positions() const {
    return this->uses(
        [](const PieceImpl& piece) { return piece.mixes_tokens() && piece.adapts_positions(); });
  }

  /// The layer and what its adapters add to it now, where that is nothing or one low-rank term.
  std::optional<internal::LowRankLinear> low_rank() const requires PlainLinearLayer<Layer> {
    if (RowAdapters::current()) return {};
    const auto tree = this->active_tree();
    if (tree && (!tree->children.empty() || tree->pieces.size() > 1)) return {};
    internal::LowRankLinear result{SiteTraits<Layer>::plain_linear(this->base), {}};
    if (!tree || tree->pieces.empty()) return result;
    result.term = tree->pieces.front()->low_rank();
    if (!result.term) return {};
    return result;
  }
};

/// Holder of `AdaptedImpl`.
template <class Layer>
class Adapted : public nn::ModuleHolder<AdaptedImpl<Layer>> {
 public:
  using nn::ModuleHolder<AdaptedImpl<Layer>>::ModuleHolder;
  using Impl = AdaptedImpl<Layer>;
};
template <class Layer>
Adapted(Layer) -> Adapted<Layer>;

using Linear = Adapted<nn::Linear>;
using Embedding = Adapted<nn::Embedding>;
using Conv1d = Adapted<nn::Conv1d>;
using Conv2d = Adapted<nn::Conv2d>;
using Conv3d = Adapted<nn::Conv3d>;
using LayerNorm = Adapted<nn::LayerNorm>;

}  // namespace peft
