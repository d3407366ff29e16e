//! LLaMA-MoE (Zhu et al., EMNLP 2024): the dense FFN cut into n experts, a gate that gives every token exactly k of them,
//! noise and two balance losses in training. Made to be trained on: before that, scores are as good as even.

mod construction;
mod convert;
mod export;
mod ffn;
mod gate;
mod importance;
mod router;
mod spec;
mod texts;

use dsmoe_core::Config;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::topk::TopKConfig;

pub use construction::Construction;
pub(crate) use construction::{clustering, random};
pub use convert::EXPERTS_FILE;
pub(crate) use convert::{LayerExperts, check_calibration, check_experts, nearest, open_dense, write};
pub use export::{ExportReport, export};
pub use ffn::TopkMoeFfn;
pub(crate) use gate::{Gate, GateActs, GateGrads, GateWeights};
pub use gate::{GateNetwork, GateSpec};
pub use spec::TopkSpec;
pub(crate) use spec::register;

use crate::error::{Error, Result};
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};

/// The neurons of every layer of the dense model in `dir`, sorted by how much the loss on `sequences` would change without
/// each, to first order (see the module `importance`); the most important first.
///
/// # Errors
/// The model cannot be read; sequences that differ in length, are shorter than two tokens or longer than the model has
/// positions, or have tokens outside the vocabulary; a loss that is not finite.
pub fn neurons_by_importance(
    dir: &std::path::Path,
    sequences: &[Vec<u32>],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Vec<u32>>> {
    check_calibration(sequences, 1, "an order of neurons")?;
    let labels = vec![0; sequences.len()];
    let layers = importance::importances(dir, sequences, &labels, 1, progress)?;
    let sorted = |layer: importance::LayerImportance| {
        let of = &layer[0];
        let mut order: Vec<u32> = (0..of.len() as u32).collect();
        order.sort_by(|&a, &b| of[b as usize].total_cmp(&of[a as usize]).then(a.cmp(&b)));
        order
    };
    Ok(layers.into_iter().map(sorted).collect())
}

/// LLaMA-MoE, and the control that splits at random and routes by one matrix.
#[derive(Debug)]
pub(crate) struct LlamaMoe {
    /// Whether it is the control.
    pub(crate) control: bool,
}

const CONSTRUCTION: Knob = Knob {
    name: "construction",
    default: "random",
    help: "use random, clustering, sharing-inner or sharing-inter",
};
const EXPERTS: Knob = Knob {
    name: "experts",
    default: "8",
    help: "use a number that divides intermediate_size: equal parts of the FFN, residual ones included",
};
const RESIDUAL: Knob = Knob {
    name: "residual",
    default: "",
    help: "use a number of experts that always run, from 1 to experts - 1, with sharing-inter (1 if empty)",
};
const GATE: Knob = Knob { name: "gate", default: "mlp", help: "use mlp or linear" };
const SCALE: Knob =
    Knob { name: "scale", default: "n/k", help: "use n/k, or n for the dense output under even scores" };
const NOISE: Knob = Knob { name: "noise", default: "yes", help: "use yes or no: noisy logits in training" };
const BALANCE: Knob =
    Knob { name: "balance", default: "0.01", help: "use 0 or a positive weight of the balance losses" };

const KNOBS: &[Knob] = &[CONSTRUCTION, EXPERTS, RESIDUAL, GATE, SCALE, NOISE, BALANCE];
const CONTROL_KNOBS: &[Knob] = &[EXPERTS, SCALE, NOISE, BALANCE];

/// The knobs' values.
struct Settings {
    construction: Construction,
    num_experts: usize,
    num_residual: usize,
    network: GateNetwork,
    keeps_dense_scale: bool,
    noise: bool,
    balance_weight: f64,
}

impl LlamaMoe {
    fn settings(&self, knobs: &Knobs) -> Result<Settings> {
        let (construction, network, residual) = match self.control {
            true => (Construction::Random, GateNetwork::Linear, None),
            false => {
                (knobs.need(CONSTRUCTION.name)?, knobs.need(GATE.name)?, knobs.get::<usize>(RESIDUAL.name)?)
            }
        };
        let num_experts: usize = knobs.need(EXPERTS.name)?;
        let num_residual = match construction {
            Construction::SharingInter => residual.unwrap_or(1),
            _ => residual.unwrap_or(0),
        };
        let fits = match construction {
            Construction::SharingInter => (1..num_experts.max(1)).contains(&num_residual),
            _ => num_residual == 0,
        };
        if !fits {
            let problem = format!("is {num_residual} for {construction} with {num_experts} experts");
            return Err(wrong(&RESIDUAL, problem));
        }
        let choice = |knob: &Knob, yes: &str, no: &str| match knobs.need::<String>(knob.name)? {
            value if value == yes => Ok(true),
            value if value == no => Ok(false),
            value => Err(wrong(knob, format!("is {value:?}"))),
        };
        let balance_weight: f64 = knobs.need(BALANCE.name)?;
        if !(balance_weight.is_finite() && balance_weight >= 0.0) {
            return Err(wrong(&BALANCE, format!("is {balance_weight}")));
        }
        Ok(Settings {
            construction,
            num_experts,
            num_residual,
            network,
            keeps_dense_scale: choice(&SCALE, "n", "n/k")?,
            noise: choice(&NOISE, "yes", "no")?,
            balance_weight,
        })
    }

    fn choose(&self, config: &Config, budget: Budget, settings: &Settings) -> Result<(TopkSpec, Plan)> {
        check_experts(config, settings.num_experts)?;
        let n = settings.num_experts - settings.num_residual;
        let specs = (1..=n).map(|k| TopkSpec {
            router: TopKConfig {
                num_residual: settings.num_residual,
                score_scale: if settings.keeps_dense_scale { n as f32 } else { n as f32 / k as f32 },
                ..TopKConfig::new(n, k).expect("k of n")
            },
            gate: GateSpec { network: settings.network, normalize: false, noise: settings.noise },
            balance_weight: settings.balance_weight,
        });
        let (spec, mut plan) = nearest(config, budget, specs)?;
        plan.settings.push((CONSTRUCTION.name.to_owned(), settings.construction.to_string()));
        Ok((spec, plan))
    }
}

fn wrong(knob: &Knob, problem: String) -> Error {
    Error::Knob { name: knob.name.to_owned(), problem, mend: knob.help.to_owned() }
}

impl Method for LlamaMoe {
    fn name(&self) -> &'static str {
        if self.control { "random-k" } else { "llama-moe" }
    }

    fn summary(&self) -> &'static str {
        match self.control {
            true => {
                "control: FFN split at random, k of n experts by a linear gate that starts at zero; budgets k/n"
            }
            false => "LLaMA-MoE: k of n experts by a softmax gate with noise and balance losses; budgets k/n",
        }
    }

    fn knobs(&self) -> &'static [Knob] {
        if self.control { CONTROL_KNOBS } else { KNOBS }
    }

    fn needs_calibration(&self, knobs: &Knobs) -> bool {
        self.settings(knobs).is_ok_and(|settings| settings.construction.needs_calibration())
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        Ok(self.choose(config, budget, &self.settings(knobs)?)?.1)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let settings = self.settings(job.knobs)?;
        let (config, checkpoint) = open_dense(job.model)?;
        let (spec, plan) = self.choose(&config, job.budget, &settings)?;
        let mut measured = Vec::new();
        let orders = orders(job, &config, &checkpoint, &settings, &mut measured, progress)?;
        let layers = orders.into_iter().enumerate();
        let layers = layers.map(|(layer, order)| {
            let gate = first_gate(&spec.gate(config.hidden), config.initializer_range, job.seed, layer);
            LayerExperts { order, gate }
        });
        write(job, &config, &checkpoint, spec, &layers.collect::<Vec<_>>(), progress)?;
        Ok(Made { plan, measured })
    }
}

