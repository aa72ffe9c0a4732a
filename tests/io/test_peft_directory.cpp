#include <torch/torch.h>

#include "peft/io/peft_directory.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "io/toy_model.h"
#include "peft/methods/bias.h"
#include "peft/methods/lora.h"
#include "peft/methods/replace.h"
#include "peft/model/active.h"
#include "peft/model/add_adapter.h"
#include "peft/model/merge.h"

using peft_test::read_bytes;
using peft_test::TemporaryFolder;
using peft_test::Toy;
using peft_test::write_bytes;
using torch::Tensor;

namespace {

using Shapes = std::map<std::string, std::vector<int64_t>>;
using Strings = std::vector<std::string>;

/// Every tensor of a file without the prefix, with its shape.
Shapes shapes_of(const std::filesystem::path& folder) {
  Shapes shapes;
  for (const auto& [key, tensor] : peft::load_safetensors(folder / "adapter_model.safetensors")) {
    REQUIRE(key.rfind("base_model.model.", 0) == 0);
    shapes[key.substr(17)] = tensor.sizes().vec();
  }
  return shapes;
}

nlohmann::json config_of(const std::filesystem::path& folder) {
  return nlohmann::json::parse(read_bytes(folder / "adapter_config.json"));
}

void change_config(const std::filesystem::path& folder, const std::function<void(nlohmann::json&)>& change) {
  auto json = config_of(folder);
  change(json);
  write_bytes(folder / "adapter_config.json", json.dump(2));
}

void change_tensors(const std::filesystem::path& folder,
                    const std::function<void(std::map<std::string, Tensor>&)>& change) {
  std::map<std::string, Tensor> tensors;
  for (const auto& [key, tensor] : peft::load_safetensors(folder / "adapter_model.safetensors")) {
    tensors[key] = tensor.clone();
  }
  change(tensors);
  peft::save_safetensors(folder / "adapter_model.safetensors", tensors);
}

Toy toy(uint64_t seed = 1) {
  torch::manual_seed(seed);
  Toy model;
  model->eval();
  return model;
}

Tensor ids() { return torch::arange(12).view({3, 4}).remainder(10); }

/// Moves what trains away from its start, where B is zero.
void perturb(const peft::Adapter& adapter) {
  const torch::NoGradGuard no_grad;
  for (auto& tensor : adapter.parameters()) tensor.add_(torch::randn_like(tensor), 0.2);
}

bool same(const Tensor& a, const Tensor& b) { return a.sizes() == b.sizes() && torch::equal(a, b); }

/// Loads, collecting the notes.
peft::Adapter load(Toy& model, const std::filesystem::path& folder, Strings* notes = nullptr,
                   const std::string& name = "default", bool trainable = false) {
  return peft::load_adapter(*model, folder, name, trainable, [&](const std::string& line) {
    if (notes) notes->push_back(line);
  });
}

/// What `load_adapter` says is wrong.
std::string refusal_of(Toy& model, const std::filesystem::path& folder) {
  try {
    load(model, folder);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "nothing";
}

peft::Target everywhere(Strings exclude = {}) {
  peft::Origin origin;
  origin.pattern = ".*";
  origin.exclude = std::move(exclude);
  return peft::Target(origin, [](const peft::SiteInfo&) { return true; });
}

const peft::Target q_emb_conv = peft::named({"q", "emb", "conv"});

/// Writes the model's only adapter, reads it into a copy of the base, and compares outputs and tensors.
Strings check_round_trip(Toy& model, const peft::Adapter& adapter, const std::filesystem::path& folder) {
  perturb(adapter);
  const auto notes = peft::save_adapter(adapter, folder);
  auto other = toy();
  const auto loaded = load(other, folder);
  CHECK(same(model->forward(ids()), other->forward(ids())));
  CHECK(adapter.sites() == loaded.sites());
  const auto again = folder.string() + "-again";
  CHECK(peft::save_adapter(loaded, again) == notes);
  CHECK(read_bytes(folder / "adapter_config.json") ==
        read_bytes(std::filesystem::path(again) / "adapter_config.json"));
  CHECK(read_bytes(folder / "adapter_model.safetensors") ==
        read_bytes(std::filesystem::path(again) / "adapter_model.safetensors"));
  return notes;
}

}  // namespace

TEST_CASE("A LoRA is written under the keys and in the shapes of Python PEFT", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  Shapes expected{{"q.lora_A.weight", {2, 8}},          {"q.lora_B.weight", {8, 2}},
                  {"emb.lora_embedding_A", {2, 10}},    {"emb.lora_embedding_B", {8, 2}},
                  {"conv.lora_A.weight", {2, 2, 3, 3}}, {"conv.lora_B.weight", {4, 2, 1, 1}}};
  SECTION("on a linear layer, an embedding and a convolution, with a head of its own") {
    const auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), q_emb_conv);
    peft::train_also(adapter, *model, peft::named({"head"}));
    CHECK(check_round_trip(model, adapter, out).empty());
    expected.insert({{"head.weight", {3, 10}}, {"head.bias", {3}}});
    CHECK(shapes_of(out) == expected);
    CHECK(config_of(out)["modules_to_save"] == Strings{"head"});
  }
  SECTION("with lora_bias") {
    const auto adapter =
        peft::add_adapter(*model, peft::LoraOptions(2).lora_bias(true), peft::named({"q", "conv"}));
    CHECK(check_round_trip(model, adapter, out).empty());
    CHECK(shapes_of(out).at("q.lora_B.bias") == std::vector<int64_t>{8});
    CHECK(shapes_of(out).at("conv.lora_B.bias") == std::vector<int64_t>{4});
    CHECK(config_of(out)["lora_bias"] == true);
  }
  SECTION("with bias all") {
    const auto adapter = peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                                    peft::on(peft::BiasOptions(), everywhere())});
    CHECK(check_round_trip(model, adapter, out).empty());
    const auto shapes = shapes_of(out);
    CHECK(shapes.size() == 2 + 15);
    for (const char* key :
         {"q.base_layer.bias", "v.bias", "conv.bias", "head.bias", "ln.bias", "mlp.0.bias"}) {
      CHECK(shapes.count(key) == 1);
    }
    CHECK(config_of(out)["bias"] == "all");
  }
  SECTION("with bias lora_only") {
    const auto adapter =
        peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), q_emb_conv),
                                   peft::on(peft::BiasOptions(), peft::named({"q", "conv"}))});
    CHECK(check_round_trip(model, adapter, out).empty());
    expected.insert({{"q.base_layer.bias", {8}}, {"conv.base_layer.bias", {4}}});
    CHECK(shapes_of(out) == expected);
    CHECK(config_of(out)["bias"] == "lora_only");
  }
}

