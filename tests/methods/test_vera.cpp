#include <cmath>

#include "methods/reference_case.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_formats.h"
#include "peft/io/safetensors.h"
#include "peft/methods/vera.h"

using namespace suite;
using peft::VeraOptions;

namespace {

Promise vera(const VeraOptions& options) {
  return {{peft::on(options, peft::all())},
          [options](const peft::SiteInfo& site) { return site.fan_out + options.rank(); },
          options.init_weights()};
}

struct TwoImpl : nn::Cloneable<TwoImpl> {
  TwoImpl() { reset(); }
  void reset() override {
    a = register_module("a", peft::Linear(4, 3));
    b = register_module("b", peft::Linear(2, 5));
  }
  Tensor forward(const Tensor& x) { return torch::cat({a->forward(x), b->forward(x.narrow(1, 0, 2))}, 1); }
  peft::Linear a{nullptr}, b{nullptr};
};
TORCH_MODULE(Two);

peft::Adapter add(TwoImpl& model, const std::string& name = "one") {
  return peft::add_adapter(model, VeraOptions(3).projection_prng_key(11), peft::named({"a", "b"}), name);
}

const peft::VeraProjections& projections(const peft::Adapter& adapter, size_t layer) {
  return static_cast<const peft::VeraProjections&>(*adapter.layers<peft::VeraImpl>().at(layer)->shared());
}

}  // namespace

TEST_CASE("VeRA keeps the promises of a method on linear layers", "[vera]") {
  for (const auto& layer_case : layer_cases()) {
    if (layer_case.name.rfind("Linear", 0) != 0) continue;
    check_properties(layer_case, vera(VeraOptions(3)));
    check_properties(layer_case, vera(VeraOptions(5).init_weights(false).projection_prng_key(-2)));
  }
}

TEST_CASE("VeRA refuses other layers", "[vera]") {
  for (auto cases : {layer_cases(), other_layer_cases()}) {
    for (const auto& layer_case : cases) {
      if (layer_case.name.rfind("Linear", 0) == 0) continue;
      INFO(layer_case.name);
      const auto site = std::dynamic_pointer_cast<peft::SiteImpl>(layer_case.make());
      CHECK_THAT(refusal(VeraOptions(), site->info()), Contains("has no VeRA form"));
    }
  }
}

// Reference: Hugging Face PEFT, tests/reference/vera_values.py.
TEST_CASE("VeRA equals Hugging Face's numbers", "[vera]") {
  check_reference<peft::Linear>(
      "linear", [] { return peft::Linear(4, 3); }, VeraOptions(3), fill({2, 4}, 5),
      {{0.0, 0.0, 0.0, 0.1000000015, 0.1000000015, 0.1000000015},
       {0.1332595379, 0.001086501225, -0.2303541123, 0.4758004048, -0.5941365359, 0.2574334907},
       {0.02699485586, -0.00296146626, 0.01133073521, 0.2343801289, -0.03295312776, -0.0379293964,
        0.007872683714, -0.03564059619, -0.08887951508, -0.08001122946, 0.170165209, -0.1645447018,
        0.2992124495, 0.126215403},
       {0.1194130921, 0.1169777928, 0.1142817188, 0.1111672423, 0.107833673, 0.1042787527, 0.1005755037,
        0.09675479413, 0.09266579396, 0.08821391053, 0.08341813436, 0.07835973481},
       {0.04675648977, -0.02900754288, -0.1754346515, -0.1282816143, 0.2403183939, -0.1079464146,
        -0.115152564, 0.4160483197, -0.2123354178, 0.1343851401, -0.4061616111, 0.01026895775}});
  check_reference<peft::Linear>(
      "random start", [] { return peft::Linear(nn::LinearOptions(4, 3).bias(false)); },
      VeraOptions(3).init_weights(false).projection_prng_key(7), fill({2, 4}, 5),
      {{1.0, 1.0, 1.0, 1.540996075, -0.2934288979, -2.178789377},
       {-0.1646882004, 0.4072016134, -0.1638520107, 0.3100977832, -0.1960755926, 0.275850949},
       {0.02068274134, -0.006242073025, 0.07457990962, 0.1510858181, 0.06440497086, 0.0003126020831,
        0.04832628993, -0.03638429401, -0.05632589065, -0.03997210474, 0.1367587396, -0.145054112,
        0.3363383555, 0.1491237942},
       {0.07174714299, 0.0677557931, 0.06341561663, 0.05882110432, 0.05414537434, 0.04956064979,
        0.04528974543, 0.04164319073, 0.03893602581, 0.03728381907, 0.03631527953, 0.03527132457},
       {-0.06747833546, 0.3040084803, -0.3350782224, -0.08184094233, 0.07263677225, -0.06117224103,
        0.03890085233, 0.513607646, 0.3791505772, -0.3415764632, -0.04687987619, -0.1515080587}});
}

