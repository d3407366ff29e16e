//! A model directory without the removed rows and columns, streamed.

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::checkpoint::{
    Checkpoint, LlamaTensors, OutputDir, TensorInfo, TensorView, copy_companions, tensor_names,
};
use rayon::prelude::*;

use super::groups::{Cut, Cuts};
use crate::error::Result;

/// Bytes read at once.
const CHUNK: usize = 8 << 20;

/// A checked dense model directory.
pub(crate) struct Source<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) names: &'a LlamaTensors,
}

/// Writes the rest of the dense model `source` after `cuts`, as the model of `pruned`, in the types of the source.
///
/// # Errors
/// The file system refuses, or a file has shrunk.
pub(crate) fn rewrite(
    source: &Source<'_>,
    pruned: &Config,
    cuts: &Cuts,
    output: OutputDir,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let Source { dir, checkpoint, names } = *source;
    let info = |(name, shape): (String, Vec<usize>)| {
        let name = names.stored_name(&name).to_owned();
        let dtype = checkpoint.tensor(&name).expect("a checked checkpoint").dtype;
        TensorInfo { name, dtype, shape }
    };
    let infos: Vec<TensorInfo> = tensor_names(pruned).map(info).collect();
    let total = infos.len() as u64;
    let mut writer = output.model_writer(pruned, infos)?;
    for (done, (name, _)) in (1..).zip(tensor_names(pruned)) {
        let stored = names.stored_name(&name);
        let view = checkpoint.tensor(stored).expect("a checked checkpoint");
        writer.begin(stored)?;
        copy(checkpoint, view, &cuts.of(&name), &mut |bytes| writer.write_chunk(bytes))?;
        progress(done, total);
    }
    writer.finish()?;
    output.commit_with(|out| {
        copy_companions(dir, out)?;
        pruned.save(out)
    })?;
    Ok(())
}

/// Passes the rest of a tensor after `cut` to `sink`, in order.
fn copy(
    checkpoint: &Checkpoint,
    view: &TensorView,
    cut: &Cut,
    sink: &mut dyn FnMut(&[u8]) -> dsmoe_core::Result<()>,
) -> dsmoe_core::Result<()> {
    let size = view.dtype.size();
    let cols = view.shape.last().copied().unwrap_or(1);
    let (row, rows) = (cols * size, view.numel() / cols.max(1));
    let per_chunk = (CHUNK / row.max(1)).max(1);
    let (mut input, mut output) = (Vec::new(), Vec::new());
    for first in (0..rows).step_by(per_chunk) {
        let count = per_chunk.min(rows - first);
        input.resize(count * row, 0);
        checkpoint.read_at(view, (first * row) as u64, &mut input)?;
        let kept: Vec<usize> = match &cut.rows {
            None => (0..count).collect(),
            Some(rows) => {
                let place = |at| rows.partition_point(|&row| row < at);
                rows[place(first)..place(first + count)].iter().map(|row| row - first).collect()
            }
        };
        let width = cut.columns.as_ref().map_or(row, |columns| columns.len() * size);
        output.resize(kept.len() * width, 0);
        output.par_chunks_mut(width.max(1)).zip(&kept).for_each(|(out, &from)| {
            let line = &input[from * row..][..row];
            match &cut.columns {
                None => out.copy_from_slice(line),
                Some(columns) => {
                    for (out, &column) in out.chunks_exact_mut(size).zip(columns) {
                        out.copy_from_slice(&line[column * size..][..size]);
                    }
                }
            }
        });
        if !output.is_empty() {
            sink(&output)?;
        }
    }
    Ok(())
}
