//! The selection of an exact number of smallest scores; among equals the lower index wins.

use rayon::prelude::*;

/// Scores counted by one task.
const TASK: usize = 1 << 16;
/// Bits of a score that the first pass distinguishes; scores have no sign.
const HIGH_BITS: u32 = 15;
const LOW_BITS: u32 = 31 - HIGH_BITS;

/// The smallest entries of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Smallest {
    /// Keys below it belong to them.
    end: u64,
}

/// Order of scores that are not negative, and among equals of indices.
fn key(score: f32, index: usize) -> u64 {
    (u64::from(score.to_bits()) << 32) | index as u64
}

impl Smallest {
    /// Selects the `count` smallest of `scores`, which are not negative.
    ///
    /// # Panics
    /// `count` is more than there are.
    pub(crate) fn of(scores: &[f32], count: usize) -> Smallest {
        assert!(count <= scores.len(), "{count} smallest of {}", scores.len());
        if count == scores.len() {
            return Smallest { end: u64::MAX };
        }
        let bin = |score: f32| (score.to_bits() >> LOW_BITS) as usize;
        let none = || vec![0usize; 1 << HIGH_BITS];
        let counted = scores.par_chunks(TASK).fold(none, |mut bins, scores| {
            scores.iter().for_each(|&score| bins[bin(score)] += 1);
            bins
        });
        let bins = counted.reduce(none, |mut sum, bins| {
            sum.iter_mut().zip(bins).for_each(|(sum, bin)| *sum += bin);
            sum
        });
        // The bin in which the first entry that is kept lies.
        let (mut before, mut last) = (0, 0);
        while before + bins[last] <= count {
            before += bins[last];
            last += 1;
        }
        let tasks = scores.par_chunks(TASK).enumerate();
        let mut keys: Vec<u64> = tasks
            .flat_map_iter(|(task, scores)| {
                let of_bin = scores.iter().enumerate().filter(|(_, score)| bin(**score) == last);
                of_bin.map(move |(i, &score)| key(score, task * TASK + i))
            })
            .collect();
        let (_, end, _) = keys.select_nth_unstable(count - before);
        Smallest { end: *end }
    }

    /// Does the same as [`Smallest::of`] on the calling thread, for short sets; `keys` is scratch.
    ///
    /// # Panics
    /// Panics under the conditions of [`Smallest::of`].
    pub(crate) fn of_few(scores: &[f32], count: usize, keys: &mut Vec<u64>) -> Smallest {
        assert!(count <= scores.len(), "{count} smallest of {}", scores.len());
        if count == scores.len() {
            return Smallest { end: u64::MAX };
        }
        keys.clear();
        keys.extend(scores.iter().enumerate().map(|(i, &score)| key(score, i)));
        let (_, end, _) = keys.select_nth_unstable(count);
        Smallest { end: *end }
    }

    /// Returns true if the entry of that score and index is one of them.
    pub(crate) fn has(self, score: f32, index: usize) -> bool {
        key(score, index) < self.end
    }

    /// Sets in `removed` which of `scores` belong to them; `first` is the index of the first.
    pub(crate) fn mark(self, removed: &mut [bool], scores: &[f32], first: usize) {
        for (i, (removed, &score)) in removed.iter_mut().zip(scores).enumerate() {
            *removed = self.has(score, first + i);
        }
    }
}

/// Sets `removed[i]` for the `count` smallest of a group of a few scores.
pub(crate) fn mark_smallest(removed: &mut [bool], scores: &[f32], count: usize) {
    removed.fill(false);
    for _ in 0..count {
        let left = (0..scores.len()).filter(|&i| !removed[i]);
        let Some(least) = left.min_by(|&a, &b| scores[a].total_cmp(&scores[b])) else { return };
        removed[least] = true;
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_same_on_threads, normals};

    use super::*;

    /// Selects by a stable sort.
    fn sorted(scores: &[f32], count: usize) -> Vec<bool> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        let mut removed = vec![false; scores.len()];
        order[..count].iter().for_each(|&i| removed[i] = true);
        removed
    }

    fn selected(smallest: Smallest, scores: &[f32]) -> Vec<bool> {
        scores.iter().enumerate().map(|(i, &score)| smallest.has(score, i)).collect()
    }

    #[test]
    fn as_many_as_asked_for_and_the_first_of_equals() {
        let normals: Vec<f32> = normals(70_000, 3).iter().map(|x| x.abs()).collect();
        let ties: Vec<f32> = (0..70_000).map(|i| (i % 7) as f32).collect();
        let equal = vec![0.0; 300];
        let extremes = vec![f32::INFINITY, 0.0, f32::MAX, f32::MIN_POSITIVE, 1e-45, f32::INFINITY];
        for scores in [normals, ties, equal, extremes] {
            for count in [0, 1, scores.len() / 3, scores.len() - 1, scores.len()] {
                let want = sorted(&scores, count);
                assert!(selected(Smallest::of(&scores, count), &scores) == want, "{count}");
                let few = Smallest::of_few(&scores, count, &mut Vec::new());
                assert!(selected(few, &scores) == want, "{count}");
                if scores.len() < 10 {
                    let mut marked = vec![false; scores.len()];
                    mark_smallest(&mut marked, &scores, count);
                    assert_eq!(marked, want);
                }
            }
        }
        assert_eq!(Smallest::of(&[], 0), Smallest { end: u64::MAX });
    }

    #[test]
    fn threads_do_not_show() {
        let scores: Vec<f32> = normals(200_000, 4).iter().map(|x| (x * 8.0).round().abs()).collect();
        assert_same_on_threads("smallest", || Smallest::of(&scores, 77_777));
    }
}
