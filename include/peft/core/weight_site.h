// WeightSite: what sites with weights have in common: effective weights, merging.
#pragma once

#include <cmath>
#include <memory>
#include <numeric>
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

/// F + Σ wᵢ (Fᵢ − F), of several views on one layer F.
class AverageView final : public LayerView {
 public:
  AverageView(const LayerView& below, std::vector<const LayerView*> branches, std::vector<double> weights)
      : below_(below), branches_(std::move(branches)), weights_(std::move(weights)) {
    for (const auto weight : weights_) rest_ -= weight;
    if (std::abs(rest_) < 1e-12) return;
    branches_.push_back(&below_);
    weights_.push_back(rest_);
  }
  Tensor forward(const Tensor& x) const override {
    return sum([&](const LayerView& branch) { return branch.forward(x); });
  }
  Weights weights() const override {
    const auto plain = below_.weights().bias;
    const auto bias = [&plain](const LayerView& branch) {
      const auto own = branch.weights().bias;
      return own.defined() ? own : plain;
    };
    return {sum([](const LayerView& branch) { return branch.weights().weight; }),
            plain.defined() ? sum(bias) : Tensor()};
  }
  Tensor apply(const Tensor& x, const Weights& weights) const override { return base().apply(x, weights); }
  Tensor low_rank(const Tensor& x, const Tensor& A, const Tensor& B) const override {
    return base().low_rank(x, A, B);
  }
  Tensor fold(const Tensor& BA) const override { return base().fold(BA); }
  const LayerView& base() const override { return below_.base(); }

 private:
  template <class Of>
  Tensor sum(const Of& of) const {
    Tensor total;
    for (size_t i = 0; i < branches_.size(); ++i) {
      const auto term = of(*branches_[i]) * weights_[i];
      total = total.defined() ? total + term : term;
    }
    return total;
  }

  const LayerView& below_;
  std::vector<const LayerView*> branches_;
  std::vector<double> weights_;
  double rest_ = 1;
};

/// Views on ranges of tokens, of a layer that treats each token by itself.
class SplitView final : public LayerView {
 public:
  SplitView(const LayerView& below, std::vector<const LayerView*> parts, std::vector<int64_t> lengths,
            std::string path)
      : below_(below), parts_(std::move(parts)), lengths_(std::move(lengths)), path_(std::move(path)) {}
  Tensor forward(const Tensor& x) const override {
    check_split(lengths_, x, path_);
    std::vector<Tensor> outputs;
    int64_t start = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      outputs.push_back(parts_[i]->forward(x.narrow(1, start, lengths_[i])));
      start += lengths_[i];
    }
    return torch::cat(outputs, 1);
  }
  Weights weights() const override {
    TORCH_CHECK(false, "Split: '", path_, "' has no one weight for all tokens");
    return {};
  }
  Tensor apply(const Tensor& x, const Weights& weights) const override { return base().apply(x, weights); }
  Tensor low_rank(const Tensor& x, const Tensor& A, const Tensor& B) const override {
    return base().low_rank(x, A, B);
  }
  Tensor fold(const Tensor& BA) const override { return base().fold(BA); }
  const LayerView& base() const override { return below_.base(); }

  /// Throws where the lengths are not those of the tokens, in dimension 1.
  static void check_split(const std::vector<int64_t>& lengths, const Tensor& x, const std::string& path) {
    const auto total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    TORCH_CHECK_VALUE(x.dim() > 1 && total == x.size(1), "Split: lengths must be those of the text, ",
                      x.dim() > 1 ? x.size(1) : 0, " tokens, but got ", shape_text(lengths), " at '", path,
                      "'");
  }

 private:
  const LayerView& below_;
  std::vector<const LayerView*> parts_;
  std::vector<int64_t> lengths_;
  std::string path_;
};

/// The views of one forward.
class Views {
 public:
  explicit Views(std::string path) : path_(std::move(path)) {}

  /// `below` under these pieces.
  const LayerView& on(const LayerView& below, const PieceTree& tree) {
    using Block = Composition::Block;
    if (tree.empty()) return below;
    if (tree.block == Block::average || tree.block == Block::split) {
      std::vector<const LayerView*> parts;
      for (const auto& child : tree.children) parts.push_back(&on(below, child));
      if (tree.block == Block::split) {
        return keep(std::make_unique<SplitView>(below, std::move(parts), tree.lengths, path_));
      }
      return keep(std::make_unique<AverageView>(below, std::move(parts), tree.weights));
    }
    const auto* top = &below;
    for (auto* piece : tree.pieces) top = &keep(std::make_unique<PieceView>(*top, *piece));
    for (const auto& child : tree.children) top = &on(*top, child);
    return *top;
  }

