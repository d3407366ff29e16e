//! A communicator between threads of one process, for tests of what runs on several processes.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::communicator::{Communicator, Place, check_all_gather, check_all_to_all};
use super::error::{CommError, Result};
use super::what::What;

/// How long a call waits for another member: longer than any work between calls of a test.
const DEADLINE: Duration = Duration::from_secs(60);

/// A message of one member to another.
struct Message {
    call: &'static str,
    of: What,
    bytes: Vec<u8>,
}

/// One of several members, which run on threads of their own. When a member is dropped, by a return or a panic, the calls of
/// the others that need it return an error. A call also returns an error if another member makes a different one.
#[derive(Debug)]
pub struct Member {
    rank: usize,
    deadline: Duration,
    to: Vec<Sender<Message>>,
    /// Locked for a whole call, so that calls of several threads do not mix.
    from: Mutex<Vec<Receiver<Message>>>,
    /// The first member that was dropped: the others fail one after the other, but for its reason.
    left: Arc<OnceLock<usize>>,
}

impl Drop for Member {
    fn drop(&mut self) {
        // Set before the channels close, so that whoever sees them closed finds it.
        let _ = self.left.set(self.rank);
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} of {} bytes", self.of, self.call, self.bytes.len())
    }
}

/// Connects `size` members, whose calls wait at most `deadline` for each other.
pub fn members(size: usize, deadline: Duration) -> Vec<Member> {
    let mut to: Vec<Vec<Sender<Message>>> = (0..size).map(|_| Vec::new()).collect();
    let receivers = (0..size).map(|_| {
        let receive_from = |sender: usize, to: &mut Vec<Vec<Sender<Message>>>| {
            let (send, receive) = channel();
            to[sender].push(send);
            receive
        };
        (0..size).map(|sender| receive_from(sender, &mut to)).collect()
    });
    let receivers: Vec<Vec<Receiver<Message>>> = receivers.collect();
    let members = to.into_iter().zip(receivers).enumerate();
    let left = Arc::new(OnceLock::new());
    let member =
        |(rank, (to, from))| Member { rank, deadline, to, from: Mutex::new(from), left: left.clone() };
    members.map(member).collect()
}

