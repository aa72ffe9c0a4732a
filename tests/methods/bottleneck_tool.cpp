// A program that trains bottleneck adapters, driven by tests/reference/compare_adapters.py.
//
//   bottleneck_tool JOB.json
//
// For each of the job's "cases": opens the folder "model" ("kind" bert or gpt2) in float64, draws an adapter
// of the AdapterHub configuration "config" from "seed", runs the batch b0 of "inputs", trains "steps" steps
// of AdamW on b0, b1, … from the generator's state "train_seed" and runs b0 again. What came of it goes to
// "outputs": c0.start.NAME and c0.end.NAME of every tensor, c0.plain, c0.first and c0.last logits, c0.losses.
#include "peft/io/config_json.h"
#include "peft/io/safetensors.h"
#include "peft/methods/compacter.h"
#include "peft/methods/invertible.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/models/bert.h"
#include "peft/models/gpt2.h"
#include "peft/train/optimizer.h"

#include <iostream>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using Json = nlohmann::ordered_json;
using torch::Tensor;
using Tensors = std::vector<std::pair<std::string, Tensor>>;

/// AdapterHub's keys, as options.
peft::BottleneckOptions options_of(const Json& json) {
  peft::BottleneckOptions options;
  std::vector<peft::JoinRole> places;
  if (json.at("mh_adapter").get<bool>()) places.push_back(peft::JoinRole::attention);
  if (json.at("output_adapter").get<bool>()) places.push_back(peft::JoinRole::feed_forward);
  options.places(places).leave_out(json.at("leave_out").get<std::vector<int64_t>>());
  const auto& factor = json.at("reduction_factor");
  if (factor.is_object()) {
    peft::BottleneckOptions::LayerFactors layers;
    for (const auto& [layer, value] : factor.items()) {
      if (layer == "default") {
        options.reduction_factor(value.get<double>());
      } else {
        layers[std::stoll(layer)] = value.get<double>();
      }
    }
    options.layer_factors(layers);
  } else {
    options.reduction_factor(factor.get<double>());
  }
  options.non_linearity(json.at("non_linearity").get<std::string>());
  options.original_ln_before(json.at("original_ln_before").get<bool>());
  options.original_ln_after(json.at("original_ln_after").get<bool>());
  options.ln_before(json.at("ln_before").get<bool>()).ln_after(json.at("ln_after").get<bool>());
  options.adapter_residual_before_ln(json.at("adapter_residual_before_ln").get<bool>());
  const auto& residual = json.at("residual_before_ln");
  options.residual(residual.is_string()   ? peft::BottleneckResidual::sum
                   : residual.get<bool>() ? peft::BottleneckResidual::output
                                          : peft::BottleneckResidual::input);
  const auto init = json.at("init_weights").get<std::string>();
  options.init_weights(init == "bert"          ? peft::BottleneckInit::bert
                       : init == "mam_adapter" ? peft::BottleneckInit::mam_adapter
                                               : peft::BottleneckInit::houlsby);
  if (!json.at("init_weights_seed").is_null()) {
    options.init_weights_seed(json.at("init_weights_seed").get<int64_t>());
  }
  options.parallel(json.at("is_parallel").get<bool>()).gating(json.at("use_gating").get<bool>());
  const auto& scaling = json.at("scaling");
  if (scaling.is_string()) {
    options.trained_scaling(scaling == "learned" ? peft::TrainedScaling::scalar
                                                 : peft::TrainedScaling::channel);
  } else {
    options.scaling(scaling.get<double>());
  }
  options.dropout(json.at("dropout").get<double>());
  options.stochastic_depth(json.at("stochastic_depth").get<double>());
  if (json.at("phm_layer").get<bool>()) {
    options.phm(peft::PhmOptions()
                    .dim(json.at("phm_dim").get<int64_t>())
                    .rank(json.at("phm_rank").get<int64_t>())
                    .factorized_weights(json.at("factorized_phm_W").get<bool>())
                    .shared_weights(json.at("shared_W_phm").get<bool>())
                    .factorized_rule(json.at("factorized_phm_rule").get<bool>())
                    .shared_rule(json.at("shared_phm_rule").get<bool>())
                    .learn_rule(json.at("learn_phm").get<bool>())
                    .rule_init(json.at("phm_c_init") == "normal" ? peft::PhmRuleInit::normal
                                                                 : peft::PhmRuleInit::uniform)
                    .init_range(json.at("phm_init_range").get<double>())
                    .bias(json.at("phm_bias").get<bool>()));
  }
  return options;
}

