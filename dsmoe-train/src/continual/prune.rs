//! Masks of the weights that stay: the schedule of their share, and the choice by score.

use dsmoe_core::Model;
use dsmoe_core::masks::Masks;
use dsmoe_core::params::{Entry, Layout, Stored};
use rayon::prelude::*;

use super::settings::Over;

/// Returns whether the tensor is the weight of a layer's linear.
pub(crate) fn is_prunable(entry: &Entry) -> bool {
    let name = &entry.spec.name;
    name.starts_with("model.layers.") && name.ends_with("_proj.weight") && entry.spec.shape.len() == 2
}

/// Returns the share of the linears' weights that `masks` keep; 1 without masks.
pub(crate) fn density(layout: &Layout, masks: Option<&Masks>) -> f64 {
    let all: usize = layout.entries().iter().filter(|entry| is_prunable(entry)).map(|e| e.range.len()).sum();
    let pruned = masks.map_or(0, Masks::pruned);
    1.0 - pruned as f64 / all.max(1) as f64
}

/// The steps of a task after which weights are pruned, counted from 1, and the share that each leaves.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Schedule {
    every: u64,
    last: u64,
    start: f64,
    end: f64,
}

impl Schedule {
    /// Goes from a share `start` to `end` in the first half of `steps`, every so many of them, but once at least.
    pub(crate) fn new(steps: u64, every: u64, start: f64, end: f64) -> Schedule {
        let half = steps / 2;
        let last = if half >= every { half - half % every } else { half.max(1) };
        Schedule { every: every.min(last), last, start, end }
    }

    /// Returns the share that is left after step `step`, if weights are pruned there.
    pub(crate) fn after(&self, step: u64) -> Option<f64> {
        let Schedule { every, last, start, end } = *self;
        let is_due = step > 0 && step <= last && (step.is_multiple_of(every) || step == last);
        let left = 1.0 - step as f64 / last as f64;
        is_due.then(|| end + (start - end).max(0.0) * left.powi(3))
    }
}

/// Returns masks that keep a share `density` of every group of weights, those of the highest scores; among equal ones the first.
/// Weights that are already pruned in `model` stay pruned.
pub(crate) fn masks_of(model: &Model, scores: &[f32], density: f64, over: Over) -> Masks {
    let mut masks = Masks::new();
    for entry in model.layout().entries().iter().filter(|entry| is_prunable(entry)) {
        let spec = &entry.spec;
        let shape = spec.stored_shape();
        let [rows, cols] = [shape[0], shape[1]];
        let place = |row: usize, col: usize| match spec.stored {
            Stored::AsIs => row * cols + col,
            Stored::Transposed => col * rows + row,
        };
        let before = model.masks().and_then(|masks| masks.get(&spec.name));
        let scores = &scores[entry.range.clone()];
        // As stored, row by row, so that equal scores go by their place in the file.
        let score = |at: usize| {
            let (row, col) = (at / cols, at % cols);
            let is_kept = before.is_none_or(|mask| mask.keeps(row, col));
            if is_kept { scores[place(row, col)] } else { f32::NEG_INFINITY }
        };
        let group = match over {
            Over::Matrix => rows * cols,
            Over::Row => cols,
        };
        let kept: Vec<bool> = (0..rows * cols / group)
            .into_par_iter()
            .flat_map_iter(|at| highest(at * group..(at + 1) * group, density, &score))
            .collect();
        masks.insert(&spec.name, rows, cols, |row, col| kept[row * cols + col]);
    }
    masks
}

/// Returns which of the weights of one group have the highest scores.
fn highest(group: std::ops::Range<usize>, density: f64, score: &impl Fn(usize) -> f32) -> Vec<bool> {
    let count = (density * group.len() as f64).round() as usize;
    let mut order: Vec<(f32, usize)> = group.clone().map(|at| (score(at), at)).collect();
    order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut kept = vec![false; group.len()];
    for (_, at) in order.iter().take(count).filter(|(score, _)| *score > f32::NEG_INFINITY) {
        kept[at - group.start] = true;
    }
    kept
}

