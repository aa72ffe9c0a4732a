// AdamW: the optimizer of an adapter, on its flat storage, with clipping in the same pass.
#pragma once

#include <torch/csrc/autograd/variable.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/kernels/adamw.h"
#include "peft/train/adapter_optimizer.h"

namespace peft {

/// Parameters with options of their own in an `AdamW`.
using ParameterGroup = GroupOf<torch::optim::AdamWOptions>;

/// AdamW over the tensors of an adapter that train: the arithmetic of `torch::optim::AdamW` in one pass over
/// flat storage, which also clips.
/// `max_grad_norm`: largest Euclidean norm of all gradients together; 0 switches clipping off.
/// Throws: c10::ValueError for an adapter with nothing that trains, options out of range, `amsgrad`, a group
/// that matches nothing. Paper: Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
/// Example:
/// ```
/// peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(2e-3).weight_decay(0.01),
///                       /*max_grad_norm=*/1.0);
/// optimizer.zero_grad();
/// loss.backward();
/// optimizer.step();
/// ```
class AdamW : public AdapterOptimizer {
 public:
  using Form = AdamWForm;

  /// One group.
  explicit AdamW(const Adapter& adapter, torch::optim::AdamWOptions options = {}, double max_grad_norm = 0)
      : AdamW(adapter, std::vector<ParameterGroup>{}, std::move(options), max_grad_norm) {}
  /// Several: a parameter belongs to the first group that matches it, the others to a last one with
  /// `defaults`. A group's options are taken as they are, none from `defaults`.
  AdamW(const Adapter& adapter, const std::vector<ParameterGroup>& groups,
        torch::optim::AdamWOptions defaults = {}, double max_grad_norm = 0)
      : AdapterOptimizer("AdamW", adapter,
                         internal::assign("AdamW", adapter, groups, defaults, max_grad_norm, check),
                         /*columns=*/2),
        has_controllers_(!adapter.record().controllers.empty()) {}

  /// Which AdamW; `Form::torch` unless set.
  AdamW& form(Form form) {
    form_ = form;
    return *this;
  }
  Form form() const { return form_; }

  /// Takes parameters with such names out of the weight decay, those that join later too. Before the first
  /// step.
  AdamW& no_decay(const std::function<bool(const std::string&)>& matches) {
    exclude_from_decay(matches);
    return *this;
  }

  /// Lets a CUDA graph hold the whole step: rates and step counters are read on the device, where
  /// `prepare_step` puts them, and `step` itself neither counts nor waits. Every parameter must have a
  /// gradient in every step. Throws: c10::Error for an adapter with a controller (AdaLoRA, IncreLoRA), which
  /// decides on the host.
  ///
  /// Example:
  /// ```
  /// optimizer.capturable(true);
  /// optimizer.prepare_step();  // warm up, on the stream that is captured
  /// train_step();              // zero_grad, forward, backward, step
  /// graph.capture_begin();
  /// train_step();              // recorded, not run
  /// graph.capture_end();
  /// for (auto& batch : batches) {
  ///   inputs.copy_(batch);
  ///   optimizer.prepare_step();
  ///   graph.replay();
  ///   schedule.step();
  /// }
  /// ```
  /// In a graph nothing runs on the host, so what is decided there is decided once, at the capture:
  /// - scales, rates of dropout, the active adapters and modes are those of the capture;
  /// - dropout draws anew in each replay, for its numbers come from the GPU's generator, which the graph
  ///   registers. A function under `checkpoint` that draws cannot be captured: the generator's state is read
  ///   on the host;
  /// - what methods keep of the weights (DoRA's norms, factors in a half type) is computed within the graph,
  ///   and after a `prepare_step` by the first forward outside it;
  /// - `GradScaler::step` asks whether the gradients are finite, BOFT's linear solve may look at its result,
  ///   and the checks of labels and ids of a model on the CPU look at values: they stay outside;
  /// - other optimizers, and AdaLoRA and IncreLoRA, count steps on the host: their `step` stays outside.
  AdamW& capturable(bool on) {
    TORCH_CHECK(!on || !has_controllers_,
                "AdamW::capturable: a method with a controller decides on the host at every step");
    capturable_ = on;
    scalars_.clear();
    return *this;
  }
  /// Counts a step and hands its number and the groups' rates to the device: once before each `step` or
  /// replay of an optimizer that is `capturable`. What methods keep of the parameters is outdated from here
  /// on, since a replay changes them without a trace on the host.
  void prepare_step() {
    TORCH_CHECK(capturable_, "AdamW::prepare_step is for an optimizer that is capturable");
    torch::NoGradGuard no_grad;
    for (auto& step : steps_) ++step;
    for (const auto& tensor : tensors_) torch::autograd::impl::bump_version(tensor);
    size_t run = 0;
    for_each_run([&](const Run& at) {
      if (run == scalars_.size()) scalars_.push_back(scalars(at));
      scalars_[run].lr.fill_(at.settings.lr);
      scalars_[run++].step.fill_(steps_[at.first]);
    });
  }

