//! Local reconstruction of converted models.

use std::path::{Path, PathBuf};

use crate::common::*;
use dsmoe_core::convert::{Calibration, ConvertOptions, RouterStart, convert};
use dsmoe_core::{Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_router::{GateValue, RouterConfig};
use dsmoe_train::reconstruct::{LayerReport, ReconstructOptions, ReconstructPaths, reconstruct};
use dsmoe_train::{EvalOptions, Result, evaluate};

const OPTIONS: ReconstructOptions = ReconstructOptions {
    steps: 150,
    tokens: 128,
    lr: 3e-3,
    router_lr_scale: 3.0,
    drift: 0.5,
    seed: 0,
    precision: Precision::F32,
};

fn sequences() -> Vec<Vec<u32>> {
    text(3).ids.chunks_exact(32).map(<[u32]>::to_vec).collect()
}

/// A dense model that knows the text, and its conversion that opens half of the experts.
struct Models {
    dir: tempfile::TempDir,
    dense: PathBuf,
    start: PathBuf,
}

impl Models {
    fn new() -> Models {
        let bed = Bed::new(false);
        let config = dsmoe_train::TrainConfig { active_target: None, ..settings(&["steps=80", "lr=1e-2"]) };
        train(&text(1), config, bed.options("dense")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (dense, start) = (dir.path().join("dense"), dir.path().join("start"));
        std::fs::create_dir(&dense).unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            std::fs::copy(bed.path("dense").join(name), dense.join(name)).unwrap();
        }
        let calibration = Calibration { sequences: sequences(), active: 0.5 };
        let options = ConvertOptions {
            router: RouterConfig { gate_value: GateValue::Binary, ..RouterConfig::new(8) },
            routers: RouterStart::Calibrated(calibration),
            active_target: Some(0.5),
            ..ConvertOptions::new(8)
        };
        convert(&dense, &start, &options, &mut |_| {}).unwrap();
        Models { dir, dense, start }
    }

    fn paths(&self, out: &str, resume: bool) -> ReconstructPaths {
        let out = self.dir.path().join(out);
        ReconstructPaths { model: self.start.clone(), teacher: self.dense.clone(), out, resume }
    }

    /// A reconstruction into `out`, stopped after `layers` layers.
    fn run(&self, out: &str, resume: bool, layers: usize) -> Result<Vec<LayerReport>> {
        let mut left = layers;
        reconstruct(&self.paths(out, resume), &sequences(), &OPTIONS, &mut |_, _| {
            left -= 1;
            left > 0
        })
    }

    fn perplexity(&self, dir: &Path) -> (f64, f64) {
        let model = Inference::load(dir, Precision::F32).unwrap();
        let report = evaluate(&model, &text(9).ids, EvalOptions::new(33), &mut |_, _| {}).unwrap();
        (report.ppl, report.active_ratio.unwrap())
    }
}

#[test]
fn every_layer_comes_nearer_to_the_dense_one() {
    let models = Models::new();
    let reports = models.run("out", false, 9).unwrap();
    assert_eq!(reports.iter().map(|report| report.layer).collect::<Vec<_>>(), [0, 1]);
    for report in &reports {
        assert!(report.after < 0.8 * report.before && report.before < 1.0, "{report:?}");
        let [before, after] = report.active.map(Option::unwrap);
        assert!((before - after).abs() < 0.05, "{report:?}");
    }
    let out = models.dir.path().join("out");
    let ((before, _), (after, active)) = (models.perplexity(&models.start), models.perplexity(&out));
    assert!(after < before && (active - 0.5).abs() < 0.08, "{before} to {after}, {active} active");
    assert!(!out.join("reconstruct/layer-0000").exists() && out.join("tokenizer.json").is_file());
    // Attention, norms and embeddings are the dense model's.
    let [start, made] = [&models.start, &out].map(|dir| Model::load(dir).unwrap());
    for (entry, other) in start.layout().entries().iter().zip(made.layout().entries()) {
        let same = start.params()[entry.range.clone()] == made.params()[other.range.clone()];
        assert_eq!(same, !entry.spec.name.contains(".mlp."), "{}", entry.spec.name);
    }
}

#[test]
fn an_interrupted_reconstruction_goes_on_after_its_last_layer() {
    let models = Models::new();
    let whole = models.run("whole", false, 9).unwrap();
    let first = models.run("parts", false, 1).unwrap();
    assert_eq!(first.len(), 1);
    let parts = models.dir.path().join("parts");
    assert!(!parts.join("config.json").exists());
    // The work of a process that was killed while it removed the finished layers.
    let (work, removed) = (parts.join("reconstruct"), models.dir.path().join("removed"));
    std::fs::create_dir_all(removed.join("layer-0000")).unwrap();
    for file in ["state.json", "layer-0000/checksums.json", "layer-0000/ffn.safetensors"] {
        std::fs::copy(work.join(file), removed.join(file)).unwrap();
    }
    let rest = models.run("parts", true, 9).unwrap();
    let errors = |reports: &[LayerReport]| reports.iter().map(|r| (r.before, r.after)).collect::<Vec<_>>();
    assert_eq!(errors(&rest), errors(&whole));
    assert_eq!(weights(&parts), weights(&models.dir.path().join("whole")));
    // Again: its work is done.
    assert_eq!(models.run("parts", true, 9).unwrap(), rest);
    let files = |dir: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|one| one.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let left = files(&work);
    std::fs::copy(work.join("reports.json"), removed.join("reports.json")).unwrap();
    std::fs::remove_dir_all(&work).unwrap();
    std::fs::rename(&removed, &work).unwrap();
    assert_eq!(models.run("parts", true, 9).unwrap(), rest);
    assert_eq!(files(&work), left);
    assert_eq!(weights(&parts), weights(&models.dir.path().join("whole")));
    std::fs::write(work.join("reports.json"), "[]").unwrap();
    let message = models.run("parts", true, 9).unwrap_err().to_string();
    assert!(message.contains("reports.json") && message.lines().count() == 1, "{message}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let models = Models::new();
    let error = |paths: &ReconstructPaths, options: &ReconstructOptions, sequences: &[Vec<u32>]| {
        reconstruct(paths, sequences, options, &mut |_, _| true).unwrap_err().to_string()
    };
    let paths = models.paths("out", false);
    let one = |message: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| message.contains(part)), "{message} lacks one of {parts:?}");
        assert_eq!(message.lines().count(), 1);
    };
    let options = ReconstructOptions { drift: 1.5, ..OPTIONS };
    one(error(&paths, &options, &sequences()), &["drift is 1.5", "0 to 1"]);
    one(error(&paths, &OPTIONS, &sequences()[..2]), &["too few for routers"]);
    let dense = ReconstructPaths { model: models.dense.clone(), ..paths.clone() };
    one(error(&dense, &OPTIONS, &sequences()), &["teacher is", "the dense model that it was made from"]);
    let other = models.dir.path().join("other");
    let other = model_dir(&other, "dense", false, 5);
    let unlike = ReconstructPaths { teacher: other, ..paths.clone() };
    one(error(&unlike, &OPTIONS, &sequences()), &["q_proj", "one that was not trained"]);
    models.run("parts", false, 1).unwrap();
    let again = models.paths("parts", false);
    one(error(&again, &OPTIONS, &sequences()), &["not empty", "resume"]);
    let again = models.paths("parts", true);
    let options = ReconstructOptions { steps: 7, ..OPTIONS };
    one(error(&again, &options, &sequences()), &["the settings was", "this reconstruction started with"]);
}
