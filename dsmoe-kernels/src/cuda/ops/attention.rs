//! Causal attention; see [`crate::ops::attention`]. Queries, keys and values are columns of one matrix, the output of one
//! linear layer. [`super::decode`] reads keys and values of earlier tokens from caches.

use half::bf16;

use super::{Arg, Define, Gpu, Grid, Matrix, Result, Source, optional};
use crate::attention::Scores;
use crate::cuda::{CudaError, GpuBuf};

pub(super) static SOURCE: Source = Source { name: "attention", text: include_str!("attention.cu") };

/// The widest head: its gradients must fit into registers.
pub const MAX_HEAD_DIM: usize = 128;
/// Rows of a block.
const TILE: usize = 64;

/// The largest window that kernels count with; no text is longer.
const MAX_WINDOW: usize = 1 << 30;

/// The heads of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The settings of the scores.
    pub scores: Scores,
}

impl Heads {
    /// Returns the row length of queries and outputs.
    pub fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the row length of keys, and that of values.
    pub fn kv_width(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns the row length of joined queries, keys and values.
    pub fn joined_width(self) -> usize {
        self.width() + 2 * self.kv_width()
    }

    /// Refuses heads that the kernels do not take.
    pub(super) fn check(self) -> Result<()> {
        let Heads { heads, kv_heads, head_dim, scores: Scores { window, cap, .. } } = self;
        if head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(2) {
            return Err(CudaError::Size(format!(
                "attention on a GPU takes heads of an even width up to {MAX_HEAD_DIM}, not {head_dim}; use the CPU"
            )));
        }
        assert!(
            kv_heads > 0
                && heads.is_multiple_of(kv_heads)
                && window != Some(0)
                && cap.is_none_or(|cap| cap > 0.0),
            "cuda attention: {self:?}"
        );
        Ok(())
    }

    pub(super) fn defines(self) -> [Define; 4] {
        let [window, capped] = self.variant();
        [("HD", self.head_dim as i64), ("HP", self.head_dim.next_multiple_of(16) as i64), window, capped]
    }

    /// Returns the definitions of the kernels for these scores.
    pub(super) fn variant(self) -> [Define; 2] {
        let Scores { window, cap, .. } = self.scores;
        [("WINDOW", i64::from(window.is_some())), ("CAPPED", i64::from(cap.is_some()))]
    }

    /// Returns what kernels for scores that are not plain take at their end.
    pub(super) fn variant_args(self) -> Vec<Arg> {
        let Scores { window, cap, .. } = self.scores;
        if window.is_none() && cap.is_none() {
            return Vec::new();
        }
        vec![window.unwrap_or(MAX_WINDOW).min(MAX_WINDOW).into(), Arg::F32(cap.unwrap_or(1.0))]
    }

    /// Returns the factor of scores and [`Heads::variant_args`].
    pub(super) fn score_args(self) -> Vec<Arg> {
        [vec![Arg::F32(self.scores.scale)], self.variant_args()].concat()
    }

    /// Returns the bytes of `rows` rows in shared memory.
    fn shared(self, rows: usize) -> u32 {
        (rows * (self.head_dim.next_multiple_of(16) + 8) * size_of::<bf16>()) as u32
    }

    /// Returns the addresses of the first keys and values in joined rows.
    fn keys_and_values(self, qkv: &Matrix<bf16>) -> [Arg; 2] {
        [self.width(), self.width() + self.kv_width()]
            .map(|start| Arg::Ptr(qkv.ptr() + (start * size_of::<bf16>()) as u64))
    }
}

/// Places of sequences of different lengths in a batch, on the device.
#[derive(Debug)]
pub struct Segments {
    table: GpuBuf<u32>,
    tiles: GpuBuf<u32>,
    blocks: usize,
}

impl Segments {
    /// Uploads places: of every segment its first row, its rows, and first row and rows of the segment it continues.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    pub fn new(gpu: &Gpu, places: &[[usize; 4]]) -> Result<Segments> {
        let mut tiles = Vec::new();
        for (i, place) in places.iter().enumerate() {
            for tile in 0..place[1].div_ceil(TILE) {
                tiles.extend([i as u32, tile as u32]);
            }
        }
        let table: Vec<u32> = places.iter().flatten().map(|&value| value as u32).collect();
        Ok(Segments { table: gpu.upload(&table)?, blocks: tiles.len() / 2, tiles: gpu.upload(&tiles)? })
    }
}

