// Checkpointing: runs a part of a model without keeping what its backward needs, and again in backward.
#pragma once

#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <set>
#include <type_traits>
#include <utility>
#include <vector>

#include "peft/core/activation.h"
#include "peft/core/compat.h"
#include "peft/core/forward_state.h"
#include "peft/core/input.h"
#include "peft/core/problems.h"
#include "peft/core/random_state.h"

namespace peft {
namespace internal {

/// The trainable tensors, other than `inputs`, that a gradient of `outputs` reaches. Throws where a tensor
/// with a history from before `first` is reached, which nobody could hand its gradient to.
inline std::vector<Tensor> trainable_leaves(const std::vector<Tensor>& outputs,
                                            const std::vector<Tensor>& inputs, uint64_t first) {
  using torch::autograd::Node;
  std::vector<Node*> open;
  std::set<const Node*> seen;
  const auto visit = [&](Node* node) {
    if (node && seen.insert(node).second) open.push_back(node);
  };
  std::set<const at::TensorImpl*> own;
  for (const auto& input : inputs) own.insert(input.unsafeGetTensorImpl());
  for (const auto& output : outputs) {
    if (output.defined() && output.requires_grad()) {
      visit(torch::autograd::impl::gradient_edge(output).function.get());
    }
  }
  std::vector<Tensor> leaves;
  while (!open.empty()) {
    auto* node = open.back();
    open.pop_back();
    if (const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      if (!own.count(leaf->variable.unsafeGetTensorImpl())) leaves.push_back(leaf->variable);
      continue;
    }
    // A cast keeps nothing for its backward, so that one of a trainable tensor may serve many forwards.
    const bool is_cast = node->name().starts_with("ToCopyBackward");
    TORCH_CHECK(is_cast || node->sequence_nr() >= first,
                "checkpoint: the function uses a tensor that was calculated outside and needs a gradient, ",
                "by ", node->name(), " (hint: give it to checkpoint as an input)");
    for (const auto& edge : node->next_edges()) visit(edge.function.get());
  }
  return leaves;
}

/// A function on tensors, run so that it can be run again.
class Checkpointed {
 public:
  using Tensors = std::vector<Tensor>;
  using Function = std::function<Tensors(const Tensors&)>;

  /// What one run used and made.
  struct Run {
    Tensors inputs;   ///< detached; those whose original needs a gradient need one, too
    Tensors outputs;  ///< with their history, then what the function left in the forward's scope
    Tensors leaves;   ///< the trainable tensors a gradient reaches
    std::vector<ForwardScope::Made> left;  ///< in the scope, by number after the outputs
  };

  /// `inputs`: those of the function, then the tensors in the scope.
  Checkpointed(Function function, size_t arity, std::vector<ForwardScope::Made> made)
      : function_(std::move(function)), arity_(arity), made_(std::move(made)) {}

  /// Runs it in the scope that is open.
  Run run(const Tensors& originals) const {
    const torch::AutoGradMode with_history(true);
    Run result;
    for (const auto& original : originals) {
      auto input = original.defined() ? original.detach() : original;
      if (original.defined() && original.requires_grad()) input.requires_grad_();
      result.inputs.push_back(std::move(input));
    }
    auto& scope = ForwardScope::state();
    auto from = result.inputs.begin() + static_cast<std::ptrdiff_t>(arity_);
    scope.made = made_;
    for (auto& made : scope.made) {
      for (auto& tensor : made.tensors) tensor = *from++;
    }
    struct Again {
      Again() : before(std::exchange(runs_again, true)) {}
      ~Again() { runs_again = before; }
      bool before;
    };
    const Again again;
    const auto first = at::sequence_number::peek();
    result.outputs = function_(
        Tensors(result.inputs.begin(), result.inputs.begin() + static_cast<std::ptrdiff_t>(arity_)));
    result.left.assign(scope.made.begin() + static_cast<std::ptrdiff_t>(made_.size()), scope.made.end());
    for (const auto& made : result.left) {
      result.outputs.insert(result.outputs.end(), made.tensors.begin(), made.tensors.end());
    }
    result.leaves = trainable_leaves(result.outputs, result.inputs, first);
    return result;
  }

 private:
  Function function_;
  size_t arity_;
  std::vector<ForwardScope::Made> made_;  ///< what was in the scope before, to be filled with the inputs
};

/// The node of a checkpointed function: keeps its inputs, and runs it again for its gradients.
class CheckpointNode final : public torch::autograd::Node {
  using Tensors = std::vector<Tensor>;

