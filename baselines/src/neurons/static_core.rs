//! The control of dynamic routing: the same neurons run for every token, the most important of each layer, with the
//! closed-form compensation of DSMoE's start. What DSMoE gains over it is what routing gains.
//!
//! ```text
//! layer by layer, on the stream of the pruned layers before it; tokens after the first of their sequence
//!   importance_j = spread of h_j times |W_j|,  spread: deviation, root mean square or mean |h|; W_j column j of down_proj
//!   stay           the `first` neurons of the largest |h_j| |W_j| at first positions, then the most important
//!   down, b        least squares towards the dense FFN's output, see [`dsmoe_core::compensate`]
//! widths: alike, or those that change the final distribution least, from each layer pruned alone
//! ```

use dsmoe_core::Config;
use dsmoe_core::allocation::{Costs, choose};
use dsmoe_core::calibrate::{Down, FfnTap, LayerStream, LayerWeights, Linear, check_text};
use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::compensate::{Correction, Moments};
use dsmoe_core::divergence::{Alone, Change};
use dsmoe_kernels::Precision;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    COLUMNS, Output, add_bias, at, check_masks, column_norms, columns, even_widths, keep, largest,
    neurons_left, plan, spread, with_widths,
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
        /// Importance of a neuron, times the norm of its column: deviation, rms or magnitude (mean |h|).
        pub importance: Importance = Importance::Deviation,
        /// Neurons per layer that stay for what they do at the first position of a text, whose states later tokens read.
        pub first: usize = 16,
        /// True fits down_proj to the dense output on the remaining neurons.
        pub compensate: bool = true,
        /// True fits a bias of the output as well.
        pub intercept: bool = true,
        /// Ridge that holds down_proj to its old weights, as a share of the mean of the neurons' squares; above 0.
        pub ridge: f64 = 0.1,
        /// True divides the error of a token by the norm of its residual stream.
        pub relative: bool = false,
        /// Neurons of a layer: divergence (those that change the final distribution least) or uniform (the same share).
        pub widths: Widths = Widths::Divergence,
        /// Calibration tokens that divergences are taken on, at the most; at least 2.
        pub tokens: usize = 1024,
    }
}

/// The numbers of neurons of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Widths {
    /// The same share of every layer.
    Uniform,
    /// Those that change the final distribution least.
    Divergence,
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
    if settings.tokens < 2 {
        return Err(wrong::<Settings>("tokens", settings.tokens));
    }
    Ok(Box::new(StaticCore(settings)))
}

/// Widths at which a layer is pruned alone, as shares of the mean width that is wanted.
const SHARES: [f64; 3] = [0.5, 1.0, 1.7];
/// Tokens that the layers' moments are taken on when they are pruned alone.
const MOST_TOKENS: usize = 16_384;

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

/// A layer's neurons on the calibration text: what orders them, and what their fits follow from.
struct Seen {
    /// Neurons, those that stay longest first.
    order: Vec<usize>,
    moments: Moments,
}

impl StaticCore {
    fn has_bias(&self) -> bool {
        self.0.compensate && self.0.intercept
    }

    /// Returns the neurons of all layers that the budget leaves, and as many for each layer as its share.
    fn sizes(&self, config: &Config, budget: Budget) -> Result<(usize, Vec<usize>)> {
        let total = neurons_left(config, budget, self.has_bias())?;
        Ok((total, even_widths(config, total)))
    }

    fn planned(&self, config: &Config, pruned: &Config) -> Plan {
        let neurons = |config: &Config| config.layers().map(|shape| shape.intermediate).sum::<usize>();
        let of_layer = match self.0.widths {
            Widths::Uniform => "the same share of every layer",
            Widths::Divergence => "by the change of the output",
        };
        plan(pruned, format!("{} of {} neurons, {of_layer}", neurons(pruned), neurons(config)))
    }

