// The parts of the methods that train entries, rows or layers of the base, and the choice of the entries from
// the data.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "method_parts.h"
#include "method_values.h"
#include "peft/methods/fish.h"
#include "peft/methods/hifi.h"
#include "peft/model/selective_targets.h"

namespace finetune::internal {

/// The targets of a mask: every layer but those with a copy of their own, where none are named.
inline std::vector<peft::Part> masked_parts(const MethodValues& values, const Place& place,
                                            const std::vector<std::string>& never = {}) {
  if (!place.targets.empty()) return {peft::on(peft::MaskedOptions(), adapted(values, place))};
  auto exclude = values.list("exclude");
  exclude.insert(exclude.end(), place.saved.begin(), place.saved.end());
  exclude.insert(exclude.end(), never.begin(), never.end());
  return {peft::on(peft::MaskedOptions(), peft::all().exclude(exclude))};
}

inline peft::FishOptions fish_options(const MethodValues& values) {
  return peft::FishOptions(values.number("ratio", 0.002)).training(values.boolean("training", true));
}
inline peft::MagnitudeOptions magnitude_options(const MethodValues& values) {
  return peft::MagnitudeOptions(values.number("ratio", 0.002))
      .smallest(values.boolean("smallest", false))
      .per_layer(values.boolean("per_layer", false));
}
inline peft::HifiOptions hifi_options(const MethodValues& values) {
  peft::HifiOptions options(values.integer("heads", 3));
  options.per_layer(values.boolean("per_layer", options.per_layer()))
      .energy(values.number("energy", options.energy()))
      .damping(values.number("damping", options.damping()))
      .samples(values.integer("samples", options.samples()))
      .whole_outputs(values.boolean("whole_outputs", options.whole_outputs()))
      .restart_by_information(values.boolean("restart_by_information", options.restart_by_information()));
  peft::internal::check_hifi(options);
  return options;
}
/// A number of at least 1.
inline int64_t positive(const MethodValues& values, const char* key, int64_t absent) {
  const auto value = values.integer(key, absent);
  TORCH_CHECK_VALUE(value >= 1, key, " must be at least 1, but got ", value);
  return value;
}
inline void check_ratio(double ratio) {
  TORCH_CHECK_VALUE(ratio > 0 && ratio <= 1, "ratio must be in (0, 1], but got ", ratio);
}

inline std::vector<peft::Part> fish_parts(const MethodValues& values, const Place& place) {
  check_ratio(fish_options(values).ratio());
  positive(values, "examples", 1);
  return masked_parts(values, place);
}
inline std::vector<peft::Part> magnitude_parts(const MethodValues& values, const Place& place) {
  check_ratio(magnitude_options(values).ratio());
  return masked_parts(values, place);
}
inline std::vector<peft::Part> rand_uniform_parts(const MethodValues& values, const Place& place) {
  positive(values, "count", 1);
  return masked_parts(values, place);
}
inline std::vector<peft::Part> rand_row_col_parts(const MethodValues& values, const Place& place) {
  return masked_parts(values, place, {"embeddings"});
}
inline std::vector<peft::Part> hifi_parts(const MethodValues& values, const Place& place) {
  hifi_options(values);
  return {peft::on(peft::RowsOptions(), adapted(values, place))};
}
inline std::vector<peft::Part> top_layers_parts(const MethodValues& values, const Place& place) {
  const auto target = peft::top_layers(values.integer("k", 1), values.boolean("final_norm", true));
  return {peft::on(peft::ReplaceOptions(), target.exclude(place.saved))};
}

/// BitFit's terms, by the author's names.
inline std::vector<peft::BitFitTerm> bitfit_terms(const MethodValues& values) {
  using enum peft::BitFitTerm;
  std::vector<peft::BitFitTerm> terms;
  for (const auto& name : values.list("terms")) {
    for (const auto term :
         {all, query, key, value, intermediate, output, output_layernorm, attention_layernorm}) {
      if (name == peft::to_string(term)) terms.push_back(term);
    }
    TORCH_CHECK_VALUE(!terms.empty() && name == peft::to_string(terms.back()),
                      "terms must be of all, query, key, value, intermediate, output, output_layernorm, "
                      "attention_layernorm, but got '",
                      name, "'");
  }
  return terms;
}

inline std::vector<peft::Part> bitfit_parts(const MethodValues& values, const Place& place) {
  auto names = values.list("biases");
  if (names.empty()) names = place.targets;
  const auto kinds = values.list("kinds");
  const auto terms = bitfit_terms(values);
  auto target = peft::all();
  if ((values.has("biases") && values.has("targets")) ||
      !names.empty() + !kinds.empty() + !terms.empty() > 1) {
    throw std::runtime_error("--method bitfit: expected biases, kinds, terms or targets, but got several");
  }
  if (!names.empty()) {
    target = target_of(names, place);
  } else if (!terms.empty()) {
    target = peft::bitfit(terms);
  } else if (!kinds.empty()) {
    target = peft::where([kinds](const peft::SiteInfo& site) {
      return std::find(kinds.begin(), kinds.end(), site.layer) != kinds.end();
    });
  }
  return {peft::on(peft::BiasOptions(), target.exclude(place.saved))};
}

}  // namespace finetune::internal
