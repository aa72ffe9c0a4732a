// Bpe: words to ids by merging pairs, equal to the byte-level BPE of Hugging
// Face's tokenizers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <queue>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "byte_level.h"
#include "model_settings.h"
#include "unicode.h"

namespace text {

/// The byte-level BPE a tokenizer.json describes: merges of bytes, with
/// `ByteLevel` before it and behind it.
class Bpe {
 public:
  Bpe(BpeSettings settings, std::shared_ptr<const Vocabulary> vocabulary)
      : settings_(std::move(settings)), vocabulary_(std::move(vocabulary)) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      byte_ids_[byte] = vocabulary_->at(to_byte_alphabet(std::string(1, static_cast<char>(byte))));
    }
    for (std::size_t rank = 0; rank < settings_.merges.size(); ++rank) {
      const auto& [left, right] = settings_.merges[rank];
      // A pair that is listed twice has its last rank, as in the reference.
      merges_.insert_or_assign(key(vocabulary_->at(left), vocabulary_->at(right)),
                               Merge{rank, vocabulary_->at(left + right)});
    }
    settings_.merges.clear();
  }

  /// Appends the ids of a word: merges the pair of the lowest rank, of several
  /// the leftmost, until no two neighbours are a pair.
  void append(std::vector<std::int64_t>& ids, std::u32string_view word) const {
    const std::string bytes = encode_utf8(word);
    if (settings_.ignore_merges) {
      if (const auto whole = vocabulary_->find(to_byte_alphabet(bytes)); whole != vocabulary_->end()) {
        ids.push_back(whole->second);
        return;
      }
    }
    std::vector<Symbol> symbols(bytes.size());
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    const auto merge_at = [&](std::size_t place) -> const Merge* {
      const Symbol& left = symbols[place];
      if (left.next == Symbol::none) return nullptr;
      const auto found = merges_.find(key(left.id, symbols[left.next].id));
      return found == merges_.end() ? nullptr : &found->second;
    };
    const auto enqueue = [&](std::size_t place) {
      if (place == Symbol::none) return;
      if (const Merge* merge = merge_at(place)) queue.emplace(merge->rank, place, merge->id);
    };
    for (std::size_t i = 0; i < symbols.size(); ++i) {
      symbols[i] = {byte_ids_[static_cast<unsigned char>(bytes[i])], i == 0 ? Symbol::none : i - 1,
                    i + 1 == symbols.size() ? Symbol::none : i + 1};
    }
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) enqueue(i);
    while (!queue.empty()) {
      const auto [rank, place, id] = queue.top();
      queue.pop();
      Symbol& left = symbols[place];
      if (left.merged_away) continue;
      // An entry whose pair has gone counts where the present pair gives the
      // same token, as in the reference.
      if (const Merge* merge = merge_at(place); merge == nullptr || merge->id != id) continue;
      Symbol& right = symbols[left.next];
      left.id = id;
      left.next = right.next;
      right.merged_away = true;
      if (left.next != Symbol::none) symbols[left.next].previous = place;
      enqueue(left.previous);
      enqueue(place);
    }
    for (const Symbol& symbol : symbols) {
      if (!symbol.merged_away) ids.push_back(symbol.id);
    }
  }

 private:
  struct Merge {
    std::size_t rank = 0;
    std::int64_t id = 0;
  };
  /// A token of a word, and its neighbours' places.
  struct Symbol {
    static constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
    std::int64_t id = 0;
    std::size_t previous = none, next = none;
    bool merged_away = false;
  };
  /// (rank, place of the left token, id of the joined token)
  using Candidate = std::tuple<std::size_t, std::size_t, std::int64_t>;

  static std::uint64_t key(std::int64_t left, std::int64_t right) {
    return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
  }

  BpeSettings settings_;
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::array<std::int64_t, 256> byte_ids_{};
  std::unordered_map<std::uint64_t, Merge> merges_;
};

}  // namespace text
