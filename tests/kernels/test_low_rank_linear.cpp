#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"
#include "peft/core/adapted.h"
#include "peft/core/conv1d.h"
#include "peft/core/project.h"
#include "peft/kernels/cpu.h"
#include "peft/kernels/hash_dropout.h"
#include "peft/kernels/low_rank_linear.h"
#include "peft/methods/adalora.h"
#include "peft/methods/bias.h"
#include "peft/methods/ia3.h"
#include "peft/methods/increlora.h"
#include "peft/methods/lora.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"
#include "peft/train/autocast.h"
#include "peft/train/optimizer.h"

using peft::FastPaths;
using peft::LoraInit;
using peft::LoraOptions;
using peft::LowRankTerm;
using peft::named;
using peft::internal::CpuLevel;
using peft::internal::CpuLevelGuard;
using peft::internal::HashDropout;
using peft::internal::LowRankLinear;
using torch::Tensor;
using Layers = std::vector<LowRankLinear>;
using Tensors = std::vector<Tensor>;
namespace nn = torch::nn;

namespace {

double largest(const Tensor& a, const Tensor& b) {
  REQUIRE(a.sizes() == b.sizes());
  REQUIRE(a.scalar_type() == b.scalar_type());
  return a.numel() ? (a - b).abs().max().to(torch::kFloat64).item<double>() : 0.0;
}

/// What the node computes, by operations that LibTorch differentiates. `masks`: of each layer, 0 or 1.
Tensors composed(const Tensor& x, const Layers& layers, const Tensors& masks = {}) {
  Tensors outputs;
  for (size_t k = 0; k < layers.size(); ++k) {
    const auto& [linear, term] = layers[k];
    auto y = at::linear(x, linear.weight, linear.bias);
    if (term) {
      const auto input = masks.empty() ? x : x * masks[k] / (1 - term->dropout);
      const auto A = term->E.defined() ? term->A * term->E : term->A;
      y = y + at::linear(at::linear(input, A), term->B) * term->scale;
    }
    outputs.push_back(y);
  }
  return outputs;
}

Tensor random(at::IntArrayRef shape, torch::ScalarType type = torch::kFloat64) {
  return torch::randn(shape, type);
}
Tensor trained(at::IntArrayRef shape, torch::ScalarType type = torch::kFloat64) {
  return random(shape, type).requires_grad_();
}

LowRankLinear layer(int64_t in, int64_t out, int64_t rank, bool bias, bool diagonal, double dropout = 0,
                    torch::ScalarType type = torch::kFloat64) {
  LowRankTerm term{trained({rank, in}, type), trained({out, rank}, type), {}, 0.7, dropout, {}};
  if (diagonal) term.E = trained({rank, 1}, type);
  return {{random({out, in}, type), bias ? random({out}, type) : Tensor()}, term};
}

/// The mask that a layer draws after this seed.
Tensor mask_of(double rate, uint64_t seed, at::IntArrayRef shape, torch::ScalarType type) {
  torch::manual_seed(seed);
  const auto mask = torch::zeros(shape, type);
  HashDropout::draw(rate).mask(0, torch::ones_like(mask), mask);
  return mask;
}

/// x and the factors.
Tensors leaves(const Tensor& x, const Layers& layers) {
  Tensors result;
  if (x.requires_grad()) result.push_back(x);
  for (const auto& [linear, term] : layers) {
    if (!term) continue;
    for (const auto& factor : {term->A, term->B, term->E}) {
      if (factor.defined() && factor.requires_grad()) result.push_back(factor);
    }
  }
  return result;
}

/// A scalar of which every entry of every output matters differently.
Tensor mixed(const Tensors& outputs) {
  auto total = torch::zeros({}, outputs.front().options());
  for (const auto& y : outputs) {
    const auto weights = torch::arange(1, y.numel() + 1, y.options()).mul(0.37).sin().view(y.sizes());
    total = total + (y.square() * weights).sum();
  }
  return total;
}

/// Largest difference of outputs, gradients and gradients of the gradients' norm, against the composed form,
/// each relative to the largest entry.
double error(const Tensor& x, const Layers& layers, const Tensors& masks = {}, uint64_t seed = 0,
             bool twice = true) {
  torch::manual_seed(seed);
  const auto run = peft::internal::low_rank_linear(x, layers);
  REQUIRE(run);
  const auto ours = *run, theirs = composed(x, layers, masks);
  double worst = 0;
  const auto compare = [&worst](const Tensors& a, const Tensors& b) {
    REQUIRE(a.size() == b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      const auto size = b[i].numel() ? b[i].abs().max().to(torch::kFloat64).item<double>() : 0.0;
      worst = std::max(worst, largest(a[i], b[i]) / std::max(1.0, size));
    }
  };
  compare(ours, theirs);
  const auto inputs = leaves(x, layers);
  if (inputs.empty()) return worst;
  CHECK(ours.front().grad_fn()->name() == "LowRankLinearBackward");
  compare(torch::autograd::grad({mixed(ours)}, inputs, {}, /*retain_graph=*/true),
          torch::autograd::grad({mixed(theirs)}, inputs, {}, true));
  if (!twice) return worst;
  const auto second = [&](const Tensors& outputs) {
    const auto first = torch::autograd::grad({mixed(outputs)}, inputs, {}, true, /*create_graph=*/true);
    return torch::autograd::grad({mixed(first)}, inputs);
  };
  compare(second(ours), second(theirs));
  return worst;
}

/// Central differences of `function` in every entry of these leaves.
void check_numerically(const Tensors& inputs, const std::function<Tensor()>& function) {
  const auto gradients = torch::autograd::grad({function()}, inputs);
  torch::NoGradGuard no_grad;
  for (size_t i = 0; i < inputs.size(); ++i) {
    auto flat = inputs[i].detach().view(-1);
    const auto gradient = gradients[i].contiguous().view(-1);
    for (int64_t j = 0; j < flat.numel(); ++j) {
      const double value = flat[j].item<double>(), step = 1e-5;
      const auto at = [&](double there) {
        flat[j] = there;
        torch::AutoGradMode grad(true);
        return function().item<double>();
      };
      const double numeric = (at(value + step) - at(value - step)) / (2 * step);
      flat[j] = value;
      REQUIRE(gradient[j].item<double>() == Approx(numeric).epsilon(1e-6).margin(1e-6));
    }
  }
}

}  // namespace

