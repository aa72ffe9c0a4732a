// A program around models/load.h, driven by tests/reference/compare_encoders.py.
//
//   encoder_tool JOBS.json
//
// JOBS is a list; for each job a line of JSON is printed, {"notes": […]} or {"error": …}. A job opens the
// folder "model", for "task" where it has one, with "labels" where it has them; a missing head is drawn from
// "seed". It runs the batches b0, b1, … of the file "inputs" and writes what they give to the file "outputs";
// with "save" it writes the model, as one built from a config, to that folder.
#include "peft/io/safetensors.h"
#include "peft/models/load.h"
#include "peft/models/save_pretrained.h"

#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using Json = nlohmann::ordered_json;
using Tensors = std::vector<std::pair<std::string, torch::Tensor>>;

void add(Tensors& tensors, const std::string& name, const torch::Tensor& tensor) {
  if (tensor.defined()) tensors.emplace_back(name, tensor.contiguous());
}

void run_batches(const peft::models::AnyEncoder& model, const std::string& in, const std::string& out) {
  const torch::NoGradGuard no_grad;
  const auto inputs = peft::load_safetensors(in);
  Tensors outputs;
  for (int i = 0;; ++i) {
    const auto prefix = "b" + std::to_string(i) + ".";
    const auto given = [&](const char* name) {
      const auto found = inputs.find(prefix + name);
      return found == inputs.end() ? torch::Tensor() : found->second;
    };
    peft::models::EncoderInputs batch;
    batch.input_ids = given("input_ids");
    batch.inputs_embeds = given("inputs_embeds");
    batch.attention_mask = given("attention_mask");
    batch.token_type_ids = given("token_type_ids");
    batch.position_ids = given("position_ids");
    batch.labels = given("labels");
    batch.start_positions = given("start_positions");
    batch.end_positions = given("end_positions");
    batch.output_hidden_states = true;
    if (!batch.input_ids.defined() && !batch.inputs_embeds.defined()) break;
    const auto output = model->forward(batch);
    add(outputs, prefix + "last_hidden_state", output.last_hidden_state);
    add(outputs, prefix + "pooler_output", output.pooler_output);
    add(outputs, prefix + "logits", output.logits);
    add(outputs, prefix + "start_logits", output.start_logits);
    add(outputs, prefix + "end_logits", output.end_logits);
    add(outputs, prefix + "loss", output.loss);
    add(outputs, prefix + "embedding", peft::models::embed(output.last_hidden_state, batch.attention_mask));
    for (size_t layer = 0; layer < output.hidden_states.size(); ++layer) {
      add(outputs, prefix + "hidden_states." + std::to_string(layer), output.hidden_states[layer]);
    }
  }
  peft::save_safetensors(out, outputs);
}

Json work(const Json& job) {
  using peft::models::Task;
  static const std::map<std::string, Task> tasks{{"encoder", Task::embedding},
                                                 {"texts", Task::sequence_classification},
                                                 {"tokens", Task::token_classification},
                                                 {"spans", Task::question_answering},
                                                 {"words", Task::masked_lm}};
  Json notes = Json::array();
  peft::models::LoadOptions options;
  options.pretrained().note([&notes](const std::string& line) { notes.push_back(line); });
  if (job.contains("task")) options.task(tasks.at(job["task"].get<std::string>()));
  if (job.contains("labels")) options.labels(job["labels"].get<int64_t>());
  if (job.contains("seed")) torch::manual_seed(job["seed"].get<uint64_t>());
  const auto model = peft::models::load(job["model"].get<std::string>(), options);
  run_batches(model, job["inputs"].get<std::string>(), job["outputs"].get<std::string>());
  if (job.contains("save")) peft::models::save_pretrained(*model, job["save"].get<std::string>());
  return {{"notes", notes}};
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::cerr << "usage: encoder_tool JOBS.json\n";
    return 2;
  }
  std::ifstream stream(words[1]);
  for (const auto& job : Json::parse(stream)) {
    Json line;
    try {
      line = work(job);
    } catch (const c10::Error& error) {
      line = {{"error", error.what_without_backtrace()}};
    } catch (const std::exception& error) {
      line = {{"error", error.what()}};
    }
    std::cout << line.dump() << std::endl;
  }
  return 0;
}
