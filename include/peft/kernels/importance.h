// Importance: the smoothed sensitivity of weights and its uncertainty, in one pass, and means of their
// products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "peft/kernels/blocks.h"
#include "peft/kernels/cpu.h"

namespace peft::internal {

/// I = |p g·scale|, S ← β1 S + (1−β1) I, U ← β2 U + (1−β2) |I − S|.
struct ImportanceSettings {
  double beta1 = 0.85, beta2 = 0.85;
};

/// The constants in the type they are used in.
template <class T>
struct ImportanceConstants {
  ImportanceConstants(const ImportanceSettings& settings, double scale)
      : gradient_scale(static_cast<T>(scale)),
        beta1(static_cast<T>(settings.beta1)),
        beta2(static_cast<T>(settings.beta2)),
        rest1(static_cast<T>(1 - settings.beta1)),
        rest2(static_cast<T>(1 - settings.beta2)) {}
  T gradient_scale, beta1, beta2, rest1, rest2;
};

/// The definition; sums of products are rounded once, as the vectors' are.
template <class T>
void importance_loop(const T* p, const T* g, T* s, T* u, int64_t count, const ImportanceConstants<T>& c) {
  for (int64_t i = 0; i < count; ++i) {
    const T now = std::abs(p[i] * (g[i] * c.gradient_scale));
    s[i] = std::fma(now, c.rest1, s[i] * c.beta1);
    u[i] = std::fma(std::abs(now - s[i]), c.rest2, u[i] * c.beta2);
  }
}

#if PEFT_HAS_AVX
__attribute__((target("avx2,fma"))) inline void importance_avx2(const float* p, const float* g, float* s,
                                                                float* u, int64_t count,
                                                                const ImportanceConstants<float>& c) {
  const __m256 scale = _mm256_set1_ps(c.gradient_scale), beta1 = _mm256_set1_ps(c.beta1),
               beta2 = _mm256_set1_ps(c.beta2), rest1 = _mm256_set1_ps(c.rest1),
               rest2 = _mm256_set1_ps(c.rest2), sign = _mm256_set1_ps(-0.0F);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 gradient = _mm256_mul_ps(_mm256_loadu_ps(g + i), scale);
    const __m256 now = _mm256_andnot_ps(sign, _mm256_mul_ps(_mm256_loadu_ps(p + i), gradient));
    const __m256 mean = _mm256_fmadd_ps(now, rest1, _mm256_mul_ps(_mm256_loadu_ps(s + i), beta1));
    const __m256 distance = _mm256_andnot_ps(sign, _mm256_sub_ps(now, mean));
    _mm256_storeu_ps(s + i, mean);
    _mm256_storeu_ps(u + i, _mm256_fmadd_ps(distance, rest2, _mm256_mul_ps(_mm256_loadu_ps(u + i), beta2)));
  }
  importance_loop(p + i, g + i, s + i, u + i, count - i, c);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline void importance_avx512(
    const float* p, const float* g, float* s, float* u, int64_t count, const ImportanceConstants<float>& c) {
  const __m512 scale = _mm512_set1_ps(c.gradient_scale), beta1 = _mm512_set1_ps(c.beta1),
               beta2 = _mm512_set1_ps(c.beta2), rest1 = _mm512_set1_ps(c.rest1),
               rest2 = _mm512_set1_ps(c.rest2), sign = _mm512_set1_ps(-0.0F);
  for (int64_t i = 0; i < count; i += 16) {
    const auto mask = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    const __m512 gradient = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, g + i), scale);
    const __m512 now = _mm512_andnot_ps(sign, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, p + i), gradient));
    const __m512 mean = _mm512_fmadd_ps(now, rest1, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, s + i), beta1));
    const __m512 distance = _mm512_andnot_ps(sign, _mm512_sub_ps(now, mean));
    _mm512_mask_storeu_ps(s + i, mask, mean);
    _mm512_mask_storeu_ps(
        u + i, mask,
        _mm512_fmadd_ps(distance, rest2, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, u + i), beta2)));
  }
}
#endif

