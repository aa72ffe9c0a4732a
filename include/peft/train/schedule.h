// Schedules: learning rates as a function of the step, as transformers computes them.
#pragma once

#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/train/adapter_optimizer.h"

namespace peft {

/// Multiplies each group's rate by λ(k), k the number of steps taken: `torch.optim.lr_scheduler.LambdaLR`.
/// The rates the groups have when it is made are the ones multiplied; the constructor sets those of k = 0.
/// A group that joins an adapter's optimizer later, and begins the schedule anew, has a k of its own from 0
/// and the steps that are left; one that does not keeps its rate. Works on any `torch::optim::Optimizer`,
/// which must outlive it.
///
/// Example:
/// ```
/// peft::Schedule schedule(optimizer, [](int64_t k) { return 1.0 / static_cast<double>(1 + k); });
/// optimizer.step();
/// schedule.step();
/// ```
class Schedule {
 public:
  using Factor = std::function<double(int64_t)>;

  Schedule(torch::optim::Optimizer& optimizer, Factor factor)
      : Schedule(optimizer, Remaining([f = std::move(factor)](int64_t k, int64_t) { return f(k); })) {}

  /// After the optimizer's step.
  void step() {
    ++step_;
    admit();
    apply();
  }
  /// The rates the schedule last set, one a group.
  const std::vector<double>& last() const { return last_; }
  /// Steps taken.
  int64_t count() const { return step_; }

  /// `step`, and for each group `base_lr` and the step it joined at (`start`, −1 where it keeps its rate),
  /// for a checkpoint.
  std::vector<std::pair<std::string, Tensor>> state() const {
    return {{"step", torch::scalar_tensor(step_, torch::kLong)},
            {"base_lr", torch::tensor(base_, torch::kDouble)},
            {"start", torch::tensor(start_, torch::kLong)}};
  }
  /// Takes over what `state` gave and sets the rates. Throws c10::ValueError, before anything is changed,
  /// listing what does not fit.
  void load_state(const std::map<std::string, Tensor>& state) {
    internal::Problems problems;
    check_state(state, problems);
    problems.raise("Schedule::load_state: the state does not fit this schedule");
    step_ = state.at("step").item<int64_t>();
    const auto base = state.at("base_lr").contiguous();
    base_.assign(base.data_ptr<double>(), base.data_ptr<double>() + base.numel());
    const auto start = state.at("start").contiguous();
    start_.assign(start.data_ptr<int64_t>(), start.data_ptr<int64_t>() + start.numel());
    apply();
  }
  /// Adds what keeps `load_state` from taking this state.
  void check_state(const std::map<std::string, Tensor>& given, internal::Problems& problems) const {
    auto expected = state();
    const auto groups = static_cast<int64_t>(optimizer_->param_groups().size());
    expected[1].second = torch::empty({groups}, torch::kDouble);
    expected[2].second = torch::empty({groups}, torch::kLong);
    internal::check_tensors(expected, given, problems);
  }

 protected:
  /// λ(k, late): `late` steps had been taken when the group joined.
  using Remaining = std::function<double(int64_t, int64_t)>;
  Schedule(torch::optim::Optimizer& optimizer, Remaining factor)
      : optimizer_(&optimizer), factor_(std::move(factor)) {
    for (const auto& group : optimizer.param_groups()) base_.push_back(group.options().get_lr());
    start_.assign(base_.size(), 0);
    apply();
  }

 private:
  void admit() {
    const auto* growing = dynamic_cast<const AdapterOptimizer*>(optimizer_);
    const auto& groups = optimizer_->param_groups();
    for (size_t i = base_.size(); growing && i < groups.size(); ++i) {
      base_.push_back(groups[i].options().get_lr());
      start_.push_back(growing->restarts_schedule(i) ? step_ : -1);
    }
  }

