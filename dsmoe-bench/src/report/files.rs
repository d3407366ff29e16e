//! The files of a report.

use std::path::Path;

use anyhow::Result;

use super::{Block, Report, html, markdown, svg};
use crate::files;

/// Writes `report.md`, `report.html`, each chart as SVG and each table as CSV.
pub(crate) fn write(report: &Report, out: &Path) -> Result<()> {
    files::write(&out.join("report.md"), markdown::markdown(report))?;
    files::write(&out.join("report.html"), html::page(report))?;
    for block in report.chapters.iter().flat_map(|chapter| &chapter.blocks) {
        let table = match block {
            Block::Text(_) => continue,
            Block::Table(table) => table.clone(),
            Block::Figure(figure) => {
                files::write(&out.join("charts").join(format!("{}.svg", figure.id)), svg::svg(figure))?;
                markdown::numbers(figure)
            }
        };
        files::write(&out.join("csv").join(format!("{}.csv", table.id)), markdown::csv(&table))?;
    }
    Ok(())
}
