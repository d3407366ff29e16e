//! `dsmoe reproduce splice`: writes the main table and figure of recorded reproductions into Markdown files.
//!
//! ```text
//! <!-- reproduce DIR -->            the whole table and its figure; DIR, relative to the file, has results.json
//! <!-- reproduce DIR brief -->      a table of few columns
//! <!-- reproduce DIR speed -->      tokens per second, and those of the GPU suite in gpu-h100.json beside DIR
//! <!-- reproduce DIR figure -->     the first chart alone, drawn from results.json into DIR/charts
//! <!-- reproduce DIR NAME -->       of a record of experiments, the numbers of one; without NAME all claims
//! ...                               this is replaced
//! <!-- /reproduce -->
//! ```

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::frontier;
use super::overview::Overview;
use super::records::RESULTS;
use super::related::Outcome;
use super::results::{Results, Verdict};
use super::setup::Setup;
use crate::files::{read, read_inside, read_json, write};
use crate::format;
use crate::report::{Cell, Tabular, markdown, svg};
use crate::ui::Ui;

const BEGIN: &str = "<!-- reproduce ";
const END: &str = "<!-- /reproduce -->";
/// The record of the GPU suite.
const GPU: &str = "gpu-h100.json";
const CHART: &str = "charts/pareto-chart.svg";

/// The contents of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    Brief,
    Speed,
    Figure,
}

/// A file as it should be: a document, or a chart that one shows.
pub(crate) struct Wanted {
    path: PathBuf,
    text: String,
}

/// Fills the blocks of `files`; with `check`, fails if that would change one.
pub(crate) fn run(files: &[PathBuf], check: bool, ui: &mut Ui) -> Result<()> {
    let (mut changed, mut blocks) = (Vec::new(), 0);
    for path in files {
        let (text, folder) = (read(path)?, path.parent().unwrap_or(Path::new("")));
        let (spliced, charts) = splice(&text, folder).with_context(|| path.display().to_string())?;
        blocks += spliced.matches(BEGIN).count();
        for wanted in charts.into_iter().chain([Wanted { path: path.clone(), text: spliced }]) {
            if read_inside(&wanted.path).is_ok_and(|found| found == wanted.text) {
                continue;
            }
            if check {
                let (file, what) = (path.display(), wanted.path.display());
                bail!("{what} differs from the records; run dsmoe reproduce splice {file}");
            }
            write(&wanted.path, wanted.text)?;
            changed.push(wanted.path.display().to_string());
        }
    }
    let files = changed.len();
    ui.result(&json!({ "files": changed, "blocks": blocks }), |_| {
        format!("{blocks} blocks, {files} files changed\n")
    })
}

/// Returns the text with its blocks replaced, and the charts that they show.
pub(crate) fn splice(text: &str, folder: &Path) -> Result<(String, Vec<Wanted>)> {
    let (mut out, mut rest, mut charts, mut blocks) = (String::new(), text, Vec::new(), 0);
    while let Some(at) = rest.find(BEGIN) {
        let line = text[..text.len() - rest.len() + at].matches('\n').count() + 1;
        let (before, block) = rest.split_at(at);
        let Some((head, body)) = block[BEGIN.len()..].split_once(" -->\n") else {
            bail!("line {line}: `{BEGIN}DIR -->` must end its line");
        };
        let Some((_, after)) = body.split_once(END) else {
            bail!("line {line}: no `{END}` follows");
        };
        let (inner, chart) = contents(head, folder).with_context(|| format!("line {line}"))?;
        charts.extend(chart);
        let _ = write!(out, "{before}{BEGIN}{head} -->\n{inner}{END}");
        (rest, blocks) = (after, blocks + 1);
    }
    if blocks == 0 {
        bail!("no block to fill; begin one with `{BEGIN}DIR -->` and end it with `{END}`");
    }
    out += rest;
    Ok((out, charts))
}

/// Returns what a block shows, and the chart in it. `head` has the record and its part.
fn contents(head: &str, folder: &Path) -> Result<(String, Option<Wanted>)> {
    let (dir, part) = head.split_once(' ').map_or((head, None), |(dir, part)| (dir, Some(part)));
    let path = folder.join(dir).join(RESULTS);
    let found: Value = read_json(&path)?;
    if found.get("experiments").is_some() {
        let outcome: Outcome = serde_json::from_value(found).with_context(|| path.display().to_string())?;
        return Ok((outcome.block(dir, part)?, None));
    }
    let part = match part {
        None => Part::Whole,
        Some("brief") => Part::Brief,
        Some("speed") => Part::Speed,
        Some("figure") => Part::Figure,
        Some(other) => bail!("`{other}` is no part of a record; use brief, speed or figure"),
    };
    let results: Results = serde_json::from_value(found).with_context(|| path.display().to_string())?;
    let overview = Overview::new(&results, &|_| None);
    Ok(match part {
        Part::Whole => (block_text(dir, &results), None),
        Part::Brief => (brief(dir, &results, &overview), None),
        Part::Speed => (speeds(dir, folder, &results, &overview)?, None),
        Part::Figure => {
            let (_, figure) = overview.figures().swap_remove(0);
            let name = format!("charts/{}.svg", figure.id);
            let chart = Wanted { path: folder.join(dir).join(&name), text: svg::svg(&figure) };
            (format!("\n![{}]({dir}/{name})\n\n", figure.title), Some(chart))
        }
    })
}

