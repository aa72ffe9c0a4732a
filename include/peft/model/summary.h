// summary: what is adapted, what trains, and what it costs.
#pragma once

#include <fmt/format.h>

#include <set>
#include <string>

#include "peft/model/active.h"

namespace peft {

/// Counts of one model; `text` is the table a person reads.
struct Summary {
  int64_t trainable = 0;        ///< weights that train, as `Adapter::count` has them
  int64_t changed = 0;          ///< base weights that differ once the active adapters are merged
  int64_t total = 0;            ///< weights of the base
  int64_t adapter_bytes = 0;    ///< of all adapters
  int64_t gradient_bytes = 0;   ///< of what trains
  int64_t optimizer_bytes = 0;  ///< AdamW's two moments, in float32 or wider
  std::string text;

  double percent() const {
    return total ? 100.0 * static_cast<double>(trainable) / static_cast<double>(total) : 0.0;
  }
};

namespace internal {

/// "1.2 MB".
inline std::string bytes_text(int64_t bytes) {
  const auto b = static_cast<double>(bytes);
  if (b >= 1e9) return fmt::format("{:.2f} GB", b / 1e9);
  if (b >= 1e6) return fmt::format("{:.2f} MB", b / 1e6);
  if (b >= 1e3) return fmt::format("{:.1f} kB", b / 1e3);
  return fmt::format("{} B", bytes);
}

/// "12,345".
inline std::string count_text(int64_t count) {
  auto text = std::to_string(count);
  for (auto i = static_cast<std::ptrdiff_t>(text.size()) - 3; i > 0; i -= 3)
    text.insert(static_cast<size_t>(i), ",");
  return text;
}

}  // namespace internal

/// What is adapted (a line a site), what trains, and the bytes of adapter, gradients and optimizer.
inline Summary summary(nn::Module& model) {
  const auto nodes = internal::walk(model);
  Summary result;
  std::set<const void*> seen;
  const auto count = [&](const Tensor& parameter) {
    // By its memory, for two tied matrices count once.
    if (parameter.numel() == 0 || !seen.insert(parameter.data_ptr()).second) return;
    result.total += parameter.numel();
    if (parameter.requires_grad()) result.trainable += parameter.numel();
  };
  std::string tree;
  std::set<std::string> active;
  for (const auto& parameter : model.parameters(/*recurse=*/false)) count(parameter);
  for (const auto& node : nodes) {
    for (const auto& parameter : node.module->parameters(/*recurse=*/false)) count(parameter);
    if (!node.site) continue;
    const auto set = node.site->activation()->get();
    active.insert(set->active.begin(), set->active.end());
    PieceImpl::Changed changed;
    for (const auto& name : node.site->adapters()) {
      const bool is_active = set->is_active(name);
      const auto list = [&](const nn::Module& module, const std::string& method, int64_t trains) {
        int64_t held = 0;
        for (const auto& parameter : module.parameters()) {
          const auto bytes = parameter.numel() * static_cast<int64_t>(parameter.element_size());
          held += parameter.numel();
          result.adapter_bytes += bytes;
          if (!parameter.requires_grad()) continue;
          result.gradient_bytes += bytes;
          result.optimizer_bytes +=
              2 * parameter.numel() * std::max<int64_t>(4, static_cast<int64_t>(parameter.element_size()));
        }
        result.trainable += trains;
        std::string state = trains || held == 0 ? "" : "  frozen";
        if (!is_active) state += state.empty() ? "  inactive" : ", inactive";
        tree +=
            fmt::format("  {:<52} {:<10} {:<12} {:>12}{}\n", node.path.empty() ? "(the model)" : node.path,
                        method, name, internal::count_text(held), state);
      };
      for (const auto& shared : node.site->shared(name)) {
        const auto& part = *shared.second;
        if (!part.parameters().empty()) list(part, "shared", internal::trainable(part));
      }
      for (const auto& attached : node.site->pieces(name)) {
        list(*attached.piece, attached.piece->method(), attached.piece->trainable());
        if (!is_active) continue;
        const auto more = attached.piece->changed();
        changed = {std::max(changed.weight, more.weight), std::max(changed.bias, more.bias)};
      }
    }
    result.changed += changed.weight + changed.bias;
  }
  const auto share = [&](int64_t part) {
    return result.total ? 100.0 * static_cast<double>(part) / static_cast<double>(result.total) : 0.0;
  };
  if (!tree.empty())
    result.text =
        fmt::format("  {:<52} {:<10} {:<12} {:>12}\n", "site", "method", "adapter", "weights") + tree;
  result.text += fmt::format("trainable {} ({:.3f} %) · changed {} ({:.2f} %) · base {}\n",
                             internal::count_text(result.trainable), share(result.trainable),
                             internal::count_text(result.changed), share(result.changed),
                             internal::count_text(result.total));
  result.text += fmt::format(
      "adapters {} · gradients {} · optimizer {} (AdamW)\n", internal::bytes_text(result.adapter_bytes),
      internal::bytes_text(result.gradient_bytes), internal::bytes_text(result.optimizer_bytes));
  return result;
}

}  // namespace peft
