// PEFT targets: which modules of a model an adapter_config.json means, as Hugging Face PEFT finds them.
#pragma once

#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/peft_config_reader.h"
#include "peft/methods/bias.h"
#include "peft/methods/replace.h"
#include "peft/model/add_adapter.h"
#include "peft/model/targets.h"

namespace peft::internal {

/// The modules of a model, with the sites that plain layers of a Sequential would become.
class ModuleFinder {
 public:
  explicit ModuleFinder(nn::Module& model) : nodes_(walk(model, /*learn_paths=*/true)) {
    Plan never_committed;
    for (auto& node : nodes_) {
      if (!node.site) become_site(node, never_committed);
      infos_.push_back(node.site ? node.site->info() : SiteInfo());
      const auto& info = infos_.back();
      if (node.site && info.files.kind == FileNames::Kind::part) parts_[info.target()].push_back(info);
      paths_.push_back(node.path);
      const auto dot = node.path.rfind('.');
      if (dot != std::string::npos) paths_.push_back(node.path.substr(dot + 1));
    }
  }

  const std::vector<Node>& nodes() const { return nodes_; }

  /// Where the config puts its method. What does not fit is added to `problems`.
  std::vector<std::string> method_sites(const PeftConfig& config, Problems& problems,
                                        const Note& note) const {
    const auto part = config.part(all());
    const auto title = config.format->title();
    std::vector<std::string> sites;
    std::set<std::string> unmatched(config.target_names.begin(), config.target_names.end());
    const std::regex target(config.target_pattern), excluded(config.exclude_pattern);
    bool any = false;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const auto& node = nodes_[i];
      const auto& info = infos_[i];
      if (!config.own && node.site && info.files.kind != FileNames::Kind::layer) continue;
      const bool matched = selects(config, node, info, target, unmatched);
      any = any || matched;
      if (!matched || is_left_out(config, node.path, excluded)) continue;
      if (const auto parts = parts_.find(node.path); parts != parts_.end()) {
        for (const auto& inner : parts->second) {
          const auto why = part.refusal(inner);
          if (why.empty()) sites.push_back(inner.path);
          if (!why.empty()) problems.add("'" + inner.path + "' cannot take the " + title + ": " + why);
        }
        continue;
      }
      if (!node.site || !info.offers_to(part.needs)) {
        problems.add(std::string(config_file_name) + ": 'target_modules' means '" + node.path +
                     "', which is a " + (node.site ? info.layer : plain_name(node)) + " and takes no " +
                     title + hint(node));
      } else if (const auto why = part.refusal(info); !why.empty()) {
        problems.add("'" + node.path + "' cannot take the " + title + ": " + why);
      } else {
        sites.push_back(node.path);
      }
    }
    for (const auto& name : unmatched) {
      if (any) note(std::string(config_file_name) + ": 'target_modules': no module matches '" + name + "'");
    }
    if (!any) {
      const auto wanted = config.target_names.empty() ? config.target_pattern : config.target_names.front();
      problems.add(std::string(config_file_name) +
                   ": 'target_modules' matches no module of this model; expected one " + "like " +
                   closest(wanted, paths_) + ", but got '" + wanted + "'");
    }
    return sites;
  }

  /// Where the adapter keeps whole layers of its own (`modules_to_save`).
  std::vector<std::string> saved_sites(const PeftConfig& config, Problems& problems) const {
    std::vector<std::string> sites;
    for (const auto& node : nodes_) {
      const auto bears = [&](const std::string& name) {
        return config.own ? node.path == name : node.path.ends_with(name);
      };
      if (!std::any_of(config.modules_to_save.begin(), config.modules_to_save.end(), bears)) continue;
      for (size_t i = 0; i < nodes_.size(); ++i) {
        const auto& inner = nodes_[i];
        if (inner.path != node.path && !inner.path.starts_with(node.path + ".")) continue;
        const bool weighs = inner.site && infos_[i].offers_to(Needs::weights);
        if (weighs && std::find(sites.begin(), sites.end(), inner.path) == sites.end())
          sites.push_back(inner.path);
        if (!inner.site && !covered(inner)) {
          problems.add(std::string(config_file_name) + ": 'modules_to_save' means '" + inner.path +
                       "', which is a " + plain_name(inner) + hint(inner));
        }
      }
    }
    for (const auto& name : config.modules_to_save) {
      if (config.own && std::find(sites.begin(), sites.end(), name) == sites.end()) {
        problems.add(std::string(config_file_name) + ": 'modules_to_save' names '" + name +
                     "', which this model does not have; closest: " + closest(name, paths_));
      }
    }
    return sites;
  }

