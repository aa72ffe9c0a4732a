// T-Few losses: what a text-to-text model trains with on multiple-choice tasks, and how it then chooses.
#pragma once

#include <torch/arg.h>
#include <torch/nn/functional/loss.h>

#include <cmath>

#include "peft/core/compat.h"
#include "peft/core/problems.h"

namespace peft {

/// Settings of the T-Few losses. Defaults are the paper's.
struct TFewOptions {
  /// The token that fills choices up; 0 is T5's. No loss counts it as a target.
  TORCH_ARG(int64_t, padding) = 0;
  /// A choice's score is divided by its number of tokens to this power; 0 leaves it a sum.
  TORCH_ARG(double, length_norm) = 1.0;
  /// Weights of the second and third loss in the total; the first has 1.
  TORCH_ARG(double, choice_weight) = 1.0;
  TORCH_ARG(double, unlikelihood_weight) = 1.0;
};

/// The three losses, each a scalar, and their weighted sum.
struct TFewLosses {
  Tensor language_model, choice, unlikelihood, total;
};

namespace internal {

/// What the losses have in common: the cross-entropy of every token of every choice, padding 0.
struct TokenLosses {
  Tensor targets;  ///< (batch, choices, time), −100 where padded
  Tensor losses;   ///< (batch, choices, time)
};

inline TokenLosses token_losses(const Tensor& logits, const Tensor& choices, const TFewOptions& options) {
  TORCH_CHECK_VALUE(choices.dim() == 3 && !choices.is_floating_point(),
                    "t_few: choices must be token ids (batch, choices, time), but got ",
                    shape_text(choices.sizes()), " of ", c10::toString(choices.scalar_type()));
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.sizes().slice(0, 3) == choices.sizes(),
                    "t_few: logits must be (batch, choices, time, vocabulary) with choices ",
                    shape_text(choices.sizes()), ", but got ", shape_text(logits.sizes()));
  TORCH_CHECK_VALUE(std::isfinite(options.length_norm()) && options.length_norm() >= 0,
                    "TFewOptions: length_norm must be at least 0, but got ", options.length_norm());
  const auto ids = choices.to(torch::kLong);
  const auto padded = ids == options.padding();
  if (ids.is_cpu()) {  // elsewhere the check would make the host wait; the scores are then NaN
    TORCH_CHECK_VALUE(!padded.all(-1).any().item<bool>(),
                      "t_few: a choice must have a token, but got one of ", "padding (", options.padding(),
                      ") alone");
  }
  const auto targets = ids.masked_fill(padded, -100);
  const auto losses = nn::functional::cross_entropy(
      logits.flatten(0, 2), targets.flatten(),
      nn::functional::CrossEntropyFuncOptions().reduction(torch::kNone).ignore_index(-100));
  return {targets, losses.view(targets.sizes())};
}

inline Tensor scores_of(const TokenLosses& tokens, const TFewOptions& options) {
  const auto scores = tokens.losses.sum(-1);
  if (options.length_norm() == 0) return scores;
  const auto lengths = (tokens.targets != -100).sum(-1);
  return scores / lengths.to(scores.scalar_type()).pow(options.length_norm());
}

}  // namespace internal

/// c_n = Σ CE(token) / (number of tokens)^length_norm of every choice; the prediction is the smallest:
/// `choice_scores(…).argmin(1)`.
/// Shapes: logits: (batch, choices, time, vocabulary), position t being the model's word on token t;
/// choices: (batch, choices, time), token ids filled up with padding; returns (batch, choices).
/// Throws: c10::ValueError for shapes that do not go together, a choice without a token.
inline Tensor choice_scores(const Tensor& logits, const Tensor& choices, const TFewOptions& options = {}) {
  return internal::scores_of(internal::token_losses(logits, choices, options), options);
}

/// The losses T-Few adds up.
/// language_model: CE of the tokens of the correct choices, the mean over all of them in the batch.
/// choice: CE of softmax(−c) against the correct choice, the mean over the batch; c: `choice_scores`.
/// unlikelihood: −Σ log(1 − p + 0.01) / n over the tokens of the wrong choices, p the probability of each.
/// As in the authors' code, tokens of the correct choice and padding count in the sum with p = exp(−100) (so
/// each adds −log 1.01), but not in n.
/// Shapes: as `choice_scores`; labels: (batch), the number of the correct choice.
/// Throws: c10::ValueError also for fewer than two choices or a label that is none of them.
/// Paper: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv
/// 2205.05638, §3.2; reference: its authors' code, which differs in the constant 0.01 and those terms.
inline TFewLosses t_few_losses(const Tensor& logits, const Tensor& choices, const Tensor& labels,
                               const TFewOptions& options = {}) {
  const auto tokens = internal::token_losses(logits, choices, options);
  const auto batch = choices.size(0), count = choices.size(1);
  TORCH_CHECK_VALUE(count >= 2, "t_few: expected at least two choices, but got ", count);
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == batch && !labels.is_floating_point(),
                    "t_few: labels must be ", batch, " numbers of choices, but got ",
                    internal::shape_text(labels.sizes()), " of ", c10::toString(labels.scalar_type()));
  if (labels.is_cpu() && batch > 0) {
    const auto lowest = labels.min().item<int64_t>(), highest = labels.max().item<int64_t>();
    TORCH_CHECK_VALUE(lowest >= 0 && highest < count, "t_few: labels must be from 0 to ", count - 1,
                      ", but got ", lowest < 0 ? lowest : highest);
  }
  const auto answers = labels.to(torch::kLong);
  const auto correct = torch::one_hot(answers, count).to(torch::kBool).unsqueeze(-1);
  const auto real = tokens.targets != -100;

  TFewLosses losses;
  losses.language_model = tokens.losses.masked_fill(~correct, 0).sum() / (real & correct).sum();
  losses.choice = nn::functional::cross_entropy(-internal::scores_of(tokens, options), answers);
  const auto likelihoods = (-tokens.losses).masked_fill(correct | ~real, -100);
  losses.unlikelihood = -torch::log(1 - likelihoods.exp() + 1e-2).sum() / (likelihoods != -100).sum();
  losses.total = losses.language_model + losses.choice * options.choice_weight() +
                 losses.unlikelihood * options.unlikelihood_weight();
  return losses;
}

}  // namespace peft
