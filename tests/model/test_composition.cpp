#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "model/composition_values.h"
#include "models/tiny_bert.h"
#include "peft/models/generate.h"
#include "peft/models/gpt2.h"
#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::Average;
using peft::AverageOptions;
using peft::BatchSplit;
using peft::Composition;
using peft::Fuse;
using peft::Parallel;
using peft::Split;
using peft::Stack;
using peft_test::EncoderInputs;
using Names = std::vector<std::string>;
using Parts = std::vector<Composition>;

namespace {

/// The formula of tests/reference/composition_values.py.
void wave(const Tensor& tensor, double k, double size) {
  const torch::NoGradGuard no_grad;
  const auto at = torch::arange(tensor.numel(), torch::kFloat64);
  Tensor(tensor).copy_((size * (0.7 * at + k).sin()).reshape(tensor.sizes()));
}

EncoderInputs texts() {
  EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19, 7}, {1, 2, 0, 0}, {4, 8, 15, 16}});
  inputs.attention_mask = torch::tensor({{1, 1, 1, 1}, {1, 1, 0, 0}, {1, 1, 1, 1}});
  return inputs;
}

using Bert = peft::models::BertForSequenceClassification;

Bert bert() {
  torch::manual_seed(0);
  Bert model(peft_test::tiny());
  model->to(torch::kFloat64);
  peft_test::fill(*model);
  model->eval();
  return model;
}

/// A BERT with adapters a, b and c, and of bottlenecks the fusion of a and b.
Bert with_adapters(const std::string& kind) {
  auto model = bert();
  double number = 0;
  for (const auto* name : {"a", "b", "c"}) {
    const auto adapter = [&] {
      if (kind == "lora") {
        return peft::add_adapter(*model, peft::LoraOptions(2).alpha(4), peft::named({"query", "value"}),
                                 name);
      }
      auto options = kind == "houlsby"    ? peft::houlsby()
                     : kind == "pfeiffer" ? peft::pfeiffer()
                                          : peft::parallel_adapter();
      return peft::add_adapter(*model, options.reduction_factor(4), name);
    }();
    double k = 10 * number++;
    for (const auto& [key, tensor] : adapter.named_parameters()) wave(tensor, k++, 0.5);
  }
  if (kind != "lora") {
    const auto fusion = peft::add_fusion(*model, peft::FusionOptions({"a", "b"}));
    double k = 100;
    for (const auto& piece : fusion.layers<peft::FusionImpl>()) {
      const auto &query = *piece->query, &key = *piece->key;
      for (const auto& tensor : {query.weight, query.bias, key.weight, key.bias, piece->value})
        wave(tensor, k++, 0.5);
    }
  }
  return model;
}

Composition split(Parts parts, int64_t first = 1) { return Split(std::move(parts), {first, 4 - first}); }
Composition rows(Parts parts, int64_t first = 1) { return BatchSplit(std::move(parts), {first, 3 - first}); }
Composition average(Parts parts) {
  return Average(std::move(parts), {0.25, 0.75}, AverageOptions().as_adapterhub(true));
}

std::vector<Composition> compositions() {
  const Composition ab = Stack("a", "b"), a_b = BatchSplit({"a", "b"}, {1, 1});
  return {rows({"a", "b"}),
          average({"a", "b"}),
          Parallel("a", "b"),
          Stack("c", Parallel("a", "b")),
          Stack(rows({"a", "b"}), "c"),
          Stack("c", average({"a", "b"})),
          Parallel(ab, "c"),
          Parallel(rows({"a", "b"}), "c"),
          Parallel(average({"a", "b"}), "c"),
          rows({ab, "c"}),
          rows({a_b, "c"}, 2),
          rows({average({"a", "b"}), "c"}),
          average({ab, "c"}),
          average({rows({"a", "b"}), "c"}),
          ab,
          Fuse("a", "b"),
          split({"a", "b"}),
          Stack("c", Fuse("a", "b")),
          Stack(split({"a", "b"}), "c"),
          Fuse(Stack("c", "a"), "b"),
          split({Split({"a", "b"}, {1, 2}), "c"}, 3),
          split({ab, "c"}),
          split({rows({"a", "b"}), "c"}),
          split({average({"a", "b"}), "c"}),
          rows({split({"a", "b"}), "c"}),
          average({split({"a", "b"}), "c"})};
}

Tensor logits(Bert& model, const EncoderInputs& inputs = texts()) {
  return model->forward(inputs).logits.detach();
}

}  // namespace

