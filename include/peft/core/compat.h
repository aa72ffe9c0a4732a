// Compatibility: the one place where two versions of LibTorch are told apart.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <torch/version.h>

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/function.h>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#if TORCH_VERSION_MAJOR < 2
#include <ATen/ops/_scaled_dot_product_attention.h>
#else
#include <ATen/ops/_fused_adamw.h>
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

/// A node of the autograd graph, in the pointer that edges hold it in: a shared one with a deleter of its own
/// in LibTorch 1.13, an intrusive one in later versions.
template <class Node, class... Arguments>
auto make_node(Arguments&&... arguments) {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // By argument-dependent lookup, because later versions have no such function.
    const auto destroy = [](auto* node) { deleteNode(node); };
    return std::shared_ptr<Node>(new Node(std::forward<Arguments>(arguments)...), destroy);
  } else {
    return c10::make_intrusive<Node>(std::forward<Arguments>(arguments)...);
  }
}

/// One step of `torch.optim.AdamW(fused=True, capturable=True)` over weights on a GPU, in one kernel; `lr`
/// and `step` are scalars in float there. False where this LibTorch (before 2.4) or device has none.
inline bool fused_adamw(const Tensor& values, const Tensor& gradients, const Tensor& exp_avg,
                        const Tensor& exp_avg_sq, const Tensor& lr, const Tensor& step, double beta1,
                        double beta2, double eps, double weight_decay) {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 4)
  if (!values.is_cuda()) return false;
  at::_fused_adamw_({values}, {gradients}, {exp_avg}, {exp_avg_sq}, {}, {step}, lr, beta1, beta2,
                    weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  return true;
#else
  static_cast<void>(
      std::tie(values, gradients, exp_avg, exp_avg_sq, lr, step, beta1, beta2, eps, weight_decay));
  return false;
#endif
}

/// True while operations on this kind of device are cast automatically.
inline bool autocasts(torch::DeviceType device) {
  const auto key = device == torch::kCPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;
  return !c10::impl::tls_is_dispatch_key_excluded(key);
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
