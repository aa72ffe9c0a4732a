// Masks: which entries of its layers a Masked adapter trains, by chance, by magnitude or as one likes.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <torch/arg.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "peft/methods/masked.h"
#include "peft/methods/probes.h"

namespace peft {
namespace internal {

/// A piece whose entries are to be chosen, with the untouched layer's weights.
template <class Impl>
struct Choosable {
  Adapter::Entry entry;
  std::shared_ptr<Impl> piece;

  const std::string& path() const { return entry.site->path(); }
  /// Copies on the CPU, in float32 or wider.
  Weights base() const {
    const auto copy = [](const Tensor& t) {
      if (!t.defined()) return t;
      const bool wide = t.scalar_type() == torch::kFloat64;
      return t.detach().to(torch::kCPU, wide ? torch::kFloat64 : torch::kFloat32);
    };
    const auto weights = entry.site->base_weights();
    return {copy(weights.weight), copy(weights.bias)};
  }
};

/// The pieces of an adapter whose entries `title` is to choose. Throws where it has none, an optimizer, or a
/// merged site.
template <class Impl>
std::vector<Choosable<Impl>> choosable(const Adapter& adapter, const char* options, const char* title) {
  std::vector<Choosable<Impl>> found;
  for (const auto& entry : adapter.entries()) {
    if (auto piece = std::dynamic_pointer_cast<Impl>(entry.piece)) found.push_back({entry, std::move(piece)});
  }
  TORCH_CHECK_VALUE(!found.empty(), title, ": adapter '", adapter.name(),
                    "' has no layer that was added with ", options);
  TORCH_CHECK(!adapter.record().has_optimizer, title, ": adapter '", adapter.name(),
              "' already has an optimizer (hint: call ", title, " first)");
  for (const auto& one : found) {
    one.entry.site->check_not_merged(title);
  }
  return found;
}
inline std::vector<Choosable<MaskedImpl>> choosable_masks(const Adapter& adapter, const char* title) {
  return choosable<MaskedImpl>(adapter, "MaskedOptions", title);
}

/// The entries of the layers' weights and biases, trained or not.
inline int64_t count_entries(const std::vector<Choosable<MaskedImpl>>& layers) {
  int64_t all = 0;
  for (const auto& layer : layers) {
    const auto& site = layer.piece->site();
    all += elements(site.weight_shape) + elements(site.bias_shape);
  }
  return all;
}

/// Gives each layer its entries; one that gets none leaves the adapter.
inline void choose_entries(const Adapter& adapter, const std::vector<Choosable<MaskedImpl>>& layers,
                           const std::vector<Tensor>& entries, const char* title) {
  int64_t total = 0;
  for (const auto& chosen : entries) total += chosen.numel();
  TORCH_CHECK_VALUE(total > 0, title, ": expected at least one entry of the layers of adapter '",
                    adapter.name(), "' to train, but got none");
  for (size_t i = 0; i < layers.size(); ++i) {
    if (entries[i].numel() == 0) {
      remove_piece(adapter, layers[i].entry);
    } else {
      layers[i].piece->choose(entries[i], *layers[i].entry.site->base_view());
    }
  }
}

/// The `count` largest of several lists of scores taken as one, as indices into each, ascending.
inline std::vector<Tensor> largest_entries(const std::vector<Tensor>& scores, int64_t count) {
  const auto all = torch::cat(scores);
  auto kept = torch::zeros(all.sizes(), torch::kBool);
  kept.index_fill_(0, std::get<1>(all.topk(count)), true);
  std::vector<Tensor> entries;
  int64_t first = 0;
  for (const auto& score : scores) {
    entries.push_back(kept.narrow(0, first, score.numel()).nonzero().view(-1));
    first += score.numel();
  }
  return entries;
}

/// The integers below n that numpy's `random.randint(0, n, count)` draws after `random.seed(s)`, drawn here
/// from the global generator after `torch::manual_seed(s)`: both take words of the same Mersenne twister.
inline Tensor numpy_randint(int64_t n, int64_t count) {
  auto result = torch::zeros({count}, torch::kLong);
  const auto most = static_cast<uint64_t>(n - 1);
  if (most == 0) return result;
  auto mask = most;
  for (const int shift : {1, 2, 4, 8, 16, 32}) mask |= mask >> shift;
  auto generator = at::globalContext().defaultGenerator(torch::kCPU);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  auto& words = *generator.get<at::CPUGeneratorImpl>();
  auto* values = result.data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    uint64_t value = most + 1;
    while (value > most) value = (most >> 32 ? words.random64() : words.random()) & mask;
    values[i] = static_cast<int64_t>(value);
  }
  return result;
}

}  // namespace internal

