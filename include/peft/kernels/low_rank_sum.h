// Low-rank sum: W + s · B A in one pass over W, which also says whether every sum is finite.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "peft/core/compat.h"
#include "peft/kernels/cpu.h"

namespace peft::internal {

/// A weight, and whether it is known to hold neither NaN nor infinity.
struct LowRankSum {
  Tensor sum;
  bool finite = false;
};

/// Matrices (rows, columns), (rows, rank) and (rank, columns), each without gaps.
struct LowRankTerms {
  const float *W, *B, *A;
  float scale;
  int64_t columns, rank;
};

/// One value as the vectors make it: products summed in the order of the rank, each rounded once.
inline bool low_rank_sum_at(float* out, const LowRankTerms& terms, int64_t row, int64_t column) {
  float product = 0;
  for (int64_t k = 0; k < terms.rank; ++k) {
    product = std::fma(terms.B[row * terms.rank + k], terms.A[k * terms.columns + column], product);
  }
  const auto at = row * terms.columns + column;
  out[at] = std::fma(product, terms.scale, terms.W[at]);
  return std::isfinite(out[at]);
}
/// Rows [first, last) from a column on.
inline bool low_rank_sum_rest(float* out, const LowRankTerms& terms, int64_t first, int64_t last,
                              int64_t column) {
  bool finite = true;
  for (auto row = first; row < last; ++row) {
    for (auto rest = column; rest < terms.columns; ++rest) {
      finite = low_rank_sum_at(out, terms, row, rest) && finite;
    }
  }
  return finite;
}

#if PEFT_HAS_AVX
/// Rows [first, last) of `out`. `stream`: past the caches, of which a large matrix would only be rinsed
/// through and which would fetch its old values first; `out` and its rows then lie at multiples of 64 bytes.
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline bool low_rank_sum_avx512(
    float* out, const LowRankTerms& terms, int64_t first, int64_t last, bool stream) {
  constexpr int height = 8, width = 2;
  const __m512 scale = _mm512_set1_ps(terms.scale);
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  const int64_t columns = terms.columns, rank = terms.rank;
  __mmask16 bad = 0;
  bool finite = true;
  int64_t row = first;
  for (; row + height <= last; row += height) {
    int64_t column = 0;
    for (; column + 16 * width <= columns; column += 16 * width) {
      __m512 sums[height][width];
      for (auto& sum : sums) {
        for (auto& part : sum) part = _mm512_setzero_ps();
      }
      for (int64_t k = 0; k < rank; ++k) {
        const __m512 a0 = _mm512_loadu_ps(terms.A + k * columns + column);
        const __m512 a1 = _mm512_loadu_ps(terms.A + k * columns + column + 16);
        for (int i = 0; i < height; ++i) {
          const __m512 b = _mm512_set1_ps(terms.B[(row + i) * rank + k]);
          sums[i][0] = _mm512_fmadd_ps(b, a0, sums[i][0]);
          sums[i][1] = _mm512_fmadd_ps(b, a1, sums[i][1]);
        }
      }
      for (int i = 0; i < height; ++i) {
        for (int j = 0; j < width; ++j) {
          const auto at = (row + i) * columns + column + 16 * j;
          const __m512 sum = _mm512_fmadd_ps(sums[i][j], scale, _mm512_loadu_ps(terms.W + at));
          const __m512i bits = _mm512_and_si512(_mm512_castps_si512(sum), exponent);
          bad = static_cast<__mmask16>(bad | _mm512_cmpeq_epi32_mask(bits, exponent));
          stream ? _mm512_stream_ps(out + at, sum) : _mm512_storeu_ps(out + at, sum);
        }
      }
    }
    finite = low_rank_sum_rest(out, terms, row, row + height, column) && finite;
  }
  finite = low_rank_sum_rest(out, terms, row, last, 0) && finite;
  _mm_sfence();
  return finite && bad == 0;
}

/// The same with 16 registers.
__attribute__((target("avx2,fma"))) inline bool low_rank_sum_avx2(float* out, const LowRankTerms& terms,
                                                                  int64_t first, int64_t last, bool stream) {
  constexpr int height = 4, width = 2;
  const __m256 scale = _mm256_set1_ps(terms.scale);
  const __m256i exponent = _mm256_set1_epi32(0x7f800000);
  const int64_t columns = terms.columns, rank = terms.rank;
  __m256i bad = _mm256_setzero_si256();
  bool finite = true;
  int64_t row = first;
  for (; row + height <= last; row += height) {
    int64_t column = 0;
    for (; column + 8 * width <= columns; column += 8 * width) {
      __m256 sums[height][width];
      for (auto& sum : sums) {
        for (auto& part : sum) part = _mm256_setzero_ps();
      }
      for (int64_t k = 0; k < rank; ++k) {
        const __m256 a0 = _mm256_loadu_ps(terms.A + k * columns + column);
        const __m256 a1 = _mm256_loadu_ps(terms.A + k * columns + column + 8);
        for (int i = 0; i < height; ++i) {
          const __m256 b = _mm256_broadcast_ss(terms.B + (row + i) * rank + k);
          sums[i][0] = _mm256_fmadd_ps(b, a0, sums[i][0]);
          sums[i][1] = _mm256_fmadd_ps(b, a1, sums[i][1]);
        }
      }
      for (int i = 0; i < height; ++i) {
        for (int j = 0; j < width; ++j) {
          const auto at = (row + i) * columns + column + 8 * j;
          const __m256 sum = _mm256_fmadd_ps(sums[i][j], scale, _mm256_loadu_ps(terms.W + at));
          const __m256i bits = _mm256_and_si256(_mm256_castps_si256(sum), exponent);
          bad = _mm256_or_si256(bad, _mm256_cmpeq_epi32(bits, exponent));
          stream ? _mm256_stream_ps(out + at, sum) : _mm256_storeu_ps(out + at, sum);
        }
      }
    }
    finite = low_rank_sum_rest(out, terms, row, row + height, column) && finite;
  }
  finite = low_rank_sum_rest(out, terms, row, last, 0) && finite;
  _mm_sfence();
  return finite && _mm256_testz_si256(bad, bad) == 1;
}
#endif

/// W + s · B A of matrices (rows, columns), (rows, rank) and (rank, columns). Without a gradient, on a CPU
/// with vectors, and of so small a rank that memory is what counts, one pass; elsewhere `addmm`.
inline LowRankSum low_rank_sum(const Tensor& W, const Tensor& B, const Tensor& A, double scale) {
#if PEFT_HAS_AVX
  constexpr int64_t most_rank = 32;
  const auto level = cpu_level();
  const auto is_plain = [](const Tensor& t) { return t.is_cpu() && t.scalar_type() == torch::kFloat; };
  if (level != CpuLevel::scalar && !torch::GradMode::is_enabled() && is_plain(W) && is_plain(B) &&
      is_plain(A) && A.size(0) <= most_rank && W.is_contiguous()) {
    const auto b = B.contiguous(), a = A.contiguous();
    auto sum = torch::empty_like(W);
    auto* out = sum.data_ptr<float>();
    const LowRankTerms terms{W.data_ptr<float>(),       b.data_ptr<float>(), a.data_ptr<float>(),
                             static_cast<float>(scale), W.size(1),           A.size(0)};
    const bool stream = W.size(1) % 16 == 0 && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
    std::atomic<bool> finite{true};
    constexpr int64_t rows_together = 64;
    const auto blocks = (W.size(0) + rows_together - 1) / rows_together;
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      const auto begin = first * rows_together, end = std::min(W.size(0), last * rows_together);
      const bool good = level == CpuLevel::avx512 ? low_rank_sum_avx512(out, terms, begin, end, stream)
                                                  : low_rank_sum_avx2(out, terms, begin, end, stream);
      if (!good) finite = false;
    });
    return {sum, finite};
  }
#endif
  return {at::addmm(W, B, A, 1, scale), false};
}

}  // namespace peft::internal
