#include "peft/methods/multitask_prompt.h"

#include "methods/prompt_case.h"
#include "peft/model/prompt_ensemble.h"

using namespace suite;
using peft::MultitaskPromptOptions;
using peft::MultitaskSource;
using peft::PromptOptions;
using peft_test::batch;
using peft_test::complaint;
using peft_test::filled_classifier;

namespace {

MultitaskPromptOptions three_tasks() { return MultitaskPromptOptions(PromptOptions(3), 3).rank(2); }

const peft::MultitaskPromptImpl& piece(const peft::Adapter& adapter) {
  return *adapter.layers<peft::MultitaskPromptImpl>().at(0);
}
Tensor vectors(const peft::Adapter& adapter) { return piece(adapter).prompt_embeddings; }

}  // namespace

TEST_CASE("Multitask prompts keep the promises of a method", "[multitask_prompt]") {
  auto one_task = bert_case();
  const auto options = MultitaskPromptOptions(PromptOptions(2), 1).rank(2);
  check_properties(one_task,
                   {{peft::on(options, peft::all())},
                    [](const peft::SiteInfo& site) { return 2 * site.width + 2 * (2 + site.width); },
                    /*no_op_at_start=*/false,
                    /*whole_gradient=*/true,
                    suite::never});
}

TEST_CASE("Multitask prompts equal Hugging Face's numbers", "[multitask_prompt]") {
  const peft::TaskIds tasks(torch::tensor({2, 0}));
  check_prompt("tasks", three_tasks(),
               {{-1.125839829,  -1.152360201,  -0.2505785823, -0.4338788092, 0.8487103581,  0.692009151,
                 -0.3160127699, -2.115219355,  0.4680964053,  -0.1577124447, 1.44366014,    0.2660494149,
                 0.1664553434,  0.8743818402,  -0.1434738487, -0.1116093323, 0.9318265915,  1.259009242,
                 2.004980564,   0.05373690277, 0.6180566549,  -0.4128022194, -0.8410648108, -2.316041946},
                {-0.1537873126, -0.3152578328, -0.3356702931, -0.1274878745, -0.3206594139, -0.3703482955},
                {-0.1162256899, -0.3119404931, -0.3680862853, -0.1274878745, -0.3206594139, -0.3703482955},
                {1.064135729, 1.06551937, 1.063349347, 1.061878518, 1.059775618, 1.055863442, 1.050255449,
                 1.042873053, 1.032796459, 1.019245789, 1.002250267, 0.9830633748},
                {-0.1884884275, -0.187412644, -0.1026644449, 0.03667101324, -0.2237243089, -0.3841480658}},
               vectors);
  auto model = filled_classifier();
  torch::manual_seed(0);
  const auto& started = piece(peft::add_adapter(*model, three_tasks(), peft::all()));
  check_values(
      flat({started.prefix_task_cols, started.prefix_task_rows}),
      {-0.004317265004, -0.01485096291,  -0.01146154106,   -0.01110716816,  0.01188646071,   0.03083885089,
       0.01014668774,   -0.01182066277,  -0.0113849612,    0.01839942858,   -0.001381453709, -0.009898507036,
       -0.02991829813,  -0.003876742441, 0.008910243399,   0.02650549635,   -0.03258651868,  -0.01099487301,
       0.03413423151,   0.04760735109,   -0.02251203172,   -0.006339961663, -0.02184936404,  -0.00170388585,
       -0.001866964623, 0.01374100428,   -0.03198163956,   0.000369733345,  -0.01500853617,  0.003708159551,
       0.01242276654,   0.0127636306,    -0.004920018837,  0.04605032876,   0.02337375656,   0.007890054956,
       0.03882924095,   0.01582996175,   -0.0004050365242, -0.008743390441, 0.03291733935,   -0.02720337734,
       0.01932606474,   0.03249566257,   -0.007312375586,  -0.02604880743,  0.001988069154,  0.008836439811,
       0.004938527942,  0.001537739998,  0.005645344499,   0.008684513159,  -0.01604985818,  -0.02590372227,
       -0.01500362996,  -0.02623931319,  -0.004376673605,  -0.04870130494,  -0.008576599881, 0.004658365622,
       0.01593774371,   -0.003696832573, -0.007402944844,  -0.02420562878,  -0.01245396957,  -0.009274443612},
      1e-9);
}

TEST_CASE("Multitask prompts take over those of other tasks", "[multitask_prompt]") {
  auto model = filled_classifier();
  torch::manual_seed(2);
  const auto source = peft::add_adapter(*model, three_tasks(), peft::all(), "source");
  std::map<std::string, Tensor> tensors;
  for (const auto& item : piece(source).named_parameters())
    tensors.emplace(item.key(), item.value().detach());
  const auto take = [&](MultitaskSource from, int64_t tasks = 1) {
    auto other = filled_classifier();
    const auto options = MultitaskPromptOptions(PromptOptions(3), tasks).rank(2).source(from);
    return peft::add_adapter(*other, MultitaskPromptOptions(options).source_tensors(tensors).source_task(1),
                             peft::all());
  };
  const auto average = take(MultitaskSource::average);
  CHECK(torch::equal(piece(average).prefix_task_cols[0], tensors["prefix_task_cols"].mean(0)));
  CHECK(torch::equal(piece(average).prefix_task_rows[0], tensors["prefix_task_rows"].mean(0)));
  const auto exact = take(MultitaskSource::exact);
  CHECK(torch::equal(piece(exact).prefix_task_rows[0], tensors["prefix_task_rows"][1]));
  const auto shared = take(MultitaskSource::shared, 4);
  for (const auto& adapter : {average, exact, shared})
    CHECK(torch::equal(vectors(adapter), tensors["prompt_embeddings"]));
  CHECK_THAT(complaint([&] { take(MultitaskSource::average, 2); }), Contains("tasks must be 1"));
  tensors["prefix_task_cols"] = torch::zeros({3, 2, 2});
  CHECK_THAT(complaint([&] { take(MultitaskSource::exact); }),
             Contains("'prefix_task_cols' must be (1, 3, 2)"));
  tensors.erase("prompt_embeddings");
  CHECK_THAT(complaint([&] { take(MultitaskSource::shared); }), Contains("must hold 'prompt_embeddings'"));
}

