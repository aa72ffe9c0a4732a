// Unified: adapters described in the four dimensions of the unified view, and the methods it places there.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "peft/methods/bottleneck.h"
#include "peft/methods/compacter.h"
#include "peft/methods/head_adapter.h"
#include "peft/methods/lora.h"
#include "peft/methods/prefix.h"
#include "peft/model/add_adapter.h"

namespace peft {

/// Which representation h of a model is modified.
enum class Modifies : std::uint8_t {
  attention,     ///< what attention gives, before the join
  feed_forward,  ///< what the feed-forward network gives, before the join
  sublayers,     ///< both
  heads,         ///< what each attention head gives
  layers,        ///< what the layers named by `Unified::layers` give
};

/// What Δh is computed from.
enum class Insertion : std::uint8_t {
  sequential,         ///< h itself
  sequential_normed,  ///< norm(h + skip): the join's sum; at joins
  parallel,           ///< what the sublayer, or the layer, reads; of heads the query
};

/// How h and Δh become one.
enum class Composed : std::uint8_t {
  scaled,           ///< h + s Δh, s = `Unified::scale`
  trained,          ///< h + s Δh, s trains from 1 on
  trained_channel,  ///< the same, a factor a channel; at joins and on layers
  gated,            ///< h + g Δh, g = the mean over the tokens of σ(G x + g₀); at joins and on layers
  convex,  ///< (1 − λ) h + λ Δh, λ the share of attention Δh's vectors get; of heads, with form "softmax"
};

/// An adapter described in four dimensions: Δh = f(x W_down) W_up (functional form), of which representation,
/// computed from what (insertion form), and how both become one (composition). Example, the scaled parallel
/// adapter with a gelu: `add_adapter(*model, peft::Unified(16).form("gelu").scale(4), "mine")`.
/// What it makes: at joins `Bottleneck`; on layers `Lora` for "linear", parallel and scaled or gated, else
/// `Bottleneck`; of heads `Prefix` for "softmax", parallel and convex, else `HeadAdapter`.
/// Paper: Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, §3.2 and
/// table 1.
struct Unified {
  /// `size` r: channels between W_down and W_up, the rank of LoRA, the length of a prefix.
  explicit Unified(int64_t size) : size_(size) {}
  TORCH_ARG(int64_t, size);
  /// f: one of `activation_functions` ("linear" is the identity); of heads also "softmax".
  TORCH_ARG(std::string, form) = "relu";
  TORCH_ARG(Modifies, modifies) = Modifies::feed_forward;
  TORCH_ARG(Insertion, insertion) = Insertion::parallel;
  TORCH_ARG(Composed, composition) = Composed::scaled;
  /// s of `Composed::scaled`.
  TORCH_ARG(double, scale) = 1.0;
  /// Of `Modifies::layers`: their names, as `named` takes them.
  TORCH_ARG(std::vector<std::string>, layers) = {};
  /// Where W_down and W_up start, at joins and on layers that take a `Bottleneck`.
  TORCH_ARG(BottleneckInit, init) = BottleneckInit::mam_adapter;
  /// W_down and W_up as sums of Kronecker products, at joins.
  TORCH_ARG(std::optional<PhmOptions>, phm) = {};
};

namespace internal {

inline void check(const Unified& unified) {
  const bool join = unified.modifies() != Modifies::heads && unified.modifies() != Modifies::layers;
  const bool heads = unified.modifies() == Modifies::heads;
  const auto composition = unified.composition();
  const auto refuse = [](bool wrong, const char* what) { TORCH_CHECK_VALUE(!wrong, "Unified: ", what); };
  TORCH_CHECK_VALUE(unified.size() > 0, "Unified: size must be positive, but got ", unified.size());
  refuse(unified.layers().empty() == (unified.modifies() == Modifies::layers),
         "layers must be named with Modifies::layers, and only there");
  refuse(unified.form() == "softmax" && !heads, "form softmax is for Modifies::heads");
  refuse(unified.insertion() == Insertion::sequential_normed && !join,
         "Insertion::sequential_normed needs a join: Modifies::attention, feed_forward or sublayers");
  refuse(composition == Composed::convex &&
             !(heads && unified.form() == "softmax" && unified.insertion() == Insertion::parallel),
         "Composed::convex needs Modifies::heads, form softmax and Insertion::parallel");
  refuse(heads && (composition == Composed::gated || composition == Composed::trained_channel),
         "Modifies::heads takes Composed::scaled, trained or convex");
  refuse(composition != Composed::scaled && unified.scale() != 1.0, "scale is for Composed::scaled");
  refuse(unified.phm() && !join, "phm is for Modifies::attention, feed_forward and sublayers");
}

inline BottleneckOptions bottleneck_of(const Unified& unified) {
  auto options = BottleneckOptions(unified.size())
                     .non_linearity(unified.form())
                     .parallel(unified.insertion() == Insertion::parallel)
                     .original_ln_before(unified.insertion() == Insertion::sequential_normed)
                     .scaling(unified.scale())
                     .gating(unified.composition() == Composed::gated)
                     .init_weights(unified.phm() ? BottleneckInit::bert : unified.init())
                     .phm(unified.phm());
  if (unified.composition() == Composed::trained) options.trained_scaling(TrainedScaling::scalar);
  if (unified.composition() == Composed::trained_channel) options.trained_scaling(TrainedScaling::channel);
  return options;
}

}  // namespace internal

/// The part a description stands for. Throws: c10::ValueError for a combination without a meaning.
inline Part on(const Unified& unified) {
  internal::check(unified);
  const auto size = unified.size();
  switch (unified.modifies()) {
    case Modifies::attention:
      return on(internal::bottleneck_of(unified).places({JoinRole::attention}));
    case Modifies::feed_forward:
      return on(internal::bottleneck_of(unified).places({JoinRole::feed_forward}));
    case Modifies::sublayers:
      return on(internal::bottleneck_of(unified));
    case Modifies::heads: {
      if (unified.composition() == Composed::convex) return on(PrefixOptions(size));
      const bool parallel = unified.insertion() == Insertion::parallel;
      return on(HeadAdapterOptions(size)
                    .form(unified.form())
                    .reads(parallel ? HeadInput::query : HeadInput::output)
                    .scaling(unified.scale())
                    .trained_scaling(unified.composition() == Composed::trained));
    }
    case Modifies::layers:
      break;
  }
  const bool gated = unified.composition() == Composed::gated;
  if (unified.form() == "linear" && unified.insertion() == Insertion::parallel &&
      (gated || unified.composition() == Composed::scaled)) {
    const auto alpha = unified.scale() * static_cast<double>(size);
    return on(LoraOptions(size).alpha(alpha).gating(gated), named(unified.layers()));
  }
  return on(internal::bottleneck_of(unified), named(unified.layers()));
}

/// Several descriptions as one adapter, each a part. Example: `add_adapter(*model,
/// peft::parts({peft::Unified(8), peft::Unified(8).modifies(peft::Modifies::heads)}), "mine")`.
inline std::vector<Part> parts(const std::vector<Unified>& unified) {
  std::vector<Part> result;
  for (const auto& one : unified) result.push_back(on(one));
  return result;
}

/// Adds an adapter of one description.
inline Adapter add_adapter(nn::Module& model, const Unified& unified, const std::string& name = "default") {
  return add_adapter(model, std::vector<Part>{on(unified)}, name);
}

/// The published methods in the four dimensions, each equal to its own form.
namespace unified {

/// `peft::houlsby()`.
inline Unified houlsby(int64_t size) {
  return Unified(size)
      .form("swish")
      .modifies(Modifies::sublayers)
      .insertion(Insertion::sequential)
      .init(BottleneckInit::bert);
}
/// `peft::pfeiffer()`.
inline Unified pfeiffer(int64_t size) {
  return Unified(size).insertion(Insertion::sequential_normed).init(BottleneckInit::bert);
}
/// `peft::parallel_adapter()`.
inline Unified parallel_adapter(int64_t size) { return Unified(size).scale(4); }
/// `peft::scaled_parallel_adapter()`.
inline Unified scaled_parallel_adapter(int64_t size) { return Unified(size).composition(Composed::trained); }
/// `peft::compacter()`.
inline Unified compacter(int64_t size) {
  return Unified(size)
      .form("gelu")
      .modifies(Modifies::sublayers)
      .insertion(Insertion::sequential)
      .phm(PhmOptions());
}
/// `peft::PrefixOptions(length)`.
inline Unified prefix(int64_t length) {
  return Unified(length).form("softmax").modifies(Modifies::heads).composition(Composed::convex);
}
/// The paper's multi-head parallel adapter: `peft::HeadAdapterOptions(size)`.
inline Unified multi_head_parallel_adapter(int64_t size) { return Unified(size).modifies(Modifies::heads); }
/// `peft::LoraOptions(rank).alpha(alpha)` on these layers.
inline Unified lora(int64_t rank, double alpha, std::vector<std::string> layers) {
  return Unified(rank)
      .form("linear")
      .modifies(Modifies::layers)
      .layers(std::move(layers))
      .scale(alpha / static_cast<double>(rank));
}

}  // namespace unified

/// MAM: a prefix on every attention and a scaled parallel adapter beside every feed-forward network.
/// `size`: channels of the adapter (512 in the paper; AdapterHub: half the width); 0: half the width.
/// Paper: arXiv 2110.04366, §4.6. Reference: AdapterHub's `MAMConfig`.
inline std::vector<Part> mam(int64_t prefix_length = 30, int64_t size = 0) {
  auto beside = parallel_adapter();
  if (size > 0) beside.size(size);
  return {on(PrefixOptions::adapterhub(prefix_length).hidden_width(800)), on(beside)};
}

/// UniPELT: LoRA on query and value, a prefix and a Pfeiffer adapter, each behind a gate that looks at the
/// input. `layers`: LoRA's.
/// Paper: UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, arXiv 2110.07577.
/// Reference: AdapterHub's `UniPELTConfig`.
inline std::vector<Part> unipelt(int64_t prefix_length = 10, int64_t rank = 8,
                                 Target layers = named({"query", "value"})) {
  return {on(PrefixOptions::adapterhub(prefix_length).gates(1)), on(pfeiffer().gating(true)),
          on(LoraOptions(rank).alpha(2).gating(true), std::move(layers))};
}

}  // namespace peft
