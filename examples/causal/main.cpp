// peft-causal: pretrains a small GPT-2 on some books, adapts it to others by each method, and shows what that
// costs.
#include <ATen/CPUGeneratorImpl.h>
#include <peft/models/generate.h>
#include <peft/models/gpt2.h>
#include <peft/models/save_pretrained.h>
#include <peft/peft.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "finetune/command_line.h"
#include "finetune/terminal_table.h"
#include "finetune/threads.h"
#include "text/bpe_trainer.h"
#include "text/tokenizer.h"

namespace {

namespace fs = std::filesystem;
using peft::models::GPT2Config;
using peft::models::GPT2Inputs;
using peft::models::GPT2LMHeadModel;
using torch::Tensor;

constexpr int64_t window = 128;  ///< tokens of one text
constexpr const char* end_of_text = "<|endoftext|>";

struct Settings {
  fs::path pretrain, adapt, out;
  int64_t pretrain_steps = 1000, steps = 300, batch = 16, vocabulary = 1024, width = 128, layers = 4;
  std::vector<std::string> methods;
};

/// A method with a rate at which it learns.
struct Entry {
  std::string name;
  double rate;
  std::vector<peft::Part> parts;
};

std::vector<Entry> entries() {
  using peft::all;
  using peft::Modifies;
  using peft::named;
  using peft::on;
  using peft::Unified;
  const auto linear = named({"c_attn", "c_proj", "c_fc"});
  return {
      {"lora", 5e-3, {on(peft::LoraOptions(8).alpha(16), linear)}},
      {"adapters", 5e-3, {on(peft::houlsby())}},
      {"parallel", 5e-3, {on(peft::parallel_adapter())}},
      {"ia3", 3e-2, {on(peft::Ia3Options().feedforward({"mlp.c_proj"}), named({"c_attn", "mlp.c_proj"}))}},
      {"bitfit", 1e-2, {on(peft::BiasOptions(), all())}},
      {"prefix", 2e-2, {on(peft::PrefixOptions(16))}},
      {"prompt", 3e-2, {on(peft::PromptOptions(16).init(peft::PromptInit::vocabulary), all())}},
      {"mam", 5e-3, peft::mam(8)},
      {"heads", 2e-2, {on(Unified(8).form("gelu").modifies(Modifies::heads)), on(Unified(16).form("gelu"))}},
  };
}

/// Lines of "Ge1:1 In the beginning …", without the reference.
std::vector<std::string> read_verses(const fs::path& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path.string() + " cannot be read");
  std::vector<std::string> verses;
  for (std::string line; std::getline(file, line);) {
    const auto blank = line.find(' ');
    if (blank != std::string::npos) verses.push_back(line.substr(blank + 1));
  }
  if (verses.size() < 100) {
    throw std::runtime_error(
        fmt::format("{} must have at least 100 lines, but got {}", path.string(), verses.size()));
  }
  return verses;
}

/// Tokens in one row, every tenth verse apart for testing.
struct Books {
  Tensor train, test;
};

Books tokenize(const std::vector<std::string>& verses, const text::Tokenizer& tokenizer) {
  std::vector<int64_t> train, test;
  for (size_t i = 0; i < verses.size(); ++i) {
    auto& into = i % 10 == 9 ? test : train;
    const auto ids = tokenizer.encode(verses[i]).ids;
    into.insert(into.end(), ids.begin(), ids.end());
    into.push_back(0);
  }
  if (static_cast<int64_t>(train.size()) <= window || static_cast<int64_t>(test.size()) < window) {
    throw std::runtime_error(fmt::format(
        "the verses must have more than {} tokens, and every tenth of them {}, but have {} and {}", window,
        window, train.size(), test.size()));
  }
  return {torch::tensor(train), torch::tensor(test)};
}

