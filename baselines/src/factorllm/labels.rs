//! Which experts of a token come nearest to the dense FFN, from the products of their outputs.
//!
//! ```text
//! e_i      output of expert i [d], t = sum of all, the dense FFN without its biases
//! G        [n, n]: G_ij = <e_i, e_j>; then <e_i, t> = sum_j G_ij and |t|^2 = sum_ij G_ij
//! single   the z least |e_i - (z / n) t|^2
//! subset   the z experts of the least |c sum e_i - t|^2, over all subsets; c is the factor of the outputs
//! norm     the z largest |e_i|
//! ```
//! Among equals the lower index, or the lower subset, wins. Where c = 2 with half of the experts, every subset is as near as the
//! experts that it leaves out, since c sum e_i - t only changes its sign: errors of subsets are equal up to rounding.

use serde::{Deserialize, Serialize};

/// Subsets whose errors differ by at most this share of the errors' terms are equally near. It is far above rounding.
const EQUAL: f64 = 1e-9;

/// A rule that labels experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Label {
    /// Those that are nearest to their share of the output, one by one.
    Single,
    /// Those whose sum is nearest to the output.
    Subset,
    /// Those of the largest outputs.
    Norm,
}

/// The experts that run: z of n, with the factor c of their sum.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    pub(super) scale: f64,
}

/// The products of the outputs of one token's experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Products<'a> {
    /// G, row after row.
    pub(super) gram: &'a [f64],
    pub(super) choice: Choice,
}

/// Returns how many subsets of `k` of `n` there are; none above `most`.
pub(super) fn subsets(n: usize, k: usize, most: usize) -> Option<usize> {
    // After i factors the product is the number of subsets of i, so that the division is exact.
    (0..k.min(n - k)).try_fold(1usize, |count, i| {
        count.checked_mul(n - i).map(|count| count / (i + 1)).filter(|&count| count <= most)
    })
}