TEST_CASE("The low-rank node computes what the composed form does, and so do its derivatives",
          "[low_rank_linear]") {
  torch::manual_seed(1);
  const bool input_trains = GENERATE(true, false);
  const auto input = [&](Tensor x) { return x.detach().requires_grad_(input_trains); };
  SECTION("one layer, any number of leading dimensions") {
    for (const bool bias : {true, false}) {
      for (const bool diagonal : {true, false}) {
        const Layers one{layer(5, 4, 2, bias, diagonal)};
        for (const auto& shape :
             std::vector<std::vector<int64_t>>{{5}, {3, 5}, {2, 3, 5}, {2, 1, 2, 5}, {0, 5}}) {
          CHECK(error(input(random(shape)), one) < 1e-12);
        }
      }
    }
  }
  SECTION("an input that is not contiguous, and a weight that is turned over") {
    auto one = layer(5, 4, 3, true, false);
    one.linear.weight = random({5, 4}).t();
    CHECK(error(input(random({5, 3}).t()), {one}) < 1e-12);
    CHECK(error(input(random({3, 2, 5}).transpose(0, 1)), {one}) < 1e-12);
    CHECK(error(input(random({3, 1, 5}).expand({3, 4, 5})), {one}) < 1e-12);
  }
  SECTION("layers of several widths and ranks on one input, one of them without a term") {
    const Layers group{layer(6, 4, 2, true, false),
                       layer(6, 3, 1, false, true),
                       {{random({5, 6}), random({5})}, {}},
                       layer(6, 7, 3, true, true)};
    CHECK(error(input(random({2, 3, 6})), group) < 1e-12);
  }
  SECTION("many tokens") {
    const Layers group{layer(12, 8, 3, true, false), layer(12, 8, 3, true, false)};
    CHECK(error(input(random({300, 12})), group) < 1e-11);
    const Layers single{layer(12, 8, 3, true, true, 0, torch::kFloat32)};
    CHECK(error(input(random({300, 12}, torch::kFloat32)), single) < 1e-5);
  }
  SECTION("factors of which some are frozen") {
    auto one = layer(5, 4, 2, true, true);
    one.term->A.set_requires_grad(false);
    CHECK(error(input(random({3, 5})), {one}) < 1e-12);
    one.term->E.set_requires_grad(false);
    CHECK(error(input(random({3, 5})), {one}) < 1e-12);
    one.term->B.set_requires_grad(false);
    CHECK(error(input(random({3, 5})), {one}) < 1e-12);
  }
  SECTION("dropout, through blocks of rows, each layer with a mask of its own") {
    const double rate = 0.4;
    for (const int64_t width : {int64_t{8}, int64_t{160}}) {
      const Layers group{layer(width, 4, 2, true, false, rate), layer(width, 5, 3, false, true, rate)};
      const auto rows = width == 8 ? 6 : 450;  // blocks are of 204 rows of 160
      torch::manual_seed(9);
      Tensors masks;
      for (size_t k = 0; k < 2; ++k) {
        const auto mask = torch::zeros({rows, width}, torch::kFloat64);
        HashDropout::draw(rate).mask(0, torch::ones_like(mask), mask);
        masks.push_back(mask);
      }
      CHECK(error(input(random({rows, width})), group, masks, 9, width == 8) < 1e-11);
    }
  }
}

