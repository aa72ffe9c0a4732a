#include <peft/methods/hifi.h>

#include "methods/reference_values.h"
#include "peft/core/conv1d.h"

using namespace suite;
using peft::HifiOptions;
using peft::RowsImpl;
using peft::RowsOptions;

namespace {

constexpr int64_t heads = 4, width = 3, size = heads * width;

/// Attention on the whole width, whose output joins the input.
struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t layer, int64_t kv_heads = heads) {
    query = register_module("query", peft::Linear(size, size));
    key = register_module("key", peft::Linear(size, kv_heads * width));
    value = register_module("value", peft::Linear(size, kv_heads * width));
    attention = register_module(
        "attention", peft::Attention(peft::AttentionOptions(heads, width).kv_heads(kv_heads).layer(layer)));
    out = register_module("out", peft::Linear(size, size));
    to(torch::kFloat64);
    int64_t k = 0;
    for (const auto& item : named_parameters()) {
      assign(item.value(), fill(item.value().sizes().vec(), 10 * layer + k) * (k < 4 ? 4 : 1));
      ++k;
    }
  }
  Tensor forward(const Tensor& x, const Tensor& bias) {
    const auto split = [&](const Tensor& y) {
      return y.view({y.size(0), y.size(1), -1, width}).transpose(1, 2);
    };
    const auto y =
        attention->forward(split(query->forward(x)), split(key->forward(x)), split(value->forward(x)), bias);
    return x + out->forward(y);
  }
  peft::Linear query{nullptr}, key{nullptr}, value{nullptr}, out{nullptr};
  peft::Attention attention{nullptr};
};
TORCH_MODULE(Block);

struct ModelImpl : nn::Module {
  explicit ModelImpl(int64_t kv_heads = heads) {
    first = register_module("first", Block(0, kv_heads));
    second = register_module("second", Block(1, kv_heads));
  }
  Tensor forward(const Tensor& x, const Tensor& bias) {
    return second->forward(first->forward(x, bias), bias);
  }
  Block first{nullptr}, second{nullptr};
};
TORCH_MODULE(Model);

/// Two texts of 7 and 5 positions in one batch.
struct Texts {
  Tensor x = fill({2, 7, size}, 3);
  Tensor used = torch::arange(7).unsqueeze(0) < torch::tensor({{7}, {5}});
  Tensor bias = torch::zeros({2, 1, 1, 7}, torch::kFloat64)
                    .masked_fill(~used.view({2, 1, 1, 7}), -std::numeric_limits<double>::infinity());
};

/// The batch, `times` times.
std::function<bool(Tensor&)> batches(Model& model, int times = 1) {
  return [&model, times, texts = Texts()](Tensor& used) mutable {
    if (times-- == 0) return false;
    used = texts.used;
    model->forward(texts.x, texts.bias);
    return true;
  };
}

peft::Adapter projections(Model& model) {
  return peft::add_adapter(*model, RowsOptions(), peft::named({"query", "key", "value"}));
}

/// A part that trains the outputs 0 and 2 of every layer.
peft::Part two_rows() { return peft::on(RowsOptions().rows({0, 2}), peft::all()); }

using Heads = std::vector<std::vector<int64_t>>;

}  // namespace

TEST_CASE("Rows keep the promises of a method on every layer with outputs", "[rows]") {
  const Promise promise{{two_rows()}, [](const peft::SiteInfo& site) {
                          const auto outputs = site.weight_shape.at(site.fan_in_fan_out ? 1 : 0);
                          const auto inputs = product(site.weight_shape) / outputs;
                          return 2 * (inputs + (site.has_bias() ? 1 : 0));
                        }};
  auto cases = layer_cases();
  for (auto& other : other_layer_cases()) cases.push_back(std::move(other));
  cases.push_back(layer<peft::Conv1D>("Conv1D", torch::randn({2, 3, 6}), 6, 4));
  size_t checked = 0;
  for (const auto& layer_case : cases) {
    const auto site = std::dynamic_pointer_cast<peft::SiteImpl>(layer_case.make());
    if (site->info().lookup) continue;
    check_properties(layer_case, promise);
    ++checked;
  }
  CHECK(checked == cases.size() - 2);
}