TEST_CASE("The config has the keys Python PEFT writes, sorted and indented", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto adapter =
      peft::add_adapter(*model, peft::LoraOptions(4).alpha(16).dropout(0.1), peft::named({"q", "v"}));
  model->description = {"", "", ""};
  adapter.record().model = {"FEATURE_EXTRACTION", "some/base", "toy"};
  peft::save_adapter(adapter, folder / "out");
  CHECK(read_bytes(folder / "out/adapter_config.json") == R"({
  "alora_invocation_tokens": null,
  "alpha_pattern": {},
  "arrow_config": null,
  "auto_mapping": null,
  "base_model_name_or_path": "some/base",
  "bias": "none",
  "corda_config": null,
  "ensure_weight_tying": false,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "kasa_config": null,
  "layer_replication": null,
  "layers_pattern": null,
  "layers_to_transform": null,
  "loftq_config": {},
  "lora_alpha": 16,
  "lora_bias": false,
  "lora_dropout": 0.1,
  "lora_ga_config": null,
  "megatron_config": null,
  "megatron_core": "megatron.core",
  "modules_to_save": null,
  "monteclora_config": null,
  "peft_type": "LORA",
  "peft_version": "0.21.2",
  "qalora_group_size": 16,
  "r": 4,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "q",
    "v"
  ],
  "target_parameters": null,
  "task_type": "FEATURE_EXTRACTION",
  "trainable_token_indices": null,
  "use_bdlora": null,
  "use_dora": false,
  "use_qalora": false,
  "use_rslora": false,
  "velora_config": null
})");
}

TEST_CASE("Every option survives being written and read", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  auto options = peft::LoraOptions(3).alpha(5.5).dropout(0.25).rslora(true).init(peft::LoraInit::gaussian);
  options.rank_pattern({{"^q", 2}, {"blocks\\.[01]\\.fc", 5}}).alpha_pattern({{"conv.*", 7}});
  const auto adapter =
      peft::add_adapter(*model, options, peft::named({"q", "fc", "conv", "conv1", "conv3", "emb", "mlp.0"}));
  CHECK(check_round_trip(model, adapter, folder / "out").empty());
  const auto config = config_of(folder / "out");
  CHECK(config["rank_pattern"] == nlohmann::json{{"^q", 2}, {"blocks\\.[01]\\.fc", 5}});
  CHECK(config["alpha_pattern"] == nlohmann::json{{"conv.*", 7}});
  CHECK(config["lora_alpha"] == 5.5);
  CHECK(config["init_lora_weights"] == "gaussian");
  auto other = toy();
  const auto loaded = load(other, folder / "out").layers<peft::LoraImpl>();
  const auto made = adapter.layers<peft::LoraImpl>();
  REQUIRE(loaded.size() == made.size());
  for (size_t i = 0; i < made.size(); ++i) {
    CHECK(loaded[i]->rank == made[i]->rank);
    CHECK(loaded[i]->scaling() == made[i]->scaling());
    CHECK(loaded[i]->options.dropout() == 0.25);
  }
}

TEST_CASE("Loading draws nothing, freezes, and names the adapter anew", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto adapter = peft::add_adapter(
      *model,
      {peft::on(peft::LoraOptions(2), q_emb_conv), peft::on(peft::ReplaceOptions(), peft::named({"head"}))},
      "first");
  perturb(adapter);
  peft::save_adapter(adapter, folder / "out");

  auto other = toy();
  other->train();
  torch::manual_seed(7);
  const auto expected = torch::randn({4});
  torch::manual_seed(7);
  const bool trainable = GENERATE(false, true);
  // A module of the model bears this name too, but none of the adapted layers has such a child.
  const auto loaded = load(other, folder / "out", nullptr, "encoder", trainable);
  CHECK(same(torch::randn({4}), expected));
  CHECK(loaded.name() == "encoder");
  CHECK(peft::active_adapters(*other) == Strings{"encoder"});
  CHECK(loaded.count() == (trainable ? adapter.count() : 0));
  for (const auto& item : other->named_parameters()) {
    CHECK(item.value().requires_grad() == (trainable && item.key().find(".encoder.") != std::string::npos));
  }
  other->eval();
  CHECK(same(other->forward(ids()), model->forward(ids())));
  peft::merge(*other);
  CHECK(torch::allclose(other->forward(ids()), model->forward(ids()), 1e-5, 1e-6));
}

