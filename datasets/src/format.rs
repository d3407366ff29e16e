//! The interface of a file format of text, and of the rows of one file.

use std::io::Read;
use std::panic::RefUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::{Error, Result};
use crate::reader::{Packing, Records, content};
use crate::remedy::Remedy;
use crate::row_text::RowText;

/// The largest document of a text file or line of a JSONL file, in bytes: encoding takes some sixty times as much.
pub(crate) const MAX_DOCUMENT: u64 = 64 << 20;

/// A format of files with text. [`add_format`](crate::corpus::add_format) makes its files part of corpora.
///
/// ```
/// use dsmoe_datasets::corpus::{CorpusFormat, Row, RowText, Rows, SourceFile};
/// use dsmoe_datasets::{Records, Result};
///
/// /// Tables of two columns, the second of which is the text.
/// struct Tables;
///
/// struct Lines(Records);
///
/// impl CorpusFormat for Tables {
///     fn name(&self) -> &'static str {
///         "tables 1"
///     }
///     fn endings(&self) -> &'static [&'static str] {
///         &["tsv"]
///     }
///     fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>> {
///         Ok(Box::new(Lines(file.records("\n")?)))
///     }
/// }
///
/// impl Rows for Lines {
///     fn next(&mut self) -> Result<Option<Row>> {
///         let Some(line) = self.0.next()? else { return Ok(None) };
///         let text = match line.split_once('\t') {
///             Some((_, text)) => RowText::Text(text.to_owned()),
///             None => RowText::Missing("no second column".to_owned()),
///         };
///         Ok(Some(Row { line: self.0.count(), text }))
///     }
/// }
///
/// static TABLES: Tables = Tables;
/// dsmoe_datasets::corpus::add_format(&TABLES)?;
/// # Ok::<(), dsmoe_datasets::Error>(())
/// ```
pub trait CorpusFormat: Sync + RefUnwindSafe {
    /// Returns the name. It is part of what token caches are named by: change it when the same bytes give other texts.
    fn name(&self) -> &'static str;

    /// Returns how names of such files end, in lower case and without the dot. With `.gz`, `.zst`, `.bz2` or `.xz` behind it
    /// the file is compressed.
    fn endings(&self) -> &'static [&'static str];

    /// Returns false if files are compressed inside, so that a compressed one is none.
    fn may_be_packed(&self) -> bool {
        true
    }

    /// Starts to read a file.
    ///
    /// # Errors
    /// The file cannot be read, or is not of this format. [`Error::file`] makes such an error.
    fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>>;
}

/// The rows of one file, in their order.
pub trait Rows: Send {
    /// Reads the next row; none at the end.
    ///
    /// # Errors
    /// The rest of the file cannot be read. [`Error::row`] makes such an error.
    fn next(&mut self) -> Result<Option<Row>>;

    /// Returns how many halves of surrogates became U+FFFD so far.
    fn surrogates(&self) -> u64 {
        0
    }

    /// Returns how many separators of documents were found so far; none where none is looked for.
    fn separators(&self) -> Option<u64> {
        None
    }

    /// Returns true if the file is one document for want of a separator.
    fn is_undivided(&self) -> bool {
        false
    }
}

/// A row of a file: a document, or the lack of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its line, from 1, or another number by which a user finds it.
    pub line: u64,
    /// Its text.
    pub text: RowText,
}

/// A file that a format opens.
#[derive(Debug)]
pub struct SourceFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) packing: Packing,
    pub(crate) doc_separator: Option<&'a str>,
    pub(crate) text_column: &'a str,
    pub(crate) bytes_read: Arc<AtomicU64>,
}

impl SourceFile<'_> {
    /// Returns the path.
    pub fn path(&self) -> &Path {
        self.path
    }

    /// Returns the text between documents that the user asked for.
    pub fn doc_separator(&self) -> Option<&str> {
        self.doc_separator
    }

    /// Returns the name of the column with the text, or several with commas between them.
    pub fn text_column(&self) -> &str {
        self.text_column
    }

    /// Opens the content, decompressed.
    ///
    /// # Errors
    /// The file cannot be read, or is compressed in another way than its name says.
    pub fn content(&self) -> Result<Box<dyn Read + Send>> {
        content(self.path, self.packing, Arc::clone(&self.bytes_read))
    }

    /// Opens the content as texts with `delimiter` between them, each of 64 MiB at the most.
    ///
    /// # Errors
    /// Those of [`SourceFile::content`].
    pub fn records(&self, delimiter: &str) -> Result<Records> {
        self.records_of(delimiter, "document")
    }

    pub(crate) fn records_of(&self, delimiter: &str, what: &'static str) -> Result<Records> {
        let bytes_read = Arc::clone(&self.bytes_read);
        Records::open(self.path, self.packing, delimiter, (what, MAX_DOCUMENT), bytes_read)
    }

    /// Makes an error about the file.
    pub fn wrong(&self, reason: impl Into<String>, help: impl Into<Remedy>) -> Error {
        Error::file(self.path, reason, help)
    }
}
