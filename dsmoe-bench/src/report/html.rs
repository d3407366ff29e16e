//! A report as one self-contained HTML page: charts are inline SVG, nothing is fetched.

use std::fmt::Write as _;

use super::{Block, Cell, Figure, Look, Plot, Report, Series, Tabular};

/// Colours that most eyes tell apart, of marks of the same place in every chart (Okabe and Ito's).
const COLOURS: usize = 7;
/// Size of a chart, in units of its own.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 380.0;
/// Room for the axes' words.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 48.0;
/// Largest over smallest value from which on an axis is logarithmic.
const MANY_SIZES: f64 = 30.0;

/// The report as HTML.
pub(crate) fn page(report: &Report) -> String {
    let mut out = String::new();
    let title = escape(&report.title);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{STYLE}{CHART_STYLE}</style>\n</head>\n\
         <body>\n<header>\n<button id=\"theme\" type=\"button\" aria-label=\"Light or dark\">◐</button>\n\
         <h1>{title}</h1>\n<p class=\"lead\">{}</p>\n<nav aria-label=\"Contents\">",
        prose(&report.subtitle)
    );
    for chapter in &report.chapters {
        let _ = write!(out, "<a href=\"#{}\">{}</a>", escape(&chapter.id), escape(&chapter.title));
    }
    out += "</nav>\n</header>\n<main>\n";
    for chapter in &report.chapters {
        let _ =
            writeln!(out, "<section id=\"{}\">\n<h2>{}</h2>", escape(&chapter.id), escape(&chapter.title));
        for block in &chapter.blocks {
            match block {
                Block::Text(text) => {
                    for paragraph in text.split("\n\n") {
                        let _ = writeln!(out, "<p>{}</p>", prose(paragraph));
                    }
                }
                Block::Table(table) => out += &table_html(table),
                Block::Figure(figure) => out += &figure_html(figure),
            }
        }
        out += "</section>\n";
    }
    let _ = write!(
        out,
        "</main>\n<div id=\"tip\" role=\"status\"></div>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
    );
    out
}

/// Text as HTML shows it.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // What XML has no form for.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// [`escape`] with `code` between backticks.
fn prose(text: &str) -> String {
    let parts: Vec<String> = escape(text).split('`').map(str::to_owned).collect();
    if parts.len().is_multiple_of(2) {
        return parts.join("`");
    }
    let code = |(i, part): (usize, String)| if i % 2 == 1 { format!("<code>{part}</code>") } else { part };
    parts.into_iter().enumerate().map(code).collect()
}

fn table_html(table: &Tabular) -> String {
    let mut out = format!(
        "<figure class=\"table\" id=\"{}\">\n<figcaption>{}</figcaption>\n<div class=\"scroll\"><table class=\"sortable\">\n<thead><tr>",
        escape(&table.id),
        prose(&table.title)
    );
    let numeric =
        |column: usize| table.rows.iter().any(|row| row.get(column).is_some_and(|c| c.value.is_some()));
    for (column, name) in table.header.iter().enumerate() {
        let class = if numeric(column) { " class=\"n\"" } else { "" };
        let _ = write!(out, "<th{class} scope=\"col\"><button type=\"button\">{}</button></th>", prose(name));
    }
    out += "</tr></thead>\n<tbody>\n";
    for row in &table.rows {
        out += "<tr>";
        for (column, cell) in row.iter().enumerate() {
            out += &cell_html(cell, column == 0, numeric(column));
        }
        out += "</tr>\n";
    }
    out += "</tbody></table></div>\n";
    if !table.note.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", prose(&table.note));
    }
    out + "</figure>\n"
}

fn cell_html(cell: &Cell, first: bool, numeric: bool) -> String {
    let tag = if first { "th scope=\"row\"" } else { "td" };
    // Short words stay on one line; sentences break.
    let class = match (numeric && !first, cell.text.chars().count() > 40) {
        (true, _) => " class=\"n\"",
        (false, true) => " class=\"long\"",
        (false, false) => "",
    };
    let sort = cell.value.filter(|v| v.is_finite()).map_or_else(String::new, |v| format!(" data-v=\"{v}\""));
    let tip = cell
        .tip
        .as_ref()
        .map_or_else(String::new, |tip| format!(" data-tip=\"{}\" tabindex=\"0\"", escape(tip)));
    format!("<{tag}{class}{sort}{tip}>{}</{}>", prose(&cell.text), &tag[..2])
}

