// Adafactor: an optimizer of an adapter whose second moments take little memory.
#pragma once

#include <torch/arg.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/train/adapter_optimizer.h"

namespace peft {

/// Settings of `Adafactor`, under the names of transformers' and with its defaults.
struct AdafactorOptions : public torch::optim::OptimizerOptions {
  AdafactorOptions() = default;
  /// A rate from outside, as a schedule gives it.
  explicit AdafactorOptions(double lr) : lr_(lr), relative_step_(false) {}

  /// The rate; none with `relative_step`, which sets its own.
  TORCH_ARG(std::optional<double>, lr) = {};
  using eps_t = std::tuple<double, double>;
  /// ε1, added to squared gradients; ε2, the least scale of a parameter.
  TORCH_ARG(eps_t, eps) = std::make_tuple(1e-30, 1e-3);
  /// d, the root mean square an update may have; positive.
  TORCH_ARG(double, clip_threshold) = 1.0;
  /// β2 at step t is 1 − t^decay_rate; at most 0.
  TORCH_ARG(double, decay_rate) = -0.8;
  /// Decay of the first moment, in [0, 1); without it there is none.
  TORCH_ARG(std::optional<double>, beta1) = {};
  TORCH_ARG(double, weight_decay) = 0.0;
  /// The rate is multiplied with the root mean square of the parameter.
  TORCH_ARG(bool, scale_parameter) = true;
  /// The rate is min(10⁻², 1/√t), instead of one from outside.
  TORCH_ARG(bool, relative_step) = true;
  /// With `relative_step`: min(10⁻⁶ t, 1/√t).
  TORCH_ARG(bool, warmup_init) = false;

 public:
  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override {
    return std::make_unique<AdafactorOptions>(*this);
  }
  /// 0 with `relative_step`.
  double get_lr() const override { return lr_.value_or(0); }
  /// Of no effect with `relative_step`, so that any schedule may be kept.
  void set_lr(const double lr) override {
    if (!relative_step_) lr_ = lr;
  }
};

/// Parameters with options of their own in an `Adafactor`.
using AdafactorGroup = GroupOf<AdafactorOptions>;

/// Adafactor over the tensors of an adapter that train. For a gradient G of at least two dimensions, V's
/// means over the last (R) and over the last but one (C) are kept in its place:
/// R ← β2 R + (1−β2) mean(G² + ε1), C alike, V = R Cᵀ / mean(R); else V ← β2 V + (1−β2) (G² + ε1).
/// U = G / √V, then U / max(1, RMS(U) / d), times α = ρ · max(ε2, RMS(W)); with `beta1` its running mean.
/// W ← W − wd·α·W − U. Tensors in a half type are computed in float.
/// `max_grad_norm`: as in `AdamW`; 0, the default, leaves clipping to d.
/// Throws: c10::ValueError for an adapter with nothing that trains, options out of range, a group that
/// matches nothing.
/// Paper: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, arXiv 1804.04235, algorithms 4 and
/// 5; reference: transformers' Adafactor. torch.optim.Adafactor differs: its rate is min(lr, 1/√t), always
/// times the parameter's scale, its decay lr·wd, ε1 (there the type's machine epsilon) bounds V instead of
/// being added, and it has no `beta1`.
///
/// Example:
/// ```
/// peft::Adafactor optimizer(adapter, peft::AdafactorOptions(3e-3));  // T-Few's recipe
/// peft::LinearSchedule schedule(optimizer, /*warmup=*/60, /*total=*/1000);
/// ```
class Adafactor : public AdapterOptimizer {
 public:
  /// One group.
  explicit Adafactor(const Adapter& adapter, AdafactorOptions options = {}, double max_grad_norm = 0)
      : Adafactor(adapter, std::vector<AdafactorGroup>{}, std::move(options), max_grad_norm) {}
  /// Several: a parameter belongs to the first group that matches it, the others to a last one with
  /// `defaults`.
  Adafactor(const Adapter& adapter, const std::vector<AdafactorGroup>& groups, AdafactorOptions defaults = {},
            double max_grad_norm = 0)
      : AdapterOptimizer("Adafactor", adapter,
                         internal::assign("Adafactor", adapter, groups, defaults, max_grad_norm, check),
                         /*columns=*/0) {
    begin_moments(0);
  }

  /// Takes parameters with such names out of the weight decay. Before the first step.
  Adafactor& no_decay(const std::function<bool(const std::string&)>& matches) {
    exclude_from_decay(matches);
    return *this;
  }

 protected:
  NamedTensors moments(size_t index) const override {
    auto& kept = moments_[index];
    follow(kept, tensors_[index]);
    NamedTensors result;
    if (kept.exp_avg.defined()) result.emplace_back("exp_avg", kept.exp_avg);
    if (kept.row.defined()) {
      result.emplace_back("exp_avg_sq_row", kept.row);
      result.emplace_back("exp_avg_sq_col", kept.column);
    } else {
      result.emplace_back("exp_avg_sq", kept.square);
    }
    return result;
  }
  void begin_moments(size_t first) override {
    moments_.resize(first);
    for (size_t i = first; i < tensors_.size(); ++i) {
      auto shape = tensors_[i].sizes().vec();
      const auto kind = tensors_[i].options().dtype(type_for(tensors_[i])).requires_grad(false);
      Moments begun;
      if (options(group_of_[i]).beta1()) begun.exp_avg = torch::zeros(shape, kind);
      if (shape.size() < 2) {
        begun.square = torch::zeros(shape, kind);
      } else {
        const auto last = shape.back();
        shape.pop_back();
        begun.row = torch::zeros(shape, kind);
        shape.back() = last;
        begun.column = torch::zeros(shape, kind);
      }
      moments_.push_back(begun);
    }
  }
  void update(const Tensor& scale) override {
    const auto& defined = storage_.defined();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (defined[i] && tensors_[i].numel() > 0) update_one(i, scale);
    }
  }

