//! Packed files, made for a test.

use std::io::Write;
use std::sync::Arc;

use bzip2::write::BzEncoder;
use flate2::{Compression, write::GzEncoder};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn bzip2(content: &[u8]) -> Vec<u8> {
    let mut encoder = BzEncoder::new(Vec::new(), bzip2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// A column of a Parquet file, or the part of it that lies in one group of rows.
pub(crate) enum Column {
    Ints(Vec<i64>),
    /// Texts, which lie in so many optional groups.
    Texts(Vec<Option<String>>, i16),
    /// The texts of one row's list.
    List(Vec<String>),
}

/// Returns a column of texts that are all there.
pub(crate) fn texts<T: ToString>(texts: &[T], level: i16) -> Column {
    Column::Texts(texts.iter().map(|text| Some(text.to_string())).collect(), level)
}

/// Returns a Parquet file of these groups of rows.
pub(crate) fn parquet(schema: &str, groups: Vec<Vec<Column>>) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let snappy = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(snappy)).unwrap();
    for columns in groups {
        let mut group = writer.next_row_group().unwrap();
        for column in columns {
            let mut out = group.next_column().unwrap().unwrap();
            let values =
                |texts: Vec<String>| texts.into_iter().map(|t| ByteArray::from(t.into_bytes())).collect();
            let (values, defined, repeated): (Vec<ByteArray>, Vec<i16>, Option<Vec<i16>>) = match column {
                Column::Ints(ints) => {
                    out.typed::<Int64Type>().write_batch(&ints, None, None).unwrap();
                    out.close().unwrap();
                    continue;
                }
                Column::Texts(texts, level) => {
                    let defined = texts.iter().map(|text| level - i16::from(text.is_none())).collect();
                    (values(texts.into_iter().flatten().collect()), defined, None)
                }
                Column::List(texts) => {
                    let repeated = (0..texts.len()).map(|i| i16::from(i > 0)).collect();
                    (values(texts.clone()), vec![3; texts.len()], Some(repeated))
                }
            };
            out.typed::<ByteArrayType>().write_batch(&values, Some(&defined), repeated.as_deref()).unwrap();
            out.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}
