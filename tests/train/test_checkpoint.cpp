#include "catch.h"

#include <filesystem>

#include "io/temporary_folder.h"
#include "peft/methods/adalora.h"
#include "peft/train/checkpoint.h"
#include "peft/train/optimizer.h"
#include "train/adapted_net.h"

namespace {

/// A run whose every step draws random numbers: data, dropout and which layers are used.
struct Run {
  explicit Run(uint64_t seed = 1)
      : net_and_adapter(adapted_net(seed, /*dropout=*/0.3)),
        optimizer(adapter(), torch::optim::AdamWOptions(1e-2), /*max_grad_norm=*/1.0),
        schedule(optimizer, 3, 20) {}
  peft::Adapter& adapter() { return net_and_adapter.second; }
  double step() {
    const bool all = torch::rand({1}).item<double>() < 0.7;
    optimizer.zero_grad();
    const auto loss = net_and_adapter.first->forward(torch::randn({4, 6}), all).square().sum();
    loss.backward();
    optimizer.step();
    schedule.step();
    return loss.item<double>();
  }
  std::pair<AdaptedNet, peft::Adapter> net_and_adapter;
  peft::AdamW optimizer;
  peft::LinearSchedule schedule;
};

}  // namespace

TEST_CASE("A run resumes bit for bit, random numbers included", "[checkpoint]") {
  const peft_test::TemporaryFolder folder;
  const auto path = folder.path() / "checkpoint.safetensors";
  const std::string position = R"({"epoch":1,"batch":7,"name":"ünï"})";
  Run run;
  for (int i = 0; i < 6; ++i) run.step();
  peft::save_checkpoint(path, run.adapter(), run.optimizer, run.schedule, position);
  std::vector<double> losses;
  for (int i = 0; i < 6; ++i) losses.push_back(run.step());

  Run resumed(99);
  {
    // The base is the model's own matter: here, the same one.
    torch::NoGradGuard no_grad;
    auto from = run.net_and_adapter.first->named_parameters();
    for (auto& item : resumed.net_and_adapter.first->named_parameters()) {
      if (item.key().find("tuned") == std::string::npos) item.value().copy_(from[item.key()]);
    }
  }
  resumed.step();
  CHECK(peft::checkpoint_position(path) == position);
  CHECK(peft::load_checkpoint(path, resumed.adapter(), resumed.optimizer, resumed.schedule) == position);
  CHECK(resumed.schedule.count() == 6);
  for (int i = 0; i < 6; ++i) CHECK(resumed.step() == losses[static_cast<size_t>(i)]);
  CHECK(difference(run.adapter().parameters(), resumed.adapter().parameters()) == 0);
  CHECK(run.schedule.last() == resumed.schedule.last());

  const auto again = folder.path() / "again.safetensors", other = folder.path() / "other.safetensors";
  peft::save_checkpoint(again, run.adapter(), run.optimizer, run.schedule, position);
  peft::load_checkpoint(again, resumed.adapter(), resumed.optimizer, resumed.schedule);
  peft::save_checkpoint(other, resumed.adapter(), resumed.optimizer, resumed.schedule, position);
  CHECK(peft_test::read_bytes(again) == peft_test::read_bytes(other));
  CHECK(folder.count() == 3);
}