fn figure_html(figure: &Figure) -> String {
    let legend = match &figure.plot {
        Plot::Axes { series, .. } => legend(series),
        Plot::Heat { .. } => String::new(),
    };
    let note = match figure.note.is_empty() {
        true => String::new(),
        false => format!("<p class=\"note\">{}</p>\n", prose(&figure.note)),
    };
    format!(
        "<figure id=\"{}\">\n<figcaption>{}</figcaption>\n{}\n{legend}{note}</figure>\n",
        escape(&figure.id),
        prose(&figure.title),
        chart(figure)
    )
}

/// The names of lines; clouds have theirs beside them.
fn legend(series: &[Series]) -> String {
    let mut names = String::new();
    for (i, one) in series.iter().enumerate().filter(|(_, one)| one.look != Look::Cloud) {
        let _ =
            write!(names, "<li><i class=\"k{}{}\"></i>{}</li>", i % COLOURS, dash(one), escape(&one.name));
    }
    if names.is_empty() { names } else { format!("<ul class=\"legend\">{names}</ul>\n") }
}

/// The class of lines that are dashed.
fn dash(series: &Series) -> &'static str {
    if matches!(series.look, Look::Dashed | Look::Guide) { " dash" } else { "" }
}

fn chart(figure: &Figure) -> String {
    match &figure.plot {
        Plot::Axes { series, least } => axes_svg(figure, series, *least),
        Plot::Heat { rows, columns, values } => heat_svg(figure, rows, columns, values),
    }
}

/// The chart alone, as a file of its own: its style comes along.
pub(crate) fn svg(figure: &Figure) -> String {
    let inner = chart(figure);
    let style = format!("<style>{CHART_STYLE}{CHART_ALONE}</style>");
    let at = inner.find('>').map_or(0, |at| at + 1);
    format!("{}{style}{}\n", &inner[..at], &inner[at..])
}

/// Places for about `count` marks from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.
fn ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let span = high - low;
    if !(span > 0.0 && span.is_finite()) {
        return vec![low];
    }
    let rough = span / count;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(10.0 * power);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).take(50).map(|i| i as f64 * step).collect()
}

