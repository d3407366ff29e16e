//! DSMoE models whose layers have different numbers of experts, against the models that have all of them.

use std::fs;
use std::path::Path;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::model::{Batch, Inference, Model, StepArgs, TrainWorkspace, Workspace};
use dsmoe_core::surgery::{LayerSurgery, SurgeryReport, operate};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::cross_entropy::IGNORE;
use dsmoe_kernels::testing::{assert_close, f64s, refused};
use dsmoe_router::{RoutingStats, SparsityOver};
use serde_json::{Value, json};

use crate::moe::{LENGTH, batch, golden, logits, tensors};
use crate::surgery::{RANK, forms, gated, gates, shut};
use crate::worst;

/// The gates that are shut and go, by layer. In both layers both are shut.
const GONE: [&[usize]; 2] = [&[3], &[1, 3]];

/// Writes the model in `dir` to `out` without the gates of [`GONE`].
fn without(dir: &Path, out: &Path) -> SurgeryReport {
    let config = Config::load(dir).unwrap();
    let layer = |i| LayerSurgery::keep((0..gates(&config, i)).filter(|gate| !GONE[i].contains(gate)));
    operate(dir, out, (&[layer(0), layer(1)], None), false, &mut |_| {}).unwrap()
}

fn stats_of(model: &Inference, [inputs, targets]: &[Vec<u32>; 2]) -> RoutingStats {
    let (mut losses, mut stats) = (vec![0.0; inputs.len()], model.new_stats().unwrap().traced());
    let batch = Batch { inputs, targets, seq: LENGTH - 1 };
    model.score(&mut losses, batch, Some(&mut stats), &mut Workspace::default()).unwrap();
    stats
}

/// The gradients of one step.
pub(crate) fn grads_of(model: &Model, [inputs, targets]: [&[u32]; 2], args: &StepArgs) -> Buf {
    let mut grads = Buf::zeros(model.params().len());
    let mut workspace = TrainWorkspace::new(model, inputs.len(), Precision::F32);
    let batch = Batch { inputs, targets, seq: LENGTH - 1 };
    let step = model.train_step(&mut grads, batch, args, &mut workspace).unwrap();
    assert!(step.loss_sum.is_finite() && step.went_back);
    grads
}

