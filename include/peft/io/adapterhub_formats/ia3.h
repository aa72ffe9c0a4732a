// HubIa3Format: (IA)³ in AdapterHub's files (architecture "lora", composition_mode "scale").
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/adapterhub_formats/lora_keys.h"
#include "peft/methods/ia3.h"

namespace peft::internal {

/// (IA)³, which is the LoRA of a mode of its own: outputs are scaled, never a feed-forward layer's inputs. Of
/// a layer that stacks query, key and value the file holds those it adapts; the others keep ones.
class HubIa3Format final : public HubLoraKeys {
 public:
  std::string title() const override { return "(IA)³"; }
  bool reads(const ConfigFields& fields) const override { return has_mode(fields, "scale"); }
  bool owns(const PieceImpl& piece) const override { return dynamic_cast<const Ia3Impl*>(&piece) != nullptr; }

  std::vector<HubPart> read(ConfigFields& fields, const HubPlaces& places) const override {
    if (fields.integer("r", 8, 1) != 1) fields.complain("r", "must be 1 in the mode \"scale\"");
    if (fields.value("alpha") != 1) fields.complain("alpha", "must be 1 in the mode \"scale\"");
    fields.refuse_features({"use_gating", "use_dora", "vera_b", "vera_d"});
    if (fields.has("dropout") && fields.value("dropout") != 0.0) {
      fields.complain("dropout", "must be 0 in the mode \"scale\"");
    }
    const auto matrices = read_matrices(fields);
    auto found = read_places(fields, places, matrices);
    const bool part_of = std::any_of(
        found.begin(), found.end(), [](const HubPlace& place) { return place.role == HubRole::projections; });
    if (part_of && matrices.size() < 3) {
      fields.note("of the stacked query, key and value the file scales some; trained on, all are scaled");
    }
    if (found.empty()) return {};
    return {{[](Target target) { return on(Ia3Options(), std::move(target)); }, std::move(found)}};
  }
  void complete(const Entries& entries, const HubPlaces&) const override {
    const torch::NoGradGuard no_grad;
    for (const auto& entry : entries) static_cast<Ia3Impl&>(*entry.piece).ia3_l.fill_(1);
  }

  std::vector<HubConfig> write(const Entries& entries, const HubPlaces& places, std::vector<std::string>&,
                               Problems& problems) const override {
    auto json = defaults();
    const HubLayout layout(entries, places, roles(), "(IA)³", problems);
    for (const auto& entry : entries) {
      if (static_cast<const Ia3Impl&>(*entry.piece).feedforward) {
        problems.add("'" + entry.site->path() + "' scales its inputs, and AdapterHub's (IA)³ only outputs");
      }
    }
    json.update({{"r", 1}, {"alpha", 1}, {"composition_mode", "scale"}, {"init_weights", "ia3"}});
    write_places(layout, stacked(entries, places), json);
    return {{json, entries}};
  }

  std::vector<HubTensor> tensors(const HubConfig& config, const HubPlaces& places,
                                 const std::string& name) const override {
    const auto& matrices = config.json.at("attn_matrices");
    std::vector<HubTensor> found;
    for (const auto& entry : config.entries) {
      const auto& l = static_cast<const Ia3Impl&>(*entry.piece).ia3_l;
      const auto* place = places.of(*entry.site);
      std::vector<Tensor> parts{l};
      if (place->role == HubRole::projections) {
        parts.clear();
        const auto thirds = l.chunk(3);
        for (size_t i = 0; i < 3; ++i) {
          if (std::find(matrices.begin(), matrices.end(), std::string(1, "qkv"[i])) != matrices.end())
            parts.push_back(thirds[i]);
        }
      }
      found.emplace_back(place->key + tail(name, "lora_B"), std::move(parts));
    }
    return found;
  }

 private:
  /// Which of the stacked matrices any layer scales.
  static Matrices stacked(const Entries& entries, const HubPlaces& places) {
    Matrices matrices;
    for (const auto& entry : entries) {
      const auto* place = places.of(*entry.site);
      if (!place || place->role != HubRole::projections) continue;
      const auto thirds = static_cast<const Ia3Impl&>(*entry.piece).ia3_l.detach().chunk(3);
      for (size_t i = 0; i < 3; ++i) {
        if (!thirds[i].eq(1).all().item<bool>()) matrices.insert(std::string(1, "qkv"[i]));
      }
    }
    // One that is at its start says nothing: Python's default.
    return matrices.empty() ? Matrices{"k", "v"} : matrices;
  }
};

}  // namespace peft::internal
