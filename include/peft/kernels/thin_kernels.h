// ThinKernels: the loops of matrix products with one short side, for AVX2 and AVX-512.
#pragma once

#include <cstdint>

#include "peft/core/compat.h"
#include "peft/kernels/cpu.h"
#include "peft/kernels/lanes.h"

namespace peft::internal {

/// A matrix in memory, each row contiguous.
template <class T>
struct Rows {
  T* data;
  int64_t stride;  ///< from row to row
  T* row(int64_t i) const { return data + i * stride; }
  Rows from(int64_t i, int64_t column = 0) const { return {row(i) + column, stride}; }
};

#if PEFT_HAS_AVX
// The BLAS packs both factors of a product first, which for these costs more than the product. Here a few
// rows of the long side and a few ranks meet in registers. `inner`: c ← scale · x mᵀ. `update`: y ← y + scale
// · c m, or without `adds` y ← scale · c m. Both for `rows` rows. `outer`: m ← m + scale · cᵀ x for columns
// [begin, end) and `count` rows of x. All for `ranks` rows of m. The long side may be of a half type; the
// sums are in float32, and each entry of y is rounded once.

#define PEFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
struct ThinAvx512 {
  /// By hand because GCC 12 warns falsely of what its own sum leaves undefined.
  static PEFT_TARGET float sum_of(__m512 lanes) {
    const __m256 eight = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, lanes, 0),
                                       _mm512_maskz_extractf32x8_ps(0xff, lanes, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static constexpr int widest = 8;  ///< ranks at a time, for three rows: all 32 registers

  static PEFT_TARGET __mmask16 mask(int64_t left) {
    return static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
  }

  template <int rows, int ranks, class T>
  static PEFT_TARGET void inner(Rows<const T> x, Rows<const float> m, Rows<float> c, int64_t d, float scale) {
    __m512 sums[rows][ranks];
    PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) sums[t][k] = _mm512_setzero_ps();
    }
    for (int64_t j = 0; j < d; j += 16) {
      const auto lanes = mask(d - j);
      __m512 in[rows];
      PEFT_UNROLLED for (int t = 0; t < rows; ++t) in[t] = Lanes512::load(x.row(t) + j, lanes);
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) {
        const __m512 weights = _mm512_maskz_loadu_ps(lanes, m.row(k) + j);
        PEFT_UNROLLED for (int t = 0; t < rows; ++t) sums[t][k] = _mm512_fmadd_ps(in[t], weights, sums[t][k]);
      }
    }
    PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) c.row(t)[k] = scale * sum_of(sums[t][k]);
    }
  }

  template <int rows, class T>
  static PEFT_TARGET void update(Rows<T> y, Rows<const float> c, Rows<const float> m, int64_t d,
                                 int64_t ranks, float scale, bool adds) {
    constexpr int width = 4;
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t j = 0; j < d; j += 16 * width) {
      __mmask16 lanes[width];
      __m512 sums[rows][width];
      PEFT_UNROLLED for (int w = 0; w < width; ++w) {
        lanes[w] = mask(d - j - 16 * w);
        PEFT_UNROLLED for (int t = 0; t < rows; ++t) sums[t][w] = _mm512_setzero_ps();
      }
      for (int64_t k = 0; k < ranks; ++k) {
        __m512 weights[width];
        PEFT_UNROLLED for (int w = 0; w < width; ++w) {
          weights[w] = Lanes512::load(m.row(k) + j + 16 * w, lanes[w]);
        }
        PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
          const __m512 each = _mm512_set1_ps(c.row(t)[k]);
          PEFT_UNROLLED for (int w = 0; w < width; ++w) {
            sums[t][w] = _mm512_fmadd_ps(each, weights[w], sums[t][w]);
          }
        }
      }
      PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
        PEFT_UNROLLED for (int w = 0; w < width; ++w) {
          T* const out = y.row(t) + j + 16 * w;
          const __m512 before = Lanes512::load(out, adds ? lanes[w] : __mmask16());
          Lanes512::store(out, lanes[w], _mm512_fmadd_ps(factor, sums[t][w], before));
        }
      }
    }
  }

  template <int ranks, class T>
  static PEFT_TARGET void outer(Rows<float> m, Rows<const float> c, Rows<const T> x, int64_t count,
                                int64_t begin, int64_t end, float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t j = begin; j < end; j += 32) {
      const auto first = mask(end - j), second = mask(end - j - 16);
      __m512 sums[ranks][2];
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) sums[k][0] = sums[k][1] = _mm512_setzero_ps();
      for (int64_t t = 0; t < count; ++t) {
        const __m512 low = Lanes512::load(x.row(t) + j, first),
                     high = Lanes512::load(x.row(t) + j + 16, second);
        PEFT_UNROLLED for (int k = 0; k < ranks; ++k) {
          const __m512 each = _mm512_set1_ps(c.row(t)[k]);
          sums[k][0] = _mm512_fmadd_ps(each, low, sums[k][0]);
          sums[k][1] = _mm512_fmadd_ps(each, high, sums[k][1]);
        }
      }
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) {
        const __m512 low = _mm512_maskz_loadu_ps(first, m.row(k) + j),
                     high = _mm512_maskz_loadu_ps(second, m.row(k) + j + 16);
        _mm512_mask_storeu_ps(m.row(k) + j, first, _mm512_fmadd_ps(factor, sums[k][0], low));
        _mm512_mask_storeu_ps(m.row(k) + j + 16, second, _mm512_fmadd_ps(factor, sums[k][1], high));
      }
    }
  }
};
#undef PEFT_TARGET

