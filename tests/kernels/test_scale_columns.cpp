#include <torch/torch.h>

#include <vector>

#include "catch.h"
#include "peft/kernels/kept.h"
#include "peft/kernels/row_norms.h"
#include "peft/kernels/scale_columns.h"
#include "peft/train/autocast.h"

using peft::FastPaths;
using peft::internal::CpuLevel;
using peft::internal::CpuLevelGuard;
using peft::internal::Kept;
using peft::internal::RowNorms;
using peft::internal::scaled_columns;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

double largest(const Tensor& a, const Tensor& b) {
  REQUIRE(a.sizes() == b.sizes());
  return a.numel() ? (a - b).abs().max().to(torch::kFloat64).item<double>() : 0.0;
}

Tensor trained(at::IntArrayRef shape, torch::ScalarType type = torch::kFloat64) {
  return torch::randn(shape, type).requires_grad_();
}

Tensor mixed(const Tensors& tensors) {
  auto total = torch::zeros({}, tensors.front().options());
  for (const auto& t : tensors) {
    const auto weights = torch::arange(1, t.numel() + 1, t.options()).mul(0.37).sin().view(t.sizes());
    total = total + (t.square() * weights).sum();
  }
  return total;
}

bool is_node(const Tensor& y) { return y.grad_fn() && y.grad_fn()->name() == "ScaledColumnsBackward"; }

/// y, its gradients and theirs, against the composed form.
double error(const Tensor& p, const Tensor& c, const Tensor& a = {}) {
  Tensors inputs;
  for (const auto& t : {p, c, a}) {
    if (t.defined() && t.requires_grad()) inputs.push_back(t);
  }
  const auto run = [&](const Tensor& y) {
    Tensors all{y.detach()};
    for (const auto& t : torch::autograd::grad({mixed({y})}, inputs, {}, true)) all.push_back(t);
    const auto first = torch::autograd::grad({mixed({y})}, inputs, {}, true, /*create_graph=*/true);
    for (const auto& t : torch::autograd::grad({mixed(first)}, inputs)) all.push_back(t);
    return all;
  };
  const auto y = scaled_columns(p, c, a);
  CHECK(is_node(y));
  const auto ours = run(y), theirs = run(a.defined() ? p * c + a : p * c);
  double worst = 0;
  for (size_t i = 0; i < ours.size(); ++i) worst = std::max(worst, largest(ours[i], theirs[i].detach()));
  return worst;
}

}  // namespace

TEST_CASE("Scaled columns are what the composed form gives, and so are their derivatives",
          "[scale_columns]") {
  torch::manual_seed(1);
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 5}, {3, 5}, {2, 3, 5}, {150, 5}, {0, 5}}) {
    const auto p = trained(shape), c = trained({5});
    CHECK(error(p, c) < 1e-10);
    CHECK(error(p, c, torch::randn({5}, torch::kFloat64)) < 1e-10);
    CHECK(error(p, c, trained(shape)) < 1e-10);
    CHECK(error(p.detach(), c) < 1e-10);
    CHECK(error(p.detach(), c, trained(shape)) < 1e-10);
  }
  // p and a that are results, p turned over, the gradient spread out from one number.
  const auto base = trained({5, 4}), c = trained({5});
  CHECK(error(base.t() * 2, (c * 3)) < 1e-10);
  scaled_columns(base.t(), c).sum().backward();
  CHECK(largest(c.grad(), base.detach().sum(1)) < 1e-12);
  CHECK(largest(base.grad(), c.detach().unsqueeze(1).expand({5, 4})) < 1e-12);
}

TEST_CASE("Finite differences agree with the derivatives of scaled columns", "[scale_columns]") {
  torch::manual_seed(2);
  const auto p = trained({3, 4}), c = trained({4}), a = trained({3, 4});
  const auto loss = [&] { return mixed({scaled_columns(p, c, a)}); };
  const auto gradients = torch::autograd::grad({loss()}, {p, c, a});
  size_t i = 0;
  for (const auto& leaf : {p, c, a}) {
    auto flat = leaf.detach().view(-1);
    const auto gradient = gradients[i++].reshape(-1);
    for (int64_t j = 0; j < flat.numel(); ++j) {
      const double value = flat[j].item<double>(), step = 1e-5;
      const auto at = [&](double there) {
        flat[j] = there;
        return loss().item<double>();
      };
      const double numeric = (at(value + step) - at(value - step)) / (2 * step);
      flat[j] = value;
      CHECK(gradient[j].item<double>() == Approx(numeric).epsilon(1e-6).margin(1e-6));
    }
  }
}

TEST_CASE("Scaled columns are the same in vectors and in a loop, on any number of threads",
          "[scale_columns]") {
  torch::manual_seed(3);
  const auto p = torch::randn({300, 37}), g = torch::randn({300, 37}), c = torch::randn({37});
  const auto run = [&](CpuLevel level, bool scales) {
    const CpuLevelGuard guard(level);
    const auto scaled = scales ? torch::zeros_like(g) : Tensor();
    const auto sum = peft::internal::scale_and_sum<float>(g, p, c, scaled);
    if (scales) CHECK(torch::equal(scaled, g * c));
    return sum;
  };
  const auto exact = (g.to(torch::kFloat64) * p.to(torch::kFloat64)).sum(0).to(torch::kFloat32);
  for (const auto level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
    const auto sum = run(level, true);
    CHECK(largest(sum, exact) < 2e-5);
    CHECK(torch::equal(run(level, false), sum));
    const auto threads = at::get_num_threads();
    at::set_num_threads(3);
    CHECK(torch::equal(run(level, true), sum));
    at::set_num_threads(threads);
  }
}

