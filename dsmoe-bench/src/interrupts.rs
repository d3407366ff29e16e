//! Ctrl-C and SIGTERM: the first asks the work to stop, the second ends the process. SIGUSR1 asks it to stop, too.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use crate::ui::stderr_line;

/// The exit status that a shell reports for a program ended by Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// Is raised by Ctrl-C, SIGTERM or SIGUSR1 after [`catch_interrupts`] was called.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);

/// Is raised by Ctrl-C or SIGTERM alone.
static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// Returns whether Ctrl-C or SIGTERM asked the work to stop.
pub(crate) fn interrupted() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}

/// Makes the first Ctrl-C or SIGTERM raise [`STOP`], and the second end the process. SIGUSR1 raises it, however often.
pub(crate) fn catch_interrupts() -> Result<()> {
    catch_interrupts_of(true)
}

/// Does as [`catch_interrupts`], without a line on stderr unless `tells`.
pub(crate) fn catch_interrupts_of(tells: bool) -> Result<()> {
    catch_usr1(tells)?;
    ctrlc::set_handler(move || {
        if INTERRUPT.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        STOP.store(true, Ordering::Relaxed);
        if tells {
            stderr_line("dsmoe: stopping after this step; interrupt again to stop at once");
        }
    })
    .context("cannot listen for Ctrl-C")
}

/// Launchers pass SIGUSR1 on to all processes and let them take their time, where other signals end them soon.
#[cfg(unix)]
fn catch_usr1(tells: bool) -> Result<()> {
    use signal_hook::consts::SIGUSR1;
    use signal_hook::iterator::Signals;

    let mut signals = Signals::new([SIGUSR1]).context("cannot listen for SIGUSR1")?;
    let listen = move || {
        for _ in signals.forever() {
            if !STOP.swap(true, Ordering::Relaxed) && tells {
                stderr_line("dsmoe: stopping after this step");
            }
        }
    };
    std::thread::Builder::new().spawn(listen).map(drop).context("cannot listen for SIGUSR1")
}

#[cfg(not(unix))]
fn catch_usr1(_: bool) -> Result<()> {
    Ok(())
}
