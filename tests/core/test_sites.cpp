#include <cmath>
#include <limits>
#include <sstream>
#include <thread>

#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::LoraInit;
using peft::LoraOptions;
using peft::named;
using Names = std::vector<std::string>;

namespace {

/// The same model of plain layers and of sites, by its layer types; a plain nn::Module, without a clone().
template <class Embedding, class Linear, class LayerNorm>
struct TextImpl : nn::Module {
  TextImpl()
      : embed(this->register_module("embed", Embedding(nn::EmbeddingOptions(7, 4)))),
        norm(this->register_module("norm", LayerNorm(nn::LayerNormOptions({4})))),
        query(this->register_module("query", Linear(nn::LinearOptions(4, 4)))),
        head(this->register_module("head", nn::Linear(4, 2))) {}
  Tensor forward(const Tensor& ids) {
    const peft::ForwardScope scope;
    return head->forward(torch::tanh(query->forward(norm->forward(embed->forward(ids)))));
  }
  Embedding embed;
  LayerNorm norm;
  Linear query;
  nn::Linear head;
};
using PlainText = TextImpl<nn::Embedding, nn::Linear, nn::LayerNorm>;
using SiteText = TextImpl<peft::Embedding, peft::Linear, peft::LayerNorm>;

Tensor ids() { return torch::tensor({{0, 3, 6}, {1, 1, 5}}); }

/// Two sites and a plain layer in a parent that LibTorch can clone.
struct PairImpl : nn::Cloneable<PairImpl> {
  PairImpl() { PairImpl::reset(); }
  void reset() override {
    first = register_module("first", peft::Linear(4, 4));
    second = register_module("second", peft::Linear(4, 4));
    plain = register_module("plain", nn::Linear(4, 3));
  }
  Tensor forward(const Tensor& x) {
    const peft::ForwardScope scope;
    return plain->forward(second->forward(torch::tanh(first->forward(x))));
  }
  peft::Linear first{nullptr}, second{nullptr};
  nn::Linear plain{nullptr};
};
TORCH_MODULE(Pair);

/// A user's sublayer, of which the library knows the function only.
struct SublayerImpl : nn::Cloneable<SublayerImpl> {
  SublayerImpl(int64_t inputs, int64_t inner) : in(inputs), width(inner) { SublayerImpl::reset(); }
  void reset() override {
    up = register_module("up", nn::Linear(in, width));
    down = register_module("down", nn::Linear(width, in));
    scale = register_parameter("scale", torch::full({1}, 0.5));
    calls = register_buffer("calls", torch::zeros({1}));
  }
  Tensor forward(const Tensor& x) { return down->forward(torch::relu(up->forward(x))) * scale; }
  int64_t in, width;
  nn::Linear up{nullptr}, down{nullptr};
  Tensor scale, calls;
};
TORCH_MODULE(Sublayer);

/// A method on the sublayer: F(x) + shift.
struct ShiftOptions {
  static constexpr peft::Needs needs = peft::Needs::function;
  static constexpr const char* method = "shift";
};
class ShiftImpl : public peft::Piece<ShiftImpl, ShiftOptions> {
 public:
  ShiftImpl(ShiftOptions settings, const peft::SiteInfo& site) : Piece(ShiftOptions::method, settings, site) {
    shift = register_parameter("shift", torch::empty({1}));
  }
  Tensor forward(const Tensor& x, const peft::LayerView& layer) override { return layer.forward(x) + shift; }
  peft::Weights effective(const peft::Weights&, const peft::LayerView&) const override {
    TORCH_CHECK(false, not_mergeable());
  }
  std::string not_mergeable() const override { return "shift works on activations and cannot be merged"; }
  bool works_on_activations() const override { return true; }
  void initialize(const peft::LayerView&) override { nn::init::constant_(shift, 0.5); }
  Tensor shift;
};
std::string refusal(const ShiftOptions&, const peft::SiteInfo&) { return {}; }
std::shared_ptr<peft::PieceImpl> make_piece(const ShiftOptions& options, const peft::SiteInfo& site) {
  return std::make_shared<ShiftImpl>(options, site);
}

/// A weight method that does not commute with LoRA: W′ = factor · W.
struct FactorOptions {
  static constexpr peft::Needs needs = peft::Needs::weights;
  static constexpr const char* method = "factor";
};
class FactorImpl : public peft::Piece<FactorImpl, FactorOptions> {
 public:
  FactorImpl(FactorOptions settings, const peft::SiteInfo& site)
      : Piece(FactorOptions::method, settings, site) {
    factor = register_parameter("factor", torch::empty({1}));
  }
  peft::Weights effective(const peft::Weights& weights, const peft::LayerView&) const override {
    return {weights.weight * factor, weights.bias};
  }
  void initialize(const peft::LayerView&) override { nn::init::constant_(factor, 2.0); }
  Tensor factor;
};
std::string refusal(const FactorOptions&, const peft::SiteInfo&) { return {}; }
std::shared_ptr<peft::PieceImpl> make_piece(const FactorOptions& options, const peft::SiteInfo& site) {
  return std::make_shared<FactorImpl>(options, site);
}

Tensor dense_change(const peft::LoraImpl& piece) {
  return at::mm(piece.lora_B, piece.lora_A).detach() * piece.scaling();
}

}  // namespace

