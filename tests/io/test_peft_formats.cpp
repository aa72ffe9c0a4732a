#include <torch/torch.h>

#include "peft/io/peft_directory.h"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "io/toy_model.h"

using peft_test::read_bytes;
using peft_test::TemporaryFolder;
using peft_test::Toy;
using peft_test::write_bytes;
using torch::Tensor;

namespace {

using Strings = std::vector<std::string>;

Toy toy() {
  torch::manual_seed(1);
  Toy model;
  model->eval();
  return model;
}

Tensor ids() { return torch::arange(12).view({3, 4}).remainder(10); }

/// Moves what trains away from its start.
void perturb(const peft::Adapter& adapter) {
  const torch::NoGradGuard no_grad;
  for (auto& tensor : adapter.parameters()) tensor.add_(torch::randn_like(tensor), 0.2);
}

nlohmann::json config_of(const std::filesystem::path& folder) {
  return nlohmann::json::parse(read_bytes(folder / "adapter_config.json"));
}

/// What `load_adapter` says is wrong.
std::string refusal_of(const std::filesystem::path& folder) {
  auto model = toy();
  try {
    peft::load_adapter(*model, folder, "default", /*trainable=*/false, [](const std::string&) {});
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "nothing";
}

/// An adapter of each type, by its `peft_type` and what is special about it.
peft::Adapter make(Toy& model, const std::string& kind) {
  const auto linear = peft::named({"q", "fc"});
  const auto start = [&](peft::LoraInit init) { return peft::LoraOptions(2).alpha(3).init(init); };
  if (kind == "LORA, DoRA") {
    return peft::add_adapter(*model, peft::DoraOptions(peft::LoraOptions(2)),
                             peft::named({"q", "emb", "conv"}));
  }
  if (kind == "LORA, PiSSA") return peft::add_adapter(*model, start(peft::LoraInit::pissa), linear);
  if (kind == "LORA, LoftQ") return peft::add_adapter(*model, start(peft::LoraInit::loftq), linear);
  if (kind == "LORA, MiCA") return peft::add_adapter(*model, start(peft::LoraInit::mica), linear);
  if (kind == "LORA, tokens") {
    return peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), linear),
                                      peft::on(peft::TrainableTokensOptions({3, 1}), peft::named({"emb"}))});
  }
  if (kind == "ADALORA") {
    return peft::add_adapter(*model, peft::AdaLoraOptions(20).init_rank(4).target_rank(2).tinit(2).tfinal(3),
                             linear);
  }
  if (kind == "LOHA") return peft::add_adapter(*model, peft::LohaOptions(2), peft::named({"q", "conv"}));
  if (kind == "LOKR") return peft::add_adapter(*model, peft::LokrOptions(2), peft::named({"q", "conv"}));
  if (kind == "VERA") return peft::add_adapter(*model, peft::VeraOptions(3), linear);
  if (kind == "VERA, no projection") {
    return peft::add_adapter(*model, peft::VeraOptions(3).save_projection(false), linear);
  }
  if (kind == "OFT") return peft::add_adapter(*model, peft::OftOptions(4), peft::named({"q", "v"}));
  if (kind == "BOFT") return peft::add_adapter(*model, peft::BoftOptions(2), peft::named({"q", "v"}));
  if (kind == "IA3") return peft::add_adapter(*model, peft::Ia3Options(), peft::named({"q", "conv"}));
  if (kind == "LN_TUNING") {
    return peft::add_adapter(*model, peft::LayerNormTuningOptions(), peft::named({"ln"}));
  }
  return peft::add_adapter(*model, peft::TrainableTokensOptions({3, 1}), peft::named({"emb"}));
}

}  // namespace

