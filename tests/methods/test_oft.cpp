#include "methods/reference_case.h"
#include "peft/methods/oft.h"

using namespace suite;
using peft::OftOptions;

namespace {

int64_t inputs(const peft::SiteInfo& site) { return site.lookup ? site.fan_out : product(site.fan_in); }

Promise oft(const OftOptions& options, int64_t block_size) {
  return {{peft::on(options, peft::all())},
          [=](const peft::SiteInfo& site) {
            const auto blocks = options.block_share() ? 1 : inputs(site) / block_size;
            return blocks * block_size * (block_size - 1) / 2;
          },
          options.init_weights()};
}

bool takes_oft(const LayerCase& layer_case) {
  return layer_case.name != "Conv1d" && layer_case.name != "Conv3d";
}

}  // namespace

TEST_CASE("OFT keeps the promises of a method on every layer kind it supports", "[oft]") {
  for (const auto& layer_case : layer_cases()) {
    if (!takes_oft(layer_case)) continue;
    // Inputs: 6 of linear layers, 5 of embeddings, 4 or 36 of convolutions.
    const int64_t side = layer_case.name.rfind("Linear", 0) == 0      ? 3
                         : layer_case.name.rfind("Embedding", 0) == 0 ? 5
                                                                      : 4;
    check_properties(layer_case, oft(OftOptions(side), side));
    check_properties(layer_case, oft(OftOptions(side).cayley_neumann(false).init_weights(false), side));
    check_properties(layer_case, oft(OftOptions(side).block_share(true).neumann_terms(2), side));
    // Inside its ball a generator is left alone.
    check_properties(layer_case, oft(OftOptions(0).blocks(1).coft(true).eps(100), [&] {
                       const auto site = std::dynamic_pointer_cast<peft::SiteImpl>(layer_case.make());
                       return inputs(site->info());
                     }()));
  }
}

TEST_CASE("OFT refuses, with reasons, what it cannot turn", "[oft]") {
  const auto why = [](const LayerCase& layer_case) {
    return refusal(OftOptions(2), std::dynamic_pointer_cast<peft::SiteImpl>(layer_case.make())->info());
  };
  for (const auto& layer_case : layer_cases()) {
    if (!takes_oft(layer_case)) CHECK_THAT(why(layer_case), Contains("has no such form"));
  }
  for (const auto& layer_case : other_layer_cases())
    CHECK_THAT(why(layer_case), Contains("has no such form"));
  const auto x = torch::randn({1, 4, 5, 5});
  CHECK_THAT(why(layer<peft::Conv2d>("groups", x, nn::Conv2dOptions(4, 6, 3).groups(2))),
             Contains("several groups"));
  CHECK_THAT(why(layer<peft::Conv2d>("oblong", x, nn::Conv2dOptions(4, 6, {2, 3}))),
             Contains("square kernel, but got 2 x 3"));
  CHECK_THAT(why(layer<peft::Linear>("one", x, 1, 6)), Contains("blocks of one"));
}

