//! Random choices in whole numbers, so that a seed gives the same choices on every machine.

use crate::windows::mix;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng as _;

/// One stream of choices.
pub(super) struct Rng(Pcg64);

/// Hashes a seed and a key to a number; near keys give far numbers.
pub(super) fn hash(seed: u64, key: &[u64]) -> u64 {
    key.iter().fold(mix(seed), |state, &part| mix(state ^ mix(part)))
}

impl Rng {
    /// Returns the stream of `seed` that `key` names.
    pub(super) fn new(seed: u64, key: &[u64]) -> Rng {
        Rng(Pcg64::new(u128::from(hash(seed, key)), 1))
    }

    /// Draws a number of `0..n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// Draws a number of `first..=last`.
    pub(super) fn between(&mut self, first: usize, last: usize) -> usize {
        first + self.below(last + 1 - first)
    }

    /// Returns true once in `n` times.
    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Draws a number of `0..n`, the small ones more often: popular members stand first.
    pub(super) fn popular(&mut self, n: usize) -> usize {
        self.below(n).min(self.below(n))
    }

    pub(super) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// Draws a member of `items` for which `fits` holds; there must be one.
    pub(super) fn pick_where<T: Copy>(&mut self, items: &[T], fits: impl Fn(T) -> bool) -> T {
        loop {
            let item = self.pick(items);
            if fits(item) {
                return item;
            }
        }
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// Puts `right` among `wrong` in random order, and returns its index too.
    pub(super) fn mingle(&mut self, right: String, wrong: Vec<String>) -> (Vec<String>, usize) {
        let mut choices = wrong;
        self.shuffle(&mut choices);
        let gold = self.below(choices.len() + 1);
        choices.insert(gold, right);
        (choices, gold)
    }
}
