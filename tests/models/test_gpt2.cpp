#include "catch.h"
#include "io/temporary_folder.h"
#include "models/pretrained_folder.h"
#include "peft/methods/bias.h"
#include "peft/methods/dora.h"
#include "peft/methods/ia3.h"
#include "peft/methods/trainable_tokens.h"
#include "peft/methods/vera.h"
#include "peft/models/generate.h"
#include "peft/models/gpt2.h"
#include "peft/models/save_pretrained.h"
#include "property_suite.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/optim/adamw.h>

#include <map>
#include <set>
#include <string>
#include <vector>

using namespace peft::models;
using peft_test::complaint;
using peft_test::difference;
using peft_test::Json;
using peft_test::noting;
using peft_test::TemporaryFolder;
using peft_test::Tensors;
using peft_test::tensors_of;
using peft_test::write_bytes;
using torch::Tensor;

namespace {

GPT2Config tiny() {
  return GPT2Config()
      .vocab_size(20)
      .n_positions(16)
      .n_embd(8)
      .n_layer(2)
      .n_head(2)
      .n_inner(12)
      .scale_attn_by_inverse_layer_idx(true)
      .bos_token_id(1)
      .eos_token_id({17})
      .pad_token_id(0);
}

Json tiny_json() {
  return {{"architectures", {"GPT2LMHeadModel"}},
          {"model_type", "gpt2"},
          {"vocab_size", 20},
          {"n_positions", 16},
          {"n_embd", 8},
          {"n_layer", 2},
          {"n_head", 2},
          {"n_inner", 12},
          {"scale_attn_by_inverse_layer_idx", true},
          {"bos_token_id", 1},
          {"eos_token_id", 17},
          {"pad_token_id", 0}};
}

/// The formula of tests/reference/gpt2_values.py, and a model that is frozen as one from a folder.
template <class Model>
Model filled(Model model) {
  const torch::NoGradGuard no_grad;
  double k = 0;
  for (auto& item : model->named_parameters()) {
    item.value().set_requires_grad(false);
    if (item.key() == "lm_head.weight" && model->named_parameters()[item.key()].data_ptr() ==
                                              model->named_parameters()["transformer.wte.weight"].data_ptr())
      continue;
    auto values = 0.4 * (0.7 * torch::arange(item.value().numel(), torch::kFloat64) + k++).sin();
    if (item.key().find("ln_") != std::string::npos && item.key().ends_with("weight")) values += 1;
    item.value().copy_(values.reshape(item.value().sizes()));
  }
  model->eval();
  return model;
}

GPT2LMHeadModel language_model(const GPT2Config& config = tiny()) { return filled(GPT2LMHeadModel(config)); }

const Tensor ids = torch::tensor({{5, 3, 19, 7}, {0, 0, 9, 12}});
const Tensor mask = torch::tensor({{1, 1, 1, 1}, {0, 0, 1, 1}});

GPT2Inputs batch() {
  GPT2Inputs inputs;
  inputs.input_ids = ids;
  inputs.attention_mask = mask;
  return inputs;
}

/// As transformers saves a tied model: once.
Tensors file_of(const torch::nn::Module& model) {
  auto tensors = tensors_of(model);
  tensors.erase("lm_head.weight");
  return tensors;
}

void write_model(const std::filesystem::path& folder, const Tensors& tensors,
                 const Json& config = tiny_json()) {
  peft_test::write_pretrained(folder, tensors, config);
}

/// The logits of a text given in pieces, each with the cache of those before.
Tensor in_chunks(GPT2LMHeadModel& model, const GPT2Inputs& inputs, const std::vector<int64_t>& chunks) {
  std::vector<Tensor> logits;
  GPT2Inputs step;
  step.use_cache = true;
  int64_t begin = 0;
  for (const auto length : chunks) {
    const auto end = begin + length;
    step.input_ids = inputs.input_ids.slice(1, begin, end);
    if (inputs.position_ids.defined()) step.position_ids = inputs.position_ids.slice(1, begin, end);
    if (inputs.attention_mask.defined()) step.attention_mask = inputs.attention_mask.slice(1, 0, end);
    const auto output = model->forward(step);
    step.cache = output.cache;
    logits.push_back(output.logits);
    begin = end;
  }
  return torch::cat(logits, 1);
}

bool is_tied(const GPT2LMHeadModelImpl& model) { return model.is_tied(); }

/// A merged model that was tied, moved or copied, is unmerged to one that is tied and gives what it gave.
template <class Logits>
void check_unmerges(GPT2LMHeadModelImpl& model, const Logits& logits, const Tensor& adapted) {
  const auto copy = peft::clone(model);
  model.to(torch::kFloat64);
  model.to(torch::kFloat32);
  for (auto* one : {copy.get(), &model}) {
    peft::unmerge(*one);
    CHECK(is_tied(*one));
    CHECK(logits(*one).equal(adapted));
  }
}

}  // namespace

