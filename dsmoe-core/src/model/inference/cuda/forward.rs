//! The forward pass on a device, op by op.

use dsmoe_kernels::cuda::Matrix;
use dsmoe_kernels::cuda::ops::attention::{self, Heads, Segments};
use dsmoe_kernels::cuda::ops::choice::{Passes, Variants};
use dsmoe_kernels::cuda::ops::decode::{self, At};
use dsmoe_kernels::cuda::ops::gemv::{self, FEW, Factors};
use dsmoe_kernels::cuda::ops::rope::Positions;
use dsmoe_kernels::cuda::ops::router::{self, CountLogits, Normed, Routed};
use dsmoe_kernels::cuda::ops::slots::{Slots, Sort};
use dsmoe_kernels::cuda::ops::{cross_entropy, embedding, linear, rms_norm};
use dsmoe_router::counts::PER_UNIT;
use half::bf16;

use super::acts::{Acts, FfnActs, Wide};
use super::cache::LayerCache;
use super::weights::{CudaInference, Layer, LayerFfn};
use crate::error::Result;
use crate::ffn::DeviceFfn;
use crate::model::gpu::block::{After, Block, Branch, Join};
use crate::model::gpu::ffn::{Forward, ForwardSlots, Projections};
use crate::model::gpu::gating::{self, Low};
use crate::model::gpu::turns::{PassAngles, Place};
use crate::model::gpu::{Experts, experts, gates, gating_of, heads, hosted};
use crate::model::tensors::logits_of;

