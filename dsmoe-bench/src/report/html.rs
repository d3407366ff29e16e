//! Reports as self-contained HTML pages. Charts are inline SVG, and nothing is fetched.

use std::fmt::Write as _;

use super::scatter::{NARROW, scatter_svg};
use super::svg::{self, COLOURS, chart, dash, escape};
use super::{Block, Cell, Figure, Look, Plot, Report, Series, Tabular};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// Writes the report as HTML.
pub(crate) fn page(report: &Report) -> String {
    let mut out = String::new();
    let title = escape(&report.title);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{STYLE}{}</style>\n</head>\n\
         <body>\n<header>\n<button id=\"theme\" type=\"button\" aria-label=\"Light or dark\">◐</button>\n\
         <h1>{title}</h1>\n<p class=\"lead\">{}</p>\n<details id=\"contents\"><summary>Contents</summary>\n\
         <nav aria-label=\"Contents\">",
        svg::STYLE,
        prose(&report.subtitle)
    );
    for chapter in &report.chapters {
        let _ = write!(out, "<a href=\"#{}\">{}</a>", escape(&chapter.id), escape(&chapter.title));
    }
    out += "</nav>\n</details>\n</header>\n<main>\n";
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
                Block::Table(table) => out += &table_html(table, &report.accent),
                Block::Figure(figure) => out += &figure_html(figure),
                Block::Choice(figures) => out += &choice_html(figures),
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

/// Escapes text and marks code between backticks.
fn prose(text: &str) -> String {
    let parts: Vec<String> = escape(text).split('`').map(str::to_owned).collect();
    if parts.len().is_multiple_of(2) {
        return parts.join("`");
    }
    let code = |(i, part): (usize, String)| if i % 2 == 1 { format!("<code>{part}</code>") } else { part };
    parts.into_iter().enumerate().map(code).collect()
}

/// Writes a table. Rows of the names in `accent` are marked, and columns without a value are left out.
fn table_html(table: &Tabular, accent: &[String]) -> String {
    let mut out = format!(
        "<figure class=\"table\" id=\"{}\">\n<figcaption>{}</figcaption>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" \
         aria-label=\"{}\"><table class=\"sortable\">\n<thead><tr>",
        escape(&table.id),
        prose(&table.title),
        escape(&table.title)
    );
    let cells = |column: usize| table.rows.iter().filter_map(move |row| row.get(column));
    let numeric = |column: usize| cells(column).any(|cell| cell.value.is_some());
    let is_empty = |cell: &Cell| matches!(cell.text.as_str(), "" | "–" | "-");
    let shown: Vec<usize> = (0..table.header.len())
        .filter(|&column| column == 0 || table.rows.is_empty() || !cells(column).all(is_empty))
        .collect();
    for &column in &shown {
        let class = if numeric(column) { " class=\"n\"" } else { "" };
        let name = prose(&table.header[column]);
        let _ = write!(out, "<th{class} scope=\"col\"><button type=\"button\">{name}</button></th>");
    }
    out += "</tr></thead>\n<tbody>\n";
    for row in &table.rows {
        let marked = row.first().is_some_and(|cell| accent.contains(&cell.text));
        out += if marked { "<tr class=\"accent\">" } else { "<tr>" };
        for &column in &shown {
            if let Some(cell) = row.get(column) {
                out += &cell_html(cell, column == 0, numeric(column));
            }
        }
        out += "</tr>\n";
    }
    out += "</tbody></table></div>\n";
    if !table.note.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", prose(&table.note));
    }
    out + "</figure>\n"
}

/// Writes charts of which one is shown, by radio buttons. Without scripts all are shown.
fn choice_html(figures: &[(String, Figure)]) -> String {
    if let [(_, figure)] = figures {
        return figure_html(figure);
    }
    let group = figures.first().map_or("", |(_, figure)| &figure.id);
    let mut out = String::from("<div class=\"choice\">\n<fieldset><legend>Against</legend>");
    for (at, (name, figure)) in figures.iter().enumerate() {
        let checked = if at == 0 { " checked" } else { "" };
        let _ = write!(
            out,
            "<label><input type=\"radio\" name=\"{}\" value=\"{}\"{checked}>{}</label>",
            escape(group),
            escape(&figure.id),
            escape(name)
        );
    }
    out += "</fieldset>\n";
    out.extend(figures.iter().map(|(_, figure)| figure_html(figure)));
    out + "</div>\n"
}

fn cell_html(cell: &Cell, first: bool, numeric: bool) -> String {
    let tag = if first { "th scope=\"row\"" } else { "td" };
    // Short texts stay on one line.
    let class = match (numeric && !first, cell.text.chars().count() > 40) {
        (true, _) => " class=\"n\"",
        (false, true) => " class=\"long\"",
        (false, false) => "",
    };
    let sort = cell.value.filter(|v| v.is_finite()).map(|v| format!(" data-v=\"{v}\"")).unwrap_or_default();
    let tip = cell.tip.as_ref().map(|tip| format!(" data-tip=\"{}\" tabindex=\"0\"", escape(tip)));
    let tip = tip.unwrap_or_default();
    let text = match cell.text.split_once(" (") {
        // The range gets a line of its own, so that tables of many columns fit the page.
        Some((value, range)) if numeric && range.contains(" to ") => {
            format!("{} <span class=\"range\">({}</span>", prose(value), prose(range))
        }
        _ => prose(&cell.text),
    };
    format!("<{tag}{class}{sort}{tip}>{text}</{}>", &tag[..2])
}