TEST_CASE("A tiny GPT-2 gives transformers' values", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  auto model = language_model();
  // Printed by tests/reference/gpt2_values.py.
  const auto first_layer =
      torch::tensor({1.84149027, 0.615634084, -0.899764717, -1.99199009, -2.14735126, -1.29277968,
                     0.169806331, 1.55252981, 1.13778782, -0.178855702, -1.41138053, -1.98011112, -1.61756444,
                     -0.494251788, 0.861514926, 1.81209779});
  const auto last = torch::tensor(
      {0.752939582,  -1.16687775, -2.56292081,  -2.80855012, -1.79351044,  0.0265791249, 1.83473814,
       2.81934142,   2.53843188,  1.118101,     -0.80411011, -2.36538172,  -2.8649087,   -2.0784688,
       -0.359070659, 1.52150309,  2.71912217,   2.69621372,  1.46306062,   -0.42681402,  0.765859187,
       -1.1545409,   -2.55670404, -2.81124401,  -1.80390596, 0.0131483199, 1.82430065,   2.81658244,
       2.54458976,   1.13041151,  -0.791172504, -2.35762429, -2.86581349,  -2.0876298,   -0.372375757,
       1.51002622,   2.7146256,   2.70071554,   1.47453988,  -0.413509578});
  const auto placed = torch::tensor({0.394142091, -1.48391783, -2.69589424, -2.69776917, -1.48870134,
                                     0.38859722,  2.0914669,   2.85554338,  2.33785725,  0.770781159,
                                     -1.14227414, -2.54259849, -2.80163193, -1.80310106, 0.00478431489,
                                     1.8105222,   2.80357409,  2.53819084,  1.13349414,  -0.779992163});
  const auto typed = torch::tensor({0.779775798,  -1.1413449,  -2.55015206, -2.81427741, -1.81516266,
                                    -0.001278974, 1.81317866,  2.8137579,   2.5513308,   1.14369214,
                                    -0.777313471, -2.34940767, -2.86692739, -2.09757447, -0.386686921,
                                    1.49777234,   2.70992875,  2.70568466,  1.48694432,  -0.399237931});
  auto inputs = batch();
  inputs.output_hidden_states = true;
  const auto output = model->forward(inputs);
  REQUIRE(output.hidden_states.size() == 3);
  CHECK(difference(output.hidden_states[1].select(1, 3), first_layer) < 1e-6);
  CHECK(output.hidden_states.back().equal(output.last_hidden_state));
  CHECK(difference(output.logits.select(1, 3), last) < 1e-6);
  CHECK(output.cache.layers.empty());

  inputs = batch();
  inputs.position_ids = torch::tensor({{0, 1, 2, 3}, {0, 0, 0, 1}});
  CHECK(difference(model->forward(inputs).logits[1][3], placed) < 1e-6);
  inputs = GPT2Inputs();
  inputs.input_ids = ids;
  inputs.token_type_ids = torch::ones_like(ids);
  CHECK(difference(model->forward(inputs).logits[0][3], typed) < 1e-6);
  inputs.token_type_ids = Tensor();
  inputs.labels = torch::tensor({{5, -100, 19, 7}, {0, 0, 9, -100}});
  CHECK(model->forward(inputs).loss.item<double>() == Approx(3.00488853).epsilon(1e-6));

  const auto texts =
      torch::tensor({{5, 3, 19, 7, 7, 8, 8, 8, 8, 8, 8, 8}, {0, 0, 9, 12, 7, 17, 0, 0, 0, 0, 0, 0}});
  const auto longer =
      torch::tensor({{5, 3, 19, 7, 7, 8, 8, 8, 8, 8, 8, 8}, {0, 0, 9, 12, 7, 17, 17, 7, 17, 8, 8, 8}});
  const auto options = GenerateOptions().max_new_tokens(8);
  CHECK(generate(model, ids, options, mask).equal(texts));
  CHECK(generate(model, ids, options).equal(texts));  // the padding token tells the mask
  CHECK(generate(model, ids, GenerateOptions(options).use_cache(false), mask).equal(texts));
  CHECK(generate(model, ids, GenerateOptions(options).eos_token_id(std::vector<int64_t>{}), mask)
            .equal(longer));
}

