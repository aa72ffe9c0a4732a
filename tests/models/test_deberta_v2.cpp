#include "catch.h"
#include "io/temporary_folder.h"
#include "models/pretrained_folder.h"
#include "models/tiny_encoder.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_formats.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/lora.h"
#include "peft/methods/prefix.h"
#include "peft/methods/prompt.h"
#include "peft/model/add_adapter.h"
#include "peft/models/deberta_v2.h"
#include "peft/models/save_pretrained.h"
#include "property_suite.h"

#include <set>
#include <string>
#include <vector>

using namespace peft::models;
using peft_test::complaint;
using peft_test::difference;
using peft_test::Json;
using peft_test::noting;
using peft_test::TemporaryFolder;
using peft_test::tensors_of;
using peft_test::tiny_deberta_v2;
using peft_test::tiny_deberta_v3;
using peft_test::write_pretrained;
using torch::Tensor;

namespace {

/// As version 3 is, and its files.
DebertaV2Config third() { return tiny_deberta_v3().legacy(false); }

/// With all that version 3 does not have.
DebertaV2Config second() {
  return tiny_deberta_v2()
      .embedding_size(6)
      .type_vocab_size(2)
      .conv_kernel_size(3)
      .conv_groups(2)
      .max_relative_positions(3);
}

EncoderInputs batch() {
  EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19, 7, 11, 2}, {1, 2, 4, 9, 0, 0}});
  inputs.attention_mask = torch::tensor({{1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 0, 0}});
  inputs.token_type_ids = torch::tensor({{0, 0, 1, 1, 1, 1}, {0, 0, 1, 1, 0, 0}});
  return inputs;
}

/// The formula of tests/reference/deberta_v2_values.py; transformers has the bias of the output layer first.
template <class Model>
Model filled(DebertaV2Config config) {
  Model model(std::move(config));
  const torch::NoGradGuard no_grad;
  double k = 0;
  const auto fill = [&k](const std::string& key, Tensor parameter) {
    auto values = 0.15 * (0.7 * torch::arange(parameter.numel(), torch::kFloat64) + k++).sin();
    if (key.ends_with("LayerNorm.weight")) values += 1;
    parameter.copy_(values.reshape(parameter.sizes()));
  };
  const auto parameters = model->named_parameters();
  for (const auto& item : parameters) {
    if (item.key().find("dense.weight") != std::string::npos) {
      for (const char* head : {"cls.predictions.", "lm_predictions.lm_head."}) {
        const auto* bias = parameters.find(std::string(head) + "decoder.bias");
        if (bias && item.key().starts_with(head)) fill("", *bias);
      }
    }
    if (item.key().find("decoder.") == std::string::npos) fill(item.key(), item.value());
  }
  model->eval();
  return model;
}

DebertaV2ForSequenceClassification random_classifier(DebertaV2Config config) {
  torch::manual_seed(2);
  DebertaV2ForSequenceClassification model(config.initializer_range(0.3));
  model->eval();
  return model;
}

Json third_json() {
  return {{"model_type", "deberta-v2"},
          {"vocab_size", 20},
          {"hidden_size", 8},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 2},
          {"intermediate_size", 12},
          {"max_position_embeddings", 12},
          {"layer_norm_eps", 1e-6},
          {"relative_attention", true},
          {"pos_att_type", "p2c|c2p"},
          {"position_buckets", 4},
          {"share_att_key", true},
          {"norm_rel_ebd", "layer_norm"},
          {"position_biased_input", false},
          {"attention_head_size", 4},
          {"num_labels", 3}};
}

}  // namespace

