//! Two calibration kernels that share no code with the benchmarks. They time arithmetic and the exchange of data between
//! processors. A virtual machine's processors can be neighbours at one moment and far apart at the next, which slows ops
//! that share data and leaves arithmetic unchanged.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// The length of the arithmetic, a few milliseconds.
const PASSES: usize = 3000;
const VALUES: usize = 4096;
/// The cache lines of each thread, and the number of exchanges.
const LINES: usize = 256;
const TURNS: usize = 48;

/// The seconds of both kernels at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) arithmetic: f64,
    /// None on one thread.
    pub(crate) exchange: Option<f64>,
}

impl Moment {
    pub(crate) fn midpoint(self, other: Moment) -> Moment {
        Moment {
            arithmetic: f64::midpoint(self.arithmetic, other.arithmetic),
            exchange: self.exchange.zip(other.exchange).map(|(a, b)| f64::midpoint(a, b)),
        }
    }
}

#[repr(align(64))]
struct Line(AtomicU64);

/// The cache lines that threads exchange.
pub(crate) struct Calibration {
    lines: Vec<Line>,
    arrived: AtomicUsize,
}

impl Calibration {
    pub(crate) fn new() -> Calibration {
        let lines = LINES * rayon::current_num_threads();
        Calibration {
            lines: (0..lines).map(|at| Line(AtomicU64::new(at as u64))).collect(),
            arrived: AtomicUsize::new(0),
        }
    }

    pub(crate) fn now(&self) -> Moment {
        let threads = rayon::current_num_threads();
        Moment { arithmetic: arithmetic(), exchange: (threads > 1).then(|| self.exchange(threads)) }
    }

    /// Lets every thread change the lines of the next one, of the one after that, and so on.
    fn exchange(&self, threads: usize) -> f64 {
        self.arrived.store(0, Ordering::Release);
        let took = rayon::broadcast(|context| {
            self.meet(threads);
            let started = Instant::now();
            for turn in 1..=TURNS {
                let whose = (context.index() + turn) % threads;
                let mut sum = 0;
                for line in &self.lines[whose * LINES..(whose + 1) * LINES] {
                    let value = line.0.load(Ordering::Relaxed);
                    line.0.store(value.wrapping_add(turn as u64), Ordering::Relaxed);
                    sum ^= value;
                }
                black_box(sum);
                self.meet((turn + 1) * threads);
            }
            started.elapsed().as_secs_f64()
        });
        took.into_iter().fold(1e-9, f64::max)
    }

    /// Waits until threads have arrived `times` times.
    fn meet(&self, times: usize) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.arrived.load(Ordering::Acquire) < times {
            looks += 1;
            // Another thread may wait for this processor.
            if looks.is_multiple_of(1024) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// Times multiplications and additions on data in the first-level cache, on all threads of the pool.
fn arithmetic() -> f64 {
    let started = Instant::now();
    rayon::broadcast(|_| {
        let values = black_box([1e-3f32; VALUES]);
        let mut sums = [0.0f32; 32];
        for _ in 0..PASSES {
            for part in values.chunks_exact(sums.len()) {
                for (sum, value) in sums.iter_mut().zip(part) {
                    *sum = *sum * 0.999 + value;
                }
            }
        }
        black_box(sums);
    });
    started.elapsed().as_secs_f64().max(1e-9)
}
