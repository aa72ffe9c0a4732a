// What a user's first program looks like: the consumer projects build and run it.
#include <peft/peft.h>

#include <iostream>

int main() {
  const auto x = torch::ones({2, 3});
  std::cout << "peft " << peft::version << " on LibTorch, sum " << x.sum().item<double>() << '\n';
  return x.sum().item<double>() == 6 ? 0 : 1;
}
