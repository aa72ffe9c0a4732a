#include <cmath>

#include "io/temporary_folder.h"
#include "peft/io/peft_directory.h"
#include "peft/methods/bias.h"
#include "peft/methods/corda.h"
#include "peft/methods/eva.h"
#include "peft/methods/lora_ga.h"
#include "peft/methods/lora_init.h"
#include "property_suite.h"

using namespace suite;
using peft::LoraInit;
using peft::LoraOptions;

namespace {

/// Element i is ((((i + k) · 37) mod 101) − 50) / 100: the tensors of the reference values below.
Tensor fill(std::vector<int64_t> shape, int64_t k) {
  int64_t count = 1;
  for (const auto size : shape) count *= size;
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(((static_cast<int64_t>(i) + k) * 37) % 101 - 50) / 100.0F;
  }
  return torch::tensor(values).view(shape);
}

void check_values(const Tensor& tensor, const std::vector<double>& expected, double tolerance = 2e-6) {
  const auto wanted = torch::tensor(expected, torch::kFloat64);
  CHECK(largest(tensor.detach().to(torch::kFloat64).contiguous().view(-1), wanted) < tolerance);
}

void assign(const Tensor& tensor, const Tensor& value) {
  torch::NoGradGuard no_grad;
  Tensor(tensor).copy_(value.view(tensor.sizes()));
}

/// `spread`: with smallest singular values that lie apart, for what starts from their vectors.
Tensor filled_weight(bool spread) {
  auto weight = fill({6, 8}, 1);
  if (spread) weight.diagonal().add_(torch::arange(1, 7) / 4);
  return weight;
}

peft::Linear filled_linear(bool spread = false) {
  peft::Linear site(8, 6);
  assign(site->base->weight, filled_weight(spread));
  assign(site->base->bias, fill({6}, 2));
  return site;
}

std::shared_ptr<peft::LoraImpl> only(const nn::Module& site) {
  return peft::adapter(const_cast<nn::Module&>(site), "default").layers<peft::LoraImpl>().at(0);
}

/// The reference's numbers: s B A of a probe at the start, the output for it after 12 steps. And what the
/// reference cannot have: the base stays as it was, and nothing changes at the start.
void check_start(peft::Linear& site, const std::vector<double>& update, const std::vector<double>& output,
                 bool no_op = true, bool spread = false) {
  const auto piece = only(*site);
  const auto probe = fill({1, 8}, 9);
  check_values(probe.mm(piece->lora_A.t()).mm(piece->lora_B.t()) * piece->scaling(), update);
  CHECK(torch::equal(site->base->weight, filled_weight(spread)));
  const auto plain = at::linear(probe, site->base->weight, site->base->bias);
  if (no_op) CHECK(largest(site->forward(probe), plain) < 1e-6);
  peft::AdamW optimizer(peft::adapter(*site, "default"), torch::optim::AdamWOptions(0.02).weight_decay(0.01));
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    (site->forward(fill({5, 8}, 5)) - fill({5, 6}, 6)).square().mean().backward();
    optimizer.step();
  }
  check_values(site->forward(probe), output, 2e-5);
  peft::merge(*site);
  check_values(site->forward(probe), output, 2e-5);
}

Promise promise(const LoraOptions& options) {
  Promise result{{peft::on(options, peft::all())}, [options](const peft::SiteInfo& site) {
                   const auto in = options.rank() * site.fan_in[0], out = options.rank() * site.fan_out;
                   return options.init() == LoraInit::mica ? in : in + out;
                 }};
  // Rounding keeps a start that is taken out again from being a no-op to the last bit.
  result.no_op_at_start = options.init() == LoraInit::mica || options.init() == LoraInit::eva ||
                          options.init() == LoraInit::corda || options.init() == LoraInit::lora_ga;
  return result;
}

}  // namespace