TEST_CASE("Every type of adapter is read as it was written", "[peft_formats]") {
  const TemporaryFolder folder;
  const auto kind = GENERATE(as<std::string>{}, "LORA, DoRA", "LORA, PiSSA", "LORA, LoftQ", "LORA, MiCA",
                             "LORA, tokens", "ADALORA", "LOHA", "LOKR", "VERA", "VERA, no projection", "OFT",
                             "BOFT", "IA3", "LN_TUNING", "TRAINABLE_TOKENS");
  CAPTURE(kind);
  auto model = toy();
  const auto adapter = make(model, kind);
  perturb(adapter);
  peft::save_adapter(adapter, folder / "out");
  const auto config = config_of(folder / "out");
  CHECK(config["peft_type"] == kind.substr(0, kind.find(',')));

  auto other = toy();
  torch::manual_seed(7);
  const auto drawn = torch::randn({4});
  torch::manual_seed(7);
  Strings notes;
  const auto loaded = peft::load_adapter(*other, folder / "out", "default", /*trainable=*/true,
                                         [&](const std::string& line) { notes.push_back(line); });
  CHECK(torch::equal(torch::randn({4}), drawn));
  CHECK(notes.empty());
  other->eval();
  CHECK(torch::allclose(other->forward(ids()), model->forward(ids()), 1e-5, 1e-6));
  CHECK(loaded.sites() == adapter.sites());
  const auto ranks = kind == "LORA, PiSSA" ? 2 : 1;  // its start is written with the rest
  CHECK(loaded.count() == adapter.count() * ranks);

  peft::save_adapter(loaded, folder / "again");
  for (const char* file : {"adapter_config.json", "adapter_model.safetensors"}) {
    CHECK(read_bytes(folder / "again" / file) == read_bytes(folder / "out" / file));
  }
}

