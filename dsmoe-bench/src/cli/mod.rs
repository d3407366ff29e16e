//! The command line: clap types alone, one file for each group of commands.

pub(crate) mod bench;
pub(crate) mod continual;
pub(crate) mod data;
pub(crate) mod doctor;
#[cfg(test)]
mod documents;
pub(crate) mod eval;
pub(crate) mod gates;
pub(crate) mod generate;
pub(crate) mod grow;
pub(crate) mod model;
pub(crate) mod oracle;
pub(crate) mod plan;
pub(crate) mod processes;
pub(crate) mod prune;
pub(crate) mod reconstruct;
pub(crate) mod reproduce;
pub(crate) mod resumable;
pub(crate) mod sweep;
pub(crate) mod train;
pub(crate) mod values;
pub(crate) mod verify;

use std::path::PathBuf;

use clap::{Args, ColorChoice, Parser, Subcommand};
use clap_complete::Shell;

use self::bench::Bench;
use self::continual::Continual;
use self::data::Data;
use self::doctor::Doctor;
use self::eval::Eval;
use self::generate::Generate;
use self::grow::Grow;
use self::model::{Convert, Export, Import, Init, Inspect};
use self::oracle::Oracle;
use self::plan::Plan;
use self::processes::ProcessArgs;
use self::prune::Prune;
use self::reconstruct::Reconstruct;
use self::reproduce::Reproduce;
use self::sweep::Sweep;
use self::train::Train;
use self::verify::Verify;

/// Convert a dense Hugging Face model into a DSMoE model, train it, measure its cost and quality, and generate text.
#[derive(Debug, Parser)]
#[command(name = "dsmoe", version, propagate_version = true, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print the result as one JSON object on stdout
    #[arg(long, global = true, help_heading = GLOBAL, display_order = 100)]
    pub(crate) json: bool,
    /// Print no progress and no notes on stderr
    #[arg(long, short, global = true, help_heading = GLOBAL, display_order = 101)]
    pub(crate) quiet: bool,
    /// Download a model that is named OWNER/NAME from the Hugging Face Hub, into the cache of its own tools; needs a build
    /// with the feature hub
    #[arg(long, global = true, help_heading = GLOBAL, display_order = 104)]
    pub(crate) hub: bool,
    /// Worker threads; results do not depend on it [default: all cores, divided by the processes that share them]
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "N", display_order = 102,
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Colours of help and errors; auto: on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "WHEN", display_order = 103, value_enum,
        default_value = "auto")]
    pub(crate) color: ColorChoice,
}

const GLOBAL: &str = "Global options";

const AFTER_HELP: &str = "\
Results go to stdout, progress and errors to stderr.

Exit status: 0 success; 1 error; 2 wrong usage; 3 result outside its tolerance; 130 interrupted.

Examples:
  dsmoe convert DENSE --calib corpus.jsonl.zst --active-target 37.5% --out MOE
  dsmoe train MOE --data corpus.jsonl.zst --teacher DENSE --tokens 100M --out RUN
  dsmoe eval RUN --data heldout.txt --against DENSE
  dsmoe reproduce

