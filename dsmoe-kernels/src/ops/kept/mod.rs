//! Linear layers that skip the inputs below a threshold, and gated neurons whose gate is below one.
//!
//! ```text
//! kept      k = { i : not |x_i| <= theta }            a NaN is kept
//! forward   y = sum over i in k of x_i W[:, i] (+ b)  x [rows, inputs], W [outputs, inputs], y [rows, outputs]
//! rows      y_j = x . W[j, :] for j in k, else 0      [`PickedRows`]
//! ```
//! A few rows (decoding) read the columns of W that are kept and no others: [`Columns`] holds W column after column, so a
//! column that is skipped is a run of cache lines that is not read. Runs are as long as they can be, since a processor reads
//! ahead in long runs alone: threads share the outputs in one block each, and a block is read in runs of kilobytes. More rows
//! keep nearly all columns together; they are masked, and W is packed for [`crate::linear`] in memory that [`Scratch`] reuses.
//! x is rounded to the precision of the weights, after the comparison. Sums are f32, over ascending i.

mod cells;
mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use super::blocks::BLOCK;
use crate::buf::{Buf, SharedRows};
use crate::isa::Isa;
use crate::linear;
use crate::matmul::{Mat, Packed, Precision, for_tasks_when, tasks_for};
use cells::Cells;

/// Up to this many rows are multiplied one by one.
pub const FEW_ROWS: usize = 4;
/// Runs of [`Columns`] and [`PickedRows`] are padded to a multiple of this many values, and threads share them in such units.
const PANEL: usize = 64;

/// Weights `[outputs, inputs]` of which single columns are read.
#[derive(Clone, Debug)]
pub struct Columns(Cells);

/// Weights `[outputs, inputs]` of which single rows are read.
#[derive(Clone, Debug)]
pub struct PickedRows(Cells);

/// The inputs of one row that are kept, ascending.
#[derive(Debug, Default)]
pub struct Kept {
    indices: Vec<u32>,
    values: Vec<f32>,
}

/// Memory that the ops reuse from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    kept: Vec<Kept>,
    masked: Buf,
    packed: Vec<Packed>,
}

/// Sets every y to the layer's output for the inputs that its threshold keeps.
#[derive(Debug)]
pub struct Forward<'a, const N: usize> {
    /// `[rows, outputs]` of each layer, set.
    pub ys: [&'a mut [f32]; N],
    /// `[rows, inputs]`
    pub x: &'a [f32],
    /// The weights of each layer.
    pub ws: [&'a Columns; N],
    /// The threshold of each layer.
    pub thresholds: [f32; N],
    /// `[outputs]` of each layer.
    pub biases: [Option<&'a [f32]>; N],
    /// Rows of x and of every y: tokens.
    pub rows: usize,
    /// Memory to work in.
    pub scratch: &'a mut Scratch,
}

/// Sets `y` to the outputs that `kept` lists, of one row of x, and to 0 elsewhere.
#[derive(Debug)]
pub struct ForwardRows<'a> {
    /// `[outputs]`, set.
    pub y: &'a mut [f32],
    /// `[inputs]`
    pub x: &'a [f32],
    /// The weights.
    pub w: &'a PickedRows,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// The outputs to compute.
    pub kept: &'a Kept,
}

/// Returns whether the threshold keeps a value.
#[inline(always)]
fn keeps(threshold: f32, x: f32) -> bool {
    // A NaN has to reach the output.
    x.abs() > threshold || x.is_nan()
}

/// Sets `y` to the values of `x` that the threshold keeps and to 0 elsewhere, and returns their number.
///
/// # Panics
/// The lengths differ.
pub fn mask(y: &mut [f32], x: &[f32], threshold: f32) -> usize {
    use rayon::prelude::*;
    assert_eq!(y.len(), x.len(), "kept::mask: y and x");
    let block = |(y, x): (&mut [f32], &[f32])| {
        let mut kept = 0;
        for (y, &x) in y.iter_mut().zip(x) {
            let keeps = keeps(threshold, x);
            *y = if keeps { x } else { 0.0 };
            kept += usize::from(keeps);
        }
        kept
    };
    if y.len() <= BLOCK {
        block((y, x))
    } else {
        y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).map(block).sum()
    }
}

impl Kept {
    /// Lists the values of a row of x that the threshold keeps, rounded to `precision`.
    ///
    /// # Panics
    /// The row has 2^32 values.
    pub fn list(&mut self, x: &[f32], threshold: f32, precision: Precision) {
        let len = u32::try_from(x.len()).expect("kept: a row is short");
        self.indices.resize(x.len(), 0);
        self.values.resize(x.len(), 0.0);
        let mut kept = 0;
        // Every value is written, so that no branch depends on it.
        for (i, &x) in (0..len).zip(x) {
            self.indices[kept] = i;
            self.values[kept] = x;
            kept += usize::from(keeps(threshold, x));
        }
        self.indices.truncate(kept);
        self.values.truncate(kept);
        if precision == Precision::Bf16 {
            self.values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        }
    }