TEST_CASE("Several adapters lie in Python PEFT's sub-directories", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  perturb(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"})));
  perturb(peft::add_adapter(*model, peft::LoraOptions(3), peft::named({"v"}), "second"));
  CHECK(peft::save_adapters(*model, folder / "out").empty());
  CHECK(shapes_of(folder / "out").size() == 2);
  CHECK(shapes_of(folder / "out/second").at("v.lora_A.weight") == std::vector<int64_t>{3, 8});

  auto other = toy();
  CHECK(load(other, folder / "out", nullptr, "second").sites() == Strings{"v"});
  peft::set_active(*model, {"second"});
  CHECK(same(other->forward(ids()), model->forward(ids())));
  CHECK(load(other, folder / "out", nullptr, "first").sites() == Strings{"q"});
  std::filesystem::remove(folder / "out/adapter_config.json");
  CHECK_THAT(refusal_of(other, folder / "out"), Contains("out/adapter_config.json' is missing"));
  CHECK_THAT(refusal_of(other, folder / "none"),
             Contains("none' must be an adapter's folder, but there is none"));
}

TEST_CASE("An existing folder keeps its other files", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"}));
  std::filesystem::create_directory(folder / "out");
  write_bytes(folder / "out/notes.txt", "mine");
  peft::save_adapter(adapter, folder / "out");
  perturb(adapter);
  peft::save_adapter(adapter, folder / "out");
  CHECK(read_bytes(folder / "out/notes.txt") == "mine");
  CHECK(std::distance(std::filesystem::directory_iterator(folder / "out"), {}) == 3);
  write_bytes(folder / "file", "");
  CHECK_THROWS_WITH(peft::save_adapter(adapter, folder / "file"), Contains("file"));
  CHECK(folder.count() == 2);
}

TEST_CASE("Half and double files are widened and rounded to the adapter's type", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), q_emb_conv);
  perturb(adapter);
  peft::save_adapter(adapter, folder / "out");
  const auto type = GENERATE(torch::kFloat16, torch::kBFloat16, torch::kFloat64);
  change_tensors(folder / "out", [&](auto& tensors) {
    for (auto& [key, tensor] : tensors) tensor = tensor.to(type);
  });
  auto other = toy();
  const auto loaded = load(other, folder / "out");
  const auto from = adapter.named_tensors(), to = loaded.named_tensors();
  REQUIRE(from.size() == to.size());
  for (size_t i = 0; i < from.size(); ++i) {
    CHECK(to[i].second.scalar_type() == torch::kFloat32);
    CHECK(same(to[i].second, from[i].second.to(type).to(torch::kFloat32)));
  }
}

TEST_CASE("What is wrong with a directory is listed at once and nothing is changed", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), q_emb_conv), out);
  change_config(out, [](auto& json) {
    json["lora_alpha"] = "many";
    json["lora_dropout"] = 1.5;
    json["task_type"] = "POETRY";
  });
  change_tensors(out, [](auto& tensors) {
    tensors.erase("base_model.model.q.lora_A.weight");
    tensors["base_model.model.v.lora_A.weight"] = torch::zeros({2, 8});
    tensors["base_model.model.q.lora_B.weight"] = torch::zeros({8, 3});
    tensors["base_model.model.conv.lora_B.weight"] = torch::zeros({4, 2, 1, 1}, torch::kInt32);
  });
  auto other = toy();
  for (auto& parameter : other->parameters()) parameter.set_requires_grad(true);
  const auto before = other->named_parameters().keys();
  torch::manual_seed(3);
  const auto text = refusal_of(other, out);
  CHECK_THAT(text, Contains("load_adapter: '" + out.string() + "': 7 problems"));
  for (const char* line :
       {"adapter_config.json: 'lora_alpha' must be a finite number, but got \"many\"",
        "adapter_config.json: 'lora_dropout' must be a number in [0, 1), but got 1.5",
        "adapter_config.json: 'task_type' must be one of SEQ_CLS",
        "adapter_model.safetensors: 'base_model.model.q.lora_A.weight' expected (2, 8), but it is missing",
        "adapter_model.safetensors: 'base_model.model.v.lora_A.weight' expected no such tensor, but got (2, "
        "8)",
        "adapter_model.safetensors: 'base_model.model.q.lora_B.weight' expected (8, 2), but got (8, 3)",
        "adapter_model.safetensors: 'base_model.model.conv.lora_B.weight' expected F32, F16, BF16 or F64 "
        "values, but "
        "got I32"}) {
    CHECK_THAT(text, Contains(line));
  }
  const auto drawn = torch::randn({2});
  torch::manual_seed(3);
  CHECK(same(drawn, torch::randn({2})));
  CHECK(other->named_parameters().keys() == before);
  for (const auto& parameter : other->parameters()) CHECK(parameter.requires_grad());
  CHECK(peft::active_adapters(*other).empty());
}

