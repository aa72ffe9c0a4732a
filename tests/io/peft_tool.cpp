// A program around io/peft_directory.h, driven by tests/reference/compare_peft.py and compare_methods.py.
//
//   peft_tool JOBS.json
//
// JOBS is a list; for each job a line of JSON is printed, {"notes": […]} or {"error": …}. A job reads the
// base in "base" (a BERT's folder, or one with toy.safetensors or rare.safetensors) and the tensors in
// "inputs", then either loads the adapter in "adapter", or makes one from "options" after
// manual_seed("seed"), writes it to "out"/start, moves it at random and goes on with it. In "out" it leaves
// outputs.safetensors (adapted, merged, unmerged, disabled) and adapter/. What cannot be merged has
// "merge_error" in its line.
//
// With "steps" it trains the loaded or made adapter by "optimizer" at the rate "lr": outputs.safetensors has
// the losses and the outputs after the last step, adapter/ the adapter, the line its "count" of weights.
#include <torch/nn/functional/loss.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "io/toy_model.h"
#include "peft/io/peft_directory.h"
#include "peft/methods/bias.h"
#include "peft/methods/increlora.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"
#include "peft/models/bert.h"
#include "peft/train/optimizer.h"

namespace {

using Json = nlohmann::ordered_json;

struct Base {
  std::shared_ptr<torch::nn::Module> module;
  std::function<torch::Tensor(const std::map<std::string, torch::Tensor>&)> run;
};

Base open_base(const std::filesystem::path& folder) {
  if (std::filesystem::exists(folder / "config.json")) {
    auto model = peft::models::BertForSequenceClassification::from_pretrained(folder);
    return {model.ptr(), [model](const auto& inputs) mutable {
              peft::models::BertInputs batch;
              batch.input_ids = inputs.at("input_ids");
              batch.attention_mask = inputs.at("attention_mask");
              return model->forward(batch).logits;
            }};
  }
  const auto open = [&](auto model, const char* file) -> Base {
    const auto tensors = peft::load_safetensors(folder / file);
    model->to(tensors.begin()->second.scalar_type());
    const torch::NoGradGuard no_grad;
    for (const auto& item : model->named_parameters()) item.value().copy_(tensors.at(item.key()));
    model->eval();
    return {model.ptr(), [model](const auto& inputs) mutable { return model->forward(inputs.at("ids")); }};
  };
  if (std::filesystem::exists(folder / "rare.safetensors"))
    return open(peft_test::Rare(), "rare.safetensors");
  return open(peft_test::Toy(), "toy.safetensors");
}

template <class Value>
std::vector<peft::Pattern<Value>> patterns(const Json& options, const char* key) {
  std::vector<peft::Pattern<Value>> found;
  if (!options.contains(key)) return found;
  for (const auto& [pattern, value] : options[key].items())
    found.emplace_back(pattern, value.template get<Value>());
  return found;
}

peft::Adapter make(torch::nn::Module& model, const Json& options) {
  if (options.contains("target_rank")) {
    const auto growing = peft::IncreLoraOptions(options["target_rank"].get<int64_t>())
                             .init_warmup(0)
                             .incre_interval(2)
                             .top_h(1)
                             .reg_orth_coef(0.1);
    const auto names = options["target_modules"].get<std::vector<std::string>>();
    return peft::add_adapter(model, growing, peft::named(names));
  }
  auto lora = peft::LoraOptions(options.value("r", int64_t{8}))
                  .alpha(options.value("lora_alpha", 8.0))
                  .dropout(options.value("lora_dropout", 0.0))
                  .rslora(options.value("use_rslora", false))
                  .lora_bias(options.value("lora_bias", false))
                  .rank_pattern(patterns<int64_t>(options, "rank_pattern"))
                  .alpha_pattern(patterns<double>(options, "alpha_pattern"));
  if (options.contains("init_lora_weights")) {
    const auto& init = options["init_lora_weights"];
    lora.init(init == "gaussian" ? peft::LoraInit::gaussian
              : init == "loftq"  ? peft::LoraInit::loftq
                                 : peft::LoraInit::random);
  }
  const auto strings = [&](const char* key) { return options.value(key, std::vector<std::string>()); };
  const auto saved = strings("modules_to_save");
  auto left_out = strings("exclude_modules");
  left_out.insert(left_out.end(), saved.begin(), saved.end());
  const auto target = [&] {
    if (options["target_modules"] == "all-linear") {
      return peft::where([](const peft::SiteInfo& site) { return site.layer == "Linear"; });
    }
    if (options["target_modules"].is_string()) return peft::matching(options["target_modules"]);
    auto names = peft::named(strings("target_modules"));
    if (!options.contains("layers_to_transform")) return names;
    return names.layers(options["layers_to_transform"].get<std::vector<int64_t>>(),
                        strings("layers_pattern"));
  }();
  std::vector<peft::Part> parts{peft::on(lora, left_out.empty() ? target : target.exclude(left_out))};
  if (!saved.empty()) parts.push_back(peft::on(peft::ReplaceOptions(), peft::named(saved)));
  const auto bias = options.value("bias", "none");
  if (bias == "all") {
    peft::Origin everywhere;
    everywhere.pattern = ".*";
    everywhere.exclude = saved;
    parts.push_back(
        peft::on(peft::BiasOptions(), peft::Target(everywhere, [](const auto&) { return true; })));
  }
  const auto adapter = peft::add_adapter(model, parts);
  if (bias != "lora_only") return adapter;
  std::vector<std::string> biased;
  for (const auto& entry : adapter.entries()) {
    if (entry.piece->method() == "lora" && entry.site->info().has_bias())
      biased.push_back(entry.site->path());
  }
  auto plan =
      peft::internal::plan_adapter(model, {peft::on(peft::BiasOptions(), peft::named(biased))}, "default",
                                   /*extends=*/true);
  peft::internal::initialize(plan);
  peft::internal::commit(plan, adapter, /*trainable=*/true);
  return adapter;
}

/// The base with the weights that LoftQ's pieces put in its place.
void save_quantized(const peft::Adapter& adapter, const std::filesystem::path& base,
                    const std::filesystem::path& out) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& [key, tensor] : peft::load_safetensors(base)) tensors[key] = tensor;
  bool any = false;
  for (const auto& entry : adapter.entries()) {
    const auto* lora = dynamic_cast<const peft::LoraImpl*>(entry.piece.get());
    if (!lora || !lora->loftq_weight.defined()) continue;
    tensors[entry.site->path() + ".weight"] = lora->loftq_weight;
    any = true;
  }
  if (any) peft::save_safetensors(out, tensors);
}

