//! The peak speed of this machine, with which the time of an op is compared.
//!
//! A peak is measured: it is the best of several short bursts on all threads of the current rayon pool. Other load on
//! the machine can only slow a burst down.

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::buf::Buf;
use crate::isa::Isa;
use crate::matmul::Precision;
use crate::simd::{Kernel, Product, ProductKernel, Simd};

/// Independent sums: they cover the latency of a multiply-add on every pipe and fit AVX2's registers.
const CHAINS: usize = 12;
/// Least seconds of a burst: long compared with the clock's resolution, short compared with a scheduler's slice.
const BURST_SECONDS: f64 = 0.0015;
/// Bursts are repeated for this many seconds, but at least a few times.
const ALL_SECONDS: f64 = 0.12;
const FEWEST_BURSTS: usize = 4;

/// Measures the floating-point operations per second of multiply-adds in registers. For bf16, returns the better of
/// products of pairs, where the tier has them, and f32.
pub fn flops(isa: Isa, precision: Precision) -> f64 {
    let wide = on_all_threads(|rounds| isa.run_product(MultiplyAdds { rounds, dots: false }));
    if precision == Precision::Bf16 && isa.dots() {
        wide.max(on_all_threads(|rounds| isa.run_product(MultiplyAdds { rounds, dots: true })))
    } else {
        wide
    }
}

/// Measures the bytes per second at which all threads together read `bytes` repeatedly, each thread its own part. A
/// size beyond the caches gives the bandwidth of memory; the call allocates that much memory.
pub fn read_bandwidth(isa: Isa, bytes: usize) -> f64 {
    let per_thread = (bytes / size_of::<f32>() / rayon::current_num_threads()).next_multiple_of(BLOCK);
    let parts: Vec<_> = (0..rayon::current_num_threads()).map(|_| Mutex::new(Buf::default())).collect();
    let part = || parts[rayon::current_thread_index().unwrap_or(0)].lock().expect("no burst panics");
    // Memory belongs to the core that writes it first, and pages nobody wrote are all one page.
    rayon::broadcast(|_| {
        let mut part = part();
        *part = Buf::zeros(per_thread);
        part.fill(1.0);
    });
    let one = on_all_threads(|passes| isa.run(Read::<1> { x: &part(), passes }));
    // Some processors fetch several streams ahead faster than one.
    one.max(on_all_threads(|passes| isa.run(Read::<4> { x: &part(), passes })))
}

/// Returns the best work per second of `burst(amount)` on all threads at once. A burst returns the work it did.
fn on_all_threads(burst: impl Fn(usize) -> f64 + Sync) -> f64 {
    let run = |amount: usize| {
        let waiting = AtomicUsize::new(rayon::current_num_threads());
        let bursts = rayon::broadcast(|_| {
            // Nobody's time begins before the last thread is awake.
            waiting.fetch_sub(1, Ordering::Relaxed);
            while waiting.load(Ordering::Relaxed) > 0 {
                std::thread::yield_now();
            }
            let started = Instant::now();
            (burst(amount), started, Instant::now())
        });
        let work: f64 = bursts.iter().map(|burst| burst.0).sum();
        let first = bursts.iter().map(|burst| burst.1).min();
        let last = bursts.iter().map(|burst| burst.2).max();
        (work, first.zip(last).map_or(0.0, |(first, last)| (last - first).as_secs_f64()))
    };
    let mut amount = 1;
    while run(amount).1 < BURST_SECONDS {
        amount *= 2;
    }
    let (mut best, mut bursts, started) = (0.0f64, 0, Instant::now());
    while bursts < FEWEST_BURSTS || started.elapsed().as_secs_f64() < ALL_SECONDS {
        let (work, seconds) = run(amount);
        best = best.max(work / seconds);
        bursts += 1;
    }
    best
}

/// `CHAINS` independent chains of multiply-adds, or of products of pairs; returns the operations.
struct MultiplyAdds {
    rounds: usize,
    dots: bool,
}

/// Links of every chain in a round; few under Miri, whose speed is not measured.
const LINKS: usize = if cfg!(miri) { 8 } else { 1024 };

