// A method in its fast and in its plain forms: on one layer, and over a training.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "catch.h"
#include "peft/core/adapted.h"
#include "peft/kernels/fast_paths.h"
#include "property_suite.h"

namespace suite {

/// A scalar of which every entry of every tensor matters differently.
inline Tensor mixed(const std::vector<Tensor>& tensors) {
  auto total = torch::zeros({}, tensors.front().options());
  for (const auto& t : tensors) {
    const auto weights = torch::arange(1, t.numel() + 1, t.options()).mul(0.37).sin().view(t.sizes());
    total = total + (t.square() * weights).sum();
  }
  return total;
}

/// A site on x; on a join x and a skip made of it.
template <class Site>
Tensor run_on(Site& site, const Tensor& x) {
  if constexpr (requires { site->forward(x, x); }) {
    return site->forward(x, torch::tanh(x));
  } else {
    return site->forward(x);
  }
}

/// What a site gives for x, the gradients of x where it has one and of the adapters' tensors, and with
/// `twice` the gradients of the gradients.
template <class Site>
std::vector<Tensor> with_gradients(Site& site, const Tensor& x, bool fast, bool twice) {
  const peft::FastPaths paths(fast);
  const torch::AutoGradMode with_history(true);
  torch::manual_seed(5);
  std::vector<Tensor> inputs, results{run_on(site, x)};
  if (!results.front().requires_grad()) return results;
  if (x.requires_grad()) inputs.push_back(x);
  for (const auto& parameter : site->parameters()) {
    if (parameter.requires_grad()) inputs.push_back(parameter);
  }
  const auto append = [&results](const std::vector<Tensor>& tensors) {
    for (const auto& t : tensors) results.push_back(t.defined() ? t.detach() : torch::zeros({}));
  };
  const auto gradients = [&](const Tensor& of, bool create) {
    return torch::autograd::grad({of}, inputs, {}, /*retain_graph=*/true, create, /*allow_unused=*/true);
  };
  const auto loss = mixed(results);
  append(gradients(loss, false));
  if (!twice) return results;
  std::vector<Tensor> first;
  for (const auto& gradient : gradients(loss, true)) {
    if (gradient.defined()) first.push_back(gradient);
  }
  append(gradients(mixed(first), false));
  return results;
}

/// The largest difference between the two forms, each relative to the largest entry.
template <class Site>
double fast_error(Site& site, const Tensor& x, bool twice = true) {
  const auto fast = with_gradients(site, x, true, twice), plain = with_gradients(site, x, false, twice);
  REQUIRE(fast.size() == plain.size());
  double worst = 0;
  for (size_t i = 0; i < plain.size(); ++i) {
    REQUIRE(fast[i].scalar_type() == plain[i].scalar_type());
    const auto size = plain[i].numel() ? plain[i].abs().max().template item<double>() : 0.0;
    worst = std::max(worst, largest(fast[i].detach(), plain[i].detach()) / std::max(1.0, size));
  }
  return worst;
}

/// The losses of a hundred steps, relative to those in the plain forms, at their farthest.
template <class Options>
double training_error(const Options& options, torch::ScalarType type) {
  const auto losses = [&](bool fast) {
    const peft::FastPaths paths(fast);
    torch::manual_seed(1);
    nn::Sequential net(peft::Linear(12, 16), nn::Tanh(), peft::Linear(16, 16), nn::Tanh(),
                       peft::Linear(16, 3));
    net->to(type);
    auto adapter = peft::add_adapter(*net, options, peft::named({"0", "2"}));
    net->train();
    // With a small ε a gradient that is all rounding error moves its weight as far as any other.
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(1e-2).weight_decay(0.01).eps(1e-2));
    const auto x = torch::randn({10, 5, 12}, type), target = torch::randn({10, 5, 3}, type);
    std::vector<double> result;
    for (uint64_t step = 0; step < 100; ++step) {
      optimizer.zero_grad();
      torch::manual_seed(step);
      const auto loss = torch::mse_loss(net->forward(x), target);
      loss.backward();
      result.push_back(loss.template item<double>());
      optimizer.step();
    }
    return result;
  };
  const auto fast = losses(true), plain = losses(false);
  CHECK(plain.back() < 0.97 * plain.front());
  double worst = 0;
  for (size_t i = 0; i < plain.size(); ++i) worst = std::max(worst, std::abs(fast[i] / plain[i] - 1));
  return worst;
}

}  // namespace suite