TEST_CASE("A model of sites has the keys of the plain model, and its adapters keys of their own", "[site]") {
  torch::manual_seed(1);
  const auto plain = std::make_shared<PlainText>();
  const auto model = std::make_shared<SiteText>();
  const auto keys = plain->named_parameters().keys();
  CHECK(model->named_parameters().keys() == keys);

  auto adapter = peft::add_adapter(*model, LoraOptions(2), named({"query", "embed"}), "topics");
  peft::train_also(adapter, *model, named({"norm"}));
  auto with_adapter = keys;
  for (const auto* key :
       {"embed.topics.lora.lora_A", "embed.topics.lora.lora_B", "query.topics.lora.lora_A",
        "query.topics.lora.lora_B", "norm.topics.replace.weight", "norm.topics.replace.bias"}) {
    with_adapter.emplace_back(key);
  }
  CHECK_THAT(model->named_parameters().keys(), Catch::Matchers::UnorderedEquals(with_adapter));
}

TEST_CASE("Checkpoints go from plain to adapted models and back", "[site]") {
  torch::manual_seed(1);
  const auto plain = std::make_shared<PlainText>();
  const auto model = std::make_shared<SiteText>();
  const auto x = ids();
  auto adapter = peft::add_adapter(*model, LoraOptions(2), named({"query", "embed"}), "topics");
  shake(adapter);
  const auto a = adapter.named_parameters().at(1).second.detach().clone();

  through_archive(*plain, *model);  // the base's values come in, the adapter stays
  CHECK(torch::equal(adapter.named_parameters().at(1).second, a));
  {
    const auto off = peft::disabled(*model);
    CHECK(torch::equal(model->forward(x), plain->forward(x)));
  }
  CHECK(largest(model->forward(x), plain->forward(x)) > 1e-4);
  CHECK(torch::equal(model->query->base->weight, plain->query->weight));
  CHECK_FALSE(model->query->base->weight.requires_grad());

  const auto other = std::make_shared<PlainText>();  // the adapted checkpoint holds the plain one
  through_archive(*model, *other);
  CHECK(torch::equal(other->forward(x), plain->forward(x)));

  const auto twin = std::make_shared<SiteText>();  // and carries the adapter between adapted models
  peft::add_adapter(*twin, LoraOptions(2), named({"query", "embed"}), "topics");
  through_archive(*model, *twin);
  CHECK(torch::equal(twin->forward(x), model->forward(x)));

  const auto bare = std::make_shared<SiteText>();  // a model without the adapter leaves it out
  through_archive(*model, *bare);
  CHECK(torch::equal(bare->forward(x), plain->forward(x)));

  nn::Linear without_bias(nn::LinearOptions(4, 4).bias(false));
  CHECK_THROWS_WITH(through_archive(*without_bias, *model->query), Contains("bias"));
}

