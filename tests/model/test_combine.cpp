#include <ATen/CPUGeneratorImpl.h>

#include <limits>

#include "methods/reference_values.h"
#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::Adapter;
using peft::CombineOptions;
using peft::CombineType;
using peft::LoraOptions;
using peft::named;
using Paths = std::vector<std::string>;

namespace {

struct NetImpl : nn::Cloneable<NetImpl> {
  NetImpl() { NetImpl::reset(); }
  void reset() override {
    embed = register_module("embed", peft::Embedding(9, 8));
    query = register_module("query", peft::Linear(8, 8));
    value = register_module("value", peft::Linear(8, 8));
    conv = register_module("conv", peft::Conv1d(nn::Conv1dOptions(8, 8, 3).padding(1).groups(2)));
    classifier = register_module("classifier", peft::Linear(8, 3));
  }
  Tensor forward(const Tensor& ids) {
    auto x = embed->forward(ids);
    x = query->forward(x) + value->forward(x).tanh();
    return classifier->forward(conv->forward(x.transpose(1, 2)).mean(2));
  }
  peft::Embedding embed{nullptr};
  peft::Linear query{nullptr}, value{nullptr};
  peft::Conv1d conv{nullptr};
  peft::Linear classifier{nullptr};
};
TORCH_MODULE(Net);

Net make_net() {
  torch::manual_seed(3);
  Net net;
  net->to(torch::kFloat64);
  return net;
}

/// An adapter that does something.
Adapter shaken(nn::Module& model, const LoraOptions& options, const Paths& layers, const std::string& name) {
  auto adapter = peft::add_adapter(model, options, named(layers), name);
  shake(adapter);
  return adapter;
}

/// W′ − W of an adapter at a site, the grouped convolution's too.
Tensor change(const Adapter& adapter, const std::string& site) {
  for (const auto& entry : adapter.entries()) {
    const auto lora = std::dynamic_pointer_cast<peft::LoraImpl>(entry.piece);
    if (entry.site->path() != site || !lora || lora->site().groups == 1) continue;
    // Group by group, B sees its own rows of A.
    const auto groups = lora->site().groups, rows = lora->rank / groups;
    std::vector<Tensor> parts;
    for (int64_t g = 0; g < groups; ++g) {
      parts.push_back(lora->lora_B.chunk(groups)[static_cast<size_t>(g)].flatten(1).mm(
          lora->lora_A.narrow(0, g * rows, rows).flatten(1)));
    }
    return torch::cat(parts) * lora->scaling();
  }
  return adapter.effective_delta(site);
}

template <class PieceType>
std::shared_ptr<PieceType> piece(const Adapter& adapter, const std::string& site) {
  for (const auto& entry : adapter.entries()) {
    if (auto typed = std::dynamic_pointer_cast<PieceType>(entry.piece); typed && entry.site->path() == site)
      return typed;
  }
  FAIL("no such piece on " << site);
  return nullptr;
}

/// The change by 0.7 a − 0.2 b, as tests/reference/combine_values.py has it.
template <class Site>
void check_change(Site site, const CombineOptions& options, const std::vector<double>& expected) {
  const bool random = peft::draws(options.type());
  site->to(random ? torch::kFloat32 : torch::kFloat64);
  for (const auto& [name, start, alpha] : {std::tuple("a", 3, 3.0), std::tuple("b", 7, 4.0)}) {
    const auto lora = peft::add_adapter(*site, LoraOptions(2).alpha(alpha), peft::all(), name)
                          .template layers<peft::LoraImpl>();
    assign(lora.at(0)->lora_A, fill(lora.at(0)->lora_A.sizes().vec(), start));
    assign(lora.at(0)->lora_B, fill(lora.at(0)->lora_B.sizes().vec(), start + 1));
  }
  torch::manual_seed(5);
  auto copy = options;
  const auto both = peft::combine(*site, {{"a", 0.7}, {"b", -0.2}}, copy.density(0.5), "both");
  const auto lora = both.template layers<peft::LoraImpl>().at(0);
  CHECK(lora->scaling() == 1.0);
  check_values(both.effective_delta(""), expected, random ? 5e-7 : 1e-8);
}

struct Row {
  CombineType type;
  std::vector<double> expected;
};

/// The call throws an error that holds every one of `texts`, and the model is what it was.
template <class Call>
void check_refused(nn::Module& model, const Call& call, const Paths& texts) {
  const auto keys = model.named_parameters().keys();
  const auto values = copies(model);
  const auto active = peft::active_adapters(model);
  const auto generator = at::detail::getDefaultCPUGenerator().get_state();
  std::string what;
  try {
    call();
  } catch (const c10::ValueError& error) {
    what = error.what_without_backtrace();
  }
  REQUIRE_FALSE(what.empty());
  for (const auto& text : texts) CHECK_THAT(what, Contains(text));
  CHECK(model.named_parameters().keys() == keys);
  const auto now = copies(model);
  for (size_t i = 0; i < values.size(); ++i) CHECK(torch::equal(values[i], now[i]));
  CHECK(peft::active_adapters(model) == active);
  CHECK(torch::equal(generator, at::detail::getDefaultCPUGenerator().get_state()));
}

}  // namespace

