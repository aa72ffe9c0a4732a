// AdapterHub fusions: AdapterFusion on disk as the `adapters` library writes and reads it.
#pragma once

#include <algorithm>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/composition.h"
#include "peft/io/adapterhub.h"
#include "peft/io/staged_directory.h"
#include "peft/methods/fusion.h"

namespace peft {
namespace internal {

inline constexpr const char* hub_fusion_config = "adapter_fusion_config.json";
inline constexpr const char* hub_fusion_tensors = "model_adapter_fusion.safetensors";
inline constexpr const char* hub_fusion_pickle = "pytorch_model_adapter_fusion.bin";

inline std::set<HubRole> hub_joins() { return {HubRole::attention_join, HubRole::output_join}; }

/// The tensors of a fusion's pieces in the file of one of this name.
inline std::vector<HubTensor> fusion_tensors(const Entries& entries, const HubPlaces& places,
                                             const std::string& name) {
  std::vector<HubTensor> found;
  for (const auto& entry : entries) {
    const auto& fusion = dynamic_cast<const FusionImpl&>(*entry.piece);
    const auto key = places.of(*entry.site)->key + "adapter_fusion_layer." + name + ".";
    const auto add = [&](const std::string& tail, const DenseProjection* projection) {
      if (!projection) return;
      found.emplace_back(key + tail + ".weight", projection->weight);
      found.emplace_back(key + tail + ".bias", projection->bias);
    };
    add("query", fusion.query.get());
    add("key", fusion.key.get());
    if (fusion.value.defined()) found.emplace_back(key + "value.weight", fusion.value);
  }
  return found;
}

/// Rate of dropout of the model's attention, which a fusion has that says none.
inline double attention_dropout(const HubPlaces& places) {
  return places.of({HubRole::attention}).front().site->info().attention->dropout();
}

/// Keys → options. What is wrong is added to the fields' problems.
inline FusionOptions read_fusion(ConfigFields& fields, std::vector<std::string> adapters,
                                 const HubPlaces& places) {
  static const std::set<std::string> known{
      "dropout_prob",    "key",         "query", "query_before_ln",      "regularization",
      "residual_before", "temperature", "value", "value_before_softmax", "value_initialized"};
  for (const auto& item : fields.json().items()) {
    if (!known.count(item.key())) fields.note("the unknown key '" + item.key() + "' was ignored");
  }
  FusionOptions options(std::move(adapters));
  options.query(fields.boolean("query", true)).key(fields.boolean("key", true));
  options.value(fields.boolean("value", true)).query_before_ln(fields.boolean("query_before_ln"));
  options.regularization(fields.boolean("regularization", true))
      .residual_before(fields.boolean("residual_before"))
      .temperature(fields.boolean("temperature"))
      .value_before_softmax(fields.boolean("value_before_softmax", true))
      .value_initialized(fields.boolean("value_initialized", true));
  options.dropout_prob(attention_dropout(places));
  if (fields.has("dropout_prob") && fields.value("dropout_prob") != 0.0) {
    options.dropout_prob(fields.rate("dropout_prob"));
  }
  if (!options.query() && !options.key() && !options.value()) {
    fields.refuse("one of 'query', 'key' and 'value' must be true");
  }
  return options;
}

}  // namespace internal

/// Writes a fusion into a folder of AdapterHub's form, which Python's `model.load_adapter_fusion(dir,
/// use_safetensors=True)` reads: `adapter_fusion_config.json` and `model_adapter_fusion.safetensors`. Its
/// adapters are written on their own, by `save_adapterhub`. For the same models as that.
///
/// Throws: c10::ValueError, before anything is written, for an adapter that is no fusion; c10::Error where a
/// file cannot be written.
inline void save_adapterhub_fusion(nn::Module& model, const std::string& name,
                                   const std::filesystem::path& directory) {
  using namespace internal;
  const auto handle = adapter(model, name);
  const auto& described = handle.record().model;
  const HubPlaces places(walk(model, /*learn_paths=*/true), described, "save_adapterhub_fusion");
  Problems problems;
  for (const auto& entry : handle.entries()) {
    const auto* place = places.of(*entry.site);
    if (!dynamic_cast<const FusionImpl*>(entry.piece.get())) {
      problems.add("'" + entry.site->path() + "' carries '" + entry.piece->method() +
                   "', which is no fusion (hint: save_adapterhub)");
    } else if (!place || !hub_joins().count(place->role)) {
      problems.add("'" + entry.site->path() + "' is no place where AdapterHub fuses");
    }
  }
  problems.raise("save_adapterhub_fusion: '" + name + "' cannot be written");
  const auto& options = dynamic_cast<const FusionImpl&>(*handle.entries().front().piece).options;
  auto json = hub_model_json(places, described);
  json["name"] = name;
  json["adapter_names"] = options.adapters();
  json["config"] = {{"dropout_prob", nullptr},
                    {"key", options.key()},
                    {"query", options.query()},
                    {"query_before_ln", options.query_before_ln()},
                    {"regularization", options.regularization()},
                    {"residual_before", options.residual_before()},
                    {"temperature", options.temperature()},
                    {"value", options.value()},
                    {"value_before_softmax", options.value_before_softmax()},
                    {"value_initialized", options.value_initialized()}};
  const auto dropout = options.dropout_prob().value_or(0);
  if (dropout != 0 && dropout != attention_dropout(places)) json["config"]["dropout_prob"] = dropout;
  const auto tensors = written_tensors(fusion_tensors(handle.entries(), places, name));
  write_hub_files(directory, {{hub_fusion_config, json}}, {{hub_fusion_tensors, tensors}});
}

/// Reads a fusion from a folder that `save_adapterhub_fusion` or Python's `save_adapter_fusion` wrote, and
/// makes it active. The model must have its adapters: those of the file's names, or `adapters` in their
/// order where they were loaded under others. `name`: by default the file's. Frozen, unless it is to train
/// on; then its adapters are. Draws nothing.
///
/// `note` takes what a user should know, a line each. Throws: c10::Error listing all problems, the model
/// unchanged: adapters the model does not have; what `load_adapterhub` throws.
///
/// Example:
/// ```
/// peft::load_adapterhub(*model, "adapters/mnli", "mnli");
/// peft::load_adapterhub(*model, "adapters/sst", "sst");
/// auto fusion = peft::load_adapterhub_fusion(*model, "adapters/mnli,sst");
/// ```
inline Adapter load_adapterhub_fusion(
    nn::Module& model, const std::filesystem::path& directory, std::vector<std::string> adapters = {},
    std::string name = "", bool trainable = false,
    const std::function<void(const std::string&)>& note = internal::print_note) {
  using namespace internal;
  std::error_code ignored;
  StagedDirectory::recover(directory);
  const auto path = directory / hub_fusion_config;
  TORCH_CHECK(std::filesystem::is_regular_file(path, ignored), "load_adapterhub_fusion: '", path.string(),
              "' must be a fusion's config, but there is none");
  const auto title = "load_adapterhub_fusion: '" + directory.string() + "'";
  const auto nodes = walk(model, /*learn_paths=*/true);
  auto record = make_record(model, name);
  const HubPlaces places(nodes, record->model, "load_adapterhub_fusion");
  Problems problems;
  const auto fields_of = [&](const nlohmann::ordered_json& json) {
    return ConfigFields(json, places.family().model_type, problems, note, hub_fusion_config);
  };
  auto fields = fields_of(read_json_object(path));
  if (!check_hub_model(fields, places)) problems.raise(title);
  const auto own_name = fields.string("name");
  if (own_name.empty()) fields.complain("name", "must be a name");
  const auto theirs = fields.strings("adapter_names");
  if (adapters.empty()) adapters = theirs;
  if (adapters.size() != theirs.size()) {
    problems.add("it fuses " + std::to_string(theirs.size()) + " adapters, but " +
                 std::to_string(adapters.size()) + " were named");
  }
  const auto known = adapter_names(model);
  for (const auto& member : adapters) {
    const bool there = std::find(known.begin(), known.end(), member) != known.end();
    if (!there) problems.add(no_adapter_text(member, known));
  }
  if (!fields.value("config").is_object()) fields.complain("config", "must be an object");
  if (adapters.empty()) fields.complain("adapter_names", "must name the adapters that are fused");
  if (!fields.usable() || adapters.empty()) problems.raise(title);
  auto settings = fields_of(fields.value("config"));
  const auto options = read_fusion(settings, adapters, places);
  problems.raise(title);

  std::set<std::string> joins;
  for (const auto& place : places.of(hub_joins())) {
    for (const auto& member : adapters) {
      for (const auto& attached : place.site->pieces(member)) {
        if (dynamic_cast<const ResidualPieceImpl*>(attached.piece.get())) joins.insert(place.site->path());
      }
    }
  }
  if (name.empty()) name = own_name;
  record->name = name;
  const auto part = on(options, where([joins](const SiteInfo& site) { return joins.count(site.path) > 0; }));
  auto plan = plan_adapter(model, {part}, name, /*extends=*/false, problems);
  problems.raise(title);
  plan.place();
  const HubFile file(
      directory, hub_fusion_tensors, hub_fusion_pickle,
      [&](const std::string& key) { return current_hub_key(key, places); }, problems);
  const auto tensors = fusion_tensors(plan.entries, places, own_name);
  if (file.readable()) file.check(tensors);
  problems.raise(title);

  file.copy_into(tensors);
  for (const auto& key : file.not_finite()) note(file.name() + ": '" + key + "' holds NaN or infinity");
  const Adapter handle(record);
  commit(plan, handle, trainable, /*active=*/false);
  try {
    set_active(model, Fuse(std::vector<Composition>(adapters.begin(), adapters.end()), name));
  } catch (...) {
    remove_adapter(model, name);
    throw;
  }
  if (trainable) {
    for (const auto& member : adapters) {
      for (auto& parameter : adapter(model, member).parameters()) parameter.set_requires_grad(false);
    }
  }
  return handle;
}

}  // namespace peft
