#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <limits>

#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::LoraOptions;
using peft::named;
using Paths = std::vector<std::string>;

namespace {

struct BlockImpl : nn::Cloneable<BlockImpl> {
  BlockImpl() { BlockImpl::reset(); }
  void reset() override {
    query = register_module("query", peft::Linear(6, 6));
    value = register_module("value", peft::Linear(6, 6));
    dense = register_module("dense", nn::Linear(6, 6));
    norm = register_module("norm", peft::LayerNorm(nn::LayerNormOptions({6})));
  }
  Tensor forward(const Tensor& x) {
    return norm->forward(x + dense->forward(torch::tanh(query->forward(x) * value->forward(x))));
  }
  peft::Linear query{nullptr}, value{nullptr};
  nn::Linear dense{nullptr};
  peft::LayerNorm norm{nullptr};
};
TORCH_MODULE(Block);

struct EncoderImpl : nn::Cloneable<EncoderImpl> {
  EncoderImpl() { EncoderImpl::reset(); }
  void reset() override { layer = register_module("layer", nn::ModuleList(Block(), Block(), Block())); }
  Tensor forward(Tensor x) {
    for (size_t i = 0; i < layer->size(); ++i) x = layer->at<BlockImpl>(i).forward(x);
    return x;
  }
  nn::ModuleList layer{nullptr};
};
TORCH_MODULE(Encoder);

/// 54 + 3 · (42 + 42 + 42 + 12) + 21 + 1 = 490 weights.
struct NetImpl : nn::Cloneable<NetImpl> {
  NetImpl() { NetImpl::reset(); }
  void reset() override {
    embed = register_module("embed", peft::Embedding(9, 6));
    encoder = register_module("encoder", Encoder());
    classifier = register_module("classifier", peft::Linear(6, 3));
    temperature = register_parameter("temperature", torch::ones({1}));
  }
  Tensor forward(const Tensor& ids) {
    return classifier->forward(encoder->forward(embed->forward(ids)).mean(1)) * temperature;
  }
  peft::Embedding embed{nullptr};
  Encoder encoder{nullptr};
  peft::Linear classifier{nullptr};
  Tensor temperature;
};
TORCH_MODULE(Net);

/// A Sequential inside a typed parent.
struct InnerImpl : nn::Cloneable<InnerImpl> {
  InnerImpl() { InnerImpl::reset(); }
  void reset() override { body = register_module("body", nn::Sequential(nn::Linear(8, 8), nn::Tanh())); }
  Tensor forward(const Tensor& x) { return body->forward(x); }
  nn::Sequential body{nullptr};
};
TORCH_MODULE(Inner);

Net make_net() {
  torch::manual_seed(11);
  return Net();
}

Tensor ids() { return torch::tensor({{0, 3, 8}, {1, 1, 5}}); }
Tensor run(Net& net) { return net->forward(ids()).detach(); }

Paths query_paths() { return {"encoder.layer.0.query", "encoder.layer.1.query", "encoder.layer.2.query"}; }

/// A method on activations, which the library has none of yet: F(x) + shift.
struct ShiftOptions {
  static constexpr peft::Needs needs = peft::Needs::function;
  static constexpr const char* method = "shift";
};
class ShiftImpl : public peft::Piece<ShiftImpl, ShiftOptions> {
 public:
  ShiftImpl(ShiftOptions settings, const peft::SiteInfo& site) : Piece(ShiftOptions::method, settings, site) {
    shift = register_parameter("shift", torch::empty({1}));
  }
  Tensor forward(const Tensor& x, const peft::LayerView& layer) override { return layer.forward(x) + shift; }
  peft::Weights effective(const peft::Weights&, const peft::LayerView&) const override {
    TORCH_CHECK(false, not_mergeable());
  }
  std::string not_mergeable() const override { return "shift works on activations and cannot be merged"; }
  bool works_on_activations() const override { return true; }
  void initialize(const peft::LayerView&) override { nn::init::constant_(shift, 0.5); }
  Changed changed() const override { return {}; }
  Tensor shift;
};
std::string refusal(const ShiftOptions&, const peft::SiteInfo&) { return {}; }
std::shared_ptr<peft::PieceImpl> make_piece(const ShiftOptions& options, const peft::SiteInfo& site) {
  return std::make_shared<ShiftImpl>(options, site);
}

/// Everything a failed call must leave alone.
struct State {
  Paths tree;
  std::vector<Tensor> values;
  Paths active;
  Tensor generator;
};

State state_of(nn::Module& model) {
  State state;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    std::ostringstream line;
    line << item.key() << " " << item.value().get() << " " << item.value()->is_training();
    state.tree.push_back(line.str());
  }
  for (const auto& item : model.named_parameters()) {
    std::ostringstream line;
    line << item.key() << " " << item.value().unsafeGetTensorImpl() << " " << item.value().data_ptr() << " "
         << item.value().requires_grad();
    state.tree.push_back(line.str());
    state.values.push_back(item.value().detach().clone());
  }
  state.active = peft::active_adapters(model);
  state.generator = at::detail::getDefaultCPUGenerator().get_state();
  return state;
}

void check_same(const State& before, const State& after) {
  CHECK(before.tree == after.tree);
  CHECK(before.active == after.active);
  CHECK(torch::equal(before.generator, after.generator));
  REQUIRE(before.values.size() == after.values.size());
  for (size_t i = 0; i < before.values.size(); ++i) CHECK(torch::equal(before.values[i], after.values[i]));
}