TEST_CASE("Every composition that AdapterHub allows gives its numbers", "[composition]") {
  double worst = 0;
  size_t compared = 0;
  for (const auto& [kind, values] : composition_values) {
    auto model = with_adapters(kind);
    for (const auto& composition : compositions()) {
      const auto expected = values.find(composition.text());
      if (expected == values.end()) continue;
      CAPTURE(kind, composition.text());
      peft::set_active(*model, composition);
      const auto flat = logits(model).reshape(-1);
      const auto at = torch::arange(flat.numel(), torch::kFloat64);
      const double sums[] = {(flat * at.sin()).sum().item<double>(), (flat * at.cos()).sum().item<double>()};
      for (size_t i = 0; i < 2; ++i) {
        CHECK(sums[i] == Approx(expected->second[i]).margin(1e-9));
        worst = std::max(worst, std::abs(sums[i] - expected->second[i]));
      }
      ++compared;
    }
  }
  size_t all = 0;
  for (const auto& [kind, values] : composition_values) all += values.size();
  CHECK(compared == all);
  INFO("largest difference " << worst);
  CHECK(worst < 1e-9);
}

TEST_CASE("Parallel and BatchSplit give each row what its adapter alone gives it", "[composition]") {
  const auto kind = GENERATE(as<std::string>(), "pfeiffer", "houlsby", "parallel", "lora");
  CAPTURE(kind);
  auto model = with_adapters(kind);
  std::map<std::string, Tensor> alone;
  for (const auto* name : {"a", "b", "c"}) {
    peft::set_active(*model, Names{name});
    alone[name] = logits(model);
  }
  peft::set_active(*model, Parallel("c", "a", "b"));
  CHECK(largest(logits(model), torch::cat({alone["c"], alone["a"], alone["b"]})) < 1e-12);
  peft::set_active(*model, BatchSplit({"b", "c"}, {2, 1}));
  CHECK(largest(logits(model), torch::cat({alone["b"].narrow(0, 0, 2), alone["c"].narrow(0, 2, 1)})) < 1e-12);
  peft::set_active(*model, BatchSplit({"b", "c", "a"}, {2, 0, 1}));
  CHECK(largest(logits(model).narrow(0, 2, 1), alone["a"].narrow(0, 2, 1)) < 1e-12);
  CHECK_THROWS_WITH(logits(model, peft_test::batch()), Contains("sizes must be those of the batch, 2 rows"));

  // An adapter that has no piece on some layer leaves its rows there as they are.
  peft::set_active(*model, Names{});
  const auto plain = logits(model);
  auto few = peft::add_adapter(*model, peft::LoraOptions(2), peft::where([](const peft::SiteInfo& site) {
    return site.path.find("layer.1.") != std::string::npos;
  }),
                               "few");
  shake(few);
  const auto with_few = logits(model);
  peft::set_active(*model, Parallel("few", "a"));
  CHECK(largest(logits(model), torch::cat({with_few, alone["a"]})) < 1e-12);

  // Labels follow; other inputs too.
  auto inputs = texts();
  inputs.labels = torch::tensor({0, 2, 1});
  inputs.token_type_ids = torch::tensor({{0, 0, 1, 1}});
  inputs.position_ids = torch::tensor({{1, 2, 3, 4}, {0, 1, 2, 3}, {0, 2, 4, 6}});
  const auto loss = model->forward(inputs).loss.item<double>();
  double mean = 0;
  for (const auto* name : {"few", "a"}) {
    peft::set_active(*model, Names{name});
    mean += model->forward(inputs).loss.item<double>() / 2;
  }
  CHECK(loss == Approx(mean));
}

TEST_CASE("On layers an average is that of the outputs, and merges", "[composition]") {
  torch::manual_seed(1);
  const auto cases = layer_cases();
  for (const auto& layer_case : cases) {
    INFO(layer_case.name);
    auto site = layer_case.make();
    if (dynamic_cast<peft::SiteImpl&>(*site).info().groups > 1) continue;
    std::map<std::string, Tensor> alone;
    const auto run = [&] { return layer_case.forward(*site, layer_case.input).detach(); };
    alone["base"] = run();
    for (const auto* name : {"a", "b"}) {
      shake(peft::add_adapter(*site, peft::LoraOptions(2), peft::all(), name));
      peft::set_active(*site, Names{name});
      alone[name] = run();
    }
    peft::set_active(*site, Average({"a", "b"}, {3, 1}));
    const auto mixed = run();
    CHECK(largest(mixed, 0.75 * alone["a"] + 0.25 * alone["b"]) < 1e-12);
    peft::merge(*site);
    CHECK(largest(run(), mixed) < 1e-12);
    peft::unmerge(*site);
    CHECK(torch::equal(run(), mixed));
    const auto half = AverageOptions().normalize(false);
    peft::set_active(*site, Average({"a", "b"}, {0.5, 0.25}, half));
    CHECK(largest(run(), 0.5 * alone["a"] + 0.25 * alone["b"] + 0.25 * alone["base"]) < 1e-12);
    peft::set_active(*site, Average("a", "b"));
    CHECK(largest(run(), (alone["a"] + alone["b"]) / 2) < 1e-12);
    peft::set_active(*site, BatchSplit({"a", "b"}, {1, layer_case.input.size(0) - 1}));
    const auto rest = layer_case.input.size(0) - 1;
    CHECK(largest(run(), torch::cat({alone["a"].narrow(0, 0, 1), alone["b"].narrow(0, 1, rest)})) < 1e-12);
    CHECK_THROWS_WITH(peft::merge(*site), Contains("BatchSplit(a, b) are not the same for all rows"));
  }
}

