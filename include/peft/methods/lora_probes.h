// LoRA probes: the LoRAs that wait for a start that needs data.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/methods/lora.h"
#include "peft/methods/probes.h"

namespace peft {
namespace internal {

/// A LoRA that waits for its start.
struct Waiting {
  Adapter::Entry entry;
  std::shared_ptr<LoraImpl> lora;

  const std::string& path() const { return entry.site->path(); }
  /// The untouched weight as (out, in), float32 on the CPU.
  Tensor weight() const {
    const auto W = entry.site->base_view()->weights().weight.detach().to(torch::kCPU, torch::kFloat32);
    return lora->site().fan_in_fan_out ? W.t() : W;
  }
};

/// The pieces of an adapter that were added with this start: LoRAs, or those within another method's pieces.
inline std::vector<Waiting> waiting_for(LoraInit init, const Adapter& adapter, const std::string& title) {
  std::vector<Waiting> found;
  for (const auto& entry : adapter.entries()) {
    auto candidates = entry.piece->modules(/*include_self=*/false);
    candidates.insert(candidates.begin(), entry.piece);
    for (const auto& module : candidates) {
      const auto lora = std::dynamic_pointer_cast<LoraImpl>(module);
      const bool fits = lora && !lora->site().lookup && lora->site().fan_in.size() == 1;
      if (!fits || lora->options.init() != init) continue;
      lora->set_site(entry.site->info());  // the model may have moved, or have another type now
      found.push_back({entry, lora});
    }
  }
  TORCH_CHECK_VALUE(!found.empty(), title, ": adapter '", adapter.name(),
                    "' has no LoRA on a linear layer that was added with LoraOptions::init(LoraInit::",
                    to_string(init), ")");
  TORCH_CHECK(!adapter.record().has_optimizer, title, ": adapter '", adapter.name(),
              "' already has an optimizer (hint: call ", title, " first)");
  for (const auto& one : found) {
    one.entry.site->check_not_merged(title);
  }
  return found;
}

}  // namespace internal
}  // namespace peft