/// The call throws an error that holds every one of `texts`, and the model is what it was.
template <class Call>
void check_refused(nn::Module& model, const Call& call, const Paths& texts) {
  const auto before = state_of(model);
  std::string what;
  try {
    call();
  } catch (const c10::ValueError& error) {
    what = error.what_without_backtrace();
  }
  REQUIRE_FALSE(what.empty());
  for (const auto& text : texts) CHECK_THAT(what, Contains(text));
  check_same(before, state_of(model));
}

Paths sites(const peft::Target& target) {
  auto net = make_net();
  return peft::add_adapter(*net, LoraOptions(2), target).sites();
}

}  // namespace

TEST_CASE("A named target matches whole paths and last segments, with a dot before them", "[targets]") {
  CHECK(sites(named({"query"})) == query_paths());
  CHECK(sites(named({"value", "embed"})) ==
        Paths{"embed", "encoder.layer.0.value", "encoder.layer.1.value", "encoder.layer.2.value"});
  CHECK(sites(named({"encoder.layer.1.query"})) == Paths{"encoder.layer.1.query"});
  CHECK(sites(named({"1.query", "classifier"})) == Paths{"encoder.layer.1.query", "classifier"});
  CHECK(sites(named({"1.query", "query"})) == query_paths());
  auto net = make_net();
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), named({"uery"})); },
                {"add_adapter: no module matches target 'uery'; closest: 'query'"});
  CHECK_THROWS_WITH(named({}), Contains("at least one name"));
}

TEST_CASE("An expression must match the whole path", "[targets]") {
  CHECK(sites(peft::matching(R"(encoder\.layer\.[02]\.(query|value))")) ==
        Paths{"encoder.layer.0.query", "encoder.layer.0.value", "encoder.layer.2.query",
              "encoder.layer.2.value"});
  auto net = make_net();
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), peft::matching("query")); },
                {"no module's path matches the expression 'query'"});
  CHECK_THROWS_WITH(peft::matching("("), Contains("'(' is no regular expression"));
}

TEST_CASE("A predicate sees what a site is; all() takes every site that can have the method", "[targets]") {
  CHECK(sites(peft::where([](const peft::SiteInfo& site) { return site.layer == "Embedding"; })) ==
        Paths{"embed"});
  CHECK(sites(peft::where([](const peft::SiteInfo& site) { return site.path == "classifier"; })) ==
        Paths{"classifier"});
  CHECK(sites(peft::all()).size() == 8);
  auto net = make_net();
  CHECK(peft::add_adapter(*net, peft::BiasOptions(), peft::all()).sites().size() == 10);
  check_refused(*net,
                [&] {
                  peft::add_adapter(*net, LoraOptions(2),
                                    peft::where([](const peft::SiteInfo&) { return false; }), "b");
                },
                {"the target of 'lora' matches no site that can take it"});
}

TEST_CASE("Excluded names leave out modules and all below them", "[targets]") {
  CHECK(sites(named({"query"}).exclude({"0.query"})) ==
        Paths{"encoder.layer.1.query", "encoder.layer.2.query"});
  CHECK(sites(peft::all().exclude({"encoder"})) == Paths{"embed", "classifier"});
  CHECK(sites(named({"encoder"}).exclude({"layer.1", "value"})) ==
        Paths{"encoder.layer.0.query", "encoder.layer.2.query"});
  CHECK(sites(named({"query"}).exclude({"uery", "layer.10"})) == query_paths());
  auto net = make_net();
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), named({"query"}).exclude({"layer"})); },
                {"all that the target of 'lora' matches is excluded"});
  check_refused(
      *net, [&] { peft::add_adapter(*net, LoraOptions(2), peft::matching(".*query").exclude({"layer"})); },
      {"is excluded"});
}

TEST_CASE("Layers are the reference's: the first number after a dotted name, or after a pattern",
          "[targets]") {
  CHECK(sites(named({"query"}).layers({0, 2})) == Paths{"encoder.layer.0.query", "encoder.layer.2.query"});
  CHECK(sites(named({"query", "classifier"}).layers({1})) == Paths{"encoder.layer.1.query", "classifier"});
  CHECK(sites(named({"query"}).layers({1}, {"blocks", "layer"})) == Paths{"encoder.layer.1.query"});
  CHECK(sites(named({"encoder.layer.0.query"}).layers({2})) == Paths{"encoder.layer.0.query"});
  auto net = make_net();
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), named({"query"}).layers({7})); },
                {"target 'query' is in none of the layers asked for"});
  check_refused(*net,
                [&] {
                  peft::add_adapter(*net, LoraOptions(2), named({"query"}).layers({0, 7}));
                },
                {"the target of 'lora' asks for layer 7, but what it names is in layers 0 to 2"});
  check_refused(*net,
                [&] { peft::add_adapter(*net, LoraOptions(2), named({"query"}).layers({1}, {"blocks"})); },
                {"target 'query' is in none of the layers asked for"});
  CHECK_THROWS_WITH(peft::all().layers({1}), Contains("Target::layers: expected a target made by named"));
  CHECK_THROWS_WITH(named({"query"}).layers({0, -1}), Contains("layers must be at least 0, but got -1"));

  using peft::internal::layer_index;
  CHECK(layer_index("h.1.q", {}) == -1);
  CHECK(layer_index("model.h.1.q", {}) == 1);
  CHECK(layer_index("model.h.12.mlp.3.q", {}) == 12);
  CHECK(layer_index("model.h.1", {}) == -1);
  CHECK(layer_index("h.1.q", {"h"}) == 1);
  CHECK(layer_index("model.h.4.q", {"layer", "h"}) == 4);
  CHECK(layer_index("model.oh.4.q", {"h"}) == -1);
  CHECK(layer_index("model.a.1.h.4.q", {"h"}) == 4);
}

