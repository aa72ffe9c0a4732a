#include "catch.h"
#include "models/tiny_encoder.h"
#include "peft/io/peft_directory.h"
#include "peft/methods/dora.h"
#include "peft/methods/layer_norm_tuning.h"
#include "peft/methods/lora.h"
#include "peft/methods/prompt.h"
#include "peft/methods/trainable_tokens.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"
#include "peft/models/load.h"
#include "peft/models/save_pretrained.h"

#include <memory>
#include <set>
#include <string>
#include <vector>

using namespace peft::models;
using namespace peft_test;

namespace {

BertConfig config_of(const BertModel&) { return tiny(); }
BertConfig config_of(const RobertaModel&) { return tiny_roberta(); }

template <class Family>
using Spans = EncoderTaskHolder<ForQuestionAnsweringImpl<Family>>;
template <class Family>
using Words = EncoderTaskHolder<ForMaskedLMImpl<Family>>;

/// One model of each task, filled.
template <class Family>
std::vector<AnyEncoder> every_task() {
  const auto config = config_of(typename Family::Model(nullptr));
  return {filled_by_name<typename Family::Model>(config),
          filled_by_name<EncoderTaskHolder<ForSequenceClassificationImpl<Family>>>(config),
          filled_by_name<EncoderTaskHolder<ForTokenClassificationImpl<Family>>>(config),
          filled_by_name<Spans<Family>>(config), filled_by_name<Words<Family>>(config)};
}

/// Everything a model gives for a batch, in one row.
Tensor all_of(const AnyEncoder& model, const EncoderInputs& inputs) {
  const torch::NoGradGuard no_grad;
  const auto output = model->forward(inputs);
  std::vector<Tensor> rows{output.last_hidden_state.flatten()};
  for (const auto& tensor : {output.pooler_output, output.logits, output.start_logits, output.end_logits}) {
    if (tensor.defined()) rows.push_back(tensor.flatten());
  }
  return torch::cat(rows);
}

EncoderInputs with_answers(EncoderInputs inputs) {
  inputs.start_positions = torch::tensor({1, 0});
  inputs.end_positions = torch::tensor({{3}, {1}});
  return inputs;
}

EncoderInputs with_words(EncoderInputs inputs) {
  inputs.labels = torch::tensor({{-100, 4, -100, -100}, {-100, 9, -100, -100}});
  return inputs;
}

}  // namespace

TEST_CASE("Question answering gives transformers' values", "[task]") {
  const torch::NoGradGuard no_grad;
  // Printed by tests/reference/encoder_values.py.
  auto model = filled_by_name<BertForQuestionAnswering>(tiny());
  auto inputs = with_answers(batch());
  auto output = model->forward(inputs);
  CHECK(difference(output.start_logits, torch::tensor({-0.423990607, 0.323494315, 0.570552945, 0.383691728,
                                                       0.303654909, 0.471610814, 0.463437051, 0.544922769})) <
        2e-6);
  CHECK(difference(output.end_logits,
                   torch::tensor({-0.774825454, -0.261746824, 0.0328036249, -0.196437567, -0.282734931,
                                  -0.0944021642, -0.104294538, -0.00176432729})) < 2e-6);
  CHECK_THAT(output.loss.item<double>(), WithinAbs(1.38990307, 2e-6));

  SECTION("positions outside the text") {
    inputs.start_positions = torch::tensor({9, -1});
    inputs.end_positions = torch::tensor({3, 4});
    CHECK_THAT(model->forward(inputs).loss.item<double>(), WithinAbs(1.42774463, 2e-6));
  }
  SECTION("of a RoBERTa") {
    auto roberta = filled_by_name<RobertaForQuestionAnswering>(tiny_roberta());
    output = roberta->forward(with_answers(roberta_batch()));
    CHECK(difference(output.start_logits,
                     torch::tensor({-0.292924881, 0.7380144, 0.779254317, -0.559817791, 0.571693659,
                                    0.877096832, 0.569050074, 0.569050074})) < 2e-6);
    CHECK(difference(output.end_logits,
                     torch::tensor({-0.696781158, 0.896533906, 0.389790744, -0.693986654, 0.047965914,
                                    0.749113858, 0.0444129333, 0.0444129333})) < 2e-6);
    CHECK_THAT(output.loss.item<double>(), WithinAbs(1.41297531, 2e-6));
  }
  SECTION("without positions there is no loss, and half of them is a mistake") {
    CHECK_FALSE(model->forward(batch()).loss.defined());
    inputs.end_positions = Tensor();
    CHECK_THAT(complaint([&] { model->forward(inputs); }),
               Contains("BertForQuestionAnswering: a loss needs start_positions and end_positions, but got "
                        "one of them"));
    inputs = batch();
    inputs.labels = torch::tensor({1, 0});
    CHECK_THAT(complaint([&] { model->forward(inputs); }), Contains("but got labels"));
    inputs = with_answers(batch());
    inputs.start_positions = torch::tensor({1, 0, 2});
    CHECK_THAT(complaint([&] { model->forward(inputs); }),
               Contains("span_loss: start_positions must be one whole number a row, 2 of them"));
  }
}

