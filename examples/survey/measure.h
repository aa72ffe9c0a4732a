// Measure: everything the survey says of one method, in a process that has measured nothing else.
#pragma once

#include <ATen/record_function.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/device.h"
#include "bench/measure.h"
#include "bench/session.h"
#include "finetune/adapter_form.h"
#include "peft/io/adapterhub.h"
#include "peft/io/adapterhub_fusion.h"
#include "peft/io/peft_directory.h"
#include "peft/train/optimizer.h"
#include "survey/attach.h"
#include "survey/change.h"
#include "survey/method_row.h"
#include "survey/model.h"

namespace survey {

/// What to measure on.
struct Setting {
  std::filesystem::path folder;
  int64_t batch = 8, length = 64;
  int repeat = 15;  ///< rounds of each comparison of times
};

namespace internal {

/// Counts what tensors take from the CPU's allocator while it lives: exact, and the same on every run, which
/// the memory of the process is not.
class WatchedMemory {
 public:
  WatchedMemory() : before_(c10::GetCPUAllocator()) {
    memory().begin();
    c10::SetCPUAllocator(&memory(), priority);
  }
  ~WatchedMemory() { c10::SetCPUAllocator(before_, priority); }
  WatchedMemory(const WatchedMemory&) = delete;
  WatchedMemory& operator=(const WatchedMemory&) = delete;

  int64_t held() const { return memory().total().live; }
  int64_t peak() const { return memory().total().peak; }
  void forget_peak() const { memory().forget_peak(); }

 private:
  static constexpr uint8_t priority = 255;
  static bench::internal::CountingAllocator& memory() { return bench::internal::CountingAllocator::get(); }
  c10::Allocator* before_;
};

/// The names of the operations that the work runs on this thread, in their order.
inline std::vector<std::string> operations(const std::function<void()>& work) {
  static thread_local std::vector<std::string> names;
  names.clear();
  const at::RecordFunctionCallback::StartCallback note = [](const at::RecordFunction& function) {
    names.emplace_back(function.name());
    return std::unique_ptr<at::ObserverContext>();
  };
  const auto handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback(note).scopes({at::RecordScope::FUNCTION}));
  work();
  at::removeCallback(handle);
  return names;
}

/// The size of an adapter's files.
inline int64_t saved_bytes(const SurveyModel& model, const finetune::Method& method,
                           const peft::Adapter& adapter) {
  const bench::ScratchFolder scratch;
  const auto folder = scratch.path() / "adapter";
  if (method.fusion) {
    peft::save_adapterhub_fusion(model.module(), adapter.name(), folder);
  } else if (finetune::in_adapterhub_form(adapter)) {
    peft::save_adapterhub(model.module(), adapter.name(), folder);
  } else {
    peft::save_adapter(adapter, folder);
  }
  int64_t bytes = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) bytes += static_cast<int64_t>(entry.file_size());
  }
  return bytes;
}

inline Ratio ratio_of(const bench::Row& row, const char* variant) {
  const auto* measured = row.find(variant);
  return {measured->ratio, measured->lower, measured->upper};
}

/// One model and method under measurement.
class Measurement {
 public:
  Measurement(const Setting& setting, const std::string& text)
      : setting_(setting), frozen_(open_model(setting.folder)), model_(open_model(setting.folder)) {
    row_.method = text;
    method_ = read_method(text, model_);
    inputs_ = frozen_.inputs(setting.batch, setting.length);
    torch::NoGradGuard no_grad;
    const auto logits = frozen_.forward(inputs_).logits;
    labels_ = torch::randint(0, std::max<int64_t>(2, logits.size(1)), {setting.batch}, torch::kLong);
  }

  MethodRow operator()() {
    {
      const WatchedMemory memory;
      adapter_ = attach(model_, method_);
      train(memory);
    }
    count();
    save();
    measure_times();
    merge();
    return row_;
  }