TEST_CASE("A text in pieces through the cache gives what it gives whole", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  auto model = language_model();
  torch::manual_seed(1);
  GPT2Inputs inputs;
  inputs.input_ids = torch::randint(20, {3, 9});
  SECTION("plain") {}
  SECTION("padded on the left") {
    inputs.attention_mask = torch::ones({3, 9}, torch::kLong);
    inputs.attention_mask[1].slice(0, 0, 4).zero_();
    inputs.attention_mask[2].slice(0, 0, 1).zero_();
    inputs.position_ids = (inputs.attention_mask.cumsum(1) - 1).clamp_min(0);
  }
  const auto real = inputs.attention_mask.defined() ? inputs.attention_mask.unsqueeze(2)
                                                    : torch::ones({3, 9, 1}, torch::kLong);
  const auto whole = model->forward(inputs).logits;
  for (const auto& chunks : {std::vector<int64_t>{5, 1, 1, 1, 1}, {4, 5}, {1, 1, 1, 1, 1, 1, 1, 1, 1}, {9}}) {
    CHECK(difference(in_chunks(model, inputs, chunks) * real, whole * real) < 1e-5);
  }
  inputs.logits_to_keep = 2;
  CHECK(difference(model->forward(inputs).logits * real.slice(1, 7), (whole * real).slice(1, 7)) < 1e-5);
}

TEST_CASE("A beginning in the cache serves several continuations", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  auto model = language_model();
  GPT2Inputs inputs;
  inputs.input_ids = ids;
  inputs.use_cache = true;
  const auto beginning = model->forward(inputs).cache;
  CHECK(beginning.length() == 4);
  CHECK(beginning.tokens == 4);
  for (const int64_t token : {6, 11}) {
    GPT2Inputs next;
    next.input_ids = torch::full({2, 1}, token, torch::kLong);
    next.cache = beginning;
    const auto output = model->forward(next);
    CHECK(output.cache.length() == 5);
    inputs.input_ids = torch::cat({ids, next.input_ids}, 1);
    CHECK(difference(output.logits.select(1, 0), model->forward(inputs).logits.select(1, 4)) < 2e-6);
  }
  CHECK(beginning.length() == 4);
}

