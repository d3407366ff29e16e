//! Clusters, orders, scores and budgets against hand-worked numbers, SciPy and scikit-learn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::calibrate::{ExpertStats, ExpertSums};
use dsmoe_core::convert::{UpcycleOptions, upcycle};
use dsmoe_core::init::{InitOptions, init, preset};
use dsmoe_core::surgery::RouterRule;
use dsmoe_kernels::comm::alone;
use dsmoe_kernels::testing::assert_close_f64;
use serde_json::{Value, json};

use super::budget::Held;
use super::hc_smoe::first_clusters;
use super::linkage::{Linkage, agglomerate};
use super::seer::{Score, largest, scores_of, shares_of_budgets};
use super::uncurl::{Affinity, affinities};
use super::{align, entropy, groups_of, shares, spectral};
use crate::method::{Budget, Job};
use crate::partial::Partial;
use crate::registry::method;
use crate::settings::read_settings;

fn cases() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/clusters.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn list<T: serde::de::DeserializeOwned>(json: &Value) -> Vec<T> {
    serde_json::from_value(json.clone()).unwrap()
}

fn distances(points: &[f64]) -> Vec<f64> {
    let points: Vec<&[f64]> = points.chunks_exact(2).collect();
    let distance = |a: &[f64], b: &[f64]| (a[0] - b[0]).hypot(a[1] - b[1]);
    points.iter().flat_map(|a| points.iter().map(move |b| distance(a, b))).collect()
}

#[test]
fn five_points_merge_as_by_hand() {
    let points = [0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 5.0, 5.0, 6.0, 5.0];
    let (labels, heights) = agglomerate(&distances(&points), Linkage::Average, 2);
    assert_eq!(labels, [0, 0, 0, 1, 1]);
    assert_close_f64("heights", &heights, &[1.0, 1.0, 2.118_034], 1e-6);
    // The least of the largest distances, and of the least.
    let (_, heights) = agglomerate(&distances(&points), Linkage::Complete, 2);
    assert_close_f64("complete", &heights, &[1.0, 1.0, 5f64.sqrt()], 1e-12);
    let (_, heights) = agglomerate(&distances(&points), Linkage::Single, 2);
    assert_close_f64("single", &heights, &[1.0, 1.0, 2.0], 1e-12);
    // Ward: two points at half their distance; then {0, 1} with mean (0.5, 0) and point 2 at (0, 2): 2/3 of sqrt(4.25).
    let (_, heights) = agglomerate(&distances(&points), Linkage::Ward, 2);
    assert_close_f64("ward", &heights, &[0.5, 0.5, 2.0 / 3.0 * 4.25f64.sqrt()], 1e-12);
    assert_eq!(agglomerate(&distances(&points), Linkage::Average, 5).0, [0, 1, 2, 3, 4]);
    assert_eq!(agglomerate(&distances(&points), Linkage::Average, 1).0, [0; 5]);
}

#[test]
fn average_linkage_makes_the_trees_of_scipy() {
    let cases = cases();
    let trees = cases["trees"].as_array().unwrap();
    assert_eq!(trees.len(), 200);
    for tree in trees {
        let distances = distances(&list::<f64>(&tree["points"]));
        let merged: Vec<Vec<usize>> = list(&tree["merged"]);
        let (_, heights) = agglomerate(&distances, Linkage::Average, 1);
        assert_close_f64("heights", &heights, &list::<f64>(&tree["heights"]), 1e-8);
        for clusters in 1..12 {
            // The labels are SciPy's: the last merge of every item up to this point.
            let mut want: Vec<usize> = (0..12).collect();
            for members in &merged[..12 - clusters] {
                members.iter().for_each(|&item| want[item] = members[0]);
            }
            let (labels, _) = agglomerate(&distances, Linkage::Average, clusters);
            assert_eq!(labels, spectral::numbered(&want), "{clusters}");
        }
    }
}

