#include "catch.h"
#include "models/tiny_bert.h"
#include "peft/methods/lora.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"
#include "peft/models/save_pretrained.h"

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

using namespace peft::models;
using namespace peft_test;

TEST_CASE("A tiny BERT gives transformers' values", "[bert]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_classifier();
  // Printed by tests/reference/bert_values.py.
  const auto hidden =
      torch::tensor({0.873286068, 1.08421481, -0.203378528, -0.913232923, -0.525789142, -1.26867187,
                     -0.479557663, 1.30944741, 0.902142167, 1.16684532, 0.2196839, 0.410189152, -0.26426366,
                     -1.87098217, -0.887233198, -0.28940323});
  const auto first_layer =
      torch::tensor({1.34945691, 1.23462415, -0.176756293, -1.66694677, -1.05069172, -0.767183125,
                     -0.379647911, 1.18653905, 1.18650317, 2.02628303, 0.770925224, -0.153311074,
                     -0.503421247, -1.47043192, -1.17748892, -0.167347938});
  const auto pooled =
      torch::tensor({-0.54767555, -0.411224127, -0.0655340105, 0.320402831, 0.521633804, 0.511847258,
                     0.291435719, -0.0962372124, -0.271820754, -0.476206452, -0.483444363, -0.294327766,
                     0.0547885522, 0.369838923, 0.500020266, 0.435769767});
  const auto logits =
      torch::tensor({-0.210163444, -0.193756595, -0.09082973, -0.132301152, -0.32335788, -0.369720668});

  auto inputs = batch();
  inputs.output_hidden_states = true;
  inputs.labels = torch::tensor({2, 0});
  const auto output = model->forward(inputs);
  CHECK(difference(output.last_hidden_state.select(1, 1), hidden) < 2e-6);
  CHECK(difference(output.hidden_states[1].select(1, 0), first_layer) < 2e-6);
  CHECK(difference(output.pooler_output, pooled) < 2e-6);
  CHECK(difference(output.logits, logits) < 2e-6);
  CHECK_THAT(output.loss.item<double>(), WithinAbs(0.993551314, 2e-6));

  SECTION("a label of -100 is ignored") {
    inputs.labels = torch::tensor({-100, 0});
    CHECK_THAT(model->forward(inputs).loss.item<double>(), WithinAbs(0.961166978, 2e-6));
  }
  SECTION("several labels a row") {
    inputs.labels = torch::tensor({{1.0F, 0.0F, 1.0F}, {0.0F, 0.0F, 1.0F}});
    CHECK_THAT(model->forward(inputs).loss.item<double>(), WithinAbs(0.702158272, 2e-6));
  }
  SECTION("regression") {
    model->config.problem_type(ProblemType::regression);
    inputs.labels = torch::tensor({{0.5F, 0.0F, 1.0F}, {0.0F, -2.0F, 1.0F}});
    CHECK_THAT(model->forward(inputs).loss.item<double>(), WithinAbs(1.07275844, 2e-6));
  }
  SECTION("labels of another shape are refused") {
    inputs.labels = torch::tensor({1, 2, 0});
    CHECK_THAT(complaint([&] { model->forward(inputs); }),
               Contains("must be one a row, 2 of them, but got (3)"));
    inputs.labels = torch::rand({2, 2});
    CHECK_THAT(complaint([&] { model->forward(inputs); }), Contains("logits, (2, 3), but got (2, 2)"));
  }
}

TEST_CASE("A single output is a regression", "[bert]") {
  const auto logits = torch::tensor({{1.0F}, {3.0F}});
  CHECK(classification_loss(logits, torch::tensor({0, 1}), ProblemType::automatic).item<double>() == 2.5);
  CHECK(classification_loss(logits, torch::tensor({{0.0F}, {1.0F}}), ProblemType::automatic).item<double>() ==
        2.5);
}

TEST_CASE("Labels keep their type over logits of a half one", "[bert]") {
  const auto scores = torch::tensor({3.8F, 4.75F, 300.0F});
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    const auto logits = torch::tensor({1.0F, 2.0F, 0.0F}).to(type).unsqueeze(1);
    const auto loss = classification_loss(logits, scores, ProblemType::automatic);
    CHECK(loss.scalar_type() == torch::kFloat32);
    CHECK(loss.item<float>() == at::mse_loss(torch::tensor({1.0F, 2.0F, 0.0F}), scores).item<float>());
    const auto soft = torch::tensor({{0.3F}, {0.9F}, {1.0F}});
    CHECK(classification_loss(logits, soft, ProblemType::multi_label).scalar_type() == torch::kFloat32);
  }
}

