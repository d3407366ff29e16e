//! Read-only file maps.

use std::fs::File;
use std::io;
use std::ops::Deref;

/// A file mapped for reading.
///
/// The bytes are those of the file unless another process truncates it: a read past the new end then raises SIGBUS, as
/// with every memory map.
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