impl ProductKernel for MultiplyAdds {
    type Output = f64;
    #[inline(always)]
    fn body<S: Product>(self, s: S) -> f64 {
        let MultiplyAdds { rounds, dots } = self;
        // The chains stop growing where a half is less than their last place: no infinities, no subnormals.
        let (half, one) = (black_box(0.5f32), black_box(1.0f32));
        let (factor, term) = (s.splat(half), s.splat(one));
        let mut sums = [term; CHAINS];
        if dots {
            let pairs = black_box([0u32; 32]);
            for _ in 0..rounds * LINKS {
                for sum in &mut sums {
                    *sum = s.dot(*sum, half.to_bits(), &pairs);
                }
            }
        } else {
            for _ in 0..rounds * LINKS {
                for sum in &mut sums {
                    // The sum is the addend: NEON has no other form, and would move it.
                    *sum = s.fma(factor, term, *sum);
                }
            }
        }
        black_box(sums.into_iter().map(|sum| s.reduce_add(sum)).sum::<f32>());
        let per_link = if dots { 4 } else { 2 } * S::LANES;
        (rounds * LINKS * CHAINS * per_link) as f64
    }
}

/// Reads `x` from `STREAMS` places at once; returns the bytes.
struct Read<'a, const STREAMS: usize> {
    x: &'a [f32],
    passes: usize,
}

/// Values of one step of a stream on the widest tier.
const STEP: usize = 64;
/// A thread's part is a multiple of this: whole steps in all streams.
const BLOCK: usize = 4 * STEP;

impl<const STREAMS: usize> Kernel for Read<'_, STREAMS> {
    type Output = f64;
    #[inline(always)]
    fn body<S: Simd>(self, s: S) -> f64 {
        let Read { x, passes } = self;
        let len = x.len() / STREAMS;
        for _ in 0..passes {
            let mut sums = [s.splat(0.0); 8];
            for at in (0..len).step_by(STEP) {
                for stream in 0..STREAMS {
                    let x = &x[stream * len + at..][..STEP];
                    for (i, x) in x.chunks_exact(S::LANES).enumerate() {
                        sums[i % 8] = s.add(sums[i % 8], s.load(x));
                    }
                }
            }
            black_box(sums.into_iter().map(|sum| s.reduce_add(sum)).sum::<f32>());
        }
        (passes * len * STREAMS * size_of::<f32>()) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::with_threads;

    #[test]
    fn ceilings_are_those_of_some_machine() {
        // An emulator, for which this variable is set, reaches 1e8 and less on a busy machine.
        let least = if std::env::var_os("DSMOE_TEST_STEP").is_some() { 1e6 } else { 1e8 };
        let possible = least..1e14;
        for isa in Isa::available() {
            for precision in [Precision::F32, Precision::Bf16] {
                let rate = with_threads(2, || flops(isa, precision));
                assert!(possible.contains(&rate), "{isa:?} {precision}: {rate:e} FLOP/s");
            }
        }
        let rate = with_threads(2, || read_bandwidth(Isa::current(), 1 << 20));
        assert!(possible.contains(&rate), "{rate:e} bytes/s");
    }

    #[test]
    fn the_work_counted_is_the_work_asked_for() {
        let x = Buf::zeros(3 * BLOCK);
        for isa in Isa::available() {
            assert_eq!(isa.run(Read::<1> { x: &x, passes: 2 }), (2 * 4 * x.len()) as f64, "{isa:?}");
            assert_eq!(isa.run(Read::<4> { x: &x, passes: 3 }), (3 * 4 * x.len()) as f64, "{isa:?}");
            let [one, two] = [1, 2].map(|rounds| isa.run_product(MultiplyAdds { rounds, dots: isa.dots() }));
            let lanes = one / (LINKS * CHAINS * if isa.dots() { 4 } else { 2 }) as f64;
            assert!(two == 2.0 * one && [8.0, 16.0].contains(&lanes), "{isa:?}: {lanes} lanes");
        }
    }
}
