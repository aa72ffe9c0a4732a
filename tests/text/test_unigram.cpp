#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "catch.h"
#include "io/temporary_folder.h"
#include "text/tokenizer.h"
#include "text/unigram_values.h"

namespace {

using nlohmann::json;
using peft_test::TemporaryFolder;
using text::Tokenizer;
using Ids = std::vector<std::int64_t>;

const json& small() {
  static const json tokenizer = json::parse(unigram_values::tokenizer_json);
  return tokenizer;
}

Tokenizer load(const json& tokenizer) {
  const TemporaryFolder folder;
  peft_test::write_bytes(folder / "tokenizer.json", tokenizer.dump());
  return Tokenizer::from_file(folder / "tokenizer.json");
}

/// The tokenizer of each variant, by its name.
std::map<std::string, Tokenizer> variants() {
  std::map<std::string, Tokenizer> result;
  const json patches = json::parse(unigram_values::variants_json);
  for (const auto& [name, patch] : patches.items()) {
    json tokenizer = small();
    tokenizer.update(patch);
    result.emplace(name, load(tokenizer));
  }
  return result;
}

/// What reading the file says after a change at a JSON pointer; empty if it is read.
std::string error_after(const char* pointer, const json& value) {
  json tokenizer = small();
  tokenizer[json::json_pointer(pointer)] = value;
  try {
    load(tokenizer);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

/// A Unigram of a few pieces, nothing before it and nothing behind it.
json pieces(const json& vocabulary, const json& unk_id = 0) {
  return {{"added_tokens", json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", nullptr},
          {"post_processor", nullptr},
          {"decoder", nullptr},
          {"model", {{"type", "Unigram"}, {"unk_id", unk_id}, {"vocab", vocabulary}}}};
}

}  // namespace

TEST_CASE("Unigram gives the ids and type ids of Hugging Face's tokenizers", "[unigram]") {
  const auto tokenizers = variants();
  std::map<std::string, int> compared;
  const json cases = json::parse(unigram_values::encodings_json);
  for (const json& c : cases) {
    CAPTURE(c.dump());
    const auto name = c.at("variant").get<std::string>();
    ++compared[name];
    const auto a = c.at("a").get<std::string>();
    const Tokenizer& tokenizer = tokenizers.at(name);
    const auto encoding =
        c.contains("b") ? tokenizer.encode(a, c["b"].get<std::string>()) : tokenizer.encode(a);
    CHECK(encoding.ids == c.at("ids").get<Ids>());
    CHECK(encoding.type_ids == c.at("type_ids").get<Ids>());
  }
  REQUIRE(compared.size() == 5);
  for (const auto& [name, count] : compared) CHECK(count == 18);
}

TEST_CASE("Unigram makes Hugging Face's texts of ids", "[unigram]") {
  const auto tokenizers = variants();
  const json cases = json::parse(unigram_values::decodings_json);
  CHECK(cases.size() > 150);
  for (const json& c : cases) {
    CAPTURE(c.dump());
    const Tokenizer& tokenizer = tokenizers.at(c.at("variant").get<std::string>());
    CHECK(tokenizer.decode(c.at("ids").get<Ids>(), c.at("skip").get<bool>()) ==
          c.at("text").get<std::string>());
  }
}

TEST_CASE("Unigram takes the likeliest cut, of equals the one whose pieces are found first", "[unigram]") {
  json vocabulary = json::parse(
      R"([["<unk>", 0.0], ["a", -1.0], ["b", -1.0], ["ab", -1.5], ["ba", -1.5], ["abab", -9.0]])");
  CHECK(load(pieces(vocabulary)).encode("abab").ids == Ids{3, 3});
  CHECK(load(pieces(vocabulary)).encode("aba").ids == Ids{1, 4});
  vocabulary[5][1] = -2.9;
  CHECK(load(pieces(vocabulary)).encode("abab").ids == Ids{5});
  SECTION("what is no piece is one unknown piece, together with its neighbours") {
    CHECK(load(pieces(vocabulary)).encode("xya").ids == Ids{0, 1});
    CHECK(load(pieces(vocabulary)).encode("\u4e2d\u56fdxax").ids == Ids{0, 1, 0});
    CHECK(load(pieces(vocabulary)).encode("<unk>x").ids == Ids{0});
    const Tokenizer none = load(pieces(vocabulary, nullptr));
    CHECK(none.encode("ab").ids == Ids{3});
    CHECK_THROWS_WITH(none.encode("ab\u4e2dx"), Contains("'\u4e2d'") && Contains("model.unk_id is null"));
  }
  SECTION("a piece listed twice has its last id and score") {
    vocabulary.push_back(json::array({"ab", -0.1}));
    const Tokenizer tokenizer = load(pieces(vocabulary));
    CHECK(tokenizer.encode("abab").ids == Ids{6, 6});
    CHECK(tokenizer.token(3) == "ab");
    CHECK(tokenizer.vocabulary_size() == 7);
  }
}

TEST_CASE("Scores of a file are read as Hugging Face's tokenizers read them", "[unigram]") {
  const auto read = text::internal::as_read_by_reference;
  CHECK(read(-0.43561181362301915) == -0.4356118136230191);  // not the nearest double, as serde_json's
  CHECK(read(0.0) == 0.0);
  CHECK(read(-12.5) == -12.5);
  CHECK(read(1e-7) == 1e-7);
  CHECK(read(2.5e20) == 2.5e20);
}

TEST_CASE("A Unigram file that is not supported or wrong is an error with file and key", "[unigram]") {
  const auto check = [](const std::string& error, const std::string& what) {
    CHECK_THAT(error, Contains("tokenizer.json") && Contains(what));
  };
  CHECK(error_after("/normalizer", nullptr).empty());
  CHECK(error_after("/pre_tokenizer", nullptr).empty());
  check(error_after("/model/vocab", json::object()), "key 'model.vocab' must be a list of tokens and scores");
  check(error_after("/model/vocab/5", json::array({"a", "b"})),
        "key 'model.vocab[5]' must be [token, score]");
  check(error_after("/model/unk_id", 5000), "key 'model.unk_id' must be less than the");
  check(error_after("/model/byte_fallback", 1), "key 'model.byte_fallback' must be true or false");
  check(error_after("/normalizer/type", "Nmt"),
        "key 'normalizer.type' must be Sequence or BertNormalizer or");
  check(error_after("/normalizer/precompiled_charsmap", "a*b="), "must be bytes in base 64");
  check(error_after("/normalizer/precompiled_charsmap", "AAAA"), "must begin with the length of its trie");
  check(error_after("/normalizer/precompiled_charsmap", "BAAAAAAAAAD/"), "must hold UTF-8 behind its trie");
  const json sequence = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}, {{"type", "Strip"}}}}};
  check(error_after("/normalizer", sequence), "key 'normalizer.normalizers[1].strip_left' is missing");
  const auto replace = [](const json& pattern) {
    return json{{"type", "Replace"}, {"pattern", pattern}, {"content", ""}};
  };
  check(error_after("/normalizer", replace("a")),
        "key 'normalizer.pattern' must be a String or a Regex, but");
  check(error_after("/normalizer", replace({{"Regex", "("}})), "must be a regular expression, but '('");
  check(error_after("/normalizer", replace({{"Regex", "a*"}})),
        "must not match the empty text, but 'a*' does");
  check(error_after("/pre_tokenizer/pretokenizers/0/type", "Split"),
        "key 'pre_tokenizer.pretokenizers[0].type' must be");
  check(error_after("/pre_tokenizer/pretokenizers/1/prepend_scheme", "last"),
        "key 'pre_tokenizer.pretokenizers[1].prepend_scheme' must be never, first or always");
  check(error_after("/pre_tokenizer/pretokenizers/1/prepend_scheme", "first"),
        "must not have the prepend_scheme first behind a normalizer that makes several characters of one");
  check(error_after("/pre_tokenizer/pretokenizers/1/add_prefix_space", false), "prepend_scheme is never");
  check(error_after("/pre_tokenizer/pretokenizers/1/replacement", "ab"), "must be one character");
  check(error_after("/pre_tokenizer/pretokenizers/0", {{"type", "Punctuation"}, {"behavior", "Removed"}}),
        "behavior' must be Isolated");
}

TEST_CASE("Ids of a decoder that is not supported cannot become text", "[unigram]") {
  json tokenizer = small();
  tokenizer["decoder"] = {{"type", "Fuse"}};
  const Tokenizer loaded = load(tokenizer);
  CHECK_THROWS_WITH(loaded.decode({5}),
                    Contains("key 'decoder.type' must be ByteLevel, WordPiece or Metaspace"));
}
