//! Memory on a GPU: matrices, which own their memory or are rows of another.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use cudarc::driver::result;

use super::device::Gpu;
use super::error::{Result, driver};
use super::kernel::Arg;

/// Types of values in a device's memory: plain data.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {}

impl Element for f32 {}
impl Element for f64 {}
impl Element for half::bf16 {}
impl Element for u32 {}
impl Element for i32 {}
impl Element for u64 {}
impl Element for u8 {}

/// Types of values that products give.
pub trait Float: Element {
    /// Tells whether this is f32; otherwise it is bf16.
    const F32: bool;
}

impl Float for f32 {
    const F32: bool = true;
}

impl Float for half::bf16 {
    const F32: bool = false;
}

/// Rows of values in a device's memory, without gaps. A vector has one column.
///
/// It is to a [`GpuBuf`] what a slice is to a `Vec`. As a slice it is unsized, which `Tail` is for: two matrices behind
/// `&mut` cannot be swapped, so that memory never leaves its owner.
#[derive(Debug)]
pub struct Matrix<T: Element, Tail: ?Sized = [()]> {
    gpu: Gpu,
    ptr: u64,
    rows: usize,
    cols: usize,
    element: PhantomData<T>,
    _tail: Tail,
}

type Sized0<T> = Matrix<T, [(); 0]>;

/// A matrix that owns its memory. The memory is freed, in the order of the stream, when the buffer is dropped.
#[derive(Debug)]
pub struct GpuBuf<T: Element>(Sized0<T>);

/// A part of a matrix, which it borrows as `B` does.
#[derive(Debug)]
pub struct Part<T: Element, B>(Sized0<T>, PhantomData<B>);

/// A part of a matrix, to read.
pub type View<'a, T> = Part<T, &'a T>;

/// A part of a matrix, to write.
pub type ViewMut<'a, T> = Part<T, &'a mut T>;

impl Gpu {
    /// Makes a vector of zeros.
    ///
    /// # Errors
    /// The memory does not suffice.
    pub fn zeros<T: Element>(&self, len: usize) -> Result<GpuBuf<T>> {
        self.zero_rows(len, 1)
    }

    /// Makes a matrix of zeros.
    ///
    /// # Errors
    /// The memory does not suffice.
    pub fn zero_rows<T: Element>(&self, rows: usize, cols: usize) -> Result<GpuBuf<T>> {
        let ptr = self.stream().allocate(rows * cols * size_of::<T>())?;
        let gpu = self.clone();
        let mut buf = GpuBuf(Matrix { gpu, ptr, rows, cols, element: PhantomData, _tail: [] });
        buf.fill_zero()?;
        Ok(buf)
    }

    /// Makes a vector of `values`.
    ///
    /// # Errors
    /// The memory does not suffice.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<GpuBuf<T>> {
        self.upload_rows(values, 1)
    }

    /// Makes a matrix of `values`, in rows of `cols`.
    ///
    /// # Errors
    /// The memory does not suffice.
    ///
    /// # Panics
    /// The last row is not whole.
    pub fn upload_rows<T: Element>(&self, values: &[T], cols: usize) -> Result<GpuBuf<T>> {
        let mut buf = self.zero_rows(values.len() / cols.max(1), cols)?;
        buf.upload_from(values)?;
        Ok(buf)
    }
}

impl<T: Element> Drop for GpuBuf<T> {
    fn drop(&mut self) {
        self.0.gpu.stream().free(self.0.ptr);
    }
}

impl<T: Element> Deref for GpuBuf<T> {
    type Target = Matrix<T>;

    fn deref(&self) -> &Matrix<T> {
        &self.0
    }
}

impl<T: Element> DerefMut for GpuBuf<T> {
    fn deref_mut(&mut self) -> &mut Matrix<T> {
        &mut self.0
    }
}

impl<T: Element, B> Deref for Part<T, B> {
    type Target = Matrix<T>;

    fn deref(&self) -> &Matrix<T> {
        &self.0
    }
}

impl<T: Element> DerefMut for ViewMut<'_, T> {
    fn deref_mut(&mut self) -> &mut Matrix<T> {
        &mut self.0
    }
}