TEST_CASE("Tiny DeBERTas give transformers' values", "[deberta]") {
  const torch::NoGradGuard no_grad;
  // Printed by tests/reference/deberta_v2_values.py.
  const auto third_hidden =
      torch::tensor({2.2907269, 0.625792384, 0.0598267727, -0.203886554, -1.51441133, -0.98668617,
                     0.255990058, 0.0667502061, 0.164148122, 0.0864965916, 1.62947667, 0.721396327,
                     -0.376898706, 0.170273781, -0.854308188, -1.66089523});
  const auto third_first_layer =
      torch::tensor({-1.55288196, -0.940770745, 0.293977052, 0.741459906, 1.52927327, 1.58906329,
                     -0.0454238541, -0.734414816, -1.48934078, -0.983089387, -0.277461112, 0.211429894,
                     1.55232298, 1.79510772, 0.424448997, -0.255227923});
  const auto third_logits =
      torch::tensor({-0.07949166, -0.299671292, -0.38290146, -0.0582440272, 0.017599076, 0.0879790783});
  const auto second_hidden =
      torch::tensor({-0.489527822, -0.143876985, 0.0278189871, -0.149881586, 2.04352784, 0.500999808,
                     -1.60753846, -0.00691358512, -0.662548363, 0.337274492, -0.531133354, -0.25063616,
                     2.35177755, -0.0317879356, -1.19691873, 0.084619984});
  const auto second_first_layer =
      torch::tensor({-0.190029308, 0.777145267, -1.81447601, 1.15389037, 1.25177741, -1.38451684, 0.506908536,
                     -0.131496638, 0., 0., 0., 0., 0., 0., 0., 0.});
  const auto second_logits =
      torch::tensor({-0.129501313, -0.133527353, -0.0745234936, -0.129408821, -0.136061773, -0.0785472095});

  auto inputs = batch();
  inputs.output_hidden_states = true;
  inputs.labels = torch::tensor({2, 0});
  const auto check = [&inputs](DebertaV2ForSequenceClassification model, const Tensor& hidden,
                               const Tensor& first_layer, const Tensor& logits, double loss) {
    const auto output = model->forward(inputs);
    CHECK(difference(output.last_hidden_state.select(1, 3), hidden) < 2e-6);
    CHECK(difference(output.hidden_states[1].select(1, 5), first_layer) < 2e-6);
    CHECK(difference(output.logits, logits) < 2e-6);
    CHECK_THAT(output.loss.item<double>(), WithinAbs(loss, 2e-6));
  };
  check(filled<DebertaV2ForSequenceClassification>(third()), third_hidden, third_first_layer, third_logits,
        1.20512629);
  auto model = filled<DebertaV2ForSequenceClassification>(second());
  check(model, second_hidden, second_first_layer, second_logits, 1.08733153);

  const auto loss = [&](const Tensor& labels) {
    inputs.labels = labels;
    return model->forward(inputs).loss.item<double>();
  };
  CHECK_THAT(loss(torch::tensor({-1, 0})), WithinAbs(1.11368036, 2e-6));
  CHECK(loss(torch::tensor({-1, -100})) == 0);
  CHECK_THAT(loss(torch::tensor({{0.5, 0.2, 0.3}, {0., 0., 1.}})), WithinAbs(1.08154559, 2e-6));
  CHECK_THAT(complaint([&] {
               loss(torch::tensor({1, 2, 0}));
             }),
             Contains("one a row, 2 of them, but got (3)"));
  CHECK_THAT(complaint([&] { loss(torch::rand({2, 2})); }), Contains("logits, (2, 3), but got (2, 2)"));
}

TEST_CASE("Other heads of DeBERTa give transformers' values", "[deberta]") {
  const torch::NoGradGuard no_grad;
  auto inputs = batch();
  // Printed by tests/reference/deberta_v2_values.py.
  const auto token_logits =
      torch::tensor({-0.589414597, -0.184412792, 0.300441921, -0.0685266852, 0.401910067, 0.68901813});
  const auto word_logits = torch::tensor({-0.675129533, -0.0141366124, 0.650493145, 1.01994729, -0.0337311961,
                                          0.623651266, 0.998387873, 0.921789944});
  const auto legacy_word_logits = torch::tensor({0.00791356713, 0.860412955, -0.478527188, -0.0729354024,
                                                 -0.0419711918, 0.881164312, -0.44898963, -0.122649029});
  auto tokens = filled<DebertaV2ForTokenClassification>(third());
  CHECK(difference(tokens->forward(inputs).logits.select(1, 1), token_logits) < 2e-6);

  auto words = filled<DebertaV2ForMaskedLM>(third());
  CHECK(difference(words->forward(inputs).logits.select(1, 1).slice(1, 0, 4), word_logits) < 2e-6);
  auto legacy = filled<DebertaV2ForMaskedLM>(second());
  CHECK(difference(legacy->forward(inputs).logits.select(1, 1).slice(1, 0, 4), legacy_word_logits) < 2e-6);

  auto answers = filled<DebertaV2ForQuestionAnswering>(third());
  inputs.start_positions = torch::tensor({1, 3});
  inputs.end_positions = torch::tensor({2, 9});
  const auto output = answers->forward(inputs);
  CHECK(difference(output.start_logits.select(1, 1), torch::tensor({-0.589414597, -0.0685266852})) < 2e-6);
  CHECK(difference(output.end_logits.select(1, 1), torch::tensor({-0.184412792, 0.401910067})) < 2e-6);
  CHECK_THAT(output.loss.item<double>(), WithinAbs(1.55340219, 2e-6));

  CHECK_THAT(complaint([] { DebertaV2ForMaskedLM model(third().embedding_size(6)); }),
             Contains("must have words of the model's width, 8, and tied, but got words of 6"));
}

