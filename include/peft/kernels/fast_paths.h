// FastPaths: whether methods may run in their fast forms.
#pragma once

namespace peft {

/// While one lives, methods on this thread use their fast forms (the default), or only the plain ones they
/// are defined by: the same results but for rounding and the numbers dropout draws, which in the plain forms
/// are torch's. For comparisons: tests, benchmarks, another library's draws. May be nested.
///
/// Example:
/// ```
/// const peft::FastPaths plain(false);
/// const auto expected = model->forward(inputs).logits;
/// ```
class FastPaths {
 public:
  explicit FastPaths(bool enabled) : before_(flag()) { flag() = enabled; }
  FastPaths(const FastPaths&) = delete;
  FastPaths& operator=(const FastPaths&) = delete;
  ~FastPaths() { flag() = before_; }

  static bool enabled() { return flag(); }

 private:
  static bool& flag() {
    static thread_local bool enabled = true;
    return enabled;
  }
  bool before_;
};

}  // namespace peft
