#include <atomic>
#include <functional>
#include <numeric>
#include <set>
#include <thread>

#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/sequential.h>

#include "io/temporary_folder.h"
#include "methods/reference_values.h"
#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::LoraOptions;
using peft::named;
using peft_test::TemporaryFolder;

namespace {

nn::TransformerEncoder encoder(int64_t layers = 2, double dropout = 0) {
  return nn::TransformerEncoder(nn::TransformerEncoderOptions(
      nn::TransformerEncoderLayerOptions(4, 2).dim_feedforward(5).dropout(dropout), layers));
}

/// Somebody's model: every kind of layer, one of them used twice, a tensor of its own.
struct NetImpl : nn::Cloneable<NetImpl> {
  NetImpl() { reset(); }
  void reset() override {
    words = register_module("words", nn::Embedding(7, 4));
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({4})));
    conv = register_module("conv", nn::Conv1d(nn::Conv1dOptions(4, 4, 3).padding(1)));
    lstm = register_module("lstm", nn::LSTM(4, 4));
    twice = register_module("twice", nn::Linear(4, 4));
    again = register_module("again", twice);
    mlp = register_module("mlp",
                          nn::Sequential(nn::Linear(4, 5), nn::Functional(torch::tanh), nn::Linear(5, 4)));
    cell = register_module("cell", nn::GRUCell(4, 4));
    group = register_module("group", nn::GroupNorm(2, 4));
    gate = register_parameter("gate", torch::randn({4, 4}));
  }
  Tensor encode(const Tensor& ids) {
    auto x = norm(words(ids));
    x = std::get<0>(lstm(conv(x.transpose(1, 2)).transpose(1, 2)));
    x = twice(torch::tanh(twice(x)));
    return group((mlp->forward(x) + torch::matmul(x, gate)).transpose(1, 2)).transpose(1, 2);
  }
  Tensor forward(const Tensor& ids) {
    const auto x = encode(ids);
    return cell(x.select(1, 0), x.select(1, 1));
  }
  nn::Embedding words{nullptr};
  nn::LayerNorm norm{nullptr};
  nn::Conv1d conv{nullptr};
  nn::LSTM lstm{nullptr};
  nn::Linear twice{nullptr}, again{nullptr};
  nn::Sequential mlp{nullptr};
  nn::GRUCell cell{nullptr};
  nn::GroupNorm group{nullptr};
  Tensor gate;
};
TORCH_MODULE(Net);

peft::Reparametrized<Net> net(bool with_gate = true) {
  torch::manual_seed(1);
  std::vector<peft::Member> members;
  if (with_gate) members.push_back(peft::member("gate", &NetImpl::gate));
  return {Net(), members};
}

/// A model without a clone(), nested, that can be told to go wrong.
struct BlockImpl : nn::Module {
  Tensor forward(const Tensor& x) {
    switch (mistake) {
      case 1:
        return torch::matmul(x, kept);  // a copy
      case 2: {
        torch::NoGradGuard no_grad;
        return fc(x);
      }
      case 3:
        fc(x);  // not part of the result
        return x;
      case 4:
        return at::linear(x, fc->weight);
      default:
        return fc(x);
    }
  }
  nn::Linear fc = register_module("fc", nn::Linear(3, 3));
  Tensor kept = fc->weight.detach().t().contiguous();
  int mistake = 0;
};
TORCH_MODULE(Block);

struct Plain : nn::Module {
  Tensor forward(const Tensor& x, bool fail = false) {
    const auto y = out(torch::tanh(blocks[1]->as<Block>()->forward(blocks[0]->as<Block>()->forward(x))));
    TORCH_CHECK(!fail, "the model fails");
    return y;
  }
  nn::ModuleList blocks = register_module("blocks", nn::ModuleList(Block(), Block()));
  nn::Linear out = register_module("out", nn::Linear(3, 2));
};

peft::Reparametrized<Plain> plain() {
  torch::manual_seed(1);
  return peft::Reparametrized(std::make_shared<Plain>());
}

