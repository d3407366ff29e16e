//! Inference on a GPU: matrices in bf16, norms and routers in f32.

use std::ops::Range;

use dsmoe_kernels::Precision;
use dsmoe_kernels::cuda::ops::attention::At;
use dsmoe_kernels::cuda::ops::few::FEW;
use dsmoe_kernels::cuda::ops::{
    attention, cross_entropy, elementwise, embedding, experts, few, ffn, rms_norm, rope, router,
};
use dsmoe_kernels::cuda::{Gpu, GpuBuf, Recorded, View, ViewMut};
use dsmoe_router::RoutingStats;
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::ffn::by_lists;
use super::{MemoryUse, Products, attention_dims, check_memory, device_ffns, gates, hosted, rope_rows};
use crate::accounting::Accounting;
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ffn::DeviceFfn;
use crate::model::inference::pack::{Parts, Source};
use crate::model::inference::segments::Place;
use crate::model::inference::{Cache, Likelihood, Workspace};
use crate::model::tensors::set_threshold;
use crate::params::padded;

/// Rows of logits at a time.
const LOGIT_ROWS: usize = 1024;

/// A model's weights on a device.
#[derive(Debug)]
pub(in super::super) struct CudaInference {
    pub(in super::super) config: Config,
    pub(in super::super) accounting: Accounting,
    gpu: Gpu,
    /// `[vocab, hidden]`; none where it is the head.
    embedding: Option<GpuBuf<bf16>>,
    layers: Vec<Layer>,
    norm: GpuBuf<f32>,
    head: GpuBuf<bf16>,
    /// Angles of all positions.
    rope: GpuBuf<f32>,
}

#[derive(Debug)]
struct Layer {
    input_norm: GpuBuf<f32>,
    qkv: GpuBuf<bf16>,
    o: GpuBuf<bf16>,
    post_norm: GpuBuf<f32>,
    kind: DeviceFfn,
    gate: GpuBuf<bf16>,
    up: GpuBuf<bf16>,
    /// Transposed.
    down: GpuBuf<bf16>,
    router: Option<GpuBuf<f32>>,
    bias: Option<GpuBuf<f32>>,
    /// Parameters of a gate that the host computes.
    gate_params: Vec<f32>,
}

/// Activations of a pass over up to `room` tokens.
#[derive(Debug)]
struct Acts {
    room: usize,
    ids: GpuBuf<u32>,
    x: GpuBuf<f32>,
    x_mid: GpuBuf<f32>,
    rstd: GpuBuf<f32>,
    h: GpuBuf<bf16>,
    qkv: GpuBuf<bf16>,
    a: GpuBuf<bf16>,
    lse: GpuBuf<f32>,
    y: GpuBuf<f32>,
    logits: GpuBuf<f32>,
    gate_logits: GpuBuf<f32>,
    routed: Option<router::Routed>,
    /// Of passes of more than a few tokens.
    wide: Option<Wide>,
    /// Of passes of a few.
    few: GpuBuf<f32>,
    /// Per layer the load `[n]` and the histogram `[n + 1]`.
    counts: GpuBuf<u64>,
    gate_sums: GpuBuf<f64>,
    /// Active experts of every token, summed over layers.
    active: GpuBuf<u32>,
}

/// What the FFNs of a pass of many tokens work in.
#[derive(Debug)]
struct Wide {
    /// Gate and up projections, of FFNs that run all pairs.
    a: GpuBuf<bf16>,
    b: GpuBuf<bf16>,
    c: GpuBuf<bf16>,
    /// The active pairs and what they add to the sums of tokens, of FFNs that run those alone.
    lists: Option<router::Lists>,
    parts: GpuBuf<bf16>,
}

/// Activations, made for the largest pass so far.
#[derive(Debug, Default)]
pub(in super::super) struct CudaWorkspace {
    acts: Option<Acts>,
}

/// Keys and values of a decoding sequence, and a step of it.
#[derive(Debug)]
pub(in super::super) struct CudaCache {
    room: usize,
    /// The routers' threshold that the step was recorded with.
    threshold: Option<f32>,
    step: Recorded<Step>,
}

/// What a step of one token works in.
#[derive(Debug)]
struct Step {
    /// Per layer keys and values, `[room, kv_heads * head_dim]` each.
    layers: Vec<(GpuBuf<bf16>, GpuBuf<bf16>)>,
    /// Positions held: `[1]`.
    length: GpuBuf<u32>,
    partials: GpuBuf<f32>,
    acts: Acts,
}

