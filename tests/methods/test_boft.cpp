#include "methods/reference_case.h"
#include "peft/methods/boft.h"

using namespace suite;
using peft::BoftOptions;

namespace {

Promise boft(const BoftOptions& options) {
  return {{peft::on(options, peft::all())},
          [=](const peft::SiteInfo& site) {
            const auto size = product(site.fan_in);
            const auto side = options.block_size() > 0 ? options.block_size() : size / options.block_num();
            return options.butterfly_factors() * size * side + site.fan_out;
          },
          options.init_weights()};
}

}  // namespace

TEST_CASE("BOFT keeps the promises of a method on every layer kind it supports", "[boft]") {
  for (const auto& layer_case : layer_cases()) {
    const auto& name = layer_case.name;
    if (name.rfind("Linear", 0) != 0 && name.rfind("Conv2d", 0) != 0) continue;
    check_properties(layer_case, boft(BoftOptions(2)));
    check_properties(layer_case, boft(BoftOptions(0).block_num(2).init_weights(false)));
    // 6 inputs have no even number of blocks of an even size.
    if (name.rfind("Conv2d", 0) == 0) {
      check_properties(layer_case, boft(BoftOptions(2).butterfly_factors(2)));
    }
  }
  const auto wide = layer<peft::Linear>("Linear of 8 inputs", torch::randn({3, 8}), 8, 3);
  check_properties(wide, boft(BoftOptions(2).butterfly_factors(3)));
}

TEST_CASE("BOFT refuses, with reasons, what it cannot turn", "[boft]") {
  const auto why = [](const LayerCase& layer_case, const BoftOptions& options = BoftOptions(2)) {
    return refusal(options, std::dynamic_pointer_cast<peft::SiteImpl>(layer_case.make())->info());
  };
  for (auto cases : {layer_cases(), other_layer_cases()}) {
    for (const auto& layer_case : cases) {
      const auto& name = layer_case.name;
      if (name.rfind("Linear", 0) == 0 || name.rfind("Conv2d", 0) == 0) continue;
      CHECK_THAT(why(layer_case), Contains("has no such form"));
    }
  }
  const auto x = torch::randn({1, 4, 5, 5});
  CHECK_THAT(why(layer<peft::Conv2d>("groups", x, nn::Conv2dOptions(4, 6, 3).groups(2))),
             Contains("several groups"));
  const auto linear = layer<peft::Linear>("Linear", x, 12, 4);
  CHECK_THAT(why(linear, BoftOptions(5)), Contains("of 12 inputs cannot be cut by block_size 5"));
  CHECK_THAT(why(linear, BoftOptions(0).block_num(7)), Contains("cannot be cut by block_num 7"));
  CHECK_THAT(why(linear, BoftOptions(3).butterfly_factors(2)),
             Contains("in blocks of 3 cannot have 2 butterfly_factors"));
  CHECK_THAT(why(linear, BoftOptions(2).butterfly_factors(3)), Contains("a multiple of 4"));
  CHECK(why(linear, BoftOptions(2).butterfly_factors(2)).empty());
}