TEST_CASE("A container means the sites below it that can take the method", "[targets]") {
  CHECK(sites(named({"layer.1"})) == Paths{"encoder.layer.1.query", "encoder.layer.1.value"});
  CHECK(sites(named({"encoder"})).size() == 6);
  auto net = make_net();
  CHECK(peft::add_adapter(*net, peft::BiasOptions(), named({"layer.1"})).sites() ==
        Paths{"encoder.layer.1.query", "encoder.layer.1.value", "encoder.layer.1.norm"});
}

TEST_CASE("A layer that matches but cannot be adapted is named", "[targets]") {
  auto net = make_net();
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), named({"dense"})); },
                {"3 problems", "'encoder.layer.0.dense' matches but is a plain torch::nn::Linear",
                 "'encoder.layer.2.dense'", "declare it as peft::Linear"});
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), named({"norm"})); },
                {"'encoder.layer.1.norm' cannot take 'lora': a LayerNorm has no low-rank form"});
  check_refused(*net, [&] { peft::add_adapter(*net, peft::BiasOptions(), named({"embed"})); },
                {"'embed' cannot take 'bias': a Embedding without a bias"});
  nn::Linear lone(3, 3);
  CHECK_THROWS_WITH(peft::add_adapter(*lone, LoraOptions(2), peft::all()),
                    Contains("this model has no sites at all"));
}

TEST_CASE("All problems come at once and nothing has changed", "[add_adapter]") {
  auto net = make_net();
  peft::add_adapter(*net, LoraOptions(2), named({"query"}), "first");
  net->temperature.set_requires_grad(true);
  check_refused(
      *net,
      [&] {
        peft::add_adapter(*net,
                          {peft::on(LoraOptions(2), named({"query", "kez", "norm", "dense"})),
                           peft::on(peft::BiasOptions(), named({"embed"}))},
                          "a.b");
      },
      {"add_adapter: 9 problems: ", "no module matches target 'kez'",
       "hold a dot or be '__base__' or '__probe__'", "'a.b'", "'encoder.layer.2.norm' cannot take 'lora'",
       "'encoder.layer.0.dense' matches but", "'embed' cannot take 'bias'"});
  const auto add = [&](const std::string& name) {
    peft::add_adapter(*net, LoraOptions(2), named({"query"}), name);
  };
  check_refused(*net, [&] { add("first"); }, {"the model already has an adapter 'first'"});
  check_refused(*net, [&] { add(""); }, {"must not be empty"});
  check_refused(*net, [&] { add("__base__"); }, {"'__base__'"});
  check_refused(*net, [&] { add("weight"); },
                {"adapter name 'weight' is the name of a child of 'encoder.layer.0.query'"});
  check_refused(*net, [&] { peft::add_adapter(*net, std::vector<peft::Part>{}, "x"); },
                {"at least one part"});
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(0), named({"query"}), "x"); },
                {"rank must be positive"});
  check_refused(
      *net,
      [&] {
        peft::add_adapter(
            *net, {peft::on(LoraOptions(2), named({"query"})), peft::on(LoraOptions(4), named({"1.query"}))},
            "x");
      },
      {"'encoder.layer.1.query' would carry 'lora' twice in adapter 'x'"});
  CHECK_THROWS_WITH(peft::set_active(*make_net(), {"x"}), Contains("the model has no adapter 'x'"));
}

TEST_CASE("At most twenty problems are listed, and how many more there are", "[add_adapter]") {
  auto net = make_net();
  Paths names;
  for (int i = 0; i < 30; ++i) names.push_back("unknown" + std::to_string(i));
  try {
    peft::add_adapter(*net, LoraOptions(2), named(names));
    FAIL("expected an error");
  } catch (const c10::ValueError& error) {
    const std::string what = error.what_without_backtrace();
    CHECK_THAT(what, Contains("30 problems") && Contains("'unknown19'") && Contains("and 10 more"));
    CHECK_THAT(what, !Contains("'unknown20'"));
  }
}

TEST_CASE("Several parts make one adapter, frozen around it", "[add_adapter]") {
  auto net = make_net();
  const auto plain = run(net);
  auto adapter = peft::add_adapter(
      *net,
      {peft::on(peft::BiasOptions(), named({"norm", "1.query"})), peft::on(LoraOptions(2), named({"query"}))},
      "mixed");
  CHECK(adapter.name() == "mixed");
  CHECK(adapter.count() == 4 * 6 + 3 * 24);
  CHECK(adapter.sites() == Paths{"encoder.layer.0.query", "encoder.layer.0.norm", "encoder.layer.1.query",
                                 "encoder.layer.1.norm", "encoder.layer.2.query", "encoder.layer.2.norm"});
  CHECK(torch::equal(run(net), plain));
  CHECK_FALSE(net->temperature.requires_grad());
  for (const auto& item : net->named_parameters()) {
    INFO(item.key());
    CHECK(item.value().requires_grad() == (item.key().find(".mixed.") != std::string::npos));
  }
  CHECK(net->named_parameters().contains("encoder.layer.1.query.mixed.bias.bias"));
  CHECK(net->named_parameters().contains("encoder.layer.1.query.mixed.lora.lora_A"));
}

