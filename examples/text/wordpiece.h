// WordPiece: words to ids by their longest known parts, equal to Hugging Face's
// tokenizers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model_settings.h"
#include "unicode.h"

namespace text {

/// The WordPiece model a tokenizer.json describes.
class WordPiece {
 public:
  WordPiece(WordPieceSettings settings, std::shared_ptr<const Vocabulary> vocabulary)
      : settings_(std::move(settings)),
        vocabulary_(std::move(vocabulary)),
        unk_id_(vocabulary_->at(settings_.unk_token)) {
    for (const auto& [token, id] : *vocabulary_) longest_token_ = std::max(longest_token_, token.size());
  }

  /// Appends the ids of a word, its longest tokens from the left; if one part
  /// is unknown, the whole word is.
  void append(std::vector<std::int64_t>& ids, std::u32string_view word) const {
    if (static_cast<std::int64_t>(word.size()) > settings_.max_input_chars_per_word) {
      ids.push_back(unk_id_);
      return;
    }
    const std::string& prefix = settings_.continuing_subword_prefix;
    const std::size_t before = ids.size();
    std::string candidate;
    std::vector<std::size_t> ends;  // bytes of `candidate` up to each of its characters
    for (std::size_t start = 0; start < word.size();) {
      candidate = start > 0 ? prefix : "";
      ends.clear();
      for (std::size_t i = start; i < word.size() && candidate.size() < longest_token_; ++i) {
        append_utf8(candidate, word[i]);
        ends.push_back(candidate.size());
      }
      while (!ends.empty()) {
        candidate.resize(ends.back());
        if (const auto found = vocabulary_->find(candidate); found != vocabulary_->end()) {
          ids.push_back(found->second);
          break;
        }
        ends.pop_back();
      }
      if (ends.empty()) {
        ids.resize(before);
        ids.push_back(unk_id_);
        return;
      }
      start += ends.size();
    }
  }

 private:
  WordPieceSettings settings_;
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::int64_t unk_id_ = 0;
  std::size_t longest_token_ = 0;
};

}  // namespace text
