// LohaFormat: LoHa in Hugging Face PEFT's files (peft_type LOHA).
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/lora_config.h"
#include "peft/io/formats/settings.h"
#include "peft/methods/loha.h"

namespace peft::internal {

class LohaFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "LOHA"; }
  std::string title() const override { return "LoHa"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "alpha": 8, "alpha_pattern": {}, "exclude_modules": null, "init_weights": true, "layers_pattern": null,
      "layers_to_transform": null, "module_dropout": 0.0, "modules_to_save": null, "r": 8,
      "rank_dropout": 0.0, "rank_pattern": {}, "target_modules": null, "use_effective_conv2d": false})");
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const LohaImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    std::vector<DiskTensor> named;
    for (const auto& item : piece.named_parameters()) named.push_back({item.key(), item.value()});
    return named;
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    write_rank_and_alpha<LohaImpl>(entries, json, notes);
    write_settings<LohaImpl>(entries, json, problems, [](const LohaOptions& options) {
      return nlohmann::json{{"init_weights", options.init_weights()},
                            {"module_dropout", options.module_dropout()},
                            {"rank_dropout", options.rank_dropout()},
                            {"use_effective_conv2d", options.effective_conv()}};
    });
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    auto options = read_dense_update<LohaOptions>(fields);
    options.effective_conv(fields.boolean("use_effective_conv2d"));
    options.init_weights(fields.boolean("init_weights", true));
    return [options](Target target) { return on(options, std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    return default_lora_targets(model_type);
  }
};

}  // namespace peft::internal
