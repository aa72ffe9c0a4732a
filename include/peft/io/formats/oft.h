// OftFormat: OFT in Hugging Face PEFT's files (peft_type OFT).
#pragma once

#include <functional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/lora_config.h"
#include "peft/io/formats/settings.h"
#include "peft/methods/oft.h"

namespace peft::internal {

class OftFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "OFT"; }
  std::string title() const override { return "OFT"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "bias": "none", "block_share": false, "coft": false, "eps": 6e-05, "exclude_modules": null,
      "fan_in_fan_out": false, "init_weights": true, "layers_pattern": null, "layers_to_transform": null,
      "module_dropout": 0.0, "modules_to_save": null, "num_cayley_neumann_terms": 5, "oft_block_size": 32,
      "r": 0, "target_modules": null, "use_cayley_neumann": true})");
  }
  std::string bias_of_targets() const override { return "oft_only"; }
  bool owns(const PieceImpl& piece) const override { return dynamic_cast<const OftImpl*>(&piece) != nullptr; }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& oft = static_cast<const OftImpl&>(piece);
    return {{oft.site().lookup ? "oft_embedding_R.weight" : "oft_R.weight", oft.oft_R}};
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    write_settings<OftImpl>(entries, json, problems, [](const OftOptions& options) {
      return nlohmann::json{{"block_share", options.block_share()},
                            {"coft", options.coft()},
                            {"eps", options.eps()},
                            {"init_weights", options.init_weights()},
                            {"module_dropout", options.module_dropout()},
                            {"num_cayley_neumann_terms", options.neumann_terms()},
                            {"oft_block_size", options.block_size()},
                            {"r", options.blocks()},
                            {"use_cayley_neumann", options.cayley_neumann()}};
    });
    for (const auto& entry : entries) {
      const auto& site = entry.piece->site();
      if (site.fan_in.size() < 2 || (site.fan_in[1] == 1 && site.fan_in[2] == 1)) continue;
      notes.push_back("'" + entry.site->path() +
                      "': Python's forward adds up overlapping patches; there, merge the adapter to run it");
    }
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override {
    const auto blocks = fields.integer("r", 0, 0);
    OftOptions options(fields.integer("oft_block_size", 32, 0));
    options.blocks(blocks).block_share(fields.boolean("block_share"));
    options.module_dropout(fields.rate("module_dropout"));
    options.coft(fields.boolean("coft"));
    options.eps(fields.number(
        "eps", 6e-5, [](double value) { return value > 0; }, "must be a positive number"));
    options.cayley_neumann(fields.boolean("use_cayley_neumann", true));
    const auto version = fields.string("peft_version");
    if (options.cayley_neumann() && is_before_0_18(version)) {
      fields.note(
          "'use_cayley_neumann' is another series since peft 0.18, but this adapter was trained with " +
          (version.empty() ? "an older one" : version) + " and may compute other values");
    }
    options.neumann_terms(fields.integer("num_cayley_neumann_terms", 5, 2));
    options.init_weights(fields.boolean("init_weights", true));
    fields.boolean("fan_in_fan_out");  // the layer knows
    return [options](Target target) { return on(options, std::move(target)); };
  }

  std::vector<std::string> default_targets(const std::string& model_type) const override {
    return default_lora_targets(model_type);
  }

 private:
  /// Of a version's text; older ones wrote none.
  static bool is_before_0_18(const std::string& version) {
    static const std::regex old(R"(|0\.(\d|1[0-7])(\D.*)?)");
    return std::regex_match(version, old);
  }
};

}  // namespace peft::internal
