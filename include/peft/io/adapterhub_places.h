// HubPlaces: the places of a model that AdapterHub adapts, and what its keys call them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/site.h"
#include "peft/model/targets.h"

namespace peft::internal {

/// What a place of a model is to AdapterHub.
enum class HubRole : std::uint8_t {
  query,
  key,
  value,
  projections,     ///< query, key and value stacked in one layer
  intermediate,    ///< the first layer of a feed-forward network
  output,          ///< its second layer
  attention_join,  ///< where the attention meets what came in: `mh_adapter`
  output_join,     ///< where the feed-forward network does: `output_adapter`
  attention,       ///< between the projections
  embeddings,      ///< what the first layer reads
};

/// A place of a model.
struct HubPlace {
  HubRole role = HubRole::query;
  int64_t layer = -1;              ///< −1: of no layer
  std::string key;                 ///< what Python's keys of it begin with; empty, or it ends in a dot
  std::shared_ptr<SiteImpl> site;  ///< where it is here
};

/// One family of models.
struct HubFamily {
  struct Row {
    HubRole role;
    const char* site;  ///< our path, # for the layer's index
    const char* key;   ///< Python's
  };
  const char* model_type;
  const char* prefix;                          ///< of the base inside a model with a head
  std::map<std::string, std::string> classes;  ///< transformers' class by task type
  std::string flexible_class;                  ///< the library's own class, which takes any head
  bool has_prompts;                            ///< Python's models take prompts
  std::vector<Row> rows;
};

/// The families whose files are known, our paths and Python's without the prefix.
inline const std::vector<HubFamily>& hub_families() {
  using R = HubRole;
  static const std::vector<HubFamily> families{
      {"bert",
       "bert.",
       {{"SEQ_CLS", "BertForSequenceClassification"},
        {"TOKEN_CLS", "BertForTokenClassification"},
        {"FEATURE_EXTRACTION", "BertModel"}},
       "BertAdapterModel",
       true,
       {{R::query, "encoder.layer.#.attention.self.query", "encoder.layer.#.attention.self.query."},
        {R::key, "encoder.layer.#.attention.self.key", "encoder.layer.#.attention.self.key."},
        {R::value, "encoder.layer.#.attention.self.value", "encoder.layer.#.attention.self.value."},
        {R::intermediate, "encoder.layer.#.intermediate.dense", "encoder.layer.#.intermediate.dense."},
        {R::output, "encoder.layer.#.output.dense", "encoder.layer.#.output.dense."},
        {R::attention_join, "encoder.layer.#.attention.output.LayerNorm",
         "encoder.layer.#.attention.output."},
        {R::output_join, "encoder.layer.#.output.LayerNorm", "encoder.layer.#.output."},
        {R::attention, "encoder.layer.#.attention.self.attention", "encoder.layer.#.attention.self."},
        {R::embeddings, "embeddings.output", ""}}},
      {"gpt2",
       "transformer.",
       {{"CAUSAL_LM", "GPT2LMHeadModel"}, {"FEATURE_EXTRACTION", "GPT2Model"}},
       "GPT2AdapterModel",
       false,
       {{R::projections, "h.#.attn.c_attn", "h.#.attn.c_attn."},
        {R::intermediate, "h.#.mlp.c_fc", "h.#.mlp.c_fc."},
        {R::output, "h.#.mlp.c_proj", "h.#.mlp.c_proj."},
        {R::attention_join, "h.#.attn_residual", "h.#.attention_adapters."},
        {R::output_join, "h.#.mlp_residual", "h.#.output_adapters."},
        {R::attention, "h.#.attn.attention", "h.#.attn."},
        {R::embeddings, "output", ""}}},
  };
  return families;
}

/// The places of one model.
class HubPlaces {
 public:
  /// Throws c10::ValueError for a model of another family.
  HubPlaces(const std::vector<Node>& nodes, const ModelDescription& model, const char* verb) {
    std::string known;
    for (const auto& family : hub_families()) {
      known += (known.empty() ? "'" : ", '") + std::string(family.model_type) + "'";
      if (family.model_type == model.model_type) family_ = &family;
    }
    TORCH_CHECK_VALUE(family_, verb, ": the model's type must be one whose AdapterHub files are known (",
                      known, "), but got '", model.model_type, "'");
    const auto found = family_->classes.find(model.task_type);
    if (found != family_->classes.end()) model_class_ = found->second;
    for (const auto& node : nodes) {
      if (node.site) add(node.site, node.path);
    }
    TORCH_CHECK_VALUE(width_ > 0 && !layers_.empty(), verb, ": the model says it is a '", model.model_type,
                      "', but has none of its layers");
  }

  const HubFamily& family() const { return *family_; }
  /// transformers' class of the model: "BertForSequenceClassification"; empty: unknown.
  const std::string& model_class() const { return model_class_; }
  /// What the keys of the base begin with: "bert.", or nothing where the model is the base.
  const std::string& prefix() const { return prefix_; }
  int64_t width() const { return width_; }
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
    const std::string usual = family_->prefix;
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
  std::string model_class_, prefix_;
  std::vector<HubPlace> places_;
  std::set<int64_t> layers_;
  int64_t width_ = 0;
};

}  // namespace peft::internal
