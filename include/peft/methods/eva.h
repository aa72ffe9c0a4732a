// EVA: starts LoRA in the directions in which the inputs vary, with ranks distributed by variance.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/kernels/incremental_pca.h"
#include "peft/methods/lora_probes.h"

namespace peft {

/// Settings of `initialize_eva`. Defaults are Hugging Face's.
struct EvaOptions {
  /// How far ranks may be moved between layers, at least 1: a layer gets at most round(rho · rank).
  TORCH_ARG(double, rho) = 2.0;
  /// A direction has converged when its cosine with that of the batch before is at least this, in [0, 1].
  TORCH_ARG(double, tau) = 0.99;
  /// Divide each direction by the root of its singular value: once, where PEFT 0.21.2 divides those of layers
  /// that share an input as many times as there are such layers.
  TORCH_ARG(bool, whiten) = false;
  /// Where a layer's rank changes, change its α along, so that the scale stays.
  TORCH_ARG(bool, adjust_scaling_factors) = true;
};

namespace internal {

/// (rows, in) of what a linear layer was given; of some rows where `used` says which.
inline Tensor rows_of(const Tensor& x, const Tensor& used, const std::string& path) {
  const auto rows = x.detach().reshape({-1, x.size(-1)});
  if (!used.defined()) return rows;
  TORCH_CHECK_VALUE(used.numel() == rows.size(0), "initialize_eva: the mask of used positions has ",
                    used.numel(), " entries, but '", path, "' got ", rows.size(0), " rows");
  return rows.index_select(0, used.reshape(-1).to(rows.device()).nonzero().view(-1));
}

/// EVA's search: components of every layer's inputs, until as many have converged as the layer's rank asks.
class EvaSearch {
 public:
  /// What a layer was given, and its version then: later writes to it would be noticed.
  struct Input {
    Tensor x;
    int64_t version;
    explicit Input(const Tensor& given) : x(given.detach()), version(version_of(given)) {}
    bool unchanged() const { return version_of(x) == version; }
    static int64_t version_of(const Tensor& x) {
      return x.is_inference() ? 0 : static_cast<int64_t>(x._version());
    }
  };
  struct Layer {
    Waiting at;
    int64_t most = 0;           ///< components to look for
    int64_t rank = 0;           ///< as distributed so far
    std::vector<Input> inputs;  ///< of the batch that runs
    size_t owner = 0;           ///< the first layer with the same inputs, which may be this one
  };

  EvaSearch(std::vector<Waiting> waiting, const EvaOptions& options) : options_(options) {
    Problems problems;
    for (auto& one : waiting) {
      Layer layer;
      layer.most = std::llrint(static_cast<double>(one.lora->rank) * options.rho());
      layer.rank = layer.most;
      budget_ += one.lora->rank;
      const auto in = one.lora->site().fan_in[0];
      if (layer.most > in) {
        problems.add("'" + one.path() + "' has " + std::to_string(in) + " inputs, but rank · rho asks for " +
                     std::to_string(layer.most) + " directions");
      }
      layer.at = std::move(one);
      layers_.push_back(std::move(layer));
    }
    problems.raise("initialize_eva");
  }

  std::vector<Layer>& layers() { return layers_; }

  /// Takes in what the layers recorded of a batch. Returns true once all have converged.
  bool take(const Tensor& used) {
    if (order_.empty()) group();
    for (const auto index : order_) {
      auto& layer = layers_[index];
      if (layer.owner != index || converged(layer)) continue;
      auto& found = searches_[index];
      for (const auto& input : layer.inputs) {
        TORCH_CHECK(input.unchanged(), "initialize_eva: the model wrote to the input of '", layer.at.path(),
                    "' after the layer had run (hint: no operation in place there)");
        const auto rows = rows_of(input.x, used, layer.at.path()).to(torch::kCPU, torch::kFloat32);
        if (rows.size(0) < found.pca.count()) continue;  // too few, as the reference skips them
        const auto before = found.pca.components;
        found.pca.fit(rows);
        if (!before.defined()) continue;
        found.converged = at::cosine_similarity(found.pca.components, before) >= options_.tau();
      }
    }
    for (auto& layer : layers_) layer.inputs.clear();
    const bool all_begun = std::all_of(order_.begin(), order_.end(), [&](size_t index) {
      return searches_[layers_[index].owner].pca.components.defined();
    });
    if (all_begun) distribute();
    return std::all_of(layers_.begin(), layers_.end(),
                       [&](const Layer& layer) { return converged(layers_[layer.owner]); });
  }

  /// The rows of A a layer ends with.
  Tensor directions(const Layer& layer) const {
    const auto& pca = searches_[layer.owner].pca;
    const auto A = pca.components.narrow(0, 0, layer.rank);
    return options_.whiten() ? A / pca.singular_values.narrow(0, 0, layer.rank).sqrt().view({-1, 1}) : A;
  }

 private:
  struct Search {
    IncrementalPca pca;
    Tensor converged;  ///< (count) of bool
  };