TEST_CASE("Padding does not change what real tokens give", "[bert]") {
  torch::manual_seed(1);
  const torch::NoGradGuard no_grad;
  BertModel model(tiny());
  model->eval();
  EncoderInputs alone;
  alone.input_ids = torch::randint(20, {1, 5});
  const auto expected = model->forward(alone);

  EncoderInputs padded;
  padded.input_ids = torch::cat(
      {torch::cat({alone.input_ids, torch::zeros({1, 3}, torch::kLong)}, 1), torch::randint(20, {1, 8})});
  padded.attention_mask = torch::ones({2, 8}, torch::kLong);
  padded.attention_mask[0].slice(0, 5).zero_();
  const auto output = model->forward(padded);
  CHECK(difference(output.last_hidden_state[0].slice(0, 0, 5), expected.last_hidden_state[0]) < 1e-6);
  CHECK(difference(output.pooler_output[0], expected.pooler_output[0]) < 1e-6);

  SECTION("a mask of ones equals no mask") {
    alone.attention_mask = torch::ones({1, 5}, torch::kLong);
    CHECK(model->forward(alone).last_hidden_state.equal(expected.last_hidden_state));
    CHECK_FALSE(peft::internal::attention_bias(alone.attention_mask, torch::kFloat32).defined());
  }
  SECTION("a bias hides with the type's lowest value") {
    for (const auto type : {torch::kFloat32, torch::kFloat16, torch::kBFloat16}) {
      const auto bias = peft::internal::attention_bias(padded.attention_mask, type);
      CHECK(bias.sizes() == torch::IntArrayRef({2, 1, 1, 8}));
      CHECK(bias[0][0][0][4].item<double>() == 0);
      CHECK(bias[0][0][0][5].item<double>() < -6e4);
      CHECK(bias.isfinite().all().item<bool>());
    }
  }
  SECTION("a row without a real token is finite") {
    padded.attention_mask[0].zero_();
    CHECK(model->forward(padded).last_hidden_state.isfinite().all().item<bool>());
  }
}

TEST_CASE("What is absent has transformers' defaults", "[bert]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_classifier();
  EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19}, {1, 2, 4}});
  const auto expected = model->forward(inputs).logits;
  inputs.token_type_ids = torch::zeros({2, 3}, torch::kLong);
  inputs.position_ids = torch::arange(3).unsqueeze(0);
  inputs.attention_mask = torch::ones({2, 3});
  CHECK(model->forward(inputs).logits.equal(expected));
  inputs.position_ids = torch::arange(3).expand({2, 3});
  CHECK(model->forward(inputs).logits.equal(expected));
  inputs.inputs_embeds =
      torch::embedding(model->base_model->embeddings->word_embeddings->base->weight, inputs.input_ids);
  inputs.input_ids = Tensor();
  CHECK(model->forward(inputs).logits.equal(expected));
  inputs.position_ids = torch::tensor({{2, 1, 0}});
  CHECK(difference(model->forward(inputs).logits, expected) > 1e-3);
}

TEST_CASE("Inputs that do not fit are refused by name", "[bert]") {
  auto model = filled_classifier();
  auto inputs = batch();
  const auto message = [&] { return complaint([&] { model->forward(inputs); }); };
  SECTION("both or neither") {
    inputs.inputs_embeds = torch::rand({2, 4, 8});
    CHECK_THAT(message(), Contains("either input_ids or inputs_embeds, but got both"));
    inputs.inputs_embeds = inputs.input_ids = Tensor();
    CHECK_THAT(message(), Contains("but got neither"));
  }
  SECTION("labels that no head takes") {
    inputs.labels = torch::tensor({1, 0});
    CHECK(message().empty());
    CHECK_THAT(complaint([&] { BertModel(tiny())->forward(inputs); }),
               Contains("BertModel: labels were given, but there is no head to make a loss of them"));
    inputs.start_positions = torch::tensor({1, 0});
    CHECK_THAT(message(), Contains("start_positions were given") && Contains("ForQuestionAnswering"));
  }
  SECTION("one dimension") {
    inputs.input_ids = torch::tensor({1, 2});
    CHECK_THAT(message(), Contains("input_ids must be (batch, time), but got (2)"));
  }
  SECTION("a mask of another length") {
    inputs.attention_mask = torch::ones({2, 3});
    CHECK_THAT(message(), Contains("attention_mask must be (2, 4), but got (2, 3)"));
  }
  SECTION("a text that is too long") {
    inputs = {};
    inputs.input_ids = torch::zeros({1, 11}, torch::kLong);
    CHECK_THAT(message(), Contains("at most 10 tokens, but got 11"));
  }
  SECTION("ids out of range") {
    inputs.input_ids[0][2] = 20;
    CHECK_THAT(message(), Contains("input_ids must be from 0 to 19, but got 20"));
    inputs = batch();
    inputs.token_type_ids[0][2] = -1;
    CHECK_THAT(message(), Contains("token_type_ids must be from 0 to 1, but got -1"));
    inputs = batch();
    inputs.position_ids = torch::full({1, 4}, 10, torch::kLong);
    CHECK_THAT(message(), Contains("position_ids must be from 0 to 9, but got 10"));
  }
}

