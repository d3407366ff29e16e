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

use crate::reader::ZstdReader;

/// The largest page, in bytes of its content; a length in the format is no larger.
const MAX_PAGE: u64 = i32::MAX as u64;

/// How far LZ4 can compress.
const LZ4_RATIO: usize = 255;

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
        Ok(Box::new(Pages { packed: open(&plain)?, codec, limit }))
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
    codec: Compression,
    /// The bytes of all pages together, as the file states them.
    limit: u64,
}

impl Pages {
    fn unpack(&self, mut page: Page) -> Result<Page> {
        match &mut page {
            Page::DictionaryPage { buf, .. } | Page::DataPage { buf, .. } => {
                *buf = decompress(self.codec, buf, self.limit)?.into();
            }
            Page::DataPageV2 { is_compressed: false, .. } => {}
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, .. } => {
                let levels = u64::from(*def_levels_byte_len) + u64::from(*rep_levels_byte_len);
                *buf = self.behind_levels(buf, usize::try_from(levels)?)?;
            }
        }
        Ok(page)
    }

    /// Decompresses what follows the levels of a page, which are never compressed.
    fn behind_levels(&self, buf: &Bytes, levels: usize) -> Result<Bytes> {
        let Some((levels, values)) = buf.split_at_checked(levels) else {
            return Err(ParquetError::General("the levels are longer than the page".into()));
        };
        let mut unpacked = levels.to_vec();
        if !values.is_empty() {
            unpacked.extend(decompress(self.codec, values, self.limit)?);
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
        self.packed.get_next_page()?.map(|page| self.unpack(page)).transpose()
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

fn all(decoder: impl Read, name: &str, limit: u64) -> Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    let read = decoder.take(limit + 1).read_to_end(&mut unpacked);
    match read {
        Ok(read) if read as u64 <= limit => Ok(unpacked),
        Ok(_) => Err(ParquetError::General(format!("a {name} page is larger than the file states"))),
        Err(cause) => Err(damaged(name, &cause)),
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
