//! DSMoE's FFN: the dense FFN cut into experts, each token running those whose gate is above the threshold.
//!
//! Gates may share experts ([`dsmoe_router::expert_map`]): gates decide as they do alone, and an expert runs once for a token that
//! opens any of its gates, with the sum of their coefficients.

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Saved};
use dsmoe_router::sparsity::{self, SparsityOver};
use dsmoe_router::{
    InactivePairs, Routed, RouterConfig, Routing, SparsityGrad, confidence, separability, ste,
};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, CowArray, Ix2};

use super::bound::{RouterBound, draws};
use super::gating::{Gating, GatingBackward, GatingWeights, PackedGating};
use super::{
    Decision, DeviceFfn, DsmoeForm, ExpertParts, Ffn, FfnBackward, FfnForward, FfnInference, FfnKind,
    FfnReport, FfnScratch, Gated, PackedFfn, Record, add_output_bias, routes,
};
use crate::params::TensorSpec;

/// `y = sum over active experts i of S_i o_i` (eq. 11), experts being row ranges of the projections (eq. 6), plus the
/// experts of the core and the correction.
///
/// ```
/// use dsmoe_core::ffn::{DsmoeFfn, DsmoeForm, Ffn, Gated};
/// use dsmoe_router::RouterConfig;
///
/// // One of four experts runs always; a router of rank 2 chooses among the others.
/// let form = DsmoeForm { core: 1, router_rank: Some(2), ..DsmoeForm::new(RouterConfig::new(4), true) };
/// assert_eq!(form.routed(), 3);
/// let ffn = DsmoeFfn::of(Gated::silu(16, 32), form);
/// assert_eq!(ffn.num_experts(), Some(4));
/// ```
#[derive(Clone, Debug)]
pub struct DsmoeFfn {
    gated: Gated,
    form: DsmoeForm,
    /// The gates, with their number.
    gates: RouterConfig,
    /// The threshold of the logits. It is none where every gate is open.
    bar: Option<f32>,
    /// The logit at which a gate that switches its expert is a half in the straight-through rule.
    centre: f32,
}

/// Values kept for the backward.
#[derive(Debug)]
struct DsmoeSaved {
    experts: Saved,
    routed: Routed,
    /// The routing of the experts, where gates share them.
    mapped: Routing,
    /// The first product of a router of low rank.
    low: Buf,
}

impl DsmoeFfn {
    /// Makes the FFN of LLaMA for inputs of width `hidden` with `intermediate` neurons in `router.num_experts` experts.
    ///
    /// # Panics
    /// The experts do not divide `intermediate`: the caller's configuration was not checked.
    pub fn new(hidden: usize, intermediate: usize, router: RouterConfig, router_bias: bool) -> DsmoeFfn {
        DsmoeFfn::of(Gated::silu(hidden, intermediate), DsmoeForm::new(router, router_bias))
    }

    /// Makes the FFN of any family and form, with the threshold of its router.
    ///
    /// # Panics
    /// Those of [`DsmoeFfn::new`]; the core leaves no expert to the router; a correction without a rank; a map of other experts.
    pub fn of(gated: Gated, form: DsmoeForm) -> DsmoeFfn {
        let n = form.router.num_experts;
        assert!(
            n > 0 && gated.intermediate.is_multiple_of(n),
            "dsmoe ffn: {} neurons in {n} experts",
            gated.intermediate
        );
        assert!(form.core < n, "dsmoe ffn: a core of {} of {n} experts", form.core);
        assert!(!form.correction || form.router_rank.is_some(), "dsmoe ffn: a correction without a rank");
        let fits = form.map.as_ref().is_none_or(|map| map.num_experts() == form.routed());
        assert!(fits, "dsmoe ffn: a map of {} experts", form.routed());
        let gates = form.gates();
        DsmoeFfn { bar: gates.bar(), centre: 0.0, gated, form, gates }
    }

    fn gating(&self) -> Gating {
        self.form.gating(self.gated.hidden)
    }

    fn dims(&self, tokens: usize) -> Dims {
        Dims {
            num_experts: self.form.router.num_experts,
            core: self.form.core,
            all_pairs: self.form.router.ste,
            ..self.gated.dims(tokens)
        }
    }

