//! The search for a library of MPI.

use std::path::{Path, PathBuf};

use super::api::Api;
use crate::comm::error::{CommError, Result};
use crate::comm::launch::{Launch, Launcher};

/// The variable that names a library.
pub(super) const VARIABLE: &str = "DSMOE_MPI_LIB";

const STANDARD: &str = "libmpi_abi.so.1";
const MPICH: &str = "libmpi.so.12";
/// The name in Debian and its relatives.
const MPICH_OF_DEBIAN: &str = "libmpich.so.12";
const OPEN_MPI: &str = "libmpi.so.40";

/// Opens the first library that can be used, and returns its name with it.
pub(super) fn open(launch: Option<Launch>) -> Result<(Api, String)> {
    let names = match std::env::var(VARIABLE) {
        Ok(name) => vec![name],
        Err(_) => candidates(launch, folder_of_launcher(launch).as_deref()),
    };
    let mut problems = Vec::new();
    for name in names {
        match Api::open(&name) {
            Ok(api) => return Ok((api, name)),
            Err(problem) => problems.push(worded(&name, &problem)),
        }
    }
    Err(CommError::Start(format!(
        "no library of MPI can be used ({}); install openmpi-bin or mpich, or set {VARIABLE} to the library of your launcher",
        problems.join("; ")
    )))
}

/// Words why a library cannot be used, in one line.
fn worded(name: &str, problem: &str) -> String {
    let problem = problem.split_whitespace().collect::<Vec<_>>().join(" ");
    match problem.strip_prefix(name).map(|rest| rest.trim_start_matches([':', ' '])) {
        Some(rest) if rest.contains("No such file") => format!("{name} is not found"),
        Some(rest) => format!("{name}: {rest}"),
        None => format!("{name}: {problem}"),
    }
}

/// The names to try, in order. Those of the launcher's own MPI come first, and its own folder before the system's; the
/// others follow, so that a wrong library is reported as such.
fn candidates(launch: Option<Launch>, folder: Option<&Path>) -> Vec<String> {
    let names = match launch.map(|launch| launch.by) {
        Some(Launcher::OpenMpi | Launcher::Pmix) => [OPEN_MPI, STANDARD, MPICH, MPICH_OF_DEBIAN],
        _ => [STANDARD, MPICH, MPICH_OF_DEBIAN, OPEN_MPI],
    };
    let beside = names.iter().filter_map(|name| Some(folder?.join(name))).filter(|path| path.exists());
    let beside = beside.map(|path| path.display().to_string());
    beside.chain(names.map(str::to_owned)).collect()
}

/// The folder `lib` beside the folder of the program that started this one, if that is a launcher.
fn folder_of_launcher(launch: Option<Launch>) -> Option<PathBuf> {
    launch?;
    let program = std::fs::read_link(format!("/proc/{}/exe", std::os::unix::process::parent_id())).ok()?;
    Some(program.parent()?.parent()?.join("lib"))
}

#[cfg(test)]
mod tests {
    use super::{MPICH, OPEN_MPI, STANDARD, candidates, worded};
    use crate::comm::launch::{Launch, Launcher};

    #[test]
    fn the_launchers_own_library_comes_first() {
        let by = |by| Some(Launch { by, size: Some(2) });
        assert_eq!(candidates(by(Launcher::OpenMpi), None)[0], OPEN_MPI);
        assert_eq!(candidates(by(Launcher::Pmix), None)[0], OPEN_MPI);
        assert_eq!(candidates(by(Launcher::Pmi), None)[..2], [STANDARD, MPICH]);
        assert_eq!(candidates(None, None).last().unwrap(), OPEN_MPI);
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join(MPICH);
        std::fs::write(&own, "").unwrap();
        let names = candidates(by(Launcher::Pmi), Some(dir.path()));
        assert_eq!((names[0].as_str(), names.len()), (own.to_str().unwrap(), 5));
    }

    #[test]
    fn problems_are_short() {
        let missing = "libmpi.so.40: cannot open shared object file: No such file or directory";
        assert_eq!(worded("libmpi.so.40", missing), "libmpi.so.40 is not found");
        assert_eq!(
            worded("libmpi.so.40", "libm.so.6: No such file"),
            "libmpi.so.40: libm.so.6: No such file"
        );
        assert_eq!(worded("a.so", "it lacks MPI_Test"), "a.so: it lacks MPI_Test");
        assert_eq!(worded("a.so", "a.so: invalid\nELF header"), "a.so: invalid ELF header");
    }
}
