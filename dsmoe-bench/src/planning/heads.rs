//! The networks that predict what a budget costs a request.

use anyhow::{Context, Result};
use dsmoe_baselines::plan::{Curves, Fit};

use super::requests::Profiled;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// Fits a network to rows, with progress.
pub(crate) fn fitted(rows: &[&Profiled], heads: usize, fit: Fit, ui: &Ui) -> Result<Curves> {
    let features: Vec<Vec<f64>> = rows.iter().map(|row| row.features.clone()).collect();
    let extra: Vec<Vec<f64>> = rows.iter().map(|row| row.extra()).collect();
    let passes = passes(fit, heads);
    let made = Progress::during(ui, "heads", Unit::Parts, |show| {
        Curves::fit(&features, &extra, heads, fit, &mut |done| {
            show(done as u64, passes as u64);
            true
        })
    })?;
    made.context("the training was stopped; run the command again")
}

/// Returns the passes over all requests that the fit of a network of so many heads makes.
pub(crate) fn passes(fit: Fit, heads: usize) -> usize {
    fit.epochs * if heads == 1 { 1 } else { heads + 1 }
}
