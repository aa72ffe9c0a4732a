// IncreloraTrace: trains a small net as a job says and notes every step, for comparisons with the author's
// code.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapted.h"
#include "peft/methods/increlora.h"
#include "peft/model/add_adapter.h"
#include "peft/train/optimizer.h"
#include "peft/train/schedule.h"

namespace increlora {

using nlohmann::json;
using torch::Tensor;

/// Element i is ((((i + k) · 37) mod 101) − 50) / 100.
inline Tensor fill(const std::vector<int64_t>& shape, int64_t k) {
  const auto i = torch::arange(torch::zeros(shape).numel(), torch::kLong);
  return (((i + k) * 37).remainder(101) - 50).to(torch::kDouble).div(100).view(shape);
}

/// A number or nested lists of them.
inline Tensor tensor(const json& values) {
  if (!values.is_array()) return torch::scalar_tensor(values.get<double>(), torch::kDouble);
  std::vector<Tensor> parts;
  for (const auto& value : values) parts.push_back(tensor(value));
  return torch::stack(parts);
}
inline std::vector<double> list(const Tensor& tensor) {
  const auto flat = tensor.detach().to(torch::kDouble).contiguous().view(-1);
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}
inline std::vector<double> list(const std::vector<Tensor>& tensors) {
  std::vector<double> values;
  for (const auto& tensor : tensors) {
    for (const double value : list(tensor)) values.push_back(value);
  }
  return values;
}
inline void assign(Tensor parameter, const Tensor& value) {
  torch::NoGradGuard no_grad;
  parameter.copy_(value.view(parameter.sizes()));
}

/// Adapted layers in the order of `uses`, with tanh between, and perhaps a trained layer at the end.
struct NetImpl : torch::nn::Module {
  explicit NetImpl(const json& job) : uses(job["uses"].get<std::vector<size_t>>()) {
    const auto make = [&](const std::string& name, const json& values) {
      const auto weight = tensor(values["weight"]);
      auto layer = register_module(name, peft::Linear(weight.size(1), weight.size(0)));
      layer->to(torch::kDouble);
      assign(layer->base->weight, weight);
      assign(layer->base->bias, tensor(values["bias"]));
      return layer;
    };
    for (const auto& layer : job["layers"])
      layers.push_back(make("layer" + std::to_string(layers.size()), layer));
    if (!job["head"].is_null()) head = make("head", job["head"]);
  }
  Tensor forward(Tensor x) {
    for (size_t i = 0; i < uses.size(); ++i) x = layers[uses[i]]->forward(i ? torch::tanh(x) : x);
    return head.is_empty() ? x : head->forward(torch::tanh(x));
  }
  std::vector<size_t> uses;
  std::vector<peft::Linear> layers;
  peft::Linear head{nullptr};
};
TORCH_MODULE(Net);

inline peft::IncreLoraOptions options(const json& o) {
  peft::IncreLoraOptions result(o["target_rank"].get<int64_t>());
  result.rank(o["rank"]).alpha(o["alpha"]).dropout(o["dropout"]).top_h(o["top_h"]);
  result.init_warmup(o["init_warmup"]).incre_interval(o["incre_interval"]);
  result.advance_learn(o["advance_learn"]).multi_lr(o["multi_lr"]).reg_orth_coef(o["reg_orth_coef"]);
  result.beta1(o["beta1"]).beta2(o["beta2"]);
  if (!o["target_total_rank"].is_null()) result.target_total_rank(o["target_total_rank"].get<int64_t>());
  if (!o["incre_rank_num"].is_null()) result.incre_rank_num(o["incre_rank_num"].get<int64_t>());
  return result;
}

/// Everything that trains: the net of a job, its adapter, optimizer and schedule.
struct Run {
  explicit Run(const json& job)
      : net(job),
        adapter(peft::add_adapter(*net, options(job["options"]), peft::matching("layer\\d+"))),
        pieces(adapter.layers<peft::IncreLoraImpl>()),
        grower(std::dynamic_pointer_cast<peft::RankGrower>(adapter.record().controllers.at(0))),
        optimizer((prepare(job), adapter), adamw(job["optimizer"]), job["optimizer"]["clip"].get<double>()),
        schedule((optimizer
                      .form(job["optimizer"]["form"] == "torch" ? peft::AdamW::Form::torch
                                                                : peft::AdamW::Form::transformers)
                      .no_decay([](const std::string& name) { return name.ends_with("bias"); }),
                  optimizer),
                 job["optimizer"]["warmup"], job["optimizer"]["total"]),
        filled(job["reserve"] == "fill") {
    known.assign(pieces.size(), 1);
    net->train();
  }

