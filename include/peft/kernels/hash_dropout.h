// HashDropout: dropout whose mask is computed from a seed wherever it is needed, and never stored.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <type_traits>

#include "peft/core/compat.h"
#include "peft/kernels/cpu.h"
#include "peft/kernels/lanes.h"

namespace peft::internal {

/// Which elements of a matrix a dropout of rate p keeps: those whose hash of (seed, row, column) is at least
/// p · 2³². A row's two keys are the words of splitmix64 at (seed, row); a column's hash is the two-round
/// xorshift-multiply mixer of Wellons' hash-prospector with the least avalanche bias known (0.11), the first
/// key added before the first round and the second mixed in before the second, so that rows, layers and steps
/// see unrelated functions of the column rather than windows of one sequence. A masked element costs
/// two multiplications of eight lanes; Philox, of the same use, ten times as many.
class HashDropout {
 public:
  HashDropout() = default;
  HashDropout(double p, uint64_t seed)
      : seed_(seed), threshold_(static_cast<uint32_t>(std::min(std::round(p * 0x1p32), 0x1p32 - 1))) {}
  /// Of the rate p, with a seed drawn from the CPU's default generator: `torch::manual_seed` repeats it.
  static HashDropout draw(double p) {
    auto* generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
    const std::lock_guard<std::mutex> lock(generator->mutex_);
    return HashDropout(p, generator->random64());
  }
  /// True for the types there is a kernel for.
  static bool supports(const Tensor& x) {
    const auto type = x.scalar_type();
    return x.is_cpu() && (type == torch::kFloat32 || type == torch::kFloat64 || is_half(type));
  }

  bool keeps(int64_t row, int64_t column) const {
    return hash(keys(row), static_cast<uint32_t>(column)) >= threshold_;
  }

  /// dropped ← m ⊙ x, and where `gradient` is defined gradient ← gradient + m ⊙ update, m the mask of the
  /// rows from `first` on. Unscaled: kept elements stay as they are. All (rows, columns), rows contiguous;
  /// `x` and `dropped` may be undefined together. All of one type, but for `update`, which may be float32
  /// beside a half type: a sum is then rounded once. The same at every `CpuLevel`.
  void mask(int64_t first, const Tensor& x, const Tensor& dropped, const Tensor& update = {},
            const Tensor& gradient = {}) const {
    const auto as = [&](auto value, auto addend) {
      mask_as<decltype(value), decltype(addend)>(first, x, dropped, update, gradient);
    };
    const auto half = [&](auto value) {
      const bool wide = update.defined() && update.scalar_type() == torch::kFloat32;
      wide ? as(value, float()) : as(value, value);
    };
    const auto type = (dropped.defined() ? dropped : gradient).scalar_type();
    if (type == torch::kFloat64) return as(double(), double());
    if (type == torch::kBFloat16) return half(c10::BFloat16());
    if (type == torch::kFloat16) return half(c10::Half());
    as(float(), float());
  }

 private:
  struct Keys {
    uint32_t first, second;
  };
  Keys keys(int64_t row) const {
    uint64_t z = seed_ + (static_cast<uint64_t>(row) + 1) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    z ^= z >> 31;
    return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
  }
  static uint32_t hash(const Keys& keys, uint32_t column) {
    uint32_t h = column + keys.first;
    h = (h ^ (h >> 16)) * multiplier1_;
    h = (h ^ (h >> 15) ^ keys.second) * multiplier2_;
    return h ^ (h >> 15);
  }

  template <class T, class U>
  struct Row {
    const T* x;
    T* dropped;
    const U* update;
    T* gradient;
  };

  template <class T, class U>
  void mask_as(int64_t first, const Tensor& x, const Tensor& dropped, const Tensor& update,
               const Tensor& gradient) const {
    const auto& like = dropped.defined() ? dropped : gradient;
    const auto columns = like.size(1), grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
    at::parallel_for(0, like.size(0), grain, [&](int64_t begin, int64_t end) {
      for (auto row = begin; row < end; ++row) {
        mask_row(keys(first + row),
                 Row<T, U>{at<T>(x, row), at<T>(dropped, row), at<U>(update, row), at<T>(gradient, row)},
                 columns);
      }
    });
  }

  template <class T>
  static T* at(const Tensor& t, int64_t row) {
    return t.defined() ? t.data_ptr<T>() + row * t.stride(0) : nullptr;
  }

