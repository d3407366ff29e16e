//! CMoE (Pei et al., arXiv 2502.04416): the neurons that are active most often are shared experts, the others form
//! experts of neurons that are active for the same tokens, and a neuron of each expert routes to it. Nothing is trained.
//!
//! ```text
//! a(t)     the `active` neurons of the largest |silu(x G^T) (x U^T)| of token t; x and the rows of G and U of length 1
//! shared   the neurons that are in most a(t)
//! routed   clusters of equal size of the others by the l1 distance of their markers (in a(t) or not) to seeds, the next
//!          most frequent neurons; by an exact linear assignment
//! router   the neuron r_i of expert i whose markers are nearest to the mean of its expert: z_i = |silu(g x) (u x)|, rows
//!          of length 1; the k largest run, each with factor 1
//! ```
//! The official code's trained parts are left out: a factor on each score that starts at 0, and biases that balance loads.
//! Layers are made in order, each on the states that the ones before it give.

mod cluster;
#[cfg(test)]
mod tests;

use dsmoe_core::Config;
use dsmoe_core::calibrate::{LayerStream, LayerWeights, Linear, check_router_text};
use dsmoe_core::partition::clusters;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, linear, swiglu};
use dsmoe_router::Fade;
use dsmoe_router::topk::{Scores, TopKConfig, route};
use ndarray::ArrayView2;

use crate::error::{Error, Result};
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings, wrong};
use crate::topk::{
    Gate, GateActs, GateNetwork, GateSpec, GateWeights, LayerExperts, TopkSpec, check_experts, nearest,
    open_dense, write,
};
use cluster::{Experts, Markers};

/// The method `cmoe`.
pub(crate) static CMOE: Entry<Settings> = Entry {
    name: "cmoe",
    summary: "CMoE: frequent neurons are shared, the others clustered, a neuron routes to each expert; budgets k/n",
    ..Entry::new(configure)
};

settings! {
    /// Settings of CMoE.
    pub(crate) struct Settings {
        /// Experts per layer, shared ones included; a divisor of intermediate_size.
        pub experts: usize = 16,
        /// Experts that always run, from 1 to experts - 1; by default half of those that run.
        pub shared: Option<usize> = None,
        /// Neurons that count as active for a token, at least 1.
        pub active: usize = 10,
    }
}

fn configure(settings: Settings) -> Result<Box<dyn Configured>> {
    if settings.active == 0 {
        return Err(wrong::<Settings>("active", 0));
    }
    if let Some(shared) = settings.shared.filter(|shared| !(1..settings.experts.max(1)).contains(shared)) {
        return Err(wrong::<Settings>("shared", shared));
    }
    if settings.experts < 2 {
        return Err(Error::setting("experts", format!("is {}", settings.experts), "use 2 or more"));
    }
    Ok(Box::new(Cmoe(settings)))
}

/// CMoE with its settings.
struct Cmoe(Settings);

impl Cmoe {
    /// Returns the FFN with `active` experts that run.
    fn spec(&self, active: usize) -> TopkSpec {
        let shared = self.0.shared.unwrap_or_else(|| (active / 2).max(1));
        let router = TopKConfig::new(self.0.experts - shared, active - shared).expect("k of n");
        let router = TopKConfig { num_residual: shared, scores: Scores::One, score_scale: 1.0, ..router };
        let network = GateNetwork::Neuron;
        let gate = GateSpec { network, normalize: false, noise: false, bias: false, hidden: None };
        TopkSpec { router, gate, balance_weight: 0.0 }
    }

    fn choose(&self, config: &Config, budget: Budget) -> Result<(TopkSpec, Plan)> {
        check_experts(config, self.0.experts)?;
        let first = self.0.shared.unwrap_or(1) + 1;
        nearest(config, budget, (first..=self.0.experts).map(|active| self.spec(active)))
    }
}

impl Configured for Cmoe {
    fn needs_calibration(&self) -> bool {
        true
    }

