// The entries and rows that masks and HiFi train, chosen by chance, from the weights or from the data.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>

#include "batches.h"
#include "selective_parts.h"
#include "task.h"

namespace finetune {

/// Whether the entries that a method trains wait for `choose_entries`.
inline bool chooses_entries(const Method& method) {
  static const std::set<std::string> methods{"fish", "hifi", "magnitude", "rand_row_col", "rand_uniform"};
  return methods.count(method.name) > 0;
}

namespace internal {

/// One row of a batch.
inline Batch row_of(const Batch& batch, int64_t row) {
  auto one = batch;
  for (auto* tensor : {&one.inputs.input_ids, &one.inputs.inputs_embeds, &one.inputs.attention_mask,
                       &one.inputs.token_type_ids, &one.inputs.position_ids, &one.labels}) {
    if (tensor->defined() && tensor->size(0) > 1) *tensor = tensor->narrow(0, row, 1);
  }
  return one;
}

/// The rows of the data's first batches, one by one.
class RowsOfData {
 public:
  RowsOfData(Batches& data, torch::Device device, int64_t most) : data_(data), device_(device), left_(most) {}

  /// Returns false after the last.
  bool next(Batch& row) {
    if (left_-- <= 0) return false;
    while (row_ == rows_) {
      if (batch_ == data_.count()) return false;
      current_ = to(data_.get(0, batch_++), device_);
      rows_ = current_.inputs.input_ids.defined() ? current_.inputs.input_ids.size(0)
                                                  : current_.inputs.inputs_embeds.size(0);
      row_ = 0;
    }
    row = row_of(current_, row_++);
    return true;
  }

 private:
  Batches& data_;
  torch::Device device_;
  int64_t left_, batch_ = 0, row_ = 0, rows_ = 0;
  Batch current_;
};

}  // namespace internal

/// Chooses what a mask or HiFi trains. FISH and HiFi look at rows of the data, one by one. `task`: a `Task`
/// or like one. Throws std::runtime_error where that fails.
template <class Model>
void choose_entries(const Method& method, Model& task, Batches& data) {
  const MethodValues values(method.name, method.given);
  const auto& adapter = *task.adapter();
  auto& model = *task.model();
  try {
    if (method.name == "magnitude") {
      peft::initialize_magnitude(adapter, internal::magnitude_options(values));
    } else if (method.name == "rand_uniform") {
      peft::initialize_rand_uniform(adapter, values.integer("count", 100000));
    } else if (method.name == "rand_row_col") {
      peft::initialize_rand_row_col(adapter);
    } else if (method.name == "hifi") {
      const auto options = internal::hifi_options(values);
      internal::RowsOfData rows(data, task.device(), options.samples());
      const auto next = [&](Tensor& used) {
        Batch row;
        if (!rows.next(row)) return false;
        if (row.inputs.attention_mask.defined()) used = row.inputs.attention_mask.to(torch::kBool);
        task.encode(row.inputs);
        return true;
      };
      peft::initialize_hifi(model, adapter, next, options);
    } else {
      if (task.has_pooled_head()) {
        throw std::runtime_error(
            "needs gradients, but the head of --pooling mean starts at zero and gives none (hint: --pooling "
            "cls)");
      }
      internal::RowsOfData rows(data, task.device(), values.integer("examples", 1024));
      const auto next_loss = [&] {
        Batch row;
        return rows.next(row) ? task.loss(task.logits(row.inputs), row.labels) : Tensor();
      };
      peft::initialize_fish(model, adapter, next_loss, internal::fish_options(values));
    }
  } catch (const c10::Error& error) {
    throw std::runtime_error(fmt::format("--method {}: {}", method.name, error.what_without_backtrace()));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(fmt::format("--method {}: {}", method.name, error.what()));
  }
}

}  // namespace finetune
