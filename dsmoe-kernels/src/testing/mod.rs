//! Helpers for tests, here and in the crates that build on this one.

mod launchers;
mod search;

pub use launchers::{MpiLauncher, mpi_launchers};
pub use search::edited_copies;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::rng::Rng;

thread_local! {
    /// Allocations of this thread. It needs neither memory of its own nor a destructor, so the allocator may use it at any time.
    static OF_THREAD: Cell<usize> = const { Cell::new(0) };
}

/// Counts allocations, of all threads and of each, and passes them to the system's allocator. A test makes it its
/// `#[global_allocator]`.
#[derive(Debug)]
pub struct CountingAllocator(AtomicUsize);

impl CountingAllocator {
    /// Starts with a count of 0.
    #[expect(clippy::new_without_default, reason = "a static needs a const function")]
    pub const fn new() -> CountingAllocator {
        CountingAllocator(AtomicUsize::new(0))
    }

    /// Returns the number of allocations and reallocations of all threads so far. Those of the test harness are among them: it
    /// prints a line when a test has run for a minute.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns the number of allocations and reallocations of the calling thread so far.
    pub fn count_of_thread(&self) -> usize {
        OF_THREAD.get()
    }

    fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
        OF_THREAD.set(OF_THREAD.get() + 1);
    }
}

// SAFETY: every method hands its arguments to the system's allocator unchanged and returns what that returns.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.add_one();
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above; `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.add_one();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.add_one();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

/// Returns `n` normal values that depend on `seed` alone.
pub fn normals(n: usize, seed: u64) -> Vec<f32> {
    let mut out = vec![0.0; n];
    Rng::new(seed, 0xd5).fill_normal(&mut out, 1.0);
    out
}

/// Returns the sizes of a test's problems: `ordinary`, or `small` under Miri, where a test should end within half a minute. Miri runs a
/// few hundred thousand basic blocks a second. On the portable tier a multiply-add of a product takes about 60 of them, and columns are
/// padded to 32; an exponential takes 600, and a normal value 50.
#[cfg(test)]
pub(crate) const fn sized<T: Copy>(ordinary: T, small: T) -> T {
    if cfg!(miri) { small } else { ordinary }
}

/// Converts to f64, for the references.
pub fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Checks that every value of `got` is within `tolerance * max(1, max |want|)` of `want`. The message gives the place of
/// the largest error and its share of the tolerance.
///
/// # Panics
/// A value is farther off or NaN, or the lengths differ.
pub fn assert_close(name: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_close_f64(name, &f64s(got), want, tolerance);
}

/// Does the same as [`assert_close`] for f64 results.
///
/// # Panics
/// Panics under the conditions of [`assert_close`].
pub fn assert_close_f64(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: length");
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    let mut worst = (0, 0.0f64);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs() / scale;
        assert!(!error.is_nan(), "{name}: NaN at {i}: got {g}, want {w}");
        if error > worst.1 {
            worst = (i, error);
        }
    }
    assert!(
        worst.1 <= tolerance,
        "{name}: error {:.3e} at {} is {:.1} of the tolerance (got {}, want {})",
        worst.1,
        worst.0,
        worst.1 / tolerance,
        got[worst.0],
        want[worst.0]
    );
}

/// Returns the central differences of `f` at `x`, one per coordinate, with step `h`.
pub fn finite_differences(x: &[f64], h: f64, mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let mut point = x.to_vec();
    (0..x.len())
        .map(|i| {
            point[i] = x[i] + h;
            let up = f(&point);
            point[i] = x[i] - h;
            let down = f(&point);
            point[i] = x[i];
            (up - down) / (2.0 * h)
        })
        .collect()
}

/// Runs `f` on a pool of `threads` threads.
///
/// # Panics
/// The pool cannot be built.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("thread pool").install(f)
}

/// Checks that `f` gives the same result on 1, 2 and 3 threads, under Miri on 1 and 2.
///
/// # Panics
/// The results differ.
pub fn assert_same_on_threads<R: PartialEq + Send>(name: &str, f: impl Fn() -> R + Sync) {
    let one = with_threads(1, &f);
    let most = if cfg!(miri) { 2 } else { 3 };
    for threads in 2..=most {
        assert!(with_threads(threads, &f) == one, "{name}: {threads} threads give another result");
    }
}

/// Returns the folder of checkpoints and golden data, `DSMOE_SHARED`, if it holds `needed`; else prints that `test` is
/// skipped.
///
/// # Panics
/// It is absent, and `DSMOE_REQUIRE` contains `shared`.
pub fn shared(test: &str, needed: &str) -> Option<PathBuf> {
    // Cargo sets the folder of the package when it runs a test. The folder at compile time would be part of the library, whose bytes
    // would depend on where it is built.
    let package = || std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let dir = std::env::var_os("DSMOE_SHARED").map_or_else(|| package().join("../../shared"), PathBuf::from);
    if dir.join(needed).exists() {
        return Some(dir);
    }
    let why = format!("no shared data at {}", dir.display());
    assert!(!required("shared"), "{test}: {why}");
    skipped(test, &why);
    None
}

/// Returns the Euclidean distance of two arrays.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

/// Returns the Euclidean norm of an array.
pub fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Compares `got`, the result of a GPU, with `want`, the f32 result of the CPU. The error may be four times that of
/// `half`, the bf16 result of the CPU, plus half a percent of `size`, the norm of the added terms: both round the operands
/// of products to bf16, and a GPU also keeps activations and their gradients in bf16 between ops. Returns a message if the
/// error is larger.
pub fn too_far(what: &str, got: &[f32], want: &[f32], half: &[f32], size: f64) -> Option<String> {
    let (got, allowed) = (distance(got, want), 4.0 * distance(half, want) + 0.005 * size);
    // Not a number is too far.
    let near = got <= allowed;
    (!near).then(|| {
        format!("{what} is off by {got:.3e}, more than {allowed:.3e}, at a norm of {:.3e}", norm(want))
    })
}

/// Checks that `result` is an error whose message is one line with all of `parts`.
///
/// # Panics
/// It is none, or its message is another.
#[track_caller]
pub fn refused<T, E: std::fmt::Display>(result: Result<T, E>, parts: &[&str]) {
    let message =
        result.err().unwrap_or_else(|| panic!("accepted, without an error about {parts:?}")).to_string();
    assert!(!message.contains('\n'), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// Tells whether `DSMOE_REQUIRE` names `what`, so that no test of it may be skipped.
pub fn required(what: &str) -> bool {
    std::env::var("DSMOE_REQUIRE").is_ok_and(|all| all.split(',').any(|word| word == what))
}

/// Prints that `test` is skipped and why.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub fn skipped(test: &str, why: &str) {
    eprintln!("SKIP {test}: {why}");
}

/// Tells whether there is a GPU, and prints that the test is skipped if there is none.
///
/// # Panics
/// There is no GPU, and `DSMOE_REQUIRE` contains `gpu`.
#[cfg(feature = "cuda")]
pub fn has_gpu(test: &str) -> bool {
    use crate::cuda::{Detection, detect};
    let found = detect();
    let any = matches!(found, Detection::Devices(_));
    assert!(any || !required("gpu"), "{test} needs a GPU: {found:?}");
    if !any {
        skipped(test, &format!("no GPU ({found:?})"));
    }
    any
}
