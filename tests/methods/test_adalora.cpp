// Reference values: tests/reference/adalora_values.py, and the trace of the specification.
#include <filesystem>

#include "methods/reference_case.h"
#include "peft/methods/adalora.h"
#include "peft/train/checkpoint.h"

using namespace suite;
using peft::AdaLoraOptions;

namespace {

void assign(const Tensor& tensor, int64_t k) { suite::assign(tensor, fill(tensor.sizes().vec(), k)); }

/// The net of the reference script.
struct NetImpl : nn::Module {
  peft::Linear a = register_module("a", peft::Linear(4, 6));
  peft::Conv2d conv = register_module("conv", peft::Conv2d(nn::Conv2dOptions(2, 3, 2)));
  peft::Linear b = register_module("b", peft::Linear(6, 3));
  NetImpl() {
    to(torch::kFloat64);
    int64_t k = 0;
    for (auto& parameter : parameters()) assign(parameter, ++k);
  }
  Tensor loss() {
    const auto h = torch::tanh(a(fill({5, 4}, 5))).view({-1, 2, 3, 1}).expand({-1, -1, -1, 3});
    const auto y = b(torch::tanh(conv(h)).flatten(1).slice(1, 0, 6));
    return (y - fill({5, 3}, 6)).square().mean() * 4;
  }
};
TORCH_MODULE(Net);

AdaLoraOptions options() {
  return AdaLoraOptions(12)
      .init_rank(3)
      .target_rank(1)
      .tinit(2)
      .tfinal(3)
      .delta_t(2)
      .alpha(6)
      .orth_reg_weight(0.1);
}

peft::Adapter adapt(nn::Module& net) {
  auto adapter = peft::add_adapter(net, options(), peft::named({"a", "conv", "b"}));
  int64_t index = 0;
  for (const auto& piece : adapter.layers<peft::AdaLoraImpl>()) {
    assign(piece->lora_A, 3 + index);
    assign(piece->lora_B, 6 + index);
    assign(piece->lora_E, 8 + index++);
  }
  return adapter;
}

struct Step {
  double loss;
  std::vector<double> E;
};

const std::vector<Step> unclipped{
    {0.75254782702514,
     {0.38978003488, -0.149900054734, 0.119915034005, -0.1499000135, 0.21991497236, -0.519764972906,
      0.119915006882, -0.519764983016, -0.0499500097605}},
    {0.6764446730209,
     {0.348016984699, -0.099783235926, 0.0792672984186, -0.102862801618, 0.268271610825, -0.568476137882,
      0.0877976563772, -0.566602642465, -0.00160344853423}},
    {0.59058663040695,
     {0.32514567363, -0.0495936518907, 0.0464166227875, -0.0636880799992, 0.317247683057, -0.614933855568,
      0.088910123528, -0.613175690291, 0.0465260317894}},
    {0.48680286069346,
     {0.332129136902, -0.00834770641895, 0.0140811106055, -0.0344104538976, 0.344907770712, -0.659660712339,
      0.112933613823, -0.660781015405, 0.0953123916943}},
    {0.3629136912563,
     {0.357176171017, 0, 0, 0, 0.357839486074, -0.704833048486, 0.146149822406, -0.708686027807, 0}},
    {0.29816677739026,
     {0.390960874162, -0.0130805831956, -0.0102088736872, 0.023134394772, 0.379719964818, -0.749803876082,
      0.158204819207, -0.7222184233, 0.0478776090516}},
    {0.32417666684782, {0, 0, 0, 0, 0, -0.762263896901, 0.137704798636, -0.70630045849, 0}},
    {0.33769537194368,
     {0.0421757379789, -0.0302266051387, 0.0305105433862, 0.0236096237503, 0.036508316877, -0.761485973827,
      0.10749645051, -0.681790955586, 0.0349191172001}},
    {0.26045335740602, {0, 0, 0, 0, 0, -0.757916743967, 0.0741858873722, -0.657592913597, 0}},
    {0.24014539852235, {0, 0, 0, 0, 0, -0.758540343484, 0.0430347337595, -0.638881656762, 0}},
    {0.24037255586023, {0, 0, 0, 0, 0, -0.764948433863, 0.0168991884136, -0.627803405022, 0}},
    {0.24278555265031, {0, 0, 0, 0, 0, -0.776537991015, -0.00333514598754, -0.623737049475, 0}},
};
const std::vector<Step> clipped{
    {0.75254782702514,
     {0.38978003488, -0.149900054734, 0.119915034005, -0.1499000135, 0.21991497236, -0.519764972906,
      0.119915006882, -0.519764983016, -0.0499500097605}},
    {0.6764446730209,
     {0.348706084813, -0.0997684536531, 0.0798941094674, -0.103650016604, 0.268790913899, -0.568917671198,
      0.0876482868497, -0.567229226072, -0.00228522748923}},
    {0.59029063018825,
     {0.322819411811, -0.0505793288539, 0.0479648849196, -0.0659405643857, 0.316947749868, -0.61767237672,
      0.0801585175401, -0.615527958437, 0.0433422124073}},
    {0.48573572874531,
     {0.31651541559, -0.0100626109, 0.0185700992753, -0.036421653247, 0.350192643469, -0.66591886006,
      0.0927609357347, -0.664378420507, 0.0881058776972}},
    {0.36578509492795,
     {0.328987620658, 0, 0, 0, 0.362733566887, -0.714004877526, 0.117050515595, -0.711693929627, 0}},
    {0.29585025438462,
     {0.354553148914, -0.00893876998636, -0.0218171581844, 0.0219280799294, 0.371128187032, -0.761979048008,
      0.134917689162, -0.7280906733, 0.0468754262478}},
    {0.32919219467866, {0, 0, 0, 0, 0, -0.793241311886, 0.127453289538, -0.724897297646, 0}},
    {0.45253404427295,
     {0.0310474464404, -0.0231745628857, 0.0119942741162, 0.01726840177, 0.020964747467, -0.810102903795,
      0.105629714597, -0.71179877792, 0.0366750161488}},
    {0.4255558977587, {0, 0, 0, 0, 0, -0.815639328321, 0.0756023680278, -0.692094064017, 0}},
    {0.35139508570764, {0, 0, 0, 0, 0, -0.813006014039, 0.0402136482525, -0.66743089253, 0}},
    {0.28041858325243, {0, 0, 0, 0, 0, -0.804740214029, 0.000983630916858, -0.640673757286, 0}},
    {0.24988629877605, {0, 0, 0, 0, 0, -0.796660012163, -0.0386938494359, -0.622152661424, 0}},
};

std::vector<double> values_of_E(const peft::Adapter& adapter) {
  std::vector<double> values;
  for (const auto& piece : adapter.layers<peft::AdaLoraImpl>()) {
    for (int64_t k = 0; k < 3; ++k) values.push_back(piece->lora_E[k].item<double>());
  }
  return values;
}

void check_step(const Step& expected, double loss, const peft::Adapter& adapter) {
  CHECK_THAT(loss, WithinAbs(expected.loss, 1e-11));
  const auto E = values_of_E(adapter);
  REQUIRE(E.size() == expected.E.size());
  for (size_t i = 0; i < E.size(); ++i) CHECK_THAT(E[i], WithinAbs(expected.E[i], 1e-10));
}

}  // namespace

