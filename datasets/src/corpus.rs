//! Documents out of files: text, JSON lines, JSON arrays, each plain, gzip or Zstandard; Parquet.

use crate::error::{Error, Result};
use crate::files::sha256_of;
use crate::parquet_rows::ParquetRows;
use crate::reader::{Packing, Records};
use serde::de::{DeserializeSeed, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// The largest document of a text file or line of a JSONL file, in bytes: encoding takes some sixty times as much.
const MAX_DOCUMENT: u64 = 64 << 20;

/// The largest JSON array, in bytes; it is parsed whole.
const MAX_JSON: u64 = 1 << 30;

/// The customary text between two documents of a text file.
pub const DOC_SEPARATOR: &str = "<|endoftext|>";

/// Options for finding documents in files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorpusOptions {
    /// The text between two documents of a text file. Without it a text file is one document.
    pub doc_separator: Option<String>,
    /// The field of a JSON object, or the column of a Parquet file, that holds the text; `"text"` by default. Several,
    /// with commas between them, are joined by line ends: `question,answer`.
    pub text_column: String,
}

impl Default for CorpusOptions {
    fn default() -> CorpusOptions {
        CorpusOptions { doc_separator: None, text_column: "text".into() }
    }
}

/// Files that are read as documents.
pub struct Corpus {
    files: Vec<CorpusFile>,
    options: CorpusOptions,
    total_bytes: u64,
}

/// A piece of text that is independent of all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text. It has no white space at either end and is not empty, but for [`Corpus::texts`].
    pub text: String,
    /// Index into [`Corpus::files`] of the file it is from.
    pub source: usize,
}

struct CorpusFile {
    path: PathBuf,
    format: Format,
    packing: Packing,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Text,
    JsonLines,
    /// One array of objects, or JSON lines under another name.
    Json,
    Parquet,
}

/// A place between two documents of a corpus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Index of the file being read.
    pub(crate) file: usize,
    /// Documents of it that are done.
    pub(crate) documents: u64,
}

/// Size and time of a file, to see whether it changes.
pub(crate) type Stamp = (u64, Option<SystemTime>);

impl Corpus {
    /// Opens a corpus: each of `paths` is a file or a directory. A directory is searched recursively, in
    /// the order of names, for `.txt`, `.text`, `.md`, `.tex`, `.jsonl` and `.json` files, also with `.gz` or `.zst`
    /// appended, and `.parquet` files. A file named by itself may end otherwise and is read as text.
    ///
    /// # Errors
    /// A path that does not exist or is no regular file, a directory without such files, an empty separator.
    pub fn open(paths: &[PathBuf], options: CorpusOptions) -> Result<Corpus> {
        if options.doc_separator.as_deref() == Some("") {
            return Err(Error::setting_range(
                "doc_separator",
                "\"\"",
                "at least one character, or leave it out",
            ));
        }
        let mut files = Vec::new();
        for path in paths {
            let metadata = fs::metadata(path).map_err(Error::io(path))?;
            if metadata.is_dir() {
                let before = files.len();
                search(path, &mut files)?;
                if files.len() == before {
                    return Err(Error::NoTextFiles { path: path.clone() });
                }
            } else if metadata.is_file() {
                let (format, packing) = format_of(path);
                files.push(CorpusFile {
                    path: path.clone(),
                    format: format.unwrap_or(Format::Text),
                    packing,
                });
            } else {
                return Err(Error::NotAFile { path: path.clone() });
            }
        }
        let mut total_bytes = 0;
        for file in &files {
            total_bytes += fs::metadata(&file.path).map_err(Error::io(&file.path))?.len();
        }
        Ok(Corpus { files, options, total_bytes })
    }

    /// Returns the files, in the order in which they are read.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Returns the options given to [`Corpus::open`].
    pub fn options(&self) -> &CorpusOptions {
        &self.options
    }