 private:
  const LayerView& keep(std::unique_ptr<LayerView> view) { return *views_.emplace_back(std::move(view)); }
  std::string path_;
  std::vector<std::unique_ptr<LayerView>> views_;
};

/// A site that knows its base's weights: what pieces make of them, and merging.
class WeightSite : public SiteImpl {
 public:
  using SiteImpl::SiteImpl;

  Weights merged_weights(const Composition& adapters) const override {
    torch::NoGradGuard no_grad;
    return weights_under(resolve(adapters));
  }

  /// W′ and b′ under the active adapters, with gradients: for sites whose layer runs on them. Throws where
  /// rows of one batch use different adapters.
  Weights effective() const {
    if (const auto* rows = RowAdapters::current()) {
      check_not_merged("RowAdapters");
      const auto set = ForwardScope::active(activation());
      for (const auto& name : *rows) {
        TORCH_CHECK_VALUE(name == RowAdapters::base || set->knows(name),
                          "RowAdapters: ", no_adapter_text(name, set->known));
        TORCH_CHECK(pieces(name).empty(), "RowAdapters: '", path(),
                    "' runs on one weight for the whole batch, but adapter '", name, "' changes it");
      }
      return base_weights();
    }
    const auto tree = active_tree();
    return tree ? weights_under(*tree) : base_weights();
  }

  std::string refusal(const PieceTree& tree) const override {
    if (tree.empty()) return {};
    using Block = Composition::Block;
    const auto site = base_info();
    if (tree.holds(Block::fuse)) return "Fuse needs methods that work on a residual join";
    if (site.weights_only && (tree.by_rows() || tree.holds(Block::split))) {
      return "it runs on one weight for the whole batch and all tokens";
    }
    if (tree.holds(Block::split) && site.fan_in.size() != 1 && site.layer != "LayerNorm") {
      return "Split needs a layer that treats each token by itself";
    }
    return {};
  }

  Weights delta(const std::string& adapter) const override {
    check_not_merged("effective_delta");
    torch::NoGradGuard no_grad;
    const auto before = base_weights();
    const auto after = merged_weights(adapter);
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
      if (!parameter.defined() || !value.defined() || value.is_same(parameter)) return;
      // Others may hold the memory: the values can be a piece's own tensors.
      const bool shared = value.use_count() > 1 || value.storage().use_count() > 1 ||
                          value.storage().nbytes() > value.nbytes() || !value.is_contiguous();
      parameter.set_data(value.to(parameter.options(), /*non_blocking=*/false, /*copy=*/shared).contiguous());
    };
    put(now.weight, weights.weight);
    put(now.bias, weights.bias);
    merged_ = std::move(adapters);
    change();
  }

  void swap_out() override {
    TORCH_INTERNAL_ASSERT(is_merged() && kept_);
    const auto now = base_weights();
    if (now.weight.defined()) Tensor(now.weight).set_data(kept_->weight);
    if (now.bias.defined()) Tensor(now.bias).set_data(kept_->bias);
    kept_.reset();
    merged_.clear();
    change();
  }

  bool keeps_original() const override { return kept_.has_value(); }

  /// The weight as it was before a merge.
  Tensor original_weight() const { return kept_ ? kept_->weight : base_weights().weight; }
  /// Makes that of this site another's: the same memory, which here never trains.
  void share_original(const WeightSite& owner) {
    const auto weight = owner.original_weight().detach();
    if (kept_) {
      kept_->weight = weight;
      return;
    }
    Tensor own = base_weights().weight;
    own.set_data(weight);
    own.set_requires_grad(false);
  }

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
  Weights weights_under(const PieceTree& tree) const {
    const auto view = base_view();
    Views views(path());
    return views.on(*view, tree).weights();
  }

  /// Another handle on the same memory, unmoved by a later `set_data` on the parameter.
  static Tensor alias(const Tensor& parameter) { return parameter.defined() ? parameter.detach() : Tensor(); }

  std::optional<Weights> kept_;
};

}  // namespace peft::internal
