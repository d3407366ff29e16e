//! MPI, looked for when a program starts it: a build needs neither its compiler nor its headers.
//!
//! Every call is one that returns at once and is then asked, against a deadline, whether it has finished. One thread at a
//! time is in the library. The library must be the one of the launcher: the number of processes and a self-test show that.

mod abi;
mod api;
mod library;
mod watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use self::api::{Api, Code, Comm, MOST, Pieces, Request};
use self::watch::{leave, watched};
use super::communicator::{Communicator, Place, check_all_gather, check_all_to_all};
use super::error::{CommError, Result};
use super::launch::Launch;
use super::settings::Settings;
use super::start::MpiLibrary;
use super::what::What;

/// How long a call is asked again and again before the thread sleeps between questions: `AWAKE`, and the time that its
/// bytes take at `SLOW` bytes a second, as a library may move them only while it is asked.
const AWAKE: Duration = Duration::from_millis(2);
const SLOW: f64 = 5e8;
const NAP: Duration = Duration::from_micros(50);

/// How long [`Communicator::abort`] waits for a call of another thread.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a launcher gets to pass on messages. Once it ends all processes, it may drop what it has not read.
const HEARD: Duration = Duration::from_millis(200);

/// Finds the library that [`Mpi::start`] would use.
pub(super) fn find() -> Result<MpiLibrary> {
    let (api, name) = library::open(Launch::this())?;
    Ok(MpiLibrary { name, interface: api.abi().name(), version: api.version() })
}

/// The processes that a launcher of MPI started.
#[derive(Debug)]
pub(super) struct Mpi {
    api: Api,
    settings: Settings,
    rank: usize,
    size: usize,
    place: Place,
    /// Held for a whole collective call.
    turn: Mutex<()>,
    /// Held while a thread is in the library.
    inside: Mutex<()>,
    /// Set by the first error: MPI cannot end in order then.
    failed: AtomicBool,
}

/// A collective call: its data, its name, and the bytes that it moves here.
#[derive(Clone, Copy)]
struct Call {
    of: What,
    name: &'static str,
    bytes: usize,
}

impl Mpi {
    /// Starts MPI.
    pub(super) fn start(settings: Settings) -> Result<Mpi> {
        static STARTED: AtomicBool = AtomicBool::new(false);
        if STARTED.swap(true, Ordering::SeqCst) {
            return Err(CommError::Start("MPI starts once in a process, and it has been started".to_owned()));
        }
        let launch = Launch::this();
        let (api, name) = library::open(launch)?;
        let late = "MPI did not start; not all processes were started, or they cannot reach each other";
        watched(late, settings, || Mpi::connect(api, &name, launch, settings))
    }

    fn connect(api: Api, name: &str, launch: Option<Launch>, settings: Settings) -> Result<Mpi> {
        let failed = |problem: String| CommError::Start(format!("{name} does not start: {problem}"));
        api.init().map_err(failed)?;
        let (rank, size) = api.rank_and_size(api.world()).map_err(|code| failed(api.problem(code)))?;
        if let Some(started) = launch.and_then(|launch| launch.size).filter(|&started| started != size) {
            return Err(CommError::Start(format!(
                "the launcher started {started} processes, but {name} sees {size}: it is another MPI's library; set {} to \
                 the launcher's",
                library::VARIABLE
            )));
        }
        let place = Place { machine: 0, machines: 1, local: rank, locals: size };
        let (turn, inside, failed) = (Mutex::new(()), Mutex::new(()), AtomicBool::new(false));
        let mut mpi = Mpi { api, settings, rank, size, place, turn, inside, failed };
        mpi.test().map_err(|problem| CommError::Start(format!("{name} fails its self-test: {problem}")))?;
        mpi.place = mpi.find_place()?;
        Ok(mpi)
    }

