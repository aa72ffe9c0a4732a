// Prompt tuning: trained virtual tokens before the text.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/input.h"
#include "peft/core/problems.h"

namespace peft {

/// What the vectors of a prompt begin with.
enum class PromptInit : std::uint8_t {
  normal,      ///< N(0, 1): Hugging Face's "RANDOM", usually far longer than word vectors
  uniform,     ///< U(±scale): AdapterHub's "random_uniform"
  vocabulary,  ///< vectors of random words: Hugging Face's "SAMPLE_VOCAB"
  tokens,      ///< vectors of the words of a text, cut or repeated: "TEXT", AdapterHub's "from_string"
  labels,      ///< of each label the mean of its words' vectors, then random words: Lester et al.
};

/// Settings of `Prompt`. Defaults are Hugging Face's.
struct PromptOptions {
  static constexpr Needs needs = Needs::input;
  static constexpr const char* method = "prompt";

  explicit PromptOptions(int64_t num_virtual_tokens = 20) : num_virtual_tokens_(num_virtual_tokens) {}

  /// Length V of the prompt, at least 1. It takes that many of the model's positions.
  TORCH_ARG(int64_t, num_virtual_tokens);
  TORCH_ARG(PromptInit, init) = PromptInit::normal;
  /// Of `uniform`: half the width of the interval, positive.
  TORCH_ARG(double, scale) = 0.5;
  /// Of `vocabulary` and `labels`: draw words from this many first rows, each once where they suffice (Lester
  /// et al.: 5000). 0: from the whole vocabulary, with repetition, as Hugging Face does.
  TORCH_ARG(int64_t, sample_from) = 0;
  /// Of `tokens`: the ids of the text, special tokens included.
  TORCH_ARG(std::vector<int64_t>, tokens);
  /// Of `tokens`: the text and its tokenizer's name, for files only; Python asks for both.
  TORCH_ARG(std::string, text);
  TORCH_ARG(std::string, tokenizer);
  /// Of `labels`: the ids of each label's words, at most one label a virtual token.
  TORCH_ARG(std::vector<std::vector<int64_t>>, labels);
  /// Put the prompt after positions, types and norm, as AdapterHub does; it then takes no positions.
  TORCH_ARG(bool, after_embedding) = false;
  /// Leave the text's first token the first: AdapterHub's "prefix_after_bos".
  TORCH_ARG(bool, after_first) = false;
};

/// Throws c10::ValueError, naming the option, if one is out of range.
inline void check(const PromptOptions& options) {
  TORCH_CHECK_VALUE(options.num_virtual_tokens() > 0,
                    "PromptOptions: num_virtual_tokens must be positive, but got ",
                    options.num_virtual_tokens());
  TORCH_CHECK_VALUE(options.scale() > 0 && std::isfinite(options.scale()),
                    "PromptOptions: scale must be positive, but got ", options.scale());
  TORCH_CHECK_VALUE(options.sample_from() >= 0, "PromptOptions: sample_from must be at least 0, but got ",
                    options.sample_from());
  TORCH_CHECK_VALUE((options.init() == PromptInit::tokens) == !options.tokens().empty(),
                    "PromptOptions: tokens must be given with init tokens, and only there, but got ",
                    options.tokens().size());
  TORCH_CHECK_VALUE((options.init() == PromptInit::labels) == !options.labels().empty(),
                    "PromptOptions: labels must be given with init labels, and only there, but got ",
                    options.labels().size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(options.labels().size()) <= options.num_virtual_tokens(),
                    "PromptOptions: labels must be at most num_virtual_tokens, ",
                    options.num_virtual_tokens(), ", but got ", options.labels().size());
  for (const auto& label : options.labels()) {
    TORCH_CHECK_VALUE(!label.empty(), "PromptOptions: labels must each have a token, but got none");
  }
}

/// Why a site cannot take a prompt, or an empty string.
inline std::string refusal(const PromptOptions& options, const SiteInfo& site) {
  const bool embedded = site.input && site.input->embedded();
  if (options.after_embedding() == embedded) return {};
  return "a " + site.layer + " takes prompts with after_embedding(" + (embedded ? "true" : "false") +
         ") only";
}

namespace internal {

/// Throws c10::ValueError where a prompt and a text's first token have no room among the model's positions.
inline void check_room(int64_t num_virtual_tokens, const SiteInfo& site) {
  if (!site.input || site.input->embedded() || site.input->positions() == 0) return;
  TORCH_CHECK_VALUE(num_virtual_tokens < site.input->positions(), "num_virtual_tokens must be less than ",
                    site.input->positions(), ", the model's positions, but got ", num_virtual_tokens);
}

/// Word vectors of these ids, in float32 on the CPU.
inline Tensor word_vectors(const Tensor& words, const std::vector<int64_t>& ids) {
  for (const auto id : ids) {
    TORCH_CHECK_VALUE(id >= 0 && id < words.size(0), "PromptOptions: token ids must be from 0 to ",
                      words.size(0) - 1, ", but got ", id);
  }
  const auto index = torch::tensor(ids, torch::kLong).to(words.device());
  return words.detach().index_select(0, index).to(torch::kCPU, torch::kFloat32);
}

/// Fills the vectors (V, width) of a prompt, with the draws of Hugging Face PEFT, or of AdapterHub.
inline void start_prompt(Tensor rows, const PromptOptions& options, const LayerView& base) {
  torch::NoGradGuard no_grad;
  rows.normal_();  // drawn in any case, as in the reference
  if (options.init() == PromptInit::uniform) rows.uniform_(-options.scale(), options.scale());
  if (options.init() == PromptInit::normal || options.init() == PromptInit::uniform) return;

  const auto words = base.weights().weight;
  TORCH_CHECK_VALUE(words.size(1) == rows.size(1), "PromptOptions: word vectors must have width ",
                    rows.size(1), ", but got ", words.size(1));
  const auto length = static_cast<size_t>(rows.size(0));
  if (options.init() == PromptInit::tokens) {
    std::vector<int64_t> ids;
    while (ids.size() < length) ids.push_back(options.tokens()[ids.size() % options.tokens().size()]);
    rows.copy_(word_vectors(words, ids));
    return;
  }
  int64_t filled = 0;
  for (const auto& label : options.labels()) rows[filled++].copy_(word_vectors(words, label).mean(0));
  const auto missing = rows.size(0) - filled;
  const auto known =
      options.sample_from() > 0 ? std::min(options.sample_from(), words.size(0)) : words.size(0);
  const bool once = options.sample_from() > 0 && missing <= known;
  const auto ids = once ? torch::randperm(known, torch::kLong).slice(0, 0, missing)
                        : torch::randint(0, known, {missing}, torch::kLong);
  rows.slice(0, filled).copy_(words.detach().index_select(0, ids.to(words.device())));
}

}  // namespace internal

/// The text x₁ … x_T becomes p₁ … p_V x₁ … x_T, p trained vectors in the place of word vectors. The mask gets
/// ones, positions are counted from the prompt, and a model's pooler sees p₁ where it takes the first token;
/// outputs keep the virtual tokens (`models::real_tokens`).
/// Shapes: prompt_embeddings (p): (V, width). Trains: p. Count: V · width.
/// Throws: c10::ValueError for options out of range, token ids outside the vocabulary, more virtual tokens
/// than the model has positions.
/// Paper: The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691, §2. Reference: Hugging
/// Face PEFT's PROMPT_TUNING; AdapterHub's with `after_embedding`, where its mask would go wrong for
/// `after_first` with padding on the left.
class PromptImpl : public Piece<PromptImpl, PromptOptions, PromptPieceImpl> {
 public:
  PromptImpl(PromptOptions settings, const SiteInfo& site)
      : Piece(PromptOptions::method, std::move(settings), site) {
    check(options);
    const auto why = refusal(options, site);
    TORCH_CHECK_VALUE(why.empty(), "Prompt: '", site.path, "': ", why);
    internal::check_room(options.num_virtual_tokens(), site);
    prompt_embeddings =
        register_parameter("prompt_embeddings", torch::empty({options.num_virtual_tokens(), site.width}));
  }

  void initialize(const LayerView& base) override {
    internal::start_prompt(prompt_embeddings, options, base);
  }
  Tensor prompt(const Embedded&) override { return prompt_embeddings.unsqueeze(0); }
  int64_t num_virtual_tokens() const override { return options.num_virtual_tokens(); }
  bool after_first() const override { return options.after_first(); }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Prompt(num_virtual_tokens=" << options.num_virtual_tokens() << ")";
  }

  Tensor prompt_embeddings;
};

inline std::shared_ptr<PieceImpl> make_piece(const PromptOptions& options, const SiteInfo& site) {
  return std::make_shared<PromptImpl>(options, site);
}

}  // namespace peft
