#include <atomic>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include <peft/methods/ia3.h>
#include "io/temporary_folder.h"
#include "methods/reference_values.h"
#include "peft/peft.h"
#include "property_suite.h"

using namespace suite;
using peft::LoraOptions;
using peft_test::TemporaryFolder;

namespace {

Tensor attend(peft::MultiheadAttentionImpl& attention, const Tensor& x) {
  return std::get<0>(attention.forward(x, x.narrow(0, 0, 2), x.narrow(0, 1, 2)));
}

/// A layer that is run by `run`, in double precision.
template <class Layer, class Run, class... Arguments>
LayerCase reparametrized(std::string name, Tensor input, Run run, Arguments... arguments) {
  return {std::move(name),
          [=] {
            torch::manual_seed(1);
            Layer layer(arguments...);
            layer->to(torch::kFloat64);
            return std::static_pointer_cast<nn::Module>(layer.ptr());
          },
          [=](nn::Module& module, const Tensor& x) -> Tensor {
            return run(*module.as<typename Layer::Impl>(), x);
          },
          input.to(torch::kFloat64)};
}

std::vector<LayerCase> attention_cases() {
  torch::manual_seed(7);
  const auto x = torch::randn({3, 2, 4});
  return {
      reparametrized<peft::MultiheadAttention>("MultiheadAttention", x, attend, 4, 2),
      reparametrized<peft::MultiheadAttention>(
          "MultiheadAttention with extra keys, without biases", x, attend,
          nn::MultiheadAttentionOptions(4, 2).bias(false).add_bias_kv(true).add_zero_attn(true)),
  };
}

std::vector<LayerCase> recurrent_cases() {
  torch::manual_seed(7);
  const auto x = torch::randn({3, 2, 4});
  const auto run = [](auto& layer, const Tensor& input) { return std::get<0>(layer.forward(input)); };
  return {
      reparametrized<peft::LSTM>("LSTM", x, run, 4, 3),
      reparametrized<peft::LSTM>(
          "LSTM of two layers, both ways, projected, batch first", x, run,
          nn::LSTMOptions(4, 3).num_layers(2).bidirectional(true).proj_size(2).batch_first(true)),
      reparametrized<peft::GRU>("GRU", x, run, 4, 3),
      reparametrized<peft::GRU>("GRU of two layers, without biases", x, run,
                                nn::GRUOptions(4, 3).num_layers(2).bias(false)),
  };
}

std::vector<LayerCase> cases() {
  auto all = attention_cases();
  for (auto& layer_case : recurrent_cases()) all.push_back(layer_case);
  return all;
}

int64_t lora_count(const peft::SiteInfo& site) { return 2 * (site.fan_in.front() + site.fan_out); }

/// Fills parameters in the order of registration: the first with fill(…, first), the next with first + 1, ….
void fill_all(const std::vector<Tensor>& tensors, int64_t first) {
  for (const auto& tensor : tensors) assign(tensor, fill(tensor.sizes().vec(), first++));
}

std::vector<double> train(const peft::Adapter& adapter, const std::function<Tensor()>& loss) {
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01));
  std::vector<double> losses;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    const auto value = loss();
    value.backward();
    optimizer.step();
    losses.push_back(value.item<double>());
  }
  return losses;
}

std::set<std::string> keys(const nn::Module& module) {
  std::set<std::string> found;
  for (const auto& item : module.named_parameters()) found.insert(item.key());
  return found;
}

struct NetImpl : nn::Cloneable<NetImpl> {
  NetImpl() { reset(); }
  void reset() override {
    self_attn = register_module("self_attn", peft::MultiheadAttention(4, 2));
    lstm = register_module("lstm", peft::LSTM(4, 3));
  }
  Tensor forward(const Tensor& x) { return std::get<0>(lstm(std::get<0>(self_attn(x, x, x)))); }
  peft::MultiheadAttention self_attn{nullptr};
  peft::LSTM lstm{nullptr};
};
TORCH_MODULE(Net);

/// A model with weights in every place that Hugging Face's files know.
struct PlacesImpl : nn::Module {
  struct Experts : nn::Module {
    peft::Adapted<peft::Parameter> up = peft::register_parameter(*this, "up", torch::randn({2, 3, 5}), true);
    peft::Adapted<peft::Parameter> mix = peft::register_parameter(*this, "mix", torch::randn({4, 5}));
  };
  PlacesImpl() { eval(); }
  Tensor forward(const Tensor& x) {
    const auto y = std::get<0>(lstm(std::get<0>(self_attn(x, x, x))));
    return head(at::linear(torch::tanh(torch::matmul(y.unsqueeze(1), experts->up())), experts->mix()));
  }
  peft::MultiheadAttention self_attn = register_module("self_attn", peft::MultiheadAttention(4, 2));
  peft::LSTM lstm = register_module("lstm", peft::LSTM(4, 3));
  std::shared_ptr<Experts> experts = register_module("experts", std::make_shared<Experts>());
  peft::Linear head = register_module("head", peft::Linear(4, 2));
};
TORCH_MODULE(Places);

