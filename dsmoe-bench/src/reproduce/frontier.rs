//! Methods at several budgets: distance from the dense model, tasks and time.

use super::results::{MethodResult, Results};
use crate::format;
use crate::report::{Block, Cell, Figure, Look, Point, Series, Tabular, fixed, number, optional};

/// The chart of [`blocks`].
pub(crate) const CHART: &str = "frontier-chart";

/// Returns a table for each budget, the main one first, and a chart of all.
pub(crate) fn blocks(results: &Results) -> Vec<Block> {
    let mut blocks = vec![chart(results).into()];
    let mut shares = results.setup.profile.budgets.clone();
    shares.sort_by_key(|share| *share != results.setup.profile.active);
    for share in shares {
        let table = table(results, share);
        if !table.rows.is_empty() {
            blocks.push(table.into());
        }
    }
    blocks.extend(by_text(results).into_iter().map(Block::from));
    blocks
}

/// Returns the loss of the dense model before continued training.
fn dense(results: &Results) -> f64 {
    results.methods.first().map_or(0.0, |base| base.nll.mean)
}

/// Returns the methods at a budget, those without one last.
pub(super) fn at(results: &Results, share: f64) -> impl Iterator<Item = &MethodResult> {
    let with = results.methods.iter().filter(move |method| method.active == Some(share));
    with.chain(results.methods.iter().filter(|method| method.active.is_none() && method.role.is_some()))
}

/// Compares the methods at a budget.
pub(crate) fn table(results: &Results, share: f64) -> Tabular {
    let profile = &results.setup.profile;
    let stones: Vec<f64> = profile.milestones.iter().copied().filter(|share| *share < 1.0).collect();
    let percent = 100.0 * share;
    let mut table = Tabular::new(&format!("frontier-{percent}"), &format!("{percent} % of the FFNs"), "method | active share")
        .note(
            "Nats: loss of a token minus the dense model's before continued training, mean over the texts. KL and same first \
             token: against that model, on the same text. Tasks: mean accuracy, in brackets its share of the dense model's. \
             Times: tokens per second over those of the dense model, medians of processes that take turns. A model with zeros \
             among its weights computes like the dense one.",
        );
    table.extend(stones.iter().map(|share| match *share {
        0.0 => "nats, untrained".to_owned(),
        share => format!("nats, {}", tokens_at(results, share)),
    }));
    table.extend([format!("nats, {}", tokens_at(results, 1.0))]);
    table.extend(["KL", "same first token", "tasks, %"]);
    let kinds = speeds(results);
    table.extend(kinds.iter().map(|&(threads, batch)| kind(threads, batch)));
    table.extend([format!("{} is", main(results, share).map_or("DSMoE", |method| &method.name))]);
    let dense_nll = dense(results);
    let dense_tasks = results.methods.first().and_then(|base| base.tasks_mean);
    for method in at(results, share) {
        let over = |nll: f64| number(nll - dense_nll, |nats| format!("{nats:+.3}"));
        let mut cells = vec![method.name.as_str().into(), optional(method.active_ratio, format::percent)];
        cells.extend(stones.iter().map(|share| match method.milestone(*share) {
            Some(stone) => over(stone.ppl.mean.ln()),
            None if method.untrained && *share == 0.0 => over(method.nll.mean),
            None => "–".into(),
        }));
        cells.push(if method.untrained { "–".into() } else { over(method.nll.mean) });
        let agreement = method.agreement();
        cells.push(optional(agreement.map(|found| found.0), |kl| format!("{kl:.3}")));
        cells.push(optional(agreement.map(|found| found.1), format::percent));
        cells.push(optional(method.tasks_mean, |mean| match dense_tasks {
            Some(dense) => format!("{mean:.1} ({:.0} %)", 100.0 * mean / dense),
            None => format!("{mean:.1}"),
        }));
        cells.extend(kinds.iter().map(|&kind| speed(method, kind)));
        cells.push(verdict(results, method, share));
        table.row(cells);
    }
    table
}

/// Returns DSMoE's row at a budget.
fn main(results: &Results, share: f64) -> Option<&MethodResult> {
    at(results, share).find(|method| method.is_dsmoe())
}

