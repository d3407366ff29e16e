//! An FFN on the device: dense, or experts behind sigmoid gates or a gate that the host computes.
//!
//! The core of experts that every token runs is a dense FFN of its neurons. Products of the other experts run over lists of the active pairs, which the device sorts by expert; nothing waits for the routing. The
//! straight-through gradient of a router needs `silu(a) b g` of inactive pairs too: with it, the three products a, b and g
//! are those of all pairs. Sizes that the kernels of lists do not take run all products of all pairs, with coefficients
//! that are 0 where an expert is inactive. Where the kernels for slots are chosen, the core is part of the products of the
//! active pairs.

use std::ops::Range;

use dsmoe_kernels::cuda::ops::choice::{ExpertKernels, Variants};
use dsmoe_kernels::cuda::ops::router::{self, Lists, Normed, Routed, Sparsity};
use dsmoe_kernels::cuda::ops::slots::{Slots, Sort};
use dsmoe_kernels::cuda::ops::{elementwise, experts, ffn, linear, slot_ffn};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Matrix, View, ViewMut};
use half::bf16;

use crate::config::Config;
use crate::error::Result;
use crate::ffn::{DeviceFfn, DsmoeForm, GateTraining, Gated};
use crate::model::gpu::ffn::{Forward, ForwardSlots, Projections, Rows};
use crate::model::gpu::gating::{self, Low, Tensors};
use crate::model::gpu::hosted::{Hosted, Staging};
use crate::model::gpu::{Experts, experts, gates, gating_of, is_wide, rank, slots_shape, training_passes};

/// One layer's parameters, in f32 and rounded.
pub(super) struct Weights<'a> {
    pub(super) kind: &'a DeviceFfn,
    pub(super) master: View<'a, f32>,
    pub(super) rounded: View<'a, bf16>,
    /// The threshold of the logits of its gates, and the logit at which a gate is a half.
    pub(super) thresholds: View<'a, f32>,
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
    /// The values between the products of a router of low rank, `[T, r]`.
    low: GpuBuf<f32>,
    routed: Option<Routed>,
    /// The active pairs, where products run over lists.
    lists: Option<Lists>,
    /// The active pairs, where products run over slots, with the variants of those.
    slots: Option<(Slots, Variants)>,
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
    /// As the values of a layer's router, rounded, and their gradient.
    low_rounded: GpuBuf<bf16>,
    dlow: GpuBuf<f32>,
    /// The addition to the gradient of every gate of a layer whose thresholds hold the share: one value.
    held: GpuBuf<f32>,
    /// Ones, as many as tokens and as the rank of routers.
    ones: GpuBuf<f32>,
    partials: GpuBuf<f32>,
    /// The experts' parts of the sums of tokens.
    parts: GpuBuf<bf16>,
    /// The values of passes over slots.
    workspace: GpuBuf<bf16>,
    staging: Option<Staging>,
}

impl Acts {
    pub(super) fn new(gpu: &Gpu, config: &Config, ffn: &DeviceFfn, tokens: usize) -> Result<Acts> {
        let passes = training_passes(ffn);
        let kernels = experts(gpu, config, ffn, tokens, passes);
        let listed = ffn.routed().filter(|_| matches!(kernels, Experts::Lists(_)));
        let (slots, kept) = match kernels {
            Experts::Slots(shape, variants) => {
                (Some((Slots::with_room(gpu, shape)?, *variants)), passes.kept(&shape))
            }
            Experts::Dense | Experts::Lists(_) => (None, tokens * ffn.gated().intermediate),
        };
        Ok(Acts {
            a: gpu.zeros(kept)?,
            b: gpu.zeros(kept)?,
            low: gpu.zero_rows(tokens, rank(std::slice::from_ref(ffn)))?,
            routed: ffn.routed().map(|n| Routed::with_room(gpu, tokens, n)).transpose()?,
            lists: listed.map(|n| Lists::with_room(gpu, tokens, n)).transpose()?,
            slots,
            hosted: Hosted::new(ffn),
        })
    }

