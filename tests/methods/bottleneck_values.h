// What tests/reference/bottleneck_values.py prints, and the join it is compared with.
#pragma once

#include <string>
#include <vector>

#include "methods/reference_case.h"
#include "peft/methods/bottleneck.h"

namespace suite {

struct JoinReference {
  std::vector<double> start, first, trained;
};

/// A bottleneck at a join of width 4: its tensors after manual_seed(3), what the join gives on fixed tensors,
/// and, in float64, what it gives after three steps of AdamW on the mean of its square.
template <class Site>
void check_join(const std::string& name, Site site, const peft::BottleneckOptions& options,
                const JoinReference& reference) {
  INFO(name);
  if constexpr (std::is_same_v<Site, peft::Residual>) {
    assign(site->base->weight, 1 + fill({4}, 4));
    assign(site->base->bias, fill({4}, 9));
  }
  torch::manual_seed(3);
  const auto adapter = peft::add_adapter(*site, options, peft::all());
  const auto start = flat(sorted_parameters(adapter));
  REQUIRE(start.numel() == static_cast<int64_t>(reference.start.size()));
  CHECK(torch::equal(start, torch::tensor(reference.start, torch::kFloat32)));
  const auto output = fill({1, 2, 4}, 3).to(torch::kFloat32), skip = fill({1, 2, 4}, 20).to(torch::kFloat32);
  CHECK(distance(site->forward(output, skip), reference.first) < 1e-6);
  site->to(torch::kFloat64);
  const auto wide_output = output.to(torch::kFloat64), wide_skip = skip.to(torch::kFloat64);
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    site->forward(wide_output, wide_skip).square().mean().backward();
    optimizer.step();
  }
  CHECK(distance(site->forward(wide_output, wide_skip), reference.trained) < 1e-9);
}

inline peft::Residual residual() { return peft::Residual(nn::LayerNormOptions({4})); }

}  // namespace suite