#[test]
fn weights_of_a_group_are_shares_of_use() {
    let usage = [0.6, 0.2, 0.0, 0.0, 0.2];
    let groups = groups_of(&[0, 0, 1, 1, 2], |e| usage[e]);
    let value =
        |group: &[(usize, f64)], values: &[f64]| group.iter().map(|&(e, w)| w * values[e]).sum::<f64>();
    // Weights 1 and 5 at shares 0.6 and 0.2 make 2; experts that nothing runs make their mean.
    assert!((value(&groups[0], &[1.0, 5.0]) - 2.0).abs() < 1e-12);
    assert!((value(&groups[1], &[0.0, 0.0, 3.0, 5.0]) - 4.0).abs() < 1e-12);
    assert_eq!(groups[2], [(4, 1.0)]);
    // Weights (3, 1) on scalars 0 and 4.
    assert!((value(&groups_of(&[0, 0], |e| [3.0, 1.0][e])[0], &[0.0, 4.0]) - 1.0).abs() < 1e-12);
    assert!((entropy(&[0.25; 4]) - 1.0).abs() < 1e-12 && entropy(&[1.0, 0.0]) == 0.0);
}

/// Statistics of the logits `z` `[tokens, n]` at k = 1.
fn stats(z: &[&[f64]]) -> ExpertStats {
    let n = z[0].len();
    let mut stats = ExpertStats {
        tokens: z.len(),
        experts: vec![ExpertSums::default(); n],
        gram: vec![0.0; n * n],
        both: vec![0.0; n * n],
        logits: vec![0.0; n],
    };
    for z in z {
        let all: f64 = z.iter().map(|z| z.exp()).sum();
        let first = (0..n).rev().max_by(|&a, &b| z[a].total_cmp(&z[b])).unwrap();
        stats.experts[first].hard += 1.0;
        stats.both[first * (n + 1)] += 1.0;
        for a in 0..n {
            stats.logits[a] += z[a];
            stats.experts[a].soft += z[a].exp() / all;
            (0..n).for_each(|b| stats.gram[a * n + b] += z[a] * z[b]);
        }
    }
    stats
}

#[test]
fn hard_and_soft_counts_rank_experts_differently() {
    let stats = stats(&[&[2.0, 0.0, 0.0], &[1.0, 0.9, 0.0], &[0.0, 3.0, 0.0], &[0.2, 0.1, 0.0]]);
    let scores = |score| scores_of(score, &stats, [0, 0]);
    assert_eq!(scores(Score::Hard), [3.0, 1.0, 0.0]);
    assert_close_f64("soft", &scores(Score::Soft), &[1.639_432, 1.746_305, 0.614_263], 1e-6);
    assert_eq!([2, 1].map(|count| largest(&scores(Score::Hard), count)), [vec![0, 1], vec![0]]);
    assert_eq!([2, 1].map(|count| largest(&scores(Score::Soft), count)), [vec![0, 1], vec![1]]);
    assert_eq!(largest(&[1.0, 2.0, 2.0, 1.0], 3), [0, 1, 2]);
}

#[test]
fn norms_of_outputs_are_scored_as_by_hand() {
    // Outputs (3, 0), (0, 1), (1, 1), all of tokens that run the expert, with coefficients 1, 0.5 and 0.
    let norms = 3.0 + 1.0 + 2f64.sqrt();
    let sums = ExpertSums {
        hard: 3.0,
        norms,
        weighted_norms: 3.5,
        squares: vec![10.0, 2.0],
        ..ExpertSums::default()
    };
    let mut stats = stats(&[&[0.0, 0.0]]);
    stats.experts = vec![sums, ExpertSums::default()];
    let score = |score| scores_of(score, &stats, [0, 0]);
    assert_close_f64("ean", &score(Score::Ean), &[4.576_491, 0.0], 1e-6);
    assert_close_f64("mean norm", &score(Score::MeanNorm), &[1.804_738, 0.0], 1e-6);
    assert_close_f64("reap", &score(Score::Reap), &[3.5 / 3.0, 0.0], 1e-12);
}