/// Lets an adapter of `MaskedOptions` train the entries that `choose` says: of a layer's weight and bias, the
/// masks of the same shapes, bool (undefined: nothing). A layer without any leaves the adapter. Before any
/// optimizer is made. Throws: c10::ValueError where no entry is chosen or a mask does not fit.
///
/// Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::MaskedOptions(), peft::named({"query", "value"}));
/// peft::initialize_masks(adapter, [](const peft::SiteInfo&, const peft::Weights& base) {
///   return peft::Weights{base.weight > 0, {}};
/// });
/// ```
inline void initialize_masks(const Adapter& adapter,
                             const std::function<Weights(const SiteInfo&, const Weights&)>& choose) {
  torch::NoGradGuard no_grad;
  constexpr const char* title = "initialize_masks";
  const auto layers = internal::choosable_masks(adapter, title);
  std::vector<Tensor> entries;
  internal::Problems problems;
  for (const auto& layer : layers) {
    const auto base = layer.base();
    const auto masks = choose(layer.piece->site(), base);
    const auto flat = [&](const Tensor& mask, const Tensor& tensor, const char* name) {
      const auto n = tensor.defined() ? tensor.numel() : 0;
      const bool fits = tensor.defined() && mask.defined() && mask.sizes() == tensor.sizes() &&
                        mask.dtype() == torch::kBool;
      if (mask.defined() && !fits) {
        problems.add("'" + layer.path() + "': the " + name + "'s mask must be bool of shape " +
                     internal::shape_text(tensor.defined() ? tensor.sizes() : at::IntArrayRef()) +
                     ", but got " + c10::toString(mask.scalar_type()) + " of shape " +
                     internal::shape_text(mask.sizes()));
      }
      return fits ? mask.cpu().reshape(-1) : torch::zeros({n}, torch::kBool);
    };
    const auto of_weight = flat(masks.weight, base.weight, "weight");
    entries.push_back(torch::cat({of_weight, flat(masks.bias, base.bias, "bias")}).nonzero().view(-1));
  }
  problems.raise(title);
  internal::choose_entries(adapter, layers, entries, title);
}

/// BitFit's control: of each tensor of n entries, int(n · count / all) of them, drawn uniformly with
/// replacement, so a few less train. Draws the author's numbers: after `torch::manual_seed(s)` those of numpy
/// after `random.seed(s)`, for the layers' weights and biases in the model's order.
/// Throws: c10::ValueError for a count below 1, above the entries there are, or too small for any tensor.
/// Reference: `randomize_mask` of BitFit's code, with 100 000 for BERT-base, 280 000 for BERT-large.
inline void initialize_rand_uniform(const Adapter& adapter, int64_t count) {
  torch::NoGradGuard no_grad;
  constexpr const char* title = "initialize_rand_uniform";
  const auto layers = internal::choosable_masks(adapter, title);
  const auto all = internal::count_entries(layers);
  TORCH_CHECK_VALUE(count >= 1 && count <= all, title, ": count must be from 1 to the layers' ", all,
                    " entries, but got ", count);
  std::vector<Tensor> entries;
  for (const auto& layer : layers) {
    const auto& site = layer.piece->site();
    const auto draw = [&](int64_t n, int64_t offset) {
      const auto share = static_cast<double>(n) * static_cast<double>(count) / static_cast<double>(all);
      return internal::numpy_randint(n, n ? static_cast<int64_t>(share) : 0) + offset;
    };
    const auto weight = internal::elements(site.weight_shape);
    const auto of_weight = draw(weight, 0);
    const auto drawn = torch::cat({of_weight, draw(internal::elements(site.bias_shape), weight)});
    entries.push_back(std::get<0>(at::_unique(drawn, /*sorted=*/true)));
  }
  internal::choose_entries(adapter, layers, entries, title);
}

