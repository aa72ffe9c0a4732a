// add_adapter: puts a method on the sites of a model that a target names, and freezes everything else.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/methods/replace.h"
#include "peft/model/part.h"
#include "peft/model/resolve.h"

namespace peft {

namespace internal {

/// Checks that the sites can take pieces of an adapter of this name.
inline void check_sites(const std::vector<Node>& nodes, const std::string& name, Problems& problems) {
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (node.site->owns_name(name)) {
      problems.add("adapter name '" + name + "' is the name of a child of '" + node.path +
                   "' (hint: choose another)");
    }
    if (node.site->is_merged()) problems.add("'" + node.path + "' " + node.site->merged_text());
  }
  check_adapter_name(name, problems);
}

/// Checks everything, builds the pieces, changes nothing. `extends`: the adapter exists and gets further
/// pieces. Adds what is wrong to `all`; the plan is of use where nothing is.
inline Plan plan_adapter(nn::Module& model, const std::vector<Part>& parts, const std::string& name,
                         bool extends, Problems& all) {
  Plan plan;
  plan.model = &model;
  plan.nodes = walk(model, /*learn_paths=*/true);
  Problems problems;
  const auto ends = [&] {
    all.add(problems);
    return !problems.empty();
  };
  bool known = false, sited = false;
  for (const auto& node : plan.nodes) {
    if (!node.site) continue;
    sited = true;
    known = known || !node.site->pieces(name).empty();
  }
  check_sites(plan.nodes, name, problems);
  if (parts.empty()) problems.add("expected at least one part, but got none");
  if (known && !extends) problems.add("the model already has an adapter '" + name + "'");
  if (!known && extends) problems.add("the model has no adapter '" + name + "'");

  struct Pending {
    std::shared_ptr<SiteImpl> site;
    const Part* part;
  };
  std::vector<Pending> pending;
  for (const auto& part : parts) {
    for (const auto& site : resolve(part, plan, problems)) pending.push_back({site, &part});
    for (const auto& more : part.also) {
      Problems unasked;  // nobody asked for these sites
      for (const auto& site : resolve(more, plan, unasked)) pending.push_back({site, &more});
    }
  }
  // Several parts of a method may share their options.
  std::map<std::string, std::set<std::string>> patterns;
  for (const auto& part : parts) patterns[part.method].insert(part.patterns.begin(), part.patterns.end());
  for (const auto& [method, own] : patterns) {
    if (own.empty()) continue;
    std::vector<std::string> names;
    for (const auto& item : pending) {
      if (item.part->method == method) names.push_back(item.part->pattern_name(item.site->info()));
    }
    if (names.empty()) continue;  // the target has been complained of
    for (const auto& pattern : without_match(own, names)) {
      problems.add("the pattern '" + pattern + "' of '" + method +
                   "' matches none of its layers; closest: " + closest(pattern, names));
    }
  }
  if (!sited && plan.swaps.empty() && !problems.empty()) {
    problems.add(
        "this model has no sites at all (hint: declare its layers as peft::Linear, peft::Embedding, …)");
  }
  if (ends()) return plan;

  // The model's order, and on one site the order of the parts: also the order of the random draws.
  const auto position = [&](const std::shared_ptr<SiteImpl>& site) {
    return std::find_if(plan.nodes.begin(), plan.nodes.end(),
                        [&](const Node& node) { return node.site == site; }) -
           plan.nodes.begin();
  };
  std::vector<std::pair<std::ptrdiff_t, Pending>> ordered;
  for (const auto& item : pending) ordered.emplace_back(position(item.site), item);
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });

  std::map<const Part*, std::vector<std::shared_ptr<PieceImpl>>> made;
  for (const auto& [index, item] : ordered) {
    const auto& path = item.site->path();
    std::vector<const PieceImpl*> present;
    for (const auto& attached : item.site->pieces(name)) present.push_back(attached.piece.get());
    for (const auto& entry : plan.entries) {
      if (entry.site == item.site) present.push_back(entry.piece.get());
    }
    std::shared_ptr<PieceImpl> piece;
    try {
      piece = item.part->make(item.site->info());
    } catch (const c10::Error& error) {
      problems.add("'" + path + "': " + error.what_without_backtrace());
      continue;
    }
    if (const auto why = piece->not_mergeable(); piece->site().weights_only && !why.empty()) {
      problems.add("'" + path + "' runs on weights alone: " + why);
    }
    const auto set = item.site->activation()->get();
    const bool runs = extends && set->is_active(name);
    if (runs && piece->site().weights_only &&
        (set->composition.by_rows() || set->composition.holds(Composition::Block::split))) {
      problems.add("'" + path + "' runs on one weight for the whole batch and all tokens, but " +
                   set->composition.text() + " is active (hint: set_active another first)");
    }
    for (const auto* other : present) {
      if (other->method() == piece->method()) {
        problems.add("'" + path + "' would carry '" + piece->method() + "' twice in adapter '" + name + "'");
      } else if (other->works_on_activations() && item.part->needs == Needs::weights &&
                 !piece->substitutes()) {
        problems.add("'" + path + "': '" + piece->method() + "' changes weights and cannot come after '" +
                     other->method() + "' of the same adapter");
      } else if (other->substitutes() && piece->substitutes()) {
        problems.add("'" + path + "' would carry both '" + other->method() + "' and '" + piece->method() +
                     "' (hint: leave it out of one target with .exclude({…}))");
      }
    }
    if (item.part->needs == Needs::weights) {
      for (const auto& active : set->active) {
        if (active == name && piece->substitutes()) continue;  // lies under the adapter's other pieces
        for (const auto& attached : item.site->pieces(active)) {
          if (attached.piece->works_on_activations()) {
            problems.add("'" + path + "': '" + piece->method() + "' changes weights and cannot come after '" +
                         attached.piece->method() + "' of active adapter '" + active + "'");
          }
        }
      }
    }
    for (const auto& active : set->active) {
      if (active == name) continue;
      for (const auto& attached : item.site->pieces(active)) {
        const auto why = piece->conflict(*attached.piece);
        if (!why.empty()) {
          problems.add("'" + path + "': '" + name + "' and active adapter '" + active + "' " + why +
                       " (hint: set_active without it first)");
        }
      }
    }
    plan.entries.push_back({item.site, piece, item.part->target.origin()});
    made[item.part].push_back(piece);
  }
  for (const auto& group : made) {  // clang 14 captures no structured bindings
    const auto& pieces = group.second;
    const auto& method = group.first->method;
    std::shared_ptr<SharedImpl> shared;
    try {
      shared = pieces.front()->make_shared_part(pieces);
    } catch (const c10::Error& error) {
      problems.add(error.what_without_backtrace());
    }
    if (!shared) continue;
    for (const auto& piece : pieces) piece->tie(shared);
    const auto first = std::find_if(plan.entries.begin(), plan.entries.end(),
                                    [&](const auto& entry) { return entry.piece == pieces.front(); });
    if (std::any_of(plan.shared.begin(), plan.shared.end(),
                    [&](const auto& other) { return other.method == method; })) {
      problems.add("'" + first->site->path() + "': the layers of '" + method +
                   "' share tensors, so an adapter holds one part of it, but got two (hint: one target for "
                   "all its layers)");
    }
    plan.shared.push_back({first->site, method, shared});
  }
  if (ends()) return plan;
  for (const auto& [part, pieces] : made) {
    if (part->control) {
      plan.controllers.emplace_back([control = part->control, own = pieces] { return control(own); });
    }
  }
  return plan;
}

