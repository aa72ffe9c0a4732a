// A program around models/gpt2.h and generate.h, driven by tests/reference/compare_gpt2.py.
//
//   gpt2_tool JOB.json
//
// Opens the folder "model" as "class" (GPT2Model or GPT2LMHeadModel) and, where there is one, the "adapter"
// on it; runs the batches b0, b1, … of the tensors in "inputs", b0.chunks tokens at a time where they say so,
// goes on with the prompts of "generate" and writes all results to "outputs". Then it writes what the job
// asks for: the adapter to "save_adapter", the model, merged if it has one, to "save_model", a plain
// model without its folder's help to "save_new".
#include "peft/io/peft_directory.h"
#include "peft/io/safetensors.h"
#include "peft/model/merge.h"
#include "peft/models/generate.h"
#include "peft/models/gpt2.h"
#include "peft/models/save_pretrained.h"

#include <iostream>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace peft::models;
using Json = nlohmann::ordered_json;
using torch::Tensor;
using Tensors = std::vector<std::pair<std::string, Tensor>>;

void add(Tensors& tensors, const std::string& name, const Tensor& tensor) {
  if (tensor.defined()) tensors.emplace_back(name, tensor.contiguous());
}

/// The whole batch at once, or in chunks, each with the cache of those before.
template <class Model>
GPT2Output run(Model& model, const GPT2Inputs& batch, const Tensor& chunks) {
  if (!chunks.defined()) return model->forward(batch);
  GPT2Output result;
  std::vector<Tensor> hidden, logits;
  int64_t begin = 0;
  for (int64_t i = 0; i < chunks.numel(); ++i) {
    const auto end = begin + chunks[i].item<int64_t>();
    const auto part = [&](const Tensor& tensor) {
      return tensor.defined() ? tensor.slice(1, begin, end) : tensor;
    };
    GPT2Inputs step;
    step.input_ids = part(batch.input_ids);
    step.inputs_embeds = part(batch.inputs_embeds);
    step.token_type_ids = part(batch.token_type_ids);
    step.position_ids = part(batch.position_ids);
    if (batch.attention_mask.defined()) step.attention_mask = batch.attention_mask.slice(1, 0, end);
    step.use_cache = true;
    step.cache = std::move(result.cache);
    result = model->forward(step);
    hidden.push_back(result.last_hidden_state);
    if (result.logits.defined()) logits.push_back(result.logits);
    begin = end;
  }
  result.last_hidden_state = torch::cat(hidden, 1);
  if (!logits.empty()) result.logits = torch::cat(logits, 1);
  return result;
}

template <class Model>
void run_batches(Model& model, const std::map<std::string, Tensor>& inputs, Tensors& outputs) {
  for (int i = 0;; ++i) {
    const auto prefix = "b" + std::to_string(i) + ".";
    const auto given = [&](const char* name) {
      const auto found = inputs.find(prefix + name);
      return found == inputs.end() ? Tensor() : found->second;
    };
    GPT2Inputs batch;
    batch.input_ids = given("input_ids");
    batch.inputs_embeds = given("inputs_embeds");
    batch.attention_mask = given("attention_mask");
    batch.token_type_ids = given("token_type_ids");
    batch.position_ids = given("position_ids");
    batch.labels = given("labels");
    batch.output_hidden_states = true;
    if (!batch.input_ids.defined() && !batch.inputs_embeds.defined()) return;
    const auto output = run(model, batch, given("chunks"));
    add(outputs, prefix + "last_hidden_state", output.last_hidden_state);
    add(outputs, prefix + "logits", output.logits);
    add(outputs, prefix + "loss", output.loss);
    for (size_t layer = 0; layer < output.hidden_states.size() && !given("chunks").defined(); ++layer) {
      add(outputs, prefix + "hidden_states." + std::to_string(layer), output.hidden_states[layer]);
    }
  }
}

GenerateOptions options_of(const Json& json) {
  GenerateOptions options;
  options.max_new_tokens(json.at("max_new_tokens").get<int64_t>());
  options.use_cache(json.value("use_cache", true)).do_sample(json.value("do_sample", false));
  options.temperature(json.value("temperature", 1.0)).top_p(json.value("top_p", 1.0));
  options.top_k(json.value("top_k", int64_t{50}));
  if (json.contains("eos_token_id")) options.eos_token_id(json["eos_token_id"].get<std::vector<int64_t>>());
  if (json.contains("pad_token_id")) options.pad_token_id(json["pad_token_id"].get<int64_t>());
  return options;
}

template <class Model>
void work(const Json& job) {
  const auto folder = job.at("model").get<std::string>();
  auto model = Model::from_pretrained(folder);
  if (job.contains("adapter")) peft::load_adapter(*model, job["adapter"].get<std::string>(), "loaded");
  const auto inputs = peft::load_safetensors(job.at("inputs").get<std::string>());
  const torch::NoGradGuard no_grad;
  Tensors outputs;
  run_batches(model, inputs, outputs);
  if constexpr (std::is_same_v<Model, GPT2LMHeadModel>) {
    for (size_t i = 0; i < job.value("generate", Json::array()).size(); ++i) {
      const auto& settings = job["generate"][i];
      const auto prefix = "g" + std::to_string(i) + ".";
      const auto mask = inputs.find(prefix + "attention_mask");
      if (settings.contains("seed")) torch::manual_seed(settings["seed"].get<uint64_t>());
      add(outputs, prefix + "texts",
          generate(model, inputs.at(prefix + "input_ids"), options_of(settings),
                   mask == inputs.end() ? Tensor() : mask->second));
    }
  }
  peft::save_safetensors(job.at("outputs").get<std::string>(), outputs);
  if (job.contains("save_adapter")) {
    peft::save_adapter(peft::adapter(*model, "loaded"), job["save_adapter"].get<std::string>());
  }
  if (job.contains("save_new")) save_pretrained(*model, job["save_new"].get<std::string>());
  if (job.contains("save_model")) {
    if (job.contains("adapter")) peft::merge(*model);
    save_pretrained(*model, job["save_model"].get<std::string>(), folder);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::cerr << "usage: gpt2_tool JOB.json\n";
    return 2;
  }
  try {
    const auto job = peft::internal::read_json_object(words[1]);
    job.value("class", "") == "GPT2Model" ? work<GPT2Model>(job) : work<GPT2LMHeadModel>(job);
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "gpt2_tool: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "gpt2_tool: " << error.what() << "\n";
  }
  return 1;
}
