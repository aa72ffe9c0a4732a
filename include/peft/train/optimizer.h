// AdamW: the optimizer of an adapter, on its flat storage, with clipping in the same pass.
#pragma once

#include <torch/optim/adamw.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/flat_storage.h"
#include "peft/core/problems.h"
#include "peft/kernels/adamw.h"

namespace peft {

/// Parameters that get options of their own: those whose name (`<site>.<method>.<tensor>`) `matches` says yes
/// to.
struct ParameterGroup {
  std::function<bool(const std::string&)> matches;
  torch::optim::AdamWOptions options;
};

/// AdamW over the tensors of an adapter that train: the arithmetic of `torch::optim::AdamW` in one pass over
/// flat storage, with the clipping of `torch::nn::utils::clip_grad_norm_` fused in.
///
/// Parameters that backward did not reach since `zero_grad` are skipped by update, decay and step counter, as
/// those without a gradient are in torch. (A foreign pass that writes to all gradients, such as torch's own
/// `clip_grad_norm_`, makes them count as reached: use `max_grad_norm`.) The gradients themselves stay
/// unclipped. A gradient that is not finite makes its weights so too, as in torch: watch the loss.
///
/// Methods with a controller (AdaLoRA, IncreLoRA) do their part in `step` and in `state`: there is nothing
/// else to call. Parameters a method adds while it trains become a group of their own, with `defaults` and
/// counters from 0.
///
/// Rates live in `param_groups()` as `torch::optim::AdamWOptions`, so schedulers of either library apply.
/// `max_grad_norm`: largest Euclidean norm of all gradients together; 0 switches clipping off.
///
/// Throws: c10::ValueError for an adapter with nothing that trains, options out of range, `amsgrad`, a group
/// that matches nothing. Paper: Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
/// Example:
/// ```
/// peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(2e-3).weight_decay(0.01),
/// /*max_grad_norm=*/1.0); optimizer.zero_grad(); loss.backward(); optimizer.step();
/// ```
class AdamW : public torch::optim::Optimizer {
 public:
  using Form = AdamWForm;

  /// One group.
  explicit AdamW(const Adapter& adapter, torch::optim::AdamWOptions options = {}, double max_grad_norm = 0)
      : AdamW(adapter, std::vector<ParameterGroup>{}, std::move(options), max_grad_norm) {}
  /// Several: a parameter belongs to the first group that matches it, the others to a last one with
  /// `defaults`. A group's options are taken as they are, none from `defaults`.
  AdamW(const Adapter& adapter, const std::vector<ParameterGroup>& groups,
        torch::optim::AdamWOptions defaults = {}, double max_grad_norm = 0)
      : AdamW(adapter, assign(adapter, groups, defaults, max_grad_norm), std::move(defaults), max_grad_norm) {
  }

  /// Which AdamW; `Form::torch` unless set.
  AdamW& form(Form form) {
    form_ = form;
    return *this;
  }
  Form form() const { return form_; }

  /// Takes parameters with such names out of the weight decay. Before the first step.
  AdamW& no_decay(const std::function<bool(const std::string&)>& matches) {
    TORCH_CHECK(std::all_of(steps_.begin(), steps_.end(), [](int64_t step) { return step == 0; }),
                "AdamW::no_decay must be called before the first step");
    for (size_t i = 0; i < names_.size(); ++i) decays_[i] = decays_[i] && !matches(names_[i]);
    storage_.drop_untouched();
    arrange();
    return *this;
  }

  double max_grad_norm() const { return max_grad_norm_; }
  /// The norm of all gradients in the last step, before it was clipped. Waits for the device. Needs clipping
  /// on.
  double last_grad_norm() const {
    TORCH_CHECK(norm_.defined(), "AdamW::last_grad_norm: there has been no step with max_grad_norm > 0");
    return norm_.item<double>();
  }

  /// Clears all gradients at once. torch's own `zero_grad`, called through the base class, works too and
  /// costs the next step a copy.
  void zero_grad() { storage_.zero_gradients(); }

