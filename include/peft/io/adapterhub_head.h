// AdapterHub heads: the task head that AdapterHub saves beside an adapter.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/adapterhub_places.h"
#include "peft/io/adapterhub_tensors.h"
#include "peft/io/config_json.h"
#include "peft/io/peft_fields.h"
#include "peft/io/peft_format.h"
#include "peft/methods/replace.h"

namespace peft::internal {

inline constexpr const char* hub_head_config = "head_config.json";
inline constexpr const char* hub_head_tensors = "model_head.safetensors";
inline constexpr const char* hub_head_pickle = "pytorch_model_head.bin";

/// Layers of the model that a head is, and what its file calls them: path → beginning of the keys.
using HubHead = std::map<std::string, std::string>;

/// The paths of a model's head: the classifier, and the pooler under it where there is one.
inline std::pair<std::string, std::string> head_paths(const HubPlaces& places) {
  return {"classifier", places.family().prefix + std::string("pooler.dense")};
}

/// Which layers of the model the head in a folder is. Empty, with a line for `note`, where the model has no
/// such head; Python leaves those out too. transformers' own class has its classifier. The library's class
/// has heads of its own making: one layer on the pooler or on every token is the classifier; two, with tanh
/// between, on the first token are pooler and classifier.
inline HubHead read_hub_head(const std::filesystem::path& folder, const HubPlaces& places,
                             const std::string& task_type, Problems& problems, const Note& note) {
  const auto json = read_json_object(folder / hub_head_config);
  const auto value = [&](const nlohmann::ordered_json& from, const char* key) -> nlohmann::ordered_json {
    return from.is_object() && from.contains(key) ? from[key] : nlohmann::ordered_json();
  };
  const auto [classifier, pooler] = head_paths(places);
  const auto found = value(json, "model_class");
  if (!found.is_string()) {
    problems.add(std::string(hub_head_config) + ": 'model_class' must be a string, but got " +
                 json_text(found));
    return {};
  }
  const auto model_class = found.get<std::string>();
  const bool texts = task_type == "SEQ_CLS", tokens = task_type == "TOKEN_CLS";
  const auto config = value(json, "config");
  if ((texts || tokens) && model_class == places.model_class()) return {{classifier, "classifier."}};
  const bool flexible =
      model_class == places.family().flexible_class || model_class.ends_with("ModelWithHeads");
  if (flexible && config.is_object() && value(json, "name").is_string()) {
    const auto key = "heads." + json["name"].get<std::string>() + ".";
    const auto kind = value(config, "head_type");
    const auto layers = value(config, "layers");
    if (tokens && kind == "tagging" && layers == 1) return {{classifier, key + "1."}};
    if (texts && kind == "classification") {
      const bool pooled = value(config, "use_pooler") == true;
      if (layers == 1 && pooled) return {{classifier, key + "1."}};
      if (layers == 2 && !pooled && value(config, "activation_function") == "tanh")
        return {{pooler, key + "1."}, {classifier, key + "4."}};
    }
  }
  note(std::string(hub_head_config) + ": the head of " + model_class +
       " is left out: it is none that an adapter of this model can have (hint: train_also trains a copy of "
       "its own)");
  return {};
}

/// The tensors of a head's pieces.
inline std::vector<HubTensor> head_tensors(const HubHead& head, const Entries& entries) {
  std::vector<HubTensor> found;
  for (const auto& entry : entries) {
    const auto at = head.find(entry.site->path());
    const auto* piece = dynamic_cast<const ReplaceImpl*>(entry.piece.get());
    if (at == head.end() || !piece) continue;
    found.emplace_back(at->second + "weight", piece->weight);
    if (piece->bias.defined()) found.emplace_back(at->second + "bias", piece->bias);
  }
  return found;
}

/// How an adapter's own layers are written: its head and the config of it. Layers that are no part of a head
/// are problems.
inline HubHead write_hub_head(const Entries& replaced, const HubPlaces& places, const std::string& name,
                              const std::string& task_type, nlohmann::json& json, Problems& problems) {
  const auto [classifier, pooler] = head_paths(places);
  bool has_classifier = false, has_pooler = false;
  int64_t labels = 0;
  for (const auto& entry : replaced) {
    const auto& path = entry.site->path();
    has_classifier = has_classifier || path == classifier;
    has_pooler = has_pooler || path == pooler;
    if (path == classifier) labels = entry.site->info().fan_out;
    if (path != classifier && path != pooler) {
      problems.add("'" + path + "' is trained as a whole, which AdapterHub does with heads only");
    }
  }
  if (has_pooler && !has_classifier) {
    problems.add("'" + pooler + "' is trained as a whole, which AdapterHub does with the classifier only");
  }
  if (!has_classifier) return {};
  json = {
      {"config", nullptr}, {"model_class", places.model_class()}, {"name", nullptr}, {"num_labels", labels}};
  if (!has_pooler) return {{classifier, "classifier."}};
  if (task_type != "SEQ_CLS") problems.add("'" + pooler + "' is no part of this model's head");
  json["model_class"] = places.family().flexible_class;
  json["name"] = name;
  json["config"] = {{"activation_function", "tanh"}, {"bias", true},        {"dropout_prob", nullptr},
                    {"head_type", "classification"}, {"label2id", nullptr}, {"layers", 2},
                    {"num_labels", labels},          {"use_pooler", false}};
  json.erase("num_labels");
  const auto key = "heads." + name + ".";
  return {{classifier, key + "4."}, {pooler, key + "1."}};
}

}  // namespace peft::internal
