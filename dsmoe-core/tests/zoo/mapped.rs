//! DSMoE models whose gates share experts, against models in which every gate has a copy of its expert.

use std::fs;
use std::path::Path;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::export::{ExportAs, ExportOptions, export};
use dsmoe_core::ffn::RouterBound;
use dsmoe_core::model::{Batch, Inference, Model, StepArgs, Workspace};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, RouterRule, SurgeryReport, operate};
use dsmoe_kernels::Precision;
use dsmoe_kernels::testing::{assert_close, f64s, refused};
use dsmoe_router::{RouterGradient, RouterGradientAt, RoutingStats, SparsityOver};
use serde_json::{Value, json};

use crate::layers::grads_of;
use crate::moe::{LENGTH, batch, golden, logits, tensors};
use crate::surgery::{forms, gated, gates};
use crate::worst;

/// Forms of DSMoE, and one whose coefficients depend on the number of gates.
fn all_forms() -> Vec<(&'static str, Value, Value)> {
    let rescaled = json!({ "rescale": "eq8", "zero_active": "force_argmax", "ste": false });
    forms().into_iter().chain([("rescaled", rescaled, json!({}))]).collect()
}

/// Merges the first gates of both layers: 0 with 2 in the first, and 0 with 1 and 3 in the second, whose order changes too.
fn merges(config: &Config) -> [LayerSurgery; 2] {
    let layer = |i: usize, group: &[usize], weights: &[f64]| {
        let merged = NewExpert::merged(group.iter().copied().zip(weights.iter().copied()));
        let others = (0..gates(config, i)).filter(|gate| !group.contains(gate)).map(NewExpert::kept);
        let experts: Vec<NewExpert> = others.chain([merged]).collect();
        LayerSurgery { experts, router: RouterRule::Map }
    };
    [layer(0, &[0, 2], &[0.25, 0.75]), layer(1, &[0, 1, 3], &[0.5, 0.25, 0.25])]
}

fn merge(dir: &Path, out: &Path) -> SurgeryReport {
    let layers = merges(&Config::load(dir).unwrap());
    operate(dir, out, (&layers, None), false, &mut |_| {}).unwrap()
}

/// The block of neurons in the merged model that a block of the model with copies is.
fn block(merged: &Config, layer: usize, block: usize) -> usize {
    let moe = merged.moe.as_ref().unwrap();
    let core = moe.core(layer);
    block.checked_sub(core).map_or(block, |gate| core + moe.map(layer).unwrap().of_gates()[gate] as usize)
}

fn is_neurons(name: &str) -> Option<usize> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.")?;
    let of_neurons =
        ["gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate_proj.bias", "up_proj.bias"];
    of_neurons.contains(&rest).then(|| layer.parse().unwrap())
}

/// Writes to `out` the model in `merged` with a copy of its expert for every gate, whose configuration is that of `whole`.
fn tied(whole: &Path, merged: &Path, out: &Path) {
    let source = Model::load(merged).unwrap();
    let mut model = Model::load(whole).unwrap();
    for entry in model.layout().clone().entries() {
        let name = &entry.spec.name;
        let from = &source.params()[source.layout().get(name).unwrap().range.clone()];
        let to = &mut model.params_mut()[entry.range.clone()];
        match is_neurons(name) {
            None => to.copy_from_slice(from),
            Some(layer) => {
                let len = to.len() / 6;
                for (i, to) in to.chunks_exact_mut(len).enumerate() {
                    to.copy_from_slice(&from[block(source.config(), layer, i) * len..][..len]);
                }
            }
        }
    }
    fs::create_dir(out).unwrap();
    model.save(out, Dtype::F32).unwrap();
}

fn stats_of(model: &Inference, [inputs, targets]: &[Vec<u32>; 2]) -> RoutingStats {
    let mut stats = model.new_stats().unwrap().with_routes().with_logits();
    let (mut losses, batch) = (vec![0.0; inputs.len()], Batch { inputs, targets, seq: LENGTH - 1 });
    model.score(&mut losses, batch, Some(&mut stats), &mut Workspace::default()).unwrap();
    stats
}