TEST_CASE("train_also adds own copies of layers to an adapter that has no optimizer yet", "[add_adapter]") {
  auto net = make_net();
  const auto plain = run(net);
  auto adapter = peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one");
  peft::train_also(adapter, *net, named({"classifier", "embed"}));
  CHECK(torch::equal(run(net), plain));
  CHECK(adapter.count() == 3 * 24 + 21 + 54);
  CHECK(adapter.sites() == Paths{"embed", "encoder.layer.0.query", "encoder.layer.1.query",
                                 "encoder.layer.2.query", "classifier"});
  const auto again = peft::adapter(*net, "one");
  REQUIRE(again.named_parameters().size() == adapter.named_parameters().size());
  for (size_t i = 0; i < again.named_parameters().size(); ++i) {
    CHECK(again.named_parameters()[i].first == adapter.named_parameters()[i].first);
    CHECK(again.named_parameters()[i].second.is_same(adapter.named_parameters()[i].second));
  }
  CHECK(adapter.layers<peft::ReplaceImpl>().size() == 2);
  CHECK(adapter.layers<peft::LoraImpl>().size() == 3);

  shake(adapter);
  CHECK(largest(run(net), plain) > 1e-3);
  {
    const auto off = peft::disabled(*net);
    CHECK(torch::equal(run(net), plain));
  }
  check_refused(*net, [&] { peft::train_also(adapter, *net, named({"classifier"})); },
                {"'classifier' would carry 'replace' twice in adapter 'one'"});
  check_refused(*net, [&] { peft::train_also(adapter, *net, named({"clasifier"})); },
                {"closest: 'classifier'"});
  const auto before = state_of(*net);
  adapter.record().has_optimizer = true;
  CHECK_THROWS_WITH(peft::train_also(adapter, *net, named({"2.value"})),
                    Contains("train_also: adapter 'one' already has an optimizer"));
  check_same(before, state_of(*net));
  auto copy = peft::clone(*net);
  CHECK_FALSE(peft::adapter(*copy, "one").record().has_optimizer);
}

TEST_CASE("Plain layers of a Sequential become sites where they get a piece, and only there",
          "[add_adapter]") {
  torch::manual_seed(3);
  nn::Sequential sequential(
      {{"first", nn::Linear(4, 8)}, {"between", nn::ReLU()}, {"inner", Inner()}, {"last", nn::Linear(8, 2)}});
  const auto x = torch::randn({3, 4});
  const auto plain = sequential->forward(x).detach();
  const auto keys = sequential->named_parameters().keys();
  const auto last = sequential->named_children()["last"];

  SECTION("one by its name") {
    auto adapter = peft::add_adapter(*sequential, LoraOptions(2), named({"first"}), "one");
    CHECK(adapter.sites() == Paths{"first"});
    CHECK(sequential->named_children()["first"]->as<peft::Linear>() != nullptr);
    CHECK(sequential->named_children()["last"] == last);
    CHECK(sequential->named_children().keys() == Paths{"first", "between", "inner", "last"});
    CHECK(torch::equal(sequential->forward(x), plain));
    shake(adapter);
    CHECK(largest(sequential->forward(x).detach(), plain) > 1e-3);
    for (const auto& item : sequential->named_parameters()) {
      CHECK(item.value().requires_grad() == (item.key().rfind("first.one.", 0) == 0));
    }
    peft::remove_adapter(*sequential, "one");
    CHECK(torch::equal(sequential->forward(x), plain));
    CHECK(sequential->named_parameters().keys() == keys);
  }
  SECTION("all, in a nested one too, and again") {
    auto adapter = peft::add_adapter(*sequential, LoraOptions(2), peft::all(), "one");
    CHECK(adapter.sites() == Paths{"first", "inner.body.0", "last"});
    auto second = peft::add_adapter(*sequential, LoraOptions(3), named({"last"}), "two");
    shake(adapter);
    shake(second);
    const auto both = sequential->forward(x).detach();
    peft::merge(*sequential);
    CHECK(largest(sequential->forward(x).detach(), both) < 1e-5);
    peft::unmerge(*sequential);
    CHECK(torch::equal(sequential->forward(x).detach(), both));
  }
  SECTION("a Sequential named as a container") {
    CHECK(peft::add_adapter(*sequential, LoraOptions(2), named({"body"})).sites() == Paths{"inner.body.0"});
    CHECK(sequential->named_children()["first"]->as<nn::Linear>() != nullptr);
  }
  SECTION("what is no layer of ours") {
    CHECK_THROWS_WITH(peft::add_adapter(*sequential, LoraOptions(2), named({"between"})),
                      Contains("'between' matches but is a plain torch::nn::ReLU"));
    CHECK(sequential->named_children()["first"]->as<nn::Linear>() != nullptr);
  }
  SECTION("copies, whose modules LibTorch numbers") {
    auto adapter = peft::add_adapter(*sequential, LoraOptions(2), named({"first"}), "one");
    shake(adapter);
    auto copy = peft::clone(*sequential);
    CHECK(torch::equal(copy->forward(x), sequential->forward(x)));
    CHECK(peft::adapter(*copy, "one").count() == adapter.count());
    int64_t trainable = 0;
    for (const auto& parameter : copy->parameters()) {
      if (parameter.requires_grad()) trainable += parameter.numel();
    }
    CHECK(trainable == adapter.count());
  }
}