Environment: DSMOE_ISA=scalar|avx2|avx512|neon selects the instruction set; DSMOE_SHARED names the data folder that `dsmoe \
doctor` checks; DSMOE_CUDA_LIB_DIR names a folder with CUDA's libraries, such as nvidia/cu13/lib of PyTorch's wheels; \
DSMOE_CACHE_DIR names a folder for compiled GPU kernels [default: dsmoe in the user's cache folder].";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compare DSMoE with the paper's baselines at one budget, with every table and figure of the paper in one report
    Reproduce(Box<Reproduce>),
    /// Show the configuration, layout, parameters and FLOPs of a model; reads headers only
    Inspect(Inspect),
    /// Convert a dense model (Hugging Face directory or GGUF file) into a DSMoE directory
    Convert(Convert),
    /// Make a model with fewer activated parameters by DSMoE or one of the methods that it is compared with
    Prune(Prune),
    /// Make a dense model deeper, by layers between its own
    Grow(Grow),
    /// Train the FFNs of a converted model, layer by layer, to give what the dense ones give
    Reconstruct(Reconstruct),
    /// List these methods with their settings
    #[command(after_help = "Examples:\n  dsmoe methods\n  dsmoe methods --json")]
    Methods,
    /// Write a model for transformers (Python), as a dense model, as GGUF, or in another precision
    Export(Export),
    /// Write the model of a GGUF file as a Hugging Face directory
    Import(Import),
    /// Train a DSMoE or dense model on text
    Train(Box<Train>),
    /// Train a model on tasks in a row and prune it meanwhile, and measure what it forgets
    Continual(Continual),
    /// Measure perplexity and the active share of experts on text, or score benchmarks
    Eval(Box<Eval>),
    /// Find the best route of every token through the layers, beside a control
    Oracle(Box<Oracle>),
    /// Measure loss, benchmarks and time of one model at several shares of active experts
    Sweep(Box<Sweep>),
    /// Choose the budget of every request by what a network of several heads predicts, under deadlines
    Plan(Plan),
    /// Continue a prompt
    Generate(Generate),
    /// Make a model with random weights in Hugging Face layout
    Init(Init),
    /// Show CPU features, threads, memory, GPUs and MPI, and report missing libraries and test data
    Doctor(Doctor),
    /// Compare models, runs, checkpoints and caches with the hashes that were written with them
    Verify(Verify),
    /// Prepare, verify, count and generate text for training; train a tokenizer
    Data(Data),
    /// Print a script that completes commands, options and values in a shell
    Completions(Completions),
    /// Print the manual page, or write those of all commands
    Man(Man),
    /// Time kernels, FFNs, training and decoding, and compare the times with the machine's limits
    Bench(Bench),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dsmoe completions bash > ~/.local/share/bash-completion/completions/dsmoe\n  \
    dsmoe completions zsh > ~/.zfunc/_dsmoe\n  dsmoe completions fish > ~/.config/fish/completions/dsmoe.fish"
)]
pub(crate) struct Completions {
    /// Shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dsmoe man | man -l -\n  dsmoe man --out ~/.local/share/man/man1")]
pub(crate) struct Man {
    /// Folder for the pages of all commands, in place of one page on stdout
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Replace pages that are there
    #[arg(long, requires = "out")]
    pub(crate) force: bool,
}

impl Command {
    /// Returns how processes are connected that share the command; none for a command of a single process.
    pub(crate) fn processes(&self) -> Option<&ProcessArgs> {
        match self {
            Command::Train(args) => Some(&args.processes),
            Command::Eval(args) => Some(&args.processes),
            Command::Prune(args) => Some(&args.processes),
            Command::Convert(args) => Some(&args.processes),
            _ => None,
        }
    }

    /// Returns the models that the command reads by a path which may be a name on the Hugging Face Hub.
    pub(crate) fn models(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Command::Reproduce(args) => args.model.iter_mut().collect(),
            Command::Inspect(args) => vec![&mut args.model],
            Command::Convert(args) => vec![&mut args.model],
            Command::Prune(args) => vec![&mut args.model],
            Command::Grow(args) => vec![&mut args.model],
            Command::Reconstruct(args) => vec![&mut args.model, &mut args.teacher],
            Command::Export(args) => vec![&mut args.model],
            Command::Import(args) => vec![&mut args.model],
            Command::Train(args) => args.teacher.iter_mut().chain([&mut args.model]).collect(),
            Command::Oracle(args) => vec![&mut args.model],
            Command::Eval(args) => args.against.iter_mut().chain([&mut args.model]).collect(),
            Command::Sweep(args) => args.against.iter_mut().chain([&mut args.model]).collect(),
            Command::Generate(args) => vec![&mut args.model],
            Command::Continual(args) => vec![&mut args.model],
            Command::Plan(args) => args.models(),
            Command::Bench(args) => args.models(),
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    /// Returns the texts after the options of a command and of those below it.
    fn after_help(command: &clap::Command) -> Vec<String> {
        let own = command.get_after_help().map(ToString::to_string);
        own.into_iter().chain(command.get_subcommands().flat_map(after_help)).collect()
    }

    /// Returns the words of a line for a shell; what stands between single quotes is one word.
    fn words(line: &str) -> Vec<String> {
        let word = |(i, part): (usize, &str)| match i % 2 {
            0 => part.split_whitespace().map(str::to_owned).collect(),
            _ => vec![part.to_owned()],
        };
        line.split('\'').enumerate().flat_map(word).collect()
    }

    #[test]
    fn examples_of_the_help_are_command_lines() {
        use clap::CommandFactory;
        let texts = after_help(&Cli::command());
        let examples = texts.iter().flat_map(|text| text.lines()).map(str::trim_start);
        let examples = examples.filter(|line| line.starts_with("dsmoe ")).flat_map(|line| {
            // A comment ends the line; other commands of a shell may follow.
            let line = line.split("  #").next().unwrap_or_default();
            line.split("; ").map(|part| part.split(['>', '|']).next().unwrap_or_default())
        });
        let mut parsed = 0;
        for example in examples {
            let outcome = Cli::try_parse_from(words(example));
            assert!(outcome.is_ok(), "{example}: {}", outcome.unwrap_err());
            parsed += 1;
        }
        assert!(parsed > 50, "{parsed} examples");
    }
}