TEST_CASE("Values of the config that cannot be are refused by key", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), q_emb_conv), out);
  struct Row {
    std::string key, value, error;
  };
  const auto row = GENERATE(values<Row>({
      {"r", "0", "'r' must be an integer of at least 1, but got 0"},
      {"r", "2.5", "'r' must be an integer of at least 1, but got 2.5"},
      {"rank_pattern", R"({"q": 0})", "'rank_pattern' must map expressions to integers"},
      {"rank_pattern", R"({"(": 2})", "'(' is no regular expression"},
      {"bias", R"("some")", R"('bias' must be "none", "all" or "lora_only", but got "some")"},
      {"target_modules", "[]", "'target_modules' must name at least one module"},
      {"target_modules", "7", "'target_modules' must be a list of names, but got 7"},
      {"target_modules", R"(["qq"])",
       "'target_modules' matches no module of this model; expected one like 'q'"},
      {"target_modules", R"(["ln"])", "'ln' cannot take the LoRA: a LayerNorm has no low-rank form"},
      {"target_modules", R"(["encoder"])", "means 'encoder', which is a"},
      {"target_modules", R"(["mlp.1"])",
       "means 'mlp.1', which is a plain torch::nn::TanhImpl and takes no LoRA"},
      {"target_modules", R"("(?<=x)q")", "'(?<=x)q' uses '(?<=', which is not supported"},
      {"target_modules", "null", "'target_modules' must be given for a base of this kind"},
      {"layers_to_transform", "[-1]",
       "'layers_to_transform' must be an integer of at least 0 or a list of them, but got [-1]"},
      {"layers_pattern", R"(["layer"])", "'layers_to_transform' must be given where 'layers_pattern' is"},
      {"use_rslora", "3", "'use_rslora' must be true or false, but got 3"},
      {"modules_to_save", R"("head")", R"('modules_to_save' must be a list of names, but got "head")"},
      {"peft_type", R"("POETRY")", R"(, but got "POETRY")"},
      {"peft_type", "null", "'peft_type' must be given"},
      {"use_dora", "true", "'base_model.model.q.lora_magnitude_vector' expected (8), but it is missing"},
      {"trainable_token_indices", "[1]", "no module's path matches the expression '.*embed_tokens'"},
      {"init_lora_weights", R"("pissa_niter_4")",
       R"('init_lora_weights' "pissa_niter_4" belongs to a base whose weights)"},
      {"init_lora_weights", R"("magic")", R"('init_lora_weights' must be true, false, "gaussian")"},
  }));
  CAPTURE(row.key, row.value);
  change_config(out, [&](auto& json) { json[row.key] = nlohmann::json::parse(row.value); });
  auto other = toy();
  CHECK_THAT(refusal_of(other, out), Contains(row.error));
}

TEST_CASE("An adapter for another wrapper of the base is pointed out", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"})), out);
  change_tensors(out, [](auto& tensors) {
    std::map<std::string, Tensor> wrapped;
    for (const auto& [key, tensor] : tensors) wrapped["base_model.model.bert." + key.substr(17)] = tensor;
    tensors = wrapped;
  });
  auto other = toy();
  CHECK_THAT(refusal_of(other, out),
             Contains("'base_model.model.q.lora_A.weight' expected (2, 8), but it is missing (hint: "
                      "the file has 'base_model.model.bert.q.lora_A.weight'"));
}

TEST_CASE("Broken and missing files are named", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), q_emb_conv), out);
  auto other = toy();
  SECTION("no tensors") {
    std::filesystem::remove(out / "adapter_model.safetensors");
    CHECK_THAT(refusal_of(other, out), Contains("adapter_model.safetensors is missing"));
  }
  SECTION("a cut file") {
    write_bytes(out / "adapter_model.safetensors",
                read_bytes(out / "adapter_model.safetensors").substr(0, 300));
    CHECK_THAT(refusal_of(other, out),
               Contains("adapter_model.safetensors' is not a valid safetensors file"));
  }
  SECTION("a config that is no JSON") {
    write_bytes(out / "adapter_config.json", "{\"r\": ");
    CHECK_THAT(refusal_of(other, out), Contains("adapter_config.json' is not valid JSON"));
  }
  SECTION("a name that is taken") {
    CHECK_THAT(refusal_of(model, out), Contains("already has an adapter 'default'"));
  }
}

TEST_CASE("A config that nests without end is refused", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"})), folder / "out");
  const std::string open(200'000, '['), close(200'000, ']');
  write_bytes(folder / "out" / "adapter_config.json", R"({"peft_type": "LORA", "r": )" + open + close + "}");
  auto other = toy();
  CHECK_THAT(refusal_of(other, folder / "out"), Contains("nests its values more than 100 deep"));
}

TEST_CASE("Unknown keys are noted and absent ones have Python PEFT's defaults", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  const auto adapter = peft::add_adapter(*model, peft::LoraOptions(8).alpha(8), peft::named({"q"}));
  perturb(adapter);
  peft::save_adapter(adapter, out);
  write_bytes(out / "adapter_config.json",
              R"({"peft_type": "LORA", "target_modules": ["q", "absent"], "shiny": 1})");
  auto other = toy();
  Strings notes;
  load(other, out, &notes);
  CHECK(notes == Strings{"adapter_config.json: the unknown key 'shiny' was ignored",
                         "adapter_config.json: 'target_modules': no module matches 'absent'"});
  CHECK(same(other->forward(ids()), model->forward(ids())));
}

TEST_CASE("Keys may lack the prefix, hold the adapter's name, and repeat what stands elsewhere",
          "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  const auto adapter = peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), q_emb_conv),
                                                  peft::on(peft::ReplaceOptions(), peft::named({"head"}))});
  perturb(adapter);
  peft::save_adapter(adapter, out);
  SECTION("without a prefix") {
    change_tensors(out, [](auto& tensors) {
      std::map<std::string, Tensor> plain;
      for (const auto& [key, tensor] : tensors) plain[key.substr(17)] = tensor;
      tensors = plain;
    });
  }
  SECTION("with the adapter's name") {
    change_tensors(out, [](auto& tensors) {
      tensors["base_model.model.q.lora_A.default.weight"] = tensors.at("base_model.model.q.lora_A.weight");
      tensors["base_model.model.emb.lora_embedding_A.default"] =
          tensors.at("base_model.model.emb.lora_embedding_A");
      tensors.erase("base_model.model.q.lora_A.weight");
      tensors.erase("base_model.model.emb.lora_embedding_A");
    });
  }
  SECTION("with copies of Python's wrappers and of the base") {
    change_tensors(out, [&](auto& tensors) {
      tensors["base_model.model.head.modules_to_save.bias"] = torch::zeros({3});
      tensors["base_model.model.head.original_module.bias"] = torch::zeros({3});
      tensors["base_model.model.emb.base_layer.weight"] = toy()->emb->base->weight.detach().clone();
    });
  }
  auto other = toy();
  load(other, out);
  CHECK(same(other->forward(ids()), model->forward(ids())));

  change_tensors(out, [](auto& tensors) {
    tensors["base_model.model.emb.base_layer.weight"] = torch::zeros({10, 8});
  });
  auto third = toy();
  CHECK_THAT(refusal_of(third, out),
             Contains("'base_model.model.emb.base_layer.weight' expected the base's own values"));
}

