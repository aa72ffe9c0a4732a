// What the families of encoders share: inputs and outputs, the attention bias, pooling, losses.
#pragma once

#include "peft/core/activation_function.h"
#include "peft/core/adapted.h"
#include "peft/core/attention.h"
#include "peft/core/compat.h"
#include "peft/core/conv1d.h"
#include "peft/core/problems.h"
#include "peft/io/config_json.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {
namespace internal {

/// A Linear whose values are not set yet: nothing is drawn, so a clone leaves the generator alone, and memory
/// that a checkpoint will replace is never touched.
inline Linear unset_linear(int64_t in, int64_t out, bool bias = true) {
  nn::Linear layer(nn::LinearOptions(1, 0).bias(bias));
  layer->options = nn::LinearOptions(in, out).bias(bias);
  layer->weight.set_data(torch::empty({out, in}));
  if (bias) layer->bias.set_data(torch::empty({out}));
  return Linear(layer);
}

/// The same for a Conv1D.
inline Conv1D unset_conv1d(int64_t in, int64_t out) {
  TransposedLinear layer(0, 0);
  layer->in_features = in;
  layer->out_features = out;
  layer->weight.set_data(torch::empty({in, out}));
  layer->bias.set_data(torch::empty({out}));
  return Conv1D(layer);
}

/// The same for an Embedding.
inline Embedding unset_embedding(const nn::EmbeddingOptions& options) {
  nn::Embedding layer(nn::EmbeddingOptions(0, 1));
  layer->options = options;
  layer->weight.set_data(torch::empty({options.num_embeddings(), options.embedding_dim()}));
  return Embedding(layer);
}

/// The options of an embedding of words. The padding's row, if there is one, may be counted from the end.
inline nn::EmbeddingOptions vocabulary(int64_t words, int64_t width, std::optional<int64_t> padding) {
  auto options = nn::EmbeddingOptions(words, width);
  if (padding) options.padding_idx(*padding < 0 ? *padding + words : *padding);
  return options;
}

/// The initial values transformers gives a module and the sites below it, in its order of draws: N(0, range²)
/// for the weights of linear layers, convolutions and embeddings, 0 for biases and the padding's row, 1 and 0
/// for norms. The weight of the site `tied`, if there is one, is another's.
inline void initialize(nn::Module& module, double range, const nn::Module* tied = nullptr) {
  torch::NoGradGuard no_grad;
  const auto draw = [range](Tensor weight) {
    // Drawn in float32, so that the values do not depend on the type but for their rounding.
    weight.copy_(torch::empty(weight.sizes(), torch::kFloat32).normal_(0.0, range));
  };
  const auto fill = [&draw, tied](nn::Module& site) {
    if (auto* linear = site.as<AdaptedImpl<nn::Linear>>()) {
      if (linear != tied) draw(linear->base->weight);
      if (linear->base->bias.defined()) linear->base->bias.zero_();
    } else if (auto* turned = site.as<AdaptedImpl<TransposedLinear>>()) {
      draw(turned->base->weight);
      turned->base->bias.zero_();
    } else if (auto* convolution = site.as<AdaptedImpl<nn::Conv1d>>()) {
      draw(convolution->base->weight);
      if (convolution->base->bias.defined()) convolution->base->bias.zero_();
    } else if (auto* embedding = site.as<AdaptedImpl<nn::Embedding>>()) {
      draw(embedding->base->weight);
      const auto padding = embedding->base->options.padding_idx();
      if (padding) embedding->base->weight[*padding].zero_();
    } else if (auto* norm = site.as<AdaptedImpl<nn::LayerNorm>>()) {
      norm->base->weight.fill_(1);
      norm->base->bias.zero_();
    }
  };
  fill(module);
  for (const auto& below : module.modules(/*include_self=*/false)) fill(*below);
}

/// The additive bias that hides the keys whose mask is 0, or an undefined tensor where nothing is hidden.
/// Shapes: mask (batch, keys) or undefined; bias (batch, 1, 1, keys).
inline Tensor attention_bias(const Tensor& mask, torch::ScalarType dtype) {
  if (!mask.defined()) return {};
  const auto hidden = mask.eq(0);
  // Asking a device would make it wait.
  if (hidden.is_cpu() && !hidden.any().item<bool>()) return {};
  double least = 0;
  if (dtype == torch::kFloat16) {
    least = std::numeric_limits<c10::Half>::lowest();
  } else if (dtype == torch::kBFloat16) {
    least = std::numeric_limits<c10::BFloat16>::lowest();
  } else {
    least = std::numeric_limits<float>::lowest();
  }
  return hidden.to(dtype).mul_(least).view({mask.size(0), 1, 1, mask.size(1)});
}

/// A row of ids for each of so many, if there is but one for all.
inline Tensor for_rows(const Tensor& ids, int64_t rows) {
  return ids.expand({std::max(rows, ids.size(0)), -1});
}

/// Looks indices up; where that fails, says which of them are out of range.
template <class Lookup>
Tensor lookup(Lookup& layer, const Tensor& indices, const char* name) {
  try {
    return layer->forward(indices);
  } catch (const c10::Error&) {
    const int64_t rows = layer->base->options.num_embeddings();
    if (indices.numel() > 0 && indices.is_cpu()) {
      const auto low = indices.min().template item<int64_t>(), high = indices.max().template item<int64_t>();
      TORCH_CHECK_VALUE(low >= 0 && high < rows, name, " must be from 0 to ", rows - 1, ", but got ",
                        low < 0 ? low : high);
    }
    throw;
  }
}

}  // namespace internal

