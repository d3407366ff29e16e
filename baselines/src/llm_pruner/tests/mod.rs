//! Groups and importances against loops in f64 and numbers worked by hand.

mod reference;

use dsmoe_core::{Config, Model};
use dsmoe_kernels::rng::Rng;
use dsmoe_kernels::testing::assert_close_f64;

use super::groups::{Cuts, Groups};
use super::importance::{Importance, Reduce, Scoring, group_scores, largest, random_scores, reduced};
use reference::{Line, Tensor, Tensors, gradients, group, loss, member, tensors};

const GRADIENT_KINDS: [Importance; 4] =
    [Importance::TaylorFirst, Importance::TaylorSecond, Importance::TaylorMix, Importance::Vector];
const REDUCES: [Reduce; 5] = [Reduce::Sum, Reduce::Max, Reduce::Mean, Reduce::Prod, Reduce::Last];

fn toy(tied: bool) -> Model {
    let config = format!(
        r#"{{"model_type": "llama", "hidden_act": "silu", "vocab_size": 7, "hidden_size": 6, "intermediate_size": 5,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": {tied}}}"#
    );
    let mut model = Model::new(Config::from_json("config.json".as_ref(), &config).unwrap());
    let layout = model.layout().clone();
    for (i, entry) in layout.entries().iter().enumerate() {
        let mut rng = Rng::new(3, i as u64);
        for p in &mut model.params_mut()[entry.range.clone()] {
            *p = if entry.spec.name.contains("norm") { 1.0 + 0.2 * rng.normal() } else { 0.5 * rng.normal() };
        }
    }
    model
}

fn calibration() -> Vec<Vec<u32>> {
    let mut rng = Rng::new(4, 4);
    (0..3).map(|_| (0..6).map(|_| rng.below(7) as u32).collect()).collect()
}

/// Scores, and the mean loss where gradients were taken.
fn scores(
    model: &Model,
    sets: &[Groups],
    importance: Importance,
    reduce: Reduce,
    window: usize,
) -> (Vec<Vec<f64>>, Option<f64>) {
    let scoring = Scoring { importance, reduce, window };
    group_scores(model, sets, scoring, &calibration(), &mut |_, _| {}).unwrap()
}

/// Lines of a neuron, as one lane.
fn neuron(layer: usize, j: usize) -> Vec<Vec<(String, Vec<Line>)>> {
    let lines = [("gate", Line::Row(j)), ("up", Line::Row(j)), ("down", Line::Column(j))];
    let line = |(name, line)| (format!("model.layers.{layer}.mlp.{name}_proj.weight"), vec![line]);
    vec![lines.map(line).to_vec()]
}

/// Lines of a key and value head with two query heads of four rows each, a lane per row.
fn head(layer: usize, kv: usize) -> Vec<Vec<(String, Vec<Line>)>> {
    let name = |name: &str| format!("model.layers.{layer}.self_attn.{name}.weight");
    let lane = |r: usize| {
        let queries = [(2 * kv) * 4 + r, (2 * kv + 1) * 4 + r];
        vec![
            (name("q_proj"), queries.map(Line::Row).to_vec()),
            (name("k_proj"), vec![Line::Row(kv * 4 + r)]),
            (name("v_proj"), vec![Line::Row(kv * 4 + r)]),
            (name("o_proj"), queries.map(Line::Column).to_vec()),
        ]
    };
    (0..4).map(lane).collect()
}

/// Lines of a channel, as one lane.
fn channel(names: &Tensors, c: usize) -> Vec<Vec<(String, Vec<Line>)>> {
    let writes = |name: &str| name.contains("o_proj") || name.contains("down_proj");
    let line = |name: &String| vec![if writes(name) { Line::Row(c) } else { Line::Column(c) }];
    let mut lines: Vec<_> = names.keys().map(|name| (name.clone(), line(name))).collect();
    let head =
        if names.contains_key("lm_head.weight") { "lm_head.weight" } else { "model.embed_tokens.weight" };
    lines.sort_by_key(|(name, _)| name == head);
    vec![lines]
}

fn check(what: &str, got: &[f64], want: Vec<f64>, reduce: Reduce) {
    let got: Vec<f64> = got.iter().map(|&x| if reduce == Reduce::Prod { x.exp() } else { x }).collect();
    let largest = want.iter().copied().fold(0.0, f64::max);
    assert!(largest > 0.0, "{what}: all zero");
    let relative = |x: &[f64]| x.iter().map(|x| x / largest).collect::<Vec<_>>();
    // Relative errors of a product's factors add up.
    let tolerance = if reduce == Reduce::Prod { 2e-3 } else { 5e-5 };
    assert_close_f64(what, &relative(&got), &relative(&want), tolerance);
}