 private:
  /// Steps as a user takes them: gradients, clipping, AdamW, the method's own work around it.
  void train(const WatchedMemory& memory) {
    constexpr double rate = 1e-3, clip = 1;
    constexpr int64_t steps = 3;
    memory.forget_peak();
    peft::AdamW optimizer(*adapter_, torch::optim::AdamWOptions(rate), clip);
    model_.module().train();
    const auto step = [&](const peft::models::EncoderInputs& inputs, const Tensor& labels) {
      optimizer.zero_grad();
      const auto before = memory.held();
      auto loss = loss_of(model_, inputs, labels);
      row_.kept_bytes = memory.held() - before;
      loss.backward();
      optimizer.step();
    };
    // Ranks first take their final values, on a few tokens.
    if (!adapter_->record().controllers.empty()) {
      const auto few = model_.inputs(2, std::min<int64_t>(setting_.length, 16));
      for (auto i = steps; i < schedule_steps; ++i) step(few, labels_.narrow(0, 0, 1).expand({2}));
    }
    for (int64_t i = 0; i < steps; ++i) step(inputs_, labels_);
    row_.peak_bytes = memory.peak();
    optimizer.zero_grad();
  }

  void count() {
    row_.trainable = adapter_->count();
    int64_t base = 0;
    for (const auto& parameter : frozen_.module().parameters()) base += parameter.numel();
    row_.percent = 100.0 * static_cast<double>(row_.trainable) / static_cast<double>(base);
    auto inputs = inputs_;
    inputs.output_hidden_states = true;
    const auto output = model_.forward(inputs);
    row_.blocks = static_cast<int64_t>(output.hidden_states.size()) - 1;
    for (size_t i = 1; i < output.hidden_states.size(); ++i) {
      if (!output.hidden_states[i].requires_grad()) continue;
      output.hidden_states[i].register_hook([this](const Tensor&) { ++row_.blocks_passed; });
    }
    output.logits.sum().backward();
    for (auto& tensor : adapter_->parameters()) tensor.mutable_grad() = Tensor();
  }

  void save() {
    try {
      row_.storage_bytes = saved_bytes(model_, method_, *adapter_);
    } catch (const c10::Error& error) {
      row_.note = error.what_without_backtrace();
    }
  }

  std::vector<bench::Variant> forwards(const char* name) {
    const auto of = [this](const SurveyModel& model) {
      return [this, &model] {
        torch::NoGradGuard no_grad;
        model.forward(inputs_);
      };
    };
    return {{"frozen", of(frozen_)}, {name, of(model_)}};
  }
  /// `sample`: seconds that each variant is timed for in a round, at least once.
  bench::Row interleave(const std::vector<bench::Variant>& variants, double sample = 0.02) const {
    bench::Row row;
    row.base = "frozen";
    constexpr double long_enough = 1e9;
    bench::interleave(variants, {long_enough, sample, setting_.repeat, setting_.repeat}, bench::Device("cpu"),
                      nullptr, row);
    return row;
  }

  void measure_times() {
    model_.module().eval();
    row_.before = ratio_of(interleave(forwards("adapted")), "adapted");
    model_.module().train();
    Tensor loss = loss_of(model_, inputs_, labels_);
    const auto backward = [&] { loss.backward(); };
    const auto forward = [&] {
      for (auto& tensor : adapter_->parameters()) tensor.mutable_grad() = Tensor();
      loss = loss_of(model_, inputs_, labels_);
    };
    // Once a round: every backward needs a forward of its own, which may take a thousand times as long.
    constexpr double once = 1e-9;
    row_.backward =
        ratio_of(interleave({forwards("").front(), {"backward", backward, forward}}, once), "backward");
    model_.module().eval();
  }

  void merge() {
    for (const auto& entry : adapter_->entries()) {
      if (!entry.piece->not_mergeable().empty()) return;
    }
    peft::merge(model_.module());
    row_.after = ratio_of(interleave(forwards("merged")), "merged");
    const auto variants = forwards("merged");
    row_.same_operations = operations(variants[0].step) == operations(variants[1].step);
    peft::unmerge(model_.module());
    model_.module().to(torch::kFloat64);
    stir(*adapter_);
    row_.change = merge_and_compare(model_.module());
  }

  Setting setting_;
  SurveyModel frozen_, model_;
  finetune::Method method_;
  peft::models::EncoderInputs inputs_;
  Tensor labels_;
  std::optional<peft::Adapter> adapter_;
  MethodRow row_;
};

}  // namespace internal

/// Measures one method. Throws: c10::Error where it does not fit the model.
inline MethodRow measure(const Setting& setting, const std::string& method) {
  torch::manual_seed(1);
  return internal::Measurement(setting, method)();
}

}  // namespace survey
