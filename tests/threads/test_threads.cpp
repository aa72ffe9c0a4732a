#include <peft/peft.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "catch.h"

namespace nn = torch::nn;
using torch::Tensor;
using Names = std::vector<std::string>;

namespace {

/// Two adapted layers; in a scope, so that both use the same adapters.
struct PairImpl : nn::Module {
  PairImpl() {
    first = register_module("first", peft::Linear(6, 6));
    second = register_module("second", peft::Linear(6, 6));
  }
  Tensor forward(const Tensor& x) {
    const peft::ForwardScope scope;
    return layers(x);
  }
  Tensor layers(const Tensor& x) {
    auto h = torch::tanh(first->forward(x));
    std::this_thread::yield();
    return second->forward(h);
  }
  peft::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Pair);

/// Adapters "a" and "b" on both layers, moved away from their start.
Pair make_pair_model() {
  torch::set_num_threads(1);
  torch::manual_seed(21);
  Pair model;
  for (const auto* name : {"a", "b"}) {
    peft::add_adapter(*model, peft::LoraOptions(2).init(peft::LoraInit::random), peft::all(), name);
  }
  model->eval();
  return model;
}

/// What the model computes with each of these sets alone.
std::vector<Tensor> outputs(Pair& model, const Tensor& x, const std::vector<Names>& sets) {
  const torch::NoGradGuard no_grad;
  std::vector<Tensor> results;
  for (const auto& names : sets) {
    peft::set_active(*model, names);
    results.push_back(model->forward(x));
  }
  for (size_t i = 0; i < results.size(); ++i) {
    for (size_t j = 0; j < i; ++j) REQUIRE_FALSE(torch::equal(results[i], results[j]));
  }
  return results;
}

/// Several threads infer until one has called `change` often enough. Counts outputs per legal one; the last
/// number is that of outputs which are none of them.
std::vector<int> infer_while(const std::function<Tensor(const Tensor&)>& forward, const Tensor& x,
                             const std::vector<Tensor>& legal, const std::function<void(int)>& change) {
  constexpr int readers = 3, changes = 300;
  std::atomic<int> ready{0};
  std::atomic<bool> done{false};
  std::vector<std::vector<int>> counts(readers, std::vector<int>(legal.size() + 1, 0));
  std::vector<std::thread> threads;
  for (int r = 0; r < readers; ++r) {
    threads.emplace_back([&, r] {
      const torch::NoGradGuard no_grad;
      auto& mine = counts[static_cast<size_t>(r)];
      ++ready;
      do {
        const auto y = forward(x);
        const auto found = std::find_if(legal.begin(), legal.end(),
                                        [&](const Tensor& expected) { return torch::equal(y, expected); });
        ++mine[static_cast<size_t>(found - legal.begin())];
      } while (!done);
    });
  }
  while (ready < readers) std::this_thread::yield();
  for (int i = 0; i < changes; ++i) {
    change(i);
    std::this_thread::yield();
  }
  done = true;
  for (auto& thread : threads) thread.join();
  std::vector<int> total(legal.size() + 1, 0);
  for (const auto& mine : counts) {
    for (size_t i = 0; i < total.size(); ++i) total[i] += mine[i];
  }
  return total;
}

}  // namespace

TEST_CASE("Threads that infer see one set of adapters or the other while one thread switches", "[threads]") {
  auto model = make_pair_model();
  const auto x = torch::randn({3, 6});
  const std::vector<Names> sets{{"a"}, {"b"}, {"a", "b"}};
  const auto legal = outputs(model, x, sets);
  const auto counts = infer_while([&](const Tensor& input) { return model->forward(input); }, x, legal,
                                  [&](int i) { peft::set_active(*model, sets[static_cast<size_t>(i % 3)]); });
  CHECK(counts.back() == 0);
  CHECK(counts[0] + counts[1] + counts[2] >= 3);
}

TEST_CASE("Threads that infer see adapters on or off while one thread disables and enables", "[threads]") {
  auto model = make_pair_model();
  const auto x = torch::randn({3, 6});
  const auto legal = outputs(model, x, {{}, {"b"}});
  const auto counts = infer_while([&](const Tensor& input) { return model->forward(input); }, x, legal,
                                  [&](int i) { i % 2 ? peft::enable(*model) : peft::disable(*model); });
  CHECK(counts.back() == 0);
  CHECK(peft::active_adapters(*model) == Names{"b"});
}

TEST_CASE("Without a scope each layer looks for itself, and still sees a whole set", "[threads]") {
  auto model = make_pair_model();
  const auto x = torch::randn({3, 6});
  const std::vector<Names> sets{{"a"}, {"b"}};
  std::vector<Tensor> legal;
  {
    const torch::NoGradGuard no_grad;
    for (const auto& first : sets) {
      for (const auto& second : sets) {
        peft::set_active(*model, first);
        const auto h = torch::tanh(model->first->forward(x));
        peft::set_active(*model, second);
        legal.push_back(model->second->forward(h));
      }
    }
  }
  const auto counts = infer_while([&](const Tensor& input) { return model->layers(input); }, x, legal,
                                  [&](int i) { peft::set_active(*model, sets[static_cast<size_t>(i % 2)]); });
  CHECK(counts.back() == 0);
}

TEST_CASE("A thread's rows keep their adapters while another thread switches", "[threads]") {
  auto model = make_pair_model();
  const auto x = torch::randn({3, 6});
  const auto rows = [&](const Tensor& input) {
    const peft::RowAdapters adapters({"a", "__base__", "b"});
    return model->forward(input);
  };
  Tensor expected;
  {
    const torch::NoGradGuard no_grad;
    expected = rows(x);
  }
  const std::vector<Names> sets{{"a"}, {"b"}, {}};
  const auto counts = infer_while(rows, x, {expected},
                                  [&](int i) { peft::set_active(*model, sets[static_cast<size_t>(i % 3)]); });
  CHECK(counts.back() == 0);
  CHECK(counts.front() >= 3);
}

TEST_CASE("A thread trains one model while others infer with its copy", "[threads]") {
  torch::set_num_threads(1);
  torch::manual_seed(22);
  peft::Linear trained(6, 6);
  auto adapter = peft::add_adapter(*trained, peft::LoraOptions(2).init(peft::LoraInit::random), peft::all());
  const auto copy = std::dynamic_pointer_cast<peft::Linear::Impl>(trained->clone());
  const auto x = torch::randn({3, 6});
  Tensor expected;
  {
    const torch::NoGradGuard no_grad;
    expected = copy->forward(x);
  }
  torch::optim::SGD optimizer(adapter.parameters(), 0.01);
  const auto counts = infer_while([&](const Tensor& input) { return copy->forward(input); }, x, {expected},
                                  [&](int i) {
                                    if (i % 10) return;
                                    optimizer.zero_grad();
                                    trained->forward(x).square().sum().backward();
                                    optimizer.step();
                                  });
  CHECK(counts.back() == 0);
  const torch::NoGradGuard no_grad;
  CHECK_FALSE(torch::equal(trained->forward(x), expected));
}
