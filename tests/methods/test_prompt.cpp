#include "peft/methods/prompt.h"

#include "methods/prompt_case.h"
#include "peft/methods/lora.h"

using namespace suite;
using peft::PromptInit;
using peft::PromptOptions;
using peft_test::batch;
using peft_test::complaint;
using peft_test::filled_classifier;

namespace {

Promise prompt(const PromptOptions& options) {
  return {{peft::on(options, peft::all())},
          [options](const peft::SiteInfo& site) { return options.num_virtual_tokens() * site.width; },
          /*no_op_at_start=*/false,
          /*whole_gradient=*/true,
          suite::never};
}

PromptOptions hub(bool after_first) {
  return PromptOptions(3).init(PromptInit::uniform).after_embedding(true).after_first(after_first);
}

Tensor vectors(const peft::Adapter& adapter) {
  return adapter.layers<peft::PromptImpl>().at(0)->prompt_embeddings;
}

Tensor started(const PromptOptions& options) {
  auto model = filled_classifier();
  torch::manual_seed(4);
  return vectors(peft::add_adapter(*model, options, peft::all())).detach();
}

/// How many of these vectors are rows of the vocabulary.
int64_t words_among(const Tensor& rows, const Tensor& words) {
  return (rows.unsqueeze(1) == words.unsqueeze(0)).all(-1).any(-1).sum().item<int64_t>();
}

}  // namespace

TEST_CASE("Prompts keep the promises of a method", "[prompt]") {
  check_properties(bert_case(), prompt(PromptOptions(3)));
  check_properties(bert_case(), prompt(PromptOptions(2).after_first(true).init(PromptInit::vocabulary)));
  check_properties(bert_case(), prompt(hub(false)));
  check_properties(bert_case(), prompt(hub(true)));
}

TEST_CASE("Prompts equal Hugging Face's numbers", "[prompt]") {
  check_prompt("random", PromptOptions(3),
               {{-1.125839829,  -1.152360201,  -0.2505785823, -0.4338788092, 0.8487103581,  0.692009151,
                 -0.3160127699, -2.115219355,  0.4680964053,  -0.1577124447, 1.44366014,    0.2660494149,
                 0.1664553434,  0.8743818402,  -0.1434738487, -0.1116093323, 0.9318265915,  1.259009242,
                 2.004980564,   0.05373690277, 0.6180566549,  -0.4128022194, -0.8410648108, -2.316041946},
                {0.4704439398, 0.3485026826, 0.06967846206, 0.4240338033, 0.2267187997, -0.07281424931},
                {0.4937491549, 0.3876756584, 0.1071356935, 0.4240338033, 0.2267187997, -0.07281424931},
                {1.113227827, 1.111596706, 1.109984607, 1.108403584, 1.106862891, 1.105365874, 1.103910803,
                 1.102495086, 1.101117238, 1.099775032, 1.098463243, 1.097172747},
                {0.3641650091, 0.3107419582, 0.1173855355, 0.339233207, 0.2003995854, -0.02883822101}},
               vectors);
  check_prompt("vocabulary", PromptOptions(3).init(PromptInit::vocabulary),
               {{0.03987020254, 0.123650983,    0.1492767632,  0.1046953574,  0.01087408792,  -0.08806143701,
                 -0.1455802917, -0.1346304566,  -0.1331350505, -0.1463439018, -0.09072492272, 0.007563403342,
                 0.1022945419,  0.148914963,    0.1254983395,  0.0430578962,  0.1496870369,   0.1082479209,
                 0.01589812711, -0.08392880857, -0.1442827135, -0.1367782056, -0.06494476646, 0.03743320704},
                {-0.05604634431, -0.2937004279, -0.3999728874, -0.06376680531, -0.3012524061, -0.4039665395},
                {0.003768816278, -0.2611347116, -0.409274332, -0.06376680531, -0.3012524061, -0.4039665395},
                {1.087792305, 1.0773955, 1.067911413, 1.059530149, 1.052410634, 1.046898759, 1.043252861,
                 1.041461315, 1.04116021, 1.041635892, 1.042159891, 1.042336606},
                {-0.2340493488, -0.2367978948, -0.133706554, -0.224775313, -0.3195209731, -0.2712949838}},
               vectors);

  // An encoder alone drops the token types; what is given for each token keeps the virtual ones.
  auto classifier = filled_classifier();
  peft_test::fill(*classifier);
  peft::models::BertModel encoder(peft_test::tiny());
  const auto filled = classifier->base_model->named_parameters();
  torch::manual_seed(0);
  {
    torch::NoGradGuard no_grad;
    for (auto& item : encoder->named_parameters()) item.value().copy_(filled[item.key()]);
  }
  torch::manual_seed(0);
  peft::add_adapter(*encoder, PromptOptions(3), peft::all());
  encoder->eval();
  encoder->to(torch::kFloat64);
  const auto output = encoder->forward(batch());
  CHECK(output.last_hidden_state.size(1) == 7);
  check_values(output.last_hidden_state.select(1, 3),
               {0.1565024852, -0.2577859696, -0.4570287438, -1.609663379, -0.6012866279, 0.7957604391,
                0.6334101037, 2.004428239, 0.1837082978, 0.1196998072, 0.5469728378, 1.685188022,
                0.2202274284, -0.8898040122, -0.5154026218, -1.950487529});

  peft::models::BertForTokenClassification tokens(peft_test::tiny());
  peft_test::fill(*tokens);
  tokens->eval();
  torch::manual_seed(0);
  peft::add_adapter(*tokens, PromptOptions(3), peft::all());
  tokens->to(torch::kFloat64);
  check_values(tokens->forward(batch()).logits.select(1, 3),
               {-0.6219449519, -0.2079510978, 0.2966767497, 0.5949987547, 0.2571005784, -0.1989105669});
}

