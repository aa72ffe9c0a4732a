// CUDA graphs: what host code must know of them. See `AdamW::capturable`.
#pragma once

#include <c10/core/impl/VirtualGuardImpl.h>

#include "peft/core/compat.h"

namespace peft::internal {

/// Where a forward draws the numbers that decide about a tensor: on the CPU, as the references do, but for a
/// tensor on a GPU there: nobody waits, and a CUDA graph draws anew in every replay.
inline torch::Device device_of_draws(const Tensor& like) {
  return like.is_cuda() ? like.device() : torch::Device(torch::kCPU);
}

/// True while what runs on a GPU's current stream is recorded into a CUDA graph; false too where this
/// LibTorch cannot tell.
inline bool is_capturing(torch::Device device) {
  if (!device.is_cuda()) return false;
  const c10::impl::VirtualGuardImpl gpu(device.type());
  const auto ask = [device](const auto& guard) {
    if constexpr (requires { guard.isStreamCapturing(guard.getStream(device)); }) {
      return guard.isStreamCapturing(guard.getStream(device));
    } else {
      return false;
    }
  };
  return ask(gpu);
}

}  // namespace peft::internal
