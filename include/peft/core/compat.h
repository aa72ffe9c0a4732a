// Compatibility: the one place where two versions of LibTorch are told apart.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <torch/version.h>

#include <ATen/autocast_mode.h>
#include <type_traits>
#if TORCH_VERSION_MAJOR < 2
#include <ATen/ops/_scaled_dot_product_attention.h>
#else
#include <ATen/ops/scaled_dot_product_attention.h>
#endif

/// Parameter-efficient fine-tuning of LibTorch modules.
namespace peft {

namespace nn = torch::nn;
using torch::Tensor;

namespace internal {

template <class Result, class Class, class Argument>
Argument argument_of(Result (Class::*)(Argument) const);

/// `c10::optional<Device>` before LibTorch 2, `std::optional<Device>` after: whatever `Module::clone` takes.
using OptionalDevice = std::remove_cvref_t<decltype(argument_of(&nn::Module::clone))>;

/// softmax(q kᵀ / sqrt(width) + bias) v with dropout on the probabilities.
/// Shapes: q, k, v (batch, heads, time, width); bias broadcastable to (batch, heads, query, key) or
/// undefined.
inline Tensor scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& bias, double dropout, bool causal) {
#if TORCH_VERSION_MAJOR < 2
  // 1.13's private form takes the bias as a c10::optional and refuses it together with `causal`.
  c10::optional<Tensor> mask;
  if (bias.defined()) mask = bias;
  return std::get<0>(
      at::_scaled_dot_product_attention(q, k, v, mask, dropout, /*need_attn_weights=*/false, causal));
#else
  std::optional<Tensor> mask;
  if (bias.defined()) mask = bias;
  return at::scaled_dot_product_attention(q, k, v, mask, dropout, causal);
#endif
}

/// Turns autocast on or off for one kind of device and returns what it was.
inline bool set_autocast(torch::DeviceType device, bool enabled) {
#if TORCH_VERSION_MAJOR < 2
  const bool cpu = device == torch::kCPU;
  const bool before = cpu ? at::autocast::is_cpu_enabled() : at::autocast::is_enabled();
  cpu ? at::autocast::set_cpu_enabled(enabled) : at::autocast::set_enabled(enabled);
#else
  const bool before = at::autocast::is_autocast_enabled(device);
  at::autocast::set_autocast_enabled(device, enabled);
#endif
  return before;
}

/// Sets the type autocast computes in on one kind of device and returns what it was.
inline torch::ScalarType set_autocast_dtype(torch::DeviceType device, torch::ScalarType dtype) {
#if TORCH_VERSION_MAJOR < 2
  const bool cpu = device == torch::kCPU;
  const auto before = cpu ? at::autocast::get_autocast_cpu_dtype() : at::autocast::get_autocast_gpu_dtype();
  cpu ? at::autocast::set_autocast_cpu_dtype(dtype) : at::autocast::set_autocast_gpu_dtype(dtype);
#else
  const auto before = at::autocast::get_autocast_dtype(device);
  at::autocast::set_autocast_dtype(device, dtype);
#endif
  return before;
}

}  // namespace internal
}  // namespace peft
