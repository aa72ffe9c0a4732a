#include <peft/peft.h>
#include <torch/torch.h>

#include <set>
#include <string>
#include <vector>

#include "catch.h"

namespace {

namespace nn = torch::nn;

struct NetImpl : nn::Module {
  peft::Embedding emb{register_module("emb", peft::Embedding(10, 8))};
  peft::Linear q{register_module("q", peft::Linear(8, 8))};
  peft::Conv1d conv{register_module("conv", peft::Conv1d(8, 8, 3))};
  peft::LayerNorm norm{register_module("norm", peft::LayerNorm(nn::LayerNormOptions({8})))};
  peft::Linear head{register_module("head", peft::Linear(8, 2))};
};
TORCH_MODULE(Net);

template <class Options>
peft::Adapter adapted(Net& net, const Options& options) {
  return peft::add_adapter(*net, {peft::on(options, peft::named({"emb", "q", "conv"})),
                                  peft::on(peft::BiasOptions(), peft::named({"q", "conv"})),
                                  peft::on(peft::ReplaceOptions(), peft::named({"head", "norm"}))});
}

/// The names in one group of the optimizer, and that its rate and decay are these.
std::set<std::string> group(const peft::Adapter& adapter, const std::vector<peft::ParameterGroup>& groups,
                            size_t index, double rate, double decay) {
  CHECK(groups.at(index).options.lr() == Approx(rate));
  CHECK(groups.at(index).options.weight_decay() == Approx(decay).margin(0));
  std::set<std::string> names;
  for (const auto& [name, tensor] : adapter.named_parameters()) {
    if (groups[index].matches(name)) names.insert(name);
  }
  return names;
}

using Names = std::set<std::string>;

}  // namespace

// Reference: Hugging Face PEFT, tests/reference/lora_plus_values.py.
TEST_CASE("LoRA+ groups parameters as Hugging Face's optimizer", "[lora_plus]") {
  Net net;
  const auto options = torch::optim::AdamWOptions(1e-3).weight_decay(0.05).betas({0.8, 0.99});
  const Names undecayed{"q.bias.bias", "conv.bias.bias", "norm.replace.weight", "norm.replace.bias",
                        "head.replace.bias"};
  SECTION("LoRA") {
    const auto adapter = adapted(net, peft::LoraOptions(2));
    const auto groups = peft::lora_plus(adapter, options, 16);
    REQUIRE(groups.size() == 4);
    CHECK(group(adapter, groups, 0, 1e-3, 0.05) ==
          Names{"q.lora.lora_A", "conv.lora.lora_A", "head.replace.weight"});
    CHECK(group(adapter, groups, 1, 1e-6, 0.05) == Names{"emb.lora.lora_A", "emb.lora.lora_B"});
    CHECK(group(adapter, groups, 2, 0.016, 0.05) == Names{"q.lora.lora_B", "conv.lora.lora_B"});
    CHECK(group(adapter, groups, 3, 0.016, 0) == undecayed);
    const peft::AdamW optimizer(adapter, groups);
    CHECK(optimizer.param_groups().size() == 4);
    for (const auto& item : optimizer.param_groups()) {
      CHECK(std::get<0>(static_cast<const torch::optim::AdamWOptions&>(item.options()).betas()) == 0.8);
    }
  }
  SECTION("DoRA: the magnitudes of one dimension are fast") {
    const auto adapter = adapted(net, peft::DoraOptions(2));
    const auto groups = peft::lora_plus(adapter, options, 16, 1e-5);
    REQUIRE(groups.size() == 4);
    CHECK(group(adapter, groups, 0, 1e-3, 0.05) == Names{"q.dora.lora.lora_A", "conv.dora.lora.lora_A",
                                                         "conv.dora.lora_magnitude_vector",
                                                         "head.replace.weight"});
    CHECK(group(adapter, groups, 1, 1e-5, 0.05) == Names{"emb.dora.lora.lora_A", "emb.dora.lora.lora_B"});
    CHECK(group(adapter, groups, 2, 0.016, 0.05) == Names{"q.dora.lora.lora_B", "conv.dora.lora.lora_B",
                                                          "q.dora.lora_magnitude_vector",
                                                          "emb.dora.lora_magnitude_vector"});
    CHECK(group(adapter, groups, 3, 0.016, 0) == undecayed);
  }
}

TEST_CASE("LoRA+ has a group for what pieces share", "[lora_plus]") {
  torch::manual_seed(1);
  peft::models::BertModel model(
      peft::models::BertConfig().vocab_size(9).hidden_size(8).num_hidden_layers(1).num_attention_heads(2));
  const auto adapter =
      peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({"query"})),
                                 peft::on(peft::PrefixOptions(3).projection(true).hidden_width(4))});
  const auto groups = peft::lora_plus(adapter, torch::optim::AdamWOptions(1e-3).weight_decay(0.05), 16);
  REQUIRE(groups.size() == 3);
  size_t placed = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    for (const auto& [name, tensor] : adapter.named_parameters()) {
      if (!groups[i].matches(name)) continue;
      ++placed;
      const bool shared = name.find("shared.") != std::string::npos;
      if (shared) CHECK(i == (tensor.dim() == 1 ? 2 : 0));
    }
  }
  CHECK(placed == adapter.named_parameters().size());
  CHECK(group(adapter, groups, 2, 0.016, 0).size() > 0);
}

TEST_CASE("LoRA+ trains B faster, and names what is out of range", "[lora_plus]") {
  torch::manual_seed(1);
  Net net;
  const auto adapter = peft::add_adapter(*net, peft::LoraOptions(2).lora_bias(true), peft::named({"q"}));
  const auto options = torch::optim::AdamWOptions(1e-3).weight_decay(0);
  peft::AdamW optimizer(adapter, peft::lora_plus(adapter, options, 16));
  const auto piece = adapter.layers<peft::LoraImpl>().at(0);
  const auto A = piece->lora_A.detach().clone();
  net->q->forward(torch::randn({4, 8})).sum().backward();
  piece->lora_A.mutable_grad().fill_(1);
  optimizer.step();
  // The first step of AdamW moves by the rate.
  CHECK((piece->lora_A - A).abs().max().item<double>() == Approx(1e-3).epsilon(1e-3));
  CHECK(piece->lora_B.abs().max().item<double>() == Approx(16e-3).epsilon(1e-3));
  CHECK_THROWS_WITH(peft::lora_plus(adapter, options, 0.5),
                    Contains("ratio must be at least 1, but got 0.5"));
  CHECK_THROWS_WITH(peft::lora_plus(adapter, options, 2, -1), Contains("embedding_rate must be at least 0"));
}
