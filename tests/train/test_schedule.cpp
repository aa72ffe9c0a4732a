#include "catch.h"

#include <torch/optim/schedulers/step_lr.h>
#include <torch/optim/sgd.h>

#include "peft/train/optimizer.h"
#include "peft/train/schedule.h"
#include "train/adapted_net.h"

namespace {

torch::optim::SGD two_groups() {
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (const double rate : {0.3, 0.07}) {
    groups.emplace_back(std::vector<torch::Tensor>{torch::zeros({1}).set_requires_grad(true)},
                        std::make_unique<torch::optim::SGDOptions>(rate));
  }
  return torch::optim::SGD(groups, torch::optim::SGDOptions(1.0));
}

void follow(torch::optim::Optimizer& optimizer, peft::Schedule& schedule, const std::vector<double>& first,
            const std::vector<double>& second) {
  for (size_t k = 0; k < first.size(); ++k) {
    INFO("k = " << k);
    CHECK_THAT(optimizer.param_groups()[0].options().get_lr(), WithinAbs(first[k], 1e-16));
    CHECK_THAT(optimizer.param_groups()[1].options().get_lr(), WithinAbs(second[k], 1e-16));
    CHECK(schedule.last() == std::vector<double>{optimizer.param_groups()[0].options().get_lr(),
                                                 optimizer.param_groups()[1].options().get_lr()});
    CHECK(schedule.count() == static_cast<int64_t>(k));
    optimizer.step();
    schedule.step();
  }
}

}  // namespace

// The values are those of tests/reference/adamw_values.py.
TEST_CASE("Schedules give transformers' rates", "[schedule]") {
  auto optimizer = two_groups();
  SECTION("constant with warm-up") {
    peft::ConstantSchedule schedule(optimizer, 4);
    follow(optimizer, schedule, {0.0, 0.075, 0.15, 0.22499999999999998, 0.3, 0.3, 0.3},
           {0.0, 0.0175, 0.035, 0.052500000000000005, 0.07, 0.07, 0.07});
  }
  SECTION("constant") {
    peft::ConstantSchedule schedule(optimizer);
    follow(optimizer, schedule, {0.3, 0.3, 0.3}, {0.07, 0.07, 0.07});
  }
  SECTION("linear with warm-up") {
    peft::LinearSchedule schedule(optimizer, 3, 10);
    follow(optimizer, schedule,
           {0.0, 0.09999999999999999, 0.19999999999999998, 0.3, 0.2571428571428571, 0.21428571428571427,
            0.1714285714285714, 0.12857142857142856, 0.0857142857142857, 0.04285714285714285, 0.0, 0.0},
           {0.0, 0.023333333333333334, 0.04666666666666667, 0.07, 0.060000000000000005, 0.05, 0.04,
            0.030000000000000002, 0.02, 0.01, 0.0, 0.0});
  }
  SECTION("linear without warm-up") {
    peft::LinearSchedule schedule(optimizer, 0, 7);
    follow(optimizer, schedule,
           {0.3, 0.2571428571428571, 0.21428571428571427, 0.1714285714285714, 0.12857142857142856,
            0.0857142857142857, 0.04285714285714285, 0.0, 0.0},
           {0.07, 0.060000000000000005, 0.05, 0.04, 0.030000000000000002, 0.02, 0.01, 0.0, 0.0});
  }
  SECTION("cosine") {
    peft::CosineSchedule schedule(optimizer, 3, 10);
    follow(optimizer, schedule,
           {0.0, 0.09999999999999999, 0.19999999999999998, 0.3, 0.28514533018536287, 0.24352347027881002,
            0.18337814009344713, 0.11662185990655284, 0.05647652972118997, 0.014854669814637143, 0.0,
            0.014854669814637128},
           {0.0, 0.023333333333333334, 0.04666666666666667, 0.07, 0.06653391037658467, 0.05682214306505568,
            0.042788232688471005, 0.027211767311529002, 0.013177856934944328, 0.003466089623415334, 0.0,
            0.00346608962341533});
  }
  SECTION("cosine with more waves") {
    peft::CosineSchedule schedule(optimizer, 2, 10, 1.25);
    follow(optimizer, schedule,
           {0.0, 0.15, 0.3, 0.23333553495294032, 0.09259748514523654, 0.0028822079395154354,
            0.043933982822017846, 0.17926354830241925, 0.28858192987669296, 0.2747204418453818,
            0.15000000000000002, 0.025279558154618232},
           {0.0, 0.035, 0.07, 0.054444958155686084, 0.02160607986722186, 0.000672515185886935,
            0.010251262658470832, 0.0418281612705645, 0.06733578363789504, 0.06410143643058909,
            0.03500000000000001, 0.005898563569410921});
  }
}

TEST_CASE("A schedule goes on from its state", "[schedule]") {
  auto optimizer = two_groups(), other = two_groups();
  peft::LinearSchedule schedule(optimizer, 2, 9);
  for (int i = 0; i < 5; ++i) schedule.step();
  const auto state = schedule.state();
  for (auto& group : other.param_groups()) group.options().set_lr(123);
  peft::LinearSchedule resumed(other, 2, 9);
  resumed.load_state({state.begin(), state.end()});
  for (int i = 0; i < 4; ++i) {
    CHECK(resumed.last() == schedule.last());
    CHECK(other.param_groups()[1].options().get_lr() == optimizer.param_groups()[1].options().get_lr());
    schedule.step();
    resumed.step();
  }
  CHECK_THROWS_WITH(resumed.load_state({{"step", torch::zeros({1})}}), Contains("3 problems") &&
                                                                           Contains("'base_lr' is missing") &&
                                                                           Contains("'start' is missing"));
}

TEST_CASE("torch's own scheduler drives our optimizer", "[schedule]") {
  auto [net, adapter] = adapted_net();
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(1.0));
  torch::optim::StepLR scheduler(optimizer, 1, 0.5);
  for (int i = 0; i < 2; ++i) scheduler.step();
  CHECK(optimizer.param_groups()[0].options().get_lr() < 1.0);
}

TEST_CASE("Wrong settings of a schedule are refused", "[schedule]") {
  auto optimizer = two_groups();
  CHECK_THROWS_WITH(peft::LinearSchedule(optimizer, -1, 5),
                    Contains("warmup must be at least 0 steps, but got -1"));
  CHECK_THROWS_WITH(peft::CosineSchedule(optimizer, 0, -5),
                    Contains("total must be at least 0 steps, but got -5"));
  CHECK_THROWS_WITH(peft::CosineSchedule(optimizer, 0, 5, -1.0), Contains("cycles must be at least 0"));
  CHECK(optimizer.param_groups()[0].options().get_lr() == 0.3);
}
