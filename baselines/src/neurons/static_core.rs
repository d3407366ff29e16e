//! The control of dynamic routing: the same neurons run for every token, the most important of each layer, with the
//! closed-form compensation of DSMoE's start. What DSMoE gains over it is what routing gains.
//!
//! ```text
//! layer by layer, on the stream of the pruned layers before it; tokens after the first of their sequence
//!   importance_j = spread of h_j times |W_j|,  spread: mean |h|, root mean square or deviation; W_j column j of down_proj
//!   stay           the `first` neurons of the largest |h_j| |W_j| at first positions, then the most important
//!   down, b        least squares towards the dense FFN's output, see [`dsmoe_core::compensate`]
//! ```

use dsmoe_core::Config;
use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights, Tap, check_text};
use dsmoe_core::compensate::{LeastSquares, Rows};
use dsmoe_kernels::{Precision, linear};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    COLUMNS, Output, add_bias, at, check_masks, column_norms, columns, even_widths, keep, largest,
    neurons_left, plan, with_widths,
};
use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings, wrong};

/// The method `static-core`.
pub(crate) static STATIC_CORE: Entry<Settings> = Entry {
    name: "static-core",
    summary: "control: the most important neurons of each layer, down_proj and a bias fitted to the rest; any budget",
    ..Entry::new(configure)
};

settings! {
    /// Settings of the static core.
    pub(crate) struct Settings {
        /// Importance of a neuron, times the norm of its column: magnitude (mean |h|), rms or deviation.
        pub importance: Importance = Importance::Magnitude,
        /// Neurons per layer that stay for what they do at the first position of a text, whose states later tokens read.
        pub first: usize = 16,
        /// True fits down_proj to the dense output on the remaining neurons.
        pub compensate: bool = true,
        /// True fits a bias of the output as well.
        pub intercept: bool = true,
        /// Ridge that holds down_proj to its old weights, as a share of the mean of the neurons' squares; above 0.
        pub ridge: f64 = 0.01,
        /// True divides the error of a token by the norm of its residual stream.
        pub relative: bool = true,
    }
}

/// The importance of a neuron.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Importance {
    /// The mean of |h|.
    Magnitude,
    /// The root mean square of h.
    Rms,
    /// The standard deviation of h.
    Deviation,
}

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    if !(settings.ridge.is_finite() && settings.ridge > 0.0) {
        return Err(wrong::<Settings>("ridge", settings.ridge));
    }
    Ok(Box::new(StaticCore(settings)))
}

/// The static core with its settings.
struct StaticCore(Settings);

/// Sums over tokens of the values of a layer's neurons.
#[derive(Clone, Copy, Default)]
struct Sums {
    magnitude: f64,
    sum: f64,
    square: f64,
    /// The largest magnitude at a first position.
    first: f64,
}

impl Sums {
    /// Adds a sequence `h` `[seq, neurons]`.
    fn add(sums: &mut [Sums], h: &[f32]) {
        let neurons = sums.len();
        sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, sums)| {
            for (t, row) in h.chunks_exact(neurons).enumerate() {
                for (of, &h) in sums.iter_mut().zip(&row[task * COLUMNS..]) {
                    let h = f64::from(h);
                    if t == 0 {
                        of.first = of.first.max(h.abs());
                    } else {
                        of.magnitude += h.abs();
                        of.sum += h;
                        of.square += h * h;
                    }
                }
            }
        });
    }

    fn spread(self, importance: Importance, tokens: f64) -> f64 {
        match importance {
            Importance::Magnitude => self.magnitude / tokens,
            Importance::Rms => (self.square / tokens).sqrt(),
            Importance::Deviation => (self.square / tokens - (self.sum / tokens).powi(2)).max(0.0).sqrt(),
        }
    }
}

impl StaticCore {
    fn has_bias(&self) -> bool {
        self.0.compensate && self.0.intercept
    }

    fn pruned(&self, config: &Config, budget: Budget) -> Result<Config> {
        let total = neurons_left(config, budget, self.has_bias())?;
        Ok(with_widths(config, &even_widths(config, total), self.has_bias()))
    }

