//! The windows of a task's steps: new text, of which sequences may be selected, and sequences of earlier tasks.

use std::collections::BTreeMap;

use dsmoe_datasets::{Interleaving, Mixture};
use dsmoe_kernels::rng::Rng;
use serde::{Deserialize, Serialize};

use super::settings::Method;
use crate::config::TrainConfig;
use crate::error::Result;

const REPLAY_STREAM: u64 = 0x7265_706c_6179;
const SELECT_STREAM: u64 = 0x7365_6c65_6374;
const KEEP_STREAM: u64 = 0x6b65_6570;

/// A training window of a task.
///
/// ```
/// use std::collections::BTreeMap;
///
/// use dsmoe_train::continual::Window;
///
/// // How many windows of each task are replayed?
/// let replay = [Window { task: 0, window: 7 }, Window { task: 1, window: 2 }, Window { task: 0, window: 9 }];
/// let mut counts = BTreeMap::new();
/// replay.iter().for_each(|Window { task, .. }| *counts.entry(*task).or_insert(0) += 1);
/// assert_eq!(counts.into_iter().collect::<Vec<_>>(), [(0, 2), (1, 1)]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// The task, counted from 0.
    pub task: usize,
    /// Its window.
    pub window: usize,
}

/// A function that returns the rise in loss of each given window after a step along its gradient, or `None` if it was interrupted.
pub(super) type Score<'a> = dyn FnMut(&[Window]) -> Result<Option<Vec<f32>>> + 'a;

/// The windows that a task's steps have drawn so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Drawn {
    /// The windows that were candidates, and their last score.
    seen: BTreeMap<usize, f32>,
    /// How many windows were scored.
    scored: u64,
    /// The pool at hand and the windows that were chosen from it.
    pool: Option<(u64, Vec<usize>)>,
}

impl Drawn {
    /// Returns whether the windows are of a task with so many.
    pub(super) fn is_of(&self, windows: usize) -> bool {
        let chosen = self.pool.iter().flat_map(|(_, chosen)| chosen);
        self.seen.keys().chain(chosen).all(|&window| window < windows)
    }
}

/// The text of one task's steps.
pub(super) struct Stream {
    task: usize,
    order: Interleaving,
    seed: u64,
    /// Windows of a step that are new text.
    fresh: usize,
    replayed: usize,
    /// Candidates that are scored together, those of them that are taken for their score, and steps that they last for.
    pool: Option<Pool>,
    drawn: Drawn,
}

#[derive(Clone, Copy, Debug)]
struct Pool {
    candidates: usize,
    top: usize,
    steps: u64,
}

impl Pool {
    /// Returns the pool of a method that selects, of whose steps each takes `fresh` windows.
    fn of(method: &Method, fresh: usize) -> Option<Pool> {
        if method.select >= 1.0 {
            return None;
        }
        let (top, random) = (method.select, method.random.unwrap_or(0.0));
        let steps = method.select_every.unwrap_or(1);
        let chosen = fresh * usize::try_from(steps).unwrap_or(usize::MAX).min(MOST_POOL_STEPS);
        let taken = (top + random).min(1.0);
        let candidates = (chosen as f64 / taken).ceil() as usize;
        let top = ((chosen as f64) * top / (top + random)).round() as usize;
        Some(Pool { candidates, top, steps: steps.min(MOST_POOL_STEPS as u64) })
    }
}

/// Returns the memory of the windows that a step holds at once, bytes: those of its batches, or all candidates.
pub(super) fn memory(config: &TrainConfig, method: &Method) -> u64 {
    let all = config.batch.saturating_mul(config.accumulate);
    let held = Pool::of(method, all).map_or(all, |pool| pool.candidates.max(all));
    (held as u64).saturating_mul(WINDOW_BYTES)
}

impl Stream {
    /// Begins the text of `task`, of whose steps each has the batch of `config`, or goes on with what was drawn of it. There is a
    /// `replay` of earlier tasks or none.
    pub(super) fn new(
        task: usize,
        mixture: &Mixture,
        config: &TrainConfig,
        method: &Method,
        (replay, drawn): (&[Window], Drawn),
    ) -> Result<Stream> {
        let all = config.batch * config.accumulate;
        let share = if replay.is_empty() { 0.0 } else { method.replay_share.unwrap_or(0.0) };
        let replayed = (share * all as f64).round() as usize;
        let fresh = all - replayed.min(all);
        let pool = Pool::of(method, fresh);
        let order = mixture.interleaving(1, config.seed)?;
        let seed = config.seed;
        Ok(Stream { task, order, seed, fresh, replayed, pool, drawn })
    }

    /// Returns the windows of step `step`, counted from 0. `score` is called for candidates; if it
    /// returns `None`, so does this, and nothing is drawn.
    pub(super) fn windows(
        &mut self,
        step: u64,
        replay: &[Window],
        score: &mut Score<'_>,
    ) -> Result<Option<Vec<Window>>> {
        let fresh = match self.pool {
            None => {
                let first = step * self.fresh as u64;
                let windows: Vec<usize> =
                    (first..first + self.fresh as u64).map(|n| self.sample(n)).collect();
                self.drawn.seen.extend(windows.iter().map(|&window| (window, 0.0)));
                windows
            }
            Some(pool) => match self.select(pool, step, score)? {
                Some(windows) => windows,
                None => return Ok(None),
            },
        };
        let mut all: Vec<Window> =
            fresh.into_iter().map(|window| Window { task: self.task, window }).collect();
        let mut rng = Rng::new(self.seed, REPLAY_STREAM ^ (self.task as u64) << 48 ^ step);
        all.extend((0..self.replayed).map(|_| replay[rng.below(replay.len() as u64) as usize]));
        Ok(Some(all))
    }