TEST_CASE("LoRA keeps its promises with every start", "[lora][init]") {
  const auto cases = layer_cases();
  const auto options = LoraOptions(2).alpha(3);
  for (const auto init :
       {LoraInit::pissa, LoraInit::pissa_niter, LoraInit::olora, LoraInit::orthogonal, LoraInit::mica,
        LoraInit::loftq, LoraInit::eva, LoraInit::corda, LoraInit::lora_ga}) {
    INFO(to_string(init));
    check_properties(cases.at(0), promise(LoraOptions(options).init(init)));
    check_properties(cases.at(1), promise(LoraOptions(options).init(init)));
  }
  const auto& embedding = cases.at(2);
  REQUIRE(embedding.name == "Embedding");
  check_properties(embedding, promise(LoraOptions(options).init(LoraInit::mica)));
}

// Reference: Hugging Face PEFT, tests/reference/lora_init_values.py.
TEST_CASE("LoRA's starts equal Hugging Face's, and train alike", "[lora][init]") {
  auto site = filled_linear();
  const auto add = [&](LoraInit init) {
    torch::manual_seed(0);
    peft::add_adapter(*site, LoraOptions(2).alpha(3).init(init).niter(1), peft::all());
  };
  SECTION("pissa") {
    add(LoraInit::pissa);
    check_start(site, {0.6000863, 0.6011233, 0.3009026, -0.1541391, -0.153102, -0.1520649},
                {0.7297916, -0.02570987, 0.0002296418, 0.370191, -0.4371941, 0.08781517});
  }
  SECTION("pissa by a randomised SVD") {
    add(LoraInit::pissa_niter);
    check_start(site, {0.6137704, 0.6153608, 0.2889196, -0.1340179, -0.1324275, -0.130837},
                {0.7217492, -0.03832659, -0.002243772, 0.3838027, -0.4414492, 0.0853162});
  }
  SECTION("olora") {
    add(LoraInit::olora);
    check_start(site, {0.9473643, 0.6751184, 0.4028729, 0.1306271, -0.1416185, -0.4138643},
                {0.9448621, -0.131837, -0.1673963, 0.3985398, -0.6787926, 0.233973});
  }
  SECTION("orthogonal") {
    add(LoraInit::orthogonal);
    check_start(site, {0, 0, 0, 0, 0, 0},
                {0.8409917, 0.1795869, 0.1337481, 0.2176905, -0.4604085, -0.07226434});
  }
  SECTION("mica") {
    site = filled_linear(/*spread=*/true);
    add(LoraInit::mica);
    const auto B = only(*site)->lora_B.clone();
    check_start(site, {0, 0, 0, 0, 0, 0},
                {1.315069, -0.1327154, -0.2382047, 0.1491369, -0.04642544, -0.6371775}, /*no_op=*/true,
                /*spread=*/true);
    CHECK(torch::equal(only(*site)->lora_B, B));
  }
  SECTION("mica of an embedding") {
    peft::Embedding embedding(5, 3);
    assign(embedding->base->weight, fill({5, 3}, 1));
    peft::add_adapter(*embedding, LoraOptions(2).alpha(3).init(LoraInit::mica), peft::all());
    const auto B = only(*embedding)->lora_B;
    check_values(B.mm(B.t()), {0.9420733, 0.2148062, -0.09181213, 0.2148062, 0.2034466, 0.3404619,
                               -0.09181213, 0.3404619, 0.8544798});
  }
}

