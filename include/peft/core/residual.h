// Residual: the sites at the join after a sublayer, norm(output + skip).
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/activation_site.h"
#include "peft/core/adapted.h"

namespace peft {

/// The norm of a join as the weight methods on it left it.
class JoinNorm {
 public:
  virtual ~JoinNorm() = default;
  /// norm(x) where the model has one at its join, else x.
  virtual Tensor forward(const Tensor& x) const = 0;
};

/// A piece on a residual join: `enter`, `run`, and of the last piece `join`. `output`: what the sublayer
/// gave, after dropout and the pieces below; `skip`: the sublayer's input. Shapes: (batch, time, width).
class ResidualPieceImpl : public ActivationPieceImpl {
 public:
  using ActivationPieceImpl::ActivationPieceImpl;

  /// On a join it leaves the norm's weights to others.
  bool works_on_activations() const override { return !site().offers_to(Needs::residual); }

  /// What a block reads, and what its result is added to.
  struct Entry {
    Tensor hidden, residual;
  };
  /// What a block gives, and what it made before dropout, gate and residual: an AdapterFusion's values.
  struct Result {
    Tensor output, made;
  };
  /// The step before the block; by default the block reads the output and is added to it.
  virtual Entry enter(const Tensor& output, const Tensor& /*skip*/, const JoinNorm&) {
    return {output, output};
  }
  /// The block.
  virtual Result run(const Entry&) = 0;
  /// Its output alone, where nobody wants what it made: a method may have a cheaper way.
  virtual Tensor output(const Entry& entry) { return run(entry).output; }
  /// The join of the last piece; by default norm(output + skip).
  virtual Tensor join(const Tensor& output, const Tensor& skip, const JoinNorm& norm) {
    return norm.forward(output + skip);
  }
  /// True for a block that reads the skip, and adds what it makes of it to the output.
  virtual bool reads_skip() const { return false; }
};

/// A piece that weighs what several made on a residual join, for `Fuse`. It does nothing on its own.
class FusionPieceImpl : public ActivationPieceImpl {
 public:
  using ActivationPieceImpl::ActivationPieceImpl;

  bool works_on_activations() const override { return false; }
  bool stands_alone() const override { return false; }

  /// `made`: of each piece, (batch, time, width) as all of them.
  virtual Tensor fuse(const Tensor& query, const std::vector<Tensor>& made, const Tensor& residual) = 0;
  /// Whether the query is what the sublayer gave, or what the pieces read.
  virtual bool query_before_norm() const = 0;
};

namespace internal {

/// Why a tree of pieces on a join cannot run, or an empty string.
inline std::string join_refusal(const PieceTree& tree) {
  using Block = Composition::Block;
  const auto is_norm = [](const PieceImpl* piece) { return !dynamic_cast<const ResidualPieceImpl*>(piece); };
  const auto is_join = [&](const PieceImpl* piece) { return !is_norm(piece); };
  const auto title = std::string(Composition::title(tree.block));
  const bool joins = !tree.without(is_norm).empty(), norms = !tree.without(is_join).empty();
  if (tree.block == Block::average || tree.block == Block::split || tree.block == Block::fuse) {
    if (norms && (joins || tree.block != Block::average)) {
      return title + " is not defined for methods that change the norm";
    }
    const bool everywhere = std::all_of(tree.children.begin(), tree.children.end(),
                                        [](const PieceTree& child) { return !child.empty(); });
    if (tree.block != Block::fuse && joins && !everywhere) {
      return title + " needs a piece of each of its adapters here, or of none";
    }
    if (tree.block == Block::fuse && joins && !dynamic_cast<FusionPieceImpl*>(tree.fusion)) {
      return "the fusion of its adapters has no piece here (hint: peft::add_fusion)";
    }
  }
  for (const auto& child : tree.children) {
    auto why = join_refusal(child);
    if (!why.empty()) return why;
  }
  return {};
}

/// Runs a tree of pieces on one join. A block that holds blocks enters each by its first adapter before the
/// block itself does, as AdapterHub has it: an adapter with the model's norm before it sees that norm twice.
/// In an Average, Split, Parallel or BatchSplit each adapter reads and joins as its own options say, where
/// AdapterHub enters all by the first one's and joins all by the last one's.
class Join {
 public:
  Join(const JoinNorm& norm, std::string path, const PieceTree& tree)
      : norm_(norm), path_(std::move(path)), fuses_(tree.holds(Composition::Block::fuse)) {}