    pub(super) fn bytes(ffn: &DeviceFfn, tokens: usize, kernels: ExpertKernels) -> usize {
        let rank = rank(std::slice::from_ref(ffn));
        let others = tokens * (4 * rank + ffn.routed().map_or(0, |n| 9 * n + 4));
        // The lists' own are 8 bytes a pair and 4 a token.
        let lists = tokens * (4 * ffn.gated().intermediate + ffn.routed().map_or(0, |n| 8 * n + 4));
        let slots = slots_shape(ffn, tokens).filter(|_| kernels != ExpertKernels::Lists);
        let slots = slots.map_or(0, |shape| 4 * training_passes(ffn).kept(&shape) + shape.bytes());
        // Which of them it is depends on the device.
        others + lists.max(slots)
    }

    pub(super) fn routed(&self) -> Option<&Routed> {
        self.routed.as_ref()
    }

    /// Returns the parts of the sums that a forward pass left.
    ///
    /// # Panics
    /// [`Weights::leaves_parts`] is false.
    pub(super) fn parts<'a>(
        &'a self,
        scratch: &'a Scratch,
        ffn: &DeviceFfn,
    ) -> (View<'a, bf16>, &'a Slots, &'a Routed) {
        let ((slots, _), routed) = self.slots.as_ref().zip(self.routed.as_ref()).expect("slots");
        let parts = slot_ffn::parts(&scratch.workspace, training_passes(ffn), &slots.shape());
        (parts, slots, routed)
    }

    /// Tells whether a backward pass can set the gradients of weights instead of adding to them.
    pub(super) fn sets(&self) -> bool {
        self.slots.is_some()
    }

    /// Returns the term that the gate adds to the loss, after the forward pass.
    pub(super) fn balance_loss(&self) -> f64 {
        self.hosted.as_ref().map_or(0.0, |hosted| hosted.balance_loss)
    }
}

impl Scratch {
    pub(super) fn new(gpu: &Gpu, config: &Config, ffns: &[DeviceFfn], tokens: usize) -> Result<Scratch> {
        let (mut widest, mut parts, mut workspace) = (0, 0, 0);
        for ffn in ffns {
            let passes = training_passes(ffn);
            match experts(gpu, config, ffn, tokens, passes) {
                Experts::Slots(shape, _) => workspace = passes.workspace(&shape).max(workspace),
                Experts::Dense => widest = (tokens * ffn.gated().intermediate).max(widest),
                Experts::Lists(dims) => {
                    widest = (tokens * ffn.gated().intermediate).max(widest);
                    parts = dims.parts().max(parts);
                }
            }
        }
        let experts = ffns.iter().filter_map(DeviceFfn::routed).max().unwrap_or(0);
        let rank = rank(ffns);
        let hidden = ffns.first().map_or(0, |ffn| ffn.gated().hidden);
        let pairs = tokens * experts;
        let hosted = ffns.iter().any(DeviceFfn::is_hosted);
        Ok(Scratch {
            parts: gpu.zeros(parts)?,
            workspace: gpu.zeros(workspace)?,
            c: gpu.zeros(widest)?,
            da: gpu.zeros(widest)?,
            db: gpu.zeros(widest)?,
            g: gpu.zeros(widest)?,
            logits: gpu.zeros(pairs)?,
            dcoefficients: gpu.zeros(pairs)?,
            dlogits: gpu.zeros(pairs)?,
            low_rounded: gpu.zero_rows(tokens, rank)?,
            dlow: gpu.zero_rows(tokens, rank)?,
            held: gpu.zeros(1)?,
            ones: gpu.upload(&vec![1.0; if rank > 0 { tokens.max(rank) } else { 0 }])?,
            partials: gpu.zeros(router::partials_len(hidden, experts.max(rank)))?,
            staging: hosted.then(|| Staging::new(gpu, tokens * hidden)).transpose()?,
        })
    }

    pub(super) fn bytes(ffn: &DeviceFfn, tokens: usize, kernels: ExpertKernels) -> usize {
        let Gated { hidden, intermediate, .. } = *ffn.gated();
        let staged = if ffn.is_hosted() { 4 * hidden } else { 0 };
        let (experts, rank) = (ffn.routed().unwrap_or(0), rank(std::slice::from_ref(ffn)));
        // The parts of sums are as many as pairs where products run over lists, which depends on the device.
        let parts = if is_wide(ffn) { 2 * hidden * experts } else { 0 };
        let lists = tokens * (8 * intermediate + parts);
        let slots = slots_shape(ffn, tokens).filter(|_| kernels != ExpertKernels::Lists);
        let slots = slots.map_or(0, |shape| 2 * training_passes(ffn).workspace(&shape));
        lists.max(slots) + tokens * (12 * experts + 6 * rank + staged)
    }
}

