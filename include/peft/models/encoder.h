// What the families of encoders share: activation functions, the attention bias, pooling, classification
// losses.
#pragma once

#include "peft/core/adapted.h"
#include "peft/core/attention.h"
#include "peft/core/compat.h"
#include "peft/core/problems.h"

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace peft {
namespace internal {

/// A Linear whose values are not set yet: nothing is drawn, so a clone leaves the generator alone, and memory
/// that a checkpoint will replace is never touched.
inline Linear unset_linear(int64_t in, int64_t out) {
  nn::Linear layer(nn::LinearOptions(1, 0));
  layer->options = nn::LinearOptions(in, out);
  layer->weight.set_data(torch::empty({out, in}));
  layer->bias.set_data(torch::empty({out}));
  return Linear(layer);
}

/// The same for an Embedding.
inline Embedding unset_embedding(const nn::EmbeddingOptions& options) {
  nn::Embedding layer(nn::EmbeddingOptions(0, 1));
  layer->options = options;
  layer->weight.set_data(torch::empty({options.num_embeddings(), options.embedding_dim()}));
  return Embedding(layer);
}

/// The initial values transformers gives a module and the sites below it, in its order of draws: N(0, range²)
/// for the weights of linear layers and embeddings, 0 for biases and the padding's row. Norms are built with
/// theirs, 1 and 0.
inline void initialize(nn::Module& module, double range) {
  torch::NoGradGuard no_grad;
  const auto draw = [range](Tensor weight) {
    // Drawn in float32, so that the values do not depend on the type but for their rounding.
    weight.copy_(torch::empty(weight.sizes(), torch::kFloat32).normal_(0.0, range));
  };
  const auto fill = [&draw](nn::Module& site) {
    if (auto* linear = site.as<AdaptedImpl<nn::Linear>>()) {
      draw(linear->base->weight);
      linear->base->bias.zero_();
    } else if (auto* embedding = site.as<AdaptedImpl<nn::Embedding>>()) {
      draw(embedding->base->weight);
      const auto padding = embedding->base->options.padding_idx();
      if (padding) embedding->base->weight[*padding].zero_();
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

/// A function of each element.
using ActivationFunction = Tensor (*)(const Tensor&);

/// The activation functions by the names they have in a Hugging Face config.
inline const std::map<std::string, ActivationFunction>& activation_functions() {
  static constexpr auto gelu = +[](const Tensor& x) { return at::gelu(x); };
  static constexpr auto gelu_tanh = +[](const Tensor& x) { return at::gelu(x, "tanh"); };
  static constexpr auto silu = +[](const Tensor& x) { return at::silu(x); };
  static const std::map<std::string, ActivationFunction> known{
      {"gelu", gelu},
      {"gelu_10", [](const Tensor& x) { return at::gelu(x).clamp(-10, 10); }},
      {"gelu_fast", gelu_tanh},
      {"gelu_new", gelu_tanh},
      {"gelu_python", gelu},
      {"gelu_pytorch_tanh", gelu_tanh},
      {"gelu_python_tanh", gelu_tanh},
      {"hardswish", [](const Tensor& x) { return at::hardswish(x); }},
      {"leaky_relu", [](const Tensor& x) { return at::leaky_relu(x); }},
      {"linear", [](const Tensor& x) { return x; }},
      {"mish", [](const Tensor& x) { return at::mish(x); }},
      {"quick_gelu", [](const Tensor& x) { return x * at::sigmoid(x * 1.702); }},
      {"relu", [](const Tensor& x) { return at::relu(x); }},
      {"relu2", [](const Tensor& x) { return at::relu(x).square(); }},
      {"relu6", [](const Tensor& x) { return at::clamp(x, 0, 6); }},
      {"sigmoid", [](const Tensor& x) { return at::sigmoid(x); }},
      {"silu", silu},
      {"swish", silu},
      {"tanh", [](const Tensor& x) { return at::tanh(x); }},
  };
  return known;
}

/// One of them. Throws: c10::ValueError listing the names, for an unknown one.
inline ActivationFunction activation_function(const std::string& name) {
  const auto& known = activation_functions();
  const auto found = known.find(name);
  if (found != known.end()) return found->second;
  std::vector<std::string> names;
  for (const auto& [key, function] : known) names.push_back(key);
  TORCH_CHECK_VALUE(false, "activation_function: no activation '", name, "'; there are ",
                    peft::internal::closest(name, names, names.size()));
}

/// The mean of the hidden states of real tokens: one vector a row.
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
  const auto targets = labels.to(logits.scalar_type()).reshape(logits.sizes());
  return problem == ProblemType::regression ? at::mse_loss(logits, targets)
                                            : at::binary_cross_entropy_with_logits(logits, targets);
}

}  // namespace models
}  // namespace peft
