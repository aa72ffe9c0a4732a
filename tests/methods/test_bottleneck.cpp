#include <cmath>

#include "methods/bottleneck_values.h"
#include "methods/fast_case.h"
#include "models/tiny_bert.h"
#include "peft/core/conv1d.h"
#include "peft/kernels/bottleneck_node.h"
#include "peft/methods/layer_norm_tuning.h"
#include "peft/methods/lora.h"
#include "peft/models/gpt2.h"
#include "property_suite.h"

using namespace suite;
using peft::BottleneckInit;
using peft::BottleneckOptions;
using peft::BottleneckResidual;
using peft::JoinRole;

namespace {

/// A layer the library does not know.
struct UnknownImpl : nn::Cloneable<UnknownImpl> {
  explicit UnknownImpl(int64_t channels) : width(channels) { reset(); }
  void reset() override { inner = register_module("inner", nn::Linear(width, width)); }
  Tensor forward(const Tensor& x) { return inner->forward(x).tanh(); }
  int64_t width;
  nn::Linear inner{nullptr};
};
TORCH_MODULE(Unknown);

/// A sublayer joined without a norm.
struct BlockImpl : nn::Cloneable<BlockImpl> {
  BlockImpl() { reset(); }
  void reset() override {
    norm = register_module("norm", peft::LayerNorm(nn::LayerNormOptions({6})));
    join = register_module("join", peft::BareResidual(peft::ResidualOptions(6)));
  }
  Tensor forward(const Tensor& x) { return join->forward(norm->forward(x), x); }
  peft::LayerNorm norm{nullptr};
  peft::BareResidual join{nullptr};
};
struct Block : nn::ModuleHolder<BlockImpl> {
  using nn::ModuleHolder<BlockImpl>::ModuleHolder;
  using Impl = BlockImpl;
};

Promise bottleneck(const BottleneckOptions& options, peft::Target target = peft::all()) {
  return {{peft::on(options, std::move(target))},
          [options](const peft::SiteInfo& site) {
            const auto d = site.width ? site.width : options.width();
            const auto m = peft::bottleneck_size(options, site, d);
            int64_t count = 2 * d * m + m + d;
            if (options.trained_scaling() == peft::TrainedScaling::scalar) count += 1;
            if (options.trained_scaling() == peft::TrainedScaling::channel) count += d;
            if (options.gating()) count += d + 1;
            return count + (options.ln_before() ? 2 * d : 0) + (options.ln_after() ? 2 * d : 0);
          },
          options.init_weights() == BottleneckInit::mam_adapter && !options.ln_after(),
          /*whole_gradient=*/true,
          suite::never};
}

BottleneckOptions smooth() { return BottleneckOptions().reduction_factor(2).non_linearity("gelu_new"); }

/// Every placement and every part.
std::vector<BottleneckOptions> variants() {
  return {
      smooth(),
      smooth().original_ln_before(true).init_weights(BottleneckInit::mam_adapter),
      smooth().parallel(true).scaling(4).init_weights(BottleneckInit::mam_adapter).gating(true),
      smooth().parallel(true).trained_scaling(peft::TrainedScaling::scalar).ln_before(true).ln_after(true),
      smooth()
          .original_ln_before(true)
          .original_ln_after(false)
          .residual(BottleneckResidual::input)
          .trained_scaling(peft::TrainedScaling::channel)
          .init_weights(BottleneckInit::houlsby),
      smooth()
          .original_ln_before(true)
          .residual(BottleneckResidual::sum)
          .ln_after(true)
          .adapter_residual_before_ln(true)
          .gating(true),
      BottleneckOptions(5).non_linearity("swish").ln_before(true).ln_after(true).init_weights_seed(3),
  };
}

std::vector<std::string> sites_of(const peft::BottleneckOptions& options) {
  peft::models::BertModel model(peft_test::tiny());
  return peft::add_adapter(*model, options, "one").sites();
}

std::string complaint(const std::function<void()>& call) { return peft_test::complaint(call); }

}  // namespace

TEST_CASE("Bottlenecks keep the promises of a method at joins", "[bottleneck]") {
  const auto x = torch::randn({2, 3, 6}, torch::kFloat64);
  for (const auto& options : variants()) {
    check_properties(layer<peft::Residual>("Residual", x, nn::LayerNormOptions({6})), bottleneck(options));
    check_properties(layer<Block>("BareResidual", x), bottleneck(options, peft::named({"join"})));
  }
}

