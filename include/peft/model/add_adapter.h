// add_adapter: puts a method on the sites of a model that a target names, and freezes everything else.
#pragma once

#include <torch/nn/modules/container/sequential.h>

#include <algorithm>
#include <concepts>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/methods/replace.h"
#include "peft/model/targets.h"

namespace peft {

/// Settings of a method: what it needs of a site, its name, and the free functions every method header has.
template <class Options>
concept MethodOptions = requires(const Options& options, const SiteInfo& site) {
  { Options::needs } -> std::convertible_to<AnyOf>;
  { Options::method } -> std::convertible_to<std::string>;
  { refusal(options, site) } -> std::same_as<std::string>;
  { make_piece(options, site) } -> std::same_as<std::shared_ptr<PieceImpl>>;
};

/// Settings that also say which sites the method goes to, so that it needs no target.
template <class Options>
concept PlacedOptions = MethodOptions<Options> && requires(const Options& options, const SiteInfo& site) {
  { goes_to(options, site) } -> std::same_as<bool>;
};

/// A method and where it goes, the method's type forgotten: several make one adapter.
struct Part {
  std::string method;
  AnyOf needs;
  Target target;
  std::function<std::string(const SiteInfo&)> refusal;
  std::function<std::shared_ptr<PieceImpl>(const SiteInfo&)> make;
  /// Of a method that has one: the controller of the pieces made by this part.
  std::function<std::shared_ptr<Controller>(const std::vector<std::shared_ptr<PieceImpl>>&)> control = {};
  /// What the method also puts on every site of another kind that can take it, in models that have any.
  std::vector<Part> also = {};
};

namespace internal {

/// Why a method cannot act through W′ alone, whatever its own view of the site, or an empty string.
template <class Options>
std::string weights_refusal(const Options& options, const SiteInfo& site) {
  if (!site.weights_only) return {};
  const auto name = "a " + site.layer + " that runs on weights alone takes no ";
  if constexpr (requires(const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
                  make_controller(options, pieces);
                }) {
    return name + Options::method + ", which watches the layer's forward";
  }
  double dropout = 0;
  if constexpr (requires { options.dropout(); }) dropout = options.dropout();
  if constexpr (requires { options.rank_dropout(); }) dropout = std::max(dropout, options.rank_dropout());
  if constexpr (requires { options.module_dropout(); }) dropout = std::max(dropout, options.module_dropout());
  return dropout > 0 && !site.ignores_dropout ? name + "dropout" : "";
}

}  // namespace internal

/// `options` on `target`, as a part of an adapter. Throws c10::ValueError if an option is out of range.
template <MethodOptions Options>
Part on(Options options, Target target) {
  if constexpr (requires { check(options); }) check(options);
  Part part{Options::method, Options::needs, std::move(target),
            [options](const SiteInfo& site) {
              const auto why = internal::weights_refusal(options, site);
              return why.empty() ? refusal(options, site) : why;
            },
            [options](const SiteInfo& site) { return make_piece(options, site); }};
  if constexpr (requires(const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
                  make_controller(options, pieces);
                }) {
    part.control = [options](const std::vector<std::shared_ptr<PieceImpl>>& pieces) {
      return make_controller(options, pieces);
    };
  }
  if constexpr (requires { companion(options); }) {
    if (const auto more = companion(options)) part.also.push_back(on(*more, all()));
  }
  return part;
}

/// `options` where they say.
template <PlacedOptions Options>
Part on(const Options& options) {
  return on(options, where([options](const SiteInfo& site) { return goes_to(options, site); }));
}

namespace internal {

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
  const auto matches = [&](const std::string& path) {
    if (!origin.pattern.empty()) return std::regex_match(path, std::regex(origin.pattern));
    bool found = false;
    for (const auto& name : origin.names) {
      if (!ends_in_name(path, name)) continue;
      if (path != name && !origin.layers.empty()) {
        const auto layer = layer_index(path, origin.layers_pattern);
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
      if (inner.path.rfind(node.path + ".", 0) != 0 || is_excluded(origin, inner.path)) continue;
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
  if (sites.empty() && problems.size() == complaints) {
    problems.add("all that the target of '" + part.method + "' matches is excluded");
  }
  return sites;
}

/// Checks that the sites can take pieces of an adapter of this name.
inline void check_sites(const std::vector<Node>& nodes, const std::string& name, Problems& problems) {
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (node.site->owns_name(name)) {
      problems.add("adapter name '" + name + "' is the name of a child of '" + node.path +
                   "' (hint: choose another)");
    }
    if (node.site->is_merged()) problems.add("'" + node.path + "' is merged (hint: unmerge first)");
  }
  if (name.empty() || name.find('.') != std::string::npos || name == RowAdapters::base) {
    problems.add("an adapter's name must not be empty, hold a dot or be '__base__', but got '" + name + "'");
  }
}

/// Checks everything, builds the pieces, changes nothing. `extends`: the adapter exists and gets further
/// pieces.
inline Plan plan_adapter(nn::Module& model, const std::vector<Part>& parts, const std::string& name,
                         bool extends) {
  Plan plan;
  plan.model = &model;
  plan.nodes = walk(model, /*learn_paths=*/true);
  Problems problems;
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
  if (!sited && plan.swaps.empty() && !problems.empty()) {
    problems.add(
        "this model has no sites at all (hint: declare its layers as peft::Linear, peft::Embedding, …)");
  }
  problems.raise("add_adapter");

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
    if (item.part->needs == Needs::weights && !item.site->activation()->get()->active.empty()) {
      for (const auto& active : item.site->activation()->get()->active) {
        if (active == name && piece->substitutes()) continue;  // lies under the adapter's other pieces
        for (const auto& attached : item.site->pieces(active)) {
          if (attached.piece->works_on_activations()) {
            problems.add("'" + path + "': '" + piece->method() + "' changes weights and cannot come after '" +
                         attached.piece->method() + "' of active adapter '" + active + "'");
          }
        }
      }
    }
    for (const auto& active : item.site->activation()->get()->active) {
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
    const auto shared = pieces.front()->make_shared_part(pieces);
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
  problems.raise("add_adapter");
  for (const auto& [part, pieces] : made) {
    if (part->control) {
      plan.controllers.emplace_back([control = part->control, own = pieces] { return control(own); });
    }
  }
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
  const bool is_new = std::find(set.active.begin(), set.active.end(), adapter.name()) == set.active.end();
  if (active && alone && is_new) set.append(adapter.name());
  if (!set.knows(adapter.name())) set.known.push_back(adapter.name());
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
  for (const auto& [site, method, part] : plan.shared) part->place(site->info());
  for (const auto& entry : plan.entries) entry.piece->place();
}

inline std::shared_ptr<AdapterRecord> make_record(const nn::Module& model, const std::string& name) {
  auto record = std::make_shared<AdapterRecord>();
  record->name = name;
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

/// Adds an adapter of one method. Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::LoraOptions(8).alpha(16), peft::named({"query", "value"}),
/// "topics");
/// ```
template <MethodOptions Options>
Adapter add_adapter(nn::Module& model, Options options, Target target, const std::string& name = "default") {
  return add_adapter(model, std::vector<Part>{on(std::move(options), std::move(target))}, name);
}

/// Adds an adapter of one method where its options say. Example:
/// ```
/// auto adapter = peft::add_adapter(*model, peft::houlsby().reduction_factor(8), "topics");
/// ```
template <PlacedOptions Options>
Adapter add_adapter(nn::Module& model, const Options& options, const std::string& name = "default") {
  return add_adapter(model, std::vector<Part>{on(options)}, name);
}

/// Lets the adapter train its own copy of further layers (a task head): `Replace` pieces under the same name,
/// Hugging Face's `modules_to_save`. Before any optimiser is made.
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
