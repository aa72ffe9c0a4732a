#include "catch.h"

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/serialize.h>

#include <filesystem>
#include <limits>
#include <sstream>

#include "peft/methods/adalora.h"
#include "peft/methods/bias.h"
#include "peft/methods/increlora.h"
#include "peft/train/adafactor.h"
#include "peft/train/checkpoint.h"
#include "peft/train/schedule.h"
#include "train/adapted_net.h"

using peft::Adafactor;
using peft::AdafactorOptions;

namespace {

torch::Tensor batch(int step, torch::ScalarType type = torch::kFloat) {
  torch::manual_seed(static_cast<uint64_t>(100 + step));
  return torch::randn({4, 6}, type);
}

void train(AdaptedNet& net, Adafactor& optimizer, int from, int to, torch::ScalarType type = torch::kFloat) {
  for (int step = from; step < to; ++step) {
    optimizer.zero_grad();
    net->forward(batch(step, type), step % 2 == 0).square().sum().backward();
    optimizer.step();
  }
}

/// As in the reference script.
torch::Tensor sines(torch::IntArrayRef shape, double first, double second = 0) {
  auto values = torch::zeros(shape, torch::kDouble);
  auto* data = values.data_ptr<double>();
  for (int64_t k = 0; k < values.numel(); ++k) {
    const auto number = static_cast<double>(k);
    data[k] = std::sin(1.0 + first * 0.7 + second * 2.1 + 1.3 * number) * (0.1 + 0.05 * number);
  }
  return values;
}

/// A matrix (3, 4) and a vector (5): a factor of LoRA and a bias.
struct TwoTensors {
  TwoTensors() {
    net->to(torch::kDouble);
    adapter = std::make_unique<peft::Adapter>(peft::add_adapter(
        *net, {peft::on(peft::LoraOptions(3), peft::all()), peft::on(peft::BiasOptions(), peft::all())},
        "tuned"));
    for (const auto& [name, tensor] : adapter->named_parameters()) {
      if (name.ends_with("lora_A")) matrix = tensor;
      if (name.ends_with("bias")) vector = tensor;
    }
    torch::NoGradGuard no_grad;
    matrix.copy_(sines({3, 4}, 5));
    vector.copy_(sines({5}, 9));
  }
  void set_gradients(int step) {
    matrix.mutable_grad() = sines({3, 4}, step, 1).to(matrix.scalar_type());
    vector.mutable_grad() = sines({5}, step, 2).to(matrix.scalar_type());
  }
  torch::Tensor values() const { return torch::cat({matrix.detach().flatten(), vector.detach()}); }

  torch::nn::Sequential net{torch::nn::Linear(4, 5)};
  std::unique_ptr<peft::Adapter> adapter;
  torch::Tensor matrix, vector;
};

}  // namespace

