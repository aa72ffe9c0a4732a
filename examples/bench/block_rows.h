// BlockRows: sets G1, G3 and G7, stacks of decoder blocks on a GPU (or, tiny, on the CPU).
#pragma once

#include <fmt/format.h>
#include <peft/peft.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/layer_rows.h"
#include "bench/plain.h"
#include "bench/session.h"

namespace bench {

/// Sizes of a stack.
struct BlockSizes {
  std::string name;
  int64_t hidden, intermediate, heads, kv_heads, blocks, tokens;

  std::string title() const { return fmt::format("{} blocks of {} T{}", blocks, name, tokens); }
};

/// A decoder block without rotary embeddings: root-mean-square norms, grouped causal attention, a gated
/// feed-forward.
class DecoderBlockImpl : public nn::Module {
 public:
  explicit DecoderBlockImpl(const BlockSizes& sizes) : heads(sizes.heads), kv_heads(sizes.kv_heads) {
    const auto narrow = sizes.hidden / heads * kv_heads;
    const auto add = [&](const std::string& name, int64_t in, int64_t out) {
      return register_module(name, peft::Linear(nn::LinearOptions(in, out).bias(false)));
    };
    q_proj = add("q_proj", sizes.hidden, sizes.hidden);
    k_proj = add("k_proj", sizes.hidden, narrow);
    v_proj = add("v_proj", sizes.hidden, narrow);
    o_proj = add("o_proj", sizes.hidden, sizes.hidden);
    gate_proj = add("gate_proj", sizes.hidden, sizes.intermediate);
    up_proj = add("up_proj", sizes.hidden, sizes.intermediate);
    down_proj = add("down_proj", sizes.intermediate, sizes.hidden);
    norm1 = register_parameter("norm1", torch::ones({sizes.hidden}));
    norm2 = register_parameter("norm2", torch::ones({sizes.hidden}));
  }

  Tensor forward(const Tensor& x) {
    const auto normed = [](const Tensor& h, const Tensor& weight) {
      return h * torch::rsqrt(h.pow(2).mean(-1, /*keepdim=*/true) + 1e-6) * weight;
    };
    const auto split = [&](const Tensor& y, int64_t count) {
      return y.view({y.size(0), y.size(1), count, -1}).transpose(1, 2);
    };
    const auto repeated = [&](const Tensor& y) {
      return kv_heads == heads ? y : y.repeat_interleave(heads / kv_heads, 1);
    };
    const auto h = normed(x, norm1);
    const auto [queries, keys, values] = peft::project(h, q_proj, k_proj, v_proj);
    const auto q = split(queries, heads);
    const auto k = repeated(split(keys, kv_heads)), v = repeated(split(values, kv_heads));
    const auto attended = peft::internal::scaled_dot_product_attention(q, k, v, {}, 0.0, /*causal=*/true);
    const auto y = x + o_proj->forward(attended.transpose(1, 2).reshape(x.sizes()));
    const auto g = normed(y, norm2);
    const auto [gate, up] = peft::project(g, gate_proj, up_proj);
    return y + down_proj->forward(torch::silu(gate) * up);
  }

  int64_t heads, kv_heads;
  peft::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr}, gate_proj{nullptr},
      up_proj{nullptr}, down_proj{nullptr};
  Tensor norm1, norm2;
};
TORCH_MODULE(DecoderBlock);

class DecoderStackImpl : public nn::Module {
 public:
  explicit DecoderStackImpl(const BlockSizes& sizes) : layers(register_module("layers", nn::ModuleList())) {
    for (int64_t i = 0; i < sizes.blocks; ++i) layers->push_back(DecoderBlock(sizes));
  }
  Tensor forward(Tensor x) {
    const peft::ForwardScope scope;
    for (const auto& block : *layers) x = block->as<DecoderBlock>()->forward(x);
    return x;
  }
  nn::ModuleList layers;
};
TORCH_MODULE(DecoderStack);

