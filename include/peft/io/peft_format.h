// PeftFormat: what one method's files look like; a row of the table in io/peft_formats.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/pattern.h"
#include "peft/core/problems.h"
#include "peft/io/peft_fields.h"
#include "peft/io/python_regex.h"
#include "peft/model/add_adapter.h"

namespace peft::internal {

/// A tensor as it is on disk: its name, and its values.
struct DiskTensor {
  std::string name;
  Tensor tensor;
};

/// Pieces of an adapter, each with its site and where it came from, in the model's order.
using Entries = std::vector<Adapter::Entry>;

/// One `peft_type` of Hugging Face PEFT. What every type has in common is not a row's business: the keys
/// `peft_type`, `task_type`, `base_model_name_or_path`, `inference_mode`, `auto_mapping`, `revision`,
/// `peft_version`; targets, exclusions and layers; `modules_to_save`; `bias`; unknown keys; prefixes and
/// adapter names in keys; strictness. A row's class has no state.
class PeftFormat {
 public:
  PeftFormat() = default;
  PeftFormat(const PeftFormat&) = delete;
  PeftFormat& operator=(const PeftFormat&) = delete;
  virtual ~PeftFormat() = default;

  /// Python's name of the method: "LORA".
  virtual std::string peft_type() const = 0;
  /// The method's name in messages: "LoRA".
  virtual std::string title() const = 0;
  /// The keys beyond the common ones that Python's `save_pretrained` writes, with its defaults;
  /// `target_modules`, `modules_to_save`, `bias` and the like among them. A key that is not here is unknown
  /// in files of this type: of exclusions, layers and biases the config holds what the row has keys for.
  virtual nlohmann::json defaults() const = 0;
  /// Python's word for "the biases of the adapted layers": "lora_only". Needed where `defaults` has `bias`.
  virtual std::string bias_of_targets() const { return {}; }

  /// True for the method's pieces. A method may have several classes of them.
  virtual bool owns(const PieceImpl& piece) const = 0;
  /// A piece's tensors as they are on disk, named by what follows the layer's path and a dot.
  virtual std::vector<DiskTensor> tensors(const PieceImpl& piece) const = 0;
  /// Of a piece made by `read`: the tensors its file holds, into which the values are copied. Other ones than
  /// `tensors` for a method that is written in another form than Python's.
  virtual std::vector<DiskTensor> loaded_tensors(const PieceImpl& piece) const { return tensors(piece); }
  /// The tensors written for a piece, which may depend on the adapter's other ones.
  virtual std::vector<DiskTensor> written_tensors(const Adapter::Entry& entry, const Entries&) const {
    return tensors(*entry.piece);
  }
  /// True where the files of an adapter that has a part of a module hold all parts of it.
  virtual bool adapts_whole_modules() const { return false; }
  /// Tensors that no layer owns, under their whole key in the file ("base_model.vera_A"). Those that this
  /// adapter's files lack are left out.
  virtual std::vector<DiskTensor> shared_tensors(const Entries&) const { return {}; }
  /// False where Python's model lies right in its wrapper, so that keys begin with "base_model." only.
  virtual bool wraps_layers() const { return true; }
  /// Why pieces that `read` made cannot train on, or an empty string.
  virtual std::string untrainable(const Entries&) const { return {}; }
  /// The key that 0.21.2 writes for one of a file: for names older versions wrote.
  virtual std::string current_key(const std::string& key) const { return key; }

  /// Options → keys. `json` has the defaults, and all that is common already: targets are decided. `notes`
  /// takes what a user should know, `problems` why these pieces have no form on disk together.
  virtual void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
                     Problems& problems) const = 0;
  /// Keys → what makes the method's part for a target. Problems go to `fields`; options out of range may also
  /// be left to the method's `check`, which `on` calls. A part whose `make` is the row's own can decide
  /// layer by layer.
  virtual std::function<Part(Target)> read(ConfigFields& fields) const = 0;
  /// The targets of a config that names none, by the base's `model_type`; empty where the reference has none.
  virtual std::vector<std::string> default_targets(const std::string&) const { return {}; }
  /// After loaded pieces were built and placed, before their tensors are read: fills what no file holds, with
  /// the global generator left as it was found. May throw c10::Error for a config that does not fit the
  /// layers.
  virtual void complete(const Entries&) const {}
  /// After the values of these pieces were read, before the model is changed: lets the pieces take over what
  /// follows from values. Adds to the problems what no shape or type says of them.
  virtual void finish_loaded(const Entries&, Problems&) const {}

  /// Why Python cannot read these pieces, though there are keys for them, or an empty string.
  virtual std::string unreadable(const Entries& entries) const;
  /// Kinds of layers on which Python does not have the method.
  virtual std::set<std::string> unknown_layers() const { return {}; }
  /// Why Python cannot use the file on such a base, though it reads it, or an empty string.
  virtual std::string unusable(const std::string& /*model_type*/) const { return {}; }

  // Pieces that another key than `target_modules` places (LoRA's `trainable_token_indices`).

  /// True for a piece that `target_modules` places.
  virtual bool is_targeted(const Adapter::Entry&) const { return true; }
  /// The parts for the others, in a config that asks for them. `part`: what `read` returned.
  virtual std::vector<Part> further_parts(ConfigFields&, const std::function<Part(Target)>&) const {
    return {};
  }
};

inline std::string PeftFormat::unreadable(const Entries& entries) const {
  for (const auto& entry : entries) {
    if (entry.piece->site().files.kind != FileNames::Kind::layer) {
      return "'" + entry.site->path() + "' is a tensor inside a layer, where Python has no " + title();
    }
    if (const auto& layer = entry.piece->site().layer; unknown_layers().count(layer)) {
      return "'" + entry.site->path() + "' is a " + layer + ", where Python has no " + title();
    }
  }
  return {};
}

// Helpers of the rows.

/// A number as Python would write it: 16, not 16.0.
inline nlohmann::json plain_number(double value) {
  if (std::nearbyint(value) == value && std::fabs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

/// The map a config needs so that every layer gets the value it has (`rank_pattern`, `alpha_pattern`): the
/// given patterns where they say so in Python too, which sorts them; else whole paths. `wanted`: path and
/// value of each layer; `usual`: of layers no pattern matches.
template <class Value>
nlohmann::json pattern_json(const std::vector<Pattern<Value>>& given, Value usual,
                            const std::vector<std::pair<std::string, Value>>& wanted) {
  // In the order of the file, which is the order of matching.
  std::map<std::string, Value> map(given.begin(), given.end());
  const auto holds = [&] {
    const std::vector<Pattern<Value>> sorted(map.begin(), map.end());
    return std::all_of(wanted.begin(), wanted.end(), [&](const auto& layer) {
      return first_match(sorted, layer.first, usual) == layer.second;
    });
  };
  const auto spell = [&](const std::string& anchor) {
    map.clear();
    for (const auto& [path, value] : wanted) {
      if (value != usual) map.emplace(anchor.empty() ? path : anchor + escape_regex(path), value);
    }
  };
  const bool readable = std::all_of(given.begin(), given.end(),
                                    [](const auto& pattern) { return reads_alike_in_python(pattern.first); });
  if (!readable || !holds()) spell("");
  if (!holds()) spell("^");
  auto json = nlohmann::json::object();
  for (const auto& [pattern, value] : map) {
    if constexpr (std::is_floating_point_v<Value>) {
      json.emplace(pattern, plain_number(value));
    } else {
      json.emplace(pattern, value);
    }
  }
  return json;
}

}  // namespace peft::internal
