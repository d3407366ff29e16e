//! Cuts a whole product into tasks.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use rayon::prelude::*;

use super::block::{At, Block, Left, PackLeft, Panels, Sink};
use super::mat::{Mat, Precision};
use super::pack::{PANEL, Source, round};
use super::packed::{PackPanel, panel_len, panels};
use crate::blocks::each_when;
use crate::buf::{Buf, SharedRows};
use crate::crew;
use crate::isa::Isa;
use crate::simd::{Product, ProductKernel};

/// Multiply-adds below which waking a second thread costs more than it saves. Under Miri threads share small problems too.
const SERIAL_WORK: usize = if cfg!(miri) { 1 << 7 } else { 1 << 18 };
/// The same for threads that wait in a crew.
const SERIAL_WORK_OF_CREW: usize = if cfg!(miri) { 1 << 6 } else { 1 << 15 };
/// Inner dimension of one round over C: the part of A that a task packs stays in the second-level cache.
pub(crate) const ROUND: usize = 2048;
/// Approximate f32 values of A that a task packs.
const LEFT_LEN: usize = 1 << 18;
/// Rows below which a task reuses too little of B: finer tasks share rows instead.
const ENOUGH_ROWS: usize = 96;
/// The same for a B of at most [`SMALL_RIGHT`] values per lane, which stays in the cache.
const FEW_ROWS: usize = 26;
const SMALL_RIGHT: usize = 1 << 13;
/// Panels below which a task reuses too little of its packed A.
const ENOUGH_PANELS: usize = 16;
/// Most rows of a task.
const MOST_ROWS: usize = 224;
/// f32 values of B packed at a time.
pub(crate) const RIGHT_LEN: usize = 1 << 22;
/// Approximate f32 values of B that a task packs for itself.
const PRIVATE_LEN: usize = 1 << 18;
/// Tasks per thread that keep the threads busy to the end.
const TASKS_PER_THREAD: usize = 8;

/// Rows of C, row-major; tasks write different rows or different columns.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    c: SharedRows<'a>,
    /// Columns of C, of which the panels cover those from 0.
    columns: usize,
    accumulate: bool,
}

impl<'a> Rows<'a> {
    /// Takes all of `c`, whose rows have `columns` values.
    ///
    /// # Safety
    /// No two tasks run at once whose rows and panels overlap.
    pub(crate) unsafe fn new(c: &'a mut [f32], columns: usize, accumulate: bool) -> Rows<'a> {
        Rows { c: SharedRows::new(c, columns), columns, accumulate }
    }

    /// Returns the same rows, with panel 0 being panel `first` of C.
    pub(crate) fn starting_at_panel(self, first: usize) -> Rows<'a> {
        let skip = first * PANEL;
        Rows { c: self.c.starting_at(skip), columns: self.columns - skip, ..self }
    }

    /// Returns the columns of `panel` in row `row` of the product.
    #[inline(always)]
    fn row(&self, row: usize, panel: usize) -> &'a mut [f32] {
        let first = panel * PANEL;
        // SAFETY: by the contract of `new` no other task uses this row's columns of this panel, and a task uses one
        // slice at a time.
        unsafe { self.c.row(row, first, PANEL.min(self.columns - first)) }
    }
}

impl Sink for Rows<'_> {
    #[inline(always)]
    fn start<S: Product>(&self, s: S, at: At) {
        if self.accumulate {
            for r in 0..at.rows {
                let row = self.row(at.row + r, at.panel);
                s.prefetch(row, 0);
                s.prefetch(row, PANEL / 2);
            }
        }
    }

    #[inline(always)]
    fn finish<S: Product>(&self, s: S, tile: &[f32], at: At) {
        for (r, sums) in tile.chunks_exact(PANEL).enumerate() {
            let row = self.row(at.row + r, at.panel);
            for (row, sums) in row.chunks_mut(S::LANES).zip(sums.chunks_exact(S::LANES)) {
                let sum = s.load(sums);
                if self.accumulate {
                    s.store_tail(row, s.add(s.load_tail(row), sum));
                } else {
                    s.store_tail(row, sum);
                }
            }
        }
    }
}