TEST_CASE("Keys of DeBERTa are transformers' and every parameter lies in a site", "[deberta]") {
  const auto config = GENERATE(second(), third());
  DebertaV2ForSequenceClassification model(DebertaV2Config(config).num_hidden_layers(1));
  const bool all = config.embedding_size().has_value();
  std::vector<std::string> expected{"deberta.embeddings.word_embeddings.weight"};
  const auto both = [&](const std::string& name) {
    expected.insert(expected.end(), {name + ".weight", name + ".bias"});
  };
  if (all) {
    for (const char* name : {"position_embeddings", "token_type_embeddings", "embed_proj"}) {
      expected.push_back(std::string("deberta.embeddings.") + name + ".weight");
    }
  }
  both("deberta.embeddings.LayerNorm");
  std::vector<std::string> block{"attention.self.query_proj", "attention.self.key_proj",
                                 "attention.self.value_proj"};
  if (all) block.insert(block.end(), {"attention.self.pos_key_proj", "attention.self.pos_query_proj"});
  block.insert(block.end(), {"attention.output.dense", "attention.output.LayerNorm", "intermediate.dense",
                             "output.dense", "output.LayerNorm"});
  for (const auto& name : block) both("deberta.encoder.layer.0." + name);
  expected.push_back("deberta.encoder.rel_embeddings.weight");
  if (all) {
    both("deberta.encoder.conv.conv");
    both("deberta.encoder.conv.LayerNorm");
  } else {
    both("deberta.encoder.LayerNorm");
  }
  both("pooler.dense");
  both("classifier");
  CHECK(model->named_parameters().keys() == expected);
  CHECK(model->named_buffers().is_empty());

  std::set<std::string> in_sites;
  for (const auto& item : model->named_modules("", /*include_self=*/false)) {
    const auto* site = dynamic_cast<peft::SiteImpl*>(item.value().get());
    if (!site) continue;
    for (const auto& parameter : site->base_parameters()) in_sites.insert(item.key() + "." + parameter.key());
  }
  CHECK(in_sites == std::set<std::string>(expected.begin(), expected.end()));
  CHECK(model->describe().model_type == "deberta-v2");
  CHECK(model->describe().task_type == "SEQ_CLS");
  CHECK(model->architecture() == "DebertaV2ForSequenceClassification");
}

TEST_CASE("A new DeBERTa has transformers' initial values and its clones draw nothing", "[deberta]") {
  torch::manual_seed(3);
  DebertaV2Model model(second().hidden_size(32).vocab_size(500).intermediate_size(64));
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    if (item.key().ends_with("bias")) {
      CHECK((item.value() == 0).all().item<bool>());
    } else if (item.value().dim() > 1 && item.value().numel() > 500) {
      CHECK_THAT(item.value().std().item<double>(), WithinAbs(0.02, 0.003));
    }
  }
  torch::manual_seed(4);
  const auto next = torch::rand(1);
  torch::manual_seed(4);
  const auto copy = std::dynamic_pointer_cast<DebertaV2ModelImpl>(model->clone());
  CHECK(torch::rand(1).equal(next));
  model->eval();
  const torch::NoGradGuard no_grad;
  CHECK_FALSE(copy->is_training() == model->is_training());
  copy->eval();
  CHECK(copy->forward(batch()).last_hidden_state.equal(model->forward(batch()).last_hidden_state));
  for (auto& parameter : copy->parameters()) parameter.zero_();
  CHECK(model->forward(batch()).last_hidden_state.abs().max().item<double>() > 0.1);
}