TEST_CASE("Prompts equal AdapterHub's numbers", "[prompt]") {
  // tests/reference/hub_prompt_values.py
  for (const bool after_first : {false, true}) {
    auto model = filled_classifier();
    torch::manual_seed(0);
    const auto adapter = peft::add_adapter(*model, hub(after_first), peft::all());
    CHECK(adapter.sites() == std::vector<std::string>{"bert.embeddings.output"});
    check_values(vectors(adapter),
                 {0.02629578114, -0.2563417554, 0.08459234238, -0.4668473601,  -0.3612831235, -0.2577649951,
                  0.315468967,   0.2931606174,  -0.2217475176, -0.01804119349, 0.3197803497,  0.4970665574,
                  0.1984410882,  0.06754642725, 0.3352431655,  -0.2944011688,  0.09317201376, -0.3876527548,
                  -0.3465430737, -0.2582917809, 0.2262365222,  0.2010802031,   -0.2961762547, 0.1510535479},
                 1e-7);
    model->to(torch::kFloat64);
    const auto logits = model->forward(batch()).logits;
    if (after_first) {
      check_values(logits,
                   {-0.2120845184, -0.2454517602, -0.1690946701, -0.0436938451, -0.2908486359, -0.4079018817},
                   1e-8);
    } else {
      check_values(logits,
                   {-0.1165849577, -0.05934863912, 0.02407622958, -0.156490416, -0.1676178946, -0.1039581924},
                   1e-8);
    }
  }
}

TEST_CASE("Prompts begin with words", "[prompt]") {
  const auto words = filled_classifier()->base_model->embeddings->word_embeddings->base->weight;
  const auto rows = [&](const std::vector<int64_t>& ids) {
    return words.index_select(0, torch::tensor(ids));
  };

  const auto text = PromptOptions(5).init(PromptInit::tokens);
  CHECK(torch::equal(started(PromptOptions(text).tokens({4, 9})), rows({4, 9, 4, 9, 4})));
  CHECK(torch::equal(started(PromptOptions(text).tokens({4, 9, 0, 1, 2, 3})), rows({4, 9, 0, 1, 2})));

  CHECK(words_among(started(PromptOptions(6).init(PromptInit::vocabulary)), words) == 6);
  const auto first = started(PromptOptions(6).init(PromptInit::vocabulary).sample_from(7));
  CHECK(words_among(first, words.slice(0, 0, 7)) == 6);
  CHECK(std::get<0>(at::unique_dim(first, 0)).size(0) == 6);
  CHECK(words_among(started(PromptOptions(9).init(PromptInit::vocabulary).sample_from(7)),
                    words.slice(0, 0, 7)) == 9);

  const auto labels = started(PromptOptions(4).init(PromptInit::labels).labels({{3, 8}, {5}}));
  CHECK(largest(labels.slice(0, 0, 2), torch::stack({rows({3, 8}).mean(0), words[5]})) < 1e-7);
  CHECK(words_among(labels.slice(0, 2), words) == 2);
}

TEST_CASE("A prompt's model gives padded batches what it gives texts alone", "[prompt]") {
  for (const auto& options : {PromptOptions(3), hub(false), hub(true)}) {
    auto model = filled_classifier();
    peft::add_adapter(*model, options, peft::all());
    const auto padded = model->forward(batch());
    peft::models::EncoderInputs alone;
    alone.input_ids = batch().input_ids.slice(0, 1, 2).slice(1, 0, 2);
    CHECK(largest(model->forward(alone).logits, padded.logits.slice(0, 1, 2)) < 1e-6);

    // The mean is over real tokens, as if the virtual ones had been cut away.
    const auto encoded = model->base_model->forward(batch());
    const auto mask = batch().attention_mask;
    const auto at = options.after_first() ? 1 : 0;
    const auto hidden = encoded.last_hidden_state;
    const auto cut = torch::cat({hidden.slice(1, 0, at), hidden.slice(1, at + 3)}, 1);
    const auto pooled = peft::models::mean_pool(peft::models::real_tokens(hidden, encoded), mask);
    CHECK(torch::equal(pooled, peft::models::mean_pool(cut, mask)));
  }
}

