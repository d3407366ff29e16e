//! Expert weights in the order in which the kernels read them.

use rayon::prelude::*;

use super::dims::{Biases, Dims, Weights, check};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::picked::Strided;
use crate::matmul::{Mat, PANEL, PackPanel, Panels, Precision, Source, panel_len, panels};

/// Neurons of a panel of gate and up weights: its first half holds gate rows, its second half up rows.
pub(super) const NEURONS: usize = PANEL / 2;

/// The three matrices of an expert FFN for inference, f32 or bf16.
///
/// An expert's gate and up rows are interleaved by 16 neurons, so one product gives both inputs of their SwiGLU. The
/// experts are stored apart: inactive experts are not read. The core is stored as one expert. Down weights of several
/// experts are stored by 16 neurons, so that what a token reads of an expert is contiguous; those of a dense FFN by 32
/// columns.
#[derive(Clone, Debug)]
pub struct PackedWeights {
    precision: Precision,
    /// Of no tokens.
    dims: Dims,
    /// The core and the experts outside, those that there are.
    parts: Vec<PackedExperts>,
    down_bias: Option<Buf>,
}

impl PackedWeights {
    /// Packs `weights` of an FFN of the sizes `dims`, whose tokens are not read, rounded to `precision`.
    ///
    /// # Panics
    /// Lengths do not fit, or `num_experts` does not divide `intermediate`.
    pub fn new(precision: Precision, weights: &Weights<'_>, dims: Dims) -> PackedWeights {
        let dims = Dims { tokens: 0, ..dims };
        check("PackedWeights::new", &[], &[], weights, dims);
        let core = dims.core_neurons();
        let parts = [(dims.of_core(), 0..core), (dims.of_routed(), core..dims.intermediate)];
        let parts = parts.into_iter().filter(|(_, neurons)| !neurons.is_empty());
        let by_neurons = dims.num_experts > 1;
        let parts = parts.map(|(dims, neurons)| {
            PackedExperts::new(precision, &weights.of(neurons, dims.hidden), dims, by_neurons)
        });
        let down_bias = weights.biases.map(|biases| {
            let mut down = Buf::zeros(biases.down.len());
            down.copy_from_slice(biases.down);
            down
        });
        PackedWeights { precision, dims, parts: parts.collect(), down_bias }
    }

    /// Returns the bytes of memory, padding included.
    pub fn bytes(&self) -> usize {
        let bias = 4 * self.down_bias.as_ref().map_or(0, |bias| bias.len());
        self.parts.iter().map(PackedExperts::bytes).sum::<usize>() + bias
    }

    /// Returns the precision of the stored weights.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns the sizes, for no tokens.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// Returns the core and the experts outside, those that there are.
    pub(super) fn parts(&self) -> &[PackedExperts] {
        &self.parts
    }

    /// Returns the bias of the down projection.
    pub(super) fn down_bias(&self) -> Option<&[f32]> {
        self.down_bias.as_deref()
    }
}

/// The experts of one kind: the core as one expert, or those outside.
#[derive(Clone, Debug)]
pub(super) struct PackedExperts {
    precision: Precision,
    num_experts: usize,
    gate_up: Buf,
    gate_up_len: usize,
    down: Buf,
    /// Words of the down weights from a panel of columns to the next, and from a group of neurons to the next.
    down_strides: [usize; 2],
    /// The biases in f32, a value for every column of the panels of gate and up weights, expert after expert.
    gate_up_biases: Option<Buf>,
}

impl PackedExperts {
    /// Packs the experts, their down weights by groups of neurons if `by_neurons`, or by columns.
    fn new(precision: Precision, weights: &Weights<'_>, dims: Dims, by_neurons: bool) -> PackedExperts {
        let Dims { hidden, num_experts, .. } = dims;
        let sizes = Sizes { precision, hidden, width: dims.expert_width() };
        let mut packed = PackedExperts {
            precision,
            num_experts,
            gate_up: Buf::zeros(num_experts * sizes.gate_up_panels() * sizes.gate_up_len()),
            down: Buf::zeros(num_experts * sizes.down_panels() * sizes.down_len()),
            gate_up_len: sizes.gate_up_len(),
            down_strides: match by_neurons {
                true => [sizes.group_len(), sizes.down_panels() * sizes.group_len()],
                false => [sizes.down_len(), sizes.group_len()],
            },
            gate_up_biases: weights.biases.map(|biases| gate_up_biases(biases, sizes, num_experts)),
        };
        if hidden == 0 {
            return packed;
        }
        let isa = Isa::current();
        packed.gate_up.par_chunks_exact_mut(sizes.gate_up_len()).enumerate().for_each(|(i, out)| {
            let (expert, panel) = (i / sizes.gate_up_panels(), i % sizes.gate_up_panels());
            let parts = gate_up_parts(weights, hidden, sizes.width, expert, panel);
            isa.run_product(PackPanel { out, parts, ks: 0..hidden, precision });
        });
        let [panel_stride, group_stride] = packed.down_strides;
        let expert_len = sizes.down_panels() * sizes.down_len();
        packed.down.par_chunks_exact_mut(sizes.group_len()).enumerate().for_each(|(i, out)| {
            let (expert, at) = (i * sizes.group_len() / expert_len, i * sizes.group_len() % expert_len);
            let (panel, group) = match by_neurons {
                true => (at % group_stride / panel_stride, at / group_stride),
                false => (at / panel_stride, at % panel_stride / group_stride),
            };
            let part = row_columns(weights.down, hidden, panel);
            let ks = panel_neurons(sizes.width, expert, group);
            isa.run_product(PackPanel { out, parts: [part], ks, precision });
        });
        packed
    }

