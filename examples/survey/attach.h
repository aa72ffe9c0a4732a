// The methods of the survey, and how one is put on a model.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "finetune/family_targets.h"
#include "finetune/method.h"
#include "finetune/selective_parts.h"
#include "peft/core/adapter.h"
#include "peft/io/peft_formats.h"
#include "peft/methods/fusion.h"
#include "survey/model.h"

namespace survey {

/// Steps of the runs that share out ranks: enough for AdaLoRA to prune and IncreLoRA to grow to the end.
inline constexpr int64_t schedule_steps = 40;

/// Every method that peft-finetune knows, with what it does not do without.
inline std::vector<std::string> default_methods() {
  const std::map<std::string, std::string> keys{
      {"trainable_tokens", ":indices=[10,11,12,13,14,15,16,17,18,19]"}};
  std::vector<std::string> methods;
  for (const auto& entry : finetune::method_table()) {
    const auto found = keys.find(entry.name);
    methods.push_back(entry.name + (found == keys.end() ? "" : found->second));
  }
  return methods;
}

/// Reads a method for a model. Throws: what `parse_method` throws.
inline finetune::Method read_method(const std::string& text, const SurveyModel& model) {
  // The adapters it fuses are not folders here.
  if (text == "fusion") {
    finetune::Method method;
    method.name = method.text = text;
    method.fusion = peft::FusionOptions({"first", "second"});
    return method;
  }
  const auto name = finetune::internal::split_method(text).first;
  TORCH_CHECK_VALUE(name != "fusion", "--methods: fusion must be without keys, but got '", text, "'");
  finetune::internal::method_entry(name);
  auto method = finetune::parse_method(text, finetune::family_targets(name, model.type()), model.heads(),
                                       schedule_steps);
  finetune::leave_out_heads(method, model.module(), model.heads());
  TORCH_CHECK_VALUE(method.init != "eva" && method.init != "corda" && method.init != "lora_ga", "--methods ",
                    text, ": init must not be one that reads data, but got ", method.init,
                    " (hint: leave it out; where LoRA starts changes none of the figures)");
  return method;
}

namespace internal {

/// The method's parts without the copy of the head that `parse_method` puts last; of the head alone, that.
inline std::vector<peft::Part> parts_without_head(const finetune::Method& method,
                                                  const std::vector<std::string>& heads) {
  if (method.head_only()) return {peft::on(peft::ReplaceOptions(), peft::named(heads))};
  auto parts = method.parts;
  parts.pop_back();
  const auto saved = finetune::MethodValues(method.name, method.given).list("modules_to_save");
  if (!saved.empty()) parts.push_back(peft::on(peft::ReplaceOptions(), peft::named(saved)));
  return parts;
}

}  // namespace internal

/// The mean loss on random labels.
inline Tensor loss_of(const SurveyModel& model, const peft::models::EncoderInputs& inputs,
                      const Tensor& labels) {
  const auto logits = model.forward(inputs).logits;
  return logits.size(1) == 1 ? at::mse_loss(logits.squeeze(1), labels.to(logits.scalar_type()))
                             : at::cross_entropy_loss(logits, labels);
}

/// Puts a method on the model; masks and HiFi choose what they train by random texts.
inline peft::Adapter attach(const SurveyModel& model, const finetune::Method& method) {
  if (method.fusion) {
    for (const auto& name : method.fusion->adapters())
      peft::add_adapter(model.module(), peft::pfeiffer(), name);
    return peft::add_fusion(model.module(), *method.fusion);
  }
  const auto adapter =
      peft::add_adapter(model.module(), internal::parts_without_head(method, model.heads()), "default");
  const finetune::MethodValues values(method.name, method.given);
  constexpr int64_t texts = 8, length = 16;
  int64_t left = texts;
  if (method.name == "magnitude") {
    peft::initialize_magnitude(adapter, finetune::internal::magnitude_options(values));
  } else if (method.name == "rand_uniform") {
    peft::initialize_rand_uniform(adapter, values.integer("count", 100000));
  } else if (method.name == "rand_row_col") {
    peft::initialize_rand_row_col(adapter);
  } else if (method.name == "hifi") {
    const auto next = [&](Tensor&) {
      if (left-- <= 0) return false;
      model.forward(model.inputs(1, length));
      return true;
    };
    peft::initialize_hifi(model.module(), adapter, next, finetune::internal::hifi_options(values));
  } else if (method.name == "fish") {
    const auto next_loss = [&] {
      if (left-- <= 0) return Tensor();
      return loss_of(model, model.inputs(1, length), torch::zeros({1}, torch::kLong));
    };
    peft::initialize_fish(model.module(), adapter, next_loss, finetune::internal::fish_options(values));
  }
  return adapter;
}

}  // namespace survey