TEST_CASE("Real tokens are found in rows whose virtual ones stand elsewhere", "[prompt]") {
  auto model = filled_classifier();
  peft::add_adapter(*model, hub(false), peft::all(), "before");
  peft::add_adapter(*model, hub(true), peft::all(), "after first");
  const peft::RowAdapters rows({"before", "after first"});
  const auto output = model->base_model->forward(batch());
  CHECK(output.num_virtual_tokens == 3);
  REQUIRE(output.virtual_tokens.sizes() == torch::IntArrayRef({2, 7}));
  CHECK_FALSE(torch::equal(output.virtual_tokens[0], output.virtual_tokens[1]));
  const auto all = output.last_hidden_state;
  const auto expected =
      torch::stack({all[0].slice(0, 3), torch::cat({all[1].slice(0, 0, 1), all[1].slice(0, 4)})});
  CHECK(torch::equal(peft::models::real_tokens(all, output), expected));
  const auto score = all.select(2, 0).detach().requires_grad_();
  const auto real = peft::models::real_tokens(score, output);
  CHECK(torch::equal(real, expected.select(2, 0)));
  real.sum().backward();
  CHECK(torch::equal(score.grad(), output.virtual_tokens.logical_not().to(torch::kFloat32)));

  CHECK_THROWS_WITH(
      peft::models::real_tokens(batch().input_ids, output),
      Contains("real_tokens: expected a tensor of the output's tokens, (2, 7), but got (2, 4)"));
}

TEST_CASE("Virtual tokens have no label", "[prompt]") {
  peft::models::BertForTokenClassification model(peft_test::tiny());
  peft_test::fill(*model);
  model->eval();
  peft::add_adapter(*model, PromptOptions(3).after_first(true), peft::all());
  auto inputs = batch();
  inputs.labels = torch::tensor({{0, 1, 2, -100}, {1, 1, -100, -100}});
  const auto output = model->forward(inputs);
  const auto all = torch::cat(
      {inputs.labels.slice(1, 0, 1), torch::full({2, 3}, -100, torch::kLong), inputs.labels.slice(1, 1)}, 1);
  CHECK(largest(output.loss, peft::models::token_loss(output.logits, all)) < 1e-6);
}

TEST_CASE("A prompt enters before a cache and lengthens later masks", "[prompt]") {
  peft::InputEmbeddings site(peft::InputOptions(4));
  peft::add_adapter(*site, PromptOptions(2), peft::all());
  const auto ones = torch::ones({3, 5}, torch::kLong);
  peft::Embedded in;
  in.values = torch::randn({3, 5, 4});
  in.mask = in.positions = in.types = ones;
  const auto first = site->forward(in);
  CHECK(first.values.size(1) == 7);
  CHECK(first.mask.size(1) == 7);
  CHECK_FALSE(first.positions.defined());
  CHECK_FALSE(first.types.defined());
  CHECK(first.virtual_tokens.sum().item<int64_t>() == 2);
  in.values = in.values.slice(1, 0, 1);
  in.past = 7;
  const auto later = site->forward(in);
  CHECK(later.values.size(1) == 1);
  CHECK(later.mask.size(1) == 7);
  CHECK_FALSE(later.positions.defined());
  CHECK_FALSE(later.virtual_tokens.defined());
}

TEST_CASE("Prompts of several adapters, and other methods, work together", "[prompt]") {
  auto model = filled_classifier(), other = filled_classifier();
  const auto one = vectors(peft::add_adapter(*model, PromptOptions(2), peft::all(), "one"));
  const auto two = vectors(peft::add_adapter(*model, PromptOptions(1), peft::all(), "two"));
  const auto both = vectors(peft::add_adapter(*other, PromptOptions(3), peft::all()));
  {
    torch::NoGradGuard no_grad;
    both.copy_(torch::cat({two, one}));
  }
  const auto together = model->forward(batch()).logits;
  CHECK(largest(together, other->forward(batch()).logits) < 1e-6);
  peft::add_adapter(*model, peft::LoraOptions(2).init(peft::LoraInit::random), peft::named({"query"}), "low");
  CHECK(largest(model->forward(batch()).logits, together) > 1e-5);
  peft::set_active(*model, {"two"});
  CHECK(model->base_model->forward(batch()).virtual_tokens.sum().item<int64_t>() == 1);

  // A clone draws its words from its own vocabulary.
  auto copy = peft::clone(*model);
  {
    torch::NoGradGuard no_grad;
    copy->base_model->embeddings->word_embeddings->base->weight.fill_(7);
  }
  const auto words = PromptOptions(2).init(PromptInit::vocabulary);
  CHECK(vectors(peft::add_adapter(*copy, words, peft::all(), "words")).eq(7).all().item<bool>());
  CHECK_FALSE(vectors(peft::add_adapter(*model, words, peft::all(), "words")).eq(7).any().item<bool>());
}

