#include "peft/core/checkpointing.h"

#include <malloc.h>
#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

#include "catch.h"
#include "peft/core/adapted.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/lora.h"
#include "peft/methods/prefix.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"
#include "peft/models/bert.h"
#include "peft/models/gpt2.h"
#include "peft/train/autocast.h"

namespace nn = torch::nn;
using Catch::Matchers::Contains;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

/// A loss and the gradients it leaves.
struct Result {
  Tensor loss;
  Tensors gradients;
};

Result backward(const Tensors& parameters, const std::function<Tensor()>& forward) {
  torch::manual_seed(5);
  for (auto& parameter : parameters) parameter.mutable_grad() = Tensor();
  Result result{forward(), {}};
  result.loss.backward();
  for (const auto& parameter : parameters) result.gradients.push_back(parameter.grad());
  return result;
}

void check_equal(const Result& a, const Result& b) {
  CHECK(torch::equal(a.loss, b.loss));
  REQUIRE(a.gradients.size() == b.gradients.size());
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    INFO("tensor " << i);
    REQUIRE(a.gradients[i].defined() == b.gradients[i].defined());
    if (a.gradients[i].defined()) CHECK(torch::equal(a.gradients[i], b.gradients[i]));
  }
}

peft::models::BertForSequenceClassification tiny_bert(int64_t width = 8, int64_t layers = 3) {
  peft::models::BertForSequenceClassification model(peft::models::BertConfig()
                                                        .vocab_size(20)
                                                        .hidden_size(width)
                                                        .num_hidden_layers(layers)
                                                        .num_attention_heads(2)
                                                        .intermediate_size(2 * width)
                                                        .max_position_embeddings(64)
                                                        .num_labels(3));
  return model;
}

Tensor bert_loss(peft::models::BertForSequenceClassification& model, int64_t time = 6) {
  peft::models::EncoderInputs inputs;
  inputs.input_ids = torch::arange(2 * time).remainder(20).view({2, time});
  inputs.attention_mask = torch::ones({2, time}, torch::kLong);
  inputs.attention_mask[1][time - 1] = 0;
  inputs.labels = torch::tensor({0, 2});
  return model->forward(inputs).loss;
}

}  // namespace

TEST_CASE("A checkpoint gives the same outputs and gradients, drawing the same random numbers",
          "[checkpointing]") {
  torch::manual_seed(1);
  const auto W = torch::randn({6, 6}).requires_grad_(), V = torch::randn({6, 6}).requires_grad_();
  const auto x = torch::randn({4, 6}).requires_grad_();
  const auto block = [&](const Tensor& h) {
    return torch::dropout(torch::tanh(h.mm(W)).mm(V), 0.3, true) + h;
  };

  SECTION("one after the other, and in each other") {
    const auto plain = backward({W, V, x}, [&] { return block(block(block(x))).pow(2).sum(); });
    check_equal(
        plain, backward({W, V, x}, [&] {
          return peft::checkpoint(block, peft::checkpoint(block, peft::checkpoint(block, x))).pow(2).sum();
        }));
    const auto two = [&](const Tensor& h) { return peft::checkpoint(block, peft::checkpoint(block, h)); };
    check_equal(plain, backward({W, V, x}, [&] {
                  return peft::checkpoint(two, peft::checkpoint(block, x)).pow(2).sum();
                }));
  }
  SECTION("where no input needs a gradient") {
    const auto fixed = x.detach();
    check_equal(backward({W, V}, [&] { return block(fixed).sum(); }),
                backward({W, V}, [&] { return peft::checkpoint(block, fixed).sum(); }));
    CHECK_FALSE(peft::checkpoint([](const Tensor& h) { return h * 2; }, fixed).requires_grad());
  }
  SECTION("with several outputs, one of which nobody uses, and an input that is not there") {
    const auto split = [&](const Tensor& h, const Tensor& bias) -> Tensors {
      CHECK_FALSE(bias.defined());
      return {block(h), h.mm(V), torch::ones({2})};
    };
    const auto loss = [](const Tensors& outputs) { return outputs.at(0).sum() * outputs.at(2).sum(); };
    check_equal(backward({W, V, x}, [&] { return loss(split(x, Tensor())); }),
                backward({W, V, x}, [&] { return loss(peft::checkpoint(split, x, Tensor())); }));
  }
  SECTION("through autograd::grad, which leaves nothing behind") {
    for (auto& tensor : {W, V, x}) tensor.mutable_grad() = Tensor();
    const auto loss = peft::checkpoint(block, x).sum();
    const auto found = torch::autograd::grad({loss}, {V});
    CHECK(found.front().sizes() == V.sizes());
    CHECK_FALSE(V.grad().defined());
    CHECK_FALSE(W.grad().defined());
  }
  SECTION("twice, where the graph is retained; and the generator goes on as if nothing had been run again") {
    torch::manual_seed(5);
    const auto loss = peft::checkpoint(block, x).sum();
    const auto next = torch::rand({3});
    torch::manual_seed(5);
    block(x);
    CHECK(torch::equal(next, torch::rand({3})));
    torch::manual_seed(9);
    loss.backward({}, /*retain_graph=*/true);
    const auto once = W.grad().clone();
    loss.backward();
    CHECK(torch::equal(W.grad(), once + once));
    const auto after = torch::rand({3});
    torch::manual_seed(9);
    CHECK(torch::equal(after, torch::rand({3})));
    CHECK_THROWS_WITH(loss.backward(), Contains("second time"));
  }
}