TEST_CASE("A site alone computes what its layer does, options and all", "[site]") {
  torch::manual_seed(2);
  const auto x = torch::randn({2, 4, 9});
  nn::Conv1d layer(nn::Conv1dOptions(4, 6, 3).stride(2).padding(1).groups(2).padding_mode(torch::kReflect));
  peft::Adapted site(layer);  // deduced
  CHECK(torch::equal(site->forward(x), layer->forward(x)));
  CHECK(site->base.ptr() == layer.ptr());
  nn::Embedding table(nn::EmbeddingOptions(7, 4).padding_idx(2));
  CHECK(torch::equal(peft::Embedding(table)->forward(ids()), table->forward(ids())));
  nn::LayerNorm norm(nn::LayerNormOptions({9}).eps(0.1));
  CHECK(torch::equal(peft::LayerNorm(norm)->forward(x), norm->forward(x)));
  const auto skip = torch::randn_like(x);
  CHECK(torch::equal(peft::Residual(norm)->forward(x, skip), norm->forward(x + skip)));
  nn::LayerNorm bare(nn::LayerNormOptions({9}).elementwise_affine(false));
  CHECK(torch::equal(peft::LayerNorm(bare)->forward(x), bare->forward(x)));
  CHECK_FALSE(peft::LayerNorm(bare)->info().offers_to(peft::Needs::weights));
}

TEST_CASE("A copy has its own tensors, activation and record, and the same adapters", "[site]") {
  torch::manual_seed(4);
  Pair model;
  const auto x = torch::randn({5, 4});
  auto one = peft::add_adapter(*model, LoraOptions(2).init(LoraInit::random), named({"first"}), "one");
  auto two = peft::add_adapter(*model, LoraOptions(3).init(LoraInit::random), named({"second"}), "two");
  peft::set_active(*model, {"two"});
  two.scale(0.25);
  one.layers<peft::LoraImpl>().at(0)->lora_A.set_requires_grad(false);
  one.record().has_optimizer = true;
  model->eval();
  const auto before = model->forward(x).detach();

  auto copy = peft::clone(*model);
  CHECK(torch::equal(copy->forward(x), before));
  CHECK(peft::active_adapters(*copy) == Names{"two"});
  CHECK_FALSE(copy->first->is_training());
  CHECK_FALSE(copy->first->base->is_training());
  CHECK(peft::adapter(*copy, "two").layers<peft::LoraImpl>().at(0)->scaling() ==
        two.layers<peft::LoraImpl>().at(0)->scaling());
  CHECK_FALSE(peft::adapter(*copy, "one").record().has_optimizer);
  const auto from = model->named_parameters();
  const auto into = copy->named_parameters();
  REQUIRE(from.keys() == into.keys());
  for (const auto& item : from) {
    INFO(item.key());
    CHECK(into[item.key()].requires_grad() == item.value().requires_grad());
    CHECK(into[item.key()].data_ptr() != item.value().data_ptr());
    CHECK(torch::equal(into[item.key()], item.value()));
  }
  CHECK_FALSE(copy->plain->weight.requires_grad());

  peft::set_active(*copy, {"one", "two"});
  CHECK(peft::active_adapters(*model) == Names{"two"});
  CHECK(copy->first->activation() == copy->second->activation());
  shake(peft::adapter(*copy, "two"));
  peft::rename(*copy, "one", "uno");
  peft::remove_adapter(*copy, "two");
  CHECK(torch::equal(model->forward(x), before));
  CHECK(one.name() == "one");

  // LibTorch's own clone() copies sites as well, but makes frozen plain layers trainable again.
  const auto plain_clone = std::dynamic_pointer_cast<PairImpl>(model->clone());
  CHECK(torch::equal(plain_clone->forward(x), before));
  CHECK_FALSE(plain_clone->first->base->weight.requires_grad());
  CHECK(plain_clone->plain->weight.requires_grad());
  CHECK(peft::adapter(*plain_clone, "two").count() == two.count());
}

TEST_CASE("A copy of a merged model unmerges to its own originals", "[site]") {
  torch::manual_seed(4);
  Pair model;
  const auto x = torch::randn({5, 4});
  shake(peft::add_adapter(*model, LoraOptions(2), named({"first"}), "one"));
  const auto adapted = model->forward(x).detach();
  const auto original = model->first->base->weight.detach().clone();
  peft::merge(*model);
  auto copy = peft::clone(*model);
  CHECK(torch::equal(copy->forward(x), model->forward(x)));
  CHECK_THROWS_WITH(peft::merge(*copy), Contains("is merged (hint: unmerge first)"));
  peft::unmerge(*copy);
  CHECK(torch::equal(copy->first->base->weight, original));
  CHECK(torch::equal(copy->forward(x), adapted));
  CHECK_FALSE(torch::equal(model->first->base->weight, original));
  peft::unmerge(*model);
  CHECK(torch::equal(model->forward(x), adapted));
  CHECK(model->first->base->weight.data_ptr() != copy->first->base->weight.data_ptr());
}