TEST_CASE("Bottlenecks keep the promises of a method on layers", "[bottleneck]") {
  torch::manual_seed(5);
  const auto x = torch::randn({2, 3, 6}, torch::kFloat64);
  for (const auto& options : variants()) {
    if (options.residual() != BottleneckResidual::output) continue;
    check_properties(layer<peft::Adapted<Unknown>>("a layer of the user's", x, 6),
                     bottleneck(BottleneckOptions(options).width(6)));
    check_properties(layer<peft::Linear>("Linear", x, 6, 6), bottleneck(options));
  }
  const auto options = smooth();
  check_properties(layer<peft::Linear>("Linear of other widths", x, 6, 8), bottleneck(options));
  check_properties(layer<peft::LayerNorm>("LayerNorm", x, nn::LayerNormOptions({6})), bottleneck(options));
  check_properties(layer<peft::Embedding>("Embedding", torch::tensor({{0, 3, 4}, {2, 2, 6}}), 7, 5),
                   bottleneck(options));
  check_properties(layer<peft::Conv1D>("Conv1D", x, 6, 6), bottleneck(smooth().parallel(true)));
}

TEST_CASE("Bottlenecks give in fast forms what they give in plain ones", "[bottleneck]") {
  torch::manual_seed(6);
  const auto type = torch::kFloat64;
  const auto x = torch::randn({3, 5, 6}, type).requires_grad_(GENERATE(true, false));
  const auto same = [&](auto& site) { return fast_error(site, x) < 1e-11; };
  const auto options = BottleneckOptions(4).scaling(0.7).init_weights(BottleneckInit::houlsby);
  const auto by_node = [&](auto& site) { return run_on(site, x).grad_fn()->name() == "BottleneckBackward"; };
  SECTION("on layers, with every activation, in both modes") {
    for (const auto& [name, function] : peft::activation_functions()) {
      INFO(name);
      const bool smooth = peft::internal::smooth_function(name).has_value();
      for (const bool parallel : {false, true}) {
        peft::Linear site(6, 6);
        site->to(type);
        shake(peft::add_adapter(*site, BottleneckOptions(options).non_linearity(name).parallel(parallel),
                                peft::all()));
        CHECK(by_node(site) == smooth);
        CHECK(same(site));
        site->eval();
        CHECK(same(site));
      }
    }
  }
  SECTION("at joins, with every part") {
    auto all = variants();
    all.push_back(options);
    all.push_back(BottleneckOptions(options).residual(BottleneckResidual::input));
    all.push_back(BottleneckOptions(options).original_ln_before(true));
    all.push_back(BottleneckOptions(options).original_ln_before(true).original_ln_after(false).residual(
        BottleneckResidual::sum));
    all.push_back(BottleneckOptions(options).parallel(true).original_ln_after(false));
    for (const auto& one : all) {
      peft::Residual norm{nn::LayerNormOptions({6})};
      norm->to(type);
      Block block;
      block->to(type);
      peft::BareResidual bare{peft::ResidualOptions(6)};
      bare->set_surroundings(type, torch::kCPU);
      shake(peft::add_adapter(*norm, one, peft::all()));
      shake(peft::add_adapter(*block, one, peft::named({"join"})));
      shake(peft::add_adapter(*bare, one, peft::all()));
      CHECK(same(norm));
      CHECK(same(block));
      CHECK(same(bare));
    }
  }
  SECTION("with dropout, which is composed in training") {
    for (const auto& dropped :
         {BottleneckOptions(options).dropout(0.3), BottleneckOptions(options).hidden_dropout(0.3),
          BottleneckOptions(options).stochastic_depth(0.3)}) {
      peft::Linear site(6, 6);
      site->to(type);
      shake(peft::add_adapter(*site, dropped, peft::all()));
      site->train();
      CHECK_FALSE(by_node(site));
      CHECK(same(site));
      site->eval();
      CHECK(by_node(site));
      CHECK(same(site));
    }
  }
  SECTION("with some tensors frozen, and several on one layer") {
    peft::Linear site(6, 6);
    site->to(type);
    const auto adapter = peft::add_adapter(*site, options, peft::all(), "one");
    shake(adapter);
    for (auto& [name, tensor] : adapter.named_parameters()) {
      tensor.set_requires_grad(false);
      CHECK(same(site));
    }
    shake(peft::add_adapter(*site, BottleneckOptions(options).parallel(true), peft::all(), "two"));
    peft::set_active(*site, {"one", "two"});
    CHECK(same(site));
    site->base->weight.set_requires_grad(true);
    CHECK(same(site));
  }
  SECTION("on a base in half precision, which is composed") {
    peft::Linear site(6, 6);
    site->to(torch::kBFloat16);
    shake(peft::add_adapter(*site, options, peft::all()));
    const auto half = x.detach().to(torch::kBFloat16).requires_grad_();
    CHECK_FALSE(site->forward(half).grad_fn()->name() == "BottleneckBackward");
    CHECK(fast_error(site, half, /*twice=*/false) == 0);
  }
}

