#include <map>
#include <string>
#include <vector>

#include "models/tiny_bert.h"
#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::Fuse;
using peft::FusionImpl;
using peft::FusionOptions;
using Names = std::vector<std::string>;
using Bert = peft::models::BertForSequenceClassification;

namespace {

/// The formula of tests/reference/composition_values.py.
void wave(const Tensor& tensor, double k) {
  const torch::NoGradGuard no_grad;
  const auto at = torch::arange(tensor.numel(), torch::kFloat64);
  Tensor(tensor).copy_((0.5 * (0.7 * at + k).sin()).reshape(tensor.sizes()));
}

std::vector<Tensor> tensors_of(const FusionImpl& piece) {
  std::vector<Tensor> tensors;
  for (const auto* projection : {piece.query.get(), piece.key.get()}) {
    if (projection) tensors.insert(tensors.end(), {projection->weight, projection->bias});
  }
  if (piece.value.defined()) tensors.push_back(piece.value);
  return tensors;
}

void fill(const peft::Adapter& fusion) {
  double k = 100;
  for (const auto& piece : fusion.layers<FusionImpl>()) {
    for (const auto& tensor : tensors_of(*piece)) wave(tensor, k++);
  }
}

peft::models::EncoderInputs texts() {
  peft::models::EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19, 7}, {1, 2, 0, 0}, {4, 8, 15, 16}});
  inputs.attention_mask = torch::tensor({{1, 1, 1, 1}, {1, 1, 0, 0}, {1, 1, 1, 1}});
  return inputs;
}

/// A BERT with two bottleneck adapters.
Bert with_two(const peft::BottleneckOptions& options = peft::pfeiffer().reduction_factor(4)) {
  torch::manual_seed(0);
  Bert model(peft_test::tiny());
  model->to(torch::kFloat64);
  peft_test::fill(*model);
  model->eval();
  double number = 0;
  for (const auto* name : {"a", "b"}) {
    double k = 10 * number++;
    for (const auto& [key, tensor] : peft::add_adapter(*model, options, name).named_parameters()) {
      wave(tensor, k++);
    }
  }
  return model;
}

/// Sums of the values times sin(i), and times cos(i).
std::vector<double> sums(const Tensor& values) {
  const auto flat = values.detach().reshape(-1);
  const auto at = torch::arange(flat.numel(), torch::kFloat64);
  return {(flat * at.sin()).sum().item<double>(), (flat * at.cos()).sum().item<double>()};
}

void check_sums(const Tensor& values, const std::vector<double>& expected) {
  const auto got = sums(values);
  for (size_t i = 0; i < 2; ++i) CHECK(got[i] == Approx(expected[i]).epsilon(1e-9).margin(1e-11));
}

FusionOptions ab() { return FusionOptions({"a", "b"}); }

}  // namespace

TEST_CASE("A fusion's variants give AdapterHub's numbers", "[fusion]") {
  // From tests/reference/fusion_values.py.
  const auto variant = GENERATE(table<FusionOptions, std::vector<double>>({
      {peft::static_fusion({"a", "b"}), {0.665114903199, -0.193497591283}},
      {ab().query_before_ln(true), {0.37706774345, -0.325116724253}},
      {ab().residual_before(true), {0.352700468943, -0.0282255216478}},
      {ab().value_before_softmax(false), {0.338290458167, -0.052075787978}},
      {ab().temperature(true), {0.513641711009, -0.29169245658}},
      {ab().query(false).key(false), {0.633140240486, 0.0969469637751}},
  }));
  const auto& [options, expected] = variant;
  auto model = with_two();
  fill(peft::add_fusion(*model, options));
  const torch::NoGradGuard no_grad;
  model->forward(texts());
  model->forward(texts());
  check_sums(model->forward(texts()).logits, expected);
}