/// What tokens do with each other in a pass.
enum Attend<'a> {
    /// Sequences of so many tokens, each from its start.
    Sequences(usize),
    /// Segments, with the positions of their tokens.
    Ragged(&'a attention::Segments, View<'a, u32>),
    /// The next tokens of a sequence, at positions from there.
    Continue(&'a mut [(GpuBuf<bf16>, GpuBuf<bf16>)], usize),
    /// The next token of a sequence, at the position on the device; with scratch.
    Next(&'a mut [(GpuBuf<bf16>, GpuBuf<bf16>)], View<'a, u32>, &'a mut GpuBuf<f32>),
}

impl CudaInference {
    /// Moves a model to device `ordinal`.
    pub(in super::super) fn build(
        parts: Parts<'_>,
        precision: Precision,
        ordinal: usize,
    ) -> Result<CudaInference> {
        if precision != Precision::Bf16 {
            return Err(Error::argument("a GPU computes in bf16", "set {dtype} to bf16"));
        }
        let Parts { config, accounting, ffns, ranges, source } = parts;
        let kinds = device_ffns(ffns)?;
        let gpu = Gpu::open(ordinal)?;
        let plan = [MemoryUse { what: "weights", bytes: 2 * accounting.total as usize }];
        check_memory(&gpu, &plan, "use a smaller model".into())?;
        let head = matrix(&gpu, source, &ranges.head)?;
        let embedding = match config.tie_word_embeddings {
            true => None,
            false => Some(matrix(&gpu, source, &ranges.embed)?),
        };
        let mut layers = Vec::with_capacity(config.num_layers);
        for (ranges, kind) in ranges.layers.iter().zip(kinds) {
            let (hidden, width) = (kind.hidden(), kind.intermediate());
            let input_norm = gpu.upload(source.part(&ranges.input_norm)?)?;
            let post_norm = gpu.upload(source.part(&ranges.post_norm)?)?;
            let (qkv, o) = (matrix(&gpu, source, &ranges.qkv())?, matrix(&gpu, source, &ranges.o)?);
            let block = source.part(&ranges.ffn)?;
            let len = hidden * width;
            let projection = |which: usize| rounded(&gpu, &block[which * padded(len)..][..len]);
            let (gate, up, down) = (projection(0)?, projection(1)?, projection(2)?);
            let mut gate_params = Vec::new();
            let (router, bias) = match &kind {
                DeviceFfn::Dense { .. } => (None, None),
                DeviceFfn::Hosted { .. } => {
                    gate_params.extend_from_slice(&block[kind.gate_params(block.len())]);
                    (None, None)
                }
                DeviceFfn::Gated { router, router_bias, .. } => {
                    let [weight, bias] = super::ffn::router_ranges(hidden, width, router.num_experts);
                    let bias = router_bias.then(|| gpu.upload(&block[bias])).transpose()?;
                    (Some(gpu.upload(&block[weight])?), bias)
                }
            };
            layers.push(Layer {
                input_norm,
                qkv,
                o,
                post_norm,
                kind,
                gate,
                up,
                down,
                router,
                bias,
                gate_params,
            });
        }
        let norm = gpu.upload(source.part(&ranges.norm)?)?;
        let rope = gpu.upload(&rope_rows(&config, config.max_position))?;
        Ok(CudaInference { config, accounting, gpu, embedding, layers, norm, head, rope })
    }

    pub(in super::super) fn device(&self) -> Device {
        Device::Cuda(self.gpu.ordinal())
    }

    pub(in super::super) fn num_experts(&self) -> Option<usize> {
        self.layers.first().and_then(|layer| layer.kind.num_experts())
    }

    fn threshold(&self) -> Option<f32> {
        match &self.layers.first()?.kind {
            DeviceFfn::Gated { router, .. } => Some(router.threshold),
            DeviceFfn::Dense { .. } | DeviceFfn::Hosted { .. } => None,
        }
    }

    /// Whether the host computes gates between the ops of a pass.
    fn is_hosted(&self) -> bool {
        self.layers.iter().any(|layer| layer.kind.is_hosted())
    }

    pub(in super::super) fn bytes(&self) -> usize {
        let layer = |layer: &Layer| {
            let halves: usize =
                [&layer.qkv, &layer.o, &layer.gate, &layer.up, &layer.down].map(GpuBuf::len).iter().sum();
            let router: usize = [&layer.router, &layer.bias].into_iter().flatten().map(GpuBuf::len).sum();
            let gate = router + layer.gate_params.len();
            2 * halves + 4 * (layer.input_norm.len() + layer.post_norm.len() + gate)
        };
        let tables = self.head.len() + self.embedding.as_ref().map_or(0, GpuBuf::len);
        self.layers.iter().map(layer).sum::<usize>() + 2 * tables + 4 * self.norm.len()
    }

    pub(in super::super) fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        let layers = &mut self.layers;
        set_threshold(&mut self.config, threshold, || {
            layers.iter_mut().all(|layer| layer.kind.set_threshold(threshold))
        })
    }

    pub(in super::super) fn score(
        &self,
        losses: &mut [f32],
        inputs: &[u32],
        targets: &[u32],
        seq: usize,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (gpu, tokens) = (&self.gpu, inputs.len());
        let acts = self.acts(workspace, tokens)?;
        acts.start(inputs)?;
        self.forward(acts, tokens, Attend::Sequences(seq))?;
        let targets = gpu.upload(targets)?;
        let mut found = gpu.zeros::<f32>(tokens)?;
        for first in (0..tokens).step_by(LOGIT_ROWS) {
            let rows = first..(first + LOGIT_ROWS).min(tokens);
            self.head(acts, rows.clone())?;
            let logits = acts.logits.slice(0..rows.len() * self.config.vocab_size);
            let found = found.slice_mut(rows.clone());
            cross_entropy::forward(gpu, found, logits, targets.slice(rows), self.config.vocab_size)?;
        }
        found.download_to(losses)?;
        self.report(acts, stats)
    }

    /// Sets the workspace's logits.
    pub(in super::super) fn logits(
        &self,
        ids: &[u32],
        last: usize,
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (start, vocab) = (cache.len, self.config.vocab_size);
        let held = self.cache(cache, start + ids.len())?;
        if let [id] = ids {
            self.step(*id, held, start)?;
            workspace.logits.resize(vocab);
            held.step.work.acts.logits.slice(0..vocab).download_to(&mut workspace.logits)?;
            self.report(&held.step.work.acts, stats)?;
        } else {
            let acts = self.acts(workspace, ids.len())?;
            acts.start(ids)?;
            let layers = &mut held.step.work.layers;
            self.forward(acts, ids.len(), Attend::Continue(layers, start))?;
            let mut logits = vec![0.0; last * vocab];
            for (part, first) in
                logits.chunks_mut(LOGIT_ROWS * vocab).zip((ids.len() - last..).step_by(LOGIT_ROWS))
            {
                self.head(acts, first..first + part.len() / vocab)?;
                acts.logits.slice(0..part.len()).download_to(part)?;
            }
            self.report(acts, stats)?;
            workspace.logits.resize(logits.len());
            workspace.logits.copy_from_slice(&logits);
        }
        cache.len += ids.len();
        Ok(())
    }

    /// Sets the workspace's logits to those after each of `ids`, at the next position of its cache.
    pub(in super::super) fn decode_each(
        &self,
        ids: &[u32],
        caches: &mut [&mut Cache],
        mut stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let vocab = self.config.vocab_size;
        // All are queued before the first is waited for.
        for (&id, cache) in ids.iter().zip(&mut *caches) {
            let start = cache.len;
            let held = self.cache(cache, start + 1)?;
            self.step(id, held, start)?;
        }
        workspace.logits.resize(ids.len() * vocab);
        for (logits, cache) in workspace.logits.chunks_exact_mut(vocab).zip(caches) {
            let start = cache.len;
            let acts = &self.cache(cache, start + 1)?.step.work.acts;
            acts.logits.slice(0..vocab).download_to(logits)?;
            self.report(acts, stats.as_deref_mut())?;
        }
        Ok(())
    }

    pub(in super::super) fn likelihoods(
        &self,
        ids: &[u32],
        places: &[Place],
        targets: &[(usize, u32)],
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<Vec<Likelihood>> {
        let (gpu, vocab, hidden) = (&self.gpu, self.config.vocab_size, self.config.hidden);
        let table: Vec<[usize; 4]> =
            places.iter().map(|place| [place.first, place.tokens, place.before.0, place.before.1]).collect();
        let segments = attention::Segments::new(gpu, &table)?;
        let positions: Vec<u32> = places
            .iter()
            .flat_map(|place| (place.before.1..place.before.1 + place.tokens).map(|p| p as u32))
            .collect();
        let positions = gpu.upload(&positions)?;
        let acts = self.acts(workspace, ids.len())?;
        acts.start(ids)?;
        self.forward(acts, ids.len(), Attend::Ragged(&segments, positions.view()))?;

        // Targets of one place share its row of logits.
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|&i| targets[i].0);
        let groups: Vec<&[usize]> = order.chunk_by(|&i, &j| targets[i].0 == targets[j].0).collect();
        let mut found = vec![Likelihood::default(); targets.len()];
        let mut states = gpu.zeros::<bf16>(LOGIT_ROWS.min(groups.len()) * hidden)?;
        for groups in groups.chunks(LOGIT_ROWS) {
            let picked: Vec<u32> = groups.iter().map(|group| targets[group[0]].0 as u32).collect();
            let picked = gpu.upload(&picked)?;
            let mut states = states.slice_mut(0..groups.len() * hidden);
            elementwise::rows(gpu, states.reborrow(), acts.h.view(), picked.view(), hidden)?;
            self.head_of(acts.logits.slice_mut(0..groups.len() * vocab), states.as_view(), groups.len())?;
            let here: Vec<usize> = groups.iter().copied().flatten().copied().collect();
            let rows: Vec<u32> = groups
                .iter()
                .enumerate()
                .flat_map(|(row, group)| group.iter().map(move |_| row as u32))
                .collect();
            let tokens: Vec<u32> = here.iter().map(|&i| targets[i].1).collect();
            let (rows, tokens) = (gpu.upload(&rows)?, gpu.upload(&tokens)?);
            let (mut logs, mut greedy) = (gpu.zeros::<f32>(here.len())?, gpu.zeros::<u32>(here.len())?);
            let logits = acts.logits.slice(0..groups.len() * vocab);
            cross_entropy::likelihoods(
                gpu,
                logs.view_mut(),
                greedy.view_mut(),
                logits,
                rows.view(),
                tokens.view(),
                vocab,
            )?;
            let results = logs.download()?.into_iter().zip(greedy.download()?);
            for (&i, (log_probability, greedy)) in here.iter().zip(results) {
                found[i] = Likelihood { log_probability, greedy: greedy != 0 };
            }
        }
        self.report(acts, stats)?;
        Ok(found)
    }

    /// Feeds `id` at position `start` of `held`; the step's activations then have the logits.
    fn step(&self, id: u32, held: &mut CudaCache, start: usize) -> Result<()> {
        held.step.work.acts.ids.slice_mut(0..1).upload_from(&[id])?;
        held.step.work.length.upload_from(&[start as u32])?;
        if held.threshold != self.threshold() {
            held.step.forget();
            held.threshold = self.threshold();
        }
        let pass = |step: &mut Step| {
            let Step { layers, length, partials, acts } = step;
            acts.clear_counts()?;
            self.forward(acts, 1, Attend::Next(layers, length.view(), partials))?;
            self.head(acts, 0..1)
        };
        // Ops between which the host computes are no graph.
        if self.is_hosted() { pass(&mut held.step.work) } else { held.step.run(&self.gpu, pass) }
    }

    /// Queues a pass over `tokens` tokens whose ids are on the device.
    fn forward(&self, acts: &mut Acts, tokens: usize, mut attend: Attend<'_>) -> Result<()> {
        let (gpu, config) = (&self.gpu, &self.config);
        let (hidden, eps, positions) = (config.hidden, config.rms_norm_eps as f32, config.max_position);
        let table = self.embedding.as_ref().unwrap_or(&self.head);
        let values = 0..tokens * hidden;
        let Acts { ids, x, rstd, h, .. } = &mut *acts;
        embedding::forward_bf16(
            gpu,
            x.slice_mut(values.clone()),
            table.view(),
            ids.slice(0..tokens),
            hidden,
        )?;
        let first = self.layers.first().map_or(&self.norm, |layer| &layer.input_norm);
        let (x_read, norm) = (x.slice(values.clone()), first.view());
        rms_norm::forward(
            gpu,
            h.slice_mut(values.clone()),
            rstd.slice_mut(0..tokens),
            x_read,
            norm,
            eps,
            hidden,
        )?;
        let products = Products { gpu, tokens };
        for (i, layer) in self.layers.iter().enumerate() {
            let shape = attention_dims(config, i, 1, tokens, tokens);
            let (width, joined) = (shape.heads * shape.head_dim, shape.joined_width());
            let angles = self.rope.view();
            let turn = rope::Dims {
                tokens,
                seq: tokens,
                start: 0,
                heads: shape.heads + shape.kv_heads,
                head_dim: shape.head_dim,
                width: joined,
            };
            let mut qkv = acts.qkv.slice_mut(0..tokens * joined);
            products.forward(
                qkv.reborrow(),
                acts.h.slice(values.clone()),
                layer.qkv.view(),
                hidden,
                joined,
            )?;
            let mut a = acts.a.slice_mut(0..tokens * width);
            match &mut attend {
                Attend::Sequences(seq) => {
                    let shape = attention_dims(config, i, tokens / *seq, *seq, *seq);
                    rope::forward(gpu, qkv.reborrow(), angles, rope::Dims { seq: *seq, ..turn })?;
                    let lse = acts.lse.slice_mut(0..tokens * shape.heads);
                    attention::forward(gpu, a.reborrow(), lse, qkv.as_view(), shape)?;
                }
                Attend::Ragged(segments, at) => {
                    rope::forward_at(gpu, qkv.reborrow(), angles, *at, turn)?;
                    attention::ragged(gpu, a.reborrow(), qkv.as_view(), segments, shape)?;
                }
                Attend::Continue(layers, start) => {
                    let (keys, values) = &mut layers[i];
                    debug_assert!(*start + tokens <= positions);
                    rope::forward(gpu, qkv.reborrow(), angles, rope::Dims { start: *start, ..turn })?;
                    let at = At::Position(*start);
                    attention::append(gpu, keys.view_mut(), values.view_mut(), qkv.as_view(), at, shape)?;
                    let shape = attention_dims(config, i, 1, tokens, *start + tokens);
                    attention::prefill(gpu, a.reborrow(), qkv.as_view(), keys.view(), values.view(), shape)?;
                }
                Attend::Next(layers, length, partials) => {
                    let (keys, values) = &mut layers[i];
                    rope::forward_at(gpu, qkv.reborrow(), angles, *length, turn)?;
                    let at = At::Length(*length);
                    attention::append(gpu, keys.view_mut(), values.view_mut(), qkv.as_view(), at, shape)?;
                    attention::decode(
                        gpu,
                        a.reborrow(),
                        qkv.as_view(),
                        keys.view(),
                        values.view(),
                        *length,
                        shape,
                        partials.view_mut(),
                    )?;
                }
            }
            products.forward_f32(
                acts.y.slice_mut(values.clone()),
                acts.a.slice(0..tokens * width),
                layer.o.view(),
                width,
                hidden,
            )?;
            rms_norm::forward_sum(
                gpu,
                acts.h.slice_mut(values.clone()),
                acts.rstd.slice_mut(0..tokens),
                acts.x_mid.slice_mut(values.clone()),
                acts.x.slice(values.clone()),
                acts.y.slice(values.clone()),
                layer.post_norm.view(),
                eps,
                hidden,
            )?;
            self.ffn(i, layer, acts, tokens)?;
            let norm = self.layers.get(i + 1).map_or(&self.norm, |next| &next.input_norm);
            rms_norm::forward_sum(
                gpu,
                acts.h.slice_mut(values.clone()),
                acts.rstd.slice_mut(0..tokens),
                acts.x.slice_mut(values.clone()),
                acts.x_mid.slice(values.clone()),
                acts.y.slice(values.clone()),
                norm.view(),
                eps,
                hidden,
            )?;
        }
        Ok(())
    }

    /// Sets the activations' `y`.
    fn ffn(&self, i: usize, layer: &Layer, acts: &mut Acts, tokens: usize) -> Result<()> {
        let (gpu, hidden, width) = (&self.gpu, layer.kind.hidden(), layer.kind.intermediate());
        let values = 0..tokens * hidden;
        self.route(i, layer, acts, tokens)?;
        let num_experts = layer.kind.num_experts().unwrap_or(1);
        let Acts { h, y, routed, wide, few: scratch, .. } = acts;
        let coefficients = routed.as_ref().map(router::Routed::coefficients);
        let (h, y) = (h.slice(values.clone()), y.slice_mut(values));
        let Some(Wide { a, b, c, lists, parts }) = wide.as_mut().filter(|_| tokens > FEW) else {
            let weights =
                few::Weights { gate: layer.gate.view(), up: layer.up.view(), down: layer.down.view() };
            let dims = few::Dims { tokens, hidden, intermediate: width, num_experts };
            return Ok(few::ffn(gpu, y, h, weights, coefficients, dims, scratch.view_mut())?);
        };
        let inner = 0..tokens * width;
        if let (Some(lists), Some(routed), Some(dims)) =
            (lists, routed.as_ref(), by_lists(gpu, &layer.kind, tokens))
        {
            router::lists(gpu, lists, routed)?;
            let (gate, up, k) = (layer.gate.view(), layer.up.view(), routed.coefficients());
            experts::up(gpu, c.slice_mut(inner.clone()), None, h, gate, up, k, lists, dims)?;
            let down = layer.down.view();
            return Ok(experts::down(gpu, y, parts.view_mut(), c.slice(inner), down, lists, dims)?);
        }
        let products = Products { gpu, tokens };
        products.forward(a.slice_mut(inner.clone()), h, layer.gate.view(), hidden, width)?;
        products.forward(b.slice_mut(inner.clone()), h, layer.up.view(), hidden, width)?;
        let dims = ffn::Dims { tokens, intermediate: width, num_experts };
        let (a, b) = (a.slice(inner.clone()), b.slice(inner.clone()));
        ffn::activate(gpu, c.slice_mut(inner.clone()), a, b, coefficients, dims)?;
        products.times(y, c.slice(inner), layer.down.view(), width, hidden, false)
    }

    /// Sets the activations' routing and counts it, where there is a gate.
    fn route(&self, i: usize, layer: &Layer, acts: &mut Acts, tokens: usize) -> Result<()> {
        let (gpu, hidden) = (&self.gpu, layer.kind.hidden());
        let Acts { x_mid, rstd, gate_logits, routed, counts, gate_sums, active, .. } = acts;
        let (Some(n), Some(routed)) = (layer.kind.num_experts(), routed) else { return Ok(()) };
        let (x, rstd) = (x_mid.slice(0..tokens * hidden), rstd.slice(0..tokens));
        let normed = router::Normed { x, rstd, weight: layer.post_norm.view() };
        match (&layer.kind, &layer.router) {
            (DeviceFfn::Hosted { gate, .. }, _) => {
                hosted::route(gate.as_ref(), routed, normed, &layer.gate_params)?;
            }
            (DeviceFfn::Gated { router: config, .. }, Some(weight)) => {
                let mut logits = gate_logits.slice_mut(0..tokens * n);
                let bias = layer.bias.as_ref().map(GpuBuf::view);
                router::logits(gpu, logits.reborrow(), normed, weight.view(), bias, hidden)?;
                router::route(gpu, routed, logits.as_view(), &gates(config))?;
            }
            _ => return Ok(()),
        }
        let counts = counts.slice_mut(i * (2 * n + 1)..(i + 1) * (2 * n + 1));
        Ok(router::stats(gpu, counts, gate_sums.view_mut(), Some(active.view_mut()), routed)?)
    }

    /// Sets the first logits to those of these rows.
    fn head(&self, acts: &mut Acts, rows: Range<usize>) -> Result<()> {
        let hidden = self.config.hidden;
        let states = acts.h.slice(rows.start * hidden..rows.end * hidden);
        let logits = acts.logits.slice_mut(0..rows.len() * self.config.vocab_size);
        self.head_of(logits, states, rows.len())
    }

    fn head_of(&self, logits: ViewMut<'_, f32>, states: View<'_, bf16>, rows: usize) -> Result<()> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab_size);
        Products { gpu: &self.gpu, tokens: rows }.forward_f32(logits, states, self.head.view(), hidden, vocab)
    }

    /// The activations of `workspace`, with room for `tokens`.
    fn acts<'w>(&self, workspace: &'w mut Workspace, tokens: usize) -> Result<&'w mut Acts> {
        let CudaWorkspace { acts } = &mut **workspace.cuda.get_or_insert_default();
        let fits = acts.as_ref().is_some_and(|acts| acts.room >= tokens && acts.fits(self));
        if !fits {
            // What there was is given back first.
            *acts = None;
        }
        match acts {
            Some(acts) => Ok(acts),
            empty => Ok(empty.insert(Acts::new(self, tokens)?)),
        }
    }

    /// The cache of a sequence that goes on to `positions`.
    fn cache<'c>(&self, cache: &'c mut Cache, positions: usize) -> Result<&'c mut CudaCache> {
        let most = self.config.max_position;
        let (room, held) = (cache.room, &mut cache.cuda);
        match held {
            Some(held) if positions > held.room => held.grow(self, positions.max(2 * held.room).min(most))?,
            _ => {}
        }
        match held {
            Some(held) => Ok(held),
            empty => Ok(empty.insert(Box::new(CudaCache::new(self, positions.max(room).min(most))?))),
        }
    }

    /// Adds the routing of a pass to `stats`.
    fn report(&self, acts: &Acts, stats: Option<&mut RoutingStats>) -> Result<()> {
        let (Some(n), Some(stats)) = (self.num_experts(), stats) else { return Ok(()) };
        for (layer, counts) in acts.counts.download()?.chunks_exact(2 * n + 1).enumerate() {
            stats.add_counts(layer, &counts[..n], &counts[n..]);
        }
        if let (true, Some(routed)) = (stats.is_traced(), &acts.routed) {
            stats.add_active_of_tokens(&acts.active.slice(0..routed.tokens()).download()?);
        }
        Ok(())
    }
}

