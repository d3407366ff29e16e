//! The importance of each neuron for each group of texts: the first-order change of the loss without it.
//!
//! ```text
//! v_j = mean over tokens of |h_j dL/dh_j|,   h = silu(x Wg^T) * (x Wu^T),   dL/dh = dL/dy Wd^T
//! ```
//! L is the mean next-token loss of a sequence, as LLaMA-MoE has it (`llama_split_gradient_get_grads`, kernel l1).
//! One sequence at a time through [`Model::train_step`], whose FFNs are the dense ones with a sum on the way back.
//! Parameters and gradients are both in memory in f32: 8 bytes per parameter, 10 GB for LLaMA-3.2-1B.

use std::any::Any;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use dsmoe_core::Model;
use dsmoe_core::calibrate::check_text;
use dsmoe_core::ffn::{DenseFfn, Ffn, FfnBackward, FfnForward, FfnReport, PackedFfn, split, split_mut};
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace};
use dsmoe_core::params::TensorSpec;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::expert_ffn::{self, Saved, WeightGrads, Weights};
use dsmoe_kernels::{Precision, linear};
use dsmoe_router::SparsityOver;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::method::Progress;

/// Neurons per task.
const TASK: usize = 256;

/// Importances `[group][neuron]` of one layer.
pub(crate) type LayerImportance = Vec<Vec<f64>>;

