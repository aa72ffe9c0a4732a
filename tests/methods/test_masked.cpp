#include <peft/methods/fish.h>

#include "methods/reference_values.h"
#include "peft/methods/bias.h"

using namespace suite;
using peft::MaskedImpl;
using peft::MaskedOptions;

namespace {

int64_t entries_of(const peft::SiteInfo& site) {
  return product(site.weight_shape) + (site.has_bias() ? product(site.bias_shape) : 0);
}

/// A part whose masks take every third entry from the second on.
peft::Part every_third() {
  const auto options = [](const peft::SiteInfo& site) {
    return MaskedOptions().indices(torch::arange(1, entries_of(site), 3));
  };
  return {MaskedOptions::method, MaskedOptions::needs, peft::all(),
          [options](const peft::SiteInfo& site) { return refusal(options(site), site); },
          [options](const peft::SiteInfo& site) { return make_piece(options(site), site); }};
}

struct NetImpl : nn::Module {
  NetImpl() {
    embed = register_module("embed", peft::Embedding(5, 4));
    hidden = register_module("hidden", peft::Linear(4, 6));
    norm = register_module("norm", peft::LayerNorm(nn::LayerNormOptions({6})));
    head = register_module("head", peft::Linear(6, 3));
    to(torch::kFloat64);
    int64_t k = 1;
    for (const auto& item : named_parameters()) {
      assign(item.value(), fill(item.value().sizes().vec(), k++) + (item.key() == "norm.weight" ? 1 : 0));
    }
  }
  Tensor forward(const Tensor& ids) {
    return head->forward(norm->forward(hidden->forward(embed->forward(ids)).tanh())).mean(0);
  }
  /// The loss of example i: three tokens and a class.
  Tensor loss(int64_t i) {
    const auto ids = torch::tensor({i % 5, (i * 2 + 1) % 5, (i * i) % 5});
    return torch::cross_entropy_loss(forward(ids).unsqueeze(0), torch::tensor({i % 3}));
  }
  peft::Embedding embed{nullptr};
  peft::Linear hidden{nullptr}, head{nullptr};
  peft::LayerNorm norm{nullptr};
};
TORCH_MODULE(Net);

/// The chosen entries of all layers, counted on from one layer to the next as in
/// tests/reference/mask_values.py.
std::vector<int64_t> chosen(Net& net, const peft::Adapter& adapter) {
  std::map<std::string, Tensor> by_path;
  for (const auto& piece : adapter.layers<MaskedImpl>()) by_path[piece->site().path] = piece->indices;
  std::vector<int64_t> found;
  int64_t first = 0;
  for (const auto* path : {"embed", "hidden", "norm", "head"}) {
    if (by_path.count(path)) {
      const auto& indices = by_path[path];
      for (int64_t i = 0; i < indices.size(0); ++i) found.push_back(first + indices[i].item<int64_t>());
    }
    for (const auto& item : net->named_children()[path]->named_parameters(/*recurse=*/false))
      first += item.value().numel();
  }
  return found;
}

std::function<Tensor()> losses(Net& net, int64_t count) {
  return [&net, count, next = int64_t{0}]() mutable { return next < count ? net->loss(next++) : Tensor(); };
}

using Numbers = std::vector<int64_t>;

}  // namespace

TEST_CASE("Masks keep the promises of a method on every layer kind", "[masked]") {
  const Promise promise{{every_third()},
                        [](const peft::SiteInfo& site) { return (entries_of(site) + 1) / 3; }};
  for (const auto& layer_case : layer_cases()) check_properties(layer_case, promise);
  for (const auto& layer_case : other_layer_cases()) check_properties(layer_case, promise);
}

