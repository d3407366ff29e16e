//! Files of a finished reproduction: results, report, charts and tables.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::cache::{write, write_json};
use super::collected::Collected;
use super::results::{Comparison, MethodResult};
use super::{analysis, chapters};
use crate::format::{self, Table};
use crate::report::{Block, html, markdown, svg};
use crate::ui::Ui;

/// Writes results and report, and shows the main table.
pub(super) fn finish(collected: &Collected, out: &Path, seconds: f64, ui: &mut Ui) -> Result<()> {
    let results = analysis::of(collected)?;
    write_json(&out.join("results.json"), &results)?;
    let report = chapters::of(collected, &results);
    write(&out.join("report.md"), markdown::markdown(&report).as_bytes())?;
    write(&out.join("report.html"), html::page(&report).as_bytes())?;
    for block in report.chapters.iter().flat_map(|chapter| &chapter.blocks) {
        let table = match block {
            Block::Text(_) => continue,
            Block::Table(table) => table.clone(),
            Block::Figure(figure) => {
                let path = out.join("charts").join(format!("{}.svg", figure.id));
                write(&path, svg::svg(figure).as_bytes())?;
                markdown::numbers(figure)
            }
        };
        write(&out.join("csv").join(format!("{}.csv", table.id)), markdown::csv(&table).as_bytes())?;
    }
    let done = Done { out, seconds, methods: &results.methods, comparisons: &results.comparisons };
    ui.result(&done, Done::show)
}

/// The result of a reproduction.
#[derive(Serialize)]
struct Done<'a> {
    out: &'a Path,
    seconds: f64,
    methods: &'a [MethodResult],
    comparisons: &'a [Comparison],
}

impl Done<'_> {
    fn show(&self) -> String {
        let header = [
            "method",
            "parameters",
            "activated",
            "of the budget",
            "perplexity",
            "tasks right, %",
            "DSMoE is",
        ];
        let mut table = Table::new(header);
        let first = self.comparisons.first().map(|one| one.dsmoe.as_str());
        for method in self.methods {
            let is_it = |one: &&Comparison| one.other == method.name && Some(&one.dsmoe[..]) == first;
            table.row([
                method.name.clone(),
                format::amount(method.params_total),
                format::amount(method.params_activated.mean),
                format::percent(method.of_budget),
                format!("{:.3}", method.ppl.mean),
                method.tasks_mean.map_or_else(|| "-".to_owned(), |mean| format!("{mean:.1}")),
                self.comparisons.iter().find(is_it).map_or("-", |one| one.verdict.text()).to_owned(),
            ]);
        }
        format!(
            "{}\n{}: report.html, report.md, results.json, charts/ and csv/ after {}\n",
            table.show(),
            self.out.display(),
            format::duration(self.seconds)
        )
    }
}