TEST_CASE("Distances have the vectors transformers gives them", "[deberta]") {
  const auto rows = [](const DebertaV2Config& config, int64_t time) {
    const auto found = peft::internal::rows_of_distances(config, time);
    return std::vector<int64_t>(found.data_ptr<int64_t>(), found.data_ptr<int64_t>() + found.numel());
  };
  // build_relative_position of transformers for 12 tokens, 8 buckets and 32 positions, of the last token.
  CHECK(rows(third().position_buckets(8).max_position_embeddings(32), 12) ==
        std::vector<int64_t>{2, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 13, 13, 14, 14, 14, 14});
  CHECK(rows(second(), 6) == std::vector<int64_t>{0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5});
  CHECK(rows(tiny_deberta_v2(), 3) == std::vector<int64_t>{10, 11, 12, 13, 14});
  CHECK(rows(third(), 1) == std::vector<int64_t>{4});
}

TEST_CASE("Each distance's product is a view where it has a vector of its own", "[deberta]") {
  torch::manual_seed(1);
  const auto type = torch::TensorOptions(torch::kFloat64).requires_grad(true);
  const int64_t time = GENERATE(1, 2, 5), rows = GENERATE(1, 3);
  const auto tokens = torch::randn({3, 2, time, 4}, type);
  const auto vectors = torch::randn({rows, 2, 2 * time - 1, 4}, type);
  // Of the distance from i to j, i − j: those of time − 1 come first.
  const auto i = torch::arange(time).unsqueeze(1), j = torch::arange(time).unsqueeze(0);
  const auto index = time - 1 - i + j;
  const auto viewed = peft::internal::by_distance(tokens, vectors, {});
  const auto gathered = peft::internal::by_distance(tokens, vectors, index);
  CHECK(viewed.allclose(gathered));
  const auto expected =
      (tokens.unsqueeze(3) * vectors.index({torch::indexing::Slice(), torch::indexing::Slice(), index}))
          .sum(-1);
  CHECK(viewed.allclose(expected));
  const auto weights = torch::randn_like(viewed);
  const auto of = [&](const Tensor& y) { return torch::autograd::grad({y}, {tokens, vectors}, {weights}); };
  const auto a = of(viewed), b = of(gathered), c = of(expected);
  for (size_t k : {0U, 1U}) {
    CHECK(a[k].allclose(c[k]));
    CHECK(b[k].allclose(c[k]));
  }
}

TEST_CASE("Padding does not change what DeBERTa's real tokens give", "[deberta]") {
  const torch::NoGradGuard no_grad;
  const auto config = GENERATE(second(), third(), DebertaV2Config(third().relative_attention(false)));
  auto model = random_classifier(config);
  EncoderInputs alone;
  alone.input_ids = torch::randint(20, {1, 5});
  const auto expected = model->forward(alone);
  EncoderInputs padded;
  padded.input_ids = torch::cat(
      {torch::cat({alone.input_ids, torch::zeros({1, 4}, torch::kLong)}, 1), torch::randint(20, {1, 9})});
  padded.attention_mask = torch::ones({2, 9}, torch::kLong);
  padded.attention_mask[0].slice(0, 5).zero_();
  const auto output = model->forward(padded);
  CHECK(difference(output.last_hidden_state[0].slice(0, 0, 5), expected.last_hidden_state[0]) < 2e-6);
  CHECK(difference(output.logits[0], expected.logits[0]) < 2e-6);

  alone.attention_mask = torch::ones({1, 5}, torch::kBool);
  CHECK(model->forward(alone).logits.equal(expected.logits));
  {
    // In transformers a score that is hidden has no gradient.
    const torch::AutoGradMode grad(true);
    auto& attention = model->base_model->encoder->layer->ptr(0)->as<DebertaV2Layer>()->attention->self;
    const auto x = torch::randn({1, 3, 8}).requires_grad_();
    const auto hidden = torch::tensor({{false, false, true}, {false, false, true}, {true, true, true}});
    const auto vectors = torch::randn({1, 5, 8});
    const auto y = attention->forward(x, hidden.view({1, 1, 3, 3}), {vectors, {}});
    const auto values = attention->value_proj->forward(x.detach());
    CHECK(difference(y[0][2], values.mean(1)) < 1e-5);
    const auto of_padding = torch::autograd::grad({y[0][2].square().sum()}, {x})[0];
    const auto same =
        torch::autograd::grad({attention->value_proj->forward(x).mean(1).square().sum()}, {x})[0];
    CHECK(difference(of_padding, same) < 1e-5);
  }
  padded.attention_mask[0].zero_();
  CHECK(model->forward(padded).last_hidden_state.isfinite().all().item<bool>());
  model->to(torch::kBFloat16);
  CHECK(model->forward(padded).last_hidden_state.isfinite().all().item<bool>());
}