TEST_CASE("Finite differences agree with the low-rank node's first and second derivatives",
          "[low_rank_linear]") {
  torch::manual_seed(2);
  const double rate = GENERATE(0.0, 0.3);
  const Layers group{layer(4, 3, 2, true, true, rate), layer(4, 2, 1, false, false, rate)};
  const auto x = trained({3, 4});
  const auto inputs = leaves(x, group);
  const auto loss = [&] {
    torch::manual_seed(4);
    return mixed(*peft::internal::low_rank_linear(x, group));
  };
  check_numerically(inputs, loss);
  check_numerically(inputs, [&] {
    return mixed(torch::autograd::grad({loss()}, inputs, {}, /*retain_graph=*/true, /*create_graph=*/true));
  });
}

TEST_CASE("The low-rank node computes no gradient that nobody asked for", "[low_rank_linear]") {
  torch::manual_seed(3);
  const Layers group{layer(5, 4, 2, true, true), layer(5, 3, 2, true, false)};
  const auto x = trained({6, 5});
  const auto all = leaves(x, group);
  const auto complete = torch::autograd::grad({mixed(*peft::internal::low_rank_linear(x, group))}, all);
  for (size_t i = 0; i < all.size(); ++i) {
    const auto alone = torch::autograd::grad({mixed(*peft::internal::low_rank_linear(x, group))}, {all[i]});
    CHECK(largest(alone.at(0), complete[i]) < 1e-12);
  }
  // An output that nobody used has no gradient, nor have its factors.
  const auto outputs = *peft::internal::low_rank_linear(x, group);
  const auto part =
      torch::autograd::grad({outputs[1].square().sum()}, all, {}, false, false, /*allow_unused=*/true);
  const auto expected =
      torch::autograd::grad({composed(x, group)[1].square().sum()}, all, {}, false, false, true);
  for (size_t i = 0; i < all.size(); ++i) {
    REQUIRE(part[i].defined() == expected[i].defined());
    if (part[i].defined()) CHECK(largest(part[i], expected[i]) < 1e-12);
  }
  torch::NoGradGuard no_grad;
  CHECK_FALSE(peft::internal::low_rank_linear(x, group)->front().requires_grad());
}

TEST_CASE("The order of a low-rank layer's products follows their cost, and changes no result",
          "[low_rank_linear]") {
  torch::manual_seed(12);
  using peft::internal::LowRankShape;
  using peft::internal::ProductOrder;
  const auto order = [](int64_t tokens, int64_t in, int64_t out, int64_t rank, bool learns, bool mergeable) {
    const auto chosen = ProductOrder::cheapest(LowRankShape{tokens, in, out, rank, learns, mergeable});
    return std::array{chosen.merged_forward, chosen.merged_backward, chosen.through_weight};
  };
  CHECK(order(1024, 768, 768, 8, true, true) == std::array{false, false, false});
  CHECK(order(1536, 768, 3072, 8, true, true) == std::array{true, false, false});
  CHECK(order(1536, 3072, 768, 8, true, true) == std::array{false, true, false});
  CHECK(order(1536, 768, 3072, 8, false, true) == std::array{true, false, false});
  CHECK(order(4096, 768, 768, 8, true, false) == std::array{false, false, false});
  CHECK(order(8192, 768, 768, 512, true, false) == std::array{false, false, true});

  const auto few = layer(6, 4, 2, true, true), many = layer(6, 100, 2, false, false),
             full = layer(5, 4, 5, true, false);
  const Layers both{few, layer(6, 3, 1, true, false)}, mixed_orders{few, many};
  CHECK(error(trained({40, 6}), {few}) < 1e-11);
  CHECK(error(random({40, 6}), {few}) < 1e-11);
  CHECK(error(trained({40, 6}), both) < 1e-11);
  CHECK(error(trained({40, 6}), mixed_orders) < 1e-11);
  auto frozen = layer(6, 100, 2, false, false);
  for (auto* factor : {&frozen.term->A, &frozen.term->B}) factor->set_requires_grad(false);
  CHECK(error(trained({40, 6}), {frozen}) < 1e-11);
  CHECK(error(trained({200, 5}), {full}) < 1e-11);
  CHECK(error(random({200, 5}), {full}) < 1e-11);
  // One output of two used, after memory was kept from a larger layer.
  const auto x = trained({40, 6});
  const auto inputs = leaves(x, both);
  for (size_t k = 0; k < 2; ++k) {
    const auto ours = torch::autograd::grad({(*peft::internal::low_rank_linear(x, both))[k].square().sum()},
                                            inputs, {}, false, false, /*allow_unused=*/true);
    const auto theirs =
        torch::autograd::grad({composed(x, both)[k].square().sum()}, inputs, {}, false, false, true);
    for (size_t i = 0; i < inputs.size(); ++i) {
      REQUIRE(ours[i].defined() == theirs[i].defined());
      if (ours[i].defined()) CHECK(largest(ours[i], theirs[i]) < 1e-11);
    }
  }
  torch::NoGradGuard no_grad;
  const auto outputs = *peft::internal::low_rank_linear(x, mixed_orders),
             expected = composed(x, mixed_orders);
  for (size_t k = 0; k < 2; ++k) CHECK(largest(outputs[k], expected[k]) < 1e-12);
}