/// A stack frozen, plain, ours, Python's: forward and backward; with `trains`, of set G3, the optimizer too,
/// and beside ours our LoRA of the same rank.
inline void measure_blocks(Session& session, Row& row, const BlockSizes& sizes, const LayerMethod& method,
                           const std::vector<std::string>& targets, bool trains) {
  torch::manual_seed(5);
  constexpr double rate = 1e-5;
  const auto device = session.device.device();
  const auto dtype = session.device.is_cuda() ? torch::kBFloat16 : torch::kFloat32;
  const auto made = [&] {
    DecoderStack model(sizes);
    model->to(device, dtype);
    for (auto& parameter : model->parameters()) parameter.set_requires_grad(false);
    return model;
  };
  const auto base = made();
  const auto values = base->named_parameters();
  const auto on_base = [&] {
    auto model = made();
    for (auto& item : model->named_parameters()) item.value().set_data(values[item.key()]);
    return model;
  };
  const auto data = torch::randn({1, sizes.tokens, sizes.hidden}).to(device, dtype);
  const auto gradient = torch::randn({1, sizes.tokens, sizes.hidden}).to(device, dtype);
  const auto bench_of = [&](DecoderStack model, std::vector<Tensor> parameters) {
    return std::make_shared<internal::LayerBench>(internal::LayerBench{
        data.clone().set_requires_grad(true),
        {gradient},
        std::move(parameters),
        [model](const Tensor& in) { return std::vector<Tensor>{DecoderStack(model)->forward(in)}; },
        {}});
  };
  const auto variant_of = [&](const std::string& name, DecoderStack model,
                              const peft::Adapter& adapter) -> Variant {
    const auto bench = bench_of(model, trains ? std::vector<Tensor>{} : adapter.parameters());
    if (!trains) return {name, [bench] { bench->step(); }};
    const auto optimizer = std::make_shared<peft::AdamW>(adapter, torch::optim::AdamWOptions(rate), 1.0);
    return {name, [bench, optimizer] {
              optimizer->zero_grad();
              bench->step();
              optimizer->step();
            }};
  };

  auto adapted = on_base();
  const auto adapter = method.add(*adapted, peft::named(targets));
  stir(adapter, 1e-3);
  const auto floor = bench_of(on_base(), {}), ours = bench_of(adapted, adapter.parameters());
  const auto saved = [&](const auto& bench) {
    return session.device.held_bytes([&] { return bench->forward(bench->x).front(); });
  };
  if (method.dropout > 0) adapted->eval();
  const auto expected = ours->result();
  adapted->train();
  const double tolerance = dtype == torch::kFloat32 ? 1e-3 : 5e-2;
  row.facts["trainable"] = static_cast<double>(adapter.count());
  row.facts["saved bytes, floor"] = saved(floor);
  row.facts["saved bytes, ours"] = saved(ours);
  std::vector<std::pair<std::string, Tensor>> weights;
  for (const auto& item : values) weights.emplace_back(item.key(), item.value());
  if (session.peer && method.has_peer) {
    session.write_tensors("base", weights);
    session.write_tensors("data", {{"x", data}, {"gradient0", gradient}});
    session.write_adapter(adapter);
  }

  std::vector<Variant> variants{{"floor", [floor] { floor->step(); }}, variant_of("ours", adapted, adapter)};
  auto other = on_base();
  if (trains) {
    const auto lora = LayerMethod::lora(method.rank).add(*other, peft::named(targets));
    variants.push_back(variant_of("ours, lora", other, lora));
  } else {
    const auto settings = PlainOptions().rank(method.rank).scaling(method.scaling).dropout(method.dropout);
    const auto plain = peft::add_adapter(*other, settings, peft::named(targets));
    copy_values(adapter, plain);
    const auto bench = bench_of(other, plain.parameters());
    row.facts["saved bytes, plain"] = saved(bench);
    variants.push_back({"plain", [bench] { bench->step(); }});
  }
  record_step_memory(session.device, variants, row);
  if (session.peer && method.has_peer) {
    const auto reply = session.prepare({{"kind", "blocks"},
                                        {"trains", trains},
                                        {"rate", rate},
                                        {"hidden", sizes.hidden},
                                        {"intermediate", sizes.intermediate},
                                        {"heads", sizes.heads},
                                        {"kv_heads", sizes.kv_heads},
                                        {"blocks", sizes.blocks}});
    compare(expected, reply.at("figures").get<std::vector<double>>(), "Python PEFT", tolerance, row);
    add_python(reply, variants, row);
  }
  row.base = "floor";
  interleave(variants, session.budget, session.device, session.peer.get(), row);
  if (const auto* lora = row.find("ours, lora")) {
    row.facts["ours over our lora"] = row.find("ours")->ratio / lora->ratio;
  }
}

/// Sets G1 and G3; their bytes are set G7's.
inline void add_block_rows(Plans& plans, bool tiny) {
  const std::vector<std::string> all{"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                     "gate_proj", "up_proj", "down_proj"};
  const std::vector<std::string> two{"q_proj", "v_proj"};
  const auto seven = [](int64_t tokens) { return BlockSizes{"7B", 4096, 11008, 32, 32, 4, tokens}; };
  const auto one = [](int64_t tokens) { return BlockSizes{"1B", 2048, 8192, 32, 8, 8, tokens}; };
  const auto add = [&](const std::string& set, BlockSizes sizes, const LayerMethod& method,
                       const std::vector<std::string>& targets, const std::string& note = "") {
    const auto name = method.name + note + ", " + sizes.title();
    if (tiny) sizes = {sizes.name, 32, 48, 4, sizes.kv_heads < sizes.heads ? 2 : 4, 2, 8};
    plans.push_back({set, name, false, [=](Session& session, Row& row) {
                       measure_blocks(session, row, sizes, method, targets, set == "G3");
                     }});
  };
  for (const auto& sizes : {seven(8192), seven(2048), one(8192), one(2048)}) {
    add("G1", sizes, LayerMethod::lora(16), all);
    add("G1", sizes, LayerMethod::lora(64), all);
    add("G1", sizes, LayerMethod::lora(16, 0.05), all);
  }
  for (const auto& method : {LayerMethod::adalora(), LayerMethod::increlora(), LayerMethod::dora()}) {
    add("G3", one(2048), method, two, ", q and v");
    add("G3", one(2048), method, all, ", all layers");
  }
}

}  // namespace bench
