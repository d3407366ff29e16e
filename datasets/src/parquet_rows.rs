//! Rows of a Parquet file, a few at a time, of all columns or of text columns alone.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::basic::Type as PhysicalType;
use parquet::errors::ParquetError;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type};
use serde_json::{Map, Value};

use crate::error::{Error, Result, shown};
use crate::format::MAX_DOCUMENT;
use crate::panics::caught;
use crate::parquet_pages::{Group, LargeCell};
use crate::reader::check_start;
use crate::remedy::Remedy;
use crate::row_text::{Joined, RowText};

/// The most rows decoded at a time.
const ROWS: u64 = 64;

/// Reads the rows of a Parquet file.
pub(crate) struct ParquetRows {
    path: PathBuf,
    file: Arc<File>,
    reader: SerializedFileReader<File>,
    /// The columns that are decoded.
    schema: SchemaDescPtr,
    /// The text columns: names, and where they lie in a row.
    texts: Vec<(String, Vec<String>)>,
    /// The open row group.
    group: Option<ReaderIter>,
    next_group: usize,
    /// Rows handed out.
    row: u64,
    bytes_read: Arc<AtomicU64>,
    /// Bytes of the file that are not yet counted as read.
    uncounted: u64,
}

impl ParquetRows {
    /// Opens `path`, to read all its columns. `bytes_read` counts the bytes taken from the file.
    pub(crate) fn open(path: &Path, bytes_read: Arc<AtomicU64>) -> Result<ParquetRows> {
        let file = File::open(path).map_err(Error::io(path))?;
        let uncounted = file.metadata().map_err(Error::io(path))?.len();
        let mut start = Vec::new();
        (&file).take(64).read_to_end(&mut start).map_err(Error::io(path))?;
        check_start(path, &start, ".parquet")?;
        let again = file.try_clone().map_err(Error::io(path))?;
        let reader = guarded(|| SerializedFileReader::new(again)).map_err(|defect| defect.at(path, 1))?;
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        let (path, texts) = (path.to_path_buf(), Vec::new());
        let (file, group, next_group, row) = (Arc::new(file), None, 0, 0);
        Ok(ParquetRows { path, file, reader, schema, texts, group, next_group, row, bytes_read, uncounted })
    }

    /// Reads the columns `names` alone, which must hold text; [`ParquetRows::next_text`] then joins them.
    pub(crate) fn with_texts(mut self, names: &[&str]) -> Result<ParquetRows> {
        let mut roots: Vec<usize> = Vec::new();
        for &name in names {
            let wrong = |reason: String| Error::Row {
                path: self.path.clone(),
                row: 1,
                reason,
                help: Remedy::fixed("name the column of the text with {text_column}"),
            };
            let columns = self.schema.columns();
            let Some(index) = columns.iter().position(|column| column.path().string() == name) else {
                let all = columns.iter().take(20).map(|column| format!("{:?}", column.path().string()));
                let all = all.collect::<Vec<_>>().join(", ");
                return Err(wrong(format!("no column {name:?} (columns: {all})")));
            };
            let column = &columns[index];
            if column.physical_type() != PhysicalType::BYTE_ARRAY || column.max_rep_level() > 0 {
                return Err(wrong(format!("column {name:?} holds {}, not text", column.physical_type())));
            }
            self.texts.push((name.to_owned(), column.path().parts().to_vec()));
            roots.push(self.schema.get_column_root_idx(index));
        }
        roots.sort_unstable();
        roots.dedup();
        let root = self.schema.root_schema();
        let fields = roots.iter().map(|&at| Arc::clone(&root.get_fields()[at])).collect();
        let selected = Type::group_type_builder(root.name()).with_fields(fields).build();
        let selected = selected.map_err(|cause| Defect::of(cause).at(&self.path, 1))?;
        self.schema = Arc::new(SchemaDescriptor::new(Arc::new(selected)));
        Ok(self)
    }

    /// Reads the next row as JSON. Lists and groups become arrays and objects.
    pub(crate) fn next_object(&mut self) -> Result<Option<Map<String, Value>>> {
        Ok(self.next_row()?.map(|row| object(&row)))
    }

    /// Reads the text columns of the next row, joined by line ends.
    pub(crate) fn next_text(&mut self) -> Result<Option<RowText>> {
        let Some(row) = self.next_row()? else { return Ok(None) };
        let mut joined = Joined::default();
        for (name, place) in &self.texts {
            let not_text = || Error::Row {
                path: self.path.clone(),
                row: self.row,
                reason: format!("column {name:?} is not UTF-8"),
                help: Remedy::fixed("write the file again with a text column"),
            };
            match field(&row, place) {
                Some(Field::Str(part)) => joined.push(part),
                Some(Field::Bytes(bytes)) => joined.push(bytes.as_utf8().map_err(|_| not_text())?),
                None | Some(Field::Null) => {}
                Some(_) => return Err(not_text()),
            }
        }
        Ok(Some(joined.finish()))
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        let number = self.row + 1;
        loop {
            if let Some(group) = &mut self.group {
                let row = guarded(|| group.next().transpose());
                if let Some(row) = row.map_err(|defect| defect.at(&self.path, number))? {
                    let is_large = |(_, field): &(&String, &Field)| bytes_of(field) > MAX_DOCUMENT;
                    if let Some((column, _)) = row.get_column_iter().find(is_large) {
                        return Err(
                            Defect::large(&LargeCell { column: column.clone() }).at(&self.path, number)
                        );
                    }
                    self.row = number;
                    return Ok(Some(row));
                }
            }
            if self.next_group == self.reader.num_row_groups() {
                self.bytes_read.fetch_add(std::mem::take(&mut self.uncounted), Ordering::Relaxed);
                return Ok(None);
            }
            let size = self.reader.metadata().row_group(self.next_group).compressed_size();
            let size = u64::try_from(size).unwrap_or(0).min(self.uncounted);
            self.uncounted -= size;
            self.bytes_read.fetch_add(size, Ordering::Relaxed);
            let opened = guarded(|| {
                let metadata = self.reader.metadata().row_group(self.next_group).clone();
                let rows = rows_at_once(&metadata);
                let group = Group::new(Arc::clone(&self.file), metadata);
                TreeBuilder::new().with_batch_size(rows).as_iter(Arc::clone(&self.schema), &group)
            });
            self.group = Some(opened.map_err(|defect| defect.at(&self.path, number))?);
            self.next_group += 1;
        }
    }
}

