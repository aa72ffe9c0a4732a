#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "catch.h"
#include "finetune/rank_picture.h"
#include "finetune/report.h"

namespace {

using finetune::ResultRow;

/// A run of `steps` steps with a falling loss and two evaluations.
ResultRow example_row(const std::string& method, std::int64_t steps = 100) {
  ResultRow row;
  row.method = method;
  row.trainable = 1234567;
  row.percent = 5.4321;
  row.accuracy = 0.8125;
  row.seconds_per_step = 0.125;
  row.peak_bytes = 512LL << 20;
  row.adapter_bytes = 1536;
  row.train_seconds = 75;
  for (std::int64_t i = 1; i <= steps; ++i) row.loss.push_back({i, 2.0 / static_cast<double>(i)});
  row.accuracy_curve = {{steps / 2, 0.75}, {steps, 0.8125}};
  return row;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = text.find('\n', begin);
    lines.push_back(text.substr(begin, end - begin));
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return lines;
}

std::size_t count_of(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size()))
    ++count;
  return count;
}

/// What `use` makes a Progress write.
std::string written(std::int64_t total, bool terminal, const std::function<void(finetune::Progress&)>& use) {
  std::FILE* file = std::tmpfile();
  REQUIRE(file != nullptr);
  {
    finetune::Progress progress(total, terminal, file);
    use(progress);
  }
  std::rewind(file);
  std::string text;
  std::array<char, 4096> buffer{};
  for (std::size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), file)) > 0;)
    text.append(buffer.data(), n);
  std::fclose(file);
  return text;
}

}  // namespace

TEST_CASE("A table's columns line up as a terminal shows them", "[report]") {
  const auto row = example_row("lora:rank=8");
  auto wide =
      example_row("\u6F22\u5B57 e\u0301");  // two wide characters, a blank, a letter with an accent put on it
  wide.accuracy_curve.clear();
  wide.peak_bytes = 0;
  const auto lines = lines_of(finetune::table({row, wide}));
  REQUIRE(lines.size() == 4);
  CHECK(lines[0] == "method       trainable     %  accuracy  s/step  peak memory  adapter  time");
  CHECK(lines[1] == "-----------  ---------  ----  --------  ------  -----------  -------  ----");
  CHECK(lines[2] == "lora:rank=8  1 234 567  5.43   81.25 %   0.125    512.0 MiB  1.5 KiB  1:15");
  CHECK(lines[3] ==
        "\u6F22\u5B57 e\u0301       1 234 567  5.43         -   0.125            -  1.5 KiB  1:15");
  CHECK(lines_of(finetune::table({})).size() == 2);

  // A long method is cut, unless two would then look alike.
  const std::string lora = "lora:rank=8,alpha=16,targets=[query,key,value],lr=";
  const auto cut = finetune::table({example_row(lora + "1"), example_row("head")});
  CHECK_THAT(cut, Contains("lora:rank=8,alpha=16,targets=[query,key…") && !Contains("lr=1"));
  const auto both = finetune::table({example_row(lora + "1"), example_row(lora + "2")});
  CHECK_THAT(both, Contains("lr=1") && Contains("lr=2"));
}

TEST_CASE("A CSV's fields are quoted where RFC 4180 asks for it and its numbers come back as they were",
          "[report]") {
  auto row = example_row("lora:rank=8,note=\"a\nb\"");
  row.accuracy = 0.1 + 0.2;
  auto plain = example_row("head");
  plain.accuracy_curve.clear();
  CHECK(finetune::csv({row, plain}) ==
        "method,trainable,percent,accuracy,seconds_per_step,peak_bytes,adapter_bytes,train_seconds\r\n"
        "\"lora:rank=8,note=\"\"a\nb\"\"\",1234567,5.4321,0.30000000000000004,0.125,536870912,1536,75\r\n"
        "head,1234567,5.4321,,0.125,536870912,1536,75\r\n");
}

TEST_CASE("Learning curves are well-formed and hold a line for each run and panel", "[report]") {
  auto broken = example_row("a<b>&\"c\"\x01\xFF");
  broken.loss[7].value = std::numeric_limits<double>::quiet_NaN();
  broken.loss[9].value = std::numeric_limits<double>::infinity();
  auto unmeasured = example_row("head");
  unmeasured.accuracy_curve.clear();
  const std::string svg = finetune::svg({broken, unmeasured});
  CHECK(count_of(svg, "<polyline ") == 3);
  CHECK(count_of(svg, "<circle ") == 2);
  CHECK(count_of(svg, "a&lt;b&gt;&amp;&quot;c&quot;\uFFFD\uFFFD") == 2);
  CHECK(count_of(svg, "best 81.25 %") == 1);
  CHECK_FALSE(text::invalid_utf8_at(svg));
  // Every element is closed, and no coordinate is without a value.
  CHECK(count_of(svg, "<text ") == count_of(svg, "</text>"));
  CHECK(count_of(svg, "<g>") == count_of(svg, "</g>"));
  CHECK(count_of(svg, "nan") == 0);
  CHECK(count_of(svg, "inf") == 0);
}

