//! NCCL: bytes that move between the GPUs of several processes. It is looked for when a program starts it.
//!
//! As for hosts, the engine adds nothing: sums over GPUs are those of [`ops::tree`](super::ops::tree). Calls are queued in the
//! GPU's stream; [`Nccl::wait`] asks against a deadline whether they have run.

mod api;

use std::ffi::c_int;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use self::api::{Api, Comm, Place, Progress, Queue, UniqueId};
use super::buf::{Element, Matrix};
use super::device::Gpu;
use crate::comm::{CommError, Communicator, Result, Settings, What, gather};

/// How long a thread sleeps between questions.
const NAP: Duration = Duration::from_micros(50);

/// NCCL's library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NcclLibrary {
    /// Its file.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Looks for the library, without using a device.
///
/// # Errors
/// None is found that can be used. The message has help.
pub fn find_nccl() -> Result<NcclLibrary> {
    let (api, name) = Api::open().map_err(CommError::Start)?;
    Ok(NcclLibrary { name, version: api.version() })
}

/// The GPUs of several processes, one of each.
///
/// Calls are collective: all processes make the same ones in the same order. They return when they are queued.
pub struct Nccl {
    api: Api,
    comm: Comm,
    gpu: Gpu,
    rank: usize,
    size: usize,
    settings: Settings,
    /// Set by the first error: the group cannot end in order then.
    failed: AtomicBool,
}

/// A call, for messages.
#[derive(Clone, Copy)]
struct Call {
    of: What,
    name: &'static str,
}

/// One call at a time: `&mut self` of all that queues.
impl Nccl {
    /// Connects this process's `gpu` with those of the other processes of `hosts`.
    ///
    /// # Errors
    /// The library is not found, the GPUs cannot reach each other, or another process does not take part.
    pub fn connect(gpu: &Gpu, hosts: &dyn Communicator, settings: Settings) -> Result<Nccl> {
        let (of, rank, size) = (What::of("connection of GPUs"), hosts.rank(), hosts.size());
        // A process without the library says so before the others wait for it.
        let opened =
            Api::open().map_err(|problem| format!("{problem} (all GPUs of a run are connected by NCCL)"));
        let (api, _) = crate::comm::agree(hosts, of, opened)?;
        let call = Call { of, name: "start" };
        let engine = |code| CommError::Engine { rank, of, call: call.name, problem: api.problem(code) };
        let made = if rank == 0 {
            api.unique_id().map_err(|code| engine(code).to_string())
        } else {
            Ok(UniqueId([0; 128]))
        };
        let id = crate::comm::agree(hosts, of, made)?;
        let names = gather(hosts, of, if rank == 0 { &id.0 } else { &[] })?;
        let id = UniqueId(
            names[0][..].try_into().map_err(|_| CommError::Start("rank 0 sent no name".to_owned()))?,
        );
        gpu.stream().bind().map_err(|error| CommError::Start(error.to_string()))?;
        let (comm, started) = api.init(id, rank as c_int, size as c_int).map_err(engine)?;
        let nccl = Nccl { comm, gpu: gpu.clone(), rank, size, settings, failed: AtomicBool::new(false), api };
        nccl.go_on(call, started)?;
        Ok(nccl)
    }

    /// Returns the number of this process.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of processes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Queues the sending of the pieces of `send`, cut by the lengths `sent`, piece r to rank r. Sets the pieces of `recv`, cut
    /// by `received`, piece r to what rank r sends here.
    ///
    /// # Errors
    /// The device or NCCL fails.
    ///
    /// # Panics
    /// The lengths do not fit, or there is not one for each rank.
    pub fn all_to_all<T: Element>(
        &mut self,
        of: What,
        send: &Matrix<T>,
        sent: &[usize],
        recv: &mut Matrix<T>,
        received: &[usize],
    ) -> Result<()> {
        assert_eq!(
            [sent.len(), received.len()],
            [self.size; 2],
            "cuda all_to_all: lengths for {} ranks",
            self.size
        );
        let (from, to) = (pieces(send, sent), pieces(recv, received));
        let call = Call { of, name: "all-to-all" };
        let queue = self.queue(call)?;
        let queued = self.api.group(|| {
            from.iter().zip(&to).enumerate().try_for_each(|(rank, (from, to))| {
                // SAFETY: the pieces lie in matrices of this GPU, and memory is freed in the order of its stream.
                unsafe { self.api.send(queue, *from, rank as c_int) }?;
                // SAFETY: as above, and `recv` is borrowed to be written.
                unsafe { self.api.recv(queue, *to, rank as c_int) }
            })
        });
        self.queued(call, queued)
    }