TEST_CASE("Adafactor gives the reference's values for a matrix and a vector over 30 steps", "[adafactor]") {
  // tests/reference/adafactor_values.py
  struct Reference {
    const char* name;
    AdafactorOptions options;
    std::vector<std::pair<int, std::vector<double>>> values;
  };
  const std::vector<Reference> references{
      {"defaults",
       AdafactorOptions(),
       {{1,
         {-0.09669104585711225, -0.06582772594298429, 0.14545945984489803, 0.20944598133935993,
          -0.08286645042887165, -0.34533584137466156, -0.10234851883233508, 0.3850589727569661,
          0.35851537646557413, -0.2608988774597053, -0.5827956605233129, -0.029652953993682344,
          0.08637077400581206, 0.1088324527381614, -0.09283429069801988, -0.24346732034487376,
          -0.018569457262404603}},
        {2,
         {-0.09467886476623927, -0.06421163000120782, 0.1432977388774709, 0.20537314455050545,
          -0.08191803504917151, -0.3407490148978108, -0.10146622596609604, 0.3808937711537699,
          0.3558128598533213, -0.2587101995224931, -0.579642910009995, -0.02942999744205066,
          0.08515645247512894, 0.10739132050830894, -0.09337282675141576, -0.24182383577358413,
          -0.017470482235024606}},
        {30,
         {-0.09204995659435375, -0.06446773484079694, 0.1394005349848302, 0.20329709022940656,
          -0.07901513034480086, -0.3379392087972402, -0.10249490422449237, 0.3769774883093504,
          0.3547010463796866, -0.25535853733335584, -0.5767954608296214, -0.0314841888216398,
          0.08342686900958902, 0.10581445074244818, -0.09239489083547152, -0.24005688552331644,
          -0.01701602804614555}}}},
      {"warmup_init",
       AdafactorOptions().warmup_init(true),
       {{1,
         {-0.09775290556991877, -0.06968994065196671, 0.14579377459035717, 0.21364930664750184,
          -0.0815283217495333, -0.34999610621965443, -0.10529242212654899, 0.3866226603010303,
          0.361440382226159, -0.25983219919765216, -0.5853753452866188, -0.0321979120496811,
          0.08504379477405075, 0.11015943196992271, -0.09150731146625857, -0.24479429957663507,
          -0.019896436494165913}},
        {2,
         {-0.09775250042507411, -0.06968961525732789, 0.14579333933623936, 0.21364848659763871,
          -0.0815281307897815, -0.34999518267996466, -0.10529224448030837, 0.3866218216538707,
          0.3614398380849393, -0.2598317585158532, -0.5853747104925524, -0.03219786715824569,
          0.08504355119301421, 0.11015914289287561, -0.09150741949133, -0.24479396990968502,
          -0.019896216050511145}},
        {30,
         {-0.09774394581702552, -0.06967892270774072, 0.14578681332343205, 0.21363010450607456,
          -0.08152993559974547, -0.3499807896493381, -0.10528228875825701, 0.3866121154076325,
          0.3614243888427089, -0.25983018089510246, -0.5853592350822843, -0.032191389662437876,
          0.08504402005431674, 0.11015206686252045, -0.09151167301731429, -0.2447892816384653,
          -0.019889260610089617}}}},
      {"external rate",
       AdafactorOptions(0.02).scale_parameter(false),
       {{1,
         {-0.09005239888768587, -0.041681523140644994, 0.14336935552602242, 0.18316718718051822,
          -0.09123230497128865, -0.31620030424408685, -0.08394351255258523, 0.37528294542460316,
          0.34022851578720953, -0.26756764954544165, -0.5666677142141598, -0.013742115789717343,
          0.10504366206285645, 0.09015956468111702, -0.11150717875506427, -0.22479443228782936,
          0.00010343079463979304}},
        {2,
         {-0.07536329410732673, -0.0298838759350604, 0.1275885960603523, 0.1534351085837406,
          -0.08430878653106941, -0.2827160542263334, -0.07750269446820202, 0.344876595291313,
          0.3204998989802499, -0.25159010175116103, -0.5436523490233628, -0.012114512706058263,
          0.08668943726555525, 0.06837714195287284, -0.11964704248614624, -0.19995349476827715,
          0.01671421647988223}},
        {30,
         {-0.05622496206973494, -0.0360873380362323, 0.09651301936444398, 0.14252428991603036,
          -0.05886885450049158, -0.2635749502955204, -0.09017273375202327, 0.3148531231112574,
          0.3168459758154512, -0.2233532713250627, -0.5251231141352428, -0.03193367787816928,
          0.05915425195645253, 0.048645778396970346, -0.1012259241819583, -0.17549042226422887,
          0.018829887738848975}}}},
      {"scaled rate",
       AdafactorOptions(0.02).clip_threshold(0.7).decay_rate(-0.6),
       {{1,
         {-0.09626625949335325, -0.06428268555535255, 0.14532572057278714, 0.20776448306627585,
          -0.08340175543110721, -0.3434715490074277, -0.10117083974674096, 0.38443343518558326,
          0.35734525714940857, -0.2613255914359242, -0.5817636834202802, -0.028634868962779753,
          0.0869016187829943, 0.10830160796097917, -0.09336513547520212, -0.2429364755676915,
          -0.018038612485222358}},
        {2,
         {-0.09337978492425193, -0.06207946870106899, 0.14230079211749305, 0.20198755829331763,
          -0.08205944692113154, -0.3373019704320119, -0.09995274428941367, 0.3786045055107748,
          0.3534213156535228, -0.2583054627741768, -0.5772983020441526, -0.028314777992204863,
          0.08504919440127914, 0.10617758238526376, -0.0942511057176845, -0.24059363793433536,
          -0.01633503355101792}},
        {30,
         {-0.08933865875281724, -0.06214079950146233, 0.1364805204491966, 0.19865975462980248,
          -0.07805892774976876, -0.33341723048224164, -0.1012170290163477, 0.37336676238970307,
          0.3514021930392479, -0.25402164900252755, -0.5729483431264587, -0.030702342066686587,
          0.08283361416022375, 0.10386516856615322, -0.09289516146545972, -0.23808645091503358,
          -0.015647606562371293}}}},
      {"momentum and decay",
       AdafactorOptions().beta1(0.9).weight_decay(0.1).eps({1e-20, 0.5}),
       {{1,
         {-0.09751161993865586, -0.06895526165432211, 0.1456602998086838, 0.21278083866252026,
          -0.08173002675552125, -0.34897666730538335, -0.10470634008820384, 0.3861460084955599,
          0.3607296504443906, -0.25989556539855563, -0.5846152182525857, -0.03172066621812282,
          0.08550114023182502, 0.10960448489877646, -0.09196142516568674, -0.24417203507168544,
          -0.019386620920757526}},
        {2,
         {-0.09692237271940402, -0.06799564475849842, 0.1451384004909068, 0.21124528913183466,
          -0.08173441641471815, -0.34720465669019196, -0.10401260937619111, 0.3849376296346115,
          0.3595787966221969, -0.25954022895409073, -0.583326599009688, -0.0312488546653448,
          0.08544953404177659, 0.10855512208812097, -0.09256894104638094, -0.24297892561616077,
          -0.018511657968166086}},
        {30,
         {-0.09156830539477367, -0.0664087163382702, 0.13633455549619705, 0.20399271947061676,
          -0.07458319161370018, -0.33289313812994714, -0.1052398464993817, 0.3700340634580376,
          0.3540136762801637, -0.24896770694785875, -0.5713047026829754, -0.03475101576255269,
          0.07780244079253106, 0.10259245634911893, -0.0879131749469538, -0.23094190308126536,
          -0.018360166793214536}}}},
  };
  const auto type = GENERATE(torch::kDouble, torch::kFloat, torch::kBFloat16);
  const double tolerance = type == torch::kDouble ? 1e-10 : type == torch::kFloat ? 1e-6 : 0.02;
  for (const auto& reference : references) {
    INFO(reference.name);
    TwoTensors tensors;
    tensors.net->to(type);
    Adafactor optimizer(*tensors.adapter, reference.options);
    int step = 0;
    for (const auto& [steps, values] : reference.values) {
      while (step < steps) {
        tensors.set_gradients(++step);
        optimizer.step();
      }
      CHECK(difference({tensors.values()}, {torch::tensor(values, torch::kDouble)}) <= tolerance);
    }
  }
}

