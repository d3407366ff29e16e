//! The importance of a group: the salience of its weights, summed per row or column and reduced over its tensors.
//!
//! ```text
//! w a weight, g its gradient (mean over sequences), F the mean over sequences of the squared gradient
//! taylor-first  s = w g          taylor-second  s = w F w        taylor-mix  s = w g - w F w / 2
//! member        sum |s| over the row or column;  vector: |sum s| with s = w g
//! group         reduced over members row by row, then summed over the rows of a head
//! ```
//!
//! (Ma, Fang, Wang 2023, eqs. 3-5; hf_llama_pruner.py. Query heads are added to the key head that serves them, where
//! that file adds every num_kv_heads-th.)

use dsmoe_core::Model;
use dsmoe_core::params::{Entry, Stored};
use dsmoe_kernels::rng::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::groups::{Axis, Groups};
use crate::error::{Error, Result};
use crate::gradients::Gradients;

/// Columns summed by one task.
const COLUMNS: usize = 64;

/// The importance of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Importance {
    /// |w g|.
    TaylorFirst,
    /// |w F w|.
    TaylorSecond,
    /// |w g - w F w / 2|.
    TaylorMix,
    /// |sum of w g|.
    Vector,
    /// |w|.
    MagnitudeL1,
    /// w^2.
    MagnitudeL2,
    /// A random number per group.
    Random,
}

impl Importance {
    pub(crate) fn needs_gradients(self) -> bool {
        matches!(self, Self::TaylorFirst | Self::TaylorSecond | Self::TaylorMix | Self::Vector)
    }
}

/// The reduction of the importances of a group's members to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduce {
    /// The sum.
    Sum,
    /// The largest.
    Max,
    /// The mean.
    Mean,
    /// The product.
    Prod,
    /// The last member's.
    Last,
}

/// The way groups are scored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scoring {
    pub(crate) importance: Importance,
    pub(crate) reduce: Reduce,
    /// Weights whose gradients and squared gradients `taylor-mix` sums at a time (8 bytes each).
    pub(crate) window: usize,
}

/// Per set of groups, per member, the importance of each index.
type Members = Vec<Vec<Vec<f64>>>;

/// A member's tensor in memory, as a matrix.
struct Matrix<'a> {
    /// Set of groups, and member within it.
    at: (usize, usize),
    entry: &'a Entry,
    rows: usize,
    cols: usize,
    /// True if indices are rows in memory.
    by_row: bool,
}

fn matrices<'a>(model: &'a Model, sets: &[Groups]) -> Vec<Matrix<'a>> {
    let matrix = |at, name: &str, axis| {
        let entry = model.layout().get(name).unwrap_or_else(|| panic!("groups: no tensor {name}"));
        let (rows, cols) = match entry.spec.shape[..] {
            [cols] => (1, cols),
            _ => (entry.spec.shape[0], entry.spec.numel() / entry.spec.shape[0]),
        };
        let by_row = (axis == Axis::Rows) == (entry.spec.stored == Stored::AsIs);
        Matrix { at, entry, rows, cols, by_row }
    };
    let members = |(i, set): (usize, &Groups)| -> Vec<Matrix<'a>> {
        set.members.iter().enumerate().map(|(j, m)| matrix((i, j), &m.tensor, m.axis)).collect()
    };
    sets.iter().enumerate().flat_map(members).collect()
}

/// The importance of every group of every set, `[sets][groups]`, and the mean loss where gradients were taken.
///
/// # Errors
/// Calibration text that cannot be used, or a number that is not finite.
pub(crate) fn group_scores(
    model: &Model,
    sets: &[Groups],
    scoring: Scoring,
    calibration: &[Vec<u32>],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Vec<Vec<f64>>, Option<f64>)> {
    let targets = matrices(model, sets);
    let mut members: Members = sets
        .iter()
        .map(|set| set.members.iter().map(|member| vec![0.0; set.count * member.width]).collect())
        .collect();
    let params = model.params();
    let loss = if scoring.importance.needs_gradients() {
        let (members, mut gradients) = (&mut members, Gradients::new(model, calibration)?);
        Some(match scoring.importance {
            Importance::TaylorMix => {
                mix(members, &targets, params, &mut gradients, scoring.window, progress)?
            }
            kind => from_gradients(members, &targets, params, kind, &mut gradients, progress)?,
        })
    } else {
        let salience = |w: f64| if scoring.importance == Importance::MagnitudeL1 { w.abs() } else { w * w };
        for target in &targets {
            let weights = &params[target.entry.range.clone()];
            add(&mut members[target.at.0][target.at.1], target, 0, weights, |w, _| salience(w));
        }
        None
    };
    let scores = sets.iter().zip(&members).map(|(set, members)| reduced(set, members, scoring.reduce));
    Ok((scores.collect::<Result<_>>()?, loss))
}

