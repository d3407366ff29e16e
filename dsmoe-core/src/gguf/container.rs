//! The container: metadata and the places of tensors, believed only as far as the file is long.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 keys | keys | places of tensors | padding | data
//! ```

use std::collections::{BTreeMap, HashSet};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::types::TensorType;
use super::value::Value;
use crate::error::{Error, Result, shown};
use crate::files::{LFS_POINTER, lfs_pointer, open_regular};

pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// Number of files of a model that was split.
const PARTS_KEY: &str = "split.count";
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// Alignment of the data where the file names none.
pub(crate) const ALIGNMENT: u64 = 32;

const LARGEST_ALIGNMENT: u64 = 1 << 20;
/// The most bytes before the data.
const LARGEST_HEADER: u64 = 1 << 28;
const LARGEST_TEXT: u64 = 1 << 24;
const LARGEST_NAME: u64 = 1 << 16;
const MOST_KEYS: u64 = 1 << 16;
const MOST_TENSORS: u64 = 1 << 20;
/// The most elements of all arrays together.
const MOST_ELEMENTS: u64 = 1 << 23;
const MOST_DIMENSIONS: u32 = 4;
/// How deep arrays may nest.
const DEEPEST: usize = 4;

const COPY: &str = "copy the file again";
const FOREIGN: &str = "convert the model to GGUF again with a current converter";

/// A checked GGUF header.
///
/// ```no_run
/// use dsmoe_core::gguf::{Container, Layout, TensorPlace, TensorType, Value};
///
/// let container = Container::open("model.gguf".as_ref())?;
/// let name = container.metadata.get("general.name").and_then(Value::as_str);
/// let TensorPlace { kind, shape, .. } = container.tensor("token_embd.weight").unwrap();
/// if let (TensorType::Q4_K, Some(Layout { elements, bytes })) = (kind, kind.layout()) {
///     println!("{name:?}: {shape:?} in blocks of {elements} values, {bytes} bytes each");
/// }
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Container {
    /// All keys.
    pub metadata: BTreeMap<String, Value>,
    /// All tensors, in the order of the file.
    pub tensors: Vec<TensorPlace>,
    /// The file, or the parts of a model that was split.
    pub files: Vec<PathBuf>,
}

/// One tensor of a GGUF file.
///
/// ```
/// use dsmoe_core::gguf::{Container, TensorPlace, TensorType};
/// # let mut file = b"GGUF".to_vec();
/// # file.extend(3u32.to_le_bytes());
/// # [1u64, 0, 6].iter().for_each(|count| file.extend(count.to_le_bytes()));
/// # file.extend(b"weight");
/// # file.extend(2u32.to_le_bytes());
/// # [32u64, 2].iter().for_each(|size| file.extend(size.to_le_bytes()));
/// # file.extend(TensorType::Q8_0.id().to_le_bytes());
/// # file.extend(0u64.to_le_bytes());
/// # file.resize(file.len().next_multiple_of(32) + 2 * 34, 0);
///
/// // A file with two rows of 32 values, in blocks of 34 bytes.
/// let container = Container::read("model.gguf".as_ref(), &file[..], file.len() as u64)?;
/// let TensorPlace { kind, shape, offset, .. } = container.tensor("weight").unwrap();
/// assert_eq!((*kind, &shape[..]), (TensorType::Q8_0, &[2, 32][..]));
/// assert_eq!(file.len() as u64 - offset, 2 * 34);
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlace {
    /// Name, in GGUF's spelling.
    pub name: String,
    /// Encoding.
    pub kind: TensorType,
    /// Shape, outermost first (the reverse of the file's order).
    pub shape: Vec<usize>,
    /// Index of its file in [`Container::files`].
    pub file: usize,
    /// First byte, from the start of the file.
    pub offset: u64,
}

impl Container {
    /// Reads and checks the header of the file at `path`, and of the other parts of a model that was split.
    ///
    /// # Errors
    /// A file cannot be read, or its header is not that of GGUF 2 or 3 or describes more than there is.
    pub fn open(path: &Path) -> Result<Container> {
        let mut whole = open_file(path)?;
        let Some(parts) = whole.metadata.get(PARTS_KEY).and_then(Value::as_u64).filter(|&parts| parts > 1)
        else {
            return Ok(whole);
        };
        let prefix = path.file_name().and_then(|name| name.to_str()).and_then(split_prefix);
        let Some((prefix, 1, _)) = prefix.filter(|&(_, _, named)| named == parts) else {
            let problem = format!("is {parts}, and the file is not named as the first of so many parts");
            return Err(Error::field(path, PARTS_KEY, problem, "name the part PREFIX-00001-of-N.gguf"));
        };
        let mut names: HashSet<String> = whole.tensors.iter().map(|tensor| tensor.name.clone()).collect();
        for part in 2..=parts {
            let path = path.with_file_name(format!("{prefix}-{part:05}-of-{parts:05}.gguf"));
            let file = whole.files.len();
            for tensor in open_file(&path)?.tensors {
                if !names.insert(tensor.name.clone()) {
                    return Err(Error::tensor(&path, &tensor.name, "is in another part too", COPY));
                }
                whole.tensors.push(TensorPlace { file, ..tensor });
            }
            whole.files.push(path);
        }
        Ok(whole)
    }

