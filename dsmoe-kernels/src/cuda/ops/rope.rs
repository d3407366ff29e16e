//! Rotary position embedding; see [`crate::ops::rope`].

use half::bf16;

use super::{Arg, Grid, Matrix, Result, Source, optional};

pub(super) static SOURCE: Source = Source { name: "rope", text: include_str!("rope.cu") };

/// The positions of rows.
#[derive(Clone, Copy, Debug)]
pub enum Positions<'a> {
    /// Row r is at position `start + r % len`: sequences of `len` rows.
    Sequences {
        /// Rows of a sequence.
        len: usize,
        /// The position of a sequence's first row.
        start: usize,
    },
    /// Positions that lie on the device, one per row. The caller promises that each has angles.
    At(&'a Matrix<u32>),
}

/// Rotates the first heads of every row of `x`, in place.
#[derive(Debug)]
pub struct Rotate<'a> {
    /// `[T, width]`
    pub x: &'a mut Matrix<bf16>,
    /// Cosines and sines, `[positions, rotated]`: heads are rotated in their first `rotated` values.
    pub angles: &'a Matrix<f32>,
    /// Heads that are rotated.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The positions of the rows.
    pub positions: Positions<'a>,
    /// Rotates gradients back.
    pub back: bool,
}

impl Rotate<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit, or a position has no angles.
    pub fn run(self) -> Result<()> {
        let Rotate { x, angles, heads, head_dim, positions, back } = self;
        let (tokens, width, rotated) = (x.rows(), x.cols(), angles.cols());
        let (at, seq, start) = match positions {
            Positions::Sequences { len, start } => (None, len, start),
            Positions::At(positions) => (Some(positions), tokens, 0),
        };
        let last = if at.is_some() || tokens == 0 { 0 } else { start + seq.min(tokens) };
        assert!(
            at.is_none_or(|at| at.len() == tokens)
                && rotated.is_multiple_of(2)
                && rotated <= head_dim
                && heads * head_dim <= width
                && angles.rows() >= last
                && (seq > 0 || tokens == 0),
            "cuda rope: {tokens} rows of {width}, {heads} heads of {head_dim}, {} positions for {positions:?}",
            angles.rows()
        );
        let grid = Grid::row((tokens * heads * rotated / 2).div_ceil(256), 256);
        let sizes = [tokens, seq, start, heads, head_dim, rotated, width].map(Arg::Size);
        let sign = if back { -1.0f32 } else { 1.0 };
        let pointers = [x.arg(), angles.arg(), optional(at)];
        let args = [&pointers[..], &sizes, &[Arg::F32(sign)]].concat();
        // SAFETY: a thread per pair of the first heads of `tokens` rows; sizes were checked above, positions are the caller's
        // promise.
        unsafe { SOURCE.launch(x.gpu(), "turn", &[], grid, &args) }
    }
}
