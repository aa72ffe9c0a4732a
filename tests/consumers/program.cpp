// What a user's first program looks like: the project that uses the installed library builds and runs it,
// those that hold the library's sources a smaller one, part.cpp.
#include <peft/peft.h>

#include <iostream>

int main() {
  const auto x = torch::ones({2, 3});
  std::cout << "peft " << peft::version << " on LibTorch, sum " << x.sum().item<double>() << '\n';
  return x.sum().item<double>() == 6 ? 0 : 1;
}
