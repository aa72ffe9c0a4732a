// PEFT export: the adapter_config.json that says what an adapter is, in terms Python PEFT reads where there
// are any.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/problems.h"
#include "peft/io/peft_config.h"
#include "peft/io/peft_tensors.h"
#include "peft/io/python_regex.h"
#include "peft/methods/bias.h"
#include "peft/methods/lora.h"
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

  PeftConfig config() {
    sort_entries();
    config_.base_model = adapter_.record().model.name_or_path;
    config_.task_type = adapter_.record().model.task_type;
    if (!loras_.empty()) {
      config_.has_targets = true;
      set_options();
      set_targets();
    }
    set_saved();
    set_bias();
    if (loras_.empty()) {
      own("it has no LoRA, and Python has no such method");
    } else {
      for (const auto& lora : loras_) {
        if (lies_under(path(lora), config_.modules_to_save)) {
          own("'" + path(lora) + "' carries a LoRA inside a layer of its own");
          break;
        }
      }
    }
    if (config_.is_own()) set_own();
    check_head();
    return config_;
  }

 private:
  using Entry = Adapter::Entry;

  static const std::string& path(const Entry& entry) { return entry.site->path(); }
  static std::vector<std::string> paths(const std::vector<Entry>& entries) {
    std::vector<std::string> found;
    for (const auto& entry : entries) found.push_back(path(entry));
    return found;
  }
  static const LoraImpl& lora(const Entry& entry) { return static_cast<const LoraImpl&>(*entry.piece); }

  void sort_entries() {
    Problems problems;
    for (const auto& entry : adapter_.entries()) {
      if (path(entry).empty())
        problems.add("the model is a layer itself, and the file names layers by their path in one");
      if (std::dynamic_pointer_cast<LoraImpl>(entry.piece)) {
        loras_.push_back(entry);
      } else if (std::dynamic_pointer_cast<BiasImpl>(entry.piece)) {
        biases_.push_back(entry);
      } else if (std::dynamic_pointer_cast<ReplaceImpl>(entry.piece)) {
        saved_.push_back(entry);
      } else {
        problems.add("'" + path(entry) + "': '" + entry.piece->method() + "' has no form on disk");
      }
    }
    if (adapter_.entries().empty()) problems.add("the adapter has no pieces");
    for (const auto& entry : loras_) {
      const auto& first = lora(loras_.front()).options;
      const auto& other = lora(entry).options;
      if (other.rslora() != first.rslora() || other.lora_bias() != first.lora_bias()) {
        problems.add("'" + path(entry) + "' must have the same rslora and lora_bias as '" +
                     path(loras_.front()) + "', for one config holds both (hint: make them two adapters)");
      }
    }
    problems.raise("save_adapter: '" + adapter_.name() + "' cannot be written");
  }

  // Several blocks of rows (`enable`) become one LoRA of as many times the rank; the scale stays.
  static int64_t blocks(const LoraOptions& options) {
    const auto on = std::count(options.enable().begin(), options.enable().end(), true);
    return on ? static_cast<int64_t>(on) : 1;
  }
  static double exported_alpha(const LoraOptions& options, double alpha) {
    const auto k = static_cast<double>(blocks(options));
    return alpha * (options.rslora() ? std::sqrt(k) : k);
  }
  static int64_t rank(const Entry& entry) { return lora(entry).rank * blocks(lora(entry).options); }
  static double alpha(const Entry& entry) { return exported_alpha(lora(entry).options, lora(entry).alpha); }

  void set_options() {
    const auto& first = lora(loras_.front()).options;
    const auto k = blocks(first);
    config_.lora = LoraOptions(first.rank() * k)
                       .alpha(exported_alpha(first, first.alpha()))
                       .dropout(first.dropout())
                       .rslora(first.rslora())
                       .lora_bias(first.lora_bias())
                       .init(first.init());
    bool readable = true;
    std::map<std::string, int64_t> ranks;  // in the order of the file, which is the order of matching
    std::map<std::string, double> alphas;
    for (const auto& [pattern, value] : first.rank_pattern()) {
      readable = readable && reads_alike_in_python(pattern);
      ranks.emplace(pattern, value * k);
    }
    for (const auto& [pattern, value] : first.alpha_pattern()) {
      readable = readable && reads_alike_in_python(pattern);
      alphas.emplace(pattern, exported_alpha(first, value));
    }
    put_patterns(ranks, alphas);
    const auto path_of = [](const Entry& entry) { return path(entry); };
    const auto exact = [](const Entry& entry) { return "^" + escape_regex(path(entry)); };
    if (!readable || !patterns_hold()) spell_patterns(path_of);
    if (!patterns_hold()) spell_patterns(exact);
    for (const auto& entry : loras_) {
      if (lora(entry).options.dropout() != first.dropout()) {
        notes_.push_back("the layers have several rates of dropout; the first layer's, " +
                         nlohmann::json(first.dropout()).dump() + ", is written");
        break;
      }
    }
    if (std::any_of(loras_.begin(), loras_.end(), [](const Entry& e) { return lora(e).scale() != 1.0; })) {
      notes_.push_back("the adapter's scale is not written: loaded, it is 1 again");
    }
    if (std::any_of(loras_.begin(), loras_.end(),
                    [](const Entry& e) { return blocks(lora(e).options) > 1; })) {
      notes_.push_back(
          "LoRA on blocks of rows (enable) is written as one of a higher rank with a block-diagonal B");
    }
  }

  void put_patterns(const std::map<std::string, int64_t>& ranks,
                    const std::map<std::string, double>& alphas) {
    config_.lora.rank_pattern({ranks.begin(), ranks.end()}).alpha_pattern({alphas.begin(), alphas.end()});
  }
  template <class Name>
  void spell_patterns(const Name& name) {
    std::map<std::string, int64_t> ranks;
    std::map<std::string, double> alphas;
    for (const auto& entry : loras_) {
      if (rank(entry) != config_.lora.rank()) ranks.emplace(name(entry), rank(entry));
      if (alpha(entry) != config_.lora.alpha()) alphas.emplace(name(entry), alpha(entry));
    }
    put_patterns(ranks, alphas);
  }
  /// True if the config gives every layer the rank and alpha it has.
  bool patterns_hold() const {
    const auto& options = config_.lora;
    return std::all_of(loras_.begin(), loras_.end(), [&](const Entry& entry) {
      return first_match(options.rank_pattern(), path(entry), options.rank()) == rank(entry) &&
             first_match(options.alpha_pattern(), path(entry), options.alpha()) == alpha(entry);
    });
  }

  void set_targets() {
    if (names_say_it() || pattern_says_it()) return;
    config_.target_names = paths(loras_);
    const bool short_path =
        std::any_of(config_.target_names.begin(), config_.target_names.end(),
                    [](const std::string& p) { return p.find('.') == std::string::npos; });
    if (!short_path) return;
    // A lone name would also mean every path that ends in it.
    for (const auto& target : config_.target_names) {
      config_.target_pattern += (config_.target_pattern.empty() ? "" : "|") + escape_regex(target);
    }
    config_.target_names.clear();
  }

  /// Paths of the modules above the adapted layers.
  std::set<std::string> containers() const {
    std::set<std::string> above;
    for (const auto& target : paths(loras_)) {
      for (auto dot = target.find('.'); dot != std::string::npos; dot = target.find('.', dot + 1)) {
        above.insert(target.substr(0, dot));
      }
    }
    return above;
  }

  bool names_say_it() {
    const auto& first = *loras_.front().origin;
    std::set<std::string> names;
    for (const auto& entry : loras_) {
      const auto& origin = *entry.origin;
      if (origin.names.empty() || !origin.pattern.empty() || origin.layers != first.layers ||
          origin.layers_pattern != first.layers_pattern || origin.exclude != first.exclude) {
        return false;
      }
      bool direct = false;
      for (const auto& name : origin.names) {
        if (!ends_in_name(path(entry), name)) continue;
        direct = true;
        names.insert(name);
      }
      if (!direct) return false;  // a container was named
    }
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
    config_.target_names.assign(names.begin(), names.end());
    config_.exclude_names = first.exclude;
    config_.layers = first.layers;
    config_.layers_pattern = first.layers_pattern;
    return true;
  }

  bool pattern_says_it() {
    const auto& first = *loras_.front().origin;
    // Everything, as `all()` means it, is everything that takes a LoRA: Python's would be all modules.
    if (first.pattern == every_path) return false;
    if (first.pattern.empty() || !first.exclude.empty() || !reads_alike_in_python(first.pattern))
      return false;
    const std::regex expression(first.pattern);
    for (const auto& entry : loras_) {
      if (entry.origin->pattern != first.pattern || !entry.origin->exclude.empty()) return false;
      if (!std::regex_match(path(entry), expression)) return false;
    }
    for (const auto& container : containers()) {
      if (std::regex_match(container, expression)) return false;
    }
    config_.target_pattern = first.pattern;
    return true;
  }

  void set_saved() {
    std::set<std::string> names;
    for (const auto& entry : saved_) {
      const auto& origin = *entry.origin;
      const bool plain = origin.pattern.empty() && origin.exclude.empty() && origin.layers.empty();
      if (plain && lies_under(path(entry), origin.names)) {
        names.insert(origin.names.begin(), origin.names.end());
      } else {
        names.insert(path(entry));
      }
    }
    // Python saves every module whose path ends in a name, dot or not.
    const auto ends_so = [&](const std::string& p) {
      return std::any_of(names.begin(), names.end(),
                         [&](const std::string& name) { return p.ends_with(name); });
    };
    const auto adapted = paths(loras_);
    if (std::any_of(adapted.begin(), adapted.end(), ends_so)) {
      const auto whole = paths(saved_);
      names = {whole.begin(), whole.end()};
    }
    config_.modules_to_save.assign(names.begin(), names.end());
  }

  void set_bias() {
    if (biases_.empty()) return;
    std::set<std::string> biased, adapted;
    for (const auto& entry : biases_) biased.insert(path(entry));
    for (const auto& entry : loras_) {
      if (entry.site->info().has_bias()) adapted.insert(path(entry));
    }
    const bool everywhere = std::all_of(biases_.begin(), biases_.end(), [&](const Entry& entry) {
      const auto& origin = *entry.origin;
      return origin.pattern == every_path && origin.names.empty() &&
             std::all_of(origin.exclude.begin(), origin.exclude.end(), [&](const std::string& name) {
               return std::find(config_.modules_to_save.begin(), config_.modules_to_save.end(), name) !=
                      config_.modules_to_save.end();
             });
    });
    if (everywhere && std::includes(biased.begin(), biased.end(), adapted.begin(), adapted.end())) {
      config_.bias = BiasMode::all;
    } else if (biased == adapted) {
      config_.bias = BiasMode::lora_only;
    } else if (!loras_.empty()) {
      own("the biases it trains are neither those of all layers nor those of the LoRA's");
    }
  }

  void own(const std::string& why) {
    if (config_.is_own()) return;
    config_.peft_type = biases_.empty() ? "REPLACE" : "BIAS";
    notes_.push_back("Python PEFT cannot read this adapter: " + why + " (peft_type " + config_.peft_type +
                     " is this library's own)");
  }
  void set_own() {
    config_.bias = BiasMode::none;
    config_.bias_modules = paths(biases_);
    config_.modules_to_save = paths(saved_);
    if (loras_.empty()) return;
    config_.target_names = paths(loras_);
    config_.target_pattern.clear();
    config_.exclude_names.clear();
    config_.layers.clear();
    config_.layers_pattern.clear();
  }

  /// Python's classes for these tasks ask for a trained head.
  void check_head() {
    const std::map<std::string, std::vector<std::string>> heads{{"SEQ_CLS", {"classifier", "score"}},
                                                                {"TOKEN_CLS", {"classifier", "score"}},
                                                                {"QUESTION_ANS", {"qa_outputs"}}};
    const auto found = heads.find(config_.task_type);
    if (found == heads.end() || config_.is_own()) return;
    const auto is_head = [&](const Entry& entry) { return lies_under(path(entry), found->second); };
    if (std::any_of(saved_.begin(), saved_.end(), is_head)) return;
    notes_.push_back(
        "the task type " + config_.task_type +
        " is left out: with it Python asks for a trained head, which this adapter does not have");
    config_.task_type.clear();
  }

  const Adapter& adapter_;
  std::vector<std::string>& notes_;
  PeftConfig config_;
  std::vector<Entry> loras_, biases_, saved_;
};

inline PeftConfig exported_config(const Adapter& adapter, std::vector<std::string>& notes) {
  return PeftExporter(adapter, notes).config();
}

}  // namespace peft::internal