    /// Returns the size of all files on disk, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Reads the documents one after the other. The iterator ends after an error. A corpus without a document yields
    /// [`Error::EmptyCorpus`].
    pub fn documents(&self) -> Documents<'_> {
        Documents {
            corpus: self,
            as_they_stand: false,
            next_file: 0,
            in_file: 0,
            current: None,
            bytes_read: Arc::default(),
            found: false,
            ended: false,
        }
    }

    /// Reads the documents as [`Corpus::documents`] does, but keeps the white space around them, and blank ones too.
    pub fn texts(&self) -> Documents<'_> {
        Documents { as_they_stand: true, ..self.documents() }
    }

    /// Reads the documents from `start` on: files before it are not opened, documents before it in its file are
    /// skipped.
    pub(crate) fn documents_from(&self, start: Position) -> Result<Documents<'_>> {
        let mut documents = self.documents();
        for file in &self.files[..start.file.min(self.files.len())] {
            let size = fs::metadata(&file.path).map_err(Error::io(&file.path))?.len();
            documents.bytes_read.fetch_add(size, Ordering::Relaxed);
        }
        documents.next_file = start.file;
        documents.found = start != Position::default();
        for _ in 0..start.documents {
            documents.next().transpose()?;
        }
        Ok(documents)
    }

    /// Returns what identifies the content of each file whatever its name: its bytes and how they are read. `progress`
    /// receives the number of bytes done.
    pub(crate) fn content_hashes(&self, progress: &mut dyn FnMut(u64)) -> Result<Vec<String>> {
        let mut done = 0;
        let hash = |file: &CorpusFile| {
            let mut hashed = |bytes| {
                done += bytes;
                progress(done);
            };
            let hash = sha256_of(&file.path, &mut hashed).map_err(Error::io(&file.path))?;
            Ok(format!("{:?} {:?} {hash}", file.format, file.packing))
        };
        self.files.iter().map(hash).collect()
    }

    /// Returns size and time of every file.
    pub(crate) fn stamps(&self) -> Result<Vec<Stamp>> {
        let stamp = |file: &CorpusFile| {
            let metadata = fs::metadata(&file.path).map_err(Error::io(&file.path))?;
            Ok((metadata.len(), metadata.modified().ok()))
        };
        self.files.iter().map(stamp).collect()
    }

    /// Checks that the files are still as `stamps` says.
    pub(crate) fn check_stamps(&self, stamps: &[Stamp]) -> Result<()> {
        match self.stamps()?.iter().zip(stamps).position(|(now, then)| now != then) {
            Some(file) => Err(Error::Changed { path: self.files[file].path.clone() }),
            None => Ok(()),
        }
    }

    pub(crate) fn empty(&self) -> Error {
        let files = match &self.files[..] {
            [] => "no file given".into(),
            [file] => file.path.display().to_string(),
            [file, rest @ ..] => format!("{} and {} more", file.path.display(), rest.len()),
        };
        Error::EmptyCorpus { files }
    }
}

/// Adds the text files under `dir`. Linked directories are skipped: a link can lead back up.
fn search(dir: &Path, files: &mut Vec<CorpusFile>) -> Result<()> {
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let mut paths: Vec<PathBuf> = entries.map_err(Error::io(dir))?.iter().map(fs::DirEntry::path).collect();
    paths.sort_unstable();
    // Editors and file managers leave hidden copies that nobody means to train on.
    paths.retain(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')));
    for path in paths {
        let kind = fs::symlink_metadata(&path).map_err(Error::io(&path))?;
        if kind.is_dir() {
            search(&path, files)?;
        } else if let (Some(format), packing) = format_of(&path)
            && fs::metadata(&path).map_err(Error::io(&path))?.is_file()
        {
            files.push(CorpusFile { path, format, packing });
        }
    }
    Ok(())
}

fn format_of(path: &Path) -> (Option<Format>, Packing) {
    let (extension, packing) = Packing::of(path);
    let format = match &extension[..] {
        "txt" | "text" | "md" | "tex" => Some(Format::Text),
        "jsonl" => Some(Format::JsonLines),
        "json" => Some(Format::Json),
        "parquet" if packing == Packing::Plain => Some(Format::Parquet),
        _ => None,
    };
    (format, packing)
}

/// The documents of a corpus; made by [`Corpus::documents`] and [`Corpus::texts`].
pub struct Documents<'a> {
    corpus: &'a Corpus,
    as_they_stand: bool,
    next_file: usize,
    /// Documents given of the file being read.
    in_file: u64,
    current: Option<OpenFile>,
    bytes_read: Arc<AtomicU64>,
    found: bool,
    ended: bool,
}

/// The rest of the file being read.
enum OpenFile {
    Text(Records),
    Lines { records: Records, line: u64 },
    Rows(std::vec::IntoIter<String>),
    Parquet(ParquetRows),
}

