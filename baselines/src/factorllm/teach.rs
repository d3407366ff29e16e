//! The training samples of a router: inputs of a layer's FFN, labelled with the experts that approximate the dense FFN best.

use dsmoe_core::calibrate::{Input, Linear, Tap};
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, linear};

use super::labels::{Choice, Label, Products};
use crate::topk::fit::{Examples, HELD_OUT};
use crate::topk::{Gate, GateActs};

/// The examples of one layer's router, and the products of held-out tokens.
pub(super) struct Teaching<'a> {
    pub(super) examples: Examples,
    order: &'a [u32],
    /// The columns of down of every expert: `[hidden, neurons of an expert]`.
    parts: Vec<Vec<f32>>,
    hidden: usize,
    choice: Choice,
    label: Label,
    /// One token of so many is seen.
    every: usize,
    /// `[held-out tokens, n, n]`
    held_out: Vec<f64>,
    /// Values of the neurons of one expert, for the tokens of a sequence.
    neurons: Vec<f32>,
    /// `[n, tokens, hidden]`: outputs of the experts for the tokens of a sequence.
    outputs: Vec<Buf>,
}

impl<'a> Teaching<'a> {
    pub(super) fn new(
        down: &Linear,
        order: &'a [u32],
        choice: Choice,
        label: Label,
        every: usize,
    ) -> Teaching<'a> {
        let n = choice.num_experts;
        let columns = |expert: &[u32]| {
            let rows = down.weight.chunks_exact(down.inputs);
            rows.flat_map(|row| expert.iter().map(|&j| row[j as usize])).collect()
        };
        Teaching {
            examples: Examples { inputs: Vec::new(), scores: Vec::new() },
            order,
            parts: order.chunks_exact(order.len() / n).map(columns).collect(),
            hidden: down.outputs,
            choice,
            label,
            every,
            held_out: Vec::new(),
            neurons: Vec::new(),
            outputs: (0..n).map(|_| Buf::default()).collect(),
        }
    }

    /// Takes what the linears of a layer read in one sequence of `seq` tokens.
    pub(super) fn see(&mut self, tap: &Tap<'_>, seq: usize) {
        let chosen: Vec<usize> =
            (0..seq).filter(|t| (tap.sequence * seq + t).is_multiple_of(self.every)).collect();
        match tap.input {
            Input::Ffn => {
                let row = |&t: &usize| &tap.x[t * self.hidden..][..self.hidden];
                let inputs = &mut self.examples.inputs;
                chosen.iter().for_each(|t| inputs.extend_from_slice(row(t)));
            }
            Input::Neurons => self.label(tap.x, &chosen),
            Input::Attention | Input::Heads => {}
        }
    }

    /// Labels the `chosen` tokens, whose neurons have the `values`.
    fn label(&mut self, values: &[f32], chosen: &[usize]) {
        let (n, width) = (self.choice.num_experts, self.order.len());
        let experts = self.order.chunks_exact(width / n).zip(&self.parts).zip(&mut self.outputs);
        for ((expert, part), output) in experts {
            self.neurons.clear();
            for &t in chosen {
                let row = &values[t * width..][..width];
                self.neurons.extend(expert.iter().map(|&j| row[j as usize]));
            }
            output.resize(chosen.len() * self.hidden);
            let (rows, precision) = (chosen.len(), Precision::F32);
            let dims = linear::Dims { rows, inputs: expert.len(), outputs: self.hidden, precision };
            linear::Forward { y: output, x: &self.neurons, w: part, bias: None, dims }.run();
        }
        let mut gram = vec![0.0; n * n];
        for t in 0..chosen.len() {
            let output = |i: usize| &self.outputs[i][t * self.hidden..][..self.hidden];
            for i in 0..n {
                for j in 0..=i {
                    let pairs = output(i).iter().zip(output(j));
                    let product = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    (gram[i * n + j], gram[j * n + i]) = (product, product);
                }
            }
            let labelled = Products { gram: &gram, choice: self.choice }.chosen(self.label);
            let place = self.examples.scores.len() / n;
            self.examples.scores.resize((place + 1) * n, 0.0);
            labelled.iter().for_each(|&i| self.examples.scores[place * n + i] = 1.0);
            if place % HELD_OUT == HELD_OUT - 1 {
                self.held_out.extend_from_slice(&gram);
            }
        }
    }

    /// Returns the squared errors of the layer's output on held-out tokens over the squared norm of the dense one: with the
    /// experts that `gate` of `tensors` chooses, with those that are labelled, and with random ones, in the mean.
    pub(super) fn errors(&self, gate: &Gate, tensors: &[Vec<f32>]) -> [f64; 3] {
        let Choice { num_experts: n, top_k, .. } = self.choice;
        let inputs = self.examples.inputs.chunks_exact(self.hidden).skip(HELD_OUT - 1).step_by(HELD_OUT);
        let inputs: Vec<f32> = inputs.flatten().copied().collect();
        let mut z = Buf::default();
        gate.forward(&mut z, &mut GateActs::default(), &inputs, gate.weights(tensors), false);
        let mut sums = [0.0; 4];
        for (z, gram) in z.chunks_exact(n).zip(self.held_out.chunks_exact(n * n)) {
            let products = Products { gram, choice: self.choice };
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_unstable_by(|&i, &j| z[j].total_cmp(&z[i]).then(i.cmp(&j)));
            sums[0] += products.error(&order[..top_k]);
            sums[1] += products.error(&products.chosen(self.label));
            sums[2] += products.error_of_chance();
            sums[3] += products.dense();
        }
        let of = |i: usize| if sums[3] > 0.0 { sums[i] / sums[3] } else { 0.0 };
        [of(0), of(1), of(2)]
    }
}