/// Writes the table of few columns and where it is from.
fn brief(dir: &str, results: &Results, overview: &Overview<'_>) -> String {
    let setup = &results.setup;
    let seeds = results.methods.iter().map(|method| method.seeds.len()).max().unwrap_or(0);
    let mut table = overview.table();
    table.note += &format!(
        " Profile {} with {} % of the FFNs, {seeds} seed{}; `{dir}`, revision {}.",
        setup.profile.name,
        100.0 * setup.profile.active,
        if seeds == 1 { "" } else { "s" },
        setup.git_revision,
    );
    if let Some(by_text) = overview.by_text() {
        table.note = format!("{by_text} {}", table.note.trim_start());
    }
    table.note = table.note.trim_start().to_owned();
    format!("\n{}\n", markdown::bare_table(&table))
}

/// Writes tokens per second on the processor of a record, and on the GPU of the suite's record.
fn speeds(dir: &str, folder: &Path, results: &Results, overview: &Overview<'_>) -> Result<String> {
    let profile = &results.setup.profile;
    let mut table = Tabular::new("speeds", "Speed", "tokens per second");
    table.extend(["dense", "DSMoE, 3 of 8 active", "PyTorch, dense"]);
    for [work, dense, ours] in overview.speeds() {
        let work = format!("{work}, {}", profile.name);
        table.row([work, dense, ours, "–".to_owned()].map(Cell::from).to_vec());
    }
    let gpu = Path::new(dir).with_file_name(GPU);
    let found: Value = read_json(&folder.join(&gpu))?;
    let stages = found["stages"].as_array().into_iter().flatten();
    let rows: Vec<&Value> = stages
        .filter(|stage| stage["name"] == "large")
        .filter_map(|stage| stage["rows"].as_array())
        .flatten()
        .collect();
    for (work, shown) in [("train 1B", "training"), ("decode 1B", "decode")] {
        let rate = |is: &dyn Fn(&str) -> bool| {
            let row = rows
                .iter()
                .find(|row| row["what"].as_str().and_then(|what| what.strip_prefix(work)).is_some_and(is));
            let rate = row.and_then(|row| row["tokens_per_s"].as_f64());
            rate.with_context(|| format!("{}: no rate of {work}", gpu.display()))
        };
        let rates = [
            rate(&|rest| rest == " dense")?,
            rate(&|rest| rest.starts_with(" dsmoe"))?,
            rate(&|rest| rest.ends_with(" torch") || rest.ends_with(" transformers"))?,
        ];
        let [dense, ours, other] = rates.map(|rate| format::count(rate.round() as u64));
        let work = format!("{shown}, Llama 3.2 1B's shape, one H100");
        table.row([work, dense, ours, other].map(Cell::from).to_vec());
    }
    table.note =
        format!("All in bf16; `{dir}`, revision {}, and `{}`.", results.setup.git_revision, gpu.display());
    Ok(format!("\n{}\n", markdown::bare_table(&table)))
}