TEST_CASE("A fusion starts as AdapterHub's does", "[fusion]") {
  auto model = with_two();
  torch::manual_seed(3);
  const auto fusion = peft::add_fusion(*model, ab());
  CHECK(fusion.name() == "a,b");
  const auto pieces = fusion.layers<FusionImpl>();
  REQUIRE(pieces.size() == 2);
  CHECK(fusion.sites() ==
        Names{"bert.encoder.layer.0.output.LayerNorm", "bert.encoder.layer.1.output.LayerNorm"});
  const auto begins = [](const Tensor& tensor, const std::vector<double>& values) {
    const auto first = tensor.detach().reshape(-1).slice(0, 0, 3);
    CHECK(largest(first, torch::tensor(values, torch::kFloat64)) < 1e-9);
  };
  begins(pieces[1]->query->weight, {0.0133471293, -0.0085122278, -0.0227277912});
  begins(pieces[1]->key->weight, {-0.00562854204, 0.0149303423, 0.00638101762});
  begins(pieces[1]->value, {1, 9.99999997e-07, 9.99999997e-07});
  CHECK(pieces[0]->query->bias.abs().max().item<double>() == 0);
  CHECK(fusion.count() == 2 * (3 * 8 * 8 + 2 * 8));
  CHECK(peft::active_adapters(*model) == Names{"a", "b", "a,b"});
}

TEST_CASE("Only the fusion trains, with its penalty", "[fusion]") {
  auto model = with_two();
  const auto fusion = peft::add_fusion(*model, ab());
  fill(fusion);
  CHECK(peft::summary(*model).trainable == fusion.count());
  auto inputs = texts();
  inputs.labels = torch::tensor({0, 2, 1});
  const auto loss = model->forward(inputs).loss;
  CHECK(loss.item<double>() == Approx(1.10869256673).epsilon(1e-10));
  CHECK(fusion.penalty().item<double>() == Approx(0.286952707853).epsilon(1e-10));
  loss.backward();
  fusion.before_step();
  const auto first = fusion.layers<FusionImpl>().front();
  check_sums(first->query->weight.grad(), {-1.67166975038e-06, -1.07254122356e-05});
  check_sums(first->value.grad(), {-0.0160973399894, -0.0172239815334});
  for (const auto& item : model->named_parameters()) {
    const bool ours = item.key().find(".a,b.") != std::string::npos;
    INFO(item.key());
    CHECK(item.value().requires_grad() == ours);
    CHECK(item.value().grad().defined() == ours);
  }
  CHECK(peft::add_fusion(*model, peft::static_fusion({"a", "b"}), "static").penalty().item<double>() == 0);

  // The penalty alone ends at the identity.
  auto value = first->value;
  peft::AdamW optimizer(fusion, torch::optim::AdamWOptions(0.05).weight_decay(0));
  for (int i = 0; i < 200; ++i) {
    optimizer.zero_grad();
    (0.0 * model->forward(inputs).loss).backward();
    optimizer.step();
  }
  CHECK(largest(value, torch::eye(8, torch::kFloat64)) < 0.05);
}

TEST_CASE("A fusion's gradients are those of its forward", "[fusion]") {
  const auto kind = GENERATE(0, 1, 2);
  CAPTURE(kind);
  auto model = with_two(kind == 2 ? peft::parallel_adapter().reduction_factor(4) : peft::houlsby());
  auto options = kind == 0 ? ab() : ab().query_before_ln(true).residual_before(true);
  const auto fusion = peft::add_fusion(*model, options);
  CHECK(fusion.sites().size() == (kind == 2 ? 2U : 4U));
  fill(fusion);
  peft::models::EncoderInputs inputs;
  inputs.input_ids = torch::tensor({{5, 3, 19}, {1, 2, 7}});
  torch::manual_seed(5);
  const auto weights = torch::randn({2, 3}, torch::kFloat64);
  const auto loss = [&] { return (model->forward(inputs).logits * weights).sum(); };
  loss().backward();
  const torch::NoGradGuard no_grad;
  for (const auto& [name, tensor] : fusion.named_parameters()) {
    INFO(name);
    REQUIRE(tensor.grad().defined());
    auto flat = tensor.view(-1);
    for (const int64_t i : {int64_t{0}, flat.numel() / 2, flat.numel() - 1}) {
      const double value = flat[i].item<double>(), h = 1e-5;
      flat[i] = value + h;
      const auto up = loss().item<double>();
      flat[i] = value - h;
      const auto down = loss().item<double>();
      flat[i] = value;
      CHECK(tensor.grad().reshape(-1)[i].item<double>() ==
            Approx((up - down) / (2 * h)).epsilon(1e-5).margin(1e-9));
    }
  }
}

