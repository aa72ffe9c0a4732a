#include "catch.h"
#include "models/tiny_bert.h"
#include "peft/io/peft_directory.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"
#include "peft/models/save_pretrained.h"

#include <memory>
#include <string>
#include <vector>

using namespace peft::models;
using namespace peft_test;

namespace {

BertForTokenClassification filled_tagger() {
  BertForTokenClassification model(tiny());
  fill(*model);
  model->eval();
  return model;
}

EncoderInputs labelled_batch() {
  auto inputs = batch();
  inputs.labels = torch::tensor({{2, 0, -100, 1}, {1, 1, -100, -100}});
  return inputs;
}

}  // namespace

TEST_CASE("A tiny BERT that labels tokens gives transformers' values", "[bert]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_tagger();
  auto inputs = labelled_batch();
  const auto output = model->forward(inputs);
  // Printed by tests/reference/bert_values.py.
  const auto token_logits =
      torch::tensor({-0.472003996, -0.531088531, -0.354493022, -0.00390932336, -0.381249428, -0.590167463});
  CHECK(output.logits.sizes() == torch::IntArrayRef({2, 4, 3}));
  CHECK(difference(output.logits.select(1, 1), token_logits) < 2e-6);
  CHECK_FALSE(output.pooler_output.defined());
  CHECK_THAT(output.loss.item<double>(), WithinAbs(1.09724998, 2e-6));
  inputs.labels = inputs.labels.clamp_min(0).to(torch::kInt);
  CHECK_THAT(model->forward(inputs).loss.item<double>(), WithinAbs(0.976159275, 2e-6));
  inputs.labels = Tensor();
  CHECK_FALSE(model->forward(inputs).loss.defined());
}

TEST_CASE("A label of -100 gives a token no say", "[bert]") {
  auto model = filled_tagger();
  auto inputs = labelled_batch();
  const auto output = model->forward(inputs);
  output.logits.retain_grad();
  output.loss.backward();
  const auto ignored = inputs.labels == -100;
  CHECK((output.logits.grad().index({ignored}) == 0).all().item<bool>());
  CHECK((output.logits.grad().index({ignored.logical_not()}) != 0).all().item<bool>());
}

TEST_CASE("Labels that are not one a token are refused", "[bert]") {
  auto model = filled_tagger();
  auto inputs = labelled_batch();
  const auto message = [&] { return complaint([&] { model->forward(inputs); }); };
  SECTION("another length") {
    inputs.labels = inputs.labels.slice(1, 0, 3);
    CHECK_THAT(message(), Contains("token_loss: labels must be one a token, (2, 4), but got (2, 3)") &&
                              Contains("-100"));
  }
  SECTION("another number of rows") {
    inputs.labels = inputs.labels.slice(0, 0, 1);
    CHECK_THAT(message(), Contains("must be one a token, (2, 4), but got (1, 4)"));
  }
  SECTION("one a text") {
    inputs.labels = torch::tensor({1, 0});
    CHECK_THAT(message(), Contains("must be one a token, (2, 4), but got (2)"));
  }
  SECTION("as many, but laid out otherwise") {
    inputs.labels = inputs.labels.view({4, 2});
    CHECK_THAT(message(), Contains("must be one a token, (2, 4), but got (4, 2)"));
  }
  SECTION("another type") {
    inputs.labels = inputs.labels.to(torch::kFloat32);
    CHECK_THAT(message(), Contains("token_loss: labels must be whole numbers (int64), but got Float"));
  }
  SECTION("no label of the head") {
    inputs.labels[0][1] = 3;
    CHECK_THAT(message(), Contains("labels must be from 0 to 2, or -100, but got 3"));
    inputs.labels[0][1] = -1;
    CHECK_THAT(message(), Contains("labels must be from 0 to 2, or -100, but got -1"));
  }
}

