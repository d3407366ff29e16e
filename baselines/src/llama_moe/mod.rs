//! LLaMA-MoE (Zhu et al., EMNLP 2024): the dense FFN in n experts, of which a gate gives every token exactly k, with
//! noise and two balance losses in training. The model needs training: its first scores are near even.

mod export;

use dsmoe_core::Config;
use dsmoe_core::calibrate::check_text;
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::partition::clusters;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::topk::TopKConfig;
use serde::{Deserialize, Serialize};

pub use crate::experts::construction::Construction;
pub use export::{ExportReport, export};

use crate::error::{Error, Result};
use crate::experts::{construction, importance, texts};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::partial::Partial;
use crate::settings::{Entry, SettingValues, Settings as _, settings, shown, wrong};
use crate::topk::{
    Gate, GateNetwork, GateSpec, LayerExperts, TopkSpec, check_experts, nearest, open_dense, write,
};

/// The method `llama-moe`.
pub(crate) static LLAMA_MOE: Entry<Settings> = Entry {
    name: "llama-moe",
    summary: "LLaMA-MoE: k of n experts by a softmax gate with noise and balance losses; budgets k/n",
    ..Entry::new(configure)
};

settings! {
    /// Settings of LLaMA-MoE.
    pub struct Settings {
        /// Way of forming experts: random, clustering, sharing-inner or sharing-inter.
        pub construction: Construction = Construction::Random,
        /// Experts per layer, residual ones included; a divisor of intermediate_size.
        pub experts: usize = 8,
        /// Experts that always run, from 1 to experts - 1; only with sharing-inter, where the default is 1.
        pub residual: Option<usize> = None,
        /// Network of the gate: mlp or linear.
        pub gate: GateNetwork = GateNetwork::Mlp,
        /// Factor of the scores: n/k, or n, which keeps the dense output under even scores.
        pub scale: Scale = Scale::NOverK,
        /// Noisy logits in training: true or false.
        pub noise: bool = true,
        /// Weight of the balance losses: 0 or a positive number.
        pub balance: f64 = 0.01,
    }
}

/// The factor of the scores of n experts of which k run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scale {
    /// n / k.
    #[serde(rename = "n/k")]
    NOverK,
    /// n.
    #[serde(rename = "n")]
    N,
}

/// LLaMA-MoE with its settings.
struct LlamaMoe(Settings);

/// Checks the settings.
pub(crate) fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    let residual = settings.num_residual();
    let fits = match settings.construction {
        Construction::SharingInter => (1..settings.experts.max(1)).contains(&residual),
        _ => residual == 0,
    };
    if !fits {
        return Err(wrong::<Settings>("residual", residual));
    }
    if settings.gate == GateNetwork::Neuron {
        return Err(wrong::<Settings>("gate", "neuron"));
    }
    if !(settings.balance.is_finite() && settings.balance >= 0.0) {
        return Err(wrong::<Settings>("balance", settings.balance));
    }
    Ok(Box::new(LlamaMoe(settings)))
}

impl Settings {
    fn num_residual(&self) -> usize {
        self.residual.unwrap_or(usize::from(self.construction == Construction::SharingInter))
    }

    fn choose(&self, config: &Config, budget: Budget) -> Result<(TopkSpec, Plan)> {
        check_experts(config, self.experts)?;
        let num_residual = self.num_residual();
        let n = self.experts - num_residual;
        let (network, noise) = (self.gate, self.noise);
        let gate = GateSpec { network, normalize: false, noise, bias: false, hidden: None };
        let spec = |k| {
            let plain = TopKConfig::new(n, k).expect("k of n");
            let score_scale = if self.scale == Scale::N { n as f32 } else { plain.score_scale };
            let router = TopKConfig { num_residual, score_scale, ..plain };
            TopkSpec { router, gate, balance_weight: self.balance }
        };
        let (spec, mut plan) = nearest(config, budget, (1..=n).map(spec))?;
        plan.settings.push(("construction".to_owned(), shown(&self.values()["construction"])));
        Ok((spec, plan))
    }
}

impl Configured for LlamaMoe {
    fn needs_calibration(&self) -> bool {
        self.0.construction.needs_calibration()
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        Ok(self.0.choose(config, budget)?.1)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let (config, checkpoint) = open_dense(job.model)?;
        let (spec, plan) = self.0.choose(&config, job.budget)?;
        let mut measured = Vec::new();
        let orders = self.orders(job, &config, &checkpoint, &mut measured, progress)?;
        let layers = orders.into_iter().enumerate();
        let layers = layers.map(|(layer, order)| {
            let gate = first_gate(&spec.gate(config.hidden), config.initializer_range, job.seed, layer);
            LayerExperts { order, gate }
        });
        write(job, &config, &checkpoint, spec, &layers.collect::<Vec<_>>(), progress)?;
        Ok(Made { plan, measured })
    }
}

impl LlamaMoe {
    /// Returns the neurons of every layer's experts, one expert after the other, and adds to `measured`.
    fn orders(
        &self,
        job: &Job<'_>,
        config: &Config,
        checkpoint: &Checkpoint,
        measured: &mut Vec<(String, f64)>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<u32>>> {
        let n = self.0.experts;
        let residual = self.0.num_residual();
        let widths = config.layers().map(|shape| shape.intermediate).enumerate();
        let mut orders = Vec::with_capacity(config.num_layers);
        match self.0.construction {
            Construction::Random => {
                let random = |(layer, width)| construction::random(width, n, job.seed, layer);
                orders = widths.map(random).collect::<Result<_>>()?;
            }
            Construction::Clustering => {
                for (layer, width) in widths {
                    let (done, total) = (layer as u64, config.num_layers as u64);
                    progress(Progress { stage: "clustering", done, total });
                    let name = format!("model.layers.{layer}.mlp.up_proj.weight");
                    let rows = read_finite(checkpoint, &name, width * config.hidden)?;
                    orders.push(clusters::neurons(rows, config.hidden, n, job.seed).0);
                }
            }
            Construction::SharingInner | Construction::SharingInter => {
                let groups = n - residual;
                check_text(job.calibration, groups, &format!("{groups} groups of texts, one per expert"))?;
                let labels = texts::groups(job.calibration, groups, job.seed);
                let (text, none) = (job.calibration, Partial::none());
                let layers = importance::importances(job.model, text, &labels, groups, none, progress)?;
                for ((layer, width), importance) in widths.zip(&layers) {
                    let order = match self.0.construction {
                        Construction::SharingInner => construction::sharing_inner(importance, width / n),
                        _ => construction::sharing_inter(importance, width / n, residual),
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
}

/// Reads a float tensor whose values must be finite.
fn read_finite(checkpoint: &Checkpoint, name: &str, len: usize) -> Result<Vec<f32>> {
    let mut values = vec![0.0; len];
    checkpoint.read_f32(name, &mut values)?;
    if values.iter().all(|x| x.is_finite()) {
        return Ok(values);
    }
    Err(Error::numeric(name, "holds a value that is not finite", "take an undamaged copy of the checkpoint"))
}

/// Returns the first values of a gate as in LLaMA-MoE: an mlp from N(0, std^2), a linear one and the noise at zero.
fn first_gate(gate: &Gate, std: f64, seed: u64, layer: usize) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed, u64::from_be_bytes(*b"topkgate") ^ layer as u64);
    let mut tensors = gate.lens().map(|len| vec![0.0; len]).to_vec();
    if gate.spec.network == GateNetwork::Mlp {
        tensors[..2].iter_mut().for_each(|values| rng.fill_normal(values, std as f32));
    }
    tensors.retain(|values| !values.is_empty());
    tensors
}
