//! Short parallel loops: the pool's threads wait for them awake.
//!
//! A thread of the pool falls asleep between two loops that are microseconds apart, and waking it takes longer than such a
//! loop. Decoding a token is hundreds of them. Inside of [`with_crew`] one thread runs the closure, and the others watch a
//! counter of its loops and take their tasks. Loops of ops that are made for a few tokens are handed
//! out in this way; all others run on the calling thread alone.

use std::cell::Cell;
use std::hint::spin_loop;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// Looks at a counter before the thread offers its processor to others.
const LOOKS: usize = if cfg!(miri) { 2 } else { 2000 };
/// Most blocks of tasks; more threads than these share them.
const BLOCKS: usize = 16;

/// The tasks of a loop.
type Tasks<'a> = &'a (dyn Fn(usize) + Sync);

/// A value with cache lines of its own: processors fetch two at a time.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

/// The state that the threads share.
#[derive(Default)]
struct Crew {
    /// Neighbouring tasks, which read neighbouring memory, for each thread: the end of what is left in the upper half, the
    /// start in the lower one. The thread takes the first, and threads whose block is empty take the last.
    blocks: [Apart<AtomicU64>; BLOCKS],
    /// Blocks in use.
    threads: usize,
    /// Counts the loops.
    loops: Apart<AtomicUsize>,
    finished: Apart<AtomicUsize>,
    /// Points to a `Tasks`, whose lifetime is that of the loop.
    tasks: Apart<AtomicPtr<()>>,
    panicked: AtomicBool,
    ended: AtomicBool,
}

/// Returns the word of a block of tasks.
fn word(start: usize, end: usize) -> u64 {
    let half = |task: usize| u64::from(u32::try_from(task).expect("the tasks of a loop are few"));
    half(end) << 32 | half(start)
}

/// Returns the start and the end of the tasks of a block.
fn block(word: u64) -> (usize, usize) {
    ((word & u64::from(u32::MAX)) as usize, (word >> 32) as usize)
}

thread_local! {
    /// The crew that this thread leads, and whether it is in one of its loops.
    static LED: Cell<(*const Crew, bool)> = const { Cell::new((ptr::null(), false)) };
}

/// Runs `op` on this thread; the other threads of its pool wait for the loops of `op` as soon as they have nothing else to do.
///
/// It does nothing but call `op` on threads that belong to no pool and inside of another crew.
pub fn with_crew<R: Send>(op: impl FnOnce() -> R + Send) -> R {
    let others = rayon::current_num_threads() - 1;
    if others == 0 || rayon::current_thread_index().is_none() || !LED.get().0.is_null() {
        return op();
    }
    let crew = Crew { threads: BLOCKS.min(others + 1), ..Crew::default() };
    lead(&crew, others, op)
}

fn lead<R: Send>(crew: &Crew, others: usize, op: impl FnOnce() -> R + Send) -> R {
    if others > 0 {
        return rayon::join(|| lead(crew, others - 1, op), || crew.serve(others)).0;
    }
    let _led = Led::new(crew);
    op()
}

/// The crew that this thread leads, until it is dropped.
struct Led<'a>(&'a Crew);

impl Led<'_> {
    fn new(crew: &Crew) -> Led<'_> {
        LED.set((crew, false));
        Led(crew)
    }
}

impl Drop for Led<'_> {
    fn drop(&mut self) {
        LED.set((ptr::null(), false));
        self.0.ended.store(true, Ordering::Release);
    }
}

/// Tells whether this thread leads a crew that would run a loop.
pub(crate) fn is_led() -> bool {
    let (crew, busy) = LED.get();
    !crew.is_null() && !busy
}

/// Runs `tasks` for 0..count on the threads of the crew and returns true; without a crew does nothing and returns false.
pub(crate) fn run(count: usize, tasks: Tasks<'_>) -> bool {
    let (crew, busy) = LED.get();
    if crew.is_null() || busy {
        return false;
    }
    // SAFETY: a crew outlives the time in which the thread leads it.
    let crew = unsafe { &*crew };
    LED.set((crew, true));
    crew.run(count, tasks);
    LED.set((crew, false));
    true
}

impl Crew {
    /// Runs a loop on the leader, with whoever else takes its tasks.
    fn run(&self, count: usize, tasks: Tasks<'_>) {
        self.tasks.0.store(ptr::from_ref(&tasks).cast_mut().cast(), Ordering::Relaxed);
        self.finished.0.store(0, Ordering::Relaxed);
        for (i, block) in self.blocks[..self.threads].iter().enumerate() {
            let tasks = word(i * count / self.threads, (i + 1) * count / self.threads);
            // Publishes the two values above.
            block.0.store(tasks, Ordering::Release);
        }
        self.loops.0.fetch_add(1, Ordering::Release);
        let running = Running(self, count);
        while self.take(0) {}
        drop(running);
        assert!(!self.panicked.load(Ordering::Relaxed), "a task has panicked on another thread");
    }