    /// Sees the FFN of a layer after its attention.
    fn see(&self, stream: &mut LayerStream, weights: &LayerWeights) -> Result<Seen> {
        let down = &weights.linears[6];
        let mut sums = vec![Sums::default(); down.inputs];
        let (mut moments, mut tokens) = (Moments::new(down.inputs).on(stream.comm()), 0);
        stream.see_ffn(weights, &mut |tap| {
            let seq = tap.neurons.len() / sums.len();
            tokens += seq - 1;
            Sums::add(&mut sums, tap.neurons);
            if self.0.compensate {
                moments.add(tap.neurons, &self.factors(tap.residual, seq));
            }
        })?;
        moments.complete()?;
        let (norms, tokens) = (column_norms(down), tokens as f64);
        let first: Vec<f64> = sums.iter().zip(&norms).map(|(of, norm)| of.first * norm).collect();
        let scored = sums.iter().zip(&norms);
        let mut scores: Vec<f64> =
            scored.map(|(of, norm)| of.spread(self.0.importance, tokens) * norm).collect();
        if !scores.iter().chain(&first).all(|score| score.is_finite()) {
            let help = "check the model with eval";
            return Err(Error::numeric(&down.name, "reads values that are not finite", help));
        }
        largest(&first, self.0.first).into_iter().for_each(|j| scores[j] = f64::INFINITY);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| {
            scores[b].total_cmp(&scores[a]).then(first[b].total_cmp(&first[a])).then(a.cmp(&b))
        });
        Ok(Seen { order, moments })
    }

    /// The factors of the rows of a sequence: 0 for the first position.
    fn factors(&self, residual: &[f32], seq: usize) -> Vec<f32> {
        let norm = |row: &[f32]| row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let factor = |(t, row): (usize, &[f32])| match t {
            0 => 0.0,
            _ if self.0.relative => norm(row).max(f64::from(f32::MIN_POSITIVE)).recip() as f32,
            _ => 1.0,
        };
        residual.chunks_exact(residual.len() / seq).enumerate().map(factor).collect()
    }

    /// Chooses `count` neurons of a layer, ascending, and fits its down projection to them.
    fn fit(&self, seen: &Seen, down: &Linear, count: usize) -> Result<(Vec<usize>, Option<Correction>)> {
        let mut kept = seen.order[..count].to_vec();
        kept.sort_unstable();
        if !self.0.compensate {
            return Ok((kept, None));
        }
        let solved = seen.moments.fit(&down.weight, &kept, self.0.ridge, self.0.intercept);
        let solved = solved.ok_or_else(|| {
            let help = "raise the setting ridge or check the model with eval";
            Error::numeric(&down.name, "has no least-squares fit", help)
        })?;
        Ok((kept, Some(solved)))
    }

    /// Prunes a layer to `count` neurons.
    fn prune(&self, seen: &Seen, weights: &LayerWeights, count: usize) -> Result<LayerWeights> {
        let (kept, solved) = self.fit(seen, &weights.linears[6], count)?;
        let mut pruned = weights.clone();
        keep(&mut pruned, &kept);
        if let Some(Correction { bias, .. }) = &solved {
            bias.iter().for_each(|bias| add_bias(&mut pruned, bias));
        }
        if let Some(solved) = &solved {
            solved.add_to(&mut pruned.linears[6].weight, kept.len());
        }
        Ok(pruned)
    }

    /// Measures what each layer's widths cost when it is pruned alone, and chooses widths.
    fn by_divergence(
        &self,
        job: &Job<'_>,
        config: &Config,
        total: usize,
        measured: &mut Vec<(String, f64)>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<usize>> {
        let layers = config.num_layers;
        let sizes: Vec<usize> = config.layers().map(|shape| shape.intermediate).collect();
        let share = total as f64 / sizes.iter().sum::<usize>() as f64;
        let seq = job.calibration[0].len();
        let some = |tokens: usize| &job.calibration[..(tokens / seq).clamp(1, job.calibration.len())];
        let precision = Checkpoint::open(job.model)?.precision();
        let mut copies = Alone::open_on(job.comm, job.model, job.calibration, self.0.tokens, precision)?;
        let mut stream = LayerStream::open_on(job.comm, job.model, some(MOST_TOKENS))?;
        let mut counts: Vec<Vec<usize>> = Vec::with_capacity(layers);
        for (i, &size) in sizes.iter().enumerate() {
            at(progress, "widths of layers", i, layers);
            let weights = stream.layer(i)?;
            stream.attend(&weights)?;
            let seen = self.see(&mut stream, &weights)?;
            let mut of_layer: Vec<usize> = SHARES
                .iter()
                .map(|part| ((part * share * size as f64).round() as usize).clamp(1, size))
                .filter(|&count| count < size)
                .collect();
            of_layer.dedup();
            let pruned = |&count: &usize| self.silenced(&seen, &weights, count, precision);
            let mut pruned = of_layer.iter().map(pruned).collect::<Result<Vec<_>>>()?;
            copies.layer(&weights, &mut pruned)?;
            counts.push(of_layer);
            let dense = Down::of(Precision::F32, &weights);
            stream.join_ffn(&weights, &mut |y, tap| dense.forward(y, tap.neurons))?;
        }
        let mut costs = copies.divergences()?.into_iter();
        let mut of_layers = Vec::with_capacity(layers);
        for (i, (counts, &size)) in counts.iter().zip(&sizes).enumerate() {
            let known: Vec<(usize, f64)> = counts.iter().copied().zip(&mut costs).collect();
            for (count, cost) in &known {
                measured.push((format!("layer {i}: divergence with {count} neurons alone"), *cost));
            }
            of_layers.push(Costs { least: counts.first().copied().unwrap_or(size), known, size });
        }
        Ok(choose(&of_layers, total))
    }

    /// Returns the FFN of a layer with `count` neurons, the others being silent.
    fn silenced(
        &self,
        seen: &Seen,
        weights: &LayerWeights,
        count: usize,
        precision: Precision,
    ) -> Result<Box<Change<'static>>> {
        let down = &weights.linears[6];
        let (kept, solved) = self.fit(seen, down, count)?;
        let mut columns = columns(&down.weight, down.inputs, &kept);
        let mut bias = down.bias.as_ref().map(|bias| bias.to_vec());
        if let Some(solved) = &solved {
            solved.add_to(&mut columns, count);
            if let Some(added) = &solved.bias {
                let sum = bias.get_or_insert_with(|| vec![0.0; down.outputs]);
                sum.iter_mut().zip(added).for_each(|(sum, b)| *sum += b);
            }
        }
        let (packed, width) = (Down::new(precision, &columns, count, bias.as_deref()), down.inputs);
        Ok(Box::new(move |y: &mut [f32], tap: FfnTap<'_>| {
            let rows = tap.neurons.chunks_exact(width);
            let left: Vec<f32> = rows.flat_map(|row| kept.iter().map(|&j| row[j])).collect();
            packed.forward(y, &left);
        }))
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
        let (total, mut widths) = self.sizes(config, budget)?;
        if self.0.widths == Widths::Divergence {
            spread(&mut widths, config, total);
        }
        Ok(self.planned(config, &with_widths(config, &widths, self.has_bias())))
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let (total, even) = self.sizes(&config, job.budget)?;
        check_text(job.calibration, 1, "importances")?;
        check_masks(job)?;
        let mut measured = Vec::new();
        let widths = match self.0.widths {
            Widths::Uniform => even,
            Widths::Divergence => self.by_divergence(job, &config, total, &mut measured, progress)?,
        };
        let pruned = with_widths(&config, &widths, self.has_bias());
        let mut stream = LayerStream::open_on(job.comm, job.model, job.calibration)?;
        let mut output = Output::create(job, &stream, &pruned)?;
        for (i, &width) in widths.iter().enumerate() {
            at(progress, "pruning layers", i, config.num_layers);
            let weights = stream.layer(i)?;
            stream.attend(&weights)?;
            let seen = self.see(&mut stream, &weights)?;
            let mut weights = self.prune(&seen, &weights, width)?;
            output.round(&mut weights)?;
            output.layer(&stream, &weights)?;
            let down = Down::of(Precision::F32, &weights);
            stream.join_ffn(&weights, &mut |y, tap| down.forward(y, tap.neurons))?;
            measured.push((format!("layer {i} neurons"), width as f64));
        }
        output.finish(&stream)?;
        at(progress, "pruning layers", config.num_layers, config.num_layers);
        Ok(Made { plan: self.planned(&config, &pruned), measured })
    }
}