/// The largest over the smallest value; 0 where there is no logarithm of all.
fn spread(values: impl Iterator<Item = f64>) -> f64 {
    let (low, high) =
        values.filter(|v| v.is_finite()).fold((f64::INFINITY, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
    if low > 0.0 && low <= high { high / low } else { 0.0 }
}

/// Powers of ten, and where they are few their doubles and fives, between two logarithms.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let powers = (low.floor() as i32..=high.ceil() as i32).take(40);
    let steps: &[f64] = if high - low > 4.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    all.filter(|y| (low..=high).contains(&y.log10())).collect()
}

/// A number as an axis shows it.
fn short(value: f64) -> String {
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

/// A range a little wider than the values and no smaller than `least`, or some range where there are none.
fn range(values: impl Iterator<Item = f64>, least: f64) -> (f64, f64) {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return (0.0, 1.0);
    }
    let margin = if high > low { 0.05 * (high - low) } else { (0.1 * high.abs()).max(0.5) };
    let margin = margin.max((least - (high - low)) / 2.0);
    (low - margin, high + margin)
}

fn open(figure: &Figure, width: f64, height: f64) -> String {
    format!(
        "<svg class=\"chart\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(&figure.title)
    )
}

fn axes_svg(figure: &Figure, series: &[Series], least: f64) -> String {
    let points = || series.iter().flat_map(|one| one.points.iter());
    let (x0, x1) = range(points().map(|p| p.x), 0.0);
    // Values of many sizes stand on a logarithmic axis.
    let log = spread(points().map(|p| p.y)) > MANY_SIZES;
    let up = |y: f64| if log { y.log10() } else { y };
    let heights = points().flat_map(|p| p.range.into_iter().flatten().chain([p.y]));
    let (y0, y1) = range(heights.map(up), if log { 0.0 } else { least });
    let px = |x: f64| LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    let py = |y: f64| HEIGHT - BOTTOM - (up(y) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let mut out = open(figure, WIDTH, HEIGHT);
    let marks = if log { log_ticks(y0, y1) } else { ticks(y0, y1, 6.0) };
    for y in marks {
        let at = py(y);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0,
            short(y)
        );
    }
    for x in ticks(x0, x1, 7.0) {
        let _ = write!(
            out,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            px(x),
            HEIGHT - BOTTOM + 18.0,
            short(x)
        );
    }
    let _ = write!(
        out,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/><text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text class=\"name\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        WIDTH - RIGHT,
        HEIGHT - BOTTOM,
        HEIGHT - BOTTOM,
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 10.0,
        escape(&figure.x),
        (TOP + HEIGHT - BOTTOM) / 2.0,
        escape(&if log { format!("{}, logarithmic", figure.y) } else { figure.y.clone() })
    );
    // Where names stand: left, right and height.
    let mut names: Vec<(f64, f64, f64)> = Vec::new();
    let mut layers: Vec<_> = series.iter().enumerate().collect();
    // Under the marks that it goes through.
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
            // More clouds than colours: each says its name where there is room; the others say it when pointed at.
            let width = 7.0 * one.name.chars().count() as f64;
            let free = |from: f64| {
                let apart = |&(left, right, y_of): &(f64, f64, f64)| {
                    from + width < left || right < from || (y_of - y).abs() > 12.0
                };
                from > LEFT && from + width < WIDTH && names.iter().all(apart)
            };
            if let Some(from) = [x + 9.0, x - 9.0 - width].into_iter().find(|&from| free(from)) {
                names.push((from, from + width, y));
                let _ = write!(
                    out,
                    "<text class=\"tick\" x=\"{from:.1}\" y=\"{:.1}\">{}</text>",
                    y + 4.0,
                    escape(&one.name)
                );
            }
        }
    }
    out + "</svg>"
}

