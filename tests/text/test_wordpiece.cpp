#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "text/tokenizer.h"
#include "text/wordpiece_values.h"

namespace {

using nlohmann::json;
using peft_test::TemporaryFolder;
using text::Tokenizer;

const json& small() {
  static const json tokenizer = json::parse(wordpiece_values::tokenizer_json);
  return tokenizer;
}

Tokenizer load(const json& tokenizer) {
  const TemporaryFolder folder;
  peft_test::write_bytes(folder / "tokenizer.json", tokenizer.dump());
  return Tokenizer::from_file(folder / "tokenizer.json");
}

/// What reading the file says; empty if it is read.
std::string error_of(const std::string& bytes) {
  const TemporaryFolder folder;
  peft_test::write_bytes(folder / "tokenizer.json", bytes);
  try {
    Tokenizer::from_file(folder / "tokenizer.json");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

/// The same after a change at a JSON pointer; a null value removes the key.
std::string error_after(const char* pointer, const json& value) {
  json tokenizer = small();
  const json::json_pointer place(pointer);
  if (value.is_null()) {
    tokenizer[place.parent_pointer()].erase(place.back());
  } else {
    tokenizer[place] = value;
  }
  return error_of(tokenizer.dump());
}

}  // namespace

TEST_CASE("WordPiece gives the ids and type ids of Hugging Face's tokenizers", "[wordpiece]") {
  for (const auto& [name, patch] : wordpiece_values::variants) {
    json changed = small();
    changed.update(json::parse(patch));
    const Tokenizer tokenizer = load(changed);
    std::size_t compared = 0;
    for (const wordpiece_values::Case& c : wordpiece_values::cases) {
      if (c.variant != name) continue;
      ++compared;
      CAPTURE(name, c.a, c.b.value_or("(none)"), c.max_length);
      const text::Encoding encoding =
          c.b ? tokenizer.encode(c.a, *c.b, c.max_length) : tokenizer.encode(c.a, c.max_length);
      CHECK(encoding.ids == c.ids);
      CHECK(encoding.type_ids == c.type_ids);
    }
    CHECK(compared > 20);
  }
}

TEST_CASE("WordPiece does not use the file's own truncation and padding", "[wordpiece]") {
  const Tokenizer tokenizer = load(small());
  REQUIRE(small().at("truncation").at("max_length") == 4);
  CHECK(tokenizer.encode("a b c a b c").ids.size() == 8);
  CHECK(tokenizer.encode("a").ids.size() == 3);
}

TEST_CASE("WordPiece never gives more ids than asked for", "[wordpiece]") {
  const Tokenizer tokenizer = load(small());
  for (std::int64_t length = 3; length < 16; ++length) {
    CHECK(tokenizer.encode("a b c a b c a b c", length).ids.size() ==
          std::min<std::size_t>(11, std::size_t(length)));
    CHECK(tokenizer.encode("a b c a b c", "unaffable a b", length).ids.size() ==
          std::min<std::size_t>(14, std::size_t(length)));
  }
  CHECK_THROWS_WITH(tokenizer.encode("a", 1), Contains("max_length must be at least 2") && Contains("got 1"));
  CHECK_THROWS_WITH(tokenizer.encode("a", "b", 2), Contains("max_length must be at least 3"));
  CHECK_THROWS_WITH(tokenizer.encode("a", -1), Contains("got -1"));
}

TEST_CASE("WordPiece knows its tokens by id and by name", "[wordpiece]") {
  const Tokenizer tokenizer = load(small());
  CHECK(tokenizer.vocabulary_size() == 55);
  CHECK(tokenizer.pad_id() == 0);
  CHECK(tokenizer.token(2) == "[CLS]");
  CHECK(tokenizer.token(54) == "Two Words");
  CHECK(tokenizer.id("[MASK]") == 4);
  CHECK(tokenizer.id("Two Words") == 54);
  CHECK(tokenizer.id("absent") == std::nullopt);
  CHECK(tokenizer.special_tokens(false) == 2);
  CHECK(tokenizer.special_tokens(true) == 3);
  CHECK_THROWS_AS(tokenizer.token(55), std::out_of_range);
}

TEST_CASE("WordPiece takes the padding id from the file's padding, else from [PAD]", "[wordpiece]") {
  json tokenizer = small();
  tokenizer["padding"]["pad_id"] = 7;
  CHECK(load(tokenizer).pad_id() == 7);
  tokenizer["padding"] = nullptr;
  CHECK(load(tokenizer).pad_id() == 0);
  tokenizer["added_tokens"].erase(0);
  tokenizer["model"]["vocab"].erase("[PAD]");
  tokenizer["model"]["vocab"]["other"] = 0;
  CHECK_THROWS_WITH(load(tokenizer).pad_id(), Contains("names no padding token"));
}

TEST_CASE("WordPiece refuses text that is not UTF-8 and names the byte", "[wordpiece]") {
  const Tokenizer tokenizer = load(small());
  const auto bytes = GENERATE(as<std::string>{}, "ab\xFF", "ab\xC3", "ab\xC0\x80", "ab\xED\xA0\x80",
                              "ab\xF4\x90\x80\x80", "ab\x80 c");
  CHECK_THROWS_WITH(tokenizer.encode(bytes), Contains("must be valid UTF-8") && Contains("offset 2"));
  CHECK_THROWS_AS(tokenizer.encode("a", bytes), std::invalid_argument);
}

TEST_CASE("WordPiece reads the oldest files, which do not name the model's type", "[wordpiece]") {
  CHECK(error_after("/model/type", nullptr).empty());
}

TEST_CASE("A tokenizer.json that is not such a tokenizer is an error with file and key", "[wordpiece]") {
  CHECK(error_of(small().dump()).empty());
  const auto check = [](const std::string& error, const std::string& what) {
    CHECK_THAT(error, Contains("tokenizer.json") && Contains(what));
  };
  check(error_after("/normalizer", nullptr), "key 'normalizer' is missing");
  check(error_after("/normalizer/type", "NFC"),
        "key 'normalizer.type' must be BertNormalizer, but got \"NFC\"");
  check(error_after("/normalizer/lowercase", "yes"), "key 'normalizer.lowercase' must be true or false");
  check(error_after("/pre_tokenizer/type", "Whitespace"),
        "key 'pre_tokenizer.type' must be BertPreTokenizer");
  check(error_after("/pre_tokenizer", json::array()), "key 'pre_tokenizer' must be an object, but got []");
  check(error_after("/model/type", "WordLevel"),
        "key 'model.type' must be WordPiece or BPE or Unigram, but got \"WordLevel\"");
  check(error_after("/model", nullptr), "key 'model' is missing");
  check(error_after("/model/vocab", nullptr), "key 'model.vocab' is missing");
  check(error_after("/model/vocab", json::object()), "key 'model.vocab' must hold tokens");
  check(error_after("/model/vocab/the", 3), "key 'model.vocab.the' must have an id of its own, but got 3");
  check(error_after("/model/vocab/the", -1), "key 'model.vocab.the' must be a whole number");
  check(error_after("/model/vocab/the", 1.5), "key 'model.vocab.the' must be a whole number");
  check(error_after("/model/unk_token", "[GONE]"), "key 'model.unk_token' must be a token of model.vocab");
  check(error_after("/model/continuing_subword_prefix", nullptr),
        "'model.continuing_subword_prefix' is missing");
  check(error_after("/model/max_input_chars_per_word", "12"), "'model.max_input_chars_per_word' must be");
  check(error_after("/post_processor/type", "Sequence"),
        "key 'post_processor.type' must be TemplateProcessing or BertProcessing or");
  check(error_after("/post_processor/type", "RobertaProcessing"), "key 'post_processor.cls' is missing");
  check(error_after("/post_processor/single/1/Sequence/id", "B"),
        "key 'post_processor.single[1].id' must be A");
  check(error_after("/post_processor/pair/0", "x"), "key 'post_processor.pair[0]' must be a Sequence");
  check(error_after("/post_processor/special_tokens", json::object()),
        "key 'post_processor.special_tokens.[CLS]' is missing");
  check(error_after("/added_tokens/5/id", 100), "key 'added_tokens[5].id' must be 49 for '<L>', but got 100");
  check(error_after("/added_tokens/5/lstrip", nullptr), "key 'added_tokens[5].lstrip' is missing");
  check(error_after("/added_tokens/5/content", ""), "key 'added_tokens[5].content' must not be empty");
  check(error_after("/added_tokens/6/content", "<L>"), "key 'added_tokens[6].content' must be listed once");
  check(error_after("/added_tokens/7/content", "two words"),
        "key 'added_tokens' must hold forms that differ");
  check(error_after("/version", "2.0"), "key 'version' must be \"1.0\", but got \"2.0\"");
  check(error_of("{"), "must be JSON");
  check(error_of("[]"), "must be an object");
  check(error_of(R"({"model": {}, "model": {}})"), "key 'model' occurs twice");
  CHECK_THROWS_WITH(Tokenizer::from_file("absent/tokenizer.json"),
                    Contains("absent/tokenizer.json: cannot be opened"));
}

TEST_CASE("All problems of a tokenizer.json are listed at once, at most twenty", "[wordpiece]") {
  json tokenizer = small();
  tokenizer["normalizer"]["type"] = "NFC";
  tokenizer["model"]["unk_token"] = "[GONE]";
  const std::string two = error_of(tokenizer.dump());
  CHECK_THAT(two, Contains("has 2 problems: ") && Contains("normalizer.type") && Contains("model.unk_token"));
  for (auto& id : tokenizer["model"]["vocab"]) id = "no number";
  CHECK_THAT(error_of(tokenizer.dump()), Contains("problems: ") && Contains("more"));
}