TEST_CASE("train() and to() reach the base, the pieces and what a merge keeps", "[site]") {
  torch::manual_seed(5);
  Pair model;
  model->eval();
  auto adapter = peft::add_adapter(*model, LoraOptions(2), named({"first"}), "one");
  shake(adapter);
  const auto piece = adapter.layers<peft::LoraImpl>().at(0);
  CHECK_FALSE(piece->is_training());
  model->train();
  CHECK(model->first->base->is_training());
  CHECK(piece->is_training());
  model->eval();
  CHECK_FALSE(model->first->base->is_training());
  CHECK_FALSE(piece->is_training());

  const auto x = torch::randn({5, 4});
  const auto expected = model->forward(x).detach();
  const auto original = model->first->base->weight.detach().clone();
  const auto move = GENERATE(0, 1, 2);
  peft::merge(*model);
  switch (move) {
    case 0:
      model->to(torch::kFloat64);
      break;
    case 1:
      model->to(torch::kCPU, torch::kFloat64);
      break;
    default:
      model->to(torch::kCPU);
      model->to(torch::kFloat64);
  }
  CHECK(model->first->base->weight.scalar_type() == torch::kFloat64);
  CHECK(model->second->base->bias.scalar_type() == torch::kFloat64);
  CHECK(piece->lora_A.scalar_type() == torch::kFloat64);
  CHECK(largest(model->forward(x.to(torch::kFloat64)).detach(), expected.to(torch::kFloat64)) < 1e-5);
  peft::unmerge(*model);
  CHECK(torch::equal(model->first->base->weight, original.to(torch::kFloat64)));
  CHECK(model->first->named_parameters()["weight"].is_same(model->first->base->weight));
  CHECK(largest(model->forward(x.to(torch::kFloat64)).detach(), expected.to(torch::kFloat64)) < 1e-5);
}

TEST_CASE("Adapters compose like functions, in the order they were activated", "[site]") {
  torch::manual_seed(6);
  peft::Linear site(4, 3);
  site->to(torch::kFloat64);
  const auto x = torch::randn({5, 4}, torch::kFloat64);
  const auto weight = site->base->weight.detach().clone(), bias = site->base->bias.detach().clone();
  auto a = peft::add_adapter(*site, LoraOptions(2), peft::all(), "a");
  auto b = peft::add_adapter(*site, LoraOptions(3).alpha(5), peft::all(), "b");
  shake(a);
  shake(b);
  peft::add_adapter(*site, FactorOptions(), peft::all(), "double");
  const auto delta_a = dense_change(*a.layers<peft::LoraImpl>().at(0));
  const auto delta_b = dense_change(*b.layers<peft::LoraImpl>().at(0));
  const auto check = [&](const Names& names, const Tensor& expected) {
    peft::set_active(*site, names);
    const auto y = at::linear(x, expected, bias);
    CHECK(largest(site->forward(x).detach(), y) < 1e-12);
    if (names.empty()) return;
    peft::merge(*site);
    CHECK(largest(site->base->weight.detach(), expected) < 1e-12);
    peft::unmerge(*site);
    CHECK(torch::equal(site->base->weight, weight));
  };
  check({}, weight);
  check({"a"}, weight + delta_a);
  check({"a", "b"}, weight + delta_a + delta_b);
  check({"double"}, weight * 2);
  check({"double", "a"}, weight * 2 + delta_a);
  check({"a", "double"}, (weight + delta_a) * 2);
  check({"b", "double", "a"}, (weight + delta_b) * 2 + delta_a);
  CHECK(largest(peft::adapter(*site, "double").effective_delta(""), weight) < 1e-12);
  CHECK(largest(a.effective_delta(""), delta_a) < 1e-12);
}

