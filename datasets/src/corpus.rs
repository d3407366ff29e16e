//! Documents out of files: text, JSON lines, JSON arrays, each plain, gzip, Zstandard, bzip2 or xz; Parquet; and formats that
//! a program adds.

pub use crate::format::{CorpusFormat, Row, Rows, SourceFile};
pub use crate::formats::add_format;
pub use crate::row_text::RowText;

use crate::error::{Error, Result};
use crate::files::sha256_of;
use crate::format::MAX_DOCUMENT;
use crate::formats::{Text, format_of};
use crate::notes::{FileNotes, Skipped, Undivided, notices, skipped};
use crate::reader::Packing;
use crate::remedy::Remedy;
use crate::selection::Selection;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Rows at the start of a file that may all lack the text column before it counts as misnamed.
const PATIENCE: u64 = 1000;

/// The largest number of files of a corpus. One that is named several times counts as often.
pub const MOST_FILES: usize = 1 << 20;

/// Most levels of folders below one that is named as text: more are a loop, or no text.
const MOST_LEVELS: usize = 64;

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
    /// The documents that are read.
    pub selection: Selection,
}

impl Default for CorpusOptions {
    fn default() -> CorpusOptions {
        CorpusOptions { doc_separator: None, text_column: "text".into(), selection: Selection::default() }
    }
}

/// Files that are read as documents.
pub struct Corpus {
    files: Vec<CorpusFile>,
    options: CorpusOptions,
    total_bytes: u64,
    /// Holds the findings of the last reading of each file.
    notes: Mutex<BTreeMap<usize, FileNotes>>,
}

/// A piece of text that is independent of all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text. It has no white space at either end and is not empty, but for [`Corpus::texts`].
    pub text: String,
    /// Index into [`Corpus::files`] of the file it is from.
    pub source: usize,
}

#[derive(Clone)]
struct CorpusFile {
    path: PathBuf,
    format: &'static dyn CorpusFormat,
    packing: Packing,
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
    /// the order of names, for `.txt`, `.text`, `.md`, `.tex`, `.jsonl` and `.json` files, also with `.gz`, `.zst`, `.bz2`
    /// or `.xz` appended, `.parquet` files, and those of formats that were added. Linked directories are searched too, each directory once. A file named by
    /// itself may end otherwise and is read as text. A path that is named several times is looked at once, and read as often.
    ///
    /// # Errors
    /// A path that does not exist or is no regular file, a directory without such files or more than 64 levels
    /// deep, an empty separator, more than [`MOST_FILES`] files.
    pub fn open(paths: &[PathBuf], options: CorpusOptions) -> Result<Corpus> {
        if options.doc_separator.as_deref() == Some("") {
            return Err(Error::setting_range(
                "doc_separator",
                "\"\"",
                "at least one character, or leave it out",
            ));
        }
        let mut files: Vec<CorpusFile> = Vec::new();
        let mut total_bytes = 0u64;
        // The files of each path, and their bytes.
        let mut known: HashMap<&Path, (Range<usize>, u64)> = HashMap::new();
        for path in paths {
            if let Some((found, bytes)) = known.get(path.as_path()) {
                check_count(path, files.len() + found.len())?;
                files.extend_from_within(found.clone());
                total_bytes = total_bytes.saturating_add(*bytes);
                continue;
            }
            let first = files.len();
            let metadata = fs::metadata(path).map_err(|cause| match cause.kind() {
                ErrorKind::NotFound => {
                    Error::file(path, "there is no such file or folder", "name the text that is to be read")
                }
                _ => Error::io(path)(cause),
            })?;
            if metadata.is_dir() {
                search(path, 0, &mut Searched::default(), &mut files)?;
                if files.len() == first {
                    return Err(Error::NoTextFiles { path: path.clone() });
                }
            } else if metadata.is_file() {
                let (format, packing) = format_of(path);
                files.push(CorpusFile { path: path.clone(), format: format.unwrap_or(&Text), packing });
            } else {
                return Err(Error::NotAFile { path: path.clone() });
            }
            check_count(path, files.len())?;
            let mut bytes = 0u64;
            for file in &files[first..] {
                let len = fs::metadata(&file.path).map_err(Error::io(&file.path))?.len();
                bytes = bytes.saturating_add(len);
            }
            total_bytes = total_bytes.saturating_add(bytes);
            known.insert(path, (first..files.len(), bytes));
        }
        Ok(Corpus { files, options, total_bytes, notes: Mutex::default() })
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
            notes: FileNotes::default(),
            missing: None,
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
        let before = &self.files[..start.file.min(self.files.len())];
        let sizes =
            of_files(before, |file| Ok(fs::metadata(&file.path).map_err(Error::io(&file.path))?.len()))?;
        let bytes = sizes.iter().fold(0u64, |sum, size| sum.saturating_add(*size));
        documents.bytes_read.fetch_add(bytes, Ordering::Relaxed);
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
        let mut done = 0u64;
        let hash = |file: &CorpusFile| {
            let mut hashed = |bytes| {
                done += bytes;
                progress(done);
            };
            let hash = sha256_of(&file.path, &mut hashed).map_err(Error::io(&file.path))?;
            Ok(format!("{} {:?} {hash}", file.format.name(), file.packing))
        };
        let hashes = of_files(&self.files, hash)?;
        // Of a file that is named several times only the first mention was read.
        progress(self.total_bytes);
        Ok(hashes)
    }