TEST_CASE("A checkpoint refuses what it cannot repeat", "[checkpointing]") {
  torch::manual_seed(1);
  auto W = torch::randn({6, 6}).requires_grad_();
  const auto x = torch::randn({4, 6}).requires_grad_();
  const auto block = [&](const Tensor& h) { return h.mm(W); };

  CHECK_THROWS_WITH(torch::autograd::grad({peft::checkpoint(block, x).sum()}, {x}, {}, true, true),
                    Contains("gradients of gradients"));
  const auto outside = x * 2;
  CHECK_THROWS_WITH(peft::checkpoint([&](const Tensor& h) { return h + outside; }, x),
                    Contains("calculated outside") && Contains("MulBackward"));
  {
    const auto loss = peft::checkpoint(block, x).sum();
    const torch::NoGradGuard no_grad;
    W.add_(1);
    CHECK_THROWS_WITH(loss.backward(), Contains("was changed between forward and backward"));
  }
  {
    bool drops = true;
    const auto loss =
        peft::checkpoint([&](const Tensor& h) { return torch::dropout(h.mm(W), 0.5, drops); }, x).sum();
    drops = false;
    CHECK_THROWS_WITH(loss.backward(), Contains("drew other random numbers"));
  }
  {
    const auto loss = peft::checkpoint(block, x).sum();
    W.requires_grad_(false);
    CHECK_THROWS_WITH(loss.backward(), Contains("other trainable tensors"));
    W.requires_grad_(true);
  }
  const torch::NoGradGuard no_grad;
  CHECK_FALSE(peft::checkpoint(block, x).requires_grad());
}

TEST_CASE("A BERT with checkpoints trains every method as without, dropout included", "[checkpointing]") {
  torch::manual_seed(3);
  auto model = tiny_bert();
  const auto everything = [] {
    return std::vector<peft::Part>{peft::on(peft::PrefixOptions(3).projection(true), peft::all()),
                                   peft::on(peft::houlsby().reduction_factor(2)),
                                   peft::on(peft::LoraOptions(2).dropout(0.2).init(peft::LoraInit::random),
                                            peft::named({"query", "value", "dense"}))};
  };
  const auto parts = everything();
  const auto which = GENERATE(0, 1, 2);
  INFO("part " << which);
  const auto adapter = peft::add_adapter(*model, {parts[static_cast<size_t>(which)]}, "a");
  model->train();
  const auto loss = [&] { return bert_loss(model); };
  const auto plain = backward(adapter.parameters(), loss);
  model->gradient_checkpointing(true);
  check_equal(plain, backward(adapter.parameters(), loss));
  const auto copy = peft::clone(*model);
  CHECK(copy->base_model->encoder->gradient_checkpointing);

  model->eval();
  const auto quiet = bert_loss(model);
  model->gradient_checkpointing(false);
  CHECK(torch::equal(quiet, bert_loss(model)));
}

