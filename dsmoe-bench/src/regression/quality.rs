//! The quality suite: a short training with fixed seeds. Its numbers are bit-identical on one machine.

use std::path::Path;

use anyhow::{Context, Result, bail};
use dsmoe_core::checkpoint::copy_companions;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::init::{InitOptions, LlamaSizes, init};
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::world::{Domain, World};
use dsmoe_datasets::{Bos, Corpus, CorpusOptions, DOC_SEPARATOR, TokenStream, tokenize, train_bpe};
use dsmoe_kernels::Precision;
use dsmoe_train::config::TrainConfig;
use dsmoe_train::eval::EvalOptions;
use dsmoe_train::run::{RunOptions, Trainer};

use super::file::{Benchmark, Kind};
use crate::evaluation::measure as evaluate;
use crate::files::write;
use crate::models::tokenizer;
use crate::training::drive;
use crate::ui::Ui;

/// Bytes of text of all domains.
const TEXT_BYTES: u64 = 60_000;
const VOCAB: usize = 512;
const SEQ: usize = 64;
const STEPS: u64 = 80;
const EXPERTS: usize = 8;
const ACTIVE_TARGET: f64 = 0.5;

/// Trains a dense model from random weights, converts it, and trains the experts until half of them are active.
pub(crate) fn measure(ui: &Ui) -> Result<Vec<Benchmark>> {
    ui.note("measuring quality");
    let ui = Ui { quiet: true, ..ui.clone() };
    let temporary = tempfile::tempdir().context("cannot make a temporary directory; set TMPDIR")?;
    let dir = temporary.path();
    let world = World::new(0);
    let texts: Vec<String> =
        Domain::ALL.into_iter().flat_map(|domain| world.documents(domain, TEXT_BYTES)).collect();
    let file = dir.join("text.txt");
    write(&file, texts.join(DOC_SEPARATOR))?;

    let start = dir.join("start");
    let vocab = train_bpe(texts.into_iter(), VOCAB, dir)?;
    let bos_eos = [0, 1];
    let config = LlamaSizes {
        vocab,
        hidden: 64,
        intermediate: 256,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        positions: 128,
        bos_eos,
    }
    .config()?;
    init(&config, &start, &InitOptions::default(), &mut |_| {})?;
    copy_companions(dir, &start)?;
    let tokenizer = tokenizer(&start, &config, &ui)?;
    let options = CorpusOptions { doc_separator: Some(DOC_SEPARATOR.to_owned()), ..CorpusOptions::default() };
    let corpus = Corpus::open(&[file], options)?;
    let stream = tokenize(&corpus, &tokenizer, Bos::Always, None, &mut |_| {})?;

    let (dense, cut, dsmoe) = (dir.join("dense"), dir.join("cut"), dir.join("dsmoe"));
    let mut numbers = train(&start, &dense, &stream, 4e-3, None, &ui)?;
    convert(&dense, &cut, &ConvertOptions::new(EXPERTS), &mut |_| {})?;
    numbers.extend(train(&cut, &dsmoe, &stream, 1e-3, Some(ACTIVE_TARGET), &ui)?);
    Ok(numbers)
}

/// Trains the model in `source` into `out` and evaluates it on the held-out text.
fn train(
    source: &Path,
    out: &Path,
    stream: &TokenStream,
    lr: f64,
    active_target: Option<f64>,
    ui: &Ui,
) -> Result<Vec<Benchmark>> {
    let config = TrainConfig {
        steps: Some(STEPS),
        batch: 8,
        seq: SEQ,
        lr,
        active_target,
        valid_fraction: 0.05,
        keep: 1,
        bos: Bos::Always,
        ..TrainConfig::default()
    };
    let options = RunOptions::new(source, out);
    let name = if active_target.is_some() { "dsmoe" } else { "dense" };
    let mut trainer = Trainer::new(Model::load(source)?, stream, config, options)?;
    if !drive(&mut trainer, name, out, ui)?.finished {
        bail!("the training of the quality suite was interrupted; run it again");
    }
    let held_out = trainer.mixture().parts()[0].split.valid_tokens().to_vec();
    let model = Inference::load(out, Precision::F32)?;
    let result = evaluate(&model, &held_out, EvalOptions::new(SEQ), ui)?;
    let exact =
        |what: &str, value| Benchmark::exact(format!("quality/{name}/{what}"), Kind::Quality, what, value);
    let mut numbers = vec![exact("perplexity", result.ppl)];
    numbers.extend(result.active_ratio.map(|share| exact("active_share", share)));
    Ok(numbers)
}
