//! Causal attention over caches of keys and values, `[room, kv_heads * head_dim]` each.

use half::bf16;

use super::attention::{Heads, Tiles};
use super::{Arg, Define, Grid, Matrix, Result, Source, optional};

pub(super) static SOURCE: Source = Source { name: "decode", text: include_str!("decode.cu") };

/// Keys that one block takes.
const CHUNK: usize = 64;

pub(super) fn defines(heads: Heads) -> [Define; 4] {
    let [window, capped] = heads.variant();
    [("HD", heads.head_dim as i64), ("CHUNK", CHUNK as i64), window, capped]
}

/// The place of the next keys and values of a sequence.
#[derive(Clone, Copy, Debug)]
pub enum At<'a> {
    /// They start at this position.
    Position(usize),
    /// They start at the position that lies on the device. The caller promises that it is below the caches' room.
    Length(&'a Matrix<u32>),
}

/// Appends the keys and values of the rows of `qkv` to the caches.
#[derive(Debug)]
pub struct Append<'a> {
    /// The cache of keys.
    pub keys: &'a mut Matrix<bf16>,
    /// The cache of values.
    pub values: &'a mut Matrix<bf16>,
    /// `[T, joined width]`
    pub qkv: &'a Matrix<bf16>,
    /// Where they go.
    pub at: At<'a>,
    /// The heads.
    pub heads: Heads,
}

impl Append<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Append { keys, values, qkv, at, heads } = self;
        let (rows, kv_width) = (qkv.rows(), heads.kv_width());
        let (length, start) = match at {
            At::Position(start) => (None, start),
            At::Length(length) => (Some(length), 0),
        };
        let need = (start + rows) * kv_width;
        let lens = [qkv.cols(), values.len(), keys.len().min(need)];
        let want = [heads.joined_width(), keys.len(), need];
        assert_eq!(lens, want, "cuda decode::append: columns, values, keys for {rows} rows at {start}");
        let grid = Grid::row((rows * kv_width).div_ceil(256), 256);
        let sizes = [start, rows, heads.joined_width(), heads.width(), kv_width].map(Arg::Size);
        let args = [&[keys.arg(), values.arg(), qkv.arg(), optional(length)], &sizes[..]].concat();
        // SAFETY: a thread per value of the rows; room was checked above, or for a length on the device is promised.
        unsafe { SOURCE.launch(qkv.gpu(), "append", &defines(heads), grid, &args) }
    }
}

/// Attention of the next tokens of one sequence, whose keys and values are appended already.
#[derive(Debug)]
pub struct Prefill<'a> {
    /// `[T, heads * head_dim]`
    pub out: &'a mut Matrix<bf16>,
    /// `[T, joined width]`
    pub qkv: &'a Matrix<bf16>,
    /// The cache of keys.
    pub keys: &'a Matrix<bf16>,
    /// The cache of values.
    pub values: &'a Matrix<bf16>,
    /// The position of the first token.
    pub start: usize,
    /// The heads.
    pub heads: Heads,
}

impl Prefill<'_> {
    /// Queues the op, or returns the device's error. It is an error if heads are too wide.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Prefill { out, qkv, keys, values, start, heads } = self;
        heads.check()?;
        let (rows, kv_width) = (qkv.rows(), heads.kv_width());
        let total = start + rows;
        let need = total * kv_width;
        let lens = [qkv.cols(), out.len(), values.len(), keys.len().min(need)];
        let want = [heads.joined_width(), rows * heads.width(), keys.len(), need];
        assert_eq!(lens, want, "cuda decode::prefill: columns, out, values, keys for {heads:?}");
        let (pointers, strides) = ([qkv.arg(), keys.arg(), values.arg()], [heads.joined_width(), kv_width]);
        Tiles { out, lse: None, pointers, strides, batch: 1, queries: rows, keys: total, heads }.run()
    }
}

/// Returns the number of values of [`Decode::partials`] for caches of `room` positions.
pub fn partials_len(heads: Heads, room: usize) -> usize {
    heads.heads * room.div_ceil(CHUNK) * (heads.head_dim + 2)
}

/// Attention of one token, whose own position, `length`, is the last one in the caches.
#[derive(Debug)]
pub struct Decode<'a> {
    /// `[1, heads * head_dim]`
    pub out: &'a mut Matrix<bf16>,
    /// `[1, joined width]`
    pub qkv: &'a Matrix<bf16>,
    /// The cache of keys.
    pub keys: &'a Matrix<bf16>,
    /// The cache of values.
    pub values: &'a Matrix<bf16>,
    /// One value.
    pub length: &'a Matrix<u32>,
    /// The heads.
    pub heads: Heads,
    /// Scratch memory of [`partials_len`] values.
    pub partials: &'a mut Matrix<f32>,
}

impl Decode<'_> {
    /// Queues the op, or returns the device's error. It is an error if heads are too wide.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Decode { out, qkv, keys, values, length, heads, partials } = self;
        heads.check()?;
        let room = keys.len() / heads.kv_width();
        let need = partials_len(heads, room);
        let lens = [qkv.len(), out.len(), values.len(), length.len(), partials.len().min(need)];
        let want = [heads.joined_width(), heads.width(), keys.len(), 1, need];
        assert_eq!(lens, want, "cuda decode: qkv, out, values, length, partials for {heads:?}");
        let (gpu, defines, chunks) = (qkv.gpu(), defines(heads), room.div_ceil(CHUNK));
        let Heads { heads: count, kv_heads, .. } = heads;
        let pointers = [partials.arg(), qkv.arg(), keys.arg(), values.arg(), length.arg()];
        let args = [&pointers[..], &[count.into(), kv_heads.into()], &heads.score_args()].concat();
        let grid = Grid::plane(chunks, count, CHUNK as u32);
        // SAFETY: a block per chunk of the room and head; those behind the length do nothing.
        unsafe { SOURCE.launch(gpu, "chunks", &defines, grid, &args) }?;
        let pointers = [out.arg(), partials.arg(), length.arg(), chunks.into()];
        let args = [&pointers[..], &heads.variant_args()].concat();
        // SAFETY: a block per head reads the chunks that were set above.
        unsafe { SOURCE.launch(gpu, "combine", &defines, Grid::row(count, 128), &args) }
    }
}
