#include "catch.h"

#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <tuple>

#include "peft/methods/bias.h"
#include "peft/train/autocast.h"
#include "peft/train/optimizer.h"
#include "train/adapted_net.h"

// Last because LibTorch 1.13's does not include what it uses.
#include <torch/nn/utils/clip_grad.h>

using torch::optim::AdamWOptions;

namespace {

torch::Tensor loss_of(AdaptedNet& net, const torch::Tensor& x, bool all = true) {
  return net->forward(x, all).square().sum();
}

torch::Tensor batch(int step, torch::ScalarType type = torch::kFloat) {
  torch::manual_seed(static_cast<uint64_t>(100 + step));
  return torch::randn({4, 6}, type);
}

}  // namespace

TEST_CASE("AdamW equals torch's over 50 steps, also for tensors without gradient in some", "[optimizer]") {
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  auto [net, adapter] = adapted_net();
  auto [other, reference] = adapted_net();
  net->to(type);
  other->to(type);
  const auto options = AdamWOptions(2e-2).weight_decay(0.1).betas({0.8, 0.95});
  peft::AdamW ours(adapter, options);
  torch::optim::AdamW theirs(reference.parameters(), options);
  for (int step = 0; step < 50; ++step) {
    const auto x = batch(step, type);
    const bool all = step % 3 == 2;
    ours.zero_grad();
    loss_of(net, x, all).backward();
    ours.step();
    for (auto& p : reference.parameters()) p.mutable_grad() = torch::Tensor();
    loss_of(other, x, all).backward();
    theirs.step();
  }
  CHECK(difference(adapter.parameters(), reference.parameters()) <= (type == torch::kFloat ? 2e-6 : 1e-14));
  for (const auto& [name, tensor] : ours.state()) {
    if (name == "value.lora.lora_A.step") CHECK(tensor.item<int64_t>() == 16);
    if (name == "query.lora.lora_A.step") CHECK(tensor.item<int64_t>() == 50);
  }
}

TEST_CASE("One step of AdamW equals torch's on tensors of odd sizes", "[optimizer]") {
  torch::manual_seed(3);
  torch::nn::Sequential net{peft::Linear(37, 41), peft::Linear(41, 113)};
  auto adapter = peft::add_adapter(*net, peft::LoraOptions(3), peft::named({"0", "1"}), "tuned");
  std::vector<torch::Tensor> reference;
  for (auto& p : adapter.parameters()) {
    p.mutable_grad() = torch::randn_like(p);
    reference.push_back(p.detach().clone().set_requires_grad(true));
    reference.back().mutable_grad() = p.grad().clone();
  }
  peft::AdamW ours(adapter, AdamWOptions(1e-2).weight_decay(0.2));
  torch::optim::AdamW theirs(reference, AdamWOptions(1e-2).weight_decay(0.2));
  for (int i = 0; i < 3; ++i) {
    ours.step();
    theirs.step();
  }
  CHECK(difference(adapter.parameters(), reference) <= 1e-7);
}

TEST_CASE("Both forms of AdamW give the reference's values", "[optimizer]") {
  // tests/reference/adamw_values.py
  const auto type = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16);
  const bool composed = GENERATE(true, false) || type == torch::kBFloat16;
  struct Reference {
    peft::AdamW::Form form;
    int steps;
    std::vector<double> values;
  };
  using Form = peft::AdamW::Form;
  const std::vector<Reference> references{
      {Form::transformers,
       1,
       {0.49192542420176155, -1.2534613275688293, 2.006959201220829, 0.1337531421530167}},
      {Form::torch, 1, {0.48959983379565347, -1.2584078155129892, 2.0079637483852157, 0.13483555330384078}},
      {Form::transformers,
       2,
       {0.48374310663110565, -1.2479686520249007, 2.0142151270662993, 0.13939006467599466}},
      {Form::torch, 2, {0.4794959087476749, -1.251751828762108, 2.015929619014843, 0.14116449352393162}},
      {Form::transformers,
       20,
       {0.4711426084574139, -1.1954589174106032, 1.9968542495061101, 0.11658163428483094}},
      {Form::torch, 20, {0.4658083746876223, -1.1959870060042923, 1.9997614061215105, 0.11728571882885352}}};
  for (const auto& reference : references) {
    peft::internal::FlatStorage storage(
        {torch::tensor({0.5, -1.25, 2.0, 0.125}, type).set_requires_grad(true)}, {0}, 2);
    const auto& segment = storage.segments().front();
    for (int step = 1; step <= reference.steps; ++step) {
      std::vector<double> gradient;
      for (int i = 0; i < 4; ++i) gradient.push_back(std::sin(1.0 + step * 0.7 + i * 1.3) * (i + 1) * 0.1);
      torch::NoGradGuard no_grad;
      const auto& [values, gradients, mean, square] =
          std::tie(segment.values, segment.gradients, segment.columns[0], segment.columns[1]);
      gradients.copy_(torch::tensor(gradient, type));
      const peft::internal::AdamWSettings settings{0.01, 0.9, 0.999, 1e-3, 0.1, reference.form};
      if (composed) {
        peft::internal::adamw(values, gradients, mean, square, settings,
                              {torch::full({}, 0.01), torch::full({}, static_cast<double>(step))}, {});
      } else {
        peft::internal::adamw(values, gradients, mean, square, settings, step);
      }
    }
    // The composed form has its rate in float.
    const double exact = composed ? 1e-8 : 5e-15;
    const double tolerance = type == torch::kDouble ? exact : type == torch::kFloat ? 1e-6 : 0.1;
    CHECK(difference({segment.values}, {torch::tensor(reference.values, torch::kDouble)}) <= tolerance);
  }
}

