//! Results as chapters of text, tables and charts.

mod figures;
mod tables;

use super::collected::Collected;
use super::frontier;
use super::outputs::Output;
use super::overview::Overview;
use super::paper;
use super::profile::{PaperModel, Role};
use super::records::{BASE, Timing};
use super::results::{Comparison, MethodResult, Results, Verdict};
use super::shipped;
use super::statistics::Measured;
use crate::cli::values::word;
use crate::format;
use crate::report::{Block, Cell, Chapter, Report, Tabular, fixed, number, optional};

/// Writes the report.
pub(crate) fn of(collected: &Collected, results: &Results) -> Report {
    let view = View { collected, results };
    let setup = &results.setup;
    let outputs = Output::all().filter(|output| setup.outputs.contains(output));
    let mut chapters = vec![view.summary()];
    chapters.extend(outputs.filter_map(|output| view.chapter(output)));
    chapters.extend([view.directions(), view.settings()]);
    let marked = view.gated().flat_map(|row| [Some(row.name.clone()), row.group.clone()]);
    Report {
        title: "DSMoE compared with other methods".to_owned(),
        subtitle: format!("profile {}: {}", setup.profile.name, setup.profile.about),
        accent: marked.flatten().chain(["DSMoE".to_owned()]).collect(),
        chapters,
    }
}

struct View<'a> {
    collected: &'a Collected,
    results: &'a Results,
}