#[test]
fn layers_lose_different_numbers_of_experts_that_never_open() {
    let work = tempfile::tempdir().unwrap();
    let rows = golden("mixtral").rows;
    for (name, moe, keys) in forms() {
        let [dir, out] = [name.to_owned(), format!("{name}-fewer")].map(|name| work.path().join(name));
        gated(&dir, &moe, &keys);
        shut(&dir, &[1, 3]);
        let report = without(&dir, &out);
        let [config, fewer] = [&dir, &out].map(|dir| Config::load(dir).unwrap());
        assert_eq!([0, 1].map(|layer| fewer.layer_experts(layer)), [Some(5), Some(4)], "{name}");
        assert_eq!((fewer.num_experts(), Accounting::of(&fewer).num_experts), (Some(5), 4.5), "{name}");
        let json: Value = serde_json::from_str(&fewer.to_json()).unwrap();
        assert_eq!(
            [&json["dsmoe"]["experts_per_layer"], &json["dsmoe"]["format_version"]],
            [&json!([5, 4]), &json!(2)]
        );
        // What is held, by hand: an expert and its gate less in the first layer, two in the second.
        let moe = config.moe.as_ref().unwrap();
        let gate = 1 + if moe.parts.router_rank.is_some() { RANK } else { 12 };
        let neuron = 3 * 12 + if config.architecture.mlp_bias { 2 } else { 0 };
        let gone = |i: usize| (GONE[i].len() * (config.layer(i).intermediate / 6 * neuron + gate)) as u64;
        assert_eq!(report.total, report.total_before - gone(0) - gone(1), "{name}");
        assert_eq!(report.total, Accounting::of(&fewer).total, "{name}");
        // The same logits, as a whole and token by token, and as many active experts, at every budget.
        let [mut whole, mut left] = [&dir, &out].map(|dir| Inference::load(dir, Precision::F32).unwrap());
        let budgets: Vec<[f64; 2]> = {
            let after = fewer.moe.as_ref().unwrap();
            let pairs = moe.parts.budgets.iter().zip(&after.parts.budgets);
            pairs.map(|(before, after)| [before.active, after.active]).collect()
        };
        for step in 0..=budgets.len() {
            if let Some([before, after]) = step.checked_sub(1).map(|i| budgets[i]) {
                let want = (1.5 + (before * 6.0 - 1.5) / 4.5 * 3.0) / 4.5;
                assert!((after - want).abs() < 1e-12, "{name}: {after} for {before}");
                whole.set_active(before).unwrap();
                left.set_active(after).unwrap();
            }
            let want = logits(&whole, &rows, LENGTH);
            assert!(logits(&left, &rows, LENGTH) == want, "{name} {step}");
            let differs = worst(&logits(&left, &rows, 1), want.iter().copied());
            assert!(differs < 1e-5, "{name} {step}: {differs}");
            let [all, some] = [&whole, &left].map(|model| stats_of(model, &batch(&rows)));
            assert_eq!(some.active_of_tokens(), all.active_of_tokens(), "{name} {step}");
            let [all, some] = [all.summary(), some.summary()];
            assert_eq!(some.load_per_layer.iter().map(Vec::len).collect::<Vec<_>>(), [5, 4], "{name}");
            assert_eq!(some.active_experts, all.active_experts, "{name} {step}");
            assert!((some.active_ratio - all.active_experts / 4.5).abs() < 1e-12, "{name} {step}");
        }
        // It is saved as it is, and exported as far as a format has it.
        let saved = work.path().join(format!("{name}-saved"));
        fs::create_dir(&saved).unwrap();
        Model::load(&out).unwrap().save(&saved, Dtype::F32).unwrap();
        assert!(tensors(&saved) == tensors(&out), "{name}");
        assert_eq!(Config::load(&saved).unwrap().moe, fewer.moe, "{name}");
        let native = work.path().join(format!("{name}-native"));
        export(&out, &native, &ExportOptions::new(ExportAs::Native), &mut |_| {}).unwrap();
        let hf = work.path().join(format!("{name}-hf"));
        let refusal = export(&out, &hf, &ExportOptions::new(ExportAs::Transformers), &mut |_| {});
        refused(refusal, &["dsmoe.experts_per_layer", "different numbers of experts", "native"]);
        assert!(!hf.exists());
        // As many again in every layer are a model without the key.
        let even = work.path().join(format!("{name}-even"));
        let of_first = LayerSurgery::keep(0..gates(&fewer, 0) - 1);
        let layers = [of_first, LayerSurgery::keep(0..gates(&fewer, 1))];
        operate(&out, &even, (&layers, None), false, &mut |_| {}).unwrap();
        let even = Config::load(&even).unwrap();
        assert!(even.moe.as_ref().unwrap().parts.experts.is_empty(), "{name}");
        assert_eq!(even.num_experts(), Some(4), "{name}");
    }
}

