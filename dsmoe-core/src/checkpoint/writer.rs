//! Writing tensors in the order they were declared, to one file or to shards.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::dtype::{encode, is_too_large, too_large};
use super::manifest::{Summing, Sums};
use super::{Dtype, INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result};
use crate::files::write_synced;

/// Default size of the largest shard, that of `save_pretrained`.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;
const BUFFER: usize = 1 << 20;

/// A tensor to be written.
///
/// ```
/// use dsmoe_core::checkpoint::{Dtype, TensorInfo};
///
/// let infos = [(Dtype::BF16, vec![2048, 128]), (Dtype::F32, vec![128])];
/// let infos = infos.map(|(dtype, shape)| TensorInfo { name: "weight".to_owned(), dtype, shape });
/// assert_eq!(infos.iter().map(TensorInfo::len_bytes).sum::<u64>(), 2 * 2048 * 128 + 4 * 128);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Returns the size of the tensor in bytes.
    ///
    /// # Panics
    /// They do not fit 64 bits.
    pub fn len_bytes(&self) -> u64 {
        let len = self.shape.iter().try_fold(self.dtype.size() as u64, |len, &n| len.checked_mul(n as u64));
        len.unwrap_or_else(|| panic!("tensor {} of shape {:?} is too large", self.name, self.shape))
    }
}

/// A streaming writer of safetensors: all tensors are declared first, then written in that order.
///
/// ```
/// use dsmoe_core::checkpoint::{Checkpoint, Dtype, TensorInfo, Writer};
///
/// let work = tempfile::tempdir()?;
/// let info = |name: &str| TensorInfo { name: name.to_owned(), dtype: Dtype::F32, shape: vec![4] };
/// // Shards of at most 16 bytes: one for each tensor, and an index.
/// let mut writer = Writer::create_sharded(work.path(), vec![info("a"), info("b")], 16)?;
/// writer.write_f32("a", &[1.0; 4])?;
/// writer.begin("b")?;
/// writer.write_f32_chunk(&[2.0; 3])?;
/// writer.write_f32_chunk(&[3.0])?;
/// writer.finish()?;
/// assert_eq!(Checkpoint::open(work.path())?.files().count(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Writer {
    infos: Vec<TensorInfo>,
    /// In the order of the tensors.
    joins: Vec<Join>,
    shards: Vec<Shard>,
    index: Option<PathBuf>,
    /// The tensor that comes next, or is being written.
    next: usize,
    /// Bytes of it that are still to come; none between tensors.
    left: Option<u64>,
    /// The shard being written.
    shard: usize,
    file: Option<BufWriter<File>>,
    scratch: Vec<u8>,
    /// Of the shard being written.
    summing: Summing,
    /// Of the complete ones.
    sums: Sums,
    /// No file is written.
    discards: bool,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    tensors: Range<usize>,
}

/// Declared tensors that are stored as one, their rows one after the other, or one tensor that is stored under another name.
#[derive(Clone, Debug)]
pub(crate) struct Join {
    /// Name of the stored tensor.
    pub(crate) name: String,
    /// Places of the declared tensors, which are adjacent.
    pub(crate) tensors: Range<usize>,
}

impl Writer {
    /// Writes `model.safetensors`, or shards of at most [`DEFAULT_SHARD_BYTES`] with their index, into the existing
    /// directory `dir`.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// Two tensors have one name.
    pub fn create(dir: &Path, infos: Vec<TensorInfo>) -> Result<Writer> {
        Writer::create_sharded(dir, infos, DEFAULT_SHARD_BYTES)
    }

    /// Does as [`Writer::create`] with shards of at most `max_shard_bytes`; a larger tensor has a shard of its own.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// Two tensors have one name.
    pub fn create_sharded(dir: &Path, infos: Vec<TensorInfo>, max_shard_bytes: u64) -> Result<Writer> {
        Writer::create_joined(dir, infos, Vec::new(), max_shard_bytes)
    }

