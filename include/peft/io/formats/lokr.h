// LokrFormat: LoKr in Hugging Face PEFT's files (peft_type LOKR).
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/lora_config.h"
#include "peft/io/formats/settings.h"
#include "peft/methods/lokr.h"

namespace peft::internal {

class LokrFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "LOKR"; }
  std::string title() const override { return "LoKr"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "alpha": 8, "alpha_pattern": {}, "decompose_both": false, "decompose_factor": -1,
      "exclude_modules": null, "init_weights": true, "layers_pattern": null, "layers_to_transform": null,
      "module_dropout": 0.0, "modules_to_save": null, "r": 8, "rank_dropout": 0.0,
      "rank_dropout_scale": false, "rank_pattern": {}, "target_modules": null,
      "use_effective_conv2d": false})");
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const LokrImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    std::vector<DiskTensor> named;
    for (const auto& item : piece.named_parameters()) named.push_back({item.key(), item.value()});
    return named;
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    write_rank_and_alpha<LokrImpl>(entries, json, notes);
    write_settings<LokrImpl>(entries, json, problems, [](const LokrOptions& options) {
      nlohmann::json init = options.init() != LokrInit::random;
      if (options.init() == LokrInit::zero_second) init = "lycoris";
      return nlohmann::json{{"decompose_both", options.decompose_both()},
                            {"decompose_factor", options.decompose_factor()},
                            {"init_weights", init},
                            {"module_dropout", options.module_dropout()},
                            {"rank_dropout", options.rank_dropout()},
                            {"rank_dropout_scale", options.rank_dropout_scale()},
                            {"use_effective_conv2d", options.effective_conv()}};
    });
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    auto options = read_dense_update<LokrOptions>(fields);
    options.effective_conv(fields.boolean("use_effective_conv2d"));
    options.decompose_both(fields.boolean("decompose_both"));
    options.decompose_factor(fields.integer("decompose_factor", -1, -1));
    options.rank_dropout_scale(fields.boolean("rank_dropout_scale"));
    const auto& init = fields.value("init_weights");
    if (init == "lycoris") {
      options.init(LokrInit::zero_second);
    } else if (!init.is_null() && !init.is_boolean()) {
      fields.complain("init_weights", R"(must be true, false or "lycoris")", /*decides_shapes=*/false);
    } else if (init == false) {
      options.init(LokrInit::random);
    }
    return [options](Target target) { return on(options, std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    return default_lora_targets(model_type);
  }
};

}  // namespace peft::internal