TEST_CASE("Values of a method's config that cannot be are refused by key", "[peft_formats]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  struct Row {
    std::string type, key, value, error;
  };
  const auto row = GENERATE(values<Row>({
      {"LORA, DoRA", "use_dora", "false", "lora_magnitude_vector' expected no such tensor, but got (8)"},
      {"LORA, LoftQ", "loftq_config", R"({"loftq_bits": 3})", "loftq_bits must be 4 or 8, but got 3"},
      {"LORA, LoftQ", "loftq_config", R"({"loftq_iter": 0})", "loftq_iter must be positive, but got 0"},
      {"LORA, LoftQ", "init_lora_weights", R"("corda")", "'init_lora_weights\' \"corda\" belongs to a base"},
      {"LORA, MiCA", "r", "9", "cannot take the LoRA: init mica needs 9 singular vectors"},
      {"ADALORA", "total_step", "0", "'total_step' must be an integer of at least 1, but got 0"},
      {"ADALORA", "total_step", "null", "'total_step' must be an integer of at least 1, but got null"},
      {"ADALORA", "total_step", "5", "AdaLoraOptions: "},
      {"ADALORA", "init_r", "0", "'init_r' must be an integer of at least 1, but got 0"},
      {"ADALORA", "target_r", "-1", "'target_r' must be an integer of at least 0, but got -1"},
      {"ADALORA", "target_r", "9", "9"},
      {"ADALORA", "tinit", "-1", "'tinit' must be an integer of at least 0, but got -1"},
      {"ADALORA", "tfinal", "1.5", "'tfinal' must be an integer of at least 0, but got 1.5"},
      {"ADALORA", "deltaT", "0", "'deltaT' must be an integer of at least 1, but got 0"},
      {"ADALORA", "beta1", "1", "'beta1' must be a number in (0, 1), but got 1"},
      {"ADALORA", "beta2", "0", "'beta2' must be a number in (0, 1), but got 0"},
      {"ADALORA", "orth_reg_weight", "-0.5",
       "'orth_reg_weight' must be a number of at least 0, but got -0.5"},
      {"ADALORA", "lora_alpha", R"("x")", "'lora_alpha' must be a finite number, but got \"x\""},
      {"ADALORA", "lora_dropout", "1", "'lora_dropout' must be a number in [0, 1), but got 1"},
      {"ADALORA", "rank_pattern", R"({"q.lora_E": [true]})",
       "must map '<layer>.lora_E' to lists of init_r = 4"},
      {"ADALORA", "rank_pattern", R"({"q": 3})", "must map '<layer>.lora_E' to lists of init_r = 4"},
      {"ADALORA", "rank_pattern", R"({"q.lora_E": [true, false, true, true]})",
       "'base_model.model.q.lora_A' expected (3, 8), but got (4, 8)"},
      {"ADALORA", "rank_pattern", R"({"w.lora_E": [true, false, true, true]})",
       "'rank_pattern' names 'w.lora_E', but the adapter has no such layer"},
      {"ADALORA", "use_dora", "true", "'use_dora' is not supported yet, but got true"},
      {"LOHA", "r", "0", "'r' must be an integer of at least 1, but got 0"},
      {"LOHA", "alpha", R"("x")", "'alpha' must be a finite number, but got \"x\""},
      {"LOHA", "rank_dropout", "1", "'rank_dropout' must be a number in [0, 1), but got 1"},
      {"LOHA", "module_dropout", "-1", "'module_dropout' must be a number in [0, 1), but got -1"},
      {"LOHA", "rank_pattern", R"({"q": 0})",
       "'rank_pattern' must map expressions to integers of at least 1"},
      {"LOHA", "rank_pattern", R"({"q": 3})", "hada_w1_a' expected (8, 3), but got (8, 2)"},
      {"LOHA", "use_effective_conv2d", "3", "'use_effective_conv2d' must be true or false, but got 3"},
      {"LOHA", "target_modules", R"(["emb"])", "'emb' cannot take the LoHa: "},
      {"LOKR", "decompose_factor", "-2", "'decompose_factor' must be an integer of at least -1, but got -2"},
      {"LOKR", "decompose_factor", "0", "decompose_factor must be positive or -1, but got 0"},
      {"LOKR", "decompose_both", R"("x")", "'decompose_both' must be true or false, but got \"x\""},
      {"LOKR", "init_weights", R"("x")", R"('init_weights' must be true, false or "lycoris", but got "x")"},
      {"VERA", "r", "0", "'r' must be an integer of at least 1, but got 0"},
      {"VERA", "r", "4", "'base_model.vera_A' expected (4, 8), but got (3, 8)"},
      {"VERA", "d_initial", R"("x")", "'d_initial' must be a finite number, but got \"x\""},
      {"VERA", "vera_dropout", "1", "'vera_dropout' must be a number in [0, 1), but got 1"},
      {"VERA", "projection_prng_key", "1.5", "'projection_prng_key' must be an integer"},
      {"VERA", "save_projection", "3", "'save_projection' must be true or false, but got 3"},
      {"VERA", "bias", R"("lora_only")",
       R"('bias' must be "none", "all" or "vera_only", but got "lora_only")"},
      {"OFT", "r", "-1", "'r' must be an integer of at least 0, but got -1"},
      {"OFT", "r", "2", "expected either block_size or blocks to be positive"},
      {"OFT", "oft_block_size", "2", "oft_R.weight' expected (4, 1), but got (2, 6)"},
      {"OFT", "eps", "0", "'eps' must be a positive number, but got 0"},
      {"OFT", "module_dropout", "1", "'module_dropout' must be a number in [0, 1), but got 1"},
      {"OFT", "num_cayley_neumann_terms", "1",
       "'num_cayley_neumann_terms' must be an integer of at least 2, but got 1"},
      {"OFT", "bias", R"("some")", R"('bias' must be "none", "all" or "oft_only", but got "some")"},
      {"BOFT", "boft_block_size", "-1", "'boft_block_size' must be an integer of at least 0, but got -1"},
      {"BOFT", "boft_block_num", "2", "expected either block_size or block_num to be positive"},
      {"BOFT", "boft_n_butterfly_factor", "0",
       "'boft_n_butterfly_factor' must be an integer of at least 1, but got 0"},
      {"BOFT", "boft_dropout", "1", "'boft_dropout' must be a number in [0, 1), but got 1"},
      {"BOFT", "boft_block_size", "3", "'q' cannot take the BOFT: "},
      {"LN_TUNING", "target_modules", R"(["q"])", "'q' cannot take the LayerNorm tuning: "},
  }));
  CAPTURE(row.type, row.key, row.value);
  auto model = toy();
  peft::save_adapter(make(model, row.type), out);
  auto config = config_of(out);
  config[row.key] = nlohmann::json::parse(row.value);
  write_bytes(out / "adapter_config.json", config.dump());
  CHECK_THAT(refusal_of(out), Contains(row.error) && Contains("load_adapter: '" + out.string() + "'"));
}

