//! An FFN on the device: dense, or experts behind sigmoid gates or a gate that the host computes.
//!
//! Products run over lists of the active pairs, which the device sorts by expert; nothing waits for the routing. The
//! straight-through gradient of a router needs `silu(a) b g` of inactive pairs too: with it, the three products a, b and g
//! are those of all pairs. Sizes that the kernels of lists do not take run all products of all pairs, with coefficients
//! that are 0 where an expert is shut.

use dsmoe_kernels::cuda::ops::{experts, ffn, router};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, View, ViewMut};
use dsmoe_router::RouterConfig;
use half::bf16;

use super::Products;
use super::hosted::{Hosted, Staging};
use crate::error::Result;
use crate::ffn::{DeviceFfn, GateTraining};
use crate::params::padded;

/// One layer's parameters, in f32 and rounded.
pub(super) struct Weights<'a> {
    pub(super) kind: &'a DeviceFfn,
    pub(super) master: View<'a, f32>,
    pub(super) rounded: View<'a, bf16>,
}

/// What the backward needs of the forward.
#[derive(Debug)]
pub(super) struct Acts {
    a: GpuBuf<bf16>,
    b: GpuBuf<bf16>,
    routed: Option<router::Routed>,
    /// The active pairs, where products run over them.
    lists: Option<router::Lists>,
    hosted: Option<Hosted>,
}

/// What all layers work in.
#[derive(Debug)]
pub(super) struct Scratch {
    /// `coefficient * silu(a) * b`
    c: GpuBuf<bf16>,
    da: GpuBuf<bf16>,
    db: GpuBuf<bf16>,
    /// `dy W_down^T`
    g: GpuBuf<bf16>,
    logits: GpuBuf<f32>,
    dcoefficients: GpuBuf<f32>,
    dlogits: GpuBuf<f32>,
    partials: GpuBuf<f32>,
    /// What experts add to the sums of tokens.
    parts: GpuBuf<bf16>,
    staging: Option<Staging>,
}

/// The sizes of an FFN with experts.
pub(super) fn expert_dims(ffn: &DeviceFfn, tokens: usize) -> Option<experts::Dims> {
    let num_experts = ffn.num_experts()?;
    Some(experts::Dims { tokens, hidden: ffn.hidden(), intermediate: ffn.intermediate(), num_experts })
}

/// [`expert_dims`], where products run over lists of pairs.
pub(super) fn by_lists(gpu: &Gpu, ffn: &DeviceFfn, tokens: usize) -> Option<experts::Dims> {
    expert_dims(ffn, tokens).filter(|dims| dims.fit(gpu))
}

impl Acts {
    pub(super) fn new(gpu: &Gpu, ffn: &DeviceFfn, tokens: usize) -> Result<Acts> {
        let pairs = tokens * ffn.intermediate();
        let routed = ffn.num_experts().map(|n| router::Routed::with_room(gpu, tokens, n)).transpose()?;
        let lists = by_lists(gpu, ffn, tokens)
            .map(|dims| router::Lists::with_room(gpu, tokens, dims.num_experts))
            .transpose()?;
        let hosted = Hosted::new(ffn);
        Ok(Acts { a: gpu.zeros(pairs)?, b: gpu.zeros(pairs)?, routed, lists, hosted })
    }

    pub(super) fn bytes(ffn: &DeviceFfn, tokens: usize) -> usize {
        tokens * (4 * ffn.intermediate() + ffn.num_experts().map_or(0, |n| 17 * n + 8))
    }

    pub(super) fn routed(&self) -> Option<&router::Routed> {
        self.routed.as_ref()
    }

    /// What the gate adds to the loss, after the forward.
    pub(super) fn balance_loss(&self) -> f64 {
        self.hosted.as_ref().map_or(0.0, |hosted| hosted.balance_loss)
    }
}

impl Scratch {
    pub(super) fn new(gpu: &Gpu, ffns: &[DeviceFfn], tokens: usize) -> Result<Scratch> {
        let widest = tokens * ffns.iter().map(DeviceFfn::intermediate).max().unwrap_or(0);
        let experts = ffns.iter().filter_map(DeviceFfn::num_experts).max().unwrap_or(0);
        let hidden = ffns.first().map_or(0, DeviceFfn::hidden);
        let pairs = tokens * experts;
        let parts = ffns.iter().filter_map(|ffn| by_lists(gpu, ffn, tokens)).map(|dims| dims.scratch());
        Ok(Scratch {
            parts: gpu.zeros(parts.max().unwrap_or(0))?,
            c: gpu.zeros(widest)?,
            da: gpu.zeros(widest)?,
            db: gpu.zeros(widest)?,
            g: gpu.zeros(widest)?,
            logits: gpu.zeros(pairs)?,
            dcoefficients: gpu.zeros(pairs)?,
            dlogits: gpu.zeros(pairs)?,
            partials: gpu.zeros(router::partials_len(hidden, experts))?,
            staging: ffns
                .iter()
                .any(DeviceFfn::is_hosted)
                .then(|| Staging::new(gpu, tokens * hidden))
                .transpose()?,
        })
    }

