// OptimizerRows: sets C3 and G5, what happens after backward.
#pragma once

#include <fmt/format.h>
#include <peft/peft.h>
#include <torch/torch.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/layer_rows.h"
#include "bench/session.h"

namespace bench {

/// Layers that adapters sit on; never run.
struct OptimizerCase {
  int64_t layers, width, rank;

  std::string title() const { return fmt::format("{} layers, width {}, r{}", layers, width, rank); }
};

enum class After { adamw, adamw_and_clip, clip, zero, adalora };

inline std::string title(After work) {
  switch (work) {
    case After::adamw:
      return "adamw";
    case After::adamw_and_clip:
      return "adamw with clipping";
    case After::clip:
      return "clipping alone";
    case After::zero:
      return "zero_grad";
    case After::adalora:
      return "adalora after backward";
  }
  return {};
}

namespace internal {

inline void fill_gradients(const std::vector<Tensor>& parameters) {
  for (auto parameter : parameters) {
    auto& gradient = parameter.mutable_grad();
    const auto values = torch::randn_like(parameter) * 1e-3;
    if (gradient.defined()) {
      gradient.copy_(values);
    } else {
      gradient = values;
    }
  }
}

}  // namespace internal

/// The step of the optimizer and its parts, on gradients that are there. Ratios are to `torch::optim::AdamW`
/// and the loops over tensors.
inline void measure_after(Session& session, Row& row, const OptimizerCase& shape, After work) {
  torch::manual_seed(3);
  const auto device = session.device.device();
  const bool adalora = work == After::adalora;
  std::vector<std::string> all;
  for (int64_t i = 0; i < shape.layers; ++i) all.push_back("layer" + std::to_string(i));
  Layers model(all, shape.width, shape.width, /*is_chain=*/false);
  model->to(device);
  for (auto& parameter : model->parameters()) parameter.set_requires_grad(false);
  auto adapter = adalora ? peft::add_adapter(*model,
                                             peft::AdaLoraOptions(1'000'000)
                                                 .init_rank(shape.rank)
                                                 .target_rank(std::max<int64_t>(1, shape.rank / 2)),
                                             peft::named(all), "ours")
                         : peft::add_adapter(*model, peft::LoraOptions(shape.rank), peft::named(all), "ours");
  stir(adapter);
  torch::NoGradGuard no_grad;
  const auto options = torch::optim::AdamWOptions(1e-4).weight_decay(0.01);
  const double clip = work == After::adamw ? 0 : 1;
  const auto ours = std::make_shared<peft::AdamW>(adapter, options, clip);
  auto twins =
      peft::add_adapter(*model, PlainOptions().rank(shape.rank).diagonal(adalora), peft::named(all), "plain");
  stir(twins);
  const auto parameters = twins.parameters();
  const auto stock = std::make_shared<torch::optim::AdamW>(parameters, options);
  internal::fill_gradients(adapter.parameters());
  internal::fill_gradients(parameters);
  ours->step();  // brings gradients into place
  row.base = "plain";
  row.facts["trainable"] = static_cast<double>(adapter.count());
  row.facts["layers"] = static_cast<double>(shape.layers);
  std::vector<Variant> variants;
  std::string peer_work;
  switch (work) {
    case After::adamw:
      variants = {{"plain", [=] { stock->step(); }}, {"ours", [=] { ours->step(); }}};
      peer_work = "adamw";
      break;
    case After::adamw_and_clip:
      variants = {{"plain",
                   [=] {
                     torch::nn::utils::clip_grad_norm_(parameters, clip);
                     stock->step();
                   }},
                  {"ours", [=] { ours->step(); }}};
      peer_work = "adamw with clipping";
      break;
    case After::clip: {
      // Ours has no pass of its own for it: what it adds to a step.
      variants = {{"plain", [=] { torch::nn::utils::clip_grad_norm_(parameters, clip); }}};
      peer_work = "clipping";
      break;
    }
    case After::zero:
      variants = {{"plain",
                   [=] {
                     for (auto tensor : parameters) tensor.mutable_grad().zero_();
                   }},
                  {"ours", [=] { ours->zero_grad(); }}};
      peer_work = "zero_grad";
      break;
    case After::adalora: {
      const auto allocator =
          std::make_shared<PlainAllocator>(twins.layers<PlainImpl>(), 0.5, shape.layers * shape.rank - 1);
      variants = {{"plain",
                   [=] {
                     torch::AutoGradMode with_grad(true);
                     allocator->penalty().backward();
                     allocator->after_step();
                   }},
                  {"ours", [=] {
                     adapter.before_step();
                     adapter.after_step();
                   }}};
      peer_work = "adalora";
      break;
    }
  }
  if (session.peer) {
    session.prepare({{"kind", "optimizer"},
                     {"work", peer_work},
                     {"layers", shape.layers},
                     {"width", shape.width},
                     {"rank", shape.rank}});
    variants.push_back({"PEFT", {}});
    if (work == After::adamw || work == After::adamw_and_clip) {
      variants.push_back({"PEFT foreach", {}});
      variants.push_back({"PEFT fused", {}});
    }
  }
  interleave(variants, session.budget, session.device, session.peer.get(), row);
}

/// Sets C3 and, on a GPU, G5.
inline void add_optimizer_rows(Plans& plans, bool tiny, bool gpu) {
  const auto add = [&](const std::string& set, OptimizerCase shape, After work, bool quick = false) {
    const auto name = title(work) + ", " + shape.title();
    if (tiny) shape = {std::min<int64_t>(shape.layers, 4), 16, 4};
    plans.push_back(
        {set, name, quick, [=](Session& session, Row& row) { measure_after(session, row, shape, work); }});
  };
  if (gpu) {
    // About as many weights at 448 layers as a model of seven billion has with r 16.
    for (const int64_t layers : {24, 72, 144, 448}) add("G5", {layers, 2800, 16}, After::adamw_and_clip);
    add("G5", {72, 768, 12}, After::adalora);
    return;
  }
  constexpr int64_t total = 2 * 8 * 768 * 72;  // weights: 884 736
  for (const int64_t rank : {8, 16}) {
    for (const int64_t layers : {24, 72, 144, 448}) {
      const OptimizerCase shape{layers, total / (2 * rank * layers), rank};
      add("C3", shape, After::adamw, rank == 8);
      if (layers == 72) {
        for (const auto work : {After::adamw_and_clip, After::clip, After::zero}) {
          add("C3", shape, work, rank == 8 && work == After::adamw_and_clip);
        }
      }
    }
  }
  for (const int64_t layers : {24, 72, 144, 448}) add("C3", {layers, 768, 12}, After::adalora, layers == 72);
}

}  // namespace bench
