//! FFNs with fewer neurons, each layer its own number: how many a budget leaves, and the model directory without the
//! rest. A bias may stand for what was removed: that of `down_proj` where the family has one, else `mlp.output_bias`.

mod flap;
mod static_core;
#[cfg(test)]
mod tests;

use dsmoe_core::Config;
use dsmoe_core::accounting::Accounting;
use dsmoe_core::calibrate::{LayerStream, LayerWeights, Linear};
use dsmoe_core::checkpoint::{Dtype, OutputDir, TensorInfo, Writer, copy_companions, tensor_names};
use dsmoe_core::config::LayerShape;
use dsmoe_core::masks::{MASKS_FILE, Masks};
use dsmoe_kernels::buf::Buf;
use rayon::prelude::*;

pub(crate) use flap::FLAP;
pub(crate) use static_core::STATIC_CORE;

use crate::error::{Error, Result};
use crate::method::{Budget, Job, Plan, Progress};

/// Columns summed by one task.
const COLUMNS: usize = 64;
/// The share by which a budget may lie outside the reach.
const TOLERANCE: f64 = 0.01;

/// Returns the number of neurons of all layers together that comes nearest to `budget`; with `bias` every FFN gets a
/// bias of its output.
///
/// # Errors
/// The model has experts, or the budget is out of reach.
fn neurons_left(config: &Config, budget: Budget, bias: bool) -> Result<usize> {
    if !config.is_dense() {
        let help = "use a dense model, such as the one that this was made from";
        return Err(Error::model("has experts or thresholds", help));
    }
    let (dense, layers) = (Accounting::of(config).total, config.num_layers);
    let all: usize = config.layers().map(|shape| shape.intermediate).sum();
    let total = |widths: Vec<usize>| Accounting::of(&with_widths(config, &widths, bias)).total as f64;
    let least = total(vec![1; layers]);
    let of_one = total(vec![2; layers]) / layers as f64 - least / layers as f64;
    let most = least + of_one * (all - layers) as f64;
    let target = budget.params(dense);
    if target < least * (1.0 - TOLERANCE) || target > most * (1.0 + TOLERANCE) {
        let problem = format!("is out of reach of removing neurons of {layers} layers");
        return Err(Error::out_of_reach(budget, problem, [least, most], dense));
    }
    Ok((((target - least) / of_one).round().max(0.0) as usize + layers).min(all))
}

/// Returns the configuration with those numbers of neurons.
fn with_widths(config: &Config, widths: &[usize], bias: bool) -> Config {
    let shape = |(i, &intermediate): (usize, &usize)| LayerShape { intermediate, ..config.layer(i) };
    let mut pruned = config.clone();
    pruned.set_layers(widths.iter().enumerate().map(shape).collect());
    pruned.architecture.output_bias |= bias && !config.architecture.mlp_bias;
    pruned
}

/// Returns as many neurons for each layer as its share of all; the first layers get those that are left over, none of
/// which are there if all layers are alike.
fn even_widths(config: &Config, total: usize) -> Vec<usize> {
    let sizes: Vec<usize> = config.layers().map(|shape| shape.intermediate).collect();
    let all: usize = sizes.iter().sum();
    let share = |&size: &usize| ((size as f64 * total as f64 / all as f64).round() as usize).clamp(1, size);
    sizes.iter().map(share).collect()
}

/// Makes the widths `total` neurons together, where layers have room; parameters depend on their sum alone.
fn spread(widths: &mut [usize], config: &Config, total: usize) {
    let mut more = total as isize - widths.iter().sum::<usize>() as isize;
    for (i, width) in widths.iter_mut().enumerate() {
        let room = config.layer(i).intermediate as isize;
        let new = (*width as isize + more).clamp(1, room);
        more -= new - *width as isize;
        *width = new as usize;
    }
}

/// Plans the model of `pruned`.
fn plan(pruned: &Config, reached_by: String) -> Plan {
    let widths: Vec<usize> = pruned.layers().map(|shape| shape.intermediate).collect();
    let mean = widths.iter().sum::<usize>() as f64 / widths.len().max(1) as f64;
    let settings = vec![("mean intermediate_size".to_owned(), format!("{mean:.1}"))];
    Plan { settings, ..Plan::dense(Accounting::of(pruned).total as f64, reached_by) }
}

/// Checks that the source is not pruned by masks.
pub(crate) fn check_masks(job: &Job<'_>) -> Result<()> {
    match Masks::load(job.model)? {
        None => Ok(()),
        Some(_) => {
            let help = "use the dense model it was made from";
            Err(Error::model(format!("has {MASKS_FILE}"), help))
        }
    }
}

/// Returns the indices of the `count` largest scores, ascending; of equal ones the earlier.
fn largest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Returns the columns `kept` of a matrix with rows of `width` values.
fn columns(matrix: &[f32], width: usize, kept: &[usize]) -> Buf {
    let mut out = Buf::zeros(matrix.len() / width.max(1) * kept.len());
    out.par_chunks_mut(kept.len().max(1)).zip(matrix.par_chunks(width.max(1))).for_each(|(out, row)| {
        out.iter_mut().zip(kept).for_each(|(out, &column)| *out = row[column]);
    });
    out
}

/// Returns the norm of each column of a projection.
fn column_norms(linear: &Linear) -> Vec<f64> {
    let mut squares = vec![0.0; linear.inputs];
    squares.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, squares)| {
        for row in linear.weight.chunks_exact(linear.inputs) {
            for (square, &w) in squares.iter_mut().zip(&row[task * COLUMNS..]) {
                *square += f64::from(w) * f64::from(w);
            }
        }
    });
    squares.into_iter().map(f64::sqrt).collect()
}

