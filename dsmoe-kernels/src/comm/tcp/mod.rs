//! Processes that are connected by TCP: those that `torchrun` started, whose variables say where to meet.
//!
//! Every process has a connection to every other one. A call sends and receives on all of them at the same time, against a
//! deadline, and checks that the others make the same call.

mod meet;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::meet::{Start, hash};
use super::communicator::{Communicator, Place, check_all_gather, check_all_to_all};
use super::error::{CommError, Result};
use super::settings::Settings;
use super::what::What;

/// How long a call asks again and again before its thread sleeps between questions.
const AWAKE: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(50);
/// Bytes before the data of a message: the call, and the length.
const HEAD: usize = 16;

/// The processes of a job, one connection to each.
#[derive(Debug)]
pub(super) struct Tcp {
    rank: usize,
    size: usize,
    place: Place,
    settings: Settings,
    /// Locked for a whole call; none for this process itself.
    peers: Mutex<Vec<Option<TcpStream>>>,
    /// The same connections, for [`Communicator::abort`] from any thread.
    all: Vec<TcpStream>,
}

/// One direction of a connection in a call.
struct Way<'a> {
    head: [u8; HEAD],
    /// Bytes of head and data that are done.
    done: usize,
    data: Data<'a>,
}

enum Data<'a> {
    Out(&'a [u8]),
    In(&'a mut [u8]),
}

/// The end of a step of a connection.
enum Moved {
    All,
    Some,
    Nothing,
    Left,
    Differs,
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Data::Out(bytes) => bytes.len(),
            Data::In(bytes) => bytes.len(),
        }
    }
}

impl Way<'_> {
    fn new(call: u64, data: Data<'_>) -> Way<'_> {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&call.to_le_bytes());
        head[8..].copy_from_slice(&(data.len() as u64).to_le_bytes());
        Way { head, done: 0, data }
    }

    /// Moves as many bytes as the connection takes or has.
    fn go_on(&mut self, mut stream: &TcpStream) -> Moved {
        let mut moved = Moved::Nothing;
        loop {
            let at = self.done;
            if at == HEAD + self.data.len() {
                return Moved::All;
            }
            let result = match &mut self.data {
                Data::Out(_) if at < HEAD => stream.write(&self.head[at..]),
                Data::Out(bytes) => stream.write(&bytes[at - HEAD..]),
                Data::In(_) if at < HEAD => {
                    let mut got = [0; HEAD];
                    let read = stream.read(&mut got[..HEAD - at]);
                    let differs = |&len: &usize| got[..len] != self.head[at..at + len];
                    if read.as_ref().is_ok_and(differs) {
                        return Moved::Differs;
                    }
                    read
                }
                Data::In(bytes) => stream.read(&mut bytes[at - HEAD..]),
            };
            match result {
                Ok(0) => return Moved::Left,
                Ok(len) => {
                    self.done += len;
                    moved = Moved::Some;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return moved,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Moved::Left,
            }
        }
    }
}

impl Tcp {
    /// Meets the other processes where the variables of the launcher say.
    pub(super) fn start(settings: Settings) -> Result<Tcp> {
        let start = Start::read(|name| std::env::var(name).ok()).map_err(CommError::Start)?;
        Tcp::connect(&start, settings)
    }

    fn connect(start: &Start, settings: Settings) -> Result<Tcp> {
        let deadline = Instant::now() + settings.deadline_of(What::of("the connection of processes"));
        let (peers, place) = start.meet(deadline).map_err(CommError::Start)?;
        let broken = |error: std::io::Error| CommError::Start(format!("a connection fails: {error}"));
        let mut all = Vec::new();
        for peer in peers.iter().flatten() {
            peer.set_nodelay(true).map_err(broken)?;
            peer.set_nonblocking(true).map_err(broken)?;
            all.push(peer.try_clone().map_err(broken)?);
        }
        let Start { rank, size, .. } = *start;
        let tcp = Tcp { rank, size, place, settings, peers: Mutex::new(peers), all };
        tcp.barrier(What::of("the connection of processes"))?;
        Ok(tcp)
    }

