#include <torch/torch.h>

#include "peft/io/adapterhub.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "models/tiny_encoder.h"
#include "peft/io/adapterhub_fusion.h"
#include "peft/methods/bias.h"
#include "peft/methods/compacter.h"
#include "peft/methods/dora.h"
#include "peft/methods/replace.h"
#include "peft/model/merge.h"
#include "peft/model/unified.h"
#include "peft/models/load.h"

using peft_test::batch;
using peft_test::filled_classifier;
using peft_test::read_bytes;
using peft_test::TemporaryFolder;
using peft_test::write_bytes;
using torch::Tensor;

namespace {

using Json = nlohmann::json;
using Parts = std::vector<peft::Part>;
using Strings = std::vector<std::string>;
using Tensors = std::map<std::string, Tensor>;

Json config_of(const std::filesystem::path& folder) {
  return Json::parse(read_bytes(folder / "adapter_config.json"));
}

void change_config(const std::filesystem::path& folder, const std::function<void(Json&)>& change) {
  auto json = config_of(folder);
  change(json);
  write_bytes(folder / "adapter_config.json", json.dump(2));
}

void change_tensors(const std::filesystem::path& folder, const std::function<void(Tensors&)>& change) {
  Tensors tensors;
  for (const auto& [key, tensor] : peft::load_safetensors(folder / "adapter.safetensors"))
    tensors[key] = tensor.clone();
  change(tensors);
  peft::save_safetensors(folder / "adapter.safetensors", tensors);
}

Strings keys_of(const std::filesystem::path& file) {
  Strings keys;
  for (const auto& item : peft::load_safetensors(file)) keys.push_back(item.first);
  return keys;
}

void perturb(const peft::Adapter& adapter) {
  const torch::NoGradGuard no_grad;
  for (auto& tensor : adapter.parameters()) tensor.add_(torch::randn_like(tensor), 0.2);
}

/// A model with an adapter "topics" whose tensors are no start's.
peft_test::BertForSequenceClassification adapted(const Parts& parts) {
  auto model = filled_classifier();
  torch::manual_seed(3);
  perturb(peft::add_adapter(*model, parts, "topics"));
  return model;
}

template <class Model>
peft::Adapter load(Model& model, const std::filesystem::path& folder, Strings* notes = nullptr,
                   bool trainable = false) {
  return peft::load_adapterhub(*model, folder, "read", trainable, [&](const std::string& line) {
    if (notes) notes->push_back(line);
  });
}

/// What `load_adapterhub` says is wrong.
std::string refusal_of(const std::filesystem::path& folder) {
  auto model = filled_classifier();
  const auto text = peft_test::complaint([&] { load(model, folder); });
  CHECK(peft::internal::adapter_names(*model).empty());
  return text;
}

/// What `save_adapterhub` says is wrong.
std::string refusal_of(const Parts& parts) {
  const TemporaryFolder folder;
  auto model = adapted(parts);
  const auto text = peft_test::complaint([&] { peft::save_adapterhub(*model, "topics", folder / "out"); });
  CHECK(!std::filesystem::exists(folder / "out"));
  return text;
}

bool has(const Strings& lines, const std::string& text) {
  return std::any_of(lines.begin(), lines.end(),
                     [&](const std::string& line) { return line.find(text) != std::string::npos; });
}

peft::PrefixOptions prefix(int64_t length = 3) {
  return peft::PrefixOptions::adapterhub(length).hidden_width(5);
}

using Catch::Matchers::Contains;

/// A family's model for texts, and what its files say of it.
struct Family {
  std::string model_type, name, prefix, projection;

  /// `change`: to a DeBERTa's config.
  peft::models::AnyEncoder open(
      const std::function<void(peft::models::DebertaV2Config&)>& change = {}) const {
    const auto opened = [&]() -> peft::models::AnyEncoder {
      if (model_type != "deberta-v2") {
        auto config = peft_test::tiny_roberta();
        return peft::models::RobertaForSequenceClassification(config.model_type(model_type));
      }
      auto config = peft_test::tiny_deberta_v3();
      if (change) change(config);
      return peft::models::DebertaV2ForSequenceClassification(config);
    }();
    peft_test::fill_by_name(*opened);
    opened->eval();
    return opened;
  }
  /// A layer of the attention.
  std::string attention(const std::string& matrix) const { return matrix + projection; }
  std::vector<std::string> head() const {
    if (model_type == "deberta-v2") return {"pooler.dense", "classifier"};
    return {"classifier.dense", "classifier.out_proj"};
  }
};

const std::vector<Family>& families() {
  static const std::vector<Family> rows{{"roberta", "Roberta", "roberta.", ""},
                                        {"xlm-roberta", "XLMRoberta", "roberta.", ""},
                                        {"deberta-v2", "DebertaV2", "deberta.", "_proj"}};
  return rows;
}

Tensor logits_of(const peft::models::AnyEncoder& model) {
  return model->forward(peft_test::roberta_batch()).logits;
}

peft::Adapter load(const peft::models::AnyEncoder& model, const std::filesystem::path& folder,
                   Strings* notes = nullptr) {
  return peft::load_adapterhub(*model, folder, "read", false, [&](const std::string& line) {
    if (notes) notes->push_back(line);
  });
}

}  // namespace