// Reference: Hugging Face PEFT, tests/reference/vera_values.py.
TEST_CASE("VeRA draws its shared matrices as Hugging Face does", "[vera]") {
  Two model;
  const auto equal = [](const Tensor& tensor, const std::vector<double>& expected) {
    return torch::equal(tensor.view(-1), torch::tensor(expected, torch::kFloat32));
  };
  SECTION("for the widest layers, from the key alone") {
    torch::manual_seed(1);
    const auto one = add(*model);
    CHECK(equal(projections(one, 0).vera_A,
                {-0.8596687317, -0.03293796629, 1.189622879, -0.8122473359, 0.2056185752, 0.4742191732,
                 0.2035155743, -0.9101379514, 0.1766636521, 1.040639877, -0.565004766, 0.6918752193}));
    CHECK(equal(projections(one, 0).vera_B,
                {-0.6451992989, -0.1039961651, 0.7555601597, 0.006861675531, -1.124291778, 0.7353830934,
                 0.8585461378, 0.750372529, 1.049072862, 0.6308948398, 0.951579392, 0.2319979966,
                 0.9601567984, -1.245889664, -0.1937829405}));
  }
  SECTION("rounded to a bfloat16 base and kept in float32") {
    model->to(torch::kBFloat16);
    const auto one = add(*model);
    CHECK(equal(projections(one, 0).vera_A,
                {-0.859375, -0.03295898438, 1.1875, -0.8125, 0.2060546875, 0.474609375, 0.203125, -0.91015625,
                 0.1767578125, 1.0390625, -0.56640625, 0.69140625}));
    CHECK(equal(projections(one, 0).vera_B,
                {-0.64453125, -0.1040039062, 0.75390625, 0.006866455078, -1.125, 0.734375, 0.859375, 0.75,
                 1.046875, 0.6328125, 0.953125, 0.232421875, 0.9609375, -1.2421875, -0.193359375}));
    CHECK(model->a->forward(torch::randn({2, 4}, torch::kBFloat16)).scalar_type() == torch::kBFloat16);
  }
}

TEST_CASE("A shared part is registered once and belongs to its adapter", "[vera]") {
  Two model;
  const auto one = add(*model);
  CHECK(projections(one, 0).vera_A.is_same(projections(one, 1).vera_A));
  CHECK(one.count() == 3 + 5 + 2 * 3);
  std::vector<std::string> names;
  for (const auto& [name, tensor] : one.named_tensors()) names.push_back(name);
  CHECK(names == std::vector<std::string>{"a.shared.vera.vera_A", "a.shared.vera.vera_B",
                                          "a.vera.vera_lambda_b", "a.vera.vera_lambda_d",
                                          "b.vera.vera_lambda_b", "b.vera.vera_lambda_d"});
  CHECK(model->named_buffers().contains("a.one.shared.vera.vera_A"));
  CHECK_FALSE(model->named_buffers().contains("b.one.shared.vera.vera_A"));

  const auto two = add(*model, "two");
  CHECK_FALSE(projections(two, 0).vera_A.is_same(projections(one, 0).vera_A));
  CHECK(torch::equal(projections(two, 0).vera_A, projections(one, 0).vera_A));
  peft::rename(*model, "one", "three");
  CHECK(model->named_buffers().contains("a.three.shared.vera.vera_A"));
  CHECK(one.named_tensors().size() == 6);
  peft::remove_adapter(*model, "three");
  CHECK_FALSE(model->named_buffers().contains("a.three.shared.vera.vera_A"));
  model->to(torch::kFloat64);
  CHECK(projections(two, 1).vera_A.scalar_type() == torch::kFloat64);
  CHECK(model->forward(torch::randn({2, 4}, torch::kFloat64)).scalar_type() == torch::kFloat64);
}

