//! FactorLLM (Zhao et al., arXiv 2408.11855): the FFN in few experts of unchanged weights, of which a linear router with a
//! bias runs z of y for every token. The router's prior comes from a teacher, the dense FFN: a token's label is the experts
//! whose outputs come nearest to the FFN's. Training of the experts by the language-model loss follows.
//!
//! ```text
//! y'      (y / z) sum over the chosen experts of e_i                 factor 1 where `scaled` is off
//! labels  see `labels`
//! router  softmax(x R^T + c), by the divergence from or of softmax(labels) or labels / z; see `topk::fit`
//! ```
//! The states are those of the dense model in every layer, so that labels are exact. The released code trains with random
//! routers: it leaves the routers' loss out, and the choice of experts has no gradient; `epochs = 0` gives these.

mod labels;
mod taught;
mod teach;

use dsmoe_core::Config;
use dsmoe_core::calibrate::{LayerStream, LayerWeights, check_router_text};
use dsmoe_core::partition::clusters;
use dsmoe_kernels::rng::Rng;
use dsmoe_router::topk::{Scores, TopKConfig};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::experts::construction;
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings, shown, wrong};
use crate::states::States;
use crate::topk::fit::{self, Direction, Goal, Loss, Training};
use crate::topk::{
    Gate, GateNetwork, GateSpec, LayerExperts, TopkSpec, check_experts, nearest, open_dense, write,
};

use labels::{Choice, Label, subsets};
use taught::{MEASURED, Taught};
use teach::Teaching;

/// FFN inputs that the router of a layer learns from; of more an even choice is taken.
const MOST_INPUTS: usize = 16_384;
const MOST_EPOCHS: usize = 1000;
const MOST_EXPERTS: usize = 64;
/// Subsets of experts that are compared for every token at the most.
const MOST_SUBSETS: usize = 20_000;
/// Standard deviation of a router's first weights.
const ROUTER_STD: f32 = 0.02;
/// Tokens of a step of the router's training.
const BATCH: usize = 256;

/// The method `factorllm`.
pub(crate) static FACTORLLM: Entry<Settings> = Entry {
    name: "factorllm",
    summary: "FactorLLM: few experts, k of n by a router that learns the dense FFN's nearest experts; weights stay; budgets k/n",
    ..Entry::new(configure)
};

settings! {
    /// Settings of FactorLLM.
    pub(crate) struct Settings {
        /// Experts per layer, 2 to 64; a divisor of intermediate_size.
        pub experts: usize = 4,
        /// Way of forming experts: contiguous (as released), random, or clustering (neurons with similar rows of gate_proj).
        pub split: Split = Split::Contiguous,
        /// Experts that the router learns to choose: single (each nearest to its share of the output, as released), subset
        /// (the sum nearest to the output) or norm (the largest outputs).
        pub label: Label = Label::Single,
        /// Distribution that the router learns: softmax (of the labels, as released) or share (even over the labelled experts).
        pub target: Target = Target::Softmax,
        /// Side that the divergence is of: student (sum of p ln(p / target), as released) or teacher; by default student
        /// for softmax and teacher for share.
        pub direction: Option<Side> = None,
        /// Factor y/z on the sum of the z of y experts that run: true or false.
        pub scaled: bool = true,
        /// Epochs of the router's training, 0 (a random router, which is what the released code trains with) to 1000.
        pub epochs: usize = 30,
        /// Learning rate of the router's training, a number above 0 and up to 1.
        pub learning_rate: f64 = 1e-3,
    }
}

/// A way of forming experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Split {
    /// Neighbours.
    Contiguous,
    /// Every neuron in a random expert.
    Random,
    /// Clusters of similar rows.
    Clustering,
}

/// The distribution that a router learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    /// The softmax of the labels.
    Softmax,
    /// Even over the labelled experts.
    Share,
}

/// A side of a divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Side {
    /// The router.
    Student,
    /// The labels.
    Teacher,
}

/// FactorLLM with its settings.
struct FactorLlm(Settings);

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    if !(2..=MOST_EXPERTS).contains(&settings.experts) {
        return Err(wrong::<Settings>("experts", settings.experts));
    }
    if settings.epochs > MOST_EPOCHS {
        return Err(wrong::<Settings>("epochs", settings.epochs));
    }
    if !(settings.learning_rate > 0.0 && settings.learning_rate <= 1.0) {
        return Err(wrong::<Settings>("learning_rate", settings.learning_rate));
    }
    Ok(Box::new(FactorLlm(settings)))
}

impl Settings {
    fn loss(&self) -> Loss {
        let goal = match self.target {
            Target::Softmax => Goal::Softmax,
            Target::Share => Goal::Share,
        };
        let from = match (self.direction, self.target) {
            (Some(Side::Student), _) | (None, Target::Softmax) => Direction::Student,
            (Some(Side::Teacher), _) | (None, Target::Share) => Direction::Teacher,
        };
        Loss::Divergence { from, goal }
    }

    /// Returns the FFN that runs `k` experts.
    fn spec(&self, k: usize) -> TopkSpec {
        let plain = TopKConfig::new(self.experts, k).expect("k of n");
        let score_scale = if self.scaled { plain.score_scale } else { 1.0 };
        let router = TopKConfig { scores: Scores::One, score_scale, ..plain };
        let network = GateNetwork::Linear;
        let gate = GateSpec { network, normalize: false, noise: false, bias: true, hidden: None };
        TopkSpec { router, gate, balance_weight: 0.0 }
    }