fn figure_html(figure: &Figure) -> String {
    let legend = match &figure.plot {
        Plot::Axes { series, .. } => legend(series),
        Plot::Scatter { .. } | Plot::Heat { .. } => String::new(),
    };
    let note = match figure.note.is_empty() {
        true => String::new(),
        false => format!("<p class=\"note\">{}</p>\n", prose(&figure.note)),
    };
    format!(
        "<figure id=\"{}\">\n<figcaption>{}</figcaption>\n{}\n{legend}{note}</figure>\n",
        escape(&figure.id),
        prose(&figure.title),
        chart_html(figure)
    )
}

/// Writes the chart; one of named marks twice, since its names have no room on a narrow screen otherwise.
fn chart_html(figure: &Figure) -> String {
    match &figure.plot {
        Plot::Scatter { marks } => format!(
            "<div class=\"wide\">{}</div><div class=\"narrow\">{}</div>",
            chart(figure),
            scatter_svg(figure, marks, NARROW)
        ),
        Plot::Axes { .. } | Plot::Heat { .. } => chart(figure),
    }
}

/// Lists the names of lines; clouds have theirs beside their marks.
fn legend(series: &[Series]) -> String {
    let mut names = String::new();
    for (i, one) in series.iter().enumerate().filter(|(_, one)| one.look != Look::Cloud) {
        let _ =
            write!(names, "<li><i class=\"k{}{}\"></i>{}</li>", i % COLOURS, dash(one), escape(&one.name));
    }
    if names.is_empty() { names } else { format!("<ul class=\"legend\">{names}</ul>\n") }
}

#[cfg(test)]
mod tests {
    use super::super::svg::svg;
    use super::super::{Chapter, Point, fixed};
    use super::*;

    fn report(blocks: Vec<Block>) -> Report {
        let chapters = vec![Chapter::new("one", "One", blocks)];
        Report {
            title: "T <script>".to_owned(),
            subtitle: "`code` & more".to_owned(),
            accent: vec!["mine".to_owned()],
            chapters,
        }
    }

    fn figure(plot: Plot) -> Figure {
        Figure { plot, ..Figure::new("f", "A \"title\"", ["x < 1", "y"], Vec::new()).note("n") }
    }

    fn series(points: &[(f64, f64)], look: Look) -> Series {
        let point = |&(x, y): &(f64, f64)| Point {
            range: Some([y - 1.0, y]),
            ..Point::new(x, y, "<tip>".to_owned())
        };
        Series { name: "s & t".to_owned(), points: points.iter().map(point).collect(), look }
    }

    /// Reports whether tags close in order and text has no unescaped characters.
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
        let mut table = Tabular::new("t", "<b>", "model | ppl").note("a < b");
        let script = Cell::from("<script>alert(1)</script>").tip(Some("\"".to_owned()));
        table.row(vec![script, fixed(1.5, 1)]);
        let html = page(&report(vec![table.into(), Block::Text("x <i> y\n\nz".to_owned())]));
        assert!(!html.contains("<script>alert") && html.contains("&lt;script&gt;alert"), "{html}");
        assert!(html.contains("T &lt;script&gt;") && html.contains("<code>code</code> &amp; more"), "{html}");
        assert!(html.contains("data-v=\"1.5\"") && html.contains("data-tip=\"&quot;\""), "{html}");
        // A browser fetches nothing.
        assert!(!html.contains("src=") && !html.contains("url(") && !html.contains("<link"), "{html}");
    }

    #[test]
    fn accents_are_marked_and_empty_columns_left_out() {
        let mut table = Tabular::new("t", "T", "method | nothing | ppl");
        table.row(vec!["mine".into(), "–".into(), fixed(1.0, 1)]);
        table.row(vec!["other".into(), "".into(), "–".into()]);
        let html = page(&report(vec![table.into()]));
        assert_eq!(html.matches("<tr class=\"accent\">").count(), 1, "{html}");
        assert!(!html.contains("nothing") && html.contains(">ppl<"), "{html}");
        let mut table = Tabular::new("t", "T", "row | nats");
        table.row(vec!["a (1 to 2)".into(), Cell { text: "0.5 (0.4 to 0.6)".to_owned(), ..fixed(0.5, 1) }]);
        let html = page(&report(vec![table.into()]));
        assert!(html.contains(">0.5 <span class=\"range\">(0.4 to 0.6)</span></td>"), "{html}");
        assert!(html.contains(">a (1 to 2)</th>"), "{html}");
        let figures = ["a", "b"].map(|id| (format!("by {id}"), Figure::new(id, id, ["x", "y"], Vec::new())));
        let html = page(&report(vec![Block::Choice(figures.to_vec())]));
        assert_eq!((html.matches("type=\"radio\"").count(), html.matches(" checked").count()), (2, 1));
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
                assert_eq!(page(&report(vec![figure.clone().into()])), page(&report(vec![figure.into()])));
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
}
