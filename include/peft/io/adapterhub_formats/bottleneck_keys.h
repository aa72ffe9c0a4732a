// The keys of a bottleneck in AdapterHub's files.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/adapterhub_format.h"
#include "peft/methods/bottleneck_options.h"

namespace peft::internal {

/// The keys of PHM projections.
inline PhmOptions read_phm(ConfigFields& fields) {
  PhmOptions phm;
  phm.dim(fields.integer("phm_dim", 4, 1)).rank(fields.integer("phm_rank", 1, 1));
  phm.factorized_weights(fields.boolean("factorized_phm_W", true))
      .shared_weights(fields.boolean("shared_W_phm"))
      .factorized_rule(fields.boolean("factorized_phm_rule"))
      .shared_rule(fields.boolean("shared_phm_rule", true))
      .learn_rule(fields.boolean("learn_phm", true))
      .bias(fields.boolean("phm_bias", true));
  const bool uniform = read_choice(fields, "phm_c_init", "normal", {"normal", "uniform"}) == "uniform";
  phm.rule_init(uniform ? PhmRuleInit::uniform : PhmRuleInit::normal);
  phm.init_range(fields.number(
      "phm_init_range", 1e-4, [](double s) { return std::isfinite(s) && s >= 0; },
      "must be a number of at least 0"));
  return phm;
}

/// The keys of a block → its options, without its places and factors.
inline BottleneckOptions read_block(ConfigFields& fields) {
  BottleneckOptions options;
  options.non_linearity(read_activation(fields, "relu")).parallel(fields.boolean("is_parallel"));
  options.gating(fields.boolean("use_gating"));
  options.original_ln_before(fields.boolean("original_ln_before"))
      .original_ln_after(fields.boolean("original_ln_after", true))
      .ln_before(fields.boolean("ln_before"))
      .ln_after(fields.boolean("ln_after"))
      .adapter_residual_before_ln(fields.boolean("adapter_residual_before_ln"));
  options.dropout(fields.rate("dropout")).stochastic_depth(fields.rate("stochastic_depth"));
  if (fields.value("scaling").is_string()) {
    const auto kind = read_choice(fields, "scaling", "learned", {"learned", "channel"});
    options.trained_scaling(kind == "channel" ? TrainedScaling::channel : TrainedScaling::scalar);
  } else {
    options.scaling(fields.number(
        "scaling", 1.0, [](double s) { return std::isfinite(s); },
        R"(must be a finite number, "learned" or "channel")"));
  }
  if (fields.value("residual_before_ln").is_string()) {
    read_choice(fields, "residual_before_ln", "post_add", {"post_add"});
    options.residual(BottleneckResidual::sum);
  } else if (!fields.boolean("residual_before_ln", true)) {
    options.residual(BottleneckResidual::input);
  }
  const auto init = read_choice(fields, "init_weights", "bert", {"bert", "mam_adapter", "houlsby"});
  options.init_weights(init == "bert"      ? BottleneckInit::bert
                       : init == "houlsby" ? BottleneckInit::houlsby
                                           : BottleneckInit::mam_adapter);
  if (fields.has("init_weights_seed")) {
    options.init_weights_seed(fields.integer("init_weights_seed", 0, 0, std::numeric_limits<int64_t>::max()));
  }
  if (fields.boolean("phm_layer")) options.phm(read_phm(fields));
  return options;
}

/// One factor, or one a layer: {"0": 8, "default": 16}.
inline void read_factors(ConfigFields& fields, const std::vector<HubPlace>& places,
                         BottleneckOptions& options) {
  const auto& given = fields.value("reduction_factor");
  const auto fits = [](const nlohmann::ordered_json& value) {
    return value.is_number() && std::isfinite(value.get<double>()) && value.get<double>() > 0;
  };
  if (fits(given)) options.reduction_factor(given.get<double>());
  if (!fields.has("reduction_factor") || fits(given)) return;
  const std::string must = "must be a positive number, or map layers' indices and \"default\" to such";
  if (!given.is_object()) return fields.complain("reduction_factor", must);
  std::map<int64_t, double> factors;
  for (const auto& [layer, factor] : given.items()) {
    const bool is_index =
        !layer.empty() && layer.size() < 7 && layer.find_first_not_of("0123456789") == std::string::npos;
    if (!fits(factor) || (!is_index && layer != "default")) return fields.complain("reduction_factor", must);
    if (is_index) factors.emplace(std::stoll(layer), factor.get<double>());
  }
  if (given.contains("default")) options.reduction_factor(given["default"].get<double>());
  for (const auto& place : places) {
    if (given.contains("default") || factors.count(place.layer)) continue;
    return fields.complain("reduction_factor",
                           "must name layer " + std::to_string(place.layer) + " or have a \"default\"");
  }
  options.layer_factors(std::move(factors));
}

/// The reverse of `read_block`.
inline nlohmann::json write_block(const BottleneckOptions& options) {
  nlohmann::json keys{{"non_linearity", options.non_linearity()},
                      {"is_parallel", options.parallel()},
                      {"use_gating", options.gating()},
                      {"original_ln_before", options.original_ln_before()},
                      {"original_ln_after", options.original_ln_after()},
                      {"ln_before", options.ln_before()},
                      {"ln_after", options.ln_after()},
                      {"adapter_residual_before_ln", options.adapter_residual_before_ln()},
                      {"dropout", options.dropout()},
                      {"stochastic_depth", options.stochastic_depth()},
                      {"scaling", options.scaling()},
                      {"residual_before_ln", options.residual() == BottleneckResidual::output},
                      {"phm_layer", options.phm().has_value()}};
  if (options.residual() == BottleneckResidual::sum) keys["residual_before_ln"] = "post_add";
  if (options.trained_scaling() == TrainedScaling::scalar) keys["scaling"] = "learned";
  if (options.trained_scaling() == TrainedScaling::channel) keys["scaling"] = "channel";
  keys["init_weights"] = options.init_weights() == BottleneckInit::bert      ? "bert"
                         : options.init_weights() == BottleneckInit::houlsby ? "houlsby"
                                                                             : "mam_adapter";
  keys["init_weights_seed"] = nullptr;
  if (options.init_weights_seed() > 0) keys["init_weights_seed"] = options.init_weights_seed();
  if (!options.phm()) return keys;
  const auto& phm = *options.phm();
  keys.update({{"phm_dim", phm.dim()},
               {"phm_rank", phm.rank()},
               {"factorized_phm_W", phm.factorized_weights()},
               {"shared_W_phm", phm.shared_weights()},
               {"factorized_phm_rule", phm.factorized_rule()},
               {"shared_phm_rule", phm.shared_rule()},
               {"learn_phm", phm.learn_rule()},
               {"phm_bias", phm.bias()},
               {"phm_c_init", phm.rule_init() == PhmRuleInit::uniform ? "uniform" : "normal"},
               {"phm_init_range", phm.init_range()}});
  return keys;
}

}  // namespace peft::internal