/// Rows and panels of one task.
pub(crate) type Cut = (Range<usize>, Range<usize>);

/// A grid of tasks over rows and panels; the result does not depend on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    rows: usize,
    panels: usize,
    row_blocks: usize,
    panel_blocks: usize,
}

impl Grid {
    /// Cuts `rows` rows and `panels` panels with inner dimension k into about `tasks` tasks.
    pub(crate) fn new(rows: usize, panels: usize, k: usize, tasks: usize) -> Grid {
        let most = (LEFT_LEN / k.max(1)).clamp(28, MOST_ROWS);
        let fewest = rows.div_ceil(most).max(1);
        // Every block of rows reads all of B again, every block of panels packs A again.
        let enough = if panels * k <= SMALL_RIGHT { FEW_ROWS } else { ENOUGH_ROWS };
        let row_blocks = tasks.min(rows / enough).max(fewest);
        let most_panel_blocks = if 4 * row_blocks >= tasks { panels / ENOUGH_PANELS } else { panels };
        let panel_blocks = tasks.div_ceil(row_blocks).clamp(1, most_panel_blocks.max(1));
        Grid { rows, panels, row_blocks, panel_blocks }
    }

    pub(crate) fn len(&self) -> usize {
        self.row_blocks * self.panel_blocks
    }

    pub(crate) fn get(&self, task: usize) -> Cut {
        let (row, panel) = (task % self.row_blocks, task / self.row_blocks);
        (part(row, self.row_blocks, self.rows), part(panel, self.panel_blocks, self.panels))
    }

    /// Lists the blocks of rows.
    pub(crate) fn row_blocks(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.row_blocks).map(move |row| part(row, self.row_blocks, self.rows))
    }
}

/// Returns part `i` of `total` things cut into `of` parts.
fn part(i: usize, of: usize, total: usize) -> Range<usize> {
    i * total / of..(i + 1) * total / of
}

/// Returns the number of tasks to aim for with `work` multiply-adds.
pub(crate) fn tasks_for(work: usize) -> usize {
    let threads = rayon::current_num_threads();
    let (serial, most) = match crew::is_led() {
        // All tasks of a loop take as long: as many for each thread.
        true => (SERIAL_WORK_OF_CREW, work / (SERIAL_WORK_OF_CREW / 2) / threads * threads),
        false => (SERIAL_WORK, work / (SERIAL_WORK / 4)),
    };
    if threads == 1 || work < serial { 1 } else { (TASKS_PER_THREAD * threads).min(most).max(1) }
}

/// Runs `task` for 0..tasks, in parallel if there are several.
pub(crate) fn for_tasks(tasks: usize, task: impl Fn(usize) + Send + Sync) {
    if tasks <= 1 || !crew::run(tasks, &task) {
        each_when(tasks > 1, (0..tasks).into_par_iter().with_max_len(1), task);
    }
}

/// Does as [`for_tasks`] if `parallel`, else runs the tasks on this thread.
pub(crate) fn for_tasks_when(parallel: bool, tasks: usize, task: impl Fn(usize) + Send + Sync) {
    if parallel { for_tasks(tasks, task) } else { (0..tasks).for_each(task) }
}

thread_local! {
    /// Packed B of the product that this thread has started. It is taken while in use: a thread that waits may start
    /// another product.
    static RIGHT: Cell<Buf> = Cell::default();
}

/// Runs `f` with a buffer of `len` values of unspecified contents, which the next call reuses.
pub(crate) fn with_right<R>(len: usize, f: impl FnOnce(&mut Buf) -> R) -> R {
    let mut buf = RIGHT.take();
    buf.resize(len);
    let result = f(&mut buf);
    RIGHT.set(buf);
    result
}

thread_local! {
    /// Panels of B that one task has packed for itself.
    static PRIVATE: RefCell<Buf> = RefCell::default();
}

/// Returns the storage of B packed for one product: pairs where they are multiplied, else f32, rounded for bf16.
pub(crate) fn storage(isa: Isa, precision: Precision) -> Precision {
    if precision == Precision::Bf16 && isa.dots() { Precision::Bf16 } else { Precision::F32 }
}

