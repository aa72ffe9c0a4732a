// VeraFormat: VeRA in Hugging Face PEFT's files (peft_type VERA).
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/lora_config.h"
#include "peft/io/formats/settings.h"
#include "peft/methods/vera.h"

namespace peft::internal {

class VeraFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "VERA"; }
  std::string title() const override { return "VeRA"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "bias": "none", "d_initial": 0.1, "fan_in_fan_out": false, "init_weights": true,
      "layers_pattern": null, "layers_to_transform": null, "modules_to_save": null,
      "projection_prng_key": 0, "r": 256, "save_projection": true, "target_modules": null,
      "vera_dropout": 0.0})");
  }
  std::string bias_of_targets() const override { return "vera_only"; }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const VeraImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& vera = static_cast<const VeraImpl&>(piece);
    return {{"vera_lambda_b", vera.vera_lambda_b}, {"vera_lambda_d", vera.vera_lambda_d}};
  }
  std::vector<DiskTensor> shared_tensors(const Entries& entries) const override {
    const auto& first = static_cast<const VeraImpl&>(*entries.front().piece);
    if (!first.options.save_projection()) return {};
    const auto& shared = static_cast<const VeraProjections&>(*first.shared());
    return {{"base_model.vera_A", shared.vera_A}, {"base_model.vera_B", shared.vera_B}};
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    write_settings<VeraImpl>(entries, json, problems, [](const VeraOptions& options) {
      return nlohmann::json{{"d_initial", options.d_initial()},
                            {"init_weights", options.init_weights()},
                            {"projection_prng_key", options.projection_prng_key()},
                            {"r", options.rank()},
                            {"save_projection", options.save_projection()},
                            {"vera_dropout", options.dropout()}};
    });
    json["fan_in_fan_out"] = entries.front().piece->site().fan_in_fan_out;
    if (!json["save_projection"].get<bool>()) {
      notes.emplace_back(
          "the shared matrices are not written (save_projection): a load draws them from key " +
          json["projection_prng_key"].dump() + " again");
    }
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    VeraOptions options(fields.integer("r", 256, 1));
    options.projection_prng_key(fields.integer("projection_prng_key", 0, std::numeric_limits<int64_t>::min(),
                                               std::numeric_limits<int64_t>::max()));
    options.save_projection(fields.boolean("save_projection", true));
    options.dropout(fields.rate("vera_dropout"));
    options.d_initial(fields.number(
        "d_initial", 0.1, [](double value) { return std::isfinite(value); }, "must be a finite number"));
    options.init_weights(fields.boolean("init_weights", true));
    fields.boolean("fan_in_fan_out");  // the layer knows
    return [options](Target target) { return on(options, std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    if (model_type == "phi") return {"q_proj", "v_proj"};
    return default_lora_targets(model_type);
  }
};

}  // namespace peft::internal
