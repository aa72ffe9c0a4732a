// Peer: the Python process that runs Hugging Face's PEFT on the same LibTorch, driven over two pipes: a JSON
// object a line each way. peer.py is the other side.
#pragma once

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/device.h"

namespace bench {

/// A child process that answers. It waits for a line while this process works, and the other way round: the
/// two never compute at once.
class Peer {
 public:
  /// Starts `python script arguments…`; `variables`: NAME=value, put into its environment.
  Peer(const std::string& python, const std::string& script, const std::vector<std::string>& arguments,
       const std::vector<std::string>& variables) {
    std::array<int, 2> to{}, from{};
    TORCH_CHECK(pipe2(to.data(), O_CLOEXEC) == 0 && pipe2(from.data(), O_CLOEXEC) == 0,
                "a pipe cannot be made: ", std::strerror(errno));
    std::signal(SIGPIPE, SIG_IGN);
    child_ = fork();
    TORCH_CHECK(child_ >= 0, "a process cannot be started: ", std::strerror(errno));
    if (child_ == 0) {
      dup2(to[0], STDIN_FILENO);
      dup2(from[1], STDOUT_FILENO);
      for (const auto& variable : variables) putenv(const_cast<char*>(variable.c_str()));
      std::vector<char*> line{const_cast<char*>(python.c_str()), const_cast<char*>(script.c_str())};
      for (const auto& argument : arguments) line.push_back(const_cast<char*>(argument.c_str()));
      line.push_back(nullptr);
      execvp(python.c_str(), line.data());
      std::perror(python.c_str());
      _exit(127);
    }
    close(to[0]);
    close(from[1]);
    write_ = to[1];
    read_ = fdopen(from[0], "r");
  }
  ~Peer() {
    close(write_);
    std::fclose(read_);
    waitpid(child_, nullptr, 0);
  }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  /// The first line: which versions it has. Throws c10::Error if it did not come up.
  nlohmann::json hello() { return answer(); }

  nlohmann::json ask(const nlohmann::json& question) {
    const auto line = question.dump() + "\n";
    size_t written = 0;
    while (written < line.size()) {
      const auto count = write(write_, line.data() + written, line.size() - written);
      TORCH_CHECK(count > 0, "the Python process has ended");
      written += static_cast<size_t>(count);
    }
    return answer();
  }

  /// Seconds for `count` steps of a variant of the case prepared last.
  Times run(const std::string& variant, int64_t count) {
    const auto reply = ask({{"do", "run"}, {"variant", variant}, {"count", count}});
    return {reply.at("cpu").get<double>(), reply.at("wall").get<double>()};
  }

 private:
  nlohmann::json answer() {
    char* line = nullptr;
    size_t capacity = 0;
    const auto length = getline(&line, &capacity, read_);
    const std::string text(line ? line : "", length > 0 ? static_cast<size_t>(length) : 0);
    std::free(line);
    TORCH_CHECK(length > 0,
                "the Python process has ended (hint: its own words are above; --no-python does without)");
    auto reply = nlohmann::json::parse(text);
    TORCH_CHECK(!reply.contains("error"), "Python: ", reply.value("error", ""));
    return reply;
  }

  pid_t child_ = -1;
  int write_ = -1;
  std::FILE* read_ = nullptr;
};

}  // namespace bench
