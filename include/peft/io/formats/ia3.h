// Ia3Format: (IA)³ in Hugging Face PEFT's files (peft_type IA3).
#pragma once

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/pattern.h"
#include "peft/io/peft_format.h"
#include "peft/methods/ia3.h"

namespace peft::internal {

/// The targets of an (IA)³ whose config names none, and those of them that scale their input.
struct Ia3Defaults {
  std::vector<std::string> targets, feedforward;
};

/// By the base's `model_type`; no targets where the reference has none.
inline Ia3Defaults default_ia3_targets(const std::string& model_type) {
  struct Row {
    std::vector<const char*> types;
    Ia3Defaults defaults;
  };
  static const std::vector<Row> table{
      {{"t5"}, {{"k", "v", "wo"}, {"wo"}}},
      {{"mt5"}, {{"k", "v", "wi_1"}, {}}},
      {{"gpt2", "gpt_bigcode"}, {{"c_attn", "mlp.c_proj"}, {"mlp.c_proj"}}},
      {{"gpt_neo"}, {{"q_proj", "v_proj", "c_proj"}, {"c_proj"}}},
      {{"bloom"}, {{"query_key_value", "mlp.dense_4h_to_h"}, {"mlp.dense_4h_to_h"}}},
      {{"bert", "roberta"}, {{"key", "value", "output.dense"}, {"output.dense"}}},
      {{"deberta-v2"}, {{"key_proj", "value_proj", "output.dense"}, {"output.dense"}}},
      {{"deberta"}, {{"in_proj", "output.dense"}, {"output.dense"}}},
      {{"opt"}, {{"q_proj", "k_proj", "fc2"}, {"fc2"}}},
      {{"bart", "phi"}, {{"q_proj", "v_proj", "fc2"}, {"fc2"}}},
      {{"gptj"}, {{"q_proj", "v_proj", "fc_out"}, {"fc_out"}}},
      {{"gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"},
       {{"query_key_value", "dense_4h_to_h"}, {"dense_4h_to_h"}}},
      {{"llama", "mistral"}, {{"k_proj", "v_proj", "down_proj"}, {"down_proj"}}},
      {{"llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"},
       {{"q_proj", "v_proj", "down_proj"}, {"down_proj"}}},
      {{"mixtral"}, {{"k_proj", "v_proj", "w2"}, {"w2"}}},
  };
  for (const auto& row : table) {
    if (std::find(row.types.begin(), row.types.end(), model_type) != row.types.end()) return row.defaults;
  }
  return {};
}

class Ia3Format final : public PeftFormat {
 public:
  std::string peft_type() const override { return "IA3"; }
  std::string title() const override { return "(IA)³"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "exclude_modules": null, "fan_in_fan_out": false, "feedforward_modules": null, "init_ia3_weights": true,
      "modules_to_save": null, "target_modules": null})");
  }
  bool owns(const PieceImpl& piece) const override { return dynamic_cast<const Ia3Impl*>(&piece) != nullptr; }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    return {{"ia3_l", static_cast<const Ia3Impl&>(piece).ia3_l}};
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>&,
             Problems&) const override {
    const auto& options = ia3(entries.front()).options;
    json["init_ia3_weights"] = options.init();
    json[feedforward_key] = feedforward_json(entries, json["target_modules"]);
  }

  std::set<std::string> unknown_layers() const override { return {"Conv1d"}; }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    Ia3Options options;
    options.init(fields.boolean("init_ia3_weights", true));
    fields.boolean("fan_in_fan_out");  // the layer knows
    if (!fields.has(feedforward_key)) {
      const auto defaults = default_ia3_targets(fields.model_type());
      if (defaults.targets.empty()) {
        fields.complain(feedforward_key,
                        "must be given for a base of this kind (model_type '" + fields.model_type() + "')");
      }
      options.feedforward(defaults.feedforward);
    } else if (fields.value(feedforward_key).is_string()) {
      options.feedforward_pattern(fields.expression(feedforward_key, fields.string(feedforward_key)));
    } else {
      options.feedforward(fields.strings(feedforward_key));
      const auto& targets = fields.value("target_modules");
      if (targets.is_array() && !is_subset(options.feedforward(), targets)) {
        fields.complain(feedforward_key, "must name some of 'target_modules'");
      }
    }
    return [options](Target target) { return on(options, std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    return default_ia3_targets(model_type).targets;
  }

 private:
  static constexpr const char* feedforward_key = "feedforward_modules";

  static const Ia3Impl& ia3(const Adapter::Entry& entry) { return static_cast<const Ia3Impl&>(*entry.piece); }
  template <class Json>
  static bool is_subset(const std::vector<std::string>& names, const Json& targets) {
    return std::all_of(names.begin(), names.end(), [&](const std::string& name) {
      return std::find(targets.begin(), targets.end(), name) != targets.end();
    });
  }

  /// What makes Python scale the same layers' inputs: the options as they were given where it reads them
  /// alike, else the paths of these layers. Names have to be among the targets, if these are names.
  static nlohmann::json feedforward_json(const Entries& entries, const nlohmann::json& targets) {
    const auto& options = ia3(entries.front()).options;
    const bool holds = std::all_of(entries.begin(), entries.end(), [&](const Adapter::Entry& entry) {
      return is_feedforward(options, entry.site->info()) == ia3(entry).feedforward;
    });
    const auto& names = options.feedforward();
    const auto& pattern = options.feedforward_pattern();
    if (holds && pattern.empty() && (!targets.is_array() || is_subset(names, targets))) return names;
    if (holds && !pattern.empty() && reads_alike_in_python(pattern)) return pattern;
    std::string paths;
    for (const auto& entry : entries) {
      if (!ia3(entry).feedforward) continue;
      paths += (paths.empty() ? "" : "|") + escape_regex(entry.site->path());
    }
    if (paths.empty()) return nlohmann::json::array();
    return paths;
  }
};

}  // namespace peft::internal