TEST_CASE("Masked language models give transformers' values", "[task]") {
  const torch::NoGradGuard no_grad;
  // Printed by tests/reference/encoder_values.py.
  auto output = filled_by_name<BertForMaskedLM>(tiny())->forward(with_words(batch()));
  CHECK(output.logits.sizes() == torch::IntArrayRef({2, 4, 20}));
  CHECK(difference(output.logits[1][1],
                   torch::tensor({0.227243721,   -0.315356255, -0.714291513, -0.79255271,  -0.517095208,
                                  -0.0126913041, 0.494606704,  0.778765619,  0.714441836,  0.332206219,
                                  -0.195976391,  -0.63412112,  -0.787631929, -0.589674354, -0.130201563,
                                  0.384938985,   0.726217687,  0.742651522,  0.428537965,  -0.074772507})) <
        2e-6);
  CHECK_THAT(output.loss.item<double>(), WithinAbs(3.1780622, 2e-6));
  output = filled_by_name<RobertaForMaskedLM>(tiny_roberta())->forward(with_words(roberta_batch()));
  CHECK(difference(output.logits[1][1],
                   torch::tensor({-0.556281626,  0.032283958,  0.604629695,  0.902506351,  0.792308986,
                                  0.324999869,   -0.287471503, -0.768335462, -0.901105881, -0.627055168,
                                  -0.0711672083, 0.514891386,  0.866745889,  0.8265993,    0.413997591,
                                  -0.183662117,  -0.696279049, -0.893149555, -0.686807811, -0.17186147})) <
        2e-6);
  CHECK_THAT(output.loss.item<double>(), WithinAbs(3.03510523, 2e-6));
}

TEST_CASE("The output layer is the word vectors until an adapter is merged on it", "[task]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  auto model = filled_by_name<BertForMaskedLM>(tiny());
  const auto words = [](auto any) { return any->base_model->embeddings->word_embeddings->base->weight; };
  const auto decoder = [](auto any) { return any->decoder()->base->weight; };
  CHECK(model->is_tied());
  CHECK_FALSE(decoder(model).requires_grad());
  const auto copy = std::dynamic_pointer_cast<BertForMaskedLMImpl>(model->clone());
  CHECK(copy->is_tied());
  CHECK_FALSE(words(copy).data_ptr() == words(model).data_ptr());
  model->to(torch::kFloat64);
  CHECK(model->is_tied());
  model->to(torch::kFloat32);

  save_pretrained(*model, folder / "tied");
  const auto written = peft::load_safetensors(folder / "tied" / "model.safetensors");
  CHECK_FALSE(written.count("cls.predictions.decoder.weight"));
  CHECK_FALSE(written.count("cls.predictions.decoder.bias"));
  CHECK(written.at("cls.predictions.bias").equal(model->decoder()->base->bias));

  const auto before = words(model).clone();
  auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"decoder"}));
  for (auto& parameter : adapter.parameters()) parameter.add_(0.1);
  const auto expected = model->forward(batch()).logits;
  peft::merge(*model);
  CHECK(difference(model->forward(batch()).logits, expected) < 1e-5);
  CHECK(words(model).equal(before));
  save_pretrained(*model, folder / "merged", folder / "tied");
  auto merged = BertForMaskedLM::from_pretrained(folder / "merged");
  CHECK_FALSE(merged->is_tied());
  CHECK(difference(merged->forward(batch()).logits, expected) < 1e-5);
}

