//! Ctrl-C and SIGTERM: the first asks the work to stop, the second ends the process.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use crate::ui::stderr_line;

/// The exit status that a shell reports for a program ended by Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// Is raised by Ctrl-C or SIGTERM after [`catch_interrupts`] was called.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);

/// Makes the first Ctrl-C or SIGTERM raise [`STOP`], and the second end the process.
pub(crate) fn catch_interrupts() -> Result<()> {
    catch_interrupts_of(true)
}

/// Does as [`catch_interrupts`], without a line on stderr unless `tells`.
pub(crate) fn catch_interrupts_of(tells: bool) -> Result<()> {
    ctrlc::set_handler(move || {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        if tells {
            stderr_line("dsmoe: stopping after this step; interrupt again to stop at once");
        }
    })
    .context("cannot listen for Ctrl-C")
}