// Reference: torch with masked gradients, tests/reference/mask_values.py.
TEST_CASE("FISH chooses the entries of the largest Fisher information of the whole model", "[masked][fish]") {
  Net net;
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::all());
  peft::initialize_fish(*net, adapter, losses(net, 7), peft::FishOptions(0.15));
  CHECK(chosen(net, adapter) == Numbers{45, 48, 49, 52, 64, 67, 70, 73, 79, 80, 81, 82});
  CHECK(adapter.count() == 12);
  CHECK(adapter.count() == static_cast<int64_t>(0.15 * 83));

  SECTION("and trains as a masked gradient does, clipped, over 12 steps of Adam") {
    const auto before = copies(*net);
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0), /*max_grad_norm=*/0.5);
    Tensor loss;
    for (int64_t step = 0; step < 12; ++step) {
      optimizer.zero_grad();
      loss = net->loss(step);
      loss.backward();
      optimizer.step();
    }
    check_values(loss.view({1}), {2.223799387});
    peft::merge(*net);
    check_values(net->hidden->base->bias, {-0.4, -0.09744593042, 0.34, -0.3, 0.0367600781, 0.4306798957});
    check_values(net->head->base->weight,
                 {-0.3, 0.07, 0.4753465289, -0.2, 0.17, -0.4199832521, -0.1, 0.27, -0.4025089997, 0, 0.37,
                  -0.3605752372, 0.1, 0.47, -0.17, 0.2, -0.44, -0.1085711806});
  }
  SECTION("of which weight decay reaches the chosen entries alone") {
    const auto before = net->head->base->weight.clone();
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.5));
    for (int64_t step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      net->loss(step).backward();
      optimizer.step();
    }
    auto outside = torch::ones({before.numel()}, torch::kBool);
    for (const auto& piece : adapter.layers<MaskedImpl>()) {
      if (piece->site().path != "head") continue;
      outside.index_fill_(0, piece->indices.masked_select(piece->indices.lt(18)), false);
    }
    CHECK(outside.sum().item<int64_t>() < before.numel());
    peft::merge(*net);
    const auto after = net->head->base->weight;
    CHECK(torch::equal(after.reshape(-1).masked_select(outside), before.reshape(-1).masked_select(outside)));
    CHECK(largest(after, before) > 1e-3);
  }
}

TEST_CASE("FISH leaves the model as it was: adapters, modes, gradients, values", "[masked][fish]") {
  Net net;
  const auto other = peft::add_adapter(*net, peft::BiasOptions(), peft::named({"norm", "head"}), "other");
  shake(other);
  net->norm->eval();
  const auto before = copies(*net);
  const auto y = net->loss(1).detach();
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::named({"hidden"}), "fish");
  std::vector<bool> modes;
  peft::initialize_fish(
      *net, adapter,
      [&, next = int64_t{0}]() mutable {
        modes.push_back(net->is_training());
        return next < 2 ? net->loss(next++) : Tensor();
      },
      peft::FishOptions(0.2).training(false));
  CHECK(modes == std::vector<bool>(3, false));
  CHECK(net->is_training());
  CHECK_FALSE(net->norm->is_training());
  CHECK(peft::active_adapters(*net) == std::vector<std::string>{"other", "fish"});
  CHECK(torch::equal(net->loss(1).detach(), y));
  for (const auto& item : other.named_parameters()) CHECK_FALSE(item.second.grad().defined());
  for (const auto& item : net->hidden->base_parameters()) CHECK_FALSE(item.value().requires_grad());
}

TEST_CASE("Random masks draw the author's numbers, or rows and columns", "[masked]") {
  Net net;
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::all());
  SECTION("uniform, as numpy draws them") {
    torch::manual_seed(5);
    peft::initialize_rand_uniform(adapter, 40);
    CHECK(chosen(net, adapter) == Numbers{3,  4,  6,  7,  8,  9,  14, 15, 16, 27, 32, 33, 35, 36, 37,
                                          41, 45, 47, 54, 55, 57, 58, 63, 69, 71, 72, 76, 78, 81});
  }
  SECTION("a column or rows") {
    // hidden (6, 4): a column of 6, or a row of 4; head (3, 6): always a column of 3; the norm's weight.
    std::set<int64_t> of_hidden;
    for (int seed = 0; seed < 20; ++seed) {
      torch::manual_seed(seed);
      Net fresh;
      const auto own = peft::add_adapter(*fresh, MaskedOptions(), peft::all());
      peft::initialize_rand_row_col(own);
      CHECK(own.sites() == std::vector<std::string>{"hidden", "norm", "head"});
      const auto pieces = own.layers<MaskedImpl>();
      of_hidden.insert(pieces.at(0)->values.numel());
      const auto apart = pieces.at(0)->values.numel() == 6 ? 4 : 1;
      const auto& indices = pieces.at(0)->indices;
      CHECK((indices.slice(0, 1) - indices.slice(0, 0, -1)).eq(apart).all().item<bool>());
      CHECK(torch::equal(pieces.at(1)->indices, torch::arange(6)));
      CHECK(pieces.at(2)->values.numel() == 3);
    }
    CHECK(of_hidden == std::set<int64_t>{4, 6});
  }
}

