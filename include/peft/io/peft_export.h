// PEFT export: the adapter_config.json that says what an adapter is, in terms Python PEFT reads where there
// are any.
#pragma once

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/pattern.h"
#include "peft/core/problems.h"
#include "peft/io/peft_config.h"
#include "peft/io/peft_format.h"
#include "peft/io/peft_formats.h"
#include "peft/io/peft_places.h"
#include "peft/io/python_regex.h"
#include "peft/methods/bias.h"
#include "peft/methods/replace.h"
#include "peft/model/targets.h"

namespace peft::internal {

/// The expression of a target that means every site.
inline constexpr const char* every_path = ".*";

/// Turns an adapter into a config. Python matches targets against the whole model, of which an adapter knows
/// its own layers only: a short form is used where it can mean nothing else, and whole paths elsewhere.
class PeftExporter {
 public:
  PeftExporter(const Adapter& adapter, std::vector<std::string>& notes) : adapter_(adapter), notes_(notes) {}

  /// The text of the adapter_config.json: Python's keys, sorted, indented by 2.
  std::string text() {
    sort_entries();
    config_.base_model = adapter_.record().model.name_or_path;
    config_.task_type = adapter_.record().model.task_type;
    if (config_.format) set_targets();
    set_saved();
    set_bias();
    check_matrices();
    if (!config_.format) {
      own("it has no LoRA or other method Python has");
    } else if (const auto why = config_.format->unreadable(methods_); !why.empty()) {
      own(why);
    } else if (!saved_.empty() && !knows("modules_to_save")) {
      own("Python trains no layers of their own beside " + config_.format->title());
    } else {
      for (const auto& target : targeted_) {
        if (lies_under(target_of(target), config_.modules_to_save)) {
          own("'" + path(target) + "' carries a " + config_.format->title() + " inside a layer of its own");
          break;
        }
      }
    }
    if (config_.own && config_.format && !config_.format->wraps_layers()) {
      Problems problems;
      problems.add(notes_.back() + ", nor has this library's form words for a " + config_.format->title() +
                   " (hint: make them two adapters)");
      raise(problems);
    }
    if (config_.own) set_own();
    if (config_.format) {
      const auto why = config_.format->unusable(adapter_.record().model.model_type);
      if (!why.empty()) notes_.push_back(why);
    }
    check_head();
    return json().dump(2);
  }

  const PeftFormat* format() const { return config_.format; }
  /// True where the file has a tensor under its second name.
  bool has_second(const SecondName& names) const {
    if (config_.own) return false;
    const auto site = module_above(names.own);
    const bool biased = stands_at(site, biases_);
    if (biased && config_.bias == BiasMode::all) return true;
    return (biased || stands_at(site, saved_)) && saves_above(names);
  }

 private:
  using Entry = Adapter::Entry;

  static const std::string& path(const Entry& entry) { return entry.site->path(); }
  static std::vector<std::string> paths(const Entries& entries) {
    std::vector<std::string> found;
    for (const auto& entry : entries) found.push_back(path(entry));
    return found;
  }

  static bool stands_at(const std::string& site, const Entries& entries) {
    return std::any_of(entries.begin(), entries.end(),
                       [&site](const Entry& entry) { return path(entry) == site; });
  }

  /// What Python's targets name: the module above, of a part of one.
  static std::string target_of(const Entry& entry) { return entry.site->info().target(); }
  std::vector<std::string> targets() const {
    std::vector<std::string> found;
    for (const auto& entry : targeted_) {
      const auto target = target_of(entry);
      if (std::find(found.begin(), found.end(), target) == found.end()) found.push_back(target);
    }
    return found;
  }

