// IncreLoraFormat: IncreLoRA as a plain LoRA in Hugging Face PEFT's files (peft_type LORA).
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "peft/io/formats/lora.h"
#include "peft/io/peft_format.h"
#include "peft/methods/increlora.h"

namespace peft::internal {

/// Every rank whose E is not 0, a reserve's too, becomes one of a LoRA: A′ = A ⊙ E, B′ = B, r′ of them with
/// α′ = α r′ / (r + 1e-5). A layer without any is left out. There is no way back: what was written is a LoRA.
class IncreLoraFormat final : public PeftFormat {
 public:
  std::string peft_type() const override { return "LORA"; }
  std::string title() const override { return "IncreLoRA"; }
  nlohmann::json defaults() const override { return lora_defaults(); }
  std::string bias_of_targets() const override { return "lora_only"; }
  bool owns(const PieceImpl& piece) const override {
    return dynamic_cast<const IncreLoraImpl*>(&piece) != nullptr;
  }
  bool is_targeted(const Adapter::Entry& entry) const override {
    return used(increlora(*entry.piece)).numel() > 0;
  }

  std::vector<DiskTensor> tensors(const PieceImpl& piece) const override {
    const auto& source = increlora(piece);
    const auto ranks = used(source);
    if (ranks.numel() == 0) return {};
    return lora_tensors(piece.site(), source.all_A().detach().index_select(0, ranks),
                        source.all_B().detach().index_select(1, ranks));
  }

  void write(const Entries& entries, nlohmann::json& json, std::vector<std::string>& notes,
             Problems& problems) const override {
    std::vector<std::pair<std::string, int64_t>> ranks;
    std::vector<std::pair<std::string, double>> alphas;
    bool scaled = false, positions = true;
    for (const auto& entry : entries) {
      const auto& piece = increlora(*entry.piece);
      const auto rank = used(piece).numel();
      if (rank == 0) continue;
      ranks.emplace_back(entry.site->info().target(), rank);
      alphas.emplace_back(entry.site->info().target(),
                          piece.scaling() / piece.scale() * static_cast<double>(rank));
      scaled = scaled || piece.scale() != 1.0;
      positions = positions && piece.options.adapt_positions();
    }
    if (ranks.empty()) {
      problems.add("every E is 0, as before the first step, so there is nothing to write");
      return;
    }
    json["r"] = ranks.front().second;
    json["lora_alpha"] = plain_number(alphas.front().second);
    json["lora_dropout"] = increlora(*entries.front().piece).options.dropout();
    json["rank_pattern"] = pattern_json({}, ranks.front().second, ranks);
    json["alpha_pattern"] = pattern_json({}, alphas.front().second, alphas);
    notes.emplace_back(
        "IncreLoRA is written as a plain LoRA, which does not grow on (hint: save_checkpoint)");
    if (scaled) notes.emplace_back(scale_note);
    if (!positions) {
      notes.emplace_back(
          "a plain LoRA also adapts relative positions, which this adapter leaves to the base: in a model "
          "that "
          "shares projections with them it computes something else");
    }
  }

  std::function<Part(Target)> read(ConfigFields& fields) const override { return LoraFormat().read(fields); }

 private:
  static const IncreLoraImpl& increlora(const PieceImpl& piece) {
    return static_cast<const IncreLoraImpl&>(piece);
  }
  /// Which ranks, of all chunks, have an E that is not 0.
  static Tensor used(const IncreLoraImpl& piece) {
    return torch::cat(piece.lora_E).detach().flatten().nonzero().flatten();
  }
};

}  // namespace peft::internal
