// RowGroups: the rows of a batch that use the same pieces, how a tree divides a batch into them, and how each
// runs on its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/piece_tree.h"
#include "peft/core/problems.h"

namespace peft::internal {

/// Tensors on their way through a site, each with the batch in dimension 0. One that is undefined, or has
/// one row where others have more, serves every row.
using Flow = std::vector<Tensor>;
/// Makes the i-th tensor for rows whose pieces gave none, where those of other rows did.
using Missing = std::function<Tensor(size_t i, const Flow& rows)>;

/// Rows of a batch that use the same pieces.
struct RowGroup {
  std::vector<int64_t> rows;
  PieceTree tree;
};

inline int64_t batch_size(const Flow& in) {
  int64_t batch = 1;
  for (const auto& tensor : in) batch = tensor.defined() ? std::max(batch, tensor.size(0)) : batch;
  return batch;
}

/// How the tree of a site divides a batch. Errors name the site's path.
class RowDivision {
 public:
  RowDivision(const PieceTree& tree, int64_t batch, const std::string& path)
      : tree_(tree), batch_(batch), path_(path) {}

  /// Neighbouring rows that use the same pieces; blocks that divide the batch hold one child.
  std::vector<RowGroup> groups() const {
    std::set<int64_t> starts;
    cut(tree_, 0, batch_, starts);
    std::vector<RowGroup> groups;
    for (auto start = starts.begin(); start != starts.end() && *start < batch_; ++start) {
      const auto end = std::next(start) == starts.end() ? batch_ : *std::next(start);
      std::vector<int64_t> rows(static_cast<size_t>(end - *start));
      std::iota(rows.begin(), rows.end(), *start);
      groups.push_back({std::move(rows), of_row(tree_, 0, batch_, *start)});
    }
    return groups;
  }

 private:
  /// Rows of each child of a block that divides `count` rows.
  std::vector<int64_t> counts(const PieceTree& tree, int64_t count) const {
    const auto children = static_cast<int64_t>(tree.children.size());
    if (tree.block == Composition::Block::parallel) {
      TORCH_CHECK_VALUE(count % children == 0, "Parallel: '", path_, "' expected a multiple of ", children,
                        " rows, but got ", count);
      return std::vector<int64_t>(tree.children.size(), count / children);
    }
    const auto total = std::accumulate(tree.lengths.begin(), tree.lengths.end(), int64_t{0});
    TORCH_CHECK_VALUE(total == count, "BatchSplit: sizes must be those of the batch, ", count,
                      " rows, but got ", shape_text(tree.lengths), " at '", path_, "'");
    return tree.lengths;
  }
  /// Where rows begin that use other pieces than the row before.
  void cut(const PieceTree& tree, int64_t first, int64_t count, std::set<int64_t>& starts) const {
    starts.insert(first);
    if (!tree.divides_rows()) {
      for (const auto& child : tree.children) cut(child, first, count, starts);
      return;
    }
    const auto sizes = counts(tree, count);
    for (size_t i = 0; i < sizes.size(); ++i) {
      cut(tree.children[i], first, sizes[i], starts);
      first += sizes[i];
    }
  }
  /// The tree of one row.
  PieceTree of_row(const PieceTree& tree, int64_t first, int64_t count, int64_t row) const {
    auto result = tree;
    if (!tree.divides_rows()) {
      for (auto& child : result.children) child = of_row(child, first, count, row);
      return result;
    }
    const auto sizes = counts(tree, count);
    size_t i = 0;
    for (; row >= first + sizes[i]; ++i) first += sizes[i];
    result.children = {of_row(tree.children[i], first, sizes[i], row)};
    return result;
  }

  const PieceTree& tree_;
  int64_t batch_;
  const std::string& path_;
};

/// The rows of a batch that are a group's.
inline Flow only_rows(const Flow& in, const std::vector<int64_t>& rows) {
  const auto batch = batch_size(in);
  const auto count = static_cast<int64_t>(rows.size());
  const bool is_range = rows.back() - rows.front() + 1 == count;
  Flow part = in;
  for (auto& tensor : part) {
    if (!tensor.defined() || tensor.size(0) != batch) continue;
    tensor = is_range ? tensor.narrow(0, rows.front(), count)
                      : tensor.index_select(0, torch::tensor(rows, torch::kLong).to(tensor.device()));
  }
  return part;
}

/// Puts what the groups made of their rows back in the rows' places; a tensor that only some of them made is
/// `missing(i, flow)` of the others, or 0.
inline Flow rejoined(const std::vector<Flow>& parts, const std::vector<RowGroup>& groups,
                     const Missing& missing, const std::string& path) {
  std::vector<int64_t> order;
  for (const auto& group : groups) order.insert(order.end(), group.rows.begin(), group.rows.end());
  Flow result(parts.front().size());
  for (size_t i = 0; i < result.size(); ++i) {
    const auto made =
        std::find_if(parts.begin(), parts.end(), [i](const Flow& part) { return part[i].defined(); });
    if (made == parts.end()) continue;
    const auto like = (*made)[i];
    std::vector<Tensor> pieces;
    for (size_t g = 0; g < groups.size(); ++g) {
      auto shape = like.sizes().vec();
      shape[0] = static_cast<int64_t>(groups[g].rows.size());
      auto part = parts[g][i];
      if (!part.defined() && missing) part = missing(i, parts[g]);
      if (!part.defined()) part = torch::zeros(shape, like.options());
      TORCH_CHECK_VALUE(part.sizes().slice(1) == like.sizes().slice(1), "'", path,
                        "': the adapters of these rows make tensors of different lengths, ",
                        shape_text(like.sizes()), " and ", shape_text(part.sizes()));
      // One row that a group shares serves every row of it.
      pieces.push_back(part.expand(shape));
    }
    result[i] = torch::cat(pieces);
    if (std::is_sorted(order.begin(), order.end())) continue;
    const auto places = torch::tensor(order, torch::kLong).argsort();
    result[i] = result[i].index_select(0, places.to(like.device()));
  }
  return result;
}

}  // namespace peft::internal
