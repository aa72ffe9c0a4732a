#include <ATen/record_function.h>

#include <cmath>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "methods/reference_case.h"
#include "methods/reference_values.h"
#include "models/tiny_bert.h"
#include "peft/methods/prefix.h"
#include "peft/models/generate.h"
#include "peft/models/gpt2.h"

using namespace suite;
using peft::AttentionOptions;
using peft::AttentionRole;
using peft::PrefixInit;
using peft::PrefixOptions;
using peft::models::BertForSequenceClassification;
using peft::models::GPT2Config;
using peft::models::GPT2LMHeadModel;

namespace {

/// The formula of tests/reference/prefix_values.py.
template <class Model>
Model filled(Model model) {
  const torch::NoGradGuard no_grad;
  double k = 0;
  for (auto& item : model->named_parameters()) {
    const auto& key = item.key();
    if (key == "lm_head.weight") continue;  // the word vectors again
    auto values = 0.15 * (0.7 * torch::arange(item.value().numel(), torch::kFloat64) + k++).sin();
    for (const std::string norm : {"LayerNorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"}) {
      if (key.ends_with(norm)) values += 1;
    }
    item.value().copy_(values.reshape(item.value().sizes()));
  }
  model->eval();
  return model;
}

BertForSequenceClassification bert() {
  return filled(BertForSequenceClassification(peft_test::tiny().dropout(0)));
}
GPT2LMHeadModel gpt2() {
  return filled(GPT2LMHeadModel(GPT2Config()
                                    .vocab_size(20)
                                    .n_positions(24)
                                    .n_embd(8)
                                    .n_layer(2)
                                    .n_head(2)
                                    .n_inner(12)
                                    .bos_token_id({})
                                    .eos_token_id({})
                                    .dropout(0)));
}

Tensor ids() { return torch::tensor({{5, 3, 19, 7, 2}}); }
Tensor logits(GPT2LMHeadModel& model, const Tensor& text) {
  peft::models::GPT2Inputs inputs;
  inputs.input_ids = text;
  return model->forward(inputs).logits.detach();
}

/// An attention alone: q, k, v and hidden states made of one input.
LayerCase attention(std::string name, const AttentionOptions& options, bool masked) {
  torch::manual_seed(9);
  const auto width = options.heads() * options.head_width();
  return {std::move(name),
          [options] {
            peft::Attention site(options);
            site->set_surroundings(torch::kFloat64, torch::kCPU);
            return site.ptr();
          },
          [options, masked](nn::Module& module, const Tensor& x) {
            const auto heads = [&](int64_t count, double shift) {
              const auto y = torch::tanh(x + shift).narrow(2, 0, count * options.head_width());
              return y.view({y.size(0), y.size(1), count, -1}).transpose(1, 2);
            };
            Tensor bias;
            if (masked) {
              bias = torch::zeros({x.size(0), 1, 1, x.size(1)}, x.options());
              bias.select(3, x.size(1) - 1).fill_(-1e9);
            }
            return module.as<peft::AttentionImpl>()->forward(
                heads(options.heads(), 0), heads(options.kv_heads(), 0.3), heads(options.kv_heads(), -0.5),
                bias, nullptr, x);
          },
          torch::randn({2, 4, width}, torch::kFloat64)};
}

int64_t count(const PrefixOptions& options, const AttentionOptions& shape) {
  const auto keys = shape.kv_heads() * shape.head_width(), n = 2 * keys, V = options.length();
  const auto gates = options.gates() * (shape.heads() * shape.head_width() + 1);
  if (!options.projection()) return V * n + gates;
  const auto h = options.hidden_width() > 0 ? options.hidden_width() : keys;
  const auto d = options.vector_width() > 0 ? options.vector_width() : keys;
  return V * d + (d * h + h) + (h * n + n) + gates;
}

Promise prefix(const PrefixOptions& options) {
  return {{peft::on(options)},
          [options](const peft::SiteInfo& site) { return count(options, *site.attention); },
          /*no_op_at_start=*/false,
          /*whole_gradient=*/true,
          suite::never};
}

/// Names of the operators that a call runs.
std::set<std::string> operators_of(const std::function<void()>& call) {
  static std::set<std::string> names;
  names.clear();
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& run) -> std::unique_ptr<at::ObserverContext> {
        names.insert(run.name());
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  call();
  at::removeCallback(handle);
  return names;
}

double same(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

}  // namespace

TEST_CASE("A prefix keeps the promises of a method on attentions", "[prefix]") {
  for (const auto& options :
       {PrefixOptions(3), PrefixOptions(1).projection(true),
        PrefixOptions(2).projection(true).vector_width(5), PrefixOptions(2).gates(2).activation("gelu"),
        PrefixOptions::adapterhub(3).hidden_width(4).gates(1), PrefixOptions::p_tuning_v2(2).dropout(0)}) {
    for (const bool masked : {false, true}) {
      const AttentionOptions shape(4, 3);
      check_properties(attention("encoder", shape, masked), prefix(options));
      auto grouped = AttentionOptions(4, 3).kv_heads(2);
      check_properties(attention("grouped", grouped, masked), prefix(options));
      check_properties(attention("causal", grouped.role(AttentionRole::decoder).causal(true), masked),
                       prefix(options));
    }
  }
}

TEST_CASE("A prefix is what softmax over longer keys says", "[prefix]") {
  torch::manual_seed(2);
  const auto q = torch::randn({2, 4, 5, 3}, torch::kFloat64), k = torch::randn({2, 2, 5, 3}, torch::kFloat64),
             v = torch::randn({2, 2, 5, 3}, torch::kFloat64);
  for (const bool causal : {false, true}) {
    for (const int64_t length : {2, 7}) {  // fewer than the queries, more
      peft::Attention site(AttentionOptions(4, 3).kv_heads(2).causal(causal));
      site->set_surroundings(torch::kFloat64, torch::kCPU);
      auto adapter = peft::add_adapter(*site, PrefixOptions(length), "one");
      const auto table = adapter.layers<peft::PrefixImpl>().front()->table().matrix().detach();
      const auto rows =
          table.view({length, 2, 2, 3}).permute({1, 2, 0, 3}).unsqueeze(1).expand({2, 2, 2, length, 3});
      const auto keys = torch::cat({rows[0], k}, 2).repeat_interleave(2, 1);
      const auto values = torch::cat({rows[1], v}, 2).repeat_interleave(2, 1);
      auto scores = q.matmul(keys.transpose(2, 3)) / std::sqrt(3.0);
      if (causal) {
        const auto future = torch::ones({5, 5}, torch::kBool).triu(1);
        scores = scores.masked_fill(torch::constant_pad_nd(future, {length, 0}), -INFINITY);
      }
      const auto expected = scores.softmax(-1).matmul(values).transpose(1, 2).reshape({2, 5, 12});
      CHECK(same(site->forward(q, k, v, {}).detach(), expected) < 1e-12);
    }
  }
}

// Reference: Hugging Face PEFT 0.21.2, tests/reference/prefix_values.py.
TEST_CASE("A prefix equals Hugging Face's on BERT and on GPT-2", "[prefix]") {
  struct Case {
    PrefixOptions options;
    std::vector<double> table, logits, placed, gpt2;
    double loss;
    std::vector<int64_t> texts;
  };
  const std::vector<Case> cases{
      {PrefixOptions(3),
       {1.84232986,   0.518887162,  -1.71192133,   -1.7013793,   2.01941943,   -0.268614441,  -0.130717501,
        -1.43741381,  0.39076823,   -0.0189677607, -1.35268736,  -0.730817795, 0.987922251,   -0.419407934,
        -0.584895849, -0.782335103, 2.77986312,    1.22202528,   -0.336449355, -0.965060174,  -0.129662678,
        -0.601765633, 0.144998565,  -0.149827167,  -0.437398404, 0.779233754,  -0.0583394617, -2.03049517,
        1.48293233,   0.494038075,  0.249218777,   1.74703145},
       {-0.0201577321, 0.157957688, 0.264719754, 0.497961104, 0.300782323, -0.0318592079},
       {-0.0567898229, 0.10956493, 0.226288289, 0.00444862992, 0.188067377, 0.286817491},
       {-0.866976559, -0.900826156, -0.89722085, -0.723930418, -0.84304899},
       3.35386229,
       {5, 3, 19, 7, 17, 17, 17, 8, 8, 8, 0, 0, 4, 11, 18, 8, 17, 17, 17, 8}},
      {PrefixOptions(3).init(PrefixInit::zero),
       {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
       {-0.0586661324, 0.105776101, 0.222287625, 0.472097903, 0.252382874, -0.0810699984},
       {-0.0929463729, 0.0556458496, 0.178809255, -0.0380344465, 0.132774532, 0.243534058},
       {-0.900638044, -0.8288849, -0.899981022, -0.729461312, -0.849734902},
       3.32927942,
       {5, 3, 19, 7, 17, 17, 17, 8, 8, 8, 0, 0, 4, 11, 18, 8, 17, 17, 17, 8}},
      {PrefixOptions(3).projection(true).hidden_width(5),
       {0.282780349,    0.010310702,  0.0240986198,  0.179759711,   -0.364592701, -0.450028956, 0.0465795398,
        -0.00758734345, 0.0577741638, 0.311955243,   0.00623339415, -0.747771859, 0.547373533,  -0.114335001,
        -0.433325708,   -0.287715673, 0.00055440329, -0.508656621,  -0.510366261, -0.44434163,  0.504327357,
        0.172111452,    -0.42073822,  -0.402343601,  0.477018923,   0.817037463,  0.0790447295, 0.286758751,
        0.103236534,    0.415113956,  -0.530256689,  0.288626552},
       {-0.0655221567, 0.0950811356, 0.212554365, 0.469120115, 0.245567188, -0.0886642635},
       {-0.100714035, 0.0425911471, 0.166327327, -0.0420117304, 0.125913173, 0.236868471},
       {-0.816061676, -0.670518279, -0.863603771, -0.762340128, -0.885032177},
       3.25926542,
       {5, 3, 19, 7, 17, 17, 8, 8, 8, 8, 0, 0, 4, 11, 0, 18, 8, 17, 17, 8}},
  };
  for (const auto& [options, table, expected, placed, on_gpt2, loss, texts] : cases) {
    INFO(options.projection() << static_cast<int>(options.init()));
    auto model = bert();
    torch::manual_seed(5);
    auto adapter = peft::add_adapter(*model, options, peft::all(), "one");
    check_values(adapter.layers<peft::PrefixImpl>().front()->table().matrix()[0], table, 1e-6);
    auto inputs = peft_test::batch();
    check_values(model->forward(inputs).logits, expected, 2e-6);
    inputs.position_ids = torch::tensor({{3, 1, 0, 2}});
    check_values(model->forward(inputs).logits, placed, 2e-6);

    auto decoder = gpt2();
    torch::manual_seed(5);
    peft::add_adapter(*decoder, options, "one");
    check_values(logits(decoder, ids())[0].select(1, 4), on_gpt2, 2e-6);
    peft::models::GPT2Inputs labelled;
    labelled.input_ids = labelled.labels = ids();
    CHECK(decoder->forward(labelled).loss.item<double>() == Approx(loss).epsilon(1e-6));
    const auto prompts = torch::tensor({{5, 3, 19, 7}, {0, 0, 4, 11}});
    for (const bool cached : {true, false}) {
      const auto made = peft::models::generate(
          decoder, prompts,
          peft::models::GenerateOptions().max_new_tokens(6).pad_token_id(0).use_cache(cached));
      CHECK(made.view(-1).equal(torch::tensor(texts)));
    }
  }
}

// Reference: adapters 1.3.0, tests/reference/prefix_values.py.
TEST_CASE("A prefix in AdapterHub's form equals its numbers", "[prefix]") {
  struct Case {
    PrefixOptions options;
    std::vector<double> bert, gpt2;
  };
  const std::vector<Case> cases{
      {PrefixOptions::adapterhub(3).hidden_width(5),
       {-0.212764472, -0.240399286, -0.160577685, -0.0235692635, -0.281167209, -0.413009256},
       {-0.897183001, -0.845325708, -0.85350579, -0.902478814, -0.752413869}},
      {PrefixOptions::adapterhub(3).projection(false).leave_out({1}),
       {-0.208373725, -0.184512138, -0.0782800913, -0.0665911958, -0.303719938, -0.404969573},
       {-0.877448857, -0.886457622, -0.885669291, -0.896389365, -0.83952713}},
      {PrefixOptions::adapterhub(3).hidden_width(5).activation("relu").gates(1),
       {-0.211661786, -0.22721225, -0.141225517, -0.0359440967, -0.286241472, -0.408505321},
       {-0.825616717, -0.90220499, -0.892922401, -0.883491218, -0.835623801}},
      {PrefixOptions::adapterhub(2).hidden_width(5).gates(2),
       {-0.212146759, -0.223415986, -0.134852022, -0.0450629517, -0.291417658, -0.40741542},
       {-0.847660422, -0.901694894, -0.893049479, -0.884140193, -0.837963939}},
  };
  for (const auto& [options, on_bert, on_gpt2] : cases) {
    INFO(options.activation() << options.gates());
    auto model = bert();
    torch::manual_seed(5);
    peft::add_adapter(*model, options, "one");
    check_values(model->forward(peft_test::batch()).logits, on_bert, 2e-6);
    auto decoder = gpt2();
    torch::manual_seed(5);
    peft::add_adapter(*decoder, options, "one");
    check_values(logits(decoder, ids())[0].select(1, 4), on_gpt2, 2e-6);
  }
  auto model = bert();
  torch::manual_seed(5);
  peft::add_adapter(*model, PrefixOptions::adapterhub(3).hidden_width(5).dropout(0.4), "one");
  model->train();
  torch::manual_seed(6);
  check_values(model->forward(peft_test::batch()).logits,
               {-0.210951507, -0.214281127, -0.121877909, -0.00444316119, -0.270669162, -0.415851504}, 2e-6);
}

TEST_CASE("A prefix on a whole BERT: gradients, padding, copies, archives", "[prefix]") {
  const auto inputs = peft_test::batch();
  const LayerCase whole{
      "BERT",
      [] {
        auto model = bert();
        model->to(torch::kFloat64);
        return model.ptr();
      },
      [&inputs](nn::Module& model, const Tensor&) {
        return model.as<peft::models::BertForSequenceClassificationImpl>()->forward(inputs).logits;
      },
      torch::empty({0})};
  for (const auto& options : {PrefixOptions(3), PrefixOptions::adapterhub(2).hidden_width(3).gates(2),
                              PrefixOptions::p_tuning_v2(2).projection(true).hidden_width(3)}) {
    auto model = bert();
    model->to(torch::kFloat64);
    const auto run = [&inputs](BertForSequenceClassification& any) {
      return any->forward(inputs).logits.detach();
    };
    const auto plain = run(model);
    auto adapter = peft::add_adapter(*model, options, "one");
    CHECK(adapter.count() == peft::summary(*model).trainable);
    shake(adapter);
    const auto adapted = run(model);
    CHECK(same(adapted, plain) > 1e-3);
    check_gradients(whole, *model, adapter);
    {
      const auto off = peft::disabled(*model);
      CHECK(torch::equal(run(model), plain));
    }
    auto copy = BertForSequenceClassification(peft::clone(*model.ptr()));
    CHECK(torch::equal(run(copy), adapted));
    shake(peft::adapter(*copy, "one"));
    CHECK(torch::equal(run(model), adapted));
    CHECK(same(run(copy), adapted) > 0);
    auto fresh = bert();
    fresh->to(torch::kFloat64);
    peft::add_adapter(*fresh, options, "one");
    through_archive(*model, *fresh);
    CHECK(torch::equal(run(fresh), adapted));

    if (options.gates() > 0) continue;  // which look at padding, as the reference's do
    auto alone = inputs;
    for (auto* tensor : {&alone.input_ids, &alone.attention_mask, &alone.token_type_ids}) {
      *tensor = tensor->slice(0, 1).slice(1, 0, 2);
    }
    CHECK(same(model->forward(alone).logits.detach(), adapted.slice(0, 1)) < 1e-12);
  }
}

TEST_CASE("A prefix enters a cache once: with a cache as without", "[prefix]") {
  for (const auto& options : {PrefixOptions(3), PrefixOptions::adapterhub(2).hidden_width(4)}) {
    auto model = gpt2();
    model->to(torch::kFloat64);
    shake(peft::add_adapter(*model, options, "one"));
    const auto whole = logits(model, ids());
    peft::models::GPT2Inputs step;
    step.use_cache = true;
    std::vector<Tensor> parts;
    for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 2}, {2, 3}, {3, 5}}) {
      step.input_ids = ids().slice(1, begin, end);
      auto output = model->forward(step);
      step.cache = output.cache;
      parts.push_back(output.logits.detach());
    }
    CHECK(same(torch::cat(parts, 1), whole) < 1e-12);
    CHECK(step.cache.length() == options.length() + 5);
  }
}

