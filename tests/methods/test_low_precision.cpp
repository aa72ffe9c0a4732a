#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "catch.h"
#include "peft/core/adapted.h"
#include "peft/core/checkpointing.h"
#include "peft/kernels/fast_paths.h"
#include "peft/kernels/shadow.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"
#include "peft/train/autocast.h"
#include "peft/train/optimizer.h"

namespace nn = torch::nn;
using torch::Tensor;

namespace {

/// Two layers whose base is in `type`, its values those of bfloat16 in every type.
struct NetImpl : nn::Module {
  explicit NetImpl(torch::ScalarType type) {
    first = register_module("first", peft::Linear(32, 48));
    second = register_module("second", peft::Linear(48, 16));
    for (auto& tensor : parameters()) tensor.set_data(tensor.detach().to(torch::kBFloat16).to(type));
  }
  Tensor forward(const Tensor& x) { return second->forward(at::gelu(first->forward(x))); }
  peft::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Net);

struct Trained {
  Tensor first, last, delta;  ///< outputs before and after, the first layer's ΔW
};

/// A hundred steps towards the same targets, the adapter's start the same in every type.
Trained train(torch::ScalarType type, bool fast) {
  const peft::FastPaths paths(fast);
  torch::manual_seed(3);
  Net net(type);
  auto adapter =
      peft::add_adapter(*net, peft::LoraOptions(4).alpha(8).init(peft::LoraInit::random), peft::all());
  torch::manual_seed(4);
  const auto x = torch::randn({16, 32}).to(torch::kBFloat16).to(type);
  const auto target = torch::randn({16, 16}).to(torch::kFloat64);
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(3e-3).weight_decay(0));
  Trained result;
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const auto y = net->forward(x);
    CHECK(y.scalar_type() == type);
    if (step == 0) result.first = y.detach().to(torch::kFloat64);
    (y.to(torch::kFloat64) - target).square().mean().backward();
    for (const auto& parameter : adapter.parameters()) {
      REQUIRE(parameter.grad().scalar_type() == parameter.scalar_type());
    }
    optimizer.step();
  }
  const torch::NoGradGuard no_grad;
  const auto piece = adapter.layers<peft::LoraImpl>().front();
  result.last = net->forward(x).to(torch::kFloat64);
  result.delta = (piece->lora_B.to(torch::kFloat64).mm(piece->lora_A.to(torch::kFloat64)) * piece->scaling());
  return result;
}

double error(const Tensor& value, const Tensor& truth) {
  return ((value - truth).norm() / truth.norm()).item<double>();
}

}  // namespace

TEST_CASE("On a base in bfloat16 factors in the base's type are about as right as casting activations",
          "[low_precision]") {
  const auto truth = train(torch::kFloat64, false), cast = train(torch::kBFloat16, false),
             shadowed = train(torch::kBFloat16, true);
  const auto compare = [](const char* what, const Tensor& own, const Tensor& reference, const Tensor& exact) {
    const auto ours = error(own, exact), theirs = error(reference, exact);
    INFO(what << ": error " << ours << " with factors in bfloat16, " << theirs << " with activations cast");
    CHECK(ours < 2 * theirs);
  };
  compare("first output", shadowed.first, cast.first, truth.first);
  compare("output after 100 steps", shadowed.last, cast.last, truth.last);
  compare("change of the weight after 100 steps", shadowed.delta, cast.delta, truth.delta);
}

TEST_CASE("A shadow follows its master and hands it the gradient in its type", "[low_precision]") {
  const peft::internal::Shadow shadow;
  auto master = torch::randn({3, 4}).requires_grad_();
  const auto first = shadow.of(master, torch::kBFloat16);
  CHECK(first.is_same(shadow.of(master, torch::kBFloat16)));
  CHECK(shadow.of(master, torch::kFloat32).is_same(master));
  for (int i = 0; i < 2; ++i) shadow.of(master, torch::kBFloat16).sum().backward();
  CHECK(master.grad().scalar_type() == torch::kFloat32);
  CHECK(torch::equal(master.grad(), torch::full({3, 4}, 2.0)));
  {
    const torch::NoGradGuard no_grad;
    CHECK(first.is_same(shadow.of(master, torch::kBFloat16)));
    master.add_(1);
    CHECK_FALSE(first.is_same(shadow.of(master, torch::kBFloat16)));
    CHECK(shadow.of(master, torch::kBFloat16).requires_grad());
    CHECK(torch::equal(shadow.of(master, torch::kBFloat16), master.to(torch::kBFloat16)));
  }
  master.requires_grad_(false);
  CHECK_FALSE(shadow.of(master, torch::kBFloat16).requires_grad());
  {
    const c10::InferenceMode inference;
    CHECK(shadow.of(master, torch::kBFloat16).scalar_type() == torch::kBFloat16);
  }
  CHECK_FALSE(shadow.of(master, torch::kBFloat16).is_inference());
  const peft::internal::Shadow copy = shadow;
  CHECK_FALSE(copy.of(master, torch::kBFloat16).is_same(shadow.of(master, torch::kBFloat16)));
}

TEST_CASE("Shadows serve several forwards of a step, checkpoints among them", "[low_precision]") {
  torch::manual_seed(3);
  Net net(torch::kBFloat16);
  const auto adapter =
      peft::add_adapter(*net, peft::LoraOptions(4).init(peft::LoraInit::random), peft::all());
  const auto x = torch::randn({8, 32}).to(torch::kBFloat16);
  const auto gradients = [&](const std::function<Tensor(const Tensor&)>& forward) {
    for (auto& parameter : adapter.parameters()) parameter.mutable_grad() = Tensor();
    for (int i = 0; i < 2; ++i) forward(x).sum().backward();
    std::vector<Tensor> found;
    for (const auto& parameter : adapter.parameters()) found.push_back(parameter.grad());
    return found;
  };
  const auto forward = [&](const Tensor& in) { return net->forward(in); };
  const auto plain = gradients(forward);
  const auto again = gradients([&](const Tensor& in) { return peft::checkpoint(forward, in); });
  for (size_t i = 0; i < plain.size(); ++i) CHECK(torch::equal(plain[i], again[i]));
}

TEST_CASE("Autocast over a float32 base takes the composed form and trains in float32", "[low_precision]") {
  torch::manual_seed(3);
  Net net(torch::kFloat32);
  const auto adapter =
      peft::add_adapter(*net, peft::LoraOptions(4).init(peft::LoraInit::random), peft::all());
  const auto x = torch::randn({8, 32});
  const auto exact = net->forward(x);
  Tensor y;
  {
    const peft::Autocast autocast(torch::kCPU, torch::kBFloat16);
    y = net->forward(x);
  }
  CHECK(y.scalar_type() == torch::kBFloat16);
  CHECK(error(y.to(torch::kFloat32), exact) < 0.02);
  y.sum().backward();
  for (const auto& parameter : adapter.parameters()) CHECK(parameter.grad().scalar_type() == torch::kFloat32);
}