TEST_CASE("Scaled columns notice tensors that changed and a second backward", "[scale_columns]") {
  torch::manual_seed(4);
  const auto p = trained({3, 4}), c = trained({4});
  for (const auto& tensor : {p, c}) {
    const auto loss = scaled_columns(p, c).sum();
    {
      torch::NoGradGuard no_grad;
      Tensor(tensor).add_(1);
    }
    CHECK_THROWS_WITH(loss.backward(), Contains("modified by an inplace operation"));
  }
  const auto loss = scaled_columns(p, c).sum();
  loss.backward({}, /*retain_graph=*/true);
  CHECK_NOTHROW(loss.backward());
  CHECK_THROWS_WITH(loss.backward(), Contains("backward through the graph a second time"));
  auto y = scaled_columns(p, c);
  y.mul_(2);
  CHECK_NOTHROW(y.sum().backward());
}

TEST_CASE("Scaled columns are composed where there is no kernel, and nothing to sum", "[scale_columns]") {
  torch::manual_seed(5);
  const auto p = trained({3, 4}), c = trained({4});
  REQUIRE(is_node(scaled_columns(p, c)));
  CHECK_FALSE(is_node(scaled_columns(p, c.detach())));
  CHECK_FALSE(is_node(scaled_columns(p, c, trained({4}))));
  CHECK_FALSE(is_node(scaled_columns(p.to(torch::kFloat32), c)));
  CHECK_FALSE(is_node(scaled_columns(p.to(torch::kBFloat16), c.to(torch::kBFloat16))));
  {
    const peft::Autocast autocast(torch::kCPU);
    CHECK_FALSE(is_node(scaled_columns(p, c)));
  }
  {
    const torch::NoGradGuard no_grad;
    CHECK_FALSE(scaled_columns(p, c).requires_grad());
  }
  const FastPaths plain(false);
  CHECK_FALSE(is_node(scaled_columns(p, c)));
}

TEST_CASE("Row norms are those of the sum, to rounding", "[row_norms]") {
  torch::manual_seed(6);
  const auto type = GENERATE(torch::kFloat32, torch::kFloat64);
  const double bound = type == torch::kFloat32 ? 1e-6 : 1e-14;
  const auto W = torch::randn({40, 300}, type);
  const auto check = [&](const Tensor& A, const Tensor& B, double s) {
    const auto wide = W.to(torch::kFloat64) + s * at::mm(B.to(torch::kFloat64), A.to(torch::kFloat64));
    const auto exact = wide.norm(2, 1), norms = RowNorms().of(W, A, B, s).to(torch::kFloat64);
    INFO(((norms - exact) / exact).abs().max().item<double>());
    CHECK(((norms - exact) / exact).abs().max().item<double>() < bound);
    CHECK(RowNorms().of(W, A, B, s).scalar_type() == type);
  };
  for (const double s : {0.0, 0.01, 1.0, 30.0, -2.0}) {
    check(torch::randn({4, 300}, type), torch::randn({40, 4}, type), s);
  }
  check(torch::randn({4, 300}, type), torch::zeros({40, 4}, type), 2);
  // Rows that the update all but takes away: the squares alone would leave few digits.
  for (const double left : {0.5, 0.1, 1e-2}) {
    auto B = torch::zeros({40, 4}, type);
    B.narrow(0, 0, 4).copy_(torch::eye(4, type).mul(left - 1));
    check(W.narrow(0, 0, 4).contiguous(), B, 1);
  }
  const auto turned = torch::randn({300, 40}, type).t();
  const auto A = torch::randn({2, 300}, type), B = torch::randn({40, 2}, type);
  CHECK(largest(RowNorms().of(turned, A, B, 0.5), (turned + 0.5 * B.mm(A)).norm(2, 1)) < 20 * bound);
}

TEST_CASE("A kept value is computed anew when what it comes from has changed", "[kept]") {
  const Kept kept;
  int times = 0;
  auto a = torch::ones({3}), b = torch::ones({3});
  const auto anew = [&](const Tensors& sources, double number) {
    const auto before = times;
    const auto value = kept.of(sources, number, [&] {
      ++times;
      auto sum = torch::zeros({});
      for (const auto& t : sources) {
        if (t.defined()) sum = sum + t.sum();
      }
      return sum * number;
    });
    double expected = 0;
    for (const auto& t : sources) {
      if (t.defined()) expected += t.sum().item<double>();
    }
    CHECK(value.item<double>() == expected * number);
    return times > before;
  };
  CHECK(anew({a, b, {}}, 2));
  CHECK_FALSE(anew({a, b, {}}, 2));
  CHECK(anew({a, b, {}}, 3));
  a.add_(1);
  CHECK(anew({a, b, {}}, 3));
  CHECK(anew({a, {}, b}, 3));
  CHECK(anew({b, {}, a}, 3));
  CHECK(anew({b, {}}, 3));
  b.set_data(torch::full({3}, 7.0F));
  CHECK(anew({b, {}}, 3));
  // Memory that is freed and taken again for other values.
  for (int i = 0; i < 20; ++i) {
    b.set_data(torch::full({3}, 10.0F + static_cast<float>(i)));
    CHECK(anew({b, {}}, 3));
    CHECK_FALSE(anew({b, {}}, 3));
  }
  const Kept copy(kept);
  copy.of({b, {}}, 3, [&] {
    ++times;
    return b;
  });
  CHECK_FALSE(anew({b, {}}, 3));
  const c10::InferenceMode inference;
  CHECK(anew({torch::ones({2})}, 1));
  CHECK(anew({a}, 1));
  CHECK(anew({a}, 1));
}