TEST_CASE("Each row of a batch can use its own adapter", "[rows]") {
  torch::manual_seed(8);
  const auto model = std::make_shared<SiteText>();
  model->to(torch::kFloat64);
  auto german = peft::add_adapter(*model, LoraOptions(2), named({"query", "embed"}), "german");
  auto french = peft::add_adapter(*model, LoraOptions(3), named({"query"}), "french");
  peft::train_also(french, *model, named({"norm"}));
  shake(german);
  shake(french);
  const auto x = torch::tensor({{0, 3, 6}, {1, 1, 5}, {2, 4, 4}, {0, 3, 6}, {6, 5, 0}});
  const Names rows{"french", "__base__", "german", "german", "french"};

  const peft::RowAdapters refused_in_training(rows);
  CHECK_THROWS_WITH(model->forward(x),
                    Contains("mixed batches are for inference") && Contains("training mode"));
  model->eval();

  std::vector<Tensor> alone;
  for (size_t i = 0; i < rows.size(); ++i) {
    const peft::RowAdapters one({rows[i]});  // the inner one holds
    alone.push_back(model->forward(x.narrow(0, static_cast<int64_t>(i), 1)));
  }
  const auto mixed = model->forward(x);
  CHECK(largest(mixed.detach(), torch::cat(alone).detach()) < 1e-12);
  CHECK_THROWS_WITH(model->forward(x.narrow(0, 0, 4)), Contains("expected 5 rows, one a name, but got 4"));
  {
    const peft::RowAdapters unknown({"french", "german", "germn", "french", "french"});
    CHECK_THROWS_WITH(model->forward(x),
                      Contains("RowAdapters: the model has no adapter 'germn'; it has 'german'"));
  }
  CHECK_THROWS_WITH(peft::RowAdapters(Names{}), Contains("expected one adapter name a row"));
  {
    peft::Linear bare(4, 4);  // names are checked where no adapter is, too
    bare->eval();
    const peft::RowAdapters unknown({"german", "german"});
    CHECK_THROWS_WITH(bare->forward(torch::ones({2, 4})),
                      Contains("the model has no adapter 'german'; it has none"));
  }
  {
    const auto off = peft::disabled(*model);
    const auto plain = model->forward(x);
    const peft::RowAdapters base(Names(5, "__base__"));
    CHECK(torch::equal(model->forward(x), plain));
  }
  peft::merge(*model);
  CHECK_THROWS_WITH(model->forward(x), Contains("is merged (hint: unmerge first)"));

  peft::LSTM lstm(4, 3);  // which runs on its weights alone
  peft::add_adapter(*lstm, LoraOptions(2), named({"weight_ih_l0"}), "german");
  peft::merge(*lstm);
  lstm->eval();
  const peft::RowAdapters base({"__base__", "__base__"});
  CHECK_THROWS_WITH(lstm->forward(torch::ones({5, 2, 4})), Contains("is merged (hint: unmerge first)"));
}

TEST_CASE("Rows with adapters equal whole batches with the adapter set active", "[rows]") {
  torch::manual_seed(9);
  const auto model = std::make_shared<SiteText>();
  model->to(torch::kFloat64);
  shake(peft::add_adapter(*model, LoraOptions(2), named({"query", "embed"}), "german"));
  shake(peft::add_adapter(*model, peft::BiasOptions(), named({"query"}), "french"));
  model->eval();
  const auto x = ids();
  for (const auto& name : {"german", "french"}) {
    peft::set_active(*model, {name});
    const auto expected = model->forward(x).detach();
    peft::set_active(*model, {});
    const peft::RowAdapters rows({name, name});
    CHECK(largest(model->forward(x).detach(), expected) < 1e-12);
  }
}

