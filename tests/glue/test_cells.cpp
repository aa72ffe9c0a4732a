// Cells of a GLUE table: their files, what makes them another, and the comparison of two programs.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "catch.h"
#include "glue/cell.h"
#include "glue/report.h"

namespace {

using Catch::Matchers::Contains;

/// A folder that is removed.
struct Folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / fmt::format("peft-glue-{}", ::getpid());
  Folder() { std::filesystem::remove_all(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

glue::CellSettings settings(std::uint64_t seed = 0, const std::string& task = "RTE") {
  glue::CellSettings result;
  result.task = task;
  result.method = "lora";
  result.seed = seed;
  result.recipe = glue::default_recipe("lora");
  return result;
}

glue::CellResult result(std::optional<double> value) {
  glue::CellResult cell;
  cell.curve = {{10, {{"accuracy", 0.25}}}, {20, {{"accuracy", value}}}, {30, {{"accuracy", 0.25}}}};
  cell.head_weights = 770;
  cell.other_weights = 1000;
  cell.steps = 30;
  cell.seconds = 1.5;
  return cell;
}

}  // namespace

TEST_CASE("a finished cell is read back with all its digits", "[glue]") {
  const Folder folder;
  const glue::Cells cells(folder.path);
  CHECK_FALSE(cells.read(settings()));
  cells.write(settings(), result(1.0 / 3));
  const auto read = cells.read(settings()).value();
  CHECK(read.best().step == 20);
  CHECK(read.best().score().value() == 1.0 / 3);
  CHECK(read.curve.size() == 3);
  CHECK(read.seconds == 1.5);
  CHECK_FALSE(cells.read(settings(1)));
}

TEST_CASE("a cell of other settings is an error that names the first that differs", "[glue]") {
  const Folder folder;
  const glue::Cells cells(folder.path);
  cells.write(settings(), result(0.5));
  auto other = settings();
  other.recipe.rate = 0.5;
  CHECK_THROWS_WITH(cells.read(other), Contains("lora-0.json") && Contains("recipe.lr was 0.002") &&
                                           Contains("but is 0.5 now (hint: another --out)"));
  std::ofstream(cells.path(settings())) << "{";
  CHECK_THROWS_WITH(cells.read(settings()), Contains("lora-0.json"));
}

TEST_CASE("an undefined metric is neither the best nor silent", "[glue]") {
  CHECK(result(std::nullopt).best().step == 10);
  auto never = result(std::nullopt);
  never.curve.erase(never.curve.begin());
  never.curve.pop_back();
  CHECK_FALSE(never.best().score());
  const auto table = glue::table_cells({{settings(0), never}, {settings(1), result(0.5)}});
  CHECK(table.at(1).at(1) == "undefined (1 of 2)");
  CHECK(table.at(1).at(2) == "-");
  CHECK_THAT(glue::csv({{settings(), never}}), Contains(",accuracy,,20,30,1000,1770,"));
}

TEST_CASE("the table has mean and deviation of each metric, and the average of the tasks", "[glue]") {
  const auto table = glue::table_cells({{settings(0), result(0.5)},
                                        {settings(1), result(0.7)},
                                        {settings(0, "SST-2"), result(0.9)},
                                        {settings(1, "SST-2"), result(0.9)}});
  REQUIRE(table.size() == 2);
  CHECK(table[0] == std::vector<std::string>{"method", "RTE accuracy", "SST-2 accuracy", "average", "trained",
                                             "with head", "memory", "time"});
  CHECK(table[1] == std::vector<std::string>{"lora", "60.00 ± 14.14", "90.00 ± 0.00", "75.00", "1 000",
                                             "1 770", "-", "0:03"});
  CHECK_THAT(glue::markdown(table), Contains("| lora | 60.00 ± 14.14 | 90.00 ± 0.00 |"));
}

TEST_CASE("two programs agree within two standard errors or one point", "[glue]") {
  const auto pairs = [](std::vector<double> ours, std::vector<double> theirs) {
    return glue::Pairs{std::move(ours), std::move(theirs)};
  };
  CHECK(pairs({0.5, 0.6, 0.7}, {0.5, 0.6, 0.7}).agree());
  CHECK(pairs({0.509}, {0.5}).agree());
  CHECK_FALSE(pairs({0.52}, {0.5}).agree());
  CHECK_FALSE(pairs({0.52, 0.52, 0.521}, {0.5, 0.5, 0.5}).agree());
  const auto wide = pairs({0.50, 0.56, 0.52}, {0.5, 0.5, 0.5});
  CHECK(wide.mean() == Approx(0.08 / 3));
  CHECK(wide.standard_error() == Approx(0.017638342));
  CHECK(wide.agree());
}
