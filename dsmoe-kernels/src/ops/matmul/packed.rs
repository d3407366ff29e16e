//! Weight matrices in the order in which the product kernels read them.

use std::ops::Range;

use rayon::prelude::*;

use super::block::Panels;
use super::mat::{Mat, Precision};
use super::pack::{PANEL, Part, SLACK, Source, pack, pack_pairs, packs_pairs, pairs};
use crate::buf::Buf;
use crate::isa::Isa;
use crate::simd::{Product, ProductKernel, pair};

/// A weight matrix W `[outputs, inputs]` for `y = x W^T`, in panels of 32 outputs, f32 or bf16.
///
/// A panel holds the weights of its outputs input after input, so a product reads it once, in order, for any number of
/// rows of x. Outputs are padded to whole panels with zeros; in bf16 the inputs are padded to an even number.
#[derive(Clone, Debug)]
pub struct Packed {
    precision: Precision,
    outputs: usize,
    inputs: usize,
    data: Buf,
}

impl Packed {
    /// Makes a matrix of zeros.
    pub fn zeros(precision: Precision, outputs: usize, inputs: usize) -> Packed {
        let panels = outputs.div_ceil(PANEL);
        Packed { precision, outputs, inputs, data: Buf::zeros(panels * panel_len(precision, inputs)) }
    }

    /// Packs `w`, whose rows are the outputs, and rounds it to `precision`.
    pub fn new(precision: Precision, w: Mat<'_>) -> Packed {
        let mut packed = Packed::zeros(precision, w.rows, w.cols);
        packed.set_rows(0, w);
        packed
    }

    /// Sets outputs `first..first + w.rows`, to fill a matrix piece by piece. Pieces of whole panels (32 outputs) are
    /// fastest.
    ///
    /// # Panics
    /// The rows do not fit.
    pub fn set_rows(&mut self, first: usize, w: Mat<'_>) {
        let (Packed { outputs, inputs, .. }, cols, end) = (&*self, w.cols, first + w.rows);
        let fit = cols == *inputs && end <= *outputs;
        assert!(fit, "packed: rows {first}..{end} of {cols} values into [{outputs}, {inputs}]");
        if w.rows == 0 || w.cols == 0 {
            return;
        }
        let (precision, inputs) = (self.precision, self.inputs);
        let len = panel_len(precision, inputs);
        let panels = first / PANEL..(first + w.rows).div_ceil(PANEL);
        let data = &mut self.data[panels.start * len..panels.end * len];
        data.par_chunks_exact_mut(len).zip(panels).for_each(|(data, panel)| {
            let lanes = first.max(panel * PANEL)..(first + w.rows).min((panel + 1) * PANEL);
            if lanes.len() == PANEL || lanes == (panel * PANEL..self.outputs) {
                let rows = lanes.start - first..lanes.end - first;
                let parts = [(Source::rows(w), rows)];
                Isa::current().run_product(PackPanel { out: data, parts, ks: 0..inputs, precision });
                return;
            }
            for lane in lanes {
                for k in 0..inputs {
                    set(data, precision, lane - panel * PANEL, k, w.at(lane - first, k));
                }
            }
        });
    }

    /// Sets `out` to the weights of one output.
    ///
    /// # Panics
    /// There is no such output, or `out` is not as long as the inputs.
    pub fn row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs, "packed: output {output} of {}", self.outputs);
        assert_eq!(out.len(), self.inputs, "packed: values of an output");
        let len = panel_len(self.precision, self.inputs);
        let panel = &self.data[output / PANEL * len..][..len];
        let lane = output % PANEL;
        match self.precision {
            Precision::F32 => {
                out.iter_mut().zip(panel.chunks_exact(PANEL)).for_each(|(out, k)| *out = k[lane]);
            }
            Precision::Bf16 => {
                let panel: &[u32] = bytemuck::cast_slice(panel);
                for (out, k) in out.chunks_mut(2).zip(panel.chunks_exact(PANEL)) {
                    out[0] = f32::from_bits(k[lane] << 16);
                    if let Some(out) = out.get_mut(1) {
                        *out = f32::from_bits(k[lane] & 0xffff_0000);
                    }
                }
            }
        }
    }

    /// Returns the rows of W.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Returns the columns of W.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Returns the precision of the stored weights.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns the bytes of memory, padding included.
    pub fn bytes(&self) -> usize {
        4 * self.data.len()
    }

    pub(crate) fn panels(&self) -> Panels<'_> {
        panels(self.precision, &self.data)
    }
}

