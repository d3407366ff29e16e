//! Pruning of single weights in the linears of decoder layers, layer by layer: every layer is pruned on the inputs
//! that the pruned layers before it give. The result is a plain LLaMA with `masks.safetensors` beside the weights.

mod hessian;
mod pattern;
mod score;
mod select;
mod sparsegpt;
mod sweep;

use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights, Linear};
use dsmoe_core::checkpoint::{Dtype, OutputDir, TensorInfo, copy_companions, tensor_names};
use dsmoe_core::masks::{MASKS_FILE, Mask, Masks};

pub use self::hessian::{Factored, Hessian};
pub use self::pattern::{Among, Pattern};
pub use self::score::ScoreSettings;
pub(crate) use self::score::{MAGNITUDE, WANDA};
pub(crate) use self::sparsegpt::SPARSEGPT;
pub use self::sparsegpt::SparseGptSettings;
pub use self::sweep::{SweepOptions, Swept, sweep};

use crate::error::{Error, Result};
use crate::method::{Job, Made, Plan, Progress};

/// A layer that is being pruned.
struct Layer<'a> {
    stream: &'a mut LayerStream,
    weights: LayerWeights,
    masks: &'a mut Masks,
    measured: &'a mut Vec<(String, f64)>,
}

impl Layer<'_> {
    /// The width of `input`.
    fn width(&self, input: Input) -> usize {
        let reading = self.weights.linears.iter().find(|linear| linear.input == input);
        reading.map_or(0, |linear| linear.inputs)
    }

    /// Prunes the linears that read `input`; their weights are rounded to what they are stored as.
    fn prune(&mut self, input: Input, mut prune: impl FnMut(&mut Linear) -> Mask) -> Result<()> {
        for linear in self.weights.reading(input) {
            let mask = prune(linear);
            dtype(self.stream, &linear.name).round(&mut linear.weight);
            if !linear.weight.iter().all(|w| w.is_finite()) {
                let problem = "has a weight that its type cannot hold after the update";
                let help = "raise the setting damp, give more calibration text or store the model as bf16";
                return Err(Error::numeric(&linear.name, problem, help));
            }
            self.masks.set(linear.name.clone(), mask);
        }
        Ok(())
    }

    fn measure(&mut self, what: &str, value: f64) {
        self.measured.push((format!("layer {} {what}", self.weights.layer), value));
    }
}

fn dtype(stream: &LayerStream, name: &str) -> Dtype {
    stream.checkpoint().tensor(name).map_or(Dtype::F32, |view| view.dtype)
}

/// Prunes the model of `job` layer by layer and writes the result.
fn run(
    job: &Job<'_>,
    plan: Plan,
    calibration: &[Vec<u32>],
    progress: &mut dyn FnMut(Progress),
    prune: &dyn Fn(&mut Layer<'_>) -> Result<()>,
) -> Result<Made> {
    let masks_file = job.model.join(MASKS_FILE);
    if std::fs::symlink_metadata(&masks_file).is_ok() {
        let help = "use the dense model it was made from";
        return Err(dsmoe_core::Error::path(&masks_file, "the model is pruned already", help).into());
    }
    let mut stream = LayerStream::open_on(job.comm, job.model, calibration)?;
    let config = stream.config().clone();
    let output = OutputDir::create_on(job.comm, job.model, job.out, job.force)?;
    let names: Vec<String> =
        tensor_names(&config).map(|(name, _)| stream.tensors().stored_name(&name).to_owned()).collect();
    let infos = tensor_names(&config).zip(&names).map(|((_, shape), name)| TensorInfo {
        name: name.clone(),
        dtype: dtype(&stream, name),
        shape,
    });
    let mut writer = output.model_writer(&config, infos.collect())?;
    let (mut masks, mut measured) = (Masks::new(), Vec::new());
    let mut names = names.iter().peekable();
    for i in 0..config.num_layers {
        progress(Progress { stage: "pruning layers", done: i as u64, total: config.num_layers as u64 });
        let prefix = format!("model.layers.{i}.");
        while let Some(name) = names.next_if(|name| !name.starts_with(&prefix)) {
            writer.write(name, &stream.checkpoint().bytes(name)?)?;
        }
        let weights = stream.layer(i)?;
        let mut layer = Layer { stream: &mut stream, weights, masks: &mut masks, measured: &mut measured };
        prune(&mut layer)?;
        let weights = layer.weights;
        while let Some(name) = names.next_if(|name| name.starts_with(&prefix)) {
            match weights.linears.iter().find(|linear| linear.name == *name) {
                Some(linear) => writer.write_f32(name, &linear.weight)?,
                None => writer.write(name, &stream.checkpoint().bytes(name)?)?,
            }
        }
        if i + 1 < config.num_layers {
            stream.advance(&weights)?;
        }
    }
    for name in names {
        writer.write(name, &stream.checkpoint().bytes(name)?)?;
    }
    writer.finish()?;
    output.commit_with(|dir| {
        masks.save(dir)?;
        copy_companions(job.model, dir)?;
        config.save(dir)
    })?;
    let done = config.num_layers as u64;
    progress(Progress { stage: "pruning layers", done, total: done });
    Ok(Made { plan: Plan { activated: plan.total - masks.pruned() as f64, ..plan }, measured })
}

/// Returns the calibration text of a method that needs it.
fn calibration<'a>(job: &Job<'a>) -> Result<&'a [Vec<u32>]> {
    if job.calibration.is_empty() {
        let help = "give at least one sequence; 128 of the model's length are usual".to_owned();
        return Err(dsmoe_core::Error::Calibration { problem: "there is no text".to_owned(), help }.into());
    }
    Ok(job.calibration)
}
