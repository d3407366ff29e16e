//! MoEfication (Zhang et al., Findings of ACL 2022): the neurons of a trained FFN in many small experts, of which k
//! of n run. A router learns on calibration text which experts score most. No weight of the model changes, and the
//! output is the plain sum of the experts that run: all experts together are the dense FFN.
//!
//! SiLU has no zeros, so an expert's score is a norm of its neurons' values in place of the sum of the positive ones.

mod coactivation;

use dsmoe_core::Config;
use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights, check_router_text};
use dsmoe_core::partition::clusters;
use dsmoe_router::topk::{Scores, TopKConfig};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings, wrong};
use crate::topk::fit::{self, Examples, Loss, Training};
use crate::topk::{GateNetwork, GateSpec, LayerExperts, TopkSpec, check_experts, nearest, open_dense, write};

/// Neurons of an expert by default, as in the published examples.
const EXPERT_WIDTH: usize = 32;
/// FFN inputs that the router of a layer learns from, and that co-activations are counted for; of more inputs an even
/// choice is taken.
const MOST_INPUTS: usize = 16_384;
const MOST_EPOCHS: usize = 1000;

/// The method `moefication`.
pub(crate) static MOEFICATION: Entry<Settings> = Entry {
    name: "moefication",
    summary: "MoEfication: clusters of neurons, k of n by a router trained on calibration text; weights stay; budgets k/n",
    ..Entry::new(|settings| match settings.epochs > MOST_EPOCHS {
        true => Err(wrong::<Settings>("epochs", settings.epochs)),
        false => Ok(Box::new(MoEfication(settings))),
    })
};

settings! {
    /// Settings of MoEfication.
    pub struct Settings {
        /// Experts per layer, a divisor of intermediate_size; by default experts have 32 neurons.
        pub experts: Option<usize> = None,
        /// Way of forming experts: clustering (neurons with similar rows) or co-activation (neurons that are active for
        /// the same calibration tokens).
        pub split: Split = Split::Clustering,
        /// Projection whose rows are clustered, and whose means start the router: gate or up.
        pub rows: Rows = Rows::Gate,
        /// Value of an expert's neurons that the router predicts: l1, l2, plain or positive.
        pub score: Score = Score::L2,
        /// Epochs of the router's training, 0 to 1000.
        pub epochs: usize = 30,
    }
}

/// The value of an expert for a token, from the values c of its neurons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// The sum of |c|.
    L1,
    /// The root of the sum of c^2.
    L2,
    /// |sum of c|.
    Plain,
    /// The sum of the positive c.
    Positive,
}

/// A way of forming experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Clusters of similar rows.
    Clustering,
    /// Parts of the graph of co-activations.
    CoActivation,
}

/// The projection whose rows represent neurons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rows {
    /// `gate_proj`.
    Gate,
    /// `up_proj`.
    Up,
}

/// MoEfication with its settings.
struct MoEfication(Settings);

impl Score {
    fn of(self, values: impl Iterator<Item = f32>) -> f64 {
        let values = values.map(f64::from);
        match self {
            Score::L1 => values.map(f64::abs).sum(),
            Score::L2 => values.map(|c| c * c).sum::<f64>().sqrt(),
            Score::Plain => values.sum::<f64>().abs(),
            Score::Positive => values.map(|c| c.max(0.0)).sum(),
        }
    }
}

impl Settings {
    fn num_experts(&self, config: &Config) -> Result<usize> {
        let even = config.is_even() && config.intermediate.is_multiple_of(EXPERT_WIDTH);
        match self.experts {
            Some(experts) => Ok(experts),
            None if even => Ok(config.intermediate / EXPERT_WIDTH),
            None => {
                let problem = format!("layers do not all have the same multiple of {EXPERT_WIDTH} neurons");
                Err(Error::setting("experts", problem, "give a number that divides intermediate_size"))
            }
        }
    }

