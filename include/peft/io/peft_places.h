// PeftPlaces: where Hugging Face PEFT's files put the tensors of each site.
#pragma once

#include <map>
#include <set>
#include <string>

#include "peft/io/peft_format.h"

namespace peft::internal {

/// What Python's wrapper puts before every path of the model.
inline constexpr std::string_view model_prefix = "base_model.model.";

/// True for a site whose bias is that of a module of Python's, as "bias".
inline bool has_own_bias(const SiteInfo& info) {
  return info.has_bias() && info.files.kind != FileNames::Kind::parameter && info.files.bias == "bias";
}

/// Keys of one adapter's tensors. A layer that a method adapts lies one level down in Python, as
/// `base_layer`; of the parameters of one module each adds a level, the first one registered the innermost.
class PeftPlaces {
 public:
  /// `owned`: the pieces of the adapter's method, in the model's order.
  explicit PeftPlaces(const Entries& owned) {
    for (const auto& entry : owned) {
      const auto info = entry.site->info();
      if (!wrapped_.insert(info.path).second) continue;
      if (info.files.kind == FileNames::Kind::part) parts_.insert(info.target());
      if (info.files.kind == FileNames::Kind::parameter) {
        depth_of_.emplace(info.path, levels_[module_above(info.path)]++);
      }
    }
  }

  /// What the keys of the method's tensors at a site begin with.
  std::string method_prefix(const SiteInfo& info) const {
    switch (info.files.kind) {
      case FileNames::Kind::layer:
        break;
      case FileNames::Kind::part:
        return under(info.target()) + info.files.level;
      case FileNames::Kind::parameter:
        const auto module = module_above(info.path);
        return under(module) + down(levels_.at(module) - 1 - depth_of_.at(info.path));
    }
    return under(info.path);
  }

  /// The key of the site's own weight or bias.
  std::string own_key(const SiteInfo& info, bool bias) const {
    const auto& name = bias ? info.files.bias : info.files.weight;
    switch (info.files.kind) {
      case FileNames::Kind::layer:
        break;
      case FileNames::Kind::part: {
        const auto level = info.files.level;
        if (parts_.count(info.target())) return under(info.target()) + level + "base_layer." + name;
        return under(info.target()) + level.substr(level.empty() ? 0 : std::string("base_layer.").size()) +
               name;
      }
      case FileNames::Kind::parameter:
        const auto module = module_above(info.path);
        const auto found = levels_.find(module);
        return under(module) + down(found == levels_.end() ? 0 : found->second) + name;
    }
    return under(info.path) + (wrapped_.count(info.path) ? "base_layer." : "") + name;
  }

 private:
  static std::string under(const std::string& path) {
    return std::string(model_prefix) + (path.empty() ? "" : path + ".");
  }
  static std::string down(int levels) {
    std::string text;
    for (int i = 0; i < levels; ++i) text += "base_layer.";
    return text;
  }

  std::set<std::string> wrapped_, parts_;
  std::map<std::string, int> levels_;    ///< of a module: how many of its parameters are adapted
  std::map<std::string, int> depth_of_;  ///< of a parameter: how many were registered before it
};

}  // namespace peft::internal
