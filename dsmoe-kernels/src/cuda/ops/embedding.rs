//! Rows of an embedding table; see [`crate::ops::embedding`].

use super::{Arg, Define, Gpu, Grid, Matrix, Result, Source};
use crate::cuda::{Float, GpuBuf};

pub(super) static SOURCE: Source = Source { name: "embedding", text: include_str!("embedding.cu") };

/// Threads of a block.
const BLOCK: u32 = 256;

pub(super) fn defines(scaled: bool) -> [Define; 1] {
    [("SCALED", i64::from(scaled))]
}

/// Queues a kernel that takes the factor of rows at its end, where it is not 1.
fn start(gpu: &Gpu, entry: &'static str, rows: usize, mut args: Vec<Arg>, scale: f32) -> Result<()> {
    let scaled = scale != 1.0;
    if scaled {
        args.push(Arg::F32(scale));
    }
    // SAFETY: a block per id. The callers checked that there is a row for each; ids are rows of the table by the promise of
    // theirs.
    unsafe { SOURCE.launch(gpu, entry, &defines(scaled), Grid::row(rows, BLOCK), &args) }
}

/// The places where each id of a batch occurs. They are sorted on the host, so that the gradients of a row are added in a
/// fixed order.
#[derive(Debug)]
pub struct Occurrences {
    ids: GpuBuf<u32>,
    offsets: GpuBuf<u32>,
    positions: GpuBuf<u32>,
    len: usize,
    order: Vec<u32>,
    host_ids: Vec<u32>,
    host_offsets: Vec<u32>,
}

impl Occurrences {
    /// Allocates room for `tokens` ids.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    pub fn with_room(gpu: &Gpu, tokens: usize) -> Result<Occurrences> {
        Ok(Occurrences {
            ids: gpu.zeros(tokens)?,
            offsets: gpu.zeros(tokens + 1)?,
            positions: gpu.zeros(tokens)?,
            len: 0,
            order: Vec::with_capacity(tokens),
            host_ids: Vec::with_capacity(tokens),
            host_offsets: Vec::with_capacity(tokens + 1),
        })
    }

    /// Sets the places to those of `ids`.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// There is no room for them.
    pub fn update(&mut self, ids: &[u32]) -> Result<()> {
        self.order.clear();
        self.order.extend(0..ids.len() as u32);
        self.order.sort_unstable_by_key(|&at| (ids[at as usize], at));
        self.host_ids.clear();
        self.host_offsets.clear();
        for (i, &at) in self.order.iter().enumerate() {
            let id = ids[at as usize];
            if self.host_ids.last() != Some(&id) {
                self.host_ids.push(id);
                self.host_offsets.push(i as u32);
            }
        }
        self.len = ids.len();
        // The rest, up to as many ids as there may be, has no position.
        self.host_ids.resize(self.len, 0);
        self.host_offsets.resize(self.len + 1, self.len as u32);
        self.ids.part_mut(0..self.len).upload_from(&self.host_ids)?;
        self.offsets.part_mut(0..self.len + 1).upload_from(&self.host_offsets)?;
        self.positions.part_mut(0..self.len).upload_from(&self.order)
    }
}

/// Sets row i of `out` to `scale` times row `ids[i]` of `table`. The caller promises that these rows exist.
#[derive(Debug)]
pub struct Forward<'a, T: Float> {
    /// `[T, hidden]`
    pub out: &'a mut Matrix<f32>,
    /// The values of whole rows.
    pub table: &'a Matrix<T>,
    /// `[T]`
    pub ids: &'a Matrix<u32>,
    /// The factor of rows.
    pub scale: f32,
}

impl<T: Float> Forward<'_, T> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Forward { out, table, ids, scale } = self;
        let hidden = out.cols();
        let sizes = [out.rows(), table.len() % hidden.max(1)];
        assert_eq!(sizes, [ids.len(), 0], "cuda embedding::forward: rows, rest of the table");
        let entry = if T::F32 { "forward_f32" } else { "forward_bf16" };
        let args = vec![out.arg(), table.arg(), ids.arg(), hidden.into()];
        start(ids.gpu(), entry, ids.len(), args, scale)
    }
}

/// Adds `scale` times the rows of `dout` to the rows of `dtable` that they came from.
#[derive(Debug)]
pub struct Backward<'a> {
    /// The values of whole rows.
    pub dtable: &'a mut Matrix<f32>,
    /// `[T, hidden]`
    pub dout: &'a Matrix<f32>,
    /// Where the ids occur.
    pub order: &'a Occurrences,
    /// The factor of rows.
    pub scale: f32,
}

impl Backward<'_> {
    /// Queues the op, or returns the device's error.
    ///
    /// # Panics
    /// A size does not fit.
    pub fn run(self) -> Result<()> {
        let Backward { dtable, dout, order, scale } = self;
        let hidden = dout.cols();
        let sizes = [dout.rows(), dtable.len() % hidden.max(1)];
        assert_eq!(sizes, [order.len, 0], "cuda embedding::backward: rows, rest of the table");
        let Occurrences { ids, offsets, positions, len, .. } = order;
        // Offsets and positions were made for as many rows as `dout` has; those with positions have ids that are rows of the
        // table, as those of the forward pass were.
        let args = vec![dtable.arg(), dout.arg(), ids.arg(), offsets.arg(), positions.arg(), hidden.into()];
        start(dout.gpu(), "backward", *len, args, scale)
    }
}