TEST_CASE("A BERT that labels tokens has transformers' keys and says what it is", "[bert]") {
  const auto model = filled_tagger();
  const auto parameters = model->named_parameters();
  CHECK(parameters.contains("classifier.weight"));
  CHECK(parameters.contains("bert.encoder.layer.1.output.LayerNorm.bias"));
  CHECK_FALSE(parameters.contains("bert.pooler.dense.weight"));
  CHECK(parameters.size() == filled_classifier()->named_parameters().size() - 2);
  CHECK(model->describe().task_type == "TOKEN_CLS");
  CHECK(model->describe().model_type == "bert");
}

TEST_CASE("A clone of a BERT that labels tokens gives the same and has weights of its own", "[bert]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_tagger();
  const auto expected = model->forward(batch()).logits;
  const auto copy = std::dynamic_pointer_cast<BertForTokenClassificationImpl>(model->clone());
  REQUIRE(copy);
  CHECK(copy->forward(batch()).logits.equal(expected));
  for (auto& parameter : copy->parameters()) parameter.zero_();
  CHECK(model->forward(batch()).logits.equal(expected));
}

TEST_CASE("A folder's BERT labels tokens, with its own head or a new one", "[pretrained]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  std::vector<std::string> notes;
  const auto options = noting(notes);
  auto source = filled_tagger();
  const auto expected = source->forward(batch()).logits;

  write_model(folder / "own", tensors_of(*source));
  auto model = BertForTokenClassification::from_pretrained(folder / "own", {}, options);
  CHECK(model->forward(batch()).logits.equal(expected));
  CHECK_FALSE(model->is_training());
  CHECK(model->config.labels() == std::vector<std::string>{"red", "green", "blue"});
  CHECK(notes.empty());

  SECTION("a pooler is left out and named") {
    write_model(folder / "pooled", tensors_of(*filled_classifier()->base_model));
    torch::manual_seed(4);
    auto fresh = BertForTokenClassification::from_pretrained(folder / "pooled", 5, options);
    CHECK(fresh->config.num_labels() == 5);
    REQUIRE(notes.size() == 2);
    CHECK_THAT(notes[0], Contains("'classifier.weight'") && Contains("start at random"));
    CHECK_THAT(notes[1], Contains("'pooler.dense.bias', 'pooler.dense.weight' left out"));
    torch::manual_seed(4);
    CHECK(fresh->classifier->base->weight.equal(torch::empty({5, 8}).normal_(0, 0.02)));
    CHECK((fresh->classifier->base->bias == 0).all().item<bool>());
  }
  SECTION("another number of labels is refused") {
    CHECK_THAT(
        complaint([&] { BertForTokenClassification::from_pretrained(folder / "own", 4, options); }),
        Contains("'classifier.weight' expected (4, 8), but got (3, 8) (hint: another number of labels"));
  }
  SECTION("written, it is read again") {
    save_pretrained(*model, folder / "out", folder / "own",
                    SaveOptions().architecture("BertForTokenClassification"));
    auto again = BertForTokenClassification::from_pretrained(folder / "out", {}, options);
    CHECK(again->forward(batch()).logits.equal(expected));
    CHECK(Json::parse(peft_test::read_bytes(folder / "out" / "config.json"))["architectures"][0] ==
          "BertForTokenClassification");
  }
}

TEST_CASE("An adapter of a BERT that labels tokens is saved as TOKEN_CLS, with its head", "[bert]") {
  const TemporaryFolder folder;
  auto model = filled_tagger();
  auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query"}), "tags");
  const auto task_type = [&](const std::string& name) {
    peft::save_adapter(adapter, folder / name);
    return Json::parse(peft_test::read_bytes(folder / name / "adapter_config.json"))["task_type"];
  };
  CHECK(task_type("headless").is_null());  // Python's class for this task asks for a trained head
  peft::train_also(adapter, *model, peft::named({"classifier"}));
  CHECK(task_type("whole") == "TOKEN_CLS");
  model->forward(labelled_batch()).loss.backward();
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : adapter.parameters()) parameter.add_(0.1);
  }
  peft::save_adapter(adapter, folder / "trained");
  auto other = filled_tagger();
  peft::load_adapter(*other, folder / "trained", "tags");
  CHECK(other->forward(batch()).logits.equal(model->forward(batch()).logits));
}