  /// Updates every parameter that has a gradient. Returns the closure's loss, if there is one.
  Tensor step(LossClosure closure = nullptr) override {
    torch::NoGradGuard no_grad;
    Tensor loss;
    if (closure) {
      torch::AutoGradMode enable_grad(true);
      loss = closure();
    }
    TORCH_CHECK(param_groups().size() == groups_, "AdamW::step: the optimizer was made with ", groups_,
                " parameter groups, but has ", param_groups().size(),
                " (hint: name them in its constructor)");
    for (const auto& controller : controllers_) controller->add_penalty_gradients();
    storage_.gather();
    const auto scale = clip(storage_.defined());
    const StepContext context{scale, [this](const Tensor& tensor) { return is_reached(tensor); }};
    for (const auto& controller : controllers_) {
      const auto joined = controller->grow(context);
      if (!joined.empty()) append_group(joined);
    }
    const auto& defined = storage_.defined();
    for (size_t i = 0; i < defined.size(); ++i) steps_[i] += defined[i] ? 1 : 0;
    for (const auto& segment : storage_.segments()) {
      const auto& options =
          static_cast<const torch::optim::AdamWOptions&>(param_groups()[segment.group].options());
      TORCH_CHECK_VALUE(!options.amsgrad(), "AdamW: amsgrad is not supported");
      internal::AdamWSettings settings{
          options.lr(), std::get<0>(options.betas()), std::get<1>(options.betas()), options.eps(), 0, form_};
      for_each_run(segment, defined, [&](size_t first, int64_t begin, int64_t size) {
        settings.weight_decay = decays_[first] ? options.weight_decay() : 0;
        const auto part = [&](const Tensor& flat) { return flat.narrow(0, begin, size); };
        internal::adamw(part(segment.values), part(segment.gradients), part(segment.columns[0]),
                        part(segment.columns[1]), settings, steps_[first],
                        scale.defined() ? scale.to(segment.values.device()) : scale);
      });
    }
    for (size_t i = 0; i < defined.size(); ++i) {
      if (defined[i]) storage_.mark_written(i);
    }
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
    storage_ = internal::FlatStorage(tensors_, group_of_, /*columns=*/2);
    for (const auto& controller : controllers_) {
      for (const auto& group : controller->groups()) append_group(group);
    }
  }