 public:
  CheckpointNode(Checkpointed function, RandomState before)
      : function_(std::move(function)), before_(std::move(before)) {}

  /// Hands the outputs of a run their history.
  void adopt(const Tensors& originals, const Checkpointed::Run& run) {
    for (const auto& input : originals) inputs_.emplace_back(input, /*is_output=*/false);
    auto edges = torch::autograd::collect_next_edges(originals);
    for (const auto& leaf : run.leaves) {
      TORCH_CHECK(torch::autograd::impl::hooks(leaf).empty(), "checkpoint: a trainable tensor of shape ",
                  shape_text(leaf.sizes()), " has a hook, which would change its gradient twice");
      leaves_.push_back(leaf);
      versions_.push_back(leaf._version());
      edges.push_back(torch::autograd::impl::gradient_edge(leaf));
    }
    for (const auto& output : run.outputs) {
      differs_.push_back(output.defined() && output.requires_grad());
    }
    set_next_edges(std::move(edges));
    after_ = before_.now();
    scope_ = ForwardScope::state().seen;
  }

  std::string name() const override { return "CheckpointBackward"; }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& input : inputs_) input.reset_data();
    released_ = true;
  }

 protected:
  Tensors apply(Tensors&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    TORCH_CHECK(!torch::GradMode::is_enabled(),
                "checkpoint: gradients of gradients are not there for a part of a model that is run again "
                "(hint: create_graph asks for them; run without checkpoints)");
    for (size_t i = 0; i < leaves_.size(); ++i) {
      TORCH_CHECK(leaves_[i]._version() == versions_[i], "checkpoint: a trainable tensor of shape ",
                  shape_text(leaves_[i].sizes()), " was changed between forward and backward");
    }
    Tensors originals;
    for (auto& input : inputs_) originals.push_back(input.unpack());
    const auto run = again(originals);

    Tensors outputs, arrived, wanted;
    for (size_t i = 0, given = 0; i < run.outputs.size(); ++i) {
      if (!differs_[i]) continue;
      const auto& gradient = gradients[given++];
      if (!gradient.defined()) continue;
      outputs.push_back(run.outputs[i]);
      arrived.push_back(gradient);
    }
    Tensors targets = run.inputs;
    targets.insert(targets.end(), leaves_.begin(), leaves_.end());
    Tensors result(targets.size());
    std::vector<size_t> places;
    for (size_t i = 0; i < targets.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      places.push_back(i);
      wanted.push_back(targets[i]);
    }
    if (outputs.empty() || wanted.empty()) return result;
    auto found = torch::autograd::grad(outputs, wanted, arrived, /*retain_graph=*/false,
                                       /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = std::move(found[i]);
    return result;
  }

 private:
  /// The function under what it ran under in forward.
  Checkpointed::Run again(const Tensors& originals) const {
    const RowState rows;
    TORCH_CHECK((rows_.adapters || !rows.adapters) && (rows_.tasks.defined() || !rows.tasks.defined()),
                "checkpoint: backward runs under RowAdapters or TaskIds that its forward did not have");
    std::optional<RowAdapters> adapters;
    if (rows_.adapters) adapters.emplace(*rows_.adapters);
    std::optional<TaskIds> tasks;
    if (rows_.tasks.defined()) tasks.emplace(rows_.tasks);

    const RandomStateGuard drawn(before_.now());
    before_.restore();
    const ForwardScope scope(scope_);
    const AutocastGuard autocast(autocast_);
    auto run = function_.run(originals);
    const auto same = [](const Tensors& a, const Tensors& b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                        [](const Tensor& x, const Tensor& y) { return x.is_same(y); });
    };
    std::vector<bool> differs;
    for (const auto& output : run.outputs) differs.push_back(output.defined() && output.requires_grad());
    TORCH_CHECK(same(run.leaves, leaves_) && differs == differs_,
                "checkpoint: run again, the function reached other trainable tensors than in forward (hint: "
                "adapters were added, removed, frozen or merged before backward)");
    TORCH_CHECK(before_.now() == after_,
                "checkpoint: run again, the function drew other random numbers than in forward (hint: the "
                "model was switched between train() and eval() before backward)");
    return run;
  }