TEST_CASE("combine equals Hugging Face's add_weighted_adapter", "[combine]") {
  const std::vector<double> ties{-0.01049879993, 0.07964,        0.03745868124, -0.004018059233,
                                 0.03764,        -0.04847594042, -0.05634,      0.02494,
                                 -0.13404,       -0.04847594042, 0.12792,       -0.09864},
      svd{-0.009301310476, 0.0739147282,  -0.02014784446, 0.01318951079,  0.04652872712, -0.003196488975,
          -0.04294608714,  0.03308947953, -0.1433768468,  -0.07673466279, 0.1662886866,  -0.1253654457};
  SECTION("linear") {
    const std::vector<Row> rows{
        {CombineType::linear,
         {-0.03054088136, 0.03758900023, 0.03418319961, -0.01212739985, 0.007565518717, -0.05417459969,
          -0.01019540031, -0.009120999771, -0.1886480812, -0.1373531996, 0.1969159998, -0.1747845997}},
        {CombineType::cat,
         {-0.01233, 0.072585, -0.02531, 0.01062, 0.038025, -0.00693, -0.05744, 0.025875, -0.14594, -0.07786,
          0.16192, -0.12754}},
        {CombineType::svd, svd},
        {CombineType::ties, ties},
        {CombineType::ties_svd,
         {-0.02219853018, 0.007149476766, 0.02973690837, -0.06725683855, 0.02923431922, 0.01341956934,
          -0.01625818258, -0.07755739633, -0.1954498424, 0.005317191572, 0.2040177047, -0.1728884013}},
        {CombineType::magnitude_prune, ties},
        {CombineType::magnitude_prune_svd,
         {-0.02014348808, 0.01793458314, 0.02645900307, -0.07732913352, 0.04855973533, 0.02858132986,
          -0.04157212393, -0.0718060963, -0.1947907198, 0.01277654211, 0.2061733224, -0.170136461}},
        {CombineType::dare_linear,
         {0.05584381521, 0.03421830758, -0.01555377711, 0.05102070794, 0.0, 0.0, -0.05879999697, 0.1171204671,
          -0.819042623, -0.501868546, 0.08813807368, -0.4694772959}},
        {CombineType::dare_linear_svd,
         {0.06673540175, 0.02043740079, 0.007659364492, 0.02476158924, -0.187911436, 0.004045449197,
          -0.2420839369, 0.05244707316, -0.29273206, -0.210457623, 0.3989330232, -0.3482446373}},
        {CombineType::dare_ties,
         {0.05039999261, 0.03421830758, -0.01555377711, 0.03779999539, 0.0, 0.0, -0.05879999697,
          0.06714047492, -0.7391999364, -0.501868546, 0.08813807368, -0.3945599794}},
        {CombineType::dare_ties_svd,
         {0.05701070651, 0.0188846644, 0.01664758474, 0.02605288848, -0.1903539896, 0.004275940359,
          -0.2398305535, 0.0293694213, -0.147651583, -0.2107409388, 0.3997283578, -0.3471461535}},
    };
    for (const auto& [type, expected] : rows) {
      INFO(peft::to_string(type));
      check_change(peft::Linear(4, 3), CombineOptions(type), expected);
    }
  }
  SECTION("embedding") {
    const std::vector<Row> rows{
        {CombineType::linear,
         {0.001663919483, -0.02516468044, -0.1936080005, -0.1598652368, 0.1465009621, -0.1069429177,
          0.208136636, -0.1869867627, 0.1701251184, -0.2095816369, 0.191554562, -0.1443743178, 0.01667160038,
          0.002128000457, 0.1545246804}},
        {CombineType::svd,
         {0.1529881103, 0.1549391647, -0.2488159738, -0.1268703166, 0.01239332159, 0.01423566788,
          0.05880164182, -0.132664329, 0.1664677259, -0.1871412071, 0.05461144001, -0.02854108036,
          0.06506937623, 0.02019214912, -0.0435020693}},
        {CombineType::ties_svd,
         {0.1681513127, 0.1685894284, -0.2717880832, -0.05488525182, -0.006401324277, -0.003380035763,
          0.0009321388682, -0.06220973506, 0.1180800066, -0.1556327144, -0.01815160612, -0.009584435221,
          0.1184807132, 0.0602141105, -0.08057039074}},
        {CombineType::dare_linear,
         {-0.2281220704, 0.0, -0.3695999682, 0.08640000969, 0.0, 0.1399839967, -0.2065380812, 0.0,
          -0.3346298933, 0.2568965554, -0.04624000192, 0.3947999775, 0.1336945593, 0.1278399974,
          0.2758299112}},
        {CombineType::dare_ties_svd,
         {-0.003908959217, -0.03040544689, 0.03963640332, -0.1000275612, -0.008145568892, -0.02049247921,
          -0.001248437911, -0.1838717461, 0.2467319965, -0.3092727661, -0.05479342118, -0.0235664621,
          0.2390298396, 0.01058938541, 0.0608984679}},
    };
    for (const auto& [type, expected] : rows) {
      INFO(peft::to_string(type));
      check_change(peft::Embedding(5, 3), CombineOptions(type), expected);
    }
  }
  SECTION("convolution") {
    const std::vector<Row> rows{
        {CombineType::linear,
         {-0.2192911182,   -0.1511612366, 0.2168406363, -0.2008776367, 0.02537560061, 0.2352541178,
          -0.1824641552,   0.1855377177,  0.1993950807, 0.1376549623,  -0.1958327625, 0.1827085623,
          -0.006717999314, -0.212519281,  0.1660220438, -0.1674656811, -0.159578318,  -0.1082834364,
          0.1687845997,    -0.1457148365, 0.1531841617, 0.1826480812,  -0.131851355,  0.1452166811}},
        {CombineType::svd,
         {-0.1671177002, -0.08037682474, 0.1003537674,   -0.1436742203, 0.1199569708,   0.1237972472,
          -0.1202307405, 0.06049985165,  0.08437312077,  0.0286114314,  -0.1307702367,  0.06930239392,
          0.08736804819, -0.1458409636,  0.05423166706,  -0.1051500011, -0.0863287079,  -0.03234517989,
          0.1132500961,  -0.0717385652,  -0.05144073431, 0.1278402388,  -0.05714842249, 0.08844685348}},
        {CombineType::ties_svd,
         {-0.1548782881,  -0.04699523403, 0.08896878623,  -0.1189487666, 0.1214586678,    0.1193231026,
          -0.03136161655, 0.02890564521,  0.08862083253,  0.03195916337, -0.06706251824,  0.03374332475,
          0.1099669295,   -0.1213437789,  -0.00144006437, -0.0483372167, -0.08944769593,  -0.03143254273,
          0.06505938488,  -0.0396427821,  -0.08178896402, 0.1138403939,  -0.001700992504, 0.04361387779}},
        {CombineType::dare_linear,
         {0.0,           -0.3261108696, 0.2379728109,   -0.5283600092, 0.0,           0.5283600092,
          -0.3855600357, 0.5306075215,  0.3277238011,   0.2782399952,  -0.2030400038, 0.7825602293,
          -0.2950254083, -0.4508002698, 0.4654983878,   -0.6398227811, 0.1036918536,  -0.1598400027,
          0.116640009,   -0.1540015042, -0.09334607422, 0.2589704096,  -0.1457784176, 0.200872004}},
        {CombineType::dare_ties_svd,
         {-0.3049165905,   -0.09620895237, 0.02871071547,   -0.2502478063, -0.008685410023, -0.009014080279,
          -0.004840926733, 0.06281166524,  -0.01426300406,  0.08066082746, -0.07826389372,  0.1475788951,
          0.01116146334,   -0.1992776841,  0.09894785285,   -0.1001578942, -0.03554456681,  -0.04073685035,
          0.03094306216,   -0.08438874781, -0.005022497848, 0.0678838715,  -0.03494368494,  0.04306090996}},
    };
    for (const auto& [type, expected] : rows) {
      INFO(peft::to_string(type));
      check_change(peft::Conv2d(nn::Conv2dOptions(2, 3, 2)), CombineOptions(type), expected);
    }
  }
  SECTION("a rank of its own") {
    check_change(peft::Linear(4, 3), CombineOptions(CombineType::svd).rank(1),
                 {0.01944842531, 0.01087587237, -0.0227394968, 0.01713151911, 0.03591199477, 0.02008256531,
                  -0.04198903907, 0.03163377059, -0.1421253527, -0.07947878406, 0.1661758703, -0.1251938476});
  }
  SECTION("a clamp") {
    check_change(
        peft::Linear(4, 3), CombineOptions(CombineType::svd).svd_clamp(0.8),
        {-0.01231909693, 0.03657310036, -0.01078647873, 0.009436122741, 0.03419254652, 0.01059306622,
         -0.0256600955, 0.02615875636, -0.09888342608, -0.07836016747, 0.09787762576, -0.09793640761});
  }
  SECTION("signs by frequency") {
    check_change(peft::Linear(4, 3), CombineOptions(CombineType::ties).sign(peft::Sign::frequency), ties);
  }
  SECTION("reduced U and V") {
    check_change(peft::Linear(4, 3), CombineOptions(CombineType::svd).svd_full_matrices(false), svd);
  }
}

