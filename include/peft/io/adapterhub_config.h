// HubConfigReader: reads the adapter_config.json of an AdapterHub directory, strictly.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/problems.h"
#include "peft/io/adapterhub_formats.h"
#include "peft/io/adapterhub_tensors.h"
#include "peft/io/config_json.h"
#include "peft/io/peft_fields.h"

namespace peft::internal {

/// The version of the library whose files are followed.
inline constexpr const char* hub_version = "adapters.1.3.0";

/// What an adapter_config.json says.
struct HubDocument {
  struct Section {
    const HubFormat* format = nullptr;
    nlohmann::json json;
    std::vector<HubPart> parts;
  };
  std::string name, model_name;
  std::vector<Section> sections;
  bool usable = true;  ///< false where what decides tensors and shapes could not be read
};

/// Refuses the files of another model: of another family, which nothing else is asked of then (false), or
/// another width.
inline bool check_hub_model(ConfigFields& fields, const HubPlaces& places) {
  const auto& type = places.family().model_type;
  if (fields.has("model_type") && fields.value("model_type") != type) {
    fields.complain("model_type", "must be the model's, \"" + type + "\"");
    return false;
  }
  if (fields.has("hidden_size") && fields.value("hidden_size") != places.width()) {
    fields.complain("hidden_size", "must be the model's, " + std::to_string(places.width()));
  }
  return true;
}

/// True for a version before 1.1.0, whose LoRA was trained without its scale.
inline bool has_unscaled_lora(const std::string& version) {
  std::array<int, 3> number{};
  int read = 0;
  const int fields =
      std::sscanf(version.c_str(), "adapters.%d.%d.%d%n", &number[0], &number[1], &number[2], &read);
  if (fields < 2) return false;
  const std::array<int, 3> fixed{1, 1, 0};
  // A development version of 1.1.0 came before it.
  const bool before_release = fields == 3 && static_cast<size_t>(read) < version.size();
  return number < fixed || (number == fixed && before_release);
}

/// Reads an adapter_config.json. What is wrong is added to `problems`, keys nobody knows are reported to
/// `note`. Configs of older versions are brought up to date as Python does it.
class HubConfigReader {
 public:
  HubConfigReader(const std::filesystem::path& file, const HubPlaces& places, Problems& problems,
                  const Note& note)
      : fields_(read_json_object(file), places.family().model_type, problems, note),
        places_(places),
        problems_(problems),
        note_(note) {}

  /// The adapter's name, which is in the keys of its tensors.
  std::string name() { return fields_.string("name"); }

  /// `file`: the adapter's tensors.
  HubDocument read(const HubFile& file) {
    HubDocument document;
    if (!check_hub_model(fields_, places_)) {
      document.usable = false;
      return document;
    }
    document.name = name();
    if (document.name.empty()) fields_.complain("name", "must be a name");
    document.model_name = fields_.string("model_name");
    static const std::set<std::string> known{"config",      "config_id",  "hidden_size",
                                             "model_class", "model_name", "model_type",
                                             "name",        "type",       "version"};
    for (const auto& item : fields_.json().items()) {
      if (!known.count(item.key())) fields_.note("the unknown key '" + item.key() + "' was ignored");
    }
    auto config = fields_.value("config");
    if (!config.is_object()) {
      fields_.complain("config", "must be an object");
    } else {
      update(config, file);
      read_sections(config, document);
    }
    document.usable = document.usable && fields_.usable();
    return document;
  }

 private:
  using Json = nlohmann::ordered_json;

  void read_sections(const Json& config, HubDocument& document) {
    if (!config.contains("architecture") || config["architecture"] != "union") {
      read_section(config, document);
      return;
    }
    if (!config.contains("configs") || !config["configs"].is_array() || config["configs"].empty()) {
      fields_.refuse("'configs' of a union must be a list of configs");
      return;
    }
    for (const auto& one : config["configs"]) {
      if (one.is_object()) {
        read_section(one, document);
      } else {
        fields_.refuse("'configs' of a union must be a list of configs, but holds " + json_text(one));
      }
    }
  }

  void read_section(const Json& config, HubDocument& document) {
    ConfigFields fields(config, places_.family().model_type, problems_, note_);
    const auto format = std::find_if(hub_formats().begin(), hub_formats().end(),
                                     [&](const auto& row) { return row->reads(fields); });
    if (format == hub_formats().end()) {
      fields.complain("architecture", "must be one of null, " + known_architectures());
      document.usable = false;
      return;
    }
    auto json = (*format)->defaults();
    for (const auto& [key, value] : config.items()) {
      if (!json.contains(key)) fields.note("the unknown key '" + key + "' was ignored");
    }
    json.update(nlohmann::json(config));
    auto parts = (*format)->read(fields, places_);
    document.usable = document.usable && fields.usable();
    document.sections.push_back({format->get(), std::move(json), std::move(parts)});
  }
  static std::string known_architectures() {
    std::set<std::string> known{"\"union\""};
    for (const auto& format : hub_formats()) {
      const auto defaults = format->defaults();
      if (defaults.contains("architecture")) known.insert(defaults["architecture"].dump());
    }
    std::string text;
    for (const auto& name : known) text += (text.empty() ? "" : ", ") + name;
    return text;
  }

  /// What Python does to configs of older versions.
  void update(Json& config, const HubFile& file) const {
    const auto has = [&](const char* key) { return config.contains(key) && !config[key].is_null(); };
    if (!fields_.json().contains("version") && has("non_linearity")) {
      if (config["non_linearity"] == "gelu") {
        config["non_linearity"] = "gelu_new";
      } else if (config["non_linearity"] == "gelu_orig") {
        config["non_linearity"] = "gelu";
      }
    }
    if (config.contains("invertible_adapter")) {
      const auto nested = config["invertible_adapter"];
      config.erase("invertible_adapter");
      if (nested.is_object() && !nested.empty()) {
        config["inv_adapter"] = nested.value("block_type", Json());
        config["inv_adapter_reduction_factor"] = nested.value("reduction_factor", Json());
      }
    }
    // Task adapters once named invertible adapters they did not have.
    if (fields_.value("type") == "text_task" && has("inv_adapter") &&
        !file.mentions("invertible_adapters.")) {
      config["inv_adapter"] = nullptr;
      config["inv_adapter_reduction_factor"] = nullptr;
    }
    const auto version = fields_.value("version");
    if (config.contains("architecture") && config["architecture"] == "lora" && has("r") && has("alpha") &&
        config["r"] != config["alpha"] && version.is_string() &&
        has_unscaled_lora(version.get<std::string>())) {
      fields_.note("'alpha' was taken for " + json_text(config["r"]) + ", that of no scale, for version " +
                   json_text(version) + " trained without");
      config["alpha"] = config["r"];
    }
  }

  ConfigFields fields_;
  const HubPlaces& places_;
  Problems& problems_;
  const Note& note_;
};

}  // namespace peft::internal