 private:
  struct Moments {
    Tensor exp_avg;      ///< where `beta1` asks for it
    Tensor row, column;  ///< of a matrix
    Tensor square;       ///< of a vector or scalar
  };

  const AdafactorOptions& options(size_t group) const {
    return static_cast<const AdafactorOptions&>(param_groups()[group].options());
  }
  /// The type a tensor is updated in.
  static torch::ScalarType type_for(const Tensor& tensor) {
    return tensor.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  }
  /// Moves the moments to where their tensor is.
  static void follow(Moments& moments, const Tensor& tensor) {
    for (auto* moment : {&moments.exp_avg, &moments.row, &moments.column, &moments.square}) {
      if (moment->defined()) *moment = moment->to(tensor.device(), type_for(tensor));
    }
  }
  static Tensor rms(const Tensor& x) { return x.norm().div_(std::sqrt(x.numel())); }

  void update_one(size_t index, const Tensor& scale) {
    const auto& settings = options(group_of_[index]);
    auto& kept = moments_[index];
    const Tensor weight = tensors_[index].detach();
    follow(kept, weight);
    const auto value = weight.to(type_for(weight));  // itself, unless in a half type
    auto gradient = tensors_[index].grad().to(value.scalar_type());
    if (scale.defined()) gradient = gradient * scale.to(value.options());

    const auto t = static_cast<double>(steps_[index]);
    const double fast = settings.warmup_init() ? 1e-6 * t : 1e-2;
    const double rate = settings.relative_step() ? std::min(fast, 1 / std::sqrt(t)) : settings.get_lr();
    const auto [eps1, eps2] = settings.eps();
    const double rest = std::pow(t, settings.decay_rate()), beta2 = 1 - rest;
    auto update = gradient.square().add_(eps1);
    if (kept.row.defined()) {
      kept.row.mul_(beta2).add_(update.mean(-1), rest);
      kept.column.mul_(beta2).add_(update.mean(-2), rest);
      const auto rows = kept.row.div(kept.row.mean(-1, /*keepdim=*/true)).rsqrt_();
      update = rows.unsqueeze(-1) * kept.column.rsqrt().unsqueeze(-2);
      update.mul_(gradient);
    } else {
      kept.square.mul_(beta2).add_(update, rest);
      update = kept.square.rsqrt().mul_(gradient);
    }
    update.div_(rms(update).div_(settings.clip_threshold()).clamp_min_(1));
    // The scale stays on the device: nobody waits for it.
    const auto step_size = settings.scale_parameter() ? rms(value).clamp_min_(eps2).mul_(rate)
                                                      : torch::full({}, rate, value.options());
    update.mul_(step_size);
    if (kept.exp_avg.defined()) {
      update = kept.exp_avg.mul_(*settings.beta1()).add_(update, 1 - *settings.beta1());
    }
    if (settings.weight_decay() != 0 && decays_[index]) {
      value.sub_(value * step_size.mul(settings.weight_decay()));
    }
    value.sub_(update);
    if (!value.is_same(weight)) weight.copy_(value);
  }

  static void check(const AdafactorOptions& options, const std::string& where, internal::Problems& problems) {
    const auto require = [&](bool fits, const std::string& must, double value) {
      if (!fits) problems.add(where + must + ", but got " + c10::str(value));
    };
    const auto [eps1, eps2] = options.eps();
    if (options.lr() && options.relative_step()) {
      problems.add(where + "lr must not be given with relative_step, but got " + c10::str(*options.lr()) +
                   " (hint: relative_step(false))");
    } else if (!options.lr() && !options.relative_step()) {
      problems.add(where + "lr must be given without relative_step");
    }
    require(options.get_lr() >= 0 && std::isfinite(options.get_lr()), "lr must be at least 0",
            options.get_lr());
    if (options.warmup_init() && !options.relative_step()) {
      problems.add(where + "warmup_init must go with relative_step");
    }
    require(eps1 >= 0 && std::isfinite(eps1), "the first of eps must be at least 0", eps1);
    require(eps2 >= 0 && std::isfinite(eps2), "the second of eps must be at least 0", eps2);
    require(options.clip_threshold() > 0, "clip_threshold must be positive", options.clip_threshold());
    require(options.decay_rate() <= 0, "decay_rate must be at most 0", options.decay_rate());
    require(!options.beta1() || (*options.beta1() >= 0 && *options.beta1() < 1), "beta1 must be in [0, 1)",
            options.beta1().value_or(0));
    require(options.weight_decay() >= 0, "weight_decay must be at least 0", options.weight_decay());
  }

  mutable std::vector<Moments> moments_;  ///< in storage order; they follow their tensors' type and device
};

}  // namespace peft