TEST_CASE("A prefix leaves the attention's kernel as it is", "[prefix]") {
  for (const bool causal : {false, true}) {
    const auto q = torch::randn({2, 2, 5, 4}).requires_grad_();
    peft::Attention site(AttentionOptions(2, 4).causal(causal));
    const auto run = [&] { site->forward(q, q, q, {}); };
    const auto plain = operators_of(run);
    peft::add_adapter(*site, PrefixOptions(3), "one");
    const auto prefixed = operators_of(run);
    std::set<std::string> kernels;
    for (const auto& name : plain) {
      if (name.find("scaled_dot_product") != std::string::npos) kernels.insert(name);
    }
    CHECK_FALSE(kernels.empty());
    for (const auto& name : prefixed) {
      INFO(name);
      if (name.find("scaled_dot_product") != std::string::npos) CHECK(kernels.erase(name) == 1);
      CHECK(name != "aten::masked_fill");
      CHECK(name != "aten::triu");
    }
    CHECK(kernels.empty());
  }
}

TEST_CASE("Several prefixes stack, and layers may go without", "[prefix]") {
  auto model = bert();
  const auto inputs = peft_test::batch();
  auto first = peft::add_adapter(*model, PrefixOptions(2).leave_out({1}), "first");
  CHECK(first.layers<peft::PrefixImpl>().size() == 1);
  CHECK(first.count() == 2 * 2 * 8);
  const auto alone = model->forward(inputs).logits.detach();
  shake(peft::add_adapter(*model, PrefixOptions(3), peft::named({"layer.1.attention.self.attention"}),
                          "second"));
  const auto both = model->forward(inputs).logits.detach();
  CHECK(same(both, alone) > 1e-3);
  peft::set_active(*model, {"second", "first"});
  CHECK(same(model->forward(inputs).logits.detach(), both) < 1e-6);
  peft::set_active(*model, {"first"});
  CHECK(torch::equal(model->forward(inputs).logits.detach(), alone));
}

