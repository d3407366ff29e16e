//! The FFN of models that were trained as mixtures of experts (Mixtral, Qwen-MoE, OLMoE).
//!
//! `y = sum over the k selected experts of c_e f_e(x)`, and the shared expert where there is one; c is the rule of
//! [`dsmoe_router::mixture`], added up over gates that share an expert. The experts of a layer are stored tensor by tensor, and in an arena those of one kind follow each
//! other, so that they are one matrix for the kernels.

mod router;
mod shared;
mod spec;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::sync::Arc;

use dsmoe_kernels::Precision;
use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Pairs, Saved};
use dsmoe_kernels::matmul::Packed;

pub(crate) use shared::SHARED_EXPERT;

use super::{
    Decision, DeviceFfn, ExpertParts, Ffn, FfnBackward, FfnForward, FfnInference, FfnKind, FfnReport,
    FfnScratch, GateBackward, Gated, HostGate, PackedFfn, routes,
};
use crate::config::MixtureSpec;
use crate::params::{TensorSpec, padded};
use router::{MixtureRouter, RouterSaved};
use shared::{PackedShared, Shared, SharedBackward, SharedSaved};

/// The FFN of a layer of a mixture.
///
/// ```
/// use std::sync::Arc;
///
/// use dsmoe_core::config::MixtureSpec;
/// use dsmoe_core::ffn::{Ffn, Gated, MixtureFfn};
///
/// let (renormalise, balance_weight, maps) = (true, 0.01, None);
/// let spec =
///     MixtureSpec { top_k: 2, renormalise, width: 8, shared: None, balance_weight, experts: vec![4], maps };
/// let ffn = MixtureFfn::new(Gated::silu(16, spec.neurons(0)), Arc::new(spec), 0, balance_weight);
/// assert_eq!(ffn.num_experts(), Some(4));
/// ```
#[derive(Clone, Debug)]
pub struct MixtureFfn {
    /// All experts that are chosen from.
    gated: Gated,
    spec: Arc<MixtureSpec>,
    layer: usize,
    router: MixtureRouter,
}

/// Values that the backward pass needs.
#[derive(Debug)]
struct MixtureSaved {
    experts: Saved,
    router: RouterSaved,
    shared: Option<SharedSaved>,
}

/// The FFN of a mixture for inference; routers stay f32.
#[derive(Debug)]
struct PackedMixture {
    ffn: MixtureFfn,
    weights: PackedWeights,
    router: Packed,
    shared: Option<PackedShared>,
}

impl MixtureFfn {
    /// Creates the FFN of a layer of `spec` with the activation and the input of `gated`, which has the neurons of all experts
    /// and no biases.
    ///
    /// # Panics
    /// `gated` has other neurons, or biases; there is no such layer.
    pub fn new(gated: Gated, spec: Arc<MixtureSpec>, layer: usize, balance_weight: f64) -> MixtureFfn {
        let fits = gated.intermediate == spec.neurons(layer) && !gated.bias && !gated.output_bias;
        assert!(fits, "mixture: {gated:?} for layer {layer} of {spec:?}");
        let (hidden, config, map) = (gated.hidden, spec.router(layer), spec.map(layer).cloned());
        MixtureFfn { gated, spec, layer, router: MixtureRouter { hidden, config, map, balance_weight } }
    }

    fn shared(&self) -> Option<Shared> {
        self.spec.shared.map(|intermediate| Shared(Gated { intermediate, ..self.gated }))
    }

    /// Returns the starts of the parameters of the router and of the shared expert.
    fn starts(&self) -> [usize; 2] {
        let router = self.gated.len();
        [router, router + padded(self.router.len())]
    }

    fn dims(&self, tokens: usize) -> Dims {
        let num_experts = self.spec.experts[self.layer];
        Dims { num_experts, all_pairs: false, ..self.gated.dims(tokens) }
    }

    /// Returns the projections of the experts, under their names in a checkpoint.
    fn experts(&self) -> impl Iterator<Item = TensorSpec> + '_ {
        let (width, num_experts) = (self.spec.width, self.spec.experts[self.layer]);
        ["gate", "up", "down"].into_iter().flat_map(move |which| {
            (0..num_experts).map(move |e| {
                let name = format!("experts.{e}.{which}_proj.weight");
                let spec = TensorSpec::matrix(name, width, self.gated.hidden);
                let spec = if which == "down" { spec.transposed() } else { spec };
                TensorSpec { joined: e > 0, ..spec }
            })
        })
    }
}

impl PackedFfn for PackedMixture {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, record, scratch } = args;
        let mut saved = RouterSaved::default();
        let routed = self.ffn.router.forward_packed(&mut saved, x, &self.router);
        routed.count(record);
        let (dims, routes) = (self.ffn.dims(x.len() / self.ffn.gated.hidden), routes(routed.routing));
        let (pairs, weights) = (Pairs::Routed(&routes), &self.weights);
        expert_ffn::ForwardPacked { y: &mut *y, x, weights, pairs, dims, scratch: &mut scratch.experts }
            .run();
        if let Some(shared) = &self.shared {
            shared.forward(y, x, scratch);
        }
    }

    fn bytes(&self) -> usize {
        self.weights.bytes() + self.router.bytes() + self.shared.as_ref().map_or(0, PackedShared::bytes)
    }

    fn num_experts(&self) -> Option<usize> {
        self.ffn.num_experts()
    }

    fn choices(&self) -> usize {
        self.ffn.router.config.num_experts
    }

    fn set_choice(&mut self, choice: Option<usize>) -> bool {
        let known = choice.filter(|k| (1..=self.choices()).contains(k));
        let own = self.ffn.spec.router(self.ffn.layer).top_k;
        self.ffn.router.config.top_k = known.unwrap_or(own);
        known == choice
    }
}

