//! DSMoE's fitted start on a real model, at the parameters that others get.

use dsmoe_core::{Config, Inference};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::shared;

use super::common::{Run, mean_loss};
use super::trained_router::sequences;

#[test]
fn a_fitted_start_keeps_a_real_model_better() {
    let test = "a_fitted_start_keeps_a_real_model_better";
    let Some(shared) = shared(test, "models/babyllama-1m") else { return };
    dsmoe_baselines::register();
    let model = shared.join("models/babyllama-1m");
    let sequences = sequences(&shared, &model);
    let (calibration, held_out) = (&sequences[..128], &sequences[128..176]);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |set: &[&str]| {
        let run = Run { seed: 1, force: true, ..Run::new("dsmoe", set, 0.6, calibration) };
        (run.run(&model, &out).unwrap(), mean_loss(&out, held_out))
    };
    let dense = mean_loss(&model, held_out);
    let (_, before) = run(&["routers=calibrated", "experts=8"]);
    let (_, no_squares) = run(&["ridge=0"]);
    let (made, fitted) = run(&[]);
    assert!(
        dense < fitted && fitted < no_squares && no_squares < before,
        "{dense} {fitted} {no_squares} {before}"
    );
    assert!(fitted - dense < 0.4 * (before - dense), "{dense} {fitted} {before}");

    // The plan counts what the model has, and the model runs about the share that the plan says.
    let config = Config::load(&out).unwrap();
    let share = made.plan.active_target.unwrap();
    assert_eq!(config.moe.as_ref().unwrap().budget(), Some(share));
    let found = Inference::load(&out, Precision::F32).unwrap();
    let counts = found.accounting();
    let activated = counts.activated(share * counts.num_experts);
    assert!((activated / made.plan.activated - 1.0).abs() < 1e-3, "{activated} {}", made.plan.activated);
    assert_eq!(counts.total as f64, made.plan.total);
    let (_, active) = made.measured.last().unwrap();
    assert!((active - share).abs() < 0.03, "{active} {share}");
}
