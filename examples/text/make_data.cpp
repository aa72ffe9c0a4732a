// Makes a labelled data set out of the package index of a Debian or Ubuntu machine.
//
// usage: apt-cache dumpavail | peft-make-data --task pair|sections|order --out DIR
// Writes DIR/sections_train.tsv and DIR/sections_test.tsv, each `label<TAB>text` with a header line.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "text/debian_packages.h"

namespace {

namespace fs = std::filesystem;

/// A folder that is made unless it is there, and removed with the object if it was made and is empty.
class Folder {
 public:
  explicit Folder(fs::path path) : path_(std::move(path)) {
    std::error_code error;
    made_ = fs::create_directories(path_, error);
    if (error) {
      throw std::runtime_error(fmt::format("{}: cannot be created: {}", path_.string(), error.message()));
    }
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;  // also that it is not empty
    if (made_) fs::remove(path_, ignored);
  }

 private:
  fs::path path_;
  bool made_ = false;
};

/// A file that has its final name only once `publish` was called; before, it is removed with the object.
class NewFile {
 public:
  explicit NewFile(fs::path path) : path_(std::move(path)), temporary_(path_) {
    temporary_ += ".partial";
    out_.open(temporary_, std::ios::binary | std::ios::trunc);
    require();
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    std::error_code ignored;
    if (!published_) fs::remove(temporary_, ignored);
  }

  void write(const std::string& bytes) {
    out_ << bytes;
    require();
  }
  void close() {
    out_.close();
    require();
  }
  void publish() {
    fs::rename(temporary_, path_);
    published_ = true;
  }

 private:
  void require() const {
    if (!out_)
      throw std::runtime_error(
          fmt::format("{}: cannot be written: {}", path_.string(), std::strerror(errno)));
  }

  fs::path path_, temporary_;
  std::ofstream out_;
  bool published_ = false;
};

std::vector<text::PackageRow> make_rows(const std::string& task, const std::vector<text::Package>& packages) {
  if (task == "pair") return text::pair_rows(packages);
  if (task == "sections") return text::section_rows(packages);
  return text::order_rows(packages);
}

void make_data(const std::string& task, const fs::path& out) {
  const std::vector<text::Package> packages = text::read_packages(std::cin);
  if (packages.empty()) {
    throw std::runtime_error(
        "standard input must hold package records, but has none (hint: apt-cache dumpavail | peft-make-data "
        "...; "
        "if that prints nothing, run apt-get update)");
  }
  std::array<std::string, 2> files = {"label\ttext\n", "label\ttext\n"};
  std::array<std::size_t, 2> counts = {0, 0};
  for (const text::PackageRow& row : make_rows(task, packages)) {
    const std::size_t split = text::in_test(row.source) ? 1 : 0;
    files[split] += fmt::format("{}\t{}\n", row.label, row.text);
    ++counts[split];
  }
  if (counts[0] == 0 || counts[1] == 0) {
    throw std::runtime_error(
        fmt::format("standard input must hold enough packages for both files, but gave {} rows for training "
                    "and {} for testing",
                    counts[0], counts[1]));
  }
  const Folder folder(out);
  NewFile train(out / "sections_train.tsv");
  NewFile test(out / "sections_test.tsv");
  train.write(files[0]);
  test.write(files[1]);
  train.close();
  test.close();
  train.publish();
  test.publish();
  fmt::print("{}: {} packages, {} training rows, {} test rows in {}\n", task, packages.size(), counts[0],
             counts[1], out.string());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Makes a labelled data set out of what `apt-cache dumpavail` prints (read from standard input).");
  std::string task = "pair";
  std::string out;
  app.add_option(
         "--task", task,
         "pair: does the name belong to the description? sections: which section is it from? order: were "
         "two words swapped?")
      ->check(CLI::IsMember({"pair", "sections", "order"}))
      ->capture_default_str();
  app.add_option("--out", out, "folder for sections_train.tsv and sections_test.tsv")->required();
  CLI11_PARSE(app, argc, argv);
  try {
    make_data(task, out);
  } catch (const std::exception& error) {
    fmt::print(stderr, "peft-make-data: {}\n", error.what());
    return 1;
  }
  return 0;
}
