//! The start of an engine.

use super::alone::Alone;
use super::communicator::Communicator;
#[cfg(not(all(feature = "mpi", unix, target_endian = "little", target_pointer_width = "64")))]
use super::error::CommError;
use super::error::Result;
use super::launch::{Launch, Launcher};
use super::settings::Settings;
use super::tcp::Tcp;

/// The engine that moves bytes between processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// That of the launcher which started several processes, else none.
    #[default]
    Auto,
    /// None: a single process.
    None,
    /// MPI.
    Mpi,
    /// TCP, by the variables of `torchrun`.
    Tcp,
}

/// Starts `engine`. Call it once, before threads are started, and drop the communicator in the same thread.
///
/// # Errors
/// No library is found, the library is another one than the launcher's, or it fails its self-test.
pub fn start(engine: Engine, settings: Settings) -> Result<Box<dyn Communicator>> {
    match chosen(engine, Launch::this()) {
        Engine::Mpi => start_mpi(settings),
        Engine::Tcp => Ok(Box::new(Tcp::start(settings)?)),
        Engine::Auto | Engine::None => Ok(Box::new(Alone)),
    }
}

/// Decides for an engine.
fn chosen(engine: Engine, launch: Option<Launch>) -> Engine {
    let Some(launch) = launch.filter(|launch| engine == Engine::Auto && launch.size != Some(1)) else {
        return engine;
    };
    match launch.by {
        Launcher::OpenMpi | Launcher::Pmi | Launcher::Pmix => Engine::Mpi,
        Launcher::Torchrun => Engine::Tcp,
    }
}

/// A library of MPI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MpiLibrary {
    /// Its file.
    pub name: String,
    /// Its binary interface.
    pub interface: &'static str,
    /// The first line of its own text.
    pub version: String,
}

/// Looks for the library of MPI that [`start`] would use, without starting it.
///
/// # Errors
/// None is found that can be used. The message names the attempts and help.
pub fn find_mpi() -> Result<MpiLibrary> {
    #[cfg(all(feature = "mpi", unix, target_endian = "little", target_pointer_width = "64"))]
    return super::mpi::find();
    #[cfg(not(all(feature = "mpi", unix, target_endian = "little", target_pointer_width = "64")))]
    Err(no_mpi())
}

fn start_mpi(settings: Settings) -> Result<Box<dyn Communicator>> {
    #[cfg(all(feature = "mpi", unix, target_endian = "little", target_pointer_width = "64"))]
    return Ok(Box::new(super::mpi::Mpi::start(settings)?));
    #[cfg(not(all(feature = "mpi", unix, target_endian = "little", target_pointer_width = "64")))]
    {
        let _ = settings;
        Err(no_mpi())
    }
}

#[cfg(not(all(feature = "mpi", unix, target_endian = "little", target_pointer_width = "64")))]
fn no_mpi() -> CommError {
    CommError::Start(
        "this program was built without MPI; build it with the feature `mpi` on a 64-bit Unix".to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::{Engine, chosen};
    use crate::comm::launch::{Launch, Launcher};

    #[test]
    fn the_engine_follows_the_launcher_unless_it_is_given() {
        let by = |by, size| Some(Launch { by, size });
        let auto = |launch| chosen(Engine::Auto, launch);
        assert_eq!(auto(None), Engine::Auto);
        assert_eq!(auto(by(Launcher::OpenMpi, Some(1))), Engine::Auto);
        assert_eq!(auto(by(Launcher::Torchrun, Some(1))), Engine::Auto);
        assert_eq!(auto(by(Launcher::OpenMpi, Some(2))), Engine::Mpi);
        assert_eq!(auto(by(Launcher::Pmi, Some(2))), Engine::Mpi);
        assert_eq!(auto(by(Launcher::Pmix, None)), Engine::Mpi);
        assert_eq!(auto(by(Launcher::Torchrun, Some(8))), Engine::Tcp);
        for given in [Engine::None, Engine::Mpi, Engine::Tcp] {
            assert_eq!(chosen(given, by(Launcher::Torchrun, Some(2))), given);
            assert_eq!(chosen(given, None), given);
        }
    }
}
