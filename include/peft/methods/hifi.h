// HiFi: trains the query, key and value rows of the attention heads that matter most for a task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/attention.h"
#include "peft/core/problems.h"
#include "peft/kernels/is_finite.h"
#include "peft/methods/head_importance.h"
#include "peft/methods/masks.h"
#include "peft/methods/rows.h"

namespace peft {

namespace internal {

/// Hands on what an attention's heads give.
class HeadProbeImpl final : public AttentionPieceImpl {
 public:
  using See = std::function<void(const Tensor&)>;
  HeadProbeImpl(SiteInfo site, See see)
      : AttentionPieceImpl("head_probe", std::move(site)), see_(std::move(see)) {}

  Tensor heads(const Tensor& outputs, const AttentionInputs&) override {
    see_(outputs);
    return outputs;
  }
  void initialize(const LayerView&) override {}
  std::shared_ptr<PieceImpl> copy() const override { return std::make_shared<HeadProbeImpl>(site(), see_); }

 private:
  See see_;
};

/// An attention and the adapter's projections into it.
struct HeadLayer {
  std::shared_ptr<AttentionImpl> attention;
  std::vector<Choosable<RowsImpl>> projections;
  Tensor outputs;  ///< of the batch that runs

  int64_t heads() const { return attention->options.heads(); }
  int64_t kv_heads() const { return attention->options.kv_heads(); }
  int64_t width() const { return attention->options.head_width(); }
  /// True for the outputs of queries, keys or values, or of all three stacked.
  bool fits(int64_t outputs_of_layer) const {
    const auto count = outputs_of_layer / width();
    return outputs_of_layer % width() == 0 &&
           (count == heads() || count == kv_heads() || count == heads() + 2 * kv_heads());
  }
  /// The outputs that belong to some heads, ascending.
  std::vector<int64_t> rows(int64_t outputs_of_layer, const std::vector<int64_t>& kept) const {
    const auto count = outputs_of_layer / width();
    std::vector<int64_t> blocks;
    for (const auto head : kept) {
      const auto shared = head / (heads() / kv_heads());
      if (count == heads() + 2 * kv_heads()) {
        blocks.insert(blocks.end(), {head, heads() + shared, heads() + kv_heads() + shared});
      } else {
        blocks.push_back(count == heads() ? head : shared);
      }
    }
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
    std::vector<int64_t> found;
    for (const auto block : blocks) {
      for (int64_t i = 0; i < width(); ++i) found.push_back(block * width() + i);
    }
    return found;
  }
};

/// The attentions of a model that the adapter's projections lie beside, in the model's order.
inline std::vector<HeadLayer> head_layers(nn::Module& model, const std::vector<Choosable<RowsImpl>>& pieces,
                                          Problems& problems) {
  std::vector<HeadLayer> layers;
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto attention = std::dynamic_pointer_cast<AttentionImpl>(module))
      layers.push_back({attention, {}, {}});
  }
  if (layers.empty()) problems.add("this model has no attention sites (hint: peft::Attention)");
  for (const auto& piece : pieces) {
    const auto& site = piece.piece->site();
    const auto beside = [&](const HeadLayer& layer) {
      return module_above(layer.attention->path()) == module_above(site.path);
    };
    const auto found = std::find_if(layers.begin(), layers.end(), beside);
    const auto outputs = site.weight_shape.at(site.fan_in_fan_out ? 1 : 0);
    if (found == layers.end()) {
      problems.add("'" + site.path + "' must be a projection beside an attention, but there is none");
    } else if (!found->fits(outputs)) {
      problems.add("'" + site.path + "' must have the outputs of " + std::to_string(found->heads()) +
                   " heads of width " + std::to_string(found->width()) +
                   " (or of its key and value heads, or of all three projections), but has " +
                   std::to_string(outputs));
    } else {
      found->projections.push_back(piece);
    }
  }
  std::erase_if(layers, [](const HeadLayer& layer) { return layer.projections.empty(); });
  return layers;
}

/// The k heads of the largest importance of each layer, or as many of all layers; of equals the first.
inline std::vector<std::vector<int64_t>> best_heads(const std::vector<HeadLayer>& layers, const Tensor& p,
                                                    const HifiOptions& options) {
  const auto* importance = p.data_ptr<double>();
  std::vector<std::vector<int64_t>> kept(layers.size());
  std::vector<std::pair<size_t, int64_t>> all;  // layer and head
  for (size_t i = 0; i < layers.size(); ++i) {
    for (int64_t head = 0; head < layers[i].heads(); ++head) all.emplace_back(i, head);
  }
  std::vector<size_t> order(all.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return importance[a] > importance[b]; });
  const auto most = static_cast<size_t>(options.heads());
  size_t total = 0;
  for (const auto index : order) {
    auto& heads = kept[all[index].first];
    if (options.per_layer() ? heads.size() == most : total == most * layers.size()) continue;
    heads.push_back(all[index].second);
    ++total;
  }
  for (auto& heads : kept) std::sort(heads.begin(), heads.end());
  return kept;
}

}  // namespace internal