template <class Model>
std::set<std::string> names(Model& model) {
  std::set<std::string> found;
  for (const auto& item : model.named_parameters()) found.insert(item.key());
  return found;
}

template <class Make>
LayerCase model_case(std::string name, Tensor input, Make make) {
  using Impl = typename decltype(make())::Impl;
  return {std::move(name),
          [=] {
            torch::manual_seed(1);
            auto model = make();
            model->to(torch::kFloat64);
            return std::static_pointer_cast<nn::Module>(model.ptr());
          },
          [](nn::Module& module, const Tensor& x) -> Tensor { return module.as<Impl>()->forward(x); },
          std::move(input)};
}

std::vector<LayerCase> cases() {
  torch::manual_seed(7);
  return {model_case("TransformerEncoder", torch::randn({3, 2, 4}, torch::kFloat64),
                     [] { return peft::Reparametrized(encoder(1)); }),
          model_case("Net", torch::tensor({{0, 3, 4}, {2, 2, 6}}), [] { return net(); })};
}

int64_t size(const std::vector<int64_t>& shape) { return shape.empty() ? 0 : torch::empty(shape).numel(); }

int64_t lora_count(const peft::SiteInfo& site) {
  return 2 * (std::accumulate(site.fan_in.begin(), site.fan_in.end(), int64_t{1}, std::multiplies<>()) +
              site.fan_out);
}

}  // namespace

TEST_CASE("Weight methods keep their promises on a closed model", "[reparametrized]") {
  for (const auto& layer_case : cases()) {
    check_properties(layer_case, {{peft::on(LoraOptions(2).alpha(3), peft::all())}, lora_count});
    check_properties(layer_case, {{peft::on(peft::ReplaceOptions(), peft::all())}, [](const auto& site) {
                                    return size(site.weight_shape) + size(site.bias_shape);
                                  }});
  }
  const auto first = cases().front();
  const auto linears = [] { return named({"linear1", "linear2"}); };
  check_properties(first, {{peft::on(peft::DoraOptions(2), linears())},
                           [](const auto& site) { return lora_count(site) + site.fan_out; },
                           /*no_op_at_start=*/true,
                           /*whole_gradient=*/false});
  check_properties(
      first, {{peft::on(peft::Ia3Options(), linears())}, [](const auto& site) { return site.fan_out; }});
  check_properties(first, {{peft::on(peft::BiasOptions(), peft::all())},
                           [](const auto& site) { return size(site.bias_shape); }});
}

TEST_CASE("A closed model keeps its keys, and its modules' names are targets", "[reparametrized]") {
  auto original = encoder();
  const auto before = names(*original);
  peft::Reparametrized model(original);
  CHECK(names(*model) == before);
  using Paths = std::vector<std::string>;
  CHECK(peft::add_adapter(*model, LoraOptions(2), named({"linear1", "layers.1.self_attn"}), "a").sites() ==
        Paths{"layers.0.linear1", "layers.1.self_attn.in_proj", "layers.1.self_attn.out_proj",
              "layers.1.linear1"});
  CHECK(peft::add_adapter(*model, LoraOptions(2), named({"layers.0.linear2"}), "b").sites() ==
        Paths{"layers.0.linear2"});
  CHECK(peft::add_adapter(*model, peft::LayerNormTuningOptions(), named({"norm2"}), "c").sites() ==
        Paths{"layers.0.norm2", "layers.1.norm2"});
  CHECK_THAT(peft::summary(*model).text, Contains("layers.1.self_attn.in_proj"));
  auto other = net();
  CHECK(peft::add_adapter(*other, LoraOptions(2), peft::all()).sites() ==
        Paths{"gate", "words", "conv", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "twice", "mlp.0", "mlp.2",
              "cell.weight_ih", "cell.weight_hh"});
  CHECK(names(*original) == before);
}

