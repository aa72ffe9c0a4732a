#include <peft/methods/ia3.h>
#include "methods/reference_values.h"
#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::LoraOptions;

namespace {

/// The module of tests/reference/parameter_values.py: a stack of matrices, and a single one.
struct ExpertsImpl : nn::Cloneable<ExpertsImpl> {
  explicit ExpertsImpl(bool is_transposed) : transposed(is_transposed) { reset(); }
  void reset() override {
    up = peft::register_parameter(
        *this, "up", torch::randn(transposed ? std::vector<int64_t>{3, 4, 5} : std::vector<int64_t>{3, 5, 4}),
        transposed);
    mix = peft::register_parameter(*this, "mix", torch::randn({4, 5}));
  }
  Tensor forward(const Tensor& x) {
    const auto weight = up();
    return at::linear(torch::tanh(torch::matmul(x, transposed ? weight : weight.transpose(1, 2))), mix());
  }
  void load(torch::serialize::InputArchive& archive) override { peft::load_into(*this, archive); }
  bool transposed;
  peft::Adapted<peft::Parameter> up{nullptr}, mix{nullptr};
};
TORCH_MODULE(Experts);

struct NetImpl : nn::Module {
  explicit NetImpl(bool transposed) : experts(register_module("experts", Experts(transposed))) {
    to(torch::kFloat64);
    assign(experts->up->base_weights().weight, fill(experts->up->base_weights().weight.sizes().vec(), 1));
    assign(experts->mix->base_weights().weight, fill({4, 5}, 2));
  }
  Tensor forward(const Tensor& x) { return experts(x); }
  Experts experts;
};
TORCH_MODULE(Net);

peft::Adapter adapt(Net& net) {
  const auto adapter =
      peft::add_adapter(*net, LoraOptions(2).alpha(3), peft::named({"experts.up", "experts.mix"}));
  int64_t k = 5;
  for (const auto& tensor : adapter.parameters()) assign(tensor, fill(tensor.sizes().vec(), k++));
  return adapter;
}

struct Values {
  std::vector<double> output, up_A, up_B, mix_A, mix_B, merged, losses, trained;
};

void check_reference(bool transposed, const Values& values) {
  Net net(transposed);
  auto adapter = adapt(net);
  const auto x = fill({3, 2, 4}, 9);
  const auto y = net(x);
  check_values(y, values.output);
  (y * fill(y.sizes().vec(), 12)).sum().backward();
  auto factors = adapter.parameters();
  REQUIRE(factors.size() == 4);
  CHECK(factors[0].sizes() == std::vector<int64_t>{6, 4});
  CHECK(factors[1].sizes() == std::vector<int64_t>{5, 6});
  check_values(factors[0].grad(), values.up_A);
  check_values(factors[1].grad(), values.up_B);
  check_values(factors[2].grad(), values.mix_A);
  check_values(factors[3].grad(), values.mix_B);
  peft::merge(*net);
  check_values(net->experts->up().select(0, 1), values.merged);
  peft::unmerge(*net);

  net = Net(transposed);
  adapter = adapt(net);
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01));
  std::vector<double> losses;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    const auto loss = net(x).square().mean();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  check_values(torch::tensor(losses, torch::kFloat64), values.losses);
  check_values(adapter.parameters()[1], values.trained);
}

LayerCase experts(bool transposed) {
  torch::manual_seed(7);
  return {transposed ? "experts (in, out)" : "experts (out, in)",
          [=] {
            torch::manual_seed(1);
            Experts module(transposed);
            module->to(torch::kFloat64);
            return std::static_pointer_cast<nn::Module>(module.ptr());
          },
          [](nn::Module& module, const Tensor& x) { return module.as<ExpertsImpl>()->forward(x); },
          torch::randn({3, 2, 4}, torch::kFloat64)};
}

}  // namespace

TEST_CASE("LoRA and Replace keep a method's promises on bare parameters", "[parameter]") {
  for (const bool transposed : {false, true}) {
    check_properties(experts(transposed),
                     {{peft::on(LoraOptions(2).alpha(3), peft::all())}, [](const peft::SiteInfo& site) {
                        const auto in = site.experts > 1 ? site.expert_in : site.fan_in.front();
                        return 2 * site.experts * (in + site.fan_out);
                      }});
    check_properties(experts(transposed),
                     {{peft::on(peft::ReplaceOptions(), peft::all())},
                      [](const peft::SiteInfo& site) { return torch::empty(site.weight_shape).numel(); }});
  }
}

