// load_p_tuning_v2: reads the prefix out of a checkpoint of P-tuning v2's authors.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peft/core/adapter.h"
#include "peft/core/problems.h"
#include "peft/io/pickle.h"
#include "peft/io/safetensors.h"
#include "peft/methods/prefix.h"
#include "peft/methods/replace.h"
#include "peft/model/add_adapter.h"

namespace peft {

/// Reads the prefix, and the trained head `classifier` or `qa_outputs` where the model has one of that name,
/// out of a checkpoint of P-tuning v2's authors (`pytorch_model.bin`, or the same as safetensors), and puts
/// them on the model: frozen, unless they are to train on. Length and widths follow from the shapes. The
/// checkpoint's own copy of the base is left alone. Draws nothing.
///
/// Throws: c10::ValueError listing all problems, the model unchanged: tensors that are missing, or of a shape
/// that is not the model's; what `add_adapter` throws.
///
/// Example:
/// ```
/// auto adapter = peft::load_p_tuning_v2(*model, "checkpoints/rte-bert/pytorch_model.bin", "rte");
/// ```
inline Adapter load_p_tuning_v2(nn::Module& model, const std::filesystem::path& file,
                                const std::string& name = "default", bool trainable = false) {
  using namespace internal;
  torch::NoGradGuard no_grad;
  const auto title = "load_p_tuning_v2: '" + file.string() + "'";
  const auto tensors = file.extension() == ".safetensors" ? load_safetensors(file) : load_pickle(file);
  const std::string encoder = "prefix_encoder.";
  Problems problems;
  const auto shape_of = [&](const std::string& key, int64_t axes) -> std::vector<int64_t> {
    const auto found = tensors.find(key);
    const bool fits = found != tensors.end() && found->second.dim() == axes && found->second.numel() > 0;
    if (!fits) {
      problems.add("'" + key + "' must have " + std::to_string(axes) + " axes, but " +
                   (found == tensors.end() ? "is missing" : "got " + shape_text(found->second.sizes())));
    }
    return fits ? found->second.sizes().vec() : std::vector<int64_t>(static_cast<size_t>(axes), 1);
  };
  const auto embedding = shape_of(encoder + "embedding.weight", 2);
  auto options = PrefixOptions::p_tuning_v2(embedding[0]);
  if (tensors.count(encoder + "trans.0.weight")) {
    options.projection(true).vector_width(embedding[1]);
    options.hidden_width(shape_of(encoder + "trans.0.weight", 2)[0]);
  }
  problems.raise(title);

  std::vector<Part> parts{on(options)};
  for (const auto& node : walk(model, /*learn_paths=*/true)) {
    const bool is_head = node.path == "classifier" || node.path == "qa_outputs";
    if (!is_head || !tensors.count(node.path + ".weight")) continue;
    if (node.site) {
      parts.push_back(on(ReplaceOptions(), named({node.path})));
    } else {
      problems.add("'" + node.path + ".weight' is the head that was trained, one layer, but the model's '" +
                   node.path + "' is a " + node.module->name() +
                   " of several (hint: load the prefix on the encoder alone)");
    }
  }
  problems.raise(title);
  auto plan = plan_adapter(model, parts, name, /*extends=*/false, problems);
  problems.raise(title);
  std::vector<std::pair<std::string, Tensor>> wanted;
  const auto& table = *static_cast<const PrefixTables&>(*plan.shared.front().part).all().front();
  wanted.emplace_back(encoder + "embedding.weight", table.embedding);
  if (table.first.defined()) {
    wanted.emplace_back(encoder + "trans.0.weight", table.first);
    wanted.emplace_back(encoder + "trans.0.bias", table.first_bias);
    wanted.emplace_back(encoder + "trans.2.weight", table.second);
    wanted.emplace_back(encoder + "trans.2.bias", table.second_bias);
  }
  plan.place();
  for (const auto& entry : plan.entries) {
    const auto head = std::dynamic_pointer_cast<ReplaceImpl>(entry.piece);
    if (!head) continue;
    wanted.emplace_back(entry.site->path() + ".weight", head->weight);
    if (head->bias.defined()) wanted.emplace_back(entry.site->path() + ".bias", head->bias);
  }
  for (const auto& [key, tensor] : wanted) {
    const auto found = tensors.find(key);
    const auto is = found == tensors.end() ? "it is missing" : "got " + shape_text(found->second.sizes());
    if (found != tensors.end() && found->second.sizes() == tensor.sizes()) continue;
    problems.add("'" + key + "' expected " + shape_text(tensor.sizes()) + ", but " + is +
                 " (hint: another base model?)");
  }
  problems.raise(title);
  for (auto& [key, tensor] : wanted) tensor.copy_(tensors.at(key));
  const Adapter adapter(make_record(model, name));
  commit(plan, adapter, trainable);
  return adapter;
}

}  // namespace peft