TEST_CASE("AdaLoRA keeps the promises of a method on linear layers and convolutions", "[adalora]") {
  const Promise promise{{peft::on(AdaLoraOptions(10).init_rank(3).target_rank(2), peft::all())},
                        [](const peft::SiteInfo& site) {
                          int64_t inputs = 1;
                          for (const auto size : site.fan_in) inputs *= size;
                          return 3 * (inputs + site.fan_out + 1);
                        }};
  for (const auto& layer_case : layer_cases()) {
    if (layer_case.name.rfind("Embedding", 0) != 0) check_properties(layer_case, promise);
  }
}

TEST_CASE("AdaLoRA starts as the reference does from the same seed", "[adalora]") {
  nn::Sequential net(nn::Linear(4, 3), nn::Conv2d(nn::Conv2dOptions(1, 2, 2)));
  torch::manual_seed(0);
  const auto pieces = peft::add_adapter(*net, AdaLoraOptions(5).init_rank(2).target_rank(1), peft::all())
                          .layers<peft::AdaLoraImpl>();
  const auto check = [](const Tensor& tensor, const std::vector<float>& expected) {
    CHECK(torch::allclose(tensor.detach().view(-1), torch::tensor(expected), 0, 1e-9));
  };
  check(pieces.at(0)->lora_A, {0.00746229291f, -0.0178399067f, -0.0301821548f, 0.00740787061f, 0.0291300528f,
                               0.0187961981f, 0.0154969767f, 0.00383738847f});
  check(pieces.at(0)->lora_B,
        {0.0252758954f, -0.0258087013f, -0.015822053f, -0.000417589472f, -0.0143696005f, 0.0103727346f});
  check(pieces.at(1)->lora_A, {0.00378846913f, -0.00438045617f, 0.0411518253f, -0.000708437641f,
                               0.00125437661f, -0.0153261255f, 0.0219850112f, 0.0551307648f});
  check(pieces.at(1)->lora_B, {0.00350566651f, -0.0186304227f, -0.0301097929f, -0.0132196508f});
}