  void sort_entries() {
    Problems problems;
    const auto* of_all = format_of(adapter_.entries());
    for (const auto& entry : adapter_.entries()) {
      const bool in_module = entry.site->info().files.kind != FileNames::Kind::layer;
      if (path(entry).empty()) {
        problems.add("the model is a layer itself, and the file names layers by their path in one");
      } else if (in_module && path(entry).find('.') == std::string::npos) {
        problems.add("'" + path(entry) + "' belongs to the model itself, and the file names modules in one");
      }
      const auto* format = of_all && of_all->owns(*entry.piece) ? of_all : format_of(*entry.piece);
      if (format && config_.format && format != config_.format) {
        problems.add("'" + path(entry) + "' carries a " + format->title() + " and '" +
                     path(methods_.front()) + "' a " + config_.format->title() +
                     ", but one config holds one method (hint: make them two adapters)");
      } else if (format) {
        config_.format = format;
        methods_.push_back(entry);
        if (format->is_targeted(entry)) targeted_.push_back(entry);
      } else if (std::dynamic_pointer_cast<BiasImpl>(entry.piece)) {
        biases_.push_back(entry);
      } else if (std::dynamic_pointer_cast<ReplaceImpl>(entry.piece)) {
        saved_.push_back(entry);
      } else {
        problems.add("'" + path(entry) + "': '" + entry.piece->method() + "' has no form on disk");
      }
    }
    if (adapter_.entries().empty()) problems.add("the adapter has no pieces");
    raise(problems);
  }
  void raise(const Problems& problems) const {
    problems.raise("save_adapter: '" + adapter_.name() + "' cannot be written");
  }

  /// All keys, the common ones first, so that the method's row sees them.
  nlohmann::json json() {
    const auto* format = config_.format;
    auto json = default_json(format);
    json["peft_type"] = !config_.own ? format->peft_type() : biases_.empty() ? "REPLACE" : "BIAS";
    if (!config_.task_type.empty()) json["task_type"] = config_.task_type;
    if (!config_.base_model.empty()) json["base_model_name_or_path"] = config_.base_model;
    if (!config_.modules_to_save.empty()) json["modules_to_save"] = config_.modules_to_save;
    if (config_.own) json["bias_modules"] = config_.bias_modules;
    if (!format) return json;
    if (config_.own) json["method"] = format->peft_type();
    if (!config_.target_pattern.empty()) {
      json["target_modules"] = config_.target_pattern;
    } else if (!config_.target_names.empty()) {
      json["target_modules"] = config_.target_names;
    }
    if (!config_.exclude_names.empty()) json["exclude_modules"] = config_.exclude_names;
    if (!config_.layers.empty()) json["layers_to_transform"] = config_.layers;
    if (!config_.layers_pattern.empty()) json["layers_pattern"] = config_.layers_pattern;
    if (config_.bias == BiasMode::all) json["bias"] = "all";
    if (config_.bias == BiasMode::targets) json["bias"] = format->bias_of_targets();
    if (knows("fan_in_fan_out")) {
      json["fan_in_fan_out"] = std::any_of(methods_.begin(), methods_.end(), [](const Entry& entry) {
        return entry.piece->site().fan_in_fan_out;
      });
    }
    Problems problems;
    format->write(methods_, json, notes_, problems);
    raise(problems);
    return json;
  }

  /// True if the method's config has this key.
  bool knows(const char* key) const { return config_.format->defaults().contains(key); }

  void set_targets() {
    if (targeted_.empty() || names_say_it() || pattern_says_it()) return;
    const auto placed = targets();
    config_.target_names = placed;
    const auto& all = adapter_.record().paths;
    // A path also means every one that ends in it.
    const auto means_more = [&](const std::string& target) {
      const auto is_other = [&](const std::string& other) {
        return other.ends_with("." + target) &&
               std::find(placed.begin(), placed.end(), other) == placed.end();
      };
      return target.find('.') == std::string::npos || std::any_of(all.begin(), all.end(), is_other);
    };
    if (std::none_of(placed.begin(), placed.end(), means_more)) return;
    for (const auto& target : placed) {
      config_.target_pattern += (config_.target_pattern.empty() ? "" : "|") + escape_regex(target);
    }
    config_.target_names.clear();
  }

  /// Paths of the modules above the adapted layers.
  std::set<std::string> containers() const {
    std::set<std::string> above;
    for (const auto& target : targets()) {
      for (auto dot = target.find('.'); dot != std::string::npos; dot = target.find('.', dot + 1)) {
        above.insert(target.substr(0, dot));
      }
    }
    return above;
  }

  /// True if a short form of the targets also means a layer that they do not place: one that the method left
  /// out, or lost on the way.
  template <class Means>
  bool means_too_much(const Means& means) const {
    const auto placed = targets();
    const auto is_other = [&](const std::string& target) {
      return means(target) && std::find(placed.begin(), placed.end(), target) == placed.end() &&
             !stands_at(target, saved_);  // which Python leaves alone
    };
    const auto& all = adapter_.record().paths;
    return std::any_of(all.begin(), all.end(), is_other) ||
           std::any_of(methods_.begin(), methods_.end(),
                       [&](const Entry& entry) { return is_other(target_of(entry)); });
  }

