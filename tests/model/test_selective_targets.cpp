#include <peft/model/selective_targets.h>

#include "methods/reference_case.h"
#include "models/tiny_encoder.h"
#include "peft/methods/bias.h"
#include "peft/methods/prefix.h"
#include "peft/model/reparametrized.h"
#include "peft/models/bert.h"
#include "peft/models/deberta_v2.h"
#include "peft/models/gpt2.h"
#include "peft/models/roberta.h"

#include <torch/nn/modules/transformercoder.h>

using namespace suite;
using peft::BitFitTerm;
using enum peft::BitFitTerm;

namespace {

constexpr int64_t layers = 3, width = 8, inner = 12, classes = 2;

peft::models::BertForSequenceClassification small_bert() {
  peft::models::BertConfig config;
  config.vocab_size(11).hidden_size(width).num_hidden_layers(layers).num_attention_heads(2).intermediate_size(
      inner);
  config.max_position_embeddings(6).num_labels(classes);
  return peft::models::BertForSequenceClassification(config);
}

std::vector<std::string> sites_of(const peft::Target& target) {
  auto model = small_bert();
  return peft::add_adapter(*model, peft::BiasOptions(), target.exclude({"classifier"})).sites();
}

/// A decoder-like model: an embedding's norm, blocks, a final norm, a head with a norm of its own.
struct StackImpl : nn::Module {
  explicit StackImpl(int64_t count) {
    const auto body = register_module("body", std::make_shared<nn::Module>("Body"));
    body->register_module("norm_in", peft::LayerNorm(nn::LayerNormOptions({2})).ptr());
    nn::ModuleList blocks;
    for (int64_t i = 0; i < count; ++i) blocks->push_back(peft::Linear(2, 2));
    body->register_module("h", blocks.ptr());
    body->register_module("norm_out", peft::LayerNorm(nn::LayerNormOptions({2})).ptr());
    const auto head = register_module("head", std::make_shared<nn::Module>("Head"));
    head->register_module("norm", peft::LayerNorm(nn::LayerNormOptions({2})).ptr());
  }
};

}  // namespace

TEST_CASE("BitFit's terms are the layers the author's fragments of names match", "[bitfit]") {
  const auto per_layer = [](const std::vector<std::string>& ends) {
    std::vector<std::string> sites;
    for (int64_t i = 0; i < layers; ++i) {
      for (const auto& end : ends) sites.push_back("bert.encoder.layer." + std::to_string(i) + "." + end);
    }
    sites.push_back("bert.pooler.dense");
    return sites;
  };
  CHECK(sites_of(peft::bitfit({query})) == per_layer({"attention.self.query"}));
  CHECK(sites_of(peft::bitfit({value, key})) == per_layer({"attention.self.key", "attention.self.value"}));
  CHECK(sites_of(peft::bitfit({query, intermediate})) ==
        per_layer({"attention.self.query", "intermediate.dense"}));
  // These two mean more than they say.
  CHECK(sites_of(peft::bitfit({output})) == per_layer({"attention.output.dense", "output.dense"}));
  CHECK(sites_of(peft::bitfit({output_layernorm})) ==
        per_layer({"attention.output.LayerNorm", "output.LayerNorm"}));
  CHECK(sites_of(peft::bitfit({attention_layernorm})) == per_layer({"attention.output.LayerNorm"}));
  const auto on = [](torch::nn::Module& model, const std::vector<BitFitTerm>& terms) {
    return peft::add_adapter(model, peft::BiasOptions(), peft::bitfit(terms)).sites();
  };
  peft::models::RobertaForSequenceClassification roberta(peft_test::tiny_roberta());
  CHECK(on(*roberta, {key, intermediate}) ==
        std::vector<std::string>{
            "roberta.encoder.layer.0.attention.self.key", "roberta.encoder.layer.0.intermediate.dense",
            "roberta.encoder.layer.1.attention.self.key", "roberta.encoder.layer.1.intermediate.dense"});
  peft::models::DebertaV2ForSequenceClassification deberta(peft_test::tiny_deberta_v2());
  CHECK(on(*deberta, {query}) == std::vector<std::string>{"deberta.encoder.layer.0.attention.self.query_proj",
                                                          "deberta.encoder.layer.1.attention.self.query_proj",
                                                          "pooler.dense"});
  StackImpl stack(2);
  CHECK_THROWS_WITH(on(stack, {query}),
                    Contains("bitfit: query: the model has no layer 'attention.self.query' (hint:"));
  CHECK_THROWS_WITH(peft::bitfit({}),
                    Contains("expected at least one term, but got none (hint: linear probing"));
  CHECK(std::string(peft::to_string(attention_layernorm)) == "attention_layernorm");
}