    /// Reads and checks a header from `input`, the start of a file of `len` bytes; `path` is for messages.
    ///
    /// # Errors
    /// `input` fails, or the header is not that of GGUF 2 or 3 or describes more than there is.
    pub fn read(path: &Path, input: impl Read, len: u64) -> Result<Container> {
        let mut input = Input { path, input, len, at: 0, elements: 0 };
        let mut magic = [0; 4];
        if len < 24 {
            return Err(input.wrong(format!("is missing: the file has {len} bytes"), COPY));
        }
        input.fill(&mut magic)?;
        if LFS_POINTER.starts_with(&magic) {
            let mut rest = vec![0; LFS_POINTER.len() - magic.len()];
            if input.fill(&mut rest).is_ok() && LFS_POINTER.ends_with(&rest) {
                return Err(lfs_pointer(path));
            }
        }
        if magic != MAGIC {
            return Err(input.wrong("is not that of GGUF", "name a .gguf file or a model directory"));
        }
        let version = input.u32()?;
        check_version(&input, version)?;
        let (tensors, keys) = (input.u64()?, input.u64()?);
        input.check_count("tensors", tensors, MOST_TENSORS, 24)?;
        input.check_count("keys", keys, MOST_KEYS, 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = input.text("the name of a key", LARGEST_NAME)?;
            let kind = input.u32()?;
            let value = input.value(&key, kind, 0)?;
            if metadata.contains_key(&key) {
                return Err(Error::field(path, shown(&key), "is there twice", FOREIGN));
            }
            metadata.insert(key, value);
        }
        let mut places = Vec::new();
        for _ in 0..tensors {
            places.push(input.place()?);
        }
        let alignment = alignment(path, &metadata)?;
        let start = input.at.next_multiple_of(alignment);
        check_places(path, &mut places, start, alignment, len)?;
        Ok(Container { metadata, tensors: places, files: vec![path.to_path_buf()] })
    }

    /// Returns the place of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorPlace> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

impl TensorPlace {
    /// Returns the number of elements.
    pub fn numel(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

fn open_file(path: &Path) -> Result<Container> {
    let file = open_regular(path)?;
    let metadata = file.metadata().map_err(Error::io(path))?;
    Container::read(path, BufReader::with_capacity(1 << 16, file), metadata.len())
}

/// Returns prefix, number and count of the name `PREFIX-00001-of-00003.gguf`.
pub(crate) fn split_prefix(name: &str) -> Option<(&str, u64, u64)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    Some((prefix, number.parse().ok()?, count.parse().ok()?))
}

fn check_version(input: &Input<'_, impl Read>, version: u32) -> Result<()> {
    match version {
        2 | 3 => Ok(()),
        1 => Err(input.wrong("is of version 1", FOREIGN)),
        swapped if (1..=3).contains(&swapped.swap_bytes()) => {
            Err(input.wrong("is big-endian", "use the little-endian file of this model"))
        }
        other => Err(input.wrong(format!("is of version {other}; 2 and 3 are read"), FOREIGN)),
    }
}

fn alignment(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<u64> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else { return Ok(ALIGNMENT) };
    let sound = |n: &u64| (1..=LARGEST_ALIGNMENT).contains(n) && n.is_power_of_two();
    value.as_u64().filter(sound).ok_or_else(|| {
        Error::field(path, ALIGNMENT_KEY, format!("is {value}"), "use a power of two up to 1048576")
    })
}

/// Makes the offsets those from the start of the file, and checks that every tensor lies in it by itself.
fn check_places(path: &Path, places: &mut [TensorPlace], start: u64, alignment: u64, len: u64) -> Result<()> {
    let mut names = HashSet::new();
    let mut spans = Vec::new();
    for place in &mut *places {
        let name = place.name.clone();
        let fail = |problem: String, help: &'static str| Err(Error::tensor(path, &name, problem, help));
        if !names.insert(name.clone()) {
            return fail("is in the header twice".into(), FOREIGN);
        }
        if !place.offset.is_multiple_of(alignment) {
            return fail(format!("starts at byte {}, not a multiple of {alignment}", place.offset), FOREIGN);
        }
        let Some(offset) = place.offset.checked_add(start) else {
            return fail(format!("starts at byte {}", place.offset), FOREIGN);
        };
        place.offset = offset;
        // The length of a tensor of a type that is not read is unknown.
        let Some(layout) = place.kind.layout() else { continue };
        let row = place.shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(layout.elements) {
            let (kind, block) = (place.kind, layout.elements);
            return fail(
                format!("has rows of {row} elements, not whole blocks of {block} ({kind})"),
                FOREIGN,
            );
        }
        let bytes = place.numel() / layout.elements as u64 * layout.bytes as u64;
        match offset.checked_add(bytes) {
            Some(end) if end <= len => spans.push((offset, end, name)),
            _ => {
                let problem =
                    format!("of {bytes} bytes at byte {offset} is beyond the end of the file, at {len}");
                return fail(problem, COPY);
            }
        }
    }
    spans.sort();
    match spans.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        None => Ok(()),
        Some(pair) => {
            let problem = format!("overlaps the tensor {}", shown(&pair[0].2));
            Err(Error::tensor(path, &pair[1].2, problem, FOREIGN))
        }
    }
}

/// The start of a file, with the number of bytes that were read.
struct Input<'a, R> {
    path: &'a Path,
    input: R,
    len: u64,
    at: u64,
    /// Elements of arrays so far.
    elements: u64,
}