TEST_CASE("A type nobody knows is refused with those there are", "[peft_formats]") {
  const TemporaryFolder folder;
  auto model = toy();
  peft::save_adapter(make(model, "LN_TUNING"), folder / "out");
  auto config = config_of(folder / "out");
  config["peft_type"] = "POETRY";
  write_bytes(folder / "out/adapter_config.json", config.dump());
  CHECK_THAT(refusal_of(folder / "out"),
             Contains("'peft_type' must be one of ADALORA, BIAS, BOFT, IA3, LN_TUNING, LOHA, LOKR, LORA, "
                      "MASKED, MULTITASK_PROMPT_TUNING, NEW_BIAS, OFT, PREFIX_TUNING, PROMPT_TUNING, "
                      "P_TUNING, REPLACE, ROWS, TRAINABLE_TOKENS, VERA, but got \"POETRY\""));
}

TEST_CASE("One directory holds one method", "[peft_formats]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto mixed = peft::add_adapter(*model, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                                peft::on(peft::LohaOptions(2), peft::named({"v"}))});
  CHECK_THROWS_WITH(peft::save_adapter(mixed, folder / "out"),
                    Contains("'v' carries a LoHa and 'q' a LoRA, but one config holds one method"));
  auto other = toy();
  const auto halves =
      peft::add_adapter(*other, {peft::on(peft::LoraOptions(2), peft::named({"q"})),
                                 peft::on(peft::DoraOptions(peft::LoraOptions(2)), peft::named({"v"}))});
  CHECK_THROWS_WITH(peft::save_adapter(halves, folder / "out"),
                    Contains("'v' must carry LoRA without DoRA as 'q', for one config holds both"));
  const auto start = [](int64_t bits) {
    return peft::LoraOptions(2).init(peft::LoraInit::loftq).loftq_bits(bits);
  };
  auto third = toy();
  const auto bits = peft::add_adapter(
      *third, {peft::on(start(4), peft::named({"q"})), peft::on(start(8), peft::named({"v"}))});
  CHECK_THROWS_WITH(peft::save_adapter(bits, folder / "out"),
                    Contains("'v' must have the same loftq_bits and loftq_iter as 'q'"));
  const auto ranks = [](double dropout) {
    return peft::AdaLoraOptions(20).init_rank(4).target_rank(2).dropout(dropout);
  };
  auto fourth = toy();
  const auto rates = peft::add_adapter(
      *fourth, {peft::on(ranks(0.1), peft::named({"q"})), peft::on(ranks(0.5), peft::named({"v"}))});
  CHECK_THROWS_WITH(peft::save_adapter(rates, folder / "out"), Contains("'v' must have the same options as"));
  CHECK_FALSE(std::filesystem::exists(folder / "out"));
}

TEST_CASE("Numbers of a config keep their meaning in Python", "[peft_formats]") {
  const TemporaryFolder folder;
  auto model = toy();
  // A scale of the initial rank, which Python would take from what is left of it.
  peft::save_adapter(peft::add_adapter(*model, peft::AdaLoraOptions(20).init_rank(4).target_rank(2).alpha(0),
                                       peft::named({"q"})),
                     folder / "adalora");
  CHECK(config_of(folder / "adalora")["lora_alpha"] == 4);
  auto other = toy();
  const auto key = int64_t{1} << 40;
  peft::save_adapter(
      peft::add_adapter(*other, peft::VeraOptions(3).projection_prng_key(key), peft::named({"q"})),
      folder / "vera");
  auto third = toy();
  const auto loaded = peft::load_adapter(*third, folder / "vera");
  CHECK(loaded.layers<peft::VeraImpl>().at(0)->options.projection_prng_key() == key);
}