  template <class T, class U>
  void mask_row(const Keys& keys, const Row<T, U>& row, int64_t columns) const {
    int64_t column = 0;
#if PEFT_HAS_AVX
    if constexpr (!std::is_same_v<T, double>) {
      if (cpu_level() == CpuLevel::avx512) column = mask_row_avx512(keys, row, columns);
      if (cpu_level() == CpuLevel::avx2) column = mask_row_avx2(keys, row, columns);
    }
#endif
    for (; column < columns; ++column) {
      const bool kept = hash(keys, static_cast<uint32_t>(column)) >= threshold_;
      if (row.dropped) row.dropped[column] = kept ? row.x[column] : T(0);
      if (row.gradient && kept)
        row.gradient[column] = static_cast<T>(row.gradient[column] + row.update[column]);
    }
  }

#if PEFT_HAS_AVX
  static int as_int(uint32_t value) { return static_cast<int>(value); }

  // Both return how many columns they did: all but less than a vector.

  template <class T, class U>
  __attribute__((target("avx2,fma,f16c"))) int64_t mask_row_avx2(const Keys& keys, const Row<T, U>& row,
                                                                 int64_t columns) const {
    const __m256i second = _mm256_set1_epi32(as_int(keys.second));
    const __m256i multiplier1 = _mm256_set1_epi32(as_int(multiplier1_));
    const __m256i multiplier2 = _mm256_set1_epi32(as_int(multiplier2_));
    const __m256i threshold = _mm256_set1_epi32(as_int(threshold_)), step = _mm256_set1_epi32(8);
    __m256i counter =
        _mm256_add_epi32(_mm256_set1_epi32(as_int(keys.first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    int64_t column = 0;
    for (; column + 8 <= columns; column += 8) {
      __m256i h = _mm256_xor_si256(counter, _mm256_srli_epi32(counter, 16));
      h = _mm256_mullo_epi32(h, multiplier1);
      h = _mm256_xor_si256(_mm256_xor_si256(h, _mm256_srli_epi32(h, 15)), second);
      h = _mm256_mullo_epi32(h, multiplier2);
      h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 15));
      counter = _mm256_add_epi32(counter, step);
      // Unsigned h >= threshold.
      const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(h, threshold), h);
      if (row.dropped) Lanes256::keep(row.x + column, kept, row.dropped + column);
      if (row.gradient) {
        const __m256 update = _mm256_and_ps(Lanes256::load(row.update + column), _mm256_castsi256_ps(kept));
        Lanes256::store(row.gradient + column, _mm256_add_ps(Lanes256::load(row.gradient + column), update));
      }
    }
    return column;
  }

  // In maskz forms where the plain ones make GCC 12 warn of its own header.
  template <class T, class U>
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) int64_t mask_row_avx512(
      const Keys& keys, const Row<T, U>& row, int64_t columns) const {
    const __m512i second = _mm512_set1_epi32(as_int(keys.second));
    const __m512i multiplier1 = _mm512_set1_epi32(as_int(multiplier1_));
    const __m512i multiplier2 = _mm512_set1_epi32(as_int(multiplier2_));
    const __m512i threshold = _mm512_set1_epi32(as_int(threshold_)), step = _mm512_set1_epi32(16);
    constexpr __mmask16 all = 0xffff;
    __m512i counter =
        _mm512_add_epi32(_mm512_set1_epi32(as_int(keys.first)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int64_t column = 0;
    for (; column + 16 <= columns; column += 16) {
      __m512i h = _mm512_xor_si512(counter, _mm512_maskz_srli_epi32(all, counter, 16));
      h = _mm512_mullo_epi32(h, multiplier1);
      h = _mm512_xor_si512(_mm512_xor_si512(h, _mm512_maskz_srli_epi32(all, h, 15)), second);
      h = _mm512_mullo_epi32(h, multiplier2);
      h = _mm512_xor_si512(h, _mm512_maskz_srli_epi32(all, h, 15));
      counter = _mm512_add_epi32(counter, step);
      const __mmask16 kept = _mm512_cmpge_epu32_mask(h, threshold);
      if (row.dropped) Lanes512::keep(row.x + column, kept, row.dropped + column);
      if (row.gradient) {
        const __m512 before = Lanes512::load(row.gradient + column, all);
        const __m512 update = Lanes512::load(row.update + column, all);
        Lanes512::store(row.gradient + column, all, _mm512_mask_add_ps(before, kept, before, update));
      }
    }
    return column;
  }
#endif

  static constexpr uint32_t multiplier1_ = 0x21f0aaadU, multiplier2_ = 0x735a2d97U;
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;
};

}  // namespace peft::internal
