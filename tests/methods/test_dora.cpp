#include <ATen/record_function.h>

#include "methods/fast_case.h"
#include "methods/reference_case.h"
#include "peft/core/conv1d.h"
#include "peft/methods/dora.h"
#include "peft/methods/ia3.h"
#include "peft/model/reparametrized.h"
#include "peft/train/autocast.h"

using namespace suite;
using peft::DoraOptions;
using peft::LoraInit;
using peft::LoraOptions;

namespace {

Promise dora(const LoraOptions& options) {
  Promise promise{{peft::on(DoraOptions(options), peft::all())}, [options](const peft::SiteInfo& site) {
                    return options.rank() * (product(site.fan_in) + site.fan_out) + site.fan_out;
                  }};
  const bool zero = options.init() == LoraInit::kaiming || options.init() == LoraInit::gaussian;
  promise.no_op_at_start = zero;
  promise.whole_gradient = false;  // the norm is a constant, §4.3 of the paper
  return promise;
}

void check_values(const Tensor& tensor, const std::vector<double>& expected, double tolerance = 2e-10) {
  const auto wanted = torch::tensor(expected, torch::kFloat64);
  CHECK(largest(tensor.detach().to(torch::kFloat64).contiguous().view(-1), wanted) < tolerance);
}

template <class Site>
Site filled(Site site) {
  site->to(torch::kFloat64);
  assign(site->base->weight, fill(site->base->weight.sizes().vec(), 1));
  if constexpr (requires { site->base->bias; })
    assign(site->base->bias, fill(site->base->bias.sizes().vec(), 2));
  return site;
}

/// A DoRA with A and B filled from k on and its magnitude times 1.1, 0.9, 1.2, 1.1, …
std::shared_ptr<peft::DoraImpl> filled_dora(nn::Module& site, const LoraOptions& options, int64_t k,
                                            const std::string& name = "default") {
  auto piece =
      peft::add_adapter(site, DoraOptions(options), peft::all(), name).layers<peft::DoraImpl>().at(0);
  assign(piece->lora->lora_A, fill(piece->lora->lora_A.sizes().vec(), k));
  assign(piece->lora->lora_B, fill(piece->lora->lora_B.sizes().vec(), k + 1));
  auto& m = piece->lora_magnitude_vector;
  const auto factors = torch::tensor({1.1, 0.9, 1.2}, torch::kFloat64);
  assign(m, m.detach() * factors.repeat({m.numel() / 3}).view(m.sizes()));
  return piece;
}

}  // namespace

TEST_CASE("DoRA keeps the promises of a method on every layer kind", "[dora]") {
  for (const auto& layer_case : layer_cases()) {
    check_properties(layer_case, dora(LoraOptions(2).alpha(3)));
    check_properties(layer_case, dora(LoraOptions(3).alpha(5).rslora(true).init(LoraInit::random)));
  }
  const auto linear = layer_cases().front();
  check_properties(linear, dora(LoraOptions(2).alpha(3).init(LoraInit::pissa)));
  check_properties(linear, dora(LoraOptions(2).init(LoraInit::loftq)));
}

