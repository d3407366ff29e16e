//! The files of a report.

use std::path::Path;

use anyhow::Result;

use super::{Block, Report, Tabular, html, markdown, svg};
use crate::files;

/// Writes `report.md`, `report.html`, each chart as SVG and each table as CSV.
pub(crate) fn write(report: &Report, out: &Path) -> Result<()> {
    files::write(&out.join("report.md"), markdown::markdown(report))?;
    files::write(&out.join("report.html"), html::page(report))?;
    for block in report.chapters.iter().flat_map(|chapter| &chapter.blocks) {
        for figure in block.figures() {
            files::write(&out.join("charts").join(format!("{}.svg", figure.id)), svg::svg(figure))?;
            write_csv(&markdown::numbers(figure), out)?;
        }
        if let Block::Table(table) = block {
            write_csv(table, out)?;
        }
    }
    Ok(())
}

fn write_csv(table: &Tabular, out: &Path) -> Result<()> {
    files::write(&out.join("csv").join(format!("{}.csv", table.id)), markdown::csv(table))
}
