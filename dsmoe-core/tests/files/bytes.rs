//! Headers, indexes and configurations of wrong or any bytes: refused in one line, without a panic.

use std::fs;
use std::path::PathBuf;

use crate::support::{refused, small_config};
use dsmoe_core::Result;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::masks::{Mask, Masks};
use proptest::prelude::*;
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
fn file_without_a_header() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    for bytes in [0, 7] {
        fs::write(&path, vec![0; bytes]).unwrap();
        refused(Checkpoint::open_file(&path), &["x.safetensors: header is missing", "copy the file again"]);
    }
}

#[test]
fn header_longer_than_the_file() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    for len in [9u64, 1 << 40, u64::MAX] {
        fs::write(&path, [&len.to_le_bytes()[..], b"{      }"].concat()).unwrap();
        let says = format!("header says it has {len} bytes and the file has 8");
        refused(Checkpoint::open_file(&path), &["x.safetensors", &says, "copy the file again"]);
    }
}

#[test]
fn header_over_the_limit_in_a_file_with_holes() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    fs::write(&path, 200_000_000u64.to_le_bytes()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    refused(Checkpoint::open_file(&path), &["x.safetensors", "header has 200000000 bytes", "100000000"]);
}

#[test]
fn header_that_is_not_json() {
    refused(
        open("{nonsense}", 0),
        &["x.safetensors: header is not that of safetensors", "line 1", "write the file"],
    );
    refused(open("[]", 0), &["x.safetensors: header is not that of safetensors", "an object of tensors"]);
    refused(open(&"[".repeat(10_000), 0), &["x.safetensors: header is not"]);
    refused(
        open(r#"{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#, 4),
        &["x.safetensors", "tensor a", "-1"],
    );
}

#[test]
fn header_with_unknown_dtype() {
    refused(
        open(r#"{"a": {"dtype": "F31\n", "shape": [1], "data_offsets": [0, 4]}}"#, 4),
        &["x.safetensors", "tensor a has unknown dtype", "F31", "safetensors library"],
    );
}

#[test]
fn header_with_absurd_shape() {
    let huge = u64::MAX;
    for shape in [format!("[{huge}]"), format!("[{huge}, {huge}]"), "[4611686018427387905]".to_owned()] {
        let header = format!(r#"{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 4]}}}}"#);
        refused(open(&header, 4), &["x.safetensors", "tensor a of shape", "does not fill its 4 bytes"]);
    }
    let header = r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [18446744073709551612, 18446744073709551615]}}"#;
    refused(open(header, 4), &["x.safetensors", "tensor a"]);
}

#[test]
fn header_with_offsets_backwards() {
    refused(
        open(r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}"#, 4),
        &["x.safetensors", "tensor a ends at byte 0, before its start 4"],
    );
}

#[test]
fn header_with_overlap_or_gap() {
    let two = |start: u64, data| {
        let header = format!(
            r#"{{"a": {{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
                "b": {{"dtype": "U8", "shape": [4], "data_offsets": [{start}, {}]}}}}"#,
            start + 4
        );
        open(&header, data)
    };
    assert!(two(4, 8).is_ok());
    refused(
        two(2, 6),
        &["x.safetensors", "tensor b overlaps the tensor before it", "byte 2 of the data, not 4"],
    );
    refused(two(6, 10), &["x.safetensors", "tensor b leaves a gap before it", "byte 6 of the data, not 4"]);
    refused(two(4, 9), &["x.safetensors", "describes 8 bytes of data and the file has 9"]);
}

#[test]
fn header_with_a_name_twice() {
    let header = r#"{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}"#;
    refused(open(header, 2), &["x.safetensors", "tensor a is in the header twice"]);
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

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
    #![proptest_config(ProptestConfig::with_cases(200))]

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
    fn mutated_index(bytes in mutated(br#"{"metadata":{"total_size":32},"weight_map":{"a":"x","b":"x"}}"#.to_vec())) {
        let header = small_header();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 32]].concat();
        crate::bodies::index(&file, &bytes);
    }
}
