// DebianPackages: labelled texts from the package index every Debian or Ubuntu machine has.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unicode/locid.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "dataset.h"
#include "unicode.h"

namespace text {

/// What a data set needs of one record of the package index.
struct Package {
  std::string name;
  /// The part of the archive, without its component: "games" for "contrib/games".
  std::string section;
  /// The one-line description.
  std::string description;
  /// The source package it is built from.
  std::string source;
};

/// A labelled text; what comes from one source package is all in training or all in test data.
struct PackageRow {
  std::string label;
  std::string text;
  std::string source;
};

/// Whether a source package's rows are test data: one in five is.
inline bool in_test(std::string_view source) { return h64(source) % 5 == 0; }

namespace internal {

/// White space as Python's `str.strip` takes it: no joiner is, but the separators of the control codes are.
inline bool is_strippable(char32_t code_point) {
  const auto c = static_cast<UChar32>(code_point);
  if (u_charType(c) == U_SPACE_SEPARATOR) return true;
  const UCharDirection direction = u_charDirection(c);
  return direction == U_WHITE_SPACE_NEUTRAL || direction == U_BLOCK_SEPARATOR ||
         direction == U_SEGMENT_SEPARATOR;
}

inline std::string strip(std::string_view utf8) {
  const std::u32string text = decode_utf8(utf8);
  const auto first = std::find_if_not(text.begin(), text.end(), is_strippable);
  const auto last = std::find_if_not(text.rbegin(), std::make_reverse_iterator(first), is_strippable).base();
  return encode_utf8({text.data() + (first - text.begin()), static_cast<std::size_t>(last - first)});
}

inline icu::UnicodeString lowercase(std::string_view utf8) {
  return icu::UnicodeString::fromUTF8({utf8.data(), static_cast<std::int32_t>(utf8.size())})
      .toLower(icu::Locale::getRoot());
}

/// The fields of one record that count; the first of several with one name does.
struct PackageRecord {
  std::optional<std::string> package, section, description, source;

  void add(const std::string& line) {
    const std::size_t colon = std::min(line.find(':'), line.size());
    const std::string_view key = std::string_view(line).substr(0, colon);
    std::optional<std::string>* field = key == "Package"       ? &package
                                        : key == "Section"     ? &section
                                        : key == "Description" ? &description
                                        : key == "Source"      ? &source
                                                               : nullptr;
    if (field == nullptr || field->has_value()) return;
    *field = strip(replace_invalid_utf8(std::string_view(line).substr(std::min(colon + 1, line.size()))));
  }

