// Orthogonality: how far matrices are from orthogonal, for all matrices of a model at once.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "peft/core/compat.h"
#include "peft/kernels/cpu.h"

namespace peft::internal {

/// Calls `use(members, stack)` for each set of matrices of one shape, type and device: their indices, and
/// themselves as (count, rows, columns).
template <class Use>
void over_stacks(const std::vector<Tensor>& matrices, const Use& use) {
  std::vector<std::vector<size_t>> sets;
  for (size_t i = 0; i < matrices.size(); ++i) {
    size_t set = 0;
    const auto fits = [&](const Tensor& other) {
      return other.sizes() == matrices[i].sizes() && other.scalar_type() == matrices[i].scalar_type() &&
             other.device() == matrices[i].device();
    };
    while (set < sets.size() && !fits(matrices[sets[set].front()])) ++set;
    if (set == sets.size()) sets.emplace_back();
    sets[set].push_back(i);
  }
  for (const auto& set : sets) {
    std::vector<Tensor> members;
    for (const auto i : set) members.push_back(matrices[i]);
    use(set, torch::stack(members));
  }
}

/// P Pᵀ − I of each matrix P of a stack, or, `transposed`, of its transpose.
inline Tensor gram_difference(const Tensor& stack, bool transposed) {
  const auto other = stack.transpose(1, 2);
  auto difference = transposed ? at::bmm(other, stack) : at::bmm(stack, other);
  difference.diagonal(0, 1, 2).sub_(1);
  return difference;
}

/// Σ ‖P Pᵀ − I‖_F over matrices, or over their transposes: a scalar on the device of the first.
inline Tensor orthogonality(const std::vector<Tensor>& matrices, bool transposed) {
  auto total =
      matrices.empty() ? torch::zeros({}) : torch::zeros({}, matrices.front().options().requires_grad(false));
  over_stacks(matrices, [&](const std::vector<size_t>&, const Tensor& stack) {
    total = total + gram_difference(stack, transposed).flatten(1).norm(2, 1).sum().to(total.device());
  });
  return total;
}

/// The gradient of `weight` times that sum by each matrix, in closed form: 2 (P Pᵀ − I) P / ‖P Pᵀ − I‖_F. At
/// exact orthogonality, where there is none, it is 0, as torch's norm has it.
inline std::vector<Tensor> orthogonality_gradients(const std::vector<Tensor>& matrices, bool transposed,
                                                   double weight) {
  std::vector<Tensor> gradients(matrices.size());
  over_stacks(matrices, [&](const std::vector<size_t>& members, const Tensor& stack) {
    auto difference = gram_difference(stack, transposed);
    const auto norm = difference.flatten(1).norm(2, 1).view({-1, 1, 1});
    difference.mul_(torch::where(norm > 0, 2 * weight / norm, torch::zeros_like(norm)));
    const auto all = (transposed ? at::bmm(stack, difference) : at::bmm(difference, stack)).unbind();
    for (size_t i = 0; i < members.size(); ++i) gradients[members[i]] = all[i];
  });
  return gradients;
}

/// Largest rank for which the loop below is faster than products of stacks.
inline constexpr int64_t orthogonality_loop_rank = 32;

#if PEFT_HAS_AVX
/// C (rows, columns) += L R, of `terms` terms, where L, or L and R, have rows or columns shorter than a few
/// vectors: a BLAS spends its time on packing them. L(i, k) is left[i · left_row + k · left_step]; rows of R
/// and C lie `right_row` and `out_row` apart.
struct ShortProduct {
  float* out;
  int64_t out_row, rows, columns;
  const float* left;
  int64_t left_row, left_step;
  const float* right;
  int64_t right_row, terms;
};

/// Its rows from `row` on, and as many columns from `column` on as a vector holds.
template <int Rows>
__attribute__((target("avx2,fma"))) inline void product_tile_avx2(const ShortProduct& p, int64_t row,
                                                                  int64_t column) {
  static constexpr int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t width = std::min<int64_t>(p.columns - column, 8);
  const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + 8 - width));
  float* out = p.out + row * p.out_row + column;
  const float *left = p.left + row * p.left_row, *right = p.right + column;
  __m256 sums[Rows];
  PEFT_UNROLLED for (int i = 0; i < Rows; ++i) sums[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < p.terms; ++k, left += p.left_step, right += p.right_row) {
    const __m256 term = _mm256_maskload_ps(right, mask);
    PEFT_UNROLLED for (int i = 0; i < Rows; ++i) {
      sums[i] = _mm256_fmadd_ps(_mm256_set1_ps(left[i * p.left_row]), term, sums[i]);
    }
  }
  PEFT_UNROLLED for (int i = 0; i < Rows; ++i) {
    float* to = out + i * p.out_row;
    sums[i] = _mm256_add_ps(_mm256_maskload_ps(to, mask), sums[i]);
    if (width == 8) {
      _mm256_storeu_ps(to, sums[i]);
    } else {  // masked stores are slow on AMD's processors
      alignas(32) float last[8];
      _mm256_store_ps(last, sums[i]);
      std::copy_n(last, width, to);
    }
  }
}
template <int Rows>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline void product_tile_avx512(
    const ShortProduct& p, int64_t row, int64_t column) {
  const int64_t width = std::min<int64_t>(p.columns - column, 16);
  const auto mask = static_cast<__mmask16>((1 << width) - 1);
  float* out = p.out + row * p.out_row + column;
  const float *left = p.left + row * p.left_row, *right = p.right + column;
  __m512 sums[Rows];
  PEFT_UNROLLED for (int i = 0; i < Rows; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < p.terms; ++k, left += p.left_step, right += p.right_row) {
    const __m512 term = _mm512_maskz_loadu_ps(mask, right);
    PEFT_UNROLLED for (int i = 0; i < Rows; ++i) {
      sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(left[i * p.left_row]), term, sums[i]);
    }
  }
  PEFT_UNROLLED for (int i = 0; i < Rows; ++i) {
    sums[i] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + i * p.out_row), sums[i]);
  }
  // Afterwards: a load waits for a masked store near it.
  PEFT_UNROLLED for (int i = 0; i < Rows; ++i) _mm512_mask_storeu_ps(out + i * p.out_row, mask, sums[i]);
}

