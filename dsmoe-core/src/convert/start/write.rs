//! Writing the fitted model, layer by layer.

use std::path::Path;

use super::layer::Layer;
use crate::accounting::Accounting;
use crate::calibrate::{LayerStream, LayerWeights};
use crate::checkpoint::{Dtype, OutputDir, TensorInfo, Writer, copy_companions, is_router, tensor_names};
use crate::config::Config;
use crate::convert::ConvertReport;
use crate::error::Result;

/// The files of a model on their way.
pub(super) struct Writing {
    output: OutputDir,
    writer: Writer,
    /// Names of the tensors that are to come, in the order of the file.
    names: std::vec::IntoIter<String>,
    bytes: u64,
}

impl Writing {
    /// Starts the model of `config`, and writes what comes before its layers.
    pub(super) fn begin(
        model: &Path,
        out: &Path,
        force: bool,
        config: &Config,
        stream: &LayerStream,
    ) -> Result<Writing> {
        let output = OutputDir::create_on(stream.comm(), model, out, force)?;
        let named = |(name, shape): (String, Vec<usize>)| {
            let name = stream.tensors().stored_name(&name).to_owned();
            let dtype = if name.ends_with(".mlp.partition") { Dtype::I32 } else { dtype(stream, &name) };
            TensorInfo { name, dtype, shape }
        };
        let infos: Vec<TensorInfo> = tensor_names(config).map(named).collect();
        let bytes = infos.iter().map(TensorInfo::len_bytes).sum();
        let names: Vec<String> = infos.iter().map(|info| info.name.clone()).collect();
        let writer = output.model_writer(config, infos)?;
        let mut writing = Writing { output, writer, names: names.into_iter(), bytes };
        writing.copy(stream, |name| !name.starts_with("model.layers."))?;
        Ok(writing)
    }

    /// Copies the next tensors while `is_next` says so.
    fn copy(&mut self, stream: &LayerStream, is_next: impl Fn(&str) -> bool) -> Result<()> {
        while let Some(name) = self.names.as_slice().first().filter(|name| is_next(name)).cloned() {
            self.writer.write(&name, &stream.checkpoint().bytes(&name)?)?;
            self.names.next();
        }
        Ok(())
    }

    /// Writes a layer.
    pub(super) fn layer(
        &mut self,
        stream: &LayerStream,
        weights: &LayerWeights,
        layer: &Layer,
    ) -> Result<()> {
        let prefix = format!("model.layers.{}.", weights.layer);
        while let Some(name) = self.names.as_slice().first().filter(|name| name.starts_with(&prefix)).cloned()
        {
            self.names.next();
            match name.strip_prefix(&prefix).and_then(|rest| rest.strip_prefix("mlp.")) {
                Some(rest) => self.of_ffn(&name, rest, (weights, layer))?,
                None => self.writer.write(&name, &stream.checkpoint().bytes(&name)?)?,
            }
        }
        Ok(())
    }

    /// Writes a tensor of the FFN, known as `rest` within it.
    fn of_ffn(&mut self, name: &str, rest: &str, (weights, layer): (&LayerWeights, &Layer)) -> Result<()> {
        let [.., gate, up, down] = &weights.linears;
        let order = &layer.experts.order;
        let by_row = |values: &[f32]| -> Vec<f32> {
            let width = values.len() / order.len();
            order.iter().flat_map(|&j| &values[j as usize * width..][..width]).copied().collect()
        };
        let values = match rest {
            "gate_proj.weight" => by_row(&gate.weight),
            "up_proj.weight" => by_row(&up.weight),
            "gate_proj.bias" => by_row(gate.bias.as_deref().unwrap_or(&[])),
            "up_proj.bias" => by_row(up.bias.as_deref().unwrap_or(&[])),
            "down_proj.weight" => {
                let rows = layer.fitted.weight.chunks_exact(down.inputs);
                rows.flat_map(|row| order.iter().map(|&j| row[j as usize])).collect()
            }
            "down_proj.bias" | "output_bias" => {
                layer.fitted.bias.clone().unwrap_or_else(|| vec![0.0; down.outputs])
            }
            "router.weight" => layer.router.weight.clone(),
            "router.bias" => layer.router.bias.clone(),
            _ => {
                let bytes: Vec<u8> = order.iter().flat_map(|neuron| neuron.to_le_bytes()).collect();
                return self.writer.write(name, &bytes);
            }
        };
        self.writer.write_f32(name, &values)
    }

    /// Writes what comes after the layers, the configuration and the other files.
    pub(super) fn finish(
        mut self,
        model: &Path,
        stream: &LayerStream,
        config: &Config,
    ) -> Result<ConvertReport> {
        self.copy(stream, |_| true)?;
        self.writer.finish()?;
        self.output.commit_with(|dir| {
            copy_companions(model, dir)?;
            config.save(dir)
        })?;
        let num_experts = config.num_experts().unwrap_or(1);
        Ok(ConvertReport {
            num_layers: config.num_layers,
            num_experts,
            expert_width: config.intermediate / num_experts,
            router_params: Accounting::of(config).router,
            bytes: self.bytes,
        })
    }
}

/// Returns the type of a tensor: that of the source, of the down projection for a new bias, f32 for what belongs to routers.
fn dtype(stream: &LayerStream, name: &str) -> Dtype {
    let like = name.replace("mlp.output_bias", "mlp.down_proj.weight");
    match stream.checkpoint().tensor(&like) {
        _ if is_router(name) => Dtype::F32,
        Some(view) => view.dtype,
        None => Dtype::F32,
    }
}