TEST_CASE("AdapterHub's directories give back every method", "[adapterhub]") {
  const auto small = [](peft::BottleneckOptions options) { return options.reduction_factor(2); };
  using peft::on;
  const std::vector<std::pair<std::string, Parts>> cases{
      {"houlsby", {on(small(peft::houlsby()))}},
      {"norms, gate, scaling",
       {on(small(peft::pfeiffer())
               .ln_before(true)
               .ln_after(true)
               .gating(true)
               .trained_scaling(peft::TrainedScaling::channel))}},
      {"size", {on(peft::unified_view_adapter(3))}},
      {"factors", {on(peft::houlsby().layer_factors({{1, 4.0}}).reduction_factor(2.5))}},
      {"left out", {on(small(peft::pfeiffer()).leave_out({0}))}},
      {"compacter", {on(peft::compacter().reduction_factor(2).phm(peft::PhmOptions().dim(2)))}},
      {"own rules",
       {on(peft::compacter().reduction_factor(2).phm(
           peft::PhmOptions().dim(2).shared_rule(false).factorized_rule(true).learn_rule(false)))}},
      {"invertible", {on(small(peft::pfeiffer())), on(peft::InvertibleOptions())}},
      {"invertible alone", {on(peft::InvertibleOptions(4).non_linearity("gelu"))}},
      {"two bottlenecks",
       {on(small(peft::houlsby()).places({peft::JoinRole::attention})),
        on(peft::pfeiffer().reduction_factor(4), peft::matching(".*layer.1.output.LayerNorm"))}},
      {"prefix", {on(prefix().gates(2))}},
      {"flat", {on(prefix().projection(false).leave_out({1}))}},
      {"prompt", {on(peft::PromptOptions(2).after_embedding(true), peft::all())}},
      {"after bos", {on(peft::PromptOptions(2).after_embedding(true).after_first(true), peft::all())}},
      {"lora", {on(peft::LoraOptions(2).alpha(3).dropout(0.1), peft::named({"query", "value"}))}},
      {"rslora", {on(peft::LoraOptions(4).rslora(true), peft::named({"intermediate.dense"}))}},
      {"pissa", {on(peft::LoraOptions(2).init(peft::LoraInit::pissa), peft::named({"key"}))}},
      {"ia3", {on(peft::Ia3Options(), peft::named({"key", "value", "intermediate.dense"}))}},
      {"mam", {on(prefix()), on(peft::parallel_adapter())}},
      {"unipelt",
       {on(prefix().gates(1)), on(small(peft::pfeiffer()).gating(true)),
        on(peft::LoraOptions(2).gating(true), peft::named({"query", "value"}))}},
  };
  for (const auto& [label, parts] : cases) {
    DYNAMIC_SECTION(label) {
      const TemporaryFolder folder;
      auto model = adapted(parts);
      const auto notes = peft::save_adapterhub(*model, "topics", folder / "out");
      CHECK(notes.empty() == (label != "size" && label != "pissa"));
      CHECK(peft::is_adapterhub(folder / "out"));
      auto read = filled_classifier();
      Strings said;
      const auto adapter = load(read, folder / "out", &said);
      CHECK(said.empty());
      CHECK(adapter.parameters().empty());
      CHECK(peft_test::difference(read->forward(batch()).logits, model->forward(batch()).logits) < 1e-6);
      peft::save_adapterhub(*read, "read", folder / "again");
      CHECK(config_of(folder / "again")["config"] == config_of(folder / "out")["config"]);
      CHECK(keys_of(folder / "again" / "adapter.safetensors").size() ==
            keys_of(folder / "out" / "adapter.safetensors").size());
      peft::remove_adapter(*read, "read");
      CHECK(!load(read, folder / "out", nullptr, /*trainable=*/true).parameters().empty());
    }
  }
}

TEST_CASE("An AdapterHub directory has Python's keys", "[adapterhub]") {
  const TemporaryFolder folder;
  const auto keys = [&](const Parts& parts) {
    auto model = adapted(parts);
    peft::save_adapterhub(*model, "topics", folder / "out");
    auto found = keys_of(folder / "out" / "adapter.safetensors");
    std::erase_if(found, [](const std::string& key) { return key.find("layer.0") != std::string::npos; });
    return found;
  };
  using peft::on;
  SECTION("LoRA") {
    CHECK(keys({on(peft::LoraOptions(2),
                   peft::named({"query", "output.dense"}).exclude({"attention.output.dense"}))}) ==
          Strings{"bert.encoder.layer.1.attention.self.query.loras.topics.lora_A",
                  "bert.encoder.layer.1.attention.self.query.loras.topics.lora_B",
                  "bert.encoder.layer.1.output.dense.loras.topics.lora_A",
                  "bert.encoder.layer.1.output.dense.loras.topics.lora_B"});
    const auto json = config_of(folder / "out");
    CHECK(json["model_class"] == "BertForSequenceClassification");
    CHECK(json["model_type"] == "bert");
    CHECK(json["hidden_size"] == 8);
    CHECK(json["name"] == "topics");
    CHECK(json["config"]["attn_matrices"] == Json{"q"});
    CHECK(json["config"]["output_lora"] == true);
    CHECK(json["config"]["intermediate_lora"] == false);
    CHECK(json["config"]["alpha"] == 8);
  }
  SECTION("a bottleneck with its norm, which Python writes twice") {
    const std::string block = "bert.encoder.layer.1.output.adapters.topics.";
    CHECK(keys({on(peft::pfeiffer().ln_before(true))}) ==
          Strings{block + "adapter_down.0.bias", block + "adapter_down.0.weight",
                  block + "adapter_down.1.bias", block + "adapter_down.1.weight",
                  block + "adapter_norm_before.bias", block + "adapter_norm_before.weight",
                  block + "adapter_up.bias", block + "adapter_up.weight"});
  }
  SECTION("a prefix, which Python writes once a layer") {
    CHECK(keys({on(prefix().projection(false).leave_out({1}))}) ==
          Strings{"bert.encoder.layer.1.attention.self.prefix_tuning.pool.prefix_tunings.topics.self_prefix."
                  "control_trans",
                  "bert.prefix_tuning.prefix_tunings.topics.self_prefix.control_trans"});
  }
  SECTION("what the projections of an adapter share") {
    CHECK(has(keys({on(peft::compacter().reduction_factor(2).phm(peft::PhmOptions().dim(2)))}),
              "bert.shared_parameters.topics.phm_rule"));
  }
}