// Reference: Hugging Face PEFT, tests/reference/lora_init_values.py.
TEST_CASE("CorDA starts and trains as Hugging Face's", "[lora][init]") {
  const auto adapt = [](peft::Linear& site) {
    return peft::add_adapter(*site, LoraOptions(2).alpha(3).init(LoraInit::corda), peft::all());
  };
  const auto run = [](peft::Linear& site) {
    for (const auto k : {3, 40}) site->forward(fill({7, 8}, k));
  };
  SECTION("the largest components") {
    auto site = filled_linear();
    auto adapter = adapt(site);
    peft::initialize_corda(*site, adapter, [&] { run(site); });
    check_start(site, {0.6138327, 0.6065419, 0.2754869, -0.1419805, -0.1492715, -0.1565626},
                {0.3780097, -0.2049402, -0.1316948, 0.1527499, -0.4123925, -0.01543768});
  }
  SECTION("the smallest components") {
    auto site = filled_linear(/*spread=*/true);
    auto adapter = adapt(site);
    peft::initialize_corda(
        *site, adapter, [&] { run(site); }, peft::CordaOptions().largest(false));
    check_start(site, {0.1075911, 0.0006881375, 0.005307331, 0.02929246, -0.05169637, 0.03994892},
                {1.100838, 0.0784958, -0.2451368, 0.340079, -0.3255273, -0.5114114}, /*no_op=*/true,
                /*spread=*/true);
  }
  SECTION("without samples") {
    auto site = filled_linear();
    auto adapter = adapt(site);
    CHECK_THROWS_WITH(peft::initialize_corda(*site, adapter, [] {}), Contains("the samples did not reach"));
    CHECK_THROWS_WITH(peft::initialize_corda(*site, adapter,
                                             [&] {
                                               site->forward(torch::zeros({3, 8}));
                                             }),
                      Contains("must be finite numbers, not all zero"));
    CHECK_THROWS_WITH(peft::initialize_eva(*site, adapter, [](Tensor&) { return true; }),
                      Contains("has no LoRA on a linear layer that was added with"));
    CHECK(site->adapters() == std::vector<std::string>{"default"});
    CHECK(site->is_training());
  }
}

// Reference: Hugging Face PEFT, tests/reference/lora_init_values.py.
TEST_CASE("LoRA-GA starts and trains as Hugging Face's", "[lora][init]") {
  using Direction = peft::LoraGaDirection;
  using Scale = peft::LoraGaScale;
  auto site = filled_linear();
  auto adapter = peft::add_adapter(*site, LoraOptions(2).alpha(3).init(LoraInit::lora_ga), peft::all());
  const auto begin = [&](Direction direction, Scale scale) {
    peft::initialize_lora_ga(
        *site, adapter,
        [&] {
          for (const auto k : {5, 30}) {
            (site->forward(fill({5, 8}, k)) - fill({5, 6}, 6)).square().mean().backward();
          }
        },
        peft::LoraGaOptions().direction(direction).scale(scale));
    CHECK(!site->base->weight.requires_grad());
  };
  SECTION("ArB2r") {
    begin(Direction::ArB2r, Scale::stable);
    check_start(site, {5.624612e-05, -0.002210864, 6.996724e-05, -0.003175939, 0.003009012, 0.0001572506},
                {0.912791, -0.03232861, -0.07934687, 0.3731666, -0.703565, 0.004921049});
  }
  SECTION("A2rBr") {
    begin(Direction::A2rBr, Scale::stable);
    check_start(site, {0.001764955, 0.008532235, 0.003707597, -0.001258137, 0.004769547, 0.00100182},
                {0.9451905, 0.08854041, 0.0875911, 0.3244682, -0.5529308, 0.06945983});
  }
  SECTION("ArBr") {
    begin(Direction::ArBr, Scale::stable);
    check_start(site, {-0.002934356, -0.01372852, -0.006039956, 0.001944794, -0.007785426, -0.001820193},
                {0.9243249, 0.3073564, 0.1993246, 0.2592564, -0.3776987, 0.01967101});
  }
  SECTION("weight_svd") {
    begin(Direction::ArB2r, Scale::weight_svd);
    check_start(site, {0.01397719, -0.5494105, 0.01738811, -0.7892361, 0.7477536, 0.03907759},
                {0.920342, -0.1971478, 0.1061672, 0.1844872, -0.4681312, 0.07248259});
  }
  SECTION("gd_scale") {
    begin(Direction::ArB2r, Scale::gd_scale);
    check_start(site, {6.388977e-05, -0.002511316, 7.947808e-05, -0.003607543, 0.00341793, 0.0001786204},
                {0.8521321, 0.0111483, -0.04686777, 0.3330131, -0.6623515, -0.05759707});
  }
  SECTION("unit") {
    begin(Direction::ArB2r, Scale::unit);
    check_start(site, {0.0001437507, -0.005650466, 0.0001788242, -0.008116974, 0.007690351, 0.0004018958},
                {0.9127604, -0.03455535, -0.07810566, 0.3735978, -0.7033762, 0.005676694});
  }
  SECTION("random: both factors from the same vectors") {
    begin(Direction::random, Scale::unit);
    const auto piece = only(*site);
    CHECK(largest(piece->lora_A.mm(piece->lora_A.t()), torch::eye(2)) < 1e-5);
    CHECK(largest(site->forward(fill({1, 8}, 9)),
                  at::linear(fill({1, 8}, 9), site->base->weight, site->base->bias)) < 1e-6);
  }
  SECTION("without a gradient, and with an optimizer") {
    CHECK_THROWS_WITH(peft::initialize_lora_ga(*site, adapter, [] {}), Contains("got no gradient"));
    peft::AdamW optimizer(adapter);
    CHECK_THROWS_WITH(begin(Direction::ArBr, Scale::unit), Contains("already has an optimizer"));
  }
}

