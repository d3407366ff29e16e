//! Files of a finished reproduction: results, report, charts and tables.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::collected::Collected;
use super::results::{Results, Verdict};
use super::{analysis, chapters, shipped};
use crate::files::write_json;
use crate::format::{self, Table};
use crate::report;
use crate::ui::Ui;

/// Writes results and report, and shows the main table.
pub(super) fn finish(collected: &Collected, out: &Path, seconds: f64, ui: &mut Ui) -> Result<()> {
    let results = analysis::of(collected)?;
    write_json(&out.join("results.json"), &results)?;
    let report = chapters::of(collected, &results);
    report::files::write(&report, out)?;
    let Results { methods, comparisons, .. } = &results;
    let place = out.display().to_string();
    let record = shipped::compare(&results);
    let done = json!({
        "out": place, "seconds": seconds, "methods": methods, "comparisons": comparisons, "record": record,
    });
    ui.result(&done, |_| {
        let time = format::duration(seconds);
        let table = main_table(&results);
        let record = record.map_or(String::new(), |record| format!("{}\n", record.text()));
        format!(
            "{table}\n{record}{place}: report.html, report.md, results.json, charts/ and csv/ after {time}\n"
        )
    })
}

fn main_table(results: &Results) -> String {
    let header = "method | parameters | activated | of the budget | perplexity | tasks right, % | DSMoE is";
    let mut table = Table::new(header.split(" | "));
    for method in &results.methods {
        table.row([
            method.name.clone(),
            format::amount(method.params_total),
            format::amount(method.params_activated.mean),
            format::percent(method.of_budget),
            format!("{:.3}", method.ppl.mean),
            format::or_dash(method.tasks_mean, |mean| format!("{mean:.1}")),
            results.verdict_on(method).map_or("-", Verdict::text).to_owned(),
        ]);
    }
    table.show()
}