// Reference: Hugging Face PEFT, tests/reference/oft_values.py.
TEST_CASE("OFT equals Hugging Face's numbers", "[oft]") {
  const auto linear = [] { return peft::Linear(6, 3); };
  const auto check_linear = [&](const char* name, const OftOptions& options, const Reference& reference,
                                double tolerance = 1e-9) {
    check_reference<peft::Linear>(name, linear, options, fill({2, 6}, 5), reference, tolerance);
  };
  check_linear("linear", OftOptions(3).init_weights(false),
               {{0.1540996134, -0.02934288979, -0.2178789377, 0.05684312806, -0.1084522307, -0.1398595423},
                {0.0875201431, -0.2865204168, 0.3190561518, 0.1080990152, -0.5423856199, -0.2977711395},
                {0.02387000806, 0.1738133241, -0.2030603873, 0.1538108674, 0.1348992069, -0.108262063,
                 0.2026229811, 0.03988787159, 0.1582261243, 0.2595002045, 0.02226100314, 0.1737827326,
                 -0.1897352979, 0.07397009708, -0.0491297459, -0.1058463021, -0.0654670628, 0.0550010715},
                {0.09768096033, 0.08704162834, 0.07785464884, 0.07028129293, 0.06394887051, 0.05853086227,
                 0.05419988069, 0.05145673374, 0.0510377262, 0.0532543849, 0.05595988216, 0.05650257573},
                {0.2934116511, 0.306498181, -0.02591140823, 0.2303510684, -0.02248267759, -0.301229228,
                 0.3577651173, 0.1149103191, 0.1988185575, -0.07810962102, -0.3144380611, 0.2856665258,
                 -0.02575869663, -0.2776641359, -0.3154938882, 0.1136150639, -0.05066075978, 0.3798894789}});
  check_linear("exact", OftOptions(3).cayley_neumann(false),
               {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0},
                {0.1582121072, -0.3903957793, 0.1815998578, 0.02886706985, -0.7415501693, -0.1683800625},
                {0.3149588086, 0.07525085737, 0.08931537777, 0.2577586015, -0.08121826533, -0.06428818613,
                 -0.02703009009, -0.2737376577, -0.0605009009, 0.01081188203, -0.3189411952, -0.1113462941,
                 0.0547857266, 0.1430224128, 0.1638920486, -0.1260455568, 0.06221738456, -0.004417539775},
                {0.1315833751, 0.1213279192, 0.1113312526, 0.1016563645, 0.0923536576, 0.08357543393,
                 0.07549216878, 0.06817244678, 0.06153484454, 0.0554758096, 0.04996788494, 0.04503003993},
                {0.32084981, 0.3082055778, 0.19121904, 0.007382830211, 0.2536877209, -0.3769456646,
                 0.2753937017, 0.03679769812, 0.4016269892, -0.3512207, -0.3511287744, 0.1146848014,
                 0.07122459303, -0.237029803, -0.385413972, -0.03349781676, -0.4660631155, 0.03825007971}});
  check_linear("shared block", OftOptions(3).block_share(true).neumann_terms(2),
               {{0.0, 0.0, 0.0},
                {-0.09846, -0.272104, 0.515772, 0.14736, -0.561964, -0.309768},
                {-0.381794, 0.209244, -0.10162, 0.31954, -0.00176, 0.254482, 0.37904, -0.02038, 0.310538,
                 -0.25232, 0.16078, -0.095816, -0.12196, -0.13492, 0.00194},
                {0.1305384059, 0.1173642808, 0.1092956583, 0.1058242997, 0.1055076732, 0.1062883561,
                 0.10665316, 0.1060302346, 0.1044521878, 0.1022273469, 0.09974079866, 0.09733812583},
                {-0.1765464647, -0.3634360507, -0.7469340294, -0.1065634437, -0.0950044276, -0.7853486736,
                 -0.03658042269, 0.1734271956, -0.8237633177, 0.2963409178, -0.5681411813, 0.5760431124,
                 0.3663239388, -0.2997095581, 0.5376284683, 0.4363069598, -0.03127793499, 0.4992138241}});
  check_linear("adjusted blocks", OftOptions(0).blocks(4).neumann_terms(3),
               {{0.0, 0.0, 0.0},
                {-0.0120024135, -0.4212352123, 0.3730092857, 0.1045166485, -0.3372721043, -0.2891881523},
                {0.03310072, -0.0901836543, -0.0542010532, 0.26078, -0.0189728, 0.0947921599, 0.189726478,
                 -0.113676168, 0.2601821752, -0.2082352, 0.070972, 0.054253447, -0.135991042, -0.018707584,
                 0.010379416},
                {0.0875041798, 0.07968510353, 0.07209779946, 0.06495918252, 0.05847957317, 0.0528342924,
                 0.0481246616, 0.04435551182, 0.04147053509, 0.03942797865, 0.03821974949, 0.0377903615},
                {-0.1221289829, -0.3564951121, -0.2373941846, 0.3265605256, -0.2312492072, -0.4059536116,
                 -0.5122964448, -0.3404595112, 0.03968088544, 0.2611967249, -0.1995415123, 0.4531196013,
                 0.1231988269, 0.6202590389, 0.3167559555, 0.1958329241, 0.04419423001, 0.293355363}});
  // The reference rounds the radius to float32.
  check_linear("constrained", OftOptions(3).coft(true).eps(0.5).neumann_terms(7),
               {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0},
                {-0.0215829865, -0.331955436, 0.4127300484, 0.09276526634, -0.5732987378, -0.2616829491},
                {-0.1314985879, 0.1204700269, -0.1885889069, -0.006768170503, 0.1603851033, -0.01442045784,
                 0.2147737674, -0.08943899388, 0.1588547777, 0.2474501025, -0.128365727, 0.1912554866,
                 -0.1578042503, 0.1587208515, -0.01563204893, -0.1278768889, -0.05495325395, 0.02023632213},
                {0.1144601888, 0.105161177, 0.09976222619, 0.09693735812, 0.09547497286, 0.09470430282,
                 0.09424982766, 0.09389742456, 0.09354007853, 0.09313437627, 0.09267575687, 0.09218557844},
                {-0.3087290676, 0.207494001, -0.3101899629, 0.1360277696, 0.2171977416, -0.3753956168,
                 -0.1494696099, 0.4493021511, -0.119999232, 0.05425070487, -0.4987500314, 0.0906099842,
                 0.375383005, -0.2296064466, -0.1275389032, 0.2476537984, -0.2828440393, 0.2802957295}},
               1e-7);
  check_reference<peft::Conv2d>(
      "pointwise", [] { return peft::Conv2d(nn::Conv2dOptions(4, 3, 1).stride(2)); }, OftOptions(2),
      fill({1, 4, 3, 2}, 5),
      {{0.0, 0.0},
       {0.2265396346, 0.1895354415, -0.3005673709, -0.3022394061, 0.02398092986, -0.1227578365},
       {0.191008384,  -0.2516111551, 0.22675296, 0.0,          0.0,
        0.0,          0.01400784,    0.0,        -0.01965936,  0.0,
        0.0,          0.0,           0.00916944, 0.0,          0.05964645983,
        0.0,          0.0,           0.0,        0.1811617975, 0.0,
        0.1895162417, 0.0,           0.0,        0.0,          -0.03229811551,
        0.0},
       {0.04742964401, 0.04434803393, 0.0419750658, 0.04016471919, 0.03862576496, 0.03718970441,
        0.03584656136, 0.03463815773, 0.03361143027, 0.03280356542, 0.03223245305, 0.03188842902},
       {-0.05917383736, 0.2663485473, -0.4007226225, -0.01792660562, 0.2445966176, -0.3815959157,
        0.08323390509, 0.4376894978, -0.1456542243, 0.2182480613, -0.4728012543, -0.08578432316}});
  check_reference<peft::Conv2d>(
      "patch", [] { return peft::Conv2d(nn::Conv2dOptions(1, 3, 3)); }, OftOptions(3), fill({2, 1, 3, 3}, 5),
      {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0},
       {0.1410553562, -0.2057561384, 0.1054476577, -0.01126425254, -0.5682527782, -0.004060529767},
       {0.266298298,    0.1961994254,  -0.0734916499, -0.05873939458, -0.01307411868, -0.1667454225,
        0.2587501063,   0.06270832985, 0.1275133402,  0.2312491986,   0.1540748357,   0.2035499315,
        -0.09071238477, 0.00330509412, 0.2941806471,  -0.00960668208, -0.2852325907,  0.050933405,
        -0.0844157887,  -0.1388094314, 0.03153587225, 0.2739147364,   -0.00725773784, -0.07985824785,
        0.153236971,    0.08567839517, -0.1992885177},
       {0.06606766695, 0.05059115158, 0.04038694475, 0.03351881807, 0.0282503924, 0.02364785948,
        0.01943338536, 0.01568362903, 0.01259979639, 0.01034941137, 0.008955194745, 0.00826352755},
       {-0.07790976707, -0.1818402537, -0.3913406938, 0.1158042339,   0.0460342577,   -0.4212523879,
        0.24131972,     0.3521471813,  -0.1359602737, 0.04958728832,  -0.306182663,   0.3321415426,
        0.1689306834,   -0.2641916709, 0.3134465052,  -0.02529852447, -0.08614638131, -0.08249532464,
        0.4174369332,   0.02598959854, 0.3192660554,  -0.4962228168,  0.1462812022,   0.1057395698,
        -0.09818711749, -0.2520705447, 0.1992297572}});
  check_reference<peft::Embedding>(
      "embedding", [] { return peft::Embedding(5, 6); }, OftOptions(3), torch::tensor({0, 3, 4}),
      {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0},
       {0.1255759775, 0.404024255, -0.1704586, 0.1997542125, 0.3664123, 0.030809975, 0.2000820105,
        -0.455556519, -0.05084703, -0.492386012, -0.002046604, 0.20731139, -0.304217218, 0.001500204,
        0.42827788, -0.315138722, -0.113081424, 0.44651554},
       {-0.0454256, -0.17390788, 0.31925629, 0.161300014, -0.0886270508, -0.1156093771},
       {0.08367746948, 0.07942917819, 0.0734877129, 0.06589804477, 0.05725593302, 0.0492145942, 0.04521153169,
        0.04851430155, 0.05277771913, 0.05082811413, 0.04605931934, 0.04231041587},
       {0.1748528827,  0.09305153283, -0.1803745857,  -0.03513063382, 0.02174212071, 0.02099707446,
        0.2165458745,  0.1101209883,  -0.2208526966,  0.2971580283,   -0.1911367284, -0.1842210907,
        0.03158454159, 0.01547433767, -0.03981652864, 0.2675891053,   -0.1715957455, -0.16631014,
        0.07327753334, 0.03254379317, -0.08029463956, -0.3223872101,  0.2078880577,  0.2014545094,
        -0.3137794272, -0.1613646785, 0.3317271648,   -0.3519561331,  0.2274290406,  0.21936546}});
}

