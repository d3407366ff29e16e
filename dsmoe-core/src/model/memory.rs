//! The memory that a model takes.

/// One use of memory.
///
/// ```
/// use dsmoe_core::init::preset;
/// use dsmoe_core::model::{MemoryUse, TrainWorkspace};
///
/// let uses: Vec<MemoryUse> = TrainWorkspace::memory(&preset("tiny")?, 1024, 0.5, false);
/// assert!(uses.iter().map(|memory| memory.bytes).sum::<usize>() > 0);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// The use.
    pub what: &'static str,
    /// Its size.
    pub bytes: usize,
}
