//! An FFN on the device: dense, or experts behind sigmoid gates or a gate that the host computes.
//!
//! Products run over lists of the active pairs, which the device sorts by expert; nothing waits for the routing. The
//! straight-through gradient of a router needs `silu(a) b g` of inactive pairs too: with it, the three products a, b and g
//! are those of all pairs. Sizes that the kernels of lists do not take run all products of all pairs, with coefficients
//! that are 0 where an expert is inactive.

use dsmoe_kernels::cuda::ops::router::{self, Lists, Normed, Routed, Sparsity};
use dsmoe_kernels::cuda::ops::{experts, ffn, linear};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Matrix, View};
use dsmoe_router::RouterConfig;
use half::bf16;

use crate::error::Result;
use crate::ffn::{DeviceFfn, GateTraining, Gated};
use crate::model::gpu::ffn::{Forward, Projections};
use crate::model::gpu::hosted::{Hosted, Staging};
use crate::model::gpu::{by_lists, gates, router_ranges};

/// One layer's parameters, in f32 and rounded.
pub(super) struct Weights<'a> {
    pub(super) kind: &'a DeviceFfn,
    pub(super) master: View<'a, f32>,
    pub(super) rounded: View<'a, bf16>,
}

/// The input of an FFN.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    /// `normed` rounded, `[T, hidden]`.
    pub(super) h: &'a Matrix<bf16>,
    pub(super) normed: Normed<'a>,
    pub(super) training: GateTraining,
}

/// Data of the forward pass that the backward pass needs.
#[derive(Debug)]
pub(super) struct Acts {
    a: GpuBuf<bf16>,
    b: GpuBuf<bf16>,
    routed: Option<Routed>,
    /// The active pairs, where products run over them.
    lists: Option<Lists>,
    hosted: Option<Hosted>,
}

/// Memory that all layers share.
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
    /// The experts' parts of the sums of tokens.
    parts: GpuBuf<bf16>,
    staging: Option<Staging>,
}

impl Acts {
    pub(super) fn new(gpu: &Gpu, ffn: &DeviceFfn, tokens: usize) -> Result<Acts> {
        let width = ffn.gated().intermediate;
        Ok(Acts {
            a: gpu.zero_rows(tokens, width)?,
            b: gpu.zero_rows(tokens, width)?,
            routed: ffn.num_experts().map(|n| Routed::with_room(gpu, tokens, n)).transpose()?,
            lists: by_lists(gpu, ffn, tokens)
                .map(|dims| Lists::with_room(gpu, tokens, dims.num_experts))
                .transpose()?,
            hosted: Hosted::new(ffn),
        })
    }

    pub(super) fn bytes(ffn: &DeviceFfn, tokens: usize) -> usize {
        tokens * (4 * ffn.gated().intermediate + ffn.num_experts().map_or(0, |n| 17 * n + 8))
    }

    pub(super) fn routed(&self) -> Option<&Routed> {
        self.routed.as_ref()
    }

    /// Returns the term that the gate adds to the loss, after the forward pass.
    pub(super) fn balance_loss(&self) -> f64 {
        self.hosted.as_ref().map_or(0.0, |hosted| hosted.balance_loss)
    }
}

impl Scratch {
    pub(super) fn new(gpu: &Gpu, ffns: &[DeviceFfn], tokens: usize) -> Result<Scratch> {
        let widest = tokens * ffns.iter().map(|ffn| ffn.gated().intermediate).max().unwrap_or(0);
        let experts = ffns.iter().filter_map(DeviceFfn::num_experts).max().unwrap_or(0);
        let hidden = ffns.first().map_or(0, |ffn| ffn.gated().hidden);
        let pairs = tokens * experts;
        let parts = ffns.iter().filter_map(|ffn| by_lists(gpu, ffn, tokens)).map(|dims| dims.parts());
        let hosted = ffns.iter().any(DeviceFfn::is_hosted);
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
            staging: hosted.then(|| Staging::new(gpu, tokens * hidden)).transpose()?,
        })
    }

    pub(super) fn bytes(ffn: &DeviceFfn, tokens: usize) -> usize {
        let Gated { hidden, intermediate, .. } = *ffn.gated();
        let staged = if ffn.is_hosted() { 4 * hidden } else { 0 };
        tokens * (8 * intermediate + (12 + 2 * hidden) * ffn.num_experts().unwrap_or(0) + staged)
    }
}

