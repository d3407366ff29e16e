//! MoEfication (Zhang et al., Findings of ACL 2022): a trained FFN's neurons in many small experts, a router that learns
//! on calibration text which of them answer most, k of n run. No weight of the model changes, and the output is the
//! plain sum of what runs: all experts together are the dense FFN.
//!
//! SiLU has no zeros, so an expert's score is a norm of its neurons' values in place of the sum of the positive ones.

mod coactivation;
mod router;

use dsmoe_core::Config;
use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights};
use dsmoe_router::topk::{Scores, TopKConfig};

use crate::error::{Error, Result};
use crate::llama_moe::{
    GateNetwork, GateSpec, LayerExperts, TopkSpec, check_calibration, check_experts, clustering, nearest,
    open_dense, write,
};
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};

use router::{Examples, Training};

/// Neurons of an expert unless told otherwise (the published examples).
const EXPERT_WIDTH: usize = 32;
/// FFN inputs that the router of a layer learns on, and co-activations are counted for; of more, an even choice.
const MOST_INPUTS: usize = 16_384;
/// Fewer do not make a router.
const FEWEST_INPUTS: usize = 256;

const EXPERTS: Knob = Knob {
    name: "experts",
    default: "",
    help: "use a number that divides intermediate_size; experts of 32 neurons if empty",
};
const SPLIT: Knob = Knob {
    name: "split",
    default: "clustering",
    help: "use clustering or co-activation: experts of neurons with similar rows, or that answer the same calibration tokens",
};
const ROWS: Knob = Knob {
    name: "rows",
    default: "gate",
    help: "use gate or up: whose rows are clustered, and start the router by their means",
};
const SCORE: Knob = Knob {
    name: "score",
    default: "l2",
    help: "use l1, l2, plain or positive: what of an expert's neurons the router predicts",
};
const EPOCHS: Knob = Knob { name: "epochs", default: "30", help: "use a number of epochs, 0 to 1000" };
const KNOBS: &[Knob] = &[EXPERTS, SPLIT, ROWS, SCORE, EPOCHS];

/// MoEfication.
#[derive(Debug)]
pub(crate) struct MoEfication;

/// What an expert did for a token, of its neurons' values c.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Score {
    /// Sum of |c|.
    L1,
    /// Root of the sum of c^2.
    L2,
    /// |sum of c|.
    Plain,
    /// Sum of the positive c.
    Positive,
}

impl std::str::FromStr for Score {
    type Err = ();

    fn from_str(name: &str) -> std::result::Result<Score, ()> {
        match name {
            "l1" => Ok(Score::L1),
            "l2" => Ok(Score::L2),
            "plain" => Ok(Score::Plain),
            "positive" => Ok(Score::Positive),
            _ => Err(()),
        }
    }
}

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

/// How neurons become experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// Clusters of similar rows.
    Clustering,
    /// Parts of the graph of co-activations.
    CoActivation,
}

impl std::str::FromStr for Split {
    type Err = ();

    fn from_str(name: &str) -> std::result::Result<Split, ()> {
        match name {
            "clustering" => Ok(Split::Clustering),
            "co-activation" => Ok(Split::CoActivation),
            _ => Err(()),
        }
    }
}

/// The knobs' values for a model.
struct Settings {
    num_experts: usize,
    split: Split,
    by_gate: bool,
    score: Score,
    epochs: usize,
}

fn settings(config: &Config, knobs: &Knobs) -> Result<Settings> {
    let wrong = |knob: &Knob, problem: String| {
        Err(Error::Knob { name: knob.name.to_owned(), problem, mend: knob.help.to_owned() })
    };
    let num_experts = match knobs.get::<usize>(EXPERTS.name)? {
        Some(num_experts) => num_experts,
        None if config.layers().all(|shape| shape.intermediate.is_multiple_of(EXPERT_WIDTH))
            && config.is_even() =>
        {
            config.intermediate / EXPERT_WIDTH
        }
        None => {
            return wrong(
                &EXPERTS,
                format!("is empty, and layers are not of {EXPERT_WIDTH} neurons times one number"),
            );
        }
    };
    let by_gate = match &knobs.need::<String>(ROWS.name)?[..] {
        "gate" => true,
        "up" => false,
        other => return wrong(&ROWS, format!("is {other:?}")),
    };
    let epochs = knobs.need(EPOCHS.name)?;
    if epochs > 1000 {
        return wrong(&EPOCHS, format!("is {epochs}"));
    }
    Ok(Settings {
        num_experts,
        split: knobs.need(SPLIT.name)?,
        by_gate,
        score: knobs.need(SCORE.name)?,
        epochs,
    })
}

fn choose(config: &Config, budget: Budget, settings: &Settings) -> Result<(TopkSpec, Plan)> {
    let n = settings.num_experts;
    check_experts(config, n)?;
    let specs = (1..=n).map(|k| TopkSpec {
        router: TopKConfig {
            scores: Scores::One,
            score_scale: 1.0,
            ..TopKConfig::new(n, k).expect("k of n")
        },
        gate: GateSpec { network: GateNetwork::Mlp, normalize: true, noise: false },
        balance_weight: 0.0,
    });
    nearest(config, budget, specs)
}