    /// Queues the setting of `recv`, cut by the lengths `lens`, to the `send` of all ranks in order.
    ///
    /// # Errors
    /// The device or NCCL fails.
    ///
    /// # Panics
    /// The lengths do not fit, or there is not one for each rank.
    pub fn all_gather<T: Element>(
        &mut self,
        of: What,
        send: &Matrix<T>,
        recv: &mut Matrix<T>,
        lens: &[usize],
    ) -> Result<()> {
        assert_eq!(lens.len(), self.size, "cuda all_gather: lengths for {} ranks", self.size);
        let (from, to) = (pieces(send, &lens[self.rank..=self.rank])[0], pieces(recv, lens));
        let call = Call { of, name: "all-gather" };
        let queue = self.queue(call)?;
        let queued = if lens.iter().all(|&len| len == lens[0]) {
            // SAFETY: the pieces lie in matrices of this GPU, `recv` has one of that length for each rank and is borrowed to be
            // written, and memory is freed in the order of the stream.
            unsafe { self.api.all_gather(queue, from, to[0]) }
        } else {
            self.api.group(|| {
                to.iter().enumerate().try_for_each(|(root, to)| {
                    // SAFETY: as above; `from` is read at rank `root` alone, where it has the length of `to`.
                    unsafe { self.api.broadcast(queue, from, *to, root as c_int) }
                })
            })
        };
        self.queued(call, queued)
    }

    /// Waits until everything queued on the GPU has run.
    ///
    /// # Errors
    /// The device or NCCL fails, or another process does not take part before the deadline.
    pub fn wait(&mut self, of: What) -> Result<()> {
        let call = Call { of, name: "wait" };
        self.until(call, || {
            self.api.progress(self.comm).map_err(|code| self.engine(call, code))?;
            self.gpu.stream().is_idle().map_err(|error| self.problem(call, error.to_string()))
        })
    }

    fn queue(&self, call: Call) -> Result<Queue> {
        let stream = self.gpu.stream().bind().map_err(|error| self.problem(call, error.to_string()))?;
        Ok(Queue { comm: self.comm, stream })
    }

    /// Waits until a call is queued.
    fn queued(&self, call: Call, queued: std::result::Result<Progress, c_int>) -> Result<()> {
        let progress = queued.map_err(|code| self.engine(call, code))?;
        self.go_on(call, progress)
    }

    /// Waits until a call that goes on has been queued.
    fn go_on(&self, call: Call, progress: Progress) -> Result<()> {
        if progress == Progress::Done {
            return Ok(());
        }
        self.until(call, || {
            let progress = self.api.progress(self.comm).map_err(|code| self.engine(call, code))?;
            Ok(progress == Progress::Done)
        })
    }

    /// Asks `done` until it says so, against the deadline.
    fn until(&self, call: Call, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let deadline = self.settings.deadline_of(call.of);
        let began = Instant::now();
        while !done()? {
            let after = began.elapsed();
            if after > deadline {
                self.failed.store(true, Ordering::SeqCst);
                return Err(CommError::Late { rank: self.rank, of: call.of, call: call.name, after });
            }
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    fn engine(&self, call: Call, code: c_int) -> CommError {
        self.problem(call, self.api.problem(code))
    }

    fn problem(&self, Call { of, name }: Call, problem: String) -> CommError {
        self.failed.store(true, Ordering::SeqCst);
        CommError::Engine { rank: self.rank, of, call: name, problem }
    }
}

/// The pieces of a matrix, cut by lengths that must add up to its own.
fn pieces<T: Element>(matrix: &Matrix<T>, lens: &[usize]) -> Vec<Place> {
    let mut end = 0usize;
    let pieces = lens.iter().map(|&len| {
        let start = end;
        end = end.checked_add(len).expect("lengths of pieces");
        Place { ptr: matrix.ptr() + (start * size_of::<T>()) as u64, bytes: len * size_of::<T>() }
    });
    let pieces = pieces.collect();
    assert_eq!(end, matrix.len(), "cuda: pieces of a matrix");
    pieces
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // After an error the program ends, which ends the group: `ncclCommAbort` may wait for the others.
        if *self.failed.get_mut() || std::thread::panicking() {
            return;
        }
        let call = Call { of: What::of("connection of GPUs"), name: "end" };
        let ended = self.api.finalize(self.comm).map_err(|code| self.engine(call, code));
        if ended.and_then(|progress| self.go_on(call, progress)).is_ok() {
            // SAFETY: this is the last use.
            unsafe { self.api.destroy(self.comm) };
        }
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} by {:?} on {:?}", self.rank, self.size, self.api, self.gpu)
    }
}

