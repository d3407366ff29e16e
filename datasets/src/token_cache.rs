//! The file of a token cache, and its writer.
//!
//! ```text
//! offset  size  what
//!      0     8  magic "DSMOETOK"
//!      8     4  format version
//!     12     4  bytes per id: 2 or 4
//!     16     8  number of ids
//!     24     8  number of documents
//!     32    32  SHA-256 of everything after the header
//!     64        the ids; then the document starts, 8 bytes each
//! ```
//! All numbers are little-endian. A file is opened only if its length is exactly what the header says and the hash
//! agrees. Its ids are read by position: the system keeps those in use in memory, as with a mapped file, but a file
//! that is cut while it is read gives an error instead of ending the process.
//!
//! While it is written, a cache is a directory `KEY.part`: the ids, the document starts, and a cursor that says up to
//! which document both are on the disk. After a kill the next writer resumes there. The directory is locked.

use crate::corpus::Position;
use crate::error::{Error, Result};
use crate::files::{lock_dir, open_regular, read_regular, replace, sync_dir};
use crate::stream::TokenStream;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Version of the file format and of the rules by which the ids in it were made.
pub const FORMAT_VERSION: u32 = 3;

const MAGIC: &[u8; 8] = b"DSMOETOK";
const HEADER: usize = 64;
/// Bytes read or written at a time.
const CHUNK: usize = 1 << 18;

const IDS_FILE: &str = "ids";
const STARTS_FILE: &str = "starts";
const CURSOR_FILE: &str = "cursor.json";
/// The largest cursor, in bytes.
const MAX_CURSOR: u64 = 1 << 16;

/// A complete token cache.
#[derive(Debug)]
pub struct TokenFile {
    file: Positioned,
    path: PathBuf,
    width: usize,
    len: usize,
    doc_starts: Vec<usize>,
    max_id: u32,
}