TEST_CASE("Inputs that do not fit DeBERTa are refused by name", "[deberta]") {
  auto model = random_classifier(second());
  auto inputs = batch();
  const auto message = [&] { return complaint([&] { model->forward(inputs); }); };
  SECTION("neither ids nor vectors") {
    inputs.input_ids = Tensor();
    CHECK_THAT(message(), Contains("DebertaV2Model") && Contains("but got neither"));
  }
  SECTION("a mask of another length") {
    inputs.attention_mask = torch::ones({2, 3});
    CHECK_THAT(message(), Contains("attention_mask must be (2, 6), but got (2, 3)"));
  }
  SECTION("more tokens than positions, where it has any") {
    inputs = {};
    inputs.input_ids = torch::zeros({1, 13}, torch::kLong);
    CHECK_THAT(message(), Contains("at most 12 tokens, but got 13"));
    CHECK(random_classifier(third())->forward(inputs).logits.size(0) == 1);
  }
}

TEST_CASE("A DeBERTa's config says everything that is wrong with it at once", "[deberta]") {
  const TemporaryFolder folder;
  const auto read = [&](const Json& json) {
    peft_test::write_bytes(folder / "config.json", json.dump());
    return DebertaV2Config::read(folder / "config.json");
  };
  auto json = third_json();
  const auto config = read(json);
  CHECK(config.pos_att_type() == std::vector<std::string>{"p2c", "c2p"});
  CHECK(config.position_span() == 4);
  CHECK(config.farthest() == 12);
  CHECK(config.legacy());
  CHECK(read(config.json()).json() == config.json());
  json["pos_att_type"] = {"c2p"};
  CHECK(read(json).attends("c2p"));
  CHECK_FALSE(read(json).attends("p2c"));

  json["pos_att_type"] = "C2P | p2p";
  json["position_buckets"] = 24;
  json["attention_head_size"] = 8;
  json["pooler_hidden_size"] = 16;
  json["norm_rel_ebd"] = "batch_norm";
  json["conv_kernel_size"] = 2;
  json["conv_groups"] = 3;
  json["conv_act"] = "tanhh";
  const auto message = complaint([&] { read(json); });
  for (const char* text :
       {"'pos_att_type' must hold \"c2p\", \"p2c\" or both", "'position_buckets' must be 2 or more, and half",
        "'attention_head_size' must be 'hidden_size' over 'num_attention_heads', 4, but got 8",
        "'pooler_hidden_size' must be 'hidden_size', 8, but got 16", "'norm_rel_ebd' must be \"layer_norm\"",
        "'conv_kernel_size' must be odd, or 0, but got 2",
        "'conv_groups' must be a divisor of 'hidden_size', 8", "'conv_act' must be one of"}) {
    CHECK_THAT(message, Contains(text));
  }
  CHECK_THAT(complaint([&] { read({{"model_type", "bert"}}); }), Contains("must be \"deberta-v2\""));
}

