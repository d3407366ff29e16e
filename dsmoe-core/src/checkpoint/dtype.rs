//! Element types of stored tensors, and their conversion from and to f32.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::{Error, Result, shown};

/// Elements converted by one task.
const TASK: usize = 1 << 15;
/// Side of the blocks of a transposition.
const BLOCK: usize = 32;

/// Element type of a stored tensor.
///
/// ```
/// use dsmoe_core::checkpoint::Dtype;
///
/// let dtype: Dtype = "bfloat16".parse()?;
/// assert_eq!((dtype, dtype.size(), dtype.is_float()), (Dtype::BF16, 2, true));
/// let mut values = [1.0, 1.001];
/// dtype.round(&mut values);
/// assert_eq!(values, [1.0, 1.0]);
/// // Weights are not written as integers.
/// assert!("i8".parse::<Dtype>().is_err());
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of the safetensors format")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

const NAMES: [(Dtype, &str, usize); 16] = [
    (Dtype::F64, "F64", 8),
    (Dtype::F32, "F32", 4),
    (Dtype::F16, "F16", 2),
    (Dtype::BF16, "BF16", 2),
    (Dtype::F8E4M3, "F8_E4M3", 1),
    (Dtype::F8E5M2, "F8_E5M2", 1),
    (Dtype::F8E8M0, "F8_E8M0", 1),
    (Dtype::I64, "I64", 8),
    (Dtype::I32, "I32", 4),
    (Dtype::I16, "I16", 2),
    (Dtype::I8, "I8", 1),
    (Dtype::U64, "U64", 8),
    (Dtype::U32, "U32", 4),
    (Dtype::U16, "U16", 2),
    (Dtype::U8, "U8", 1),
    (Dtype::Bool, "BOOL", 1),
];

impl Dtype {
    /// Returns the size of an element in bytes.
    pub fn size(self) -> usize {
        NAMES[self as usize].2
    }

    /// Returns whether tensors of this type can be read and written as f32.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    /// Rounds `values` to those that this type can store; what is too large for it becomes infinite.
    ///
    /// # Panics
    /// It is not a float.
    pub fn round(self, values: &mut [f32]) {
        let all = |values: &mut [f32], round: fn(f32) -> f32| {
            values.par_chunks_mut(TASK).for_each(|part| part.iter_mut().for_each(|x| *x = round(*x)));
        };
        match self {
            Dtype::F32 | Dtype::F64 => {}
            Dtype::F16 => all(values, |x| f16::from_f32(x).to_f32()),
            Dtype::BF16 => all(values, |x| bf16::from_f32(x).to_f32()),
            _ => panic!("round: {self} is not a float"),
        }
    }

    pub(crate) fn from_stored(name: &str) -> Option<Dtype> {
        NAMES.iter().find(|(_, stored, _)| *stored == name).map(|&(dtype, _, _)| dtype)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES[*self as usize].1)
    }
}

impl FromStr for Dtype {
    type Err = Error;

    /// Parses the types that weights are written as: `f32`, `f16`, `bf16`, in any case.
    fn from_str(s: &str) -> Result<Dtype> {
        match s.to_ascii_lowercase().as_str() {
            "f32" | "float32" => Ok(Dtype::F32),
            "f16" | "float16" => Ok(Dtype::F16),
            "bf16" | "bfloat16" => Ok(Dtype::BF16),
            _ => Err(Error::argument(format!("unknown dtype `{}`", shown(s)), "use bf16, f16 or f32")),
        }
    }
}

