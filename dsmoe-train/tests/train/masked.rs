//! Training pruned models: what is pruned stays exactly 0, and the rest learns.

use dsmoe_core::checkpoint::{Dtype, tensor_names};
use dsmoe_core::masks::MASKS_FILE;
use dsmoe_core::{Masks, Model};
use dsmoe_train::RunOptions;

use crate::common::{Bed, refused, settings, text, weights, without_manifest};

/// A dense model of which every row of every linear keeps two weights of five.
pub(crate) fn pruned() -> Bed {
    let mut bed = Bed::new(false);
    let mut model = Model::load(&bed.source).unwrap();
    let mut masks = Masks::new();
    for (name, shape) in tensor_names(model.config()).filter(|(name, _)| name.ends_with("_proj.weight")) {
        masks.insert(name, shape[0], shape[1], |row, col| (3 * row + col) % 5 < 2);
    }
    model.set_masks(masks).unwrap();
    bed.source = bed.path("pruned");
    std::fs::create_dir(&bed.source).unwrap();
    model.save(&bed.source, Dtype::F32).unwrap();
    bed
}

const SETTINGS: [&str; 5] = ["steps=100", "sparsity=1", "weight_decay=0.1", "save_every=40", "lr=1e-2"];

#[test]
fn masked_weights_stay_zero_under_adamw_with_decay() {
    let bed = pruned();
    let before = Model::load(&bed.source).unwrap();
    let (whole, parts) = (bed.path("whole"), bed.path("parts"));
    let heard = bed.whole("whole", &SETTINGS);
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
    bed.part("parts", 57, &SETTINGS);
    bed.rest("parts", &SETTINGS);
    assert_eq!(weights(&parts), weights(&whole));
    let [ours, theirs] = [&parts, &bed.source].map(|dir| std::fs::read(dir.join(MASKS_FILE)).unwrap());
    assert_eq!(ours, theirs);

    // A run started over with another model leaves no masks behind.
    let again = RunOptions { force: true, source: bed.path("source"), ..bed.options("parts") };
    bed.train(&["steps=1", "sparsity=1"], again);
    assert!(!parts.join(MASKS_FILE).exists() && Model::load(&parts).unwrap().masks().is_none());
}

#[test]
fn a_checkpoint_without_its_masks_is_passed_over() {
    let (bed, more) = (pruned(), ["steps=4", "sparsity=1"]);
    bed.part("out", 2, &more);
    let checkpoint = bed.path("out/checkpoints/step-00000002");
    std::fs::remove_file(checkpoint.join(MASKS_FILE)).unwrap();
    refused(&text(1), settings(&more), bed.resumed("out"), &["masks.safetensors", "not what was written"]);
    without_manifest(&checkpoint);
    let parts = ["its masks are not those of the starting model"];
    refused(&text(1), settings(&more), bed.resumed("out"), &parts);
}