TEST_CASE("AdaLoRA's losses, masks and final ranks are the reference's, clipped and not", "[adalora]") {
  for (const double clip : {0.0, 0.3}) {
    INFO("clip " << clip);
    Net net;
    const auto adapter = adapt(*net);
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01), clip);
    for (const auto& expected : clip == 0 ? unclipped : clipped) {
      const auto loss = net->loss();
      optimizer.zero_grad();
      const auto penalty = adapter.penalty().item<double>();
      loss.backward();
      optimizer.step();
      check_step(expected, loss.item<double>() + penalty, adapter);
    }
    std::vector<std::vector<bool>> kept;
    for (const auto& piece : adapter.layers<peft::AdaLoraImpl>()) kept.push_back(piece->kept);
    CHECK(kept ==
          std::vector<std::vector<bool>>{{false, false, false}, {false, false, true}, {true, true, false}});
  }
}

TEST_CASE("AdaLoRA trains alike with another optimizer and the two calls around its step", "[adalora]") {
  Net net;
  const auto adapter = adapt(*net);
  torch::optim::AdamW optimizer(adapter.parameters(), torch::optim::AdamWOptions(0.05).weight_decay(0.01));
  for (const auto& expected : clipped) {
    const auto loss = net->loss();
    optimizer.zero_grad();
    const auto penalty = adapter.penalty().item<double>();
    loss.backward();
    CHECK(adapter.before_step().empty());
    nn::utils::clip_grad_norm_(adapter.parameters(), 0.3);
    optimizer.step();
    adapter.after_step();
    check_step(expected, loss.item<double>() + penalty, adapter);
  }
}

TEST_CASE("AdaLoRA follows the trace of the specification under plain gradient descent", "[adalora]") {
  struct TwoImpl : nn::Module {
    peft::Linear a = register_module("a", peft::Linear(4, 3)), b = register_module("b", peft::Linear(3, 3));
  };
  auto net = std::make_shared<TwoImpl>();
  net->to(torch::kFloat64);
  const auto adapter = peft::add_adapter(
      *net,
      AdaLoraOptions(9).init_rank(3).target_rank(1).tinit(1).tfinal(2).delta_t(2).alpha(6).orth_reg_weight(
          0.1),
      peft::all());
  int64_t i = 0;
  for (const auto& piece : adapter.layers<peft::AdaLoraImpl>()) {
    auto& layer = i == 0 ? net->a : net->b;
    assign(layer->base->weight, 1 + i);
    assign(layer->base->bias, 2 + i);
    assign(piece->lora_A, 3 + i);
    assign(piece->lora_B, 6 + i);
    assign(piece->lora_E, 8 + i++);
  }
  torch::optim::SGD optimizer(adapter.parameters(), 0.1);
  const std::vector<Step> expected{
      {0.3780358161, {.44001353, -.19972449, .16777827, -.1966899, .16557259, -.47003988}},
      {0.3768268966, {.44002208, -.19944754, .1655716, -.19342574, .16122337, -.47021928}},
      {0.3756319775, {.44002564, 0, .16337903, -.19020563, .15694917, 0}},
      {0.3767858335, {.44006972, .00019889745, .16170955, -.18709231, .15255702, -.00073859154}},
      {0.3762863939, {0, 0, 0, -.18401251, .14822562, 0}},
      {0.3734726782, {2.232527e-5, .00018971539, -.0014434373, -.18096986, .14380643, -.00092859079}},
      {0.3729920215, {0, 0, 0, -.17795786, .13944215, 0}},
      {0.3725828509, {0, 0, 0, -.1749745, .13512942, 0}},
      {0.3721549558, {0, 0, 0, -.17201908, .13086644, 0}},
  };
  for (const auto& step : expected) {
    const auto y = net->b(torch::tanh(net->a(fill({5, 4}, 5))));
    const auto loss = (y - fill({5, 3}, 6)).square().mean();
    optimizer.zero_grad();
    CHECK_THAT((loss + adapter.penalty()).item<double>(), WithinAbs(step.loss, 1e-9));
    loss.backward();
    adapter.before_step();
    optimizer.step();
    adapter.after_step();
    const auto E = values_of_E(adapter);
    for (size_t k = 0; k < E.size(); ++k) CHECK_THAT(E[k], WithinAbs(step.E[k], 1e-8));
  }
}