/// The forward pass of `batch` sequences of `queries` rows, which see `keys` rows of `k` and `v`.
pub(super) struct Tiles<'a> {
    pub(super) out: &'a mut Matrix<bf16>,
    pub(super) lse: Option<&'a mut Matrix<f32>>,
    pub(super) pointers: [Arg; 3],
    pub(super) strides: [usize; 2],
    pub(super) batch: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) heads: Heads,
}

impl Tiles<'_> {
    pub(super) fn run(self) -> Result<()> {
        let Tiles { out, lse, pointers: [q, k, v], strides, batch, queries, keys, heads } = self;
        let Heads { heads: count, kv_heads, .. } = heads;
        let blocks = [queries.div_ceil(TILE), count, batch];
        let [q_stride, k_stride] = strides.map(|stride| Arg::I64(stride as i64));
        let pointers = [out.arg(), optional(lse.as_deref()), q, k, v, q_stride, k_stride];
        let sizes = [queries, keys, count, count / kv_heads].map(Arg::Size);
        let args = [&pointers[..], &sizes, &heads.score_args()].concat();
        let grid = Grid { blocks, threads: 128, shared: heads.shared(3 * TILE) };
        // SAFETY: a block per tile of queries of a head; the callers checked that rows and strides are inside the buffers.
        unsafe { SOURCE.launch(out.gpu(), "forward", &heads.defines(), grid, &args) }
    }
}

/// Attention of whole sequences, whose queries and keys are rotated.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[T, heads * head_dim]`
    pub out: &'a mut Matrix<bf16>,
    /// `[T, heads]`
    pub lse: &'a mut Matrix<f32>,
    /// `[T, joined width]`
    pub qkv: &'a Matrix<bf16>,
    /// The heads.
    pub heads: Heads,
    /// Rows of a sequence.
    pub seq: usize,
}

impl Forward<'_> {
    /// Queues the op, or returns the device's error. It is an error if heads are too wide.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Forward { out, lse, qkv, heads, seq } = self;
        heads.check()?;
        let (rows, width) = (qkv.rows(), heads.joined_width());
        assert!(rows.is_multiple_of(seq), "cuda attention::forward: {rows} rows in sequences of {seq}");
        let (lens, want) =
            ([qkv.cols(), out.len(), lse.len()], [width, rows * heads.width(), rows * heads.heads]);
        assert_eq!(lens, want, "cuda attention::forward: columns, out, lse for {heads:?}");
        if rows == 0 {
            return Ok(());
        }
        let [k, v] = heads.keys_and_values(qkv);
        let (pointers, strides, lse) = ([qkv.arg(), k, v], [width, width], Some(lse));
        Tiles { out, lse, pointers, strides, batch: rows / seq, queries: seq, keys: seq, heads }.run()
    }
}

/// Attention of segments by themselves. The caller promises that they lie in the batch.
#[derive(Debug)]
pub struct Ragged<'a> {
    /// `[T, heads * head_dim]`
    pub out: &'a mut Matrix<bf16>,
    /// `[T, joined width]`
    pub qkv: &'a Matrix<bf16>,
    /// The segments.
    pub segments: &'a Segments,
    /// The heads.
    pub heads: Heads,
}

