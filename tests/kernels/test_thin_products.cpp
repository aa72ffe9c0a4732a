// Products with one short side against float64, on every kind of processor this one can stand in for.
#include <torch/torch.h>

#include <limits>
#include <vector>

#include "catch.h"
#include "peft/kernels/thin_products.h"

namespace {

using peft::Tensor;
using peft::internal::CpuLevel;

double distance(const Tensor& a, const Tensor& b) {
  return (a.to(torch::kFloat64) - b.to(torch::kFloat64)).abs().max().item<double>();
}

/// A (rows, columns) matrix that is the middle of a larger one whose other entries are NaN, so that reading
/// or writing beside it shows.
struct Framed {
  Framed(int64_t rows, int64_t columns, torch::ScalarType type, bool filled = true) {
    whole = torch::full({rows + 2, columns + 4}, std::numeric_limits<double>::quiet_NaN(), type);
    middle = whole.narrow(0, 1, rows).narrow(1, 2, columns);
    if (filled) middle.normal_();
  }
  bool frame_is_whole() const {
    auto frame = whole.clone();
    frame.narrow(0, 1, middle.size(0))
        .narrow(1, 2, middle.size(1))
        .fill_(std::numeric_limits<double>::quiet_NaN());
    return frame.isnan().all().item<bool>();
  }
  Tensor whole, middle;
};

/// `type`: of the short side; `side`: of the long one.
void check_products(int64_t T, int64_t d, int64_t ranks, torch::ScalarType type, torch::ScalarType side) {
  INFO("T " << T << ", d " << d << ", ranks " << ranks << ", " << type << " and " << side);
  const double tolerance = type == torch::kFloat64 ? 1e-12 : 2e-6 * static_cast<double>(T + d + ranks);
  // Half an ulp: what is written is rounded once.
  const double ulp = side == torch::kBFloat16 ? 0x1p-9 : side == torch::kFloat16 ? 0x1p-12 : 0;
  const auto rounds_to = [&](const Tensor& value, const Tensor& exact) {
    const auto error = (value.to(torch::kFloat64) - exact).abs();
    return (error <= 10 * tolerance + 2 * ulp * exact.abs()).all().item<bool>();
  };
  const Framed x(T, d, side), m(ranks, d, type);
  const auto wide = [](const Framed& framed) {
    return framed.middle.to(torch::kFloat64, false, /*copy=*/true);
  };

  const Framed c(T, ranks, type, /*filled=*/false);
  peft::internal::thin_inner(c.middle, x.middle, m.middle, 0.5);
  CHECK(distance(c.middle, 0.5 * torch::mm(wide(x), wide(m).t())) < tolerance);
  CHECK(c.frame_is_whole());

  const Framed y(T, d, side);
  const auto before = wide(y);
  peft::internal::thin_update(y.middle, c.middle, m.middle, -0.25);
  CHECK(rounds_to(y.middle, before - 0.25 * torch::mm(wide(c), wide(m))));
  CHECK(y.frame_is_whole());

  const Framed fresh(T, d, side, /*filled=*/false);
  peft::internal::thin_update(fresh.middle, c.middle, m.middle, 2, /*adds=*/false);
  CHECK(rounds_to(fresh.middle, 2 * torch::mm(wide(c), wide(m))));

  const Framed sum(ranks, d, type);
  const auto start = wide(sum);
  peft::internal::thin_outer(sum.middle, c.middle, x.middle, 0.5);
  CHECK(distance(sum.middle, start + 0.5 * torch::mm(wide(c).t(), wide(x))) < 10 * tolerance);
  CHECK(sum.frame_is_whole());
}

}  // namespace

