// ActivationFunction: the functions of each element that models and adapters name in their configs.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "peft/core/compat.h"
#include "peft/core/problems.h"

namespace peft {

/// A function of each element.
using ActivationFunction = Tensor (*)(const Tensor&);

/// The activation functions by the names they have in a Hugging Face config; "leakyrelu" is AdapterHub's.
/// Those with tensors of their own ("prelu", "xielu") are not among them.
inline const std::map<std::string, ActivationFunction>& activation_functions() {
  static constexpr auto gelu = +[](const Tensor& x) { return at::gelu(x); };
  static constexpr auto gelu_tanh = +[](const Tensor& x) { return at::gelu(x, "tanh"); };
  static constexpr auto leaky_relu = +[](const Tensor& x) { return at::leaky_relu(x); };
  static constexpr auto silu = +[](const Tensor& x) { return at::silu(x); };
  static constexpr auto laplace =
      +[](const Tensor& x) { return 0.5 * (1 + at::erf((x - 0.707107) / (0.282095 * std::sqrt(2.0)))); };
  static const std::map<std::string, ActivationFunction> known{
      {"gelu", gelu},
      {"gelu_10", [](const Tensor& x) { return at::gelu(x).clamp(-10, 10); }},
      {"gelu_accurate", gelu_tanh},
      {"gelu_fast", gelu_tanh},
      {"gelu_new", gelu_tanh},
      {"gelu_python", gelu},
      {"gelu_pytorch_tanh", gelu_tanh},
      {"gelu_python_tanh", gelu_tanh},
      {"hardswish", [](const Tensor& x) { return at::hardswish(x); }},
      {"laplace", laplace},
      {"leaky_relu", leaky_relu},
      {"leakyrelu", leaky_relu},
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
  std::vector<std::string> names;
  if (found == known.end()) {
    for (const auto& [key, function] : known) names.push_back(key);
  }
  TORCH_CHECK_VALUE(found != known.end(), "activation_function: no activation '", name, "'; there are ",
                    internal::closest(name, names, names.size()));
  return found->second;
}

}  // namespace peft
