//! Masks of pruned linears, and their file.
//!
//! `masks.safetensors` in a model directory holds, per masked weight, one U8 tensor of the weight's name and shape
//! `[rows, cols.div_ceil(8)]`, rows and columns as the checkpoint stores the weight (`[out, in]`): bit `c % 8` of byte
//! `c / 8`, the lowest first, is 1 where the weight of column c is kept. What is not kept is 0 and stays 0 in training.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, Dtype, MANIFEST_FILE, Manifest, TensorInfo, Writer, tensor_names};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::is_present;
use crate::params::{Layout, Stored};

/// Name of the masks in a model directory.
pub const MASKS_FILE: &str = "masks.safetensors";
const BITS: usize = 8;

/// Mask of the weights of one linear: a bit is 1 where the weight is kept.
///
/// ```
/// use dsmoe_core::masks::Mask;
///
/// // One row of ten columns: the first four are pruned, and the last one.
/// let mask = Mask::from_bits(1, 10, vec![0b1111_0000, 0b01]);
/// assert_eq!((mask.kept(), mask.pruned()), (5, 5));
/// assert!(!mask.keeps(0, 3) && mask.keeps(0, 4));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    /// `[rows, cols.div_ceil(8)]`; bits behind the last column are 0.
    bits: Vec<u8>,
}

impl fmt::Debug for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mask({} of {} x {} kept)", self.kept(), self.rows, self.cols)
    }
}

impl Mask {
    fn new(rows: usize, cols: usize, keep: impl Fn(usize, usize) -> bool + Sync) -> Mask {
        let stride = cols.div_ceil(BITS);
        let mut bits = vec![0u8; rows * stride];
        bits.par_chunks_mut(stride.max(1)).enumerate().for_each(|(row, bits)| {
            for col in (0..cols).filter(|&col| keep(row, col)) {
                bits[col / BITS] |= 1 << (col % BITS);
            }
        });
        Mask { rows, cols, bits }
    }

    /// Makes a mask of the bits of [`MASKS_FILE`]: `[rows, cols.div_ceil(8)]`.
    ///
    /// # Panics
    /// There are not as many bytes, or bits behind the last column.
    pub fn from_bits(rows: usize, cols: usize, bits: Vec<u8>) -> Mask {
        let mask = Mask { rows, cols, bits };
        assert!(
            mask.bits.len() == rows * mask.stride() && !mask.has_bits_behind(),
            "mask: {} bytes for {rows} x {cols}",
            mask.bits.len()
        );
        mask
    }

    /// Returns the number of rows of the weight as stored.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns of the weight as stored.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns whether the weight at `(row, col)` is kept.
    ///
    /// # Panics
    /// It is outside the weight.
    pub fn keeps(&self, row: usize, col: usize) -> bool {
        assert!(row < self.rows && col < self.cols, "mask: ({row}, {col}) of {self:?}");
        self.bits[row * self.stride() + col / BITS] >> (col % BITS) & 1 == 1
    }

