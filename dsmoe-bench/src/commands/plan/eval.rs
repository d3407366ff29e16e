//! `dsmoe plan eval`: are budgets by request of use?

use anyhow::{Result, bail};
use dsmoe_baselines::plan::{Policy, at_mean_share, least_at_mean_share};
use dsmoe_kernels::rng::Rng;
use serde::Serialize;
use serde_json::{Value, json};

use super::placing::{Placing, compare, scene_of};
use super::profile::{Profile, Profiled};
use super::train::{fit_of, fitted, passes};
use crate::cli::plan::PlanEval;
use crate::format::{self, Table};
use crate::ui::Ui;

/// Every so many requests of a source one is held out.
const HELD_OUT: usize = 4;
/// Shuffles of the budgets that chance stands for.
const SHUFFLES: u64 = 50;
const SHUFFLE_STREAM: u64 = 0x7368_7566;

/// The cost of budgets by request on one split, mean over requests, in nats over the largest budget.
#[derive(Clone, Debug, Serialize)]
struct Split {
    /// The text that was not learnt.
    held_out: String,
    requests: usize,
    /// One budget for all: the share that the others keep to.
    one_budget: f64,
    /// The ensemble's own budgets, dealt out by chance.
    by_chance: f64,
    one_head: f64,
    ensemble: f64,
    /// With one deviation of the heads added.
    cautious: f64,
    /// Knows the losses that it is to predict, and may mix budgets of a request: a bound, no method.
    oracle: f64,
    /// Mean squared errors of the predictions.
    error_one_head: f64,
    error_ensemble: f64,
}

/// The requests of one split.
struct Sides<'a> {
    held_out: String,
    learnt: Vec<&'a Profiled>,
    asked: Vec<&'a Profiled>,
}

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
    let mut rows = Vec::new();
    for sides in &splits {
        rows.push(split(args, &profile, sides, target, ui)?);
    }
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
    let mut splits = vec![(String::from("every fourth"), held_out_rows(profile))];
    if profile.sources.len() > 1 {
        for (number, name) in profile.sources.iter().enumerate() {
            let is_held = profile.requests.iter().map(|row| row.source == number).collect();
            splits.push((name.clone(), is_held));
        }
    }
    let sides = |(held_out, is_held): (String, Vec<bool>)| {
        let side = |held: bool| -> Vec<&'a Profiled> {
            profile.requests.iter().zip(&is_held).filter(|(_, is)| **is == held).map(|(row, _)| row).collect()
        };
        let (learnt, asked) = (side(false), side(true));
        if learnt.is_empty() || asked.is_empty() {
            bail!("{}: too few requests to hold some out; profile with more --requests", args.plan.display());
        }
        Ok(Sides { held_out, learnt, asked })
    };
    splits.into_iter().map(sides).collect()
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

/// Trains on what is not held out, and chooses budgets for what is.
fn split(args: &PlanEval, profile: &Profile, sides: &Sides<'_>, target: usize, ui: &Ui) -> Result<Split> {
    let Sides { held_out, learnt, asked } = sides;
    let fit = fit_of(&args.heads);
    let one = fitted(learnt, 1, fit, ui)?;
    let several = fitted(learnt, usize::from(args.heads.heads), fit, ui)?;
    let expected = |curves: &dsmoe_baselines::plan::Curves, kappa: f64| -> Result<Vec<Vec<f64>>> {
        let of = |row: &&Profiled| Ok(Policy { kappa }.expected(&curves.predict(&row.features)?));
        asked.iter().map(of).collect()
    };
    let truth: Vec<Vec<f64>> = asked.iter().map(|row| row.extra()).collect();
    let (shares, share) = (&profile.shares[..], profile.shares[target]);
    let count = asked.len() as f64;
    let cost = |chosen: &[usize]| chosen.iter().zip(&truth).map(|(&j, row)| row[j]).sum::<f64>() / count;
    let by = |costs: &[Vec<f64>]| cost(&at_mean_share(costs, shares, share));
    let error = |costs: &[Vec<f64>]| {
        let squares = costs.iter().flatten().zip(truth.iter().flatten()).map(|(q, t)| (q - t).powi(2));
        squares.sum::<f64>() / (count * shares.len() as f64)
    };
    let (of_one, of_several) = (expected(&one, 0.0)?, expected(&several, 0.0)?);
    let chosen = at_mean_share(&of_several, shares, share);
    let by_chance = (0..SHUFFLES).map(|number| {
        let (mut rng, mut dealt) = (Rng::new(args.heads.seed, SHUFFLE_STREAM + number), chosen.clone());
        for i in (1..dealt.len()).rev() {
            dealt.swap(i, rng.below(i as u64 + 1) as usize);
        }
        cost(&dealt)
    });
    Ok(Split {
        held_out: held_out.clone(),
        requests: asked.len(),
        one_budget: cost(&vec![target; asked.len()]),
        by_chance: by_chance.sum::<f64>() / SHUFFLES as f64,
        one_head: by(&of_one),
        ensemble: cost(&chosen),
        cautious: by(&expected(&several, 1.0)?),
        oracle: least_at_mean_share(&truth, shares, share),
        error_one_head: error(&of_one),
        error_ensemble: error(&of_several),
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
        table.row([
            split.held_out.clone(),
            split.requests.to_string(),
            nats(split.one_budget),
            nats(split.by_chance),
            nats(split.one_head),
            nats(split.ensemble),
            nats(split.cautious),
            nats(split.oracle),
            format!("{:.5}", split.error_one_head),
            format!("{:.5}", split.error_ensemble),
        ]);
    }
    let mut text = format!(
        "Extra loss at a mean share of {}, nats over the largest budget; the oracle is a bound, no method\n\n{}",
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
