// The methods of the program and their keys.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "method_parts.h"
#include "method_values.h"
#include "peft/model/add_adapter.h"

namespace finetune {

/// One method of the program.
struct MethodEntry {
  std::string name, what;
  std::vector<std::string> keys;             ///< beside `lr`
  std::vector<std::string> default_targets;  ///< of BERT
  /// The parts of the adapter, the task head left out.
  std::function<std::vector<peft::Part>(const MethodValues&, const Place&)> parts;
};

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
       "every bias, or those named, and the head",
       {"targets", "biases", "kinds"},
       {},
       internal::bitfit_parts},
      {"full", "every weight, or those of the targets, and the head", {"targets"}, {}, internal::full_parts},
  };
  return table;
}

}  // namespace finetune
