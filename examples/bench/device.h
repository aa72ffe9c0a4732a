// Device: where the work runs, its clock and its memory. CUDA is asked through LibTorch's own API, and only
// in a build against a LibTorch that has it.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <malloc.h>
#include <torch/cuda.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>

#if defined(PEFT_BENCH_CUDA) && __has_include(<cuda_runtime_api.h>) && __has_include(<ATen/cuda/CUDAEvent.h>)
#define PEFT_BENCH_HAS_CUDA 1
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#else
#define PEFT_BENCH_HAS_CUDA 0
#endif

namespace bench {

/// Seconds.
struct Times {
  double cpu = 0, wall = 0;
};

namespace internal {

/// What tensors took from the CPU's allocator while it was watched.
struct Allocations {
  int64_t count = 0, live = 0, peak = 0;  ///< blocks ever, bytes now, and the most bytes at one time
};

/// LibTorch's CPU allocator, counting. Its members override those of `c10::Allocator` in one version of
/// LibTorch or another, so none says `override`.
class CountingAllocator final : public c10::Allocator {
 public:
  static CountingAllocator& get() {
    static CountingAllocator allocator;
    return allocator;
  }

  c10::DataPtr allocate(size_t bytes) { return counted(bytes); }
  c10::DataPtr allocate(size_t bytes) const { return get().counted(bytes); }
  c10::DeleterFnPtr raw_deleter() const { return &CountingAllocator::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const { std::memcpy(to, from, bytes); }

  /// Begins to count; blocks from before no longer do.
  void begin() {
    const std::lock_guard lock(mutex_);
    sizes_.clear();
    total_ = {};
  }
  Allocations total() {
    const std::lock_guard lock(mutex_);
    return total_;
  }
  /// The peak is that of what follows.
  void forget_peak() {
    const std::lock_guard lock(mutex_);
    total_.peak = total_.live;
  }

 private:
  // What the default allocator gives is its own context, and some callers rely on that.
  c10::DataPtr counted(size_t bytes) {
    auto block = c10::GetDefaultCPUAllocator()->allocate(bytes);
    const auto device = block.device();
    void* data = block.release_context();
    const std::lock_guard lock(mutex_);
    sizes_[data] = static_cast<int64_t>(bytes);
    ++total_.count;
    total_.live += static_cast<int64_t>(bytes);
    total_.peak = std::max(total_.peak, total_.live);
    return {data, data, &CountingAllocator::free, device};
  }
  static void free(void* data) {
    auto& own = get();
    {
      const std::lock_guard lock(own.mutex_);
      const auto found = own.sizes_.find(data);
      if (found != own.sizes_.end()) {
        own.total_.live -= found->second;
        own.sizes_.erase(found);
      }
    }
    c10::GetDefaultCPUAllocator()->raw_deleter()(data);
  }

  std::mutex mutex_;
  std::unordered_map<void*, int64_t> sizes_;
  Allocations total_;
};

/// A figure of /proc/self/status in bytes, or -1.
inline double status_bytes(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key + ":")) return 1024 * std::stod(line.substr(key.size() + 1));
  }
  return -1;
}

}  // namespace internal

/// The CPU or a GPU.
class Device {
 public:
  /// Throws c10::Error for a device this build or machine does not have.
  explicit Device(const std::string& name) : device_(name == "cpu" ? torch::kCPU : torch::kCUDA) {
    if (device_.is_cpu()) return;
    TORCH_CHECK(PEFT_BENCH_HAS_CUDA,
                "--device cuda needs a LibTorch built for CUDA and its toolkit's headers, and "
                "this program was built with a CPU one (hint: --device cpu --tiny runs the same code)");
    TORCH_CHECK(torch::cuda::is_available(), "--device cuda: LibTorch finds no GPU on this machine");
  }

  const torch::Device& device() const { return device_; }
  bool is_cuda() const { return device_.is_cuda(); }
  void wait() const {
    if (is_cuda()) torch::cuda::synchronize();
  }

  /// Seconds between two events around the work, on a GPU; 0 on the CPU.
  double time(const std::function<void()>& work) const {
#if PEFT_BENCH_HAS_CUDA
    if (is_cuda()) {
      at::cuda::CUDAEvent begin(cudaEventDefault), end(cudaEventDefault);
      wait();
      begin.record();
      work();
      end.record();
      end.synchronize();
      return 1e-3 * static_cast<double>(begin.elapsed_time(end));
    }
#endif
    work();
    return 0;
  }

  /// Bytes of tensors that what `make` returns keeps alive: after a forward, those the graph saved for
  /// backward.
  double held_bytes(const std::function<torch::Tensor()>& make) const {
#if PEFT_BENCH_HAS_CUDA
    if (is_cuda()) {
      const auto allocated = [] {
        return static_cast<double>(
            c10::cuda::CUDACachingAllocator::getDeviceStats(c10::cuda::current_device())
                .allocated_bytes[0]
                .current);
      };
      const double before = allocated();
      const auto kept = make();
      return allocated() - before;
    }
#endif
    return static_cast<double>(count(make).live);
  }
  /// How many tensors the work allocates, on the CPU.
  static int64_t allocations(const std::function<void()>& work) {
    return count([&] {
             work();
             return torch::Tensor();
           })
        .count;
  }

  /// The peak of the memory that `step` needs beyond what was there before, in bytes; -1: the system does not
  /// tell.
  double peak_bytes(const std::function<void()>& step) const {
#if PEFT_BENCH_HAS_CUDA
    if (is_cuda()) {
      const auto index = c10::cuda::current_device();
      const auto stats = [index] {
        return c10::cuda::CUDACachingAllocator::getDeviceStats(index).allocated_bytes[0];
      };
      const auto before = stats().current;
      c10::cuda::CUDACachingAllocator::resetPeakStats(index);
      step();
      wait();
      return static_cast<double>(stats().peak - before);
    }
#endif
    malloc_trim(0);
    if (!std::ofstream("/proc/self/clear_refs").put('5').flush()) return -1;  // forgets the peak so far
    const double before = internal::status_bytes("VmRSS");
    step();
    const double peak = internal::status_bytes("VmHWM");
    return before < 0 || peak < 0 ? -1 : std::max(0.0, peak - before);
  }

 private:
  static internal::Allocations count(const std::function<torch::Tensor()>& make) {
    constexpr uint8_t top = 255;  // priority
    struct Restore {
      c10::Allocator* before = c10::GetCPUAllocator();
      ~Restore() { c10::SetCPUAllocator(before, top); }
    };
    auto& counting = internal::CountingAllocator::get();
    const Restore restore;
    counting.begin();
    c10::SetCPUAllocator(&counting, top);
    const auto kept = make();
    const auto result = counting.total();
    return result;
  }

  torch::Device device_;
};

}  // namespace bench