TEST_CASE("Bottlenecks train alike in fast and in plain forms", "[bottleneck]") {
  for (const char* name : {"relu", "gelu"}) {
    const auto options =
        BottleneckOptions(6).non_linearity(name).scaling(2).init_weights(BottleneckInit::mam_adapter);
    CHECK(training_error(options, torch::kFloat64) < 1e-12);
    CHECK(training_error(options, torch::kFloat32) < 5e-5);
  }
}

TEST_CASE("The bottleneck node notices tensors that changed and a second backward", "[bottleneck]") {
  torch::manual_seed(7);
  const auto h = torch::randn({3, 6}), r = torch::randn({3, 6});
  const auto trained = [](at::IntArrayRef shape) { return torch::randn(shape).requires_grad_(); };
  const peft::internal::BottleneckTensors tensors{trained({2, 6}), trained({2}), trained({6, 2}),
                                                  trained({6})};
  const auto loss = [&] {
    return peft::internal::bottleneck(h, r, tensors, 1, *peft::internal::smooth_function("tanh"))->sum();
  };
  for (const auto& tensor : {h, tensors.down, tensors.up}) {
    const auto before = loss();
    {
      torch::NoGradGuard no_grad;
      Tensor(tensor).add_(1);
    }
    CHECK_THROWS_WITH(before.backward(), Contains("modified by an inplace operation"));
  }
  const auto twice = loss();
  twice.backward({}, /*retain_graph=*/true);
  CHECK_NOTHROW(twice.backward());
  CHECK_THROWS_WITH(twice.backward(), Contains("backward through the graph a second time"));
  const auto outer =
      peft::internal::bottleneck(h.narrow(1, 0, 5), r, tensors, 1, *peft::internal::smooth_function("tanh"));
  CHECK_FALSE(outer);
  const torch::NoGradGuard no_grad;
  CHECK_FALSE(loss().requires_grad());
}

TEST_CASE("On a layer a bottleneck follows the output or stands beside it", "[bottleneck]") {
  torch::manual_seed(5);
  const auto x = torch::randn({2, 6});
  for (const bool parallel : {false, true}) {
    peft::Linear site(6, 6);
    const auto plain = site->forward(x);
    const auto adapter =
        peft::add_adapter(*site, BottleneckOptions(3).non_linearity("tanh").parallel(parallel), peft::all());
    shake(adapter);
    const auto tensors = adapter.named_parameters();
    const auto h = parallel ? x : plain;
    const auto z = at::linear(at::linear(h, tensors[0].second, tensors[1].second).tanh(), tensors[2].second,
                              tensors[3].second);
    CHECK(largest(site->forward(x).detach(), (plain + z).detach()) < 1e-6);
  }
}