Places places() {
  torch::manual_seed(6);
  return {};
}

struct Saved {
  std::vector<std::string> notes;
  nlohmann::json config;
  std::set<std::string> keys;
};

/// Saves an adapter of these parts, with trained values, and checks that what is read again computes the
/// same.
Saved round_trip(const std::vector<peft::Part>& parts, const std::vector<std::string>& saved_whole = {}) {
  const TemporaryFolder folder;
  auto model = places();
  const auto adapter = peft::add_adapter(*model, parts);
  if (!saved_whole.empty()) peft::train_also(adapter, *model, peft::named(saved_whole));
  shake(adapter);
  Saved saved;
  saved.notes = peft::save_adapter(adapter, folder.path());
  std::ifstream text(folder.path() / "adapter_config.json");
  saved.config = nlohmann::json::parse(text);
  const peft::SafetensorsFile file(folder.path() / "adapter_model.safetensors");
  for (const auto& key : file.names()) saved.keys.insert(key);
  auto again = places();
  peft::load_adapter(*again, folder.path());
  const auto x = torch::randn({3, 2, 4});
  CHECK(largest(again(x).detach(), model(x).detach()) < 1e-6);
  return saved;
}

/// The layer of tests/reference/attention_values.py with its masks.
struct Attention {
  Attention() {
    layer->to(torch::kFloat64);
    fill_all(layer->parameters(), 1);
    padding.index_put_({1, torch::indexing::Slice(3)}, true);
  }
  std::tuple<Tensor, Tensor> run() {
    return layer->forward(query, source, source, padding, /*need_weights=*/true, fill({3, 5}, 11));
  }
  peft::Adapter adapt() {
    const auto adapter = peft::add_adapter(*layer, LoraOptions(2).alpha(3).dropout(0.5), peft::all());
    fill_all(adapter.parameters(), 5);
    return adapter;
  }
  peft::MultiheadAttention layer{4, 2};
  Tensor query = fill({3, 2, 4}, 9), source = fill({5, 2, 4}, 10),
         padding = torch::zeros({2, 5}, torch::kBool);
};

/// The layers of tests/reference/recurrent_values.py.
template <class Layer>
Layer filled(Layer layer) {
  layer->to(torch::kFloat64);
  fill_all(layer->parameters(), 1);
  return layer;
}

template <class Layer>
peft::Adapter adapt(Layer& layer) {
  const auto adapter = peft::add_adapter(*layer, LoraOptions(2).alpha(3), peft::all());
  fill_all(adapter.parameters(), 31);
  return adapter;
}

template <class Layer>
void check_recurrent(const std::function<Layer()>& make, const std::vector<double>& output,
                     const std::vector<double>& gradient_sums, const std::vector<double>& losses,
                     const std::vector<double>& last) {
  const auto x = fill({3, 2, 3}, 9);
  auto layer = filled(make());
  auto adapter = adapt(layer);
  const auto y = std::get<0>(layer->forward(x));
  check_values(y, output);
  (y * fill(y.sizes().vec(), 12)).sum().backward();
  std::vector<Tensor> sums;
  for (const auto& tensor : adapter.parameters()) {
    sums.push_back((tensor.grad() * fill(tensor.sizes().vec(), 7)).sum());
  }
  check_values(torch::stack(sums), gradient_sums);
  layer = filled(make());
  adapter = adapt(layer);
  check_values(torch::tensor(train(adapter, [&] { return std::get<0>(layer->forward(x)).square().mean(); }),
                             torch::kFloat64),
               losses);
  check_values(adapter.parameters().back(), last);
}

}  // namespace

TEST_CASE("LoRA keeps a method's promises on attention and recurrent layers", "[reparametrized]") {
  for (const auto& layer_case : cases()) {
    check_properties(layer_case, {{peft::on(LoraOptions(2).alpha(3), peft::all())}, lora_count});
  }
}

