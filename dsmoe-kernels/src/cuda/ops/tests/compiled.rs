//! Registers and spills of kernels, from the log of the assembler, and what instructions products are made of.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Activation::{self, GeluTanh, Silu};
use crate::attention::Scores;
use crate::cuda::ops::attention::{self, Heads};
use crate::cuda::ops::choice::Variants;
use crate::cuda::ops::products::{Form, Variant};
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
                      backward_input assign_few assign_many tally arrange place";
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
        (
            &ffn::SOURCE,
            "activate backward activate_slots backward_slots backward_inactive clear_inactive sum_slots",
            64,
            [Silu, GeluTanh].map(|act| vec![ffn::define(act)]).to_vec(),
        ),
        (&gemv::SOURCE, "gemv_f32 gemv_bf16 gemv_up gemv_down gemv_sum", 128, of_few.to_vec()),
        (&matmul::SOURCE, "gemm_f32 gemm_bf16", 64, plain()),
        (&optim::SOURCE, "adamw sum_squares sum add_partials", 40, plain()),
        (
            &rms_norm::SOURCE,
            "forward_bf16 forward_f32 forward_sum forward_parts restore backward sum_partials norm_heads backward_heads",
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

/// Tells whether there is NVRTC, and prints that the test is skipped if there is none.
fn has_nvrtc(test: &str) -> bool {
    let found = nvrtc_version().is_some();
    assert!(found || !required("nvrtc"), "NVRTC is required and not to be found; set DSMOE_NVRTC_DIR");
    if !found {
        skipped(test, "no NVRTC; set DSMOE_NVRTC_DIR");
    }
    found
}

#[test]
fn cuda_kernels_compile_without_spills() {
    if !has_nvrtc("cuda_kernels_compile_without_spills") {
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

/// Returns the disassembler of a wheel beside NVRTC's, or of the path.
fn disassembler() -> Option<PathBuf> {
    let beside = std::env::var_os("DSMOE_NVRTC_DIR").map(|dir| Path::new(&dir).join("../bin/nvdisasm"));
    let found = beside.into_iter().chain([PathBuf::from("nvdisasm")]);
    found.into_iter().find(|path| Command::new(path).output().is_ok())
}

/// Returns the instructions of every kernel of machine code, with labels as lines that end with a colon.
fn disassemble(tool: &Path, cubin: &[u8]) -> HashMap<String, Vec<String>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), cubin).unwrap();
    let output = Command::new(tool).arg("-c").arg(file.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut kernels: HashMap<String, Vec<String>> = HashMap::new();
    let mut name = String::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if let Some(entry) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            entry.clone_into(&mut name);
        } else if line.starts_with(".L_") || line.contains("*/  ") {
            // An instruction is behind its address in a comment.
            let text = line.trim().split_once("*/").map_or(line, |(_, text)| text);
            kernels.entry(name.clone()).or_default().push(text.trim().to_owned());
        }
    }
    kernels
}

/// Returns the innermost loop round all products of a width of a kernel.
fn product_loop(lines: &[String], width: usize) -> &[String] {
    let name = format!("HGMMA.64x{width}x16");
    let is_product = |line: &&String| line.contains(&name);
    let first = lines.iter().position(|line| is_product(&line)).unwrap();
    let last = lines.iter().rposition(|line| is_product(&line)).unwrap();
    let label_of = |line: &str| {
        let target = line.split_once("BRA").and_then(|(_, rest)| rest.split('`').nth(1))?;
        let name = format!("{}:", target.split(['(', ')']).nth(1)?);
        lines.iter().position(|line| *line == name)
    };
    let loops = (last..lines.len()).filter_map(|end| Some((label_of(&lines[end])?, end)));
    let (start, end) =
        loops.filter(|&(start, _)| start < first).min_by_key(|(start, end)| end - start).unwrap();
    &lines[start..=end]
}

