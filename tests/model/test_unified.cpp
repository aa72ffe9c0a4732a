#include "peft/model/unified.h"

#include "models/tiny_bert.h"
#include "property_suite.h"

using namespace suite;
using peft::AttentionOptions;
using peft::Composed;
using peft::Insertion;
using peft::Modifies;
using peft::Unified;
using peft_test::EncoderInputs;

namespace {

/// A small BERT in double precision.
peft::models::BertModel model() {
  peft::models::BertModel bert(peft_test::tiny());
  peft_test::fill(*bert);
  bert->to(torch::kFloat64);
  bert->eval();
  return bert;
}

/// Two texts, the second shorter.
Tensor run(peft::models::BertModel& bert) {
  const auto ids = torch::tensor({{3, 1, 4, 1, 5}, {9, 2, 6, 0, 0}});
  const auto mask = torch::tensor({{1, 1, 1, 1, 1}, {1, 1, 1, 0, 0}});
  EncoderInputs inputs;
  inputs.input_ids = ids;
  inputs.attention_mask = mask;
  return bert->forward(inputs).last_hidden_state;
}

Tensor normal(std::vector<int64_t> shape) { return torch::randn(shape, torch::kFloat64); }

/// Sets every tensor of an adapter from one seed, in order.
void randomize(const peft::Adapter& adapter) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(11);
  for (auto& [name, tensor] : adapter.named_parameters()) tensor.normal_(0, 0.3);
}

/// One adapter described, one made by the method's own options: the same tensors, then the same outputs and
/// the same gradients.
void check_equal(const std::vector<peft::Part>& described, const std::vector<peft::Part>& direct) {
  std::vector<Tensor> outputs;
  std::vector<std::vector<Tensor>> gradients;
  for (const auto* parts : {&described, &direct}) {
    auto bert = model();
    torch::manual_seed(5);
    const auto adapter = peft::add_adapter(*bert, *parts, "one");
    std::vector<Tensor> found{run(bert)};
    randomize(adapter);
    found.push_back(run(bert));
    found.back().square().sum().backward();
    outputs.push_back(torch::cat(found).detach());
    gradients.emplace_back();
    for (const auto& [name, tensor] : adapter.named_parameters()) gradients.back().push_back(tensor.grad());
  }
  CHECK(largest(outputs[0], outputs[1]) < 1e-12);
  REQUIRE(gradients[0].size() == gradients[1].size());
  for (size_t i = 0; i < gradients[0].size(); ++i) CHECK(largest(gradients[0][i], gradients[1][i]) < 1e-10);
}

Tensor swish(const Tensor& x) { return x * torch::sigmoid(x); }

}  // namespace

TEST_CASE("Each method's place in the unified view is the method itself", "[unified]") {
  namespace unified = peft::unified;
  const auto same = [](const Unified& described, const peft::Part& direct) {
    check_equal({peft::on(described)}, {direct});
  };
  // The tiny model is 8 wide.
  same(unified::houlsby(4), peft::on(peft::houlsby().reduction_factor(2)));
  same(unified::pfeiffer(4), peft::on(peft::pfeiffer().reduction_factor(2)));
  same(unified::parallel_adapter(4), peft::on(peft::parallel_adapter()));
  same(unified::scaled_parallel_adapter(4), peft::on(peft::scaled_parallel_adapter()));
  same(unified::compacter(4), peft::on(peft::compacter().reduction_factor(2)));
  same(unified::prefix(3), peft::on(peft::PrefixOptions(3)));
  same(unified::multi_head_parallel_adapter(3), peft::on(peft::HeadAdapterOptions(3)));
  same(unified::lora(2, 6, {"query", "value"}),
       peft::on(peft::LoraOptions(2).alpha(6), peft::named({"query", "value"})));
}