// Reference: numpy and torch, tests/reference/hifi_values.py.
TEST_CASE("HiFi's information, correlation and importance of heads equal the definitions", "[hifi]") {
  Model model;
  const auto adapter = projections(model);
  SECTION("with the defaults") {
    const auto found = peft::initialize_hifi(*model, adapter, batches(model), HifiOptions(2));
    check_values(found.information, {2, 2, 2, 2, 2, 2, 1, 1.5});
    check_values(found.correlation[1], {0.3798057429, 1, 0.2851199369, 0.6684339501, 0.2283806533,
                                        0.6849059796, 0.537711818, 0.4427493004});
    check_values(found.importance, {0.1118958182, 0.1259562421, 0.1225575941, 0.1502479591, 0.08851970565,
                                    0.1421123639, 0.1263573386, 0.1323529784});
    CHECK(found.attentions == std::vector<std::string>{"first.attention", "second.attention"});
    CHECK(found.kept == Heads{{1, 3}, {1, 3}});
    // L · k · 3 · (D · d + D)
    CHECK(adapter.count() == 2 * 2 * 3 * (width * size + width));
    for (const auto& piece : adapter.layers<RowsImpl>()) {
      CHECK(piece->options.rows() == std::vector<int64_t>{3, 4, 5, 9, 10, 11});
    }
    CHECK(torch::equal(adapter.layers<RowsImpl>().at(0)->weight.slice(0, 3),
                       model->first->query->base->weight.slice(0, 9)));
  }
  SECTION("with others, over the whole model") {
    const auto found = peft::initialize_hifi(
        *model, adapter, batches(model),
        HifiOptions(1).per_layer(false).energy(0.6).damping(0.5).whole_outputs(true).restart_by_information(
            true));
    check_values(found.information, {1, 1.5, 1, 1, 1, 1, 1, 1});
    check_values(found.importance, {0.1184454195, 0.1503454822, 0.1215048664, 0.1223528157, 0.1160802881,
                                    0.1303197752, 0.1237010943, 0.1172502587});
    CHECK(found.kept == Heads{{1}, {1}});
  }
  SECTION("of as many texts as asked for, however they are batched") {
    const auto once = peft::initialize_hifi(*model, adapter, batches(model, 1), HifiOptions(2));
    const auto some = peft::initialize_hifi(*model, adapter, batches(model, 9), HifiOptions(2).samples(4));
    CHECK(largest(once.importance, some.importance) < 1e-12);
    const auto one = peft::initialize_hifi(*model, adapter, batches(model, 9), HifiOptions(2).samples(1));
    CHECK(largest(once.correlation, one.correlation) > 1e-3);
  }
}

TEST_CASE("HiFi trains its rows as a masked gradient does, over 12 steps of Adam", "[hifi]") {
  Model model;
  const auto adapter = projections(model);
  peft::initialize_hifi(*model, adapter, batches(model), HifiOptions(2));
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0));
  const Texts texts;
  Tensor loss;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    const auto apart = model->forward(texts.x, texts.bias) - fill({2, 7, size}, 6);
    loss = (apart * texts.used.unsqueeze(2)).square().sum();
    loss.backward();
    optimizer.step();
  }
  check_values(loss.view({1}), {55.76592435}, 1e-7);
  const auto before = copies(*model->second->out);
  peft::merge(*model);
  check_values(model->second->value->base->weight.select(1, 0),
               {-0.37, 0.03, 0.43, -0.2426904797, 0.2279252206, -0.2432282935, 0.01, 0.41, -0.2, 0.2484400742,
                -0.5322308591, 0.1678486823},
               1e-8);
  check_values(model->first->query->base->bias,
               {-0.52, 0.96, -1.6, 0.02528658199, 1.352658353, -1.193841905, 0.28, 1.76, -0.8, 0.898697209,
                -2.057323618, -0.2215273697},
               1e-8);
  CHECK(torch::equal(model->second->out->base->weight, before.at(0)));
}