/// The kinds that need one set of gradients.
fn from_gradients(
    members: &mut Members,
    targets: &[Matrix<'_>],
    params: &[f32],
    importance: Importance,
    gradients: &mut Gradients<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<f64> {
    let sequences = gradients.calibration.len();
    let count = sequences as f64;
    let mut loss = 0.0;
    let with_gradients = |members: &mut Members, grads: &[f32], salience: fn(f64, f64) -> f64| {
        for target in targets {
            let (range, grads) = (target.entry.range.clone(), &grads[target.entry.range.clone()]);
            let sums = &mut members[target.at.0][target.at.1];
            add(sums, target, 0, &params[range], |w, i| salience(w, f64::from(grads[i])));
        }
    };
    let second = importance == Importance::TaylorSecond;
    for i in 0..sequences {
        loss += gradients.add(i)? / count;
        if second {
            with_gradients(members, &gradients.sum, |w, g| (w * g) * (w * g));
            gradients.sum.fill(0.0);
        }
        progress(i as u64 + 1, sequences as u64);
    }
    match importance {
        Importance::TaylorSecond => {}
        Importance::Vector => with_gradients(members, &gradients.sum, |w, g| w * g),
        _ => with_gradients(members, &gradients.sum, |w, g| (w * g).abs()),
    }
    members.iter_mut().flatten().flatten().for_each(|sum| *sum = sum.abs() / count);
    Ok(loss)
}

/// Whole rows of a matrix, with the sums of gradients and of their squares over sequences.
struct Piece<'a> {
    matrix: &'a Matrix<'a>,
    first_row: usize,
    sum: Vec<f32>,
    squares: Vec<f32>,
}

/// `|w g - w F w / 2|` needs two more values per weight, which a large model has no room for: the calibration text is
/// run once for every `window` weights.
fn mix(
    members: &mut Members,
    targets: &[Matrix<'_>],
    params: &[f32],
    gradients: &mut Gradients<'_>,
    window: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<f64> {
    let windows = windows(targets, window);
    let (sequences, passes) = (gradients.calibration.len(), windows.len());
    let count = sequences as f64;
    let mut loss = 0.0;
    for (pass, window) in windows.into_iter().enumerate() {
        let zeros = |(matrix, first_row, rows): (_, _, usize)| {
            let matrix: &Matrix<'_> = matrix;
            let len = rows * matrix.cols;
            Piece { matrix, first_row, sum: vec![0.0; len], squares: vec![0.0; len] }
        };
        let mut pieces: Vec<Piece<'_>> = window.into_iter().map(zeros).collect();
        loss = 0.0;
        for i in 0..sequences {
            gradients.sum.fill(0.0);
            loss += gradients.add(i)? / count;
            for Piece { matrix, first_row, sum, squares } in &mut pieces {
                let start = matrix.entry.range.start + *first_row * matrix.cols;
                let grads = &gradients.sum[start..start + sum.len()];
                sum.par_iter_mut().zip(squares).zip(grads).for_each(|((sum, square), &g)| {
                    *sum += g;
                    *square += g * g;
                });
            }
            progress((pass * sequences + i) as u64 + 1, (passes * sequences) as u64);
        }
        for Piece { matrix, first_row, sum, squares } in &pieces {
            let start = matrix.entry.range.start + first_row * matrix.cols;
            let weights = &params[start..start + sum.len()];
            let (set, member) = matrix.at;
            add(&mut members[set][member], matrix, *first_row, weights, |w, i| {
                let (g, square) = (f64::from(sum[i]) / count, f64::from(squares[i]) / count);
                (w * g - 0.5 * w * square * w).abs()
            });
        }
    }
    Ok(loss)
}

/// The matrices cut into pieces of whole rows, put together to at most `limit` weights (or one row): matrix, first row,
/// rows.
fn windows<'a>(targets: &'a [Matrix<'a>], limit: usize) -> Vec<Vec<(&'a Matrix<'a>, usize, usize)>> {
    let mut windows = Vec::new();
    let (mut window, mut room) = (Vec::new(), limit);
    for matrix in targets {
        let mut first = 0;
        while first < matrix.rows {
            let fitting = room / matrix.cols;
            if fitting == 0 && !window.is_empty() {
                windows.push(std::mem::take(&mut window));
                room = limit;
                continue;
            }
            let rows = fitting.clamp(1, matrix.rows - first);
            window.push((matrix, first, rows));
            room = room.saturating_sub(rows * matrix.cols);
            first += rows;
        }
    }
    windows.extend((!window.is_empty()).then_some(window));
    windows
}

/// Adds the salience of the rows of `weights`, which start at `first_row` of the matrix, to the sums of its indices.
/// `salience` gets a weight and its place in `weights`.
fn add(
    sums: &mut [f64],
    matrix: &Matrix<'_>,
    first_row: usize,
    weights: &[f32],
    salience: impl Fn(f64, usize) -> f64 + Sync,
) {
    let cols = matrix.cols;
    if matrix.by_row {
        let sums = &mut sums[first_row..first_row + weights.len() / cols];
        sums.par_iter_mut().zip(weights.par_chunks(cols)).enumerate().for_each(|(row, (sum, weights))| {
            for (i, &w) in weights.iter().enumerate() {
                *sum += salience(f64::from(w), row * cols + i);
            }
        });
    } else {
        sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(chunk, sums)| {
            for (row, weights) in weights.chunks(cols).enumerate() {
                let first = chunk * COLUMNS;
                for (i, (sum, &w)) in sums.iter_mut().zip(&weights[first..]).enumerate() {
                    *sum += salience(f64::from(w), row * cols + first + i);
                }
            }
        });
    }
}

/// The importance of each group from those of its members' indices. With [`Reduce::Prod`] it is the logarithm, in which
/// products of hundreds of small numbers keep their order.
pub(crate) fn reduced(set: &Groups, members: &[Vec<f64>], reduce: Reduce) -> Result<Vec<f64>> {
    let score = |group: usize| {
        let lanes = (0..set.lanes).map(|lane| {
            let mut folded = set.members.iter().zip(members).map(|(member, values)| {
                values[member.indices(group)].iter().skip(lane).step_by(set.lanes).sum::<f64>()
            });
            match reduce {
                Reduce::Sum => folded.sum(),
                Reduce::Max => folded.fold(0.0, f64::max),
                Reduce::Mean => folded.sum::<f64>() / members.len() as f64,
                Reduce::Prod => folded.map(f64::ln).sum(),
                Reduce::Last => folded.next_back().unwrap_or(0.0),
            }
        });
        match reduce {
            Reduce::Prod => log_sum_exp(&lanes.collect::<Vec<f64>>()),
            _ => lanes.sum(),
        }
    };
    let scores: Vec<f64> = (0..set.count).map(score).collect();
    if scores.iter().all(|&score| score < f64::INFINITY) {
        return Ok(scores);
    }
    let help = "use another importance or other calibration text";
    Err(Error::numeric(&set.place, "an importance is not finite", help))
}

fn log_sum_exp(logs: &[f64]) -> f64 {
    let largest = logs.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + logs.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

/// An importance at random for every group of every set.
pub(crate) fn random_scores(sets: &[Groups], seed: u64) -> Vec<Vec<f64>> {
    let scores = |(stream, set): (usize, &Groups)| {
        let mut rng = Rng::new(seed, stream as u64);
        (0..set.count).map(|_| f64::from(rng.uniform())).collect()
    };
    sets.iter().enumerate().map(scores).collect()
}

/// The `count` groups of the largest scores, ascending; of equal ones the later.
pub(crate) fn largest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let mut kept = order.split_off(scores.len() - count);
    kept.sort_unstable();
    kept
}
