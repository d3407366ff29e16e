//! Reading the tensors of a directory or a file.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use dsmoe_kernels::Precision;
use dsmoe_kernels::mmap::Mmap;
use serde::Deserialize;

use super::dtype::decode;
use super::names::{Renames, is_router, name_in_text_model, own_name, stored_name};
use super::{Dtype, Header, HeaderEntry, INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result, shown};
use crate::files::{check_exists, open_regular};
use crate::gguf::{self, Container, Encoded, GgufTensor};
use crate::json::{COPY, parse, read_json};
use crate::remedy::Remedy;

/// Most files that an index may name: each is looked for, and opened if it is there.
const MOST_SHARDS: usize = 100_000;

/// A tensor's place in a checkpoint.
///
/// ```
/// use dsmoe_core::checkpoint::{Checkpoint, TensorView};
/// # use dsmoe_core::checkpoint::{Dtype, TensorInfo, Writer};
/// # let work = tempfile::tempdir()?;
/// # let info = TensorInfo { name: "a".into(), dtype: Dtype::F32, shape: vec![2, 2] };
/// # let mut writer = Writer::create(work.path(), vec![info])?;
/// # writer.write_f32("a", &[1.0, 2.0, 3.0, 4.0])?;
/// # writer.finish()?;
///
/// // A matrix of two rows; the second one is read alone.
/// let checkpoint = Checkpoint::open(work.path())?;
/// let all: &TensorView = checkpoint.tensor("a").unwrap();
/// let (row, mut bytes) = (all.rows(1, 1), [0; 8]);
/// assert_eq!((&row.shape[..], row.len), (&[1, 2][..], 8));
/// checkpoint.read_at(&row, 0, &mut bytes)?;
/// assert_eq!(bytes[..4], 3f32.to_le_bytes());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView {
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Index of its file in [`Checkpoint::files`].
    pub file: usize,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes of the values, as they are read.
    pub len: u64,
    /// The stored form in a GGUF file, from which the bytes are decoded.
    pub(super) encoded: Option<Encoded>,
}

impl TensorView {
    /// Returns the number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the name of the type on disk, which in a GGUF file may be a quantised one.
    pub fn stored_as(&self) -> String {
        self.encoded.as_ref().map_or_else(|| self.dtype.to_string(), |encoded| encoded.kind().to_string())
    }

    /// Returns the bytes on disk, which quantisation makes fewer than those of the values.
    pub fn stored_len(&self) -> u64 {
        self.encoded.as_ref().map_or(self.len, Encoded::stored_len)
    }

    /// Returns the view of `count` rows from row `first` on.
    ///
    /// # Panics
    /// There are no such rows.
    #[must_use]
    pub fn rows(&self, first: usize, count: usize) -> TensorView {
        let all = self.shape.first().copied().unwrap_or(1);
        assert!(first + count <= all, "view: rows {first} to {} of {all}", first + count);
        let row = self.numel() / all.max(1);
        let mut shape = self.shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = count;
        }
        let size = self.dtype.size();
        let encoded = self.encoded.as_ref().map(|encoded| encoded.part(first * row, count * row));
        let offset = match &encoded {
            Some(encoded) => encoded.offset(),
            None => self.offset + (first * row * size) as u64,
        };
        TensorView {
            dtype: self.dtype,
            shape,
            file: self.file,
            offset,
            len: (count * row * size) as u64,
            encoded,
        }
    }
}

/// The weights of a model directory: one file, or the shards of an index. Headers are read and checked when it is
/// opened; data is mapped when it is asked for.
///
/// ```
/// use dsmoe_core::checkpoint::{Checkpoint, Dtype, TensorInfo, TensorView, Writer};
///
/// let work = tempfile::tempdir()?;
/// let mut writer =
///     Writer::create(work.path(), vec![TensorInfo { name: "a".into(), dtype: Dtype::BF16, shape: vec![2, 2] }])?;
/// writer.write_f32("a", &[1.0, 2.0, 3.0, 4.0])?;
/// writer.finish()?;
///
/// let checkpoint = Checkpoint::open(work.path())?;
/// let view: &TensorView = checkpoint.tensor("a").unwrap();
/// assert_eq!((&view.shape[..], view.dtype), (&[2, 2][..], Dtype::BF16));
/// let mut second_row = [0.0; 2];
/// checkpoint.read_f32_at("a", 2, &mut second_row)?;
/// assert_eq!(second_row, [3.0, 4.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory, or the single file.
    path: PathBuf,
    files: Vec<Shard>,
    tensors: BTreeMap<String, TensorView>,
    /// Tensors on which index and shards disagree, and how. Nobody reads those of published checkpoints.
    disputed: BTreeMap<String, Disputed>,
    /// Names that the files have in place of those here.
    renames: Renames,
}