TEST_CASE("Other weight methods keep theirs on attention and recurrent layers", "[reparametrized]") {
  for (const auto& layer_case : cases()) {
    const auto size = [](const std::vector<int64_t>& shape) {
      return torch::empty(shape).numel() * (shape.empty() ? 0 : 1);
    };
    check_properties(layer_case, {{peft::on(peft::ReplaceOptions(), peft::all())}, [&](const auto& site) {
                                    return size(site.weight_shape) + size(site.bias_shape);
                                  }});
    check_properties(layer_case, {{peft::on(peft::Ia3Options(), peft::all())},
                                  [](const auto& site) { return site.fan_out; }});
  }
  const auto biased = recurrent_cases().front();
  check_properties(biased,
                   {{peft::on(peft::BiasOptions(), peft::all()), peft::on(LoraOptions(2), peft::all())},
                    [](const auto& site) { return lora_count(site) + site.fan_out; }});
}

TEST_CASE("Query, key and value may have LoRA factors of their own", "[reparametrized]") {
  const auto layer_case = attention_cases().front();
  const auto part = peft::on(LoraOptions(1).enable({true, false, true}), peft::named({"in_proj"}));
  check_properties(layer_case, {{part}, [](const auto&) { return 2 * (4 + 4); }});
  const auto layer = layer_case.make();
  shake(peft::add_adapter(*layer, {part}));
  const auto delta = peft::adapter(*layer, "default").effective_delta("in_proj");
  CHECK(delta.narrow(0, 0, 4).abs().min().item<double>() > 0);
  CHECK(delta.narrow(0, 4, 4).abs().max().item<double>() == 0);
  CHECK(delta.narrow(0, 8, 4).abs().min().item<double>() > 0);
}

TEST_CASE("LoRA on an attention equals Hugging Face's numbers", "[reparametrized]") {
  // Printed by tests/reference/attention_values.py.
  Attention attention;
  auto adapter = attention.adapt();
  const auto [output, weights] = attention.run();
  check_values(output, {-0.208834782997,  0.432057008374,  -0.591651971716,  0.0492398196545, -0.306551719595,
                        0.196229460076,   -0.53279629163,  -0.0300151119584, -0.203518680601, 0.391086482269,
                        -0.544223627099,  0.0503815357717, -0.32167718336,   0.19913151401,   -0.563797881109,
                        -0.0429891837388, -0.203970008512, 0.392131240358,   -0.545802453385, 0.0502987954848,
                        -0.333879985468,  0.206311508454,  -0.586129562628,  -0.0459380687057});
  check_values(weights, {0.102498259168,
                         0.204734826995,
                         0.299503039048,
                         0.15962296329,
                         0.233640911499,
                         0.214908496563,
                         0.137480558827,
                         0.200384379039,
                         0.292110920926,
                         0.155115644645,
                         0.210892648934,
                         0.137899725717,
                         0.201251481246,
                         0.293757739583,
                         0.156198404521,
                         0.217604128946,
                         0.312157709916,
                         0.470238161138,
                         0,
                         0,
                         0.4354881578,
                         0.227809381343,
                         0.336702460857,
                         0,
                         0,
                         0.454791988404,
                         0.241026276393,
                         0.304181735203,
                         0,
                         0});
  (output * fill({3, 2, 4}, 12)).sum().backward();
  const auto factors = adapter.parameters();
  REQUIRE(factors.size() == 4);
  check_values(factors[0].grad(), {-0.0268900447933, -0.170750867063, 0.293828564856, -0.250185225756,
                                   -0.0420190680064, -0.10428081556, 0.188978032568, -0.158029480491});
  check_values(
      factors[1].grad(),
      {-0.0110620545088,   0.00354955307077,  0.011870194347,    -0.00387948502177,  0.00145092103998,
       -0.000201977827001, -0.00225833497717, 0.00144566671431,  -0.00190105266273,  0.00160254248306,
       0.00717020924466,   -0.0047293571531,  0.000376423701528, -0.000269102324072, -0.00585562106348,
       0.00325112695866,   0.102933666685,    0.246327831635,    0.0331075203508,    0.0971834329081,
       -0.0655230592617,   -0.152146304466,   0.0979585945239,   0.196099121894});
  check_values(factors[2].grad(), {-0.174304897027, 0.225394281503, -0.0231776755735, -0.0595908510935,
                                   0.228799514772, -0.155826458243, 0.104974411574, -0.110833632239});
  check_values(factors[3].grad(), {-0.263818573381, -0.136430440983, 0.30353748649, 0.150179435146,
                                   -0.00920507931305, 0.0766542787297, -0.391987900408, -0.317131983466});
  peft::merge(*attention.layer);
  check_values(attention.layer->base->in_proj_weight.index_select(0, torch::tensor({0, 11})),
               {-0.304, 0.39285, -0.48085, -0.2385, -0.1714, 0.50115, -0.39685, -0.0879});
  check_values(attention.layer->base->out_proj->weight,
               {-0.2128, 0.2904, 0.127, -0.0768, 0.4192, 0.6227, -0.44135, 0.4742, -0.67085, -0.2065, 0.40935,
                -0.54535, -0.03885, 0.1258, -0.159, 0.00565});

  Attention trained;
  adapter = trained.adapt();
  check_values(
      torch::tensor(train(adapter, [&] { return std::get<0>(trained.run()).square().mean(); }),
                    torch::kFloat64),
      {0.122976910185, 0.0932855949154, 0.0731362383974, 0.059700046751, 0.0503262359893, 0.0423777991071,
       0.0342064097807, 0.02551659152, 0.01745072779, 0.0114657473915, 0.00718290928789, 0.00413073910478});
  check_values(adapter.parameters()[0], {0.167499498265, 0.0329383674636, 0.522652721921, 0.0264926820263,
                                         -0.713114991075, 0.675875685721, -0.564164296002, -0.606250648081});
  check_values(adapter.parameters()[3],
               {-0.154522983141, -0.400497314621, 0.342378748879, -0.110336693419, -0.668021275257,
                -0.0183344255533, -0.216177158112, -0.274459691711});
}

