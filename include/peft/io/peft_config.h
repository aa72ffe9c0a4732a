// PeftConfig: what an adapter_config.json says, in the library's words, and writing it.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/site.h"
#include "peft/methods/lora.h"
#include "peft/model/targets.h"

namespace peft::internal {

/// Hugging Face PEFT's `bias`.
enum class BiasMode : std::uint8_t { none, all, lora_only };

/// An adapter_config.json. Expressions are those of std::regex.
struct PeftConfig {
  /// "LORA", or this library's own "BIAS" and "REPLACE", for what Python PEFT cannot say: `bias_modules` and
  /// `modules_to_save` are then whole paths, and a LoRA is there if targets are given.
  std::string peft_type = "LORA";
  std::string task_type, base_model;
  LoraOptions lora;
  bool has_targets = false;  ///< else PEFT's table decides by the type of model
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

  bool is_own() const { return peft_type != "LORA"; }
  bool has_lora() const { return !is_own() || has_targets; }
};

inline constexpr const char* config_file_name = "adapter_config.json";
/// The version of Python PEFT whose format is followed.
inline constexpr const char* peft_format_version = "0.21.2";
inline constexpr std::array<const char*, 6> task_types{"SEQ_CLS",   "SEQ_2_SEQ_LM", "CAUSAL_LM",
                                                       "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"};

/// The keys Python PEFT 0.21.2 writes for a LoRA, with its defaults.
inline nlohmann::json default_lora_json() {
  return nlohmann::json::parse(R"({
    "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
    "base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false,
    "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
    "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
    "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0,
    "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
    "monteclora_config": null, "peft_type": "LORA", "peft_version": null, "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": null, "target_modules": null, "target_parameters": null, "task_type": null,
    "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
    "use_rslora": false, "velora_config": null})");
}

/// True if the path, or that of a module above it, is one of the names or ends in a dot and one.
inline bool lies_under(const std::string& path, const std::vector<std::string>& names) {
  Origin origin;
  origin.exclude = names;
  return is_excluded(origin, path);
}

/// A number as Python would write it: 16, not 16.0.
inline nlohmann::json plain_number(double value) {
  if (std::nearbyint(value) == value && std::fabs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

/// The text of an adapter_config.json: the reference's keys, sorted, indented by 2.
inline std::string config_text(const PeftConfig& config) {
  auto json = config.has_lora() ? default_lora_json() : nlohmann::json::parse(R"({
    "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": true, "modules_to_save": null,
    "revision": null, "task_type": null})");
  json["peft_type"] = config.peft_type;
  json["peft_version"] = peft_format_version;
  if (!config.task_type.empty()) json["task_type"] = config.task_type;
  if (!config.base_model.empty()) json["base_model_name_or_path"] = config.base_model;
  if (!config.modules_to_save.empty()) json["modules_to_save"] = config.modules_to_save;
  if (config.is_own()) json["bias_modules"] = config.bias_modules;
  if (!config.has_lora()) return json.dump(2);

  const auto& lora = config.lora;
  json["r"] = lora.rank();
  json["lora_alpha"] = plain_number(lora.alpha());
  json["lora_dropout"] = lora.dropout();
  json["use_rslora"] = lora.rslora();
  json["lora_bias"] = lora.lora_bias();
  if (lora.init() == LoraInit::random) json["init_lora_weights"] = false;
  // Python refuses "gaussian" together with lora_bias; how the tensors began no longer matters.
  if (lora.init() == LoraInit::gaussian && !lora.lora_bias()) json["init_lora_weights"] = "gaussian";
  for (const auto& [pattern, rank] : lora.rank_pattern()) json["rank_pattern"].emplace(pattern, rank);
  for (const auto& [pattern, alpha] : lora.alpha_pattern()) {
    json["alpha_pattern"].emplace(pattern, plain_number(alpha));
  }
  if (!config.target_pattern.empty()) {
    json["target_modules"] = config.target_pattern;
  } else {
    json["target_modules"] = config.target_names;
  }
  if (!config.exclude_names.empty()) json["exclude_modules"] = config.exclude_names;
  if (!config.layers.empty()) json["layers_to_transform"] = config.layers;
  if (!config.layers_pattern.empty()) json["layers_pattern"] = config.layers_pattern;
  if (config.bias == BiasMode::all) json["bias"] = "all";
  if (config.bias == BiasMode::lora_only) json["bias"] = "lora_only";
  return json.dump(2);
}

}  // namespace peft::internal
