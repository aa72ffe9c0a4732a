#include <peft/methods/trainable_tokens.h>

#include "methods/reference_values.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_formats.h"

using namespace suite;
using peft::TrainableTokensImpl;
using peft::TrainableTokensOptions;

namespace {

peft::Embedding filled_embedding(const nn::EmbeddingOptions& options) {
  peft::Embedding site(options);
  site->to(torch::kFloat64);
  assign(site->base->weight, fill({6, 3}, 1));
  return site;
}

const nn::EmbeddingOptions six_by_three(6, 3);

}  // namespace

TEST_CASE("Trainable tokens keep the promises of a method on every embedding", "[trainable_tokens]") {
  auto cases = layer_cases();
  cases.push_back(layer<peft::Embedding>("Embedding that rescales gradients by frequency",
                                         torch::tensor({{1, 3, 4}, {3, 2, 6}}),
                                         nn::EmbeddingOptions(7, 5).scale_grad_by_freq(true)));
  for (const auto& layer_case : cases) {
    if (!layer_case.name.starts_with("Embedding")) continue;
    const bool rescales = layer_case.name.find("frequency") != std::string::npos;
    const Promise promise{
        {peft::on(
            TrainableTokensOptions(rescales ? std::vector<int64_t>{4, 1} : std::vector<int64_t>{3, 1, 5}),
            peft::all())},
        [rescales](const peft::SiteInfo& site) { return (rescales ? 2 : 3) * site.fan_out; }};
    check_properties(layer_case, promise);
  }
}

// Reference: Hugging Face PEFT, tests/reference/tokens_values.py.
TEST_CASE("Trainable tokens equal Hugging Face's numbers", "[trainable_tokens]") {
  const auto x = torch::tensor({{0, 4, 1}, {4, 4, 5}});
  const auto add = [](peft::Embedding site, bool init = true) {
    torch::manual_seed(0);
    return peft::add_adapter(*site, TrainableTokensOptions({4, 1}).init(init), peft::all());
  };
  const auto train = [&](peft::Embedding site) {
    const auto adapter = add(site);
    const auto target = fill({2, 3, 3}, 6);
    const auto loss = twelve_steps(adapter, [&] { return (site->forward(x) - target).square().sum(); });
    return std::pair(loss, adapter.parameters().at(0));
  };
  SECTION("output, gradient, merged weight") {
    auto site = filled_embedding(six_by_three);
    const auto rows = add(site).parameters().at(0);
    assign(rows, fill({2, 3}, 3));
    const auto y = site->forward(x);
    check_values(y, {-0.13, 0.24, -0.4, -0.4, -0.03, 0.34, -0.3, 0.07, 0.44, -0.4, -0.03, 0.34, -0.4, -0.03,
                     0.34, 0.37, -0.27, 0.1});
    (y * fill({2, 3, 3}, 6)).sum().backward();
    check_values(rows.grad(), {-0.1, 1.01, -0.91, -0.1, 0.27, -0.37});
    peft::merge(*site);
    check_values(site->base->weight, {-0.13, 0.24, -0.4, -0.3, 0.07, 0.44, 0.07, 0.44, -0.2, 0.17, -0.47,
                                      -0.1, -0.4, -0.03, 0.34, 0.37, -0.27, 0.1});
  }
  SECTION("12 steps of AdamW") {
    const auto [loss, rows] = train(filled_embedding(six_by_three));
    check_values(loss, {1.162071445});
    check_values(rows,
                 {-0.1458421252, 0.1927370376, -0.415223262, -0.08364320269, 0.286411067, -0.3536814716});
  }
  SECTION("12 steps of AdamW, one of the tokens being the padding, which has no gradient") {
    const auto [loss, rows] = train(filled_embedding(nn::EmbeddingOptions(six_by_three).padding_idx(4)));
    check_values(rows, {0.2683844476, -0.3677860948, 0.0, -0.08364320269, 0.286411067, -0.3536814716});
  }
  SECTION("rescaled to a norm") {
    auto site = filled_embedding(nn::EmbeddingOptions(six_by_three).max_norm(0.5));
    assign(add(site).parameters().at(0), fill({2, 3}, 3));
    check_values(site->forward(x),
                 {-0.13, 0.24, -0.4, -0.3803490582, -0.02852617937, 0.3232966995, -0.2792661318,
                  0.06516209741, 0.4095903266, -0.3803490582, -0.02852617937, 0.3232966995, -0.3803490582,
                  -0.02852617937, 0.3232966995, 0.37, -0.27, 0.1});
  }
  SECTION("random start") {
    check_values(add(filled_embedding(six_by_three), false).parameters().at(0),
                 {1.540996108, -0.2934289058, -2.178789382, 0.5684312773, -1.084522342, -1.398595395});
  }
}