TEST_CASE("Trained tokens leave the output layer's bias out until they are merged, as in Python", "[task]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_by_name<BertForMaskedLM>(tiny());
  const auto bias = model->decoder()->base->bias;
  REQUIRE(bias.abs().max().item<float>() > 0.01);
  const auto logits = [&] { return model->forward(batch()).logits; };
  const auto plain = logits();
  const auto adapter =
      peft::add_adapter(*model, peft::TrainableTokensOptions({2, 4}), peft::named({"word_embeddings"}));
  CHECK(difference(logits(), plain - bias) < 1e-5);
  for (auto& tensor : adapter.parameters()) tensor.add_(0.1);
  const auto adapted = logits();
  // What lies above it goes on without the bias.
  const auto dora = peft::add_adapter(*model, peft::DoraOptions(2), peft::named({"decoder"}), "dora");
  CHECK(difference(logits(), adapted) < 1e-5);
  for (auto& tensor : dora.parameters()) tensor.add_(0.1);
  const auto both = logits();
  peft::merge(*model);
  CHECK(difference(logits(), both + bias) < 2e-5);
  peft::unmerge(*model);
  peft::set_active(*model, {"default"});
  peft::merge(*model);
  CHECK(difference(logits(), adapted + bias) < 1e-5);
}

TEST_CASE("A half-precision model runs with its norms tuned in float32", "[task]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_by_name<BertForMaskedLM>(tiny());
  model->to(torch::kBFloat16);
  const auto logits = [&] {
    const auto found = model->forward(batch()).logits;
    CHECK(found.scalar_type() == torch::kBFloat16);
    return found.to(torch::kFloat32);
  };
  const auto plain = logits();
  const auto adapter = peft::add_adapter(*model, peft::LayerNormTuningOptions(), peft::all());
  CHECK(difference(logits(), plain) < 0.03);  // bfloat16 has 8 bits
  for (auto& tensor : adapter.parameters()) {
    CHECK(tensor.scalar_type() == torch::kFloat32);
    tensor.mul_(1.5);
  }
  CHECK(difference(logits(), plain) > 0.1);
}

TEST_CASE("Words that train get the output layer's gradient too", "[task]") {
  auto model = filled_by_name<RobertaForMaskedLM>(tiny_roberta());
  auto& words = model->base_model->embeddings->word_embeddings->base->weight;
  model->forward(with_words(roberta_batch())).loss.backward();
  const auto both = words.grad().clone();
  CHECK((both[12] != 0).any().item<bool>());  // a word that the texts do not have
}

TEMPLATE_TEST_CASE("Every parameter of every task lies in a site", "[task]", BertFamily, RobertaFamily) {
  for (const auto& model : every_task<TestType>()) {
    INFO(model.encoder().architecture());
    std::set<std::string> in_sites, all;
    for (const auto& item : model->named_parameters()) all.insert(item.key());
    for (const auto& item : (*model).named_modules("", /*include_self=*/false)) {
      const auto* site = dynamic_cast<peft::SiteImpl*>(item.value().get());
      if (!site) continue;
      for (const auto& parameter : site->base_parameters())
        in_sites.insert(item.key() + "." + parameter.key());
    }
    CHECK(in_sites == all);
  }
}

TEMPLATE_TEST_CASE("A folder that was written from a config opens as what it was", "[task]", BertFamily,
                   RobertaFamily) {
  const TemporaryFolder folder;
  const bool roberta = std::is_same_v<TestType, RobertaFamily>;
  const auto inputs = roberta ? roberta_batch() : batch();
  int number = 0;
  for (const auto& model : every_task<TestType>()) {
    const auto& self = model.encoder();
    INFO(self.architecture());
    const auto path = folder / std::to_string(number++);
    save_pretrained(*model, path);
    const auto again = load(path);
    CHECK(again.encoder().architecture() == self.architecture());
    CHECK(again.encoder().describe().task_type == self.describe().task_type);
    CHECK(again.encoder().describe().model_type == (roberta ? "roberta" : "bert"));
    CHECK(all_of(again, inputs).equal(all_of(model, inputs)));
    CHECK_FALSE(again->is_training());
    const auto copy = (*model).clone();
    CHECK(all_of(again, inputs).equal(all_of(model, inputs)));
    CHECK(copy->parameters().size() == model->parameters().size());
  }
}

