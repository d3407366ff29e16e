//! Keys and values of a sequence on a device, and the step that decodes its next token.

use dsmoe_kernels::cuda::ops::decode;
use dsmoe_kernels::cuda::{GpuBuf, Recorded};
use half::bf16;

use super::acts::Acts;
use super::weights::CudaInference;
use crate::config::Config;
use crate::error::Result;
use crate::model::gpu::heads;
use crate::model::gpu::turns::{PassAngles, Stretch};

/// Keys and values of one layer, `[room, kv_heads * head_dim]` each.
pub(super) type LayerCache = (GpuBuf<bf16>, GpuBuf<bf16>);

/// Keys and values of a decoding sequence, and its recorded step.
#[derive(Debug)]
pub(crate) struct CudaCache {
    pub(super) room: usize,
    pub(super) step: Recorded<Step>,
}

/// Memory of a step of one token.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) layers: Vec<LayerCache>,
    /// The number of positions held: `[1]`.
    pub(super) length: GpuBuf<u32>,
    pub(super) partials: GpuBuf<f32>,
    pub(super) angles: PassAngles,
    pub(super) acts: Acts,
}

impl CudaCache {
    pub(super) fn new(model: &CudaInference, room: usize) -> Result<CudaCache> {
        let (gpu, config) = (&model.gpu, &model.config);
        let layers = (0..config.num_layers).map(|i| {
            let width = heads(config, i).kv_width();
            Ok((gpu.zero_rows(room, width)?, gpu.zero_rows(room, width)?))
        });
        let step = Step {
            layers: layers.collect::<Result<_>>()?,
            length: gpu.zeros(1)?,
            partials: gpu.zeros(partials_len(config, room))?,
            angles: model.turns.of_pass(gpu, &[Stretch { rows: 0..1, positions: 1 }])?,
            acts: Acts::new(model, 1)?,
        };
        Ok(CudaCache { room, step: Recorded::new(step) })
    }

    /// Makes room for `room` positions and keeps those held.
    pub(super) fn grow(&mut self, model: &CudaInference, room: usize) -> Result<()> {
        // The recorded graph names the old buffers.
        self.step.forget();
        let Step { layers, partials, .. } = &mut self.step.work;
        for (keys, values) in layers {
            for buf in [keys, values] {
                let mut larger = model.gpu.zero_rows(room, buf.cols())?;
                larger.part_mut(0..buf.rows()).copy_from(buf)?;
                *buf = larger;
            }
        }
        *partials = model.gpu.zeros(partials_len(&model.config, room))?;
        self.room = room;
        Ok(())
    }
}

/// Returns the number of values of the scratch memory of attention over caches of `room` positions, in any layer.
fn partials_len(config: &Config, room: usize) -> usize {
    (0..config.num_layers).map(|i| decode::partials_len(heads(config, i), room)).max().unwrap_or(0)
}