/// Computes the importances of every layer's neurons in the dense model of `dir` for each group of `sequences`, whose
/// groups `labels` gives.
///
/// # Errors
/// The model cannot be read; a sequence that is too long or has tokens outside the vocabulary; a loss that is not
/// finite.
///
/// # Panics
/// The sequences are not of one length, at least 2.
pub(crate) fn importances(
    dir: &Path,
    sequences: &[Vec<u32>],
    labels: &[usize],
    num_groups: usize,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<LayerImportance>> {
    let seq = sequences.first().map_or(0, Vec::len).saturating_sub(1);
    assert!(
        seq > 0 && sequences.iter().all(|ids| ids.len() == seq + 1),
        "importances: sequences of one length, at least 2"
    );
    let model = Model::load(dir)?;
    let config = model.config().clone();
    let sums: Vec<Sums> =
        config.layers().map(|shape| Sums::new(Mutex::new(vec![0.0; shape.intermediate]))).collect();
    let probes = config.layers().zip(&sums).map(|(shape, sums)| -> Box<dyn Ffn> {
        let dense = DenseFfn::new(config.hidden, shape.intermediate);
        Box::new(Probe { dense, hidden: config.hidden, intermediate: shape.intermediate, sums: sums.clone() })
    });
    let mut probed = Model::with_ffns(config.clone(), probes.collect());
    probed.params_mut().copy_from_slice(model.params());
    drop(model);

    let mut grads = Buf::zeros(probed.layout().len());
    let mut importances: Vec<LayerImportance> =
        config.layers().map(|shape| vec![vec![0.0; shape.intermediate]; num_groups]).collect();
    let mut tokens = vec![0; num_groups];
    let mut workspace = TrainWorkspace::new(&probed, seq, Precision::F32);
    for (done, (ids, &group)) in sequences.iter().zip(labels).enumerate() {
        progress(Progress { stage: "gradients", done: done as u64, total: sequences.len() as u64 });
        let args = StepArgs {
            loss_scale: 1.0 / seq as f32,
            sparsity_weight: 0.0,
            sparsity_over: SparsityOver::All,
            balance_scale: 0.0,
            seed: 0,
        };
        let output = probed.train_step(
            &mut grads,
            Batch { inputs: &ids[..seq], targets: &ids[1..], seq },
            &args,
            &mut workspace,
        )?;
        if let Some(place) = output.non_finite {
            return Err(Error::Numeric {
                place,
                problem: format!("is not finite for calibration sequence {done}"),
                help: "use an undamaged model, or other calibration text".to_owned(),
            });
        }
        tokens[group] += seq;
        for (sums, importance) in sums.iter().zip(&mut importances) {
            let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
            for (sum, total) in sums.iter_mut().zip(&mut importance[group]) {
                *total += std::mem::take(sum);
            }
        }
    }
    for layer in &mut importances {
        for (importance, &tokens) in layer.iter_mut().zip(&tokens) {
            importance.iter_mut().for_each(|v| *v /= tokens.max(1) as f64);
        }
    }
    Ok(importances)
}

/// Sorts the neurons of every layer of the dense model in `dir` by importance, the most important first.
///
/// # Errors
/// The model cannot be read; sequences that differ in length, are shorter than two tokens or longer than the model has
/// positions, or have tokens outside the vocabulary; a loss that is not finite.
pub(crate) fn neurons_by_importance(
    dir: &Path,
    sequences: &[Vec<u32>],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Vec<u32>>> {
    check_text(sequences, 1, "an order of neurons")?;
    let labels = vec![0; sequences.len()];
    let layers = importances(dir, sequences, &labels, 1, progress)?;
    let sorted = |layer: LayerImportance| {
        let of = &layer[0];
        let mut order: Vec<u32> = (0..of.len() as u32).collect();
        order.sort_by(|&a, &b| of[b as usize].total_cmp(&of[a as usize]).then(a.cmp(&b)));
        order
    };
    Ok(layers.into_iter().map(sorted).collect())
}

/// Sums over tokens of |h dL/dh| per neuron, reset after each sequence.
type Sums = Arc<Mutex<Vec<f64>>>;

/// A dense FFN that adds to its [`Sums`] in the backward pass.
#[derive(Debug)]
struct Probe {
    dense: DenseFfn,
    hidden: usize,
    intermediate: usize,
    sums: Sums,
}

impl Ffn for Probe {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.dense.tensors()
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        self.dense.pack(params, precision)
    }

    fn new_saved(&self, _tokens: usize) -> Box<dyn Any + Send> {
        Box::new(Saved::default())
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, scratch, .. } = args;
        let saved = saved.downcast_mut::<Saved>().expect("saved by a probe");
        let [gate, up, down] = split(params, [self.hidden * self.intermediate; 3]);
        let weights = Weights { gate, up, down };
        let (tokens, hidden, intermediate) = (x.len() / self.hidden, self.hidden, self.intermediate);
        let experts = &mut scratch.experts;
        expert_ffn::ForwardTrain {
            y,
            saved,
            x,
            weights: &weights,
            pairs: expert_ffn::Pairs::Dense,
            dims: expert_ffn::Dims::dense(tokens, hidden, intermediate),
            scratch: experts,
        }
        .run();
        FfnReport::default()
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, scratch, .. } = args;
        let saved = saved.downcast_mut::<Saved>().expect("saved by a probe");
        let (tokens, hidden, intermediate) = (x.len() / self.hidden, self.hidden, self.intermediate);
        let [gate, up, down] = split(params, [hidden * intermediate; 3]);
        let mut dh = Buf::zeros(tokens * intermediate);
        let dims =
            linear::Dims { rows: tokens, inputs: hidden, outputs: intermediate, precision: Precision::F32 };
        linear::Forward { y: &mut dh, x: dy, w: down, bias: None, dims }.run();
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.par_chunks_mut(TASK).enumerate().for_each(|(task, sums)| {
            for t in 0..tokens {
                let first = t * intermediate + task * TASK;
                let part = first..first + sums.len();
                let values = saved.a[part.clone()].iter().zip(&saved.b[part.clone()]).zip(&dh[part]);
                for (sum, ((&a, &b), &dh)) in sums.iter_mut().zip(values) {
                    let h = a / (1.0 + (-a).exp()) * b;
                    *sum += f64::from((h * dh).abs());
                }
            }
        });

        let [dgate, dup, ddown] = split_mut(grads, [hidden * intermediate; 3]);
        let (grads, weights) =
            (WeightGrads { gate: dgate, up: dup, down: ddown }, Weights { gate, up, down });
        let experts = &mut scratch.experts;
        expert_ffn::Backward {
            dx,
            dcoefficients: None,
            grads,
            dy,
            saved,
            x,
            weights: &weights,
            pairs: expert_ffn::Pairs::Dense,
            dims: expert_ffn::Dims::dense(tokens, hidden, intermediate),
            scratch: experts,
        }
        .run();
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_core::Config;
    use dsmoe_core::init::{InitOptions, init, preset};

    use super::*;

    /// With one predicted token, the sum over d of V[j, d] dV[j, d] is h_j dL/dh_j exactly: importances by the weight
    /// gradients of the model's own dense FFN.
    #[test]
    fn importance_is_that_of_the_weight_gradients() {
        let dir = tempfile::tempdir().expect("directory");
        let text = preset("tiny").expect("a preset").to_json();
        let text = text.replace("\"vocab_size\": 2048", "\"vocab_size\": 40");
        let text = text.replace("\"intermediate_size\": 512", "\"intermediate_size\": 72");
        let config = Config::from_json(Path::new("config.json"), &text).expect("a configuration");
        let out = dir.path().join("dense");
        init(&config, &out, &InitOptions { seed: 4, ..InitOptions::default() }, &mut |_| {})
            .expect("a model");

        let sequences = vec![vec![3, 9], vec![17, 2], vec![30, 8]];
        let got = importances(&out, &sequences, &[0, 1, 0], 2, &mut |_| {}).expect("importances");

        let model = Model::load(&out).expect("the model");
        let mut want = vec![vec![vec![0.0; config.intermediate]; 2]; config.num_layers];
        for (ids, (group, count)) in sequences.iter().zip([(0, 2.0), (1, 1.0), (0, 2.0)]) {
            let mut grads = Buf::zeros(model.layout().len());
            let mut workspace = TrainWorkspace::new(&model, 1, Precision::F32);
            let args = StepArgs {
                loss_scale: 1.0,
                sparsity_weight: 0.0,
                sparsity_over: SparsityOver::All,
                balance_scale: 0.0,
                seed: 0,
            };
            model
                .train_step(
                    &mut grads,
                    Batch { inputs: &ids[..1], targets: &ids[1..], seq: 1 },
                    &args,
                    &mut workspace,
                )
                .expect("a step");
            for (layer, want) in want.iter_mut().enumerate() {
                let name = format!("model.layers.{layer}.mlp.down_proj.weight");
                let range = model.layout().get(&name).expect("a tensor").range.clone();
                let rows = model.params()[range.clone()].chunks_exact(config.hidden);
                for (want, (v, dv)) in
                    want[group].iter_mut().zip(rows.zip(grads[range].chunks_exact(config.hidden)))
                {
                    let sum: f64 = v.iter().zip(dv).map(|(&v, &dv)| f64::from(v) * f64::from(dv)).sum();
                    *want += sum.abs() / count;
                }
            }
        }
        let largest = want.iter().flatten().flatten().fold(0.0f64, |a, &b| a.max(b));
        assert!(largest > 0.0);
        for (got, want) in got.iter().flatten().flatten().zip(want.iter().flatten().flatten()) {
            assert!((got - want).abs() < 1e-4 * largest, "{got} {want}");
        }
        let again = importances(&out, &sequences, &[0, 1, 0], 2, &mut |_| {}).expect("importances");
        assert_eq!(got, again);
    }
}
