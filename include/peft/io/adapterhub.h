// AdapterHub directories: adapters on disk as the `adapters` library writes and reads them.
#pragma once

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/io/adapterhub_config.h"
#include "peft/io/adapterhub_head.h"
#include "peft/io/adapterhub_tensors.h"
#include "peft/io/atomic_file.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_targets.h"
#include "peft/io/staged_directory.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"

namespace peft {
namespace internal {

inline constexpr const char* hub_tensors = "adapter.safetensors";
inline constexpr const char* hub_pickle = "pytorch_adapter.bin";

/// What AdapterHub's config files say of the model.
inline nlohmann::json hub_model_json(const HubPlaces& places, const ModelDescription& model) {
  return {{"hidden_size", places.width()},
          {"model_class", places.model_class()},
          {"model_name", model.name_or_path},
          {"model_type", places.family().model_type},
          {"version", hub_version}};
}

/// Writes some files, each given by name and text or tensors, into a folder: a new one appears complete or
/// not at all.
inline void write_hub_files(
    const std::filesystem::path& directory, const std::map<std::string, nlohmann::json>& configs,
    const std::map<std::string, std::vector<std::pair<std::string, Tensor>>>& tensors) {
  write_directory(directory, [&](const std::filesystem::path& folder) {
    std::vector<std::unique_ptr<AtomicFile>> texts;
    for (const auto& [name, json] : configs) {
      texts.push_back(std::make_unique<AtomicFile>(folder / name));
      texts.back()->write(json.dump(2));
    }
    for (const auto& [name, values] : tensors) save_safetensors(folder / name, values);
    for (const auto& text : texts) text->commit();
  });
}

/// The key that is meant by one in an adapter's file: with the model's own prefix, and without the names of
/// AdapterHub's first versions.
inline std::string current_hub_key(std::string key, const HubPlaces& places) {
  static const std::map<std::string, std::string> renamed{
      {"attention_text_task_adapters", "adapters"},
      {"attention_text_lang_adapters", "adapters"},
      {"layer_text_task_adapters", "adapters"},
      {"layer_text_lang_adapters", "adapters"},
      {"invertible_lang_adapters", "invertible_adapters"}};
  for (const auto& [old, name] : renamed) {
    if (const auto at = key.find(old); at != std::string::npos) key.replace(at, old.size(), name);
  }
  const auto& prefix = places.family().prefix;
  if (key.starts_with(prefix)) key.erase(0, prefix.size());
  return places.prefix() + key;
}

}  // namespace internal

/// True for a folder with an adapter in AdapterHub's form, not Hugging Face PEFT's.
inline bool is_adapterhub(const std::filesystem::path& directory) {
  std::error_code ignored;
  const auto file = directory / internal::config_file_name;
  if (!std::filesystem::is_regular_file(file, ignored)) return false;
  const auto json = nlohmann::json::parse(internal::read_text(file), nullptr, /*allow_exceptions=*/false);
  return json.is_object() && json.contains("config") && !json.contains("peft_type");
}

/// Writes an adapter into a folder of AdapterHub's form, which Python's `model.load_adapter(dir,
/// use_safetensors=True)` reads: `adapter_config.json` and `adapter.safetensors`, and where the adapter
/// trains the classifier `head_config.json` and `model_head.safetensors`. For models whose `Described` type
/// is "bert", "roberta", "xlm-roberta", "deberta-v2" or "gpt2", built as this library's. Methods: bottlenecks
/// (Compacter too), prefixes, prompts, LoRA, (IA)³, and any of them together. A folder that is not there
/// appears complete or not at all.
///
/// Returns what a user should be told, a line each. Throws: c10::ValueError, before anything is written,
/// listing what has no form in such files; c10::Error where a file cannot be written.
///
/// Example:
/// ```
/// for (const auto& line : peft::save_adapterhub(*model, "topics", "out")) std::cerr << line << '\n';
/// ```
inline std::vector<std::string> save_adapterhub(nn::Module& model, const std::string& name,
                                                const std::filesystem::path& directory) {
  using namespace internal;
  const auto handle = adapter(model, name);
  const auto& described = handle.record().model;
  const HubPlaces places(walk(model, /*learn_paths=*/true), described, "save_adapterhub");
  Problems problems;
  std::vector<std::string> notes;
  std::map<const HubFormat*, Entries> by_format;
  Entries replaced;
  for (const auto& entry : handle.entries()) {
    if (const auto* format = hub_format_of(*entry.piece)) {
      by_format[format].push_back(entry);
    } else if (dynamic_cast<const ReplaceImpl*>(entry.piece.get())) {
      replaced.push_back(entry);
    } else {
      problems.add("'" + entry.site->path() + "': '" + entry.piece->method() +
                   "' has no form in AdapterHub's files");
    }
  }
  if (by_format.empty()) problems.add("it has no method that AdapterHub has");
  auto configs = nlohmann::json::array();
  std::vector<std::pair<const HubFormat*, HubConfig>> written;
  for (const auto& format : hub_formats()) {
    const auto found = by_format.find(format.get());
    if (found == by_format.end()) continue;
    for (auto& config : format->write(found->second, places, notes, problems)) {
      configs.push_back(config.json);
      written.emplace_back(format.get(), std::move(config));
    }
  }
  const auto architecture = [](const nlohmann::json& config) {
    return config.value("architecture", nlohmann::json());
  };
  for (size_t i = 0; i < configs.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (architecture(configs[i]) == "lora" && architecture(configs[j]) == "lora") {
        problems.add("LoRA and (IA)³ are one method in AdapterHub (hint: make them two adapters)");
      }
    }
  }
  nlohmann::json head_json;
  const auto head = write_hub_head(replaced, places, name, head_json, problems);
  for (const char* file : {hub_head_config, hub_head_tensors, hub_head_pickle}) {
    std::error_code ignored;
    if (!head.empty() || !std::filesystem::exists(directory / file, ignored)) continue;
    problems.add("'" + (directory / file).string() +
                 "' is another adapter's head, which would be read with this one, that has none (hint: "
                 "another folder)");
  }
  problems.raise("save_adapterhub: '" + name + "' cannot be written");

