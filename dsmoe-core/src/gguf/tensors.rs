//! Tensors of a GGUF file as those of Hugging Face: their names, the order of rows, and their values.

use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;

use super::blocks::decode_blocks;
use super::config::Keys;
use super::container::{Container, TensorPlace};
use super::names::{Heads, interleaved, rotated};
use super::rope;
use super::types::{Layout, TensorType};
use crate::checkpoint::Dtype;
use crate::error::{Error, Result};

const UNREAD: &str = "use a file of Q8_0 or F16, or the original model";

/// A tensor of a GGUF file under Hugging Face's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) file: usize,
    pub(crate) encoded: Encoded,
}

/// The stored form of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    kind: TensorType,
    layout: Layout,
    /// First byte in the file.
    offset: u64,
    numel: u64,
    /// The rows of a head, whose halves are interleaved, and the elements of a row.
    head: Option<(usize, usize)>,
    /// True if 1 was added to every value.
    plus_one: bool,
}

/// Returns the tensors of a model, but those that config.json holds in another form.
pub(crate) fn tensors(path: &Path, container: &Container) -> Result<Vec<GgufTensor>> {
    let keys = Keys::new(path, container)?;
    let turned = |place: &TensorPlace| rotated(&keys.arch.hf_name(&place.name)).is_some();
    let (heads, kv_heads, head_dim) = match container.tensors.iter().any(turned) {
        true => keys.heads()?,
        false => (0, 0, 0),
    };
    let kept = container.tensors.iter().filter(|place| !rope::TENSORS.contains(&place.name.as_str()));
    let tensor = |place: &TensorPlace| {
        let name = keys.arch.hf_name(&place.name);
        let rows = place.shape.first().map_or(1, |&rows| rows as u64);
        let expected = rotated(&name).filter(|_| keys.arch.interleaved).map(|of| match of {
            Heads::Query => heads,
            Heads::Key => kv_heads,
        });
        let head = match expected {
            // A tensor of another shape is refused with the configuration's shape in the message.
            Some(heads) if Some(rows) == heads.checked_mul(head_dim) && head_dim % 2 == 0 => {
                Some((head_dim as usize, place.shape[1..].iter().product()))
            }
            _ => None,
        };
        let plus_one = keys.arch.norm_plus_one && name.ends_with("norm.weight");
        let file = &container.files[place.file];
        let encoded = Encoded::new(file, place, head, plus_one)?;
        Ok(GgufTensor { name, shape: place.shape.clone(), file: place.file, encoded })
    };
    kept.map(tensor).collect()
}

impl Encoded {
    fn new(
        path: &Path,
        place: &TensorPlace,
        head: Option<(usize, usize)>,
        plus_one: bool,
    ) -> Result<Encoded> {
        let fail = |problem: String| Err(Error::tensor(path, &place.name, problem, UNREAD));
        let Some(layout) = place.kind.layout() else {
            return fail(format!("is of type {}, which is not read", place.kind));
        };
        if head.is_some_and(|(rows, cols)| !(rows * cols).is_multiple_of(layout.elements)) {
            return fail(format!("is of type {}, whose blocks hold parts of two heads", place.kind));
        }
        Ok(Encoded { kind: place.kind, layout, offset: place.offset, numel: place.numel(), head, plus_one })
    }

    /// Returns the type as which the values are given: the stored one where it is a float, else f32.
    pub(crate) fn dtype(&self) -> Dtype {
        match self.kind {
            TensorType::F16 if !self.plus_one => Dtype::F16,
            TensorType::BF16 if !self.plus_one => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    /// Returns the stored type.
    pub(crate) fn kind(&self) -> TensorType {
        self.kind
    }

    /// Returns the first byte in the file.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the part of `numel` elements from element `first` on.
    ///
    /// # Panics
    /// It is not of whole blocks, or cuts a head whose rows are in another order.
    pub(crate) fn part(&self, first: usize, numel: usize) -> Encoded {
        let unit = self.head.map_or(self.layout.elements, |(rows, cols)| rows * cols);
        assert!(first.is_multiple_of(unit) && numel.is_multiple_of(unit), "gguf: part of a block");
        let offset = self.offset + (first / self.layout.elements * self.layout.bytes) as u64;
        Encoded { offset, numel: numel as u64, ..self.clone() }
    }

    /// Returns the bytes in the file.
    pub(crate) fn stored_len(&self) -> u64 {
        self.numel / self.layout.elements as u64 * self.layout.bytes as u64
    }

    /// Returns the bytes of an element in the file, at most.
    pub(crate) fn stored_size(&self) -> usize {
        self.layout.bytes.div_ceil(self.layout.elements)
    }

    /// Sets `out` to the values from byte `first` on, of [`Encoded::dtype`]. `read` reads bytes of the file.
    ///
    /// # Errors
    /// Those of `read`.
    ///
    /// # Panics
    /// The bytes are not whole elements of the tensor.
    pub(crate) fn read(
        &self,
        first: u64,
        out: &mut [u8],
        read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let size = self.dtype().size();
        assert!(first.is_multiple_of(size as u64) && out.len().is_multiple_of(size), "gguf: whole elements");
        let (first, count) = (first / size as u64, (out.len() / size) as u64);
        assert!(first + count <= self.numel, "gguf: elements of a tensor of {}", self.numel);
        let unit = self.head.map_or(self.layout.elements, |(rows, cols)| rows * cols) as u64;
        let start = first / unit * unit;
        let end = (first + count).next_multiple_of(unit).min(self.numel);
        if self.head.is_none() && (start, end) == (first, first + count) {
            return self.decode(start, out, read);
        }
        let mut units = vec![0; (end - start) as usize * size];
        self.decode(start, &mut units, read)?;
        let skipped = (first - start) as usize * size;
        match self.head {
            None => out.copy_from_slice(&units[skipped..][..out.len()]),
            Some((rows, cols)) => {
                let row = cols * size;
                let mut ordered = vec![0; units.len()];
                let from: Vec<usize> = interleaved(rows, units.len() / row).collect();
                ordered.par_chunks_mut(row).zip(&from).for_each(|(out, &from)| {
                    out.copy_from_slice(&units[from * row..][..row]);
                });
                out.copy_from_slice(&ordered[skipped..][..out.len()]);
            }
        }
        Ok(())
    }

    /// Sets `out` to whole blocks from element `first` on, in the order of the file.
    fn decode(
        &self,
        first: u64,
        out: &mut [u8],
        read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let Layout { elements, bytes } = self.layout;
        let count = out.len() / self.dtype().size();
        let at = self.offset + first / elements as u64 * bytes as u64;
        if elements == 1 && bytes == self.dtype().size() {
            read(at, out)?;
        } else {
            let mut stored = vec![0; count / elements * bytes];
            read(at, &mut stored)?;
            match self.kind {
                TensorType::F16 => widen(out, &stored, |b| f16::from_le_bytes(b).to_f32()),
                TensorType::BF16 => widen(out, &stored, |b| bf16::from_le_bytes(b).to_f32()),
                kind => decode_blocks(out, &stored, kind),
            }
        }
        if self.plus_one {
            for value in out.as_chunks_mut::<4>().0 {
                *value = (f32::from_le_bytes(*value) - 1.0).to_le_bytes();
            }
        }
        Ok(())
    }
}

fn widen(out: &mut [u8], stored: &[u8], value: impl Fn([u8; 2]) -> f32) {
    for (out, stored) in out.as_chunks_mut::<4>().0.iter_mut().zip(stored.as_chunks::<2>().0) {
        *out = value(*stored).to_le_bytes();
    }
}
