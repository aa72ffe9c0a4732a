// BuildRows: set C8, what the compiler takes for a file that includes the library.
#pragma once

#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "bench/session.h"

namespace bench {

namespace internal {

/// The compiler and the flags this program was built with: a line each, written by CMake.
inline std::vector<std::string> compiler_line() {
  std::ifstream file(PEFT_BENCH_BUILD_FLAGS);
  std::vector<std::string> words;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty()) words.push_back(line);
  }
  TORCH_CHECK(!words.empty(), PEFT_BENCH_BUILD_FLAGS, " must name the compiler and the include folders");
  return words;
}

struct Compilation {
  double user_seconds = 0, wall = 0, peak_bytes = 0;
};

/// Compiles a file; what it took is the compiler's user time, children included.
inline Compilation compile(const std::vector<std::string>& words) {
  std::vector<char*> line;
  for (const auto& word : words) line.push_back(const_cast<char*>(word.c_str()));
  line.push_back(nullptr);
  const double begin = wall_clock();
  rusage before{}, after{};
  getrusage(RUSAGE_CHILDREN, &before);
  const auto child = fork();
  TORCH_CHECK(child >= 0, "a process cannot be started");
  if (child == 0) {
    execvp(line[0], line.data());
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  getrusage(RUSAGE_CHILDREN, &after);
  TORCH_CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the compiler failed: ", c10::Join(" ", words));
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  // The peak is that of the largest child so far; the files are compiled in the order of their size.
  return {seconds(after.ru_utime) - seconds(before.ru_utime), wall_clock() - begin,
          1024.0 * static_cast<double>(after.ru_maxrss)};
}

}  // namespace internal

/// A file with `torch/torch.h` alone, and one with `peft/peft.h` too, compiled in turn.
inline void measure_build(Session& session, Row& row, const std::string& level) {
  const auto flags = internal::compiler_line();
  const std::vector<std::pair<std::string, std::string>> sources{
      {"torch/torch.h", "#include <torch/torch.h>\n"},
      {"ours", "#include <torch/torch.h>\n#include <peft/peft.h>\n"}};
  const int rounds = session.tiny ? 1 : session.quick ? 2 : 3;
  std::vector<std::vector<internal::Compilation>> taken(sources.size());
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < sources.size(); ++i) {
      const auto source = session.scratch.path() / "unit.cpp", object = session.scratch.path() / "unit.o";
      // Without tests of speed, any header shows that the row works.
      std::ofstream(source) << (session.tiny ? "#include <peft/version.h>\n" : sources[i].second)
                            << "int main() {}\n";
      auto words = flags;
      words.insert(words.end(), {level, "-c", source.string(), "-o", object.string()});
      taken[i].push_back(internal::compile(words));
      row.facts[sources[i].first + ", peak bytes"] = taken[i].back().peak_bytes;
    }
  }
  row.base = "torch/torch.h";
  row.rounds = rounds;
  std::vector<double> excess;
  for (size_t i = 0; i < sources.size(); ++i) {
    std::vector<double> user, wall, ratios;
    for (size_t round = 0; round < taken[i].size(); ++round) {
      user.push_back(taken[i][round].user_seconds);
      wall.push_back(taken[i][round].wall);
      ratios.push_back(user.back() / std::max(taken[0][round].user_seconds, 1e-9));
      if (i == 1) excess.push_back(user.back() - taken[0][round].user_seconds);
    }
    row.variants.push_back({sources[i].first, quantile(user, 0.5), quantile(wall, 0.5), quantile(ratios, 0.5),
                            quantile(ratios, 0.25), quantile(ratios, 0.75)});
  }
  row.facts["seconds over torch/torch.h"] = quantile(excess, 0.5);
}

/// Set C8. Not part of --quick: two files of 20 s and more, twice.
inline void add_build_rows(Plans& plans) {
  for (const std::string level : {"-O0", "-O2"}) {
    plans.push_back({"C8", "the umbrella header, " + level, false,
                     [=](Session& session, Row& row) { measure_build(session, row, level); }});
  }
}

}  // namespace bench
