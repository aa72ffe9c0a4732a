// Problems: collects everything that is wrong before anything is changed, and reports it at once.
#pragma once

#include <algorithm>
#include <map>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peft/core/compat.h"

namespace peft::internal {

/// A list of complaints under one title.
///
/// Example:
/// ```
/// Problems problems;
/// if (rank < 1) problems.add("rank must be positive, but got 0");
/// problems.raise("add_adapter: nothing was changed");
/// ```
class Problems {
 public:
  void add(std::string line) { lines_.push_back(std::move(line)); }
  void add(const Problems& more) { lines_.insert(lines_.end(), more.lines_.begin(), more.lines_.end()); }
  bool empty() const { return lines_.empty(); }
  const std::vector<std::string>& lines() const { return lines_; }
  size_t size() const { return lines_.size(); }

  /// Throws c10::ValueError when there is anything to say: the first problem on the first line, the others
  /// below it, at most 20 of them.
  void raise(const std::string& title) const {
    if (lines_.empty()) return;
    if (lines_.size() == 1) TORCH_CHECK_VALUE(false, title, ": ", lines_.front());
    constexpr size_t most = 20;
    std::string text = title + ": " + std::to_string(lines_.size()) + " problems: " + lines_.front();
    for (size_t i = 1; i < std::min(most, lines_.size()); ++i) text += "\n  " + lines_[i];
    if (lines_.size() > most) text += "\n  and " + std::to_string(lines_.size() - most) + " more";
    TORCH_CHECK_VALUE(false, text);
  }

 private:
  std::vector<std::string> lines_;
};

/// Number of single-character edits between two words.
inline size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row[b.size()];
}

/// The candidates nearest to `word`, best first, each quoted, joined by commas: for "did you mean" hints.
inline std::string closest(std::string_view word, std::vector<std::string> candidates, size_t most = 3) {
  std::sort(candidates.begin(), candidates.end());
  candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
  std::stable_sort(candidates.begin(), candidates.end(), [&](const std::string& a, const std::string& b) {
    return edit_distance(word, a) < edit_distance(word, b);
  });
  std::string text;
  for (size_t i = 0; i < std::min(most, candidates.size()); ++i) {
    text += (i ? ", '" : "'") + candidates[i] + "'";
  }
  return text;
}

/// That a model's adapters, `known`, do not have one of this name.
inline std::string no_adapter_text(const std::string& name, const std::vector<std::string>& known) {
  return "the model has no adapter '" + name + "'; it has " +
         (known.empty() ? "none" : closest(name, known, 20));
}

/// "(8, 64)" for a shape.
template <class Shape>
std::string shape_text(const Shape& shape) {
  std::string text = "(";
  bool first = true;
  for (const auto size : shape) {
    text += (first ? "" : ", ") + std::to_string(size);
    first = false;
  }
  return text + ")";
}

/// Compares named tensors on file with those they are for; what does not fit is added to `problems`.
inline void check_tensors(const std::vector<std::pair<std::string, Tensor>>& expected,
                          const std::map<std::string, Tensor>& given, Problems& problems) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : expected) {
    names.push_back(name);
    const auto found = given.find(name);
    if (found == given.end()) {
      problems.add("'" + name + "' is missing");
    } else if (found->second.sizes() != tensor.sizes()) {
      problems.add("'" + name + "' expected shape " + shape_text(tensor.sizes()) + ", but got " +
                   shape_text(found->second.sizes()));
    } else if (found->second.scalar_type() != tensor.scalar_type()) {
      problems.add("'" + name + "' expected dtype " + c10::toString(tensor.scalar_type()) + ", but got " +
                   c10::toString(found->second.scalar_type()));
    }
  }
  std::sort(names.begin(), names.end());
  for (const auto& item : given) {
    if (!std::binary_search(names.begin(), names.end(), item.first)) {
      problems.add("'" + item.first + "' is not expected");
    }
  }
}

}  // namespace peft::internal
