//! The formats that every program reads: text, JSON lines, JSON arrays, Parquet; and the list of all formats.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::format::{CorpusFormat, MAX_DOCUMENT, Row, Rows, SourceFile};
use crate::json_array::{Extent, Place};
use crate::json_row::{Columns, Scanner, Wrong};
use crate::parquet_rows::ParquetRows;
use crate::reader::{Packing, Records};
use crate::row_text::RowText;

/// Bytes before the end of an object that is too large in which its being cut there may be what is wrong with it.
const MARGIN: usize = 1 << 16;

/// Formats in the order in which they were added.
#[derive(Default)]
struct Registry(Vec<&'static dyn CorpusFormat>);

impl Registry {
    /// Adds a format. One that is there already stays.
    fn add(&mut self, format: &'static dyn CorpusFormat) -> Result<()> {
        let twice = |what, name: &str| Err(Error::Twice { what, name: name.to_owned() });
        for &known in &self.0 {
            if known.name() == format.name() {
                return if std::ptr::addr_eq(known, format) {
                    Ok(())
                } else {
                    twice("corpus format", known.name())
                };
            }
            if let Some(ending) = format.endings().iter().find(|ending| known.endings().contains(ending)) {
                return twice("file ending", ending);
            }
        }
        self.0.push(format);
        Ok(())
    }
}

static FORMATS: LazyLock<RwLock<Registry>> = LazyLock::new(|| {
    let own: [&'static dyn CorpusFormat; _] = [&Text, &JsonLines, &Json, &Parquet];
    let mut registry = Registry::default();
    for format in own {
        if let Err(cause) = registry.add(format) {
            panic!("{cause}");
        }
    }
    RwLock::new(registry)
});

/// Makes files of a format part of the corpora of this process. Adding it again changes nothing.
///
/// # Errors
/// Another format has its name or one of its endings.
pub fn add_format(format: &'static dyn CorpusFormat) -> Result<()> {
    FORMATS.write().unwrap_or_else(PoisonError::into_inner).add(format)
}

/// Returns the format that the name of `path` says, if any, and its packing.
pub(crate) fn format_of(path: &Path) -> (Option<&'static dyn CorpusFormat>, Packing) {
    let (ending, packing) = Packing::of(path);
    let formats = FORMATS.read().unwrap_or_else(PoisonError::into_inner);
    let fits = |format: &&dyn CorpusFormat| {
        format.endings().contains(&&ending[..]) && (packing == Packing::Plain || format.may_be_packed())
    };
    (formats.0.iter().copied().find(fits), packing)
}

/// Text, divided by the separator that the user asks for.
pub(crate) struct Text;

struct Pieces {
    records: Records,
    divided: bool,
}

impl CorpusFormat for Text {
    fn name(&self) -> &'static str {
        "Text"
    }

    fn endings(&self) -> &'static [&'static str] {
        &["txt", "text", "md", "tex"]
    }

    fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>> {
        let (separator, divided) = (file.doc_separator.unwrap_or_default(), file.doc_separator.is_some());
        Ok(Box::new(Pieces { records: file.records(separator)?, divided }))
    }
}

impl Rows for Pieces {
    fn next(&mut self) -> Result<Option<Row>> {
        Ok(self.records.next()?.map(|text| Row { line: 0, text: RowText::Text(text) }))
    }

    fn separators(&self) -> Option<u64> {
        self.divided.then(|| self.records.delimiters())
    }

    fn is_undivided(&self) -> bool {
        !self.divided
    }
}

/// One JSON object in each line.
struct JsonLines;

struct Lines {
    path: PathBuf,
    records: Records,
    columns: Columns,
    line: u64,
    surrogates: u64,
}

impl Lines {
    fn new(file: &SourceFile<'_>, records: Records) -> Lines {
        let (path, columns) = (file.path.to_path_buf(), Columns::new(file.text_column));
        Lines { path, records, columns, line: 0, surrogates: 0 }
    }
}

impl CorpusFormat for JsonLines {
    fn name(&self) -> &'static str {
        "JsonLines"
    }

    fn endings(&self) -> &'static [&'static str] {
        &["jsonl"]
    }

    fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>> {
        Ok(Box::new(Lines::new(file, file.records_of("\n", "line")?)))
    }
}