TEST_CASE("OFT takes the divisor nearest to the wanted size, the smaller of two", "[oft]") {
  using peft::internal::nearest_divisor;
  CHECK(nearest_divisor(48, 32) == 24);
  CHECK(nearest_divisor(768, 32) == 32);
  CHECK(nearest_divisor(20, 3) == 2);
  CHECK(nearest_divisor(20, 8) == 10);
  CHECK(nearest_divisor(20, 100) == 20);
  CHECK(nearest_divisor(7, 4) == 1);
}

TEST_CASE("OFT with the exact form is orthogonal, and constrained it stays near the identity", "[oft]") {
  torch::manual_seed(4);
  peft::Linear site(nn::LinearOptions(8, 8).bias(false));
  site->to(torch::kFloat64);
  assign(site->base->weight, torch::eye(8));
  const auto adapter = peft::add_adapter(*site, OftOptions(4).cayley_neumann(false), peft::all());
  shake(adapter);
  const auto W = site->merged_weights({"default"}).weight;
  CHECK(largest(at::mm(W, W.t()), torch::eye(8, torch::kFloat64)) < 1e-12);
  CHECK(largest(W, torch::eye(8, torch::kFloat64)) > 0.1);
  peft::remove_adapter(*site, "default");

  const auto near = peft::add_adapter(*site, OftOptions(4).coft(true).eps(0.01), peft::all());
  shake(near);
  const auto before = near.parameters().at(0).clone();
  site->eval();
  const auto y = site->forward(torch::eye(8, torch::kFloat64));
  CHECK(largest(y, torch::eye(8, torch::kFloat64)) < 0.03);
  CHECK(torch::equal(near.parameters().at(0), before));
  site->train();
  CHECK(largest(site->forward(torch::eye(8, torch::kFloat64)), y) < 1e-12);
  const auto rows = near.parameters().at(0).detach();
  CHECK(torch::allclose((rows.square().sum(1) * 2).sqrt(),
                        torch::full({2}, 0.01 / std::sqrt(2.0), rows.options())));
}