TEST_CASE("Losses are of the text's own tokens where there are virtual ones", "[task]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(2);
  auto spans = filled_by_name<BertForQuestionAnswering>(tiny());
  peft::add_adapter(*spans, peft::PromptOptions(2), peft::all());
  auto output = spans->forward(with_answers(batch()));
  REQUIRE(output.start_logits.sizes() == torch::IntArrayRef({2, 6}));
  const auto answers = with_answers(batch());
  CHECK(output.loss.equal(span_loss(output.start_logits.slice(1, 2), output.end_logits.slice(1, 2),
                                    answers.start_positions, answers.end_positions)));
  auto words = filled_by_name<RobertaForMaskedLM>(tiny_roberta());
  peft::add_adapter(*words, peft::PromptOptions(2), peft::all());
  const auto masked = with_words(roberta_batch());
  output = words->forward(masked);
  CHECK(output.loss.equal(token_loss(output.logits.slice(1, 2), masked.labels)));
}

TEST_CASE("Labels are repeated for each adapter of a Parallel", "[task]") {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(2);
  const auto check = [](const AnyEncoder& model, const EncoderInputs& inputs) {
    for (const char* name : {"a", "b"}) {
      peft::add_adapter(*model, peft::LoraOptions(2).init(peft::LoraInit::random), peft::named({"query"}),
                        name);
    }
    const auto loss = [&](const char* name) {
      peft::set_active(*model, {name});
      return model->forward(inputs).loss.item<double>();
    };
    const auto mean = (loss("a") + loss("b")) / 2;
    peft::set_active(*model, peft::Parallel("a", "b"));
    CHECK_THAT(model->forward(inputs).loss.item<double>(), WithinAbs(mean, 1e-6));
  };
  check(filled_by_name<BertForQuestionAnswering>(tiny()), with_answers(batch()));
  check(filled_by_name<RobertaForMaskedLM>(tiny_roberta()), with_words(roberta_batch()));
}

TEST_CASE("A folder opens for another task, with a head drawn as transformers draws it", "[load]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  std::vector<std::string> notes;
  save_pretrained(*filled_by_name<RobertaModel>(tiny_roberta()), folder / "encoder");
  const auto options = LoadOptions().pretrained(noting(notes));
  const auto open = [&](Task task) { return load(folder / "encoder", LoadOptions(options).task(task)); };
  CHECK(load(folder / "encoder", options).as<RobertaModelImpl>() != nullptr);
  CHECK(notes.empty());

  torch::manual_seed(4);
  const auto texts =
      load(folder / "encoder", LoadOptions(options).task(Task::sequence_classification).labels(5));
  auto* typed = texts.as<RobertaForSequenceClassificationImpl>();
  REQUIRE(typed);
  CHECK(texts->forward(roberta_batch()).logits.sizes() == torch::IntArrayRef({2, 5}));
  torch::manual_seed(4);
  CHECK(typed->classifier->dense->base->weight.equal(torch::empty({8, 8}).normal_(0, 0.02)));
  CHECK(typed->classifier->out_proj->base->weight.equal(torch::empty({5, 8}).normal_(0, 0.02)));
  REQUIRE(notes.size() == 2);
  CHECK_THAT(notes[0], Contains("no task head: 'classifier.dense.weight'") && Contains("start at random"));
  CHECK_THAT(notes[1], Contains("'pooler.dense.bias', 'pooler.dense.weight' left out"));

  const auto words = open(Task::masked_lm);
  auto* head = words.as<RobertaForMaskedLMImpl>();
  REQUIRE(head);
  CHECK(head->is_tied());
  CHECK((head->lm_head->layer_norm->base->weight == 1).all().item<bool>());
  CHECK((head->decoder()->base->bias == 0).all().item<bool>());
  CHECK(open(Task::question_answering).as<RobertaForQuestionAnsweringImpl>() != nullptr);
  CHECK(open(Task::token_classification)->forward(roberta_batch()).logits.size(2) == 3);
  CHECK(AnyEncoder(open(Task::embedding))->forward(roberta_batch()).pooler_output.defined());
}