#[test]
fn layers_of_different_numbers_of_experts_train_as_those_of_all() {
    let work = tempfile::tempdir().unwrap();
    let [inputs, targets] = batch(&golden("mixtral").rows);
    let nothing = vec![IGNORE; targets.len()];
    for (name, moe, keys) in forms() {
        let [dir, out] = [name.to_owned(), format!("{name}-fewer")].map(|name| work.path().join(name));
        gated(&dir, &moe, &keys);
        shut(&dir, &[1, 3]);
        without(&dir, &out);
        let [whole, left] = [&dir, &out].map(|dir| Model::load(dir).unwrap());
        // Shut gates have no slope, so that what they switch has no part in any gradient.
        let args = StepArgs { loss_scale: 0.1, ..StepArgs::default() };
        let [all, some] = [&whole, &left].map(|model| grads_of(model, [&inputs, &targets], &args));
        let mut compared = 0;
        for entry in left.layout().entries() {
            let old = whole.layout().get(&entry.spec.name).unwrap();
            if old.spec.shape == entry.spec.shape {
                let what = format!("{name} {}", entry.spec.name);
                assert_close(&what, &some[entry.range.clone()], &f64s(&all[old.range.clone()]), 1e-5);
                compared += 1;
            }
        }
        assert!(compared >= 10, "{name}: {compared}");
        // The sparsity loss is a mean over layers of the means over their gates.
        let args = StepArgs { sparsity_weight: 3.0, sparsity_over: SparsityOver::All, ..args };
        let [all, some] = [&whole, &left].map(|model| grads_of(model, [&inputs, &nothing], &args));
        let bias = "model.layers.1.mlp.router.bias";
        let of = |model: &Model, grads: &Buf| grads[model.layout().get(bias).unwrap().range.clone()].to_vec();
        let [all, some] = [of(&whole, &all), of(&left, &some)];
        let factor = all.len() as f64 / some.len() as f64;
        let kept = (0..all.len()).filter(|gate| !GONE[1].contains(gate));
        let want: Vec<f64> = kept.map(|gate| factor * f64::from(all[gate])).collect();
        assert!(want.iter().all(|&g| g != 0.0), "{name}: {want:?}");
        assert_close(&format!("{name} sparsity"), &some, &want, 1e-5);
    }
}

#[test]
fn gates_of_layers_of_different_numbers_fold_into_a_dense_model() {
    let work = tempfile::tempdir().unwrap();
    let [dir, out, folded] = ["moe", "fewer", "dense"].map(|name| work.path().join(name));
    gated(&dir, &json!({ "format_version": 1 }), &json!({}));
    without(&dir, &out);
    let fold =
        |means: Vec<Vec<f64>>| ExportOptions { fold: Some(means), ..ExportOptions::new(ExportAs::Dense) };
    let wrong = export(&out, &folded, &fold(vec![vec![0.5; 5]; 2]), &mut |_| {});
    refused(wrong, &["factors are not of 2 layers"]);
    export(&out, &folded, &fold(vec![vec![0.5; 5], vec![0.25; 4]]), &mut |_| {}).unwrap();
    let dense = Config::load(&folded).unwrap();
    assert!(dense.is_dense());
    assert_eq!([0, 1].map(|i| dense.layer(i).intermediate), [20, 16]);
    for (layer, factor) in [(0, 0.5f32), (1, 0.25)] {
        let name = format!("model.layers.{layer}.mlp.down_proj.weight");
        let [all, some] = [&out, &folded].map(|dir| {
            let bytes = &tensors(dir)[&name].1;
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
        });
        assert!(all.iter().zip(&some).all(|(all, some)| factor * all == *some), "{name}");
    }
}

#[test]
fn wrong_numbers_of_experts_are_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let [dir, out] = ["moe", "fewer"].map(|name| work.path().join(name));
    let [_, (_, moe, keys), ..] = forms();
    gated(&dir, &moe, &keys);
    without(&dir, &out);
    let text = fs::read_to_string(out.join("config.json")).unwrap();
    for (key, value, parts) in [
        (
            "experts_per_layer",
            json!([5]),
            ["dsmoe.experts_per_layer has 1 entries", "num_hidden_layers is 2"],
        ),
        ("experts_per_layer", json!([5, 0]), ["dsmoe.experts_per_layer is 0 for layer 1", "num_experts, 5"]),
        ("experts_per_layer", json!([6, 4]), ["dsmoe.experts_per_layer is 6 for layer 0", "num_experts, 5"]),
        ("experts_per_layer", json!([4, 4]), ["dsmoe.num_experts is 5 and no entry", "the largest of them"]),
        ("experts_per_layer", json!([5, 3]), ["16 is not divisible by 3", "config.json"]),
        ("core", json!([1, 4]), ["dsmoe.core is 4 in layer 1 of 4 experts", "at least one expert"]),
        ("format_version", json!(1), ["dsmoe.experts_per_layer needs format_version 2", "has 1"]),
    ] {
        let mut json: Value = serde_json::from_str(&text).unwrap();
        json["dsmoe"][key] = value;
        fs::write(out.join("config.json"), json.to_string()).unwrap();
        refused(Inference::load(&out, Precision::F32), &parts);
    }
}
