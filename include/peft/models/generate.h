// generate: texts from a causal language model, greedily or by sampling.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"

#include <ATen/core/Generator.h>
#include <torch/arg.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {
namespace models {

/// Settings of `generate`, with transformers' names and defaults.
struct GenerateOptions {
  /// At most so many tokens are added to each text; at least 1.
  TORCH_ARG(int64_t, max_new_tokens) = 20;
  /// Draws each token; without it the likeliest is taken, and `temperature`, `top_k`, `top_p` and `generator`
  /// are without effect.
  TORCH_ARG(bool, do_sample) = false;
  /// The logits are divided by it: below 1 likely tokens become likelier; positive.
  TORCH_ARG(double, temperature) = 1.0;
  /// Draws from so many of the likeliest tokens; 0: from all.
  TORCH_ARG(int64_t, top_k) = 50;
  /// Draws from the likeliest tokens whose probabilities add up to it, in [0, 1]; at least from one.
  TORCH_ARG(double, top_p) = 1.0;
  /// Tokens that end a text; by default those of the model's config.
  TORCH_ARG(std::optional<std::vector<int64_t>>, eos_token_id);
  /// Fills texts that ended before others; by default the config's, or else the first that ends a text.
  TORCH_ARG(std::optional<int64_t>, pad_token_id);
  /// Keeps keys and values instead of computing them again at each step.
  TORCH_ARG(bool, use_cache) = true;
  /// What sampling draws from; without one, LibTorch's global generator.
  TORCH_ARG(at::Generator, generator);
};

/// Throws c10::ValueError if an option is out of range.
inline void check(const GenerateOptions& options) {
  const auto require = [](bool fits, const char* what, auto value) {
    TORCH_CHECK_VALUE(fits, "GenerateOptions: ", what, ", but got ", value);
  };
  require(options.max_new_tokens() > 0, "max_new_tokens must be positive", options.max_new_tokens());
  require(options.temperature() > 0 && options.temperature() < std::numeric_limits<double>::infinity(),
          "temperature must be positive and finite", options.temperature());
  require(options.top_k() >= 0, "top_k must be at least 0", options.top_k());
  require(options.top_p() >= 0 && options.top_p() <= 1, "top_p must be in [0, 1]", options.top_p());
}

}  // namespace models

namespace internal {

/// The logits that sampling draws from: −∞ for tokens that are out of the question.
/// Shapes: logits (batch, vocabulary) in float32.
inline Tensor sampling_scores(Tensor scores, const models::GenerateOptions& options) {
  const auto never = -std::numeric_limits<float>::infinity();
  if (options.temperature() != 1.0) scores = scores / options.temperature();
  if (options.top_k() > 0) {
    const auto least = std::get<0>(scores.topk(std::min(options.top_k(), scores.size(1)))).slice(1, -1);
    scores = scores.masked_fill(scores < least, never);
  }
  if (options.top_p() < 1.0) {
    const auto [sorted, order] = scores.sort(/*dim=*/-1, /*descending=*/false);
    auto unlikely = sorted.softmax(-1).cumsum(-1) <= 1.0 - options.top_p();
    unlikely.slice(1, -1).fill_(false);
    scores = scores.masked_fill(unlikely.scatter(1, order, unlikely), never);
  }
  return scores;
}

/// One token a row.
inline Tensor next_tokens(const Tensor& logits, const models::GenerateOptions& options) {
  const auto scores = logits.to(torch::kFloat32);
  if (!options.do_sample()) return scores.argmax(-1, /*keepdim=*/true);
  const auto likely = sampling_scores(scores, options).softmax(-1);
  return options.generator().defined() ? likely.multinomial(1, /*replacement=*/false, options.generator())
                                       : likely.multinomial(1);
}

}  // namespace internal