impl TokenFile {
    /// Opens a token cache and checks all of it.
    ///
    /// # Errors
    /// A file that cannot be read, or is not a whole, consistent cache of this version. Nothing is allocated by a size
    /// that the length of the file does not bear out.
    pub fn open(path: &Path) -> Result<TokenFile> {
        let mut file = open_regular(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let invalid = |reason: &str| Error::Cache { path: path.to_path_buf(), reason: reason.to_string() };

        let mut header = [0u8; HEADER];
        file.read_exact(&mut header).map_err(|cause| match cause.kind() {
            io::ErrorKind::UnexpectedEof => invalid("shorter than its header"),
            _ => Error::Io { path: path.to_path_buf(), cause },
        })?;
        let u32_at =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if &header[..8] != MAGIC {
            return Err(invalid("wrong magic"));
        }
        if u32_at(8) != FORMAT_VERSION {
            return Err(invalid(&format!(
                "format version {}, this program reads {FORMAT_VERSION}",
                u32_at(8)
            )));
        }
        let (width, count, docs) = (u32_at(12), u64_at(16), u64_at(24));
        if width != 2 && width != 4 {
            return Err(invalid(&format!("{width} bytes per id")));
        }
        let id_bytes = count.checked_mul(u64::from(width));
        let payload = docs.checked_mul(8).zip(id_bytes).and_then(|(a, b)| a.checked_add(b));
        if payload.and_then(|bytes| bytes.checked_add(HEADER as u64)) != Some(length) {
            return Err(invalid(&format!(
                "{count} ids in {docs} documents do not make a file of {length} bytes"
            )));
        }
        let len = usize::try_from(count).map_err(|_| invalid("too large"))?;

        let (mut hasher, mut buffer, mut max_id) = (Sha256::new(), vec![0; CHUNK], 0);
        let mut left = id_bytes.unwrap_or(0);
        while left > 0 {
            let bytes = &mut buffer[..left.min(CHUNK as u64) as usize];
            file.read_exact(bytes).map_err(Error::io(path))?;
            hasher.update(&*bytes);
            max_id = max_id.max(decode(bytes, width as usize).max().unwrap_or(0));
            left -= bytes.len() as u64;
        }
        let mut starts = Vec::new();
        file.read_to_end(&mut starts).map_err(Error::io(path))?;
        hasher.update(&starts);
        if starts.len() as u64 != docs * 8 || hasher.finalize()[..] != header[32..64] {
            return Err(invalid("its content does not match its hash"));
        }
        let doc_starts: Vec<usize> =
            starts.as_chunks().0.iter().map(|&b| u64::from_le_bytes(b) as usize).collect();
        let ascending = doc_starts.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = doc_starts.last().is_none_or(|&last| last < len);
        if !ascending || !inside || doc_starts.first().copied() != (len > 0).then_some(0) {
            return Err(invalid("its document starts are not ascending from 0"));
        }
        let (file, path) = (Positioned::new(file), path.to_path_buf());
        Ok(TokenFile { file, path, width: width as usize, len, doc_starts, max_id })
    }

    /// Returns the number of ids.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if there is no id.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the start of each document: ascending, from 0.
    pub fn doc_starts(&self) -> &[usize] {
        &self.doc_starts
    }

    /// Returns the largest id; 0 if there is none.
    pub fn max_id(&self) -> u32 {
        self.max_id
    }

    /// Appends the ids `range` to `out`.
    ///
    /// # Errors
    /// The file cannot be read any more.
    ///
    /// # Panics
    /// A range that ends after [`TokenFile::len`].
    pub fn read(&self, range: Range<usize>, out: &mut Vec<u32>) -> Result<()> {
        assert!(range.end <= self.len, "ids {range:?} of {}", self.len);
        let mut buffer = vec![0; (range.len() * self.width).min(CHUNK)];
        let (mut at, end) = (range.start * self.width, range.end * self.width);
        out.reserve(range.len());
        while at < end {
            let bytes = &mut buffer[..(end - at).min(CHUNK)];
            self.file.read((HEADER + at) as u64, bytes).map_err(Error::io(&self.path))?;
            out.extend(decode(bytes, self.width));
            at += bytes.len();
        }
        Ok(())
    }

    /// Reads all of it into memory.
    ///
    /// # Errors
    /// The file cannot be read any more.
    pub fn into_stream(self) -> Result<TokenStream> {
        let mut ids = Vec::new();
        self.read(0..self.len, &mut ids)?;
        Ok(TokenStream { ids, doc_starts: self.doc_starts })
    }
}

fn decode(bytes: &[u8], width: usize) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(width).map(move |id| match *id {
        [a, b] => u32::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    })
}

/// A file that threads read at places of their own.
#[derive(Debug)]
struct Positioned {
    #[cfg(unix)]
    file: File,
    #[cfg(not(unix))]
    file: std::sync::Mutex<File>,
}

#[cfg(unix)]
impl Positioned {
    fn new(file: File) -> Positioned {
        Positioned { file }
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, at)
    }
}

#[cfg(not(unix))]
impl Positioned {
    fn new(file: File) -> Positioned {
        Positioned { file: std::sync::Mutex::new(file) }
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(bytes)
    }
}

/// Returns whether `path` is the directory of a cache that a writer has left unfinished: one with its name, that no process
/// holds.
pub fn is_unfinished(path: &Path) -> bool {
    let key = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let is_key = key.len() == 64 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_key && path.extension().is_some_and(|extension| extension == "part") && {
        let is_dir = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
        is_dir && matches!(lock_dir(path), Ok(Some(_)))
    }
}

/// Removes what a writer has left that was killed after its cache was in place, unless a process holds it. A failure changes
/// nothing: the cache beside it is whole.
pub(crate) fn remove_leftover(part: &Path) {
    if let Ok(Some(_lock)) = lock_dir(part) {
        let _ = fs::remove_dir_all(part);
    }
}

/// The part of an unfinished cache that is on the disk.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cursor {
    position: Position,
    ids: u64,
    documents: u64,
}

/// Writes a token cache.
pub(crate) struct Writer {
    dir: PathBuf,
    width: usize,
    ids: BufWriter<File>,
    starts: BufWriter<File>,
    cursor: Cursor,
    /// Held while the directory is in use.
    _lock: Option<File>,
}

