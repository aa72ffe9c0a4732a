// peft-bench: what adapters cost over the frozen model, beside plain C++ and Python PEFT on the same
// LibTorch.
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <peft/kernels/product_order.h>
#include <peft/kernels/shadow.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bench/block_rows.h"
#include "bench/build_rows.h"
#include "bench/layer_rows.h"
#include "bench/life_rows.h"
#include "bench/machine.h"
#include "bench/optimizer_rows.h"
#include "bench/report.h"
#include "bench/session.h"
#include "bench/step_rows.h"
#include "bench/targets.h"
#include "finetune/command_line.h"
#include "finetune/kept_memory.h"
#include "finetune/threads.h"

namespace {

struct Arguments {
  std::vector<std::string> sets;
  std::string filter, out = "bench-results", device = "cpu", malloc = "default", clock = "auto";
  std::string python, script = PEFT_BENCH_PEER;
  int threads = 1;
  double seconds = 0;
  bool quick = false, tiny = false, no_python = false, list = false, orders = false;
};

/// Every row there is for a device, in the order of the sets.
bench::Plans all_rows(const Arguments& arguments) {
  bench::Plans plans;
  // The sets of a GPU also run tiny on the CPU, which shows that their code works.
  const bool gpu = arguments.device == "cuda" || arguments.tiny;
  if (arguments.device == "cpu") {
    bench::add_layer_rows(plans, arguments.tiny);
    bench::add_step_rows(plans, arguments.tiny, /*gpu=*/false);
    bench::add_optimizer_rows(plans, arguments.tiny, /*gpu=*/false);
    bench::add_life_rows(plans, arguments.tiny);
    bench::add_build_rows(plans);
  }
  if (gpu) {
    bench::add_block_rows(plans, arguments.tiny);
    bench::add_step_rows(plans, arguments.tiny, /*gpu=*/true);
    bench::add_optimizer_rows(plans, arguments.tiny, /*gpu=*/true);
  }
  const auto set_of = [](const bench::RowPlan& plan) { return plan.set; };
  std::stable_sort(plans.begin(), plans.end(),
                   [&](const auto& a, const auto& b) { return set_of(a) < set_of(b); });
  return plans;
}

/// The rows asked for. Throws c10::ValueError for a set that is not there.
bench::Plans chosen_rows(const Arguments& arguments) {
  const auto plans = all_rows(arguments);
  std::set<std::string> known;
  for (const auto& plan : plans) known.insert(plan.set);
  for (const auto& set : arguments.sets) {
    TORCH_CHECK_VALUE(known.count(set) > 0, "--set must name sets of ",
                      fmt::format("{}", fmt::join(known, ", ")), " (on --device ", arguments.device,
                      "), but got '", set, "'");
  }
  bench::Plans chosen;
  for (const auto& plan : plans) {
    const bool in_set = arguments.sets.empty() || std::find(arguments.sets.begin(), arguments.sets.end(),
                                                            plan.set) != arguments.sets.end();
    const bool named = plan.title().find(arguments.filter) != std::string::npos;
    // A filter names rows, quick ones or not.
    const bool quick_enough = !arguments.quick || !arguments.filter.empty() || plan.quick;
    if (in_set && named && quick_enough) chosen.push_back(plan);
  }
  TORCH_CHECK_VALUE(!chosen.empty(), "no row is left (hint: --list names them)");
  return chosen;
}

int run(const Arguments& arguments) {
  const auto plans = chosen_rows(arguments);
  if (arguments.list) {
    for (const auto& plan : plans) fmt::print("{}{}\n", plan.title(), plan.quick ? "  (quick)" : "");
    return 0;
  }
  bench::Session session;
  session.device = bench::Device(arguments.device);
  session.quick = arguments.quick;
  session.tiny = arguments.tiny;
  const bool tuned = arguments.malloc == "tuned";
  if (tuned) finetune::keep_freed_memory();
  const auto threads = finetune::set_threads(arguments.threads);
  const auto warning = finetune::slow_blas_warning();
  if (!warning.empty()) fmt::print(stderr, "{}\n", warning);

  auto& budget = session.budget;
  if (arguments.quick) budget.seconds = 1.2;
  if (arguments.tiny) budget = {0.02, 1e-3, 2, 3, false};
  if (arguments.seconds > 0) budget.seconds = arguments.seconds;
  budget.by_wall = arguments.clock == "wall" ||
                   (arguments.clock == "auto" && (arguments.threads > 1 || session.device.is_cuda()));
  auto machine = bench::machine(
      threads, tuned, budget.by_wall ? "ratios of wall time" : "ratios of processor time (all threads)");
  machine["device"] = arguments.device;

  if (!arguments.no_python) {
    TORCH_CHECK_VALUE(!arguments.python.empty(),
                      "--python must name a Python with torch, transformers, peft and safetensors (hint: "
                      "examples/bench.sh installs one; --no-python leaves Python's side out)");
    std::vector<std::string> variables{"TOKENIZERS_PARALLELISM=false", "HF_HUB_OFFLINE=1"};
    if (tuned) {
      for (const auto& variable : finetune::kept_memory_variables()) variables.push_back(variable);
    }
    session.peer =
        std::make_unique<bench::Peer>(arguments.python, arguments.script,
                                      std::vector<std::string>{std::to_string(arguments.threads)}, variables);
    const auto hello = session.peer->hello();
    machine["python"] = fmt::format("torch {}, peft {}, {} threads", hello.at("torch").get<std::string>(),
                                    hello.at("peft").get<std::string>(), hello.at("threads").get<int>());
    const auto version = hello.at("torch").get<std::string>();
    if (version.substr(0, version.find('+')) != TORCH_VERSION) {
      fmt::print(stderr, "warning: Python has torch {}, but this program LibTorch {}: not like for like\n",
                 version, TORCH_VERSION);
    }
  } else {
    machine["python"] = "left out (--no-python)";
  }
  for (const auto& [name, value] : machine) fmt::print("{:18}{}\n", name, value);
  std::fflush(stdout);

  std::filesystem::create_directories(arguments.out);
  const auto write = [&](const std::string& name, const std::string& text) {
    const auto path = std::filesystem::path(arguments.out) / name;
    std::ofstream file(path);
    TORCH_CHECK(file << text << std::flush, path.string(), " cannot be written");
    return path.string();
  };
  std::optional<peft::ProductOrderReport> orders;
  if (arguments.orders) orders.emplace(std::cerr);
  std::vector<bench::Row> rows;
  std::vector<bench::TargetRow> table;
  std::string written;
  bool failed = false;
  const double begin = bench::wall_clock();
  for (size_t i = 0; i < plans.size(); ++i) {
    const auto& plan = plans[i];
    fmt::print(stderr, "[{:4.0f}s] {}/{} {}\n", bench::wall_clock() - begin, i + 1, plans.size(),
               plan.title());
    bench::Row row;
    row.set = plan.set;
    row.name = plan.name;
    try {
      plan.measure(session, row);
    } catch (const c10::Error& error) {
      row.problem = error.what_without_backtrace();
    } catch (const std::exception& error) {
      const std::string what = error.what();
      row.problem = what.substr(0, what.find("\nException raised from "));
    }
    failed = failed || !row.problem.empty();
    if (!row.problem.empty()) fmt::print(stderr, "{} failed: {}\n", row.title(), row.problem);
    rows.push_back(std::move(row));
    // After every row: a run of hours that is stopped leaves what it measured.
    table = bench::targets(rows, peft::cpu_multiplies_bfloat16(), session.device.is_cuda(), budget.by_wall);
    written = write("bench.json", bench::to_json(machine, rows, table).dump(1) + "\n");
  }
  fmt::print("\n{}\n{}\n{}", bench::rows_table(rows), bench::facts_text(rows), bench::targets_table(table));
  if (arguments.quick) fmt::print("\n--quick leaves out C8 (it compiles for minutes) and most shapes.\n");

  const auto subtitle =
      fmt::format("LibTorch {}, {}, {}, {}", machine["libtorch"], machine["blas"], threads, machine["cpu"]);
  fmt::print("\n{}\n{}\n", written, write("bench.svg", bench::chart(subtitle, rows)));
  return failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  if (const char* python = std::getenv("PEFT_REFERENCE_PYTHON")) arguments.python = python;
  CLI::App app(
      "Measures what adapters cost over the frozen model: plain C++, this library and Python PEFT in turn.");
  app.name("peft-bench");
  app.add_option(
         "--set", arguments.sets,
         "sets to run: C1 layers, C2 whole steps, C3 after backward, C4 host time, C5 life cycle, C8 build; "
         "on a GPU G1 decoder blocks, G2 encoders, G3 methods over LoRA, G5 after backward (default: all)")
      ->delimiter(',');
  app.add_option("--filter", arguments.filter, "only rows whose set and name hold this text");
  app.add_flag("--list", arguments.list, "names the rows and ends");
  app.add_flag("--quick", arguments.quick, "the rows of the targets, in about three minutes");
  app.add_flag("--tiny", arguments.tiny, "every row at a size that proves nothing but that it works");
  app.add_option("--threads", arguments.threads, "that compute, on both sides")
      ->transform(finetune::whole_number(1, 4096))
      ->capture_default_str();
  app.add_option("--seconds", arguments.seconds, "for each row (default: 4, quick 1.2; at least five rounds)")
      ->check(finetune::number_from(0.01, 1e4));
  app.add_option("--clock", arguments.clock,
                 "ratios of processor time (cpu) or of wall time; auto: cpu for one thread")
      ->check(CLI::IsMember({"auto", "cpu", "wall"}))
      ->capture_default_str();
  app.add_option("--malloc", arguments.malloc, "default: glibc's; tuned: both sides keep freed memory")
      ->check(CLI::IsMember({"default", "tuned"}))
      ->capture_default_str();
  app.add_option("--device", arguments.device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_flag("--orders", arguments.orders,
               "prints in which order low-rank layers compute their products, a line a shape");
  app.add_option("--python", arguments.python,
                 "of Python PEFT (default: the environment's PEFT_REFERENCE_PYTHON)");
  app.add_option("--peer", arguments.script, "the script it runs")
      ->check(CLI::ExistingFile)
      ->capture_default_str();
  app.add_flag("--no-python", arguments.no_python, "leaves Python's side out");
  app.add_option("--out", arguments.out, "folder for bench.json and bench.svg")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    return run(arguments);
  } catch (const c10::Error& error) {
    fmt::print(stderr, "peft-bench: {}\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "peft-bench: {}\n", error.what());
  }
  return 1;
}