TEST_CASE("Keys are transformers' and every parameter lies in a site", "[bert]") {
  BertForSequenceClassification model(tiny().num_hidden_layers(1));
  std::vector<std::string> expected;
  const auto both = [&](const std::string& name) {
    expected.insert(expected.end(), {name + ".weight", name + ".bias"});
  };
  for (const char* name : {"word", "position", "token_type"}) {
    expected.push_back(std::string("bert.embeddings.") + name + "_embeddings.weight");
  }
  both("bert.embeddings.LayerNorm");
  for (const char* name :
       {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"}) {
    both(std::string("bert.encoder.layer.0.") + name);
  }
  both("bert.pooler.dense");
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
  const auto modules = model->named_modules();
  CHECK(modules["bert.encoder.layer.0.attention.self.attention"]->as<peft::Attention>() != nullptr);
  CHECK(modules["bert.encoder.layer.0.attention.output.LayerNorm"]->as<peft::Residual>() != nullptr);
  CHECK(modules["bert.encoder.layer.0.output.LayerNorm"]->as<peft::Residual>() != nullptr);
  CHECK(model->describe().task_type == "SEQ_CLS");
  CHECK(model->base_model->describe().task_type == "FEATURE_EXTRACTION");
  CHECK(model->describe().model_type == "bert");
}

TEST_CASE("A new BERT has transformers' initial values", "[bert]") {
  torch::manual_seed(3);
  BertModel model(tiny().hidden_size(64).vocab_size(500).pad_token_id(7));
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    const bool norm = item.key().find("LayerNorm.weight") != std::string::npos;
    if (item.key().ends_with("bias")) {
      CHECK((item.value() == 0).all().item<bool>());
    } else if (norm) {
      CHECK((item.value() == 1).all().item<bool>());
    } else if (item.value().numel() > 500) {
      CHECK_THAT(item.value().std().item<double>(), WithinAbs(0.02, 0.002));
    }
  }
  CHECK((model->embeddings->word_embeddings->base->weight[7] == 0).all().item<bool>());
  torch::manual_seed(3);
  const auto first = torch::empty({500, 64}).normal_(0, 0.02);
  CHECK(model->embeddings->word_embeddings->base->weight[8].equal(first[8]));
}

TEST_CASE("One row of segments serves rows that have adapters of their own", "[bert]") {
  auto model = filled_classifier();
  for (const char* name : {"a", "b"}) {
    const auto adapter =
        peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"token_type_embeddings"}), name);
    const torch::NoGradGuard no_grad;
    for (auto& parameter : adapter.parameters()) parameter.add_(name[0] == 'a' ? 0.1 : 0.2);
  }
  peft::set_active(*model, peft::Parallel("a", "b"));
  auto inputs = batch();
  const auto rows = inputs.input_ids.size(0), time = inputs.input_ids.size(1);
  inputs.token_type_ids = torch::zeros({rows, time}, torch::kLong);
  const auto whole = model->forward(inputs).logits;
  inputs.token_type_ids = torch::zeros({1, time}, torch::kLong);
  CHECK(torch::equal(model->forward(inputs).logits, whole));
}

