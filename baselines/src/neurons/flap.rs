//! FLAP (An et al., AAAI 2024, arXiv 2312.11983) on FFNs: neurons whose values vary least are removed, and a bias stands
//! for their means.
//!
//! ```text
//! over all calibration tokens, on the dense model      m_j = mean h_j,  v_j = variance of h_j (tokens - 1)
//! wifv_j = v_j |W_j|^2       ifv_j = v_j       wifn_j = mean over rows of |W| times |h_j|       W_j column j of down_proj
//! adaptive: s = (score - mean) / deviation within its layer, and the largest s of all layers stay
//! b = sum over removed j of m_j W_j
//! ```
//! The official code adds up variances sample by sample and leaves the first out; here they are those of the formula.
//! In a model with massive values at first positions, these own the variances of a few neurons, whose layers then keep all
//! of theirs; `first=false` leaves those positions out.
//! Attention stays: FLAP's scores of heads compete with those of neurons there.

use dsmoe_core::Config;
use dsmoe_core::calibrate::{Input, LayerStream, Linear, check_text};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    COLUMNS, Output, add_bias, at, check_masks, column_norms, even_widths, keep, largest, neurons_left, plan,
    spread, with_widths,
};
use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings};

/// The method `flap`.
pub(crate) static FLAP: Entry<Settings> = Entry {
    name: "flap",
    summary: "FLAP on FFNs: neurons that vary least are removed, a bias stands for their means; any budget",
    ..Entry::new(|settings| Ok(Box::new(Flap(settings))))
};

settings! {
    /// Settings of FLAP.
    pub(crate) struct Settings {
        /// Score of a neuron: wifv (variance times squared norm of its column), ifv (variance) or wifn (weighted norm).
        pub metric: Metric = Metric::Wifv,
        /// Neurons of a layer: adaptive (standardised scores of all layers compete) or uniform (the same share).
        pub structure: Structure = Structure::Adaptive,
        /// True adds the mean of what removed neurons gave as a bias.
        pub bias: bool = true,
        /// False leaves the first position of every text out of means and variances; the official code counts it.
        pub first: bool = true,
    }
}

/// The score of a neuron.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Metric {
    /// The variance of its value times the squared norm of its column of `down_proj`.
    Wifv,
    /// The variance of its value.
    Ifv,
    /// The norm of its value over all tokens times the mean magnitude of its column.
    Wifn,
}

/// The neurons of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Structure {
    /// Standardised scores of all layers compete.
    Adaptive,
    /// Every layer keeps the same share.
    Uniform,
}

/// FLAP with its settings.
struct Flap(Settings);

/// Sums over tokens of the values of a layer's neurons.
pub(super) struct Moments {
    tokens: usize,
    /// Sums of values and of squares, by neuron.
    sums: Vec<[f64; 2]>,
}

impl Moments {
    pub(super) fn new(neurons: usize) -> Moments {
        Moments { tokens: 0, sums: vec![[0.0; 2]; neurons] }
    }

    /// Adds tokens `h` `[tokens, neurons]`.
    pub(super) fn add(&mut self, h: &[f32]) {
        let neurons = self.sums.len();
        self.tokens += h.len() / neurons.max(1);
        self.sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, sums)| {
            for row in h.chunks_exact(neurons) {
                for (sum, &h) in sums.iter_mut().zip(&row[task * COLUMNS..]) {
                    let h = f64::from(h);
                    sum[0] += h;
                    sum[1] += h * h;
                }
            }
        });
    }

    pub(super) fn means(&self) -> Vec<f64> {
        self.sums.iter().map(|sum| sum[0] / self.tokens.max(1) as f64).collect()
    }

    /// Returns the scores of the neurons, whose down projection is `down`.
    pub(super) fn scores(&self, metric: Metric, down: &Linear) -> Vec<f64> {
        let n = self.tokens as f64;
        let variance = |[sum, square]: [f64; 2]| (square - sum * sum / n).max(0.0) / (n - 1.0).max(1.0);
        match metric {
            Metric::Ifv => self.sums.iter().map(|&sum| variance(sum)).collect(),
            Metric::Wifv => {
                let norms = column_norms(down);
                self.sums.iter().zip(norms).map(|(&sum, norm)| variance(sum) * norm * norm).collect()
            }
            Metric::Wifn => {
                let mut magnitudes = vec![0.0; down.inputs];
                for row in down.weight.chunks_exact(down.inputs) {
                    magnitudes.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(w.abs()));
                }
                let rows = down.outputs as f64;
                self.sums.iter().zip(magnitudes).map(|(sum, w)| w / rows * sum[1].sqrt()).collect()
            }
        }
    }
}

/// Returns the scores minus their mean over their deviation; zeros if all are alike.
fn standardised(scores: &[f64]) -> Vec<f64> {
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let variance = scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let scale = if variance > 0.0 { variance.sqrt().recip() } else { 0.0 };
    scores.iter().map(|s| (s - mean) * scale).collect()
}