/// The router of a layer, f32.
struct Router<'a> {
    config: &'a RouterConfig,
    weight: View<'a, f32>,
    bias: Option<View<'a, f32>>,
}

impl Weights<'_> {
    fn matrices(&self) -> [View<'_, bf16>; 3] {
        let [gate, up, down, ..] = self.kind.gated().ranges();
        [gate, up, down].map(|range| self.rounded.part(range))
    }

    /// Returns the biases of gate, up and down.
    fn biases(&self) -> Option<[View<'_, f32>; 3]> {
        let gated = self.kind.gated();
        let [_, _, _, gate, up, down, _] = gated.ranges();
        gated.bias.then(|| [gate, up, down].map(|range| self.master.part(range)))
    }

    fn output_bias(&self) -> Option<View<'_, f32>> {
        let gated = self.kind.gated();
        let [.., bias] = gated.ranges();
        gated.output_bias.then(|| self.master.part(bias))
    }

    fn router(&self) -> Option<Router<'_>> {
        let DeviceFfn::Routed { gated, router, router_bias } = self.kind else { return None };
        let [weight, bias] = router_ranges(gated, router.num_experts);
        let bias = router_bias.then(|| self.master.part(bias));
        Some(Router { config: router, weight: self.master.part(weight), bias })
    }

    /// Tells whether inactive pairs take part in the router's gradient.
    fn all_pairs(&self) -> bool {
        self.router().is_some_and(|router| router.config.ste)
    }

    /// Sets `y`.
    pub(super) fn forward(
        &self,
        y: &mut Matrix<f32>,
        acts: &mut Acts,
        input: Input<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.route(acts, input, scratch)?;
        let (x, gated) = (input.h, self.kind.gated());
        let Acts { a, b, routed, lists, .. } = acts;
        let Scratch { c, parts, .. } = scratch;
        let ([gate, up, down], biases, output_bias) = (&self.matrices(), &self.biases(), &self.output_bias());
        let biases = biases.as_ref().map(|biases| biases.each_ref().map(|bias| &**bias));
        Forward {
            y,
            c: &mut c.shaped_mut(x.rows(), gated.intermediate),
            products: Some([&mut **a, &mut **b]),
            parts,
            x,
            projections: Projections {
                gate,
                up,
                down,
                biases,
                output_bias: output_bias.as_deref(),
                activation: gated.activation,
            },
            routed: routed.as_ref(),
            lists: lists.as_mut(),
            all_pairs: self.all_pairs(),
        }
        .run()
    }

    /// Sets the routing, where there is a gate.
    fn route(&self, acts: &mut Acts, input: Input<'_>, scratch: &mut Scratch) -> Result<()> {
        let Input { h, normed, training } = input;
        let Some(routed) = &mut acts.routed else { return Ok(()) };
        if let Some(hosted) = &mut acts.hosted {
            let params = self.master.part(self.kind.gate_params(self.master.len()));
            return hosted.forward(routed, normed, &params, training);
        }
        let Some(Router { config, weight, bias }) = self.router() else { return Ok(()) };
        let mut z = scratch.logits.shaped_mut(h.rows(), config.num_experts);
        router::Logits { z: &mut z, normed, router: &weight, bias: bias.as_deref() }.run()?;
        Ok(router::Route { routed, z: &z, gates: &gates(config) }.run()?)
    }

    /// Sets `dh` from `dy`, and adds to `grads`, which is laid out as the parameters.
    pub(super) fn backward(&self, args: Backward<'_>, scratch: &mut Scratch) -> Result<()> {
        let Backward { dh, grads, dy, acts, input, sparsity, partials: sums } = args;
        let h = input.h;
        let (tokens, gated) = (h.rows(), self.kind.gated());
        let Gated { intermediate: width, activation, .. } = *gated;
        let Scratch { c, da, db, g, dcoefficients, parts, .. } = &mut *scratch;
        let [mut c, mut da, mut db, mut g] = [c, da, db, g].map(|buf| buf.shaped_mut(tokens, width));
        let (all_pairs, lists) = (self.all_pairs(), &acts.lists);
        let [gate, up, down] = &self.matrices();
        // g = dy W_down^T: the stored matrix is W_down^T already, [width, hidden].
        match lists {
            Some(lists) if !all_pairs => {
                experts::Project { out: &mut g, x: dy, weight: down, lists }.run()?;
            }
            _ => linear::Forward { y: &mut g, x: dy, w: down }.run()?,
        }
        let mut dcoefficients = self.kind.num_experts().map(|n| dcoefficients.shaped_mut(tokens, n));
        let coefficients = acts.routed.as_ref().map(Routed::coefficients);
        ffn::Backward {
            da: &mut da,
            db: &mut db,
            c: &mut c,
            dcoefficients: dcoefficients.as_deref_mut(),
            g: &g,
            a: &acts.a,
            b: &acts.b,
            coefficients: coefficients.as_deref(),
            all_pairs,
            activation,
        }
        .run()?;
        let (da, db, c) = (&da, &db, &c);
        // dW_down^T = c^T dy, [width, hidden]
        let [dgate, dup, ddown, of_gate, of_up, of_down, of_output] = &mut grads.parts(gated.ranges());
        let of_biases = [(of_gate, &**da), (of_up, &**db), (of_down, dy), (of_output, dy)];
        for (db, dy) in of_biases.into_iter().filter(|(db, _)| !db.is_empty()) {
            linear::BackwardBias { db, dy, partials: &mut *sums }.run()?;
        }
        match lists {
            Some(lists) => {
                experts::BackwardWeights { dgate, dup, ddown, da, db, c, x: h, dy, lists }.run()?;
                experts::BackwardInput { dx: dh, parts, da, db, gate, up, lists }.run()?;
            }
            None => {
                linear::BackwardWeight { dw: ddown, dy: c, x: dy }.run()?;
                linear::BackwardWeight { dw: dgate, dy: da, x: h }.run()?;
                linear::BackwardWeight { dw: dup, dy: db, x: h }.run()?;
                linear::BackwardInput { dx: &mut *dh, dy: da, w: gate, add: false }.run()?;
                linear::BackwardInput { dx: &mut *dh, dy: db, w: up, add: true }.run()?;
            }
        }
        self.route_backward(Backward { dh, grads, dy, acts, input, sparsity, partials: sums }, scratch)
    }

    /// Adds the gradients that pass through the gate, from those of the coefficients.
    fn route_backward(&self, args: Backward<'_>, scratch: &mut Scratch) -> Result<()> {
        let Backward { dh, grads, acts, input, sparsity, .. } = args;
        let Input { h, normed, training } = input;
        let (Some(n), Some(routed)) = (self.kind.num_experts(), &acts.routed) else { return Ok(()) };
        let Scratch { dcoefficients, dlogits, partials, staging, .. } = scratch;
        let dcoefficients = &dcoefficients.shaped(h.rows(), n);
        if let (Some(hosted), Some(staging)) = (&acts.hosted, staging) {
            let range = self.kind.gate_params(grads.len());
            return hosted.backward(dh, &mut grads.part_mut(range), dcoefficients, training, staging);
        }
        let Some(Router { config, weight, bias }) = self.router() else { return Ok(()) };
        let (mut dz, gates) = (dlogits.shaped_mut(h.rows(), n), &gates(config));
        router::Backward { dz: &mut dz, dcoefficients, routed, sparsity, gates }.run()?;
        let [drouter, mut dbias] = router_ranges(self.kind.gated(), n);
        if bias.is_none() {
            dbias = drouter.end..drouter.end;
        }
        let [drouter, dbias] = &mut grads.parts([drouter, dbias]);
        let dbias = bias.map(|_| &mut **dbias);
        router::BackwardWeights { drouter, dbias, dz: &dz, normed, partials }.run()?;
        Ok(router::BackwardInput { dh, dz: &dz, router: &weight }.run()?)
    }
}

/// Arguments of the backward pass.
pub(super) struct Backward<'a> {
    pub(super) dh: &'a mut Matrix<f32>,
    pub(super) grads: &'a mut Matrix<f32>,
    pub(super) dy: &'a Matrix<bf16>,
    pub(super) acts: &'a Acts,
    pub(super) input: Input<'a>,
    pub(super) sparsity: Sparsity<'a>,
    /// Scratch memory for the gradients of biases.
    pub(super) partials: &'a mut Matrix<f32>,
}