// Reference: AdapterHub's adapters, tests/reference/bottleneck_values.py.
TEST_CASE("Bottlenecks equal AdapterHub's numbers", "[bottleneck]") {
  check_join("houlsby", residual(), peft::houlsby().reduction_factor(2),
             {{0,
               0,
               -0.01804867573,
               -0.01217328478,
               -0.02893360704,
               0.04437595978,
               0.008440205827,
               0.005138488486,
               -0.04773842171,
               -0.01009494066,
               0,
               0,
               0,
               0,
               0.02046002634,
               0.02104685083,
               -0.006085806992,
               -0.001828772132,
               -0.002048481954,
               0.02147890627,
               0.01834945939,
               0.01079477277},
              {-1.425200105, 2.030814886, -0.1754084677, -0.6846693158, 0.3303173482, -0.394744426,
               -1.441854358, 1.251512647},
              {-1.4171083756659, 1.3568937839465, 0.27986867341409, -0.85138798119144, 0.33839344137029,
               -1.2352535121432, -1.0750231113874, 1.3530286132595}});
  check_join("pfeiffer", residual(), peft::pfeiffer().reduction_factor(2),
             {{0,
               0,
               -0.01804867573,
               -0.01217328478,
               -0.02893360704,
               0.04437595978,
               0.008440205827,
               0.005138488486,
               -0.04773842171,
               -0.01009494066,
               0,
               0,
               0,
               0,
               0.02046002634,
               0.02104685083,
               -0.006085806992,
               -0.001828772132,
               -0.002048481954,
               0.02147890627,
               0.01834945939,
               0.01079477277},
              {-1.425241828, 2.030286312, -0.1748792082, -0.6850101948, 0.3342332542, -0.4027175307,
               -1.439964414, 1.250670314},
              {-1.3320702516532, 1.1714173178491, 0.37533675110568, -0.94301836358052, 0.37587460518652,
               -1.2144862893735, -1.0960412807658, 1.3272284036832}});
  check_join("pfeiffer without a norm", peft::BareResidual(peft::ResidualOptions(4)),
             peft::pfeiffer().reduction_factor(2),
             {{0,
               0,
               -0.01804867573,
               -0.01217328478,
               -0.02893360704,
               0.04437595978,
               0.008440205827,
               0.005138488486,
               -0.04773842171,
               -0.01009494066,
               0,
               0,
               0,
               0,
               0.02046002634,
               0.02104685083,
               -0.006085806992,
               -0.001828772132,
               -0.002048481954,
               0.02147890627,
               0.01834945939,
               0.01079477277},
              {-0.569903791, 0.1699916422, -0.09990179539, -0.3699506521, 0.3705828786, 0.0998532176,
               -0.1699168831, 0.570474267},
              {-0.39479623543674, -0.011869347691015, 0.080748101212947, -0.49138383664108, 0.5040585677901,
               -0.044656755847472, -0.026012272968069, 0.43861508790933}});
  check_join("parallel", residual(), peft::parallel_adapter(),
             {{0,
               0,
               0.4493049979,
               -0.4878913164,
               -0.3191227913,
               -0.3122848272,
               -0.2072553039,
               0.09969866276,
               -0.3787447214,
               -0.385204196,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0},
              {-1.425240636, 2.030659914, -0.1752685606, -0.684714973, 0.3300686777, -0.3942002058,
               -1.441986561, 1.251554132},
              {-0.84982650630026, -0.59828997348776, 0.7398126588281, -0.6189809521269, 1.4045431618916,
               -1.2132801546843, -0.65512815047645, -0.48241884552452}});
  check_join("scaled_parallel, gated, normed", residual(),
             peft::scaled_parallel_adapter().gating(true).ln_before(true).ln_after(true),
             {{0,
               0,
               0.09969866276,
               -0.3787447214,
               -0.385204196,
               -0.2391203642,
               0.3051719069,
               -0.3606379032,
               -0.4484481215,
               -0.4333541989,
               0,
               0,
               0,
               0,
               1,
               1,
               1,
               1,
               0,
               0,
               0,
               0,
               1,
               1,
               1,
               1,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0,
               0.005202568136,
               0.001048769453,
               0.01867466234,
               0.009805350564,
               1},
              {-1.425240636, 2.030659914, -0.1752685606, -0.684714973, 0.3300686777, -0.3942002058,
               -1.441986561, 1.251554132},
              {-0.97685480305365, -0.26691908969931, 0.7251952677126, -0.72111535404806, -0.68718048820076,
               -1.1051102864251, 0.70021902288526, -0.33317308792906}});
  check_join("adapter_plus", residual(), peft::adapter_plus().reduction_factor(2).stochastic_depth(0),
             {{0,
               0,
               -0.009024337865,
               -0.006086642388,
               -0.01446680352,
               -0.0009143860661,
               0.004220102914,
               0.002569244243,
               0.009174729697,
               -0.005047470331,
               0,
               0,
               0,
               0,
               -0.01168566942,
               -0.005476221442,
               -0.004316214938,
               -0.01860616542,
               0.0008905202849,
               0.0002392577007,
               0.004344374873,
               0.003065000288,
               1,
               1,
               1,
               1},
              {-1.425264955, 2.030642271, -0.1752668023, -0.6847053766, 0.3300068378, -0.3940665424,
               -1.441980124, 1.251567364},
              {-1.1868579800581, 1.7578314765883, -0.09573519088116, -0.74790845193569, 0.43616059730814,
               -0.51200652819554, -1.2363171980147, 1.0540940294704}});
  check_join("post_add, gated, normed after the residual", residual(),
             peft::pfeiffer()
                 .reduction_factor(1.5)
                 .residual(peft::BottleneckResidual::sum)
                 .gating(true)
                 .init_weights(peft::BottleneckInit::houlsby)
                 .ln_after(true)
                 .adapter_residual_before_ln(true)
                 .non_linearity("leakyrelu")
                 .init_weights_seed(5),
             {{0,
               0,
               -0.004867807496,
               -0.006038215943,
               -0.00558096217,
               0.006675242912,
               -0.001974151004,
               0.01942783594,
               -0.01401702035,
               -0.007625571452,
               0,
               0,
               0,
               0,
               1,
               1,
               1,
               1,
               0,
               0,
               0,
               0,
               0.00631213421,
               -0.008991351351,
               -0.00557793444,
               0.006907187868,
               0.00222458574,
               -0.006662252825,
               0.006846421864,
               0.005740015768,
               -0.2072553039,
               0.4493049979,
               -0.4878913164,
               -0.3191227913,
               -0.3122848272},
              {-1.350952029, 2.238591909, -0.4064046144, -0.5793893337, 0.3997551501, -0.7798618674,
               -1.31136024, 1.28296566},
              {-1.554446951502, 1.7661828434963, -0.011527366845722, -0.58129147169805, 0.46637778398919,
               -0.97425402482388, -1.2375884293581, 1.2519326790911}});
}

