// The parts of each method of the program, from its keys: a further method is one function here and one row
// in `method_table`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "method_values.h"
#include "peft/methods/adalora.h"
#include "peft/methods/bias.h"
#include "peft/methods/boft.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/compacter.h"
#include "peft/methods/dora.h"
#include "peft/methods/ia3.h"
#include "peft/methods/increlora.h"
#include "peft/methods/layer_norm_tuning.h"
#include "peft/methods/loha.h"
#include "peft/methods/lokr.h"
#include "peft/methods/lora.h"
#include "peft/methods/oft.h"
#include "peft/methods/p_tuning.h"
#include "peft/methods/prefix.h"
#include "peft/methods/prompt.h"
#include "peft/methods/replace.h"
#include "peft/methods/trainable_tokens.h"
#include "peft/methods/vera.h"
#include "peft/model/add_adapter.h"
#include "peft/model/unified.h"

namespace finetune {

/// Where a method goes: what the program knows beside the method's own keys.
struct Place {
  std::vector<std::string>
      targets;       ///< of `targets=`, else `--targets`, else the method's default; may be empty
  std::string head;  ///< path of the task head in the model, or empty where it lies outside
  std::vector<std::string> saved;  ///< layers that train as a copy of their own, the head among them
  int64_t steps = 0;               ///< of the whole run; 0 where the data that says so is not read yet
};

namespace internal {

/// A target from a list of names: `all-linear`, one regular expression between slashes, or last path
/// segments.
inline peft::Target target_of(const std::vector<std::string>& names, const Place& place) {
  if (names.size() == 1 && names[0] == "all-linear") {
    return peft::where([](const peft::SiteInfo& site) { return site.layer == "Linear"; })
        .exclude(place.saved);
  }
  if (names.size() == 1 && names[0].size() > 2 && names[0].starts_with('/') && names[0].ends_with('/')) {
    return peft::matching(names[0].substr(1, names[0].size() - 2));
  }
  return peft::named(names);
}

/// The layers of a method with the keys `targets`, `exclude` and `layers`. A layer with a copy of its own is
/// not adapted as well, as in Hugging Face's peft.
inline peft::Target adapted(const MethodValues& values, const Place& place) {
  auto target = target_of(place.targets, place);
  auto exclude = values.list("exclude");
  for (const auto& name : place.saved) {
    const bool aimed_at = std::find(place.targets.begin(), place.targets.end(), name) != place.targets.end();
    if (aimed_at || target.predicate()) exclude.push_back(name);
  }
  if (!exclude.empty()) target = target.exclude(exclude);
  if (values.has("layers")) target = target.layers(values.integers("layers"));
  return target;
}

inline peft::LoraOptions lora_options(const MethodValues& values) {
  using peft::LoraInit;
  std::vector<std::pair<std::string, LoraInit>> starts;
  for (const auto init : {LoraInit::kaiming, LoraInit::gaussian, LoraInit::random, LoraInit::pissa,
                          LoraInit::pissa_niter, LoraInit::olora, LoraInit::orthogonal, LoraInit::mica,
                          LoraInit::loftq, LoraInit::eva, LoraInit::corda, LoraInit::lora_ga}) {
    starts.emplace_back(peft::to_string(init), init);
  }
  peft::LoraOptions options(values.integer("rank", 8));
  options.alpha(values.number("alpha", options.alpha()))
      .dropout(values.number("dropout", 0.0))
      .rslora(values.boolean("rslora", false))
      .lora_bias(values.boolean("lora_bias", false))
      .init(values.choice("init", starts, LoraInit::kaiming))
      .niter(values.integer("niter", options.niter()))
      .loftq_bits(values.integer("loftq_bits", options.loftq_bits()))
      .loftq_iter(values.integer("loftq_iter", options.loftq_iter()))
      .rank_pattern(values.patterns<int64_t>("rank_pattern"))
      .alpha_pattern(values.patterns<double>("alpha_pattern"))
      .enable(values.booleans("enable"));
  return options;
}

inline std::vector<peft::Part> lora_parts(const MethodValues& values, const Place& place) {
  enum class Biases { none, all, lora_only };
  const auto target = adapted(values, place);
  std::vector<peft::Part> parts{peft::on(lora_options(values), target)};
  const auto biases = values.choice<Biases>(
      "bias", {{"none", Biases::none}, {"all", Biases::all}, {"lora_only", Biases::lora_only}}, Biases::none);
  if (biases == Biases::lora_only) parts.push_back(peft::on(peft::BiasOptions(), target));
  if (biases == Biases::all) parts.push_back(peft::on(peft::BiasOptions(), peft::all().exclude(place.saved)));
  return parts;
}

/// `feedforward`: of the targets, those that scale their input; without it, of the default ones
/// `output.dense`.
inline std::vector<peft::Part> ia3_parts(const MethodValues& values, const Place& place) {
  const auto is_target = [&](const std::string& name) {
    return std::find(place.targets.begin(), place.targets.end(), name) != place.targets.end();
  };
  peft::Ia3Options options;
  if (values.has("feedforward")) {
    options.feedforward(values.list("feedforward"));
    for (const auto& name : options.feedforward()) {
      if (is_target(name)) continue;
      throw std::runtime_error("--method ia3: feedforward must name some of the targets, but got '" + name +
                               "'; nearest: " + peft::internal::closest(name, place.targets, 1));
    }
  } else if (is_target("output.dense")) {
    options.feedforward({"output.dense"});
  }
  return {peft::on(options, adapted(values, place))};
}

inline std::vector<peft::Part> layer_norm_parts(const MethodValues& values, const Place& place) {
  return {peft::on(peft::LayerNormTuningOptions(), adapted(values, place))};
}

inline std::vector<peft::Part> full_parts(const MethodValues&, const Place& place) {
  const auto target = place.targets.empty() ? peft::all() : target_of(place.targets, place);
  return {peft::on(peft::ReplaceOptions(), target.exclude(place.saved))};
}

/// Without its own keys the schedule is a part of the run's steps: ranks go from a tenth to seven tenths of
/// them, at some fifty times.
inline std::vector<peft::Part> adalora_parts(const MethodValues& values, const Place& place) {
  const auto steps = values.integer("total_step", place.steps);
  const auto tinit = values.integer("tinit", steps / 10);
  const auto most_final = std::max<int64_t>(0, steps - tinit - 1);
  const auto tfinal = values.integer("tfinal", std::min(std::max<int64_t>(1, steps * 3 / 10), most_final));
  // Before the steps are known, so many that only the other options are checked.
  const bool known = values.has("total_step") || place.steps > 0;
  peft::AdaLoraOptions options(known ? steps : tinit + tfinal + 1);
  options.init_rank(values.integer("init_rank", options.init_rank()))
      .target_rank(values.integer("target_rank", options.target_rank()))
      .tinit(tinit)
      .tfinal(tfinal)
      .delta_t(values.integer("delta_t", std::max<int64_t>(1, steps / 50)))
      .beta1(values.number("beta1", options.beta1()))
      .beta2(values.number("beta2", options.beta2()))
      .orth_reg_weight(values.number("orth_reg_weight", options.orth_reg_weight()))
      .alpha(values.number("alpha", options.alpha()))
      .dropout(values.number("dropout", 0.0));
  return {peft::on(options, adapted(values, place))};
}

/// Without its own keys the layers may grow at some forty times of the run, by 1, which meets every target.
inline std::vector<peft::Part> increlora_parts(const MethodValues& values, const Place& place) {
  const auto interval = std::max<int64_t>(1, place.steps / 40);
  peft::IncreLoraOptions options(values.integer("target_rank", 8));
  options.rank(values.integer("rank", options.rank()))
      .alpha(values.number("alpha", options.alpha()))
      .dropout(values.number("dropout", 0.0))
      .top_h(values.integer("top_h", options.top_h()))
      .incre_rank_num(values.integer("incre_rank_num", 1))
      .init_warmup(values.integer("init_warmup", place.steps / 20))
      .incre_interval(values.integer("incre_interval", interval))
      .advance_learn(values.boolean("advance_learn", options.advance_learn()))
      .multi_lr(values.boolean("multi_lr", options.multi_lr()))
      .reg_orth_coef(values.number("reg_orth_coef", 0.1))
      .couple_chunks(values.boolean("couple_chunks", options.couple_chunks()))
      .beta1(values.number("beta1", options.beta1()))
      .beta2(values.number("beta2", options.beta2()))
      .adapt_positions(values.boolean("adapt_positions", options.adapt_positions()));
  if (values.has("target_total_rank")) options.target_total_rank(values.integer("target_total_rank", 0));
  return {peft::on(options, adapted(values, place))};
}

inline std::vector<peft::Part> dora_parts(const MethodValues& values, const Place& place) {
  return {peft::on(peft::DoraOptions(lora_options(values)), adapted(values, place))};
}

inline std::vector<peft::Part> loha_parts(const MethodValues& values, const Place& place) {
  peft::LohaOptions options(values.integer("rank", 8));
  options.alpha(values.number("alpha", options.alpha()))
      .rank_dropout(values.number("rank_dropout", 0.0))
      .module_dropout(values.number("module_dropout", 0.0))
      .rank_pattern(values.patterns<int64_t>("rank_pattern"))
      .alpha_pattern(values.patterns<double>("alpha_pattern"));
  return {peft::on(options, adapted(values, place))};
}

inline std::vector<peft::Part> lokr_parts(const MethodValues& values, const Place& place) {
  peft::LokrOptions options(values.integer("rank", 8));
  options.alpha(values.number("alpha", options.alpha()))
      .rank_dropout(values.number("rank_dropout", 0.0))
      .rank_dropout_scale(values.boolean("rank_dropout_scale", false))
      .module_dropout(values.number("module_dropout", 0.0))
      .decompose_both(values.boolean("decompose_both", false))
      .decompose_factor(values.integer("decompose_factor", options.decompose_factor()))
      .rank_pattern(values.patterns<int64_t>("rank_pattern"))
      .alpha_pattern(values.patterns<double>("alpha_pattern"));
  return {peft::on(options, adapted(values, place))};
}

inline std::vector<peft::Part> vera_parts(const MethodValues& values, const Place& place) {
  peft::VeraOptions options(values.integer("rank", 256));
  options.projection_prng_key(values.integer("projection_prng_key", options.projection_prng_key()))
      .save_projection(values.boolean("save_projection", options.save_projection()))
      .dropout(values.number("dropout", 0.0))
      .d_initial(values.number("d_initial", options.d_initial()));
  return {peft::on(options, adapted(values, place))};
}

inline std::vector<peft::Part> oft_parts(const MethodValues& values, const Place& place) {
  peft::OftOptions options(values.integer("block_size", values.has("blocks") ? 0 : 32));
  options.blocks(values.integer("blocks", 0))
      .block_share(values.boolean("block_share", false))
      .module_dropout(values.number("module_dropout", 0.0))
      .coft(values.boolean("coft", false))
      .eps(values.number("eps", options.eps()))
      .cayley_neumann(values.boolean("cayley_neumann", options.cayley_neumann()))
      .neumann_terms(values.integer("neumann_terms", options.neumann_terms()));
  return {peft::on(options, adapted(values, place))};
}

inline std::vector<peft::Part> boft_parts(const MethodValues& values, const Place& place) {
  peft::BoftOptions options(values.integer("block_size", values.has("block_num") ? 0 : 4));
  options.block_num(values.integer("block_num", 0))
      .butterfly_factors(values.integer("butterfly_factors", options.butterfly_factors()))
      .dropout(values.number("dropout", 0.0));
  return {peft::on(options, adapted(values, place))};
}

/// A named configuration of bottlenecks, with the keys' changes.
inline std::vector<peft::Part> bottleneck_parts(peft::BottleneckOptions options, const MethodValues& values) {
  using peft::JoinRole;
  using peft::TrainedScaling;
  options.reduction_factor(values.number("reduction_factor", options.reduction_factor()))
      .size(values.integer("size", options.size()))
      .scaling(values.number("scaling", options.scaling()))
      .gating(values.boolean("gating", options.gating()))
      .ln_before(values.boolean("ln_before", options.ln_before()))
      .ln_after(values.boolean("ln_after", options.ln_after()))
      .dropout(values.number("dropout", options.dropout()))
      .hidden_dropout(values.number("hidden_dropout", options.hidden_dropout()))
      .stochastic_depth(values.number("stochastic_depth", options.stochastic_depth()))
      .leave_out(values.integers("leave_out"));
  if (values.has("non_linearity")) options.non_linearity(values.text("non_linearity"));
  if (values.has("places")) {
    options.places(
        values.choice<std::vector<JoinRole>>("places",
                                             {{"attention", {JoinRole::attention}},
                                              {"feed_forward", {JoinRole::feed_forward}},
                                              {"both", {JoinRole::attention, JoinRole::feed_forward}}},
                                             {}));
  }
  if (auto phm = options.phm()) {
    phm->dim(values.integer("phm_dim", phm->dim())).rank(values.integer("phm_rank", phm->rank()));
    options.phm(phm);
  }
  return {peft::on(options)};
}

inline std::vector<peft::Part> prompt_tuning_parts(const MethodValues& values, const Place&) {
  using peft::PromptInit;
  peft::PromptOptions options(values.integer("virtual_tokens", 20));
  const auto absent = values.has("tokens") ? PromptInit::tokens : PromptInit::normal;
  options
      .init(values.choice<PromptInit>("init",
                                      {{"normal", PromptInit::normal},
                                       {"uniform", PromptInit::uniform},
                                       {"vocabulary", PromptInit::vocabulary},
                                       {"tokens", PromptInit::tokens}},
                                      absent))
      .scale(values.number("scale", options.scale()))
      .sample_from(values.integer("sample_from", options.sample_from()))
      .tokens(values.integers("tokens"));
  return {peft::on(options, peft::all())};
}

inline std::vector<peft::Part> prefix_of(peft::PrefixOptions options, const MethodValues& values) {
  using peft::PrefixInit;
  options.length(values.integer("length", options.length()))
      .projection(values.boolean("projection", options.projection()))
      .hidden_width(values.integer("hidden_width", options.hidden_width()))
      .vector_width(values.integer("vector_width", options.vector_width()))
      .init(values.choice<PrefixInit>(
          "init", {{"normal", PrefixInit::normal}, {"small", PrefixInit::small}, {"zero", PrefixInit::zero}},
          options.init()))
      .dropout(values.number("dropout", options.dropout()))
      .gates(values.integer("gates", options.gates()))
      .shift_positions(values.boolean("shift_positions", options.shift_positions()))
      .leave_out(values.integers("leave_out"));
  if (values.has("activation")) options.activation(values.text("activation"));
  return {peft::on(options)};
}

inline std::vector<peft::Part> prefix_parts(const MethodValues& values, const Place&) {
  return prefix_of(peft::PrefixOptions(20), values);
}

inline std::vector<peft::Part> p_tuning_v2_parts(const MethodValues& values, const Place&) {
  return prefix_of(peft::PrefixOptions::p_tuning_v2(20), values);
}

inline std::vector<peft::Part> mam_parts(const MethodValues& values, const Place&) {
  return peft::mam(values.integer("length", 30), values.integer("size", 0));
}

inline std::vector<peft::Part> unipelt_parts(const MethodValues& values, const Place& place) {
  return peft::unipelt(values.integer("length", 10), values.integer("rank", 8), adapted(values, place));
}

inline std::vector<peft::Part> p_tuning_parts(const MethodValues& values, const Place&) {
  using peft::PromptEncoderKind;
  peft::PTuningOptions options(values.integer("virtual_tokens", 20));
  options
      .encoder(values.choice<PromptEncoderKind>(
          "encoder", {{"mlp", PromptEncoderKind::mlp}, {"lstm", PromptEncoderKind::lstm}},
          PromptEncoderKind::mlp))
      .hidden_size(values.integer("hidden_size", options.hidden_size()))
      .layers(values.integer("lstm_layers", options.layers()))
      .dropout(values.number("dropout", 0.0));
  return {peft::on(options, peft::all())};
}

inline std::vector<peft::Part> trainable_tokens_parts(const MethodValues& values, const Place& place) {
  return {peft::on(peft::TrainableTokensOptions(values.integers("indices")), adapted(values, place))};
}

}  // namespace internal

}  // namespace finetune
