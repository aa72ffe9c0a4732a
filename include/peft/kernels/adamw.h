// AdamW: one pass over a contiguous range of weights, gradients and moments.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "peft/core/compat.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PEFT_ADAMW_AVX2 1
#include <immintrin.h>
#else
#define PEFT_ADAMW_AVX2 0
#endif

namespace peft {

/// Which AdamW.
enum class AdamWForm {
  torch,        ///< `torch::optim::AdamW`: weight decay before the update, ε outside the bias correction
  transformers  ///< transformers' former `AdamW`: weight decay after the update, ε inside
};

namespace internal {

/// What one update needs beside the tensors.
struct AdamWSettings {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
  AdamWForm form = AdamWForm::torch;
};

/// The constants of one update in the type it is computed in:
/// m ← β1 m + (1−β1) g, v ← β2 v + (1−β2) g², p ← p·before − size·m/(√v/root + ε), p ← p + after·p.
template <class T>
struct AdamWConstants {
  AdamWConstants(const AdamWSettings& settings, int64_t step, double scale) {
    const auto t = static_cast<double>(step);
    const double correction1 = 1 - std::pow(settings.beta1, t);
    const double correction2 = std::sqrt(1 - std::pow(settings.beta2, t));
    const double decay = settings.lr * settings.weight_decay;
    const bool torch_form = settings.form == AdamWForm::torch;
    gradient_scale = static_cast<T>(scale);
    beta1 = static_cast<T>(settings.beta1);
    beta2 = static_cast<T>(settings.beta2);
    rest1 = static_cast<T>(1 - settings.beta1);
    rest2 = static_cast<T>(1 - settings.beta2);
    eps = static_cast<T>(settings.eps);
    root = static_cast<T>(torch_form ? correction2 : 1.0);
    minus_size = static_cast<T>(-settings.lr * (torch_form ? 1.0 : correction2) / correction1);
    before = static_cast<T>(torch_form ? 1 - decay : 1.0);
    after = static_cast<T>(torch_form ? 0.0 : -decay);
  }
  T gradient_scale, beta1, beta2, rest1, rest2, eps, root, minus_size, before, after;
};

template <class T>
void adamw_loop(T* p, const T* g, T* m, T* v, int64_t count, const AdamWConstants<T>& c) {
  for (int64_t i = 0; i < count; ++i) {
    const T gradient = g[i] * c.gradient_scale;
    m[i] = m[i] * c.beta1 + c.rest1 * gradient;
    v[i] = v[i] * c.beta2 + c.rest2 * gradient * gradient;
    const T updated = p[i] * c.before + c.minus_size * m[i] / (std::sqrt(v[i]) / c.root + c.eps);
    p[i] = updated + c.after * updated;
  }
}

template <class T>
double sum_of_squares_loop(const T* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

#if PEFT_ADAMW_AVX2
inline bool adamw_has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}

// By hand because compilers do not vectorise a square root that may set errno. The tail rounds as the vectors
// do, so that a weight's update does not depend on where it lies.
__attribute__((target("avx2,fma"))) inline void adamw_avx2(float* p, const float* g, float* m, float* v,
                                                           int64_t count, const AdamWConstants<float>& c) {
  const __m256 scale = _mm256_set1_ps(c.gradient_scale), beta1 = _mm256_set1_ps(c.beta1),
               beta2 = _mm256_set1_ps(c.beta2), rest1 = _mm256_set1_ps(c.rest1),
               rest2 = _mm256_set1_ps(c.rest2), eps = _mm256_set1_ps(c.eps), root = _mm256_set1_ps(c.root),
               size = _mm256_set1_ps(c.minus_size), before = _mm256_set1_ps(c.before),
               after = _mm256_set1_ps(c.after);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 gradient = _mm256_mul_ps(_mm256_loadu_ps(g + i), scale);
    const __m256 mean = _mm256_fmadd_ps(gradient, rest1, _mm256_mul_ps(_mm256_loadu_ps(m + i), beta1));
    const __m256 square = _mm256_fmadd_ps(_mm256_mul_ps(rest2, gradient), gradient,
                                          _mm256_mul_ps(_mm256_loadu_ps(v + i), beta2));
    const __m256 denominator = _mm256_add_ps(_mm256_div_ps(_mm256_sqrt_ps(square), root), eps);
    const __m256 change = _mm256_div_ps(_mm256_mul_ps(size, mean), denominator);
    const __m256 updated = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(p + i), before), change);
    _mm256_storeu_ps(m + i, mean);
    _mm256_storeu_ps(v + i, square);
    _mm256_storeu_ps(p + i, _mm256_fmadd_ps(updated, after, updated));
  }
  if (i == count) return;
  alignas(32) float rest[4][8] = {};
  const auto left = static_cast<size_t>(count - i);
  std::copy_n(p + i, left, rest[0]);
  std::copy_n(g + i, left, rest[1]);
  std::copy_n(m + i, left, rest[2]);
  std::copy_n(v + i, left, rest[3]);
  adamw_avx2(rest[0], rest[1], rest[2], rest[3], 8, c);
  std::copy_n(rest[0], left, p + i);
  std::copy_n(rest[2], left, m + i);
  std::copy_n(rest[3], left, v + i);
}