TEST_CASE("A report prints the order of products once for every shape, on request", "[low_rank_linear]") {
  torch::manual_seed(13);
  std::ostringstream text;
  const Layers one{layer(6, 4, 2, true, false)};
  {
    const peft::ProductOrderReport report(text);
    for (int i = 0; i < 2; ++i) peft::internal::low_rank_linear(trained({5, 6}), one);
    peft::internal::low_rank_linear(trained({2, 20, 6}), one);
    const torch::NoGradGuard no_grad;
    peft::internal::low_rank_linear(random({5, 6}), one);
  }
  peft::internal::low_rank_linear(trained({7, 6}), one);
  CHECK(text.str() ==
        "5 tokens, 6 -> 4, rank 2, training: y += h B', dx += z A; dA = z' x, dB = g' h\n"
        "40 tokens, 6 -> 4, rank 2, training: y = x (W + s B A)', dx = g (W + s B A); dA = z' x, dB = g' h\n"
        "5 tokens, 6 -> 4, rank 2, evaluation: y += h B'\n");
}

TEST_CASE("The low-rank node notices tensors that changed and a second backward", "[low_rank_linear]") {
  torch::manual_seed(4);
  const auto one = layer(5, 4, 2, true, true);
  const auto x = random({3, 5});
  const auto run = [&] { return peft::internal::low_rank_linear(x, {one})->front().sum(); };
  const auto changed = [&](const Tensor& tensor) {
    const auto loss = run();
    {
      torch::NoGradGuard no_grad;
      Tensor(tensor).add_(1);
    }
    CHECK_THROWS_WITH(loss.backward(), Contains("modified by an inplace operation"));
  };
  for (const auto& tensor : {x, one.term->A, one.term->B, one.term->E}) changed(tensor);
  const auto grads = [&] { return one.term->A.grad().clone(); };
  const auto loss = run();
  loss.backward({}, /*retain_graph=*/true);
  const auto once = grads();
  loss.backward();
  CHECK(largest(grads(), 2 * once) < 1e-12);
  CHECK_THROWS_WITH(loss.backward(), Contains("backward through the graph a second time"));
  // The output may be changed in place.
  auto y = peft::internal::low_rank_linear(x, {one})->front();
  y.mul_(2).add_(1);
  CHECK_NOTHROW(y.sum().backward());
}

TEST_CASE("The low-rank node leaves to the composed form what it has no answer for", "[low_rank_linear]") {
  torch::manual_seed(5);
  const auto x = random({3, 5});
  const auto one = layer(5, 4, 2, true, false);
  const auto fits = [&](const Tensor& input, const LowRankLinear& layer) {
    return peft::internal::low_rank_linear(input, {layer}).has_value();
  };
  REQUIRE(fits(x, one));
  auto other = one;
  other.linear.weight = trained({4, 5});
  CHECK_FALSE(fits(x, other));
  other = one;
  other.linear.bias = trained({4});
  CHECK_FALSE(fits(x, other));
  CHECK_FALSE(fits(x.to(torch::kFloat32), one));
  CHECK_FALSE(fits(random({3, 6}), one));
  auto half = layer(5, 4, 2, true, false, 0, torch::kFloat32);
  CHECK_FALSE(fits(x.to(torch::kBFloat16), half));
  half.linear = {half.linear.weight.to(torch::kBFloat16), half.linear.bias.to(torch::kBFloat16)};
  CHECK_FALSE(fits(x.to(torch::kFloat32), half));
  {
    const CpuLevelGuard no_kernel(CpuLevel::scalar);
    CHECK_FALSE(fits(x.to(torch::kBFloat16), half));
  }
  other = one;
  other.term.reset();
  CHECK_FALSE(fits(x, other));
  {
    const peft::Autocast autocast(torch::kCPU);
    CHECK_FALSE(fits(x, one));
  }
  const FastPaths plain(false);
  CHECK_FALSE(fits(x, one));
  const FastPaths fast(true);
  CHECK(fits(x, one));
}

TEST_CASE("Half types run through the low-rank node where all tensors are of one", "[low_rank_linear]") {
  torch::manual_seed(6);
  const auto type = torch::kBFloat16;
  const double rate = GENERATE(0.0, 0.5);
  const auto masks = rate > 0 ? Tensors{mask_of(rate, 9, {6, 16}, type)} : Tensors();
  const Layers one{layer(16, 8, 4, true, false, rate, type)};
  CHECK(error(random({6, 16}, type).requires_grad_(), one, masks, 9, /*twice=*/false) < 0.05);
}