TEST_CASE("Trainable tokens read their tokens wherever they stand, in any shape of input",
          "[trainable_tokens]") {
  auto site = filled_embedding(six_by_three);
  const auto rows =
      peft::add_adapter(*site, TrainableTokensOptions({5, 0, 3}), peft::all()).parameters().at(0);
  assign(rows, torch::arange(9, torch::kFloat64));
  const auto whole = torch::tensor({0, 5, 1, 3});
  const auto y = site->forward(whole).detach();
  CHECK(torch::equal(y, torch::stack({rows[1], rows[0], site->base->weight[1], rows[2]}).detach()));
  CHECK(torch::equal(site->forward(whole.view({2, 1, 2})).detach(), y.view({2, 1, 2, 3})));
  CHECK(torch::equal(site->forward(whole.to(torch::kInt)).detach(), y));
  CHECK(torch::equal(site->forward(torch::tensor(5)).detach(), rows[0].detach()));
  CHECK(site->forward(torch::empty({2, 0}, torch::kLong)).sizes() == std::vector<int64_t>{2, 0, 3});
}

TEST_CASE("Adapters that train the same token cannot be active together", "[trainable_tokens]") {
  peft::Embedding site(7, 5);
  const auto add = [&](std::vector<int64_t> tokens, const std::string& name) {
    peft::add_adapter(*site, TrainableTokensOptions(std::move(tokens)), peft::all(), name);
  };
  add({1, 2}, "one");
  add({3}, "two");
  CHECK_THROWS_WITH(add({5, 2}, "three"),
                    Contains("'three' and active adapter 'one' both train token 2 (hint: set_active"));
  CHECK(site->adapters() == std::vector<std::string>{"one", "two"});
  peft::set_active(*site, {"two"});
  add({5, 2}, "three");
  CHECK_THROWS_WITH(peft::set_active(*site, {"three", "two", "one"}),
                    Contains("'three' and 'one' both train token 2"));
  CHECK(peft::active_adapters(*site) == std::vector<std::string>{"two", "three"});
  peft::set_active(*site, {"one", "two"});
}

TEST_CASE("Trainable tokens lie under a LoRA of the same adapter, and beside no other copy",
          "[trainable_tokens]") {
  auto site = filled_embedding(six_by_three);
  const auto tokens = peft::on(TrainableTokensOptions({4, 1}), peft::all());
  const auto plain = site->forward(torch::tensor({1, 2}));
  CHECK_THROWS_WITH(peft::add_adapter(*site, {tokens, peft::on(peft::ReplaceOptions(), peft::all())}),
                    Contains("would carry both 'trainable_tokens' and 'replace'"));
  const auto adapter = peft::add_adapter(*site, {peft::on(peft::LoraOptions(2), peft::all()), tokens});
  CHECK(torch::equal(site->forward(torch::tensor({1, 2})), plain));
  CHECK(site->pieces("default").at(0).piece->method() == "trainable_tokens");
}

TEST_CASE("Trainable tokens of a half-precision embedding are kept in float32", "[trainable_tokens]") {
  peft::Embedding site(7, 5);
  site->to(torch::kBFloat16);
  const auto rows = peft::add_adapter(*site, TrainableTokensOptions({4}), peft::all()).parameters().at(0);
  CHECK(rows.scalar_type() == torch::kFloat32);
  const auto x = torch::tensor({4, 5});
  CHECK(site->forward(x).scalar_type() == torch::kBFloat16);
  peft::merge(*site);
  CHECK(site->base->weight.scalar_type() == torch::kBFloat16);
}

TEST_CASE("Trainable tokens name the tokens that are none", "[trainable_tokens]") {
  peft::Embedding site(7, 5);
  const auto add = [&](std::vector<int64_t> tokens) {
    peft::add_adapter(*site, TrainableTokensOptions(std::move(tokens)), peft::all());
  };
  CHECK_THROWS_WITH(add({}), Contains("indices must hold at least one token, but got none"));
  CHECK_THROWS_WITH(add({1, -2}), Contains("indices must not be negative, but got -2"));
  CHECK_THROWS_WITH(add({1, 3, 1}), Contains("indices must differ, but got 1 twice"));
  struct ModelImpl : nn::Module {
    ModelImpl() {
      words = register_module("words", peft::Embedding(7, 5));
      dense = register_module("dense", peft::Linear(5, 5));
    }
    peft::Embedding words{nullptr};
    peft::Linear dense{nullptr};
  };
  ModelImpl model;
  CHECK_THROWS_WITH(peft::add_adapter(model, TrainableTokensOptions({2, 7, 9}), peft::named({"words"})),
                    Contains("indices must be below the embedding's 7 tokens, but got 9"));
  CHECK_THROWS_WITH(peft::add_adapter(model, TrainableTokensOptions({2}), peft::named({"dense"})),
                    Contains("a Linear has no tokens: it is no embedding"));
}

