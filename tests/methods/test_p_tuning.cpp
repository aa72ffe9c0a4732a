#include "peft/methods/p_tuning.h"

#include "methods/prompt_case.h"

using namespace suite;
using peft::PromptEncoderKind;
using peft::PTuningOptions;
using peft_test::batch;
using peft_test::complaint;
using peft_test::filled_classifier;

namespace {

PTuningOptions lstm(int64_t hidden) {
  return PTuningOptions(3).encoder(PromptEncoderKind::lstm).hidden_size(hidden);
}

Promise p_tuning(const PTuningOptions& options, int64_t count) {
  return {{peft::on(options, peft::all())},
          [count](const peft::SiteInfo&) { return count; },
          /*no_op_at_start=*/false,
          /*whole_gradient=*/true,
          suite::never};
}

Tensor vectors(const peft::Adapter& adapter) { return adapter.layers<peft::PTuningImpl>().at(0)->vectors(); }

}  // namespace

TEST_CASE("P-tuning keeps the promises of a method", "[p_tuning]") {
  const int64_t d = 8, h = 3;
  check_properties(bert_case(),
                   p_tuning(PTuningOptions(2).hidden_size(h), 2 * d + d * h + h + h * h + h + h * d + d));
  const int64_t k = 2, of_lstm = 2 * (4 * k * (d + k + 2) + 4 * k * (3 * k + 2));
  check_properties(bert_case(), p_tuning(lstm(k), 3 * d + of_lstm + 4 * k * k + 2 * k + 2 * k * d + d));
}

TEST_CASE("P-tuning equals Hugging Face's numbers", "[p_tuning]") {
  check_prompt("mlp", PTuningOptions(3).hidden_size(5),
               {{-0.4797144532, 0.4007444382,   -0.5062279105,  -0.03693981096, -0.1285490096, 0.1023669168,
                 0.02341914177, -0.5538448095,  -0.4349658489,  0.3561837971,   -0.4699199498, -0.05769089609,
                 -0.1254919022, -0.02660953626, -0.09876030684, -0.4092832804,  -0.4212491214, 0.2382846475,
                 -0.3847067952, -0.06418824941, -0.154368639,   -0.1242355555,  -0.1203043461, -0.3783799708},
                {0.1252548039, -0.008391887137, -0.1387228991, 0.07772911194, -0.117479207, -0.260406013},
                {0.2051060906, 0.06553193819, -0.1039085937, 0.07772911194, -0.117479207, -0.260406013},
                {1.083172447, 1.069641068, 1.061952206, 1.058358342, 1.055224897, 1.051845858, 1.048582081,
                 1.045810097, 1.044014263, 1.042375516, 1.041088217, 1.040544858},
                {-0.2413371664, -0.2685356746, -0.1756482144, -0.2176240518, -0.3332703598, -0.2997733555}},
               vectors);
  check_prompt(
      "lstm", lstm(2),
      {{0.8937129974,    0.4293705225,  -0.4114088416,   -0.5144689083, 0.005176559091, 0.0871964097,
        0.4484524727,    0.2343723923,  0.8551775217,    0.4495242536,  -0.388037771,   -0.4897177815,
        0.0001718997955, 0.09058988094, 0.3941843808,    0.2781830132,  0.7987796664,   0.4744253457,
        -0.3552779555,   -0.4573192,    -0.008854478598, 0.09246098995, 0.3162240386,   0.3393380642},
       {-0.1414949146, -0.1207171494, -0.04620445856, -0.1596574254, -0.2151110992, -0.174459401},
       {-0.117452192, -0.1099984564, -0.0536210763, -0.1596574254, -0.2151110992, -0.174459401},
       {1.059160979, 1.05501512, 1.052221219, 1.049521993, 1.04794831, 1.047329393, 1.04737137, 1.047537477,
        1.047405368, 1.046918535, 1.046211824, 1.045473641},
       {-0.2292924031, -0.2787610395, -0.2035538662, -0.2084888925, -0.3321215813, -0.3071266082}},
      vectors);
}

TEST_CASE("P-tuning's network is for training, its table for inference", "[p_tuning]") {
  for (const auto& options : {PTuningOptions(3), lstm(4).layers(1)}) {
    const auto [config, names] = check_prompt_files({peft::on(options, peft::all())});
    CHECK(names == std::vector<std::string>{"prompt_embeddings"});
    CHECK(config["peft_type"] == "P_TUNING");
    const bool is_lstm = options.encoder() == PromptEncoderKind::lstm;
    CHECK(config["encoder_reparameterization_type"] == (is_lstm ? "LSTM" : "MLP"));
    CHECK(config["encoder_hidden_size"] == (is_lstm ? 4 : 8));
    CHECK(config["encoder_num_layers"] == options.layers());
  }
  auto model = filled_classifier(), other = filled_classifier();
  const auto adapter = peft::add_adapter(*model, PTuningOptions(3), peft::all());
  const peft_test::TemporaryFolder folder;
  const auto notes = peft::save_adapter(adapter, folder / "one");
  CHECK_THAT(notes.back(), Contains("the network that makes the prompt is not written"));
  CHECK_THAT(complaint([&] { peft::load_adapter(*other, folder / "one", "on", /*trainable=*/true); }),
             Contains("without the network"));
  const auto loaded = peft::load_adapter(*other, folder / "one");
  CHECK(torch::equal(vectors(loaded), vectors(adapter)));

  // Copies of both forms.
  for (auto [original, handle] : {std::pair(model, adapter), {other, loaded}}) {
    auto copy = peft::clone(*original);
    CHECK(torch::equal(copy->forward(batch()).logits, original->forward(batch()).logits));
    CHECK(peft::adapter(*copy, "default").count() == handle.count());
  }
}

TEST_CASE("P-tuning names what is wrong with it", "[p_tuning]") {
  auto model = filled_classifier();
  const auto says = [&](const PTuningOptions& options) {
    return complaint([&] { peft::add_adapter(*model, options, peft::all()); });
  };
  CHECK_THAT(says(PTuningOptions(0)), Contains("num_virtual_tokens must be positive, but got 0"));
  CHECK_THAT(says(PTuningOptions(10)), Contains("must be less than 10, the model's positions, but got 10"));
  CHECK_THAT(says(PTuningOptions(3).hidden_size(-1)), Contains("hidden_size must be at least 0, but got -1"));
  CHECK_THAT(says(PTuningOptions(3).layers(0)), Contains("layers must be positive, but got 0"));
  CHECK_THAT(says(PTuningOptions(3).dropout(1)), Contains("dropout must be in [0, 1), but got 1"));
  CHECK_THAT(says(PTuningOptions(3).table(true)), Contains("must come from a file"));
  CHECK(peft::internal::adapter_names(*model).empty());
}
