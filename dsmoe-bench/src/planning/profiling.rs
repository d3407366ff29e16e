//! Measures requests at every budget of a model: the share of experts that each opens, its loss, and the features of its prompt.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dsmoe_core::Inference;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::model::{Batch, Workspace};
use dsmoe_kernels::cross_entropy::IGNORE;
use serde::{Deserialize, Serialize};

use super::requests::{Profiled, Request};
use crate::files::done_or;
use crate::progress::{Progress, Unit};
use crate::ui::Ui;

/// Requests of one forward pass.
const TOGETHER: usize = 8;
const NO_EXPERTS: &str = "the model has no experts to choose among";

/// The measurements of one budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Point {
    /// Share of the experts that all requests opened.
    pub(crate) active: f64,
    /// Share that each opened, prompt and continuation.
    shares: Vec<f64>,
    /// Mean losses of the continuations, nats.
    losses: Vec<f64>,
    pub(crate) times: Times,
}

/// Speeds at a budget, tokens a second; none where they were not measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Times {
    pub(crate) prefill: Option<f64>,
    pub(crate) decode: Option<f64>,
}

/// Requests that are measured at every budget.
pub(crate) struct Profiling<'a> {
    pub(crate) requests: &'a [Request],
    /// Tokens of a prompt.
    pub(crate) prompt: usize,
    /// The budgets, ascending, as shares of the experts.
    pub(crate) shares: &'a [f64],
    /// The folder of finished parts: the features, and each budget. A later call continues behind them.
    pub(crate) folder: &'a Path,
    /// Is asked between pieces of work, and ends it by an error.
    pub(crate) stop: fn() -> Result<()>,
}

impl Profiling<'_> {
    /// Returns a row for each request, and the measurements of the budgets. `time` measures speeds at the budget that the model is
    /// set to.
    ///
    /// # Errors
    /// The model does not serve a budget; a part is of other requests; that of `stop` or `time`; the file system refuses.
    pub(crate) fn run(
        &self,
        model: &mut Inference,
        time: &dyn Fn(&Inference) -> Result<Times>,
        ui: &Ui,
    ) -> Result<(Vec<Profiled>, Vec<Point>)> {
        let Profiling { requests, shares, folder, .. } = *self;
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let least = shares.first().copied().unwrap_or(1.0);
        model.set_active(least)?;
        let path = folder.join("features.json");
        let features: Vec<Vec<f64>> = done_or(&path, || self.features(model, ui))?;
        check(&path, features.len(), requests.len())?;
        let mut points = Vec::new();
        for share in shares {
            model.set_active(*share)?;
            let path = folder.join(format!("{share}.json"));
            let point: Point = done_or(&path, || {
                let point = self.score(model, ui)?;
                Ok(Point { times: time(model)?, ..point })
            })?;
            check(&path, point.losses.len().min(point.shares.len()), requests.len())?;
            points.push(point);
            (self.stop)()?;
        }
        let rows = requests.iter().zip(features).enumerate().map(|(i, (request, features))| Profiled {
            source: request.source,
            features,
            active: points.iter().map(|point| point.shares[i]).collect(),
            losses: points.iter().map(|point| point.losses[i]).collect(),
        });
        Ok((rows.collect(), points))
    }

    fn features(&self, model: &Inference, ui: &Ui) -> Result<Vec<Vec<f64>>> {
        Progress::during(ui, "prompts", Unit::Parts, |show| {
            let of = |(i, request): (usize, &Request)| {
                show(i as u64 + 1, self.requests.len() as u64);
                (self.stop)()?;
                features_of(model, &request.ids[..self.prompt])
            };
            self.requests.iter().enumerate().map(of).collect()
        })
    }

    /// Measures the budget that `model` is set to.
    fn score(&self, model: &Inference, ui: &Ui) -> Result<Point> {
        let mut stats = model.new_stats().context(NO_EXPERTS)?.traced();
        let mut workspace = Workspace::default();
        let seq = self.requests.first().map_or(1, |request| request.ids.len() - 1);
        let losses = Progress::during(ui, "continuations", Unit::Parts, |show| -> Result<Vec<f64>> {
            let mut all = Vec::new();
            for together in self.requests.chunks(TOGETHER) {
                (self.stop)()?;
                let of = |range: std::ops::Range<usize>| -> Vec<u32> {
                    together.iter().flat_map(|request| &request.ids[range.clone()]).copied().collect()
                };
                let (inputs, targets) = (of(0..seq), of(1..seq + 1));
                let mut losses = vec![0.0; inputs.len()];
                let batch = Batch { inputs: &inputs, targets: &targets, seq };
                model.score(&mut losses, batch, Some(&mut stats), &mut workspace)?;
                let mean = |losses: &[f32]| {
                    let behind = &losses[self.prompt - 1..];
                    behind.iter().map(|&x| f64::from(x)).sum::<f64>() / behind.len() as f64
                };
                all.extend(losses.chunks(seq).map(mean));
                show(all.len() as u64, self.requests.len() as u64);
            }
            Ok(all)
        })?;
        let of_all = stats.num_layers() as f64 * Accounting::of(model.config()).num_experts * seq as f64;
        let share = |active: &[u32]| active.iter().map(|&count| f64::from(count)).sum::<f64>() / of_all;
        let shares = stats.active_of_tokens().chunks(seq).map(share).collect();
        Ok(Point { active: stats.active_ratio(), shares, losses, times: Times::default() })
    }
}

/// Refuses a part of another number of requests.
fn check(path: &Path, found: usize, wanted: usize) -> Result<()> {
    ensure!(found == wanted, "{}: has {found} requests of {wanted}; remove it", path.display());
    Ok(())
}

/// Returns the features of a prompt, at the budget that `model` is set to: mean and deviation of the prompt's own loss, and how
/// often each expert opens by layer, and how many open.
pub(crate) fn features_of(model: &Inference, prompt: &[u32]) -> Result<Vec<f64>> {
    let mut stats = model.new_stats().context(NO_EXPERTS)?;
    let targets: Vec<u32> = prompt[1..].iter().copied().chain([IGNORE]).collect();
    let (mut losses, mut workspace) = (vec![0.0; prompt.len()], Workspace::default());
    let batch = Batch { inputs: prompt, targets: &targets, seq: prompt.len() };
    model.score(&mut losses, batch, Some(&mut stats), &mut workspace)?;
    let losses = &losses[..prompt.len() - 1];
    let count = losses.len() as f64;
    let mean = losses.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let square = losses.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
    let counts = stats.counts().map(|count| count as f64 / prompt.len() as f64);
    Ok([mean, square.sqrt()].into_iter().chain(counts).collect())
}
