// Pretrained: loading a Hugging Face folder's weights, strictly, into a model.
#pragma once

#include "peft/core/compat.h"
#include "peft/core/problems.h"
#include "peft/core/site.h"
#include "peft/io/config_json.h"
#include "peft/models/pretrained_folder.h"

#include <torch/arg.h>

#include <algorithm>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {
namespace models {

/// How a model is read from a folder.
struct PretrainedOptions {
  /// Type of the weights; without one, that of `config.json` or else of the file, as in transformers. Weights
  /// that have it already are not copied: they are read from the mapped file.
  TORCH_ARG(std::optional<torch::ScalarType>, dtype);
  /// Replaces every dropout probability of the base.
  TORCH_ARG(std::optional<double>, dropout);
  /// Whether an encoder has its pooler; by default it has one where the file has one.
  TORCH_ARG(std::optional<bool>, pooler);
  /// Where the base came from, for the adapters' configs.
  TORCH_ARG(std::string, name_or_path) = "";
  /// Takes what a user should know in one line: a head that was initialised, tensors left out.
  TORCH_ARG(std::function<void(const std::string&)>, note) = [](const std::string& line) {
    std::cerr << line + "\n";
  };
};

/// What a model of ours says of itself, so that one loader and one writer serve all families.
class Pretrained : public Described {
 public:
  /// transformers' class: "BertForSequenceClassification".
  virtual std::string architecture() const = 0;
  /// transformers' name of the base inside a model with a head: "bert".
  virtual std::string base_prefix() const = 0;
  /// The paths of the task head's parts, in the order of their draws. They alone may be absent from a file.
  virtual std::vector<std::string> head() const { return {}; }
  /// Beginnings of the keys of heads and poolers that other models of this family have.
  virtual std::vector<std::string> others() const = 0;
  /// Draws the head's initial values.
  virtual void initialize_head() {}
  /// Parameters that are one matrix: the first name's values are the second's. A file needs to hold only one
  /// of them; one that holds both, and differently, makes them two.
  virtual std::vector<std::pair<std::string, std::string>> tied() const { return {}; }
  /// Second names that transformers' files have for a parameter: the name, then the parameter's.
  virtual std::vector<std::pair<std::string, std::string>> aliases() const { return {}; }

  /// In training, keeps only the inputs of the blocks until backward, which runs each block once more
  /// (`peft::checkpoint`): the same gradients from less memory. Off in evaluation. Throws: in forward, where
  /// a cache is asked for.
  virtual void gradient_checkpointing(bool on) = 0;

  /// The `config.json` of a model that was built from a config, or null where it cannot be written.
  virtual nlohmann::ordered_json config_json() const { return nullptr; }

  /// Where the base came from; what `describe()` tells adapters.
  std::string name_or_path;
};

}  // namespace models