#[test]
fn shares_of_all_layers_leave_every_layer_its_fewest() {
    let values = [vec![0.9, 0.05, 0.05], vec![0.4, 0.3, 0.3], vec![0.0; 3]];
    assert_eq!(shares(&values, 5, 1), [1, 3, 1]);
    assert_eq!(shares(&values, 6, 1), [2, 3, 1]);
    assert_eq!(shares(&values, 3, 1), [1, 1, 1]);
    assert_eq!(shares(&values, 7, 2), [2, 3, 2]);
    assert_eq!(shares(&values, 9, 1), [3, 3, 3]);
    // Among equals the earlier layer keeps its expert.
    assert_eq!(shares(&[vec![0.5; 2], vec![0.5; 2]], 3, 1), [2, 1]);
}

/// Four logits of which (1, 2) and (3, 4) are proportional.
fn two_pairs() -> ExpertStats {
    let of = |a: f64, b: f64| [a, 2.0 * a, b, 2.0 * b];
    let z = [of(3.0, -1.0), of(2.0, 0.0), of(-1.0, 2.0), of(0.0, 3.0)];
    stats(&z.each_ref().map(|z| &z[..]))
}

#[test]
fn gates_that_agree_are_one_group() {
    let stats = two_pairs();
    assert!((stats.correlation(0, 1) - 1.0).abs() < 1e-12 && (stats.correlation(2, 3) - 1.0).abs() < 1e-12);
    assert!((stats.correlation(0, 2) + 0.9).abs() < 1e-12, "{}", stats.correlation(0, 2));
    let affinity = affinities(Affinity::Correlation, &stats);
    let want = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0];
    assert_close_f64("S", &affinity, &want, 1e-12);
    let laplacian =
        want.iter().enumerate().map(|(i, s)| f64::from(u8::from(i / 4 == i % 4)) - s / 2.0).collect();
    let (mut values, _) = spectral::eigen(laplacian, 4);
    values.sort_by(f64::total_cmp);
    assert_close_f64("eigenvalues", &values, &[0.0, 0.0, 1.0, 1.0], 1e-12);
    for seed in 0..5 {
        assert_eq!(spectral::cluster(&affinity, 2, seed), [0, 0, 1, 1]);
        assert_eq!(spectral::cluster(&affinity, 4, seed), [0, 1, 2, 3]);
        assert_eq!(spectral::cluster(&affinity, 1, seed), [0; 4]);
        // One of the pairs is parted: every group has a member.
        let mut labels = spectral::cluster(&affinity, 3, seed);
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels, [0, 1, 2]);
    }
    // A gate that never moves agrees with none, and is in some group.
    let constant = super::tests::stats(&[&[1.0, 5.0, 0.5], &[2.0, 5.0, 1.0], &[4.0, 5.0, 2.0]]);
    let affinity = affinities(Affinity::Correlation, &constant);
    assert_close_f64("S", &affinity, &[1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], 1e-12);
    assert_eq!(spectral::cluster(&affinity, 2, 0), [0, 1, 0]);
    assert!(affinities(Affinity::Cosine, &constant)[2] > 0.999_999);
    assert_eq!(affinities(Affinity::Coactivation, &constant), [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn eigenvectors_rebuild_the_matrix() {
    let n = 9;
    let half = dsmoe_kernels::testing::normals(n * n, 5);
    let a: Vec<f64> = (0..n * n).map(|i| f64::from(half[i] + half[i % n * n + i / n])).collect();
    let (values, v) = spectral::eigen(a.clone(), n);
    let rebuilt: Vec<f64> =
        (0..n * n).map(|i| (0..n).map(|k| v[i / n * n + k] * values[k] * v[i % n * n + k]).sum()).collect();
    assert_close_f64("V D V^T", &rebuilt, &a, 1e-12);
}

#[test]
fn spectral_clusters_are_those_of_scikit_learn() {
    let cases = cases();
    let blocks = cases["blocks"].as_array().unwrap();
    let agree = |block: &&Value| {
        let count = block["clusters"].as_u64().unwrap() as usize;
        let labels = spectral::cluster(&list::<f64>(&block["affinity"]), count, 0);
        labels == spectral::numbered(&list::<usize>(&block["groups"]))
    };
    let agreeing = blocks.iter().filter(agree).count();
    assert!(blocks.len() == 50 && agreeing >= 48, "{agreeing}");
}

#[test]
fn orders_have_the_profits_of_scipy() {
    let cases = cases();
    let wanted: Vec<f64> = list(&cases["profits"]);
    for (case, want) in wanted.iter().enumerate() {
        let width = 16 + case % 49;
        let mut state = case as u64 + 1;
        let profits: Vec<f64> = (0..width * width)
            .map(|_| {
                state = (state * 1_103_515_245 + 12_345) % (1 << 31);
                state as f64 / (1u64 << 31) as f64
            })
            .collect();
        let profit = |order: &[u32]| {
            order.iter().enumerate().map(|(j, &l)| profits[j * width + l as usize]).sum::<f64>()
        };
        let (exact, greedy) = (align::exact(&profits, width), align::greedy(&profits, width));
        assert!((profit(&exact) - want).abs() < 1e-6, "{case}: {} {want}", profit(&exact));
        assert!(profit(&greedy) <= want + 1e-9 && profit(&greedy) > 0.8 * want, "{case}");
    }
}

#[test]
fn neurons_in_another_order_are_found() {
    let (width, hidden) = (16, 5);
    let matrices = [1, 2, 3].map(|seed| dsmoe_kernels::testing::normals(width * hidden, seed));
    let order: Vec<usize> = (0..width).map(|j| (7 * j + 3) % width).collect();
    let permuted = matrices
        .each_ref()
        .map(|m| order.iter().flat_map(|&j| m[j * hidden..][..hidden].to_vec()).collect::<Vec<f32>>());
    let profits =
        align::profits([matrices.each_ref().map(|m| &m[..]), permuted.each_ref().map(|m| &m[..])], width);
    for found in [align::exact(&profits, width), align::greedy(&profits, width)] {
        assert!((0..width).all(|j| order[found[j] as usize] == j), "{found:?}");
    }
}

/// babyllama-1m in eight experts, two of which run.
fn upcycled() -> Config {
    upcycled_to(352)
}

/// The same with experts of so many neurons.
fn upcycled_to(width: usize) -> Config {
    let json = json!({
        "model_type": "mixtral", "vocab_size": 361, "hidden_size": 128, "intermediate_size": width,
        "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": true,
    });
    Config::from_json(Path::new("config.json"), &json.to_string()).unwrap()
}

#[test]
fn budgets_hold_what_the_fixture_says() {
    let config = upcycled();
    let counts = dsmoe_core::accounting::Accounting::of(&config);
    let expert = 3.0 * 352.0 * 128.0;
    let held = |keeps_gates| Held::of(&config, keeps_gates).unwrap();
    let all = counts.total as f64;
    assert_eq!((counts.non_ffn, counts.router, counts.total), (293_376, 5_120, 5_705_216));
    assert_eq!((held(false).params(&[6; 5]), held(true).params(&[6; 5])), (4_352_256.0, 4_353_536.0));
    assert_eq!((held(false).params(&[4; 5]), counts.activated(0.0)), (2_999_296.0, 1_650_176.0));
    assert_eq!(held(true).params(&[8; 5]), all);
    assert_eq!(held(false).params(&[6; 5]), all - 10.0 * (expert + 128.0));
    assert_eq!(held(true).params(&[8, 8, 8, 4, 2]), all - 10.0 * expert);
    // The largest that fits, with a share that just fits and one that does not.
    let share = held(false).params(&[6; 5]) / all;
    assert_eq!(held(false).per_layer(Budget::Share(share + 1e-9), 2).unwrap(), [6; 5]);
    assert_eq!(held(false).per_layer(Budget::Share(share - 1e-6), 2).unwrap(), [5; 5]);
    // Of all layers one expert more than that stays behind, the last of the least values.
    let values: Vec<Vec<f64>> = (0..5).map(|layer| vec![f64::from(layer); 8]).collect();
    let of_all =
        |lost: f64, fewest| held(false).of_all(Budget::Share(share - lost), &values, fewest).unwrap();
    assert_eq!(of_all(-1e-9, 2), [2, 4, 8, 8, 8]);
    assert_eq!(of_all(1e-6, 2), [2, 3, 8, 8, 8]);
    assert_eq!(of_all(1e-6, 5), [5, 5, 5, 6, 8]);
    assert_eq!(held(true).per_layer(Budget::Share(1.0), 1).unwrap(), [8; 5]);
    let error = held(false).per_layer(Budget::Share(0.1), 2).unwrap_err().to_string();
    assert!(error.contains("budget 0.1: is less than the model holds with the fewest experts"), "{error}");
}

/// Three layers of DSMoE with the keys of `moe`, FFNs of 24, 24 and 36 neurons in six experts.
fn gated(moe: &Value, changes: &Value) -> Config {
    let shape = |neurons: usize| {
        let mut shape = json!({ "num_attention_heads": 2, "num_key_value_heads": 1 });
        shape["intermediate_size"] = json!(neurons);
        shape
    };
    let mut json = json!({
        "model_type": "dsmoe", "vocab_size": 64, "hidden_size": 12, "intermediate_size": 36, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "layer_shapes": [shape(24), shape(24), shape(36)],
        "dsmoe": {
            "format_version": 2, "num_experts": 6, "threshold": 0.5, "partition": "contiguous", "router_bias": true,
            "gate_value": "sigmoid", "rescale": "none", "zero_active": "skip", "ste": true,
        },
    });
    json["dsmoe"].as_object_mut().unwrap().extend(moe.as_object().unwrap().clone());
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    Config::from_json(Path::new("config.json"), &json.to_string()).unwrap()
}

#[test]
fn budgets_of_gated_experts_count_the_core_and_leave_it() {
    // Neurons of an expert: 4, 4 and 6. A router of rank 3 has 3 weights and a bias for a gate.
    let config = gated(&json!({ "core": [1, 2, 2], "router_rank": 3, "correction": true }), &json!({}));
    let all = dsmoe_core::accounting::Accounting::of(&config).total as f64;
    let held = Held::of(&config, false).unwrap();
    let neurons = 3.0 * 12.0;
    assert_eq!(held.params(&[5, 4, 4]), all);
    assert_eq!(held.params(&[4, 3, 3]), all - (14.0 * neurons + 3.0 * 4.0));
    // All layers lose as many, so that the core of the first leaves it one more.
    let share = |lost: f64| Budget::Params(all - lost * (14.0 * neurons + 12.0));
    assert_eq!(held.per_layer(share(1.0), 1).unwrap(), [4, 3, 3]);
    assert_eq!(held.per_layer(share(1.5), 1).unwrap(), [3, 2, 2]);
    assert_eq!(held.per_layer(share(3.0), 1).unwrap(), [2, 1, 1]);
    assert!(held.per_layer(share(3.1), 1).unwrap_err().to_string().contains("fewest experts of a layer"));
    // The wide experts of the last layer take the place of more than one of the others.
    let values = |last: f64| [vec![1.0; 5], vec![1.0; 4], vec![last; 4]];
    let of_all = |params: f64, last| held.of_all(Budget::Params(params), &values(last), 1).unwrap();
    let (narrow, wide) = (4.0 * neurons + 4.0, 6.0 * neurons + 4.0);
    assert_eq!(of_all(all - 3.0 * narrow, 2.0), [5, 1, 4]);
    assert_eq!(of_all(all - 3.0 * narrow, 0.5), [5, 4, 1]);
    assert_eq!(of_all(all - 3.0 * wide, 0.5), [5, 4, 1]);
    assert_eq!(of_all(all - 3.0 * wide - 1.0, 0.5), [5, 3, 1]);
    assert!(held.of_all(Budget::Params(1.0), &values(1.0), 1).is_err());
    // Biases of gate and up are of neurons, and a full router has a row of the width of the states.
    let config = gated(&json!({ "format_version": 1 }), &json!({ "mlp_bias": true }));
    let all = dsmoe_core::accounting::Accounting::of(&config).total as f64;
    let held = Held::of(&config, false).unwrap();
    assert_eq!(held.params(&[5; 3]), all - (14.0 * (neurons + 2.0) + 3.0 * 13.0));
    // What the plan says is what the configuration of the result counts.
    for (name, set) in [("seer-moe", &[][..]), ("uncurl", &["router=mean"])] {
        let settings = read_settings(set.iter().copied()).unwrap();
        let method = method(name).unwrap().configure(&settings).unwrap();
        let plan = method.plan(&config, Budget::Params(held.params(&[5; 3]))).unwrap();
        assert_eq!(
            (plan.total, plan.reached_by.as_str()),
            (held.params(&[5; 3]), "15 of 18 experts"),
            "{name}"
        );
    }
    let method = method("hc-smoe").unwrap().configure(&read_settings([]).unwrap()).unwrap();
    let error = method.plan(&config, Budget::Share(0.9)).unwrap_err().to_string();
    assert!(error.contains("no variants of each other"), "{error}");
}

#[test]
fn shares_of_budgets_are_those_of_the_experts_that_are_left() {
    // Two layers of a core of one and three gates, at two budgets.
    let above = [
        vec![vec![0.5, 1.0], vec![0.0, 0.25], vec![0.25, 0.5]],
        vec![vec![0.0, 0.0], vec![0.75, 1.0], vec![0.5, 0.5]],
    ];
    let shares = shares_of_budgets(&above, &[vec![0, 2], vec![1, 2]], &[1, 1]);
    assert_close_f64("shares", &shares, &[(2.0 + 0.75 + 1.25) / 6.0, (2.0 + 1.5 + 1.5) / 6.0], 1e-12);
    assert!(shares_of_budgets(&[vec![Vec::new(); 3]], &[vec![0]], &[0]).is_empty());
}

#[test]
fn plans_count_held_parameters_and_name_what_they_do() {
    let config = upcycled();
    let total = dsmoe_core::accounting::Accounting::of(&config).total as f64;
    let plan = |name: &str, set: &[&str], share: f64| {
        let settings = read_settings(set.iter().copied()).unwrap();
        method(name).unwrap().configure(&settings).unwrap().plan(&config, Budget::Share(share))
    };
    let half = plan("hc-smoe", &[], 0.53).unwrap();
    assert_eq!(
        (half.reached_by.as_str(), half.total),
        ("20 of 40 experts", total - 20.0 * 3.0 * 352.0 * 128.0)
    );
    // Two experts of a token are as many as before; with one expert a token runs one.
    assert!(half.settings.is_empty());
    let least = plan("hc-smoe", &[], 0.2).unwrap();
    assert_eq!(least.reached_by, "5 of 40 experts");
    assert_eq!(least.settings, [("experts of a token".to_owned(), "1, 2 before".to_owned())]);
    let mean = plan("uncurl", &["router=mean"], 0.53).unwrap();
    assert_eq!(mean.total, half.total - 20.0 * 128.0);
    assert_eq!(plan("uncurl", &[], 0.53).unwrap().total, half.total);
    assert_eq!(plan("seer-moe", &["allocation=global"], 0.53).unwrap().reached_by, "20 of 40 experts");
    // Pruning leaves a token the experts that it runs.
    let error = plan("seer-moe", &[], 0.2).unwrap_err().to_string();
    assert!(error.contains("fewest experts of a layer") && error.contains('%'), "{error}");
    let dense = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    });
    let dense = Config::from_json(Path::new("config.json"), &dense.to_string()).unwrap();
    for name in ["hc-smoe", "uncurl", "seer-moe"] {
        let method = method(name).unwrap().configure(&Default::default()).unwrap();
        let error = method.plan(&dense, Budget::Share(0.5)).unwrap_err().to_string();
        assert!(error.contains("it is dense") && error.contains("sparse upcycling"), "{error}");
    }
    let error =
        method("hc-smoe").unwrap().configure(&read_settings(["linkage=ward", "distance=cosine"]).unwrap());
    assert!(error.err().unwrap().to_string().contains("linkage: cannot be ward"));
    assert_eq!(first_clusters(4, 2).router, RouterRule::Map);
}