TEST_CASE("Keys of two adapters in one file are refused", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"})), out);
  change_tensors(out, [](auto& tensors) {
    const auto a = tensors.at("base_model.model.q.lora_A.weight");
    tensors.erase("base_model.model.q.lora_A.weight");
    tensors["base_model.model.q.lora_A.default.weight"] = a + 1;
    tensors["base_model.model.q.lora_A.mine.weight"] = a;
  });
  auto other = toy();
  CHECK_THROWS_WITH(peft::load_adapter(*other, out, "mine"),
                    Contains("q.lora_A.default.weight' and '") && Contains("are both 'q.lora_A.weight'"));
}

TEST_CASE("Values that are not finite are loaded with a note", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"})), out);
  change_tensors(out,
                 [](auto& tensors) { tensors.at("base_model.model.q.lora_A.weight").fill_(std::nan("")); });
  auto other = toy();
  Strings notes;
  load(other, out, &notes);
  CHECK(notes ==
        Strings{"adapter_model.safetensors: 'base_model.model.q.lora_A.weight' holds NaN or infinity"});
}

TEST_CASE("Targets are written in the shortest words that mean the same in Python", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  const auto write = [&](const peft::Target& target) {
    CHECK(check_round_trip(model, peft::add_adapter(*model, peft::LoraOptions(2), target), out).empty());
    return config_of(out);
  };
  SECTION("names") {
    const auto config = write(peft::named({"fc", "q"}));
    CHECK(config["target_modules"] == Strings{"fc", "q"});
  }
  SECTION("layers") {
    const auto config = write(peft::named({"fc"}).layers({0, 2}, {"blocks"}));
    CHECK(config["target_modules"] == Strings{"fc"});
    CHECK(config["layers_to_transform"] == std::vector<int>{0, 2});
    CHECK(config["layers_pattern"] == Strings{"blocks"});
  }
  SECTION("an exclusion of targets") {
    const auto config = write(peft::named({"fc", "out"}).exclude({"blocks.1.fc"}));
    CHECK(config["target_modules"] == Strings{"fc", "out"});
    CHECK(config["exclude_modules"] == Strings{"blocks.1.fc"});
  }
  SECTION("an exclusion of a container, which Python has not") {
    const auto config = write(peft::named({"fc"}).exclude({"blocks.1"}));
    CHECK(config["target_modules"] == Strings{"encoder.blocks.0.fc", "encoder.blocks.2.fc"});
    CHECK(config["exclude_modules"].is_null());
  }
  SECTION("a container, which Python refuses") {
    const auto config = write(peft::named({"blocks.1"}));
    CHECK(config["target_modules"] == Strings{"encoder.blocks.1.fc", "encoder.blocks.1.out"});
  }
  SECTION("an expression") {
    const auto config = write(peft::matching(R"(encoder\.blocks\.[01]\.(fc|out)|q)"));
    CHECK(config["target_modules"] == R"(encoder\.blocks\.[01]\.(fc|out)|q)");
  }
  SECTION("an expression Python reads otherwise") {
    const auto config = write(peft::matching("encoder\\.blocks\\.[[:digit:]]\\.fc"));
    CHECK(config["target_modules"] ==
          Strings{"encoder.blocks.0.fc", "encoder.blocks.1.fc", "encoder.blocks.2.fc"});
  }
  SECTION("a predicate") {
    const auto config = write(peft::where([](const peft::SiteInfo& site) { return site.layer == "Conv2d"; }));
    CHECK(config["target_modules"] == "conv");  // an expression: as a name it would mean 'x.conv' too
  }
}

TEST_CASE("Whole paths that are the ends of others are written as an expression", "[peft_directory]") {
  struct Teacher : torch::nn::Module {
    peft_test::ToyEncoder encoder = register_module("encoder", peft_test::ToyEncoder());
  };
  struct Pair : torch::nn::Module {
    peft_test::ToyEncoder encoder = register_module("encoder", peft_test::ToyEncoder());
    std::shared_ptr<Teacher> teacher = register_module("teacher", std::make_shared<Teacher>());
  };
  const TemporaryFolder folder;
  Pair model, other;
  const auto adapter =
      peft::add_adapter(model, peft::LoraOptions(2), peft::named({"fc"}).exclude({"teacher"}));
  CHECK(peft::save_adapter(adapter, folder / "out").empty());
  CHECK(config_of(folder / "out")["target_modules"] ==
        R"(encoder\.blocks\.0\.fc|encoder\.blocks\.1\.fc|encoder\.blocks\.2\.fc)");
  CHECK(peft::load_adapter(other, folder / "out").sites() == adapter.sites());
}