/// The router of a layer.
struct Router<'a> {
    form: &'a DsmoeForm,
    first: View<'a, f32>,
    second: Option<View<'a, f32>>,
    bias: Option<View<'a, f32>>,
    /// Rounded.
    correction: Option<View<'a, bf16>>,
}

impl Router<'_> {
    fn tensors(&self) -> Tensors<'_> {
        let Router { first, second, bias, correction, .. } = self;
        let (second, bias) = (second.as_deref(), bias.as_deref());
        Tensors { first, second, bias, correction: correction.as_deref() }
    }
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
        let DeviceFfn::Routed { gated, form, .. } = self.kind else { return None };
        let [first, second, bias, correction] = form.gating(gated.hidden).ranges(gated.len());
        let tensor = |range: Range<usize>| (!range.is_empty()).then(|| self.master.part(range));
        let first = self.master.part(first);
        let correction = (!correction.is_empty()).then(|| self.rounded.part(correction));
        Some(Router { form, first, second: tensor(second), bias: tensor(bias), correction })
    }

    /// Returns the logits of the forward pass over as many tokens, where the device computes them.
    pub(super) fn logits<'s>(&self, scratch: &'s Scratch, tokens: usize) -> Option<View<'s, f32>> {
        Some(scratch.logits.shaped(tokens, gating_of(self.kind)?.gates))
    }

    /// Tells whether inactive pairs take part in the router's gradient.
    fn all_pairs(&self) -> bool {
        self.router().is_some_and(|router| router.form.router.ste)
    }

    /// Tells whether a forward pass can leave the parts of its sums, to which nothing else is added.
    pub(super) fn leaves_parts(&self, acts: &Acts) -> bool {
        let correction = self.router().is_some_and(|router| router.correction.is_some());
        acts.slots.is_some() && !self.kind.gated().output_bias && !correction
    }

    /// Sets `y`, or without it leaves [`Acts::parts`].
    ///
    /// # Panics
    /// There is no `y` and [`Weights::leaves_parts`] is false.
    pub(super) fn forward(
        &self,
        mut y: Option<&mut Matrix<f32>>,
        acts: &mut Acts,
        input: Input<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.route(acts, input, scratch)?;
        let (x, activation, cut) = (input.h, self.kind.gated().activation, self.kind.cut());
        let Acts { a, b, low, routed, lists, slots, .. } = acts;
        let Scratch { c, parts, low_rounded, workspace, .. } = scratch;
        let ([gate, up, down], biases, output_bias) = (&self.matrices(), &self.biases(), &self.output_bias());
        let biases = biases.as_ref().map(|biases| biases.each_ref().map(|bias| &**bias));
        let output_bias = output_bias.as_deref();
        let projections = Projections { gate, up, down, biases, output_bias, activation };
        let all_pairs = self.all_pairs();
        match (slots, &routed) {
            (Some((slots, variants)), Some(routed)) => {
                let (y, kept) = (y.as_deref_mut(), Some([&mut **a, &mut **b]));
                ForwardSlots { y, kept, workspace, slots, x, projections, routed, variants, all_pairs }
                    .run()?;
            }
            _ => Forward {
                y: y.as_deref_mut().expect("an output"),
                c: c.blocks_mut(x.rows(), cut),
                products: [a, b].map(|buf| buf.blocks_mut(x.rows(), cut)),
                parts,
                x,
                projections,
                routed: routed.as_ref(),
                lists: lists.as_mut(),
                all_pairs,
            }
            .run()?,
        }
        let router = self.router();
        let correction = router.as_ref().and_then(|router| router.tensors().correction);
        match (y, correction) {
            (Some(y), Some(_)) => gating::correct(y, &low_rounded.shaped(low.rows(), low.cols()), correction),
            (_, None) => Ok(()),
            (None, Some(_)) => unreachable!("parts of a sum with a correction"),
        }
    }

    /// Sets the routing, where there is a gate.
    fn route(&self, acts: &mut Acts, input: Input<'_>, scratch: &mut Scratch) -> Result<()> {
        let Input { h, normed, training } = input;
        let Some(routed) = &mut acts.routed else { return Ok(()) };
        if let Some(hosted) = &mut acts.hosted {
            let params = self.master.part(self.kind.gate_params(self.master.len()));
            hosted.forward(routed, normed, &params, training)?;
            let Some((slots, _)) = &mut acts.slots else { return Ok(()) };
            return Ok(Sort { slots, routed }.run()?);
        }
        let Some(router) = self.router() else { return Ok(()) };
        let Scratch { logits, low_rounded, ones, .. } = scratch;
        let (rows, rank) = (acts.low.rows(), acts.low.cols());
        let values = &mut *acts.low;
        gating::Forward {
            routed,
            z: &mut logits.shaped_mut(h.rows(), router.form.routed()),
            low: Low { values, rounded: &mut low_rounded.shaped_mut(rows, rank), ones },
            normed,
            tensors: router.tensors(),
            thresholds: &self.thresholds,
            gates: gates(&router.form.gates()),
            slots: acts.slots.as_mut().map(|(slots, _)| slots),
        }
        .run()
    }

    /// Sets `dh` from `dy`, and adds to `grads`, which is laid out as the parameters; see [`Backward::set`].
    pub(super) fn backward(&self, args: Backward<'_>, scratch: &mut Scratch) -> Result<()> {
        let Backward { dh, grads, dy, acts, input, sparsity, partials, set } = args;
        let gated = self.kind.gated();
        let mut to = Gradients { dh: &mut *dh, grads: &mut *grads, partials: &mut *partials };
        let signal = Signal { dy, h: input.h, set };
        match (&acts.slots, &acts.routed) {
            (Some((slots, variants)), Some(routed)) => {
                self.backward_slots((slots, routed), variants, (acts, scratch), &mut to, signal)?;
            }
            _ => self.backward_blocks(acts, scratch, &mut to, signal)?,
        }
        let [.., of_down, of_output] = gated.ranges();
        for range in [of_down, of_output].into_iter().filter(|range| !range.is_empty()) {
            linear::BackwardBias { db: &mut grads.part_mut(range), dy, partials: &mut *partials }.run()?;
        }
        self.route_backward(Backward { dh, grads, dy, acts, input, sparsity, partials, set }, scratch)
    }

    /// Sets `dh` and the gradients of coefficients, and adds to the gradients of the weights or sets them, where pairs lie in
    /// slots.
    fn backward_slots(
        &self,
        (slots, routed): (&Slots, &Routed),
        variants: &Variants,
        (acts, scratch): (&Acts, &mut Scratch),
        to: &mut Gradients<'_>,
        Signal { dy, h, set }: Signal<'_>,
    ) -> Result<()> {
        let gated = self.kind.gated();
        let [gate, up, down] = &self.matrices();
        let activation = gated.activation;
        let projections = Projections { gate, up, down, biases: None, output_bias: None, activation };
        let layer = projections.layer(h, (slots, routed), variants, self.all_pairs());
        let [of_gate, of_up, of_down, ..] = gated.ranges();
        let mut grads = to.grads.parts([of_gate, of_up, of_down]);
        let Scratch { dcoefficients, workspace, .. } = scratch;
        let dcoefficients = &mut dcoefficients.shaped_mut(h.rows(), routed.num_experts());
        let (dx, grads) = (&mut *to.dh, grads.each_mut().map(|grad| &mut **grad));
        let kept = [&*acts.a, &*acts.b];
        Ok(slot_ffn::Backward { dx, grads, dcoefficients, workspace, dy, kept, set, layer }.run()?)
    }

    /// Does the same where values of pairs are in blocks of the core and of the other neurons.
    fn backward_blocks(
        &self,
        acts: &Acts,
        scratch: &mut Scratch,
        to: &mut Gradients<'_>,
        signal: Signal<'_>,
    ) -> Result<()> {
        let (tokens, width, cut) = (signal.h.rows(), self.kind.gated().intermediate, self.kind.cut());
        let core = cut[0];
        let Scratch { c, da, db, g, dcoefficients, parts, .. } = scratch;
        let [[c_core, c], [da_core, da], [db_core, db], [g_core, g]] =
            [c, da, db, g].map(|buf| buf.blocks_mut(tokens, cut));
        let [[a_core, a], [b_core, b]] = [&acts.a, &acts.b].map(|buf| buf.blocks(tokens, cut));
        let pairs = Pairs { neurons: core..width, a, b, c, da, db, g };
        let routed = acts.routed.as_ref().map(|routed| {
            let dcoefficients = dcoefficients.shaped_mut(tokens, routed.num_experts());
            Of { routed, lists: acts.lists.as_ref(), dcoefficients, parts, all_pairs: self.all_pairs() }
        });
        self.backward_pairs(pairs, routed, to, signal)?;
        if core > 0 {
            let (a, b, c) = (a_core, b_core, c_core);
            let pairs = Pairs { neurons: 0..core, a, b, c, da: da_core, db: db_core, g: g_core };
            self.backward_pairs(pairs, None, to, signal)?;
        }
        Ok(())
    }

    /// Sets `dh`, or adds to it from the core, and adds to the gradients of the neurons' weights and biases.
    fn backward_pairs(
        &self,
        pairs: Pairs<'_>,
        of: Option<Of<'_>>,
        to: &mut Gradients<'_>,
        Signal { dy, h, .. }: Signal<'_>,
    ) -> Result<()> {
        let Pairs { neurons, a, b, mut c, mut da, mut db, mut g } = pairs;
        let (gated, add) = (self.kind.gated(), neurons.start == 0 && self.kind.core() > 0);
        let Gated { hidden, activation, .. } = *gated;
        let [gate, up, down] = &self.matrices();
        let projections = Projections { gate, up, down, biases: None, output_bias: None, activation };
        let Rows { gate, up, down, .. } = &projections.rows(neurons.clone(), hidden);
        let (mut dcoefficients, mut parts) = (None, None);
        let (mut routed, mut lists, mut all_pairs) = (None, None, false);
        if let Some(of) = of {
            (dcoefficients, parts) = (Some(of.dcoefficients), Some(of.parts));
            (routed, lists, all_pairs) = (Some(of.routed), of.lists, of.all_pairs);
        }
        // g = dy W_down^T: the stored matrix is W_down^T already, [width, hidden].
        match lists {
            Some(lists) if !all_pairs => {
                experts::Project { out: &mut g, x: dy, weight: down, lists }.run()?;
            }
            _ => linear::Forward { y: &mut g, x: dy, w: down }.run()?,
        }
        let coefficients = routed.map(Routed::coefficients);
        ffn::Backward {
            da: &mut da,
            db: &mut db,
            c: &mut c,
            dcoefficients: dcoefficients.as_deref_mut(),
            g: &g,
            a: &a,
            b: &b,
            coefficients: coefficients.as_deref(),
            all_pairs,
            activation,
        }
        .run()?;
        let (da, db, c) = (&da, &db, &c);
        let Gradients { dh, grads, partials: sums } = to;
        let [of_matrices @ .., of_gate, of_up, _, _] = gated.ranges();
        if gated.bias {
            for (bias, dy) in [(of_gate, &**da), (of_up, &**db)] {
                let range = bias.start + neurons.start..bias.start + neurons.end;
                linear::BackwardBias { db: &mut grads.part_mut(range), dy, partials: sums }.run()?;
            }
        }
        // dW_down^T = c^T dy, [width, hidden]
        let of_neurons = of_matrices.map(|matrix: Range<usize>| {
            matrix.start + neurons.start * hidden..matrix.start + neurons.end * hidden
        });
        let [dgate, dup, ddown] = &mut grads.parts(of_neurons);
        match (lists, parts) {
            (Some(lists), Some(parts)) => {
                experts::BackwardWeights { dgate, dup, ddown, da, db, c, x: h, dy, lists }.run()?;
                experts::BackwardInput { dx: dh, parts, da, db, gate, up, lists }.run()?;
            }
            _ => {
                linear::BackwardWeight { dw: ddown, dy: c, x: dy }.run()?;
                linear::BackwardWeight { dw: dgate, dy: da, x: h }.run()?;
                linear::BackwardWeight { dw: dup, dy: db, x: h }.run()?;
                linear::BackwardInput { dx: &mut **dh, dy: da, w: gate, add }.run()?;
                linear::BackwardInput { dx: &mut **dh, dy: db, w: up, add: true }.run()?;
            }
        }
        Ok(())
    }

    /// Adds the gradients that pass through the gate, from those of the coefficients.
    fn route_backward(&self, args: Backward<'_>, scratch: &mut Scratch) -> Result<()> {
        let Backward { dh, grads, dy, acts, input, sparsity, .. } = args;
        let Input { h, normed, training } = input;
        let (Some(n), Some(routed)) = (self.kind.routed(), &acts.routed) else { return Ok(()) };
        let Scratch { dcoefficients, dlogits, partials, staging, low_rounded, dlow, held, ones, .. } =
            scratch;
        let dcoefficients = &dcoefficients.shaped(h.rows(), n);
        if let (Some(hosted), Some(staging)) = (&acts.hosted, staging) {
            let range = self.kind.gate_params(grads.len());
            return hosted.backward(dh, &mut grads.part_mut(range), dcoefficients, training, staging);
        }
        let (Some(router), Some(gating)) = (self.router(), gating_of(self.kind)) else { return Ok(()) };
        let Tensors { first, second, bias, correction } = router.tensors();
        let (mut dz, gates) = (dlogits.shaped_mut(h.rows(), n), &gates(&router.form.gates()));
        let sparsity = Sparsity { factor: router.form.sparsity_factor(), ..sparsity };
        router::Backward { dz: &mut dz, dcoefficients, routed, sparsity, held, gates }.run()?;
        let [dfirst, dsecond, dbias, dcorrection] = &mut grads.parts(gating.ranges(self.kind.gated().len()));
        let dbias = bias.map(|_| &mut **dbias);
        let Some(second) = second else {
            let drouter = &mut **dfirst;
            router::BackwardWeights { drouter, dbias, dz: &dz, normed, partials }.run()?;
            return Ok(router::BackwardInput { dh, dz: &dz, router: first }.run()?);
        };
        // z = l B^T
        let low = &acts.low;
        let mut dlow = dlow.shaped_mut(low.rows(), low.cols());
        let [rstd, weight] = gating::ones_of(ones, low);
        let of_low = gating::plain(low, &rstd, &weight);
        let drouter = &mut **dsecond;
        router::BackwardWeights { drouter, dbias, dz: &dz, normed: of_low, partials: &mut *partials }
            .run()?;
        match correction {
            None => dlow.fill_zero()?,
            // y += l C^T
            Some(w) => {
                let rounded = &mut low_rounded.shaped_mut(low.rows(), low.cols());
                elementwise::Cast { out: &mut *rounded, x: low }.run()?;
                linear::BackwardWeight { dw: dcorrection, dy: rounded, x: dy }.run()?;
                linear::Forward { y: &mut *dlow, x: dy, w }.run()?;
            }
        }
        router::BackwardInput { dh: &mut dlow, dz: &dz, router: second }.run()?;
        // l = x A^T
        let drouter = &mut **dfirst;
        router::BackwardWeights { drouter, dbias: None, dz: &dlow, normed, partials }.run()?;
        Ok(router::BackwardInput { dh, dz: &dlow, router: first }.run()?)
    }
}

