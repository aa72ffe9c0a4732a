#include "catch.h"

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/adamw.h>

#include "io/temporary_folder.h"
#include "peft/methods/adalora.h"
#include "peft/model/active.h"
#include "peft/train/checkpoint.h"
#include "peft/train/schedule.h"
#include "train/increlora_trace.h"
#include "train/increlora_values.h"

using increlora::json;
using increlora::Run;
using torch::Tensor;

namespace {

/// The job of tests/reference/increlora_values.py: three layers, everything filled by a formula.
json golden_job(const json& options = json::object(), const json& optimizer = json::object()) {
  json job;
  const std::vector<std::pair<int64_t, int64_t>> shapes{{3, 4}, {3, 3}, {3, 3}};
  const auto nested = [](const Tensor& tensor) {
    json rows;
    for (const auto& row : tensor.unbind()) rows.push_back(increlora::list(row));
    return rows;
  };
  for (int64_t i = 0; i < 3; ++i) {
    const auto [out, in] = shapes[static_cast<size_t>(i)];
    job["layers"].push_back({{"weight", nested(increlora::fill({out, in}, 1 + i))},
                             {"bias", increlora::list(increlora::fill({out}, 2 + i))},
                             {"A", nested(increlora::fill({1, in}, 3 + i))},
                             {"E", {{0.0}}},
                             {"B", nested(increlora::fill({out, 1}, 6 + i))}});
  }
  job["uses"] = {0, 1, 2};
  job["head"] = nullptr;
  job["reserve"] = "fill";
  job["seed"] = 0;
  job["options"] = {{"rank", 1},
                    {"target_rank", 2},
                    {"target_total_rank", nullptr},
                    {"alpha", 6.0},
                    {"dropout", 0.0},
                    {"top_h", 1},
                    {"incre_rank_num", 1},
                    {"init_warmup", 2},
                    {"incre_interval", 2},
                    {"advance_learn", true},
                    {"multi_lr", true},
                    {"reg_orth_coef", 0.1},
                    {"beta1", 0.85},
                    {"beta2", 0.85}};
  job["optimizer"] = {{"form", "torch"},     {"lr", 0.05},  {"betas", {0.9, 0.999}}, {"eps", 1e-8},
                      {"weight_decay", 0.0}, {"clip", 1.0}, {"warmup", 2},           {"total", 14}};
  job["options"].update(options);
  job["optimizer"].update(optimizer);
  const json batch{{"x", nested(increlora::fill({5, 4}, 5))}, {"target", nested(increlora::fill({5, 3}, 6))}};
  for (int i = 0; i < job["optimizer"]["total"].get<int>(); ++i) job["batches"].push_back(batch);
  return job;
}

json longer_job() {
  return golden_job({{"incre_rank_num", 2},
                     {"target_rank", 3},
                     {"top_h", 2},
                     {"init_warmup", 3},
                     {"incre_interval", 5},
                     {"reg_orth_coef", 0.3}},
                    {{"total", 30}, {"weight_decay", 0.1}, {"form", "transformers"}});
}

void check_list(const std::vector<double>& ours, const std::vector<double>& expected, double margin) {
  REQUIRE(ours.size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i)
    CHECK(ours[i] == Approx(expected[i]).epsilon(1e-9).margin(margin));
}

void check_trace(const json& lines, const std::vector<increlora::Expected>& expected) {
  REQUIRE(lines.size() == expected.size());
  for (size_t t = 0; t < expected.size(); ++t) {
    INFO("step " << t);
    CHECK(lines[t]["loss"].get<double>() == Approx(expected[t].loss).epsilon(1e-9));
    CHECK(lines[t]["rank"].get<std::vector<int64_t>>() == expected[t].rank);
    CHECK(lines[t]["chunks"].get<std::vector<int64_t>>() == expected[t].chunks);
    check_list(lines[t]["rates"], expected[t].rates, 1e-14);
    check_list(lines[t]["E"].back(), expected[t].E, 1e-13);
    check_list(lines[t]["importance"], expected[t].importance, 1e-20);
  }
}

/// Everything a run consists of, to be compared bit for bit.
std::vector<std::pair<std::string, Tensor>> all(const Run& run) {
  auto named = run.adapter.named_tensors();
  for (const auto& item : run.optimizer.state()) named.push_back(item);
  for (const auto& item : run.grower->state()) named.push_back(item);
  for (const auto& item : run.schedule.state()) named.push_back(item);
  return named;
}
void check_equal(const Run& a, const Run& b) {
  const auto left = all(a), right = all(b);
  REQUIRE(left.size() == right.size());
  for (size_t i = 0; i < left.size(); ++i) {
    INFO(left[i].first);
    CHECK(left[i].first == right[i].first);
    CHECK(torch::equal(left[i].second, right[i].second));
  }
}

}  // namespace