  Checkpointed function_;
  RandomState before_;
  std::optional<RandomState> after_;
  std::vector<ForwardScope::Seen> scope_;
  RowState rows_;
  AutocastState autocast_;
  std::vector<torch::autograd::SavedVariable> inputs_;
  Tensors leaves_;
  std::vector<int64_t> versions_;
  std::vector<bool> differs_;  ///< of the outputs, which have a gradient
  bool released_ = false;
};

/// `checkpoint` on lists of tensors.
inline std::vector<Tensor> checkpointed(const Checkpointed::Function& function, std::vector<Tensor> inputs) {
  if (!torch::GradMode::is_enabled()) return function(inputs);
  const ForwardScope scope;  // all of it sees one set of adapters, again in backward
  const auto made = ForwardScope::state().made;
  const auto arity = inputs.size();
  auto shapes = made;
  for (auto& part : shapes) {
    inputs.insert(inputs.end(), part.tensors.begin(), part.tensors.end());
    std::fill(part.tensors.begin(), part.tensors.end(), Tensor());
  }
  const Checkpointed run_again(function, arity, std::move(shapes));
  const RandomState before(inputs);
  const auto run = [&] {
    struct Restore {
      const std::vector<ForwardScope::Made>& made;
      ~Restore() { ForwardScope::state().made = made; }
    } const restore{made};
    const AutocastGuard autocast{AutocastState()};
    return run_again.run(inputs);
  }();
  auto outputs = run.outputs;
  const auto learns = [](const Tensor& output) { return output.defined() && output.requires_grad(); };
  if (std::any_of(outputs.begin(), outputs.end(), learns)) {
    auto node = make_node<CheckpointNode>(run_again, before);
    node->adopt(inputs, run);
    for (auto& output : outputs) {
      if (!learns(output)) continue;
      output = output.variable_data();
      torch::autograd::create_gradient_edge(output, node);
    }
  }
  auto next = outputs.end();
  for (const auto& part : run.left) next -= static_cast<std::ptrdiff_t>(part.tensors.size());
  const auto end = next;
  for (auto part : run.left) {
    for (auto& tensor : part.tensors) tensor = *next++;
    ForwardScope::state().made.push_back(std::move(part));
  }
  outputs.erase(end, outputs.end());
  return outputs;
}

}  // namespace internal

/// function(inputs…), without keeping what its backward needs: that is calculated again when backward comes,
/// from the inputs, with the same random numbers, adapters, rows and autocast. `torch.utils.checkpoint`, and
/// gradients that are equal to the last bit. For the blocks of a model: memory for one more forward.
///
/// `function`: from as many tensors as there are inputs, to a Tensor or a std::vector<Tensor>; a copy is kept
/// until backward, so it must hold what it uses, and must not change its inputs. Gradients reach the inputs
/// and every trainable tensor it uses, whether or not an input needs one; a tensor from outside that has a
/// history must be an input. Checkpoints may hold others. Where nothing is recorded, in evaluation say, the
/// function is only called.
///
/// Throws: c10::Error in forward for a tensor with a history that is no input; in backward for gradients of
/// gradients, for a trainable tensor or an input that was changed in between, and where the second run draws
/// other random numbers or reaches other trainable tensors than the first.
///
/// Paper: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
/// Example:
/// ```
/// x = peft::checkpoint([block](const Tensor& h, const Tensor& bias) { return block->forward(h, bias); }, x,
///                      bias);
/// ```
template <class Function, class... Inputs>
requires(std::convertible_to<const Inputs&, Tensor>&&...) auto checkpoint(Function function,
                                                                          const Inputs&... inputs) {
  using Result = std::invoke_result_t<Function&, const Inputs&...>;
  static_assert(std::is_same_v<Result, Tensor> || std::is_same_v<Result, std::vector<Tensor>>,
                "peft::checkpoint: the function must return a Tensor or a std::vector<Tensor>");
  auto on_lists = [function = std::move(function)](const std::vector<Tensor>& list) mutable {
    const auto call = [&]<size_t... i>(std::index_sequence<i...>) { return function(list[i]...); };
    if constexpr (std::is_same_v<Result, Tensor>) {
      return std::vector<Tensor>{call(std::make_index_sequence<sizeof...(Inputs)>())};
    } else {
      return call(std::make_index_sequence<sizeof...(Inputs)>());
    }
  };
  auto outputs = internal::checkpointed(std::move(on_lists), {Tensor(inputs)...});
  if constexpr (std::is_same_v<Result, Tensor>) {
    return std::move(outputs.front());
  } else {
    return outputs;
  }
}

}  // namespace peft
