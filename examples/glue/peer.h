// Peer: the same cell trained by Hugging Face's PEFT.
#pragma once

#include <fmt/format.h>
#include <spawn.h>

#include <csignal>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "finetune/child.h"
#include "finetune/method.h"
#include "finetune/method_values.h"
#include "peft/io/safetensors.h"
#include "train_cell.h"

extern char** environ;

namespace glue {

/// The methods that peer.py trains.
inline bool has_peer(const std::string& method) {
  const auto kind = method.substr(0, method.find(':'));
  return kind == "head" || kind == "lora" || kind == "adalora";
}

/// Throws where the other program would not train the same.
inline void check_peer(const Recipe& recipe, const std::string& method) {
  const auto given = finetune::internal::split_method(recipe.method).second;
  const auto is = [&](const std::string& key, double plain) {
    return given.count(key) && finetune::MethodValues(method, given).number(key, plain) != plain;
  };
  if (recipe.dropout != 0.0 || recipe.head_dropout.value_or(0) != 0 || is("dropout", 0)) {
    throw std::runtime_error(fmt::format(
        "--peer needs methods without dropout, since two programs do not draw the same, but {} has it",
        method));
  }
  const auto init = given.count("init") ? given.at("init") : "kaiming";
  if (init != "kaiming" && init != "gaussian" && init != "random" && init != "eva") {
    throw std::runtime_error(
        fmt::format("--peer needs a start that changes nothing at first, since of another one Python trains "
                    "twice the rank, "
                    "but {} has init={}",
                    method, init));
  }
  if (given.count("enable")) {
    throw std::runtime_error(fmt::format(
        "--peer needs whole layers, since of a part Python trains the rest too, but {} has enable", method));
  }
  if (is("lora_plus", 1)) {
    throw std::runtime_error(fmt::format(
        "--peer needs methods with one rate, which Python's program has, but {} has lora_plus", method));
  }
}

namespace internal {

/// Rows as tensors: ids filled up to the longest, the rows' lengths, segments and labels.
inline void add_tensors(const std::string& prefix, const EncodedRows& rows, std::int64_t pad_id,
                        std::vector<std::pair<std::string, Tensor>>& tensors) {
  std::vector<const finetune::Example*> all;
  std::vector<std::int64_t> lengths;
  for (const auto& example : rows.examples) {
    all.push_back(&example);
    lengths.push_back(static_cast<std::int64_t>(example.encoding.ids.size()));
  }
  const auto batch = finetune::internal::pad(all, pad_id);
  const auto& types = batch.inputs.token_type_ids;
  tensors.emplace_back(prefix + "input_ids", batch.inputs.input_ids);
  tensors.emplace_back(prefix + "token_type_ids",
                       types.defined() ? types : torch::zeros_like(batch.inputs.input_ids));
  tensors.emplace_back(prefix + "lengths", torch::tensor(lengths, torch::kLong));
  tensors.emplace_back(prefix + "labels", batch.labels);
}

/// Waits for a program. Throws: finetune::Interrupted where it was stopped, std::runtime_error where it
/// cannot be started or fails.
inline void run_program(const std::vector<std::string>& line) {
  std::vector<char*> words;
  for (const auto& word : line) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  const finetune::internal::ChildSignals signals;
  sigset_t usual;  // what is ignored here would be there too
  sigemptyset(&usual);
  sigaddset(&usual, SIGINT);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setsigdefault(&attributes, &usual);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
  pid_t child = 0;
  const int error = posix_spawnp(&child, words[0], nullptr, &attributes, words.data(), environ);
  posix_spawnattr_destroy(&attributes);
  if (error != 0)
    throw std::runtime_error(fmt::format("'{}' cannot be started: {}", line[0], std::strerror(error)));
  signals.set_child(child);
  const int status = finetune::internal::wait_for(child);
  finetune::internal::check_stopped(status, line[0]);
  if (status != 0)
    throw std::runtime_error(fmt::format("'{}' failed (hint: its own words are above)", line[0]));
}

}  // namespace internal

/// The Python side.
struct Peer {
  std::string python;  ///< the interpreter, with torch, transformers and peft; empty: none
  std::string script;  ///< peer.py
  int threads = 1;
};

/// Trains a cell in Python: on the same initial adapter and head, the same batches in the same order.
/// `work`: an empty folder for what the two programs tell each other.
inline CellResult train_in_python(const Peer& peer, const fs::path& model, const CellSettings& settings,
                                  const GlueData& data, const fs::path& work) {
  const auto options = internal::options_of(settings.recipe);
  StartedModel start(model, settings, data);
  CellResult result;
  fs::create_directory(work / "adapter");

  const bool head_only = start.head_only();
  if (!head_only) start.model.save(work / "adapter", finetune::Settings{{"-"}}.to_json());
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const auto& [name, tensor] : start.trained().named_parameters()) {
    if (start.model.is_head(name)) tensors.emplace_back(name, tensor.detach());
  }
  peft::save_safetensors(work / "head.safetensors", tensors);
  tensors.clear();
  internal::add_tensors("train.", data.train, data.pad_id, tensors);
  for (std::size_t i = 0; i < data.devs.size(); ++i)
    internal::add_tensors(fmt::format("dev{}.", i), data.devs[i], data.pad_id, tensors);
  for (std::int64_t epoch = 0; epoch < settings.recipe.epochs; ++epoch) {
    const auto order = start.batches.order(epoch);
    tensors.emplace_back(fmt::format("order{}", epoch),
                         torch::tensor(std::vector<std::int64_t>(order.begin(), order.end()), torch::kLong));
  }
  peft::save_safetensors(work / "data.safetensors", tensors);
  const nlohmann::ordered_json job{{"model", fs::absolute(model).string()},
                                   {"head_only", head_only},
                                   {"labels", data.labels()},
                                   {"devs", data.devs.size()},
                                   {"steps", start.total},
                                   {"batch_size", settings.recipe.batch_size},
                                   {"evaluation_batch", GlueData::evaluation_batch},
                                   {"eval_every", settings.eval_every},
                                   {"lr", start.method.rate.value_or(settings.recipe.rate)},
                                   {"warmup_steps", finetune::internal::warmup_steps(options, start.total)},
                                   {"schedule", settings.recipe.schedule},
                                   {"weight_decay", settings.recipe.weight_decay},
                                   {"clip", settings.recipe.clip},
                                   {"threads", peer.threads}};
  peft::write_file(work / "job.json", job.dump(2));
  internal::run_program({peer.python, peer.script, work.string()});

  const auto said = peft::internal::read_json_object(work / "result.json");
  result.head_weights = said.at("head_weights").get<std::int64_t>();
  result.other_weights = said.at("other_weights").get<std::int64_t>();
  result.peak_bytes = said.at("peak_bytes").get<std::int64_t>();
  result.seconds = said.at("seconds").get<double>();
  result.first_loss = said.at("first_loss").get<double>();
  result.last_loss = said.at("last_loss").get<double>();
  result.steps = start.total;
  const auto given = peft::load_safetensors(work / "logits.safetensors");
  for (const auto& step : said.at("evaluated")) {
    std::vector<Tensor> logits;
    for (std::size_t i = 0; i < data.devs.size(); ++i)
      logits.push_back(given.at(fmt::format("{}.dev{}", step.get<std::int64_t>(), i)));
    result.curve.push_back(score(data, step.get<std::int64_t>(), logits));
  }
  return result;
}

}  // namespace glue