template <int Rows>
void product_rows(CpuLevel level, const ShortProduct& p, int64_t column, int64_t& row) {
  for (; row + Rows <= p.rows; row += Rows) {
    level == CpuLevel::avx512 ? product_tile_avx512<Rows>(p, row, column)
                              : product_tile_avx2<Rows>(p, row, column);
  }
}
inline void add_product(CpuLevel level, const ShortProduct& p) {
  for (int64_t column = 0; column < p.columns; column += level == CpuLevel::avx512 ? 16 : 8) {
    int64_t row = 0;
    product_rows<12>(level, p, column, row);
    product_rows<8>(level, p, column, row);
    product_rows<4>(level, p, column, row);
    product_rows<1>(level, p, column, row);
  }
}

/// The dot products of rows a…a+A−1 of P with rows b…b+B−1, into a symmetric matrix.
template <int A, int B>
__attribute__((target("avx2,fma"))) inline void gram_tile(const float* P, int64_t rank, int64_t length,
                                                          int64_t a, int64_t b, float* gram) {
  __m256 sums[A][B];
  PEFT_UNROLLED for (int i = 0; i < A; ++i) {
    PEFT_UNROLLED for (int j = 0; j < B; ++j) sums[i][j] = _mm256_setzero_ps();
  }
  const float *ones = P + a * length, *others = P + b * length;
  int64_t k = 0;
  for (; k + 8 <= length; k += 8) {
    __m256 other[B];
    PEFT_UNROLLED for (int j = 0; j < B; ++j) other[j] = _mm256_loadu_ps(others + j * length + k);
    PEFT_UNROLLED for (int i = 0; i < A; ++i) {
      const __m256 one = _mm256_loadu_ps(ones + i * length + k);
      PEFT_UNROLLED for (int j = 0; j < B; ++j) sums[i][j] = _mm256_fmadd_ps(one, other[j], sums[i][j]);
    }
  }
  PEFT_UNROLLED for (int i = 0; i < A; ++i) {
    PEFT_UNROLLED for (int j = 0; j < B; ++j) {
      const __m128 four =
          _mm_add_ps(_mm256_castps256_ps128(sums[i][j]), _mm256_extractf128_ps(sums[i][j], 1));
      const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
      float dot = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
      for (int64_t rest = k; rest < length; ++rest) {
        dot = std::fma(ones[i * length + rest], others[j * length + rest], dot);
      }
      gram[(a + i) * rank + b + j] = gram[(b + j) * rank + a + i] = dot;
    }
  }
}
template <int A>
void gram_rows(const float* P, int64_t rank, int64_t length, int64_t a, float* gram) {
  int64_t b = a - a % 4;
  for (; b + 4 <= rank; b += 4) gram_tile<A, 4>(P, rank, length, a, b, gram);
  for (; b < rank; ++b) gram_tile<A, 1>(P, rank, length, a, b, gram);
}

