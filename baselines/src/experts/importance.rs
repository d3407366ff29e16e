//! The importance of each neuron for each group of texts: the first-order change of the loss without it.
//!
//! ```text
//! v_j = mean over tokens of |h_j dL/dh_j|,   h = act(x Wg^T) * (x Wu^T),   dL/dh = dL/dy Wd^T
//! ```
//! L is the mean next-token loss of a sequence, as LLaMA-MoE has it (`llama_split_gradient_get_grads`, kernel l1).
//! One sequence at a time through [`Model::train_step`], whose FFNs are the dense ones with a sum on the way back.
//! Parameters and gradients are both in memory in f32: 8 bytes per parameter, 10 GB for LLaMA-3.2-1B.

use std::any::Any;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use dsmoe_core::Model;
use dsmoe_core::ffn::{DenseFfn, Ffn, FfnBackward, FfnForward, FfnReport, Gated, PackedFfn};
use dsmoe_core::params::TensorSpec;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::expert_ffn::Saved;
use dsmoe_kernels::{Activation, Precision, linear};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::gradients::Gradients;
use crate::method::Progress;
use crate::partial::{Pace, Partial};

/// Neurons per task.
const TASK: usize = 256;
/// The part with the sums of an interrupted computation.
const SUMS: &str = "importances";

/// Importances `[group][neuron]` of one layer.
pub(crate) type LayerImportance = Vec<Vec<f64>>;

/// The sums over the sequences that are done, as an interrupted computation leaves them: numbers as bits.
#[derive(Serialize, Deserialize)]
struct Begun {
    finished: usize,
    /// Tokens of groups.
    tokens: Vec<usize>,
    /// `[layer][group][neuron]`
    sums: Vec<Vec<Vec<u64>>>,
}

impl Begun {
    fn of(finished: usize, tokens: &[usize], importances: &[LayerImportance]) -> Begun {
        let bits = |group: &Vec<f64>| group.iter().map(|sum| sum.to_bits()).collect();
        let sums = importances.iter().map(|layer| layer.iter().map(bits).collect()).collect();
        Begun { finished, tokens: tokens.to_vec(), sums }
    }

    /// Returns the number of finished sequences, the tokens of groups, and the sums.
    fn into_sums(self) -> (usize, Vec<usize>, Vec<LayerImportance>) {
        let floats = |group: Vec<u64>| group.into_iter().map(f64::from_bits).collect();
        let sums = self.sums.into_iter().map(|layer| layer.into_iter().map(floats).collect());
        (self.finished, self.tokens, sums.collect())
    }
}

