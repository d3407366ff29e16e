//! Reading a model's weights tensor by tensor, in memory of bounded size.

use super::dtype::{check_finite, decode, decode_transposed};
use super::stream::{Change, TensorSource};
use super::{Checkpoint, LlamaTensors, check_llama_tensors};
use crate::config::Config;
use crate::error::Result;
use crate::masks::{MASKS_FILE, Masks};
use crate::params::{Stored, TensorSpec};

/// The weights of a checked checkpoint, in f32. A value that is not finite is refused, and one that is masked and not
/// 0.
pub(crate) struct WeightReader<'a> {
    checkpoint: &'a Checkpoint,
    names: LlamaTensors,
    masks: Option<&'a Masks>,
    source: TensorSource<'a>,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl<'a> WeightReader<'a> {
    /// Checks that `checkpoint` holds the model of `config`.
    pub(crate) fn new(
        config: &Config,
        checkpoint: &'a Checkpoint,
        masks: Option<&'a Masks>,
    ) -> Result<WeightReader<'a>> {
        let names = check_llama_tensors(config, checkpoint)?;
        Ok(WeightReader { masks, ..WeightReader::resume(names, checkpoint) })
    }

    /// Makes a reader, without masks, of a checkpoint that was checked before.
    pub(crate) fn resume(names: LlamaTensors, checkpoint: &'a Checkpoint) -> WeightReader<'a> {
        let source = TensorSource::new(checkpoint);
        WeightReader { checkpoint, names, masks: None, source, bytes: Vec::new(), values: Vec::new() }
    }

    /// Sets `out` to a tensor as it is in memory.
    pub(crate) fn read(&mut self, spec: &TensorSpec, out: &mut [f32]) -> Result<()> {
        match spec.stored {
            Stored::AsIs => {
                let mut rest = out;
                self.rows(spec, &mut |values| {
                    let (now, later) = std::mem::take(&mut rest).split_at_mut(values.len());
                    now.copy_from_slice(values);
                    rest = later;
                })
            }
            Stored::Transposed => {
                let name = self.names.stored_name(&spec.name);
                let dtype = self.checkpoint.need_float(name)?.dtype;
                let bytes = &mut self.bytes;
                bytes.clear();
                self.source.stream(name, Change::None, |piece| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                })?;
                let stored = spec.stored_shape();
                decode_transposed(out, bytes, dtype, stored[0], stored[1]);
                check_finite(self.checkpoint.path(), name, out)?;
                match self.masks.and_then(|masks| masks.get(&spec.name)) {
                    Some(mask) => check_masked(self.checkpoint, name, mask.first_nonzero(out, spec.stored)),
                    None => Ok(()),
                }
            }
        }
    }

    /// Gives all of a tensor that is in memory as it is stored to `sink`, in order, in pieces of whole rows.
    pub(crate) fn rows(&mut self, spec: &TensorSpec, sink: &mut dyn FnMut(&[f32])) -> Result<()> {
        assert_eq!(spec.stored, Stored::AsIs, "weights: pieces of {}", spec.name);
        let name = self.names.stored_name(&spec.name);
        let dtype = self.checkpoint.need_float(name)?.dtype;
        let (checkpoint, values) = (self.checkpoint, &mut self.values);
        let mask = self.masks.and_then(|masks| masks.get(&spec.name));
        let mut row = 0;
        self.source.stream(name, Change::None, |piece| {
            values.resize(piece.len() / dtype.size(), 0.0);
            decode(values, piece, dtype);
            check_finite(checkpoint.path(), name, values)?;
            if let Some(mask) = mask {
                check_masked(checkpoint, name, mask.first_nonzero_row(values, row))?;
                row += values.len() / mask.cols();
            }
            sink(values);
            Ok(())
        })
    }
}

fn check_masked(checkpoint: &Checkpoint, name: &str, wrong: Option<(usize, usize)>) -> Result<()> {
    let Some((row, col)) = wrong else { return Ok(()) };
    let problem = format!("is not 0 at row {row}, column {col}, which {MASKS_FILE} does not keep");
    let help = "use the masks that belong to the weights, or remove the file";
    Err(checkpoint.wrong(name, checkpoint.need(name)?, problem, help))
}
