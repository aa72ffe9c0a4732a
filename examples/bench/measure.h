// Measure: variants of one piece of work, timed in turn, and the ratios between them.
//
// Google Benchmark is not used: it runs one function to the end before the next. Here two processes take
// turns sample by sample (A B C A B C …), because on a machine that others use too, or whose clock drifts,
// only the ratio of neighbours means something; and one side of each row lives in another process.
#pragma once

#include <malloc.h>
#include <sys/resource.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bench/device.h"
#include "bench/peer.h"

namespace bench {

/// One way to do a row's work.
struct Variant {
  std::string name;                 ///< "floor", "plain", "ours", or one that the Python process knows
  std::function<void()> step;       ///< once, in this process; empty: in the Python process
  std::function<void()> undo = {};  ///< puts back what `step` did, untimed
};

/// What a variant took, for one step.
struct Measured {
  std::string name;
  double cpu = 0, wall = 0;                ///< seconds, medians
  double ratio = 0, lower = 0, upper = 0;  ///< to the row's base in the same round: median and quartiles
};

/// The result of a row.
struct Row {
  std::string set, name;
  std::string base;  ///< the variant that ratios are to
  std::vector<Measured> variants;
  std::map<std::string, double> facts;  ///< bytes, tokens a second, …
  double agreement = -1;  ///< largest relative difference of losses and norms; below 0: not compared
  double tolerance = 0;
  int rounds = 0;
  std::string problem;  ///< why there is no result

  const Measured* find(const std::string& variant) const {
    for (const auto& measured : variants) {
      if (measured.name == variant) return &measured;
    }
    return nullptr;
  }
  std::string title() const { return set + " " + name; }
};

/// The q-quantile, linear between neighbours.
inline double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(at);
  const auto above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}

/// Processor time of all threads of this process, seconds.
inline double cpu_clock() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}
inline double wall_clock() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Seconds for all `count` steps.
inline Times run_here(const Variant& variant, int64_t count, const Device& device) {
  Times total;
  if (variant.undo) {  // each step by itself
    for (int64_t i = 0; i < count; ++i) {
      const double wall = wall_clock(), cpu = cpu_clock();
      variant.step();
      device.wait();
      total.cpu += cpu_clock() - cpu;
      total.wall += wall_clock() - wall;
      variant.undo();
    }
    return total;
  }
  const double wall = wall_clock(), cpu = cpu_clock();
  const double on_device = device.time([&] {
    for (int64_t i = 0; i < count; ++i) variant.step();
  });
  total.cpu = cpu_clock() - cpu;
  total.wall = on_device > 0 ? on_device : wall_clock() - wall;
  return total;
}

/// How long and by which clock.
struct Budget {
  double seconds = 4;        ///< of the wall, for a row
  double sample = 0.02;      ///< the least a sample should take, seconds
  int least = 5, most = 60;  ///< rounds
  bool by_wall = false;      ///< ratios of wall time, not of processor time
};

/// Times the variants in turn, forwards and backwards, and fills the row in.
inline void interleave(const std::vector<Variant>& variants, const Budget& budget, const Device& device,
                       Peer* peer, Row& row) {
  const auto run = [&](const Variant& variant, int64_t count) {
    return variant.step ? run_here(variant, count, device) : peer->run(variant.name, count);
  };
  const auto chosen = [&](const Times& times) { return budget.by_wall ? times.wall : times.cpu; };
  std::vector<int64_t> counts;
  double round = 0;
  for (const auto& variant : variants) {
    run(variant, 1);  // the first one allocates
    auto took = run(variant, 1);
    int64_t count = 1;
    while (std::max(took.cpu, took.wall) < budget.sample / 4 && count < 1 << 14) {
      count *= 4;
      took = run(variant, count);
    }
    const double each = std::max(took.cpu, took.wall) / static_cast<double>(count);
    counts.push_back(std::max<int64_t>(1, std::llround(budget.sample / std::max(each, 1e-9))));
    round += each * static_cast<double>(counts.back());
  }
  const auto wanted = static_cast<int>(budget.seconds / std::max(round, 1e-9));
  row.rounds = std::clamp(wanted, budget.least, budget.most);
  std::vector<std::vector<double>> cpu(variants.size()), wall(variants.size()), ratios(variants.size());
  const auto base = static_cast<size_t>(
      std::find_if(variants.begin(), variants.end(), [&](const Variant& v) { return v.name == row.base; }) -
      variants.begin());
  TORCH_INTERNAL_ASSERT(base < variants.size());
  for (int i = 0; i < row.rounds; ++i) {
    std::vector<Times> times(variants.size());
    for (size_t j = 0; j < variants.size(); ++j) {
      const size_t at = i % 2 == 0 ? j : variants.size() - 1 - j;
      times[at] = run(variants[at], counts[at]);
      times[at].cpu /= static_cast<double>(counts[at]);
      times[at].wall /= static_cast<double>(counts[at]);
    }
    for (size_t j = 0; j < variants.size(); ++j) {
      cpu[j].push_back(times[j].cpu);
      wall[j].push_back(times[j].wall);
      ratios[j].push_back(chosen(times[j]) / chosen(times[base]));
    }
  }
  for (size_t j = 0; j < variants.size(); ++j) {
    row.variants.push_back({variants[j].name, quantile(cpu[j], 0.5), quantile(wall[j], 0.5),
                            quantile(ratios[j], 0.5), quantile(ratios[j], 0.25), quantile(ratios[j], 0.75)});
  }
}

/// The largest relative difference of two lists of figures.
inline double difference(const std::vector<double>& a, const std::vector<double>& b) {
  TORCH_CHECK(a.size() == b.size(), "expected ", a.size(), " figures to compare, but got ", b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double scale = std::max({std::abs(a[i]), std::abs(b[i]), 1e-6});
    const double apart = std::abs(a[i] - b[i]) / scale;
    if (!(apart <= largest)) largest = apart;  // NaN counts
  }
  return largest;
}

/// Compares one side's figures with ours. Throws c10::Error where they differ by more than `tolerance`.
inline void compare(const std::vector<double>& ours, const std::vector<double>& other, const std::string& who,
                    double tolerance, Row& row) {
  const double apart = difference(ours, other);
  row.agreement = std::max(row.agreement, apart);
  row.tolerance = tolerance;
  TORCH_CHECK(apart <= tolerance, "the losses and norms of ", who, " must equal ours to ", tolerance,
              " (relative), but differ by ", apart, ": ", c10::Join(", ", ours), " and ",
              c10::Join(", ", other));
}

}  // namespace bench