/// Computes the importances of every layer's neurons in the dense model of `dir` for each group of `sequences`, whose
/// groups `labels` gives. `partial` keeps the sums of an interrupted computation.
///
/// # Errors
/// `partial` has the sums of other work, or the file system refuses; the model cannot be read; sequences that differ in length,
/// are shorter than two tokens or longer than the model has positions, or have tokens outside the vocabulary; a loss that is
/// not finite.
pub(crate) fn importances(
    dir: &Path,
    sequences: &[Vec<u32>],
    labels: &[usize],
    num_groups: usize,
    partial: &Partial,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<LayerImportance>> {
    let model = Model::load(dir)?;
    let config = model.config().clone();
    let sums: Vec<_> = config.layers().map(|of| Sums::new(Mutex::new(vec![0.0; of.intermediate]))).collect();
    let probes = sums.iter().enumerate().map(|(layer, sums)| -> Box<dyn Ffn> {
        let gated = Gated::of_layer(&config, layer);
        Box::new(Probe { dense: DenseFfn::of(gated), gated, sums: sums.clone() })
    });
    let mut probed = Model::with_ffns(config.clone(), probes.collect());
    probed.params_mut().copy_from_slice(model.params());
    drop(model);

    let mut gradients = Gradients::new(&probed, sequences)?;
    let mut importances: Vec<LayerImportance> =
        config.layers().map(|shape| vec![vec![0.0; shape.intermediate]; num_groups]).collect();
    let mut tokens = vec![0; num_groups];
    let mut finished = 0;
    if let Some(begun) = partial.read::<Begun>(SUMS)? {
        (finished, tokens, importances) = begun.value.into_sums();
    }
    let mut pace = Pace::new();
    for (done, (ids, &group)) in sequences.iter().zip(labels).enumerate().skip(finished) {
        progress(Progress { stage: "gradients", done: done as u64, total: sequences.len() as u64 });
        gradients.add(done)?;
        tokens[group] += ids.len() - 1;
        for (sums, importance) in sums.iter().zip(&mut importances) {
            let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
            for (sum, total) in sums.iter_mut().zip(&mut importance[group]) {
                *total += std::mem::take(sum);
            }
        }
        if pace.is_due() {
            partial.keep(SUMS, &Begun::of(done + 1, &tokens, &importances), &[])?;
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
/// Those of [`importances`].
pub(crate) fn neurons_by_importance(
    dir: &Path,
    sequences: &[Vec<u32>],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Vec<u32>>> {
    let labels = vec![0; sequences.len()];
    let layers = importances(dir, sequences, &labels, 1, Partial::none(), progress)?;
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
    gated: Gated,
    sums: Sums,
}

impl Ffn for Probe {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.dense.tensors()
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        self.dense.pack(params, precision)
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        self.dense.new_saved(tokens)
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        self.dense.forward_train(args)
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dy, x, params, .. } = args;
        let saved = args.saved.downcast_ref::<Saved>().expect("saved by a dense FFN");
        let Gated { hidden, intermediate, activation, .. } = self.gated;
        let (tokens, down) = (x.len() / hidden, self.gated.weights(params).down);
        let mut dh = Buf::zeros(tokens * intermediate);
        let precision = Precision::F32;
        let dims = linear::Dims { rows: tokens, inputs: hidden, outputs: intermediate, precision };
        linear::Forward { y: &mut dh, x: dy, w: down, bias: None, dims }.run();
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.par_chunks_mut(TASK).enumerate().for_each(|(task, sums)| {
            for t in 0..tokens {
                let first = t * intermediate + task * TASK;
                let part = first..first + sums.len();
                let values = saved.a[part.clone()].iter().zip(&saved.b[part.clone()]).zip(&dh[part]);
                for (sum, ((&a, &b), &dh)) in sums.iter_mut().zip(values) {
                    let h = act(activation, a) * b;
                    *sum += f64::from((h * dh).abs());
                }
            }
        });

        drop(sums);
        self.dense.backward(args);
    }
}

/// Returns the activation of a gate's value.
fn act(activation: Activation, a: f32) -> f32 {
    match activation {
        Activation::Silu => a / (1.0 + (-a).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f32::consts::PI).sqrt() * (a + 0.044_715 * a * a * a);
            0.5 * a * (1.0 + u.tanh())
        }
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
        let dir = tempfile::tempdir().unwrap();
        let text = preset("tiny").unwrap().to_json();
        let text = text.replace("\"vocab_size\": 2048", "\"vocab_size\": 40");
        let text = text.replace("\"intermediate_size\": 512", "\"intermediate_size\": 72");
        let config = Config::from_json(Path::new("config.json"), &text).unwrap();
        let out = dir.path().join("dense");
        init(&config, &out, &InitOptions { seed: 4, ..InitOptions::default() }, &mut |_| {}).unwrap();

        let sequences = vec![vec![3, 9], vec![17, 2], vec![30, 8]];
        let got = importances(&out, &sequences, &[0, 1, 0], 2, Partial::none(), &mut |_| {}).unwrap();

        let model = Model::load(&out).unwrap();
        let mut want = vec![vec![vec![0.0; config.intermediate]; 2]; config.num_layers];
        for (sequence, (group, count)) in [(0, 2.0), (1, 1.0), (0, 2.0)].into_iter().enumerate() {
            let mut gradients = Gradients::new(&model, &sequences).unwrap();
            gradients.add(sequence).unwrap();
            for (layer, want) in want.iter_mut().enumerate() {
                let name = format!("model.layers.{layer}.mlp.down_proj.weight");
                let range = model.layout().get(&name).unwrap().range.clone();
                let rows = model.params()[range.clone()].chunks_exact(config.hidden);
                for (want, (v, dv)) in
                    want[group].iter_mut().zip(rows.zip(gradients.sum[range].chunks_exact(config.hidden)))
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
        let again = importances(&out, &sequences, &[0, 1, 0], 2, Partial::none(), &mut |_| {}).unwrap();
        assert_eq!(got, again);
    }
}