TEST_CASE("AdaLoRA goes on from a checkpoint in the middle of its schedule as if undisturbed", "[adalora]") {
  const auto file = std::filesystem::temp_directory_path() / "peft_adalora_checkpoint.safetensors";
  for (const size_t pause : {1u, 5u, 9u, 11u}) {
    for (const bool resume : {false, true}) {
      auto net = Net();
      auto adapter = adapt(*net);
      auto optimizer =
          std::make_unique<peft::AdamW>(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01), 0.3);
      auto schedule = std::make_unique<peft::ConstantSchedule>(*optimizer);
      for (size_t t = 0; t < clipped.size(); ++t) {
        if (resume && t == pause) {
          peft::save_checkpoint(file, adapter, *optimizer, *schedule);
          net = Net();
          adapter = peft::add_adapter(*net, options(), peft::named({"a", "conv", "b"}));
          optimizer = std::make_unique<peft::AdamW>(adapter,
                                                    torch::optim::AdamWOptions(0.05).weight_decay(0.01), 0.3);
          schedule = std::make_unique<peft::ConstantSchedule>(*optimizer);
          net->loss().backward();
          peft::load_checkpoint(file, adapter, *optimizer, *schedule);
        }
        const auto loss = net->loss();
        optimizer->zero_grad();
        const auto penalty = adapter.penalty().item<double>();
        loss.backward();
        optimizer->step();
        schedule->step();
        check_step(clipped[t], loss.item<double>() + penalty, adapter);
      }
    }
  }
  std::filesystem::remove(file);
}

TEST_CASE("A copy of a model in training goes on with ranks and importances of its own", "[adalora]") {
  torch::manual_seed(5);
  nn::Sequential net(nn::Linear(4, 6), nn::Tanh(), nn::Linear(6, 3));
  const auto adapter = peft::add_adapter(*net, options(), peft::all());
  const auto x = torch::randn({5, 4}), y = torch::randn({5, 3});
  const auto train = [&](nn::Sequential& model, const peft::Adapter& handle, int steps) {
    peft::AdamW optimizer(handle, torch::optim::AdamWOptions(0.05));
    for (int t = 0; t < steps; ++t) {
      optimizer.zero_grad();
      (model->forward(x) - y).square().mean().backward();
      optimizer.step();
    }
  };
  train(net, adapter, 5);
  nn::Sequential copy(peft::clone(*net));
  const auto twin = peft::adapter(*copy, "default");
  REQUIRE(twin.record().controllers.size() == 1);
  CHECK(twin.record().controllers.at(0) != adapter.record().controllers.at(0));
  train(net, adapter, 5);
  train(copy, twin, 5);
  const auto ranks = [](const peft::Adapter& handle) {
    std::vector<std::vector<bool>> kept;
    for (const auto& piece : handle.layers<peft::AdaLoraImpl>()) kept.push_back(piece->kept);
    return kept;
  };
  CHECK(ranks(adapter) == ranks(twin));
  const auto mine = adapter.parameters(), its = twin.parameters();
  for (size_t i = 0; i < mine.size(); ++i) CHECK(torch::equal(mine[i], its[i]));

  nn::Sequential plain(std::dynamic_pointer_cast<nn::SequentialImpl>(net->clone()));
  CHECK_THROWS_WITH(peft::AdamW(peft::adapter(*plain, "default")),
                    Contains("the controller of 'adalora' is missing (hint: copy models with peft::clone)"));
}