    /// Returns the sizes of a training pass. Products are those of all pairs only where the router's gradient reads all of them;
    /// else the forward and the backward multiply active pairs alone.
    fn training_dims(&self, tokens: usize, inactive: InactivePairs) -> Dims {
        let all_pairs = self.form.router.ste && matches!(inactive, InactivePairs::All { .. });
        Dims { all_pairs, ..self.dims(tokens) }
    }

    /// Routes `x`; sets `routed` and `low`.
    fn route(
        &self,
        routed: &mut Routed,
        [logits, low]: [&mut Buf; 2],
        x: &[f32],
        weights: GatingWeights<'_>,
    ) {
        self.gating().forward(logits, low, x, weights);
        let logits = matrix(logits, x.len() / self.gated.hidden, self.form.num_gates());
        routed.rebuild_above(&self.gates, self.bar, self.centre, logits);
    }

    /// Adds the routing of the experts, and the logits of the router, to `record`.
    fn count(&self, record: Option<Record<'_>>, routing: &Routing, logits: ArrayView2<'_, f32>) {
        let Some(Record { stats, layer }) = record else { return };
        stats.add_behind_core(layer, self.form.core, routing);
        if stats.logits().is_some() {
            stats.add_logits(layer, self.form.core, self.logits_of_experts(logits).view());
        }
    }

    /// Returns the logits that open the experts, from those of the gates.
    fn logits_of_experts<'a>(&self, logits: ArrayView2<'a, f32>) -> CowArray<'a, f32, Ix2> {
        match &self.form.map {
            None => logits.into(),
            Some(map) => map.largest(logits).into(),
        }
    }

    /// Returns the routing of the experts, from that of the gates.
    fn of_experts<'a>(&self, gates: &'a Routing) -> Cow<'a, Routing> {
        match &self.form.map {
            None => Cow::Borrowed(gates),
            Some(map) => {
                let mut experts = Routing::default();
                map.route(gates, &mut experts);
                Cow::Owned(experts)
            }
        }
    }

    /// Returns the gradient by the coefficients of the gates, from that of the experts, which is 0 for inactive pairs that were not
    /// computed; none where it is the same.
    fn of_gates(
        &self,
        by_expert: ArrayView2<'_, f32>,
        routed: &Routed,
        inactive: InactivePairs,
    ) -> Option<Array2<f32>> {
        let mut by_gate = self.form.map.as_ref()?.backward(by_expert);
        // A shut gate whose expert runs by another one is an inactive pair as any.
        let weight = match inactive {
            _ if !self.form.router.ste => return Some(by_gate),
            InactivePairs::None => 0.0,
            InactivePairs::All { weight } => weight,
            // Its product is there for every token.
            InactivePairs::Sample { .. } => 1.0,
        };
        by_gate.zip_mut_with(&routed.mask, |d, &active| *d *= if active { 1.0 } else { weight });
        Some(by_gate)
    }

    /// Returns the derivative of the loss by one gate of this layer, from that of a layer of most experts without a core: the
    /// layer's loss is a mean over the gates that it has.
    fn sparsity(&self, of_all: SparsityGrad) -> SparsityGrad {
        SparsityGrad { weight: of_all.weight * self.form.sparsity_factor(), ..of_all }
    }
}

/// A DSMoE FFN for inference; all but the projections stays f32.
#[derive(Debug)]
struct PackedDsmoe {
    ffn: DsmoeFfn,
    weights: PackedWeights,
    gating: PackedGating,
    /// The bias of the output; empty where there is none.
    output_bias: Vec<f32>,
    /// Chooses experts in place of the router.
    bound: Option<RouterBound>,
    /// The number of gates that every token opens, in place of those above the threshold.
    count: Option<usize>,
}

impl PackedDsmoe {
    /// Sets `y` to the outputs of the open experts and of the core.
    fn run(&self, y: &mut [f32], x: &[f32], routing: &Routing, scratch: &mut expert_ffn::Scratch) {
        let (routes, tokens) = (routes(routing), x.len() / self.ffn.gated.hidden);
        // The number of open experts differs between layers and texts. A buffer that grew with it would fragment the heap.
        scratch.reserve_forward(&self.weights, tokens);
        expert_ffn::ForwardPacked {
            y,
            x,
            weights: &self.weights,
            pairs: expert_ffn::Pairs::Routed(&routes),
            dims: self.ffn.dims(tokens),
            scratch,
        }
        .run();
    }

