// ThinProducts: matrix products with one short side, a rank: what LoRA adds to a layer is made of them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "peft/core/compat.h"
#include "peft/kernels/cpu.h"
#include "peft/kernels/lanes.h"
#include "peft/kernels/thin_kernels.h"

namespace peft::internal {

/// Calls `run` with the first of some ranks and their number as a constant, for all `ranks`.
template <int widest, class Run>
void over_ranks(int64_t ranks, const Run& run) {
  int64_t k = 0;
  for (; k + widest <= ranks; k += widest) run(k, std::integral_constant<int, widest>());
  if constexpr (widest > 4) {
    for (; k + 4 <= ranks; k += 4) run(k, std::integral_constant<int, 4>());
  }
  for (; k < ranks; ++k) run(k, std::integral_constant<int, 1>());
}

/// Calls `run` with the first of some rows and their number as a constant, for all `count`, in parallel where
/// a thread gets at least 2¹⁶ products.
template <class Run>
void over_rows(int64_t count, int64_t products, const Run& run) {
  const auto grain = std::max<int64_t>(3, (int64_t{1} << 16) / std::max<int64_t>(1, products));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    auto t = begin;
    for (; t + 3 <= end; t += 3) run(t, std::integral_constant<int, 3>());
    for (; t < end; ++t) run(t, std::integral_constant<int, 1>());
  });
}

template <class Cpu, class T>
void thin_inner_loop(Rows<const T> x, Rows<const float> m, Rows<float> c, int64_t count, int64_t d,
                     int64_t ranks, float scale) {
  over_rows(count, ranks * d, [&](int64_t t, auto rows) {
    over_ranks<Cpu::widest>(ranks, [&](int64_t k, auto some) {
      Cpu::template inner<rows(), some()>(x.from(t), m.from(k), c.from(t, k), d, scale);
    });
  });
}

template <class Cpu, class T>
void thin_update_loop(Rows<T> y, Rows<const float> c, Rows<const float> m, int64_t count, int64_t d,
                      int64_t ranks, float scale, bool adds) {
  over_rows(count, ranks * d, [&](int64_t t, auto rows) {
    Cpu::template update<rows()>(y.from(t), c.from(t), m, d, ranks, scale, adds);
  });
}

template <class Cpu, class T>
void thin_outer_loop(Rows<float> m, Rows<const float> c, Rows<const T> x, int64_t count, int64_t d,
                     int64_t ranks, float scale) {
  constexpr int64_t columns = 32, rows = 512;  // rows whose pages the processor can address at once
  const auto grain = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, ranks * count * columns));
  at::parallel_for(0, (d + columns - 1) / columns, grain, [&](int64_t first, int64_t last) {
    for (int64_t t = 0; t < count; t += rows) {
      over_ranks<Cpu::widest>(ranks, [&](int64_t k, auto some) {
        Cpu::template outer<some()>(m.from(k), c.from(t, k), x.from(t), std::min(rows, count - t),
                                    first * columns, std::min(d, last * columns), scale);
      });
    }
  });
}

/// Whether products with `ranks` ranks of such tensors have a kernel: float32 on a CPU with AVX2, and not so
/// many ranks that the BLAS is as fast.
inline bool has_thin_kernel([[maybe_unused]] const Tensor& like, [[maybe_unused]] int64_t ranks) {
#if PEFT_HAS_AVX
  return ranks <= 32 && like.is_cpu() && like.scalar_type() == torch::kFloat32 &&
         cpu_level() != CpuLevel::scalar;
#else
  return false;
#endif
}

/// The same of a product of x and m: m may also be in float32 beside an x in a half type, which no BLAS
/// takes.
inline bool has_thin_kernel(torch::ScalarType x, const Tensor& m) {
  if (x == m.scalar_type()) return has_thin_kernel(m, m.size(0));
  return is_half(x) && has_thin_kernel(m, /*ranks=*/1);
}