  /// norm(output + skip) under the pieces, joined by the last.
  Tensor run(const PieceTree& tree, const Tensor& output, const Tensor& skip) const {
    const auto type = output.scalar_type();
    const auto end = on(tree, {output, {}, nullptr}, skip);
    const auto y = end.last ? end.last->join(end.hidden, skip, norm_) : norm_.forward(output + skip);
    return y.scalar_type() == type ? y : y.to(type);
  }

 private:
  struct State {
    Tensor hidden, made;
    ResidualPieceImpl* last;
  };
  using Block = Composition::Block;

  static ResidualPieceImpl* first(const PieceTree& tree) { return edge(tree, false); }
  static ResidualPieceImpl* last(const PieceTree& tree) { return edge(tree, true); }
  static ResidualPieceImpl* edge(const PieceTree& tree, bool from_the_end) {
    ResidualPieceImpl* found = nullptr;
    tree.each([&](PieceImpl& piece) {
      auto* joins = dynamic_cast<ResidualPieceImpl*>(&piece);
      if (joins && (from_the_end || !found)) found = joins;
    });
    return found;
  }

  State on(const PieceTree& tree, State state, const Tensor& skip) const {
    switch (tree.block) {
      case Block::fuse:
        return fused(tree, state, skip);
      case Block::split:
        return split(tree, state, skip);
      case Block::average:
        return averaged(tree, state, skip);
      case Block::parallel:
      case Block::batch_split:
        return child(tree.children.front(), state, skip);
      case Block::adapter:
      case Block::stack:
        for (auto* piece : tree.pieces) {
          auto* joins = dynamic_cast<ResidualPieceImpl*>(piece);
          if (joins) state = after(*joins, joins->enter(state.hidden, skip, norm_));
        }
        for (const auto& inner : tree.children) state = on(inner, state, skip);
    }
    return state;
  }
  State after(ResidualPieceImpl& piece, const ResidualPieceImpl::Entry& entry) const {
    if (!fuses_) return {piece.output(entry), {}, &piece};
    auto [output, made] = piece.run(entry);
    return {std::move(output), std::move(made), &piece};
  }
  /// A child of a block that is no stack.
  State child(const PieceTree& tree, State state, const Tensor& skip) const {
    auto* begins = first(tree);
    if (tree.block != Block::adapter && begins && !begins->reads_skip()) {
      state.hidden = begins->enter(state.hidden, skip, norm_).hidden;
    }
    return on(tree, std::move(state), skip);
  }
  State averaged(const PieceTree& tree, const State& state, const Tensor& skip) const {
    if (!first(tree)) return state;
    State result = state;
    Tensor total;
    double rest = 1;
    for (size_t i = 0; i < tree.children.size(); ++i) {
      result = child(tree.children[i], state, skip);
      const auto term = result.hidden * tree.weights[i];
      total = total.defined() ? total + term : term;
      rest -= tree.weights[i];
    }
    // What a block adds to the output is weighed, not the output.
    if (result.last->reads_skip() && std::abs(rest) > 1e-12) total = total + state.hidden * rest;
    result.hidden = total;
    return result;
  }
  State split(const PieceTree& tree, const State& state, const Tensor& skip) const {
    if (!first(tree)) return state;
    SplitView::check_split(tree.lengths, state.hidden, path_);
    State result = state;
    std::vector<Tensor> outputs;
    int64_t start = 0;
    for (size_t i = 0; i < tree.children.size(); ++i) {
      const auto tokens = [&](const Tensor& x) { return x.narrow(1, start, tree.lengths[i]); };
      result = child(tree.children[i], {tokens(state.hidden), {}, nullptr}, tokens(skip));
      outputs.push_back(result.hidden);
      start += tree.lengths[i];
    }
    return {torch::cat(outputs, 1), {}, result.last};
  }
  State fused(const PieceTree& tree, const State& state, const Tensor& skip) const {
    auto* ends = last(tree);
    if (!ends) return state;
    auto& fusion = dynamic_cast<FusionPieceImpl&>(*tree.fusion);
    const auto entry = ends->enter(state.hidden, skip, norm_);
    const auto beside = ends->reads_skip();
    std::vector<Tensor> made;
    for (const auto& inner : tree.children) {
      auto* begins = first(inner);
      if (!begins) continue;
      const bool alone = inner.block == Block::adapter && begins == last(inner);
      const State entered{beside ? state.hidden : entry.hidden, {}, nullptr};
      made.push_back(alone ? after(*begins, entry).made : on(inner, entered, skip).made);
    }
    const auto query = fusion.query_before_norm() && !beside ? state.hidden : entry.hidden;
    const auto residual = beside ? entry.residual + entry.hidden : entry.residual;
    return {fusion.fuse(query, made, residual), {}, ends};
  }