TEST_CASE("merge functions compute the published rows", "[combine]") {
  const std::vector<Tensor> rows{torch::tensor({.9, -.1, .4, -.6, .05, .3}, torch::kFloat64),
                                 torch::tensor({-.5, .2, .45, .7, -.15, 0.}, torch::kFloat64),
                                 torch::tensor({.2, -.8, -.35, .65, .1, -.25}, torch::kFloat64)};
  const auto merged = [&](const CombineOptions& options) {
    return peft::internal::merge_tensors(rows, {1, .5, -.25}, options);
  };
  check_values(merged(CombineOptions(CombineType::linear)), {.6, .2, .7125, -.4125, -.05, .3625});
  check_values(merged(CombineOptions(CombineType::magnitude_prune).density(.5)),
               {.65, .2, .7125, -.4125, 0, 0});
  for (const auto sign : {peft::Sign::total, peft::Sign::frequency}) {
    check_values(merged(CombineOptions(CombineType::ties).density(.5).sign(sign)),
                 {.9, .2, .3125, .09375, 0, 0});
  }
  check_values(merged(CombineOptions(CombineType::ties).density(1)), {.425, .05, .3125, .09375, .0125, .3});
}

TEST_CASE("cat and exact add products up without cross terms, whatever the ranks", "[combine]") {
  auto net = make_net();
  const Paths layers{"embed", "query", "conv"};
  const auto a = shaken(*net, LoraOptions(4).alpha(3).rank_pattern({{"query", 2}}), layers, "a");
  const auto b = shaken(*net, LoraOptions(2).alpha(5).rslora(true), {"query", "value", "conv"}, "b");
  b.scale(1.5);
  const auto type = GENERATE(CombineType::cat, CombineType::exact);
  INFO(peft::to_string(type));
  const auto both = peft::combine(*net, {{"a", 0.5}, {"b", -0.25}}, CombineOptions(type), "both");
  CHECK(both.sites() == Paths{"embed", "query", "value", "conv"});
  CHECK(largest(change(both, "embed"), 0.5 * change(a, "embed")) < 1e-12);
  CHECK(largest(change(both, "query"), 0.5 * change(a, "query") - 0.25 * change(b, "query")) < 1e-12);
  CHECK(largest(change(both, "value"), -0.25 * change(b, "value")) < 1e-12);
  CHECK(largest(change(both, "conv"), 0.5 * change(a, "conv") - 0.25 * change(b, "conv")) < 1e-12);
  const bool padded = type == CombineType::cat;  // as the reference, with zeros
  CHECK(piece<peft::LoraImpl>(both, "embed")->rank == (padded ? 6 : 4));
  CHECK(piece<peft::LoraImpl>(both, "query")->rank == (padded ? 6 : 4));
  CHECK(piece<peft::LoraImpl>(both, "value")->rank == (padded ? 6 : 2));
  CHECK(piece<peft::LoraImpl>(both, "conv")->rank == 6);
  for (const auto& lora : both.layers<peft::LoraImpl>()) {
    CHECK(lora->scaling() == 1.0);
    CHECK(lora->alpha == static_cast<double>(lora->rank));
    CHECK_FALSE(lora->options.rslora());
  }
}