  /// Layers that were given the same numbers share a search; it lies with the first of them.
  void group() {
    std::vector<size_t> followers;
    for (size_t i = 0; i < layers_.size(); ++i) {
      TORCH_CHECK(!layers_[i].inputs.empty(), "initialize_eva: the batch did not reach '",
                  layers_[i].at.path(), "'");
      layers_[i].owner = i;
      for (size_t j = 0; j < i; ++j) {
        if (layers_[j].owner != j || !same(layers_[i].inputs.front().x, layers_[j].inputs.front().x))
          continue;
        layers_[i].owner = j;
        break;
      }
      if (layers_[i].owner == i) order_.push_back(i);
    }
    for (const auto owner : std::vector<size_t>(order_)) {
      auto& most = layers_[owner].most;
      for (const auto& layer : layers_) most = layer.owner == owner ? std::max(most, layer.most) : most;
      for (size_t i = 0; i < layers_.size(); ++i) {
        if (layers_[i].owner != owner) continue;
        layers_[i].most = layers_[i].rank = most;
        if (i != owner) followers.push_back(i);
      }
    }
    order_.insert(order_.end(), followers.begin(), followers.end());  // the reference's order
    for (const auto& layer : layers_) {
      searches_.push_back({IncrementalPca(layer.most), torch::zeros({layer.most}, torch::kBool)});
    }
  }
  static bool same(const Tensor& a, const Tensor& b) {
    return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.device() == b.device() &&
           (a.data_ptr() == b.data_ptr() || torch::equal(a, b));
  }

  bool converged(const Layer& layer) const {
    return searches_[layer.owner].converged.narrow(0, 0, layer.rank).all().item<bool>();
  }

  /// Ranks go to the largest shares of variance of all layers together.
  void distribute() {
    std::vector<Tensor> shares;
    std::vector<size_t> whose;
    for (const auto index : order_) {
      shares.push_back(searches_[layers_[index].owner].pca.explained_ratio);
      whose.insert(whose.end(), static_cast<size_t>(layers_[index].most), index);
      layers_[index].rank = 0;
    }
    const auto best = at::argsort(torch::cat(shares), /*dim=*/-1, /*descending=*/true);
    for (int64_t i = 0; i < std::min(budget_, best.numel()); ++i) {
      ++layers_[whose[static_cast<size_t>(best[i].item<int64_t>())]].rank;
    }
    for (const auto index : order_) {
      auto& owner = layers_[layers_[index].owner];
      if (owner.rank < layers_[index].rank) std::swap(owner.rank, layers_[index].rank);
    }
  }

  EvaOptions options_;
  std::vector<Layer> layers_;
  std::vector<size_t> order_;  ///< owners, then the others
  std::vector<Search> searches_;
  int64_t budget_ = 0;
};

}  // namespace internal

/// Gives the LoRAs that were added with `LoraInit::eva` their start: A spans the directions in which each
/// layer's inputs vary most, and the adapter's whole rank is distributed anew over the layers, by the
/// variance explained. A layer that gets none loses its LoRA. Ranks and α that change are written to the
/// file's patterns.
///
/// `next_batch` runs the model forward on the next batch, beginning again after the last one; it is called
/// until every direction has converged, at least twice, with all adapters off, dropout off and no gradients.
/// It may set `used` to a bool tensor over batch and time: which positions count (labelled ones, say). A
/// return value of false says that there was no batch any more.
///
/// Throws: c10::ValueError for options out of range, a layer with fewer inputs than round(rho · rank), a mask
/// of another size; c10::Error where the batches ended too early or an optimizer exists already. Paper: One
/// Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170,
/// algorithm 1.
///
/// Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::LoraOptions(8).init(peft::LoraInit::eva), target);
/// size_t next = 0;
/// peft::initialize_eva(*model, adapter, [&](torch::Tensor& used) {
///   const auto& batch = batches[next++ % batches.size()];
///   used = batch.mask.to(torch::kBool);
///   model->forward(batch);
///   return true;
/// });
/// ```
inline void initialize_eva(nn::Module& model, const Adapter& adapter,
                           const std::function<bool(Tensor& used)>& next_batch,
                           const EvaOptions& options = {}) {
  torch::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(options.rho() >= 1 && std::isfinite(options.rho()),
                    "EvaOptions: rho must be at least 1, but got ", options.rho());
  TORCH_CHECK_VALUE(options.tau() >= 0 && options.tau() <= 1, "EvaOptions: tau must be in [0, 1], but got ",
                    options.tau());
  internal::EvaSearch search(internal::waiting_for(LoraInit::eva, adapter, "initialize_eva"), options);
  {
    internal::Probes probes(model, /*training=*/false);
    for (auto& layer : search.layers()) {
      probes.add(layer.at.entry.site, [&layer](const Tensor& x, const LayerView& view) {
        layer.inputs.emplace_back(x);
        return view.forward(x);
      });
    }
    Tensor used;
    do {
      used = Tensor();
      TORCH_CHECK(next_batch(used),
                  "initialize_eva: the batches ended before all directions converged (hint: begin with the "
                  "first batch again, or lower tau)");
    } while (!search.take(used));
  }
  for (const auto& layer : search.layers()) {
    auto& lora = *layer.at.lora;
    if (layer.rank == 0) {
      internal::remove_piece(adapter, layer.at.entry);
      continue;
    }
    if (layer.rank != lora.rank) {
      const auto share = static_cast<double>(layer.rank) / static_cast<double>(lora.rank);
      lora.resize(layer.rank, options.adjust_scaling_factors() ? lora.alpha * share : lora.alpha,
                  *layer.at.entry.site->base_view());
    }
    lora.start_from({search.directions(layer), torch::zeros_like(lora.lora_B)});
  }
}

}  // namespace peft
