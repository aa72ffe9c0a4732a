// AdamW: one pass over a contiguous range of weights, gradients and moments.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "peft/core/compat.h"
#include "peft/kernels/blocks.h"
#include "peft/kernels/cpu.h"

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
/// m ← β1 m + (1−β1) g, v ← β2 v + (1−β2) g², p ← p·before + size·m/(√v·inverse_root + ε), p ← p + after·p.
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
    inverse_root = static_cast<T>(torch_form ? 1 / correction2 : 1.0);
    size = static_cast<T>(-settings.lr * (torch_form ? 1.0 : correction2) / correction1);
    before = static_cast<T>(torch_form ? 1 - decay : 1.0);
    after = static_cast<T>(torch_form ? 0.0 : -decay);
  }
  T gradient_scale, beta1, beta2, rest1, rest2, eps, inverse_root, size, before, after;
};

/// The definition. Every sum of a product is rounded once, so that the vectors below give the same bits and
/// no compiler is free to choose; but what the decay leaves of a weight is rounded by itself, as in torch,
/// for near 1 that rounding is as large as the decay.
template <class T>
void adamw_loop(T* p, const T* g, T* m, T* v, int64_t count, const AdamWConstants<T>& c) {
  for (int64_t i = 0; i < count; ++i) {
    const T gradient = g[i] * c.gradient_scale;
    m[i] = std::fma(gradient, c.rest1, m[i] * c.beta1);
    v[i] = std::fma(c.rest2 * gradient, gradient, v[i] * c.beta2);
    const T denominator = std::fma(std::sqrt(v[i]), c.inverse_root, c.eps);
    const T updated = std::fma(p[i], c.before, T(0)) + c.size * m[i] / denominator;
    p[i] = std::fma(updated, c.after, updated);
  }
}

#if PEFT_HAS_AVX
// By hand because compilers do not vectorise a square root that may set errno.
__attribute__((target("avx2,fma"))) inline void adamw_avx2(float* p, const float* g, float* m, float* v,
                                                           int64_t count, const AdamWConstants<float>& c) {
  const __m256 scale = _mm256_set1_ps(c.gradient_scale), beta1 = _mm256_set1_ps(c.beta1),
               beta2 = _mm256_set1_ps(c.beta2), rest1 = _mm256_set1_ps(c.rest1),
               rest2 = _mm256_set1_ps(c.rest2), eps = _mm256_set1_ps(c.eps),
               inverse_root = _mm256_set1_ps(c.inverse_root), size = _mm256_set1_ps(c.size),
               before = _mm256_set1_ps(c.before), after = _mm256_set1_ps(c.after);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 gradient = _mm256_mul_ps(_mm256_loadu_ps(g + i), scale);
    const __m256 mean = _mm256_fmadd_ps(gradient, rest1, _mm256_mul_ps(_mm256_loadu_ps(m + i), beta1));
    const __m256 square = _mm256_fmadd_ps(_mm256_mul_ps(rest2, gradient), gradient,
                                          _mm256_mul_ps(_mm256_loadu_ps(v + i), beta2));
    const __m256 denominator = _mm256_fmadd_ps(_mm256_sqrt_ps(square), inverse_root, eps);
    const __m256 change = _mm256_div_ps(_mm256_mul_ps(size, mean), denominator);
    const __m256 kept = _mm256_fmadd_ps(_mm256_loadu_ps(p + i), before, _mm256_setzero_ps());
    const __m256 updated = _mm256_add_ps(kept, change);
    _mm256_storeu_ps(m + i, mean);
    _mm256_storeu_ps(v + i, square);
    _mm256_storeu_ps(p + i, _mm256_fmadd_ps(updated, after, updated));
  }
  adamw_loop(p + i, g + i, m + i, v + i, count - i, c);
}

// `maskz` forms also because GCC 12 warns falsely of what the plain ones leave undefined.
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline void adamw_avx512(
    float* p, const float* g, float* m, float* v, int64_t count, const AdamWConstants<float>& c) {
  const __m512 scale = _mm512_set1_ps(c.gradient_scale), beta1 = _mm512_set1_ps(c.beta1),
               beta2 = _mm512_set1_ps(c.beta2), rest1 = _mm512_set1_ps(c.rest1),
               rest2 = _mm512_set1_ps(c.rest2), eps = _mm512_set1_ps(c.eps),
               inverse_root = _mm512_set1_ps(c.inverse_root), size = _mm512_set1_ps(c.size),
               before = _mm512_set1_ps(c.before), after = _mm512_set1_ps(c.after);
  for (int64_t i = 0; i < count; i += 16) {
    const auto mask = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    const __m512 gradient = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, g + i), scale);
    const __m512 mean =
        _mm512_fmadd_ps(gradient, rest1, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, m + i), beta1));
    const __m512 square = _mm512_fmadd_ps(_mm512_mul_ps(rest2, gradient), gradient,
                                          _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, v + i), beta2));
    const __m512 denominator = _mm512_fmadd_ps(_mm512_maskz_sqrt_ps(mask, square), inverse_root, eps);
    const __m512 change = _mm512_maskz_div_ps(mask, _mm512_mul_ps(size, mean), denominator);
    const __m512 kept = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, p + i), before, _mm512_setzero_ps());
    const __m512 updated = _mm512_add_ps(kept, change);
    _mm512_mask_storeu_ps(m + i, mask, mean);
    _mm512_mask_storeu_ps(v + i, mask, square);
    _mm512_mask_storeu_ps(p + i, mask, _mm512_fmadd_ps(updated, after, updated));
  }
}
#endif