    /// Runs one task, of the thread's own block if there is one; returns false if none is left.
    fn take(&self, own: usize) -> bool {
        (0..self.threads).any(|i| {
            let block = &self.blocks[(own + i) % self.threads].0;
            take_from(block, i == 0).is_some_and(|task| {
                let _finished = Finished(self);
                let tasks: *const Tasks<'_> = self.tasks.0.load(Ordering::Relaxed).cast();
                // SAFETY: `run` has stored it from a reference to a value that lives until all tasks that were taken are
                // finished, and this one is not.
                let tasks = unsafe { *tasks };
                tasks(task);
                true
            })
        })
    }

    /// Takes tasks until the crew ends.
    fn serve(&self, own: usize) {
        if !LED.get().0.is_null() {
            // The leader of a crew waits here for a part of some other work: nobody else would end this call.
            return;
        }
        let (mut seen, mut looks) = (0, 0);
        while !self.ended.load(Ordering::Acquire) {
            let loops = self.loops.0.load(Ordering::Acquire);
            if loops != seen {
                while self.take(own) {}
                (seen, looks) = (loops, 0);
            } else if looks < LOOKS {
                looks += 1;
                spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Takes the first task of a block, or the last.
fn take_from(tasks: &AtomicU64, first: bool) -> Option<usize> {
    let mut before = tasks.load(Ordering::Relaxed);
    loop {
        let (start, end) = block(before);
        if start >= end {
            return None;
        }
        let (task, after) =
            if first { (start, word(start + 1, end)) } else { (end - 1, word(start, end - 1)) };
        // The values that `run` has stored before are visible after this.
        match tasks.compare_exchange_weak(before, after, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => return Some(task),
            Err(now) => before = now,
        }
    }
}

/// A loop with its tasks. When it is dropped, no task can be taken any more, and those that were are finished.
struct Running<'a>(&'a Crew, usize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let Running(crew, mut taken) = *self;
        for left in &crew.blocks[..crew.threads] {
            let (start, end) = block(left.0.swap(0, Ordering::Relaxed));
            taken -= end - start;
        }
        let mut looks = 0;
        // The writes of the tasks are visible after this.
        while crew.finished.0.load(Ordering::Acquire) != taken {
            if looks < LOOKS {
                looks += 1;
                spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// A task that was taken.
struct Finished<'a>(&'a Crew);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked.store(true, Ordering::Relaxed);
        }
        self.0.finished.0.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{is_led, run, with_crew};
    use crate::testing::{sized, with_threads};

    fn counts(tasks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        let led = run(tasks, &|task| {
            assert!(!is_led(), "a loop inside of a task has no crew");
            counts[task].fetch_add(1, Ordering::Relaxed);
        });
        assert!(led);
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_once() {
        let loops = sized(2000, 20);
        for threads in [2, 3, 5] {
            with_threads(threads, || {
                with_crew(|| {
                    for i in 0..loops {
                        assert_eq!(counts(i % 23), vec![1; i % 23], "{threads} threads, loop {i}");
                    }
                });
            });
        }
    }

    #[test]
    fn there_is_no_crew_without_a_pool_of_several_threads() {
        assert!(!with_crew(is_led));
        assert!(!with_threads(1, || with_crew(is_led)));
        assert!(!run(3, &|_| panic!("no loop runs")));
        with_threads(2, || {
            assert!(with_crew(|| with_crew(is_led)), "one inside of another changes nothing");
            assert!(!is_led());
        });
    }

    #[test]
    fn several_crews_share_a_pool() {
        let loops = sized(200, 5);
        with_threads(3, || {
            rayon::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|_| {
                        with_crew(|| {
                            for i in 0..loops {
                                assert_eq!(counts(i % 7), vec![1; i % 7]);
                                // Its parts may be taken by threads that lead another crew.
                                rayon::join(|| rayon::join(|| (), || ()), || ());
                            }
                        });
                    });
                }
            });
        });
    }

    #[test]
    fn a_panic_of_a_task_is_one_of_the_loop() {
        let tasks = sized(41, 9);
        with_threads(3, || {
            for at in [0, 5, tasks - 1] {
                let looped = || {
                    with_crew(|| {
                        run(tasks, &|task| {
                            std::thread::sleep(std::time::Duration::from_micros(20));
                            assert_ne!(task, at, "expected");
                        })
                    })
                };
                assert!(catch_unwind(AssertUnwindSafe(looped)).is_err());
                assert!(!is_led());
            }
        });
    }
}