TEST_CASE("Biases of plain layers are asked for only where the file has them", "[peft_directory]") {
  struct Net : torch::nn::Module {
    peft::Conv2d conv = register_module("conv", peft::Conv2d(torch::nn::Conv2dOptions(2, 4, 3)));
    torch::nn::BatchNorm2d bn = register_module("bn", torch::nn::BatchNorm2d(4));
  };
  const TemporaryFolder folder;
  Net model, other;
  const auto adapter = peft::add_adapter(model, {peft::on(peft::LoraOptions(2), peft::named({"conv"})),
                                                 peft::on(peft::BiasOptions(), peft::all())});
  CHECK(peft::save_adapter(adapter, folder / "out").empty());
  CHECK(config_of(folder / "out")["bias"] == "all");
  CHECK(peft::load_adapter(other, folder / "out").count() == 0);
  CHECK(same(other.conv->delta("default").weight, model.conv->delta("default").weight));
  change_tensors(folder / "out",
                 [](auto& tensors) { tensors["base_model.model.bn.bias"] = torch::ones({4}); });
  CHECK_THROWS_WITH(peft::load_adapter(other, folder / "out", "second"),
                    Contains("'bias' \"all\" means 'bn', which is a plain torch::nn::BatchNorm2dImpl"));
}

TEST_CASE("An empty layers_pattern is none", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy(), other = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), q_emb_conv), folder / "out");
  change_config(folder / "out", [](auto& json) { json["layers_pattern"] = ""; });
  CHECK(refusal_of(other, folder / "out") == "nothing");
}

TEST_CASE("A pattern that matches no layer is refused, and noted where a file has it", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy(), other = toy();
  const auto wrong = peft::LoraOptions(2).alpha_pattern({{"qq", 32.0}});
  CHECK_THROWS_WITH(peft::add_adapter(*model, wrong, peft::named({"q"})),
                    Contains("the pattern 'qq' of 'lora' matches none of its layers; closest: 'q'"));
  const auto shared = peft::LoraOptions(2).alpha_pattern({{"v", 32.0}});  // of one part
  const auto adapter =
      peft::add_adapter(*model, {peft::on(shared, peft::named({"q"})), peft::on(shared, peft::named({"v"}))});
  CHECK(adapter.layers<peft::LoraImpl>().at(1)->alpha == 32);
  peft::save_adapter(adapter, folder / "out");
  change_config(folder / "out", [](auto& json) { json["alpha_pattern"]["qq"] = 32; });
  Strings notes;
  load(other, folder / "out", &notes);
  CHECK(notes == Strings{"adapter_config.json: the pattern 'qq' matches no layer"});
}

TEST_CASE("Patterns whose order decides are written as whole paths", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  // The first that matches wins: everywhere rank 2, whatever the second says. Sorted, the second would come
  // first.
  const auto options = peft::LoraOptions(4).rank_pattern({{"fc", 2}, {"blocks.0.fc", 6}});
  const auto adapter = peft::add_adapter(*model, options, peft::named({"fc", "q"}));
  CHECK(check_round_trip(model, adapter, folder / "out").empty());
  CHECK(config_of(folder / "out")["rank_pattern"] ==
        nlohmann::json{{"encoder.blocks.0.fc", 2}, {"encoder.blocks.1.fc", 2}, {"encoder.blocks.2.fc", 2}});
}

TEST_CASE("Parts of several ranks become one config with patterns", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto adapter =
      peft::add_adapter(*model, {peft::on(peft::LoraOptions(2).alpha(4), peft::named({"q"})),
                                 peft::on(peft::LoraOptions(3).alpha(5), peft::named({"fc"}))});
  CHECK(check_round_trip(model, adapter, folder / "out").empty());
  CHECK(config_of(folder / "out")["r"] == 2);
  CHECK(config_of(folder / "out")["rank_pattern"].size() == 3);

  auto other = toy();
  const auto mixed =
      peft::add_adapter(*other, {peft::on(peft::LoraOptions(2).rslora(true), peft::named({"q"})),
                                 peft::on(peft::LoraOptions(2), peft::named({"fc"}))});
  CHECK_THROWS_WITH(peft::save_adapter(mixed, folder / "mixed"),
                    Contains("must have the same rslora and lora_bias"));
  CHECK_FALSE(std::filesystem::exists(folder / "mixed"));
}

TEST_CASE("LoRA on blocks of rows is written as one of a higher rank", "[peft_directory]") {
  const TemporaryFolder folder;
  const bool rslora = GENERATE(false, true);
  auto model = toy();
  const auto options = peft::LoraOptions(2).alpha(3).rslora(rslora).enable({true, false, true, true});
  const auto adapter = peft::add_adapter(*model, options, peft::named({"q"}));
  perturb(adapter);
  const auto notes = peft::save_adapter(adapter, folder / "out");
  REQUIRE(notes.size() == 1);
  CHECK_THAT(notes[0], Contains("block-diagonal B"));
  CHECK(shapes_of(folder / "out") == Shapes{{"q.lora_A.weight", {6, 8}}, {"q.lora_B.weight", {8, 6}}});
  auto other = toy();
  load(other, folder / "out");
  CHECK(torch::allclose(other->forward(ids()), model->forward(ids()), 1e-5, 1e-6));
}

