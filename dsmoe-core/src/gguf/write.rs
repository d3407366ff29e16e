//! Writing a GGUF file: its header, then the data of its tensors in order.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::container::{ALIGNMENT, MAGIC};
use super::types::TensorType;
use super::value::Value;
use crate::error::{Error, Result};
use crate::files::{parent, recover, sync_dir};

const VERSION: u32 = 3;
const BUFFER: usize = 1 << 20;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Declared {
    pub(crate) name: String,
    pub(crate) kind: TensorType,
    /// Outermost first.
    pub(crate) shape: Vec<usize>,
}

impl Declared {
    /// Returns the bytes of its data.
    pub(crate) fn len(&self) -> u64 {
        let Some(layout) = self.kind.layout() else { panic!("{} of type {}", self.name, self.kind) };
        self.shape.iter().product::<usize>() as u64 / layout.elements as u64 * layout.bytes as u64
    }
}

/// A GGUF file being written beside its target, which appears when it is complete.
pub(crate) struct GgufWriter {
    target: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
    /// Bytes of the current tensor.
    filled: u64,
}

impl GgufWriter {
    /// Starts the file that is to become `target`, with its header.
    ///
    /// # Errors
    /// `target` is there and `force` is not set, or the file system refuses.
    pub(crate) fn create(
        target: &Path,
        metadata: &[(String, Value)],
        tensors: &[Declared],
        force: bool,
    ) -> Result<GgufWriter> {
        if target.is_dir() {
            return Err(Error::path(target, "is a directory", "name the file in {out}"));
        }
        if target.exists() && !force {
            return Err(Error::path(target, "exists already", "choose another {out} or set {force}"));
        }
        let Some(name) = target.file_name().map(|name| name.to_string_lossy()) else {
            return Err(Error::path(target, "is not the name of a file", "choose another {out}"));
        };
        let folder = parent(target);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        recover(target).map_err(Error::io(target))?;
        let temporary = folder.join(format!(".{name}.tmp-{}", std::process::id()));
        let file = File::create(&temporary).map_err(Error::io(&temporary))?;
        let file = Some(BufWriter::with_capacity(BUFFER, file));
        let mut writer = GgufWriter { target: target.to_path_buf(), temporary, file, filled: 0 };
        let mut header = header(metadata, tensors);
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        writer.put(&header)?;
        Ok(writer)
    }

    /// Appends data of the current tensor.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.filled += bytes.len() as u64;
        self.put(bytes)
    }

    /// Ends the current tensor.
    ///
    /// # Panics
    /// It did not get all of its data.
    pub(crate) fn end(&mut self, tensor: &Declared) -> Result<()> {
        assert!(self.filled == tensor.len(), "gguf: {} bytes of tensor {}", self.filled, tensor.name);
        let padding = self.filled.next_multiple_of(ALIGNMENT) - self.filled;
        self.filled = 0;
        self.put(&vec![0; padding as usize])
    }

    /// Makes the file appear under its name.
    pub(crate) fn commit(mut self) -> Result<()> {
        if let Some(file) = self.file.take() {
            let error = Error::io(&self.temporary);
            let file = file.into_inner().map_err(|cause| cause.into_error()).map_err(error)?;
            file.sync_all().map_err(Error::io(&self.temporary))?;
        }
        fs::rename(&self.temporary, &self.target).map_err(Error::io(&self.target))?;
        let folder = parent(&self.target);
        sync_dir(folder).map_err(Error::io(folder))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.file {
            Some(file) => file.write_all(bytes).map_err(Error::io(&self.temporary)),
            None => Ok(()),
        }
    }
}

impl Drop for GgufWriter {
    fn drop(&mut self) {
        // After a commit there is no such file; a failure here cannot be reported.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn header(metadata: &[(String, Value)], tensors: &[Declared]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut out, key);
        out.extend(type_of(value).to_le_bytes());
        put_value(&mut out, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        put_text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for &n in tensor.shape.iter().rev() {
            out.extend((n as u64).to_le_bytes());
        }
        out.extend(tensor.kind.id().to_le_bytes());
        out.extend(u64::to_le_bytes(offset));
        offset += tensor.len().next_multiple_of(ALIGNMENT);
    }
    out
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Returns the number of the type as which a value is written: integers in 32 bits where they fit.
fn type_of(value: &Value) -> u32 {
    match value {
        Value::Unsigned(n) if u32::try_from(*n).is_ok() => 4,
        Value::Unsigned(_) => 10,
        Value::Signed(n) if i32::try_from(*n).is_ok() => 5,
        Value::Signed(_) => 11,
        Value::F32(_) => 6,
        Value::F64(_) => 12,
        Value::Bool(_) => 7,
        Value::Text(_) => 8,
        Value::List(_) => 9,
    }
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match (value, type_of(value)) {
        (Value::Unsigned(n), 4) => out.extend((*n as u32).to_le_bytes()),
        (Value::Unsigned(n), _) => out.extend(n.to_le_bytes()),
        (Value::Signed(n), 5) => out.extend((*n as i32).to_le_bytes()),
        (Value::Signed(n), _) => out.extend(n.to_le_bytes()),
        (Value::F32(x), _) => out.extend(x.to_le_bytes()),
        (Value::F64(x), _) => out.extend(x.to_le_bytes()),
        (Value::Bool(flag), _) => out.push(u8::from(*flag)),
        (Value::Text(text), _) => put_text(out, text),
        (Value::List(list), _) => {
            let kind = list.first().map_or(8, type_of);
            assert!(list.iter().all(|value| type_of(value) == kind), "gguf: a list of two types");
            out.extend(kind.to_le_bytes());
            out.extend((list.len() as u64).to_le_bytes());
            list.iter().for_each(|value| put_value(out, value));
        }
    }
}
