//! Tensors of new experts, made of those of old ones.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::form::{NewGate, Projection};
use super::{NewExpert, Part};
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

/// The part of an old expert, with its place in the tensor that holds it.
struct Place<'a> {
    part: &'a Part,
    stored: Rc<Stored>,
    /// Its first neuron there.
    first: usize,
}

impl Stored {
    /// Returns the bytes of a row.
    fn row(&self, row: usize) -> &[u8] {
        let len = self.cols * self.dtype.size();
        &self.bytes[row * len..][..len]
    }
}

impl Place<'_> {
    /// Returns the row of a neuron, where neurons are rows.
    fn neuron(&self, neuron: usize) -> &[u8] {
        let place = self.part.neurons.as_ref().map_or(neuron, |order| order[neuron] as usize);
        self.stored.row(self.first + place)
    }

    /// Returns the values of a row for the neurons of the expert, where neurons are columns.
    fn of_row(&self, row: usize, width: usize) -> &[u8] {
        let size = self.stored.dtype.size();
        &self.stored.row(row)[self.first * size..][..width * size]
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
        let cols = if view.shape.len() > 1 { view.shape[view.shape.len() - 1] } else { 1 };
        Ok(Stored { bytes, dtype: view.dtype, cols })
    }

    /// Writes a projection of experts.
    pub(super) fn write(
        &self,
        writer: &mut Writer,
        info: &TensorInfo,
        experts: &[NewExpert],
        which: &Projection,
    ) -> Result<()> {
        // One tensor may hold several experts.
        let mut read: BTreeMap<String, Rc<Stored>> = BTreeMap::new();
        let mut places = Vec::with_capacity(experts.len());
        for NewExpert { parts } in experts {
            let mut of_expert = Vec::with_capacity(parts.len());
            for part in parts {
                let name = which.tensor(part.old);
                if !read.contains_key(&name) {
                    read.insert(name.clone(), Rc::new(self.read(&name)?));
                }
                let first = which.first_neuron(part.old, self.width);
                of_expert.push(Place { part, stored: Rc::clone(&read[&name]), first });
            }
            places.push(of_expert);
        }
        writer.begin(&info.name)?;
        if which.is_down {
            for row in 0..info.shape[0] {
                places.iter().try_for_each(|of| self.write_columns(writer, info.dtype, of, row))?;
            }
            return Ok(());
        }
        places.iter().try_for_each(|of| {
            (0..self.width).try_for_each(|neuron| write_neuron(writer, info.dtype, of, neuron))
        })
    }

    /// Writes row `row` of an expert whose neurons are columns.
    fn write_columns(
        &self,
        writer: &mut Writer,
        dtype: Dtype,
        places: &[Place<'_>],
        row: usize,
    ) -> Result<()> {
        if let [only] = places
            && only.stored.dtype == dtype
        {
            let (bytes, size) = (only.of_row(row, self.width), dtype.size());
            return match &only.part.neurons {
                None => writer.write_chunk(bytes),
                Some(order) => {
                    let value = |&j: &u32| bytes[j as usize * size..][..size].iter().copied();
                    writer.write_chunk(&order.iter().flat_map(value).collect::<Vec<u8>>())
                }
            };
        }
        let mut sums = vec![0.0; self.width];
        for place in places {
            let Place { part, stored, .. } = place;
            let bytes = place.of_row(row, self.width);
            add(&mut sums, part.weight, bytes, stored.dtype, part.neurons.as_deref());
        }
        writer.write_f32_chunk(&narrowed(&sums))
    }

    /// Writes the gates of a layer, all old ones where none are given: rows, or values of a vector.
    pub(super) fn write_gates(
        &self,
        writer: &mut Writer,
        info: &TensorInfo,
        gates: Option<&[NewGate]>,
    ) -> Result<()> {
        let old = self.read(&info.name)?;
        let Some(gates) = gates else { return writer.write(&info.name, &old.bytes) };
        writer.begin(&info.name)?;
        for NewGate { parts, .. } in gates {
            match &parts[..] {
                [(only, _)] => writer.write_chunk(old.row(*only))?,
                _ => {
                    let rows = parts.iter().map(|&(gate, weight)| (weight, old.row(gate), old.dtype));
                    writer.write_f32_chunk(&blend(rows))?;
                }
            }
        }
        Ok(())
    }
}

/// Writes a neuron of an expert whose neurons are rows.
fn write_neuron(writer: &mut Writer, dtype: Dtype, places: &[Place<'_>], neuron: usize) -> Result<()> {
    if let [only] = places
        && only.stored.dtype == dtype
    {
        return writer.write_chunk(only.neuron(neuron));
    }
    let rows = places.iter().map(|place| (place.part.weight, place.neuron(neuron), place.stored.dtype));
    writer.write_f32_chunk(&blend(rows))
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
fn blend<'a>(rows: impl Iterator<Item = (f64, &'a [u8], Dtype)>) -> Vec<f32> {
    let mut sums = Vec::new();
    for (weight, row, dtype) in rows {
        sums.resize(row.len() / dtype.size(), 0.0);
        add(&mut sums, weight, row, dtype, None);
    }
    narrowed(&sums)
}

fn narrowed(sums: &[f64]) -> Vec<f32> {
    sums.iter().map(|&sum| sum as f32).collect()
}