TEST_CASE("A clone gives the same and has weights of its own", "[bert]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_classifier();
  for (auto& parameter : model->parameters()) parameter.set_requires_grad(false);
  const auto expected = model->forward(batch()).logits;
  const auto copy = std::dynamic_pointer_cast<BertForSequenceClassificationImpl>(model->clone());
  REQUIRE(copy);
  CHECK_FALSE(copy->is_training());
  CHECK(copy->forward(batch()).logits.equal(expected));
  for (auto& parameter : copy->parameters()) {
    CHECK_FALSE(parameter.requires_grad());
    parameter.zero_();
  }
  CHECK(model->forward(batch()).logits.equal(expected));
  CHECK((copy->forward(batch()).logits == 0).all().item<bool>());

  BertModel encoder(tiny(), /*with_pooler=*/false);
  const auto plain = std::dynamic_pointer_cast<BertModelImpl>(encoder->clone());
  CHECK_FALSE(plain->pooler);
  CHECK_FALSE(plain->forward(batch()).pooler_output.defined());
}

TEST_CASE("Hidden states come on request", "[bert]") {
  const torch::NoGradGuard no_grad;
  auto model = filled_classifier();
  auto inputs = batch();
  CHECK(model->forward(inputs).hidden_states.empty());
  inputs.output_hidden_states = true;
  const auto output = model->forward(inputs);
  REQUIRE(output.hidden_states.size() == 3);
  CHECK(output.hidden_states.back().equal(output.last_hidden_state));
}

TEST_CASE("Sentence vectors are means of real tokens, of length one", "[bert]") {
  const auto hidden = torch::tensor({1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 60.0F}).view({1, 3, 2});
  const auto mask = torch::tensor({{1, 1, 0}});
  CHECK(mean_pool(hidden, mask).equal(torch::tensor({{2.0F, 3.0F}})));
  CHECK(mean_pool(hidden, {}).allclose(torch::tensor({{3.0F, 22.0F}})));
  CHECK(embed(hidden, mask).allclose(torch::tensor({{2.0F, 3.0F}}) / std::sqrt(13.0)));
  CHECK(mean_pool(hidden, torch::zeros({1, 3}, torch::kLong)).equal(torch::zeros({1, 2})));
}

TEST_CASE("Activation functions are named as in Hugging Face's configs", "[bert]") {
  const auto x = torch::linspace(-3, 3, 13);
  CHECK(activation_function("gelu")(x).equal(at::gelu(x)));
  CHECK(activation_function("gelu_new")(x).allclose(
      0.5 * x * (1 + (std::sqrt(2 / 3.14159265358979) * (x + 0.044715 * x.pow(3))).tanh())));
  CHECK(activation_function("relu2")(x).equal(at::relu(x) * at::relu(x)));
  CHECK_THAT(complaint([] { activation_function("gleu"); }),
             Contains("no activation 'gleu'; there are 'gelu'"));
}

TEST_CASE("A folder is loaded mapped, frozen and in evaluation mode", "[pretrained]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  auto source = filled_classifier();
  const auto expected = source->forward(batch()).logits;
  std::vector<std::string> notes;
  const auto options = noting(notes);

  write_model(folder / "model", tensors_of(*source));
  auto model = BertForSequenceClassification::from_pretrained(folder / "model", {}, options);
  CHECK(model->forward(batch()).logits.equal(expected));
  CHECK_FALSE(model->is_training());
  for (const auto& parameter : model->parameters()) CHECK_FALSE(parameter.requires_grad());
  CHECK(model->config.labels() == std::vector<std::string>{"red", "green", "blue"});
  CHECK(notes.empty());

  SECTION("an encoder leaves the head out and says so") {
    auto encoder = BertModel::from_pretrained(folder / "model", options);
    CHECK(encoder->forward(batch()).pooler_output.equal(source->forward(batch()).pooler_output));
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0],
               Contains("'classifier.bias', 'classifier.weight' left out") && Contains("model.safetensors"));
  }
  SECTION("the pooler is left out on request") {
    auto encoder = BertModel::from_pretrained(folder / "model", PretrainedOptions(options).pooler(false));
    CHECK_FALSE(encoder->pooler);
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0], Contains("and 2 more left out"));
  }
  SECTION("another type on request") {
    auto wide = BertForSequenceClassification::from_pretrained(
        folder / "model", {}, PretrainedOptions(options).dtype(torch::kFloat64));
    CHECK(wide->forward(batch()).logits.scalar_type() == torch::kFloat64);
    CHECK(difference(wide->forward(batch()).logits, expected) < 1e-5);
  }
  SECTION("the config's type") {
    auto json = tiny_json();
    json["dtype"] = "float64";
    write_model(folder / "wide", tensors_of(*source), json);
    auto wide = BertForSequenceClassification::from_pretrained(folder / "wide");
    CHECK(wide->parameters()[0].scalar_type() == torch::kFloat64);
    json["dtype"] = "int8";
    write_model(folder / "narrow", tensors_of(*source), json);
    CHECK_THAT(complaint([&] { BertModel::from_pretrained(folder / "narrow"); }),
               Contains("'dtype' must be float32"));
  }
  SECTION("dropout and the base's name on request") {
    auto other = BertForSequenceClassification::from_pretrained(
        folder / "model", {}, PretrainedOptions(options).dropout(0).name_or_path("some/base"));
    other->train();
    CHECK(other->forward(batch()).logits.equal(expected));
    CHECK(other->describe().name_or_path == "some/base");
  }
}

