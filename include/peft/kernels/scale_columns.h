// Scaled columns: a matrix times one value a column, whose gradients come out of one pass over memory.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <type_traits>

#include "peft/kernels/blocks.h"
#include "peft/kernels/cpu.h"
#include "peft/kernels/fast_paths.h"

namespace peft::internal {

/// One row: scaled ← g ⊙ c where `scaled` is given, sum ← sum + g ⊙ p.
template <class T>
struct ColumnRow {
  const T *g, *p, *c;
  T *scaled, *sum;
};

template <class T>
void scale_row_loop(const ColumnRow<T>& row, int64_t first, int64_t columns) {
  for (auto j = first; j < columns; ++j) {
    row.sum[j] += row.g[j] * row.p[j];
    if (row.scaled) row.scaled[j] = row.g[j] * row.c[j];
  }
}

#if PEFT_HAS_AVX
// Both return how many columns they did: all but less than a vector.

__attribute__((target("avx2,fma"))) inline int64_t scale_row_avx2(const ColumnRow<float>& row,
                                                                  int64_t columns) {
  int64_t j = 0;
  for (; j + 8 <= columns; j += 8) {
    const __m256 g = _mm256_loadu_ps(row.g + j);
    const __m256 sum = _mm256_fmadd_ps(g, _mm256_loadu_ps(row.p + j), _mm256_loadu_ps(row.sum + j));
    _mm256_storeu_ps(row.sum + j, sum);
    if (row.scaled) _mm256_storeu_ps(row.scaled + j, _mm256_mul_ps(g, _mm256_loadu_ps(row.c + j)));
  }
  return j;
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline int64_t scale_row_avx512(
    const ColumnRow<float>& row, int64_t columns) {
  int64_t j = 0;
  for (; j + 16 <= columns; j += 16) {
    const __m512 g = _mm512_loadu_ps(row.g + j);
    const __m512 sum = _mm512_fmadd_ps(g, _mm512_loadu_ps(row.p + j), _mm512_loadu_ps(row.sum + j));
    _mm512_storeu_ps(row.sum + j, sum);
    if (row.scaled) _mm512_storeu_ps(row.scaled + j, _mm512_mul_ps(g, _mm512_loadu_ps(row.c + j)));
  }
  return j;
}
#endif

template <class T>
void scale_row([[maybe_unused]] CpuLevel level, const ColumnRow<T>& row, int64_t columns) {
  int64_t done = 0;
#if PEFT_HAS_AVX
  if constexpr (std::is_same_v<T, float>) {
    if (level == CpuLevel::avx512) done = scale_row_avx512(row, columns);
    if (level == CpuLevel::avx2) done = scale_row_avx2(row, columns);
  }
#endif
  scale_row_loop(row, done, columns);
}

/// Σ over rows of g ⊙ p, and scaled ← g ⊙ c in the same pass where `scaled` is defined. All matrices
/// contiguous, of one type for which `has_loop` says yes; c, and the result: (columns). Rows are summed 64 at
/// a time and then the sums, so that the result depends neither on the number of threads nor much on that of
/// rows.
template <class T>
Tensor scale_and_sum(const Tensor& g, const Tensor& p, const Tensor& c, const Tensor& scaled) {
  constexpr int64_t rows = 64;
  const auto count = g.size(0), columns = g.size(1), blocks = (count + rows - 1) / rows;
  const auto sums = at::zeros({blocks, columns}, g.options());
  const auto* from = g.data_ptr<T>();
  const auto* other = p.data_ptr<T>();
  const auto* factor = c.data_ptr<T>();
  auto* into = scaled.defined() ? scaled.data_ptr<T>() : nullptr;
  auto* sum = sums.data_ptr<T>();
  const auto level = cpu_level();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (auto row = begin * rows; row < std::min(count, end * rows); ++row) {
      const auto at = row * columns;
      scale_row<T>(level,
                   {from + at, other + at, factor, into ? into + at : nullptr, sum + row / rows * columns},
                   columns);
    }
  });
  return blocks == 1 ? sums.view({columns}) : sums.sum(0);
}

/// y = c ⊙ p + a, c one value a column. dp = g ⊙ c, dc = Σ over rows of g ⊙ p, both in one pass, da = g.
/// Saves p and c as variables, which are checked for changes in place. Can be differentiated again.
class ScaledColumnsNode final : public torch::autograd::Node {
  using Variable = torch::autograd::SavedVariable;
  using Variables = torch::autograd::variable_list;

 public:
  /// Gives y, computed without a history, its own.
  static void attach(Tensor& y, const Tensor& p, const Tensor& c, const Tensor& a) {
    auto node = make_node<ScaledColumnsNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(p, c, a));
    if (c.requires_grad()) node->p_ = Variable(p, false);
    node->c_ = Variable(c, false);
    torch::autograd::create_gradient_edge(y, node);
  }

  std::string name() const override { return "ScaledColumnsBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released_ = true;
    p_.reset_data();
    c_.reset_data();
  }

 protected:
  Variables apply(Variables&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    Variables result(3);
    const auto& g = gradients.front();
    if (!g.defined()) return result;
    const bool wants_p = task_should_compute_output(0), wants_c = task_should_compute_output(1);
    if (task_should_compute_output(2)) result[2] = g;
    const auto p = p_.unpack(), c = c_.unpack();
    const auto rows = [](const Tensor& t) { return t.reshape({-1, t.size(-1)}); };
    if (torch::GradMode::is_enabled()) {
      if (wants_p) result[0] = g * c;
      if (wants_c) result[1] = rows(g * p).sum(0);
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    if (wants_c) {
      const auto from = g.contiguous();
      if (wants_p) result[0] = at::empty_like(from);
      const auto into = wants_p ? rows(result[0]) : Tensor();
      const auto other = rows(p).contiguous(), factor = c.contiguous();
      result[1] = g.scalar_type() == torch::kDouble ? scale_and_sum<double>(rows(from), other, factor, into)
                                                    : scale_and_sum<float>(rows(from), other, factor, into);
    } else if (wants_p) {
      result[0] = at::mul(g, c);
    }
    return result;
  }

 private:
  Variable p_, c_;
  bool released_ = false;
};

/// c ⊙ p + a. Shapes: p: (*, columns); c: (columns); a: as p, or (columns), or undefined: 0.
inline Tensor scaled_columns(const Tensor& p, const Tensor& c, const Tensor& a = {}) {
  const auto run = [&] {
    if (!a.defined()) return p * c;
    const bool alike = p.scalar_type() == c.scalar_type() && p.scalar_type() == a.scalar_type();
    return alike ? at::addcmul(a, p, c) : p * c + a;
  };
  const auto plain = [&](const Tensor& t) {
    return !t.defined() || (t.scalar_type() == p.scalar_type() && has_loop(t) && !t._fw_grad(0).defined() &&
                            t.layout() == torch::kStrided);
  };
  const bool whole = a.defined() && a.sizes() == p.sizes();
  const bool fits = FastPaths::enabled() && torch::GradMode::is_enabled() && c.requires_grad() &&
                    p.dim() > 1 && c.dim() == 1 && c.size(0) == p.size(-1) && plain(p) && plain(c) &&
                    plain(a) && (whole || !a.defined() || !a.requires_grad()) &&
                    !autocasts(p.device().type());
  if (!fits) return run();
  Tensor y;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    y = run();
  }
  ScaledColumnsNode::attach(y, p, c, a);
  return y;
}

}  // namespace peft::internal