/// Two matrices: one falls from 12 in two steps of the way, one stays.
finetune::RankHistory example_ranks() {
  finetune::RankHistory ranks({"encoder.layer.0.query", "encoder.layer.1.value<&>"});
  ranks.record(0, {12, 12});
  for (std::int64_t step = 1; step <= 50; ++step)
    ranks.record(step, {step < 20 ? 12 : step < 41 ? 7 : 0, 12});
  return ranks;
}

TEST_CASE("Ranks are kept as changes, and come back from JSON as they were", "[report]") {
  const auto ranks = example_ranks();
  REQUIRE(ranks.changes(0).size() == 3);
  REQUIRE(ranks.changes(1).size() == 1);
  REQUIRE(ranks.rank(0, 19) == 12);
  REQUIRE(ranks.rank(0, 20) == 7);
  REQUIRE(ranks.rank(0, 50) == 0);
  REQUIRE(ranks.total(30) == 19);
  REQUIRE(ranks.largest() == 12);
  auto again = finetune::RankHistory::from_json(nlohmann::json::parse(ranks.to_json().dump()));
  REQUIRE(again.to_json() == ranks.to_json());
  again.record(51, {0, 3});  // goes on where it stopped
  REQUIRE(again.changes(0).size() == 3);
  REQUIRE(again.rank(1, 51) == 3);
  const auto none = finetune::RankHistory::from_json(finetune::RankHistory().to_json());
  REQUIRE(none.empty());
}

TEST_CASE("A table of ranks has a line a matrix and some ten steps, right aligned", "[report]") {
  const auto lines = lines_of(finetune::rank_table(example_ranks()));
  REQUIRE(lines.size() == 5);
  REQUIRE(lines[0] == "encoder.layer.… rank at step   0   5  10  15  20  25  30  35  40  45  50");
  REQUIRE(lines[2] == "0.query                       12  12  12  12   7   7   7   7   7   0   0");
  REQUIRE(lines[4] == "sum                           24  24  24  24  19  19  19  19  19  12  12");
  finetune::RankHistory short_run({"query"});
  short_run.record(0, {1});
  short_run.record(1, {2});
  REQUIRE(lines_of(finetune::rank_table(short_run))[0] == "rank at step  0  1");
}

TEST_CASE("A picture of ranks has a field for each rank a matrix had, and a scale", "[report]") {
  const auto picture = finetune::rank_svg(example_ranks());
  REQUIRE(count_of(picture, "<title>0.query: rank ") == 3);
  REQUIRE(count_of(picture, "0.query: rank 7 from step 20 to 41<") == 1);
  REQUIRE(count_of(picture, "1.value&lt;&amp;&gt;: rank 12 from step 0 to 50<") == 1);
  REQUIRE(count_of(picture, "<svg") == 1);
  REQUIRE(count_of(picture, "</svg>") == 1);
  // Background, four fields, and the scale's 0 to 12.
  REQUIRE(count_of(picture, "<rect") == 1 + 4 + 13);
  REQUIRE(finetune::internal::heat_color(0) == "#F7FBFF");
  REQUIRE(finetune::internal::heat_color(1) == "#08306B");
  finetune::RankHistory large({"a"});
  large.record(0, {300});
  const auto gaps = finetune::rank_svg(large);  // no step, and a scale with gaps
  REQUIRE(count_of(gaps, "<rect") == 1 + 1 + 17);
  REQUIRE(count_of(gaps, ">300</text>") == 2);
}

TEST_CASE("Learning curves of nothing, of one step and of many are still a picture", "[report]") {
  CHECK(count_of(finetune::svg({}), "nothing was measured") == 2);
  ResultRow one;
  one.loss = {{1, 0.5}};
  CHECK(count_of(finetune::svg({one}), "<circle ") == 1);
  const std::string many = finetune::svg({example_row("long", 200000)});
  CHECK(many.size() < 40000);
  CHECK(count_of(many, ">200000</text>") == 2);
}

TEST_CASE("The first lines of a picture differ in colour and dash", "[report]") {
  std::set<std::string> colors, both;
  for (std::size_t i = 0; i < 28; ++i) {
    const auto style = finetune::internal::line_style(i);
    if (i < 7) colors.emplace(style.color);
    both.insert(std::string(style.color) + " " + std::string(style.dash));
  }
  CHECK(colors.size() == 7);
  CHECK(both.size() == 28);
}

