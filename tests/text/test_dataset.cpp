#include <fmt/format.h>

#include <sstream>
#include <string>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "text/dataset.h"
#include "text/debian_packages.h"

namespace {

using peft_test::TemporaryFolder;

text::Dataset read(const std::string& bytes) {
  const TemporaryFolder folder;
  peft_test::write_bytes(folder / "data.tsv", bytes);
  return text::read_tsv(folder / "data.tsv");
}

std::string error_of(const std::string& bytes) {
  try {
    read(bytes);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

/// Records of the package index, in the shape of `apt-cache dumpavail`.
std::string record(const std::string& name, const std::string& section, const std::string& description,
                   const std::string& more = "") {
  return fmt::format("Package: {}\n{}Section: {}\nDescription: {}\n and more words\n\n", name, more, section,
                     description);
}

std::vector<text::Package> packages(const std::string& records) {
  std::istringstream in(records);
  return text::read_packages(in);
}

}  // namespace

TEST_CASE("A data set is read as it stands, without quoting", "[dataset]") {
  const text::Dataset data = read("label\ttext\nb\t\"quoted\" text\na\t caf\xC3\xA9 \n");
  REQUIRE(data.rows.size() == 2);
  CHECK_FALSE(data.pairs);
  CHECK(data.rows[0].label == "b");
  CHECK(data.rows[0].text == "\"quoted\" text");
  CHECK(data.rows[0].line == 2);
  CHECK(data.rows[1].text == " caf\xC3\xA9 ");
  CHECK(text::Labels(data).names() == std::vector<std::string>{"a", "b"});
  CHECK(text::Labels(data).classes(data) == std::vector<std::int64_t>{1, 0});
}

TEST_CASE("A data set of pairs has two texts a row", "[dataset]") {
  const text::Dataset data = read("label\ttext_a\ttext_b\nx\tone\ttwo\n");
  CHECK(data.pairs);
  CHECK(data.rows.at(0).text == "one");
  CHECK(data.rows.at(0).text_b == "two");
}

TEST_CASE("A byte-order mark, CRLF and a missing last line end are tolerated", "[dataset]") {
  const text::Dataset data = read("\xEF\xBB\xBFlabel\ttext\r\na\tone\r\nb\ttwo");
  REQUIRE(data.rows.size() == 2);
  CHECK(data.rows[0].text == "one");
  CHECK(data.rows[1].text == "two");
}

TEST_CASE("A wrong data set is an error with file and line", "[dataset]") {
  const auto check = [](const std::string& bytes, const std::string& what) {
    CHECK_THAT(error_of(bytes), Contains("data.tsv") && Contains(what));
  };
  check("", "data.tsv:1: must be the header");
  check("a\tone\nb\ttwo\n", "data.tsv:1: must be the header");
  check("label\ttext\n", "must have rows, but has only the header");
  check("label\ttext\na\tone\nno tab\n", "data.tsv:3: must have a label, a tab and a text, but has no tab");
  check("label\ttext\na\tone\n\nb\ttwo\n", "data.tsv:3: must have a label");
  check("label\ttext\na\tone\ttwo\n", "data.tsv:2: must have 2 columns as the header has, but has 3");
  check("label\ttext_a\ttext_b\na\tone\n", "data.tsv:2: must have 3 columns as the header has, but has 2");
  check("label\ttext\na\t\n", "data.tsv:2: must have a text, but it is empty");
  check("label\ttext\na\t  \n", "data.tsv:2: must have a text, but it is empty");
  check("label\ttext_a\ttext_b\na\tone\t\n", "data.tsv:2: must have a text, but it is empty");
  check("label\ttext\n\tone\n", "data.tsv:2: must have a label, but it is empty");
  check("label\ttext\na\tone\xFF\n",
        "data.tsv:2: must be valid UTF-8, but the byte at offset 5 of the line (0xFF)");
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(text::read_tsv(folder / "absent.tsv"), Contains("absent.tsv: cannot be opened"));
  CHECK_THROWS_WITH(text::read_tsv(folder.path()), Contains("cannot be opened"));
}

TEST_CASE("All wrong lines are listed, at most twenty", "[dataset]") {
  std::string bytes = "label\ttext\n";
  for (int i = 0; i < 25; ++i) bytes += "wrong\n";
  const std::string error = error_of(bytes);
  CHECK_THAT(error, Contains("25 lines are wrong\n") && Contains("data.tsv:2:") && Contains("data.tsv:21:"));
  CHECK_THAT(error, !Contains("data.tsv:22:") && Contains("and 5 more"));
}

TEST_CASE("One class is an error, and so is a label the training data lack", "[dataset]") {
  CHECK_THROWS_WITH(text::Labels(read("label\ttext\na\tone\na\ttwo\n")),
                    Contains("data.tsv: must have two classes at least") && Contains("'a'"));
  const text::Labels labels(read("label\ttext\na\tone\nb\ttwo\n"));
  CHECK_THROWS_WITH(labels.classes(read("label\ttext\na\tone\nc\ttwo\n")),
                    Contains("data.tsv:3: label must be one of the training data (a, b), but got 'c'"));
}

// The numbers are those of tests/reference/dataset_values.py.
TEST_CASE("Hashes and the order of an epoch are the same everywhere", "[dataset]") {
  CHECK(text::mix(1) == 12994781566227106604u);
  CHECK(text::h64("") == 17280346270528514342u);
  CHECK(text::h64("caf\xC3\xA9") == 17657241459520602854u);
  std::vector<std::uint64_t> hashes;
  for (const char* word : {"a", "b", "c", "d", "e", "f", "g", "h"}) hashes.push_back(text::h64(word));
  CHECK(text::epoch_order(hashes, 0, 0) == std::vector<std::size_t>{4, 0, 1, 6, 7, 3, 5, 2});
  CHECK(text::epoch_order(hashes, 3, 1) == std::vector<std::size_t>{4, 5, 2, 7, 6, 0, 3, 1});
}

TEST_CASE("Rows with equal texts keep their order in every epoch", "[dataset]") {
  const std::vector<std::uint64_t> hashes(5, text::h64("same"));
  CHECK(text::epoch_order(hashes, 7, 2) == std::vector<std::size_t>{0, 1, 2, 3, 4});
}

TEST_CASE("The hash of a pair covers both texts", "[dataset]") {
  const text::Row row{"x", "one", "two", 2};
  CHECK(text::row_hash(row, false) == text::h64("one"));
  CHECK(text::row_hash(row, true) == text::h64("one\ttwo"));
}

TEST_CASE("Packages are read from the index in the order of their names", "[debian_packages]") {
  const auto read =
      packages(record("zoo", "contrib/games", "a\tgame ", "Source: animals (1.2)\n") +
               record("ant", "admin", "first", "Description: \xC2\xA0wins\xE3\x80\x80\n") +
               record("bad", "net", "byte \xFF\xC3 here") + record("none", "web", "") +
               "Section: net\nDescription: nameless\n\n" + "Package: bare\nDescription: no section\n");
  REQUIRE(read.size() == 3);
  CHECK(read[0].name == "ant");
  CHECK(read[0].description == "wins");
  CHECK(read[0].source == "ant");
  CHECK(read[1].description == "byte \xEF\xBF\xBD\xEF\xBF\xBD here");
  CHECK(read[2].section == "games");
  CHECK(read[2].description == "a game");
  CHECK(read[2].source == "animals");
}

TEST_CASE("Carriage returns end lines of the index as line feeds do", "[debian_packages]") {
  const auto read = packages(
      "Package: a\r\nSection: net\rDescription: one\r\n\r\nPackage: b\nSection: web\nDescription: two");
  REQUIRE(read.size() == 2);
  CHECK(read[0].section == "net");
  CHECK(read[0].description == "one");
  CHECK(read[1].name == "b");
}

TEST_CASE("The sections data set has ten sections and every text once", "[debian_packages]") {
  const auto rows =
      text::section_rows(packages(record("b", "net", "twice") + record("a", "web", "twice") +
                                  record("c", "libs", "not one of the ten") + record("d", "mail", "once")));
  REQUIRE(rows.size() == 2);
  CHECK(text::h64(rows[0].text) < text::h64(rows[1].text));
  for (const auto& row : rows) CHECK(row.label == (row.text == "twice" ? "web" : "mail"));
}

TEST_CASE("The pair data set gives half the descriptions a neighbour's name", "[debian_packages]") {
  std::string records;
  for (int i = 0; i < 200; ++i) records += record(fmt::format("name{}", i), "net", fmt::format("text {}", i));
  records += record("twin-a", "web", "lone");
  const auto rows = text::pair_rows(packages(records));
  std::size_t other = 0;
  for (const auto& row : rows) {
    const std::size_t bar = row.text.find(" [SEP] ");
    REQUIRE(bar != std::string::npos);
    const std::string name = row.text.substr(0, bar);
    const std::string description = row.text.substr(bar + 7);
    CHECK((row.label == "other") == ((text::h64("pair" + description) & 1) != 0));
    CHECK((row.label == "own") == (name == row.source));
    other += row.label == "other";
  }
  CHECK(other > 70);
  CHECK(other < 130);
}

TEST_CASE("The order data set swaps two different neighbours or none", "[debian_packages]") {
  std::string records = record("short", "net", "three words only") + record("same", "net", "go go GO go");
  for (int i = 0; i < 50; ++i)
    records += record(fmt::format("p{}", i), "net", fmt::format("one two {} four five", i));
  std::size_t swapped = 0;
  for (const auto& row : text::order_rows(packages(records))) {
    if (row.source == "same") {
      CHECK(row.label == "intact");
      continue;
    }
    const std::string original = fmt::format("one two {} four five", row.source.substr(1));
    CHECK((row.text == original) == (row.label == "intact"));
    CHECK(row.text.size() == original.size());
    swapped += row.label == "swapped";
  }
  CHECK(swapped > 10);
  CHECK(swapped < 40);
}
