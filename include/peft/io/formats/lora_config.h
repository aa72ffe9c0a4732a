// What LoRA's config and tensors are called in Hugging Face PEFT's files, for the formats of its kin too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "peft/io/peft_format.h"
#include "peft/methods/lora.h"

namespace peft::internal {

/// The targets of a LoRA whose config names none, by the base's `model_type`; empty where the reference has
/// none.
inline std::vector<std::string> default_lora_targets(const std::string& model_type) {
  struct Row {
    std::vector<const char*> types;
    std::vector<std::string> targets;
  };
  static const std::vector<Row> table{
      {{"t5", "mt5"}, {"q", "v"}},
      {{"bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm", "gemma",
        "gemma2", "gemma3_text", "qwen2", "qwen3"},
       {"q_proj", "v_proj"}},
      {{"gpt2", "gpt_bigcode"}, {"c_attn"}},
      {{"bloom", "gpt_neox", "falcon", "chatglm"}, {"query_key_value"}},
      {{"bert", "roberta", "xlm-roberta", "electra", "layoutlm"}, {"query", "value"}},
      {{"deberta-v2"}, {"query_proj", "value_proj"}},
      {{"deberta"}, {"in_proj"}},
      {{"mpt"}, {"Wqkv"}},
      {{"codegen"}, {"qkv_proj"}},
      {{"phi"}, {"q_proj", "v_proj", "fc1", "fc2"}},
      {{"btlm"}, {"c_proj", "c_attn"}},
      {{"nemotron_h"}, {"q_proj", "k_proj", "v_proj", "o_proj"}},
      {{"blip-2"}, {"q", "v", "q_proj", "v_proj"}},
      {{"rwkv"}, {"key", "value", "receptance", "output"}},
      {{"rwkv7"}, {"r_proj", "k_proj", "v_proj", "o_proj", "key", "value"}},
  };
  for (const auto& row : table) {
    if (std::find(row.types.begin(), row.types.end(), model_type) != row.types.end()) return row.targets;
  }
  return {};
}

/// The keys of a LoraConfig, with Python's defaults.
inline nlohmann::json lora_defaults() {
  return nlohmann::json::parse(R"({
    "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "bias": "none",
    "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
    "fan_in_fan_out": false, "init_lora_weights": true, "kasa_config": null, "layer_replication": null,
    "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8,
    "lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null, "megatron_config": null,
    "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null,
    "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "target_modules": null, "target_parameters": null,
    "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
    "use_rslora": false, "velora_config": null})");
}

/// The factors' tensors under Python's names, for a linear or convolution layer or an embedding.
inline std::vector<DiskTensor> lora_tensors(const SiteInfo& site, const Tensor& A, const Tensor& B,
                                            const Tensor& B_bias = {}) {
  if (site.lookup) return {{"lora_embedding_A", A}, {"lora_embedding_B", B}};
  std::vector<DiskTensor> tensors{{"lora_A.weight", A}, {"lora_B.weight", B}};
  if (B_bias.defined()) tensors.push_back({"lora_B.bias", B_bias});
  return tensors;
}

/// How the tensors began: it no longer matters, unless a part of it stays.
inline void write_lora_init(const LoraOptions& lora, nlohmann::json& json) {
  const char* key = "init_lora_weights";
  if (lora.init() == LoraInit::random) json[key] = false;
  // Python refuses "gaussian" together with lora_bias.
  if (lora.init() == LoraInit::gaussian && !lora.lora_bias()) json[key] = "gaussian";
  if (lora.init() == LoraInit::mica) json[key] = "mica";
  if (lora.init() != LoraInit::loftq) return;
  json[key] = "loftq";
  json["loftq_config"] = {{"loftq_bits", lora.loftq_bits()}, {"loftq_iter", lora.loftq_iter()}};
}

inline void read_loftq(ConfigFields& fields, LoraOptions& lora) {
  const auto& settings = fields.value("loftq_config");
  const auto integer = [&](const char* key, int64_t absent) {
    return settings.is_object() && settings.contains(key) && settings[key].is_number_integer()
               ? settings[key].get<int64_t>()
               : absent;
  };
  lora.loftq_bits(integer("loftq_bits", 4)).loftq_iter(integer("loftq_iter", 1));
}

inline void read_lora_init(ConfigFields& fields, LoraOptions& lora) {
  const char* key = "init_lora_weights";
  if (!fields.has(key)) return;
  const auto& value = fields.value(key);
  if (value.is_boolean()) {
    lora.init(value.get<bool>() ? LoraInit::kaiming : LoraInit::random);
    return;
  }
  const auto name = value.is_string() ? value.get<std::string>() : "";
  static const std::map<std::string, LoraInit> starts{
      {"gaussian", LoraInit::gaussian}, {"mica", LoraInit::mica},   {"pissa", LoraInit::pissa},
      {"olora", LoraInit::olora},       {"loftq", LoraInit::loftq}, {"eva", LoraInit::kaiming},
      {"orthogonal", LoraInit::kaiming}};
  if (const auto found = starts.find(name); found != starts.end()) {
    lora.init(found->second);
    if (name == "loftq") read_loftq(fields, lora);
    return;
  }
  for (const char* lost : {"pissa_niter", "corda", "lora_ga"}) {
    if (!name.starts_with(lost)) continue;
    fields.refuse("'init_lora_weights' \"" + name +
                      "\" belongs to a base whose weights were changed in a way the files do not tell (hint: "
                      "in Python, save with path_initial_model_for_weight_conversion to get a plain LoRA)",
                  /*decides_shapes=*/false);
    return;
  }
  fields.complain(
      key, R"(must be true, false, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora" or "loftq")",
      /*decides_shapes=*/false);
}

}  // namespace peft::internal
