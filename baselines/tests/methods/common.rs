//! Small models on disk, ways to run a method on them, and looks at what it made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dsmoe_baselines::{Budget, Configured, Job, Made, Partial, Progress, Result, method, read_settings};
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::model::{Batch, Cache, Inference, Workspace};
use dsmoe_core::{Config, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::alone;
use dsmoe_kernels::rng::Rng;
use serde_json::Value;

/// Tokens of the vocabulary of small models.
pub(crate) const VOCAB: u64 = 40;

/// The method of that name with the settings in `set`.
pub(crate) fn configured(name: &str, set: &[&str]) -> Result<Box<dyn Configured>> {
    method(name)?.configure(&read_settings(set.iter().copied())?)
}

/// A method, its settings and what else a job says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<'a> {
    pub(crate) method: &'a str,
    pub(crate) set: &'a [&'a str],
    pub(crate) budget: Budget,
    pub(crate) calibration: &'a [Vec<u32>],
    pub(crate) seed: u64,
    pub(crate) force: bool,
}

impl<'a> Run<'a> {
    /// A run to `share` of the parameters.
    pub(crate) fn new(method: &'a str, set: &'a [&'a str], share: f64, text: &'a [Vec<u32>]) -> Run<'a> {
        Run { method, set, budget: Budget::Share(share), calibration: text, seed: 5, force: false }
    }

    pub(crate) fn run(&self, model: &Path, out: &Path) -> Result<Made> {
        self.watched(model, out, &mut |progress| assert!(progress.done <= progress.total))
    }

    pub(crate) fn watched(&self, model: &Path, out: &Path, watch: &mut dyn FnMut(Progress)) -> Result<Made> {
        let (Run { budget, calibration, seed, force, .. }, partial) = (*self, Partial::none());
        configured(self.method, self.set)?
            .run(&Job { model, out, force, budget, calibration, seed, comm: alone(), partial }, watch)
    }

    /// Fails in one line that has all `parts`, and makes no directory `out`.
    pub(crate) fn fails(&self, model: &Path, out: &Path, parts: &[&str]) {
        let before = out.exists();
        let error = self.run(model, out).expect_err(&format!("{self:?}")).to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{self:?}: {error}");
        assert_eq!(out.exists(), before, "{error}");
    }
}

/// The configuration of the preset `tiny` with `changes`, an object of keys and values.
pub(crate) fn tiny(changes: &Value) -> Config {
    let mut json: Value = serde_json::from_str(&preset("tiny").unwrap().to_json()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    Config::from_json(Path::new("config.json"), &json.to_string()).unwrap()
}

/// A random model of `config` in `dir`.
pub(crate) fn made(config: &Config, dir: &Path, dtype: Dtype) -> PathBuf {
    let out = dir.join("dense");
    init(config, &out, &InitOptions { dtype, seed: 3, ..InitOptions::default() }, &mut |_| {}).unwrap();
    out
}

/// `model` saved under `dir`.
pub(crate) fn saved(model: &Model, dir: &Path, dtype: Dtype) -> PathBuf {
    let out = dir.join("dense");
    std::fs::create_dir_all(&out).unwrap();
    model.save(&out, dtype).unwrap();
    out
}

/// Sequences of `len` random tokens.
pub(crate) fn tokens(sequences: usize, len: usize) -> Vec<Vec<u32>> {
    let mut rng = Rng::new(6, 0);
    (0..sequences).map(|_| (0..len).map(|_| rng.below(VOCAB) as u32).collect()).collect()
}

/// Type, shape and bytes of tensors by name.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub(crate) fn tensors_of(checkpoint: &Checkpoint) -> Tensors {
    let read = |name: &str| {
        let view = checkpoint.tensor(name).unwrap();
        (name.to_owned(), (view.dtype, view.shape.clone(), checkpoint.bytes(name).unwrap().to_vec()))
    };
    checkpoint.names().map(read).collect()
}

pub(crate) fn tensors(dir: &Path) -> Tensors {
    tensors_of(&Checkpoint::open(dir).unwrap())
}

/// All weights of a directory.
pub(crate) fn count(dir: &Path) -> f64 {
    tensors(dir).values().map(|(_, shape, _)| shape.iter().product::<usize>()).sum::<usize>() as f64
}

/// A tensor as f32.
pub(crate) fn values(dir: &Path, name: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut values = vec![0.0; checkpoint.tensor(name).unwrap_or_else(|| panic!("{name}")).numel()];
    checkpoint.read_f32(name, &mut values).unwrap();
    values
}

/// Logits of all positions of `ids`.
pub(crate) fn logits(model: &Inference, ids: &[u32]) -> Vec<f32> {
    let mut cache = Cache::new(model, ids.len());
    model.logits(ids, ids.len(), &mut cache, None, &mut Workspace::default()).unwrap().to_vec()
}

pub(crate) fn loaded(dir: &Path) -> Inference {
    Inference::load(dir, Precision::F32).unwrap()
}

/// Mean loss of the model in `dir` on sequences of one length.
pub(crate) fn mean_loss(dir: &Path, sequences: &[Vec<u32>]) -> f64 {
    let (model, mut workspace) = (loaded(dir), Workspace::default());
    let mean = |ids: &Vec<u32>| {
        let mut losses = vec![0.0; ids.len() - 1];
        let batch = Batch { inputs: &ids[..losses.len()], targets: &ids[1..], seq: losses.len() };
        model.score(&mut losses, batch, None, &mut workspace).unwrap();
        losses.iter().map(|&x| f64::from(x)).sum::<f64>() / losses.len() as f64
    };
    sequences.iter().map(mean).sum::<f64>() / sequences.len() as f64
}