__attribute__((target("avx2,fma"))) inline double sum_of_squares_avx2(const float* x, int64_t count) {
  __m256d sums[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t half = 0; half < 2; ++half) {
      const __m256d wide = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * half));
      sums[half] = _mm256_fmadd_pd(wide, wide, sums[half]);
    }
  }
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, _mm256_add_pd(sums[0], sums[1]));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + sum_of_squares_loop(x + i, count - i);
}
#endif

template <class T>
void adamw_range(T* p, const T* g, T* m, T* v, int64_t count, const AdamWConstants<T>& c) {
#if PEFT_ADAMW_AVX2
  if constexpr (std::is_same_v<T, float>) {
    if (adamw_has_avx2()) return adamw_avx2(p, g, m, v, count, c);
  }
#endif
  adamw_loop(p, g, m, v, count, c);
}

template <class T>
double sum_of_squares_range(const T* x, int64_t count) {
#if PEFT_ADAMW_AVX2
  if constexpr (std::is_same_v<T, float>) {
    if (adamw_has_avx2()) return sum_of_squares_avx2(x, count);
  }
#endif
  return sum_of_squares_loop(x, count);
}

/// Weights a thread takes at a time. Results do not depend on the number of threads.
inline constexpr int64_t adamw_block = 16384;

/// Calls `work(block, begin, count)` over [0, count), in parallel.
template <class Work>
void over_blocks(int64_t count, const Work& work) {
  at::parallel_for(0, (count + adamw_block - 1) / adamw_block, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * adamw_block;
      work(block, begin, std::min(adamw_block, count - begin));
    }
  });
}

/// True where the loops above apply; elsewhere the composed form does.
inline bool has_adamw_loop(const Tensor& values) {
  return values.is_cpu() && (values.scalar_type() == torch::kFloat || values.scalar_type() == torch::kDouble);
}

/// Σ x² of a contiguous range: a scalar in double on the CPU for float and double, else on the
/// device, in float or wider.
inline Tensor sum_of_squares(const Tensor& x) {
  if (!has_adamw_loop(x)) {
    return torch::linalg_vector_norm(x, 2, c10::nullopt, false,
                                     x.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat)
        .square();
  }
  std::vector<double> partial(static_cast<size_t>((x.numel() + adamw_block - 1) / adamw_block));
  const auto run = [&](const auto* data) {
    over_blocks(x.numel(), [&](int64_t block, int64_t begin, int64_t count) {
      partial[static_cast<size_t>(block)] = sum_of_squares_range(data + begin, count);
    });
  };
  x.scalar_type() == torch::kFloat ? run(x.data_ptr<float>()) : run(x.data_ptr<double>());
  double sum = 0;
  for (const double part : partial) sum += part;
  return torch::scalar_tensor(sum, torch::kDouble);
}

/// One update of a contiguous range in place: weights, first and second moments. `step` counts from 1.
/// `scale`: what the gradients are multiplied with, a scalar tensor; undefined means 1.
inline void adamw(const Tensor& values, const Tensor& gradients, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const AdamWSettings& settings, int64_t step,
                  const Tensor& scale) {
  if (has_adamw_loop(values)) {
    const double factor = scale.defined() ? scale.item<double>() : 1.0;
    const auto run = [&]<class T>(T* p) {
      const AdamWConstants<T> constants(settings, step, factor);
      const T* g = gradients.data_ptr<T>();
      T* m = exp_avg.data_ptr<T>();
      T* v = exp_avg_sq.data_ptr<T>();
      over_blocks(values.numel(), [&](int64_t, int64_t begin, int64_t count) {
        adamw_range(p + begin, g + begin, m + begin, v + begin, count, constants);
      });
    };
    values.scalar_type() == torch::kFloat ? run(values.data_ptr<float>()) : run(values.data_ptr<double>());
    return;
  }
  const AdamWConstants<double> c(settings, step, 1.0);
  const auto gradient = scale.defined() ? gradients.mul(scale) : gradients;
  if (c.before != 1) values.mul_(c.before);
  exp_avg.mul_(c.beta1).add_(gradient, c.rest1);
  exp_avg_sq.mul_(c.beta2).addcmul_(gradient, gradient, c.rest2);
  auto denominator = exp_avg_sq.sqrt();
  if (c.root != 1) denominator.div_(c.root);
  values.addcdiv_(exp_avg, denominator.add_(c.eps), c.minus_size);
  if (c.after != 0) values.add_(values, c.after);
}

}  // namespace internal
}  // namespace peft