TEST_CASE("Two active bottlenecks follow each other and join once", "[bottleneck]") {
  torch::manual_seed(5);
  const auto output = torch::randn({1, 2, 4}), skip = torch::randn({1, 2, 4});
  auto site = residual();
  shake(peft::add_adapter(*site, peft::pfeiffer().reduction_factor(2), peft::all(), "lower"));
  shake(peft::add_adapter(*site, peft::houlsby().reduction_factor(2), peft::all(), "upper"));
  const auto both = site->forward(output, skip);
  const auto z = [&](const std::string& name, const Tensor& h) {
    return peft::adapter(*site, name).layers<peft::BottleneckImpl>().front()->scaled(h);
  };
  const auto off = peft::disabled(*site);
  const auto norm = [&](const Tensor& sum) { return site->forward(sum, torch::zeros_like(sum)); };
  const auto lower = z("lower", norm(output + skip)) + output;
  CHECK(largest(both.detach(), norm(z("upper", lower) + lower + skip).detach()) < 1e-6);
}

TEST_CASE("Named configurations go where AdapterHub puts them", "[bottleneck]") {
  const std::vector<std::string> attention{"encoder.layer.0.attention.output.LayerNorm",
                                           "encoder.layer.1.attention.output.LayerNorm"};
  const std::vector<std::string> feed_forward{"encoder.layer.0.output.LayerNorm",
                                              "encoder.layer.1.output.LayerNorm"};
  for (const auto& options : {peft::pfeiffer(), peft::parallel_adapter(), peft::scaled_parallel_adapter(),
                              peft::adapter_plus(), peft::unified_view_adapter(3)}) {
    CHECK(sites_of(options) == feed_forward);
  }
  CHECK(sites_of(peft::houlsby()) ==
        std::vector<std::string>{attention[0], feed_forward[0], attention[1], feed_forward[1]});
  CHECK(sites_of(peft::houlsby().leave_out({0})) == std::vector<std::string>{attention[1], feed_forward[1]});
  CHECK(sites_of(peft::houlsby().places({JoinRole::attention})) == attention);

  peft::models::GPT2Config config;
  config.vocab_size(20).n_embd(8).n_layer(2).n_head(2).n_positions(10);
  peft::models::GPT2Model gpt2(config);
  CHECK(peft::add_adapter(*gpt2, peft::houlsby(), "one").sites() ==
        std::vector<std::string>{"h.0.attn_residual", "h.0.mlp_residual", "h.1.attn_residual",
                                 "h.1.mlp_residual"});
  CHECK(peft::add_adapter(*gpt2, peft::pfeiffer().leave_out({1}), "two").sites() ==
        std::vector<std::string>{"h.0.mlp_residual"});
}

