#include <fstream>
#include <string>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "models/tiny_bert.h"
#include "models/tiny_encoder.h"
#include "peft/io/p_tuning_v2.h"
#include "peft/io/peft_directory.h"
#include "peft/methods/prefix.h"
#include "peft/model/active.h"

using namespace peft_test;
using peft::PrefixInit;
using peft::PrefixOptions;

namespace {

BertForSequenceClassification bert(int64_t layers = 2, int64_t heads = 2) {
  BertForSequenceClassification model(tiny().num_hidden_layers(layers).num_attention_heads(heads));
  fill(*model);
  model->eval();
  return model;
}

Tensor logits(BertForSequenceClassification& model) { return model->forward(batch()).logits.detach(); }

peft::Adapter with_head(BertForSequenceClassification& model, const PrefixOptions& options) {
  auto adapter = peft::add_adapter(*model, options, "one");
  peft::train_also(adapter, *model, peft::named({"classifier"}));
  torch::NoGradGuard no_grad;
  for (auto& tensor : adapter.parameters()) tensor.add_(torch::randn_like(tensor), 0.3);
  return adapter;
}

Json config_in(const std::filesystem::path& folder) {
  return Json::parse(std::ifstream(folder / "adapter_config.json"));
}

void silent(const std::string&) {}

}  // namespace

TEST_CASE("A prefix goes through Hugging Face's files, and trains on", "[prefix]") {
  const TemporaryFolder folder;
  auto model = bert();
  torch::manual_seed(1);
  const auto adapter = with_head(model, PrefixOptions(3).init(PrefixInit::zero));
  CHECK(peft::save_adapter(adapter, folder / "one").empty());
  const auto config = config_in(folder / "one");
  CHECK(config["peft_type"] == "PREFIX_TUNING");
  CHECK(config["num_virtual_tokens"] == 3);
  CHECK(config["token_dim"] == 8);
  CHECK(config["num_attention_heads"] == 2);
  CHECK(config["num_layers"] == 2);
  CHECK(config["encoder_hidden_size"] == 8);
  CHECK(config["prefix_projection"] == false);
  CHECK(config["init_weights"] == "zero");
  CHECK(config["modules_to_save"] == Json{"classifier"});
  const auto tensors = peft::load_safetensors(folder / "one" / "adapter_model.safetensors");
  CHECK(tensors.size() == 3);
  CHECK(tensors.at("prompt_embeddings").sizes() == c10::IntArrayRef({3, 32}));
  CHECK(tensors.count("base_model.classifier.weight") == 1);

  auto other = bert();
  const auto loaded = peft::load_adapter(*other, folder / "one", "two", /*trainable=*/true, silent);
  CHECK(torch::equal(logits(other), logits(model)));
  CHECK(loaded.count() == adapter.count());
  CHECK(peft::save_adapter(loaded, folder / "two").empty());
  CHECK(config_in(folder / "two") == config);
}

TEST_CASE("A prefix made by a network is written as its keys and values, for inference", "[prefix]") {
  const TemporaryFolder folder;
  for (const auto& options :
       {PrefixOptions(2).projection(true).hidden_width(5), PrefixOptions::p_tuning_v2(2).projection(true)}) {
    auto model = bert();
    torch::manual_seed(2);
    const auto notes = peft::save_adapter(with_head(model, options), folder / "one");
    CHECK(notes.size() == (options.dropout() > 0 ? 2 : 1));
    CHECK_THAT(notes.back(), Contains("the network that makes the prefix is not written"));
    auto other = bert();
    CHECK_THROWS_WITH(peft::load_adapter(*other, folder / "one", "one", /*trainable=*/true, silent),
                      Contains("cannot train on"));
    const auto loaded = peft::load_adapter(*other, folder / "one", "one", /*trainable=*/false, silent);
    CHECK(difference(logits(other), logits(model)) < 1e-6);
    CHECK(peft::save_adapter(loaded, folder / "two").empty());
    CHECK(config_in(folder / "two") == config_in(folder / "one"));
    CHECK(peft::load_safetensors(folder / "two" / "adapter_model.safetensors")
              .at("prompt_embeddings")
              .equal(peft::load_safetensors(folder / "one" / "adapter_model.safetensors")
                         .at("prompt_embeddings")));
    auto copy = BertForSequenceClassification(peft::clone(*other));
    CHECK(torch::equal(logits(copy), logits(other)));
  }
}

