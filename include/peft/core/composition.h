// Composition: how active adapters work together: Stack, Parallel, Fuse, Split, BatchSplit, Average.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <numeric>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/problems.h"

namespace peft {

/// How adapters work together: a tree whose leaves are names of adapters. Made as `Stack`, `Parallel`, …,
/// given to `set_active`.
///
/// Example:
/// ```
/// peft::set_active(*model, peft::Stack("german", peft::Parallel("topics", "order")));
/// ```
/// Reference: AdapterHub's adapters.composition.
struct Composition {
  enum class Block : std::uint8_t { adapter, stack, parallel, fuse, split, batch_split, average };

  /// Nothing: an empty stack.
  Composition() = default;
  /// One adapter.
  Composition(std::string adapter) : block(Block::adapter), name(std::move(adapter)) {}
  Composition(const char* adapter) : Composition(std::string(adapter)) {}

  Block block = Block::stack;
  std::string name;  ///< of an adapter; of the fusion of a Fuse
  std::vector<Composition> children;
  std::vector<int64_t> lengths;  ///< tokens of each child of a Split, rows of each of a BatchSplit
  std::vector<double> weights;   ///< of each child of an Average

  bool is_adapter() const { return block == Block::adapter; }

  /// The adapters, each once, in the order they are named; a fusion after those it fuses.
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    collect(found);
    return found;
  }
  /// Into how many parts a Parallel divides the batch; 1 without one.
  int64_t branches() const {
    auto most = block == Block::parallel ? static_cast<int64_t>(children.size()) : int64_t{1};
    for (const auto& child : children) most = std::max(most, child.branches());
    return most;
  }
  bool holds(Block kind) const {
    return block == kind || std::any_of(children.begin(), children.end(),
                                        [kind](const Composition& child) { return child.holds(kind); });
  }
  /// True if rows of one batch use different adapters.
  bool by_rows() const { return holds(Block::parallel) || holds(Block::batch_split); }

  void rename(const std::string& from, const std::string& to) {
    if (name == from) name = to;
    for (auto& child : children) child.rename(from, to);
  }
  /// Puts `last` on top.
  void append(Composition last) {
    if (block != Block::stack) {
      Composition stack;
      stack.children.push_back(std::move(*this));
      *this = std::move(stack);
    }
    if (last.block != Block::stack) {
      children.push_back(std::move(last));
      return;
    }
    for (auto& child : last.children) children.push_back(std::move(child));
  }
  /// "Stack(german, Parallel(topics, order))".
  std::string text() const {
    if (is_adapter()) return name;
    std::string inside;
    for (const auto& child : children) inside += (inside.empty() ? "" : ", ") + child.text();
    return std::string(title(block)) + "(" + inside + ")";
  }

  static const char* title(Block block) {
    switch (block) {
      case Block::adapter:
        return "an adapter";
      case Block::stack:
        return "Stack";
      case Block::parallel:
        return "Parallel";
      case Block::fuse:
        return "Fuse";
      case Block::split:
        return "Split";
      case Block::batch_split:
        return "BatchSplit";
      case Block::average:
        return "Average";
    }
    return "?";
  }

 protected:
  Composition(Block kind, std::vector<Composition> parts) : block(kind), children(std::move(parts)) {}
  void set_lengths(std::vector<int64_t> given, const char* what, int64_t least) {
    TORCH_CHECK_VALUE(given.size() == children.size(), title(block), ": ", what, " must be ", children.size(),
                      ", one for each adapter, but got ", given.size());
    for (const auto length : given) {
      TORCH_CHECK_VALUE(length >= least, title(block), ": ", what, " must be at least ", least, ", but got ",
                        length);
    }
    lengths = std::move(given);
  }

 private:
  void collect(std::vector<std::string>& found) const {
    for (const auto& child : children) child.collect(found);
    if (!name.empty() && std::find(found.begin(), found.end(), name) == found.end()) found.push_back(name);
  }
};

namespace internal {

/// What a block may be made of: adapters and blocks, and not one of its own kind alone, which is a copy.
template <class Self, class... Children>
concept MakesBlock = (std::convertible_to<Children, Composition> && ...) &&
                     !(sizeof...(Children) == 1 &&
                       (std::same_as<std::remove_cvref_t<Children>, Self> && ...));

}  // namespace internal

/// Each works on what the one before it made. A parallel bottleneck is given the sub-layer's input and adds
/// to what was made so far; in AdapterHub's stacks it adds to the sub-layer's output, and drops what was
/// made.
struct Stack : Composition {
  template <class... Children>
  requires internal::MakesBlock<Stack, Children...>
  explicit Stack(Children&&... parts) : Composition(Block::stack, {std::forward<Children>(parts)...}) {}
};

/// Each on its own copy of the batch: the model's output has the rows of the first adapter, then those of the
/// second, …, N · batch in all. The model repeats its inputs (`SiteImpl::branches`).
struct Parallel : Composition {
  template <class... Children>
  requires internal::MakesBlock<Parallel, Children...>
  explicit Parallel(Children&&... parts) : Composition(Block::parallel, {std::forward<Children>(parts)...}) {}
};