TEST_CASE("Adafactor keeps rows and columns of matrices, all of a vector, and a first moment on request",
          "[adafactor]") {
  TwoTensors tensors;
  tensors.set_gradients(1);
  Adafactor optimizer(*tensors.adapter, {{[](const std::string& name) { return name.ends_with("bias"); },
                                          AdafactorOptions(1e-2).beta1(0.5)}});
  optimizer.step();
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const auto& [name, tensor] : optimizer.state()) shapes[name] = tensor.sizes().vec();
  const std::map<std::string, std::vector<int64_t>> expected{{"0.bias.bias.exp_avg", {5}},
                                                             {"0.bias.bias.exp_avg_sq", {5}},
                                                             {"0.bias.bias.step", {}},
                                                             {"0.lora.lora_A.exp_avg_sq_col", {4}},
                                                             {"0.lora.lora_A.exp_avg_sq_row", {3}},
                                                             {"0.lora.lora_A.step", {}},
                                                             {"0.lora.lora_B.exp_avg_sq_col", {3}},
                                                             {"0.lora.lora_B.exp_avg_sq_row", {5}},
                                                             {"0.lora.lora_B.step", {}},
                                                             {"param_groups.0.lr", {}},
                                                             {"param_groups.1.lr", {}}};
  CHECK(shapes == expected);
  for (const auto& [name, tensor] : optimizer.state()) {
    if (name == "0.lora.lora_B.step") CHECK(tensor.item<int64_t>() == 0);  // it had no gradient
    if (name == "0.lora.lora_A.step") CHECK(tensor.item<int64_t>() == 1);
  }
}

