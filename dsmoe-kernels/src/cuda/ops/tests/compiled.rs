//! Registers and spills of kernels, from the log of the assembler.

use crate::Activation::{GeluTanh, Silu};
use crate::attention::Scores;
use crate::cuda::ops::attention::{self, Heads};
use crate::cuda::ops::{
    Define, Source, cross_entropy, decode, elementwise, embedding, experts, ffn, gemv, matmul, optim,
    rms_norm, rope, router, tree,
};
use crate::cuda::{compile, nvrtc_version};
use crate::testing::{required, skipped};

/// A source with its kernels, the most registers that each may use, and the sets of definitions to compile.
type Spec = (&'static Source, &'static str, u32, Vec<Vec<Define>>);

/// Returns all kernels.
fn kernels() -> [Spec; 14] {
    let heads = |head_dim| Heads { heads: 1, kv_heads: 1, head_dim, scores: Scores::plain(head_dim) };
    let varied = |head_dim, window, cap| {
        let heads = heads(head_dim);
        Heads { scores: Scores { window, cap, ..heads.scores }, ..heads }
    };
    let variants = [(128, Some(9), None), (64, None, Some(5.0)), (128, Some(9), Some(5.0))];
    let variants = variants.map(|(width, window, cap)| varied(width, window, cap));
    let plain = || vec![vec![]];
    let of_heads = [128, 64, 32, 12].map(heads).into_iter().chain(variants);
    let of_heads = of_heads.map(|heads| heads.defines().to_vec()).collect();
    let of_caches = [128, 6].map(heads).into_iter().chain(variants);
    let of_caches = of_caches.map(|heads| decode::defines(heads).to_vec()).collect();
    let of_experts = [(4, false, Silu), (2, true, Silu), (4, false, GeluTanh)];
    let of_experts = of_experts.map(|(stages, old, act)| experts::defines(stages, old, act).to_vec());
    let of_few = [(1, 8, Silu), (8, 8, Silu), (3, 7, Silu), (1, 8, GeluTanh)];
    let of_few = of_few.map(|(tokens, width, act)| gemv::defines(tokens, width, act).to_vec());
    let of_rows =
        [(4096, 0, 0), (8192, 0, 0), (128, 0, 0), (67, 0, 0), (4096, 1, 0), (4096, 0, 1), (8192, 1, 1)];
    let of_rows = of_rows.map(|(width, offset, scaled)| {
        let variant = rms_norm::Variant { offset: offset != 0, scaled: scaled != 0 };
        rms_norm::defines(width, variant).to_vec()
    });
    let either = [false, true];
    let of_routers = "logits logits_of_many route count scan scan_tokens fill stats count_logits backward held hold backward_weights \
                      backward_input";
    [
        (&attention::SOURCE, "forward ragged deltas backward_queries backward_keys", 255, of_heads),
        (
            &cross_entropy::SOURCE,
            "logits chunk forward likelihoods",
            64,
            either.map(|capped| cross_entropy::defines(capped).to_vec()).to_vec(),
        ),
        (&decode::SOURCE, "append chunks combine", 128, of_caches),
        (
            &elementwise::SOURCE,
            "cast add scale_f32 scale_bf16 join keep rows add_bias_f32 add_bias_bf16 sum_rows",
            40,
            plain(),
        ),
        (
            &embedding::SOURCE,
            "forward_f32 forward_bf16 backward",
            40,
            either.map(|scaled| embedding::defines(scaled).to_vec()).to_vec(),
        ),
        (&experts::SOURCE, "up project down input weights combine", 255, of_experts.to_vec()),
        (&ffn::SOURCE, "activate backward", 64, [Silu, GeluTanh].map(|act| vec![ffn::define(act)]).to_vec()),
        (&gemv::SOURCE, "gemv_f32 gemv_bf16 gemv_up gemv_down gemv_sum", 128, of_few.to_vec()),
        (&matmul::SOURCE, "gemm_f32 gemm_bf16", 64, plain()),
        (&optim::SOURCE, "adamw sum_squares sum add_partials", 40, plain()),
        (
            &rms_norm::SOURCE,
            "forward_bf16 forward_f32 forward_sum restore backward sum_partials norm_heads backward_heads",
            64,
            of_rows.to_vec(),
        ),
        (&rope::SOURCE, "turn", 40, plain()),
        (&router::SOURCE, of_routers, 64, either.map(|offset| router::defines(offset).to_vec()).to_vec()),
        (&tree::SOURCE, "comm_tree", 64, plain()),
    ]
}

/// The log of one kernel.
struct Usage {
    entry: String,
    registers: u32,
    spilled: bool,
}

fn usages(log: &str) -> Vec<Usage> {
    let mut usages = Vec::new();
    let mut entry = String::new();
    let mut spilled = false;
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            entry = rest.split('\'').next().unwrap_or_default().to_owned();
        } else if line.contains("bytes spill stores") {
            spilled = !line.contains(" 0 bytes spill stores, 0 bytes spill loads");
        } else if let Some(rest) = line.split("Used ").nth(1) {
            let registers = rest.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(u32::MAX);
            usages.push(Usage { entry: entry.clone(), registers, spilled });
        }
    }
    usages
}

#[test]
fn cuda_kernels_compile_without_spills() {
    if nvrtc_version().is_none() {
        assert!(!required("nvrtc"), "NVRTC is required and not to be found; set DSMOE_NVRTC_DIR");
        skipped("cuda_kernels_compile_without_spills", "no NVRTC; set DSMOE_NVRTC_DIR");
        return;
    }
    let mut problems = Vec::new();
    for (source, entries, most, definitions) in kernels() {
        for (defines, arch) in
            definitions.iter().flat_map(|defines| [(defines, "sm_80"), (defines, "sm_90a")])
        {
            let what = format!("{} {defines:?} {arch}", source.name);
            let log = match compile(source.name, source.text, defines, arch) {
                Ok(compiled) => compiled.log,
                Err(error) => {
                    problems.push(error.to_string());
                    continue;
                }
            };
            let usages = usages(&log);
            for entry in entries.split(' ') {
                match usages.iter().find(|usage| usage.entry == entry) {
                    None => problems.push(format!("{what}: no kernel {entry} in {log}")),
                    Some(Usage { registers, spilled, .. }) if *spilled || *registers > most => problems.push(
                        format!("{what}: {entry} uses {registers} registers of {most}, spills: {spilled}"),
                    ),
                    Some(_) => {}
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
