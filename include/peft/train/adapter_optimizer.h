// AdapterOptimizer: what the optimizers of an adapter have in common.
#pragma once

#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/flat_storage.h"
#include "peft/core/problems.h"
#include "peft/kernels/cuda_graph.h"
#include "peft/kernels/sum_of_squares.h"
#include "peft/train/parameter_groups.h"

namespace peft {

/// An optimizer over the tensors of an adapter that train, which lie in flat storage: clears their gradients
/// at once, clips them as `torch::nn::utils::clip_grad_norm_` would, and does the part of the methods that
/// have a controller (AdaLoRA, IncreLoRA) in `step` and in `state`: there is nothing else to call.
///
/// Parameters that backward did not reach since `zero_grad` are skipped by update, decay and step counter, as
/// those without a gradient are in torch. (A foreign pass that writes to all gradients, such as torch's own
/// `clip_grad_norm_`, makes them count as reached: use `max_grad_norm`.) The gradients themselves stay
/// unclipped. A gradient that is not finite makes its weights so too, as in torch: watch the loss.
///
/// Parameters a method adds while it trains become a group of their own, with the options the optimizer was
/// made with and counters from 0. Rates live in `param_groups()`, so schedulers of either library apply.
class AdapterOptimizer : public torch::optim::Optimizer {
 public:
  double max_grad_norm() const { return max_grad_norm_; }
  /// The norm of all gradients in the last step, before it was clipped. Waits for the device. Needs clipping
  /// on.
  double last_grad_norm() const {
    TORCH_CHECK(norm_.defined(), name_, "::last_grad_norm: there has been no step with max_grad_norm > 0");
    return norm_.item<double>();
  }

  /// Clears all gradients at once. torch's own `zero_grad`, called through the base class, works too and
  /// costs the next step a copy.
  void zero_grad() { storage_.zero_gradients(); }

  /// Undefines the gradients that `zero_grad` left and backward did not reach, for whoever writes to all
  /// gradients there are.
  void drop_untouched_gradients() { storage_.drop_untouched(); }

  /// Divides by the loss's scale, given inverted, what backward left for controllers beside gradients.
  void unscale_controllers(const Tensor& inverse) {
    const torch::NoGradGuard no_grad;
    for (const auto& controller : controllers_) controller->unscale(inverse);
  }

  /// Updates every parameter that has a gradient. Returns the closure's loss, if there is one.
  Tensor step(LossClosure closure = nullptr) override {
    torch::NoGradGuard no_grad;
    Tensor loss;
    if (closure) {
      torch::AutoGradMode enable_grad(true);
      loss = closure();
    }
    TORCH_CHECK(param_groups().size() == groups_, name_, "::step: the optimizer was made with ", groups_,
                " parameter groups, but has ", param_groups().size(),
                " (hint: name them in its constructor)");
    for (const auto& controller : controllers_) controller->add_penalty_gradients();
    storage_.gather();
    storage_.mark_written();  // now, while the tensors are in the cache
    const auto scale = clip();
    const StepContext context{scale, [this](const Tensor& tensor) { return is_reached(tensor); }};
    for (const auto& controller : controllers_) {
      const auto joined = controller->grow(context);
      if (!joined.empty()) append_group(joined);
    }
    count_step();
    update(scale);
    for (const auto& controller : controllers_) {
      controller->after_update(context);
      for (const auto* piece : controller->pieces()) piece->mark();
    }
    return loss;
  }

  /// True for a group that joined during training and begins the schedule anew.
  bool restarts_schedule(size_t group) const {
    return group >= first_groups_ &&
           std::any_of(controllers_.begin(), controllers_.end(),
                       [](const auto& controller) { return controller->restarts_schedule(); });
  }