TEST_CASE("What Python PEFT has no words for is written in a form of our own", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  const auto check = [&](const peft::Adapter& adapter, const std::string& type, const std::string& reason) {
    const auto notes = check_round_trip(model, adapter, out);
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0], Contains("Python PEFT cannot read this adapter: " + reason));
    CHECK(config_of(out)["peft_type"] == type);
  };
  SECTION("a head alone") {
    check(peft::add_adapter(*model, peft::ReplaceOptions(), peft::named({"head"})), "REPLACE",
          "it has no LoRA");
    CHECK(shapes_of(out) == Shapes{{"head.weight", {3, 10}}, {"head.bias", {3}}});
    CHECK_FALSE(config_of(out).contains("r"));
  }
  SECTION("every bias and the head") {
    check(peft::add_adapter(*model, {peft::on(peft::BiasOptions(), everywhere({"head"})),
                                     peft::on(peft::ReplaceOptions(), peft::named({"head"}))}),
          "BIAS", "it has no LoRA");
    CHECK(shapes_of(out).count("q.bias") == 1);
    CHECK(config_of(out)["bias_modules"].size() == 14);
  }
  SECTION("every layer") {
    check(peft::add_adapter(*model, peft::ReplaceOptions(), peft::all()), "REPLACE", "it has no LoRA");
    CHECK(shapes_of(out).size() == model->named_parameters().size() / 2);
  }
  SECTION("a LoRA with biases of some layers") {
    check(peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                     peft::on(peft::BiasOptions(), peft::named({"v"}))}),
          "BIAS", "the biases it trains are neither");
  }
  SECTION("a saved layer whose path ends another's") {
    check(peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                     peft::on(peft::ReplaceOptions(), peft::named({"v"}))}),
          "REPLACE", "Python would save 'conv' too");
  }
  SECTION("a LoRA on a layer of its own") {
    check(peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                     peft::on(peft::ReplaceOptions(), peft::named({"q"}))}),
          "REPLACE", "'q' carries a LoRA inside a layer of its own");
  }
}

TEST_CASE("A task whose class asks for a head is named only with one", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  model->description = {"SEQ_CLS", "some/base", "bert"};
  const auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"}));
  CHECK(peft::save_adapter(adapter, folder / "out").size() == 1);
  CHECK(config_of(folder / "out")["task_type"].is_null());
  CHECK(config_of(folder / "out")["base_model_name_or_path"] == "some/base");
}

struct HeadImpl : torch::nn::Cloneable<HeadImpl> {
  HeadImpl() { HeadImpl::reset(); }
  void reset() override {
    dense = register_module("dense", peft::Linear(4, 4));
    out_proj = register_module("out_proj", peft::Linear(4, 2));
  }
  peft::Linear dense{nullptr}, out_proj{nullptr};
};
TORCH_MODULE(Head);

/// A model with Hugging Face's name for a head, here of two layers.
struct HeadedImpl : torch::nn::Cloneable<HeadedImpl>, peft::Described {
  HeadedImpl() { HeadedImpl::reset(); }
  void reset() override {
    q = register_module("q", peft::Linear(4, 4));
    dense = register_module("dense", peft::Linear(4, 4));
    classifier = register_module("classifier", Head());
  }
  peft::ModelDescription describe() const override { return {"SEQ_CLS", "some/base", "roberta"}; }
  peft::Linear q{nullptr}, dense{nullptr};
  Head classifier{nullptr};
};
TORCH_MODULE(Headed);

TEST_CASE("The head that a task's class saves is read without its name, as before peft 0.11",
          "[peft_directory]") {
  const TemporaryFolder folder;
  Headed model;
  const auto adapter =
      peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                 peft::on(peft::ReplaceOptions(), peft::named({"classifier"}))});
  perturb(adapter);
  CHECK(peft::save_adapter(adapter, folder / "out").empty());
  CHECK(config_of(folder / "out")["task_type"] == "SEQ_CLS");
  change_config(folder / "out", [](auto& json) { json["modules_to_save"] = nullptr; });
  Headed other;
  const auto loaded = peft::load_adapter(*other, folder / "out");
  CHECK(loaded.sites() == Strings{"q", "classifier.dense", "classifier.out_proj"});

  // With biases too, which leave out what is saved; layers of the head that a name means are left out as
  // well.
  Headed fourth;
  const auto biased = peft::add_adapter(
      *fourth, {peft::on(peft::LoraOptions(2), peft::named({"q", "dense"}).exclude({"classifier"})),
                peft::on(peft::BiasOptions(), everywhere({"classifier"})),
                peft::on(peft::ReplaceOptions(), peft::named({"classifier"}))});
  perturb(biased);
  peft::save_adapter(biased, folder / "biased");
  change_config(folder / "biased", [](auto& json) {
    json["modules_to_save"] = nullptr;
    json["target_modules"] = {"dense", "q"};
  });
  Headed fifth;
  CHECK(peft::save_adapter(peft::load_adapter(*fifth, folder / "biased"), folder / "again").empty());
  CHECK(config_of(folder / "again")["peft_type"] == "LORA");
  CHECK(config_of(folder / "again")["bias"] == "all");
  CHECK(config_of(folder / "again")["target_modules"] == Strings{"dense", "q"});

  // A part of the head is not what that class asks for.
  Headed third;
  const auto part =
      peft::add_adapter(*third, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                 peft::on(peft::ReplaceOptions(), peft::named({"classifier.out_proj"}))});
  const auto notes = peft::save_adapter(part, folder / "part");
  REQUIRE(notes.size() == 1);
  CHECK_THAT(notes[0], Contains("task type SEQ_CLS is left out"));
  CHECK(config_of(folder / "part")["task_type"].is_null());
}

