//! Decomposition and prediction against their formulas, and the layers of the results.

use std::path::PathBuf;

use dsmoe_core::Model;
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::model::{Cache, Inference, Workspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{assert_close, assert_close_f64, f64s, normals};

use super::basis::Sum;
use super::predict::Matrices;
use super::*;
use crate::regressor::Regressor;

/// Writes a random model of 4 layers.
fn tiny(work: &Path) -> PathBuf {
    let mut json = preset("tiny").unwrap().to_json();
    for (key, old, new) in [
        ("vocab_size", 2048, 40),
        ("hidden_size", 128, 64),
        ("intermediate_size", 512, 96),
        ("head_dim", 32, 16),
    ] {
        json = json.replace(&format!("\"{key}\": {old}"), &format!("\"{key}\": {new}"));
    }
    let config = Config::from_json(Path::new("config.json"), &json).unwrap();
    let dir = work.join("dense");
    init(&config, &dir, &InitOptions { seed: 4, ..InitOptions::default() }, &mut |_| {}).unwrap();
    dir
}

fn made(model: &Path, out: PathBuf, options: &GrowOptions) -> Model {
    grow(model, &out, options, &mut |_| {}).unwrap();
    Model::load(&out).unwrap()
}

fn values<'a>(model: &'a Model, layer: usize, name: &str) -> &'a [f32] {
    let name = format!("model.layers.{layer}.{name}");
    &model.params()[model.layout().get(&name).unwrap().range.clone()]
}

fn logits(model: &Model, ids: &[u32]) -> Vec<f64> {
    let model = Inference::new(model, Precision::F32);
    let (mut cache, mut workspace) = (Cache::new(&model, 8), Workspace::default());
    f64s(model.logits(ids, ids.len(), &mut cache, None, &mut workspace).unwrap())
}

#[test]
fn the_decomposition_gives_every_matrix_back() {
    // More rows than all columns together, and fewer.
    for (rows, cols, layers) in [(30, 7, 3), (12, 20, 4)] {
        let weights: Vec<Vec<f32>> = (0..layers).map(|i| normals(rows * cols, i)).collect();
        let mut sum = Sum::new(rows);
        weights.iter().for_each(|weight| sum.add(weight));
        let basis = sum.basis("w").unwrap();
        let mut gram = vec![0.0; rows * rows];
        for weight in &weights {
            let v = basis.rows_of(weight);
            let scale = f64s(weight).iter().fold(0.0f64, |most, w| most.max(w.abs()));
            let back: Vec<f64> = basis.matrix(&v).iter().map(|w| w / scale).collect();
            let want: Vec<f64> = f64s(weight).iter().map(|w| w / scale).collect();
            assert_close_f64("U S V_i", &back, &want, 1e-10);
            for (i, j) in (0..rows).flat_map(|i| (0..rows).map(move |j| (i, j))) {
                gram[i * rows + j] += (0..cols).map(|k| v[i * cols + k] * v[j * cols + k]).sum::<f64>();
            }
        }
        // V has orthonormal rows, but for those without a singular value.
        let rank = rows.min(cols * layers as usize);
        let identity: Vec<f64> = (0..rows * rows)
            .map(|at| f64::from(u8::from(at / rows == at % rows && at % rows < rank)))
            .collect();
        assert_close_f64("V V^T", &gram, &identity, 1e-8);
    }
}

/// A linear "network" commutes with the decomposition: the mean of V's rows gives the mean of the matrices.
#[test]
fn the_mean_of_rows_is_the_mean_of_matrices() {
    let (rows, cols) = (9, 5);
    let weights: Vec<Vec<f32>> = (0..3).map(|i| normals(rows * cols, 10 + i)).collect();
    for space in [Space::Svd, Space::Weights] {
        let matrices = Matrices::of("w".to_owned(), rows, weights.clone(), space).unwrap();
        let mean = |x: &[f32]| -> Vec<f32> {
            x.chunks(2 * cols).flat_map(|x| (0..cols).map(|j| 0.5 * (x[j] + x[cols + j]))).collect()
        };
        let got = matrices.between(1, &mean);
        let want: Vec<f64> =
            weights[1].iter().zip(&weights[2]).map(|(a, b)| 0.5 * f64::from(a + b)).collect();
        assert_close(&format!("{space:?}"), &got, &want, 1e-6);
    }
}