    /// Returns the number of weights that are kept.
    pub fn kept(&self) -> u64 {
        self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// Returns the number of pruned weights.
    pub fn pruned(&self) -> u64 {
        (self.rows * self.cols) as u64 - self.kept()
    }

    fn stride(&self) -> usize {
        self.cols.div_ceil(BITS)
    }

    fn has_bits_behind(&self) -> bool {
        let last = self.cols % BITS;
        last != 0 && self.bits.chunks_exact(self.stride()).any(|bits| bits[self.cols / BITS] >> last != 0)
    }

    /// Sets what is not kept to 0 in the weight as it is in memory.
    fn zero(&self, values: &mut [f32], stored: Stored) {
        let (rows, cols, stride) = (self.rows, self.cols, self.stride());
        match stored {
            Stored::AsIs => {
                let lines = values.par_chunks_mut(cols).zip(self.bits.par_chunks(stride));
                lines.for_each(|(values, bits)| {
                    for (values, &bits) in values.chunks_mut(BITS).zip(bits) {
                        if bits != u8::MAX {
                            each_pruned(bits, values.len(), |bit| values[bit] = 0.0);
                        }
                    }
                });
            }
            // Eight columns as stored are eight rows in memory, and share their bytes.
            Stored::Transposed => values.par_chunks_mut(BITS * rows).enumerate().for_each(|(i, values)| {
                let lines = values.len() / rows;
                for row in 0..rows {
                    let bits = self.bits[row * stride + i];
                    if bits != u8::MAX {
                        each_pruned(bits, lines, |bit| values[bit * rows + row] = 0.0);
                    }
                }
            }),
        }
    }

    /// Returns the first place `(row, col)` as stored that is not kept and not 0.
    pub(crate) fn first_nonzero(&self, values: &[f32], stored: Stored) -> Option<(usize, usize)> {
        match stored {
            Stored::AsIs => self.first_nonzero_row(values, 0),
            Stored::Transposed => {
                let wrong =
                    |row: &usize, col: usize| values[col * self.rows + row] != 0.0 && !self.keeps(*row, col);
                let row = |row| (0..self.cols).find(|&col| wrong(&row, col)).map(|col| (row, col));
                (0..self.rows).into_par_iter().find_map_first(row)
            }
        }
    }

    /// Does as [`Mask::first_nonzero`] in whole rows as stored, the first of which is `first`.
    pub(crate) fn first_nonzero_row(&self, values: &[f32], first: usize) -> Option<(usize, usize)> {
        let row = |(i, values): (usize, &[f32])| {
            let row = first + i;
            let wrong = |&(col, &value): &(usize, &f32)| value != 0.0 && !self.keeps(row, col);
            values.iter().enumerate().find(wrong).map(|(col, _)| (row, col))
        };
        values.par_chunks(self.cols).enumerate().find_map_first(row)
    }
}

/// Calls `at` with the places of the first `len` bits that are 0.
fn each_pruned(bits: u8, len: usize, mut at: impl FnMut(usize)) {
    for bit in (0..len).filter(|bit| bits >> bit & 1 == 0) {
        at(bit);
    }
}

/// The masks of a model's linears, by the names of their weights; a linear without one keeps all its weights.
///
/// ```
/// use dsmoe_core::masks::{Mask, Masks};
///
/// let mut masks = Masks::new();
/// masks.insert("model.layers.0.mlp.up_proj.weight", 2, 4, |_, column| column % 2 == 0);
/// let mask: &Mask = masks.get("model.layers.0.mlp.up_proj.weight").unwrap();
/// assert_eq!((mask.kept(), mask.pruned(), mask.keeps(1, 2)), (4, 4, true));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Masks(BTreeMap<String, Mask>);

impl Masks {
    /// Makes an empty set of masks.
    pub fn new() -> Masks {
        Masks::default()
    }

    /// Sets the mask of the weight `name`, `[rows, cols]` as stored.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        rows: usize,
        cols: usize,
        keep: impl Fn(usize, usize) -> bool + Sync,
    ) {
        self.set(name, Mask::new(rows, cols, keep));
    }

    /// Sets the mask of the weight `name`.
    pub fn set(&mut self, name: impl Into<String>, mask: Mask) {
        self.0.insert(name.into(), mask);
    }

    /// Returns the mask of the weight `name`.
    pub fn get(&self, name: &str) -> Option<&Mask> {
        self.0.get(name)
    }