/// One panel of a product's B, packed for one call.
pub(crate) struct PackRight<'a, const N: usize> {
    pub(crate) out: &'a mut [f32],
    /// Lanes are columns of B.
    pub(crate) parts: [(Source<'a>, Range<usize>); N],
    pub(crate) ks: Range<usize>,
    pub(crate) precision: Precision,
}

impl<const N: usize> PackRight<'_, N> {
    pub(crate) fn run(self, isa: Isa) {
        isa.run_product(self);
    }
}

/// Returns the f32 values of a panel packed for one call.
pub(crate) fn right_len(isa: Isa, precision: Precision, depth: usize) -> usize {
    panel_len(storage(isa, precision), depth)
}

/// Views panels packed for one call.
pub(crate) fn right_panels(isa: Isa, precision: Precision, data: &[f32]) -> Panels<'_> {
    panels(storage(isa, precision), data)
}

impl<const N: usize> ProductKernel for PackRight<'_, N> {
    type Output = ();
    #[inline(always)]
    fn body<S: Product>(self, s: S) {
        let PackRight { out, parts, ks, precision } = self;
        let stored = if S::DOTS { precision } else { Precision::F32 };
        let values = ks.len() * PANEL;
        PackPanel { out: &mut *out, parts, ks, precision: stored }.body(s);
        if stored != precision {
            round(s, &mut out[..values]);
        }
    }
}

/// A product of rows of `a` `[m, k]` with columns of `b` `[k, n]`; the sources' lanes are those rows and columns.
///
/// The smaller operand is packed once for all tasks. The larger one is packed piece by piece by the task that uses the
/// piece, so that it stays in the cache of its core.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    pub(crate) a: Source<'a>,
    pub(crate) b: Source<'a>,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) precision: Precision,
}

impl Operands<'_> {
    /// Sets C, row-major with n columns, or adds to it. Runs on this thread alone unless `parallel`.
    pub(crate) fn multiply(self, isa: Isa, c: &mut [f32], accumulate: bool, parallel: bool) {
        let Operands { m, n, k, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 && !accumulate {
            c[..m * n].fill(0.0);
        }
        let tasks = if parallel { tasks_for(m * n * k) } else { 1 };
        for start in (0..k).step_by(ROUND) {
            // SAFETY: C is borrowed mutably, and the tasks of `by_rows` and `by_columns` differ in rows or panels.
            let sink = unsafe { Rows::new(c, n, accumulate || start > 0) };
            let round = Round { isa, operands: self, ks: start..k.min(start + ROUND), tasks, sink };
            if m < n { round.by_columns() } else { round.by_rows() }
        }
    }
}

/// One range of the inner dimension of a product.
struct Round<'a> {
    isa: Isa,
    operands: Operands<'a>,
    ks: Range<usize>,
    tasks: usize,
    sink: Rows<'a>,
}