TEST_CASE("A forward scope sees one set of adapters, whatever another thread does", "[activation]") {
  torch::manual_seed(10);
  Pair model;
  const auto x = torch::randn({3, 4});
  shake(peft::add_adapter(*model, LoraOptions(2), named({"first"}), "a"));
  shake(peft::add_adapter(*model, LoraOptions(2), named({"first"}), "b"));
  const auto output = [&](const Names& names) {
    peft::set_active(*model, names);
    return model->first->forward(x).detach();
  };
  const auto with_a = output({"a"}), with_b = output({"b"});
  REQUIRE_FALSE(torch::equal(with_a, with_b));
  peft::set_active(*model, {"a"});
  const auto switch_to = [&](const Names& names) {
    std::thread([&] { peft::set_active(*model, names); }).join();
  };
  {
    const peft::ForwardScope scope;
    CHECK(torch::equal(model->first->forward(x), with_a));
    switch_to({"b"});
    CHECK(torch::equal(model->first->forward(x), with_a));
    {
      const peft::ForwardScope inner;  // shares the outer one's snapshot
      CHECK(torch::equal(model->first->forward(x), with_a));
    }
    CHECK(torch::equal(model->first->forward(x), with_a));
    Tensor elsewhere;
    std::thread([&] { elsewhere = model->first->forward(x).detach(); }).join();
    CHECK(torch::equal(elsewhere, with_b));
  }
  CHECK(torch::equal(model->first->forward(x), with_b));
  const auto site = [&] { return model->first->forward(x).detach(); };
  switch_to({"a"});
  CHECK(torch::equal(site(), with_a));  // without a scope, each call looks
  switch_to({"b"});
  CHECK(torch::equal(site(), with_b));
}

TEST_CASE("Two models in one forward scope keep their own snapshots", "[activation]") {
  torch::manual_seed(10);
  peft::Linear one(4, 4), two(4, 4);
  const auto x = torch::randn({3, 4});
  const auto plain = one->forward(x).detach();
  shake(peft::add_adapter(*one, LoraOptions(2), peft::all(), "a"));
  shake(peft::add_adapter(*two, LoraOptions(2), peft::all(), "a"));
  const auto adapted = two->forward(x).detach();
  peft::disable(*one);
  const peft::ForwardScope scope;
  CHECK(torch::equal(one->forward(x), plain));
  CHECK(torch::equal(two->forward(x), adapted));
}

TEST_CASE("A user's module becomes a site by its function", "[site]") {
  torch::manual_seed(12);
  Sublayer layer(4, 8);
  const auto x = torch::randn({3, 4});
  const auto keys = layer->named_parameters().keys();
  const auto plain = layer->forward(x).detach();
  peft::Adapted<Sublayer> site(layer);
  CHECK(torch::equal(site->forward(x), plain));
  CHECK(site->named_parameters().keys() == keys);
  CHECK(site->named_buffers().keys() == Names{"calls"});
  CHECK(site->info().offers_to(peft::Needs::function));
  CHECK_FALSE(site->info().offers_to(peft::Needs::weights));
  CHECK(site->base_parameters().keys() == keys);

  CHECK_THROWS_WITH(peft::add_adapter(*site, LoraOptions(2), peft::all()),
                    Contains("matches no site that can take it"));
  auto adapter = peft::add_adapter(*site, ShiftOptions(), peft::all(), "one");
  CHECK(largest(site->forward(x).detach(), plain + 0.5) < 1e-6);
  CHECK(adapter.count() == 1);
  CHECK(peft::summary(*site).trainable == 1);
  for (const auto& parameter : layer->parameters()) CHECK_FALSE(parameter.requires_grad());
  CHECK(site->base_parameters().keys() == keys);
  CHECK_THROWS_WITH(peft::merge(*site), Contains("shift works on activations and cannot be merged"));

  const auto copy = std::dynamic_pointer_cast<peft::Adapted<Sublayer>::Impl>(site->clone());
  REQUIRE(copy);
  CHECK(torch::equal(copy->forward(x), site->forward(x)));
  CHECK(copy->base->up->weight.data_ptr() != layer->up->weight.data_ptr());
  peft::Adapted<Sublayer> fresh(4, 8);
  through_archive(*layer, *fresh);
  CHECK(torch::equal(fresh->forward(x), plain));
  through_archive(*site, *layer);
  CHECK(torch::equal(layer->forward(x), plain));
  site->to(torch::kFloat64);
  CHECK(layer->scale.scalar_type() == torch::kFloat64);
  CHECK(site->forward(x.to(torch::kFloat64)).scalar_type() == torch::kFloat64);
  site->eval();
  CHECK_FALSE(layer->down->is_training());
}