TEST_CASE("A head lies beside an AdapterHub adapter", "[adapterhub]") {
  const TemporaryFolder folder;
  auto model = filled_classifier();
  const auto adapter = peft::add_adapter(*model, {peft::on(peft::pfeiffer())}, "topics");
  SECTION("transformers' own") { peft::train_also(adapter, *model, peft::named({"classifier"})); }
  SECTION("one of the library's, which has the pooler in it") {
    peft::train_also(adapter, *model, peft::named({"classifier", "pooler.dense"}));
  }
  perturb(adapter);
  CHECK(peft::save_adapterhub(*model, "topics", folder / "out").empty());
  auto read = filled_classifier();
  load(read, folder / "out");
  CHECK(peft_test::difference(read->forward(batch()).logits, model->forward(batch()).logits) == 0);
  const auto keys = keys_of(folder / "out" / "model_head.safetensors");
  const auto head = Json::parse(read_bytes(folder / "out" / "head_config.json"));
  if (keys.size() == 2) {
    CHECK(keys == Strings{"classifier.bias", "classifier.weight"});
    CHECK(head["model_class"] == "BertForSequenceClassification");
    CHECK(head["num_labels"] == 3);
  } else {
    CHECK(keys == Strings{"heads.topics.1.bias", "heads.topics.1.weight", "heads.topics.4.bias",
                          "heads.topics.4.weight"});
    CHECK(head["model_class"] == "BertAdapterModel");
    CHECK(head["config"]["layers"] == 2);
  }

  auto headless = filled_classifier();
  peft::add_adapter(*headless, peft::pfeiffer(), "bare");
  CHECK_THROWS_WITH(
      peft::save_adapterhub(*headless, "bare", folder / "out"),
      Contains(
          "head_config.json' is another adapter's head, which would be read with this one, that has none"));

  auto without = filled_classifier();
  CHECK(peft::load_adapterhub(*without, folder / "out", "read", false, peft::internal::print_note,
                              /*with_head=*/false)
            .layers<peft::ReplaceImpl>()
            .empty());

  Strings notes;
  auto other = filled_classifier();
  auto json = head;
  json["model_class"] = "BertForMaskedLM";
  write_bytes(folder / "out" / "head_config.json", json.dump());
  CHECK(load(other, folder / "out", &notes).layers<peft::ReplaceImpl>().empty());
  CHECK(has(notes, "head_config.json: the head of BertForMaskedLM is left out"));
  write_bytes(folder / "out" / "head_config.json", head.dump());
  std::filesystem::remove(folder / "out" / "model_head.safetensors");
  CHECK_THAT(refusal_of(folder / "out"), Contains("model_head.safetensors is missing, and there is no "
                                                  "pytorch_model_head.bin"));
}

TEST_CASE("A model with and one without a head exchange AdapterHub adapters", "[adapterhub]") {
  const TemporaryFolder folder;
  auto model = adapted({peft::on(peft::houlsby()), peft::on(prefix())});
  peft::save_adapterhub(*model, "topics", folder / "head");
  peft::models::BertModel bare(peft_test::tiny());
  peft_test::fill(*bare);
  bare->eval();
  load(bare, folder / "head");
  CHECK(peft_test::difference(bare->forward(batch()).last_hidden_state,
                              model->base_model->forward(batch()).last_hidden_state) < 1e-6);
  peft::save_adapterhub(*bare, "read", folder / "bare");
  CHECK(has(keys_of(folder / "bare" / "adapter.safetensors"), "encoder.layer.0.output.adapters.read."));
  CHECK(!has(keys_of(folder / "bare" / "adapter.safetensors"), "bert."));
  CHECK(config_of(folder / "bare")["model_class"] == "BertModel");
  auto again = filled_classifier();
  load(again, folder / "bare");
  CHECK(peft_test::difference(again->forward(batch()).logits, model->forward(batch()).logits) == 0);
}

TEST_CASE("AdapterHub's directories give back every method in every family", "[adapterhub]") {
  const auto& family = families()[GENERATE(range(size_t{0}, size_t{3}))];
  const auto small = [](peft::BottleneckOptions options) { return options.reduction_factor(2); };
  using peft::on;
  const auto query = family.attention("query"), value = family.attention("value");
  const std::vector<std::pair<std::string, Parts>> cases{
      {"houlsby", {on(small(peft::houlsby()))}},
      {"compacter", {on(peft::compacter().reduction_factor(2).phm(peft::PhmOptions().dim(2)))}},
      {"invertible", {on(small(peft::pfeiffer())), on(peft::InvertibleOptions())}},
      {"prompt", {on(peft::PromptOptions(2).after_embedding(true), peft::all())}},
      {"lora", {on(peft::LoraOptions(2).alpha(3), peft::named({query, value}))}},
      {"ia3", {on(peft::Ia3Options(), peft::named({family.attention("key"), "intermediate.dense"}))}},
      {"mam", {on(prefix()), on(peft::parallel_adapter())}},
      {"unipelt", peft::unipelt(3, 2, peft::named({query, value}))},
  };
  for (const auto& [label, parts] : cases) {
    DYNAMIC_SECTION(label << " in " << family.model_type) {
      const TemporaryFolder folder;
      const auto model = family.open();
      torch::manual_seed(4);
      perturb(peft::add_adapter(*model, parts, "topics"));
      const auto notes = peft::save_adapterhub(*model, "topics", folder / "out");
      const bool differs = label == "prompt" && family.model_type == "deberta-v2";
      CHECK(notes.size() == (differs ? 1U : 0U));
      const auto json = config_of(folder / "out");
      CHECK(json["model_type"] == family.model_type);
      CHECK(json["model_class"] == family.name + "ForSequenceClassification");
      CHECK(json["hidden_size"] == 8);
      for (const auto& key : keys_of(folder / "out" / "adapter.safetensors")) {
        INFO(key);
        CHECK(key.starts_with(family.prefix));
      }
      const auto read = family.open();
      Strings said;
      load(read, folder / "out", &said);
      CHECK(said.size() == notes.size());
      CHECK(peft_test::difference(logits_of(read), logits_of(model)) < 1e-6);
      peft::save_adapterhub(*read, "read", folder / "again");
      CHECK(config_of(folder / "again")["config"] == json["config"]);
    }
  }
}

