// Several adapters on one model: switch, disable, mix in one batch, copy.
#include <peft/peft.h>
#include <torch/torch.h>

#include <iostream>

namespace {

double difference(const torch::Tensor& a, const torch::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

}  // namespace

int main() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(8, 8), torch::nn::Tanh(), torch::nn::Linear(8, 4));
  const auto x = torch::randn({3, 8});
  const auto plain = model->forward(x);

  // Layers of a Sequential become sites by themselves; members of your own classes are declared peft::Linear.
  const auto options =
      peft::LoraOptions(2).init(peft::LoraInit::random);  // a random start, so that we see something
  peft::add_adapter(*model, options, peft::all(), "german");
  peft::add_adapter(*model, options, peft::named({"2"}), "french");
  model->eval();

  peft::set_active(*model, {"german"});
  const auto german = model->forward(x);
  peft::set_active(*model, {"french"});
  const auto french = model->forward(x);
  peft::set_active(*model, {"german", "french"});
  std::cout << "german changes the output by " << difference(german, plain) << ", french by "
            << difference(french, plain) << ", both by " << difference(model->forward(x), plain) << "\n";
  {
    const auto off = peft::disabled(*model);
    std::cout << "disabled: differs from the plain model by " << difference(model->forward(x), plain) << "\n";
  }
  {
    const peft::RowAdapters rows({"german", "__base__", "french"});
    const auto mixed = model->forward(x);
    std::cout << "one batch, three adapters: rows differ by " << difference(mixed[0], german[0]) << ", "
              << difference(mixed[1], plain[1]) << ", " << difference(mixed[2], french[2]) << "\n";
  }
  const auto copy = peft::clone(*model);
  peft::remove_adapter(*model, "german");
  std::cout << "the copy still has:";
  for (const auto& name : peft::active_adapters(*copy)) std::cout << " " << name;
  std::cout << "\n";
}
