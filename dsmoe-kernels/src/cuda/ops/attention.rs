//! Causal attention; see [`crate::ops::attention`]. Queries, keys and values are columns of one matrix, as they come out of
//! one linear layer; keys and values of earlier tokens lie in caches.

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};
use crate::attention::Dims;
use crate::cuda::{CudaError, GpuBuf};

static SOURCE: Source = Source { name: "attention", text: include_str!("attention.cu") };
static DECODE: Source = Source { name: "decode", text: include_str!("decode.cu") };

/// Keys that one block of [`decode`] takes.
const CHUNK: usize = 64;
/// Widest head: its gradients must fit into registers.
const MAX_HEAD_DIM: usize = 128;
/// Rows of a block.
const TILE: usize = 64;

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[
    KernelSpec {
        source: &SOURCE,
        entries: &["forward", "ragged", "deltas", "backward_queries", "backward_keys"],
        defines: &[
            &[("HD", 128), ("HP", 128)],
            &[("HD", 64), ("HP", 64)],
            &[("HD", 32), ("HP", 32)],
            &[("HD", 12), ("HP", 16)],
        ],
        max_registers: 255,
    },
    KernelSpec {
        source: &DECODE,
        entries: &["append", "chunks", "combine"],
        defines: &[&[("HD", 128), ("CHUNK", CHUNK as i64)], &[("HD", 6), ("CHUNK", CHUNK as i64)]],
        max_registers: 128,
    },
];

/// Where sequences of different lengths lie in a batch, on the device.
#[derive(Debug)]
pub struct Segments {
    table: GpuBuf<u32>,
    tiles: GpuBuf<u32>,
    blocks: usize,
}