#[test]
fn orders_that_may_not_be_the_best_are_told() {
    let plan = |width: usize, name: &str, set: &[&str], share: f64| {
        let settings = read_settings(set.iter().copied()).unwrap();
        let method = method(name).unwrap().configure(&settings).unwrap();
        method.plan(&upcycled_to(width), Budget::Share(share)).unwrap().notices
    };
    let aligned: &[&str] = &["alignment=weights"];
    for (name, set) in [("hc-smoe", aligned), ("uncurl", &[])] {
        let told = plan(1024, name, set, 0.53);
        assert!(told.len() == 1 && told[0].contains("experts of 1024 are wider than 512"), "{told:?}");
        assert!(plan(512, name, set, 0.53).is_empty());
        // Nothing is merged.
        assert!(plan(1024, name, set, 1.0).is_empty());
    }
    assert!(plan(1024, "hc-smoe", &[], 0.53).is_empty());
    assert!(plan(1024, "uncurl", &["alignment=none"], 0.53).is_empty());
}

/// Writes a random dense model of four layers and its mixture of four experts.
fn models(work: &Path) -> [std::path::PathBuf; 2] {
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
    let [dense, mixture] = ["dense", "mixture"].map(|name| work.join(name));
    init(&config, &dense, &InitOptions { seed: 4, ..InitOptions::default() }, &mut |_| {}).unwrap();
    let family = "mixtral".to_owned();
    let options = UpcycleOptions { family, num_experts: 4, top_k: 2, seed: 1, force: false };
    upcycle(&dense, &mixture, &options, &mut |_| {}).unwrap();
    [dense, mixture]
}