// Reference: Hugging Face PEFT, tests/reference/dora_values.py.
TEST_CASE("DoRA equals Hugging Face's numbers", "[dora]") {
  SECTION("linear") {
    auto site = filled(peft::Linear(4, 3));
    const auto piece = filled_dora(*site, LoraOptions(2).alpha(3), 3);
    check_values(piece->lora_magnitude_vector, {0.5336984167, 0.5721197427, 0.6570479435});
    const auto x = fill({2, 4}, 5).requires_grad_(true);
    const auto y = site->forward(x);
    check_values(y, {0.1103284499, -0.05423695078, -0.3836541631, 0.4906739364, -0.5073149115, 0.2032690734});
    (y * fill({2, 3}, 6)).sum().backward();
    check_values(piece->lora_magnitude_vector.grad(), {-0.02104807114, 0.01041718725, -0.4036909314});
    check_values(piece->lora->lora_A.grad(), {0.1740241652, -0.151149037, 0.1949955134, 0.1662569991,
                                              -0.101424173, 0.08895565658, -0.05642091195, -0.1180920475});
    check_values(piece->lora->lora_B.grad(), {0.09275470668, -0.01517473372, -0.02649594935, 0.02065281039,
                                              -0.1223180994, -0.1348152192});
    check_values(x.grad(), {-0.1813692336, -0.1090733957, 0.02698254299, -0.1487459331, 0.3122357065,
                            -0.1075919593, 0.1579204691, 0.2305439186});
    const auto plain = site->base->weight.detach().clone();
    peft::merge(*site);
    check_values(site->base->weight,
                 {-0.05786267779, 0.3532050089, -0.3922983384, 0.05323669699, 0.361092088, -0.1645404925,
                  -0.07121186526, 0.4059418685, -0.5091010979, 0.01910441233, -0.1948230181, -0.3663428519});
    peft::unmerge(*site);
    CHECK(torch::equal(site->base->weight, plain));
  }
  SECTION("embedding") {
    auto site = filled(peft::Embedding(5, 3));
    const auto piece = filled_dora(*site, LoraOptions(2).alpha(3), 3);
    check_values(piece->lora_magnitude_vector, {0.3881301328, 0.766110958, 0.657267069});
    const auto y = site->forward(torch::tensor({0, 2, 4}));
    check_values(y, {0.138340154, 0.4156685586, -0.6113892883, 0.1740328983, 0.2718072932, -0.02043084808,
                     0.2656647886, -0.3673432993, 0.05852746705});
    (y * fill({3, 3}, 6)).sum().backward();
    check_values(piece->lora_magnitude_vector.grad(), {-0.2650531253, -0.03116865986, -0.4276251836});
    check_values(piece->lora->lora_A.grad(), {0.2115794339, 0, -0.2953885865, 0, -0.2903564819, -0.2831428263,
                                              0, -0.001325903422, 0, 0.04776368988});
    check_values(piece->lora->lora_B.grad(),
                 {0.08307793944, -0.2880035234, 0.06513210683, 0.04373346803, -0.4167201739, 0.1736238048});
    peft::merge(*site);
    check_values(site->base->weight,
                 {0.138340154, 0.4156685586, -0.6113892883, -0.1608019672, 0.2964603083, -0.1995464034,
                  0.1740328983, 0.2718072932, -0.02043084808, -0.06917007699, -0.3426902842, -0.1205880883,
                  0.2656647886, -0.3673432993, 0.05852746705});
  }
  SECTION("convolution") {
    auto site = filled(peft::Conv1d(nn::Conv1dOptions(2, 3, 3).padding(1)));
    const auto piece = filled_dora(*site, LoraOptions(2).alpha(3), 3);
    CHECK(piece->lora_magnitude_vector.sizes().vec() == std::vector<int64_t>{1, 3, 1});
    check_values(piece->lora_magnitude_vector, {0.7304861395, 0.6353133085, 0.7865265412});
    const auto y = site->forward(fill({1, 2, 2}, 5));
    check_values(y,
                 {0.3229583778, 0.2632266939, -0.3317686913, -0.5719769075, -0.08591779222, 0.002232690034});
    (y * fill({1, 3, 2}, 6)).sum().backward();
    check_values(piece->lora_magnitude_vector.grad(), {-0.03184406041, 0.1013943143, -0.03134717991});
    check_values(piece->lora->lora_A.grad(), {-0.07774585158, 0.06116274815, 0.006561646455, -0.01600649885,
                                              -0.1021433294, -0.009623748134, 0.04819982275, -0.08459773899,
                                              0.03711925025, 0.009923492919, 0.05371508282, -0.05444156704});
    check_values(piece->lora->lora_B.grad(), {-0.03610225372, -0.01797382691, 0.06308705444, 0.02629414846,
                                              0.09717030483, 0.01771507084});
    peft::merge(*site);
    check_values(site->base->weight,
                 {-0.1510702234, 0.2315821813, -0.4623878334, -0.04765065459, 0.3350017501, -0.3589682646,
                  0.1568307548, 0.3228042631, -0.2755495816, 0.2016884597, -0.324036994, -0.2306918766,
                  0.06129300283, -0.4093629644, 0.339340352, 0.1875937359, -0.2830622313, 0.4656410851});
  }
  SECTION("two, one on the other") {
    auto site = filled(peft::Linear(4, 3));
    filled_dora(*site, LoraOptions(2).alpha(3), 3);
    filled_dora(*site, LoraOptions(2).alpha(4), 7, "second");
    check_values(site->forward(fill({2, 4}, 5)),
                 {0.2069444137, -0.119257473, -0.5337181579, 0.4413647577, -0.4231208852, 0.1734881287});
    peft::merge(*site);
    check_values(site->base->weight,
                 {0.1023849131, 0.416724809, -0.3611333765, 0.1873416417, 0.3954297505, 0.03781635481,
                  -0.1879884737, 0.3881829804, -0.7954498634, -0.1258297596, -0.009238445573, -0.614471457});
  }
}