impl View<'_> {
    fn model(&self) -> PaperModel {
        self.results.setup.profile.paper
    }

    /// Returns the row of a role, of several budgets at the profile's.
    fn method(&self, role: Role) -> Option<&MethodResult> {
        let mut rows = self.results.methods.iter().filter(|method| method.role == Some(role));
        let main = |method: &&MethodResult| method.active == Some(self.results.setup.profile.active);
        rows.clone().find(main).or_else(|| rows.next())
    }

    fn gated(&self) -> impl Iterator<Item = &MethodResult> {
        self.results.methods.iter().filter(|method| method.is_dsmoe())
    }

    /// Returns DSMoE's row that others are compared with: the tuned one, or else the paper's.
    fn main(&self) -> Option<&MethodResult> {
        self.method(Role::Dsmoe).or_else(|| self.method(Role::Paper))
    }

    fn comparison(&self, dsmoe: &str, other: &str) -> Option<&Comparison> {
        self.results.comparisons.iter().find(|one| one.dsmoe == dsmoe && one.other == other)
    }

    /// Returns the timing of the dense model, or of a method's first seed.
    fn timing(&self, method: &MethodResult) -> Option<&Timing> {
        let id = match method.role {
            None => BASE.to_owned(),
            Some(_) => format!("{}-s{}", method.name, method.seeds.first()?),
        };
        self.collected.timings.get(&id)
    }

    fn chapter(&self, output: Output) -> Option<Chapter> {
        let (title, blocks) = match output {
            Output::Table1 => ("Table 1: perplexity at one budget", self.table1()),
            Output::Table2 => ("Table 2: ten tasks", self.table2()),
            Output::Table3 => ("Table 3: without the straight-through estimator", self.table3()),
            Output::Table4 => ("Table 4: other thresholds at inference", self.table4()),
            Output::Table5 => ("Table 5: perplexity over tokens, 1B", self.tokens(&paper::TABLE5, "table5")),
            Output::Table6 => ("Table 6: perplexity over tokens, 7B", self.tokens(&paper::TABLE6, "table6")),
            Output::Figure2 => ("Figure 2: trained without a threshold", self.figure2()),
            Output::Figure3 => ("Figure 3: active experts by layer and text", self.figure3()),
            Output::Speed => ("Speed and memory", self.speed()),
            Output::Pareto => ("Perplexity against arithmetic", self.pareto()),
            Output::Difficulty => ("Active experts against the difficulty of tokens", self.difficulty()),
            Output::Budget => ("Perplexity during training", self.budget()),
            Output::Frontier => ("Loss, tasks and time by budget", frontier::blocks(self.results)),
        };
        (!blocks.is_empty()).then(|| Chapter::new(&word(&output), title, blocks))
    }

    fn summary(&self) -> Chapter {
        let setup = &self.results.setup;
        let made = || self.results.methods.iter().filter(|method| method.name != BASE);
        let tokens = made().map(|method| method.tokens).min().unwrap_or(0);
        let more: Vec<String> = made()
            .filter(|method| method.tokens > tokens)
            .map(|method| format!(" ({} on {})", method.name, format::count(method.tokens)))
            .collect();
        let timing = |method: &MethodResult| self.timing(method);
        let overview = Overview::new(self.results, &timing);
        let mut blocks: Vec<Block> = overview.verdict().map(Block::Text).into_iter().collect();
        blocks.push(Block::Choice(overview.figures()));
        blocks.push(overview.table().into());
        blocks.extend(overview.slower().map(Block::Text));
        blocks.push(Block::Text(format!(
            "All methods start from one dense model of {} parameters. Each is reduced to {} activated parameters ({} % of \
             the FFNs, and routers) and trained on {} tokens{} of the same text. The last chapter lists all settings. {} \
             seed{}.",
            format::count(setup.dense_params),
            format::count(setup.budget.round() as u64),
            trim(100.0 * setup.profile.active),
            format::count(tokens),
            more.concat(),
            self.results.seeds.len(),
            if self.results.seeds.len() == 1 { "" } else { "s" },
        )));
        for dsmoe in self.gated() {
            let found = |verdict: Verdict, words: &str| -> Option<String> {
                let comparisons = self.results.comparisons.iter();
                let names: Vec<&str> = comparisons
                    .filter(|one| one.dsmoe == dsmoe.name && one.verdict == verdict)
                    .map(|one| one.other.as_str())
                    .collect();
                (!names.is_empty()).then(|| format!("; {words} {}", names.join(", ")))
            };
            let verdicts = [
                found(Verdict::Better, "better than"),
                found(Verdict::Worse, "worse than"),
                found(Verdict::NotSignificant, "no significant difference from"),
            ];
            let mine = self.results.directions.iter().filter(|one| one.method == dsmoe.name);
            let judged: Vec<bool> = mine.filter_map(|one| one.agrees).collect();
            blocks.push(Block::Text(format!(
                "{}: perplexity {} with {:.1} % of the budget{}. {} of {} statements of the paper that can be tested hold.",
                dsmoe.name,
                plain(dsmoe.ppl.mean),
                100.0 * dsmoe.of_budget,
                verdicts.into_iter().flatten().collect::<String>(),
                judged.iter().filter(|agrees| **agrees).count(),
                judged.len(),
            )));
        }
        if let Some(record) = shipped::compare(self.results) {
            blocks.push(Block::Text(format!("Beside the record: {}.", record.text())));
        }
        if self.results.seeds.len() == 1 {
            blocks.push(Block::Text(
                "With one seed, intervals and tests are bootstraps over held-out windows. They measure the variation \
                 between texts, not between trainings."
                    .to_owned(),
            ));
        }
        Chapter::new("summary", "Summary", blocks)
    }

    fn directions(&self) -> Chapter {
        let mut table = Tabular::new(
            "directions",
            "The paper's statements",
            "table or figure | method | the paper's statement | our result",
        );
        for one in &self.results.directions {
            table.row(vec![
                word(&one.output).into(),
                one.method.as_str().into(),
                one.statement.as_str().into(),
                agreement(one.agrees),
            ]);
        }
        let mut tests = Tabular::new(
            "tests",
            "DSMoE against every method",
            "DSMoE | other | loss of the other minus DSMoE's | 95 % | p | test | DSMoE is",
        );
        for one in &self.results.comparisons {
            tests.row(vec![
                one.dsmoe.as_str().into(),
                one.other.as_str().into(),
                number(one.difference, |x| format!("{x:+.4}")),
                one.interval.map_or("–".into(), |[low, high]| format!("{low:+.4} to {high:+.4}").into()),
                optional(one.p, p_value),
                one.test.as_str().into(),
                one.verdict.text().into(),
            ]);
        }
        Chapter::new("directions", "All statements and tests", vec![tests.into(), table.into()])
    }

    fn settings(&self) -> Chapter {
        let setup = &self.results.setup;
        let mut table = Tabular::new("settings", "Settings", "setting | value");
        let mut add = |name: &str, value: String| table.row(vec![name.into(), value.into()]);
        add("profile", format!("{}: {}", setup.profile.name, setup.profile.about));
        add("seeds", self.results.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "));
        add("program", setup.program.clone());
        add("git revision", setup.git_revision.clone());
        for machine in &self.results.machines {
            add("machine", format!("{}, {}, {}, {}", machine.cpu, machine.isa, machine.os, machine.device));
        }
        if let Some(tokenizer) = setup.inputs["tokenizer_sha256"].as_str() {
            add("tokenizer, SHA-256", tokenizer.to_owned());
        }
        for source in setup.inputs["sources"].as_array().into_iter().flatten() {
            let word = |key: &str| source[key].as_str().unwrap_or_default();
            let (tokens, weight) = (&source["tokens"], &source["weight"]);
            let value = format!("{tokens} tokens, weight {weight}, SHA-256 {}", word("sha256"));
            add(&format!("text {}", word("name")), value);
        }
        let pretrain = setup.profile.pretrain.as_ref().map(ToString::to_string);
        add("training of the dense model", pretrain.unwrap_or_else(|| "the model was given".to_owned()));
        add("continued training", setup.profile.train.to_string());
        let mut methods = Tabular::new(
            "methods",
            "Methods",
            "method | made by | settings | training settings | budget reached by | \
             calibration tokens",
        );
        for spec in &setup.profile.method {
            let Some(found) = self.results.methods.iter().find(|method| method.name == spec.name) else {
                continue;
            };
            let settings: Vec<String> = spec.settings.iter().map(|(k, v)| format!("{k} = {v}")).collect();
            let settings = if settings.is_empty() { "defaults".to_owned() } else { settings.join(", ") };
            methods.row(vec![
                spec.name.as_str().into(),
                spec.make.as_str().into(),
                settings.into(),
                spec.train.to_string().into(),
                found.reached_by.clone().unwrap_or_default().into(),
                number(found.calibration_tokens as f64, |x| format::count(x as u64)),
            ]);
        }
        Chapter::new("settings", "Settings", vec![methods.into(), table.into()])
    }
}

