// Learning curves: training loss and test accuracy over the steps, as an SVG picture.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "finetune/result_row.h"
#include "text/unicode.h"

namespace finetune {

namespace internal {

/// Text for the inside of an XML element or attribute; what XML 1.0 cannot hold becomes U+FFFD.
inline std::string xml_text(std::string_view text) {
  std::string result;
  for (const char32_t c : text::decode_utf8(text::replace_invalid_utf8(text))) {
    if (c == U'&') {
      result += "&amp;";
    } else if (c == U'<') {
      result += "&lt;";
    } else if (c == U'>') {
      result += "&gt;";
    } else if (c == U'"') {
      result += "&quot;";
    } else {
      const bool allowed =
          (c >= 0x20 || c == U'\t' || c == U'\n' || c == U'\r') && c != 0xFFFE && c != 0xFFFF;
      text::append_utf8(result, allowed ? c : U'\uFFFD');
    }
  }
  return result;
}

/// An axis from `low` to `high` with a tick every `step`, a round number.
struct Axis {
  double low = 0;
  double high = 1;
  double step = 0.2;
};

/// The axis for values between `low` and `high`, with at most about `ticks` ticks; whole: none between
/// integers.
inline Axis round_axis(double low, double high, int ticks, bool whole) {
  if (!(high > low)) {
    const double margin = whole ? 1 : std::max(std::abs(low) * 0.1, 1e-3);
    low -= whole ? 0 : margin;
    high = low + (whole ? 1 : 2) * margin;
  }
  const double raw = (high - low) / ticks;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw * (1 - 1e-9)) {
      step = factor * power;
      break;
    }
  }
  if (whole) step = std::max(step, 1.0);
  return {std::floor(low / step + 1e-9) * step, std::ceil(high / step - 1e-9) * step, step};
}

/// The finite points; with `smooth` as a moving average (exponential, unbiased) over about a thirtieth of
/// them.
inline std::vector<ResultRow::Point> curve_points(const std::vector<ResultRow::Point>& points, bool smooth) {
  const double keep = smooth ? 1 - 1 / std::max(1.0, static_cast<double>(points.size()) / 30) : 0;
  std::vector<ResultRow::Point> curve;
  double sum = 0;
  double weight = 0;
  for (const auto& point : points) {
    if (!std::isfinite(point.value)) continue;
    sum = keep * sum + point.value;
    weight = keep * weight + 1;
    curve.push_back({point.step, sum / weight});
  }
  return curve;
}

/// A line that people with any colour vision can tell from the others: a colour of Okabe and Ito, then a
/// dash.
struct LineStyle {
  std::string_view color;
  std::string_view dash;
};

inline LineStyle line_style(std::size_t index) {
  constexpr std::string_view colors[] = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                         "#000000", "#E69F00", "#56B4E9"};
  constexpr std::string_view dashes[] = {"none", "7 3", "2 3", "9 3 2 3"};
  // Seven and four have no common divisor: 28 lines before a pair returns.
  return {colors[index % std::size(colors)], dashes[index % std::size(dashes)]};
}

/// One panel of the picture: its place, and the curves in it.
struct Panel {
  double left;
  std::string title;
  double scale;        ///< Values are shown times this,
  std::string suffix;  ///< and behind the figure this.
  std::vector<std::vector<ResultRow::Point>> curves;
  bool markers;
};

constexpr double panel_width = 430;
constexpr double panel_height = 280;
constexpr double panel_top = 48;

