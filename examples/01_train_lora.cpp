#include <peft/peft.h>
#include <torch/torch.h>

#include <iostream>

struct NetImpl : torch::nn::Module {
  peft::Linear hidden = register_module("hidden", peft::Linear(16, 32));  // where you wrote nn::Linear
  peft::Linear head = register_module("head", peft::Linear(32, 2));
  torch::Tensor forward(const torch::Tensor& x) { return head(torch::relu(hidden(x))); }
};
TORCH_MODULE(Net);

int main() {
  Net model;  // in earnest: torch::load(model, "pretrained.pt")
  auto adapter = peft::add_adapter(*model, peft::LoraOptions(4).alpha(8), peft::named({"hidden"}), "task");
  peft::train_also(adapter, *model, peft::named({"head"}));

  const auto x = torch::randn({256, 16}), y = (x.sum(1) > 0).to(torch::kLong);
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(2e-2));
  for (int step = 0; step < 100; ++step) {
    const auto loss = torch::cross_entropy_loss(model(x), y);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }
  std::cout << peft::summary(*model).text << "accuracy "
            << (model(x).argmax(1) == y).to(torch::kFloat).mean().item<float>() << "\n";
  peft::save_adapter(adapter, "task_adapter");  // a folder that Python PEFT loads
  peft::merge(*model);                          // W + s·BA: as fast as the plain model; unmerge() undoes it
}