TEST_CASE("Thin products give what float64 gives, whatever the shape, and write nothing else") {
  torch::manual_seed(1);
  const auto level = GENERATE(CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512);
  const peft::internal::CpuLevelGuard guard(level);
  const auto check_float = [](int64_t T, int64_t d, int64_t ranks, torch::ScalarType side = torch::kFloat32) {
    check_products(T, d, ranks, torch::kFloat32, side);
  };
  for (const int64_t T : {1, 2, 3, 7, 40}) {
    for (const int64_t d : {1, 7, 8, 16, 31, 33, 65}) {
      for (const int64_t ranks : {1, 3, 4, 8, 13}) check_float(T, d, ranks);
    }
  }
  check_float(600, 100, 12);  // rows in two blocks
  check_float(5, 40, 70);     // more ranks than the kernels take
  check_products(9, 33, 5, torch::kFloat64, torch::kFloat64);
  for (const auto half : {torch::kBFloat16, torch::kFloat16}) {
    for (const int64_t d : {1, 8, 31, 33, 65}) {
      for (const int64_t T : {1, 7}) check_float(T, d, 5, half);
    }
    check_float(600, 100, 12, half);
    check_float(5, 40, 70, half);
  }
}

TEST_CASE("Lanes of half types are rounded as LibTorch rounds them") {
  std::vector<float> values{0,
                            -0.0F,
                            1,
                            1.00390625F,
                            1.01171875F,
                            3.4e38F,
                            -65519.0F,
                            65520.0F,
                            1e-40F,
                            6e-8F,
                            2.9e-8F,
                            3.0e-8F,
                            -1e-7F,
                            0.1F,
                            std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()};
  const auto y = torch::tensor(values).view({1, 16}), none = torch::zeros({1, 16});
  const auto one = torch::ones({1, 1});
  for (const auto level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
    const peft::internal::CpuLevelGuard guard(level);
    for (const auto half : {torch::kBFloat16, torch::kFloat16}) {
      const auto rounded = torch::empty({1, 16}, half);
      peft::internal::thin_update(rounded, one, y, 1, /*adds=*/false);
      CHECK(torch::equal(rounded, y.to(half)));
      peft::internal::thin_update(rounded, one, none);
      CHECK(torch::equal(rounded, y.to(half)));
    }
  }
  const auto nan = torch::full({1, 16}, std::numeric_limits<float>::quiet_NaN());
  for (const auto half : {torch::kBFloat16, torch::kFloat16}) {
    const auto rounded = torch::zeros({1, 16}, half);
    peft::internal::thin_update(rounded, one, nan);
    CHECK(rounded.isnan().all().item<bool>());
  }
}

TEST_CASE("Thin products take a short side that lies turned over, as the BLAS wants it") {
  torch::manual_seed(2);
  const auto x = torch::randn({20, 30}), m = torch::randn({4, 30}), c = torch::empty({4, 20}).t();
  peft::internal::thin_inner(c, x, m, 3);
  CHECK(distance(c, 3 * torch::mm(x, m.t())) < 1e-4);
  const auto y = torch::zeros({20, 30});
  peft::internal::thin_update(y, c, m);
  CHECK(distance(y, torch::mm(c, m)) < 1e-3);
  const auto sum = torch::zeros({4, 30});
  peft::internal::thin_outer(sum, c, x);
  CHECK(distance(sum, torch::mm(c.t(), x)) < 1e-3);
}

TEST_CASE("Thin products on several threads are those of one") {
  torch::manual_seed(3);
  const auto x = torch::randn({501, 301}), m = torch::randn({8, 301});
  const auto run = [&](int threads) {
    const auto before = at::get_num_threads();
    at::set_num_threads(threads);
    const auto c = torch::empty({501, 8}), y = torch::ones({501, 301}), sum = torch::zeros({8, 301});
    peft::internal::thin_inner(c, x, m);
    peft::internal::thin_update(y, c, m, 0.1);
    peft::internal::thin_outer(sum, c, x);
    at::set_num_threads(before);
    return std::vector<Tensor>{c, y, sum};
  };
  const auto one = run(1), two = run(2);
  for (size_t i = 0; i < one.size(); ++i) {
    if (peft::internal::has_thin_kernel(x, 8)) {
      CHECK(torch::equal(one[i], two[i]));
    } else {
      CHECK(distance(one[i], two[i]) < 1e-3);
    }
  }
}
