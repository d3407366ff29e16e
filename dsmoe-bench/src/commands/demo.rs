//! `dsmoe demo`: the whole path on a small generated text.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dsmoe_core::checkpoint::copy_companions;
use dsmoe_core::config::Config;
use dsmoe_core::convert::{ConvertOptions, convert};
use dsmoe_core::generate::{GenerateOptions, generate};
use dsmoe_core::init::{InitOptions, LlamaSizes, init};
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::{Bos, DOC_SEPARATOR, TokenStream, Tokenizer, synthetic_text, train_bpe};
use dsmoe_kernels::Precision;
use dsmoe_router::RouterInit;
use dsmoe_train::config::TrainConfig;
use dsmoe_train::eval::EvalOptions;
use dsmoe_train::run::{RunOptions, Trainer};
use serde::Serialize;

use super::eval::measure;
use super::train::drive;
use super::{INTERRUPTED, catch_interrupts, open_corpus, tokenize, tokenizer};
use crate::cli::Demo;
use crate::format::{self, Table};
use crate::ui::Ui;

/// Training steps of each of the three runs.
pub(crate) const STEPS: u64 = 300;
const TEXT_BYTES: usize = 1_500_000;
const VOCAB: usize = 1024;
const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 384;
const LAYERS: usize = 4;
const EXPERTS: usize = 8;
const ACTIVE_TARGET: f64 = 0.5;
const SEQ: usize = 128;
const BATCH: usize = 8;
const DENSE_LR: f64 = 4e-3;
const CONTINUED_LR: f64 = 1e-3;
const VALID_FRACTION: f64 = 0.03;
const DECODED_TOKENS: usize = 384;
const SAMPLE_TOKENS: usize = 96;
/// Speeds are the best of this many measurements.
const SPEED_ROUNDS: usize = 3;

#[derive(Debug, Serialize)]
struct Report {
    seed: u64,
    steps: u64,
    active_target: f64,
    held_out_tokens: usize,
    models: Vec<Row>,
    prompt: String,
    sample: String,
    seconds: f64,
    out: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Row {
    model: &'static str,
    training_tokens: u64,
    ppl: f64,
    nll: f64,
    params_total: u64,
    params_activated: f64,
    active_ratio: Option<f64>,
    decode_tokens_per_s: f64,
    eval_tokens_per_s: f64,
}

pub(crate) fn run(args: &Demo, ui: &mut Ui) -> Result<ExitCode> {
    let started = Instant::now();
    catch_interrupts()?;
    let temporary = match &args.out {
        Some(_) => None,
        None => Some(tempfile::tempdir().context("cannot make a temporary directory; use --out DIR")?),
    };
    let dir = args.out.as_deref().or(temporary.as_ref().map(|dir| dir.path())).context("no directory")?;
    make_empty(dir)?;
    let demo = DemoRun { dir, seed: args.seed, steps: args.steps, ui: *ui };

    let Some(mut report) = demo.run()? else {
        ui.note("demo interrupted");
        return Ok(ExitCode::from(INTERRUPTED));
    };
    report.seconds = started.elapsed().as_secs_f64();
    report.out.clone_from(&args.out);
    ui.result(&report, show)?;
    Ok(ExitCode::SUCCESS)
}

fn make_empty(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    let mut entries = std::fs::read_dir(dir).with_context(|| format!("{}", dir.display()))?;
    if entries.next().is_some() {
        bail!("{} is not empty; choose another --out", dir.display());
    }
    Ok(())
}

struct DemoRun<'a> {
    dir: &'a Path,
    seed: u64,
    steps: u64,
    ui: Ui,
}