impl<R: Read> Input<'_, R> {
    fn wrong(&self, problem: impl AsRef<str>, help: &'static str) -> Error {
        Error::path(self.path, format!("header {}", problem.as_ref()), help)
    }

    fn left(&self) -> u64 {
        self.len.min(LARGEST_HEADER).saturating_sub(self.at)
    }

    /// Returns the error of `what` that does not fit.
    fn too_long(&self, what: &str, bytes: u64) -> Error {
        let (left, limit) = (self.len.saturating_sub(self.at), LARGEST_HEADER);
        if bytes <= left {
            return self.wrong(format!("is longer than {limit} bytes, the most that is read"), FOREIGN);
        }
        self.wrong(format!("says {what} has {bytes} bytes and {left} are left of the file"), COPY)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        if out.len() as u64 > self.left() {
            return Err(self.too_long("a value", out.len() as u64));
        }
        self.input.read_exact(out).map_err(Error::io(self.path))?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(input_bytes(self)?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(input_bytes(self)?))
    }

    /// Refuses a number of things of at least `size` bytes each that cannot be.
    fn check_count(&self, what: &str, count: u64, most: u64, size: u64) -> Result<()> {
        if count > most {
            return Err(self.wrong(format!("says it has {count} {what}; {most} are the most read"), COPY));
        }
        if count * size > self.left() {
            return Err(self.too_long(what, count * size));
        }
        Ok(())
    }

    fn text(&mut self, what: &str, longest: u64) -> Result<String> {
        let len = self.u64()?;
        if len > self.left() {
            return Err(self.too_long(what, len));
        }
        if len > longest {
            return Err(self.wrong(format!("says {what} has {len} bytes; {longest} are the most read"), COPY));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|cause| {
            let at = cause.utf8_error().valid_up_to();
            self.wrong(format!("has {what} that is not UTF-8 at its byte {at}"), FOREIGN)
        })
    }

    fn value(&mut self, key: &str, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(input_bytes::<1>(self)?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(input_bytes(self)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(input_bytes(self)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(input_bytes(self)?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(input_bytes(self)?))),
            6 => Value::F32(f32::from_le_bytes(input_bytes(self)?)),
            7 => match input_bytes::<1>(self)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => {
                    let problem = format!("is a flag of value {other}");
                    return Err(Error::field(self.path, shown(key), problem, FOREIGN));
                }
            },
            8 => Value::Text(self.text(&format!("the text of {}", shown(key)), LARGEST_TEXT)?),
            9 => self.list(key, depth)?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(input_bytes(self)?)),
            12 => Value::F64(f64::from_le_bytes(input_bytes(self)?)),
            other => {
                let problem = format!("has unknown type {other}");
                return Err(Error::field(self.path, shown(key), problem, FOREIGN));
            }
        })
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<Value> {
        if depth == DEEPEST {
            let problem = format!("is a list nested more than {DEEPEST} deep");
            return Err(Error::field(self.path, shown(key), problem, FOREIGN));
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            _ => 8,
        };
        self.elements = self.elements.saturating_add(count);
        self.check_count(&format!("elements in {}", shown(key)), self.elements, MOST_ELEMENTS, 0)?;
        self.check_count(&format!("elements in {}", shown(key)), count, MOST_ELEMENTS, size)?;
        let mut list = Vec::with_capacity(count as usize);
        for _ in 0..count {
            list.push(self.value(key, kind, depth + 1)?);
        }
        Ok(Value::List(list))
    }

    fn place(&mut self) -> Result<TensorPlace> {
        let name = self.text("the name of a tensor", LARGEST_NAME)?;
        let path = self.path;
        let fail = |problem: String| Err(Error::tensor(path, &name, problem, FOREIGN));
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            return fail(format!("has {dimensions} dimensions; {MOST_DIMENSIONS} are the most"));
        }
        let mut shape = Vec::new();
        let mut numel = 1u64;
        for _ in 0..dimensions {
            let n = self.u64()?;
            match numel.checked_mul(n).filter(|&numel| numel < 1 << 48 && n > 0) {
                Some(product) => numel = product,
                None => return fail(format!("has a dimension of {n}")),
            }
            shape.push(n as usize);
        }
        shape.reverse();
        let kind = TensorType::from_id(self.u32()?);
        let offset = self.u64()?;
        Ok(TensorPlace { name, kind, shape, file: 0, offset })
    }
}

fn input_bytes<const N: usize>(input: &mut Input<'_, impl Read>) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    input.fill(&mut bytes)?;
    Ok(bytes)
}
