#include <nlohmann/json.hpp>

#include "models/tiny_bert.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/invertible.h"
#include "peft/models/gpt2.h"
#include "property_suite.h"

using namespace suite;
using peft::InvertibleOptions;

namespace {

peft::models::GPT2LMHeadModel decoder(int64_t width = 6) {
  peft::models::GPT2Config config;
  config.vocab_size(20)
      .n_embd(width)
      .n_layer(1)
      .n_head(1)
      .n_positions(10)
      .resid_pdrop(0)
      .embd_pdrop(0)
      .attn_pdrop(0);
  return peft::models::GPT2LMHeadModel(config);
}

peft::models::GPT2Inputs tokens() {
  peft::models::GPT2Inputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19, 7}, {1, 2, 0, 0}});
  return inputs;
}

}  // namespace

TEST_CASE("Invertible adapters change embeddings and undo it", "[invertible]") {
  torch::manual_seed(6);
  for (const int64_t width : {6, 7}) {
    peft::models::GPT2LMHeadModel model = decoder(width);
    const auto adapter = peft::add_adapter(*model, InvertibleOptions(1.5).non_linearity("swish"), "one");
    CHECK(adapter.sites() == std::vector<std::string>{"transformer.output"});
    const int64_t a = width / 2, b = width - a, f = static_cast<int64_t>(static_cast<double>(b) / 1.5),
                  g = static_cast<int64_t>(static_cast<double>(a) / 1.5);
    CHECK(adapter.count() == b * f + f + f * a + a + a * g + g + g * b + b);
    shake(adapter);
    auto piece = adapter.layers<peft::InvertibleImpl>().front();
    const auto x = torch::randn({2, 3, width});
    const auto y = piece->embed({x, {}, {}, {}, 0, {}, {}}).values.detach();
    CHECK(largest(y, x) > 1e-2);
    CHECK(largest(piece->leave(y).detach(), x) < 1e-6);
    // x₁ is changed by a function of x₂ alone.
    const auto other = torch::cat({x.narrow(2, 0, a) + 1, x.narrow(2, a, b)}, 2);
    const auto z = piece->embed({other, {}, {}, {}, 0, {}, {}}).values.detach();
    CHECK(largest(z.narrow(2, 0, a), y.narrow(2, 0, a) + 1) < 1e-6);
  }
}

TEST_CASE("A language model's logits see the inverse", "[invertible]") {
  torch::manual_seed(6);
  auto model = decoder();
  model->eval();
  const auto plain = model->forward(tokens());
  const auto adapter = peft::add_adapter(*model, InvertibleOptions().non_linearity("swish"), "one");
  shake(adapter);
  auto piece = adapter.layers<peft::InvertibleImpl>().front();
  const auto adapted = model->forward(tokens());
  const auto expected = model->lm_head->forward(piece->leave(adapted.last_hidden_state));
  CHECK(torch::equal(adapted.logits, expected));
  CHECK(largest(adapted.logits.detach(), plain.logits.detach()) > 1e-3);
  adapted.logits.square().mean().backward();
  for (const auto& [name, tensor] : adapter.named_parameters())
    CHECK(tensor.grad().abs().sum().item<float>() > 0);
  {
    const auto off = peft::disabled(*model);
    CHECK(torch::equal(model->forward(tokens()).logits, plain.logits));
  }
  const auto copy = peft::clone(*model);
  CHECK(torch::equal(copy->forward(tokens()).logits, adapted.logits));

  const peft::RowAdapters rows({peft::RowAdapters::base, "one"});
  const auto mixed = model->forward(tokens()).logits.detach();
  CHECK(largest(mixed[0], plain.logits[0].detach()) < 1e-5);
  CHECK(largest(mixed[1], adapted.logits[1].detach()) < 1e-5);
}

TEST_CASE("An invertible adapter beside a bottleneck draws after it", "[invertible]") {
  const auto add = [](bool with) {
    peft::models::BertModel model(peft_test::tiny());
    torch::manual_seed(8);
    std::vector<peft::Part> parts{peft::on(peft::pfeiffer().reduction_factor(2))};
    if (with) parts.push_back(peft::on(InvertibleOptions()));
    return peft::add_adapter(*model, parts, "one");
  };
  const auto alone = add(false), both = add(true);
  const auto blocks = both.layers<peft::BottleneckImpl>();
  REQUIRE(both.sites().front() == "embeddings.output");
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto theirs = alone.layers<peft::BottleneckImpl>().at(i)->parameters();
    for (size_t k = 0; k < theirs.size(); ++k) CHECK(torch::equal(blocks[i]->parameters()[k], theirs[k]));
  }
  for (const auto& tensor : both.layers<peft::InvertibleImpl>().front()->parameters()) {
    if (tensor.dim() == 1) CHECK(tensor.eq(0).all().item<bool>());
  }
}

TEST_CASE("Invertible adapters refuse what does not fit", "[invertible]") {
  peft::models::BertModel model(peft_test::tiny());
  const auto complaint = [&](const InvertibleOptions& options) {
    return peft_test::complaint([&] { peft::add_adapter(*model, options, "one"); });
  };
  CHECK_THAT(complaint(InvertibleOptions(0)), Contains("reduction_factor must be positive, but got 0"));
  CHECK_THAT(complaint(InvertibleOptions(5)),
             Contains("half of width 8 leaves no channels at reduction_factor 5"));
  CHECK_THAT(complaint(InvertibleOptions().non_linearity("gleu")), Contains("no activation 'gleu'"));
  CHECK_THAT(peft_test::complaint([&] {
               peft::add_adapter(*model, InvertibleOptions(), peft::named({"embeddings.input"}), "one");
             }),
             Contains("embeddings that have their positions and norm"));
  CHECK(peft::internal::adapter_names(*model).empty());
}
