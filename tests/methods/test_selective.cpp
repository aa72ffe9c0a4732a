#include "methods/reference_values.h"
#include "peft/methods/bias.h"
#include "peft/methods/new_bias.h"

using namespace suite;

TEST_CASE("Bias keeps the promises of a method on every layer with a bias", "[bias]") {
  const Promise promise{{peft::on(peft::BiasOptions(), peft::all())},
                        [](const peft::SiteInfo& site) { return site.bias_shape.at(0); }};
  auto cases = layer_cases();
  for (auto& other : other_layer_cases()) cases.push_back(std::move(other));
  size_t checked = 0;
  for (const auto& layer_case : cases) {
    const auto site = std::dynamic_pointer_cast<peft::SiteImpl>(layer_case.make());
    if (!site->info().has_bias()) {
      CHECK_THROWS_WITH(peft::add_adapter(*site, peft::BiasOptions(), peft::all()),
                        Contains("matches no site"));
      continue;
    }
    check_properties(layer_case, promise);
    ++checked;
  }
  CHECK(checked == cases.size() - 4);
}

TEST_CASE("New biases keep the promises of a method on layers without a bias", "[new_bias]") {
  const Promise promise{{peft::on(peft::NewBiasOptions(), peft::all())},
                        [](const peft::SiteInfo& site) { return site.fan_out; },
                        /*no_op_at_start=*/true,
                        /*whole_gradient=*/true,
                        suite::never};
  for (const auto& layer_case : layer_cases()) {
    if (layer_case.name.find("without bias") != std::string::npos) {
      check_properties(layer_case, promise);
      continue;
    }
    const auto site = layer_case.make();
    const bool lookup = layer_case.name.find("Embedding") != std::string::npos;
    CHECK_THROWS_WITH(peft::add_adapter(*site, peft::NewBiasOptions(), peft::named({""})),
                      Contains(lookup ? "a Embedding adds no bias" : "that has a bias (hint: BiasOptions"));
  }
}

TEST_CASE("New biases go through files of this library's own", "[new_bias]") {
  struct NetImpl : nn::Module {
    peft::Linear one = register_module("one", peft::Linear(nn::LinearOptions(4, 3).bias(false)));
    peft::Linear two = register_module("two", peft::Linear(nn::LinearOptions(3, 2).bias(false)));
  };
  NetImpl net, other;
  const auto adapter = peft::add_adapter(net, peft::NewBiasOptions(), peft::named({"one", "two"}));
  shake(adapter);
  const auto config = through_files(adapter, other);
  CHECK(config["peft_type"] == "REPLACE");
  CHECK(config["method"] == "NEW_BIAS");
  const auto loaded = peft::adapter(other, "default").named_tensors(), saved = adapter.named_tensors();
  REQUIRE(loaded.size() == 2);
  for (size_t i = 0; i < 2; ++i) CHECK(torch::equal(loaded[i].second, saved[i].second));
}

TEST_CASE("Replace keeps the promises of a method on every layer kind", "[replace]") {
  const Promise promise{{peft::on(peft::ReplaceOptions(), peft::all())}, [](const peft::SiteInfo& site) {
                          int64_t count = site.has_bias() ? site.bias_shape.at(0) : 0;
                          int64_t weight = 1;
                          for (const auto size : site.weight_shape) weight *= size;
                          return count + weight;
                        }};
  for (const auto& layer_case : layer_cases()) check_properties(layer_case, promise);
  for (const auto& layer_case : other_layer_cases()) check_properties(layer_case, promise);
}

TEST_CASE("A trained bias lies under a LoRA of the same adapter, whatever the order of the parts", "[bias]") {
  const auto linear = layer<peft::Linear>("Linear", torch::randn({3, 6}), 6, 4);
  const auto lora = peft::on(peft::LoraOptions(2).init(peft::LoraInit::random), peft::all());
  const auto bias = peft::on(peft::BiasOptions(), peft::all());
  const Promise promise{{lora, bias}, [](const peft::SiteInfo&) { return 2 * (6 + 4) + 4; }, false};
  check_properties(linear, promise);
  const auto site = linear.make();
  peft::add_adapter(*site, {lora, bias}, "one");
  const auto& pieces = std::dynamic_pointer_cast<peft::SiteImpl>(site)->pieces("one");
  CHECK(pieces.at(0).piece->method() == "bias");
  CHECK(pieces.at(1).piece->method() == "lora");
}

TEST_CASE("A layer takes either its own bias or a whole copy, not both", "[replace]") {
  peft::Linear site(6, 4);
  CHECK_THROWS_WITH(peft::add_adapter(*site, {peft::on(peft::BiasOptions(), peft::all()),
                                              peft::on(peft::ReplaceOptions(), peft::all())}),
                    Contains("would carry both 'bias' and 'replace'"));
  CHECK(site->adapters().empty());
}

TEST_CASE("Copies of a half-precision base keep its type", "[replace]") {
  peft::Linear site(6, 4);
  site->to(torch::kBFloat16);
  auto adapter = peft::add_adapter(*site, peft::ReplaceOptions(), peft::all());
  for (const auto& tensor : adapter.parameters()) CHECK(tensor.scalar_type() == torch::kBFloat16);
  CHECK(site->forward(torch::randn({2, 6}, torch::kBFloat16)).scalar_type() == torch::kBFloat16);
}
