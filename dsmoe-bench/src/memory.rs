//! The memory of this machine, and the check that a model fits.

use std::path::Path;

use anyhow::{Result, bail};

use crate::format;

/// Returns the bytes of all memory that this process may use: the machine's, or less where its group or its address space has a
/// limit. `None` where `/proc` does not tell.
pub(crate) fn total() -> Option<u64> {
    let limits = [field("/proc/meminfo", "MemTotal:"), address_space(), of_group()];
    limits.into_iter().flatten().min()
}

/// Returns the limit of the address space, as `ulimit -v` sets it.
fn address_space() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Returns the limit of the control group of this process, as containers have it, or of one above it.
fn of_group() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let limit = |(mark, top, file): (&str, &str, &str)| -> Option<u64> {
        let own = groups.lines().find_map(|line| line.split_once(mark))?.1;
        let of = |group: &Path| std::fs::read_to_string(group.join(file)).ok()?.trim().parse().ok();
        let own = Path::new(top).join(own);
        own.ancestors().take_while(|group| group.starts_with(top)).filter_map(of).min()
    };
    // Both versions of control groups.
    let versions = [
        ("0::/", "/sys/fs/cgroup", "memory.max"),
        (":memory:/", "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ];
    versions.into_iter().filter_map(limit).min()
}

/// Returns the bytes of memory available without swapping.
pub(crate) fn available() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// Returns a field of a file that counts in KiB, in bytes.
pub(crate) fn field(file: &str, name: &str) -> Option<u64> {
    let info = std::fs::read_to_string(file).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Returns the bytes that are free on the disk of `path`, which need not exist yet; `None` where the system does not tell.
pub(crate) fn free_disk(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let absolute = std::path::absolute(path).ok()?;
        let existing = absolute.ancestors().find(|path| path.exists())?;
        let found = rustix::fs::statvfs(existing).ok()?;
        Some(found.f_bavail.saturating_mul(found.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Refuses work that does not fit, before the system ends the process.
pub(crate) fn check(what: &str, needed: u64, total: Option<u64>, help: &str) -> Result<()> {
    match total {
        Some(total) if needed > total => {
            let [needed, total] = [needed, total].map(format::bytes);
            bail!("{what} needs {needed} of memory and this machine has {total}; {help}")
        }
        _ => Ok(()),
    }
}

/// Refuses to write so many bytes to the disk of `path` if they are more than are free there.
pub(crate) fn check_disk(what: &str, needed: u64, path: &Path, help: &str) -> Result<()> {
    match free_disk(path) {
        Some(free) if needed > free => {
            let [needed, free] = [needed, free].map(format::bytes);
            bail!("{what} takes {needed} and the disk of {} has {free} free; {help}", path.display())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused() {
        let error = check("m", 30_000_000_000, Some(25_000_000_000), "use less").unwrap_err().to_string();
        assert_eq!(error, "m needs 30.0 GB of memory and this machine has 25.0 GB; use less");
        assert!(check("m", 25_000_000_000, Some(25_000_000_000), "").is_ok());
        assert!(check("m", u64::MAX, None, "").is_ok());
        if cfg!(unix) {
            let [here, later] = [".", "not/there/yet"].map(|path| free_disk(Path::new(path)));
            assert!(here.is_some_and(|bytes| bytes > 0) && later.is_some());
            let error = check_disk("m", u64::MAX, Path::new("."), "use less").unwrap_err().to_string();
            assert!(error.starts_with("m takes ") && error.contains(" and the disk of . has "), "{error}");
            assert!(check_disk("m", 1, Path::new("."), "").is_ok());
        }
    }
}