#[test]
fn shared_experts_give_what_copies_of_them_would() {
    let work = tempfile::tempdir().unwrap();
    let rows = golden("mixtral").rows;
    for (name, moe, keys) in all_forms() {
        let [dir, out, copies, saved] =
            ["whole", "merged", "copies", "saved"].map(|end| work.path().join(format!("{name}-{end}")));
        gated(&dir, &moe, &keys);
        let report = merge(&dir, &out);
        tied(&dir, &out, &copies);
        let [config, after] = [&dir, &out].map(|dir| Config::load(dir).unwrap());
        let of = |config: &Config| [0, 1].map(|layer| config.layer_experts(layer).unwrap());
        assert_eq!((of(&config), of(&after)), ([6, 6], [5, 4]), "{name}");
        // All gates stay, and an expert of the first layer and two of the second went.
        let neuron = 3 * 12 + if config.architecture.mlp_bias { 2 } else { 0 };
        let gone = |i: usize| ((i + 1) * config.layer(i).intermediate / 6 * neuron) as u64;
        assert_eq!(report.total, report.total_before - gone(0) - gone(1), "{name}");
        assert_eq!(report.total, Accounting::of(&after).total, "{name}");
        assert_eq!(Accounting::of(&after).router, Accounting::of(&config).router, "{name}");
        let [mut whole, mut left] = [&copies, &out].map(|dir| Inference::load(dir, Precision::F32).unwrap());
        let budgets = |config: &Config| -> Vec<f64> {
            config.moe.as_ref().unwrap().parts.budgets.iter().map(|budget| budget.active).collect()
        };
        let budgets: Vec<(f64, f64)> = budgets(&config).into_iter().zip(budgets(&after)).collect();
        let mut shared = 0;
        for step in 0..=budgets.len() {
            if let Some((before, after)) = step.checked_sub(1).map(|i| budgets[i]) {
                whole.set_active(before).unwrap();
                left.set_active(after).unwrap();
            }
            let want = logits(&whole, &rows, LENGTH);
            for piece in [LENGTH, 1, 3] {
                let differs = worst(&logits(&left, &rows, piece), want.iter().copied());
                assert!(differs < 2e-5, "{name} {step}, {piece} at a time: {differs}");
            }
            // An expert runs where any of its gates is open, once, with the sum of their coefficients.
            let [all, some] = [&whole, &left].map(|model| stats_of(model, &batch(&rows)));
            for layer in 0..2 {
                let [all, some] = [&all, &some].map(|stats| stats.routes().unwrap()[layer].clone());
                let n = after.layer_experts(layer).unwrap();
                let tokens = some.active.len() / n;
                let (mut active, mut sums, mut open) =
                    (vec![false; tokens * n], vec![0.0f64; tokens * n], vec![0; tokens * n]);
                for (pair, _) in all.active.iter().enumerate().filter(|(_, active)| **active) {
                    let at = pair / 6 * n + block(&after, layer, pair % 6);
                    (active[at], open[at]) = (true, open[at] + 1);
                    sums[at] += f64::from(all.coefficients[pair]);
                }
                assert_eq!(some.active, active, "{name} {step} layer {layer}");
                assert_close(&format!("{name} {step} layer {layer}"), &some.coefficients, &sums, 1e-5);
                shared += open.iter().filter(|&&open| open > 1).count();
            }
            // What thresholds open is counted by the logits of experts.
            if name == "plain" {
                let share = some.logits().unwrap().curves().share(&[0.0; 2]);
                assert!((share - some.active_ratio()).abs() < 0.02, "{share} {}", some.active_ratio());
            }
        }
        assert!(shared > 0, "{name}: no token opens two gates of one expert");
        // It is saved as it is, exported as far as a format has it, and has no other router.
        fs::create_dir(&saved).unwrap();
        Model::load(&out).unwrap().save(&saved, Dtype::F32).unwrap();
        assert!(tensors(&saved) == tensors(&out), "{name}");
        assert_eq!(Config::load(&saved).unwrap().moe, after.moe, "{name}");
        let native = work.path().join(format!("{name}-native"));
        export(&out, &native, &ExportOptions::new(ExportAs::Native), &mut |_| {}).unwrap();
        let hf = work.path().join(format!("{name}-hf"));
        let refusal = export(&out, &hf, &ExportOptions::new(ExportAs::Transformers), &mut |_| {});
        refused(refusal, &["dsmoe.expert_map says that gates share experts", "native"]);
        assert!(!hf.exists());
        refused(
            left.set_router_bound(RouterBound::Oracle),
            &["no gates that another router could stand in for"],
        );
    }
}