TEST_CASE("A GPT-2 with checkpoints trains as without, and takes no cache in training", "[checkpointing]") {
  torch::manual_seed(3);
  peft::models::GPT2LMHeadModel model(
      peft::models::GPT2Config().vocab_size(20).n_positions(16).n_embd(8).n_layer(3).n_head(2));
  const auto adapter =
      peft::add_adapter(*model, peft::LoraOptions(2).dropout(0.1).init(peft::LoraInit::random),
                        peft::named({"c_attn", "c_proj"}));
  model->train();
  peft::models::GPT2Inputs inputs;
  inputs.input_ids = inputs.labels = torch::arange(12).view({2, 6});
  const auto loss = [&] { return model->forward(inputs).loss; };
  const auto plain = backward(adapter.parameters(), loss);
  model->gradient_checkpointing(true);
  check_equal(plain, backward(adapter.parameters(), loss));
  inputs.use_cache = true;
  CHECK_THROWS_WITH(model->forward(inputs), Contains("without a cache"));
  const torch::NoGradGuard no_grad;
  CHECK(model->forward(inputs).cache.layers.size() == 3);
}

TEST_CASE("Backward sees the adapters of its forward", "[checkpointing]") {
  torch::manual_seed(3);
  auto model = tiny_bert();
  const auto options = peft::LoraOptions(2).dropout(0.1).init(peft::LoraInit::random);
  const auto first = peft::add_adapter(*model, options, peft::named({"query"}), "first");
  peft::add_adapter(*model, options, peft::named({"query"}), "second");
  peft::set_active(*model, {"first"});
  model->train();
  const auto plain = backward(first.parameters(), [&] { return bert_loss(model); });
  model->gradient_checkpointing(true);
  check_equal(plain, backward(first.parameters(), [&] {
                const auto loss = bert_loss(model);
                peft::set_active(*model, {"second"});
                return loss;
              }));
  peft::set_active(*model, {"first"});
  const auto loss = bert_loss(model);
  peft::merge(*model);
  CHECK_THROWS_WITH(loss.backward(), Contains("other trainable tensors"));
  peft::unmerge(*model);
}

TEST_CASE("Backward runs under the autocast of its forward", "[checkpointing]") {
  torch::manual_seed(3);
  const auto W = torch::randn({6, 6}).requires_grad_(), x = torch::randn({4, 6}).requires_grad_();
  const auto block = [&](const Tensor& h) { return torch::dropout(torch::tanh(h.mm(W)), 0.2, true).mm(W); };
  const auto loss = [&](bool checkpoints) {
    const peft::Autocast autocast(torch::kCPU, torch::kBFloat16);
    const auto y = checkpoints ? peft::checkpoint(block, x) : block(x);
    CHECK(y.scalar_type() == torch::kBFloat16);
    return y.to(torch::kFloat32).sum();
  };
  // One cast of W for both products: without checkpoints autocast adds their gradients before it widens them.
  at::autocast::set_autocast_cache_enabled(false);
  const auto plain = backward({W, x}, [&] { return loss(false); });
  at::autocast::set_autocast_cache_enabled(true);
  check_equal(plain, backward({W, x}, [&] { return loss(true); }));
}

#if !defined(__SANITIZE_ADDRESS__)  // which has an allocator of its own
static size_t bytes_in_use() {
  const auto info = mallinfo2();
  return info.uordblks + info.hblkhd;
}

TEST_CASE("Between forward and backward checkpoints keep a block's input and little else",
          "[checkpointing]") {
  torch::manual_seed(3);
  auto model = tiny_bert(/*width=*/64, /*layers=*/8);
  peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query", "value", "dense"}));
  model->train();
  const auto kept = [&](bool checkpoints) {
    model->gradient_checkpointing(checkpoints);
    bert_loss(model, 64).backward();
    const auto before = bytes_in_use();
    const auto loss = bert_loss(model, 64);
    return bytes_in_use() - before;
  };
  const auto without = kept(false), with = kept(true);
  INFO(without << " bytes without, " << with << " with");
  CHECK(4 * with < without);
}
#endif