/// BitFit's structured control: of a norm the whole weight; of a matrix (a, b), drawn with probability ½ or
/// always where a < b, one column; else int(a / b) rows, drawn with replacement. No biases, no embeddings: of
/// layers that have nothing else the adapter takes its hands off. Of a convolution b is what one output sees.
inline void initialize_rand_row_col(const Adapter& adapter) {
  torch::NoGradGuard no_grad;
  constexpr const char* title = "initialize_rand_row_col";
  const auto layers = internal::choosable_masks(adapter, title);
  std::vector<Tensor> entries;
  for (const auto& layer : layers) {
    const auto& site = layer.piece->site();
    if (site.lookup) {
      entries.push_back(torch::empty({0}, torch::kLong));
    } else if (site.weight_shape.size() < 2) {
      entries.push_back(torch::arange(internal::elements(site.weight_shape)));
    } else {
      const auto a = site.weight_shape[0], b = internal::elements(site.weight_shape) / a;
      auto mask = torch::zeros({a, b}, torch::kBool);
      if (a < b || torch::rand({}).item<float>() < 0.5F) {
        mask.select(1, torch::randint(b, {}, torch::kLong).item<int64_t>()).fill_(true);
      } else {
        mask.index_fill_(0, torch::randint(a, {a / b}, torch::kLong), true);
      }
      entries.push_back(mask.view(-1).nonzero().view(-1));
    }
  }
  internal::choose_entries(adapter, layers, entries, title);
}

/// Settings of `initialize_magnitude`.
struct MagnitudeOptions {
  /// The share of the layers' weights that trains.
  explicit MagnitudeOptions(double ratio) : ratio_(ratio) {}
  /// In (0, 1].
  TORCH_ARG(double, ratio);
  /// The smallest instead of the largest.
  TORCH_ARG(bool, smallest) = false;
  /// That share of every layer instead of all of them taken as one.
  TORCH_ARG(bool, per_layer) = false;
};

namespace internal {

/// int(ratio · all), at least 1.
inline int64_t share_of(double ratio, int64_t all, const char* title) {
  TORCH_CHECK_VALUE(ratio > 0 && ratio <= 1, title, ": ratio must be in (0, 1], but got ", ratio);
  const auto count = static_cast<int64_t>(static_cast<double>(all) * ratio);
  TORCH_CHECK_VALUE(count > 0, title, ": ratio ", ratio, " of ", all, " entries must be at least one entry");
  return count;
}

}  // namespace internal

/// Lets an adapter of `MaskedOptions` train the entries of its layers' weights (not biases) that are largest
/// or smallest in magnitude: int(ratio · all) of them. Before any optimizer is made.
/// Throws: c10::ValueError for a ratio out of range or less than an entry.
inline void initialize_magnitude(const Adapter& adapter, const MagnitudeOptions& options) {
  torch::NoGradGuard no_grad;
  constexpr const char* title = "initialize_magnitude";
  const auto layers = internal::choosable_masks(adapter, title);
  std::vector<Tensor> scores, entries;
  int64_t all = 0;
  for (const auto& layer : layers) {
    const auto size = layer.base().weight.abs().reshape(-1);
    scores.push_back(options.smallest() ? -size : size);
    all += size.numel();
    if (!options.per_layer()) continue;
    const auto count = internal::share_of(options.ratio(), size.numel(), title);
    entries.push_back(internal::largest_entries({scores.back()}, count).front());
  }
  if (!options.per_layer()) {
    entries = internal::largest_entries(scores, internal::share_of(options.ratio(), all, title));
  }
  internal::choose_entries(adapter, layers, entries, title);
}

}  // namespace peft
