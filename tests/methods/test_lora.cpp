#include <cmath>

#include "methods/reference_values.h"

using namespace suite;
using peft::LoraInit;
using peft::LoraOptions;

namespace {

Promise lora(const LoraOptions& options) {
  return {{peft::on(options, peft::all())},
          [options](const peft::SiteInfo& site) {
            const auto count =
                options.rank() * product(site.fan_in) + options.rank() / site.groups * site.fan_out;
            return count + (options.lora_bias() ? site.fan_out : 0);
          },
          options.init() != LoraInit::random,
          /*whole_gradient=*/true,
          [options](const peft::SiteInfo& site) {
            return site.groups == 1 && (!options.lora_bias() || site.has_bias());
          }};
}

template <class Site>
Site filled(Site site) {
  site->to(torch::kFloat64);
  assign(site->base->weight, fill(site->base->weight.sizes().vec(), 1));
  if constexpr (requires { site->base->bias; })
    assign(site->base->bias, fill(site->base->bias.sizes().vec(), 2));
  return site;
}

std::shared_ptr<peft::LoraImpl> filled_lora(nn::Module& site, const LoraOptions& options) {
  auto piece = peft::add_adapter(site, options, peft::all()).layers<peft::LoraImpl>().at(0);
  assign(piece->lora_A, fill(piece->lora_A.sizes().vec(), 3));
  assign(piece->lora_B, fill(piece->lora_B.sizes().vec(), 4));
  return piece;
}

}  // namespace

TEST_CASE("LoRA keeps the promises of a method on every layer kind", "[lora]") {
  for (const auto& layer_case : layer_cases()) {
    const bool embedding = layer_case.name.rfind("Embedding", 0) == 0;
    check_properties(layer_case, lora(LoraOptions(2).alpha(3)));
    check_properties(layer_case, lora(LoraOptions(3).alpha(5).rslora(true).init(LoraInit::gaussian)));
    check_properties(layer_case, lora(LoraOptions(2).init(LoraInit::random)));
    if (!embedding) check_properties(layer_case, lora(LoraOptions(2).lora_bias(true)));
  }
}

TEST_CASE("LoRA on a grouped convolution trains and refuses to merge", "[lora]") {
  const auto grouped = layer<peft::Conv2d>("Conv2d of two groups", torch::randn({2, 4, 5, 5}),
                                           nn::Conv2dOptions(4, 6, 3).groups(2));
  check_properties(grouped, lora(LoraOptions(4)));
  CHECK_THROWS_WITH(peft::add_adapter(*grouped.make(), LoraOptions(3), peft::named({"x"})),
                    Contains("no module"));
  const auto circular =
      layer<peft::Conv2d>("Conv2d padded in circles", torch::randn({2, 4, 5, 5}),
                          nn::Conv2dOptions(4, 6, 3).padding(1).padding_mode(torch::kCircular));
  const auto site = circular.make();
  nn::Conv2d twin(nn::Conv2dOptions(4, 6, 3).padding(1).padding_mode(torch::kCircular));
  twin->to(torch::kFloat64);
  const auto from = site->named_parameters();
  for (auto& item : twin->named_parameters()) assign(item.value(), from[item.key()]);
  CHECK(torch::equal(circular.forward(*site, circular.input), twin->forward(circular.input)));
  check_properties(circular, lora(LoraOptions(2)));
}

TEST_CASE("LoRA on stacked projections adapts the enabled blocks only", "[lora]") {
  const auto stacked = layer<peft::Linear>("q, k, v in one", torch::randn({3, 6}), 6, 12);
  auto promise = lora(LoraOptions(2).enable({true, false, true}));
  promise.count = [](const peft::SiteInfo&) { return 2 * 2 * (6 + 12 / 3); };
  check_properties(stacked, promise);

  const auto site = stacked.make();
  const auto plain = stacked.forward(*site, stacked.input);
  shake(peft::add_adapter(*site, promise.parts, "one"));
  const auto change = (stacked.forward(*site, stacked.input) - plain).abs();
  CHECK(change.narrow(1, 4, 4).max().item<double>() == 0.0);
  CHECK(change.narrow(1, 0, 4).max().item<double>() > 0.0);
  CHECK(change.narrow(1, 8, 4).max().item<double>() > 0.0);

  // Each block has its own factors: block j of the change is s · B_j A_j, as loralib's MergedLinear has it.
  const auto piece = peft::adapter(*site, "one").layers<peft::LoraImpl>().at(0);
  const auto delta = peft::adapter(*site, "one").effective_delta("");
  const auto s = piece->scaling();
  for (const auto& [block, row] : {std::pair<int64_t, int64_t>{0, 0}, {1, 8}}) {
    const auto expected =
        at::mm(piece->lora_B.narrow(0, block * 4, 4), piece->lora_A.narrow(0, block * 2, 2)) * s;
    CHECK(largest(delta.narrow(0, row, 4), expected.detach()) < 1e-12);
  }
}