TEST_CASE("The low-rank node takes factors in float32 beside a layer in bfloat16", "[low_rank_linear]") {
  torch::manual_seed(6);
  const auto type = torch::kBFloat16;
  const auto level = GENERATE(CpuLevel::avx2, CpuLevel::avx512);
  const CpuLevelGuard guard(level);
  if (peft::internal::cpu_level() == CpuLevel::scalar) return;  // has no kernel
  const double rate = GENERATE(0.0, 0.4);
  const int64_t rows = GENERATE(as<int64_t>(), 5, 900), width = rows == 5 ? 12 : 400;  // blocks: 327 rows
  const auto mixed_layer = [&](int64_t out, int64_t rank, bool diagonal) {
    auto one = layer(width, out, rank, true, diagonal, rate, torch::kFloat32);
    one.linear.weight = (one.linear.weight * 0.1).to(type);
    one.linear.bias = one.linear.bias.to(type);
    return one;
  };
  const Layers group{mixed_layer(24, 4, false), mixed_layer(7, 30, true)};
  const auto x = random({rows, width}, type).requires_grad_();
  torch::manual_seed(9);
  Tensors masks;
  for (size_t k = 0; k < group.size() && rate > 0; ++k) {
    masks.push_back(torch::zeros({rows, width}, torch::kFloat64));
    HashDropout::draw(rate).mask(0, torch::ones_like(masks.back()), masks.back());
  }
  // The same in float64, of the same values.
  const auto wide = [](const Tensor& t) {
    return t.defined() ? t.detach().to(torch::kFloat64).requires_grad_(t.requires_grad()) : t;
  };
  Layers exact;
  for (const auto& [linear, term] : group) {
    exact.push_back({{wide(linear.weight), wide(linear.bias)},
                     LowRankTerm{wide(term->A), wide(term->B), wide(term->E), term->scale, rate, {}}});
  }
  const auto exact_x = wide(x);
  const auto expected = composed(exact_x, exact, masks);
  torch::manual_seed(9);
  const auto ours = *peft::internal::low_rank_linear(x, group);
  const auto off = [](const Tensor& value, const Tensor& truth) {
    return ((value.to(torch::kFloat64) - truth).norm() / truth.norm()).item<double>();
  };
  Tensors gradients, exact_gradients;
  for (size_t k = 0; k < ours.size(); ++k) {
    CHECK(ours[k].scalar_type() == type);
    CHECK(off(ours[k], expected[k]) < 0x1p-8);
    gradients.push_back(random(ours[k].sizes().vec(), type));
    exact_gradients.push_back(gradients.back().to(torch::kFloat64));
  }
  const auto inputs = leaves(x, group);
  const auto own = torch::autograd::grad(ours, inputs, gradients, /*retain_graph=*/true);
  const auto truth = torch::autograd::grad(expected, leaves(exact_x, exact), exact_gradients);
  // Through operations that have a history.
  const auto again = torch::autograd::grad(ours, inputs, gradients, true, /*create_graph=*/true);
  for (size_t i = 0; i < own.size(); ++i) {
    INFO("gradient " << i);
    CHECK(own[i].scalar_type() == inputs[i].scalar_type());
    CHECK(off(own[i], truth[i]) < (i == 0 ? 0x1p-8 : 1e-5));
    CHECK(off(again[i], truth[i]) < (i == 0 ? 0x1p-7 : 1e-5));
  }
}

TEST_CASE("A score on a base in bfloat16 is that of its update and the gradient of its weight",
          "[low_rank_linear]") {
  if (peft::internal::cpu_level() == CpuLevel::scalar) return;
  torch::manual_seed(12);
  auto one = layer(40, 30, 3, false, true, 0, torch::kFloat32);
  one.linear.weight = one.linear.weight.to(torch::kBFloat16);
  one.term->score = torch::zeros({});
  const auto x = random({9, 40}, torch::kBFloat16), g = random({9, 30}, torch::kBFloat16);
  peft::internal::low_rank_linear(x, {one})->front().backward(g);
  const auto change = 0.7 * at::mm(one.term->B, one.term->A * one.term->E).detach();
  const auto G = at::mm(g.to(torch::kFloat32).t(), x.to(torch::kFloat32));
  const auto expected = (change * G).abs().sum().item<double>() / std::sqrt(40.0 * 30.0);
  CHECK_THAT(one.term->score.item<double>(), WithinRel(expected, 1e-2));
}

