//! `dsmoe grow`: a dense model made deeper.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::Partial;
use dsmoe_baselines::grow::{
    Fitted, GrowMethod, GrowOptions, GrownNorms, NewLayer, Space, grow_from, plan_growth,
};
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_train::identity_of;
use serde::Serialize;

use crate::calibration::Stages;
use crate::cli::grow::Grow;
use crate::files::{check_output, lossy};
use crate::format::{self, Table};
use crate::ui::Ui;

#[derive(Debug, Serialize)]
struct Report<'a> {
    #[serde(serialize_with = "lossy")]
    model: &'a Path,
    #[serde(serialize_with = "lossy", skip_serializing_if = "Option::is_none")]
    out: Option<&'a Path>,
    method: GrowMethod,
    seed: u64,
    layers: usize,
    source_layers: usize,
    /// No layer is added: the result is a copy.
    unchanged: bool,
    /// Where each layer comes from.
    origins: Vec<NewLayer>,
    /// Numbers of the new layers in the result.
    new_layers: Vec<usize>,
    params: u64,
    source_params: u64,
    /// The fits of LESA's networks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fits: Vec<Fitted>,
    seconds: f64,
}

pub(crate) fn run(args: &Grow, ui: &mut Ui) -> Result<()> {
    let started = Instant::now();
    check(args)?;
    let options = GrowOptions {
        layers: args.layers,
        fill: args.fill.clone(),
        method: args.method,
        space: args.space,
        norms: args.norms,
        epochs: args.epochs,
        penalty: args.penalty,
        seed: args.seed,
        force: args.force,
    };
    let out = args.out.as_deref().filter(|_| !args.dry_run);
    let (plan, fits) = match out {
        None => {
            args.out.as_deref().map_or(Ok(()), |out| check_output(&args.model, out, args.force))?;
            (plan_growth(&args.model, &options)?, Vec::new())
        }
        Some(out) => {
            let mut stages = Stages::new(ui);
            // Layers that are copied are not looked at otherwise.
            Checkpoint::open(&args.model)?.check_finite()?;
            // A call that is refused leaves the parts of an earlier one as they are.
            plan_growth(&args.model, &options)?;
            check_output(&args.model, out, args.force)?;
            let partial = partial(args, out, &options)?;
            let grown = grow_from(&args.model, out, &options, &partial, &mut |at| {
                stages.set(at.stage, at.done, at.total);
            });
            stages.finish();
            let grown = grown?;
            partial.remove()?;
            (grown.plan, grown.fits)
        }
    };
    let is_new = |layer: &NewLayer| matches!(layer, NewLayer::Behind(_));
    let new_layers = (0..).zip(&plan.layers).filter(|(_, layer)| is_new(layer)).map(|(i, _)| i);
    let report = Report {
        model: &args.model,
        out,
        method: args.method,
        seed: args.seed,
        layers: plan.layers.len(),
        unchanged: plan.is_unchanged(),
        source_layers: plan.source_layers,
        new_layers: new_layers.collect(),
        origins: plan.layers,
        params: plan.params,
        source_params: plan.source_params,
        fits,
        seconds: started.elapsed().as_secs_f64(),
    };
    ui.result(&report, show)
}

/// Returns the parts of the work that an interruption leaves.
fn partial(args: &Grow, out: &Path, options: &GrowOptions) -> Result<Partial> {
    // What is replaced does not change the result.
    let options = GrowOptions { force: false, ..options.clone() };
    let made_by = format!("grow {} {options:?}", identity_of(&args.model)?);
    Ok(Partial::open(out, made_by, args.resume)?)
}

/// Refuses options that the method does not read.
fn check(args: &Grow) -> Result<()> {
    let defaults = GrowOptions::new(args.layers);
    let of_lesa =
        [args.space != Space::Svd, args.epochs != defaults.epochs, args.penalty != defaults.penalty];
    if args.method != GrowMethod::Lesa && of_lesa.contains(&true) {
        bail!("--space, --epochs and --penalty are for --method lesa; leave them out");
    }
    if args.method != GrowMethod::Lesa && args.resume {
        bail!("--resume: --method lesa alone takes long enough to continue; leave it out");
    }
    let copies = [GrowMethod::Copy, GrowMethod::Identity, GrowMethod::Stack].contains(&args.method);
    if copies && args.norms != GrownNorms::Parents {
        bail!("--norms: this method copies the norms; leave it out");
    }
    if args.method == GrowMethod::Stack && args.fill != defaults.fill {
        bail!("--fill: --method stack fills no gaps; leave it out");
    }
    Ok(())
}

fn show(report: &Report<'_>) -> String {
    let place = match report.out {
        Some(out) => format!("{}:", out.display()),
        None => format!("{}: would be", report.model.display()),
    };
    let list = |layers: &[usize]| layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let mut text = format!(
        "{place} {} layers of {}, {} parameters of {}\n",
        report.layers,
        report.source_layers,
        format::count(report.params),
        format::count(report.source_params),
    );
    if report.unchanged {
        text += "  new layers: none, a copy of the model\n";
    } else if report.new_layers.is_empty() {
        let sources: Vec<usize> = report.origins.iter().map(NewLayer::source).collect();
        text += &format!("  layers of the source: {}\n", list(&sources));
    } else {
        text += &format!("  new layers: {}\n", list(&report.new_layers));
    }
    if report.out.is_some() {
        text += &format!("  time: {}\n", format::duration(report.seconds));
    }
    if report.fits.is_empty() {
        return text;
    }
    let mut table = Table::new(["matrix", "rows", "first loss", "last loss", "relative error"]);
    for fit in &report.fits {
        table.row([
            fit.matrix.clone(),
            format::count(fit.rows as u64),
            format!("{:.3e}", fit.first_loss),
            format!("{:.3e}", fit.last_loss),
            format!("{:.4}", fit.relative_error),
        ]);
    }
    format!("{text}\n{}", table.show())
}