  /// All that the next step depends on beside parameters and options: for each parameter, in the adapter's
  /// order,
  /// `<parameter>.exp_avg`, `.exp_avg_sq` and `.step`; for each group `param_groups.<i>.lr`. Moments are
  /// views.
  std::vector<std::pair<std::string, Tensor>> state() const {
    storage_.gather();  // the parameters may have changed their type since the last step
    std::vector<std::pair<std::string, Tensor>> result;
    for (const size_t i : model_order_) {
      result.emplace_back(names_[i] + ".exp_avg", storage_.column(0, i));
      result.emplace_back(names_[i] + ".exp_avg_sq", storage_.column(1, i));
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
    problems.raise("AdamW::load_state: the state does not fit this optimizer");
    for (size_t i = 0; i < names_.size(); ++i) {
      storage_.column(0, i).copy_(state.at(names_[i] + ".exp_avg"));
      storage_.column(1, i).copy_(state.at(names_[i] + ".exp_avg_sq"));
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
    TORCH_CHECK(archive.try_read("names", names) && names.isList(),
                "AdamW::load: this archive was not written by peft::AdamW");
    std::map<std::string, Tensor> state;
    const auto list = names.toList();
    for (size_t i = 0; i < list.size(); ++i) {
      archive.read("tensor_" + std::to_string(i), state[list.get(i).toStringRef()], /*is_buffer=*/true);
    }
    load_state(state);
  }

 private:
  struct Assignment {
    std::vector<std::string> names;
    std::vector<Tensor> tensors;
    std::vector<size_t> groups;  ///< of each tensor
    std::vector<torch::optim::AdamWOptions> options;

    std::vector<torch::optim::OptimizerParamGroup> param_groups() const {
      std::vector<torch::optim::OptimizerParamGroup> result;
      for (size_t group = 0; group < options.size(); ++group) {
        std::vector<Tensor> members;
        for (size_t i = 0; i < tensors.size(); ++i) {
          if (groups[i] == group) members.push_back(tensors[i]);
        }
        result.emplace_back(std::move(members), std::make_unique<torch::optim::AdamWOptions>(options[group]));
      }
      return result;
    }
  };

  AdamW(const Adapter& adapter, const Assignment& assignment, torch::optim::AdamWOptions defaults,
        double max_grad_norm)
      : torch::optim::Optimizer(assignment.param_groups(),
                                std::make_unique<torch::optim::AdamWOptions>(defaults)),
        controllers_(adapter.record().controllers),
        later_options_(std::move(defaults)),
        groups_(assignment.options.size()),
        first_groups_(groups_),
        max_grad_norm_(max_grad_norm) {
    // Newer LibTorchs replace a group's options that equal torch's defaults by this optimizer's.
    for (size_t i = 0; i < groups_; ++i) {
      static_cast<torch::optim::AdamWOptions&>(param_groups()[i].options()) = assignment.options[i];
    }
    names_ = assignment.names;
    tensors_ = assignment.tensors;
    group_of_ = assignment.groups;
    decays_.assign(names_.size(), true);
    steps_.assign(names_.size(), 0);
    for (size_t i = 0; i < names_.size(); ++i) model_order_.push_back(i);
    arrange();
    adapter.record().has_optimizer = true;
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

  static Assignment assign(const Adapter& adapter, const std::vector<ParameterGroup>& groups,
                           const torch::optim::AdamWOptions& defaults, double max_grad_norm) {
    internal::Problems problems;
    Assignment result;
    std::vector<char> used(groups.size() + 1, false);
    for (const auto& [name, tensor] : adapter.named_parameters()) {
      size_t group = 0;
      while (group < groups.size() && !groups[group].matches(name)) ++group;
      used[group] = true;
      result.names.push_back(name);
      result.tensors.push_back(tensor);
      result.groups.push_back(group);
      if (!tensor.is_leaf()) problems.add("'" + name + "' must be a leaf of the graph");
      if (!tensor.is_floating_point()) problems.add("'" + name + "' must be of a floating type");
    }
    std::set<const PieceImpl*> ruled;
    int growing = 0;
    for (const auto& controller : adapter.record().controllers) {
      for (const auto* piece : controller->pieces()) ruled.insert(piece);
      growing += controller->grows() ? 1 : 0;
    }
    if (growing > 1) problems.add("an adapter can hold one method that grows, but has " + c10::str(growing));
    for (const auto& entry : adapter.entries()) {
      const bool trains =
          !entry.piece->parameters().empty() && entry.piece->parameters().front().requires_grad();
      if (trains && entry.piece->needs_controller() && !ruled.count(entry.piece.get())) {
        problems.add("'" + entry.site->path() + "': the controller of '" + entry.piece->method() +
                     "' is missing (hint: copy models with peft::clone)");
      }
    }
    if (result.names.empty()) {
      problems.add("adapter '" + adapter.name() +
                   "' has nothing that trains (hint: was it loaded without trainable?)");
    }
    for (size_t i = 0; i < groups.size(); ++i) {
      if (!used[i] && !result.names.empty()) {
        problems.add("group " + std::to_string(i) + " matches none of the " +
                     std::to_string(result.names.size()) + " parameters, such as '" + result.names.front() +
                     "'");
      }
      check(groups[i].options, "group " + std::to_string(i) + ": ", problems);
      result.options.push_back(groups[i].options);
    }
    check(defaults, "", problems);
    if (used.back()) result.options.push_back(defaults);
    if (!(max_grad_norm >= 0 && std::isfinite(max_grad_norm))) {
      problems.add("max_grad_norm must be positive, or 0 for no clipping, but got " +
                   c10::str(max_grad_norm));
    }
    problems.raise("AdamW");
    return result;
  }

  /// Whether the present step has a gradient for a parameter.
  bool is_reached(const Tensor& tensor) const {
    const auto& defined = storage_.defined();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].is_same(tensor)) return defined[i];
    }
    return false;
  }

