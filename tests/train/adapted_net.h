// AdaptedNet: a small model with an adapter, for the tests of training.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapted.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"

/// Three adapted layers in a row; the last is used on request only, so that its tensors may go without
/// gradient.
struct AdaptedNetImpl : torch::nn::Module {
  AdaptedNetImpl() {
    query = register_module("query", peft::Linear(6, 5));
    key = register_module("key", peft::Linear(6, 5));
    value = register_module("value", peft::Linear(5, 3));
  }
  torch::Tensor forward(const torch::Tensor& x, bool all = true) {
    const auto h = torch::tanh(query(x)) + torch::tanh(key(x));
    return all ? value(h) : h;
  }
  peft::Linear query{nullptr}, key{nullptr}, value{nullptr};
};
TORCH_MODULE(AdaptedNet);

inline std::pair<AdaptedNet, peft::Adapter> adapted_net(uint64_t seed = 1, double dropout = 0) {
  torch::manual_seed(seed);
  AdaptedNet net;
  auto adapter = peft::add_adapter(*net, peft::LoraOptions(2).dropout(dropout).init(peft::LoraInit::random),
                                   peft::named({"query", "key", "value"}), "tuned");
  return {net, adapter};
}

/// Largest absolute difference over lists of tensors.
inline double difference(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  double most = a.size() == b.size() ? 0 : 1e300;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    most = std::max(
        most,
        (a[i].detach().to(torch::kDouble) - b[i].detach().to(torch::kDouble)).abs().max().item<double>());
  }
  return most;
}

inline std::vector<torch::Tensor> copies(const std::vector<torch::Tensor>& tensors) {
  std::vector<torch::Tensor> result;
  for (const auto& tensor : tensors) result.push_back(tensor.detach().clone());
  return result;
}
