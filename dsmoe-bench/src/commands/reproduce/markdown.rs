//! A report as Markdown, and its tables as CSV.

use std::fmt::Write as _;

use super::document::{Block, Figure, Plot, Report, Tabular};

/// The report as one Markdown text; charts are told as their numbers.
pub(crate) fn markdown(report: &Report) -> String {
    let mut out = format!("# {}\n\n{}\n", report.title, report.subtitle);
    for chapter in &report.chapters {
        let _ = write!(out, "\n## {}\n", chapter.title);
        for block in &chapter.blocks {
            match block {
                Block::Text(text) => {
                    let _ = write!(out, "\n{text}\n");
                }
                Block::Table(table) => out += &table_text(table),
                Block::Figure(figure) => out += &table_text(&numbers(figure)),
            }
        }
    }
    out
}

fn table_text(table: &Tabular) -> String {
    let clean = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let line =
        |cells: &mut dyn Iterator<Item = String>| format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
    let mut out = format!("\n### {}\n\n", table.title);
    out += &line(&mut table.header.iter().map(|name| clean(name)));
    out += &line(&mut table.header.iter().map(|_| "---".to_owned()));
    for row in &table.rows {
        out += &line(&mut row.iter().map(|cell| clean(&cell.text)));
    }
    if !table.note.is_empty() {
        let _ = write!(out, "\n{}\n", table.note);
    }
    out
}

/// A table as CSV, numbers in full.
pub(crate) fn csv(table: &Tabular) -> String {
    let quote = |text: &str| match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let mut out = String::new();
    let header: Vec<String> = table.header.iter().map(|name| quote(name)).collect();
    out += &format!("{}\n", header.join(","));
    for row in &table.rows {
        let cells =
            row.iter().map(|cell| cell.value.map_or_else(|| quote(&cell.text), |value| value.to_string()));
        out += &format!("{}\n", cells.collect::<Vec<_>>().join(","));
    }
    out
}

/// The numbers of a chart as a table.
pub(crate) fn numbers(figure: &Figure) -> Tabular {
    let cell =
        |value: f64| super::document::Cell { text: format!("{value:.4}"), value: Some(value), tip: None };
    let mut table = Tabular {
        id: figure.id.clone(),
        title: figure.title.clone(),
        note: figure.note.clone(),
        header: vec!["series".to_owned(), figure.x.clone(), figure.y.clone()],
        rows: Vec::new(),
    };
    match &figure.plot {
        Plot::Lines(all) | Plot::Points(all) => {
            for series in all {
                for (x, y, _) in &series.points {
                    table.rows.push(vec![series.name.as_str().into(), cell(*x), cell(*y)]);
                }
            }
        }
        Plot::Heat { rows, columns, values } => {
            table.header = vec![figure.y.clone()];
            table.header.extend(columns.iter().map(|name| format!("{} {name}", figure.x)));
            for (name, values) in rows.iter().zip(values) {
                let mut cells = vec![name.as_str().into()];
                cells.extend(values.iter().map(|&value| cell(value)));
                table.rows.push(cells);
            }
        }
    }
    table
}
