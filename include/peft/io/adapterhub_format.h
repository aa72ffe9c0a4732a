// HubFormat: what one method's AdapterHub files look like; a row of the table in io/adapterhub_formats.h.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/activation_function.h"
#include "peft/core/problems.h"
#include "peft/io/adapterhub_places.h"
#include "peft/io/formats/settings.h"
#include "peft/io/peft_fields.h"
#include "peft/io/peft_format.h"
#include "peft/model/add_adapter.h"

namespace peft::internal {

/// A tensor as AdapterHub's files hold it.
struct HubTensor {
  std::string key;
  std::vector<Tensor> parts;             ///< ours, stacked along the first axis
  std::vector<std::string> copies = {};  ///< further keys under which Python has the same tensor
  std::string hint = {};                 ///< why it may be missing

  HubTensor(std::string name, Tensor tensor, std::vector<std::string> again = {})
      : key(std::move(name)), parts{std::move(tensor)}, copies(std::move(again)) {}
  HubTensor(std::string name, std::vector<Tensor> stacked)
      : key(std::move(name)), parts(std::move(stacked)) {}

  std::vector<int64_t> sizes() const {
    auto sizes = parts.front().sizes().vec();
    for (size_t i = 1; i < parts.size(); ++i) sizes[0] += parts[i].size(0);
    return sizes;
  }
  Tensor tensor() const { return parts.size() == 1 ? parts.front().detach() : torch::cat(parts).detach(); }
};

/// A method where a config puts it.
struct HubPart {
  std::function<Part(Target)> make;
  std::vector<HubPlace> places;
};

/// A config, and the pieces it describes.
struct HubConfig {
  nlohmann::json json;
  Entries entries;
};

/// One kind of config: an object under "config", or one of several there in a union. What all have in common
/// is not a row's business: unknown keys, the adapter's name, prefixes, strictness. A row's class has no
/// state.
class HubFormat {
 public:
  HubFormat() = default;
  HubFormat(const HubFormat&) = delete;
  HubFormat& operator=(const HubFormat&) = delete;
  virtual ~HubFormat() = default;

  /// The method's name in messages.
  virtual std::string title() const = 0;
  /// True for a config this row reads, told by its `architecture`.
  virtual bool reads(const ConfigFields& fields) const = 0;
  /// The keys of the config, with Python's defaults.
  virtual nlohmann::json defaults() const = 0;
  /// Keys → what makes the method's pieces, and where.
  virtual std::vector<HubPart> read(ConfigFields& fields, const HubPlaces& places) const = 0;
  /// After a config was read and its pieces were built: what no file holds. `entries`: the row's pieces.
  virtual void complete(const Entries&, const HubPlaces&) const {}

  /// True for the method's pieces.
  virtual bool owns(const PieceImpl& piece) const = 0;
  /// Options → one config, or several where pieces of other settings lie at other places. `notes` takes what
  /// a user should know, `problems` why these pieces have no form on disk.
  virtual std::vector<HubConfig> write(const Entries& entries, const HubPlaces& places,
                                       std::vector<std::string>& notes, Problems& problems) const = 0;
  /// The tensors of the pieces a config describes, under their keys in the file of an adapter of this name:
  /// what is written, or what is copied into. `config`: the one that was written or read.
  virtual std::vector<HubTensor> tensors(const HubConfig& config, const HubPlaces& places,
                                         const std::string& name) const = 0;
};

// Helpers of the rows.

/// `leave_out`: indices of layers.
inline std::vector<int64_t> read_leave_out(ConfigFields& fields) {
  std::vector<int64_t> layers;
  if (!fields.has("leave_out")) return layers;
  for (const auto& item : fields.value("leave_out")) {
    if (!item.is_number_integer() || item.get<int64_t>() < 0) {
      fields.complain("leave_out", "must be a list of layers' indices");
      return {};
    }
    layers.push_back(item.get<int64_t>());
  }
  if (!fields.value("leave_out").is_array())
    fields.complain("leave_out", "must be a list of layers' indices");
  return layers;
}

/// Where pieces lie: the roles, and the layers that have none. A config can leave out whole layers only, so
/// that every layer it does not leave out must have a piece at each of the roles. A piece where AdapterHub
/// has none of its method is a problem too. `takes`: the roles that can have it.
struct HubLayout {
  std::set<HubRole> roles;
  nlohmann::json leave_out = nlohmann::json::array();

  HubLayout(const Entries& entries, const HubPlaces& places, const std::set<HubRole>& takes,
            const std::string& title, Problems& problems) {
    std::set<int64_t> adapted;
    std::set<const SiteImpl*> sites;
    for (const auto& entry : entries) {
      const auto* place = places.of(*entry.site);
      if (!place || !takes.count(place->role)) {
        problems.add("'" + entry.site->path() + "' is no place where AdapterHub has a " + title);
        continue;
      }
      roles.insert(place->role);
      adapted.insert(place->layer);
      sites.insert(entry.site.get());
    }
    for (const auto layer : places.layers()) {
      if (!adapted.count(layer)) leave_out.push_back(layer);
    }
    for (const auto& place : places.of(roles)) {
      if (adapted.count(place.layer) && !sites.count(place.site.get())) {
        problems.add("'" + place.site->path() + "' must carry the " + title +
                     " as other layers do, for AdapterHub's config leaves out whole layers only");
      }
    }
  }
};

/// `non_linearity`: the name of an activation.
inline std::string read_activation(ConfigFields& fields, const std::string& absent) {
  auto name = fields.has("non_linearity") ? fields.string("non_linearity") : absent;
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  if (activation_functions().count(name)) return name;
  std::vector<std::string> names;
  for (const auto& item : activation_functions()) names.push_back(item.first);
  fields.complain("non_linearity", "must be an activation this library has, like " + closest(name, names));
  return absent;
}

/// Refuses a value other than these.
inline std::string read_choice(ConfigFields& fields, const std::string& key, const std::string& absent,
                               const std::vector<std::string>& choices) {
  const auto found = fields.has(key) ? fields.string(key) : absent;
  if (std::find(choices.begin(), choices.end(), found) != choices.end()) return found;
  std::string text;
  for (const auto& choice : choices) text += (text.empty() ? "\"" : ", \"") + choice + "\"";
  fields.complain(key, "must be " + std::string(choices.size() > 1 ? "one of " : "") + text);
  return absent;
}

}  // namespace peft::internal