    /// Moves known bytes by every call.
    fn test(&self) -> std::result::Result<(), String> {
        let of = What::of("known bytes");
        let piece = |from: usize, to: usize| vec![(37 * from + 11 * to + 5) as u8; 1 + (from + 3 * to) % 4];
        let pieces = |pair: &dyn Fn(usize) -> Vec<u8>| -> (Vec<u8>, Vec<usize>) {
            let pieces: Vec<Vec<u8>> = (0..self.size).map(pair).collect();
            (pieces.concat(), pieces.iter().map(Vec::len).collect())
        };
        let check = |call: &str, got: &[u8], want: &[u8]| {
            if got == want { Ok(()) } else { Err(format!("the bytes of {call} arrive changed")) }
        };
        let text = |error: CommError| error.to_string();
        let (want, lens) = pieces(&|from| piece(from, 0));
        let mut got = vec![0; want.len()];
        self.all_gather(of, &piece(self.rank, 0), &mut got, &lens).map_err(text)?;
        check("all-gather", &got, &want)?;
        let (send, sent) = pieces(&|to| piece(self.rank, to));
        let (want, received) = pieces(&|from| piece(from, self.rank));
        let mut got = vec![0; want.len()];
        self.all_to_all(of, &send, &sent, &mut got, &received).map_err(text)?;
        check("all-to-all", &got, &want)?;
        let last = self.size - 1;
        let mut got = piece(self.rank, 7);
        got.resize(4, 0);
        let mut want = piece(last, 7);
        want.resize(4, 0);
        self.broadcast(of, last, &mut got).map_err(text)?;
        check("broadcast", &got, &want)?;
        self.barrier(of).map_err(text)
    }

    /// Finds machine and local number. The number of a machine is the place of its first process among those of others.
    fn find_place(&self) -> Result<Place> {
        let of = What::of("places");
        let of_code = |code| self.failed(self.call(of, "split by machines", 0), code);
        let machine = self.api.machine().map_err(of_code)?;
        let (local, locals) = self.api.rank_and_size(machine).map_err(of_code)?;
        let mut first = (self.rank as u64).to_le_bytes();
        self.broadcast_in(machine, of, 0, &mut first)?;
        let mut firsts = vec![0; 8 * self.size];
        self.all_gather(of, &first, &mut firsts, &vec![8; self.size])?;
        let mut firsts: Vec<u64> =
            firsts.as_chunks::<8>().0.iter().map(|first| u64::from_le_bytes(*first)).collect();
        firsts.sort_unstable();
        firsts.dedup();
        let machine = firsts.iter().position(|other| *other == u64::from_le_bytes(first)).unwrap_or_default();
        Ok(Place { machine, machines: firsts.len(), local, locals })
    }

    fn call(&self, of: What, name: &'static str, bytes: usize) -> Call {
        Call { of, name, bytes }
    }

    /// The error of a call, after which MPI does not end in order.
    fn failed(&self, Call { of, name, .. }: Call, code: Code) -> CommError {
        self.failed.store(true, Ordering::SeqCst);
        CommError::Engine { rank: self.rank, of, call: name, problem: self.api.problem(code) }
    }