TEST_CASE("Magnitude masks take the largest or the smallest weights, of all layers or of each", "[masked]") {
  Net net;
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::named({"hidden", "head"}));
  const auto masked = [&](const char* path) {
    auto mask = torch::zeros({path[1] == 'i' ? 24 : 18}, torch::kBool);
    for (const auto& piece : adapter.layers<MaskedImpl>()) {
      if (piece->site().path == path) mask.index_fill_(0, piece->indices, true);
    }
    return mask;
  };
  const auto hidden = net->hidden->base->weight.abs().reshape(-1),
             head = net->head->base->weight.abs().reshape(-1);
  const auto bounds = [&](bool largest) {
    const auto all = torch::cat({hidden, head}), kept = torch::cat({masked("hidden"), masked("head")});
    const auto in = all.masked_select(kept), out = all.masked_select(~kept);
    return largest ? (in.min() >= out.max()).item<bool>() : (in.max() <= out.min()).item<bool>();
  };
  SECTION("largest") {
    peft::initialize_magnitude(adapter, peft::MagnitudeOptions(0.25));
    CHECK(adapter.count() == 10);  // int(0.25 · 42)
    CHECK(bounds(true));
  }
  SECTION("smallest") {
    peft::initialize_magnitude(adapter, peft::MagnitudeOptions(0.25).smallest(true));
    CHECK(adapter.count() == 10);
    CHECK(bounds(false));
  }
  SECTION("of each layer") {
    peft::initialize_magnitude(adapter, peft::MagnitudeOptions(0.25).per_layer(true));
    CHECK(masked("hidden").sum().item<int64_t>() == 6);
    CHECK(masked("head").sum().item<int64_t>() == 4);
  }
}

TEST_CASE("A mask of one's own is bool tensors", "[masked]") {
  Net net;
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::named({"hidden", "head"}));
  SECTION("a layer without any leaves the adapter") {
    peft::initialize_masks(adapter,
                           [](const peft::SiteInfo& site, const peft::Weights& base) -> peft::Weights {
                             if (site.path == "head") return {};
                             return {base.weight > 0.3, torch::ones(base.bias.sizes(), torch::kBool)};
                           });
    CHECK(adapter.sites() == std::vector<std::string>{"hidden"});
    CHECK(adapter.count() == (net->hidden->base->weight > 0.3).sum().item<int64_t>() + 6);
    CHECK(net->head->pieces("default").empty());
  }
  SECTION("of the right shape and type") {
    CHECK_THROWS_WITH(
        peft::initialize_masks(adapter,
                               [](const peft::SiteInfo&, const peft::Weights& base) -> peft::Weights {
                                 return {base.weight, torch::ones({2}, torch::kBool)};
                               }),
        Contains("4 problems: 'hidden': the weight's mask must be bool of shape (6, 4), but got "
                 "Double of shape (6, 4)") &&
            Contains("'head': the bias's mask must be bool of shape (3), but got Bool of shape (2)"));
  }
}

TEST_CASE("Masks are checked before anything is changed", "[masked]") {
  Net net;
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::all());
  CHECK_THROWS_WITH(peft::initialize_fish(*net, adapter, losses(net, 3), peft::FishOptions(0)),
                    Contains("initialize_fish: ratio must be in (0, 1], but got 0"));
  CHECK_THROWS_WITH(peft::initialize_fish(*net, adapter, losses(net, 3), peft::FishOptions(1.5)),
                    Contains("but got 1.5"));
  CHECK_THROWS_WITH(peft::initialize_fish(*net, adapter, losses(net, 3), peft::FishOptions(0.001)),
                    Contains("ratio 0.001 of 83 entries must be at least one entry"));
  CHECK_THROWS_WITH(peft::initialize_fish(*net, adapter, losses(net, 0), peft::FishOptions(0.1)),
                    Contains("expected at least one example, but got none"));
  CHECK_THROWS_WITH(peft::initialize_fish(
                        *net, adapter, [] { return torch::zeros({2}); }, peft::FishOptions(0.1)),
                    Contains("a loss must be one finite number, but got 2 numbers"));
  CHECK_THROWS_WITH(peft::initialize_fish(
                        *net, adapter, [] { return torch::zeros({}); }, peft::FishOptions(0.1)),
                    Contains("the loss must depend on the adapter's layers"));
  CHECK_THROWS_WITH(peft::initialize_magnitude(adapter, peft::MagnitudeOptions(-1)), Contains("but got -1"));
  CHECK_THROWS_WITH(peft::initialize_rand_uniform(adapter, 0),
                    Contains("count must be from 1 to the layers' 83 entries, but got 0"));
  CHECK_THROWS_WITH(peft::initialize_rand_uniform(adapter, 84), Contains("but got 84"));
  CHECK_THROWS_WITH(peft::initialize_rand_uniform(adapter, 1), Contains("expected at least one entry"));
  CHECK(adapter.count() == 0);
  CHECK_THROWS_WITH(net->loss(0),
                    Contains("'embed': 'masked' has nothing to train yet (hint: call initialize_fish, "));
  {
    const torch::NoGradGuard no_grad;
    CHECK_NOTHROW(net->loss(0));
  }

  const auto other = peft::add_adapter(*net, peft::BiasOptions(), peft::all(), "other");
  CHECK_THROWS_WITH(peft::initialize_rand_uniform(other, 10),
                    Contains("adapter 'other' has no layer that was added with MaskedOptions"));
  peft::initialize_rand_uniform(adapter, 40);
  const peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.1));
  CHECK_THROWS_WITH(peft::initialize_rand_uniform(adapter, 40), Contains("already has an optimizer"));

  const auto option = [](const Tensor& indices) { return MaskedOptions().indices(indices); };
  peft::Linear layer(4, 3);
  const auto add = [&](const Tensor& indices) { peft::add_adapter(*layer, option(indices), peft::all()); };
  CHECK_THROWS_WITH(add(torch::tensor({1, 1})),
                    Contains("indices must ascend from 0 or more, but got some out"));
  CHECK_THROWS_WITH(add(torch::tensor({-1, 1})), Contains("but got a negative one"));
  CHECK_THROWS_WITH(add(torch::empty({0}, torch::kLong)), Contains("a list of at least one int64"));
  CHECK_THROWS_WITH(
      peft::add_adapter(*net, option(torch::tensor({27})), peft::named({"hidden", "head"}), "wide"),
      Contains("'head' cannot take 'masked': indices must be below its 21 entries, but got 27"));
}

