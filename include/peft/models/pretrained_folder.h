// PretrainedFolder: the files of a Hugging Face folder.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"
#include "peft/io/config_json.h"
#include "peft/io/safetensors.h"

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <utility>

namespace peft::models {

/// A Hugging Face folder: `config.json` and the weights, in `model.safetensors` or in the shards that
/// `model.safetensors.index.json` names. Opening maps the files and reads no data.
///
/// Throws: c10::Error naming the file: one that is missing or not valid; shards that lack a tensor the index
/// promises or hold one it does not name.
class PretrainedFolder {
 public:
  explicit PretrainedFolder(std::filesystem::path path) : path_(std::move(path)) {
    std::error_code ignored;
    TORCH_CHECK(std::filesystem::is_directory(path_, ignored), "PretrainedFolder: '", path_.string(),
                "' must be a folder with a model, but there is none");
    TORCH_CHECK(std::filesystem::is_regular_file(path_ / config_name, ignored), "PretrainedFolder: '",
                (path_ / config_name).string(), "' is missing");
    if (std::filesystem::is_regular_file(path_ / weights_name, ignored)) {
      open_file(weights_name);
    } else if (std::filesystem::is_regular_file(path_ / index_name, ignored)) {
      open_shards();
    } else {
      const bool pickled = std::filesystem::is_regular_file(path_ / "pytorch_model.bin", ignored);
      TORCH_CHECK(
          false, "PretrainedFolder: '", path_.string(), "' must hold ", weights_name, " or ", index_name,
          pickled ? ", but it has pytorch_model.bin (hint: convert it with transformers' save_pretrained)"
                  : ", but it has neither");
    }
  }

  // `tensors` points into `files`.
  PretrainedFolder(const PretrainedFolder&) = delete;
  PretrainedFolder& operator=(const PretrainedFolder&) = delete;

  static constexpr const char* config_name = "config.json";
  static constexpr const char* weights_name = "model.safetensors";
  static constexpr const char* index_name = "model.safetensors.index.json";

  std::filesystem::path config_path() const { return path_ / config_name; }
  /// The file that lists the tensors, for messages.
  std::filesystem::path weights_path() const { return path_ / (is_sharded() ? index_name : weights_name); }
  bool is_sharded() const { return sharded_; }

  /// The weight files by name.
  const std::map<std::string, SafetensorsFile>& files() const { return files_; }
  /// Every tensor's name, with the file it is in.
  const std::map<std::string, const SafetensorsFile*>& tensors() const { return tensors_; }

 private:
  const SafetensorsFile& open_file(const std::string& name) {
    const auto& file = files_.try_emplace(name, path_ / name).first->second;
    for (const auto& key : file.names()) tensors_.emplace(key, &file);
    return file;
  }

  void open_shards() {
    sharded_ = true;
    const auto index_path = path_ / index_name;
    const auto index = peft::internal::read_json_object(index_path);
    const auto map = index.find("weight_map");
    TORCH_CHECK(map != index.end() && map->is_object() && !map->empty(), "'", index_path.string(),
                "': 'weight_map' must map tensors to files");
    peft::internal::Problems problems;
    std::map<std::string, std::set<std::string>> promised;
    for (const auto& [key, value] : map->items()) {
      const bool plain = value.is_string() && is_plain_name(value.get<std::string>());
      if (plain) {
        promised[value.get<std::string>()].insert(key);
      } else {
        problems.add("'" + key + "' must name a file of the folder, but got " +
                     peft::internal::json_text(value));
      }
    }
    for (const auto& [name, keys] : promised) {
      std::error_code ignored;
      if (!std::filesystem::is_regular_file(path_ / name, ignored)) {
        problems.add("'" + name + "' is missing");
        continue;
      }
      const auto& file = open_file(name);
      for (const auto& key : keys) {
        if (!file.contains(key)) problems.add("'" + name + "' must hold '" + key + "', but does not");
      }
      for (const auto& key : file.names()) {
        if (!keys.count(key))
          problems.add("'" + name + "' holds '" + key + "', which the index puts elsewhere");
      }
    }
    problems.raise("'" + index_path.string() + "'");
  }

  static bool is_plain_name(const std::string& name) {
    const std::filesystem::path path(name);
    return path.has_filename() && !path.has_parent_path() && name != "." && name != "..";
  }

  std::filesystem::path path_;
  std::map<std::string, SafetensorsFile> files_;
  std::map<std::string, const SafetensorsFile*> tensors_;
  bool sharded_ = false;
};

}  // namespace peft::models