TEST_CASE("Adapters are activated, ordered, switched off and on by name", "[active]") {
  auto net = make_net();
  const auto plain = run(net);
  auto one = peft::add_adapter(*net, LoraOptions(2), named({"query", "classifier"}), "one");
  shake(one);
  const auto with_one = run(net);
  auto two = peft::add_adapter(*net, peft::ReplaceOptions(), named({"value", "classifier"}), "two");
  shake(two);
  const auto with_both = run(net);
  CHECK(peft::active_adapters(*net) == Paths{"one", "two"});

  peft::set_active(*net, {"one"});
  CHECK(torch::equal(run(net), with_one));
  peft::set_active(*net, {"two", "one"});
  CHECK(largest(run(net), with_both) > 1e-4);  // Replace under LoRA, not over it
  peft::set_active(*net, {"one", "two"});
  CHECK(torch::equal(run(net), with_both));
  peft::set_active(*net, {});
  CHECK(torch::equal(run(net), plain));
  for (const auto& tensor : one.named_tensors()) CHECK(tensor.second.requires_grad());

  peft::set_active(*net, {"one", "two"});
  peft::disable(*net);
  CHECK(torch::equal(run(net), plain));
  {
    const auto off = peft::disabled(*net);
    CHECK(torch::equal(run(net), plain));
  }
  CHECK(torch::equal(run(net), plain));  // still off
  peft::enable(*net);
  CHECK(torch::equal(run(net), with_both));
  {
    const auto outer = peft::disabled(*net);
    const auto inner = peft::disabled(*net);
    CHECK(torch::equal(run(net), plain));
  }
  CHECK(torch::equal(run(net), with_both));

  check_refused(*net,
                [&] {
                  peft::set_active(*net, {"one", "thre", "one", "four"});
                },
                {"set_active: 3 problems", "no adapter 'thre'; it has 'one', 'two'", "'one' is named twice",
                 "no adapter 'four'"});
  check_refused(*net, [&] { peft::adapter(*net, "three"); }, {"adapter: the model has no adapter 'three'"});
}

TEST_CASE("Renaming moves keys, activation and handles", "[active]") {
  auto net = make_net();
  auto one = peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one");
  auto two = peft::add_adapter(*net, LoraOptions(2), named({"value"}), "two");
  shake(one);
  shake(two);
  const auto before = run(net);
  peft::rename(*net, "one", "first");
  CHECK(one.name() == "first");
  CHECK(peft::active_adapters(*net) == Paths{"first", "two"});
  CHECK(net->named_parameters().contains("encoder.layer.0.query.first.lora.lora_A"));
  CHECK_FALSE(net->named_parameters().contains("encoder.layer.0.query.one.lora.lora_A"));
  CHECK(torch::equal(run(net), before));
  CHECK(one.effective_delta("encoder.layer.0.query").abs().max().item<float>() > 0);
  CHECK(peft::adapter(*net, "first").count() == one.count());

  check_refused(*net, [&] { peft::rename(*net, "one", "x"); }, {"rename: the model has no adapter 'one'"});
  check_refused(*net, [&] { peft::rename(*net, "first", "two"); }, {"already has an adapter 'two'"});
  check_refused(*net, [&] { peft::rename(*net, "first", "a.b"); }, {"hold a dot"});
  check_refused(*net, [&] { peft::rename(*net, "first", ""); }, {"must not be empty"});
  check_refused(*net, [&] { peft::rename(*net, "first", "bias"); },
                {"'bias' is the name of a child of 'encoder.layer.0.query'"});
}