TEST_CASE("BitFit trains as many biases as the paper counts", "[bitfit]") {
  auto model = small_bert();
  const auto adapter =
      peft::add_adapter(*model, peft::BiasOptions(), peft::bitfit({BitFitTerm::all}).exclude({"classifier"}));
  const auto formula = [](int64_t L, int64_t d, int64_t m) { return L * (7 * d + m) + 2 * d; };
  CHECK(adapter.count() == formula(layers, width, inner));
  CHECK(formula(12, 768, 3072) == 102912);
  peft::train_also(adapter, *model, peft::named({"classifier"}));
  CHECK(adapter.count() == formula(layers, width, inner) + classes * (width + 1));
}

TEST_CASE("The top layers are the last blocks, and the norm after them", "[top_layers]") {
  auto model = small_bert();
  const auto adapter = peft::add_adapter(*model, peft::ReplaceOptions(), peft::top_layers(2));
  for (const auto& site : adapter.sites()) {
    const bool in_top =
        site.find(".layer.1.") != std::string::npos || site.find(".layer.2.") != std::string::npos;
    CHECK(in_top);
  }
  // A block: four projections and two of the feed-forward, two norms.
  const auto block = 4 * width * (width + 1) + inner * (width + 1) + width * (inner + 1) + 4 * width;
  CHECK(adapter.count() == 2 * block);
  peft::train_also(adapter, *model, peft::named({"classifier"}));

  // Nothing is computed for the blocks below: their output has no graph.
  peft::models::EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{1, 2, 3}});
  inputs.output_hidden_states = true;
  const auto states = model->base_model->forward(inputs).hidden_states;
  CHECK_FALSE(states.at(1).requires_grad());
  CHECK(states.at(2).requires_grad());

  StackImpl stack(3);
  CHECK(peft::add_adapter(stack, peft::ReplaceOptions(), peft::top_layers(1)).sites() ==
        std::vector<std::string>{"body.h.2", "body.norm_out"});
  CHECK(peft::add_adapter(stack, peft::ReplaceOptions(), peft::top_layers(1, /*final_norm=*/false), "bare")
            .sites() == std::vector<std::string>{"body.h.2"});
  CHECK(peft::add_adapter(stack, peft::ReplaceOptions(), peft::top_layers(3, true, "h").exclude({"norm_out"}),
                          "all")
            .sites() == std::vector<std::string>{"body.h.0", "body.h.1", "body.h.2"});
  const auto add = [&](const peft::Target& target) {
    peft::add_adapter(stack, peft::ReplaceOptions(), target, "x");
  };
  CHECK_THROWS_WITH(add(peft::top_layers(4)),
                    Contains("k must be at most the 3 blocks of 'body.h', but got 4"));
  CHECK_THROWS_WITH(peft::top_layers(0), Contains("k must be at least 1, but got 0 (hint: linear probing"));
  CHECK_THROWS_WITH(peft::top_layers(-1), Contains("but got -1"));
  CHECK_THROWS_WITH(add(peft::top_layers(1, true, "layer")),
                    Contains("the model has no numbered blocks in 'layer'"));
}