TEST_CASE("LoRA on bare parameters equals Hugging Face's numbers", "[parameter]") {
  // Printed by tests/reference/parameter_values.py.
  check_reference(false,
                  {{0.377617093718,   0.338910475504,  -0.51312693297,   -0.0362087872951, -0.089019233303,
                    -0.0119287448209, 0.306640572184,  -0.0660682269801, 0.0900600475878,  0.256033103519,
                    0.289824997704,   -0.371089462156, 0.112132849418,   0.0837228005848,  -0.29999588775,
                    0.0553571415524,  0.0807472676106, 0.0244594248505,  -0.125744283495,  0.0060786665323,
                    0.00512941118834, 0.196869666369,  0.141561535624,   -0.131647388028},
                   {0.114637756362,    -0.133925526391,  0.104639022503,   0.118340991125,   -0.0642282700129,
                    0.0638799545136,   -0.109001065035,  -0.0476457533382, -0.0492407750224, 0.0188159940399,
                    0.0852755637356,   -0.0312787291587, -0.0338995297777, 0.111369691008,   -0.0161005844651,
                    -0.0683509555813,  0.0250203122563,  0.0603421664558,  -0.0278530318017, 0.0345667593372,
                    -0.00598829842339, 0.137964245258,   0.0105224451822,  0.0329177944635},
                   {-0.0627236228917, -0.0556603618558, 0.0383170835946,  0.0468759111,     0.0540138782242,
                    -0.0261894589639, -0.102292865102,  -0.104926777806,  -0.033155715864,  0.0433204172952,
                    0.0514409167964,  0.17879789269,    0.0598629708586,  0.05248500586,    0.0515696895848,
                    0.0290602530272,  0.0258813599305,  -0.197191011049,  -0.0142871784121, -0.0186465257393,
                    0.0270786748693,  0.0131000161265,  0.00887679055565, -0.0139301509532, 0.215605491622,
                    0.21865266434,    -0.132171284478,  -0.190301091058,  -0.241123987026,  0.0801745163247},
                   {0.0271634910345, -0.0308467422431, 0.00116544329157, -0.0134203471889, -0.00428667873079,
                    -0.0709105769294, -0.00498410999948, 0.00456461069837, -0.0296879467541, 0.114907480015},
                   {0.03429487645, 0.0978661472751, -0.0358444457614, -0.148766963757, -0.28559648777,
                    -0.0139816069265, 0.134396674397, 0.0871111792228},
                   {0.1595,  -0.45335, 0.04985, 0.2955, -0.3805, -0.06435, 0.66085, -0.1845, 0.49855, 0.17315,
                    -0.4502, 0.60305,  -0.4505, 0.1127, 0.1608,  -0.4375,  0.0195,  0.5017,  -0.2382, 0.0925},
                   {0.0473192510102, 0.0240782149367, 0.0146772452971, 0.0103137540988, 0.00765712911937,
                    0.00553058563836, 0.00376446382586, 0.00258421928824, 0.00226960996632, 0.00272545403505,
                    0.00338720618314, 0.00360084995058},
                   {-0.133427980117, -0.261965764244,  0.650887144675,   -0.513635838053, -0.206508059572,
                    -0.454447029454, -0.480546696949,  0.619458604423,   -0.36011871964,  0.391510743113,
                    -0.021402242971, 0.11329787218,    0.518583950154,   0.184362171471,  -0.0881981293735,
                    -0.171310521101, -0.073869957081,  -0.427355044752,  0.36579582813,   -0.339601459214,
                    0.222505017305,  0.0467935799396,  -0.629247312917,  0.319439132077,  0.343580217846,
                    0.280597431372,  -0.0500685569742, -0.0429698557657, 0.412252738075,  0.422791857029}});
  check_reference(
      true, {{0.362415679504,  0.378660682225,  -0.245992879142,  -0.218525986058, -0.0331336028393,
              -0.239182887595, 0.240996776076,  -0.0721907649993, -0.277211097547, -0.130951500716,
              0.544741892206,  -0.218940804865, 0.146687454821,   0.143020208828,  -0.503079131981,
              0.264570997826,  0.258185848312,  0.0755675749668,  -0.144899848117, -0.0995031081511,
              0.0994933142808, 0.124029617099,  -0.0444424584562, -0.0624960725896},
             {0.115992655125,    -0.133828186338,  0.113463554446,   0.11692935908,    -0.0662721179949,
              0.0643854988273,   -0.119366602069,  -0.0466074942639, -0.0483740786461, 0.0280458831815,
              0.0765070352891,   -0.0352764699684, -0.0309302776909, 0.0976408066127,  -0.0116695859713,
              -0.060473627038,   0.0243045275818,  0.0670838656491,  -0.0268419524057, 0.0358665108432,
              -0.00551470352222, 0.144784334007,   0.010138893208,   0.0351066579722},
             {-0.0659661620912, -0.0597032997379, 0.038522402034,   0.0490818035049,  0.0565655063688,
              -0.0250654082073, -0.11098297733,   -0.101382511129,  -0.0248693576342, 0.0469846068343,
              0.0491165461542,  0.177504119755,   0.0504379761198,  0.0358505580116,  0.0512254377711,
              0.0400062603906,  0.0263742758777,  -0.197335585082,  -0.0146977464671, -0.019647791555,
              0.0259892718055,  0.0130479280926,  0.00932243654709, -0.0117068102345, 0.214909410836,
              0.203341245053,   -0.131478166959,  -0.198924263864,  -0.224096870637,  0.0778856164814},
             {0.0056958838462, 0.0750441194569, -0.0631374255207, -0.0565083073412, 0.0197604213535,
              -0.0447640023058, -0.192156273201, 0.189599450264, 0.0528817654338, -0.0172958940844},
             {-0.131720019633, -0.126383882634, 0.159165205466, 0.174885079713, -0.222294509026,
              -0.248288370387, -0.096813708262, -0.138957121571},
             {0.1595,   -0.4805, 0.29855, 0.2595,  -0.3805, 0.01665, 0.30565, -0.56685, 0.2827,  0.5717,
              -0.02015, 0.49085, -0.7202, -0.2092, 0.3018,  -0.3145, 0.1155,  0.80305,  -0.3375, 0.0925},
             {0.0601147613672, 0.0300182310821, 0.0169865679621, 0.0108590092089, 0.00728953274603,
              0.0049120704198, 0.00331723459195, 0.00230772488883, 0.00182374136539, 0.0018456704077,
              0.00215640948519, 0.00237034755336},
             {-0.106448727206, -0.141250728118,  0.691909934216,   -0.545308594146, 0.446416394757,
              -0.654316092177, 0.342745522779,   0.577666597723,   -0.604745408977, -0.432667535695,
              0.0170888512538, -0.0131826284297, 0.607567844016,   0.0896595229424, -0.266030646653,
              0.29299037395,   -0.0649711306055, -0.294131123217,  0.468292206121,  -0.49817325556,
              0.337435287745,  0.0418420452549,  0.04171647381,    -0.115910171712, 0.221689044489,
              0.200782255245,  -0.0433696737415, -0.0494394531048, -0.378054849333, 0.524136783462}});
}