// Reference: Hugging Face PEFT, tests/reference/dora_values.py. Each step's dropout begins at a seed of its
// own.
TEST_CASE("DoRA trains as Hugging Face's does, with dropout and without", "[dora]") {
  const auto train = [](double dropout) {
    auto site = filled(peft::Linear(4, 3));
    const auto piece = filled_dora(*site, LoraOptions(2).alpha(3).dropout(dropout), 3);
    peft::AdamW optimizer(peft::adapter(*site, "default"),
                          torch::optim::AdamWOptions(0.05).weight_decay(0.01));
    for (uint64_t step = 0; step < 12; ++step) {
      optimizer.zero_grad();
      torch::manual_seed(step);
      (site->forward(fill({2, 4}, 5)) - fill({2, 3}, 6)).square().mean().backward();
      optimizer.step();
    }
    return piece;
  };
  const auto plain = train(0.0);
  check_values(plain->lora->lora_A, {0.01853345793, -0.4416681895, 0.9005057966, 0.01907570687, -0.4484662711,
                                     0.9540387339, -0.7593753265, -0.3186432544});
  check_values(plain->lora->lora_B,
               {0.5508212685, -0.145219648, -0.8368405911, 0.4051529064, 0.4673995077, -0.7612216056});
  check_values(plain->lora_magnitude_vector, {0.07634989619, 0.8704207718, 0.3579889764});
  const auto dropped = train(0.25);
  check_values(dropped->lora->lora_A, {-0.04890966785, -0.4349994961, 0.8805268125, 0.03366140507,
                                       -0.3483884385, 0.9107736223, -0.7578664537, -0.2533223878});
  check_values(dropped->lora->lora_B,
               {0.5309582628, -0.01505879, -0.8053571321, 0.3887707337, 0.7022990796, -0.7450697342});
  check_values(dropped->lora_magnitude_vector, {0.08712995472, 0.8651866532, 0.3848245537});
}

TEST_CASE("DoRA under dropout scales the untouched weight's product with the dropped input", "[dora]") {
  auto site = filled(peft::Linear(4, 3));
  const auto init = GENERATE(LoraInit::kaiming, LoraInit::pissa, LoraInit::loftq);
  const auto piece = filled_dora(*site, LoraOptions(2).alpha(3).dropout(0.5).init(init), 3);
  torch::NoGradGuard no_grad;
  const auto x = fill({2, 4}, 5);
  torch::manual_seed(1);
  const auto y = site->forward(x);
  torch::manual_seed(1);
  const auto dropped = torch::dropout(x, 0.5, true);
  const auto& lora = *piece->lora;
  // The base as the reference has it: with PiSSA less its start, with LoftQ quantised.
  auto W = lora.loftq_weight.defined() ? lora.loftq_weight : site->base->weight;
  if (lora.lora_A_0.defined()) W = W - lora.lora_B_0.mm(lora.lora_A_0) * lora.scaling();
  const auto BA = lora.lora_B.mm(lora.lora_A) * lora.scaling();
  const auto c = piece->lora_magnitude_vector / (W + BA).norm(2, 1);
  const auto expected =
      at::linear(x, W, site->base->bias) + (c - 1) * at::linear(dropped, W) + c * at::linear(dropped, BA);
  CHECK(largest(y, expected) < 1e-12);
}