TEST_CASE("Training a closed model reaches its adapters only", "[reparametrized]") {
  torch::manual_seed(3);
  peft::Reparametrized model(encoder(2, /*dropout=*/0.1));
  const auto base = copies(*model->base);
  const auto x = torch::randn({5, 3, 4}), y = torch::randn({5, 3, 4});
  const auto adapter = peft::add_adapter(*model, LoraOptions(4), named({"self_attn", "linear1", "linear2"}));
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05));
  const auto loss = [&] { return (model(x) - y).square().mean(); };
  model->eval();
  const auto first = loss().item<double>();
  model->train();
  for (int step = 0; step < 40; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  model->eval();
  CHECK(loss().item<double>() < 0.8 * first);
  const auto after = copies(*model->base);
  for (size_t i = 0; i < base.size(); ++i) CHECK(torch::equal(base[i], after[i]));
  CHECK(torch::equal(model->base->forward(x), [&] {
    const auto off = peft::disabled(*model);
    return model(x);
  }()));
  peft::merge(*model);
  const auto merged = model->base->forward(x);
  peft::unmerge(*model);
  CHECK(largest(merged, model(x).detach()) < 1e-5);
  model->to(torch::kFloat64);
  CHECK(largest(model(x.to(torch::kFloat64)).detach(), merged.to(torch::kFloat64)) < 1e-5);
}

TEST_CASE("A closed model's gradients are those of a model of sites", "[reparametrized]") {
  torch::manual_seed(3);
  struct Sites : nn::Module {
    Tensor forward(const Tensor& x) { return out(torch::tanh(second(first(x)))); }
    peft::Linear first = register_module("first", peft::Linear(3, 3)),
                 second = register_module("second", peft::Linear(3, 3)),
                 out = register_module("out", peft::Linear(3, 2));
  };
  auto closed = plain();
  Sites open;
  closed->to(torch::kFloat64);
  open.to(torch::kFloat64);
  {
    torch::NoGradGuard no_grad;
    const auto from = closed->parameters(), to = open.parameters();
    for (size_t i = 0; i < from.size(); ++i) to[i].copy_(from[i]);
  }
  const auto a = peft::add_adapter(*closed, LoraOptions(2), peft::all());
  const auto b = peft::add_adapter(open, LoraOptions(2), peft::all());
  shake(a);
  {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < a.parameters().size(); ++i) b.parameters()[i].copy_(a.parameters()[i]);
  }
  b.accept_changes();
  const auto x = torch::randn({4, 3}, torch::kFloat64);
  closed->forward(x).square().sum().backward();
  open.forward(x).square().sum().backward();
  REQUIRE(a.parameters().size() == 6);
  for (size_t i = 0; i < 6; ++i) CHECK(largest(a.parameters()[i].grad(), b.parameters()[i].grad()) < 1e-12);
}

TEST_CASE("A weight that the forward does not read is reported", "[reparametrized]") {
  const auto x = torch::randn({4, 3});
  const auto mistake = GENERATE(1, 2, 3);
  INFO(mistake);
  auto model = plain();
  model->base->blocks[1]->as<Block>()->mistake = mistake;
  const auto adapter = peft::add_adapter(*model, LoraOptions(2), peft::all());
  const auto message = Contains("the model's result does not depend on the adapted 'blocks.1.fc'");
  CHECK_THROWS_WITH(model(x), message && Contains("may_skip") && !Contains("blocks.1.fc' (its bias)"));
  CHECK_THROWS_WITH(model->check_on_path(x), message && Contains("check_on_path"));
  // Without gradients a forward tells nothing; in evaluation it may be of anything.
  {
    torch::NoGradGuard no_grad;
    CHECK_NOTHROW(model(x));
  }
  model->eval();
  CHECK_NOTHROW(model(x));
  CHECK_THROWS_WITH(model->check_on_path(x), message);
  model->train();
  // Where it is meant.
  model->may_skip({"blocks"});
  CHECK_NOTHROW(model(x));
  CHECK_THROWS_WITH(model->check_on_path(x), message);
  model->base->blocks[1]->as<Block>()->mistake = 0;
  CHECK_NOTHROW(model->check_on_path(x));
}

