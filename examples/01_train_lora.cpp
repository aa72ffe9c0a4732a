// Train a LoRA on a frozen model of your own, save it, merge it.
#include <peft/peft.h>
#include <torch/torch.h>

#include <filesystem>
#include <iostream>

struct NetImpl : torch::nn::Module {
  NetImpl() {
    hidden = register_module("hidden", peft::Linear(16, 32));  // where you wrote nn::Linear
    head = register_module("head", peft::Linear(32, 2));
  }
  torch::Tensor forward(const torch::Tensor& x) { return head->forward(torch::relu(hidden->forward(x))); }
  peft::Linear hidden{nullptr}, head{nullptr};
};
TORCH_MODULE(Net);

int main() {
  torch::manual_seed(0);
  Net model;  // in earnest: torch::load(model, "pretrained.pt")
  auto adapter = peft::add_adapter(*model, peft::LoraOptions(4).alpha(8).dropout(0.1), peft::named({"hidden"}), "task");
  peft::train_also(adapter, *model, peft::named({"head"}));
  std::cout << peft::summary(*model).text;

  const auto x = torch::randn({256, 16}), y = (x.sum(1) > 0).to(torch::kLong);
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(2e-2).weight_decay(0.01), /*max_grad_norm=*/1.0);
  peft::LinearSchedule schedule(optimizer, /*warmup=*/10, /*total=*/200);
  for (int step = 0; step < 200; ++step) {
    const auto loss = torch::cross_entropy_loss(model->forward(x), y);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    schedule.step();
  }
  model->eval();
  const auto adapted = model->forward(x);
  std::cout << "accuracy " << (adapted.argmax(1) == y).to(torch::kFloat).mean().item<float>() << "\n";

  const auto folder = std::filesystem::temp_directory_path() / "peft_example";
  peft::save_adapter(adapter, folder);  // adapter_config.json + adapter_model.safetensors, as Python PEFT writes them
  peft::merge(*model);                  // now as fast as the plain model; unmerge() undoes it bit for bit
  std::cout << "merged differs by " << (model->forward(x) - adapted).abs().max().item<float>() << "\n";
  std::filesystem::remove_all(folder);
}
