// WeightSite: what sites with weights have in common: effective weights, merging.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/core/site.h"

namespace peft::internal {

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

/// A site that knows its base's weights: what pieces make of them, and merging.
class WeightSite : public SiteImpl {
 public:
  using SiteImpl::SiteImpl;

  Weights merged_weights(const std::vector<std::string>& adapters) const override {
    torch::NoGradGuard no_grad;
    const auto view = base_view();
    const auto pieces = resolve(adapters);
    return with_pieces(*view, pieces.data(), pieces.data() + pieces.size(),
                       [](const LayerView& top) { return top.weights(); });
  }

  /// W′ and b′ under the active adapters, with gradients: for sites whose layer runs on them. Throws where
  /// rows of one batch use different adapters.
  Weights effective() const {
    if (const auto* rows = RowAdapters::current()) {
      const auto set = ForwardScope::active(activation());
      for (const auto& name : *rows) {
        TORCH_CHECK_VALUE(name == RowAdapters::base || set->knows(name), "RowAdapters: no adapter '", name,
                          "' in this model; it has ", closest(name, set->known));
        TORCH_CHECK(pieces(name).empty(), "RowAdapters: '", path(),
                    "' runs on one weight for the whole batch, but adapter '", name, "' changes it");
      }
      return base_weights();
    }
    const auto set = active_set();
    if (!set) return base_weights();
    const auto view = base_view();
    const auto pieces = resolve(set->active);
    return with_pieces(*view, pieces.data(), pieces.data() + pieces.size(),
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

 protected:
  /// Copies adapters and the state of a merge.
  void copy_weight_site(const WeightSite& other) {
    copy_adapters_from(other);
    if (!other.kept_) return;
    const auto own = [](const Tensor& t) { return t.defined() ? t.clone() : Tensor(); };
    kept_ = Weights{own(other.kept_->weight), own(other.kept_->bias)};
  }

  template <class Move>
  void move_kept(const Move& move) {
    if (!kept_) return;
    if (kept_->weight.defined()) move(kept_->weight);
    if (kept_->bias.defined()) move(kept_->bias);
  }

 private:
  /// Another handle on the same memory, unmoved by a later `set_data` on the parameter.
  static Tensor alias(const Tensor& parameter) { return parameter.defined() ? parameter.detach() : Tensor(); }

  std::optional<Weights> kept_;
};

}  // namespace peft::internal
