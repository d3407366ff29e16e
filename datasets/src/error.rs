//! The errors of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with text, tokenizers, token caches and windows; each message is one line with its mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A path is neither a regular file nor a directory.
    #[error("{}: not a regular file; write its content to a file and give that", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A directory holds no file that is read as text.
    #[error("{}: no .txt, .text, .md, .tex, .jsonl or .json file (plain, .gz or .zst) and no .parquet file in this directory", path.display())]
    NoTextFiles {
        /// The directory.
        path: PathBuf,
    },
    /// A gzip or Zstandard file is damaged or ends early.
    #[error("{}: damaged or truncated {format} data ({cause}); fetch the file again", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// `gzip` or `zstd`.
        format: &'static str,
        /// What the decoder said.
        cause: io::Error,
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
    #[error("{}: a {what} of more than {limit} bytes; split the file, or name where documents end with --doc-separator", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// `document`, `line` or `JSON array`.
        what: &'static str,
        /// The largest size read, in bytes.
        limit: u64,
    },
    /// A JSON line or file that does not parse as objects.
    #[error("{}: line {line}: {reason}; expected one JSON object per line, or one array of objects", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// What the parser said.
        reason: String,
    },
    /// A JSON object without text in the text column.
    #[error("{}: line {line}: {reason}; name the column of the text with --text-column", path.display())]
    Column {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// Which column, and which columns there are.
        reason: String,
    },
    /// A corpus without a single non-empty document.
    #[error("{files}: empty corpus, not one document with text; check the files and --doc-separator")]
    EmptyCorpus {
        /// The files that were read.
        files: String,
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
        /// What the parser said.
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
    /// A BOS token is asked for and the model has none.
    #[error("{}: the model names no BOS token; set bos_token_id in config.json, or use --bos never", path.display())]
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
        /// What the tokenizer said.
        reason: String,
    },
    /// A file that is not a token cache, or not a whole one.
    #[error("{}: not a valid token cache: {reason}; delete it, it is made again", path.display())]
    Cache {
        /// The cache file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process is making the same token cache.
    #[error("{}: in use by another process; wait for it, or use another --cache", path.display())]
    CacheBusy {
        /// The directory of the cache in the making.
        path: PathBuf,
    },
    /// A file is not any more what was hashed.
    #[error("{}: changed while it was read; run this again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A mixture of sources that cannot be used.
    #[error("{place}: {reason}; {mend}")]
    Mixture {
        /// The file with its line, or the argument.
        place: String,
        /// What is wrong.
        reason: String,
        /// What would do.
        mend: String,
    },
    /// A manifest that cannot be used.
    #[error("{}: {reason}; {mend}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What would do.
        mend: String,
    },
    /// Too little text for even one window.
    #[error(
        "{side}: {tokens} tokens are fewer than one window of {window}; give more text, or a smaller --seq"
    )]
    TooFewTokens {
        /// `evaluation text`, `training split`, ...
        side: &'static str,
        /// Tokens there are.
        tokens: usize,
        /// Tokens that a window needs.
        window: usize,
    },
    /// The training text has fewer sequences than asked for.
    #[error(
        "the text has {found} sequences and {asked} are needed; use more text, or fewer or shorter sequences"
    )]
    TooFewSequences {
        /// Sequences of the text.
        found: usize,
        /// Sequences asked for.
        asked: usize,
    },
    /// A row of a task's file that cannot be used.
    #[error("{}: row {row}: {reason}; {mend}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Number of the row from 1, blank lines and a header not counted.
        row: u64,
        /// What is wrong with it.
        reason: String,
        /// What would do.
        mend: String,
    },
    /// A task's file that cannot be used as a whole.
    #[error("{}: {reason}; {mend}", path.display())]
    TaskFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What would do.
        mend: String,
    },
    /// A task that cannot be run as asked.
    #[error("task {task}: {reason}; {mend}")]
    Task {
        /// The task.
        task: String,
        /// What is wrong.
        reason: String,
        /// What would do.
        mend: String,
    },
    /// An option outside its range.
    #[error("{option}: {value} is out of range; use {range}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// The value given.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err`: an [`Error::Io`] about `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { path, cause }
    }

    pub(crate) fn option(option: &'static str, value: impl ToString, range: &'static str) -> Error {
        Error::Option { option, value: value.to_string(), range }
    }
}