/// Returns the neurons of every layer that stay, ascending, `total` of them together; every layer keeps its best one.
pub(super) fn kept(
    scores: &[Vec<f64>],
    structure: Structure,
    widths: &[usize],
    total: usize,
) -> Vec<Vec<usize>> {
    if structure == Structure::Uniform {
        return scores.iter().zip(widths).map(|(scores, &width)| largest(scores, width)).collect();
    }
    let mut ranked: Vec<(f64, usize, usize)> = Vec::new();
    for (layer, scores) in scores.iter().enumerate() {
        let best = largest(scores, 1)[0];
        let scored = standardised(scores).into_iter().enumerate();
        ranked.extend(scored.map(|(j, s)| (if j == best { f64::INFINITY } else { s }, layer, j)));
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut kept = vec![Vec::new(); scores.len()];
    ranked.iter().take(total).for_each(|&(_, layer, j)| kept[layer].push(j));
    kept.iter_mut().for_each(|of_layer| of_layer.sort_unstable());
    kept
}

impl Flap {
    /// Returns the number of neurons left, and the widths of layers that are pruned alike.
    fn sizes(&self, config: &Config, budget: Budget) -> Result<(usize, Vec<usize>)> {
        let total = neurons_left(config, budget, self.0.bias)?;
        Ok((total, even_widths(config, total)))
    }

    fn planned(&self, pruned: &Config) -> Plan {
        let neurons: usize = pruned.layers().map(|shape| shape.intermediate).sum();
        let of_layer = match self.0.structure {
            Structure::Adaptive => "by standardised scores",
            Structure::Uniform => "the same share of every layer",
        };
        plan(pruned, format!("{neurons} neurons, {of_layer}"))
    }
}

impl Configured for Flap {
    fn needs_calibration(&self) -> bool {
        true
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let (total, mut widths) = self.sizes(config, budget)?;
        if self.0.structure == Structure::Adaptive {
            // Parameters depend on the sum of widths alone.
            spread(&mut widths, config, total);
        }
        Ok(self.planned(&with_widths(config, &widths, self.0.bias)))
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let (total, widths) = self.sizes(&config, job.budget)?;
        check_text(job.calibration, 1, "variances")?;
        check_masks(job)?;
        let mut stream = LayerStream::open_on(job.comm, job.model, job.calibration)?;
        let layers = config.num_layers;
        let (mut scores, mut means) = (Vec::with_capacity(layers), Vec::with_capacity(layers));
        for i in 0..layers {
            at(progress, "variances", i, layers);
            let weights = stream.layer(i)?;
            let [.., down] = &weights.linears;
            let mut moments = Moments::new(down.inputs);
            let mut see = |tap: dsmoe_core::calibrate::Tap<'_>| {
                if tap.input == Input::Neurons {
                    moments.add(if self.0.first { tap.x } else { &tap.x[down.inputs..] });
                }
            };
            stream.advance_seen(&weights, &mut see)?;
            let of_layer = moments.scores(self.0.metric, down);
            if !of_layer.iter().all(|score| score.is_finite()) {
                let help = "check the model with eval";
                return Err(Error::numeric(&down.name, "reads values that are not finite", help));
            }
            scores.push(of_layer);
            means.push(moments.means());
        }
        let kept = kept(&scores, self.0.structure, &widths, total);
        let widths: Vec<usize> = kept.iter().map(Vec::len).collect();
        let pruned = with_widths(&config, &widths, self.0.bias);
        let mut output = Output::create(job, &stream, &pruned)?;
        for (i, kept) in kept.iter().enumerate() {
            at(progress, "writing", i, layers);
            let mut weights = stream.layer(i)?;
            if self.0.bias {
                let bias = bias_of(&weights.linears[6], &means[i], kept);
                add_bias(&mut weights, &bias);
            }
            keep(&mut weights, kept);
            output.round(&mut weights)?;
            output.layer(&stream, &weights)?;
        }
        output.finish(&stream)?;
        at(progress, "writing", layers, layers);
        let measured = widths.iter().enumerate().map(|(i, &n)| (format!("layer {i} neurons"), n as f64));
        Ok(Made { plan: self.planned(&pruned), measured: measured.collect() })
    }
}

/// Returns the sum of the columns of removed neurons times their means.
pub(super) fn bias_of(down: &Linear, means: &[f64], kept: &[usize]) -> Vec<f32> {
    let mut removed = vec![true; down.inputs];
    kept.iter().for_each(|&j| removed[j] = false);
    let sum = |row: &[f32]| {
        let terms = row.iter().zip(means).zip(&removed).filter(|(_, removed)| **removed);
        terms.map(|((&w, mean), _)| f64::from(w) * mean).sum::<f64>() as f32
    };
    down.weight.par_chunks(down.inputs).map(sum).collect()
}
