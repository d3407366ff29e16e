//! Headers that are wrong in one place, and files of any bytes: refused in one line, without a panic.

use std::fs;
use std::path::Path;

use dsmoe_core::Result;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::config::Config;
use dsmoe_core::gguf::{Container, tokenizer_files};
use proptest::prelude::*;

use super::builder::{Gguf, key, list_key, tensor, text, text_key, u32_key};
use crate::bodies;
use dsmoe_kernels::testing::{edited_copies, refused};

fn container(gguf: &Gguf) -> Result<Container> {
    let bytes = gguf.bytes();
    Container::read(Path::new("x.gguf"), &bytes[..], bytes.len() as u64)
}

/// Writes the file and runs `read` on it.
fn on_file<T>(gguf: &Gguf, read: impl Fn(&Path) -> T) -> T {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.gguf");
    fs::write(&path, gguf.bytes()).unwrap();
    read(&path)
}

/// The keys of a model without tensors, but for one key.
fn model_keys(without: &str) -> Gguf {
    let mut gguf = Gguf::small();
    for (name, value) in [
        ("llama.block_count", 1),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 64),
        ("llama.attention.head_count", 4),
        ("llama.context_length", 64),
        ("llama.vocab_size", 32),
    ] {
        if name != without {
            gguf = gguf.with_key(u32_key(name, value));
        }
    }
    if without == "llama.attention.layer_norm_rms_epsilon" {
        return gguf;
    }
    gguf.with_key(key("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes()))
}

#[test]
fn a_small_file_is_sound() {
    let found = container(&Gguf::small()).unwrap();
    assert_eq!(found.tensors[0].shape, [64]);
    assert!(on_file(&model_keys(""), Config::load).is_ok());
    assert_eq!(on_file(&Gguf::small(), |path| Checkpoint::open(path).unwrap().names().count()), 1);
}

#[test]
fn starts_that_are_not_those_of_a_file() {
    let read = |bytes: &[u8]| Container::read(Path::new("x.gguf"), bytes, bytes.len() as u64);
    refused(read(b""), &["x.gguf: header is missing: the file has 0 bytes", "copy the file again"]);
    refused(read(&[0; 64]), &["x.gguf: header is not that of GGUF", "name a .gguf file"]);
    for (version, says) in [(1, "is of version 1"), (0x0300_0000, "is big-endian"), (9, "is of version 9")] {
        refused(container(&Gguf { version, ..Gguf::small() }), &["x.gguf: header", says]);
    }
    let mut bytes = Gguf::small().bytes();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(read(&bytes), &["says it has 18446744073709551615 tensors", "copy the file again"]);
    bytes[8..16].copy_from_slice(&1000u64.to_le_bytes());
    refused(read(&bytes), &["says tensors has 24000 bytes", "copy the file again"]);
    let bytes = Gguf::small().bytes();
    for len in 0..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "{len} bytes of {}", bytes.len());
    }
}

#[test]
fn values_that_are_longer_than_the_file() {
    let long = |len: u64| key("a", 8, &len.to_le_bytes());
    for len in [1 << 30, u64::MAX] {
        let says = format!("the text of a has {len} bytes");
        refused(
            container(&Gguf::small().with_key(long(len))),
            &["x.gguf: header", &says, "left of the file"],
        );
    }
    let count =
        |kind: u32, count: u64| key("a", 9, &[&kind.to_le_bytes()[..], &count.to_le_bytes()].concat());
    refused(container(&Gguf::small().with_key(count(4, 1 << 20))), &["elements in a has 4194304 bytes"]);
    refused(container(&Gguf::small().with_key(count(0, u64::MAX))), &["elements in a", "the most read"]);
    let nested =
        (0..6).fold(Vec::new(), |inner, _| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &inner].concat());
    refused(
        container(&Gguf::small().with_key(key("deep", 9, &nested))),
        &["deep is a list nested more than"],
    );
    refused(container(&Gguf::small().with_key(key("a", 13, &[]))), &["a has unknown type 13"]);
    refused(container(&Gguf::small().with_key(key("a", 7, &[2]))), &["a is a flag of value 2"]);
    let bad = [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
    refused(container(&Gguf::small().with_key(key("a", 8, &bad))), &["the text of a that is not UTF-8"]);
    let twice = Gguf::small().with_key(u32_key("a", 1)).with_key(u32_key("a", 1));
    refused(container(&twice), &["x.gguf: a is there twice"]);
    let alignment = |n| Gguf::small().with_key(u32_key("general.alignment", n));
    assert!(container(&alignment(32)).is_ok());
    for n in [0, 33, u32::MAX] {
        refused(container(&alignment(n)), &["general.alignment is", "power of two"]);
    }
}