impl Rows for Lines {
    fn next(&mut self) -> Result<Option<Row>> {
        loop {
            let Some(text) = self.records.next()? else { return Ok(None) };
            self.line += 1;
            if text.trim().is_empty() {
                continue;
            }
            let mut scanner = Scanner::new(&text);
            let row = scanner.only_row(&self.columns);
            self.surrogates += scanner.surrogates;
            let (line, at) = (self.line, scanner.position());
            let row = row.map_err(|cause| wrong_line(&self.path, line, &text, at, cause))?;
            return Ok(Some(Row { line, text: row }));
        }
    }

    fn surrogates(&self) -> u64 {
        self.surrogates
    }
}

/// One array of objects, or JSON lines under another name.
struct Json;

/// An array, of which one object is held.
struct Array {
    path: PathBuf,
    records: Records,
    columns: Columns,
    part: Part,
    /// The place of the byte that is read next.
    place: Place,
    surrogates: u64,
}

/// The part of a file with an array that is read next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Start,
    Objects,
    Nothing,
}

impl CorpusFormat for Json {
    fn name(&self) -> &'static str {
        "Json"
    }

    fn endings(&self) -> &'static [&'static str] {
        &["json"]
    }

    fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>> {
        let mut records = file.records_of("\n", "line")?;
        if records.peek()? != Some(b'[') {
            return Ok(Box::new(Lines::new(file, records)));
        }
        let (path, columns) = (file.path.to_path_buf(), Columns::new(file.text_column));
        let (part, place) = (Part::Start, Place::START);
        Ok(Box::new(Array { path, records, columns, part, place, surrogates: 0 }))
    }
}

impl Array {
    /// Skips whitespace and returns the byte behind it; none at the end of the content.
    fn peek(&mut self) -> Result<Option<u8>> {
        loop {
            self.records.hold(0)?;
            let held = self.records.held();
            let is_space = |byte: &&u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
            let spaces = held.iter().take_while(is_space).count();
            let (next, is_end) = (held.get(spaces).copied(), held.is_empty());
            self.skip(spaces);
            if next.is_some() || is_end {
                return Ok(next);
            }
        }
    }

    /// Takes bytes that are held.
    fn skip(&mut self, count: usize) {
        self.place.pass(&self.records.held()[..count]);
        self.records.skip(count);
    }

    /// Moves to the next object; false behind the end of the array.
    fn move_to_object(&mut self) -> Result<bool> {
        const MARK: &[u8] = "\u{FEFF}".as_bytes();
        if self.part == Part::Nothing {
            return Ok(false);
        }
        if self.part == Part::Start {
            self.records.hold(MARK.len())?;
            if self.records.held().starts_with(MARK) {
                self.records.skip(MARK.len());
            }
        }
        match (self.peek()?, self.part) {
            (Some(b'['), Part::Start) => {
                self.skip(1);
                self.part = Part::Objects;
                if self.peek()? != Some(b']') {
                    return Ok(true);
                }
            }
            (Some(b','), Part::Objects) => {
                self.skip(1);
                self.peek()?;
                return Ok(true);
            }
            (Some(b']'), Part::Objects) => {}
            (None, _) => return Err(self.wrong("the array does not end")),
            _ => return Err(self.wrong("expected `,` or `]`")),
        }
        self.skip(1);
        self.part = Part::Nothing;
        match self.peek()? {
            None => Ok(false),
            Some(_) => Err(self.wrong("more text after the end")),
        }
    }

    /// Returns how many bytes the object ahead has, which are held then. One that does not end has those up to the end of the
    /// content, or some more than a document may have.
    fn length(&mut self) -> Result<usize> {
        let (mut extent, mut seen) = (Extent::default(), 0);
        while seen as u64 <= MAX_DOCUMENT {
            self.records.hold(seen)?;
            let ahead = &self.records.held()[seen..];
            if let Some(length) = extent.end_in(ahead) {
                return Ok(seen + length);
            }
            if ahead.is_empty() {
                break;
            }
            seen += ahead.len();
        }
        Ok(seen)
    }