TEST_CASE("A description of a join computes what it says", "[unified]") {
  torch::manual_seed(21);
  const auto output = normal({2, 3, 6}), skip = normal({2, 3, 6});
  const auto insertion = GENERATE(Insertion::sequential, Insertion::sequential_normed, Insertion::parallel);
  const auto composition =
      GENERATE(Composed::scaled, Composed::trained, Composed::trained_channel, Composed::gated);
  CAPTURE(static_cast<int>(insertion), static_cast<int>(composition));
  for (const bool has_norm : {true, false}) {
    peft::Residual with(nn::LayerNormOptions({6}), peft::JoinPlace{peft::JoinRole::feed_forward, 0});
    peft::BareResidual without(
        peft::ResidualOptions(6).place(peft::JoinPlace{peft::JoinRole::feed_forward, 0}));
    with->to(torch::kFloat64);
    auto& site = has_norm ? static_cast<nn::Module&>(*with) : static_cast<nn::Module&>(*without);
    auto described = Unified(4).form("swish").insertion(insertion).composition(composition);
    if (composition == Composed::scaled) described.scale(2.5);
    const auto adapter = peft::add_adapter(site, described);
    for (auto& parameter : site.parameters()) parameter.set_data(parameter.to(torch::kFloat64));
    randomize(adapter);
    const auto& piece = dynamic_cast<peft::BottleneckImpl&>(*adapter.entries().front().piece);
    const auto tensors = piece.named_parameters();
    const auto norm = [&](const Tensor& x) { return has_norm ? torch::layer_norm(x, {6}) : x; };

    // The four dimensions, written out: x, Δh = f(x W_down) W_up, h + s Δh, the model's own join.
    const auto x = insertion == Insertion::parallel     ? skip
                   : insertion == Insertion::sequential ? output
                                                        : norm(output + skip);
    const auto change = torch::matmul(swish(torch::matmul(x, tensors["adapter_down.weight"].t()) +
                                            tensors["adapter_down.bias"]),
                                      tensors["adapter_up.weight"].t()) +
                        tensors["adapter_up.bias"];
    auto s = torch::full({1}, 2.5, torch::kFloat64);
    if (composition == Composed::trained || composition == Composed::trained_channel) s = tensors["scaling"];
    if (composition == Composed::gated) {
      s = torch::sigmoid(torch::matmul(x, tensors["gate.weight"].t()) + tensors["gate.bias"]).mean(1, true);
    }
    const auto expected = norm(output + s * change + skip);
    const auto y = has_norm ? with->forward(output, skip) : without->forward(output, skip);
    CHECK(largest(y, expected) < 1e-12);
  }
}

TEST_CASE("A prefix is a softmax adapter of every head", "[unified]") {
  torch::manual_seed(22);
  const int64_t heads = 4, width = 5, length = 3, queries = 4;
  const auto kv_heads = GENERATE(int64_t{4}, int64_t{2});
  const auto causal = GENERATE(false, true);
  const auto masked = GENERATE(false, true);
  const auto cached = GENERATE(int64_t{0}, int64_t{2});
  CAPTURE(kv_heads, causal, masked, cached);
  const auto options = AttentionOptions(heads, width).kv_heads(kv_heads).causal(causal);
  auto q = normal({2, heads, queries, width}), k = normal({2, kv_heads, queries + cached, width}),
       v = normal({2, kv_heads, queries + cached, width});
  Tensor bias;
  if (masked) {
    bias = torch::zeros({2, 1, 1, queries + cached}, torch::kFloat64);
    bias.index_put_({1, 0, 0, queries + cached - 1}, -1e4);
  }
  peft::Attention direct(options), written(options);
  const auto prefix = peft::add_adapter(*direct, peft::PrefixOptions(length), peft::all());
  const auto adapter =
      peft::add_adapter(*written, peft::HeadAdapterOptions(length).form("softmax").convex(true), peft::all());
  const auto& table = dynamic_cast<peft::PrefixImpl&>(*prefix.entries().front().piece).table();
  auto& piece = dynamic_cast<peft::HeadAdapterImpl&>(*adapter.entries().front().piece);
  {
    torch::NoGradGuard no_grad;
    table.embedding.set_data(normal(table.embedding.sizes().vec()));
    const auto both = table.embedding.view({length, 2, kv_heads, width}).permute({1, 2, 0, 3});
    const auto each = [&](const Tensor& t) { return t.repeat_interleave(heads / kv_heads, 0).clone(); };
    piece.down.set_data(each(both[0]));
    piece.up.set_data(each(both[1]));
  }
  CHECK(largest(written->forward(q, k, v, bias), direct->forward(q, k, v, bias)) < 1e-12);
  CHECK(largest(written->forward(q, k, v, bias), [&] {
          const auto off = peft::disabled(*written);
          return written->forward(q, k, v, bias);
        }()) > 1e-2);
}