    /// Returns what a user should know about the files that were read to their ends: rows left out, separators that never
    /// occur, large text files without one. The texts name settings.
    pub fn notices(&self) -> Vec<Remedy> {
        let notes = self.lock_notes();
        let files: Vec<(&Path, FileNotes)> =
            notes.iter().map(|(&file, notes)| (self.files[file].path.as_path(), notes.clone())).collect();
        notices(&files, self.options.doc_separator.as_deref())
    }

    /// Returns what was left out of the files that were read to their ends.
    pub fn skipped(&self) -> Skipped {
        skipped(self.lock_notes().values())
    }

    fn lock_notes(&self) -> MutexGuard<'_, BTreeMap<usize, FileNotes>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns size and time of every file.
    pub(crate) fn stamps(&self) -> Result<Vec<Stamp>> {
        let stamp = |file: &CorpusFile| {
            let metadata = fs::metadata(&file.path).map_err(Error::io(&file.path))?;
            Ok((metadata.len(), metadata.modified().ok()))
        };
        of_files(&self.files, stamp)
    }

    /// Checks that the files are still as `stamps` says.
    pub(crate) fn check_stamps(&self, stamps: &[Stamp]) -> Result<()> {
        match self.stamps()?.iter().zip(stamps).position(|(now, then)| now != then) {
            Some(file) => Err(Error::Changed { path: self.files[file].path.clone() }),
            None => Ok(()),
        }
    }

    pub(crate) fn empty(&self) -> Error {
        Error::EmptyCorpus { files: self.named() }
    }

    /// Makes the error for a corpus of at least that many ids, for which there is no memory.
    pub(crate) fn too_large(&self, ids: usize) -> Error {
        Error::Memory { files: self.named(), ids }
    }

    /// Makes the error for a document of file `file` of which there is no memory to encode `bytes` bytes.
    pub(crate) fn too_long(&self, file: usize, bytes: usize, memory: u64) -> Error {
        Error::Encoding { files: self.files[file].path.display().to_string(), bytes, memory }
    }

    fn named(&self) -> String {
        match &self.files[..] {
            [] => "no file given".into(),
            [file] => file.path.display().to_string(),
            [file, rest @ ..] => format!("{} and {} more", file.path.display(), rest.len()),
        }
    }
}

/// Refuses more files than [`MOST_FILES`], of which `path` names the last.
fn check_count(path: &Path, count: usize) -> Result<()> {
    if count <= MOST_FILES {
        return Ok(());
    }
    let reason = format!("with it the text has more than {MOST_FILES} files");
    Err(Error::file(path, reason, "join small files into larger ones, or name this path less often"))
}

/// Computes a value of every file, once for each path.
fn of_files<T: Clone>(files: &[CorpusFile], mut of: impl FnMut(&CorpusFile) -> Result<T>) -> Result<Vec<T>> {
    let mut known: HashMap<&Path, T> = HashMap::new();
    let mut values = Vec::with_capacity(files.len());
    for file in files {
        let value = match known.get(file.path.as_path()) {
            Some(value) => value.clone(),
            None => {
                let value = of(file)?;
                known.insert(&file.path, value.clone());
                value
            }
        };
        values.push(value);
    }
    Ok(values)
}

/// Directories that were searched, and all directories above them.
#[derive(Default)]
struct Searched(HashSet<PathBuf>);

impl Searched {
    /// Adds a directory; false if it was searched already or lies above one that was.
    fn add(&mut self, real: PathBuf) -> bool {
        if self.0.contains(&real) {
            return false;
        }
        for above in real.ancestors().skip(1) {
            if !self.0.insert(above.to_path_buf()) {
                break;
            }
        }
        self.0.insert(real)
    }
}