template <class T>
void adamw_range([[maybe_unused]] CpuLevel level, T* p, const T* g, T* m, T* v, int64_t count,
                 const AdamWConstants<T>& c) {
#if PEFT_HAS_AVX
  if constexpr (std::is_same_v<T, float>) {
    if (level == CpuLevel::avx512) return adamw_avx512(p, g, m, v, count, c);
    if (level == CpuLevel::avx2) return adamw_avx2(p, g, m, v, count, c);
  }
#endif
  adamw_loop(p, g, m, v, count, c);
}

/// Rate and step of an update that a device reads itself: scalars in float there, so that a CUDA graph can
/// hold the update while they change.
struct AdamWScalars {
  Tensor lr, step;
};

/// The same update in tensor operations, for other types and devices; `settings.lr` is not used.
inline void adamw_composed(const Tensor& values, const Tensor& gradient, const Tensor& exp_avg,
                           const Tensor& exp_avg_sq, const AdamWSettings& settings,
                           const AdamWScalars& scalars) {
  const bool torch_form = settings.form == AdamWForm::torch;
  // 1 − β2^t has no digits left in float.
  const auto lr = scalars.lr.to(torch::kDouble), t = scalars.step.to(torch::kDouble);
  const auto correction1 = 1 - torch::pow(settings.beta1, t);
  const auto correction2 = torch::sqrt(1 - torch::pow(settings.beta2, t));
  const auto decay = lr * settings.weight_decay;
  if (torch_form && settings.weight_decay != 0) values.mul_(1 - decay);
  exp_avg.mul_(settings.beta1).add_(gradient, 1 - settings.beta1);
  exp_avg_sq.mul_(settings.beta2).addcmul_(gradient, gradient, 1 - settings.beta2);
  auto denominator = exp_avg_sq.sqrt();
  if (torch_form) denominator.div_(correction2);
  denominator.add_(settings.eps);
  const auto size = (torch_form ? lr : lr * correction2) / correction1;
  values.sub_(torch::div(exp_avg, denominator).mul_(size));
  if (!torch_form && settings.weight_decay != 0) values.sub_(values * decay);
}

/// One update of a contiguous range in place: weights, first and second moments.
/// On the CPU in float and double: a loop with `settings.lr`, `step` from 1 and `scale`, what the gradients
/// are multiplied with.
inline void adamw(const Tensor& values, const Tensor& gradients, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const AdamWSettings& settings, int64_t step, double scale = 1) {
  const auto run = [&]<class T>(T* p) {
    const AdamWConstants<T> constants(settings, step, scale);
    const T* g = gradients.data_ptr<T>();
    T* m = exp_avg.data_ptr<T>();
    T* v = exp_avg_sq.data_ptr<T>();
    const auto level = cpu_level();
    over_blocks(values.numel(), [&](int64_t, int64_t begin, int64_t count) {
      adamw_range(level, p + begin, g + begin, m + begin, v + begin, count, constants);
    });
  };
  values.scalar_type() == torch::kFloat ? run(values.data_ptr<float>()) : run(values.data_ptr<double>());
}
/// Elsewhere: torch's fused kernel on a GPU where it has one, else the composed form. Nobody waits for the
/// device. `scale`: a scalar there; undefined means 1.
inline void adamw(const Tensor& values, const Tensor& gradients, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const AdamWSettings& settings, const AdamWScalars& scalars,
                  const Tensor& scale) {
  const auto gradient = scale.defined() ? gradients.mul(scale) : gradients;
  const bool fused = settings.form == AdamWForm::torch &&
                     fused_adamw(values, gradient, exp_avg, exp_avg_sq, scalars.lr, scalars.step,
                                 settings.beta1, settings.beta2, settings.eps, settings.weight_decay);
  if (!fused) adamw_composed(values, gradient, exp_avg, exp_avg_sq, settings, scalars);
}

}  // namespace internal
}  // namespace peft