TEST_CASE("Masks keep their entries in another type and on a copy", "[masked]") {
  Net net;
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::named({"hidden"}));
  torch::manual_seed(0);
  peft::initialize_rand_uniform(adapter, 20);
  const auto piece = adapter.layers<MaskedImpl>().at(0);
  const auto before = piece->indices.clone();
  net->to(torch::kBFloat16);
  CHECK(piece->values.scalar_type() == torch::kBFloat16);
  CHECK(torch::equal(piece->indices, before));
  const auto copy = std::dynamic_pointer_cast<MaskedImpl>(piece->copy());
  CHECK(torch::equal(copy->indices, before));
  CHECK(copy->values.requires_grad());
}

TEST_CASE("Masks go through files of this library's own", "[masked]") {
  Net net, other;
  const auto adapter = peft::add_adapter(*net, MaskedOptions(), peft::named({"embed", "hidden"}));
  peft::train_also(adapter, *net, peft::named({"head"}));
  peft::initialize_magnitude(adapter, peft::MagnitudeOptions(0.3));
  shake(adapter);
  const auto config = through_files(adapter, *other);
  CHECK(config["peft_type"] == "REPLACE");
  CHECK(config["method"] == "MASKED");
  CHECK(config["entries"] == nlohmann::json{{"embed", 6}, {"hidden", 7}});
  CHECK(torch::equal(other->loss(3), net->loss(3)));
  const peft_test::TemporaryFolder folder;
  CHECK(
      peft::save_adapter(adapter, folder / "adapter").at(0) ==
      "Python PEFT cannot read this adapter: Python has no masks (peft_type REPLACE is this library's own)");

  SECTION("which are not believed") {
    const auto refused = [&](const std::function<void(nlohmann::json&)>& change, const std::string& text) {
      Net fresh;
      CHECK_THROWS_WITH(load_changed(adapter, *fresh, change), Contains(text));
      CHECK(fresh->embed->adapters().empty());
    };
    refused([](auto& json) { json["entries"]["embed"] = 5; },
            "'base_model.model.embed.masked_values' expected (5), but got (6)");
    refused([](auto& json) { json["entries"]["embed"] = 21; },
            "'embed': adapter_config.json: 'entries' must be at most its 20, but got 21");
    refused([](auto& json) { json["entries"].erase("embed"); },
            "'embed': adapter_config.json: 'entries' must name it");
    refused([](auto& json) { json["entries"]["embed"] = 0; },
            "'entries' must map layers to the numbers of their entries, at least 1, but got");
    const auto piece = adapter.layers<MaskedImpl>().at(0);
    const auto indices = piece->indices.clone();
    piece->indices.copy_(indices.flip(0));
    refused([](auto&) {},
            "'embed': MaskedOptions: indices must ascend from 0 or more, but got some out of order");
    piece->indices.copy_(indices + 15);
    refused([](auto&) {}, "'embed': indices must be below its 20 entries, but got");
  }
}