TEST_CASE("A removed adapter leaves the others and the base alone", "[active]") {
  auto net = make_net();
  const auto plain = run(net);
  const auto keys = net->named_parameters().keys();
  shake(peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one"));
  const auto with_one = run(net);
  shake(peft::add_adapter(*net, LoraOptions(2), named({"query"}), "two"));
  peft::remove_adapter(*net, "two");
  CHECK(torch::equal(run(net), with_one));
  CHECK(peft::active_adapters(*net) == Paths{"one"});
  check_refused(*net, [&] { peft::remove_adapter(*net, "two"); },
                {"remove_adapter: the model has no adapter 'two'; it has 'one'"});
  peft::remove_adapter(*net, "one");
  CHECK(torch::equal(run(net), plain));
  CHECK(net->named_parameters().keys() == keys);
  CHECK(peft::active_adapters(*net).empty());
  CHECK_NOTHROW(peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one"));
  nn::Linear lone(3, 3);
  CHECK_THROWS_WITH(peft::set_active(*lone, {}), Contains("this model has no sites"));
}

TEST_CASE("Merging refuses what it cannot do, before anything is changed", "[merge]") {
  auto net = make_net();
  auto adapter = peft::add_adapter(*net, LoraOptions(2), named({"query", "classifier"}), "one");
  shake(adapter);
  const auto adapted = run(net);
  peft::set_active(*net, {});
  check_refused(*net, [&] { peft::merge(*net); }, {"merge: no adapter is active"});
  peft::set_active(*net, {"one"});
  peft::disable(*net);
  check_refused(*net, [&] { peft::merge(*net); }, {"merge: the adapters are disabled"});
  peft::enable(*net);
  CHECK_THROWS_WITH(peft::unmerge(*net), Contains("unmerge: the model is not merged"));

  SECTION("weights that are not finite") {
    const auto piece = adapter.layers<peft::LoraImpl>();
    {
      torch::NoGradGuard no_grad;
      piece.at(1)->lora_A[0][0] = std::nan("");
      piece.at(3)->lora_B[0][0] = std::numeric_limits<float>::infinity();
    }
    const auto before = state_of(*net);
    try {
      peft::merge(*net);
      FAIL("expected an error");
    } catch (const c10::ValueError& error) {
      CHECK_THAT(error.what_without_backtrace(),
                 Contains("merge: 2 problems") &&
                     Contains("'encoder.layer.1.query': the merged weights hold NaN or infinity") &&
                     Contains("'classifier'"));
    }
    CHECK(state_of(*net).tree == before.tree);
  }
  SECTION("the verbs while merged") {
    peft::merge(*net);
    CHECK(largest(run(net), adapted) < 1e-5);
    check_refused(*net, [&] { peft::merge(*net); }, {"is merged (hint: unmerge first)"});
    check_refused(*net, [&] { peft::set_active(*net, {"one"}); }, {"unmerge first"});
    check_refused(*net, [&] { peft::rename(*net, "one", "x"); }, {"unmerge first"});
    check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), named({"query"}), "x"); },
                  {"'classifier' is merged (hint: unmerge first)"});
    check_refused(*net, [&] { peft::train_also(adapter, *net, named({"value"})); }, {"unmerge first"});
    CHECK_THROWS_WITH(peft::disable(*net), Contains("unmerge first"));
    CHECK_THROWS_WITH(peft::disabled(*net), Contains("unmerge first"));
    CHECK_THROWS_WITH(peft::remove_adapter(*net, "one"), Contains("unmerge first"));
    CHECK(largest(run(net), adapted) < 1e-5);
    peft::unmerge(*net);
    CHECK(torch::equal(run(net), adapted));
  }
  SECTION("originals that were not kept") {
    peft::merge(*net, /*keep=*/false);
    CHECK(largest(run(net), adapted) < 1e-5);
    CHECK_THROWS_WITH(peft::unmerge(*net), Contains("were not kept"));
  }
  SECTION("adapters of which one sits on no site") {
    peft::set_active(*net, {"one"});
    auto other = peft::add_adapter(*net, peft::BiasOptions(), named({"norm"}), "two");
    shake(other);
    const auto both = run(net);
    peft::merge(*net);
    CHECK(largest(run(net), both) < 1e-5);
    peft::unmerge(*net);
    CHECK(torch::equal(run(net), both));
  }
}

TEST_CASE("A weight method cannot come after one on activations", "[active]") {
  auto net = make_net();
  auto lora = peft::add_adapter(*net, LoraOptions(2), named({"query"}), "lora");
  auto shift = peft::add_adapter(*net, ShiftOptions(), named({"query"}), "shift");
  shake(lora);
  const auto adapted = run(net);
  check_refused(*net,
                [&] {
                  peft::set_active(*net, {"shift", "lora"});
                },
                {"set_active: 3 problems",
                 "'encoder.layer.0.query': 'lora' of 'lora' changes weights and "
                 "cannot come after 'shift'"});
  check_refused(*net, [&] { peft::add_adapter(*net, LoraOptions(2), named({"1.query"}), "late"); },
                {"'encoder.layer.1.query': 'lora' changes weights and cannot come after 'shift' of active "
                 "adapter 'shift'"});
  check_refused(
      *net,
      [&] {
        peft::add_adapter(
            *net, {peft::on(ShiftOptions(), named({"value"})), peft::on(LoraOptions(2), named({"value"}))},
            "both");
      },
      {"'encoder.layer.0.value': 'lora' changes weights and cannot come after 'shift'"});
  check_refused(*net, [&] { peft::merge(*net); },
                {"merge: 3 problems", "'encoder.layer.2.query': shift works on activations"});
  CHECK_THROWS_WITH(shift.scale(2.0), Contains("shift has no strength to scale"));
  CHECK_NOTHROW(shift.scale(1.0));

  // Elsewhere, or before it, the weight method is welcome.
  CHECK_NOTHROW(peft::add_adapter(*net, LoraOptions(2), named({"value"}), "elsewhere"));
  CHECK_NOTHROW(peft::add_adapter(
      *net,
      {peft::on(LoraOptions(2), named({"classifier"})), peft::on(ShiftOptions(), named({"classifier"}))},
      "ordered"));
  CHECK_NOTHROW(peft::train_also(peft::adapter(*net, "ordered"), *net, named({"classifier"})));
  CHECK_NOTHROW(peft::set_active(*net, {"lora", "shift"}));
  CHECK(torch::equal(run(net), adapted));
}