const auto double_precision = peft::models::PretrainedOptions().dtype(torch::kFloat64);

using Classifier = peft::models::BertForSequenceClassification;
void open(Classifier& model, const std::string& folder) {
  model = Classifier::from_pretrained(folder, {}, double_precision);
}
peft::models::EncoderInputs batch_of(Classifier&) { return {}; }
Tensor loss_of(Classifier& model, const peft::models::EncoderInputs& batch) {
  return model->forward(batch).loss;
}

using Decoder = peft::models::GPT2LMHeadModel;
void open(Decoder& model, const std::string& folder) {
  model = Decoder::from_pretrained(folder, double_precision);
}
peft::models::GPT2Inputs batch_of(Decoder&) { return {}; }
/// In float64, where the model's own is in float32.
Tensor loss_of(Decoder& model, const peft::models::GPT2Inputs& batch) {
  const auto logits = model->forward(batch).logits;
  return at::cross_entropy_loss(logits.slice(1, 0, -1).flatten(0, 1), batch.labels.slice(1, 1).flatten());
}

template <class Model>
void run_case(const std::string& prefix, const Json& job, const Json& setup,
              const std::map<std::string, Tensor>& inputs, Tensors& outputs) {
  Model model{nullptr};
  open(model, job.at("model").get<std::string>());
  std::vector<decltype(batch_of(model))> batches;
  for (int i = 0; inputs.count("b" + std::to_string(i) + ".input_ids"); ++i) {
    const auto name = "b" + std::to_string(i) + ".";
    auto batch = batch_of(model);
    batch.input_ids = inputs.at(name + "input_ids");
    batch.attention_mask = inputs.at(name + "attention_mask");
    batch.labels = inputs.at(name + "labels");
    batches.push_back(batch);
  }
  const auto logits = [&](const char* what) {
    const torch::NoGradGuard no_grad;
    model->eval();
    outputs.emplace_back(prefix + what, model->forward(batches.front()).logits.contiguous());
  };
  const auto tensors = [&](const peft::Adapter& adapter, const std::string& when) {
    for (const auto& [name, tensor] : adapter.named_tensors()) {
      outputs.emplace_back(prefix + when + "." + name, tensor.detach().clone());
    }
  };

  logits("plain");
  const auto& config = setup.at("config");
  std::vector<peft::Part> parts{peft::on(options_of(config))};
  if (!config.at("inv_adapter").is_null()) {
    parts.push_back(peft::on(peft::InvertibleOptions(config.at("inv_adapter_reduction_factor").get<double>())
                                 .non_linearity(config.at("non_linearity").get<std::string>())));
  }
  torch::manual_seed(setup.at("seed").get<uint64_t>());
  const auto adapter = peft::add_adapter(*model, parts, "case");
  tensors(adapter, "start");
  logits("first");
  peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(setup.at("lr").get<double>()).weight_decay(0.01));
  torch::manual_seed(setup.at("train_seed").get<uint64_t>());
  model->train();
  std::vector<double> losses;
  for (size_t step = 0; step < setup.at("steps").get<size_t>(); ++step) {
    auto loss = loss_of(model, batches[step % batches.size()]);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.template item<double>());
  }
  tensors(adapter, "end");
  outputs.emplace_back(prefix + "losses", torch::tensor(losses, torch::kFloat64));
  logits("last");
  {
    const auto off = peft::disabled(*model);
    logits("off");
  }
}

void run(const std::string& path) {
  const auto job = peft::internal::read_json_object(path);
  const auto inputs = peft::load_safetensors(job.at("inputs").get<std::string>());
  Tensors outputs;
  for (size_t i = 0; i < job.at("cases").size(); ++i) {
    const auto prefix = "c" + std::to_string(i) + ".";
    if (job.at("kind") == "bert") {
      run_case<Classifier>(prefix, job, job["cases"][i], inputs, outputs);
    } else {
      run_case<Decoder>(prefix, job, job["cases"][i], inputs, outputs);
    }
  }
  peft::save_safetensors(job.at("outputs").get<std::string>(), outputs);
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::cerr << "usage: bottleneck_tool JOB.json\n";
    return 2;
  }
  try {
    run(words[1]);
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "bottleneck_tool: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "bottleneck_tool: " << error.what() << "\n";
  }
  return 1;
}