TEST_CASE("An optimizer that leaves AdaLoRA's controller out is noticed at the second step", "[adalora]") {
  Net net;
  const auto adapter = adapt(*net);
  torch::optim::AdamW optimizer(adapter.parameters(), torch::optim::AdamWOptions(0.05));
  optimizer.zero_grad();
  net->loss().backward();
  optimizer.step();
  CHECK_THROWS_WITH(net->loss(),
                    Contains("'a': 'adalora' was changed since the last forward, but its step was "
                             "left out (hint: train with peft::AdamW(adapter)"));
  {
    torch::NoGradGuard no_grad;  // inference is nobody's step
    CHECK_NOTHROW(net->loss());
  }
  adapter.accept_changes();
  CHECK_NOTHROW(net->loss());
}

TEST_CASE("Importances and their means give the same bits at every level of vector instructions",
          "[adalora]") {
  using peft::internal::CpuLevel;
  torch::manual_seed(11);
  const int64_t count = GENERATE(1, 7, 16, 31, 33, 40000), columns = GENERATE(1, 3, 8, 12);
  std::vector<Tensor> start;
  for (int i = 0; i < 4; ++i) {
    start.push_back(torch::randn({count * columns + 1}).narrow(0, 1, count * columns));  // unaligned
  }
  for (int i = 2; i < 4; ++i) start[i].abs_();
  std::vector<std::vector<Tensor>> results;
  for (const auto level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
    const peft::internal::CpuLevelGuard guard(level);
    results.emplace_back();
    auto& x = results.back();
    for (const auto& tensor : start) x.push_back(tensor.clone());
    x.push_back(torch::ones({columns}));
    const auto at = [&x](size_t i) { return x[i].data_ptr<float>(); };
    const peft::internal::ImportanceConstants<float> constants({0.8, 0.7}, 0.3);
    for (int step = 0; step < 3; ++step) {
      peft::internal::smooth_importance(peft::internal::cpu_level(), at(0), at(1), at(2), at(3),
                                        count * columns, constants);
    }
    std::vector<float> memory;
    peft::internal::add_product_means(peft::internal::cpu_level(), at(2), at(3), count * columns, columns,
                                      at(4), memory);
  }
  for (size_t level = 1; level < results.size(); ++level) {
    for (size_t i = 2; i < 5; ++i) CHECK(torch::equal(results[level][i], results[0][i]));
  }
  std::vector<Tensor> exact;
  for (const auto& tensor : start) exact.push_back(tensor.to(torch::kDouble));
  for (int step = 0; step < 3; ++step) {
    peft::internal::smooth_importance(exact[0], exact[1], exact[2], exact[3], {0.8, 0.7},
                                      torch::scalar_tensor(0.3, torch::kDouble));
  }
  exact.push_back((exact[2] * exact[3]).view({count, columns}).mean(0) + 1);
  for (size_t i = 2; i < 5; ++i)
    CHECK(torch::allclose(results[0][i].to(torch::kDouble), exact[i], 1e-5, 1e-6));
}