namespace models {

/// What a task's labels are; `automatic` decides by the number of labels and their type, as transformers
/// does.
enum class ProblemType : std::uint8_t { automatic, regression, single_label, multi_label };

}  // namespace models

namespace internal {

/// What `config.json` calls kinds of problems.
inline const std::vector<std::pair<std::string, models::ProblemType>>& problem_names() {
  using models::ProblemType;
  static const std::vector<std::pair<std::string, ProblemType>> names{
      {"regression", ProblemType::regression},
      {"single_label_classification", ProblemType::single_label},
      {"multi_label_classification", ProblemType::multi_label}};
  return names;
}

inline models::ProblemType read_problem_type(ConfigReader& reader) {
  if (!reader.has("problem_type")) return models::ProblemType::automatic;
  const auto given = reader.string("problem_type", "regression");
  for (const auto& [name, problem] : problem_names()) {
    if (name == given) return problem;
  }
  reader.complain("problem_type",
                  "must be \"regression\", \"single_label_classification\" or "
                  "\"multi_label_classification\"");
  return models::ProblemType::automatic;
}

/// Writes a classifier's labels and kind of problem as `config.json` has them.
inline void write_labels(nlohmann::ordered_json& json, const std::vector<std::string>& labels,
                         models::ProblemType problem) {
  for (size_t i = 0; i < labels.size(); ++i) {
    json["id2label"][std::to_string(i)] = labels[i];
    json["label2id"][labels[i]] = i;
  }
  for (const auto& [name, known] : problem_names()) {
    if (known == problem) json["problem_type"] = name;
  }
}

}  // namespace internal

namespace models {

/// Chooses the constructor for those who set a model's values next.
struct Unset {};

using peft::activation_function;
using peft::activation_functions;
using peft::ActivationFunction;

/// One batch. Undefined members are absent.
struct EncoderInputs {
  Tensor input_ids;                   ///< (batch, time), or:
  Tensor inputs_embeds;               ///< (batch, time, width of the words), word vectors
  Tensor attention_mask;              ///< (batch, time), 0 where a token is padding; absent: none is
  Tensor token_type_ids;              ///< (batch, time); absent: all 0
  Tensor position_ids;                ///< (batch or 1, time); absent: counted as the family counts them
  Tensor labels;                      ///< asks the head for a loss: `classification_loss`, `token_loss`
  bool output_hidden_states = false;  ///< asks for `EncoderOutput::hidden_states`
  Tensor start_positions = {};        ///< (batch), the answer's first token; with
  Tensor end_positions = {};          ///< its last one it asks question answering for a loss: `span_loss`
};

/// What a forward gives. Undefined members are those the model does not have or was not asked for.
struct EncoderOutput {
  Tensor last_hidden_state;           ///< (batch, time, hidden)
  Tensor pooler_output;               ///< (batch, hidden)
  std::vector<Tensor> hidden_states;  ///< of the embeddings and of every layer
  Tensor logits;                      ///< (batch, labels), or of each token: (batch, time, labels)
  Tensor loss;                        ///< a scalar
  Tensor virtual_tokens;              ///< (batch or 1, time), true for those of a prompt; see `real_tokens`
  Tensor start_logits = {};           ///< (batch, time), of question answering: that an answer begins here
  Tensor end_logits = {};             ///< (batch, time): that it ends here
  int64_t num_virtual_tokens = 0;     ///< how many `virtual_tokens` a row has
};

}  // namespace models