TEST_CASE("Names are matched as transformers matches them", "[pretrained]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  auto source = filled_classifier();
  const auto tensors = tensors_of(*source);
  const auto expected = source->forward(batch());
  std::vector<std::string> notes;
  const auto options = noting(notes);

  SECTION("the base prefix is added") {
    auto bare = renamed(tensors, [](const std::string& name) { return without(name, "bert."); });
    write_model(folder / "model", bare);
    auto model = BertForSequenceClassification::from_pretrained(folder / "model", {}, options);
    CHECK(model->forward(batch()).logits.equal(expected.logits));
    auto encoder = BertModel::from_pretrained(folder / "model", options);
    CHECK(encoder->forward(batch()).last_hidden_state.equal(expected.last_hidden_state));
  }
  SECTION("old names of norms, buffers and other heads") {
    auto old = renamed(tensors, [](std::string name) {
      for (const auto& [now, then] :
           {std::pair("LayerNorm.weight", "LayerNorm.gamma"), {"LayerNorm.bias", "LayerNorm.beta"}}) {
        if (name.ends_with(now)) name = name.substr(0, name.size() - std::string(now).size()) + then;
      }
      return name;
    });
    old.emplace("bert.embeddings.position_ids", torch::arange(10).unsqueeze(0));
    old.emplace("cls.predictions.bias", torch::zeros({20}));
    write_model(folder / "model", old);
    auto model = BertForSequenceClassification::from_pretrained(folder / "model", {}, options);
    CHECK(model->forward(batch()).logits.equal(expected.logits));
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0], Contains("'cls.predictions.bias' left out"));
  }
  SECTION("one tensor under two names") {
    auto twice = tensors;
    twice.emplace("pooler.dense.bias", torch::zeros({8}));
    write_model(folder / "model", twice);
    CHECK_THAT(complaint([&] { BertForSequenceClassification::from_pretrained(folder / "model"); }),
               Contains("'pooler.dense.bias' and 'bert.pooler.dense.bias' are both"));
  }
}