/// Runs `work` on `size` threads, each with a member, and returns the results in order of ranks.
///
/// # Panics
/// A thread panics. The panic of the lowest rank continues here, once all threads have ended.
pub fn on_threads<R: Send>(size: usize, work: impl Fn(&dyn Communicator) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = &work;
        let start = |member: Member| scope.spawn(move || work(&member));
        let threads: Vec<_> = members(size, DEADLINE).into_iter().map(start).collect();
        let ended: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ended.into_iter().map(|result| result.unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

impl Member {
    fn gone(&self, call: &'static str, of: What, other: usize) -> CommError {
        let other = self.left.get().copied().unwrap_or(other);
        CommError::Gone { rank: self.rank, of, call, other }
    }

    /// Sends `bytes` to rank `other`.
    fn send(&self, call: &'static str, of: What, other: usize, bytes: &[u8]) -> Result<()> {
        let message = Message { call, of, bytes: bytes.to_vec() };
        self.to[other].send(message).map_err(|_| self.gone(call, of, other))
    }

    /// Receives `into` from rank `other`.
    fn receive(
        &self,
        from: &[Receiver<Message>],
        (call, of): (&'static str, What),
        other: usize,
        into: &mut [u8],
    ) -> Result<()> {
        let rank = self.rank;
        let message = from[other].recv_timeout(self.deadline).map_err(|error| match error {
            RecvTimeoutError::Timeout => CommError::Late { rank, of, call, after: self.deadline },
            RecvTimeoutError::Disconnected => self.gone(call, of, other),
        })?;
        if (message.call, message.of, message.bytes.len()) != (call, of, into.len()) {
            let theirs = format!("{message:?}");
            return Err(CommError::Differs { rank, of, call, bytes: into.len(), other, theirs });
        }
        into.copy_from_slice(&message.bytes);
        Ok(())
    }

    /// Sends `pieces`, one to each rank, and sets `recv`, cut by `received`.
    fn exchange<'a>(
        &self,
        (call, of): (&'static str, What),
        pieces: impl Iterator<Item = &'a [u8]>,
        mut recv: &mut [u8],
        received: &[usize],
    ) -> Result<()> {
        let from = self.from.lock().unwrap_or_else(PoisonError::into_inner);
        for (other, piece) in pieces.enumerate() {
            self.send(call, of, other, piece)?;
        }
        for (other, &len) in received.iter().enumerate() {
            let (piece, rest) = recv.split_at_mut(len);
            self.receive(&from, (call, of), other, piece)?;
            recv = rest;
        }
        Ok(())
    }
}

impl Communicator for Member {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn place(&self) -> Place {
        Place { machine: 0, machines: 1, local: self.rank, locals: self.size() }
    }

    fn all_to_all(
        &self,
        of: What,
        send: &[u8],
        sent: &[usize],
        recv: &mut [u8],
        received: &[usize],
    ) -> Result<()> {
        check_all_to_all(self.size(), send, sent, recv, received);
        let mut rest = send;
        let pieces = sent.iter().map(|&len| rest.split_off(..len).expect("checked above"));
        self.exchange(("all-to-all", of), pieces, recv, received)
    }

    fn all_gather(&self, of: What, send: &[u8], recv: &mut [u8], lens: &[usize]) -> Result<()> {
        check_all_gather(self.rank, self.size(), send, recv, lens);
        let pieces = std::iter::repeat_n(send, self.size());
        self.exchange(("all-gather", of), pieces, recv, lens)
    }

    fn broadcast(&self, of: What, from: usize, bytes: &mut [u8]) -> Result<()> {
        let size = self.size();
        assert!(from < size, "broadcast: there is no rank {from} of {size}");
        let others = self.from.lock().unwrap_or_else(PoisonError::into_inner);
        if from != self.rank {
            return self.receive(&others, ("broadcast", of), from, bytes);
        }
        (0..size)
            .filter(|&other| other != from)
            .try_for_each(|other| self.send("broadcast", of, other, bytes))
    }

    fn barrier(&self, of: What) -> Result<()> {
        let pieces = std::iter::repeat_n(&[][..], self.size());
        self.exchange(("barrier", of), pieces, &mut [], &vec![0; self.size()])
    }

    /// Ends the calling thread by a panic. The calls of the others return errors once the member is dropped.
    fn abort(&self, status: i32) -> ! {
        panic!("rank {}: aborted with status {status}", self.rank)
    }
}

#[cfg(test)]
mod tests {
    use super::{DEADLINE, members, on_threads};
    use crate::comm::cases::moves_the_right_bytes;
    use crate::comm::{CommError, Communicator, What};
    use std::time::Duration;

    const OF: What = What::of("bytes");

    #[test]
    fn every_call_moves_the_right_bytes() {
        for size in [1, 2, 3, 4] {
            on_threads(size, |comm| {
                let place = comm.place();
                assert_eq!((comm.size(), place.local, place.locals), (size, comm.rank(), size));
                moves_the_right_bytes(comm, 1);
            });
        }
    }

    #[test]
    fn a_member_that_leaves_makes_the_others_fail() {
        let results = on_threads(3, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier(OF) });
        let message = results[2].as_ref().unwrap_err().to_string();
        assert_eq!(message, "rank 2: bytes: barrier cannot finish, rank 1 has left; see its message");
        assert!(matches!(results[0], Err(CommError::Gone { other: 1, .. })), "{results:?}");
    }

    #[test]
    fn a_member_that_panics_makes_the_others_fail() {
        let panicked = std::panic::catch_unwind(|| {
            on_threads(2, |comm| {
                if comm.rank() == 1 {
                    comm.abort(3);
                }
                assert!(matches!(comm.barrier(OF), Err(CommError::Gone { other: 1, .. })));
            })
        });
        let text = panicked.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(*text, "rank 1: aborted with status 3");
    }

    #[test]
    fn a_member_that_hangs_makes_the_others_late() {
        let mut all = members(2, Duration::from_millis(20));
        let _hangs = all.pop();
        let error = all[0].barrier(What::at(4, "gradients")).unwrap_err().to_string();
        assert!(error.starts_with("rank 0: step 4, gradients: barrier did not finish in 0.0 s;"), "{error}");
    }

    #[test]
    fn different_calls_are_noticed() {
        let mut all = members(2, DEADLINE);
        let other = all.pop().unwrap();
        // The thread gives the member back, so that it has not left before the other one looks.
        let theirs = std::thread::spawn(move || (other.broadcast(OF, 1, &mut [0; 3]), other));
        let error = all[0].barrier(OF).unwrap_err().to_string();
        theirs.join().unwrap().0.unwrap();
        assert_eq!(
            error,
            "rank 0: bytes: barrier of 0 bytes, while rank 1 makes another call (bytes: broadcast of 3 bytes); report it"
        );
    }
}
