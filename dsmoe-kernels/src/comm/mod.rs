//! Processes that run one program together.
//!
//! A [`Communicator`] moves bytes between them and adds nothing: what arrives is what was sent. Sums over processes are made
//! here, by [`tree`], in one order. Neither the engine nor the number of processes can therefore change a bit of a result.
//!
//! [`start`] starts the engine of a program: MPI where a launcher of MPI started several processes and the feature `mpi` is on,
//! TCP where `torchrun` did.
//! [`Alone`] is the communicator of a single process, and [`threads`] connects the threads of one process, for tests.

mod agree;
mod alone;
#[cfg(test)]
mod cases;
mod communicator;
mod error;
mod launch;
#[cfg(all(feature = "mpi", unix, target_endian = "little", target_pointer_width = "64"))]
mod mpi;
mod settings;
mod start;
mod tcp;
pub mod threads;
pub mod tree;
mod what;

pub use agree::{agree, gather, neighbours};
pub use alone::{Alone, alone};
pub use communicator::{Communicator, Place};
pub use error::{CommError, Result};
pub use launch::{Launch, Launcher};
pub use settings::Settings;
pub use start::{Engine, MpiLibrary, find_mpi, start};
pub use tree::Tree;
pub use what::What;
