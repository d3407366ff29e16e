//! A program that runs commands in its own process, in place of a terminal.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dsmoe_train::metrics::StepRecord;

/// Receives what a command shows while it works, and says whether it is to stop. Its functions are called on threads of the pool.
pub trait Caller: Send + Sync {
    /// Receives a note, which a terminal would show on stderr.
    fn note(&self, _line: &str) {}
    /// Receives a finished step of a training.
    fn step(&self, _record: &StepRecord) {}
    /// Returns the flag that asks the work to stop. A training then saves a checkpoint and returns its report; other work ends
    /// without a result, and what it was writing is removed.
    fn stop(&self) -> &AtomicBool;
}

/// One command of a caller, and its result.
pub(crate) struct Call {
    pub(crate) caller: Arc<dyn Caller>,
    result: Mutex<Option<String>>,
}

/// The payload of a panic that ends the work of a caller who asked it to stop.
struct Stopped;

impl Call {
    pub(crate) fn new(caller: Arc<dyn Caller>) -> Arc<Call> {
        Arc::new(Call { caller, result: Mutex::new(None) })
    }

    pub(crate) fn is_to_stop(&self) -> bool {
        self.caller.stop().load(Ordering::Relaxed)
    }

    /// Ends the work by unwinding if it is to stop: callbacks of progress return nothing that could end it.
    pub(crate) fn stop_here(&self) {
        if self.is_to_stop() {
            resume_unwind(Box::new(Stopped));
        }
    }

    pub(crate) fn set_result(&self, json: String) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(json);
    }

    /// Takes the result of the command; none if it has printed none.
    pub(crate) fn take_result(&self) -> Option<String> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

/// Does `work`; none if [`Call::stop_here`] has ended it.
pub(crate) fn unless_stopped<T>(work: impl FnOnce() -> T) -> Option<T> {
    let other = |payload: Box<dyn Any + Send>| match payload.is::<Stopped>() {
        true => None,
        false => resume_unwind(payload),
    };
    catch_unwind(AssertUnwindSafe(work)).map_or_else(other, Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Flag(AtomicBool);

    impl Caller for Flag {
        fn stop(&self) -> &AtomicBool {
            &self.0
        }
    }

    #[test]
    fn work_ends_where_it_looks_and_other_panics_go_on() {
        let call = Call::new(Arc::new(Flag(AtomicBool::new(false))));
        assert_eq!(unless_stopped(|| call.stop_here()), Some(()));
        call.caller.stop().store(true, Ordering::Relaxed);
        assert_eq!(unless_stopped(|| rayon::scope(|_| call.stop_here())), None);
        let other = catch_unwind(|| unless_stopped(|| resume_unwind(Box::new("other"))));
        assert_eq!(other.map(|_: Option<()>| ()).unwrap_err().downcast_ref(), Some(&"other"));
    }
}