TEST_CASE("A bottleneck's size follows from a factor, of its layer, or is given", "[bottleneck]") {
  peft::SiteInfo site;
  const auto size = [&](const BottleneckOptions& options) {
    return peft::bottleneck_size(options, site, 768);
  };
  CHECK(size(peft::houlsby()) == 48);
  CHECK(size(peft::adapter_plus()) == 8);
  CHECK(size(BottleneckOptions().reduction_factor(5)) == 153);
  CHECK(size(BottleneckOptions().reduction_factor(1.5)) == 512);
  CHECK(size(BottleneckOptions().reduction_factor(0.5)) == 1536);
  CHECK(size(BottleneckOptions().reduction_factor(0.1)) == 7679);  // Python's 768 // 0.1
  CHECK(size(BottleneckOptions().reduction_factor(1000)) == 1);
  CHECK(size(BottleneckOptions(512)) == 512);
  const auto layers = BottleneckOptions().layer_factors({{1, 4}});
  site.join = peft::JoinPlace{JoinRole::attention, 0};
  CHECK(size(layers) == 48);
  site.join->layer = 1;
  CHECK(size(layers) == 192);
}

TEST_CASE("A weight method on the norm of a join and a bottleneck go together", "[bottleneck]") {
  torch::manual_seed(5);
  const auto output = torch::randn({1, 2, 4}), skip = torch::randn({1, 2, 4});
  auto site = residual();
  const auto parts = peft::on(peft::pfeiffer().reduction_factor(2), peft::all());
  shake(peft::add_adapter(*site, {parts}, "block"));
  const auto norms =
      peft::add_adapter(*site, {peft::on(peft::LayerNormTuningOptions(), peft::all())}, "norms");
  shake(norms);
  const auto both = site->forward(output, skip).detach();
  peft::set_active(*site, {"norms", "block"});
  CHECK(torch::equal(site->forward(output, skip), both));
  CHECK_THROWS_WITH(peft::merge(*site), Contains("bottleneck works on activations and cannot be merged"));

  // The trained norm counts before the bottleneck and after it.
  auto merged = residual();
  assign(merged->base->weight, norms.named_parameters()[0].second.detach());
  assign(merged->base->bias, norms.named_parameters()[1].second.detach());
  const auto twin = peft::add_adapter(*merged, {parts}, "block");
  const auto from = peft::adapter(*site, "block").parameters();
  for (size_t i = 0; i < from.size(); ++i) assign(twin.parameters()[i], from[i].detach());
  CHECK(largest(merged->forward(output, skip).detach(), both) < 1e-6);

  // One adapter of both, in either order.
  for (const bool first : {true, false}) {
    auto other = residual();
    const auto tuning = peft::on(peft::LayerNormTuningOptions(), peft::all());
    CHECK_NOTHROW(peft::add_adapter(
        *other, first ? std::vector<peft::Part>{tuning, parts} : std::vector<peft::Part>{parts, tuning}));
  }
  // On a layer the bottleneck changes the activations, so weights cannot follow.
  peft::Linear linear(4, 4);
  peft::add_adapter(*linear, BottleneckOptions(2), peft::all(), "block");
  CHECK_THROWS_WITH(peft::add_adapter(*linear, peft::LoraOptions(2), peft::all(), "lora"),
                    Contains("changes weights and cannot come after 'bottleneck'"));
}

