//! Mixtures whose gates share experts and that are cut again, against mixtures in which every gate has a copy of its expert.

use std::fs;
use std::path::Path;

use dsmoe_core::calibrate::LayerStream;
use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::{Config, MixtureSpec};
use dsmoe_core::model::{Batch, Model, StepArgs, TrainWorkspace};
use dsmoe_core::surgery::{LayerSurgery, NewExpert, Part, RouterRule, operate};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::testing::{assert_close_f64, refused};

use crate::moe::{LENGTH, MIXTURES, batch, case, golden};
use crate::surgery::{logits_of, merged, run, surgery_case};
use crate::worst;

/// Copies a case to `dir` in f32.
fn in_f32(name: &str, dir: &Path) {
    fs::create_dir(dir).unwrap();
    Model::load(&case(name)).unwrap().save(dir, Dtype::F32).unwrap();
}

/// Writes the mixture in `dir` to `out` with a copy of its expert for every gate.
fn tied(dir: &Path, out: &Path) {
    let source = Model::load(dir).unwrap();
    let mut config = source.config().clone();
    let spec = config.mixture().unwrap().clone();
    let experts = (0..config.num_layers).map(|layer| spec.gates(layer)).collect();
    config.set_mixture(MixtureSpec { experts, maps: None, ..spec.clone() });
    let mut model = Model::new(config);
    for entry in model.layout().clone().entries() {
        let name = &entry.spec.name;
        let of_gate = name.strip_prefix("model.layers.").and_then(|rest| {
            let (layer, rest) = rest.split_once(".mlp.experts.")?;
            let (gate, end) = rest.split_once('.')?;
            Some((layer.parse::<usize>().unwrap(), gate.parse::<usize>().unwrap(), end))
        });
        let old = match of_gate {
            None => name.clone(),
            Some((layer, gate, end)) => {
                let expert = spec.map(layer).map_or(gate, |map| map.of_gates()[gate] as usize);
                format!("model.layers.{layer}.mlp.experts.{expert}.{end}")
            }
        };
        let from = source.layout().get(&old).unwrap().range.clone();
        model.params_mut()[entry.range.clone()].copy_from_slice(&source.params()[from]);
    }
    fs::create_dir(out).unwrap();
    model.save(out, Dtype::F32).unwrap();
}

fn spec_of(dir: &Path) -> MixtureSpec {
    Config::load(dir).unwrap().mixture().unwrap().clone()
}

/// The gates of every expert of a layer.
fn groups(spec: &MixtureSpec, layer: usize) -> Vec<Vec<usize>> {
    let map = spec.map(layer).unwrap();
    (0..map.num_experts()).map(|expert| map.gates_of(expert).collect()).collect()
}

/// The expert of a layer that has several gates.
fn shared(spec: &MixtureSpec, layer: usize) -> usize {
    groups(spec, layer).iter().position(|gates| gates.len() > 1).unwrap()
}

#[test]
fn merged_experts_are_merged_again() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let [source, once, twice, at_once, copies, saved] =
            ["source", "once", "twice", "at-once", "copies", "saved"]
                .map(|end| work.path().join(format!("{name}-{end}")));
        in_f32(name, &source);
        let first = merged(&surgery_case(name));
        run(&source, &once, &first);
        let again = LayerSurgery {
            experts: vec![NewExpert::kept(2), NewExpert::merged([(0, 0.25), (1, 0.75)])],
            router: RouterRule::Map,
        };
        let report = run(&once, &twice, &[again.clone(), again]);
        // The same in one step, by the products of the weights.
        let direct = |layer: &LayerSurgery| {
            let parts = [0.25, 0.75].iter().zip(&layer.experts).flat_map(|(factor, expert)| {
                expert.parts.iter().map(move |part| (part.old, factor * part.weight))
            });
            let experts = vec![layer.experts[2].clone(), NewExpert::merged(parts)];
            LayerSurgery { experts, router: RouterRule::Map }
        };
        let of_one = run(&source, &at_once, &first.iter().map(direct).collect::<Vec<_>>());
        assert_eq!((report.total, report.activated), (of_one.total, of_one.activated), "{name}");
        assert_eq!(spec_of(&twice), spec_of(&at_once), "{name}");
        let found = logits_of(&twice, name);
        let differs = worst(&found, logits_of(&at_once, name).into_iter());
        assert!(differs < 2e-5, "{name}: {differs}");
        tied(&twice, &copies);
        let differs = worst(&found, logits_of(&copies, name).into_iter());
        assert!(differs < 2e-5, "{name}, copies: {differs}");
        assert!(worst(&found, logits_of(&once, name).into_iter()) > 1e-3, "{name}: nothing was merged");
        // It trains, and what is saved is read again.
        let mut model = Model::load(&twice).unwrap();
        let [inputs, targets] = batch(&golden(name).rows);
        let mut grads = Buf::zeros(model.params().len());
        let mut workspace = TrainWorkspace::new(&model, inputs.len(), Precision::F32);
        let batch = Batch { inputs: &inputs, targets: &targets, seq: LENGTH - 1 };
        let step = model.train_step(&mut grads, batch, &StepArgs::default(), &mut workspace).unwrap();
        assert!(step.loss_sum.is_finite() && grads.iter().any(|&g| g != 0.0), "{name}");
        model.params_mut().iter_mut().zip(grads.iter()).for_each(|(p, g)| *p -= 1e-3 * g);
        fs::create_dir(&saved).unwrap();
        model.save(&saved, Dtype::F32).unwrap();
        assert_eq!(Model::load(&saved).unwrap().params(), model.params(), "{name}");
        assert_eq!(spec_of(&saved), spec_of(&twice), "{name}");
    }
}