impl Segments {
    /// Of every segment its first row, its rows, and first row and rows of what it continues.
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

fn check(op: &str, dims: Dims) -> Result<()> {
    if dims.head_dim > MAX_HEAD_DIM || !dims.head_dim.is_multiple_of(2) {
        return Err(CudaError::Size(format!(
            "attention on a GPU takes heads of an even width up to {MAX_HEAD_DIM}, not {}; use --device cpu",
            dims.head_dim
        )));
    }
    assert!(
        dims.kv_heads > 0 && dims.heads.is_multiple_of(dims.kv_heads) && dims.queries <= dims.keys,
        "cuda attention::{op}: {dims:?}"
    );
    Ok(())
}

fn defines(dims: Dims) -> [(&'static str, i64); 2] {
    [("HD", dims.head_dim as i64), ("HP", dims.head_dim.next_multiple_of(16) as i64)]
}

/// Bytes of `rows` rows in shared memory.
fn shared(dims: Dims, rows: usize) -> u32 {
    (rows * (dims.head_dim.next_multiple_of(16) + 8) * size_of::<bf16>()) as u32
}

fn scale(dims: Dims) -> f32 {
    1.0 / (dims.head_dim as f32).sqrt()
}

/// Columns where keys and values start.
fn starts(dims: Dims) -> [usize; 2] {
    [dims.heads * dims.head_dim, (dims.heads + dims.kv_heads) * dims.head_dim]
}

fn size(value: usize) -> Result<Arg> {
    Ok(int("attention", value)?.into())
}

/// Attention of whole sequences: sets `out` `[T, heads * head_dim]` and `lse` `[T, heads]` from `qkv`, rotated.
///
/// # Errors
/// Heads are too wide; the device fails.
///
/// # Panics
/// A length does not fit.
pub fn forward(
    gpu: &Gpu,
    out: ViewMut<'_, bf16>,
    lse: ViewMut<'_, f32>,
    qkv: View<'_, bf16>,
    dims: Dims,
) -> Result<()> {
    check("forward", dims)?;
    let (rows, width) = (dims.batch * dims.queries, dims.joined_width());
    assert!(
        dims.queries == dims.keys
            && qkv.len() == rows * width
            && out.len() == rows * dims.heads * dims.head_dim
            && lse.len() == rows * dims.heads,
        "cuda attention::forward: {} values of qkv for {dims:?}",
        qkv.len()
    );
    if rows == 0 {
        return Ok(());
    }
    let [k, v] = starts(dims).map(|start| qkv.slice(start..qkv.len()));
    run(gpu, out, Some(lse), [qkv, k, v], [width, width], dims)
}

/// Attention of the next `queries` tokens of one sequence, whose keys and values have been appended to the caches.
///
/// # Errors
/// Heads are too wide; the device fails.
///
/// # Panics
/// A length does not fit.
pub fn prefill(
    gpu: &Gpu,
    out: ViewMut<'_, bf16>,
    qkv: View<'_, bf16>,
    keys: View<'_, bf16>,
    values: View<'_, bf16>,
    dims: Dims,
) -> Result<()> {
    check("prefill", dims)?;
    let kv_width = dims.kv_heads * dims.head_dim;
    assert!(
        dims.batch == 1
            && qkv.len() == dims.queries * dims.joined_width()
            && out.len() == dims.queries * dims.heads * dims.head_dim
            && keys.len() >= dims.keys * kv_width
            && values.len() == keys.len(),
        "cuda attention::prefill: {} values of qkv, {} of keys for {dims:?}",
        qkv.len(),
        keys.len()
    );
    run(gpu, out, None, [qkv, keys, values], [dims.joined_width(), kv_width], dims)
}

fn run(
    gpu: &Gpu,
    out: ViewMut<'_, bf16>,
    lse: Option<ViewMut<'_, f32>>,
    [q, k, v]: [View<'_, bf16>; 3],
    strides: [usize; 2],
    dims: Dims,
) -> Result<()> {
    let kernel = gpu.kernel(&SOURCE, "forward", &defines(dims))?;
    let grid = [dims.queries.div_ceil(TILE) as u32, dims.heads as u32, dims.batch as u32];
    let args = [
        Arg::from(&out),
        lse.as_ref().map_or(Arg::Ptr(0), Arg::from),
        q.into(),
        k.into(),
        v.into(),
        Arg::I64(strides[0] as i64),
        Arg::I64(strides[1] as i64),
        size(dims.queries)?,
        size(dims.keys)?,
        size(dims.heads)?,
        size(dims.heads / dims.kv_heads)?,
        scale(dims).into(),
    ];
    // SAFETY: a block per tile of queries of a head; the callers checked that rows and strides are inside the buffers.
    unsafe { kernel.launch(grid, 128, shared(dims, 3 * TILE), &args) }
}

/// Attention of segments by themselves.
///
/// # Errors
/// Heads are too wide; the device fails.
///
/// # Panics
/// A length does not fit.
pub fn ragged(
    gpu: &Gpu,
    out: ViewMut<'_, bf16>,
    qkv: View<'_, bf16>,
    segments: &Segments,
    dims: Dims,
) -> Result<()> {
    check("ragged", dims)?;
    let (rows, width) = (dims.batch * dims.queries, dims.joined_width());
    assert!(
        qkv.len() == rows * width && out.len() == rows * dims.heads * dims.head_dim,
        "cuda attention::ragged: {} values of qkv for {dims:?}",
        qkv.len()
    );
    if rows == 0 {
        return Ok(());
    }
    let [k, v] = starts(dims).map(|start| qkv.slice(start..qkv.len()));
    let kernel = gpu.kernel(&SOURCE, "ragged", &defines(dims))?;
    let args = [
        Arg::from(&out),
        qkv.into(),
        k.into(),
        v.into(),
        Arg::I64(width as i64),
        segments.table.view().into(),
        segments.tiles.view().into(),
        size(dims.heads)?,
        size(dims.heads / dims.kv_heads)?,
        scale(dims).into(),
    ];
    let grid = [int("attention", segments.blocks)? as u32, dims.heads as u32, 1];
    // SAFETY: a block per tile of a segment's queries; segments lie in the batch by the caller's promise, whose rows were
    // checked above.
    unsafe { kernel.launch(grid, 128, shared(dims, 3 * TILE), &args) }
}

/// Values of scratch that the backward pass needs.
pub fn backward_scratch(dims: Dims) -> usize {
    dims.batch * dims.queries * dims.heads
}

/// Sets `dqkv` to the gradient of the rotated `qkv`, from `dout` and what [`forward`] set.
///
/// # Errors
/// Heads are too wide; the device fails.
///
/// # Panics
/// A length does not fit.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs and sizes of one op")]
pub fn backward(
    gpu: &Gpu,
    dqkv: ViewMut<'_, bf16>,
    dout: View<'_, bf16>,
    out: View<'_, bf16>,
    qkv: View<'_, bf16>,
    lse: View<'_, f32>,
    dims: Dims,
    deltas: ViewMut<'_, f32>,
) -> Result<()> {
    check("backward", dims)?;
    let (rows, width) = (dims.batch * dims.queries, dims.joined_width());
    assert!(
        dims.queries == dims.keys
            && [qkv.len(), dqkv.len()] == [rows * width; 2]
            && [dout.len(), out.len()] == [rows * dims.heads * dims.head_dim; 2]
            && lse.len() == rows * dims.heads
            && deltas.len() >= lse.len(),
        "cuda attention::backward: {} values of qkv for {dims:?}",
        qkv.len()
    );
    if rows == 0 {
        return Ok(());
    }
    let defines = defines(dims);
    let first = gpu.kernel(&SOURCE, "deltas", &defines)?;
    let pairs = rows * dims.heads;
    let args = [Arg::from(&deltas), dout.into(), out.into(), Arg::I64(pairs as i64)];
    let blocks = int("attention", pairs.div_ceil(4))? as u32;
    // SAFETY: a warp per row of a head; lengths were checked above.
    unsafe { first.launch([blocks, 1, 1], 128, 0, &args) }?;
    let args = [
        Arg::from(&dqkv),
        dout.into(),
        qkv.into(),
        lse.into(),
        deltas.as_view().into(),
        Arg::I64(width as i64),
        size(dims.queries)?,
        size(dims.heads)?,
        size(dims.kv_heads)?,
        scale(dims).into(),
    ];
    let tiles = dims.queries.div_ceil(TILE) as u32;
    let bytes = shared(dims, 2 * TILE + 2 * TILE / 2);
    for (entry, heads) in [("backward_queries", dims.heads), ("backward_keys", dims.kv_heads)] {
        let kernel = gpu.kernel(&SOURCE, entry, &defines)?;
        // SAFETY: a block per tile of queries, or keys, of a head; the two kernels set different columns of dqkv.
        unsafe { kernel.launch([tiles, heads as u32, dims.batch as u32], 128, bytes, &args) }?;
    }
    Ok(())
}

/// Where the next keys and values of a sequence go.
#[derive(Clone, Copy, Debug)]
pub enum At<'a> {
    /// From this position on.
    Position(usize),
    /// From the position that lies on the device; it must be below the caches' room.
    Length(View<'a, u32>),
}

/// Appends keys and values of the rows of `qkv` to the caches `[room, kv_heads * head_dim]`.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn append(
    gpu: &Gpu,
    keys: ViewMut<'_, bf16>,
    values: ViewMut<'_, bf16>,
    qkv: View<'_, bf16>,
    at: At<'_>,
    dims: Dims,
) -> Result<()> {
    let (rows, kv_width) = (dims.queries, dims.kv_heads * dims.head_dim);
    let (length, start) = match at {
        At::Position(start) => (None, start),
        At::Length(length) => (Some(length), 0),
    };
    assert!(
        qkv.len() == rows * dims.joined_width()
            && keys.len() == values.len()
            && keys.len() >= (start + rows) * kv_width,
        "cuda attention::append: {} values of qkv, room for {} of keys at {start}",
        qkv.len(),
        keys.len()
    );
    let kernel = gpu.kernel(&DECODE, "append", &decode_defines(dims))?;
    let args = [
        Arg::from(&keys),
        Arg::from(&values),
        qkv.into(),
        length.into(),
        size(start)?,
        size(rows)?,
        size(dims.joined_width())?,
        size(starts(dims)[0])?,
        size(kv_width)?,
    ];
    let blocks = int("attention", (rows * kv_width).div_ceil(256))? as u32;
    // SAFETY: a thread per value of the rows; room was checked above, or for a length on the device is promised.
    unsafe { kernel.launch([blocks, 1, 1], 256, 0, &args) }
}

fn decode_defines(dims: Dims) -> [(&'static str, i64); 2] {
    [("HD", dims.head_dim as i64), ("CHUNK", CHUNK as i64)]
}

/// Values of scratch that [`decode`] needs with caches of `room` positions.
pub fn decode_scratch(dims: Dims, room: usize) -> usize {
    dims.heads * room.div_ceil(CHUNK) * (dims.head_dim + 2)
}

/// Attention of one token over the caches, whose last position, `length`, is its own.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs and sizes of one op")]
pub fn decode(
    gpu: &Gpu,
    out: ViewMut<'_, bf16>,
    qkv: View<'_, bf16>,
    keys: View<'_, bf16>,
    values: View<'_, bf16>,
    length: View<'_, u32>,
    dims: Dims,
    partials: ViewMut<'_, f32>,
) -> Result<()> {
    check("decode", dims)?;
    let kv_width = dims.kv_heads * dims.head_dim;
    let room = keys.len() / kv_width;
    assert!(
        qkv.len() == dims.joined_width()
            && out.len() == dims.heads * dims.head_dim
            && keys.len() == values.len()
            && length.len() == 1
            && partials.len() >= decode_scratch(dims, room),
        "cuda attention::decode: {} values of qkv, room for {room} for {dims:?}",
        qkv.len()
    );
    let defines = decode_defines(dims);
    let chunks = room.div_ceil(CHUNK);
    let first = gpu.kernel(&DECODE, "chunks", &defines)?;
    let args = [
        Arg::from(&partials),
        qkv.into(),
        keys.into(),
        values.into(),
        length.into(),
        size(dims.heads)?,
        size(dims.kv_heads)?,
        scale(dims).into(),
    ];
    // SAFETY: a block per chunk of the room and head; those behind the length do nothing.
    unsafe { first.launch([chunks as u32, dims.heads as u32, 1], CHUNK as u32, 0, &args) }?;
    let second = gpu.kernel(&DECODE, "combine", &defines)?;
    let args = [Arg::from(&out), partials.as_view().into(), length.into(), size(chunks)?];
    // SAFETY: a block per head reads the chunks that were set above.
    unsafe { second.launch([dims.heads as u32, 1, 1], 128, 0, &args) }
}