  /// Further parameters, as one group with the options the optimizer was made with.
  void append_group(const NamedTensors& joined) {
    std::vector<Tensor> members;
    for (const auto& [name, tensor] : joined) {
      model_order_.push_back(names_.size());
      names_.push_back(name);
      tensors_.push_back(tensor);
      members.push_back(tensor);
      group_of_.push_back(groups_);
      decays_.push_back(true);
      steps_.push_back(0);
    }
    add_param_group(torch::optim::OptimizerParamGroup(
        members, std::make_unique<torch::optim::AdamWOptions>(later_options_)));
    static_cast<torch::optim::AdamWOptions&>(param_groups().back().options()) = later_options_;
    storage_.append(members, groups_++);
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
    storage_ = internal::FlatStorage(tensors_, group_of_, /*columns=*/2);
  }

  /// Calls `work(first tensor, begin, size)` for each longest stretch of tensors that are updated alike.
  template <class Work>
  void for_each_run(const internal::FlatStorage::Segment& segment, const std::vector<char>& defined,
                    const Work& work) const {
    const auto& members = segment.members;
    for (size_t i = 0; i < members.size();) {
      const size_t first = members[i];
      const int64_t begin = storage_.place(first).offset;
      int64_t end = begin;
      for (; i < members.size(); ++i) {
        const size_t next = members[i];
        if (defined[next] != defined[first] || steps_[next] != steps_[first] ||
            decays_[next] != decays_[first]) {
          break;
        }
        end = storage_.place(next).offset + tensors_[next].numel();
      }
      if (defined[first] && end > begin) work(first, begin, end - begin);
    }
  }

  /// Measures the gradients and returns what to multiply them with; undefined with clipping off.
  Tensor clip(const std::vector<char>& defined) {
    if (max_grad_norm_ == 0) return {};
    Tensor sum = torch::zeros({}, torch::kDouble);
    for (const auto& segment : storage_.segments()) {
      const auto& members = segment.members;
      for (size_t i = 0; i < members.size();) {
        const int64_t begin = storage_.place(members[i]).offset;
        int64_t end = begin;
        const char is_defined = defined[members[i]];
        for (; i < members.size() && defined[members[i]] == is_defined; ++i) {
          end = storage_.place(members[i]).offset + tensors_[members[i]].numel();
        }
        if (!is_defined || end == begin) continue;
        auto part = internal::sum_of_squares(segment.gradients.narrow(0, begin, end - begin));
        // A sum that lies on a device stays there: nobody waits for it.
        if (sum.is_cpu() && !part.is_cpu()) sum = sum.to(part.device(), torch::kFloat);
        sum = sum + part.to(sum.options());
      }
    }
    norm_ = sum.sqrt();
    return torch::clamp_max(max_grad_norm_ / (norm_ + 1e-6), 1.0);
  }

  std::vector<std::string> names_;  ///< this and the next in storage order
  std::vector<Tensor> tensors_;
  std::vector<size_t> group_of_;
  std::vector<char> decays_;
  std::vector<int64_t> steps_;
  std::vector<size_t> model_order_;  ///< index into `names_` of each parameter in the adapter's order
  std::vector<std::shared_ptr<Controller>> controllers_;
  torch::optim::AdamWOptions later_options_;  ///< of groups that join during training
  size_t groups_ = 0, first_groups_ = 0;
  mutable internal::FlatStorage storage_;  ///< an arrangement of tensors that belong to the adapter
  Form form_ = Form::torch;
  double max_grad_norm_ = 0;
  Tensor norm_;

  static std::string lr_name(size_t group) { return "param_groups." + std::to_string(group) + ".lr"; }
};

}  // namespace peft