#[test]
fn experts_go_with_all_of_their_gates() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let [source, once, copies, out, fewer, plain] = ["source", "once", "copies", "out", "fewer", "plain"]
            .map(|end| work.path().join(format!("{name}-{end}")));
        in_f32(name, &source);
        run(&source, &once, &merged(&surgery_case(name)));
        tied(&once, &copies);
        let spec = spec_of(&once);
        // The shared expert behind one of the others, and the last one goes.
        let kept = [0, 1].map(|layer| {
            let shared = shared(&spec, layer);
            [(shared + 1) % 3, shared]
        });
        let gates: [Vec<usize>; 2] = [0, 1].map(|layer| {
            let groups = groups(&spec, layer);
            kept[layer].iter().flat_map(|&expert| groups[expert].clone()).collect()
        });
        let layers = kept.map(LayerSurgery::keep);
        let report = run(&once, &out, &layers);
        run(&copies, &fewer, &gates.clone().map(LayerSurgery::keep));
        let after = spec_of(&out);
        assert_eq!((&after.experts, after.top_k), (&vec![2, 2], spec.top_k), "{name}");
        for (layer, gates) in gates.iter().enumerate() {
            let map: Vec<u32> = (0..gates.len()).map(|gate| u32::from(gate > 0)).collect();
            assert_eq!(after.map(layer).unwrap().of_gates(), map, "{name} layer {layer}");
            let rows = [&out, &fewer].map(|dir| {
                let model = Model::load(dir).unwrap();
                let range = model.layout().get(&format!("model.layers.{layer}.mlp.gate.weight")).unwrap();
                model.params()[range.range.clone()].to_vec()
            });
            assert!(rows[0] == rows[1], "{name} layer {layer}");
        }
        let differs = worst(&logits_of(&out, name), logits_of(&fewer, name).into_iter());
        assert!(differs < 2e-5, "{name}: {differs}");
        // An expert of each layer and its only gate went.
        let expert = 3 * Config::load(&once).unwrap().hidden * spec.width;
        assert_eq!(
            report.total_before - report.total,
            2 * (expert + expert / (3 * spec.width)) as u64,
            "{name}"
        );
        // Without the shared expert each of the others has its own gate, and the family's format holds them.
        let others = [0, 1].map(|layer| (0..3).filter(|&e| e != shared(&spec, layer)).collect::<Vec<_>>());
        let layers = others.map(LayerSurgery::keep);
        operate(&once, &plain, (&layers, Some(2)), false, &mut |_| {}).unwrap();
        assert_eq!(Config::load(&plain).unwrap().model_type(), name);
        assert!(spec_of(&plain).maps.is_none());
    }
}

