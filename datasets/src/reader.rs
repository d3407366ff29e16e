//! Reads records of one file: decompresses it, cuts it at a delimiter, and holds one record in memory.

use crate::error::{Error, Result};
use crate::files::{IS_LFS_POINTER, LFS_POINTER};
use crate::panics::caught;
use bzip2::bufread::BzDecoder;
use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::FrameDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::Utf8Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes asked for at a time.
const CHUNK: u64 = 1 << 16;

/// The largest window of a Zstandard frame, or dictionary of an xz block, that is decoded: 128 MiB, as in Zstandard's
/// reference decoder.
const MAX_WINDOW: u64 = 1 << 27;

/// The memory that an xz decoder needs besides the dictionary, in KiB.
const XZ_EXTRA: u32 = 1 << 10;

/// The compression of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
    Bzip2,
    Xz,
}

impl Packing {
    /// Splits the name of `path` into the extension of its content, in lower case, and its packing.
    pub(crate) fn of(path: &Path) -> (String, Packing) {
        let extension = |path: &Path| {
            path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
        };
        let outer = extension(path);
        let packing = match &outer[..] {
            "gz" => Packing::Gzip,
            "zst" => Packing::Zstd,
            "bz2" => Packing::Bzip2,
            "xz" => Packing::Xz,
            _ => return (outer, Packing::Plain),
        };
        (extension(&path.with_extension("")), packing)
    }

    /// Returns how names of such files end.
    fn ending(self) -> &'static str {
        match self {
            Packing::Plain => "",
            Packing::Gzip => ".gz",
            Packing::Zstd => ".zst",
            Packing::Bzip2 => ".bz2",
            Packing::Xz => ".xz",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Packing::Plain => "plain",
            Packing::Gzip => "gzip",
            Packing::Zstd => "zstd",
            Packing::Bzip2 => "bzip2",
            Packing::Xz => "xz",
        }
    }
}

/// Opens the content of a file, decompressed. `bytes_read` counts the bytes taken from the file itself.
pub(crate) fn content(
    path: &Path,
    packing: Packing,
    bytes_read: Arc<AtomicU64>,
) -> Result<Box<dyn Read + Send>> {
    // A pipe would block, and a device need not end.
    if !path.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::NotAFile { path: path.to_path_buf() });
    }
    let file = File::open(path).map_err(Error::io(path))?;
    let mut file = BufReader::new(Counted { file, bytes_read });
    check_start(path, file.fill_buf().map_err(Error::io(path))?, packing.ending())?;
    // Some decoders read the header at once.
    let decoder = caught(move || -> Box<dyn Read + Send> {
        match packing {
            Packing::Plain => Box::new(file),
            Packing::Gzip => Box::new(Members::<_, GzDecoder<_>>::new(file)),
            Packing::Zstd => Box::new(ZstdReader::new(file)),
            Packing::Bzip2 => Box::new(Members::<_, BzDecoder<_>>::new(file)),
            Packing::Xz => {
                let limit = u32::try_from(MAX_WINDOW >> 10).unwrap_or(u32::MAX);
                Box::new(XzReader::new_mem_limit(file, true, limit.saturating_add(XZ_EXTRA)))
            }
        }
    });
    match decoder {
        Some(file) if packing == Packing::Plain => Ok(file),
        Some(decoder) => Ok(Box::new(Guarded(Some(decoder)))),
        None => {
            let (path, format) = (path.to_path_buf(), packing.name());
            Err(Error::Compressed { path, format, cause: decoder_failed() })
        }
    }
}

/// A decoder of another crate, whose panics become errors. It is gone after one.
struct Guarded(Option<Box<dyn Read + Send>>);

impl Read for Guarded {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(decoder) = &mut self.0 else { return Err(decoder_failed()) };
        match caught(|| decoder.read(buf)) {
            Some(read) => read,
            None => {
                self.0 = None;
                Err(decoder_failed())
            }
        }
    }
}

