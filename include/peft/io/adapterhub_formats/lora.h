// HubLoraFormat: LoRA in AdapterHub's files (architecture "lora").
#pragma once

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/adapterhub_formats/lora_keys.h"
#include "peft/methods/lora.h"

namespace peft::internal {

/// LoRA. s = α / r is the only scale Python has: another one (rsLoRA, a scale set by hand) is written as the
/// α that gives it. DoRA and VeRA are others there than here, and are refused.
class HubLoraFormat final : public HubLoraKeys {
 public:
  std::string title() const override { return "LoRA"; }
  bool reads(const ConfigFields& fields) const override { return has_mode(fields, "add"); }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const LoraImpl*>(&piece) != nullptr;
  }

  std::vector<HubPart> read(ConfigFields& fields, const HubPlaces& places) const override {
    read_choice(fields, "composition_mode", "add", {"add", "scale"});
    LoraOptions lora(fields.integer("r", 8, 1));
    lora.alpha(fields.number(
        "alpha", 8.0, [](double value) { return std::isfinite(value); }, "must be a finite number"));
    lora.dropout(fields.rate("dropout"));
    lora.gating(fields.boolean("use_gating"));
    fields.refuse_features({"use_dora", "vera_b", "vera_d"});
    const auto matrices = read_matrices(fields);
    std::vector<HubPlace> plain, stacked;
    for (const auto& place : read_places(fields, places, matrices)) {
      (place.role == HubRole::projections ? stacked : plain).push_back(place);
    }
    if (lora.gating() && !stacked.empty() && matrices.size() > 1) {
      fields.complain("use_gating",
                      "must be false where one layer stacks several matrices, each with a gate");
    }
    auto merged = lora;
    merged.enable(blocks(matrices));
    std::vector<HubPart> parts;
    if (!plain.empty() || !stacked.empty()) {
      // One part, so that the adapter is one method's: which layers stack three is asked of the layer.
      std::set<std::string> paths;
      for (const auto& place : stacked) paths.insert(place.site->path());
      plain.insert(plain.end(), stacked.begin(), stacked.end());
      parts.push_back({[lora, merged, paths](Target target) {
                         auto part = on(lora, std::move(target));
                         part.refusal = [lora, merged, paths](const SiteInfo& site) {
                           return refusal(paths.count(site.path) ? merged : lora, site);
                         };
                         part.make = [lora, merged, paths](const SiteInfo& site) {
                           return make_piece(paths.count(site.path) ? merged : lora, site);
                         };
                         return part;
                       },
                       std::move(plain)});
    }
    return parts;
  }

  std::vector<HubConfig> write(const Entries& entries, const HubPlaces& places,
                               std::vector<std::string>& notes, Problems& problems) const override {
    auto json = defaults();
    const HubLayout layout(entries, places, roles(), "LoRA", problems);
    Matrices stacked;
    const auto& first = lora_of(entries.front());
    for (const auto& entry : entries) {
      const auto& lora = lora_of(entry);
      const auto where = "'" + entry.site->path() + "' ";
      if (lora.lora_B_bias.defined()) problems.add(where + "has a bias on B, which AdapterHub has not");
      if (lora.loftq_weight.defined()) {
        problems.add(where + "runs on LoftQ's weight, for which AdapterHub's files have no place");
      }
      const auto* place = places.of(*entry.site);
      const bool stacks = place && place->role == HubRole::projections;
      auto enabled = lora.options.enable();
      if (stacks && enabled.size() != 3) {
        problems.add(where + "must adapt query, key and value apart, with enable of three blocks, but has " +
                     std::to_string(enabled.size()) + " (hint: LoraOptions::enable)");
      } else if (!stacks && !enabled.empty()) {
        problems.add(where + "adapts blocks of a layer that AdapterHub takes for one");
      } else if (stacks) {
        Matrices own;
        for (size_t i = 0; i < 3; ++i) {
          if (enabled[i]) own.insert(std::string(1, "qkv"[i]));
        }
        if (lora.options.gating() && own.size() > 1) {
          problems.add(where + "has one gate for several matrices, where AdapterHub has one for each");
        }
        if (!stacked.empty() && own != stacked)
          problems.add(where + "enables other blocks than another layer");
        stacked = own;
      }
      if (rank_of(lora) != rank_of(first) || lora.scaling() != first.scaling()) {
        problems.add(where + "must have the rank and the scale of '" + entries.front().site->path() + "', " +
                     std::to_string(rank_of(first)) + " and " + nlohmann::json(first.scaling()).dump() +
                     ", but has " + std::to_string(rank_of(lora)) + " and " +
                     nlohmann::json(lora.scaling()).dump() + " (hint: make them two adapters)");
      }
    }
    write_settings<LoraImpl>(entries, json, problems, [](const LoraOptions& options) {
      return nlohmann::json{{"dropout", options.dropout()}, {"use_gating", options.gating()}};
    });
    json["r"] = rank_of(first);
    json["alpha"] = plain_number(first.scaling() * static_cast<double>(rank_of(first)));
    if (first.options.gating() && first.scale() != 1.0) {
      notes.emplace_back(scale_note);
    }
    if (first.lora_A_0.defined()) {
      notes.emplace_back("what the start took out of the base is written as further ranks of the LoRA");
    }
    write_places(layout, stacked, json);
    return {{json, entries}};
  }

  std::vector<HubTensor> tensors(const HubConfig& config, const HubPlaces& places,
                                 const std::string& name) const override {
    std::vector<HubTensor> found;
    for (const auto& entry : config.entries) {
      const auto& lora = lora_of(entry);
      const auto* place = places.of(*entry.site);
      const bool whole = lora.lora_A_0.defined();
      found.emplace_back(place->key + tail(name, "lora_A"), whole ? lora.full_A() : lora.lora_A);
      found.emplace_back(place->key + tail(name, "lora_B"), whole ? lora.full_B() : lora.lora_B);
      if (!lora.gate_weight.defined()) continue;
      found.emplace_back(place->key + tail(name, "gate.weight"), lora.gate_weight);
      found.emplace_back(place->key + tail(name, "gate.bias"), lora.gate_bias);
    }
    return found;
  }

 private:
  static const LoraImpl& lora_of(const Adapter::Entry& entry) {
    return static_cast<const LoraImpl&>(*entry.piece);
  }
  static int64_t rank_of(const LoraImpl& lora) { return lora.rank * (lora.lora_A_0.defined() ? 2 : 1); }
};

}  // namespace peft::internal