TEST_CASE("AdapterHub's keys have each family's names", "[adapterhub]") {
  const auto& family = families()[GENERATE(range(size_t{0}, size_t{3}))];
  const TemporaryFolder folder;
  const auto model = family.open();
  const auto query = family.attention("query");
  peft::add_adapter(
      *model, {peft::on(peft::pfeiffer()), peft::on(peft::LoraOptions(2), peft::named({query}))}, "topics");
  peft::save_adapterhub(*model, "topics", folder / "out");
  auto keys = keys_of(folder / "out" / "adapter.safetensors");
  std::erase_if(keys, [](const std::string& key) { return key.find("layer.0") != std::string::npos; });
  const auto layer = family.prefix + "encoder.layer.1.";
  const auto lora = layer + "attention.self." + query + ".loras.topics.";
  const auto block = layer + "output.adapters.topics.";
  CHECK(keys == Strings{lora + "lora_A", lora + "lora_B", block + "adapter_down.0.bias",
                        block + "adapter_down.0.weight", block + "adapter_up.bias",
                        block + "adapter_up.weight"});
}

// The numbers are those of tests/reference/adapterhub_values.py.
TEST_CASE("An AdapterHub adapter gives Python's values in every family", "[adapterhub]") {
  static const std::map<std::string, std::vector<float>> expected{
      {"Roberta", {0.327222794F, 0.0466081202F, -0.258117795F, 0.571345448F, 0.425810456F, 0.0859523863F}},
      {"DebertaV2",
       {-0.142530948F, -0.242315635F, -0.231627971F, 0.280956089F, 0.183492348F, 0.00536924601F}},
  };
  for (const auto& family : families()) {
    const auto found = expected.find(family.name);
    if (found == expected.end()) continue;
    DYNAMIC_SECTION(family.model_type) {
      const TemporaryFolder folder;
      const auto model = family.open();
      const auto parts = [&] {
        auto all = peft::unipelt(3, 2, peft::named({family.attention("query"), family.attention("value")}));
        all[0] = peft::on(prefix().gates(1));
        all[1] = peft::on(peft::pfeiffer().reduction_factor(2).gating(true));
        return all;
      }();
      peft::add_adapter(*model, parts, "topics");
      peft::save_adapterhub(*model, "topics", folder / "out");
      change_tensors(folder / "out", [](Tensors& tensors) {
        std::erase_if(tensors,
                      [](const auto& item) { return item.first.find(".pool.") != std::string::npos; });
        for (auto& [key, tensor] : tensors) tensor = peft_test::named_values(key, tensor.sizes());
      });
      const auto read = family.open();
      load(read, folder / "out");
      CHECK(peft_test::difference(logits_of(read), torch::tensor(found->second).view({2, 3})) < 1e-6);
    }
  }
}

TEST_CASE("Each family's head lies beside an AdapterHub adapter", "[adapterhub]") {
  const auto& family = families()[GENERATE(range(size_t{0}, size_t{3}))];
  const TemporaryFolder folder;
  const auto out = folder / "out";
  const auto model = family.open();
  const auto adapter = peft::add_adapter(*model, {peft::on(peft::pfeiffer())}, "topics");
  const auto head = family.head();
  SECTION("as transformers' class has it, or the library's own") {
    peft::train_also(adapter, *model, peft::named(head));
    torch::manual_seed(4);
    perturb(adapter);
    CHECK(peft::save_adapterhub(*model, "topics", out).empty());
    auto json = Json::parse(read_bytes(out / "head_config.json"));
    CHECK(json["model_class"] == family.name + "ForSequenceClassification");
    CHECK(json["num_labels"] == 3);
    const auto keys = keys_of(out / "model_head.safetensors");
    Strings wanted;
    for (const auto& path : head) wanted.insert(wanted.end(), {path + ".bias", path + ".weight"});
    std::sort(wanted.begin(), wanted.end());
    CHECK(keys == wanted);
    const auto check = [&](const Strings& said) {
      const auto read = family.open();
      Strings notes;
      load(read, out, &notes);
      CHECK(notes == said);
      CHECK(peft_test::difference(logits_of(read), logits_of(model)) < 1e-6);
    };
    check({});

    const bool gelu = family.model_type == "deberta-v2";
    json["model_class"] = family.name + GENERATE("AdapterModel", "ModelWithHeads");
    json["name"] = "sorts";
    json["config"] = {{"head_type", "classification"},
                      {"layers", 2},
                      {"activation_function", gelu ? "gelu" : "tanh"},
                      {"use_pooler", false}};
    write_bytes(out / "head_config.json", json.dump());
    Tensors tensors;
    for (const auto& [key, tensor] : peft::load_safetensors(out / "model_head.safetensors")) {
      const auto place = key.starts_with(head[0] + ".") ? "1" : "4";
      tensors["heads.sorts." + std::string(place) + key.substr(key.rfind('.'))] = tensor.clone();
    }
    peft::save_safetensors(out / "model_head.safetensors", tensors);
    Strings said;
    if (gelu) {
      said.push_back(
          "head_config.json: the head's activation is gelu, as that of every published DeBERTa's pooler: "
          "'pooler_hidden_act' of the model's config must be it");
    }
    check(said);

    json["config"]["activation_function"] = "relu";
    write_bytes(out / "head_config.json", json.dump());
    const auto read = family.open();
    Strings notes;
    CHECK(load(read, out, &notes).layers<peft::ReplaceImpl>().empty());
    CHECK(has(notes, "is left out"));
  }
  SECTION("not in parts") {
    peft::train_also(adapter, *model, peft::named({head[1]}));
    CHECK_THAT(peft_test::complaint([&] { peft::save_adapterhub(*model, "topics", out); }),
               Contains("'" + head[1] + "' is trained as a whole without the rest of the head, '" + head[0] +
                        "', '" + head[1] + "', which AdapterHub's files hold at once"));
  }
}