fn decoder_failed() -> io::Error {
    io::Error::other("the decoder fails on it")
}

/// The content of a file, cut into texts; made by [`SourceFile::records`](crate::corpus::SourceFile::records).
pub struct Records {
    reader: Box<dyn Read + Send>,
    path: PathBuf,
    packing: Packing,
    /// Ends a record; empty: the whole file is one.
    delimiter: Vec<u8>,
    what: &'static str,
    limit: u64,
    buffer: Vec<u8>,
    /// The start of the next record in `buffer`.
    begin: usize,
    /// Its start in the content of the file.
    offset: u64,
    at_end: bool,
    /// Delimiters found.
    delimiters: u64,
    /// Records handed out.
    count: u64,
}

impl Records {
    /// Opens `path`. A record of more than `limit` bytes is an error that calls it a `what`. `bytes_read` counts the
    /// bytes taken from the file itself.
    pub(crate) fn open(
        path: &Path,
        packing: Packing,
        delimiter: &str,
        (what, limit): (&'static str, u64),
        bytes_read: Arc<AtomicU64>,
    ) -> Result<Records> {
        let reader = content(path, packing, bytes_read)?;
        let (path, delimiter) = (path.to_path_buf(), delimiter.as_bytes().to_vec());
        Ok(Records {
            reader,
            path,
            packing,
            delimiter,
            what,
            limit,
            buffer: Vec::new(),
            begin: 0,
            offset: 0,
            at_end: false,
            delimiters: 0,
            count: 0,
        })
    }

    /// Returns how many records were handed out.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns how many delimiters were found.
    pub fn delimiters(&self) -> u64 {
        self.delimiters
    }

    /// Returns the first byte of the content that is neither whitespace nor part of a byte-order mark, among those
    /// that come with the first read.
    pub(crate) fn peek(&mut self) -> Result<Option<u8>> {
        self.fill()?;
        Ok(self.buffer.iter().copied().find(|byte| byte.is_ascii() && !byte.is_ascii_whitespace()))
    }

    /// Reads on until more than `count` bytes are held, or the content ends.
    pub(crate) fn hold(&mut self, count: usize) -> Result<()> {
        while self.held().len() <= count && !self.at_end {
            self.fill()?;
        }
        Ok(())
    }

    /// Returns the bytes that were read and not taken.
    pub(crate) fn held(&self) -> &[u8] {
        &self.buffer[self.begin..]
    }

    /// Takes the first `count` of the bytes that are held.
    pub(crate) fn skip(&mut self, count: usize) {
        self.begin += count;
        self.offset += count as u64;
    }

    /// Makes the error for bytes that are held and not UTF-8.
    pub(crate) fn not_utf8(&self, cause: Utf8Error) -> Error {
        Error::NotUtf8 { path: self.path.clone(), offset: self.offset + cause.valid_up_to() as u64 }
    }

    /// Reads the next record as text, without its delimiter and without a byte-order mark, which joined files have in their
    /// middle too.
    ///
    /// # Errors
    /// The file cannot be read or decompressed, is not UTF-8, or the record is too long.
    #[expect(
        clippy::should_implement_trait,
        reason = "a failure is not an item: the rest of the file is unknown"
    )]
    pub fn next(&mut self) -> Result<Option<String>> {
        let mut searched = 0;
        let length = loop {
            let ahead = &self.buffer[self.begin..];
            if let Some(at) = find(&ahead[searched..], &self.delimiter) {
                self.delimiters += 1;
                break searched + at;
            }
            if self.at_end {
                break ahead.len();
            }
            if ahead.len() as u64 > self.limit {
                return Err(self.too_large());
            }
            searched = (ahead.len() + 1).saturating_sub(self.delimiter.len().max(1));
            self.fill()?;
        };
        if length as u64 > self.limit {
            return Err(self.too_large());
        }
        let ahead = &self.buffer[self.begin..];
        if self.at_end && ahead.is_empty() {
            return Ok(None);
        }
        let mut text = str::from_utf8(&ahead[..length]).map_err(|cause| self.not_utf8(cause))?.to_string();
        let taken = (length + self.delimiter.len()).min(ahead.len());
        self.skip(taken);
        self.count += 1;
        if text.starts_with('\u{FEFF}') {
            text.remove(0);
        }
        Ok(Some(text))
    }

    fn fill(&mut self) -> Result<()> {
        self.buffer.drain(..self.begin);
        self.begin = 0;
        let read = (&mut self.reader).take(CHUNK).read_to_end(&mut self.buffer).map_err(|cause| {
            let path = self.path.clone();
            let too_large = cause.get_ref().and_then(|inner| inner.downcast_ref::<WindowTooLarge>());
            match (self.packing, too_large) {
                (Packing::Plain, _) => Error::Io { path, cause },
                (Packing::Zstd, Some(_)) => Error::Window {
                    path,
                    format: "zstd",
                    limit: MAX_WINDOW,
                    advice: "zstd -d -M2048MB -c OLD.zst | zstd -c > NEW.zst",
                },
                (Packing::Xz, _) if cause.kind() == io::ErrorKind::OutOfMemory => Error::Window {
                    path,
                    format: "xz",
                    limit: MAX_WINDOW,
                    advice: "xz -dc OLD.xz | xz -c > NEW.xz",
                },
                (packing, _) => {
                    // The outer errors repeat the innermost one.
                    let cause = io::Error::new(cause.kind(), innermost(&cause));
                    Error::Compressed { path, format: packing.name(), cause }
                }
            }
        })?;
        self.at_end |= read == 0;
        Ok(())
    }

    fn too_large(&self) -> Error {
        Error::TooLarge { path: self.path.clone(), what: self.what, limit: self.limit }
    }
}

