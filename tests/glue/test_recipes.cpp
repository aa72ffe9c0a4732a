// Recipes of GLUE's tasks: every one is a method of the program.
#include <string>

#include "catch.h"
#include "finetune/method.h"
#include "glue/recipe.h"
#include "glue/tasks.h"

using Catch::Matchers::Contains;

TEST_CASE("every recipe, default or published, is a method with options in their ranges", "[glue]") {
  constexpr int64_t steps = 300000;  // more than any published schedule needs
  for (const bool published : {false, true}) {
    for (const auto& task : glue::glue_tasks()) {
      if (published && task.name == "WNLI") continue;  // which the papers leave out
      for (const auto& name : glue::recipe_names(published)) {
        const auto recipe = glue::recipe_of(name, task.name, published);
        INFO(task.name << " " << name << ": " << recipe.method);
        finetune::Method method;
        REQUIRE_NOTHROW(method = finetune::parse_method(recipe.method, {}, "classifier", steps));
        CHECK(method.head_only() == (name == "head"));
        CHECK(recipe.rate > 0);
        CHECK(recipe.epochs >= 3);
      }
    }
  }
}

TEST_CASE("a published recipe is asked for by name, and refused where there is none", "[glue]") {
  CHECK_THAT(
      glue::recipe_of("adalora", "RTE", true).method,
      Contains("init_rank=2,target_rank=1,tinit=600,tfinal=1800,delta_t=1,alpha=32,orth_reg_weight=0.3"));
  CHECK_THAT(glue::recipe_of("increlora-8", "QNLI", true).method,
             Contains("target_rank=8,rank=1,incre_rank_num=4,top_h=22,init_warmup=500"));
  CHECK(glue::recipe_of("lora", "CoLA", true).epochs == 80);
  CHECK_THROWS_WITH(glue::recipe_of("ia3", "RTE", true), Contains("no published recipe of ia3 on RTE"));
  CHECK_THROWS_WITH(glue::recipe_of("lora", "WNLI", true), Contains("on WNLI"));
}

TEST_CASE("a method with keys of its own is trained as its kind is by default", "[glue]") {
  const auto own = glue::recipe_of("ia3:lr=1e-3", "WNLI", false);
  CHECK(own.method == "ia3:lr=1e-3");
  CHECK(own.rate == glue::recipe_of("ia3", "WNLI", false).rate);
  CHECK(glue::recipe_of("vera", "WNLI", false).rate == glue::recipe_of("lora", "WNLI", false).rate);
}
