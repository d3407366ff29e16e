//! Writes a deeper model tensor by tensor.

use std::path::Path;

use dsmoe_core::calibrate::{LayerStream, LayerWeights};
use dsmoe_core::checkpoint::{Dtype, OutputDir, TensorInfo, copy_companions, norm_names, tensor_names};
use dsmoe_kernels::rng::Rng;

use super::options::{GrowMethod, GrowOptions, GrowPlan, GrownNorms, NewLayer};
use super::predict::Predicted;
use crate::error::{Error, Result};
use crate::method::Progress;

const PREFIX: &str = "model.layers.";
const RANDOM_STREAM: u64 = 0x6c61_7972;

/// The directory of the deeper model.
pub(super) struct Output<'a> {
    model: &'a Path,
    dir: OutputDir,
}

/// A tensor of the deeper model: its layer, and its name within that.
fn place(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix(PREFIX)?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

impl<'a> Output<'a> {
    pub(super) fn create(model: &'a Path, out: &Path, force: bool) -> Result<Output<'a>> {
        Ok(Output { model, dir: OutputDir::create_from(model, out, force)? })
    }

    pub(super) fn write(
        self,
        stream: &LayerStream,
        plan: &GrowPlan,
        (options, predicted): (&GrowOptions, Predicted),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let stored = |name: &str| stream.tensors().stored_name(name).to_owned();
        let source = |name: &str| match place(name) {
            Some((layer, rest)) => stored(&format!("{PREFIX}{}.{rest}", plan.layers[layer].source())),
            None => stored(name),
        };
        let names: Vec<(String, Vec<usize>)> = tensor_names(&plan.grown).collect();
        let infos: Vec<TensorInfo> = names
            .iter()
            .map(|(name, shape)| {
                let view = stream.checkpoint().tensor(&source(name));
                let dtype = view.map_or(Dtype::F32, |view| view.dtype);
                TensorInfo { name: stored(name), dtype, shape: shape.clone() }
            })
            .collect();
        let mut writer = self.dir.model_writer(&plan.grown, infos.clone())?;
        let mut child: Option<Child<'_>> = None;
        for (done, ((name, _), info)) in names.iter().zip(&infos).enumerate() {
            progress(Progress { stage: "writing", done: done as u64, total: names.len() as u64 });
            let new = place(name).and_then(|(layer, rest)| match plan.layers[layer] {
                NewLayer::Behind(gap) => Some((layer, gap, rest)),
                NewLayer::Old(_) => None,
            });
            let Some((layer, gap, rest)) = new else {
                writer.write(&info.name, &stream.checkpoint().bytes(&source(name))?)?;
                continue;
            };
            if child.as_ref().is_none_or(|child| child.layer != layer) {
                child = Some(Child::read(stream, (layer, gap), options, &predicted)?);
            }
            let values = child.as_ref().expect("read").values(rest)?;
            let mut rounded = values.clone();
            info.dtype.round(&mut rounded);
            if !rounded.iter().all(|w| w.is_finite()) {
                let help = "use another method, or store the model as bf16";
                return Err(Error::numeric(name, "has a weight that its type cannot hold", help));
            }
            writer.write_f32(&info.name, &values)?;
        }
        writer.finish()?;
        copy_companions(self.model, self.dir.path())?;
        plan.grown.save(self.dir.path())?;
        Ok(self.dir.commit()?)
    }
}

/// A new layer: its neighbours, and what makes it of them.
struct Child<'a> {
    layer: usize,
    lower: LayerWeights,
    upper: LayerWeights,
    first: LayerWeights,
    /// Names of the norms over the residual stream within a layer.
    norms: [Option<String>; 4],
    options: &'a GrowOptions,
    predicted: Option<&'a [Vec<f32>; 7]>,
    std: f32,
}

impl<'a> Child<'a> {
    fn read(
        stream: &LayerStream,
        (layer, gap): (usize, usize),
        options: &'a GrowOptions,
        predicted: &'a Predicted,
    ) -> Result<Child<'a>> {
        Ok(Child {
            layer,
            lower: stream.layer(gap)?,
            upper: stream.layer(gap + 1)?,
            first: stream.layer(0)?,
            norms: norm_names(stream.config(), gap).map(|name| Some(place(&name?)?.1.to_owned())),
            options,
            predicted: predicted.get(&gap),
            std: stream.config().initializer_range as f32,
        })
    }

    /// Returns the values of the tensor called `name` within the layer.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let missing = || Error::numeric(name, "is not a part of a dense layer", "use another model");
        let of = |weights: &LayerWeights| tensor(weights, &self.norms, name).ok_or_else(missing);
        let kind = self.lower.linears.iter().position(|linear| linear.name.ends_with(&format!(".{name}")));
        let is_norm = name.contains("norm");
        let lower = of(&self.lower)?;
        match self.options.method {
            GrowMethod::Copy | GrowMethod::Stack => return Ok(lower),
            GrowMethod::Identity => {
                let is_output = name.contains(".o_proj.") || name.contains(".down_proj.");
                let is_output = is_output || name.ends_with("output_bias");
                return Ok(if is_output { vec![0.0; lower.len()] } else { lower });
            }
            GrowMethod::Lesa | GrowMethod::Average | GrowMethod::Random => {}
        }
        if is_norm && self.options.norms == GrownNorms::First {
            return of(&self.first);
        }
        match (self.options.method, kind) {
            (GrowMethod::Lesa, Some(kind)) => {
                let predicted = self.predicted.ok_or_else(missing)?;
                return Ok(predicted[kind].clone());
            }
            (GrowMethod::Random, Some(kind)) => {
                let mut rng = Rng::new(self.options.seed, RANDOM_STREAM + (self.layer * 7 + kind) as u64);
                let mut values = vec![0.0; lower.len()];
                rng.fill_normal(&mut values, self.std);
                return Ok(values);
            }
            _ => {}
        }
        let upper = of(&self.upper)?;
        Ok(lower.iter().zip(&upper).map(|(a, b)| 0.5 * (a + b)).collect())
    }
}

/// Returns the values of a tensor of a layer, called `name` within it; `norms` are the names of its norms.
fn tensor(weights: &LayerWeights, norms: &[Option<String>; 4], name: &str) -> Option<Vec<f32>> {
    for linear in &weights.linears {
        let (matrix, bias) = (&linear.name, linear.name.replace(".weight", ".bias"));
        if matrix.ends_with(&format!(".{name}")) {
            return Some(linear.weight.to_vec());
        }
        let is_bias = bias.ends_with(&format!(".{name}"))
            || name == "mlp.output_bias" && linear.name.ends_with(".down_proj.weight");
        if is_bias {
            return linear.bias.as_ref().map(|bias| bias.to_vec());
        }
    }
    if let Some([q, k]) = &weights.qk_norms {
        match name {
            "self_attn.q_norm.weight" => return Some(q.to_vec()),
            "self_attn.k_norm.weight" => return Some(k.to_vec()),
            _ => {}
        }
    }
    let at = norms.iter().position(|norm| norm.as_deref() == Some(name))?;
    weights.norms[at].as_ref().map(|norm| norm.to_vec())
}