TEST_CASE("A hash dropout keeps elements independently, at its rate", "[hash_dropout]") {
  const int64_t rows = 1000, columns = 1003;
  const auto n = static_cast<double>(rows * columns);
  const double p = GENERATE(0.05, 0.3, 0.9);
  const auto type = GENERATE(torch::kFloat32, torch::kBFloat16, torch::kFloat16);
  const auto mask_after = [&](uint64_t seed) {
    const auto mask = torch::empty({rows, columns}, type);
    HashDropout(p, seed).mask(0, torch::ones_like(mask), mask);
    return mask.to(torch::kFloat64);
  };
  const auto mask = mask_after(1);
  const double variance = p * (1 - p);
  CHECK(std::abs(mask.mean().item<double>() - (1 - p)) < 5 * std::sqrt(variance / n));
  // Sums over rows and columns spread as binomial ones do.
  const auto dispersion = [&](int64_t dim, int64_t sums, int64_t terms) {
    const auto deviation = mask.sum(dim) - static_cast<double>(terms) * (1 - p);
    const double chi = deviation.square().sum().item<double>() / (static_cast<double>(terms) * variance);
    return (chi - static_cast<double>(sums)) / std::sqrt(2.0 * static_cast<double>(sums));
  };
  CHECK(std::abs(dispersion(1, rows, columns)) < 5);
  CHECK(std::abs(dispersion(0, columns, rows)) < 5);
  // Layers and steps have other seeds; rows, columns and what is one row and one column away other elements.
  const auto correlation = [&](const Tensor& a, const Tensor& b) {
    return ((a - (1 - p)) * (b - (1 - p))).mean().item<double>() / variance *
           std::sqrt(static_cast<double>(a.numel()));
  };
  for (const uint64_t seed : {0ULL, 2ULL, 3ULL, 1ULL << 32, 0x9e3779b97f4a7c16ULL}) {
    CHECK(std::abs(correlation(mask, mask_after(seed))) < 5);
  }
  for (const int64_t lag : {1, 2, 7, 8, 16}) {
    const auto from = [&](int64_t dim, int64_t start) {
      return mask.narrow(dim, start, mask.size(dim) - lag);
    };
    CHECK(std::abs(correlation(from(0, 0), from(0, lag))) < 5);
    CHECK(std::abs(correlation(from(1, 0), from(1, lag))) < 5);
  }
  // Eight neighbours are as often all kept as independent ones are.
  const auto eights = mask.narrow(1, 0, 1000).reshape({-1, 8}).prod(1);
  const double all = std::pow(1 - p, 8), groups = n / 8;
  CHECK(std::abs(eights.mean().item<double>() - all) < 5 * std::sqrt(all * (1 - all) / groups) + 1e-6);
}

TEST_CASE("A hash dropout is the same in vectors, in a loop, in every type and block", "[hash_dropout]") {
  torch::manual_seed(7);
  const HashDropout dropout(0.35, 0x123456789abcdefULL);
  const auto x = random({37, 29}, torch::kFloat32), update = random({37, 29}, torch::kFloat32);
  const auto run = [&](CpuLevel level) {
    const CpuLevelGuard guard(level);
    const auto into = torch::empty_like(x), gradient = torch::ones_like(x);
    dropout.mask(5, x, into, update, gradient);
    return std::pair(into, gradient);
  };
  const auto [dropped, gradient] = run(CpuLevel::scalar);
  for (const auto level : {CpuLevel::avx2, CpuLevel::avx512}) {
    const auto [fast, fast_gradient] = run(level);
    CHECK(torch::equal(dropped, fast));
    CHECK(torch::equal(gradient, fast_gradient));
  }
  const auto mask = (dropped != 0).to(torch::kFloat32);
  CHECK(torch::equal(dropped, x * mask));
  CHECK(torch::equal(gradient, 1 + update * mask));
  const auto wide = torch::empty({37, 29}, torch::kFloat64);
  dropout.mask(5, x.to(torch::kFloat64), wide);
  CHECK(torch::equal(wide.to(torch::kFloat32), dropped));
  for (const auto half : {torch::kBFloat16, torch::kFloat16}) {
    const auto own = x.to(half), before = random({37, 29}, half);
    for (const auto addend : {half, torch::kFloat32}) {
      for (const auto level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
        const CpuLevelGuard guard(level);
        const auto into = torch::empty_like(own), sum = before.clone(), added = update.to(addend);
        dropout.mask(5, own, into, added, sum);
        CHECK(torch::equal(into, own * mask.to(half)));
        CHECK(torch::equal(sum, (before.to(torch::kFloat32) + added.to(torch::kFloat32) * mask).to(half)));
      }
    }
  }
  const auto block = torch::empty({10, 29});
  dropout.mask(5 + 20, x.narrow(0, 20, 10), block);
  CHECK(torch::equal(block, dropped.narrow(0, 20, 10)));
  CHECK(dropout.keeps(5 + 3, 4) == (mask[3][4].item<float>() == 1));
  torch::manual_seed(11);
  const auto first = HashDropout::draw(0.5);
  torch::manual_seed(11);
  const auto again = HashDropout::draw(0.5), next = HashDropout::draw(0.5);
  int64_t same = 0, others = 0;
  for (int64_t i = 0; i < 1000; ++i) {
    same += first.keeps(i, i) == again.keeps(i, i);
    others += first.keeps(i, i) == next.keeps(i, i);
  }
  CHECK(same == 1000);
  CHECK(std::abs(others - 500) < 80);
}