TEST_CASE("Dropout and stochastic depth work in training only", "[bottleneck]") {
  torch::manual_seed(5);
  const auto output = torch::randn({64, 2, 4}), skip = torch::randn({64, 2, 4});
  for (const auto& options :
       {BottleneckOptions(4).dropout(0.5), BottleneckOptions(4).hidden_dropout(0.5).non_linearity("sigmoid"),
        BottleneckOptions(4).stochastic_depth(0.5)}) {
    auto site = residual();
    shake(peft::add_adapter(*site, options, peft::all()));
    CHECK(largest(site->forward(output, skip).detach(), site->forward(output, skip).detach()) > 1e-3);
    site->eval();
    CHECK(torch::equal(site->forward(output, skip), site->forward(output, skip)));
  }
  auto site = residual();
  const auto adapter = peft::add_adapter(
      *site, BottleneckOptions(4).stochastic_depth(0.5).original_ln_after(false), peft::all());
  shake(adapter);
  const auto change = (site->forward(output, skip) - output).detach();
  site->eval();
  const auto whole = (site->forward(output, skip) - output).detach();
  int64_t dropped = 0;
  for (int64_t row = 0; row < 64; ++row) {
    const bool gone = largest(change[row], torch::zeros_like(change[row])) < 1e-5;
    dropped += gone;
    if (!gone) CHECK(largest(change[row], 2 * whole[row]) < 1e-5);
  }
  CHECK((dropped > 16 && dropped < 48));
}

TEST_CASE("A bottleneck at a join of half precision stays in float32", "[bottleneck]") {
  torch::manual_seed(5);
  for (auto type : {torch::kBFloat16, torch::kFloat64}) {
    peft::models::BertModel bert(peft_test::tiny());
    bert->to(type);
    peft::models::GPT2Config config;
    config.vocab_size(20).n_embd(8).n_layer(2).n_head(2).n_positions(10);
    peft::models::GPT2Model gpt2(config);
    gpt2->to(type);
    peft::models::GPT2Inputs inputs;
    inputs.input_ids = peft_test::batch().input_ids;
    for (const auto& options : variants()) {
      const auto expected = type == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
      const auto one = peft::add_adapter(*bert, options, "one");
      CHECK(one.parameters().front().scalar_type() == expected);
      CHECK(bert->forward(peft_test::batch()).last_hidden_state.scalar_type() == type);
      peft::remove_adapter(*bert, "one");
      const auto two = peft::add_adapter(*gpt2, options, "two");
      CHECK(two.parameters().front().scalar_type() == expected);
      CHECK(gpt2->forward(inputs).last_hidden_state.scalar_type() == type);
      peft::remove_adapter(*gpt2, "two");
    }
  }
}

TEST_CASE("Rows of one batch may use bottlenecks of their own", "[bottleneck]") {
  torch::manual_seed(5);
  peft::models::BertModel model(peft_test::tiny());
  model->eval();
  shake(peft::add_adapter(*model, peft::houlsby().reduction_factor(2).gating(true), "a"));
  shake(peft::add_adapter(*model, peft::parallel_adapter(), "b"));
  const auto inputs = peft_test::batch();
  const auto alone = [&](const std::vector<std::string>& names) {
    peft::set_active(*model, names);
    return model->forward(inputs).last_hidden_state.detach();
  };
  const auto a = alone({"a"}), b = alone({"b"}), plain = alone({});
  const auto mixed = [&](const std::string& first, const std::string& second) {
    const peft::RowAdapters rows({first, second});
    return model->forward(inputs).last_hidden_state.detach();
  };
  const auto ab = mixed("a", "b"), base = mixed(peft::RowAdapters::base, "a");
  CHECK(largest(ab[0], a[0]) < 1e-5);
  CHECK(largest(ab[1], b[1]) < 1e-5);
  CHECK(largest(base[0], plain[0]) < 1e-5);
  CHECK(largest(base[1], a[1]) < 1e-5);
}

