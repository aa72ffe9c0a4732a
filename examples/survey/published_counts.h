// Published counts: the trainable parameters that papers report for DeBERTaV3-base, and ours.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "peft/methods/adalora.h"
#include "peft/methods/bias.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/increlora.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"
#include "peft/models/deberta_v2.h"

namespace survey {

/// The settings of microsoft/deberta-v3-base.
inline peft::models::DebertaV2Config deberta_v3_base() {
  return peft::models::DebertaV2Config()
      .hidden_size(768)
      .num_hidden_layers(12)
      .num_attention_heads(12)
      .intermediate_size(3072)
      .relative_attention(true)
      .position_buckets(256)
      .norm_rel_ebd("layer_norm")
      .share_att_key(true)
      .pos_att_type({"p2c", "c2p"})
      .position_biased_input(false);
}

/// Ranks that training shares out among the layers.
struct RankBudget {
  int64_t total = 0;            ///< of all layers, at the end
  int64_t least = 0, most = 0;  ///< of one layer
};

/// A number of AdaLoRA's Table 1 (arXiv 2303.10512) or IncreLoRA's (arXiv 2308.12043); the head is in none.
struct PublishedCount {
  std::string method;
  std::string millions;  ///< as printed
  std::vector<peft::Part> parts;
  std::optional<RankBudget> budget;
  std::string arithmetic;
};

/// What this library trains: one number, or with learned ranks all that the budget allows.
struct OwnCount {
  int64_t least = 0, most = 0;
};

/// Every matrix of the blocks.
inline peft::Target every_matrix() {
  return peft::named({"query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"});
}

inline std::vector<PublishedCount> published_counts() {
  std::vector<PublishedCount> cases;
  const auto houlsby = [&](const char* millions, int64_t size, const std::string& arithmetic) {
    cases.push_back({fmt::format("HAdapter, {} channels", size),
                     millions,
                     {peft::on(peft::houlsby().size(size))},
                     {},
                     arithmetic});
  };
  const auto pfeiffer = [&](const char* millions, int64_t size, const std::string& arithmetic) {
    cases.push_back({fmt::format("PAdapter, {} channels", size),
                     millions,
                     {peft::on(peft::pfeiffer().size(size))},
                     {},
                     arithmetic});
  };
  const auto lora = [&](const char* millions, int64_t rank) {
    cases.push_back({fmt::format("LoRA, rank {}", rank),
                     millions,
                     {peft::on(peft::LoraOptions(rank), every_matrix())},
                     {},
                     fmt::format("12 (4 (768 + 768) + 2 (768 + 3072)) {}", rank)});
  };
  const auto adalora = [&](const char* millions, int64_t initial, int64_t target) {
    const auto options =
        peft::AdaLoraOptions(1000).init_rank(initial).target_rank(target).tinit(100).tfinal(300);
    cases.push_back({fmt::format("AdaLoRA, mean rank {}", target),
                     millions,
                     {peft::on(options, every_matrix())},
                     RankBudget{72 * target, 0, initial},
                     fmt::format("{} ranks of 1537 weights (width 768) or 3841 (768 and 3072), at most {} a "
                                 "matrix",
                                 72 * target, initial)});
  };
  const auto increlora = [&](const char* millions, int64_t target) {
    cases.push_back({fmt::format("IncreLoRA, mean rank {}", target),
                     millions,
                     {peft::on(peft::IncreLoraOptions(target), every_matrix())},
                     RankBudget{72 * target, 1, 768},
                     fmt::format("{} ranks of 1537 or 3841 weights, at least 1 a matrix", 72 * target)});
  };
  cases.push_back(
      {"BitFit", "0.1", {peft::on(peft::BiasOptions(), peft::all())}, {}, "12 (7 · 768 + 3072) + 2 · 768"});
  houlsby(
      "1.22", 32,
      "24 (1537 m + 768) is 1.199 M for m = 32 and 1.236 M for m = 33: no m gives 1.22 (twice 0.61 does)");
  pfeiffer("1.18", 64,
           "12 (1537 m + 768) is 1.171 M for m = 63 and 1.190 M for m = 64: no m gives 1.18 (m = 64 without "
           "biases does, 12 · 1536 · 64 = 1.180 M)");
  lora("1.33", 8);
  adalora("1.27", 12, 8);
  increlora("1.33", 8);
  houlsby("0.61", 16, "24 (1537 · 16 + 768)");
  pfeiffer("0.60", 32, "12 (1537 · 32 + 768)");
  houlsby("0.31", 8, "24 (1537 · 8 + 768)");
  pfeiffer("0.30", 16, "12 (1537 · 16 + 768)");
  lora("0.33", 2);
  adalora("0.32", 3, 2);
  increlora("0.34", 2);
  return cases;
}

/// Counts on a constructed model, whose memory is never touched: the method's weights, or with learned ranks
/// the least and the most that its budget allows.
inline OwnCount own_count(const PublishedCount& published) {
  peft::models::DebertaV2Model model(deberta_v3_base(), peft::models::Unset());
  const auto adapter = peft::add_adapter(*model, published.parts);
  if (!published.budget) return {adapter.count(), adapter.count()};
  const auto& budget = *published.budget;
  std::vector<int64_t> costs;  // of one rank
  for (const auto& entry : adapter.entries()) {
    const auto& shape = entry.piece->site().weight_shape;
    costs.push_back(shape.at(0) + shape.at(1) + 1);
  }
  std::sort(costs.begin(), costs.end());
  const auto filled = [&] {
    int64_t left = budget.total - budget.least * static_cast<int64_t>(costs.size()), weights = 0;
    for (const auto cost : costs) {
      const auto more = std::min(left, budget.most - budget.least);
      weights += cost * (budget.least + more);
      left -= more;
    }
    return weights;
  };
  const auto least = filled();
  std::reverse(costs.begin(), costs.end());
  return {least, filled()};
}

/// Whether the published number is ours, rounded as it is printed.
inline bool is_met(const PublishedCount& published, const OwnCount& own) {
  const auto decimals = static_cast<double>(published.millions.size() - published.millions.find('.') - 1);
  const double half = 0.5 * std::pow(10.0, -decimals), value = std::stod(published.millions);
  return static_cast<double>(own.least) / 1e6 < value + half &&
         value - half <= static_cast<double>(own.most) / 1e6;
}

}  // namespace survey