namespace {

/// Projections of one input, a mixture of their outputs, and a layer behind.
struct AttentionNetImpl : nn::Module {
  explicit AttentionNetImpl(bool grouped = true) : grouped_(grouped) {
    query = register_module("query", peft::Linear(12, 12));
    key = register_module("key", peft::Linear(12, 12));
    value = register_module("value", peft::Linear(nn::LinearOptions(12, 12).bias(false)));
    out = register_module("out", peft::Conv1D(12, 3));
  }
  std::array<Tensor, 3> projections(const Tensor& x) {
    if (grouped_) return peft::project(x, query, key, value);
    return {query->forward(x), key->forward(x), value->forward(x)};
  }
  Tensor forward(const Tensor& x) {
    const peft::ForwardScope scope;
    const auto [q, k, v] = projections(x);
    return out->forward(torch::tanh(torch::sigmoid(q * k) * v + x));
  }
  peft::Linear query{nullptr}, key{nullptr}, value{nullptr};
  peft::Conv1D out{nullptr};

 private:
  bool grouped_;
};
TORCH_MODULE(AttentionNet);

AttentionNet attention_net(torch::ScalarType type = torch::kFloat64, bool grouped = true) {
  torch::manual_seed(1);
  AttentionNet net(grouped);
  net->to(type);
  return net;
}

void shake(const peft::Adapter& adapter) {
  torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : adapter.named_parameters()) tensor.add_(torch::randn_like(tensor), 0.3);
  adapter.accept_changes();
}

/// The losses of a training in fast or plain forms.
template <class Options>
std::vector<double> losses(const Options& options, torch::ScalarType type, bool fast, bool grouped = true,
                           int steps = 100) {
  const FastPaths paths(fast);
  auto net = attention_net(type, grouped);
  torch::manual_seed(2);
  auto adapter = peft::add_adapter(*net, options, named({"query", "key", "value", "out"}));
  net->train();
  // With a small ε a gradient that is all rounding error moves its weight as far as any other.
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(1e-2).weight_decay(0.01).eps(1e-2),
                        /*max_grad_norm=*/1.0);
  const auto x = torch::randn({10, 5, 12}, type), target = torch::randn({10, 5, 3}, type);
  std::vector<double> result;
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(net->forward(x), target);
    loss.backward();
    result.push_back(loss.template item<double>());
    optimizer.step();
  }
  return result;
}

template <class Options>
void check_equal_training(const Options& options, torch::ScalarType type) {
  const auto plain = losses(options, type, false);
  CHECK(plain.back() < 0.95 * plain.front());
  for (const bool grouped : {true, false}) {
    const auto fast = losses(options, type, true, grouped);
    double worst = 0;
    for (size_t i = 0; i < plain.size(); ++i) worst = std::max(worst, std::abs(fast[i] / plain[i] - 1));
    INFO(c10::toString(type) << ", grouped " << grouped << ": " << worst);
    CHECK(worst < (type == torch::kFloat64 ? 1e-11 : 5e-5));
  }
}

}  // namespace

TEST_CASE("A hundred steps give the same losses in fast and in plain forms", "[low_rank_linear]") {
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32);
  const auto growing = [](int64_t at_once) {
    return peft::IncreLoraOptions(3).rank(1).incre_rank_num(1).top_h(at_once).init_warmup(10).incre_interval(
        10);
  };
  SECTION("LoRA") { check_equal_training(LoraOptions(4).alpha(8), type); }
  SECTION("LoRA from the base's singular vectors") {
    check_equal_training(LoraOptions(3).alpha(8).init(LoraInit::pissa), type);
  }
  SECTION("AdaLoRA") {
    check_equal_training(
        peft::AdaLoraOptions(100).init_rank(4).target_rank(2).tinit(10).tfinal(20).delta_t(5), type);
  }
  SECTION("IncreLoRA, all layers growing at once") { check_equal_training(growing(4), type); }
  SECTION("IncreLoRA, which grows by the scores") {
    // In single precision, rounding decides between layers of nearly the same score.
    if (type == torch::kFloat64) check_equal_training(growing(2), type);
  }
}

TEST_CASE("The low-rank node scores a layer by its update and the gradient of its weight",
          "[low_rank_linear]") {
  torch::manual_seed(10);
  const double rate = GENERATE(0.0, 0.4);
  auto one = layer(7, 300, 2, true, true, rate);  // more outputs than a block has
  one.term->score = torch::zeros({}, torch::kFloat64);
  const auto x = trained({9, 7});
  torch::manual_seed(11);
  const auto mask = torch::empty({9, 7}, torch::kFloat64);
  HashDropout(rate, 0).mask(0, torch::ones_like(mask), mask);
  if (rate > 0) HashDropout::draw(rate).mask(0, torch::ones_like(mask), mask);
  CHECK(error(x, {one}, {mask}, 11) < 1e-12);
  const auto change = (0.7 * at::mm(one.term->B, one.term->A * one.term->E)).detach().requires_grad_();
  const auto y =
      at::linear(x, one.linear.weight, one.linear.bias) + at::linear(x * mask / (1 - rate), change);
  // The last backward above was that of the gradients' gradient; the output's own comes again.
  torch::manual_seed(11);
  mixed(*peft::internal::low_rank_linear(x, {one})).backward();
  const auto G = torch::autograd::grad({mixed({y})}, {change}).at(0);
  const auto expected = (change * G).abs().sum().item<double>() / std::sqrt(7.0 * 300.0);
  CHECK_THAT(one.term->score.item<double>(), WithinRel(expected, 1e-12));
}