// Reference: Hugging Face PEFT, tests/reference/lora_values.py.
TEST_CASE("LoRA equals Hugging Face's numbers", "[lora]") {
  SECTION("linear: output, gradients, merged weight") {
    auto site = filled(peft::Linear(4, 3));
    const auto piece = filled_lora(*site, LoraOptions(2).alpha(3));
    CHECK(piece->scaling() == 1.5);
    const auto x = fill({2, 4}, 5).requires_grad_(true);
    const auto y = site->forward(x);
    check_values(y, {0.06901, 0.104963, -0.366912, 0.5705485, -0.556726, 0.192226});
    (y * fill({2, 3}, 6)).sum().backward();
    check_values(piece->lora_A.grad(),
                 {0.168156, -0.145929, 0.196587, 0.157626, -0.105771, 0.0929595, -0.046155, -0.127851});
    check_values(piece->lora_B.grad(), {0.12231, -0.02001, -0.0386955, 0.030162, -0.1165275, -0.128433});
    check_values(x.grad(),
                 {-0.1535955, -0.148538, 0.066246, -0.1331205, 0.3328595, -0.142555, 0.173012, 0.2507745});
    peft::merge(*site);
    check_values(site->base->weight, {-0.0763, 0.46575, -0.5173, 0.0702, 0.52735, -0.2403, -0.104, 0.59285,
                                      -0.485, 0.0182, -0.1856, -0.349});
  }
  SECTION("rank-stabilised scaling") {
    auto site = filled(peft::Linear(4, 3));
    const auto piece = filled_lora(*site, LoraOptions(2).alpha(3).rslora(true));
    CHECK_THAT(piece->scaling(), WithinAbs(2.1213203435596424, 1e-15));
    check_values(site->forward(fill({2, 4}, 5)),
                 {0.06338083769, 0.1467418225, -0.4253210829, 0.6006819153, -0.5404995979, 0.1600937971});
  }
  SECTION("embedding") {
    auto site = filled(peft::Embedding(5, 3));
    filled_lora(*site, LoraOptions(2).alpha(3));
    check_values(site->forward(torch::tensor({0, 2, 4})),
                 {0.1124, 0.4662, -0.796, 0.1414, 0.30485, -0.0266, 0.21585, -0.412, 0.0762});
  }
  SECTION("convolution") {
    auto site = filled(peft::Conv2d(nn::Conv2dOptions(2, 3, 3).padding(1)));
    filled_lora(*site, LoraOptions(2).alpha(3));
    const auto y = site->forward(fill({1, 2, 3, 3}, 5));
    check_values(y[0][0][0], {0.799463, 0.3753035, -0.045744});
    check_values(y[0][2][2], {0.303726, -0.30423, 0.107554});
    check_values(peft::adapter(*site, "default").effective_delta("").sum(), {0.1821});
  }
}

namespace {

struct ToyImpl : nn::Module {
  ToyImpl() {
    q = register_module("q", peft::Linear(4, 3));
    e = register_module("e", peft::Embedding(5, 3));
    c = register_module("c", peft::Conv2d(nn::Conv2dOptions(1, 2, 2)));
  }
  peft::Linear q{nullptr};
  peft::Embedding e{nullptr};
  peft::Conv2d c{nullptr};
};
TORCH_MODULE(Toy);

}  // namespace