/// The panel's frame, ticks, title and lines.
inline std::string panel_svg(const Panel& panel) {
  double low = 0, high = 0, last = 0;
  bool any = false;
  for (const auto& curve : panel.curves) {
    for (const auto& point : curve) {
      const double value = point.value * panel.scale;
      low = any ? std::min(low, value) : value;
      high = any ? std::max(high, value) : value;
      last = std::max(last, static_cast<double>(point.step));
      any = true;
    }
  }
  const double bottom = panel_top + panel_height;
  std::string svg = fmt::format(
      "<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"15\" font-weight=\"bold\" "
      "text-anchor=\"middle\">{}</text>\n",
      panel.left + panel_width / 2, panel_top - 16, xml_text(panel.title));
  if (!any) {
    return svg + fmt::format(
                     "<text x=\"{:.1f}\" y=\"{:.1f}\" fill=\"#555555\" text-anchor=\"middle\">nothing "
                     "was measured</text>\n",
                     panel.left + panel_width / 2, panel_top + panel_height / 2);
  }
  const Axis x = round_axis(0, last, 6, true);
  const Axis y = round_axis(low, high, 6, false);
  // The steps end where the curves do, the values at a tick.
  const double x_high = std::max(last, 1.0);
  const auto x_at = [&](double step) { return panel.left + panel_width * step / x_high; };
  const auto y_at = [&](double value) { return bottom - panel_height * (value - y.low) / (y.high - y.low); };
  // Ticks are counted, so that an error of rounding never adds or drops one.
  const auto y_ticks = std::llround((y.high - y.low) / y.step);
  const int decimals = std::clamp(-static_cast<int>(std::floor(std::log10(y.step) + 1e-9)), 0, 12);
  for (std::int64_t i = 0; i <= y_ticks; ++i) {
    const double value = y.low + static_cast<double>(i) * y.step;
    svg += fmt::format(
        "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#DDDDDD\"/>\n"
        "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}{}</text>\n",
        panel.left, y_at(value), panel.left + panel_width, y_at(value), panel.left - 8, y_at(value) + 4,
        // Adding zero makes -0 a 0.
        fmt::format("{:.{}f}", std::abs(value) < y.step / 2 ? 0.0 : value, decimals), xml_text(panel.suffix));
  }
  for (double step = 0; step <= x_high * (1 + 1e-9); step += x.step) {
    svg += fmt::format(
        "<line x1=\"{0:.1f}\" y1=\"{1:.1f}\" x2=\"{0:.1f}\" y2=\"{2:.1f}\" stroke=\"#333333\"/>\n"
        "<text x=\"{0:.1f}\" y=\"{3:.1f}\" text-anchor=\"middle\">{4:.0f}</text>\n",
        x_at(step), bottom, bottom + 5, bottom + 19, step);
  }
  svg += fmt::format(
      "<path d=\"M{0:.1f} {1:.1f}V{2:.1f}H{3:.1f}\" fill=\"none\" stroke=\"#333333\"/>\n"
      "<text x=\"{4:.1f}\" y=\"{5:.1f}\" text-anchor=\"middle\">step</text>\n",
      panel.left, panel_top, bottom, panel.left + panel_width, panel.left + panel_width / 2, bottom + 38);
  for (std::size_t index = 0; index < panel.curves.size(); ++index) {
    const auto& curve = panel.curves[index];
    if (curve.empty()) continue;
    const LineStyle style = line_style(index);
    // More points than columns would only make the file long.
    const std::size_t stride = std::max<std::size_t>(1, curve.size() / 1000);
    std::string points;
    std::string marks;
    for (std::size_t i = 0; i < curve.size(); ++i) {
      if (i % stride != 0 && i + 1 != curve.size()) continue;
      const double px = x_at(static_cast<double>(curve[i].step));
      const double py = y_at(curve[i].value * panel.scale);
      points += fmt::format("{}{:.1f},{:.1f}", points.empty() ? "" : " ", px, py);
      if (panel.markers || curve.size() == 1) {
        marks +=
            fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.5\" fill=\"{}\"/>\n", px, py, style.color);
      }
    }
    svg += fmt::format(
               "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\" "
               "stroke-linejoin=\"round\" "
               "stroke-dasharray=\"{}\"/>\n",
               points, style.color, style.dash) +
           marks;
  }
  return svg;
}

}  // namespace internal

/// The learning curves of the rows as an SVG picture: smoothed training loss to the left, accuracy to the
/// right, below them which line is which.
inline std::string svg(const std::vector<ResultRow>& rows) {
  internal::Panel loss{70, "Training loss (smoothed)", 1, "", {}, false};
  internal::Panel accuracy{590, "Test accuracy", 100, " %", {}, true};
  for (const ResultRow& row : rows) {
    loss.curves.push_back(internal::curve_points(row.loss, true));
    accuracy.curves.push_back(internal::curve_points(row.accuracy_curve, false));
  }
  constexpr double width = 1050;
  constexpr double legend_top = internal::panel_top + internal::panel_height + 68;
  const double height = legend_top + 22 * static_cast<double>(rows.size()) + 4;
  std::string picture = fmt::format(
      "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" viewBox=\"0 0 {0:.0f} "
      "{1:.0f}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222222\">\n"
      "<title>Learning curves</title>\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#FFFFFF\"/>\n",
      width, height);
  picture += internal::panel_svg(loss) + internal::panel_svg(accuracy);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const double y = legend_top + 22 * static_cast<double>(i);
    const internal::LineStyle style = internal::line_style(i);
    // One method a line, cut before it leaves the picture; the whole name is its tooltip.
    std::u32string name = text::decode_utf8(text::replace_invalid_utf8(rows[i].method));
    if (name.size() > 120) name = name.substr(0, 119) + U"\u2026";
    picture += fmt::format(
        "<g><title>{}</title><line x1=\"70\" y1=\"{:.1f}\" x2=\"112\" y2=\"{:.1f}\" stroke=\"{}\" "
        "stroke-width=\"2\" stroke-dasharray=\"{}\"/>\n<text x=\"122\" y=\"{:.1f}\">{}{}</text></g>\n",
        internal::xml_text(rows[i].method), y, y, style.color, style.dash, y + 4,
        internal::xml_text(text::encode_utf8(name)),
        rows[i].accuracy_curve.empty() ? "" : fmt::format(" (best {:.2f} %)", 100 * rows[i].accuracy));
  }
  return picture + "</svg>\n";
}

}  // namespace finetune