TEST_CASE("Only the task head may be absent", "[pretrained]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  auto tensors = tensors_of(*filled_classifier());
  std::vector<std::string> notes;
  const auto load = [&](std::optional<int64_t> labels = {}) {
    return BertForSequenceClassification::from_pretrained(folder / "model", labels, noting(notes));
  };

  SECTION("an absent head is drawn and named") {
    tensors.erase("classifier.weight");
    tensors.erase("classifier.bias");
    write_model(folder / "model", tensors);
    torch::manual_seed(5);
    auto model = load(10);
    torch::manual_seed(5);
    CHECK(model->classifier->base->weight.equal(torch::empty({10, 8}).normal_(0, 0.02)));
    CHECK(model->classifier->base->bias.equal(torch::zeros({10})));
    CHECK(model->config.labels()[9] == "LABEL_9");
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0], Contains("no task head: 'classifier.weight', 'classifier.bias'"));
  }
  SECTION("half a head is an error") {
    tensors.erase("classifier.bias");
    write_model(folder / "model", tensors);
    CHECK_THAT(complaint(load), Contains("'classifier.bias' is missing"));
  }
  SECTION("another number of labels is an error") {
    write_model(folder / "model", tensors);
    CHECK_THAT(complaint([&] { load(2); }),
               Contains("'classifier.weight' expected (2, 8), but got (3, 8) (hint:"));
  }
  SECTION("everything wrong is one error") {
    tensors.erase("bert.encoder.layer.1.output.dense.bias");
    tensors["bert.pooler.dense.bias"] = torch::zeros({9});
    tensors["bert.encoder.layer.1.output.dense.wieght"] = torch::zeros({8, 12});
    tensors["bert.encoder.layer.0.output.dense.weight"] = torch::zeros({8, 12}, torch::kInt32);
    write_model(folder / "model", tensors);
    const auto message = complaint(load);
    CHECK_THAT(message,
               Contains("model.safetensors' does not fit BertForSequenceClassification: 4 problems"));
    CHECK_THAT(message, Contains("'bert.encoder.layer.1.output.dense.bias' is missing"));
    CHECK_THAT(message, Contains("'bert.pooler.dense.bias' expected (8), but got (9)"));
    CHECK_THAT(message,
               Contains("dense.wieght' is extra") && Contains("'bert.encoder.layer.1.output.dense.weight'"));
    CHECK_THAT(message,
               Contains("'bert.encoder.layer.0.output.dense.weight' must be of a floating type, but is I32"));
    CHECK(notes.empty());
  }
  SECTION("a missing pooler is an error where there must be one") {
    tensors.erase("bert.pooler.dense.weight");
    tensors.erase("bert.pooler.dense.bias");
    write_model(folder / "model", tensors);
    CHECK_THAT(complaint(load), Contains("'bert.pooler.dense.weight' is missing"));
    CHECK_FALSE(BertModel::from_pretrained(folder / "model", noting(notes))->pooler);
  }
}

TEST_CASE("Shards must hold what the index says", "[pretrained]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  auto source = filled_classifier();
  std::map<std::string, Tensors> shards;
  Json index;
  int count = 0;
  for (const auto& [name, tensor] : tensors_of(*source)) {
    const std::string file = "model-0000" + std::to_string(1 + count++ % 3) + "-of-00003.safetensors";
    shards[file].emplace(name, tensor);
    index["weight_map"][name] = file;
  }
  const auto write = [&] {
    for (const auto& [file, tensors] : shards) peft::save_safetensors(folder / file, tensors);
    write_bytes(folder / "config.json", tiny_json().dump());
    write_bytes(folder / "model.safetensors.index.json", index.dump());
  };
  const auto message = [&] {
    write();
    return complaint([&] { BertForSequenceClassification::from_pretrained(folder.path()); });
  };
  const std::string first = "model-00001-of-00003.safetensors";

  SECTION("a whole folder loads, and is written again in shards") {
    write();
    auto model = BertForSequenceClassification::from_pretrained(folder.path());
    CHECK(model->forward(batch()).logits.equal(source->forward(batch()).logits));
    save_pretrained(*model, folder / "copy", folder.path());
    auto copy = BertForSequenceClassification::from_pretrained(folder / "copy");
    CHECK(copy->forward(batch()).logits.equal(source->forward(batch()).logits));
    CHECK(peft::load_safetensors(folder / "copy" / first).size() == shards[first].size());
  }
  SECTION("a missing shard") {
    index["weight_map"]["one.more"] = "model-00004-of-00003.safetensors";
    CHECK_THAT(message(), Contains("index.json': 'model-00004-of-00003.safetensors' is missing"));
  }
  SECTION("a tensor that is not where it should be") {
    shards["model-00002-of-00003.safetensors"].insert(shards[first].extract("classifier.bias"));
    if (shards[first].count("bert.embeddings.LayerNorm.bias")) {
      shards["model-00002-of-00003.safetensors"].insert(
          shards[first].extract("bert.embeddings.LayerNorm.bias"));
    }
    CHECK_THAT(message(), Contains("must hold '") && Contains("which the index puts elsewhere"));
  }
  SECTION("a file outside the folder") {
    index["weight_map"]["classifier.bias"] = "../model.safetensors";
    CHECK_THAT(message(), Contains("'classifier.bias' must name a file of the folder, but got \"../model"));
  }
  SECTION("no map") {
    index = {{"weight_map", Json::array({1})}};
    CHECK_THAT(message(), Contains("'weight_map' must map tensors to files"));
  }
}