TEST_CASE("Project gives what each site gives, in one node where it can", "[project]") {
  auto net = attention_net();
  torch::manual_seed(3);
  const auto x = torch::randn({4, 3, 12}, torch::kFloat64).requires_grad_();
  const auto one_node = [&] {
    const auto [q, k, v] = net->projections(x);
    return q.grad_fn() && q.grad_fn() == k.grad_fn() && q.grad_fn() == v.grad_fn();
  };
  /// Outputs and gradients against the plain forms.
  const auto same = [&] {
    const auto all = [&](bool fast) {
      const FastPaths paths(fast);
      torch::manual_seed(5);
      const auto [q, k, v] = net->projections(x);
      const auto y = mixed({q, k, v}) + net->forward(x).sum();
      Tensors inputs{x}, results{q, k, v, y};
      for (const auto& parameter : net->parameters()) {
        if (parameter.requires_grad()) inputs.push_back(parameter);
      }
      for (auto& gradient : torch::autograd::grad({y}, inputs, {}, {}, false, /*allow_unused=*/true)) {
        results.push_back(gradient.defined() ? gradient : torch::zeros({}));
      }
      return results;
    };
    const auto fast = all(true), plain = all(false);
    double worst = 0;
    for (size_t i = 0; i < plain.size(); ++i) worst = std::max(worst, largest(fast[i], plain[i]));
    return worst < 1e-10;
  };
  CHECK_FALSE(one_node());
  CHECK(same());
  auto adapter = peft::add_adapter(*net, LoraOptions(2).alpha(6).init(LoraInit::random),
                                   named({"query", "value"}), "one");
  shake(adapter);
  CHECK(one_node());
  CHECK(same());
  CHECK(peft::project(x, net->query).front().grad_fn()->name() == "LowRankLinearBackward");
  SECTION("another strength, another mode") {
    adapter.scale(0.3);
    CHECK(same());
    net->eval();
    CHECK(one_node());
    CHECK(same());
    {
      const auto off = peft::disabled(*net);
      CHECK_FALSE(one_node());
      CHECK(same());
    }
    torch::NoGradGuard no_grad;
    const auto fast = net->forward(x);
    const FastPaths plain(false);
    CHECK(largest(fast, net->forward(x)) < 1e-12);
  }
  SECTION("an adapter of other ranks on all of them, active instead") {
    shake(peft::add_adapter(*net, LoraOptions(3).rank_pattern({{"key", 1}}), named({"query", "key", "value"}),
                            "two"));
    CHECK_FALSE(one_node());  // two on the query
    CHECK(same());
    peft::set_active(*net, {"two"});
    CHECK(one_node());
    CHECK(same());
  }
  SECTION("a method that is no low-rank term") {
    shake(peft::add_adapter(*net, peft::Ia3Options(), named({"key"}), "two"));
    CHECK_FALSE(one_node());
    CHECK(same());
  }
  SECTION("a trained bias or base") {
    shake(peft::add_adapter(*net, peft::BiasOptions(), named({"query"}), "two"));
    CHECK_FALSE(one_node());
    CHECK(same());
    peft::set_active(*net, {"one"});
    CHECK(one_node());
    net->key->base->weight.requires_grad_();
    CHECK_FALSE(one_node());
    CHECK(same());
  }
  SECTION("a merged adapter") {
    peft::merge(*net);
    CHECK_FALSE(one_node());
    CHECK(same());
    peft::unmerge(*net);
    CHECK(one_node());
  }
  SECTION("rows of several adapters") {
    shake(peft::add_adapter(*net, LoraOptions(3), named({"query", "key", "value"}), "two"));
    net->eval();
    const peft::RowAdapters rows({"one", "two", "two", peft::RowAdapters::base});
    CHECK_FALSE(one_node());
    CHECK(same());
  }
  SECTION("dropout of its own for each") {
    shake(peft::add_adapter(*net, LoraOptions(2).alpha(6).dropout(0.5), named({"query", "key", "value"}),
                            "two"));
    peft::set_active(*net, {"two"});
    CHECK(one_node());
    torch::manual_seed(8);
    const auto [q, k, v] = net->projections(x);
    torch::manual_seed(8);
    CHECK(torch::equal(net->projections(x)[0], q));
    CHECK_FALSE(torch::equal(net->projections(x)[0], q));
    net->eval();
    CHECK(same());
  }
}
