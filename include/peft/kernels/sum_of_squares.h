// Sum of squares: the norm of gradients in one pass.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "peft/kernels/blocks.h"
#include "peft/kernels/cpu.h"

namespace peft::internal {

/// A sum is kept in 32 parts, of the elements with one remainder, in double: there a float's square is exact,
/// so the vectors' sums are those of the plain loop bit for bit.
using SquareLanes = std::array<double, 32>;

template <class T>
void add_squares_loop(const T* x, int64_t count, SquareLanes& lanes) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<double>(x[i]);
    lanes[static_cast<size_t>(i % 32)] += value * value;
  }
}

#if PEFT_HAS_AVX
__attribute__((target("avx2,fma"))) inline void add_squares_avx2(const float* x, int64_t count,
                                                                 SquareLanes& lanes) {
  __m256d sums[8];
  PEFT_UNROLLED for (int k = 0; k < 8; ++k) sums[k] = _mm256_setzero_pd();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    PEFT_UNROLLED for (int k = 0; k < 8; ++k) {
      const __m256d wide = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * k));
      sums[k] = _mm256_fmadd_pd(wide, wide, sums[k]);
    }
  }
  PEFT_UNROLLED for (size_t k = 0; k < 8; ++k) _mm256_storeu_pd(lanes.data() + 4 * k, sums[k]);
  add_squares_loop(x + i, count - i, lanes);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline void add_squares_avx512(
    const float* x, int64_t count, SquareLanes& lanes) {
  __m512d sums[4];
  PEFT_UNROLLED for (int k = 0; k < 4; ++k) sums[k] = _mm512_setzero_pd();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    PEFT_UNROLLED for (int k = 0; k < 4; ++k) {
      const __m512d wide = _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x + i + 8 * k));
      sums[k] = _mm512_fmadd_pd(wide, wide, sums[k]);
    }
  }
  PEFT_UNROLLED for (size_t k = 0; k < 4; ++k) _mm512_storeu_pd(lanes.data() + 8 * k, sums[k]);
  add_squares_loop(x + i, count - i, lanes);
}
#endif

template <class T>
void add_squares([[maybe_unused]] CpuLevel level, const T* x, int64_t count, SquareLanes& lanes) {
#if PEFT_HAS_AVX
  if constexpr (std::is_same_v<T, float>) {
    if (level == CpuLevel::avx512) return add_squares_avx512(x, count, lanes);
    if (level == CpuLevel::avx2) return add_squares_avx2(x, count, lanes);
  }
#endif
  add_squares_loop(x, count, lanes);
}

/// Σ x² of `count` elements.
template <class T>
double sum_of_squares(const T* x, int64_t count) {
  std::vector<double> partial(static_cast<size_t>((count + block_size - 1) / block_size));
  const auto level = cpu_level();
  over_blocks(count, [&](int64_t block, int64_t begin, int64_t size) {
    SquareLanes lanes{};
    add_squares(level, x + begin, size, lanes);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    partial[static_cast<size_t>(block)] = sum;
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  return sum;
}

/// Σ x² of a tensor for which `has_loop` says no: a scalar on its device, in float or wider.
inline Tensor sum_of_squares(const Tensor& x) {
  const auto type = x.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  return torch::linalg_vector_norm(x, 2, c10::nullopt, false, type).square();
}

}  // namespace peft::internal