TEST_CASE("AdamW and the sum of squares give the same bits at every level of vector instructions",
          "[optimizer]") {
  using peft::internal::CpuLevel;
  torch::manual_seed(11);
  const int64_t count = GENERATE(1, 7, 16, 31, 33, 40000);
  const auto form = GENERATE(peft::AdamW::Form::torch, peft::AdamW::Form::transformers);
  std::vector<torch::Tensor> start;
  for (int i = 0; i < 4; ++i) start.push_back(torch::randn({count + 1}).narrow(0, 1, count));  // unaligned
  start[3] = start[3].square();
  std::vector<std::vector<torch::Tensor>> results;
  std::vector<double> sums;
  for (const auto level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
    const peft::internal::CpuLevelGuard guard(level);
    CHECK(peft::internal::cpu_level() <= level);
    results.push_back(copies(start));
    const auto& x = results.back();
    for (int step = 1; step <= 3; ++step) {
      peft::internal::adamw(x[0], x[1], x[2], x[3], {1e-2, 0.9, 0.99, 1e-8, 0.1, form}, step, 0.3);
    }
    sums.push_back(peft::internal::sum_of_squares(x[1].data_ptr<float>(), count));
  }
  CHECK(peft::internal::cpu_level() == peft::internal::highest_cpu_level());
  for (size_t level = 1; level < results.size(); ++level) {
    for (size_t i = 0; i < 4; ++i) CHECK(torch::equal(results[level][i], results[0][i]));
    CHECK(sums[level] == sums[0]);
  }
  CHECK_THAT(sums[0], WithinRel(start[1].to(torch::kDouble).square().sum().item<double>(), 1e-12));
}

TEST_CASE("A capturable AdamW reads rate and step where prepare_step puts them", "[optimizer]") {
  const auto type = GENERATE(torch::kFloat, torch::kBFloat16);
  auto [net, adapter] = adapted_net();
  auto [other, same] = adapted_net();
  net->to(type);
  other->to(type);
  const auto is_value = [](const std::string& name) { return name.starts_with("value."); };
  const auto options = AdamWOptions(1e-2).weight_decay(0.1);
  peft::AdamW ours(adapter, {{is_value, AdamWOptions(3e-2)}}, options, 0.5);
  peft::AdamW plain(same, {{is_value, AdamWOptions(3e-2)}}, options, 0.5);
  CHECK_THROWS_WITH(ours.prepare_step(), Contains("is for an optimizer that is capturable"));
  ours.capturable(true);
  ours.zero_grad();
  loss_of(net, batch(0, type)).backward();
  const auto start = copies(adapter.parameters());
  CHECK_THROWS_WITH(ours.step(), Contains("prepare_step must come first"));
  CHECK(difference(adapter.parameters(), start) == 0);
  for (int step = 0; step < 5; ++step) {
    for (auto* optimizer : {&ours, &plain}) {
      optimizer->param_groups()[0].options().set_lr(1e-2 / (1 + step));
      optimizer->zero_grad();
    }
    ours.prepare_step();
    loss_of(net, batch(step, type)).backward();
    loss_of(other, batch(step, type)).backward();
    ours.step();
    plain.step();
  }
  CHECK(difference(adapter.parameters(), same.parameters()) == 0);
  ours.prepare_step();
  ours.zero_grad();
  loss_of(net, batch(0, type), /*all=*/false).backward();
  CHECK_THROWS_WITH(ours.step(), Contains("every parameter of a capturable optimizer must have a gradient"));
}

