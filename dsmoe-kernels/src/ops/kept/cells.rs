//! Storage of weights of which single runs are read: `depth` runs of `width` lanes in every panel, one after the other.

use rayon::prelude::*;

use super::PANEL;
use crate::buf::Buf;
use crate::matmul::{Mat, Precision};
use crate::simd::pair;

/// Lanes of a group of bf16: word i holds lanes i and i + 16, so that a register of words is two registers of neighbouring
/// lanes on any tier.
pub(super) const GROUP: usize = 32;
/// Words of a group.
pub(super) const WORDS: usize = GROUP / 2;

/// `[panels, depth, width]` values, f32 or bf16.
#[derive(Clone, Debug)]
pub(super) struct Cells {
    pub(super) precision: Precision,
    /// Lanes of a panel, a multiple of [`PANEL`].
    pub(super) width: usize,
    pub(super) lanes: usize,
    pub(super) depth: usize,
    data: Buf,
}

impl Cells {
    pub(super) fn zeros(precision: Precision, width: usize, lanes: usize, depth: usize) -> Cells {
        debug_assert!(width.is_multiple_of(PANEL), "cells: width {width}");
        let panels = if width == 0 { 0 } else { lanes.div_ceil(width) };
        let data = Buf::zeros(panels * depth * run(precision, width));
        Cells { precision, width, lanes, depth, data }
    }

    pub(super) fn bytes(&self) -> usize {
        4 * self.data.len()
    }

    /// Returns the f32 words of a run of one panel.
    pub(super) fn run(&self) -> usize {
        run(self.precision, self.width)
    }

    /// Returns the words of a panel.
    pub(super) fn panel(&self, panel: usize) -> &[f32] {
        let len = self.depth * self.run();
        &self.data[panel * len..][..len]
    }

    /// Sets lanes `first..first + w.rows` to the rows of `w`.
    pub(super) fn set_lanes(&mut self, first: usize, w: Mat<'_>) {
        let (width, depth, precision, run) = (self.width, self.depth, self.precision, self.run());
        if w.rows == 0 || depth == 0 {
            return;
        }
        let panels = first / width..(first + w.rows).div_ceil(width);
        let len = depth * run;
        let data = &mut self.data[panels.start * len..panels.end * len];
        data.par_chunks_mut(run).enumerate().for_each(|(at, run)| {
            let (panel, k) = (panels.start + at / depth, at % depth);
            let lanes = first.max(panel * width)..(first + w.rows).min((panel + 1) * width);
            for lane in lanes {
                set(run, precision, lane - panel * width, w.at(lane - first, k));
            }
        });
    }

    /// Gives every panel: its first lane, its lanes, and its values `[depth, width]`.
    pub(super) fn each_panel(&self, mut see: impl FnMut(usize, usize, &[f32])) {
        let mut widened = Buf::default();
        for first in (0..self.lanes).step_by(self.width.max(1)) {
            let (lanes, panel) = (self.width.min(self.lanes - first), self.panel(first / self.width));
            match self.precision {
                Precision::F32 => see(first, lanes, panel),
                Precision::Bf16 => {
                    widened.resize(2 * panel.len());
                    let groups = widened.par_chunks_exact_mut(GROUP).zip(panel.par_chunks_exact(WORDS));
                    groups.with_min_len(1 << 10).for_each(|(out, words)| {
                        let (low, high) = out.split_at_mut(WORDS);
                        for ((low, high), word) in low.iter_mut().zip(high).zip(words) {
                            *low = f32::from_bits(word.to_bits() << 16);
                            *high = f32::from_bits(word.to_bits() & 0xffff_0000);
                        }
                    });
                    see(first, lanes, &widened);
                }
            }
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