impl Method for MoEfication {
    fn name(&self) -> &'static str {
        "moefication"
    }

    fn summary(&self) -> &'static str {
        "MoEfication: clusters of neurons, k of n by a router trained on calibration text; weights stay; budgets k/n"
    }

    fn knobs(&self) -> &'static [Knob] {
        KNOBS
    }

    fn needs_calibration(&self, _knobs: &Knobs) -> bool {
        true
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        Ok(choose(config, budget, &settings(config, knobs)?)?.1)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let (config, checkpoint) = open_dense(job.model)?;
        let settings = settings(&config, job.knobs)?;
        let (spec, mut plan) = choose(&config, job.budget, &settings)?;
        let need = "the routers";
        check_calibration(job.calibration, 1, need)?;
        let inputs: usize = job.calibration.iter().map(Vec::len).sum();
        if inputs < FEWEST_INPUTS {
            return Err(Error::Calibration {
                problem: format!("{inputs} tokens are too few for {need}"),
                mend: format!("give {FEWEST_INPUTS} tokens or more"),
            });
        }
        plan.settings.push(("router inputs".to_owned(), inputs.min(MOST_INPUTS).to_string()));

        let every = inputs.div_ceil(MOST_INPUTS);
        let mut stream = LayerStream::open(job.model, job.calibration)?;
        let (mut layers, mut measured) = (Vec::with_capacity(config.num_layers), Vec::new());
        for i in 0..config.num_layers {
            progress(Progress { stage: "routers", done: i as u64, total: config.num_layers as u64 });
            let weights = stream.layer(i)?;
            let [.., gate, up, _] = &weights.linears;
            let rows = if settings.by_gate { gate } else { up };
            let n = settings.num_experts;
            let (order, centers) = match settings.split {
                Split::Clustering => clustering(rows.weight.to_vec(), config.hidden, n, job.seed),
                Split::CoActivation => {
                    let experts =
                        coactivation::split(&mut stream, &weights, &rows.weight, n, every, job.seed);
                    let place = format!("layer {i}: share of co-activations within experts");
                    measured.push((place, experts.within));
                    (experts.order, experts.centers)
                }
            };
            let examples = examples(&mut stream, &weights, &order, &settings, every);
            let training = Training { top_k: spec.router.top_k, epochs: settings.epochs, seed: job.seed };
            let (gate, captured) = router::train(&spec.gate(config.hidden), &examples, centers, training);
            measured.push((format!("layer {i}: share of scores captured"), captured));
            layers.push(LayerExperts { order, gate });
            stream.advance(&weights);
        }
        write(job, &config, &checkpoint, spec, &layers, progress)?;
        Ok(Made { plan, measured })
    }
}

/// What a layer's FFN reads and what each expert then does, for one of `every` calibration tokens.
fn examples(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    order: &[u32],
    settings: &Settings,
    every: usize,
) -> Examples {
    let (hidden, intermediate) = (stream.config().hidden, order.len());
    let seq = stream.seq();
    let mut examples = Examples { inputs: Vec::new(), scores: Vec::new() };
    stream.forward(weights, &mut |tap| {
        let first = tap.sequence * seq;
        let chosen = (0..seq).filter(|t| (first + t).is_multiple_of(every));
        match tap.input {
            Input::Ffn => {
                chosen.for_each(|t| examples.inputs.extend_from_slice(&tap.x[t * hidden..][..hidden]))
            }
            Input::Neurons => chosen.for_each(|t| {
                let values = &tap.x[t * intermediate..][..intermediate];
                let experts = order.chunks_exact(intermediate / settings.num_experts);
                examples.scores.extend(experts.map(|expert| {
                    settings.score.of(expert.iter().map(|&neuron| values[neuron as usize])) as f32
                }));
            }),
            Input::Attention | Input::Heads => {}
        }
    });
    examples
}

#[cfg(test)]
mod tests {
    use dsmoe_core::ffn::{DenseFfn, Ffn, FfnInference, FfnScratch, PackedFfn, block_len, split_mut};
    use dsmoe_kernels::Precision;
    use dsmoe_kernels::buf::Buf;
    use dsmoe_kernels::rng::Rng;

    use super::*;
    use crate::llama_moe::TopkMoeFfn;

    /// Neurons in four groups that read and write two coordinates each, in a shuffled order, and inputs in two coordinates
    /// each: one expert is then all that answers, and the untrained router finds it.
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
        let (order, centers) = clustering(rows[0].to_vec(), HIDDEN, 4, 1);
        let spec = TopkSpec {
            router: TopKConfig {
                scores: Scores::One,
                score_scale: 1.0,
                ..TopKConfig::new(4, 1).expect("1 of 4")
            },
            gate: GateSpec { network: GateNetwork::Mlp, normalize: true, noise: false },
            balance_weight: 0.0,
        };
        let examples = Examples { inputs: Vec::new(), scores: Vec::new() };
        let start = Training { top_k: 1, epochs: 0, seed: 0 };
        let (gate, _) = router::train(&spec.gate(HIDDEN), &examples, centers, start);

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
        let answer = |packed: Box<dyn PackedFfn>| {
            let mut y = vec![0.0; x.len()];
            packed.forward(FfnInference {
                y: &mut y,
                x: &x,
                record: None,
                scratch: &mut FfnScratch::default(),
            });
            y
        };
        let want = answer(dense.pack(&dense_params, Precision::F32));
        let got = answer(moe.pack(&params, Precision::F32));
        assert!(want.iter().any(|&y| y > 1.0));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} {want}");
        }
    }

    #[test]
    fn scores_by_hand() {
        for (name, want) in [("l1", 7.0), ("l2", 5.0), ("plain", 1.0), ("positive", 3.0)] {
            let score: Score = name.parse().expect("a score");
            assert_eq!(score.of([3.0, -4.0].into_iter()), want, "{name}");
        }
        assert!("l3".parse::<Score>().is_err());
    }
}