  const JoinNorm& norm_;
  std::string path_;
  bool fuses_;
};

}  // namespace internal

/// The join after a sublayer in models that norm there: norm(output + skip). It is the LayerNorm site at its
/// path. Shapes: output, skip: (*, normalized_shape), output after dropout.
class ResidualImpl : public LayerSite<nn::LayerNorm, ResidualImpl> {
 public:
  /// `where`: tells methods which sublayer of which layer this is the join of.
  explicit ResidualImpl(nn::LayerNorm norm, std::optional<JoinPlace> where = {})
      : LayerSite<nn::LayerNorm, ResidualImpl>(std::move(norm)), place(where) {}
  explicit ResidualImpl(const nn::LayerNormOptions& options, std::optional<JoinPlace> where = {})
      : ResidualImpl(nn::LayerNorm(options), where) {}

  SiteInfo base_info() const override {
    auto info = LayerSite<nn::LayerNorm, ResidualImpl>::base_info();
    info.offers.push_back(Needs::residual);
    info.join = place;
    return info;
  }

  std::shared_ptr<nn::Module> clone(const internal::OptionalDevice& device = {}) const override {
    auto result = LayerSite<nn::LayerNorm, ResidualImpl>::clone(device);
    result->as<ResidualImpl>()->place = place;
    return result;
  }

  Tensor forward(const Tensor& output, const Tensor& skip) {
    return route({output, skip},
                 [this](const Flow& in, const PieceTree& tree) -> Flow {
                   const Norm norm(*this, on_norm(tree));
                   return {internal::Join(norm, path(), tree).run(tree, in[0], in[1])};
                 })
        .front();
  }

  std::string refusal(const PieceTree& tree) const override {
    const auto why = internal::join_refusal(tree);
    return why.empty() ? LayerSite<nn::LayerNorm, ResidualImpl>::refusal(on_norm(tree)) : why;
  }

  std::optional<JoinPlace> place;

 private:
  class Norm final : public JoinNorm {
   public:
    Norm(const ResidualImpl& site, PieceTree tree) : site_(site), tree_(std::move(tree)) {}
    Tensor forward(const Tensor& x) const override { return site_.compose(x, tree_); }

   private:
    const ResidualImpl& site_;
    PieceTree tree_;
  };
  /// The weight methods on the norm.
  static PieceTree on_norm(const PieceTree& tree) {
    return tree.without([](PieceImpl* piece) { return dynamic_cast<ResidualPieceImpl*>(piece) != nullptr; });
  }
};

/// Holder of `ResidualImpl`.
class Residual : public nn::ModuleHolder<ResidualImpl> {
 public:
  using nn::ModuleHolder<ResidualImpl>::ModuleHolder;
  using Impl = ResidualImpl;
};

/// Settings of `BareResidual`.
struct ResidualOptions {
  explicit ResidualOptions(int64_t width) : width_(width) {}
  /// Last dimension of what is joined.
  TORCH_ARG(int64_t, width);
  /// Which sublayer of which layer this is the join of.
  TORCH_ARG(std::optional<JoinPlace>, place) = {};
};

/// The join after a sublayer in models that norm before it: output + skip. It has no tensors.
/// Shapes: output, skip: (*, width), output after dropout.
class BareResidualImpl : public internal::ActivationSite<BareResidualImpl> {
 public:
  explicit BareResidualImpl(ResidualOptions settings) : options(settings) {}

  SiteInfo base_info() const override {
    SiteInfo info;
    info.layer = "BareResidual";
    info.offers = {Needs::residual};
    info.width = options.width();
    info.join = options.place();
    info.dtype = dtype_;
    info.device = device_;
    return info;
  }

  Tensor forward(const Tensor& output, const Tensor& skip) {
    return route({output, skip},
                 [this](const Flow& in, const PieceTree& tree) -> Flow {
                   return {internal::Join(NoNorm(), path(), tree).run(tree, in[0], in[1])};
                 })
        .front();
  }

  std::string refusal(const PieceTree& tree) const override { return internal::join_refusal(tree); }

  ResidualOptions options;

 private:
  class NoNorm final : public JoinNorm {
   public:
    Tensor forward(const Tensor& x) const override { return x; }
  };
};

/// Holder of `BareResidualImpl`.
class BareResidual : public nn::ModuleHolder<BareResidualImpl> {
 public:
  using nn::ModuleHolder<BareResidualImpl>::ModuleHolder;
  using Impl = BareResidualImpl;
};

}  // namespace peft