namespace {

/// q and k share their input.
struct NetImpl : nn::Module {
  NetImpl() {
    int64_t index = 0;
    for (auto* layer : {&q, &k, &o}) {
      assign((*layer)->base->weight, fill((*layer)->base->weight.sizes().vec(), 1 + 20 * index));
      assign((*layer)->base->bias, fill((*layer)->base->bias.sizes().vec(), 2 + index++));
    }
  }
  Tensor forward(const Tensor& x) { return o->forward(torch::tanh(q->forward(x) + k->forward(x))); }

  peft::Linear q{register_module("q", peft::Linear(8, 6))};
  peft::Linear k{register_module("k", peft::Linear(8, 6))};
  peft::Linear o{register_module("o", peft::Linear(6, 5))};
};
TORCH_MODULE(Net);

/// Five batches of 24 rows, of which two columns dominate.
std::vector<Tensor> eva_batches() {
  std::vector<Tensor> batches;
  for (uint64_t seed = 0; seed < 5; ++seed) {
    torch::manual_seed(seed);
    batches.push_back(torch::randn({24, 8}) *
                      torch::tensor({20., 17., 1., 1., 1., 1., 1., 1.}).to(torch::kFloat32));
  }
  return batches;
}

}  // namespace

// Reference: Hugging Face PEFT, tests/reference/lora_init_values.py.
TEST_CASE("EVA finds Hugging Face's directions, ranks and alphas", "[lora][init]") {
  Net net;
  const auto batches = eva_batches();
  const auto add = [&](int64_t rank) {
    return peft::add_adapter(*net, LoraOptions(rank).alpha(6).init(LoraInit::eva),
                             peft::named({"q", "k", "o"}));
  };
  size_t used = 0;
  const auto next = [&](Tensor&) {
    net->forward(batches[used++ % batches.size()]);
    return true;
  };
  const auto check_layer = [&](const peft::Adapter& adapter, size_t index, int64_t rank, double alpha,
                               const std::vector<double>& directions) {
    const auto piece = adapter.layers<peft::LoraImpl>().at(index);
    CHECK(piece->rank == rank);
    CHECK(piece->alpha == Approx(alpha));
    CHECK(piece->lora_A.sizes().vec() == std::vector<int64_t>{rank, piece->site().fan_in[0]});
    check_values(piece->lora_A.mv(fill({piece->lora_A.size(1)}, 9)), directions, 1e-5);
    CHECK(piece->lora_B.abs().max().item<float>() == 0);
  };
  SECTION("ranks and alphas move between layers") {
    auto adapter = add(3);
    const auto before = net->forward(batches[0]).detach();
    peft::initialize_eva(*net, adapter, next);
    CHECK(used == 11);  // and one more in the reference, which looks at the first batch twice
    check_layer(adapter, 0, 2, 4, {0.05483486, -0.2540551});
    check_layer(adapter, 1, 2, 4, {0.05483486, -0.2540551});
    check_layer(adapter, 2, 5, 10, {-0.1312859, -0.08073901, -0.0177649, 0.2395066, -0.5190759});
    CHECK(torch::equal(net->forward(batches[0]), before));
    CHECK(net->is_training());
    // It trains, and its copy has the same ranks.
    shake(adapter);
    const auto copy = std::dynamic_pointer_cast<peft::Linear::Impl>(net->o->clone());
    CHECK(torch::equal(copy->forward(torch::ones({6})), net->o->forward(torch::ones({6}))));
    net->forward(batches[0]).sum().backward();
    for (const auto& tensor : adapter.parameters()) CHECK(tensor.grad().defined());
  }
  SECTION("a model that has moved to another type meanwhile") {
    auto adapter = add(3);
    net->to(torch::kFloat64);
    peft::initialize_eva(*net, adapter, [&](Tensor&) {
      net->forward(batches[used++ % batches.size()].to(torch::kFloat64));
      return true;
    });
    CHECK(adapter.layers<peft::LoraImpl>().at(2)->rank == 5);
    for (const auto& tensor : adapter.parameters()) CHECK(tensor.scalar_type() == torch::kFloat64);
  }
  SECTION("rank 1") {
    auto adapter = add(1);
    peft::initialize_eva(*net, adapter, next);
    check_layer(adapter, 0, 1, 6, {0.0548356});
    check_layer(adapter, 1, 1, 6, {0.0548356});
    check_layer(adapter, 2, 1, 6, {-0.1335807});
  }
  SECTION("whitened, alphas left alone") {
    auto adapter = add(3);
    peft::initialize_eva(*net, adapter, next,
                         peft::EvaOptions().rho(1.5).whiten(true).adjust_scaling_factors(false));
    // The reference whitens the directions that q and k share twice over.
    check_layer(adapter, 2, 4, 6, {-0.02833896, -0.02693999, -0.01813722, -0.3420289});
    const auto pieces = adapter.layers<peft::LoraImpl>();
    CHECK(pieces.at(0)->rank == 3);
    CHECK(pieces.at(1)->rank == 2);
    CHECK(pieces.at(1)->alpha == 6);
    CHECK(torch::equal(pieces.at(0)->lora_A.narrow(0, 0, 2), pieces.at(1)->lora_A));
  }
  SECTION("positions that do not count") {
    auto adapter = add(3);
    peft::initialize_eva(*net, adapter, [&](Tensor& positions) {
      const auto& batch = batches[used++ % batches.size()];
      net->forward(torch::cat({batch, torch::full({8, 8}, 1e3)}).view({4, 8, 8}));
      positions = (torch::arange(32) < 24).view({4, 8});
      return true;
    });
    check_layer(adapter, 0, 2, 4, {0.05483486, -0.2540551});
  }
}