// Reference: Hugging Face PEFT, tests/reference/lora_values.py.
TEST_CASE("LoRA starts from the reference's random numbers", "[lora]") {
  Toy toy;
  const std::vector<double> kaiming{-0.2061115503, 0.01852178574, 0.1976675987, 0.3000113964,
                                    -0.338970542,  -0.2177314162, 0.1816085577, 0.415193975};
  SECTION("default, three layer kinds in one run of the generator") {
    torch::manual_seed(0);
    const auto pieces = peft::add_adapter(*toy, LoraOptions(2).alpha(8), peft::named({"q", "e", "c"}))
                            .layers<peft::LoraImpl>();
    check_values(pieces.at(0)->lora_A, kaiming, 1e-7);
    check_values(pieces.at(1)->lora_B,
                 {-0.6859184504, -1.505141735, 0.2549827397, 1.804248452, -0.4502375126, -0.4830320776},
                 1e-7);
    check_values(pieces.at(2)->lora_A,
                 {0.04599624872, -0.3128026724, -0.4659770727, 0.4442462325, 0.380179882, -0.4987639785,
                  0.09358602762, -0.08423000574},
                 1e-7);
    for (const auto index : {0, 2})
      CHECK(pieces.at(static_cast<size_t>(index))->lora_B.abs().max().item<float>() == 0);
    CHECK(pieces.at(1)->lora_A.abs().max().item<float>() == 0);
  }
  SECTION("gaussian") {
    torch::manual_seed(0);
    const auto piece =
        peft::add_adapter(*toy, LoraOptions(2).alpha(8).init(LoraInit::gaussian), peft::named({"q"}))
            .layers<peft::LoraImpl>()
            .at(0);
    check_values(piece->lora_A,
                 {-0.3915320635, 0.5310854912, -0.1306571066, 0.5333498716, 0.2079456002, 0.4197832048,
                  -0.4132343531, -0.3974683285},
                 1e-7);
  }
  SECTION("a bfloat16 base rounds the start, which is kept in float32") {
    toy->to(torch::kBFloat16);
    torch::manual_seed(0);
    const auto piece =
        peft::add_adapter(*toy, LoraOptions(2).alpha(8), peft::named({"q"})).layers<peft::LoraImpl>().at(0);
    CHECK(piece->lora_A.scalar_type() == torch::kFloat32);
    check_values(piece->lora_A,
                 {-0.2060546875, 0.0185546875, 0.197265625, 0.30078125, -0.33984375, -0.2177734375,
                  0.181640625, 0.416015625},
                 0.0);
    const auto y = toy->q->forward(torch::randn({2, 4}, torch::kBFloat16));
    CHECK(y.scalar_type() == torch::kBFloat16);
  }
}

TEST_CASE("LoRA takes other ranks and alphas for the layers a pattern matches, the first one winning",
          "[lora]") {
  Toy toy;
  auto adapter = peft::add_adapter(
      *toy, LoraOptions(4).alpha(8).rank_pattern({{"q", 2}, {".", 3}}).alpha_pattern({{"c", 1}}),
      peft::named({"q", "e", "c"}));
  const auto pieces = adapter.layers<peft::LoraImpl>();
  CHECK(pieces.at(0)->rank == 2);
  CHECK(pieces.at(1)->rank == 3);
  CHECK(pieces.at(2)->rank == 3);
  CHECK(pieces.at(0)->scaling() == 4.0);
  CHECK(pieces.at(2)->scaling() == Approx(1.0 / 3));
  adapter.scale(0.5);
  CHECK(pieces.at(0)->scaling() == 2.0);
}

TEST_CASE("LoRA drops its input in training only, at the asked rate", "[lora]") {
  torch::manual_seed(5);
  peft::Linear site(64, 64);
  auto adapter = peft::add_adapter(*site, LoraOptions(64).alpha(64).dropout(0.25), peft::all());
  const auto piece = adapter.layers<peft::LoraImpl>().at(0);
  assign(piece->lora_A, torch::eye(64));
  assign(piece->lora_B, torch::eye(64));
  assign(site->base->weight, torch::zeros({64, 64}));
  assign(site->base->bias, torch::zeros({64}));
  const auto x = torch::ones({2000, 64});
  const auto y = site->forward(x);
  const auto dropped = (y == 0).to(torch::kFloat64).mean().item<double>();
  CHECK_THAT(dropped, WithinAbs(0.25, 0.01));
  CHECK_THAT(y.max().item<double>(), WithinAbs(1 / 0.75, 1e-6));
  CHECK_FALSE(torch::equal(site->forward(x), y));
  site->eval();
  CHECK(torch::equal(site->forward(x), x));
}

TEST_CASE("LoRA names the option that is out of range", "[lora]") {
  peft::Linear site(6, 4);
  const auto add = [&](const LoraOptions& options) { peft::add_adapter(*site, options, peft::all()); };
  CHECK_THROWS_WITH(add(LoraOptions(0)), Contains("LoraOptions: rank must be positive, but got 0"));
  CHECK_THROWS_WITH(add(LoraOptions(-2)), Contains("rank must be positive, but got -2"));
  CHECK_THROWS_WITH(add(LoraOptions(2).dropout(1.0)), Contains("dropout must be in [0, 1), but got 1"));
  CHECK_THROWS_WITH(add(LoraOptions(2).alpha(NAN)), Contains("alpha must be finite"));
  CHECK_THROWS_WITH(add(LoraOptions(2).rank_pattern({{"q", 0}})), Contains("rank_pattern of 'q'"));
  CHECK_THROWS_WITH(add(LoraOptions(2).alpha_pattern({{"(", 1}})), Contains("is no regular expression"));
  CHECK_THROWS_WITH(add(LoraOptions(2).enable({false, false})), Contains("at least one block"));
  peft::Linear three(6, 4);
  CHECK_THROWS_WITH(peft::add_adapter(*three, LoraOptions(2).enable({true, false, true}), peft::all()),
                    Contains("matches no site"));
  CHECK(site->adapters().empty());
}