/// The same; throws c10::ValueError listing what is wrong.
inline Plan plan_adapter(nn::Module& model, const std::vector<Part>& parts, const std::string& name,
                         bool extends) {
  Problems problems;
  auto plan = plan_adapter(model, parts, name, extends, problems);
  problems.raise("add_adapter");
  return plan;
}

/// Attaches what was planned: swaps Sequential slots, freezes the base, registers the pieces, activates the
/// name if asked to.
inline void commit(Plan& plan, const Adapter& adapter, bool trainable, bool active = true) {
  const auto adapted = [&](const std::shared_ptr<SiteImpl>& site) {
    return std::any_of(plan.entries.begin(), plan.entries.end(),
                       [&](const auto& entry) { return entry.site == site; });
  };
  // First, because a controller may refuse what it is given.
  std::vector<std::shared_ptr<Controller>> controllers;
  if (trainable) {
    for (const auto& make : plan.controllers) controllers.push_back(make());
  }
  for (const auto& [site, swap] : plan.swaps) {
    if (adapted(site)) swap();
  }
  const auto activation = common_activation(plan.nodes);
  const auto freeze = [](const nn::Module& module) {
    for (auto& parameter : module.parameters(/*recurse=*/false)) parameter.set_requires_grad(false);
  };
  freeze(*plan.model);
  for (const auto& node : plan.nodes) {
    if (node.site) node.site->share(activation);
    freeze(*node.module);
  }
  for (auto& entry : plan.entries) {
    if (!trainable) {
      for (auto& parameter : entry.piece->parameters()) parameter.set_requires_grad(false);
    }
    entry.site->attach({entry.piece, entry.origin, adapter.shared_record()});
  }
  for (const auto& [site, method, part] : plan.shared) {
    if (!trainable) {
      for (auto& parameter : part->parameters()) parameter.set_requires_grad(false);
    }
    site->attach_shared(adapter.name(), method, part);
  }
  std::vector<Adapter::Entry> entries;
  for (const auto& node : plan.nodes) {
    if (!node.site) continue;
    for (const auto& attached : node.site->pieces(adapter.name()))
      entries.push_back({node.site, attached.piece, attached.origin});
  }
  adapter.set_entries(std::move(entries));
  for (auto& controller : controllers) adapter.record().controllers.push_back(std::move(controller));
  auto set = *activation->get();

  const bool alone = std::all_of(adapter.entries().begin(), adapter.entries().end(),
                                 [](const auto& entry) { return entry.piece->stands_alone(); });
  const bool known = set.knows(adapter.name());
  if (active && alone && !set.is_active(adapter.name()) && !known) set.append(adapter.name());
  if (!known) set.known.push_back(adapter.name());
  activation->set(std::move(set));
}

