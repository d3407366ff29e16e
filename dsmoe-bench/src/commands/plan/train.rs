//! `dsmoe plan train`: the heads that predict what a budget costs.

use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_baselines::plan::{Curves, Fit};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::profile::Profile;
use crate::cli::plan::{HeadArgs, PlanTrain};
use crate::files::{read_part, write_part};
use crate::format;
use crate::planning::heads::{fitted, passes};
use crate::planning::requests::Profiled;
use crate::ui::Ui;

const HEADS: &str = "heads.json";

/// A trained network, with what it was trained on.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Heads {
    model_sha256: String,
    heads: usize,
    epochs: usize,
    seed: u64,
    pub(super) curves: Curves,
}

impl Heads {
    /// Reads the network in the folder `plan` of that profile.
    pub(super) fn read(plan: &Path, profile: &Profile) -> Result<Heads> {
        let path = plan.join(HEADS);
        if !path.is_file() {
            bail!("{}: holds no network; train one with dsmoe plan train", plan.display());
        }
        let heads: Heads = read_part(&path)?;
        heads.curves.check(profile.shares.len()).with_context(|| path.display().to_string())?;
        if heads.model_sha256 != profile.model_sha256 {
            bail!("{}: the network of another profile; train it again with dsmoe plan train", path.display());
        }
        Ok(heads)
    }
}

pub(super) fn run(args: &PlanTrain, ui: &mut Ui) -> Result<()> {
    let profile = Profile::read(&args.plan)?;
    let path = args.plan.join(HEADS);
    if path.is_dir() {
        bail!("{} is a folder where the network is to be written; remove it", path.display());
    }
    let rows: Vec<&Profiled> = profile.requests.iter().collect();
    let fit = fit_of(&args.heads);
    let heads = usize::from(args.heads.heads);
    if args.dry_run {
        let (passes, replaces) = (passes(fit, heads), path.is_file());
        let planned = json!({
            "plan": args.plan.display().to_string(), "heads": heads, "epochs": fit.epochs, "seed": fit.seed,
            "requests": rows.len(), "budgets": profile.shares.len(), "passes": passes, "replaces": replaces,
        });
        return ui.result(&planned, |_| {
            let network = if replaces { "replaces the one in" } else { "to be written to" };
            format::fields([
                ("heads", heads.to_string()),
                ("requests", format::count(rows.len() as u64)),
                ("budgets", profile.shares.len().to_string()),
                ("passes over requests", format::count(passes as u64)),
                ("network", format!("{network} {}", path.display())),
            ])
        });
    }
    let curves = fitted(&rows, heads, fit, ui)?;
    let error = |row: &&Profiled| -> Result<f64> {
        let predicted = curves.predict(&row.features)?;
        let policy = dsmoe_baselines::plan::Policy { kappa: 0.0 };
        let expected = policy.expected(&predicted);
        Ok(expected.iter().zip(row.extra()).map(|(q, t)| (q - t).powi(2)).sum::<f64>()
            / expected.len() as f64)
    };
    let errors = rows.iter().map(error).collect::<Result<Vec<f64>>>()?;
    let squared_error = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
    let made = Heads {
        model_sha256: profile.model_sha256.clone(),
        heads,
        epochs: fit.epochs,
        seed: fit.seed,
        curves,
    };
    write_part(&path, &made)?;
    let result = json!({
        "plan": args.plan.display().to_string(), "heads": heads, "requests": rows.len(), "squared_error": squared_error,
    });
    ui.result(&result, |_| {
        format::fields(vec![
            ("heads", heads.to_string()),
            ("requests", format::count(rows.len() as u64)),
            ("squared error", format!("{squared_error:.5}, on the requests that were learnt")),
        ])
    })
}

/// Returns how a network is fitted.
pub(super) fn fit_of(args: &HeadArgs) -> Fit {
    Fit { epochs: args.epochs as usize, seed: args.seed, ..Fit::default() }
}
