//! A teacher's most likely tokens on the disk, for later epochs and other runs.
//!
//! ```text
//! DIR/TEACHER-top64-seq256/HASH.rows      one file per micro-batch that had new sequences
//!   magic, sequences, seq, top, bytes of an id        8 + 4 x 4 bytes
//!   per sequence: hash of its token ids, hash of its rows     16 + 16 bytes
//!   hash of all of the above                                  16 bytes, in hexadecimal the name of the file
//!   per sequence: ids [seq, top], log-probabilities in f16 [seq, top + 1]
//! ```
//! A row depends on the teacher and on the tokens of its sequence alone, so sequences are found by their tokens: runs of other
//! students, orders, texts and budgets share them. Files are written under a temporary name and renamed; what fails its hash
//! is removed and computed again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use dsmoe_core::model::TopRows;
use dsmoe_datasets::files::{self as data_files, hex, open_regular};
use half::f16;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files;

const MAGIC: [u8; 8] = *b"DSMOETR1";
const ENDING: &str = ".rows";
/// Bytes of a hash.
const HASH: usize = 16;
/// Bytes before the hashes of sequences.
const HEAD: usize = MAGIC.len() + 4 * size_of::<u32>();
/// Most sequences in a file.
const MOST_SEQUENCES: usize = 1 << 20;
/// Bytes of the files of a teacher after which nothing is added.
pub const LARGEST_CACHE: u64 = 64 << 30;

type Hash = [u8; HASH];

/// The shape of the rows of a cache.
///
/// ```
/// use dsmoe_train::RowShape;
///
/// // 64 tokens of each distribution, 2 bytes for each number and probability.
/// let shape = RowShape { seq: 256, top: 64, vocab: 32_000 };
/// assert_eq!(shape.sequence_bytes(), 256 * (64 * 2 + 65 * 2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowShape {
    /// Tokens of a sequence.
    pub seq: usize,
    /// Tokens that a row tells apart.
    pub top: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

impl RowShape {
    fn id_bytes(self) -> usize {
        if self.vocab <= 1 << 16 { 2 } else { 4 }
    }

    /// Returns the bytes of the rows of a sequence.
    pub fn sequence_bytes(self) -> usize {
        self.seq * (self.top * self.id_bytes() + (self.top + 1) * size_of::<f16>())
    }

    /// Returns the bytes of so many sequences, with their hashes.
    pub fn bytes(self, sequences: u64) -> u64 {
        sequences * (self.sequence_bytes() + 2 * HASH) as u64
    }

    fn name(self, teacher: &str) -> String {
        format!("{}-top{}-seq{}", teacher.get(..16).unwrap_or(teacher), self.top, self.seq)
    }
}

/// The place of a sequence's rows.
#[derive(Clone, Copy, Debug)]
struct Place {
    file: usize,
    offset: u64,
    hash: Hash,
}

/// The rows of one teacher.
#[derive(Debug)]
pub(crate) struct TeacherCache {
    dir: PathBuf,
    shape: RowShape,
    files: Vec<PathBuf>,
    places: HashMap<Hash, Place>,
    bytes: u64,
    largest: u64,
    notes: Vec<String>,
}

/// Rounds rows to what a cache holds.
pub(crate) fn round(rows: &mut TopRows) {
    rows.log_p.iter_mut().for_each(|log_p| *log_p = f16::from_f32(*log_p).to_f32());
}

fn hash_of(bytes: &[u8]) -> Hash {
    let mut hash = [0; HASH];
    hash.copy_from_slice(&Sha256::digest(bytes)[..HASH]);
    hash
}

fn hash_of_ids(ids: &[u32]) -> Hash {
    hash_of(&ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>())
}