    /// Returns how many windows were scored.
    pub(super) fn scored(&self) -> u64 {
        self.drawn.scored
    }

    /// Returns what was drawn so far.
    pub(super) fn drawn(&self) -> &Drawn {
        &self.drawn
    }

    fn sample(&mut self, number: u64) -> usize {
        self.order.batch_at(number).next().map_or(0, |sample| sample.window)
    }

    /// Returns the new windows of a step, out of the pool of its steps.
    fn select(&mut self, pool: Pool, step: u64, score: &mut Score<'_>) -> Result<Option<Vec<usize>>> {
        let number = step / pool.steps;
        if self.drawn.pool.as_ref().is_none_or(|(at, _)| *at != number) {
            let first = number * pool.candidates as u64;
            let numbers = first..first + pool.candidates as u64;
            let windows: Vec<usize> = numbers.map(|number| self.sample(number)).collect();
            let asked: Vec<Window> =
                windows.iter().map(|&window| Window { task: self.task, window }).collect();
            let Some(scores) = score(&asked)? else { return Ok(None) };
            self.drawn.scored += windows.len() as u64;
            self.drawn.seen.extend(windows.iter().copied().zip(scores.iter().copied()));
            let seed = SELECT_STREAM ^ (self.task as u64) << 48 ^ number;
            let count = self.fresh * pool.steps as usize;
            let places = choose(&scores, pool.top, count, Rng::new(self.seed, seed));
            self.drawn.pool = Some((number, places.into_iter().map(|place| windows[place]).collect()));
        }
        let chosen = self.drawn.pool.as_ref().map_or(&[][..], |(_, chosen)| chosen);
        let at = (step % pool.steps) as usize * self.fresh;
        Ok(Some(chosen.iter().skip(at).take(self.fresh).copied().collect()))
    }

    /// Returns at most `count` windows of this task to keep: those of the highest scores, or any where none was scored.
    pub(super) fn keep(&self, count: usize) -> Vec<Window> {
        let mut rng = Rng::new(self.seed, KEEP_STREAM ^ (self.task as u64) << 48);
        let by_chance = self.pool.is_none();
        let mut ranked: Vec<(f32, usize)> = self
            .drawn
            .seen
            .iter()
            .map(|(&window, &score)| (if by_chance { rng.uniform() } else { score }, window))
            .collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        ranked.truncate(count);
        ranked.into_iter().map(|(_, window)| Window { task: self.task, window }).collect()
    }
}

/// Memory of a window among candidates: itself, its score, and its place in what was drawn.
const WINDOW_BYTES: u64 = 128;
/// Most steps that candidates are scored for at once.
const MOST_POOL_STEPS: usize = 1 << 12;

/// Returns `count` places, ascending: the `top` highest scores, and others by chance.
fn choose(scores: &[f32], top: usize, count: usize, mut rng: Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let rest = &mut order[top.min(scores.len())..];
    for i in 0..rest.len() {
        let other = i + rng.below((rest.len() - i) as u64) as usize;
        rest.swap(i, other);
    }
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Joins what is kept of earlier tasks with what the last one keeps: each task has its part of `total`.
pub(super) fn merge(earlier: &[Window], last: &[Window], tasks: usize, total: usize) -> Vec<Window> {
    let quota = total / tasks.max(1);
    let mut kept = Vec::new();
    for part in earlier.chunk_by(|a, b| a.task == b.task).chain([last]) {
        kept.extend_from_slice(&part[..part.len().min(quota)]);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_scores_are_chosen_and_others_by_chance() {
        let scores = [0.1, 5.0, 0.2, 4.0, 0.3, 3.0, 0.4, 0.5];
        let chosen = choose(&scores, 3, 5, Rng::new(1, 2));
        assert!([1, 3, 5].iter().all(|place| chosen.contains(place)), "{chosen:?}");
        assert_eq!(chosen.len(), 5);
        assert!(chosen.is_sorted());
        let others: Vec<Vec<usize>> = (0..20).map(|seed| choose(&scores, 3, 5, Rng::new(seed, 2))).collect();
        assert!(others.iter().any(|other| *other != chosen), "chance has no say");
    }

    #[test]
    fn every_task_keeps_its_part() {
        let windows = |task, count| (0..count).map(|window| Window { task, window }).collect::<Vec<_>>();
        let first = merge(&[], &windows(0, 20), 1, 10);
        assert_eq!(first, windows(0, 10));
        let second = merge(&first, &windows(1, 20), 2, 10);
        assert_eq!(second, [windows(0, 5), windows(1, 5)].concat());
        let third = merge(&second, &windows(2, 2), 3, 10);
        assert_eq!(third, [windows(0, 3), windows(1, 3), windows(2, 2)].concat());
    }
}
