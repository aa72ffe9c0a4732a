// save_pretrained: writes a model's base, as it is now, as a complete Hugging Face folder.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/site.h"
#include "peft/io/atomic_file.h"
#include "peft/io/config_json.h"
#include "peft/io/safetensors.h"
#include "peft/models/pretrained.h"

#include <torch/arg.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft::internal {

/// The parameters of a model of ours, each of which lies in a site, without those of adapters.
inline torch::OrderedDict<std::string, Tensor> base_parameters(const nn::Module& model) {
  torch::OrderedDict<std::string, Tensor> parameters;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto* site = dynamic_cast<const SiteImpl*>(item.value().get());
    if (!site) continue;
    for (const auto& own : site->base_parameters()) {
      parameters.insert(item.key() + "." + own.key(), own.value());
    }
  }
  return parameters;
}

/// The files of a folder that go with its model, beside config and weights: the tokenizer's, and those of the
/// modules that sentence-transformers puts behind the model (`modules.json`). Relative to the folder.
/// Throws: c10::Error naming a `modules.json` that will not do.
inline std::vector<std::filesystem::path> companion_files(const std::filesystem::path& folder) {
  namespace fs = std::filesystem;
  std::vector<fs::path> names;
  std::error_code ignored;
  for (const char* name :
       {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
        "spm.model", "sentencepiece.bpe.model", "chat_template.jinja", "sentence_bert_config.json",
        "config_sentence_transformers.json", "modules.json"}) {
    if (fs::is_regular_file(folder / name, ignored)) names.emplace_back(name);
  }
  if (names.empty() || names.back() != "modules.json") return names;
  const auto file = folder / "modules.json";
  const auto modules = read_json(file);
  TORCH_CHECK(modules.is_array(), "'", file.string(), "': expected a list of modules");
  for (const auto& module : modules) {
    TORCH_CHECK(module.is_object() && module.contains("path") && module["path"].is_string(), "'",
                file.string(), "': expected a 'path' in each module, but got ", json_text(module));
    const fs::path path = module["path"].get<std::string>();
    const bool outside = path.is_absolute() || std::find(path.begin(), path.end(), "..") != path.end();
    TORCH_CHECK(!outside, "'", file.string(), "': 'path' must lie in the folder, but got '", path.string(),
                "'");
    if (path.empty() || path.lexically_normal() == ".") continue;
    fs::recursive_directory_iterator entry(folder / path, ignored);
    for (; entry != fs::recursive_directory_iterator(); entry.increment(ignored)) {
      if (entry->is_regular_file(ignored)) names.push_back(entry->path().lexically_relative(folder));
    }
  }
  return names;
}

}  // namespace peft::internal

