#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "io/temporary_folder.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_formats.h"
#include "peft/methods/increlora.h"
#include "property_suite.h"

using namespace suite;
using peft::IncreLoraImpl;
using peft::IncreLoraOptions;

namespace {

IncreLoraOptions small(int64_t rank = 2) { return IncreLoraOptions(4).rank(rank).alpha(3); }

Promise increlora(const IncreLoraOptions& options) {
  return {{peft::on(options, peft::all())}, [options](const peft::SiteInfo& site) {
            return options.rank() * (site.fan_in[0] + site.fan_out + 1);
          }};
}

/// A linear site in double precision whose IncreLoRA has grown by one rank and does something.
struct Grown {
  explicit Grown(const IncreLoraOptions& options = small()) {
    torch::manual_seed(4);
    site->to(torch::kFloat64);
    adapter = std::make_shared<peft::Adapter>(peft::add_adapter(*site, options, peft::all(), "one"));
    piece = adapter->layers<IncreLoraImpl>().at(0);
    piece->reserve(1);
    piece->activate(1);
    piece->reserve(1);
    shake(*adapter);
  }
  peft::Linear site{6, 4};
  std::shared_ptr<peft::Adapter> adapter;
  std::shared_ptr<IncreLoraImpl> piece;
};

Tensor randn(std::vector<int64_t> shape) {
  torch::manual_seed(11);
  return torch::randn(shape, torch::kFloat64);
}

}  // namespace

TEST_CASE("IncreLoRA keeps the promises of a method on linear layers", "[increlora]") {
  for (const auto& layer_case : layer_cases()) {
    if (layer_case.name.rfind("Linear", 0) != 0) {
      CHECK_THROWS_WITH(peft::add_adapter(*layer_case.make(), {peft::on(small(), peft::named({""}))}),
                        Contains("takes no IncreLoRA") || Contains("no module"));
      continue;
    }
    check_properties(layer_case, increlora(small()));
    check_properties(layer_case, increlora(small(1).alpha(0).advance_learn(false)));
  }
}

TEST_CASE("IncreLoRA is for linear layers only", "[increlora]") {
  torch::nn::Sequential net(torch::nn::Embedding(5, 4), torch::nn::Conv1d(4, 4, 1),
                            torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})));
  for (const auto& [name, kind] : {std::pair{"0", "a Embedding"}, {"1", "a Conv1d"}, {"2", "a LayerNorm"}}) {
    CHECK_THROWS_WITH(peft::add_adapter(*net, small(), peft::named({name})),
                      Contains(std::string(kind) + " takes no IncreLoRA, which is for linear layers"));
  }
}

TEST_CASE("IncreLoRA concatenates its chunks and divides by the active rank", "[increlora]") {
  Grown grown;
  const auto& piece = *grown.piece;
  CHECK(piece.rank() == 3);
  CHECK(piece.chunks() == 3);
  CHECK(piece.scaling() == 3 / (3 + 1e-5));
  const auto A = torch::cat(
      {piece.lora_A[0] * piece.lora_E[0], piece.lora_A[1] * piece.lora_E[1], piece.lora_A[2] * 1e-5});
  const auto B = torch::cat({piece.lora_B[0], piece.lora_B[1], piece.lora_B[2]}, 1);
  const auto delta = at::mm(B, A) * (3 / (3 + 1e-5));
  CHECK(largest(grown.adapter->effective_delta(""), delta.detach()) < 1e-15);
  const auto x = randn({2, 5, 6});
  CHECK(largest(grown.site->forward(x), grown.site->base->forward(x) + at::linear(x, delta)) < 1e-14);

  // The reserve's A and B train, its E does not.
  for (const auto& [key, tensor] : grown.adapter->named_tensors()) {
    INFO(key);
    CHECK(tensor.requires_grad() == (key != "increlora.lora_E_2"));
  }
  Grown later(small().advance_learn(false));
  CHECK(later.piece->lora_E[2].item<double>() == 0);
  for (const auto& [key, tensor] : later.adapter->named_tensors()) {
    INFO(key);
    CHECK(tensor.requires_grad() == !key.ends_with("_2"));
  }
  CHECK(later.adapter->count() == 3 * (6 + 4 + 1));
}