TEST_CASE("Another family's AdapterHub directory is refused by one line", "[adapterhub]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  const auto& own = families()[GENERATE(range(size_t{0}, size_t{3}))];
  const auto& other = families()[GENERATE(range(size_t{0}, size_t{3}))];
  if (own.model_type == other.model_type) return;
  const auto model = other.open();
  for (const char* name : {"one", "two"})
    peft::add_adapter(*model, {peft::on(peft::pfeiffer().reduction_factor(2))}, name);
  peft::add_fusion(*model, peft::FusionOptions({"one", "two"}));
  peft::save_adapterhub(*model, "one", out);
  peft::save_adapterhub_fusion(*model, "one,two", folder / "fusion");
  const auto wrong =
      ": 'model_type' must be the model's, \"" + own.model_type + "\", but got \"" + other.model_type + "\"";
  const auto read = own.open();
  const auto text = peft_test::complaint([&] { load(read, out); });
  CHECK_THAT(text, Contains("adapter_config.json" + wrong) && !Contains("problems"));
  CHECK(text.find("missing") == std::string::npos);
  CHECK_THAT(peft_test::complaint([&] { peft::load_adapterhub_fusion(*read, folder / "fusion"); }),
             Contains("adapter_fusion_config.json" + wrong) && !Contains("problems"));
}

TEST_CASE("AdapterHub has no files of a CamemBERT, nor prompts on every DeBERTa", "[adapterhub]") {
  const TemporaryFolder folder;
  const auto refusal = [&](const peft::models::AnyEncoder& model, const Parts& parts) {
    peft::add_adapter(*model, parts, "topics");
    return peft_test::complaint([&] { peft::save_adapterhub(*model, "topics", folder / "out"); });
  };
  CHECK_THAT(refusal(Family{"camembert", "Camembert", "roberta.", ""}.open(), {peft::on(peft::pfeiffer())}),
             Contains("must be one whose AdapterHub files are known ('bert', 'roberta', 'xlm-roberta', "
                      "'deberta-v2', 'gpt2'), but got 'camembert'"));
  const auto& deberta = families().back();
  const auto prompt = peft::on(peft::PromptOptions(2).after_embedding(true), peft::all());
  CHECK_THAT(refusal(deberta.open([](auto& config) { config.conv_kernel_size(3); }), {prompt}),
             Contains("AdapterHub's 'deberta-v2' takes no prompts where it has a convolution"));
  const auto narrow = [](auto& config) { config.embedding_size(6); };
  CHECK_THAT(
      refusal(deberta.open(narrow), {prompt}),
      Contains("AdapterHub's prompts are as wide as the words' vectors, 6, and this model's after them, 8"));
  CHECK_THAT(refusal(deberta.open(narrow), {peft::on(peft::InvertibleOptions())}),
             Contains("'deberta.embeddings.output' is as wide as the model, 8, and AdapterHub's invertible "
                      "adapters are as the words' vectors, 6"));
}

TEST_CASE("AdapterHub directories of older versions are read as Python reads them", "[adapterhub]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  Strings notes;
  SECTION("LoRA was trained without its scale before 1.1.0") {
    auto model = adapted({peft::on(peft::LoraOptions(2).alpha(2), peft::named({"query"}))});
    peft::save_adapterhub(*model, "topics", out);
    const auto [version, alpha] = GENERATE(table<std::string, double>({{"adapters.1.0.1", 2},
                                                                       {"adapters.0.2.2", 2},
                                                                       {"adapters.1.1.0.dev0", 2},
                                                                       {"adapters.1.1.0", 16},
                                                                       {"adapters.1.2", 16},
                                                                       {"3.2.1", 16}}));
    change_config(out, [&, version = version](Json& json) {
      json["version"] = version;
      json["config"]["alpha"] = 16;
    });
    auto read = filled_classifier();
    CHECK(load(read, out, &notes).layers<peft::LoraImpl>().front()->alpha == alpha);
    CHECK(notes.size() == (alpha == 2 ? 1U : 0U));
  }
  SECTION("gelu was the other one, invertible adapters nested, layers differently named") {
    auto model = adapted({peft::on(peft::pfeiffer().non_linearity("gelu_new")),
                          peft::on(peft::InvertibleOptions().non_linearity("gelu_new"))});
    peft::save_adapterhub(*model, "topics", out);
    change_config(out, [](Json& json) {
      json.erase("version");
      json["type"] = "text_lang";
      json["config"]["non_linearity"] = "gelu";
      json["config"].erase("inv_adapter");
      json["config"].erase("inv_adapter_reduction_factor");
      json["config"]["invertible_adapter"] = {{"block_type", "nice"}, {"reduction_factor", 2}};
      json["config"]["attention_type"] = "sent-lvl-dynamic";
    });
    change_tensors(out, [](Tensors& tensors) {
      Tensors old;
      for (const auto& [key, tensor] : tensors) {
        auto name = key;
        for (const auto& [now, then] :
             {std::pair<std::string, std::string>{".output.adapters.", ".output.layer_text_lang_adapters."},
              {"invertible_adapters", "invertible_lang_adapters"}}) {
          if (const auto at = name.find(now); at != std::string::npos) name.replace(at, now.size(), then);
        }
        old[name] = tensor;
      }
      tensors = old;
    });
    auto read = filled_classifier();
    load(read, out, &notes);
    CHECK(notes == Strings{"adapter_config.json: the unknown key 'attention_type' was ignored"});
    CHECK(peft_test::difference(read->forward(batch()).logits, model->forward(batch()).logits) == 0);
  }
  SECTION("task adapters named invertible adapters they did not have") {
    auto model = adapted({peft::on(peft::pfeiffer())});
    peft::save_adapterhub(*model, "topics", out);
    change_config(out, [](Json& json) {
      json["config"]["inv_adapter"] = "nice";
      json["config"]["inv_adapter_reduction_factor"] = 2;
    });
    CHECK_THAT(refusal_of(out),
               Contains("'bert.invertible_adapters.topics.F.0.weight' expected (2, 4), but it is missing"));
    change_config(out, [](Json& json) { json["type"] = "text_task"; });
    auto read = filled_classifier();
    load(read, out);
    CHECK(peft_test::difference(read->forward(batch()).logits, model->forward(batch()).logits) == 0);
  }
}

