// GLUE's files: every task's columns, labels in their order, and files of another task.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "catch.h"
#include "glue/tsv.h"

namespace {

using Catch::Matchers::Contains;
using glue::GlueRow;

std::filesystem::path file_with(const std::string& contents) {
  static int number = 0;
  const auto path =
      std::filesystem::temp_directory_path() / fmt::format("peft-glue-test-{}-{}.tsv", ::getpid(), ++number);
  std::ofstream(path, std::ios::binary) << contents;
  return path;
}

std::vector<GlueRow> read(const std::string& name, const std::string& contents, bool dev = false) {
  const auto path = file_with(contents);
  const auto& task = glue::glue_task(name);
  try {
    auto rows = glue::read_rows(path, task, dev ? task.dev : task.train);
    std::filesystem::remove(path);
    return rows;
  } catch (...) {
    std::filesystem::remove(path);
    throw;
  }
}

const std::string pair_header = "index\tsentence1\tsentence2\tlabel\n";

}  // namespace

TEST_CASE("every task's columns and the order of its classes are GLUE's", "[glue]") {
  const auto expect = [](const std::vector<GlueRow>& rows, const std::string& a, const std::string& b,
                         std::int64_t label) {
    REQUIRE(rows.size() == 1);
    CHECK(rows[0].text == a);
    CHECK(rows[0].text_b == b);
    CHECK(rows[0].label == label);
  };
  expect(read("CoLA", "gj04\t0\t*\tThey \"drank the pub."), "They \"drank the pub.", "", 0);
  expect(read("SST-2", "sentence\tlabel\na joy \t1\n"), "a joy ", "", 1);
  expect(read("MRPC", "\xEF\xBB\xBFQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t\" a\tb\r\n"),
         "\" a", "b", 1);
  expect(read("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t0\n"), "a", "b", 0);
  expect(read("QNLI", "index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n"), "a", "b", 0);
  expect(read("RTE", pair_header + "0\ta\tb\tnot_entailment\n"), "a", "b", 1);
  expect(read("WNLI", pair_header + "0\ta\tb\t1\n"), "a", "b", 1);
  const std::string first =
      "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
      "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\t";
  const std::string row = "0\tp\tq\tg\t(\t(\t(\t(\ta\tb\tneutral\t";
  expect(read("MNLI", first + "gold_label\n" + row + "contradiction\n"), "a", "b", 2);
  expect(read("MNLI", first + "label2\tlabel3\tlabel4\tlabel5\tgold_label\n" + row + "x\tx\tx\tx\tneutral\n",
              true),
         "a", "b", 1);
  const auto scores =
      read("STS-B",
           "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
           "0\tg\tf\ty\t1\tnone\tnone\ta\tb\t3.800\n");
  REQUIRE(scores.size() == 1);
  CHECK(scores[0].score == 3.8);
  CHECK(scores[0].label == -1);
}

TEST_CASE("QQP's lines with columns missing are left out and counted", "[glue]") {
  const auto path =
      file_with("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\n1\t2\t3\ta\tb\t1\n");
  const auto& task = glue::glue_task("QQP");
  std::string said;
  CHECK(glue::read_rows(path, task, task.train, [&](const std::string& line) { said = line; }).size() == 1);
  CHECK_THAT(said, Contains("1 lines with columns missing"));
  std::filesystem::remove(path);
}

TEST_CASE("a file of another task is an error that says what was expected and found", "[glue]") {
  CHECK_THROWS_WITH(
      read("QNLI", pair_header + "0\ta\tb\tentailment\n"),
      Contains("expected the columns of QNLI (index, question, sentence, label), but found index, "
               "sentence1, sentence2, label, those of RTE and WNLI"));
  CHECK_THROWS_WITH(
      read("CoLA", "sentence\tlabel\na\t1\n"),
      Contains("expected the columns of CoLA (source, label, mark, sentence, without a header), but "
               "found sentence, label, that of SST-2"));
  CHECK_THROWS_WITH(read("CoLA", pair_header), Contains("those of RTE and WNLI"));
  CHECK_THROWS_WITH(read("WNLI", pair_header + "0\ta\tb\tentailment\n"),
                    Contains(":2: label must be one of WNLI's (0, 1), but got 'entailment'"));
}

TEST_CASE("lines that are wrong are named", "[glue]") {
  CHECK_THROWS_WITH(read("RTE", pair_header + "0\ta\tb\n0\ta\tb\tmaybe\n"),
                    Contains("2 lines are wrong") && Contains(":2: must have 4 columns, but has 3") &&
                        Contains(":3: label must be one of"));
  CHECK_THROWS_WITH(read("SST-2", "sentence\tlabel\n\xFF\t1\n"), Contains(":2: must be valid UTF-8"));
  CHECK_THROWS_WITH(read("SST-2", "sentence\tlabel\n"), Contains("must have rows"));
  const std::string header =
      "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n";
  for (const char* score : {"5.1", "-1", "nan", "x", ""}) {
    CHECK_THROWS_WITH(read("STS-B", header + "0\tg\tf\ty\t1\tn\tn\ta\tb\t" + score + "\n"),
                      Contains("score must be a number from 0 to 5"));
  }
}