TEST_CASE("A bias that the forward does not read is reported", "[reparametrized]") {
  auto model = plain();
  model->base->blocks[1]->as<Block>()->mistake = 4;
  peft::add_adapter(*model, peft::ReplaceOptions(), peft::all());
  CHECK_THROWS_WITH(model(torch::randn({4, 3})), Contains("'blocks.1.fc' (its bias)") &&
                                                     !Contains("blocks.0.fc") && !Contains("2 problems"));
}

TEST_CASE("check_on_path needs no training and draws nothing", "[reparametrized]") {
  peft::Reparametrized model(encoder(2, /*dropout=*/0.5));
  const auto x = torch::randn({5, 3, 4});
  CHECK_THROWS_WITH(model->check_on_path(x), Contains("no active adapter changes a weight"));
  const auto adapter = peft::add_adapter(*model, LoraOptions(2), peft::all());
  for (auto& parameter : adapter.parameters()) parameter.set_requires_grad(false);
  torch::manual_seed(4);
  const auto expected = torch::rand(1);
  torch::manual_seed(4);
  torch::NoGradGuard no_grad;
  CHECK_NOTHROW(model->check_on_path(x));
  CHECK(torch::equal(torch::rand(1), expected));
  for (const auto& parameter : model->parameters()) CHECK_FALSE(parameter.grad().defined());
}

TEST_CASE("A forward that throws leaves the model as it was", "[reparametrized]") {
  auto model = plain();
  const auto x = torch::randn({4, 3});
  const auto weight = model->base->out->weight;
  const auto y = model->base->forward(x).detach();
  shake(peft::add_adapter(*model, LoraOptions(2), peft::all()));
  const auto adapted = model(x).detach();
  CHECK_THROWS_WITH(model(x, true), Contains("the model fails"));
  CHECK(model->base->out->weight.is_same(weight));
  CHECK(torch::equal(model->base->forward(x).detach(), y));
  CHECK(torch::equal(model(x).detach(), adapted));
}

TEST_CASE("A method of a closed model other than its forward runs on the effective weights",
          "[reparametrized]") {
  auto model = net();
  const auto ids = torch::tensor({{0, 3, 4}, {2, 2, 6}});
  const auto encode = [&](NetImpl& inner) { return inner.encode(ids); };
  const auto y = model->run(encode).detach();
  CHECK(torch::equal(y, model->base->encode(ids).detach()));
  shake(peft::add_adapter(*model, LoraOptions(2), named({"words"})));
  CHECK(largest(model->run(encode).detach(), y) > 1e-3);
  Tensor inside;
  model->run([&](NetImpl&) { inside = model->run(encode); });  // the same weights, no second lock
  CHECK(torch::equal(inside.detach(), model->run(encode).detach()));
}

TEST_CASE("Tensors that adapters cannot reach are refused by name", "[reparametrized]") {
  auto model = net(/*with_gate=*/false);
  CHECK_THROWS_WITH(peft::add_adapter(*model, LoraOptions(2), named({"gate"})),
                    Contains("'gate' cannot take 'lora'") &&
                        Contains("in a member that only its class knows") &&
                        Contains("member(\"gate\", &Class::gate)"));
  const auto paths = peft::add_adapter(*model, LoraOptions(2), peft::all()).sites();
  CHECK(std::find(paths.begin(), paths.end(), "gate") == paths.end());

  auto tied = std::make_shared<Plain>();
  tied->out->weight = tied->blocks[0]->as<Block>()->fc->weight;
  peft::Reparametrized other(tied);
  CHECK_THROWS_WITH(
      peft::add_adapter(*other, LoraOptions(2), named({"out"})),
      Contains("'out' cannot take 'lora'") && Contains("'weight' that holds another than it registers"));

  auto whole = net();
  CHECK_THROWS_WITH(peft::add_adapter(*whole, peft::BottleneckOptions(), named({"mlp.0"})),
                    Contains("does not offer"));
  CHECK_THROWS_WITH(peft::add_adapter(*whole, peft::AdaLoraOptions(100), named({"mlp.0"})),
                    Contains("watches the layer's forward"));
  CHECK_THROWS_WITH(peft::add_adapter(*whole, LoraOptions(2), named({"mpl.0"})),
                    Contains("closest: 'mlp.0'"));
  CHECK_THROWS_WITH(peft::add_adapter(*whole, LoraOptions(2).dropout(0.1), named({"weight_hh_l0"})),
                    Contains("takes no dropout"));
}

