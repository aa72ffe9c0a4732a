#include <limits>
#include <string>
#include <vector>

#include "catch.h"
#include "peft/core/adapted.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"

namespace nn = torch::nn;
using Catch::Matchers::Contains;
using torch::Tensor;
using Names = std::vector<std::string>;

namespace {

struct NetImpl : nn::Module {
  NetImpl() {
    first = register_module("first", peft::Linear(6, 6));
    second = register_module("second", peft::Linear(6, 6));
  }
  Tensor forward(const Tensor& x) { return second->forward(torch::tanh(first->forward(x))); }
  peft::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Net);

peft::Adapter add(Net& net, const std::string& name) {
  return peft::add_adapter(*net, peft::LoraOptions(2).init(peft::LoraInit::random), peft::all(), name);
}

}  // namespace

TEST_CASE("Switching again and again sees what became of the adapters in between", "[active]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  Net net;
  const auto x = torch::randn({3, 6});
  const auto plain = net->forward(x);
  for (const auto* name : {"a", "b", "c"}) add(net, name);
  const auto only = [&](const Names& names) {
    peft::set_active(*net, names);
    return net->forward(x);
  };
  const auto a = only({"a"}), b = only({"b"}), both = only({"a", "b"}), none = only({});
  CHECK(torch::equal(none, plain));
  CHECK_FALSE(torch::equal(a, b));
  const auto check = [&] {
    CHECK(torch::equal(only({"a"}), a));
    CHECK(torch::equal(only({"b"}), b));
    CHECK(torch::equal(only({"a", "b"}), both));
    CHECK(torch::equal(only({}), plain));
  };
  check();
  check();

  SECTION("another one came") {
    add(net, "d");
    CHECK(peft::active_adapters(*net) == Names{"d"});
    check();
    CHECK_FALSE(torch::equal(only({"d"}), plain));
  }
  SECTION("one went") {
    peft::remove_adapter(*net, "c");
    check();
    CHECK_THROWS_WITH(only({"c"}), Contains("no adapter 'c'"));
    peft::remove_adapter(*net, "b");
    CHECK_THROWS_WITH(only({"b"}), Contains("no adapter 'b'"));
    CHECK(torch::equal(only({"a"}), a));
    add(net, "b");
    CHECK_FALSE(torch::equal(only({"b"}), b));
  }
  SECTION("one has another name") {
    peft::rename(*net, "b", "z");
    CHECK_THROWS_WITH(only({"b"}), Contains("no adapter 'b'"));
    CHECK(torch::equal(only({"z"}), b));
    CHECK(torch::equal(only({"a", "z"}), both));
  }
  SECTION("all were off") {
    only({"a"});
    peft::disable(*net);
    CHECK(torch::equal(only({"b"}), plain));
    peft::enable(*net);
    check();
    {
      const auto off = peft::disabled(*net);
      CHECK(torch::equal(only({"a"}), plain));
    }
    check();
  }
  SECTION("the model was merged") {
    only({"a"});
    peft::merge(*net);
    CHECK_THROWS_WITH(only({"b"}), Contains("merged"));
    CHECK_THROWS_WITH(only({"a"}), Contains("merged"));
    peft::unmerge(*net);
    check();
  }
  SECTION("a layer lost its piece behind the model's back") {
    only({"a"});
    net->second->detach("a");
    const auto half = net->forward(x);
    CHECK_FALSE(torch::equal(half, a));
    CHECK(torch::equal(half, only({"a"})));
    CHECK(torch::equal(only({"b"}), b));
  }
  SECTION("a part of the model is asked") {
    peft::set_active(*net->first, {"b"});
    CHECK(torch::equal(net->forward(x), b));
    check();
  }
  SECTION("a copy goes its own way") {
    const auto before = only({"a"});
    Net copy;
    copy->first = copy->replace_module(
        "first", peft::Linear(std::dynamic_pointer_cast<peft::Linear::Impl>(net->first->clone())));
    copy->second = copy->replace_module(
        "second", peft::Linear(std::dynamic_pointer_cast<peft::Linear::Impl>(net->second->clone())));
    peft::set_active(*copy, {"b"});
    CHECK(torch::equal(copy->forward(x), b));
    CHECK(torch::equal(net->forward(x), before));
    check();
  }
}

TEST_CASE("Hundreds of adapters are switched between without a look at them", "[active]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  Net net;
  const auto x = torch::randn({3, 6});
  std::vector<Tensor> outputs;
  for (int i = 0; i < 200; ++i) {
    add(net, "a" + std::to_string(i));
    peft::set_active(*net, {"a" + std::to_string(i)});
    outputs.push_back(net->forward(x));
  }
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 200; i += 37) {
      peft::set_active(*net, {"a" + std::to_string(i)});
      CHECK(torch::equal(net->forward(x), outputs[static_cast<size_t>(i)]));
    }
  }
}

TEST_CASE("Merging takes new values as they are and copies those that belong to others", "[merge]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  Net net;
  const auto x = torch::randn({3, 6});
  const auto weight = net->first->base->weight.clone();
  const auto memory = net->first->base->weight.data_ptr();
  const auto own = peft::add_adapter(*net, peft::ReplaceOptions(), peft::named({"second"}), "own");
  const auto low = peft::add_adapter(*net, peft::LoraOptions(2).init(peft::LoraInit::random),
                                     peft::named({"first"}), "low");
  const auto before = net->forward(x);
  for (int i = 0; i < 2; ++i) {
    peft::merge(*net);
    CHECK(torch::allclose(net->forward(x), before, 1e-5, 1e-6));
    CHECK(net->second->base->weight.data_ptr() != own.layers<peft::ReplaceImpl>().front()->weight.data_ptr());
    peft::unmerge(*net);
    CHECK(torch::equal(net->first->base->weight, weight));
    CHECK(net->first->base->weight.data_ptr() == memory);
  }
  const auto piece = low.layers<peft::LoraImpl>().front();
  CHECK(torch::allclose(piece->with_delta(weight, *net->first->base_view()).sum,
                        weight + piece->delta(*net->first->base_view()), 1e-6, 1e-7));
}

TEST_CASE("Merging without the originals gives the same weights, and nothing where one does not fit",
          "[merge]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  Net net;
  add(net, "a");
  const auto before = net->first->base->weight.clone();
  peft::merge(*net);
  const auto first = net->first->base->weight.clone(), second = net->second->base->weight.clone();
  peft::unmerge(*net);
  Tensor last = net->second->base->weight;
  const auto value = last[5][5].item<double>();
  last[5][5] = std::numeric_limits<double>::infinity();
  CHECK_THROWS_WITH(peft::merge(*net, /*keep=*/false), Contains("'second'") && Contains("NaN or infinity"));
  CHECK(torch::equal(net->first->base->weight, before));
  last[5][5] = value;
  peft::merge(*net, /*keep=*/false);
  CHECK(torch::equal(net->first->base->weight, first));
  CHECK(torch::equal(net->second->base->weight, second));
  CHECK_THROWS_WITH(peft::unmerge(*net), Contains("were not kept"));
}

TEST_CASE("Weights whose sum is too large are merged all the same, NaN and infinity are not", "[merge]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  Net net;
  add(net, "a");
  Tensor weight = net->first->base->weight;
  weight.select(0, 0).fill_(2e38);
  CHECK_NOTHROW(peft::merge(*net));
  peft::unmerge(*net);
  for (const auto value :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    weight[2][3] = value;
    CHECK_THROWS_WITH(peft::merge(*net), Contains("NaN or infinity"));
  }
}
