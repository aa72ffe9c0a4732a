#include <peft/methods/ia3.h>

#include "methods/reference_values.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_formats.h"
#include "peft/model/reparametrized.h"

using namespace suite;
using peft::Ia3Impl;
using peft::Ia3Options;

namespace {

/// Every site's input is scaled.
Ia3Options inputs() { return Ia3Options().feedforward_pattern(".*"); }

Promise outputs_promise() {
  return {{peft::on(Ia3Options(), peft::all())}, [](const peft::SiteInfo& site) { return site.fan_out; }};
}
Promise inputs_promise() {
  return {{peft::on(inputs(), peft::all())}, [](const peft::SiteInfo& site) { return site.fan_in.at(0); }};
}

template <class Site>
Site filled(Site site) {
  site->to(torch::kFloat64);
  assign(site->base->weight, fill(site->base->weight.sizes().vec(), 1));
  assign(site->base->bias, fill(site->base->bias.sizes().vec(), 2));
  return site;
}

std::shared_ptr<Ia3Impl> filled_ia3(nn::Module& site, const Ia3Options& options) {
  auto piece = peft::add_adapter(site, options, peft::all()).layers<Ia3Impl>().at(0);
  assign(piece->ia3_l, fill(piece->ia3_l.sizes().vec(), 3) + 1);
  return piece;
}

struct NetImpl : nn::Module {
  NetImpl() {
    conv = register_module("conv", peft::Conv2d(nn::Conv2dOptions(2, 3, 2)));
    down = register_module("down", peft::Linear(12, 2));
    to(torch::kFloat64);
    int64_t index = 0;
    for (const auto& parameter : parameters()) assign(parameter, fill(parameter.sizes().vec(), index++));
  }
  Tensor forward(const Tensor& x) { return down(torch::tanh(conv(x)).flatten(1)); }
  peft::Conv2d conv{nullptr};
  peft::Linear down{nullptr};
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("(IA)³ keeps the promises of a method on linear layers and convolutions, in both forms", "[ia3]") {
  auto cases = layer_cases();
  cases.push_back(layer<peft::Conv2d>("Conv2d of two groups", torch::randn({2, 4, 5, 5}),
                                      nn::Conv2dOptions(4, 6, 3).groups(2)));
  cases.push_back(
      layer<peft::Conv1d>("Conv1d without a batch", torch::randn({4, 9}), nn::Conv1dOptions(4, 6, 3)));
  for (const auto& layer_case : cases) {
    if (layer_case.name.starts_with("Embedding")) continue;
    check_properties(layer_case, outputs_promise());
    check_properties(layer_case, inputs_promise());
  }
}

TEST_CASE("(IA)³ refuses an embedding and a norm, which it would not scale", "[ia3]") {
  struct LayersImpl : nn::Module {
    LayersImpl() {
      words = register_module("words", peft::Embedding(7, 5));
      norm = register_module("norm", peft::LayerNorm(nn::LayerNormOptions({5})));
      dense = register_module("dense", peft::Linear(5, 5));
    }
    peft::Embedding words{nullptr};
    peft::LayerNorm norm{nullptr};
    peft::Linear dense{nullptr};
  };
  LayersImpl layers;
  CHECK_THROWS_WITH(peft::add_adapter(layers, Ia3Options(), peft::named({"words", "norm"})),
                    Contains("'words' cannot take 'ia3': a Embedding has no outputs or inputs") &&
                        Contains("'norm' cannot take 'ia3': a LayerNorm has no"));
  CHECK(peft::add_adapter(layers, Ia3Options(), peft::all()).sites() == std::vector<std::string>{"dense"});
}

TEST_CASE("(IA)³ has the reference's shapes", "[ia3]") {
  const auto shape = [](auto site, const Ia3Options& options) {
    return peft::add_adapter(*site, options, peft::all())
        .template layers<Ia3Impl>()
        .at(0)
        ->ia3_l.sizes()
        .vec();
  };
  using Shape = std::vector<int64_t>;
  CHECK(shape(peft::Linear(4, 3), Ia3Options()) == Shape{3, 1});
  CHECK(shape(peft::Linear(4, 3), inputs()) == Shape{1, 4});
  CHECK(shape(peft::Conv1d(nn::Conv1dOptions(4, 6, 3)), Ia3Options()) == Shape{1, 6, 1});
  CHECK(shape(peft::Conv2d(nn::Conv2dOptions(4, 6, 3)), Ia3Options()) == Shape{1, 6, 1, 1});
  CHECK(shape(peft::Conv2d(nn::Conv2dOptions(4, 6, 3)), inputs()) == Shape{1, 4, 1, 1});
  CHECK(shape(peft::Conv3d(nn::Conv3dOptions(4, 6, 2).groups(2)), inputs()) == Shape{1, 4, 1, 1, 1});
}

// Reference: Hugging Face PEFT, tests/reference/ia3_values.py.
TEST_CASE("(IA)³ equals Hugging Face's numbers", "[ia3]") {
  const auto x = fill({2, 4}, 5).requires_grad_(true);
  const auto picture = fill({1, 4, 3, 3}, 5);
  const nn::Conv2dOptions grouped = nn::Conv2dOptions(4, 6, 3).padding(1).groups(2);
  SECTION("linear, outputs") {
    auto site = filled(peft::Linear(4, 3));
    const auto piece = filled_ia3(*site, Ia3Options());
    const auto y = site->forward(x);
    check_values(y, {0.04956, 0.003977, -0.302706, 0.29868, -0.578023, 0.361532});
    (y * fill({2, 3}, 6)).sum().backward();
    check_values(piece->ia3_l.grad(), {-0.12434, -0.101016, -0.226202});
    check_values(x.grad(),
                 {-0.071434, 0.036662, -0.200359, -0.023684, 0.197626, -0.185336, 0.355549, 0.139136});
    peft::merge(*site);
    check_values(site->base->weight, {-0.078, 0.144, -0.24, -0.018, 0.3298, -0.291, 0.0679, 0.4268, -0.268,
                                      0.2278, -0.6298, -0.134});
    check_values(site->base->bias, {0.144, -0.388, -0.0402});
  }
  SECTION("linear, inputs") {
    auto site = filled(peft::Linear(4, 3));
    const auto piece = filled_ia3(*site, inputs());
    const auto y = site->forward(x);
    check_values(y, {0.09688, -0.101254, -0.195156, 0.549196, -0.565156, 0.325039});
    (y * fill({2, 3}, 6)).sum().backward();
    check_values(piece->ia3_l.grad(), {-0.044128, -0.024953, -0.152749, -0.014628});
    check_values(x.grad(), {-0.01512, -0.017654, -0.109746, -0.00294, 0.10668, -0.173533, 0.419152, 0.08946});
    peft::merge(*site);
    check_values(site->base->weight, {-0.078, 0.2328, -0.536, -0.021, 0.204, -0.291, 0.0938, 0.308, -0.12,
                                      0.1649, -0.6298, -0.07});
  }
  SECTION("convolution of two groups, outputs") {
    auto site = filled(peft::Conv2d(grouped));
    const auto piece = filled_ia3(*site, Ia3Options());
    const auto y = site->forward(picture);
    check_values(y[0][0][0], {0.5394, -0.09852, 0.06408});
    check_values(y[0][5][2], {-0.735552, 1.183104, -0.440064});
    (y * fill({1, 6, 3, 3}, 6)).sum().backward();
    check_values(piece->ia3_l.grad(), {-0.928158, -0.580133, 0.288328, -0.746327, -1.24272, -1.563374});
    peft::merge(*site);
    check_values(
        site->base->weight.select(3, 1).select(2, 1),
        {0.204, -0.222, -0.0679, 0.2231, -0.6432, -0.2412, 0.084, 0.294, -0.3103, 0.0107, 0.4464, -0.576});
  }
  SECTION("convolution of two groups, inputs") {
    auto site = filled(peft::Conv2d(grouped));
    const auto piece = filled_ia3(*site, inputs());
    const auto y = site->forward(picture);
    check_values(y[0][0][0], {0.716726, -0.069046, 0.076164});
    check_values(y[0][5][2], {-0.522416, 0.836632, -0.313112});
    (y * fill({1, 6, 3, 3}, 6)).sum().backward();
    check_values(piece->ia3_l.grad(), {-0.634541, -0.365722, -1.743136, -1.578085});
    peft::merge(*site);
    check_values(
        site->base->weight.select(3, 1).select(2, 1),
        {0.204, -0.3589, -0.042, 0.2231, -0.288, -0.1746, 0.1608, 0.294, -0.3886, 0.007, 0.4154, -0.28});
  }
  SECTION("two active adapters multiply") {
    auto site = filled(peft::Linear(4, 3));
    filled_ia3(*site, Ia3Options());
    const auto other = peft::add_adapter(*site, Ia3Options(), peft::all(), "other").layers<Ia3Impl>().at(0);
    assign(other->ia3_l, fill({3}, 7));
    check_values(site->forward(x), {0.0034692, 0.00174988, 0.0605412, 0.0209076, -0.25433012, -0.0723064});
  }
}

// Reference: Hugging Face PEFT, tests/reference/ia3_values.py.
TEST_CASE("(IA)³ trains as the reference does over 12 steps of AdamW", "[ia3]") {
  Net net;
  auto adapter = peft::add_adapter(*net, Ia3Options().feedforward({"down"}), peft::named({"conv", "down"}));
  const auto x = fill({4, 2, 3, 3}, 5), target = fill({4, 2}, 6);
  const auto loss = twelve_steps(adapter, [&] { return (net(x) - target).square().sum(); });
  check_values(loss, {0.9837521612});
  const auto pieces = adapter.layers<Ia3Impl>();
  check_values(pieces.at(0)->ia3_l, {0.505126946, 0.5287147965, 0.6744639676});
  check_values(pieces.at(1)->ia3_l,
               {0.4497013977, 1.564298745, 1.505490136, 0.4303384414, 1.539789331, 0.634906713, 0.4516224498,
                0.4414913394, 0.4447197484, 1.569422236, 1.546377538, 0.4358793743});
}

// Reference: Hugging Face PEFT, tests/reference/ia3_values.py.
TEST_CASE("(IA)³ draws the reference's random numbers", "[ia3]") {
  Net net;
  const auto options = Ia3Options().feedforward({"down"});
  SECTION("and discards them where it starts at ones") {
    torch::manual_seed(0);
    const auto adapter = peft::add_adapter(*net, options, peft::named({"conv", "down"}));
    for (const auto& l : adapter.parameters()) CHECK(torch::equal(l, torch::ones_like(l)));
    check_values(torch::randn(2), {0.1227012426, -0.5663174987}, 1e-7);
  }
  SECTION("or keeps them") {
    torch::manual_seed(0);
    auto drawn = options;
    const auto pieces =
        peft::add_adapter(*net, drawn.init(false), peft::named({"conv", "down"})).layers<Ia3Impl>();
    check_values(pieces.at(0)->ia3_l, {1.540996075, -0.2934288979, -2.178789377}, 1e-7);
    check_values(pieces.at(1)->ia3_l,
                 {0.5684312582, -1.084522367, -1.398595452, 0.4033468366, 0.8380263448, -0.7192575932,
                  -0.4033435285, -0.5966353416, 0.1820364892, -0.8566746116, 1.100604177, -1.071187377},
                 1e-7);
  }
}

TEST_CASE("(IA)³ compares feed-forward names as the reference does, by the end of the path", "[ia3]") {
  const auto forms = [](const Ia3Options& options) {
    Net net;
    std::vector<bool> scaled_inputs;
    for (const auto& piece : peft::add_adapter(*net, options, peft::all()).layers<Ia3Impl>()) {
      scaled_inputs.push_back(piece->feedforward);
    }
    return scaled_inputs;
  };
  CHECK(forms(Ia3Options()) == std::vector<bool>{false, false});
  CHECK(forms(Ia3Options().feedforward({"v"})) == std::vector<bool>{true, false});
  CHECK(forms(Ia3Options().feedforward({"own", "nv"})) == std::vector<bool>{true, true});
  CHECK(forms(Ia3Options().feedforward_pattern("d.*")) == std::vector<bool>{false, true});
  CHECK(forms(Ia3Options().feedforward_pattern("own")) == std::vector<bool>{false, false});
}

TEST_CASE("(IA)³ knows feed-forward parts of an attention by their path and by the module's", "[ia3]") {
  struct Block : nn::Module {
    peft::MultiheadAttention attn = register_module("attn", peft::MultiheadAttention(4, 2));
  };
  const auto forms = [](const Ia3Options& options, const std::vector<std::string>& target) {
    const peft_test::TemporaryFolder folder;
    Block net, other;
    std::vector<bool> scaled_inputs, again;
    const auto adapter = peft::add_adapter(net, options, peft::named(target));
    for (const auto& piece : adapter.layers<Ia3Impl>()) scaled_inputs.push_back(piece->feedforward);
    peft::save_adapter(adapter, folder / "a");
    for (const auto& piece : peft::load_adapter(other, folder / "a").layers<Ia3Impl>())
      again.push_back(piece->feedforward);
    CHECK(again == scaled_inputs);
    return scaled_inputs;
  };
  CHECK(forms(Ia3Options().feedforward({"out_proj"}), {"attn.out_proj"}) == std::vector<bool>{true});
  CHECK(forms(Ia3Options().feedforward({"out_proj"}), {"attn"}) == std::vector<bool>{false, true});
  CHECK(forms(Ia3Options().feedforward({"attn"}), {"attn"}) == std::vector<bool>{true, true});
  CHECK(forms(Ia3Options(), {"attn"}) == std::vector<bool>{false, false});
}

TEST_CASE("(IA)³ keeps its form in a copy that is adapted under another path", "[ia3]") {
  Net net;
  shake(peft::add_adapter(*net, Ia3Options().feedforward({"down"}), peft::all()));
  const auto x = fill({4, 12}, 5);
  const auto y = net->down(x);
  peft::adapter(*net->down, "default");  // now the layer's path is empty
  const auto copy = std::dynamic_pointer_cast<peft::Linear::Impl>(net->down->clone());
  CHECK(torch::equal(copy->forward(x), y));
  CHECK(peft::adapter(*copy, "default").layers<Ia3Impl>().at(0)->feedforward);
}

TEST_CASE("(IA)³ keeps a half-precision base's type and its own vector in float32", "[ia3]") {
  const auto options = GENERATE(Ia3Options(), Ia3Options().feedforward_pattern(".*"));
  torch::manual_seed(1);
  peft::Linear site(6, 4);
  site->to(torch::kBFloat16);
  const auto adapter = peft::add_adapter(*site, Ia3Options(options).init(false), peft::all());
  const auto l = adapter.layers<Ia3Impl>().at(0)->ia3_l;
  CHECK(l.scalar_type() == torch::kFloat32);
  CHECK(torch::equal(l, l.to(torch::kBFloat16).to(torch::kFloat32)));
  const auto x = torch::randn({3, 6}, torch::kBFloat16);
  const auto y = site->forward(x);
  CHECK(y.scalar_type() == torch::kBFloat16);
  const auto scale = l.flatten();
  const auto& base = *site->base;
  const auto expected =
      adapter.layers<Ia3Impl>().at(0)->feedforward
          ? at::linear((x.to(torch::kFloat32) * scale).to(torch::kBFloat16), base.weight, base.bias)
          : (at::linear(x, base.weight, base.bias).to(torch::kFloat32) * scale).to(torch::kBFloat16);
  CHECK(torch::equal(y, expected));
  peft::merge(*site);
  CHECK(site->base->weight.scalar_type() == torch::kBFloat16);
  CHECK(site->base->bias.scalar_type() == torch::kBFloat16);
}

TEST_CASE("(IA)³ goes through Hugging Face's files, and each layer keeps its form", "[ia3]") {
  const auto x = fill({4, 2, 3, 3}, 5);
  const auto config_of = [&](const Ia3Options& options, const peft::Target& target) {
    Net net, other;
    auto adapter = peft::add_adapter(*net, options, target);
    shake(adapter);
    const auto config = through_files(adapter, *other);
    CHECK(torch::equal(other(x), net(x)));
    const auto again = through_files(peft::adapter(*other, "default"), *Net());
    CHECK(again == config);
    CHECK(config["peft_type"] == "IA3");
    return config;
  };
  const auto both = peft::named({"conv", "down"});
  auto config = config_of(Ia3Options().feedforward({"down"}), both);
  CHECK(config["feedforward_modules"] == nlohmann::json{"down"});
  CHECK(config["target_modules"] == nlohmann::json{"conv", "down"});
  CHECK(config["init_ia3_weights"] == true);
  CHECK(config_of(Ia3Options(), both)["feedforward_modules"] == nlohmann::json::array());
  CHECK(config_of(Ia3Options().feedforward_pattern("d.*"), both)["feedforward_modules"] == "d.*");
  // Python refuses names that are not among the targets.
  CHECK(config_of(Ia3Options().feedforward({"own"}), both)["feedforward_modules"] == "down");
  config = config_of(Ia3Options().feedforward({"n", "v"}).init(false), peft::matching("conv|down"));
  CHECK(config["target_modules"] == "conv|down");
  CHECK(config["feedforward_modules"] == nlohmann::json{"n", "v"});
  CHECK(config["init_ia3_weights"] == false);
}

TEST_CASE("(IA)³ names what is wrong in a file", "[ia3]") {
  const auto load = [](const std::string& feedforward) {
    const peft_test::TemporaryFolder folder;
    Net net;
    peft::save_adapter(peft::add_adapter(*net, Ia3Options(), peft::named({"conv", "down"})), folder / "a");
    auto config = nlohmann::json::parse(std::ifstream(folder / "a" / "adapter_config.json"));
    config["feedforward_modules"] = nlohmann::json::parse(feedforward);
    std::ofstream(folder / "a" / "adapter_config.json") << config;
    peft::load_adapter(*Net(), folder / "a");
  };
  CHECK_THROWS_WITH(load("null"), Contains("'feedforward_modules' must be given for a base of this kind"));
  CHECK_THROWS_WITH(load(R"(["up"])"), Contains("must name some of 'target_modules', but got [\"up\"]"));
  CHECK_THROWS_WITH(load("3"), Contains("'feedforward_modules' must be a list of names, but got 3"));
  CHECK_THROWS_WITH(load(R"(["down"])"),
                    Contains("'base_model.model.down.ia3_l' expected (1, 12), but got (2, 1)"));
}

TEST_CASE("(IA)³ names the option that contradicts another", "[ia3]") {
  peft::Linear site(6, 4);
  const auto add = [&](const Ia3Options& options) { peft::add_adapter(*site, options, peft::all()); };
  CHECK_THROWS_WITH(add(Ia3Options().feedforward({"a", ""})), Contains("feedforward must hold names"));
  CHECK_THROWS_WITH(add(Ia3Options().feedforward({"a"}).feedforward_pattern("b")), Contains("but got both"));
  CHECK_THROWS_WITH(add(Ia3Options().feedforward_pattern("(")),
                    Contains("Ia3Options: feedforward_pattern: '(' is no regular expression"));
  CHECK_THROWS_WITH(peft::add_adapter(*site, Ia3Options(), peft::all()).scale(0.5),
                    Contains("ia3 has no strength to scale"));
}