  /// Makes the later groups those the adapter's controllers have now, after these were given another state.
  /// All moments and counters begin anew, for `load_state` to fill.
  void follow_growth() {
    if (std::none_of(controllers_.begin(), controllers_.end(), [](const auto& c) { return c->grows(); }))
      return;
    const auto first = static_cast<size_t>(std::count_if(
        group_of_.begin(), group_of_.end(), [&](size_t group) { return group < first_groups_; }));
    std::erase_if(group_of_, [&](size_t group) { return group >= first_groups_; });
    std::erase_if(model_order_, [&](size_t index) { return index >= first; });
    names_.resize(first);
    tensors_.resize(first);
    decays_.resize(first);
    steps_.assign(first, 0);
    auto& groups = param_groups();
    while (groups.size() > first_groups_) groups.pop_back();  // LibTorch 1.13's cannot be assigned
    groups_ = first_groups_;
    store();
    begin_moments(0);
    for (const auto& controller : controllers_) {
      for (const auto& group : controller->groups()) {
        NamedTensors joined;  // less what the optimizer was made with, after some growth
        for (const auto& item : group) {
          if (!index_.count(item.second.unsafeGetTensorImpl())) joined.push_back(item);
        }
        if (!joined.empty()) append_group(joined);
      }
    }
  }
  /// Whether a state, as `state` gives it, has every parameter that the optimizer was made with.
  bool has_first_parameters(const std::map<std::string, Tensor>& state) const {
    for (size_t i = 0; i < names_.size(); ++i) {
      if (group_of_[i] < first_groups_ && !state.count(names_[i] + ".step")) return false;
    }
    return true;
  }

  /// All that the next step depends on beside parameters and options: for each parameter, in the adapter's
  /// order, `<parameter>.<moment>` of each moment and `<parameter>.step`; for each group
  /// `param_groups.<i>.lr`. Moments are views.
  NamedTensors state() const {
    storage_.gather();  // the parameters may have changed their type since the last step
    NamedTensors result;
    for (const size_t i : model_order_) {
      for (auto& [name, tensor] : moments(i)) result.emplace_back(names_[i] + "." + name, tensor);
      result.emplace_back(names_[i] + ".step", torch::scalar_tensor(steps_[i], torch::kLong));
    }
    for (size_t i = 0; i < groups_; ++i) {
      result.emplace_back(lr_name(i),
                          torch::scalar_tensor(param_groups()[i].options().get_lr(), torch::kDouble));
    }
    return result;
  }
  /// Takes over what `state` gave. Throws c10::ValueError, before anything is changed, listing every tensor
  /// that is missing, extra or of another shape or type.
  void load_state(const std::map<std::string, Tensor>& state) {
    torch::NoGradGuard no_grad;
    internal::Problems problems;
    check_state(state, problems);
    problems.raise(std::string(name_) + "::load_state: the state does not fit this optimizer");
    for (size_t i = 0; i < names_.size(); ++i) {
      for (auto& [name, tensor] : moments(i)) tensor.copy_(state.at(names_[i] + "." + name));
      steps_[i] = state.at(names_[i] + ".step").item<int64_t>();
    }
    for (size_t i = 0; i < groups_; ++i) {
      param_groups()[i].options().set_lr(state.at(lr_name(i)).item<double>());
    }
  }
  /// Adds what keeps `load_state` from taking this state.
  void check_state(const std::map<std::string, Tensor>& given, internal::Problems& problems) const {
    internal::check_tensors(state(), given, problems);
  }

  /// Writes `state` to an archive, for `torch::save(optimizer, path)`. Not torch's own format, whose tensors
  /// have numbers instead of names.
  void save(torch::serialize::OutputArchive& archive) const override {
    c10::List<std::string> names;
    for (const auto& [name, tensor] : state()) {
      archive.write("tensor_" + std::to_string(names.size()), tensor.clone(), /*is_buffer=*/true);
      names.push_back(name);
    }
    archive.write("names", c10::IValue(names));
  }
  /// Reads what `save` wrote, for `torch::load(optimizer, path)`; strict as `load_state`.
  void load(torch::serialize::InputArchive& archive) override {
    c10::IValue names;
    TORCH_CHECK(archive.try_read("names", names) && names.isList(), name_,
                "::load: this archive was not written by peft::", name_);
    std::map<std::string, Tensor> state;
    const auto list = names.toList();
    for (size_t i = 0; i < list.size(); ++i) {
      archive.read("tensor_" + std::to_string(i), state[list.get(i).toStringRef()], /*is_buffer=*/true);
    }
    load_state(state);
  }