/// The tokens that attend to each other in a pass.
pub(super) enum Attend<'a> {
    /// Sequences of so many tokens, each from its start.
    Sequences(usize),
    /// Segments, with the positions of their tokens.
    Ragged(&'a Segments, &'a Matrix<u32>),
    /// The next tokens of a sequence, from this position on.
    Continue(&'a mut [LayerCache], usize),
    /// The next token of a sequence, at the position on the device; with scratch memory.
    Next(&'a mut [LayerCache], &'a Matrix<u32>, &'a mut Matrix<f32>),
}

impl CudaInference {
    /// Queues a pass over `tokens` tokens whose ids are on the device. `angles` are those of the pass.
    pub(super) fn forward(
        &self,
        acts: &mut Acts,
        tokens: usize,
        mut attend: Attend<'_>,
        angles: &PassAngles,
    ) -> Result<()> {
        let (config, block) = (&self.config, Block::of(&self.config));
        let Acts { ids, x, x_mid, rstd, h, qkv, a, lse, y, ffn, rstd_heads, raw, rstd_raw, ones, .. } = acts;
        let [mut x, mut x_mid, mut y] = [x, x_mid, y].map(|buf| buf.part_mut(0..tokens));
        let (mut rstd, mut h) = (rstd.part_mut(0..tokens), h.part_mut(0..tokens));
        let [after, unnormed] =
            [!raw.is_empty(), !ones.rstd.is_empty()].map(|has| if has { tokens } else { 0 });
        let (mut raw, mut rstd_raw) = (raw.part_mut(0..after), rstd_raw.part_mut(0..after));
        let ones_rstd = ones.rstd.part(0..unnormed);
        let table = self.embedding.as_ref().unwrap_or(&self.head);
        let scale = config.architecture.embed_scale;
        embedding::Forward { out: &mut x, table, ids: &ids.part(0..tokens), scale }.run()?;
        block.read(self.norm_before(0), &mut h, &mut rstd, &x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let heads = heads(config, i);
            let mut qkv = qkv.shaped_mut(tokens, heads.joined_width());
            let mut a = a.shaped_mut(tokens, heads.width());
            linear::Forward { y: &mut qkv, x: &h, w: &layer.qkv }.run()?;
            if let Some(bias) = &layer.qkv_bias {
                linear::AddBias { y: &mut qkv, bias }.run()?;
            }
            for (weight, norm) in layer.head_norms(block, heads) {
                let mut rstd = rstd_heads.shaped_mut(tokens, norm.heads);
                block.norm_heads(&mut qkv, None, &mut rstd, weight, norm)?;
            }
            self.turns.rotate(config, i, &mut qkv, angles, attend.place(tokens))?;
            match &mut attend {
                Attend::Sequences(seq) => {
                    let mut lse = lse.shaped_mut(tokens, heads.heads);
                    let (out, lse, seq) = (&mut a, &mut lse, *seq);
                    attention::Forward { out, lse, qkv: &qkv, heads, seq }.run()?;
                }
                Attend::Ragged(segments, _) => {
                    attention::Ragged { out: &mut a, qkv: &qkv, segments, heads }.run()?;
                }
                Attend::Continue(layers, start) => {
                    let ((keys, values), start) = (&mut layers[i], *start);
                    debug_assert!(start + tokens <= config.max_position);
                    let at = At::Position(start);
                    decode::Append { keys, values, qkv: &qkv, at, heads }.run()?;
                    decode::Prefill { out: &mut a, qkv: &qkv, keys, values, start, heads }.run()?;
                }
                Attend::Next(layers, length, partials) => {
                    let (keys, values) = &mut layers[i];
                    let at = At::Length(length);
                    decode::Append { keys, values, qkv: &qkv, at, heads }.run()?;
                    decode::Decode { out: &mut a, qkv: &qkv, keys, values, length, heads, partials }.run()?;
                }
            }
            let norm = layer.after_attention.as_deref();
            let after = norm.map(|weight| After { weight, x: &mut raw, rstd: &mut rstd_raw });
            block.give(&mut y, after, |y| {
                linear::Forward { y: &mut *y, x: &a, w: &layer.o }.run()?;
                let Some(bias) = &layer.o_bias else { return Ok(()) };
                Ok(linear::AddBias { y, bias }.run()?)
            })?;
            let (out, next) = (&mut x_mid, layer.before_ffn.as_deref());
            let (h, rstd) = (&mut h, &mut rstd);
            block.join(Join { out, h, rstd, residual: &x, branch: Branch::Rows(&y), next })?;
            let normed = match next {
                Some(weight) => Normed { x: &x_mid, rstd, weight, offset: block.offset },
                None => Normed { x: &x_mid, rstd: &ones_rstd, weight: &ones.weight, offset: 0.0 },
            };
            self.route(i, &layer.ffn, ffn, normed)?;
            let norm = layer.after_ffn.as_deref();
            let after = norm.map(|weight| After { weight, x: &mut raw, rstd: &mut rstd_raw });
            let (out, next) = (&mut x, self.norm_before(i + 1));
            // The norm that follows adds up the parts of tokens.
            let in_parts = after.is_none() && next.is_some() && self.leaves_parts(&layer.ffn, ffn, tokens);
            match in_parts {
                true => self.ffn(&layer.ffn, ffn, h, None)?,
                false => block.give(&mut y, after, |y| self.ffn(&layer.ffn, ffn, h, Some(y)))?,
            }
            let left = in_parts.then(|| ffn.parts());
            let branch = match &left {
                Some((parts, slots, routed)) => Branch::Parts { parts, slots, routed },
                None => Branch::Rows(&y),
            };
            block.join(Join { out, h, rstd, residual: &x_mid, branch, next })?;
        }
        Ok(())
    }

    /// Returns the weight of the norm that is taken of the residual stream before layer `i`, or before the head; none where
    /// the layer reads the stream itself.
    fn norm_before(&self, i: usize) -> Option<&Matrix<f32>> {
        match self.layers.get(i) {
            Some(layer) => layer.before_attention.as_deref(),
            None => Some(&self.norm),
        }
    }

    /// Tells whether an FFN can leave the parts of its sums, to which nothing else is added.
    fn leaves_parts(&self, layer: &LayerFfn, acts: &mut FfnActs, tokens: usize) -> bool {
        let correction = layer.router.as_ref().is_some_and(|router| router.correction.is_some());
        let slots = acts.wide.as_mut().and_then(|wide| self.slots(&layer.kind, wide, tokens));
        slots.is_some() && acts.routed.is_some() && layer.output_bias.is_none() && !correction
    }

    /// Sets `y` to the output of a routed FFN, or without it leaves [`FfnActs::parts`].
    ///
    /// # Panics
    /// There is no `y` and [`CudaInference::leaves_parts`] is false.
    fn ffn(
        &self,
        layer: &LayerFfn,
        acts: &mut FfnActs,
        h: &Matrix<bf16>,
        mut y: Option<&mut Matrix<f32>>,
    ) -> Result<()> {
        let (tokens, gated, matrices) = (h.rows(), layer.kind.gated(), layer.matrices());
        let FfnActs { routed, wide, few, low_rounded, .. } = acts;
        // The memory of the routing has that of another layer where this one has no gate.
        let routed = routed.as_ref().filter(|_| layer.kind.routed().is_some());
        match wide.as_mut().filter(|_| tokens > FEW || gated.bias) {
            None => {
                let coefficients = routed.map(Routed::coefficients);
                let core = layer.kind.core();
                let factors = coefficients.as_deref().map(|coefficients| Factors { core, coefficients });
                let Projections { gate, up, down, output_bias, activation, .. } =
                    layer.projections(&matrices);
                let weights = gemv::Weights { gate, up, down };
                let y = y.as_deref_mut().expect("an output");
                gemv::Ffn { y: &mut *y, h, weights, factors, activation, scratch: few }.run()?;
                if let Some(bias) = output_bias {
                    linear::AddBias { y, bias }.run()?;
                }
            }
            Some(wide) => {
                let projections = layer.projections(&matrices);
                self.ffn_of_many(&layer.kind, (wide, routed), projections, h, y.as_deref_mut())?;
            }
        }
        let (rank, tensors) = (gating_of(&layer.kind).and_then(|gating| gating.rank), &layer.router);
        let correction = tensors.as_ref().and_then(|router| router.tensors().correction);
        match (y, correction) {
            (Some(y), Some(_)) => {
                gating::correct(y, &low_rounded.shaped(tokens, rank.unwrap_or(0)), correction)
            }
            (_, None) => Ok(()),
            (None, Some(_)) => unreachable!("parts of a sum with a correction"),
        }
    }

    /// Does the same for more than a few tokens.
    fn ffn_of_many(
        &self,
        kind: &DeviceFfn,
        (wide, routed): (&mut Wide, Option<&Routed>),
        projections: Projections<'_>,
        x: &Matrix<bf16>,
        y: Option<&mut Matrix<f32>>,
    ) -> Result<()> {
        let (tokens, cut) = (x.rows(), kind.cut());
        if let (Some((slots, workspace, variants)), Some(routed)) = (self.slots(kind, wide, tokens), routed) {
            let (slots, variants) = (&*slots, &variants);
            let (kept, all_pairs) = (None, false);
            return ForwardSlots { y, kept, workspace, slots, x, projections, routed, variants, all_pairs }
                .run();
        }
        let Wide { a, b, c, lists, parts, .. } = wide;
        let chosen = experts(&self.gpu, &self.config, kind, tokens, Passes::Inference);
        let lists = lists.as_mut().filter(|_| matches!(chosen, Experts::Lists(_)));
        let products = if lists.is_some() { [cut[0], 0] } else { cut };
        Forward {
            y: y.expect("an output"),
            c: c.blocks_mut(tokens, cut),
            products: [a, b].map(|buf| buf.blocks_mut(tokens, products)),
            parts,
            x,
            projections,
            routed,
            lists,
            all_pairs: false,
        }
        .run()
    }

    /// Returns the memory and the variants of a pass over slots of so many tokens, where it is chosen.
    fn slots<'a>(
        &self,
        kind: &DeviceFfn,
        wide: &'a mut Wide,
        tokens: usize,
    ) -> Option<(&'a mut Slots, &'a mut Matrix<bf16>, Variants)> {
        let chosen = experts(&self.gpu, &self.config, kind, tokens, Passes::Inference);
        let Experts::Slots(shape, variants) = chosen else { return None };
        // Passes of a few tokens have kernels of their own.
        let slots = wide.slots.as_mut().filter(|_| tokens > FEW)?;
        slots.resize(shape);
        Some((slots, &mut *wide.workspace, *variants))
    }

    /// Sets the routing of layer `i` and counts it, where there is a gate.
    fn route(&self, i: usize, layer: &LayerFfn, acts: &mut FfnActs, normed: Normed<'_>) -> Result<()> {
        let FfnActs { gate_logits, low, low_rounded, low_ones: ones, routed, counts, wide, .. } = acts;
        let (Some(n), Some(routed)) = (layer.kind.routed(), routed) else { return Ok(()) };
        let slots = wide.as_mut().and_then(|wide| Some(self.slots(&layer.kind, wide, normed.x.rows())?.0));
        match (&layer.kind, &layer.router) {
            (DeviceFfn::Hosted { gate, .. }, _) => {
                hosted::route(gate.as_ref(), routed, normed, &layer.gate_params)?;
                if let Some(slots) = slots {
                    Sort { slots, routed }.run()?;
                }
            }
            (DeviceFfn::Routed { form, .. }, Some(router)) => {
                let (tokens, rank) = (normed.x.rows(), form.router_rank.unwrap_or(0));
                let z = &mut gate_logits.shaped_mut(tokens, n);
                let (values, rounded) =
                    (&mut low.shaped_mut(tokens, rank), &mut low_rounded.shaped_mut(tokens, rank));
                gating::Forward {
                    routed: &mut *routed,
                    z: &mut *z,
                    low: Low { values, rounded, ones },
                    normed,
                    tensors: router.tensors(),
                    thresholds: &self.thresholds.part(i..i + 1),
                    gates: gates(&form.gates()),
                    slots,
                }
                .run()?;
                if let Some(bins) = &mut acts.bins {
                    CountLogits { bins: &mut bins.part_mut(i..i + 1), z, per_unit: PER_UNIT }.run()?;
                }
            }
            _ => return Ok(()),
        }
        let mut counts = counts.part_mut(i..i + 1);
        let counts = &mut counts.shaped_mut(2 * n + 1, 1);
        let (sums, of_tokens) = (&mut acts.gate_sums, Some(&mut *acts.active));
        Ok(router::Stats { counts, sums, of_tokens, routed }.run()?)
    }

    /// Sets `logits` to those of the rows of `states`.
    pub(super) fn head(&self, logits: &mut Matrix<f32>, states: &Matrix<bf16>) -> Result<()> {
        linear::Forward { y: &mut *logits, x: states, w: &self.head }.run()?;
        Ok(cross_entropy::Finish { logits, settings: logits_of(&self.config) }.run()?)
    }
}

impl Attend<'_> {
    /// Returns where the `tokens` rows of the pass are.
    fn place(&self, tokens: usize) -> Place<'_> {
        let (positions, rows) = match self {
            Attend::Sequences(seq) => (Positions::Sequences { len: *seq, start: 0 }, *seq),
            Attend::Ragged(_, at) | Attend::Next(_, at, _) => (Positions::At(at), tokens),
            Attend::Continue(_, start) => (Positions::Sequences { len: tokens, start: *start }, tokens),
        };
        Place { positions, rows }
    }
}

impl Layer {
    /// Returns the norms of queries and of keys, with their weights, where the family has them.
    fn head_norms(
        &self,
        block: Block,
        heads: Heads,
    ) -> impl Iterator<Item = (&Matrix<f32>, rms_norm::Heads)> {
        let weights = self.qk_norm.as_ref().map(|weights| weights.each_ref().map(|weight| &**weight));
        weights.into_iter().flat_map(move |weights| {
            weights.into_iter().zip(block.head_norms(heads, weights.map(|weight| weight.len())))
        })
    }
}