// Reference: the author's code, tests/reference/increlora_values.py; many more settings, live:
// compare_increlora.py.
TEST_CASE("IncreLoRA trains as the author's code does", "[increlora]") {
  std::vector<std::string> said;
  const auto note = [&](const std::string& line) { said.push_back(line); };
  SECTION("growth by one, to the target") {
    check_trace(increlora::trace(golden_job(), note), increlora::golden_trace);
    CHECK(said.empty());
  }
  SECTION("growth by two, with weight decay and transformers' AdamW; the overshoot is said once") {
    check_trace(increlora::trace(longer_job(), note), increlora::longer_trace);
    REQUIRE(said.size() == 1);
    CHECK_THAT(said[0], Contains("step 10 took the ranks of 3 layers to 11 instead of 9"));
  }
}

TEST_CASE("IncreLoRA without multi_lr leaves later groups at the full rate", "[increlora]") {
  const auto lines = increlora::trace(golden_job({{"multi_lr", false}}));
  CHECK(lines[13]["rates"][0].get<double>() == Approx(0.05 / 12));
  for (size_t group = 1; group < 5; ++group) CHECK(lines[13]["rates"][group] == 0.05);
}

TEST_CASE("IncreLoRA scores a layer only as long as it may grow", "[increlora]") {
  const auto job = golden_job();
  Run run(job);
  for (size_t t = 0; t < 8; ++t) run.step(job["batches"][t]);
  CHECK(run.pieces[0]->scored);
  run.step(job["batches"][8]);
  CHECK(run.grower->total_rank() == run.grower->target());
  for (const auto& piece : run.pieces) {
    CHECK_FALSE(piece->scored);
    CHECK(piece->lora_E.back().item<double>() == 0);  // the reserve is silent, and is still there
  }
  CHECK_FALSE(run.grower->grow({}).size());
}

TEST_CASE("IncreLoRA goes on from a checkpoint, bit for bit, wherever it was taken", "[increlora]") {
  const peft_test::TemporaryFolder folder;
  const auto path = folder / "checkpoint.safetensors";
  auto job = longer_job();
  job["options"]["top_h"] = 3;
  job["options"]["target_rank"] = 5;  // met exactly, at step 10
  job["reserve"] = "draw";
  job["options"]["dropout"] = 0.2;
  job["options"]["advance_learn"] = GENERATE(true, false);
  const size_t taken = GENERATE(0, 1, 5, 6, 10, 11, 20);
  torch::manual_seed(5);
  Run run(job);
  for (size_t t = 0; t < taken; ++t) run.step(job["batches"][t]);
  peft::save_checkpoint(path, run.adapter, run.optimizer, run.schedule, "here");
  for (size_t t = taken; t < 24; ++t) run.step(job["batches"][t]);

  // Into a run that has not begun, and into one that has grown already.
  Run fresh(job), grown(job);
  torch::manual_seed(9);
  for (size_t t = 0; t < 12; ++t) grown.step(job["batches"][t]);
  for (auto* resumed : {&fresh, &grown}) {
    CHECK(peft::load_checkpoint(path, resumed->adapter, resumed->optimizer, resumed->schedule) == "here");
    for (size_t t = taken; t < 24; ++t) resumed->step(job["batches"][t]);
    check_equal(*resumed, run);
  }
}

TEST_CASE("A checkpoint of other layers leaves IncreLoRA as it was", "[increlora]") {
  const peft_test::TemporaryFolder folder;
  const auto path = folder / "checkpoint.safetensors";
  auto job = golden_job(), smaller = golden_job();
  smaller["layers"].erase(2);
  smaller["uses"] = {0, 1};
  Run other(smaller), run(job), twin(job);
  for (size_t t = 0; t < 6; ++t) {
    for (auto* each : {&other, &run, &twin}) each->step(job["batches"][t]);
  }
  peft::save_checkpoint(path, other.adapter, other.optimizer, other.schedule);
  CHECK_THROWS_WITH(peft::load_checkpoint(path, run.adapter, run.optimizer, run.schedule),
                    Contains("cannot be used") && Contains("'layer2.increlora.lora_A_0' is missing"));
  check_equal(run, twin);
  run.step(job["batches"][6]);
  twin.step(job["batches"][6]);
  check_equal(run, twin);
}

