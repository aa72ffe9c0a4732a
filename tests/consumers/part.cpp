// A user's program that includes parts of the library by name.
#include <peft/io/safetensors.h>
#include <peft/methods/lora.h>

#include <iostream>

int main() {
  check(peft::LoraOptions(2));
  const auto x = torch::ones({2, 3});
  const nlohmann::json sum = x.sum().item<double>();
  std::cout << "sum on LibTorch: " << sum << '\n';
  return sum == 6.0 ? 0 : 1;
}