    /// Reads the object of that many bytes.
    fn read(&mut self, length: usize) -> Result<RowText> {
        let bytes = &self.records.held()[..length];
        let is_too_large = length as u64 > MAX_DOCUMENT;
        let text = if is_too_large {
            // A character may be cut.
            String::from_utf8_lossy(bytes)
        } else {
            Cow::Borrowed(str::from_utf8(bytes).map_err(|cause| self.records.not_utf8(cause))?)
        };
        let mut scanner = Scanner::new(&text);
        let row = scanner.only_row(&self.columns);
        let at = scanner.position();
        self.surrogates += scanner.surrogates;
        // A quotation mark that is missing lets an object go on without an end.
        let is_wrong = matches!(row, Err(Wrong::Syntax(_))) && at + MARGIN < text.len();
        if is_too_large && !is_wrong {
            let path = self.path.clone();
            return Err(Error::TooLarge { path, what: "document", limit: MAX_DOCUMENT });
        }
        self.place.pass(&text.as_bytes()[..at]);
        row.map_err(|cause| wrong(&self.path, self.place, cause))
    }

    fn wrong(&self, reason: &str) -> Error {
        wrong(&self.path, self.place, Wrong::Syntax(reason.to_owned()))
    }
}

impl Rows for Array {
    fn next(&mut self) -> Result<Option<Row>> {
        if !self.move_to_object()? {
            return Ok(None);
        }
        let length = self.length()?;
        let text = self.read(length)?;
        self.records.skip(length);
        Ok(Some(Row { line: self.place.line, text }))
    }

    fn surrogates(&self) -> u64 {
        self.surrogates
    }
}

/// Columns of a Parquet file.
struct Parquet;

impl CorpusFormat for Parquet {
    fn name(&self) -> &'static str {
        "Parquet"
    }

    fn endings(&self) -> &'static [&'static str] {
        &["parquet"]
    }

    fn may_be_packed(&self) -> bool {
        false
    }

    fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>> {
        let names: Vec<&str> = file.text_column.split(',').collect();
        Ok(Box::new(ParquetRows::open(file.path, Arc::clone(&file.bytes_read))?.with_texts(&names)?))
    }
}

impl Rows for ParquetRows {
    fn next(&mut self) -> Result<Option<Row>> {
        Ok(self.next_text()?.map(|text| Row { line: 0, text }))
    }
}

/// Makes the error of a row that cannot be read.
fn wrong(path: &Path, Place { line, column }: Place, cause: Wrong) -> Error {
    let path = path.to_path_buf();
    match cause {
        Wrong::Syntax(reason) => {
            let reason = format!("{reason} at column {}", column + 1);
            Error::Json {
                path,
                line,
                reason,
                help: "expected one JSON object per line, or one array of objects",
            }
        }
        Wrong::Column(reason) => Error::Column { path, line, reason },
    }
}

/// Makes the error for a line that is no row.
fn wrong_line(path: &Path, line: u64, text: &str, column: usize, cause: Wrong) -> Error {
    let json =
        |reason: &str, help| Error::Json { path: path.to_path_buf(), line, reason: reason.into(), help };
    match cause {
        Wrong::Syntax(_) if line == 1 && text.trim_start().starts_with('[') => {
            json("an array and not an object", "end the name of a file that is one array of objects in .json")
        }
        Wrong::Syntax(_) if text.trim_start().starts_with('{') && column >= text.trim_end().len() => {
            let help = "write each object in a line of its own (jq -c . OLD > NEW), or fetch the file again if its end is missing";
            json("the object does not end in this line", help)
        }
        cause => wrong(path, Place { line, column }, cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(&'static str, &'static [&'static str]);

    impl CorpusFormat for Named {
        fn name(&self) -> &'static str {
            self.0
        }

        fn endings(&self) -> &'static [&'static str] {
            self.1
        }

        fn open(&self, file: &SourceFile<'_>) -> Result<Box<dyn Rows>> {
            Err(file.wrong("is never read", "do not read it"))
        }
    }

    #[test]
    fn names_and_endings_are_given_once() {
        static FORMATS: [Named; 3] =
            [Named("Json", &["x"]), Named("other", &["y", "jsonl"]), Named("new", &["z"])];
        let mut registry = Registry::default();
        let own: [&'static dyn CorpusFormat; 2] = [&Json, &JsonLines];
        own.into_iter().for_each(|format| registry.add(format).unwrap());
        for (format, part) in FORMATS.iter().zip(["corpus format \"Json\"", "file ending \"jsonl\""]) {
            let error = registry.add(format).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("twice"), "{error}");
        }
        registry.add(&FORMATS[2]).unwrap();
        registry.add(&FORMATS[2]).unwrap();
        assert_eq!(registry.0.len(), 3);
    }
}
