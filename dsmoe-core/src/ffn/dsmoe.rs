//! DSMoE's FFN: the dense FFN cut into experts, each token running those whose gate is above the threshold.

use std::any::Any;

use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Saved};
use dsmoe_kernels::{Precision, linear};
use dsmoe_router::sparsity::{self, SparsityOver};
use dsmoe_router::{Routed, RouterConfig, ste};
use ndarray::{ArrayView2, ArrayViewMut2};

use super::{
    DeviceFfn, Ffn, FfnBackward, FfnForward, FfnInference, FfnKind, FfnReport, FfnScratch, Gated, PackedFfn,
    Record, add_output_bias, routes, split, split_mut,
};
use crate::params::TensorSpec;

/// `y = sum over active experts i of S_i o_i` (eq. 11), experts being row ranges of the projections (eq. 6).
#[derive(Clone, Debug)]
pub struct DsmoeFfn {
    gated: Gated,
    router: RouterConfig,
    router_bias: bool,
}

/// Values kept for the backward.
#[derive(Debug)]
struct DsmoeSaved {
    experts: Saved,
    routed: Routed,
}

impl DsmoeFfn {
    /// Makes the FFN of LLaMA for inputs of width `hidden` with `intermediate` neurons in `router.num_experts` experts.
    ///
    /// # Panics
    /// The experts do not divide `intermediate`: the caller's configuration was not checked.
    pub fn new(hidden: usize, intermediate: usize, router: RouterConfig, router_bias: bool) -> DsmoeFfn {
        DsmoeFfn::of(Gated::silu(hidden, intermediate), router, router_bias)
    }

    /// Makes the FFN of any family.
    ///
    /// # Panics
    /// Those of [`DsmoeFfn::new`].
    pub fn of(gated: Gated, router: RouterConfig, router_bias: bool) -> DsmoeFfn {
        assert!(
            router.num_experts > 0 && gated.intermediate.is_multiple_of(router.num_experts),
            "dsmoe ffn: {} neurons in {} experts",
            gated.intermediate,
            router.num_experts
        );
        DsmoeFfn { gated, router, router_bias }
    }

    /// Returns the router's weight and bias in this FFN's part of the arena.
    fn router<'a>(&self, params: &'a [f32]) -> [&'a [f32]; 2] {
        split(&params[self.gated.len()..], self.router_lens())
    }

    fn router_lens(&self) -> [usize; 2] {
        let n = self.router.num_experts;
        [n * self.gated.hidden, if self.router_bias { n } else { 0 }]
    }

    fn dims(&self, tokens: usize) -> Dims {
        let num_experts = self.router.num_experts;
        Dims { num_experts, all_pairs: self.router.ste, ..self.gated.dims(tokens) }
    }

    fn router_dims(&self, tokens: usize) -> linear::Dims {
        linear::Dims {
            rows: tokens,
            inputs: self.gated.hidden,
            outputs: self.router.num_experts,
            precision: Precision::F32,
        }
    }

    /// Routes `x`; sets `routed` and adds to `record`.
    fn route(
        &self,
        routed: &mut Routed,
        logits: &mut dsmoe_kernels::buf::Buf,
        x: &[f32],
        [router, bias]: [&[f32]; 2],
        record: Option<Record<'_>>,
    ) {
        let (tokens, n) = (x.len() / self.gated.hidden, self.router.num_experts);
        logits.resize(tokens * n);
        linear::Forward { y: logits, x, w: router, bias: None, dims: self.router_dims(tokens) }.run();
        if self.router_bias {
            for row in logits.chunks_exact_mut(n) {
                for (z, b) in row.iter_mut().zip(bias) {
                    *z += b;
                }
            }
        }
        routed.rebuild(&self.router, matrix(logits, tokens, n));
        if let Some(Record { stats, layer }) = record {
            stats.add(layer, &routed.routing);
        }
    }
}

/// A DSMoE FFN for inference; the router stays f32.
#[derive(Debug)]
struct PackedDsmoe {
    ffn: DsmoeFfn,
    weights: PackedWeights,
    router: Vec<f32>,
    bias: Vec<f32>,
    /// The bias of the output; empty where there is none.
    output_bias: Vec<f32>,
}

impl PackedFfn for PackedDsmoe {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, record, scratch } = args;
        let FfnScratch { experts, logits, routed, .. } = scratch;
        self.ffn.route(routed, logits, x, [&self.router, &self.bias], record);
        let routes = routes(&routed.routing);
        expert_ffn::ForwardPacked {
            y,
            x,
            weights: &self.weights,
            pairs: expert_ffn::Pairs::Routed(&routes),
            dims: self.ffn.dims(x.len() / self.ffn.gated.hidden),
            scratch: experts,
        }
        .run();
        add_output_bias(y, &self.output_bias);
    }

    fn bytes(&self) -> usize {
        self.weights.bytes() + 4 * (self.router.len() + self.bias.len() + self.output_bias.len())
    }

    fn num_experts(&self) -> Option<usize> {
        self.ffn.num_experts()
    }

    fn set_threshold(&mut self, threshold: f32) -> bool {
        self.ffn.set_threshold(threshold)
    }
}