/// Memory for x mᵀ of T rows, x of this type, m (ranks, depth): each row contiguous where a kernel fills it,
/// else as the BLAS multiplies faster.
inline Tensor empty_thin(int64_t T, torch::ScalarType x, const Tensor& m, int64_t depth) {
  // MKL wants it turned over always; OpenBLAS where the product is not deep.
  const bool turned = !has_thin_kernel(x, m) && m.is_cpu() && (at::hasMKL() || depth <= 1024);
  const auto ranks = m.size(0);
  return turned ? at::empty({ranks, T}, m.options()).t() : at::empty({T, ranks}, m.options());
}

/// Calls `run` with the kernels of this machine and a value of x's type where they take all three; else
/// returns false.
template <class Run>
bool with_thin_kernels(const Tensor& c, const Tensor& x, const Tensor& m, [[maybe_unused]] const Run& run) {
  if (!has_thin_kernel(x.scalar_type(), m) || c.stride(1) != 1 || x.stride(1) != 1 || m.stride(1) != 1)
    return false;
#if PEFT_HAS_AVX
  const auto on = [&](auto cpu) {
    if (x.scalar_type() == torch::kBFloat16) return run(cpu, c10::BFloat16());
    if (x.scalar_type() == torch::kFloat16) return run(cpu, c10::Half());
    run(cpu, float());
  };
  cpu_level() == CpuLevel::avx512 ? on(ThinAvx512()) : on(ThinAvx2());
#endif
  return true;
}

template <class T = float>
Rows<const T> rows_of(const Tensor& t) {
  return {t.data_ptr<T>(), t.stride(0)};
}
template <class T = float>
Rows<T> written_rows_of(const Tensor& t) {
  return {t.data_ptr<T>(), t.stride(0)};
}

// Where no kernel takes them, the BLAS do, the long side in the type of the short one.

/// c ← scale · x mᵀ: c (T, ranks), x (T, d), m (ranks, d).
inline void thin_inner(Tensor c, const Tensor& x, const Tensor& m, double scale = 1) {
  const bool done = with_thin_kernels(c, x, m, [&](auto cpu, auto value) {
    thin_inner_loop<decltype(cpu)>(rows_of<decltype(value)>(x), rows_of(m), written_rows_of(c), x.size(0),
                                   x.size(1), m.size(0), static_cast<float>(scale));
  });
  if (done) return;
  const auto in = x.to(m.scalar_type());
  if (c.stride(0) == 1) {
    c.t().addmm_(m, in.t(), 0, scale);
  } else {
    c.addmm_(in, m.t(), 0, scale);
  }
}

/// y ← y + scale · c m, or without `adds` y ← scale · c m: y (T, d), c (T, ranks), m (ranks, d).
inline void thin_update(Tensor y, const Tensor& c, const Tensor& m, double scale = 1, bool adds = true) {
  const bool done = with_thin_kernels(c, y, m, [&](auto cpu, auto value) {
    thin_update_loop<decltype(cpu)>(written_rows_of<decltype(value)>(y), rows_of(c), rows_of(m), y.size(0),
                                    y.size(1), m.size(0), static_cast<float>(scale), adds);
  });
  if (done) return;
  auto out = y.to(m.scalar_type());
  out.addmm_(c, m, adds ? 1 : 0, scale);
  if (!out.is_same(y)) y.copy_(out);
}

/// m ← m + scale · cᵀ x: m (ranks, d), c (T, ranks), x (T, d).
inline void thin_outer(Tensor m, const Tensor& c, const Tensor& x, double scale = 1) {
  const bool done = with_thin_kernels(c, x, m, [&](auto cpu, auto value) {
    thin_outer_loop<decltype(cpu)>(written_rows_of(m), rows_of(c), rows_of<decltype(value)>(x), x.size(0),
                                   x.size(1), m.size(0), static_cast<float>(scale));
  });
  if (!done) m.addmm_(c.t(), x.to(m.scalar_type()), 1, scale);
}

}  // namespace peft::internal
