// PeftConfigReader: reads an adapter_config.json, strictly.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/config_json.h"
#include "peft/io/peft_config.h"
#include "peft/io/python_regex.h"

namespace peft::internal {

/// Reads an adapter_config.json. What is wrong is added to `problems`, each with its key, what was expected
/// and what is there; keys nobody knows are reported to `note`. A key that is null or absent has PEFT's
/// default.
class PeftConfigReader {
 public:
  using Note = std::function<void(const std::string&)>;

  PeftConfigReader(const std::filesystem::path& file, Problems& problems, const Note& note)
      : json_(read_json_object(file)), problems_(problems), note_(note) {}

  PeftConfig read() {
    if (!has("peft_type")) {
      complain("peft_type", "must be given");
    } else {
      config_.peft_type = string("peft_type");
    }
    if (config_.peft_type != "LORA" && config_.peft_type != "BIAS" && config_.peft_type != "REPLACE") {
      complain("peft_type", "must be LORA, BIAS or REPLACE (other methods are not supported yet)");
      return config_;
    }
    config_.task_type = string("task_type");
    if (has("task_type") &&
        std::find(task_types.begin(), task_types.end(), config_.task_type) == task_types.end()) {
      complain("task_type",
               "must be one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, "
               "FEATURE_EXTRACTION");
    }
    config_.base_model = string("base_model_name_or_path");
    config_.modules_to_save = strings("modules_to_save");
    if (config_.is_own()) config_.bias_modules = strings("bias_modules");
    read_targets();
    if (config_.has_lora()) read_lora();
    refuse_features();
    note_unknown();
    return config_;
  }

 private:
  bool has(const std::string& key) const { return json_.contains(key) && !json_[key].is_null(); }

  void complain(const std::string& key, const std::string& must) {
    problems_.add(std::string(config_file_name) + ": '" + key + "' " + must + ", but got " +
                  (json_.contains(key) ? json_text(json_[key]) : "none"));
    static const std::set<std::string> harmless{
        "task_type",  "lora_alpha",    "lora_dropout",     "base_model_name_or_path",
        "use_rslora", "alpha_pattern", "init_lora_weights"};
    if (!harmless.count(key)) config_.usable = false;
  }
  std::string string(const std::string& key) {
    if (!has(key)) return {};
    if (!json_[key].is_string()) {
      complain(key, "must be a string");
      return {};
    }
    return json_[key].get<std::string>();
  }
  bool boolean(const std::string& key) {
    if (!has(key)) return false;
    if (!json_[key].is_boolean()) complain(key, "must be true or false");
    return json_[key] == true;
  }
  double number(const std::string& key, double absent, const std::function<bool(double)>& fits,
                const std::string& must) {
    if (!json_.contains(key)) return absent;
    const auto& value = json_[key];
    if (!value.is_number() || !fits(value.get<double>())) {
      complain(key, must);
      return absent;
    }
    return value.get<double>();
  }
  static bool is_rank(const nlohmann::ordered_json& value) {
    return value.is_number_integer() && value.get<int64_t>() >= 1 &&
           value.get<int64_t>() <= std::numeric_limits<int32_t>::max();
  }
  std::vector<std::string> strings(const std::string& key, bool lone = false) {
    std::vector<std::string> found;
    if (!has(key)) return found;
    const auto& value = json_[key];
    if (lone && value.is_string()) return {value.get<std::string>()};
    bool fits = value.is_array();
    for (const auto& item : value) {
      if (fits && item.is_string() && !item.get<std::string>().empty()) {
        const auto text = item.get<std::string>();
        if (std::find(found.begin(), found.end(), text) == found.end()) found.push_back(text);
      } else {
        fits = false;
      }
    }
    if (!fits) complain(key, "must be a list of names");
    return found;
  }
  /// An expression of Python's, for std::regex.
  std::string expression(const std::string& key, const std::string& text) {
    const auto converted = to_ecmascript(text);
    if (!converted.problem.empty()) {
      complain(key,
               "must hold regular expressions this library can read: '" + text + "' " + converted.problem);
    }
    return converted.text;
  }

  void read_targets() {
    if (has("target_modules")) {
      config_.has_targets = true;
      if (const auto& value = json_["target_modules"]; value.is_string()) {
        auto text = value.get<std::string>();
        auto lower = text;
        std::transform(lower.begin(), lower.end(), lower.begin(),
                       [](unsigned char c) { return std::tolower(c); });
        config_.all_linear = lower == "all-linear";
        if (!config_.all_linear) config_.target_pattern = expression("target_modules", text);
        for (const char* key : {"layers_to_transform", "layers_pattern"}) {
          if (has(key)) complain(key, "must be null where 'target_modules' is a string");
        }
      } else {
        config_.target_names = strings("target_modules");
        if (value.is_array() && value.empty()) complain("target_modules", "must name at least one module");
      }
    }
    if (has("exclude_modules") && json_["exclude_modules"].is_string()) {
      config_.exclude_pattern = expression("exclude_modules", string("exclude_modules"));
    } else {
      config_.exclude_names = strings("exclude_modules");
    }
    if (has("layers_to_transform")) {
      const auto& value = json_["layers_to_transform"];
      const auto one_by_one = value.is_array() ? value : nlohmann::ordered_json::array({value});
      for (const auto& item : one_by_one) {
        if (!item.is_number_integer()) {
          complain("layers_to_transform", "must be an integer or a list of them");
          break;
        }
        config_.layers.push_back(item.get<int64_t>());
      }
    }
    for (const auto& pattern : strings("layers_pattern", /*lone=*/true)) {
      config_.layers_pattern.push_back(expression("layers_pattern", pattern));
    }
    if (!config_.layers_pattern.empty() && !has("layers_to_transform")) {
      complain("layers_to_transform", "must be given where 'layers_pattern' is");
    }
  }

