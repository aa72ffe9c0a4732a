// Starts of LoRA that are computed from the data: EVA, CorDA, LoRA-GA.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "batches.h"
#include "peft/methods/corda.h"
#include "peft/methods/eva.h"
#include "peft/methods/lora_ga.h"
#include "task.h"

namespace finetune {

/// Whether a method's LoRAs wait for `start_from_data`.
inline bool starts_from_data(const Method& method) {
  return method.init == "eva" || method.init == "corda" || method.init == "lora_ga";
}

/// Gives the LoRAs of a method their start from the first `method.init_batches` batches of the data; EVA goes
/// on until its directions have converged, from the first batch again. `task`: a `Task` or like one. Throws
/// std::runtime_error where that fails.
template <class Model>
void start_from_data(const Method& method, Model& task, Batches& data) {
  constexpr int64_t most_of_eva = 1000;
  const auto& adapter = *task.adapter();
  auto& model = *task.model();
  const auto batch = [&](int64_t i) { return internal::to(data.get(0, i % data.count()), task.device()); };
  const auto for_each_batch = [&](const auto& use) {
    for (int64_t i = 0; i < std::min(method.init_batches, data.count()); ++i) use(batch(i));
  };
  try {
    if (method.init == "eva") {
      int64_t next = 0;
      peft::initialize_eva(model, adapter, [&](Tensor& used) {
        if (next == most_of_eva) return false;
        const auto one = batch(next++);
        if (one.inputs.attention_mask.defined()) used = one.inputs.attention_mask.to(torch::kBool);
        task.logits(one.inputs);
        return true;
      });
    } else if (method.init == "corda") {
      peft::initialize_corda(model, adapter,
                             [&] { for_each_batch([&](const Batch& one) { task.logits(one.inputs); }); });
    } else {
      if (task.has_pooled_head()) {
        throw std::runtime_error(
            "init=lora_ga needs gradients, but the head of --pooling mean starts at zero and gives none "
            "(hint: "
            "--pooling cls)");
      }
      peft::initialize_lora_ga(model, adapter, [&] {
        for_each_batch([&](const Batch& one) { task.loss(task.logits(one.inputs), one.labels).backward(); });
      });
    }
  } catch (const c10::Error& error) {
    throw std::runtime_error(fmt::format("--method {}: {}", method.name, error.what_without_backtrace()));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(fmt::format("--method {}: {}", method.name, error.what()));
  }
}

}  // namespace finetune
