//! The parts of a layer's forward pass in which families differ.

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{add, rms_norm};

use crate::config::{Architecture, Config};

/// The constants of a model's norms and joins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    offset: f32,
    eps: f32,
    residual_scale: f32,
}

impl Block {
    pub(crate) fn of(config: &Config) -> Block {
        let Architecture { norm_offset: offset, residual_scale, .. } = config.architecture;
        Block { offset, eps: config.rms_norm_eps as f32, residual_scale }
    }

    /// Sets `y` to the norm of `x`.
    pub(crate) fn norm(self, weight: &[f32], y: &mut [f32], rstd: &mut [f32], x: &[f32]) {
        rms_norm::Forward { y, rstd, x, weight, offset: self.offset, eps: self.eps }.run();
    }

    /// Sets `x` to the sum of two parts, and `y` and `rstd` to its norm.
    pub(crate) fn norm_sum(self, weight: &[f32], [y, rstd, x]: [&mut [f32]; 3], [a, b]: [&[f32]; 2]) {
        rms_norm::ForwardSum { y, rstd, x, a, b, weight, offset: self.offset, eps: self.eps }.run();
    }

    /// Returns what attention or the FFN reads: the norm of `x`, which `h` is set to, or `x` itself without a norm.
    pub(crate) fn input<'a>(
        self,
        weight: Option<&[f32]>,
        h: &'a mut [f32],
        rstd: &mut [f32],
        x: &'a [f32],
    ) -> &'a [f32] {
        match weight {
            Some(weight) => {
                self.norm(weight, h, rstd, x);
                h
            }
            None => x,
        }
    }

    /// Adds what attention or the FFN gives, `y`, to the residual stream `x`: its norm, for which `h` is used, where there
    /// is one after it.
    pub(crate) fn join(
        self,
        x: &mut [f32],
        y: &[f32],
        weight: Option<&[f32]>,
        h: &mut [f32],
        rstd: &mut [f32],
    ) {
        let y = self.input(weight, h, rstd, y);
        add::Add { y: x, x: y, scale: self.residual_scale }.run();
    }

    /// Returns the heads that the norm of queries or keys is taken over, by the length of its weight: each by itself, or
    /// the whole row, in rows of `stride` values.
    pub(crate) fn heads(self, weight: &[f32], width: usize, stride: usize) -> rms_norm::Heads {
        rms_norm::Heads { heads: width / weight.len(), stride, offset: self.offset, eps: self.eps }
    }

    /// Norms queries or keys, `[tokens, width]`, in place; `scratch` has at least one value per head.
    pub(crate) fn norm_heads(self, x: &mut [f32], width: usize, weight: &[f32], scratch: &mut Buf) {
        let heads = self.heads(weight, width, width);
        let rstd = &mut scratch[..x.len() / width * heads.heads];
        rms_norm::ForwardHeads { x, saved: None, rstd, weight, heads }.run();
    }
}
