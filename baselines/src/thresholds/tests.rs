//! Quantiles worked by hand, and every choice of thresholds against NumPy.

use std::path::Path;

use dsmoe_core::calibrate::{LayerStream, StateScorer};
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::kept::LayerThresholds;
use dsmoe_core::model::{Cache, Workspace};
use dsmoe_core::params::{Entry, Stored};
use dsmoe_core::{Config, Inference, Model};
use dsmoe_kernels::Precision;
use dsmoe_kernels::comm::alone;
use dsmoe_kernels::testing::{assert_close_f64, f64s};
use serde_json::Value;

use super::allocate::survey;
use super::measure::used;
use super::quantile::{Magnitudes, quantile};
use super::search::{candidates, search};
use super::settings::{Candidates, Choose, Settings};
use crate::method::{Budget, Job};
use crate::partial::Partial;

fn sorted(values: &[f32]) -> Vec<f32> {
    let mut magnitudes: Vec<f32> = values.iter().map(|x| x.abs()).collect();
    magnitudes.sort_by(f32::total_cmp);
    magnitudes
}

/// Worked by hand: half of (3, 1, 0.5, 2) is above 1.5; of a second token above 0.25; the mean of both is 0.875, and the
/// quantile of all values together 0.75.
#[test]
fn quantiles_by_hand() {
    let (first, second) = ([3.0, -1.0, 0.5, 2.0], [0.1, 4.0, -0.2, 0.3]);
    let [a, b] = [&first, &second].map(|token| quantile(&sorted(token), 0.5));
    assert!((a - 1.5).abs() < 1e-12 && (b - 0.25).abs() < 1e-7, "{a}, {b}");
    assert!(((a + b) / 2.0 - 0.875).abs() < 1e-7);
    let mut all = Magnitudes::new(2, 4);
    all.add(&first, 4);
    all.add(&second, 4);
    let table = all.table();
    assert!((table.threshold(0.5) - 0.75).abs() < 1e-6, "{}", table.threshold(0.5));
    assert_eq!(table.threshold(0.0), 0.0);
    assert!(quantile(&[], 0.5) == 0.0 && quantile(&[2.0], 0.3) == 2.0);
}

fn list<T: serde::de::DeserializeOwned>(json: &Value) -> Vec<T> {
    serde_json::from_value(json.clone()).unwrap()
}

/// Makes the model of the cases, and saves it in `dir`.
fn model_of(cases: &Value, dir: &Path) -> Model {
    let config = Config::from_json(Path::new("config.json"), &cases["config"].to_string()).unwrap();
    let mut model = Model::new(config);
    let tensors = cases["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), model.layout().entries().len());
    for tensor in tensors {
        let Entry { spec, range, .. } = model.layout().get(tensor["name"].as_str().unwrap()).unwrap().clone();
        let [offset, factor] = ["offset", "factor"].map(|key| tensor[key].as_f64().unwrap());
        let mut state = tensor["state"].as_u64().unwrap();
        let values = (0..spec.numel()).map(|_| {
            state = (state * 1_103_515_245 + 12_345) % (1 << 31);
            (offset + factor * (state as f64 / f64::from(1u32 << 31) - 0.5)) as f32
        });
        let places: Vec<usize> = match (spec.stored, &spec.shape[..]) {
            (Stored::Transposed, &[rows, cols]) => {
                (0..cols).flat_map(|col| (0..rows).map(move |row| row * cols + col)).collect()
            }
            _ => (0..spec.numel()).collect(),
        };
        let into = &mut model.params_mut()[range];
        values.zip(places).for_each(|(value, place)| into[place] = value);
    }
    model.save(dir, Dtype::F32).unwrap();
    model
}

/// The expected thresholds, shares of weights and logits are computed by `scripts/make-threshold-cases` in float64. The script
/// implements R-LLM's search, TEAL, CATS and a uniform share from their definitions.
#[test]
fn thresholds_are_those_of_numpy() {
    let cases: Value = serde_json::from_str(include_str!("../../tests/data/thresholds.json")).unwrap();
    let work = tempfile::tempdir().unwrap();
    let (model, out) = (model_of(&cases, work.path()), work.path().join("out"));
    let text: Vec<Vec<u32>> = list(&cases["text"]);
    let job = Job {
        model: work.path(),
        out: &out,
        force: false,
        budget: Budget::Share(0.5),
        calibration: &text,
        seed: 0,
        comm: alone(),
        partial: Partial::none(),
    };
    for (name, case) in cases["cases"].as_object().unwrap() {
        let number = |key: &str| case[key].as_f64().unwrap();
        let by_shares = |settings: Settings| -> Vec<LayerThresholds> {
            let shares = survey(&job, &settings, number("skipped"), &mut |_| {}).unwrap();
            shares.iter().map(|of_layer| of_layer.thresholds(number("factor"))).collect()
        };
        let mut layers = match &name[..] {
            "uniform" => by_shares(Settings { choose: Choose::Uniform, ..Settings::default() }),
            "cats" => by_shares(Settings { choose: Choose::Cats, ..Settings::default() }),
            "teal" => by_shares(Settings { step: number("step"), ..Settings::default() }),
            "search" => {
                let candidates = candidates(Candidates::Linear);
                let mut scorer = StateScorer::new(&LayerStream::open(job.model, &[]).unwrap()).unwrap();
                // A second search with the scorer finds what the first does.
                let mut run = || {
                    search(&mut scorer, &job, &candidates, (number("tolerance"), 0), &mut |_, _| {}).unwrap()
                };
                let found = run();
                assert_eq!(run(), found);
                found
            }
            other => panic!("{other} is no choice"),
        };
        let share = used(&job, &mut layers, 0, &mut |_| {}).unwrap();
        let inputs: Vec<f32> = layers.iter().flat_map(|of_layer| of_layer.inputs).collect();
        let gates: Vec<f32> = layers.iter().map(|of_layer| of_layer.gate).collect();
        let used: Vec<f64> = layers.iter().flat_map(|of_layer| of_layer.used).collect();
        let with = Inference::with_thresholds(&model, layers, Precision::F32);
        let (mut cache, mut workspace) = (Cache::new(&with, text[0].len()), Workspace::default());
        let logits = f64s(with.decode(&text[0], &mut cache, None, &mut workspace).unwrap());
        let close = |key: &str, got: &[f64]| {
            assert_close_f64(&format!("{name}: {key}"), got, &list::<f64>(&case[key]), 1e-5);
        };
        close("inputs", &f64s(&inputs));
        close("gates", &f64s(&gates));
        close("used", &used);
        close("logits", &logits);
        assert_close_f64(&format!("{name}: share"), &[share], &[number("share")], 1e-6);
    }
}
