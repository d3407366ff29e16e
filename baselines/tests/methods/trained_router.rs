//! MoEfication of a real model: the trained router keeps its loss better than the start, experts of co-active neurons
//! better than clusters, and all experts keep it whole.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use dsmoe_baselines::Made;
use dsmoe_kernels::testing::shared;

use super::common::{Run, mean_loss};

/// Sequences of the model's text; its tokens are characters.
pub(crate) fn sequences(shared: &Path, model: &Path) -> Vec<Vec<u32>> {
    let text = fs::read_to_string(model.join("tokenizer.json")).unwrap();
    let tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids: HashMap<String, u32> = serde_json::from_value(tokenizer["model"]["vocab"].clone()).unwrap();
    let text = fs::read_to_string(shared.join("data/corpora/stories/tinystories_lowercase_4M.txt")).unwrap();
    let id = |c: char| ids.get(&if c == ' ' { '\u{2581}'.to_string() } else { c.to_string() }).copied();
    let tokens: Vec<u32> = text.chars().take(40_000).filter_map(id).collect();
    tokens.chunks_exact(128).map(<[u32]>::to_vec).collect()
}

#[test]
fn a_trained_router_keeps_a_real_model_better() {
    let test = "a_trained_router_keeps_a_real_model_better";
    let Some(shared) = shared(test, "models/babyllama-1m") else { return };
    dsmoe_baselines::register();
    let model = shared.join("models/babyllama-1m");
    let sequences = sequences(&shared, &model);
    let (calibration, held_out) = (&sequences[..96], &sequences[96..128]);
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, share: f64, set: &[&str]| -> (f64, Made) {
        let out = dir.path().join("out");
        let run = Run { seed: 1, force: true, ..Run::new(name, set, share, calibration) };
        let made = run.run(&model, &out).unwrap();
        (mean_loss(&out, held_out), made)
    };
    let dense = mean_loss(&model, held_out);
    let (all, _) = run("moefication", 1.0, &["epochs=1"]);
    assert!((all - dense).abs() < 1e-6 * dense, "all experts {all}, dense {dense}");
    let (trained, made) = run("moefication", 0.8, &[]);
    let (start, before) = run("moefication", 0.8, &["epochs=0"]);
    let (random, _) = run("random-k", 0.8, &["scale=n"]);
    let (together, by_counts) = run("moefication", 0.8, &["split=co-activation"]);
    assert_eq!(made.plan.reached_by, "8 of 11 experts");
    assert!(dense < together && together < trained, "{dense} {together} {trained}");
    assert!(trained < start - 0.1 && trained < random - 0.1, "{trained} {start} {random}");
    let within = by_counts.measured.iter().filter(|(name, _)| name.contains("within"));
    let within: Vec<f64> = within.map(|measured| measured.1).collect();
    // At random one of 11 experts would hold both neurons 31 times of 351.
    assert!(within.iter().all(|&share| share > 1.3 / 11.0), "{within:?}");
    assert_eq!(within.len(), made.measured.len());
    for ((_, after), (_, before)) in made.measured.iter().zip(&before.measured) {
        assert!(after >= before && *after > 0.75, "share {after} after training, {before} before");
    }
}