impl Acts {
    fn new(model: &CudaInference, room: usize) -> Result<Acts> {
        let (gpu, config) = (&model.gpu, &model.config);
        let width = config.num_heads * config.head_dim;
        let joined = width + 2 * config.num_kv_heads * config.head_dim;
        let n = model.num_experts();
        let widest = model.layers.iter().map(|layer| layer.kind.intermediate()).max().unwrap_or(0);
        let of_few = model.layers.iter().map(|layer| {
            let num_experts = layer.kind.num_experts().unwrap_or(1);
            let (hidden, intermediate) = (config.hidden, layer.kind.intermediate());
            few::Dims { tokens: room.min(FEW), hidden, intermediate, num_experts }.scratch()
        });
        let [all_pairs, parts] = wide_lens(model, room);
        let wide = || -> Result<Wide> {
            Ok(Wide {
                a: gpu.zeros(all_pairs)?,
                b: gpu.zeros(all_pairs)?,
                c: gpu.zeros(room * widest)?,
                lists: n.filter(|_| parts > 0).map(|n| router::Lists::with_room(gpu, room, n)).transpose()?,
                parts: gpu.zeros(parts)?,
            })
        };
        Ok(Acts {
            room,
            ids: gpu.zeros(room)?,
            x: gpu.zeros(room * config.hidden)?,
            x_mid: gpu.zeros(room * config.hidden)?,
            rstd: gpu.zeros(room)?,
            h: gpu.zeros(room * config.hidden)?,
            qkv: gpu.zeros(room * joined)?,
            a: gpu.zeros(room * width)?,
            lse: gpu.zeros(room * config.num_heads)?,
            y: gpu.zeros(room * config.hidden)?,
            logits: gpu.zeros(room.min(LOGIT_ROWS) * config.vocab_size)?,
            gate_logits: gpu.zeros(room * n.unwrap_or(0))?,
            routed: n.map(|n| router::Routed::with_room(gpu, room, n)).transpose()?,
            wide: if room > FEW { Some(wide()?) } else { None },
            few: gpu.zeros(of_few.max().unwrap_or(0))?,
            counts: gpu.zeros(n.map_or(0, |n| (2 * n + 1) * config.num_layers))?,
            gate_sums: gpu.zeros(2)?,
            active: gpu.zeros(if n.is_some() { room } else { 0 })?,
        })
    }

