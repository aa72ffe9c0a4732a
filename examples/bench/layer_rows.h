// LayerRows: sets C1 and C4, adapted linear layers forward and backward.
#pragma once

#include <fmt/format.h>
#include <peft/peft.h>
#include <torch/torch.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/plain.h"
#include "bench/session.h"

namespace bench {

/// A method of the rows: how it is put on a model, and what a user would write for it.
struct LayerMethod {
  std::string name;
  std::function<peft::Adapter(nn::Module&, const peft::Target&)> add;
  std::function<Tensor(const PlainLayer&, const Tensor&)> plain;
  double scaling = 1, dropout = 0;
  bool has_peer = true;  ///< Python PEFT has the method
  bool scores = false;   ///< IncreLoRA: backward leaves a score
  int64_t rank = 8;

  static LayerMethod lora(int64_t rank, double dropout = 0) {
    return {fmt::format("lora r{}{}", rank, dropout > 0 ? fmt::format(" drop{}", dropout) : ""),
            [=](nn::Module& model, const peft::Target& target) {
              return peft::add_adapter(model, peft::LoraOptions(rank).alpha(16).dropout(dropout), target);
            },
            [](const PlainLayer& layer, const Tensor& x) { return layer.lora(x); },
            16.0 / static_cast<double>(rank),
            dropout,
            true,
            false,
            rank};
  }
  static LayerMethod adalora() {
    return {"adalora r12",
            [](nn::Module& model, const peft::Target& target) {
              return peft::add_adapter(model, peft::AdaLoraOptions(1'000'000), target);
            },
            [](const PlainLayer& layer, const Tensor& x) { return layer.adalora(x); },
            8.0 / (12 + 1e-5),
            0,
            true,
            false,
            12};
  }
  static LayerMethod increlora() {
    return {"increlora r8, growing",
            [](nn::Module& model, const peft::Target& target) {
              return peft::add_adapter(model, peft::IncreLoraOptions(16).rank(8).incre_rank_num(1).top_h(1),
                                       target);
            },
            {},
            16.0 / (8 + 1e-5),
            0,
            /*has_peer=*/false,
            /*scores=*/true};
  }
  static LayerMethod dora() {
    return {"dora r8",
            [](nn::Module& model, const peft::Target& target) {
              return peft::add_adapter(model, peft::DoraOptions(peft::LoraOptions(8).alpha(16)), target);
            },
            [](const PlainLayer& layer, const Tensor& x) { return layer.dora(x); }, 2.0};
  }
  static LayerMethod ia3() {
    return {"ia3",
            [](nn::Module& model, const peft::Target& target) {
              return peft::add_adapter(model, peft::Ia3Options(), target);
            },
            [](const PlainLayer& layer, const Tensor& x) { return layer.ia3(x); }};
  }
  static LayerMethod bottleneck() {
    return {"bottleneck 64",
            [](nn::Module& model, const peft::Target& target) {
              return peft::add_adapter(model, peft::BottleneckOptions(64).original_ln_after(false), target);
            },
            [](const PlainLayer& layer, const Tensor& x) { return layer.bottleneck(x); },
            1,
            0,
            /*has_peer=*/false};
  }
};

/// One linear layer, three side by side on one input (a model's query, key and value), or many one after the
/// other.
class LayersImpl : public nn::Module {
 public:
  LayersImpl(std::vector<std::string> names, int64_t in, int64_t out, bool is_chain) : chain(is_chain) {
    for (const auto& name : names) layers.push_back(register_module(name, peft::Linear(in, out)));
  }
  std::vector<Tensor> forward(const Tensor& x) {
    const peft::ForwardScope scope;
    if (chain) {
      auto y = x;
      for (auto& layer : layers) y = layer->forward(y);
      return {y};
    }
    if (layers.size() == 3) {
      const auto [first, second, third] = peft::project(x, layers[0], layers[1], layers[2]);
      return {first, second, third};
    }
    return {layers.front()->forward(x)};
  }

  std::vector<peft::Linear> layers;
  bool chain;
};
TORCH_MODULE(Layers);

struct LayerCase {
  std::vector<std::string> names{"fc"};
  int64_t tokens, in, out;
  torch::ScalarType dtype = torch::kFloat32;
  bool chain = false;

  std::string shape() const {
    return fmt::format("T{} {}x{}{}", tokens, in, out, dtype == torch::kBFloat16 ? " bf16" : "");
  }
};

namespace internal {

/// What a row on layers needs, in shared hands: the variants outlive the function that makes them.
struct LayerBench {
  Tensor x;
  std::vector<Tensor> gradients;
  std::vector<Tensor> parameters;
  std::function<std::vector<Tensor>(const Tensor&)> forward;
  std::function<void()> after;