TEST_CASE("A copied model grows on as the original does", "[increlora]") {
  torch::manual_seed(1);
  torch::nn::Sequential net{peft::Linear(5, 6), torch::nn::Tanh(), peft::Linear(6, 6), peft::Linear(6, 3)};
  const auto options = peft::IncreLoraOptions(4).top_h(1).init_warmup(0).incre_interval(2).reg_orth_coef(0.2);
  const auto adapter = peft::add_adapter(*net, options, peft::all());
  const auto x = torch::randn({8, 5}), target = torch::randn({8, 3});
  const auto train = [&](torch::nn::SequentialImpl& model, const peft::Adapter& handle, int steps) {
    torch::manual_seed(3);  // both draw the same reserves
    peft::AdamW optimizer(handle, torch::optim::AdamWOptions(0.05));
    for (int t = 0; t < steps; ++t) {
      optimizer.zero_grad();
      torch::mse_loss(model.forward(x), target).backward();
      optimizer.step();
    }
  };
  train(*net, adapter, 5);
  const auto grower = [](const peft::Adapter& handle) {
    return std::dynamic_pointer_cast<peft::RankGrower>(handle.record().controllers.at(0));
  };
  CHECK(grower(adapter)->total_rank() == 3 + 2 * 2);

  const auto copy = peft::clone(*net);
  const auto copied = peft::adapter(*copy, "default");
  CHECK(grower(copied)->importance() == grower(adapter)->importance());
  train(*net, adapter, 4);
  CHECK(grower(copied)->total_rank() == 3 + 2 * 2);
  train(*copy, copied, 4);
  CHECK(grower(copied)->total_rank() == 3 + 4 * 2);
  const auto ours = adapter.named_tensors(), theirs = copied.named_tensors();
  REQUIRE(ours.size() == theirs.size());
  for (size_t i = 0; i < ours.size(); ++i) CHECK(torch::equal(ours[i].second, theirs[i].second));
}

TEST_CASE("IncreLoRA trains with a foreign optimizer that takes it along, and throws with one that does not",
          "[increlora]") {
  const auto job = golden_job(json::object(), {{"clip", 0.0}});
  const auto loss = [&](Run& run) {
    const auto& batch = job["batches"][0];
    return torch::mse_loss(run.net->forward(increlora::tensor(batch["x"])),
                           increlora::tensor(batch["target"]));
  };
  Run run(job), other(job);
  torch::optim::AdamW foreign(other.adapter.parameters(), torch::optim::AdamWOptions(0.05).weight_decay(0));
  SECTION("taken along") {
    run.optimizer.param_groups()[0].options().set_lr(0.05);
    for (uint64_t t = 0; t < 9; ++t) {
      torch::manual_seed(t);
      run.optimizer.zero_grad();
      loss(run).backward();
      run.optimizer.step();

      torch::manual_seed(t);
      foreign.zero_grad();
      loss(other).backward();
      const auto joined = other.adapter.before_step();
      if (!joined.empty()) foreign.add_param_group(torch::optim::OptimizerParamGroup(joined));
      foreign.step();
      other.adapter.after_step();
    }
    CHECK(other.grower->total_rank() == 6);
    const auto ours = run.adapter.named_tensors(), theirs = other.adapter.named_tensors();
    REQUIRE(ours.size() == theirs.size());
    for (size_t i = 0; i < ours.size(); ++i) {
      INFO(ours[i].first);
      CHECK(torch::allclose(ours[i].second, theirs[i].second, 0, 1e-12));
    }
  }
  SECTION("left out") {
    loss(other).backward();
    foreign.step();
    CHECK_THROWS_WITH(loss(other), Contains("its step was left out"));
  }
}

TEST_CASE("IncreLoRA does not train on after its chunks were changed from outside", "[increlora]") {
  const auto job = golden_job();
  Run run(job);
  run.step(job["batches"][0]);
  run.pieces[1]->reserve(1);
  CHECK_THROWS_WITH(run.step(job["batches"][1]),
                    Contains("'layer1'") && Contains("changed outside its training"));
}