TEST_CASE("the parts of an attention have one rank in a sum", "[combine]") {
  struct BlockImpl : nn::Module {
    peft::MultiheadAttention attn = register_module("attn", peft::MultiheadAttention(8, 2));
    peft::Linear head = register_module("head", peft::Linear(8, 8));
  };
  torch::manual_seed(3);
  BlockImpl net;
  net.to(torch::kFloat64);
  const auto a = shaken(net, LoraOptions(1).alpha(3), {"attn", "head"}, "a");
  const auto b = shaken(net, LoraOptions(2), {"attn.in_proj", "head"}, "b");
  const auto options = GENERATE(CombineOptions(CombineType::exact), CombineOptions(CombineType::cat),
                                CombineOptions(CombineType::svd).rank(12));
  INFO(peft::to_string(options.type()));
  const auto both = peft::combine(net, {{"a", 0.5}, {"b", -0.25}}, options, "both");
  CHECK(both.sites() == Paths{"attn.in_proj", "attn.out_proj", "head"});
  for (const auto* site : {"attn.in_proj", "head"}) {
    INFO(site);
    CHECK(largest(change(both, site), 0.5 * change(a, site) - 0.25 * change(b, site)) < 1e-10);
  }
  CHECK(largest(change(both, "attn.out_proj"), 0.5 * change(a, "attn.out_proj")) < 1e-10);
  CHECK(piece<peft::LoraImpl>(both, "attn.out_proj")->rank ==
        piece<peft::LoraImpl>(both, "attn.in_proj")->rank);
}

TEST_CASE("combine leaves base and sources alone, and attaches without activating", "[combine]") {
  auto net = make_net();
  const auto a = shaken(*net, LoraOptions(2), {"query"}, "a");
  const auto b = shaken(*net, LoraOptions(2), {"query", "value"}, "b");
  const auto ids = torch::tensor({{1, 2}, {8, 0}});
  const auto before = net->forward(ids).detach();
  const auto values = copies(*net);
  const auto both =
      peft::combine(*net, {{"a", 1}, {"b", 1}}, CombineOptions(CombineType::ties).density(0.5), "both");
  CHECK(peft::active_adapters(*net) == Paths{"a", "b"});
  CHECK(torch::equal(net->forward(ids), before));
  CHECK(both.count() == 0);
  CHECK(a.count() > 0);
  size_t found = 0;
  const auto now = copies(*net);
  for (const auto& value : values) {
    found += std::any_of(now.begin(), now.end(),
                         [&](const Tensor& t) { return t.sizes() == value.sizes() && t.equal(value); });
  }
  CHECK(found == values.size());
  peft::set_active(*net, {"both"});
  CHECK_FALSE(torch::equal(net->forward(ids), before));
  peft::merge(*net);
  peft::unmerge(*net);
  auto copy = peft::clone(*net);
  CHECK(torch::equal(copy->forward(ids), net->forward(ids)));
}