TEST_CASE("A checkpoint that does not fit changes nothing and says all that is wrong", "[checkpoint]") {
  const peft_test::TemporaryFolder folder;
  const auto path = folder.path() / "checkpoint.safetensors";
  Run run;
  run.step();
  peft::save_checkpoint(path, run.adapter(), run.optimizer, run.schedule);
  const auto before = copies(run.adapter().parameters());
  const auto generator = peft::internal::generator_state(at::detail::getDefaultCPUGenerator());
  const auto refused = [&](const std::string& message) {
    INFO(message);
    CHECK_THROWS_WITH(peft::load_checkpoint(path, run.adapter(), run.optimizer, run.schedule),
                      Contains("load_checkpoint: '" + path.string()) && Contains(message));
    CHECK(difference(run.adapter().parameters(), before) == 0);
    CHECK(run.schedule.count() == 1);
    CHECK(torch::equal(peft::internal::generator_state(at::detail::getDefaultCPUGenerator()), generator));
  };

  SECTION("of an adapter with other shapes") {
    torch::manual_seed(5);
    AdaptedNet net;
    auto adapter = peft::add_adapter(*net, peft::LoraOptions(3), peft::named({"query", "key"}), "tuned");
    peft::AdamW optimizer(adapter);
    peft::ConstantSchedule schedule(optimizer);
    CHECK_THROWS_WITH(peft::load_checkpoint(path, adapter, optimizer, schedule),
                      Contains("cannot be used") &&
                          Contains("'query.lora.lora_A' expected shape (3, 6), but got (2, 6)") &&
                          Contains("'value.lora.lora_A' is not expected") && Contains("20 problems"));
  }
  SECTION("of another kind of file") {
    peft::save_safetensors(path, {{"weight", torch::ones({2})}});
    refused("it is a safetensors file, but not a checkpoint");
  }
  SECTION("of another version") {
    peft::save_safetensors(path, {{"weight", torch::ones({2})}}, {{"peft_checkpoint", "0"}});
    refused("its format must be version 1, but is 0");
  }
  SECTION("with a tensor too many and one too few") {
    auto tensors = peft::load_safetensors(path);
    tensors["adapter.stranger"] = torch::ones({1});
    tensors["stranger"] = torch::ones({1});
    tensors.erase("optimizer.key.lora.lora_B.exp_avg");
    peft::save_safetensors(folder.path() / "new", tensors, {{"peft_checkpoint", "1"}, {"position", ""}});
    std::filesystem::rename(folder.path() / "new", path);
    refused("3 problems");
    refused("'stranger' is not expected");
    refused("'key.lora.lora_B.exp_avg' is missing");
  }
  SECTION("with a controller's state that has no name") {
    AdaptedNet net;
    const auto adapter =
        peft::add_adapter(*net, peft::AdaLoraOptions(12).init_rank(3).target_rank(1), peft::named({"query"}));
    peft::AdamW optimizer(adapter);
    peft::ConstantSchedule schedule(optimizer);
    peft::save_checkpoint(path, adapter, optimizer, schedule);
    auto tensors = peft::load_safetensors(path);
    tensors["controller.0"] = torch::ones({1});
    peft::save_safetensors(folder.path() / "new", tensors, {{"peft_checkpoint", "1"}, {"position", ""}});
    CHECK_THROWS_WITH(peft::load_checkpoint(folder.path() / "new", adapter, optimizer, schedule),
                      Contains("'controller.0' is not expected"));
  }
  SECTION("with a damaged random number generator") {
    auto tensors = peft::load_safetensors(path);
    tensors["generator.cpu"] = torch::full_like(tensors["generator.cpu"], 255);
    peft::save_safetensors(folder.path() / "new", tensors, {{"peft_checkpoint", "1"}, {"position", ""}});
    std::filesystem::rename(folder.path() / "new", path);
    refused("random number generators is damaged");
  }
  SECTION("cut short") {
    const auto bytes = peft_test::read_bytes(path);
    for (const size_t size : {size_t{0}, size_t{7}, size_t{100}, bytes.size() - 1}) {
      peft_test::write_bytes(path, bytes.substr(0, size));
      CHECK_THROWS_AS(peft::load_checkpoint(path, run.adapter(), run.optimizer, run.schedule), c10::Error);
      CHECK(difference(run.adapter().parameters(), before) == 0);
    }
  }
  SECTION("absent") {
    std::filesystem::remove(path);
    CHECK_THROWS_WITH(peft::load_checkpoint(path, run.adapter(), run.optimizer, run.schedule),
                      Contains(path.string()));
  }
}

TEST_CASE("A checkpoint replaces the one before it, or leaves it", "[checkpoint]") {
  const peft_test::TemporaryFolder folder;
  const auto path = folder.path() / "checkpoint.safetensors";
  Run run;
  peft::save_checkpoint(path, run.adapter(), run.optimizer, run.schedule, "first");
  run.step();
  peft::save_checkpoint(path, run.adapter(), run.optimizer, run.schedule, "second");
  CHECK(peft::checkpoint_position(path) == "second");
  CHECK_THROWS(peft::save_checkpoint(folder.path() / "no" / "such" / "folder", run.adapter(), run.optimizer,
                                     run.schedule));
  CHECK(peft::checkpoint_position(path) == "second");
}
