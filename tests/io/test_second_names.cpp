#include "catch.h"
#include "io/temporary_folder.h"
#include "models/tiny_encoder.h"
#include "peft/io/peft_directory.h"
#include "peft/methods/lora.h"
#include "peft/model/add_adapter.h"
#include "peft/models/deberta_v2.h"
#include "peft/models/load.h"

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

using namespace peft::models;
using peft::Part;
using peft_test::complaint;
using peft_test::difference;
using peft_test::TemporaryFolder;
using peft_test::Tensors;
using Keys = std::vector<std::string>;

namespace {

/// A head of masked words, and the keys of its bias in Python's files.
struct Head {
  std::function<AnyEncoder()> model;
  std::string query, path, second, own;
};

template <class Model, class Config>
Head head(const Config& config, std::string query, std::string path, const std::string& inner) {
  const auto bias = "base_model.model." + inner;
  return {[config] {
            torch::manual_seed(3);
            Model model(config);
            model->eval();
            return AnyEncoder(model);
          },
          std::move(query), std::move(path), bias + ".bias", bias + ".decoder.bias"};
}
Head bert(bool tied) {
  return head<BertForMaskedLM>(peft_test::tiny().tie_word_embeddings(tied), "query", "cls",
                               "cls.predictions");
}
Head roberta(bool tied) {
  return head<RobertaForMaskedLM>(peft_test::tiny_roberta().tie_word_embeddings(tied), "query", "lm_head",
                                  "lm_head");
}
Head deberta(bool tied) {
  return head<DebertaV2ForMaskedLM>(peft_test::tiny_deberta_v2().tie_word_embeddings(tied), "query_proj",
                                    "cls", "cls.predictions");
}
/// Whose output layer is no module in transformers.
Head new_deberta() {
  return head<DebertaV2ForMaskedLM>(peft_test::tiny_deberta_v2().legacy(false), "query_proj",
                                    "lm_predictions", "lm_predictions.lm_head");
}

/// A LoRA with more beside it, moved at random and written. Returns what was said.
Keys write(const Head& head, const AnyEncoder& model, const Part& more, const std::filesystem::path& folder) {
  const auto adapter =
      peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({head.query})), more});
  const torch::NoGradGuard no_grad;
  for (auto& tensor : adapter.parameters()) tensor.add_(torch::randn_like(tensor), 0.1);
  return peft::save_adapter(adapter, folder);
}
Part saved(const Head& head) { return peft::on(peft::ReplaceOptions(), peft::named({head.path})); }
Part biases() { return peft::on(peft::BiasOptions(), peft::all()); }

Tensors read(const std::filesystem::path& folder) {
  Tensors tensors;
  for (const auto& [key, tensor] : peft::load_safetensors(folder / "adapter_model.safetensors")) {
    tensors.emplace(key, tensor.clone());
  }
  return tensors;
}
Keys keys_of(const std::filesystem::path& folder) {
  Keys keys;
  for (const auto& [key, tensor] : read(folder)) keys.push_back(key);
  return keys;
}
void write_tensors(const std::filesystem::path& folder, const Tensors& tensors) {
  peft::save_safetensors(folder / "adapter_model.safetensors", tensors);
}

torch::Tensor logits(const AnyEncoder& model) {
  const torch::NoGradGuard no_grad;
  return model->forward(peft_test::roberta_batch()).logits;
}
/// Of a new model with the adapter in a folder.
torch::Tensor loaded(const Head& head, const std::filesystem::path& folder) {
  const auto model = head.model();
  peft::load_adapter(*model, folder);
  return logits(model);
}

}  // namespace