TEST_CASE("OFT leaves blocks out in training only, at the asked rate", "[oft]") {
  torch::manual_seed(6);
  peft::Linear site(nn::LinearOptions(16, 16).bias(false));
  site->to(torch::kFloat64);
  assign(site->base->weight, torch::eye(16));
  shake(peft::add_adapter(*site, OftOptions(2).module_dropout(0.3), peft::all()));
  const auto identity = torch::eye(16, torch::kFloat64);
  const auto still = [&] {
    const auto moved = (site->forward(identity) - identity).abs().sum(1).view({8, 2}).sum(1);
    return (moved == 0).sum().item<int64_t>();
  };
  for (int i = 0; i < 5; ++i) CHECK(still() == 2);
  site->eval();
  CHECK(still() == 0);
}

TEST_CASE("OFT names the option that is out of range", "[oft]") {
  peft::Linear site(6, 4);
  const auto add = [&](const OftOptions& options) { peft::add_adapter(*site, options, peft::all()); };
  CHECK_THROWS_WITH(add(OftOptions(0)), Contains("either block_size or blocks to be positive"));
  CHECK_THROWS_WITH(add(OftOptions(2).blocks(2)), Contains("but got block_size 2 and blocks 2"));
  CHECK_THROWS_WITH(add(OftOptions(-2)), Contains("but got block_size -2 and blocks 0"));
  CHECK_THROWS_WITH(add(OftOptions(2).module_dropout(1)),
                    Contains("module_dropout must be in [0, 1), but got 1"));
  CHECK_THROWS_WITH(add(OftOptions(2).eps(0)), Contains("eps must be positive, but got 0"));
  CHECK_THROWS_WITH(add(OftOptions(2).neumann_terms(1)),
                    Contains("neumann_terms must be at least 2, but got 1"));
  CHECK(site->adapters().empty());
}

