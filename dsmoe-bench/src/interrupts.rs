//! Ctrl-C, SIGTERM and SIGHUP: the first asks the work to stop, the second ends the process. SIGUSR1 asks it to stop, too.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::ui::{Ui, stderr_line};

/// The exit status that a shell reports for a program ended by Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// Is raised by Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 after [`catch_interrupts`] was called.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);

/// Returns what asks the work of a command to stop: [`STOP`], or the flag of the program that runs it.
pub(crate) fn stop_of(ui: &Ui) -> &AtomicBool {
    ui.call.as_ref().map_or(&STOP, |call| call.caller.stop())
}

/// The work was stopped on request; what is done is kept.
#[derive(Debug, thiserror::Error)]
#[error("stopped; run the same command with --resume to continue")]
pub(crate) struct Stopped;

/// Time in which work that does not look at [`STOP`] may come to its end.
const PATIENCE: Duration = Duration::from_millis(1500);

/// How to continue, while work runs that does not look at [`STOP`] all the time.
static UNPOLLED: Mutex<Option<&str>> = Mutex::new(None);
/// Parts of such work that do look at it.
static POLLED: AtomicUsize = AtomicUsize::new(0);

/// How most work is continued.
pub(crate) const CONTINUE: &str = "run the same command with --resume to continue";

/// Work of stages, most of which do not look at [`STOP`]. They write files that appear whole or not at all, so that the
/// process ends where it is if a stage takes longer than [`PATIENCE`].
pub(crate) struct Unpolled(());

impl Unpolled {
    /// Begins such work; `next` says how it is continued.
    pub(crate) fn begin(next: &'static str) -> Unpolled {
        *lock() = Some(next);
        Unpolled(())
    }
}

impl Drop for Unpolled {
    fn drop(&mut self) {
        *lock() = None;
    }
}

fn lock() -> std::sync::MutexGuard<'static, Option<&'static str>> {
    UNPOLLED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Does work that looks at [`STOP`] often and saves what it has done, and so is waited for.
pub(crate) fn polled<T>(work: impl FnOnce() -> T) -> T {
    struct Part;
    impl Drop for Part {
        fn drop(&mut self) {
            POLLED.fetch_sub(1, Ordering::SeqCst);
        }
    }
    POLLED.fetch_add(1, Ordering::SeqCst);
    let _part = Part;
    work()
}

/// Waits for work that does not look at [`STOP`], and ends the process if it takes too long.
fn end_unpolled() {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if lock().is_none() || POLLED.load(Ordering::SeqCst) > 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if let Some(next) = *lock() {
        stderr_line(format_args!("dsmoe: stopped; {next}"));
        std::process::exit(i32::from(INTERRUPTED));
    }
}

/// Is raised by all of them but SIGUSR1.
static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// Returns whether another signal than SIGUSR1 asked the work to stop.
pub(crate) fn interrupted() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}

/// Makes the first Ctrl-C, SIGTERM or SIGHUP raise [`STOP`], and the second end the process. SIGUSR1 raises it, however often.
pub(crate) fn catch_interrupts() -> Result<()> {
    listen(true).context("cannot listen for signals")
}

/// Does as [`catch_interrupts`], without a line on stderr unless `tells`. A program that runs the command has its own signals.
pub(crate) fn catch_interrupts_for(ui: &Ui, tells: bool) -> Result<()> {
    if ui.call.is_some() { Ok(()) } else { listen(tells).context("cannot listen for signals") }
}

/// Stops the work, or ends the process if it has been asked to stop before.
fn interrupt(tells: bool) {
    if INTERRUPT.swap(true, Ordering::Relaxed) {
        std::process::exit(i32::from(INTERRUPTED));
    }
    STOP.store(true, Ordering::Relaxed);
    if tells {
        stderr_line("dsmoe: stopping after this step; interrupt again to stop at once");
    }
    end_unpolled();
}

/// Launchers pass SIGUSR1 on to all processes and let them take their time, where other signals end them soon.
#[cfg(unix)]
fn listen(tells: bool) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
    use signal_hook::iterator::Signals;

    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
    if !hangup_is_ignored() {
        signals.add_signal(SIGHUP)?;
    }
    let listen = move || {
        for signal in signals.forever() {
            if signal != SIGUSR1 {
                interrupt(tells);
            } else if !STOP.swap(true, Ordering::Relaxed) && tells {
                stderr_line("dsmoe: stopping after this step");
            }
        }
    };
    std::thread::Builder::new().spawn(listen).map(drop)
}

/// Returns whether the process was started so that it outlives its terminal, as by `nohup`. Where the system does not tell,
/// SIGHUP is left alone.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1.
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_none_or(|mask| mask & 1 == 1)
}

#[cfg(not(unix))]
fn listen(tells: bool) -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(move || interrupt(tells))
}