/// Converts little-endian elements of `dtype` to f32.
///
/// # Panics
/// `dtype` is not a float, or the lengths do not fit.
pub(crate) fn decode(out: &mut [f32], bytes: &[u8], dtype: Dtype) {
    fn each<const N: usize>(out: &mut [f32], bytes: &[u8], value: impl Fn([u8; N]) -> f32 + Sync) {
        assert_eq!(out.len() * N, bytes.len(), "decode: f32s and bytes");
        out.par_chunks_mut(TASK).zip(bytes.par_chunks(TASK * N)).for_each(|(out, bytes)| {
            for (out, element) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *out = value(*element);
            }
        });
    }
    match dtype {
        Dtype::F32 => each(out, bytes, f32::from_le_bytes),
        Dtype::F64 => each(out, bytes, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => each(out, bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(out, bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => panic!("decode: {dtype} is not a float"),
    }
}

/// Converts f32 to little-endian elements of `dtype`.
///
/// # Panics
/// `dtype` is not a float, or the lengths do not fit.
pub(crate) fn encode(out: &mut [u8], values: &[f32], dtype: Dtype) {
    fn each<const N: usize>(out: &mut [u8], values: &[f32], bytes: impl Fn(f32) -> [u8; N] + Sync) {
        assert_eq!(values.len() * N, out.len(), "encode: f32s and bytes");
        out.par_chunks_mut(TASK * N).zip(values.par_chunks(TASK)).for_each(|(out, values)| {
            for (out, &value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
                *out = bytes(value);
            }
        });
    }
    match dtype {
        Dtype::F32 => each(out, values, f32::to_le_bytes),
        Dtype::F64 => each(out, values, |x| f64::from(x).to_le_bytes()),
        Dtype::F16 => each(out, values, |x| f16::from_f32(x).to_le_bytes()),
        Dtype::BF16 => each(out, values, |x| bf16::from_f32(x).to_le_bytes()),
        _ => panic!("encode: {dtype} is not a float"),
    }
}

/// Returns a finite value that is beyond the largest of `dtype`, if there is one: [`encode`] would make it infinite.
pub(crate) fn is_too_large(values: &[f32], dtype: Dtype) -> Option<f32> {
    let largest = match dtype {
        Dtype::F16 => f16::MAX.to_f32(),
        Dtype::BF16 => bf16::MAX.to_f32(),
        _ => return None,
    };
    let large = |values: &[f32]| values.iter().copied().find(|x| x.is_finite() && x.abs() > largest);
    values.par_chunks(TASK).find_map_first(large)
}

/// Says that a tensor holds `value`, which is too large for `kind`, and which types hold it.
pub(crate) fn too_large(value: f32, kind: impl fmt::Display) -> (String, &'static str) {
    let fits = is_too_large(&[value], Dtype::BF16).is_none();
    let help = if fits { "set {dtype} to bf16 or f32" } else { "set {dtype} to f32" };
    (format!("holds {value}, which {kind} cannot store"), help)
}

/// Returns whether all `values` are finite.
pub(crate) fn all_finite(values: &[f32]) -> bool {
    values.par_chunks(TASK).all(|values| values.iter().all(|x| x.is_finite()))
}

/// Converts elements `[rows, cols]` of `dtype` to f32 `[cols, rows]`.
///
/// # Panics
/// `dtype` is not a float, or the lengths do not fit.
pub(crate) fn decode_transposed(out: &mut [f32], bytes: &[u8], dtype: Dtype, rows: usize, cols: usize) {
    assert_eq!(bytes.len(), rows * cols * dtype.size(), "decode: bytes and [rows, cols]");
    fn at<const N: usize>(bytes: &[u8], i: usize) -> [u8; N] {
        bytes.as_chunks::<N>().0[i]
    }
    match dtype {
        Dtype::F32 => transpose_by(out, rows, cols, |i| f32::from_le_bytes(at(bytes, i))),
        Dtype::F64 => transpose_by(out, rows, cols, |i| f64::from_le_bytes(at(bytes, i)) as f32),
        Dtype::F16 => transpose_by(out, rows, cols, |i| f16::from_le_bytes(at(bytes, i)).to_f32()),
        Dtype::BF16 => transpose_by(out, rows, cols, |i| bf16::from_le_bytes(at(bytes, i)).to_f32()),
        _ => panic!("decode: {dtype} is not a float"),
    }
}

/// Sets `out` `[cols, rows]` to the transpose of `values` `[rows, cols]`.
///
/// # Panics
/// The lengths are not `rows * cols`.
pub fn transpose(out: &mut [f32], values: &[f32], rows: usize, cols: usize) {
    assert_eq!(values.len(), rows * cols, "transpose: values and [rows, cols]");
    transpose_by(out, rows, cols, |i| values[i]);
}

fn transpose_by(out: &mut [f32], rows: usize, cols: usize, value: impl Fn(usize) -> f32 + Sync) {
    assert_eq!(out.len(), rows * cols, "transpose: out and [cols, rows]");
    if out.is_empty() {
        return;
    }
    out.par_chunks_mut(BLOCK * rows).enumerate().for_each(|(block, out)| {
        for first in (0..rows).step_by(BLOCK) {
            let last = rows.min(first + BLOCK);
            for (j, out) in out.chunks_exact_mut(rows).enumerate() {
                let col = block * BLOCK + j;
                for (row, out) in (first..last).zip(&mut out[first..last]) {
                    *out = value(row * cols + col);
                }
            }
        }
    });
}

/// Refuses a value that is not finite, in the tensor `name` of the checkpoint at `path`.
pub(crate) fn check_finite(path: &Path, name: &str, values: &[f32]) -> Result<()> {
    if all_finite(values) {
        return Ok(());
    }
    let problem = "holds a value that is not finite";
    Err(Error::tensor(path, name, problem, "take an undamaged copy of the checkpoint"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, (dtype, name, _)) in NAMES.into_iter().enumerate() {
            assert_eq!(dtype as usize, i);
            assert_eq!(Dtype::from_stored(name), Some(dtype));
        }
        assert_eq!(Dtype::from_stored("F4"), None);
        let error = "int8".parse::<Dtype>().unwrap_err().to_string();
        assert_eq!(error, "unknown dtype `int8`; use bf16, f16 or f32");
    }

    #[test]
    fn floats_survive_their_types() {
        let values: Vec<f32> = (0..70_000).map(|i| (i as f32 - 35_000.0) / 64.0).collect();
        for (dtype, tolerance) in
            [(Dtype::F32, 0.0), (Dtype::F64, 0.0), (Dtype::F16, 1.0 / 2048.0), (Dtype::BF16, 1.0 / 256.0)]
        {
            let mut bytes = vec![0; values.len() * dtype.size()];
            encode(&mut bytes, &values, dtype);
            let mut back = vec![0.0; values.len()];
            decode(&mut back, &bytes, dtype);
            for (a, b) in values.iter().zip(&back) {
                assert!((a - b).abs() <= tolerance * a.abs(), "{dtype}: {a} {b}");
            }
            let mut rounded = values.clone();
            dtype.round(&mut rounded);
            assert_eq!(rounded, back, "{dtype}");
        }
    }

    #[test]
    fn a_value_that_is_too_large_is_said_to_fit_where_it_does() {
        assert_eq!(is_too_large(&[1.0, f32::INFINITY, -65520.0], Dtype::F16), Some(-65520.0));
        assert_eq!(is_too_large(&[3.38e38, 3.4e38], Dtype::BF16), Some(3.4e38));
        assert_eq!(is_too_large(&[3.4e38], Dtype::F32), None);
        assert_eq!(too_large(7e4, Dtype::F16).1, "set {dtype} to bf16 or f32");
        assert_eq!(too_large(-3.4e38, Dtype::BF16).1, "set {dtype} to f32");
        assert_eq!(too_large(3.4e38, Dtype::F16).1, "set {dtype} to f32");
        assert!(all_finite(&[0.0, -f32::MAX]) && all_finite(&[]));
        assert!(!all_finite(&[0.0, f32::NAN]) && !all_finite(&[f32::NEG_INFINITY]));
    }

    #[test]
    fn transposition_moves_every_element() {
        for (rows, cols) in [(1, 1), (3, 70), (70, 3), (65, 33), (0, 4)] {
            let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let mut out = vec![-1.0; values.len()];
            transpose(&mut out, &values, rows, cols);
            let mut bytes = vec![0; values.len() * 4];
            encode(&mut bytes, &values, Dtype::F32);
            let mut decoded = vec![-1.0; values.len()];
            decode_transposed(&mut decoded, &bytes, Dtype::F32, rows, cols);
            for r in 0..rows {
                for c in 0..cols {
                    assert_eq!(out[c * rows + r], values[r * cols + c]);
                    assert_eq!(decoded[c * rows + r], values[r * cols + c]);
                }
            }
        }
    }
}
