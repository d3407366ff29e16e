//! How this process was started, from the variables that launchers set.

use std::fmt;

/// A kind of launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// A launcher that speaks PMI: MPICH's and Intel MPI's `mpiexec`, `srun --mpi=pmi2`.
    Pmi,
    /// A launcher that speaks PMIx: `srun --mpi=pmix`, `prun`.
    Pmix,
    /// `torchrun`, or another launcher of GPU programs that sets `RANK` and `WORLD_SIZE`.
    Torchrun,
}

/// A start by a launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The launcher.
    pub by: Launcher,
    /// The number of processes, where the launcher tells it.
    pub size: Option<usize>,
}

impl Launch {
    /// Returns how this process was started; none without a launcher.
    pub fn this() -> Option<Launch> {
        Launch::read(|name| std::env::var(name).ok())
    }

    /// Reads the variables of a process. Those of a job count for nothing: `sbatch` sets `SLURM_NTASKS` for a single process
    /// too.
    fn read(variable: impl Fn(&str) -> Option<String>) -> Option<Launch> {
        let is_set = |name: &str| variable(name).is_some();
        let number = |name: &str| variable(name)?.trim().parse().ok();
        if is_set("OMPI_COMM_WORLD_SIZE") {
            Some(Launch { by: Launcher::OpenMpi, size: number("OMPI_COMM_WORLD_SIZE") })
        } else if is_set("PMI_SIZE") {
            Some(Launch { by: Launcher::Pmi, size: number("PMI_SIZE") })
        } else if is_set("PMIX_RANK") {
            Some(Launch { by: Launcher::Pmix, size: number("SLURM_STEP_NUM_TASKS") })
        } else if is_set("RANK") && is_set("WORLD_SIZE") {
            Some(Launch { by: Launcher::Torchrun, size: number("WORLD_SIZE") })
        } else {
            None
        }
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.by {
            Launcher::OpenMpi => "Open MPI's mpirun",
            Launcher::Pmi => "PMI (MPICH's or Intel's mpiexec, or srun)",
            Launcher::Pmix => "PMIx (srun or prun)",
            Launcher::Torchrun => "torchrun (RANK and WORLD_SIZE)",
        })?;
        match self.size {
            Some(1) => f.write_str(", 1 process"),
            Some(size) => write!(f, ", {size} processes"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Launch, Launcher};

    #[test]
    fn launchers_are_recognised_by_their_variables() {
        let read = |variables: &[(&str, &str)]| {
            let value =
                |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, v)| (*v).to_owned());
            Launch::read(value).map(|launch| (launch.by, launch.size))
        };
        let pmix = ("PMIX_RANK", "0");
        assert_eq!(read(&[("OMPI_COMM_WORLD_SIZE", "4"), pmix]), Some((Launcher::OpenMpi, Some(4))));
        assert_eq!(read(&[("PMI_SIZE", "2"), ("PMI_RANK", "1")]), Some((Launcher::Pmi, Some(2))));
        assert_eq!(read(&[pmix]), Some((Launcher::Pmix, None)));
        assert_eq!(read(&[pmix, ("SLURM_STEP_NUM_TASKS", "8")]), Some((Launcher::Pmix, Some(8))));
        assert_eq!(read(&[("RANK", "0"), ("WORLD_SIZE", "8")]), Some((Launcher::Torchrun, Some(8))));
        assert_eq!(read(&[("PMI_SIZE", "two")]), Some((Launcher::Pmi, None)));
        for others in
            [&[("SLURM_NTASKS", "64"), ("SLURM_STEP_NUM_TASKS", "8")], &[("RANK", "0"), ("PMI_RANK", "0")]]
        {
            assert_eq!(read(others), None);
        }
    }

    #[test]
    fn launches_are_worded() {
        let launch = |by, size| Launch { by, size }.to_string();
        assert_eq!(launch(Launcher::OpenMpi, Some(4)), "Open MPI's mpirun, 4 processes");
        assert_eq!(launch(Launcher::Torchrun, Some(1)), "torchrun (RANK and WORLD_SIZE), 1 process");
        assert_eq!(launch(Launcher::Pmix, None), "PMIx (srun or prun)");
    }
}