    fn bytes(&self) -> usize {
        let biases = self.gate_up_biases.as_ref().map_or(0, |biases| biases.len());
        4 * (self.gate_up.len() + self.down.len() + biases)
    }

    pub(super) fn gate_up(&self, expert: usize) -> Panels<'_> {
        let len = self.gate_up.len() / self.num_experts;
        panels(self.precision, &self.gate_up[expert * len..][..len])
    }

    /// Returns the panels of down weights of an expert, for those of a dense FFN.
    pub(super) fn down(&self, expert: usize) -> Panels<'_> {
        let len = self.down.len() / self.num_experts;
        panels(self.precision, &self.down[expert * len..][..len])
    }

    /// Returns the panels of gate and up weights of an expert as words, and the words of a panel.
    pub(super) fn gate_up_words(&self, expert: usize) -> (&[f32], usize) {
        let len = self.gate_up.len() / self.num_experts;
        (&self.gate_up[expert * len..][..len], self.gate_up_len)
    }

    /// Returns the down weights of an expert.
    pub(super) fn down_words(&self, expert: usize) -> Strided<'_> {
        let (len, [panel, group]) = (self.down.len() / self.num_experts, self.down_strides);
        Strided { words: &self.down[expert * len..][..len], panel, group }
    }

    /// Returns the biases of the columns of an expert's panels of gate and up weights.
    pub(super) fn gate_up_biases(&self, expert: usize) -> Option<&[f32]> {
        let biases = self.gate_up_biases.as_ref()?;
        let len = biases.len() / self.num_experts;
        Some(&biases[expert * len..][..len])
    }
}

fn gate_up_biases(biases: Biases<'_>, sizes: Sizes, num_experts: usize) -> Buf {
    let mut gate_up = Buf::zeros(num_experts * sizes.gate_up_panels() * PANEL);
    for (i, out) in gate_up.chunks_exact_mut(PANEL).enumerate() {
        let (expert, panel) = (i / sizes.gate_up_panels(), i % sizes.gate_up_panels());
        let neurons = panel_neurons(sizes.width, expert, panel);
        let (gate, up) = out.split_at_mut(NEURONS);
        gate[..neurons.len()].copy_from_slice(&biases.gate[neurons.clone()]);
        up[..neurons.len()].copy_from_slice(&biases.up[neurons]);
    }
    gate_up
}

/// Sizes of one expert's panels.
#[derive(Clone, Copy)]
struct Sizes {
    precision: Precision,
    hidden: usize,
    width: usize,
}

impl Sizes {
    fn gate_up_panels(self) -> usize {
        self.width.div_ceil(NEURONS)
    }

    fn gate_up_len(self) -> usize {
        panel_len(self.precision, self.hidden)
    }

    fn down_panels(self) -> usize {
        self.hidden.div_ceil(PANEL)
    }

    fn down_len(self) -> usize {
        panel_len(self.precision, tile_depth(self.width))
    }

    fn group_len(self) -> usize {
        panel_len(self.precision, NEURONS)
    }
}

/// Returns the neurons of a tile of activations: whole panels, padded with zeros.
pub(super) fn tile_depth(width: usize) -> usize {
    width.next_multiple_of(NEURONS)
}

/// Returns the neurons of panel `panel` of `expert`.
fn panel_neurons(width: usize, expert: usize, panel: usize) -> std::ops::Range<usize> {
    let first = expert * width;
    first + panel * NEURONS..first + width.min((panel + 1) * NEURONS)
}

/// Returns the gate and the up rows of panel `panel` of `expert`.
fn gate_up_parts<'a>(
    weights: &Weights<'a>,
    hidden: usize,
    width: usize,
    expert: usize,
    panel: usize,
) -> [(Source<'a>, std::ops::Range<usize>); 2] {
    let neurons = panel_neurons(width, expert, panel);
    [weights.gate, weights.up].map(|w| (Source::rows(Mat::new(w, w.len() / hidden, hidden)), neurons.clone()))
}

/// Returns the columns of panel `panel` of a matrix with rows of `hidden` values, whose rows are k.
pub(super) fn row_columns(w: &[f32], hidden: usize, panel: usize) -> (Source<'_>, std::ops::Range<usize>) {
    let columns = panel * PANEL..hidden.min((panel + 1) * PANEL);
    (Source::rows(Mat::new(w, w.len() / hidden, hidden).t()), columns)
}