/// Lets an adapter of `RowsOptions`, added to query, key and value projections (or one that stacks them),
/// train the rows of the most important heads; the output projection stays frozen. Of head h and text x,
/// O_h(x) = softmax(QKᵀ/√D)V: its information I_h is the number of leading singular values that hold the
/// share `energy` of their squares' sum, its correlation with another head |Pearson|, both means over the
/// texts; its importance is PageRank p ← d Mᵀ p + (1 − d) / N from p = I / ΣI, M the correlations with rows
/// of sum 1 (a head's with itself is 1), until ‖Δp‖₁ < 1e-6. Of grouped queries a kept head brings its key
/// and value head.
///
/// `next_batch` runs the model forward on the next texts and returns true, or false where there are no more;
/// it may set `used`, (batch, time), to which positions are a text's own. All adapters and dropout are off.
/// Before any optimizer is made. Count, of L layers, width w and k heads: L · k · 3 · (D · w + D).
/// Throws: c10::ValueError for options out of range, projections without an attention beside them or whose
/// heads do not divide, no texts, attentions over different numbers of positions.
/// Paper: HiFi: High-Information Attention Heads Hold for Parameter-Efficient Model Adaptation, arXiv
/// 2305.04573, whose authors have published no code.
inline HifiHeads initialize_hifi(nn::Module& model, const Adapter& adapter,
                                 const std::function<bool(Tensor& used)>& next_batch,
                                 const HifiOptions& options = HifiOptions()) {
  constexpr const char* title = "initialize_hifi";
  torch::NoGradGuard no_grad;
  internal::check_hifi(options);
  const auto pieces = internal::choosable<RowsImpl>(adapter, "RowsOptions", title);
  internal::Problems problems;
  auto layers = internal::head_layers(model, pieces, problems);
  for (const auto& layer : layers) {
    if (options.heads() <= layer.heads()) continue;
    problems.add("heads must be at most the " + std::to_string(layer.heads()) + " of '" +
                 layer.attention->path() + "', but got " + std::to_string(options.heads()));
  }
  problems.raise(title);

  internal::HeadStatistics statistics(options);
  {
    internal::Probes probes(model, /*training=*/false);
    for (auto& layer : layers) {
      probes.add(layer.attention,
                 std::make_shared<internal::HeadProbeImpl>(
                     layer.attention->info(), [&layer](const Tensor& O) { layer.outputs = O.detach(); }));
    }
    Tensor used;
    while (statistics.texts() < options.samples() && next_batch(used)) {
      std::vector<Tensor> all;
      const auto& first = layers.front().outputs;
      for (const auto& layer : layers) {
        const auto& O = layer.outputs;
        TORCH_CHECK_VALUE(O.defined() && O.size(2) == first.size(2) && O.size(3) == first.size(3), title,
                          ": a text must reach '", layers.front().attention->path(), "' and '",
                          layer.attention->path(), "' at as many positions, with heads as wide");
        all.push_back(layer.outputs.to(torch::kCPU, torch::kFloat64));
      }
      const auto O = torch::cat(all, 1);
      TORCH_CHECK(internal::is_finite(O), title, ": the heads' outputs must be finite");
      TORCH_CHECK_VALUE(
          !used.defined() || (used.dim() == 2 && used.size(0) == O.size(0) && used.size(1) == O.size(2)),
          title, ": the mask of used positions must be ",
          internal::shape_text(std::vector<int64_t>{O.size(0), O.size(2)}), ", but got ",
          internal::shape_text(used.sizes()));
      for (int64_t i = 0; i < O.size(0) && statistics.texts() < options.samples(); ++i) {
        const auto text = O.select(0, i);
        const auto own =
            used.defined() ? used.select(0, i).cpu().nonzero().view(-1) : torch::arange(O.size(2));
        TORCH_CHECK_VALUE(own.numel() > 0, title, ": a text must have positions of its own");
        statistics.add(text.index_select(1, own));
      }
      used = Tensor();
      for (auto& layer : layers) layer.outputs = Tensor();
    }
  }
  TORCH_CHECK_VALUE(statistics.texts() > 0, title, ": expected at least one text, but got none");

  auto found = statistics.result();
  found.kept = internal::best_heads(layers, found.importance, options);
  for (size_t i = 0; i < layers.size(); ++i) {
    found.attentions.push_back(layers[i].attention->path());
    for (const auto& projection : layers[i].projections) {
      const auto& site = projection.piece->site();
      const auto outputs = site.weight_shape.at(site.fan_in_fan_out ? 1 : 0);
      if (found.kept[i].empty()) {
        internal::remove_piece(adapter, projection.entry);
      } else {
        projection.piece->choose(layers[i].rows(outputs, found.kept[i]), *projection.entry.site->base_view());
      }
    }
  }
  return found;
}

}  // namespace peft
