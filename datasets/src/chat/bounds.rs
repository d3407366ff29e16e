//! Runs the template engine within bounds of size, nesting, work and time.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::source::longest_tag;
use crate::panics::caught;

/// The largest template, in bytes; those in use have some 20 thousand.
const LARGEST: usize = 1 << 20;
/// The longest tag, in characters outside of its texts. The engine goes one call deeper for every operator.
const LONGEST_TAG: usize = 1 << 13;
/// The deepest recursion of the engine is on values that a template nests within its fuel. Pages that are not used are not
/// taken.
const STACK: usize = 1 << 30;
/// The engine does not count all of its work as fuel.
const PATIENCE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 2 });

/// Checks a template's size and the length of its tags.
pub(super) fn check(source: &str) -> Result<(), String> {
    if source.len() > LARGEST {
        return Err(format!("it has {} bytes, more than {LARGEST}", source.len()));
    }
    match longest_tag(source) {
        length if length > LONGEST_TAG => {
            Err(format!("it has a tag of {length} characters, more than {LONGEST_TAG}"))
        }
        _ => Ok(()),
    }
}

/// Runs `work`, which may recurse deeply, panic or not end.
pub(super) fn run<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (send, receive) = mpsc::channel();
    let guarded = move || {
        let _ = send.send(caught(work).unwrap_or_else(|| Err("the template engine fails on it".into())));
    };
    thread::Builder::new()
        .name("chat template".into())
        .stack_size(STACK)
        .spawn(guarded)
        .map_err(|cause| format!("no thread to run it: {cause}"))?;
    receive
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|_| Err(format!("it runs for more than {} seconds", PATIENCE.as_secs())))
}