#define PEFT_TARGET __attribute__((target("avx2,fma,f16c")))
struct ThinAvx2 {
  static constexpr int widest = 4;  ///< ranks at a time, for three rows: all 16 registers

  template <int rows, int ranks, class T>
  static PEFT_TARGET void inner(Rows<const T> x, Rows<const float> m, Rows<float> c, int64_t d, float scale) {
    __m256 sums[rows][ranks];
    PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) sums[t][k] = _mm256_setzero_ps();
    }
    const auto whole = d / 8 * 8;
    for (int64_t j = 0; j < whole; j += 8) {
      __m256 in[rows];
      PEFT_UNROLLED for (int t = 0; t < rows; ++t) in[t] = Lanes256::load(x.row(t) + j);
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) {
        const __m256 weights = _mm256_loadu_ps(m.row(k) + j);
        PEFT_UNROLLED for (int t = 0; t < rows; ++t) sums[t][k] = _mm256_fmadd_ps(in[t], weights, sums[t][k]);
      }
    }
    for (int t = 0; t < rows; ++t) {
      for (int k = 0; k < ranks; ++k) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, sums[t][k]);
        float sum =
            (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        for (int64_t j = whole; j < d; ++j) sum += static_cast<float>(x.row(t)[j]) * m.row(k)[j];
        c.row(t)[k] = scale * sum;
      }
    }
  }

  template <int rows, class T>
  static PEFT_TARGET void update(Rows<T> y, Rows<const float> c, Rows<const float> m, int64_t d,
                                 int64_t ranks, float scale, bool adds) {
    int64_t j = 0;
    for (; j + 24 <= d; j += 24) update_columns<rows, 3>(y, c, m, j, ranks, scale, adds);
    for (; j + 8 <= d; j += 8) update_columns<rows, 1>(y, c, m, j, ranks, scale, adds);
    for (int t = 0; t < rows; ++t) {
      for (auto rest = j; rest < d; ++rest) {
        float sum = 0;
        for (int64_t k = 0; k < ranks; ++k) sum += c.row(t)[k] * m.row(k)[rest];
        const float before = adds ? static_cast<float>(y.row(t)[rest]) : 0;
        y.row(t)[rest] = static_cast<T>(before + scale * sum);
      }
    }
  }
  /// `update` of 8 · width columns from j on.
  template <int rows, int width, class T>
  static PEFT_TARGET void update_columns(Rows<T> y, Rows<const float> c, Rows<const float> m, int64_t j,
                                         int64_t ranks, float scale, bool adds) {
    const __m256 factor = _mm256_set1_ps(scale);
    __m256 sums[rows][width];
    PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
      PEFT_UNROLLED for (int w = 0; w < width; ++w) sums[t][w] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < ranks; ++k) {
      __m256 weights[width];
      PEFT_UNROLLED for (int w = 0; w < width; ++w) weights[w] = _mm256_loadu_ps(m.row(k) + j + 8 * w);
      PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
        const __m256 each = _mm256_set1_ps(c.row(t)[k]);
        PEFT_UNROLLED for (int w = 0; w < width; ++w) {
          sums[t][w] = _mm256_fmadd_ps(each, weights[w], sums[t][w]);
        }
      }
    }
    PEFT_UNROLLED for (int t = 0; t < rows; ++t) {
      PEFT_UNROLLED for (int w = 0; w < width; ++w) {
        T* const out = y.row(t) + j + 8 * w;
        const __m256 before = adds ? Lanes256::load(out) : _mm256_setzero_ps();
        Lanes256::store(out, _mm256_fmadd_ps(factor, sums[t][w], before));
      }
    }
  }

  template <int ranks, class T>
  static PEFT_TARGET void outer(Rows<float> m, Rows<const float> c, Rows<const T> x, int64_t count,
                                int64_t begin, int64_t end, float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    auto j = begin;
    for (; j + 16 <= end; j += 16) {
      __m256 sums[ranks][2];
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) sums[k][0] = sums[k][1] = _mm256_setzero_ps();
      for (int64_t t = 0; t < count; ++t) {
        const __m256 low = Lanes256::load(x.row(t) + j), high = Lanes256::load(x.row(t) + j + 8);
        PEFT_UNROLLED for (int k = 0; k < ranks; ++k) {
          const __m256 each = _mm256_set1_ps(c.row(t)[k]);
          sums[k][0] = _mm256_fmadd_ps(each, low, sums[k][0]);
          sums[k][1] = _mm256_fmadd_ps(each, high, sums[k][1]);
        }
      }
      PEFT_UNROLLED for (int k = 0; k < ranks; ++k) {
        const __m256 low = _mm256_loadu_ps(m.row(k) + j), high = _mm256_loadu_ps(m.row(k) + j + 8);
        _mm256_storeu_ps(m.row(k) + j, _mm256_fmadd_ps(factor, sums[k][0], low));
        _mm256_storeu_ps(m.row(k) + j + 8, _mm256_fmadd_ps(factor, sums[k][1], high));
      }
    }
    for (; j < end; ++j) {
      for (int k = 0; k < ranks; ++k) {
        float sum = 0;
        for (int64_t t = 0; t < count; ++t) sum += c.row(t)[k] * static_cast<float>(x.row(t)[j]);
        m.row(k)[j] += scale * sum;
      }
    }
  }
};
#undef PEFT_TARGET

#endif

}  // namespace peft::internal