/// Smooths `count` values: p weights, g their gradients, s and u what is kept of them.
template <class T>
void smooth_importance([[maybe_unused]] CpuLevel level, const T* p, const T* g, T* s, T* u, int64_t count,
                       const ImportanceConstants<T>& c) {
#if PEFT_HAS_AVX
  if constexpr (std::is_same_v<T, float>) {
    if (level == CpuLevel::avx512) return importance_avx512(p, g, s, u, count, c);
    if (level == CpuLevel::avx2) return importance_avx2(p, g, s, u, count, c);
  }
#endif
  importance_loop(p, g, s, u, count, c);
}

/// sums[i mod `size`] ← sums[i mod `size`] + s[i] u[i]; `size`: a multiple of 16.
template <class T>
void add_products_loop(const T* s, const T* u, int64_t count, T* sums, int64_t size) {
  for (int64_t i = 0; i < count; i += size) {
    const int64_t round = std::min(size, count - i);
    for (int64_t k = 0; k < round; ++k) sums[k] = std::fma(s[i + k], u[i + k], sums[k]);
  }
}

#if PEFT_HAS_AVX
__attribute__((target("avx2,fma"))) inline void add_products_avx2(const float* s, const float* u,
                                                                  int64_t count, float* sums, int64_t size) {
  int64_t i = 0;
  for (; i + size <= count; i += size) {
    for (int64_t k = 0; k < size; k += 8) {
      _mm256_storeu_ps(sums + k, _mm256_fmadd_ps(_mm256_loadu_ps(s + i + k), _mm256_loadu_ps(u + i + k),
                                                 _mm256_loadu_ps(sums + k)));
    }
  }
  add_products_loop(s + i, u + i, count - i, sums, size);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline void add_products_avx512(
    const float* s, const float* u, int64_t count, float* sums, int64_t size) {
  int64_t i = 0;
  for (; i + size <= count; i += size) {
    for (int64_t k = 0; k < size; k += 16) {
      _mm512_storeu_ps(sums + k, _mm512_fmadd_ps(_mm512_loadu_ps(s + i + k), _mm512_loadu_ps(u + i + k),
                                                 _mm512_loadu_ps(sums + k)));
    }
  }
  add_products_loop(s + i, u + i, count - i, sums, size);
}
#endif

/// Adds to means[k], k < `columns`, the mean of s u over column k of matrices of `count` elements, row by
/// row. Many sums at a time, for speed and small roundings; the same at every level. `sums`: memory.
template <class T>
void add_product_means([[maybe_unused]] CpuLevel level, const T* s, const T* u, int64_t count,
                       int64_t columns, T* means, std::vector<T>& sums) {
  const int64_t size = columns * (columns < 4 ? 64 : 16);
  sums.assign(static_cast<size_t>(size), 0);
  const auto run = [&] {
#if PEFT_HAS_AVX
    if constexpr (std::is_same_v<T, float>) {
      if (level == CpuLevel::avx512) return add_products_avx512(s, u, count, sums.data(), size);
      if (level == CpuLevel::avx2) return add_products_avx2(s, u, count, sums.data(), size);
    }
#endif
    add_products_loop(s, u, count, sums.data(), size);
  };
  run();
  T* left = sums.data();
  for (int64_t half = size / 2; half >= columns; half /= 2) {
    for (int64_t k = 0; k < half; ++k) left[k] += left[k + half];
  }
  for (int64_t k = 0; k < columns; ++k) means[k] += left[k] / static_cast<T>(count / columns);
}

/// `smooth_importance` in tensor operations, for other types and devices. `scale`: a scalar; undefined
/// means 1.
inline void smooth_importance(const Tensor& values, const Tensor& gradients, const Tensor& sensitivity,
                              const Tensor& uncertainty, const ImportanceSettings& settings,
                              const Tensor& scale) {
  const auto gradient = scale.defined() ? gradients * scale.to(gradients.options()) : gradients;
  const auto now = (values * gradient).abs_();
  sensitivity.mul_(settings.beta1).add_(now, 1 - settings.beta1);
  uncertainty.mul_(settings.beta2).add_((now - sensitivity).abs_(), 1 - settings.beta2);
}

}  // namespace peft::internal
