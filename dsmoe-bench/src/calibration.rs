//! Calibration text of the commands that make models.

use anyhow::{Context, Result, bail};
use dsmoe_core::config::Config;
use dsmoe_datasets::mixture::from_words;
use dsmoe_datasets::tasks::sha256;
use dsmoe_datasets::{Bos, CorpusOptions, Mixture, SplitOptions};
use dsmoe_kernels::comm::{Communicator, What};
use dsmoe_train::TrainConfig;
use serde::Serialize;

use std::path::{Path, PathBuf};

use crate::cli::prune::CalibrationArgs;
use crate::files::lossy;
use crate::models::tokenizer;
use crate::processes::agree;
use crate::progress::{Progress, Unit};
use crate::texts::{Text, find, load};
use crate::ui::Ui;

/// Default length of a calibration sequence.
const SEQ: usize = 1024;

/// The calibration text of a report.
#[derive(Debug, Serialize)]
pub(crate) struct CalibrationReport<'a> {
    #[serde(serialize_with = "lossy")]
    data: &'a [PathBuf],
    bos: Bos,
    samples: usize,
    seq: usize,
}

impl<'a> CalibrationReport<'a> {
    pub(crate) fn new(args: &'a CalibrationArgs, config: &Config) -> CalibrationReport<'a> {
        let (samples, seq) = (args.samples as usize, seq(args, config));
        CalibrationReport { data: &args.calib, bos: args.bos, samples, seq }
    }
}

fn seq(args: &CalibrationArgs, config: &Config) -> usize {
    args.seq.unwrap_or(SEQ.min(config.max_position))
}

/// Reads sequences of the training side of the text, in the order in which a run of this seed trains on them.
pub(crate) fn read(
    args: &CalibrationArgs,
    model: &Path,
    config: &Config,
    seed: u64,
    ui: &Ui,
) -> Result<Vec<Vec<u32>>> {
    let seq = seq(args, config);
    if seq == 0 || seq > config.max_position {
        bail!("--seq {seq} is not in 1..={}, the positions of the model", config.max_position);
    }
    let sources = load(&found(args)?, &tokenizer(model, config, ui)?, args.bos, None, ui)?;
    let split = SplitOptions { seq, ..TrainConfig::default().split_options() };
    let mixture = Mixture::new(&sources, split, None)?;
    let sequences = mixture.sequences(args.samples as usize, seed);
    sequences.with_context(|| format!("--calib with --samples {} and --seq {seq}", args.samples))
}

/// Finds the text without reading it.
fn found(args: &CalibrationArgs) -> Result<Vec<Text>> {
    let defaults = CorpusOptions::default();
    let options = CorpusOptions {
        doc_separator: args.doc_separator.clone(),
        text_column: args.text_column.clone().unwrap_or(defaults.text_column),
        selection: defaults.selection,
    };
    find(from_words(&args.calib, &options)?)
}

/// Refuses text that is not there, for plans.
pub(crate) fn check_text(args: &CalibrationArgs) -> Result<()> {
    if args.calib.is_empty() { Ok(()) } else { found(args).map(drop) }
}

/// Does as [`read`] in all processes of `comm`.
pub(crate) fn read_on(
    comm: &dyn Communicator,
    args: &CalibrationArgs,
    (model, config): (&Path, &Config),
    seed: u64,
    ui: &Ui,
) -> Result<Vec<Vec<u32>>> {
    agree(comm, What::of("the calibration text"), read(args, model, config, seed, ui))
}

/// Returns a hash of sequences, for a comparison of processes.
pub(crate) fn identity(sequences: &[Vec<u32>]) -> String {
    let words = sequences.iter().map(|ids| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "));
    sha256(&words.collect::<Vec<_>>().join("\n"))[..12].to_owned()
}

/// Progress of stages that follow each other.
pub(crate) struct Stages<'a> {
    ui: &'a Ui,
    shown: Option<(&'static str, Progress)>,
}

impl<'a> Stages<'a> {
    pub(crate) fn new(ui: &'a Ui) -> Stages<'a> {
        Stages { ui, shown: None }
    }

    pub(crate) fn set(&mut self, stage: &'static str, done: u64, total: u64) {
        if self.shown.as_ref().is_some_and(|(shown, _)| *shown != stage) {
            self.finish();
        }
        let shown =
            self.shown.get_or_insert_with(|| (stage, Progress::new(self.ui, stage, Unit::Parts, total)));
        shown.1.set(done, total, "");
    }

    pub(crate) fn finish(&mut self) {
        if let Some((_, progress)) = self.shown.take() {
            progress.finish();
        }
    }
}