#[test]
fn interrupted_methods_continue_with_the_same_bytes() {
    let work = tempfile::tempdir().unwrap();
    let [dense, mixture] = models(work.path());
    let text: Vec<Vec<u32>> =
        (0..16).map(|s| (0..16).map(|t| (7 * t + 13 * s * t + s) % 40).collect()).collect();
    // The process dies at that call of a stage: in the first survey or search, in the second, inside a layer.
    for (i, (name, set, model, stage, calls)) in [
        ("hc-smoe", "linkage=average", &mixture, "experts", 3),
        ("uncurl", "affinity=cosine", &mixture, "experts", 4),
        ("seer-moe", "score=reap", &mixture, "experts", 3),
        ("seer-moe", "rounds=each", &mixture, "experts", 8),
        ("thresholds", "choose=search", &dense, "searching", 25),
        ("thresholds", "step=0.3", &dense, "trials", 100),
        ("thresholds", "choose=cats", &dense, "layers", 3),
        ("thresholds", "choose=uniform", &dense, "measuring shares", 3),
        ("factorllm", "epochs=2", &dense, "routers", 6),
        ("duo", "ratio=16", &dense, "gradients", 9),
    ]
    .into_iter()
    .enumerate()
    {
        let configured = method(name).unwrap().configure(&read_settings([set]).unwrap()).unwrap();
        assert!(configured.continues(), "{name} {set}");
        let [whole, out] = ["whole", "out"].map(|dir| work.path().join(format!("{dir}{i}")));
        let made = |out: &Path, partial: &Partial, dies: usize| {
            let (budget, calibration) = (Budget::Share(0.75), &text[..]);
            let job = Job { model, out, force: false, budget, calibration, seed: 1, comm: alone(), partial };
            let mut count = 0;
            let run = || {
                configured.run(&job, &mut |at| {
                    count += usize::from(at.stage == stage);
                    assert!(count != dies, "the process dies");
                })
            };
            catch_unwind(AssertUnwindSafe(run)).ok().map(|made| made.unwrap())
        };
        let want = made(&whole, Partial::none(), usize::MAX).unwrap();
        let open = |made_by: &str| Partial::open(&out, made_by.to_owned(), true).unwrap();
        assert!(made(&out, &open("work"), calls).is_none() && !out.exists(), "{name} {set}");
        let left = work.path().join(format!("out{i}.partial"));
        assert!(left.read_dir().unwrap().count() > 0, "{name} {set}");
        assert_eq!(left.join("part-states").exists(), stage != "gradients", "{name} {set}");
        // It dies once more, without the states that it has left.
        let _ = std::fs::remove_dir_all(left.join("part-states"));
        assert!(made(&out, &open("work"), 3).is_none(), "{name} {set}");
        let found = made(&out, &open("work"), usize::MAX).unwrap();
        assert_eq!(found, want, "{name} {set}");
        for file in ["model.safetensors", "config.json"] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(&out) == read(&whole), "{name} {set}: {file}");
        }
        open("work").remove().unwrap();
        assert!(!left.exists());
    }
}
