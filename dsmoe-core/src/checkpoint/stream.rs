//! Copying tensors through memory of bounded size: positioned reads, since mapped pages count as resident.

use rayon::prelude::*;

use super::dtype::{check_finite, decode};
use super::{Checkpoint, TensorView};
use crate::error::Result;

/// Bytes read or written at once.
const CHUNK: usize = 8 << 20;

/// Progress of a streamed operation.
///
/// ```
/// use dsmoe_core::checkpoint::Progress;
///
/// let show = |Progress { done_bytes, total_bytes }: Progress| match total_bytes {
///     0 => "nothing to write".to_owned(),
///     _ => format!("{:.0} %", 100.0 * done_bytes as f64 / total_bytes as f64),
/// };
/// assert_eq!(show(Progress { done_bytes: 512, total_bytes: 2048 }), "25 %");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written.
    pub done_bytes: u64,
    /// Bytes to write.
    pub total_bytes: u64,
}

/// Reports [`Progress`] as bytes are written.
pub(crate) struct Meter<'a> {
    state: Progress,
    report: &'a mut dyn FnMut(Progress),
}

impl<'a> Meter<'a> {
    pub(crate) fn new(total_bytes: u64, report: &'a mut dyn FnMut(Progress)) -> Meter<'a> {
        Meter { state: Progress { done_bytes: 0, total_bytes }, report }
    }

    pub(crate) fn add(&mut self, bytes: usize) {
        self.state.done_bytes += bytes as u64;
        (self.report)(self.state);
    }
}

/// Change of a tensor `[rows, cols]` while it is copied.
///
/// ```
/// use dsmoe_core::checkpoint::{Change, Checkpoint, TensorSource};
/// # use dsmoe_core::checkpoint::{Dtype, TensorInfo, Writer};
/// # let work = tempfile::tempdir()?;
/// # let info = TensorInfo { name: "a".into(), dtype: Dtype::F32, shape: vec![2, 2] };
/// # let mut writer = Writer::create(work.path(), vec![info])?;
/// # writer.write_f32("a", &[1.0, 2.0, 3.0, 4.0])?;
/// # writer.finish()?;
///
/// // The columns of [[1, 2], [3, 4]] in the other order.
/// let (checkpoint, mut bytes) = (Checkpoint::open(work.path())?, Vec::new());
/// TensorSource::new(&checkpoint).stream("a", Change::Cols(&[1, 0]), |chunk| {
///     bytes.extend_from_slice(chunk);
///     Ok(())
/// })?;
/// assert_eq!(bytes, [2f32, 1.0, 4.0, 3.0].map(f32::to_le_bytes).concat());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// Nothing.
    None,
    /// Row j becomes the source's row `order[j]`; there are as many as before, and one may come again.
    Rows(&'a [u32]),
    /// Column j becomes the source's column `order[j]`.
    Cols(&'a [u32]),
}

/// Reads tensors of a checkpoint in chunks of whole rows; a tensor of one dimension is one row.
///
/// ```
/// use dsmoe_core::checkpoint::{Change, Checkpoint, Progress, TensorSource};
/// use dsmoe_core::init::{init, preset};
///
/// let work = tempfile::tempdir()?;
/// let config = preset("tiny")?;
/// init(&config, work.path(), &Default::default(), &mut |Progress { done_bytes, total_bytes }| {
///     assert!(done_bytes <= total_bytes);
/// })?;
/// let checkpoint = Checkpoint::open(work.path())?;
/// // The rows in the other order.
/// let (rows, mut bytes) = ((0..config.vocab_size as u32).rev().collect::<Vec<_>>(), 0);
/// TensorSource::new(&checkpoint).stream("model.embed_tokens.weight", Change::Rows(&rows), |chunk| {
///     bytes += chunk.len();
///     Ok(())
/// })?;
/// assert!(bytes >= config.vocab_size * config.hidden);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TensorSource<'a> {
    checkpoint: &'a Checkpoint,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl<'a> TensorSource<'a> {
    /// Reads from `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint) -> TensorSource<'a> {
        TensorSource { checkpoint, input: Vec::new(), output: Vec::new() }
    }