TEST_CASE("A wrong AdapterHub config is refused with all that is wrong", "[adapterhub]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  using Change = std::function<void(Json&)>;
  const auto check = [&](const Parts& parts, const std::vector<std::pair<Change, std::string>>& cases) {
    auto model = adapted(parts);
    peft::save_adapterhub(*model, "topics", out);
    const auto good = config_of(out);
    for (const auto& [change, complaint] : cases) {
      auto json = good;
      change(json);
      write_bytes(out / "adapter_config.json", json.dump());
      CHECK_THAT(refusal_of(out), Contains("load_adapterhub: '") && Contains(complaint));
    }
  };
  const auto set = [](const std::string& key, const Json& value) -> Change {
    return [key, value](Json& json) { json[key] = value; };
  };
  const auto put = [](const std::string& key, const Json& value) -> Change {
    return [key, value](Json& json) { json["config"][key] = value; };
  };
  SECTION("of a bottleneck") {
    check({peft::on(peft::pfeiffer())},
          {{set("model_type", "roberta"), R"('model_type' must be the model's, "bert", but got "roberta")"},
           {set("hidden_size", 768), "'hidden_size' must be the model's, 8, but got 768"},
           {set("name", nullptr), "'name' must be a name, but got null"},
           {set("config", nullptr), "'config' must be an object, but got null"},
           {set("config", {{"architecture", "union"}}), "'configs' of a union must be a list of configs"},
           {put("architecture", "reft"), "'architecture' must be one of null"},
           {put("reduction_factor", nullptr), "'reduction_factor' must be given"},
           {put("reduction_factor", 0), "'reduction_factor' must be a positive number"},
           {put("reduction_factor", {{"1", 2}}), "must name layer 0 or have a \"default\""},
           {put("reduction_factor", {{"one", 2}}), "'reduction_factor' must be a positive number"},
           {put("non_linearity", "sinus"), "'non_linearity' must be an activation this library has"},
           {put("scaling", "wild"), R"('scaling' must be one of "learned", "channel", but got "wild")"},
           {put("dropout", 1.5), "'dropout' must be a number in [0, 1), but got 1.5"},
           {put("leave_out", {-1}), "'leave_out' must be a list of layers' indices"},
           {put("leave_out", {0, 1}), "it adapts no layer of this model"},
           {put("output_adapter", "yes"), "'output_adapter' must be true or false"},
           {put("phm_layer", true), "PHM projections need a width and a bottleneck that 4 divides"},
           {put("inv_adapter", "glow"), R"('inv_adapter' must be "nice", but got "glow")"},
           {put("residual_before_ln", "late"), R"('residual_before_ln' must be "post_add", but got "late")"},
           {put("init_weights", "zero"), "'init_weights' must be one of"}});
  }
  SECTION("of a LoRA") {
    check({peft::on(peft::LoraOptions(2), peft::named({"query"}))},
          {{put("r", 0), "'r' must be an integer of at least 1, but got 0"},
           {put("attn_matrices", {"q", "o"}), "'attn_matrices' must be a list of \"q\", \"k\" and \"v\""},
           {put("selfattn_lora", false), "it adapts no layer of this model"},
           {put("use_dora", true), "'use_dora' is not supported yet, but got true"},
           {put("vera_d", 0.1), "'vera_d' is not supported yet, but got 0.1"},
           {put("composition_mode", "multiply"), "'composition_mode' must be one of"},
           {put("composition_mode", "scale"), "'r' must be 1 in the mode \"scale\", but got 2"}});
  }
  SECTION("of prefix and prompt") {
    check({peft::on(prefix())},
          {{put("prefix_length", 0), "'prefix_length' must be an integer of at least 1"},
           {put("bottleneck_size", "big"), "'bottleneck_size' must be an integer"},
           {put("leave_out", {0, 1}), "the prefix is for no layer of this model"}});
    check({peft::on(peft::PromptOptions(2).after_embedding(true), peft::all())},
          {{put("combine", "after"), "'combine' must be one of \"prefix\", \"prefix_after_bos\""},
           {put("prompt_length", -1), "'prompt_length' must be an integer of at least 1"}});
  }
  SECTION("that is none") {
    std::filesystem::create_directory(out);
    CHECK_THAT(refusal_of(out), Contains("must be an adapter's config, but there is none"));
    write_bytes(out / "adapter_config.json", "{");
    CHECK_THAT(refusal_of(out), Contains("is not valid JSON"));
    CHECK(!peft::is_adapterhub(out));
  }
}