    /// Whether they are of a model like this one.
    fn fits(&self, model: &CudaInference) -> bool {
        let config = &model.config;
        let n = model.num_experts().unwrap_or(0);
        self.x.len() == self.room * config.hidden
            && self.logits.len() == self.room.min(LOGIT_ROWS) * config.vocab_size
            && self.gate_logits.len() == self.room * n
            && self.counts.len() == if n == 0 { 0 } else { (2 * n + 1) * config.num_layers }
            && self.a.len() == self.room * config.num_heads * config.head_dim
            && self.qkv.len() == self.a.len() + 2 * self.room * config.num_kv_heads * config.head_dim
            && self.wide.as_ref().is_none_or(|wide| {
                let widest = model.layers.iter().map(|l| l.kind.intermediate()).max().unwrap_or(0);
                wide.c.len() == self.room * widest
                    && [wide.a.len(), wide.parts.len()] == wide_lens(model, self.room)
            })
    }

    /// Begins a pass over `ids`.
    fn start(&mut self, ids: &[u32]) -> Result<()> {
        self.ids.slice_mut(0..ids.len()).upload_from(ids)?;
        self.clear_counts()
    }

    fn clear_counts(&mut self) -> Result<()> {
        self.active.fill_zero()?;
        Ok(self.counts.fill_zero()?)
    }
}