impl Documents<'_> {
    /// Returns how many bytes of [`Corpus::total_bytes`] have been read.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Returns the place of the next document.
    pub(crate) fn position(&self) -> Position {
        match self.current {
            Some(_) => Position { file: self.next_file - 1, documents: self.in_file },
            None => Position { file: self.next_file, documents: 0 },
        }
    }

    fn open(&self, file: &CorpusFile) -> Result<OpenFile> {
        const DOCUMENT: (&str, u64) = ("document", MAX_DOCUMENT);
        const LINE: (&str, u64) = ("line", MAX_DOCUMENT);
        let records = |delimiter, limit| {
            Records::open(&file.path, file.packing, delimiter, limit, self.bytes_read.clone())
        };
        let options = &self.corpus.options;
        Ok(match file.format {
            Format::Text => {
                OpenFile::Text(records(options.doc_separator.as_deref().unwrap_or_default(), DOCUMENT)?)
            }
            Format::JsonLines => OpenFile::Lines { records: records("\n", LINE)?, line: 0 },
            Format::Json => {
                let mut records = records("\n", LINE)?;
                if records.peek()? == Some(b'[') {
                    records.set_delimiter("", ("JSON array", MAX_JSON));
                    let text = records.next()?.unwrap_or_default();
                    OpenFile::Rows(rows(&file.path, &text, &options.text_column)?.into_iter())
                } else {
                    OpenFile::Lines { records, line: 0 }
                }
            }
            Format::Parquet => {
                let names: Vec<&str> = options.text_column.split(',').collect();
                OpenFile::Parquet(ParquetRows::open(&file.path, self.bytes_read.clone())?.with_texts(&names)?)
            }
        })
    }

    /// Reads the next text of the open file, unchanged.
    fn next_text(&mut self, path: &Path) -> Result<Option<String>> {
        match &mut self.current {
            None => Ok(None),
            Some(OpenFile::Text(records)) => records.next(),
            Some(OpenFile::Rows(rows)) => Ok(rows.next()),
            Some(OpenFile::Parquet(rows)) => rows.next_text(),
            Some(OpenFile::Lines { records, line }) => loop {
                let Some(text) = records.next()? else { return Ok(None) };
                *line += 1;
                if !text.trim().is_empty() {
                    return row(path, *line, &text, &self.corpus.options.text_column).map(Some);
                }
            },
        }
    }

    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            if self.current.is_none() {
                let Some(file) = self.corpus.files.get(self.next_file) else {
                    return if self.found { Ok(None) } else { Err(self.corpus.empty()) };
                };
                self.current = Some(self.open(file)?);
                self.next_file += 1;
                self.in_file = 0;
            }
            let source = self.next_file - 1;
            let Some(text) = self.next_text(&self.corpus.files[source].path)? else {
                self.current = None;
                continue;
            };
            let trimmed = text.trim();
            self.found |= !trimmed.is_empty();
            if self.as_they_stand {
                return Ok(Some(Document { text, source }));
            }
            if !trimmed.is_empty() {
                self.in_file += 1;
                let text = if trimmed.len() == text.len() { text } else { trimmed.to_string() };
                return Ok(Some(Document { text, source }));
            }
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Result<Document>> {
        if self.ended {
            return None;
        }
        let document = self.advance().transpose();
        self.ended = !matches!(document, Some(Ok(_)));
        document
    }
}

/// Returns the text of one line of JSON.
fn row(path: &Path, line: u64, json: &str, column: &str) -> Result<String> {
    let path = || path.to_path_buf();
    match serde_json::from_str(json) {
        Ok(object) => text_of(object, column).map_err(|reason| Error::Column { path: path(), line, reason }),
        Err(cause) => Err(Error::Json { path: path(), line, reason: parse_reason(&cause) }),
    }
}

/// Returns the parser's message and its column; the error names the line itself.
fn parse_reason(cause: &serde_json::Error) -> String {
    let text = cause.to_string();
    format!("{} at column {}", text.split(" at line ").next().unwrap_or_default(), cause.column())
}

/// Returns the text column of `object`, or the columns between commas joined; or the reason why there is none.
fn text_of(mut object: Map<String, Value>, column: &str) -> std::result::Result<String, String> {
    let mut text = String::new();
    let single = object.contains_key(column);
    for name in column.split(if single { '\0' } else { ',' }) {
        let kind = match object.get_mut(name).map(Value::take) {
            Some(Value::String(part)) => {
                if text.is_empty() {
                    text = part;
                } else if !part.is_empty() {
                    text.push('\n');
                    text.push_str(&part);
                }
                continue;
            }
            Some(Value::Null) => "null",
            Some(Value::Bool(_)) => "a boolean",
            Some(Value::Number(_)) => "a number",
            Some(Value::Array(_)) => "an array",
            Some(Value::Object(_)) => "an object",
            None => {
                let columns: Vec<String> = object.keys().take(20).map(|name| format!("{name:?}")).collect();
                return Err(format!("no column {name:?} (columns: {})", columns.join(", ")));
            }
        };
        return Err(format!("column {name:?} holds {kind}, not text"));
    }
    Ok(text)
}

/// Reads the texts of a JSON array of objects. Each object is dropped once its text is read.
fn rows(path: &Path, json: &str, column: &str) -> Result<Vec<String>> {
    struct Rows<'a> {
        column: &'a str,
        column_error: Option<String>,
    }

    impl<'de> DeserializeSeed<'de> for &mut Rows<'_> {
        type Value = Vec<String>;

        fn deserialize<D: serde::Deserializer<'de>>(
            self,
            deserializer: D,
        ) -> std::result::Result<Vec<String>, D::Error> {
            deserializer.deserialize_seq(self)
        }
    }

    impl<'de> Visitor<'de> for &mut Rows<'_> {
        type Value = Vec<String>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an array of objects")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Vec<String>, A::Error> {
            let mut texts = Vec::new();
            while let Some(object) = seq.next_element()? {
                texts.push(text_of(object, self.column).map_err(|reason| {
                    self.column_error = Some(reason);
                    A::Error::custom("column")
                })?);
            }
            Ok(texts)
        }
    }

    let mut rows = Rows { column, column_error: None };
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let texts = rows.deserialize(&mut deserializer).and_then(|texts| deserializer.end().map(|()| texts));
    texts.map_err(|cause| {
        let (path, line) = (path.to_path_buf(), cause.line() as u64);
        match rows.column_error.take() {
            Some(reason) => Error::Column { path, line, reason },
            None => Error::Json { path, line, reason: parse_reason(&cause) },
        }
    })
}