    fn choose(&self, config: &Config, budget: Budget) -> Result<(TopkSpec, Plan)> {
        let n = self.num_experts(config)?;
        check_experts(config, n)?;
        nearest(config, budget, (1..=n).map(|k| spec(n, k)))
    }
}

/// The router's training.
fn training(top_k: usize, epochs: usize, seed: u64) -> Training {
    Training { top_k, epochs, batch: 512, learning_rate: 0.01, loss: Loss::Ranking, seed }
}

/// B at the start: the router ranks experts by the directions of their centers.
fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect()
}

/// The FFN that runs k of n experts.
fn spec(n: usize, k: usize) -> TopkSpec {
    let router = TopKConfig::new(n, k).expect("k of n");
    let router = TopKConfig { scores: Scores::One, score_scale: 1.0, ..router };
    let network = GateNetwork::Mlp;
    let gate = GateSpec { network, normalize: true, noise: false, bias: false, hidden: None };
    TopkSpec { router, gate, balance_weight: 0.0 }
}

impl Configured for MoEfication {
    fn needs_calibration(&self) -> bool {
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
        let (settings, n) = (&self.0, self.0.num_experts(&config)?);
        let (spec, mut plan) = settings.choose(&config, job.budget)?;
        let inputs = check_router_text(job.calibration)?;
        plan.settings.push(("router inputs".to_owned(), inputs.min(MOST_INPUTS).to_string()));

        let every = inputs.div_ceil(MOST_INPUTS);
        let mut stream = LayerStream::open_on(job.comm, job.model, job.calibration)?;
        let (mut layers, mut measured) = (Vec::with_capacity(config.num_layers), Vec::new());
        for i in 0..config.num_layers {
            progress(Progress { stage: "routers", done: i as u64, total: config.num_layers as u64 });
            let weights = stream.layer(i)?;
            let [.., gate, up, _] = &weights.linears;
            let rows = if settings.rows == Rows::Gate { gate } else { up };
            let (order, centers) = match settings.split {
                Split::Clustering => clusters::neurons(rows.weight.to_vec(), config.hidden, n, job.seed),
                Split::CoActivation => {
                    let rows = &rows.weight;
                    let experts = coactivation::split(&mut stream, &weights, rows, n, every, job.seed)?;
                    measured
                        .push((format!("layer {i}: share of co-activations within experts"), experts.within));
                    (experts.order, experts.centers)
                }
            };
            let examples = examples(&mut stream, &weights, &order, (settings.score, n), every)?;
            let training = training(spec.router.top_k, settings.epochs, job.seed);
            let (gate, captured) = fit::train(
                &spec.gate(config.hidden),
                &examples,
                vec![centers, identity(n)],
                training,
                &mut |_| {},
            );
            measured.push((format!("layer {i}: share of scores captured"), captured));
            layers.push(LayerExperts { order, gate });
            stream.advance(&weights)?;
        }
        write(job, &config, &checkpoint, spec, &layers, progress)?;
        Ok(Made { plan, measured })
    }
}