/// By `tests/golden/make_grow.py`: NumPy's decomposition and PyTorch's network.
#[test]
fn predictions_are_those_of_the_recipe() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/grow.json")).unwrap();
    let size = |key: &str| golden[key].as_u64().unwrap() as usize;
    let list = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let lists = |key: &str| -> Vec<Vec<f64>> { golden[key].as_array().unwrap().iter().map(list).collect() };
    let f32s = |values: &Vec<f64>| -> Vec<f32> { values.iter().map(|&x| x as f32).collect() };
    let (rows, cols, hidden) = (size("rows"), size("cols"), size("hidden"));
    let weights = lists("weights").iter().map(f32s).collect();
    let matrices = Matrices::of("w".to_owned(), rows, weights, Space::Svd).unwrap();
    let mut net = Regressor::new([2 * cols, hidden, hidden, cols], 0);
    for (values, golden) in net.params_mut().zip(lists("params")) {
        assert_eq!(values.len(), golden.len());
        *values = f32s(&golden);
    }
    for (gap, want) in lists("new").iter().enumerate() {
        assert_close(&format!("gap {gap}"), &matrices.between(gap, &|x| net.forward(x)), want, 1e-5);
    }
}

#[test]
fn layers_are_in_order_and_old_ones_unchanged() {
    let work = tempfile::tempdir().unwrap();
    let dense = tiny(work.path());
    let source = Model::load(&dense).unwrap();
    let ids = [3, 9, 20, 1, 39];
    let up = "mlp.up_proj.weight";
    for method in
        [GrowMethod::Lesa, GrowMethod::Copy, GrowMethod::Average, GrowMethod::Identity, GrowMethod::Random]
    {
        let options = GrowOptions { method, epochs: 1, ..GrowOptions::new(6) };
        let grown = made(&dense, work.path().join(format!("{method:?}")), &options);
        // 0, 1, 1|2, 2, 2|3, 3
        for (new, old) in [(0, 0), (1, 1), (3, 2), (5, 3)] {
            for name in [up, "self_attn.o_proj.weight", "input_layernorm.weight"] {
                assert_eq!(values(&grown, new, name), values(&source, old, name), "{method:?} layer {new}");
            }
        }
        let (child, lower, upper) = (values(&grown, 2, up), values(&source, 1, up), values(&source, 2, up));
        match method {
            GrowMethod::Copy => assert_eq!(child, lower),
            GrowMethod::Average => {
                let mean: Vec<f32> = lower.iter().zip(upper).map(|(a, b)| 0.5 * (a + b)).collect();
                assert_eq!(child, mean);
            }
            GrowMethod::Identity => {
                assert_close("logits", &logits_f32(&grown, &ids), &logits(&source, &ids), 1e-6);
                assert!(values(&grown, 4, "mlp.down_proj.weight").iter().all(|&w| w == 0.0));
            }
            _ => assert!(child != lower && child != upper && child.iter().all(|w| w.is_finite())),
        }
        assert_eq!(Accounting::of(grown.config()).total, plan_growth(&dense, &options).unwrap().params);
    }
    let options = GrowOptions { method: GrowMethod::Stack, ..GrowOptions::new(7) };
    let grown = made(&dense, work.path().join("stack"), &options);
    for (new, old) in [0, 1, 2, 3, 1, 2, 3].into_iter().enumerate() {
        assert_eq!(values(&grown, new, up), values(&source, old, up), "layer {new}");
    }
}

#[test]
fn as_many_layers_as_there_are_are_a_copy() {
    let work = tempfile::tempdir().unwrap();
    let dense = tiny(work.path());
    let source = Model::load(&dense).unwrap();
    for method in [
        GrowMethod::Lesa,
        GrowMethod::Copy,
        GrowMethod::Average,
        GrowMethod::Identity,
        GrowMethod::Random,
        GrowMethod::Stack,
    ] {
        let options = GrowOptions { method, ..GrowOptions::new(4) };
        let out = work.path().join(format!("{method:?}"));
        let grown = grow(&dense, &out, &options, &mut |_| {}).unwrap();
        assert!(grown.plan.is_unchanged() && grown.fits.is_empty(), "{method:?}: {grown:?}");
        assert_eq!(grown.plan.layers, [0, 1, 2, 3].map(NewLayer::Old), "{method:?}");
        assert_eq!(grown.plan.params, grown.plan.source_params, "{method:?}");
        let copy = Model::load(&out).unwrap();
        assert_eq!(copy.config(), source.config(), "{method:?}");
        assert!(copy.params() == source.params(), "{method:?}");
    }
    assert!(!plan_growth(&dense, &GrowOptions::new(5)).unwrap().is_unchanged());
}

fn logits_f32(model: &Model, ids: &[u32]) -> Vec<f32> {
    logits(model, ids).into_iter().map(|z| z as f32).collect()
}

