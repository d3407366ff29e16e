//! Small models on disk, and ways to run a method on them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dsmoe_baselines::{Budget, Job, Made, Result};
use dsmoe_core::checkpoint::{Checkpoint, Dtype};
use dsmoe_core::model::{Cache, Inference, Workspace};
use dsmoe_core::{Config, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;

use crate::configured;

pub(crate) const VOCAB: u64 = 40;

/// A model of four layers with random weights.
pub(crate) fn model(tied: bool) -> Model {
    let config = format!(
        r#"{{"model_type": "llama", "hidden_act": "silu", "vocab_size": {VOCAB}, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": {tied}}}"#
    );
    let mut model = Model::new(Config::from_json("config.json".as_ref(), &config).unwrap());
    let layout = model.layout().clone();
    for (i, entry) in layout.entries().iter().enumerate() {
        let mut rng = Rng::new(5, i as u64);
        for p in &mut model.params_mut()[entry.range.clone()] {
            *p = if entry.spec.name.contains("norm") { 1.0 + 0.2 * rng.normal() } else { 0.2 * rng.normal() };
        }
    }
    model
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

/// A method, its settings and what else a job says.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    pub(crate) method: &'a str,
    pub(crate) set: &'a [&'static str],
    pub(crate) budget: Budget,
    pub(crate) calibration: &'a [Vec<u32>],
    pub(crate) seed: u64,
    pub(crate) force: bool,
}

impl Run<'_> {
    pub(crate) fn run(&self, model: &Path, out: &Path) -> Result<Made> {
        let method = configured(self.method, self.set)?;
        let Run { budget, calibration, seed, force, .. } = *self;
        let job = Job { model, out, force, budget, calibration, seed };
        method.run(&job, &mut |progress| assert!(progress.done <= progress.total))
    }
}

/// Type, shape and bytes of every tensor.
pub(crate) fn tensors(dir: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let read = |name: &str| {
        let view = checkpoint.tensor(name).unwrap();
        (name.to_owned(), (view.dtype, view.shape.clone(), checkpoint.bytes(name).unwrap().to_vec()))
    };
    checkpoint.names().map(read).collect()
}

/// All weights of a directory.
pub(crate) fn count(dir: &Path) -> f64 {
    tensors(dir).values().map(|(_, shape, _)| shape.iter().product::<usize>()).sum::<usize>() as f64
}

/// A tensor as f32.
pub(crate) fn values(dir: &Path, name: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut values = vec![0.0; checkpoint.tensor(name).unwrap().numel()];
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
