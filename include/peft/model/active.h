// Verbs on a model's adapters by name: which are active, their names, copies of the model.
#pragma once

#include <algorithm>
#include <concepts>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/model/targets.h"

namespace peft {
namespace internal {

inline std::shared_ptr<Activation> activation_of(const std::vector<Node>& nodes, const char* verb) {
  const auto found =
      std::find_if(nodes.begin(), nodes.end(), [](const Node& node) { return node.site != nullptr; });
  TORCH_CHECK_VALUE(found != nodes.end(), verb, ": this model has no sites, so no adapters");
  return found->site->activation();
}

inline void require_known(const ActiveSet& set, const std::string& name, const char* verb) {
  TORCH_CHECK_VALUE(set.knows(name), verb, ": ", no_adapter_text(name, set.known));
}

/// Gives every piece the shared part of its adapter that lies in the same model: a copied piece comes
/// without.
inline void tie_shared(const std::vector<Node>& nodes) {
  std::map<std::pair<std::string, std::string>, std::shared_ptr<SharedImpl>> parts;
  for (const auto& node : nodes) {
    if (!node.site) continue;
    for (const auto& name : node.site->adapters()) {
      for (const auto& [method, shared] : node.site->shared(name))
        parts.emplace(std::pair(name, method), shared);
    }
  }
  if (parts.empty()) return;
  for (const auto& node : nodes) {
    if (!node.site) continue;
    for (const auto& name : node.site->adapters()) {
      for (const auto& attached : node.site->pieces(name)) {
        const auto found = parts.find({name, attached.piece->method()});
        if (found != parts.end()) attached.piece->tie(found->second);
      }
    }
  }
}

/// The adapters of a model; none for one without sites.
inline std::vector<std::string> adapter_names(nn::Module& model) {
  for (const auto& node : walk(model)) {
    if (node.site) return node.site->activation()->get()->known;
  }
  return {};
}

}  // namespace internal

/// The handle on an adapter the model carries already (after `clone`, or in another function). Its layers are
/// named, in files too, by their paths in this model. Throws: c10::ValueError for a name the model does not
/// have, or that none of its layers carries.
inline Adapter adapter(nn::Module& model, const std::string& name) {
  const auto nodes = internal::walk(model, /*learn_paths=*/true);
  internal::require_known(*internal::activation_of(nodes, "adapter")->get(), name, "adapter");
  internal::tie_shared(nodes);
  std::shared_ptr<AdapterRecord> record;
  for (const auto& node : nodes) {
    if (node.site && !record && !node.site->pieces(name).empty())
      record = node.site->pieces(name).front().record;
  }
  TORCH_CHECK_VALUE(record, "adapter: no layer of this model carries '", name,
                    "' (hint: the model is a part of one in which it was added to other layers)");
  record->paths = internal::module_paths(nodes);
  const Adapter handle(record);
  for (const auto& node : nodes) {
    if (!node.site) continue;
    for (const auto& attached : node.site->pieces(name))
      handle.add({node.site, attached.piece, attached.origin});
  }
  return handle;
}

/// Names of the adapters that are active, each once, in the order they compose.
inline std::vector<std::string> active_adapters(nn::Module& model) {
  return internal::activation_of(internal::walk(model), "active_adapters")->get()->active;
}

namespace internal {

/// The adapters that a row of the batch passes, in order: one list for each of a composition's paths.
inline std::vector<std::vector<std::string>> paths_of(const Composition& composition) {
  if (composition.is_adapter()) return {{composition.name}};
  std::vector<std::vector<std::string>> paths;
  if (composition.block != Composition::Block::stack) {
    for (const auto& child : composition.children) {
      const auto inner = paths_of(child);
      paths.insert(paths.end(), inner.begin(), inner.end());
    }
    return paths;
  }
  paths.emplace_back();
  for (const auto& child : composition.children) {
    std::vector<std::vector<std::string>> longer;
    for (const auto& before : paths) {
      for (const auto& after : paths_of(child)) {
        longer.push_back(before);
        longer.back().insert(longer.back().end(), after.begin(), after.end());
      }
    }
    paths = std::move(longer);
  }
  return paths;
}

/// What is wrong with these adapters on top of each other at one site.
inline void check_path(const Node& node, const std::vector<std::string>& names,
                       std::set<std::string>& complaints) {
  std::string activations;
  std::vector<std::pair<std::string, const PieceImpl*>> below;
  for (const auto& name : names) {
    for (const auto& attached : node.site->pieces(name)) {
      for (const auto& [other, piece] : below) {
        const auto why = other == name ? std::string() : attached.piece->conflict(*piece);
        if (!why.empty()) complaints.insert("'" + node.path + "': '" + other + "' and '" + name + "' " + why);
      }
      below.emplace_back(name, attached.piece.get());
      if (!attached.piece->stands_alone()) {
        complaints.insert("'" + name + "' is a fusion (hint: peft::Fuse of the adapters it fuses)");
      } else if (attached.piece->works_on_activations()) {
        activations = attached.piece->method();
      } else if (!activations.empty()) {
        complaints.insert("'" + node.path + "': '" + attached.piece->method() + "' of '" + name +
                          "' changes weights and cannot come after '" + activations + "'");
      }
    }
  }
}

/// True where rows or tokens have weights of their own.
inline bool divides(const Composition& composition) {
  return composition.by_rows() || composition.holds(Composition::Block::split) ||
         composition.holds(Composition::Block::fuse);
}

/// `set_active`.
inline void set_composition(nn::Module& model, const Composition& composition) {
  const auto nodes = walk(model);
  const auto activation = activation_of(nodes, "set_active");
  auto set = *activation->get();
  Problems problems;
  for (const auto& name : composition.names()) {
    if (!set.knows(name)) problems.add(no_adapter_text(name, set.known));
  }
  check_nesting(composition, problems);
  std::set<size_t> branches;
  count_branches(composition, branches);
  if (branches.size() > 1) problems.add("all Parallels must have as many adapters as each other");
  const auto paths = paths_of(composition);
  std::set<std::string> twice;
  for (auto path : paths) {
    std::sort(path.begin(), path.end());
    for (size_t i = 1; i < path.size(); ++i) {
      if (path[i] == path[i - 1]) twice.insert(path[i]);
    }
  }
  for (const auto& name : twice) problems.add("'" + name + "' is named twice");
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (node.site->is_merged()) problems.add("'" + node.path + "' " + node.site->merged_text());
    std::set<std::string> complaints;
    for (const auto& path : paths) check_path(node, path, complaints);
    const auto tree = node.site->resolve(composition);
    const auto why = tree.empty() ? std::string() : node.site->refusal(tree);
    if (!why.empty()) complaints.insert("'" + node.path + "' cannot run " + composition.text() + ": " + why);
    for (const auto& complaint : complaints) problems.add(complaint);
  }
  problems.raise("set_active");
  set.activate(composition);
  const bool is_list = composition.block == Composition::Block::stack &&
                       std::all_of(composition.children.begin(), composition.children.end(),
                                   [](const Composition& child) { return child.is_adapter(); });
  is_list ? activation->set_checked(model.weak_from_this(), std::move(set)) : activation->set(std::move(set));
}

/// The activation of a model's first site, or nullptr.
inline std::shared_ptr<Activation> first_activation(const nn::Module& model) {
  if (const auto* site = dynamic_cast<const SiteImpl*>(&model)) return site->activation();
  for (const auto& child : model.children()) {
    if (auto activation = first_activation(*child)) return activation;
  }
  return nullptr;
}

}  // namespace internal