    /// Chooses `count` neurons of a layer.
    fn choose(&self, stream: &mut LayerStream, weights: &LayerWeights, count: usize) -> Result<Vec<usize>> {
        let [.., down] = &weights.linears;
        let mut sums = vec![Sums::default(); down.inputs];
        let mut tokens = 0;
        stream.forward(weights, &mut |tap| {
            if tap.input == Input::Neurons {
                tokens += tap.x.len() / sums.len() - 1;
                Sums::add(&mut sums, tap.x);
            }
        });
        let (norms, tokens) = (column_norms(down), tokens as f64);
        let first: Vec<f64> = sums.iter().zip(&norms).map(|(of, norm)| of.first * norm).collect();
        let scored = sums.iter().zip(&norms);
        let mut scores: Vec<f64> =
            scored.map(|(of, norm)| of.spread(self.0.importance, tokens) * norm).collect();
        if !scores.iter().chain(&first).all(|score| score.is_finite()) {
            let help = "check the model with eval";
            return Err(Error::numeric(&down.name, "reads values that are not finite", help));
        }
        largest(&first, self.0.first.min(count)).into_iter().for_each(|j| scores[j] = f64::INFINITY);
        Ok(largest(&scores, count))
    }

    /// Prunes a layer to the neurons `kept`.
    fn prune(
        &self,
        stream: &mut LayerStream,
        weights: &LayerWeights,
        kept: &[usize],
    ) -> Result<LayerWeights> {
        let mut pruned = weights.clone();
        keep(&mut pruned, kept);
        if !self.0.compensate {
            return Ok(pruned);
        }
        let down = &weights.linears[6];
        let mut is_kept = vec![false; down.inputs];
        kept.iter().for_each(|&j| is_kept[j] = true);
        let removed: Vec<usize> = (0..down.inputs).filter(|&j| !is_kept[j]).collect();
        let lost = columns(&down.weight, down.inputs, &removed);
        let mut sums = LeastSquares::new(kept.len(), down.outputs);
        stream.forward(weights, &mut |tap| {
            if tap.input == Input::Neurons {
                let (seq, outputs) = (tap.x.len() / down.inputs, down.outputs);
                let [inputs, left] = [kept, &removed].map(|of| columns(tap.x, down.inputs, of));
                let mut residuals = vec![0.0; seq * outputs];
                let dims =
                    linear::Dims { rows: seq, inputs: removed.len(), outputs, precision: Precision::F32 };
                if !removed.is_empty() {
                    linear::Forward { y: &mut residuals, x: &left, w: &lost, bias: None, dims }.run();
                }
                let factors = self.factors(&tap, seq);
                sums.add(Rows { inputs: &inputs, residuals: &residuals, factors: &factors });
            }
        });
        let solved = sums.solve(self.0.ridge, self.0.intercept).ok_or_else(|| {
            let help = "raise the setting ridge or check the model with eval";
            Error::numeric(&down.name, "has no least-squares fit", help)
        })?;
        solved.add_to(&mut pruned.linears[6].weight, kept.len());
        if let Some(bias) = &solved.bias {
            add_bias(&mut pruned, bias);
        }
        Ok(pruned)
    }

    /// The factors of the rows of a sequence: 0 for the first position.
    fn factors(&self, tap: &Tap<'_>, seq: usize) -> Vec<f32> {
        let hidden = tap.residual.len() / seq;
        let norm = |row: &[f32]| row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let factor = |(t, row): (usize, &[f32])| match t {
            0 => 0.0,
            _ if self.0.relative => norm(row).max(f64::from(f32::MIN_POSITIVE)).recip() as f32,
            _ => 1.0,
        };
        tap.residual.chunks_exact(hidden).enumerate().map(factor).collect()
    }
}

impl Configured for StaticCore {
    fn needs_calibration(&self) -> bool {
        true
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        let pruned = self.pruned(config, budget)?;
        let reached_by = format!("{} of {} neurons per layer", pruned.intermediate, config.intermediate);
        Ok(plan(&pruned, reached_by))
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let pruned = self.pruned(&config, job.budget)?;
        let plan = self.plan(&config, job.budget)?;
        check_text(job.calibration, 1, "importances")?;
        check_masks(job)?;
        let mut stream = LayerStream::open(job.model, job.calibration)?;
        let mut output = Output::create(job, &stream, &pruned)?;
        for i in 0..config.num_layers {
            at(progress, "pruning layers", i, config.num_layers);
            let weights = stream.layer(i)?;
            let kept = self.choose(&mut stream, &weights, pruned.layer(i).intermediate)?;
            let mut weights = self.prune(&mut stream, &weights, &kept)?;
            output.round(&mut weights)?;
            output.layer(&stream, &weights)?;
            if i + 1 < config.num_layers {
                stream.advance(&weights);
            }
        }
        output.finish(&stream)?;
        at(progress, "pruning layers", config.num_layers, config.num_layers);
        Ok(Made { plan, measured: Vec::new() })
    }
}