/// Returns how many rows of a group are decoded at a time: the pages that their values lie in stay in memory.
fn rows_at_once(group: &RowGroupMetaData) -> usize {
    let [bytes, rows] = [group.total_byte_size(), group.num_rows()].map(|n| u64::try_from(n).unwrap_or(0));
    let of_a_row = (bytes / rows.max(1)).max(1);
    usize::try_from((MAX_DOCUMENT / of_a_row).clamp(1, ROWS)).unwrap_or(1)
}

/// Returns the bytes of all texts in a field.
fn bytes_of(field: &Field) -> u64 {
    match field {
        Field::Str(text) => text.len() as u64,
        Field::Bytes(bytes) => bytes.len() as u64,
        Field::ListInternal(list) => list.elements().iter().map(bytes_of).sum(),
        Field::MapInternal(map) => {
            map.entries().iter().map(|(key, value)| bytes_of(key) + bytes_of(value)).sum()
        }
        Field::Group(group) => group.get_column_iter().map(|(_, field)| bytes_of(field)).sum(),
        _ => 0,
    }
}

/// Finds the field at the nested `place` of a row.
fn field<'a>(row: &'a Row, place: &[String]) -> Option<&'a Field> {
    let (first, rest) = place.split_first()?;
    let (_, found) = row.get_column_iter().find(|(name, _)| *name == first)?;
    match found {
        Field::Group(inner) if !rest.is_empty() => field(inner, rest),
        found => Some(found),
    }
}

fn object(row: &Row) -> Map<String, Value> {
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => Value::from(*x),
        Field::Byte(x) => Value::from(*x),
        Field::Short(x) => Value::from(*x),
        Field::Int(x) => Value::from(*x),
        Field::Long(x) => Value::from(*x),
        Field::UByte(x) => Value::from(*x),
        Field::UShort(x) => Value::from(*x),
        Field::UInt(x) => Value::from(*x),
        Field::ULong(x) => Value::from(*x),
        Field::Float(x) => Value::from(*x),
        Field::Double(x) => Value::from(*x),
        Field::Str(text) => Value::from(text.as_str()),
        Field::Bytes(bytes) => Value::from(String::from_utf8_lossy(bytes.data())),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::Group(group) => Value::Object(object(group)),
        other => Value::from(other.to_string()),
    }
}

/// Why data cannot be read, and what helps.
struct Defect {
    reason: String,
    help: Remedy,
}

impl Defect {
    fn unreadable(reason: &str) -> Defect {
        Defect {
            reason: format!("unreadable Parquet data ({reason})"),
            help: Remedy::fixed(
                "fetch the file again; supported are columns that are plain or compressed by Snappy, gzip, Brotli, LZ4 or Zstandard",
            ),
        }
    }

    fn large(cell: &LargeCell) -> Defect {
        Defect { reason: shown(&cell.to_string()), help: Remedy::fixed("write the cell as several rows") }
    }

    fn of(cause: ParquetError) -> Defect {
        if let ParquetError::External(own) = &cause
            && let Some(cell) = own.downcast_ref::<LargeCell>()
        {
            return Defect::large(cell);
        }
        let message = cause.to_string();
        // Some messages repeat the bytes of the text.
        Defect::unreadable(&shown(message.split(" Bytes: ").next().unwrap_or_default()))
    }

    /// Makes the error of a row.
    fn at(self, path: &Path, row: u64) -> Error {
        Error::row(path, row, self.reason, self.help)
    }
}

/// Runs `read` and turns panics into errors: the library panics on some damaged files.
fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, Defect> {
    match caught(read) {
        Some(read) => read.map_err(Defect::of),
        None => Err(Defect::unreadable("its pages contradict its footer")),
    }
}

#[cfg(test)]
mod tests {
    use parquet::file::metadata::ColumnChunkMetaData;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    #[test]
    fn fewer_rows_are_decoded_at_once_the_larger_they_are() {
        let schema = parse_message_type("message m { REQUIRED INT64 id; }").unwrap();
        let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
        let column = ColumnChunkMetaData::builder(schema.column(0)).build().unwrap();
        for (bytes, rows, wanted) in [
            (1_000, 1_000, 64),
            (0, 0, 64),
            (-1, -1, 64),
            (1 << 30, 1 << 6, 4),
            (1 << 30, 1, 1),
            (i64::MAX, 1, 1),
        ] {
            let group =
                RowGroupMetaData::builder(Arc::clone(&schema)).set_num_rows(rows).set_total_byte_size(bytes);
            let group = group.set_column_metadata(vec![column.clone()]).build().unwrap();
            assert_eq!(rows_at_once(&group), wanted, "{bytes} bytes of {rows} rows");
        }
    }
}