    /// Returns the squared norms of the outputs of all routed experts, `[tokens, routed]`.
    fn contributions(&self, x: &[f32], scratch: &mut expert_ffn::Scratch) -> Array2<f64> {
        let (hidden, routed) = (self.ffn.gated.hidden, self.ffn.form.routed());
        let shape = (x.len() / hidden, routed);
        let mut output = |open: &dyn Fn(usize) -> bool| -> Vec<f32> {
            let mask = Array2::from_shape_fn(shape, |(_, i)| open(i));
            let mut y = vec![0.0; x.len()];
            self.run(&mut y, x, &Routing::from_mask(mask.view(), |_, _| 1.0), scratch);
            y
        };
        let without = output(&|_| false);
        let mut squares = Array2::zeros(shape);
        for expert in 0..routed {
            let with = output(&|i| i == expert);
            for (t, (with, without)) in
                with.chunks_exact(hidden).zip(without.chunks_exact(hidden)).enumerate()
            {
                let pairs = with.iter().zip(without);
                squares[[t, expert]] = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            }
        }
        squares
    }
}

impl PackedFfn for PackedDsmoe {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, record, scratch } = args;
        let FfnScratch { experts, logits, low, routed, .. } = scratch;
        self.gating.forward(logits, low, x);
        let (tokens, gates) = (x.len() / self.ffn.gated.hidden, &self.ffn.gates);
        let logits = matrix(logits, tokens, self.ffn.form.num_gates());
        routed.rebuild_for_inference(gates, self.ffn.bar, logits);
        if let Some(count) = self.count {
            routed.keep_largest(gates, count);
        }
        if let Some(bound) = self.bound {
            let scores = match bound {
                RouterBound::Oracle => self.contributions(x, experts),
                RouterBound::Random => draws(x, self.ffn.gated.hidden, self.ffn.form.routed()),
            };
            routed.reroute(&self.ffn.gates, scores.view());
        }
        let routing = self.ffn.of_experts(&routed.routing);
        self.ffn.count(record, &routing, routed.logits.view());
        self.run(y, x, &routing, experts);
        self.gating.correct(y, low);
        add_output_bias(y, &self.output_bias);
    }

    fn bytes(&self) -> usize {
        self.weights.bytes() + self.gating.bytes() + size_of_val(&self.output_bias[..])
    }

    fn num_experts(&self) -> Option<usize> {
        self.ffn.num_experts()
    }

    fn set_threshold(&mut self, threshold: f32) -> bool {
        self.ffn.set_threshold(threshold)
    }

    fn set_threshold_logit(&mut self, logit: f32) -> bool {
        self.ffn.set_threshold_logit(logit)
    }

    fn choices(&self) -> usize {
        self.ffn.form.num_gates()
    }

    fn set_choice(&mut self, choice: Option<usize>) -> bool {
        self.count = choice.filter(|count| (1..=self.choices()).contains(count));
        self.count == choice
    }

    fn set_router_bound(&mut self, bound: RouterBound) -> bool {
        // It would choose among gates that give the same.
        if self.ffn.form.map.is_some() {
            return false;
        }
        self.bound = Some(bound);
        true
    }
}

fn matrix(values: &[f32], rows: usize, cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, cols), values).expect("rows * cols values")
}

/// Multiplies the gradients by the coefficients of inactive pairs by their weight.
fn weigh_inactive(dcoefficients: &mut [f32], routed: &Routed, weight: f32) {
    if weight != 1.0 {
        let pairs = dcoefficients.iter_mut().zip(&routed.mask);
        pairs.filter(|(_, active)| !**active).for_each(|(d, _)| *d *= weight);
    }
}

