//! The memory that work takes.

use std::fs;

use crate::memory;

/// A moment from which memory is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    resident: u64,
}

impl Mark {
    /// Marks this moment; none where `/proc` cannot reset the peak.
    pub(crate) fn now() -> Option<Mark> {
        // 5 sets the peak to what is resident at the moment.
        fs::write("/proc/self/clear_refs", "5").ok()?;
        Some(Mark { resident: status("VmRSS:")? })
    }

    /// Returns the peak of the resident bytes since the mark, less those at the mark.
    pub(crate) fn peak_since(self) -> Option<u64> {
        Some(status("VmHWM:")?.saturating_sub(self.resident))
    }
}

fn status(name: &str) -> Option<u64> {
    memory::field("/proc/self/status", name)
}

#[cfg(test)]
mod tests {
    use super::Mark;

    #[test]
    fn memory_is_seen_after_it_is_given_back() {
        let Some(mark) = Mark::now() else { return };
        drop(std::hint::black_box(vec![1u8; 200 << 20]));
        let peak = mark.peak_since().unwrap();
        assert!(peak > 190 << 20, "{peak}");
    }
}