/// Finds the start of `needle` in `bytes`.
fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, rest) = needle.split_first()?;
    let mut at = 0;
    loop {
        at += bytes[at..].iter().position(|&byte| byte == first)?;
        if bytes[at + 1..].starts_with(rest) {
            return Some(at);
        }
        at += 1;
    }
}

struct Counted {
    file: File,
    bytes_read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buf)?;
        self.bytes_read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Refuses a file that is compressed in another way than its name says, or that is in another encoding. `start` is its
/// start, and `ending` the end of its name that says what it holds: `.gz` or another packing, `.parquet`, or nothing.
pub(crate) fn check_start(path: &Path, start: &[u8], ending: &str) -> Result<()> {
    const UTF16: &str = "convert it (iconv -f UTF-16 -t UTF-8)";
    const UTF32: &str = "convert it (iconv -f UTF-32 -t UTF-8)";
    const UNPACK: &str = "unpack it";
    /// The place of the bytes that a kind of file has, the bytes, what it is, the ending of its name, and what helps
    /// where files of that kind are not read.
    const KNOWN: [(usize, &[u8], &str, &str, &str); 17] = [
        (0, b"\x1f\x8b\x08", "gzip data", ".gz", ""),
        (0, b"\x28\xb5\x2f\xfd", "Zstandard data", ".zst", ""),
        // After "BZh" and the level.
        (4, b"1AY&SY", "bzip2 data", ".bz2", ""),
        (0, b"\xfd7zXZ\0", "xz data", ".xz", ""),
        (0, b"PAR1\x15", "Parquet data", ".parquet", ""),
        (0, b"\x5d\0\0", "LZMA data", "", "unpack it (unlzma OLD.lzma)"),
        (0, b"LZIP", "lzip data", "", UNPACK),
        (0, b"\x04\x22\x4d\x18", "LZ4 data", "", "unpack it (lz4 -dc OLD.lz4 > NEW)"),
        (0, b"\x1f\x9d", "data of compress", "", UNPACK),
        (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "", UNPACK),
        (0, b"Rar!\x1a\x07", "a RAR archive", "", UNPACK),
        (0, b"PK\x03\x04", "a ZIP archive", "", UNPACK),
        (0, b"%PDF-", "a PDF document", "", "extract its text (pdftotext)"),
        // Before UTF-16, whose mark is the start of this one.
        (0, b"\xff\xfe\0\0", "text in UTF-32", "", UTF32),
        (0, b"\0\0\xfe\xff", "text in UTF-32", "", UTF32),
        (0, b"\xff\xfe", "text in UTF-16", "", UTF16),
        (0, b"\xfe\xff", "text in UTF-16", "", UTF16),
    ];
    if start.starts_with(LFS_POINTER) {
        let (what, help) = IS_LFS_POINTER;
        return Err(Error::file(path, what, help));
    }
    let is = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|bytes| bytes.starts_with(magic));
    match KNOWN.iter().find(|(at, magic, ..)| is(*at, magic)) {
        Some(&(.., own, "")) if own == ending => Ok(()),
        Some(&(.., what, own, "")) => {
            Err(Error::file(path, format!("it holds {what}"), format!("end its name in {own}")))
        }
        Some(&(.., what, _, help)) => Err(Error::file(path, format!("it holds {what}"), help)),
        None if ending != ".parquet" && !ending.is_empty() && is_text(start) => Err(Error::file(
            path,
            "it holds text that is not compressed",
            format!("take {ending} off its name"),
        )),
        None => Ok(()),
    }
}

