//! Tensors of new experts, made of those of old ones.

use super::form::Projection;
use super::{LayerSurgery, NewExpert, Part, RouterRule};
use crate::checkpoint::{Checkpoint, Dtype, TensorInfo, Writer, check_finite, decode};
use crate::error::Result;

/// Reads old experts and writes new ones. An expert of one part is copied as it is stored.
pub(super) struct Experts<'a> {
    checkpoint: &'a Checkpoint,
    width: usize,
}

/// An old tensor as it is stored.
struct Stored {
    bytes: Vec<u8>,
    dtype: Dtype,
    cols: usize,
}

impl Stored {
    /// Returns the bytes of `cols` in row `row`.
    fn row(&self, row: usize) -> &[u8] {
        let len = self.cols * self.dtype.size();
        &self.bytes[row * len..][..len]
    }
}

impl<'a> Experts<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, width: usize) -> Experts<'a> {
        Experts { checkpoint, width }
    }

    /// Reads a tensor of which all values are finite.
    fn read(&self, name: &str) -> Result<Stored> {
        let view = self.checkpoint.need_float(name)?;
        let mut bytes = vec![0; view.len as usize];
        self.checkpoint.read_at(view, 0, &mut bytes)?;
        let mut values = vec![0.0; view.numel()];
        decode(&mut values, &bytes, view.dtype);
        check_finite(self.checkpoint.path(), name, &values)?;
        Ok(Stored { bytes, dtype: view.dtype, cols: view.shape.last().copied().unwrap_or(1) })
    }

    /// Writes the projection of an expert.
    pub(super) fn write(
        &self,
        writer: &mut Writer,
        info: &TensorInfo,
        experts: &[NewExpert],
        which: &Projection,
    ) -> Result<()> {
        writer.begin(&info.name)?;
        for NewExpert { parts } in experts {
            let read = |part: &Part| self.read(&which.tensor(part.old));
            let old: Vec<Stored> = parts.iter().map(read).collect::<Result<_>>()?;
            let rows = if which.is_down { info.shape[0] } else { self.width };
            for row in 0..rows {
                match which.is_down {
                    false => write_row(writer, info.dtype, parts, &old, row)?,
                    true => write_columns(writer, info.dtype, parts, &old, row)?,
                }
            }
        }
        Ok(())
    }

    /// Writes the gates of a layer: rows, or values of a vector.
    pub(super) fn write_gates(
        &self,
        writer: &mut Writer,
        info: &TensorInfo,
        layer: &LayerSurgery,
    ) -> Result<()> {
        let old = self.read(&info.name)?;
        if layer.router == RouterRule::Map {
            return writer.write(&info.name, &old.bytes);
        }
        writer.begin(&info.name)?;
        for NewExpert { parts } in &layer.experts {
            match (&parts[..], layer.router) {
                ([first, ..], RouterRule::Rows) => writer.write_chunk(old.row(first.old))?,
                ([only], _) => writer.write_chunk(old.row(only.old))?,
                _ => {
                    let rows = parts.iter().map(|part| (part.weight, old.row(part.old)));
                    writer.write_f32_chunk(&blend(rows, old.dtype))?;
                }
            }
        }
        Ok(())
    }
}

/// Writes row `row` of an expert whose neurons are rows.
fn write_row(writer: &mut Writer, dtype: Dtype, parts: &[Part], old: &[Stored], row: usize) -> Result<()> {
    let place = |part: &Part| part.neurons.as_ref().map_or(row, |order| order[row] as usize);
    if let ([part], [stored]) = (parts, old)
        && stored.dtype == dtype
    {
        return writer.write_chunk(stored.row(place(part)));
    }
    let mut sums = vec![0.0; old[0].cols];
    for (part, stored) in parts.iter().zip(old) {
        add(&mut sums, part.weight, stored.row(place(part)), stored.dtype, None);
    }
    writer.write_f32_chunk(&narrowed(&sums))
}

/// Writes row `row` of an expert whose neurons are columns.
fn write_columns(
    writer: &mut Writer,
    dtype: Dtype,
    parts: &[Part],
    old: &[Stored],
    row: usize,
) -> Result<()> {
    if let ([Part { neurons, .. }], [stored]) = (parts, old)
        && stored.dtype == dtype
    {
        let (bytes, size) = (stored.row(row), dtype.size());
        return match neurons {
            None => writer.write_chunk(bytes),
            Some(order) => {
                let moved: Vec<u8> =
                    order.iter().flat_map(|&j| bytes[j as usize * size..][..size].iter().copied()).collect();
                writer.write_chunk(&moved)
            }
        };
    }
    let mut sums = vec![0.0; old[0].cols];
    for (part, stored) in parts.iter().zip(old) {
        add(&mut sums, part.weight, stored.row(row), stored.dtype, part.neurons.as_deref());
    }
    writer.write_f32_chunk(&narrowed(&sums))
}

/// Adds to `sums` the values of `bytes`, in an order, times `weight`.
fn add(sums: &mut [f64], weight: f64, bytes: &[u8], dtype: Dtype, order: Option<&[u32]>) {
    let mut values = vec![0.0f32; bytes.len() / dtype.size()];
    decode(&mut values, bytes, dtype);
    match order {
        None => sums.iter_mut().zip(&values).for_each(|(sum, value)| *sum += weight * f64::from(*value)),
        Some(order) => {
            sums.iter_mut().zip(order).for_each(|(sum, &j)| *sum += weight * f64::from(values[j as usize]));
        }
    }
}

/// Returns the sum of rows times their weights.
fn blend<'a>(rows: impl Iterator<Item = (f64, &'a [u8])>, dtype: Dtype) -> Vec<f32> {
    let mut sums = Vec::new();
    for (weight, row) in rows {
        sums.resize(row.len() / dtype.size(), 0.0);
        add(&mut sums, weight, row, dtype, None);
    }
    narrowed(&sums)
}

fn narrowed(sums: &[f64]) -> Vec<f32> {
    sums.iter().map(|&sum| sum as f32).collect()
}
