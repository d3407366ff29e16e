//! Memory of ops: cache-line aligned `f32` buffers, and rows that parallel tasks share.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// One cache line of `f32`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

// SAFETY: 64 bytes of f32 without padding; all bit patterns, zero included, are valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above, and `Line` is `Copy`, `repr(C)` and holds nothing but f32.
unsafe impl bytemuck::Pod for Line {}

/// A zeroed, 64-byte aligned buffer of `f32`.
#[derive(Clone, Default)]
pub struct Buf {
    lines: Vec<Line>,
    len: usize,
}

impl Buf {
    /// Allocates `len` zeros.
    pub fn zeros(len: usize) -> Buf {
        Buf { lines: bytemuck::allocation::zeroed_vec(len.div_ceil(16)), len }
    }

    /// Sets the length to `len` and reuses the memory if it is large enough. The contents are unspecified.
    pub fn resize(&mut self, len: usize) {
        let lines = len.div_ceil(16);
        if lines > self.lines.len() {
            // The old memory is freed first. Holding both at once would leave a gap that no larger buffer fits.
            *self = Buf::default();
            *self = Buf::zeros(len);
        }
        self.len = len;
    }

    /// Returns the values that there is memory for.
    #[cfg(test)]
    pub(crate) fn room(&self) -> usize {
        16 * self.lines.len()
    }

    /// Sets every value to 0.
    pub fn clear(&mut self) {
        self.fill(0.0);
    }
}

impl Deref for Buf {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} f32)", self.len)
    }
}

thread_local! {
    static SPARE: Cell<Buf> = Cell::default();
}

/// Runs `work` with `len` values of unspecified contents, in memory that this thread reuses in its next call.
pub(crate) fn with_spare<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken while in use: a thread that waits may be given another op to run.
    let mut buf = SPARE.take();
    buf.resize(len);
    let result = work(&mut buf);
    SPARE.set(buf);
    result
}

/// Lets parallel tasks write one slice of rows, each task its own columns of its own rows. All mutable memory that tasks
/// share goes through this type.
#[derive(Clone, Copy)]
pub(crate) struct SharedRows<'a> {
    data: *mut f32,
    len: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: memory is reached through `values` and `row` alone, whose callers promise that nobody else uses it.
unsafe impl Send for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    /// Borrows all of `data`, whose rows start every `stride` values.
    pub(crate) fn new(data: &'a mut [f32], stride: usize) -> SharedRows<'a> {
        SharedRows { data: data.as_mut_ptr(), len: data.len(), stride, borrowed: PhantomData }
    }

    /// Returns the same rows, with column `column` as their column 0.
    pub(crate) fn starting_at(self, column: usize) -> SharedRows<'a> {
        assert!(column <= self.len);
        // SAFETY: `column` is inside the slice that `new` borrowed, or its end.
        let data = unsafe { self.data.add(column) };
        SharedRows { data, len: self.len - column, ..self }
    }

    /// Returns `width` values of row `row` from column `first` on.
    ///
    /// # Safety
    /// No other slice of these values is used as long as this one is.
    #[inline(always)]
    pub(crate) unsafe fn row(self, row: usize, first: usize, width: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.values(row * self.stride + first, width) }
    }

    /// Returns the `len` values from `start` on, which may span rows.
    ///
    /// # Safety
    /// The contract is that of [`SharedRows::row`].
    #[inline(always)]
    pub(crate) unsafe fn values(self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start + len <= self.len);
        // SAFETY: `start` is inside the slice that `new` borrowed for 'a, by the assertion.
        let start = unsafe { self.data.add(start) };
        // SAFETY: so are the `len` values from there; nobody else uses them, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Buf, SharedRows};

    #[test]
    fn buffers_are_aligned_zeroed_and_keep_their_memory() {
        let mut buf = Buf::zeros(33);
        assert_eq!(buf.len(), 33);
        assert_eq!(buf.as_ptr() as usize % 64, 0);
        assert!(buf.iter().all(|&x| x == 0.0));
        let before = buf.as_ptr();
        buf[0] = 1.0;
        buf.resize(7);
        assert_eq!((buf.len(), buf.as_ptr(), buf.room()), (7, before, 48));
        buf.clear();
        assert_eq!(&buf[..], &[0.0; 7]);
        buf.resize(49);
        assert_eq!((buf.len(), buf.room()), (49, 64));
    }

    #[test]
    fn tasks_write_their_own_columns_of_shared_rows() {
        let (rows, stride) = (4, 6);
        let mut data = vec![0.0; rows * stride];
        let left = SharedRows::new(&mut data, stride);
        let right = left.starting_at(2);
        std::thread::scope(|scope| {
            for task in 0..2 {
                scope.spawn(move || {
                    for row in (task..rows).step_by(2) {
                        // SAFETY: a task has its own rows, and the two slices of a row are disjoint.
                        let left = unsafe { left.row(row, 0, 2) };
                        // SAFETY: as above.
                        let right = unsafe { right.row(row, 0, 4) };
                        left.fill(row as f32);
                        right.fill(-(row as f32));
                    }
                });
            }
        });
        for (row, values) in data.chunks(stride).enumerate() {
            let row = row as f32;
            assert_eq!(values, [row, row, -row, -row, -row, -row]);
        }
    }

    #[test]
    fn shared_rows_end_where_their_slice_ends() {
        let mut data = [0.0; 6];
        let rows = SharedRows::new(&mut data, 3).starting_at(1);
        // SAFETY: one slice at a time.
        unsafe { rows.row(1, 0, 2).fill(1.0) };
        // SAFETY: as above.
        unsafe { rows.values(5, 0).fill(2.0) };
        assert!(
            std::panic::catch_unwind(|| {
                // SAFETY: as above.
                unsafe { rows.row(1, 0, 3).fill(3.0) };
            })
            .is_err()
        );
        assert_eq!(data, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
    }
}
