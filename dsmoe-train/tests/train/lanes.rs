//! Lanes: the parts of a step that are computed apart and added along one tree.

use std::path::Path;

use dsmoe_kernels::Isa;

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
fn hashes(more: &[&str]) -> Vec<u64> {
    let run = |(i, (kind, settings)): (usize, &(&str, &[&str]))| {
        let bed = match *kind {
            "masked" => pruned(),
            kind => Bed::new(kind == "dsmoe"),
        };
        let name = format!("out {i}");
        bed.whole(&name, &[&["clip=0", "steps=6"], *settings, more].concat());
        hash(&bed.path(&name))
    };
    KNOWN.iter().enumerate().map(run).collect()
}

#[test]
fn print_hashes() {
    println!("(\"{}\", {:#018x?}),", Isa::current().name(), hashes(&[]));
}
