#include "peft/methods/bias.h"
#include "property_suite.h"

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