TEST_CASE("The form is chosen on the optimizer", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  auto [other, same] = adapted_net();
  const auto options = AdamWOptions(1e-2).weight_decay(0.5).eps(1e-3);
  peft::AdamW ours(adapter, options), plain(same, options);
  ours.form(peft::AdamW::Form::transformers);
  CHECK(ours.form() == peft::AdamW::Form::transformers);
  loss_of(net, batch(1)).backward();
  loss_of(other, batch(1)).backward();
  ours.step();
  plain.step();
  CHECK(difference(adapter.parameters(), same.parameters()) > 1e-6);
}

TEST_CASE("Clipping equals torch's", "[optimizer]") {
  const double limit = GENERATE(0.5, 1e6);
  auto [net, adapter] = adapted_net();
  auto [other, reference] = adapted_net();
  peft::AdamW ours(adapter, AdamWOptions(1e-2).eps(0.1), limit);
  torch::optim::AdamW theirs(reference.parameters(), AdamWOptions(1e-2).eps(0.1));
  CHECK_THROWS_WITH(ours.last_grad_norm(), Contains("no step with max_grad_norm"));
  for (int step = 0; step < 10; ++step) {
    const bool all = step % 2 == 0;
    ours.zero_grad();
    loss_of(net, batch(step), all).backward();
    ours.step();
    for (auto& p : reference.parameters()) p.mutable_grad() = torch::Tensor();
    loss_of(other, batch(step), all).backward();
    const double norm = torch::nn::utils::clip_grad_norm_(reference.parameters(), limit);
    theirs.step();
    CHECK_THAT(ours.last_grad_norm(), WithinRel(norm, 1e-5));
  }
  CHECK(difference(adapter.parameters(), reference.parameters()) <= 1e-6);
}

TEST_CASE("Groups have rates and decay of their own", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  auto [other, reference] = adapted_net();
  const auto is_value = [](const std::string& name) { return name.rfind("value.", 0) == 0; };
  // 1e-3 is torch's default, which newer LibTorchs would take for "not given".
  peft::AdamW ours(adapter, {{is_value, AdamWOptions(1e-3).weight_decay(0.3)}}, AdamWOptions(5e-2));
  std::vector<torch::Tensor> first, rest;
  for (const auto& [name, p] : reference.named_parameters()) (is_value(name) ? first : rest).push_back(p);
  torch::optim::AdamW one(first, AdamWOptions(1e-3).weight_decay(0.3)), two(rest, AdamWOptions(5e-2));
  REQUIRE(ours.param_groups().size() == 2);
  CHECK(ours.param_groups()[0].params().size() == 2);
  CHECK(ours.param_groups()[0].options().get_lr() == 1e-3);
  for (int step = 0; step < 5; ++step) {
    ours.zero_grad();
    loss_of(net, batch(step)).backward();
    ours.step();
    for (auto& p : reference.parameters()) p.mutable_grad() = torch::Tensor();
    loss_of(other, batch(step)).backward();
    one.step();
    two.step();
  }
  CHECK(difference(adapter.parameters(), reference.parameters()) <= 1e-6);
}

TEST_CASE("no_decay takes parameters out of the decay", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, AdamWOptions(0.1).weight_decay(0.5));
  optimizer.zero_grad();
  optimizer.no_decay([](const std::string& name) { return name.ends_with("lora_B"); });
  (net->forward(batch(0)).sum() * 0).backward();
  const auto before = copies(adapter.parameters());
  optimizer.step();
  const auto named = adapter.named_parameters();
  for (size_t i = 0; i < named.size(); ++i) {
    const bool decays = !named[i].first.ends_with("lora_B");
    CHECK(difference({named[i].second}, {before[i] * (decays ? 0.95 : 1.0)}) <= 1e-7);
  }
  CHECK_THROWS_WITH(optimizer.no_decay([](const std::string&) { return true; }),
                    Contains("before the first step"));
}

