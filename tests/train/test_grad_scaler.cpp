#include "peft/train/grad_scaler.h"

#include <torch/optim/sgd.h>
#include <torch/torch.h>

#include <limits>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "peft/methods/increlora.h"
#include "peft/train/checkpoint.h"
#include "peft/train/optimizer.h"
#include "train/adapted_net.h"

using Catch::Matchers::Contains;
using torch::Tensor;

TEST_CASE("The scale grows, shrinks and leaves steps out as torch's does", "[grad_scaler]") {
  // tests/reference/grad_scaler_values.py
  struct Step {
    bool finite;
    double scale;
    std::vector<float> weight;
    int successes;
  };
  const std::vector<Step> steps{
      {true, 8, {0.5, 0.875}, 1},   {true, 16, {0, 0.75}, 0},     {false, 8, {0, 0.75}, 0},
      {true, 8, {-0.5, 0.625}, 1},  {true, 16, {-1, 0.5}, 0},     {true, 16, {-1.5, 0.375}, 1},
      {false, 8, {-1.5, 0.375}, 0}, {false, 4, {-1.5, 0.375}, 0}, {true, 4, {-2, 0.25}, 1}};
  peft::GradScaler scaler(peft::GradScalerOptions().init_scale(8).growth_interval(2));
  const auto weight = torch::ones({2}).requires_grad_();
  torch::optim::SGD optimizer({weight}, 0.5);
  for (const auto& step : steps) {
    optimizer.zero_grad();
    const auto slope = step.finite ? 1.0F : std::numeric_limits<float>::infinity();
    scaler.scale((weight * torch::tensor({slope, 0.25F})).sum()).backward();
    CHECK(scaler.step(optimizer) == step.finite);
    scaler.update();
    CHECK(scaler.get_scale() == step.scale);
    CHECK(torch::equal(weight.detach(), torch::tensor(step.weight)));
    CHECK(scaler.state()[1].second.item<int>() == step.successes);
  }
}

TEST_CASE("Clipping sees gradients without the scale, and a power of two changes no bit", "[grad_scaler]") {
  const auto run = [](bool enabled) {
    auto [net, adapter] = adapted_net();
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(1e-2), /*max_grad_norm=*/0.1);
    peft::GradScaler scaler(peft::GradScalerOptions().enabled(enabled));
    for (int i = 0; i < 5; ++i) {
      optimizer.zero_grad();
      scaler.scale(net->forward(torch::ones({4, 6})).square().sum()).backward();
      if (i % 2) scaler.unscale(optimizer);
      CHECK(scaler.step(optimizer));
      scaler.update();
    }
    CHECK(scaler.get_scale() == (enabled ? 65536 : 1));
    return copies(adapter.parameters());
  };
  CHECK(difference(run(true), run(false)) == 0);
}

TEST_CASE("IncreLoRA grows by scores without the scale, which changes meanwhile", "[grad_scaler]") {
  const auto run = [](bool enabled) {
    torch::manual_seed(1);
    AdaptedNet net;
    const auto adapter = peft::add_adapter(
        *net, peft::IncreLoraOptions(3).rank(1).incre_rank_num(1).top_h(1).init_warmup(4).incre_interval(4),
        peft::named({"query", "key", "value"}), "grown");
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(1e-2));
    peft::GradScaler scaler(peft::GradScalerOptions().enabled(enabled).init_scale(8).growth_interval(3));
    for (int i = 0; i < 20; ++i) {
      optimizer.zero_grad();
      scaler.scale(net->forward(torch::ones({4, 6})).square().sum()).backward();
      CHECK(scaler.step(optimizer));
      scaler.update();
    }
    auto result = copies(adapter.parameters());
    for (const auto& [name, tensor] : adapter.record().controllers.at(0)->state()) {
      result.push_back(tensor.to(torch::kFloat64).clone());
    }
    return result;
  };
  CHECK(difference(run(true), run(false)) == 0);
}

TEST_CASE("A parameter that backward did not reach stays as it is", "[grad_scaler]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(1e-2).weight_decay(0.5));
  peft::GradScaler scaler;
  const auto before = copies(net->value->parameters());
  const auto reached = copies(net->key->parameters());
  for (int i = 0; i < 2; ++i) {
    optimizer.zero_grad();
    scaler.scale(net->forward(torch::ones({4, 6}), /*all=*/false).square().sum()).backward();
    CHECK(scaler.step(optimizer));
    scaler.update();
  }
  CHECK(difference(copies(net->value->parameters()), before) == 0);
  CHECK(difference(copies(net->key->parameters()), reached) > 1e-4);
}

TEST_CASE("Steps out of order and options out of range are refused", "[grad_scaler]") {
  using Options = peft::GradScalerOptions;
  CHECK_THROWS_WITH(
      peft::GradScaler(Options().init_scale(0).growth_factor(1).backoff_factor(1).growth_interval(0)),
      Contains("4 problems") && Contains("init_scale must be positive") &&
          Contains("growth_factor must be above 1") && Contains("backoff_factor must be in (0, 1)") &&
          Contains("growth_interval must be positive"));
  peft::GradScaler scaler;
  CHECK_THROWS_WITH(scaler.update(), Contains("no step() or unscale()"));
  const auto weight = torch::ones({2}).requires_grad_();
  torch::optim::SGD optimizer({weight}, 0.5);
  scaler.scale(weight.sum()).backward();
  scaler.unscale(optimizer);
  CHECK_THROWS_WITH(scaler.unscale(optimizer), Contains("divided already"));
  scaler.step(optimizer);
  CHECK_THROWS_WITH(scaler.step(optimizer), Contains("already since the last update"));
  CHECK_THROWS_WITH(scaler.unscale(optimizer), Contains("step() came before"));

  const auto half = torch::ones({2}, torch::kFloat16).requires_grad_();
  const auto single = torch::ones({2}).requires_grad_();
  torch::optim::SGD of_half({single, half}, 0.5);
  half.mutable_grad() = torch::ones({2}, torch::kFloat16);
  single.mutable_grad() = torch::ones({2});
  CHECK_THROWS_WITH(scaler.unscale(of_half), Contains("float32"));
  CHECK(torch::equal(single.grad(), torch::ones({2})));  // nothing was divided yet
}

TEST_CASE("A checkpoint holds the scale", "[grad_scaler]") {
  const peft_test::TemporaryFolder folder;
  const auto path = folder.path() / "checkpoint.safetensors";
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter);
  peft::LinearSchedule schedule(optimizer, 1, 10);
  peft::GradScaler scaler(peft::GradScalerOptions().init_scale(4).growth_interval(1));
  scaler.scale(net->forward(torch::ones({4, 6})).sum()).backward();
  scaler.step(optimizer);
  scaler.update();
  peft::save_checkpoint(path, adapter, optimizer, schedule, "here", &scaler);

  peft::GradScaler other;
  CHECK_THROWS_WITH(peft::load_checkpoint(path, adapter, optimizer, schedule), Contains("scale"));
  CHECK(peft::load_checkpoint(path, adapter, optimizer, schedule, &other) == "here");
  CHECK(other.get_scale() == 8);
}