namespace internal {

/// The key under which a model holds a file's tensor: old names of norms are renamed, second names are
/// replaced, the base prefix is added or removed as transformers does. The name itself where the model has
/// none such.
inline std::string model_key(std::string name, const models::Pretrained& model,
                             const std::function<bool(const std::string&)>& holds) {
  const auto rename = [&name](const std::string& from, const std::string& to) {
    if (name.ends_with(from)) name.replace(name.size() - from.size(), from.size(), to);
  };
  rename("LayerNorm.gamma", "LayerNorm.weight");
  rename("LayerNorm.beta", "LayerNorm.bias");
  for (const auto& [second, own] : model.aliases()) {
    if (name == second) return own;
  }
  const std::string prefix = model.base_prefix() + ".";
  if (name.starts_with(prefix) && holds(name.substr(prefix.size()))) return name.substr(prefix.size());
  if (holds(prefix + name)) return prefix + name;
  return name;
}

/// Whether a name is a parameter's second one.
inline bool is_alias(const models::Pretrained& model, const std::string& name) {
  const auto aliases = model.aliases();
  return std::any_of(aliases.begin(), aliases.end(),
                     [&name](const auto& pair) { return pair.first == name; });
}

/// Buffers that older files hold and every model can compute.
inline bool is_derived_buffer(const std::string& name) {
  for (const char* end :
       {"embeddings.position_ids", "embeddings.token_type_ids", ".attn.bias", ".attn.masked_bias"}) {
    if (name.ends_with(end)) return true;
  }
  return false;
}

/// Whether a key lies in the model's head.
inline bool in_head(const models::Pretrained& model, const std::string& key) {
  const auto head = model.head();
  return std::any_of(head.begin(), head.end(),
                     [&key](const std::string& part) { return key.starts_with(part + "."); });
}

/// True where both are the same memory.
inline bool is_tied(const Tensor& a, const Tensor& b) {
  return a.numel() == b.numel() && a.data_ptr() == b.data_ptr();
}

/// Lets `head` read the values of `words`. Both stay tensors of their own, so that merging on one leaves the
/// other alone; `head` itself never trains.
inline void tie(Tensor head, const Tensor& words) {
  head.set_data(words.detach());
  head.set_requires_grad(false);
}

/// The type the weights get: what was asked for, else what the config says, else that of the file's first.
inline torch::ScalarType weight_dtype(const models::PretrainedFolder& folder,
                                      const models::PretrainedOptions& options) {
  if (options.dtype()) {
    TORCH_CHECK_VALUE(c10::isFloatingType(*options.dtype()),
                      "from_pretrained: dtype must be a floating type, but got ",
                      c10::toString(*options.dtype()));
    return *options.dtype();
  }
  const auto config = read_json_object(folder.config_path());
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (!config.contains(key) || config[key].is_null()) continue;
    const auto type = config[key].is_string() ? dtype_of_name(config[key].get<std::string>()) : std::nullopt;
    TORCH_CHECK_VALUE(type, "'", folder.config_path().string(), "': '", key,
                      "' must be float32, float16, bfloat16 or float64, but got ", json_text(config[key]));
    return *type;
  }
  for (const auto& [name, file] : folder.tensors()) {
    if (c10::isFloatingType(file->entry(name).dtype)) return file->entry(name).dtype;
  }
  return torch::kFloat32;
}

/// "'a', 'b' and 3 more".
inline std::string name_some(const std::vector<std::string>& names, size_t most = 2) {
  std::string text;
  for (size_t i = 0; i < std::min(most, names.size()); ++i) text += (i ? ", '" : "'") + names[i] + "'";
  return names.size() > most ? text + " and " + std::to_string(names.size() - most) + " more" : text;
}

}  // namespace internal