TEST_CASE("A folder that is no model is refused by name", "[pretrained]") {
  const TemporaryFolder folder;
  const auto message = [&] { return complaint([&] { BertModel::from_pretrained(folder / "model"); }); };
  CHECK_THAT(message(), Contains("model' must be a folder with a model"));
  std::filesystem::create_directory(folder / "model");
  CHECK_THAT(message(), Contains("config.json' is missing"));
  write_bytes(folder / "model" / "config.json", tiny_json().dump());
  CHECK_THAT(message(),
             Contains("must hold model.safetensors or model.safetensors.index.json, but it has neither"));
  write_bytes(folder / "model" / "pytorch_model.bin", "");
  CHECK_THAT(message(), Contains("hint: convert it"));
  write_bytes(folder / "model" / "model.safetensors", "short");
  CHECK_THAT(message(), Contains("model.safetensors"));
}

TEST_CASE("A config with wrong values is one error naming every key", "[config]") {
  const TemporaryFolder folder;
  const auto message = [&](const std::string& text) {
    write_bytes(folder / "config.json", text);
    return complaint([&] { BertConfig::read(folder / "config.json"); });
  };
  CHECK(message("{}").empty());
  CHECK_THAT(message("{\"hidden_size\": 12"), Contains("config.json' is not valid JSON"));
  CHECK_THAT(message("[]"), Contains("must hold a JSON object, but it holds array"));
  CHECK_THAT(message(R"({"hidden_size": 770})"),
             Contains("'hidden_size' must be a multiple of 'num_attention_heads', 12"));
  CHECK_THAT(message(R"({"is_decoder": true})"), Contains("'is_decoder' must be false"));
  CHECK_THAT(message(R"({"position_embedding_type": "relative_key"})"), Contains("must be \"absolute\""));
  CHECK_THAT(message(R"({"hidden_act": "gleu"})"),
             Contains("'hidden_act' must be one of gelu, ") && Contains("\"gleu\""));
  CHECK_THAT(message(R"({"id2label": {"0": "a", "2": "b"}})"), Contains("'id2label' must map"));
  CHECK_THAT(message(R"({"id2label": {"0": "a"}, "num_labels": 2})"), Contains("'num_labels' must be"));
  CHECK_THAT(message(R"({"problem_type": "guess"})"), Contains("'problem_type' must be"));
  const auto all = message(R"({"model_type": "roberta", "vocab_size": "many", "num_hidden_layers": 2.5,
                               "hidden_dropout_prob": 3, "layer_norm_eps": null, "intermediate_size": 0})");
  CHECK_THAT(all, Contains("config.json': 6 problems") &&
                      Contains("'model_type' must be \"bert\", but got \"roberta\""));
  CHECK_THAT(
      all, Contains("'vocab_size' must be an integer") && Contains("'hidden_dropout_prob' must be a number"));

  const auto read = [&](const std::string& text) {
    write_bytes(folder / "config.json", text);
    return BertConfig::read(folder / "config.json");
  };
  CHECK(read("{}").num_labels() == 2);
  CHECK(read(R"({"num_labels": 4})").labels().back() == "LABEL_3");
  CHECK(read(R"({"pad_token_id": null})").pad_token_id() == std::nullopt);
  CHECK(read(R"({"classifier_dropout": 0.3})").classifier_dropout() == 0.3);
  CHECK(read(R"({"problem_type": "regression", "problem": 1})").problem_type() == ProblemType::regression);
}

