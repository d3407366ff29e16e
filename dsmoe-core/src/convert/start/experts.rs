//! The neurons of the core and of the experts.

use super::plan::{Plan, Start};
use super::sinks::Sinks;
use crate::calibrate::{LayerStream, LayerWeights};
use crate::error::Result;
use crate::partition::clusters;

/// Tokens that the sizes of neurons are taken on, at most.
const MOST_TOKENS: usize = 16_384;

/// The experts of a layer.
#[derive(Clone, Debug)]
pub(super) struct Experts {
    /// The original neuron of every stored row: the core, then one expert after the other.
    pub(super) order: Vec<u32>,
    /// Neurons of the core.
    pub(super) core: usize,
    /// Neurons of an expert.
    pub(super) width: usize,
    /// Neurons of the core that write massive values. A fit to other tokens does not know what a change of them does there.
    pub(super) massive: Vec<u32>,
}

impl Experts {
    /// Chooses the core by importance, and clusters the other neurons.
    pub(super) fn choose(
        stream: &mut LayerStream,
        weights: &LayerWeights,
        (plan, sinks): (&Plan, &Sinks),
        options: &Start,
    ) -> Result<Experts> {
        let [.., gate, _, _] = &weights.linears;
        let width = gate.outputs / plan.num_experts;
        let core = plan.cores[weights.layer] * width;
        let lengths = &sinks.lengths;
        let mut seen = Seen::new(gate.outputs);
        let seq = stream.seq();
        let every = (plan.sequences * seq).div_ceil(MOST_TOKENS).max(1);
        let is_seen = |sequence: usize| sequence.is_multiple_of(every);
        stream.see_ffn_of(weights, &is_seen, &mut |tap| seen.add(tap.neurons, &sinks.of(tap.neurons)))?;
        let mut importance: Vec<f64> =
            seen.sizes(options.settings.intercept).zip(lengths).map(|(size, length)| size * length).collect();
        let massive: Vec<f64> =
            seen.massive.iter().zip(lengths).map(|(value, length)| value * length).collect();
        let mut massive = descending(&massive);
        massive.truncate(options.settings.massive.min(core));
        massive.iter().for_each(|&neuron| importance[neuron] = f64::INFINITY);
        let mut order = descending(&importance);
        let mut rest = order.split_off(core);
        rest.sort_unstable();
        let rows: Vec<f32> =
            rest.iter().flat_map(|&j| &gate.weight[j * gate.inputs..][..gate.inputs]).copied().collect();
        let seed = options.seed ^ weights.layer as u64;
        let (clustered, _) = clusters::neurons(rows, gate.inputs, plan.routed(weights.layer), seed);
        order.extend(clustered.iter().map(|&at| rest[at as usize]));
        let numbers = |neurons: Vec<usize>| neurons.into_iter().map(|neuron| neuron as u32).collect();
        Ok(Experts { order: numbers(order), core, width, massive: numbers(massive) })
    }

    /// Returns the neurons of the routed experts, one expert after the other.
    pub(super) fn routed(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.order[self.core..].chunks_exact(self.width)
    }
}

/// Sizes of the values of each neuron.
struct Seen {
    /// Sums, and sums of squares, of all tokens that fits have.
    sums: Vec<f64>,
    squares: Vec<f64>,
    tokens: usize,
    /// Largest value of a token that they leave out.
    massive: Vec<f64>,
}

impl Seen {
    fn new(neurons: usize) -> Seen {
        let zeros = || vec![0.0; neurons];
        Seen { sums: zeros(), squares: zeros(), tokens: 0, massive: zeros() }
    }

    /// Adds the neurons of a sequence, with the tokens that fits leave out.
    fn add(&mut self, neurons: &[f32], left_out: &[bool]) {
        let width = self.squares.len();
        self.tokens += left_out.iter().filter(|is_left_out| !**is_left_out).count();
        for (is_left_out, row) in left_out.iter().zip(neurons.chunks_exact(width)) {
            for (j, &value) in row.iter().enumerate() {
                let value = f64::from(value);
                match is_left_out {
                    true => self.massive[j] = self.massive[j].max(value.abs()),
                    false => {
                        self.sums[j] += value;
                        self.squares[j] += value * value;
                    }
                }
            }
        }
    }

    /// Returns the root mean square of each neuron, around its mean where a constant makes up for that.
    fn sizes(&self, around_mean: bool) -> impl Iterator<Item = f64> {
        let tokens = self.tokens.max(1) as f64;
        self.sums.iter().zip(&self.squares).map(move |(sum, square)| {
            let mean = if around_mean { sum / tokens } else { 0.0 };
            (square / tokens - mean * mean).max(0.0).sqrt()
        })
    }
}

/// Returns the places of values from the largest to the smallest, the first among equals first.
fn descending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order
}
