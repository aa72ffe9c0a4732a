// Child: work in a process of its own, whose memory is counted alone.
#pragma once

#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>

#include "progress.h"
#include "run_folder.h"

namespace finetune::internal {

/// Ctrl-C reaches parent and child alike; the child stops, and the parent tidies up.
class IgnoreSignals {
 public:
  IgnoreSignals() : interrupt_(std::signal(SIGINT, SIG_IGN)), terminate_(std::signal(SIGTERM, SIG_IGN)) {}
  ~IgnoreSignals() { restore(); }
  IgnoreSignals(const IgnoreSignals&) = delete;
  IgnoreSignals& operator=(const IgnoreSignals&) = delete;
  void restore() const {
    std::signal(SIGINT, interrupt_);
    std::signal(SIGTERM, terminate_);
  }

 private:
  void (*interrupt_)(int);
  void (*terminate_)(int);
};

/// Runs `work` in a process of its own, so that its memory is counted alone, and returns the text it gives.
/// `program` wraps it: prints what it throws and turns that into the exit status. The caller must not have
/// computed anything yet: a copy of a process has none of its threads.
inline std::string in_child(const std::function<std::string()>& work,
                            const std::function<int(const std::function<void()>&)>& program,
                            const std::string& name) {
  int ends[2];
  if (pipe(ends) != 0)
    throw std::runtime_error(fmt::format("no pipe: {}", std::generic_category().message(errno)));
  std::fflush(nullptr);
  const IgnoreSignals ignored;
  const auto child = fork();
  if (child < 0)
    throw std::runtime_error(fmt::format("no process: {}", std::generic_category().message(errno)));
  if (child == 0) {
    ignored.restore();
    close(ends[0]);
    const int status = program([&] {
      const auto text = work();
      for (size_t sent = 0; sent < text.size();) {
        const auto count = write(ends[1], text.data() + sent, text.size() - sent);
        if (count < 0 && errno != EINTR) throw std::runtime_error("the pipe to the main process broke");
        sent += count > 0 ? static_cast<size_t>(count) : 0;
      }
    });
    std::fflush(nullptr);
    _exit(status);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (;;) {
    const auto count = read(ends[0], buffer, sizeof buffer);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    text.append(buffer, static_cast<size_t>(count));
  }
  close(ends[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return text;
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (code == 128 + SIGINT || code == 128 + SIGTERM)
    throw Interrupted(code - 128, fmt::format("{} was stopped", name));
  if (WIFSIGNALED(status)) {
    throw std::runtime_error(fmt::format("{}: its process was killed by signal {}{}", name, WTERMSIG(status),
                                         WTERMSIG(status) == SIGKILL ? " (hint: out of memory?)" : ""));
  }
  throw std::runtime_error(fmt::format("{} failed (see above)", name));
}

}  // namespace finetune::internal
