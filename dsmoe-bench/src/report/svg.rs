//! Charts as SVG, for a page or as files of their own.

use std::fmt::Write as _;

use super::scatter::scatter_svg;
use super::{Figure, Look, Plot, Series};

/// The style of charts, which takes its colours from the page.
pub(super) const STYLE: &str = include_str!("chart.css");
/// Colours of a chart that stands without a page, on a background of any colour.
const ALONE: &str = include_str!("chart-alone.css");
/// Number of colours in the palette (Okabe and Ito's, distinguishable by most colour-blind readers). A series has the
/// colour of its place in the chart.
pub(super) const COLOURS: usize = 7;
/// Size of a chart in units of its view box.
pub(super) const WIDTH: f64 = 720.0;
pub(super) const HEIGHT: f64 = 380.0;
/// Margins, which hold the labels of the axes.
pub(super) const LEFT: f64 = 64.0;
pub(super) const RIGHT: f64 = 16.0;
pub(super) const TOP: f64 = 14.0;
pub(super) const BOTTOM: f64 = 48.0;
/// A y axis is logarithmic when the largest value is more than this many times the smallest.
const MANY_SIZES: f64 = 30.0;

/// Replaces the special characters of XML.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // XML cannot represent control characters.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Returns the CSS class of a dashed line.
pub(super) fn dash(series: &Series) -> &'static str {
    if matches!(series.look, Look::Dashed | Look::Guide) { " dash" } else { "" }
}

/// Writes the chart as an SVG element without a style.
pub(super) fn chart(figure: &Figure) -> String {
    match &figure.plot {
        Plot::Axes { series, least } => axes_svg(figure, series, *least),
        Plot::Scatter { marks } => scatter_svg(figure, marks, WIDTH),
        Plot::Heat { rows, columns, values } => heat_svg(figure, rows, columns, values),
    }
}

/// Writes the chart as a file of its own with its style.
pub(crate) fn svg(figure: &Figure) -> String {
    let inner = chart(figure);
    let style = format!("<style>{STYLE}{ALONE}</style>");
    let at = inner.find('>').map_or(0, |at| at + 1);
    format!("{}{style}{}\n", &inner[..at], &inner[at..])
}

/// Chooses about `count` ticks from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.
pub(super) fn ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let span = high - low;
    if !(span > 0.0 && span.is_finite()) {
        return vec![low];
    }
    let rough = span / count;
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|m| m * power);
    let step = steps.into_iter().find(|step| *step >= rough).unwrap_or(10.0 * power);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).take(50).map(|i| i as f64 * step).collect()
}

/// Returns the largest over the smallest value, or 0 if not all are positive.
fn spread(values: impl Iterator<Item = f64>) -> f64 {
    let (low, high) = limits(values);
    if low > 0.0 && low <= high { high / low } else { 0.0 }
}

/// Returns the smallest and the largest value; infinities in the wrong order without values.
pub(super) fn limits(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|v| v.is_finite());
    finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}

/// Chooses ticks between two logarithms: powers of ten, and twice and five times them if they are few.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let powers = (low.floor() as i32..=high.ceil() as i32).take(40);
    let steps: &[f64] = if high - low > 4.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    all.filter(|y| (low..=high).contains(&y.log10())).collect()
}

/// Formats a number for an axis.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    let with = |value: f64, unit: &str| {
        let text = format!("{value:.2}");
        format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
    };
    match size {
        _ if size >= 1e12 => with(value / 1e12, "T"),
        _ if size >= 1e9 => with(value / 1e9, "G"),
        _ if size >= 1e6 => with(value / 1e6, "M"),
        _ if size >= 1e4 => with(value / 1e3, "k"),
        _ if size >= 0.01 || size == 0.0 => with(value, ""),
        _ => format!("{value:e}"),
    }
}

/// Returns a range slightly wider than the values and at least `least` wide, or 0 to 1 without values.
fn range(values: impl Iterator<Item = f64>, least: f64) -> (f64, f64) {
    let (low, high) = limits(values);
    if low > high {
        return (0.0, 1.0);
    }
    let margin = if high > low { 0.05 * (high - low) } else { (0.1 * high.abs()).max(0.5) };
    let margin = margin.max((least - (high - low)) / 2.0);
    (low - margin, high + margin)
}

pub(super) fn open(figure: &Figure, width: f64, height: f64) -> String {
    format!(
        "<svg class=\"chart\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(&figure.title)
    )
}

pub(super) fn label(out: &mut String, class: &str, [x, y]: [f64; 2], anchor: &str, text: &str) {
    let _ = write!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}