TEST_CASE("HiFi keeps the rows of heads that share keys, and of projections that are stacked", "[hifi]") {
  Model model(2);
  const auto adapter = projections(model);
  const auto found = peft::initialize_hifi(*model, adapter, batches(model), HifiOptions(1));
  for (size_t i = 0; i < 2; ++i) {
    const auto head = found.kept.at(i).at(0);
    const auto first = [&](size_t piece) {
      return adapter.layers<RowsImpl>().at(3 * i + piece)->options.rows();
    };
    CHECK(first(0) == std::vector<int64_t>{head * 3, head * 3 + 1, head * 3 + 2});
    CHECK(first(1) == std::vector<int64_t>{head / 2 * 3, head / 2 * 3 + 1, head / 2 * 3 + 2});
    CHECK(first(2) == first(1));
  }
  const peft::internal::HeadLayer stacked{
      std::make_shared<peft::AttentionImpl>(peft::AttentionOptions(4, 2).kv_heads(2)), {}, {}};
  CHECK(stacked.fits(16));
  CHECK(stacked.rows(16, {1, 3}) == std::vector<int64_t>{2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  CHECK_FALSE(stacked.fits(10));
  CHECK_FALSE(stacked.fits(17));
}

TEST_CASE("HiFi leaves layers without a kept head, and the model as it was", "[hifi]") {
  Model model;
  const auto y = model->forward(Texts().x, Texts().bias);
  const auto adapter = projections(model);
  const auto found = peft::initialize_hifi(*model, adapter, batches(model), HifiOptions(1).per_layer(false));
  CHECK(found.kept.at(0).size() + found.kept.at(1).size() == 2);
  CHECK(torch::equal(model->forward(Texts().x, Texts().bias), y));
  CHECK(model->is_training());
  CHECK(model->first->attention->adapters().empty());
  CHECK(peft::active_adapters(*model) == std::vector<std::string>{"default"});
}

TEST_CASE("HiFi says what is wrong before anything is changed", "[hifi]") {
  Model model;
  const auto adapter = projections(model);
  const auto run = [&](const HifiOptions& options) {
    peft::initialize_hifi(*model, adapter, batches(model), options);
  };
  CHECK_THROWS_WITH(run(HifiOptions(0)), Contains("heads must be at least 1, but got 0"));
  CHECK_THROWS_WITH(run(HifiOptions(5)),
                    Contains("2 problems: heads must be at most the 4 of 'first.attention', but got 5"));
  CHECK_THROWS_WITH(run(HifiOptions(1).energy(0)), Contains("energy must be in (0, 1], but got 0"));
  CHECK_THROWS_WITH(run(HifiOptions(1).damping(1)), Contains("damping must be in [0, 1), but got 1"));
  CHECK_THROWS_WITH(run(HifiOptions(1).samples(0)), Contains("samples must be at least 1, but got 0"));
  CHECK_THROWS_WITH(peft::initialize_hifi(*model, adapter, [](Tensor&) { return false; }),
                    Contains("expected at least one text, but got none"));
  CHECK_THROWS_WITH(peft::initialize_hifi(*model, adapter,
                                          [&](Tensor& used) {
                                            used = torch::ones({2, 3}, torch::kBool);
                                            model->forward(Texts().x, {});
                                            return true;
                                          }),
                    Contains("the mask of used positions must be (2, 7), but got (2, 3)"));
  CHECK(adapter.count() == 0);
  CHECK_THROWS_WITH(model->forward(Texts().x, {}),
                    Contains("': 'rows' has nothing to train yet (hint: call initialize_hifi)"));

  const auto other = peft::add_adapter(*model, RowsOptions(), peft::named({"first.key"}), "other");
  nn::Sequential alone(peft::Linear(4, 4));
  const auto nowhere = peft::add_adapter(*alone, RowsOptions(), peft::all());
  CHECK_THROWS_WITH(peft::initialize_hifi(*alone, nowhere, [](Tensor&) { return false; }),
                    Contains("this model has no attention sites (hint: peft::Attention)") &&
                        Contains("'0' must be a projection beside an attention, but there is none"));
  auto odd = std::make_shared<ModelImpl>(2);
  odd->first->attention->options.head_width(5);
  const auto misfit = peft::add_adapter(*odd, RowsOptions(), peft::named({"first.query"}));
  CHECK_THROWS_WITH(peft::initialize_hifi(*odd, misfit, [](Tensor&) { return false; }),
                    Contains("'first.query' must have the outputs of 4 heads of width 5"));
  const auto biases =
      peft::add_adapter(*odd, RowsOptions().rows({1}), peft::named({"second.query"}), "fixed");
  const peft::AdamW optimizer(biases, torch::optim::AdamWOptions(0.1));
  CHECK_THROWS_WITH(peft::initialize_hifi(*odd, biases, [](Tensor&) { return false; }),
                    Contains("already has an optimizer"));
}

TEST_CASE("Rows must be outputs, ascending", "[rows]") {
  peft::Linear layer(4, 3);
  const auto add = [&](std::vector<int64_t> rows) {
    peft::add_adapter(*layer, RowsOptions().rows(std::move(rows)), peft::named({""}));
  };
  CHECK_THROWS_WITH(add({2, 1}), Contains("rows must ascend from 0 or more, but got 1 where at least 3"));
  CHECK_THROWS_WITH(add({-1}), Contains("but got -1"));
  CHECK_THROWS_WITH(peft::RowsImpl(RowsOptions().rows({3}), layer->info()),
                    Contains("rows must be below its 3 outputs, but got 3"));
  peft::Embedding table(5, 4);
  CHECK_THROWS_WITH(peft::RowsImpl(RowsOptions().rows({3}), table->info()),
                    Contains("rows of inputs, not outputs (hint: TrainableTokens)"));
}

TEST_CASE("HiFi's rows go through files of this library's own", "[hifi]") {
  Model model, other;
  const auto adapter = projections(model);
  peft::initialize_hifi(*model, adapter, batches(model), HifiOptions(2));
  shake(adapter);
  const auto config = through_files(adapter, *other);
  CHECK(config["peft_type"] == "REPLACE");
  CHECK(config["method"] == "ROWS");
  CHECK(config["rows"]["first.key"] == nlohmann::json{{3, 3}, {9, 3}});
  const Texts texts;
  CHECK(torch::equal(other->forward(texts.x, texts.bias), model->forward(texts.x, texts.bias)));

  const auto refused = [&](const nlohmann::json& runs, const std::string& text) {
    Model fresh;
    CHECK_THROWS_WITH(
        load_changed(adapter, *fresh, [&](nlohmann::json& json) { json["rows"]["first.key"] = runs; }),
        Contains(text));
    CHECK(fresh->first->key->adapters().empty());
  };
  refused({{3, 3}}, "'base_model.model.first.key.rows.weight' expected (3, 12), but got (6, 12)");
  refused({{3, 3}, {4, 3}}, "'rows' must map layers to ascending runs [first row, number of rows], but got");
  refused({{3, 0}}, "ascending runs");
  refused({{9, 6}}, "'first.key': adapter_config.json: 'rows' must be below its 12 outputs, but got 14");
}

TEST_CASE("Rows that an archive brought are those that a file names", "[rows]") {
  const auto make = [](std::vector<int64_t> rows) {
    nn::Sequential net(peft::Linear(4, 6));
    shake(peft::add_adapter(*net, RowsOptions().rows(std::move(rows)), peft::all()));
    return net;
  };
  auto net = make({2, 3, 5}), other = make({0, 1, 2});
  through_archive(*other, *net);
  const auto x = torch::randn({3, 4});
  CHECK(torch::equal(net->forward(x), other->forward(x)));
  nn::Sequential read(peft::Linear(4, 6));
  const auto config = through_files(peft::adapter(*net, "default"), *read);
  CHECK(config["rows"]["0"] == nlohmann::json::parse("[[0, 3]]"));
}
