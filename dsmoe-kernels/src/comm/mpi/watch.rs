//! Bounded time for work that cannot be asked whether it has finished.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::Duration;

use crate::comm::error::CommError;
use crate::comm::settings::Settings;

/// How long an orderly exit may take.
const EXIT: Duration = Duration::from_secs(3);

/// Runs `work`. If that takes longer than calls outside of steps may, reports `late` and ends this process.
pub(super) fn watched<R>(late: &'static str, settings: Settings, work: impl FnOnce() -> R) -> R {
    let (done, watch) = channel::<()>();
    let deadline = settings.deadline.saturating_mul(Settings::OUTSIDE);
    // Without room for a thread the work is not watched.
    let _ = Builder::new().spawn(move || {
        if watch.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
            let seconds = deadline.as_secs_f64();
            (settings.last_words)(&CommError::Start(format!("{late} (waited {seconds:.1} s)")));
            leave(1, || {});
        }
    });
    let result = work();
    drop(done);
    result
}

/// Runs `last` and ends this process, by force if that takes long.
pub(super) fn leave(status: i32, last: impl FnOnce()) -> ! {
    // A panic here would end a panic hook too early, so a failure to start the thread is no error.
    let _ = Builder::new().spawn(|| {
        std::thread::sleep(EXIT);
        std::process::abort();
    });
    last();
    std::process::exit(status)
}
