//! Memory on a GPU.

use std::marker::PhantomData;
use std::ops::Range;

use cudarc::driver::result;

use super::device::Gpu;
use super::error::{Result, driver};

/// What lies in a device's memory: plain values.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {}

impl Element for f32 {}
impl Element for f64 {}
impl Element for half::bf16 {}
impl Element for u32 {}
impl Element for i32 {}
impl Element for u64 {}
impl Element for u8 {}

/// Values in a device's memory; given back, in the order of the stream, when dropped.
#[derive(Debug)]
pub struct GpuBuf<T: Element> {
    gpu: Gpu,
    ptr: u64,
    len: usize,
    element: PhantomData<T>,
}

/// Some of the values of a [`GpuBuf`], to read.
#[derive(Debug)]
pub struct View<'a, T: Element> {
    gpu: &'a Gpu,
    ptr: u64,
    len: usize,
    element: PhantomData<&'a T>,
}

/// Some of the values of a [`GpuBuf`], to write.
#[derive(Debug)]
pub struct ViewMut<'a, T: Element> {
    gpu: &'a Gpu,
    ptr: u64,
    len: usize,
    element: PhantomData<&'a mut T>,
}

impl<T: Element> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element> Copy for View<'_, T> {}

/// Where a part of `len` values at `ptr` starts.
fn part<T>(ptr: u64, len: usize, range: &Range<usize>) -> u64 {
    assert!(range.start <= range.end && range.end <= len, "gpu: values {range:?} of {len}");
    ptr + (range.start * size_of::<T>()) as u64
}

impl<T: Element> GpuBuf<T> {
    pub(super) fn zeros(gpu: &Gpu, len: usize) -> Result<GpuBuf<T>> {
        let ptr = gpu.allocate(len * size_of::<T>())?;
        let mut buf = GpuBuf { gpu: gpu.clone(), ptr, len, element: PhantomData };
        buf.fill_zero()?;
        Ok(buf)
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All values, to read.
    pub fn view(&self) -> View<'_, T> {
        View { gpu: &self.gpu, ptr: self.ptr, len: self.len, element: PhantomData }
    }

    /// All values, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { gpu: &self.gpu, ptr: self.ptr, len: self.len, element: PhantomData }
    }

    /// Some values, to read.
    ///
    /// # Panics
    /// The range is outside the buffer.
    pub fn slice(&self, range: Range<usize>) -> View<'_, T> {
        self.view().slice(range)
    }

    /// Some values, to write.
    ///
    /// # Panics
    /// The range is outside the buffer.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        self.view_mut().into_slice(range)
    }

    /// A copy on the host; waits for all that is queued.
    ///
    /// # Errors
    /// The device fails.
    pub fn download(&self) -> Result<Vec<T>> {
        self.view().download()
    }

    /// Copies all values to `out`; waits for all that is queued.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn download_to(&self, out: &mut [T]) -> Result<()> {
        self.view().download_to(out)
    }

    /// Sets all values.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn upload_from(&mut self, values: &[T]) -> Result<()> {
        self.view_mut().upload_from(values)
    }

    /// Sets all values to 0.
    ///
    /// # Errors
    /// The device fails.
    pub fn fill_zero(&mut self) -> Result<()> {
        self.view_mut().fill_zero()
    }
}

impl<T: Element> Drop for GpuBuf<T> {
    fn drop(&mut self) {
        self.gpu.free(self.ptr);
    }
}

impl<'a, T: Element> View<'a, T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of these.
    ///
    /// # Panics
    /// The range is outside.
    pub fn slice(self, range: Range<usize>) -> View<'a, T> {
        View { ptr: part::<T>(self.ptr, self.len, &range), len: range.len(), ..self }
    }

    /// A copy on the host; waits for all that is queued.
    ///
    /// # Errors
    /// The device fails.
    pub fn download(self) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); self.len];
        self.download_to(&mut out)?;
        Ok(out)
    }

    /// Copies all values to `out`; waits for all that is queued.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn download_to(self, out: &mut [T]) -> Result<()> {
        assert_eq!(self.len, out.len(), "gpu: download");
        if out.is_empty() {
            return Ok(());
        }
        let stream = self.gpu.bind()?;
        // SAFETY: `ptr` holds `len` values (made with a length, cut with checks), `out` as many; both live until the
        // synchronisation below.
        unsafe { result::memcpy_dtoh_async(out, self.ptr, stream) }.map_err(driver("copying to the host"))?;
        self.gpu.synchronize()
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// These, to read.
    pub fn as_view(&self) -> View<'_, T> {
        View { gpu: self.gpu, ptr: self.ptr, len: self.len, element: PhantomData }
    }

    /// These, for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { gpu: self.gpu, ptr: self.ptr, len: self.len, element: PhantomData }
    }

    /// Some of these, to write.
    ///
    /// # Panics
    /// The range is outside.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        self.reborrow().into_slice(range)
    }

    /// Some of these, for as long as these.
    ///
    /// # Panics
    /// The range is outside.
    pub fn into_slice(self, range: Range<usize>) -> ViewMut<'a, T> {
        let ptr = part::<T>(self.ptr, self.len, &range);
        ViewMut { ptr, len: range.len(), ..self }
    }

    /// Parts of these, each behind the one before it.
    ///
    /// # Panics
    /// They overlap, or are outside.
    pub fn parts<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> [ViewMut<'_, T>; N] {
        let apart = ranges.iter().zip(ranges.iter().skip(1)).all(|(one, next)| one.end <= next.start);
        assert!(apart, "gpu: {ranges:?}");
        ranges.map(|range| {
            let ptr = part::<T>(self.ptr, self.len, &range);
            ViewMut { gpu: self.gpu, ptr, len: range.len(), element: PhantomData }
        })
    }

    /// Sets all values.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn upload_from(&mut self, values: &[T]) -> Result<()> {
        assert_eq!(self.len, values.len(), "gpu: upload");
        if values.is_empty() {
            return Ok(());
        }
        let stream = self.gpu.bind()?;
        // SAFETY: `ptr` holds as many values as `values`. The driver has taken what lies in pageable memory when it
        // returns, so `values` may change after.
        unsafe { result::memcpy_htod_async(self.ptr, values, stream) }
            .map_err(driver("copying to the device"))
    }

    /// Sets all values to those of `from`.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn copy_from(&mut self, from: View<'_, T>) -> Result<()> {
        assert_eq!(self.len, from.len, "gpu: copy");
        if self.len == 0 {
            return Ok(());
        }
        let stream = self.gpu.bind()?;
        let bytes = self.len * size_of::<T>();
        // SAFETY: both hold `len` values, and a view to write does not overlap one to read.
        unsafe { result::memcpy_dtod_async(self.ptr, from.ptr, bytes, stream) }
            .map_err(driver("copying on the device"))
    }

    /// Sets all values to 0.
    ///
    /// # Errors
    /// The device fails.
    pub fn fill_zero(&mut self) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        let stream = self.gpu.bind()?;
        // SAFETY: `ptr` holds `len` values, which may be zero bytes: `Element` is plain data.
        unsafe { result::memset_d8_async(self.ptr, 0, self.len * size_of::<T>(), stream) }
            .map_err(driver("clearing memory"))
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }
}