TEST_CASE("Rows with prefixes of their own share a batch", "[prefix]") {
  auto model = bert();
  const auto inputs = peft_test::batch();
  const auto plain = model->forward(inputs).logits.detach();
  shake(peft::add_adapter(*model, PrefixOptions(3), "long"));
  peft::add_adapter(*model, PrefixOptions(1), "short");
  const auto alone = [&](const std::string& name) {
    peft::set_active(*model, {name});
    return model->forward(inputs).logits.detach();
  };
  const auto with_long = alone("long"), with_short = alone("short");
  const auto mixed = [&](const std::string& first, const std::string& second) {
    const peft::RowAdapters rows({first, second});
    return model->forward(inputs).logits.detach();
  };
  CHECK(same(mixed("long", "__base__"), torch::stack({with_long[0], plain[1]})) < 1e-6);
  CHECK(same(mixed("short", "long"), torch::stack({with_short[0], with_long[1]})) < 1e-6);
}

TEST_CASE("P-tuning v2 drops out the whole prefix, for each text on its own", "[prefix]") {
  auto model = bert();
  torch::manual_seed(4);
  auto adapter = peft::add_adapter(*model, PrefixOptions::p_tuning_v2(40).dropout(0.5), "one");
  const auto& table = adapter.layers<peft::PrefixImpl>().front()->table();
  CHECK(table.matrix().std().item<double>() == Approx(0.02).epsilon(0.1));
  model->train();
  const peft::ForwardScope scope;
  const auto dropped = table.keys_and_values(2, torch::kFloat32);
  REQUIRE(dropped.size() == 4);
  const auto all = torch::stack(dropped);
  CHECK(all.sizes() == c10::IntArrayRef({4, 2, 2, 40, 4}));
  CHECK(all.eq(0).to(torch::kFloat32).mean().item<double>() == Approx(0.5).margin(0.05));
  CHECK_FALSE(torch::equal(all.select(1, 0), all.select(1, 1)));
  CHECK(torch::equal(torch::stack(table.keys_and_values(2, torch::kFloat32)), all));  // once a forward
  CHECK(table.keys_and_values(1, torch::kFloat32)[0].size(0) == 1);
}