impl DemoRun<'_> {
    /// `None` when interrupted.
    fn run(&self) -> Result<Option<Report>> {
        self.ui.note(format_args!("writing {} of text and a tokenizer", format::bytes(TEXT_BYTES as u64)));
        let text_file = self.path("text.txt");
        let text = synthetic_text(self.seed, TEXT_BYTES);
        std::fs::write(&text_file, &text).with_context(|| format!("{}", text_file.display()))?;
        let tokenizer_dir = self.path("tokenizer");
        let vocab = train_bpe(text.split(DOC_SEPARATOR).map(str::to_owned), VOCAB, &tokenizer_dir)?;

        let random = self.path("random");
        let config = architecture(vocab)?;
        let options = InitOptions { seed: self.seed, ..InitOptions::default() };
        init(&config, &random, &options, &mut |_| {})?;
        copy_companions(&tokenizer_dir, &random)?;
        let tokenizer = tokenizer(&random, &config)?;
        let corpus = open_corpus(&[text_file], Some(DOC_SEPARATOR.to_owned()), "text".to_owned())?;
        let stream = tokenize(&corpus, &tokenizer, Bos::Always, &self.ui)?;

        let (dense, dsmoe, continued) =
            (self.path("dense"), self.path("dsmoe"), self.path("dense-continued"));
        let Some(held_out) = self.train(&random, &dense, &stream, DENSE_LR, None)? else { return Ok(None) };
        let converted = self.path("dsmoe-start");
        let options = ConvertOptions {
            router_init: RouterInit::Random,
            routers: None,
            seed: self.seed,
            ..ConvertOptions::new(EXPERTS)
        };
        convert(&dense, &converted, &options, &mut |_| {})?;
        if self.train(&converted, &dsmoe, &stream, CONTINUED_LR, Some(ACTIVE_TARGET))?.is_none()
            || self.train(&dense, &continued, &stream, CONTINUED_LR, None)?.is_none()
        {
            return Ok(None);
        }

        let prompt = prompt(&text);
        let prompt_ids = tokenizer.encode(&prompt, Bos::Always)?;
        let mut models = Vec::new();
        for (name, path, runs) in
            [("dense", &dense, 1), ("dense, continued", &continued, 2), ("DSMoE, 8 experts", &dsmoe, 2)]
        {
            let model = Inference::load(path, Precision::F32)?;
            let result = measure(&model, &held_out, EvalOptions::new(SEQ), &self.ui)?;
            let row = Row {
                model: name,
                training_tokens: runs * self.steps * (SEQ * BATCH) as u64,
                ppl: result.ppl,
                nll: result.nll,
                params_total: result.params_total,
                params_activated: result.params_activated,
                active_ratio: result.active_ratio,
                decode_tokens_per_s: 0.0,
                eval_tokens_per_s: result.tokens_per_s,
            };
            models.push((model, row));
        }
        let mut new_ids = Vec::new();
        // The models take turns, so that what else the machine does falls on all of them.
        for _ in 0..SPEED_ROUNDS {
            for (model, row) in &mut models {
                let result = measure(model, &held_out, EvalOptions::new(SEQ), &self.ui)?;
                row.eval_tokens_per_s = row.eval_tokens_per_s.max(result.tokens_per_s);
                let options = GenerateOptions { max_tokens: DECODED_TOKENS, ..GenerateOptions::default() };
                let generation = generate(model, &prompt_ids, &options, |_| true)?;
                let rate =
                    generation.tokens.len().saturating_sub(1) as f64 / generation.decode_seconds.max(1e-9);
                row.decode_tokens_per_s = row.decode_tokens_per_s.max(rate);
                new_ids = generation.tokens;
            }
        }
        new_ids.truncate(SAMPLE_TOKENS);
        let sample = continuation(&tokenizer, &prompt_ids, &new_ids)?;
        Ok(Some(Report {
            seed: self.seed,
            steps: self.steps,
            active_target: ACTIVE_TARGET,
            held_out_tokens: held_out.len(),
            models: models.into_iter().map(|(_, row)| row).collect(),
            prompt,
            sample,
            seconds: 0.0,
            out: None,
        }))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Trains the model in `source` into `out`; the held-out ids, or `None` when interrupted.
    fn train(
        &self,
        source: &Path,
        out: &Path,
        stream: &TokenStream,
        lr: f64,
        active_target: Option<f64>,
    ) -> Result<Option<Vec<u32>>> {
        let config = TrainConfig {
            steps: Some(self.steps),
            batch: BATCH,
            seq: SEQ,
            lr,
            active_target,
            valid_fraction: VALID_FRACTION,
            seed: self.seed,
            keep: 1,
            bos: Bos::Always,
            ..TrainConfig::default()
        };
        let options = RunOptions::new(source, out);
        let name = out.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut trainer = Trainer::new(Model::load(source)?, stream, config, options)?;
        let summary = drive(&mut trainer, &format!("training {name}"), out, &self.ui)?;
        Ok(summary.finished.then(|| trainer.mixture().parts()[0].split.valid_tokens().to_vec()))
    }
}

fn architecture(vocab: usize) -> Result<Config> {
    let sizes = LlamaSizes {
        vocab,
        hidden: HIDDEN,
        intermediate: INTERMEDIATE,
        layers: LAYERS,
        heads: 4,
        kv_heads: 2,
        positions: 512,
        bos_eos: [0, 1],
    };
    Ok(sizes.config()?)
}

/// The first words of the text.
fn prompt(text: &str) -> String {
    text.split_whitespace().take(4).collect::<Vec<_>>().join(" ")
}

/// The text of `new` as it follows the prompt.
fn continuation(tokenizer: &Tokenizer, prompt: &[u32], new: &[u32]) -> Result<String> {
    let before = tokenizer.decode(prompt, true)?;
    let all = tokenizer.decode(&[prompt, new].concat(), true)?;
    Ok(all.strip_prefix(&before).unwrap_or(&all).to_owned())
}

fn show(report: &Report) -> String {
    let mut table = Table::new([
        "model",
        "ppl",
        "parameters",
        "activated",
        "active share",
        "decode tokens/s",
        "eval tokens/s",
    ]);
    for row in &report.models {
        table.row([
            row.model.to_owned(),
            format!("{:.3}", row.ppl),
            format::count(row.params_total),
            format::count(row.params_activated.round() as u64),
            format::percent_or_dash(row.active_ratio),
            format!("{:.0}", row.decode_tokens_per_s),
            format!("{:.0}", row.eval_tokens_per_s),
        ]);
    }
    let kept = match &report.out {
        Some(out) => format!("models and runs are in {}", out.display()),
        None => "keep the models with --out DIR".to_owned(),
    };
    format!(
        "{}\n{} steps of {} tokens per run; perplexity on {} held-out tokens; speeds are the best of {SPEED_ROUNDS} rounds;\n{} in all; {kept}\n\nDSMoE continues \"{}\":\n{}\n",
        table.show(),
        report.steps,
        SEQ * BATCH,
        format::count(report.held_out_tokens as u64),
        format::duration(report.seconds),
        report.prompt,
        report.sample.trim_end()
    )
}
