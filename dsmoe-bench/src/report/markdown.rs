//! Reports as Markdown, and their tables as CSV.

use std::fmt::Write as _;

use super::{Block, Cell, Figure, Plot, Report, Tabular, number};

/// Writes the report as Markdown. Charts become tables of their numbers.
pub(crate) fn markdown(report: &Report) -> String {
    let mut out = format!("# {}\n\n{}\n", report.title, report.subtitle);
    for chapter in &report.chapters {
        let _ = write!(out, "\n## {}\n", chapter.title);
        for block in &chapter.blocks {
            match block {
                Block::Text(text) => out += &format!("\n{text}\n"),
                Block::Table(table) => out += &table_text(table),
                Block::Figure(_) | Block::Choice(_) => {
                    out.extend(block.figures().into_iter().map(|figure| table_text(&numbers(figure))));
                }
            }
        }
    }
    out
}

fn table_text(table: &Tabular) -> String {
    format!("\n### {}\n\n{}", table.title, bare_table(table))
}

/// Writes a table with its note and without its title.
pub(crate) fn bare_table(table: &Tabular) -> String {
    let clean = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let line =
        |cells: &mut dyn Iterator<Item = String>| format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
    let mut out = String::new();
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

/// Writes a table as CSV with numbers in full precision.
pub(crate) fn csv(table: &Tabular) -> String {
    let quote = |text: &str| match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let cell = |cell: &Cell| cell.value.map_or_else(|| quote(&cell.text), |value| value.to_string());
    let header: Vec<String> = table.header.iter().map(|name| quote(name)).collect();
    let rows = table.rows.iter().map(|row| row.iter().map(cell).collect());
    [header].into_iter().chain(rows).map(|cells: Vec<String>| cells.join(",") + "\n").collect()
}

/// Returns the numbers of a chart as a table.
pub(crate) fn numbers(figure: &Figure) -> Tabular {
    let cell = |value: f64| number(value, |x| format!("{x:.4}"));
    let mut table = Tabular::new(&figure.id, &figure.title, "series").note(&figure.note);
    match &figure.plot {
        Plot::Axes { series, .. } => {
            table.extend([&figure.x, &figure.y]);
            for one in series {
                for point in &one.points {
                    table.row(vec![one.name.as_str().into(), cell(point.x), cell(point.y)]);
                }
            }
        }
        Plot::Scatter { marks } => {
            table.header = vec!["method".to_owned(), figure.x.clone(), figure.y.clone()];
            for mark in marks {
                table.row(vec![mark.name.as_str().into(), cell(mark.x), cell(mark.y)]);
            }
        }
        Plot::Heat { rows, columns, values } => {
            table.header = vec![figure.y.clone()];
            table.header.extend(columns.iter().map(|name| format!("{} {name}", figure.x)));
            for (name, values) in rows.iter().zip(values) {
                let mut cells = vec![name.as_str().into()];
                cells.extend(values.iter().map(|&value| cell(value)));
                table.row(cells);
            }
        }
    }
    table
}
