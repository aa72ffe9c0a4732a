// The parts of each method of the program, from its keys: a further method is one function here and one row
// in `method_table`.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "method_values.h"
#include "peft/io/adapterhub.h"
#include "peft/io/peft_tensors.h"
#include "peft/io/safetensors.h"
#include "peft/methods/adalora.h"
#include "peft/methods/bias.h"
#include "peft/methods/boft.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/compacter.h"
#include "peft/methods/dora.h"
#include "peft/methods/fusion.h"
#include "peft/methods/ia3.h"
#include "peft/methods/increlora.h"
#include "peft/methods/layer_norm_tuning.h"
#include "peft/methods/loha.h"
#include "peft/methods/lokr.h"
#include "peft/methods/lora.h"
#include "peft/methods/multitask_prompt.h"
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
  int64_t tasks = 1;               ///< of the data
};

namespace internal {

/// A target from a list of names: `all-linear`, one regular expression between slashes, or last path
/// segments.
inline peft::Target target_of(const std::vector<std::string>& names, const Place& place) {
  if (names.size() == 1 && names[0] == "all-linear") {
    return peft::where([](const peft::SiteInfo& site) { return site.layer == "Linear"; })
        .exclude(place.saved);
  }
  // What parted the names may have parted an expression, "a{1,2}".
  const auto whole = fmt::format("{}", fmt::join(names, ","));
  if (whole.size() > 2 && whole.starts_with('/') && whole.ends_with('/'))
    return peft::matching(whole.substr(1, whole.size() - 2));
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

/// How a prompt begins; of a multitask prompt also what it takes over.
struct PromptStart {
  peft::PromptInit init = peft::PromptInit::normal;
  peft::MultitaskSource source = peft::MultitaskSource::none;
};

/// `init=`, with these words beside those of every prompt.
inline PromptStart prompt_start(const MethodValues& values,
                                std::vector<std::pair<std::string, PromptStart>> words = {}) {
  using peft::PromptInit;
  words.insert(words.begin(), {{"normal", {}},
                               {"uniform", {PromptInit::uniform}},
                               {"vocabulary", {PromptInit::vocabulary}},
                               {"tokens", {PromptInit::tokens}}});
  const PromptStart absent{values.has("tokens") ? PromptInit::tokens : PromptInit::normal};
  return values.choice<PromptStart>("init", words, absent);
}

/// `length`: without a key for it.
inline peft::PromptOptions prompt_options(const MethodValues& values, peft::PromptInit init, int64_t length) {
  peft::PromptOptions options(values.integer("virtual_tokens", length));
  options.init(init)
      .scale(values.number("scale", options.scale()))
      .sample_from(values.integer("sample_from", options.sample_from()))
      .tokens(values.integers("tokens"));
  return options;
}

inline std::vector<peft::Part> prompt_tuning_parts(const MethodValues& values, const Place&) {
  return {peft::on(prompt_options(values, prompt_start(values).init, 20), peft::all())};
}

/// Length and rank are those of `source=`, if there is one.
inline std::vector<peft::Part> multitask_prompt_parts(const MethodValues& values, const Place& place) {
  using peft::MultitaskSource;
  const auto start = prompt_start(values, {{"average_source_tasks", {{}, MultitaskSource::average}},
                                           {"exact_source_task", {{}, MultitaskSource::exact}},
                                           {"only_source_shared", {{}, MultitaskSource::shared}}});
  if ((start.source != MultitaskSource::none) != values.has("source")) {
    throw std::runtime_error(
        "--method multitask_prompt: source=FOLDER must be given with init=average_source_tasks, "
        "exact_source_task or only_source_shared, and only there");
  }
  if (values.has("source_task") && start.source != MultitaskSource::exact) {
    throw std::runtime_error(
        "--method multitask_prompt: source_task must be given with init=exact_source_task only");
  }
  std::map<std::string, torch::Tensor> tensors;
  int64_t length = 20, rank = 1;
  if (values.has("source")) {
    tensors = peft::load_safetensors(std::filesystem::path(values.text("source")) /
                                     peft::internal::tensor_file_name);
    const auto shared = tensors.find("prompt_embeddings"), columns = tensors.find("prefix_task_cols");
    if (shared != tensors.end() && shared->second.dim() == 2) length = shared->second.size(0);
    if (columns != tensors.end() && columns->second.dim() == 3) rank = columns->second.size(2);
  }
  peft::MultitaskPromptOptions options(prompt_options(values, start.init, length), place.tasks);
  options.rank(values.integer("rank", rank))
      .source(start.source)
      .source_tensors(std::move(tensors))
      .source_task(values.integer("source_task", 0));
  peft::check(options);
  return {peft::on(options, peft::all())};
}

/// A fusion of the adapters in the folders of `adapters=`, which the model is to have under their folders'
/// names.
inline peft::FusionOptions fusion_options(const MethodValues& values) {
  const auto folders = values.list("adapters");
  if (folders.size() < 2) {
    throw std::runtime_error(fmt::format(
        "--method fusion: adapters must be at least two folders, [A,B,…], but got {}", folders.size()));
  }
  std::vector<std::string> names;
  for (const auto& folder : folders) {
    if (!peft::is_adapterhub(folder)) {
      throw std::runtime_error(
          fmt::format("--method fusion: '{}' holds no adapter in AdapterHub's form (hint: train one with "
                      "--method pfeiffer)",
                      folder));
    }
    auto path = std::filesystem::path(folder).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();
    if (path.filename() == "best") path = path.parent_path();
    auto name = path.filename().string();
    // The model's names hold no dots, and a comma parts the names of a fusion.
    std::replace_if(
        name.begin(), name.end(), [](char c) { return c == '.' || c == ','; }, '_');
    auto fresh = name;
    for (int i = 2; std::count(names.begin(), names.end(), fresh); ++i) fresh = fmt::format("{}-{}", name, i);
    names.push_back(fresh);
  }
  peft::FusionOptions options(names);
  options.query(values.boolean("query", options.query()))
      .key(values.boolean("key", options.key()))
      .value(values.boolean("value", options.value()))
      .query_before_ln(values.boolean("query_before_ln", options.query_before_ln()))
      .regularization(values.boolean("regularization", options.regularization()))
      .residual_before(values.boolean("residual_before", options.residual_before()))
      .temperature(values.boolean("temperature", options.temperature()))
      .value_before_softmax(values.boolean("value_before_softmax", options.value_before_softmax()))
      .value_initialized(values.boolean("value_initialized", options.value_initialized()));
  if (values.has("dropout")) options.dropout_prob(values.number("dropout", 0));
  peft::check(options);
  return options;
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
