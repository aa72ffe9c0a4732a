#include <peft/peft.h>
#include <torch/torch.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"

namespace {

namespace nn = torch::nn;
using peft::LoralibOptions;
using torch::Tensor;
using State = std::map<std::string, Tensor>;

/// Element i is ((((i + k) · 37) mod 101) − 50) / 100.
Tensor fill(std::vector<int64_t> shape, int64_t k) {
  int64_t count = 1;
  for (const auto size : shape) count *= size;
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(((static_cast<int64_t>(i) + k) * 37) % 101 - 50) / 100.0F;
  }
  return torch::tensor(values).view(shape);
}

struct NetImpl : nn::Module {
  NetImpl() {
    torch::NoGradGuard no_grad;
    emb->base->weight.copy_(fill({10, 8}, 1));
    q->base->weight.copy_(fill({6, 8}, 11));
    qkv->base->weight.copy_(fill({12, 8}, 21));
  }
  peft::Embedding emb{register_module("emb", peft::Embedding(10, 8))};
  peft::Linear q{register_module("q", peft::Linear(8, 6))};
  peft::Linear qkv{register_module("qkv", peft::Linear(8, 12))};
  peft::Conv2d conv{register_module("conv", peft::Conv2d(4, 6, 3))};
  nn::Linear plain{register_module("plain", nn::Linear(8, 6))};
};
TORCH_MODULE(Net);

/// What loralib.lora_state_dict(net, bias="lora_only") has.
State state() {
  return {{"emb.lora_A", fill({3, 10}, 3)}, {"emb.lora_B", fill({8, 3}, 4)}, {"q.lora_A", fill({2, 8}, 13)},
          {"q.lora_B", fill({6, 2}, 14)},   {"q.bias", fill({6}, 12)},       {"qkv.lora_A", fill({4, 8}, 23)},
          {"qkv.lora_B", fill({8, 2}, 24)}, {"qkv.bias", fill({12}, 22)}};
}

std::filesystem::path written(const peft_test::TemporaryFolder& folder, const State& state) {
  const auto path = folder / "lora.safetensors";
  peft::save_safetensors(path, {state.begin(), state.end()});
  return path;
}

void check_values(const Tensor& tensor, const std::vector<float>& expected) {
  CHECK((tensor.detach().view(-1) - torch::tensor(expected)).abs().max().item<double>() < 2e-6);
}

}  // namespace

// Reference: Microsoft's loralib, tests/reference/loralib_values.py.
TEST_CASE("A state dict of loralib gives loralib's outputs", "[loralib]") {
  const peft_test::TemporaryFolder folder;
  Net net;
  const auto options = LoralibOptions(3).enable({true, false, true});
  const auto random = at::globalContext().defaultGenerator(torch::kCPU).get_state();
  const auto adapter = peft::load_loralib(*net, written(folder, state()), options, "old");
  CHECK(torch::equal(random, at::globalContext().defaultGenerator(torch::kCPU).get_state()));
  CHECK(adapter.count() == 0);
  CHECK(adapter.sites() == std::vector<std::string>{"emb", "q", "qkv"});
  check_values(net->emb->forward(torch::tensor({1, 4})),
               {-0.4149F, -0.05490001F, -0.3312F, 0.0288F, 0.3888F, -0.2612F, 0.1291F, 0.4891F, -0.6239F,
                -0.2339F, 0.4288F, -0.1912F, 0.1988F, 0.5888F, -0.1019F, 0.2881F});
  check_values(net->q->forward(fill({1, 8}, 9)),
               {-0.03148149F, -0.08006051F, -1.002643F, -0.3542715F, 0.2941F, -0.562479F});
  check_values(net->qkv->forward(fill({1, 8}, 9)),
               {-0.791597F, 0.224382F, 0.1192105F, 0.191193F, 0.6368999F, 1.03F, 0.4131F, 0.3315F, 0.453188F,
                -0.206879F, -0.157219F, -0.335112F});
}