impl<T: Element> Matrix<T> {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Tells whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns some of the rows, to read.
    ///
    /// # Panics
    /// The range is outside the matrix.
    pub fn part(&self, rows: Range<usize>) -> View<'_, T> {
        Part(self.place_of(rows), PhantomData)
    }

    /// Returns some of the rows, to write.
    ///
    /// # Panics
    /// The range is outside the matrix.
    pub fn part_mut(&mut self, rows: Range<usize>) -> ViewMut<'_, T> {
        Part(self.place_of(rows), PhantomData)
    }

    /// Returns ranges of rows, each behind the one before it, to write.
    ///
    /// # Panics
    /// They overlap, or are outside the matrix.
    pub fn parts<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> [ViewMut<'_, T>; N] {
        let apart = ranges.iter().zip(ranges.iter().skip(1)).all(|(one, next)| one.end <= next.start);
        assert!(apart, "gpu: {ranges:?}");
        ranges.map(|rows| Part(self.place_of(rows), PhantomData))
    }

    /// Returns the first values as a matrix of another shape, to read.
    ///
    /// # Panics
    /// There are fewer values.
    pub fn shaped(&self, rows: usize, cols: usize) -> View<'_, T> {
        Part(self.first(rows, cols), PhantomData)
    }

    /// Returns the first values as a matrix of another shape, to write.
    ///
    /// # Panics
    /// There are fewer values.
    pub fn shaped_mut(&mut self, rows: usize, cols: usize) -> ViewMut<'_, T> {
        Part(self.first(rows, cols), PhantomData)
    }

    /// Returns the first values as two matrices of as many rows, the second behind the first, to read.
    ///
    /// # Panics
    /// There are fewer values.
    pub fn blocks(&self, rows: usize, cols: [usize; 2]) -> [View<'_, T>; 2] {
        self.blocks_of(rows, cols).map(|block| Part(block, PhantomData))
    }

    /// Returns the first values as two matrices of as many rows, the second behind the first, to write.
    ///
    /// # Panics
    /// There are fewer values.
    pub fn blocks_mut(&mut self, rows: usize, cols: [usize; 2]) -> [ViewMut<'_, T>; 2] {
        self.blocks_of(rows, cols).map(|block| Part(block, PhantomData))
    }

    fn blocks_of(&self, rows: usize, [one, other]: [usize; 2]) -> [Sized0<T>; 2] {
        let (first, len) = (self.first(rows, one), rows * (one + other));
        let all: &Matrix<T> = &self.first(len, 1);
        let behind: &Matrix<T> = &all.place_of(rows * one..len);
        [first, behind.first(rows, other)]
    }

    fn place_of(&self, range: Range<usize>) -> Sized0<T> {
        assert!(range.start <= range.end && range.end <= self.rows, "gpu: rows {range:?} of {}", self.rows);
        let ptr = self.ptr + (range.start * self.cols * size_of::<T>()) as u64;
        let (gpu, cols) = (self.gpu.clone(), self.cols);
        Matrix { gpu, ptr, rows: range.len(), cols, element: PhantomData, _tail: [] }
    }

    fn first(&self, rows: usize, cols: usize) -> Sized0<T> {
        assert!(rows * cols <= self.len(), "gpu: {rows} rows of {cols} out of {} values", self.len());
        let (gpu, ptr) = (self.gpu.clone(), self.ptr);
        Matrix { gpu, ptr, rows, cols, element: PhantomData, _tail: [] }
    }

    /// Copies the values to the host. It waits for the queue.
    ///
    /// # Errors
    /// The device fails.
    pub fn download(&self) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); self.len()];
        self.download_to(&mut out)?;
        Ok(out)
    }

    /// Copies the values to `out`. It waits for the queue.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn download_to(&self, out: &mut [T]) -> Result<()> {
        assert_eq!(self.len(), out.len(), "gpu: download");
        if out.is_empty() {
            return Ok(());
        }
        let stream = self.gpu.stream().bind()?;
        // SAFETY: `ptr` holds as many values as `out`: a matrix is made with a size and cut with checks. Both live until the
        // synchronisation below.
        unsafe { result::memcpy_dtoh_async(out, self.ptr, stream) }.map_err(driver("copying to the host"))?;
        self.gpu.synchronize()
    }

    /// Sets the values to those of the host.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn upload_from(&mut self, values: &[T]) -> Result<()> {
        assert_eq!(self.len(), values.len(), "gpu: upload");
        if values.is_empty() {
            return Ok(());
        }
        let stream = self.gpu.stream().bind()?;
        // SAFETY: `ptr` holds as many values as `values`. The driver has copied pageable memory when it returns, so `values`
        // may change after.
        unsafe { result::memcpy_htod_async(self.ptr, values, stream) }
            .map_err(driver("copying to the device"))
    }

    /// Sets the values to those of `from`.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn copy_from(&mut self, from: &Matrix<T>) -> Result<()> {
        assert_eq!(self.len(), from.len(), "gpu: copy");
        if self.is_empty() {
            return Ok(());
        }
        let stream = self.gpu.stream().bind()?;
        let bytes = self.len() * size_of::<T>();
        // SAFETY: both hold that many bytes, and a matrix to write does not overlap one to read.
        unsafe { result::memcpy_dtod_async(self.ptr, from.ptr, bytes, stream) }
            .map_err(driver("copying on the device"))
    }

    /// Sets the values to 0.
    ///
    /// # Errors
    /// The device fails.
    pub fn fill_zero(&mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let stream = self.gpu.stream().bind()?;
        // SAFETY: `ptr` holds that many values, which may be zero bytes: `Element` is plain data.
        unsafe { result::memset_d8_async(self.ptr, 0, self.len() * size_of::<T>(), stream) }
            .map_err(driver("clearing memory"))
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// The address as an argument of a kernel.
    pub(crate) fn arg(&self) -> Arg {
        Arg::Ptr(self.ptr)
    }
}

/// The address as an argument of a kernel; null for none.
pub(crate) fn optional<T: Element>(matrix: Option<&Matrix<T>>) -> Arg {
    matrix.map_or(Arg::NULL, Matrix::arg)
}