namespace peft::models {

/// What of a folder is written otherwise than its source has it.
struct SaveOptions {
  /// Names of the labels, in the order of their ids; empty: those of the source's config.
  TORCH_ARG(std::vector<std::string>, labels);
  /// transformers' class; empty: that of the source's config.
  TORCH_ARG(std::string, architecture) = "";
  /// Whether a task head is written that the source does not have.
  TORCH_ARG(bool, new_head) = false;
};

/// Writes a folder that transformers and this library open: every tensor of the source's files under the name
/// it has there, with the model's present value where the model holds it (so merge first) and the source's
/// where it does not, and of a tied matrix that merging has made two both; the source's config, with what
/// `options` says; its tokenizer, and the modules that sentence-transformers puts behind the model. Weights
/// keep the model's type; the config names it. Each file appears complete or not at all; the config is the
/// last.
///
/// Throws: c10::Error naming the file; c10::ValueError where model and source do not fit.
///
/// Example:
/// ```
/// peft::merge(*model);
/// peft::models::save_pretrained(*model, "merged", /*source=*/"all-MiniLM-L6-v2");
/// ```
inline void save_pretrained(const nn::Module& model, const std::filesystem::path& directory,
                            const std::filesystem::path& source, const SaveOptions& options = {}) {
  const auto* self = dynamic_cast<const Pretrained*>(&model);
  TORCH_CHECK(self != nullptr, "save_pretrained: ", model.name(), " must be a peft::models::Pretrained");
  const PretrainedFolder folder(source);
  std::error_code error;
  TORCH_CHECK(!std::filesystem::equivalent(directory, source, error), "save_pretrained: '",
              directory.string(), "' must not be the folder the base is read from");
  const auto companions = peft::internal::companion_files(source);

  const auto described = self->config_json();
  const size_t outputs =
      described.is_object() && described.contains("id2label") ? described["id2label"].size() : 0;
  TORCH_CHECK_VALUE(
      !options.new_head() || options.labels().empty() || outputs == 0 || options.labels().size() == outputs,
      "save_pretrained: labels must be ", outputs, ", one an output of the head, but got ",
      options.labels().size());

  const auto parameters = peft::internal::base_parameters(model);
  const auto holds = [&parameters](const std::string& key) { return parameters.contains(key); };
  peft::internal::Problems problems;
  std::set<std::string> written;
  std::vector<std::pair<std::string, std::vector<std::pair<std::string, Tensor>>>> files;
  for (const auto& [file_name, file] : folder.files()) {
    auto& tensors = files.emplace_back(file_name, 0).second;
    for (const auto& name : file.names()) {
      const auto key = peft::internal::model_key(name, *self, holds);
      const auto* parameter = parameters.find(key);
      if (parameter && parameter->sizes().vec() != file.entry(name).shape) {
        problems.add("'" + name + "' expected " + peft::internal::shape_text(file.entry(name).shape) +
                     ", but got " + peft::internal::shape_text(parameter->sizes()));
      }
      if (parameter) written.insert(key);
      tensors.emplace_back(name, parameter ? *parameter : file.tensor(name));
    }
  }
  const auto tied = self->tied();
  const auto follows = [&tied](const std::string& key) {
    return std::any_of(tied.begin(), tied.end(), [&key](const auto& pair) { return pair.first == key; });
  };
  for (const auto& item : parameters) {
    const bool is_new = options.new_head() && peft::internal::in_head(*self, item.key()) &&
                        !written.count(item.key()) && !follows(item.key());
    if (is_new) files.back().second.emplace_back(item.key(), item.value());
  }
  // Merging on one of two tied matrices makes them two.
  bool untied = false;
  for (const auto& [head, words] : tied) {
    if (torch::equal(parameters[head], parameters[words])) continue;
    untied = true;
    for (const auto& key : {head, words}) {
      if (!written.count(key)) files.back().second.emplace_back(key, parameters[key]);
    }
  }
  // transformers knows a tied head's bias by either of its names, and an untied one's by its own.
  for (const auto& [second, own] : self->aliases()) {
    const bool whole = untied || (options.new_head() && !written.count(own));
    for (const auto& name : {second, own}) {
      const auto in_file = [&name](const auto& file) {
        return std::any_of(file.second.begin(), file.second.end(),
                           [&name](const auto& tensor) { return tensor.first == name; });
      };
      if (whole && std::none_of(files.begin(), files.end(), in_file)) {
        files.back().second.emplace_back(name, parameters[own]);
      }
    }
  }
  problems.raise("save_pretrained: '" + source.string() + "' is not this model's base");
  std::filesystem::create_directories(directory, error);
  TORCH_CHECK(!error, "save_pretrained: cannot make '", directory.string(), "': ", error.message());

  auto index = nlohmann::ordered_json::object();
  if (folder.is_sharded()) index = peft::internal::read_json_object(folder.weights_path());
  int64_t total = 0;
  for (const auto& [file_name, tensors] : files) {
    save_safetensors(directory / file_name, tensors, folder.files().at(file_name).metadata());
    for (const auto& [name, tensor] : tensors) {
      total += static_cast<int64_t>(tensor.nbytes());
      index["weight_map"][name] = file_name;
    }
  }
  if (folder.is_sharded()) {
    index["metadata"]["total_size"] = total;
    write_file(directory / PretrainedFolder::index_name, index.dump(2) + "\n");
  }

  for (const auto& name : companions) {
    std::filesystem::create_directories((directory / name).parent_path(), error);
    write_file(directory / name, peft::internal::read_text(source / name));
  }

  auto config = peft::internal::read_json_object(folder.config_path());
  if (options.new_head() && options.labels().empty() && outputs > 0) {
    for (const char* key : {"id2label", "label2id"}) config[key] = described[key];
    config.erase("num_labels");
  }
  if (!options.labels().empty()) {
    config["id2label"] = config["label2id"] = nlohmann::ordered_json::object();
    for (size_t i = 0; i < options.labels().size(); ++i) {
      config["id2label"][std::to_string(i)] = options.labels()[i];
      config["label2id"][options.labels()[i]] = i;
    }
    config.erase("num_labels");
  }
  if (untied) config["tie_word_embeddings"] = false;
  if (!options.architecture().empty()) config["architectures"] = {options.architecture()};
  const bool old_name = config.contains("torch_dtype") && !config.contains("dtype");
  config[old_name ? "torch_dtype" : "dtype"] =
      peft::internal::name_of_dtype(parameters.front().value().scalar_type());
  write_file(directory / PretrainedFolder::config_name, config.dump(2) + "\n");
}

/// Writes a model that no folder was the source of: one built from a config and trained. Weights and config
/// only.
///
/// Throws: c10::Error naming the file, and for a model that cannot write its config.
inline void save_pretrained(const nn::Module& model, const std::filesystem::path& directory) {
  const auto* self = dynamic_cast<const Pretrained*>(&model);
  TORCH_CHECK(self != nullptr, "save_pretrained: ", model.name(), " must be a peft::models::Pretrained");
  auto config = self->config_json();
  TORCH_CHECK(!config.is_null(), "save_pretrained: ", self->architecture(),
              " writes no config of its own (hint: save_pretrained(model, directory, source))");
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  TORCH_CHECK(!error, "save_pretrained: cannot make '", directory.string(), "': ", error.message());
  const auto parameters = peft::internal::base_parameters(model);
  std::set<std::string> left_out;
  for (const auto& [head, words] : self->tied()) {
    const bool same = torch::equal(parameters[head], parameters[words]);
    if (same) left_out.insert(head);
    if (!same) config["tie_word_embeddings"] = false;
  }
  // The bias of a head that is tied has its second name alone, as in transformers' own files.
  for (const auto& [second, own] : self->aliases()) {
    if (!left_out.empty()) left_out.insert(own);
  }
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const auto& item : parameters) {
    if (!left_out.count(item.key())) tensors.emplace_back(item.key(), item.value());
  }
  for (const auto& [second, own] : self->aliases()) tensors.emplace_back(second, parameters[own]);
  save_safetensors(directory / PretrainedFolder::weights_name, tensors, {{"format", "pt"}});
  config["architectures"] = {self->architecture()};
  config["dtype"] = peft::internal::name_of_dtype(parameters.front().value().scalar_type());
  write_file(directory / PretrainedFolder::config_name, config.dump(2) + "\n");
}

}  // namespace peft::models
