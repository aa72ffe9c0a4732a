// A program around model/reparametrized.h, driven by tests/reference/compare_reparametrized.py.
//
//   reparametrized_tool FOLDER…
//
// Each folder has base.safetensors, inputs.safetensors (x, target), config.json (the base's "kind", "encoder"
// with "width", "heads", "hidden" and "layers" or "net"; "steps") and adapter/. It loads the
// adapter and leaves outputs.safetensors (adapted, merged, trained and losses, those of "steps" steps of SGD)
// and the adapter written again, at once as again/ and with what the steps left as trained/.
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/transformercoder.h>
#include <torch/nn/modules/transformerlayer.h>
#include <torch/optim/sgd.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "peft/io/peft_directory.h"
#include "peft/model/merge.h"
#include "peft/model/reparametrized.h"

namespace {

namespace nn = torch::nn;
using torch::Tensor;

/// A class of somebody's own.
struct NetImpl : nn::Module {
  Tensor forward(const Tensor& ids) {
    auto x = norm(words(ids));
    x = x + fc2(torch::tanh(fc1(x)));
    x = conv(x.transpose(1, 2)).transpose(1, 2);
    return mlp->forward(torch::matmul(std::get<0>(lstm(x)), gate));
  }
  nn::Embedding words = register_module("words", nn::Embedding(11, 6));
  nn::LayerNorm norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({6})));
  nn::Linear fc1 = register_module("fc1", nn::Linear(6, 9)), fc2 = register_module("fc2", nn::Linear(9, 6));
  nn::Conv1d conv = register_module("conv", nn::Conv1d(nn::Conv1dOptions(6, 4, 3).padding(1)));
  nn::LSTM lstm = register_module("lstm", nn::LSTM(nn::LSTMOptions(4, 5).batch_first(true)));
  nn::Sequential mlp =
      register_module("mlp", nn::Sequential(nn::Linear(5, 7), nn::Functional(torch::tanh), nn::Linear(7, 3)));
  Tensor gate = register_parameter("gate", torch::zeros({5, 5}));
};
TORCH_MODULE(Net);

template <class Model>
void compare(const std::filesystem::path& folder, const nlohmann::json& config, Model model) {
  {
    const torch::NoGradGuard no_grad;
    const peft::SafetensorsFile base(folder / "base.safetensors");
    for (auto& item : model->named_parameters()) item.value().copy_(base.tensor(item.key()));
  }
  const peft::SafetensorsFile inputs(folder / "inputs.safetensors");
  const auto x = inputs.tensor("x"), target = inputs.tensor("target");
  const auto adapter = peft::load_adapter(*model, folder / "adapter", "default", /*trainable=*/true);
  for (const auto& note : peft::save_adapter(adapter, folder / "again")) std::cout << note << '\n';
  model->check_on_path(x);
  std::map<std::string, Tensor> outputs{{"adapted", model(x).detach()}};
  peft::merge(*model);
  outputs["merged"] = model(x).detach();
  peft::unmerge(*model);
  torch::optim::SGD optimizer(adapter.parameters(), torch::optim::SGDOptions(0.05));
  std::vector<double> losses;
  for (int step = 0; step < config.at("steps"); ++step) {
    optimizer.zero_grad();
    const auto loss = nn::functional::mse_loss(model(x), target);
    loss.backward();
    optimizer.step();
    losses.push_back(loss.template item<double>());
  }
  outputs["losses"] = torch::tensor(losses, torch::kFloat64);
  outputs["trained"] = model(x).detach();
  peft::save_adapter(adapter, folder / "trained");
  peft::save_safetensors(folder / "outputs.safetensors", outputs);
}

}  // namespace

int main(int count, char** words) try {
  for (int i = 1; i < count; ++i) {
    const std::filesystem::path folder(words[i]);
    std::ifstream text(folder / "config.json");
    const auto config = nlohmann::json::parse(text);
    if (config.at("kind") == "net") {
      compare(folder, config, peft::Reparametrized(Net(), {peft::member("gate", &NetImpl::gate)}));
      continue;
    }
    const auto layer = nn::TransformerEncoderLayerOptions(config.at("width"), config.at("heads"))
                           .dim_feedforward(config.at("hidden"))
                           .dropout(0);
    compare(folder, config,
            peft::Reparametrized(
                nn::TransformerEncoder(nn::TransformerEncoderOptions(layer, config.at("layers")))));
  }
  return 0;
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << '\n';
  return 1;
}
