// Reparametrized: adapters on the weights of any model, without a change to its code.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/core/random_state.h"
#include "peft/model/reparametrized_layers.h"
#include "peft/model/reparametrized_sites.h"
#include "peft/model/targets.h"

namespace peft {
namespace internal {

/// One tensor of a model that effective weights take the place of.
struct Replacement {
  const Slot* slot;
  bool is_bias;
  size_t number;  ///< among all of the model
  Tensor value;

  Tensor& member() const { return *(is_bias ? slot->bias : slot->weight)(*slot->module); }
};

/// Effective weights in the members that a model reads, while this lives.
class InPlace {
 public:
  explicit InPlace(std::vector<Replacement>& replacements) : replacements_(replacements) { swap(); }
  ~InPlace() { swap(); }
  InPlace(const InPlace&) = delete;
  InPlace& operator=(const InPlace&) = delete;

 private:
  void swap() {
    for (auto& replacement : replacements_) std::swap(replacement.member(), replacement.value);
  }
  std::vector<Replacement>& replacements_;
};

/// Tells which of several tensors a result depends on, once that was calculated and while it lives: those
/// from which the history of a living tensor comes.
class Dependence {
 public:
  /// Puts an alias with a history of its own in the place of a tensor that requires a gradient.
  void watch(Tensor& tensor) {
    tensor = tensor.view_as(tensor);
    const auto& node = tensor.grad_fn();
    TORCH_CHECK(node, "check_on_path: in InferenceMode nothing tells what a result depends on");
    // By now a history may be gone, with a backward that came through here.
    tensor.register_hook(
        [reached = reached_.emplace_back(std::make_shared<bool>(false))](const Tensor&) { *reached = true; });
    nodes_.push_back(node);
    counts_.push_back(count(nodes_.back()));
  }
  /// True if something was calculated with the i-th tensor.
  bool used(size_t i) const { return count(nodes_.at(i)) > counts_.at(i) || *reached_.at(i); }

 private:
  using Node = decltype(torch::autograd::Edge::function);
  static size_t count(const Node& node) { return static_cast<size_t>(node.use_count()); }
  std::vector<Node> nodes_;
  std::vector<size_t> counts_;
  std::vector<std::shared_ptr<bool>> reached_;
};

/// The models that run on this thread.
class Running {
 public:
  explicit Running(const void* model) { models_.push_back(model); }
  ~Running() { models_.pop_back(); }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  static bool holds(const void* model) {
    return std::find(models_.begin(), models_.end(), model) != models_.end();
  }

