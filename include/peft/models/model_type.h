// Model types: the names that configs have for the families of this library.
#pragma once

#include "peft/core/compat.h"
#include "peft/io/config_json.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace peft::internal {

/// Each family as its types here begin, "Bert", with the `model_type` of its configs.
inline const std::vector<std::pair<std::string, std::vector<std::string>>>& model_types() {
  static const std::vector<std::pair<std::string, std::vector<std::string>>> rows{
      {"Bert", {"bert"}},
      {"Roberta", {"roberta", "xlm-roberta", "camembert"}},
      {"DebertaV2", {"deberta-v2"}},
      {"GPT2", {"gpt2"}}};
  return rows;
}

inline const std::vector<std::string>& model_types_of(const std::string& family) {
  for (const auto& [name, types] : model_types()) {
    if (name == family) return types;
  }
  TORCH_INTERNAL_ASSERT(false, "no family '", family, "'");
  return model_types().front().second;
}

/// The family that reads a `model_type`; empty: none does.
inline std::string family_name(const std::string& model_type) {
  for (const auto& [name, types] : model_types()) {
    if (std::find(types.begin(), types.end(), model_type) != types.end()) return name;
  }
  return {};
}

/// Complains of a config that is not of this family, with the type that reads it.
inline void check_model_type(ConfigReader& reader, const std::string& family) {
  const auto& types = model_types_of(family);
  const auto found = reader.string("model_type", types.front());
  const auto other = family_name(found);
  if (other == family) return;
  std::string must = "must be ";
  for (size_t i = 0; i < types.size(); ++i) {
    must += (i == 0 ? "\"" : i + 1 < types.size() ? ", \"" : " or \"") + types[i] + "\"";
  }
  reader.complain("model_type", must,
                  other.empty() ? "" : "peft::models::" + other + "Model opens this folder");
}

}  // namespace peft::internal
