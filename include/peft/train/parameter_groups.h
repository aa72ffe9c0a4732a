// Parameter groups: which of an adapter's tensors an optimizer trains with which options.
#pragma once

#include <torch/optim/optimizer.h>

#include <cmath>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/problems.h"

namespace peft {

/// Parameters that get options of their own: those whose name (`<site>.<method>.<tensor>`) `matches` says yes
/// to.
template <class Options>
struct GroupOf {
  std::function<bool(const std::string&)> matches;
  Options options;
};

namespace internal {

/// The tensors of an adapter that train, in its order, and the group of each.
struct Assignment {
  std::vector<std::string> names;
  std::vector<Tensor> tensors;
  std::vector<size_t> groups;  ///< of each tensor
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> options;
  std::unique_ptr<torch::optim::OptimizerOptions> defaults;
  double max_grad_norm = 0;

  std::vector<torch::optim::OptimizerParamGroup> param_groups() const {
    std::vector<torch::optim::OptimizerParamGroup> result;
    for (size_t group = 0; group < options.size(); ++group) {
      std::vector<Tensor> members;
      for (size_t i = 0; i < tensors.size(); ++i) {
        if (groups[i] == group) members.push_back(tensors[i]);
      }
      result.emplace_back(std::move(members), options[group]->clone());
    }
    return result;
  }
};

/// Adds what keeps an optimizer from training an adapter whose tensors are these.
inline void check_trainable(const Adapter& adapter, const Assignment& found, Problems& problems) {
  for (size_t i = 0; i < found.names.size(); ++i) {
    if (!found.tensors[i].is_leaf()) problems.add("'" + found.names[i] + "' must be a leaf of the graph");
    if (!found.tensors[i].is_floating_point()) {
      problems.add("'" + found.names[i] + "' must be of a floating type");
    }
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
  if (found.names.empty()) {
    problems.add("adapter '" + adapter.name() +
                 "' has nothing that trains (hint: was it loaded without trainable?)");
  }
}

/// Parts the tensors of an adapter that train: each belongs to the first group that matches it, the others to
/// a last one with `defaults`. `check(options, where, problems)` adds what is wrong with a group's options.
/// Throws: c10::ValueError, titled with the optimizer's name, listing all that is wrong.
template <class Options, class Check>
Assignment assign(const char* name, const Adapter& adapter, const std::vector<GroupOf<Options>>& groups,
                  const Options& defaults, double max_grad_norm, const Check& check) {
  Problems problems;
  Assignment result;
  std::vector<char> used(groups.size() + 1, false);
  for (auto& [key, tensor] : adapter.named_parameters()) {
    size_t group = 0;
    while (group < groups.size() && !groups[group].matches(key)) ++group;
    used[group] = true;
    result.names.push_back(key);
    result.tensors.push_back(tensor);
    result.groups.push_back(group);
  }
  check_trainable(adapter, result, problems);
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto title = "group " + std::to_string(i);
    if (!used[i] && !result.names.empty()) {
      problems.add(title + " matches none of the " + std::to_string(result.names.size()) +
                   " parameters, such as '" + result.names.front() + "'");
    }
    check(groups[i].options, title + ": ", problems);
    result.options.push_back(std::make_unique<Options>(groups[i].options));
  }
  check(defaults, "", problems);
  result.defaults = std::make_unique<Options>(defaults);
  if (used.back()) result.options.push_back(result.defaults->clone());
  result.max_grad_norm = max_grad_norm;
  if (!(max_grad_norm >= 0 && std::isfinite(max_grad_norm))) {
    problems.add("max_grad_norm must be positive, or 0 for no clipping, but got " + c10::str(max_grad_norm));
  }
  problems.raise(name);
  return result;
}

}  // namespace internal
}  // namespace peft