TEST_CASE("LoRA on an attention starts from the reference's random numbers", "[reparametrized]") {
  peft::MultiheadAttention layer(4, 2);
  torch::manual_seed(5);
  const auto factors = peft::add_adapter(*layer, LoraOptions(2), peft::all()).parameters();
  check_values(factors[0],
               {0.318040788174, -0.319534182549, -0.26584982872, 0.473162055016, -0.277520596981,
                -0.285158932209, -0.133780300617, -0.161604762077},
               1e-7);
  check_values(factors[2],
               {-0.17101585865, -0.0367491841316, -0.0607969164848, 0.26713758707, 0.343671381474,
                -0.360056579113, -0.276099741459, -0.153777122498},
               1e-7);
  check_values(torch::rand(1), {0.56683909893}, 1e-7);
}

TEST_CASE("LoRA on LSTM and GRU equals Hugging Face's numbers", "[reparametrized]") {
  // Printed by tests/reference/recurrent_values.py.
  check_recurrent<peft::LSTM>(
      [] { return peft::LSTM(nn::LSTMOptions(3, 4).num_layers(2).bidirectional(true).proj_size(2)); },
      {-0.0322031423796, 0.00847143238701, -0.0942853002553, 0.189086838617,   -0.0316847912224,
       0.00659782395709, -0.0887834481331, 0.183105970119,   -0.0488792798368, 0.0188874382214,
       -0.0728101137699, 0.160851354025,   -0.0483302638316, 0.0163108780903,  -0.0694275267186,
       0.157089590001,   -0.0585587075536, 0.0331931804865,  -0.0460472509168, 0.112222573308,
       -0.0582709831673, 0.0310016514568,  -0.0449137688823, 0.110968536517},
      {0.00694841678209, 0.0040550644789,   0.000169138800174, -0.000317043327699, -0.0172678257853,
       0.0223850246619,  -0.00568889611292, 0.00141230262363,  4.73908486662e-07,  0.000360667217881,
       0.00944095424556, 0.00894737410897,  0.00147009869679,  0.00420930241217,   3.07416570348e-05,
       0.00035747781935, -0.00997792685938, 0.0132598555807,   0.0244263150885,    -0.0113684943407,
       0.00115793488073, -0.0100402695576,  -0.170965811073,   -0.0238922473122},
      {0.00800677997831, 0.00253004614152, 0.00125880366197, 0.0019531373895, 0.00148292083875,
       0.000718439720416, 0.000346069969621, 0.000315055550692, 0.000416762392014, 0.000504533332571,
       0.000513571916533, 0.000436220200439},
      {0.0999899828998, -0.0939647638936, -0.317866663676, 0.0884544421819});
  check_recurrent<peft::GRU>(
      [] { return peft::GRU(3, 4); },
      {-0.17899153547,   -0.0473890834047, 0.0806712397703, -0.0901246942447, -0.179164139457,
       -0.0249247672095, 0.0702200481419,  -0.100036704148, -0.300843425122,  -0.0545988158943,
       0.112413195181,   -0.180047300259,  -0.29707980653,  -0.0218633498957, 0.101220601193,
       -0.193965007107,  -0.421213930922,  -0.103080497283, 0.119590579727,   -0.398535742925,
       -0.415972433295,  -0.0648501835859, 0.108840136364,  -0.412659000189},
      {0.156237069928, 0.104182882732, 0.00743882143759, 0.0254596399695},
      {0.0455112036311, 0.0347473070256, 0.0268067644283, 0.0213248535069, 0.0177886042681, 0.0154071016021,
       0.0136956118617, 0.0123526110987, 0.0111185279688, 0.00991768765897, 0.0088582344664,
       0.00808959933626},
      {-0.351537834222,  0.555953416477,   0.0186739366276, -0.173948114952, 0.752789081812,
       -0.48710203396,   -0.162285127609,  -0.258501613134, 0.240909505545,  0.140345183004,
       -0.0355527690257, 0.0167438051768,  0.720556853558,  -0.244693245058, 0.438940127325,
       0.381385250754,   0.170659103624,   0.0300600265521, -0.132942047829, -0.328498261804,
       -0.0251527391453, -0.0687328756976, 0.367335891309,  0.244893319733});
}