    fn choose(&self, config: &Config, budget: Budget) -> Result<(TopkSpec, Plan)> {
        check_experts(config, self.experts)?;
        let (spec, mut plan) = nearest(config, budget, (1..=self.experts).map(|k| self.spec(k)))?;
        let k = spec.router.top_k;
        if self.label == Label::Subset && subsets(self.experts, k, MOST_SUBSETS).is_none() {
            let problem = format!("cannot be subset for {k} of {} experts", self.experts);
            let help = format!("more than {MOST_SUBSETS} subsets; use single, norm, or fewer experts");
            return Err(Error::setting("label", problem, help));
        }
        plan.settings.push(("label".to_owned(), shown(&self.values()["label"])));
        Ok((spec, plan))
    }

    /// Returns the neurons of one expert after the other.
    fn order(
        &self,
        gate_rows: &[f32],
        (hidden, width): (usize, usize),
        seed: u64,
        layer: usize,
    ) -> Result<Vec<u32>> {
        match self.split {
            Split::Contiguous => Ok((0..width as u32).collect()),
            Split::Random => construction::random(width, self.experts, seed, layer),
            Split::Clustering => Ok(clusters::neurons(gate_rows.to_vec(), hidden, self.experts, seed).0),
        }
    }

    /// Passes the stream through a layer, and trains the layer's router on one of `every` tokens. `show` receives the number of
    /// epochs that are done.
    fn teach(
        &self,
        (stream, weights): (&mut LayerStream, &LayerWeights),
        (gate, choice): (&Gate, Choice),
        every: usize,
        seed: u64,
        show: &mut dyn FnMut(usize),
    ) -> Result<Taught> {
        let [.., rows, _, down] = &weights.linears;
        let order = self.order(&rows.weight, (down.outputs, down.inputs), seed, weights.layer)?;
        let mut teaching = Teaching::new(down, &order, choice, self.label, every);
        let seq = stream.seq();
        stream.advance_seen(weights, &mut |tap| teaching.see(&tap, seq))?;
        let training = Training {
            top_k: choice.top_k,
            epochs: self.epochs,
            batch: BATCH,
            learning_rate: self.learning_rate,
            loss: self.loss(),
            seed,
        };
        let start = first_router(gate, seed, weights.layer);
        let (tensors, found) = fit::train(gate, &teaching.examples, start, training, show);
        let [router, labels, random] = teaching.errors(gate, &tensors);
        let measured = [found, router, labels, random];
        Ok(Taught { experts: LayerExperts { order, gate: tensors }, measured })
    }
}

impl Configured for FactorLlm {
    fn needs_calibration(&self) -> bool {
        true
    }

    fn continues(&self) -> bool {
        true
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        Ok(self.0.choose(config, budget)?.1)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let (config, checkpoint) = open_dense(job.model)?;
        let settings = &self.0;
        let (spec, mut plan) = settings.choose(&config, job.budget)?;
        let inputs = check_router_text(job.calibration)?;
        let every = inputs.div_ceil(MOST_INPUTS);
        plan.settings.push(("router inputs".to_owned(), inputs.div_ceil(every).to_string()));
        let gate = spec.gate(config.hidden);
        let choice = Choice {
            num_experts: settings.experts,
            top_k: spec.router.top_k,
            scale: f64::from(spec.router.score_scale),
        };

        let mut stream = LayerStream::open_on(job.comm, job.model, job.calibration)?;
        let count = config.num_layers;
        let mut taught = Taught::finished(job.partial, count)?;
        let mut states = States::of(job.partial, 0);
        let passed = states.restore(&mut stream, taught.len())?;
        // A layer is a pass of the calibration text, and the epochs of the router.
        let of_layer = settings.epochs + 1;
        for i in passed..count {
            let mut show = |done: usize| {
                let (done, total) = ((i * of_layer + done) as u64, (count * of_layer) as u64);
                progress(Progress { stage: "routers", done, total });
            };
            show(0);
            let weights = stream.layer(i)?;
            if i < taught.len() {
                stream.advance(&weights)?;
            } else {
                let show = &mut |epochs: usize| show(1 + epochs);
                let layer =
                    settings.teach((&mut stream, &weights), (&gate, choice), every, job.seed, show)?;
                layer.keep(job.partial, i)?;
                taught.push(layer);
            }
            states.keep(i, &stream)?;
        }
        let (mut layers, mut measured) = (Vec::with_capacity(count), Vec::new());
        for (i, layer) in taught.into_iter().enumerate() {
            let named = MEASURED.iter().zip(layer.measured);
            measured.extend(named.map(|(name, value)| (format!("layer {i}: {name}"), value)));
            layers.push(layer.experts);
        }
        write(job, &config, &checkpoint, spec, &layers, progress)?;
        Ok(Made { plan, measured })
    }
}

/// Returns the tensors of a router before its training: small random weights, a bias of 0.
fn first_router(gate: &Gate, seed: u64, layer: usize) -> Vec<Vec<f32>> {
    let [weights, _, bias, _] = gate.lens();
    let mut tensors = vec![vec![0.0; weights], vec![0.0; bias]];
    let mut rng = Rng::new(seed, u64::from_be_bytes(*b"factorll") ^ layer as u64);
    rng.fill_normal(&mut tensors[0], ROUTER_STD);
    tensors
}