/// Adds the text files under `dir`, which lies `level` directories below the one that was named. A directory that was searched
/// already, or that a link leads up to, is left out.
fn search(dir: &Path, level: usize, searched: &mut Searched, files: &mut Vec<CorpusFile>) -> Result<()> {
    if level > MOST_LEVELS {
        let reason = format!("it lies more than {MOST_LEVELS} folders below the one that is named as text");
        return Err(Error::file(dir, reason, "name a folder further down, or move its files up"));
    }
    if !searched.add(fs::canonicalize(dir).map_err(Error::io(dir))?) {
        return Ok(());
    }
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let mut paths: Vec<PathBuf> = entries.map_err(Error::io(dir))?.iter().map(fs::DirEntry::path).collect();
    paths.sort_unstable();
    // Editors and file managers leave hidden copies that nobody means to train on.
    paths.retain(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')));
    for path in paths {
        let kind = match fs::metadata(&path) {
            Ok(kind) => kind,
            // A link that leads nowhere matters where it stands for text.
            Err(_) if format_of(&path).0.is_none() => continue,
            Err(cause) => return Err(Error::Io { path, cause }),
        };
        if kind.is_dir() {
            search(&path, level + 1, searched, files)?;
        } else if let (Some(format), packing) = format_of(&path)
            && kind.is_file()
        {
            files.push(CorpusFile { path, format, packing });
        }
    }
    Ok(())
}

/// The documents of a corpus; made by [`Corpus::documents`] and [`Corpus::texts`].
pub struct Documents<'a> {
    corpus: &'a Corpus,
    as_they_stand: bool,
    next_file: usize,
    /// Documents given of the file being read.
    in_file: u64,
    current: Option<Box<dyn Rows>>,
    /// Holds the findings of the file that is being read.
    notes: FileNotes,
    /// The first row without the text column: its line and the reason.
    missing: Option<(u64, String)>,
    bytes_read: Arc<AtomicU64>,
    found: bool,
    ended: bool,
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

    fn open(&self, file: &CorpusFile) -> Result<Box<dyn Rows>> {
        let options = &self.corpus.options;
        file.format.open(&SourceFile {
            path: &file.path,
            packing: file.packing,
            doc_separator: options.doc_separator.as_deref(),
            text_column: &options.text_column,
            bytes_read: Arc::clone(&self.bytes_read),
        })
    }

    /// Reads the next row of the open file.
    fn next_row(&mut self) -> Result<Option<Row>> {
        let Some(rows) = &mut self.current else { return Ok(None) };
        let row = rows.next();
        self.notes.surrogates = rows.surrogates();
        row
    }

    /// Reads the next text of the open file, unchanged. Rows without one are counted.
    fn next_text(&mut self, path: &Path) -> Result<Option<String>> {
        while let Some(Row { line, text }) = self.next_row()? {
            match text {
                // Cells of a Parquet file that are joined may be longer than each of them may.
                RowText::Text(text) if text.len() as u64 > MAX_DOCUMENT => {
                    let path = path.to_path_buf();
                    return Err(Error::TooLarge { path, what: "document", limit: MAX_DOCUMENT });
                }
                RowText::Text(text) => {
                    self.notes.texts += 1;
                    return Ok(Some(text));
                }
                RowText::Null => self.notes.null += 1,
                RowText::Missing(reason) => {
                    self.notes.missing += 1;
                    self.missing.get_or_insert((line, reason));
                    if self.notes.missing >= PATIENCE {
                        self.check_column(path)?;
                    }
                }
            }
        }
        self.check_column(path)?;
        Ok(None)
    }

    /// Refuses a file of which every row so far lacks the text column.
    fn check_column(&self, path: &Path) -> Result<()> {
        match &self.missing {
            Some((line, reason)) if self.notes.texts + self.notes.null == 0 => {
                Err(Error::Column { path: path.to_path_buf(), line: *line, reason: reason.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Leaves the open file, which was read to its end.
    fn close(&mut self, file: usize) {
        let mut notes = std::mem::take(&mut self.notes);
        self.missing = None;
        notes.separators = self.current.as_ref().and_then(|rows| rows.separators());
        self.corpus.lock_notes().insert(file, notes);
        self.current = None;
    }

    fn is_undivided(&self) -> bool {
        self.current.as_ref().is_some_and(|rows| rows.is_undivided())
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
                self.close(source);
                continue;
            };
            if self.is_undivided() {
                self.notes.undivided = Undivided::of(&text);
            }
            let selection = self.corpus.options.selection;
            let text = match selection.of(&text, &mut self.notes.deselected) {
                Some(selected) if selected.len() < text.len() => selected.to_owned(),
                Some(_) => text,
                None => continue,
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
