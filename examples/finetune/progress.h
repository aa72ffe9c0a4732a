// Progress: how far a training run has come, for people, on stderr.
#pragma once

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace finetune {

/// A duration as a clock shows it: "0:07", "12:30", "1:02:03".
inline std::string clock_time(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto whole = static_cast<std::int64_t>(std::llround(std::min(seconds, 1e9)));
  const std::int64_t hours = whole / 3600;
  const std::int64_t minutes = whole / 60 % 60;
  if (hours > 0) return fmt::format("{}:{:02}:{:02}", hours, minutes, whole % 60);
  return fmt::format("{}:{:02}", minutes, whole % 60);
}

/// The state of a run: on a terminal one line that is rewritten (bar, loss, speed, time left), elsewhere a
/// plain line about every twentieth of the way.
class Progress {
 public:
  /// total: steps in all, those before a resume included. terminal: whether `out` can rewrite a line.
  explicit Progress(std::int64_t total, bool terminal, std::FILE* out = stderr)
      : total_(total), terminal_(terminal), out_(out) {}

  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Reports that `done` steps are behind us.
  void step(std::int64_t done, double loss, double learning_rate) {
    if (first_ < 0) first_ = done - 1;
    // On a terminal the loss fades slowly, so that one can read it; a plain line has the mean since the last.
    shown_loss_ = losses_ == 0 ? loss : terminal_ ? 0.9 * shown_loss_ + 0.1 * loss : shown_loss_ + loss;
    ++losses_;
    const auto now = Clock::now();
    const bool last = done >= total_;
    if (terminal_) {
      if (!last && open_ && now - drawn_ < std::chrono::milliseconds(100)) return;
      drawn_ = now;
      draw(done, learning_rate, now);
      return;
    }
    const std::int64_t part = total_ > 0 ? done * 20 / total_ : done / 50;
    if (part == part_ && !last) return;
    part_ = part;
    shown_loss_ /= static_cast<double>(losses_);
    print(status(done, learning_rate, now) + "\n");
    losses_ = 0;
  }

  /// Prints a message on a line of its own.
  void line(const std::string& message) {
    print((open_ ? "\r\x1b[K" : "") + message + "\n");
    open_ = false;
  }

  /// Leaves the bar as it is and goes to a new line; nothing where none is open.
  void finish() {
    if (open_) print("\n");
    open_ = false;
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::string status(std::int64_t done, double learning_rate, Clock::time_point now) const {
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double speed = seconds > 0 ? static_cast<double>(done - first_) / seconds : 0;
    std::string text =
        fmt::format("step {}/{}  loss {:.4f}  lr {:.3g}", done, total_, shown_loss_, learning_rate);
    if (speed > 0) {
      text += fmt::format("  {:.{}f} steps/s", speed, speed < 10 ? 2 : 0);
      const double left = static_cast<double>(std::max<std::int64_t>(total_ - done, 0)) / speed;
      text += done < total_ ? "  " + clock_time(left) + " left" : "  took " + clock_time(seconds);
    }
    return text;
  }

  void draw(std::int64_t done, double learning_rate, Clock::time_point now) {
    const double part =
        total_ > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total_), 0.0, 1.0) : 0;
    std::string text = fmt::format(" {:3.0f}%  {}", std::floor(100 * part), status(done, learning_rate, now));
    const std::size_t columns = width();
    // A line that wraps could not be rewritten: the bar takes what room there is, up to 30 columns.
    if (columns > text.size() + 8) {
      const std::size_t room = std::min<std::size_t>(columns - text.size() - 3, 30);
      const auto filled = static_cast<std::size_t>(part * static_cast<double>(room));
      text = "[" + std::string(filled, '#') + std::string(room - filled, '.') + "]" + text;
    }
    if (text.size() >= columns) text.resize(columns - 1);
    print("\r" + text + "\x1b[K");
    open_ = true;
  }

  std::size_t width() const {
    winsize size{};
    const bool known = ioctl(fileno(out_), TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
    return known ? size.ws_col : 80;
  }

  void print(std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), out_);
    std::fflush(out_);
  }

  std::int64_t total_;
  bool terminal_;
  std::FILE* out_;
  bool open_ = false;        // the cursor stands behind a bar
  std::int64_t first_ = -1;  // steps done before we started to measure
  std::int64_t part_ = 0;    // the twentieth of the last plain line
  std::int64_t losses_ = 0;  // steps in shown_loss_
  double shown_loss_ = 0;
  Clock::time_point start_ = Clock::now();
  Clock::time_point drawn_;
};

}  // namespace finetune
