// BoftFormat: BOFT in Hugging Face PEFT's files (peft_type BOFT).
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/lora_config.h"
#include "peft/io/formats/settings.h"
#include "peft/methods/boft.h"

namespace peft::internal {

class BoftFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "BOFT"; }
  std::string title() const override { return "BOFT"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "bias": "none", "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0,
      "boft_n_butterfly_factor": 1, "exclude_modules": null, "fan_in_fan_out": false, "init_weights": true,
      "layers_pattern": null, "layers_to_transform": null, "modules_to_save": null,
      "target_modules": null})");
  }
  std::string bias_of_targets() const override { return "boft_only"; }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const BoftImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& boft = static_cast<const BoftImpl&>(piece);
    return {{"boft_R", boft.boft_R}, {"boft_s", boft.boft_s}};
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    write_settings<BoftImpl>(entries, json, problems, [](const BoftOptions& options) {
      return nlohmann::json{{"boft_block_num", options.block_num()},
                            {"boft_block_size", options.block_size()},
                            {"boft_dropout", options.dropout()},
                            {"boft_n_butterfly_factor", options.butterfly_factors()},
                            {"init_weights", options.init_weights()}};
    });
    if (json["boft_n_butterfly_factor"] != 1) {
      notes.emplace_back("Python reads several butterfly factors only where its CUDA extension builds");
    }
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    const auto blocks = fields.integer("boft_block_num", 0, 0);
    BoftOptions options(fields.integer("boft_block_size", 4, 0));
    options.block_num(blocks);
    options.butterfly_factors(fields.integer("boft_n_butterfly_factor", 1, 1));
    options.dropout(fields.rate("boft_dropout"));
    options.init_weights(fields.boolean("init_weights", true));
    fields.boolean("fan_in_fan_out");  // the layer knows
    return [options](Target target) { return on(options, std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    return default_lora_targets(model_type);
  }
};

}  // namespace peft::internal
