#include "catch.h"
#include "models/tiny_encoder.h"
#include "peft/methods/lora.h"
#include "peft/methods/prefix.h"
#include "peft/methods/prompt.h"
#include "peft/model/add_adapter.h"

#include <memory>
#include <string>
#include <vector>

using namespace peft::models;
using namespace peft_test;

TEST_CASE("A tiny RoBERTa gives transformers' values", "[roberta]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_by_name<RobertaForSequenceClassification>(tiny_roberta());
  auto inputs = roberta_batch();
  // Printed by tests/reference/encoder_values.py.
  const auto hidden =
      torch::tensor({-1.45369434, -0.719565272, -0.497320294, 0.320915699, 0.936429381, 1.08831882,
                     1.12983274, 0.0327050537, -1.4959681, -0.381917208, 0.0771522149, 0.59022969, 1.28595555,
                     1.30319083, 0.262938797, -1.0207057});
  const auto unmasked = torch::tensor({-0.371755481, 0.479246944, 1.03607857, 0.77412647, 0.832638443,
                                       0.568342149, -1.32100642, -2.17561197});
  const auto logits =
      torch::tensor({0.305208296, 0.0266191438, -0.267108858, 0.580750108, 0.479744852, 0.160207123});
  const auto pooled =
      torch::tensor({-0.022708714, -0.552592218, -0.734909177, -0.68235302, -0.340230227, 0.274050772,
                     0.656924307, 0.734214246, 0.49513033, 0.137945548, -0.313618451, -0.565483451,
                     -0.585176468, -0.38121599, 0.0443120636, 0.436559796});
  const auto token_logits =
      torch::tensor({-0.345742404, 0.0509673059, 0.426504016, 0.0738822743, 0.428480029, 0.592451274});

  inputs.labels = torch::tensor({2, 0});
  const auto output = model->forward(inputs);
  CHECK(difference(output.last_hidden_state.select(1, 1), hidden) < 2e-6);
  CHECK(difference(output.logits, logits) < 2e-6);
  CHECK_THAT(output.loss.item<double>(), WithinAbs(1.17729652, 2e-6));
  CHECK_FALSE(output.pooler_output.defined());

  EncoderInputs bare;
  bare.input_ids = inputs.input_ids;
  CHECK(difference(model->forward(bare).last_hidden_state[1][3], unmasked) < 2e-6);

  auto encoder = filled_by_name<RobertaModel>(tiny_roberta());
  CHECK(difference(encoder->forward(roberta_batch()).pooler_output, pooled) < 2e-6);
  auto tokens = filled_by_name<RobertaForTokenClassification>(tiny_roberta());
  CHECK(difference(tokens->forward(roberta_batch()).logits.select(1, 1), token_logits) < 2e-6);
}

TEST_CASE("A RoBERTa counts positions from the padding's and gives none to padding", "[roberta]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_by_name<RobertaModel>(tiny_roberta());
  EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 1, 7, 3}});
  const auto expected = model->forward(inputs).last_hidden_state;
  inputs.position_ids = torch::tensor({{2, 1, 3, 4}});
  CHECK(model->forward(inputs).last_hidden_state.equal(expected));

  SECTION("vectors have no padding") {
    inputs.inputs_embeds = model->embeddings->word_embeddings->forward(inputs.input_ids);
    inputs.input_ids = Tensor();
    inputs.position_ids = torch::tensor({{2, 3, 4, 5}});
    const auto counted = model->forward(inputs).last_hidden_state;
    inputs.position_ids = Tensor();
    CHECK(model->forward(inputs).last_hidden_state.equal(counted));
    CHECK(difference(counted, expected) > 1e-3);
  }
  SECTION("a text may be as long as there are positions, without its padding") {
    inputs = {};
    inputs.input_ids = torch::full({1, 13}, 1, torch::kLong);
    inputs.input_ids.slice(1, 0, 10).fill_(4);
    CHECK(model->forward(inputs).last_hidden_state.size(1) == 13);
    inputs.input_ids.slice(1, 0, 11).fill_(4);
    CHECK_THAT(complaint([&] { model->forward(inputs); }),
               Contains("RobertaModel: a text must have at most 10 tokens, but got 11"));
  }
  SECTION("padding has a position that does not train") {
    CHECK(model->embeddings->position_embeddings->base->options.padding_idx() == 1);
    RobertaModel fresh(tiny_roberta());
    CHECK((fresh->embeddings->position_embeddings->base->weight[1] == 0).all().item<bool>());
  }
}

