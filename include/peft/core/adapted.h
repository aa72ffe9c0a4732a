// Adapted: a frozen layer that carries adapters; a drop-in for the layer where it carries none.
#pragma once

#include <ATen/Context.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/core/site.h"

namespace peft {
namespace internal {

/// The untouched layer, remembering the type its last output had.
template <class Layer>
class BaseView final : public LayerView {
 public:
  explicit BaseView(const Layer& layer) : layer_(layer) {}

  Tensor forward(const Tensor& x) const override {
    if constexpr (WeightLayer<Layer>) {
      return apply(x, weights());
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
  Tensor apply(const Tensor& x, const Weights& weights) const override {
    if constexpr (WeightLayer<Layer>) {
      return noted(SiteTraits<Layer>::apply(layer_, x, weights));
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
  const LayerView& base() const override { return *this; }

  /// The type of the base's last output, which is the type the site returns.
  std::optional<torch::ScalarType> output_type() const { return output_type_; }

 private:
  Tensor noted(Tensor y) const {
    output_type_ = y.scalar_type();
    return y;
  }
  const Layer& layer_;
  mutable std::optional<torch::ScalarType> output_type_;
};

/// A layer with one more piece on top.
class PieceView final : public LayerView {
 public:
  PieceView(const LayerView& below, PieceImpl& piece) : below_(below), piece_(piece) {}
  Tensor forward(const Tensor& x) const override { return piece_.forward(x, below_); }
  Weights weights() const override { return piece_.effective(below_.weights(), below_); }
  Tensor apply(const Tensor& x, const Weights& weights) const override { return base().apply(x, weights); }
  Tensor low_rank(const Tensor& x, const Tensor& A, const Tensor& B) const override {
    return base().low_rank(x, A, B);
  }
  Tensor fold(const Tensor& BA) const override { return base().fold(BA); }
  const LayerView& base() const override { return below_.base(); }

 private:
  const LayerView& below_;
  PieceImpl& piece_;
};

/// Calls `use` with the view on top of these pieces; the views live on the stack.
template <class Use>
auto with_pieces(const LayerView& view, PieceImpl* const* begin, PieceImpl* const* end, const Use& use) {
  if (begin == end) return use(view);
  const PieceView next(view, **begin);
  return with_pieces(next, begin + 1, end, use);
}

}  // namespace internal

/// What the weighted sites have in common: the base's tensors are registered as the site's own, so that
/// checkpoints, `parameters()` and `save` see the plain layer; forwards, merges and clones run over the
/// active pieces.
template <class Layer, class Derived>
class LayerSite : public SiteImpl {
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

  Weights merged_weights(const std::vector<std::string>& adapters) const override {
    torch::NoGradGuard no_grad;
    const internal::BaseView<Layer> view(base);
    const auto pieces = resolve(adapters);
    return internal::with_pieces(view, pieces.data(), pieces.data() + pieces.size(),
                                 [](const LayerView& top) { return top.weights(); });
  }

  Weights delta(const std::string& adapter) const override {
    torch::NoGradGuard no_grad;
    const auto before = base_weights();
    const auto after = merged_weights({adapter});
    Weights difference;
    if (after.weight.defined()) difference.weight = after.weight - before.weight;
    if (after.bias.defined())
      difference.bias = before.bias.defined() ? after.bias - before.bias : after.bias.clone();
    return difference;
  }

  void swap_in(const Weights& weights, std::vector<std::string> adapters, bool keep) override {
    torch::NoGradGuard no_grad;
    const auto now = base_weights();
    TORCH_CHECK(
        now.bias.defined() || !weights.bias.defined(), "merge: '", path(),
        "' has no bias to take the adapter's (hint: LoraOptions::lora_bias needs a base bias to merge)");
    if (keep) kept_ = Weights{alias(now.weight), alias(now.bias)};
    const auto put = [](Tensor parameter, const Tensor& value) {
      if (!parameter.defined() || value.is_same(parameter)) return;
      // A copy: the values may be a piece's own tensors.
      parameter.set_data(value.to(parameter.options(), /*non_blocking=*/false, /*copy=*/true).contiguous());
    };
    put(now.weight, weights.weight);
    put(now.bias, weights.bias);
    merged_ = std::move(adapters);
  }

  void swap_out() override {
    TORCH_INTERNAL_ASSERT(is_merged() && kept_);
    const auto now = base_weights();
    if (now.weight.defined()) Tensor(now.weight).set_data(kept_->weight);
    if (now.bias.defined()) Tensor(now.bias).set_data(kept_->bias);
    kept_.reset();
    merged_.clear();
  }

  bool keeps_original() const override { return kept_.has_value(); }

  torch::OrderedDict<std::string, Tensor> base_parameters() const override {
    return base->named_parameters();
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
    // A layer's clone() draws its weights before it copies them; the generator must not notice.
    auto generator = at::globalContext().defaultGenerator(torch::kCPU);
    const auto drawn = generator.get_state();
    Layer layer(std::dynamic_pointer_cast<typename Layer::ContainedType>(base->clone()));
    generator.set_state(drawn);
    const auto from = base->named_parameters();
    auto into = layer->named_parameters();
    for (const auto& item : from) into[item.key()].set_requires_grad(item.value().requires_grad());
    auto result = std::make_shared<Derived>(layer);
    result->copy_adapters_from(*this);
    if (kept_) {
      const auto own = [](const Tensor& t) { return t.defined() ? t.clone() : Tensor(); };
      result->kept_ = Weights{own(kept_->weight), own(kept_->bias)};
    }
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
  Tensor chain(const Tensor& x) {
    const auto* rows = RowAdapters::current();
    TORCH_CHECK(!rows || !is_merged(), "RowAdapters: '", path(), "' is merged (hint: unmerge first)");
    const internal::BaseView<Layer> view(base);
    if (rows) return mixed(x, *rows, *ForwardScope::active(activation()), view);
    const auto set = active_set();
    return set ? compose(x, set->active, view) : view.forward(x);
  }

 private:
  Tensor compose(const Tensor& x, const std::vector<std::string>& names,
                 const internal::BaseView<Layer>& view) const {
    const auto pieces = resolve(names);
    auto y = internal::with_pieces(view, pieces.data(), pieces.data() + pieces.size(),
                                   [&](const LayerView& top) { return top.forward(x); });
    const auto type = view.output_type();
    return type && *type != y.scalar_type() ? y.to(*type) : y;
  }

  /// Rows that share an adapter run together and are put back in their places.
  Tensor mixed(const Tensor& x, const std::vector<std::string>& rows, const ActiveSet& set,
               const internal::BaseView<Layer>& view) const {
    TORCH_CHECK(!is_training(), "RowAdapters: mixed batches are for inference, but '", path(),
                "' is in training mode");
    std::map<std::string, std::vector<int64_t>> groups;
    bool touched = false;
    for (size_t i = 0; i < rows.size(); ++i) {
      TORCH_CHECK_VALUE(rows[i] == RowAdapters::base || set.knows(rows[i]), "RowAdapters: no adapter '",
                        rows[i], "' in this model; it has ", internal::closest(rows[i], set.known));
      groups[rows[i]].push_back(static_cast<int64_t>(i));
      touched = touched || !pieces(rows[i]).empty();
    }
    if (!touched || !set.enabled) return view.forward(x);
    TORCH_CHECK_VALUE(x.size(0) == static_cast<int64_t>(rows.size()), "RowAdapters: '", path(), "' expected ",
                      rows.size(), " rows, one a name, but got ", x.size(0));
    Tensor result;
    for (const auto& [name, members] : groups) {
      const auto index = torch::tensor(members, torch::TensorOptions(torch::kLong).device(x.device()));
      const auto y = compose(x.index_select(0, index), {name}, view);
      if (!result.defined()) {
        auto shape = y.sizes().vec();
        shape[0] = x.size(0);
        result = torch::zeros(shape, y.options());
      }
      result = result.index_copy(0, index, y);
    }
    return result;
  }

  void register_base() {
    for (const auto& item : base->named_parameters(/*recurse=*/false)) {
      register_parameter(item.key(), item.value(), item.value().requires_grad());
    }
    for (const auto& item : base->named_buffers(/*recurse=*/false)) register_buffer(item.key(), item.value());
    for (const auto& child : base->named_children()) register_module(child.key(), child.value());
  }

  template <class Move>
  void move_kept(const Move& move) {
    if (!kept_) return;
    if (kept_->weight.defined()) move(kept_->weight);
    if (kept_->bias.defined()) move(kept_->bias);
  }

  /// Another handle on the same memory, unmoved by a later `set_data` on the parameter.
  static Tensor alias(const Tensor& parameter) { return parameter.defined() ? parameter.detach() : Tensor(); }

  void clone_(nn::Module& other, const internal::OptionalDevice& device) final {
    auto copy = std::dynamic_pointer_cast<Derived>(other.clone(device));
    TORCH_CHECK(copy != nullptr, "clone: '", path(), "' was registered as another kind of site");
    static_cast<Derived&>(*this) = *copy;
  }

  std::optional<Weights> kept_;
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

/// The join after a sublayer: norm(output + skip). It is the LayerNorm site at its path.
/// Shapes: output, skip: (*, normalized_shape), output after dropout.
class ResidualImpl : public LayerSite<nn::LayerNorm, ResidualImpl> {
 public:
  explicit ResidualImpl(nn::LayerNorm norm) : LayerSite<nn::LayerNorm, ResidualImpl>(std::move(norm)) {}
  explicit ResidualImpl(const nn::LayerNormOptions& options)
      : LayerSite<nn::LayerNorm, ResidualImpl>(nn::LayerNorm(options)) {}

  SiteInfo base_info() const override {
    auto info = LayerSite<nn::LayerNorm, ResidualImpl>::base_info();
    info.offers.push_back(Needs::residual);
    return info;
  }

  Tensor forward(const Tensor& output, const Tensor& skip) { return chain(output + skip); }
};

/// Holder of `ResidualImpl`.
class Residual : public nn::ModuleHolder<ResidualImpl> {
 public:
  using nn::ModuleHolder<ResidualImpl>::ModuleHolder;
  using Impl = ResidualImpl;
};

}  // namespace peft