TEST_CASE("Inputs that do not fit are refused", "[gpt2]") {
  auto model = language_model();
  auto inputs = batch();
  const auto message = [&] { return complaint([&] { model->forward(inputs); }); };
  SECTION("shapes") {
    inputs.inputs_embeds = torch::zeros({2, 4, 8});
    CHECK_THAT(message(), Contains("either input_ids or inputs_embeds, but got both"));
    inputs = GPT2Inputs();
    CHECK_THAT(message(), Contains("but got neither"));
    inputs.input_ids = torch::zeros({4}, torch::kLong);
    CHECK_THAT(message(), Contains("input_ids must be (batch, time), but got (4)"));
    inputs = batch();
    inputs.attention_mask = mask.slice(1, 1);
    CHECK_THAT(message(), Contains("attention_mask must be (2, 4), but got (2, 3)"));
    inputs = batch();
    inputs.position_ids = torch::zeros({3, 4}, torch::kLong);
    CHECK_THAT(message(), Contains("position_ids must be (2, 4), but got (3, 4)"));
    inputs = batch();
    inputs.labels = ids.slice(1, 1);
    CHECK_THAT(message(), Contains("labels must be one a token, (2, 4), but got (2, 3)"));
    inputs.labels = ids;
    inputs.logits_to_keep = 1;
    CHECK_THAT(message(), Contains("labels need the logits of all tokens"));
    CHECK_THAT(complaint([&] { model->transformer->forward(inputs); }),
               Contains("GPT2Model: labels and logits_to_keep are a head's, but labels were given"));
    inputs.labels = Tensor();
    CHECK_THAT(complaint([&] { model->transformer->forward(inputs); }),
               Contains("but logits_to_keep was given"));
  }
  SECTION("tokens and positions") {
    inputs.input_ids = torch::full({2, 4}, 20, torch::kLong);
    CHECK_THAT(message(), Contains("input_ids must be from 0 to 19, but got 20"));
    inputs = batch();
    inputs.position_ids = torch::full({1, 4}, 16, torch::kLong);
    CHECK_THAT(message(), Contains("position_ids must be from 0 to 15, but got 16"));
    inputs = GPT2Inputs();
    inputs.input_ids = torch::zeros({1, 17}, torch::kLong);
    CHECK_THAT(message(), Contains("at most 16 tokens, virtual ones included, but got 17"));
  }
  SECTION("caches") {
    inputs.use_cache = true;
    inputs.cache = model->forward(inputs).cache;
    CHECK_THAT(message(), Contains("attention_mask must be (2, 8), but got (2, 4)"));
    inputs.attention_mask = Tensor();
    inputs.cache.layers.pop_back();
    CHECK_THAT(message(), Contains("a cache of 2 layers was expected, but got 1"));
    inputs = GPT2Inputs();
    inputs.input_ids = ids;
    inputs.use_cache = true;
    inputs.cache = model->forward(inputs).cache;
    inputs.input_ids = ids.slice(0, 1);
    CHECK_THAT(message(), Contains("the cache must have 1 rows, but got 2"));
  }
  SECTION("generate") {
    const auto refused = [&](const GenerateOptions& options, const Tensor& prompts = ids,
                             const Tensor& m = mask) {
      return complaint([&] { generate(model, prompts, options, m); });
    };
    CHECK_THAT(refused(GenerateOptions().max_new_tokens(0)),
               Contains("max_new_tokens must be positive, but got 0"));
    CHECK_THAT(refused(GenerateOptions().temperature(0)), Contains("temperature must be positive"));
    CHECK_THAT(refused(GenerateOptions().top_k(-1)), Contains("top_k must be at least 0, but got -1"));
    CHECK_THAT(refused(GenerateOptions().top_p(1.5)), Contains("top_p must be in [0, 1], but got 1.5"));
    CHECK_THAT(refused(GenerateOptions().max_new_tokens(14)), Contains("at most 17 tokens, but got 18"));
    CHECK_THAT(refused(GenerateOptions().max_new_tokens(2), ids, mask.slice(1, 1)),
               Contains("mask must be (2, 4), but got (2, 3)"));
    CHECK_THAT(refused(GenerateOptions().max_new_tokens(2), ids, mask.flip({1})),
               Contains("padding must be on the left"));
    model->train();
    CHECK_THAT(refused(GenerateOptions().max_new_tokens(2)), Contains("training mode (hint: model->eval())"));
  }
}

TEST_CASE("Texts padded on the left go on as they do alone", "[gpt2]") {
  auto model = language_model();
  const auto options = GenerateOptions().max_new_tokens(6).eos_token_id(std::vector<int64_t>{});
  const auto together = generate(model, ids, options, mask);
  CHECK(generate(model, ids.slice(0, 0, 1), options).equal(together.slice(0, 0, 1)));
  CHECK(generate(model, ids.slice(0, 1).slice(1, 2), options).equal(together.slice(0, 1).slice(1, 2)));
  CHECK(generate(model, ids, GenerateOptions(options).do_sample(true).top_k(1), mask).equal(together));
  CHECK(generate(model, ids, GenerateOptions(options).do_sample(true).top_p(0), mask).equal(together));
}

TEST_CASE("Sampling draws from the generator it is given", "[gpt2]") {
  auto model = language_model();
  const auto texts = [&](uint64_t seed) {
    auto options = GenerateOptions().max_new_tokens(10).do_sample(true).eos_token_id(std::vector<int64_t>{});
    return generate(model, ids, options.generator(at::detail::createCPUGenerator(seed)), mask);
  };
  torch::manual_seed(0);
  const auto expected = torch::rand({3});
  torch::manual_seed(0);
  const auto first = texts(5);
  CHECK(torch::rand({3}).equal(expected));  // the global one is left alone
  CHECK(texts(5).equal(first));
  CHECK_FALSE(texts(6).equal(first));

  // Many draws come in the proportions of the scores that are left.
  const auto logits = torch::tensor({{2.0F, 1.0F, 0.0F, -1.0F}}).expand({20000, 4});
  const auto shares = [&](const GenerateOptions& options) {
    torch::manual_seed(3);
    const auto drawn = peft::internal::next_tokens(logits, GenerateOptions(options).do_sample(true));
    return torch::bincount(drawn.flatten(), {}, 4).to(torch::kFloat32) / 20000;
  };
  const auto softmax = [](std::vector<double> scores) { return torch::tensor(scores).softmax(0); };
  CHECK(difference(shares({}), softmax({2, 1, 0, -1})) < 0.01);
  CHECK(difference(shares(GenerateOptions().temperature(2)), softmax({1, 0.5, 0, -0.5})) < 0.01);
  CHECK(difference(shares(GenerateOptions().top_k(2)), softmax({2, 1, -100, -100})) < 0.01);
  CHECK(difference(shares(GenerateOptions().top_p(0.8)), softmax({2, 1, -100, -100})) < 0.01);
}