TEST_CASE("A description of heads computes what it says", "[unified]") {
  torch::manual_seed(23);
  const int64_t heads = 2, width = 4;
  const auto q = normal({2, heads, 3, width}), k = normal({2, heads, 3, width}),
             v = normal({2, heads, 3, width});
  const auto insertion = GENERATE(Insertion::sequential, Insertion::parallel);
  const auto trained = GENERATE(false, true);
  peft::Attention plain(AttentionOptions(heads, width)), site(AttentionOptions(heads, width));
  auto described = Unified(3).form("relu").modifies(Modifies::heads).insertion(insertion);
  described = trained ? described.composition(Composed::trained) : described.scale(0.5);
  const auto adapter = peft::add_adapter(*site, described);
  const auto before = plain->forward(q, k, v, {});
  auto& piece = dynamic_cast<peft::HeadAdapterImpl&>(*adapter.entries().front().piece);
  piece.to(torch::kFloat64);
  CHECK(torch::equal(site->forward(q, k, v, {}), before));
  randomize(adapter);
  const auto h = before.view({2, 3, heads, width}).transpose(1, 2);
  const auto x = insertion == Insertion::parallel ? q : h;
  std::vector<Tensor> changed;
  for (int64_t i = 0; i < heads; ++i) {
    const auto change =
        torch::matmul(torch::relu(torch::matmul(x.select(1, i), piece.down[i].t())), piece.up[i]);
    changed.push_back(h.select(1, i) +
                      change * (trained ? piece.scale : torch::full({1}, 0.5, torch::kFloat64)));
  }
  const auto expected = torch::stack(changed, 1).transpose(1, 2).reshape({2, 3, heads * width});
  CHECK(largest(site->forward(q, k, v, {}), expected) < 1e-12);
}

TEST_CASE("LoRA is a linear bottleneck beside a layer", "[unified]") {
  torch::manual_seed(24);
  const auto x = normal({2, 3, 6});
  const auto make = [&](const std::vector<peft::Part>& parts) {
    torch::manual_seed(25);
    peft::Linear site(6, 6);
    site->to(torch::kFloat64);
    return std::pair(site, peft::add_adapter(*site, parts));
  };
  const auto bottleneck = peft::BottleneckOptions(2).non_linearity("linear").parallel(true).scaling(1.5);
  auto [lora, lora_adapter] = make({peft::on(peft::LoraOptions(2).alpha(3), peft::all())});
  auto [beside, beside_adapter] = make({peft::on(bottleneck, peft::all())});
  auto& first = dynamic_cast<peft::LoraImpl&>(*lora_adapter.entries().front().piece);
  auto second = beside_adapter.entries().front().piece->named_parameters();
  randomize(lora_adapter);
  torch::NoGradGuard no_grad;
  second["adapter_down.weight"].copy_(first.lora_A);
  second["adapter_up.weight"].copy_(first.lora_B);
  second["adapter_down.bias"].zero_();
  second["adapter_up.bias"].zero_();
  CHECK(largest(lora->forward(x), beside->forward(x)) < 1e-12);
}

TEST_CASE("Methods that nobody named are one expression and train", "[unified]") {
  const auto labels = torch::tensor({0.5, -1.0}, torch::kFloat64);
  const auto train = [&](const std::vector<peft::Part>& parts, double rate) {
    auto bert = model();
    const auto plain = run(bert);
    torch::manual_seed(31);
    const auto adapter = peft::add_adapter(*bert, parts, "mine");
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(rate));
    const auto loss = [&] { return (run(bert).select(1, 0).select(1, 0) - labels).square().mean(); };
    const auto first = loss().item<double>();
    for (int step = 0; step < 60; ++step) {
      optimizer.zero_grad();
      loss().backward();
      optimizer.step();
    }
    CHECK(loss().item<double>() < 0.2 * first);
    const auto off = peft::disabled(*bert);
    CHECK(torch::equal(run(bert), plain));
  };
  // Every head and every sublayer, gated and scaled by channel.
  train(peft::parts({Unified(2).form("tanh").modifies(Modifies::heads).composition(Composed::trained),
                     Unified(4).form("gelu").modifies(Modifies::sublayers).composition(Composed::gated)}),
        2e-2);
  // A LoRA that is not linear, beside query and value.
  train({peft::on(Unified(2).form("gelu").modifies(Modifies::layers).layers({"query", "value"}))}, 5e-2);
  train(peft::mam(3, 4), 2e-2);
  train(peft::unipelt(3, 2), 5e-2);
}

