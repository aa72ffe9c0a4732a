// Formats of masks and rows: this library's own, for Python has no such methods.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/peft_format.h"
#include "peft/methods/masked.h"
#include "peft/methods/rows.h"

namespace peft::internal {

/// A map from layers' paths to what `fits`; what is wrong is complained about under `key`.
template <class Value, class Fits>
std::map<std::string, Value> read_by_path(ConfigFields& fields, const char* key, const std::string& must,
                                          const Fits& fits) {
  std::map<std::string, Value> found;
  const auto& map = fields.value(key);
  bool good = map.is_object() && !map.empty();
  for (const auto& item : map.items()) {
    good = good && fits(item.value());
    if (good) found.emplace(item.key(), item.value().template get<Value>());
  }
  if (!good) fields.complain(key, must);
  return found;
}

/// The layer's entry in such a map, or a problem of that layer.
template <class Value>
const Value& at_path(const std::map<std::string, Value>& map, const SiteInfo& site, const char* key) {
  const auto found = map.find(site.path);
  TORCH_CHECK_VALUE(found != map.end(), "adapter_config.json: '", key, "' must name it");
  return found->second;
}

/// Masks: `entries` says how many of each layer, the file their values and indices.
class MaskedFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "MASKED"; }
  std::string title() const override { return "mask"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({"entries": {}, "modules_to_save": null, "target_modules": null})");
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const MaskedImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& masked = static_cast<const MaskedImpl&>(piece);
    const auto entries = elements(masked.site().weight_shape) + elements(masked.site().bias_shape);
    const auto type = entries <= std::numeric_limits<int32_t>::max() ? torch::kInt : torch::kLong;
    return {{"masked_values", masked.values}, {"masked_indices", masked.indices.to(type)}};
  }
  std::vector<DiskTensor> loaded_tensors(const PieceImpl& piece) const override {
    const auto& masked = static_cast<const MaskedImpl&>(piece);
    return {{"masked_values", masked.values}, {"masked_indices", masked.indices}};
  }
  void finish_loaded(const Entries& entries, Problems& problems) const override {
    for (const auto& entry : entries) {
      auto& masked = static_cast<MaskedImpl&>(*entry.piece);
      const auto settings = MaskedOptions().indices(masked.indices.cpu());
      try {
        check(settings);
        const auto why = refusal(settings, masked.site());
        if (!why.empty()) problems.add("'" + entry.site->path() + "': " + why);
      } catch (const c10::Error& error) {
        problems.add("'" + entry.site->path() + "': " + error.what_without_backtrace());
      }
      masked.options = settings;
      masked.count_weight();
    }
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>&,
             Problems& problems) const override {
    for (const auto& entry : entries) {
      const auto count = static_cast<const MaskedImpl&>(*entry.piece).values.size(0);
      if (count == 0) problems.add("'" + entry.site->path() + "': its mask is not chosen yet");
      json["entries"][entry.site->path()] = count;
    }
  }
  std::function<Part(Target)> read(ConfigFields& fields) const override {
    const auto fits = [](const auto& value) {
      return value.is_number_integer() && value.template get<int64_t>() > 0;
    };
    const auto counts = read_by_path<int64_t>(
        fields, "entries", "must map layers to the numbers of their entries, at least 1", fits);
    return [counts](Target target) {
      auto part = on(MaskedOptions(), std::move(target));
      part.make = [counts](const SiteInfo& site) -> std::shared_ptr<PieceImpl> {
        const auto count = at_path(counts, site, "entries");
        const auto all = elements(site.weight_shape) + elements(site.bias_shape);
        TORCH_CHECK_VALUE(count <= all, "adapter_config.json: 'entries' must be at most its ", all,
                          ", but got ", count);
        return make_piece(MaskedOptions().indices(torch::arange(count)), site);
      };
      return part;
    };
  }
  std::string unreadable(const Entries&) const override { return "Python has no masks"; }
};

/// Rows: `rows` says which of each layer, as runs [first, number].
class RowsFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "ROWS"; }
  std::string title() const override { return "choice of rows"; }
  nlohmann::json defaults() const override {
    return nlohmann::json::parse(R"({"modules_to_save": null, "rows": {}, "target_modules": null})");
  }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const RowsImpl*>(&piece) != nullptr;
  }
  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& rows = static_cast<const RowsImpl&>(piece);
    std::vector<DiskTensor> tensors{{"rows.weight", rows.weight}};
    if (rows.bias.defined()) tensors.push_back({"rows.bias", rows.bias});
    return tensors;
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>&,
             Problems& problems) const override {
    for (const auto& entry : entries) {
      const auto rows = static_cast<const RowsImpl&>(*entry.piece).indices.to(torch::kCPU);
      if (rows.size(0) == 0) problems.add("'" + entry.site->path() + "': its rows are not chosen yet");
      std::vector<Run> runs;
      for (int64_t i = 0; i < rows.size(0); ++i) {
        const auto row = rows[i].item<int64_t>();
        if (runs.empty() || row != runs.back().first + runs.back().second) runs.emplace_back(row, 0);
        ++runs.back().second;
      }
      json["rows"][entry.site->path()] = runs;
    }
  }
  std::function<Part(Target)> read(ConfigFields& fields) const override {
    const auto fits = [](const auto& runs) {
      constexpr int64_t most = std::numeric_limits<int32_t>::max();
      int64_t least = 0;
      bool good = runs.is_array() && !runs.empty();
      for (const auto& run : runs) {
        good = good && run.is_array() && run.size() == 2 && run[0].is_number_integer() &&
               run[1].is_number_integer() && run[0] >= least && run[0] <= most && run[1] > 0 &&
               run[1] <= most;
        if (good) least = run[0].template get<int64_t>() + run[1].template get<int64_t>();
      }
      return good;
    };
    const auto runs = read_by_path<std::vector<Run>>(
        fields, "rows", "must map layers to ascending runs [first row, number of rows]", fits);
    return [runs](Target target) {
      auto part = on(RowsOptions(), std::move(target));
      part.make = [runs](const SiteInfo& site) -> std::shared_ptr<PieceImpl> {
        std::vector<int64_t> rows;
        for (const auto& [first, number] : at_path(runs, site, "rows")) {
          const auto outputs = site.weight_shape.at(site.fan_in_fan_out ? 1 : 0);
          TORCH_CHECK_VALUE(first + number <= outputs, "adapter_config.json: 'rows' must be below its ",
                            outputs, " outputs, but got ", first + number - 1);
          for (int64_t i = 0; i < number; ++i) rows.push_back(first + i);
        }
        return make_piece(RowsOptions().rows(rows), site);
      };
      return part;
    };
  }
  std::string unreadable(const Entries&) const override { return "Python trains no single rows of layers"; }

 private:
  using Run = std::pair<int64_t, int64_t>;
};

}  // namespace peft::internal