TEST_CASE("A parameter that backward did not reach keeps value, moments and counter", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, AdamWOptions(0.1).weight_decay(0.5), 1.0);
  optimizer.zero_grad();
  loss_of(net, batch(0), /*all=*/false).backward();
  const auto before = copies(adapter.parameters());
  optimizer.step();
  const auto named = adapter.named_parameters();
  for (size_t i = 0; i < named.size(); ++i) {
    const bool reached = named[i].first.rfind("value.", 0) != 0;
    CHECK((difference({named[i].second}, {before[i]}) > 0) == reached);
  }
}

TEST_CASE("Replaced tensors and gradients are brought back", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  auto [other, reference] = adapted_net();
  other->to(torch::kDouble);  // throughout: LibTorch 1.13's optimizer cannot follow a change of type
  peft::AdamW ours(adapter, AdamWOptions(1e-2));
  torch::optim::AdamW theirs(reference.parameters(), AdamWOptions(1e-2));
  torch::optim::Optimizer& base = ours;
  for (int step = 0; step < 24; ++step) {
    const auto type = step < 12 ? torch::kFloat : torch::kDouble;
    switch (step % 6) {
      case 0:
        ours.zero_grad();
        break;
      case 1:
        base.zero_grad();  // torch's own
        break;
      case 2:
        for (auto& p : adapter.parameters()) p.mutable_grad() = torch::Tensor();
        break;
      case 3:
        for (auto& p : adapter.parameters()) p.set_data(p.detach().clone());
        ours.zero_grad();
        break;
      default:
        ours.zero_grad();
        break;
    }
    for (auto& p : reference.parameters()) p.mutable_grad() = torch::Tensor();
    loss_of(net, batch(step).to(type)).backward();
    if (step % 6 == 4) {
      for (auto& p : adapter.parameters()) p.set_data(p.detach().t().contiguous().t());
    }
    if (step % 6 == 5) {
      for (auto& p : adapter.parameters()) p.mutable_grad() = p.grad() * 1.0;
    }
    loss_of(other, batch(step).to(torch::kDouble)).backward();
    ours.step();
    theirs.step();
    if (step == 11) net->to(torch::kDouble);
  }
  CHECK(adapter.parameters().front().scalar_type() == torch::kDouble);
  CHECK(difference(adapter.parameters(), reference.parameters()) <= 1e-5);
}

TEST_CASE("A change of type between backward and step keeps which gradients are defined", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, AdamWOptions(0.1).weight_decay(0.5));
  optimizer.zero_grad();
  loss_of(net, batch(0), /*all=*/false).backward();
  net->to(torch::kDouble);
  const auto before = copies(adapter.parameters());
  optimizer.step();
  const auto named = adapter.named_parameters();
  for (size_t i = 0; i < named.size(); ++i) {
    const bool reached = named[i].first.rfind("value.", 0) != 0;
    CHECK((difference({named[i].second}, {before[i]}) > 0) == reached);
  }
}

TEST_CASE("A stock optimizer works on the same tensors", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  auto [other, reference] = adapted_net();
  peft::AdamW ours(adapter, AdamWOptions(1e-2));
  torch::optim::SGD stock(adapter.parameters(), 1e-2), expected(reference.parameters(), 1e-2);
  for (int step = 0; step < 4; ++step) {
    ours.zero_grad();
    loss_of(net, batch(step)).backward();
    stock.step();
    for (auto& p : reference.parameters()) p.mutable_grad() = torch::Tensor();
    loss_of(other, batch(step)).backward();
    expected.step();
  }
  CHECK(difference(adapter.parameters(), reference.parameters()) <= 1e-7);
  ours.zero_grad();
  loss_of(net, batch(9)).backward();
  ours.step();
  CHECK(difference(adapter.parameters(), reference.parameters()) > 1e-4);
}

TEST_CASE("Two optimizers can take turns on one adapter", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  auto [other, reference] = adapted_net();
  peft::AdamW a(adapter, AdamWOptions(1e-2)), b(adapter, AdamWOptions(3e-2));
  torch::optim::AdamW c(reference.parameters(), AdamWOptions(1e-2)),
      d(reference.parameters(), AdamWOptions(3e-2));
  for (int step = 0; step < 6; ++step) {
    auto& ours = step % 2 ? a : b;
    auto& theirs = step % 2 ? c : d;
    ours.zero_grad();
    loss_of(net, batch(step)).backward();
    ours.step();
    for (auto& p : reference.parameters()) p.mutable_grad() = torch::Tensor();
    loss_of(other, batch(step)).backward();
    theirs.step();
  }
  CHECK(difference(adapter.parameters(), reference.parameters()) <= 1e-6);
}