/// The losses of a number of steps: with LibTorch's own optimisers, or ours, which runs a method's
/// controller.
torch::Tensor train(const peft::Adapter& adapter, const Json& job,
                    const std::function<torch::Tensor()>& logits, const torch::Tensor& labels) {
  const auto lr = job["lr"].get<double>();
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  if (job["optimizer"] == "sgd") {
    optimizer = std::make_unique<torch::optim::SGD>(adapter.parameters(), torch::optim::SGDOptions(lr));
  } else if (job["optimizer"] == "peft") {
    optimizer = std::make_unique<peft::AdamW>(adapter, torch::optim::AdamWOptions(lr));
  } else {
    optimizer = std::make_unique<torch::optim::AdamW>(adapter.parameters(), torch::optim::AdamWOptions(lr));
  }
  std::vector<float> losses;
  for (int step = 0; step < job["steps"].get<int>(); ++step) {
    const auto loss = torch::nn::functional::cross_entropy(logits(), labels);
    losses.push_back(loss.item<float>());
    optimizer->zero_grad();
    loss.backward();
    optimizer->step();
  }
  return torch::tensor(losses);
}

Json work(const Json& job) {
  Json notes = Json::array();
  const auto note = [&](const std::string& line) { notes.push_back(line); };
  const std::filesystem::path out = job["out"].get<std::string>();
  std::filesystem::create_directories(out);
  const std::filesystem::path base = job["base"].get<std::string>();
  auto [model, run] = open_base(base);
  const auto inputs = peft::load_safetensors(job["inputs"].get<std::string>());
  if (job.contains("steps")) {
    torch::manual_seed(0);
    const auto adapter = job.contains("adapter")
                             ? peft::load_adapter(*model, job["adapter"].get<std::string>(), "default",
                                                  /*trainable=*/true, note)
                             : make(*model, job["options"]);
    const auto count = adapter.count();
    model->eval();
    const auto forward = [&, &forward = run] { return forward(inputs); };
    const auto losses = train(adapter, job, forward, inputs.at("labels"));
    const torch::NoGradGuard no_grad;
    const auto trained = forward();
    for (const auto& line : peft::save_adapter(adapter, out / "adapter")) note(line);
    if (!job.contains("adapter")) peft::merge(*model);
    peft::save_safetensors(out / "outputs.safetensors",
                           {{"losses", losses}, {"trained", trained}, {"merged", forward()}});
    return {{"notes", notes}, {"count", count}};
  }
  const torch::NoGradGuard no_grad;
  std::optional<peft::Adapter> adapter;
  if (job.contains("adapter")) {
    adapter =
        peft::load_adapter(*model, job["adapter"].get<std::string>(), "other", /*trainable=*/false, note);
  } else {
    torch::manual_seed(job["seed"].get<uint64_t>());
    adapter = make(*model, job["options"]);
    model->eval();
    peft::save_adapter(*adapter, out / "start");
    if (std::filesystem::exists(base / "toy.safetensors"))
      save_quantized(*adapter, base / "toy.safetensors", out / "start/toy.safetensors");
    for (auto& tensor : adapter->parameters()) tensor.add_(torch::randn_like(tensor), 0.1);
  }
  std::vector<std::pair<std::string, torch::Tensor>> outputs;
  outputs.emplace_back("adapted", run(inputs));
  Json line;
  try {
    peft::merge(*model);
    outputs.emplace_back("merged", run(inputs));
    peft::unmerge(*model);
    outputs.emplace_back("unmerged", run(inputs));
  } catch (const c10::Error& error) {
    line["merge_error"] = error.what_without_backtrace();
  }
  const auto off = peft::disabled(*model);
  outputs.emplace_back("disabled", run(inputs));
  peft::save_safetensors(out / "outputs.safetensors", outputs);
  for (const auto& text : peft::save_adapter(*adapter, out / "adapter")) note(text);
  line["notes"] = notes;
  return line;
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::cerr << "usage: peft_tool JOBS.json\n";
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
