#include <array>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "catch.h"
#include "peft/core/adapted.h"
#include "peft/core/checkpointing.h"
#include "peft/kernels/fast_paths.h"
#include "peft/kernels/hash_dropout.h"
#include "peft/kernels/shadow.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"
#include "peft/train/autocast.h"
#include "peft/train/optimizer.h"

namespace nn = torch::nn;
using peft::internal::CpuLevel;
using peft::internal::CpuLevelGuard;
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

/// `Net` as Hugging Face's LoRA runs it: the input cast to the factors' type, dropped, multiplied, scaled and
/// added, the sum cast back; with the masks that the fast form draws.
Tensor composed(const Net& net, const peft::Adapter& adapter, const Tensor& x, double rate) {
  const auto pieces = adapter.layers<peft::LoraImpl>();
  const auto run = [&](const peft::Linear& layer, const peft::LoraImpl& piece, const Tensor& input) {
    const auto y = at::linear(input, layer->base->weight, layer->base->bias);
    auto in = input.to(piece.lora_A.scalar_type());
    if (rate > 0) {
      const auto mask = torch::empty(in.sizes(), in.options());
      peft::internal::HashDropout::draw(rate).mask(0, torch::ones_like(mask), mask);
      in = in * mask / (1 - rate);
    }
    const auto update = at::linear(at::linear(in, piece.lora_A), piece.lora_B) * piece.scaling();
    return (y + update).to(y.scalar_type());
  };
  return run(net->second, *pieces.at(1), at::gelu(run(net->first, *pieces.at(0), x)));
}

struct Trained {
  Tensor first, last, delta;  ///< outputs before and after, the first layer's ΔW
};

/// A hundred steps towards the same targets, the adapter's start and masks the same in every type.
Trained train(torch::ScalarType type, bool fast, int64_t rank, double rate, uint64_t seed) {
  torch::manual_seed(seed);
  Net net(type);
  auto adapter = peft::add_adapter(
      *net, peft::LoraOptions(rank).alpha(8).dropout(rate).init(peft::LoraInit::random), peft::all());
  net->train();
  const auto forward = [&](const Tensor& in) {
    return fast ? net->forward(in) : composed(net, adapter, in, net->is_training() ? rate : 0);
  };
  torch::manual_seed(seed + 1);
  const auto x = torch::randn({16, 32}).to(torch::kBFloat16).to(type);
  const auto target = torch::randn({16, 16}).to(torch::kFloat64);
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(3e-3).weight_decay(0));
  Trained result;
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const auto y = forward(x);
    CHECK(y.scalar_type() == type);
    if (step == 0) result.first = y.detach().to(torch::kFloat64);
    (y.to(torch::kFloat64) - target).square().mean().backward();
    for (const auto& parameter : adapter.parameters()) {
      REQUIRE(parameter.grad().scalar_type() == parameter.scalar_type());
    }
    optimizer.step();
  }
  const torch::NoGradGuard no_grad;
  net->eval();
  const auto piece = adapter.layers<peft::LoraImpl>().front();
  result.last = forward(x).to(torch::kFloat64);
  result.delta = (piece->lora_B.to(torch::kFloat64).mm(piece->lora_A.to(torch::kFloat64)) * piece->scaling());
  return result;
}

double error(const Tensor& value, const Tensor& truth) {
  return ((value - truth).norm() / truth.norm()).item<double>();
}

}  // namespace

TEST_CASE("On a base in bfloat16 the fast forms are about as right as casting activations",
          "[low_precision]") {
  const double rate = GENERATE(0.0, 0.3);
  // Factors in float32, then in the base's type where that is faster or the kernels' instructions are none.
  const int64_t rank = GENERATE(as<int64_t>(), 4, 40);
  const auto level = GENERATE(CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512);
  const CpuLevelGuard guard(level);
  INFO("rank " << rank << ", dropout " << rate);
  // One run says little of a type's rounding: the errors are added up over several.
  std::array<double, 3> ours{}, theirs{};
  for (const uint64_t seed : {3, 5, 7, 9}) {
    const auto truth = train(torch::kFloat64, false, rank, rate, seed),
               cast = train(torch::kBFloat16, false, rank, rate, seed),
               fast = train(torch::kBFloat16, true, rank, rate, seed);
    const auto add = [&truth](std::array<double, 3>& errors, const Trained& own) {
      errors[0] += error(own.first, truth.first);
      errors[1] += error(own.last, truth.last);
      errors[2] += error(own.delta, truth.delta);
    };
    add(ours, fast);
    add(theirs, cast);
  }
  const auto compare = [&](const char* what, size_t i) {
    INFO(what << ": errors " << ours[i] << " in the fast form, " << theirs[i] << " with activations cast");
    CHECK(ours[i] < 2 * theirs[i]);
  };
  compare("first output", 0);
  compare("output after 100 steps", 1);
  compare("change of the weight after 100 steps", 2);
}

TEST_CASE("Shadows are wanted where no kernel takes float32 factors, or the BLAS is faster",
          "[low_precision]") {
  using peft::internal::wants_shadows;
  const auto A = torch::randn({8, 32}), wide = torch::randn({40, 32});
  for (const auto half : {torch::kBFloat16, torch::kFloat16}) {
    CHECK(wants_shadows(A, half) == (peft::internal::cpu_level() == CpuLevel::scalar));
    CHECK(wants_shadows(wide, half));
    CHECK_FALSE(wants_shadows(A.to(half), half));
    const CpuLevelGuard no_kernel(CpuLevel::scalar);
    CHECK(wants_shadows(A, half));
  }
  CHECK_FALSE(wants_shadows(A, torch::kFloat32));
  CHECK_FALSE(wants_shadows(A, torch::kFloat64));
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

TEST_CASE("Shadows are made anew after a replayed step, which leaves no trace on the host",
          "[low_precision]") {
  torch::manual_seed(3);
  Net net(torch::kBFloat16);
  const auto adapter = peft::add_adapter(*net, peft::LoraOptions(40).alpha(8).init(peft::LoraInit::random),
                                         peft::named({"first"}));
  peft::AdamW optimizer(adapter);
  optimizer.capturable(true);
  const auto x = torch::randn({8, 32}).to(torch::kBFloat16);
  const torch::NoGradGuard no_grad;
  const auto before = net->forward(x);
  for (const auto& parameter : adapter.parameters()) {
    auto* values = parameter.data_ptr<float>();
    for (int64_t i = 0; i < parameter.numel(); ++i) values[i] *= 3;  // as a graph writes
  }
  CHECK(torch::equal(net->forward(x), before));
  optimizer.prepare_step();
  const auto after = net->forward(x);
  const peft::FastPaths plain(false);
  const auto exact = net->forward(x);
  CHECK(error(before, exact) > 0.1);
  CHECK(error(after, exact) < 0.02);
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

TEST_CASE("A shadow of a temporary is not taken for the next one at its address", "[low_precision]") {
  const peft::internal::Shadow shadow;
  const torch::NoGradGuard no_grad;  // where what is joined is a leaf
  for (int i = 0; i < 10; ++i) {
    const auto joined = torch::cat({torch::full({24, 32}, i), torch::full({24, 32}, i)});
    CHECK(shadow.of(joined.to(torch::kFloat32), torch::kBFloat16).eq(i).all().item<bool>());
  }
}