TEST_CASE("a truncated sum is the nearest of its rank, at most as large as the layer", "[combine]") {
  auto net = make_net();
  const auto a = shaken(*net, LoraOptions(3), {"embed", "query", "classifier"}, "a");
  const auto b = shaken(*net, LoraOptions(5), {"embed", "query", "classifier"}, "b");
  const std::vector<peft::WeightedAdapter> weights{{"a", 0.6}, {"b", 0.4}};
  const auto whole = peft::combine(*net, weights, CombineOptions().rank(8), "whole");
  for (const auto* site : {"embed", "query", "classifier"}) {
    CHECK(largest(change(whole, site), 0.6 * change(a, site) + 0.4 * change(b, site)) < 1e-10);
  }
  CHECK(piece<peft::LoraImpl>(whole, "query")->rank == 8);
  CHECK(piece<peft::LoraImpl>(whole, "classifier")->rank == 3);  // of 3 outputs
  CHECK(piece<peft::LoraImpl>(peft::combine(*net, weights, CombineOptions(), "default"), "query")->rank == 5);
  const auto two = peft::combine(*net, weights, CombineOptions().rank(2), "two");
  const auto exact = change(whole, "query");
  const auto singular = std::get<1>(at::linalg_svd(exact));
  CHECK_THAT((change(two, "query") - exact).norm().item<double>(),
             WithinAbs(singular.slice(0, 2).norm().item<double>(), 1e-10));
}

TEST_CASE("starts taken out of the base, blocks and own biases are part of the sum", "[combine]") {
  auto net = make_net();
  const auto a = shaken(*net, LoraOptions(2).init(peft::LoraInit::pissa), {"query"}, "a");
  const auto b = shaken(*net, LoraOptions(2).enable({true, false}), {"query"}, "b");
  const auto both = peft::combine(*net, {{"a", 0.5}, {"b", 2}}, CombineOptions(CombineType::exact), "both");
  CHECK(piece<peft::LoraImpl>(both, "query")->rank == 6);
  CHECK(largest(change(both, "query"), 0.5 * change(a, "query") + 2 * change(b, "query")) < 1e-12);

  shaken(*net, LoraOptions(2).lora_bias(true), {"value"}, "c");
  shaken(*net, LoraOptions(2).lora_bias(true), {"value"}, "d");
  const auto biased = peft::combine(*net, {{"c", 0.5}, {"d", 2}}, CombineOptions(CombineType::cat), "biased");
  const auto bias = [&](const std::string& name) { return net->value->delta(name).bias; };
  CHECK(largest(bias("biased"), 0.5 * bias("c") + 2 * bias("d")) < 1e-12);
}

TEST_CASE("A layer whose LoRAs have no bias gets one of zero, or none where it takes none", "[combine]") {
  auto net = make_net();
  const auto a = shaken(*net, LoraOptions(2).lora_bias(true), {"value"}, "a");
  const auto b = shaken(*net, LoraOptions(2), {"query", "embed"}, "b");
  const auto type = GENERATE(CombineType::cat, CombineType::svd, CombineType::linear, CombineType::dare_ties);
  const auto both = peft::combine(*net, {{"a", 0.5}, {"b", 2}}, CombineOptions(type).density(1), "both");
  CHECK(largest(net->value->delta("both").bias, 0.5 * net->value->delta("a").bias) < 1e-12);
  CHECK(piece<peft::LoraImpl>(both, "query")->lora_B_bias.equal(torch::zeros({8}, torch::kFloat64)));
  CHECK(!piece<peft::LoraImpl>(both, "embed")->lora_B_bias.defined());
}

TEST_CASE("one adapter is scaled, whatever the type", "[combine]") {
  auto net = make_net();
  const auto a = shaken(*net, LoraOptions(2).alpha(3), {"query"}, "a");
  const auto type =
      GENERATE(CombineType::linear, CombineType::svd, CombineType::ties, CombineType::dare_ties_svd);
  const auto half = peft::combine(*net, {{"a", -0.5}}, CombineOptions(type).density(0.1), "half");
  CHECK(largest(change(half, "query"), -0.5 * change(a, "query")) < 1e-12);
}

TEST_CASE("a combined adapter is written and read with the ranks it has", "[combine]") {
  auto net = make_net();
  shaken(*net, LoraOptions(4).rank_pattern({{"query", 2}}), {"query", "value"}, "a");
  shaken(*net, LoraOptions(3).rslora(true), {"query", "embed"}, "b");
  const auto both = peft::combine(*net, {{"a", 1}, {"b", 1}}, CombineOptions(CombineType::exact), "both");
  const auto folder = std::filesystem::temp_directory_path() / "peft-test-combine";
  CHECK(peft::save_adapter(both, folder).empty());
  const auto read = peft::load_adapter(*net, folder, "read");
  for (const auto& site : both.sites()) CHECK(torch::equal(change(read, site), change(both, site)));
  std::filesystem::remove_all(folder);
}