TEST_CASE("EVA takes the adapter off a layer that gets no rank", "[lora][init]") {
  torch::manual_seed(4);
  struct TwoImpl : nn::Module {
    peft::Linear narrow{register_module("narrow", peft::Linear(8, 4))};
    peft::Linear wide{register_module("wide", peft::Linear(8, 4))};
  };
  TwoImpl net;
  auto adapter = peft::add_adapter(net, {peft::on(LoraOptions(1).init(LoraInit::eva), peft::all()),
                                         peft::on(peft::BiasOptions(), peft::all())});
  // All variance of the one in two directions, that of the other in eight.
  const auto x = torch::randn({64, 8}), y = torch::randn({64, 8});
  const auto strong = x * torch::tensor({10.F, 9.F, 0.F, 0.F, 0.F, 0.F, 0.F, 0.F});
  peft::initialize_eva(net, adapter, [&](Tensor&) {
    net.narrow->forward(strong);
    net.wide->forward(y);
    return true;
  });
  CHECK(adapter.layers<peft::LoraImpl>().size() == 1);
  CHECK(adapter.layers<peft::BiasImpl>().size() == 2);
  CHECK(adapter.layers<peft::LoraImpl>().at(0)->rank == 2);
  CHECK(net.narrow->pieces("default").size() == 2);
  CHECK(net.wide->pieces("default").size() == 1);
  CHECK_NOTHROW(net.wide->forward(y));

  // Its file does not say that layer again, by whatever name the adapter was asked for.
  const peft_test::TemporaryFolder folder;
  auto pair = std::make_shared<TwoImpl>();
  auto named = peft::add_adapter(*pair, LoraOptions(1).init(LoraInit::eva), peft::matching("narrow|wide"));
  peft::initialize_eva(*pair, named, [&](Tensor&) {
    pair->narrow->forward(strong);
    pair->wide->forward(y);
    return true;
  });
  REQUIRE(named.sites() == std::vector<std::string>{"narrow"});
  peft::save_adapter(named, folder / "out");
  auto other = std::make_shared<TwoImpl>();
  CHECK(peft::load_adapter(*other, folder / "out").sites() == named.sites());
}

