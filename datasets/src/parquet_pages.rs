//! Pages of a Parquet column in the compressions for which the parquet crate needs code in C or a second copy of a decoder:
//! the crate reads them as if they were not compressed, and they are decompressed here.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use parquet::basic::Compression;
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::RowGroupReader;
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use crate::format::MAX_DOCUMENT;
use crate::reader::ZstdReader;

/// The largest page, in bytes of its content; a length in the format is no larger.
const MAX_PAGE: u64 = i32::MAX as u64;

/// The most bytes of a page besides its values: their lengths and levels.
const BESIDE_VALUES: u64 = 1 << 20;

/// How far LZ4 can compress.
const LZ4_RATIO: usize = 255;

/// A cell has more bytes than a document may have.
#[derive(Debug, thiserror::Error)]
#[error("column {column:?} has a cell of more than {} bytes", MAX_DOCUMENT)]
pub(crate) struct LargeCell {
    pub(crate) column: String,
}

/// A page has more bytes than it may have.
#[derive(Debug, thiserror::Error)]
#[error("a {format} page is larger than the file states")]
struct LargePage {
    format: &'static str,
}

/// A row group whose pages are decompressed here where the crate cannot.
pub(crate) struct Group {
    file: Arc<File>,
    metadata: RowGroupMetaData,
}

impl Group {
    pub(crate) fn new(file: Arc<File>, metadata: RowGroupMetaData) -> Group {
        Group { file, metadata }
    }
}

impl RowGroupReader for Group {
    fn metadata(&self) -> &RowGroupMetaData {
        &self.metadata
    }

    fn num_columns(&self) -> usize {
        self.metadata.num_columns()
    }

    fn get_column_page_reader(&self, i: usize) -> Result<Box<dyn PageReader>> {
        let column = self.metadata.column(i);
        let rows = usize::try_from(self.metadata.num_rows())?;
        let open = |column| SerializedPageReader::new(Arc::clone(&self.file), column, rows, None);
        let codec = column.compression();
        if matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY) {
            return Ok(Box::new(open(column)?));
        }
        let plain = column.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build()?;
        let limit = u64::try_from(column.uncompressed_size())?.min(MAX_PAGE);
        let unpacker = Unpacker { codec, limit, column: column.column_path().string() };
        Ok(Box::new(Pages { packed: open(&plain)?, unpacker }))
    }

    fn get_column_bloom_filter(&self, _: usize) -> Option<&Sbbf> {
        None
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

/// The pages of one column.
struct Pages {
    packed: SerializedPageReader<File>,
    unpacker: Unpacker,
}

/// Decompresses the pages of one column.
struct Unpacker {
    codec: Compression,
    /// The bytes of all pages together, as the file states them.
    limit: u64,
    /// Its name.
    column: String,
}

impl Unpacker {
    fn unpack(&self, mut page: Page) -> Result<Page> {
        let values = u64::from(page.num_values());
        match &mut page {
            Page::DictionaryPage { buf, .. } | Page::DataPage { buf, .. } => {
                *buf = self.decompressed(buf, values)?.into();
            }
            Page::DataPageV2 { is_compressed: false, .. } => {}
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, .. } => {
                let levels = u64::from(*def_levels_byte_len) + u64::from(*rep_levels_byte_len);
                *buf = self.behind_levels(buf, usize::try_from(levels)?, values)?;
            }
        }
        Ok(page)
    }

    /// Decompresses a page of so many values. One with more bytes than values within the limit can have has a larger cell.
    fn decompressed(&self, packed: &[u8], values: u64) -> Result<Vec<u8>> {
        let most = values.saturating_mul(MAX_DOCUMENT).saturating_add(BESIDE_VALUES);
        decompress(self.codec, packed, self.limit.min(most)).map_err(|cause| match cause {
            ParquetError::External(own) if most < self.limit && own.is::<LargePage>() => {
                ParquetError::External(Box::new(LargeCell { column: self.column.clone() }))
            }
            cause => cause,
        })
    }

    /// Decompresses what follows the levels of a page, which are never compressed.
    fn behind_levels(&self, buf: &Bytes, levels: usize, values: u64) -> Result<Bytes> {
        let Some((levels, packed)) = buf.split_at_checked(levels) else {
            return Err(ParquetError::General("the levels are longer than the page".into()));
        };
        let mut unpacked = levels.to_vec();
        if !packed.is_empty() {
            unpacked.extend(self.decompressed(packed, values)?);
        }
        Ok(unpacked.into())
    }
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Result<Page>> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        self.packed.get_next_page()?.map(|page| self.unpacker.unpack(page)).transpose()
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.packed.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.packed.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.packed.at_record_boundary()
    }
}

/// Decompresses one page, of which at most `limit` bytes can come.
fn decompress(codec: Compression, packed: &[u8], limit: u64) -> Result<Vec<u8>> {
    match codec {
        Compression::ZSTD(_) => all(ZstdReader::new(packed), "zstd", limit),
        Compression::GZIP(_) => all(MultiGzDecoder::new(packed), "gzip", limit),
        Compression::BROTLI(_) => {
            all(brotli_decompressor::Decompressor::new(packed, 1 << 12), "brotli", limit)
        }
        Compression::LZ4_RAW => lz4(packed, limit),
        Compression::LZ4 => hadoop_lz4(packed, limit).map_or_else(|| lz4(packed, limit), Ok),
        other => Err(ParquetError::General(format!("the compression {other:?} is not supported"))),
    }
}

