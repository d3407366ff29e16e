//! Work on a thread that is watched: what reports nothing for too long has failed.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// Nothing was reported for the whole time.
    Silent,
    /// The work panicked.
    Panicked,
}

/// Runs `work` on a thread and `show` with what it reports. The thread of silent work is left to the end of the process.
pub(super) fn watched<E: Send + 'static, T: Send + 'static>(
    patience: Duration,
    mut show: impl FnMut(E),
    work: impl FnOnce(&Sender<E>) -> T + Send + 'static,
) -> Result<T, Lost> {
    let (events, shown): (Sender<E>, Receiver<E>) = channel();
    let worker = thread::spawn(move || work(&events));
    loop {
        match shown.recv_timeout(patience) {
            Ok(event) => show(event),
            Err(RecvTimeoutError::Timeout) => return Err(Lost::Silent),
            Err(RecvTimeoutError::Disconnected) => return worker.join().map_err(|_| Lost::Panicked),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_work_is_given_up() {
        let mut sum = 0;
        let patience = Duration::from_secs(30);
        let outcome = watched(patience, |n| sum += n, |tell| (1..4).all(|n| tell.send(n).is_ok()));
        assert_eq!((outcome, sum), (Ok(true), 6));
        let silent =
            watched(Duration::from_millis(20), |(): ()| (), |_| thread::sleep(Duration::from_secs(1)));
        assert_eq!(silent, Err(Lost::Silent));
    }
}