impl Ragged<'_> {
    /// Queues the op, or returns the device's error. It is an error if heads are too wide.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Ragged { out, qkv, segments, heads } = self;
        heads.check()?;
        let (rows, width) = (qkv.rows(), heads.joined_width());
        let (lens, want) = ([qkv.cols(), out.len()], [width, rows * heads.width()]);
        assert_eq!(lens, want, "cuda attention::ragged: columns, out for {heads:?}");
        if rows == 0 {
            return Ok(());
        }
        let [k, v] = heads.keys_and_values(qkv);
        let Heads { heads: count, kv_heads, .. } = heads;
        let (table, tiles, stride) = (segments.table.arg(), segments.tiles.arg(), Arg::I64(width as i64));
        let pointers = [out.arg(), qkv.arg(), k, v, stride, table, tiles];
        let sizes = [count, count / kv_heads].map(Arg::Size);
        let args = [&pointers[..], &sizes, &heads.score_args()].concat();
        let shared = heads.shared(3 * TILE);
        let grid = Grid { shared, ..Grid::plane(segments.blocks, count, 128) };
        // SAFETY: a block per tile of a segment's queries. Segments lie in the batch by the caller's promise, whose rows were
        // checked above.
        unsafe { SOURCE.launch(qkv.gpu(), "ragged", &heads.defines(), grid, &args) }
    }
}

/// Sets `dqkv` to the gradient of the rotated `qkv`, from `dout` and what [`Forward`] set.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[T, joined width]`
    pub dqkv: &'a mut Matrix<bf16>,
    /// `[T, heads * head_dim]`
    pub dout: &'a Matrix<bf16>,
    /// `[T, heads * head_dim]`
    pub out: &'a Matrix<bf16>,
    /// `[T, joined width]`
    pub qkv: &'a Matrix<bf16>,
    /// `[T, heads]`
    pub lse: &'a Matrix<f32>,
    /// The heads.
    pub heads: Heads,
    /// Rows of a sequence.
    pub seq: usize,
    /// Scratch memory: a value per row and head.
    pub deltas: &'a mut Matrix<f32>,
}

impl Backward<'_> {
    /// Queues the op, or returns the device's error. It is an error if heads are too wide.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Backward { dqkv, dout, out, qkv, lse, heads, seq, deltas } = self;
        heads.check()?;
        let (rows, width) = (qkv.rows(), heads.joined_width());
        assert!(rows.is_multiple_of(seq), "cuda attention::backward: {rows} rows in sequences of {seq}");
        let (out_len, pairs) = (rows * heads.width(), rows * heads.heads);
        let lens = [qkv.cols(), dqkv.len(), dout.len(), out.len(), lse.len(), deltas.len().min(pairs)];
        let want = [width, qkv.len(), out_len, out_len, pairs, pairs];
        assert_eq!(
            lens, want,
            "cuda attention::backward: columns, dqkv, dout, out, lse, deltas for {heads:?}"
        );
        if rows == 0 {
            return Ok(());
        }
        let (gpu, defines) = (qkv.gpu(), heads.defines());
        let args = [deltas.arg(), dout.arg(), out.arg(), Arg::I64(pairs as i64)];
        // SAFETY: a warp per row of a head; sizes were checked above.
        unsafe { SOURCE.launch(gpu, "deltas", &defines, Grid::row(pairs.div_ceil(4), 128), &args) }?;
        let sizes = [seq, heads.heads, heads.kv_heads].map(Arg::Size);
        let pointers = [dqkv.arg(), dout.arg(), qkv.arg(), lse.arg(), deltas.arg(), Arg::I64(width as i64)];
        let args = [&pointers[..], &sizes, &heads.score_args()].concat();
        let (tiles, shared) = (seq.div_ceil(TILE), heads.shared(2 * TILE + 2 * TILE / 2));
        for (entry, count) in [("backward_queries", heads.heads), ("backward_keys", heads.kv_heads)] {
            let grid = Grid { blocks: [tiles, count, rows / seq], threads: 128, shared };
            // SAFETY: a block per tile of queries, or keys, of a head; the two kernels set different columns of dqkv.
            unsafe { SOURCE.launch(gpu, entry, &defines, grid, &args) }?;
        }
        Ok(())
    }
}