    /// Enters the library.
    fn enter(&self) -> MutexGuard<'_, ()> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the library; none if another thread does not leave it.
    fn enter_soon(&self) -> Option<MutexGuard<'_, ()>> {
        let began = Instant::now();
        loop {
            match self.inside.try_lock() {
                Ok(inside) => return Some(inside),
                Err(TryLockError::Poisoned(inside)) => return Some(inside.into_inner()),
                Err(TryLockError::WouldBlock) if began.elapsed() > PATIENCE => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(NAP),
            }
        }
    }

    /// Runs the call that `begin` starts.
    fn run(&self, call: Call, begin: impl FnOnce(&Api) -> std::result::Result<Request, Code>) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let started = {
            let _inside = self.enter();
            begin(&self.api)
        };
        // A call that did not start uses no memory.
        let mut request = started.map_err(|code| self.failed(call, code))?;
        let (began, Call { of, name, bytes }) = (Instant::now(), call);
        let deadline = self.settings.deadline_of(of);
        let awake = AWAKE + Duration::from_secs_f64(bytes as f64 / SLOW);
        loop {
            let done = {
                let _inside = self.enter();
                self.api.is_done(&mut request)
            };
            let after = began.elapsed();
            match done {
                Ok(true) => return Ok(()),
                Err(code) => self.end(&self.failed(call, code)),
                Ok(false) if after > deadline => {
                    self.end(&CommError::Late { rank: self.rank, of, call: name, after });
                }
                Ok(false) if after > awake => std::thread::sleep(NAP),
                Ok(false) => std::thread::yield_now(),
            }
        }
    }

    /// Ends all processes after a call that may still use the caller's memory.
    fn end(&self, error: &CommError) -> ! {
        (self.settings.last_words)(error);
        self.abort(1)
    }

    /// Refuses bytes that a call cannot count.
    fn check(&self, Call { of, name, bytes }: Call) -> Result<()> {
        if bytes <= MOST {
            return Ok(());
        }
        self.failed.store(true, Ordering::SeqCst);
        Err(CommError::TooLong { rank: self.rank, of, call: name, bytes, most: MOST })
    }

    fn broadcast_in(&self, comm: Comm, of: What, from: usize, bytes: &mut [u8]) -> Result<()> {
        bytes.chunks_mut(MOST).try_for_each(|bytes| {
            self.run(self.call(of, "broadcast", bytes.len()), |api| {
                // SAFETY: `run` returns once the call has finished, or has not started.
                unsafe { api.broadcast(comm, from, bytes) }
            })
        })
    }
}

impl Communicator for Mpi {
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
        let call = self.call(of, "all-to-all", send.len().max(recv.len()));
        self.check(call)?;
        // Open MPI 4.1 does not finish the call of a process that neither sends nor receives: it sends a byte to itself.
        let (mut to_itself, mut own) = ([0u8], vec![0; self.size]);
        own[self.rank] = 1;
        let (send, sent, recv, received): (&[u8], _, &mut [u8], _) = match send.len() + recv.len() {
            0 => (&[0], &own[..], &mut to_itself, &own[..]),
            _ => (send, sent, recv, received),
        };
        let (sent, received) = (Pieces::new(sent), Pieces::new(received));
        self.run(call, |api| {
            // SAFETY: lengths are checked; `run` returns once the call has finished, or has not started.
            unsafe { api.all_to_all(send, &sent, recv, &received) }
        })
    }

    fn all_gather(&self, of: What, send: &[u8], recv: &mut [u8], lens: &[usize]) -> Result<()> {
        check_all_gather(self.rank, self.size, send, recv, lens);
        // Intel MPI 2021.18 does not finish an all-gather in which some, but not all, send nothing.
        if recv.len() <= MOST && !lens.contains(&0) {
            let call = self.call(of, "all-gather", recv.len());
            let lens = Pieces::new(lens);
            return self.run(call, |api| {
                // SAFETY: lengths are checked; `run` returns once the call has finished, or has not started.
                unsafe { api.all_gather(send, recv, &lens) }
            });
        }
        let mut rest = recv;
        for (from, &len) in lens.iter().enumerate() {
            let piece = rest.split_off_mut(..len).expect("checked above");
            if from == self.rank {
                piece.copy_from_slice(send);
            }
            // A piece without bytes is no call.
            self.broadcast_in(self.api.world(), of, from, piece)?;
        }
        Ok(())
    }

    fn broadcast(&self, of: What, from: usize, bytes: &mut [u8]) -> Result<()> {
        assert!(from < self.size, "broadcast: there is no rank {from} of {}", self.size);
        self.broadcast_in(self.api.world(), of, from, bytes)
    }

    fn barrier(&self, of: What) -> Result<()> {
        self.run(self.call(of, "barrier", 0), Api::barrier)
    }

    fn abort(&self, status: i32) -> ! {
        std::thread::sleep(HEARD);
        let inside = self.enter_soon();
        leave(status, || {
            // If another thread stays in the library, an exit without an orderly end makes the launcher end the others.
            if inside.is_some() {
                self.api.abort(status);
            }
        })
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // Without an orderly end the launcher ends the other processes, which is right after an error.
        if !*self.failed.get_mut() && !std::thread::panicking() {
            watched("MPI did not end; another process hangs or is gone", self.settings, || {
                self.api.finalize()
            });
        }
    }
}