#[test]
fn tensors_that_cannot_be() {
    let one = |dimensions: &[u64], kind, offset| {
        container(&Gguf::small().with_tensor(tensor("t", dimensions, kind, offset)))
    };
    refused(one(&[1; 5], 0, 0), &["x.gguf: tensor t has 5 dimensions"]);
    refused(one(&[0], 0, 0), &["tensor t has a dimension of 0"]);
    refused(one(&[1 << 40, 1 << 40], 0, 0), &["tensor t has a dimension of"]);
    refused(one(&[65], 0, 0), &["tensor t of 260 bytes at byte", "beyond the end of the file"]);
    refused(one(&[64], 0, 32), &["beyond the end of the file"]);
    refused(one(&[4], 0, 4), &["tensor t starts at byte 4, not a multiple of 32"]);
    refused(one(&[4], 0, u64::MAX - 31), &["tensor t starts at byte"]);
    refused(one(&[48], 2, 0), &["tensor t has rows of 48 elements, not whole blocks of 32 (Q4_0)"]);
    let two = |a: Vec<u8>, b: Vec<u8>| container(&Gguf { tensors: vec![a, b], ..Gguf::small() });
    refused(two(tensor("t", &[4], 0, 0), tensor("t", &[4], 0, 32)), &["tensor t is in the header twice"]);
    refused(two(tensor("t", &[32], 0, 0), tensor("u", &[4], 0, 64)), &["tensor u overlaps the tensor t"]);
    let strange = Gguf::small().with_tensor(tensor("output_norm.weight", &[64], 77, 0));
    refused(
        on_file(&strange, Checkpoint::open),
        &["output_norm.weight is of type number 77, which is not read"],
    );
}

#[test]
fn parts_of_a_split_model() {
    let part = |i: u32| Gguf {
        keys: vec![text_key("general.architecture", "llama"), key("split.count", 2, &2u16.to_le_bytes())],
        ..Gguf::small().with_tensor(tensor(&format!("t{i}"), &[64], 0, 0))
    };
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name);
    fs::write(path("m-00001-of-00002.gguf"), part(1).bytes()).unwrap();
    refused(Container::open(&path("m-00001-of-00002.gguf")), &["m-00002-of-00002.gguf", "No such file"]);
    let second = Gguf { data: vec![0x40; 256], ..part(2) };
    fs::write(path("m-00002-of-00002.gguf"), second.bytes()).unwrap();
    for named in [path("m-00001-of-00002.gguf"), path("m-00002-of-00002.gguf"), work.path().to_path_buf()] {
        let checkpoint = Checkpoint::open(&named).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["t1", "t2"]);
        assert_eq!(super::read(&checkpoint, "t2"), [f32::from_le_bytes([0x40; 4]); 64]);
    }
    fs::rename(path("m-00001-of-00002.gguf"), path("m.gguf")).unwrap();
    refused(Container::open(&path("m.gguf")), &["m.gguf: split.count is 2", "PREFIX-00001-of-N.gguf"]);
}