fn verdict(results: &Results, method: &MethodResult, share: f64) -> Cell {
    let Some(main) = main(results, share) else { return "–".into() };
    let found = results.comparisons.iter().find(|one| one.dsmoe == main.name && one.other == method.name);
    found.map_or("".into(), |one| {
        let p = one.p.map_or(String::new(), |p| {
            if p < 0.001 { " (p < 0.001)".into() } else { format!(" (p {p:.3})") }
        });
        format!("{}{p}", one.verdict.text()).into()
    })
}

/// Words the tokens of a share of the training.
pub(super) fn tokens_at(results: &Results, share: f64) -> String {
    let tokens = results.methods.iter().map(|method| method.tokens).filter(|tokens| *tokens > 0).min();
    format!("{} tokens", format::amount(share * tokens.unwrap_or(0) as f64))
}

/// Lists the kinds of work that were timed: threads, and texts side by side.
fn speeds(results: &Results) -> Vec<(usize, usize)> {
    let timed = results.methods.iter().find(|method| !method.speeds.is_empty());
    timed
        .map_or(Vec::new(), |method| method.speeds.iter().map(|point| (point.threads, point.batch)).collect())
}

fn kind(threads: usize, batch: usize) -> String {
    let what = if batch == 0 { "prefill".to_owned() } else { format!("decode, batch {batch}") };
    format!("{what}, {threads} thread{}", if threads == 1 { "" } else { "s" })
}

/// Names a kind of work: a prefill of a text, or decoding that many texts side by side.
pub(super) fn work(batch: usize) -> String {
    match batch {
        0 => "prefill".to_owned(),
        1 => "decode".to_owned(),
        _ => format!("decode of {batch}"),
    }
}

fn speed(method: &MethodResult, (threads, batch): (usize, usize)) -> Cell {
    let point = method.speeds.iter().find(|point| (point.threads, point.batch) == (threads, batch));
    optional(point.map(|point| point.gain()), |gain| format!("{gain:.2}x"))
}

/// Draws the loss over the dense model's against the budget, a line for each method.
fn chart(results: &Results) -> Figure {
    let dense_nll = dense(results);
    let mut series: Vec<Series> = Vec::new();
    for method in &results.methods {
        let (Some(share), Some(group)) = (method.active, &method.group) else { continue };
        let nats = method.nll.mean - dense_nll;
        let point = Point::new(100.0 * share, nats, format!("{}: {nats:+.3} nats", method.name));
        match series.iter_mut().find(|one| one.name == *group) {
            Some(one) => one.points.push(point),
            None => series.push(Series::new(group, Look::Line, [point])),
        }
    }
    for one in &mut series {
        one.points.sort_by(|a, b| a.x.total_cmp(&b.x));
    }
    let axes = ["% of the FFNs", "nats over the dense model"];
    Figure::new(CHART, "Loss over the dense model's by budget", axes, series)
}

/// Lists perplexity, active share and distance from the dense model by text, and the likelihoods of right answers.
fn by_text(results: &Results) -> Vec<Tabular> {
    let mut texts = Tabular::new(
        "frontier-texts",
        "By text",
        "method | text | perplexity | nats over dense | active share | KL | same first token",
    );
    let mut tasks = Tabular::new(
        "frontier-tasks",
        "By task",
        "method | task | items | right, % | loss of the right answer, nats | active share",
    );
    for method in &results.methods {
        for (at, domain) in method.domains.iter().enumerate() {
            let dense = results.methods.first().and_then(|base| base.domains.get(at));
            texts.row(vec![
                method.name.as_str().into(),
                domain.name.as_str().into(),
                fixed(domain.ppl, 3),
                optional(dense.map(|dense| (domain.ppl / dense.ppl).ln()), |nats| format!("{nats:+.3}")),
                optional(domain.active_ratio, format::percent),
                optional(domain.kl, |kl| format!("{kl:.3}")),
                optional(domain.top1, format::percent),
            ]);
        }
        for task in &method.tasks {
            tasks.row(vec![
                method.name.as_str().into(),
                task.task.as_str().into(),
                number(task.items as f64, |items| format::count(items as u64)),
                fixed(task.percent.mean, 1),
                optional(task.gold_nll, |nll| format!("{nll:.3}")),
                optional(task.active_ratio, format::percent),
            ]);
        }
    }
    [texts, tasks].into_iter().filter(|table| !table.rows.is_empty()).collect()
}