  /// One step and what there is to see of it.
  json step(const json& batch) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(net->forward(tensor(batch["x"])), tensor(batch["target"]));
    json line{{"loss", (loss.detach() + adapter.penalty()).item<double>()}};
    loss.backward();
    for (const auto& piece : pieces)
      line["score"].push_back(piece->score.defined() ? piece->score.item<double>() : 0.0);
    optimizer.step();
    for (const auto& group : optimizer.param_groups()) line["rates"].push_back(group.options().get_lr());
    schedule.step();
    fill_reserve();
    for (const auto& piece : pieces) {
      line["rank"].push_back(piece->rank());
      line["chunks"].push_back(piece->chunks());
      line["E"].push_back(list(piece->lora_E));
    }
    line["importance"] = grower->importance();
    return line;
  }

  /// The final factors, by layer.
  json tensors() {
    json result;
    for (size_t i = 0; i < pieces.size(); ++i) {
      result[std::to_string(i) + ".A"] = list(pieces[i]->lora_A);
      result[std::to_string(i) + ".B"] = list(pieces[i]->lora_B);
    }
    const auto heads = adapter.layers<peft::ReplaceImpl>();
    if (!heads.empty()) result["head"] = list(heads[0]->parameters());
    return result;
  }

  Net net;
  peft::Adapter adapter;
  std::vector<std::shared_ptr<peft::IncreLoraImpl>> pieces;
  std::shared_ptr<peft::RankGrower> grower;
  peft::AdamW optimizer;
  peft::LinearSchedule schedule;

 private:
  void prepare(const json& job) {
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto& layer = job["layers"][i];
      assign(pieces[i]->lora_A[0], tensor(layer["A"]));
      assign(pieces[i]->lora_E[0], tensor(layer["E"]));
      assign(pieces[i]->lora_B[0], tensor(layer["B"]));
    }
    if (!net->head.is_empty()) peft::train_also(adapter, *net, peft::named({"head"}));
  }
  static torch::optim::AdamWOptions adamw(const json& o) {
    return torch::optim::AdamWOptions(o["lr"].get<double>())
        .betas({o["betas"][0], o["betas"][1]})
        .eps(o["eps"])
        .weight_decay(o["weight_decay"]);
  }
  /// Replaces the new reserve chunks by the formula of the golden trace.
  void fill_reserve() {
    for (size_t i = 0; filled && i < pieces.size(); ++i) {
      for (; known[i] < pieces[i]->lora_A.size(); ++known[i]) {
        for (auto* list : {&pieces[i]->lora_A, &pieces[i]->lora_B}) {
          const auto& chunk = (*list)[known[i]];
          assign(chunk, 0.02 * fill({chunk.numel()}, 20 + ++drawn));
        }
      }
    }
  }

  bool filled;
  int64_t drawn = 0;
  std::vector<size_t> known;
};

/// `note`: what the grower says.
inline json trace(
    const json& job, const std::function<void(const std::string&)>& note = [](const std::string&) {}) {
  const peft::FastPaths paths(job["options"]["dropout"] == 0.0);  // the plain forms drop as Python does
  Run run(job);
  run.grower->note = note;
  torch::manual_seed(job["seed"].get<uint64_t>());
  json lines;
  for (const auto& batch : job["batches"]) lines.push_back(run.step(batch));
  lines.back()["tensors"] = run.tensors();
  return lines;
}

}  // namespace increlora