TEST_CASE("Adafactor's moments follow a change of type", "[adafactor]") {
  TwoTensors changed, wide;
  Adafactor ours(*changed.adapter), reference(*wide.adapter);
  for (int step = 1; step <= 6; ++step) {
    if (step == 3) changed.net->to(torch::kFloat);
    if (step == 5) changed.net->to(torch::kDouble);
    changed.set_gradients(step);
    wide.set_gradients(step);
    ours.step();
    reference.step();
  }
  CHECK(changed.matrix.scalar_type() == torch::kDouble);
  CHECK(difference({changed.values()}, {wide.values()}) <= 1e-6);
  CHECK(difference({changed.values()}, {wide.values()}) > 0);
}

TEST_CASE("Adafactor clips what it is given, and no_decay takes parameters out of the decay", "[adafactor]") {
  TwoTensors clipped, scaled;
  const auto options = AdafactorOptions(1e-2).eps({1e-2, 1e-3}).weight_decay(0.5);
  Adafactor ours(*clipped.adapter, options, /*max_grad_norm=*/0.25), reference(*scaled.adapter, options);
  const auto is_bias = [](const std::string& name) { return name.ends_with("bias"); };
  ours.no_decay(is_bias);
  reference.no_decay(is_bias);
  for (int step = 1; step <= 4; ++step) {
    clipped.set_gradients(step);
    scaled.set_gradients(step);
    const double norm =
        torch::cat({scaled.matrix.grad().flatten(), scaled.vector.grad()}).norm().item<double>();
    scaled.matrix.mutable_grad().mul_(0.25 / (norm + 1e-6));
    scaled.vector.mutable_grad().mul_(0.25 / (norm + 1e-6));
    ours.step();
    reference.step();
    CHECK_THAT(ours.last_grad_norm(), WithinRel(norm, 1e-12));
  }
  CHECK(difference({clipped.values()}, {scaled.values()}) <= 1e-14);
  TwoTensors decayed;
  Adafactor everywhere(*decayed.adapter, options);
  decayed.set_gradients(1);
  everywhere.step();
  TwoTensors spared;
  Adafactor without(*spared.adapter, options);
  without.no_decay(is_bias);
  spared.set_gradients(1);
  without.step();
  CHECK(difference({decayed.matrix}, {spared.matrix}) == 0);
  CHECK(difference({decayed.vector}, {spared.vector}) > 1e-6);
}