TEST_CASE("GPT-2's keys are transformers' and every parameter lies in a site", "[gpt2]") {
  GPT2LMHeadModel model(tiny().n_layer(1));
  const std::vector<std::string> expected{
      "transformer.wte.weight",
      "transformer.wpe.weight",
      "transformer.h.0.ln_1.weight",
      "transformer.h.0.ln_1.bias",
      "transformer.h.0.attn.c_attn.weight",
      "transformer.h.0.attn.c_attn.bias",
      "transformer.h.0.attn.c_proj.weight",
      "transformer.h.0.attn.c_proj.bias",
      "transformer.h.0.ln_2.weight",
      "transformer.h.0.ln_2.bias",
      "transformer.h.0.mlp.c_fc.weight",
      "transformer.h.0.mlp.c_fc.bias",
      "transformer.h.0.mlp.c_proj.weight",
      "transformer.h.0.mlp.c_proj.bias",
      "transformer.ln_f.weight",
      "transformer.ln_f.bias",
      "lm_head.weight",
  };
  CHECK(model->named_parameters().keys() == expected);
  CHECK(model->named_buffers().is_empty());
  CHECK(model->named_parameters()["transformer.h.0.attn.c_attn.weight"].sizes() == c10::IntArrayRef({8, 24}));
  std::set<std::string> in_sites;
  for (const auto& item : model->named_modules("", /*include_self=*/false)) {
    const auto* site = dynamic_cast<peft::SiteImpl*>(item.value().get());
    if (!site) continue;
    for (const auto& parameter : site->base_parameters()) in_sites.insert(item.key() + "." + parameter.key());
  }
  CHECK(in_sites == std::set<std::string>(expected.begin(), expected.end()));
  const auto modules = model->named_modules();
  CHECK(modules["transformer.h.0.attn.attention"]->as<peft::Attention>()->options.causal());
  CHECK(modules["transformer.h.0.attn_residual"]->as<peft::BareResidual>() != nullptr);
  CHECK(modules["transformer.h.0.mlp_residual"]->as<peft::BareResidual>() != nullptr);
  CHECK(model->describe().task_type == "CAUSAL_LM");
  CHECK(model->transformer->describe().task_type == "FEATURE_EXTRACTION");
  CHECK(model->describe().model_type == "gpt2");
}

TEST_CASE("A new GPT-2 has transformers' initial values", "[gpt2]") {
  torch::manual_seed(3);
  GPT2LMHeadModel model(tiny().n_embd(64).vocab_size(500).n_layer(8).tie_word_embeddings(false));
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    const auto ends = [&](const char* end) { return item.key().ends_with(end); };
    if (ends("bias")) {
      CHECK((item.value() == 0).all().item<bool>());
    } else if (item.key().find("ln_") != std::string::npos) {
      CHECK((item.value() == 1).all().item<bool>());
    } else {
      CHECK_THAT(item.value().std().item<double>(), WithinAbs(ends("c_proj.weight") ? 0.005 : 0.02, 0.002));
    }
  }
}