  bool names_say_it() {
    const auto& first = *targeted_.front().origin;
    std::set<std::string> names;
    for (const auto& entry : targeted_) {
      const auto& origin = *entry.origin;
      if (origin.names.empty() || !origin.pattern.empty() || origin.layers != first.layers ||
          origin.layers_pattern != first.layers_pattern || origin.exclude != first.exclude) {
        return false;
      }
      bool direct = false;
      for (const auto& name : origin.names) {
        if (!ends_in_name(target_of(entry), name)) continue;
        direct = true;
        names.insert(name);
      }
      if (!direct) return false;  // a container was named
    }
    if (!first.exclude.empty() && !knows("exclude_modules")) return false;
    if (!first.layers.empty() && !knows("layers_to_transform")) return false;
    // Python excludes a module itself, not what lies below it: only the name of a target can be excluded
    // alike.
    for (const auto& excluded : first.exclude) {
      const auto means_target = [&](const std::string& name) { return ends_in_name(excluded, name); };
      if (std::none_of(first.names.begin(), first.names.end(), means_target)) return false;
    }
    for (const auto& pattern : first.layers_pattern) {
      if (!reads_alike_in_python(pattern)) return false;
    }
    for (const auto& container : containers()) {
      for (const auto& name : names) {
        if (ends_in_name(container, name)) return false;  // which Python would try to adapt
      }
    }
    const auto named = [&](const std::string& target) {
      const auto bears = [&target](const std::string& name) { return ends_in_name(target, name); };
      if (std::any_of(first.exclude.begin(), first.exclude.end(), bears)) return false;
      return std::any_of(names.begin(), names.end(), bears) &&
             (names.count(target) || lies_in_layers(target, first.layers, first.layers_pattern));
    };
    if (means_too_much(named)) return false;
    config_.target_names.assign(names.begin(), names.end());
    config_.exclude_names = first.exclude;
    config_.layers = first.layers;
    config_.layers_pattern = first.layers_pattern;
    return true;
  }

  bool pattern_says_it() {
    const auto& first = *targeted_.front().origin;
    // Everything, as `all()` means it, is everything that takes the method: Python's would be all modules.
    if (first.pattern == every_path) return false;
    if (first.pattern.empty() || !first.exclude.empty() || !reads_alike_in_python(first.pattern))
      return false;
    const std::regex expression(first.pattern);
    for (const auto& entry : targeted_) {
      if (entry.origin->pattern != first.pattern || !entry.origin->exclude.empty()) return false;
      if (!std::regex_match(target_of(entry), expression)) return false;
    }
    for (const auto& container : containers()) {
      if (std::regex_match(container, expression)) return false;
    }
    if (means_too_much([&](const std::string& target) { return std::regex_match(target, expression); })) {
      return false;
    }
    config_.target_pattern = first.pattern;
    return true;
  }

  void set_saved() {
    std::set<std::string> names;
    for (const auto& entry : saved_) {
      const auto& origin = *entry.origin;
      const bool plain = origin.pattern.empty() && origin.exclude.empty() && origin.layers.empty();
      const auto info = entry.site->info();
      const bool in_module = info.files.kind != FileNames::Kind::layer;
      if (in_module && !(plain && lies_under(module_above(path(entry)), origin.names))) {
        own("'" + path(entry) + "' is a part of a module, which Python saves whole");
      }
      if (plain && lies_under(path(entry), origin.names)) {
        names.insert(origin.names.begin(), origin.names.end());
      } else {
        names.insert(path(entry));
      }
    }
    // Python saves every module whose path ends in a name, dot or not.
    const auto whole = paths(saved_);
    const auto also_means = [&](const std::string& p) {
      const auto ends_so = [&](const std::string& name) { return p.ends_with(name); };
      const auto lies_in = [&](const std::string& own) { return own == p || own.starts_with(p + "."); };
      return std::any_of(names.begin(), names.end(), ends_so) &&
             std::none_of(whole.begin(), whole.end(), lies_in);
    };
    const auto& all = adapter_.record().paths;
    if (std::any_of(all.begin(), all.end(), also_means)) names = {whole.begin(), whole.end()};
    const auto other = std::find_if(all.begin(), all.end(), also_means);
    if (other != all.end()) own("Python would save '" + *other + "' too, whose path ends as a saved one's");
    config_.modules_to_save.assign(names.begin(), names.end());
  }