impl Ffn for MixtureFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        let router = TensorSpec::router("gate.weight", vec![self.spec.gates(self.layer), self.gated.hidden]);
        let shared = self.shared().map(|shared| shared.tensors()).unwrap_or_default();
        self.experts().chain([router]).chain(shared).collect()
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.spec.experts[self.layer])
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Spec(self.spec.clone()))
    }

    fn on_device(&self) -> Option<DeviceFfn> {
        // A device runs no expert beside those that are routed.
        self.spec.shared.is_none().then(|| DeviceFfn::Hosted {
            gated: self.gated,
            num_experts: self.spec.experts[self.layer],
            gate: Arc::new(self.router.clone()),
        })
    }

    fn expert_parts(&self) -> Option<ExpertParts> {
        let (gated, blocks, map) = (self.gated, self.spec.experts[self.layer], self.router.map.clone());
        Some(ExpertParts { gated, blocks, routed: 0..blocks, map, gates: &["gate.weight"] })
    }

    fn keep_experts(&self, kept: &[usize]) -> Option<Box<dyn Ffn>> {
        let mut spec = (*self.spec).clone();
        spec.experts[self.layer] = kept.len();
        if let Some(maps) = &mut spec.maps {
            maps[self.layer] = Arc::new(maps[self.layer].keep(kept).1);
        }
        let gated = Gated { intermediate: spec.neurons(self.layer), ..self.gated };
        let balance_weight = self.router.balance_weight;
        Some(Box::new(MixtureFfn::new(gated, Arc::new(spec), self.layer, balance_weight)))
    }

    fn decide(&self, params: &[f32], x: &[f32]) -> Option<Decision> {
        Some(self.router.decide(x, &params[self.starts()[0]..]))
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let [router, shared] = self.starts();
        Box::new(PackedMixture {
            ffn: self.clone(),
            weights: PackedWeights::new(precision, &self.gated.weights(params), self.dims(0)),
            router: self.router.pack(&params[router..]),
            shared: self.shared().map(|expert| expert.pack(&params[shared..], precision)),
        })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        let experts = Saved::with_room(self.dims(tokens));
        let shared = self.shared().map(|shared| shared.new_saved(tokens));
        Box::new(MixtureSaved { experts, router: RouterSaved::default(), shared })
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.dims(tokens));
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, training, record, scratch } = args;
        let MixtureSaved { experts, router, shared } =
            saved.downcast_mut().expect("saved by the FFN of a mixture");
        let [of_router, of_shared] = self.starts();
        let routed = self.router.forward(router, x, &params[of_router..], Some(training));
        routed.count(record);
        let (weights, routes) = (&self.gated.weights(params), routes(routed.routing));
        let (pairs, dims) = (Pairs::Routed(&routes), self.dims(x.len() / self.gated.hidden));
        expert_ffn::ForwardTrain {
            y: &mut *y,
            saved: experts,
            x,
            weights,
            pairs,
            dims,
            scratch: &mut scratch.experts,
        }
        .run();
        if let (Some(expert), Some(saved)) = (self.shared(), shared) {
            expert.forward_train(y, saved, x, &params[of_shared..], scratch);
        }
        let (balance_loss, gate_entropy) = (routed.balance_loss, routed.gate_entropy);
        FfnReport { balance_loss, gate_entropy, ..FfnReport::default() }
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, training, scratch, .. } = args;
        let MixtureSaved { experts: saved, router, shared } =
            saved.downcast_mut().expect("saved by the FFN of a mixture");
        let [of_router, of_shared] = self.starts();
        let dims = self.dims(x.len() / self.gated.hidden);
        let FfnScratch { experts: scratch_of_experts, dcoefficients: by_pair, .. } = &mut *scratch;
        by_pair.resize(dims.tokens * dims.num_experts);
        let routes = routes(router.routing().expect("a forward before the backward"));
        expert_ffn::Backward {
            dx: &mut *dx,
            dcoefficients: Some(&mut by_pair[..]),
            grads: self.gated.grads(&mut grads[..of_router]),
            dy,
            saved,
            x,
            weights: &self.gated.weights(params),
            pairs: Pairs::Routed(&routes),
            dims,
            scratch: scratch_of_experts,
        }
        .run();
        self.router.backward(GateBackward {
            dx: &mut *dx,
            grads: &mut grads[of_router..of_shared],
            dcoefficients: &by_pair[..],
            saved: router,
            x,
            params: &params[of_router..],
            training,
        });
        if let (Some(expert), Some(saved)) = (self.shared(), shared) {
            let (grads, params) = (&mut grads[of_shared..], &params[of_shared..]);
            expert.backward(SharedBackward { dx, grads, dy, saved, x, params, scratch });
        }
    }
}