  std::vector<Tensor> step() {
    x.mutable_grad() = Tensor();
    clear(parameters);
    const auto outputs = forward(x);
    torch::autograd::backward(outputs, gradients);
    if (after) after();
    return outputs;
  }
  std::vector<double> result() {
    const auto outputs = step();
    std::vector<double> all;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto some = figures(outputs[i], gradients[i], x, parameters);
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }
};

inline std::function<std::vector<Tensor>(const Tensor&)> plain_forward(const std::vector<PlainLayer>& layers,
                                                                       const LayerMethod& method, bool chain,
                                                                       std::function<void()>& after) {
  if (method.scores) {
    auto update = std::make_shared<Tensor>();
    after = [update] {
      torch::NoGradGuard no_grad;
      (*update * update->grad()).abs().sum();
    };
    return [=](const Tensor& x) { return std::vector<Tensor>{layers.front().increlora(x, *update)}; };
  }
  return [=, run = method.plain](const Tensor& x) {
    std::vector<Tensor> outputs;
    for (const auto& layer : layers)
      outputs.push_back(run(layer, chain && !outputs.empty() ? outputs.back() : x));
    if (chain) outputs = {outputs.back()};
    return outputs;
  };
}

}  // namespace internal

/// Forward and backward of frozen layers, of the plain form, of ours and of Python PEFT's.
inline void measure_layers(Session& session, Row& row, const LayerCase& shape, const LayerMethod& method) {
  torch::manual_seed(1);
  const auto device = session.device.device();
  const auto options = torch::TensorOptions(shape.dtype).device(device);
  Layers frozen(shape.names, shape.in, shape.out, shape.chain);
  frozen->to(device, shape.dtype);
  for (auto& parameter : frozen->parameters()) parameter.set_requires_grad(false);
  Layers adapted(shape.names, shape.in, shape.out, shape.chain);
  adapted->to(device, shape.dtype);
  const auto bases = frozen->named_parameters();
  for (auto& item : adapted->named_parameters()) item.value().set_data(bases[item.key()]);
  const auto x = torch::randn({shape.tokens, shape.in}, options);
  const auto leaf = [&x] { return x.detach().clone().set_requires_grad(true); };
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < (shape.chain ? 1 : shape.names.size()); ++i) {
    gradients.push_back(torch::randn({shape.tokens, shape.out}, options));
  }
  const auto adapter = method.add(*adapted, peft::named(shape.names));
  stir(adapter);

  // The same tensors, under a second handle for gradients of their own.
  std::vector<PlainLayer> layers;
  std::vector<Tensor> twins;
  for (const auto& name : shape.names) {
    PlainLayer layer{bases[name + ".weight"], bases[name + ".bias"], {}, method.scaling, method.dropout};
    for (const auto& [key, tensor] : adapter.named_tensors()) {
      const auto prefix = name + ".";
      if (!key.starts_with(prefix)) continue;
      auto last = key.substr(key.find('.', prefix.size()) + 1);
      if (last.starts_with("lora.")) last = last.substr(5);  // DoRA's factors lie in a LoRA of its own
      layer.tensors[last] = tensor.detach().clone().set_requires_grad(tensor.requires_grad());
      if (tensor.requires_grad()) twins.push_back(layer.tensors[last]);
    }
    layers.push_back(std::move(layer));
  }

  using internal::LayerBench;
  LayerMethod nothing;
  nothing.plain = [](const PlainLayer& layer, const Tensor& in) { return layer.base(in); };
  std::function<void()> after;
  const auto floor = std::make_shared<LayerBench>(
      LayerBench{leaf(), gradients, {}, internal::plain_forward(layers, nothing, shape.chain, after), {}});
  const auto ours = std::make_shared<LayerBench>(
      LayerBench{leaf(),
                 gradients,
                 adapter.parameters(),
                 [adapted](const Tensor& in) { return Layers(adapted)->forward(in); },
                 {}});
  auto forward = internal::plain_forward(layers, method, shape.chain, after);
  const auto plain = std::make_shared<LayerBench>(
      LayerBench{leaf(), gradients, twins, std::move(forward), std::move(after)});