TEST_CASE("base_parameters are the layer's own, under its keys", "[site]") {
  torch::manual_seed(13);
  peft::Linear site(4, 3);
  CHECK(site->base_parameters().keys() == Names{"weight", "bias"});
  peft::add_adapter(*site, LoraOptions(2), peft::all());
  CHECK(site->base_parameters().keys() == Names{"weight", "bias"});
  CHECK(site->base_parameters()["weight"].is_same(site->base->weight));
  CHECK(peft::Linear(nn::LinearOptions(4, 3).bias(false))->base_parameters().keys() == Names{"weight"});
  CHECK(peft::Attention(peft::AttentionOptions(2, 4))->base_parameters().is_empty());
}

TEST_CASE("The attention site is softmax(q k' / sqrt(width) + bias) v", "[attention]") {
  torch::manual_seed(14);
  const auto options = torch::dtype(torch::kFloat64);
  const int64_t heads = 4, width = 5, queries = 3, keys = 6;
  const auto kv_heads = GENERATE(int64_t{4}, int64_t{2}, int64_t{1});
  const auto causal = GENERATE(false, true);
  const auto bias_kind = GENERATE(0, 1, 2);
  CAPTURE(kv_heads, causal, bias_kind);
  const auto q = torch::randn({2, heads, queries, width}, options);
  const auto k = torch::randn({2, kv_heads, keys, width}, options);
  const auto v = torch::randn({2, kv_heads, keys, width}, options);
  Tensor bias;
  if (bias_kind == 1) bias = torch::randn({2, heads, queries, keys}, options);
  if (bias_kind == 2) {  // a padding mask
    bias = torch::zeros({2, 1, 1, keys}, options);
    bias.index_put_({1, 0, 0, keys - 1}, std::numeric_limits<double>::lowest());
  }
  const auto k_all = k.repeat_interleave(heads / kv_heads, 1),
             v_all = v.repeat_interleave(heads / kv_heads, 1);
  auto scores = at::matmul(q, k_all.transpose(-2, -1)) / std::sqrt(static_cast<double>(width));
  if (bias.defined()) scores = scores + bias;
  if (causal) {
    const auto future = torch::ones({queries, keys}).triu(1 + keys - queries).to(torch::kBool);
    scores = scores.masked_fill(future, -std::numeric_limits<double>::infinity());
  }
  const auto expected =
      at::matmul(torch::softmax(scores, -1), v_all).transpose(1, 2).reshape({2, queries, heads * width});
  peft::Attention site(peft::AttentionOptions(heads, width).kv_heads(kv_heads).causal(causal));
  CHECK(largest(site->forward(q, k, v, bias), expected) < 1e-12);
  const auto copy = std::dynamic_pointer_cast<peft::AttentionImpl>(site->clone());
  CHECK(largest(copy->forward(q, k, v, bias), expected) < 1e-12);
}

TEST_CASE("The attention site drops probabilities in training only", "[attention]") {
  torch::manual_seed(15);
  const auto q = torch::randn({1, 2, 16, 4}), v = torch::randn({1, 2, 16, 4});
  peft::Attention site(peft::AttentionOptions(2, 4).dropout(0.5));
  peft::Attention without(peft::AttentionOptions(2, 4));
  CHECK(largest(site->forward(q, q, v, {}), without->forward(q, q, v, {})) > 1e-2);
  site->eval();
  CHECK(largest(site->forward(q, q, v, {}), without->forward(q, q, v, {})) < 1e-6);
  CHECK(site->named_parameters().is_empty());
  CHECK_THROWS_WITH(peft::add_adapter(*site, LoraOptions(2), peft::all()), Contains("matches no site"));
}

TEST_CASE("Input sites pass on what they get until a method changes it", "[input]") {
  peft::InputEmbeddings words(peft::InputOptions(4));
  peft::EmbeddingOutput hidden(peft::InputOptions(4));
  const peft::Embedded embedded{
      torch::randn({2, 3, 4}), torch::ones({2, 3}), torch::arange(3).view({1, 3}), {}};
  for (const auto& result : {words->forward(embedded), hidden->forward(embedded)}) {
    CHECK(result.values.is_same(embedded.values));
    CHECK(result.mask.is_same(embedded.mask));
    CHECK(result.positions.is_same(embedded.positions));
    CHECK_FALSE(result.types.defined());
  }
  CHECK(words->parameters().empty());
  CHECK(words->info().offers_to(peft::Needs::input));
}