TEST_CASE("The handle tells sites and tensors, scales, and gives the change of one site", "[adapter]") {
  auto net = make_net();
  const auto plain = run(net);
  auto adapter = peft::add_adapter(*net, LoraOptions(2).alpha(4), named({"query"}), "one");
  shake(adapter);
  const auto adapted = run(net);
  CHECK(adapter.sites() == query_paths());
  CHECK(adapter.count() == 72);
  Paths names;
  for (const auto& [name, tensor] : adapter.named_parameters()) names.push_back(name);
  CHECK(names == Paths{"encoder.layer.0.query.lora.lora_A", "encoder.layer.0.query.lora.lora_B",
                       "encoder.layer.1.query.lora.lora_A", "encoder.layer.1.query.lora.lora_B",
                       "encoder.layer.2.query.lora.lora_A", "encoder.layer.2.query.lora.lora_B"});
  CHECK(adapter.parameters().size() == 6);

  const auto pieces = adapter.layers<peft::LoraImpl>();
  REQUIRE(pieces.size() == 3);
  const auto delta = adapter.effective_delta("encoder.layer.1.query");
  CHECK(largest(delta, at::mm(pieces[1]->lora_B, pieces[1]->lora_A).detach() * 2.0) < 1e-6);
  CHECK_THROWS_WITH(adapter.effective_delta("encoder.layer.1.qery"),
                    Contains("adapter 'one' has no site 'encoder.layer.1.qery'; closest: "
                             "'encoder.layer.1.query'"));

  adapter.scale(0.0);
  CHECK(largest(run(net), plain) < 1e-6);
  adapter.scale(1.0);
  CHECK(torch::equal(run(net), adapted));
  adapter.scale(0.5);
  CHECK(largest(adapter.effective_delta("encoder.layer.1.query"), delta * 0.5) < 1e-6);
  CHECK(adapter.layers<peft::BiasImpl>().empty());

  // Nothing is scaled where one piece cannot be.
  peft::train_also(adapter, *net, named({"classifier"}));
  CHECK_THROWS_WITH(adapter.scale(0.25), Contains("'classifier': replace has no strength to scale"));
  CHECK(pieces[0]->scaling() == 1.0);

  // A frozen tensor is no parameter of the handle, but still a tensor of it.
  pieces[0]->lora_A.set_requires_grad(false);
  CHECK(adapter.count() == 72 + 21 - 12);
  CHECK(adapter.named_tensors().size() == 8);
}

TEST_CASE("The summary counts what trains, what changes, and the bytes", "[summary]") {
  auto net = make_net();
  auto summary = peft::summary(*net);
  CHECK(summary.total == 490);
  CHECK(summary.trainable == 490);
  CHECK(summary.changed == 0);

  auto adapter = peft::add_adapter(*net, LoraOptions(2), named({"query"}), "topics");
  peft::train_also(adapter, *net, named({"classifier"}));
  summary = peft::summary(*net);
  CHECK(summary.total == 490);
  CHECK(summary.trainable == 93);
  CHECK(summary.changed == 3 * 36 + 21);
  CHECK(summary.percent() == Approx(100.0 * 93 / 490));
  CHECK(summary.adapter_bytes == 4 * 93);
  CHECK(summary.gradient_bytes == 4 * 93);
  CHECK(summary.optimizer_bytes == 8 * 93);
  CHECK_THAT(summary.text, Contains("trainable 93 (18.980 %) · changed 129 (26.33 %) · base 490\n") &&
                               Contains("adapters 372 B · gradients 372 B · optimizer 744 B (AdamW)") &&
                               Contains("encoder.layer.0.query") && Contains("replace") &&
                               Contains("topics"));

  // A bias beside a weight is counted; the same weight twice is not.
  auto second = peft::add_adapter(*net,
                                  {peft::on(LoraOptions(1).lora_bias(true), named({"query"})),
                                   peft::on(peft::BiasOptions(), named({"1.value"}))},
                                  "second");
  CHECK(peft::summary(*net).changed == 3 * (36 + 6) + 21 + 6);
  CHECK(peft::summary(*net).trainable == 93 + 3 * (12 + 6) + 6);
  peft::set_active(*net, {"second"});
  summary = peft::summary(*net);
  CHECK(summary.changed == 3 * (36 + 6) + 6);
  CHECK_THAT(summary.text, Contains("  inactive\n"));
  for (auto& tensor : second.parameters()) tensor.set_requires_grad(false);
  CHECK_THAT(peft::summary(*net).text, Contains("  frozen\n"));

  // Rows of the enabled blocks only.
  peft::Linear stacked(6, 12);
  peft::add_adapter(*stacked, LoraOptions(2).enable({true, false, true}), peft::all());
  CHECK(peft::summary(*stacked).changed == 2 * 4 * 6);
  CHECK_THAT(peft::summary(*stacked).text, Contains("(the model)"));

  CHECK(peft::internal::count_text(1234567) == "1,234,567");
  CHECK(peft::internal::count_text(123) == "123");
  CHECK(peft::internal::bytes_text(999) == "999 B");
  CHECK(peft::internal::bytes_text(1536) == "1.5 kB");
  CHECK(peft::internal::bytes_text(90'869'000) == "90.87 MB");
}

TEST_CASE("A layer registered under two names is one site", "[targets]") {
  struct TwiceImpl : nn::Module {
    TwiceImpl() {
      first = register_module("first", peft::Linear(4, 4));
      register_module("second", first);
    }
    peft::Linear first{nullptr};
  };
  torch::manual_seed(2);
  const auto model = std::make_shared<TwiceImpl>();
  auto adapter = peft::add_adapter(*model, LoraOptions(2), peft::all());
  CHECK(adapter.sites() == Paths{"first"});
  CHECK(adapter.count() == 16);
  CHECK(peft::summary(*model).total == 20);
  CHECK(peft::summary(*model).trainable == 16);
  CHECK(model->first->path() == "first");
}

