// The numbers of trained weights in Table 1 of AdaLoRA (arXiv 2303.10512) and in IncreLoRA's (arXiv
// 2308.12043), counted on DeBERTaV3-base; the head is in none of them.
#include "catch.h"
#include "peft/methods/adalora.h"
#include "peft/methods/bias.h"
#include "peft/methods/bottleneck.h"
#include "peft/methods/increlora.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"
#include "peft/models/deberta_v2.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using namespace peft::models;

namespace {

/// microsoft/deberta-v3-base. Its values are not set: its memory is never touched.
DebertaV2ForSequenceClassification deberta_v3_base() {
  const auto config = DebertaV2Config()
                          .vocab_size(128100)
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
  return DebertaV2ForSequenceClassification(config, Unset());
}

/// Weights that train, of a method on a new model.
template <class Options>
int64_t count(const Options& options, const peft::Target& target) {
  auto model = deberta_v3_base();
  return peft::add_adapter(*model, options, target).count();
}
int64_t count(const peft::BottleneckOptions& options) {
  auto model = deberta_v3_base();
  return peft::add_adapter(*model, options, "bottleneck").count();
}

/// As a table prints it.
double millions(int64_t count) { return std::round(static_cast<double>(count) / 1e4) / 100; }

/// Every matrix of the blocks, 72 of them.
peft::Target every_matrix() {
  return peft::named({"query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"});
}

/// The least and the most weights of `total` ranks, of which each matrix has from `least` to `most`; `costs`:
/// those of one rank of each.
std::pair<int64_t, int64_t> range(std::vector<int64_t> costs, int64_t total, int64_t least, int64_t most) {
  const auto filled = [&] {
    int64_t left = total - least * static_cast<int64_t>(costs.size()), weights = 0;
    for (const auto cost : costs) {
      const auto more = std::min(left, most - least);
      weights += cost * (least + more);
      left -= more;
    }
    return weights;
  };
  std::sort(costs.begin(), costs.end());
  const auto low = filled();
  std::reverse(costs.begin(), costs.end());
  return {low, filled()};
}

template <class Piece>
std::vector<int64_t> costs(const std::vector<std::shared_ptr<Piece>>& layers) {
  std::vector<int64_t> result;
  for (const auto& layer : layers) {
    const auto& shape = layer->site().weight_shape;
    result.push_back(shape[0] + shape[1] + 1);
  }
  return result;
}

}  // namespace

TEST_CASE("DeBERTaV3-base has its published size", "[counts]") {
  int64_t total = 0;
  auto model = deberta_v3_base();
  for (const auto& parameter : model->base_model->parameters()) total += parameter.numel();
  CHECK(total == 183'831'552);  // 86 M in the blocks, 98 M in the vocabulary
}

TEST_CASE("Fixed methods train as many weights of DeBERTaV3-base as published", "[counts]") {
  // A bottleneck of m channels: 768 m + m + m 768 + 768; 24 of them, or 12.
  const auto houlsby = [](int64_t size) { return count(peft::houlsby().size(size)); };
  const auto pfeiffer = [](int64_t size) { return count(peft::pfeiffer().size(size)); };
  CHECK(houlsby(16) == 24 * (1537 * 16 + 768));
  CHECK(millions(houlsby(16)) == 0.61);
  CHECK(millions(houlsby(8)) == 0.31);
  CHECK(millions(pfeiffer(32)) == 0.60);
  CHECK(millions(pfeiffer(16)) == 0.30);
  // No number of channels gives 1.22, which is twice 0.61: 32 give 1.20, 33 give 1.24.
  CHECK(millions(houlsby(32)) == 1.20);
  CHECK(millions(houlsby(33)) == 1.24);
  CHECK(millions(2 * houlsby(16)) == 1.22);
  // None gives 1.18: 63 give 1.17, 64 give 1.19; 64 without biases have it.
  CHECK(millions(pfeiffer(63)) == 1.17);
  CHECK(millions(pfeiffer(64)) == 1.19);
  CHECK(millions(pfeiffer(64) - 12 * (64 + 768)) == 1.18);

  // 12 layers of 4 matrices 768 × 768 and 2 of 768 × 3072.
  CHECK(count(peft::LoraOptions(8), every_matrix()) == 12 * (4 * 1536 + 2 * 3840) * 8);
  CHECK(millions(count(peft::LoraOptions(8), every_matrix())) == 1.33);
  CHECK(millions(count(peft::LoraOptions(2), every_matrix())) == 0.33);

  // 7 biases of 768 and one of 3072 a layer, and those of the two norms before the blocks.
  const auto encoder = peft::all().exclude({"pooler.dense", "classifier"});
  CHECK(count(peft::BiasOptions(), encoder) == 12 * (7 * 768 + 3072) + 2 * 768);
  CHECK(millions(count(peft::BiasOptions(), encoder)) == 0.10);
}

TEST_CASE("AdaLoRA's budget on DeBERTaV3-base allows the published counts", "[counts]") {
  const auto check = [](int64_t initial, int64_t target, double published) {
    auto model = deberta_v3_base();
    const auto options =
        peft::AdaLoraOptions(1000).init_rank(initial).target_rank(target).tinit(100).tfinal(300);
    const auto adapter = peft::add_adapter(*model, options, every_matrix());
    const auto layers = adapter.layers<peft::AdaLoraImpl>();
    REQUIRE(layers.size() == 72);
    const peft::RankAllocator allocator(options, layers);
    CHECK(allocator.budget(0).first == 72 * initial);
    CHECK(allocator.budget(1000).first == 72 * target);
    CHECK(adapter.count() == 12 * (4 * 1537 + 2 * 3841) * initial);
    const auto [least, most] = range(costs(layers), 72 * target, 0, initial);
    CHECK(millions(least) <= published);
    CHECK(millions(most) >= published);
  };
  check(12, 8, 1.27);  // 0.89 to 1.55
  check(3, 2, 0.32);   // 0.22 to 0.39
}

TEST_CASE("IncreLoRA's budget on DeBERTaV3-base allows the published counts", "[counts]") {
  const auto check = [](int64_t target, double published) {
    auto model = deberta_v3_base();
    const peft::IncreLoraOptions options(target);
    const auto adapter = peft::add_adapter(*model, options, every_matrix());
    const auto layers = adapter.layers<peft::IncreLoraImpl>();
    REQUIRE(layers.size() == 72);
    const peft::RankGrower grower(options, layers);
    CHECK(grower.total_rank() == 72);
    CHECK(grower.target() == 72 * target);
    const auto [least, most] = range(costs(layers), 72 * target, 1, 768);
    CHECK(millions(least) <= published);
    CHECK(millions(most) >= published);
  };
  check(8, 1.33);  // 0.94 to 2.10
  check(2, 0.34);  // 0.28 to 0.44
}