TEST_CASE("Split on a linear layer gives each range of tokens its adapter", "[composition]") {
  torch::manual_seed(2);
  peft::Linear site(6, 4);
  const auto x = torch::randn({2, 5, 6});
  std::map<std::string, Tensor> alone;
  for (const auto* name : {"a", "b"}) {
    shake(peft::add_adapter(*site, peft::LoraOptions(2), peft::all(), name));
    peft::set_active(*site, Names{name});
    alone[name] = site->forward(x).detach();
  }
  peft::set_active(*site, Split({"b", "a"}, {2, 3}));
  const auto expected = torch::cat({alone["b"].narrow(1, 0, 2), alone["a"].narrow(1, 2, 3)}, 1);
  CHECK(largest(site->forward(x).detach(), expected) < 1e-6);
  CHECK_THROWS_WITH(site->forward(x.narrow(1, 0, 4)),
                    Contains("Split: lengths must be those of the text, 4 tokens, but got (2, 3)"));
  CHECK_THROWS_WITH(peft::merge(*site), Contains("Split(b, a) are not the same for all rows and tokens"));
}

TEST_CASE("What cannot be composed is refused before anything changes", "[composition]") {
  auto model = with_adapters("pfeiffer");
  const Composition ab = Stack("a", "b");
  const auto refused = [&](const Composition& composition, const std::string& why) {
    CAPTURE(composition.text());
    peft::set_active(*model, Stack("c"));
    CHECK_THROWS_WITH(peft::set_active(*model, composition), Contains(why));
    CHECK(peft::active_adapters(*model) == Names{"c"});
  };
  // Every pair of blocks, against the reference's table.
  const std::map<std::string, Composition> inner{
      {"Stack", Stack("a", "b")},           {"Fuse", Fuse("a", "b")},
      {"Split", Split({"a", "b"}, {2, 2})}, {"Parallel", Parallel("a", "b")},
      {"BatchSplit", rows({"a", "b"})},     {"Average", average({"a", "b"})}};
  const std::map<std::string, std::string> allowed{
      {"Stack", "Fuse Split Parallel BatchSplit Average"}, {"Fuse", "Stack"},
      {"Split", "Split Stack BatchSplit Average"},         {"Parallel", "Stack BatchSplit Average"},
      {"BatchSplit", "Stack Split BatchSplit Average"},    {"Average", "Stack Split BatchSplit"}};
  const auto outer = [&](const std::string& block, const Composition& child) -> Composition {
    if (block == "Stack") return Stack(child, "c");
    if (block == "Fuse") return Fuse({child, "c"}, "a,b");
    if (block == "Split") return split({child, "c"});
    if (block == "Parallel") return Parallel(child, "c");
    if (block == "BatchSplit") return rows({child, "c"});
    return average({child, "c"});
  };
  size_t forbidden = 0;
  for (const auto& [block, holds] : allowed) {
    for (const auto& [name, child] : inner) {
      const auto both = outer(block, child);
      if ((" " + holds + " ").find(" " + name + " ") != std::string::npos) {
        CHECK_NOTHROW(peft::set_active(*model, both));
      } else {
        refused(both, child.text() + " cannot stand in " + both.text());
        ++forbidden;
      }
    }
  }
  CHECK(forbidden == 36 - 20);
  refused(split({split({average({"a", "b"}), "c"}), "c"}), "which is itself in a block");
  refused(Stack(split({rows({"a", "b"}), "c"})), "which is itself in a block");
  refused(Parallel("a", "none"), "the model has no adapter 'none'; it has");
  refused(Stack("a", "c", "a"), "'a' is named twice");
  refused(Fuse("a", "c"), "the model has no adapter 'a,c'");
  refused(Fuse({"a", "b"}, "c"), "the fusion of its adapters has no piece here (hint: peft::add_fusion)");
  refused(Stack("a", "a,b"), "'a,b' is a fusion (hint: peft::Fuse of the adapters it fuses)");
  refused(Parallel(Composition()), "Stack holds no adapter");
  refused(Stack(Parallel("a", "b"), Parallel("c")), "all Parallels must have as many adapters as each other");
  CHECK_THROWS_WITH(Split({"a", "b"}, {1}),
                    Contains("Split: lengths must be 2, one for each adapter, but got 1"));
  CHECK_THROWS_WITH(Split({"a"}, {0}), Contains("Split: lengths must be at least 1, but got 0"));
  CHECK_THROWS_WITH(BatchSplit({"a"}, {-1}), Contains("BatchSplit: sizes must be at least 0, but got -1"));
  CHECK_THROWS_WITH(Average({"a", "b"}, {1, -1}),
                    Contains("Average: weights must be finite and their sum not 0"));
  CHECK_THROWS_WITH(Average({"a", "b"}, {1}), Contains("Average: weights must be 2"));

  // Methods that define only some blocks.
  peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query"}), "low");
  refused(Fuse({"low", "a"}, "a,b"),
          "query' cannot run Fuse(low, a): Fuse needs methods that work on a residual");
  peft::add_adapter(*model, peft::houlsby(), "wide");
  refused(average({"wide", "a"}),
          "attention.output.LayerNorm' cannot run Average(wide, a): Average needs a piece of each");
  peft::add_adapter(*model, peft::LayerNormTuningOptions(), peft::all(), "norms");
  refused(average({"norms", "a"}), "Average is not defined for methods that change the norm");
  peft::MultiheadAttention attention(8, 2);
  peft::add_adapter(*attention, peft::LoraOptions(2), peft::all(), "a");
  CHECK_THROWS_WITH(peft::set_active(*attention, Parallel("a")),
                    Contains("it runs on one weight for the whole batch"));

  // A model that does not repeat its batch.
  peft::Linear site(4, 4);
  peft::add_adapter(*site, peft::LoraOptions(2), peft::all(), "a");
  peft::add_adapter(*site, peft::LoraOptions(2), peft::all(), "b");
  peft::set_active(*site, Parallel("a", "b"));
  CHECK_THROWS_WITH(site->forward(torch::randn({2, 4})),
                    Contains("got a batch that its model has not repeated"));
  CHECK_THROWS_WITH(site->branches(), Contains("must open a peft::ForwardScope"));
  const peft::ForwardScope scope;
  CHECK(site->branches() == 2);
  CHECK(site->forward(torch::randn({4, 4})).size(0) == 4);
  CHECK_THROWS_WITH(site->forward(torch::randn({3, 4})),
                    Contains("expected a multiple of 2 rows, but got 3"));
}