TEST_CASE("Prompts go to files and train on from them", "[prompt]") {
  const auto [config, names] =
      check_prompt_files({peft::on(PromptOptions(3), peft::all()),
                          peft::on(peft::ReplaceOptions(), peft::named({"classifier"}))});
  CHECK(names == std::vector<std::string>{"base_model.classifier.bias", "base_model.classifier.weight",
                                          "prompt_embeddings"});
  CHECK(config["peft_type"] == "PROMPT_TUNING");
  CHECK(config["prompt_tuning_init"] == "RANDOM");
  CHECK(config["num_virtual_tokens"] == 3);
  CHECK(config["token_dim"] == 8);
  CHECK(config["num_layers"] == 2);
  CHECK(config["num_attention_heads"] == 2);
  CHECK(config["task_type"] == "SEQ_CLS");

  const auto words = PromptOptions(3).init(PromptInit::tokens).tokens({4}).text("red").tokenizer("bert-base");
  const auto [of_text, text_names] = check_prompt_files({peft::on(words, peft::all())});
  CHECK(of_text["prompt_tuning_init"] == "TEXT");
  CHECK(of_text["prompt_tuning_init_text"] == "red");
  CHECK(of_text["task_type"] == "FEATURE_EXTRACTION");
  CHECK(text_names == std::vector<std::string>{"prompt_embeddings"});

  auto model = filled_classifier(), other = filled_classifier();
  const auto adapter = peft::add_adapter(*model, PromptOptions(3), peft::all());
  const peft_test::TemporaryFolder folder;
  peft::save_adapter(adapter, folder / "one");
  CHECK(peft::load_adapter(*other, folder / "one", "on", /*trainable=*/true).count() == 24);

  auto hubbed = filled_classifier();
  const auto after = peft::add_adapter(*hubbed, hub(false), peft::all());
  CHECK_THAT(complaint([&] { peft::save_adapter(after, folder / "two"); }),
             Contains("a place of AdapterHub's"));
}

TEST_CASE("Prompts name what is wrong with them", "[prompt]") {
  auto model = filled_classifier();
  const auto says = [&](const PromptOptions& options) {
    return complaint([&] { peft::add_adapter(*model, options, peft::all()); });
  };
  CHECK_THAT(says(PromptOptions(0)), Contains("num_virtual_tokens must be positive, but got 0"));
  CHECK_THAT(says(PromptOptions(10)), Contains("must be less than 10, the model's positions, but got 10"));
  CHECK_THAT(says(PromptOptions(3).scale(-1)), Contains("scale must be positive, but got -1"));
  CHECK_THAT(says(PromptOptions(3).sample_from(-1)), Contains("sample_from must be at least 0, but got -1"));
  CHECK_THAT(says(PromptOptions(3).init(PromptInit::tokens)), Contains("tokens must be given"));
  CHECK_THAT(says(PromptOptions(3).tokens({1})),
             Contains("tokens must be given with init tokens, and only there"));
  CHECK_THAT(says(PromptOptions(3).init(PromptInit::labels)), Contains("labels must be given"));
  CHECK_THAT(says(PromptOptions(1).init(PromptInit::labels).labels({{1}, {2}})),
             Contains("labels must be at most num_virtual_tokens, 1, but got 2"));
  CHECK_THAT(says(PromptOptions(3).init(PromptInit::labels).labels({{}})), Contains("each have a token"));
  CHECK_THAT(says(PromptOptions(3).init(PromptInit::tokens).tokens({20})),
             Contains("token ids must be from 0 to 19, but got 20"));
  CHECK_THAT(complaint([&] { peft::add_adapter(*model, PromptOptions(3), peft::named({"output"}), "x"); }),
             Contains("after_embedding(true) only"));
  CHECK(peft::internal::adapter_names(*model).empty());

  peft::add_adapter(*model, PromptOptions(7), peft::all());
  CHECK_THAT(complaint([&] { model->forward(batch()); }),
             Contains("at most 10 tokens, but got 11 with its virtual ones"));
}
