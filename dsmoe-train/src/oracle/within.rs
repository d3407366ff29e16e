//! The levels of tokens within a budget: of every token, or in the mean over tokens.
//!
//! ```text
//! each    the level of the lowest loss of those up to the budget
//! mean    the levels of the lowest mean loss whose mean is up to the budget: tokens go up along the lower convex hull of their losses,
//!         the steepest step of all first, and what is left of the budget goes to the first tokens that can use it
//! ```
//! The second is off the optimum by less than the largest step of one token, and never above the first.

use std::ops::Range;

use super::tally::{Level, mean_of};

/// The levels that tokens choose among, ascending.
pub(super) struct Choices<'a> {
    levels: Vec<(usize, &'a Level)>,
    /// The lowest loss of every token, by level.
    losses: Vec<Vec<f32>>,
}

/// A way to choose the levels of tokens within a budget, as places among the levels. None if the budget is below all of them.
pub(super) type Choose = fn(&Choices<'_>, f64) -> Option<Vec<usize>>;

/// A token's way from a level to a higher one, both by their places.
struct Step {
    token: usize,
    from: usize,
    to: usize,
    /// The change of the loss for each level, below 0.
    slope: f64,
}

impl<'a> Choices<'a> {
    /// Takes the levels that have members.
    pub(super) fn of(levels: impl Iterator<Item = (usize, &'a Level)>) -> Choices<'a> {
        let levels: Vec<_> = levels.filter(|(_, level)| level.members > 0).collect();
        let losses = levels.iter().map(|(_, level)| level.least().collect()).collect();
        Choices { levels, losses }
    }

    fn tokens(&self) -> usize {
        self.losses.first().map_or(0, Vec::len)
    }

    /// Returns the number of the levels up to `most`.
    fn up_to(&self, most: f64) -> usize {
        self.levels.partition_point(|&(level, _)| level as f64 <= most)
    }

    /// Returns the place of a token's lowest loss, the first among equals.
    fn best(&self, token: usize, among: Range<usize>) -> usize {
        let loss = |place: usize| self.losses[place][token];
        let start = among.start;
        among.fold(start, |best, place| if loss(place) < loss(best) { place } else { best })
    }

    /// Chooses the best level of every token up to `budget`.
    pub(super) fn each(&self, budget: f64) -> Option<Vec<usize>> {
        let within = self.up_to(budget);
        (within > 0).then(|| (0..self.tokens()).map(|token| self.best(token, 0..within)).collect())
    }

    /// Chooses levels whose mean over tokens is up to `budget`.
    pub(super) fn mean(&self, budget: f64) -> Option<Vec<usize>> {
        let (each, tokens) = (self.each(budget)?, self.tokens());
        let level = |place: usize| self.levels[place].0;
        // The sum of all levels is a whole number; the last digits of the product are not.
        let mut left = (budget * tokens as f64 + 1e-6) as usize - level(0) * tokens;
        let mut steps: Vec<Step> = (0..tokens).flat_map(|token| self.steps(token)).collect();
        steps.sort_by(|a, b| a.slope.total_cmp(&b.slope).then(a.token.cmp(&b.token)));
        let mut chosen = vec![0; tokens];
        for Step { token, from, to, .. } in steps {
            let cost = level(to) - level(from);
            // A step whose predecessor was too long is none.
            if chosen[token] == from && cost <= left {
                (chosen[token], left) = (to, left - cost);
            }
        }
        for (token, chosen) in chosen.iter_mut().enumerate() {
            let within = self.up_to((level(*chosen) + left) as f64);
            let best = self.best(token, *chosen..within);
            (*chosen, left) = (best, left + level(*chosen) - level(best));
        }
        Some(if self.loss(&chosen) < self.loss(&each) { chosen } else { each })
    }

    /// Returns the steps of a token along the lower convex hull of its losses, from the least level up to that of the lowest loss.
    fn steps(&self, token: usize) -> Vec<Step> {
        let loss = |place: usize| f64::from(self.losses[place][token]);
        let level = |place: usize| self.levels[place].0 as f64;
        let slope = |from: usize, to: usize| (loss(to) - loss(from)) / (level(to) - level(from));
        let mut hull: Vec<usize> = Vec::new();
        for place in 0..self.levels.len() {
            while let [.., before, last] = hull[..]
                && slope(before, last) >= slope(last, place)
            {
                hull.pop();
            }
            hull.push(place);
        }
        let step = |pair: &[usize]| {
            let (from, to) = (pair[0], pair[1]);
            Step { token, from, to, slope: slope(from, to) }
        };
        hull.windows(2).map(step).take_while(|step| step.slope < 0.0).collect()
    }

    /// Returns the mean loss of tokens at these places.
    pub(super) fn loss(&self, chosen: &[usize]) -> f64 {
        mean_of(chosen.iter().enumerate().map(|(token, &place)| self.losses[place][token]))
    }

    /// Returns the mean level.
    pub(super) fn mean_level(&self, chosen: &[usize]) -> f64 {
        let sum: usize = chosen.iter().map(|&place| self.levels[place].0).sum();
        sum as f64 / chosen.len().max(1) as f64
    }

    /// Returns the member of every token's lowest loss.
    pub(super) fn members(&self, chosen: &[usize]) -> Vec<u32> {
        chosen.iter().enumerate().map(|(token, &place)| self.levels[place].1.which()[token]).collect()
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::rng::Rng;

    use super::*;

    /// Levels of a member each.
    fn levels(losses: &[(usize, &[f32])]) -> Vec<(usize, Level)> {
        let of = |(member, &(level, losses)): (usize, &(usize, &[f32]))| {
            let mut of = Level::default();
            of.add(member as u32, losses);
            (level, of)
        };
        losses.iter().enumerate().map(of).collect()
    }

    fn choices(levels: &[(usize, Level)]) -> Choices<'_> {
        Choices::of(levels.iter().map(|(level, of)| (*level, of)))
    }

    #[test]
    fn budgets_by_hand() {
        let levels = levels(&[(0, &[9.0, 9.0, 3.0]), (1, &[5.0, 8.0, 2.5]), (2, &[4.0, 1.0, 2.6])]);
        let of = choices(&levels);
        assert_eq!(of.each(0.0), Some(vec![0, 0, 0]));
        assert_eq!(of.each(1.9), Some(vec![1, 1, 1]));
        assert_eq!(of.each(2.0), Some(vec![2, 2, 1]));
        // Three levels in all: the first token gives 4 for one, the second 8 for two.
        let mean = of.mean(1.0).unwrap();
        assert_eq!((mean.clone(), of.mean_level(&mean)), (vec![1, 2, 0], 1.0));
        assert!((of.loss(&mean) - 3.0).abs() < 1e-6 && of.loss(&mean) < of.loss(&of.each(1.0).unwrap()));
        assert_eq!(of.members(&mean), [1, 2, 0]);
        // After one level of the first token the two of the second are too many: the first has the other one. [0, 2, 0] were better.
        assert_eq!(of.mean(2.0 / 3.0).unwrap(), [2, 0, 0]);
        assert_eq!(of.mean(1.0 / 3.0).unwrap(), [1, 0, 0]);
        assert_eq!([of.mean(0.0), of.mean(2.0)], [Some(vec![0; 3]), Some(vec![2, 2, 1])]);
        // A budget below all levels, and a step of two levels that is too long.
        let high = self::levels(&[(2, &[1.0])]);
        assert_eq!((choices(&high).each(1.0), choices(&high).mean(1.0)), (None, None));
        let single = self::levels(&[(0, &[3.0]), (1, &[2.9]), (2, &[1.0])]);
        assert_eq!(choices(&single).mean(1.0), Some(vec![1]));
    }

    /// Against all choices of levels of a few tokens.
    #[test]
    fn budgets_against_brute_force() {
        let mut rng = Rng::new(7, 0);
        let (tokens, mut exact) = (5u32, 0);
        for case in 0..200 {
            let count: usize = 2 + case % 3;
            let values: Vec<Vec<f32>> =
                (0..count).map(|_| (0..tokens).map(|_| 4.0 * rng.uniform()).collect()).collect();
            let losses: Vec<(usize, &[f32])> =
                values.iter().enumerate().map(|(level, losses)| (level, &losses[..])).collect();
            let levels = levels(&losses);
            let of = choices(&levels);
            let largest = values.iter().flatten().fold(0.0f32, |a, b| a.max(*b));
            for tenth in 0..=10 * (count - 1) {
                let budget = tenth as f64 / 10.0;
                let (mut best_each, mut best_mean) = (f64::INFINITY, f64::INFINITY);
                for number in 0..count.pow(tokens) {
                    let chosen: Vec<usize> =
                        (0..tokens).map(|token| number / count.pow(token) % count).collect();
                    if chosen.iter().all(|&level| level as f64 <= budget) {
                        best_each = best_each.min(of.loss(&chosen));
                    }
                    if of.mean_level(&chosen) <= budget + 1e-9 {
                        best_mean = best_mean.min(of.loss(&chosen));
                    }
                }
                let [each, mean] = [of.each(budget).unwrap(), of.mean(budget).unwrap()];
                assert_eq!(of.loss(&each), best_each, "{case} {budget}");
                assert!(of.mean_level(&mean) <= budget + 1e-9, "{case} {budget}: {mean:?}");
                let behind = of.loss(&mean) - best_mean;
                assert!(of.loss(&mean) <= best_each, "{case} {budget}");
                // One token's step at the most.
                assert!((0.0..f64::from(largest) / f64::from(tokens)).contains(&behind), "{behind}");
                exact += u32::from(behind < 1e-12);
            }
        }
        assert!(exact > 3600, "{exact} of about 4190 are exact");
    }
}
