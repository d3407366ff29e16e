//! The forms of experts that surgery changes, and what their tensors are made of.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dsmoe_router::expert_map::ExpertMap;

use super::shares::{self, Left};
use super::{LayerSurgery, NewExpert, Part, RouterRule, Surgery};
use crate::config::{Config, LayerShape, MixtureSpec, PartitionKind};
use crate::error::{Error, Result};
use crate::ffn::{ExpertParts, of_layer};

/// A form of experts.
#[derive(Debug)]
pub(super) enum Form {
    /// A tensor for each expert and projection.
    Mixture(MixtureSpec),
    /// DSMoE and FFNs of types like top-k: the experts of a layer are blocks of neurons of one FFN, among those that all tokens
    /// run.
    Blocks(Vec<ExpertParts>),
}

/// The source of a tensor of the new model.
#[derive(Debug)]
pub(super) enum Source {
    /// The tensor of that name.
    Same,
    /// A projection of some of the blocks of a layer ([`Form::blocks`]), or a bias of its neurons.
    Experts { layer: usize, experts: Range<usize>, which: Projection },
    /// The gates.
    Gates { layer: usize },
}

/// A gate of the new model.
#[derive(Debug)]
pub(super) struct NewGate {
    /// The old gates that it is made of, with their weights.
    pub(super) parts: Vec<(usize, f64)>,
    /// The new expert that it opens.
    expert: usize,
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
    pub(super) fn first<'a>(&self, name: &'a str, blocks: &[Vec<NewExpert>]) -> Cow<'a, str> {
        match self {
            Source::Same | Source::Gates { .. } => Cow::Borrowed(name),
            Source::Experts { layer, experts, which } => {
                let old = blocks[*layer][experts.start].parts[0].old;
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
            Some(spec) => Ok(Form::Mixture(spec.clone())),
            None if config.moe.is_none() && config.ffn.is_none() => {
                let problem = format!("is {:?}, which has no experts", config.model_type());
                wrong(problem, "use a mixture of experts, or make one by converting this model as mixtral")
            }
            None => {
                let parts = (0..config.num_layers).map(|layer| of_layer(config, layer).expert_parts());
                let one_each = vec![1; config.num_layers];
                let changes =
                    config.ffn.as_ref().is_none_or(|spec| spec.with_experts(&one_each, None).is_some());
                match parts.collect::<Option<Vec<_>>>().filter(|_| changes) {
                    Some(parts) => Ok(Form::Blocks(parts)),
                    None => {
                        let kind = config.ffn.as_ref().map_or("dsmoe", |spec| spec.kind());
                        let problem = format!(
                            "is of a model with experts of type {kind}, which cannot be changed one by one"
                        );
                        wrong(problem, "use Mixtral, Qwen-MoE, OLMoE, DSMoE or a top-k model")
                    }
                }
            }
        }
    }

    /// Returns the experts of a layer that have gates.
    pub(super) fn held(&self, config: &Config, layer: usize) -> usize {
        match self {
            Form::Mixture(_) => config.layer_experts(layer).unwrap_or(1),
            Form::Blocks(parts) => parts[layer].routed.len(),
        }
    }

    /// Returns the old gates of an expert of a layer.
    pub(super) fn gates_of(&self, layer: usize, expert: usize) -> Vec<usize> {
        self.old_map(layer).map_or_else(|| vec![expert], |map| map.gates_of(expert).collect())
    }

    /// Returns the new gates of a layer of a surgery that was checked; none where all old ones stay.
    pub(super) fn gates(&self, layer: usize, surgery: &LayerSurgery) -> Option<Vec<NewGate>> {
        let of_expert = |(expert, NewExpert { parts }): (usize, &NewExpert)| -> Vec<NewGate> {
            if parts.len() > 1 && surgery.router == RouterRule::Mean {
                let of = |part: &Part| {
                    let weight = part.weight;
                    self.gates_of(layer, part.old).into_iter().map(move |gate| (gate, weight))
                };
                return vec![NewGate { parts: parts.iter().flat_map(of).collect(), expert }];
            }
            let gates = self.gates_of(layer, parts[0].old).into_iter();
            gates.map(|gate| NewGate { parts: vec![(gate, 1.0)], expert }).collect()
        };
        let all_stay = surgery.router == RouterRule::Map;
        (!all_stay).then(|| surgery.experts.iter().enumerate().flat_map(of_expert).collect())
    }

    /// Returns the expert of every new gate, layer by layer.
    fn maps(&self, config: &Config, layers: &[LayerSurgery]) -> Result<Vec<Arc<ExpertMap>>> {
        let map = |(i, layer): (usize, &LayerSurgery)| -> Result<Arc<ExpertMap>> {
            let Some(gates) = self.gates(i, layer) else {
                let merge = expert_map(layer, self.held(config, i))?;
                return Ok(Arc::new(self.old_map(i).map_or_else(|| merge.clone(), |map| map.then(&merge))));
            };
            let of_gates = gates.iter().map(|gate| gate.expert as u32).collect();
            Ok(Arc::new(ExpertMap::new(of_gates, layer.experts.len())?))
        };
        layers.iter().enumerate().map(map).collect()
    }

    /// Returns the expert of every old gate of a layer; none where each expert has a gate of its own.
    fn old_map(&self, layer: usize) -> Option<&Arc<ExpertMap>> {
        match self {
            Form::Mixture(spec) => spec.map(layer),
            Form::Blocks(parts) => parts[layer].map.as_ref(),
        }
    }

    /// Returns the neurons of an expert of a layer.
    pub(super) fn width(&self, layer: usize) -> usize {
        match self {
            Form::Mixture(spec) => spec.width,
            Form::Blocks(parts) => parts[layer].width(),
        }
    }

    /// Returns the new blocks of neurons of every layer, of old ones: its experts, and in their old places what all tokens run.
    pub(super) fn blocks(&self, layers: &[LayerSurgery]) -> Vec<Vec<NewExpert>> {
        let of_layer = |(i, layer): (usize, &LayerSurgery)| match self {
            Form::Mixture(_) => layer.experts.clone(),
            Form::Blocks(parts) => {
                let ExpertParts { blocks, routed, .. } = &parts[i];
                let behind_core = |expert: &NewExpert| {
                    let part = |part: &Part| Part { old: part.old + routed.start, ..part.clone() };
                    NewExpert { parts: expert.parts.iter().map(part).collect() }
                };
                let core = (0..routed.start).map(NewExpert::kept);
                let residual = (routed.end..*blocks).map(NewExpert::kept);
                core.chain(layer.experts.iter().map(behind_core)).chain(residual).collect()
            }
        };
        layers.iter().enumerate().map(of_layer).collect()
    }

    /// Returns what a tensor of the new model with those [`Form::blocks`] is made of.
    pub(super) fn source(&self, name: &str, blocks: &[Vec<NewExpert>]) -> Source {
        let of_ffn = name.strip_prefix("model.layers.").and_then(|rest| {
            let (layer, rest) = rest.split_once(".mlp.")?;
            Some((layer.parse::<usize>().ok().filter(|&layer| layer < blocks.len())?, rest))
        });
        let Some((layer, rest)) = of_ffn else { return Source::Same };
        if let Form::Blocks(parts) = self {
            return match rest {
                "gate_proj.weight" | "up_proj.weight" | "down_proj.weight" | "gate_proj.bias"
                | "up_proj.bias" => Source::Experts {
                    layer,
                    experts: 0..blocks[layer].len(),
                    which: Projection {
                        name: [name.to_owned(), String::new()],
                        is_whole: true,
                        is_down: rest.starts_with("down"),
                    },
                },
                _ if parts[layer].gates.contains(&rest) => Source::Gates { layer },
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
    pub(super) fn after(&self, path: &Path, config: &Config, surgery: Surgery<'_>) -> Result<Config> {
        let Surgery { layers, top_k, .. } = surgery;
        let spec = match self {
            Form::Mixture(spec) => spec,
            Form::Blocks(parts) => return self.other_blocks(path, config, parts, surgery),
        };
        let mut spec = spec.clone();
        let (maps, all_stay) = (self.maps(config, layers)?, keeps_gates(layers));
        spec.maps = (all_stay || !maps.iter().all(|map| map.is_plain())).then_some(maps);
        spec.experts = layers.iter().map(|layer| layer.experts.len()).collect();
        spec.top_k = top_k.unwrap_or(spec.top_k);
        let fewest = (0..layers.len()).map(|layer| spec.gates(layer)).min().unwrap_or(0);
        check_top_k(spec.top_k, fewest)?;
        let mut after = config.clone();
        after.set_mixture(spec);
        // The written map is read back unchanged.
        Config::from_json(path, &after.to_json())
    }

    /// Returns the configuration of a model whose experts are blocks of neurons after a surgery that was checked.
    fn other_blocks(
        &self,
        path: &Path,
        config: &Config,
        parts: &[ExpertParts],
        Surgery { layers, top_k, shares }: Surgery<'_>,
    ) -> Result<Config> {
        if top_k.is_some() && config.ffn.is_none() {
            let problem = "surgery to a DSMoE model with a fixed number of experts for each token, for which there is \
                           no format";
            return Err(Error::argument(problem, "let thresholds choose"));
        }
        let counts: Vec<usize> =
            layers.iter().zip(parts).map(|(layer, parts)| layer.experts.len() + parts.always()).collect();
        let maps = self.maps(config, layers)?;
        let fewest = maps.iter().map(|map| map.num_gates()).min().unwrap_or(0);
        let maps = (!maps.iter().all(|map| map.is_plain())).then_some(maps);
        let mut after = config.clone();
        let shape = |(i, (&blocks, parts)): (usize, (&usize, &ExpertParts))| LayerShape {
            intermediate: blocks * parts.width(),
            ..config.layer(i)
        };
        after.set_layers(counts.iter().zip(parts).enumerate().map(shape).collect());
        if let Some(spec) = &config.ffn {
            let experts: Vec<usize> = layers.iter().map(|layer| layer.experts.len()).collect();
            let top_k = top_k.or(spec.top_k());
            top_k.map_or(Ok(()), |top_k| check_top_k(top_k, fewest))?;
            let fewer = spec.with_experts(&experts, maps.clone());
            after.ffn = fewer.map(|spec| top_k.and_then(|top_k| spec.with_top_k(top_k)).unwrap_or(spec));
        }
        if let Some(moe) = &mut after.moe {
            // The share that was trained for is of other experts; budgets have theirs.
            moe.active_target = moe.budget();
            shares::of_other_experts(moe, Left { counts: &counts, merged: &merged(layers) }, shares);
            moe.set_experts(counts);
            moe.parts.maps = maps;
            // The neurons are not all of the dense model's.
            (moe.partition, moe.untrained) = (PartitionKind::Contiguous, false);
        }
        Config::from_json(path, &after.to_json())
    }
}

fn keeps_gates(layers: &[LayerSurgery]) -> bool {
    layers.first().is_some_and(|layer| layer.router == RouterRule::Map)
}

/// Returns the number of old experts by whose gates each new expert opens, for those of all layers.
fn merged(layers: &[LayerSurgery]) -> Vec<usize> {
    let of_layer = |layer: &LayerSurgery| -> Vec<usize> {
        let all_stay = layer.router == RouterRule::Map;
        layer.experts.iter().map(|expert| if all_stay { expert.parts.len() } else { 1 }).collect()
    };
    layers.iter().flat_map(of_layer).collect()
}

fn check_top_k(top_k: usize, fewest: usize) -> Result<()> {
    if (1..=fewest).contains(&top_k) {
        return Ok(());
    }
    let problem = format!("{top_k} experts of a token are more than the {fewest} gates that are left");
    Err(Error::argument(problem, format!("keep more experts, or let a token run {fewest}")))
}

/// Returns the new expert of every old one.
fn expert_map(layer: &LayerSurgery, held: usize) -> Result<ExpertMap> {
    let mut of_gates = vec![0; held];
    for (new, expert) in layer.experts.iter().enumerate() {
        expert.parts.iter().for_each(|part| of_gates[part.old] = new as u32);
    }
    Ok(ExpertMap::new(of_gates, layer.experts.len())?)
}