TEST_CASE("IncreLoRA starts and grows from normal numbers, A before B", "[increlora]") {
  torch::manual_seed(0);
  peft::Linear site(6, 4);
  torch::manual_seed(0);
  const auto adapter = peft::add_adapter(*site, small(), peft::all());
  const auto piece = adapter.layers<IncreLoraImpl>().at(0);
  piece->reserve(2);
  torch::manual_seed(0);
  const auto draw = [](std::vector<int64_t> shape) { return torch::empty(shape).normal_(0.0, 0.02); };
  CHECK(torch::equal(piece->lora_A[0], draw({2, 6})));
  CHECK(torch::equal(piece->lora_B[0], draw({4, 2})));
  for (const size_t i : {1U, 2U}) {
    CHECK(torch::equal(piece->lora_A[i], draw({1, 6})));
    CHECK(torch::equal(piece->lora_B[i], draw({4, 1})));
    CHECK(piece->lora_E[i].item<float>() == 1e-5F);
  }
  CHECK(piece->lora_E[0].abs().max().item<float>() == 0);
}

TEST_CASE("IncreLoRA's score is the sum of |dW * gradient of dW|, whichever way dW was used", "[increlora]") {
  Grown grown;
  auto& piece = *grown.piece;
  REQUIRE(piece.scored);
  const auto x = randn({3, 5, 6}), c = randn({3, 5, 4});
  const auto delta = (at::mm(piece.all_B(), piece.all_A()) * piece.scaling()).detach().requires_grad_(true);
  const auto loss = [&](const Tensor& y) { return (y.tanh() * c).sum(); };
  loss(grown.site->base->forward(x) + at::linear(x, delta)).backward();
  const double expected = (delta * delta.grad()).abs().sum().item<double>() / std::sqrt(24);

  loss(grown.site->forward(x)).backward();
  CHECK(piece.score.item<double>() == Approx(expected).epsilon(1e-12));
  const auto gradient = piece.lora_A[1].grad().clone();

  piece.score.zero_();
  const auto weights = grown.site->effective();
  loss(at::linear(x, weights.weight, weights.bias)).backward();
  CHECK(piece.score.item<double>() == Approx(expected).epsilon(1e-12));
  CHECK(largest(piece.lora_A[1].grad(), 2 * gradient) < 1e-12);

  // A single row, a second backward through the same graph, and nothing without one.
  const auto y = loss(grown.site->forward(x[0][0]));
  y.backward({}, /*retain_graph=*/true);
  const auto once = piece.score.item<double>();
  CHECK(once > 0);
  piece.score.zero_();
  y.backward();
  CHECK(piece.score.item<double>() == once);
  piece.score.zero_();
  {
    const torch::NoGradGuard no_grad;
    grown.site->forward(x);
  }
  CHECK(piece.score.item<double>() == 0);
}

