// AdapterHub heads: the task head that AdapterHub saves beside an adapter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
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

/// The layers of one of AdapterHub's own heads: each is a dropout and a linear layer, with the activation
/// after all but the last.
inline HubHead flexible_head(const HubTask::Flexible& head, const std::string& name) {
  HubHead found;
  for (size_t i = 0; i < head.paths.size(); ++i)
    found.emplace(head.paths[i], "heads." + name + "." + std::to_string(3 * i + 1) + ".");
  return found;
}

/// Which layers of the model the head in a folder is. Empty, with a line for `note`, where the model has no
/// such head; Python leaves those out too. It is that of transformers' own class, or one of the library's
/// class, which has heads of its own making.
inline HubHead read_hub_head(const std::filesystem::path& folder, const HubPlaces& places, Problems& problems,
                             const Note& note) {
  const auto json = read_json_object(folder / hub_head_config);
  const auto value = [&](const nlohmann::ordered_json& from, const char* key) -> nlohmann::ordered_json {
    return from.is_object() && from.contains(key) ? from[key] : nlohmann::ordered_json();
  };
  const auto found = value(json, "model_class");
  if (!found.is_string()) {
    problems.add(std::string(hub_head_config) + ": 'model_class' must be a string, but got " +
                 json_text(found));
    return {};
  }
  const auto model_class = found.get<std::string>();
  const auto& task = places.task();
  if (!task.head.empty() && model_class == task.model_class) {
    HubHead own;
    for (const auto& path : task.head) own.emplace(path, path + ".");
    return own;
  }
  auto former_class = places.family().flexible_class;
  former_class.replace(former_class.rfind("AdapterModel"), std::string::npos, "ModelWithHeads");
  const bool flexible = model_class == places.family().flexible_class || model_class == former_class;
  const auto config = value(json, "config");
  if (flexible && value(json, "name").is_string()) {
    for (const auto& head : task.flexible) {
      const bool fits = value(config, "head_type") == head.kind &&
                        value(config, "layers") == head.paths.size() &&
                        (value(config, "use_pooler") == true) == head.pooled &&
                        (head.activation.empty() || value(config, "activation_function") == head.activation);
      if (!fits) continue;
      if (!head.note.empty()) note(std::string(hub_head_config) + ": " + head.note);
      return flexible_head(head, json["name"].get<std::string>());
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

/// How an adapter's own layers are written: its head and the config of it. transformers' class where they are
/// that one's head, else the library's. Layers that are no part of a head, or only a part of it, are
/// problems.
inline HubHead write_hub_head(const Entries& replaced, const HubPlaces& places, const std::string& name,
                              nlohmann::json& json, Problems& problems) {
  if (replaced.empty()) return {};
  const auto& task = places.task();
  std::map<std::string, int64_t> own;  // with the values each gives
  for (const auto& entry : replaced) own.emplace(entry.site->path(), entry.site->info().fan_out);
  const auto is_own = [&](const std::vector<std::string>& paths) {
    return own.size() == paths.size() &&
           std::all_of(paths.begin(), paths.end(), [&](const auto& path) { return own.count(path) > 0; });
  };
  json = {{"config", nullptr}, {"model_class", task.model_class}, {"name", nullptr}};
  if (is_own(task.head)) {
    json["num_labels"] = own[task.head.back()];
    HubHead head;
    for (const auto& path : task.head) head.emplace(path, path + ".");
    return head;
  }
  for (const auto& head : task.flexible) {
    if (!is_own(head.paths)) continue;
    json["model_class"] = places.family().flexible_class;
    json["name"] = name;
    json["config"] = {{"activation_function", nullptr},
                      {"bias", true},
                      {"dropout_prob", nullptr},
                      {"head_type", head.kind},
                      {"label2id", nullptr},
                      {"layers", head.paths.size()},
                      {"num_labels", own[head.paths.back()]},
                      {"use_pooler", head.pooled}};
    if (!head.activation.empty()) json["config"]["activation_function"] = head.activation;
    return flexible_head(head, name);
  }
  std::set<std::string> known(task.head.begin(), task.head.end());
  for (const auto& head : task.flexible) known.insert(head.paths.begin(), head.paths.end());
  std::string whole;
  for (const auto& path : task.head) whole += (whole.empty() ? "'" : ", '") + path + "'";
  for (const auto& [path, outputs] : own) {
    problems.add(known.count(path)
                     ? "'" + path + "' is trained as a whole without the rest of the head, " + whole +
                           ", which AdapterHub's files hold at once"
                     : "'" + path + "' is trained as a whole, which AdapterHub does with heads only");
  }
  return {};
}

}  // namespace peft::internal
