#include <peft/methods/layer_norm_tuning.h>

#include "methods/reference_values.h"
#include "peft/methods/bias.h"

using namespace suite;
using peft::LayerNormTuningImpl;
using peft::LayerNormTuningOptions;

namespace {

peft::LayerNorm filled_norm() {
  peft::LayerNorm norm(nn::LayerNormOptions({4}));
  norm->to(torch::kFloat64);
  assign(norm->base->weight, fill({4}, 1));
  assign(norm->base->bias, fill({4}, 2));
  return norm;
}

}  // namespace

TEST_CASE("LayerNorm tuning keeps the promises of a method on norms and residual joins", "[ln_tuning]") {
  const Promise promise{{peft::on(LayerNormTuningOptions(), peft::all())}, [](const peft::SiteInfo& site) {
                          return site.weight_shape.at(0) + site.bias_shape.at(0);
                        }};
  for (const auto& layer_case : other_layer_cases()) check_properties(layer_case, promise);
}

// Reference: Hugging Face PEFT, tests/reference/tokens_values.py.
TEST_CASE("LayerNorm tuning equals Hugging Face's numbers", "[ln_tuning]") {
  auto norm = filled_norm();
  const auto adapter = peft::add_adapter(*norm, LayerNormTuningOptions(), peft::all());
  const auto piece = adapter.layers<LayerNormTuningImpl>().at(0);
  const auto x = fill({2, 4}, 5).requires_grad_(true);
  SECTION("output, gradients, merged weights") {
    assign(piece->weight, fill({4}, 3));
    assign(piece->bias, fill({4}, 4));
    const auto y = norm->forward(x);
    check_values(y, {-0.3126424652, 0.3857985476, -0.3800820318, -0.2466642435, 0.05732042736, 0.2980861949,
                     -0.7750231248, 0.004509679482});
    (y * fill({2, 4}, 6)).sum().backward();
    check_values(piece->weight.grad(), {-0.2490930306, -0.7635128915, 0.03607711318, -0.1521682072});
    check_values(piece->bias.grad(), {-0.13, -0.4, 0.34, 0.07});
    check_values(x.grad(), {0.06147149111, -0.1384133777, 0.2601746341, -0.1832327475, -0.09719778086,
                            0.1477630662, 0.1340636131, -0.1846288984});
    peft::merge(*norm);
    CHECK(torch::equal(norm->base->weight, piece->weight));
    CHECK(torch::equal(norm->base->bias, piece->bias));
  }
  SECTION("12 steps of AdamW") {
    const auto target = fill({2, 4}, 6);
    const auto loss = twelve_steps(adapter, [&] {
      return (norm->forward(fill({2, 4}, 5)) - target).square().sum();
    });
    check_values(loss, {0.2478303021});
    check_values(piece->weight, {-0.5416154255, -0.2610131597, 0.07937658612, -0.3729004689});
    check_values(piece->bias, {-0.04818591678, -0.1410810688, 0.1541698963, 0.1576220522});
  }
}

TEST_CASE("LayerNorm tuning goes to the norms of a model, each kind of them, and to nothing else",
          "[ln_tuning]") {
  struct BlockImpl : nn::Module {
    BlockImpl() {
      first = register_module("first", peft::LayerNorm(nn::LayerNormOptions({4})));
      plain = register_module("plain", peft::LayerNorm(nn::LayerNormOptions({4}).elementwise_affine(false)));
      dense = register_module("dense", peft::Linear(4, 4));
      join = register_module("join", peft::Residual(nn::LayerNormOptions({4})));
    }
    peft::LayerNorm first{nullptr}, plain{nullptr};
    peft::Linear dense{nullptr};
    peft::Residual join{nullptr};
  };
  BlockImpl block;
  CHECK_THROWS_WITH(peft::add_adapter(block, LayerNormTuningOptions(), peft::named({"first", "dense"})),
                    Contains("'dense' cannot take 'ln_tuning': a Linear is no norm"));
  CHECK_THROWS_WITH(peft::add_adapter(block, LayerNormTuningOptions(), peft::named({"plain"})),
                    Contains("does not offer weights"));
  const auto adapter = peft::add_adapter(block, LayerNormTuningOptions(), peft::all());
  CHECK(adapter.sites() == std::vector<std::string>{"first", "join"});
  CHECK(adapter.count() == 16);
}

TEST_CASE("LayerNorm tuning of a half-precision norm is in float32, as in Hugging Face's", "[ln_tuning]") {
  const auto type = GENERATE(torch::kBFloat16, torch::kFloat16);
  peft::LayerNorm norm(nn::LayerNormOptions({4}));
  norm->to(type);
  const auto adapter = peft::add_adapter(*norm, LayerNormTuningOptions(), peft::all());
  const auto piece = adapter.layers<LayerNormTuningImpl>().at(0);
  CHECK(piece->weight.scalar_type() == torch::kFloat32);
  assign(piece->weight, torch::full({4}, 1.003));
  const auto x = torch::randn({3, 4}).to(type);
  const auto exact = torch::layer_norm(x.to(torch::kFloat32), {4}, piece->weight, piece->bias, 1e-5);
  const auto y = norm->forward(x);
  CHECK(y.scalar_type() == type);
  CHECK(y.equal(exact.to(type)));
  peft::merge(*norm);
  CHECK(norm->base->weight.equal(piece->weight.to(type)));
}

TEST_CASE("A norm takes either LayerNorm tuning or another copy of its own, not both", "[ln_tuning]") {
  peft::LayerNorm norm(nn::LayerNormOptions({4}));
  CHECK_THROWS_WITH(peft::add_adapter(*norm, {peft::on(LayerNormTuningOptions(), peft::all()),
                                              peft::on(peft::BiasOptions(), peft::all())}),
                    Contains("would carry both 'ln_tuning' and 'bias'"));
}

TEST_CASE("LayerNorm tuning goes through Hugging Face's files", "[ln_tuning]") {
  struct StackImpl : nn::Module {
    StackImpl() {
      first = register_module("first", peft::LayerNorm(nn::LayerNormOptions({4})));
      join = register_module("join", peft::Residual(nn::LayerNormOptions({4})));
    }
    Tensor forward(const Tensor& x) { return join->forward(first->forward(x), x); }
    peft::LayerNorm first{nullptr};
    peft::Residual join{nullptr};
  };
  StackImpl stack, other;
  const auto adapter = peft::add_adapter(stack, LayerNormTuningOptions(), peft::named({"first", "join"}));
  shake(adapter);
  const auto config = through_files(adapter, other);
  CHECK(config["peft_type"] == "LN_TUNING");
  CHECK(config["target_modules"] == nlohmann::json{"first", "join"});
  const auto x = torch::randn({3, 4});
  CHECK(torch::equal(other.forward(x), stack.forward(x)));
}
