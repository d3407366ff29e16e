//! The memory that a model takes.

/// One use of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// The use.
    pub what: &'static str,
    /// Its size.
    pub bytes: usize,
}