TEST_CASE("Features that Python turns on by an empty setting are not passed over", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"})), folder / "out");
  for (const char* key : {"kasa_config", "arrow_config", "velora_config", "monteclora_config"}) {
    change_config(folder / "out", [&](auto& json) { json[key] = nlohmann::json::object(); });
    auto other = toy();
    CHECK_THAT(refusal_of(other, folder / "out"), Contains(std::string("'") + key + "' is not supported"));
    change_config(folder / "out", [&](auto& json) { json[key] = nullptr; });
  }
  change_config(folder / "out", [&](auto& json) { json["megatron_config"] = nlohmann::json::object(); });
  auto other = toy();
  CHECK(refusal_of(other, folder / "out") == "nothing");
}

TEST_CASE("Targets that are not given follow from the type of the base", "[peft_directory]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto adapter = peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q", "v"}));
  perturb(adapter);
  peft::save_adapter(adapter, folder / "out");
  change_config(folder / "out", [](auto& json) { json["target_modules"] = nullptr; });
  auto other = toy();
  other->description.model_type = "t5";
  CHECK(load(other, folder / "out").sites() == Strings{"q", "v"});
}

TEST_CASE("Names are matched as Python PEFT matches them", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  auto model = toy();
  peft::save_adapter(peft::add_adapter(*model, peft::LoraOptions(2), peft::named({"q"})), out);
  const auto sites_with = [&](const std::function<void(nlohmann::json&)>& change) {
    change_config(out, change);
    peft::internal::Problems problems;
    const auto config =
        peft::internal::PeftConfigReader(out / "adapter_config.json", "", problems, [](const auto&) {
        }).read();
    problems.raise("config");
    auto other = toy();
    const peft::internal::ModuleFinder finder(*other);
    auto sites = finder.method_sites(config, problems, [](const auto&) {});
    for (const auto& path : finder.saved_sites(config, problems)) sites.push_back("saved " + path);
    problems.raise("sites");
    return sites;
  };
  CHECK(sites_with([](auto& json) { json["target_modules"] = "All-Linear"; }).size() == 11);
  CHECK(sites_with([](auto& json) {
          json["target_modules"] = "all-linear";
          json["exclude_modules"] = ".*(fc|out)";
          json["modules_to_save"] = {"head", "ln"};
        }) == Strings{"q", "v", "mlp.0", "mlp.2", "saved ln", "saved head"});
  CHECK(sites_with([](auto& json) {
          json["target_modules"] = {"fc", "encoder.blocks.1.out"};  // a whole path is found in every layer
          json["exclude_modules"] = nullptr;
          json["modules_to_save"] = {"v"};  // ends so, dot or not: but 'conv' ends otherwise here
          json["layers_to_transform"] = 2;
        }) == Strings{"encoder.blocks.1.out", "encoder.blocks.2.fc", "saved v", "saved conv"});
}

TEST_CASE("Python's regular expressions are read as they are meant", "[python_regex]") {
  using peft::internal::to_ecmascript;
  struct Row {
    std::string python, text;
  };
  const auto row = GENERATE(values<Row>({
      {R"(.*\.layer\.\d+\.(q|v)_proj$)", R"(.*\.layer\.\d+\.(q|v)_proj$)"},
      {R"((?P<kind>q|v)\Z)", R"((q|v)$)"},
      {R"(\Aq(?:a|b)(?=c)(?!d))", R"(^q(?:a|b)(?=c)(?!d))"},
      {R"(a{,3}b{2}c{1,}d{x})", R"(a{0,3}b{2}c{1,}d\{x\})"},
      {R"([]a][^]b][[:x])", R"([\]a][^\]b][\[:x])"},
      {R"(q(?#the query)x*?)", R"(qx*?)"},
  }));
  CHECK(to_ecmascript(row.python).text == row.text);
  CHECK(to_ecmascript(row.python).problem.empty());
  for (const char* refused : {"(?i)q", "(?<!x)q", "(?P=a)", "a*+", "[a", "(a", "\\", "\\y"}) {
    CAPTURE(refused);
    CHECK_FALSE(to_ecmascript(refused).problem.empty());
  }
}

TEST_CASE("All layers of a flat model are written so that they are found again", "[peft_directory]") {
  const TemporaryFolder folder;
  const auto make = [] {
    torch::manual_seed(1);
    return torch::nn::Sequential(torch::nn::Linear(4, 4),
                                 torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})),
                                 torch::nn::Linear(4, 2));
  };
  auto model = make(), again = make();
  const auto adapter =
      peft::add_adapter(*model, peft::LoraOptions(2).init(peft::LoraInit::random), peft::all(), "flat");
  adapter.scale(0.5);
  const auto notes = peft::save_adapter(adapter, folder / "out");
  CHECK(std::any_of(notes.begin(), notes.end(), [](const std::string& line) {
    return line.find("scale is not written") != std::string::npos;
  }));
  adapter.scale(1.0);
  const auto x = torch::randn({3, 4});
  CHECK(peft::load_adapter(*again, folder / "out", "flat").sites() == adapter.sites());
  CHECK(torch::equal(again->forward(x), model->forward(x)));
}
