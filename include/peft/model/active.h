// Verbs on a model's adapters by name: which are active, their names, copies of the model.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
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
  TORCH_CHECK_VALUE(set.knows(name), verb, ": the model has no adapter '", name, "'",
                    set.known.empty() ? std::string() : "; it has " + closest(name, set.known, 20));
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

/// The handle on an adapter the model carries already (after `clone`, or in another function).
inline Adapter adapter(nn::Module& model, const std::string& name) {
  const auto nodes = internal::walk(model, /*learn_paths=*/true);
  internal::require_known(*internal::activation_of(nodes, "adapter")->get(), name, "adapter");
  internal::tie_shared(nodes);
  std::shared_ptr<AdapterRecord> record;
  for (const auto& node : nodes) {
    if (node.site && !record && !node.site->pieces(name).empty())
      record = node.site->pieces(name).front().record;
  }
  TORCH_INTERNAL_ASSERT(record);
  const Adapter handle(record);
  for (const auto& node : nodes) {
    if (!node.site) continue;
    for (const auto& attached : node.site->pieces(name))
      handle.add({node.site, attached.piece, attached.origin});
  }
  return handle;
}

/// Names of the adapters that are active, in the order they compose.
inline std::vector<std::string> active_adapters(nn::Module& model) {
  return internal::activation_of(internal::walk(model), "active_adapters")->get()->active;
}

/// Makes exactly these adapters active, composed in this order. Never touches `requires_grad`. Another
/// thread's forward sees the old set or the new one, not a mixture. Throws: c10::ValueError for a name that
/// is unknown or twice there, a weight method after a method on activations, a merged model.
inline void set_active(nn::Module& model, const std::vector<std::string>& names) {
  const auto nodes = internal::walk(model);
  const auto activation = internal::activation_of(nodes, "set_active");
  auto set = *activation->get();
  internal::Problems problems;
  for (size_t i = 0; i < names.size(); ++i) {
    if (!set.knows(names[i])) {
      problems.add("the model has no adapter '" + names[i] + "'" +
                   (set.known.empty() ? "" : "; it has " + internal::closest(names[i], set.known, 20)));
    }
    if (std::find(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i), names[i]) !=
        names.begin() + static_cast<std::ptrdiff_t>(i)) {
      problems.add("'" + names[i] + "' is named twice");
    }
  }
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (node.site->is_merged()) problems.add("'" + node.path + "' is merged (hint: unmerge first)");
    std::string activations;
    std::vector<std::pair<std::string, const PieceImpl*>> below;
    for (const auto& name : names) {
      for (const auto& attached : node.site->pieces(name)) {
        for (const auto& [other, piece] : below) {
          const auto why = other == name ? std::string() : attached.piece->conflict(*piece);
          if (!why.empty()) {
            problems.add("'" + node.path + "': '" + other + "' and '" + name + "' " + why);
          }
        }
        below.emplace_back(name, attached.piece.get());
        if (attached.piece->works_on_activations()) {
          activations = attached.piece->method();
        } else if (!activations.empty()) {
          problems.add("'" + node.path + "': '" + attached.piece->method() + "' of '" + name +
                       "' changes weights and cannot come after '" + activations + "'");
        }
      }
    }
  }
  problems.raise("set_active");
  set.active = names;
  activation->set(std::move(set));
}

/// Switches all adapters off, remembering which were active: the model computes what it did before any was
/// added.
inline void disable(nn::Module& model) {
  const auto nodes = internal::walk(model);
  for (const auto& node : nodes) {
    TORCH_CHECK(!node.site || !node.site->is_merged(), "disable: '", node.path,
                "' is merged (hint: unmerge first)");
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
  if (to.empty() || to.find('.') != std::string::npos || to == RowAdapters::base) {
    problems.add("an adapter's name must not be empty, hold a dot or be '__base__', but got '" + to + "'");
  }
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (node.site->owns_name(to)) problems.add("'" + to + "' is the name of a child of '" + node.path + "'");
    if (node.site->is_merged()) problems.add("'" + node.path + "' is merged (hint: unmerge first)");
  }
  problems.raise("rename");
  for (const auto& node : nodes) {
    if (!node.site || node.site->pieces(from).empty()) continue;
    node.site->pieces(from).front().record->name = to;
    node.site->rename(from, to);
  }
  std::replace(set.known.begin(), set.known.end(), from, to);
  std::replace(set.active.begin(), set.active.end(), from, to);
  activation->set(std::move(set));
}

/// Takes an adapter off the model. The others stay as they are, active or not.
inline void remove_adapter(nn::Module& model, const std::string& name) {
  const auto nodes = internal::walk(model);
  const auto activation = internal::activation_of(nodes, "remove_adapter");
  auto set = *activation->get();
  internal::require_known(set, name, "remove_adapter");
  for (const auto& node : nodes) {
    TORCH_CHECK(!node.site || !node.site->is_merged(), "remove_adapter: '", node.path,
                "' is merged (hint: unmerge first)");
  }
  std::erase(set.known, name);
  std::erase(set.active, name);
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
  internal::tie_shared(internal::walk(*copy, /*learn_paths=*/true));
  for (const auto& name : internal::adapter_names(model)) {
    const auto original = adapter(model, name);
    if (original.record().controllers.empty()) continue;
    const auto copied = adapter(*copy, name);
    std::map<const PieceImpl*, std::shared_ptr<PieceImpl>> twin;
    for (size_t i = 0; i < original.entries().size(); ++i) {
      twin[original.entries()[i].piece.get()] = copied.entries().at(i).piece;
    }
    for (const auto& controller : original.record().controllers) {
      std::vector<std::shared_ptr<PieceImpl>> pieces;
      for (const auto* piece : controller->pieces()) pieces.push_back(twin.at(piece));
      copied.record().controllers.push_back(controller->copy(pieces));
    }
  }
  return copy;
}

}  // namespace peft
