//! Lanes: the parts of a step that are computed apart and added along one tree.

use std::path::Path;

use dsmoe_kernels::Isa;
use dsmoe_train::RunOptions;

use crate::common::*;
use crate::masked::pruned;

/// FNV-1a of the weights and moments that a run ends with.
fn hash(out: &Path) -> u64 {
    let checkpoint = out.join("checkpoints/step-00000006");
    let files = [checkpoint.join("model.safetensors"), checkpoint.join("optimizer.safetensors")];
    let bytes = files.into_iter().flat_map(|file| std::fs::read(file).unwrap());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The settings of the runs whose bits are known. Without clipping, the sum of the gradient's squares has no part in
/// them.
const KNOWN: [(&str, &[&str]); 4] = [
    ("dense", &["sparsity=1", "accumulate=1"]),
    ("dsmoe", &["accumulate=3"]),
    ("dsmoe", &["accumulate=1", "dtype=bf16", "sparsity=0.5"]),
    ("masked", &["sparsity=1", "accumulate=3", "dtype=bf16"]),
];

/// Runs the settings of [`KNOWN`] and returns the hashes of what they end with.
fn hashes(more: &[&str], recompute: bool) -> Vec<u64> {
    let run = |(i, (kind, settings)): (usize, &(&str, &[&str]))| {
        let bed = match *kind {
            "masked" => pruned(),
            kind => Bed::new(kind == "dsmoe"),
        };
        let name = format!("out {i}");
        let more = [&["clip=0", "steps=6"], *settings, more].concat();
        bed.train(&more, RunOptions { recompute, ..bed.options(&name) });
        hash(&bed.path(&name))
    };
    KNOWN.iter().enumerate().map(run).collect()
}

/// The final hashes of the runs of [`KNOWN`] before steps had lanes, by instruction set. Those of DSMoE are from a build in which
/// the kernels alone have since got another order of sums.
const BEFORE_LANES: [(&str, [u64; 4]); 4] = [
    ("scalar", [0xf371_922d_cb7a_654e, 0x4bad_6d98_7075_339c, 0x337a_5a16_ee60_19e7, 0x6349_842e_43c3_f0c0]),
    ("avx2", [0x82c2_3e85_59ba_7c96, 0xa5a3_7bb2_77ad_1c64, 0x4be6_be0b_df3d_d309, 0x22be_f49b_256e_b6ec]),
    ("avx512", [0xe500_e53f_852e_bfec, 0x0673_feaf_f20a_38f4, 0x69fb_6198_3393_bc48, 0x5588_2a72_47c6_7e81]),
    (
        "avx512bf16",
        [0xe500_e53f_852e_bfec, 0x0673_feaf_f20a_38f4, 0x0ead_23c2_6d2e_8ba5, 0xc45d_b7f2_b39f_5171],
    ),
];

#[test]
fn one_lane_has_the_bits_of_before_there_were_lanes() {
    let isa = Isa::current().name();
    let known = BEFORE_LANES.iter().find(|(name, _)| *name == isa);
    let plain = hashes(&[], false);
    // None are recorded for the tiers of aarch64.
    if let Some((_, known)) = known {
        assert_eq!(plain, known, "{isa}");
    }
    assert_eq!(hashes(&["lanes=1"], false), plain, "{isa}");
}

#[test]
fn recomputed_activations_change_no_bit() {
    assert_eq!(hashes(&["lanes=3"], true), hashes(&["lanes=3"], false));
}

/// A lane is what accumulation is, but for the order of additions.
#[test]
fn lanes_are_a_larger_batch() {
    let bed = Bed::new(true);
    let records = |name: &str, more: &[&str]| {
        bed.whole(name, &[&["sparsity=1", "steps=6", "batch=1"], more].concat()).records
    };
    let added = records("added", &["accumulate=6"]);
    for (name, more) in [("six", &["accumulate=1", "lanes=6"]), ("three", &["accumulate=2", "lanes=3"])] {
        let lanes = records(name, more);
        assert_eq!(lanes.len(), added.len());
        for (a, b) in added.iter().zip(&lanes) {
            assert_eq!(a.tokens, b.tokens);
            assert!(
                (a.loss - b.loss).abs() < 2e-4 && (a.grad_norm - b.grad_norm).abs() < 1e-4,
                "{a:?} {b:?}"
            );
        }
        // The first step reads the same text with the same weights.
        assert_eq!(added[0].lm_loss, lanes[0].lm_loss);
        assert_eq!(added[0].layer_activation, lanes[0].layer_activation);
    }
}

#[test]
fn lanes_belong_to_a_run() {
    let bed = Bed::new(true);
    bed.part("out", 4, &["lanes=3"]);
    bed.whole("whole", &["lanes=3"]);
    let parts = ["lanes was 3 and is now 1", "use the old value"];
    refused(&text(1), settings(&[]), bed.resumed("out"), &parts);
    bed.rest("out", &["lanes=3", "threads=2"]);
    assert_eq!(weights(&bed.path("out")), weights(&bed.path("whole")));
    let state = std::fs::read_to_string(bed.path("out/checkpoints/step-00000020/state.json")).unwrap();
    assert!(state.contains("\"lanes\": 3"), "{state}");

    // A checkpoint of before there were lanes has one.
    bed.part("old", 4, &[]);
    let path = bed.path("old/checkpoints/step-00000004/state.json");
    let state = std::fs::read_to_string(&path).unwrap();
    let old = state.replace("    \"lanes\": 1,\n", "");
    assert_ne!(old, state);
    std::fs::write(&path, old).unwrap();
    without_manifest(path.parent().unwrap());
    bed.rest("old", &[]);
}
