// PeftConfigReader: reads an adapter_config.json, strictly.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/config_json.h"
#include "peft/io/peft_config.h"
#include "peft/io/peft_fields.h"

namespace peft::internal {

/// Reads an adapter_config.json. What is wrong is added to `problems`, each with its key, what was expected
/// and what is there; keys nobody knows are reported to `note`. A key that is null or absent has PEFT's
/// default.
class PeftConfigReader {
 public:
  /// `model_type`: Hugging Face's name of the base's kind.
  PeftConfigReader(const std::filesystem::path& file, const std::string& model_type, Problems& problems,
                   const Note& note)
      : fields_(read_json_object(file), model_type, problems, note), note_(note) {}

  PeftConfig read() {
    if (!find_type()) return config_;
    known_ = default_json(config_.format);
    config_.task_type = fields_.string("task_type");
    if (fields_.has("task_type") &&
        std::find(task_types.begin(), task_types.end(), config_.task_type) == task_types.end()) {
      fields_.complain("task_type",
                       "must be one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, "
                       "FEATURE_EXTRACTION",
                       /*decides_shapes=*/false);
    }
    if (fields_.has("base_model_name_or_path") && !fields_.value("base_model_name_or_path").is_string()) {
      fields_.complain("base_model_name_or_path", "must be a string", /*decides_shapes=*/false);
    } else {
      config_.base_model = fields_.string("base_model_name_or_path");
    }
    config_.modules_to_save = fields_.strings("modules_to_save");
    if (config_.own) config_.bias_modules = fields_.strings("bias_modules");
    add_heads();
    if (config_.format) {
      read_targets();
      read_bias();
      config_.part = config_.format->read(fields_);
      config_.further_parts = config_.format->further_parts(fields_, config_.part);
    }
    note_unknown();
    config_.usable = fields_.usable();
    return config_;
  }

 private:
  /// Decides which row of the table reads the file. Returns false where none does.
  bool find_type() {
    config_.usable = false;
    const auto type = fields_.string("peft_type");
    if (!fields_.has("peft_type")) {
      fields_.complain("peft_type", "must be given");
      return false;
    }
    config_.own = type == "BIAS" || type == "REPLACE";
    if (!config_.own) {
      config_.format = format_of(type);
      if (!config_.format) fields_.complain("peft_type", "must be one of " + known_types());
      return config_.format;
    }
    if (!fields_.has("target_modules")) return true;
    const auto method = fields_.has("method") ? fields_.string("method") : "LORA";
    config_.format = format_of(method);
    if (!config_.format) fields_.complain("method", "must be one of " + known_types());
    return config_.format;
  }
  static std::string known_types() {
    std::vector<std::string> types{"BIAS", "REPLACE"};
    for (const auto& format : peft_formats()) types.push_back(format->peft_type());
    std::sort(types.begin(), types.end());
    types.erase(std::unique(types.begin(), types.end()), types.end());
    std::string text;
    for (const auto& type : types) text += (text.empty() ? "" : ", ") + type;
    return text;
  }

  /// Python's classes for these tasks save their head, also where the config names none, as before peft 0.11.
  void add_heads() {
    if (config_.own || !known_.contains("modules_to_save")) return;
    const auto heads = task_heads().find(config_.task_type);
    if (heads == task_heads().end()) return;
    auto& saved = config_.modules_to_save;
    const auto is_head = [&](const std::string& name) { return lies_under(name, heads->second); };
    if (std::none_of(saved.begin(), saved.end(), is_head))
      saved.insert(saved.end(), heads->second.begin(), heads->second.end());
  }

  /// True where the method has this key and the file gives it.
  bool has(const std::string& key) const { return known_.contains(key) && fields_.has(key); }

  void read_targets() {
    if (has("target_modules")) {
      config_.has_targets = true;
      if (const auto& value = fields_.value("target_modules"); value.is_string()) {
        auto text = value.get<std::string>();
        auto lower = text;
        std::transform(lower.begin(), lower.end(), lower.begin(),
                       [](unsigned char c) { return std::tolower(c); });
        config_.all_linear = lower == "all-linear";
        if (!config_.all_linear) config_.target_pattern = fields_.expression("target_modules", text);
        for (const char* key : {"layers_to_transform", "layers_pattern"}) {
          if (has(key)) fields_.complain(key, "must be null where 'target_modules' is a string");
        }
      } else {
        config_.target_names = fields_.strings("target_modules");
        if (value.is_array() && value.empty() && !has("target_parameters")) {
          fields_.complain("target_modules", "must name at least one module");
        }
      }
    }
    // Python then adds no targets of its own.
    config_.has_targets = config_.has_targets || has("target_parameters");
    if (has("exclude_modules")) {
      if (fields_.value("exclude_modules").is_string()) {
        config_.exclude_pattern = fields_.expression("exclude_modules", fields_.string("exclude_modules"));
      } else {
        config_.exclude_names = fields_.strings("exclude_modules");
      }
    }
    if (has("layers_to_transform")) {
      const auto& value = fields_.value("layers_to_transform");
      const auto one_by_one = value.is_array() ? value : nlohmann::ordered_json::array({value});
      for (const auto& item : one_by_one) {
        if (!item.is_number_integer() || item.get<int64_t>() < 0) {
          fields_.complain("layers_to_transform", "must be an integer of at least 0 or a list of them");
          break;
        }
        config_.layers.push_back(item.get<int64_t>());
      }
    }
    if (has("layers_pattern")) {
      for (const auto& pattern : fields_.strings("layers_pattern", /*lone=*/true)) {
        if (pattern.empty()) continue;  // none, in Python
        config_.layers_pattern.push_back(fields_.expression("layers_pattern", pattern));
      }
    }
    if (!config_.layers_pattern.empty() && !has("layers_to_transform")) {
      fields_.complain("layers_to_transform", "must be given where 'layers_pattern' is");
    }
  }

  void read_bias() {
    if (!has("bias")) return;
    const auto of_targets = config_.format->bias_of_targets();
    const auto bias = fields_.string("bias");
    if (bias == "all") {
      config_.bias = BiasMode::all;
    } else if (bias == of_targets) {
      config_.bias = BiasMode::targets;
    } else if (bias != "none") {
      fields_.complain("bias", R"(must be "none", "all" or ")" + of_targets + "\"");
    }
  }

  void note_unknown() {
    static const std::set<std::string> own_keys{"bias_modules", "method", "modules_to_save"};
    for (const auto& [key, value] : fields_.json().items()) {
      if (known_.contains(key) || (config_.own && own_keys.count(key))) continue;
      note_(std::string(config_file_name) + ": the unknown key '" + key + "' was ignored");
    }
  }

  ConfigFields fields_;
  const Note& note_;
  nlohmann::json known_;
  PeftConfig config_;
};

}  // namespace peft::internal
