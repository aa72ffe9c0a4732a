// peft-glue: methods × tasks × seeds on GLUE, next to Hugging Face's PEFT where wanted.
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "finetune/child.h"
#include "finetune/command_line.h"
#include "finetune/kept_memory.h"
#include "finetune/threads.h"
#include "table.h"

namespace {

/// Does the work and says what goes wrong; returns the exit status.
int guarded(const std::function<void()>& work) {
  const auto complain = [](const std::string& what) { fmt::print(stderr, "peft-glue: {}\n", what); };
  try {
    work();
    if (std::fflush(stdout) != 0) throw std::runtime_error("standard output cannot be written");
    return 0;
  } catch (const finetune::Interrupted& interrupted) {
    complain(fmt::format("{} (hint: the same command goes on)", interrupted.what()));
    return 128 + interrupted.signal;
  } catch (const c10::Error& error) {
    complain(error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    complain("out of memory (hint: a smaller --batch-size)");
  } catch (const std::exception& error) {
    const std::string what = error.what();
    complain(what.substr(0, what.find("\nException raised from ")));
  }
  return 1;
}

/// "TASK=N" or "N", for all tasks.
void add_rows(const std::vector<std::string>& texts, const std::string& option,
              std::map<std::string, std::int64_t>& limits) {
  for (const auto& text : texts) {
    const auto equals = text.find('=');
    const auto number = equals == std::string::npos ? text : text.substr(equals + 1);
    const auto rows = finetune::read_whole(number);
    if (!rows || *rows < 1)
      throw std::runtime_error(
          fmt::format("{}: expected TASK=N or N, N at least 1, but got '{}'", option, text));
    limits[equals == std::string::npos ? "" : glue::glue_task(text.substr(0, equals)).name] = *rows;
  }
}

}  // namespace

int main(int argc, char** argv) {
  finetune::keep_freed_memory();
  CLI::App app{"Trains methods on GLUE's tasks over seeds, and prints the table.", "peft-glue"};
  glue::TableOptions options;
  std::vector<std::string> train_rows, dev_rows;
  const auto positive = finetune::whole_number(1, std::int64_t{1} << 40);
  app.add_option("--data", options.data, "GLUE's folder: a folder a task, with its train.tsv and dev.tsv")
      ->required();
  app.add_option("--model", options.model,
                 "folder of the base: config.json, model.safetensors, tokenizer.json")
      ->required();
  app.add_option("--out", options.out,
                 "folder of the table: cells/, a file for each that is finished, best/, table.txt, table.md, "
                 "results.csv; what is there is not run again")
      ->required();
  app.add_option("--task", options.tasks,
                 fmt::format("tasks, parted by commas (default: all that are there): {}",
                             fmt::join(glue::task_names(), ", ")))
      ->delimiter(',');
  finetune::add_repeated(
      app, "--method", options.methods,
      fmt::format("methods, one an option: {} (default: all of these), with --preset published {}, or "
                  "any of peft-finetune with its keys",
                  fmt::join(glue::recipe_names(false), ", "), fmt::join(glue::recipe_names(true), ", ")));
  app.add_option("--preset", options.preset,
                 "default: settings for a small encoder; published: those of the methods' papers")
      ->check(CLI::IsMember({"default", "published"}))
      ->capture_default_str();
  app.add_option("--seeds", options.seeds, "runs of each cell, with --first-seed and the next ones")
      ->transform(positive)
      ->capture_default_str();
  app.add_option("--first-seed", options.first_seed)
      ->transform(finetune::whole_number(0))
      ->capture_default_str();
  app.add_option("--rows", train_rows, "only the first N rows to train on: TASK=N, or N for all")
      ->delimiter(',');
  app.add_option("--dev-rows", dev_rows, "only the first N rows to evaluate on: TASK=N, or N for all")
      ->delimiter(',');
  app.add_option("--epochs", options.epochs, "in place of the preset's")->transform(positive);
  app.add_option("--batch-size", options.batch_size, "in place of the preset's")->transform(positive);
  app.add_option("--max-length", options.max_length, "tokens, in place of the preset's")->transform(positive);
  app.add_option("--eval-every", options.eval_every, "steps between evaluations (default: an epoch)")
      ->transform(positive);
  auto* peer =
      app.add_option("--peer", options.peer.python,
                     "a Python with torch, transformers and peft, which trains head, lora and adalora too, "
                     "from the same start on the same batches");
  app.add_option("--more-seeds", options.more_seeds, "for cells in which the two programs differ")
      ->transform(finetune::whole_number(0, std::int64_t{1} << 20))
      ->capture_default_str()
      ->needs(peer);
  app.add_flag("--no-best{false}", options.keep_best, "does not keep the best adapter of each cell");
  app.add_flag("--report", options.report_only, "runs nothing: the table of what is finished");
  app.add_option("--threads", options.threads, "that compute (default: one a core)")
      ->transform(finetune::whole_number(1, 4096));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  options.peer.script = PEFT_GLUE_PEER;
  return guarded([&] {
    add_rows(train_rows, "--rows", options.train_rows);
    add_rows(dev_rows, "--dev-rows", options.dev_rows);
    glue::Table table(options, guarded);
    table();
  });
}
