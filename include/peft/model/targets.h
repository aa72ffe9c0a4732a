// Targets: which sites of a model a method goes to.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapted.h"
#include "peft/core/pattern.h"
#include "peft/core/problems.h"
#include "peft/core/site.h"

namespace peft {

/// Which sites of a model a method goes to. Made by `named`, `matching`, `where`, `all`; refined by `exclude`
/// and `layers`. A target that names a container means every site below it that can take the method.
class Target {
 public:
  using Predicate = std::function<bool(const SiteInfo&)>;
  /// Makes the predicate for one model, of all its sites in its order. May throw c10::ValueError.
  using Survey = std::function<Predicate(const std::vector<SiteInfo>&)>;

  explicit Target(Origin origin, Predicate predicate = {}, Survey survey = {})
      : origin_(std::make_shared<Origin>(std::move(origin))),
        predicate_(std::move(predicate)),
        survey_(std::move(survey)) {}

  /// Leaves out modules whose path is one of these names or ends in a dot and one, and all below them.
  Target exclude(std::vector<std::string> names) const {
    auto result = *this;
    result.origin_ = std::make_shared<Origin>(*origin_);
    result.origin_->exclude = std::move(names);
    return result;
  }
  /// Keeps, of the modules found by a name's last segments, those in these layers: the layer's index is the
  /// first number that follows two names in the path (`bert.layer.0.fc`, but not `layer.0.fc`), or that
  /// follows one of the `patterns`. Hugging Face's `layers_to_transform` and `layers_pattern`.
  Target layers(std::vector<int64_t> indices, std::vector<std::string> patterns = {}) const {
    TORCH_CHECK_VALUE(!origin_->names.empty(), "Target::layers: expected a target made by named({…})");
    for (const auto& pattern : patterns) internal::check_pattern("Target::layers", pattern);
    for (const auto index : indices)
      TORCH_CHECK_VALUE(index >= 0, "Target::layers: layers must be at least 0, but got ", index);
    auto result = *this;
    result.origin_ = std::make_shared<Origin>(*origin_);
    result.origin_->layers = std::move(indices);
    result.origin_->layers_pattern = std::move(patterns);
    return result;
  }

  std::shared_ptr<const Origin> origin() const { return origin_; }
  const Predicate& predicate() const { return predicate_; }
  const Survey& survey() const { return survey_; }