    /// Returns the number of values that are kept.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Returns whether no value is kept.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }
}

impl Columns {
    /// Makes a matrix of zeros.
    pub fn zeros(precision: Precision, outputs: usize, inputs: usize) -> Columns {
        Columns(Cells::zeros(precision, outputs, inputs))
    }

    /// Stores `w`, whose rows are the outputs, rounded to `precision`.
    pub fn new(precision: Precision, w: Mat<'_>) -> Columns {
        let mut columns = Columns::zeros(precision, w.rows, w.cols);
        columns.set_rows(0, w);
        columns
    }

    /// Sets outputs `first..first + w.rows`.
    ///
    /// # Panics
    /// The rows do not fit.
    pub fn set_rows(&mut self, first: usize, w: Mat<'_>) {
        let (outputs, inputs, end) = (self.outputs(), self.inputs(), first + w.rows);
        let fit = w.cols == inputs && end <= outputs;
        assert!(fit, "columns: rows {first}..{end} of {} values into [{outputs}, {inputs}]", w.cols);
        self.0.set_lanes(first, w);
    }

    /// Returns the rows of W.
    pub fn outputs(&self) -> usize {
        self.0.lanes
    }

    /// Returns the columns of W.
    pub fn inputs(&self) -> usize {
        self.0.depth
    }

    /// Returns the bytes of memory, padding included.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Sets `packed`, a matrix of the same sizes and precision.
    fn pack(&self, packed: &mut Packed) {
        self.0.each_block(|first, lanes| packed.set_rows(first, lanes.t()));
    }
}

impl PickedRows {
    /// Stores `w`, rounded to `precision`.
    pub fn new(precision: Precision, w: Mat<'_>) -> PickedRows {
        let mut cells = Cells::zeros(precision, w.cols, w.rows);
        cells.set_lanes(0, w.t());
        PickedRows(cells)
    }

    /// Returns the rows of W.
    pub fn outputs(&self) -> usize {
        self.0.depth
    }

    /// Returns the columns of W.
    pub fn inputs(&self) -> usize {
        self.0.lanes
    }

    /// Returns the bytes of memory, padding included.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Sets every row of `y` `[rows, outputs]` to all outputs of the row of `x`, plus the bias if there is one.
    ///
    /// # Panics
    /// Lengths do not fit.
    pub fn forward_all(&self, y: &mut [f32], x: &[f32], bias: Option<&[f32]>, scratch: &mut Scratch) {
        let (outputs, inputs) = (self.outputs(), self.inputs());
        let packed = scratch.packed_of(self.0.precision, outputs, inputs);
        self.0.pack_depth(packed);
        let rows = x.len().checked_div(inputs).unwrap_or(0);
        linear::ForwardPacked { y, x, w: packed, bias, rows }.run();
    }
}

impl Scratch {
    /// Returns a matrix of these sizes to be set.
    fn packed_of(&mut self, precision: Precision, outputs: usize, inputs: usize) -> &mut Packed {
        let fits = |w: &Packed| (w.precision(), w.outputs(), w.inputs()) == (precision, outputs, inputs);
        let at = self.packed.iter().position(fits).unwrap_or_else(|| {
            self.packed.push(Packed::zeros(precision, outputs, inputs));
            self.packed.len() - 1
        });
        &mut self.packed[at]
    }

    /// Returns lists of kept values, `count` of them.
    pub fn lists(&mut self, count: usize) -> &mut [Kept] {
        if self.kept.len() < count {
            self.kept.resize_with(count, Kept::default);
        }
        &mut self.kept[..count]
    }
}

