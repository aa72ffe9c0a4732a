// What the tests that compare with lists of numbers of the reference have in common.
#pragma once

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "io/temporary_folder.h"
#include "methods/reference_case.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_formats.h"

namespace suite {

inline void check_values(const Tensor& tensor, const std::vector<double>& expected, double tolerance = 1e-9) {
  const auto values = tensor.detach().to(torch::kFloat64).contiguous().view(-1);
  REQUIRE(values.numel() == static_cast<int64_t>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) {
    INFO("element " << i);
    CHECK_THAT(values[static_cast<int64_t>(i)].item<double>(), WithinAbs(expected[i], tolerance));
  }
}

/// 12 steps of AdamW on an adapter; the last loss.
inline Tensor twelve_steps(const peft::Adapter& adapter, const std::function<Tensor()>& loss) {
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01));
  Tensor last;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    last = loss();
    last.backward();
    optimizer.step();
  }
  return last;
}

/// Writes an adapter, reads it into another model and returns the config between them.
inline nlohmann::json through_files(const peft::Adapter& adapter, nn::Module& other) {
  const peft_test::TemporaryFolder folder;
  peft::save_adapter(adapter, folder / "adapter");
  peft::load_adapter(other, folder / "adapter");
  return nlohmann::json::parse(std::ifstream(folder / "adapter" / "adapter_config.json"));
}

/// Reading an adapter whose config was changed on disk.
inline void load_changed(const peft::Adapter& adapter, nn::Module& other,
                         const std::function<void(nlohmann::json&)>& change) {
  const peft_test::TemporaryFolder folder;
  peft::save_adapter(adapter, folder / "adapter");
  const auto path = folder / "adapter" / "adapter_config.json";
  auto config = nlohmann::json::parse(std::ifstream(path));
  change(config);
  std::ofstream(path) << config;
  peft::load_adapter(other, folder / "adapter");
}

}  // namespace suite
