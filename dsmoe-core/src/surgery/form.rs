//! The forms of experts that surgery changes, and what their tensors are made of.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dsmoe_router::expert_map::ExpertMap;

use super::{LayerSurgery, RouterRule};
use crate::config::{Config, LayerShape, MixtureSpec, PartitionKind};
use crate::error::{Error, Result};

/// A form of experts.
#[derive(Debug)]
pub(super) enum Form {
    /// A tensor for each expert and projection.
    Mixture(MixtureSpec),
    /// DSMoE: the experts of a layer are blocks of neurons of one FFN, all of this width.
    Blocks { width: usize },
}

/// The source of a tensor of the new model.
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
    name: [String; 2],
    /// True if one tensor holds all experts, and its name has no number.
    is_whole: bool,
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
        if self.is_whole { format!("{start}{end}") } else { format!("{start}{old}{end}") }
    }

    /// Returns the first neuron of an old expert in its tensor.
    pub(super) fn first_neuron(&self, old: usize, width: usize) -> usize {
        if self.is_whole { old * width } else { 0 }
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
            None => match config.moe.as_ref().map(|_| blocks(config)) {
                Some(Ok(width)) => Ok(Form::Blocks { width }),
                Some(Err(problem)) => {
                    wrong(problem.to_owned(), "use a DSMoE model of experts and gates alone")
                }
                None => {
                    let kind = config.ffn.as_ref().map_or("dsmoe", |spec| spec.kind());
                    let problem = format!(
                        "is of a model with experts of type {kind}, which cannot be changed one by one"
                    );
                    wrong(problem, "use Mixtral, Qwen-MoE, OLMoE or DSMoE")
                }
            },
        }
    }

    /// Returns the experts of a layer.
    pub(super) fn held(&self, config: &Config, layer: usize) -> usize {
        config.layer_experts(layer).unwrap_or(1)
    }

    /// Returns the neurons of an expert.
    pub(super) fn width(&self) -> usize {
        match self {
            Form::Mixture(spec) => spec.width,
            Form::Blocks { width } => *width,
        }
    }

    /// Returns what a tensor of the new model is made of.
    pub(super) fn source(&self, name: &str, layers: &[LayerSurgery]) -> Source {
        let of_ffn = name.strip_prefix("model.layers.").and_then(|rest| {
            let (layer, rest) = rest.split_once(".mlp.")?;
            Some((layer.parse::<usize>().ok().filter(|&layer| layer < layers.len())?, rest))
        });
        let Some((layer, rest)) = of_ffn else { return Source::Same };
        if let Form::Blocks { .. } = self {
            return match rest {
                "gate_proj.weight" | "up_proj.weight" | "down_proj.weight" => Source::Experts {
                    layer,
                    experts: 0..layers[layer].experts.len(),
                    which: Projection {
                        name: [name.to_owned(), String::new()],
                        is_whole: true,
                        is_down: rest.starts_with("down"),
                    },
                },
                "router.weight" | "router.b.weight" | "router.bias" => Source::Gates { layer },
                _ => Source::Same,
            };
        }
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
            is_whole: false,
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
        let Form::Mixture(spec) = self else { return self.fewer_blocks(path, config, layers, top_k) };
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
        // The written map is read back unchanged.
        Config::from_json(path, &after.to_json())
    }
}

impl Form {
    /// Returns the configuration of a DSMoE model after a surgery that was checked.
    fn fewer_blocks(
        &self,
        path: &Path,
        config: &Config,
        layers: &[LayerSurgery],
        top_k: Option<usize>,
    ) -> Result<Config> {
        let counts: Vec<usize> = layers.iter().map(|layer| layer.experts.len()).collect();
        let refusal = match layers.first().map(|layer| layer.router) {
            _ if top_k.is_some() => Some("a DSMoE model with a fixed number of experts for each token"),
            Some(RouterRule::Map) => Some("a DSMoE model with gates that share experts"),
            _ if counts.iter().any(|&count| count != counts[0]) => {
                Some("a DSMoE model with layers of different numbers of experts")
            }
            _ => None,
        };
        if let Some(what) = refusal {
            let problem = format!("surgery to {what}, for which there is no format");
            return Err(Error::argument(
                problem,
                "keep as many experts in every layer, each with a gate of its own",
            ));
        }
        let mut after = config.clone();
        let shape = |(i, &experts): (usize, &usize)| LayerShape {
            intermediate: experts * self.width(),
            ..config.layer(i)
        };
        after.set_layers(counts.iter().enumerate().map(shape).collect());
        if let (Some(moe), Some(&count)) = (&mut after.moe, counts.first()) {
            moe.router.num_experts = count;
            // The share that was trained for is of other experts, and the neurons are not all of the dense model's.
            (moe.partition, moe.active_target, moe.untrained) = (PartitionKind::Contiguous, None, false);
        }
        Config::from_json(path, &after.to_json())
    }
}

/// Returns the width of the experts of a DSMoE model, or what it has that surgery does not change.
fn blocks(config: &Config) -> std::result::Result<usize, &'static str> {
    let Some(moe) = &config.moe else { return Err("is of no DSMoE model") };
    let width = |layer: usize| config.layer(layer).intermediate / moe.router.num_experts;
    let refusals = [
        (
            moe.parts.core.iter().any(|&core| core > 0),
            "is of a DSMoE model with a core of experts that always run",
        ),
        (!moe.parts.budgets.is_empty(), "is of a DSMoE model with thresholds by budget"),
        (config.architecture.mlp_bias, "is of a DSMoE model whose FFNs have biases"),
        (
            (1..config.num_layers).any(|layer| width(layer) != width(0)),
            "is of a DSMoE model with experts of different widths",
        ),
    ];
    match refusals.iter().find(|(has, _)| *has) {
        Some((_, problem)) => Err(problem),
        None => Ok(width(0)),
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