#[test]
fn importances_are_those_of_differences_in_f64() {
    for tied in [true, false] {
        let model = toy(tied);
        let (config, p) = (model.config(), tensors(&model, model.params()));
        let grads: Vec<Tensors> = calibration().iter().map(|ids| gradients(config, &p, ids)).collect();
        let sets = [Groups::neurons(config, 1), Groups::heads(config, 0), Groups::channels(config)];
        for importance in GRADIENT_KINDS.into_iter().chain([Importance::MagnitudeL1, Importance::MagnitudeL2])
        {
            for reduce in REDUCES {
                let (got, _) = scores(&model, &sets, importance, reduce, 1 << 20);
                let want = |lanes: &[Vec<(String, Vec<Line>)>]| group(importance, reduce, &p, &grads, lanes);
                let what = |set: &str| format!("tied {tied} {importance:?} {reduce:?} {set}");
                check(&what("neurons"), &got[0], (0..5).map(|j| want(&neuron(1, j))).collect(), reduce);
                check(&what("heads"), &got[1], (0..2).map(|kv| want(&head(0, kv))).collect(), reduce);
                let channels = (0..6).map(|c| want(&channel(&p, c)));
                check(&what("channels"), &got[2], channels.collect(), reduce);
            }
        }
        let mean = calibration().iter().map(|ids| loss(config, &p, ids)).sum::<f64>() / 3.0;
        for importance in GRADIENT_KINDS {
            let (_, reported) = scores(&model, &sets, importance, Reduce::Sum, 1 << 20);
            assert!((reported.unwrap() - mean).abs() < 1e-5, "{importance:?}: {reported:?} for {mean}");
        }
    }
}

#[test]
fn windows_of_any_size_give_the_same_mix() {
    let model = toy(false);
    let sets = [Groups::heads(model.config(), 1), Groups::channels(model.config())];
    let mix = |window| scores(&model, &sets, Importance::TaylorMix, Reduce::Sum, window).0;
    let whole = mix(1 << 20);
    for window in [1, 50, 333] {
        for (cut, whole) in mix(window).iter().zip(&whole) {
            assert_close_f64(&format!("window {window}"), cut, whole, 1e-12);
        }
    }
}

#[test]
fn salience_by_hand() {
    let row = |values: [f64; 2]| Tensor { cols: 2, values: values.to_vec() };
    let (w, g) = (row([1.0, 2.0]), row([0.5, -0.5]));
    let of = |importance| member(importance, &w, &[&g], &[0, 1]);
    assert_eq!(of(Importance::TaylorFirst), 1.5);
    assert_eq!(of(Importance::Vector), 0.5);
    assert_eq!(of(Importance::TaylorSecond), 1.25);
    assert_eq!(of(Importance::TaylorMix), 1.875);
    assert_eq!((of(Importance::MagnitudeL1), of(Importance::MagnitudeL2)), (3.0, 5.0));
}

#[test]
fn query_heads_are_added_to_the_head_that_serves_them() {
    let set = |lanes, width| {
        let mut set = Groups::heads(toy(true).config(), 0);
        set.members.truncate(1);
        (set.lanes, set.members[0].width) = (lanes, width);
        set
    };
    assert_eq!(reduced(&set(1, 2), &[vec![1.0, 2.0, 3.0, 4.0]], Reduce::Sum).unwrap(), [3.0, 7.0]);
    // Two rows a head, two query heads a key head: rows 0 and 2, 1 and 3 correspond.
    let eight = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    let products = reduced(&set(2, 4), &[eight], Reduce::Prod).unwrap();
    assert!((products[0].exp() - 10.0).abs() < 1e-12 && (products[1].exp() - 26.0).abs() < 1e-12);
}

#[test]
fn products_of_many_small_numbers_keep_their_order() {
    let mut set = Groups::neurons(toy(true).config(), 0);
    (set.count, set.members) = (2, vec![set.members[0].clone(); 300]);
    let members: Vec<Vec<f64>> = (0..300).map(|i| vec![1e-9, if i == 7 { 2e-9 } else { 1e-9 }]).collect();
    let products = reduced(&set, &members, Reduce::Prod).unwrap();
    assert!(products[1] > products[0], "{products:?}");
    let error = reduced(&set, &[vec![f64::NAN, 1.0]], Reduce::Last).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
}

#[test]
fn the_largest_stay_in_order() {
    assert_eq!(largest(&[3.0, 1.0, 2.0, 1.0, f64::NEG_INFINITY], 3), [0, 2, 3]);
    assert_eq!(largest(&[1.0, 1.0], 0), [] as [usize; 0]);
    let sets = [Groups::neurons(toy(true).config(), 0), Groups::neurons(toy(true).config(), 1)];
    assert_eq!(random_scores(&sets, 1), random_scores(&sets, 1));
    assert_ne!(random_scores(&sets, 1), random_scores(&sets, 2));
    assert_ne!(random_scores(&sets, 1)[0], random_scores(&sets, 1)[1]);
}

#[test]
fn a_group_takes_its_lines_along() {
    let model = toy(false);
    let mut cuts = Cuts::default();
    cuts.keep(&Groups::heads(model.config(), 1), &[1]);
    let cut = |name: &str| cuts.of(&format!("model.layers.1.self_attn.{name}.weight"));
    let second = |width: usize| Some((width..2 * width).collect::<Vec<_>>());
    assert_eq!((cut("q_proj").rows, cut("q_proj").columns), (second(8), None));
    assert_eq!((cut("k_proj").rows, cut("v_proj").rows), (second(4), second(4)));
    assert_eq!((cut("o_proj").rows, cut("o_proj").columns), (None, second(8)));
    assert_eq!(cuts.of("model.layers.0.self_attn.q_proj.weight"), Default::default());
    let channels = Groups::channels(model.config());
    assert_eq!(channels.members.len(), model.layout().entries().len());
    assert_eq!(channels.members.last().unwrap().tensor, "lm_head.weight");
}