TEST_CASE("DoRA on a half-precision base keeps its norm in float32", "[dora]") {
  torch::manual_seed(2);
  const auto type = GENERATE(torch::kFloat16, torch::kBFloat16);
  peft::Linear site(16, 8);
  site->to(type);
  const auto piece = peft::add_adapter(*site, DoraOptions(4), peft::all()).layers<peft::DoraImpl>().at(0);
  CHECK(piece->lora_magnitude_vector.scalar_type() == torch::kFloat32);
  const auto norm = site->base->weight.to(torch::kFloat32).norm(2, 1);
  CHECK(torch::equal(piece->lora_magnitude_vector, norm.to(type).to(torch::kFloat32)));
  const auto W = peft::adapter(*site, "default").effective_delta("");
  CHECK(W.scalar_type() == type);
}

TEST_CASE("DoRA works on a layer that runs on weights alone", "[dora]") {
  torch::manual_seed(3);
  peft::LSTM lstm(4, 3);
  lstm->to(torch::kFloat64);
  const auto x = torch::randn({5, 2, 4}, torch::kFloat64);
  const auto run = [&] { return std::get<0>(lstm->forward(x)); };
  const auto plain = run().detach();
  auto adapter = peft::add_adapter(*lstm, DoraOptions(2), peft::all());
  CHECK(adapter.count() == 2 * (4 + 12) + 12 + 2 * (3 + 12) + 12);
  CHECK(largest(run().detach(), plain) < 1e-12);
  shake(adapter);
  const auto adapted = run();
  CHECK(largest(adapted.detach(), plain) > 1e-3);
  adapted.sum().backward();
  for (const auto& tensor : adapter.parameters()) CHECK(tensor.grad().defined());
  peft::merge(*lstm);
  CHECK(largest(run().detach(), adapted.detach()) < 1e-12);
}

TEST_CASE("DoRA gives in fast forms what it gives in plain ones", "[dora]") {
  torch::manual_seed(4);
  const auto type = torch::kFloat64;
  const auto x = torch::randn({2, 70, 6}, type).requires_grad_(GENERATE(true, false));
  const auto same = [&](auto& site) { return fast_error(site, x) < 1e-11; };
  const auto by_node = [&](auto& site) {
    return site->forward(x).grad_fn()->name() == "ScaledColumnsBackward";
  };
  peft::Linear site(6, 9);
  site->to(type);
  SECTION("with any start, dropped or not, at any strength, in both modes") {
    for (const auto init : {LoraInit::random, LoraInit::pissa, LoraInit::loftq}) {
      for (const double dropout : {0.0, 0.4}) {
        auto adapter = peft::add_adapter(
            *site, DoraOptions(LoraOptions(3).alpha(5).init(init).dropout(dropout)), peft::all());
        shake(adapter);
        site->train();
        CHECK(same(site));
        const bool composed = init == LoraInit::loftq || (init == LoraInit::pissa && dropout > 0);
        CHECK(by_node(site) != composed);
        adapter.scale(0.3);
        CHECK(same(site));
        site->eval();
        CHECK(same(site));
        peft::merge(*site);
        CHECK(same(site));
        peft::unmerge(*site);
        CHECK(same(site));
        peft::remove_adapter(*site, "default");
      }
    }
  }
  SECTION("with some tensors frozen") {
    const auto adapter = peft::add_adapter(*site, DoraOptions(LoraOptions(2)), peft::all());
    shake(adapter);
    const auto piece = adapter.layers<peft::DoraImpl>().at(0);
    piece->lora_magnitude_vector.set_requires_grad(false);
    CHECK(same(site));
    CHECK_FALSE(by_node(site));  // nothing to sum
    piece->lora->lora_A.set_requires_grad(false);
    piece->lora_magnitude_vector.set_requires_grad(true);
    CHECK(same(site));
    CHECK(by_node(site));
  }
  SECTION("with a trained weight or bias") {
    shake(peft::add_adapter(*site, DoraOptions(LoraOptions(2)), peft::all()));
    site->base->bias.set_requires_grad(true);
    CHECK(same(site));
    CHECK_FALSE(by_node(site));
    site->base->weight.set_requires_grad(true);
    CHECK(same(site));
  }
  SECTION("several on one layer, and other methods under it") {
    shake(peft::add_adapter(*site, DoraOptions(LoraOptions(2)), peft::all(), "one"));
    shake(peft::add_adapter(*site, DoraOptions(LoraOptions(3)), peft::all(), "two"));
    CHECK(same(site));
    peft::set_active(*site, {"two"});
    CHECK(same(site));
    shake(peft::add_adapter(*site, peft::Ia3Options(), peft::all(), "three"));
    peft::set_active(*site, {"three", "one"});
    CHECK(same(site));
  }
  SECTION("on a layer that is stored the other way, of stacked projections, without a bias") {
    peft::Conv1D turned(6, 9);
    turned->to(type);
    shake(peft::add_adapter(*turned, DoraOptions(LoraOptions(2)), peft::all()));
    CHECK(same(turned));
    CHECK(by_node(turned));
    shake(peft::add_adapter(*site, DoraOptions(LoraOptions(2).enable({true, false, true})), peft::all()));
    CHECK(same(site));
    CHECK(by_node(site));
    peft::Linear bare(nn::LinearOptions(6, 9).bias(false));
    bare->to(type);
    shake(peft::add_adapter(*bare, DoraOptions(LoraOptions(2)), peft::all()));
    CHECK(same(bare));
    CHECK(by_node(bare));
  }
}

