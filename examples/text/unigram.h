// Unigram: words to ids by their likeliest cut, equal to the Unigram model of
// Hugging Face's tokenizers.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model_settings.h"
#include "unicode.h"

namespace text {

/// The Unigram model a tokenizer.json describes: a word is cut where the sum of
/// its tokens' scores, which are logarithms of probabilities, is largest (Kudo,
/// "Subword Regularization", arXiv 1804.10959, section 3.2).
///
/// SentencePiece's library does the same in floats, with other scores for
/// user-defined pieces, and cannot match control pieces; where two cuts are
/// about as likely, as in a row of one letter, it takes another one. The
/// reference sums doubles, in the order of this class.
class Unigram {
 public:
  Unigram(UnigramSettings settings, std::shared_ptr<const Vocabulary> vocabulary)
      : unk_id_(settings.unk_id.value_or(none)),
        byte_fallback_(settings.byte_fallback),
        vocabulary_(std::move(vocabulary)) {
    double lowest = std::numeric_limits<double>::infinity();
    for (const auto& [piece, score] : settings.pieces) lowest = std::min(lowest, score);
    unk_score_ = lowest - 10;
    for (const auto& [piece, id] : *vocabulary_) {
      tokens_.push_back({piece, id, settings.pieces[static_cast<std::size_t>(id)].second});
    }
    std::sort(tokens_.begin(), tokens_.end(), [](const Token& a, const Token& b) { return a.text < b.text; });
  }

  /// Appends the ids of a word. Throws: std::runtime_error for a character the
  /// vocabulary lacks where the file names no unknown token.
  void append(std::vector<std::int64_t>& ids, std::u32string_view word) const {
    const std::string bytes = encode_utf8(word);
    const std::vector<Step> best = best_steps(bytes);
    std::vector<std::string_view> pieces;
    bool unknown = false;  // whether the last piece is; unknown neighbours are one piece
    for (std::size_t end = bytes.size(); end > 0; end = best[end].start) {
      std::size_t size = end - best[end].start;
      if (std::exchange(unknown, best[end].id == unk_id_) && unknown) {
        size += pieces.back().size();
        pieces.pop_back();
      }
      pieces.push_back(std::string_view(bytes).substr(best[end].start, size));
    }
    for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) append_piece(ids, *piece);
  }

 private:
  static constexpr std::int64_t none = -1;
  struct Token {
    std::string_view text;  // of the vocabulary
    std::int64_t id = 0;
    double score = 0;
  };
  /// The last token of the best cut up to a byte: where it starts, and the
  /// score of all.
  struct Step {
    static constexpr std::size_t nowhere = std::numeric_limits<std::size_t>::max();
    std::int64_t id = 0;
    double score = 0;
    std::size_t start = nowhere;

    /// Takes a token if it is better, of equals the one found first.
    void offer(std::int64_t new_id, double new_score, std::size_t new_start) {
      if (start == nowhere || new_score > score) *this = {new_id, new_score, new_start};
    }
  };

  std::vector<Step> best_steps(std::string_view bytes) const {
    std::vector<Step> best(bytes.size() + 1);
    for (std::size_t start = 0; start < bytes.size();) {
      std::size_t next = start;
      internal::next_code_point(bytes, next);
      bool whole_character = false;
      for_each_prefix(bytes.substr(start), [&](const Token& token) {
        const std::size_t end = start + token.text.size();
        best[end].offer(token.id, token.score + best[start].score, start);
        whole_character = whole_character || end == next;
      });
      if (!whole_character) {
        if (unk_id_ == none) {
          throw std::runtime_error(
              fmt::format("text has '{}', which is no token, and the tokenizer names no "
                          "unknown token (model.unk_id is null)",
                          bytes.substr(start, next - start)));
        }
        best[next].offer(unk_id_, unk_score_ + best[start].score, start);
      }
      start = next;
    }
    return best;
  }

  /// Calls `visit` with each token that the bytes begin with, the shortest
  /// first: among the sorted tokens those that begin with the bytes read so far
  /// stand together, the one that is equal to them in front.
  template <typename Visit>
  void for_each_prefix(std::string_view bytes, const Visit& visit) const {
    auto first = tokens_.begin(), last = tokens_.end();
    for (std::size_t i = 0; i < bytes.size() && first != last; ++i) {
      const auto byte = [&](const Token& token) {  // -1 behind a token's end
        return i < token.text.size() ? static_cast<unsigned char>(token.text[i]) : -1;
      };
      const int wanted = static_cast<unsigned char>(bytes[i]);
      first = std::partition_point(first, last, [&](const Token& token) { return byte(token) < wanted; });
      last = std::partition_point(first, last, [&](const Token& token) { return byte(token) == wanted; });
      if (first != last && first->text.size() == i + 1) visit(*first);
    }
  }

  void append_piece(std::vector<std::int64_t>& ids, std::string_view piece) const {
    if (const auto found = vocabulary_->find(std::string(piece)); found != vocabulary_->end()) {
      ids.push_back(found->second);
      return;
    }
    const std::size_t before = ids.size();
    for (const char byte : piece) {
      const auto found = !byte_fallback_
                             ? vocabulary_->end()
                             : vocabulary_->find(fmt::format("<0x{:02X}>", static_cast<unsigned char>(byte)));
      if (found == vocabulary_->end()) {
        ids.resize(before);
        ids.push_back(unk_id_);
        return;
      }
      ids.push_back(found->second);
    }
  }

  std::int64_t unk_id_;
  bool byte_fallback_;
  double unk_score_ = 0;
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::vector<Token> tokens_;  // sorted
};

}  // namespace text
