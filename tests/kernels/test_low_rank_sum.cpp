#include <limits>
#include <vector>

#include "catch.h"
#include "peft/kernels/low_rank_sum.h"

using peft::internal::CpuLevel;
using peft::internal::CpuLevelGuard;
using peft::internal::low_rank_sum;
using torch::Tensor;

namespace {

std::vector<CpuLevel> levels() { return {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}; }

}  // namespace

TEST_CASE("W + s B A is that of addmm for every shape, on every level", "[low_rank_sum]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  for (const auto level : levels()) {
    const CpuLevelGuard guard(level);
    for (const int64_t rows : {1, 3, 8, 64, 131}) {
      for (const int64_t columns : {1, 7, 16, 48, 100, 128}) {
        for (const int64_t rank : {1, 2, 8, 33}) {
          const auto W = torch::randn({rows, columns}), before = W.clone();
          const auto B = torch::randn({rows, rank}), A = torch::randn({rank, columns});
          const auto expected = W.to(torch::kDouble) + 0.3 * B.to(torch::kDouble).mm(A.to(torch::kDouble));
          const auto plain = low_rank_sum(W, B, A, 0.3);
          CHECK(torch::allclose(plain.sum.to(torch::kDouble), expected, 1e-5, 1e-5));
          CHECK(torch::equal(W, before));
          if (plain.finite) CHECK(plain.sum.isfinite().all().item<bool>());
          // Factors and weights stored the other way round, as of a Conv1D.
          const auto turned = low_rank_sum(W, B.t().contiguous().t(), A.t().contiguous().t(), 0.3);
          CHECK(torch::allclose(turned.sum, plain.sum, 1e-5, 1e-5));
          const auto gaps = torch::randn({rows, 2 * columns}).slice(1, 0, columns, 1);
          CHECK(torch::allclose(low_rank_sum(gaps, B, A, 0.3).sum, torch::addmm(gaps, B, A, 1, 0.3), 1e-5,
                                1e-5));
        }
      }
    }
  }
}

TEST_CASE("Sums that are not finite are seen wherever they are", "[low_rank_sum]") {
  const torch::NoGradGuard no_grad;
  const auto B = torch::ones({70, 4}), A = torch::ones({4, 52});
  for (const auto level : {CpuLevel::avx2, CpuLevel::avx512}) {
    if (level > peft::internal::highest_cpu_level()) continue;
    const CpuLevelGuard guard(level);
    CHECK(low_rank_sum(torch::zeros({70, 52}), B, A, 1).finite);
    for (const int64_t row : {0, 7, 8, 63, 64, 69}) {
      for (const int64_t column : {0, 15, 16, 31, 32, 51}) {
        for (const auto value :
             {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
              -std::numeric_limits<float>::infinity()}) {
          auto W = torch::zeros({70, 52});
          W[row][column] = value;
          CHECK_FALSE(low_rank_sum(W, B, A, 1).finite);
        }
        auto W = torch::zeros({70, 52});
        W[row][column] = std::numeric_limits<float>::max();
        CHECK(low_rank_sum(W, B, A, 1).finite);
        CHECK_FALSE(low_rank_sum(W, B, A, 1e38).finite);
      }
    }
  }
}

TEST_CASE("A low-rank sum in another type or with gradients is addmm's", "[low_rank_sum]") {
  torch::manual_seed(1);
  const auto W = torch::randn({5, 6}), A = torch::randn({2, 6});
  auto B = torch::randn({5, 2}).requires_grad_();
  low_rank_sum(W, B, A, 2).sum.sum().backward();
  CHECK(torch::allclose(B.grad(), 2 * A.sum(1).expand({5, 2}), 1e-5, 1e-6));
  const torch::NoGradGuard no_grad;
  const auto wide = [](const Tensor& t) { return t.to(torch::kDouble); };
  CHECK(torch::equal(low_rank_sum(wide(W), wide(B), wide(A), 2).sum,
                     torch::addmm(wide(W), wide(B), wide(A), 1, 2)));
}