/// Values of the core, or of the other neurons, `[T, neurons]` each.
struct Pairs<'a> {
    neurons: Range<usize>,
    a: View<'a, bf16>,
    b: View<'a, bf16>,
    c: ViewMut<'a, bf16>,
    da: ViewMut<'a, bf16>,
    db: ViewMut<'a, bf16>,
    g: ViewMut<'a, bf16>,
}

/// The rule that decides which pairs run.
struct Of<'a> {
    routed: &'a Routed,
    lists: Option<&'a Lists>,
    /// Set.
    dcoefficients: ViewMut<'a, f32>,
    /// Scratch memory for the parts of the sums of tokens.
    parts: &'a mut Matrix<bf16>,
    /// Inactive pairs take part in the gradients of coefficients.
    all_pairs: bool,
}

/// Where gradients go.
struct Gradients<'a> {
    dh: &'a mut Matrix<f32>,
    grads: &'a mut Matrix<f32>,
    partials: &'a mut Matrix<f32>,
}

/// The gradient of the output, and the input, rounded.
#[derive(Clone, Copy)]
struct Signal<'a> {
    dy: &'a Matrix<bf16>,
    h: &'a Matrix<bf16>,
    /// See [`Backward::set`].
    set: bool,
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
    /// Sets the gradients of the three projections where [`Acts::sets`], instead of adding to them.
    pub(super) set: bool,
}
