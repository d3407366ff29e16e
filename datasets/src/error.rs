//! The errors of this crate.

use std::io;
use std::path::{Path, PathBuf};

use crate::remedy::Remedy;

pub(crate) static SPLIT: Remedy =
    Remedy::fixed("split the file, or name where documents end with {doc_separator}");
static COLUMN: Remedy = Remedy::fixed("name the column of the text with {text_column}");
static EMPTY: Remedy = Remedy::fixed("check the files and {doc_separator}");
static MEMORY: Remedy = Remedy::fixed("keep them in a file of {cache}, or give shorter documents");
static BOS: Remedy = Remedy::fixed("set bos_token_id in config.json, or use {bos} never");
static BUSY: Remedy = Remedy::fixed("wait for it, or use another {cache}");
static SEQUENCES: Remedy = Remedy::fixed("give more text, or a smaller {samples} or {seq}");
static SHORT: Remedy = Remedy::fixed("give more text, or a smaller {seq}");

/// An error of text, tokenizers, token caches or windows. Each message is one line that ends with a remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        #[source]
        cause: io::Error,
    },
    /// A path is neither a regular file nor a directory.
    #[error("{}: not a regular file; write its content to a file and give that", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A directory holds no text file.
    #[error("{}: no .txt, .text, .md, .tex, .jsonl or .json file (plain, .gz, .zst, .bz2 or .xz) and no .parquet file in this directory", path.display())]
    NoTextFiles {
        /// The directory.
        path: PathBuf,
    },
    /// A compressed file is damaged or ends early.
    #[error("{}: damaged or truncated {format} data ({cause}); fetch the file again", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// `gzip`, `zstd`, `bzip2` or `xz`.
        format: &'static str,
        /// The error of the decoder.
        #[source]
        cause: io::Error,
    },
    /// A compressed file needs too much memory.
    #[error("{}: {format} data that takes more than {limit} bytes of memory to decompress; compress it again with the usual settings ({advice})", path.display())]
    Window {
        /// The file.
        path: PathBuf,
        /// `zstd` or `xz`.
        format: &'static str,
        /// The largest size decompressed, in bytes.
        limit: u64,
        /// The commands that compress it again.
        advice: &'static str,
    },
    /// Text that is not UTF-8.
    #[error("{}: not UTF-8 at byte {offset} of the text; convert it (iconv -t UTF-8)", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Byte offset in the (decompressed) file of the first invalid sequence.
        offset: u64,
    },
    /// One document, line or JSON file is larger than this crate reads at once.
    #[error("{}: a {what} of more than {limit} bytes; {}", path.display(), SPLIT)]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// `document`, `line` or `file`.
        what: &'static str,
        /// The largest size read, in bytes.
        limit: u64,
    },
    /// A JSON line or file that does not parse as objects.
    #[error("{}: line {line}: {reason}; {help}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// The message of the parser.
        reason: String,
        /// The content that the file should have.
        help: &'static str,
    },
    /// A JSON object without text in the text column.
    #[error("{}: line {line}: {reason}; {}", path.display(), COLUMN)]
    Column {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// The missing column, and the columns that exist.
        reason: String,
    },
    /// A corpus without a single non-empty document.
    #[error("{files}: empty corpus, not one document with text; {}", EMPTY)]
    EmptyCorpus {
        /// The files that were read.
        files: String,
    },
    /// The ids of a corpus are more than the memory holds.
    #[error("{files}: the memory does not hold the ids of its text, {ids} or more; {}", MEMORY)]
    Memory {
        /// The files that were read.
        files: String,
        /// The number of ids up to the document that is too much.
        ids: usize,
    },
    /// A document, or a word of it, is more than the memory lets a tokenizer encode at once.
    #[error(
        "{files}: to encode {bytes} bytes at once takes more than the {memory} bytes of memory; {}",
        SPLIT
    )]
    Encoding {
        /// The file of the document.
        files: String,
        /// Bytes of the document or word.
        bytes: usize,
        /// Bytes of memory.
        memory: u64,
    },
    /// A model directory without a tokenizer.
    #[error("{}: no tokenizer.json; copy it from the model's original directory", dir.display())]
    NoTokenizer {
        /// The model directory.
        dir: PathBuf,
    },
    /// A model directory with a SentencePiece model only.
    #[error("{}: only tokenizer.model; convert it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), which writes tokenizer.json", dir.display())]
    SentencePieceOnly {
        /// The model directory.
        dir: PathBuf,
    },
    /// `tokenizer.json` or `tokenizer_config.json` does not parse.
    #[error("{}: not a tokenizer file this program reads ({reason}); save it again with a current transformers", path.display())]
    BadTokenizer {
        /// The file.
        path: PathBuf,
        /// The message of the parser.
        reason: String,
    },
    /// The tokenizer can produce ids that the embedding has no row for.
    #[error("{}: tokenizer larger than the embedding: token {token:?} has id {largest_id}, the model's vocab_size is {vocab_size}; use the tokenizer of this model, or resize its embedding", path.display())]
    TokenizerTooLarge {
        /// The tokenizer file.
        path: PathBuf,
        /// The token with the largest id.
        token: String,
        /// Its id.
        largest_id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A file beside `tokenizer.json` adds a token under an id that `tokenizer.json` cannot give it.
    #[error("{}: added_tokens.json or tokenizer_config.json adds the token {token:?} as id {id}, and the next free id is {next}; save the tokenizer again with a current transformers, which writes all tokens into tokenizer.json", path.display())]
    AddedToken {
        /// The tokenizer file.
        path: PathBuf,
        /// The token.
        token: String,
        /// The id that it should have.
        id: u32,
        /// The next free id.
        next: u32,
    },
    /// A tokenizer without a chat template.
    #[error("{}: no chat template here and no chat_template.jinja beside it; take them from a model tuned for chat, or give the text as it is", path.display())]
    NoChatTemplate {
        /// `tokenizer_config.json`.
        path: PathBuf,
    },
    /// A chat template that refuses a conversation, or has an error.
    #[error("{}: the chat template refuses the conversation or is broken ({reason}); change the messages, or the template", path.display())]
    ChatTemplate {
        /// The file of the template.
        path: PathBuf,
        /// The message of the template or of its engine.
        reason: String,
    },
    /// A file of messages that is not a list of messages.
    #[error("{}: {reason}; expected a JSON list of objects such as {{\"role\": \"user\", \"content\": \"Hello\"}}", path.display())]
    Messages {
        /// The file.
        path: PathBuf,
        /// The defect.
        reason: String,
    },
    /// A BOS token is required and the model has none.
    #[error("{}: the model names no BOS token; {}", path.display(), BOS)]
    NoBos {
        /// The tokenizer file.
        path: PathBuf,
    },
    /// The tokenizer failed on a text or on ids.
    #[error("{}: {what} failed: {reason}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// `encoding`, `decoding` or `writing`.
        what: &'static str,
        /// The message of the tokenizer.
        reason: String,
    },
    /// A file that is not a token cache, or not a whole one.
    #[error("{}: not a valid token cache: {reason}; delete it, it is made again", path.display())]
    Cache {
        /// The cache file.
        path: PathBuf,
        /// The defect.
        reason: String,
    },
    /// Another process is making the same token cache.
    #[error("{}: in use by another process; {}", path.display(), BUSY)]
    CacheBusy {
        /// The directory of the cache in the making.
        path: PathBuf,
    },
    /// A file changed after it was hashed.
    #[error("{}: changed while it was read; run this again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A mixture of sources that cannot be used.
    #[error("{place}: {reason}; {help}")]
    Mixture {
        /// The file with its line, or the argument.
        place: String,
        /// The defect.
        reason: String,
        /// How to fix it.
        help: Remedy,
    },
    /// Too little text for even one window.
    #[error("{side}: {tokens} tokens are fewer than one window of {window}; {}", SHORT)]
    TooFewTokens {
        /// `evaluation text`, `training split`, ...
        side: &'static str,
        /// Number of tokens.
        tokens: usize,
        /// Tokens in a window.
        window: usize,
    },
    /// Fewer sequences of text than are needed.
    #[error("the text has {found} sequences of {seq} tokens and {asked} are needed; {}", SEQUENCES)]
    TooFewSequences {
        /// Number of sequences.
        found: usize,
        /// Tokens in a sequence.
        seq: usize,
        /// Sequences needed.
        asked: usize,
    },
    /// A row of a task's file that cannot be used.
    #[error("{}: row {row}: {reason}; {help}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Number of the row from 1, blank lines and a header not counted.
        row: u64,
        /// The defect.
        reason: String,
        /// How to fix it.
        help: Remedy,
    },
    /// A manifest, or a task's file, that cannot be used as a whole.
    #[error("{}: {reason}; {help}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The defect.
        reason: String,
        /// How to fix it.
        help: Remedy,
    },
    /// A task that cannot be run as asked.
    #[error("task {task}: {reason}; {help}")]
    Task {
        /// The task.
        task: String,
        /// The defect.
        reason: String,
        /// How to fix it.
        help: Remedy,
    },
    /// Two things of a kind have one name.
    #[error("the {what} {name:?} is registered twice; give one of the two another name")]
    Twice {
        /// `corpus format`, `file ending` or `task`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A setting outside its range.
    #[error("{setting} is {value}; use {range}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        range: &'static str,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Makes an [`Error::Io`] about `path`, for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { path, cause }
    }

    pub(crate) fn setting_range(setting: &'static str, value: impl ToString, range: &'static str) -> Error {
        Error::Setting { setting, value: value.to_string(), range }
    }

    /// Makes an [`Error::File`].
    pub fn file(path: &Path, reason: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::File { path: path.to_path_buf(), reason: reason.into(), help: help.into() }
    }

    /// Makes an [`Error::Row`]; rows count from 1.
    pub fn row(path: &Path, row: u64, reason: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::Row { path: path.to_path_buf(), row, reason: reason.into(), help: help.into() }
    }

    pub(crate) fn task(task: &str, reason: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::Task { task: task.into(), reason: reason.into(), help: help.into() }
    }

    pub(crate) fn mixture(
        place: impl Into<String>,
        reason: impl Into<String>,
        help: impl Into<Remedy>,
    ) -> Error {
        Error::Mixture { place: place.into(), reason: reason.into(), help: help.into() }
    }

    /// Returns the remedy with which the message ends, where it names settings.
    pub fn help(&self) -> Option<&Remedy> {
        match self {
            Error::TooLarge { .. } | Error::Encoding { .. } => Some(&SPLIT),
            Error::Column { .. } => Some(&COLUMN),
            Error::EmptyCorpus { .. } => Some(&EMPTY),
            Error::Memory { .. } => Some(&MEMORY),
            Error::NoBos { .. } => Some(&BOS),
            Error::CacheBusy { .. } => Some(&BUSY),
            Error::TooFewTokens { .. } => Some(&SHORT),
            Error::TooFewSequences { .. } => Some(&SEQUENCES),
            Error::Mixture { help, .. }
            | Error::File { help, .. }
            | Error::Row { help, .. }
            | Error::Task { help, .. } => Some(help),
            _ => None,
        }
    }

    /// Returns the setting with whose name the message begins, if it is about one.
    pub fn setting(&self) -> Option<&'static str> {
        match self {
            Error::Setting { setting, .. } if !setting.contains(' ') => Some(setting),
            Error::Mixture { place, .. } if place.starts_with("data") => Some("data"),
            _ => None,
        }
    }
}

