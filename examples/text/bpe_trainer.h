// train_bpe: byte-level BPE learned from texts, equal to the BpeTrainer of Hugging Face's tokenizers.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <queue>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "byte_level.h"
#include "strict_json.h"
#include "unicode.h"

namespace text {

/// How BPE is learned.
struct BpeTraining {
  /// Tokens at most: special ones, the 256 bytes, and one for each merge.
  std::size_t vocabulary_size = 30000;
  /// How often a pair must occur to be merged, in all texts together.
  std::int64_t min_frequency = 0;
  /// Their ids are the first ones.
  std::vector<std::string> special_tokens = {};
  /// The tokenizer puts a blank before each text; so does the training.
  bool add_prefix_space = false;
};

namespace internal {

/// Learns the merges of one vocabulary: of all neighbours in the words the most frequent pair becomes a
/// token, of equally frequent ones that with the smallest ids; and so on.
class BpeLearner {
 public:
  explicit BpeLearner(const std::vector<std::string>& first_tokens) {
    for (const auto& token : first_tokens) token_id(token);
  }

  /// Adds a word, in the alphabet's characters.
  void add_word(const std::string& word, std::int64_t count) {
    Word entry{{}, count};
    for (const char32_t c : decode_utf8(word)) entry.tokens.push_back(token_id(encode_utf8({&c, 1})));
    for (std::size_t i = 0; i + 1 < entry.tokens.size(); ++i) {
      change({entry.tokens[i], entry.tokens[i + 1]}, words_.size(), count);
    }
    words_.push_back(std::move(entry));
  }

  void learn(std::size_t vocabulary_size, std::int64_t min_frequency) {
    enqueue_changed();
    while (tokens_.size() < vocabulary_size && !queue_.empty()) {
      Candidate best = queue_.top();
      queue_.pop();
      if (const auto count = counts_.at(best.pair); count != best.count) {  // merges beside it took some
        best.count = count;
        queue_.push(std::move(best));
        continue;
      }
      if (best.count < 1 || best.count < min_frequency) break;
      const Id joined = token_id(tokens_[best.pair.first] + tokens_[best.pair.second]);
      merges_.push_back(best.pair);
      for (const std::size_t word : best.words) merge(word, best.pair, joined);
      enqueue_changed();
    }
  }

  const std::vector<std::string>& tokens() const { return tokens_; }

  /// In their order. A pair that was merged twice, in words that got it at different times, counts the second
  /// time.
  std::vector<std::pair<std::string, std::string>> merges() const {
    std::vector<std::pair<std::string, std::string>> result;
    std::set<Pair> seen;
    for (auto pair = merges_.rbegin(); pair != merges_.rend(); ++pair) {
      if (seen.insert(*pair).second) result.emplace_back(tokens_[pair->first], tokens_[pair->second]);
    }
    std::reverse(result.begin(), result.end());
    return result;
  }

 private:
  using Id = std::size_t;
  using Pair = std::pair<Id, Id>;
  struct Word {
    std::vector<Id> tokens;
    std::int64_t count = 0;
  };
  /// A pair, how often it occurs, and the words that got it since it was last put into the queue.
  struct Candidate {
    Pair pair;
    std::int64_t count = 0;
    std::vector<std::size_t> words;
    bool operator<(const Candidate& other) const {
      return std::tie(count, other.pair) < std::tie(other.count, pair);
    }
  };

  Id token_id(const std::string& token) {
    const auto [found, fresh] = ids_.emplace(token, tokens_.size());
    if (fresh) tokens_.push_back(token);
    return found->second;
  }

  void change(const Pair& pair, std::size_t word, std::int64_t count) {
    counts_[pair] += count;
    if (count > 0) changed_[pair].insert(word);
  }

  void enqueue_changed() {
    for (auto& [pair, words] : changed_) {
      if (counts_[pair] > 0) queue_.push({pair, counts_[pair], {words.begin(), words.end()}});
    }
    changed_.clear();
  }

  void merge(std::size_t word, const Pair& pair, Id joined) {
    auto& [tokens, count] = words_[word];
    for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
      if (tokens[i] != pair.first || tokens[i + 1] != pair.second) continue;
      if (i > 0) {
        change({tokens[i - 1], pair.first}, word, -count);
        change({tokens[i - 1], joined}, word, count);
      }
      tokens[i] = joined;
      tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(i) + 1);
      if (i + 1 < tokens.size()) {
        change({pair.second, tokens[i + 1]}, word, -count);
        change({joined, tokens[i + 1]}, word, count);
      }
    }
  }

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, Id> ids_;
  std::vector<Word> words_;
  std::map<Pair, std::int64_t> counts_;
  std::map<Pair, std::set<std::size_t>> changed_;
  std::priority_queue<Candidate> queue_;
  std::vector<Pair> merges_;
};

}  // namespace internal

/// Learns a byte-level BPE from texts. Returns a tokenizer.json: `.dump()` it into a file for `Tokenizer` or
/// Python. Throws: std::invalid_argument for text that is no UTF-8, and for a vocabulary too small for its
/// first tokens.
///
/// Example:
///   const auto json = text::train_bpe(verses, {.vocabulary_size = 4000, .special_tokens =
///   {"<|endoftext|>"}});
inline nlohmann::json train_bpe(const std::vector<std::string>& texts, const BpeTraining& options) {
  std::vector<std::string> first = options.special_tokens;
  for (char32_t c = 0; c < 0x144; ++c) {  // the bytes' characters in their own order
    if (std::count(byte_alphabet().begin(), byte_alphabet().end(), c) > 0)
      first.push_back(encode_utf8({&c, 1}));
  }
  if (options.vocabulary_size < first.size()) {
    throw std::invalid_argument(fmt::format(
        "train_bpe: vocabulary_size must be at least {} for the bytes and special tokens, but got {}",
        first.size(), options.vocabulary_size));
  }
  std::map<std::string, std::int64_t> words;
  for (const std::string& given : texts) {
    std::u32string text = decode_utf8(given);
    if (options.add_prefix_space && !text.empty() && text.front() != U' ') text.insert(0, 1, U' ');
    for (const auto word : split_gpt2_words(text)) ++words[to_byte_alphabet(encode_utf8(word))];
  }
  internal::BpeLearner learner(first);
  for (const auto& [word, count] : words) learner.add_word(word, count);
  learner.learn(options.vocabulary_size, options.min_frequency);

  using internal::Json;
  Json added_tokens = Json::array(), vocabulary = Json::object();
  for (const auto& token : learner.tokens()) vocabulary[token] = vocabulary.size();
  for (const auto& token : options.special_tokens) {
    added_tokens.push_back({{"id", vocabulary[token]},
                            {"content", token},
                            {"single_word", false},
                            {"lstrip", false},
                            {"rstrip", false},
                            {"normalized", false},
                            {"special", true}});
  }
  const Json byte_level{{"type", "ByteLevel"},
                        {"add_prefix_space", options.add_prefix_space},
                        {"trim_offsets", true},
                        {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added_tokens},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", byte_level},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocabulary},
            {"merges", learner.merges()}}}};
}

}  // namespace text