TEST_CASE("(IA)³ vectors add up as the reference's, or about ones", "[combine]") {
  auto net = make_net();
  const auto options = peft::Ia3Options().feedforward({"value"});
  const auto a = peft::add_adapter(*net, options, named({"query", "value"}), "a");
  const auto b = peft::add_adapter(*net, options, named({"value"}), "b");
  shake(a);
  shake(b);
  const auto l = [](const Adapter& adapter, const std::string& site) {
    return piece<peft::Ia3Impl>(adapter, site)->ia3_l;
  };
  const std::vector<peft::WeightedAdapter> weights{{"a", 0.7}, {"b", 0.4}};
  const auto linear = peft::combine(*net, weights, CombineOptions(CombineType::linear), "linear");
  CHECK(largest(l(linear, "value"), 0.7 * l(a, "value") + 0.4 * l(b, "value")) < 1e-15);
  CHECK(largest(l(linear, "query"), 0.7 * l(a, "query")) < 1e-15);
  CHECK(piece<peft::Ia3Impl>(linear, "value")->feedforward);
  const auto exact = peft::combine(*net, weights, CombineOptions(CombineType::exact), "exact");
  CHECK(largest(l(exact, "value"), 1 + 0.7 * (l(a, "value") - 1) + 0.4 * (l(b, "value") - 1)) < 1e-15);
  CHECK(largest(l(exact, "query"), 1 + 0.7 * (l(a, "query") - 1)) < 1e-15);
  CHECK(largest(l(peft::negation(*net, "a", "minus"), "value"), 2 - l(a, "value")) < 1e-15);
  CHECK(largest(l(peft::negation(*net, "a", "less", 0.3), "value"), 1 + 0.3 * (1 - l(a, "value"))) < 1e-15);
  CHECK(largest(l(peft::average(*net, {"a", "b"}, "mean"), "value"), (l(a, "value") + l(b, "value")) / 2) <
        1e-15);

  const auto c = peft::add_adapter(*net, options, named({"query", "value"}), "c");
  shake(c);
  const auto moved = peft::analogy(*net, "a", "b", "c", 0.6, "moved");
  CHECK(largest(l(moved, "value"), 0.4 + 0.6 * l(a, "value") + 0.4 * l(b, "value") - 0.4 * l(c, "value")) <
        1e-15);
}

TEST_CASE("copies of base tensors are task vectors", "[combine]") {
  auto net = make_net();
  const auto make = [&](const std::string& name) {
    const auto adapter = peft::add_adapter(*net,
                                           {peft::on(peft::ReplaceOptions(), named({"classifier"})),
                                            peft::on(peft::BiasOptions(), named({"query"}))},
                                           name);
    shake(adapter);
    return adapter;
  };
  const auto a = make("a"), b = make("b"), c = make("c");
  const auto vector = [&](const Adapter& adapter) { return change(adapter, "classifier"); };
  const auto bias = [&](const Adapter& adapter) { return net->query->delta(adapter.name()).bias; };
  const auto sum = peft::combine(*net, {{"a", 0.7}, {"b", -0.2}}, CombineOptions(CombineType::linear), "sum");
  CHECK(largest(vector(sum), 0.7 * vector(a) - 0.2 * vector(b)) < 1e-14);
  CHECK(largest(bias(sum), 0.7 * bias(a) - 0.2 * bias(b)) < 1e-14);
  const auto options = CombineOptions(CombineType::ties).density(0.5);
  const auto ties = peft::combine(*net, {{"a", 0.7}, {"b", 0.3}}, options, "ties");
  CHECK(largest(vector(ties), peft::internal::merge_tensors({vector(a), vector(b)}, {0.7, 0.3}, options)) <
        1e-14);
  CHECK(largest(vector(peft::negation(*net, "a", "minus")), -vector(a)) < 1e-14);
  CHECK(largest(vector(peft::analogy(*net, "a", "b", "c", 0.6, "moved")),
                0.6 * vector(a) + 0.4 * (vector(b) - vector(c))) < 1e-14);
  check_refused(*net,
                [&] {
                  peft::combine(*net, {{"a", 1}, {"b", 1}}, CombineOptions(), "svd");
                },
                {"'classifier'", "'svd' is for low-rank products"});
}

TEST_CASE("a head is one adapter's, biases beside a LoRA add up", "[combine]") {
  auto net = make_net();
  const auto make = [&](const std::string& name, bool head) {
    std::vector<peft::Part> parts{peft::on(LoraOptions(2), named({"query"})),
                                  peft::on(peft::BiasOptions(), named({"query"}))};
    if (head) parts.push_back(peft::on(peft::ReplaceOptions(), named({"classifier"})));
    const auto adapter = peft::add_adapter(*net, parts, name);
    shake(adapter);
    return adapter;
  };
  const auto a = make("a", true), b = make("b", false), c = make("c", true);
  const auto one = peft::combine(*net, {{"a", 0.7}, {"b", 0.3}}, CombineOptions(CombineType::cat), "one");
  CHECK(torch::equal(change(one, "classifier"), change(a, "classifier")));
  const auto bias = [&](const std::string& name) { return net->query->delta(name).bias; };
  CHECK(largest(bias("one"), 0.7 * bias("a") + 0.3 * bias("b")) < 1e-14);
  const std::vector<peft::WeightedAdapter> both{{"a", 0.7}, {"c", 0.3}};
  check_refused(*net, [&] { peft::combine(*net, both, CombineOptions(CombineType::cat), "two"); },
                {"'classifier': 'a' and 'c' each have their own copy", "CombineOptions::head"});
  check_refused(*net, [&] { peft::combine(*net, both, CombineOptions(CombineType::cat).head("b"), "two"); },
                {"head must be one of the adapters, but got 'b'"});
  const auto two = peft::combine(*net, both, CombineOptions(CombineType::cat).head("c"), "two");
  CHECK(torch::equal(change(two, "classifier"), change(c, "classifier")));
}

