// Pairs: how far two programs are apart.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace glue {

/// The scores of two programs over the same seeds.
struct Pairs {
  std::vector<double> ours, theirs;

  std::size_t size() const { return ours.size(); }
  double mean() const {
    double sum = 0;
    for (std::size_t i = 0; i < size(); ++i) sum += ours[i] - theirs[i];
    return sum / static_cast<double>(size());
  }
  /// Of the mean difference; NaN for a single pair.
  double standard_error() const {
    double squares = 0;
    for (std::size_t i = 0; i < size(); ++i) squares += std::pow(ours[i] - theirs[i] - mean(), 2);
    const auto count = static_cast<double>(size());
    return size() < 2 ? std::nan("") : std::sqrt(squares / (count - 1) / count);
  }
  /// Within two standard errors, or one point of a hundred.
  bool agree() const {
    constexpr double point = 0.01, errors = 2;
    return std::abs(mean()) <= point || std::abs(mean()) <= errors * standard_error();
  }
};

}  // namespace glue
