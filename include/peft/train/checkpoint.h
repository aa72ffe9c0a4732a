// Checkpoint: everything a training run needs to go on bit for bit, in one file.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <torch/cuda.h>

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/random_state.h"
#include "peft/io/safetensors.h"
#include "peft/train/adapter_optimizer.h"
#include "peft/train/grad_scaler.h"
#include "peft/train/schedule.h"

namespace peft {
namespace internal {

/// The random number generators a run draws from: the CPU's and, if the adapter is on a GPU, every GPU's.
inline std::vector<std::pair<std::string, at::Generator>> generators(const Adapter& adapter) {
  std::vector<std::pair<std::string, at::Generator>> result{{"cpu", at::detail::getDefaultCPUGenerator()}};
  bool on_gpu = false;
  for (const auto& item : adapter.named_tensors()) on_gpu = on_gpu || item.second.is_cuda();
  const size_t devices = on_gpu ? static_cast<size_t>(torch::cuda::device_count()) : 0;
  for (size_t i = 0; i < devices; ++i) {
    result.emplace_back("cuda." + std::to_string(i), at::globalContext().defaultGenerator(at::Device(
                                                         at::kCUDA, static_cast<c10::DeviceIndex>(i))));
  }
  return result;
}

inline constexpr const char* checkpoint_version = "1";

inline void check_checkpoint(const SafetensorsFile& file, const std::string& title) {
  const auto& notes = file.metadata();
  const auto version = notes.find("peft_checkpoint");
  TORCH_CHECK(version != notes.end(), title, ": it is a safetensors file, but not a checkpoint");
  TORCH_CHECK(version->second == checkpoint_version, title, ": its format must be version ",
              checkpoint_version, ", but is ", version->second, " (hint: written by another release?)");
  TORCH_CHECK(notes.count("position"), title, ": it has no position in the data");
}

/// The states of an adapter's controllers while a checkpoint is read: they decide which tensors there are, so
/// they are set before the others are checked, and set back if something does not fit.
class ControllerStates {
 public:
  ControllerStates(const Adapter& adapter, AdapterOptimizer& optimizer)
      : adapter_(adapter), optimizer_(optimizer) {
    for (const auto& controller : controllers()) before_.push_back(own(controller->state()));
    if (before_.empty()) return;
    tensors_ = own(adapter.named_tensors());
    moments_ = own(optimizer.state());
  }

  /// Changes nothing where the states do not fit.
  void load(const std::map<std::string, Tensor>& states, Problems& problems) {
    std::vector<std::map<std::string, Tensor>> given(controllers().size());
    const auto complaints = problems.size();
    for (const auto& [name, tensor] : states) {
      const auto index = name.substr(0, name.find('.'));
      size_t i = 0;
      while (i < given.size() && std::to_string(i) != index) ++i;
      if (i == given.size() || index == name) {
        problems.add("'controller." + name + "' is not expected");
      } else {
        given[i].emplace(name.substr(index.size() + 1), tensor);
      }
    }
    if (problems.size() > complaints) return;
    try {
      for (size_t i = 0; i < given.size(); ++i) controllers()[i]->load_state(given[i]);
      optimizer_.follow_growth();
    } catch (const c10::Error& error) {
      restore();
      problems.add(error.what_without_backtrace());
    }
  }

  void restore() {
    if (before_.empty()) return;
    for (size_t i = 0; i < before_.size(); ++i) controllers()[i]->load_state(before_[i]);
    optimizer_.follow_growth();
    for (const auto& [name, tensor] : adapter_.named_tensors()) Tensor(tensor).copy_(tensors_.at(name));
    optimizer_.load_state(moments_);
    adapter_.accept_changes();
  }

 private:
  const std::vector<std::shared_ptr<Controller>>& controllers() const {
    return adapter_.record().controllers;
  }
  static std::map<std::string, Tensor> own(const NamedTensors& named) {
    std::map<std::string, Tensor> copies;
    for (const auto& [name, tensor] : named) copies.emplace(name, tensor.detach().clone());
    return copies;
  }