TEST_CASE("A written folder has every tensor of its source", "[pretrained]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  std::vector<std::string> notes;
  const auto options = noting(notes);
  auto bare = renamed(tensors_of(*filled_classifier()),
                      [](const std::string& name) { return without(name, "bert."); });
  bare.erase("classifier.weight");
  bare.erase("classifier.bias");
  bare.emplace("embeddings.position_ids", torch::arange(10).unsqueeze(0));
  write_model(folder / "source", bare);
  write_bytes(folder / "source" / "tokenizer.json", "{}");
  write_bytes(folder / "source" / "modules.json",
              R"([{"path": ""}, {"path": "1_Dense"}, {"path": "2_Normalize"}])");
  std::filesystem::create_directories(folder / "source" / "1_Dense");
  write_bytes(folder / "source" / "1_Dense" / "model.safetensors", std::string("\0\n", 2));

  auto encoder = BertModel::from_pretrained(folder / "source", PretrainedOptions(options).pooler(false));
  auto& weight = encoder->encoder->layer[0]->as<BertLayer>()->intermediate->dense->base->weight;
  weight.set_data(weight + 1);
  save_pretrained(*encoder, folder / "out", folder / "source");
  const auto written = peft::load_safetensors(folder / "out" / "model.safetensors");
  REQUIRE(written.size() == bare.size());
  for (const auto& [name, tensor] : bare) {
    INFO(name);
    const bool changed = name == "encoder.layer.0.intermediate.dense.weight";
    CHECK(written.at(name).equal(changed ? tensor + 1 : tensor));
  }
  CHECK(peft_test::read_bytes(folder / "out" / "tokenizer.json") == "{}");
  CHECK(peft_test::read_bytes(folder / "out" / "1_Dense" / "model.safetensors") == std::string("\0\n", 2));
  auto config = Json::parse(peft_test::read_bytes(folder / "out" / "config.json"));
  CHECK(config["dtype"] == "float32");
  config.erase("dtype");
  CHECK(config == tiny_json());

  SECTION("a new head, labels and class on request") {
    auto model = BertForSequenceClassification::from_pretrained(folder / "source", 2, options);
    save_pretrained(*model, folder / "plain", folder / "source");
    CHECK(peft::load_safetensors(folder / "plain" / "model.safetensors").size() == bare.size());
    save_pretrained(
        *model, folder / "headed", folder / "source",
        SaveOptions().new_head(true).labels({"no", "yes"}).architecture("BertForSequenceClassification"));
    notes.clear();
    auto again = BertForSequenceClassification::from_pretrained(folder / "headed", {}, options);
    CHECK(notes.empty());
    CHECK(again->forward(batch()).logits.equal(model->forward(batch()).logits));
    CHECK(again->config.labels() == std::vector<std::string>{"no", "yes"});

    // Without names the head still has as many outputs as it has.
    auto ten = BertForSequenceClassification::from_pretrained(folder / "source", 10, options);
    save_pretrained(*ten, folder / "ten", folder / "source", SaveOptions().new_head(true));
    auto reread = BertForSequenceClassification::from_pretrained(folder / "ten", {}, options);
    CHECK(reread->forward(batch()).logits.equal(ten->forward(batch()).logits));
    CHECK_THROWS_WITH(save_pretrained(*ten, folder / "two", folder / "source",
                                      SaveOptions().new_head(true).labels({"no", "yes"})),
                      Contains("labels must be 10, one an output of the head, but got 2"));
    CHECK_FALSE(std::filesystem::exists(folder / "two"));
  }
  SECTION("no tensor of an adapter is written, with a source or without") {
    auto model = BertForSequenceClassification::from_pretrained(folder / "source", 2, options);
    const auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query"}));
    peft::train_also(adapter, *model, peft::named({"classifier"}));
    for (auto& parameter : adapter.parameters()) parameter.add_(0.1);
    const auto logits = model->forward(batch()).logits;
    peft::merge(*model);
    save_pretrained(*model, folder / "merged", folder / "source",
                    SaveOptions().new_head(true).labels({"no", "yes"}));
    save_pretrained(*model, folder / "alone");
    for (const char* name : {"merged", "alone"}) {
      INFO(name);
      auto again = BertForSequenceClassification::from_pretrained(folder / name, 2, options);
      CHECK(again->forward(batch()).logits.allclose(logits, 1e-5, 1e-6));
    }
  }
  SECTION("weights keep the model's type, and the config names it") {
    auto wide =
        BertModel::from_pretrained(folder / "source", PretrainedOptions(options).dtype(torch::kFloat64));
    save_pretrained(*wide, folder / "wide", folder / "source");
    CHECK(BertModel::from_pretrained(folder / "wide")->parameters()[0].scalar_type() == torch::kFloat64);
  }
  SECTION("never over its source, nor from another model's") {
    CHECK_THAT(complaint([&] { save_pretrained(*encoder, folder / "source", folder / "source"); }),
               Contains("must not be the folder the base is read from"));
    write_bytes(folder / "source" / "modules.json", R"([{"path": "../elsewhere"}])");
    CHECK_THAT(complaint([&] { save_pretrained(*encoder, folder / "other", folder / "source"); }),
               Contains("'path' must lie in the folder, but got '../elsewhere'"));
    std::filesystem::remove(folder / "source" / "modules.json");
    BertModel other(tiny().intermediate_size(16));
    CHECK_THAT(complaint([&] { save_pretrained(*other, folder / "other", folder / "source"); }),
               Contains("expected (12, 8), but got (16, 8)"));
  }
}