/// Returns text from a file for a message: one line of bounded length without control characters. Of a long text its start
/// and end are kept, since parsers say where they are at the end.
pub(crate) fn shown(text: &str) -> String {
    const START: usize = 200;
    const END: usize = 60;
    let mut line: Vec<char> = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > START + END {
        line.splice(START..line.len() - END, " ... ".chars());
    }
    line.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_without_memory_name_the_files_and_the_cache() {
        let error = Error::Memory { files: "a.jsonl.gz".to_owned(), ids: 9 };
        let start =
            "a.jsonl.gz: the memory does not hold the ids of its text, 9 or more; keep them in a file of";
        assert_eq!(error.to_string(), format!("{start} cache, or give shorter documents"));
        let help = error.help().unwrap().worded(|setting| format!("<{setting}>"));
        assert_eq!(help, "keep them in a file of <cache>, or give shorter documents");
    }

    #[test]
    fn long_texts_are_cut_in_the_middle_and_stay_in_a_line() {
        assert_eq!(shown("a\nb\u{1b}[31m"), "a b [31m");
        let text = format!("{}{}", "é".repeat(70_000), " at line 1 column 2");
        let short = shown(&text);
        assert!(
            short.len() < 700 && short.starts_with("éé") && short.ends_with("é at line 1 column 2"),
            "{short}"
        );
    }
}
