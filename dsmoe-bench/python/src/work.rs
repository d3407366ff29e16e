//! Work without the interpreter's lock, which Ctrl-C and callbacks stop.

use std::cell::Cell;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use dsmoe_bench::embed::{Caller, start_threads};
use dsmoe_train::metrics::StepRecord;
use pyo3::prelude::*;

use crate::errors::raised;

/// The time between two looks for signals.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Memory of the thread that works, as that of the pool's.
const STACK: usize = 8 << 20;

thread_local! {
    /// Whether this thread is in a callback.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// One piece of work: its callback, and what has been raised meanwhile.
pub(crate) struct Watcher {
    stop: AtomicBool,
    on_step: Option<Py<PyAny>>,
    logger: Py<PyAny>,
    error: Mutex<Option<PyErr>>,
}

impl Watcher {
    pub(crate) fn new(py: Python<'_>, on_step: Option<Py<PyAny>>) -> PyResult<Arc<Watcher>> {
        let logger = py.import("logging")?.call_method1("getLogger", ("dsmoe",))?.unbind();
        let error = Mutex::default();
        Ok(Arc::new(Watcher { stop: AtomicBool::new(false), on_step, logger, error }))
    }

    /// Does `work` on a thread of its own without the interpreter's lock. An exception of a callback or a signal asks it to stop,
    /// and is raised at its end.
    ///
    /// Work that a callback calls is done on the callback's thread, which may be the only one of the pool.
    pub(crate) fn run<T: Send>(&self, py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
        start_threads(None).map_err(raised(py))?;
        if IN_CALLBACK.get() {
            return Ok(py.detach(work));
        }
        let outcome = py.detach(|| {
            thread::scope(|scope| {
                let (working, ended) = channel::<()>();
                let work = move || {
                    // Dropped at the end, whatever it is.
                    let _working = working;
                    work()
                };
                let builder = thread::Builder::new().name("dsmoe".to_owned()).stack_size(STACK);
                let worker = builder.spawn_scoped(scope, work)?;
                while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                    if let Err(error) = Python::attach(|py| py.check_signals()) {
                        self.raise(error);
                    }
                }
                Ok::<_, std::io::Error>(worker.join())
            })
        })?;
        let result = outcome.unwrap_or_else(|payload| resume_unwind(payload));
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner).take();
        error.map_or(Ok(result), Err)
    }

    /// Asks the work to stop; the first error is raised at its end.
    fn raise(&self, error: PyErr) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Calls back from a thread that works. Returns whether to continue: not if the callback raises or returns False.
    pub(crate) fn call_back(&self, call: impl FnOnce(Python<'_>) -> PyResult<Py<PyAny>>) -> bool {
        let before = IN_CALLBACK.replace(true);
        let outcome = Python::attach(|py| call(py)?.extract::<bool>(py).or(Ok(true)));
        IN_CALLBACK.set(before);
        outcome.unwrap_or_else(|error| {
            self.raise(error);
            false
        })
    }
}

impl Caller for Watcher {
    fn note(&self, line: &str) {
        self.call_back(|py| self.logger.call_method1(py, "info", (line,)));
    }

    fn step(&self, record: &StepRecord) {
        let Some(callback) = &self.on_step else { return };
        let goes_on = self.call_back(|py| {
            let json = serde_json::to_string(record).unwrap_or_default();
            let record = py.import("json")?.call_method1("loads", (json,))?;
            callback.call1(py, (record,))
        });
        if !goes_on {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn stop(&self) -> &AtomicBool {
        &self.stop
    }
}