TEST_CASE("LoRA on bare parameters starts from the reference's random numbers", "[parameter]") {
  Net net(false);
  torch::manual_seed(5);
  const auto factors = peft::add_adapter(*net, LoraOptions(2), peft::all()).parameters();
  check_values(factors[0][0], {0.266215503216, 0.202302634716, 0.318040788174, -0.319534182549}, 1e-7);
  check_values(factors[2][0],
               {-0.165009379387, -0.0617752969265, 0.351387441158, 0.293248236179, -0.144318178296}, 1e-7);
  check_values(torch::rand(1), {0.150575637817}, 1e-7);
}

TEST_CASE("The keys of a module with bare parameters stay its own", "[parameter]") {
  Net net(false);
  std::vector<std::string> keys;
  for (const auto& item : net->named_parameters()) keys.push_back(item.key());
  CHECK(keys == std::vector<std::string>{"experts.up", "experts.mix"});
  const auto adapter = peft::add_adapter(*net, LoraOptions(2), peft::named({"up"}));
  CHECK(adapter.sites() == std::vector<std::string>{"experts.up"});
  CHECK(net->named_parameters().contains("experts.up_adapters.default.lora.lora_A"));
  CHECK_FALSE(net->experts->named_parameters(false)["up"].requires_grad());
}

TEST_CASE("A stack of one matrix and a vector are parameters too", "[parameter]") {
  struct Module : nn::Module {
    peft::Adapted<peft::Parameter> one =
        peft::register_parameter(*this, "one", torch::randn({1, 4, 5}), true);
    peft::Adapted<peft::Parameter> scale = peft::register_parameter(*this, "scale", torch::ones({4}));
  };
  const auto module = std::make_shared<Module>();
  const auto adapter = peft::add_adapter(*module, LoraOptions(2), peft::named({"one"}));
  CHECK(adapter.count() == 2 * (4 + 5));
  shake(adapter);
  const auto piece = adapter.layers<peft::LoraImpl>().at(0);
  const auto delta = at::mm(piece->lora_B, piece->lora_A).t() * piece->scaling();
  CHECK(largest(adapter.effective_delta("one").select(0, 0), delta.detach()) < 1e-6);
  CHECK_THROWS_WITH(peft::add_adapter(*module, LoraOptions(2), peft::named({"scale"}), "other"),
                    Contains("has no low-rank form"));
  CHECK(peft::add_adapter(*module, peft::ReplaceOptions(), peft::named({"scale"}), "own").count() == 4);
}

TEST_CASE("A bare parameter refuses what needs a layer", "[parameter]") {
  Net net(false);
  const auto refused = [&](const auto& options, const std::string& why) {
    CHECK_THROWS_WITH(peft::add_adapter(*net, options, peft::named({"up"})), Contains(why));
    CHECK(peft::active_adapters(*net).empty());
  };
  refused(LoraOptions(2).dropout(0.1), "takes no dropout");
  refused(LoraOptions(2).lora_bias(true), "takes no lora_bias");
  refused(LoraOptions(2).enable({true, false}), "has no blocks of rows");
  refused(peft::BiasOptions(), "without a bias");
  refused(peft::Ia3Options(), "(IA)³");
  CHECK_THROWS_WITH(peft::add_adapter(*net, LoraOptions(2).dropout(0.1), peft::named({"mix"})),
                    Contains("takes no dropout"));
}