TEST_CASE("Virtual tokens take a RoBERTa's positions as in Python", "[roberta]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  auto model = filled_by_name<RobertaModel>(tiny_roberta().max_position_embeddings(20));
  auto inputs = roberta_batch();
  const auto seen = [&] { return model->embeddings->forward(inputs); };
  const auto table = model->embeddings->position_embeddings->base->weight;

  SECTION("a prompt counts all tokens, padding too") {
    peft::add_adapter(*model, peft::PromptOptions(3), peft::all());
    auto counted = seen();
    inputs.position_ids = torch::tensor({{9, 9, 9, 9}});  // which a prompt ignores
    CHECK(counted.values.equal(seen().values));
    CHECK(counted.values.size(1) == 7);
  }
  SECTION("a prefix moves real tokens and leaves padding where it is") {
    peft::add_adapter(*model, peft::PrefixOptions(3), peft::all());
    const auto moved = seen().values;
    const auto off = peft::disabled(*model);
    inputs.position_ids = torch::tensor({{5, 6, 7, 8}, {5, 6, 1, 1}});
    CHECK(moved.equal(seen().values));
    inputs.position_ids = torch::tensor({{5, 6, 7, 8}, {5, 6, 4, 4}});
    CHECK_FALSE(moved.equal(seen().values));
  }
  SECTION("a prefix leaves the positions of vectors as they are, which transformers counts without it") {
    peft::add_adapter(*model, peft::PrefixOptions(3), peft::all(), "prefix");
    peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query"}), "plain");
    inputs.inputs_embeds = model->embeddings->word_embeddings->forward(inputs.input_ids);
    inputs.input_ids = Tensor();
    model->eval();
    peft::set_active(*model, {"plain"});
    const auto alone = seen().values;
    {
      const peft::RowAdapters rows({"prefix", "plain"});
      CHECK(seen().values.equal(alone));
    }
    peft::set_active(*model, {"prefix"});
    CHECK(seen().values.equal(alone));
  }
}

TEST_CASE("A RoBERTa's config has transformers' defaults, by its kind", "[config]") {
  const TemporaryFolder folder;
  const auto read = [&](const std::string& text) {
    write_bytes(folder / "config.json", text);
    return RobertaConfig::read(folder / "config.json");
  };
  const auto message = [&](const std::string& text) { return complaint([&] { read(text); }); };
  CHECK(read(R"({"model_type": "roberta"})").vocab_size() == 50265);
  CHECK(read(R"({"model_type": "xlm-roberta"})").vocab_size() == 30522);
  CHECK(read(R"({"model_type": "camembert", "max_position_embeddings": 514})").positions() == 512);
  CHECK(read("{}").pad_token_id() == 1);
  CHECK(RobertaModel(RobertaConfig("camembert").vocab_size(10).num_hidden_layers(0))->architecture() ==
        "CamembertModel");

  CHECK_THAT(message(R"({"pad_token_id": null})"), Contains("'pad_token_id' must be an integer from 0"));
  CHECK_THAT(message(R"({"max_position_embeddings": 2})"),
             Contains("'max_position_embeddings' must have room for a token after the padding, 1"));
  CHECK_THAT(message(R"({"model_type": "bert"})"),
             Contains("must be \"roberta\", \"xlm-roberta\" or \"camembert\", but got \"bert\" (hint: "
                      "peft::models::BertModel opens this folder)"));
  CHECK_THAT(complaint([] { RobertaModel(BertConfig().num_hidden_layers(0)); }),
             Contains("but got \"bert\" (hint: RobertaConfig)"));
  CHECK_THAT(complaint([] { BertModel(RobertaConfig().num_hidden_layers(0)); }),
             Contains("model_type must be \"bert\", but got \"roberta\""));
  CHECK_THAT(complaint([] { RobertaModel(RobertaConfig().pad_token_id(std::nullopt)); }),
             Contains("pad_token_id must be from 0 to 510, but got none"));
}
