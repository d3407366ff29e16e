//! The launchers of MPI on this machine, for tests of several processes.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{required, skipped};

/// A launcher of MPI and what it needs in order to run on a small machine.
#[derive(Clone, Debug)]
pub struct MpiLauncher {
    /// Its name, for messages.
    pub name: &'static str,
    program: PathBuf,
    /// The library of the started program; none for the one that the program finds by itself.
    library: Option<PathBuf>,
}

impl MpiLauncher {
    /// Returns a command that starts `processes` processes of `program`. The program's arguments follow.
    pub fn command(&self, processes: usize, program: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("-n").arg(processes.to_string()).arg(program);
        // Open MPI: tests may run as root, processes share cores, and containers forbid copies between processes.
        command.envs([
            ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
            ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
            ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
            ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
            ("OMPI_MCA_mpi_yield_when_idle", "1"),
        ]);
        command.env_remove("DSMOE_MPI_LIB");
        command.envs(self.library.iter().map(|library| ("DSMOE_MPI_LIB", library)));
        command
    }
}

/// Returns the launchers of this machine: Open MPI's, MPICH's, and those of the folder `DSMOE_MPI_WHEEL`, where the wheel
/// `mpich` is installed: it has the standard's binary interface and MPICH's own. Prints that `test` is skipped if there is
/// none.
///
/// # Panics
/// There is none, and `DSMOE_REQUIRE` contains `mpi`.
pub fn mpi_launchers(test: &str) -> Vec<MpiLauncher> {
    let mut found = Vec::new();
    let mut add = |name, program: Option<PathBuf>, library| {
        found.extend(program.map(|program| MpiLauncher { name, program, library }));
    };
    add("Open MPI", in_path("mpirun.openmpi"), None);
    add("MPICH", in_path("mpirun.mpich"), None);
    if let Some(wheel) = std::env::var_os("DSMOE_MPI_WHEEL").map(PathBuf::from) {
        let program = || Some(wheel.join("bin/mpiexec.hydra")).filter(|path| path.exists());
        add("the standard's interface", program(), None);
        add("MPICH of the wheel", program(), Some(wheel.join("lib/libmpi.so.12")));
    }
    if found.is_empty() {
        assert!(!required("mpi"), "{test} needs mpirun.openmpi, mpirun.mpich or DSMOE_MPI_WHEEL");
        skipped(test, "no launcher of MPI");
    }
    found
}

/// Returns the file `name` in a folder of `PATH`.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}