TEST_CASE("The norm after the blocks is a top layer, that of what every block reads is none",
          "[top_layers]") {
  // DeBERTa's encoder holds the norm of its vectors of distances beside the list of its blocks.
  peft::models::DebertaV2Config config;
  config.vocab_size(11).hidden_size(width).num_hidden_layers(layers).num_attention_heads(2).intermediate_size(
      inner);
  config.max_position_embeddings(6).relative_attention(true).position_buckets(4).norm_rel_ebd("layer_norm");
  config.pos_att_type({"p2c", "c2p"});
  const peft::models::DebertaV2Model built(config);
  const auto cloned = std::dynamic_pointer_cast<peft::models::DebertaV2ModelImpl>(
      peft::models::DebertaV2Model(config)->clone());
  for (const auto& model : {built.ptr(), cloned}) {
    const auto adapter = peft::add_adapter(*model, peft::ReplaceOptions(), peft::top_layers(1));
    for (const auto& site : adapter.sites()) CHECK_THAT(site, Catch::StartsWith("encoder.layer.2."));
    CHECK(adapter.sites().size() == 10);  // six projections, two of the feed-forward, two norms
    peft::models::EncoderInputs inputs;
    inputs.input_ids = torch::tensor({{1, 2, 3}});
    inputs.output_hidden_states = true;
    const auto states = model->forward(inputs).hidden_states;
    CHECK_FALSE(states.at(2).requires_grad());
    CHECK(states.at(3).requires_grad());
    // By its name it can still be had.
    CHECK(peft::add_adapter(*model, peft::ReplaceOptions(), peft::named({"encoder.LayerNorm"}), "norm")
              .sites() == std::vector<std::string>{"encoder.LayerNorm"});
  }

  auto decoder_config = peft::models::GPT2Config().vocab_size(11).n_positions(6).n_embd(width).n_layer(2);
  peft::models::GPT2Model decoder(decoder_config.n_head(2));
  const auto of_decoder = peft::add_adapter(*decoder, peft::ReplaceOptions(), peft::top_layers(1)).sites();
  CHECK(of_decoder.size() == 7);
  CHECK(of_decoder.front() == "h.1.ln_1");
  CHECK(of_decoder.back() == "ln_f");

  nn::TransformerEncoder pre_norm(
      nn::TransformerEncoderOptions(nn::TransformerEncoderLayerOptions(4, 2).dim_feedforward(5), 2)
          .norm(nn::AnyModule(nn::LayerNorm(nn::LayerNormOptions({4})))));
  peft::Reparametrized closed(pre_norm);
  const auto of_closed = peft::add_adapter(*closed, peft::ReplaceOptions(), peft::top_layers(1)).sites();
  CHECK(of_closed.front().starts_with("layers.1."));
  CHECK(of_closed.back() == "norm");
}

TEST_CASE("A probed backbone can stay in evaluation mode while the head trains", "[probing]") {
  auto model = small_bert();
  const auto adapter = peft::add_adapter(*model, peft::ReplaceOptions(), peft::named({"classifier"}));
  CHECK(adapter.count() == classes * (width + 1));
  model->train();
  peft::train_only(*model, adapter);
  CHECK_FALSE(model->is_training());
  CHECK_FALSE(model->base_model->embeddings->dropout->is_training());
  CHECK(adapter.layers<peft::ReplaceImpl>().at(0)->is_training());
  peft::models::EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{1, 2, 3}});
  const auto logits = model->forward(inputs).logits;
  CHECK(torch::equal(model->forward(inputs).logits, logits));  // no dropout
  // Nor in the attention that a method is on.
  const auto prefix = peft::add_adapter(*model, peft::PrefixOptions(2), "prefix");
  peft::train_only(*model, prefix);
  const auto before = model->forward(inputs).logits;
  CHECK(torch::equal(model->forward(inputs).logits, before));
  CHECK_FALSE(torch::equal(before, logits));
  CHECK(logits.requires_grad());
}