TEST_CASE("Positions and types after a prefix are as in Hugging Face's", "[prefix]") {
  const auto positions = [](const peft::InputOptions& options, Tensor given) {
    peft::SiteInfo site;
    site.input = options;
    peft::Embedded in;
    in.values = torch::zeros({2, 3, 4});
    in.positions = std::move(given);
    in.types = torch::ones({2, 3}, torch::kLong);
    return peft::PrefixPositionsImpl(peft::PrefixPositionsOptions(5), site).embed(std::move(in));
  };
  const auto given = torch::tensor({{2, 3, 1}});
  const auto roberta = peft::InputOptions(4).padding_position(1);
  const auto bert = peft::InputOptions(4);
  CHECK(positions(bert, {}).positions.equal(torch::tensor({{5, 6, 7}})));
  CHECK(positions(bert, given).positions.equal(torch::tensor({{7, 8, 6}})));
  CHECK(positions(roberta, {}).positions.equal(torch::tensor({{2, 3, 4}})));  // of vectors, not tokens
  CHECK(positions(roberta, given).positions.equal(torch::tensor({{7, 8, 1}})));
  CHECK(!positions(bert, {}).types.defined());
  CHECK(positions(peft::InputOptions(4).keeps_types(true), {}).types.defined());
  CHECK(peft::companion(PrefixOptions::p_tuning_v2(2))->keeps_types());
  CHECK_FALSE(peft::companion(PrefixOptions(2))->keeps_types());
}

