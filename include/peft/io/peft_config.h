// PeftConfig: what an adapter_config.json says, in the library's words.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "peft/core/site.h"
#include "peft/io/peft_formats.h"
#include "peft/model/targets.h"

namespace peft::internal {

/// Hugging Face PEFT's `bias`; `targets` is "lora_only", "oft_only" and the like.
enum class BiasMode : std::uint8_t { none, all, targets };

/// An adapter_config.json. Expressions are those of std::regex.
struct PeftConfig {
  /// True for this library's own "BIAS" and "REPLACE", for what Python PEFT cannot say: `bias_modules` and
  /// `modules_to_save` are then whole paths, and a method is there if targets are given.
  bool own = false;
  std::string task_type, base_model;
  const PeftFormat* format = nullptr;  ///< of the method, if there is one
  std::function<Part(Target)> part;    ///< makes the method's part
  std::vector<Part> further_parts;     ///< that other keys than the targets place
  bool has_targets = false;            ///< else PEFT's table decides by the type of model
  bool all_linear = false;
  std::vector<std::string> target_names;
  std::string target_pattern;
  std::vector<std::string> exclude_names;
  std::string exclude_pattern;
  std::vector<int64_t> layers;
  std::vector<std::string> layers_pattern;
  BiasMode bias = BiasMode::none;
  std::vector<std::string> bias_modules, modules_to_save;
  bool usable = true;  ///< false where what decides tensors and shapes could not be read
};

/// The version of Python PEFT whose format is followed.
inline constexpr const char* peft_format_version = "0.21.2";
inline constexpr std::array<const char*, 6> task_types{"SEQ_CLS",   "SEQ_2_SEQ_LM", "CAUSAL_LM",
                                                       "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"};

/// The tasks whose classes in Python save a head of their own accord, by any of these names.
inline const std::map<std::string, std::vector<std::string>>& task_heads() {
  static const std::map<std::string, std::vector<std::string>> heads{{"SEQ_CLS", {"classifier", "score"}},
                                                                     {"TOKEN_CLS", {"classifier", "score"}},
                                                                     {"QUESTION_ANS", {"qa_outputs"}}};
  return heads;
}

/// The keys of every adapter_config.json and, with a method, that method's, with Python's defaults.
inline nlohmann::json default_json(const PeftFormat* format) {
  auto json = nlohmann::json::parse(R"({
    "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": true, "peft_type": null,
    "peft_version": null, "revision": null, "task_type": null})");
  json["peft_version"] = peft_format_version;
  if (format) {
    json.update(format->defaults());
  } else {
    json["modules_to_save"] = nullptr;
  }
  return json;
}

/// True if the path, or that of a module above it, is one of the names or ends in a dot and one.
inline bool lies_under(const std::string& path, const std::vector<std::string>& names) {
  Origin origin;
  origin.exclude = names;
  return is_excluded(origin, path);
}

}  // namespace peft::internal