TEST_CASE("EVA says what is wrong and leaves the model as it was", "[lora][init]") {
  Net net;
  auto adapter = peft::add_adapter(*net, LoraOptions(3).init(LoraInit::eva), peft::named({"q", "o"}));
  const auto x = torch::randn({24, 8});
  const auto run = [&](Tensor&) {
    net->forward(x);
    return true;
  };
  const auto eva = [&](const peft::EvaOptions& options) {
    peft::initialize_eva(*net, adapter, run, options);
  };
  CHECK_THROWS_WITH(eva(peft::EvaOptions().rho(0.5)), Contains("rho must be at least 1, but got 0.5"));
  CHECK_THROWS_WITH(eva(peft::EvaOptions().tau(1.5)), Contains("tau must be in [0, 1], but got 1.5"));
  CHECK_THROWS_WITH(eva(peft::EvaOptions().rho(2.5)),
                    Contains("'o' has 6 inputs, but rank · rho asks for 8"));
  CHECK_THROWS_WITH(peft::initialize_eva(*net, adapter, [](Tensor&) { return false; }),
                    Contains("the batches ended before all directions converged"));
  CHECK_THROWS_WITH(peft::initialize_eva(*net, adapter,
                                         [&](Tensor& used) {
                                           used = torch::ones({3}, torch::kBool);
                                           return run(used);
                                         }),
                    Contains("mask of used positions has 3 entries, but 'q' got 24 rows"));
  CHECK_THROWS_WITH(peft::initialize_eva(*net, adapter,
                                         [&](Tensor&) {
                                           auto own = x.clone();
                                           net->forward(own);
                                           own.add_(1);
                                           return true;
                                         }),
                    Contains("wrote to the input of 'q'"));
  CHECK(net->q->adapters() == std::vector<std::string>{"default"});
  CHECK_NOTHROW(net->forward(x));
  CHECK(net->is_training());
}