fn all(decoder: impl Read, format: &'static str, limit: u64) -> Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    let read = decoder.take(limit + 1).read_to_end(&mut unpacked);
    match read {
        Ok(read) if read as u64 <= limit => Ok(unpacked),
        Ok(_) => Err(ParquetError::External(Box::new(LargePage { format }))),
        Err(cause) => Err(damaged(format, &cause)),
    }
}

fn damaged(name: &str, cause: &dyn std::fmt::Display) -> ParquetError {
    ParquetError::General(format!("damaged {name} data: {cause}"))
}

/// Decompresses one block of LZ4.
fn lz4(packed: &[u8], limit: u64) -> Result<Vec<u8>> {
    let most = usize::try_from(limit)?.min(packed.len().saturating_mul(LZ4_RATIO));
    let mut unpacked = vec![0; most];
    let length =
        lz4_flex::block::decompress_into(packed, &mut unpacked).map_err(|cause| damaged("lz4", &cause))?;
    unpacked.truncate(length);
    Ok(unpacked)
}

/// Decompresses the framing of Hadoop: blocks, each after the lengths of its content and of itself. None if it is not
/// that framing; some writers put a bare block under the same name.
fn hadoop_lz4(packed: &[u8], limit: u64) -> Option<Vec<u8>> {
    let mut unpacked = Vec::new();
    let mut rest = packed;
    let length = |rest: &mut &[u8]| -> io::Result<u64> {
        let mut bytes = [0; 4];
        rest.read_exact(&mut bytes)?;
        Ok(u64::from(u32::from_be_bytes(bytes)))
    };
    while !rest.is_empty() {
        let (content, block) = (length(&mut rest).ok()?, length(&mut rest).ok()?);
        let (block, after) = rest.split_at_checked(usize::try_from(block).ok()?)?;
        let part = lz4(block, content.min(limit)).ok()?;
        if part.len() as u64 != content {
            return None;
        }
        unpacked.extend(part);
        rest = after;
        if unpacked.len() as u64 > limit {
            return None;
        }
    }
    Some(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_framings_of_lz4_are_read() {
        let text = b"abcabcabcabcabcabcabcabc".repeat(9);
        let block = lz4_flex::block::compress(&text);
        assert_eq!(decompress(Compression::LZ4_RAW, &block, 1 << 20).unwrap(), text);
        assert_eq!(decompress(Compression::LZ4, &block, 1 << 20).unwrap(), text);
        let mut framed = Vec::new();
        for _ in 0..2 {
            framed.extend((text.len() as u32).to_be_bytes());
            framed.extend((block.len() as u32).to_be_bytes());
            framed.extend(&block);
        }
        assert_eq!(decompress(Compression::LZ4, &framed, 1 << 20).unwrap(), text.repeat(2));
    }

    #[test]
    fn a_page_is_no_larger_than_cells_within_the_limit_make_it() {
        use std::io::Write;

        let content = vec![0u8; usize::try_from(MAX_DOCUMENT + BESIDE_VALUES + 1).unwrap()];
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&content).unwrap();
        let packed = packed.finish().unwrap();
        let codec = Compression::GZIP(Default::default());
        let unpacker = |limit| Unpacker { codec, limit, column: "meta.text".to_owned() };
        // Two values may have as much, and one may not, whatever the file states.
        assert_eq!(unpacker(MAX_PAGE).decompressed(&packed, 2).unwrap().len(), content.len());
        let error = unpacker(MAX_PAGE).decompressed(&packed, 1).unwrap_err().to_string();
        assert!(error.contains("column \"meta.text\" has a cell of more than 67108864 bytes"), "{error}");
        let error = unpacker(1 << 20).decompressed(&packed, 1).unwrap_err().to_string();
        assert!(error.contains("a gzip page is larger than the file states"), "{error}");
        // The values of a page of the second version follow its levels.
        let page = Bytes::from([&b"level"[..], &packed].concat());
        assert!(unpacker(MAX_PAGE).behind_levels(&page, 5, 1).is_err());
        assert_eq!(unpacker(MAX_PAGE).behind_levels(&page, 5, 2).unwrap().len(), 5 + content.len());
    }

    #[test]
    fn a_page_is_no_larger_than_the_file_states() {
        let zstd = ruzstd::encoding::compress_to_vec(
            &vec![0u8; 100_000][..],
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        assert_eq!(decompress(Compression::ZSTD(Default::default()), &zstd, 100_000).unwrap().len(), 100_000);
        let message =
            decompress(Compression::ZSTD(Default::default()), &zstd, 99_999).unwrap_err().to_string();
        assert!(message.contains("larger than the file states"), "{message}");
        let lz4 = lz4_flex::block::compress(&vec![0u8; 100_000]);
        assert!(decompress(Compression::LZ4_RAW, &lz4, 99_999).is_err());
        assert!(decompress(Compression::LZO, b"x", 9).unwrap_err().to_string().contains("LZO"));
    }
}
