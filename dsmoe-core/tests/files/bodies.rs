//! Readers of model directories on any bytes. A body accepts the bytes or refuses them in one line, and never panics.
//! The tests and the targets of cargo-fuzz share these functions.

use std::fs;
use std::path::Path;

use dsmoe_core::Error;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::{Checkpoint, Header, MANIFEST_FILE, Manifest};
use dsmoe_core::config::Config;
use dsmoe_core::gguf::tokenizer_files;
use dsmoe_core::masks::Masks;

fn one_line<T>(result: Result<T, Error>) -> Option<T> {
    result.inspect_err(|error| assert!(!error.to_string().contains('\n'), "{error}")).ok()
}

/// Parses the header of a safetensors file with `data` bytes of tensors.
pub(crate) fn header(bytes: &[u8], data: u64) {
    if let Some(header) = one_line(Header::parse(Path::new("x"), bytes, 8 + bytes.len() as u64 + data)) {
        let total: u64 = header.entries.iter().map(|entry| entry.len).sum();
        assert_eq!(total, data, "tensors cover the data");
    }
}

/// Parses a `config.json`. One that is accepted can be counted, and is accepted again as it is written.
pub(crate) fn config(bytes: &[u8]) {
    let path = Path::new("config.json");
    let Some(config) = one_line(Config::from_json(path, &String::from_utf8_lossy(bytes))) else { return };
    let counts = Accounting::of(&config);
    assert!(counts.total > 0 && counts.activated(0.5).is_finite());
    let again = Config::from_json(path, &config.to_json()).expect("what was written is read");
    assert_eq!(Accounting::of(&again).total, counts.total);
}

/// Opens a safetensors file.
pub(crate) fn file(bytes: &[u8]) {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    one_line(Checkpoint::open_file(&path));
}

/// Opens a sharded model: one shard with the name `x`, and an index.
pub(crate) fn index(shard: &[u8], index: &[u8]) {
    let work = tempfile::tempdir().unwrap();
    fs::write(work.path().join("x"), shard).unwrap();
    fs::write(work.path().join("model.safetensors.index.json"), index).unwrap();
    one_line(Checkpoint::open(work.path()));
}

/// Opens a GGUF file: its configuration, every tensor and its tokenizer.
pub(crate) fn gguf(bytes: &[u8]) {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("x.gguf");
    fs::write(&path, bytes).unwrap();
    one_line(Config::load(&path));
    one_line(tokenizer_files(&path));
    if let Some(checkpoint) = one_line(Checkpoint::open(&path)) {
        for name in checkpoint.names() {
            let view = checkpoint.tensor(name).unwrap();
            assert_eq!(checkpoint.bytes(name).unwrap().len() as u64, view.len, "{name}");
        }
    }
}

/// Loads a `masks.safetensors` beside a configuration.
pub(crate) fn masks(config: &Config, bytes: &[u8]) {
    let work = tempfile::tempdir().unwrap();
    fs::write(work.path().join("config.json"), config.to_json()).unwrap();
    fs::write(work.path().join("masks.safetensors"), bytes).unwrap();
    one_line(Masks::load(work.path()));
}

/// Reads a manifest and compares its folder with it.
pub(crate) fn manifest(bytes: &[u8]) {
    let work = tempfile::tempdir().unwrap();
    fs::write(work.path().join(MANIFEST_FILE), bytes).unwrap();
    if let Some(manifest) = one_line(Manifest::read(work.path())).flatten() {
        one_line(manifest.verify(work.path(), &mut |_, _| ()));
    }
}