TEST_CASE("Every method of linear layers works on a Conv1D", "[conv1d]") {
  torch::manual_seed(7);
  const auto layer = suite::layer<peft::Conv1D>("Conv1D", torch::randn({2, 5, 6}), 6, 4);
  const auto of = [](int64_t count) { return [count](const peft::SiteInfo&) { return count; }; };
  suite::check_properties(layer, {{peft::on(peft::LoraOptions(2), peft::all())}, of(2 * (6 + 4))});
  suite::check_properties(
      layer, {{peft::on(peft::LoraOptions(2).lora_bias(true), peft::all())}, of(2 * (6 + 4) + 4)});
  suite::check_properties(layer,
                          {{peft::on(peft::DoraOptions(2), peft::all())}, of(2 * (6 + 4) + 4), true, false});
  suite::check_properties(layer, {{peft::on(peft::Ia3Options(), peft::all())}, of(4)});
  suite::check_properties(layer, {{peft::on(peft::VeraOptions(3), peft::all())}, of(3 + 4)});
  suite::check_properties(layer, {{peft::on(peft::BiasOptions(), peft::all())}, of(4)});
  suite::check_properties(layer, {{peft::on(peft::ReplaceOptions(), peft::all())}, of(6 * 4 + 4)});

  // It is a linear layer whose weight is turned over.
  peft::Conv1D turned(6, 4);
  peft::Linear linear(6, 4);
  const torch::NoGradGuard no_grad;
  linear->base->weight.copy_(turned->base->weight.t());
  linear->base->bias.copy_(turned->base->bias);
  for (auto init : {peft::LoraInit::gaussian, peft::LoraInit::pissa, peft::LoraInit::olora}) {
    const auto options = peft::LoraOptions(2).init(init);
    torch::manual_seed(2);
    const auto a = peft::add_adapter(*turned, options, peft::all());
    torch::manual_seed(2);
    const auto b = peft::add_adapter(*linear, options, peft::all());
    for (size_t i = 0; i < a.parameters().size(); ++i) CHECK(a.parameters()[i].equal(b.parameters()[i]));
    suite::shake(a);
    suite::shake(b);
    for (size_t i = 0; i < a.parameters().size(); ++i) a.parameters()[i].copy_(b.parameters()[i]);
    CHECK(difference(a.effective_delta("").t(), b.effective_delta("")) < 1e-6);
    peft::remove_adapter(*turned, "default");
    peft::remove_adapter(*linear, "default");
  }
}

TEST_CASE("A tied matrix is one until it is merged", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  auto model = language_model();
  const auto logits = [&](GPT2LMHeadModelImpl& of) { return of.forward(batch()).logits; };
  const auto plain = logits(*model);
  REQUIRE(is_tied(*model));
  int64_t distinct = 0;
  for (const auto& [key, tensor] : file_of(*model)) distinct += tensor.numel();
  CHECK(peft::summary(*model).total == distinct);

  SECTION("copies and moves keep the tie") {
    const auto copy = peft::clone(*model);
    CHECK(is_tied(*copy));
    CHECK(copy->lm_head->base->weight.data_ptr() != model->lm_head->base->weight.data_ptr());
    CHECK(logits(*copy).equal(plain));
    copy->to(torch::kFloat64);
    CHECK(is_tied(*copy));
    CHECK(difference(logits(*copy), plain) < 1e-5);
    GPT2LMHeadModel loaded(tiny());
    suite::through_archive(*model, *loaded);
    CHECK(is_tied(*loaded));
    loaded->eval();
    CHECK(logits(*loaded).equal(plain));
  }
  SECTION("merging on one leaves the other") {
    const std::string site = GENERATE("lm_head", "wte");
    INFO(site);
    torch::manual_seed(4);
    suite::shake(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({site})));
    const auto adapted = logits(*model);
    CHECK(difference(adapted, plain) > 1e-2);
    CHECK(is_tied(*model));
    peft::merge(*model);
    CHECK_FALSE(is_tied(*model));
    CHECK(difference(logits(*model), adapted) < 1e-5);

    const TemporaryFolder folder;
    auto written = file_of(*language_model());
    write_model(folder / "base", written);
    save_pretrained(*model, folder / "merged", folder / "base");
    const auto config = Json::parse(peft::internal::read_text(folder / "merged" / "config.json"));
    CHECK(config.at("tie_word_embeddings") == false);
    auto again = GPT2LMHeadModel::from_pretrained(folder / "merged");
    CHECK(logits(*again).equal(logits(*model)));
    CHECK_FALSE(is_tied(*peft::clone(*model)));
    check_unmerges(*model, logits, adapted);
  }
}