TEST_CASE("What Python has no words for beside a method is written in a form of our own", "[peft_formats]") {
  const TemporaryFolder folder;
  auto model = toy();
  const auto check = [&](const std::vector<peft::Part>& parts, const std::string& type,
                         const std::string& method, const std::string& reason) {
    const auto adapter = peft::add_adapter(*model, parts);
    perturb(adapter);
    const auto notes = peft::save_adapter(adapter, folder / "out");
    REQUIRE(notes.size() == 1);
    CHECK_THAT(notes[0], Contains("Python PEFT cannot read this adapter: " + reason));
    CHECK(config_of(folder / "out")["peft_type"] == type);
    CHECK(config_of(folder / "out")["method"] == method);
    auto other = toy();
    peft::load_adapter(*other, folder / "out");
    CHECK(torch::equal(other->forward(ids()), model->forward(ids())));
  };
  SECTION("biases of a method without a mode for them") {
    check({peft::on(peft::LohaOptions(2), peft::named({"q"})),
           peft::on(peft::BiasOptions(), peft::named({"q"}))},
          "BIAS", "LOHA", "Python trains no biases beside LoHa");
  }
  SECTION("biases of other layers") {
    check({peft::on(peft::OftOptions(4), peft::named({"q"})),
           peft::on(peft::BiasOptions(), peft::named({"v"}))},
          "BIAS", "OFT", "the biases it trains are neither those of all layers nor those of the OFT's");
  }
  SECTION("a bias of LoRA's own where Python starts it otherwise") {
    check({peft::on(peft::LoraOptions(2).lora_bias(true).init(peft::LoraInit::mica), peft::named({"q"}))},
          "REPLACE", "LORA", "Python has no lora_bias where LoRA starts by mica");
  }
  SECTION("tokens and LoRA on one embedding") {
    check({peft::on(peft::TrainableTokensOptions({3, 1}), peft::named({"emb"})),
           peft::on(peft::LoraOptions(2), peft::named({"emb", "q"}))},
          "REPLACE", "LORA", "'emb' trains tokens and carries LoRA");
  }
}

TEST_CASE("PiSSA and its like as Python writes them unconverted are read on the base they began with",
          "[peft_formats]") {
  const TemporaryFolder folder;
  const auto out = folder / "out";
  const auto [init, start] = GENERATE(table<std::string, peft::LoraInit>(
      {{"pissa", peft::LoraInit::pissa}, {"olora", peft::LoraInit::olora}}));
  auto model = toy();
  const auto adapter =
      peft::add_adapter(*model, peft::LoraOptions(2).alpha(3).init(start), peft::named({"q"}));
  perturb(adapter);
  // Python's file has A and B alone, and its config the name of the start.
  auto plain = toy();
  const auto lora = peft::add_adapter(*plain, peft::LoraOptions(2).alpha(3), peft::named({"q"}))
                        .layers<peft::LoraImpl>()
                        .at(0);
  {
    const torch::NoGradGuard no_grad;
    lora->lora_A.copy_(adapter.layers<peft::LoraImpl>().at(0)->lora_A);
    lora->lora_B.copy_(adapter.layers<peft::LoraImpl>().at(0)->lora_B);
  }
  peft::save_adapter(peft::adapter(*plain, "default"), out);
  auto config = config_of(out);
  config["init_lora_weights"] = init;
  write_bytes(out / "adapter_config.json", config.dump());
  auto other = toy();
  CHECK(peft::load_adapter(*other, out, "default", /*trainable=*/true).count() == adapter.count());
  other->eval();
  CHECK(torch::allclose(other->forward(ids()), model->forward(ids()), 1e-5, 1e-6));
  CHECK_FALSE(torch::allclose(plain->forward(ids()), model->forward(ids()), 1e-3, 1e-3));
}
