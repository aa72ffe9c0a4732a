// Which sites of a model a part goes to; plain layers of a Sequential become sites.
#pragma once

#include <torch/nn/modules/container/sequential.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/model/part.h"

namespace peft::internal {

/// An adapter that has been checked and built but not attached: nothing of the model has changed yet.
struct Plan {
  nn::Module* model = nullptr;
  std::vector<Node> nodes;
  std::vector<Adapter::Entry> entries;
  /// Plain layers of a Sequential and what makes them sites; run for those that get a piece.
  std::vector<std::pair<std::shared_ptr<SiteImpl>, std::function<void()>>> swaps;
  /// What pieces of one method share, and the site that is to register it.
  struct Shared {
    std::shared_ptr<SiteImpl> site;
    std::string method;
    std::shared_ptr<SharedImpl> part;
  };
  std::vector<Shared> shared;
  /// Makes the controllers of the pieces, once these have their values.
  std::vector<std::function<std::shared_ptr<Controller>()>> controllers;

  /// Moves all that was made to the devices and types of the sites.
  void place() const {
    for (const auto& [site, method, part] : shared) part->place(site->info());
    for (const auto& entry : entries) entry.piece->place();
  }
};

/// The site a plain layer of a Sequential would become, or nullptr.
template <class... Layers>
std::shared_ptr<SiteImpl> adapted_slot(const std::shared_ptr<nn::Module>& module) {
  std::shared_ptr<SiteImpl> site;
  const auto attempt = [&]<class Layer>(Layer*) {
    if (site) return;
    if (auto impl = std::dynamic_pointer_cast<typename Layer::ContainedType>(module)) {
      site = std::make_shared<AdaptedImpl<Layer>>(Layer(impl));
    }
  };
  (attempt(static_cast<Layers*>(nullptr)), ...);
  return site;
}

/// Puts a site into a Sequential: into the slot its forward calls and into the registry its `parameters`
/// reads.
template <class... Layers>
void fill_slot(nn::SequentialImpl& sequential, const std::string& key,
               const std::shared_ptr<SiteImpl>& site) {
  size_t index = 0;
  for (const auto& child : sequential.named_children()) {
    if (child.key() == key) break;
    ++index;
  }
  const auto attempt = [&]<class Layer>(Layer*) {
    if (auto impl = std::dynamic_pointer_cast<AdaptedImpl<Layer>>(site)) {
      *(sequential.begin() + static_cast<std::ptrdiff_t>(index)) = nn::AnyModule(impl);
    }
  };
  (attempt(static_cast<Layers*>(nullptr)), ...);
  sequential.replace_module(key, std::static_pointer_cast<nn::Module>(site));
}

/// Makes a site of a node that is an adaptable layer of a Sequential: in the plan at once, in the model on
/// commit.
inline bool become_site(Node& node, Plan& plan) {
  const auto sequential = std::dynamic_pointer_cast<nn::SequentialImpl>(node.parent);
  if (!sequential) return false;
  auto site =
      adapted_slot<nn::Linear, nn::Conv1d, nn::Conv2d, nn::Conv3d, nn::Embedding, nn::LayerNorm>(node.module);
  if (!site) return false;
  site->set_path(node.path);
  site->train(node.module->is_training());
  node.site = site;
  plan.swaps.emplace_back(site, [sequential, key = node.key, site] {
    fill_slot<nn::Linear, nn::Conv1d, nn::Conv2d, nn::Conv3d, nn::Embedding, nn::LayerNorm>(*sequential, key,
                                                                                            site);
  });
  return true;
}

/// The sites of `plan.nodes` a part goes to. What is wrong is added to `problems`.
inline std::vector<std::shared_ptr<SiteImpl>> resolve(const Part& part, Plan& plan, Problems& problems) {
  const auto& origin = *part.target.origin();
  std::vector<std::shared_ptr<SiteImpl>> sites;
  const auto take = [&](const std::shared_ptr<SiteImpl>& site) {
    if (std::find(sites.begin(), sites.end(), site) == sites.end()) sites.push_back(site);
  };
  const auto can = [&](const Node& node) {
    const auto info = node.site->info();
    return info.offers_to(part.needs) && part.refusal(info).empty();
  };

  auto predicate = part.target.predicate();
  if (part.target.survey()) {
    std::vector<SiteInfo> all;
    for (auto& node : plan.nodes) {
      if (node.site || become_site(node, plan)) all.push_back(node.site->info());
    }
    try {
      predicate = part.target.survey()(all);
    } catch (const c10::Error& error) {
      problems.add(error.what_without_backtrace());
      return sites;
    }
  }
  if (predicate) {
    for (auto& node : plan.nodes) {
      if (is_excluded(origin, node.path)) continue;
      if (!node.site && !become_site(node, plan)) continue;
      if (can(node) && predicate(node.site->info())) take(node.site);
    }
    if (sites.empty()) problems.add("the target of '" + part.method + "' matches no site that can take it");
    return sites;
  }

  const auto complaints = problems.size();
  std::vector<std::string> unmatched = origin.names;
  std::set<int64_t> in_layers;  // of what the names match
  const std::regex expression(origin.pattern);
  const auto matches = [&](const std::string& path) {
    if (!origin.pattern.empty()) return std::regex_match(path, expression);
    bool found = false;
    for (const auto& name : origin.names) {
      if (!ends_in_name(path, name)) continue;
      if (path != name && !origin.layers.empty()) {
        const auto layer = layer_index(path, origin.layers_pattern);
        in_layers.insert(layer);
        if (std::find(origin.layers.begin(), origin.layers.end(), layer) == origin.layers.end()) continue;
      }
      std::erase(unmatched, name);
      found = true;
    }
    return found;
  };
  bool any = false;
  for (auto& node : plan.nodes) {
    if (!matches(node.path)) continue;
    any = true;
    if (is_excluded(origin, node.path)) continue;
    std::string why;
    if (node.site || become_site(node, plan)) {
      const auto info = node.site->info();
      why = info.offers_to(part.needs) ? part.refusal(info)
                                       : "a " + info.layer + " does not offer " + to_string(part.needs);
      if (why.empty()) {
        take(node.site);
        continue;
      }
      if (info.offers_to(Needs::weights) || node.module->children().empty()) {
        problems.add("'" + node.path + "' cannot take '" + part.method + "': " + why);
        continue;
      }
    }
    bool below = false;
    for (auto& inner : plan.nodes) {
      if (!inner.path.starts_with(node.path + ".") || is_excluded(origin, inner.path)) continue;
      if (!inner.site && !become_site(inner, plan)) continue;
      if (!can(inner)) continue;
      take(inner.site);
      below = true;
    }
    if (!below && !why.empty()) {
      problems.add("'" + node.path + "' cannot take '" + part.method + "': " + why);
    } else if (!below) {
      problems.add("'" + node.path + "' matches but is a plain " + node.module->name() +
                   " (hint: declare it as peft::Linear, peft::Embedding, … in its parent)");
    }
  }
  std::vector<std::string> paths;
  for (const auto& node : plan.nodes) {
    paths.push_back(node.path);
    const auto last = node.path.substr(node.path.rfind('.') + 1);
    const bool is_index = last.find_first_not_of("0123456789") == std::string::npos;
    if (last != node.path && !is_index) paths.push_back(last);
  }
  if (!origin.pattern.empty() && !any) {
    problems.add("no module's path matches the expression '" + origin.pattern + "'");
  }
  for (const auto& name : unmatched) {
    const bool elsewhere = std::any_of(plan.nodes.begin(), plan.nodes.end(),
                                       [&](const Node& node) { return ends_in_name(node.path, name); });
    problems.add(elsewhere ? "target '" + name + "' is in none of the layers asked for"
                           : "no module matches target '" + name + "'; closest: " + closest(name, paths));
  }
  in_layers.erase(-1);
  for (const auto layer : origin.layers) {
    if (in_layers.empty() || in_layers.count(layer)) continue;
    problems.add("the target of '" + part.method + "' asks for layer " + std::to_string(layer) +
                 ", but what it names is in layers " + std::to_string(*in_layers.begin()) + " to " +
                 std::to_string(*in_layers.rbegin()));
  }
  if (sites.empty() && problems.size() == complaints) {
    problems.add("all that the target of '" + part.method + "' matches is excluded");
  }
  return sites;
}

}  // namespace peft::internal