// Reference: Hugging Face PEFT and bitsandbytes, tests/reference/lora_init_values.py loftq.
TEST_CASE("LoftQ quantises and makes up for it as Hugging Face's", "[lora][init]") {
  peft::Linear site(nn::LinearOptions(24, 16).bias(false));
  assign(site->base->weight, fill({16, 24}, 1));
  const auto probe = fill({24}, 9);
  const auto check = [&](int64_t bits, int64_t rounds, const std::vector<double>& Q,
                         const std::vector<double>& BA) {
    peft::add_adapter(*site,
                      LoraOptions(4).alpha(8).init(LoraInit::loftq).loftq_bits(bits).loftq_iter(rounds),
                      peft::all());
    const auto piece = only(*site);
    const auto update = piece->lora_B.mm(piece->lora_A).mv(probe);
    check_values(piece->loftq_weight.mv(probe), Q, 2e-5);
    check_values(update, BA, 2e-5);
    // The adapted layer is Q + s · B A; the base itself is untouched, and comes back.
    CHECK(largest(site->forward(probe), piece->loftq_weight.mv(probe) + update * 2) < 1e-5);
    CHECK(torch::equal(site->base->weight, fill({16, 24}, 1)));
    const auto off = peft::disabled(*site);
    CHECK(largest(site->forward(probe), fill({16, 24}, 1).mv(probe)) < 1e-6);
  };
  SECTION("four bits") {
    check(4, 1,
          {0.9779307, 0.6937168, -0.6238199, -1.017479, -0.1901, 1.472046, 0.2366123, -0.8009431, -1.045364,
           0.2889267, 2.006836, 0.2600098, -0.9290107, -0.8343416, 0.2719596, 1.429224},
          {0.01888066, -0.01280783, -0.02552518, 0.02840869, -0.01187499, -0.0194046, 0.00887063, 0.01250287,
           -0.02044941, 0.01725149, -0.002745597, -0.01148018, -0.01240548, 0.007098553, -0.01894348,
           0.02418689});
  }
  SECTION("four bits, three rounds") {
    check(4, 3,
          {0.9789177, 0.6710682, -0.6468601, -1.02344, -0.2279773, 1.497302, 0.2385229, -0.8402065, -1.059622,
           0.2912148, 2.021137, 0.2705811, -0.9530151, -0.7786362, 0.2719232, 1.416503},
          {0.03563061, -0.01522591, -0.01536596, 0.0257247, -0.01526276, -0.02213295, 0.03104822,
           -0.0002089702, -0.01536843, 0.02607942, -0.003132176, -0.002746885, -0.0173253, -0.02422274,
           -0.0244615, 0.03734956});
  }
  SECTION("eight bits") {
    check(8, 1,
          {1.026572, 0.636063, -0.6696276, -1.029615, -0.2669685, 1.486968, 0.280259, -0.8235694, -1.041535,
           0.296811, 1.975703, 0.2671411, -0.9413385, -0.8257086, 0.2813744, 1.490728},
          {0.0001502893, 0.001935383, -0.0001089086, 0.0002520978, 0.001089594, 4.614276e-05, 0.0002172319,
           -0.002178179, -0.0004337108, -0.0002067356, 0.0008841836, -0.001519166, -0.0007391074, 0.001284309,
           0.001226247, -0.0009952527});
  }
  SECTION("eight bits, two rounds") {
    check(8, 2,
          {1.026572, 0.6366842, -0.6696276, -1.029615, -0.2668381, 1.485516, 0.2784147, -0.8235694, -1.041535,
           0.2965212, 1.97456, 0.2667418, -0.9422578, -0.8249024, 0.2812313, 1.489985},
          {-2.879442e-06, 0.001183866, 0.0003666204, -8.17629e-05, 0.0002206612, 0.0006613812, 0.001165317,
           -0.002429516, -0.0008659832, 0.000538405, 0.001939452, -0.001593283, -0.0001948633, 0.0001605712,
           0.001179031, -0.0009751747});
  }
}

