// peft-survey: the comparison table of the surveys of parameter-efficient fine-tuning, measured.
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/machine.h"
#include "finetune/child.h"
#include "finetune/command_line.h"
#include "finetune/threads.h"
#include "peft/io/atomic_file.h"
#include "survey/attach.h"
#include "survey/measure.h"
#include "survey/method_row.h"
#include "survey/model.h"
#include "survey/tables.h"
#include "text/unicode.h"

namespace {

struct Arguments {
  survey::Setting setting;
  std::vector<std::string> methods;
  std::filesystem::path out;
  bool list = false, published = false;
};

/// What an exception says, in a line or more.
std::string words_of(const std::exception& error) {
  if (const auto* torch_error = dynamic_cast<const c10::Error*>(&error))
    return torch_error->what_without_backtrace();
  return error.what();
}

/// Runs work that gives a text in a process of its own, on one thread; `failed` makes a text of what it
/// throws.
std::string in_child(const std::function<std::string()>& work,
                     const std::function<std::string(const std::string&)>& failed, const std::string& name) {
  const auto program = [](const std::function<void()>& inner) {
    inner();
    return 0;
  };
  return finetune::internal::in_child(
      [&] {
        try {
          finetune::set_threads(1);
          return work();
        } catch (const std::exception& error) {
          return failed(words_of(error));
        }
      },
      program, name);
}

/// One row, from a process of its own: memory that another method's run has kept would not be counted.
survey::MethodRow row_of(const Arguments& arguments, const std::string& method) {
  survey::MethodRow row;
  row.method = method;
  const auto failed = [row](const std::string& problem) mutable {
    row.problem = text::replace_invalid_utf8(problem);
    return nlohmann::json(row).dump();
  };
  const auto measure = [&] { return nlohmann::json(survey::measure(arguments.setting, method)).dump(); };
  try {
    return nlohmann::json::parse(in_child(measure, failed, method)).get<survey::MethodRow>();
  } catch (const finetune::Interrupted&) {
    throw;
  } catch (const std::runtime_error& error) {
    row.problem = error.what();
    return row;
  }
}

/// What is wrong with the model, the sizes or the methods' words; or empty.
std::string problem_of(const Arguments& arguments) {
  const auto check = [&] {
    const auto model = survey::open_model(arguments.setting.folder);
    for (const auto& method : arguments.methods) survey::read_method(method, model);
    torch::NoGradGuard no_grad;
    model.forward(model.inputs(arguments.setting.batch, arguments.setting.length));
    return std::string();
  };
  return in_child(
      check, [](const std::string& problem) { return problem; }, "the model");
}

void run(const Arguments& arguments) {
  const auto problem = problem_of(arguments);
  if (!problem.empty()) throw std::runtime_error(problem);
  auto machine = bench::machine("1", /*tuned=*/false, "processor time");
  machine["rounds"] = std::to_string(arguments.setting.repeat);
  const auto title = fmt::format("{}, {} texts of {} tokens", survey::model_name(arguments.setting.folder),
                                 arguments.setting.batch, arguments.setting.length);
  if (!arguments.out.empty()) std::filesystem::create_directories(arguments.out);
  std::vector<survey::MethodRow> rows;
  for (size_t i = 0; i < arguments.methods.size(); ++i) {
    fmt::print(stderr, "method {} of {}: {}\n", i + 1, arguments.methods.size(), arguments.methods[i]);
    rows.push_back(row_of(arguments, arguments.methods[i]));
    if (arguments.out.empty()) continue;
    // After every row: a run that is stopped leaves what it measured.
    peft::write_file(arguments.out / "survey.md", survey::markdown(title, rows, machine));
    peft::write_file(arguments.out / "survey.csv", survey::csv(rows));
    peft::write_file(arguments.out / "survey.json", survey::json(rows, machine).dump(1) + "\n");
  }
  fmt::print("{}", survey::text(rows));
  if (!arguments.out.empty())
    fmt::print(stderr, "survey.md, survey.csv and survey.json: '{}'\n", arguments.out.string());
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app(
      "The surveys' comparison of parameter-efficient fine-tuning methods, measured on a model: storage, "
      "memory, cost of backward and of inference, and what of the base changes.");
  app.name("peft-survey");
  auto& setting = arguments.setting;
  auto* model = app.add_option("model", setting.folder, "Hugging Face folder of an encoder");
  app.add_option("--methods", arguments.methods,
                 "as peft-finetune's --method: NAME or NAME:key=value,… (default: all; --list names them)");
  const auto positive = finetune::whole_number(1, 1 << 20);
  app.add_option("--batch", setting.batch, "texts a step")->transform(positive)->capture_default_str();
  app.add_option("--length", setting.length, "tokens a text")->transform(positive)->capture_default_str();
  app.add_option("--repeat", setting.repeat, "rounds of every comparison of times")
      ->transform(finetune::whole_number(1, 10000))
      ->capture_default_str();
  app.add_option("--out", arguments.out, "folder for survey.md, survey.csv and survey.json");
  app.add_flag("--list", arguments.list, "names the methods and ends");
  app.add_flag("--published", arguments.published,
               "prints the counts of trainable weights that papers report, beside ours, and ends");
  CLI11_PARSE(app, argc, argv);
  if (arguments.methods.empty()) arguments.methods = survey::default_methods();
  try {
    if (arguments.list) {
      for (const auto& method : arguments.methods) fmt::print("{}\n", method);
      return 0;
    }
    if (arguments.published) {
      fmt::print("{}", survey::published_text());
      return 0;
    }
    if (model->count() == 0) throw std::runtime_error("model must be the folder of an encoder, but got none");
    run(arguments);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "peft-survey: {}\n", words_of(error));
  }
  return 1;
}