/// Leaves the neurons `kept` of a layer.
fn keep(weights: &mut LayerWeights, kept: &[usize]) {
    let [.., gate, up, down] = &mut weights.linears;
    for linear in [gate, up] {
        let mut rows = Buf::zeros(kept.len() * linear.inputs);
        for (row, &neuron) in rows.chunks_exact_mut(linear.inputs).zip(kept) {
            row.copy_from_slice(&linear.weight[neuron * linear.inputs..][..linear.inputs]);
        }
        (linear.weight, linear.outputs) = (rows, kept.len());
        if let Some(bias) = &mut linear.bias {
            *bias = columns(bias, bias.len(), kept);
        }
    }
    (down.weight, down.inputs) = (columns(&down.weight, down.inputs, kept), kept.len());
}

/// Adds `bias` to that of a layer's down projection.
fn add_bias(weights: &mut LayerWeights, bias: &[f32]) {
    let [.., down] = &mut weights.linears;
    let sum = down.bias.get_or_insert_with(|| Buf::zeros(bias.len()));
    sum.iter_mut().zip(bias).for_each(|(sum, b)| *sum += b);
}

/// A pruned model being written layer by layer.
pub(crate) struct Output<'a> {
    job: &'a Job<'a>,
    pruned: &'a Config,
    dir: OutputDir,
    writer: Writer,
    /// Names as stored, of tensors that are not written yet.
    names: std::iter::Peekable<std::vec::IntoIter<TensorInfo>>,
}

impl<'a> Output<'a> {
    /// Starts the model of `pruned`, made of the model of `stream`.
    pub(crate) fn create(job: &'a Job<'a>, stream: &LayerStream, pruned: &'a Config) -> Result<Output<'a>> {
        let dir = OutputDir::create_on(job.comm, job.model, job.out, job.force)?;
        let info = |(name, shape): (String, Vec<usize>)| {
            let name = stream.tensors().stored_name(&name).to_owned();
            // A new bias has the type of the weights that it belongs to.
            let like = name.replace("mlp.output_bias", "mlp.down_proj.weight");
            let view = stream.checkpoint().tensor(&name).or_else(|| stream.checkpoint().tensor(&like));
            TensorInfo { dtype: view.map_or(Dtype::F32, |view| view.dtype), name, shape }
        };
        let infos: Vec<TensorInfo> = tensor_names(pruned).map(info).collect();
        let writer = dir.model_writer(pruned, infos.clone())?;
        Ok(Output { job, pruned, dir, writer, names: infos.into_iter().peekable() })
    }

    /// Rounds a layer's FFN to what it is stored as.
    fn round(&self, weights: &mut LayerWeights) -> Result<()> {
        let dtype = |name: &str| self.names.clone().find(|info| info.name == name).map(|info| info.dtype);
        let [.., down] = &mut weights.linears;
        let bias = down.name.replace("down_proj.weight", "down_proj.bias");
        let bias = dtype(&bias).or_else(|| dtype(&bias.replace("down_proj.bias", "output_bias")));
        for (dtype, values) in [(dtype(&down.name), Some(&mut down.weight)), (bias, down.bias.as_mut())] {
            let (Some(dtype), Some(values)) = (dtype, values) else { continue };
            dtype.round(values);
            if !values.iter().all(|w| w.is_finite()) {
                let problem = "has a weight that its type cannot hold after the update";
                let help = "give more calibration text or store the model as bf16";
                return Err(Error::numeric(&down.name, problem, help));
            }
        }
        Ok(())
    }

    /// Writes the tensors before those of a layer, and then the layer.
    fn layer(&mut self, stream: &LayerStream, weights: &LayerWeights) -> Result<()> {
        let prefix = format!("model.layers.{}.", weights.layer);
        while let Some(info) = self.names.next_if(|info| !info.name.starts_with(&prefix)) {
            self.writer.write(&info.name, &stream.checkpoint().bytes(&info.name)?)?;
        }
        while let Some(info) = self.names.next_if(|info| info.name.starts_with(&prefix)) {
            match changed(weights, &info.name[prefix.len()..]) {
                Some(values) => self.writer.write_f32(&info.name, values)?,
                None => self.writer.write(&info.name, &stream.checkpoint().bytes(&info.name)?)?,
            }
        }
        Ok(())
    }

    /// Writes the tensors after the layers, and commits the directory.
    pub(crate) fn finish(mut self, stream: &LayerStream) -> Result<()> {
        for info in self.names {
            self.writer.write(&info.name, &stream.checkpoint().bytes(&info.name)?)?;
        }
        self.writer.finish()?;
        self.dir.commit_with(|dir| {
            copy_companions(self.job.model, dir)?;
            self.pruned.save(dir)
        })?;
        Ok(())
    }
}

/// Returns the values of an FFN's tensor, named within its layer.
fn changed<'a>(weights: &'a LayerWeights, name: &str) -> Option<&'a [f32]> {
    let [.., gate, up, down] = &weights.linears;
    match name {
        "mlp.gate_proj.weight" => Some(&gate.weight),
        "mlp.up_proj.weight" => Some(&up.weight),
        "mlp.down_proj.weight" => Some(&down.weight),
        "mlp.gate_proj.bias" => gate.bias.as_deref(),
        "mlp.up_proj.bias" => up.bias.as_deref(),
        "mlp.down_proj.bias" | "mlp.output_bias" => down.bias.as_deref(),
        _ => None,
    }
}

/// Reports the progress of a pass over layers.
pub(crate) fn at(progress: &mut dyn FnMut(Progress), stage: &'static str, layer: usize, layers: usize) {
    progress(Progress { stage, done: layer as u64, total: layers as u64 });
}