TEST_CASE("Verbs keep a composition together", "[composition]") {
  auto model = with_adapters("pfeiffer");
  peft::set_active(*model, Stack("c", Fuse("a", "b")));
  CHECK(peft::active_adapters(*model) == Names{"c", "a", "b", "a,b"});
  const auto before = logits(model);
  peft::rename(*model, "a", "first");
  peft::rename(*model, "a,b", "both");
  CHECK(peft::active_adapters(*model) == Names{"c", "first", "b", "both"});
  CHECK(torch::equal(logits(model), before));
  {
    const auto off = peft::disabled(*model);
    CHECK_FALSE(torch::equal(logits(model), before));
  }
  const auto copy = peft::clone(*model);
  CHECK(torch::equal(copy->forward(texts()).logits, before));
  CHECK_THROWS_WITH(peft::remove_adapter(*model, "first"),
                    Contains("'first' is part of the active Stack(c, Fuse(first, b))"));
  CHECK_THROWS_WITH(peft::remove_adapter(*model, "both"), Contains("is part of the active"));
  CHECK_THROWS_WITH(peft::merge(*model), Contains("are not the same for all rows and tokens"));
  peft::remove_adapter(*model, "c");
  CHECK(peft::active_adapters(*model) == Names{"first", "b", "both"});

  // A new adapter comes on top.
  auto low = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query"}), "low");
  CHECK(peft::active_adapters(*model) == Names{"first", "b", "both", "low"});
  peft::set_active(*model, Fuse({"first", "b"}, "both"));
  const auto fused = logits(model);
  peft::set_active(*model, Stack("low", Fuse({"first", "b"}, "both")));
  CHECK(torch::equal(logits(model), fused));
  shake(low);
  CHECK_FALSE(torch::equal(logits(model), fused));
  CHECK(peft::summary(*model).text.find("both") != std::string::npos);
}