TEST_CASE("A fusion survives copies and archives, and leaves the model when it is off", "[fusion]") {
  auto model = with_two();
  peft::set_active(*model, Names{});
  const auto plain = model->forward(texts()).logits.detach();
  const auto fusion = peft::add_fusion(*model, ab().temperature(true), "both");
  fill(fusion);
  CHECK(peft::active_adapters(*model) == Names{"a", "b", "both"});
  const auto fused = model->forward(texts()).logits.detach();
  CHECK(largest(fused, plain) > 1e-3);
  {
    const auto off = peft::disabled(*model);
    CHECK(torch::equal(model->forward(texts()).logits, plain));
  }
  const auto copy = peft::clone(*model);
  CHECK(peft::adapter(*copy, "both").layers<FusionImpl>()[0]->divisor() == Approx(50 - 0.05));
  const auto next = model->forward(texts()).logits.detach();
  CHECK_FALSE(torch::equal(next, fused));  // T has fallen
  CHECK(torch::equal(copy->forward(texts()).logits, next));

  auto fresh = with_two();
  const auto other = peft::add_fusion(*fresh, ab().temperature(true), "both");
  through_archive(*model, *fresh);
  CHECK(torch::equal(fresh->forward(texts()).logits, fused));
  const auto state = fusion.record().controllers.front()->state();
  std::map<std::string, Tensor> named(state.begin(), state.end());
  other.record().controllers.front()->load_state(named);
  CHECK(torch::equal(fresh->forward(texts()).logits, model->forward(texts()).logits));
  named["divisors"] = torch::zeros({3}, torch::kFloat64);
  CHECK_THROWS_WITH(other.record().controllers.front()->load_state(named), Contains("expected shape (2)"));
  CHECK_THROWS_WITH(peft::merge(*model), Contains("are not the same for all rows and tokens"));
}

TEST_CASE("Dropout on the scores is the model's, or the option's", "[fusion]") {
  auto model = with_two();
  CHECK(peft::add_fusion(*model, ab(), "one").layers<FusionImpl>()[0]->options.dropout_prob() == 0.1);
  const auto own = peft::add_fusion(*model, ab().dropout_prob(0.5), "two");
  CHECK(own.layers<FusionImpl>()[0]->options.dropout_prob() == 0.5);
  fill(own);
  const auto piece = own.layers<FusionImpl>()[0];
  const auto x = torch::randn({2, 5, 8}, torch::kFloat64);
  const auto run = [&] { return piece->fuse(x, {x, 2 * x}, x).detach(); };
  CHECK(torch::equal(run(), run()));
  piece->train();
  CHECK_FALSE(torch::equal(run(), run()));
}

TEST_CASE("Wrong fusions are refused before anything changes", "[fusion]") {
  auto model = with_two();
  const auto refused = [&](const FusionOptions& options, const std::string& why,
                           const std::string& name = "") {
    CHECK_THROWS_WITH(peft::add_fusion(*model, options, name), Contains(why));
    CHECK(peft::active_adapters(*model) == Names{"a", "b"});
    CHECK(peft::internal::adapter_names(*model).size() == 3);
    CHECK(peft::adapter(*model, "a").count() > 0);
  };
  peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"query"}), "low");
  peft::set_active(*model, Names{"a", "b"});
  for (const auto* name : {"a", "b"}) {
    for (auto& [key, tensor] : peft::adapter(*model, name).named_tensors())
      Tensor(tensor).set_requires_grad(true);
  }
  refused(FusionOptions(Names{}), "FusionOptions: adapters must not be empty");
  refused(FusionOptions({"a", "c"}), "the model has no adapter 'c'; it has");
  refused(FusionOptions({"low"}), "none of the adapters works on a residual join");
  refused(FusionOptions({"a", "low"}),
          "query' cannot run Fuse(a, low): Fuse needs methods that work on a residual");
  refused(ab(), "the model already has an adapter 'a'", "a");
  refused(ab().dropout_prob(1), "FusionOptions: dropout_prob must be in [0, 1), but got 1");
  refused(ab().query(false).key(false).value(false), "one of query, key and value must be projected");
  peft::Linear site(4, 4);
  CHECK_THROWS_WITH(peft::add_adapter(*site, ab(), peft::all()),
                    Contains("matches no site that can take it"));
}

TEST_CASE("A fusion that lowers its temperature refuses to run twice for one forward", "[fusion]") {
  for (const bool temperature : {false, true}) {
    auto model = with_two();
    peft::add_fusion(*model, ab().temperature(temperature));
    model->gradient_checkpointing(true);
    model->train();
    if (temperature) {
      CHECK_THROWS_WITH(model->forward(texts()), Contains("gradient checkpointing runs two"));
    } else {
      CHECK_NOTHROW(model->forward(texts()).logits.sum().backward());
    }
  }
}
