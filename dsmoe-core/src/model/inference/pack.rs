//! Packs the weights of a model in memory, or of a directory tensor by tensor.

use std::ops::Range;
use std::path::Path;

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::kept::Columns;
use dsmoe_kernels::matmul::{Mat, Packed};
use half::bf16;
use half::slice::HalfFloatSliceExt;

use crate::accounting::Accounting;
use crate::checkpoint::{WeightReader, open_model};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ffn::{Ffn, PackedFfn};
use crate::kept::{GROUPS, LayerThresholds, Linears};
use crate::masks::Masks;
use crate::model::arena::Model;
use crate::model::tensors::{Ranges, ffns_of, lay_out};
use crate::params::Layout;

/// One decoder layer. Matrices are `[outputs, inputs]`.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) before_attention: Option<Buf>,
    pub(crate) qkv: Linears<3>,
    pub(crate) o: Linears<1>,
    /// Biases of q, k and v.
    pub(crate) qkv_bias: Option<[Buf; 3]>,
    pub(crate) o_bias: Option<Buf>,
    /// Norms of queries and of keys.
    pub(crate) qk_norm: Option<[Buf; 2]>,
    pub(crate) after_attention: Option<Buf>,
    pub(crate) before_ffn: Option<Buf>,
    pub(crate) ffn: Box<dyn PackedFfn>,
    /// True if the output of the FFN is 0 in place of what it computes.
    pub(crate) skips_ffn: bool,
    pub(crate) after_ffn: Option<Buf>,
}

impl Layer {
    pub(crate) fn bytes(&self) -> usize {
        let matrices = self.qkv.bytes() + self.o.bytes();
        let norms = [&self.before_attention, &self.after_attention, &self.before_ffn, &self.after_ffn];
        let vectors = norms.into_iter().chain([&self.o_bias]).flatten();
        let heads = self.qkv_bias.iter().flatten().chain(self.qk_norm.iter().flatten());
        let values: usize = vectors.chain(heads).map(|vector| vector.len()).sum();
        matrices + 4 * values + self.ffn.bytes()
    }
}

/// Source of the tokens' first hidden states.
#[derive(Debug)]
pub(crate) enum Embedding {
    /// The output head's rows.
    Tied,
    /// A table `[vocab, hidden]`.
    F32(Buf),
    /// A table `[vocab, hidden]` in bf16.
    Bf16(Vec<bf16>),
}

impl Embedding {
    /// Sets `out` `[ids.len(), hidden]` to the rows `ids`.
    pub(crate) fn rows(&self, out: &mut [f32], ids: &[u32], head: &Packed) {
        let hidden = head.inputs();
        for (out, &id) in out.chunks_exact_mut(hidden).zip(ids) {
            let id = id as usize;
            match self {
                Embedding::Tied => head.row(id, out),
                Embedding::F32(table) => out.copy_from_slice(&table[id * hidden..][..hidden]),
                Embedding::Bf16(table) => table[id * hidden..][..hidden].convert_to_f32_slice(out),
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Embedding::Tied => 0,
            Embedding::F32(table) => 4 * table.len(),
            Embedding::Bf16(table) => 2 * table.len(),
        }
    }
}

/// Source of weights. A tensor is named by its range in an arena.
pub(crate) trait Source {
    /// Gives the rows of a matrix to `sink`, in order, in pieces.
    fn rows(&mut self, matrix: &Range<usize>, sink: &mut dyn FnMut(&[f32])) -> Result<()>;
    /// Returns adjacent tensors as they lie in the arena.
    fn part(&mut self, range: &Range<usize>) -> Result<&[f32]>;
}

/// An arena.
impl Source for &[f32] {
    fn rows(&mut self, matrix: &Range<usize>, sink: &mut dyn FnMut(&[f32])) -> Result<()> {
        sink(&self[matrix.clone()]);
        Ok(())
    }

    fn part(&mut self, range: &Range<usize>) -> Result<&[f32]> {
        Ok(&self[range.clone()])
    }
}

/// A directory: one part at a time is in memory.
struct Stored<'a> {
    layout: &'a Layout,
    reader: WeightReader<'a>,
    part: Buf,
}

impl Source for Stored<'_> {
    fn rows(&mut self, matrix: &Range<usize>, sink: &mut dyn FnMut(&[f32])) -> Result<()> {
        self.layout.within(matrix).iter().try_for_each(|entry| self.reader.rows(&entry.spec, sink))
    }

    fn part(&mut self, range: &Range<usize>) -> Result<&[f32]> {
        self.part.resize(range.len());
        for entry in self.layout.within(range) {
            let out = &mut self.part[entry.range.start - range.start..][..entry.range.len()];
            self.reader.read(&entry.spec, out)?;
        }
        Ok(&self.part)
    }
}

