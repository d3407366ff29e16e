//! Processes that run one program together.
//!
//! A [`Communicator`] moves bytes between them and adds nothing: what arrives is what was sent. Sums over processes are made
//! here, by [`tree`], in one order. Neither the engine nor the number of processes can therefore change a bit of a result.
//!
//! [`Alone`] is the communicator of a single process, and [`threads`] connects the threads of one process, for tests.

mod agree;
mod alone;
mod communicator;
mod error;
pub mod threads;
pub mod tree;
mod what;

pub use agree::{agree, gather};
pub use alone::Alone;
pub use communicator::{Communicator, Place};
pub use error::{CommError, Result};
pub use tree::Tree;
pub use what::What;
