//! Rows of a Parquet file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Hands the rows of the file to `take`. Lists and groups become arrays and objects.
pub(crate) fn rows(path: &Path, take: &mut dyn FnMut(Map<String, Value>) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    let broken = |row: u64, reason: String| Error::Row {
        path: path.to_path_buf(),
        row,
        reason: format!("unreadable Parquet data ({reason})"),
        mend: "fetch the file again; supported are plain and Snappy-compressed columns".into(),
    };
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(|reason| broken(1, reason))?;
    let mut rows = guarded(|| reader.get_row_iter(None)).map_err(|reason| broken(1, reason))?;
    let mut number = 1;
    while let Some(row) = guarded(|| rows.next().transpose()).map_err(|reason| broken(number, reason))? {
        let mut fields = Map::new();
        for (name, field) in row.get_column_iter() {
            fields.insert(name.clone(), value(field));
        }
        take(fields)?;
        number += 1;
    }
    Ok(())
}

/// The library panics on some damaged files.
fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|cause| cause.to_string().replace('\n', " ")),
        Err(_) => Err("its pages contradict its footer".into()),
    }
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
        Field::Group(group) => {
            Value::Object(group.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
        }
        other => Value::from(other.to_string()),
    }
}