TEST_CASE("PEM arithmetic on LoRA adds A and B apart, or products exactly", "[combine]") {
  auto net = make_net();
  const auto a = shaken(*net, LoraOptions(2).alpha(2), {"query"}, "a");
  const auto b = shaken(*net, LoraOptions(2).alpha(4), {"query"}, "b");
  const auto c = shaken(*net, LoraOptions(2).alpha(2), {"query"}, "c");
  const auto A = [](const Adapter& adapter) { return piece<peft::LoraImpl>(adapter, "query")->lora_A; };
  const auto B = [](const Adapter& adapter) { return piece<peft::LoraImpl>(adapter, "query")->lora_B; };
  const auto s = [](const Adapter& adapter) {
    return std::sqrt(piece<peft::LoraImpl>(adapter, "query")->scaling());
  };
  SECTION("addition, the weights divided by their sum") {
    const auto sum = peft::addition(*net, {{"a", 3}, {"b", 1}}, "sum");
    CHECK(largest(A(sum), 0.75 * s(a) * A(a) + 0.25 * s(b) * A(b)) < 1e-14);
    CHECK(largest(B(sum), 0.75 * s(a) * B(a) + 0.25 * s(b) * B(b)) < 1e-14);
    const auto exact =
        peft::addition(*net, {{"a", 3}, {"b", 1}}, "exact", peft::AdditionOptions().exact(true));
    CHECK(largest(change(exact, "query"), 0.75 * change(a, "query") + 0.25 * change(b, "query")) < 1e-14);
    CHECK(largest(change(peft::average(*net, {"a", "b"}, "mean"), "query"),
                  (change(a, "query") + change(b, "query")) / 2) < 1e-14);
  }
  SECTION("addition by Fisher information") {
    std::vector<peft::Fisher> fisher(2);
    torch::manual_seed(9);
    for (auto& one : fisher)
      one = {{"query.lora.lora_A", torch::rand({2, 8}, torch::kFloat64)},
             {"query.lora.lora_B", torch::rand({8, 2}, torch::kFloat64)}};
    fisher[1].at("query.lora.lora_A")[0][0] = 0;
    const auto sum =
        peft::addition(*net, {{"a", 1}, {"b", 3}}, "sum", peft::AdditionOptions().fisher(fisher));
    std::vector<Tensor> weight;
    for (size_t i = 0; i < 2; ++i) {
      auto F = fisher[i].at("query.lora.lora_A");
      const auto norm = (F.square().sum() + fisher[i].at("query.lora.lora_B").square().sum()).sqrt();
      if (i == 1) F = F.clamp_min(1e-6);
      weight.push_back((i == 0 ? 0.25 : 0.75) * F / norm);
    }
    CHECK(largest(A(sum), (weight[0] * s(a) * A(a) + weight[1] * s(b) * A(b)) / (weight[0] + weight[1])) <
          1e-13);
    check_refused(*net,
                  [&] {
                    peft::addition(*net, {{"a", 1}, {"b", 0}}, "x", peft::AdditionOptions().fisher(fisher));
                  },
                  {"with fisher, the weight of 'b' must be positive"});
    auto short_of_one = fisher;
    short_of_one[0].erase("query.lora.lora_B");
    check_refused(
        *net,
        [&] {
          peft::addition(*net, {{"a", 1}, {"b", 3}}, "x", peft::AdditionOptions().fisher(short_of_one));
        },
        {"fisher of 'a' lacks 'query.lora.lora_B'"});
    check_refused(
        *net,
        [&] {
          peft::addition(*net, {{"a", 1}, {"b", 3}}, "x", peft::AdditionOptions().fisher({fisher[0]}));
        },
        {"fisher must have an entry for each of the 2 adapters, but got 1"});
    check_refused(
        *net,
        [&] {
          peft::addition(*net, {{"a", 1}, {"b", 3}}, "x", peft::AdditionOptions().fisher(fisher).exact(true));
        },
        {"cannot be combined with exact"});
    shaken(*net, LoraOptions(2).init(peft::LoraInit::pissa), {"query"}, "started");
    check_refused(
        *net,
        [&] {
          peft::addition(*net, {{"started", 1}}, "x", peft::AdditionOptions().fisher({fisher[0]}));
        },
        {"'query': fisher weighs A and B, but the LoRA of 'started' has a start taken out of the base"});
  }
  SECTION("negation and unlearning") {
    CHECK(largest(change(peft::negation(*net, "b", "minus"), "query"), -change(b, "query")) < 1e-14);
    CHECK(largest(change(peft::negation(*net, "b", "less", 0.3), "query"), -0.3 * change(b, "query")) <
          1e-14);
  }
  SECTION("analogy") {
    const auto moved = peft::analogy(*net, "a", "b", "c", 0.6, "moved");
    CHECK(largest(A(moved), 0.6 * s(a) * A(a) + 0.4 * s(b) * A(b) + 0.4 * s(c) * A(c)) < 1e-14);
    CHECK(largest(B(moved), 0.6 * s(a) * B(a) + 0.4 * s(b) * B(b) - 0.4 * s(c) * B(c)) < 1e-14);
    const auto exact = peft::analogy(*net, "a", "b", "c", 0.6, "exact", /*exact=*/true);
    CHECK(largest(change(exact, "query"),
                  0.6 * change(a, "query") + 0.4 * (change(b, "query") - change(c, "query"))) < 1e-14);
    check_refused(*net, [&] { peft::analogy(*net, "a", "b", "c", 1.5, "x"); },
                  {"lambda must be in [0, 1], but got 1.5"});
  }
}