/// Collects the inputs of a layer's FFN and the scores of its experts, for one of `every` calibration tokens.
fn examples(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    order: &[u32],
    (score, num_experts): (Score, usize),
    every: usize,
) -> Result<Examples> {
    let (hidden, intermediate) = (stream.config().hidden, order.len());
    let seq = stream.seq();
    let mut examples = Examples { inputs: Vec::new(), scores: Vec::new() };
    stream.forward(weights, &mut |tap| {
        let first = tap.sequence * seq;
        let chosen = (0..seq).filter(|t| (first + t).is_multiple_of(every));
        match tap.input {
            Input::Ffn => {
                chosen.for_each(|t| examples.inputs.extend_from_slice(&tap.x[t * hidden..][..hidden]));
            }
            Input::Neurons => chosen.for_each(|t| {
                let values = &tap.x[t * intermediate..][..intermediate];
                let of = |expert: &[u32]| score.of(expert.iter().map(|&j| values[j as usize])) as f32;
                examples.scores.extend(order.chunks_exact(intermediate / num_experts).map(of));
            }),
            Input::Attention | Input::Heads => {}
        }
    })?;
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use dsmoe_core::ffn::{DenseFfn, Ffn, block_len, split_mut};
    use dsmoe_kernels::Precision;
    use dsmoe_kernels::buf::Buf;
    use dsmoe_kernels::rng::Rng;

    use super::*;
    use crate::topk::{TopkMoeFfn, infer};

    /// Neurons in four groups that read and write two coordinates each, in a shuffled order, and inputs in two
    /// coordinates each: one expert is then all that answers, and the untrained router finds it.
    #[test]
    fn one_expert_of_disjoint_ones_is_exact() {
        const HIDDEN: usize = 8;
        const WIDTH: usize = 24;
        let dense = DenseFfn::new(HIDDEN, WIDTH);
        let mut rng = Rng::new(2, 0);
        let mut stored = vec![0.0; 3 * WIDTH * HIDDEN];
        for projection in stored.chunks_exact_mut(WIDTH * HIDDEN) {
            for (j, row) in projection.chunks_exact_mut(HIDDEN).enumerate() {
                let group = j * 7 % WIDTH % 4;
                row[2 * group..2 * group + 2].iter_mut().for_each(|x| *x = 1.0 + 0.3 * rng.uniform());
            }
        }
        let rows: Vec<&[f32]> = stored.chunks_exact(WIDTH * HIDDEN).collect();
        let (order, centers) = clusters::neurons(rows[0].to_vec(), HIDDEN, 4, 1);
        let spec = spec(4, 1);
        let examples = Examples { inputs: Vec::new(), scores: Vec::new() };
        let start = vec![centers, identity(4)];
        let (gate, _) = fit::train(&spec.gate(HIDDEN), &examples, start, training(1, 0, 0), &mut |_| {});

        let moe = TopkMoeFfn::new(HIDDEN, WIDTH, spec);
        let mut dense_params = Buf::zeros(block_len(&dense.tensors()));
        let mut params = Buf::zeros(block_len(&moe.tensors()));
        for (to, from) in split_mut(&mut dense_params, [WIDTH * HIDDEN; 3]).into_iter().zip(&rows) {
            to.copy_from_slice(from);
        }
        let lens = [WIDTH * HIDDEN, WIDTH * HIDDEN, WIDTH * HIDDEN, 4 * HIDDEN, 16];
        let [wgate, wup, wdown, a, b] = split_mut(&mut params, lens);
        for (to, from) in [wgate, wup, wdown].into_iter().zip(&rows) {
            for (to, &j) in to.chunks_exact_mut(HIDDEN).zip(&order) {
                to.copy_from_slice(&from[j as usize * HIDDEN..][..HIDDEN]);
            }
        }
        a.copy_from_slice(&gate[0]);
        b.copy_from_slice(&gate[1]);
        let mut x = vec![0.0; 40 * HIDDEN];
        for (t, x) in x.chunks_exact_mut(HIDDEN).enumerate() {
            x[t % 4 * 2..t % 4 * 2 + 2].iter_mut().for_each(|x| *x = 0.5 + rng.uniform());
        }
        let want = infer(&*dense.pack(&dense_params, Precision::F32), &x);
        let got = infer(&*moe.pack(&params, Precision::F32), &x);
        assert!(want.iter().any(|&y| y > 1.0));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} {want}");
        }
    }

    #[test]
    fn scores_by_hand() {
        use Score::{L1, L2, Plain, Positive};
        for (score, want) in [(L1, 7.0), (L2, 5.0), (Plain, 1.0), (Positive, 3.0)] {
            assert_eq!(score.of([3.0, -4.0].into_iter()), want, "{score:?}");
        }
    }
}