/// Returns whether the first bytes of a file are those of a text in UTF-8.
fn is_text(start: &[u8]) -> bool {
    /// A shorter one may be the start of a compressed file.
    const LEAST: usize = 10;
    let start = &start[..start.len().min(512)];
    let is_control = |byte: &u8| byte.is_ascii_control() && !byte.is_ascii_whitespace();
    // A character may go on behind the first bytes.
    let is_utf8 = str::from_utf8(start).map_or_else(|cause| cause.error_len().is_none(), |_| true);
    start.len() >= LEAST && is_utf8 && !start.iter().any(is_control)
}

/// Returns the text of the error that caused all others.
fn innermost(error: &io::Error) -> String {
    let mut inner: &dyn std::error::Error = error;
    while let Some(cause) = inner.source() {
        inner = cause;
    }
    inner.to_string()
}

/// A decoder of one member of a compressed file.
trait Member<R>: Read {
    /// Starts at the member's first byte.
    fn start(source: R) -> Self;
    /// Returns the source, behind the member.
    fn into_source(self) -> R;
}

impl<R: BufRead> Member<R> for GzDecoder<R> {
    fn start(source: R) -> Self {
        GzDecoder::new(source)
    }

    fn into_source(self) -> R {
        self.into_inner()
    }
}

impl<R: BufRead> Member<R> for BzDecoder<R> {
    fn start(source: R) -> Self {
        BzDecoder::new(source)
    }

    fn into_source(self) -> R {
        self.into_inner()
    }
}

/// Decodes the members of a file one after the other. Zeros may follow the last one, as from a tape.
struct Members<R, D> {
    member: Option<D>,
    /// True if a whole member was read, and nothing of the one after it.
    between: bool,
    source: PhantomData<R>,
}

impl<R: BufRead, D: Member<R>> Members<R, D> {
    fn new(source: R) -> Members<R, D> {
        Members { member: Some(D::start(source)), between: false, source: PhantomData }
    }
}

impl<R: BufRead, D: Member<R>> Read for Members<R, D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        while let Some(member) = &mut self.member {
            let read = match member.read(buf) {
                Err(cause) if self.between => return Err(behind_the_end(cause)),
                read => read?,
            };
            self.between &= read == 0;
            if read > 0 {
                return Ok(read);
            }
            let Some(mut source) = self.member.take().map(D::into_source) else { break };
            if skip_zeros(&mut source)? {
                (self.member, self.between) = (Some(D::start(source)), true);
            }
        }
        Ok(0)
    }
}

