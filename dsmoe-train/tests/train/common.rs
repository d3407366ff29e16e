//! A tiny model, a tiny text, and a run on them.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::{Config, MoeConfig};
use dsmoe_core::init::LlamaSizes;
use dsmoe_core::{Inference, Model};
use dsmoe_datasets::TokenStream;
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::RouterConfig;
use dsmoe_train::{
    EvalReport, Observer, Outcome, Result, RunOptions, StepRecord, TrainConfig, TrainData, Trainer,
};
use serde_json::Value;

pub(crate) const VOCAB: usize = 48;

/// Configuration of a model of 2 layers, hidden 32: DSMoE with 4 experts, or dense.
pub(crate) fn config(experts: bool) -> Config {
    let [hidden, intermediate, layers, heads, kv_heads, positions] = [32, 64, 2, 4, 2, 64];
    let (vocab, bos_eos) = (VOCAB, [1, 2]);
    let sizes = LlamaSizes { vocab, hidden, intermediate, layers, heads, kv_heads, positions, bos_eos };
    let moe = MoeConfig { router_bias: true, ..MoeConfig::new(RouterConfig::new(4)) };
    let mut config = sizes.config().unwrap();
    config.moe = Some(moe).filter(|_| experts);
    config
}

/// A model directory with random weights, gates open.
pub(crate) fn model_dir(parent: &Path, name: &str, experts: bool, seed: u64) -> PathBuf {
    let dir = parent.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let mut model = Model::new(config(experts));
    let mut rng = Rng::new(seed, 0);
    for entry in model.layout().entries().to_vec() {
        let values = &mut model.params_mut()[entry.range];
        match entry.spec.name.as_str() {
            name if name.ends_with("router.bias") => values.fill(1.0),
            name if name.contains("norm") => values.fill(1.0),
            _ => rng.fill_normal(values, 0.08),
        }
    }
    model.save(&dir, Dtype::F32).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{\"made\": \"up\"}").unwrap();
    dir
}

/// Text with something to learn: each document walks the vocabulary in steps of its own size.
pub(crate) fn text(seed: u64) -> TokenStream {
    let mut rng = Rng::new(seed, 1);
    let mut stream = TokenStream { ids: Vec::new(), doc_starts: Vec::new() };
    for _ in 0..60 {
        stream.doc_starts.push(stream.ids.len());
        let (mut id, stride) = (rng.below(VOCAB as u64), 1 + rng.below(3));
        for _ in 0..40 {
            stream.ids.push(id as u32);
            id = (id + stride) % VOCAB as u64;
        }
    }
    stream
}

/// 20 steps of 2 micro-batches under a target.
pub(crate) fn settings(more: &[&str]) -> TrainConfig {
    let mut config = TrainConfig { steps: Some(20), batch: 2, seq: 16, ..TrainConfig::default() };
    (config.accumulate, config.lr, config.valid_fraction) = (2, 3e-3, 0.1);
    config.active_target = Some(0.5);
    more.iter().for_each(|setting| config.set(setting).unwrap());
    config
}

/// Keeps what it hears.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) records: Vec<StepRecord>,
    pub(crate) evals: Vec<(u64, EvalReport)>,
    pub(crate) saved: Vec<u64>,
    pub(crate) notes: String,
}

impl Heard {
    /// Checks that the notes have all `parts`.
    pub(crate) fn noted(&self, parts: &[&str]) {
        assert!(parts.iter().all(|part| self.notes.contains(part)), "{} lacks one of {parts:?}", self.notes);
    }
}

impl Observer for Heard {
    fn step(&mut self, record: &StepRecord) {
        self.records.push(record.clone());
    }
    fn evaluated(&mut self, step: u64, report: &EvalReport) {
        self.evals.push((step, report.clone()));
    }
    fn saved(&mut self, step: u64, path: &Path) {
        assert!(path.join("state.json").is_file());
        self.saved.push(step);
    }
    fn note(&mut self, message: &str) {
        self.notes.push_str(message);
        self.notes.push('\n');
    }
}

/// Makes a checkpoint one of before there were manifests, so that it may be edited.
pub(crate) fn without_manifest(checkpoint: &Path) {
    std::fs::remove_file(checkpoint.join("checksums.json")).ok();
}

/// A model directory and runs beside it.
pub(crate) struct Bed {
    dir: tempfile::TempDir,
    pub(crate) source: PathBuf,
}

impl Bed {
    pub(crate) fn new(experts: bool) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        Bed { source: model_dir(dir.path(), "source", experts, 1), dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A run of the model into the directory `name`.
    pub(crate) fn options(&self, name: &str) -> RunOptions {
        RunOptions::new(&self.source, &self.path(name))
    }

    /// The rest of the run in `name`.
    pub(crate) fn resumed(&self, name: &str) -> RunOptions {
        RunOptions { resume: true, ..self.options(name) }
    }

    /// One invocation on the first text.
    pub(crate) fn train(&self, more: &[&str], options: RunOptions) -> (Outcome, Heard) {
        train(&text(1), settings(more), options).unwrap()
    }

    /// One invocation on the first text that must end so.
    fn ends(&self, end: Outcome, more: &[&str], options: RunOptions) -> Heard {
        let (outcome, heard) = self.train(more, options);
        assert_eq!(outcome, end);
        heard
    }

    /// One invocation on the first text, which `observer` hears and `stop` ends.
    pub(crate) fn watched(
        &self,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
        more: &[&str],
        options: RunOptions,
    ) -> Outcome {
        let model = Model::load(&self.source).unwrap();
        let mut trainer = Trainer::new(model, &text(1), settings(more), options).unwrap();
        trainer.run(observer, stop).unwrap()
    }

    /// One whole run.
    pub(crate) fn whole(&self, name: &str, more: &[&str]) -> Heard {
        self.ends(Outcome::Finished, more, self.options(name))
    }

    /// The first `step` steps of a run.
    pub(crate) fn part(&self, name: &str, step: u64, more: &[&str]) -> Heard {
        let options = RunOptions { stop_after: Some(step), ..self.options(name) };
        self.ends(Outcome::Interrupted { step }, more, options)
    }

    /// The rest of a run.
    pub(crate) fn rest(&self, name: &str, more: &[&str]) -> Heard {
        self.ends(Outcome::Finished, more, self.resumed(name))
    }

    /// The model, for inference.
    pub(crate) fn inference(&self) -> Inference {
        Inference::load(&self.source, Precision::F32).unwrap()
    }
}

/// One invocation.
pub(crate) fn train(
    data: impl Into<TrainData>,
    config: TrainConfig,
    options: RunOptions,
) -> Result<(Outcome, Heard)> {
    let mut heard = Heard::default();
    let mut trainer = Trainer::new(Model::load(&options.source)?, data, config, options)?;
    let outcome = trainer.run(&mut heard, &AtomicBool::new(false))?;
    Ok((outcome, heard))
}

/// Checks that an invocation fails in one line that has all `parts`.
pub(crate) fn refused(data: impl Into<TrainData>, config: TrainConfig, options: RunOptions, parts: &[&str]) {
    let error = train(data, config, options).expect_err(parts[0]).to_string();
    assert!(parts.iter().all(|part| error.contains(part)), "{error} lacks one of {parts:?}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

/// The lines of the metrics of the run in `out`.
pub(crate) fn metrics(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The bytes of the weights in `dir`.
pub(crate) fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}
