//! The arguments of commands that several processes share.

use clap::Args;
use dsmoe_kernels::comm::{Engine, Settings};

use super::values::words;

/// The heading of options of several processes.
const PROCESSES: &str = "Processes";

#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Engine between the processes that share the work: mpi for those that mpirun or srun started, tcp for those of torchrun,
    /// none for a single process, auto to decide by the launcher's variables
    #[arg(help_heading = PROCESSES, long, default_value = "auto", value_parser = words::<EngineWord>(&["auto", "none", "mpi", "tcp"]))]
    pub(crate) dist: EngineWord,
    /// Seconds that one exchange between processes may take within a step; three times that outside of steps
    #[arg(help_heading = PROCESSES, long, value_name = "SECONDS", default_value_t = Settings::DEADLINE.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub(crate) deadline: u64,
}

/// An engine by its word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EngineWord(pub(crate) Engine);

impl std::str::FromStr for EngineWord {
    type Err = String;

    fn from_str(word: &str) -> Result<EngineWord, String> {
        match word {
            "auto" => Ok(EngineWord(Engine::Auto)),
            "none" => Ok(EngineWord(Engine::None)),
            "mpi" => Ok(EngineWord(Engine::Mpi)),
            "tcp" => Ok(EngineWord(Engine::Tcp)),
            _ => Err(format!("no engine `{word}`")),
        }
    }
}
