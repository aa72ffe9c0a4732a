// Blocks: a long range of weights in pieces that threads take in turn.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "peft/core/compat.h"

namespace peft::internal {

/// Weights a thread takes at a time. Results do not depend on the number of threads.
inline constexpr int64_t block_size = 16384;

/// Calls `work(block, begin, count)` over [0, count), in parallel.
template <class Work>
void over_blocks(int64_t count, const Work& work) {
  at::parallel_for(0, (count + block_size - 1) / block_size, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * block_size;
      work(block, begin, std::min(block_size, count - begin));
    }
  });
}

/// True where kernels over plain pointers apply: float and double on the CPU; elsewhere composed forms do.
inline bool has_loop(const Tensor& values) {
  return values.is_cpu() && (values.scalar_type() == torch::kFloat || values.scalar_type() == torch::kDouble);
}

}  // namespace peft::internal
