// Rank picture: the ranks of an adapter's matrices over the steps, as an SVG heat map.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "finetune/learning_curves.h"
#include "finetune/rank_history.h"
#include "finetune/terminal_table.h"

namespace finetune {

namespace internal {

/// The colour of a part of the way from nothing (near white) to the largest rank (dark blue), between those
/// of ColorBrewer's Blues; lightness alone tells them apart.
inline std::string heat_color(double part) {
  constexpr std::array<std::array<double, 3>, 6> stops{
      {{247, 251, 255}, {208, 225, 242}, {148, 196, 223}, {74, 152, 201}, {23, 100, 171}, {8, 48, 107}}};
  const double at = std::clamp(part, 0.0, 1.0) * (stops.size() - 1);
  const auto low = std::min(static_cast<std::size_t>(at), stops.size() - 2);
  const double share = at - static_cast<double>(low);
  const auto mix = [&](std::size_t channel) {
    return std::lround((1 - share) * stops[low][channel] + share * stops[low + 1][channel]);
  };
  return fmt::format("#{:02X}{:02X}{:02X}", mix(0), mix(1), mix(2));
}

}  // namespace internal

/// The heat map: a row a matrix with its rank at the end behind it, the steps to the right, below them the
/// scale.
inline std::string rank_svg(const RankHistory& ranks) {
  constexpr double top = 64, plot_width = 640, letter = 6.8;
  const auto count = ranks.matrices().size();
  const double row = count <= 60 ? 16 : 12;
  const double font = count <= 60 ? 12 : 10;
  const auto steps = std::max<std::int64_t>(1, ranks.steps());
  const auto largest = std::max<std::int64_t>(1, ranks.largest());
  std::size_t longest = 0;
  for (std::size_t i = 0; i < count; ++i)
    longest = std::max(longest, internal::display_width(ranks.short_name(i)));
  const double left = 28 + letter * static_cast<double>(longest);
  const double bottom = top + row * static_cast<double>(count);
  const double width = left + plot_width + 70, height = bottom + 112;
  const auto x_at = [&](std::int64_t step) {
    return left + plot_width * static_cast<double>(step) / static_cast<double>(steps);
  };
  const auto color = [&](std::int64_t rank) {
    return internal::heat_color(static_cast<double>(rank) / static_cast<double>(largest));
  };

  const auto prefix = internal::xml_text(ranks.common_prefix());
  std::string picture = fmt::format(
      "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" viewBox=\"0 0 {0:.0f} "
      "{1:.0f}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222222\">\n"
      "<title>Ranks over training</title>\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#FFFFFF\"/>\n"
      "<text x=\"{2:.1f}\" y=\"26\" font-size=\"15\" font-weight=\"bold\" text-anchor=\"middle\">Rank of "
      "each "
      "matrix over training (in all {3} to {4})</text>\n"
      "<text x=\"{5:.1f}\" y=\"{6:.1f}\" text-anchor=\"end\" fill=\"#555555\">{7}</text>\n"
      "<text x=\"{8:.1f}\" y=\"{6:.1f}\" fill=\"#555555\">end</text>\n",
      width, height, left + plot_width / 2, ranks.total(0), ranks.total(ranks.steps()), left - 8, top - 8,
      prefix.empty() ? "" : prefix + "…", left + plot_width + 10);
  for (std::size_t i = 0; i < count; ++i) {
    const double y = top + row * static_cast<double>(i);
    const double baseline = y + row / 2 + font / 3;
    const auto name = internal::xml_text(ranks.short_name(i));
    picture += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\" text-anchor=\"end\">{}</text>\n",
                           left - 8, baseline, font, name);
    const auto& changes = ranks.changes(i);
    for (std::size_t n = 0; n < changes.size(); ++n) {
      const auto from = changes[n].step, to = n + 1 < changes.size() ? changes[n + 1].step : steps;
      if (to <= from) continue;
      picture += fmt::format(
          "<rect x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{:.1f}\" fill=\"{}\" "
          "shape-rendering=\"crispEdges\"><title>{}: rank {} from step {} to {}</title></rect>\n",
          x_at(from), y, x_at(to) - x_at(from), row - 1, color(changes[n].rank), name, changes[n].rank, from,
          to);
    }
    picture += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\">{}</text>\n",
                           left + plot_width + 10, baseline, font, ranks.rank(i, ranks.steps()));
  }

  const auto x = internal::round_axis(0, static_cast<double>(steps), 8, true);
  for (double step = 0; step <= static_cast<double>(steps); step += x.step) {
    const double at = x_at(std::llround(step));
    picture += fmt::format(
        "<line x1=\"{0:.1f}\" y1=\"{1:.1f}\" x2=\"{0:.1f}\" y2=\"{2:.1f}\" stroke=\"#333333\"/>\n"
        "<text x=\"{0:.1f}\" y=\"{3:.1f}\" text-anchor=\"middle\">{4:.0f}</text>\n",
        at, bottom, bottom + 5, bottom + 19, step);
  }
  picture += fmt::format(
      "<path d=\"M{0:.1f} {1:.1f}V{2:.1f}H{3:.1f}\" fill=\"none\" stroke=\"#333333\"/>\n"
      "<text x=\"{4:.1f}\" y=\"{5:.1f}\" text-anchor=\"middle\">step</text>\n",
      left, top, bottom, left + plot_width, left + plot_width / 2, bottom + 38);

  // The scale: a field a rank where they fit, else ranks evenly apart up to the largest.
  constexpr double field = 30;
  const auto fields = std::min<std::int64_t>(largest, 16);
  picture +=
      fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">rank</text>\n", left - 8, bottom + 70);
  for (std::int64_t i = 0; i <= fields; ++i) {
    const auto rank = (i * largest + fields / 2) / fields;
    const double at = left + field * static_cast<double>(i);
    picture += fmt::format(
        "<rect x=\"{0:.1f}\" y=\"{1:.1f}\" width=\"{2:.1f}\" height=\"16\" fill=\"{3}\" "
        "stroke=\"#BBBBBB\"/>\n"
        "<text x=\"{4:.1f}\" y=\"{5:.1f}\" text-anchor=\"middle\">{6}</text>\n",
        at, bottom + 58, field, color(rank), at + field / 2, bottom + 90, rank);
  }
  return picture + "</svg>\n";
}

}  // namespace finetune
