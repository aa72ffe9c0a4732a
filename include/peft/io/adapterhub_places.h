// HubPlaces: the places of a model that AdapterHub adapts, and what its keys call them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "peft/core/site.h"
#include "peft/io/adapterhub_families.h"
#include "peft/model/targets.h"

namespace peft::internal {

/// A place of a model.
struct HubPlace {
  HubRole role = HubRole::query;
  int64_t layer = -1;              ///< −1: of no layer
  std::string key;                 ///< what Python's keys of it begin with; empty, or it ends in a dot
  std::shared_ptr<SiteImpl> site;  ///< where it is here
};

/// The places of one model.
class HubPlaces {
 public:
  /// Throws c10::ValueError for a model of another family.
  HubPlaces(const std::vector<Node>& nodes, const ModelDescription& model, const char* verb) {
    std::string known;
    for (const auto& family : hub_families()) {
      known += (known.empty() ? "'" : ", '") + family.model_type + "'";
      if (family.model_type == model.model_type) family_ = &family;
    }
    TORCH_CHECK_VALUE(family_, verb, ": the model's type must be one whose AdapterHub files are known (",
                      known, "), but got '", model.model_type, "'");
    const auto found = family_->tasks.find(model.task_type);
    if (found != family_->tasks.end()) task_ = found->second;
    for (const auto& node : nodes) {
      if (node.site) add(node.site, node.path);
    }
    TORCH_CHECK_VALUE(width_ > 0 && !layers_.empty(), verb, ": the model says it is a '", model.model_type,
                      "', but has none of its layers");
  }

  const HubFamily& family() const { return *family_; }
  /// What the model is for; its class is empty where that is unknown.
  const HubTask& task() const { return task_; }
  /// transformers' class of the model: "BertForSequenceClassification"; empty: unknown.
  const std::string& model_class() const { return task_.model_class; }
  /// What the keys of the base begin with: "bert.", or nothing where the model is the base.
  const std::string& prefix() const { return prefix_; }
  int64_t width() const { return width_; }
  /// Width of the words' vectors, which Python's prompts and invertible adapters have.
  int64_t word_width() const { return word_width_ > 0 ? word_width_ : width_; }
  const std::set<int64_t>& layers() const { return layers_; }

  /// The place a site is, or nullptr.
  const HubPlace* of(const SiteImpl& site) const {
    for (const auto& place : places_) {
      if (place.site.get() == &site) return &place;
    }
    return nullptr;
  }
  /// The places of these roles, those in the layers left out left out, in the model's order.
  std::vector<HubPlace> of(const std::set<HubRole>& roles, const std::vector<int64_t>& leave_out = {}) const {
    std::vector<HubPlace> found;
    for (const auto& place : places_) {
      const bool left_out =
          place.layer >= 0 && std::find(leave_out.begin(), leave_out.end(), place.layer) != leave_out.end();
      if (roles.count(place.role) && !left_out) found.push_back(place);
    }
    return found;
  }

 private:
  void add(const std::shared_ptr<SiteImpl>& site, const std::string& path) {
    const auto& usual = family_->prefix;
    const auto prefix = path.starts_with(usual) ? usual : std::string();
    for (const auto& row : family_->rows) {
      const auto layer = layer_in(row.site, path.substr(prefix.size()));
      if (layer < -1) continue;
      prefix_ = prefix;
      std::string key = prefix + row.key;
      if (const auto at = key.find('#'); at != std::string::npos) key.replace(at, 1, std::to_string(layer));
      places_.push_back({row.role, layer, key, site});
      if (layer >= 0) layers_.insert(layer);
      if (row.role == HubRole::embeddings) width_ = site->info().width;
      if (row.role == HubRole::words) word_width_ = site->info().width;
    }
  }
  /// The layer a path has where the pattern has its #; −1: the pattern has none; −2: it is another path.
  static int64_t layer_in(const std::string& pattern, const std::string& path) {
    const auto at = pattern.find('#');
    if (at == std::string::npos) return pattern == path ? -1 : -2;
    const auto before = pattern.substr(0, at), after = pattern.substr(at + 1);
    if (!path.starts_with(before) || !path.ends_with(after) || path.size() <= before.size() + after.size())
      return -2;
    const auto number = path.substr(at, path.size() - before.size() - after.size());
    if (number.size() > 6 || number.find_first_not_of("0123456789") != std::string::npos) return -2;
    return std::stoll(number);
  }

  const HubFamily* family_ = nullptr;
  HubTask task_;
  std::string prefix_;
  std::vector<HubPlace> places_;
  std::set<int64_t> layers_;
  int64_t width_ = 0, word_width_ = 0;
};

}  // namespace peft::internal