TEST_CASE("A closed model takes one adapter for a whole batch", "[reparametrized]") {
  auto model = plain();
  model->eval();
  shake(peft::add_adapter(*model, LoraOptions(2), peft::all(), "a"));
  const auto x = torch::randn({2, 3});
  const peft::RowAdapters rows({"a", "__base__"});
  CHECK_THROWS_WITH(model(x), Contains("one weight for the whole batch"));
}

TEST_CASE("Several adapters of a closed model add up, switch and come off", "[reparametrized]") {
  auto model = plain();
  const auto x = torch::randn({4, 3});
  const auto y = model(x).detach();
  shake(peft::add_adapter(*model, LoraOptions(2), named({"fc"}), "a"));
  shake(peft::add_adapter(*model, LoraOptions(3), named({"fc", "out"}), "b"));
  const auto both = model(x).detach();
  peft::set_active(*model, {"a"});
  const auto a = model(x).detach();
  CHECK(largest(both, a) > 1e-3);
  peft::set_active(*model, {"a", "b"});
  CHECK(torch::equal(model(x).detach(), both));
  peft::remove_adapter(*model, "b");
  CHECK(torch::equal(model(x).detach(), a));
  peft::remove_adapter(*model, "a");
  CHECK(torch::equal(model(x).detach(), y));
  CHECK(names(*model) == names(*model->base));
}

TEST_CASE("Checkpoints of a closed model are the plain model's", "[reparametrized]") {
  const auto ids = torch::tensor({{0, 3, 4}, {2, 2, 6}});
  Net original;
  auto model = net();
  through_archive(*original, *model);
  CHECK(torch::equal(model(ids).detach(), original(ids).detach()));
  shake(peft::add_adapter(*model, LoraOptions(2), peft::all()));
  const auto adapted = model(ids).detach();
  Net copy;
  through_archive(*model, *copy);
  CHECK(torch::equal(copy(ids).detach(), original(ids).detach()));
  through_archive(*original, *model);
  CHECK(torch::equal(model(ids).detach(), adapted));
  peft::merge(*model);
  CHECK_THROWS_WITH(through_archive(*original, *model), Contains("unmerge first"));
}

TEST_CASE("An adapter of a closed model is saved and loaded", "[reparametrized][files]") {
  const TemporaryFolder folder;
  const auto ids = torch::tensor({{0, 3, 4}, {2, 2, 6}});
  auto model = net();
  const auto adapter = peft::add_adapter(*model, LoraOptions(2).alpha(4), named({"words", "mlp.0", "twice"}));
  peft::train_also(adapter, *model, named({"norm"}));
  shake(adapter);
  CHECK(peft::save_adapter(adapter, folder.path()).empty());
  auto again = net();
  peft::load_adapter(*again, folder.path());
  CHECK(largest(again(ids).detach(), model(ids).detach()) < 1e-6);
  auto without = plain();
  CHECK_THROWS_WITH(peft::load_adapter(*without, folder.path()), Contains("matches no module"));
}