impl TeacherCache {
    /// Opens the cache in `dir` of the teacher with the hash `teacher`, or makes it.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn open(dir: &Path, teacher: &str, shape: RowShape) -> Result<TeacherCache> {
        let dir = dir.join(shape.name(teacher));
        fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let mut cache = TeacherCache {
            shape,
            files: Vec::new(),
            places: HashMap::new(),
            bytes: 0,
            largest: LARGEST_CACHE,
            notes: Vec::new(),
            dir,
        };
        for name in files::names(&cache.dir)?.iter().filter(|name| name.ends_with(ENDING)) {
            let path = cache.dir.join(name);
            match read_index(&path, shape) {
                Ok(Some(index)) => cache.add(path, &index),
                Ok(None) => cache.remove(&path)?,
                // Another process has removed it.
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
                Err(cause) => return Err(Error::io(&path)(cause)),
            }
        }
        Ok(cache)
    }

    /// Returns what there is to say to the user since the last call.
    pub(crate) fn notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Sets `rows` to those of `inputs`, whole sequences. `compute` gives the rows of sequences that are not here yet; they are
    /// rounded and added.
    ///
    /// # Errors
    /// That of `compute`, or the file system refuses.
    pub(crate) fn rows(
        &mut self,
        inputs: &[u32],
        rows: &mut TopRows,
        compute: &mut dyn FnMut(&[u32], &mut TopRows) -> Result<()>,
    ) -> Result<()> {
        let RowShape { seq, top, .. } = self.shape;
        rows.ids.clear();
        rows.ids.resize(inputs.len() * top, 0);
        rows.log_p.clear();
        rows.log_p.resize(inputs.len() * (top + 1), 0.0);
        let (mut missing, mut ids, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for (at, sequence) in inputs.chunks(seq).enumerate() {
            let key = hash_of_ids(sequence);
            match self.read(&key)? {
                Some(bytes) => self.decode(&bytes, rows, at),
                None => {
                    missing.push(at);
                    ids.extend_from_slice(sequence);
                    keys.push(key);
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let mut new = TopRows::default();
        compute(&ids, &mut new)?;
        let encoded: Vec<Vec<u8>> = (0..missing.len()).map(|at| self.encode(&new, at)).collect();
        for (bytes, &at) in encoded.iter().zip(&missing) {
            self.decode(bytes, rows, at);
        }
        self.append(&keys, &encoded)
    }

    /// Returns the rows of a sequence; none where they are missing or damaged.
    fn read(&mut self, key: &Hash) -> Result<Option<Vec<u8>>> {
        let Some(&Place { file, offset, hash }) = self.places.get(key) else { return Ok(None) };
        let path = self.files[file].clone();
        let mut bytes = vec![0; self.shape.sequence_bytes()];
        let read = File::open(&path).and_then(|mut file| {
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut bytes)
        });
        if read.is_ok() && hash_of(&bytes) == hash {
            return Ok(Some(bytes));
        }
        self.places.retain(|_, place| place.file != file);
        if read.is_ok() || path.exists() {
            self.remove(&path)?;
        }
        Ok(None)
    }

    /// Removes a damaged file.
    fn remove(&mut self, path: &Path) -> Result<()> {
        self.notes.push(format!("{} is damaged: it is removed and computed again", path.display()));
        match fs::remove_file(path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(Error::io(path)(cause)),
            _ => Ok(()),
        }
    }

    /// Writes a file of new sequences.
    fn append(&mut self, keys: &[Hash], encoded: &[Vec<u8>]) -> Result<()> {
        let RowShape { seq, top, .. } = self.shape;
        let mut head = MAGIC.to_vec();
        for number in [keys.len(), seq, top, self.shape.id_bytes()] {
            head.extend_from_slice(&(number as u32).to_le_bytes());
        }
        let hashes: Vec<(Hash, Hash)> =
            keys.iter().zip(encoded).map(|(&key, rows)| (key, hash_of(rows))).collect();
        hashes.iter().for_each(|(key, rows)| head.extend([key, rows].into_iter().flatten()));
        let hash = hash_of(&head);
        let bytes = (head.len() + HASH) as u64 + encoded.iter().map(|rows| rows.len() as u64).sum::<u64>();
        if self.bytes.saturating_add(bytes) > self.largest {
            if self.bytes < self.largest {
                let note =
                    format!("{} is full: what is missing there is computed each time", self.dir.display());
                self.notes.push(note);
                self.bytes = self.largest;
            }
            return Ok(());
        }
        let path = self.dir.join(format!("{}{ENDING}", hex(&hash)));
        let written = data_files::replace(&path, |file| {
            file.write_all(&head)?;
            file.write_all(&hash)?;
            encoded.iter().try_for_each(|rows| file.write_all(rows))
        });
        written.map_err(Error::io(&path))?;
        self.add(path, &hashes);
        Ok(())
    }

    /// Makes the sequences of a file known.
    fn add(&mut self, path: PathBuf, hashes: &[(Hash, Hash)]) {
        let first = file_head(hashes.len()) as u64;
        let size = self.shape.sequence_bytes() as u64;
        for (i, &(key, hash)) in hashes.iter().enumerate() {
            self.places.insert(key, Place { file: self.files.len(), offset: first + i as u64 * size, hash });
        }
        self.bytes += first + hashes.len() as u64 * size;
        self.files.push(path);
    }

    /// Returns the bytes of sequence `at` of `rows`.
    fn encode(&self, rows: &TopRows, at: usize) -> Vec<u8> {
        let RowShape { seq, top, .. } = self.shape;
        let mut bytes = Vec::with_capacity(self.shape.sequence_bytes());
        for id in &rows.ids[at * seq * top..][..seq * top] {
            bytes.extend_from_slice(&id.to_le_bytes()[..self.shape.id_bytes()]);
        }
        for &log_p in &rows.log_p[at * seq * (top + 1)..][..seq * (top + 1)] {
            bytes.extend_from_slice(&f16::from_f32(log_p).to_le_bytes());
        }
        bytes
    }

    /// Sets sequence `at` of `rows` from its bytes.
    fn decode(&self, bytes: &[u8], rows: &mut TopRows, at: usize) {
        let RowShape { seq, top, .. } = self.shape;
        let (ids, log_p) = bytes.split_at(seq * top * self.shape.id_bytes());
        let into = &mut rows.ids[at * seq * top..][..seq * top];
        for (id, bytes) in into.iter_mut().zip(ids.chunks_exact(self.shape.id_bytes())) {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            *id = u32::from_le_bytes(word);
        }
        let into = &mut rows.log_p[at * seq * (top + 1)..][..seq * (top + 1)];
        for (log_p, bytes) in into.iter_mut().zip(log_p.chunks_exact(size_of::<f16>())) {
            *log_p = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        }
    }
}

/// Returns the bytes before the rows of a file of so many sequences.
fn file_head(sequences: usize) -> usize {
    HEAD + sequences * 2 * HASH + HASH
}

/// Reads the hashes of sequences and their rows from a file; none where it is damaged.
fn read_index(path: &Path, shape: RowShape) -> io::Result<Option<Vec<(Hash, Hash)>>> {
    let mut file = open_regular(path)?;
    let len = file.metadata()?.len();
    let mut head = vec![0; HEAD];
    if len < HEAD as u64 {
        return Ok(None);
    }
    file.read_exact(&mut head)?;
    let number =
        |i: usize| head[MAGIC.len() + 4 * i..][..4].try_into().map_or(0, u32::from_le_bytes) as usize;
    let (sequences, wanted) = (number(0), [shape.seq, shape.top, shape.id_bytes()]);
    let whole = file_head(sequences) as u64 + sequences as u64 * shape.sequence_bytes() as u64;
    let fits = head.starts_with(&MAGIC) && [1, 2, 3].map(number) == wanted;
    if !fits || sequences > MOST_SEQUENCES || len != whole {
        return Ok(None);
    }
    head.resize(file_head(sequences), 0);
    file.read_exact(&mut head[HEAD..])?;
    let (hashed, hash) = head.split_at(head.len() - HASH);
    if hash_of(hashed) != hash {
        return Ok(None);
    }
    let part = |pair: &[u8], at: usize| pair[at * HASH..][..HASH].try_into().unwrap_or([0; HASH]);
    Ok(Some(hashed[HEAD..].chunks_exact(2 * HASH).map(|pair| (part(pair, 0), part(pair, 1))).collect()))
}

/// Returns whether a file of a cache is whole: its hashes are those of its content.
///
/// # Errors
/// The file cannot be read.
pub fn is_whole(path: &Path) -> io::Result<bool> {
    let mut file = open_regular(path)?;
    let mut head = [0; HEAD];
    if file.metadata()?.len() < HEAD as u64 {
        return Ok(false);
    }
    file.read_exact(&mut head)?;
    let number = |i: usize| head[MAGIC.len() + 4 * i..][..4].try_into().map_or(0, u32::from_le_bytes);
    let [sequences, seq, top, id_bytes] = [0, 1, 2, 3].map(number);
    let pairs = u128::from(seq) * (u128::from(top) * u128::from(id_bytes) + (u128::from(top) + 1) * 2);
    // No file is larger; sizes below do not overflow.
    if pairs * u128::from(sequences) > u128::from(LARGEST_CACHE) || ![2, 4].contains(&id_bytes) {
        return Ok(false);
    }
    let vocab = if id_bytes == 2 { 1 } else { 1 << 17 };
    let shape = RowShape { seq: seq as usize, top: top as usize, vocab };
    let Some(hashes) = read_index(path, shape)? else { return Ok(false) };
    file.seek(SeekFrom::Start(file_head(hashes.len()) as u64))?;
    let mut rows = vec![0; shape.sequence_bytes()];
    for (_, hash) in hashes {
        file.read_exact(&mut rows)?;
        if hash_of(&rows) != hash {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: RowShape = RowShape { seq: 4, top: 3, vocab: 70_000 };

    /// Rows that depend on a sequence's tokens, and the number of sequences that were computed.
    fn compute(inputs: &[u32], rows: &mut TopRows) {
        let RowShape { seq, top, .. } = SHAPE;
        rows.ids.clear();
        rows.log_p.clear();
        for sequence in inputs.chunks(seq) {
            for t in 0..seq {
                let sum: u32 = sequence[..=t].iter().sum();
                rows.ids.extend((0..top as u32).map(|i| sum + i));
                rows.log_p.extend((0..=top).map(|i| -(sum as f32) / 7.0 - i as f32));
            }
        }
    }

    /// Asks for rows; returns them and the number of sequences computed.
    fn ask(cache: &mut TeacherCache, inputs: &[u32]) -> (TopRows, usize) {
        let (mut rows, mut computed) = (TopRows::default(), 0);
        let mut new = |missing: &[u32], rows: &mut TopRows| {
            computed += missing.len() / SHAPE.seq;
            compute(missing, rows);
            Ok(())
        };
        cache.rows(inputs, &mut rows, &mut new).unwrap();
        (rows, computed)
    }

    fn expected(inputs: &[u32]) -> TopRows {
        let mut rows = TopRows::default();
        compute(inputs, &mut rows);
        round(&mut rows);
        rows
    }

    #[test]
    fn rows_are_the_same_computed_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let open = || TeacherCache::open(dir.path(), "0123456789abcdef0", SHAPE).unwrap();
        let [one, two]: [Vec<u32>; 2] = [(0..12).collect(), (4..16).map(|id| 60_000 + id % 9).collect()];
        let mut cache = open();
        assert_eq!(ask(&mut cache, &one), (expected(&one), 3));
        assert_eq!(ask(&mut cache, &one), (expected(&one), 0));
        let mixed = [&one[4..8], &two[..], &one[..4]].concat();
        assert_eq!(ask(&mut cache, &mixed), (expected(&mixed), 3));
        assert_eq!(ask(&mut open(), &mixed), (expected(&mixed), 0));
        assert!(dir.path().join("0123456789abcdef-top3-seq4").is_dir());
        let stored: u64 =
            fs::read_dir(&cache.dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert_eq!((cache.bytes, cache.files.len(), cache.notes().len()), (stored, 2, 0));
        assert_eq!(stored, SHAPE.bytes(6) + 2 * (HEAD + HASH) as u64);
        let other = TeacherCache::open(dir.path(), "another", SHAPE).unwrap();
        assert!(other.places.is_empty());
        // An id of a small vocabulary has two bytes.
        assert_eq!(SHAPE.sequence_bytes() - RowShape { vocab: 65_536, ..SHAPE }.sequence_bytes(), 24);
    }

    #[test]
    fn damage_is_found_removed_and_computed_again() {
        let dir = tempfile::tempdir().unwrap();
        let open = || TeacherCache::open(dir.path(), "teacher", SHAPE).unwrap();
        let inputs: Vec<u32> = (0..8).collect();
        ask(&mut open(), &inputs);
        let folder = dir.path().join("teacher-top3-seq4");
        let path = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(path, folder.join(format!("{}{ENDING}", hex(&hash_of(&bytes[..file_head(2) - HASH])))));
        assert!(is_whole(&path).unwrap());
        // Head, hashes and rows.
        for at in (0..bytes.len()).step_by(7) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            fs::write(&path, damaged).unwrap();
            assert!(!is_whole(&path).unwrap(), "byte {at}");
            let mut cache = open();
            let (rows, computed) = ask(&mut cache, &inputs);
            assert_eq!(rows, expected(&inputs), "byte {at}");
            assert!((1..=2).contains(&computed), "byte {at}");
            let notes = cache.notes();
            assert!(notes.len() == 1 && notes[0].contains("is damaged"), "{notes:?}");
            assert_eq!(ask(&mut open(), &inputs).0, expected(&inputs), "byte {at}");
            for entry in fs::read_dir(&folder).unwrap() {
                fs::remove_file(entry.unwrap().path()).unwrap();
            }
        }
        for len in [0, 5, HEAD, bytes.len() - 1] {
            fs::write(&path, &bytes[..len]).unwrap();
            assert!(!is_whole(&path).unwrap(), "{len} bytes");
            assert_eq!(ask(&mut open(), &inputs), (expected(&inputs), 2), "{len} bytes");
        }
        // A file that another process removes meanwhile, and the rest of one that was killed.
        let mut cache = open();
        fs::remove_file(&path).unwrap();
        fs::write(folder.join(".tmpAbCdEf"), &bytes[..30]).unwrap();
        assert_eq!(ask(&mut cache, &inputs), (expected(&inputs), 2));
        assert_eq!(cache.notes(), Vec::<String>::new());
        assert_eq!(ask(&mut open(), &inputs).1, 0);
    }

    #[test]
    fn a_full_cache_gives_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TeacherCache::open(dir.path(), "teacher", SHAPE).unwrap();
        let inputs: Vec<u32> = (0..8).collect();
        ask(&mut cache, &inputs);
        cache.largest = cache.bytes + 9;
        let more: Vec<u32> = (20..24).collect();
        for _ in 0..2 {
            assert_eq!(ask(&mut cache, &more), (expected(&more), 1));
        }
        assert_eq!(ask(&mut cache, &inputs).1, 0);
        let notes = cache.notes();
        assert!(notes.len() == 1 && notes[0].contains("is full"), "{notes:?}");
    }
}