  /// Where the adapter has biases of its own. `in_file`: whether the file has a bias of the module's.
  std::vector<std::string> bias_sites(const PeftConfig& config, const std::vector<std::string>& adapted,
                                      const std::vector<std::string>& saved,
                                      const std::function<bool(const std::string& path)>& in_file,
                                      Problems& problems) const {
    const auto has = [](const std::vector<std::string>& list, const std::string& path) {
      return std::find(list.begin(), list.end(), path) != list.end();
    };
    const auto& named = config.bias_modules;
    const bool everywhere = config.bias == BiasMode::all;
    std::vector<std::string> sites;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const auto& node = nodes_[i];
      if (!config.own && config.bias == BiasMode::none) continue;
      if (config.own ? !has(named, node.path) : !everywhere && !has(adapted, node.path)) continue;
      if (has(saved, node.path)) continue;
      // Python knows some sites' biases by another name than "bias", which its modes pass by.
      if (!config.own && node.site && !has_own_bias(infos_[i])) continue;
      if (node.site && infos_[i].has_bias()) {
        sites.push_back(node.path);
      } else if (everywhere && !node.site && in_file(node.path) &&
                 node.module->named_parameters(/*recurse=*/false).contains("bias")) {
        problems.add(std::string(config_file_name) + ": 'bias' \"all\" means '" + node.path +
                     "', which is a " + plain_name(node) + hint(node));
      }
    }
    for (const auto& name : named) {
      if (!has(sites, name)) {
        problems.add(std::string(config_file_name) + ": 'bias_modules' names '" + name +
                     "', where this model has no bias; closest: " + closest(name, paths_));
      }
    }
    return sites;
  }

  /// A target that is exactly these sites.
  Target at(const std::vector<std::string>& paths) const {
    const std::set<std::string> wanted(paths.begin(), paths.end());
    const bool by_name = std::none_of(nodes_.begin(), nodes_.end(), [&](const Node& node) {
      if (wanted.count(node.path)) return false;
      for (auto dot = node.path.find('.'); dot != std::string::npos; dot = node.path.find('.', dot + 1)) {
        if (wanted.count(node.path.substr(dot + 1))) return true;
      }
      return false;
    });
    if (by_name) return named(paths);
    return where([wanted](const SiteInfo& site) { return wanted.count(site.path) > 0; });
  }

 private:
  /// True if every tensor that a module registers itself is a site's weight or bias.
  bool covered(const Node& node) const {
    std::set<const void*> held;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const auto& inner = nodes_[i];
      if (!inner.site || inner.parent != node.module) continue;
      if (infos_[i].files.kind == FileNames::Kind::layer) continue;
      const auto weights = inner.site->base_weights();
      for (const auto& tensor : {weights.weight, weights.bias}) held.insert(tensor.unsafeGetTensorImpl());
    }
    const auto own = node.module->parameters(/*recurse=*/false);
    return std::all_of(own.begin(), own.end(),
                       [&](const Tensor& tensor) { return held.count(tensor.unsafeGetTensorImpl()) > 0; });
  }

  /// Hugging Face's `check_target_module_exists`, without what it leaves out.
  bool selects(const PeftConfig& config, const Node& node, const SiteInfo& info, const std::regex& target,
               std::set<std::string>& unmatched) const {
    const auto& path = node.path;
    if (path.empty()) return false;
    if (config.all_linear) {
      const bool linear = node.site ? info.layer == "Linear" || info.layer == "Conv1D"
                                    : std::dynamic_pointer_cast<nn::LinearImpl>(node.module) != nullptr;
      static const std::set<std::string> outputs{"lm_head", "lm_head.decoder", "cls.predictions.decoder"};
      const bool head =
          outputs.count(path) || (config.task_type == "SEQ_CLS" && (path == "classifier" || path == "score"));
      return linear && !head;
    }
    if (!config.target_pattern.empty()) return std::regex_match(path, target);
    bool found = false;
    for (const auto& name : config.target_names) {
      if (config.own ? path != name : !ends_in_name(path, name)) continue;
      unmatched.erase(name);
      found = found || path == name || lies_in_layers(path, config.layers, config.layers_pattern);
    }
    return found;
  }

  bool is_left_out(const PeftConfig& config, const std::string& path, const std::regex& excluded) const {
    const auto bears = [&](const std::string& name) { return ends_in_name(path, name); };
    if (std::any_of(config.exclude_names.begin(), config.exclude_names.end(), bears)) return true;
    if (!config.exclude_pattern.empty() && std::regex_match(path, excluded)) return true;
    return !config.own && lies_under(path, config.modules_to_save);
  }

  static std::string plain_name(const Node& node) {
    const auto name = node.module->name();
    return node.module->children().empty() ? "plain " + name : name;
  }
  static std::string hint(const Node& node) {
    if (node.site || !node.module->children().empty()) return "";
    return " (hint: declare it as peft::Linear, peft::Embedding, … in its parent)";
  }

  std::vector<Node> nodes_;
  std::vector<SiteInfo> infos_;                         ///< of the nodes that are sites
  std::map<std::string, std::vector<SiteInfo>> parts_;  ///< by module: the sites that are parts of it
  std::vector<std::string> paths_;
};

}  // namespace peft::internal
