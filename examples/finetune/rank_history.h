// RankHistory: the ranks of an adapter's matrices over training, where a method changes them, and their
// table.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "finetune/terminal_table.h"

namespace finetune {

/// The rank of every matrix after every step. Only changes are kept: a run of many steps stays small.
class RankHistory {
 public:
  /// A matrix had this rank after this step and until the next change; step 0 is before training.
  struct Change {
    std::int64_t step, rank;
  };

  RankHistory() = default;
  explicit RankHistory(std::vector<std::string> matrices)
      : matrices_(std::move(matrices)), changes_(matrices_.size()) {}

  bool empty() const { return matrices_.empty(); }
  /// Paths, in the model's order.
  const std::vector<std::string>& matrices() const { return matrices_; }
  /// Of a matrix, by rising step.
  const std::vector<Change>& changes(std::size_t matrix) const { return changes_.at(matrix); }
  /// The last step recorded.
  std::int64_t steps() const { return steps_; }

  /// The ranks after a step, in the order of the matrices.
  void record(std::int64_t step, const std::vector<std::int64_t>& ranks) {
    for (std::size_t i = 0; i < changes_.size(); ++i) {
      if (changes_[i].empty() || changes_[i].back().rank != ranks.at(i))
        changes_[i].push_back({step, ranks[i]});
    }
    steps_ = step;
  }
  std::int64_t rank(std::size_t matrix, std::int64_t step) const {
    std::int64_t rank = 0;
    for (const auto& change : changes_.at(matrix)) {
      if (change.step <= step) rank = change.rank;
    }
    return rank;
  }
  std::int64_t total(std::int64_t step) const {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < matrices_.size(); ++i) sum += rank(i, step);
    return sum;
  }
  std::int64_t largest() const {
    std::int64_t most = 0;
    for (const auto& list : changes_) {
      for (const auto& change : list) most = std::max(most, change.rank);
    }
    return most;
  }

  /// What all paths begin with, up to a dot.
  std::string common_prefix() const {
    if (matrices_.empty()) return {};
    std::string prefix = matrices_.front();
    for (const auto& path : matrices_) {
      const auto differs = std::mismatch(prefix.begin(), prefix.end(), path.begin(), path.end()).first;
      prefix.erase(differs, prefix.end());
    }
    prefix.erase(prefix.rfind('.') + 1);  // without a dot npos + 1 = 0: everything
    return prefix;
  }
  /// A path without that.
  std::string short_name(std::size_t matrix) const {
    return matrices_.at(matrix).substr(common_prefix().size());
  }

  nlohmann::json to_json() const {
    auto changes = nlohmann::json::array();
    for (const auto& list : changes_) {
      auto one = nlohmann::json::array();
      for (const auto& change : list) one.push_back({change.step, change.rank});
      changes.push_back(std::move(one));
    }
    return {{"matrices", matrices_}, {"changes", changes}, {"steps", steps_}};
  }
  /// What `to_json` gave.
  static RankHistory from_json(const nlohmann::json& json) {
    RankHistory history(json.at("matrices").get<std::vector<std::string>>());
    for (std::size_t i = 0; i < history.changes_.size(); ++i) {
      for (const auto& change : json.at("changes").at(i))
        history.changes_[i].push_back({change.at(0).get<std::int64_t>(), change.at(1).get<std::int64_t>()});
    }
    history.steps_ = json.at("steps").get<std::int64_t>();
    return history;
  }

 private:
  std::vector<std::string> matrices_;
  std::vector<std::vector<Change>> changes_;
  std::int64_t steps_ = 0;
};

/// The ranks as a table for people: a line a matrix, columns for some ten steps, at the bottom the sums.
inline std::string rank_table(const RankHistory& ranks) {
  constexpr std::int64_t parts = 10;
  std::vector<std::int64_t> steps;
  for (std::int64_t i = 0; i <= parts; ++i) {
    const auto step = ranks.steps() * i / parts;
    if (steps.empty() || step > steps.back()) steps.push_back(step);
  }
  const auto prefix = ranks.common_prefix();
  std::vector<std::vector<std::string>> cells = {
      {prefix.empty() ? "rank at step" : prefix + "… rank at step"}};
  for (const auto step : steps) cells.back().push_back(fmt::format("{}", step));
  for (std::size_t i = 0; i < ranks.matrices().size(); ++i) {
    cells.push_back({ranks.short_name(i)});
    for (const auto step : steps) cells.back().push_back(fmt::format("{}", ranks.rank(i, step)));
  }
  cells.push_back({"sum"});
  for (const auto step : steps) cells.back().push_back(fmt::format("{}", ranks.total(step)));
  return aligned(cells);
}

}  // namespace finetune
