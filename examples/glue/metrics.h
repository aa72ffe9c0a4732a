// Metrics: GLUE's official ones, equal to scikit-learn's and SciPy's.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tasks.h"

namespace glue {

/// What a model says of every row, and what is right: classes, or scores.
struct Predictions {
  std::vector<double> predicted, right;
};

/// The part of the rows that is right.
inline double accuracy(const Predictions& rows) {
  std::size_t correct = 0;
  for (std::size_t i = 0; i < rows.right.size(); ++i) correct += rows.predicted[i] == rows.right[i];
  return static_cast<double>(correct) / static_cast<double>(rows.right.size());
}

namespace internal {

/// How often each of two classes was predicted where each was right.
struct Confusion {
  double true_positive = 0, false_positive = 0, false_negative = 0, true_negative = 0;

  explicit Confusion(const Predictions& rows) {
    for (std::size_t i = 0; i < rows.right.size(); ++i) {
      const bool positive = rows.right[i] == 1, said = rows.predicted[i] == 1;
      (said ? positive ? true_positive : false_positive : positive ? false_negative : true_negative) += 1;
    }
  }
};

}  // namespace internal

/// F1 of class 1: 2·tp / (2·tp + fp + fn). Undefined where no row is or is said to be of that class.
inline std::optional<double> f1(const Predictions& rows) {
  const internal::Confusion count(rows);
  const auto all = 2 * count.true_positive + count.false_positive + count.false_negative;
  if (all == 0) return std::nullopt;
  return 2 * count.true_positive / all;
}

/// Matthews' correlation of two classes. 0 where all predictions are the same, as in scikit-learn; undefined
/// where all rows are of one class.
inline std::optional<double> matthews(const Predictions& rows) {
  const internal::Confusion count(rows);
  const auto positive = count.true_positive + count.false_negative,
             negative = count.true_negative + count.false_positive;
  const auto said = count.true_positive + count.false_positive,
             unsaid = count.true_negative + count.false_negative;
  if (positive == 0 || negative == 0) return std::nullopt;
  if (said == 0 || unsaid == 0) return 0.0;
  return (count.true_positive * count.true_negative - count.false_positive * count.false_negative) /
         std::sqrt(positive * negative * said * unsaid);
}

/// Pearson's correlation. Undefined where either side is constant.
inline std::optional<double> pearson(const Predictions& rows) {
  const auto size = static_cast<double>(rows.right.size());
  const auto centered = [&](std::vector<double> values) {
    const auto mean = std::accumulate(values.begin(), values.end(), 0.0) / size;
    for (auto& value : values) value -= mean;
    return values;
  };
  const auto constant = [](const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(), [&](double value) { return value == values.front(); });
  };
  if (rows.right.empty() || constant(rows.predicted) || constant(rows.right)) return std::nullopt;
  const auto x = centered(rows.predicted), y = centered(rows.right);
  const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  return std::clamp(dot(x, y) / std::sqrt(dot(x, x)) / std::sqrt(dot(y, y)), -1.0, 1.0);
}

namespace internal {

/// The place of each value in their order, from 1; equal values share the mean of their places.
inline std::vector<double> ranks(const std::vector<double>& values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return values[a] < values[b]; });
  std::vector<double> result(values.size());
  for (std::size_t begin = 0; begin < order.size();) {
    auto end = begin + 1;
    while (end < order.size() && values[order[end]] == values[order[begin]]) ++end;
    for (auto i = begin; i < end; ++i) result[order[i]] = static_cast<double>(begin + 1 + end) / 2;
    begin = end;
  }
  return result;
}

}  // namespace internal

/// Spearman's correlation: Pearson's of the ranks. Undefined where either side is constant.
inline std::optional<double> spearman(const Predictions& rows) {
  return pearson({internal::ranks(rows.predicted), internal::ranks(rows.right)});
}

/// One metric. No value where it is undefined on these predictions.
inline std::optional<double> evaluate(Metric metric, const Predictions& rows) {
  switch (metric) {
    case Metric::accuracy:
      return accuracy(rows);
    case Metric::f1:
      return f1(rows);
    case Metric::matthews:
      return matthews(rows);
    case Metric::pearson:
      return pearson(rows);
    case Metric::spearman:
      return spearman(rows);
  }
  return std::nullopt;
}

/// Throws std::runtime_error where the data leaves a metric without a value whatever a model says of it.
/// `right`: the classes or scores of a file's rows.
inline void check_defined(const std::string& file, const GlueTask& task, const std::vector<double>& right) {
  const auto fail = [&](Metric metric, const std::string& needs, const std::string& got) {
    throw std::runtime_error(fmt::format("{}: {} is undefined on this data: it needs {}, but {}", file,
                                         to_string(metric), needs, got));
  };
  const bool constant =
      std::all_of(right.begin(), right.end(), [&](double value) { return value == right.front(); });
  for (const auto metric : task.metrics) {
    if (metric == Metric::matthews && constant) {
      fail(metric, "rows of both classes",
           fmt::format("every row is of class {}", task.labels[static_cast<std::size_t>(right.front())]));
    }
    if (metric == Metric::f1 && std::count(right.begin(), right.end(), 1.0) == 0)
      fail(metric, fmt::format("rows of class {}", task.labels[1]), "there are none");
    if ((metric == Metric::pearson || metric == Metric::spearman) && constant)
      fail(metric, "different scores", fmt::format("every row has {}", right.front()));
  }
}

}  // namespace glue