TEST_CASE("DoRA trains alike in fast and in plain forms", "[dora]") {
  for (const double dropout : {0.0, 0.2}) {
    const DoraOptions options(LoraOptions(4).alpha(8).dropout(dropout));
    CHECK(training_error(options, torch::kFloat64) < 1e-12);
    CHECK(training_error(options, torch::kFloat32) < 5e-5);
  }
}

TEST_CASE("DoRA runs in a half-precision base's type, close to float32", "[dora]") {
  torch::manual_seed(6);
  peft::Linear site(32, 24);
  site->to(torch::kBFloat16);
  shake(peft::add_adapter(*site, DoraOptions(4), peft::all()));
  const auto x = torch::randn({5, 32}, torch::kBFloat16).requires_grad_();
  CHECK(site->forward(x).scalar_type() == torch::kBFloat16);
  CHECK(fast_error(site, x, /*twice=*/false) < 0.03);
}

namespace {

/// How many matrix products a forward makes.
template <class Site>
int products(Site& site, const Tensor& x) {
  static thread_local int count = 0;
  count = 0;
  const auto note = [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
    const std::string name = function.name();
    if (name == "aten::mm" || name == "aten::addmm" || name == "aten::addmm_") ++count;
    return nullptr;
  };
  const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback(note));
  static_cast<void>(site->forward(x));
  at::removeCallback(handle);
  return count;
}

}  // namespace

TEST_CASE("DoRA measures its rows anew only when they changed", "[dora]") {
  torch::manual_seed(7);
  const bool turned = GENERATE(false, true);
  const auto run = [](auto site, auto other) {
    shake(peft::add_adapter(*site, DoraOptions(2), peft::all()));
    auto adapter = peft::adapter(*site, "default");
    const auto piece = adapter.template layers<peft::DoraImpl>().at(0);
    const auto x = torch::randn({3, 6});
    const auto again = [&] {
      const auto first = products(site, x), second = products(site, x);
      CHECK(fast_error(site, x, false) < 1e-5);
      return first > second;
    };
    CHECK(again());
    CHECK_FALSE(again());
    torch::NoGradGuard no_grad;
    piece->lora_magnitude_vector.mul_(2);
    CHECK_FALSE(again());
    piece->lora->lora_A.mul_(1.5);
    CHECK(again());
    piece->lora->lora_B.set_data(torch::randn_like(piece->lora->lora_B));
    CHECK(again());
    adapter.scale(0.5);
    CHECK(again());
    adapter.scale(0.5);
    CHECK_FALSE(again());
    site->base->weight.mul_(0.7);
    CHECK(again());
    site->base->weight.set_data(other->base->weight);
    CHECK(again());
    const auto copy = std::dynamic_pointer_cast<typename decltype(site)::Impl>(site->clone());
    copy->base->weight.mul_(3);
    CHECK(fast_error(copy, x, false) < 1e-5);
    CHECK_FALSE(again());
    site->to(torch::kFloat64);
    CHECK(fast_error(site, x.to(torch::kFloat64), false) < 1e-12);
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.1));
    {
      const torch::AutoGradMode with_history(true);
      site->forward(x.to(torch::kFloat64)).square().sum().backward();
    }
    optimizer.step();
    CHECK(fast_error(site, x.to(torch::kFloat64), false) < 1e-12);
  };
  if (turned) {
    run(peft::Conv1D(6, 4), peft::Conv1D(6, 4));
  } else {
    run(peft::Linear(6, 4), peft::Linear(6, 4));
  }
}