TEST_CASE("Adapters of a Parallel train together", "[composition]") {
  auto model = bert();
  auto a = peft::add_adapter(*model, peft::pfeiffer().reduction_factor(4), "a");
  auto b = peft::add_adapter(*model, peft::pfeiffer().reduction_factor(4), "b");
  auto inputs = texts();
  inputs.labels = torch::tensor({0, 2, 1});
  const auto gradients = [&](const peft::Adapter& adapter) {
    std::vector<Tensor> result;
    for (auto& tensor : adapter.parameters()) {
      result.push_back(tensor.grad().clone());
      tensor.mutable_grad() = Tensor();
    }
    return result;
  };
  peft::set_active(*model, Names{"a"});
  model->forward(inputs).loss.backward();
  const auto alone = gradients(a);
  peft::set_active(*model, Parallel("a", "b"));
  model->forward(inputs).loss.backward();
  const auto together = gradients(a);
  for (size_t i = 0; i < alone.size(); ++i) CHECK(largest(2 * together[i], alone[i]) < 1e-12);
  for (const auto& tensor : b.parameters()) CHECK(tensor.grad().defined());
}

TEST_CASE("A decoder goes on with every branch of a Parallel", "[composition]") {
  using peft::models::GPT2Config;
  torch::manual_seed(4);
  peft::models::GPT2LMHeadModel model(
      GPT2Config().vocab_size(30).n_embd(8).n_layer(2).n_head(2).n_positions(16));
  model->eval();
  for (const auto* name : {"a", "b"}) {
    const auto low = peft::LoraOptions(2).alpha(64);
    for (auto& [key, tensor] :
         peft::add_adapter(*model, low, peft::named({"c_attn", "c_fc"}), name).named_parameters()) {
      const torch::NoGradGuard no_grad;
      tensor.normal_();
    }
  }
  const auto ids = torch::tensor({{5, 3, 19}, {1, 2, 7}}), labels = torch::tensor({{5, 3, -100}, {1, 2, 7}});
  auto options = peft::models::GenerateOptions().max_new_tokens(6).eos_token_id(std::vector<int64_t>{});
  std::map<std::string, Tensor> texts, alone;
  double mean = 0;
  for (const auto* name : {"a", "b"}) {
    peft::set_active(*model, Names{name});
    texts[name] = peft::models::generate(model, ids, options);
    peft::models::GPT2Inputs inputs;
    inputs.input_ids = ids;
    inputs.labels = labels;
    const auto output = model->forward(inputs);
    alone[name] = output.logits.detach();
    mean += output.loss.item<double>() / 2;
  }
  REQUIRE_FALSE(torch::equal(texts["a"], texts["b"]));
  peft::set_active(*model, Parallel("a", "b"));
  peft::models::GPT2Inputs inputs;
  inputs.input_ids = ids;
  inputs.labels = labels;
  const auto output = model->forward(inputs);
  CHECK(largest(output.logits, torch::cat({alone["a"], alone["b"]})) < 1e-4);
  CHECK(output.loss.item<double>() == Approx(mean));
  CHECK(torch::equal(peft::models::generate(model, ids, options), torch::cat({texts["a"], texts["b"]})));
  CHECK_THROWS_WITH(peft::models::generate(model, ids, options.use_cache(false)),
                    Contains("generate: a Parallel needs use_cache"));
}

TEST_CASE("A forward sees one composition, whatever another thread does", "[composition]") {
  auto model = with_adapters("pfeiffer");
  const torch::NoGradGuard no_grad;
  peft::set_active(*model, Parallel("a", "b"));
  const auto parallel = logits(model);
  peft::set_active(*model, Fuse("a", "b"));
  const auto fused = logits(model);
  std::atomic<bool> done = false;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> readers;
  for (int i = 0; i < 2; ++i) {
    readers.emplace_back([&] {
      while (!done) {
        const auto seen = logits(model);
        const auto& expected = seen.size(0) == 6 ? parallel : fused;
        if ((seen - expected).abs().max().item<double>() > 1e-12) ++wrong;
      }
    });
  }
  for (int i = 0; i < 50; ++i) {
    if (i % 2) {
      peft::set_active(*model, Parallel("a", "b"));
    } else {
      peft::set_active(*model, Fuse("a", "b"));
    }
    std::this_thread::yield();
  }
  done = true;
  for (auto& reader : readers) reader.join();
  CHECK(wrong == 0);
}