/// Returns masks that keep what is not 0.
pub(crate) fn masks_of_nonzero(model: &Model) -> Masks {
    let mut masks = Masks::new();
    for entry in model.layout().entries().iter().filter(|entry| is_prunable(entry)) {
        let (spec, values) = (&entry.spec, &model.params()[entry.range.clone()]);
        let shape = spec.stored_shape();
        let [rows, cols] = [shape[0], shape[1]];
        let value = |row: usize, col: usize| match spec.stored {
            Stored::AsIs => values[row * cols + col],
            Stored::Transposed => values[col * rows + row],
        };
        masks.insert(&spec.name, rows, cols, |row, col| value(row, col) != 0.0);
    }
    masks
}

#[cfg(test)]
mod tests {
    use dsmoe_core::init::preset;

    use super::*;

    #[test]
    fn the_schedule_is_cubic_and_ends_at_its_share() {
        let schedule = Schedule::new(100, 10, 1.0, 0.5);
        let shares: Vec<(u64, f64)> = (0..=100).filter_map(|t| Some((t, schedule.after(t)?))).collect();
        let steps: Vec<u64> = shares.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [10, 20, 30, 40, 50]);
        for (step, share) in &shares {
            let left = 1.0 - *step as f64 / 50.0;
            assert!((share - (0.5 + 0.5 * left.powi(3))).abs() < 1e-12);
        }
        assert_eq!(shares[4].1, 0.5);
        for steps in [1, 2, 7, 19] {
            let schedule = Schedule::new(steps, 10, 1.0, 0.25);
            let last = (1..=steps).filter_map(|step| schedule.after(step)).next_back();
            assert_eq!(last, Some(0.25), "{steps} steps");
        }
    }

    #[test]
    fn masks_keep_the_highest_scores_of_their_group_and_nothing_that_was_pruned() {
        let mut model = Model::new(preset("tiny").unwrap());
        let scores: Vec<f32> = (0..model.layout().len()).map(|i| ((i * 7919) % 10_007) as f32).collect();
        for over in [Over::Matrix, Over::Row] {
            let masks = masks_of(&model, &scores, 0.5, over);
            for entry in model.layout().entries().iter().filter(|entry| is_prunable(entry)) {
                let mask = masks.get(&entry.spec.name).unwrap();
                let values = &scores[entry.range.clone()];
                let at = |row: usize, col: usize| match entry.spec.stored {
                    Stored::AsIs => values[row * mask.cols() + col],
                    Stored::Transposed => values[col * mask.rows() + row],
                };
                let mut groups: Vec<[Vec<f32>; 2]> = vec![Default::default(); mask.rows()];
                for (row, col) in (0..mask.rows()).flat_map(|row| (0..mask.cols()).map(move |col| (row, col)))
                {
                    let group = if over == Over::Row { row } else { 0 };
                    groups[group][usize::from(mask.keeps(row, col))].push(at(row, col));
                }
                for [pruned, kept] in groups.iter().filter(|[a, b]| a.len() + b.len() > 0) {
                    assert_eq!(kept.len(), (pruned.len() + kept.len()).div_ceil(2), "{}", entry.spec.name);
                    let least = kept.iter().copied().fold(f32::INFINITY, f32::min);
                    assert!(pruned.iter().all(|score| *score <= least));
                }
            }
            assert!((density(model.layout(), Some(&masks)) - 0.5).abs() < 1e-3);
        }
        assert_eq!(density(model.layout(), None), 1.0);
        // The other half has the higher scores now, and stays pruned.
        let first = masks_of(&model, &scores, 0.5, Over::Matrix);
        model.set_masks(first.clone()).unwrap();
        let turned: Vec<f32> = scores.iter().map(|score| -score).collect();
        let second = masks_of(&model, &turned, 0.25, Over::Matrix);
        for (name, mask) in second.iter() {
            let before = first.get(name).unwrap();
            let cells = (0..mask.rows()).flat_map(|row| (0..mask.cols()).map(move |col| (row, col)));
            assert!(
                cells.into_iter().all(|(row, col)| !mask.keeps(row, col) || before.keeps(row, col)),
                "{name}"
            );
        }
        assert!((density(model.layout(), Some(&second)) - 0.25).abs() < 1e-3);
    }
}