 private:
  std::shared_ptr<Origin> origin_;
  Predicate predicate_;
  Survey survey_;
};

/// Modules whose path is one of `names` or ends in a dot and one of them. Each name must match something.
inline Target named(std::vector<std::string> names) {
  TORCH_CHECK_VALUE(!names.empty(), "named: expected at least one name, but got none");
  Origin origin;
  origin.names = std::move(names);
  return Target(std::move(origin));
}
/// Modules whose whole path matches the regular expression (ECMAScript).
inline Target matching(std::string pattern) {
  try {
    std::regex{pattern};
  } catch (const std::regex_error& error) {
    TORCH_CHECK_VALUE(false, "matching: '", pattern, "' is no regular expression: ", error.what());
  }
  Origin origin;
  origin.pattern = std::move(pattern);
  return Target(std::move(origin));
}
/// Sites that can take the method and for which the predicate holds. At least one must.
inline Target where(Target::Predicate predicate) { return Target(Origin{}, std::move(predicate)); }
/// Sites that can take the method and for which the predicate holds that `survey` makes of all sites of the
/// model.
inline Target surveyed(Target::Survey survey) { return Target(Origin{}, {}, std::move(survey)); }
/// Every site that can take the method.
inline Target all() {
  Origin origin;
  origin.pattern = ".*";
  return Target(std::move(origin), [](const SiteInfo&) { return true; });
}

namespace internal {

/// Refuses what cannot be the name of an adapter.
inline void check_adapter_name(const std::string& name, Problems& problems) {
  if (!name.empty() && name.find('.') == std::string::npos && name != RowAdapters::base && name != probe_name)
    return;
  problems.add(std::string("an adapter's name must not be empty, hold a dot or be '") + RowAdapters::base +
               "' or '" + probe_name + "', but got '" + name + "'");
}

/// True if `path` is `name` or ends in a dot and `name`.
inline bool ends_in_name(const std::string& path, const std::string& name) {
  return path == name || path.ends_with("." + name);
}

/// One module of a model, adapters left out.
struct Node {
  std::string path;
  std::shared_ptr<nn::Module> module;
  std::shared_ptr<SiteImpl> site;      ///< the module, if it is one
  std::shared_ptr<nn::Module> parent;  ///< nullptr where the root is not held by a shared_ptr
  std::string key;                     ///< under which the parent holds it
};

inline void walk_into(const std::shared_ptr<nn::Module>& parent, nn::Module& module, const std::string& path,
                      std::vector<Node>& nodes, std::set<const nn::Module*>& seen) {
  const auto* site = dynamic_cast<const SiteImpl*>(&module);
  for (const auto& [key, child] : site ? site->base_children() : module.named_children().pairs()) {
    if (!seen.insert(child.get()).second) continue;
    auto inner = std::dynamic_pointer_cast<SiteImpl>(child);
    const auto segment = inner ? inner->segment(key) : key;
    const auto child_path = path.empty() ? segment : path + "." + segment;
    nodes.push_back({child_path, child, std::move(inner), parent, key});
    walk_into(child, *child, child_path, nodes, seen);
  }
}

/// The activation of a model's sites: of several, the one that knows most adapters, for its site was adapted
/// last.
inline std::shared_ptr<Activation> common_activation(const std::vector<Node>& nodes) {
  std::shared_ptr<Activation> activation;
  for (const auto& node : nodes) {
    if (!node.site || node.site->activation() == activation) continue;
    if (!activation || node.site->activation()->get()->known.size() > activation->get()->known.size()) {
      activation = node.site->activation();
    }
  }
  return activation;
}

/// Adds the adapters that only other sites' activations know: parts of a model that were adapted apart.
inline void adopt(const std::shared_ptr<Activation>& activation, const std::vector<Node>& nodes) {
  if (!activation) return;
  auto set = *activation->get();
  const auto before = set.known.size();
  for (const auto& node : nodes) {
    if (!node.site || node.site->activation() == activation) continue;
    const auto other = node.site->activation()->get();
    for (const auto& name : other->known) {
      if (set.knows(name) || node.site->pieces(name).empty()) continue;
      set.known.push_back(name);
      if (other->is_active(name) && !set.is_active(name)) {
        // Of a block that stands in the other composition all is taken at once.
        const bool plain =
            other->composition.block == Composition::Block::stack &&
            std::any_of(other->composition.children.begin(), other->composition.children.end(),
                        [&](const Composition& child) { return child.is_adapter() && child.name == name; });
        set.append(plain ? Composition(name) : other->composition);
      }
    }
  }
  if (set.known.size() > before) activation->set(std::move(set));
}

/// Every module of a model, each once, parents before children, in the order of registration; adapters left
/// out. Sites come to share one activation and one record an adapter (a plain `clone` gives each its own).
/// `learn_paths`: their paths in this model become the ones that files and messages name them by; for verbs
/// that make or look up a handle, so that one on a part of the model does not rename what was adapted as a
/// whole.
inline std::vector<Node> walk(nn::Module& model, bool learn_paths = false) {
  std::vector<Node> nodes;
  if (auto* self = dynamic_cast<SiteImpl*>(&model)) {
    auto shared = std::dynamic_pointer_cast<SiteImpl>(self->shared_from_this());
    nodes.push_back({"", shared, shared, nullptr, ""});
  }
  std::set<const nn::Module*> seen;
  walk_into(model.weak_from_this().lock(), model, "", nodes, seen);
  for (const auto& node : nodes) {
    if (!node.site) continue;
    if (learn_paths && node.parent && node.parent != node.module && node.site->base_parameters().is_empty()) {
      const auto around = node.parent->parameters();
      if (!around.empty()) {
        node.site->set_surroundings(around.front().scalar_type(), around.front().device());
      }
    }
    if (learn_paths && node.site->path() != node.path) node.site->set_path(node.path);
  }
  const auto activation = common_activation(nodes);
  const bool common = std::all_of(nodes.begin(), nodes.end(), [&](const Node& node) {
    return !node.site || node.site->activation() == activation;
  });
  if (common) return nodes;
  std::map<std::string, std::shared_ptr<AdapterRecord>> records;
  for (const auto& node : nodes) {
    if (!node.site) continue;
    for (const auto& name : node.site->adapters()) {
      const auto record = records.emplace(name, node.site->pieces(name).front().record).first->second;
      if (node.site->pieces(name).front().record != record) node.site->set_record(name, record);
    }
  }
  adopt(activation, nodes);
  for (const auto& node : nodes) {
    if (node.site) node.site->share(activation);
  }
  activation->set(*activation->get());  // with room for the sites that joined
  return nodes;
}

inline std::vector<std::string> module_paths(const std::vector<Node>& nodes) {
  std::vector<std::string> paths;
  for (const auto& node : nodes) paths.push_back(node.path);
  return paths;
}

/// The layer index Hugging Face's `layers_to_transform` reads in a path, or −1.
inline int64_t layer_index(const std::string& path, const std::vector<std::string>& patterns) {
  std::smatch match;
  if (patterns.empty()) {
    static const std::regex first_number(R"(.*?\.[^.]*\.(\d+)\..*)");
    return std::regex_match(path, match, first_number) ? std::stoll(match[1]) : -1;
  }
  for (const auto& pattern : patterns) {
    if (std::regex_match(path, match, std::regex("(?:|.*?\\.)" + pattern + R"(\.(\d+)\..*)"))) {
      return std::stoll(match[match.size() - 1]);
    }
  }
  return -1;
}

/// True if a path lies in one of these layers; without any, in all.
inline bool lies_in_layers(const std::string& path, const std::vector<int64_t>& layers,
                           const std::vector<std::string>& patterns) {
  return layers.empty() ||
         std::find(layers.begin(), layers.end(), layer_index(path, patterns)) != layers.end();
}

/// True if the path or a module above it bears one of the excluded names.
inline bool is_excluded(const Origin& origin, const std::string& path) {
  for (size_t end = path.find('.');; end = path.find('.', end + 1)) {
    const auto prefix = path.substr(0, end);
    const auto bears = [&](const std::string& name) { return ends_in_name(prefix, name); };
    if (std::any_of(origin.exclude.begin(), origin.exclude.end(), bears)) return true;
    if (end == std::string::npos) return false;
  }
}

}  // namespace internal
}  // namespace peft
