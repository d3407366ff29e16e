//! Readers of foreign files on any bytes. A body accepts the bytes or refuses them in one line, and never panics.
//! The tests beside it and the targets of cargo-fuzz share these functions.

use std::fs;
use std::path::{Path, PathBuf};

use dsmoe_datasets::tasks::{Loaded, Options, Task, TaskFiles, add_task};
use dsmoe_datasets::token_cache::TokenFile;
use dsmoe_datasets::{
    Bos, Chat, ChatTemplate, Corpus, CorpusOptions, Error, Tokenizer, TokenizerFiles, manifest, mixture,
};
use tempfile::TempDir;

fn with_file<T>(name: &str, bytes: &[u8], read: impl FnOnce(&Path) -> T) -> T {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, bytes).unwrap();
    read(&path)
}

fn one_line<T>(result: Result<T, Error>) -> Option<T> {
    result.inspect_err(|error| assert!(!error.to_string().contains('\n'), "{error}")).ok()
}

/// Reads all documents of a corpus file. The name selects the format.
pub(crate) fn corpus(name: &str, bytes: &[u8]) {
    with_file(name, bytes, |path| {
        let corpus = one_line(Corpus::open(&[path.to_path_buf()], CorpusOptions::default()));
        for document in corpus.iter().flat_map(Corpus::documents) {
            if one_line(document).is_none() {
                break;
            }
        }
    });
}

/// Loads a `tokenizer.json` and uses it.
pub(crate) fn tokenizer(bytes: &[u8]) {
    with_file("tokenizer.json", bytes, |path| {
        let Some(tokenizer) = one_line(Tokenizer::load(path.parent().unwrap(), None, 300)) else { return };
        if let Some(ids) = one_line(tokenizer.encode("It's 12 o'clock,  said Żaneta.\n", Bos::Auto)) {
            one_line(tokenizer.decode(&ids, true));
        }
        let Some(mut stream) = one_line(tokenizer.stream(&[])) else { return };
        for id in 0..20 {
            if one_line(stream.push(id)).is_none() {
                break;
            }
        }
        let _ = (tokenizer.added_prefix("<s>a"), tokenizer.special_within("<s>a"));
        let _ = tokenizer.token_texts();
    });
}

/// Renders a conversation by a chat template, and by the settings beside the tokenizer.
pub(crate) fn chat(template: &[u8], config: &[u8], messages: &[u8]) {
    let files = TokenizerFiles {
        path: "tokenizer.json".into(),
        config: Some(config.to_vec()),
        chat_template: Some(template.to_vec()),
        ..TokenizerFiles::default()
    };
    let messages = serde_json::from_slice(messages).unwrap_or_default();
    let chat = Chat { messages, arguments: serde_json::Map::new(), generation_prompt: true };
    if let Some(template) = one_line(ChatTemplate::new(&files, false)) {
        one_line(template.render(&chat));
    }
}

/// Opens a token cache and reads all of its ids.
pub(crate) fn token_cache(bytes: &[u8]) {
    with_file("a.tokens", bytes, |path| {
        let stream = one_line(TokenFile::open(path)).and_then(|file| one_line(file.into_stream()));
        if let Some(stream) = stream {
            assert!(stream.doc_starts.iter().all(|&start| start <= stream.ids.len()));
        }
    });
}

/// Verifies a folder by its manifest.
pub(crate) fn manifest(bytes: &[u8]) {
    with_file(manifest::MANIFEST, bytes, |path| {
        one_line(manifest::verify(path.parent().unwrap(), &mut |_, _| ()));
    });
}

/// Reads a mixture file.
pub(crate) fn mixture(bytes: &[u8]) {
    with_file("mixture.toml", bytes, |path| {
        one_line(mixture::from_toml(path, &CorpusOptions::default()));
    });
}

/// Reads the definition of a benchmark.
pub(crate) fn definition(bytes: &[u8]) {
    one_line(add_task(&String::from_utf8_lossy(bytes), "task.toml"));
}

/// Loads a benchmark from one file. The extension of the name selects the format.
pub(crate) fn task(task: &str, name: &str, bytes: &[u8]) {
    let task = Task::named(task).expect("a known task");
    with_file(&format!("{}/{name}", task.name), bytes, |path| {
        let folder: PathBuf = path.parent().unwrap().parent().unwrap().into();
        one_line(Loaded::load(task, &TaskFiles::folder(&folder), &Options::default()));
    });
}
