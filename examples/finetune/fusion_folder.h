// A fusion in a folder: its layers and its head as AdapterHub has them, and the adapters it is made of.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/residual.h"
#include "peft/io/adapterhub.h"
#include "peft/io/adapterhub_formats.h"
#include "peft/io/adapterhub_fusion.h"
#include "peft/model/add_adapter.h"

namespace finetune::internal {

namespace fs = std::filesystem;
using Note = std::function<void(const std::string&)>;

/// Where the folder of a fusion has its adapters, each in a folder of its name.
inline constexpr const char* fused_folder = "adapters";
/// The adapter that a trained copy of the classifier is, beside a fusion.
inline constexpr const char* fusion_head = "#head";

inline bool is_fusion(const fs::path& folder) {
  std::error_code ignored;
  return fs::is_regular_file(folder / peft::internal::hub_fusion_config, ignored);
}

/// Puts bottleneck adapters on a model, frozen and without their heads. Throws: std::runtime_error for one
/// that has nothing to fuse; c10::Error for another model's.
inline void load_fused(torch::nn::Module& model,
                       const std::vector<std::pair<std::string, fs::path>>& adapters, const Note& note) {
  for (const auto& [name, folder] : adapters) {
    const auto loaded =
        peft::load_adapterhub(model, folder, name, /*trainable=*/false, note, /*with_head=*/false);
    if (!loaded.layers<peft::ResidualPieceImpl>().empty()) continue;
    throw std::runtime_error(
        fmt::format("'{}' holds no bottleneck adapters, so nothing to fuse", folder.string()));
  }
}

/// The head of a fusion's folder on the model's classifier, if it is one of this model.
inline std::optional<peft::Adapter> load_fusion_head(torch::nn::Module& model, const fs::path& folder,
                                                     bool trainable, const Note& note) {
  using namespace peft::internal;
  const auto described = make_record(model, fusion_head)->model;
  const HubPlaces places(walk(model, /*learn_paths=*/true), described, "load_adapterhub");
  Problems problems;
  const auto own = read_hub_head(folder, places, problems, note);
  const HubFile file(
      folder, hub_head_tensors, hub_head_pickle, [](const std::string& key) { return key; }, problems);
  problems.raise(fmt::format("'{}'", folder.string()));
  if (own.empty()) return std::nullopt;
  const auto is_own = [own](const peft::SiteInfo& site) { return own.count(site.path) > 0; };
  const auto head = peft::add_adapter(model, peft::ReplaceOptions(), peft::where(is_own), fusion_head);
  const auto tensors = head_tensors(own, head.entries());
  file.check(tensors);
  problems.raise(fmt::format("'{}'", folder.string()));
  file.copy_into(tensors);
  if (trainable) return head;
  for (auto& parameter : head.parameters()) parameter.set_requires_grad(false);
  return head;
}

/// Reads what `save_fusion` wrote: the fusion, active, and its head if there is one.
inline std::pair<peft::Adapter, std::optional<peft::Adapter>> load_fusion(torch::nn::Module& model,
                                                                          const fs::path& folder,
                                                                          bool trainable, const Note& note) {
  const auto json = peft::internal::read_json_object(folder / peft::internal::hub_fusion_config);
  std::vector<std::pair<std::string, fs::path>> adapters;
  for (const auto& name : json.value("adapter_names", nlohmann::ordered_json::array())) {
    if (name.is_string()) adapters.emplace_back(name, folder / fused_folder / name.get<std::string>());
  }
  load_fused(model, adapters, note);
  const auto fusion = peft::load_adapterhub_fusion(model, folder, {}, "", trainable, note);
  std::optional<peft::Adapter> head;
  if (fs::exists(folder / peft::internal::hub_head_config))
    head = load_fusion_head(model, folder, trainable, note);
  return {fusion, head};
}

/// Writes a fusion, its adapters and, if it is given, the trained copy of the classifier. Returns what the
/// formats could not say.
inline std::vector<std::string> save_fusion(torch::nn::Module& model, const peft::Adapter& fusion,
                                            const std::optional<peft::Adapter>& head,
                                            const fs::path& folder) {
  using namespace peft::internal;
  std::vector<std::string> notes;
  peft::save_adapterhub_fusion(model, fusion.name(), folder);
  for (const auto& name : fusion.layers<peft::FusionImpl>().front()->options.adapters()) {
    for (auto& note : peft::save_adapterhub(model, name, folder / fused_folder / name))
      notes.push_back(std::move(note));
  }
  if (!head) return notes;
  const auto& described = head->record().model;
  const HubPlaces places(walk(model, /*learn_paths=*/true), described, "save_adapterhub");
  Problems problems;
  nlohmann::json json;
  const auto own = write_hub_head(head->entries(), places, fusion.name(), json, problems);
  problems.raise("save_adapterhub: the head of '" + fusion.name() + "' cannot be written");
  auto text = hub_model_json(places, described);
  text.update(json);
  write_hub_files(folder, {{hub_head_config, text}},
                  {{hub_head_tensors, written_tensors(head_tensors(own, head->entries()))}});
  return notes;
}

}  // namespace finetune::internal
