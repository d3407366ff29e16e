//! The results of an oracle among the routes, or among noisy copies, of one level.

use serde::{Deserialize, Serialize};

/// The losses of all members of a level.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Level {
    /// Members.
    pub(crate) members: u64,
    /// Bits of the sum of their mean losses: a state that is stored gives the same results.
    sum: u64,
    /// The member of the lowest mean loss, and its bits.
    best: Option<(u32, u64)>,
    /// Bits of the lowest loss of every token.
    least: Vec<u32>,
    /// The member of that loss.
    which: Vec<u32>,
}

impl Level {
    /// Makes a level of so many tokens, whose losses [`Level::see`] takes one by one.
    pub(crate) fn unseen(tokens: usize) -> Level {
        Level { least: vec![f32::INFINITY.to_bits(); tokens], which: vec![0; tokens], ..Level::default() }
    }

    /// Adds a member with the losses of all tokens; numbers of members ascend.
    pub(crate) fn add(&mut self, member: u32, losses: &[f32]) {
        self.count(member, mean(losses));
        if self.least.is_empty() {
            self.least = losses.iter().map(|loss| loss.to_bits()).collect();
            self.which = vec![member; losses.len()];
            return;
        }
        for (token, &loss) in losses.iter().enumerate() {
            self.see(member, token, loss);
        }
    }

    /// Takes the loss of one token on a member; numbers of members ascend.
    pub(crate) fn see(&mut self, member: u32, token: usize, loss: f32) {
        if loss < f32::from_bits(self.least[token]) {
            (self.least[token], self.which[token]) = (loss.to_bits(), member);
        }
    }

    /// Counts a member whose losses have that mean; numbers of members ascend.
    pub(crate) fn count(&mut self, member: u32, mean: f64) {
        self.sum = (f64::from_bits(self.sum) + mean).to_bits();
        self.members += 1;
        if self.best.is_none_or(|(_, best)| mean < f64::from_bits(best)) {
            self.best = Some((member, mean.to_bits()));
        }
    }

    /// Returns the mean over members of their mean losses.
    pub(crate) fn mean(&self) -> f64 {
        f64::from_bits(self.sum) / self.members.max(1) as f64
    }

    /// Returns the member of the lowest mean loss, and that loss.
    pub(crate) fn best(&self) -> Option<(u32, f64)> {
        self.best.map(|(member, bits)| (member, f64::from_bits(bits)))
    }

    /// Returns the lowest loss of every token.
    pub(crate) fn least(&self) -> impl Iterator<Item = f32> + '_ {
        self.least.iter().map(|&bits| f32::from_bits(bits))
    }

    /// Returns the member of every token's lowest loss.
    pub(crate) fn which(&self) -> &[u32] {
        &self.which
    }

    /// Returns the mean over tokens of their lowest losses.
    pub(crate) fn oracle(&self) -> f64 {
        mean_of(self.least())
    }
}

/// Returns the mean over tokens of the lowest loss in any of `levels`.
pub(crate) fn least_of_all<'a>(levels: impl Iterator<Item = &'a Level>) -> Vec<(f32, u32)> {
    let mut least: Vec<(f32, u32)> = Vec::new();
    for level in levels.filter(|level| level.members > 0) {
        let found = level.least().zip(level.which().iter().copied());
        match least.is_empty() {
            true => least.extend(found),
            false => least.iter_mut().zip(found).filter(|(a, b)| b.0 < a.0).for_each(|(a, b)| *a = b),
        }
    }
    least
}

/// Returns the mean of losses.
pub(crate) fn mean(losses: &[f32]) -> f64 {
    mean_of(losses.iter().copied())
}

pub(crate) fn mean_of(losses: impl Iterator<Item = f32>) -> f64 {
    let (sum, count) = losses.fold((0.0, 0usize), |(sum, n), loss| (sum + f64::from(loss), n + 1));
    sum / count.max(1) as f64
}

/// Returns the rank correlation (Spearman's) of two lists; ranks of equals are their mean. None where one is constant.
pub(crate) fn rank_correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let [a, b] = [a, b].map(ranks);
    let n = a.len() as f64;
    let centre = (n + 1.0) / 2.0;
    let sum = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - centre) * (y - centre)).sum::<f64>();
    let spread = sum(&a, &a) * sum(&b, &b);
    (spread > 0.0).then(|| sum(&a, &b) / spread.sqrt())
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for equals in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let rank = first as f64 + (equals.len() as f64 + 1.0) / 2.0;
        equals.iter().for_each(|&i| ranks[i] = rank);
        first += equals.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_by_hand() {
        let (mut one, mut two) = (Level::default(), Level::default());
        one.add(3, &[1.0, 4.0, 4.0]);
        one.add(5, &[2.0, 2.0, 5.0]);
        two.add(7, &[1.5, 3.0, 0.5]);
        assert_eq!((one.mean(), one.best(), one.oracle()), (3.0, Some((3, 3.0)), 7.0 / 3.0));
        assert_eq!(one.which(), [3, 5, 3]);
        let all = least_of_all([&one, &Level::default(), &two].into_iter());
        assert_eq!(all, [(1.0, 3), (2.0, 5), (0.5, 7)]);
        // A member token by token is the same.
        let mut again = Level::unseen(3);
        for (member, losses) in [(3, [1.0, 4.0, 4.0]), (5, [2.0, 2.0, 5.0])] {
            losses.iter().enumerate().for_each(|(token, &loss)| again.see(member, token, loss));
            again.count(member, mean(&losses));
        }
        assert_eq!(again, one);
        // The stored state gives the same numbers.
        let stored: Level = serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
        assert_eq!(stored, one);
    }

    #[test]
    fn correlations_by_hand() {
        let near = |a: &[f64], b: &[f64], want: f64| {
            let got = rank_correlation(a, b).unwrap();
            assert!((got - want).abs() < 1e-12, "{got}");
        };
        near(&[1.0, 2.0, 9.0], &[10.0, 20.0, 30.0], 1.0);
        near(&[3.0, 2.0, 1.0], &[10.0, 20.0, 30.0], -1.0);
        // Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15).
        near(&[1.0, 2.0, 3.0, 4.0], &[6.0, 5.0, 8.0, 7.0], 0.6);
        // Ranks 1.5 1.5 3 against 1 2 3: 1.5 / sqrt(1.5 * 2).
        near(&[5.0, 5.0, 6.0], &[1.0, 2.0, 3.0], 1.5 / 3f64.sqrt());
        assert_eq!(rank_correlation(&[1.0, 1.0], &[1.0, 2.0]), None);
    }
}