TEST_CASE("Checkpoints of plain and reparametrised layers are the same", "[reparametrized]") {
  torch::manual_seed(2);
  nn::MultiheadAttention plain_attention(4, 2);
  peft::MultiheadAttention attention(4, 2);
  nn::LSTM plain_lstm(nn::LSTMOptions(4, 3).num_layers(2));
  peft::LSTM lstm(nn::LSTMOptions(4, 3).num_layers(2));
  CHECK(keys(*attention) == keys(*plain_attention));
  CHECK(keys(*lstm) == keys(*plain_lstm));
  const auto x = torch::randn({3, 2, 4});
  through_archive(*plain_attention, *attention);
  through_archive(*plain_lstm, *lstm);
  CHECK(torch::equal(attend(*attention, x),
                     std::get<0>(plain_attention(x, x.narrow(0, 0, 2), x.narrow(0, 1, 2)))));
  CHECK(torch::equal(std::get<0>(lstm(x)), std::get<0>(plain_lstm(x))));

  shake(peft::add_adapter(*attention, LoraOptions(2), peft::all()));
  shake(peft::add_adapter(*lstm, LoraOptions(2), peft::all()));
  nn::MultiheadAttention other_attention(4, 2);
  nn::LSTM other_lstm(nn::LSTMOptions(4, 3).num_layers(2));
  through_archive(*attention, *other_attention);
  through_archive(*lstm, *other_lstm);
  CHECK(torch::equal(other_attention->in_proj_weight, plain_attention->in_proj_weight));
  CHECK(torch::equal(std::get<0>(other_lstm(x)), std::get<0>(plain_lstm(x))));

  peft::merge(*attention);
  CHECK_THROWS_WITH(through_archive(*plain_attention, *attention), Contains("unmerge first"));
}

TEST_CASE("A target finds the weights of attention and recurrent layers by path", "[reparametrized]") {
  Net net;
  using Paths = std::vector<std::string>;
  CHECK(peft::add_adapter(*net, LoraOptions(2), peft::named({"self_attn"}), "a").sites() ==
        Paths{"self_attn.in_proj", "self_attn.out_proj"});
  CHECK(peft::add_adapter(*net, LoraOptions(2), peft::named({"lstm.weight_ih_l0"}), "b").sites() ==
        Paths{"lstm.weight_ih_l0"});
  CHECK(peft::add_adapter(*net, LoraOptions(2), peft::matching("lstm"), "c").sites() ==
        Paths{"lstm.weight_ih_l0", "lstm.weight_hh_l0"});
  CHECK_THAT(peft::summary(*net).text, Contains("lstm.weight_hh_l0"));
  CHECK_THROWS_WITH(peft::add_adapter(*net, LoraOptions(2).dropout(0.1), peft::named({"weight_hh_l0"}), "d"),
                    Contains("takes no dropout"));
  CHECK_THROWS_WITH(
      peft::add_adapter(*net, peft::AdaLoraOptions(100), peft::named({"lstm.weight_hh_l0"}), "d"),
      Contains("watches the layer's forward"));
  CHECK_THROWS_WITH(peft::MultiheadAttention(nn::MultiheadAttentionOptions(4, 2).kdim(3)),
                    Contains("must have the query's width, 4, but got kdim 3"));
  CHECK_NOTHROW(peft::add_adapter(*net, LoraOptions(2).lora_bias(true), peft::named({"weight_hh_l0"}), "e"));
  peft::LSTM unbiased(nn::LSTMOptions(4, 3).bias(false));
  CHECK_THROWS_WITH(peft::add_adapter(*unbiased, LoraOptions(2).lora_bias(true), peft::all()),
                    Contains("runs on weights alone") && Contains("has no bias"));
}