fn block_text(dir: &str, results: &Results) -> String {
    let Setup { git_revision, budget, dense_params, profile, .. } = &results.setup;
    let seeds = results.methods.iter().map(|method| method.seeds.len()).max().unwrap_or(0);
    let tokens = results.methods.iter().map(|method| method.tokens).filter(|tokens| *tokens > 0).min();
    let mut out = format!(
        "\nProfile {}: a dense model of {} parameters, {} activated parameters for every method ({} % of the FFNs, and\n\
         routers), {} tokens of continued training, {} {}, 95 % intervals; `{dir}`, revision {git_revision}.\n\n",
        profile.name,
        format::amount(*dense_params as f64),
        format::amount(*budget),
        100.0 * profile.active,
        format::amount(tokens.unwrap_or(0) as f64),
        seeds,
        if seeds == 1 { "seed" } else { "seeds" },
    );
    if !profile.budgets.is_empty() {
        out += &markdown::bare_table(&frontier::table(results, profile.active));
        let chart = frontier::CHART;
        let _ = write!(out, "\n![Loss over the dense model's by budget]({dir}/charts/{chart}.svg)\n\n");
        return out;
    }
    out += "| method | activated | of the budget | perplexity before training | after training | interval | tasks right, % | ";
    let _ = writeln!(out, "{} is |", results.first_dsmoe().unwrap_or("DSMoE"));
    out += "|---|---|---|---|---|---|---|---|\n";
    let dash = || "–".to_owned();
    for method in &results.methods {
        let made = method.milestone(0.0);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {:.3} | {} | {} | {} |",
            method.name,
            format::amount(method.params_activated.mean),
            format::percent(method.of_budget),
            made.map_or_else(dash, |stone| format!("{:.3}", stone.ppl.mean)),
            method.ppl.mean,
            method.ppl.interval.map_or_else(dash, |[low, high]| format!("{low:.3} to {high:.3}")),
            method.tasks_mean.map_or_else(dash, |mean| format!("{mean:.1}")),
            results.verdict_on(method).map_or("", Verdict::text),
        );
    }
    let _ = write!(out, "\n![Perplexity against FLOPs of a token]({dir}/{CHART})\n\n");
    out
}

#[cfg(test)]
mod tests {
    use super::super::profile::Profile;
    use super::*;

    #[test]
    fn blocks_are_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let record = folder.path().join("record");
        std::fs::create_dir(&record).unwrap();
        let measured =
            |mean: f64| json!({ "mean": mean, "interval": [mean - 1.0, mean + 1.0], "values": [] });
        let method = |name: &str, ppl: f64| {
            json!({
                "name": name, "role": (name == "wanda").then_some("baseline"), "seeds": [0, 1], "calibration_tokens": 0, "tokens": 2048, "params_total": 2000.0,
                "params_activated": measured(1000.0), "of_budget": 1.0, "flops_per_token": 1.0, "ppl": measured(ppl),
                "nll": measured(1.0), "domains": [], "tasks": [], "sweep": [],
                "milestones": [{ "share": 0.0, "tokens": 0, "ppl": measured(9.0), "params_activated": 1000.0 }],
            })
        };
        let profile = Profile::load("quick").unwrap();
        let results = json!({
            "format_version": 1,
            "setup": {
                "format_version": 1, "program": "dsmoe", "git_revision": "abc", "profile": profile, "outputs": [],
                "runs": [], "inputs": null, "tokens_per_source": 1, "budget": 1000.0, "dense_params": 2000,
                "num_layers": 6,
            },
            "machines": [], "seeds": [], "shapes": [], "directions": [],
            "methods": [method("dsmoe", 5.0), method("wanda", 6.5)],
            "comparisons": [{
                "dsmoe": "dsmoe", "other": "wanda", "difference": 0.1, "test": "", "seeds": 1, "verdict": "better",
            }],
        });
        std::fs::write(record.join("results.json"), results.to_string()).unwrap();
        let text = "a\n<!-- reproduce record -->\nold\n<!-- /reproduce -->\nb\n";
        let (once, charts) = splice(text, folder.path()).unwrap();
        assert!(charts.is_empty());
        assert!(once.starts_with("a\n<!-- reproduce record -->\n\nProfile quick:"), "{once}");
        assert!(
            once.contains("| wanda | 1.0 k | 100.0 % | 9.000 | 6.500 | 5.500 to 7.500 | – | better |"),
            "{once}"
        );
        assert!(once.contains("](record/charts/pareto-chart.svg)") && !once.contains("old"), "{once}");
        assert!(once.ends_with("<!-- /reproduce -->\nb\n"), "{once}");
        assert_eq!(splice(&once, folder.path()).unwrap().0, once);
        let parts = "<!-- reproduce record brief -->\n<!-- /reproduce -->\n<!-- reproduce record figure -->\n<!-- /reproduce -->\n";
        let (spliced, charts) = splice(parts, folder.path()).unwrap();
        assert!(spliced.contains("| wanda | 1.0 k (100 %) | 9.000 | 2.718 |"), "{spliced}");
        assert!(spliced.contains("](record/charts/overview-parameters.svg)"), "{spliced}");
        assert!(charts.len() == 1 && charts[0].text.contains(">wanda<"));
        for (bad, says) in [
            ("<!-- reproduce record chart -->\n<!-- /reproduce -->", "line 1: `chart` is no part"),
            ("nothing", "no block"),
            ("<!-- reproduce record -->\nx", "line 1: no"),
            ("\n<!-- reproduce record", "line 2: `<!-- reproduce DIR -->`"),
            ("<!-- reproduce other -->\n<!-- /reproduce -->", "results.json"),
        ] {
            let error = format!("{:#}", splice(bad, folder.path()).err().unwrap());
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}
