// Session: what the rows of a run share, and what a row is made of.
#pragma once

#include <peft/peft.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "bench/device.h"
#include "bench/measure.h"
#include "bench/peer.h"

namespace bench {

using peft::Tensor;
namespace nn = torch::nn;

/// A folder that goes with its owner.
class ScratchFolder {
 public:
  ScratchFolder() {
    auto pattern = (std::filesystem::temp_directory_path() / "peft-bench.XXXXXX").string();
    TORCH_CHECK(mkdtemp(pattern.data()) != nullptr, "no folder can be made in ", pattern);
    path_ = pattern;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

struct Session {
  Device device{"cpu"};
  Budget budget;
  std::unique_ptr<Peer> peer;
  ScratchFolder scratch;
  bool quick = false, tiny = false;

  /// Tells the Python process of a case; its tensors and adapters lie in the scratch folder. Its answer.
  nlohmann::json prepare(nlohmann::json what) const {
    what["do"] = "prepare";
    what["folder"] = scratch.path().string();
    what["device"] = device.is_cuda() ? "cuda" : "cpu";
    return peer->ask(what);
  }
  void write_tensors(const std::string& name,
                     const std::vector<std::pair<std::string, Tensor>>& tensors) const {
    peft::save_safetensors(scratch.path() / (name + ".safetensors"), tensors);
  }
  void write_adapter(const peft::Adapter& adapter) const {
    const auto folder = scratch.path() / "adapter";
    std::filesystem::remove_all(folder);
    peft::save_adapter(adapter, folder);
  }
};

/// A row to measure.
struct RowPlan {
  std::string set, name;
  bool quick = false;  ///< part of --quick
  std::function<void(Session&, Row&)> measure;

  std::string title() const { return set + " " + name; }
};
using Plans = std::vector<RowPlan>;

/// Gives an adapter values that matter: a method's start is often exactly nothing. The same in every run.
inline void stir(const peft::Adapter& adapter, double size = 0.02) {
  torch::NoGradGuard no_grad;
  for (auto tensor : adapter.parameters()) tensor.add_(torch::randn_like(tensor), size);
  adapter.accept_changes();
}

/// The memory that a step of each variant takes.
inline void record_step_memory(const Device& device, const std::vector<Variant>& variants, Row& row) {
  for (const auto& variant : variants) {
    row.facts["step memory, " + variant.name] = device.peak_bytes(variant.step);
  }
}

/// Python's variants, and the memory it says that its own take.
inline void add_python(const nlohmann::json& reply, std::vector<Variant>& variants, Row& row) {
  if (reply.contains("saved")) row.facts["saved bytes, PEFT"] = reply.at("saved").get<double>();
  if (reply.contains("memory")) row.facts["step memory, PEFT"] = reply.at("memory").get<double>();
  variants.push_back({"PEFT floor", {}});
  variants.push_back({"PEFT", {}});
}

/// The same work in the methods' composed forms, without the fast ones.
inline std::function<void()> composed(std::function<void()> step) {
  return [step = std::move(step)] {
    const peft::FastPaths plain(false);
    step();
  };
}

inline void clear(const std::vector<Tensor>& tensors) {
  for (auto tensor : tensors) tensor.mutable_grad() = Tensor();
}

inline double number(const Tensor& tensor) { return tensor.item<double>(); }

/// A loss and the norms of gradients, for the comparison of two sides: ⟨y, g⟩, |y|, |∂x| and that of all
/// parameters'.
inline std::vector<double> figures(const Tensor& y, const Tensor& gradient, const Tensor& x,
                                   const std::vector<Tensor>& parameters) {
  double squares = 0;
  for (const auto& parameter : parameters) {
    if (!parameter.grad().defined()) continue;
    const double norm = number(parameter.grad().to(torch::kFloat64).norm());
    squares += norm * norm;
  }
  const auto wide = y.detach().to(torch::kFloat64);
  return {number((wide * gradient.to(torch::kFloat64)).sum()), number(wide.norm()),
          number(x.grad().to(torch::kFloat64).norm()), std::sqrt(squares)};
}

}  // namespace bench