TEST_CASE("Copies of a model carry the adapters of its attention and recurrent layers", "[reparametrized]") {
  torch::manual_seed(4);
  Net net;
  const auto x = torch::randn({3, 2, 4});
  const auto adapter = peft::add_adapter(*net, LoraOptions(2), peft::all());
  shake(adapter);
  const auto y = net(x).detach();
  const auto copy = peft::clone(*net);
  CHECK(torch::equal(copy->forward(x), y));
  CHECK(peft::adapter(*copy, "default").sites() == adapter.sites());
  for (const auto& item : copy->named_parameters()) {
    CHECK(item.value().requires_grad() == (("." + item.key()).find(".default.") != std::string::npos));
  }
  shake(peft::adapter(*copy, "default"));
  CHECK(torch::equal(net(x), y));
  CHECK(largest(copy->forward(x).detach(), y) > 1e-3);

  peft::merge(*net);
  const auto merged = net(x).detach();
  const auto merged_copy = peft::clone(*net);
  CHECK(torch::equal(merged_copy->forward(x), merged));
  peft::unmerge(*merged_copy);
  CHECK(torch::equal(merged_copy->forward(x), y));
  merged_copy->to(torch::kFloat64);
  CHECK(largest(merged_copy->forward(x.to(torch::kFloat64)).detach(), y.to(torch::kFloat64)) < 1e-6);
}

TEST_CASE("Packed sequences and states run on the effective weights", "[reparametrized]") {
  torch::manual_seed(4);
  peft::LSTM lstm(4, 3);
  peft::GRU gru(4, 3);
  shake(peft::add_adapter(*lstm, LoraOptions(2), peft::all()));
  shake(peft::add_adapter(*gru, LoraOptions(2), peft::all()));
  const auto x = torch::randn({3, 2, 4});
  namespace rnn = nn::utils::rnn;
  const auto packed = rnn::pack_padded_sequence(x, torch::tensor({3, 2}));
  const auto state = torch::randn({1, 2, 3});
  const auto y = std::get<0>(lstm->forward(x, std::make_tuple(state, state)));
  const auto z = std::get<0>(gru->forward(x, state));
  const auto unpacked = [](const rnn::PackedSequence& sequence) {
    return std::get<0>(rnn::pad_packed_sequence(sequence));
  };
  const auto y_packed =
      unpacked(std::get<0>(lstm->forward_with_packed_input(packed, std::make_tuple(state, state))));
  const auto z_packed = unpacked(std::get<0>(gru->forward_with_packed_input(packed, state)));
  CHECK(largest(y_packed.select(1, 0), y.select(1, 0)) < 1e-6);
  CHECK(largest(z_packed.select(1, 0), z.select(1, 0)) < 1e-6);
  const auto off = peft::disabled(*lstm);
  CHECK(largest(std::get<0>(lstm->forward(x, std::make_tuple(state, state))), y) > 1e-3);
}

TEST_CASE("A reparametrised layer takes one adapter for a whole batch", "[reparametrized]") {
  Net net;
  net->eval();
  shake(peft::add_adapter(*net, LoraOptions(2), peft::named({"self_attn"}), "a"));
  const auto x = torch::randn({3, 2, 4});
  {
    const peft::RowAdapters rows({"a", "__base__", "a"});
    CHECK_THROWS_WITH(net(x), Contains("one weight for the whole batch"));
  }
  {
    const peft::RowAdapters rows({"b", "__base__", "a"});
    CHECK_THROWS_WITH(net(x), Contains("no adapter 'b'"));
  }
  const peft::RowAdapters rows({"__base__", "__base__", "__base__"});
  const auto y = net(x).detach();
  peft::remove_adapter(*net, "a");
  CHECK(torch::equal(net(x), y));
}

TEST_CASE("One thread may switch adapters while others run an attention", "[reparametrized]") {
  torch::manual_seed(4);
  Net net;
  net->eval();
  shake(peft::add_adapter(*net, LoraOptions(2), peft::all()));
  const auto x = torch::randn({3, 2, 4});
  const auto adapted = net(x).detach();
  const auto plain = [&] {
    const auto off = peft::disabled(*net);
    return net(x).detach();
  }();
  std::atomic<int> wrong{0};
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      torch::NoGradGuard no_grad;
      while (!done) {
        const peft::ForwardScope scope;
        const auto y = net(x);
        if (!torch::equal(y, adapted) && !torch::equal(y, plain)) ++wrong;
      }
    });
  }
  for (int i = 0; i < 200; ++i)
    peft::set_active(*net, i % 2 ? std::vector<std::string>{"default"} : std::vector<std::string>{});
  done = true;
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("An attention with adapters sits in a Sequential as the plain one does", "[reparametrized]") {
  nn::Sequential sequence(peft::LSTM(4, 3));
  shake(peft::add_adapter(*sequence, LoraOptions(2), peft::all()));
  const auto x = torch::randn({3, 2, 4});
  using Result = std::tuple<Tensor, std::tuple<Tensor, Tensor>>;
  const auto y = std::get<0>(sequence->forward<Result>(x));
  CHECK(y.sizes() == std::vector<int64_t>{3, 2, 3});
}