impl Ffn for DsmoeFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = self.gated.tensors();
        tensors.extend(self.gating().tensors());
        tensors
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.form.router.num_experts)
    }

    fn set_threshold(&mut self, threshold: f32) -> bool {
        (self.form.router.threshold, self.gates.threshold) = (threshold, threshold);
        (self.bar, self.centre) = (self.gates.bar(), 0.0);
        true
    }

    fn set_threshold_logit(&mut self, logit: f32) -> bool {
        (self.bar, self.centre) = (Some(logit), logit);
        true
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Dsmoe(self.form.clone()))
    }

    fn on_device(&self) -> Option<DeviceFfn> {
        // The kernels of gates have an expert for each.
        if self.form.map.is_some() {
            return None;
        }
        let DsmoeFfn { gated, form, bar, centre, .. } = self.clone();
        Some(DeviceFfn::Routed { gated, form, bar, centre })
    }

    fn expert_parts(&self) -> Option<ExpertParts> {
        let DsmoeForm { router, core, router_rank, .. } = &self.form;
        let gates: &[&str] = match router_rank {
            None => &["router.weight", "router.bias"],
            // All gates read the values of the first matrix.
            Some(_) => &["router.b.weight", "router.bias"],
        };
        let (routed, map) = (*core..router.num_experts, self.form.map.clone());
        Some(ExpertParts { gated: self.gated, blocks: router.num_experts, routed, map, gates })
    }

    fn keep_experts(&self, kept: &[usize]) -> Option<Box<dyn Ffn>> {
        let num_experts = self.form.core + kept.len();
        let width = self.gated.intermediate / self.form.router.num_experts;
        let gated = Gated { intermediate: num_experts * width, ..self.gated };
        let router = RouterConfig { num_experts, ..self.form.router.clone() };
        let map = self.form.map.as_ref().map(|map| Arc::new(map.keep(kept).1));
        let form = DsmoeForm { router, most_experts: num_experts, map, ..self.form.clone() };
        let ffn = DsmoeFfn::of(gated, form);
        // Gates stay as open as they are.
        Some(Box::new(DsmoeFfn { bar: self.bar, centre: self.centre, ..ffn }))
    }

    fn decide(&self, params: &[f32], x: &[f32]) -> Option<Decision> {
        let (mut routed, mut logits, mut low) = (Routed::default(), Buf::default(), Buf::default());
        let weights = self.gating().weights(&params[self.gated.len()..]);
        self.route(&mut routed, [&mut logits, &mut low], x, weights);
        let logits = matrix(&logits, x.len() / self.gated.hidden, self.form.num_gates());
        let soft = logits.mapv(|z| 1.0 / (1.0 + (-f64::from(z)).exp()));
        let soft = match &self.form.map {
            None => soft,
            Some(map) => map.sums(soft.view()),
        };
        Some(Decision {
            soft,
            logits: self.logits_of_experts(logits).into_owned(),
            routing: self.of_experts(&routed.routing).into_owned(),
        })
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        Box::new(PackedDsmoe {
            ffn: self.clone(),
            weights: PackedWeights::new(precision, &self.gated.weights(params), self.dims(0)),
            gating: self.gating().pack(&params[self.gated.len()..]),
            output_bias: self.gated.output_bias(params).to_vec(),
            bound: None,
            count: None,
        })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        let experts = Saved::with_room(self.dims(tokens));
        let low = Buf::zeros(self.gating().low_len(tokens));
        Box::new(DsmoeSaved { experts, routed: Routed::default(), mapped: Routing::default(), low })
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.dims(tokens));
        scratch.dcoefficients.resize(tokens * self.form.routed());
        for buf in [&mut scratch.logits, &mut scratch.dlogits] {
            buf.resize(tokens * self.form.num_gates());
        }
        for buf in [&mut scratch.low, &mut scratch.dlow] {
            buf.resize(self.gating().low_len(tokens));
        }
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, record, training, scratch } = args;
        let saved = saved.downcast_mut::<DsmoeSaved>().expect("saved by a DSMoE FFN");
        let FfnScratch { experts, logits, .. } = scratch;
        let gating = self.gating();
        let weights = gating.weights(&params[self.gated.len()..]);
        self.route(&mut saved.routed, [logits, &mut saved.low], x, weights);
        let DsmoeSaved { experts: kept, routed, mapped, .. } = &mut *saved;
        let routing: &Routing = match &self.form.map {
            None => &routed.routing,
            Some(map) => {
                map.route(&routed.routing, mapped);
                mapped
            }
        };
        self.count(record, routing, routed.logits.view());
        expert_ffn::ForwardTrain {
            y,
            saved: kept,
            x,
            weights: &self.gated.weights(params),
            pairs: expert_ffn::Pairs::Routed(&routes(routing)),
            dims: self.training_dims(x.len() / self.gated.hidden, training.inactive),
            scratch: experts,
        }
        .run();
        gating.correct(y, &saved.low, weights.correction);
        add_output_bias(y, self.gated.output_bias(params));
        FfnReport {
            sparsity_loss: sparsity::loss(&saved.routed, SparsityOver::Active),
            mean_gate: sparsity::loss(&saved.routed, SparsityOver::All),
            balance_loss: 0.0,
            separability: match training.separability {
                0.0 => 0.0,
                _ => separability::loss(saved.routed.logits.view(), self.bar),
            },
            gate_entropy: match training.entropy {
                0.0 => 0.0,
                _ => confidence::of_sigmoid(saved.routed.logits.view()),
            },
        }
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, sparsity, training, scratch } = args;
        let DsmoeSaved { experts: saved, routed, mapped, low } =
            saved.downcast_mut::<DsmoeSaved>().expect("saved by a DSMoE FFN");
        self.gated.add_output_bias_grad(grads, dy);
        let (grads, of_gating) = grads.split_at_mut(self.gated.len());
        let dims = self.training_dims(x.len() / self.gated.hidden, training.inactive);
        let (experts, gates) = (self.form.routed(), self.form.num_gates());
        let FfnScratch { experts: kernels, dcoefficients, dlogits, dlow, sample, pull, .. } = scratch;
        dcoefficients.resize(dims.tokens * experts);
        dlogits.resize(dims.tokens * gates);
        let projections = self.gated.weights(params);
        let routing = if self.form.map.is_some() { &*mapped } else { &routed.routing };
        expert_ffn::Backward {
            dx,
            dcoefficients: Some(dcoefficients),
            grads: self.gated.grads(grads),
            dy,
            saved,
            x,
            weights: &projections,
            pairs: expert_ffn::Pairs::Routed(&routes(routing)),
            dims,
            scratch: kernels,
        }
        .run();
        match training.inactive {
            // Inactive pairs have no part in the gradient.
            _ if !self.form.router.ste => {}
            // Where gates share experts, those that are shut are weighed.
            InactivePairs::All { weight } if self.form.map.is_none() => {
                weigh_inactive(dcoefficients, routed, weight);
            }
            InactivePairs::All { .. } | InactivePairs::None => {}
            InactivePairs::Sample { share, seed } => {
                match &self.form.map {
                    None => sample.draw(routed.mask.view(), share, seed),
                    Some(map) => sample.draw(map.mask(routing).view(), share, seed),
                }
                expert_ffn::PairDots {
                    dcoefficients,
                    dy,
                    x,
                    weights: &projections,
                    pairs: &routes(&sample.routing),
                    dims,
                    scratch: kernels,
                }
                .run();
            }
        }
        let by_expert = matrix(dcoefficients, dims.tokens, experts);
        let by_gate = self.of_gates(by_expert, routed, training.inactive);
        let shape = (dims.tokens, gates);
        let of_logits = "tokens * gates values";
        let of_layer = ste::backward(
            &self.gates,
            routed,
            by_gate.as_ref().map_or(by_expert, |by_gate| by_gate.view()),
            self.sparsity(sparsity),
            ArrayViewMut2::from_shape(shape, dlogits).expect(of_logits),
        );
        pull.add(of_layer, f64::from(self.form.sparsity_factor()));
        separability::backward(
            routed.logits.view(),
            self.bar,
            training.separability,
            ArrayViewMut2::from_shape(shape, dlogits).expect(of_logits),
        );
        confidence::add_of_sigmoid(
            routed.logits.view(),
            f64::from(training.entropy),
            ArrayViewMut2::from_shape(shape, dlogits).expect(of_logits),
        );
        let gating = self.gating();
        let weights = gating.weights(&params[self.gated.len()..]);
        gating.backward(weights, GatingBackward { dx, grads: of_gating, dlogits, dy, x, low, dlow });
    }
}