TEST_CASE("Accumulated gradients equal those of the big batch", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  auto [other, reference] = adapted_net();
  peft::AdamW small(adapter, AdamWOptions(1e-2), 0.5), big(reference, AdamWOptions(1e-2), 0.5);
  for (int step = 0; step < 5; ++step) {
    const auto x = torch::cat({batch(2 * step), batch(2 * step + 1)});
    small.zero_grad();
    for (const auto& part : x.chunk(4)) loss_of(net, part).div(8).backward();
    small.step();
    big.zero_grad();
    loss_of(other, x).div(8).backward();
    big.step();
    CHECK_THAT(small.last_grad_norm(), WithinRel(big.last_grad_norm(), 1e-5));
  }
  CHECK(difference(adapter.parameters(), reference.parameters()) <= 1e-6);
}

TEST_CASE("Tensors of several types train together", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  net->value->to(torch::kDouble);
  peft::AdamW optimizer(adapter, AdamWOptions(1e-2), 1.0);
  auto [other, reference] = adapted_net();
  torch::optim::AdamW theirs(reference.parameters(), AdamWOptions(1e-2));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const auto x = batch(step);
    net->value(net->forward(x, false).to(torch::kDouble)).square().sum().backward();
    optimizer.step();
    for (auto& p : reference.parameters()) p.mutable_grad() = torch::Tensor();
    loss_of(other, x).backward();
    torch::nn::utils::clip_grad_norm_(reference.parameters(), 1.0);
    theirs.step();
  }
  CHECK(difference(adapter.parameters(), reference.parameters()) <= 1e-5);
}

TEST_CASE("Weights of a half type train with the composed form", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  net->to(torch::kBFloat16);
  peft::AdamW optimizer(adapter, AdamWOptions(1e-2), 1.0);
  const auto before = copies(adapter.parameters());
  optimizer.zero_grad();
  loss_of(net, batch(0, torch::kBFloat16)).backward();
  optimizer.step();
  CHECK(adapter.parameters().front().scalar_type() == torch::kBFloat16);
  CHECK_THAT(difference(adapter.parameters(), before), WithinAbs(0.01, 0.005));
  CHECK(std::isfinite(optimizer.last_grad_norm()));
}

TEST_CASE("The step tells autograd that it wrote to the weights", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, AdamWOptions(1e-2));
  const auto loss = loss_of(net, batch(0));
  loss.backward({}, /*retain_graph=*/true);
  optimizer.step();
  CHECK_THROWS_WITH(loss.backward(), Contains("modified by an inplace operation"));
}

TEST_CASE("Factors that share an input lie one after the other", "[optimizer]") {
  const auto order = peft::internal::flat_order({"l.0.self.q.lora.lora_A", "l.0.self.q.lora.lora_B",
                                                 "l.0.self.k.lora.lora_A", "l.0.self.k.lora.lora_B",
                                                 "l.1.self.q.lora.lora_A", "l.1.self.q.lora.lora_B", "odd"});
  CHECK(order == std::vector<size_t>{0, 2, 1, 3, 4, 5, 6});
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter);
  auto named = adapter.named_parameters();
  const auto* q = named[0].second.data_ptr<float>();
  CHECK(named[2].second.data_ptr<float>() == q + named[0].second.numel());
  CHECK(reinterpret_cast<std::uintptr_t>(q) % 64 == 0);
}

TEST_CASE("State goes from one optimizer to another", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  auto [other, copy] = adapted_net();
  peft::AdamW first(adapter, AdamWOptions(1e-2)), second(copy, AdamWOptions(5e-3));
  const auto train = [](AdaptedNet& model, peft::AdamW& optimizer, int from, int to) {
    for (int step = from; step < to; ++step) {
      optimizer.zero_grad();
      loss_of(model, batch(step), step % 2 == 0).backward();
      optimizer.step();
    }
  };
  train(net, first, 0, 5);
  const auto state = first.state();
  CHECK(state.front().first == "query.lora.lora_A.exp_avg");
  CHECK(state[1].first == "query.lora.lora_A.exp_avg_sq");
  CHECK(state[2].first == "query.lora.lora_A.step");
  CHECK(state.back().first == "param_groups.0.lr");
  {
    torch::NoGradGuard no_grad;
    auto to = copy.parameters();
    for (size_t i = 0; i < to.size(); ++i) to[i].copy_(adapter.parameters()[i]);
  }
  SECTION("as named tensors") { second.load_state({state.begin(), state.end()}); }
  SECTION("as an archive") {
    std::stringstream stream;
    torch::save(first, stream);
    torch::load(second, stream);
  }
  CHECK(second.param_groups()[0].options().get_lr() == 1e-2);
  train(net, first, 5, 10);
  train(other, second, 5, 10);
  CHECK(difference(adapter.parameters(), copy.parameters()) == 0);
}

