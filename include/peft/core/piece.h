// Piece: one method's tensors on one site, and what it does to the layer below it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/shared.h"
#include "peft/core/site_traits.h"
#include "peft/kernels/low_rank_linear.h"

namespace peft {

/// A layer as the pieces under this one left it. `base()` is the untouched layer.
class LayerView {
 public:
  virtual ~LayerView() = default;
  /// F(x).
  virtual Tensor forward(const Tensor& x) const = 0;
  /// The effective weights; throws where a piece below works on activations.
  virtual Weights weights() const = 0;
  /// F(x) with other weights.
  virtual Tensor apply(const Tensor& x, const Weights& weights) const = 0;
  /// x (BA)ᵀ in the cheap order, for the layer's kind: A (rank, *fan_in), B (fan_out, rank / groups, *ones).
  virtual Tensor low_rank(const Tensor& x, const Tensor& A, const Tensor& B) const = 0;
  /// (fan_out, prod(fan_in)) → the layout the layer stores its weight in.
  virtual Tensor fold(const Tensor& BA) const = 0;
  /// The layer, where it is a linear one with nothing over it.
  virtual std::optional<PlainLinear> plain_linear() const { return {}; }
  virtual const LayerView& base() const = 0;
};

/// One method's tensors on one site. Registered parameters are what trains now or later; frozen method state
/// is registered as buffers. The constructor allocates and never draws; `initialize` draws.
class PieceImpl : public nn::Module {
 public:
  PieceImpl(std::string method, SiteInfo site)
      : nn::Module(method), method_(std::move(method)), site_(std::move(site)) {}

  /// The method's name, which is also the name of this child in the module tree: "lora", "bias", …
  const std::string& method() const { return method_; }
  const SiteInfo& site() const { return site_; }
  void set_site(SiteInfo site) { site_ = std::move(site); }

  /// The adapted F(x); by default F with the effective weights.
  virtual Tensor forward(const Tensor& x, const LayerView& layer) {
    return layer.apply(x, effective(layer.weights(), layer));
  }

  /// What `forward` adds to a linear layer, where it is one low-rank term and nothing else. Layers that share
  /// an input are then run together (`peft::project`).
  virtual std::optional<LowRankTerm> low_rank() const { return {}; }

  /// W′ from the weights that reach this piece.
  virtual Weights effective(const Weights& weights, const LayerView& layer) const = 0;

  /// Why `effective` cannot be had, or an empty string.
  virtual std::string not_mergeable() const { return {}; }
  /// True for a method that has no W′ by its nature: no weight method may come after it.
  virtual bool works_on_activations() const { return false; }

  /// The reference's random draws, and all that is read from the base. Runs once, on a piece in float32 on
  /// the CPU.
  virtual void initialize(const LayerView& base) = 0;

  /// When it draws: all of a lower turn come first, within a turn what pieces share and then the pieces in
  /// the model's order. For methods whose reference does not follow that order.
  virtual int turn() const { return 0; }

  /// Moves the piece to its site's device and floating type. Half types are widened to float32 after
  /// rounding, as Hugging Face's `autocast_adapter_dtype` does: values rounded to the base's type, kept in
  /// float32.
  virtual void place() { internal::place_like(*this, site_); }

  /// False for a piece that an adapter has for use in a block of a composition only (`Fuse`).
  virtual bool stands_alone() const { return true; }

  /// True for a piece that carries its own copy of base tensors (`Bias`, `Replace`): it lies under the
  /// others.
  virtual bool substitutes() const { return false; }

  /// False for a piece that leaves the layer as it is where a model calls it on relative positions
  /// (`AdaptedImpl::forward_positions`).
  virtual bool adapts_positions() const { return true; }

  /// True for a piece whose output for one token depends on the others of its text: a gate.
  virtual bool mixes_tokens() const { return false; }

  /// True for a piece that acts on a tied matrix in all its uses: on a model's words and on its head
  /// (`SiteImpl::tie_to`). It then meets both layers.
  virtual bool follows_ties() const { return false; }

  /// Why this piece and another adapter's on the same site cannot be active together, or an empty string.
  virtual std::string conflict(const PieceImpl&) const { return {}; }

  /// Tells a piece that an adapter of the model has another name now.
  virtual void follow_rename(const std::string& /*from*/, const std::string& /*to*/) {}