namespace internal {

/// Throws: c10::ValueError where an encoder's inputs are not one of ids and embeddings, or not as long as
/// each other, and where labels are left over that no head has taken.
inline void check_inputs(const models::EncoderInputs& inputs, const char* model) {
  const auto refuse = [model](const Tensor& labels, const char* name, const char* task) {
    TORCH_CHECK_VALUE(!labels.defined(), model, ": ", name,
                      " were given, but there is no head to make a loss ",
                      "of them (hint: a model with one, such as the family's ", task, ")");
  };
  refuse(inputs.labels, "labels", "ForSequenceClassification");
  refuse(inputs.start_positions, "start_positions", "ForQuestionAnswering");
  refuse(inputs.end_positions, "end_positions", "ForQuestionAnswering");
  const bool by_ids = inputs.input_ids.defined();
  TORCH_CHECK_VALUE(by_ids != inputs.inputs_embeds.defined(), model,
                    ": expected either input_ids or inputs_embeds, but got ", by_ids ? "both" : "neither");
  const auto& tokens = by_ids ? inputs.input_ids : inputs.inputs_embeds;
  TORCH_CHECK_VALUE(tokens.dim() == (by_ids ? 2 : 3) && tokens.size(1) > 0, model,
                    by_ids ? ": input_ids must be (batch, time), but got "
                           : ": inputs_embeds must be (batch, time, width), but got ",
                    shape_text(tokens.sizes()));
  const auto shape = tokens.sizes().slice(0, 2);
  const auto check_shape = [model, &shape](const Tensor& tensor, const char* name, bool one_row) {
    if (!tensor.defined()) return;
    const bool fits = tensor.dim() == 2 && tensor.size(1) == shape[1] &&
                      (tensor.size(0) == shape[0] || (one_row && tensor.size(0) == 1));
    TORCH_CHECK_VALUE(fits, model, ": ", name, " must be ", shape_text(shape), ", but got ",
                      shape_text(tensor.sizes()));
  };
  check_shape(inputs.attention_mask, "attention_mask", false);
  check_shape(inputs.token_type_ids, "token_type_ids", true);
  check_shape(inputs.position_ids, "position_ids", true);
}

}  // namespace internal