#[test]
fn an_interrupted_growth_continues_with_the_same_bytes() {
    let work = tempfile::tempdir().unwrap();
    let dense = tiny(work.path());
    let options = GrowOptions { epochs: 3, ..GrowOptions::new(6) };
    let [whole, out] = ["whole", "out"].map(|name| work.path().join(name));
    let grown = grow(&dense, &whole, &options, &mut |_| {}).unwrap();
    let open = |made_by: &str| Partial::open(&out, made_by.to_owned(), true).unwrap();
    // It dies behind the second epoch of the third kind of matrix, which is not kept yet, and while it writes.
    let mut seen = Vec::new();
    for (stage, done) in [("fitting", 8), ("writing", 5)] {
        seen.clear();
        let partial = open("work");
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            grow_from(&dense, &out, &options, &partial, &mut |at| {
                seen.push((at.stage, at.done));
                assert!(at.stage != stage || at.done < done, "the process dies");
            })
        }));
        assert!(died.is_err() && !out.exists(), "{stage}");
    }
    // Finished kinds and the first epoch of the third one were not done again.
    let fitting: Vec<u64> =
        seen.iter().filter(|(stage, _)| *stage == "fitting").map(|(_, done)| *done).collect();
    assert_eq!(fitting[..5], [0, 3, 6, 8, 9]);
    let error = grow_from(&dense, &out, &options, &open("other work"), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("out.partial") && error.contains("resume"), "{error}");
    let again = grow_from(&dense, &out, &options, &open("work"), &mut |_| {}).unwrap();
    assert_eq!(again, grown);
    let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&whole));
    open("work").remove().unwrap();
    assert!(!work.path().join("out.partial").exists());
}

#[test]
fn equal_layers_predict_themselves() {
    let work = tempfile::tempdir().unwrap();
    let dense = tiny(work.path());
    let mut model = Model::load(&dense).unwrap();
    for entry in model.layout().clone().entries() {
        let Some(rest) = entry.spec.name.strip_prefix("model.layers.") else { continue };
        let (_, name) = rest.split_once('.').unwrap();
        let first = model.layout().get(&format!("model.layers.0.{name}")).unwrap().range.clone();
        let copy = model.params()[first].to_vec();
        model.params_mut()[entry.range.clone()].copy_from_slice(&copy);
    }
    let equal = work.path().join("equal");
    std::fs::create_dir(&equal).unwrap();
    model.save(&equal, dsmoe_core::checkpoint::Dtype::F32).unwrap();
    let options = GrowOptions { epochs: 150, ..GrowOptions::new(5) };
    let grown = grow(&equal, &work.path().join("deep"), &options, &mut |_| {}).unwrap();
    let worst = grown.fits.iter().map(|fit| fit.relative_error).fold(0.0, f64::max);
    let deep = Model::load(&work.path().join("deep")).unwrap();
    let name = "self_attn.q_proj.weight";
    let (child, parent) = (values(&deep, 3, name), values(&deep, 2, name));
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let off: Vec<f32> = child.iter().zip(parent).map(|(a, b)| a - b).collect();
    let off = (norm(&off) / norm(parent)).sqrt();
    assert!(off < 0.01 && worst < 1e-4, "{off} {worst}");
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let work = tempfile::tempdir().unwrap();
    let dense = tiny(work.path());
    let options = GrowOptions { epochs: 1, ..GrowOptions::new(5) };
    let bytes = |name: &str, seed: u64| {
        let out = work.path().join(name);
        grow(&dense, &out, &GrowOptions { seed, ..options.clone() }, &mut |_| {}).unwrap();
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    assert!(bytes("a", 1) == bytes("b", 1));
    assert!(bytes("c", 2) != bytes("d", 1));
}

#[test]
fn wrong_requests_are_refused() {
    let work = tempfile::tempdir().unwrap();
    let dense = tiny(work.path());
    let refused = |options: GrowOptions, words: &str| {
        let error = plan_growth(&dense, &options).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(GrowOptions::new(3), "layers: is 3, and the model has 4; use 4 to copy it, or more");
    refused(GrowOptions::new(8), "layers: is 8, and 4 layers have 3 gaps; use at most 7");
    refused(GrowOptions { epochs: 0, ..GrowOptions::new(5) }, "epochs: is 0");
    let endless = GrowOptions { epochs: 100_000_000_000, ..GrowOptions::new(5) };
    refused(endless, "epochs: is 100000000000; use 1 to 10000");
    refused(GrowOptions { penalty: f64::NAN, ..GrowOptions::new(5) }, "penalty: is NaN");
    refused(GrowOptions { method: GrowMethod::Stack, ..GrowOptions::new(9) }, "use at most 8");
    let of = |text: &str| GrowOptions { fill: text.parse().unwrap(), ..GrowOptions::new(5) };
    refused(of("3-4"), "names the gap 3-4, and the last layer is 3");
    refused(of("0-1,1-2"), "names 2 gaps, and 1 layers are to be added");
    refused(
        GrowOptions { layers: 4, ..of("0-1") },
        "names 1 gaps, and no layer is to be added; leave it out",
    );
    for text in ["", "1-3", "a", "2", "18446744073709551615-0"] {
        let error = text.parse::<Fill>().unwrap_err().to_string();
        assert!(error.contains("pairs of neighbouring layers"), "{error}");
    }
    let chosen = plan_growth(&dense, &of("0-1")).unwrap().layers;
    assert_eq!(chosen[..3], [NewLayer::Old(0), NewLayer::Behind(0), NewLayer::Old(1)]);
}