fn heat_svg(figure: &Figure, rows: &[String], columns: &[String], values: &[Vec<f64>]) -> String {
    let label = 12.0
        + 7.0 * columns.iter().chain(rows).map(|name| name.chars().count()).max().unwrap_or(4).min(22) as f64;
    let (cell_w, cell_h) = (((WIDTH - label - RIGHT) / columns.len().max(1) as f64).min(110.0), 30.0);
    let height = TOP + rows.len() as f64 * cell_h + 40.0;
    let finite = || values.iter().flatten().copied().filter(|v| v.is_finite());
    let (low, high) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    // The same decimals in all cells, where they are of one size.
    let show = |value: f64| if high < 100.0 && low > -100.0 { format!("{value:.2}") } else { short(value) };
    let mut out = open(figure, WIDTH, height);
    for (r, name) in rows.iter().enumerate() {
        let y = TOP + r as f64 * cell_h;
        let _ = write!(
            out,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            label - 6.0,
            y + cell_h / 2.0 + 4.0,
            escape(name)
        );
        for (c, column) in columns.iter().enumerate() {
            let value = values.get(r).and_then(|row| row.get(c)).copied().unwrap_or(f64::NAN);
            let share = if high > low { (value - low) / (high - low) } else { 0.5 };
            let (text, opacity, dark) = match value.is_finite() {
                true => (show(value), 0.08 + 0.87 * share, share > 0.55),
                false => ("–".to_owned(), 0.0, false),
            };
            let tip = escape(&format!("{name}, {column}: {text}"));
            let x = label + c as f64 * cell_w;
            let class = if dark { "on" } else { "off" };
            let _ = write!(
                out,
                "<g data-tip=\"{tip}\"><title>{tip}</title><rect class=\"cell\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" style=\"fill-opacity:{opacity:.3}\"/><text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text></g>",
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
        let _ = write!(
            out,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            label + (c as f64 + 0.5) * cell_w,
            TOP + rows.len() as f64 * cell_h + 16.0,
            escape(name)
        );
    }
    let _ = write!(
        out,
        "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        label + columns.len() as f64 * cell_w / 2.0,
        height - 6.0,
        escape(&figure.x)
    );
    out + "</svg>"
}

const CHART_STYLE: &str = "\
.chart{width:100%;height:auto;font:13px system-ui,sans-serif}
.chart text{fill:var(--ink)}
.chart .tick{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.chart .name{fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.dash{stroke-dasharray:6 5}
.mark{stroke:var(--paper);stroke-width:1.5}
.cell{fill:#0072b2}
.chart .on{fill:#fff}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}.s6{stroke:var(--c6)}
.m0{fill:var(--c0)}.m1{fill:var(--c1)}.m2{fill:var(--c2)}.m3{fill:var(--c3)}.m4{fill:var(--c4)}.m5{fill:var(--c5)}.m6{fill:var(--c6)}
";

/// Colours of a chart without a page around it, on whatever ground.
const CHART_ALONE: &str = "\
:root{--ink:#444;--soft:#777;--rule:#8884;--paper:#fff0;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b08a00;--c5:#56b4e9;--c6:#777}
@media(prefers-color-scheme:dark){:root{--ink:#ddd;--soft:#aaa}}
";

const STYLE: &str = "\
:root{--paper:#fdfdfc;--ink:#1d2023;--soft:#5d666e;--rule:#e2e4e6;--band:#f3f4f5;--link:#00619a;--c0:#0072b2;--c1:#d55e00;--c2:#008a64;--c3:#b8598c;--c4:#9a7800;--c5:#2b92c9;--c6:#6b7278;color-scheme:light}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--paper:#16191c;--ink:#e6e8ea;--soft:#a3acb3;--rule:#30363b;--band:#1e2226;--link:#6bb8ea;--c0:#4aa8e0;--c1:#f0803c;--c2:#2fc79a;--c3:#e39bc4;--c4:#e0b83c;--c5:#7cc8f2;--c6:#9aa3aa;color-scheme:dark}}
:root[data-theme=dark]{--paper:#16191c;--ink:#e6e8ea;--soft:#a3acb3;--rule:#30363b;--band:#1e2226;--link:#6bb8ea;--c0:#4aa8e0;--c1:#f0803c;--c2:#2fc79a;--c3:#e39bc4;--c4:#e0b83c;--c5:#7cc8f2;--c6:#9aa3aa;color-scheme:dark}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif}
header,main{max-width:74rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 3rem .4rem 0;letter-spacing:-.01em}
h2{font-size:1.3rem;margin:0 0 .6rem}
.lead{color:var(--soft);margin:.2rem 0 1.2rem;max-width:46rem}
nav{display:flex;flex-wrap:wrap;gap:.35rem .9rem;border-block:1px solid var(--rule);padding:.6rem 0}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
nav a{font-size:.92rem}
section{padding:2.2rem 0 0;scroll-margin-top:1rem}
p{max-width:46rem}
code{background:var(--band);border-radius:3px;padding:.1em .3em;font-size:.9em;overflow-wrap:anywhere}
figure{margin:1.4rem 0 1.8rem}
figure:not(.table){max-width:60rem}
figcaption{font-weight:600;margin-bottom:.5rem}
.note{color:var(--soft);font-size:.88rem;margin:.5rem 0 0}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .7rem;text-align:left;vertical-align:top;border-top:1px solid var(--rule)}
td{white-space:nowrap}td.long{min-width:16rem;white-space:normal}
td.n,th.n{text-align:right}
thead th{border-top:0;background:var(--band);position:sticky;top:0;vertical-align:bottom}
tbody th{font-weight:500;white-space:nowrap}tbody th.long{white-space:normal;min-width:14rem}
tbody tr:hover{background:var(--band)}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible,#theme:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--link);outline-offset:2px}
th[aria-sort=ascending] button::after{content:' ↑'}th[aria-sort=descending] button::after{content:' ↓'}
td[data-tip],th[data-tip]{text-decoration:underline dotted var(--soft);text-underline-offset:3px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.4rem 0 0;font-size:.88rem}
.legend i{display:inline-block;width:1.1rem;height:.25rem;margin-right:.4rem;vertical-align:middle;border-radius:2px}
.legend i.dash{opacity:.55}
.k0{background:var(--c0)}.k1{background:var(--c1)}.k2{background:var(--c2)}.k3{background:var(--c3)}.k4{background:var(--c4)}.k5{background:var(--c5)}.k6{background:var(--c6)}
#theme{float:right;font-size:1.2rem;line-height:1;background:none;border:1px solid var(--rule);border-radius:6px;color:var(--ink);padding:.35rem .5rem;cursor:pointer}
#tip{position:fixed;display:none;max-width:20rem;background:var(--ink);color:var(--paper);font-size:.85rem;padding:.35rem .6rem;border-radius:6px;pointer-events:none;white-space:pre-line;z-index:9}
main{padding-bottom:4rem}
@media(max-width:40rem){body{font-size:15px}h1{font-size:1.5rem}th,td{padding:.38rem .5rem}.chart{min-width:30rem}figure:not(.table){overflow-x:auto}}
@media print{#theme,nav{display:none}.scroll{overflow:visible}}
";

const SCRIPT: &str = "\
document.querySelectorAll('table.sortable thead button').forEach(function(button){
  button.addEventListener('click',function(){
    var th=button.parentNode,table=th.closest('table'),body=table.tBodies[0],at=th.cellIndex;
    var down=th.getAttribute('aria-sort')==='ascending';
    table.querySelectorAll('thead th').forEach(function(other){other.removeAttribute('aria-sort')});
    th.setAttribute('aria-sort',down?'descending':'ascending');
    function key(row){var c=row.cells[at],v=c.getAttribute('data-v');return v===null?c.textContent.trim():parseFloat(v)}
    Array.from(body.rows).sort(function(a,b){
      var x=key(a),y=key(b),n=typeof x==='number',m=typeof y==='number';
      var order=n&&m?x-y:n?-1:m?1:x.localeCompare(y);
      return down&&n===m?-order:order;
    }).forEach(function(row){body.appendChild(row)});
  });
});
var tip=document.getElementById('tip');
function show(target,x,y){
  tip.textContent=target.getAttribute('data-tip');tip.style.display='block';
  tip.style.left=Math.max(4,Math.min(x+12,innerWidth-tip.offsetWidth-8))+'px';
  tip.style.top=(y+tip.offsetHeight+24>innerHeight?y-tip.offsetHeight-10:y+16)+'px';
}
document.addEventListener('pointermove',function(event){
  var target=event.target.closest&&event.target.closest('[data-tip]');
  if(target)show(target,event.clientX,event.clientY);else tip.style.display='none';
});
document.addEventListener('focusin',function(event){
  if(event.target.hasAttribute('data-tip')){var box=event.target.getBoundingClientRect();show(event.target,box.right,box.bottom)}
});
document.addEventListener('focusout',function(){tip.style.display='none'});
document.getElementById('theme').addEventListener('click',function(){
  var root=document.documentElement,now=root.getAttribute('data-theme')||(matchMedia('(prefers-color-scheme:dark)').matches?'dark':'light');
  root.setAttribute('data-theme',now==='dark'?'light':'dark');
});
";

#[cfg(test)]
mod tests {
    use super::super::{Chapter, Point};
    use super::*;

    fn report(blocks: Vec<Block>) -> Report {
        let chapters = vec![Chapter { id: "one".to_owned(), title: "One".to_owned(), blocks }];
        Report { title: "T <script>".to_owned(), subtitle: "`code` & more".to_owned(), chapters }
    }

    fn figure(plot: Plot) -> Figure {
        let text = |text: &str| text.to_owned();
        Figure {
            id: text("f"),
            title: text("A \"title\""),
            note: text("n"),
            x: text("x < 1"),
            y: text("y"),
            plot,
        }
    }

    fn series(points: &[(f64, f64)], look: Look) -> Series {
        let point = |&(x, y): &(f64, f64)| Point {
            range: Some([y - 1.0, y]),
            ..Point::new(x, y, "<tip>".to_owned())
        };
        Series { name: "s & t".to_owned(), points: points.iter().map(point).collect(), look }
    }

    /// Whether tags close in order and text has no bare signs.
    fn is_well_formed(xml: &str) -> bool {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = xml;
        while let Some(start) = rest.find('<') {
            if rest[..start].contains('>') {
                return false;
            }
            let Some(end) = rest[start..].find('>').map(|end| start + end) else { return false };
            let tag = &rest[start + 1..end];
            rest = &rest[end + 1..];
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or("");
            if tag.starts_with('/') {
                if open.pop() != Some(name) {
                    return false;
                }
            } else if !tag.ends_with('/') {
                open.push(name);
            }
        }
        open.is_empty()
    }

    #[test]
    fn all_text_is_escaped() {
        let table = Tabular {
            id: "t".to_owned(),
            title: "<b>".to_owned(),
            note: "a < b".to_owned(),
            header: vec!["model".to_owned(), "ppl".to_owned()],
            rows: vec![vec![
                Cell {
                    text: "<script>alert(1)</script>".to_owned(),
                    value: None,
                    tip: Some("\"".to_owned()),
                },
                Cell { text: "1.5".to_owned(), value: Some(1.5), tip: None },
            ]],
        };
        let html = page(&report(vec![Block::Table(table), Block::Text("x <i> y\n\nz".to_owned())]));
        assert!(!html.contains("<script>alert") && html.contains("&lt;script&gt;alert"), "{html}");
        assert!(html.contains("T &lt;script&gt;") && html.contains("<code>code</code> &amp; more"), "{html}");
        assert!(html.contains("data-v=\"1.5\"") && html.contains("data-tip=\"&quot;\""), "{html}");
        // No network: nothing is named that a browser would fetch.
        assert!(!html.contains("src=") && !html.contains("url(") && !html.contains("<link"), "{html}");
    }

    #[test]
    fn charts_of_any_number_of_points_are_well_formed() {
        for points in
            [&[][..], &[(1.0, 2.0)], &[(0.0, 1.0), (1.0, f64::NAN), (2.0, f64::INFINITY), (3.0, 2.0)]]
        {
            for looks in [&[Look::Dashed][..], &[Look::Cloud, Look::Cloud, Look::Guide]] {
                let series = looks.iter().map(|&look| series(points, look)).collect();
                let figure = figure(Plot::Axes { series, least: 0.0 });
                let svg = svg(&figure);
                assert!(is_well_formed(&svg) && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                assert_eq!(
                    page(&report(vec![Block::Figure(figure.clone())])),
                    page(&report(vec![Block::Figure(figure)]))
                );
            }
        }
        for (rows, columns) in [(0, 0), (1, 1), (3, 2)] {
            let names = |n: usize| (0..n).map(|i| format!("<{i}>")).collect::<Vec<_>>();
            let mut values = vec![vec![0.25; columns]; rows];
            if rows > 1 {
                values[1][0] = f64::NAN;
            }
            let svg = svg(&figure(Plot::Heat { rows: names(rows), columns: names(columns), values }));
            assert!(is_well_formed(&svg) && !svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn a_guide_lies_under_the_marks_and_has_a_name() {
        let points = [(1.0, 2.0), (2.0, 1.0)];
        let plot = |looks: &[Look], least| Plot::Axes {
            series: looks.iter().map(|&look| series(&points, look)).collect(),
            least,
        };
        let html = figure_html(&figure(plot(&[Look::Cloud, Look::Guide], 0.0)));
        assert!(html.find("<polyline class=\"line s1 dash\"") < html.find("<circle"), "{html}");
        assert_eq!((html.matches("<circle").count(), html.matches("<li>").count()), (2, 1), "{html}");
        assert!(!figure_html(&figure(plot(&[Look::Cloud], 0.0))).contains("<ul"));
        // A low chart has marks of small numbers, one of a least height does not.
        let mark = |least| svg(&figure(plot(&[Look::Line], least))).contains(">0.5</text>");
        assert_eq!([0.0, 20.0].map(mark), [true, false]);
    }

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