    /// Returns names and masks, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Mask)> {
        self.0.iter().map(|(name, mask)| (name.as_str(), mask))
    }

    /// Returns whether there are no masks.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the number of weights that are kept in all masked linears.
    pub fn kept(&self) -> u64 {
        self.0.values().map(Mask::kept).sum()
    }

    /// Returns the number of pruned weights.
    pub fn pruned(&self) -> u64 {
        self.0.values().map(Mask::pruned).sum()
    }

    /// Reads the masks in the model directory `dir`; none where there is no file.
    ///
    /// # Errors
    /// The file cannot be read, is no regular file, or does not fit the configuration beside it; it is gone and `checksums.json`
    /// beside it still has it.
    pub fn load(dir: &Path) -> Result<Option<Masks>> {
        if !is_masked(dir)? {
            return Ok(None);
        }
        Masks::read(dir, &Config::load(dir)?)
    }

    /// Does as [`Masks::load`] for a directory of that configuration.
    pub(crate) fn read(dir: &Path, config: &Config) -> Result<Option<Masks>> {
        if !is_masked(dir)? {
            return Ok(None);
        }
        let path = dir.join(MASKS_FILE);
        let file = Checkpoint::open_file(&path)?;
        let linears = linears(config);
        let mut masks = BTreeMap::new();
        for name in file.names() {
            let view = file.need(name)?;
            let &[rows, cols] = linear(&linears, name, &path)?;
            let (shape, wanted) = (&view.shape, [rows, cols.div_ceil(BITS)]);
            if view.dtype != Dtype::U8 || shape[..] != wanted {
                let problem = format!("is {} {shape:?} and not U8 {wanted:?}", view.dtype);
                return Err(Error::tensor(&path, name, problem, HELP));
            }
            let mask = Mask { rows, cols, bits: file.bytes(name)?.to_vec() };
            if mask.has_bits_behind() {
                let problem = format!("has bits behind its {cols} columns");
                return Err(Error::tensor(&path, name, problem, HELP));
            }
            masks.insert(name.to_owned(), mask);
        }
        Ok(Some(Masks(masks)))
    }

    /// Writes `masks.safetensors` to the existing directory `dir` and syncs it; nothing when there are no masks.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn save(&self, dir: &Path) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let info = |(name, mask): (&str, &Mask)| TensorInfo {
            name: name.to_owned(),
            dtype: Dtype::U8,
            shape: vec![mask.rows, mask.stride()],
        };
        let mut writer = Writer::create_file(&dir.join(MASKS_FILE), self.iter().map(info).collect())?;
        for (name, mask) in self.iter() {
            writer.write(name, &mask.bits)?;
        }
        writer.finish()
    }

    /// Checks that every mask is of a linear of `config`.
    pub(crate) fn check(&self, config: &Config) -> Result<()> {
        let (linears, path) = (linears(config), Path::new(MASKS_FILE));
        for (name, mask) in self.iter() {
            let shape = linear(&linears, name, path)?;
            if *shape != [mask.rows, mask.cols] {
                let problem =
                    format!("has shape {:?} and config.json says {shape:?}", [mask.rows, mask.cols]);
                return Err(Error::tensor(path, name, problem, HELP));
            }
        }
        Ok(())
    }

    /// Sets what is not kept to 0 in an arena laid out as `layout`: gradients before their norm is taken, parameters
    /// after the optimiser's step.
    ///
    /// # Panics
    /// The masks are not of a model of that layout.
    pub fn apply(&self, arena: &mut [f32], layout: &Layout) {
        self.apply_within(arena, layout, 0..layout.len());
    }

    /// Does as [`Masks::apply`] with the part `range` of an arena, of whole tensors.
    ///
    /// # Panics
    /// Those of [`Masks::apply`]; `part` has another length.
    pub fn apply_within(&self, part: &mut [f32], layout: &Layout, range: Range<usize>) {
        assert_eq!(part.len(), range.len(), "masks: part of an arena");
        for entry in layout.within(&range) {
            if let Some(mask) = self.get(&entry.spec.name) {
                let of = entry.range.start - range.start..entry.range.end - range.start;
                mask.zero(&mut part[of], entry.spec.stored);
            }
        }
    }

    /// Returns the first weight, with row and column as stored, that is not kept and not 0.
    ///
    /// # Panics
    /// Those of [`Masks::apply`].
    pub fn first_nonzero(&self, arena: &[f32], layout: &Layout) -> Option<(&str, [usize; 2])> {
        self.iter().find_map(|(name, mask)| {
            let entry = layout.get(name).expect("a masked linear of the model");
            let (row, col) = mask.first_nonzero(&arena[entry.range.clone()], entry.spec.stored)?;
            Some((name, [row, col]))
        })
    }
}

const HELP: &str = "use the masks that belong to this model, or remove the file";

/// Returns whether a model directory has masks. One that has lost them is refused: it would be trained as a dense model.
fn is_masked(dir: &Path) -> Result<bool> {
    let path = dir.join(MASKS_FILE);
    if is_present(&path)? {
        return Ok(true);
    }
    // A manifest that cannot be read says nothing here; `dsmoe verify` names it.
    match Manifest::read(dir) {
        Ok(Some(manifest)) if manifest.names(MASKS_FILE) => {
            let problem = format!("is missing and {MANIFEST_FILE} beside it has it");
            Err(Error::path(&path, problem, "copy the model again, or remove that entry if it is dense now"))
        }
        _ => Ok(false),
    }
}

/// Returns names and stored shapes of the weights that can be masked.
fn linears(config: &Config) -> BTreeMap<String, [usize; 2]> {
    let matrix = |(name, shape): (String, Vec<usize>)| Some((name, <[usize; 2]>::try_from(shape).ok()?));
    tensor_names(config).filter(|(name, _)| name.ends_with("_proj.weight")).filter_map(matrix).collect()
}

fn linear<'a>(linears: &'a BTreeMap<String, [usize; 2]>, name: &str, path: &Path) -> Result<&'a [usize; 2]> {
    linears.get(name).ok_or_else(|| Error::tensor(path, name, "is no linear of a layer of config.json", HELP))
}