TEST_CASE("OFT notes that older files mean another series", "[oft]") {
  const peft_test::TemporaryFolder folder;
  struct Net : nn::Module {
    peft::Linear layer = register_module("layer", peft::Linear(4, 4));
  };
  Net net;
  peft::save_adapter(peft::add_adapter(net, OftOptions(2), peft::named({"layer"})), folder / "a");
  const auto file = folder / "a" / "adapter_config.json";
  auto config = nlohmann::json::parse(std::ifstream(file));
  const auto notes_of = [&](const nlohmann::json& version, bool series) {
    config["peft_version"] = version;
    config["use_cayley_neumann"] = series;
    std::ofstream(file) << config;
    Net other;
    std::vector<std::string> notes;
    peft::load_adapter(other, folder / "a", "a", false, [&](const auto& line) { notes.push_back(line); });
    return notes;
  };
  for (const nlohmann::json& old :
       {nlohmann::json(), nlohmann::json("0.17.1"), nlohmann::json("0.9.0.dev0")}) {
    INFO(old);
    REQUIRE(notes_of(old, true).size() == 1);
    CHECK_THAT(notes_of(old, true)[0], Contains("'use_cayley_neumann' is another series since peft 0.18"));
    CHECK(notes_of(old, false).empty());
  }
  for (const char* current : {"0.18.0", "0.21.2@main", "1.0.0"}) CHECK(notes_of(current, true).empty());
}

TEST_CASE("OFT goes through Hugging Face's files", "[oft]") {
  const auto config = check_files(OftOptions(2).coft(true).eps(0.5).neumann_terms(6));
  CHECK(config["peft_type"] == "OFT");
  CHECK(config["oft_block_size"] == 2);
  CHECK(config["coft"] == true);
  CHECK(config["num_cayley_neumann_terms"] == 6);
  const auto shared = check_files(OftOptions(0).blocks(2).block_share(true).cayley_neumann(false));
  CHECK(shared["r"] == 2);
  CHECK(shared["oft_block_size"] == 0);
  CHECK(shared["block_share"] == true);
  CHECK(shared["use_cayley_neumann"] == false);
}