TEST_CASE("An attention's file of Hugging Face's PEFT gives the same output", "[reparametrized][files]") {
  // Printed by tests/reference/attention_values.py.
  struct Holder : nn::Module {
    peft::MultiheadAttention self_attn = register_module("self_attn", peft::MultiheadAttention(4, 2));
  };
  const TemporaryFolder folder;
  std::filesystem::create_directories(folder.path());
  std::ofstream(folder.path() / "adapter_config.json")
      << R"({"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["self_attn"],
             "lora_dropout": 0.5, "rank_pattern": {"self_attn": 2}, "alpha_pattern": {"self_attn": 3}})";
  const std::string prefix = "base_model.model.self_attn.";
  peft::save_safetensors(folder.path() / "adapter_model.safetensors",
                         {{prefix + "lora_A.weight", fill({2, 4}, 5)},
                          {prefix + "lora_B.weight", fill({12, 2}, 6)},
                          {prefix + "base_layer.out_proj.lora_A.weight", fill({2, 4}, 7)},
                          {prefix + "base_layer.out_proj.lora_B.weight", fill({4, 2}, 8)}});
  Holder holder;
  Attention attention;
  holder.self_attn = holder.replace_module("self_attn", attention.layer);
  const auto adapter = peft::load_adapter(holder, folder.path(), "default", /*trainable=*/true);
  check_values(
      std::get<0>(attention.run()),
      {-0.17545778814,  0.570131146683,  -0.670809608054, 0.074779326768,  -0.39555252385,  0.27334185959,
       -0.57631946401,  0.0925749194297, -0.189409363867, 0.502745896782,  -0.608155747482, 0.0839995131666,
       -0.410794099865, 0.289872040855,  -0.615112322336, 0.0855538183839, -0.189389151206, 0.504621351281,
       -0.610212533838, 0.0837979686486, -0.42037138756,  0.307644312077,  -0.643516949524, 0.0844987501129});

  // Written again it is the same file.
  const TemporaryFolder copy;
  CHECK(peft::save_adapter(adapter, copy.path()).empty());
  peft::SafetensorsFile first(folder.path() / "adapter_model.safetensors"),
      second(copy.path() / "adapter_model.safetensors");
  REQUIRE(second.names() == first.names());
  for (const auto& key : first.names()) CHECK(torch::equal(first.tensor(key), second.tensor(key)));
}