inline void initialize(const Plan& plan) {
  torch::NoGradGuard no_grad;
  std::set<int> turns;
  for (const auto& shared : plan.shared) turns.insert(shared.part->turn());
  for (const auto& entry : plan.entries) turns.insert(entry.piece->turn());
  for (const auto turn : turns) {
    for (const auto& [site, method, part] : plan.shared) {
      if (part->turn() == turn) part->initialize();
    }
    for (const auto& entry : plan.entries) {
      if (entry.piece->turn() == turn) entry.piece->initialize(*entry.site->base_view());
    }
  }
  plan.place();
}

inline std::shared_ptr<AdapterRecord> make_record(nn::Module& model, const std::string& name) {
  auto record = std::make_shared<AdapterRecord>();
  record->name = name;
  record->paths = module_paths(walk(model));
  if (const auto* described = dynamic_cast<const Described*>(&model)) record->model = described->describe();
  return record;
}

}  // namespace internal

/// Adds one adapter made of several parts. Freezes every parameter outside adapters and appends the new one
/// to the active list. Nothing is changed unless everything fits. Throws: c10::ValueError listing all
/// problems: a target that matches nothing (with the nearest names), a layer that cannot take the method, a
/// name that is taken, a merged site, options out of range.
inline Adapter add_adapter(nn::Module& model, const std::vector<Part>& parts,
                           const std::string& name = "default") {
  auto plan = internal::plan_adapter(model, parts, name, /*extends=*/false);
  internal::initialize(plan);
  const Adapter adapter(internal::make_record(model, name));
  internal::commit(plan, adapter, /*trainable=*/true);
  return adapter;
}

/// Adds an adapter of one method.
///
/// Example:
/// ```
/// const auto target = peft::named({"query", "value"});
/// auto adapter = peft::add_adapter(*model, peft::LoraOptions(8).alpha(16), target, "topics");
/// ```
template <MethodOptions Options>
Adapter add_adapter(nn::Module& model, Options options, Target target, const std::string& name = "default") {
  return add_adapter(model, std::vector<Part>{on(std::move(options), std::move(target))}, name);
}

/// Adds an adapter of one method where its options say.
///
/// Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::houlsby().reduction_factor(8), "topics");
/// ```
template <PlacedOptions Options>
Adapter add_adapter(nn::Module& model, const Options& options, const std::string& name = "default") {
  return add_adapter(model, std::vector<Part>{on(options)}, name);
}

/// Lets the adapter train its own copy of further layers (a task head): `Replace` pieces under the same name,
/// Hugging Face's `modules_to_save`. Before any optimizer is made.
inline void train_also(const Adapter& adapter, nn::Module& model, Target target) {
  TORCH_CHECK(
      !adapter.record().has_optimizer, "train_also: adapter '", adapter.name(),
      "' already has an optimizer, which would not see the new tensors (hint: call train_also first)");
  auto plan = internal::plan_adapter(model, {on(ReplaceOptions(), std::move(target))}, adapter.name(),
                                     /*extends=*/true);
  internal::initialize(plan);
  internal::commit(plan, adapter, /*trainable=*/true);
}

}  // namespace peft
