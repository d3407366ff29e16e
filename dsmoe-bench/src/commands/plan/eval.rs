//! `dsmoe plan eval`: are budgets by request of use?

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::placing::{Placing, compare, scene_of};
use super::profile::Profile;
use super::train::fit_of;
use crate::cli::plan::PlanEval;
use crate::format::{self, Table};
use crate::planning::compare::{Sides, Split, Terms, Way};
use crate::planning::heads::passes;
use crate::planning::requests::Profiled;
use crate::ui::Ui;

/// Every so many requests of a source one is held out.
const HELD_OUT: usize = 4;

pub(super) fn run(args: &PlanEval, ui: &mut Ui) -> Result<()> {
    let profile = Profile::read(&args.plan)?;
    let target = target(args, &profile)?;
    let placing = match args.scenes {
        0 => None,
        _ => Some(scene_of(&args.server, profile.timed(&args.plan)?)?),
    };
    let splits = splits(args, &profile)?;
    if args.dry_run {
        return plan(args, profile.shares[target], &splits, ui);
    }
    let (heads, fit) = (usize::from(args.heads.heads), fit_of(&args.heads));
    let terms = Terms { shares: &profile.shares, target, heads, fit };
    let rows = splits.iter().map(|sides| terms.compare(sides, ui)).collect::<Result<Vec<Split>>>()?;
    let placed = match &placing {
        None => Vec::new(),
        Some(scene) => {
            let curves: Vec<Vec<f64>> = profile
                .requests
                .iter()
                .map(|row| row.extra().iter().map(|extra| extra.max(0.0)).collect())
                .collect();
            compare(scene, &curves, args.scenes, args.heads.seed)
        }
    };
    let result = json!({
        "plan": args.plan.display().to_string(), "heads": args.heads.heads, "seed": args.heads.seed,
        "active": profile.shares[target], "shares": profile.shares, "splits": rows, "placements": placed,
    });
    ui.result(&result, |_| show(profile.shares[target], &rows, &placed))
}

/// Returns the number of the budget at whose share the comparison is.
fn target(args: &PlanEval, profile: &Profile) -> Result<usize> {
    let Some(active) = args.active else { return Ok(profile.shares.len() / 2) };
    match profile.shares.iter().position(|share| (share - active).abs() < 1e-9) {
        Some(at) => Ok(at),
        None => {
            let known: Vec<String> = profile.shares.iter().map(ToString::to_string).collect();
            bail!("--active {active}: the plan has the budgets {}", known.join(", "))
        }
    }
}

/// Returns which requests are held out of every source alike.
fn held_out_rows(profile: &Profile) -> Vec<bool> {
    let mut seen = vec![0usize; profile.sources.len()];
    let mut is_held = |row: &Profiled| {
        seen[row.source] += 1;
        seen[row.source].is_multiple_of(HELD_OUT)
    };
    profile.requests.iter().map(&mut is_held).collect()
}

/// Returns the splits: every fourth request held out, and every source where there are several.
fn splits<'a>(args: &PlanEval, profile: &'a Profile) -> Result<Vec<Sides<'a>>> {
    let mut splits = vec![Sides::new("every fourth", &profile.requests, &held_out_rows(profile))];
    if profile.sources.len() > 1 {
        let sources = profile.sources.iter().enumerate();
        splits.extend(sources.map(|(number, name)| Sides::of_source(name, &profile.requests, number)));
    }
    if splits.iter().any(|sides| sides.learnt.is_empty() || sides.asked.is_empty()) {
        bail!("{}: too few requests to hold some out; profile with more --requests", args.plan.display());
    }
    Ok(splits)
}

/// Prints what would be learnt and asked at a mean share.
fn plan(args: &PlanEval, share: f64, splits: &[Sides<'_>], ui: &mut Ui) -> Result<()> {
    let (fit, heads) = (fit_of(&args.heads), usize::from(args.heads.heads));
    // Every split trains a network of one head beside the ensemble.
    let passes = splits.len() * (passes(fit, 1) + passes(fit, heads));
    let row = |sides: &Sides<'_>| -> Value {
        json!({ "held_out": sides.held_out, "learnt": sides.learnt.len(), "requests": sides.asked.len() })
    };
    let planned = json!({
        "plan": args.plan.display().to_string(), "heads": heads, "epochs": fit.epochs, "seed": fit.seed,
        "active": share, "splits": splits.iter().map(row).collect::<Vec<_>>(), "passes": passes,
        "scenes": args.scenes,
    });
    ui.result(&planned, |_| {
        let mut table = Table::new(["not learnt", "requests", "learnt"]);
        for sides in splits {
            let counts = [sides.asked.len(), sides.learnt.len()].map(|count| format::count(count as u64));
            table.row([sides.held_out.clone()].into_iter().chain(counts));
        }
        let fields = format::fields([
            ("mean share", format::percent(share)),
            ("heads", heads.to_string()),
            ("passes over requests", format::count(passes as u64)),
            ("sets that are placed", format::count(args.scenes as u64)),
        ]);
        format!("{fields}\n{}", table.show())
    })
}

fn show(share: f64, splits: &[Split], placed: &[Placing]) -> String {
    let mut table = Table::new([
        "not learnt",
        "requests",
        "one budget",
        "by chance",
        "one head",
        "ensemble",
        "cautious",
        "oracle",
        "error, one",
        "error, ensemble",
    ]);
    for split in splits {
        let nats = |value: f64| format!("{value:+.4}");
        let error = |way: &Way| format::or_dash(way.error, |error| format!("{error:.5}"));
        table.row([
            split.held_out.clone(),
            split.requests.to_string(),
            nats(split.one_budget.loss),
            nats(split.by_chance.loss),
            nats(split.one_head.loss),
            nats(split.ensemble.loss),
            nats(split.cautious.loss),
            nats(split.oracle),
            error(&split.one_head),
            error(&split.ensemble),
        ]);
    }
    let mut text = format!(
        "Extra loss at the mean share that a budget of {} opens, nats over the largest budget; the oracle is a bound, no \
         method\n\n{}",
        format::percent(share),
        table.show()
    );
    if placed.is_empty() {
        return text;
    }
    let mut table =
        Table::new(["requests", "placement", "cost over the first", "deadlines missed", "decision"]);
    for row in placed {
        table.row([
            row.requests.to_string(),
            row.way.to_owned(),
            format!("{:.3}", row.cost),
            format::percent(row.missed),
            format!("{:.1} us", 1e6 * row.seconds),
        ]);
    }
    text += &format!("\n{}", table.show());
    text
}