/// Makes exactly these adapters active, composed in this order. Never touches `requires_grad`. Another
/// thread's forward sees the old set or the new one, not a mixture.
///
/// The whole model is checked for a list of names once; to switch to it again is to store a pointer, however
/// many layers and adapters there are, until adapters of the model are added, removed, renamed, merged or
/// disabled, or layers adapted elsewhere join it in another verb.
///
/// Throws: c10::ValueError for a name that is unknown or twice there, a weight method after a method on
/// activations, a merged model.
inline void set_active(nn::Module& model, const std::vector<std::string>& names) {
  const auto activation = internal::first_activation(model);
  if (activation && activation->reuse(model, names)) return;
  internal::set_composition(model, internal::stack_of(names));
}

/// Makes the adapters of a composition active, each where it says. Throws: what `set_active` of a list
/// throws, for each of its branches; for blocks that cannot stand in each other, or that a method on a site
/// does not define, and for Parallels of different numbers of adapters.
///
/// Example:
/// ```
/// peft::set_active(*model, peft::Stack("german", peft::Parallel("topics", "order")));
/// auto logits = model->forward(inputs).logits;  // (2 · batch, labels), those of "topics" first
/// ```
template <std::derived_from<Composition> Block>
void set_active(nn::Module& model, const Block& composition) {
  internal::set_composition(model, composition);
}

/// Switches all adapters off, remembering which were active: the model computes what it did before any was
/// added.
inline void disable(nn::Module& model) {
  const auto nodes = internal::walk(model);
  for (const auto& node : nodes) {
    if (node.site) node.site->check_not_merged("disable");
  }
  const auto activation = internal::activation_of(nodes, "disable");
  auto set = *activation->get();
  set.enabled = false;
  activation->set(std::move(set));
}

/// Undoes `disable`.
inline void enable(nn::Module& model) {
  const auto activation = internal::activation_of(internal::walk(model), "enable");
  auto set = *activation->get();
  set.enabled = true;
  activation->set(std::move(set));
}

/// Adapters off for the life of a guard. Example: `{ auto off = peft::disabled(*model); reference =
/// model->forward(x); }`
class [[nodiscard]] Disabled {
 public:
  explicit Disabled(nn::Module& model)
      : activation_(internal::activation_of(internal::walk(model), "disabled")),
        before_(activation_->get()->enabled) {
    disable(model);
  }
  ~Disabled() {
    auto set = *activation_->get();
    set.enabled = before_;
    activation_->set(std::move(set));
  }
  Disabled(const Disabled&) = delete;
  Disabled& operator=(const Disabled&) = delete;

