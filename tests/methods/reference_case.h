// One adapted layer against Hugging Face PEFT: the scripts in tests/reference compute the same, step by step.
#pragma once

#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/temporary_folder.h"
#include "peft/io/peft_directory.h"
#include "peft/io/peft_formats.h"
#include "property_suite.h"

namespace suite {

inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (const auto size : sizes) result *= size;
  return result;
}

/// Element i is ((((i + k) · 37) mod 101) − 50) / 100.
inline Tensor fill(std::vector<int64_t> shape, int64_t k) {
  std::vector<double> values(static_cast<size_t>(product(shape)));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(((static_cast<int64_t>(i) + k) * 37) % 101 - 50) / 100.0;
  }
  return torch::tensor(values, torch::kFloat64).view(shape);
}

inline Tensor flat(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> rows;
  for (const auto& tensor : tensors) rows.push_back(tensor.detach().reshape(-1));
  return torch::cat(rows);
}

/// The largest difference from a list of numbers.
inline double distance(const Tensor& tensor, const std::vector<double>& expected) {
  const auto values = flat({tensor}).to(torch::kFloat64);
  REQUIRE(values.numel() == static_cast<int64_t>(expected.size()));
  return (values - torch::tensor(expected, torch::kFloat64)).abs().max().item<double>();
}

inline void assign(const Tensor& tensor, const Tensor& value) {
  torch::NoGradGuard no_grad;
  Tensor(tensor).copy_(value.reshape(tensor.sizes()));
}

/// The trained tensors in the order of their names.
inline std::vector<Tensor> sorted_parameters(const peft::Adapter& adapter) {
  std::map<std::string, Tensor> sorted;
  for (const auto& [name, tensor] : adapter.named_parameters()) sorted.emplace(name, tensor);
  std::vector<Tensor> tensors;
  for (const auto& [name, tensor] : sorted) tensors.push_back(tensor);
  return tensors;
}

/// What `layer_case` of tests/reference/lycoris_values.py prints.
struct Reference {
  std::vector<double> start, output, gradients, losses, merged;
};

/// Adapts a layer as `layer_case` does and compares: the start from seed 0 bit for bit, the rest in double
/// precision, the losses and the merged weight to ten tolerances.
template <class Site, class Options>
void check_reference(const std::string& name, const std::function<Site()>& make, const Options& options,
                     Tensor x, const Reference& reference, double tolerance = 1e-9) {
  INFO(name);
  const auto filled = [&](torch::ScalarType dtype) {
    auto site = make();
    site->to(dtype);
    assign(site->base->weight, fill(site->base->weight.sizes().vec(), 1));
    if constexpr (requires { site->base->bias; }) {
      if (site->base->bias.defined()) assign(site->base->bias, fill(site->base->bias.sizes().vec(), 2));
    }
    torch::manual_seed(0);
    return site;
  };
  {
    auto site = filled(torch::kFloat32);
    const auto start = flat(sorted_parameters(peft::add_adapter(*site, options, peft::all())));
    REQUIRE(start.numel() == static_cast<int64_t>(reference.start.size()));
    CHECK(torch::equal(start, torch::tensor(reference.start, torch::kFloat32)));
  }
  auto site = filled(torch::kFloat64);
  const auto adapter = peft::add_adapter(*site, options, peft::all());
  auto parameters = sorted_parameters(adapter);
  for (size_t k = 0; k < parameters.size(); ++k) {
    assign(parameters[k], fill(parameters[k].sizes().vec(), static_cast<int64_t>(k) + 3));
  }
  const bool tokens = !x.is_floating_point();
  if (!tokens) x.requires_grad_(true);
  torch::manual_seed(1);
  const auto y = site->forward(x);
  CHECK(distance(y, reference.output) < tolerance);
  (y * fill(y.sizes().vec(), 6)).sum().backward();
  std::vector<Tensor> gradients;
  for (const auto& parameter : parameters) gradients.push_back(parameter.grad().clone());
  if (!tokens) gradients.push_back(x.grad());
  CHECK(distance(flat(gradients), reference.gradients) < tolerance);

  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(0.05).weight_decay(0.01));
  std::vector<Tensor> losses;
  for (int step = 0; step < 12; ++step) {
    optimizer.zero_grad();
    const auto loss = site->forward(x.detach()).square().mean();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.detach());
  }
  CHECK(distance(torch::stack(losses), reference.losses) < 10 * tolerance);
  site->eval();
  const auto adapted = site->forward(x.detach()).detach();
  peft::merge(*site);
  CHECK(distance(site->base->weight, reference.merged) < 10 * tolerance);
  CHECK(largest(site->forward(x.detach()).detach(), adapted) < 1e-12);
}

/// Writes an adapter of two linear layers in Hugging Face PEFT's format and reads it into another model of
/// the same weights: same tensors, same outputs, same config when written again. Returns the config.
template <class Options>
nlohmann::json check_files(const Options& options) {
  const auto make = [] {
    torch::manual_seed(1);
    return nn::Sequential({{"fc", nn::Linear(6, 4)}, {"out", nn::Linear(4, 6)}});
  };
  const auto config = [](const std::filesystem::path& folder) {
    std::ifstream file(folder / "adapter_config.json");
    return nlohmann::json::parse(file);
  };
  auto model = make(), other = make();
  const auto adapter = peft::add_adapter(*model, options, peft::named({"fc", "out"}));
  shake(adapter);
  const peft_test::TemporaryFolder folder;
  peft::save_adapter(adapter, folder / "first");
  const auto loaded = peft::load_adapter(*other, folder / "first");
  const auto given = adapter.named_tensors(), read = loaded.named_tensors();
  REQUIRE(given.size() == read.size());
  for (size_t i = 0; i < given.size(); ++i) {
    CHECK(given[i].first == read[i].first);
    CHECK(torch::equal(given[i].second, read[i].second));
    CHECK_FALSE(read[i].second.requires_grad());
  }
  model->eval();
  other->eval();
  const auto x = torch::randn({3, 6});
  CHECK(torch::equal(model->forward(x), other->forward(x)));
  peft::save_adapter(loaded, folder / "second");
  CHECK(config(folder / "first") == config(folder / "second"));
  return config(folder / "first");
}

}  // namespace suite