// Reference: Hugging Face PEFT, tests/reference/oft_values.py.
TEST_CASE("BOFT equals Hugging Face's numbers", "[boft]") {
  const auto linear = [] { return peft::Linear(6, 3); };
  check_reference<peft::Linear>(
      "linear", linear, BoftOptions(3).init_weights(false), fill({2, 6}, 5),
      {{-0.1125839874,  -0.1152360216, 0.0566650629,  0.07935083658,  0.05988394842,  -0.1555095166,
        -0.03413603827, 0.1853006184,  0.04680963978, -0.01577124558, -0.01733967476, 0.01834779419,
        0.1389366239,   0.1586334258,  0.09462983906, -0.08436767757, 0.09318266064,  0.1259009242,
        1.04087162,     1.142141819,   1.014939666},
       {0.2491443388, -0.371686494, -0.1616555498, 0.2453966509, -0.4456862976, 0.04845120467},
       {0.0,
        -0.01098485713,
        0.0171657896,
        0.01098485713,
        0.0,
        -0.008784389105,
        -0.0171657896,
        0.008784389105,
        0.0,
        0.0,
        -0.0151668156,
        0.01906203161,
        0.0151668156,
        0.0,
        -0.01399937669,
        -0.01906203161,
        0.01399937669,
        0.0,
        0.1274210606,
        -0.01701389756,
        0.3160016937,
        -0.04457661982,
        0.05377240366,
        -0.01432657286,
        -0.05527508853,
        0.004748737968,
        -0.006637527244,
        0.04870135467,
        -0.01197629468,
        0.005318055979,
        0.07948443145,
        -0.03776073698,
        0.01066839129},
       {0.08125992992, 0.07529911826, 0.07063703491, 0.06679162879, 0.06340221184, 0.06040181362, 0.05775151,
        0.05535381673, 0.05306858874, 0.05076623185, 0.04835934229, 0.04580236968},
       {-0.1157011265, 0.2348384356, -0.02035467181, 0.01970134278, -0.1057886931, -0.221670723,
        -0.1412385746, 0.189741086, 0.172620597, 0.052728973, -0.1371305576, 0.2679939141, 0.0667918223,
        -0.01034272313, -0.008292000187, 0.04684260673, 0.001926041934, 0.05157471683}});
  check_reference<peft::Linear>(
      "butterfly", [] { return peft::Linear(nn::LinearOptions(8, 3).bias(false)); },
      BoftOptions(0).block_num(4).butterfly_factors(3), fill({2, 8}, 5),
      {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
        0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
        0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0},
       {0.007983976041, -0.1179880827, -0.03860014508, 0.01249205262, -0.1587989099, 0.08023647544},
       {0.0,
        -0.008877271368,
        0.008877271368,
        0.0,
        0.0,
        -0.0007236100004,
        0.0007236100004,
        0.0,
        0.0,
        -0.02929613894,
        0.02929613894,
        0.0,
        0.0,
        -0.0162433336,
        0.0162433336,
        0.0,
        0.0,
        0.0123028176,
        -0.0123028176,
        0.0,
        0.0,
        0.01463136886,
        -0.01463136886,
        0.0,
        0.0,
        -0.01161810749,
        0.01161810749,
        0.0,
        0.0,
        0.005355375227,
        -0.005355375227,
        0.0,
        0.0,
        0.001187987433,
        -0.001187987433,
        0.0,
        0.0,
        -0.006560306935,
        0.006560306935,
        0.0,
        0.0,
        0.04313913536,
        -0.04313913536,
        0.0,
        0.0,
        -0.002987662707,
        0.002987662707,
        0.0,
        0.1631201112,
        -0.103691119,
        0.1823173576,
        0.0005871473286,
        -0.02676159517,
        -0.06522043947,
        -0.02536883094,
        0.009689779843,
        0.04195416549,
        0.04826926308,
        0.02646513215,
        -0.01914318719,
        0.0908322011,
        0.03689534921,
        0.01448782968,
        0.001955776391,
        -0.06581643498,
        -0.06505567457,
        -0.02292105577},
       {0.007880989979, 0.004189268051, 0.001809595434, 0.0005781945561, 0.0001241893328, 2.457502722e-05,
        2.377123478e-05, 2.816738825e-05, 2.223979426e-05, 1.298401377e-05, 9.236068302e-06, 1.915272843e-05},
       {0.001418046429,  -9.295653213e-05, -0.0009575686812, 0.001216495237, -0.0008238382222,
        -0.001203649282, -0.0005681322617, -0.0007796362099, -0.01037263345, -0.001371754862,
        0.01177030081,   -0.01003961651,   0.007649851404,   0.007661929291, 0.00267557177,
        0.006533325293,  -0.00239617687,   0.01705556495,    0.01814439726,  0.01606723685,
        -0.02599205845,  -0.01266619555,   0.0113443902,     -0.01465555781}});
  check_reference<peft::Linear>(
      "dropout", linear, BoftOptions(2).dropout(0.5), fill({2, 6}, 5),
      {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0},
       {0.2504031853, -0.3903093094, -0.1385608682, 0.2432890591, -0.4881141376, 0.01336234159},
       {0.0,
        -0.04017764221,
        0.04017764221,
        0.0,
        0.0,
        0.01588074964,
        -0.01588074964,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.125958914,
        -0.0420619266,
        0.2271569419,
        -0.01082603553,
        0.06997645657,
        0.01935506531,
        -0.0415455791,
        0.027514,
        -0.01828,
        0.02954967768,
        -0.03841185037,
        -0.04725393324,
        0.04222754136,
        -0.063196,
        0.00652},
       {0.0886442927, 0.07959547491, 0.07515978875, 0.07128705972, 0.06980280287, 0.06557875848,
        0.06655049052, 0.06417896145, 0.06177366809, 0.06116435173, 0.05806294727, 0.0600333941},
       {0.08303915253, 0.1219821434, -0.1805421746, -0.120137375, -0.02951168505, -0.2433569654,
        -0.06408262525, -0.02115927731, 0.03902722369, -0.007595229845, 0.05281453548, -0.05008287391,
        -0.0352279663, -0.07044501598, -0.03118624558, 0.05545602686, -0.01213351947, 0.04800022502}});
  check_reference<peft::Conv2d>(
      "convolution", [] { return peft::Conv2d(nn::Conv2dOptions(2, 3, 2).stride(2).padding(1)); },
      BoftOptions(2).butterfly_factors(2), fill({1, 2, 3, 2}, 5),
      {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
        0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0},
       {0.2418196063, 0.2367420779, 0.2434388655, 0.247579111, -0.4160737437, -0.365398435, -0.4292192507,
        -0.484911112, -0.06852805291, 0.01063202152, 0.0229688902, -0.0339479974},
       {0.0,
        -0.01671396849,
        0.01671396849,
        0.0,
        0.0,
        0.03625369745,
        -0.03625369745,
        0.0,
        0.0,
        -0.04572877916,
        0.04572877916,
        0.0,
        0.0,
        -0.004369950935,
        0.004369950935,
        0.0,
        0.0,
        -0.02236402052,
        0.02236402052,
        0.0,
        0.0,
        0.01668236948,
        -0.01668236948,
        0.0,
        0.0,
        -0.01473185005,
        0.01473185005,
        0.0,
        0.0,
        0.03660263556,
        -0.03660263556,
        0.0,
        0.02588859439,
        -0.1147039622,
        -0.1163994275,
        0.01498085002,
        0.04182012182,
        -0.02675017133,
        -0.02473414859,
        -0.01844642163,
        0.01733727133,
        -0.01251802605,
        0.03944753536,
        0.08228423298,
        -0.0005152259163,
        0.01186296826,
        -0.04224542557},
       {0.08063099411, 0.07701308351, 0.07444809489, 0.07295451773, 0.07240409379, 0.07246345034,
        0.07267250136, 0.07265408605, 0.07223130082, 0.07136862964, 0.07008309168, 0.06840571392},
       {0.01721253463,   0.004701074876, -0.01272503179, 0.01007838372,  -0.02012345523, -0.01560563514,
        -0.005059784662, -0.01802167592, 0.07574752222,  0.04194102565,  -0.09111058631, 0.05169989736,
        -0.1005144821,   -0.05556308549, 0.001346948459, -0.09037723326, -0.04071071299, 0.04117109341,
        0.05636644777,   0.03016755189,  -0.06058466128, -0.02001075659, 0.01684146703,  -0.05469180685}});
}

