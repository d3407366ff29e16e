//! The forms of experts that surgery changes, and what their tensors are made of.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dsmoe_router::expert_map::ExpertMap;

use super::{LayerSurgery, RouterRule};
use crate::config::{Config, MixtureSpec};
use crate::error::{Error, Result};

/// A form of experts.
#[derive(Debug)]
pub(super) enum Form {
    /// A tensor for each expert and projection.
    Mixture(MixtureSpec),
}

/// What a tensor of the new model is made of.
#[derive(Debug)]
pub(super) enum Source {
    /// The tensor of that name.
    Same,
    /// A projection of experts.
    Experts { layer: usize, experts: Range<usize>, which: Projection },
    /// The gates.
    Gates { layer: usize },
}

/// The projection of experts that a tensor holds.
#[derive(Debug)]
pub(super) struct Projection {
    /// Beginning and end of its name around the number of an expert.
    pub(super) name: [String; 2],
    /// True if neurons are columns.
    pub(super) is_down: bool,
}

impl Source {
    /// Returns the name of an old tensor that has the type of the new one, `name`.
    pub(super) fn first<'a>(&self, name: &'a str, layers: &[LayerSurgery]) -> Cow<'a, str> {
        match self {
            Source::Same | Source::Gates { .. } => Cow::Borrowed(name),
            Source::Experts { layer, experts, which } => {
                let old = layers[*layer].experts[experts.start].parts[0].old;
                Cow::Owned(which.tensor(old))
            }
        }
    }
}

impl Projection {
    /// Returns the name of the tensor that holds an old expert.
    pub(super) fn tensor(&self, old: usize) -> String {
        let [start, end] = &self.name;
        format!("{start}{old}{end}")
    }
}

impl Form {
    /// Returns the form of the experts of `config`.
    pub(super) fn of(path: &Path, config: &Config) -> Result<Form> {
        let wrong =
            |problem: String, help: &'static str| Err(Error::field(path, "model_type", problem, help));
        match config.mixture() {
            Some(spec) if spec.maps.is_some() => {
                let problem = "is of a model whose gates share experts already".to_owned();
                wrong(problem, "use the model before its experts were merged")
            }
            Some(spec) => Ok(Form::Mixture(spec.clone())),
            None if config.is_dense() => {
                let problem = format!("is {:?}, which has no experts", config.model_type());
                wrong(problem, "use a mixture of experts, or make one by converting this model as mixtral")
            }
            None => {
                let kind = config.ffn.as_ref().map_or("dsmoe", |spec| spec.kind());
                let problem =
                    format!("is of a model with experts of type {kind}, which cannot be changed one by one");
                wrong(problem, "use Mixtral, Qwen-MoE or OLMoE")
            }
        }
    }

    /// Returns the experts of a layer.
    pub(super) fn held(&self, config: &Config, layer: usize) -> usize {
        config.layer_experts(layer).unwrap_or(1)
    }

    /// Returns the neurons of an expert.
    pub(super) fn width(&self, _config: &Config) -> usize {
        let Form::Mixture(spec) = self;
        spec.width
    }

    /// Returns what a tensor of the new model is made of.
    pub(super) fn source(&self, name: &str, layers: &[LayerSurgery]) -> Source {
        let of_ffn = name.strip_prefix("model.layers.").and_then(|rest| {
            let (layer, rest) = rest.split_once(".mlp.")?;
            Some((layer.parse::<usize>().ok().filter(|&layer| layer < layers.len())?, rest))
        });
        let Some((layer, rest)) = of_ffn else { return Source::Same };
        if rest == "gate.weight" {
            return Source::Gates { layer };
        }
        let expert = rest.strip_prefix("experts.").and_then(|rest| {
            let (number, end) = rest.split_once('.')?;
            Some((number.parse::<usize>().ok()?, end))
        });
        let Some((number, end)) = expert else { return Source::Same };
        let which = Projection {
            name: [format!("model.layers.{layer}.mlp.experts."), format!(".{end}")],
            is_down: end.starts_with("down"),
        };
        Source::Experts { layer, experts: number..number + 1, which }
    }

    /// Returns the configuration after a surgery that was checked.
    pub(super) fn after(
        &self,
        path: &Path,
        config: &Config,
        layers: &[LayerSurgery],
        top_k: Option<usize>,
    ) -> Result<Config> {
        let Form::Mixture(spec) = self;
        let mut spec = spec.clone();
        let is_map = layers.first().is_some_and(|layer| layer.router == RouterRule::Map);
        let maps = is_map.then(|| {
            let map = |(layer, &held): (&LayerSurgery, &usize)| expert_map(layer, held).map(Arc::new);
            layers.iter().zip(&spec.experts).map(map).collect::<Result<Vec<_>>>()
        });
        spec.maps = maps.transpose()?;
        spec.experts = layers.iter().map(|layer| layer.experts.len()).collect();
        spec.top_k = top_k.unwrap_or(spec.top_k);
        let fewest = (0..layers.len()).map(|layer| spec.gates(layer)).min().unwrap_or(0);
        if !(1..=fewest).contains(&spec.top_k) {
            let problem =
                format!("{} experts of a token are more than the {fewest} gates that are left", spec.top_k);
            return Err(Error::argument(problem, format!("keep more experts, or let a token run {fewest}")));
        }
        let mut after = config.clone();
        after.set_mixture(spec);
        // What is written is read back the same.
        Config::from_json(path, &after.to_json())
    }
}

/// Returns the new expert of every old one.
fn expert_map(layer: &LayerSurgery, held: usize) -> Result<ExpertMap> {
    let mut of_gates = vec![0; held];
    for (new, expert) in layer.experts.iter().enumerate() {
        expert.parts.iter().for_each(|part| of_gates[part.old] = new as u32);
    }
    Ok(ExpertMap::new(of_gates, layer.experts.len())?)
}