TEST_CASE("A copied model's pieces share the copy's part", "[vera]") {
  torch::manual_seed(2);
  Two model;
  shake(add(*model));
  const auto x = torch::randn({2, 4});
  const auto y = model->forward(x).detach();
  const auto copy = peft::clone(*model);
  CHECK(torch::equal(copy->forward(x), y));
  const auto own = peft::adapter(*copy, "one");
  CHECK(projections(own, 0).vera_A.is_same(projections(own, 1).vera_A));
  CHECK_FALSE(projections(own, 0).vera_A.is_same(projections(peft::adapter(*model, "one"), 0).vera_A));
  CHECK(copy->named_buffers()["a.one.shared.vera.vera_A"].is_same(projections(own, 1).vera_A));
  {
    torch::NoGradGuard no_grad;
    Tensor(projections(own, 0).vera_B).zero_();
  }
  CHECK(torch::equal(model->forward(x), y));
  CHECK(largest(copy->forward(x).detach(), y) > 1e-3);

  const auto untied = std::dynamic_pointer_cast<TwoImpl>(model->clone());
  CHECK_THROWS_WITH(untied->forward(x),
                    Contains("Vera: 'b' has no shared matrices") && Contains("copy models with peft::clone"));
  peft::adapter(*untied, "one");
  CHECK(torch::equal(untied->forward(x), y));
}

TEST_CASE("A shared part goes through archives and merges", "[vera]") {
  torch::manual_seed(2);
  Two model, other;
  shake(add(*model));
  add(*other);
  {
    torch::NoGradGuard no_grad;
    for (auto& buffer : model->buffers()) buffer.mul_(2);
  }
  const auto x = torch::randn({2, 4});
  const auto y = model->forward(x).detach();
  through_archive(*model, *other);
  CHECK(torch::equal(other->forward(x), y));
  peft::merge(*model);
  CHECK(largest(model->forward(x).detach(), y) < 1e-6);
  peft::unmerge(*model);
  CHECK(torch::equal(model->forward(x), y));
}

TEST_CASE("An adapter holds one part of a method that shares tensors", "[vera]") {
  Two model;
  CHECK_THROWS_WITH(peft::add_adapter(*model, {peft::on(VeraOptions(3), peft::named({"a"})),
                                               peft::on(VeraOptions(2), peft::named({"b"}))}),
                    Contains("an adapter holds one part of it, but got two"));
  CHECK(model->a->adapters().empty());
}

TEST_CASE("VeRA drops its input in training only", "[vera]") {
  torch::manual_seed(5);
  peft::Linear site(8, 4);
  shake(peft::add_adapter(*site, VeraOptions(3).dropout(0.5), peft::all()));
  const auto x = torch::ones({1, 8});
  CHECK_FALSE(torch::equal(site->forward(x), site->forward(x)));
  site->eval();
  CHECK(torch::equal(site->forward(x), site->forward(x)));
}

TEST_CASE("VeRA names the option that is out of range", "[vera]") {
  peft::Linear site(6, 4);
  const auto attempt = [&](const VeraOptions& options) { peft::add_adapter(*site, options, peft::all()); };
  CHECK_THROWS_WITH(attempt(VeraOptions(0)), Contains("VeraOptions: rank must be positive, but got 0"));
  CHECK_THROWS_WITH(attempt(VeraOptions(2).dropout(1)), Contains("dropout must be in [0, 1), but got 1"));
  CHECK_THROWS_WITH(attempt(VeraOptions(2).d_initial(NAN)), Contains("d_initial must be finite"));
  CHECK(site->adapters().empty());
}

TEST_CASE("VeRA goes through Hugging Face's files, its matrices too or drawn from the key again", "[vera]") {
  const auto config = check_files(VeraOptions(3).projection_prng_key(5).d_initial(0.25));
  CHECK(config["peft_type"] == "VERA");
  CHECK(config["r"] == 3);
  CHECK(config["projection_prng_key"] == 5);
  CHECK(config["d_initial"] == 0.25);
  CHECK(config["save_projection"] == true);
  const auto unsaved = check_files(VeraOptions(3).projection_prng_key(5).save_projection(false));
  CHECK(unsaved["save_projection"] == false);

  nn::Sequential model{nn::Linear(6, 4)};
  const auto adapter = peft::add_adapter(*model, VeraOptions(3).save_projection(false), peft::all());
  const peft_test::TemporaryFolder folder;
  CHECK_THAT(peft::save_adapter(adapter, folder / "out").back(), Contains("draws them from key 0 again"));
  CHECK_FALSE(
      peft::load_safetensors(folder / "out" / "adapter_model.safetensors").contains("base_model.vera_A"));
}
