// The methods of the program and their keys.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "method_parts.h"
#include "method_values.h"
#include "peft/model/add_adapter.h"
#include "selective_parts.h"

namespace finetune {

/// One method of the program.
struct MethodEntry {
  std::string name, what;
  std::vector<std::string> keys;             ///< beside `lr`
  std::vector<std::string> default_targets;  ///< of BERT
  /// The parts of the adapter, the task head left out.
  std::function<std::vector<peft::Part>(const MethodValues&, const Place&)> parts;
};

namespace internal {

/// A named configuration of bottlenecks. `more`: the keys that not all of them have.
inline MethodEntry bottleneck_entry(std::string name, std::string what, const peft::BottleneckOptions& preset,
                                    const std::vector<std::string>& more = {}) {
  std::vector<std::string> keys{
      "reduction_factor", "size",    "non_linearity",  "places",           "gating",   "ln_before",
      "ln_after",         "dropout", "hidden_dropout", "stochastic_depth", "leave_out"};
  keys.insert(keys.end(), more.begin(), more.end());
  keys.emplace_back("modules_to_save");
  return {std::move(name),
          std::move(what),
          std::move(keys),
          {},
          [preset](const MethodValues& values, const Place&) { return bottleneck_parts(preset, values); }};
}

}  // namespace internal

/// Every method the program knows.
inline const std::vector<MethodEntry>& method_table() {
  static const std::vector<MethodEntry> table{
      {"lora",
       "low-rank updates of the targets",
       {"targets", "rank", "alpha", "dropout", "rslora", "lora_bias", "init", "init_batches", "niter",
        "loftq_bits", "loftq_iter", "lora_plus", "rank_pattern", "alpha_pattern", "enable", "bias",
        "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::lora_parts},
      {"adalora",
       "low-rank updates whose ranks are shared out while they train",
       {"targets", "init_rank", "target_rank", "tinit", "tfinal", "delta_t", "total_step", "beta1", "beta2",
        "orth_reg_weight", "alpha", "dropout", "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::adalora_parts},
      {"increlora",
       "low-rank updates that begin at rank 1 and grow where the loss asks for it",
       {"targets",       "target_rank",     "target_total_rank", "rank",          "alpha",
        "dropout",       "top_h",           "incre_rank_num",    "init_warmup",   "incre_interval",
        "advance_learn", "multi_lr",        "reg_orth_coef",     "couple_chunks", "beta1",
        "beta2",         "adapt_positions", "modules_to_save",   "exclude",       "layers"},
       {"query", "value"},
       internal::increlora_parts},
      {"dora",
       "LoRA with a magnitude of its own for every output",
       {"targets", "rank", "alpha", "dropout", "rslora", "init", "init_batches", "niter", "loftq_bits",
        "loftq_iter", "lora_plus", "rank_pattern", "alpha_pattern", "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::dora_parts},
      {"loha",
       "the elementwise product of two low-rank updates",
       {"targets", "rank", "alpha", "rank_dropout", "module_dropout", "rank_pattern", "alpha_pattern",
        "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::loha_parts},
      {"lokr",
       "the Kronecker product of two small factors",
       {"targets", "rank", "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "decompose_both",
        "decompose_factor", "rank_pattern", "alpha_pattern", "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::lokr_parts},
      {"vera",
       "vectors between random matrices that all layers share",
       {"targets", "rank", "projection_prng_key", "save_projection", "dropout", "d_initial",
        "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::vera_parts},
      {"oft",
       "rotations of the inputs in blocks",
       {"targets", "block_size", "blocks", "block_share", "module_dropout", "coft", "eps", "cayley_neumann",
        "neumann_terms", "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::oft_parts},
      {"boft",
       "rotations of the inputs in butterflies of blocks",
       {"targets", "block_size", "block_num", "butterfly_factors", "dropout", "modules_to_save", "exclude",
        "layers"},
       {"query", "value"},
       internal::boft_parts},
      internal::bottleneck_entry("houlsby", "small networks after attention and after feed-forward",
                                 peft::houlsby(), {"scaling"}),
      internal::bottleneck_entry("pfeiffer", "small networks after feed-forward, on its normed sum",
                                 peft::pfeiffer(), {"scaling"}),
      internal::bottleneck_entry("parallel", "small networks beside feed-forward, scaled by 4",
                                 peft::parallel_adapter(), {"scaling"}),
      internal::bottleneck_entry("scaled_parallel",
                                 "small networks beside feed-forward, scaled by a trained factor",
                                 peft::scaled_parallel_adapter()),
      internal::bottleneck_entry("adapter_plus",
                                 "small networks after feed-forward and its norm, scaled by trained channels",
                                 peft::adapter_plus()),
      internal::bottleneck_entry(
          "compacter", "small networks of Kronecker products after attention and after feed-forward",
          peft::compacter(), {"scaling", "phm_dim", "phm_rank"}),
      internal::bottleneck_entry("compacter++", "small networks of Kronecker products after feed-forward",
                                 peft::compacter_plus_plus(), {"scaling", "phm_dim", "phm_rank"}),
      {"fusion",
       "attention over what trained bottlenecks make of each token; adapters=[DIR,DIR,…] are theirs",
       {"adapters", "query", "key", "value", "query_before_ln", "regularization", "residual_before",
        "temperature", "value_before_softmax", "value_initialized", "dropout"},
       {},
       [](const MethodValues&, const Place&) { return std::vector<peft::Part>{}; }},
      {"prompt_tuning",
       "virtual tokens before the text",
       {"virtual_tokens", "init", "scale", "sample_from", "tokens", "modules_to_save"},
       {},
       internal::prompt_tuning_parts},
      {"multitask_prompt",
       "virtual tokens that the files of --train share as tasks, times a matrix of each; source= takes them "
       "over to a new one",
       {"virtual_tokens", "rank", "init", "scale", "sample_from", "tokens", "source", "source_task",
        "modules_to_save"},
       {},
       internal::multitask_prompt_parts},
      {"p_tuning",
       "virtual tokens before the text, made by a network while they train",
       {"virtual_tokens", "encoder", "hidden_size", "lstm_layers", "dropout", "modules_to_save"},
       {},
       internal::p_tuning_parts},
      {"prefix",
       "keys and values before those of the text, in every layer",
       {"length", "projection", "hidden_width", "vector_width", "activation", "init", "dropout", "gates",
        "shift_positions", "leave_out", "modules_to_save"},
       {},
       internal::prefix_parts},
      {"p_tuning_v2",
       "the same as its authors train it: small at first, with dropout",
       {"length", "projection", "hidden_width", "vector_width", "activation", "init", "dropout", "leave_out",
        "modules_to_save"},
       {},
       internal::p_tuning_v2_parts},
      {"mam",
       "a prefix in every layer, and small networks beside feed-forward",
       {"length", "size", "modules_to_save"},
       {},
       internal::mam_parts},
      {"unipelt",
       "a prefix, small networks after feed-forward and LoRA, each behind a gate",
       {"length", "rank", "targets", "modules_to_save", "exclude", "layers"},
       {"query", "value"},
       internal::unipelt_parts},
      {"trainable_tokens",
       "the vectors of some tokens, by their ids",
       {"targets", "indices", "modules_to_save", "exclude", "layers"},
       {"word_embeddings"},
       internal::trainable_tokens_parts},
      {"ia3",
       "vectors that scale the targets' outputs or inputs",
       {"targets", "feedforward", "modules_to_save", "exclude", "layers"},
       {"key", "value", "output.dense"},
       internal::ia3_parts},
      {"ln_tuning",
       "every LayerNorm's weight and bias, or of those named",
       {"targets", "modules_to_save", "exclude", "layers"},
       {"LayerNorm"},
       internal::layer_norm_parts},
      {"head",
       "the task head alone, on features computed once",
       {},
       {},
       [](const MethodValues&, const Place&) { return std::vector<peft::Part>{}; }},
      {"bitfit",
       "every bias, or those named or of BitFit's terms, and the head",
       {"targets", "biases", "kinds", "terms"},
       {},
       internal::bitfit_parts},
      {"top_layers",
       "the last blocks, and the head",
       {"k", "final_norm", "modules_to_save"},
       {},
       internal::top_layers_parts},
      {"fish",
       "the weights with the largest Fisher information on the first rows of the data, and the head",
       {"targets", "ratio", "examples", "training", "modules_to_save", "exclude", "layers"},
       {},
       internal::fish_parts},
      {"magnitude",
       "the largest or smallest weights, and the head",
       {"targets", "ratio", "smallest", "per_layer", "modules_to_save", "exclude", "layers"},
       {},
       internal::magnitude_parts},
      {"rand_uniform",
       "weights drawn at random, and the head",
       {"targets", "count", "modules_to_save", "exclude", "layers"},
       {},
       internal::rand_uniform_parts},
      {"rand_row_col",
       "rows or a column of each matrix drawn at random, the norms' weights, and the head",
       {"targets", "modules_to_save", "exclude", "layers"},
       {},
       internal::rand_row_col_parts},
      {"hifi",
       "query, key and value rows of the attention heads that matter most on the first rows of the data",
       {"targets", "heads", "per_layer", "energy", "damping", "samples", "whole_outputs",
        "restart_by_information", "modules_to_save", "exclude", "layers"},
       {"query", "key", "value"},
       internal::hifi_parts},
      {"full", "every weight, or those of the targets, and the head", {"targets"}, {}, internal::full_parts},
  };
  return table;
}

}  // namespace finetune