 protected:
  /// `columns`: values that are kept for each weight, in the storage's columns.
  AdapterOptimizer(const char* name, const Adapter& adapter, const internal::Assignment& assignment,
                   size_t columns)
      : torch::optim::Optimizer(assignment.param_groups(), assignment.defaults->clone()),
        names_(assignment.names),
        tensors_(assignment.tensors),
        group_of_(assignment.groups),
        name_(name),
        columns_(columns),
        controllers_(adapter.record().controllers),
        later_options_(assignment.defaults->clone()),
        groups_(assignment.options.size()),
        first_groups_(groups_),
        max_grad_norm_(assignment.max_grad_norm) {
    // Newer LibTorchs replace a group's options that equal torch's defaults by this optimizer's.
    for (size_t i = 0; i < groups_; ++i) param_groups()[i].set_options(assignment.options[i]->clone());
    decays_.assign(names_.size(), true);
    steps_.assign(names_.size(), 0);
    for (size_t i = 0; i < names_.size(); ++i) model_order_.push_back(i);
    arrange();
    adapter.record().has_optimizer = true;
  }

  /// Updates the tensors that `storage_.defined()` says have a gradient, whose steps are counted.
  /// `scale`: what the gradients are to be multiplied with; undefined means 1.
  virtual void update(const Tensor& scale) = 0;
  /// What is kept of a tensor's past gradients, each under its name.
  virtual NamedTensors moments(size_t index) const = 0;
  /// Begins the moments that are not columns anew for the tensors from `first` on; there are none past the
  /// last. Constructors call it with 0.
  virtual void begin_moments(size_t /*first*/) {}
  virtual void count_step() {
    TORCH_CHECK(!internal::is_capturing(tensors_.front().device()), name_,
                "::step: a CUDA graph would repeat the number and the rates of one step (hint: "
                "AdamW::capturable)");
    const auto& defined = storage_.defined();
    for (size_t i = 0; i < defined.size(); ++i) steps_[i] += defined[i] ? 1 : 0;
  }

  /// Takes parameters with such names out of the weight decay, those that join later too. Before the first
  /// step.
  void exclude_from_decay(const std::function<bool(const std::string&)>& matches) {
    TORCH_CHECK(std::all_of(steps_.begin(), steps_.end(), [](int64_t step) { return step == 0; }), name_,
                "::no_decay must be called before the first step");
    for (size_t i = 0; i < names_.size(); ++i) decays_[i] = decays_[i] && !matches(names_[i]);
    undecayed_.push_back(matches);
    storage_.drop_untouched();
    arrange();
    begin_moments(0);
  }

  std::vector<std::string> names_;  ///< this and the next in storage order
  std::vector<Tensor> tensors_;
  std::vector<size_t> group_of_;
  std::vector<char> decays_;
  std::vector<int64_t> steps_;
  mutable internal::FlatStorage storage_;  ///< an arrangement of tensors that belong to the adapter

 private:
  /// Whether the present step has a gradient for a parameter.
  bool is_reached(const Tensor& tensor) const {
    const auto found = index_.find(tensor.unsafeGetTensorImpl());
    return found != index_.end() && storage_.defined()[found->second];
  }

  void store() {
    storage_ = internal::FlatStorage(tensors_, group_of_, columns_);
    index_.clear();
    for (size_t i = 0; i < tensors_.size(); ++i) index_[tensors_[i].unsafeGetTensorImpl()] = i;
  }