TEST_CASE("A state dict of loralib trains on, with other alphas where a pattern says so", "[loralib]") {
  const peft_test::TemporaryFolder folder;
  Net net;
  State linear;
  for (const auto& [key, tensor] : state()) {
    if (key.rfind("q.lora", 0) == 0) linear.emplace(key, tensor);
  }
  const auto adapter = peft::load_loralib(*net, written(folder, linear),
                                          LoralibOptions(1).alpha_pattern({{"q", 8}}), "default", true);
  CHECK(adapter.count() == 2 * (8 + 6));
  const auto piece = adapter.layers<peft::LoraImpl>().at(0);
  CHECK(piece->rank == 2);
  CHECK(piece->scaling() == 4);
  CHECK(torch::equal(piece->lora_A, fill({2, 8}, 13)));
}

TEST_CASE("A state dict that is not this model's is refused with all that is wrong", "[loralib]") {
  const peft_test::TemporaryFolder folder;
  Net net;
  const auto load = [&](const State& tensors, std::vector<bool> enable = {true, false, true}) {
    peft::load_loralib(*net, written(folder, tensors), LoralibOptions(3).enable(std::move(enable)));
  };
  const auto with = [](State extra) {
    extra.merge(state());
    return extra;
  };
  CHECK_THROWS_WITH(load(state(), {}), Contains("'qkv': lora_A has shape (4, 8) and lora_B (8, 2)") &&
                                           Contains("LoralibOptions::enable"));
  CHECK_THROWS_WITH(load(state(), {true, true, true}),
                    Contains("'qkv': expected lora_A (6, 8) and lora_B (12, 2), but got (4, 8) and (8, 2)"));
  CHECK_THROWS_WITH(load(with({{"q.weight", fill({6, 8}, 1)}, {"emb.lora_C", fill({1}, 1)}})),
                    Contains("2 problems") && Contains("'q.weight' must be a lora_A, a lora_B or a bias"));
  CHECK_THROWS_WITH(load(with({{"k.lora_A", fill({2, 8}, 1)}})), Contains("'k.lora_B' is missing"));
  CHECK_THROWS_WITH(load(with({{"qq.lora_A", fill({2, 8}, 1)}, {"qq.lora_B", fill({6, 2}, 1)}})),
                    Contains("'qq' has a lora in the file, but the model has no such layer; closest: 'q'"));
  CHECK_THROWS_WITH(load(with({{"plain.lora_A", fill({2, 8}, 1)}, {"plain.lora_B", fill({6, 2}, 1)}})),
                    Contains("'plain' has a lora in the file, but cannot take one"));
  CHECK_THROWS_WITH(load(with({{"conv.lora_A", fill({6, 12}, 1)}, {"conv.lora_B", fill({18, 6}, 1)}})),
                    Contains("a Conv2d has other factors in loralib than here"));
  auto narrow = state();
  narrow["q.lora_A"] = fill({2, 7}, 1);
  CHECK_THROWS_WITH(load(narrow), Contains("'q': expected lora_A (2, 8) and lora_B (6, 2), but got (2, 7)"));
  auto bias = state();
  bias["q.bias"] = fill({5}, 1);
  CHECK_THROWS_WITH(load(bias), Contains("'q.bias' expected shape (6), but got (5)"));
  CHECK_THROWS_WITH(load({{"q.bias", fill({6}, 1)}}), Contains("it holds no lora_A and lora_B"));
  CHECK_THROWS_WITH(load(with({{"q.lora_A", torch::ones({2, 8}, torch::kLong)}})), Contains("floating type"));
  peft_test::write_bytes(folder / "lora.pt", "no archive");
  CHECK_THROWS_WITH(peft::load_loralib(*net, folder / "lora.pt", LoralibOptions(1)),
                    Contains("load_pickle: cannot read"));
  CHECK(net->q->adapters().empty());
  CHECK(net->emb->adapters().empty());
}
