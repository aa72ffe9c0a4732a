// peft-finetune: trains adapters for a pretrained encoder on labelled texts, compares, uses, combines and
// merges them.
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <exception>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "combine.h"
#include "command_line.h"
#include "compare.h"
#include "ensemble.h"
#include "kept_memory.h"
#include "predict.h"
#include "threads.h"
#include "train.h"

namespace {

using finetune::add_repeated;
using finetune::number_from;
using finetune::Pooling;
using finetune::TrainOptions;
using finetune::UseOptions;
using finetune::whole_number;

/// Does the work and says what goes wrong; returns the exit status.
int guarded(const std::function<void()>& work) {
  const auto complain = [](const std::string& what) { fmt::print(stderr, "peft-finetune: {}\n", what); };
  try {
    work();
    if (std::fflush(stdout) != 0) throw std::runtime_error("standard output cannot be written");
    return 0;
  } catch (const finetune::Interrupted& interrupted) {
    complain(interrupted.what());
    return 128 + interrupted.signal;
  } catch (const c10::Error& error) {
    complain(error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    complain("out of memory (hint: a smaller --batch-size)");
  } catch (const std::exception& error) {
    // LibTorch appends the C++ stack to some messages that are no c10::Error.
    const std::string what = error.what();
    complain(what.substr(0, what.find("\nException raised from ")));
  }
  return 1;
}

/// The options that train and compare share.
void add_training_options(CLI::App& app, TrainOptions& options) {
  const auto positive = whole_number(1, int64_t{1} << 40);
  const auto not_negative = number_from(0, 1e12);
  app.add_option("--model", options.model,
                 "folder of the base: config.json, model.safetensors, tokenizer.json")
      ->required();
  auto* train =
      add_repeated(app, "--train", options.train,
                   "labelled texts: TSV with the header label<TAB>text, or label<TAB>text_a<TAB>text_b; "
                   "several files, with the same labels, are the tasks of multitask_prompt");
  auto* inputs =
      app.add_option("--inputs", options.inputs,
                     "ready batches in place of texts: safetensors with b0.input_ids, b0.labels, …");
  train->excludes(inputs);
  auto* test = add_repeated(app, "--test", options.test,
                            "texts, or ready batches, to evaluate on after each epoch; one for each --train");
  app.add_option("--train-rows", options.train_rows, "only the first N rows of each --train")
      ->transform(positive)
      ->needs(train);
  app.add_option("--test-rows", options.test_rows, "only the first N rows of each --test")
      ->transform(positive)
      ->needs(test);
  app.add_option("--targets", options.targets,
                 "layers to adapt: last segments of their names, all-linear, or /expression/")
      ->delimiter(',');
  auto* epochs =
      app.add_option("--epochs", options.epochs, "times through the data (default: 3, of --inputs 1)")
          ->transform(positive);
  app.add_option("--steps", options.steps, "steps in all, in place of --epochs")
      ->transform(positive)
      ->excludes(epochs);
  app.add_option("--batch-size", options.batch_size, "texts a step")
      ->transform(positive)
      ->capture_default_str();
  app.add_option("--max-length", options.max_length,
                 "tokens of a text at most (default: 128, or the model's positions)")
      ->transform(positive);
  app.add_option("--lr", options.rate, "learning rate; a method's lr= goes before it")
      ->check(not_negative)
      ->capture_default_str();
  app.add_option("--head-lr", options.head_rate,
                 "learning rate of the task head (default: --lr); lr= of the method head goes before it")
      ->check(not_negative);
  app.add_option("--optimizer", options.optimizer,
                 "adamw, adafactor, or adamw_hf: transformers' former AdamW, which many papers used")
      ->check(CLI::IsMember({"adamw", "adamw_hf", "adafactor"}))
      ->capture_default_str();
  app.add_option("--schedule", options.schedule, "constant, linear or cosine")
      ->check(CLI::IsMember({"constant", "linear", "cosine"}))
      ->capture_default_str();
  app.add_option("--warmup", options.warmup, "steps of warm-up; below 1 a part of all")
      ->check(not_negative)
      ->capture_default_str();
  app.add_option("--weight-decay", options.weight_decay, "on all that trains")
      ->check(not_negative)
      ->capture_default_str();
  app.add_option("--clip", options.clip, "largest norm of all gradients; 0 for no clipping")
      ->check(not_negative)
      ->capture_default_str();
  app.add_option("--accumulate", options.accumulate, "batches a step")
      ->transform(positive)
      ->capture_default_str();
  app.add_option("--dropout", options.dropout, "of the base")
      ->check(number_from(0, 1))
      ->capture_default_str();
  app.add_option_function<std::string>(
         "--pooling",
         [&options](const std::string& name) {
           options.pooling = name == "mean" ? Pooling::mean : Pooling::cls;
           options.pooling_given = true;
         },
         "what the head sees: cls (the pooler's output, the default) or mean (of all tokens)")
      ->check(CLI::IsMember({"cls", "mean"}));
  app.add_option("--seed", options.seed, "of every random draw")
      ->transform(whole_number(0))
      ->capture_default_str();
  app.add_option("--device", options.device, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--dtype", options.dtype, "of the base's weights (default: the file's)");
  app.add_option("--log", options.log,
                 "a JSON line a step (task_loss, the method's penalty if it has one, loss: their sum) and an "
                 "evaluation");
  app.add_flag("--gradient-checkpointing", options.gradient_checkpointing,
               "less memory for one more forward a step: blocks are run again in backward");
  app.add_flag("--no-shuffle{false}", options.shuffle, "the file's order in every epoch");
  app.add_flag("--overwrite", options.overwrite, "replaces an older run at --out");
}

/// Everything on the command line that decides what a run computes.
finetune::Arguments arguments_of(const CLI::App& app) {
  finetune::Arguments arguments;
  for (const auto* option : app.get_options()) {
    const auto name = option->get_name();
    if (option->count() == 0 || name == "--resume" || name == "--overwrite") continue;
    if (name == "--gradient-checkpointing") continue;  // the same to the last bit
    arguments.emplace_back(name, fmt::format("{}", fmt::join(option->results(), ",")));
  }
  return arguments;
}

/// A command line as a shell takes it.
std::string command_of(int argc, char** argv) {
  std::string command;
  for (int i = 0; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--resume" || word == "--overwrite") continue;
    const bool plain = !word.empty() && word.find_first_not_of(
                                            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                            "0123456789_@%+=:,./-") == std::string::npos;
    std::string quoted = word;
    for (size_t at = 0; (at = quoted.find('\'', at)) != std::string::npos; at += 4)
      quoted.replace(at, 1, "'\\''");
    command += (i ? " " : "") + (plain ? word : "'" + quoted + "'");
  }
  return command;
}

/// CLI11's complaint, with the options nearest to those it does not know.
int usage_error(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* used = &app;
  for (const auto* sub : app.get_subcommands()) used = sub;
  if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {
    app.exit(error);
    return 0;
  }
  std::string hint;
  std::vector<std::string> known;
  for (const auto* option : used->get_options()) known.push_back(option->get_name());
  for (const auto* sub : used->get_subcommands([](const CLI::App*) { return true; }))
    known.push_back(sub->get_name());
  for (const auto& word : app.remaining(/*recurse=*/true)) {
    const auto name = word.substr(0, word.find('='));
    if (hint.empty())
      hint = fmt::format(" (nearest to '{}': {})", name, peft::internal::closest(name, known, 2));
  }
  fmt::print(stderr, "peft-finetune: {}{}\n", error.what(), hint);
  if (!hint.empty()) fmt::print(stderr, "  there are {}\n", fmt::join(known, ", "));
  fmt::print(stderr, "  peft-finetune {}--help says what they do\n",
             used == &app ? "" : used->get_name() + " ");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  finetune::keep_freed_memory();
  // A file that grows too large is an error of the write, with a message, not the end of the process.
  std::signal(SIGXFSZ, SIG_IGN);
  CLI::App app{"Fine-tunes a pretrained encoder with adapters: trains, compares, predicts, combines, merges.",
               "peft-finetune"};
  app.require_subcommand(1);
  std::string methods_help = "NAME[:key=value,…], lists in [ ]; every method takes lr=";
  for (const auto& entry : finetune::method_table()) {
    methods_help += fmt::format("\n{}: {}{}{}", entry.name, entry.what, entry.keys.empty() ? "" : "; ",
                                fmt::join(entry.keys, ", "));
  }
  int threads = 0;
  const auto add_threads = [&](CLI::App& sub) {
    sub.add_option("--threads", threads, "that compute (default: one a core)")
        ->transform(whole_number(1, 4096));
  };

  TrainOptions training;
  auto* train = app.add_subcommand("train", "trains one adapter");
  add_training_options(*train, training);
  train->add_option("--method", training.method, methods_help);
  auto* init = train->add_option("--init-adapter", training.init_adapter,
                                 "goes on from an adapter on disk; its config says method and targets");
  int64_t prompts = 0;
  train
      ->add_option(
          "--ensemble", prompts,
          "trains so many prompts, with --seed and the next ones, into --out/1, --out/2, …, and shows "
          "their accuracy and that of their majority vote")
      ->transform(whole_number(2, int64_t{1} << 20))
      ->excludes(init);
  train
      ->add_option(
          "--out", training.out,
          "folder of the run: the last adapter, best/, ranks.svg where the method changes ranks and, until "
          "it ends, checkpoint/")
      ->required();
  train->add_option("--checkpoint-every", training.checkpoint_every, "steps between checkpoints; 0 for none")
      ->transform(whole_number(0, int64_t{1} << 40))
      ->capture_default_str();
  train->add_flag("--resume", training.resume, "goes on from the last checkpoint in --out")
      ->excludes("--overwrite");
  add_threads(*train);

  TrainOptions comparing;
  std::vector<std::string> methods;
  auto* compare = app.add_subcommand("compare", "trains several methods on the same data and prints a table");
  add_training_options(*compare, comparing);
  add_repeated(*compare, "--method", methods, methods_help)->required();
  compare->add_option("--out", comparing.out, "folder for the adapters, results.csv and learning_curves.svg");
  add_threads(*compare);

  UseOptions use;
  const auto add_base = [&](CLI::App& sub, bool adapter_required) {
    sub.add_option("--model", use.model, "folder of the base")->required();
    sub.add_option("--adapter", use.adapter, "folder of an adapter, of this program or of Python PEFT")
        ->required(adapter_required);
  };
  const auto add_texts = [&](CLI::App& sub) {
    auto* group = sub.add_option_group("texts", "what to read");
    add_repeated(*group, "--text", use.texts,
                 "a text, or two with a tab between; may be repeated, each with as many");
    group->add_option("--data", use.data, "labelled texts, as for train --train");
    group->require_option(1);
    return group;
  };
  auto* predict = app.add_subcommand("predict", "labels texts, or computes the outputs of ready batches");
  predict->add_option("--model", use.model, "folder of the base")->required();
  std::vector<finetune::fs::path> adapters;
  add_repeated(
      *predict, "--adapter", adapters,
      "folder of an adapter, of this program or of Python PEFT; several prompts vote, in one forward");
  predict->add_option("--task", use.task, "of a multitask prompt: which --train file it was, from 0")
      ->transform(whole_number(0, int64_t{1} << 40));
  auto* inputs = add_texts(*predict)->add_option("--inputs", use.inputs,
                                                 "ready batches: safetensors with b0.input_ids, …");
  predict->add_option("--out", use.out, "file for the results: TSV, or with --inputs safetensors");
  predict->add_option("--max-length", use.max_length, "tokens of a text at most (default: as trained)")
      ->transform(whole_number(1, int64_t{1} << 40));
  predict->add_flag("--hidden", use.hidden, "with --inputs: last_hidden_state and pooler_output too")
      ->needs(inputs);
  predict->add_flag("--embed", use.embed, "with --inputs: mean-pooled vectors of length 1 too")
      ->needs(inputs);
  predict->add_option("--device", use.device, "cpu, cuda or cuda:N")->capture_default_str();
  predict->add_option("--dtype", use.dtype, "of the base's weights (default: the file's)");
  add_threads(*predict);

  auto* merge = app.add_subcommand("merge", "writes base and adapter as one model's folder");
  add_base(*merge, true);
  merge->add_option("--out", use.out, "folder to write")->required();
  merge->add_option("--dtype", use.dtype, "of the weights (default: the file's)");
  merge->add_flag("--overwrite", use.overwrite, "replaces an older folder at --out");
  add_threads(*merge);

  finetune::CombineArguments combining;
  auto* combine = app.add_subcommand("combine", "adds adapters up to a new one, without the model");
  add_repeated(*combine, "--adapter", combining.adapters,
               "DIR:WEIGHT, a folder of an adapter and how much of it; the weight may be negative")
      ->required();
  combine->add_option("--type", combining.type, "how: those of Python PEFT, exact products, PEM arithmetic")
      ->required()
      ->check(CLI::IsMember(finetune::combine_types()));
  combine
      ->add_option("--density", combining.density,
                   "part of the entries that survives in ties, dare and magnitude_prune")
      ->check(number_from(0, 1));
  combine->add_option("--rank", combining.rank, "of svd types (default: the largest of the adapters')")
      ->transform(whole_number(1, int64_t{1} << 31));
  combine->add_option("--sign", combining.sign, "what elects a sign in ties: total (default) or frequency")
      ->check(CLI::IsMember({"total", "frequency"}));
  combine->add_option(
      "--head", combining.head,
      "the --adapter folder whose task head and labels the result takes, where several have some");
  combine->add_option("--seed", combining.seed, "of dare's random draws")
      ->transform(whole_number(0))
      ->capture_default_str();
  combine->add_option("--out", combining.out, "folder to write")->required();
  combine->add_flag("--overwrite", combining.overwrite, "replaces an older adapter at --out");
  add_threads(*combine);

  auto* info = app.add_subcommand("info", "says what a model has and an adapter adds");
  add_base(*info, false);

  auto* tokenize = app.add_subcommand("tokenize", "prints the ids of texts, a line a text");
  tokenize->add_option("--model", use.model, "folder with tokenizer.json")->required();
  tokenize->add_option("--max-length", use.max_length, "tokens of a text at most")
      ->transform(whole_number(1, int64_t{1} << 40));
  add_texts(*tokenize);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return usage_error(app, error);
  }

  const auto prepare = [&] {
    finetune::set_threads(threads);
    const auto warning = finetune::slow_blas_warning();
    if (!warning.empty()) fmt::print(stderr, "{}\n", warning);
  };
  return guarded([&] {
    const auto require_data = [](const TrainOptions& options) {
      if (options.train.empty() && options.inputs.empty())
        throw std::runtime_error("--train or --inputs must be given");
    };
    if (train->parsed()) {
      require_data(training);
      if (training.method.empty() && training.init_adapter.empty())
        throw std::runtime_error("--method must be given (or --init-adapter)");
      training.arguments = arguments_of(*train);
      training.command = command_of(argc, argv);
      prepare();
      if (prompts > 0) return finetune::train_ensemble(training, prompts);
      finetune::Run run(training);
      run();
    } else if (compare->parsed()) {
      require_data(comparing);
      // Threads only in the processes that train.
      finetune::compare(comparing, methods, [&](const std::function<void()>& work) {
        return guarded([&] {
          prepare();
          work();
        });
      });
    } else {
      prepare();
      if (predict->parsed()) {
        if (adapters.size() == 1) use.adapter = adapters[0];
        if (adapters.size() > 1) use.prompts = adapters;
        finetune::predict(use);
      }
      if (merge->parsed()) finetune::merge(use);
      if (combine->parsed()) finetune::combine(combining);
      if (info->parsed()) finetune::info(use);
      if (tokenize->parsed()) finetune::tokenize(use);
    }
  });
}