TEST_CASE("An Adafactor run goes on from a checkpoint and from an archive as if undisturbed", "[adafactor]") {
  const bool relative = GENERATE(true, false);
  const auto options = (relative ? AdafactorOptions() : AdafactorOptions(1e-2)).beta1(0.9);
  const auto file = std::filesystem::temp_directory_path() / "peft_adafactor_checkpoint.safetensors";
  auto [net, adapter] = adapted_net();
  Adafactor optimizer(adapter, options);
  peft::LinearSchedule schedule(optimizer, 2, 20);
  const auto go = [](AdaptedNet& model, Adafactor& own, peft::Schedule& rates, int from, int to) {
    for (int step = from; step < to; ++step) {
      train(model, own, step, step + 1);
      rates.step();
    }
  };
  go(net, optimizer, schedule, 0, 7);
  peft::save_checkpoint(file, adapter, optimizer, schedule, "here");
  std::stringstream archive;
  torch::save(optimizer, archive);
  go(net, optimizer, schedule, 7, 14);

  auto [other, copy] = adapted_net();
  Adafactor second(copy, options);
  peft::LinearSchedule rates(second, 2, 20);
  CHECK(peft::load_checkpoint(file, copy, second, rates) == "here");
  torch::load(second, archive);
  go(other, second, rates, 7, 14);
  CHECK(difference(adapter.parameters(), copy.parameters()) == 0);
  CHECK(second.param_groups()[0].options().get_lr() ==
        (relative ? 0 : optimizer.param_groups()[0].options().get_lr()));
  std::filesystem::remove(file);
}

TEST_CASE("Adafactor trains methods with a controller, and what they add while they train", "[adafactor]") {
  torch::nn::Sequential net(torch::nn::Linear(4, 6), torch::nn::Tanh(), torch::nn::Linear(6, 3));
  const auto x = sines({5, 4}, 5).to(torch::kFloat), y = sines({5, 3}, 6).to(torch::kFloat);
  torch::manual_seed(4);
  const bool grows = GENERATE(true, false);
  const auto adapter =
      grows ? peft::add_adapter(
                  *net, peft::IncreLoraOptions().target_rank(2).init_warmup(1).incre_interval(2).top_h(1),
                  peft::all())
            : peft::add_adapter(*net, peft::AdaLoraOptions(12).init_rank(3).target_rank(1), peft::all());
  Adafactor optimizer(adapter, AdafactorOptions(2e-2).scale_parameter(false));
  double first = 0, last = 0;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    const auto loss = (net->forward(x) - y).square().mean();
    loss.backward();
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  CHECK(last < first);
  CHECK(optimizer.param_groups().size() == (grows ? 4 : 1));
  if (!grows) CHECK(adapter.layers<peft::AdaLoraImpl>().front()->kept.size() == 3);
  const auto state = optimizer.state();
  optimizer.load_state({state.begin(), state.end()});
}

TEST_CASE("Wrong settings of Adafactor are all listed", "[adafactor]") {
  auto [net, adapter] = adapted_net();
  CHECK_THROWS_WITH(
      Adafactor(
          adapter,
          AdafactorOptions().lr(-1).eps({-1, std::numeric_limits<double>::infinity()}).clip_threshold(0)),
      Contains("Adafactor: 5 problems") && Contains("lr must not be given with relative_step, but got -1") &&
          Contains("lr must be at least 0, but got -1") && Contains("the first of eps must be at least 0") &&
          Contains("the second of eps") && Contains("clip_threshold must be positive, but got 0"));
  CHECK_THROWS_WITH(
      Adafactor(
          adapter,
          AdafactorOptions().relative_step(false).warmup_init(true).decay_rate(1).beta1(1).weight_decay(-2)),
      Contains("5 problems") && Contains("lr must be given without relative_step") &&
          Contains("warmup_init must go with relative_step") &&
          Contains("decay_rate must be at most 0, but got 1") &&
          Contains("beta1 must be in [0, 1), but got 1") &&
          Contains("weight_decay must be at least 0, but got -2"));
  CHECK_THROWS_WITH(
      Adafactor(adapter, {{[](const std::string& name) { return name == "head"; }, AdafactorOptions(1e-3)}}),
      Contains("group 0 matches none of the 6 parameters"));
}