namespace models {

/// Goes on with each text, as transformers' `generate` does with greedy search and sampling: the prompts,
/// and after them the new tokens. A text that has ended is filled with padding until all have; the forward's
/// virtual tokens are in the cache, not in what is returned. Under an active Parallel of N adapters the
/// result has the texts of each, N · batch in all. A folder's `generation_config.json` is not read: what it
/// says goes into `options`.
///
/// Shapes: ids (batch, time); mask (batch, time), 0 for padding, which must be on the left; undefined: the
/// padding token is padding, unless it also ends texts. Returns (batch, time + at most max_new_tokens).
/// Throws: c10::ValueError for options out of range, padding on the right, and texts longer than the position
/// table; c10::Error for a model in training mode.
///
/// Example:
/// ```
/// const auto options = GenerateOptions().do_sample(true).temperature(0.8);
/// const auto texts = generate(model, ids, options, mask);
/// ```
template <class Model>
Tensor generate(Model& model, const Tensor& ids, const GenerateOptions& options = {}, Tensor mask = {}) {
  check(options);
  const auto& config = model->config;
  const auto ends = options.eos_token_id().value_or(config.eos_token_id());
  auto padding = options.pad_token_id() ? options.pad_token_id() : config.pad_token_id();
  if (!padding && !ends.empty()) padding = ends.front();
  TORCH_CHECK(!model->is_training(), "generate: the model is in training mode (hint: model->eval())");
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(1) > 0, "generate: ids must be (batch, time), but got ",
                    peft::internal::shape_text(ids.sizes()));
  TORCH_CHECK_VALUE(!mask.defined() || mask.sizes() == ids.sizes(), "generate: mask must be ",
                    peft::internal::shape_text(ids.sizes()), ", but got ",
                    peft::internal::shape_text(mask.defined() ? mask.sizes() : ids.sizes()));
  const auto longest = ids.size(1) + options.max_new_tokens() - 1;  // the last token is not read again
  TORCH_CHECK_VALUE(longest <= config.n_positions(),
                    "generate: the prompt and max_new_tokens must make at most ", config.n_positions() + 1,
                    " tokens, but got ", longest + 1);

  torch::NoGradGuard no_grad;
  const bool tells = padding && std::find(ends.begin(), ends.end(), *padding) == ends.end();
  if (!mask.defined()) mask = tells ? ids.ne(*padding) : torch::ones_like(ids);
  mask = mask.to(torch::kLong);
  TORCH_CHECK_VALUE(mask.select(1, -1).all().item<bool>(),
                    "generate: padding must be on the left, but the last token of a row is padding");

  auto texts = ids;
  auto positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0);
  auto ended = torch::zeros({ids.size(0), 1}, ids.options().dtype(torch::kBool));
  typename Model::Impl::Inputs step;
  for (int64_t made = 0; made < options.max_new_tokens(); ++made) {
    const bool continues = options.use_cache() && made > 0;
    step.input_ids = continues ? texts.slice(1, -1) : texts;
    step.position_ids = continues ? positions.slice(1, -1) : positions;
    step.attention_mask = mask;
    step.use_cache = options.use_cache();
    step.logits_to_keep = 1;
    auto output = model->forward(step);
    step.cache = std::move(output.cache);
    if (const auto rows = output.logits.size(0); rows != texts.size(0)) {  // those of an active Parallel
      TORCH_CHECK(options.use_cache(), "generate: a Parallel needs use_cache");
      for (auto* tensor : {&texts, &mask, &positions, &ended}) {
        *tensor = tensor->repeat({rows / tensor->size(0), 1});
      }
    }

    auto next = peft::internal::next_tokens(output.logits.select(1, -1), options);
    if (!ends.empty()) next = next.masked_fill(ended, *padding);
    texts = torch::cat({texts, next}, 1);
    for (const auto token : ends) ended = ended | next.eq(token);
    if (!ends.empty() && ended.all().item<bool>()) break;
    mask = torch::cat({mask, torch::ones_like(next)}, 1);
    positions = torch::cat({positions, positions.slice(1, -1) + 1}, 1);
  }
  return texts;
}

}  // namespace models
}  // namespace peft