namespace models {

/// Fills a model that carries no adapter with a folder's weights: mapped, not copied, where they have the
/// type asked for; frozen, as a base is. Only the task head may be absent: it
/// is initialised, and named in a note. Heads of other models are left out with a note.
///
/// Throws: c10::ValueError listing everything that is missing, extra, or of another shape or kind; the model
/// is unchanged.
inline void load_pretrained(nn::Module& model, const PretrainedFolder& folder,
                            const PretrainedOptions& options) {
  auto* self = dynamic_cast<Pretrained*>(&model);
  TORCH_CHECK(self != nullptr, "load_pretrained: ", model.name(), " must be a peft::models::Pretrained");
  auto parameters = model.named_parameters();
  const auto type = peft::internal::weight_dtype(folder, options);
  const auto holds = [&parameters](const std::string& key) { return parameters.contains(key); };

  peft::internal::Problems problems;
  std::map<std::string, std::string> sources;  // the model's key → the file's name
  std::vector<std::string> left_out;
  std::vector<std::pair<std::string, std::string>> extra;
  for (const auto& [name, file] : folder.tensors()) {
    const auto key = peft::internal::model_key(name, *self, holds);
    if (peft::internal::is_alias(*self, name) && folder.tensors().count(key)) continue;
    if (!holds(key)) {
      const auto others = self->others();
      // Without its base prefix a name says whose head it is.
      const auto inner =
          key.starts_with(self->base_prefix() + ".") ? key.substr(self->base_prefix().size() + 1) : key;
      const bool other = std::any_of(others.begin(), others.end(),
                                     [&inner](const std::string& start) { return inner.starts_with(start); });
      if (other) {
        left_out.push_back(name);
      } else if (!peft::internal::is_derived_buffer(name)) {
        extra.emplace_back(name, key);
      }
      continue;
    }
    const auto [found, fresh] = sources.emplace(key, name);
    if (!fresh) problems.add("'" + name + "' and '" + found->second + "' are both '" + key + "'");
    const auto& entry = file->entry(name);
    if (entry.shape != parameters[key].sizes().vec()) {
      std::string line = "'" + name + "' expected " + peft::internal::shape_text(parameters[key].sizes()) +
                         ", but got " + peft::internal::shape_text(entry.shape);
      if (peft::internal::in_head(*self, key)) line += " (hint: another number of labels than asked for)";
      problems.add(line);
    } else if (!c10::isFloatingType(entry.dtype)) {
      problems.add("'" + name + "' must be of a floating type, but is " + entry.dtype_name);
    }
  }

  const auto tied = self->tied();
  for (const auto& [head, words] : tied) {
    const auto only = sources.find(head);
    if (only == sources.end() || sources.count(words)) continue;
    sources.emplace(words, only->second);
    sources.erase(only);
  }
  const auto follows = [&tied](const std::string& key) {
    return std::any_of(tied.begin(), tied.end(), [&key](const auto& pair) { return pair.first == key; });
  };
  std::vector<std::string> missing, missing_head;
  size_t head_size = 0;
  for (const auto& item : parameters) {
    if (follows(item.key())) continue;
    const bool in_head = peft::internal::in_head(*self, item.key());
    head_size += in_head;
    if (sources.count(item.key())) continue;
    (in_head ? missing_head : missing).push_back(item.key());
  }
  const bool no_head = head_size > 0 && missing_head.size() == head_size;
  if (!no_head) missing.insert(missing.end(), missing_head.begin(), missing_head.end());
  for (const auto& key : missing) problems.add("'" + key + "' is missing");
  for (const auto& [name, key] : extra) {
    std::string line = "'" + name + "' is extra: " + self->architecture() + " has no such tensor";
    // Looking for the nearest name takes its time, and is no use in a long list.
    if (extra.size() <= 5) line += "; closest: " + peft::internal::closest(key, parameters.keys(), 1);
    problems.add(line);
  }
  problems.raise("from_pretrained: '" + folder.weights_path().string() + "' does not fit " +
                 self->architecture());

  torch::NoGradGuard no_grad;
  for (auto& item : parameters) {
    const auto source = sources.find(item.key());
    if (source == sources.end() && follows(item.key())) continue;
    auto value = source == sources.end()
                     ? torch::empty(item.value().sizes(), type)
                     : folder.tensors().at(source->second)->tensor(source->second).to(type);
    item.value().set_data(value);
    item.value().set_requires_grad(false);
  }
  for (const auto& [head, words] : tied) {
    if (!sources.count(head) || torch::equal(parameters[head], parameters[words])) {
      peft::internal::tie(parameters[head], parameters[words]);
    } else {
      options.note()("peft: '" + folder.weights_path().string() + "' holds '" + head + "' and '" + words +
                     "' with different values: they are not tied");
    }
  }
  if (no_head) {
    self->initialize_head();
    options.note()("peft: '" + folder.weights_path().string() +
                   "' has no task head: " + peft::internal::name_some(missing_head) + " of " +
                   self->architecture() + " start at random");
  }
  if (!left_out.empty()) {
    options.note()("peft: '" + folder.weights_path().string() + "': " + peft::internal::name_some(left_out) +
                   " left out, which " + self->architecture() + " does not have");
  }
  self->name_or_path = options.name_or_path();
}

}  // namespace models

namespace internal {

/// The settings of a folder's model, as `Source` reads them.
template <class Source>
auto read_config(const models::PretrainedFolder& folder, const models::PretrainedOptions& options) {
  auto config = Source::read(folder.config_path());
  if (options.dropout()) config.dropout(*options.dropout());
  return config;
}

/// The model with the folder's weights, in evaluation mode.
template <class Model>
Model filled(Model model, const models::PretrainedFolder& folder, const models::PretrainedOptions& options) {
  models::load_pretrained(*model, folder, options);
  model->eval();
  return model;
}

}  // namespace internal
}  // namespace peft