/// Returns the f32 values that a panel takes.
pub(crate) fn panel_len(precision: Precision, inputs: usize) -> usize {
    match precision {
        Precision::F32 => inputs * PANEL,
        Precision::Bf16 => inputs.div_ceil(2) * PANEL,
    }
}

pub(crate) fn panels(precision: Precision, data: &[f32]) -> Panels<'_> {
    match precision {
        Precision::F32 => Panels::F32(data),
        Precision::Bf16 => Panels::Pairs(bytemuck::cast_slice(data)),
    }
}

fn set(panel: &mut [f32], precision: Precision, lane: usize, k: usize, value: f32) {
    match precision {
        Precision::F32 => panel[k * PANEL + lane] = value,
        Precision::Bf16 => {
            let pairs: &mut [u32] = bytemuck::cast_slice_mut(panel);
            let old = &mut pairs[k / 2 * PANEL + lane];
            let (even, odd) = (f32::from_bits(*old << 16), f32::from_bits(*old & 0xffff_0000));
            *old = if k.is_multiple_of(2) { pair(value, odd) } else { pair(even, value) };
        }
    }
}

/// Sets one panel to lanes of one source, or of two that share the panel half and half, rounded to the precision;
/// missing lanes become 0.
pub(crate) struct PackPanel<'a, const N: usize> {
    pub(crate) out: &'a mut [f32],
    pub(crate) parts: [(Source<'a>, Range<usize>); N],
    pub(crate) ks: Range<usize>,
    pub(crate) precision: Precision,
}

/// Inputs that are packed before they are rounded: the block stays in the first-level cache.
const STEP: usize = 128;

impl<const N: usize> ProductKernel for PackPanel<'_, N> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let PackPanel { out, parts, ks, precision } = self;
        let width = PANEL / N;
        match precision {
            Precision::F32 => {
                for (part, (source, lanes)) in parts.into_iter().enumerate() {
                    pack(s, &mut out[part * width..], (width, PANEL), Part { source, lanes, ks: ks.clone() });
                }
            }
            Precision::Bf16 if S::DOTS && parts.iter().all(|(source, _)| packs_pairs(source)) => {
                let out: &mut [u32] = bytemuck::cast_slice_mut(out);
                for (part, (source, lanes)) in parts.into_iter().enumerate() {
                    let packed = Part { source, lanes, ks: ks.clone() };
                    pack_pairs(s, &mut out[part * width..], (width, PANEL), packed);
                }
            }
            Precision::Bf16 => {
                let mut values = [0.0; STEP * PANEL + SLACK];
                let out: &mut [u32] = bytemuck::cast_slice_mut(out);
                for start in (0..ks.len()).step_by(STEP) {
                    let depth = STEP.min(ks.len() - start);
                    let now = ks.start + start..ks.start + start + depth;
                    for (part, (source, lanes)) in parts.iter().enumerate() {
                        let values = &mut values[part * width..];
                        let part = Part { source: *source, lanes: lanes.clone(), ks: now.clone() };
                        pack(s, values, (width, PANEL), part);
                    }
                    if depth % 2 == 1 {
                        values[depth * PANEL..(depth + 1) * PANEL].fill(0.0);
                    }
                    pairs(s, &mut out[start / 2 * PANEL..], &values, PANEL, depth.next_multiple_of(2));
                }
            }
        }
    }
}