TEST_CASE("State that does not fit is refused whole", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter);
  const auto named = optimizer.state();
  std::map<std::string, torch::Tensor> state(named.begin(), named.end());
  state.erase("query.lora.lora_A.step");
  state["key.lora.lora_B.exp_avg"] = torch::ones({1});
  state["key.lora.lora_A.exp_avg"] = torch::ones({2, 6}, torch::kDouble);
  state["nobody.exp_avg"] = torch::ones({1});
  CHECK_THROWS_WITH(optimizer.load_state(state),
                    Contains("4 problems") && Contains("'query.lora.lora_A.step' is missing") &&
                        Contains("'key.lora.lora_B.exp_avg' expected shape (5, 2), but got (1)") &&
                        Contains("expected dtype Float, but got Double") &&
                        Contains("'nobody.exp_avg' is not expected"));
}

TEST_CASE("Wrong settings of the optimizer are all listed", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  CHECK_FALSE(adapter.record().has_optimizer);
  CHECK_THROWS_WITH(peft::AdamW(adapter, AdamWOptions(-1).betas({1.0, 0.5}).amsgrad(true),
                                std::numeric_limits<double>::quiet_NaN()),
                    Contains("4 problems") && Contains("lr must be at least 0, but got -1") &&
                        Contains("first of betas") && Contains("amsgrad is not supported") &&
                        Contains("max_grad_norm must be positive"));
  CHECK_THROWS_WITH(
      peft::AdamW(adapter, {{[](const std::string& name) { return name == "head"; }, AdamWOptions(1e-3)}}),
      Contains("group 0 matches none of the 6 parameters, such as 'query.lora.lora_A'"));
  CHECK_FALSE(adapter.record().has_optimizer);
  peft::AdamW optimizer(adapter);
  CHECK(adapter.record().has_optimizer);
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({torch::ones({1}).set_requires_grad(true)}));
  CHECK_THROWS_WITH(optimizer.step(), Contains("was made with 1 parameter groups, but has 2"));
  for (auto& p : adapter.parameters()) p.set_requires_grad(false);
  CHECK_THROWS_WITH(peft::AdamW(adapter), Contains("adapter 'tuned' has nothing that trains"));
}

TEST_CASE("step evaluates a closure with gradients on", "[optimizer]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, AdamWOptions(1e-2));
  const auto before = copies(adapter.parameters());
  auto model = net;
  const auto loss = optimizer.step([&] {
    optimizer.zero_grad();
    auto value = loss_of(model, batch(0));
    value.backward();
    return value;
  });
  CHECK(loss.defined());
  CHECK(difference(adapter.parameters(), before) > 0);
}

TEST_CASE("Autocast holds inside its scope only and nests", "[autocast]") {
  const auto x = torch::randn({3, 4}), w = torch::randn({5, 4});
  const auto type = [&] { return torch::mm(x, w.t()).scalar_type(); };
  {
    peft::Autocast outer(torch::kCPU);
    CHECK(type() == torch::kBFloat16);
    {
      peft::Autocast off(torch::kCPU, torch::kBFloat16, /*enabled=*/false);
      CHECK(type() == torch::kFloat);
    }
    CHECK(type() == torch::kBFloat16);
  }
  CHECK(type() == torch::kFloat);
  CHECK_THROWS_WITH(peft::Autocast(torch::kCPU, torch::kDouble),
                    Contains("dtype must be BFloat16, but got Double"));
}

TEST_CASE("An adapter trains under autocast with gradients in its own type", "[autocast]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, AdamWOptions(1e-2));
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    torch::Tensor loss;
    optimizer.zero_grad();
    {
      peft::Autocast autocast(torch::kCPU);
      loss = loss_of(net, batch(0)).to(torch::kFloat);
    }
    loss.backward();
    CHECK(adapter.parameters().front().grad().scalar_type() == torch::kFloat);
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  CHECK(last < 0.9 * first);
}
