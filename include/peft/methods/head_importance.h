// Head importance: what HiFi measures of attention heads: information, correlation, PageRank.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <string>
#include <vector>

#include "peft/core/compat.h"

namespace peft {

/// Settings of `initialize_hifi`.
struct HifiOptions {
  /// `heads` kept of each layer; 3 of 12 in the paper.
  explicit HifiOptions(int64_t heads = 3) : heads_(heads) {}
  /// From 1 to the fewest heads a layer has.
  TORCH_ARG(int64_t, heads);
  /// False: as many in all, the best of the whole model, so that a layer may keep more or none.
  TORCH_ARG(bool, per_layer) = true;
  /// The share of a head's squared singular values that its information counts, in (0, 1].
  TORCH_ARG(double, energy) = 0.9;
  /// Of PageRank, in [0, 1).
  TORCH_ARG(double, damping) = 0.85;
  /// The number of texts looked at, at most.
  TORCH_ARG(int64_t, samples) = 300;
  /// Correlate heads by all their outputs, instead of by each position's mean over the head's width.
  TORCH_ARG(bool, whole_outputs) = false;
  /// Where a walk that starts anew starts: at heads by their information, instead of at any alike. PageRank
  /// forgets where the first walk began, so without it the information decides nothing.
  TORCH_ARG(bool, restart_by_information) = false;
};

/// What `initialize_hifi` found, head by head: those of the first attention, then of the next.
struct HifiHeads {
  Tensor information;                      ///< I, (all heads)
  Tensor correlation;                      ///< r, (all heads, all heads)
  Tensor importance;                       ///< p, (all heads), of sum 1
  std::vector<std::string> attentions;     ///< paths
  std::vector<std::vector<int64_t>> kept;  ///< of each attention
};

namespace internal {

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check_hifi(const HifiOptions& options) {
  TORCH_CHECK_VALUE(options.heads() >= 1, "HifiOptions: heads must be at least 1, but got ", options.heads());
  TORCH_CHECK_VALUE(options.energy() > 0 && options.energy() <= 1,
                    "HifiOptions: energy must be in (0, 1], but got ", options.energy());
  TORCH_CHECK_VALUE(options.damping() >= 0 && options.damping() < 1,
                    "HifiOptions: damping must be in [0, 1), but got ", options.damping());
  TORCH_CHECK_VALUE(options.samples() >= 1, "HifiOptions: samples must be at least 1, but got ",
                    options.samples());
}

/// Information and correlation of heads, text by text.
class HeadStatistics {
 public:
  explicit HeadStatistics(const HifiOptions& options) : options_(options) {}

  /// O of every head for one text. Shapes: (heads, time, width), float64.
  void add(const Tensor& O) {
    // The squared singular values, from the smaller of the two products.
    const bool wide = O.size(2) > O.size(1);
    const auto product = wide ? at::matmul(O, O.transpose(1, 2)) : at::matmul(O.transpose(1, 2), O);
    const auto squares = at::linalg_eigvalsh(product).flip(1).clamp_min(0);
    const auto sums = squares.cumsum(1);
    const auto needed = sums.select(1, -1) * options_.energy();
    const auto below = sums.narrow(1, 0, sums.size(1) - 1).lt(needed.unsqueeze(1)).sum(1);
    add_to(information_, below.to(torch::kFloat64) + 1);

    auto rows = options_.whole_outputs() ? O.flatten(1) : O.mean(2);
    rows = rows - rows.mean(1, /*keepdim=*/true);
    const auto norms = rows.norm(2, {1}, /*keepdim=*/true);
    rows = torch::where(norms > 0, rows / norms, torch::zeros_like(rows));  // a constant goes with nothing
    add_to(correlation_, at::mm(rows, rows.t()).abs());
    ++texts_;
  }

  int64_t texts() const { return texts_; }

  /// The means, and the heads' PageRank.
  HifiHeads result() const {
    HifiHeads found;
    const auto n = static_cast<double>(texts_);
    found.information = information_ / n;
    found.correlation = correlation_ / n;
    const auto heads = found.information.size(0);
    const auto start = found.information / found.information.sum();
    const auto even = torch::full_like(start, 1.0 / static_cast<double>(heads));
    const auto sums = found.correlation.sum(1, /*keepdim=*/true);
    const auto steps = torch::where(sums > 0, found.correlation / sums, even.expand({heads, heads}));
    const auto restart = (options_.restart_by_information() ? start : even) * (1 - options_.damping());
    auto p = start;
    for (double moved = 1; moved >= 1e-6;) {  // each step shrinks it by the damping at least
      const auto next = at::mv(steps.t(), p) * options_.damping() + restart;
      moved = (next - p).abs().sum().item<double>();
      p = next;
    }
    found.importance = p;
    return found;
  }

 private:
  static void add_to(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; }

  const HifiOptions& options_;
  Tensor information_, correlation_;
  int64_t texts_ = 0;
};

}  // namespace internal
}  // namespace peft