TEST_CASE("combine refuses what cannot be combined, all of it at once", "[combine]") {
  auto net = make_net();
  shaken(*net, LoraOptions(2), {"query"}, "a");
  shaken(*net, LoraOptions(3), {"query"}, "b");
  shaken(*net, LoraOptions(2), {"conv"}, "grouped");
  shaken(*net, LoraOptions(2).lora_bias(true), {"query"}, "biased");
  peft::add_adapter(*net, peft::Ia3Options(), named({"query"}), "outputs");
  peft::add_adapter(*net, peft::Ia3Options().feedforward({"query"}), named({"query"}), "inputs");
  peft::add_adapter(*net, peft::LohaOptions(2), named({"query"}), "loha");
  const auto linear = CombineOptions(CombineType::linear);
  const auto refuse = [&](const std::vector<peft::WeightedAdapter>& adapters, const CombineOptions& options,
                          const std::string& name, const Paths& texts) {
    check_refused(
        *net, [&] { peft::combine(*net, adapters, options, name); }, texts);
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  refuse({{"a", nan}, {"aa", 1}, {"a", 1}}, linear, "b",
         {"the weight of 'a' must be finite", "no adapter 'aa'; it has 'a'", "'a' is named twice",
          "already has an adapter 'b'"});
  refuse({}, linear, "new", {"expected at least one adapter, but got none"});
  refuse({{"a", 1}}, linear, "a.b", {"must not be empty, hold a dot"});
  refuse({{"a", 1}}, linear, "weight", {"'weight' is the name of a child"});
  refuse({{"a", 1}, {"b", 1}}, linear, "new",
         {"'query': expected one rank for 'linear', but 'a' has 2 and 'b' 3 (hint: cat, svd or exact)"});
  refuse({{"a", 1}, {"outputs", 1}}, linear, "new",
         {"must be of one method, but 'a' is lora and 'outputs' ia3"});
  refuse({{"outputs", 1}, {"inputs", 1}}, linear, "new",
         {"'query': 'outputs' and 'inputs' must scale the same side"});
  refuse({{"outputs", 1}, {"outputs", 1}}, linear, "new", {"'outputs' is named twice"});
  refuse({{"outputs", .5}}, CombineOptions(CombineType::exact).rank(0), "new",
         {"rank must be at least 1, but got 0"});
  refuse({{"loha", 1}}, linear, "new", {"'query': 'loha' has no arithmetic"});
  refuse({{"grouped", 1}, {"a", 1}}, CombineOptions(), "new",
         {"'conv': a convolution of several groups has no product"});
  refuse({{"a", 1}, {"biased", 1}}, linear, "new", {"differ in lora_bias"});
  refuse({{"a", 1}, {"b", 1}}, CombineOptions(CombineType::ties), "new",
         {"density must be given for 'ties'"});
  for (const double density : {0.0, -0.5, 1.5, nan}) {
    refuse({{"a", 1}, {"b", 1}}, CombineOptions(CombineType::dare_linear).density(density), "new",
           {"density must be in (0, 1]"});
  }
  refuse({{"a", 1}, {"b", 1}}, CombineOptions().svd_clamp(1.5), "new",
         {"svd_clamp must be in (0, 1], but got 1.5"});
  refuse({{"a", 1}, {"b", 1}}, CombineOptions().svd_driver("lapack"), "new",
         {"svd_driver must be gesvd, gesvdj or gesvda"});
  peft::set_active(*net, {"b"});
  peft::merge(*net);
  refuse({{"b", 1}}, linear, "new", {"'query' is merged (hint: unmerge first)"});
  peft::unmerge(*net);
  {
    torch::NoGradGuard no_grad;
    piece<peft::LoraImpl>(peft::adapter(*net, "a"), "query")->lora_A[0][0] = nan;
  }
  CHECK_THROWS_WITH(peft::combine(*net, {{"a", 1}}, linear, "new"),
                    Contains("'query': 'lora_A' of 'a' holds NaN or infinity"));
}