#[test]
fn gradients_of_shared_experts_are_sums_of_those_of_copies() {
    let work = tempfile::tempdir().unwrap();
    let [inputs, targets] = batch(&golden("mixtral").rows);
    let text = [&inputs[..], &targets[..]];
    for (name, moe, keys) in all_forms() {
        let [dir, out, copies] =
            ["whole", "merged", "copies"].map(|end| work.path().join(format!("{name}-{end}")));
        gated(&dir, &moe, &keys);
        merge(&dir, &out);
        tied(&dir, &out, &copies);
        let [whole, left] = [&copies, &out].map(|dir| Model::load(dir).unwrap());
        let plain = StepArgs { loss_scale: 0.1, ..StepArgs::default() };
        let sparse = StepArgs { sparsity_weight: 0.7, sparsity_over: SparsityOver::Active, ..plain };
        let with =
            |rule, index| StepArgs { router_gradient: RouterGradientAt { rule, seed: 3, index }, ..plain };
        let every = RouterGradient::Every(2);
        for (step, args) in [plain, sparse, with(every, 0), with(every, 1)].into_iter().enumerate() {
            let [all, some] = [&whole, &left].map(|model| grads_of(model, text, &args));
            for entry in left.layout().entries() {
                let what = format!("{name} {step} {}", entry.spec.name);
                let old = &all[whole.layout().get(&entry.spec.name).unwrap().range.clone()];
                let found = &some[entry.range.clone()];
                let want = match is_neurons(&entry.spec.name) {
                    None => f64s(old),
                    Some(layer) => {
                        let (len, mut sums) = (old.len() / 6, vec![0.0; found.len()]);
                        for (i, old) in old.chunks_exact(len).enumerate() {
                            let sums = &mut sums[block(left.config(), layer, i) * len..][..len];
                            sums.iter_mut().zip(old).for_each(|(sum, g)| *sum += f64::from(*g));
                        }
                        sums
                    }
                };
                assert_close(&what, found, &want, 2e-5);
            }
        }
        // A sample of nearly all inactive pairs is nearly all of them.
        let all = grads_of(&left, text, &plain);
        let sampled = grads_of(&left, text, &with(RouterGradient::Sample(0.999_999), 0));
        assert_close(&format!("{name}, sampled"), &sampled, &f64s(&all), 1e-4);
    }
}