/// A model that is to be packed.
pub(crate) struct Parts<'a> {
    pub(crate) config: Config,
    pub(crate) accounting: Accounting,
    pub(crate) ffns: &'a [Box<dyn Ffn>],
    pub(crate) ranges: &'a Ranges,
    pub(crate) source: &'a mut dyn Source,
}

/// Gives `model` to `pack`.
pub(crate) fn of_model<R>(model: &Model, pack: impl FnOnce(Parts<'_>) -> Result<R>) -> Result<R> {
    pack(Parts {
        config: model.config.clone(),
        accounting: model.accounting(),
        ffns: &model.ffns,
        ranges: &model.ranges,
        source: &mut &model.params[..],
    })
}

/// Gives the model in `dir` to `pack`; of its weights one part at a time is in memory.
pub(crate) fn of_directory<R>(dir: &Path, pack: impl FnOnce(Parts<'_>) -> Result<R>) -> Result<R> {
    let config = Config::load(dir)?;
    let checkpoint = open_model(dir, &config)?;
    let masks = Masks::read(dir, &config)?;
    if masks.is_some() && config.thresholds.is_some() {
        let help = "remove masks.safetensors or activation_thresholds of config.json";
        return Err(Error::path(dir, "has both masks of weights and thresholds of inputs", help));
    }
    let counts = Accounting::of(&config);
    let accounting = masks.as_ref().map_or(counts, |masks| counts.with_masks(masks));
    let reader = WeightReader::new(&config, &checkpoint, masks.as_ref())?;
    let ffns = ffns_of(&config);
    let (layout, ranges) = lay_out(&config, &ffns);
    let mut source = Stored { layout: &layout, reader, part: Buf::default() };
    let config = config.clone();
    pack(Parts { config, accounting, ffns: &ffns, ranges: &ranges, source: &mut source })
}

/// Packs a matrix with `inputs` columns.
pub(crate) fn pack(
    source: &mut dyn Source,
    matrix: &Range<usize>,
    inputs: usize,
    precision: Precision,
) -> Result<Packed> {
    let mut packed = Packed::zeros(precision, matrix.len() / inputs, inputs);
    let mut first = 0;
    source.rows(matrix, &mut |values| {
        let rows = values.len() / inputs;
        packed.set_rows(first, Mat::new(values, rows, inputs));
        first += rows;
    })?;
    Ok(packed)
}

/// Packs the linears of a group, all with `inputs` columns; of those with thresholds, column by column.
pub(crate) fn linears<const N: usize>(
    source: &mut dyn Source,
    matrices: [&Range<usize>; N],
    inputs: usize,
    precision: Precision,
    (group, layer, thresholds): (usize, usize, Option<&LayerThresholds>),
) -> Result<Linears<N>> {
    let group = GROUPS[group].clone();
    let Some(thresholds) = thresholds.filter(|thresholds| thresholds.skips_in(group.clone())) else {
        let mut packed = Vec::with_capacity(N);
        for matrix in matrices {
            packed.push(pack(source, matrix, inputs, precision)?);
        }
        return Ok(Linears::Whole(packed.try_into().expect("as many matrices")));
    };
    let mut weights = Vec::with_capacity(N);
    for matrix in matrices {
        let mut columns = Columns::zeros(precision, matrix.len() / inputs, inputs);
        let mut first = 0;
        source.rows(matrix, &mut |values| {
            let rows = values.len() / inputs;
            columns.set_rows(first, Mat::new(values, rows, inputs));
            first += rows;
        })?;
        weights.push(columns);
    }
    let thresholds = std::array::from_fn(|i| thresholds.inputs[group.start + i]);
    let weights = weights.try_into().expect("as many matrices");
    Ok(Linears::Kept { weights, thresholds, at: (layer, group.start) })
}

/// Sets all of `table`, piece by piece.
pub(crate) fn fill<T>(
    table: &mut [T],
    source: &mut dyn Source,
    matrix: &Range<usize>,
    set: impl Fn(&mut [T], &[f32]),
) -> Result<()> {
    let mut first = 0;
    source.rows(matrix, &mut |values| {
        set(&mut table[first..first + values.len()], values);
        first += values.len();
    })
}

/// Copies a vector of the source, where there is one.
pub(crate) fn optional(source: &mut dyn Source, range: Option<&Range<usize>>) -> Result<Option<Buf>> {
    range.map(|range| Ok(vector(source.part(range)?))).transpose()
}

pub(crate) fn vector(values: &[f32]) -> Buf {
    let mut buf = Buf::zeros(values.len());
    buf.copy_from_slice(values);
    buf
}
