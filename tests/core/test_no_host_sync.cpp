#include <ATen/record_function.h>

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"
#include "models/tiny_bert.h"
#include "peft/peft.h"

namespace nn = torch::nn;
using Names = std::vector<std::string>;
using peft::named;
using peft::on;

namespace {

/// The operations of this thread that would wait for a GPU if their tensors were there, while it lives.
class Waits {
 public:
  Waits() {
    names().clear();
    const auto note = [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
      static const std::set<std::string> waiting{
          "aten::item",      "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero",
          "aten::equal",     "aten::masked_select",       "aten::allclose",   "aten::_unique2",
          "aten::unique_dim"};
      if (waiting.count(function.name())) names().insert(function.name());
      return nullptr;
    };
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(note).scopes(
        {at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
  }
  ~Waits() { at::removeCallback(handle_); }
  Waits(const Waits&) = delete;
  Waits& operator=(const Waits&) = delete;

  static std::set<std::string>& names() {
    static thread_local std::set<std::string> found;
    return found;
  }

 private:
  at::CallbackHandle handle_;
};

}  // namespace

TEST_CASE("The watch for waits sees one", "[sync]") {
  const Waits waits;
  CHECK(torch::ones({}).item<float>() == 1);
  CHECK(Waits::names().count("aten::item") == 1);
}

// What is checked on the CPU alone (labels, masks, ids) is left out of the inputs.
TEST_CASE("No method's forward or backward asks a device for values", "[sync]") {
  const auto linear = named({"query", "value", "intermediate.dense"});
  const auto words = named({"word_embeddings"});
  std::vector<std::pair<std::string, peft::Part>> methods{
      {"lora", on(peft::LoraOptions(2), linear)},
      {"lora with dropout", on(peft::LoraOptions(2).dropout(0.1), linear)},
      {"lora on words", on(peft::LoraOptions(2), words)},
      {"dora", on(peft::DoraOptions(2), linear)},
      {"adalora", on(peft::AdaLoraOptions(100), linear)},
      {"increlora", on(peft::IncreLoraOptions(4), linear)},
      {"ia3", on(peft::Ia3Options(), linear)},
      {"vera", on(peft::VeraOptions(4), named({"query", "value"}))},
      {"loha", on(peft::LohaOptions(2), linear)},
      {"lokr", on(peft::LokrOptions(2), linear)},
      {"oft", on(peft::OftOptions(4), linear)},
      {"boft", on(peft::BoftOptions(4), linear)},
      {"bias", on(peft::BiasOptions(), linear)},
      {"replace", on(peft::ReplaceOptions(), linear)},
      {"layer norm", on(peft::LayerNormTuningOptions(), named({"LayerNorm"}))},
      {"houlsby", on(peft::houlsby().reduction_factor(2))},
      {"compacter", on(peft::compacter().reduction_factor(2))},
      {"prefix", on(peft::PrefixOptions(3), peft::all())},
      {"projected prefix", on(peft::PrefixOptions(3).projection(true), peft::all())},
      {"prompt", on(peft::PromptOptions(3), named({"embeddings.input"}))},
      {"p-tuning", on(peft::PTuningOptions(3), named({"embeddings.input"}))},
      {"multitask prompt",
       on(peft::MultitaskPromptOptions(peft::PromptOptions(3)), named({"embeddings.input"}))},
      {"invertible", on(peft::InvertibleOptions(), named({"embeddings.output"}))},
      {"trainable tokens", on(peft::TrainableTokensOptions(std::vector<int64_t>{1, 3}), words)},
  };
  for (auto& [name, part] : methods) {
    INFO(name);
    torch::manual_seed(1);
    auto model = peft_test::filled_classifier();
    const auto adapter = peft::add_adapter(*model, {part}, "a");
    model->train();
    peft_test::EncoderInputs inputs;
    inputs.input_ids = peft_test::batch().input_ids;
    for (const bool checkpoints : {false, true}) {
      for (const bool fast : {false, true}) {
        const peft::FastPaths paths(fast);
        model->gradient_checkpointing(checkpoints);
        const Waits waits;
        model->forward(inputs).logits.sum().backward();
        // LoHa and LoKr draw a number for their dropout on the CPU, as their reference does (on a GPU one
        // that stays there); of a linear solve, BOFT's, LibTorch's kernel for the CPU looks at the pivots.
        const bool looks = name == "loha" || name == "lokr" || name == "boft";
        const std::set<std::string> item{"aten::_local_scalar_dense", "aten::item"};
        CHECK(Waits::names() == (looks ? item : std::set<std::string>()));
      }
    }
    size_t reached = 0;
    for (const auto& parameter : adapter.parameters()) reached += parameter.grad().defined() ? 1 : 0;
    CHECK(reached > 0);
  }
}

TEST_CASE("Taking virtual tokens out of an output asks a device for nothing", "[sync]") {
  auto model = peft_test::filled_classifier();
  const auto options = peft::PromptOptions(3).after_embedding(true);
  peft::add_adapter(*model, options, peft::all(), "before");
  peft::add_adapter(*model, peft::PromptOptions(options).after_first(true), peft::all(), "after first");
  for (const bool in_rows : {false, true}) {
    std::optional<peft::RowAdapters> rows;
    if (in_rows) rows.emplace(Names{"before", "after first"});
    peft::set_active(*model, {"before"});
    const auto output = model->forward(peft_test::batch());
    const Waits waits;
    CHECK(peft::models::real_tokens(output.last_hidden_state, output).size(1) == 4);
    CHECK(Waits::names().empty());
  }
}
