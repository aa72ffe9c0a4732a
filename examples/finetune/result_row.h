// ResultRow: what one training run came to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "finetune/rank_history.h"

namespace finetune {

/// One line of a comparison and its learning curves.
struct ResultRow {
  /// A value measured after a step.
  struct Point {
    std::int64_t step;
    double value;
  };

  std::string method;                 ///< As the user wrote it.
  std::int64_t trainable = 0;         ///< Parameters that train, the task head's included.
  double percent = 0;                 ///< Those as a part of all, 0 to 100.
  double accuracy = 0;                ///< The best of the run, 0 to 1.
  double seconds_per_step = 0;        ///< Mean over the steps, evaluations left out.
  std::int64_t peak_bytes = 0;        ///< The most memory held; 0 where nobody measured it.
  std::int64_t adapter_bytes = 0;     ///< On disk.
  double train_seconds = 0;           ///< The whole run.
  std::vector<Point> loss;            ///< Training loss after each step.
  std::vector<Point> accuracy_curve;  ///< Accuracy (0 to 1) at each evaluation.
  RankHistory ranks;                  ///< Of methods that change them; else empty.
};

}  // namespace finetune