/// Adds the gradient of `weight` times the norm of one matrix of `rank` rows, or, `transposed`, columns.
inline void add_orthogonality_gradient(CpuLevel level, const float* P, float* gradient, int64_t rank,
                                       int64_t length, bool transposed, double weight,
                                       std::vector<float>& gram) {
  gram.assign(static_cast<size_t>(rank * rank), 0);
  if (transposed) {
    constexpr int64_t some = 256;  // keeps the sums' rounding small
    for (int64_t i = 0; i < length; i += some) {
      const float* rows = P + i * rank;
      add_product(level,
                  {gram.data(), rank, rank, rank, rows, 1, rank, rows, rank, std::min(some, length - i)});
    }
  } else {
    int64_t a = 0;
    for (; a + 2 <= rank; a += 2) gram_rows<2>(P, rank, length, a, gram.data());
    if (a < rank) gram_rows<1>(P, rank, length, a, gram.data());
  }
  for (int64_t i = 0; i < rank; ++i) gram[static_cast<size_t>(i * rank + i)] -= 1;
  double squares = 0;
  for (const double value : gram) squares += value * value;
  const auto factor = static_cast<float>(squares > 0 ? 2 * weight / std::sqrt(squares) : 0);
  for (auto& value : gram) value *= factor;
  // What is left is symmetric: its rows are its columns.
  if (transposed) {
    add_product(level, {gradient, rank, length, rank, P, rank, 1, gram.data(), rank, rank});
  } else {
    add_product(level, {gradient, length, rank, length, gram.data(), 1, rank, P, length, rank});
  }
}
#endif

/// Adds those gradients to `gradients`: for float on the CPU and small ranks in one pass over each matrix and
/// its gradient, which then stay in the cache, else in the form above. Versions are not counted.
inline void add_orthogonality_gradients(const std::vector<Tensor>& matrices,
                                        const std::vector<Tensor>& gradients, bool transposed,
                                        double weight) {
  std::vector<Tensor> others, their_gradients;
#if PEFT_HAS_AVX
  const auto level = cpu_level();
  const auto fits = [](const Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == torch::kFloat && tensor.is_contiguous();
  };
  struct Job {
    const float* matrix;
    float* gradient;
    int64_t rank, length;
  };
  std::vector<Job> jobs;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto &matrix = matrices[i], &gradient = gradients[i];
    const auto rank = matrix.size(transposed ? 1 : 0), length = matrix.size(transposed ? 0 : 1);
    if (level != CpuLevel::scalar && rank <= orthogonality_loop_rank && fits(matrix) && fits(gradient)) {
      jobs.push_back({matrix.data_ptr<float>(), gradient.data_ptr<float>(), rank, length});
    } else {
      others.push_back(matrix);
      their_gradients.push_back(gradient);
    }
  }
  at::parallel_for(0, static_cast<int64_t>(jobs.size()), /*grain_size=*/8, [&](int64_t begin, int64_t end) {
    std::vector<float> gram;
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      const auto& job = jobs[i];
      add_orthogonality_gradient(level, job.matrix, job.gradient, job.rank, job.length, transposed, weight,
                                 gram);
    }
  });
#else
  others = matrices;
  their_gradients = gradients;
#endif
  if (!others.empty()) {
    at::_foreach_add_(their_gradients, orthogonality_gradients(others, transposed, weight));
  }
}

}  // namespace peft::internal
