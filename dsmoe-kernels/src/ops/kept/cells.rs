//! Storage of weights of which single runs are read: `depth` runs of `width` lanes, one after the other.

use rayon::prelude::*;

use super::PANEL;
use crate::buf::Buf;
use crate::matmul::{Mat, Packed, Precision};
use crate::simd::pair;

/// Lanes of a group of bf16: word i holds lanes i and i + 16, so that a register of words is two registers of neighbouring
/// lanes on any tier.
pub(super) const GROUP: usize = 32;
/// Words of a group.
pub(super) const WORDS: usize = GROUP / 2;

/// Runs that are set together, so that what a row of weights has for them is read once.
const RUNS: usize = 16;

/// `[depth, width]` values, f32 or bf16.
#[derive(Clone, Debug)]
pub(super) struct Cells {
    pub(super) precision: Precision,
    /// Lanes of a run: `lanes`, padded to a multiple of [`PANEL`].
    pub(super) width: usize,
    pub(super) lanes: usize,
    pub(super) depth: usize,
    data: Buf,
}

impl Cells {
    pub(super) fn zeros(precision: Precision, lanes: usize, depth: usize) -> Cells {
        let width = lanes.next_multiple_of(PANEL);
        Cells { precision, width, lanes, depth, data: Buf::zeros(depth * run(precision, width)) }
    }

    pub(super) fn bytes(&self) -> usize {
        4 * self.data.len()
    }

    /// Returns the f32 words of a run.
    pub(super) fn run(&self) -> usize {
        run(self.precision, self.width)
    }

    /// Returns the words of all runs.
    pub(super) fn words(&self) -> &[f32] {
        &self.data
    }

    /// Sets lanes `first..first + w.rows` to the rows of `w`.
    pub(super) fn set_lanes(&mut self, first: usize, w: Mat<'_>) {
        let (precision, len) = (self.precision, self.run());
        if w.rows == 0 || self.depth == 0 {
            return;
        }
        self.data.par_chunks_mut(RUNS * len).enumerate().for_each(|(at, runs)| {
            for row in 0..w.rows {
                for (i, run) in runs.chunks_exact_mut(len).enumerate() {
                    set(run, precision, first + row, w.at(row, at * RUNS + i));
                }
            }
        });
    }

    /// Gives the lanes in blocks: the first one, and the values `[depth, lanes]`.
    pub(super) fn each_block(&self, mut see: impl FnMut(usize, Mat<'_>)) {
        let mut widened = Buf::default();
        for first in (0..self.lanes).step_by(PANEL) {
            let lanes = PANEL.min(self.lanes - first);
            if self.precision == Precision::F32 {
                see(first, Mat::with_stride(&self.data[first..], self.depth, lanes, self.width));
                continue;
            }
            widened.resize(self.depth * PANEL);
            let runs = self.data.par_chunks_exact(self.run());
            widened.par_chunks_exact_mut(PANEL).zip(runs).with_min_len(1 << 6).for_each(|(out, run)| {
                widen(out, &run[first / 2..]);
            });
            see(first, Mat::with_stride(&widened, self.depth, lanes, PANEL));
        }
    }

    /// Sets `packed`, whose rows are the runs.
    pub(super) fn pack_depth(&self, packed: &mut Packed) {
        let mut widened = Buf::default();
        for first in (0..self.depth).step_by(PANEL) {
            let (rows, len) = (PANEL.min(self.depth - first), self.run());
            let runs = &self.data[first * len..][..rows * len];
            let values = match self.precision {
                Precision::F32 => runs,
                Precision::Bf16 => {
                    widened.resize(rows * self.width);
                    let rows = widened
                        .par_chunks_exact_mut(self.width.max(1))
                        .zip(runs.par_chunks_exact(len.max(1)));
                    rows.for_each(|(out, run)| widen(out, run));
                    &widened
                }
            };
            packed.set_rows(first, Mat::with_stride(values, rows, self.lanes, self.width));
        }
    }
}

/// Sets `out`, whole groups, to the values of `words` of bf16.
fn widen(out: &mut [f32], words: &[f32]) {
    for (out, words) in out.chunks_exact_mut(GROUP).zip(words.chunks_exact(WORDS)) {
        let (low, high) = out.split_at_mut(WORDS);
        for ((low, high), word) in low.iter_mut().zip(high).zip(words) {
            *low = f32::from_bits(word.to_bits() << 16);
            *high = f32::from_bits(word.to_bits() & 0xffff_0000);
        }
    }
}

/// Returns the f32 words of `width` lanes.
fn run(precision: Precision, width: usize) -> usize {
    match precision {
        Precision::F32 => width,
        Precision::Bf16 => width / 2,
    }
}

fn set(run: &mut [f32], precision: Precision, lane: usize, value: f32) {
    match precision {
        Precision::F32 => run[lane] = value,
        Precision::Bf16 => {
            let word = &mut run[lane / GROUP * WORDS + lane % WORDS];
            let bits = word.to_bits();
            let (low, high) = (f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000));
            let is_low = lane % GROUP < WORDS;
            *word = f32::from_bits(if is_low { pair(value, high) } else { pair(low, value) });
        }
    }
}