#[cfg(test)]
mod tests {
    use super::{Nccl, find_nccl};
    use crate::comm::threads::on_threads;
    use crate::comm::tree::sum_parts;
    use crate::comm::{Communicator, Settings, What};
    use crate::cuda::ops::tree::SumParts;
    use crate::cuda::{Detection, Gpu, detect};
    use crate::testing::{has_gpu, normals, skipped};

    const SETTINGS: Settings = Settings { deadline: Settings::DEADLINE, last_words: |_| {} };

    /// The values that rank `from` sends to rank `to`: of unequal lengths, some none.
    fn piece(from: usize, to: usize) -> Vec<f32> {
        normals(((from + 2 * to) % 3) * 1001, (10 * from + to) as u64)
    }

    fn lens(pieces: &[Vec<f32>]) -> Vec<usize> {
        pieces.iter().map(Vec::len).collect()
    }

    fn moves_the_right_values(hosts: &dyn Communicator) {
        let (gpu, all, me) = (Gpu::open(hosts.rank()).unwrap(), 0..hosts.size(), hosts.rank());
        let mut nccl = Nccl::connect(&gpu, hosts, SETTINGS).unwrap();
        assert_eq!((nccl.rank(), nccl.size()), (me, all.len()));
        let of = What::at(1, "values");
        let sent: Vec<Vec<f32>> = all.clone().map(|to| piece(me, to)).collect();
        let want: Vec<Vec<f32>> = all.clone().map(|from| piece(from, me)).collect();
        let mut recv = gpu.zeros::<f32>(want.concat().len()).unwrap();
        let send = gpu.upload(&sent.concat()).unwrap();
        nccl.all_to_all(of, &send, &lens(&sent), &mut recv, &lens(&want)).unwrap();
        nccl.wait(of).unwrap();
        assert_eq!(recv.download().unwrap(), want.concat());
        for equal in [false, true] {
            let term = |from: usize| if equal { normals(777, from as u64) } else { piece(from, 1) };
            let want: Vec<Vec<f32>> = all.clone().map(term).collect();
            let mut recv = gpu.zeros::<f32>(want.concat().len()).unwrap();
            let send = gpu.upload(&want[me]).unwrap();
            nccl.all_gather(of, &send, &mut recv, &lens(&want)).unwrap();
            assert_eq!(recv.download().unwrap(), want.concat(), "equal lengths: {equal}");
            if equal {
                let (mut sum, mut parts) = (gpu.zeros::<f32>(777).unwrap(), want.concat());
                let parts_of_gpu = &mut recv.shaped_mut(all.len(), 777);
                SumParts { out: &mut sum, parts: parts_of_gpu }.run().unwrap();
                sum_parts(&mut parts, 777);
                assert_eq!(sum.download().unwrap(), parts[..777]);
            }
        }
    }

    #[test]
    fn cuda_nccl_moves_the_right_values_between_all_gpus() {
        let name = "cuda_nccl_moves_the_right_values_between_all_gpus";
        if !has_gpu(name) {
            return;
        }
        if let Err(problem) = find_nccl() {
            skipped(name, &problem.to_string());
            return;
        }
        let Detection::Devices(devices) = detect() else { return };
        on_threads(devices.len().min(4), moves_the_right_values);
    }
}