fn matrix(values: &[f32], rows: usize, cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, cols), values).expect("rows * cols values")
}

impl Ffn for DsmoeFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        let n = self.router.num_experts;
        let mut tensors = self.gated.tensors();
        tensors.push(TensorSpec::router("router.weight", vec![n, self.gated.hidden]));
        if self.router_bias {
            tensors.push(TensorSpec::router("router.bias", vec![n]));
        }
        tensors
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.router.num_experts)
    }

    fn set_threshold(&mut self, threshold: f32) -> bool {
        self.router.threshold = threshold;
        true
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Dsmoe { router: self.router.clone(), router_bias: self.router_bias })
    }

    fn on_device(&self) -> Option<DeviceFfn> {
        let Gated { hidden, intermediate, .. } = self.gated;
        self.gated.is_plain().then(|| DeviceFfn::Gated {
            hidden,
            intermediate,
            router: self.router.clone(),
            router_bias: self.router_bias,
        })
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let [router, bias] = self.router(params);
        Box::new(PackedDsmoe {
            ffn: self.clone(),
            weights: PackedWeights::new(precision, &self.gated.weights(params), self.dims(0)),
            router: router.to_vec(),
            bias: bias.to_vec(),
            output_bias: self.gated.output_bias(params).to_vec(),
        })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        let experts = Saved::with_room(self.dims(tokens));
        Box::new(DsmoeSaved { experts, routed: Routed::default() })
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.dims(tokens));
        for buf in [&mut scratch.logits, &mut scratch.dcoefficients, &mut scratch.dlogits] {
            buf.resize(tokens * self.router.num_experts);
        }
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, record, scratch, .. } = args;
        let saved = saved.downcast_mut::<DsmoeSaved>().expect("saved by a DSMoE FFN");
        let FfnScratch { experts, logits, .. } = scratch;
        self.route(&mut saved.routed, logits, x, self.router(params), record);
        expert_ffn::ForwardTrain {
            y,
            saved: &mut saved.experts,
            x,
            weights: &self.gated.weights(params),
            pairs: expert_ffn::Pairs::Routed(&routes(&saved.routed.routing)),
            dims: self.dims(x.len() / self.gated.hidden),
            scratch: experts,
        }
        .run();
        add_output_bias(y, self.gated.output_bias(params));
        FfnReport {
            sparsity_loss: sparsity::loss(&saved.routed, SparsityOver::Active),
            mean_gate: sparsity::loss(&saved.routed, SparsityOver::All),
            balance_loss: 0.0,
        }
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, sparsity, scratch, .. } = args;
        let DsmoeSaved { experts: saved, routed } =
            saved.downcast_mut::<DsmoeSaved>().expect("saved by a DSMoE FFN");
        let [router, _] = self.router(params);
        self.gated.add_output_bias_grad(grads, dy);
        let (grads, of_router) = grads.split_at_mut(self.gated.len());
        let [drouter, dbias] = split_mut(of_router, self.router_lens());
        let (dims, n) = (self.dims(x.len() / self.gated.hidden), self.router.num_experts);
        let FfnScratch { experts, dcoefficients, dlogits, .. } = scratch;
        dcoefficients.resize(dims.tokens * n);
        dlogits.resize(dims.tokens * n);
        expert_ffn::Backward {
            dx,
            dcoefficients: Some(dcoefficients),
            grads: self.gated.grads(grads),
            dy,
            saved,
            x,
            weights: &self.gated.weights(params),
            pairs: expert_ffn::Pairs::Routed(&routes(&routed.routing)),
            dims,
            scratch: experts,
        }
        .run();
        ste::backward(
            &self.router,
            routed,
            matrix(dcoefficients, dims.tokens, n),
            sparsity,
            ArrayViewMut2::from_shape((dims.tokens, n), dlogits).expect("tokens * experts values"),
        );
        let router_dims = self.router_dims(dims.tokens);
        linear::BackwardWeight { dw: drouter, dy: dlogits, x, dims: router_dims }.run();
        linear::BackwardInput { dx, dy: dlogits, w: router, dims: router_dims, add: true }.run();
        for row in dlogits.chunks_exact(n) {
            for (db, dz) in dbias.iter_mut().zip(row) {
                *db += dz;
            }
        }
    }
}
