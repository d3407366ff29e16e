//! Errors of communication.

use std::time::Duration;

use super::what::What;

/// Result of communication.
pub type Result<T> = std::result::Result<T, CommError>;

/// An error of communication. Every message is one line that names the rank where it occurs. After an error of a call the
/// processes no longer agree on what comes next, so the program ends with [`Communicator::abort`](super::Communicator::abort).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// A call does not finish before its deadline.
    #[error(
        "rank {rank}: {of}: {call} did not finish in {:.1} s; another process hangs, is gone or is slower than the deadline \
         allows",
        after.as_secs_f64()
    )]
    Late {
        /// The rank that waited.
        rank: usize,
        /// The data.
        of: What,
        /// The call.
        call: &'static str,
        /// How long it waited.
        after: Duration,
    },
    /// A process has left.
    #[error("rank {rank}: {of}: {call} cannot finish, rank {other} has left; see its message")]
    Gone {
        /// The rank that waited.
        rank: usize,
        /// The data.
        of: What,
        /// The call.
        call: &'static str,
        /// The rank that left.
        other: usize,
    },
    /// Two processes make different calls.
    #[error(
        "rank {rank}: {of}: {call} of {bytes} bytes, while rank {other} makes another call ({theirs}); report it"
    )]
    Differs {
        /// The rank that noticed.
        rank: usize,
        /// The data.
        of: What,
        /// The call.
        call: &'static str,
        /// The bytes that it expects from the other.
        bytes: usize,
        /// The other rank.
        other: usize,
        /// The call that the other rank makes instead.
        theirs: String,
    },
    /// The bytes of a call are more than an engine counts.
    #[error(
        "rank {rank}: {of}: {call} of {bytes} bytes, and the engine moves at most {most} in one call; report it"
    )]
    TooLong {
        /// The rank.
        rank: usize,
        /// The data.
        of: What,
        /// The call.
        call: &'static str,
        /// Bytes in all.
        bytes: usize,
        /// Bytes that are possible.
        most: usize,
    },
    /// The engine fails.
    #[error("rank {rank}: {of}: {call} failed: {problem}")]
    Engine {
        /// The rank.
        rank: usize,
        /// The data.
        of: What,
        /// The call.
        call: &'static str,
        /// The engine's text.
        problem: String,
    },
    /// A process reports an error of its own, which all processes then return.
    #[error("rank {other}: {problem}")]
    Reported {
        /// The rank that has it.
        other: usize,
        /// Its message.
        problem: String,
    },
    /// The engine does not start. Holds the cause, and help.
    #[error("{0}")]
    Start(String),
}
