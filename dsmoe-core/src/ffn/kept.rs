//! The gated FFN of a dense model over inputs and neurons that exceed thresholds, for inference on the host.
//!
//! ```text
//! by inputs   h = act(Wg x_g) * (Wu x_u),  y = Wd h_d               x_g, x_u, h_d: values above their thresholds, else 0
//! by gates    s = act(Wg x_g),  h_j = s_j (Wu x)_j where |s_j| is above the gate's threshold, else 0,  y = Wd h_d
//! ```

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::kept::{self, Columns, FEW_ROWS, PickedRows};
use dsmoe_kernels::matmul::{Mat, Packed};
use dsmoe_kernels::swiglu;

use super::{FfnInference, Gated, PackedFfn, add_output_bias};
use crate::kept::{KeptScratch, LayerThresholds, Linears, LinearsForward};

/// Places of the linears in a layer.
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

#[derive(Debug)]
struct PackedKept {
    gated: Gated,
    layer: usize,
    neurons: Neurons,
    down: Linears<1>,
    /// Biases of gate, up and down, where there are such.
    biases: Option<[Vec<f32>; 3]>,
    output_bias: Vec<f32>,
}

/// How neurons are computed.
#[derive(Debug)]
enum Neurons {
    /// All of them, over inputs that exceed thresholds.
    ByInputs(Linears<2>),
    /// Those whose gate exceeds the threshold.
    ByGates { gate: Linears<1>, up: PickedRows, threshold: f32 },
}

/// Packs the FFN of a layer with these parameters.
pub(crate) fn pack(
    gated: Gated,
    (layer, thresholds): (usize, &LayerThresholds),
    params: &[f32],
    precision: Precision,
) -> Box<dyn PackedFfn> {
    let Gated { hidden, intermediate, .. } = gated;
    let weights = gated.weights(params);
    let [gate, up] = [weights.gate, weights.up].map(|w| Mat::new(w, intermediate, hidden));
    let down = Mat::new(weights.down, intermediate, hidden).t();
    let each = |w: [Mat<'_>; 1], first: usize| linears(w, first, (layer, thresholds), precision);
    let neurons = match thresholds.gate > 0.0 {
        false => Neurons::ByInputs(linears([gate, up], GATE, (layer, thresholds), precision)),
        true => Neurons::ByGates {
            gate: each([gate], GATE),
            up: PickedRows::new(precision, up),
            threshold: thresholds.gate,
        },
    };
    // Zeros of skipped neurons are skipped, too.
    let down = match thresholds.gate > 0.0 {
        true => kept_columns([down], DOWN, (layer, thresholds), precision),
        false => each([down], DOWN),
    };
    let biases = weights.biases.map(|biases| [biases.gate, biases.up, biases.down].map(<[f32]>::to_vec));
    let output_bias = gated.output_bias(params).to_vec();
    Box::new(PackedKept { gated, layer, neurons, down, biases, output_bias })
}

fn linears<const N: usize>(
    ws: [Mat<'_>; N],
    first: usize,
    (layer, thresholds): (usize, &LayerThresholds),
    precision: Precision,
) -> Linears<N> {
    match thresholds.skips_in(first..first + N) {
        false => Linears::Whole(ws.map(|w| Packed::new(precision, w))),
        true => kept_columns(ws, first, (layer, thresholds), precision),
    }
}

fn kept_columns<const N: usize>(
    ws: [Mat<'_>; N],
    first: usize,
    (layer, thresholds): (usize, &LayerThresholds),
    precision: Precision,
) -> Linears<N> {
    Linears::Kept {
        weights: ws.map(|w| Columns::new(precision, w)),
        thresholds: std::array::from_fn(|i| thresholds.inputs[first + i]),
        at: (layer, first),
    }
}

impl PackedKept {
    fn bias(&self, i: usize) -> Option<&[f32]> {
        self.biases.as_ref().map(|biases| &biases[i][..])
    }

    /// Sets `neurons` to the values of the neurons, those of skipped ones to 0.
    fn neurons(&self, x: &[f32], scratch: &mut KeptScratch) {
        let KeptScratch { ops, gate, up, neurons, used } = scratch;
        let rows = x.len() / self.gated.hidden;
        let activation = self.gated.activation;
        for buf in [&mut *gate, &mut *up, &mut *neurons] {
            buf.resize(rows * self.gated.intermediate);
        }
        match &self.neurons {
            Neurons::ByInputs(linears) => {
                let biases = [self.bias(0), self.bias(1)];
                linears.forward(LinearsForward { ys: [&mut *gate, &mut *up], x, biases, rows, ops, used });
                swiglu::Forward { c: neurons, a: gate, b: up, activation }.run();
            }
            Neurons::ByGates { gate: linear, up: picked, threshold } => {
                linear.forward(LinearsForward {
                    ys: [&mut *gate],
                    x,
                    biases: [self.bias(0)],
                    rows,
                    ops,
                    used,
                });
                // The gate by itself: times 1.
                up.fill(1.0);
                swiglu::Forward { c: neurons, a: gate, b: up, activation }.run();
                gate.copy_from_slice(neurons);
                let kept = kept::mask(neurons, gate, *threshold);
                used.add(self.layer, UP, kept * self.gated.hidden);
                self.pick(picked, up, x, neurons, ops);
                neurons.iter_mut().zip(&up[..]).for_each(|(neuron, up)| *neuron *= up);
            }
        }
    }

    /// Sets `up` for the neurons whose gate is not 0.
    fn pick(&self, picked: &PickedRows, up: &mut Buf, x: &[f32], gates: &[f32], ops: &mut kept::Scratch) {
        let Gated { hidden, intermediate, .. } = self.gated;
        if x.len() / hidden > FEW_ROWS {
            picked.forward_all(up, x, self.bias(1), ops);
            return;
        }
        let rows = up.chunks_exact_mut(intermediate).zip(x.chunks_exact(hidden));
        for ((y, x), gates) in rows.zip(gates.chunks_exact(intermediate)) {
            let kept = &mut ops.lists(1)[0];
            kept.list(gates, 0.0, Precision::F32);
            kept::ForwardRows { y, x, w: picked, bias: self.bias(1), kept }.run();
        }
    }
}

impl PackedFfn for PackedKept {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, scratch, .. } = args;
        self.neurons(x, &mut scratch.kept);
        let KeptScratch { ops, neurons, used, .. } = &mut scratch.kept;
        let (rows, biases) = (x.len() / self.gated.hidden, [self.bias(2)]);
        self.down.forward(LinearsForward { ys: [&mut *y], x: neurons, biases, rows, ops, used });
        add_output_bias(y, &self.output_bias);
    }

    fn bytes(&self) -> usize {
        let neurons = match &self.neurons {
            Neurons::ByInputs(linears) => linears.bytes(),
            Neurons::ByGates { gate, up, .. } => gate.bytes() + up.bytes(),
        };
        let biases = self.biases.iter().flatten().chain([&self.output_bias]).map(Vec::len).sum::<usize>();
        neurons + self.down.bytes() + 4 * biases
    }
}
