//! The texts of a Parquet file: the text columns alone, a few rows at a time.

use crate::{Error, Result};
use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::file::reader::{FileReader, SerializedFileReader};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Rows decoded at a time.
const ROWS: usize = 64;

/// A Parquet file being read.
pub(crate) struct ParquetTexts {
    path: PathBuf,
    reader: SerializedFileReader<File>,
    columns: Vec<Column>,
    next_group: usize,
    /// Rows of the open group that are still to be decoded.
    rows_left: usize,
    /// Decoded rows: by column, the next one last.
    decoded: Vec<Vec<Option<Vec<u8>>>>,
    /// Rows handed out.
    row: u64,
    bytes_read: Arc<AtomicU64>,
    /// Bytes of the file that are not yet counted as read.
    uncounted: u64,
}

struct Column {
    name: String,
    index: usize,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    max_level: i16,
}

impl ParquetTexts {
    /// Opens `path`; the text of a row is that of `names`, joined by line ends.
    pub(crate) fn open(path: &Path, names: &[&str], bytes_read: Arc<AtomicU64>) -> Result<ParquetTexts> {
        let file = File::open(path).map_err(Error::io(path))?;
        let uncounted = file.metadata().map_err(Error::io(path))?.len();
        let reader =
            guarded(|| SerializedFileReader::new(file)).map_err(|reason| broken(path, 1, &reason))?;
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        let mut columns = Vec::new();
        for &name in names {
            let found = schema.columns().iter().position(|column| column.path().string() == name);
            let wrong = |reason: String| Error::Row {
                path: path.to_path_buf(),
                row: 1,
                reason,
                mend: "name the column of the text with --text-column".into(),
            };
            let Some(index) = found else {
                let all: Vec<String> = schema
                    .columns()
                    .iter()
                    .take(20)
                    .map(|column| format!("{:?}", column.path().string()))
                    .collect();
                return Err(wrong(format!("no column {name:?} (columns: {})", all.join(", "))));
            };
            let column = schema.column(index);
            if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 {
                return Err(wrong(format!("column {name:?} holds {}, not text", column.physical_type())));
            }
            columns.push(Column {
                name: name.to_owned(),
                index,
                reader: None,
                max_level: column.max_def_level(),
            });
        }
        let decoded = vec![Vec::new(); columns.len()];
        let path = path.to_path_buf();
        Ok(ParquetTexts {
            path,
            reader,
            columns,
            next_group: 0,
            rows_left: 0,
            decoded,
            row: 0,
            bytes_read,
            uncounted,
        })
    }

    /// The text of the next row.
    pub(crate) fn next(&mut self) -> Result<Option<String>> {
        if self.decoded[0].is_empty() && !self.decode()? {
            self.bytes_read.fetch_add(std::mem::take(&mut self.uncounted), Ordering::Relaxed);
            return Ok(None);
        }
        self.row += 1;
        let mut text = String::new();
        for (column, decoded) in self.columns.iter().zip(&mut self.decoded) {
            let wrong = |reason: &str, mend: &str| Error::Row {
                path: self.path.clone(),
                row: self.row,
                reason: format!("column {:?} {reason}", column.name),
                mend: mend.to_owned(),
            };
            let Some(value) = decoded.pop().flatten() else {
                return Err(wrong("holds null, not text", "name another column with --text-column"));
            };
            let part = String::from_utf8(value)
                .map_err(|_| wrong("is not UTF-8", "write the file again with a text column"))?;
            if !text.is_empty() && !part.is_empty() {
                text.push('\n');
            }
            text.push_str(&part);
        }
        Ok(Some(text))
    }

    /// Decodes some rows; false at the end of the file.
    fn decode(&mut self) -> Result<bool> {
        let row = self.row + 1;
        while self.rows_left == 0 {
            if self.next_group == self.reader.num_row_groups() {
                return Ok(false);
            }
            let metadata = self.reader.metadata().row_group(self.next_group);
            self.rows_left = usize::try_from(metadata.num_rows())
                .map_err(|_| broken(&self.path, row, "a negative number of rows"))?;
            let size = u64::try_from(metadata.compressed_size()).unwrap_or(0).min(self.uncounted);
            self.uncounted -= size;
            self.bytes_read.fetch_add(size, Ordering::Relaxed);
            let opened = guarded(|| {
                let group = self.reader.get_row_group(self.next_group)?;
                for column in &mut self.columns {
                    column.reader = match group.get_column_reader(column.index)? {
                        ColumnReader::ByteArrayColumnReader(reader) => Some(reader),
                        _ => None,
                    };
                }
                Ok(())
            });
            opened.map_err(|reason| broken(&self.path, row, &reason))?;
            self.next_group += 1;
        }
        let wanted = self.rows_left.min(ROWS);
        for (column, decoded) in self.columns.iter_mut().zip(&mut self.decoded) {
            let rows = guarded(|| column.rows(wanted)).map_err(|reason| broken(&self.path, row, &reason))?;
            if rows.len() != wanted {
                return Err(broken(&self.path, row, "fewer rows than its footer says"));
            }
            *decoded = rows;
            decoded.reverse();
        }
        self.rows_left -= wanted;
        Ok(true)
    }
}

impl Column {
    /// The next rows, `wanted` if there are as many.
    fn rows(&mut self, wanted: usize) -> parquet::errors::Result<Vec<Option<Vec<u8>>>> {
        let Some(reader) = &mut self.reader else { return Ok(Vec::new()) };
        let mut rows = Vec::with_capacity(wanted);
        while rows.len() < wanted {
            let (mut values, mut levels) = (Vec::new(), Vec::new());
            let optional = self.max_level > 0;
            let (read, ..) = reader.read_records(
                wanted - rows.len(),
                optional.then_some(&mut levels),
                None,
                &mut values,
            )?;
            if read == 0 {
                break;
            }
            let mut values = values.into_iter().map(|value| value.data().to_vec());
            if optional {
                rows.extend(
                    levels.iter().map(|&level| if level == self.max_level { values.next() } else { None }),
                );
            } else {
                rows.extend(values.map(Some));
            }
        }
        Ok(rows)
    }
}

fn broken(path: &Path, row: u64, reason: &str) -> Error {
    Error::Row {
        path: path.to_path_buf(),
        row,
        reason: format!("unreadable Parquet data ({reason})"),
        mend: "fetch the file again; supported are plain and Snappy-compressed columns".into(),
    }
}

/// The library panics on some damaged files.
fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|cause| cause.to_string().replace('\n', " ")),
        Err(_) => Err("its pages contradict its footer".into()),
    }
}
