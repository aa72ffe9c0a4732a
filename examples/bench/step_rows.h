// StepRows: set C2, whole training steps of encoders, with the optimizer.
#pragma once

#include <fmt/format.h>
#include <peft/models/bert.h>
#include <peft/peft.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bench/plain.h"
#include "bench/session.h"

namespace bench {

/// An encoder's sizes, and a batch's.
struct EncoderCase {
  std::string name;
  int64_t hidden, layers, heads, intermediate;
  int64_t batch, length;
  torch::ScalarType dtype = torch::kFloat32;

  peft::models::BertConfig config() const {
    constexpr int64_t words = 1000;  // a look-up costs the same in any table
    return peft::models::BertConfig()
        .vocab_size(words)
        .hidden_size(hidden)
        .num_hidden_layers(layers)
        .num_attention_heads(heads)
        .intermediate_size(intermediate)
        .dropout(0);
  }
  /// For Python's side.
  nlohmann::json python_config() const {
    const auto own = config();
    return {{"vocab_size", own.vocab_size()},
            {"hidden_size", own.hidden_size()},
            {"num_hidden_layers", own.num_hidden_layers()},
            {"num_attention_heads", own.num_attention_heads()},
            {"intermediate_size", own.intermediate_size()}};
  }
  std::string title() const {
    return fmt::format("{} {}x{}{}", name, batch, length, dtype == torch::kBFloat16 ? " bf16" : "");
  }
};

inline EncoderCase minilm(int64_t batch, int64_t length) {
  return {"MiniLM-L6", 384, 6, 12, 1536, batch, length};
}
inline EncoderCase bert_base(int64_t batch, int64_t length) {
  return {"BERT-base", 768, 12, 12, 3072, batch, length};
}

/// What trains in a row.
struct StepMethod {
  std::string name;
  std::function<peft::Adapter(peft::models::BertForSequenceClassification&)> add;
  std::optional<PlainOptions> plain = {};  ///< absent: the base's own tensors that `trains` says yes to
  std::function<bool(const std::string&)> trains = {};
  bool allocates = false;  ///< AdaLoRA
};

/// The six linear layers of each block.
inline peft::Target block_layers() {
  return peft::named(
      {"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"});
}

inline StepMethod step_lora(double dropout = 0) {
  return {dropout > 0 ? "lora r8 drop0.1" : "lora r8",
          [=](auto& model) {
            return peft::add_adapter(*model, peft::LoraOptions(8).alpha(16).dropout(dropout), block_layers());
          },
          PlainOptions().rank(8).scaling(2).dropout(dropout)};
}
inline StepMethod step_adalora() {
  return {
      "adalora r12",
      [](auto& model) { return peft::add_adapter(*model, peft::AdaLoraOptions(1'000'000), block_layers()); },
      PlainOptions().rank(12).scaling(8.0 / (12 + 1e-5)).diagonal(true),
      {},
      true};
}
inline StepMethod step_bitfit() {
  return {"bitfit",
          [](auto& model) {
            const auto has_bias = [](const peft::SiteInfo& site) { return site.has_bias(); };
            return peft::add_adapter(*model, peft::BiasOptions(), peft::where(has_bias));
          },
          {},
          [](const std::string& name) { return name.ends_with(".bias"); }};
}
inline StepMethod step_full() {
  return {"full fine-tuning",
          [](auto& model) { return peft::add_adapter(*model, peft::ReplaceOptions(), peft::all()); },
          {},
          [](const std::string&) { return true; }};
}

namespace internal {

using Encoder = peft::models::BertForSequenceClassification;

/// An encoder on the same frozen values as another.
inline Encoder encoder_on(const Encoder& base, const EncoderCase& shape, const Device& device) {
  Encoder model(shape.config(), peft::models::Unset());
  model->to(device.device(), shape.dtype);
  const auto values = base->named_parameters();
  for (auto& item : model->named_parameters()) item.value().set_data(values[item.key()]);
  for (auto& parameter : model->parameters()) parameter.set_requires_grad(false);
  model->train();
  return model;
}

}  // namespace internal

/// A step of each side: forward, loss, backward, clipping, AdamW and what the method does around it. The
/// floor: the frozen model, forward and backward with gradients flowing to the word vectors.
inline void measure_step(Session& session, Row& row, const EncoderCase& shape, const StepMethod& method) {
  constexpr double rate = 1e-4, decay = 0.01, clip = 1;
  torch::manual_seed(2);
  const auto device = session.device.device();
  internal::Encoder base(shape.config());
  base->to(device, shape.dtype);
  for (auto& parameter : base->parameters()) parameter.set_requires_grad(false);
  const auto ids = torch::randint(5, 1000, {shape.batch, shape.length}).to(device);
  const auto labels = torch::randint(0, 2, {shape.batch}).to(device);

  const auto loss_of = [=](internal::Encoder model, const Tensor& vectors = {}) {
    peft::models::EncoderInputs inputs;
    (vectors.defined() ? inputs.inputs_embeds : inputs.input_ids) = vectors.defined() ? vectors : ids;
    inputs.labels = labels;
    return model->forward(inputs).loss;
  };
  auto frozen = internal::encoder_on(base, shape, session.device);
  const auto vectors =
      frozen->base_model->embeddings->word_embeddings->forward(ids).detach().set_requires_grad(true);
  const auto floor_loss = [=] { return loss_of(frozen, vectors); };
  const auto floor = [=] {
    vectors.mutable_grad() = Tensor();
    floor_loss().backward();
  };

  auto adapted = internal::encoder_on(base, shape, session.device);
  const auto adapter = method.add(adapted);
  if (method.plain) stir(adapter);
  if (session.peer) {
    std::vector<std::pair<std::string, Tensor>> weights;
    for (const auto& item : base->named_parameters()) weights.emplace_back(item.key(), item.value());
    session.write_tensors("base", weights);
    session.write_tensors("data", {{"ids", ids}, {"labels", labels}});
    if (method.plain) session.write_adapter(adapter);
  }
  const auto optimizer =
      std::make_shared<peft::AdamW>(adapter, torch::optim::AdamWOptions(rate).weight_decay(decay), clip);
  const auto ours = [=]() {
    optimizer->zero_grad();
    const auto loss = loss_of(adapted);
    loss.backward();
    optimizer->step();
    return loss;
  };

  // The plain side: its own tensors, torch's optimizer, loops.
  auto plain_model = internal::encoder_on(base, shape, session.device);
  std::vector<Tensor> parameters;
  std::shared_ptr<PlainAllocator> allocator;
  if (method.plain) {
    const auto plain = peft::add_adapter(*plain_model, *method.plain, block_layers());
    parameters = plain.parameters();
    copy_values(adapter, plain);
    const auto ranks = static_cast<int64_t>(plain.entries().size()) * method.plain->rank();
    if (method.allocates)
      allocator = std::make_shared<PlainAllocator>(plain.layers<PlainImpl>(), 0.5, ranks - 1);
  } else {
    for (auto& item : plain_model->named_parameters()) {
      if (!method.trains(item.key())) continue;
      item.value().set_data(item.value().clone());
      parameters.push_back(item.value().set_requires_grad(true));
    }
  }
  const auto stock =
      std::make_shared<torch::optim::AdamW>(parameters, torch::optim::AdamWOptions(rate).weight_decay(decay));
  const auto plain = [=]() {
    stock->zero_grad();
    auto loss = loss_of(plain_model);
    const auto task_loss = loss;
    if (allocator) loss = loss + allocator->penalty();
    loss.backward();
    torch::nn::utils::clip_grad_norm_(parameters, clip);
    stock->step();
    if (allocator) allocator->after_step();
    return task_loss;
  };

  const bool drops = method.plain && method.plain->dropout() > 0;
  const double tolerance = shape.dtype == torch::kFloat32 ? 1e-3 : 3e-2;
  const auto three_losses = [&](const auto& step) {
    std::vector<double> losses;
    for (int i = 0; i < 3; ++i) losses.push_back(number(step()));
    return losses;
  };
  nlohmann::json reply;
  if (session.peer) {
    // What ours starts from is on disk already; these losses are the first ones of both.
    reply = session.prepare({{"kind", "encoder"},
                             {"method", method.plain ? "adapter" : method.name},
                             {"allocates", method.allocates},
                             {"bf16", shape.dtype == torch::kBFloat16},
                             {"rate", rate},
                             {"decay", decay},
                             {"clip", clip},
                             {"config", shape.python_config()}});
  }
  // With dropout the masks are drawn apart, so there is nothing to compare but the first loss without.
  if (drops) {
    adapted->eval();
    const std::vector<double> expected{number(loss_of(adapted))};
    adapted->train();
    if (session.peer)
      compare(expected, {reply.at("loss without dropout").get<double>()}, "Python PEFT", tolerance, row);
  } else {
    const auto expected = three_losses(ours);
    compare(expected, three_losses(plain), "the plain form", tolerance, row);
    if (session.peer)
      compare(expected, reply.at("losses").get<std::vector<double>>(), "Python PEFT", tolerance, row);
  }

  row.facts["trainable"] = static_cast<double>(adapter.count());
  row.facts["saved bytes, floor"] = session.device.held_bytes(floor_loss);
  row.facts["saved bytes, ours"] = session.device.held_bytes([&] { return loss_of(adapted); });
  row.facts["saved bytes, plain"] = session.device.held_bytes([&] { return loss_of(plain_model); });
  std::vector<Variant> variants{
      {"floor", floor}, {"plain", [plain] { plain(); }}, {"ours", [ours] { ours(); }}};
  record_step_memory(session.device, variants, row);
  if (!session.quick) variants.push_back({"ours, composed", composed([ours] { ours(); })});
  if (session.peer) add_python(reply, variants, row);
  row.base = "floor";
  interleave(variants, session.budget, session.device, session.peer.get(), row);
  const auto tokens = static_cast<double>(shape.batch * shape.length);
  row.facts["tokens a second, ours"] = tokens / row.find("ours")->wall;
  if (const auto* peft = row.find("PEFT")) row.facts["tokens a second, PEFT"] = tokens / peft->wall;
}

/// Rows of whole steps: set C2, and on a GPU set G2 (and their memory, G7).
inline void add_step_rows(Plans& plans, bool tiny, bool gpu) {
  const auto add = [&](const std::string& set, EncoderCase shape, const StepMethod& method,
                       bool quick = false) {
    const auto name = method.name + " " + shape.title();
    if (tiny) {
      shape.hidden = shape.intermediate = 32;
      shape.layers = shape.heads = shape.batch = 2;
      shape.length = 8;
    }
    plans.push_back(
        {set, name, quick, [=](Session& session, Row& row) { measure_step(session, row, shape, method); }});
  };
  if (gpu) {
    const std::vector<EncoderCase> shapes{bert_base(32, 128), minilm(8, 128)};
    for (const auto& shape : shapes) {
      for (const auto& method : {step_lora(), step_lora(0.1), step_adalora()}) add("G2", shape, method);
    }
    return;
  }
  add("C2", minilm(1, 32), step_lora(), true);
  add("C2", minilm(1, 32), step_adalora(), true);
  add("C2", minilm(8, 128), step_lora(), true);
  add("C2", minilm(8, 128), step_adalora(), true);
  for (const auto& method : {step_lora(0.1), step_bitfit(), step_full()}) {
    add("C2", minilm(1, 32), method);
    add("C2", minilm(8, 128), method);
  }
  for (const auto& method : {step_lora(), step_lora(0.1), step_adalora(), step_bitfit(), step_full()}) {
    add("C2", bert_base(4, 128), method);
  }
  auto half = bert_base(4, 128);
  half.dtype = torch::kBFloat16;
  add("C2", half, step_lora());
}

}  // namespace bench
