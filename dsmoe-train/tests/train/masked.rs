//! Training pruned models: what is pruned stays exactly 0, and the rest learns.

use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::{Dtype, tensor_names};
use dsmoe_core::masks::MASKS_FILE;
use dsmoe_core::{Masks, Model};
use dsmoe_train::{Outcome, RunOptions};

use crate::common::{model_dir, settings, text, train, weights};

/// A dense model of which every row of every linear keeps two weights of five.
fn pruned(parent: &Path) -> PathBuf {
    let dir = model_dir(parent, "dense", false, 5);
    let mut model = Model::load(&dir).unwrap();
    let mut masks = Masks::new();
    for (name, shape) in tensor_names(model.config()).filter(|(name, _)| name.ends_with("_proj.weight")) {
        masks.insert(name, shape[0], shape[1], |row, col| (3 * row + col) % 5 < 2);
    }
    model.set_masks(masks).unwrap();
    let out = parent.join("pruned");
    std::fs::create_dir(&out).unwrap();
    model.save(&out, Dtype::F32).unwrap();
    out
}

const SETTINGS: [&str; 5] = ["steps=100", "sparsity=1", "weight_decay=0.1", "save_every=40", "lr=1e-2"];

#[test]
fn masked_weights_stay_zero_under_adamw_with_decay() {
    let dir = tempfile::tempdir().unwrap();
    let (source, stream) = (pruned(dir.path()), text(1));
    let config = settings(&SETTINGS);
    let before = Model::load(&source).unwrap();
    let whole = dir.path().join("whole");
    let (outcome, heard) = train(config.clone(), &stream, RunOptions::new(&source, &whole)).unwrap();
    assert_eq!(outcome, Outcome::Finished);
    let (first, last) = (&heard.records[0], heard.records.last().unwrap());
    assert!(last.lm_loss < 0.8 * first.lm_loss, "{} to {}", first.lm_loss, last.lm_loss);
    let (_, eval) = heard.evals.last().unwrap();
    let counts = before.accounting();
    assert_eq!(eval.params_activated, (counts.total - before.masks().unwrap().pruned()) as f64);

    let after = Model::load(&whole).unwrap();
    assert_eq!(after.masks(), before.masks());
    for (name, mask) in before.masks().unwrap().iter() {
        let entry = after.layout().get(name).unwrap();
        let width = entry.spec.shape[1];
        let mut moved = 0;
        for (i, place) in entry.range.clone().enumerate() {
            let (row, col) = match name.contains("down_proj") {
                true => (i % width, i / width),
                false => (i / width, i % width),
            };
            let value = after.params()[place];
            if mask.keeps(row, col) {
                moved += usize::from(value != before.params()[place]);
            } else {
                assert_eq!(value.to_bits(), 0, "{name} at ({row}, {col})");
            }
        }
        assert!(moved as u64 > mask.kept() * 9 / 10, "{name}: {moved} of {} weights moved", mask.kept());
    }

    // Stopped and resumed, to the bit.
    let parts = dir.path().join("parts");
    let stop = RunOptions { stop_after: Some(57), ..RunOptions::new(&source, &parts) };
    assert_eq!(train(config.clone(), &stream, stop).unwrap().0, Outcome::Interrupted { step: 57 });
    let resume = || RunOptions { resume: true, ..RunOptions::new(&source, &parts) };
    assert_eq!(train(config.clone(), &stream, resume()).unwrap().0, Outcome::Finished);
    assert_eq!(weights(&parts), weights(&whole));
    assert_eq!(
        std::fs::read(parts.join(MASKS_FILE)).unwrap(),
        std::fs::read(source.join(MASKS_FILE)).unwrap()
    );

    // A run started over with another model leaves no masks behind.
    let dense = dir.path().join("dense");
    let again = RunOptions { force: true, ..RunOptions::new(&dense, &parts) };
    train(settings(&["steps=1", "sparsity=1"]), &stream, again).unwrap();
    assert!(!parts.join(MASKS_FILE).exists() && Model::load(&parts).unwrap().masks().is_none());
}

#[test]
fn a_checkpoint_without_its_masks_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let (source, stream) = (pruned(dir.path()), text(1));
    let out = dir.path().join("out");
    let config = settings(&["steps=4", "sparsity=1"]);
    let stop = RunOptions { stop_after: Some(2), ..RunOptions::new(&source, &out) };
    train(config.clone(), &stream, stop).unwrap();
    std::fs::remove_file(out.join("checkpoints/step-00000002").join(MASKS_FILE)).unwrap();
    let error =
        train(config, &stream, RunOptions { resume: true, ..RunOptions::new(&source, &out) }).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("its masks are not those of the starting model"), "{message}");
}