 private:
  static inline thread_local std::vector<const void*> models_;
};

template <class Model>
struct ModuleOf {
  using Type = Model;
};
template <class Model>
requires requires { typename Model::ContainedType; }
struct ModuleOf<Model> {
  using Type = typename Model::ContainedType;
};

}  // namespace internal

/// A model whose code stays as it is, with a site for every weight in it that its layers read: Linear,
/// Conv1d/2d/3d, Embedding, LayerNorm, MultiheadAttention (`in_proj`, `out_proj`), LSTM, GRU, RNN and their
/// cells (each matrix), batch, group and instance norms, layers and sites of this library, and tensors of the
/// model's own classes whose members it is told (`member`). Any weight method goes there, by the paths of the
/// model's modules, which are also those of its checkpoints and of Hugging Face's adapter files.
///
/// A forward puts the effective weights in the place of the members that the layers read, runs the model's
/// own and takes them out again, also when it throws. So methods act through W′ alone: dropout on their input
/// has no effect, methods on activations and batches of several adapters are refused, and a weight and its
/// gradient are made whole; `merge` makes inference cost what the model's does. A method of the model other
/// than its forward runs by `run`. While adapters are active, forwards of several threads wait for each
/// other, and `base` must not be run in between; without, and merged, they run side by side. Not for
/// nn::Sequential, which cannot tell the arguments of a forward that takes what the model's takes.
///
/// A model may calculate with something else than the layers' weights: a copy it has kept, a part that it
/// runs without gradients. Therefore the first forward that trains a weight looks whether the output depends
/// on it, and throws if not; `check_on_path` does the same at any time. `may_skip` is for parts that some
/// forwards leave out.
///
/// `clone` needs a model that derives from nn::Cloneable.
///
/// Example:
/// ```
/// nn::TransformerEncoder encoder(nn::TransformerEncoderLayer(512, 8), 6);
/// peft::Reparametrized model(encoder);
/// auto adapter = peft::add_adapter(*model, peft::LoraOptions(8), peft::named({"self_attn", "linear1"}));
/// auto y = model->forward(x, mask);
/// ```
template <class Model>
class ReparametrizedImpl
    : public internal::MirrorRoot<typename internal::ModuleOf<Model>::Type, ReparametrizedImpl<Model>> {
  static_assert(!WeightLayer<Model>, "peft::Reparametrized: for a single layer there is peft::Adapted");

 public:
  /// The model's class: of a holder, what it holds.
  using Module = typename internal::ModuleOf<Model>::Type;
  static_assert(std::derived_from<Module, nn::Module>,
                "peft::Reparametrized<Model> needs a module or its holder");

  /// `members`: where the model's own classes keep tensors that adapters are to change.
  explicit ReparametrizedImpl(std::shared_ptr<Module> model, std::vector<Member> members = {})
      : Root(std::move(model), std::move(members)) {}
  explicit ReparametrizedImpl(const nn::ModuleHolder<Module>& model, std::vector<Member> members = {})
      : ReparametrizedImpl(model.ptr(), std::move(members)) {}

  /// The model's forward on the effective weights.
  template <class... Arguments>
  requires requires(Module& model, Arguments&&... arguments) {
    model.forward(std::forward<Arguments>(arguments)...);
  }
  auto forward(Arguments&&... arguments) {
    return run([&](Module& model) { return model.forward(std::forward<Arguments>(arguments)...); });
  }

  /// What `function` makes of the model on the effective weights. Throws: c10::Error for trained weights that
  /// nothing was calculated with.
  ///
  /// Example:
  /// ```
  /// auto code = model->run([&](NetImpl& net) { return net.encode(x); });
  /// ```
  template <std::invocable<Module&> Function>
  auto run(Function&& function) {
    return run_checked(function,
                       this->is_training() && torch::GradMode::is_enabled() ? Check::trained : Check::none);
  }

  /// Runs the forward once and looks whether its output depends on every weight that an active adapter
  /// changes. Leaves the random generator alone. Throws: c10::ValueError naming the sites that it does not
  /// depend on; when no active adapter changes a weight.
  template <class... Arguments>
  void check_on_path(Arguments&&... arguments) {
    const internal::RandomStateGuard kept;
    const torch::AutoGradMode with_gradients(true);
    auto call = [&](Module& model) { return model.forward(std::forward<Arguments>(arguments)...); };
    run_checked(call, Check::all);
  }

  /// Lets a forward that trains leave out modules with these paths, or whose path ends in a dot and one of
  /// them, and all below them: experts that get no token, layers that are dropped.
  void may_skip(std::vector<std::string> names) {
    skipped_.exclude.insert(skipped_.exclude.end(), names.begin(), names.end());
  }

 private:
  using Root = internal::MirrorRoot<Module, ReparametrizedImpl>;
  friend Root;
  /// Of which weights a run looks whether its result depends on them.
  enum class Check { none, trained, all };

  template <class Function>
  auto run_checked(Function& function, Check check) {
    // A model that calls the object which it is run by.
    if (internal::Running::holds(this)) return function(*this->base);
    const internal::Running running(this);
    const ForwardScope scope;
    auto replacements = changed();
    TORCH_CHECK_VALUE(check != Check::all || !replacements.empty(),
                      "check_on_path: no active adapter changes a weight of this ", this->name());
    std::unique_lock alone(*mutex_, std::defer_lock);
    std::shared_lock beside(*mutex_, std::defer_lock);
    replacements.empty() ? beside.lock() : alone.lock();

    internal::Dependence dependence;
    std::vector<const internal::Replacement*> watched;
    for (auto& replacement : replacements) {
      auto& value = replacement.value;
      if (check == Check::all) value = value.detach().requires_grad_();
      if (!is_due(replacement, check)) continue;
      dependence.watch(value);
      watched.push_back(&replacement);
    }
    const internal::InPlace in_place(replacements);
    using Result = std::invoke_result_t<Function&, Module&>;
    if constexpr (std::is_void_v<Result>) {
      function(*this->base);
      settle(watched, dependence, check, /*keeps_history=*/true);
    } else {
      auto result = function(*this->base);
      settle(watched, dependence, check, /*keeps_history=*/!std::is_arithmetic_v<Result>);
      return result;
    }
  }

  /// The effective weights that differ from the base's.
  std::vector<internal::Replacement> changed() const {
    std::vector<internal::Replacement> replacements;
    size_t number = 0;
    for (const auto& slot : this->slots_) {
      const auto before = slot.site->base_weights(), after = slot.site->effective();
      const auto note = [&](const Tensor& from, const Tensor& to, bool is_bias) {
        if (!to.is_same(from)) replacements.push_back({&slot, is_bias, number, to});
        ++number;
      };
      note(before.weight, after.weight, /*is_bias=*/false);
      note(before.bias, after.bias, /*is_bias=*/true);
    }
    return replacements;
  }

  bool is_due(const internal::Replacement& replacement, Check check) const {
    if (check == Check::all) return true;
    return check == Check::trained && replacement.value.requires_grad() &&
           !on_path_.count(replacement.number) &&
           !internal::is_excluded(skipped_, replacement.slot->site->path());
  }

  /// Remembers the weights that the result depends on; throws if there are others. A result without a history
  /// tells nothing, unless a backward came through.
  void settle(const std::vector<const internal::Replacement*>& watched,
              const internal::Dependence& dependence, Check check, bool keeps_history) {
    internal::Problems problems;
    bool tells = keeps_history || check == Check::all;
    for (size_t i = 0; i < watched.size(); ++i) tells = tells || dependence.used(i);
    if (!tells) return;
    for (size_t i = 0; i < watched.size(); ++i) {
      if (dependence.used(i)) {
        on_path_.insert(watched[i]->number);
        continue;
      }
      auto text = "the model's result does not depend on the adapted '" + watched[i]->slot->site->path() +
                  "'" + (watched[i]->is_bias ? " (its bias)" : "");
      if (problems.empty()) text += ": its code reads another tensor there, or runs it without gradients";
      if (problems.empty() && check == Check::trained) text += " (hint: may_skip, where that is meant)";
      problems.add(std::move(text));
    }
    problems.raise(check == Check::all ? "check_on_path" : "Reparametrized");
  }

  void copy_settings(const ReparametrizedImpl& other) { skipped_ = other.skipped_; }

  Origin skipped_;            ///< its `exclude`
  std::set<size_t> on_path_;  ///< by number
  std::shared_ptr<std::shared_mutex> mutex_ = std::make_shared<std::shared_mutex>();
};

/// Holder of `ReparametrizedImpl`. `Model`: a module holder, or a class of modules. Example:
/// `peft::Reparametrized model(std::make_shared<Net>(), {peft::member("gate", &Net::gate)});`
template <class Model>
class Reparametrized : public nn::ModuleHolder<ReparametrizedImpl<Model>> {
  using Module = typename internal::ModuleOf<Model>::Type;

 public:
  using Impl = ReparametrizedImpl<Model>;
  using nn::ModuleHolder<Impl>::ModuleHolder;
  Reparametrized(std::shared_ptr<Module> model, std::vector<Member> members)
      : nn::ModuleHolder<Impl>(std::make_shared<Impl>(std::move(model), std::move(members))) {}
  Reparametrized(const nn::ModuleHolder<Module>& model, std::vector<Member> members)
      : Reparametrized(model.ptr(), std::move(members)) {}

  template <class... Arguments>
  auto operator()(Arguments&&... arguments) {
    return (*this)->forward(std::forward<Arguments>(arguments)...);
  }
};
template <class Module>
Reparametrized(std::shared_ptr<Module>, std::vector<Member> = {}) -> Reparametrized<Module>;
template <class Holder>
requires requires { typename Holder::ContainedType; }
Reparametrized(Holder, std::vector<Member> = {})->Reparametrized<Holder>;

}  // namespace peft