/// The neurons of every layer's experts, one after the other; `measured` gets what there is to tell of them.
fn orders(
    job: &Job<'_>,
    config: &Config,
    checkpoint: &Checkpoint,
    settings: &Settings,
    measured: &mut Vec<(String, f64)>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Vec<u32>>> {
    let n = settings.num_experts;
    let widths = config.layers().map(|shape| shape.intermediate).enumerate();
    let mut orders = Vec::with_capacity(config.num_layers);
    match settings.construction {
        Construction::Random => {
            for (layer, width) in widths {
                orders.push(construction::random(width, n, job.seed, layer)?);
            }
        }
        Construction::Clustering => {
            for (layer, width) in widths {
                let at =
                    Progress { stage: "clustering", done: layer as u64, total: config.num_layers as u64 };
                progress(at);
                let name = format!("model.layers.{layer}.mlp.up_proj.weight");
                let rows = read_finite(checkpoint, &name, width * config.hidden)?;
                orders.push(clustering(rows, config.hidden, n, job.seed).0);
            }
        }
        Construction::SharingInner | Construction::SharingInter => {
            let groups = n - settings.num_residual;
            check_calibration(job.calibration, groups, &format!("{groups} groups of texts, one per expert"))?;
            let labels = texts::groups(job.calibration, groups, job.seed);
            let importances = importance::importances(job.model, job.calibration, &labels, groups, progress)?;
            for ((layer, width), importance) in widths.zip(&importances) {
                let order = match settings.construction {
                    Construction::SharingInner => construction::sharing_inner(importance, width / n),
                    _ => construction::sharing_inter(importance, width / n, settings.num_residual),
                };
                let mut held = vec![false; width];
                order.iter().for_each(|&neuron| held[neuron as usize] = true);
                let share = held.iter().filter(|&&held| held).count() as f64 / width as f64;
                measured.push((format!("layer {layer}: share of neurons in experts"), share));
                orders.push(order);
            }
        }
    }
    Ok(orders)
}

/// A float tensor, all of it finite.
fn read_finite(checkpoint: &Checkpoint, name: &str, len: usize) -> Result<Vec<f32>> {
    let mut values = vec![0.0; len];
    checkpoint.read_f32(name, &mut values)?;
    if values.iter().all(|x| x.is_finite()) {
        return Ok(values);
    }
    Err(Error::Numeric {
        place: name.to_owned(),
        problem: "holds a value that is not finite".to_owned(),
        mend: "take an undamaged copy of the checkpoint".to_owned(),
    })
}

/// A gate as LLaMA-MoE starts it: an mlp from N(0, std^2), a linear one and the noise at zero.
fn first_gate(gate: &Gate, std: f64, seed: u64, layer: usize) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed, u64::from_be_bytes(*b"topkgate") ^ layer as u64);
    let [a, b, noise] = gate.lens();
    let mut network = |len: usize| {
        let mut values = vec![0.0; len];
        if gate.spec.network == GateNetwork::Mlp {
            rng.fill_normal(&mut values, std as f32);
        }
        values
    };
    let mut tensors = vec![network(a), network(b), vec![0.0; noise]];
    tensors.retain(|values| !values.is_empty());
    tensors
}