TEST_CASE("Files have both names of a masked-LM head's bias, and are read with either", "[peft_directory]") {
  const auto each = GENERATE(bert(true), roberta(true), deberta(true));
  const bool whole = GENERATE(true, false);
  CAPTURE(each.own, whole);
  const TemporaryFolder folder;
  const auto model = each.model();
  const auto plain = logits(model);
  CHECK(write(each, model, whole ? saved(each) : biases(), folder / "a").empty());
  const auto expected = logits(model);
  CHECK(difference(expected, plain) > 0.01);
  const auto tensors = read(folder / "a");
  REQUIRE(tensors.count(each.second) == 1);
  REQUIRE(tensors.count(each.own) == 1);
  CHECK(tensors.at(each.second).equal(tensors.at(each.own)));
  CHECK(difference(loaded(each, folder / "a"), expected) < 1e-6);

  for (const auto& left_out : {each.second, each.own}) {
    auto some = tensors;
    some.erase(left_out);
    write_tensors(folder / "a", some);
    CHECK(difference(loaded(each, folder / "a"), expected) < 1e-6);
  }
  auto others = tensors;
  others.at(each.second)[3] += 1;
  write_tensors(folder / "a", others);
  CHECK_THAT(complaint([&] { loaded(each, folder / "a"); }),
             Catch::EndsWith("'" + each.second + "' and '" + each.own +
                             "' are one tensor of the base and must be equal, but differ"));
}

TEST_CASE("The second bias of an untied head is one that nothing uses", "[peft_directory]") {
  const auto each = GENERATE(bert(false), roberta(false), deberta(false));
  const bool whole = GENERATE(true, false);
  CAPTURE(each.own, whole);
  const TemporaryFolder folder;
  const auto model = each.model();
  CHECK(write(each, model, whole ? saved(each) : biases(), folder / "a").empty());
  const auto expected = logits(model);
  auto tensors = read(folder / "a");
  REQUIRE(tensors.count(each.second) == 1);
  tensors.at(each.second) += 1;
  write_tensors(folder / "a", tensors);
  CHECK(difference(loaded(each, folder / "a"), expected) < 1e-6);
  tensors.erase(each.own);
  write_tensors(folder / "a", tensors);
  CHECK_THAT(complaint([&] { loaded(each, folder / "a"); }),
             Contains("'" + each.own + "' expected (20), but it is missing"));
}

TEST_CASE("A head whose output layer Python does not have is its other layers and a bias",
          "[peft_directory]") {
  const auto each = new_deberta();
  const TemporaryFolder folder;
  const auto model = each.model();
  CHECK(write(each, model, biases(), folder / "a").empty());
  auto tensors = read(folder / "a");
  CHECK(tensors.count(each.second) == 1);
  CHECK(tensors.count(each.own) == 0);
  CHECK(difference(loaded(each, folder / "a"), logits(model)) < 1e-6);

  // As Python saves it whole.
  auto config = peft::internal::read_json_object(folder / "a" / "adapter_config.json");
  config["bias"] = "none";
  config["modules_to_save"] = {"lm_predictions"};
  std::erase_if(tensors, [](const auto& item) {
    return item.first.find("lm_predictions") == std::string::npos &&
           item.first.find("lora_") == std::string::npos;
  });
  const std::string inner = "base_model.model.lm_predictions.lm_head.";
  tensors[inner + "dense.weight"] = torch::randn({8, 8});
  tensors[inner + "LayerNorm.weight"] = torch::randn({8});
  write_tensors(folder / "a", tensors);
  peft_test::write_bytes(folder / "a" / "adapter_config.json", config.dump());
  const auto other = each.model();
  const auto adapter = peft::load_adapter(*other, folder / "a");
  CHECK(peft::save_adapter(adapter, folder / "b").empty());
  CHECK(keys_of(folder / "b") == keys_of(folder / "a"));
  CHECK(peft::internal::read_json_object(folder / "b" / "adapter_config.json")["modules_to_save"] ==
        Keys{"lm_predictions"});
  CHECK(difference(loaded(each, folder / "b"), logits(other)) < 1e-6);

  // With a matrix of its own it is no longer what Python has.
  const auto ours = each.model();
  const auto said = write(each, ours, saved(each), folder / "c");
  REQUIRE(said.size() == 1);
  CHECK_THAT(said.front(), Contains("'lm_predictions.lm_head.decoder' has a matrix of its own"));
  CHECK(difference(loaded(each, folder / "c"), logits(ours)) < 1e-6);
}
