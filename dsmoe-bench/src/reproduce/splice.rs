//! `dsmoe reproduce splice`: writes the main table and figure of recorded reproductions into Markdown files.
//!
//! ```text
//! <!-- reproduce DIR -->     DIR, relative to the file, has results.json and charts/pareto-chart.svg
//! ...                        this is replaced
//! <!-- /reproduce -->
//! ```

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::frontier;
use super::results::{Results, Verdict};
use super::setup::Setup;
use crate::files::{read, read_json, write};
use crate::format;
use crate::report::markdown;
use crate::ui::Ui;

const BEGIN: &str = "<!-- reproduce ";
const END: &str = "<!-- /reproduce -->";
const CHART: &str = "charts/pareto-chart.svg";

/// Fills the blocks of `files`; with `check`, fails if that would change one.
pub(crate) fn run(files: &[PathBuf], check: bool, ui: &mut Ui) -> Result<()> {
    let (mut changed, mut blocks) = (Vec::new(), 0);
    for path in files {
        let (text, folder) = (read(path)?, path.parent().unwrap_or(Path::new("")));
        let (spliced, found) = splice(&text, folder).with_context(|| path.display().to_string())?;
        blocks += found;
        if spliced == text {
            continue;
        }
        if check {
            bail!("{}: its tables differ from the records; run dsmoe reproduce splice {0}", path.display());
        }
        write(path, spliced)?;
        changed.push(path.display().to_string());
    }
    let files = changed.len();
    ui.result(&json!({ "files": changed, "blocks": blocks }), |_| {
        format!("{blocks} blocks, {files} files changed\n")
    })
}

/// Returns the text with its blocks replaced, and their number.
fn splice(text: &str, folder: &Path) -> Result<(String, usize)> {
    let (mut out, mut rest, mut blocks) = (String::new(), text, 0);
    while let Some(at) = rest.find(BEGIN) {
        let line = text[..text.len() - rest.len() + at].matches('\n').count() + 1;
        let (before, block) = rest.split_at(at);
        let Some((dir, body)) = block[BEGIN.len()..].split_once(" -->\n") else {
            bail!("line {line}: `{BEGIN}DIR -->` must end its line");
        };
        let Some((_, after)) = body.split_once(END) else {
            bail!("line {line}: no `{END}` follows");
        };
        let results: Results = read_json(&folder.join(dir).join("results.json"))?;
        let _ = write!(out, "{before}{BEGIN}{dir} -->\n{}{END}", block_text(dir, &results));
        (rest, blocks) = (after, blocks + 1);
    }
    if blocks == 0 {
        bail!("no block to fill; begin one with `{BEGIN}DIR -->` and end it with `{END}`");
    }
    out += rest;
    Ok((out, blocks))
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
                "name": name, "seeds": [0, 1], "calibration_tokens": 0, "tokens": 2048, "params_total": 2000.0,
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
        let (once, blocks) = splice(text, folder.path()).unwrap();
        assert_eq!(blocks, 1);
        assert!(once.starts_with("a\n<!-- reproduce record -->\n\nProfile quick:"), "{once}");
        assert!(
            once.contains("| wanda | 1.0 k | 100.0 % | 9.000 | 6.500 | 5.500 to 7.500 | – | better |"),
            "{once}"
        );
        assert!(once.contains("](record/charts/pareto-chart.svg)") && !once.contains("old"), "{once}");
        assert!(once.ends_with("<!-- /reproduce -->\nb\n"), "{once}");
        assert_eq!(splice(&once, folder.path()).unwrap().0, once);
        for (bad, says) in [
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
