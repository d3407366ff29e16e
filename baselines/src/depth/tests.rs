//! Scores against formulas, and choices against all subsets.

use dsmoe_core::Model;
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::model::{Cache, Inference, Workspace};
use dsmoe_kernels::Precision;

use super::score::{Choose, angle, without};
use super::*;
use crate::divergence::Divergence;

#[test]
fn angles_are_shares_of_half_a_turn() {
    let a = [1.0, 0.0, 0.0, 2.0, 3.0, 3.0];
    let b = [0.0, 5.0, 0.0, -1.0, 1.0, 1.0];
    assert!((angle(&a, &b, 2) - (0.5 + 1.0 + 0.0) / 3.0).abs() < 1e-7);
    assert_eq!(angle(&[0.0; 2], &[1.0; 2], 2), 0.0);
}

/// A score of sets that is not additive: its greedy choice, its best block and the best single layers all differ.
#[test]
fn the_choices_are_what_they_say() {
    let own = [4.0, 1.0, 2.0, 3.0, 1.5, 5.0];
    let score = |set: &[usize]| -> f64 {
        let pairs = set.iter().flat_map(|&a| set.iter().map(move |&b| (a, b)));
        let coupled = pairs.filter(|(a, b)| a < b && (a + b) % 3 == 2).count();
        set.iter().map(|&i| own[i]).sum::<f64>() + 10.0 * coupled as f64
    };
    let choose = |choice, count| {
        let choose = Choose { choice, count, layers: own.len() };
        choose.choose(&mut |set| Ok(score(set)), &mut |_| {}).unwrap().0
    };
    assert_eq!(choose(Choice::Independent, 3), [1, 2, 4]);
    let blocks = (0..4).map(|first| (score(&[first, first + 1, first + 2]), first));
    let best = blocks.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1;
    assert_eq!(choose(Choice::Consecutive, 3), [best, best + 1, best + 2]);
    // 1 first; then 2, as 4 is coupled with 1; then 5, as 0, 3 and 4 are coupled with 1 or 2.
    assert_eq!(choose(Choice::Greedy, 3), [1, 2, 5]);
}

#[test]
fn a_layer_that_adds_nothing_has_no_divergence_and_others_that_of_the_models_logits() {
    let work = tempfile::tempdir().unwrap();
    let json = preset("tiny").unwrap().to_json().replace("\"vocab_size\": 2048", "\"vocab_size\": 40");
    let config = Config::from_json(std::path::Path::new("config.json"), &json).unwrap();
    let dir = work.path().join("dense");
    init(&config, &dir, &InitOptions { seed: 4, ..InitOptions::default() }, &mut |_| {}).unwrap();
    let mut model = Model::load(&dir).unwrap();
    for name in ["self_attn.o_proj", "mlp.down_proj"] {
        let range = model.layout().get(&format!("model.layers.1.{name}.weight")).unwrap().range.clone();
        model.params_mut()[range].fill(0.0);
    }
    // Layers do enough to tell distributions apart.
    let layout = model.layout().clone();
    for entry in layout.entries().iter().filter(|entry| entry.spec.shape.len() == 2) {
        model.params_mut()[entry.range.clone()].iter_mut().for_each(|w| *w *= 6.0);
    }
    let text = vec![vec![3, 9, 20, 1, 39], vec![17, 2, 2, 30, 8]];
    let mut short = Model::new(config.with_layers(&[0, 1, 3]).unwrap());
    for entry in short.layout().clone().entries() {
        let name = super::source_name(&entry.spec.name, &[0, 1, 3]);
        let from = layout.get(&name).unwrap().range.clone();
        short.params_mut()[entry.range.clone()].copy_from_slice(&model.params()[from]);
    }
    let logits = |model: &Inference, ids: &[u32]| -> Vec<f64> {
        let (mut cache, mut workspace) = (Cache::new(model, 8), Workspace::default());
        let z = model.logits(ids, ids.len(), &mut cache, None, &mut workspace).unwrap();
        z.iter().map(|&z| f64::from(z)).collect()
    };
    let [whole, part] = [&model, &short].map(|model| Inference::new(model, Precision::F32));
    let mut want = 0.0;
    for ids in &text {
        let (p, q) = (logits(&whole, ids), logits(&part, ids));
        for (p, q) in p.chunks(40).zip(q.chunks(40)) {
            let total = |z: &[f64]| z.iter().map(|z| z.exp()).sum::<f64>();
            let terms = p.iter().zip(q).map(|(a, b)| {
                let (of_p, of_q) = (a.exp() / total(p), b.exp() / total(q));
                of_p * (of_p / of_q).ln()
            });
            want += terms.sum::<f64>() / 10.0;
        }
    }
    let mut divergence = Divergence::new(model, Precision::F32, &text).unwrap();
    assert!(without(&mut divergence, &[1]).unwrap().abs() < 1e-6);
    let got = without(&mut divergence, &[2]).unwrap();
    assert!(want > 0.01 && (got - want).abs() < 1e-4 * want.max(1.0), "{got} {want}");
    // The model is whole again afterwards.
    assert!(without(&mut divergence, &[]).unwrap().abs() < 1e-6);
}

#[test]
fn names_are_those_of_the_layers_that_stay() {
    assert_eq!(
        source_name("model.layers.1.mlp.up_proj.weight", &[0, 7]),
        "model.layers.7.mlp.up_proj.weight"
    );
    assert_eq!(source_name("model.norm.weight", &[0, 7]), "model.norm.weight");
}