  void apply() {
    auto& groups = optimizer_->param_groups();
    TORCH_CHECK(groups.size() == base_.size(), "Schedule: the optimizer had ", base_.size(),
                " parameter groups, but now has ", groups.size(),
                " (hint: make the schedule after adding groups)");
    last_.clear();
    for (size_t i = 0; i < groups.size(); ++i) {
      last_.push_back(start_[i] < 0 ? base_[i] : base_[i] * factor_(step_ - start_[i], start_[i]));
      groups[i].options().set_lr(last_[i]);
    }
  }

  torch::optim::Optimizer* optimizer_;
  Remaining factor_;
  std::vector<double> base_, last_;
  std::vector<int64_t> start_;
  int64_t step_ = 0;
};

namespace internal {

/// k / max(1, warmup), the part of a schedule before its plateau or decay.
inline double warmup_factor(int64_t k, int64_t warmup) {
  return static_cast<double>(k) / static_cast<double>(std::max<int64_t>(1, warmup));
}

inline void check_schedule(const char* name, int64_t warmup, int64_t total) {
  TORCH_CHECK_VALUE(warmup >= 0, name, ": warmup must be at least 0 steps, but got ", warmup);
  TORCH_CHECK_VALUE(total >= 0, name, ": total must be at least 0 steps, but got ", total);
}

}  // namespace internal

/// λ = 1 after a linear warm-up from 0. `warmup`: steps, 0 for none.
class ConstantSchedule : public Schedule {
 public:
  explicit ConstantSchedule(torch::optim::Optimizer& optimizer, int64_t warmup = 0)
      : Schedule(optimizer, factor(warmup)) {}

 private:
  static Remaining factor(int64_t warmup) {
    internal::check_schedule("ConstantSchedule", warmup, 0);
    return [=](int64_t k, int64_t) { return k < warmup ? internal::warmup_factor(k, warmup) : 1.0; };
  }
};

/// λ rises linearly from 0 to 1 in `warmup` steps and falls linearly to 0 at `total`. With a warm-up the
/// first optimizer step has rate 0, as in transformers' `get_linear_schedule_with_warmup`.
class LinearSchedule : public Schedule {
 public:
  LinearSchedule(torch::optim::Optimizer& optimizer, int64_t warmup, int64_t total)
      : Schedule(optimizer, factor(warmup, total)) {}

 private:
  static Remaining factor(int64_t warmup, int64_t total) {
    internal::check_schedule("LinearSchedule", warmup, total);
    return [=](int64_t k, int64_t late) {
      if (k < warmup) return internal::warmup_factor(k, warmup);
      const auto left = static_cast<double>(total - late - k);
      return std::max(0.0, left / static_cast<double>(std::max<int64_t>(1, total - late - warmup)));
    };
  }
};

/// λ rises linearly from 0 to 1 in `warmup` steps, then follows `cycles` waves of a cosine to `total`; half a
/// wave falls to 0. As transformers' `get_cosine_schedule_with_warmup`.
class CosineSchedule : public Schedule {
 public:
  CosineSchedule(torch::optim::Optimizer& optimizer, int64_t warmup, int64_t total, double cycles = 0.5)
      : Schedule(optimizer, factor(warmup, total, cycles)) {}

 private:
  static Remaining factor(int64_t warmup, int64_t total, double cycles) {
    internal::check_schedule("CosineSchedule", warmup, total);
    TORCH_CHECK_VALUE(cycles >= 0 && std::isfinite(cycles),
                      "CosineSchedule: cycles must be at least 0, but got ", cycles);
    return [=](int64_t k, int64_t late) {
      if (k < warmup) return internal::warmup_factor(k, warmup);
      const double progress =
          static_cast<double>(k - warmup) / static_cast<double>(std::max<int64_t>(1, total - late - warmup));
      constexpr double pi = 3.141592653589793;
      return std::max(0.0, 0.5 * (1.0 + std::cos(pi * cycles * 2.0 * progress)));
    };
  }
};

}  // namespace peft
