// What the programs' options take: whole numbers, numbers in a range, one value each time.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace finetune {

/// A whole number, if the text is one and nothing else.
inline std::optional<int64_t> read_whole(std::string_view text) {
  int64_t value = 0;
  const auto* end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stopped != end) return std::nullopt;
  return value;
}

/// For `transform`: a whole number as one writes it, so that 010 is ten. CLI11 reads it as C does, as eight,
/// and cuts off what is too large.
inline CLI::Validator whole_number(int64_t low, int64_t high = std::numeric_limits<int64_t>::max()) {
  return CLI::Validator(
      [low, high](std::string& text) {
        const auto value = read_whole(text);
        if (value && *value >= low && *value <= high) {
          text = std::to_string(*value);
          return std::string();
        }
        return fmt::format("'{}' is no whole number from {} to {}", text, low, high);
      },
      high > int64_t{1} << 31 ? fmt::format("at least {}", low) : fmt::format("from {} to {}", low, high));
}

/// A check of an option's number. CLI::Range takes NaN.
inline CLI::Validator number_from(double low, double high) {
  return CLI::Validator(
      [low, high](std::string& text) {
        double value = 0;
        if (CLI::detail::lexical_cast(text, value) && value >= low && value <= high) return std::string();
        return fmt::format("'{}' is no number from {} to {}", text, low, high);
      },
      fmt::format("FLOAT in [{} - {}]", low, high));
}

/// An option that may be repeated, with one value each time, which is taken as it is. CLI11 parts what it
/// reads into a vector at the commas of "[a,b]".
template <class Value>
CLI::Option* add_repeated(CLI::App& app, const std::string& name, std::vector<Value>& values,
                          const std::string& what) {
  const auto take = [&values](const CLI::results_t& given) {
    values.assign(given.begin(), given.end());
    return true;
  };
  return app.add_option(name, CLI::callback_t(take), what)
      ->type_name("TEXT")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

}  // namespace finetune
