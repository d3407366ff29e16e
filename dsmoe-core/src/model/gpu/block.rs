//! The parts of a layer in which families differ; the counterpart of [`crate::model::block`].

use dsmoe_kernels::cuda::Matrix;
use dsmoe_kernels::cuda::ops::attention::Heads;
use dsmoe_kernels::cuda::ops::router::Routed;
use dsmoe_kernels::cuda::ops::slots::Slots;
use dsmoe_kernels::cuda::ops::{elementwise, rms_norm};
use half::bf16;

use crate::config::{Architecture, Config};
use crate::error::Result;

/// The constants of a model's norms and joins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) offset: f32,
    pub(crate) residual_scale: f32,
    eps: f32,
}

/// A block's output on its way into the residual stream.
pub(crate) struct Join<'a> {
    /// The stream after it; set.
    pub(crate) out: &'a mut Matrix<f32>,
    /// The rounded input of the next block; set.
    pub(crate) h: &'a mut Matrix<bf16>,
    /// The reciprocal deviations of the norm that the next block reads; set if there is one.
    pub(crate) rstd: &'a mut Matrix<f32>,
    /// The stream before it.
    pub(crate) residual: &'a Matrix<f32>,
    pub(crate) branch: Branch<'a>,
    /// The weight of the norm that the next block reads.
    pub(crate) next: Option<&'a Matrix<f32>>,
}

/// A block's output.
#[derive(Clone, Copy)]
pub(crate) enum Branch<'a> {
    /// `[T, hidden]`
    Rows(&'a Matrix<f32>),
    /// The parts of pairs in slots, which are added up on the way. Only a norm takes them.
    Parts { parts: &'a Matrix<bf16>, slots: &'a Slots, routed: &'a Routed },
}

/// The norm that follows a block.
pub(crate) struct After<'a> {
    pub(crate) weight: &'a Matrix<f32>,
    /// Its input; set.
    pub(crate) x: &'a mut Matrix<f32>,
    /// Its reciprocal deviations; set.
    pub(crate) rstd: &'a mut Matrix<f32>,
}

impl Block {
    pub(crate) fn of(config: &Config) -> Block {
        let Architecture { norm_offset: offset, residual_scale, .. } = config.architecture;
        Block { offset, eps: config.rms_norm_eps as f32, residual_scale }
    }

    /// Sets `h` to what a block reads of the residual stream `x`: its norm, or `x` itself without one.
    pub(crate) fn read(
        self,
        weight: Option<&Matrix<f32>>,
        h: &mut Matrix<bf16>,
        rstd: &mut Matrix<f32>,
        x: &Matrix<f32>,
    ) -> Result<()> {
        let Block { offset, eps, .. } = self;
        match weight {
            Some(weight) => rms_norm::Forward { h, rstd, x, weight, offset, eps }.run()?,
            None => elementwise::Cast { out: h, x }.run()?,
        }
        Ok(())
    }

    /// Sets `h` to what [`Block::read`] or [`Block::join`] set it to.
    pub(crate) fn restore(
        self,
        weight: Option<&Matrix<f32>>,
        h: &mut Matrix<bf16>,
        x: &Matrix<f32>,
        rstd: &Matrix<f32>,
    ) -> Result<()> {
        match weight {
            Some(weight) => rms_norm::Restore { h, x, weight, offset: self.offset, rstd }.run()?,
            None => elementwise::Cast { out: h, x }.run()?,
        }
        Ok(())
    }

    /// Sets `y` to what a block gives, which `run` sets its argument to, or to the norm of it.
    pub(crate) fn give(
        self,
        y: &mut Matrix<f32>,
        after: Option<After<'_>>,
        run: impl FnOnce(&mut Matrix<f32>) -> Result<()>,
    ) -> Result<()> {
        let Some(After { weight, x, rstd }) = after else { return run(y) };
        let Block { offset, eps, .. } = self;
        run(&mut *x)?;
        Ok(rms_norm::Forward { h: y, rstd, x, weight, offset, eps }.run()?)
    }

    /// Adds a block's output to the residual stream and sets what the next block reads.
    pub(crate) fn join(self, join: Join<'_>) -> Result<()> {
        let Join { out, h, rstd, residual: x, branch, next } = join;
        let Block { offset, eps, residual_scale: scale } = self;
        match (next, branch) {
            (Some(weight), Branch::Rows(y)) => {
                rms_norm::ForwardSum { h, rstd, out, x, y, weight, offset, scale, eps }.run()?;
            }
            (Some(weight), Branch::Parts { parts, slots, routed }) => {
                rms_norm::ForwardParts { h, rstd, out, x, parts, slots, routed, weight, offset, scale, eps }
                    .run()?;
            }
            (None, Branch::Rows(y)) => elementwise::Join { h, out, x, y, scale }.run()?,
            (None, Branch::Parts { .. }) => unreachable!("parts of a block that no norm follows"),
        }
        Ok(())
    }

    /// Norms queries or keys in rows of qkv, in place. `saved` gets the old values.
    pub(crate) fn norm_heads(
        self,
        x: &mut Matrix<bf16>,
        saved: Option<&mut Matrix<bf16>>,
        rstd: &mut Matrix<f32>,
        weight: &Matrix<f32>,
        heads: rms_norm::Heads,
    ) -> Result<()> {
        Ok(rms_norm::ForwardHeads { x, saved, rstd, weight, heads, eps: self.eps }.run()?)
    }

    /// Returns the heads that norms of queries and of keys are taken over, by the lengths of their weights: each head by
    /// itself, or all of a row.
    pub(crate) fn head_norms(self, heads: Heads, weights: [usize; 2]) -> [rms_norm::Heads; 2] {
        let [q, kv] = [heads.width(), heads.kv_width()];
        [(0, q, weights[0]), (q, kv, weights[1])].map(|(first, width, weight)| rms_norm::Heads {
            first,
            heads: width / weight,
            offset: self.offset,
        })
    }
}
