//! Memory: cache-line aligned `f32` buffers and read-only file maps.

use std::cell::Cell;
use std::fs::File;
use std::io;
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
    /// `len` zeros.
    pub fn zeros(len: usize) -> Buf {
        Buf { lines: bytemuck::allocation::zeroed_vec(len.div_ceil(16)), len }
    }

    /// Makes the buffer `len` long, keeping its memory when that is enough. The contents are unspecified.
    pub fn resize(&mut self, len: usize) {
        let lines = len.div_ceil(16);
        if lines > self.lines.len() {
            *self = Buf::zeros(len);
        }
        self.len = len;
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

/// Runs `work` with `len` values of unspecified contents, in memory that this thread keeps for the next call.
pub(crate) fn with_spare<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken while in use: a thread that waits may be given another op to run.
    let mut buf = SPARE.take();
    buf.resize(len);
    let result = work(&mut buf);
    SPARE.set(buf);
    result
}

/// A file mapped for reading.
///
/// The bytes are those of the file as long as nobody truncates it: a shrinking file raises SIGBUS on the next
/// read past its new end, as with every memory map.
#[derive(Debug)]
pub struct Mmap(memmap2::Mmap);

impl Mmap {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// The operating system refuses the map.
    pub fn open(file: &File) -> io::Result<Mmap> {
        // SAFETY: the map is read-only and private to this value. Model files are written under temporary names
        // and renamed, never changed in place; what an outside truncation does is said in the type's docs.
        unsafe { memmap2::Mmap::map(file) }.map(Mmap)
    }
}

impl Deref for Mmap {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::Buf;

    #[test]
    fn buffers_are_aligned_zeroed_and_keep_their_memory() {
        let mut buf = Buf::zeros(33);
        assert_eq!(buf.len(), 33);
        assert_eq!(buf.as_ptr() as usize % 64, 0);
        assert!(buf.iter().all(|&x| x == 0.0));
        let before = buf.as_ptr();
        buf[0] = 1.0;
        buf.resize(7);
        assert_eq!((buf.len(), buf.as_ptr()), (7, before));
        buf.clear();
        assert_eq!(&buf[..], &[0.0; 7]);
    }
}
