//! Rows of a table; see [`crate::ops::embedding`].

use half::bf16;

#[cfg(test)]
use super::KernelSpec;
use super::{Arg, Gpu, Result, Source, View, ViewMut, int};
use crate::cuda::GpuBuf;

static SOURCE: Source = Source { name: "embedding", text: include_str!("embedding.cu") };

#[cfg(test)]
pub(crate) const KERNELS: &[KernelSpec] = &[KernelSpec {
    source: &SOURCE,
    entries: &["forward_f32", "forward_bf16", "backward"],
    defines: &[&[]],
    max_registers: 40,
}];

/// Threads of a block.
const BLOCK: u32 = 256;

/// Where each id of a batch occurs, sorted on the host: gradients of one row are then added in one order.
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
    /// Room for `tokens` ids.
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

    /// Those of `ids`.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// There is no room for as many.
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
        // Up to as many as there may be: none has a position.
        self.host_ids.resize(self.len, 0);
        self.host_offsets.resize(self.len + 1, self.len as u32);
        self.ids.slice_mut(0..self.len).upload_from(&self.host_ids)?;
        self.offsets.slice_mut(0..self.len + 1).upload_from(&self.host_offsets)?;
        self.positions.slice_mut(0..self.len).upload_from(&self.order)
    }
}

/// Sets row i of `out` to row `ids[i]` of `table`, whose rows the ids must be.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn forward(
    gpu: &Gpu,
    out: ViewMut<'_, f32>,
    table: View<'_, f32>,
    ids: View<'_, u32>,
    hidden: usize,
) -> Result<()> {
    run(gpu, "forward_f32", out, table.len(), table.into(), ids, hidden)
}

/// [`forward`] of a table in bf16.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn forward_bf16(
    gpu: &Gpu,
    out: ViewMut<'_, f32>,
    table: View<'_, bf16>,
    ids: View<'_, u32>,
    hidden: usize,
) -> Result<()> {
    run(gpu, "forward_bf16", out, table.len(), table.into(), ids, hidden)
}

fn run(
    gpu: &Gpu,
    entry: &'static str,
    out: ViewMut<'_, f32>,
    values: usize,
    table: Arg,
    ids: View<'_, u32>,
    hidden: usize,
) -> Result<()> {
    assert!(
        out.len() == ids.len() * hidden && values.is_multiple_of(hidden.max(1)),
        "cuda embedding::forward"
    );
    let kernel = gpu.kernel(&SOURCE, entry, &[])?;
    let grid = [int("embedding", ids.len())? as u32, 1, 1];
    let args = [Arg::from(&out), table, ids.into(), int("embedding", hidden)?.into()];
    // SAFETY: a block per id, whose row of `out` there is; ids are rows of the table by the caller's promise.
    unsafe { kernel.launch(grid, BLOCK, 0, &args) }
}

/// Adds the rows of `dout` to the rows of `dtable` that they came from.
///
/// # Errors
/// The device fails.
///
/// # Panics
/// A length does not fit.
pub fn backward(
    gpu: &Gpu,
    dtable: ViewMut<'_, f32>,
    dout: View<'_, f32>,
    order: &Occurrences,
    hidden: usize,
) -> Result<()> {
    assert!(
        dout.len() == order.len * hidden && dtable.len().is_multiple_of(hidden.max(1)),
        "cuda embedding::backward"
    );
    let kernel = gpu.kernel(&SOURCE, "backward", &[])?;
    let grid = [int("embedding", order.len)? as u32, 1, 1];
    let args = [
        Arg::from(&dtable),
        dout.into(),
        order.ids.view().into(),
        order.offsets.view().into(),
        order.positions.view().into(),
        int("embedding", hidden)?.into(),
    ];
    // SAFETY: offsets and positions were made for as many rows as `dout` has; a block for each, of which those with
    // positions have ids that are rows of the table, as those of the forward pass were.
    unsafe { kernel.launch(grid, BLOCK, 0, &args) }
}