TEST_CASE("A DeBERTa's folder is read with its own head or a new one", "[deberta]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  std::vector<std::string> notes;
  const auto options = noting(notes);
  auto source = random_classifier(third());
  const auto expected = source->forward(batch()).logits;
  write_pretrained(folder / "own", tensors_of(*source), third_json());
  auto own = DebertaV2ForSequenceClassification::from_pretrained(folder / "own", {}, options);
  CHECK(own->forward(batch()).logits.equal(expected));
  CHECK(notes.empty());

  // As the published files are: of pretraining, with positions that the model does not use.
  auto tensors = tensors_of(*source);
  for (const char* key :
       {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}) {
    tensors.erase(key);
  }
  for (const char* key : {"deberta.embeddings.position_embeddings.weight",
                          "lm_predictions.lm_head.dense.weight", "mask_predictions.dense.weight"}) {
    tensors.emplace(key, torch::zeros({2, 2}));
  }
  write_pretrained(folder / "published", tensors, third_json());
  torch::manual_seed(6);
  auto fresh = DebertaV2ForSequenceClassification::from_pretrained(folder / "published", 5, options);
  REQUIRE(notes.size() == 2);
  CHECK_THAT(notes[0], Contains("has no task head") && Contains("and 2 more"));
  CHECK_THAT(notes[1], Contains("position_embeddings") && Contains("left out"));
  torch::manual_seed(6);
  CHECK(fresh->pooler->dense->base->weight.equal(torch::empty({8, 8}).normal_(0, 0.02)));
  CHECK(fresh->classifier->base->weight.equal(torch::empty({5, 8}).normal_(0, 0.02)));
  CHECK(fresh->base_model->forward(batch()).last_hidden_state.equal(
      own->base_model->forward(batch()).last_hidden_state));

  const auto legacy = GENERATE(true, false);
  auto json = third_json();
  json["legacy"] = legacy;
  auto words = filled<DebertaV2ForMaskedLM>(third().legacy(legacy));
  save_pretrained(*words, folder / "words");
  auto again = DebertaV2ForMaskedLM::from_pretrained(folder / "words", options);
  CHECK(again->is_tied());
  CHECK(again->forward(batch()).logits.equal(words->forward(batch()).logits));
  CHECK_THAT(complaint([&] { DebertaV2Model::from_pretrained(folder / "none"); }),
             Contains("must be a folder"));
}

TEST_CASE("An adapter on projections that positions share works on both and merges", "[deberta]") {
  const auto config = GENERATE(third(), DebertaV2Config(third().share_att_key(false)), second());
  auto model = random_classifier(config);
  const auto run = [&] {
    const torch::NoGradGuard no_grad;
    return model->forward(batch()).logits;
  };
  const auto plain = run();
  auto adapter = peft::add_adapter(*model, peft::LoraOptions(2),
                                   peft::named({"query_proj", "key_proj", "value_proj", "rel_embeddings"}));
  CHECK(run().equal(plain));
  suite::shake(adapter);
  auto inputs = batch();
  inputs.labels = torch::tensor({2, 0});
  const auto output = model->forward(inputs);
  output.loss.backward();
  for (const auto& [name, parameter] : adapter.named_parameters()) {
    INFO(name);
    CHECK(parameter.grad().abs().max().item<double>() > 0);
  }
  CHECK(difference(output.logits, plain) > 1e-3);
  peft::merge(*model);
  CHECK(difference(model->forward(batch()).logits, output.logits) < 2e-5);
  peft::unmerge(*model);
  peft::disable(*model);
  CHECK(run().equal(plain));
}

TEST_CASE("Rows of one batch use adapters of their own on DeBERTa's positions", "[deberta]") {
  const torch::NoGradGuard no_grad;
  auto model = random_classifier(third());
  const auto lora = peft::LoraOptions(2);
  suite::shake(
      peft::add_adapter(*model, lora, peft::named({"query_proj", "key_proj", "rel_embeddings"}), "one"));
  suite::shake(peft::add_adapter(*model, lora, peft::named({"key_proj", "value_proj"}), "two"));
  std::vector<Tensor> alone;
  for (const char* name : {"one", "two"}) {
    peft::set_active(*model, {name});
    alone.push_back(model->forward(batch()).logits);
  }
  {
    const peft::RowAdapters rows({"two", "one"});
    const auto mixed = model->forward(batch()).logits;
    CHECK(difference(mixed[0], alone[1][0]) < 2e-6);
    CHECK(difference(mixed[1], alone[0][1]) < 2e-6);
  }
  peft::set_active(*model, peft::Parallel("one", "two"));
  CHECK(difference(model->forward(batch()).logits, torch::cat(alone)) < 2e-6);
}