impl Writer {
    /// Continues the cache in `dir`, or starts it. Ids below `vocab_size` can be pushed.
    ///
    /// # Errors
    /// Another process writes it, or the file system refuses.
    pub(crate) fn open(dir: &Path, vocab_size: usize) -> Result<Writer> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let lock = lock_dir(dir).map_err(|cause| match cause.kind() {
            io::ErrorKind::WouldBlock => Error::CacheBusy { path: dir.to_path_buf() },
            _ => Error::io(dir)(cause),
        })?;
        let width: u64 = if vocab_size <= 1 << 16 { 2 } else { 4 };
        let file = |name: &str| {
            let path = dir.join(name);
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            file.map_err(Error::io(&path))
        };
        let (ids, starts) = (file(IDS_FILE)?, file(STARTS_FILE)?);
        let cursor = read_regular(&dir.join(CURSOR_FILE), MAX_CURSOR).ok();
        let cursor: Cursor = cursor.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let length = |file: &File| file.metadata().map(|metadata| metadata.len());
        let ids_end = cursor.ids.saturating_mul(width).saturating_add(HEADER as u64);
        let starts_end = cursor.documents.saturating_mul(8);
        let whole = length(&ids).map_err(Error::io(dir))? >= ids_end
            && length(&starts).map_err(Error::io(dir))? >= starts_end;
        let cursor = if whole { cursor } else { Cursor::default() };
        let mut writer = Writer {
            dir: dir.to_path_buf(),
            width: width as usize,
            ids: BufWriter::with_capacity(CHUNK, ids),
            starts: BufWriter::with_capacity(CHUNK, starts),
            cursor,
            _lock: lock,
        };
        writer.rewind().map_err(Error::io(dir))?;
        Ok(writer)
    }

    /// Cuts off what lies behind the cursor.
    fn rewind(&mut self) -> io::Result<()> {
        for (file, end) in [
            (&mut self.ids, HEADER as u64 + self.cursor.ids * self.width as u64),
            (&mut self.starts, self.cursor.documents * 8),
        ] {
            file.get_mut().set_len(end)?;
            file.get_mut().seek(SeekFrom::Start(end))?;
        }
        Ok(())
    }

    /// Returns the place to continue from.
    pub(crate) fn position(&self) -> Position {
        self.cursor.position
    }

    /// Ids so far.
    pub(crate) fn len(&self) -> u64 {
        self.cursor.ids
    }

    /// Appends a document; one without ids is none.
    pub(crate) fn push(&mut self, document: &[u32]) -> Result<()> {
        if document.is_empty() {
            return Ok(());
        }
        let mut write = || -> io::Result<()> {
            self.starts.write_all(&self.cursor.ids.to_le_bytes())?;
            for id in document {
                self.ids.write_all(&id.to_le_bytes()[..self.width])?;
            }
            Ok(())
        };
        write().map_err(Error::io(&self.dir))?;
        self.cursor.documents += 1;
        self.cursor.ids += document.len() as u64;
        Ok(())
    }

    /// Ensures that everything up to `position` is on the disk.
    pub(crate) fn checkpoint(&mut self, position: Position) -> Result<()> {
        self.cursor.position = position;
        let mut save = || -> io::Result<()> {
            for file in [&mut self.ids, &mut self.starts] {
                file.flush()?;
                file.get_ref().sync_data()?;
            }
            replace(&self.dir.join(CURSOR_FILE), |file| Ok(serde_json::to_writer(file, &self.cursor)?))
        };
        save().map_err(Error::io(&self.dir))
    }

    /// Puts the whole cache at `path` and removes the directory.
    pub(crate) fn finish(mut self, path: &Path) -> Result<()> {
        let mut save = || -> io::Result<()> {
            self.ids.flush()?;
            self.starts.flush()?;
            let (ids, starts) = (self.ids.get_mut(), self.starts.get_mut());
            starts.seek(SeekFrom::Start(0))?;
            io::copy(starts, ids)?;
            ids.seek(SeekFrom::Start(HEADER as u64))?;
            let (mut hasher, mut buffer) = (Sha256::new(), vec![0; CHUNK]);
            loop {
                let read = ids.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                hasher.update(&buffer[..read]);
            }
            let mut header = Vec::with_capacity(HEADER);
            header.extend(MAGIC);
            header.extend(FORMAT_VERSION.to_le_bytes());
            header.extend((self.width as u32).to_le_bytes());
            header.extend(self.cursor.ids.to_le_bytes());
            header.extend(self.cursor.documents.to_le_bytes());
            header.extend(hasher.finalize());
            ids.seek(SeekFrom::Start(0))?;
            ids.write_all(&header)?;
            ids.sync_all()?;
            fs::rename(self.dir.join(IDS_FILE), path)?;
            sync_dir(path.parent().unwrap_or(Path::new(".")))?;
            fs::remove_dir_all(&self.dir)
        };
        save().map_err(Error::io(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream() -> TokenStream {
        TokenStream { ids: vec![1, 70_000, 3, 1, 5], doc_starts: vec![0, 3] }
    }

    /// The file of a stream, by the description above.
    fn bytes_of(stream: &TokenStream, width: u32) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.extend(stream.ids.iter().flat_map(|id| id.to_le_bytes()[..width as usize].to_vec()));
        payload.extend(stream.doc_starts.iter().flat_map(|&start| (start as u64).to_le_bytes()));
        let mut bytes = [&MAGIC[..], &FORMAT_VERSION.to_le_bytes(), &width.to_le_bytes()].concat();
        bytes.extend((stream.ids.len() as u64).to_le_bytes());
        bytes.extend((stream.doc_starts.len() as u64).to_le_bytes());
        bytes.extend(Sha256::digest(&payload));
        bytes.extend(payload);
        bytes
    }

    fn open_bytes(bytes: &[u8]) -> Result<TokenFile> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        TokenFile::open(file.path())
    }

    fn read_bytes(bytes: &[u8]) -> Result<TokenStream> {
        open_bytes(bytes)?.into_stream()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let narrow = TokenStream { ids: vec![65_535, 0], doc_starts: vec![0, 1] };
        for (stream, vocab_size, width) in [
            (stream(), 70_001, 4),
            (narrow, 65_536, 2),
            (TokenStream { ids: vec![], doc_starts: vec![] }, 3, 2),
        ] {
            let (part, path) = (dir.path().join("x.part"), dir.path().join("x"));
            let mut writer = Writer::open(&part, vocab_size).unwrap();
            for document in stream.documents() {
                writer.push(document).unwrap();
                writer.push(&[]).unwrap();
            }
            writer.finish(&path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), bytes_of(&stream, width));
            let file = TokenFile::open(&path).unwrap();
            assert_eq!((file.len(), file.doc_starts()), (stream.ids.len(), &stream.doc_starts[..]));
            assert_eq!(file.max_id(), stream.ids.iter().copied().max().unwrap_or(0));
            let mut middle = vec![9];
            file.read(1.min(file.len())..file.len(), &mut middle).unwrap();
            assert_eq!(middle[1..], stream.ids[1.min(stream.ids.len())..]);
            assert_eq!(file.into_stream().unwrap(), stream);
            assert!(!part.exists());
        }
    }

    #[test]
    fn a_writer_goes_on_from_its_last_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let (part, path) = (dir.path().join("x.part"), dir.path().join("x"));
        let position = Position { file: 2, documents: 7 };
        {
            let mut writer = Writer::open(&part, 100).unwrap();
            writer.push(&[1, 2, 3]).unwrap();
            writer.checkpoint(position).unwrap();
            assert!(matches!(Writer::open(&part, 100), Err(Error::CacheBusy { .. })));
            writer.push(&[50, 51]).unwrap();
            writer.ids.flush().unwrap();
        }
        let mut writer = Writer::open(&part, 100).unwrap();
        assert_eq!((writer.position(), writer.len()), (position, 3));
        writer.push(&[4]).unwrap();
        writer.finish(&path).unwrap();
        let expected = TokenStream { ids: vec![1, 2, 3, 4], doc_starts: vec![0, 3] };
        assert_eq!(TokenFile::open(&path).unwrap().into_stream().unwrap(), expected);

        // A cursor that promises more than there is, or is no cursor, starts over.
        let cursor = |ids: u64, documents: u64| {
            let position = Position { file: 1, documents: 1 };
            serde_json::to_string(&Cursor { position, ids, documents }).unwrap()
        };
        let long = cursor(0, 0) + &" ".repeat(MAX_CURSOR as usize);
        for cursor in
            [cursor(999, 1), cursor(u64::MAX, 0), cursor(0, u64::MAX), long, "{".to_owned(), String::new()]
        {
            fs::create_dir_all(&part).unwrap();
            fs::write(part.join(CURSOR_FILE), &cursor).unwrap();
            let writer = Writer::open(&part, 100).unwrap();
            assert_eq!((writer.position(), writer.len()), (Position::default(), 0), "{cursor:.99}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_cache_that_no_process_writes_is_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join(format!("{}.part", "0a".repeat(32)));
        let writer = Writer::open(&part, 100).unwrap();
        assert!(!is_unfinished(&part), "it is held");
        drop(writer);
        assert!(is_unfinished(&part));
        for name in [format!("{}.tokens", "0a".repeat(32)), "x.part".to_owned()] {
            fs::create_dir(dir.path().join(&name)).unwrap();
            assert!(!is_unfinished(&dir.path().join(&name)), "{name}");
        }
        assert!(!is_unfinished(&dir.path().join(format!("{}.part", "0b".repeat(32)))));
    }

    #[test]
    fn every_damage_is_found() {
        let good = bytes_of(&stream(), 4);
        assert!(read_bytes(&good).is_ok());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(read_bytes(&bad).is_err(), "byte {at} changed");
            assert!(read_bytes(&good[..at]).is_err(), "cut at byte {at}");
        }
        assert!(read_bytes(&[good.as_slice(), &[0]].concat()).is_err(), "a byte too many");
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes_of(&stream(), 4)).unwrap();
        let tokens = TokenFile::open(file.path()).unwrap();
        file.as_file().set_len(70).unwrap();
        let message = tokens.read(0..5, &mut Vec::new()).unwrap_err().to_string();
        assert!(message.contains(file.path().to_str().unwrap()), "{message}");
    }

    #[test]
    fn absurd_sizes_are_refused_without_allocating() {
        let mut bad = bytes_of(&stream(), 4);
        bad[16..32].fill(0xff);
        assert!(matches!(read_bytes(&bad), Err(Error::Cache { .. })));
        // 2^61 documents times 8 bytes wraps to 0.
        let ids = (bad.len() as u64 - 64) / 4;
        bad[16..24].copy_from_slice(&ids.to_le_bytes());
        bad[24..32].copy_from_slice(&(1u64 << 61).to_le_bytes());
        assert!(matches!(read_bytes(&bad), Err(Error::Cache { .. })));
    }

    #[test]
    fn lying_document_starts_are_refused() {
        for doc_starts in [vec![0, 9], vec![1], vec![0, 2, 2], vec![], vec![0, 5]] {
            let lying = TokenStream { ids: vec![1, 2, 3, 4, 5], doc_starts };
            assert!(matches!(read_bytes(&bytes_of(&lying, 4)), Err(Error::Cache { .. })), "{lying:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            width in prop_oneof![Just(2u32), Just(4), any::<u32>()],
            count in prop_oneof![0u64..20, any::<u64>()],
            docs in prop_oneof![0u64..5, any::<u64>()],
            hash_it in any::<bool>(),
            payload in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            prop_assert!(read_bytes(&payload).is_err());
            let hash = if hash_it { Sha256::digest(&payload).to_vec() } else { vec![0; 32] };
            let version = FORMAT_VERSION.to_le_bytes();
            let header = [&MAGIC[..], &version, &width.to_le_bytes(), &count.to_le_bytes(), &docs.to_le_bytes(), &hash];
            if let Ok(stream) = read_bytes(&[&header.concat()[..], &payload].concat()) {
                prop_assert_eq!(stream.ids.len() as u64, count);
                prop_assert_eq!(stream.doc_starts.len() as u64, docs);
            }
        }
    }
}
