// PEFT directories: adapters on disk as Hugging Face PEFT writes and reads them.
#pragma once

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/input.h"
#include "peft/io/atomic_file.h"
#include "peft/io/peft_config.h"
#include "peft/io/peft_config_reader.h"
#include "peft/io/peft_export.h"
#include "peft/io/peft_targets.h"
#include "peft/io/peft_tensors.h"
#include "peft/io/safetensors.h"
#include "peft/io/staged_directory.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"

namespace peft {

/// Writes an adapter into a folder of Hugging Face PEFT's format: `adapter_config.json` and
/// `adapter_model.safetensors`, which Python's `PeftModel.from_pretrained` loads. A folder that is not there
/// appears complete or not at all; in one that is, the two files are replaced and others are left alone.
///
/// An adapter that Python PEFT has no words for (a head, biases, or layers alone; biases of some layers) is
/// written with the `peft_type` "REPLACE" or "BIAS", which only this library reads.
///
/// Returns what a user should be told, a line each: that Python cannot read it and why, what it is written
/// as. Throws: c10::ValueError for an adapter that has no form on disk; c10::Error where a file cannot be
/// written.
///
/// Example:
/// ```
/// for (const auto& line : peft::save_adapter(adapter, "out")) std::cerr << line << '\n';
/// ```
inline std::vector<std::string> save_adapter(const Adapter& adapter, const std::filesystem::path& directory) {
  adapter.check_names("save_adapter");
  std::vector<std::string> notes;
  internal::PeftExporter exporter(adapter, notes);
  const auto config = exporter.text();
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (auto& [key, tensor] : internal::keyed_tensors(adapter.entries(), exporter.format())) {
    tensors.emplace_back(key, std::move(tensor));
  }
  for (const auto& names : adapter.record().model.second_names) {
    if (exporter.has_second(names)) internal::add_second_name(tensors, names);
  }
  internal::write_directory(directory, [&](const std::filesystem::path& folder) {
    AtomicFile text(folder / internal::config_file_name);
    text.write(config);
    save_safetensors(folder / internal::tensor_file_name, tensors);
    text.commit();
  });
  return notes;
}

/// Writes every adapter of a model as Hugging Face PEFT does: "default" into the folder itself, each other
/// one into a folder of its name below. Returns and throws what `save_adapter` does.
inline std::vector<std::string> save_adapters(nn::Module& model, const std::filesystem::path& directory) {
  const auto known = internal::activation_of(internal::walk(model), "save_adapters")->get()->known;
  TORCH_CHECK_VALUE(!known.empty(), "save_adapters: the model has no adapters");
  std::vector<std::string> notes;
  for (const auto& name : known) {
    const auto folder = name == "default" ? directory : directory / name;
    for (const auto& line : save_adapter(adapter(model, name), folder))
      notes.push_back("'" + name + "': " + line);
  }
  return notes;
}

namespace internal {

/// The folder an adapter is read from.
inline std::filesystem::path adapter_folder(const std::filesystem::path& directory, const std::string& name) {
  std::error_code ignored;
  StagedDirectory::recover(directory);
  const auto below = directory / name / config_file_name;
  const bool is_named = !name.empty() && std::filesystem::is_regular_file(below, ignored);
  if (name != "default" && is_named) return directory / name;
  if (std::filesystem::is_regular_file(directory / config_file_name, ignored)) return directory;
  TORCH_CHECK(std::filesystem::is_directory(directory, ignored), "load_adapter: '", directory.string(),
              "' must be an adapter's folder, but there is none");
  TORCH_CHECK(is_named, "load_adapter: '", (directory / config_file_name).string(),
              "' is missing, and so is '", below.string(), "'");
  return directory / name;
}

/// Where each kind of piece came from, so that a loaded adapter is written as it was.
inline std::shared_ptr<const Origin> origin_of(const PeftConfig& config, const PieceImpl& piece) {
  Origin origin;
  if (config.format && config.format->owns(piece)) {
    if (!config.exclude_pattern.empty()) return std::make_shared<Origin>(origin);
    origin = {config.target_names, config.target_pattern, config.exclude_names, config.layers,
              config.layers_pattern};
  } else if (dynamic_cast<const ReplaceImpl*>(&piece)) {
    origin.names = config.modules_to_save;
  } else if (config.bias == BiasMode::all) {
    origin.pattern = every_path;
    origin.exclude = config.modules_to_save;
  } else if (lies_under(piece.site().path, config.modules_to_save)) {
    origin.names = config.modules_to_save;
  }
  return std::make_shared<Origin>(std::move(origin));
}

inline void print_note(const std::string& line) { std::cerr << line + "\n"; }

}  // namespace internal

/// Reads an adapter from a folder written by `save_adapter` or by Python PEFT (the methods of
/// io/peft_formats.h) and puts it on the model under a name of its own: frozen, unless it is to train on.
/// Reads `directory`, or `directory/name` where there is an adapter in it, as `save_adapters` writes all but
/// "default"; `adapter_model.bin` where there is no safetensors file. Half types are widened to float32.
/// Draws nothing.
///
/// `note` takes what a user should know, a line each: unknown keys of the config, values that are not finite.
///
/// Throws: c10::Error listing all problems, the model unchanged: tensors that are missing, not expected, of
/// another shape or not of a floating type; values of the config out of range; features this library does not
/// have; what `add_adapter` throws.
///
/// Example:
/// ```
/// auto adapter = peft::load_adapter(*model, "out", "topics");
/// ```
inline Adapter load_adapter(nn::Module& model, const std::filesystem::path& directory,
                            const std::string& name = "default", bool trainable = false,
                            const std::function<void(const std::string&)>& note = internal::print_note) {
  using namespace internal;
  const auto folder = adapter_folder(directory, name);
  const auto title = "load_adapter: '" + folder.string() + "'";
  Problems problems;
  const auto record = make_record(model, name);
  auto config = PeftConfigReader(folder / config_file_name, record->model.model_type, problems, note).read();
  AdapterTensors file(folder, {name, "default"}, problems);
  const ModuleFinder finder(model);
  const bool targets_follow = config.usable && !config.own && !config.has_targets;
  if (targets_follow) config.target_names = config.format->default_targets(record->model.model_type);
  const bool targeted = config.all_linear || !config.target_names.empty() || !config.target_pattern.empty();
  if (targets_follow && !targeted && config.further_parts.empty()) {
    problems.add(std::string(config_file_name) +
                 ": 'target_modules' must be given for a base of this kind (model_type '" +
                 record->model.model_type + "'), but got none");
  }
  if (!config.usable || (config.format && !targeted && config.further_parts.empty())) problems.raise(title);

  Problems misfits;
  std::vector<std::string> adapted;
  std::vector<Part> parts;
  try {
    if (targeted) adapted = finder.method_sites(config, misfits, note);
    if (!adapted.empty()) parts.push_back(config.part(finder.at(adapted)));
  } catch (const c10::Error& error) {  // options out of range
    problems.add(std::string(config_file_name) + ": " + error.what_without_backtrace());
    problems.raise(title);
  }
  auto saved = finder.saved_sites(config, misfits);
  const auto in_file = [&file](const std::string& path) { return file.has_bias(path); };
  auto biases = finder.bias_sites(config, adapted, saved, in_file, misfits);
  for (const auto& names : record->model.second_names) {
    // Python's head has no matrix there: the bias alone is the adapter's.
    const auto site = module_above(names.own);
    const bool moves = !config.own && names.kind == SecondName::Kind::only && std::erase(saved, site) > 0;
    if (moves) biases.push_back(site);
  }
  problems.add(misfits);
  parts.insert(parts.end(), config.further_parts.begin(), config.further_parts.end());
  if (!saved.empty()) parts.push_back(on(ReplaceOptions(), finder.at(saved)));
  if (!biases.empty()) parts.push_back(on(BiasOptions(), finder.at(biases)));
  if (parts.empty()) problems.raise(title);
  std::set<std::string> patterns;
  for (auto& part : parts) patterns.merge(std::exchange(part.patterns, {}));
  const bool by_path = std::any_of(parts.begin(), parts.end(), [](const Part& part) { return part.by_path; });
  Problems unplanned;
  auto plan = plan_adapter(model, parts, name, /*extends=*/false, unplanned);
  problems.add(unplanned);
  if (!unplanned.empty()) problems.raise(title);
  std::map<std::string, Tensor> repeated;
  Entries owned;
  plan.place();
  for (auto& entry : plan.entries) {
    entry.origin = origin_of(config, *entry.piece);
    if (!config.format || !config.format->owns(*entry.piece)) continue;
    owned.push_back(entry);
    repeated.emplace(std::string(model_prefix) + entry.site->path() + ".base_layer.weight",
                     entry.site->base_weights().weight);
  }
  try {
    if (!owned.empty()) config.format->complete(owned);
    const auto why = trainable && !owned.empty() ? config.format->untrainable(owned) : std::string();
    if (!why.empty()) problems.add(why);
  } catch (const c10::Error& error) {
    problems.add(error.what_without_backtrace());
    problems.raise(title);
  }
  const auto tensors = keyed_tensors(plan.entries, config.format, /*loading=*/true);
  if (misfits.empty() && file.readable()) {
    file.check(tensors, repeated, config.format, record->model.second_names);
  }
  problems.raise(title);

  file.copy_into(tensors);
  if (!owned.empty()) config.format->finish_loaded(owned, problems);
  problems.raise(title);
  std::vector<std::string> names;
  for (const auto& entry : plan.entries) {
    names.push_back(by_path ? entry.site->path() : entry.site->info().target());
  }
  for (const auto& pattern : without_match(patterns, names)) {  // Python warns of them
    note(std::string(config_file_name) + ": the pattern '" + pattern + "' matches no layer");
  }
  for (const auto& key : file.not_finite()) note(file.file() + ": '" + key + "' holds NaN or infinity");
  const bool prompts = std::any_of(plan.entries.begin(), plan.entries.end(), [](const Adapter::Entry& entry) {
    return dynamic_cast<const PromptPieceImpl*>(entry.piece.get()) != nullptr;
  });
  if (prompts && config.task_type == "QUESTION_ANS") {
    note(std::string(config_file_name) +
         ": Python counts the answers it trains a prompt for from the first virtual token, this library from "
         "the text's first");
  }
  if (!config.task_type.empty()) record->model.task_type = config.task_type;
  if (!config.base_model.empty()) record->model.name_or_path = config.base_model;
  const Adapter adapter(record);
  commit(plan, adapter, trainable);
  return adapter;
}

}  // namespace peft