TEST_CASE("Rows of one batch have gates on DeBERTa's positions, or a prefix", "[deberta]") {
  const torch::NoGradGuard no_grad;
  auto model = random_classifier(third());
  const auto gated = peft::LoraOptions(2).gating(true);
  const auto gate = peft::add_adapter(*model, gated, peft::named({"query_proj", "key_proj"}), "gate");
  const auto prefix = peft::add_adapter(*model, peft::PrefixOptions::adapterhub(3), peft::all(), "prefix");
  for (const auto& adapter : {gate, prefix}) suite::shake(adapter);
  std::vector<Tensor> alone;
  for (const char* name : {"gate", "prefix"}) {
    peft::set_active(*model, {name});
    alone.push_back(model->forward(batch()).logits);
  }
  {
    const peft::RowAdapters rows({"prefix", "gate"});  // the second row has padding
    const auto mixed = model->forward(batch()).logits;
    CHECK(difference(mixed[0], alone[1][0]) < 2e-6);
    CHECK(difference(mixed[1], alone[0][1]) < 2e-6);
  }
  peft::set_active(*model, peft::Parallel("gate", "prefix"));
  CHECK(difference(model->forward(batch()).logits, torch::cat(alone)) < 2e-6);
}

TEST_CASE("Prompts, prefixes and bottlenecks work on DeBERTa", "[deberta]") {
  const auto config = GENERATE(third(), DebertaV2Config(second().max_position_embeddings(20)));
  auto model = random_classifier(config);
  auto inputs = batch();
  inputs.labels = torch::tensor({2, 0});
  const auto run = [&] {
    const torch::NoGradGuard no_grad;
    return model->forward(inputs).logits;
  };
  const auto plain = run();
  const auto check = [&](const peft::Adapter& adapter, int64_t added) {
    suite::shake(adapter);
    const auto output = model->forward(inputs);
    CHECK(output.last_hidden_state.size(1) == 6 + added);
    CHECK(real_tokens(output.last_hidden_state, output).size(1) == 6);
    CHECK(difference(output.logits, plain) > 1e-4);
    output.loss.backward();
    for (const auto& [name, parameter] : adapter.named_parameters()) {
      INFO(name);
      REQUIRE(parameter.grad().defined());
      CHECK(parameter.grad().abs().max().item<double>() > 0);
    }
    peft::disable(*model);
    CHECK(run().equal(plain));
  };
  SECTION("before positions") { check(peft::add_adapter(*model, peft::PromptOptions(3), peft::all()), 3); }
  SECTION("after positions and norm") {
    check(peft::add_adapter(*model, peft::PromptOptions(3).after_embedding(true), peft::all()), 3);
  }
  SECTION("prefix") { check(peft::add_adapter(*model, peft::PrefixOptions::adapterhub(3), peft::all()), 0); }
  SECTION("Houlsby's adapters") {
    auto options = peft::BottleneckOptions(2);
    const auto adapter = peft::add_adapter(*model, options.non_linearity("gelu"), "houlsby");
    CHECK(adapter.sites().size() == 4);
    check(adapter, 0);
  }
}

TEST_CASE("A prefix for DeBERTa is saved with a word that Python PEFT has none", "[deberta]") {
  auto model = random_classifier(third());
  const auto adapter = peft::add_adapter(*model, peft::PrefixOptions(3), peft::all());
  const TemporaryFolder folder;
  const auto notes = peft::save_adapter(adapter, folder / "prefix");
  REQUIRE(notes.size() == 2);  // the other one: the task head is not in it
  CHECK_THAT(notes.front(), Catch::Contains("Python PEFT has no prefixes for DeBERTa"));
  auto other = random_classifier(third());
  CHECK(peft::load_adapter(*other, folder / "prefix").sites().size() == adapter.sites().size());
}

TEST_CASE("A checkpointed DeBERTa has the same gradients", "[deberta]") {
  const auto config = GENERATE(DebertaV2Config(second().dropout(0.2)), DebertaV2Config(third().dropout(0.2)));
  auto model = random_classifier(config);
  auto adapter = peft::add_adapter(*model, peft::LoraOptions(2),
                                   peft::named({"query_proj", "key_proj", "rel_embeddings", "output.dense"}));
  suite::shake(adapter);
  model->train();
  auto inputs = batch();
  inputs.labels = torch::tensor({2, 0});
  std::vector<std::vector<Tensor>> gradients;
  for (const bool on : {false, true}) {
    model->gradient_checkpointing(on);
    torch::manual_seed(8);
    for (auto& parameter : adapter.parameters()) parameter.mutable_grad() = Tensor();
    model->forward(inputs).loss.backward();
    auto& of = gradients.emplace_back();
    for (const auto& parameter : adapter.parameters()) of.push_back(parameter.grad().clone());
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) CHECK(gradients[0][i].equal(gradients[1][i]));
}
