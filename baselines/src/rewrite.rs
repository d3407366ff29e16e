//! A model directory with the tensors of another one, their neurons in another order, and new or replaced tensors.

use std::path::Path;

use dsmoe_core::Config;
use dsmoe_core::checkpoint::{Checkpoint, OutputDir, TensorInfo, TensorSource, copy_companions};
use dsmoe_core::convert::{ffn_change, source_infos};

use crate::error::Result;
use crate::method::{Job, Progress};

/// The parts of a written directory that its source does not have.
pub(crate) struct Additions<'a> {
    /// New tensors, which stand behind the others. They replace those of the source that have their names.
    pub(crate) infos: Vec<TensorInfo>,
    /// The values of the new tensor of that number and name.
    pub(crate) values: &'a dyn Fn(usize, &str) -> Result<Vec<f32>>,
    /// The neurons of a layer's FFN in their new order; none where they stay.
    pub(crate) order: &'a dyn Fn(usize) -> Option<&'a [u32]>,
    /// Writes further files into the directory.
    pub(crate) files: &'a dyn Fn(&Path) -> dsmoe_core::Result<()>,
}

/// Writes a model of `config` that has all tensors of `checkpoint` in their types, and the additions.
///
/// # Errors
/// The output directory is not empty; the file system refuses.
pub(crate) fn rewrite(
    job: &Job<'_>,
    config: &Config,
    checkpoint: &Checkpoint,
    additions: &Additions<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let output = OutputDir::create_on(job.comm, job.model, job.out, job.force)?;
    let mut copied = source_infos(checkpoint);
    let is_replaced = |info: &TensorInfo| additions.infos.iter().any(|new| new.name == info.name);
    copied.retain(|info| !is_replaced(info));
    let infos: Vec<TensorInfo> = copied.iter().chain(&additions.infos).cloned().collect();
    let total = infos.len() as u64;
    let mut writer = output.writer(infos)?;
    let mut source = TensorSource::new(checkpoint);
    for (done, info) in (0..).zip(&copied) {
        progress(Progress { stage: "writing", done, total });
        writer.begin(&info.name)?;
        let change = ffn_change(&info.name, additions.order);
        source.copy(&info.name, change, |bytes| writer.write_chunk(bytes))?;
    }
    for (i, info) in additions.infos.iter().enumerate() {
        writer.write_f32(&info.name, &(additions.values)(i, &info.name)?)?;
    }
    writer.finish()?;
    output.commit_with(|dir| {
        (additions.files)(dir)?;
        copy_companions(job.model, dir)?;
        config.save(dir)
    })?;
    Ok(())
}