TEST_CASE("An adapter goes through any encoder as through a family's type", "[load]") {
  const TemporaryFolder folder;
  save_pretrained(*filled_by_name<RobertaForTokenClassification>(tiny_roberta()), folder / "base");
  const auto model = load(folder / "base");
  auto adapter = peft::add_adapter(*model, peft::LoraOptions(2).init(peft::LoraInit::random),
                                   peft::named({"query", "value"}), "tags");
  peft::train_also(adapter, *model, peft::named({"classifier"}));
  auto inputs = roberta_batch();
  inputs.labels = torch::tensor({{2, 0, -100, 1}, {1, 1, -100, -100}});
  model->train();
  model->forward(inputs).loss.backward();
  model->eval();
  peft::save_adapter(adapter, folder / "out");
  CHECK(Json::parse(peft_test::read_bytes(folder / "out" / "adapter_config.json"))["task_type"] ==
        "TOKEN_CLS");
  const auto other = load(folder / "base");
  peft::load_adapter(*other, folder / "out", "tags");
  const torch::NoGradGuard no_grad;
  CHECK(other->forward(inputs).logits.equal(model->forward(inputs).logits));
  CHECK(other->forward(inputs).logits.equal(other(inputs).logits));
}

TEST_CASE("What does not open a folder says what does", "[load]") {
  const TemporaryFolder folder;
  const auto write = [&](const Json& config) {
    write_model(folder / "model", tensors_of(*filled_by_name<BertForSequenceClassification>(tiny())), config);
  };
  const auto message = [&](const LoadOptions& options = {}) {
    return complaint([&] { load(folder / "model", options); });
  };
  auto config = tiny_json();
  SECTION("a family that is not known") {
    config["model_type"] = "t5";
    write(config);
    CHECK_THAT(message(), Contains("'model_type' must be one of \"bert\", \"roberta\", \"xlm-roberta\"") &&
                              Contains("but got \"t5\""));
    config.erase("model_type");
    write(config);
    CHECK_THAT(message(), Contains("'model_type' must be one of") && Contains("but got none"));
  }
  SECTION("a decoder") {
    config["model_type"] = "gpt2";
    write(config);
    CHECK_THAT(message(), Contains("but got \"gpt2\" (hint: peft::models::GPT2Model opens this folder)"));
  }
  SECTION("another family's type") {
    write(config);
    CHECK_THAT(complaint([&] { RobertaModel::from_pretrained(folder / "model"); }),
               Contains("but got \"bert\" (hint: peft::models::BertModel opens this folder)"));
    CHECK_THAT(complaint([&] { RobertaForMaskedLM::from_pretrained(folder / "model"); }),
               Contains("peft::models::BertModel opens this folder"));
  }
  SECTION("a class that is no task here") {
    config["architectures"] = {"BertForMultipleChoice"};
    write(config);
    CHECK_THAT(message(), Contains("'architectures' must be one of …ForSequenceClassification") &&
                              Contains("(hint: LoadOptions::task says which to open instead)"));
    CHECK(message(LoadOptions().task(Task::sequence_classification)).empty());
    config["architectures"] = {"BertLMHeadModel"};
    write(config);
    CHECK_THAT(message(), Contains("'architectures' must be one of …ForSequenceClassification"));
  }
  SECTION("a head of another size") {
    write(config);
    CHECK_THAT(
        message(LoadOptions().labels(4)),
        Contains("'classifier.weight' expected (4, 8), but got (3, 8) (hint: another number of labels"));
    CHECK_THAT(message(LoadOptions().task(Task::masked_lm).labels(4)),
               Contains("load: labels are for classifiers of texts or tokens") && Contains("got 4"));
  }
}
