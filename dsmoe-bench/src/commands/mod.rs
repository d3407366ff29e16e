//! One module per command.

pub(crate) mod bench;
mod convert;
pub(crate) mod data;
pub(crate) mod demo;
pub(crate) mod doctor;
mod eval;
pub(crate) mod export;
mod generate;
mod gpu;
mod init;
mod inspect;
mod methods;
mod prune;
pub(crate) mod reproduce;
pub(crate) mod sources;
pub(crate) mod train;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use dsmoe_core::accounting::Accounting;
use dsmoe_core::config::Config;
use dsmoe_core::{Device, Inference, Model};
use dsmoe_datasets::{Bos, Corpus, CorpusOptions, TokenStream, Tokenizer};
use dsmoe_kernels::{Isa, Precision};

use crate::cli::{Cli, Command};
use crate::memory;
use crate::progress::{Progress, Unit};
use crate::ui::{Ui, stderr_line};

/// What a shell reports for a program ended by Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// Raised by Ctrl-C or SIGTERM once [`catch_interrupts`] was called.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);

pub(crate) fn run(cli: Cli, ui: &mut Ui) -> Result<ExitCode> {
    Isa::from_env()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cli.threads.map_or(0, usize::from));
    pool.build_global().context("cannot start the worker threads; use a smaller --threads")?;
    match &cli.command {
        Command::Inspect(args) => inspect::run(args, ui)?,
        Command::Convert(args) => convert::run(args, ui)?,
        Command::Prune(args) => prune::run(args, ui)?,
        Command::Methods => methods::run(ui)?,
        Command::Export(args) => export::run(args, ui)?,
        Command::Train(args) => return train::run(args, cli.threads, ui),
        Command::Eval(args) => return eval::run(args, ui),
        Command::Generate(args) => generate::run(args, ui)?,
        Command::Init(args) => init::run(args, ui)?,
        Command::Doctor(args) => doctor::run(args, ui)?,
        Command::Demo(args) => return demo::run(args, ui),
        Command::Bench(args) => return bench::run(args, ui),
        Command::Data(args) => return data::run(args, ui),
        Command::Reproduce(args) => return reproduce::run(args, ui),
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes the first Ctrl-C or SIGTERM raise the flag it returns, and the second end the process.
pub(crate) fn catch_interrupts() -> Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        stderr_line("dsmoe: stopping after this step; interrupt again to stop at once");
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(&STOP)
}

/// The tokenizer of the model in `dir`.
pub(crate) fn tokenizer(dir: &Path, config: &Config) -> Result<Tokenizer> {
    Ok(Tokenizer::load(dir, config.bos_token_id, config.vocab_size)?)
}

/// The BOS rule asked for; without one, always for a model that has the token.
fn bos_or_default(asked: Option<Bos>, config: &Config) -> Bos {
    asked.unwrap_or(if config.bos_token_id.is_some() { Bos::Always } else { Bos::Never })
}

/// Loads a model for training.
fn load_model(dir: &Path) -> Result<Model> {
    check_memory(dir, Precision::F32)?;
    Ok(Model::load(dir)?)
}

/// Refuses a model whose weights do not fit into memory.
fn check_memory(dir: &Path, precision: Precision) -> Result<()> {
    let params = Accounting::of(&Config::load(dir)?).total;
    let what = format!("{}: the model in {precision}", dir.display());
    let needed = precision.bytes() as u64 * params;
    memory::check(&what, needed, memory::total(), "use a machine with more, or a smaller model")
}

/// What `device` computes in unless a person asks for something: what a model is stored in, or else f32; a GPU knows bf16
/// alone.
pub(crate) fn default_precision(device: Device, stored: Precision) -> Precision {
    if device.is_gpu() { Precision::Bf16 } else { stored }
}

/// Loads a model for inference, with another threshold if one is given.
pub(crate) fn load_inference(
    dir: &Path,
    precision: Precision,
    device: Device,
    threshold: Option<f32>,
) -> Result<Inference> {
    if !device.is_gpu() {
        check_memory(dir, precision)?;
    }
    let mut model = Inference::load_on(dir, precision, device)?;
    if let Some(threshold) = threshold {
        model.set_threshold(threshold)?;
    }
    Ok(model)
}

fn open_corpus(data: &[PathBuf], doc_separator: Option<String>, text_column: String) -> Result<Corpus> {
    Ok(Corpus::open(data, CorpusOptions { doc_separator, text_column })?)
}

fn tokenize(corpus: &Corpus, tokenizer: &Tokenizer, bos: Bos, ui: &Ui) -> Result<TokenStream> {
    let total = corpus.total_bytes();
    let mut progress = Progress::new(ui, "reading text", Unit::Bytes, total);
    let stream =
        dsmoe_datasets::tokenize(corpus, tokenizer, bos, None, &mut |done| progress.set(done, total, ""));
    progress.finish();
    Ok(stream?)
}