  const Adapter& adapter_;
  AdapterOptimizer& optimizer_;
  std::vector<std::map<std::string, Tensor>> before_;
  std::map<std::string, Tensor> tensors_, moments_;
};

}  // namespace internal

/// Writes all of a run to one safetensors file: the adapter's tensors, frozen ones too, the optimizer's and
/// the schedule's state, the random number generators, the state of a gradient scaler where there is one, and
/// the caller's `position` in the data, an opaque string such as JSON. The file appears complete or not at
/// all. To be called between steps: gradients are not kept.
///
/// Example:
/// ```
/// const auto file = "run/checkpoint.safetensors";
/// peft::save_checkpoint(file, adapter, optimizer, schedule, R"({"epoch":1,"batch":40})");
/// …
/// const auto position = peft::load_checkpoint(file, adapter, optimizer, schedule);
/// ```
inline void save_checkpoint(const std::filesystem::path& path, const Adapter& adapter,
                            const AdapterOptimizer& optimizer, const Schedule& schedule,
                            const std::string& position = "", const GradScaler* scaler = nullptr) {
  std::vector<std::pair<std::string, Tensor>> tensors;
  const auto add = [&](const std::string& prefix, const auto& named) {
    for (const auto& [name, tensor] : named) tensors.emplace_back(prefix + name, tensor.detach());
  };
  add("adapter.", adapter.named_tensors());
  add("optimizer.", optimizer.state());
  add("schedule.", schedule.state());
  if (scaler) add("scaler.", scaler->state());
  const auto& controllers = adapter.record().controllers;
  for (size_t i = 0; i < controllers.size(); ++i) {
    add("controller." + std::to_string(i) + ".", controllers[i]->state());
  }
  for (const auto& [name, generator] : internal::generators(adapter)) {
    tensors.emplace_back("generator." + name, internal::generator_state(generator));
  }
  save_safetensors(path, tensors,
                   {{"peft_checkpoint", internal::checkpoint_version}, {"position", position}});
}

/// The `position` a checkpoint was saved with, nothing else being read.
inline std::string checkpoint_position(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  internal::check_checkpoint(file, "checkpoint_position: '" + path.string() + "' cannot be used");
  return file.metadata().at("position");
}

/// Puts a run back to where `save_checkpoint` found it and returns the position in the data. Adapter,
/// optimizer and schedule must have been made as they were then. Gradients are cleared. Throws: c10::Error,
/// before anything is changed, for a file that is no checkpoint or damaged, and listing everything that does
/// not fit: tensors that are missing, extra or of another shape or type, generators.
inline std::string load_checkpoint(const std::filesystem::path& path, const Adapter& adapter,
                                   AdapterOptimizer& optimizer, Schedule& schedule,
                                   GradScaler* scaler = nullptr) {
  torch::NoGradGuard no_grad;
  const std::string title = "load_checkpoint: '" + path.string() + "' cannot be used";
  const SafetensorsFile file(path);
  internal::check_checkpoint(file, title);

  std::map<std::string, std::map<std::string, Tensor>> parts{{"adapter", {}},    {"optimizer", {}},
                                                             {"schedule", {}},   {"generator", {}},
                                                             {"controller", {}}, {"scaler", {}}};
  internal::Problems problems;
  for (const auto& name : file.names()) {
    const auto dot = name.find('.');
    const auto part = parts.find(name.substr(0, dot));
    if (dot == std::string::npos || part == parts.end()) {
      problems.add("'" + name + "' is not expected");
    } else if (file.entry(name).dtype == torch::ScalarType::Undefined) {
      problems.add("'" + name + "' has dtype " + file.entry(name).dtype_name + ", which is not supported");
    } else {
      part->second.emplace(name.substr(dot + 1), file.tensor(name));
    }
  }
  internal::ControllerStates controllers(adapter, optimizer);
  // Of a run that had grown less, this optimizer would lose what it was made with.
  if (optimizer.has_first_parameters(parts["optimizer"])) controllers.load(parts["controller"], problems);
  const auto& tensors = parts["adapter"];
  const auto named = adapter.named_tensors();
  internal::check_tensors(named, tensors, problems);
  optimizer.check_state(parts["optimizer"], problems);
  schedule.check_state(parts["schedule"], problems);
  internal::check_tensors(scaler ? scaler->state() : NamedTensors(), parts["scaler"], problems);
  const auto generators = internal::generators(adapter);
  std::vector<std::pair<std::string, Tensor>> before;
  for (const auto& [name, generator] : generators)
    before.emplace_back(name, internal::generator_state(generator));
  internal::check_tensors(before, parts["generator"], problems);
  if (!problems.empty()) controllers.restore();
  problems.raise(title);

  // The one thing left that can refuse what it is given, and so the first to be set.
  try {
    for (const auto& [name, generator] : generators) {
      internal::set_generator_state(generator, parts["generator"].at(name).clone());
    }
  } catch (const c10::Error& error) {
    for (size_t i = 0; i < generators.size(); ++i) {
      internal::set_generator_state(generators[i].second, before[i].second);
    }
    controllers.restore();
    TORCH_CHECK(false, title,
                ": the state of the random number generators is damaged: ", error.what_without_backtrace());
  }
  for (const auto& [name, tensor] : named) Tensor(tensor).copy_(tensors.at(name));
  optimizer.load_state(parts["optimizer"]);
  schedule.load_state(parts["schedule"]);
  if (scaler) scaler->load_state(parts["scaler"]);
  optimizer.zero_grad();
  adapter.accept_changes();
  return file.metadata().at("position");
}

}  // namespace peft
