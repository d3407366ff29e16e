//! Headers, indexes and configurations of wrong or any bytes: refused in one line, without a panic.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::small_config;
use dsmoe_core::Result;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::config::Config;
use dsmoe_core::init::preset;
use dsmoe_core::masks::{Mask, Masks};
use dsmoe_kernels::testing::{edited_copies, refused};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A safetensors file of that header and so many bytes of data.
fn safetensors(header: &str, data: usize) -> (TempDir, PathBuf) {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat();
    fs::write(&path, bytes).unwrap();
    (work, path)
}

fn open(header: &str, data: usize) -> Result<Checkpoint> {
    let (_work, path) = safetensors(header, data);
    Checkpoint::open_file(&path)
}

#[test]
fn files_that_end_in_or_before_their_header() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    for bytes in [0, 7] {
        fs::write(&path, vec![0; bytes]).unwrap();
        refused(Checkpoint::open_file(&path), &["x.safetensors: header is missing", "copy the file again"]);
    }
    for len in [9u64, 1 << 40, u64::MAX] {
        fs::write(&path, [&len.to_le_bytes()[..], b"{      }"].concat()).unwrap();
        let says = format!("header says it has {len} bytes and the file has 8");
        refused(Checkpoint::open_file(&path), &["x.safetensors", &says, "copy the file again"]);
    }
    // Over the limit, in a file with holes.
    fs::write(&path, 200_000_000u64.to_le_bytes()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    refused(Checkpoint::open_file(&path), &["x.safetensors", "header has 200000000 bytes", "100000000"]);
}

/// Returns the entry of a tensor in a header.
fn entry(name: &str, dtype: &str, shape: &str, offsets: [u64; 2]) -> String {
    format!(r#""{name}": {{"dtype": "{dtype}", "shape": [{shape}], "data_offsets": {offsets:?}}}"#)
}

#[test]
fn wrong_headers() {
    let one = |dtype: &str, shape: &str, offsets| format!("{{{}}}", entry("a", dtype, shape, offsets));
    let two = |name: &str, start: u64| {
        format!("{{{}, {}}}", entry("a", "U8", "4", [0, 4]), entry(name, "U8", "4", [start, start + 4]))
    };
    assert!(open(&two("b", 4), 8).is_ok());
    let max = u64::MAX;
    let no_header = "header is not that of safetensors";
    let cases: [(String, usize, &[&str]); 13] = [
        ("{nonsense}".into(), 0, &[no_header, "line 1", "write the file"]),
        ("[]".into(), 0, &[no_header, "an object of tensors"]),
        ("[".repeat(10_000), 0, &["header is not"]),
        (one("F32", "-1", [0, 4]), 4, &["tensor a", "-1"]),
        (one(r"F31\n", "1", [0, 4]), 4, &["tensor a has unknown dtype", "F31", "safetensors library"]),
        (one("F32", &format!("{max}"), [0, 4]), 4, &["tensor a of shape", "does not fill its 4 bytes"]),
        (
            one("F32", &format!("{max}, {max}"), [0, 4]),
            4,
            &["tensor a of shape", "does not fill its 4 bytes"],
        ),
        (one("F32", "4611686018427387905", [0, 4]), 4, &["tensor a of shape", "does not fill its 4 bytes"]),
        (one("F32", "1", [max - 3, max]), 4, &["tensor a"]),
        (one("F32", "1", [4, 0]), 4, &["tensor a ends at byte 0, before its start 4"]),
        (two("b", 2), 6, &["tensor b overlaps the tensor before it", "byte 2 of the data, not 4"]),
        (two("b", 6), 10, &["tensor b leaves a gap before it", "byte 6 of the data, not 4"]),
        (two("a", 4), 8, &["tensor a is in the header twice"]),
    ];
    for (header, data, parts) in cases {
        refused(open(&header, data), &[&["x.safetensors"], parts].concat());
    }
    refused(open(&two("b", 4), 9), &["x.safetensors", "describes 8 bytes of data and the file has 9"]);
}

/// Returns how many inputs of every kind are tried; `DSMOE_FUZZ_CASES` asks for more.
fn cases(default: u32) -> u32 {
    std::env::var("DSMOE_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default)
}

/// Copies of a good file with some bytes replaced, some removed and some doubled.
fn mutated(good: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = good.len();
    let edit = (0..len, any::<u8>(), 0usize..4, 0usize..40);
    proptest::collection::vec(edit, 1..6).prop_map(move |edits| {
        let mut bytes = good.clone();
        for (at, byte, kind, span) in edits {
            let at = at.min(bytes.len().saturating_sub(1));
            let end = bytes.len().min(at + span);
            match kind {
                0 if at < bytes.len() => bytes[at] = byte,
                1 => drop(bytes.drain(at..end)),
                2 => bytes.splice(at..at, b"9".repeat(span)).for_each(drop),
                _ => {
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy).for_each(drop);
                }
            }
        }
        bytes
    })
}

fn small_header() -> String {
    r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#
        .to_owned()
}

/// A good `masks.safetensors`.
fn small_masks() -> Vec<u8> {
    let work = tempfile::tempdir().unwrap();
    let mut masks = Masks::new();
    masks.set("model.layers.0.mlp.gate_proj.weight", Mask::from_bits(12, 16, vec![0b1011_0110; 24]));
    masks.save(work.path()).unwrap();
    fs::read(work.path().join("masks.safetensors")).unwrap()
}

/// Configurations of every kind of model.
fn configs() -> Vec<String> {
    let mut moe: Value = serde_json::from_str(&small_config().to_json()).unwrap();
    moe["model_type"] = "dsmoe".into();
    moe["dsmoe"] = json!({
        "format_version": 2, "num_experts": 4, "threshold": 0.5, "partition": "permuted", "router_bias": true, "core": [1, 0],
        "router_rank": 3, "correction": true, "active_target": 0.5, "untrained": true, "gate_value": "sigmoid",
        "rescale": "eq8", "zero_active": "skip", "ste": true,
        "budgets": [{"active": 0.25, "thresholds": [0.5, -1.5]}, {"active": 1.0, "thresholds": [-9.0, -9.5]}],
    });
    let files = [
        include_str!("../data/families/gemma3/config.json"),
        include_str!("../data/families/ministral/config.json"),
        include_str!("../data/families/mistral3/config.json"),
        include_str!("../data/moe/mixtral/config.json"),
        include_str!("../data/moe/olmoe/config.json"),
        include_str!("../data/moe/qwen2_moe/config.json"),
        include_str!("../data/moe/qwen3_moe/config.json"),
    ];
    let mut all = vec![small_config().to_json(), moe.to_string(), preset("llama-3.2-1b").unwrap().to_json()];
    all.extend(files.map(str::to_owned));
    all
}

/// Tensors are listed by expert: a number that nobody means would take minutes and gigabytes.
#[test]
fn mixtures_have_a_bounded_number_of_experts() {
    let text = include_str!("../data/moe/mixtral/config.json");
    let mut json: Value = serde_json::from_str(text).unwrap();
    let mut read = |experts: u32| {
        json["num_local_experts"] = experts.into();
        Config::from_json(Path::new("config.json"), &json.to_string())
    };
    assert!(read(1 << 17).is_ok());
    refused(
        read(1_000_000),
        &["config.json: num_hidden_layers is 2, and its layers have 2000000 experts", "use at most 262144"],
    );
}

/// Edits that know words, numbers and brackets.
#[test]
fn edited_copies_are_read_or_refused() {
    for (i, text) in configs().iter().enumerate() {
        Config::from_json(Path::new("config.json"), text).unwrap();
        edited_copies(&format!("config {i}"), text.as_bytes(), 300, crate::bodies::config);
    }
    edited_copies("header", small_header().as_bytes(), 1000, |bytes| crate::bodies::header(bytes, 32));
    let header = small_header();
    let whole = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 32]].concat();
    edited_copies("safetensors", &whole, 100, crate::bodies::file);
    edited_copies("index", INDEX, 100, |bytes| crate::bodies::index(&whole, bytes));
    edited_copies("manifest", MANIFEST, 100, crate::bodies::manifest);
    let config = small_config();
    edited_copies("masks", &small_masks(), 100, |bytes| crate::bodies::masks(&config, bytes));
}

