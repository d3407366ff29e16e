//! The binary interfaces of MPI: one function table, and the values of a few constants.

use std::ffi::c_int;

/// A handle of any interface: a pointer, or an `int` in the lower half.
pub(super) type Handle = usize;

/// A binary interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abi {
    /// The one of MPI 5.0, `libmpi_abi.so.1`.
    Standard,
    /// That of MPICH and its relatives since 3.1: Intel MPI, Cray MPICH, MVAPICH.
    Mpich,
    /// That of Open MPI since 1.7.
    OpenMpi,
}

/// The constants that calls pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Words {
    /// `MPI_COMM_WORLD`.
    pub(super) world: Handle,
    /// `MPI_BYTE`.
    pub(super) byte: Handle,
    /// `MPI_ERRORS_RETURN`.
    pub(super) errors_return: Handle,
    /// `MPI_INFO_NULL`.
    pub(super) info_null: Handle,
    /// `MPI_STATUS_IGNORE`.
    pub(super) status_ignore: usize,
    /// `MPI_COMM_TYPE_SHARED`.
    pub(super) shared: c_int,
    /// `MPI_THREAD_SERIALIZED`.
    pub(super) serialized: c_int,
}

impl Abi {
    pub(super) fn name(self) -> &'static str {
        match self {
            Abi::Standard => "the standard's",
            Abi::Mpich => "MPICH's",
            Abi::OpenMpi => "Open MPI's",
        }
    }

    /// Returns the constants. `address` gives the addresses of variables of the library: Open MPI's handles are such.
    pub(super) fn words(self, address: impl Fn(&str) -> Option<usize>) -> Result<Words, String> {
        let variable = |name: &str| address(name).ok_or_else(|| format!("it lacks {name}"));
        Ok(match self {
            // MPI 5.0, appendix A.
            Abi::Standard => Words {
                world: 0x101,
                byte: 0x247,
                errors_return: 0x143,
                info_null: 0x130,
                status_ignore: 0,
                shared: 221,
                serialized: 2048,
            },
            Abi::Mpich => Words {
                world: 0x4400_0000,
                byte: 0x4c00_010d,
                errors_return: 0x5400_0001,
                info_null: 0x1c00_0000,
                status_ignore: 1,
                shared: 1,
                serialized: 2,
            },
            Abi::OpenMpi => Words {
                world: variable("ompi_mpi_comm_world")?,
                byte: variable("ompi_mpi_byte")?,
                errors_return: variable("ompi_mpi_errors_return")?,
                info_null: variable("ompi_mpi_info_null")?,
                status_ignore: 0,
                shared: 0,
                serialized: 2,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::{Abi, Words};
    use crate::testing::{required, skipped};

    /// Prints the constants by the header, in the order of [`Words`]; addresses of variables become 1 to 4.
    const PROGRAM: &str = r#"
        #include <stdio.h>
        #ifdef STANDARD
        #include <mpi_abi.h>
        #else
        #include <mpi.h>
        #endif
        static unsigned long number(unsigned long handle) {
        #ifdef OMPI_MAJOR_VERSION
          const void* variables[] = { &ompi_mpi_comm_world, &ompi_mpi_byte, &ompi_mpi_errors_return, &ompi_mpi_info_null };
          for (int i = 0; i < 4; i++) if (handle == (unsigned long)variables[i]) return i + 1;
        #endif
          return handle;
        }
        int main(void) {
          printf("%lu %lu %lu %lu ", number((unsigned long)MPI_COMM_WORLD), number((unsigned long)MPI_BYTE),
            number((unsigned long)MPI_ERRORS_RETURN), number((unsigned long)MPI_INFO_NULL));
          printf("%lu %d %d\n", (unsigned long)MPI_STATUS_IGNORE, MPI_COMM_TYPE_SHARED, MPI_THREAD_SERIALIZED);
          return 0;
        }"#;

    /// Returns what [`PROGRAM`] prints, built by `compiler`; none where that does not run or finds no header.
    fn printed(compiler: &str, arguments: &[String]) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        let [source, program] = ["words.c", "words"].map(|name| dir.path().join(name));
        fs::write(&source, PROGRAM).unwrap();
        let built =
            Command::new(compiler).arg(&source).arg("-o").arg(&program).args(arguments).output().ok()?;
        let said = String::from_utf8_lossy(&built.stderr);
        if !built.status.success() {
            assert!(said.contains("mpi.h") || said.contains("not found"), "{compiler}: {said}");
            return None;
        }
        let output = Command::new(&program).output().unwrap();
        Some(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }

    fn words(abi: Abi) -> String {
        let names = ["ompi_mpi_comm_world", "ompi_mpi_byte", "ompi_mpi_errors_return", "ompi_mpi_info_null"];
        let address = |name: &str| names.iter().position(|other| *other == name).map(|i| i + 1);
        let Words { world, byte, errors_return, info_null, status_ignore, shared, serialized } =
            abi.words(address).unwrap();
        format!("{world} {byte} {errors_return} {info_null} {status_ignore} {shared} {serialized}")
    }

    #[test]
    fn constants_are_those_of_the_installed_headers() {
        let name = "constants_are_those_of_the_installed_headers";
        // The folder of the wheel `mpich`, which holds the standard's header.
        let wheel = std::env::var("DSMOE_MPI_WHEEL").unwrap_or_default();
        let standard = ["-DSTANDARD".to_owned(), format!("-I{wheel}/include")];
        let mut found = 0;
        for (abi, compiler, arguments) in [
            (Abi::OpenMpi, "mpicc.openmpi", &[][..]),
            (Abi::Mpich, "mpicc.mpich", &[][..]),
            (Abi::Mpich, "cc", &standard[1..]),
            (Abi::Standard, "cc", &standard[..]),
        ] {
            if compiler == "cc" && wheel.is_empty() {
                skipped(name, "DSMOE_MPI_WHEEL is not set");
                continue;
            }
            match printed(compiler, arguments) {
                Some(printed) => assert_eq!(printed, words(abi), "{abi:?} by {compiler}"),
                None => {
                    skipped(name, &format!("no header for {compiler}"));
                    continue;
                }
            }
            found += 1;
        }
        assert!(found > 0 || !required("mpi"), "no header of MPI is found");
    }

    #[test]
    fn a_library_without_a_handle_is_refused() {
        let error = Abi::OpenMpi.words(|name| (name != "ompi_mpi_byte").then_some(8)).unwrap_err();
        assert_eq!(error, "it lacks ompi_mpi_byte");
    }
}
