// Workspace: memory that a kernel needs only while it runs, kept for the next one.
#pragma once

#include <cstdint>

#include "peft/core/compat.h"

namespace peft::internal {

/// What a kernel's temporary is for: a kernel may hold one of each.
enum class Scratch { dropped, update, merged };

/// An unfilled matrix, for use until the kernel that asks for it returns: the next one asking for the same
/// purpose gets the same memory. A thread's own, up to 64 MiB a purpose, for on the CPU fresh pages can cost
/// as much as what is computed in them; GPU memory is kept by LibTorch already.
template <Scratch purpose>
Tensor workspace(int64_t rows, int64_t columns, const Tensor& like) {
  const auto count = rows * columns;
  constexpr int64_t limit = int64_t{64} << 20;
  if (!like.is_cpu() || count * static_cast<int64_t>(like.element_size()) > limit) {
    return at::empty({rows, columns}, like.options());
  }
  static thread_local Tensor kept;
  if (!kept.defined() || kept.scalar_type() != like.scalar_type() || kept.numel() < count) {
    kept = at::empty({count}, like.options().requires_grad(false));
  }
  return kept.as_strided({rows, columns}, {columns, 1});
}

}  // namespace peft::internal