TEST_CASE("DoRA measures its rows exactly under autocast", "[dora]") {
  torch::manual_seed(7);
  const auto run = [](auto site, const Tensor& x) {
    shake(peft::add_adapter(*site, DoraOptions(2), peft::all()));
    site->base->weight.requires_grad_(false);
    const auto fresh = std::dynamic_pointer_cast<typename decltype(site)::Impl>(site->clone());
    const auto expected = fresh->forward(x);
    {
      const peft::Autocast autocast(torch::kCPU, torch::kBFloat16);
      CHECK(largest(site->forward(x).to(torch::kFloat32), expected) < 0.05);
    }
    CHECK(largest(site->forward(x), expected) < 1e-6);  // the norm that was kept
  };
  run(peft::Linear(6, 4), torch::randn({3, 6}));
  run(peft::Conv2d(nn::Conv2dOptions(2, 4, 3)), torch::randn({2, 2, 5, 5}));
}

TEST_CASE("DoRA runs in inference mode before and after training", "[dora]") {
  torch::manual_seed(8);
  peft::Linear site(6, 4);
  shake(peft::add_adapter(*site, DoraOptions(2), peft::all()));
  const auto x = torch::randn({3, 6});
  Tensor y;
  {
    const c10::InferenceMode inference;
    y = site->forward(x).clone();
  }
  const auto trained = site->forward(x);
  CHECK(largest(trained.detach(), y) < 1e-6);
  CHECK_NOTHROW(trained.sum().backward());
  const c10::InferenceMode inference;
  CHECK(largest(site->forward(x), y) < 1e-6);
}

TEST_CASE("DoRA is not part of a batch of mixed adapters", "[dora]") {
  peft::Linear site(6, 4);
  peft::add_adapter(*site, LoraOptions(2), peft::all(), "plain");
  peft::add_adapter(*site, DoraOptions(2), peft::all(), "long");
  site->eval();
  const auto x = torch::randn({2, 6});
  {
    const peft::RowAdapters rows({"plain", "__base__"});
    CHECK_NOTHROW(site->forward(x));
  }
  const peft::RowAdapters rows({"plain", "long"});
  CHECK_THROWS_WITH(site->forward(x), Contains("carries DoRA, which cannot take part in a batch of mixed"));
}

TEST_CASE("DoRA names the option that is out of range and the layer that cannot take it", "[dora]") {
  peft::Linear site(6, 4);
  const auto add = [&](const LoraOptions& options) {
    peft::add_adapter(*site, DoraOptions(options), peft::named({""}));
  };
  CHECK_THROWS_WITH(add(LoraOptions(0)), Contains("rank must be positive, but got 0"));
  CHECK_THROWS_WITH(add(LoraOptions(2).lora_bias(true)), Contains("lora_bias must be false, but got true"));
  CHECK_THROWS_WITH(add(LoraOptions(2).init(LoraInit::mica)), Contains("init must not be mica"));
  CHECK(site->adapters().empty());
  nn::Sequential model;
  model->push_back("conv", peft::Conv2d(nn::Conv2dOptions(4, 6, 3).groups(2)));
  CHECK_THROWS_WITH(peft::add_adapter(*model, DoraOptions(2), peft::named({"conv"})),
                    Contains("of 2 groups has no DoRA"));
}