    /// Sends and receives what `ways` has for each connection, until all is done.
    fn run(&self, call: &'static str, of: What, mut ways: Vec<(usize, Way<'_>)>) -> Result<()> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let (rank, began, deadline) = (self.rank, Instant::now(), self.settings.deadline_of(of));
        let mut last = began;
        while !ways.is_empty() {
            let (mut some, mut failed) = (false, None);
            ways.retain_mut(|(other, way)| {
                let Some(stream) = &peers[*other] else { return false };
                let moved = way.go_on(stream);
                some |= !matches!(moved, Moved::Nothing);
                match moved {
                    Moved::All => return false,
                    Moved::Some | Moved::Nothing => {}
                    Moved::Left => failed = Some(CommError::Gone { rank, of, call, other: *other }),
                    Moved::Differs => {
                        let (other, theirs) = (*other, "of another kind or length".to_owned());
                        let bytes = way.data.len();
                        failed = Some(CommError::Differs { rank, of, call, bytes, other, theirs });
                    }
                }
                true
            });
            if let Some(error) = failed {
                return Err(error);
            }
            let now = Instant::now();
            if some {
                last = now;
            } else if now - began > deadline {
                return Err(CommError::Late { rank, of, call, after: now - began });
            } else if now - last > AWAKE {
                std::thread::sleep(NAP);
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Sends `pieces`, one to each rank, and sets `recv`, cut by `received`.
    fn exchange(
        &self,
        call: &'static str,
        of: What,
        pieces: &[&[u8]],
        mut recv: &mut [u8],
        received: &[usize],
    ) -> Result<()> {
        let name = call_of(call, of);
        let mut ways = Vec::with_capacity(2 * self.size);
        for (other, (piece, &len)) in pieces.iter().zip(received).enumerate() {
            let (into, rest) = std::mem::take(&mut recv).split_at_mut(len);
            recv = rest;
            if other == self.rank {
                into.copy_from_slice(piece);
                continue;
            }
            ways.push((other, Way::new(name, Data::Out(piece))));
            ways.push((other, Way::new(name, Data::In(into))));
        }
        self.run(call, of, ways)
    }
}

/// A number that tells calls apart.
fn call_of(call: &str, of: What) -> u64 {
    hash(format!("{call} {of}").as_bytes())
}

impl Communicator for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn place(&self) -> Place {
        self.place
    }

    fn all_to_all(
        &self,
        of: What,
        send: &[u8],
        sent: &[usize],
        recv: &mut [u8],
        received: &[usize],
    ) -> Result<()> {
        check_all_to_all(self.size, send, sent, recv, received);
        let mut rest = send;
        let pieces: Vec<&[u8]> =
            sent.iter().map(|&len| rest.split_off(..len).expect("checked above")).collect();
        self.exchange("all-to-all", of, &pieces, recv, received)
    }

    fn all_gather(&self, of: What, send: &[u8], recv: &mut [u8], lens: &[usize]) -> Result<()> {
        check_all_gather(self.rank, self.size, send, recv, lens);
        self.exchange("all-gather", of, &vec![send; self.size], recv, lens)
    }

    fn broadcast(&self, of: What, from: usize, bytes: &mut [u8]) -> Result<()> {
        assert!(from < self.size, "broadcast: there is no rank {from} of {}", self.size);
        let name = call_of("broadcast", of);
        let ways = if from == self.rank {
            let others = (0..self.size).filter(|&other| other != from);
            others.map(|other| (other, Way::new(name, Data::Out(bytes)))).collect()
        } else {
            vec![(from, Way::new(name, Data::In(bytes)))]
        };
        self.run("broadcast", of, ways)
    }

    fn barrier(&self, of: What) -> Result<()> {
        self.exchange("barrier", of, &vec![&[][..]; self.size], &mut [], &vec![0; self.size])
    }

    /// Closes all connections, which ends the others' calls with an error, and this process.
    fn abort(&self, status: i32) -> ! {
        for stream in &self.all {
            // One that is closed already needs no closing.
            let _ = stream.shutdown(Shutdown::Both);
        }
        std::process::exit(status)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::comm::cases::moves_the_right_bytes;

    const OF: What = What::of("bytes");

    fn settings(millis: u64) -> Settings {
        Settings { deadline: Duration::from_millis(millis), last_words: |_| {} }
    }

    fn start(rank: usize, size: usize, port: u16) -> Start {
        let job = hash(b"a job");
        Start { rank, size, address: "127.0.0.1".to_owned(), port, job }
    }

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn on_sockets<R: Send>(size: usize, work: impl Fn(Tcp) -> R + Sync) -> Vec<R> {
        let port = free_port();
        std::thread::scope(|scope| {
            let work = &work;
            let one = |rank| {
                scope.spawn(move || work(Tcp::connect(&start(rank, size, port), settings(20_000)).unwrap()))
            };
            let threads: Vec<_> = (0..size).map(one).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_call_moves_the_right_bytes() {
        for size in [2, 3, 4] {
            on_sockets(size, |comm| {
                let Place { machine, machines, local, locals } = comm.place();
                assert_eq!((machine, machines, local, locals), (0, 1, comm.rank(), size));
                // Some pieces are longer than a socket takes at once.
                moves_the_right_bytes(&comm, 700_001);
            });
        }
    }

    #[test]
    fn failures_of_others_are_errors() {
        let left = on_sockets(3, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier(OF) });
        for rank in [0, 2] {
            assert!(matches!(left[rank], Err(CommError::Gone { .. })), "{left:?}");
        }
        let differ = on_sockets(2, |comm| match comm.rank() {
            0 => comm.barrier(OF),
            _ => comm.broadcast(OF, 1, &mut [1; 3]),
        });
        assert!(matches!(differ[0], Err(CommError::Differs { rank: 0, other: 1, .. })), "{differ:?}");
        let port = free_port();
        let (done, told) = std::sync::mpsc::channel::<()>();
        let late = std::thread::scope(|scope| {
            scope.spawn(move || {
                let comm = Tcp::connect(&start(1, 2, port), settings(20_000)).unwrap();
                // Hangs until the other has given up.
                told.recv().unwrap_err();
                drop(comm);
            });
            let comm = Tcp::connect(&start(0, 2, port), settings(200)).unwrap();
            let late = comm.barrier(What::at(4, "gradients")).unwrap_err().to_string();
            drop(done);
            late
        });
        assert!(late.starts_with("rank 0: step 4, gradients: barrier did not finish in 0.2 s"), "{late}");
    }

    #[test]
    fn who_does_not_come_is_named() {
        let port = free_port();
        let error = |rank| Tcp::connect(&start(rank, 3, port), settings(100)).unwrap_err().to_string();
        let [first, second] = std::thread::scope(|scope| {
            let threads = [0, 1].map(|rank| scope.spawn(move || error(rank)));
            threads.map(|thread| thread.join().unwrap())
        });
        assert!(first.contains("rank 2 did not come") && first.contains(&port.to_string()), "{first}");
        assert!(second.contains("rank 0"), "{second}");
        let nobody = Tcp::connect(&start(1, 2, free_port()), settings(50)).unwrap_err().to_string();
        assert!(nobody.contains("cannot be reached") && nobody.contains("MASTER_ADDR"), "{nobody}");
    }

    #[test]
    fn strangers_do_not_count() {
        let port = free_port();
        std::thread::scope(|scope| {
            let first =
                scope.spawn(move || Tcp::connect(&start(0, 2, port), settings(20_000)).unwrap().size());
            let stranger = loop {
                if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                    stream.write_all(b"GET / HTTP/1.1\r\nHost: another program's request\r\n\r\n").unwrap();
                    break stream;
                }
            };
            // A process of another job.
            let other = Start { job: 1, ..start(1, 2, port) };
            let refused = Tcp::connect(&other, settings(500)).unwrap_err().to_string();
            assert!(refused.contains("rank 0"), "{refused}");
            let second = Tcp::connect(&start(1, 2, port), settings(20_000)).unwrap();
            assert_eq!((first.join().unwrap(), second.size()), (2, 2));
            drop(stranger);
        });
    }
}