impl Products<'_> {
    fn row(&self, i: usize) -> &[f64] {
        &self.gram[i * self.choice.num_experts..][..self.choice.num_experts]
    }

    fn with_sum(&self, i: usize) -> f64 {
        self.row(i).iter().sum()
    }

    /// Returns |t|^2.
    pub(super) fn dense(&self) -> f64 {
        self.gram.iter().sum()
    }

    /// Returns |c sum over `chosen` of e_i - t|^2.
    pub(super) fn error(&self, chosen: &[usize]) -> f64 {
        let c = self.choice.scale;
        let along: f64 = chosen.iter().map(|&i| self.with_sum(i)).sum();
        let within: f64 = chosen
            .iter()
            .flat_map(|&i| chosen.iter().map(move |&j| (i, j)))
            .map(|(i, j)| self.row(i)[j])
            .sum();
        self.dense() - 2.0 * c * along + c * c * within
    }

    /// Returns a bound of the sum of the terms of [`Products::error`], without their signs.
    fn terms(&self) -> f64 {
        (1.0 + self.choice.scale).powi(2) * self.gram.iter().map(|product| product.abs()).sum::<f64>()
    }

    /// Returns the mean of [`Products::error`] over all subsets.
    pub(super) fn error_of_chance(&self) -> f64 {
        let Choice { num_experts, top_k, scale } = self.choice;
        let (n, z, dense) = (num_experts as f64, top_k as f64, self.dense());
        let own: f64 = (0..num_experts).map(|i| self.row(i)[i]).sum();
        let pair = if num_experts > 1 { z * (z - 1.0) / (n * (n - 1.0)) } else { 0.0 };
        dense - 2.0 * scale * (z / n) * dense + scale * scale * ((z / n) * own + pair * (dense - own))
    }

    /// Returns the experts that `label` names, ascending.
    pub(super) fn chosen(&self, label: Label) -> Vec<usize> {
        let Choice { num_experts, top_k, .. } = self.choice;
        let share = top_k as f64 / num_experts as f64;
        match label {
            Label::Single => self.least(|i| self.row(i)[i] - 2.0 * share * self.with_sum(i)),
            Label::Norm => self.least(|i| -self.row(i)[i]),
            Label::Subset => self.best_subset(),
        }
    }

    fn least(&self, of: impl Fn(usize) -> f64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.choice.num_experts).collect();
        order.sort_by(|&i, &j| of(i).total_cmp(&of(j)).then(i.cmp(&j)));
        order.truncate(self.choice.top_k);
        order.sort_unstable();
        order
    }

    fn best_subset(&self) -> Vec<usize> {
        let Choice { num_experts: n, top_k: z, .. } = self.choice;
        let mut subset: Vec<usize> = (0..z).collect();
        let (mut best, mut least) = (subset.clone(), self.error(&subset));
        let equal = EQUAL * self.terms();
        // The next subset in ascending order: the last place that can move does, and those behind it follow.
        while let Some(at) = (0..z).rev().find(|&at| subset[at] < n - z + at) {
            let first = subset[at] + 1;
            subset[at..].iter_mut().zip(first..).for_each(|(place, i)| *place = i);
            let error = self.error(&subset);
            if error < least - equal {
                (least, best) = (error, subset.clone());
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{f64s, normals};

    use super::*;

    fn gram(outputs: &[Vec<f64>]) -> Vec<f64> {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        outputs.iter().flat_map(|a| outputs.iter().map(move |b| dot(a, b))).collect()
    }

    /// |c sum over `chosen` of e_i - t|^2, by the vectors.
    fn direct(outputs: &[Vec<f64>], chosen: &[usize], c: f64) -> f64 {
        let sum = |of: &[usize], j: usize| of.iter().map(|&i| outputs[i][j]).sum::<f64>();
        let all: Vec<usize> = (0..outputs.len()).collect();
        (0..outputs[0].len()).map(|j| (c * sum(chosen, j) - sum(&all, j)).powi(2)).sum()
    }

    #[test]
    fn labels_by_hand() {
        // The sum is (0, 2); from t / 2 the experts are 1, 0, 0.5 and 2.5 away, mean over the two features.
        let outputs = [vec![1.0, 0.0], vec![0.0, 1.0], vec![1.0, 1.0], vec![-2.0, 0.0]];
        let gram = gram(&outputs);
        let of = |scale| Products { gram: &gram, choice: Choice { num_experts: 4, top_k: 2, scale } };
        assert_eq!(of(1.0).dense(), 4.0);
        assert_eq!(of(1.0).chosen(Label::Single), [1, 2]);
        assert_eq!(of(1.0).chosen(Label::Norm), [2, 3]);
        // Unscaled, e_1 + e_2 = (1, 2) is 1 away in all, half of that mean over the features.
        assert_eq!((of(1.0).chosen(Label::Subset), of(1.0).error(&[1, 2])), (vec![1, 2], 1.0));
        // Doubled, (2, 2) and (-2, 2) are both 4 away: the lower subset wins.
        assert_eq!((of(2.0).error(&[0, 1]), of(2.0).error(&[2, 3])), (4.0, 4.0));
        assert_eq!(of(2.0).chosen(Label::Subset), [0, 1]);
    }

    #[test]
    fn products_give_the_errors_of_vectors() {
        for seed in 0..100 {
            let outputs: Vec<Vec<f64>> = (0..5).map(|i| f64s(&normals(6, 10 * seed + i))).collect();
            let gram = gram(&outputs);
            let choice = Choice { num_experts: 5, top_k: 2, scale: if seed % 2 == 0 { 1.0 } else { 2.5 } };
            let products = Products { gram: &gram, choice };
            let subsets: Vec<[usize; 2]> = (0..5).flat_map(|i| (i + 1..5).map(move |j| [i, j])).collect();
            let errors: Vec<f64> = subsets.iter().map(|of| direct(&outputs, of, choice.scale)).collect();
            for (subset, want) in subsets.iter().zip(&errors) {
                assert!((products.error(subset) - want).abs() < 1e-9 * want.max(1.0), "{seed} {subset:?}");
            }
            let least = (0..10).min_by(|&a, &b| errors[a].total_cmp(&errors[b])).unwrap();
            assert_eq!(products.chosen(Label::Subset), subsets[least], "{seed}");
            let mean = errors.iter().sum::<f64>() / 10.0;
            assert!((products.error_of_chance() - mean).abs() < 1e-9 * mean, "{seed}");
        }
    }

    #[test]
    fn of_a_half_and_the_other_half_the_lower_is_the_label() {
        let mut is_rounded = false;
        for seed in 0..50 {
            let outputs: Vec<Vec<f64>> = (0..8).map(|i| f64s(&normals(16, 8 * seed + i))).collect();
            let gram = gram(&outputs);
            let products = Products { gram: &gram, choice: Choice { num_experts: 8, top_k: 4, scale: 2.0 } };
            let chosen = products.chosen(Label::Subset);
            let others: Vec<usize> = (0..8).filter(|i| !chosen.contains(i)).collect();
            let [error, other] = [&chosen, &others].map(|subset| products.error(subset));
            assert!((error - other).abs() < 1e-9 * products.dense().max(1.0), "{seed}: {error} {other}");
            assert_eq!(chosen[0], 0, "{seed}");
            is_rounded |= error != other;
        }
        assert!(is_rounded, "rounding does not decide in any case");
    }

    #[test]
    fn subsets_are_counted_up_to_a_bound() {
        assert_eq!([subsets(4, 2, 100), subsets(64, 1, 100), subsets(5, 5, 1)], [Some(6), Some(64), Some(1)]);
        assert_eq!([subsets(64, 32, 1 << 20), subsets(20, 10, 184_755)], [None; 2]);
        assert_eq!(subsets(20, 10, 184_756), Some(184_756));
    }
}
