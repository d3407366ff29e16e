//! Scores of layers, and the layers to remove.

use std::path::Path;

use dsmoe_core::calibrate::LayerStream;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::model::Model;

use super::Choice;
use crate::divergence::Divergence;
use crate::error::{Error, Result};
use crate::method::{Job, Progress};

/// A choice of layers to remove.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choose {
    pub(super) choice: Choice,
    /// Layers that stay.
    pub(super) count: usize,
    /// All layers.
    pub(super) layers: usize,
}

/// Layers to remove, ascending, and measurements.
pub(super) type Chosen = (Vec<usize>, Vec<(String, f64)>);

impl Choose {
    fn removed(self) -> usize {
        self.layers - self.count
    }

    /// Chooses by the divergence of the final distribution on `text`.
    pub(super) fn by_kl(
        self,
        dir: &Path,
        text: &[Vec<u32>],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Chosen> {
        if self.removed() == 0 {
            return Ok((Vec::new(), Vec::new()));
        }
        let precision = Checkpoint::open(dir)?.precision();
        let mut divergence = Divergence::new(Model::load(dir)?, precision, text)?;
        self.choose(&mut |layers| without(&mut divergence, layers), progress)
    }

    /// Chooses by the angle between the residual stream before and after layers on `text`.
    pub(super) fn by_angle(
        self,
        job: &Job<'_>,
        text: &[Vec<u32>],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Chosen> {
        if self.removed() == 0 {
            return Ok((Vec::new(), Vec::new()));
        }
        let mut stream = LayerStream::open_on(job.comm, job.model, text)?;
        let hidden = stream.config().hidden;
        let mut states = vec![stream.states().to_vec()];
        for i in 0..self.layers {
            progress(Progress { stage: "states", done: i as u64, total: self.layers as u64 });
            let weights = stream.layer(i)?;
            stream.advance(&weights)?;
            states.push(stream.states().to_vec());
        }
        let mut score = |layers: &[usize]| {
            let (first, last) = (layers[0], layers[layers.len() - 1]);
            finite(angle(&states[first], &states[last + 1], hidden), "the residual stream")
        };
        self.choose(&mut score, progress)
    }

    /// Chooses by a score of sets of layers.
    pub(super) fn choose(
        self,
        score: &mut dyn FnMut(&[usize]) -> Result<f64>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Chosen> {
        let (n, layers) = (self.removed(), self.layers);
        let mut measured = Vec::new();
        let mut report = |done: usize, total: usize| {
            progress(Progress { stage: "scores", done: done as u64, total: total as u64 });
        };
        let removed = match self.choice {
            Choice::Independent => {
                let mut scores = Vec::with_capacity(layers);
                for i in 0..layers {
                    report(i, layers);
                    scores.push(score(&[i])?);
                    measured.push((format!("layer {i} score"), scores[i]));
                }
                let mut order: Vec<usize> = (0..layers).collect();
                order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
                order.truncate(n);
                order.sort_unstable();
                order
            }
            Choice::Consecutive => {
                let mut best = (f64::INFINITY, Vec::new());
                for first in 0..=layers - n {
                    report(first, layers - n + 1);
                    let block: Vec<usize> = (first..first + n).collect();
                    let of_block = score(&block)?;
                    measured.push((format!("layers {first} to {} score", first + n - 1), of_block));
                    if of_block < best.0 {
                        best = (of_block, block);
                    }
                }
                best.1
            }
            Choice::Greedy => {
                let mut removed: Vec<usize> = Vec::new();
                for step in 0..n {
                    report(step, n);
                    let mut best = (f64::INFINITY, 0);
                    for i in (0..layers).filter(|i| !removed.contains(i)) {
                        let mut with = removed.clone();
                        with.push(i);
                        with.sort_unstable();
                        let of_set = score(&with)?;
                        if of_set < best.0 {
                            best = (of_set, i);
                        }
                    }
                    measured.push((format!("step {step}: score without layer {}", best.1), best.0));
                    removed.push(best.1);
                }
                removed.sort_unstable();
                removed
            }
        };
        Ok((removed, measured))
    }
}

/// Returns the mean over rows of the angle between `a` and `b`, as a share of pi.
pub(super) fn angle(a: &[f32], b: &[f32], hidden: usize) -> f64 {
    let rows = a.chunks_exact(hidden).zip(b.chunks_exact(hidden));
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    let of = |(a, b): (&[f32], &[f32])| {
        let norms = (dot(a, a) * dot(b, b)).sqrt();
        let cosine = if norms > 0.0 { dot(a, b) / norms } else { 1.0 };
        cosine.clamp(-1.0, 1.0).acos() / std::f64::consts::PI
    };
    let sum: f64 = rows.map(of).sum();
    sum / (a.len() / hidden).max(1) as f64
}

fn finite(score: f64, place: &str) -> Result<f64> {
    match score.is_finite() {
        true => Ok(score),
        false => Err(Error::numeric(place, "is not finite", "check the model with eval")),
    }
}

/// Returns the divergence of the model without `layers`, which are removed by zeros for what they add to the residual
/// stream.
pub(super) fn without(divergence: &mut Divergence<'_>, layers: &[usize]) -> Result<f64> {
    const ADDING: [&str; 5] = [
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
        "mlp.output_bias",
    ];
    let names = layers.iter().flat_map(|i| ADDING.map(|name| format!("model.layers.{i}.{name}")));
    let layout = divergence.model().layout();
    let zeros =
        |name: String| layout.get(&name).map(|entry| entry.range.len()).map(|len| (name, vec![0.0; len]));
    let changes = names.filter_map(zeros).collect();
    divergence.with(changes)
}