TEST_CASE("A prefix may start from what the model makes of real tokens", "[prefix]") {
  auto model = gpt2();
  auto adapter = peft::add_adapter(*model, PrefixOptions(3), "one");
  const auto beginning = torch::tensor({{4, 9, 1}});
  peft::initialize_prefix(*model, adapter, [&] { logits(model, beginning); });
  // A text after the prefix is then what the text goes on with after the tokens.
  const auto after = logits(model, ids());
  const auto off = peft::disabled(*model);
  CHECK(same(logits(model, torch::cat({beginning, ids()}, 1)).slice(1, 3), after) < 1e-5);
  CHECK_THROWS_WITH(peft::initialize_prefix(*model, adapter, [&] { logits(model, ids()); }),
                    Contains("the text must have 3 tokens") && Contains("saw keys of (1, 2, 5, 4)"));
}

TEST_CASE("A prefix says what is wrong", "[prefix]") {
  const auto complaint = [](const PrefixOptions& options) {
    return peft_test::complaint([&] {
      auto model = bert();
      peft::add_adapter(*model, options, "one");
    });
  };
  CHECK(complaint(PrefixOptions(0)) == "PrefixOptions: length must be at least 1, but got 0");
  CHECK(complaint(PrefixOptions(2).dropout(1)) == "PrefixOptions: dropout must be in [0, 1), but got 1");
  CHECK(complaint(PrefixOptions(2).gates(3)) == "PrefixOptions: gates must be 0, 1 or 2, but got 3");
  CHECK(complaint(PrefixOptions(2).hidden_width(-1)) ==
        "PrefixOptions: hidden_width must be at least 0, but got -1");
  CHECK(complaint(PrefixOptions(2).leave_out({-1})) ==
        "PrefixOptions: leave_out must be at least 0, but got -1");
  CHECK_THAT(complaint(PrefixOptions(2).folded(true)), Contains("folded is for a prefix with projection"));
  CHECK_THAT(complaint(PrefixOptions(2).activation("tan")), Contains("no activation 'tan'"));
  CHECK_THAT(complaint(PrefixOptions(2).leave_out({0, 1})), Contains("matches no site that can take it"));
  auto model = bert();
  CHECK_THROWS_WITH(peft::add_adapter(*model, PrefixOptions(2), peft::named({"query"}), "one"),
                    Contains("'bert.encoder.layer.0.attention.self.query'") &&
                        Contains("a Linear does not offer an attention"));

  // Positions 8 to 11, of a table of 10.
  peft::add_adapter(*model, PrefixOptions(8), "one");
  CHECK_THROWS_WITH(model->forward(peft_test::batch()),
                    Contains("position_ids must be from 0 to 9, but got 11"));

  struct Uneven : nn::Module {
    Uneven() {
      a = register_module("a", peft::Attention(AttentionOptions(2, 4)));
      b = register_module("b", peft::Attention(AttentionOptions(4, 4)));
    }
    peft::Attention a{nullptr}, b{nullptr};
  };
  const auto uneven = std::make_shared<Uneven>();
  CHECK_THROWS_WITH(peft::add_adapter(*uneven, PrefixOptions(2), "one"),
                    Contains("'a' has 2 heads of 4 and 'b' 4 of 4"));
  CHECK(peft::summary(*uneven).total == 0);
}