#[test]
fn experts_that_gates_share_are_cut_again() {
    let work = tempfile::tempdir().unwrap();
    let rows = golden("mixtral").rows;
    for (name, moe, keys) in all_forms() {
        let [dir, out, copies, fewer, want, twice] = ["whole", "merged", "copies", "fewer", "want", "twice"]
            .map(|end| work.path().join(format!("{name}-{end}")));
        gated(&dir, &moe, &keys);
        merge(&dir, &out);
        tied(&dir, &out, &copies);
        let config = Config::load(&out).unwrap();
        let moe = config.moe.as_ref().unwrap();
        // The first expert goes, and the others are turned, each with all of its gates.
        let kept = [0, 1].map(|layer| {
            (1..config.layer_experts(layer).unwrap() - moe.core(layer)).rev().collect::<Vec<usize>>()
        });
        let of_gates = [0, 1].map(|layer| moe.map(layer).unwrap().keep(&kept[layer]).0);
        let [layers, reference] = [kept, of_gates].map(|kept| kept.map(LayerSurgery::keep));
        operate(&out, &fewer, (&layers, None), false, &mut |_| {}).unwrap();
        operate(&copies, &want, (&reference, None), false, &mut |_| {}).unwrap();
        let [found, want] =
            [&fewer, &want].map(|dir| logits(&Inference::load(dir, Precision::F32).unwrap(), &rows, LENGTH));
        let differs = worst(&found, want.into_iter());
        assert!(differs < 2e-5, "{name}: {differs}");
        // A second merge leaves every gate with what its expert became.
        let again = [0, 1].map(|layer| {
            let experts = config.layer_experts(layer).unwrap() - moe.core(layer);
            let others = (0..experts - 2).map(NewExpert::kept);
            let merged = NewExpert::merged([(experts - 2, 0.5), (experts - 1, 0.5)]);
            LayerSurgery { experts: others.chain([merged]).collect(), router: RouterRule::Map }
        });
        operate(&out, &twice, (&again, None), false, &mut |_| {}).unwrap();
        let after = Config::load(&twice).unwrap().moe.unwrap();
        for layer in 0..2 {
            let last = config.layer_experts(layer).unwrap() - moe.core(layer) - 2;
            let once = moe.map(layer).unwrap().of_gates().iter();
            let composed: Vec<u32> = once.map(|&expert| expert.min(last as u32)).collect();
            assert_eq!(after.map(layer).unwrap().of_gates(), composed, "{name} layer {layer}");
        }
        assert!(Model::load(&twice).unwrap().params().iter().all(|p| p.is_finite()));
        let mean = again.map(|layer| LayerSurgery { router: RouterRule::Mean, ..layer });
        let refusal = operate(&out, &work.path().join("none"), (&mean, None), false, &mut |_| {});
        refused(refusal, &["a mean of gates of expert", "which has"]);
    }
}

#[test]
fn wrong_maps_of_sigmoid_gates_are_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let [dir, out] = ["whole", "merged"].map(|name| work.path().join(name));
    let [_, (_, moe, keys), ..] = forms();
    gated(&dir, &moe, &keys);
    merge(&dir, &out);
    let text = fs::read_to_string(out.join("config.json")).unwrap();
    let map = serde_json::from_str::<Value>(&text).unwrap()["dsmoe"]["expert_map"].clone();
    assert_eq!(map, json!([[3, 0, 3, 1, 2], [1, 1, 0, 1]]));
    for (value, parts) in [
        (json!([map[0]]), ["dsmoe.expert_map has 1 lists", "num_hidden_layers is 2"]),
        (json!([[4, 0, 3, 1, 2], map[1]]), ["dsmoe.expert_map is wrong in layer 0", "below 4"]),
        (json!([map[0], [0, 0, 0, 0]]), ["dsmoe.expert_map is wrong in layer 1", "a gate for expert 1"]),
        (json!([map[0], [1, 1, 0]]), ["mlp.router.b.weight has shape [4, 3]", "layers.1"]),
    ] {
        let mut json: Value = serde_json::from_str(&text).unwrap();
        json["dsmoe"]["expert_map"] = value;
        fs::write(out.join("config.json"), json.to_string()).unwrap();
        refused(Inference::load(&out, Precision::F32), &parts);
    }
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["dsmoe"]["format_version"] = json!(1);
    for key in ["core", "router_rank", "correction", "budgets", "experts_per_layer"] {
        json["dsmoe"].as_object_mut().unwrap().shift_remove(key);
    }
    fs::write(out.join("config.json"), json.to_string()).unwrap();
    refused(Inference::load(&out, Precision::F32), &["dsmoe.expert_map needs format_version 2"]);
}
