//! Experts of neurons that are active for the same tokens: the parts of a graph of co-activations.
//!
//! ```text
//! active(t) = the tenth of the neurons with the largest |c|,  c = silu(x Wg^T) * (x Wu^T), of token t
//! w_ij      = number of tokens in whose active(t) both i and j are
//! ```
//! (The reference has ReLU: activations are zeros or not. It adds up products of activations, each clamped to 1 over
//! 8 tokens, rounds the sums to whole numbers, leaves out the smallest, and cuts by METIS, whose uneven parts it
//! evens out at random. Counts need no clamp and no rounding, and [`graph::cut`] keeps parts even.) Takes 4 bytes per
//! pair of neurons, 270 MB for 8192.

use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights};
use dsmoe_core::partition::clusters;
use rayon::prelude::*;

use crate::error::Result;
use crate::experts::graph;

/// One of this many neurons is active for a token.
const ACTIVE: usize = 10;
/// Rows of counts per task.
const TASK: usize = 32;

/// The active neurons of tokens.
#[derive(Default)]
struct Active {
    /// The neurons of one token after the other, ascending within each.
    neurons: Vec<u32>,
    /// The end of each token's neurons.
    ends: Vec<usize>,
}

impl Active {
    /// Adds the token whose neurons have `values`.
    fn push(&mut self, values: &[f32]) {
        let count = values.len().div_ceil(ACTIVE).max(2).min(values.len());
        let mut order: Vec<u32> = (0..values.len() as u32).collect();
        let value = |j: u32| values[j as usize].abs();
        order.select_nth_unstable_by(count - 1, |&a, &b| value(b).total_cmp(&value(a)).then(a.cmp(&b)));
        order.truncate(count);
        // A neuron with the value 0 is never active.
        order.retain(|&j| value(j) > 0.0);
        order.sort_unstable();
        self.neurons.extend(order);
        self.ends.push(self.neurons.len());
    }

    fn tokens(&self) -> impl Iterator<Item = &[u32]> {
        let starts = std::iter::once(&0).chain(&self.ends);
        starts.zip(&self.ends).map(|(&start, &end)| &self.neurons[start..end])
    }

    /// `[width, width]`: the number of tokens for which both neurons are active, 0 on the diagonal.
    fn counts(&self, width: usize) -> Vec<u32> {
        let mut counts = vec![0; width * width];
        counts.par_chunks_mut(TASK * width).enumerate().for_each(|(task, counts)| {
            let first = task * TASK;
            for active in self.tokens() {
                let rows = active.partition_point(|&j| (j as usize) < first)
                    ..active.partition_point(|&j| (j as usize) < first + TASK);
                for &i in &active[rows] {
                    let row = &mut counts[(i as usize - first) * width..][..width];
                    active.iter().for_each(|&j| row[j as usize] += 1);
                    row[i as usize] = 0;
                }
            }
        });
        counts
    }
}

/// A layer's experts.
pub(super) struct Experts {
    /// Neurons, experts one after the other.
    pub(super) order: Vec<u32>,
    /// The means of the experts' `rows`, each of length 1 before: `[experts, hidden]`.
    pub(super) centers: Vec<f32>,
    /// Share of the co-activations that are of neurons of one expert.
    pub(super) within: f64,
}

/// Splits a layer's neurons by their co-activations on one of `every` tokens of `stream`.
pub(super) fn split(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    rows: &[f32],
    num_experts: usize,
    every: usize,
    seed: u64,
) -> Result<Experts> {
    let (hidden, seq) = (stream.config().hidden, stream.seq());
    let width = rows.len() / hidden;
    let mut active = Active::default();
    stream.forward(weights, &mut |tap| {
        if tap.input == Input::Neurons {
            let tokens = tap.x.chunks_exact(width).enumerate();
            let chosen = tokens.filter(|(t, _)| (tap.sequence * seq + t).is_multiple_of(every));
            chosen.for_each(|(_, values)| active.push(values));
        }
    })?;
    let counts = active.counts(width);
    let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
    let cut = graph::cut(&counts, num_experts, seed);
    let mut order: Vec<u32> = (0..width as u32).collect();
    order.sort_by_key(|&neuron| cut.labels[neuron as usize]);
    let sizes = vec![width / num_experts; num_experts];
    Ok(Experts {
        centers: clusters::means(&clusters::normalized(rows.to_vec(), hidden), hidden, &cut.labels, &sizes),
        order,
        within: 2.0 * cut.inside as f64 / total.max(1) as f64,
    })
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::normals;

    use super::*;

    #[test]
    fn co_activations_by_hand() {
        // Two of up to 20 neurons: the largest by magnitude, the lower first among equals, never a zero.
        let mut active = Active::default();
        active.push(&[0.1, -3.0, 2.0, 0.0, 2.0]);
        active.push(&[0.0, 1.0, 0.0, 0.0, -2.0]);
        active.push(&[0.0, 0.0, 0.5, 0.0, 0.0]);
        active.push(&[0.0, 2.0, 0.5, 0.0, 1.0]);
        assert_eq!(active.tokens().collect::<Vec<_>>(), [&[1, 2][..], &[1, 4], &[2], &[1, 4]]);
        let mut want = [0; 25];
        for (i, j, count) in [(1, 2, 1), (1, 4, 2)] {
            want[i * 5 + j] = count;
            want[j * 5 + i] = count;
        }
        assert_eq!(active.counts(5), want);
    }

    #[test]
    fn counts_are_those_of_the_definition() {
        let width = 75;
        let mut active = Active::default();
        let values = normals(40 * width, 1);
        values.chunks_exact(width).for_each(|values| active.push(values));
        let counts = active.counts(width);
        assert_eq!(active.neurons.len(), 40 * 8);
        for i in 0..width {
            for j in 0..width {
                let both = active.tokens().filter(|of| [i, j].iter().all(|&j| of.contains(&(j as u32))));
                assert_eq!(counts[i * width + j] as usize, if i == j { 0 } else { both.count() });
            }
        }
    }
}