// Reference: bitsandbytes' CPU kernels.
TEST_CASE("NF4 rounds as bitsandbytes does, a short last block included", "[lora][init]") {
  const auto whole = torch::cat({fill({64}, 1), 0.3 * fill({64}, 9), 2 * fill({64}, 20)});
  const auto back = peft::internal::nf4_round_trip(whole);
  check_values(back.narrow(0, 0, 8),
               {-0.14222069, 0.22035491, -0.3480964, -0.045525018, 0.36147842, -0.26253653, 0.080465101, 0.5},
               1e-7);
  CHECK_THAT((back - whole).abs().max().item<double>(), WithinAbs(0.1438072, 1e-6));
  const auto uneven = torch::cat({fill({64}, 1), 0.7 * fill({5}, 9)});
  check_values(peft::internal::nf4_round_trip(uneven).narrow(0, 64, 5),
               {-0.12992786, 0.11117411, -0.329, -0.060790457, 0.18510099}, 1e-7);
  CHECK(peft::internal::nf4_round_trip(torch::zeros({66})).abs().max().item<float>() == 0);
  CHECK(peft::internal::nf4_round_trip(torch::tensor({1.0F, 0.07958029955625534F / 2}))
            .equal(torch::tensor({1.0F, 0.0F})));
}

TEST_CASE("A start that is taken out of the base is not dropped with the input", "[lora][init]") {
  auto site = filled_linear();
  peft::add_adapter(*site, LoraOptions(2).alpha(3).dropout(0.5).init(LoraInit::pissa), peft::all());
  const auto piece = only(*site);
  shake(peft::adapter(*site, "default"));
  torch::NoGradGuard no_grad;
  const auto x = fill({5, 8}, 5);
  torch::manual_seed(1);
  const auto y = site->forward(x);
  torch::manual_seed(1);
  const auto dropped = torch::dropout(x, 0.5, true);
  const auto residual = site->base->weight - piece->lora_B_0.mm(piece->lora_A_0) * piece->scaling();
  const auto expected = at::linear(x, residual, site->base->bias) +
                        at::linear(dropped, piece->lora_B.mm(piece->lora_A)) * piece->scaling();
  CHECK(largest(y, expected) < 1e-5);
}

TEST_CASE("A start that does not suit the layer is refused with its name", "[lora][init]") {
  nn::Sequential model;
  model->push_back("linear", peft::Linear(6, 4));
  model->push_back("conv", peft::Conv2d(4, 6, 3));
  model->push_back("embedding", peft::Embedding(7, 5));
  const auto add = [&](const char* layer, const LoraOptions& options) {
    peft::add_adapter(*model, options, peft::named({layer}));
  };
  CHECK_THROWS_WITH(add("conv", LoraOptions(2).init(LoraInit::pissa)),
                    Contains("a Conv2d has no init pissa"));
  CHECK_THROWS_WITH(add("conv", LoraOptions(2).init(LoraInit::eva)), Contains("a Conv2d has no init eva"));
  CHECK_THROWS_WITH(add("embedding", LoraOptions(2).init(LoraInit::loftq)),
                    Contains("a Embedding has no init loftq"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(5).init(LoraInit::olora)),
                    Contains("needs 5 singular vectors for rank 5, but the weight has 4"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(3).init(LoraInit::lora_ga)),
                    Contains("needs 6 singular vectors"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(3).init(LoraInit::orthogonal)),
                    Contains("needs an even rank, but got rank 3"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(2).alpha(0).init(LoraInit::pissa)),
                    Contains("needs a positive alpha, but got 0"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(2).init(LoraInit::mica).enable({true, false})),
                    Contains("init mica cannot be combined with enable"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(2).niter(-1)),
                    Contains("niter must be at least 0, but got -1"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(2).loftq_bits(3)),
                    Contains("loftq_bits must be 4 or 8, but got 3"));
  CHECK_THROWS_WITH(add("linear", LoraOptions(2).loftq_iter(0)),
                    Contains("loftq_iter must be positive, but got 0"));
  // What the reference starts as usual: an embedding, and a convolution with lora_ga.
  CHECK_NOTHROW(add("embedding", LoraOptions(2).init(LoraInit::pissa)));
}