TEST_CASE("Trained tokens change the rows of a tied head too", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  auto model = language_model();
  GPT2Inputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19, 7}, {6, 8, 9, 12}});
  const auto logits = [&](GPT2LMHeadModelImpl& of) { return of.forward(inputs).logits; };
  const auto plain = logits(*model);
  const auto tokens =
      peft::add_adapter(*model, peft::TrainableTokensOptions({2, 4}), peft::named({"wte"}), "tokens");
  CHECK(difference(logits(*model), plain) < 1e-5);
  torch::manual_seed(6);
  suite::shake(tokens);
  const auto adapted = logits(*model);
  const auto changed = ((adapted - plain).abs() > 1e-4).flatten(0, 1).any(0);
  CHECK(changed.nonzero().flatten().equal(torch::tensor({2, 4})));
  {
    const auto words = model->transformer->wte->merged_weights({"tokens"}).weight;
    const auto hidden = model->transformer->forward(inputs).last_hidden_state;
    CHECK(difference(adapted, at::linear(hidden, words)) < 1e-5);
    const peft::RowAdapters rows({"tokens", "__base__"});
    const auto mixed = logits(*model);
    CHECK(difference(mixed[0], adapted[0]) < 1e-5);
    CHECK(difference(mixed[1], plain[1]) < 1e-5);
  }
  CHECK(logits(*peft::clone(*model)).equal(adapted));
  peft::merge(*model);
  CHECK(difference(logits(*model), adapted) < 1e-5);
  check_unmerges(*model, logits, adapted);

  auto untied = language_model(tiny().tie_word_embeddings(false));
  suite::shake(peft::add_adapter(*untied, peft::TrainableTokensOptions({2, 4}), peft::named({"wte"})));
  CHECK(logits(*untied).equal([&] {
    const auto off = peft::disabled(*untied);
    return logits(*untied);
  }()));
}

TEST_CASE("A new model is saved without a folder it came from", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  const bool tied = GENERATE(true, false);
  auto model = language_model(tiny().tie_word_embeddings(tied).eos_token_id({17, 3}));
  save_pretrained(*model, folder / "new");
  std::vector<std::string> notes;
  auto again = GPT2LMHeadModel::from_pretrained(folder / "new", noting(notes));
  CHECK(notes.empty());
  CHECK(again->forward(batch()).logits.equal(model->forward(batch()).logits));
  CHECK(again->config.json() == model->config.json());
  CHECK(is_tied(*again) == tied);
}

TEST_CASE("The word vectors of a tied model train through both their uses", "[gpt2]") {
  auto tied = language_model(), untied = language_model(tiny().tie_word_embeddings(false));
  {
    const torch::NoGradGuard no_grad;
    untied->lm_head->base->weight.copy_(tied->lm_head->base->weight);
  }
  auto inputs = batch();
  inputs.labels = ids;
  for (auto* model : {&tied, &untied}) {
    for (auto& parameter : (*model)->parameters()) parameter.set_requires_grad(true);
    (*model)->forward(inputs).loss.backward();
  }
  const auto both = untied->transformer->wte->base->weight.grad() + untied->lm_head->base->weight.grad();
  CHECK(difference(tied->transformer->wte->base->weight.grad(), both) < 1e-6);
  CHECK_FALSE(tied->lm_head->base->weight.grad().defined());

  torch::optim::AdamW optimizer(tied->parameters(), torch::optim::AdamWOptions(1e-2));
  const auto before = tied->forward(inputs).loss.item<double>();
  for (int step = 0; step < 10; ++step) {
    optimizer.zero_grad();
    tied->forward(inputs).loss.backward();
    optimizer.step();
  }
  CHECK(tied->forward(inputs).loss.item<double>() < 0.8 * before);
  CHECK(is_tied(*tied));
}