TEST_CASE("IncreLoRA's penalty has the gradient of its formula", "[increlora]") {
  const bool coupled = GENERATE(true, false);
  const auto options = small(1).reg_orth_coef(0.3).couple_chunks(coupled);
  torch::manual_seed(6);
  torch::nn::Sequential net(peft::Linear(6, 4), peft::Linear(4, 5));
  net->to(torch::kFloat64);
  const auto adapter = peft::add_adapter(*net, options, peft::all());
  for (const auto& piece : adapter.layers<IncreLoraImpl>()) piece->reserve(2);
  shake(adapter);

  Tensor sum = torch::zeros({}, torch::kFloat64);
  double count = 0;
  const auto distance = [](const Tensor& rows) {
    return (at::mm(rows, rows.t()) - torch::eye(rows.size(0), rows.options())).norm();
  };
  for (const auto& piece : adapter.layers<IncreLoraImpl>()) {
    if (coupled) {
      sum = sum + distance(torch::cat(piece->lora_A)) + distance(torch::cat(piece->lora_B, 1).t());
      count += 2;
      continue;
    }
    for (size_t i = 0; i < piece->lora_A.size(); ++i) {
      sum = sum + distance(piece->lora_A[i]) + distance(piece->lora_B[i].t());
      count += 2;
    }
  }
  const auto penalty = 0.3 * sum / count;
  CHECK(adapter.penalty().item<double>() == Approx(penalty.item<double>()).epsilon(1e-14));
  penalty.backward();
  std::vector<Tensor> expected;
  for (const auto& tensor : adapter.parameters()) {
    expected.push_back(tensor.grad().defined() ? tensor.grad().clone() : Tensor());
    tensor.mutable_grad() = Tensor();
  }
  adapter.record().controllers.at(0)->add_penalty_gradients();
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto tensor = adapter.parameters()[i];
    CHECK(tensor.grad().defined() == expected[i].defined());
    if (expected[i].defined()) CHECK(largest(tensor.grad(), expected[i]) < 1e-15);
  }
}

TEST_CASE("Copies and archives of IncreLoRA have grown as much as the original", "[increlora]") {
  Grown grown;
  const auto x = randn({3, 6});
  const auto y = grown.site->forward(x).detach();

  const auto copy = peft::clone(*grown.site);
  CHECK(torch::equal(copy->forward(x), y));
  const auto twin = peft::adapter(*copy, "one").layers<IncreLoraImpl>().at(0);
  CHECK(twin->rank() == 3);
  for (size_t i = 0; i < 3; ++i) CHECK(twin->lora_E[i].requires_grad() == (i < 2));

  peft::Linear fresh(6, 4);
  fresh->to(torch::kFloat64);
  const auto adapter = peft::add_adapter(*fresh, small(), peft::all(), "one");
  through_archive(*grown.site, *fresh);
  CHECK(torch::equal(fresh->forward(x), y));
  CHECK(adapter.layers<IncreLoraImpl>().at(0)->chunks() == 3);
  CHECK(adapter.count() == grown.adapter->count());
  // And back to less.
  peft::Linear young(6, 4);
  young->to(torch::kFloat64);
  peft::add_adapter(*young, small(), peft::all(), "one");
  through_archive(*young, *fresh);
  CHECK(adapter.named_tensors().size() == 3);
  CHECK(torch::equal(fresh->forward(x), young->forward(x)));
}

TEST_CASE("IncreLoRA counts its active ranks, and trains its reserve beside them", "[increlora]") {
  Grown grown;  // of rank 3, with one in reserve
  const auto tensors = [&] {
    int64_t total = 0;
    for (const auto& tensor : grown.adapter->parameters()) total += tensor.numel();
    return total;
  };
  CHECK(grown.adapter->count() == 3 * (6 + 4 + 1));
  CHECK(tensors() == 3 * (6 + 4 + 1) + 6 + 4);  // what an optimizer sees; the reserve's E is frozen
  const auto table = peft::summary(*grown.site);
  CHECK(table.trainable == grown.adapter->count());
  CHECK(table.gradient_bytes == 8 * tensors());
  grown.piece->activate(1);
  CHECK(grown.adapter->count() == 4 * (6 + 4 + 1));
  CHECK(tensors() == grown.adapter->count());
  for (const auto& tensor : grown.adapter->parameters()) Tensor(tensor).set_requires_grad(false);
  CHECK(grown.adapter->count() == 0);

  Grown late(small().advance_learn(false));  // whose reserve does not train
  CHECK(late.adapter->count() == 3 * (6 + 4 + 1));
}

