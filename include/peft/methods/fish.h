// FISH: masks of the entries with the largest Fisher information.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "peft/kernels/is_finite.h"
#include "peft/methods/masks.h"

namespace peft {

/// Settings of `initialize_fish`.
struct FishOptions {
  /// The share of the layers' entries that trains: 0.0002, 0.002, 0.005 in the paper.
  explicit FishOptions(double ratio) : ratio_(ratio) {}
  /// In (0, 1].
  TORCH_ARG(double, ratio);
  /// The model's mode while its gradients are taken: the reference leaves dropout on.
  TORCH_ARG(bool, training) = true;
};

namespace internal {

/// Runs a layer on weights of its own, so that they get gradients and the frozen ones stay frozen.
class LeafImpl final : public PieceImpl {
 public:
  LeafImpl(SiteInfo site, Weights weights)
      : PieceImpl("leaf", std::move(site)), weights_{leaf(weights.weight), leaf(weights.bias)} {}

  Weights effective(const Weights&, const LayerView&) const override { return weights_; }
  void initialize(const LayerView&) override {}
  std::shared_ptr<PieceImpl> copy() const override { return std::make_shared<LeafImpl>(site(), weights_); }

  /// The gradients squared, of weight and bias one after the other; undefined where there are none. Clears
  /// them.
  Tensor take_squares() {
    std::vector<Tensor> squares;
    bool any = false;
    for (auto* tensor : {&weights_.weight, &weights_.bias}) {
      if (!tensor->defined()) continue;
      auto gradient = std::exchange(tensor->mutable_grad(), Tensor());
      any = any || gradient.defined();
      if (!gradient.defined()) gradient = torch::zeros_like(*tensor);
      if (gradient.is_sparse()) gradient = gradient.to_dense();
      const bool wide = gradient.scalar_type() == torch::kFloat64;
      squares.push_back(gradient.to(wide ? torch::kFloat64 : torch::kFloat32).square().reshape(-1));
    }
    return any ? torch::cat(squares) : Tensor();
  }

 private:
  static Tensor leaf(const Tensor& t) { return t.defined() ? t.detach().requires_grad_(true) : t; }
  Weights weights_;
};

/// F = Σ g² / n of the layers' weights and biases, with all adapters off.
inline std::vector<Tensor> fisher_information(nn::Module& model,
                                              const std::vector<Choosable<MaskedImpl>>& layers,
                                              const std::function<Tensor()>& next_loss, bool training) {
  torch::AutoGradMode with_gradients(true);
  std::vector<std::shared_ptr<LeafImpl>> leaves;
  std::vector<Tensor> sums(layers.size());
  int64_t examples = 0;
  bool any = false;
  {
    Probes probes(model, training);
    for (const auto& layer : layers) {
      const auto& site = layer.entry.site;
      leaves.push_back(std::make_shared<LeafImpl>(site->info(), site->base_weights()));
      probes.add(site, leaves.back());
    }
    for (auto loss = next_loss(); loss.defined(); loss = next_loss()) {
      TORCH_CHECK_VALUE(loss.numel() == 1 && internal::is_finite(loss),
                        "initialize_fish: a loss must be one finite number, but got ", loss.numel(),
                        loss.numel() == 1 ? " that is not" : " numbers");
      TORCH_CHECK(loss.requires_grad(), "initialize_fish: the loss must depend on the adapter's layers");
      loss.backward();
      ++examples;
      for (size_t i = 0; i < leaves.size(); ++i) {
        const auto squares = leaves[i]->take_squares();
        if (!squares.defined()) continue;
        any = true;
        sums[i] = sums[i].defined() ? sums[i].add_(squares) : squares;
      }
    }
  }
  TORCH_CHECK_VALUE(examples > 0, "initialize_fish: expected at least one example, but got none");
  TORCH_CHECK(any, "initialize_fish: no layer got a gradient");
  for (size_t i = 0; i < sums.size(); ++i) {
    const auto& site = layers[i].piece->site();
    if (!sums[i].defined()) {
      sums[i] = torch::zeros({elements(site.weight_shape) + elements(site.bias_shape)});
    }
    sums[i] = sums[i].cpu() / static_cast<double>(examples);
  }
  return sums;
}

}  // namespace internal

/// Lets an adapter of `MaskedOptions` train the entries with the largest Fisher information
/// F = Σ g² / n over n examples, g the gradient of an example's loss: int(ratio · all) entries, the largest
/// of all layers taken as one. `next_loss` returns the loss of the next example, one at a time (a batch's
/// mean would square the mean gradient), and an undefined tensor after the last; nothing is updated. All
/// adapters are off meanwhile. Before any optimizer is made.
/// Throws: c10::ValueError for a ratio out of range or less than an entry, no examples, a loss that is not
/// one finite number.
/// Paper: Training Neural Networks with Fixed Sparse Masks, arXiv 2111.09839, eq. 5.
///
/// Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::MaskedOptions(), peft::all().exclude({"classifier"}));
/// size_t next = 0;
/// peft::initialize_fish(*model, adapter, [&] {
///   return next < examples.size() ? model->forward(examples[next++]).loss : torch::Tensor();
/// }, peft::FishOptions(0.002));
/// ```
inline void initialize_fish(nn::Module& model, const Adapter& adapter,
                            const std::function<Tensor()>& next_loss, const FishOptions& options) {
  constexpr const char* title = "initialize_fish";
  const auto layers = internal::choosable_masks(adapter, title);
  const auto count = internal::share_of(options.ratio(), internal::count_entries(layers), title);
  const auto scores = internal::fisher_information(model, layers, next_loss, options.training());
  torch::NoGradGuard no_grad;
  internal::choose_entries(adapter, layers, internal::largest_entries(scores, count), title);
}

}  // namespace peft
