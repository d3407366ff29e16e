//! The formats that every program reads: text, JSON lines, JSON arrays, Parquet; and the list of all formats.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::format::{CorpusFormat, Row, Rows, SourceFile};
use crate::json_row::{Columns, Scanner, Wrong};
use crate::parquet_rows::ParquetRows;
use crate::reader::{Packing, Records};
use crate::row_text::RowText;

/// The largest JSON array, in bytes; its text is held whole.
const MAX_JSON: u64 = 1 << 30;

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
            let mut scanner = Scanner::new(&text, 0);
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

/// An array, whose text is read from byte `at` on, in line `line`.
struct Array {
    path: PathBuf,
    text: String,
    columns: Columns,
    at: usize,
    line: u64,
    surrogates: u64,
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
        records.set_delimiter("", ("JSON array", MAX_JSON));
        let text = records.next()?.unwrap_or_default();
        let (path, columns) = (file.path.to_path_buf(), Columns::new(file.text_column));
        Ok(Box::new(Array { path, text, columns, at: 0, line: 1, surrogates: 0 }))
    }
}

impl Rows for Array {
    fn next(&mut self) -> Result<Option<Row>> {
        let mut scanner = Scanner::new(&self.text, self.at);
        let row = scanner.row_of_array(&self.columns);
        let end = scanner.position();
        self.surrogates += scanner.surrogates;
        let bytes = self.text.as_bytes();
        self.line += bytes[self.at..end].iter().filter(|&&byte| byte == b'\n').count() as u64;
        self.at = end;
        let column = end - bytes[..end].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let row = row.map_err(|cause| wrong(&self.path, self.line, column, cause))?;
        Ok(row.map(|text| Row { line: self.line, text }))
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

/// Makes the error of a row that cannot be read; `column` counts from 0.
fn wrong(path: &Path, line: u64, column: usize, cause: Wrong) -> Error {
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
        cause => wrong(path, line, column, cause),
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