namespace {

/// Attention as DeBERTa has it: query and key also project the relative positions.
struct SharedProjectionsImpl : torch::nn::Module {
  SharedProjectionsImpl() {
    query = register_module("query", peft::Linear(4, 4));
    key = register_module("key", peft::Linear(4, 4));
  }
  Tensor forward(const Tensor& hidden, const Tensor& positions) {
    const auto q = query->forward(hidden), k = key->forward(hidden);
    const auto position_q = query->forward_positions(positions),
               position_k = key->forward_positions(positions);
    return at::mm(q, k.t()) + at::mm(q, position_k.t()) + at::mm(position_q, k.t());
  }
  peft::Linear query{nullptr}, key{nullptr};
};
TORCH_MODULE(SharedProjections);

}  // namespace

TEST_CASE("IncreLoRA can leave the relative positions of shared projections to the base", "[increlora]") {
  torch::manual_seed(2);
  SharedProjections net;
  net->to(torch::kFloat64);
  const auto hidden = randn({3, 4}), positions = randn({3, 4}).flip(0);
  const auto base_q = net->query->base->forward(positions), base_k = net->key->base->forward(positions);
  const auto expected = [&](const Tensor& position_q, const Tensor& position_k) {
    const auto q = net->query->forward(hidden), k = net->key->forward(hidden);
    return at::mm(q, k.t()) + at::mm(q, position_k.t()) + at::mm(position_q, k.t());
  };

  SECTION("left to the base, and then not merged") {
    const auto adapter =
        peft::add_adapter(*net, small().adapt_positions(false), peft::named({"query", "key"}));
    shake(adapter);
    CHECK(largest(net->forward(hidden, positions), expected(base_q, base_k)) < 1e-14);
    CHECK(torch::equal(net->query->forward_positions(positions), base_q));
    CHECK_THROWS_WITH(peft::merge(*net), Contains("adapt_positions(false) cannot be merged"));

    // What lies below keeps its part in the positions.
    SharedProjections two;
    two->to(torch::kFloat64);
    shake(peft::add_adapter(*two, peft::LoraOptions(2), peft::named({"query"}), "below"));
    const auto below = two->query->forward_positions(positions);
    shake(peft::add_adapter(*two, small().adapt_positions(false), peft::named({"query"}), "above"));
    CHECK(torch::equal(two->query->forward_positions(positions), below));
    CHECK(largest(two->query->forward(positions), below) > 1e-3);
  }
  SECTION("adapted in every use, by default") {
    const auto adapter = peft::add_adapter(*net, small(), peft::named({"query", "key"}));
    shake(adapter);
    const auto before = net->forward(hidden, positions).detach();
    CHECK(largest(before, expected(net->query->forward(positions), net->key->forward(positions))) < 1e-14);
    peft::merge(*net);
    CHECK(largest(net->forward(hidden, positions), before) < 1e-12);
    peft::unmerge(*net);
  }
}

TEST_CASE("IncreLoRA is written as a plain LoRA of the ranks in use", "[increlora]") {
  const auto make = [] {
    torch::manual_seed(8);
    torch::nn::Sequential net(peft::Linear(6, 4), torch::nn::Tanh(), peft::Linear(4, 4), peft::Linear(4, 3));
    net->to(torch::kFloat64);
    return net;
  };
  auto net = make();
  const auto x = randn({5, 6});
  const auto adapter = peft::add_adapter(*net, small(1), peft::all());
  const peft_test::TemporaryFolder folder;
  CHECK_THROWS_WITH(peft::save_adapter(adapter, folder / "none"),
                    Contains("every E is 0") && Contains("nothing to write"));

  const auto pieces = adapter.layers<IncreLoraImpl>();
  for (const auto& piece : pieces) piece->reserve(2);
  pieces[0]->activate(2);
  shake(adapter);
  for (const auto& e : pieces[1]->lora_E) Tensor(e).detach().zero_();
  pieces[2]->lora_E[2].detach().zero_();
  adapter.accept_changes();
  const auto y = net->forward(x).detach();
  const auto notes = peft::save_adapter(adapter, folder / "out");
  REQUIRE(notes.size() == 1);
  CHECK_THAT(notes[0], Contains("written as a plain LoRA, which does not grow on"));

  std::ifstream file(folder / "out" / "adapter_config.json");
  const auto config = nlohmann::json::parse(file);
  CHECK(config["peft_type"] == "LORA");
  CHECK(config["r"] == 3);
  CHECK(config["lora_alpha"] == 3 * 3 / (3 + 1e-5));
  CHECK(config["rank_pattern"] == nlohmann::json{{"3", 2}});
  CHECK(config["alpha_pattern"] == nlohmann::json{{"3", 3 * 2 / (1 + 1e-5)}});
  CHECK(config["target_modules"] == "0|3");

  auto fresh = make();
  const auto loaded = peft::load_adapter(*fresh, folder / "out");
  CHECK(loaded.layers<peft::LoraImpl>().size() == 2);
  CHECK(largest(fresh->forward(x), y) < 1e-13);
}