TEST_CASE("GPT-2 folders of every age are read", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  auto source = language_model();
  const auto expected = source->forward(batch()).logits;
  auto tensors = file_of(*source);
  auto json = tiny_json();
  std::vector<std::string> notes;
  const auto read = [&] {
    write_model(folder / "model", tensors, json);
    return GPT2LMHeadModel::from_pretrained(folder / "model", noting(notes));
  };
  const auto gives_the_same = [&](GPT2LMHeadModel model) {
    CHECK(model->forward(batch()).logits.equal(expected));
    CHECK(is_tied(*model));
    CHECK_FALSE(model->is_training());
    for (const auto& parameter : model->parameters()) CHECK_FALSE(parameter.requires_grad());
  };
  SECTION("with the base prefix") {
    gives_the_same(read());
    CHECK(notes.empty());
    auto base = GPT2Model::from_pretrained(folder / "model", noting(notes));
    CHECK(base->forward(batch()).last_hidden_state.equal(
        source->transformer->forward(batch()).last_hidden_state));
    CHECK(notes.empty());
  }
  SECTION("without it, with the buffers of older versions") {
    Tensors bare;
    for (const auto& [key, tensor] : tensors)
      bare.emplace(key.substr(std::string("transformer.").size()), tensor);
    tensors = bare;
    tensors["h.0.attn.bias"] = torch::ones({1, 1, 16, 16}).to(torch::kBool);
    tensors["h.1.attn.masked_bias"] = torch::tensor(-1e4F);
    gives_the_same(read());
    CHECK(notes.empty());
  }
  SECTION("with the head beside the word vectors, or instead") {
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone();
    gives_the_same(read());
    tensors.erase("transformer.wte.weight");
    gives_the_same(read());
    CHECK(notes.empty());
  }
  SECTION("with a head of its own") {
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] * 2;
    auto model = read();
    CHECK_FALSE(is_tied(*model));
    CHECK(difference(model->forward(batch()).logits, 2 * expected) < 1e-5);
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0], Contains("with different values: they are not tied"));
    notes.clear();
    json["tie_word_embeddings"] = false;
    model = read();
    CHECK(difference(model->forward(batch()).logits, 2 * expected) < 1e-5);
    CHECK(notes.empty());
  }
  SECTION("without the head that the config asks for") {
    json["tie_word_embeddings"] = false;
    auto model = read();
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0], Contains("has no task head: 'lm_head.weight' of GPT2LMHeadModel start at random"));
    CHECK_THAT(model->lm_head->base->weight.std().item<double>(), WithinAbs(0.02, 0.005));
  }
  SECTION("what is missing and extra is named") {
    tensors.erase("transformer.h.1.attn.c_attn.bias");
    tensors["transformer.h.1.attn.c_atn.bias"] = torch::zeros({24});
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch::zeros({12, 8});
    CHECK_THAT(complaint(read), Contains("3 problems") &&
                                    Contains("'transformer.h.1.attn.c_attn.bias' is missing") &&
                                    Contains("c_atn.bias' is extra: GPT2LMHeadModel has no such tensor") &&
                                    Contains("expected (8, 12), but got (12, 8)"));
  }
  SECTION("settings") {
    json["eos_token_id"] = {17, 3};
    json["pad_token_id"] = nullptr;
    json.erase("n_embd");
    json["hidden_size"] = 8;
    json["dtype"] = "float64";
    const auto model = read();
    CHECK(model->config.eos_token_id() == std::vector<int64_t>{17, 3});
    CHECK_FALSE(model->config.pad_token_id());
    CHECK(model->lm_head->base->weight.scalar_type() == torch::kFloat64);
    CHECK(is_tied(*model));
    json["model_type"] = "bert";
    json["n_head"] = 3;
    json["num_attention_heads"] = 4;
    json["add_cross_attention"] = true;
    json["activation_function"] = "gleu";
    json["eos_token_id"] = "17";
    CHECK_THAT(complaint(read), Contains("'model_type' must be \"gpt2\", but got \"bert\"") &&
                                    Contains("'add_cross_attention' must be false") &&
                                    Contains("'n_head' must be the same as 'num_attention_heads'") &&
                                    Contains("must be a multiple of 'n_head', 3") &&
                                    Contains("'activation_function' must be one of") &&
                                    Contains("'eos_token_id' must be"));
  }
}

TEST_CASE("Rows of one batch use their own adapters on a GPT-2", "[gpt2]") {
  const torch::NoGradGuard no_grad;
  auto model = language_model();
  torch::manual_seed(5);
  suite::shake(
      peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"c_attn", "wpe", "lm_head"}), "one"));
  suite::shake(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"c_fc", "wte"}), "two"));
  GPT2Inputs inputs;
  inputs.input_ids = torch::randint(20, {2, 6});
  const auto alone = [&](const std::string& name, int64_t row) {
    peft::set_active(*model, {name});
    return model->forward(inputs).logits[row];
  };
  const auto one = alone("one", 0), two = alone("two", 1);
  const peft::RowAdapters rows({"one", "two"});
  const auto mixed = in_chunks(model, inputs, {4, 2});
  CHECK(difference(mixed[0], one) < 2e-6);
  CHECK(difference(mixed[1], two) < 2e-6);
}
