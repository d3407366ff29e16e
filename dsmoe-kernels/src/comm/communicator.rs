//! The trait of engines.

use std::fmt::Debug;

use super::error::Result;
use super::what::What;

/// The machine of a process, and its number there: for reductions in two stages, and to choose a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The number of the machine.
    pub machine: usize,
    /// The number of machines.
    pub machines: usize,
    /// The number of the process on its machine.
    pub local: usize,
    /// The number of processes on its machine.
    pub locals: usize,
}

/// Processes that run the same program, seen from one of them.
///
/// Calls are collective: all processes make the same ones in the same order, one at a time. No call adds anything, so
/// results cannot depend on the engine. Calls end in bounded time: with an error if another process does not take part.
///
/// An engine that may still use the memory of a call that failed does not return from it: it reports the error and ends all
/// processes.
pub trait Communicator: Send + Sync + Debug {
    /// Returns the number of this process, from 0.
    fn rank(&self) -> usize;

    /// Returns the number of processes.
    fn size(&self) -> usize;

    /// Returns the place of this process.
    fn place(&self) -> Place;

    /// Sends the pieces of `send`, cut by the lengths `sent`, piece r to rank r. Sets the pieces of `recv`, cut by
    /// `received`, piece r to what rank r sent here.
    ///
    /// # Errors
    /// Another process does not take part, or the engine fails.
    ///
    /// # Panics
    /// The lengths do not fit their slices, or there is not one for each rank.
    fn all_to_all(
        &self,
        of: What,
        send: &[u8],
        sent: &[usize],
        recv: &mut [u8],
        received: &[usize],
    ) -> Result<()>;

    /// Sets `recv`, cut by the lengths `lens`, to the `send` of all ranks in order.
    ///
    /// # Errors
    /// Another process does not take part, or the engine fails.
    ///
    /// # Panics
    /// The lengths do not fit their slices, or there is not one for each rank.
    fn all_gather(&self, of: What, send: &[u8], recv: &mut [u8], lens: &[usize]) -> Result<()>;

    /// Sets `bytes` to those of rank `from`.
    ///
    /// # Errors
    /// Another process does not take part, or the engine fails.
    ///
    /// # Panics
    /// There is no rank `from`.
    fn broadcast(&self, of: What, from: usize, bytes: &mut [u8]) -> Result<()>;

    /// Waits for all processes.
    ///
    /// # Errors
    /// Another process does not take part, or the engine fails.
    fn barrier(&self, of: What) -> Result<()>;

    /// Ends all processes with exit status `status`, at once and from any thread.
    fn abort(&self, status: i32) -> !;
}

/// Checks the lengths of [`Communicator::all_to_all`].
#[track_caller]
pub(super) fn check_all_to_all(size: usize, send: &[u8], sent: &[usize], recv: &[u8], received: &[usize]) {
    assert_eq!([sent.len(), received.len()], [size; 2], "all_to_all: lengths for {size} ranks");
    assert_eq!(sum(sent), Some(send.len()), "all_to_all: the lengths sent and {} bytes", send.len());
    assert_eq!(sum(received), Some(recv.len()), "all_to_all: the lengths received and {} bytes", recv.len());
}

/// Checks the lengths of [`Communicator::all_gather`].
#[track_caller]
pub(super) fn check_all_gather(rank: usize, size: usize, send: &[u8], recv: &[u8], lens: &[usize]) {
    assert_eq!(lens.len(), size, "all_gather: lengths for {size} ranks");
    assert_eq!(send.len(), lens[rank], "all_gather: bytes sent by rank {rank}");
    assert_eq!(sum(lens), Some(recv.len()), "all_gather: the lengths and {} bytes", recv.len());
}

/// The sum of lengths; none if it overflows.
fn sum(lens: &[usize]) -> Option<usize> {
    lens.iter().try_fold(0usize, |sum, &len| sum.checked_add(len))
}