const INDEX: &[u8] = br#"{"metadata":{"total_size":32},"weight_map":{"a":"x","b":"x"}}"#;
const MANIFEST: &[u8] =
    br#"{"format_version":1,"files":[{"name":"x","bytes":3,"xxh3_128":"06b05ab6733a618578af5f94892f3950"}]}"#;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(2000)))]

    #[test]
    fn any_bytes_as_header(bytes: Vec<u8>, data in 0u64..64) {
        crate::bodies::header(&bytes, data);
    }

    #[test]
    fn mutated_header(bytes in mutated(small_header().into_bytes())) {
        crate::bodies::header(&bytes, 32);
    }

    #[test]
    fn any_text_as_config(text in "\\PC*") {
        crate::bodies::config(text.as_bytes());
    }

    #[test]
    fn mutated_config(bytes in mutated(small_config().to_json().into_bytes())) {
        crate::bodies::config(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(200)))]

    #[test]
    fn any_bytes_as_file(bytes: Vec<u8>) {
        crate::bodies::file(&bytes);
        crate::bodies::masks(&small_config(), &bytes);
    }

    #[test]
    fn mutated_masks(bytes in mutated(small_masks())) {
        crate::bodies::masks(&small_config(), &bytes);
    }

    #[test]
    fn mutated_manifest(bytes in mutated(MANIFEST.to_vec())) {
        crate::bodies::manifest(&bytes);
    }

    #[test]
    fn mutated_index(bytes in mutated(INDEX.to_vec())) {
        let header = small_header();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 32]].concat();
        crate::bodies::index(&file, &bytes);
    }
}