 protected:
  void count_step() override {
    if (!capturable_) return AdapterOptimizer::count_step();
    TORCH_CHECK(!scalars_.empty(), "AdamW::step: prepare_step must come first");
    const auto& defined = storage_.defined();
    TORCH_CHECK(std::all_of(defined.begin(), defined.end(), [](char has) { return has; }),
                "AdamW::step: every parameter of a capturable optimizer must have a gradient");
  }
  NamedTensors moments(size_t index) const override {
    return {{"exp_avg", storage_.column(0, index)}, {"exp_avg_sq", storage_.column(1, index)}};
  }
  void update(const Tensor& scale) override {
    size_t run = 0;
    double factor = 0;  // a scale on a device is fetched once, and only for weights on the CPU
    for_each_run([&](const Run& at) {
      const auto part = [&](const Tensor& flat) { return flat.narrow(0, at.begin, at.size); };
      const auto values = part(at.segment.values), gradients = part(at.segment.gradients),
                 mean = part(at.segment.columns[0]), square = part(at.segment.columns[1]);
      if (internal::has_loop(values)) {
        if (factor == 0) factor = scale.defined() ? scale.item<double>() : 1;
        internal::adamw(values, gradients, mean, square, at.settings, steps_[at.first], factor);
      } else {
        TORCH_CHECK(!capturable_ || run < scalars_.size(), "AdamW::step: prepare_step must come first");
        internal::adamw(values, gradients, mean, square, at.settings,
                        capturable_ ? scalars_[run] : scalars(at),
                        scale.defined() ? scale.to(values.device()) : scale);
      }
      ++run;
    });
  }

 private:
  /// A stretch of weights that are updated alike.
  struct Run {
    const internal::FlatStorage::Segment& segment;
    size_t first;  ///< the tensor it begins with
    int64_t begin, size;
    internal::AdamWSettings settings;
  };

  template <class Work>
  void for_each_run(const Work& work) const {
    const auto alike = [&](size_t i) { return std::pair(steps_[i], decays_[i]); };
    const std::vector<char> all(capturable_ ? steps_.size() : 0, true);
    storage_.for_each_run(
        capturable_ ? all : storage_.defined(), alike,
        [&](const auto& segment, size_t first, int64_t begin, int64_t size) {
          const auto& options =
              static_cast<const torch::optim::AdamWOptions&>(param_groups()[segment.group].options());
          TORCH_CHECK_VALUE(!options.amsgrad(), "AdamW: amsgrad is not supported");
          work(Run{segment,
                   first,
                   begin,
                   size,
                   {options.lr(), std::get<0>(options.betas()), std::get<1>(options.betas()), options.eps(),
                    decays_[first] ? options.weight_decay() : 0, form_}});
        });
  }

  /// A run's rate and step, on its device.
  internal::AdamWScalars scalars(const Run& run) const {
    const auto kind = run.segment.values.options().dtype(torch::kFloat);
    return {torch::full({}, run.settings.lr, kind),
            torch::full({}, static_cast<double>(steps_[run.first]), kind)};
  }

  static void check(const torch::optim::AdamWOptions& options, const std::string& where,
                    internal::Problems& problems) {
    const auto complain = [&](const std::string& what, double value) {
      problems.add(where + what + ", but got " + c10::str(value));
    };
    const auto [beta1, beta2] = options.betas();
    if (!(options.lr() >= 0 && std::isfinite(options.lr()))) complain("lr must be at least 0", options.lr());
    if (!(beta1 >= 0 && beta1 < 1)) complain("the first of betas must be in [0, 1)", beta1);
    if (!(beta2 >= 0 && beta2 < 1)) complain("the second of betas must be in [0, 1)", beta2);
    if (!(options.eps() >= 0)) complain("eps must be at least 0", options.eps());
    if (!(options.weight_decay() >= 0)) complain("weight_decay must be at least 0", options.weight_decay());
    if (options.amsgrad())
      problems.add(where + "amsgrad is not supported (hint: torch::optim::AdamW has it)");
  }

  Form form_ = Form::torch;
  bool has_controllers_, capturable_ = false;
  std::vector<internal::AdamWScalars> scalars_;  ///< of each run, while capturable
};

}  // namespace peft