TEST_CASE("Parts of a model that were adapted apart keep their adapters and their names", "[active]") {
  struct Both : torch::nn::Module {
    Both() {
      register_module("left", left);
      register_module("right", right);
    }
    torch::Tensor forward(const torch::Tensor& x) { return right->forward(left->forward(x)); }
    torch::nn::Sequential left{torch::nn::Linear(4, 4)}, right{torch::nn::Linear(4, 4)};
  };
  const auto both = std::make_shared<Both>();
  const auto options = peft::LoraOptions(2).init(peft::LoraInit::random);
  peft::add_adapter(*both->left, options, peft::all(), "a");
  peft::add_adapter(*both->right, options, peft::all(), "b");
  const auto x = torch::randn({3, 4});
  const auto before = both->forward(x);
  peft::summary(*both);
  CHECK(torch::equal(both->forward(x), before));
  CHECK(peft::active_adapters(*both) == std::vector<std::string>{"a", "b"});

  const auto whole = peft::add_adapter(*both, options, peft::all(), "whole");
  peft::summary(*both->left);
  CHECK(whole.sites() == std::vector<std::string>{"left.0", "right.0"});
}

TEST_CASE("A handle knows whether its layers are named as in its model", "[adapter]") {
  auto net = make_net();
  const auto adapter = peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one");
  auto& part = *net->encoder;
  // A copy of a part renames nothing of the whole.
  const auto spare = peft::clone(part);
  CHECK(adapter.sites() == query_paths());
  CHECK_NOTHROW(adapter.check_names("save_adapter"));
  const Paths in_part{"layer.0.query", "layer.1.query", "layer.2.query"};
  CHECK(peft::adapter(*spare, "one").sites() == in_part);
  // A verb that adds to it or looks something up does.
  peft::add_adapter(part, LoraOptions(2), named({"value"}), "two");
  CHECK(adapter.sites() == in_part);
  CHECK_THROWS_WITH(
      adapter.check_names("save_adapter"),
      Contains("save_adapter: 'one' has a layer 'layer.0.query', which is its path in another"));
  CHECK(peft::adapter(*net, "one").sites() == query_paths());
  CHECK_NOTHROW(adapter.check_names("save_adapter"));

  peft::train_also(adapter, *net, named({"classifier"}));
  peft::add_adapter(*net, LoraOptions(2), named({"embed"}), "words");
  CHECK_THROWS_WITH(peft::adapter(part, "words"), Contains("no layer of this model carries 'words'"));
  CHECK_NOTHROW(peft::clone(part));
  // What is left of an adapter that was taken off a part comes off too.
  peft::remove_adapter(part, "one");
  CHECK_NOTHROW(peft::remove_adapter(*net, "one"));
  CHECK_NOTHROW(peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one"));
}

TEST_CASE("A copy has the frozen and the trained tensors of its source, whatever the order of its parts",
          "[adapter]") {
  auto net = make_net();
  const auto lora = peft::add_adapter(
      *net, {peft::on(LoraOptions(2), named({"query"})), peft::on(peft::BiasOptions(), named({"query"}))});
  for (const auto& piece : lora.layers<peft::LoraImpl>()) piece->lora_A.set_requires_grad(false);
  const auto copy = peft::clone(*net);
  const auto copied = peft::adapter(*copy, "default");
  for (const auto& piece : copied.layers<peft::LoraImpl>()) {
    CHECK_FALSE(piece->lora_A.requires_grad());
    CHECK(piece->lora_B.requires_grad());
  }
  for (const auto& piece : copied.layers<peft::BiasImpl>()) {
    for (const auto& tensor : piece->parameters()) CHECK(tensor.requires_grad());
  }
  CHECK(copy->named_parameters().keys() == net->named_parameters().keys());
}

TEST_CASE("Two layers of one tensor are not merged apart", "[merge]") {
  struct Tied : nn::Module {
    Tied() {
      register_module("words", words);
      register_module("head", head);
      head->base->weight = words->base->weight;
    }
    peft::Linear words{5, 5}, head{5, 5};
  };
  const auto net = std::make_shared<Tied>();
  shake(peft::add_adapter(*net, LoraOptions(2), named({"head"})));
  const auto before = net->words->base->weight.detach().clone();
  CHECK_THROWS_WITH(peft::merge(*net), Contains("'head' and 'words' are one tensor"));
  CHECK(torch::equal(net->words->base->weight, before));
}

TEST_CASE("A model merged for good becomes a plain one", "[merge]") {
  auto net = make_net();
  shake(peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one"));
  const auto adapted = run(net);
  peft::merge(*net, /*keep=*/false);
  CHECK_THROWS_WITH(peft::set_active(*net, {}), Contains("its original was not kept"));
  const auto merged = run(net);
  peft::remove_adapter(*net, "one");
  CHECK(torch::equal(run(net), merged));
  CHECK(largest(merged, adapted) < 1e-5);
  CHECK(peft::active_adapters(*net).empty());
  const auto next = peft::add_adapter(*net, LoraOptions(2), named({"query"}), "two");
  CHECK(torch::equal(run(net), merged));
  shake(next);
  CHECK_FALSE(torch::equal(run(net), merged));
}

TEST_CASE("The change of one site is asked of a model that is not merged", "[adapter]") {
  auto net = make_net();
  const auto adapter = peft::add_adapter(*net, LoraOptions(2), named({"classifier"}));
  peft::merge(*net);
  CHECK_THROWS_WITH(adapter.effective_delta("classifier"),
                    Contains("effective_delta: 'classifier' is merged (hint: unmerge first)"));
}

TEST_CASE("Further copies of layers do not switch an adapter on", "[add_adapter]") {
  auto net = make_net();
  const auto adapter = peft::add_adapter(*net, LoraOptions(2), named({"query"}), "one");
  peft::set_active(*net, {});
  peft::train_also(adapter, *net, named({"classifier"}));
  CHECK(peft::active_adapters(*net).empty());
}