fn axes_svg(figure: &Figure, series: &[Series], least: f64) -> String {
    let points = || series.iter().flat_map(|one| one.points.iter());
    let (x0, x1) = range(points().map(|p| p.x), 0.0);
    let log = spread(points().map(|p| p.y)) > MANY_SIZES;
    let up = |y: f64| if log { y.log10() } else { y };
    let heights = points().flat_map(|p| p.range.into_iter().flatten().chain([p.y]));
    let (y0, y1) = range(heights.map(up), if log { 0.0 } else { least });
    let px = |x: f64| LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    let py = |y: f64| HEIGHT - BOTTOM - (up(y) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let mut out = open(figure, WIDTH, HEIGHT);
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for y in if log { log_ticks(y0, y1) } else { ticks(y0, y1, 6.0) } {
        let at = py(y);
        out +=
            &format!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
        label(&mut out, "tick", [LEFT - 8.0, at + 4.0], "end", &short(y));
    }
    for x in ticks(x0, x1, 7.0) {
        label(&mut out, "tick", [px(x), bottom + 18.0], "middle", &short(x));
    }
    out += &format!(
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right:.1}\" y1=\"{bottom:.1}\" y2=\"{bottom:.1}\"/>"
    );
    label(&mut out, "name", [(LEFT + right) / 2.0, HEIGHT - 10.0], "middle", &escape(&figure.x));
    out += &format!(
        "<text class=\"name\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}{}</text>",
        (TOP + bottom) / 2.0,
        escape(&figure.y),
        if log { ", logarithmic" } else { "" }
    );
    // Places of names: left, right and height.
    let mut names: Vec<(f64, f64, f64)> = Vec::new();
    let mut layers: Vec<_> = series.iter().enumerate().collect();
    // A guide is drawn under the marks that it passes.
    layers.sort_by_key(|(_, one)| one.look != Look::Guide);
    for (i, one) in layers {
        let class = i % COLOURS;
        let shown: Vec<_> = one.points.iter().filter(|p| p.x.is_finite() && p.y.is_finite()).collect();
        if one.look != Look::Cloud && shown.len() > 1 {
            let path: Vec<String> = shown.iter().map(|p| format!("{:.1},{:.1}", px(p.x), py(p.y))).collect();
            let _ =
                write!(out, "<polyline class=\"line s{class}{}\" points=\"{}\"/>", dash(one), path.join(" "));
        }
        let radius = match one.look {
            Look::Cloud => 5.5,
            Look::Line | Look::Dashed => 3.0,
            Look::Guide => continue,
        };
        for point in shown {
            let (x, y, tip) = (px(point.x), py(point.y), escape(&point.tip));
            if let Some([low, high]) = point.range {
                let _ = write!(
                    out,
                    "<line class=\"line s{class}\" opacity=\".5\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>",
                    py(low),
                    py(high)
                );
            }
            let _ = write!(
                out,
                "<circle class=\"mark m{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" data-tip=\"{tip}\" tabindex=\"0\"><title>{tip}</title></circle>"
            );
            if one.look != Look::Cloud {
                continue;
            }
            // There may be more clouds than colours: each shows its name if there is room, and in its tip otherwise.
            let width = 7.0 * one.name.chars().count() as f64;
            let free = |from: f64| {
                let apart = |&(left, right, y_of): &(f64, f64, f64)| {
                    from + width < left || right < from || (y_of - y).abs() > 12.0
                };
                from > LEFT && from + width < WIDTH && names.iter().all(apart)
            };
            if let Some(from) = [x + 9.0, x - 9.0 - width].into_iter().find(|&from| free(from)) {
                names.push((from, from + width, y));
                label(&mut out, "tick", [from, y + 4.0], "start", &escape(&one.name));
            }
        }
    }
    out + "</svg>"
}

fn heat_svg(figure: &Figure, rows: &[String], columns: &[String], values: &[Vec<f64>]) -> String {
    let left = 12.0
        + 7.0 * columns.iter().chain(rows).map(|name| name.chars().count()).max().unwrap_or(4).min(22) as f64;
    let (cell_w, cell_h) = (((WIDTH - left - RIGHT) / columns.len().max(1) as f64).min(110.0), 30.0);
    let height = TOP + rows.len() as f64 * cell_h + 40.0;
    let (low, high) = limits(values.iter().flatten().copied());
    // All cells have the same decimals if their values are of similar size.
    let show = |value: f64| if high < 100.0 && low > -100.0 { format!("{value:.2}") } else { short(value) };
    let mut out = open(figure, WIDTH, height);
    for (r, name) in rows.iter().enumerate() {
        let y = TOP + r as f64 * cell_h;
        label(&mut out, "tick", [left - 6.0, y + cell_h / 2.0 + 4.0], "end", &escape(name));
        for (c, column) in columns.iter().enumerate() {
            let value = values.get(r).and_then(|row| row.get(c)).copied().unwrap_or(f64::NAN);
            let share = if high > low { (value - low) / (high - low) } else { 0.5 };
            // Up to this opacity text in the ink of the page has contrast enough in both themes.
            let (text, opacity) = match value.is_finite() {
                true => (show(value), 0.06 + 0.6 * share),
                false => ("–".to_owned(), 0.0),
            };
            let tip = escape(&format!("{name}, {column}: {text}"));
            let x = left + c as f64 * cell_w;
            let _ = write!(
                out,
                "<g data-tip=\"{tip}\"><title>{tip}</title><rect class=\"cell\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" style=\"fill-opacity:{opacity:.3}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text></g>",
                x + 1.0,
                y + 1.0,
                cell_w - 2.0,
                cell_h - 2.0,
                x + cell_w / 2.0,
                y + cell_h / 2.0 + 4.0
            );
        }
    }
    for (c, name) in columns.iter().enumerate() {
        let at = [left + (c as f64 + 0.5) * cell_w, TOP + rows.len() as f64 * cell_h + 16.0];
        label(&mut out, "tick", at, "middle", &escape(name));
    }
    let at = [left + columns.len() as f64 * cell_w / 2.0, height - 6.0];
    label(&mut out, "name", at, "middle", &escape(&figure.x));
    out + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 5.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(17.0, 43.0, 5.0), [20.0, 30.0, 40.0]);
        assert_eq!(ticks(2.0, 2.0, 5.0), [2.0]);
        assert_eq!(log_ticks(0.2, 2.1), [2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(log_ticks(-0.5, 6.0).len(), 7);
        assert_eq!(spread([2.0, 80.0, f64::NAN].into_iter()), 40.0);
        assert_eq!(spread([0.0, 1.0].into_iter()), 0.0);
        assert_eq!([0.0, 1.5, 12_000.0, 3e6, 0.001].map(short), ["0", "1.5", "12k", "3M", "1e-3"]);
    }
}