TEST_CASE("An optimizer made after some growth goes on from its checkpoint", "[increlora]") {
  const peft_test::TemporaryFolder folder;
  const auto path = folder / "checkpoint.safetensors", early = folder / "early.safetensors";
  const auto job = longer_job();
  Run run(job);
  peft::save_checkpoint(early, run.adapter, run.optimizer, run.schedule);
  for (size_t t = 0; t < 7; ++t) run.step(job["batches"][t]);
  const auto options = torch::optim::AdamWOptions(0.01).weight_decay(0.5);
  peft::AdamW second(run.adapter, options);
  peft::ConstantSchedule schedule(second, 0);
  const auto names = [](const peft::AdamW& optimizer) {
    std::vector<std::string> found;
    for (const auto& item : optimizer.state()) found.push_back(item.first);
    return found;
  };
  const auto before = names(second);
  peft::save_checkpoint(path, run.adapter, second, schedule);
  CHECK_NOTHROW(peft::load_checkpoint(path, run.adapter, second, schedule));
  CHECK(names(second) == before);

  // One from before that growth has not what this optimizer was made with.
  CHECK_THROWS_WITH(peft::load_checkpoint(early, run.adapter, second, schedule), Contains("cannot be used"));
  CHECK(names(second) == before);
  CHECK_NOTHROW(peft::load_checkpoint(path, run.adapter, second, schedule));
}

TEST_CASE("What is taken out of the decay stays so in parameters that join later", "[increlora]") {
  torch::manual_seed(1);
  torch::nn::Sequential net{peft::Linear(5, 6), torch::nn::Tanh(), peft::Linear(6, 3)};
  const auto adapter = peft::add_adapter(
      *net,
      peft::IncreLoraOptions(4).incre_rank_num(1).top_h(2).init_warmup(0).incre_interval(1).reg_orth_coef(0),
      peft::all());
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.0).weight_decay(0.5));
  optimizer.no_decay([](const std::string& name) { return name.find("lora_A") != std::string::npos; });
  const auto step = [&] {
    optimizer.zero_grad();
    net->forward(torch::ones({2, 5})).square().sum().backward();
    optimizer.step();
  };
  step();
  step();
  step();
  const auto piece = adapter.layers<peft::IncreLoraImpl>().at(0);
  REQUIRE(piece->rank() > 1);
  optimizer.param_groups().back().options().set_lr(0.1);
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(0.1);
    static_cast<torch::optim::AdamWOptions&>(group.options()).betas({0.0, 0.0}).eps(1e30);  // decay alone
  }
  const auto A = piece->lora_A[1].detach().clone(), B = piece->lora_B[1].detach().clone();
  step();
  CHECK(torch::allclose(piece->lora_A[1], A, 1e-6));
  CHECK(torch::allclose(piece->lora_B[1], B * 0.95, 1e-6));
}

TEST_CASE("The importances of AdaLoRA and IncreLoRA are of the model's type", "[increlora][adalora]") {
  const peft_test::TemporaryFolder folder;
  const bool growing = GENERATE(false, true);
  const auto make = [&] {
    torch::manual_seed(1);
    torch::nn::Sequential net{peft::Linear(5, 6), torch::nn::Tanh(), peft::Linear(6, 3)};
    const auto adapter =
        growing ? peft::add_adapter(*net, peft::IncreLoraOptions(4).init_warmup(0), peft::all())
                : peft::add_adapter(*net, peft::AdaLoraOptions(20).init_rank(4).target_rank(2), peft::all());
    net->to(torch::kDouble);
    return std::pair(net, adapter);
  };
  auto [net, adapter] = make();
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.01));
  peft::ConstantSchedule schedule(optimizer, 0);
  optimizer.zero_grad();
  net->forward(torch::ones({2, 5}, torch::kDouble)).square().sum().backward();
  optimizer.step();
  schedule.step();
  peft::save_checkpoint(folder / "run", adapter, optimizer, schedule);

  auto [again, fresh] = make();
  peft::AdamW other(fresh, torch::optim::AdamWOptions(0.01));
  peft::ConstantSchedule others(other, 0);
  CHECK_NOTHROW(peft::load_checkpoint(folder / "run", fresh, other, others));
  net->to(torch::kFloat);
  CHECK_NOTHROW(peft::clone(*net));
}