/// A disagreement of index and shards about a tensor.
#[derive(Debug)]
enum Disputed {
    /// The index lists it in a shard that does not hold it.
    NotIn(String),
    /// The index lists it in a shard that is missing.
    Missing(String),
    /// A shard holds it that the index does not list it in.
    NotListed,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    map: OnceLock<Mmap>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens `model.safetensors` in `dir`, or all shards of `model.safetensors.index.json`, or a GGUF file that `dir`
    /// names or holds instead.
    ///
    /// # Errors
    /// A file is missing or its header is wrong, or index and shards disagree about a tensor.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        check_exists(dir)?;
        if let Some(file) = gguf::file_of(dir)? {
            return Checkpoint::open_gguf(&file);
        }
        let single = dir.join(SINGLE_FILE);
        let index = dir.join(INDEX_FILE);
        if single.exists() {
            Ok(Checkpoint { path: dir.to_path_buf(), ..Checkpoint::open_file(&single)? })
        } else if index.exists() {
            Checkpoint::open_index(dir, &index)
        } else {
            Err(Error::path(
                dir,
                format!("there is no {SINGLE_FILE} and no {INDEX_FILE}"),
                "name a model directory with safetensors weights (transformers' save_pretrained writes them)",
            ))
        }
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// The file cannot be read or its header is wrong.
    pub fn open_file(path: &Path) -> Result<Checkpoint> {
        let (shard, header) = open_shard(path)?;
        let tensors = views(header, 0).collect();
        Ok(Checkpoint {
            path: path.to_path_buf(),
            files: vec![shard],
            tensors,
            disputed: BTreeMap::new(),
            renames: &[],
        })
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint> {
        let container = Container::open(path)?;
        let mut tensors = BTreeMap::new();
        for GgufTensor { name, shape, file, encoded } in gguf::tensors(path, &container)? {
            let (dtype, offset) = (encoded.dtype(), encoded.offset());
            let len = shape.iter().product::<usize>() as u64 * dtype.size() as u64;
            let view = TensorView { dtype, shape, file, offset, len, encoded: Some(encoded) };
            if tensors.insert(name.clone(), view).is_some() {
                let help = "convert the model to GGUF again";
                return Err(Error::tensor(path, &name, "is there under two names", help));
            }
        }
        let shard = |path: PathBuf| {
            let file = open_regular(&path)?;
            Ok(Shard { path, file, map: OnceLock::new() })
        };
        let files = container.files.into_iter().map(shard).collect::<Result<_>>()?;
        Ok(Checkpoint { path: path.to_path_buf(), files, tensors, disputed: BTreeMap::new(), renames: &[] })
    }

    fn open_index(dir: &Path, path: &Path) -> Result<Checkpoint> {
        let index: Index = parse(path, &read_json(path)?, "an index of shards", COPY)?;
        let (mut numbers, mut named) = (BTreeMap::<&str, usize>::new(), HashSet::<&str>::new());
        for (tensor, name) in &index.weight_map {
            if !is_plain_name(name) {
                let problem = format!("is mapped to {:?}, not a file name", shown(name));
                return Err(Error::tensor(path, tensor, problem, "name a file of the same directory"));
            }
            if !named.insert(name) {
                continue;
            }
            if named.len() > MOST_SHARDS {
                let problem = format!("names more than {MOST_SHARDS} shards");
                return Err(Error::path(path, problem, "save the model again in fewer shards"));
            }
            if dir.join(name).is_file() {
                let next = numbers.len();
                numbers.insert(name, next);
            }
        }
        let mut files: Vec<(usize, Shard)> = Vec::new();
        let mut found: HashMap<(usize, String), TensorView> = HashMap::new();
        for (name, &number) in &numbers {
            let (shard, header) = open_shard(&dir.join(name))?;
            for (tensor, view) in views(header, number) {
                // A shard may hold more than the index lists: transformers reads what is listed.
                found.insert((number, tensor), view);
            }
            files.push((number, shard));
        }
        files.sort_by_key(|(number, _)| *number);
        let (mut tensors, mut disputed) = (BTreeMap::new(), BTreeMap::new());
        for (tensor, name) in &index.weight_map {
            let Some(&number) = numbers.get(name.as_str()) else {
                // Published indices list tensors that nobody needs, in shards that were not published.
                disputed.insert(tensor.clone(), Disputed::Missing(name.clone()));
                continue;
            };
            match found.remove(&(number, tensor.clone())) {
                Some(view) => {
                    tensors.insert(tensor.clone(), view);
                }
                None => {
                    disputed.insert(tensor.clone(), Disputed::NotIn(name.clone()));
                }
            }
        }
        for (_, tensor) in found.into_keys() {
            disputed.entry(tensor).or_insert(Disputed::NotListed);
        }
        let files = files.into_iter().map(|(_, shard)| shard).collect();
        Ok(Checkpoint { path: dir.to_path_buf(), files, tensors, disputed, renames: &[] })
    }

    /// Keeps the text model of a model that reads images, too, under the names that it has alone.
    pub(super) fn keep_text_model(&mut self) -> Result<()> {
        for (name, view) in std::mem::take(&mut self.tensors) {
            let Some(text) = name_in_text_model(&name) else { continue };
            if self.tensors.contains_key(&text) {
                return Err(self.wrong(&name, &view, "is there under two names", "remove one of them"));
            }
            self.tensors.insert(text, view);
        }
        let disputed = std::mem::take(&mut self.disputed).into_iter();
        self.disputed = disputed.filter_map(|(name, how)| Some((name_in_text_model(&name)?, how))).collect();
        Ok(())
    }

    /// Calls tensors by other names than the files do; messages keep those of the files.
    pub(super) fn rename(&mut self, renames: Renames) -> Result<()> {
        for (name, view) in std::mem::take(&mut self.tensors) {
            let own = own_name(renames, &name);
            if self.tensors.contains_key(&own) {
                return Err(self.wrong(&name, &view, "is there under two names", "remove one of them"));
            }
            self.tensors.insert(own, view);
        }
        let disputed = std::mem::take(&mut self.disputed).into_iter();
        self.disputed = disputed.map(|(name, how)| (own_name(renames, &name), how)).collect();
        self.renames = renames;
        Ok(())
    }

    /// Replaces a matrix, where there is one of that name, by the matrices of its rows, one after the other.
    pub(crate) fn split_rows(&mut self, name: &str, parts: &[(String, usize)]) -> Result<()> {
        let Some(view) = self.tensors.get(name).cloned() else { return Ok(()) };
        let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
        if view.shape.len() != 2 || view.shape[0] != rows {
            let problem = format!("has shape {:?} and config.json says {rows} rows", view.shape);
            return Err(self.wrong(name, &view, problem, "use the weights that belong to this config.json"));
        }
        if let Some((part, _)) = parts.iter().find(|(part, _)| self.tensors.contains_key(part)) {
            return Err(self.wrong(name, &view, format!("is there beside {part}"), "remove one of them"));
        }
        self.tensors.remove(name);
        let mut first = 0;
        for (part, rows) in parts {
            self.tensors.insert(part.clone(), view.rows(first, *rows));
            first += rows;
        }
        Ok(())
    }

    /// Returns the directory or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the place of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(name)
    }