/// Makes the error for data behind the last member of a file.
fn behind_the_end(cause: io::Error) -> io::Error {
    io::Error::new(cause.kind(), format!("other data follow its end: {}", innermost(&cause)))
}

/// Skips zeros; false if the file ends behind them.
fn skip_zeros(source: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let bytes = source.fill_buf()?;
        if bytes.is_empty() {
            return Ok(false);
        }
        let (zeros, all) = (bytes.iter().take_while(|&&byte| byte == 0).count(), bytes.len());
        source.consume(zeros);
        if zeros < all {
            return Ok(true);
        }
    }
}

/// A Zstandard frame needs more memory than [`MAX_WINDOW`].
#[derive(Debug, thiserror::Error)]
#[error("the window is too large")]
struct WindowTooLarge;

/// Decodes a sequence of Zstandard frames, checks their checksums, and skips skippable ones.
pub(crate) struct ZstdReader<R> {
    source: R,
    decoder: FrameDecoder,
    started: bool,
}

impl<R: BufRead> ZstdReader<R> {
    pub(crate) fn new(source: R) -> ZstdReader<R> {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW);
        ZstdReader { source, decoder, started: false }
    }

    /// Starts the next frame; false if the file ends here.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            let more = if self.started {
                skip_zeros(&mut self.source)?
            } else {
                !self.source.fill_buf()?.is_empty()
            };
            if !more {
                return if self.started { Ok(false) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            match self.decoder.init(&mut self.source) {
                Ok(()) => {
                    self.started = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    self.started = true;
                }
                Err(FrameDecoderError::WindowSizeTooBig { .. }) => {
                    return Err(io::Error::other(WindowTooLarge));
                }
                Err(cause) if self.started => return Err(behind_the_end(io::Error::other(cause))),
                Err(cause) => return Err(io::Error::other(cause)),
            }
        }
    }
}

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buf);
            }
            if !self.decoder.is_finished() {
                let blocks = ruzstd::decoding::BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, blocks).map_err(io::Error::other)?;
                continue;
            }
            if let Some(stored) = self.decoder.get_checksum_from_data()
                && self.decoder.get_calculated_checksum() != Some(stored)
            {
                return Err(io::Error::other("checksum mismatch"));
            }
            if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn open(content: &[u8], delimiter: &str, limit: u64) -> (tempfile::NamedTempFile, Records) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let records =
            Records::open(file.path(), Packing::Plain, delimiter, ("document", limit), Arc::default())
                .unwrap();
        (file, records)
    }

    fn all(content: &[u8], delimiter: &str) -> Vec<String> {
        let (_file, mut records) = open(content, delimiter, 1 << 20);
        std::iter::from_fn(|| records.next().unwrap()).collect()
    }

    #[test]
    fn records_end_at_the_delimiter() {
        assert_eq!(all(b"a<>b<>", "<>"), ["a", "b"]);
        assert_eq!(all(b"<>a<<>>", "<>"), ["", "a<", ">"]);
        assert_eq!(all(b"a\nb", "\n"), ["a", "b"]);
        assert_eq!(all(b"a\nb", ""), ["a\nb"]);
        assert!(all(b"", "\n").is_empty());
        assert_eq!(all("\u{FEFF}a\n\u{FEFF}b".as_bytes(), "\n"), ["a", "b"]);
    }

    #[test]
    fn a_delimiter_across_two_reads_is_found() {
        for before in CHUNK as usize - 4..=CHUNK as usize + 1 {
            let content = [&vec![b'x'; before], &b"<sep>tail"[..]].concat();
            let records = all(&content, "<sep>");
            assert_eq!((records[0].len(), &records[1][..]), (before, "tail"), "{before}");
        }
    }

    #[test]
    fn a_record_over_the_limit_is_refused() {
        let (_file, mut records) = open(&vec![b'x'; 1 << 18], "\n", 1000);
        assert!(matches!(records.next(), Err(Error::TooLarge { limit: 1000, .. })));
        let (_file, mut records) = open(&[b'x'; 1001], "", 1000);
        assert!(matches!(records.next(), Err(Error::TooLarge { .. })));
        let (_file, mut records) = open(&[b'x'; 1000], "", 1000);
        assert_eq!(records.next().unwrap().unwrap().len(), 1000);
    }

    #[test]
    fn a_file_that_is_not_what_its_name_says_is_named() {
        let pointer = [LFS_POINTER, b"v1\noid sha256:0\nsize 9\n"].concat();
        for (ending, start, wanted) in [
            ("", &b"Once"[..], ""),
            ("", b"", ""),
            (".gz", b"", ""),
            (".gz", b"\x1f\x8b\x08\0", ""),
            // A skippable frame may be the first one.
            (".zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd", ""),
            (".parquet", b"PAR1\x15\0", ""),
            (".parquet", b"PAR1", ""),
            ("", b"\x1f\x8b\x08\0", "it holds gzip data; end its name in .gz"),
            (".gz", b"\x28\xb5\x2f\xfd\0", "it holds Zstandard data; end its name in .zst"),
            (".parquet", b"\x28\xb5\x2f\xfd\0", "it holds Zstandard data; end its name in .zst"),
            (".xz", b"BZh91AY&SY", "it holds bzip2 data; end its name in .bz2"),
            (
                ".gz",
                "Once upon a time, é".as_bytes(),
                "it holds text that is not compressed; take .gz off its name",
            ),
            (".gz", b"once a caf\xc3", "it holds text that is not compressed; take .gz off its name"),
            (".gz", b"\xc3\x28", ""),
            ("", b"\x5d\0\0\x80\0", "it holds LZMA data; unpack it (unlzma OLD.lzma)"),
            ("", b"\xff\xfe\0\0a\0\0\0", "it holds text in UTF-32; convert it (iconv -f UTF-32 -t UTF-8)"),
            ("", b"\0\0\xfe\xff\0\0\0a", "it holds text in UTF-32; convert it (iconv -f UTF-32 -t UTF-8)"),
            ("", b"\xff\xfea\0", "it holds text in UTF-16; convert it (iconv -f UTF-16 -t UTF-8)"),
            ("", &pointer, "is a Git LFS pointer and not the file itself; run `git lfs pull`"),
            (".gz", &pointer, "is a Git LFS pointer and not the file itself; run `git lfs pull`"),
            (".parquet", &pointer, "is a Git LFS pointer and not the file itself; run `git lfs pull`"),
        ] {
            let message =
                check_start(Path::new("f"), start, ending).map_or_else(|e| e.to_string(), |()| String::new());
            let wanted = if wanted.is_empty() { String::new() } else { format!("f: {wanted}") };
            assert!(
                message.starts_with(&wanted) && message.is_empty() == wanted.is_empty(),
                "{ending}: {message}"
            );
        }
    }

    #[test]
    fn a_panic_of_a_decoder_is_an_error_that_names_the_file() {
        struct Panics;
        impl Read for Panics {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("a bug of a decoder")
            }
        }
        let (file, mut records) = open(b"", "\n", 1000);
        records.reader = Box::new(Guarded(Some(Box::new(Panics))));
        records.packing = Packing::Gzip;
        for _ in 0..2 {
            let message = records.next().unwrap_err().to_string();
            let wanted = "damaged or truncated gzip data (the decoder fails on it); fetch the file again";
            assert_eq!(message, format!("{}: {wanted}", file.path().display()));
        }
    }

    #[test]
    fn invalid_utf8_is_named_by_its_offset() {
        let (_file, mut records) = open(b"ab\ncd\xffe", "\n", 1000);
        assert_eq!(records.next().unwrap().unwrap(), "ab");
        assert!(matches!(records.next(), Err(Error::NotUtf8 { offset: 5, .. })));
    }
}