  const double tolerance = shape.dtype == torch::kFloat32 ? 1e-4 : 3e-2;
  const auto without_dropout =
      [&](const auto& work) {  // masks are drawn apart: the figures are compared without
        if (method.dropout > 0) adapted->eval();
        const auto result = work();
        adapted->train();
        return result;
      };
  const auto expected = without_dropout([&] { return ours->result(); });
  if (method.dropout == 0) compare(expected, plain->result(), "the plain form", tolerance, row);
  std::vector<Variant> variants{{"floor", [floor] { floor->step(); }},
                                {"plain", [plain] { plain->step(); }},
                                {"ours", [ours] { ours->step(); }},
                                {"ours, composed", composed([ours] { ours->step(); })}};
  if (session.peer && method.has_peer) {
    std::vector<std::pair<std::string, Tensor>> data{{"x", x}};
    for (size_t i = 0; i < gradients.size(); ++i)
      data.emplace_back("gradient" + std::to_string(i), gradients[i]);
    session.write_tensors("data", data);
    std::vector<std::pair<std::string, Tensor>> base;
    for (const auto& item : bases) base.emplace_back(item.key(), item.value());
    session.write_tensors("base", base);
    session.write_adapter(adapter);
    const auto reply = session.prepare({{"kind", "layers"},
                                        {"names", shape.names},
                                        {"in", shape.in},
                                        {"out", shape.out},
                                        {"chain", shape.chain}});
    compare(expected, reply.at("figures").get<std::vector<double>>(), "Python PEFT", tolerance, row);
    add_python(reply, variants, row);
  }
  row.base = "floor";
  if (!session.device.is_cuda()) {
    const auto count = static_cast<double>(shape.names.size());
    const auto allocations = [&](const auto& bench) {
      return static_cast<double>(Device::allocations([&] { bench->step(); })) / count;
    };
    row.facts["allocations a layer"] = allocations(ours);
    row.facts["allocations a layer, floor"] = allocations(floor);
  }
  row.facts["layers"] = static_cast<double>(shape.names.size());
  row.facts["trainable"] = static_cast<double>(adapter.count());
  interleave(variants, session.budget, session.device, session.peer.get(), row);
}

/// Set C1 and set C4.
inline void add_layer_rows(Plans& plans, bool tiny) {
  const auto add = [&](const std::string& prefix, LayerCase shape, const LayerMethod& method,
                       bool quick = false) {
    const auto name = prefix + method.name + " " + shape.shape();
    for (const auto& plan : plans) {
      if (plan.set == "C1" && plan.name == name) return;
    }
    if (tiny) {
      shape.tokens = 16;
      shape.in = std::min<int64_t>(shape.in, 32);
      shape.out = std::min<int64_t>(shape.out, 48);
    }
    plans.push_back({"C1", name, quick,
                     [=](Session& session, Row& row) { measure_layers(session, row, shape, method); }});
  };
  const auto one = [](int64_t tokens, int64_t in, int64_t out, torch::ScalarType dtype = torch::kFloat32) {
    return LayerCase{{"fc"}, tokens, in, out, dtype, false};
  };
  const auto lora = LayerMethod::lora(8), dropped = LayerMethod::lora(8, 0.1);
  // The shapes of the targets first.
  add("", one(1024, 768, 768), lora, true);
  add("", one(1024, 768, 768), dropped, true);
  const LayerCase grouped{{"query", "key", "value"}, 1024, 768, 768, torch::kFloat32, false};
  add("q,k,v ", grouped, lora, true);
  add("q,k,v ", grouped, dropped, true);
  add("", one(1024, 768, 768, torch::kBFloat16), lora, true);
  add("", one(128, 384, 384), lora, true);
  const std::vector<std::pair<int64_t, int64_t>> sizes{
      {384, 384}, {768, 768}, {768, 3072}, {3072, 768}, {2048, 2048}};
  for (const auto& [in, out] : sizes) {
    for (const int64_t tokens : {32, 128, 1024, 4096}) {
      add("", one(tokens, in, out), lora);
      add("", one(tokens, in, out), dropped);
    }
  }
  for (const auto& method :
       {LayerMethod::adalora(), LayerMethod::increlora(), LayerMethod::dora(), LayerMethod::ia3(),
        LayerMethod::bottleneck(), LayerMethod::lora(4), LayerMethod::lora(16), LayerMethod::lora(64)}) {
    const bool is_lora = method.name.starts_with("lora");
    add("", one(128, 768, 768), method, !is_lora);
    add("", one(1024, 768, 768), method);
    add("", one(1024, 384, 384), method);
  }
  for (const auto& [in, out] : sizes) add("", one(1024, in, out, torch::kBFloat16), lora);
  for (const auto& method : {dropped, LayerMethod::adalora(), LayerMethod::dora(), LayerMethod::ia3()}) {
    add("", one(1024, 768, 768, torch::kBFloat16), method);
  }
  for (const int64_t tokens : {128, 1024}) {
    for (const int64_t width : {384, 768, 2048}) {
      add("q,k,v ", {{"query", "key", "value"}, tokens, width, width, torch::kFloat32, false}, lora);
    }
  }

  LayerCase chain{{}, 8, 8, 8, torch::kFloat32, true};
  for (int i = 0; i < 16; ++i) chain.names.push_back("layer" + std::to_string(i));
  for (const auto& method : {lora, dropped, LayerMethod::adalora()}) {
    plans.push_back({"C4", "16 layers of 8x8, T8, " + method.name, method.name == lora.name,
                     [=](Session& session, Row& row) { measure_layers(session, row, chain, method); }});
  }
}

}  // namespace bench