impl CudaCache {
    fn new(model: &CudaInference, room: usize) -> Result<CudaCache> {
        let (gpu, config) = (&model.gpu, &model.config);
        let layers = config.layers().map(|shape| {
            let len = room * shape.num_kv_heads * config.head_dim;
            Ok((gpu.zeros(len)?, gpu.zeros(len)?))
        });
        let step = Step {
            layers: layers.collect::<Result<_>>()?,
            length: gpu.zeros(1)?,
            partials: gpu.zeros(scratch(config, room))?,
            acts: Acts::new(model, 1)?,
        };
        Ok(CudaCache { room, threshold: model.threshold(), step: Recorded::new(step) })
    }

    /// Room for `room` positions, keeping those held.
    fn grow(&mut self, model: &CudaInference, room: usize) -> Result<()> {
        // What was recorded names the old buffers.
        self.step.forget();
        let Step { layers, partials, .. } = &mut self.step.work;
        for ((keys, values), shape) in layers.iter_mut().zip(model.config.layers()) {
            let len = room * shape.num_kv_heads * model.config.head_dim;
            for buf in [keys, values] {
                let mut larger = model.gpu.zeros(len)?;
                larger.slice_mut(0..buf.len()).copy_from(buf.view())?;
                *buf = larger;
            }
        }
        *partials = model.gpu.zeros(scratch(&model.config, room))?;
        self.room = room;
        Ok(())
    }
}