  auto json = hub_model_json(places, described);
  json["name"] = name;
  json["config"] = configs.size() == 1 ? configs[0] : nlohmann::json();
  if (configs.size() > 1) json["config"] = {{"architecture", "union"}, {"configs", configs}};
  std::vector<HubTensor> tensors;
  for (const auto& [format, config] : written) {
    for (auto& tensor : format->tensors(config, places, name)) tensors.push_back(std::move(tensor));
  }
  std::map<std::string, nlohmann::json> texts{{config_file_name, json}};
  std::map<std::string, std::vector<std::pair<std::string, Tensor>>> files{
      {hub_tensors, written_tensors(tensors)}};
  if (!head.empty()) {
    auto text = hub_model_json(places, described);
    text.update(head_json);
    texts.emplace(hub_head_config, text);
    files.emplace(hub_head_tensors, written_tensors(head_tensors(head, replaced)));
  }
  write_hub_files(directory, texts, files);
  return notes;
}

/// Reads an adapter from a folder that `save_adapterhub` or Python's `adapters` wrote, by whatever of its
/// versions, and puts it on the model under a name of its own: frozen, unless it is to train on. Reads
/// safetensors, or where there are none the pickles that Python writes by default. A head that is beside it
/// becomes the adapter's own copy of the classifier. Draws nothing.
///
/// `note` takes what a user should know, a line each: unknown keys of the config, a head left out, values
/// that are not finite.
///
/// Throws: c10::Error listing all problems, the model unchanged: another model's files; tensors that are
/// missing, not expected, of another shape or not of a floating type; values of the config out of range;
/// methods this library does not have so (DoRA, VeRA, ReFT); what `add_adapter` throws.
///
/// Example:
/// ```
/// auto adapter = peft::load_adapterhub(*model, "sts-b", "similarity");
/// ```
inline Adapter load_adapterhub(nn::Module& model, const std::filesystem::path& directory,
                               const std::string& name = "default", bool trainable = false,
                               const std::function<void(const std::string&)>& note = internal::print_note,
                               bool with_head = true) {
  using namespace internal;
  std::error_code ignored;
  StagedDirectory::recover(directory);
  TORCH_CHECK(std::filesystem::is_regular_file(directory / config_file_name, ignored), "load_adapterhub: '",
              (directory / config_file_name).string(), "' must be an adapter's config, but there is none");
  const auto title = "load_adapterhub: '" + directory.string() + "'";
  const auto record = make_record(model, name);
  const ModuleFinder finder(model);
  const HubPlaces places(finder.nodes(), record->model, "load_adapterhub");
  Problems problems;
  const HubFile file(
      directory, hub_tensors, hub_pickle,
      [&](const std::string& key) { return current_hub_key(key, places); }, problems);
  const auto document = HubConfigReader(directory / config_file_name, places, problems, note).read(file);
  if (!document.usable) problems.raise(title);
  HubHead head;
  if (with_head && std::filesystem::exists(directory / hub_head_config, ignored))
    head = read_hub_head(directory, places, problems, note);

  std::vector<Part> parts;
  bool refused = false;
  for (const auto& section : document.sections) {
    for (const auto& part : section.parts) {
      std::vector<std::string> paths;
      for (const auto& place : part.places) paths.push_back(place.site->path());
      try {
        parts.push_back(part.make(finder.at(paths)));
        for (const auto& place : part.places) {
          const auto why = parts.back().refusal(place.site->info());
          refused = refused || !why.empty();
          if (!why.empty()) {
            problems.add("'" + place.site->path() + "' cannot take the " + section.format->title() + ": " +
                         why);
          }
        }
      } catch (const c10::Error& error) {  // options out of range
        problems.add(std::string(config_file_name) + ": " + error.what_without_backtrace());
        problems.raise(title);
      }
    }
  }
  if (refused) problems.raise(title);
  if (!head.empty()) {
    std::vector<std::string> paths;
    for (const auto& [path, key] : head) paths.push_back(path);
    parts.push_back(on(ReplaceOptions(), finder.at(paths)));
  }
  Problems unplanned;
  auto plan = plan_adapter(model, parts, name, /*extends=*/false, unplanned);
  problems.add(unplanned);
  if (!unplanned.empty()) problems.raise(title);
  plan.place();

  std::vector<HubTensor> tensors;
  for (const auto& section : document.sections) {
    HubConfig config{section.json, {}};
    for (const auto& entry : plan.entries) {
      const bool placed = std::any_of(section.parts.begin(), section.parts.end(), [&](const HubPart& part) {
        return std::any_of(part.places.begin(), part.places.end(),
                           [&](const HubPlace& place) { return place.site == entry.site; });
      });
      if (placed && section.format->owns(*entry.piece)) config.entries.push_back(entry);
    }
    section.format->complete(config.entries, places);
    for (auto& tensor : section.format->tensors(config, places, document.name))
      tensors.push_back(std::move(tensor));
  }
  if (file.readable()) file.check(tensors);
  const auto own = head_tensors(head, plan.entries);
  std::unique_ptr<HubFile> head_file;
  if (!head.empty()) {
    head_file = std::make_unique<HubFile>(
        directory, hub_head_tensors, hub_head_pickle, [](const std::string& key) { return key; }, problems);
    if (head_file->readable()) head_file->check(own);
  }
  problems.raise(title);

  file.copy_into(tensors);
  if (head_file) head_file->copy_into(own);
  for (const auto& key : file.not_finite()) note(file.name() + ": '" + key + "' holds NaN or infinity");
  if (!document.model_name.empty()) record->model.name_or_path = document.model_name;
  const Adapter handle(record);
  commit(plan, handle, trainable);
  return handle;
}

}  // namespace peft