TEST_CASE("The orthogonality penalty's gradient is autograd's, at every level of vector instructions",
          "[adalora]") {
  using peft::internal::CpuLevel;
  torch::manual_seed(12);
  const int64_t rank = GENERATE(1, 3, 8, 12, 17, 33), length = GENERATE(1, 5, 40, 300);
  const bool transposed = GENERATE(false, true);
  const auto scale = GENERATE(0.02, 1.0);
  std::vector<Tensor> matrices, start, exact;
  for (int i = 0; i < 3; ++i) {
    matrices.push_back(torch::randn(transposed ? std::vector{length, rank} : std::vector{rank, length}) *
                       scale);
    start.push_back(torch::randn_like(matrices.back()));
  }
  // One layout that has no loop, and one matrix that is orthogonal, where there is no gradient.
  matrices[1] = matrices[1].t().contiguous().t();
  if (rank <= length) {
    matrices[2].zero_();
    matrices[2].diagonal().fill_(1);
  }
  for (size_t i = 0; i < 3; ++i) {
    const auto leaf = matrices[i].to(torch::kDouble).set_requires_grad(true);
    const auto P = transposed ? leaf.t() : leaf;
    const auto penalty = torch::norm(P.matmul(P.t()) - torch::eye(rank, torch::kDouble)) * 0.3;
    exact.push_back(start[i].to(torch::kDouble) + torch::autograd::grad({penalty}, {leaf}).front());
  }
  torch::NoGradGuard no_grad;
  for (const auto level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
    const peft::internal::CpuLevelGuard guard(level);
    std::vector<Tensor> gradients;
    for (const auto& tensor : start) gradients.push_back(tensor.clone());
    peft::internal::add_orthogonality_gradients(matrices, gradients, transposed, 0.3);
    for (size_t i = 0; i < 3; ++i) {
      CHECK((gradients[i].to(torch::kDouble) - exact[i]).abs().max().item<double>() <= 2e-6);
    }
  }
}

TEST_CASE("The scores of AdaLoRA's ranks do not depend on whether an update makes them", "[adalora]") {
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32);
  Net net;
  const auto adapter = adapt(*net);
  net->to(type);
  peft::internal::AdaLoraImportance importance(adapter.layers<peft::AdaLoraImpl>());
  for (auto& parameter : adapter.parameters())
    parameter.mutable_grad() = fill(parameter.sizes().vec(), 5).to(type);
  torch::NoGradGuard no_grad;
  const peft::StepContext context{torch::scalar_tensor(0.5, torch::kDouble),
                                  [](const Tensor& tensor) { return tensor.size(-1) != 1; }};
  for (int step = 0; step < 3; ++step) {
    const auto scores = importance.update({0.85, 0.85}, context, /*scored=*/true),
               again = importance.scores();
    REQUIRE(scores.size() == again.size());
    for (size_t i = 0; i < scores.size(); ++i) {
      CHECK(scores[i].abs().sum().item<double>() > 0);
      CHECK(torch::allclose(scores[i], again[i], type == torch::kFloat64 ? 1e-14 : 1e-6, 0));
    }
  }
  CHECK(importance.update({0.85, 0.85}, context, /*scored=*/false).empty());
}

TEST_CASE("AdaLoRA's options out of range are listed with name and value", "[adalora]") {
  Net net;
  const auto add = [&](const AdaLoraOptions& given) { peft::add_adapter(*net, given, peft::all()); };
  CHECK_THROWS_WITH(
      add(AdaLoraOptions(100).tinit(60).tfinal(40)),
      Contains("total_step must be more than tinit + tfinal, which is 100") && Contains("got 100"));
  CHECK_THROWS_WITH(add(AdaLoraOptions(10).init_rank(4).target_rank(5)),
                    Contains("target_rank must be at most init_rank, which is 4, but got 5"));
  CHECK_THROWS_WITH(add(AdaLoraOptions(10).beta1(1).beta2(0).delta_t(0).dropout(1).orth_reg_weight(-1)),
                    Contains("5 problems: delta_t must be positive, but got 0") &&
                        Contains("beta1 must be in (0, 1), but got 1") &&
                        Contains("beta2 must be in (0, 1), but got 0") &&
                        Contains("orth_reg_weight must be at least 0, but got -1") &&
                        Contains("dropout must be in [0, 1), but got 1"));
  CHECK_THROWS_WITH(add(AdaLoraOptions(10).init_rank(0).target_rank(-1).tinit(-1).tfinal(-2)),
                    Contains("init_rank must be positive, but got 0") &&
                        Contains("target_rank must be at least 0") &&
                        Contains("tinit must be at least 0 steps, but got -1") && Contains("got -2"));
  CHECK(net->loss().item<double>() > 0);
  peft::Embedding embedding(4, 3);
  CHECK_THROWS_WITH(peft::add_adapter(*embedding, AdaLoraOptions(10), peft::all()),
                    Contains("matches no site"));
  peft::Conv2d grouped(nn::Conv2dOptions(4, 4, 2).groups(2));
  CHECK(refusal(AdaLoraOptions(10), grouped->info()) == "a Conv2d of 2 groups takes no AdaLoRA");
}
