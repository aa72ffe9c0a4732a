// Trains what a list of jobs on standard input says and writes a list of traces, driven by
// tests/reference/compare_increlora.py.
#include <iostream>

#include "train/increlora_trace.h"

int main(int /*count*/, char** /*words*/) {
  auto traces = nlohmann::json::array();
  for (const auto& job : nlohmann::json::parse(std::cin)) traces.push_back(increlora::trace(job));
  std::cout << traces.dump() << '\n';
  return 0;
}