impl<const N: usize> Forward<'_, N> {
    /// Runs the op on the tier of [`Isa::current`], and returns the number of inputs that each threshold kept, of all rows.
    ///
    /// # Panics
    /// Panics under the conditions of [`Self::run_on`].
    pub fn run(self) -> [usize; N] {
        self.run_on(Isa::current())
    }

    /// Runs the op on a given tier, and returns the number of inputs that each threshold kept, of all rows.
    ///
    /// # Panics
    /// Lengths do not fit.
    pub fn run_on(self, isa: Isa) -> [usize; N] {
        for (y, w) in self.ys.iter().zip(self.ws) {
            let (inputs, outputs) = (w.inputs(), w.outputs());
            assert!(
                self.x.len() == self.rows * inputs && y.len() == self.rows * outputs,
                "kept::Forward: x {}, y {} values for {} rows of [{outputs}, {inputs}]",
                self.x.len(),
                y.len(),
                self.rows
            );
        }
        if self.rows <= FEW_ROWS { self.row_by_row(isa) } else { self.masked(isa) }
    }

    fn row_by_row(self, isa: Isa) -> [usize; N] {
        let Forward { mut ys, x, ws, thresholds, biases, rows, scratch } = self;
        let mut counts = [0; N];
        let lists = scratch.lists(N);
        for row in 0..rows {
            let mut lists_of: [usize; N] = [0; N];
            for i in 0..N {
                let inputs = ws[i].inputs();
                // Layers of one threshold share a list.
                let same = (0..i)
                    .find(|&j| thresholds[j] == thresholds[i] && ws[j].0.precision == ws[i].0.precision);
                lists_of[i] = same.unwrap_or(i);
                if same.is_none() {
                    lists[i].list(&x[row * inputs..][..inputs], thresholds[i], ws[i].0.precision);
                }
                counts[i] += lists[lists_of[i]].len();
            }
            let outputs = ws.map(Columns::outputs);
            let mut of_row =
                ys.each_mut().into_iter().zip(outputs).map(|(y, outputs)| &mut y[row * outputs..][..outputs]);
            let of_row: [&mut [f32]; N] = std::array::from_fn(|_| of_row.next().expect("as many outputs"));
            multiply(isa, of_row, lists_of.map(|i| &lists[i]), ws);
        }
        for ((y, w), bias) in ys.into_iter().zip(ws).zip(biases) {
            linear::add_bias("kept::Forward", isa, y, bias, w.outputs());
        }
        counts
    }

    fn masked(self, isa: Isa) -> [usize; N] {
        let Forward { ys, x, ws, thresholds, biases, rows, scratch } = self;
        let (mut counts, mut masked) = ([0; N], std::mem::take(&mut scratch.masked));
        masked.resize(x.len());
        for (i, (y, w)) in ys.into_iter().zip(ws).enumerate() {
            counts[i] = match i > 0 && thresholds[i] == thresholds[i - 1] {
                true => counts[i - 1],
                false => mask(&mut masked, x, thresholds[i]),
            };
            let packed = scratch.packed_of(w.0.precision, w.outputs(), w.inputs());
            w.pack(packed);
            linear::ForwardPacked { y, x: &masked, w: packed, bias: biases[i], rows }.run_on(isa);
        }
        scratch.masked = masked;
        counts
    }
}

/// Sets every y to the product of a list with the columns it names.
fn multiply<const N: usize>(isa: Isa, ys: [&mut [f32]; N], lists: [&Kept; N], ws: [&Columns; N]) {
    let panels = ws.map(|w| w.outputs().div_ceil(PANEL));
    let work: usize = lists.iter().zip(ws).map(|(list, w)| list.len() * w.outputs()).sum();
    let ys = ys.map(|y| (y.len(), SharedRows::new(y, 1)));
    let all: usize = panels.iter().sum();
    // More tasks than threads would shorten the runs that each reads.
    let tasks = tasks_for(work).min(rayon::current_num_threads()).min(all);
    for_tasks_when(tasks > 1, tasks, |task| {
        let (mut before, part) = (0, task * all / tasks..(task + 1) * all / tasks);
        for at in 0..N {
            let (len, y) = ys[at];
            let own =
                part.start.clamp(before, before + panels[at])..part.end.clamp(before, before + panels[at]);
            let (first, end) = ((own.start - before) * PANEL, len.min((own.end - before) * PANEL));
            before += panels[at];
            if first < end {
                // SAFETY: tasks have different panels.
                let y = unsafe { y.values(first, end - first) };
                isa.run_product(kernel::Lanes { y, kept: lists[at], cells: &ws[at].0, first });
            }
        }
    });
}

impl ForwardRows<'_> {
    /// Runs the op on the tier of [`Isa::current`].
    ///
    /// # Panics
    /// Panics under the conditions of [`Self::run_on`].
    pub fn run(self) {
        self.run_on(Isa::current());
    }

    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit, or `kept` lists an output that there is not.
    pub fn run_on(self, isa: Isa) {
        let ForwardRows { y, x, w, bias, kept } = self;
        let (inputs, outputs) = (w.inputs(), w.outputs());
        assert!(
            x.len() == inputs && y.len() == outputs && bias.is_none_or(|bias| bias.len() == outputs),
            "kept::ForwardRows: x {}, y {} values for [{outputs}, {inputs}]",
            x.len(),
            y.len()
        );
        assert!(
            kept.indices.iter().all(|&j| (j as usize) < outputs),
            "kept::ForwardRows: outputs of the list"
        );
        y.fill(0.0);
        // The row of x is padded as rows of W are.
        let mut padded = Buf::zeros(w.0.width);
        kernel::round_into(&mut padded[..inputs], x, w.0.precision);
        let tasks = tasks_for(kept.len() * inputs).min(kept.len());
        let y = SharedRows::new(y, 1);
        for_tasks_when(tasks > 1, tasks, |task| {
            let part = task * kept.len() / tasks..(task + 1) * kept.len() / tasks;
            isa.run_product(kernel::Rows { y, x: &padded, indices: &kept.indices[part], bias, cells: &w.0 });
        });
    }
}