    /// Gives all of a tensor, changed, to `sink`, in order.
    ///
    /// # Errors
    /// There is no such tensor, the file system refuses, or `sink` fails.
    ///
    /// # Panics
    /// The change's order has another length than the tensor's rows or columns.
    pub fn stream(
        &mut self,
        name: &str,
        change: Change<'_>,
        mut sink: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let view = self.checkpoint.need(name)?;
        let cols = view.shape.last().copied().unwrap_or(1);
        let row = cols * view.dtype.size();
        if view.len == 0 {
            return Ok(());
        }
        let rows = view.len as usize / row;
        let per_chunk = (CHUNK / row).max(1);
        if let Change::Rows(order) = change {
            assert_eq!(order.len(), rows, "stream: order and rows of {name}");
            self.input.resize(view.len as usize, 0);
            self.checkpoint.read_at(view, 0, &mut self.input)?;
            for order in order.chunks(per_chunk) {
                self.output.resize(order.len() * row, 0);
                gather_rows(&mut self.output, &self.input, order, row);
                sink(&self.output)?;
            }
            return Ok(());
        }
        for first in (0..rows).step_by(per_chunk) {
            let len = per_chunk.min(rows - first) * row;
            self.input.resize(len, 0);
            self.checkpoint.read_at(view, (first * row) as u64, &mut self.input)?;
            if let Change::Cols(order) = change {
                assert_eq!(order.len(), cols, "stream: order and columns of {name}");
                self.output.resize(len, 0);
                gather_cols(&mut self.output, &self.input, order, view.dtype.size());
                sink(&self.output)?;
            } else {
                sink(&self.input)?;
            }
        }
        Ok(())
    }
}

impl TensorSource<'_> {
    /// Does what [`TensorSource::stream`] does for a model that others read: a float that is not finite is refused.
    ///
    /// # Errors
    /// Those of [`TensorSource::stream`], or a value is not finite.
    ///
    /// # Panics
    /// It panics where [`TensorSource::stream`] does.
    pub fn copy(
        &mut self,
        name: &str,
        change: Change<'_>,
        mut sink: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let checkpoint = self.checkpoint;
        let dtype = checkpoint.need(name)?.dtype;
        let mut values = Vec::new();
        self.stream(name, change, |bytes| {
            if dtype.is_float() {
                values.resize(bytes.len() / dtype.size(), 0.0);
                decode(&mut values, bytes, dtype);
                check_finite(checkpoint.path(), name, &values)?;
            }
            sink(bytes)
        })
    }
}

impl Checkpoint {
    /// Checks that all floats of all tensors are finite.
    ///
    /// # Errors
    /// The first tensor, by name, with one that is not; a file cannot be read.
    pub fn check_finite(&self) -> Result<()> {
        let mut source = TensorSource::new(self);
        self.names().try_for_each(|name| source.copy(name, Change::None, |_| Ok(())))
    }
}

/// Returns whether two tensors have the same bytes.
pub(crate) fn same_bytes(checkpoint: &Checkpoint, a: &TensorView, b: &TensorView) -> Result<bool> {
    if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for first in (0..a.len).step_by(CHUNK) {
        let len = (a.len - first).min(CHUNK as u64) as usize;
        left.resize(len, 0);
        right.resize(len, 0);
        checkpoint.read_at(a, first, &mut left)?;
        checkpoint.read_at(b, first, &mut right)?;
        if left != right {
            return Ok(false);
        }
    }
    Ok(true)
}

fn gather_rows(out: &mut [u8], input: &[u8], order: &[u32], row: usize) {
    out.par_chunks_mut(row).zip(order).for_each(|(out, &from)| {
        out.copy_from_slice(&input[from as usize * row..][..row]);
    });
}

fn gather_cols(out: &mut [u8], input: &[u8], order: &[u32], size: usize) {
    fn each<const N: usize>(out: &mut [u8], input: &[u8], order: &[u32]) {
        let row = order.len() * N;
        out.par_chunks_mut(row).zip(input.par_chunks(row)).for_each(|(out, input)| {
            let input = input.as_chunks::<N>().0;
            for (out, &from) in out.as_chunks_mut::<N>().0.iter_mut().zip(order) {
                *out = input[from as usize];
            }
        });
    }
    match size {
        1 => each::<1>(out, input, order),
        2 => each::<2>(out, input, order),
        4 => each::<4>(out, input, order),
        _ => each::<8>(out, input, order),
    }
}