/// Values of the projections of FFNs that run all pairs, and of what experts add to the sums of tokens in others.
fn wide_lens(model: &CudaInference, room: usize) -> [usize; 2] {
    let lists = |layer: &Layer| by_lists(&model.gpu, &layer.kind, room);
    let all_pairs = model.layers.iter().filter(|layer| lists(layer).is_none());
    let parts = model.layers.iter().filter_map(lists).map(|dims| dims.scratch());
    [room * all_pairs.map(|layer| layer.kind.intermediate()).max().unwrap_or(0), parts.max().unwrap_or(0)]
}

/// Values that attention over caches of `room` positions works in, in any layer.
fn scratch(config: &Config, room: usize) -> usize {
    let layer = |i| attention::decode_scratch(attention_dims(config, i, 1, 1, 1), room);
    (0..config.num_layers).map(layer).max().unwrap_or(0)
}

/// A matrix, rounded on the way.
fn matrix(gpu: &Gpu, source: &mut dyn Source, range: &Range<usize>) -> Result<GpuBuf<bf16>> {
    let mut buf = gpu.zeros(range.len())?;
    let mut first = 0;
    let mut failed = Ok(());
    let mut piece = Vec::new();
    source.rows(range, &mut |values| {
        piece.resize(values.len(), bf16::ZERO);
        piece.convert_from_f32_slice(values);
        if failed.is_ok() {
            failed = buf.slice_mut(first..first + values.len()).upload_from(&piece);
        }
        first += values.len();
    })?;
    failed?;
    Ok(buf)
}

/// Values rounded.
fn rounded(gpu: &Gpu, values: &[f32]) -> Result<GpuBuf<bf16>> {
    let mut halves = vec![bf16::ZERO; values.len()];
    halves.convert_from_f32_slice(values);
    Ok(gpu.upload(&halves)?)
}
