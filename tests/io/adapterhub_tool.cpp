// A program around io/adapterhub.h, driven by tests/reference/compare_adapterhub.py.
//
//   adapterhub_tool JOBS.json
//
// JOBS is a list; for each job a line of JSON is printed, {"notes": […]} or {"error": …}. A job reads the
// base in "base" as a "model" (transformers' class), loads "adapters" (names and folders), and the fusion of
// them in "fusion" if there is one, runs the batch in "inputs", and leaves in "out" outputs.safetensors
// (adapted, disabled) and what was loaded, written again, in folders of their names and fusion/.
#include "peft/io/adapterhub.h"

#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "peft/io/adapterhub_fusion.h"
#include "peft/models/gpt2.h"
#include "peft/models/load.h"

namespace {

using Json = nlohmann::ordered_json;
using Strings = std::vector<std::string>;
using Tensors = std::map<std::string, torch::Tensor>;

struct Base {
  std::shared_ptr<torch::nn::Module> module;
  std::function<torch::Tensor(const Tensors&)> run;
};

template <class Inputs, class Model>
Base open(Model model) {
  return {model.ptr(), [model](const Tensors& given) mutable {
            Inputs batch;
            batch.input_ids = given.at("input_ids");
            batch.attention_mask = given.at("attention_mask");
            const auto output = model->forward(batch);
            if constexpr (requires { output.start_logits; }) {
              if (output.start_logits.defined())
                return torch::stack({output.start_logits, output.end_logits}, -1);
            }
            return output.logits.defined() ? output.logits : output.last_hidden_state;
          }};
}

Base open_base(const std::string& model, const std::string& folder) {
  using namespace peft::models;
  if (model == "GPT2Model") return open<GPT2Inputs>(GPT2Model::from_pretrained(folder));
  if (model == "GPT2LMHeadModel") return open<GPT2Inputs>(GPT2LMHeadModel::from_pretrained(folder));
  return open<EncoderInputs>(load(folder));
}

Json run(const Json& job) {
  const torch::NoGradGuard no_grad;
  const auto text = [&](const char* key) { return job.at(key).get<std::string>(); };
  auto base = open_base(text("model"), text("base"));
  const auto inputs = peft::load_safetensors(text("inputs"));
  Strings notes;
  const auto note = [&](const std::string& line) { notes.push_back(line); };
  Strings names;
  for (const auto& [name, folder] : job.at("adapters").items()) {
    names.push_back(name);
    peft::load_adapterhub(*base.module, folder.get<std::string>(), name, /*trainable=*/false, note,
                          /*with_head=*/!job.contains("fusion"));
  }
  std::string fusion;
  if (job.contains("fusion")) {
    fusion = peft::load_adapterhub_fusion(*base.module, text("fusion"), names, "", false, note).name();
  }
  const std::filesystem::path out = text("out");
  std::filesystem::create_directories(out);
  const auto adapted = base.run(inputs);
  {
    const auto off = peft::disabled(*base.module);
    peft::save_safetensors(out / "outputs.safetensors",
                           {{"adapted", adapted}, {"disabled", base.run(inputs)}});
  }
  for (const auto& name : names) {
    for (const auto& line : peft::save_adapterhub(*base.module, name, out / name)) notes.push_back(line);
  }
  if (!fusion.empty()) peft::save_adapterhub_fusion(*base.module, fusion, out / "fusion");
  return {{"notes", notes}};
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::cerr << "usage: adapterhub_tool JOBS.json\n";
    return 2;
  }
  std::ifstream stream(words[1]);
  for (const auto& job : Json::parse(stream)) {
    Json line;
    try {
      line = run(job);
    } catch (const c10::Error& error) {
      line = {{"error", error.what_without_backtrace()}};
    } catch (const std::exception& error) {
      line = {{"error", error.what()}};
    }
    std::cout << line.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
  }
  return 0;
}