  void set_bias() {
    if (biases_.empty()) return;
    std::set<std::string> biased, adapted;
    for (const auto& entry : biases_) {
      if (!is_of_saved_head(entry)) biased.insert(path(entry));
    }
    if (biased.empty()) return;
    for (const auto& entry : targeted_) {
      if (has_own_bias(entry.site->info())) adapted.insert(path(entry));
    }
    const bool everywhere = std::all_of(biases_.begin(), biases_.end(), [&](const Entry& entry) {
      const auto& origin = *entry.origin;
      return has_own_bias(entry.site->info()) && origin.pattern == every_path && origin.names.empty() &&
             std::all_of(origin.exclude.begin(), origin.exclude.end(), [&](const std::string& name) {
               return std::find(config_.modules_to_save.begin(), config_.modules_to_save.end(), name) !=
                      config_.modules_to_save.end();
             });
    });
    const bool has_modes = config_.format && knows("bias");
    if (has_modes && everywhere &&
        std::includes(biased.begin(), biased.end(), adapted.begin(), adapted.end())) {
      config_.bias = BiasMode::all;
    } else if (has_modes && biased == adapted) {
      config_.bias = BiasMode::targets;
    } else if (has_modes) {
      own("the biases it trains are neither those of all layers nor those of the " + config_.format->title() +
          "'s");
    } else if (config_.format) {
      own("Python trains no biases beside " + config_.format->title());
    }
  }

  /// A tied head that is no module in Python's model has no matrix there that could train.
  void check_matrices() {
    for (const auto& names : adapter_.record().model.second_names) {
      const auto site = module_above(names.own);
      if (names.kind == SecondName::Kind::only && stands_at(site, saved_)) {
        own("'" + site + "' has a matrix of its own, where Python's head has that of the words");
      }
    }
  }
  /// True where Python saves the module that has the second name.
  bool saves_above(const SecondName& names) const {
    return lies_under(module_above(names.second), config_.modules_to_save);
  }
  /// True for the bias of a head that is saved, where Python's head has no other tensor.
  bool is_of_saved_head(const Entry& entry) const {
    const auto& all = adapter_.record().model.second_names;
    return std::any_of(all.begin(), all.end(), [&](const SecondName& names) {
      return names.kind == SecondName::Kind::only && module_above(names.own) == path(entry) &&
             saves_above(names);
    });
  }

  void own(const std::string& why) {
    if (config_.own) return;
    config_.own = true;
    notes_.push_back("Python PEFT cannot read this adapter: " + why + " (peft_type " +
                     (biases_.empty() ? "REPLACE" : "BIAS") + " is this library's own)");
  }
  void set_own() {
    config_.bias = BiasMode::none;
    config_.bias_modules = paths(biases_);
    config_.modules_to_save = paths(saved_);
    const bool whole = config_.format && config_.format->adapts_whole_modules();
    config_.target_names = whole ? targets() : paths(targeted_);
    config_.target_pattern.clear();
    config_.exclude_names.clear();
    config_.layers.clear();
    config_.layers_pattern.clear();
  }

  /// Python's classes for these tasks ask for a trained head.
  void check_head() {
    const auto found = task_heads().find(config_.task_type);
    if (found == task_heads().end() || config_.own) return;
    const auto is_saved_head = [&](const std::string& p) {
      const auto ends = [&p](const std::string& name) { return p.ends_with(name); };
      const auto& names = config_.modules_to_save;
      return std::any_of(found->second.begin(), found->second.end(), ends) &&
             std::any_of(names.begin(), names.end(), ends);
    };
    const auto& all = adapter_.record().paths;
    if (std::any_of(all.begin(), all.end(), is_saved_head)) return;
    if (config_.format && !config_.format->wraps_layers()) {
      notes_.push_back(
          "the task type " + config_.task_type +
          " is written as FEATURE_EXTRACTION: with it Python asks for a trained head, which this "
          "adapter does not have (it then drops token types)");
      config_.task_type = "FEATURE_EXTRACTION";
      return;
    }
    notes_.push_back(
        "the task type " + config_.task_type +
        " is left out: with it Python asks for a trained head, which this adapter does not have");
    config_.task_type.clear();
  }

  const Adapter& adapter_;
  std::vector<std::string>& notes_;
  PeftConfig config_;
  Entries methods_, targeted_, biases_, saved_;
};

}  // namespace peft::internal
