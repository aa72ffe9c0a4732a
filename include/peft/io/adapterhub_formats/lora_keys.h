// HubLoraKeys: what LoRA and (IA)³ have in common in AdapterHub's files (architecture "lora").
#pragma once

#include <set>
#include <string>
#include <vector>

#include "peft/io/adapterhub_format.h"

namespace peft::internal {

/// What the two methods of a LoRAConfig have in common: its keys, and where it goes.
class HubLoraKeys : public HubFormat {
 public:
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "alpha": 8, "architecture": "lora", "attn_matrices": ["q", "v"], "composition_mode": "add",
      "dropout": 0.0, "dtype": null, "init_weights": "lora", "init_weights_seed": null,
      "intermediate_lora": false, "leave_out": [], "output_lora": false, "r": 8, "selfattn_lora": true,
      "use_dora": false, "use_gating": false, "vera_b": null, "vera_d": null})");
  }

 protected:
  using Matrices = std::set<std::string>;

  static bool has_mode(const ConfigFields& fields, const std::string& mode) {
    if (fields.value("architecture") != "lora") return false;
    const auto& given = fields.value("composition_mode");
    return given == mode || (mode == "add" && given != "scale");
  }
  static const std::set<HubRole>& roles() {
    static const std::set<HubRole> all{HubRole::query,       HubRole::key,          HubRole::value,
                                       HubRole::projections, HubRole::intermediate, HubRole::output};
    return all;
  }

  /// `attn_matrices`: which of "q", "k", "v".
  static Matrices read_matrices(ConfigFields& fields) {
    if (!fields.has("attn_matrices")) return {"q", "v"};
    const auto names = fields.strings("attn_matrices");
    for (const auto& name : names) {
      if (name == "q" || name == "k" || name == "v") continue;
      fields.complain("attn_matrices", R"(must be a list of "q", "k" and "v")");
      return {"q", "v"};
    }
    return {names.begin(), names.end()};
  }
  static std::vector<HubPlace> read_places(ConfigFields& fields, const HubPlaces& places,
                                           const Matrices& matrices) {
    std::set<HubRole> wanted;
    if (fields.boolean("selfattn_lora", true)) {
      if (matrices.count("q")) wanted.insert(HubRole::query);
      if (matrices.count("k")) wanted.insert(HubRole::key);
      if (matrices.count("v")) wanted.insert(HubRole::value);
      if (!matrices.empty()) wanted.insert(HubRole::projections);
    }
    if (fields.boolean("intermediate_lora")) wanted.insert(HubRole::intermediate);
    if (fields.boolean("output_lora")) wanted.insert(HubRole::output);
    auto found = places.of(wanted, read_leave_out(fields));
    if (found.empty()) fields.refuse("it adapts no layer of this model");
    return found;
  }
  /// `matrices`: those of a layer that stacks all three.
  static void write_places(const HubLayout& layout, const Matrices& stacked, nlohmann::json& json) {
    const auto has = [&](HubRole role) { return layout.roles.count(role) > 0; };
    auto matrices = has(HubRole::projections) ? stacked : Matrices();
    if (has(HubRole::query)) matrices.insert("q");
    if (has(HubRole::key)) matrices.insert("k");
    if (has(HubRole::value)) matrices.insert("v");
    json["selfattn_lora"] = !matrices.empty();
    if (!matrices.empty()) {
      json["attn_matrices"] = nlohmann::json::array();
      for (const char* matrix : {"q", "k", "v"}) {
        if (matrices.count(matrix)) json["attn_matrices"].push_back(matrix);
      }
    }
    json["intermediate_lora"] = has(HubRole::intermediate);
    json["output_lora"] = has(HubRole::output);
    json["leave_out"] = layout.leave_out;
  }
  static std::vector<bool> blocks(const Matrices& matrices) {
    return {matrices.count("q") > 0, matrices.count("k") > 0, matrices.count("v") > 0};
  }
  static std::string tail(const std::string& name, const std::string& tensor) {
    return "loras." + name + "." + tensor;
  }
};

}  // namespace peft::internal
