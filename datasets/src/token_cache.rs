//! The file of a token cache: header, document starts, ids.
//!
//! ```text
//! offset  size  what
//!      0     8  magic "DSMOETOK"
//!      8     4  format version
//!     12     4  bytes per id: 2 or 4
//!     16     8  number of ids
//!     24     8  number of documents
//!     32    32  SHA-256 of everything after the header
//!     64        document starts, 8 bytes each; then the ids
//! ```
//! All numbers are little-endian. A file is written under a temporary name and renamed, and read only if its length
//! is exactly what the header says and the hash agrees.

use crate::tokens::TokenStream;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

/// Version of the file format and of the rules by which the ids in it were made.
pub const FORMAT_VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"DSMOETOK";
const HEADER: usize = 64;

/// Reads a token cache.
///
/// # Errors
/// A file that cannot be read, or is not a whole, consistent cache of this version. Nothing is allocated by a size
/// that the length of the file does not bear out.
pub fn read(path: &Path) -> Result<TokenStream> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let length = file.metadata().map_err(Error::io(path))?.len();
    let invalid = |reason: &str| Error::Cache { path: path.to_path_buf(), reason: reason.to_string() };

    let mut header = [0u8; HEADER];
    file.read_exact(&mut header).map_err(|cause| match cause.kind() {
        io::ErrorKind::UnexpectedEof => invalid("shorter than its header"),
        _ => Error::Io { path: path.to_path_buf(), cause },
    })?;
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if &header[..8] != MAGIC {
        return Err(invalid("wrong magic"));
    }
    if u32_at(8) != FORMAT_VERSION {
        return Err(invalid(&format!("format version {}, this program reads {FORMAT_VERSION}", u32_at(8))));
    }
    let (width, count, docs) = (u32_at(12), u64_at(16), u64_at(24));
    if width != 2 && width != 4 {
        return Err(invalid(&format!("{width} bytes per id")));
    }
    let payload =
        docs.checked_mul(8).zip(count.checked_mul(u64::from(width))).and_then(|(a, b)| a.checked_add(b));
    if payload.and_then(|bytes| bytes.checked_add(HEADER as u64)) != Some(length) {
        return Err(invalid(&format!(
            "{count} ids in {docs} documents do not make a file of {length} bytes"
        )));
    }
    let payload =
        payload.and_then(|bytes| usize::try_from(bytes).ok()).ok_or_else(|| invalid("too large"))?;

    let mut bytes = Vec::new();
    bytes.try_reserve_exact(payload).map_err(|_| invalid("does not fit in memory"))?;
    file.take(payload as u64).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() != payload || Sha256::digest(&bytes)[..] != header[32..64] {
        return Err(invalid("its content does not match its hash"));
    }
    let (starts, ids) = bytes.split_at(docs as usize * 8);
    let doc_starts: Vec<usize> =
        starts.as_chunks().0.iter().map(|&b| u64::from_le_bytes(b) as usize).collect();
    let ids: Vec<u32> = match width {
        2 => ids.as_chunks().0.iter().map(|&b| u32::from(u16::from_le_bytes(b))).collect(),
        _ => ids.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect(),
    };
    let ascending = doc_starts.windows(2).all(|pair| pair[0] < pair[1]);
    let inside = doc_starts.last().is_none_or(|&last| last < ids.len());
    if !ascending || !inside || doc_starts.first().copied() != (!ids.is_empty()).then_some(0) {
        return Err(invalid("its document starts are not ascending from 0"));
    }
    Ok(TokenStream { ids, doc_starts })
}

/// Writes `stream` to `path` so that a reader sees either nothing or all of it. Makes the directory if need be.
pub fn write(path: &Path, stream: &TokenStream) -> Result<()> {
    let narrow = stream.ids.iter().all(|&id| id <= u32::from(u16::MAX));
    let mut payload =
        Vec::with_capacity(stream.doc_starts.len() * 8 + stream.ids.len() * if narrow { 2 } else { 4 });
    payload.extend(stream.doc_starts.iter().flat_map(|&start| (start as u64).to_le_bytes()));
    match narrow {
        true => payload.extend(stream.ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
        false => payload.extend(stream.ids.iter().flat_map(|&id| id.to_le_bytes())),
    }
    let mut header = Vec::with_capacity(HEADER);
    header.extend(MAGIC);
    header.extend(FORMAT_VERSION.to_le_bytes());
    header.extend(if narrow { 2u32 } else { 4 }.to_le_bytes());
    header.extend((stream.ids.len() as u64).to_le_bytes());
    header.extend((stream.doc_starts.len() as u64).to_le_bytes());
    header.extend(Sha256::digest(&payload));

    let dir = path.parent().unwrap_or(Path::new("."));
    let save = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(&header)?;
        file.write_all(&payload)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(dir)?.sync_all()
    };
    save().map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream() -> TokenStream {
        TokenStream { ids: vec![1, 70_000, 3, 1, 5], doc_starts: vec![0, 3] }
    }

    fn written(stream: &TokenStream) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/cache");
        write(&path, stream).unwrap();
        fs::read(path).unwrap()
    }

    fn read_bytes(bytes: &[u8]) -> Result<TokenStream> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read(file.path())
    }

    #[test]
    fn what_is_written_is_read() {
        let narrow = TokenStream { ids: vec![65_535, 0], doc_starts: vec![0, 1] };
        for stream in [stream(), narrow, TokenStream { ids: vec![], doc_starts: vec![] }] {
            assert_eq!(read_bytes(&written(&stream)).unwrap(), stream);
        }
        assert_eq!(written(&TokenStream { ids: vec![7], doc_starts: vec![0] }).len(), 64 + 8 + 2);
    }

    #[test]
    fn every_damage_is_found() {
        let good = written(&stream());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(read_bytes(&bad).is_err(), "byte {at} changed");
            assert!(read_bytes(&good[..at]).is_err(), "cut at byte {at}");
        }
        assert!(read_bytes(&[good.as_slice(), &[0]].concat()).is_err(), "a byte too many");
    }

    #[test]
    fn absurd_sizes_are_refused_without_allocating() {
        let mut bad = written(&stream());
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
            assert!(matches!(read_bytes(&written(&lying)), Err(Error::Cache { .. })), "{lying:?}");
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
            let header = [&MAGIC[..], &1u32.to_le_bytes(), &width.to_le_bytes(), &count.to_le_bytes(), &docs.to_le_bytes(), &hash];
            if let Ok(stream) = read_bytes(&[&header.concat()[..], &payload].concat()) {
                prop_assert_eq!(stream.ids.len() as u64, count);
                prop_assert_eq!(stream.doc_starts.len() as u64, docs);
            }
        }
    }
}