  std::optional<Package> finish() {
    if (!package) return std::nullopt;
    std::string text = description.value_or("");
    std::replace(text.begin(), text.end(), '\t', ' ');
    const std::string from = source.value_or(*package);
    const std::string where = section.value_or("");
    const std::size_t slash = where.rfind('/');
    return Package{*package, slash == std::string::npos ? where : where.substr(slash + 1), strip(text),
                   from.substr(0, from.find(' '))};
  }
};

}  // namespace internal

/// Reads what `apt-cache dumpavail` prints: records with a blank line behind each. Packages without a
/// description or section are left out; the others come in the order of their names.
inline std::vector<Package> read_packages(std::istream& in) {
  std::vector<Package> packages;
  internal::PackageRecord record;
  const auto close = [&] {
    auto package = std::exchange(record, {}).finish();
    if (package && !package->description.empty() && !package->section.empty()) packages.push_back(*package);
  };
  for (std::string block; std::getline(in, block);) {
    if (block.ends_with('\r')) block.pop_back();
    for (std::string_view line : internal::split(block, '\r')) {
      if (line.empty()) {
        close();
      } else if (line.front() != ' ' && line.front() != '\t') {
        record.add(std::string(line));
      }
    }
  }
  close();
  std::stable_sort(packages.begin(), packages.end(),
                   [](const Package& a, const Package& b) { return a.name < b.name; });
  return packages;
}

namespace internal {

/// The first package of every description, sorted by the descriptions' hashes: the first N are a random
/// sample that is the same everywhere.
inline std::vector<Package> distinct_texts(const std::vector<Package>& packages) {
  std::vector<std::pair<std::uint64_t, Package>> hashed;
  std::unordered_set<std::string> seen;
  for (const Package& package : packages) {
    if (seen.insert(package.description).second) hashed.emplace_back(h64(package.description), package);
  }
  std::sort(hashed.begin(), hashed.end(), [](const auto& a, const auto& b) {
    return std::tie(a.first, a.second.description) < std::tie(b.first, b.second.description);
  });
  std::vector<Package> sorted;
  for (auto& entry : hashed) sorted.push_back(std::move(entry.second));
  return sorted;
}

}  // namespace internal

/// Which of ten sections a description is from.
inline std::vector<PackageRow> section_rows(const std::vector<Package>& packages) {
  constexpr std::array<std::string_view, 10> sections = {"admin", "database", "editors", "games", "graphics",
                                                         "mail",  "net",      "science", "sound", "web"};
  std::vector<Package> chosen;
  std::copy_if(packages.begin(), packages.end(), std::back_inserter(chosen), [&](const Package& package) {
    return std::find(sections.begin(), sections.end(), package.section) != sections.end();
  });
  std::vector<PackageRow> rows;
  for (const Package& package : internal::distinct_texts(chosen)) {
    rows.push_back({package.section, package.description, package.source});
  }
  return rows;
}

/// Whether two words of a description that stand side by side were swapped: "swapped" or "intact".
/// Descriptions of 4 to 20 words; which two is decided by a hash.
inline std::vector<PackageRow> order_rows(const std::vector<Package>& packages) {
  std::vector<PackageRow> rows;
  for (const Package& package : internal::distinct_texts(packages)) {
    std::vector<std::string_view> words = internal::split(package.description, ' ');
    if (words.size() < 4 || words.size() > 20) continue;
    const std::uint64_t h = h64("order" + package.description);
    const bool swapped = (h & 1) != 0;
    if (swapped) {
      std::vector<std::size_t> places;
      for (std::size_t i = 0; i + 1 < words.size(); ++i) {
        if (internal::lowercase(words[i]) != internal::lowercase(words[i + 1])) places.push_back(i);
      }
      if (places.empty()) continue;
      const std::size_t place = places[(h >> 8) % places.size()];
      std::swap(words[place], words[place + 1]);
    }
    rows.push_back(
        {swapped ? "swapped" : "intact", fmt::format("{}", fmt::join(words, " ")), package.source});
  }
  return rows;
}

/// Whether a name belongs to a description: "own" or "other", text `name [SEP] description`. Half the rows
/// have the name of the next package of the same section and split.
inline std::vector<PackageRow> pair_rows(const std::vector<Package>& packages) {
  std::map<std::pair<std::string, bool>, std::vector<Package>> groups;
  for (Package& package : internal::distinct_texts(packages)) {
    const bool test = in_test(package.source);
    groups[{package.section, test}].push_back(std::move(package));
  }
  std::vector<std::tuple<std::uint64_t, std::string, std::string, std::string>> hashed;
  for (const auto& [key, group] : groups) {
    for (std::size_t i = 0; i < group.size(); ++i) {
      const Package& package = group[i];
      const Package& next = group[(i + 1) % group.size()];
      const bool other = (h64("pair" + package.description) & 1) != 0;
      if (other && next.source == package.source) continue;
      hashed.emplace_back(h64(package.description), other ? "other" : "own",
                          (other ? next : package).name + " [SEP] " + package.description, package.source);
    }
  }
  std::sort(hashed.begin(), hashed.end());
  std::vector<PackageRow> rows;
  for (auto& [hash, label, text, source] : hashed) rows.push_back({label, text, source});
  return rows;
}

}  // namespace text