    /// Does as [`Writer::create_sharded`]; the tensors of every join are stored as one.
    ///
    /// # Panics
    /// Those of [`Writer::create_sharded`]; a join is of tensors of different types or widths.
    pub(crate) fn create_joined(
        dir: &Path,
        infos: Vec<TensorInfo>,
        joins: Vec<Join>,
        max_shard_bytes: u64,
    ) -> Result<Writer> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut filled = 0u64;
        let mut next = 0;
        while next < infos.len() {
            let join = joins.iter().find(|join| join.tensors.start == next);
            let end = join.map_or(next + 1, |join| join.tensors.end);
            let len = infos[next..end].iter().map(TensorInfo::len_bytes).sum();
            match ranges.last_mut() {
                Some(range) if filled.saturating_add(len) <= max_shard_bytes => {
                    range.end = end;
                    filled += len;
                }
                _ => {
                    ranges.push(next..end);
                    filled = len;
                }
            }
            next = end;
        }
        if ranges.len() <= 1 {
            let shard = Shard { path: dir.join(SINGLE_FILE), tensors: 0..infos.len() };
            return Writer::start(vec![shard], None, infos, joins);
        }
        let total = ranges.len();
        let named = ranges.into_iter().enumerate().map(|(i, tensors)| {
            let path = dir.join(format!("model-{:05}-of-{total:05}.safetensors", i + 1));
            Shard { path, tensors }
        });
        Writer::start(named.collect(), Some(dir.join(INDEX_FILE)), infos, joins)
    }

    /// Writes one file of any name.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// Two tensors have one name.
    pub fn create_file(path: &Path, infos: Vec<TensorInfo>) -> Result<Writer> {
        let shard = Shard { path: path.to_path_buf(), tensors: 0..infos.len() };
        Writer::start(vec![shard], None, infos, Vec::new())
    }

    fn start(
        shards: Vec<Shard>,
        index: Option<PathBuf>,
        infos: Vec<TensorInfo>,
        joins: Vec<Join>,
    ) -> Result<Writer> {
        let mut names = HashSet::new();
        for info in &infos {
            assert!(names.insert(info.name.as_str()), "writer: two tensors named {}", info.name);
        }
        let (file, scratch, discards) = (None, Vec::new(), false);
        let (next, left, shard) = (0, None, 0);
        let (summing, sums) = (Summing::default(), Sums::default());
        let mut writer =
            Writer { infos, joins, shards, index, next, left, shard, file, scratch, summing, sums, discards };
        writer.open()?;
        Ok(writer)
    }

    /// Takes tensors as [`Writer::create`] does and writes no file: another process has the same tensors and writes them.
    pub(crate) fn discarding(infos: Vec<TensorInfo>) -> Writer {
        let shards = vec![Shard { path: PathBuf::new(), tensors: 0..infos.len() }];
        let (index, file, scratch) = (None, None, Vec::new());
        let (next, left, shard) = (0, None, 0);
        let (joins, summing, sums, discards) = (Vec::new(), Summing::default(), Sums::default(), true);
        Writer { infos, joins, shards, index, next, left, shard, file, scratch, summing, sums, discards }
    }

    /// Returns where the sums of all files are once they are complete, by name.
    pub fn sums(&self) -> Sums {
        self.sums.clone()
    }

    /// Adds the sums of the files to `sums`.
    pub(crate) fn with_sums(mut self, sums: &Sums) -> Writer {
        self.sums = sums.clone();
        self
    }

    /// Starts the next tensor, which must be `name`.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// Another tensor was declared to come next, or the one before is not complete.
    pub fn begin(&mut self, name: &str) -> Result<()> {
        assert!(self.left.is_none(), "writer: tensor {} is not complete", self.infos[self.next].name);
        let declared = self.infos.get(self.next).map(|info| info.name.as_str());
        assert!(declared == Some(name), "writer: tensor {name} written where {declared:?} was declared");
        if self.file.is_none() {
            self.open()?;
        }
        self.left = Some(self.infos[self.next].len_bytes());
        self.write_chunk(&[])
    }

    /// Appends bytes to the tensor that was begun.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// No tensor was begun, or it has fewer bytes.
    pub fn write_chunk(&mut self, bytes: &[u8]) -> Result<()> {
        let left = self.left.and_then(|left| left.checked_sub(bytes.len() as u64));
        let left = left.unwrap_or_else(|| panic!("writer: {} bytes too many", bytes.len()));
        self.put(bytes)?;
        self.left = Some(left);
        if left == 0 {
            self.left = None;
            self.next += 1;
            if self.next == self.shards[self.shard].tensors.end {
                self.close()?;
            }
        }
        Ok(())
    }

    /// Writes the next tensor, which must be `name`, as a whole.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// Another tensor was declared to come next, or it has another length.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.begin(name)?;
        if !bytes.is_empty() {
            self.write_chunk(bytes)?;
        }
        assert!(self.left.is_none(), "writer: {} bytes are not all of tensor {name}", bytes.len());
        Ok(())
    }

    /// Writes the next tensor, which must be `name`, converted to its declared float type.
    ///
    /// # Errors
    /// The file system refuses, or a finite value is beyond the largest of the type.
    ///
    /// # Panics
    /// Another tensor was declared to come next, it has another number of elements or is not of a float type.
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.begin(name)?;
        self.write_f32_chunk(values)?;
        assert!(self.left.is_none(), "writer: {} elements are not all of tensor {name}", values.len());
        Ok(())
    }

    /// Appends elements to the tensor that was begun, converted to its declared float type.
    ///
    /// # Errors
    /// The file system refuses, or a finite value is beyond the largest of the type.
    ///
    /// # Panics
    /// No tensor was begun, it has fewer elements or is not of a float type.
    pub fn write_f32_chunk(&mut self, values: &[f32]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let dtype = self.infos[self.next].dtype;
        if let Some(value) = is_too_large(values, dtype) {
            let (path, name) = (&self.shards[self.shard].path, &self.infos[self.next].name);
            let (problem, help) = too_large(value, dtype);
            return Err(Error::tensor(path, name, problem, help));
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        for values in values.chunks(BUFFER) {
            scratch.resize(values.len() * dtype.size(), 0);
            encode(&mut scratch, values, dtype);
            self.write_chunk(&scratch)?;
        }
        self.scratch = scratch;
        Ok(())
    }

    /// Writes the index of several shards; everything is on disk after this.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// A declared tensor was not written.
    pub fn finish(mut self) -> Result<()> {
        let missing = self.infos.get(self.next).map(|info| info.name.as_str());
        assert!(missing.is_none(), "writer: tensor {missing:?} was declared and not written");
        if self.file.is_some() {
            self.close()?;
        }
        let Some(path) = &self.index else { return Ok(()) };
        let total: u64 = self.infos.iter().map(TensorInfo::len_bytes).sum();
        let mut weight_map = Map::new();
        for shard in &self.shards {
            let file = shard.path.file_name().map(|name| name.to_string_lossy());
            for info in self.stored(shard.tensors.clone()) {
                weight_map.insert(info.name, json!(file));
            }
        }
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_synced(path, format!("{index:#}\n").as_bytes()).map_err(Error::io(path))
    }

    fn open(&mut self) -> Result<()> {
        if self.discards {
            return Ok(());
        }
        let shard = &self.shards[self.shard];
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut end = 0;
        for info in self.stored(shard.tensors.clone()) {
            let start = end;
            end += info.len_bytes();
            let entry =
                json!({"dtype": info.dtype.to_string(), "shape": info.shape, "data_offsets": [start, end]});
            header.insert(info.name, entry);
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let file = File::create(&shard.path).map_err(Error::io(&shard.path))?;
        self.file = Some(BufWriter::with_capacity(BUFFER, file));
        self.put(&(header.len() as u64).to_le_bytes())?;
        self.put(&header)
    }

    /// Returns the tensors as they are stored: joined ones as one.
    fn stored(&self, tensors: Range<usize>) -> Vec<TensorInfo> {
        let mut stored = Vec::new();
        let mut next = tensors.start;
        while next < tensors.end {
            let first = &self.infos[next];
            let Some(join) = self.joins.iter().find(|join| join.tensors.start == next) else {
                stored.push(first.clone());
                next += 1;
                continue;
            };
            let parts = &self.infos[join.tensors.clone()];
            let alike = |part: &TensorInfo| part.dtype == first.dtype && part.shape[1..] == first.shape[1..];
            assert!(parts.iter().all(alike), "writer: {} joins tensors that are not alike", join.name);
            let mut shape = first.shape.clone();
            shape[0] = parts.iter().map(|part| part.shape[0]).sum();
            stored.push(TensorInfo { name: join.name.clone(), dtype: first.dtype, shape });
            next = join.tensors.end;
        }
        stored
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(bytes).map_err(Error::io(&self.shards[self.shard].path))?;
            self.summing.add(bytes);
        }
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        if let Some(file) = self.file.take() {
            let path = &self.shards[self.shard].path;
            let file = file.into_inner().map_err(io::IntoInnerError::into_error).map_err(Error::io(path))?;
            file.sync_all().map_err(Error::io(path))?;
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            self.sums.set(name.unwrap_or_default(), self.summing.finish());
        }
        self.shard += 1;
        Ok(())
    }
}
