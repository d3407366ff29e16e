//! A single process.

use std::sync::{Arc, LazyLock};

use super::communicator::{Communicator, Place, check_all_gather, check_all_to_all};
use super::error::Result;
use super::what::What;

/// The communicator of a process that runs alone. Its calls copy and cannot fail.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

/// Returns a shared [`Alone`], for work that no other process takes part in.
pub fn alone() -> &'static Arc<dyn Communicator> {
    static ALONE: LazyLock<Arc<dyn Communicator>> = LazyLock::new(|| Arc::new(Alone));
    &ALONE
}

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn place(&self) -> Place {
        Place { machine: 0, machines: 1, local: 0, locals: 1 }
    }

    fn all_to_all(
        &self,
        _: What,
        send: &[u8],
        sent: &[usize],
        recv: &mut [u8],
        received: &[usize],
    ) -> Result<()> {
        check_all_to_all(1, send, sent, recv, received);
        recv.copy_from_slice(send);
        Ok(())
    }

    fn all_gather(&self, _: What, send: &[u8], recv: &mut [u8], lens: &[usize]) -> Result<()> {
        check_all_gather(0, 1, send, recv, lens);
        recv.copy_from_slice(send);
        Ok(())
    }

    fn broadcast(&self, _: What, from: usize, _: &mut [u8]) -> Result<()> {
        assert_eq!(from, 0, "broadcast: there is no rank {from} of 1");
        Ok(())
    }

    fn barrier(&self, _: What) -> Result<()> {
        Ok(())
    }

    fn abort(&self, status: i32) -> ! {
        std::process::exit(status)
    }
}

#[cfg(test)]
mod tests {
    use super::Alone;
    use crate::comm::{Communicator, What};

    const OF: What = What::of("bytes");

    #[test]
    fn a_single_process_gets_what_it_sends() {
        assert_eq!((Alone.rank(), Alone.size(), Alone.place().locals), (0, 1, 1));
        let mut recv = [0; 3];
        Alone.all_to_all(OF, &[1, 2, 3], &[3], &mut recv, &[3]).unwrap();
        assert_eq!(recv, [1, 2, 3]);
        Alone.all_gather(OF, &[4, 5, 6], &mut recv, &[3]).unwrap();
        assert_eq!(recv, [4, 5, 6]);
        Alone.broadcast(OF, 0, &mut recv).unwrap();
        Alone.barrier(OF).unwrap();
        assert_eq!(recv, [4, 5, 6]);
    }

    #[test]
    #[should_panic(expected = "all_to_all: the lengths sent and 3 bytes")]
    fn lengths_that_do_not_fit_are_refused() {
        let _ = Alone.all_to_all(OF, &[1, 2, 3], &[2], &mut [0; 2], &[2]);
    }
}
