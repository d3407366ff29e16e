//! Panics of other crates, which become errors of this one and print nothing.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// True while this thread runs code whose panics are caught.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Resets [`CAUGHT`] to what it was.
struct Reset(bool);

impl Drop for Reset {
    fn drop(&mut self) {
        CAUGHT.set(self.0);
    }
}

/// Runs `work` and returns its value, or none if it panics. The message of such a panic is not printed; those of other
/// threads, and of this thread outside of `work`, are.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                print(info);
            }
        }));
    });
    let _reset = Reset(CAUGHT.replace(true));
    panic::catch_unwind(AssertUnwindSafe(work)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_silent_only_where_it_is_caught() {
        assert_eq!(caught(|| 5), Some(5));
        let nested = caught(|| {
            assert_eq!(caught(|| -> u8 { panic!("inner") }), None);
            assert!(CAUGHT.get(), "a panic inside does not end the silence around it");
            assert!(!std::thread::spawn(|| CAUGHT.get()).join().unwrap(), "another thread is not silent");
            panic!("outer")
        });
        assert_eq!(nested, None::<()>);
        assert!(!CAUGHT.get(), "nor this one afterwards");
    }
}
