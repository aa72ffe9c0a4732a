// HubBottleneckFormat: bottleneck adapters, Compacter among them, in AdapterHub's files (no architecture).
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/adapterhub_formats/bottleneck_keys.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/invertible.h"

namespace peft::internal {

/// Bottlenecks at the joins, and the invertible adapter that one of their configs has with them.
class HubBottleneckFormat final : public HubFormat {
 public:
  std::string title() const override { return "bottleneck"; }
  bool reads(const ConfigFields& fields) const override {
    return !fields.has("architecture") || fields.value("architecture") == "bottleneck";
  }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "adapter_residual_before_ln": false, "cross_adapter": false, "dropout": 0.0, "factorized_phm_W": true,
      "factorized_phm_rule": false, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
      "init_weights_seed": null, "inv_adapter": null, "inv_adapter_reduction_factor": null,
      "is_parallel": false, "learn_phm": true, "leave_out": [], "ln_after": false, "ln_before": false,
      "mh_adapter": false, "non_linearity": "relu", "original_ln_after": true, "original_ln_before": false,
      "output_adapter": false, "phm_bias": true, "phm_c_init": "normal", "phm_dim": 4,
      "phm_init_range": 0.0001, "phm_layer": false, "phm_rank": 1, "reduction_factor": 16,
      "residual_before_ln": true, "scaling": 1.0, "shared_W_phm": false, "shared_phm_rule": true,
      "stochastic_depth": 0.0, "use_gating": false})");
  }

  std::vector<HubPart> read(ConfigFields& fields, const HubPlaces& places) const override {
    for (const char* key : {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"}) {
      if (!fields.has(key)) fields.complain(key, "must be given");
    }
    std::set<HubRole> roles;
    if (fields.boolean("mh_adapter")) roles.insert(HubRole::attention_join);
    if (fields.boolean("output_adapter")) roles.insert(HubRole::output_join);
    auto found = places.of(roles, read_leave_out(fields));
    auto options = read_block(fields);
    read_factors(fields, found, options);
    std::vector<HubPart> parts;
    if (fields.has("inv_adapter")) {
      read_choice(fields, "inv_adapter", "nice", {"nice"});
      const auto factor = fields.number(
          "inv_adapter_reduction_factor", 2.0, [](double r) { return std::isfinite(r) && r > 0; },
          "must be a positive number");
      const auto inverse = InvertibleOptions(factor).non_linearity(options.non_linearity());
      parts.push_back({[inverse](Target target) { return on(inverse, std::move(target)); },
                       places.of({HubRole::embeddings})});
    }
    if (found.empty() && parts.empty()) fields.refuse("it adapts no layer of this model");
    if (!fields.usable()) return {};
    if (!found.empty()) {
      parts.push_back(
          {[options](Target target) { return on(options, std::move(target)); }, std::move(found)});
    }
    return parts;
  }

  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const BottleneckImpl*>(&piece) || dynamic_cast<const InvertibleImpl*>(&piece);
  }
  std::vector<HubConfig> write(const Entries& entries, const HubPlaces& places,
                               std::vector<std::string>& notes, Problems& problems) const override {
    Entries attention, output, inverse;
    bool drops = false;
    for (const auto& entry : entries) {
      if (dynamic_cast<const InvertibleImpl*>(entry.piece.get())) {
        inverse.push_back(entry);
        continue;
      }
      const auto* place = places.of(*entry.site);
      if (!place || (place->role != HubRole::attention_join && place->role != HubRole::output_join)) {
        problems.add("'" + entry.site->path() + "' is no place where AdapterHub has a " + title());
      } else {
        (place->role == HubRole::output_join ? output : attention).push_back(entry);
      }
      drops = drops || block_of(entry).options.hidden_dropout() > 0;
    }
    if (drops) notes.emplace_back("hidden_dropout is left out, for AdapterHub drops nothing there");
    std::vector<HubConfig> configs;
    for (auto* half : {&attention, &output}) {
      if (half->empty()) continue;
      const HubLayout layout(*half, places, {HubRole::attention_join, HubRole::output_join}, title(),
                             problems);
      auto json = defaults();
      write_settings<BottleneckImpl>(*half, json, problems, write_block);
      json["reduction_factor"] = write_factors(*half, places);
      json["leave_out"] = layout.leave_out;
      configs.push_back({json, *half});
    }
    if (configs.size() == 2 && configs[0].json == configs[1].json) {
      configs[0].entries.insert(configs[0].entries.end(), output.begin(), output.end());
      configs.pop_back();
    }
    for (auto& config : configs) {
      const auto any = [&](HubRole role) {
        return std::any_of(config.entries.begin(), config.entries.end(),
                           [&](const auto& entry) { return places.of(*entry.site)->role == role; });
      };
      config.json["mh_adapter"] = any(HubRole::attention_join);
      config.json["output_adapter"] = any(HubRole::output_join);
    }
    for (const auto& entry : inverse) write_inverse(entry, configs, problems);
    if (!inverse.empty() && places.word_width() != places.width()) {
      problems.add("'" + inverse.front().site->path() + "' is as wide as the model, " +
                   std::to_string(places.width()) + ", and AdapterHub's invertible adapters are as the " +
                   "words' vectors, " + std::to_string(places.word_width()));
    }
    return configs;
  }

  std::vector<HubTensor> tensors(const HubConfig& config, const HubPlaces& places,
                                 const std::string& name) const override {
    std::vector<HubTensor> found;
    std::shared_ptr<SharedImpl> shared;
    for (const auto& entry : config.entries) {
      if (dynamic_cast<const InvertibleImpl*>(entry.piece.get())) {
        for (const auto& [tail, tensor] : all_tensors(*entry.piece))
          found.emplace_back(places.prefix() + "invertible_adapters." + name + "." + tail, tensor);
        continue;
      }
      const auto& block = block_of(entry);
      shared = block.shared();
      const auto key = places.of(*entry.site)->key + "adapters." + name + ".";
      const auto add = [&](const std::string& prefix, const nn::Module& module) {
        for (const auto& [tail, tensor] : all_tensors(module)) found.emplace_back(prefix + tail, tensor);
      };
      if (block.scaling.defined()) found.emplace_back(key + "scaling", block.scaling);
      if (block.adapter_norm_before) {
        for (const auto& [tail, tensor] : all_tensors(*block.adapter_norm_before)) {
          found.emplace_back(key + "adapter_down.0." + tail, tensor,
                             std::vector<std::string>{key + "adapter_norm_before." + tail});
        }
      }
      add(key + (block.adapter_norm_before ? "adapter_down.1." : "adapter_down.0."), *block.adapter_down);
      add(key + "adapter_up.", *block.adapter_up);
      if (block.adapter_norm_after) add(key + "adapter_norm_after.", *block.adapter_norm_after);
      if (block.gate) add(key + "gate.", *block.gate);
    }
    if (shared) {
      for (const auto& [tail, tensor] : all_tensors(*shared)) {
        found.emplace_back(places.prefix() + "shared_parameters." + name + "." + tail, tensor);
        found.back().hint = "a model without a head is saved without it: such a file cannot be used";
      }
    }
    return found;
  }

 private:
  static const BottleneckImpl& block_of(const Adapter::Entry& entry) {
    return static_cast<const BottleneckImpl&>(*entry.piece);
  }
  static std::vector<std::pair<std::string, Tensor>> all_tensors(const nn::Module& module) {
    std::vector<std::pair<std::string, Tensor>> found;
    for (const auto& item : module.named_parameters()) found.emplace_back(item.key(), item.value());
    for (const auto& item : module.named_buffers()) found.emplace_back(item.key(), item.value());
    return found;
  }

  /// Adds the invertible adapter to a config with its activation, which AdapterHub has one key for.
  void write_inverse(const Adapter::Entry& entry, std::vector<HubConfig>& configs, Problems& problems) const {
    const auto& options = static_cast<const InvertibleImpl&>(*entry.piece).options;
    if (configs.empty()) {
      auto json = defaults();
      json["non_linearity"] = options.non_linearity();
      configs.push_back({std::move(json), {}});
    }
    for (auto& [json, entries] : configs) {
      if (json["non_linearity"] != options.non_linearity()) continue;
      json["inv_adapter"] = "nice";
      json["inv_adapter_reduction_factor"] = plain_number(options.reduction_factor());
      entries.push_back(entry);
      return;
    }
    problems.add("'" + entry.site->path() + "' has the activation \"" + options.non_linearity() +
                 "\", and AdapterHub's invertible adapters have the bottleneck's, " +
                 configs.front().json["non_linearity"].dump());
  }

  /// The factor that gives a bottleneck its channels in Python's arithmetic.
  static double factor_of(const BottleneckImpl& block, int64_t layer) {
    const auto& options = block.options;
    const auto width = static_cast<double>(block.width);
    const auto own = options.layer_factors().find(layer);
    if (own != options.layer_factors().end()) return own->second;
    if (options.size() == 0) return options.reduction_factor();
    const auto factor = width / static_cast<double>(block.size);
    if (std::max<int64_t>(1, floor_divide(width, factor)) == block.size) return factor;
    return std::nextafter(factor, 0.0);
  }
  static nlohmann::json write_factors(const Entries& entries, const HubPlaces& places) {
    std::map<int64_t, double> factors;
    for (const auto& entry : entries) {
      const auto layer = places.of(*entry.site)->layer;
      factors.emplace(layer, factor_of(block_of(entry), layer));
    }
    const auto usual = factors.begin()->second;
    auto map = nlohmann::json::object();
    for (const auto& [layer, factor] : factors) {
      if (factor != usual) map[std::to_string(layer)] = plain_number(factor);
    }
    if (map.empty()) return plain_number(usual);
    map["default"] = plain_number(usual);
    return map;
  }
};

}  // namespace peft::internal