    fn resolved(&self) -> SettingValues {
        self.0.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        Ok(self.choose(config, budget)?.1)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let (config, checkpoint) = open_dense(job.model)?;
        let (spec, plan) = self.choose(&config, job.budget)?;
        check_router_text(job.calibration)?;
        let mut stream = LayerStream::open_on(job.comm, job.model, job.calibration)?;
        let mut layers = Vec::with_capacity(config.num_layers);
        for i in 0..config.num_layers {
            progress(Progress { stage: "experts", done: i as u64, total: config.num_layers as u64 });
            let weights = stream.layer(i)?;
            stream.attend(&weights)?;
            let markers = markers(&mut stream, &weights, self.0.active)?;
            let Experts { order, representatives } =
                cluster::experts(&markers, spec.router.num_experts, spec.router.num_residual);
            let [.., gate, up, _] = &weights.linears;
            let rows = |linear: &Linear| {
                let row = |&j: &u32| &linear.weight[j as usize * linear.inputs..][..linear.inputs];
                clusters::normalized(representatives.iter().flat_map(row).copied().collect(), linear.inputs)
            };
            let layer = LayerExperts { gate: vec![rows(gate), rows(up)], order };
            join(&mut stream, &weights, &spec, &layer)?;
            layers.push(layer);
        }
        write(job, &config, &checkpoint, spec, &layers, progress)?;
        Ok(Made { plan, measured: Vec::new() })
    }
}

/// Marks the active neurons of all calibration tokens.
fn markers(stream: &mut LayerStream, weights: &LayerWeights, active: usize) -> Result<Markers> {
    let [.., gate, up, _] = &weights.linears;
    let (hidden, width) = (gate.inputs, gate.outputs);
    let [gate_rows, up_rows] = [gate, up].map(|linear| clusters::normalized(linear.weight.to_vec(), hidden));
    let activation = stream.config().architecture.activation;
    let mut markers = Markers::new(width, active);
    let [mut a, mut b, mut c]: [Buf; 3] = Default::default();
    stream.see_ffn(weights, &mut |tap| {
        let x = clusters::normalized(tap.x.to_vec(), hidden);
        let rows = x.len() / hidden;
        let dims = linear::Dims { rows, inputs: hidden, outputs: width, precision: Precision::F32 };
        [&mut a, &mut b, &mut c].into_iter().for_each(|values| values.resize(rows * width));
        linear::Forward { y: &mut a, x: &x, w: &gate_rows, bias: gate.bias.as_deref(), dims }.run();
        linear::Forward { y: &mut b, x: &x, w: &up_rows, bias: up.bias.as_deref(), dims }.run();
        swiglu::Forward { c: &mut c, a: &a, b: &b, activation }.run();
        c.chunks_exact(width).for_each(|values| markers.push(values));
    })?;
    Ok(markers)
}

/// Completes the layer with its experts.
fn join(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    spec: &TopkSpec,
    layer: &LayerExperts,
) -> Result<()> {
    let down = &weights.linears[6];
    let (hidden, width) = (down.outputs, down.inputs);
    let of_one = width / spec.all_experts();
    let gate: Gate = spec.gate(hidden);
    let (mut z, mut acts, mut values) = (Buf::default(), GateActs::default(), Vec::new());
    stream.join_ffn(weights, &mut |y, tap| {
        let weights = GateWeights { a: &layer.gate[0], b: &layer.gate[1], bias: &[], noise: &[] };
        gate.forward(&mut z, &mut acts, tap.x, weights, false);
        let rows = tap.x.len() / hidden;
        let shape = (rows, spec.router.num_experts);
        let logits = ArrayView2::from_shape(shape, &z).expect("a logit for each token and expert");
        let scores = route(&spec.router, logits, None, Fade::NONE).scores;
        values.clear();
        values.extend_from_slice(tap.neurons);
        for (t, values) in values.chunks_exact_mut(width).enumerate() {
            let routed = layer.order.chunks_exact(of_one).take(spec.router.num_experts).enumerate();
            for (_, neurons) in routed.filter(|(expert, _)| scores[[t, *expert]] == 0.0) {
                neurons.iter().for_each(|&j| values[j as usize] = 0.0);
            }
        }
        let dims = linear::Dims { rows, inputs: width, outputs: hidden, precision: Precision::F32 };
        linear::Forward { y, x: &values, w: &down.weight, bias: down.bias.as_deref(), dims }.run();
    })?;
    Ok(())
}
