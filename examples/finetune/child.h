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

/// While it lives, Ctrl-C is left to the child, which it reaches too, and SIGTERM is passed on to it; the
/// parent tidies up.
class ChildSignals {
 public:
  ChildSignals() {
    child_ = 0;
    asked_ = 0;
    interrupt_ = std::signal(SIGINT, SIG_IGN);
    terminate_ = std::signal(SIGTERM, [](int number) {
      asked_ = number;
      if (child_ > 0) kill(child_, number);
    });
  }
  ~ChildSignals() { restore(); }
  ChildSignals(const ChildSignals&) = delete;
  ChildSignals& operator=(const ChildSignals&) = delete;

  void set_child(pid_t child) const {
    child_ = child;
    if (asked_ != 0) kill(child, asked_);
  }
  /// The SIGTERM that came, or 0.
  static int asked() { return asked_; }
  /// In the child: as before.
  void restore() const {
    std::signal(SIGINT, interrupt_);
    std::signal(SIGTERM, terminate_);
  }

 private:
  static inline volatile std::sig_atomic_t child_ = 0, asked_ = 0;
  void (*interrupt_)(int);
  void (*terminate_)(int);
};

/// Waits for a child to end, as the shell does: its exit status, or 128 and the signal that ended it.
inline int wait_for(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/// Throws: Interrupted where a child's status says that the user stopped it.
inline void check_stopped(int status, const std::string& name) {
  if (status == 128 + SIGINT || status == 128 + SIGTERM)
    throw Interrupted(status - 128, fmt::format("{} was stopped", name));
}

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
  const ChildSignals signals;
  const auto child = fork();
  if (child < 0)
    throw std::runtime_error(fmt::format("no process: {}", std::generic_category().message(errno)));
  if (child == 0) {
    signals.restore();
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
  signals.set_child(child);
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
  const int status = wait_for(child);
  // Asked between the child's last act and its end, it knew nothing of it.
  check_stopped(ChildSignals::asked() != 0 ? 128 + ChildSignals::asked() : status, name);
  if (status == 0) return text;
  if (status > 128) {
    throw std::runtime_error(fmt::format("{}: its process was killed by signal {}{}", name, status - 128,
                                         status == 128 + SIGKILL ? " (hint: out of memory?)" : ""));
  }
  throw std::runtime_error(fmt::format("{} failed (see above)", name));
}

}  // namespace finetune::internal