  /// Further parameters, as one group with the options the optimizer was made with.
  void append_group(const NamedTensors& joined) {
    const auto first = names_.size();
    std::vector<Tensor> members;
    for (const auto& [name, tensor] : joined) {
      index_[tensor.unsafeGetTensorImpl()] = names_.size();
      model_order_.push_back(names_.size());
      names_.push_back(name);
      tensors_.push_back(tensor);
      members.push_back(tensor);
      group_of_.push_back(groups_);
      decays_.push_back(std::none_of(undecayed_.begin(), undecayed_.end(),
                                     [&name = name](const auto& matches) { return matches(name); }));
      steps_.push_back(0);
    }
    add_param_group(torch::optim::OptimizerParamGroup(members, later_options_->clone()));
    param_groups().back().set_options(later_options_->clone());
    storage_.append(members, groups_++);
    begin_moments(first);
  }

  /// Lays the tensors out: those that share decay together, then as `flat_order` says. Before the first step.
  void arrange() {
    auto order = internal::flat_order(names_);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return decays_[a] > decays_[b]; });
    const auto permute = [&](auto& list) {
      auto sorted = list;
      for (size_t i = 0; i < order.size(); ++i) sorted[i] = list[order[i]];
      list = std::move(sorted);
    };
    permute(names_);
    permute(tensors_);
    permute(group_of_);
    permute(decays_);
    std::vector<size_t> position(order.size());
    for (size_t i = 0; i < order.size(); ++i) position[order[i]] = i;
    for (auto& index : model_order_) index = position[index];
    store();
  }

  /// Measures the gradients and returns what to multiply them with; undefined with clipping off. A sum that
  /// lies on a device stays there: nobody waits for it.
  Tensor clip() {
    if (max_grad_norm_ == 0) return {};
    double sum = 0;
    Tensor device_sum;
    const auto one_kind = [](size_t) { return true; };
    storage_.for_each_run(
        storage_.defined(), one_kind, [&](const auto& segment, size_t, int64_t begin, int64_t size) {
          const auto range = segment.gradients.narrow(0, begin, size);
          if (!internal::has_loop(range)) {
            const auto part = internal::sum_of_squares(range);
            device_sum = device_sum.defined() ? device_sum + part.to(device_sum.device()) : part;
          } else if (range.scalar_type() == torch::kFloat) {
            sum += internal::sum_of_squares(range.template data_ptr<float>(), size);
          } else {
            sum += internal::sum_of_squares(range.template data_ptr<double>(), size);
          }
        });
    if (device_sum.defined()) {
      norm_ = (device_sum + sum).sqrt();
      return torch::clamp_max(max_grad_norm_ / (norm_ + 1e-6), 1.0);
    }
    norm_ = torch::scalar_tensor(std::sqrt(sum), torch::kDouble);
    const double factor = max_grad_norm_ / (std::sqrt(sum) + 1e-6);
    return torch::scalar_tensor(factor > 1 ? 1.0 : factor, torch::kDouble);  // NaN stays
  }

  static std::string lr_name(size_t group) { return "param_groups." + std::to_string(group) + ".lr"; }

  const char* name_;  ///< the optimizer's, for messages
  size_t columns_;
  std::unordered_map<const c10::TensorImpl*, size_t> index_;        ///< of each of `tensors_`
  std::vector<std::function<bool(const std::string&)>> undecayed_;  ///< names, by predicates
  std::vector<size_t> model_order_;  ///< index into `names_` of each parameter in the adapter's order
  std::vector<std::shared_ptr<Controller>> controllers_;
  std::unique_ptr<torch::optim::OptimizerOptions> later_options_;  ///< of groups that join during training
  size_t groups_ = 0, first_groups_ = 0;
  double max_grad_norm_ = 0;
  Tensor norm_;
};

}  // namespace peft