namespace models {

/// What a model gives for each token, without the virtual ones that a prompt put into the text, of which
/// every row has as many. Asks no device for values.
/// Shapes: tensor (batch, time, …), which belongs to `output`, a model's. (batch, the caller's time, …).
/// Throws: c10::ValueError for a tensor that has not as many tokens as the output.
template <class Output>
Tensor real_tokens(const Tensor& tensor, const Output& output) {
  const Tensor& is_virtual = output.virtual_tokens;
  if (!is_virtual.defined()) return tensor;
  const auto rows = is_virtual.size(0), time = is_virtual.size(1);
  TORCH_CHECK_VALUE(tensor.dim() > 1 && tensor.size(1) == time && (rows == 1 || tensor.size(0) == rows),
                    "real_tokens: expected a tensor of the output's tokens, ",
                    internal::shape_text(is_virtual.sizes()), ", but got ",
                    internal::shape_text(tensor.sizes()));
  // The real tokens' places in each row, in their order.
  const auto places = is_virtual.to(torch::kInt).argsort(/*stable=*/true, /*dim=*/1);
  const auto real = places.narrow(1, 0, time - output.num_virtual_tokens);
  if (rows == 1) return tensor.index_select(1, real.squeeze(0));
  const auto first = torch::arange(0, rows * time, time, real.options()).unsqueeze(1);
  auto shape = tensor.sizes().vec();
  shape[1] = real.size(1);
  return tensor.flatten(0, 1).index_select(0, (first + real).flatten()).view(shape);
}

/// The mean of the hidden states of real tokens: one vector a row. After a prompt, of
/// `real_tokens(output.last_hidden_state, output)`.
/// Shapes: hidden (batch, time, width); mask (batch, time), 1 for real tokens, or undefined: all are. (batch,
/// width).
inline Tensor mean_pool(const Tensor& hidden, const Tensor& mask) {
  if (!mask.defined()) return hidden.mean(1);
  const auto real = mask.to(hidden.scalar_type());
  const auto sum = at::matmul(real.unsqueeze(1), hidden).squeeze(1);
  return sum / real.sum(1, /*keepdim=*/true).clamp_min(1e-9);
}

/// Sentence vectors: `mean_pool`, scaled to length 1.
inline Tensor embed(const Tensor& hidden, const Tensor& mask) {
  const auto pooled = mean_pool(hidden, mask);
  return pooled / pooled.norm(2, /*dim=*/{1}, /*keepdim=*/true).clamp_min(1e-12);
}

/// The loss transformers' sequence classifiers compute: mean squared error, cross entropy (label −100 is
/// ignored), or binary cross entropy on logits. Shapes: logits (batch, labels); labels (batch), or (batch,
/// labels) with several labels or several targets.
inline Tensor classification_loss(const Tensor& logits, const Tensor& labels, ProblemType problem) {
  const auto count = logits.size(1);
  if (problem == ProblemType::automatic) {
    problem = count == 1 ? ProblemType::regression
              : labels.scalar_type() == torch::kLong || labels.scalar_type() == torch::kInt
                  ? ProblemType::single_label
                  : ProblemType::multi_label;
  }
  if (problem == ProblemType::single_label) {
    TORCH_CHECK_VALUE(labels.numel() == logits.size(0), "classification_loss: labels must be one a row, ",
                      logits.size(0), " of them, but got ", internal::shape_text(labels.sizes()));
    return at::cross_entropy_loss(logits, labels.reshape(-1).to(torch::kLong));
  }
  const bool one_a_row = problem == ProblemType::regression && count == 1;
  TORCH_CHECK_VALUE(one_a_row ? labels.numel() == logits.numel() : labels.sizes() == logits.sizes(),
                    "classification_loss: labels must have the shape of the logits, ",
                    internal::shape_text(logits.sizes()), ", but got ", internal::shape_text(labels.sizes()));
  // Labels are not rounded to a half type of the logits.
  const auto type = labels.is_floating_point() ? at::promote_types(logits.scalar_type(), labels.scalar_type())
                                               : logits.scalar_type();
  const auto given = logits.to(type), targets = labels.to(type).reshape(logits.sizes());
  return problem == ProblemType::regression ? at::mse_loss(given, targets)
                                            : at::binary_cross_entropy_with_logits(given, targets);
}

/// The loss transformers' token classifiers compute: the mean cross entropy over the tokens whose label is
/// not −100. Shapes: logits (batch, time, labels); labels (batch, time).
/// Throws: c10::ValueError for labels of another shape, and for those that are no label of the head.
inline Tensor token_loss(const Tensor& logits, const Tensor& labels) {
  const auto type = labels.scalar_type();
  TORCH_CHECK_VALUE(type == torch::kLong || type == torch::kInt,
                    "token_loss: labels must be whole numbers (int64), but got ", c10::toString(type));
  TORCH_CHECK_VALUE(labels.sizes() == logits.sizes().slice(0, 2), "token_loss: labels must be one a token, ",
                    internal::shape_text(logits.sizes().slice(0, 2)), ", but got ",
                    internal::shape_text(labels.sizes()),
                    " (hint: padding and the virtual tokens of a prompt have the label -100)");
  if (labels.is_cpu()) {  // asking a device would make it wait
    const auto count = logits.size(2);
    const auto wrong = labels.masked_select((labels.lt(0) & labels.ne(-100)) | labels.ge(count));
    TORCH_CHECK_VALUE(wrong.numel() == 0, "token_loss: labels must be from 0 to ", count - 1,
                      ", or -100, but got ", wrong.numel() ? wrong[0].item<int64_t>() : 0);
  }
  return at::cross_entropy_loss(logits.flatten(0, 1), labels.flatten().to(torch::kLong));
}

/// The loss transformers' question answerers compute: the mean of the cross entropies of the answer's first
/// and last token among the text's. A position that is not in the text is ignored: those past its end, and
/// below 0 it is the first token. Shapes: logits (batch, time); positions (batch) or (batch, 1).
/// Throws: c10::ValueError for positions that are not one whole number a row.
inline Tensor span_loss(const Tensor& start_logits, const Tensor& end_logits, const Tensor& start_positions,
                        const Tensor& end_positions) {
  const auto time = start_logits.size(1);
  const auto of = [time](const Tensor& logits, const Tensor& positions, const char* name) {
    TORCH_CHECK_VALUE(
        positions.numel() == logits.size(0) && at::isIntegralType(positions.scalar_type(), false),
        "span_loss: ", name, " must be one whole number a row, ", logits.size(0), " of them, but got ",
        c10::toString(positions.scalar_type()), " ", peft::internal::shape_text(positions.sizes()));
    return at::cross_entropy_loss(logits, positions.reshape(-1).to(torch::kLong).clamp(0, time),
                                  /*weight=*/{}, at::Reduction::Mean, /*ignore_index=*/time);
  };
  return (of(start_logits, start_positions, "start_positions") +
          of(end_logits, end_positions, "end_positions")) /
         2;
}

}  // namespace models
}  // namespace peft