#[test]
fn cuda_products_are_made_of_the_instructions_of_hopper() {
    let test = "cuda_products_are_made_of_the_instructions_of_hopper";
    if !has_nvrtc(test) {
        return;
    }
    let tool = disassembler();
    if tool.is_none() {
        assert!(!required("nvdisasm"), "nvdisasm is required and not to be found; put it beside NVRTC");
        skipped(test, "counting the instructions: no nvdisasm");
    }
    for (name, variant, activation) in product_builds() {
        assert!(variant.shared_bytes() <= 232_448, "{name}: shared memory");
        let defines = variant.defines(activation);
        let source = variant.source();
        let compiled = compile(source.name, source.text, &defines, "sm_90a").unwrap();
        // A warning of this kind says that products wait for each other.
        assert!(!compiled.log.contains("(C7"), "{name}: {}", compiled.log);
        let usages = usages(&compiled.log);
        let kernels = tool.as_ref().map(|tool| disassemble(tool, &compiled.cubin));
        for form in Form::ALL.into_iter().filter(|form| variant.takes(*form)) {
            let (entry, what) = (form.entry(), format!("{name} {activation:?} {}", form.entry()));
            let usage = usages.iter().find(|usage| usage.entry == entry).unwrap();
            assert!(usage.registers <= 168 && !usage.spilled, "{what}: {} registers", usage.registers);
            if let Some(kernels) = &kernels {
                check_instructions(&what, &kernels[entry], &variant, form);
            }
        }
    }
}

/// Returns the variants of the products that are compiled for Hopper: all with one activation, and those that passes of an FFN
/// take with both.
pub(super) fn product_builds() -> Vec<(&'static str, Variant, Activation)> {
    let plain = Variant::ALL.into_iter().map(|(name, variant)| (name, variant, Silu));
    let taken = Variant::ALL.into_iter().filter(|(_, variant)| Variants::CANDIDATES.contains(variant));
    plain.chain(taken.map(|(name, variant)| (name, variant, GeluTanh))).collect()
}

fn check_instructions(what: &str, lines: &[String], variant: &Variant, form: Form) {
    let count = |lines: &[String], name: &str| lines.iter().filter(|line| line.contains(name)).count();
    // Turned tiles have a loop for each number of tokens.
    let widths = match variant.turned {
        true => vec![64, 96, 128, 144, 160, 176, 192, 208, 224, 240, 256],
        false => vec![variant.columns],
    };
    let products = if variant.ping_pong { 8 } else { 4 };
    assert_eq!(count(lines, "HGMMA"), products * widths.len(), "{what}: products");
    for width in widths {
        check_loop(what, product_loop(lines, width), width, products);
    }
    assert_eq!([count(lines, "LDL"), count(lines, "STL")], [0; 2], "{what}: local memory");
    assert!(count(lines, "UTMALDG") > 0 && count(lines, "UTMASTG") > 0, "{what}: copies by descriptors");
    assert_eq!(count(lines, "MULTICAST") > 0, variant.cluster > 1, "{what}: copies to a cluster");
    let weights = form == Form::Weights;
    assert_eq!([count(lines, "UTMAREDG") > 0, count(lines, "STSM") == 0], [weights; 2], "{what}: results");
    let gathers = !matches!(form, Form::Down | Form::Input);
    assert_eq!(count(lines, "LDGSTS") > 0, gathers, "{what}: gathered rows");
}

/// Checks the instructions of a step.
fn check_loop(what: &str, inner: &[String], width: usize, products: usize) {
    let count = |name: &str| inner.iter().filter(|line| line.contains(name)).count();
    assert_eq!(count(&format!("HGMMA.64x{width}x16")), products, "{what}: products of a step of {width}");
    for name in ["LDL", "STL", "MEMBAR.ALL.GPU", "MEMBAR.SC", "CCTL", "ERRBAR", "LDGSTS"] {
        assert_eq!(count(name), 0, "{what}: {name} between products");
    }
    assert!(inner.len() <= 130, "{what}: {} instructions in a step", inner.len());
}