#[test]
fn configurations_that_cannot_be() {
    for missing in [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.context_length",
        "llama.vocab_size",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let says = format!("x.gguf: {missing} is missing");
        refused(on_file(&model_keys(missing), Config::load), &[&says]);
    }
    let arch = |name: &str| Gguf { keys: vec![text_key("general.architecture", name)], ..Gguf::small() };
    refused(
        on_file(&arch("bert"), Config::load),
        &["x.gguf: general.architecture is \"bert\" and not supported", "llama, qwen2, qwen3"],
    );
    refused(
        on_file(&Gguf { keys: vec![], ..Gguf::small() }, Config::load),
        &["general.architecture is missing"],
    );
    for (key, says) in [
        (u32_key("llama.expert_count", 8), "llama.expert_count is above 0"),
        (u32_key("llama.attention.key_length", 24), "llama.rope.dimension_count is 16 and not 24"),
        (u32_key("llama.attention.value_length", 8), "llama.attention.value_length is not 16"),
        (text_key("llama.rope.scaling.type", "other"), "llama.rope.scaling.type is \"other\""),
        (text_key("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.factor is missing"),
        (
            list_key("llama.attention.head_count_kv", 4, &[vec![1, 0, 0, 0], vec![2, 0, 0, 0]]),
            "llama.attention.head_count_kv differs from layer to layer",
        ),
        (text_key("llama.rope.freq_base", "x"), "llama.rope.freq_base is \"x\""),
    ] {
        let gguf = model_keys("").with_key(u32_key("llama.rope.dimension_count", 16)).with_key(key);
        refused(on_file(&gguf, Config::load), &["x.gguf", says]);
    }
    let even = list_key("llama.attention.head_count_kv", 4, &[vec![2, 0, 0, 0], vec![2, 0, 0, 0]]);
    assert_eq!(on_file(&model_keys("").with_key(even), Config::load).unwrap().num_kv_heads, 2);
}

#[test]
fn tokenizers_that_cannot_be() {
    let tokens = |texts: &[&str]| {
        let texts: Vec<Vec<u8>> = texts.iter().map(|token| text(token)).collect();
        list_key("tokenizer.ggml.tokens", 8, &texts)
    };
    let base = |model: &str| {
        Gguf::small().with_key(text_key("tokenizer.ggml.model", model)).with_key(tokens(&["a", "b", "ab"]))
    };
    refused(on_file(&Gguf::small(), tokenizer_files), &["x.gguf: tokenizer.ggml.tokens is missing"]);
    refused(on_file(&base("bert"), tokenizer_files), &["tokenizer.ggml.model is \"bert\" and not supported"]);
    refused(on_file(&base("llama"), tokenizer_files), &["tokenizer.ggml.scores is missing"]);
    refused(on_file(&base("gpt2"), tokenizer_files), &["tokenizer.ggml.pre is missing"]);
    for pre in ["default", "chameleon"] {
        let gguf = base("gpt2").with_key(text_key("tokenizer.ggml.pre", pre));
        let says = format!("tokenizer.ggml.pre is \"{pre}\", and how that cuts words is not known");
        refused(on_file(&gguf, tokenizer_files), &[&says, "tokenizer.json"]);
    }
    let gpt2 = base("gpt2").with_key(text_key("tokenizer.ggml.pre", "gpt-2"));
    let merges = |merge: &str| list_key("tokenizer.ggml.merges", 8, &[text(merge)]);
    assert!(on_file(&gpt2.clone().with_key(merges("a b")), tokenizer_files).is_ok());
    let bad = gpt2.clone().with_key(merges("ab"));
    refused(on_file(&bad, tokenizer_files), &["tokenizer.ggml.merges has \"ab\" as entry 0"]);
    let gpt2 = gpt2.with_key(merges("a b"));
    let kinds = list_key("tokenizer.ggml.token_type", 5, &[vec![1, 0, 0, 0]]);
    refused(
        on_file(&gpt2.clone().with_key(kinds), tokenizer_files),
        &["has 1 entries and there are 3 tokens"],
    );
    let bos = u32_key("tokenizer.ggml.bos_token_id", 3);
    refused(on_file(&gpt2.with_key(bos), tokenizer_files), &["bos_token_id is 3, not the id of a token"]);
}

/// A file with every kind of key, tensor and a tokenizer, to be changed at random.
fn rich() -> Vec<u8> {
    let f32s = |values: &[f32]| values.iter().map(|value| value.to_le_bytes().to_vec()).collect::<Vec<_>>();
    let texts = ["<unk>", "a", "b", "ab"].map(text);
    let mut gguf = model_keys("")
        .with_key(u32_key("llama.rope.dimension_count", 16))
        .with_key(text_key("llama.rope.scaling.type", "linear"))
        .with_key(key("llama.rope.scaling.factor", 6, &2f32.to_le_bytes()))
        .with_key(text_key("tokenizer.ggml.model", "llama"))
        .with_key(list_key("tokenizer.ggml.tokens", 8, &texts))
        .with_key(list_key("tokenizer.ggml.scores", 6, &f32s(&[0.0, -1.0, -2.0, -3.0])))
        .with_key(u32_key("tokenizer.ggml.bos_token_id", 1))
        .with_key(key("tokenizer.ggml.add_bos_token", 7, &[1]));
    gguf.tensors = vec![
        tensor("token_embd.weight", &[64, 4], 2, 0),
        tensor("blk.0.attn_q.weight", &[64, 64], 30, 160),
        tensor("rope_freqs.weight", &[8], 0, 8352),
    ];
    gguf.data = (0..8384).map(|i| (i * 7 % 64) as u8).collect();
    gguf.bytes()
}

#[test]
fn the_file_to_be_changed_is_sound() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.gguf");
    fs::write(&path, rich()).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().names().count(), 2);
    tokenizer_files(&path).unwrap();
    bodies::gguf(&rich());
}

#[test]
fn edited_copies_are_read_or_refused() {
    edited_copies("gguf", &rich(), 200, bodies::gguf);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn files_with_changed_bytes(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = rich();
        let header = bytes.len() - 8384;
        for (at, byte) in changes {
            bytes[at.index(header)] = byte;
        }
        bodies::gguf(&bytes);
    }

    #[test]
    fn files_with_changed_words(at in any::<prop::sample::Index>(), word in prop::sample::select(vec![0u64, 1, 255, 1 << 20, 1 << 31, 1 << 40, u64::MAX])) {
        let mut bytes = rich();
        let at = at.index(bytes.len() - 8384 - 8);
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        bodies::gguf(&bytes);
    }

    #[test]
    fn files_cut_short(len in any::<prop::sample::Index>()) {
        let bytes = rich();
        bodies::gguf(&bytes[..len.index(bytes.len())]);
    }
}