TEST_CASE("Wrong tensors of an AdapterHub adapter are refused by name", "[adapterhub]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = adapted({peft::on(peft::pfeiffer().ln_before(true)), peft::on(prefix())});
  peft::save_adapterhub(*model, "topics", out);
  const std::string block = "bert.encoder.layer.1.output.adapters.topics.";
  const std::string table = "prefix_tunings.topics.self_prefix.wte.weight";
  change_tensors(out, [&](Tensors& tensors) {
    tensors.erase(block + "adapter_up.weight");
    tensors[block + "adapter_down.1.weight"] = torch::zeros({2, 8});
    tensors[block + "adapter_norm_before.bias"] += 1;
    tensors[block + "adapter_side.weight"] = torch::zeros({1});
    tensors[block + "adapter_up.bias"] = torch::zeros({8}, torch::kInt);
    tensors["bert.encoder.layer.0.attention.self.prefix_tuning.pool." + table] += 1;
  });
  const auto text = refusal_of(out);
  CHECK_THAT(text, Contains("6 problems"));
  for (const auto& line :
       {"adapter_up.weight' expected (8, 1), but it is missing",
        "adapter_down.1.weight' expected (1, 8), but got (2, 8) (hint: other settings or base model?)",
        "adapter_norm_before.bias' expected the values of", "adapter_side.weight' expected no such tensor",
        "adapter_up.bias' expected F32, F16, BF16 or F64 values, but got I32",
        "self_prefix.wte.weight' expected the values of"}) {
    CHECK_THAT(text, Contains(line));
  }

  SECTION("copies may be missing, as in files that others write") {
    peft::save_adapterhub(*model, "topics", out);
    change_tensors(out, [&](Tensors& tensors) {
      std::erase_if(tensors, [](const auto& item) {
        return item.first.find(".pool.") != std::string::npos ||
               item.first.find("adapter_norm_before") != std::string::npos;
      });
    });
    auto read = filled_classifier();
    load(read, out);
    CHECK(peft_test::difference(read->forward(batch()).logits, model->forward(batch()).logits) == 0);
  }
  SECTION("a rule that was not saved") {
    auto other = adapted({peft::on(peft::compacter().reduction_factor(2).phm(peft::PhmOptions().dim(2)))});
    peft::save_adapterhub(*other, "topics", out);
    change_tensors(out, [](Tensors& tensors) { tensors.erase("bert.shared_parameters.topics.phm_rule"); });
    CHECK_THAT(refusal_of(out), Contains("it is missing (hint: a model without a head is saved without it"));
  }
  SECTION("a file that was cut short, and none") {
    const auto bytes = read_bytes(out / "adapter.safetensors");
    write_bytes(out / "adapter.safetensors", bytes.substr(0, bytes.size() / 2));
    CHECK_THAT(refusal_of(out), Contains("adapter.safetensors' is not a valid safetensors file"));
    std::filesystem::remove(out / "adapter.safetensors");
    CHECK_THAT(refusal_of(out),
               Contains("adapter.safetensors is missing, and there is no pytorch_adapter.bin"));
    write_bytes(out / "pytorch_adapter.bin", "PK\x03\x04 and no more");
    CHECK_THAT(refusal_of(out), Contains("load_pickle: cannot read"));
  }
  SECTION("values that are not finite are told") {
    peft::save_adapterhub(*model, "topics", out);
    change_tensors(out, [&](Tensors& tensors) { tensors[block + "adapter_up.bias"][0] = NAN; });
    Strings notes;
    auto read = filled_classifier();
    load(read, out, &notes);
    CHECK(notes == Strings{"adapter.safetensors: '" + block + "adapter_up.bias' holds NaN or infinity"});
  }
}