/// Perplexity: exp of the mean loss of a token.
double perplexity(GPT2LMHeadModel& model, const Tensor& tokens) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const auto rows = tokens.size(0) / window;
  const auto texts = tokens.narrow(0, 0, rows * window).view({rows, window});
  double sum = 0;
  for (const auto& part : texts.split(32)) {
    GPT2Inputs inputs;
    inputs.input_ids = inputs.labels = part;
    sum += model->forward(inputs).loss.item<double>() * static_cast<double>(part.size(0));
  }
  return std::exp(sum / static_cast<double>(rows));
}

/// Steps on windows drawn from the tokens.
template <class Optimizer, class Schedule>
void train(GPT2LMHeadModel& model, const Tensor& tokens, int64_t steps, int64_t batch, Optimizer& optimizer,
           const Schedule& schedule, const std::string& what) {
  model->train();
  torch::manual_seed(1);
  for (int64_t step = 0; step < steps; ++step) {
    const auto starts = torch::randint(tokens.size(0) - window, {batch, 1}, torch::kLong);
    GPT2Inputs inputs;
    inputs.input_ids = inputs.labels = tokens.index({starts + torch::arange(window)});
    const auto loss = model->forward(inputs).loss;
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    schedule(step);
    if ((step + 1) % 100 == 0 || step + 1 == steps) {
      std::cerr << "\r" << what << ": step " << step + 1 << " of " << steps << ", loss "
                << fmt::format("{:.3f}", loss.template item<double>()) << "   " << std::flush;
    }
  }
  std::cerr << "\n";
  model->eval();
}

/// What the model writes after these words, drawn with one seed.
std::string continued(GPT2LMHeadModel& model, const text::Tokenizer& tokenizer, const std::string& words) {
  const auto options =
      peft::models::GenerateOptions().max_new_tokens(32).do_sample(true).temperature(0.7).generator(
          at::detail::createCPUGenerator(7));
  const auto ids = torch::tensor(tokenizer.encode(words).ids).unsqueeze(0);
  const auto text = peft::models::generate(model, ids, options)[0].contiguous();
  const std::vector<int64_t> all(text.data_ptr<int64_t>(), text.data_ptr<int64_t>() + text.numel());
  return tokenizer.decode(all);
}

/// The base: a model and its tokenizer, as a folder that Python's transformers reads too.
void pretrain(const Settings& settings, const std::vector<std::string>& verses, const fs::path& folder) {
  fs::create_directories(folder);
  const auto vocabulary = static_cast<size_t>(settings.vocabulary);
  std::ofstream(folder / "tokenizer.json")
      << text::train_bpe(verses, {.vocabulary_size = vocabulary, .special_tokens = {end_of_text}}).dump();
  const auto tokens = tokenize(verses, text::Tokenizer::from_file(folder / "tokenizer.json")).train;
  torch::manual_seed(0);
  GPT2LMHeadModel model(GPT2Config()
                            .vocab_size(settings.vocabulary)
                            .n_positions(2 * window)
                            .n_embd(settings.width)
                            .n_layer(settings.layers)
                            .n_head(4)
                            .dropout(0)
                            .bos_token_id(0)
                            .eos_token_id({0}));
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-3).weight_decay(0.01));
  const auto rate = [&](int64_t step) {
    const auto left = 1.0 - static_cast<double>(step + 1) / static_cast<double>(settings.pretrain_steps);
    for (auto& group : optimizer.param_groups()) {
      static_cast<torch::optim::AdamWOptions&>(group.options()).lr(3e-3 * std::max(left, 0.02));
    }
  };
  train(model, tokens, settings.pretrain_steps, settings.batch, optimizer, rate, "pretraining");
  peft::models::save_pretrained(*model, folder);
}

