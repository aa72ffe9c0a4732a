// HubPrefixFormat: prefix tuning in AdapterHub's files (architecture "prefix_tuning").
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "peft/io/adapterhub_format.h"
#include "peft/methods/prefix.h"

namespace peft::internal {

/// Prefix tuning. Python writes the table once a layer too, in those left out as well; the copies are
/// written, and may be missing where a file is read. A folded table is written as a flat one.
class HubPrefixFormat final : public HubFormat {
 public:
  std::string title() const override { return "prefix"; }
  bool reads(const ConfigFields& fields) const override {
    return fields.value("architecture") == "prefix_tuning";
  }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({
      "architecture": "prefix_tuning", "bottleneck_size": 512, "cross_prefix": true, "dropout": 0.0,
      "encoder_prefix": true, "flat": false, "init_weights_seed": null, "leave_out": [],
      "non_linearity": "tanh", "prefix_length": 30, "shared_gating": true, "use_gating": false})");
  }

  std::vector<HubPart> read(ConfigFields& fields, const HubPlaces& places) const override {
    auto options = PrefixOptions::adapterhub(fields.integer("prefix_length", 30, 1));
    options.projection(!fields.boolean("flat")).vector_width(places.width());
    options.hidden_width(fields.integer("bottleneck_size", 512, 1));
    options.activation(read_activation(fields, "tanh"));
    options.dropout(fields.rate("dropout"));
    const bool shared = fields.boolean("shared_gating", true);
    if (fields.boolean("use_gating")) options.gates(shared ? 1 : 2);
    options.leave_out(read_leave_out(fields));
    auto found = places.of({HubRole::attention}, options.leave_out());
    if (found.empty()) fields.refuse("the prefix is for no layer of this model");
    if (found.empty() || !fields.usable()) return {};
    return {{[options](Target target) { return on(options, std::move(target)); }, std::move(found)}};
  }

  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const PrefixImpl*>(&piece) || dynamic_cast<const PrefixPositionsImpl*>(&piece);
  }
  std::vector<HubConfig> write(const Entries& entries, const HubPlaces& places, std::vector<std::string>&,
                               Problems& problems) const override {
    Entries layers;
    for (const auto& entry : entries) {
      if (dynamic_cast<const PrefixImpl*>(entry.piece.get())) {
        layers.push_back(entry);
      } else {
        problems.add("'" + entry.site->path() +
                     "' counts the prefix as positions, which AdapterHub's does not (hint: "
                     "PrefixOptions::shift_positions)");
      }
    }
    const HubLayout layout(layers, places, {HubRole::attention}, title(), problems);
    const auto& table = prefix_of(layers.front()).table();
    auto json = defaults();
    write_settings<PrefixImpl>(layers, json, problems, [&](const PrefixOptions& options) {
      nlohmann::json keys{{"prefix_length", options.length()},
                          {"flat", !table.first.defined()},
                          {"dropout", options.dropout()},
                          {"use_gating", options.gates() > 0},
                          {"shared_gating", options.gates() < 2}};
      if (table.first.defined()) {
        keys["bottleneck_size"] = table.first.size(0);
        keys["non_linearity"] = options.activation();
      }
      return keys;
    });
    if (table.first.defined() && table.first.size(1) != places.width()) {
      problems.add("'" + layers.front().site->path() + "' makes its prefix from vectors of width " +
                   std::to_string(table.first.size(1)) + ", and AdapterHub's has the model's, " +
                   std::to_string(places.width()) + " (hint: PrefixOptions::vector_width)");
    }
    json["leave_out"] = layout.leave_out;
    return {{json, layers}};
  }

  std::vector<HubTensor> tensors(const HubConfig& config, const HubPlaces& places,
                                 const std::string& name) const override {
    std::vector<HubTensor> found;
    for (const auto& entry : config.entries) {
      const auto& prefix = prefix_of(entry);
      if (!prefix.gate_weight.defined()) continue;
      const auto key = places.of(*entry.site)->key + "prefix_tuning.prefix_gates." + name + ".";
      found.emplace_back(key + "weight", prefix.gate_weight);
      found.emplace_back(key + "bias", prefix.gate_bias);
    }
    const auto& table = prefix_of(config.entries.front()).table();
    const auto add = [&](const std::string& tail, const Tensor& tensor) {
      const auto inner = "prefix_tunings." + name + ".self_prefix." + tail;
      std::vector<std::string> copies;
      for (const auto& place : places.of({HubRole::attention})) {
        copies.push_back(place.key + "prefix_tuning.pool." + inner);
      }
      found.emplace_back(places.prefix() + "prefix_tuning." + inner, tensor, std::move(copies));
    };
    if (!table.first.defined()) {
      add("control_trans", table.embedding.view(-1));
      return found;
    }
    add("wte.weight", table.embedding);
    add("control_trans.0.weight", table.first);
    add("control_trans.0.bias", table.first_bias);
    add("control_trans.2.weight", table.second);
    add("control_trans.2.bias", table.second_bias);
    return found;
  }

 private:
  static const PrefixImpl& prefix_of(const Adapter::Entry& entry) {
    return static_cast<const PrefixImpl&>(*entry.piece);
  }
};

}  // namespace peft::internal