TEST_CASE("Files name attentions, recurrent layers and parameters as Hugging Face's do",
          "[reparametrized][files]") {
  using peft::all;
  using peft::named;
  using peft::on;
  using Json = nlohmann::json;
  const std::string prefix = "base_model.model.";
  SECTION("all places at once") {
    const auto saved = round_trip(
        {on(LoraOptions(2), named({"self_attn", "head"})), on(LoraOptions(3), named({"lstm", "experts"}))});
    CHECK(saved.notes.empty());
    CHECK(saved.config["target_modules"] == Json({"head", "self_attn"}));
    CHECK(saved.config["target_parameters"] ==
          Json({"lstm.weight_ih_l0", "lstm.weight_hh_l0", "experts.up", "experts.mix"}));
    std::set<std::string> expected;
    for (const char* place : {"self_attn.", "self_attn.base_layer.out_proj.", "head.", "lstm.base_layer.",
                              "lstm.", "experts.base_layer.", "experts."}) {
      expected.insert(prefix + place + "lora_A.weight");
      expected.insert(prefix + place + "lora_B.weight");
    }
    CHECK(saved.keys == expected);
  }
  SECTION("own factors for query and value, another rank and scale for the output") {
    const auto saved =
        round_trip({on(LoraOptions(2).alpha(4).enable({true, false, true}), named({"in_proj"})),
                    on(LoraOptions(3).alpha(5), named({"out_proj"}))});
    CHECK(saved.config["r"] == 4);
    CHECK(saved.config["lora_alpha"] == 8);
    CHECK(saved.keys.size() == 4);
  }
  SECTION("one projection only") {
    for (const char* projection : {"in_proj", "out_proj"}) {
      CHECK(round_trip({on(LoraOptions(2).alpha(4).rslora(true), named({projection}))}).keys.size() == 4);
    }
  }
  SECTION("modules saved whole") {
    const auto saved = round_trip({on(LoraOptions(2), named({"head"}))}, {"self_attn", "lstm", "experts"});
    CHECK(saved.notes.empty());
    CHECK(saved.config["modules_to_save"] == Json({"experts", "lstm", "self_attn"}));
    for (const char* key : {"self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight",
                            "lstm.weight_ih_l0", "lstm.bias_hh_l0", "experts.up"}) {
      CHECK(saved.keys.count(prefix + key) == 1);
    }
  }
  SECTION("what Python has no words for is this library's own") {
    for (const auto& parts : std::vector<std::vector<peft::Part>>{
             {on(LoraOptions(2), named({"in_proj"})), on(peft::BiasOptions(), named({"in_proj"}))},
             {on(LoraOptions(2), named({"self_attn"})), on(peft::BiasOptions(), all())},
             {on(peft::ReplaceOptions(), named({"lstm.weight_ih_l0"}))},
             {on(LoraOptions(2), named({"head"})), on(peft::ReplaceOptions(), named({"experts.up"}))},
             {on(peft::Ia3Options(), named({"in_proj"})), on(peft::Ia3Options(), named({"weight_hh_l0"}))}}) {
      const auto saved = round_trip(parts);
      REQUIRE(saved.notes.size() == 1);
      CHECK_THAT(saved.notes[0], Contains("Python PEFT cannot read this adapter"));
    }
  }
  SECTION("dropout is not written beside parameters, lora_bias is refused") {
    const auto saved =
        round_trip({on(LoraOptions(2).dropout(0.1), named({"head"})), on(LoraOptions(2), named({"up"}))});
    CHECK(saved.config["lora_dropout"] == 0.0);
    CHECK_THAT(saved.notes.at(0), Contains("dropout is written as 0"));
    const TemporaryFolder folder;
    auto model = places();
    const auto biased = peft::add_adapter(*model, LoraOptions(2).lora_bias(true), named({"lstm"}));
    CHECK_THROWS_WITH(peft::save_adapter(biased, folder.path()), Contains("Python has no lora_bias there"));
  }
}

TEST_CASE("A config of parameters is read as strictly as others", "[reparametrized][files]") {
  const TemporaryFolder folder;
  const auto refused = [&](const std::string& keys, const std::string& why) {
    std::filesystem::create_directories(folder.path());
    std::ofstream(folder.path() / "adapter_config.json")
        << R"({"peft_type": "LORA", "r": 2, "target_modules": [], )" << keys << "}";
    peft::save_safetensors(folder.path() / "adapter_model.safetensors",
                           {{"base_model.model.experts.lora_A.weight", torch::randn({4, 3})},
                            {"base_model.model.experts.lora_B.weight", torch::randn({5, 4})}});
    auto model = places();
    CHECK_THROWS_WITH(peft::load_adapter(*model, folder.path()), Contains(why));
    CHECK_NOTHROW(peft::add_adapter(*model, LoraOptions(2), peft::named({"up"})));
  };
  refused(R"("target_parameters": ["experts.down"])", "no module matches target 'experts.down'");
  refused(R"("target_parameters": ["experts.mix"])", "expected (2, 5), but got (4, 3)");
  refused(R"("target_parameters": ["experts.up"], "lora_dropout": 0.1)", "takes no dropout");
  refused(R"("target_parameters": ["experts.up"], "lora_bias": true)", "takes no lora_bias");
  refused(R"("target_parameters": ["experts.up"], "use_dora": true)", "has no DoRA");
  refused(R"("target_parameters": ["experts.up"], "fan_in_fan_out": true)",
          "must be false where 'target_parameters'");
  refused(R"("target_parameters": null)", "must name at least one module");
  refused(R"("target_parameters": ["self_attn.in_proj"])", "expected");
}

TEST_CASE("A tensor of the model itself has no file", "[reparametrized][files]") {
  struct Bare : nn::Module {
    peft::Adapted<peft::Parameter> experts =
        peft::register_parameter(*this, "experts", torch::randn({2, 3, 4}));
  } model;
  const auto adapter = peft::add_adapter(model, LoraOptions(1), peft::named({"experts"}));
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(peft::save_adapter(adapter, folder.path()),
                    Contains("'experts' belongs to the model itself"));
}