TEST_CASE("Multitask prompts go to files", "[multitask_prompt]") {
  const peft::TaskIds tasks(torch::tensor({1, 2}));
  const auto [config, names] = check_prompt_files({peft::on(three_tasks(), peft::all())});
  CHECK(names == std::vector<std::string>{"prefix_task_cols", "prefix_task_rows", "prompt_embeddings"});
  CHECK(config["peft_type"] == "MULTITASK_PROMPT_TUNING");
  CHECK(config["num_tasks"] == 3);
  CHECK(config["num_ranks"] == 2);
}

TEST_CASE("Multitask prompts ask which task a row is of", "[multitask_prompt]") {
  auto model = filled_classifier();
  peft::add_adapter(*model, three_tasks(), peft::all());
  const auto says = [&](const Tensor& ids) {
    return complaint([&] {
      const peft::TaskIds tasks(ids);
      model->forward(batch());
    });
  };
  CHECK_THAT(complaint([&] { model->forward(batch()); }), Contains("one a row, 2 of them, but got 0"));
  CHECK_THAT(says(torch::tensor({1})), Contains("one a row, 2 of them, but got 1"));
  CHECK_THAT(says(torch::tensor({1, 3})), Contains("must be from 0 to 2, but got 3"));
  CHECK_THAT(says(torch::tensor({-1, 3})), Contains("must be from 0 to 2, but got -1"));
  CHECK_THAT(says(torch::tensor({0.5, 1.0})), Contains("must be whole numbers"));
  CHECK_THAT(
      complaint([&] { peft::add_adapter(*model, MultitaskPromptOptions(PromptOptions(3), 0), peft::all()); }),
      Contains("tasks must be positive, but got 0"));
  CHECK_THAT(complaint([&] { peft::add_adapter(*model, three_tasks().rank(0), peft::all()); }),
             Contains("rank must be positive, but got 0"));

  // A row's task is its own, alone as in a batch.
  const auto whole = [&] {
    const peft::TaskIds tasks(torch::tensor({2, 0}));
    return model->forward(batch()).logits;
  }();
  const peft::TaskIds second(torch::tensor({0}));
  peft::models::EncoderInputs alone;
  alone.input_ids = batch().input_ids.slice(0, 1, 2).slice(1, 0, 2);
  CHECK(largest(model->forward(alone).logits, whole.slice(0, 1, 2)) < 1e-6);
}

TEST_CASE("An ensemble of prompts is each of them in one forward, and votes", "[prompt_ensemble]") {
  auto model = filled_classifier();
  torch::manual_seed(3);
  std::vector<std::string> names{"one", "two", "three"};
  for (const auto& name : names) {
    peft::add_adapter(*model,
                      {peft::on(PromptOptions(2), peft::all()),
                       peft::on(peft::ReplaceOptions(), peft::named({"classifier"}))},
                      name);
    shake(peft::adapter(*model, name));
  }
  const peft::PromptEnsemble ensemble(*model, names);
  const auto inputs = batch();
  peft::models::EncoderInputs repeated;
  repeated.input_ids = ensemble.repeat(inputs.input_ids);
  repeated.attention_mask = ensemble.repeat(inputs.attention_mask);
  repeated.token_type_ids = ensemble.repeat(inputs.token_type_ids);
  CHECK_FALSE(ensemble.repeat(inputs.position_ids).defined());
  const auto logits = ensemble.forward(2, [&] { return model->forward(repeated).logits; });
  REQUIRE(logits.sizes() == c10::IntArrayRef({3, 2, 3}));
  for (int64_t i = 0; i < 3; ++i) {
    peft::set_active(*model, {names[static_cast<size_t>(i)]});
    CHECK(largest(logits[i], model->forward(inputs).logits) < 1e-6);
  }
  CHECK_THAT(complaint([&] { ensemble.forward(1, [&] { return model->forward(inputs).logits; }); }),
             Contains("expected 3 rows"));

  const auto votes = torch::tensor({{{2.0, 0.0, 0.0}, {0.0, 1.0, 0.0}},
                                    {{0.0, 9.0, 0.0}, {0.0, 9.0, 0.0}},
                                    {{2.0, 0.0, 0.0}, {3.0, 0.0, 2.0}}});
  CHECK(torch::equal(peft::majority(votes), torch::tensor({0, 1})));
  CHECK(torch::equal(peft::majority(votes.slice(0, 0, 2)), torch::tensor({1, 1})));  // 1 : 1, by probability

  peft::add_adapter(*model, PromptOptions(3), peft::all(), "long");
  peft::add_adapter(*model, peft::ReplaceOptions(), peft::named({"classifier"}), "head");
  const auto says = [&](const std::vector<std::string>& members) {
    return complaint([&] { peft::PromptEnsemble(*model, members); });
  };
  CHECK_THAT(says({"one"}), Contains("adapters must be at least 2, but got 1"));
  CHECK_THAT(says({"one", "one"}), Contains("'one' is named twice"));
  CHECK_THAT(says({"one", "four"}), Contains("the model has no adapter 'four'"));
  CHECK_THAT(says({"one", "head"}), Contains("adapter 'head' has no prompt"));
  CHECK_THAT(says({"one", "long"}), Contains("prompts must be of one length, 2, but 'long' has 3"));
}