TEST_CASE("An axis has round ticks that enclose the values", "[report]") {
  const auto check = [](double low, double high, bool whole, double first, double last, double step) {
    const auto axis = finetune::internal::round_axis(low, high, 6, whole);
    CHECK_THAT(axis.low, WithinAbs(first, 1e-9));
    CHECK_THAT(axis.high, WithinAbs(last, 1e-9));
    CHECK_THAT(axis.step, WithinAbs(step, 1e-9));
  };
  check(0, 250, true, 0, 250, 50);
  check(0, 1, true, 0, 1, 1);
  check(0.312, 0.781, false, 0.3, 0.8, 0.1);
  check(58.3, 81.2, false, 55, 85, 5);
  check(-0.004, 0.003, false, -0.004, 0.004, 0.002);
  const auto flat = finetune::internal::round_axis(0.5, 0.5, 6, false);
  CHECK(flat.low < 0.5);
  CHECK(flat.high > 0.5);
}

TEST_CASE("Smoothing keeps a constant, the number of points and what a short curve is", "[report]") {
  std::vector<ResultRow::Point> constant(300, {1, 0.7});
  for (const auto& point : finetune::internal::curve_points(constant, true)) {
    CHECK_THAT(point.value, WithinAbs(0.7, 1e-12));
  }
  const std::vector<ResultRow::Point> few = {{1, 3}, {2, 1}, {3, 2}};
  const auto curve = finetune::internal::curve_points(few, true);
  REQUIRE(curve.size() == 3);
  CHECK(curve[1].value == 1);
  std::vector<ResultRow::Point> noisy;
  for (int i = 0; i < 300; ++i) noisy.push_back({i, i % 2 ? 1.0 : 0.0});
  CHECK_THAT(finetune::internal::curve_points(noisy, true).back().value, WithinAbs(0.5, 0.06));
}

TEST_CASE("Times and sizes are shown as people read them", "[report]") {
  CHECK(finetune::clock_time(7.4) == "0:07");
  CHECK(finetune::clock_time(59.6) == "1:00");
  CHECK(finetune::clock_time(3723) == "1:02:03");
  CHECK(finetune::clock_time(std::numeric_limits<double>::infinity()) == "?");
  CHECK(finetune::internal::size_text(0) == "-");
  CHECK(finetune::internal::size_text(1023) == "1023 B");
  CHECK(finetune::internal::size_text(1048575) == "1.0 MiB");
  CHECK(finetune::internal::grouped(0) == "0");
  CHECK(finetune::internal::grouped(999) == "999");
  CHECK(finetune::internal::grouped(1000) == "1 000");
  CHECK(finetune::internal::grouped(-123456) == "-123 456");
}

TEST_CASE("Progress off a terminal is a plain line each twentieth of the way, with the mean loss",
          "[report]") {
  const std::string text = written(100, false, [](finetune::Progress& progress) {
    for (int i = 1; i <= 100; ++i) progress.step(i, i, 2e-3);
  });
  const auto lines = lines_of(text);
  REQUIRE(lines.size() == 20);
  CHECK_THAT(lines[0], Contains("step 5/100  loss 3.0000  lr 0.002"));
  CHECK_THAT(lines[19], Contains("step 100/100  loss 98.0000"));
  CHECK_THAT(lines[19], Contains("took"));
  CHECK(text.find('\r') == std::string::npos);
  CHECK(text.find('\x1b') == std::string::npos);
}

TEST_CASE("Progress on a terminal rewrites one line and makes room for messages", "[report]") {
  const std::string text = written(3, true, [](finetune::Progress& progress) {
    progress.step(1, 0.5, 1e-3);
    progress.line("evaluation: 50 %");
    progress.step(2, 0.5, 1e-3);
    progress.step(3, 0.5, 1e-3);
  });
  const auto lines = lines_of(text);
  REQUIRE(lines.size() == 2);
  CHECK_THAT(lines[0], Contains("step 1/3"));
  CHECK_THAT(lines[0], Contains("\r\x1b[Kevaluation: 50 %"));
  CHECK_THAT(lines[1], Contains("100%  step 3/3"));
  // No state is longer than a terminal of 80 columns.
  const std::string last = lines[1].substr(lines[1].rfind('\r') + 1);
  CHECK(last.size() - std::string("\x1b[K").size() < 80);
}

TEST_CASE("Progress resumed near the end measures from there", "[report]") {
  const std::string text = written(100, false, [](finetune::Progress& progress) {
    progress.step(100, 0.25, 0);
    progress.finish();
  });
  CHECK_THAT(text, Contains("step 100/100  loss 0.2500"));
  CHECK(lines_of(text).size() == 1);
}