fn amount(value: f64) -> Cell {
    number(value, format::amount)
}

fn flops(value: f64) -> Cell {
    number(value, format::flops)
}

fn yes(is: bool) -> Cell {
    if is { "yes".into() } else { "no".into() }
}

fn agreement(agrees: Option<bool>) -> Cell {
    agrees.map_or("–", |yes| if yes { "agrees" } else { "disagrees" }).into()
}

fn mark(agrees: Option<bool>) -> Cell {
    agrees.map_or("–", |yes| if yes { "✓" } else { "✗" }).into()
}

/// Makes a cell of a number with that many decimals, or of a dash.
fn optional_fixed(value: Option<f64>, decimals: usize) -> Cell {
    value.map_or("–".into(), |value| fixed(value, decimals))
}

fn measured(value: &Measured) -> Cell {
    let tip = value.interval.map(|[low, high]| {
        format!("95 % over {}: {} to {}", value.over.as_deref().unwrap_or_default(), plain(low), plain(high))
    });
    number(value.mean, plain).tip(tip)
}

fn interval(value: &Measured) -> Cell {
    value.interval.map_or("–".into(), |[low, high]| format!("{} to {}", plain(low), plain(high)).into())
}

/// Formats a number with four digits, or with three decimals if it is small.
pub(super) fn plain(value: f64) -> String {
    match value.abs() {
        x if x >= 1e6 => format!("{value:.2e}"),
        x if x >= 1000.0 => format!("{value:.0}"),
        x if x >= 100.0 => format!("{value:.1}"),
        x if x >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn p_value(p: f64) -> String {
    if p < 0.001 { "< 0.001".to_owned() } else { format!("{p:.3}") }
}

/// Formats a number without trailing zeros.
fn trim(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