    /// Returns the precision that keeps what is stored: bf16 when no matrix but routers takes more than two bytes a
    /// value. (Of f16, bf16 keeps the range and eight bits.)
    pub fn precision(&self) -> Precision {
        let narrow = |(name, view): (&String, &TensorView)| {
            let size = view.encoded.as_ref().map_or(view.dtype.size(), Encoded::stored_size);
            view.shape.len() < 2 || size <= 2 || is_router(name)
        };
        if self.tensors.iter().all(narrow) { Precision::Bf16 } else { Precision::F32 }
    }

    /// Returns the files, as [`TensorView::file`] numbers them.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|shard| shard.path.as_path())
    }

    /// Sets `out` to the bytes of a tensor of this checkpoint from byte `first` on.
    ///
    /// # Errors
    /// The file system refuses.
    ///
    /// # Panics
    /// The tensor has fewer bytes, or, in a GGUF file, they are not whole elements.
    pub fn read_at(&self, view: &TensorView, first: u64, out: &mut [u8]) -> Result<()> {
        assert!(first + out.len() as u64 <= view.len, "checkpoint: bytes of a tensor of {}", view.len);
        let Shard { path, file, .. } = &self.files[view.file];
        let mut read = |at: u64, out: &mut [u8]| {
            let mut file: &File = file;
            file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(out)).map_err(Error::io(path))
        };
        match &view.encoded {
            Some(encoded) => encoded.read(first, out, &mut read),
            None => read(view.offset + first, out),
        }
    }

    /// Returns the bytes of a tensor, memory mapped; those of a GGUF file are decoded.
    ///
    /// # Errors
    /// There is no such tensor, or the system refuses the map.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let view = self.need(name)?;
        if view.encoded.is_some() {
            let mut bytes = vec![0; view.len as usize];
            self.read_at(view, 0, &mut bytes)?;
            return Ok(Cow::Owned(bytes));
        }
        let shard = &self.files[view.file];
        let map = match shard.map.get() {
            Some(map) => map,
            None => {
                let map = Mmap::open(&shard.file).map_err(Error::io(&shard.path))?;
                shard.map.get_or_init(|| map)
            }
        };
        // The file may have shrunk since its header was checked.
        let bytes = map.get(view.offset as usize..(view.offset + view.len) as usize).ok_or_else(|| {
            self.wrong(name, view, "is beyond the end of the file", "copy the file again".to_owned())
        })?;
        Ok(Cow::Borrowed(bytes))
    }

    /// Sets `out` to a tensor of any float type.
    ///
    /// # Errors
    /// There is no such tensor, it is not of a float type, or has another number of elements.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let view = self.need_float(name)?;
        if view.numel() != out.len() {
            let problem = format!("has shape {:?}, not {} elements", view.shape, out.len());
            return Err(self.wrong(name, view, problem, "use the weights of this model"));
        }
        decode(out, &self.bytes(name)?, view.dtype);
        Ok(())
    }

    /// Checks that a tensor of a float type has `shape`.
    ///
    /// # Errors
    /// There is no such tensor, it is not of a float type, or has another shape.
    pub fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        let view = self.need_float(name)?;
        if view.shape != shape {
            let problem = format!("has shape {:?}, not {shape:?}", view.shape);
            return Err(self.wrong(name, view, problem, "use the weights of this model"));
        }
        Ok(())
    }

    /// Sets `out` to the elements of a tensor of any float type from element `first` on.
    ///
    /// # Errors
    /// There is no such tensor, it is not of a float type, or has fewer elements.
    pub fn read_f32_at(&self, name: &str, first: usize, out: &mut [f32]) -> Result<()> {
        let view = self.need_float(name)?;
        let end = first.checked_add(out.len()).filter(|&end| end <= view.numel()).ok_or_else(|| {
            let problem =
                format!("has shape {:?}, too few for {} elements from {first} on", view.shape, out.len());
            self.wrong(name, view, problem, "use the weights of this model")
        })?;
        let size = view.dtype.size();
        decode(out, &self.bytes(name)?[first * size..end * size], view.dtype);
        Ok(())
    }

    /// Reads a tensor of type I32, flat.
    ///
    /// # Errors
    /// There is no such tensor, or it is of another type.
    pub fn read_i32(&self, name: &str) -> Result<Vec<i32>> {
        let view = self.need(name)?;
        if view.dtype != Dtype::I32 {
            let problem = format!("has dtype {}, not I32", view.dtype);
            return Err(self.wrong(name, view, problem, "convert the model again"));
        }
        let bytes = self.bytes(name)?;
        let (elements, _) = bytes.as_chunks();
        Ok(elements.iter().map(|&element| i32::from_le_bytes(element)).collect())
    }

    pub(crate) fn need(&self, name: &str) -> Result<&TensorView> {
        self.tensor(name).ok_or_else(|| {
            let stored = stored_name(self.renames, name);
            let wrong = |path: &Path, problem: String, help: &'static str| {
                Error::tensor(path, &stored, problem, help)
            };
            match self.disputed.get(name) {
                None => {
                    wrong(&self.path, "is missing".into(), "use the weights that belong to this config.json")
                }
                Some(Disputed::NotListed) => {
                    wrong(&self.path.join(INDEX_FILE), "is in a shard and not listed".into(), "add it")
                }
                Some(Disputed::Missing(shard)) => {
                    let problem = format!("is in shard {}, which is missing", shown(shard));
                    wrong(&self.path.join(INDEX_FILE), problem, "copy that file into the directory")
                }
                Some(Disputed::NotIn(shard)) => {
                    let problem = format!("is not in the shard {} the index names", shown(shard));
                    wrong(&self.path.join(INDEX_FILE), problem, "copy index and shards again from one source")
                }
            }
        })
    }

    pub(crate) fn need_float(&self, name: &str) -> Result<&TensorView> {
        let view = self.need(name)?;
        if !view.dtype.is_float() {
            let problem = format!("has dtype {}", view.dtype);
            let help = "use F32, F16, BF16 or F64";
            return Err(self.wrong(name, view, problem, help));
        }
        Ok(view)
    }

    /// Makes an error about a tensor that is there, naming its file.
    pub(crate) fn wrong(
        &self,
        name: &str,
        view: &TensorView,
        problem: impl Into<String>,
        help: impl Into<Remedy>,
    ) -> Error {
        let name = stored_name(self.renames, name);
        Error::tensor(&self.files[view.file].path, &name, problem, help)
    }
}

fn open_shard(path: &Path) -> Result<(Shard, Header)> {
    let mut file = open_regular(path)?;
    let header = Header::read(path, &mut file)?;
    Ok((Shard { path: path.to_path_buf(), file, map: OnceLock::new() }, header))
}

fn views(header: Header, file: usize) -> impl Iterator<Item = (String, TensorView)> {
    header.entries.into_iter().map(move |entry| {
        let offset = header.data_start + entry.offset;
        let HeaderEntry { name, dtype, shape, len, .. } = entry;
        (name, TensorView { dtype, shape, file, offset, len, encoded: None })
    })
}

/// Returns whether `name` is a file of the same directory.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}