namespace {

struct WordsImpl : nn::Module {
  WordsImpl() {
    torch::manual_seed(2);
    words = register_module("words", peft::Embedding(7, 5));
    dense = register_module("dense", peft::Linear(5, 5));
  }
  Tensor forward(const Tensor& x) { return dense->forward(words->forward(x)); }
  peft::Embedding words{nullptr};
  peft::Linear dense{nullptr};
};

}  // namespace

TEST_CASE("Trainable tokens go through Hugging Face's files, alone and beside a LoRA", "[trainable_tokens]") {
  const auto x = torch::tensor({0, 1, 2, 3, 4, 5, 6});
  WordsImpl model, other;
  const auto tokens = peft::on(TrainableTokensOptions({4, 1}), peft::named({"words"}));
  SECTION("alone") {
    const auto adapter = peft::add_adapter(model, {tokens});
    shake(adapter);
    const auto config = through_files(adapter, other);
    CHECK(config["peft_type"] == "TRAINABLE_TOKENS");
    CHECK(config["token_indices"] == nlohmann::json{4, 1});
    CHECK(config["init_weights"] == true);
    CHECK(torch::equal(other.forward(x), model.forward(x)));
  }
  SECTION("beside a LoRA") {
    const auto adapter =
        peft::add_adapter(model, {tokens, peft::on(peft::LoraOptions(2), peft::named({"dense"}))});
    shake(adapter);
    const auto config = through_files(adapter, other);
    CHECK(config["peft_type"] == "LORA");
    CHECK(config["target_modules"] == nlohmann::json{"dense"});
    CHECK(config["trainable_token_indices"]["words"] == nlohmann::json{4, 1});
    CHECK(torch::equal(other.forward(x), model.forward(x)));
    CHECK(through_files(peft::adapter(other, "default"), *std::make_shared<WordsImpl>()) == config);
  }
  SECTION("beside a layer of its own, which Python cannot read") {
    const auto adapter =
        peft::add_adapter(model, {tokens, peft::on(peft::ReplaceOptions(), peft::named({"dense"}))});
    shake(adapter);
    const auto config = through_files(adapter, other);
    CHECK(config["peft_type"] == "REPLACE");
    CHECK(config["method"] == "TRAINABLE_TOKENS");
    CHECK(torch::equal(other.forward(x), model.forward(x)));
  }
}

TEST_CASE("Trainable tokens name what is wrong in a file", "[trainable_tokens]") {
  const auto load = [](const std::string& key, const std::string& value) {
    const peft_test::TemporaryFolder folder;
    WordsImpl model, other;
    std::vector<peft::Part> parts{peft::on(TrainableTokensOptions({4, 1}), peft::named({"words"}))};
    if (key != "token_indices") parts.push_back(peft::on(peft::LoraOptions(2), peft::named({"dense"})));
    peft::save_adapter(peft::add_adapter(model, parts), folder / "a");
    auto config = nlohmann::json::parse(std::ifstream(folder / "a" / "adapter_config.json"));
    config[key] = nlohmann::json::parse(value);
    std::ofstream(folder / "a" / "adapter_config.json") << config;
    peft::load_adapter(other, folder / "a");
  };
  const auto bad = "must hold lists of different tokens, each an integer of at least 0";
  for (const auto* value : {"[]", "null", "[1, 1]", "[-1, 2]", "[1.5]", "3", "[9999999999]"}) {
    CHECK_THROWS_WITH(load("token_indices", value), Contains(bad));
  }
  CHECK_THROWS_WITH(load("token_indices", "[1, 7]"), Contains("below the embedding's 7 tokens, but got 7"));
  CHECK_THROWS_WITH(load("token_indices", "[1, 2, 3]"), Contains("expected (3, 5), but got (2, 5)"));
  CHECK_THROWS_WITH(load("trainable_token_indices", R"({"words": [1, 1]})"), Contains(bad));
  CHECK_THROWS_WITH(load("trainable_token_indices", R"({"word": [1, 2]})"),
                    Contains("no module's path matches the expression '.*word'"));
  CHECK_THROWS_WITH(load("trainable_token_indices", "3"), Contains("must be a list of tokens, or map names"));
  CHECK_THROWS_WITH(load("trainable_token_indices", R"({"words": [1, 9]})"),
                    Contains("below the embedding's 7 tokens, but got 9"));
}
