#include "peft/methods/lora.h"
#include "peft/methods/multitask_prompt.h"
#include "peft/methods/p_tuning.h"
#include "peft/methods/prompt.h"
#include "peft/models/generate.h"
#include "peft/models/gpt2.h"
#include "property_suite.h"

using namespace suite;
using peft::PromptOptions;
using peft::models::GenerateOptions;
using peft::models::GPT2Inputs;
using peft::models::GPT2LMHeadModel;

namespace {

constexpr int64_t length = 6;

GPT2LMHeadModel prompted(const peft::Part& part) {
  torch::manual_seed(5);
  GPT2LMHeadModel model(peft::models::GPT2Config()
                            .vocab_size(30)
                            .n_positions(32)
                            .n_embd(8)
                            .n_layer(2)
                            .n_head(2)
                            .initializer_range(0.3));
  model->eval();
  peft::add_adapter(
      *model, {part, peft::on(peft::LoraOptions(2).init(peft::LoraInit::random), peft::named({"c_attn"}))});
  return model;
}

std::vector<peft::Part> prompts() {
  const auto anywhere = peft::all();
  return {peft::on(PromptOptions(3), anywhere), peft::on(peft::PTuningOptions(3), anywhere),
          peft::on(peft::MultitaskPromptOptions(PromptOptions(3)), anywhere),
          peft::on(PromptOptions(3).after_first(true), anywhere),
          peft::on(PromptOptions(3).after_embedding(true), anywhere)};
}

GPT2Inputs padded() {
  GPT2Inputs inputs;
  inputs.input_ids = torch::randint(1, 30, {3, length}, torch::kLong);
  inputs.attention_mask = torch::ones({3, length}, torch::kLong);
  inputs.attention_mask[1].slice(0, 0, 2).zero_();
  return inputs;
}

}  // namespace

TEST_CASE("Prompts on a decoder give the same with a cache as without", "[prompt]") {
  for (const auto& part : prompts()) {
    auto model = prompted(part);
    const auto inputs = padded();
    const auto at_once = model->forward(inputs);
    const auto whole = at_once.logits;
    CHECK(whole.size(1) == length + 3);
    CHECK(peft::models::real_tokens(whole, at_once).size(1) == length);

    GPT2Inputs step;
    step.use_cache = true;
    std::vector<Tensor> logits;
    for (int64_t begin = 0, end = 4; begin < length; begin = end, ++end) {
      step.input_ids = inputs.input_ids.slice(1, begin, end);
      step.attention_mask = inputs.attention_mask.slice(1, 0, end);
      const auto output = model->forward(step);
      logits.push_back(output.logits);
      step.cache = output.cache;
    }
    CHECK(step.cache.length() == length + 3);
    // A row that begins with padding has no meaning there.
    const auto real = torch::cat(logits, 1).slice(1, 5), expected = whole.slice(1, 5);
    CHECK(largest(real, expected) < 2e-6);

    const auto texts = [&](bool cache) {
      const auto options = GenerateOptions().max_new_tokens(6).use_cache(cache);
      return peft::models::generate(model, inputs.input_ids, options, inputs.attention_mask);
    };
    const auto made = texts(true);
    CHECK(torch::equal(made, texts(false)));
    CHECK(made.size(1) == length + 6);
    const auto off = peft::disabled(*model);
    CHECK_FALSE(torch::equal(made, texts(true)));
  }
}

TEST_CASE("The virtual tokens of a decoder have no label, but the last one predicts", "[prompt]") {
  auto model = prompted(prompts().front());
  auto inputs = padded();
  inputs.labels = inputs.input_ids;
  const auto output = model->forward(inputs);
  const auto next = output.logits.slice(1, 2, -1).flatten(0, 1);
  CHECK(largest(output.loss, at::cross_entropy_loss(next, inputs.labels.flatten())) < 1e-6);
}

TEST_CASE("A decoder's prompt has room among its positions", "[prompt]") {
  auto model = prompted(peft::on(PromptOptions(28), peft::all()));
  CHECK_THROWS_WITH(model->forward(padded()), Contains("at most 32 tokens"));
  CHECK_THROWS_WITH(prompted(peft::on(PromptOptions(32), peft::all())), Contains("must be less than 32"));
}