TEST_CASE("BOFT turns by an orthogonal matrix of every input, and scales the outputs but not the bias",
          "[boft]") {
  torch::manual_seed(4);
  peft::Linear site(8, 8);
  site->to(torch::kFloat64);
  assign(site->base->weight, torch::eye(8));
  const auto adapter = peft::add_adapter(*site, BoftOptions(2).butterfly_factors(3), peft::all());
  const auto piece = adapter.layers<peft::BoftImpl>().at(0);
  assign(piece->boft_R, torch::randn(piece->boft_R.sizes()));
  auto merged = site->merged_weights({"default"});
  CHECK(largest(at::mm(merged.weight, merged.weight.t()), torch::eye(8, torch::kFloat64)) < 1e-12);
  CHECK((merged.weight.abs() > 1e-6).all().item<bool>());
  assign(piece->boft_s, torch::full({8, 1}, 3.0));
  const auto scaled = site->merged_weights({"default"});
  CHECK(largest(scaled.weight, merged.weight * 3) < 1e-12);
  CHECK(torch::equal(scaled.bias, site->base->bias));
}

TEST_CASE("BOFT names the option that is out of range", "[boft]") {
  peft::Linear site(6, 4);
  const auto add = [&](const BoftOptions& options) { peft::add_adapter(*site, options, peft::all()); };
  CHECK_THROWS_WITH(add(BoftOptions(0)), Contains("either block_size or block_num to be positive"));
  CHECK_THROWS_WITH(add(BoftOptions(2).block_num(3)), Contains("but got block_size 2 and block_num 3"));
  CHECK_THROWS_WITH(add(BoftOptions(2).butterfly_factors(0)),
                    Contains("butterfly_factors must be in [1, 32], but got 0"));
  CHECK_THROWS_WITH(add(BoftOptions(2).dropout(1)), Contains("dropout must be in [0, 1), but got 1"));
  CHECK(site->adapters().empty());
}

TEST_CASE("BOFT goes through Hugging Face's files", "[boft]") {
  const auto config = check_files(BoftOptions(2).dropout(0.25));
  CHECK(config["peft_type"] == "BOFT");
  CHECK(config["boft_block_size"] == 2);
  CHECK(config["boft_dropout"] == 0.25);
  CHECK(check_files(BoftOptions(0).block_num(2))["boft_block_num"] == 2);
}