#[test]
fn means_of_gates_are_of_experts_with_one_each() {
    let work = tempfile::tempdir().unwrap();
    let [source, once, out] = ["source", "once", "out"].map(|end| work.path().join(end));
    in_f32("mixtral", &source);
    run(&source, &once, &merged(&surgery_case("mixtral")));
    let spec = spec_of(&once);
    let mean = |layer: usize, with_shared: bool| {
        let shared = shared(&spec, layer);
        let [one, other] = [(shared + 1) % 3, (shared + 2) % 3];
        let [first, second, alone] = if with_shared { [shared, one, other] } else { [one, other, shared] };
        let part = |old| Part { old, weight: 0.5, neurons: None };
        let merged = NewExpert { parts: vec![part(first), part(second)] };
        LayerSurgery { experts: vec![merged, NewExpert::kept(alone)], router: RouterRule::Mean }
    };
    refused(
        operate(&once, &out, (&[mean(0, false), mean(1, true)], None), false, &mut |_| {}),
        &["surgery of layer 1", "a mean of gates of expert", "which has 2 of them"],
    );
    assert!(!out.exists());
    run(&once, &out, &[mean(0, false), mean(1, false)]);
    let [old, new] = [&once, &out].map(|dir| Model::load(dir).unwrap());
    for layer in 0..2 {
        let rows = [&old, &new].map(|model| {
            let name = format!("model.layers.{layer}.mlp.gate.weight");
            model.params()[model.layout().get(&name).unwrap().range.clone()].to_vec()
        });
        let [old, new] = rows.each_ref().map(|rows| rows.chunks_exact(12).collect::<Vec<_>>());
        let (groups, shared) = (groups(&spec, layer), shared(&spec, layer));
        let [one, other] = [1, 2].map(|step| old[groups[(shared + step) % 3][0]]);
        assert_eq!(new.len(), 3);
        assert!(new[0].iter().zip(one.iter().zip(other)).all(|(z, (a, b))| (z - (a + b) / 2.0).abs() < 1e-6));
        assert!(new[1] == old[groups[shared][0]] && new[2] == old[groups[shared][1]], "layer {layer}");
    }
    assert!(logits_of(&out, "mixtral").iter().all(|z| z.is_finite()));
}

#[test]
fn statistics_of_shared_experts_are_those_of_all_their_gates() {
    let work = tempfile::tempdir().unwrap();
    for name in MIXTURES {
        let [source, once, copies, fewer] =
            ["source", "once", "copies", "fewer"].map(|end| work.path().join(format!("{name}-{end}")));
        in_f32(name, &source);
        run(&source, &once, &merged(&surgery_case(name)));
        tied(&once, &copies);
        let spec = spec_of(&once);
        let kept = [0, 1].map(|layer| [shared(&spec, layer), (shared(&spec, layer) + 1) % 3]);
        run(&once, &fewer, &kept.map(LayerSurgery::keep));
        let text = golden(name).rows;
        let [mut of_once, mut of_copies, mut of_kept, mut of_fewer] =
            [&once, &copies, &once, &fewer].map(|dir| LayerStream::open_experts(dir, &text).unwrap());
        for layer in 0..2 {
            let see = |stream: &mut LayerStream, kept: Option<&[usize]>| {
                let (weights, mut experts) = (stream.layer(layer).unwrap(), stream.experts(layer).unwrap());
                if let Some(kept) = kept {
                    experts = experts.keep(kept);
                }
                stream.attend(&weights).unwrap();
                let stats = stream.expert_stats(&weights, &experts, true);
                stream.join_experts(&weights, &experts);
                stats
            };
            let (one, all) = (see(&mut of_once, None), see(&mut of_copies, None));
            assert_eq!((one.tokens, one.experts.len()), (all.tokens, 3), "{name}");
            for (sums, gates) in one.experts.iter().zip(groups(&spec, layer)) {
                let of_gates = || gates.iter().map(|&gate| &all.experts[gate]);
                let [found, want] = [
                    vec![sums.soft, sums.coefficients, sums.weighted_norms],
                    vec![
                        of_gates().map(|sums| sums.soft).sum(),
                        of_gates().map(|sums| sums.coefficients).sum(),
                        of_gates().map(|sums| sums.weighted_norms).sum(),
                    ],
                ];
                assert_close_f64(&format!("{name} layer {layer}, gates {gates:?}"), &found, &want, 1e-4);
                let most = of_gates().map(|sums| sums.hard).fold(0.0, f64::max);
                assert!(sums.hard >= most && sums.hard <= of_gates().map(|sums| sums.hard).sum());
                assert_close_f64("outputs", &sums.outputs, &all.experts[gates[0]].outputs, 1e-4);
            }
            // What is seen of some experts is what the written model shows.
            let seen = see(&mut of_kept, Some(&kept[layer]));
            assert!(seen == see(&mut of_fewer, None), "{name} layer {layer}");
        }
    }
}