TEST_CASE("Copies of a closed model", "[reparametrized]") {
  auto model = net();
  const auto ids = torch::tensor({{0, 3, 4}, {2, 2, 6}});
  model->base->lstm->eval();
  shake(peft::add_adapter(*model, LoraOptions(2), peft::all()));
  const auto y = model(ids).detach();
  torch::manual_seed(4);
  const auto expected = torch::rand(1);
  torch::manual_seed(4);
  const auto copy = peft::clone(*model);
  CHECK(torch::equal(torch::rand(1), expected));
  CHECK(torch::equal(copy->forward(ids).detach(), y));
  CHECK_FALSE(copy->base->lstm->is_training());
  CHECK(copy->base->conv->is_training());
  shake(peft::adapter(*copy, "default"));
  CHECK(largest(copy->forward(ids).detach(), y) > 1e-3);
  CHECK(torch::equal(model(ids).detach(), y));

  auto closed = plain();
  CHECK_THROWS_WITH(closed->clone(), Contains("clone() has not been implemented"));

  // Within a model of one's own.
  struct Outer : nn::Cloneable<Outer> {
    Outer() { reset(); }
    void reset() override { inner = register_module("inner", net()); }
    peft::Reparametrized<Net> inner{nullptr};
  };
  const auto outer = std::make_shared<Outer>();
  shake(peft::add_adapter(*outer, LoraOptions(2), named({"inner.twice"})));
  const auto twin = peft::clone(*outer);
  CHECK(torch::equal(twin->inner(ids).detach(), outer->inner(ids).detach()));
}

TEST_CASE("Sites inside a closed model stay what they are", "[reparametrized]") {
  struct Mixed : nn::Module {
    Tensor forward(const Tensor& x) { return std::get<0>(attention(fc(x), fc(x), own(x))); }
    nn::Linear fc = register_module("fc", nn::Linear(4, 4));
    peft::Linear own = register_module("own", peft::Linear(4, 4));
    peft::MultiheadAttention attention = register_module("attention", peft::MultiheadAttention(4, 2));
  };
  torch::manual_seed(2);
  peft::Reparametrized model(std::make_shared<Mixed>());
  const auto x = torch::randn({3, 2, 4});
  const auto y = model(x).detach();
  const auto adapter = peft::add_adapter(*model, LoraOptions(2), peft::all());
  CHECK(adapter.sites() == std::vector<std::string>{"fc", "own", "attention.in_proj", "attention.out_proj"});
  shake(adapter);
  CHECK(largest(model(x).detach(), y) > 1e-3);
  model(x).sum().backward();
  for (const auto& parameter : adapter.parameters()) CHECK(parameter.grad().defined());
}

TEST_CASE("Threads may run a closed model while another switches its adapters", "[reparametrized]") {
  auto model = plain();
  model->eval();
  shake(peft::add_adapter(*model, LoraOptions(2), peft::all()));
  const auto x = torch::randn({4, 3});
  const auto adapted = model(x).detach();
  const auto base = model->base->forward(x).detach();
  std::atomic<int> wrong{0};
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      torch::NoGradGuard no_grad;
      while (!done) {
        const auto y = model(x);
        if (!torch::equal(y, adapted) && !torch::equal(y, base)) ++wrong;
      }
    });
  }
  for (int i = 0; i < 200; ++i) {
    peft::set_active(*model, i % 2 ? std::vector<std::string>{"default"} : std::vector<std::string>{});
  }
  done = true;
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("A closed model may go back within what it runs, and give a number", "[reparametrized]") {
  peft::Reparametrized model(encoder(2));
  const auto adapter = peft::add_adapter(*model, LoraOptions(2), named({"linear1", "linear2"}));
  model->train();
  const auto x = torch::randn({5, 3, 4});
  const auto loss = [&x](auto& inner) { return inner.forward(x).square().mean(); };
  const auto before = model->run([&](auto& inner) { return loss(inner).template item<double>(); });
  model->run([&](auto& inner) { loss(inner).backward(); });
  for (const auto& piece : adapter.layers<peft::LoraImpl>()) CHECK(piece->lora_B.grad().defined());
  const auto after = model->run([&](auto& inner) {
    auto value = loss(inner);
    value.backward();
    return value.template item<double>();
  });
  CHECK(after == before);
}