TEST_CASE("MAM and UniPELT have the parts and the parameters of the papers", "[unified]") {
  auto bert = model();
  const int64_t layers = 2, d = 8;
  const int64_t prefix = 30 * d + (d * 800 + 800) + (800 * layers * 2 * d + layers * 2 * d);
  CHECK(peft::add_adapter(*bert, peft::mam(), "mam").count() ==
        prefix + layers * (2 * d * (d / 2) + d / 2 + d));
  const int64_t gated_prefix = 10 * d + (d * 512 + 512) + (512 * layers * 2 * d + layers * 2 * d);
  const int64_t gate = d + 1, m = 1;  // 8 // 16, at least 1
  CHECK(peft::add_adapter(*bert, peft::unipelt(), "unipelt").count() ==
        gated_prefix + layers * (gate + (2 * d * m + m + d) + gate + 2 * (8 * 2 * d + gate)));
  CHECK_THROWS_WITH(peft::merge(*bert), Contains("cannot be merged"));
}

TEST_CASE("Descriptions without a meaning are refused", "[unified]") {
  const auto says = [](const Unified& unified, const std::string& text) {
    CHECK_THROWS_WITH(peft::on(unified), Contains(text));
  };
  says(Unified(0), "size must be positive, but got 0");
  says(Unified(4).form("softmax"), "form softmax is for Modifies::heads");
  says(Unified(4).form("swash"), "no activation 'swash'");
  says(Unified(4).modifies(Modifies::layers), "layers must be named");
  says(Unified(4).layers({"query"}), "layers must be named");
  says(Unified(4).modifies(Modifies::heads).insertion(Insertion::sequential_normed), "needs a join");
  says(Unified(4).composition(Composed::convex), "Composed::convex needs");
  says(Unified(4).modifies(Modifies::heads).composition(Composed::gated), "takes Composed::scaled");
  says(Unified(4).composition(Composed::trained).scale(2), "scale is for Composed::scaled");
  says(Unified(4).modifies(Modifies::layers).layers({"query"}).phm(peft::PhmOptions()), "phm is for");
  peft::Linear linear(4, 4);
  CHECK_THROWS_WITH(peft::add_adapter(*linear, Unified(2)), Contains("matches no site"));
}

TEST_CASE("A gate on LoRA is the mean over the tokens, and cannot be merged", "[unified]") {
  torch::manual_seed(26);
  peft::Linear site(6, 4);
  site->to(torch::kFloat64);
  const auto adapter = peft::add_adapter(*site, peft::LoraOptions(2).alpha(3).gating(true), peft::all());
  const auto x = normal({2, 3, 6});
  const auto plain = torch::linear(x, site->base->weight, site->base->bias);
  CHECK(torch::equal(site->forward(x), plain));
  CHECK(adapter.count() == 2 * (6 + 4) + 6 + 1);
  randomize(adapter);
  auto& lora = dynamic_cast<peft::LoraImpl&>(*adapter.entries().front().piece);
  const auto gate = torch::sigmoid(torch::linear(x, lora.gate_weight, lora.gate_bias)).mean(1, true);
  const auto expected = plain + torch::linear(torch::linear(x, lora.lora_A), lora.lora_B) * gate;
  CHECK(largest(site->forward(x), expected) < 1e-12);
  CHECK_THROWS_WITH(peft::merge(*site), Contains("the gate depends on the input"));
  CHECK_THROWS_WITH(site->forward(x[0]), Contains("a gate needs inputs (batch, time, in)"));
  peft::Embedding words(5, 4);
  CHECK_THROWS_WITH(peft::add_adapter(*words, peft::LoraOptions(2).gating(true), peft::named({""})),
                    Contains("takes no gating") || Contains("no module matches"));
}