 private:
  std::shared_ptr<Activation> activation_;
  bool before_;
};
inline Disabled disabled(nn::Module& model) { return Disabled(model); }

/// Gives an adapter another name; handles on it follow.
inline void rename(nn::Module& model, const std::string& from, const std::string& to) {
  const auto nodes = internal::walk(model);
  const auto activation = internal::activation_of(nodes, "rename");
  auto set = *activation->get();
  internal::require_known(set, from, "rename");
  internal::Problems problems;
  if (set.knows(to)) problems.add("the model already has an adapter '" + to + "'");
  internal::check_adapter_name(to, problems);
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (node.site->owns_name(to)) problems.add("'" + to + "' is the name of a child of '" + node.path + "'");
    if (node.site->is_merged()) problems.add("'" + node.path + "' " + node.site->merged_text());
  }
  problems.raise("rename");
  for (const auto& node : nodes) {
    if (!node.site) continue;
    for (const auto& name : node.site->adapters()) {
      for (const auto& attached : node.site->pieces(name)) attached.piece->follow_rename(from, to);
    }
    if (node.site->pieces(from).empty()) continue;
    node.site->pieces(from).front().record->name = to;
    node.site->rename(from, to);
  }
  set.known.rename(from, to);
  set.composition.rename(from, to);
  set.activate(set.composition);
  activation->set(std::move(set));
}

/// Takes an adapter off the model. The others stay as they are, active or not. One that was merged without
/// its original being kept (`merge(model, false)`) leaves its change in the base. Throws: c10::Error for an
/// adapter that is active in a block other than a Stack, which would change the block, and for one that is
/// merged and can be unmerged.
inline void remove_adapter(nn::Module& model, const std::string& name) {
  const auto nodes = internal::walk(model);
  const auto activation = internal::activation_of(nodes, "remove_adapter");
  auto set = *activation->get();
  const bool carried = std::any_of(nodes.begin(), nodes.end(), [&name](const internal::Node& node) {
    return node.site && !node.site->pieces(name).empty();
  });
  // What is left of one that was removed from a part of the model is not known any more.
  if (!carried) internal::require_known(set, name, "remove_adapter");
  for (const auto& node : nodes) {
    if (node.site && node.site->keeps_original()) node.site->check_not_merged("remove_adapter");
  }
  set.known.erase(name);
  auto composition = set.composition;
  std::erase_if(composition.children,
                [&](const Composition& child) { return child.is_adapter() && child.name == name; });
  const auto left = composition.names();
  const bool is_list = composition.block == Composition::Block::stack &&
                       std::find(left.begin(), left.end(), name) == left.end();
  const bool is_active = set.is_active(name);
  const bool merged = std::all_of(nodes.begin(), nodes.end(), [&name](const internal::Node& node) {
    return !node.site || node.site->is_merged() || node.site->pieces(name).empty();
  });
  TORCH_CHECK(!is_active || is_list || merged, "remove_adapter: '", name, "' is part of the active ",
              set.composition.text(), " (hint: set_active without it first)");
  if (is_active) set.activate(is_list ? std::move(composition) : internal::stack_of({}));
  activation->set(std::move(set));
  for (const auto& node : nodes) {
    if (node.site) node.site->detach(name);
  }
}

/// A copy of a model with its adapters, all with their own tensors: which are active, frozen and merged is
/// copied too
/// (`Module::clone` alone makes frozen plain layers trainable again).
template <class Model>
std::shared_ptr<Model> clone(Model& model) {
  auto copy = std::dynamic_pointer_cast<Model>(model.clone());
  TORCH_CHECK(copy != nullptr, "clone: this model's clone() does not return its own type");
  const auto from = model.parameters();
  auto into = copy->parameters();  // by position: a Sequential's clone() forgets the names of its modules
  TORCH_CHECK(from.size() == into.size(), "clone: this model's clone() has ", into.size(),
              " parameters, expected ", from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i].set_requires_grad(from[i].requires_grad());
  const auto sources = internal::walk(model);  // whose paths stay those of a whole that this may be a part of
  for (const auto& name : internal::adapter_names(model)) {
    std::vector<Attached> originals;
    for (const auto& node : sources) {
      if (!node.site) continue;
      const auto& own = node.site->pieces(name);
      originals.insert(originals.end(), own.begin(), own.end());
    }
    if (originals.empty()) continue;  // an adapter of the whole that has no layer here
    const auto copied = adapter(*copy, name);
    std::map<const PieceImpl*, std::shared_ptr<PieceImpl>> twin;
    for (size_t i = 0; i < originals.size(); ++i) {
      twin[originals[i].piece.get()] = copied.entries().at(i).piece;
    }
    for (const auto& controller : originals.front().record->controllers) {
      std::vector<std::shared_ptr<PieceImpl>> pieces;
      for (const auto* piece : controller->pieces()) pieces.push_back(twin.at(piece));
      copied.record().controllers.push_back(controller->copy(pieces));
    }
  }
  return copy;
}

}  // namespace peft
