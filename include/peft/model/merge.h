// merge: writes the active adapters into the base's weights; unmerge: takes them out again, bit for bit.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/kernels/is_finite.h"
#include "peft/model/active.h"

namespace peft {
/// Writes the effective weights of the active adapters into the base, computed out of place. The originals
/// are kept for `unmerge` unless `keep` is false; then every weight is computed twice, to be checked and to
/// be used, and needs memory for one layer's only. Until `unmerge`, or `remove_adapter` of what was merged
/// without originals, the model runs at the plain model's cost, and adapters cannot be added or switched.
/// Throws, before anything is changed: c10::ValueError listing every site that cannot be merged, whose merged
/// weights are not finite, or that is merged already; when no adapter is active or they are disabled.
inline void merge(nn::Module& model, bool keep = true) {
  const auto nodes = internal::walk(model);
  const auto set = internal::activation_of(nodes, "merge")->get();
  TORCH_CHECK_VALUE(!set->active.empty(), "merge: no adapter is active");
  TORCH_CHECK_VALUE(set->enabled, "merge: the adapters are disabled (hint: enable them first)");
  TORCH_CHECK_VALUE(!internal::divides(set->composition), "merge: the weights of ", set->composition.text(),
                    " are not the same for all rows and tokens (hint: set_active a Stack or an Average)");
  internal::Problems problems;
  struct Change {
    SiteImpl* site;
    std::vector<std::string> adapters;
    std::optional<Weights> weights;  // made again where they are not kept
  };
  std::vector<Change> changes;
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (node.site->is_merged()) {
      problems.add("'" + node.path + "' " + node.site->merged_text());
      continue;
    }
    Change change{node.site.get(), {}, {}};
    bool fits = true;
    for (const auto& name : set->active) {
      if (node.site->acts(name)) change.adapters.push_back(name);
      for (const auto& attached : node.site->pieces(name)) {
        const auto why = attached.piece->not_mergeable();
        if (why.empty()) continue;
        problems.add("'" + node.path + "': " + why);
        fits = false;
      }
    }
    if (change.adapters.empty() || !fits) continue;
    changes.push_back(std::move(change));
  }
  std::map<const at::TensorImpl*, std::set<std::string>> readers;  // of one parameter, by their paths
  for (const auto& node : nodes) {
    if (!node.site) continue;
    const auto info = node.site->base_info();
    if (info.weight_shape.empty() && info.bias_shape.empty()) continue;  // it has no weights
    const auto weights = node.site->base_weights();
    for (const auto& tensor : {weights.weight, weights.bias}) {
      if (tensor.defined()) readers[tensor.unsafeGetTensorImpl()].insert(node.path);
    }
  }
  for (const auto& change : changes) {
    const auto weights = change.site->base_weights();
    for (const auto& tensor : {weights.weight, weights.bias}) {
      if (!tensor.defined()) continue;
      const auto& paths = readers.at(tensor.unsafeGetTensorImpl());
      if (paths.size() < 2) continue;
      problems.add("'" + *paths.begin() + "' and '" + *paths.rbegin() +
                   "' are one tensor: merging on one would change the other (hint: tie them by "
                   "b.set_data(a.detach()), two parameters of one memory)");
    }
  }
  std::map<const void*, int> uses;  // of a weight's memory: tied sites are no longer so once one is merged
  for (const auto& change : changes) {
    if (const auto weight = change.site->base_weights().weight; weight.defined()) ++uses[weight.data_ptr()];
  }
  for (auto& change : changes) {
    auto weights = change.site->merged_weights(set->composition);
    if (!(weights.finite || internal::is_finite(weights.weight)) || !internal::is_finite(weights.bias)) {
      problems.add("'" + change.site->path() + "': the merged weights hold NaN or infinity");
    }
    const auto base = change.site->base_weights().weight;
    if (keep || (base.defined() && uses[base.data_ptr()] > 1)) change.weights = std::move(weights);
  }
  if (changes.empty() && problems.empty()) problems.add("no site of the model carries an active adapter");
  problems.raise("merge");
  for (auto& change : changes) {
    if (!change.weights) change.weights = change.site->merged_weights(set->composition);
    change.site->swap_in(*change.weights, std::move(change.adapters), keep);
    change.weights.reset();
  }
}

/// Puts the base's weights back as they were before `merge`, bit for bit. Throws if the model is not merged
/// or the originals were not kept.
inline void unmerge(nn::Module& model) {
  std::vector<SiteImpl*> merged;
  for (const auto& node : internal::walk(model)) {
    if (node.site && node.site->is_merged()) merged.push_back(node.site.get());
  }
  TORCH_CHECK(!merged.empty(), "unmerge: the model is not merged");
  for (const auto* site : merged) {
    TORCH_CHECK(site->keeps_original(), "unmerge: the originals of '", site->path(),
                "' were not kept (hint: merge(model, /*keep=*/true))");
  }
  for (auto* site : merged) site->swap_out();
}

}  // namespace peft