TEST_CASE("AdapterHub's directories give back a fusion", "[adapterhub]") {
  const TemporaryFolder folder;
  auto model = filled_classifier();
  torch::manual_seed(5);
  for (const char* name : {"one", "two"}) {
    const auto options = peft::houlsby().reduction_factor(name[0] == 'o' ? 2 : 4);
    perturb(peft::add_adapter(*model, {peft::on(options)}, name));
  }
  SECTION("dynamic") { perturb(peft::add_fusion(*model, peft::FusionOptions({"one", "two"}))); }
  SECTION("static, of its own rate of dropout") {
    perturb(peft::add_fusion(*model, peft::static_fusion({"one", "two"}).dropout_prob(0.3)));
  }
  const auto names = peft::internal::adapter_names(*model);
  REQUIRE(names.back() == "one,two");
  for (const char* name : {"one", "two"}) peft::save_adapterhub(*model, name, folder / name);
  peft::save_adapterhub_fusion(*model, "one,two", folder / "fusion");
  const auto keys = keys_of(folder / "fusion" / "model_adapter_fusion.safetensors");
  CHECK(has(keys, "bert.encoder.layer.1.attention.output.adapter_fusion_layer.one,two.query.weight"));
  const auto json = Json::parse(read_bytes(folder / "fusion" / "adapter_fusion_config.json"));
  CHECK(json["adapter_names"] == Json{"one", "two"});
  CHECK(json["name"] == "one,two");

  peft::rename(*model, "one", "uno");
  peft::save_adapterhub_fusion(*model, "one,two", folder / "renamed");
  CHECK(Json::parse(read_bytes(folder / "renamed" / "adapter_fusion_config.json"))["adapter_names"] ==
        Json{"uno", "two"});
  peft::rename(*model, "uno", "one");

  auto read = filled_classifier();
  const auto load_fusion = [&](const Strings& adapters, bool trainable = false) {
    return peft::load_adapterhub_fusion(*read, folder / "fusion", adapters, "mix", trainable);
  };
  CHECK_THAT(peft_test::complaint([&] { load_fusion({}); }),
             Contains("2 problems") && Contains("the model has no adapter 'one'; it has none"));
  peft::load_adapterhub(*read, folder / "one", "first", /*trainable=*/true);
  peft::load_adapterhub(*read, folder / "two", "second");
  CHECK_THAT(peft_test::complaint([&] { load_fusion({"first"}); }),
             Contains("it fuses 2 adapters, but 1 were named"));
  CHECK_THAT(peft_test::complaint([&] { peft::save_adapterhub_fusion(*read, "first", folder / "none"); }),
             Contains("carries 'bottleneck', which is no fusion"));
  CHECK_THAT(peft_test::complaint([&] { peft::save_adapterhub(*model, "one,two", folder / "none"); }),
             Contains("'fusion' has no form in AdapterHub's files"));

  const auto fusion = load_fusion({"first", "second"}, GENERATE(false, true));
  CHECK(peft_test::difference(read->forward(batch()).logits, model->forward(batch()).logits) < 1e-6);
  CHECK(peft::adapter(*read, "first").parameters().empty() == !fusion.parameters().empty());

  const auto wrong = [&](const std::function<void(Json&)>& change) {
    auto other = json;
    change(other);
    write_bytes(folder / "fusion" / "adapter_fusion_config.json", other.dump());
    peft::set_active(*read, Strings{"first", "second"});
    peft::remove_adapter(*read, "mix");
    const auto text = peft_test::complaint([&] { load_fusion({"first", "second"}); });
    REQUIRE(!text.empty());
    write_bytes(folder / "fusion" / "adapter_fusion_config.json", json.dump());
    load_fusion({"first", "second"});
    return text;
  };
  CHECK_THAT(wrong([](Json& other) { other["config"]["query"] = "yes"; }),
             Contains("adapter_fusion_config.json: 'query' must be true or false"));
  CHECK_THAT(wrong([](Json& other) { other["config"]["dropout_prob"] = 2; }),
             Contains("'dropout_prob' must be a number in [0, 1), but got 2"));
  CHECK_THAT(wrong([](Json& other) { other["config"] = nullptr; }), Contains("'config' must be an object"));
  CHECK_THAT(wrong([](Json& other) { other["config"]["key"] = false; }),
             Contains("key.weight' expected no such tensor"));
  CHECK_THAT(wrong([](Json& other) { other["name"] = "three"; }),
             Contains("adapter_fusion_layer.three.query.weight' expected (8, 8), but it is missing"));
}

TEST_CASE("What AdapterHub has no words for is not written", "[adapterhub]") {
  using peft::on;
  const auto lora = peft::LoraOptions(2);
  CHECK_THAT(refusal_of(Parts{on(lora, peft::named({"attention.output.dense"}))}),
             Contains("attention.output.dense' is no place where AdapterHub has a LoRA"));
  CHECK_THAT(refusal_of(Parts{on(lora, peft::matching(".*layer.0.*(query|value)|.*layer.1.*query"))}),
             Contains("layer.1.attention.self.value' must carry the LoRA as other layers do"));
  CHECK_THAT(
      refusal_of(Parts{on(peft::LoraOptions(2).rank_pattern({{"layer.1.*", 3}}), peft::named({"query"}))}),
      Contains("must have the rank and the scale of"));
  CHECK_THAT(refusal_of(Parts{on(peft::LoraOptions(2).lora_bias(true), peft::named({"query"}))}),
             Contains("has a bias on B, which AdapterHub has not"));
  CHECK_THAT(refusal_of(Parts{on(peft::DoraOptions(lora), peft::named({"query"}))}),
             Contains("'dora' has no form in AdapterHub's files"));
  CHECK_THAT(refusal_of(Parts{on(peft::BiasOptions(), peft::named({"query"}))}),
             Contains("it has no method that AdapterHub has"));
  CHECK_THAT(refusal_of(Parts{on(peft::Ia3Options().feedforward({"output.dense"}),
                                 peft::named({"layer.0.output.dense", "layer.1.output.dense"}))}),
             Contains("scales its inputs, and AdapterHub's (IA)³ only outputs"));
  CHECK_THAT(
      refusal_of(Parts{on(lora, peft::named({"query"})), on(peft::Ia3Options(), peft::named({"key"}))}),
      Contains("LoRA and (IA)³ are one method in AdapterHub"));
  CHECK_THAT(refusal_of(Parts{on(peft::PrefixOptions(2))}), Contains("counts the prefix as positions"));
  CHECK_THAT(refusal_of(Parts{on(prefix().vector_width(4))}), Contains("from vectors of width 4"));
  CHECK_THAT(refusal_of(Parts{on(peft::PromptOptions(2), peft::all())}),
             Contains("is before positions and norm"));
  CHECK_THAT(refusal_of(Parts{on(peft::pfeiffer()), on(peft::ReplaceOptions(), peft::named({"query"}))}),
             Contains("query' is trained as a whole, which AdapterHub does with heads only"));
  CHECK_THAT(refusal_of(Parts{on(peft::pfeiffer()), on(peft::InvertibleOptions().non_linearity("tanh"))}),
             Contains("AdapterHub's invertible adapters have the bottleneck's, \"relu\""));

  torch::nn::Linear plain(2, 2);
  CHECK_THAT(peft_test::complaint([&] { peft::load_adapterhub(*plain, "none"); }),
             Contains("must be an adapter's config, but there is none"));
}