  /// True for a piece that trains only together with a controller.
  virtual bool needs_controller() const { return false; }
  /// Takes the parameters' present values for its own, so that the next forward in training can tell whether
  /// something else changed them; of a piece that needs a controller.
  virtual void mark() const {}

  /// True where the method's contribution has a strength.
  virtual bool scalable() const { return false; }
  /// Multiplies the piece's contribution by `factor` (1 is as trained).
  virtual void set_scale(double factor) {
    TORCH_CHECK_VALUE(factor == 1.0, method_, ": this method has no strength to scale, but got factor ",
                      factor);
  }

  /// Of a method whose pieces share tensors: the part for these pieces of one adapter, in the model's order,
  /// this one first. Leaves the global generator alone.
  virtual std::shared_ptr<SharedImpl> make_shared_part(const std::vector<std::shared_ptr<PieceImpl>>&) const {
    return nullptr;
  }
  /// Gives the piece the shared part of its adapter.
  void tie(std::shared_ptr<SharedImpl> shared) { shared_ = std::move(shared); }
  /// The shared part; nullptr for a method without one, and in a copy that nothing has tied yet.
  const std::shared_ptr<SharedImpl>& shared() const { return shared_; }

  /// How many weights train that the method uses: without those that only wait to join it (IncreLoRA's
  /// reserves).
  virtual int64_t trainable() const { return internal::trainable(*this); }

  /// How many base values a piece makes different once merged.
  struct Changed {
    int64_t weight = 0, bias = 0;
  };
  /// By default the whole weight.
  virtual Changed changed() const {
    int64_t count = 1;
    for (const auto size : site_.weight_shape) count *= size;
    return {site_.weight_shape.empty() ? 0 : count, 0};
  }

  /// A copy with its own tensors and the same `requires_grad`, nothing drawn.
  virtual std::shared_ptr<PieceImpl> copy() const = 0;

  std::shared_ptr<nn::Module> clone(const internal::OptionalDevice& device) const override {
    auto result = copy();
    if (device) result->to(*device);
    return result;
  }

 protected:
  /// F(x) and `low_rank` in one node of the graph; nothing where the layer or its kernel does not allow it.
  std::optional<Tensor> fused_forward(const Tensor& x, const LayerView& layer) const {
    if (!FastPaths::enabled()) return {};
    auto linear = layer.plain_linear();
    if (!linear) return {};
    auto term = low_rank();
    if (!term) return {};
    auto outputs = internal::low_rank_linear(x, {{std::move(*linear), std::move(term)}});
    if (!outputs) return {};
    return std::move(outputs->front());
  }

 private:
  std::string method_;
  SiteInfo site_;
  std::shared_ptr<SharedImpl> shared_;
};

/// A piece that works on activations: it has no W′, so nothing merges. What its site calls depends on the
/// kind of site: `ResidualPieceImpl`, `AttentionPieceImpl`, `InputPieceImpl`; on a layer it is `forward(x,
/// layer)`.
class ActivationPieceImpl : public PieceImpl {
 public:
  using PieceImpl::PieceImpl;

  Tensor forward(const Tensor&, const LayerView&) override {
    TORCH_CHECK(false, method(), " does not adapt a layer's function, so not '", site().path, "'");
    return {};
  }
  Weights effective(const Weights&, const LayerView&) const override {
    TORCH_CHECK(false, not_mergeable());
    return {};
  }
  std::string not_mergeable() const override {
    return method() + " works on activations and cannot be merged";
  }
  bool works_on_activations() const override { return true; }
  Changed changed() const override { return {}; }
};

/// Gives a method's piece its options and its copy. `Derived` must be constructible from (Options, SiteInfo).
/// `Base`: what its sites call (`ResidualPieceImpl`, …), for a method that works on activations.
template <class Derived, class Options, class Base = PieceImpl>
class Piece : public Base {
 public:
  Piece(std::string method, Options settings, SiteInfo site)
      : Base(std::move(method), std::move(site)), options(std::move(settings)) {}

  std::shared_ptr<PieceImpl> copy() const override {
    torch::NoGradGuard no_grad;
    auto result = std::make_shared<Derived>(options, this->site());
    result->copy_state(static_cast<const Derived&>(*this));
    internal::copy_tensors(*this, *result);
    result->train(this->is_training());
    return result;
  }

  /// Copies what is neither a tensor's values nor an option; a method with such state hides it. Runs before
  /// the values are copied, so that a piece that has grown can grow its copy.
  void copy_state(const Derived&) {}

  Options options;
};

}  // namespace peft
