//! The library of MPI and the launcher that `dsmoe doctor` reports.

use dsmoe_kernels::comm::{Launch, find_mpi};
use serde::Serialize;

#[derive(Debug, Default, Serialize)]
pub(crate) struct Mpi {
    /// The library that several processes would use, its binary interface and its version, where one is found.
    library: Option<String>,
    interface: Option<String>,
    version: Option<String>,
    /// The launcher that started this process, if one did.
    launcher: Option<String>,
    /// The defect and its fix.
    problem: Option<String>,
}

pub(crate) fn mpi() -> Mpi {
    let launcher = Launch::this().map(|launch| launch.to_string());
    match find_mpi() {
        Ok(found) => Mpi {
            library: Some(found.name),
            interface: Some(found.interface.to_owned()),
            version: Some(found.version),
            launcher,
            problem: None,
        },
        Err(error) => Mpi { launcher, problem: Some(error.to_string()), ..Mpi::default() },
    }
}

impl Mpi {
    /// Returns named lines.
    pub(crate) fn fields(&self) -> Vec<(&str, String)> {
        let library = match (&self.library, &self.interface, &self.version) {
            (Some(library), Some(interface), Some(version)) => {
                format!("{library} with {interface} binary interface, {version}")
            }
            _ => self.problem.clone().unwrap_or_default(),
        };
        let launcher = self.launcher.iter().map(|launcher| ("started by", launcher.clone()));
        [("MPI", library)].into_iter().chain(launcher).collect()
    }
}
