// PreTokenizer: cuts a normalized text into the words that a model takes one by
// one, as a tokenizer.json says.
#pragma once

#include <unicode/uchar.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "bert_text.h"
#include "byte_level.h"

namespace text {

/// Words as views of the normalized text, or of what a step made of it.
class Words {
 public:
  /// A word; `from_start` where it begins at the beginning of the text as
  /// given.
  struct Word {
    std::u32string_view text;
    bool from_start = false;
  };

  /// One word, the whole text, which must live as long as the words; none if it
  /// is empty.
  Words(std::u32string_view text, bool from_start) { add({text, from_start}); }

  /// The words, none of them empty.
  const std::vector<Word>& all() const { return words_; }

  /// Cuts each word: `cut(word, emit)` calls `emit` with its parts, or with
  /// views of what `keep` took.
  template <typename Cut>
  void split(const Cut& cut) {
    for (const Word& word : std::exchange(words_, {})) {
      cut(word.text, word.from_start, [&](std::u32string_view part) {
        add({part, word.from_start && part.data() == word.text.data()});
      });
    }
  }

  /// Keeps a text for words that are views of it.
  std::u32string_view keep(std::u32string text) { return kept_.emplace_back(std::move(text)); }

 private:
  void add(Word word) {
    if (!word.text.empty()) words_.push_back(word);
  }

  std::vector<Word> words_;
  std::deque<std::u32string> kept_;
};

/// BERT's words.
struct BertPreTokenizer {
  void operator()(Words& words) const {
    words.split([](std::u32string_view text, bool, const auto& emit) {
      for (const auto word : split_words(text)) emit(word);
    });
  }
};

/// Byte-level BPE's words.
struct ByteLevel {
  /// Puts a blank before each text, and behind each added token, where there is
  /// none.
  bool add_prefix_space = false;
  /// Cuts into GPT-2's words; else a text is one word.
  bool use_regex = true;

  void operator()(Words& words) const {
    words.split([&](std::u32string_view text, bool, const auto& emit) {
      if (add_prefix_space && !text.starts_with(U' ')) text = words.keep(U' ' + std::u32string(text));
      if (!use_regex) return emit(text);
      for (const auto word : split_gpt2_words(text)) emit(word);
    });
  }
};

/// SentencePiece's words: each blank becomes a character that is seen, and a
/// word begins at each.
struct Metaspace {
  /// Where that character is also put before a text that does not begin with
  /// it: nowhere, only at the beginning of the text as given, or everywhere,
  /// behind added tokens too.
  enum class Prepend { kNever, kFirst, kAlways };
  char32_t replacement = U'\u2581';
  Prepend prepend = Prepend::kAlways;
  /// Whether a text is cut before each replacement; else it is one word.
  bool split = true;

  void operator()(Words& words) const {
    words.split([&](std::u32string_view text, bool from_start, const auto& emit) {
      std::u32string marked(text);
      std::replace(marked.begin(), marked.end(), U' ', replacement);
      const bool prefixed = prepend == Prepend::kAlways || (prepend == Prepend::kFirst && from_start);
      if (prefixed && marked.front() != replacement) marked.insert(marked.begin(), replacement);
      const std::u32string_view kept = words.keep(std::move(marked));
      std::size_t start = 0;
      for (std::size_t i = 1; split && i < kept.size(); ++i) {
        if (kept[i] != replacement) continue;
        emit(kept.substr(start, i - start));
        start = i;
      }
      emit(kept.substr(start));
    });
  }
};

namespace internal {

/// Cuts at characters of a kind, which are left out, words of their own, or one
/// word where they stand together.
enum class Delimiters { kRemoved, kIsolated, kContiguous };
template <typename Is>
void split_at(Words& words, Delimiters behaviour, const Is& is) {
  words.split([&](std::u32string_view text, bool, const auto& emit) {
    std::size_t start = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const bool delimiter = is(text[i]);
      const bool was = i > 0 && is(text[i - 1]);
      if (i > 0 && (delimiter != was || (delimiter && behaviour == Delimiters::kIsolated))) {
        if (!was || behaviour != Delimiters::kRemoved) emit(text.substr(start, i - start));
        start = i;
      }
    }
    if (behaviour != Delimiters::kRemoved || !is(text.back())) emit(text.substr(start));
  });
}

}  // namespace internal

/// Words between white space.
struct WhitespaceSplit {
  void operator()(Words& words) const {
    internal::split_at(words, internal::Delimiters::kRemoved, internal::is_whitespace);
  }
};

/// Each punctuation character is a word.
struct Punctuation {
  void operator()(Words& words) const {
    internal::split_at(words, internal::Delimiters::kIsolated, internal::is_bert_punctuation);
  }
};

/// Digits, and what else is a number, are words, one by one or together.
struct Digits {
  bool individual_digits = false;

  void operator()(Words& words) const {
    using internal::Delimiters;
    internal::split_at(
        words, individual_digits ? Delimiters::kIsolated : Delimiters::kContiguous,
        [](char32_t c) { return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_N_MASK) != 0; });
  }
};

/// One step of a pre-tokenizer.
using PreTokenizerPart =
    std::variant<BertPreTokenizer, ByteLevel, Metaspace, WhitespaceSplit, Punctuation, Digits>;

/// A row of steps, each of which cuts the words of the one before it.
struct PreTokenizer {
  std::vector<PreTokenizerPart> parts;

  /// The words of a text, which must outlive them; see `Words::Word` for
  /// `from_start`.
  Words operator()(std::u32string_view text, bool from_start) const {
    Words words(text, from_start);
    for (const PreTokenizerPart& part : parts) {
      std::visit([&](const auto& step) { step(words); }, part);
    }
    return words;
  }
};

}  // namespace text