  void read_lora() {
    auto& lora = config_.lora;
    if (json_.contains("r")) {
      if (is_rank(json_["r"])) {
        lora.rank(json_["r"].get<int64_t>());
      } else {
        complain("r", "must be an integer of at least 1");
      }
    }
    const auto finite = [](double value) { return std::isfinite(value); };
    lora.alpha(number("lora_alpha", 8.0, finite, "must be a finite number"));
    lora.dropout(number(
        "lora_dropout", 0.0, [](double p) { return p >= 0 && p < 1; }, "must be a number in [0, 1)"));
    lora.rslora(boolean("use_rslora")).lora_bias(boolean("lora_bias"));
    boolean("fan_in_fan_out");  // the layer knows
    read_init();
    std::vector<Pattern<int64_t>> ranks;
    std::vector<Pattern<double>> alphas;
    each("rank_pattern", [&](const std::string& pattern, const nlohmann::ordered_json& value) {
      if (!is_rank(value)) return false;
      ranks.emplace_back(pattern, value.get<int64_t>());
      return true;
    });
    each("alpha_pattern", [&](const std::string& pattern, const nlohmann::ordered_json& value) {
      if (!value.is_number()) return false;
      alphas.emplace_back(pattern, value.get<double>());
      return true;
    });
    lora.rank_pattern(std::move(ranks)).alpha_pattern(std::move(alphas));
    const auto bias = has("bias") ? string("bias") : "none";
    if (bias == "all") {
      config_.bias = BiasMode::all;
    } else if (bias == "lora_only") {
      config_.bias = BiasMode::lora_only;
    } else if (bias != "none") {
      complain("bias", R"(must be "none", "all" or "lora_only")");
    }
  }

  /// Calls `take` for every pair of a map from expressions to numbers.
  template <class Take>
  void each(const std::string& key, const Take& take) {
    if (!has(key)) return;
    const auto must = key == "rank_pattern" ? "must map expressions to integers of at least 1"
                                            : "must map expressions to numbers";
    if (!json_[key].is_object()) return complain(key, must);
    for (const auto& [pattern, value] : json_[key].items()) {
      if (!take(expression(key, pattern), value)) return complain(key, must);
    }
  }

  /// How the tensors began does not matter once they are read, unless the base was changed too.
  void read_init() {
    if (!has("init_lora_weights")) return;
    const auto& value = json_["init_lora_weights"];
    if (value.is_boolean()) {
      config_.lora.init(value.get<bool>() ? LoraInit::kaiming : LoraInit::random);
      return;
    }
    const auto name = value.is_string() ? value.get<std::string>() : "";
    for (const char* mutates : {"pissa", "olora", "corda", "lora_ga", "loftq"}) {
      if (!name.starts_with(mutates)) continue;
      problems_.add(
          std::string(config_file_name) + ": 'init_lora_weights' \"" + name +
          "\" belongs to a base whose weights were changed, and is not supported (hint: in Python, save with "
          "path_initial_model_for_weight_conversion to get a plain LoRA)");
      return;
    }
    if (name == "gaussian") {
      config_.lora.init(LoraInit::gaussian);
    } else if (name != "eva" && name != "orthogonal" && name != "mica") {
      complain("init_lora_weights", R"(must be true, false, "gaussian", "eva", "orthogonal" or "mica")");
    }
  }

  void refuse_features() {
    for (const char* key :
         {"use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters",
          "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
          "velora_config", "monteclora_config", "megatron_config", "ensure_weight_tying"}) {
      if (!has(key) || json_[key] == false) continue;
      if (json_[key].is_structured() && json_[key].empty()) continue;
      const auto name = std::string(key) == "use_dora" ? "DoRA (use_dora)" : "'" + std::string(key) + "'";
      problems_.add(std::string(config_file_name) + ": " + name + " is not supported yet, but got " +
                    json_text(json_[key]));
      config_.usable = false;
    }
  }

  void note_unknown() {
    static const auto known = default_lora_json();
    for (const auto& [key, value] : json_.items()) {
      if (known.contains(key) || (config_.is_own() && key == "bias_modules")) continue;
      note_(std::string(config_file_name) + ": the unknown key '" + key + "' was ignored");
    }
  }

  nlohmann::ordered_json json_;
  Problems& problems_;
  const Note& note_;
  PeftConfig config_;
};

}  // namespace peft::internal