TEST_CASE("Bottlenecks refuse options out of range", "[bottleneck]") {
  const auto of = [](const BottleneckOptions& options) {
    return complaint([&] { peft::on(options, peft::all()); });
  };
  CHECK_THAT(of(BottleneckOptions().reduction_factor(0)),
             Contains("BottleneckOptions: reduction_factor must be positive, but got 0"));
  CHECK_THAT(of(BottleneckOptions().reduction_factor(-2.5)), Contains("but got -2.5"));
  CHECK_THAT(of(BottleneckOptions().layer_factors({{2, 0}})), Contains("factors, but got 0 for layer 2"));
  CHECK_THAT(of(BottleneckOptions(-1)), Contains("size must not be negative, but got -1"));
  CHECK_THAT(of(BottleneckOptions(4).layer_factors({{0, 2}})), Contains("size or layer_factors"));
  CHECK_THAT(of(BottleneckOptions().places({})), Contains("places must not be empty"));
  CHECK_THAT(of(BottleneckOptions().leave_out({-1})), Contains("leave_out must hold indices of layers"));
  CHECK_THAT(of(BottleneckOptions().non_linearity("gleu")),
             Contains("no activation 'gleu'; there are 'gelu'"));
  CHECK_THAT(of(BottleneckOptions().scaling(std::nan(""))), Contains("scaling must be finite"));
  CHECK_THAT(of(peft::parallel_adapter().trained_scaling(peft::TrainedScaling::scalar)),
             Contains("a trained scaling starts at 1, so scaling must be 1, but got 4"));
  CHECK_THAT(of(BottleneckOptions().residual(BottleneckResidual::sum)),
             Contains("residual 'sum' needs original_ln_before"));
  CHECK_THAT(of(BottleneckOptions().dropout(1)), Contains("dropout must be in [0, 1), but got 1"));
  CHECK_THAT(of(BottleneckOptions().hidden_dropout(-1)), Contains("hidden_dropout must be in [0, 1)"));
  CHECK_THAT(of(BottleneckOptions().stochastic_depth(1)), Contains("stochastic_depth must be in [0, 1)"));
  CHECK_THAT(of(BottleneckOptions().init_weights_seed(-1)),
             Contains("init_weights_seed must not be negative"));
}

TEST_CASE("Bottlenecks say why they cannot go somewhere", "[bottleneck]") {
  const auto on_site = [](nn::Module& module, const BottleneckOptions& options) {
    return complaint([&] { peft::add_adapter(module, options, peft::matching(".*")); });
  };
  peft::Linear narrow(6, 4);
  CHECK_THAT(on_site(*narrow, BottleneckOptions().parallel(true)),
             Contains("needs inputs as wide as outputs, but got 6 and 4"));
  CHECK_THAT(on_site(*narrow, BottleneckOptions().width(6)),
             Contains("has activations of width 4, but BottleneckOptions::width is 6"));
  CHECK_THAT(on_site(*narrow, BottleneckOptions().leave_out({1})),
             Contains("leave_out and layer_factors are for joins that know their layer"));
  peft::Embedding words(7, 5);
  CHECK_THAT(on_site(*words, BottleneckOptions().parallel(true)), Contains("reads indices"));
  peft::Conv1d conv(nn::Conv1dOptions(4, 6, 3));
  CHECK_THAT(on_site(*conv, BottleneckOptions().width(6)), Contains("channels in the last dimension"));
  peft::Adapted<Unknown> unknown(6);
  CHECK_THAT(on_site(*unknown, BottleneckOptions()),
             Contains("the width of its activations is not known (hint: BottleneckOptions::width)"));
  peft::add_adapter(*unknown, BottleneckOptions().width(5), peft::all());
  CHECK_THROWS_WITH(unknown->forward(torch::zeros({2, 6})),
                    Contains("activations must have width 5, but got (2, 6)"));
  peft::Linear flat(6, 6);
  peft::add_adapter(*flat, BottleneckOptions(2).gating(true), peft::matching(".*"));
  CHECK_THROWS_WITH(flat->forward(torch::zeros({2, 6})),
                    Contains("a gate needs activations (batch, time, width)"));

  peft::models::BertModel bert(peft_test::tiny());
  CHECK_THAT(complaint([&] {
               peft::add_adapter(*bert, peft::houlsby().leave_out({1}), peft::named({"output.LayerNorm"}));
             }),
             Contains("2 problems") && Contains("encoder.layer.1.output.LayerNorm") &&
                 Contains("layer 1 is left out (leave_out)"));
  CHECK_THAT(complaint([&] { peft::add_adapter(*bert, peft::houlsby(), peft::named({"dropout"})); }),
             Contains("a residual join or a function of one input") || Contains("is a plain"));
  CHECK_THAT(complaint([&] {
               peft::add_adapter(*bert, peft::houlsby(), peft::named({"attention.self.attention"}));
             }),
             Contains("does not offer a residual join or a function of one input"));
  CHECK(peft::internal::adapter_names(*bert).empty());
}