impl Round<'_> {
    /// Sets `out` to panel `panel` of B.
    fn pack_right(&self, out: &mut [f32], panel: usize) {
        let Operands { b, n, precision, .. } = self.operands;
        let lanes = panel * PANEL..n.min((panel + 1) * PANEL);
        PackRight { out, parts: [(b, lanes)], ks: self.ks.clone(), precision }.run(self.isa);
    }

    /// Packs B once for all tasks; each task packs its part of A.
    fn by_rows(&self) {
        let Round { isa, tasks, operands: Operands { a, m, n, precision, .. }, .. } = *self;
        let (panels, depth) = (n.div_ceil(PANEL), self.ks.len());
        let len = right_len(isa, precision, depth);
        let at_once = (RIGHT_LEN / len).clamp(1, panels);
        with_right(at_once * len, |right| {
            for first in (0..panels).step_by(at_once) {
                let count = at_once.min(panels - first);
                let packing = right[..count * len].par_chunks_exact_mut(len).enumerate();
                each_when(tasks > 1, packing, |(panel, out)| self.pack_right(out, first + panel));
                let sink = self.sink.starting_at_panel(first);
                let grid = Grid::new(m, count, depth, tasks);
                let panels = right_panels(isa, precision, &right[..count * len]);
                for_tasks(grid.len(), |task| {
                    let (rows, range) = grid.get(task);
                    let left = Left::Source(a, precision == Precision::Bf16);
                    let (ks, panel_ks) = (self.ks.clone(), self.ks.clone());
                    Block { left, rows, ks, panels, panel_ks, range, sink: &sink }.run(isa);
                });
            }
        });
    }

    /// Packs A once for all tasks; each task packs its part of B.
    fn by_columns(&self) {
        let Round { isa, tasks, operands: Operands { a, m, n, precision, .. }, .. } = *self;
        let (panels, depth) = (n.div_ceil(PANEL), self.ks.len());
        let blocks = m.div_ceil((LEFT_LEN / depth).clamp(28, MOST_ROWS));
        let rows_of = |block: usize| block * m / blocks..(block + 1) * m / blocks;
        let left_len = PackLeft::len(isa, precision, m.div_ceil(blocks), depth);
        let right_len = right_len(isa, precision, depth);
        let per_task = (PRIVATE_LEN / right_len).clamp(1, panels.div_ceil(tasks));
        with_right(blocks * left_len, |left| {
            let packing = left.par_chunks_exact_mut(left_len).enumerate();
            each_when(tasks > 1, packing, |(block, out)| {
                PackLeft { out, source: a, rows: rows_of(block), ks: self.ks.clone(), precision }.run(isa);
            });
            let left = &left[..];
            for_tasks(panels.div_ceil(per_task), |task| {
                let first = task * per_task;
                let count = per_task.min(panels - first);
                let sink = self.sink.starting_at_panel(first);
                PRIVATE.with_borrow_mut(|right| {
                    right.resize(count * right_len);
                    for (panel, out) in right.chunks_exact_mut(right_len).enumerate() {
                        self.pack_right(out, first + panel);
                    }
                    let panels = right_panels(isa, precision, right);
                    for block in 0..blocks {
                        let left = &left[block * left_len..][..left_len];
                        let left = PackLeft::tiles(isa, precision, left, depth);
                        let (rows, range) = (rows_of(block), 0..count);
                        let (ks, panel_ks) = (0..depth, 0..depth);
                        Block { left, rows, ks, panels, panel_ks, range, sink: &sink }.run(isa);
                    }
                });
            });
        });
    }
}

/// Sets `C = A W^T` for each of some packed W with as many columns.
pub(super) fn products_packed<const N: usize>(
    isa: Isa,
    cs: [&mut [f32]; N],
    a: Mat<'_>,
    ws: [&super::packed::Packed; N],
) {
    let (m, k) = (a.rows, a.cols);
    let outputs: usize = ws.iter().map(|w| w.outputs()).sum();
    let mut columns = ws.iter().map(|w| w.outputs());
    // SAFETY: C is borrowed mutably, and the grid's tasks differ in rows or panels.
    let sinks = cs.map(|c| unsafe { Rows::new(c, columns.next().unwrap_or(0), false) });
    for start in (0..k).step_by(ROUND) {
        let ks = start..k.min(start + ROUND);
        let tasks = tasks_for(m * outputs * ks.len());
        let grids = ws.map(|w| {
            let tasks = (tasks * w.outputs()).div_ceil(outputs);
            Grid::new(m, w.outputs().div_ceil(PANEL), ks.len(), tasks)
        });
        let sinks = sinks.map(|rows| Rows { accumulate: start > 0, ..rows });
        for_tasks_when(tasks > 1, grids.iter().map(Grid::len).sum(), |mut task| {
            let mut product = 0;
            while task >= grids[product].len() {
                task -= grids[product].len();
                product += 1;
            }
            let (w, (rows, range)) = (ws[product], grids[product].get(task));
            let left = Left::Source(Source::rows(a), w.precision() == Precision::Bf16);
            let (ks, panels) = (ks.clone(), w.panels());
            Block { left, rows, ks, panels, panel_ks: 0..k, range, sink: &sinks[product] }.run(isa);
        });
    }
}