    pub(super) fn bytes(ffn: &DeviceFfn, tokens: usize) -> usize {
        let staged = if ffn.is_hosted() { 4 * ffn.hidden() } else { 0 };
        tokens * (8 * ffn.intermediate() + (12 + 2 * ffn.hidden()) * ffn.num_experts().unwrap_or(0) + staged)
    }
}

/// The router of a layer, f32.
struct Router<'a> {
    config: &'a RouterConfig,
    weight: View<'a, f32>,
    bias: Option<View<'a, f32>>,
}

impl<'a> Weights<'a> {
    fn projection(&self, which: usize) -> View<'a, bf16> {
        let len = self.kind.hidden() * self.kind.intermediate();
        self.rounded.slice(which * padded(len)..which * padded(len) + len)
    }

    fn router(&self) -> Option<Router<'a>> {
        let DeviceFfn::Gated { hidden, intermediate, router, router_bias } = self.kind else { return None };
        let [weight, bias] = router_ranges(*hidden, *intermediate, router.num_experts);
        let bias = router_bias.then(|| self.master.slice(bias));
        Some(Router { config: router, weight: self.master.slice(weight), bias })
    }

    /// Sets `y`; `h` is `normed` rounded.
    #[expect(clippy::too_many_arguments, reason = "input, output, and what lies between")]
    pub(super) fn forward_train(
        &self,
        products: &Products<'_>,
        y: ViewMut<'_, f32>,
        acts: &mut Acts,
        h: View<'_, bf16>,
        normed: router::Normed<'_>,
        training: GateTraining,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (gpu, tokens) = (products.gpu, products.tokens);
        let (hidden, width) = (self.kind.hidden(), self.kind.intermediate());
        self.route(products, acts, normed, training, scratch)?;
        let Acts { a, b, routed, lists, .. } = acts;
        let mut c = scratch.c.slice_mut(0..tokens * width);
        let [gate, up, down] = [0, 1, 2].map(|which| self.projection(which));
        let active = match (lists, &*routed, expert_dims(self.kind, tokens)) {
            (Some(lists), Some(routed), Some(dims)) => {
                router::lists(gpu, lists, routed)?;
                Some((&*lists, routed.coefficients(), dims))
            }
            _ => None,
        };
        match active.filter(|_| !self.all_pairs()) {
            Some((lists, coefficients, dims)) => {
                let both = Some([a.view_mut(), b.view_mut()]);
                experts::up(gpu, c.reborrow(), both, h, gate, up, coefficients, lists, dims)?;
            }
            None => {
                products.forward(a.view_mut(), h, gate, hidden, width)?;
                products.forward(b.view_mut(), h, up, hidden, width)?;
                let coefficients = routed.as_ref().map(|routed| routed.coefficients());
                ffn::activate(gpu, c.reborrow(), a.view(), b.view(), coefficients, self.dims(tokens))?;
            }
        }
        // The down projection is stored transposed: y = c W.
        match active {
            Some((lists, _, dims)) => {
                Ok(experts::down(gpu, y, scratch.parts.view_mut(), c.as_view(), down, lists, dims)?)
            }
            None => products.times(y, c.as_view(), down, width, hidden, false),
        }
    }

    /// Whether inactive pairs take part in the router's gradient.
    fn all_pairs(&self) -> bool {
        self.router().is_some_and(|router| router.config.ste)
    }

    /// Sets the routing, where there is a gate.
    fn route(
        &self,
        products: &Products<'_>,
        acts: &mut Acts,
        normed: router::Normed<'_>,
        training: GateTraining,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Some(routed) = &mut acts.routed else { return Ok(()) };
        if let (DeviceFfn::Hosted { gate, .. }, Some(hosted)) = (self.kind, &mut acts.hosted) {
            let params = self.master.slice(self.kind.gate_params(self.master.len()));
            return hosted.forward(gate.as_ref(), routed, normed, params, training);
        }
        let Some(Router { config, weight, bias }) = self.router() else { return Ok(()) };
        let mut logits = scratch.logits.slice_mut(0..products.tokens * config.num_experts);
        router::logits(products.gpu, logits.reborrow(), normed, weight, bias, self.kind.hidden())?;
        Ok(router::route(products.gpu, routed, logits.as_view(), &super::gates(config))?)
    }

    /// Sets `dh`, adds to `grads`, which is laid out as the parameters.
    #[expect(clippy::too_many_arguments, reason = "the forward's arguments with their gradients")]
    pub(super) fn backward(
        &self,
        products: &Products<'_>,
        mut dh: ViewMut<'_, f32>,
        mut grads: ViewMut<'_, f32>,
        dy: View<'_, bf16>,
        acts: &Acts,
        h: View<'_, bf16>,
        normed: router::Normed<'_>,
        sparsity: router::Sparsity<'_>,
        training: GateTraining,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (gpu, tokens) = (products.gpu, products.tokens);
        let (hidden, width) = (self.kind.hidden(), self.kind.intermediate());
        let (len, values) = (hidden * width, 0..tokens * width);
        let [gate, up, down] = [0, 1, 2].map(|which| which * padded(len)..which * padded(len) + len);
        let Scratch { c, da, db, g, dcoefficients, parts, .. } = &mut *scratch;
        let all_pairs = self.all_pairs();
        let active = acts.lists.as_ref().zip(expert_dims(self.kind, tokens));
        let weights = [0, 1, 2].map(|which| self.projection(which));
        // g = dy W_down^T: the stored matrix is W_down^T already, [width, hidden].
        match active.filter(|_| !all_pairs) {
            Some((lists, dims)) => {
                experts::project(gpu, g.slice_mut(values.clone()), dy, weights[2], lists, dims)?
            }
            None => products.forward(g.slice_mut(values.clone()), dy, weights[2], hidden, width)?,
        }
        let n = self.kind.num_experts().unwrap_or(0);
        ffn::backward(
            gpu,
            da.slice_mut(values.clone()),
            db.slice_mut(values.clone()),
            c.slice_mut(values.clone()),
            (n > 0).then(|| dcoefficients.slice_mut(0..tokens * n)),
            g.slice(values.clone()),
            acts.a.view(),
            acts.b.view(),
            acts.routed.as_ref().map(|routed| routed.coefficients()),
            all_pairs,
            self.dims(tokens),
        )?;
        let (da, db, c) = (da.slice(values.clone()), db.slice(values.clone()), c.slice(values));
        // dW_down^T = c^T dy, [width, hidden]
        let [dgate, dup, ddown] = grads.parts([gate, up, down]);
        match active {
            Some((lists, dims)) => {
                experts::backward_weights(gpu, [dgate, dup, ddown], [da, db, c], h, dy, lists, dims)?;
                let [gate, up, _] = weights;
                let parts = parts.view_mut();
                experts::backward_input(gpu, dh.reborrow(), parts, [da, db], [gate, up], lists, dims)?;
            }
            None => {
                products.backward_weight(ddown, c, dy, hidden, width)?;
                products.backward_weight(dgate, da, h, hidden, width)?;
                products.backward_weight(dup, db, h, hidden, width)?;
                products.times(dh.reborrow(), da, weights[0], width, hidden, false)?;
                products.times(dh.reborrow(), db, weights[1], width, hidden, true)?;
            }
        }
        self.route_backward(products, dh, grads, acts, normed, sparsity, training, scratch)
    }

    /// Adds what comes through the gate, given the gradients by the coefficients.
    #[expect(clippy::too_many_arguments, reason = "the forward's arguments with their gradients")]
    fn route_backward(
        &self,
        products: &Products<'_>,
        dh: ViewMut<'_, f32>,
        mut grads: ViewMut<'_, f32>,
        acts: &Acts,
        normed: router::Normed<'_>,
        sparsity: router::Sparsity<'_>,
        training: GateTraining,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (gpu, tokens) = (products.gpu, products.tokens);
        let (hidden, width) = (self.kind.hidden(), self.kind.intermediate());
        let (Some(n), Some(routed)) = (self.kind.num_experts(), &acts.routed) else { return Ok(()) };
        let Scratch { dcoefficients, dlogits, partials, staging, .. } = scratch;
        let dcoefficients = dcoefficients.slice(0..tokens * n);
        if let (DeviceFfn::Hosted { gate, .. }, Some(hosted), Some(staging)) =
            (self.kind, &acts.hosted, staging)
        {
            let range = self.kind.gate_params(grads.len());
            let dgate = grads.slice_mut(range);
            return hosted.backward(gate.as_ref(), gpu, dh, dgate, dcoefficients, training, staging);
        }
        let Some(Router { config, weight, bias }) = self.router() else { return Ok(()) };
        let mut dz = dlogits.slice_mut(0..tokens * n);
        router::backward(gpu, dz.reborrow(), dcoefficients, routed, sparsity, &super::gates(config))?;
        let [drouter, mut dbias] = router_ranges(hidden, width, n);
        if bias.is_none() {
            dbias = drouter.end..drouter.end;
        }
        let [drouter, dbias] = grads.parts([drouter, dbias]);
        let dbias = bias.map(|_| dbias);
        router::backward_weights(gpu, drouter, dbias, dz.as_view(), normed, hidden, partials.view_mut())?;
        Ok(router::backward_input_add(gpu, dh, dz.as_view(), weight, hidden)?)
    }

    fn dims(&self, tokens: usize) -> ffn::Dims {
        let n = self.kind.num_experts().unwrap_or(1);
        ffn::Dims { tokens, intermediate: self.kind.intermediate(), num_experts: n }
    }
}

/// Where the router's weight and bias lie in an FFN's parameters.
pub(super) fn router_ranges(hidden: usize, intermediate: usize, n: usize) -> [std::ops::Range<usize>; 2] {
    let start = 3 * padded(hidden * intermediate);
    let bias = start + padded(n * hidden);
    [start..start + n * hidden, bias..bias + n]
}