TEST_CASE("A prefix of another model's shape is refused", "[prefix]") {
  const TemporaryFolder folder;
  auto model = bert();
  peft::save_adapter(with_head(model, PrefixOptions(3)), folder / "one");
  auto deeper = bert(3);
  const auto before = logits(deeper);
  CHECK_THROWS_WITH(peft::load_adapter(*deeper, folder / "one", "one", false, silent),
                    Contains("'prompt_embeddings' expected (3, 48), but got (3, 32)"));
  CHECK(torch::equal(logits(deeper), before));
  auto finer = bert(2, 4);
  CHECK_THROWS_WITH(peft::load_adapter(*finer, folder / "one", "one", false, silent),
                    Contains("the prefix must have 4 heads, but got 2"));
}

TEST_CASE("A prefix that Hugging Face has no words for is not written", "[prefix]") {
  const TemporaryFolder folder;
  const auto complaint_of = [&](const PrefixOptions& options) {
    auto model = bert();
    const auto adapter = with_head(model, options);
    return complaint([&] { peft::save_adapter(adapter, folder / "none"); });
  };
  CHECK_THAT(complaint_of(PrefixOptions(2).gates(1)), Contains("has gates"));
  CHECK_THAT(complaint_of(PrefixOptions::adapterhub(2)), Contains("takes no positions"));
  CHECK_THAT(complaint_of(PrefixOptions(2).leave_out({0})), Contains("leaves layers out"));
  CHECK_THAT(complaint_of(PrefixOptions(2).leave_out({1})), Contains("leaves layers out"));
  CHECK_FALSE(std::filesystem::exists(folder / "none"));
}

TEST_CASE("A checkpoint of P-tuning v2's authors is read", "[prefix]") {
  const TemporaryFolder folder;
  for (const bool projection : {false, true}) {
    auto model = bert();
    torch::manual_seed(3);
    const auto adapter =
        with_head(model, PrefixOptions::p_tuning_v2(2).projection(projection).hidden_width(5));
    const auto& table = adapter.layers<peft::PrefixImpl>().front()->table();
    Tensors tensors{{"prefix_encoder.embedding.weight", table.embedding.detach()},
                    {"bert.pooler.dense.weight", torch::zeros({8, 8})}};
    if (projection) {
      tensors["prefix_encoder.trans.0.weight"] = table.first.detach();
      tensors["prefix_encoder.trans.0.bias"] = table.first_bias.detach();
      tensors["prefix_encoder.trans.2.weight"] = table.second.detach();
      tensors["prefix_encoder.trans.2.bias"] = table.second_bias.detach();
    }
    for (const auto& [key, tensor] : adapter.named_tensors()) {
      if (key == "classifier.replace.weight") tensors["classifier.weight"] = tensor.detach();
      if (key == "classifier.replace.bias") tensors["classifier.bias"] = tensor.detach();
    }
    REQUIRE(tensors.count("classifier.bias") == 1);
    peft::save_safetensors(folder / "model.safetensors", tensors);
    auto other = bert();
    const auto loaded =
        peft::load_p_tuning_v2(*other, folder / "model.safetensors", "rte", /*trainable=*/true);
    CHECK(torch::equal(logits(other), logits(model)));
    CHECK(loaded.count() == adapter.count());
    auto deeper = bert(3);
    CHECK_THROWS_WITH(
        peft::load_p_tuning_v2(*deeper, folder / "model.safetensors"),
        Contains(projection ? "'prefix_encoder.trans.2.weight' expected (48, 5), but got (32, 5)"
                            : "'prefix_encoder.embedding.weight' expected (2, 48), but got"));
    peft::models::RobertaForSequenceClassification containing(tiny_roberta());
    CHECK_THROWS_WITH(
        peft::load_p_tuning_v2(*containing, folder / "model.safetensors"),
        Contains("'classifier.weight' is the head that was trained, one layer, but the model's"));
    tensors.erase("prefix_encoder.embedding.weight");
    peft::save_safetensors(folder / "model.safetensors", tensors);
    CHECK_THROWS_WITH(peft::load_p_tuning_v2(*other, folder / "model.safetensors", "again"),
                      Contains("'prefix_encoder.embedding.weight' must have 2 axes, but is missing"));
  }
}
