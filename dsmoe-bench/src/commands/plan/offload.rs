//! `dsmoe plan offload`: the paper's own problem.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use dsmoe_baselines::plan::offload::{Imitation, imitate};
use serde_json::json;

use super::train::fit_of;
use crate::cli::plan::PlanOffload;
use crate::format::{self, Table};
use crate::interrupts::{STOP, Unpolled, catch_interrupts};
use crate::planning::heads::passes;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

pub(super) fn run(args: &PlanOffload, ui: &mut Ui) -> Result<()> {
    let (users, samples) = (usize::from(args.users), args.samples as usize);
    if args.dry_run {
        return plan(args, ui);
    }
    catch_interrupts()?;
    // The optimum of many sets of users, and a pass over them, take long.
    let _unpolled = Unpolled::begin("nothing is kept of an experiment, run it again");
    let found = Progress::during(ui, "networks", Unit::Parts, |show| {
        imitate(users, samples, usize::from(args.heads.heads), fit_of(&args.heads), &mut |done, all| {
            show(done as u64, all as u64);
            !STOP.load(Ordering::Relaxed)
        })
    });
    let found = found.context("stopped; nothing is kept of an experiment, run it again")?;
    let result = json!({ "users": users, "samples": samples, "seed": args.heads.seed, "results": found });
    ui.result(&result, |_| show(&found))
}

/// Prints what would be drawn, solved and learnt.
fn plan(args: &PlanOffload, ui: &mut Ui) -> Result<()> {
    let (samples, sets, fit) = (args.samples as usize, 1u64 << args.users, fit_of(&args.heads));
    // One network for every number of heads.
    let passes: usize = (1..=usize::from(args.heads.heads)).map(|heads| passes(fit, heads)).sum();
    let planned = json!({
        "users": args.users, "samples": samples, "learnt": samples / 2, "heads": args.heads.heads,
        "epochs": fit.epochs, "seed": fit.seed, "sets": sets, "passes": passes,
    });
    ui.result(&planned, |_| {
        let halves = [samples / 2, samples - samples / 2].map(|half| format::count(half as u64));
        format::fields([
            ("sets of users", format!("{} learnt, {} decided", halves[0], halves[1])),
            ("optimum", format!("the best of {} sets of {} users", format::count(sets), args.users)),
            ("networks", format!("{}, of 1 head and more", args.heads.heads)),
            ("passes", format::count(passes as u64)),
        ])
    })
}

fn show(found: &[Imitation]) -> String {
    let mut table =
        Table::new(["heads", "answer", "right decisions", "squared error", "cost over the optimum"]);
    for found in found {
        table.row([
            found.heads.to_string(),
            found.choice.to_owned(),
            format::percent(found.accuracy),
            format!("{:.5}", found.squared_error),
            format!("{:.4}", found.cost),
        ]);
    }
    format!("{}\nThe oracle knows the optimum: a bound, no method.\n", table.show())
}