TEST_CASE("IncreLoRA names the options that are out of range", "[increlora]") {
  const auto add = [](const IncreLoraOptions& options) {
    torch::nn::Sequential net(torch::nn::Linear(6, 4), torch::nn::Linear(4, 3));
    try {
      peft::add_adapter(*net, options, peft::named({"0", "1"}));
    } catch (...) {
      for (const auto& parameter : net->parameters())
        CHECK(parameter.requires_grad());  // nothing was changed
      throw;
    }
  };
  const IncreLoraOptions good(2);
  CHECK_NOTHROW(add(good));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).rank(0)),
                    Contains("IncreLoraOptions: rank must be positive, but got 0"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).rank(3)),
                    Contains("target_rank must be at least rank, which is 3, but got 2"));
  CHECK_THROWS_WITH(add(IncreLoraOptions()),
                    Contains("incre_rank_num must be given unless target_rank is 2, 4, 6 or 8, "
                             "but target_rank is 16"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).incre_rank_num(0)),
                    Contains("incre_rank_num must be positive, but got 0"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).target_total_rank(0)),
                    Contains("target_total_rank must be positive, but got 0"));
  CHECK_THROWS_WITH(
      add(IncreLoraOptions(2).target_total_rank(1)),
      Contains("target_total_rank must be at least 2, the ranks of 2 layers at the start, but got 1"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).alpha(-1)), Contains("alpha must be at least 0"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).dropout(1)), Contains("dropout must be in [0, 1), but got 1"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).top_h(0)), Contains("top_h must be positive, but got 0"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).init_warmup(-1)),
                    Contains("init_warmup must be at least 0 steps, but got -1"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).incre_interval(0)),
                    Contains("incre_interval must be positive, but got 0"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).reg_orth_coef(-0.1)),
                    Contains("reg_orth_coef must be at least 0, but got -0.1"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).beta1(1)), Contains("beta1 must be in (0, 1), but got 1"));
  CHECK_THROWS_WITH(add(IncreLoraOptions(2).beta2(0).top_h(-3)),
                    Contains("2 problems: top_h must be positive, but got -3") &&
                        Contains("beta2 must be in (0, 1), but got 0"));
}

TEST_CASE("IncreLoRA's strength scales and its dropout is for training only", "[increlora]") {
  Grown grown(small().dropout(0.5));
  const auto x = randn({3, 6});
  CHECK_FALSE(torch::equal(grown.site->forward(x), grown.site->forward(x)));
  grown.site->eval();
  const auto base = grown.site->base->forward(x), y = grown.site->forward(x);
  CHECK(torch::equal(y, grown.site->forward(x)));
  grown.adapter->scale(0.5);
  CHECK(largest(grown.site->forward(x) - base, 0.5 * (y - base)) < 1e-14);
  std::ostringstream text;
  text << *grown.piece;
  CHECK(text.str() == "peft::IncreLora(rank=3 of 4, alpha=3, dropout=0.5)");
}