void run(const Settings& settings) {
  const auto old_verses = read_verses(settings.pretrain), new_verses = read_verses(settings.adapt);
  const auto base = settings.out / "base";
  if (fs::exists(base / "model.safetensors")) {
    std::cerr << "the base in " << base.string() << " is there already\n";
  } else {
    pretrain(settings, old_verses, base);
  }
  const auto tokenizer = text::Tokenizer::from_file(base / "tokenizer.json");
  const auto old_books = tokenize(old_verses, tokenizer), new_books = tokenize(new_verses, tokenizer);
  const std::string words = "Now the";

  auto plain = GPT2LMHeadModel::from_pretrained(base);
  const auto old_plain = perplexity(plain, old_books.test), new_plain = perplexity(plain, new_books.test);
  const auto number = [](double value) { return fmt::format("{:.2f}", value); };
  std::vector<std::vector<std::string>> lines{
      {"method", "trainable", "%", "books it knew", "new books", "adapter off"},
      {"none", "", "", number(old_plain), number(new_plain), ""}};
  std::vector<std::string> samples{"none: " + continued(plain, tokenizer, words)};
  const auto weights = static_cast<double>(peft::summary(*plain).total);

  for (const auto& entry : entries()) {
    const auto& asked = settings.methods;
    if (!asked.empty() && std::find(asked.begin(), asked.end(), entry.name) == asked.end()) continue;
    auto model = GPT2LMHeadModel::from_pretrained(base);
    torch::manual_seed(0);
    const auto adapter = peft::add_adapter(*model, entry.parts, entry.name);
    peft::AdamW optimizer(adapter, torch::optim::AdamWOptions(entry.rate).weight_decay(0));
    peft::LinearSchedule schedule(optimizer, settings.steps / 20, settings.steps);
    train(
        model, new_books.train, settings.steps, settings.batch, optimizer, [&](int64_t) { schedule.step(); },
        entry.name);
    const auto old_now = perplexity(model, old_books.test), new_now = perplexity(model, new_books.test);
    samples.push_back(entry.name + ": " + continued(model, tokenizer, words));
    const auto off = peft::disabled(*model);
    const bool exact =
        perplexity(model, old_books.test) == old_plain && perplexity(model, new_books.test) == new_plain;
    if (!exact) throw std::runtime_error(entry.name + ": the base is not what it was with the adapter off");
    const auto count = static_cast<double>(adapter.count());
    lines.push_back({entry.name, std::to_string(adapter.count()),
                     fmt::format("{:.2f}", 100 * count / weights), number(old_now), number(new_now),
                     "exactly the base"});
  }
  std::cout << "perplexity on verses that no training has seen\n" << finetune::aligned(lines) << "\n";
  std::cout << "what each writes after \"" << words << "\"\n";
  for (const auto& sample : samples) std::cout << sample << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app(
      "Pretrains a small GPT-2 on some books, adapts it to others by each method, and shows the perplexity "
      "on "
      "both. A file has one verse a line, with its reference before the first blank.");
  const auto positive = finetune::whole_number(1, 1 << 20);
  app.add_option("--pretrain", settings.pretrain, "verses the base is trained on")->required();
  app.add_option("--adapt", settings.adapt, "verses the adapters are trained on")->required();
  app.add_option("--out", settings.out, "folder for the base; used again if it is there")->required();
  app.add_option("--method", settings.methods, "train these methods only");
  app.add_option("--pretrain-steps", settings.pretrain_steps, "steps of the base")->transform(positive);
  app.add_option("--steps", settings.steps, "steps of each adapter")->transform(positive);
  app.add_option("--batch", settings.batch, "texts of 128 tokens a step")->transform(positive);
  app.add_option("--vocabulary", settings.vocabulary, "tokens, learned from the first file")
      ->transform(finetune::whole_number(257, 50000));
  app.add_option("--width", settings.width, "of the base, a multiple of 4")->transform(positive);
  app.add_option("--layers", settings.layers, "of the base")->transform(positive);
  CLI11_PARSE(app, argc, argv);
  try {
    for (const auto& name : settings.methods) {
      const auto known = entries();
      if (std::none_of(known.begin(), known.end(), [&](const Entry& entry) { return entry.name == name; })) {
        std::vector<std::string> names;
        for (const auto& entry : known) names.push_back(entry.name);
        throw std::runtime_error("--method " + name + ": there is none; there are " +
                                 fmt::format("{}", fmt::join(names, ", ")));
      }
    }
    run(settings);
  } catch (const c10::Error& error) {
    std::cerr << "peft-causal: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "peft-causal: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
