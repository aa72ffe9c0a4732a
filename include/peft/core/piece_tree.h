// PieceTree: a composition of adapters as one site sees it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "peft/core/composition.h"
#include "peft/core/piece.h"

namespace peft {

/// The pieces of a composition's adapters on one site, bottom first.
struct PieceTree {
  Composition::Block block = Composition::Block::stack;
  std::vector<PieceImpl*> pieces;   ///< of an adapter, or of a stack of adapters alone
  std::vector<PieceTree> children;  ///< of other blocks
  std::vector<int64_t> lengths;
  std::vector<double> weights;
  PieceImpl* fusion = nullptr;  ///< of a Fuse

  bool empty() const {
    return pieces.empty() &&
           std::all_of(children.begin(), children.end(), [](const auto& child) { return child.empty(); });
  }
  bool holds(Composition::Block kind) const {
    return block == kind || std::any_of(children.begin(), children.end(),
                                        [kind](const PieceTree& child) { return child.holds(kind); });
  }
  /// True for a block that divides the batch.
  bool divides_rows() const {
    return block == Composition::Block::parallel || block == Composition::Block::batch_split;
  }
  bool by_rows() const {
    return holds(Composition::Block::parallel) || holds(Composition::Block::batch_split);
  }
  /// Calls `use` with each piece of its adapters.
  template <class Use>
  void each(const Use& use) const {
    for (auto* piece : pieces) use(*piece);
    for (const auto& child : children) child.each(use);
  }
  /// Without the pieces that `drops` names.
  template <class Drops>
  PieceTree without(const Drops& drops) const {
    auto result = *this;
    std::erase_if(result.pieces, drops);
    for (auto& child : result.children) child = child.without(drops);
    return result;
  }
};

}  // namespace peft
