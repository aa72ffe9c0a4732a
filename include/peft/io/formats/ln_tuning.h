// LayerNormTuningFormat: LayerNorm tuning in Hugging Face PEFT's files (peft_type LN_TUNING).
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/peft_format.h"
#include "peft/methods/layer_norm_tuning.h"

namespace peft::internal {

class LayerNormTuningFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "LN_TUNING"; }
  std::string title() const override { return "LayerNorm tuning"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(
        R"({"exclude_modules": null, "modules_to_save": null, "target_modules": null})");
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const LayerNormTuningImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& norm = static_cast<const LayerNormTuningImpl&>(piece);
    std::vector<DiskTensor> tensors{{"ln_tuning_layers.weight", norm.weight}};
    if (norm.bias.defined()) tensors.push_back({"ln_tuning_layers.bias", norm.bias});
    return tensors;
  }

  void write(const Entries&, nlohmann::json&, std::vector<std::string>&, Problems&) const override {}
  std::function<Part(Target)> read(ConfigFields&) const override {
    return [](Target target) { return on(LayerNormTuningOptions(), std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    struct Row {
      std::vector<const char*> types;
      std::vector<std::string> targets;
    };
    static const std::vector<Row> table{
        {{"llama", "mistral", "gemma"}, {"input_layernorm", "post_attention_layernorm", "norm"}},
        {{"gemma2", "gemma3_text"},
         {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
          "post_feedforward_layernorm", "norm"}},
        {{"bloom", "falcon"}, {"input_layernorm", "post_attention_layernorm", "ln_f"}},
        {{"t5", "mt5"}, {"layer_norm", "final_layer_norm"}},
        {{"bart"}, {"self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"}},
        {{"gpt2"}, {"ln_1", "ln_2", "ln_f"}},
        {{"gptj"}, {"ln_1", "ln_f"}},
        {{"blip-2"}, {"layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"}},
        {{"phi"}, {"input_layernorm", "final_layernorm"}},
        {{"qwen2", "qwen3"}, {"post_attention_layernorm"}},
    };
    for (const auto& row : table) {
      if (std::find(row.types.begin(), row.types.end(), model_type) != row.types.end()) return row.targets;
    }
    return {};
  }
};

}  // namespace peft::internal