/// AdapterFusion: the fusion that `add_fusion` made for these adapters weighs their outputs, token by token.
/// Its name by default: theirs, with commas, of a Stack the last one's.
struct Fuse : Composition {
  template <class... Children>
  requires internal::MakesBlock<Fuse, Children...>
  explicit Fuse(Children&&... parts) : Fuse(std::vector<Composition>{std::forward<Children>(parts)...}, "") {}
  Fuse(std::vector<Composition> parts, std::string fusion) : Composition(Block::fuse, std::move(parts)) {
    name = std::move(fusion);
    if (!name.empty()) return;
    for (const auto& child : children) {
      const auto names = child.names();
      if (!names.empty()) name += (name.empty() ? "" : ",") + names.back();
    }
  }
};

/// Tokens [0, lengths[0]) to the first, the next lengths[1] to the second, …; all tokens of a text must be
/// given to one.
struct Split : Composition {
  Split(std::vector<Composition> parts, std::vector<int64_t> tokens)
      : Composition(Block::split, std::move(parts)) {
    set_lengths(std::move(tokens), "lengths", 1);
  }
};

/// Rows [0, sizes[0]) of the batch to the first, the next sizes[1] to the second, …; all rows must be given
/// to one.
struct BatchSplit : Composition {
  BatchSplit(std::vector<Composition> parts, std::vector<int64_t> sizes)
      : Composition(Block::batch_split, std::move(parts)) {
    set_lengths(std::move(sizes), "sizes", 0);
  }
};

/// Settings of `Average`.
struct AverageOptions {
  /// Divides the weights by their sum.
  TORCH_ARG(bool, normalize) = true;
  /// AdapterHub's output, which takes the mean of the weighted outputs: 1/N of their sum.
  TORCH_ARG(bool, as_adapterhub) = false;
};

/// Σ wᵢ outputᵢ: on a residual join of what the adapters give to it; on a layer F + Σ wᵢ (Fᵢ − F), which is
/// Σ wᵢ Fᵢ where the weights' sum is 1.
struct Average : Composition {
  /// Equal weights.
  template <class... Children>
  requires internal::MakesBlock<Average, Children...>
  explicit Average(Children&&... parts)
      : Average(std::vector<Composition>{std::forward<Children>(parts)...},
                std::vector<double>(sizeof...(Children), 1.0)) {}
  Average(std::vector<Composition> parts, std::vector<double> given, AverageOptions options = {})
      : Composition(Block::average, std::move(parts)) {
    TORCH_CHECK_VALUE(given.size() == children.size(), "Average: weights must be ", children.size(),
                      ", one for each adapter, but got ", given.size());
    weights = std::move(given);
    const auto sum = options.normalize() ? std::accumulate(weights.begin(), weights.end(), 0.0) : 1.0;
    const auto count = options.as_adapterhub() ? static_cast<double>(weights.size()) : 1.0;
    for (auto& weight : weights) {
      weight /= sum * count;
      TORCH_CHECK_VALUE(std::isfinite(weight),
                        "Average: weights must be finite and their sum not 0, but got ", "a sum of ", sum);
    }
  }
};

namespace internal {

/// Adapters on top of each other.
inline Composition stack_of(const std::vector<std::string>& names) {
  Composition stack;
  for (const auto& name : names) stack.children.emplace_back(name);
  return stack;
}

/// What the reference lets a block hold.
inline bool may_hold(Composition::Block outer, Composition::Block inner) {
  using Block = Composition::Block;
  if (inner == Block::adapter) return true;
  switch (outer) {
    case Block::adapter:
      return false;
    case Block::stack:
      return inner != Block::stack;
    case Block::fuse:
      return inner == Block::stack;
    case Block::split:
      return inner != Block::parallel && inner != Block::fuse;
    case Block::parallel:
      return inner == Block::stack || inner == Block::batch_split || inner == Block::average;
    case Block::batch_split:
      return inner != Block::parallel && inner != Block::fuse;
    case Block::average:
      return inner == Block::stack || inner == Block::split || inner == Block::batch_split;
  }
  return false;
}

/// What is wrong with a tree, whatever the model.
inline void check_nesting(const Composition& outer, Problems& problems, int level = 0) {
  using Block = Composition::Block;
  if (outer.is_adapter()) return;
  if (outer.children.empty() && (level > 0 || outer.block != Block::stack)) {
    problems.add(std::string(Composition::title(outer.block)) + " holds no adapter");
  }
  for (const auto& child : outer.children) {
    const std::string in = " cannot stand in " + outer.text();
    if (!may_hold(outer.block, child.block)) {
      problems.add(child.text() + in);
    } else if (level > 0 && !child.is_adapter() && child.block != Block::stack) {
      problems.add(child.text() + in + ", which is itself in a block");
    }
    check_nesting(child, problems, level + 1);
  }
}

/// The numbers of branches of all Parallels.
inline void count_branches(const Composition& composition, std::set<size_t>& counts) {
  if (composition.block == Composition::Block::parallel) counts.insert(composition.children.size());
  for (const auto& child : composition.children) count_branches(child, counts);
}

}  // namespace internal
}  // namespace peft
