//! Inference on the host: scoring windows of text, and decoding with a cache.

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::crew::with_crew;
use dsmoe_kernels::matmul::Packed;
use dsmoe_kernels::{Precision, attention, cross_entropy, linear};
use dsmoe_router::{Routing, RoutingStats};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array2;

use super::cache::Cache;
use super::lent::{Lent, OfUnits};
use super::pack::{Embedding, Layer, Parts, Source, fill, linears, optional, pack, vector};
use crate::accounting::Accounting;
use crate::config::{Config, LayerShape};
use crate::error::{Error, Result};
use crate::ffn::{Ffn, FfnInference, FfnScratch, Gated, Record, Route, RouterBound, kept};
use crate::kept::{KeptScratch, LinearsForward, UsedWeights};
use crate::model::arena::Model;
use crate::model::block::Block;
use crate::model::ropes::{Ropes, Turn};
use crate::model::tensors::{
    Batch, LayerRanges, Ranges, attention_dims, ffns_of, in_pool, logits_of, set_active, set_threshold,
    set_thresholds,
};
use crate::model::weights::Weights;

/// A decoder for inference: weight matrices packed in a [`Precision`], norms and routers in f32. With bf16
/// the operands of matrix products are rounded to it; sums, softmax and the residual stream are f32.
#[derive(Debug)]
pub(crate) struct CpuInference {
    pub(crate) config: Config,
    pub(crate) accounting: Accounting,
    pub(crate) precision: Precision,
    pub(crate) embedding: Embedding,
    /// All layers, or none where they are lent.
    pub(crate) layers: Vec<Layer>,
    pub(crate) lent: Option<Lent>,
    pub(crate) norm: Buf,
    pub(crate) head: Packed,
    pub(crate) ropes: Ropes,
}

/// Activations of one forward pass; reused from call to call.
///
/// ```
/// use dsmoe_core::model::{Cache, Workspace};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// // One memory for all texts that run one after the other; each text has a cache of its own.
/// let mut workspace = Workspace::default();
/// for text in [[1, 5, 9], [1, 7, 3]] {
///     let mut cache = Cache::new(&model, text.len());
///     let logits = model.decode(&text, &mut cache, None, &mut workspace)?;
///     assert_eq!(logits.len(), model.config().vocab_size);
/// }
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Workspace {
    x: Buf,
    pub(crate) h: Buf,
    q: Buf,
    k: Buf,
    v: Buf,
    a: Buf,
    y: Buf,
    lse: Buf,
    rstd: Buf,
    pub(crate) logits: Buf,
    ffn: FfnScratch,
    /// `[layers + 1, tokens, hidden]`: the states of the next pass, where they are kept.
    pub(super) states: Option<Vec<f32>>,
    #[cfg(feature = "cuda")]
    pub(crate) cuda: Option<Box<super::cuda::acts::CudaWorkspace>>,
}

impl Workspace {
    /// Returns the weights that tokens have used in a model with thresholds, and forgets them.
    pub fn take_used(&mut self) -> UsedWeights {
        std::mem::take(&mut self.ffn.kept.used)
    }

    fn prepare(&mut self, config: &Config, tokens: usize) {
        for buf in [&mut self.x, &mut self.h, &mut self.y] {
            buf.resize(tokens * config.hidden);
        }
        self.rstd.resize(tokens);
        // The largest of any layer: narrower ones then take a part of it.
        self.prepare_heads(config.num_heads, config.num_kv_heads, config.head_dim, tokens);
    }

    /// Keeps the states that the pass has come to.
    fn keep(&mut self, normed: bool) {
        if let Some(states) = &mut self.states {
            states.extend_from_slice(if normed { &self.h } else { &self.x });
        }
    }

    fn prepare_heads(&mut self, heads: usize, kv_heads: usize, head_dim: usize, tokens: usize) {
        for buf in [&mut self.q, &mut self.a] {
            buf.resize(tokens * heads * head_dim);
        }
        for buf in [&mut self.k, &mut self.v] {
            buf.resize(tokens * kv_heads * head_dim);
        }
        self.lse.resize(tokens * heads);
    }
}

impl CpuInference {
    /// Packs a model for the host.
    pub(crate) fn build(parts: Parts<'_>, precision: Precision) -> Result<CpuInference> {
        let Parts { config, accounting, ffns, ranges, source } = parts;
        let hidden = config.hidden;
        let head = pack(source, &ranges.head, hidden, precision)?;
        let embedding = match precision {
            _ if config.tie_word_embeddings => Embedding::Tied,
            Precision::F32 => {
                let mut table = Buf::zeros(ranges.embed.len());
                fill(&mut table, source, &ranges.embed, |to, from| to.copy_from_slice(from))?;
                Embedding::F32(table)
            }
            Precision::Bf16 => {
                let mut table = vec![bf16::ZERO; ranges.embed.len()];
                fill(&mut table, source, &ranges.embed, |to, from| to.convert_from_f32_slice(from))?;
                Embedding::Bf16(table)
            }
        };
        let mut layers = Vec::with_capacity(config.num_layers);
        for (i, (ranges, ffn)) in ranges.layers.iter().zip(ffns).enumerate() {
            layers.push(Layer::build(source, &config, i, (ranges, &**ffn), precision)?);
        }
        let norm = vector(source.part(&ranges.norm)?);
        let ropes = Ropes::new(&config);
        let lent = None;
        Ok(CpuInference { config, accounting, precision, embedding, layers, lent, norm, head, ropes })
    }

    /// Packs all but the layers of `model`, an outline, whose `weights` are lent.
    pub(crate) fn lend(
        model: &Model,
        weights: Box<dyn Weights>,
        precision: Precision,
    ) -> Result<CpuInference> {
        let (config, accounting, ffns) = (model.config.clone(), model.accounting(), ffns_of(&model.config));
        let (ranges, mut weights) = (model.ranges.clone(), weights);
        let source = &mut OfUnits { weights: &mut *weights, ranges: &ranges };
        let outer = Ranges { layers: Vec::new(), ..ranges.clone() };
        let parts = Parts { config, accounting, ffns: &[], ranges: &outer, source };
        let mut packed = CpuInference::build(parts, precision)?;
        packed.lent = Some(Lent::new(weights, ffns, ranges, precision));
        Ok(packed)
    }

    pub(crate) fn bytes(&self) -> usize {
        let layers = self.layers.iter().map(Layer::bytes).sum::<usize>();
        self.embedding.bytes() + layers + 4 * self.norm.len() + self.head.bytes()
    }

    /// Returns the number of experts of every layer; none without routers.
    pub(crate) fn layer_experts(&self) -> Option<Vec<usize>> {
        match &self.lent {
            Some(lent) => lent.ffns.iter().map(|ffn| ffn.num_experts()).collect(),
            None => self.layers.iter().map(|layer| layer.ffn.num_experts()).collect(),
        }
    }

    /// Returns the sizes of the experts of every layer, where they are not alike.
    pub(crate) fn layer_sizes(&self) -> Vec<Option<Vec<u64>>> {
        match &self.lent {
            Some(lent) => lent.ffns.iter().map(|ffn| ffn.expert_sizes()).collect(),
            None => self.layers.iter().map(|layer| layer.ffn.expert_sizes()).collect(),
        }
    }

    pub(crate) fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        set_threshold(&mut self.config, threshold, || {
            self.layers.iter_mut().all(|layer| layer.ffn.set_threshold(threshold))
        })
    }

    pub(crate) fn set_active(&mut self, active: f64) -> Result<()> {
        let layers = &mut self.layers;
        set_active(&mut self.config, active, |layer, logit| layers[layer].ffn.set_threshold_logit(logit))
    }

    pub(crate) fn set_router_bound(&mut self, bound: RouterBound) -> Result<()> {
        match self.layers.iter_mut().all(|layer| layer.ffn.set_router_bound(bound)) {
            true => Ok(()),
            false => {
                let problem = "this model has no gates that another router could stand in for";
                Err(Error::argument(problem, "give a DSMoE model"))
            }
        }
    }

    /// Returns the numbers of choices of every layer's FFN.
    pub(crate) fn choices(&self) -> Vec<usize> {
        self.layers.iter().map(|layer| layer.ffn.choices()).collect()
    }

    pub(crate) fn set_routes(&mut self, routes: &[Route]) -> Result<()> {
        if self.lent.is_some() {
            return Err(Error::argument("layers that are lent take no routes", "load the whole model"));
        }
        assert_eq!(routes.len(), self.layers.len(), "inference: routes and layers");
        for (i, (layer, &route)) in self.layers.iter_mut().zip(routes).enumerate() {
            layer.skips_ffn = route == Route::Skip;
            let choice = if let Route::Choice(choice) = route { Some(choice) } else { None };
            if !layer.ffn.set_choice(choice) {
                let problem = format!("{route:?}: layer {i} has {} choices", layer.ffn.choices());
                return Err(Error::argument(problem, "give a choice of the model, or skip"));
            }
        }
        Ok(())
    }

    pub(crate) fn set_thresholds(&mut self, logits: &[f32]) -> Result<()> {
        if let Some(lent) = &mut self.lent {
            assert_eq!(logits.len(), lent.ffns.len(), "inference: thresholds and layers");
            return set_thresholds(logits, |layer, logit| lent.ffns[layer].set_threshold_logit(logit));
        }
        assert_eq!(logits.len(), self.layers.len(), "inference: thresholds and layers");
        set_thresholds(logits, |layer, logit| self.layers[layer].ffn.set_threshold_logit(logit))
    }

    pub(crate) fn score(
        &self,
        losses: &mut [f32],
        batch: Batch<'_>,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Batch { inputs, targets, seq } = batch;
        self.score_pass(losses, targets, workspace, |workspace| {
            self.hidden_states(inputs, seq, None, stats, workspace);
        })
    }

    /// Sets `losses` from the normed hidden states that `pass` sets in the workspace, and returns the error of layers that are lent.
    pub(super) fn score_pass(
        &self,
        losses: &mut [f32],
        targets: &[u32],
        workspace: &mut Workspace,
        pass: impl FnOnce(&mut Workspace) + Send,
    ) -> Result<()> {
        in_pool(|| {
            pass(workspace);
            let Workspace { h, logits, .. } = workspace;
            cross_entropy::ForwardPacked {
                losses,
                hidden_states: h,
                head: &self.head,
                targets,
                logits: logits_of(&self.config),
                space: logits,
            }
            .run();
        });
        self.lent.as_ref().map_or(Ok(()), Lent::outcome)
    }

    /// Sets `workspace.h` to the normed hidden states `[ids.len(), hidden]` of sequences of `seq` tokens.
    pub(crate) fn last_hidden(&self, ids: &[u32], seq: usize, workspace: &mut Workspace) {
        in_pool(|| self.hidden_states(ids, seq, None, None, workspace));
    }

    /// Sets the workspace's logits.
    pub(crate) fn logits(
        &self,
        ids: &[u32],
        last: usize,
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) {
        let run = || {
            self.hidden_states(ids, ids.len(), Some(cache), stats, workspace);
            let Workspace { h, logits, .. } = &mut *workspace;
            self.head(logits, &h[(ids.len() - last) * self.config.hidden..], last);
        };
        // A crew serves the ops that are made for a few tokens.
        in_pool(|| if ids.len() <= attention::DECODE_QUERIES { with_crew(run) } else { run() });
    }

    /// Sets `logits` from `rows` normed hidden states.
    pub(crate) fn head(&self, logits: &mut Buf, h: &[f32], rows: usize) {
        logits.resize(rows * self.config.vocab_size);
        self.head_into(logits, h, rows);
    }

    fn head_into(&self, logits: &mut [f32], h: &[f32], rows: usize) {
        linear::ForwardPacked { y: logits, x: h, w: &self.head, bias: None, rows }.run();
        logits_of(&self.config).apply(logits);
    }

    /// Sets `logits` to those after the last tokens of `ids`, as many as it has room for.
    pub(super) fn logits_into(
        &self,
        logits: &mut [f32],
        ids: &[u32],
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) {
        let Config { hidden, vocab_size, .. } = self.config;
        in_pool(|| {
            self.hidden_states(ids, ids.len(), Some(cache), stats, workspace);
            let rows = logits.len() / vocab_size;
            if rows > 0 {
                self.head_into(logits, &workspace.h[(ids.len() - rows) * hidden..], rows);
            }
        });
    }

    /// Computes now what the first `positions` positions need, for calls that must not allocate.
    pub(crate) fn prepare(&self, positions: usize) {
        self.ropes.prepare(positions);
    }

    /// Sets `workspace.h` to the normed hidden states `[ids.len(), hidden]` of sequences of `seq` tokens. With a
    /// cache there is one sequence, continuing it.
    fn hidden_states(
        &self,
        ids: &[u32],
        seq: usize,
        mut cache: Option<&mut Cache>,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) {
        let start = cache.as_ref().map_or(0, |cache| cache.len);
        // The last target is part of the text, although it is not read.
        let positions = cache.as_ref().map_or(seq + 1, |cache| cache.positions(seq));
        self.forward(ids, stats, workspace, |i, Heads { a, lse, q, k, v }| {
            let shape = attention_dims(&self.config, i, ids.len() / seq, [seq, start + seq]);
            for (x, heads) in [(&mut *q, shape.heads), (&mut *k, shape.kv_heads)] {
                let stride = heads * shape.head_dim;
                self.ropes.forward(i, x, Turn { stride, heads, seq, start, positions });
            }
            let Some(cache) = cache.as_deref_mut() else {
                attention::Forward { out: a, lse, q, k, v, dims: shape }.run();
                return;
            };
            let (keys, values) = cache.push(i, k, v);
            if seq <= attention::DECODE_QUERIES {
                attention::Decode { out: a, q, k: keys, v: values, dims: shape }.run();
            } else {
                attention::Forward { out: a, lse, q, k: keys, v: values, dims: shape }.run();
            }
        });
        if let Some(cache) = cache {
            cache.len += seq;
        }
    }

    /// Sets `workspace.h` to the normed hidden states `[ids.len(), hidden]`, where `attend` does what a layer's
    /// tokens do with each other: it turns queries and keys by their positions and sets `a`.
    pub(crate) fn forward(
        &self,
        ids: &[u32],
        mut stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
        mut attend: impl FnMut(usize, Heads<'_>),
    ) {
        let (tokens, block) = (ids.len(), Block::of(&self.config));
        workspace.prepare(&self.config, tokens);
        if let Some(layers) = &self.config.thresholds {
            workspace.ffn.kept.used.begin(layers.len(), tokens);
        }
        self.embedding.rows(&mut workspace.x, ids, &self.head);
        scale(&mut workspace.x, self.config.architecture.embed_scale);
        workspace.keep(false);
        for i in 0..self.config.num_layers {
            let lent;
            let layer = match &self.lent {
                None => &self.layers[i],
                Some(source) => match source.layer(&self.config, i) {
                    Some(layer) => {
                        lent = layer;
                        &lent
                    }
                    // The caller asks for the error.
                    None => return,
                },
            };
            let LayerShape { num_heads, num_kv_heads, .. } = self.config.layer(i);
            workspace.prepare_heads(num_heads, num_kv_heads, self.config.head_dim, tokens);
            let Workspace { x, h, q, k, v, a, y, lse, rstd, ffn: scratch, .. } = &mut *workspace;
            let input = block.input(layer.before_attention.as_deref(), h, rstd, x);
            layer.project([&mut *q, &mut *k, &mut *v], input, tokens, &mut scratch.kept);
            layer.norm_heads(block, [&mut *q, &mut *k], lse);
            attend(i, Heads { a, lse, q, k, v });
            layer.output(y, a, tokens, &mut scratch.kept);
            block.join(x, y, layer.after_attention.as_deref(), h, rstd);
            let input = block.input(layer.before_ffn.as_deref(), h, rstd, x);
            let record = stats.as_deref_mut().map(|stats| Record { stats, layer: i });
            match layer.skips_ffn {
                false => layer.ffn.forward(FfnInference { y, x: input, record, scratch }),
                true => {
                    y.fill(0.0);
                    count_skipped(record, layer.ffn.num_experts(), tokens);
                }
            }
            block.join(x, y, layer.after_ffn.as_deref(), h, rstd);
            if i + 1 < self.config.num_layers {
                workspace.keep(false);
            }
        }
        let Workspace { x, h, rstd, .. } = &mut *workspace;
        block.norm(&self.norm, h, rstd, x);
        workspace.keep(true);
    }
}

impl Layer {
    pub(super) fn build(
        source: &mut dyn Source,
        config: &Config,
        i: usize,
        (ranges, ffn): (&LayerRanges, &dyn Ffn),
        precision: Precision,
    ) -> Result<Layer> {
        let hidden = config.hidden;
        let thresholds = config.thresholds.as_ref().map(|layers| &layers[i]);
        let [q_width, kv_width] = config.attention_widths(i);
        let qkv_bias = match &ranges.qkv_bias {
            Some(range) => {
                let (q, kv) = source.part(range)?.split_at(q_width);
                let (k, v) = kv.split_at(kv_width);
                Some([q, k, v].map(vector))
            }
            None => None,
        };
        let qk_norm = match &ranges.qk_norm {
            Some([q, k]) => Some([vector(source.part(q)?), vector(source.part(k)?)]),
            None => None,
        };
        Ok(Layer {
            before_attention: optional(source, ranges.before_attention.as_ref())?,
            qkv: linears(source, [&ranges.q, &ranges.k, &ranges.v], hidden, precision, (0, i, thresholds))?,
            o: linears(source, [&ranges.o], q_width, precision, (1, i, thresholds))?,
            qkv_bias,
            o_bias: optional(source, ranges.o_bias.as_ref())?,
            qk_norm,
            after_attention: optional(source, ranges.after_attention.as_ref())?,
            before_ffn: optional(source, ranges.before_ffn.as_ref())?,
            ffn: match thresholds {
                None => ffn.pack(source.part(&ranges.ffn)?, precision),
                Some(thresholds) => {
                    let (gated, params) = (Gated::of_layer(config, i), source.part(&ranges.ffn)?);
                    kept::pack(gated, (i, thresholds), params, precision)
                }
            },
            skips_ffn: false,
            after_ffn: optional(source, ranges.after_ffn.as_ref())?,
        })
    }

    /// Sets queries, keys and values from attention's input.
    fn project(&self, outputs: [&mut Buf; 3], x: &[f32], rows: usize, scratch: &mut KeptScratch) {
        let bias = |i: usize| self.qkv_bias.as_ref().map(|biases| &biases[i][..]);
        let (ys, biases) = (outputs.map(|y| &mut **y), [bias(0), bias(1), bias(2)]);
        let KeptScratch { ops, used, .. } = scratch;
        self.qkv.forward(LinearsForward { ys, x, biases, rows, ops, used });
    }

    /// Sets attention's output from the heads'.
    fn output(&self, y: &mut [f32], x: &[f32], rows: usize, scratch: &mut KeptScratch) {
        let KeptScratch { ops, used, .. } = scratch;
        let biases = [self.o_bias.as_deref()];
        self.o.forward(LinearsForward { ys: [y], x, biases, rows, ops, used });
    }

    /// Norms queries and keys, where the family does.
    fn norm_heads(&self, block: Block, rows: [&mut Buf; 2], scratch: &mut Buf) {
        let widths = [self.qkv.outputs(0), self.qkv.outputs(1)];
        for ((x, weight), width) in rows.into_iter().zip(self.qk_norm.iter().flatten()).zip(widths) {
            block.norm_heads(x, width, weight, scratch);
        }
    }
}

/// Counts `tokens` tokens that run no expert.
fn count_skipped(record: Option<Record<'_>>, num_experts: Option<usize>, tokens: usize) {
    if let Some((Record { stats, layer }, n)) = record.zip(num_experts) {
        let none = Array2::from_elem((tokens, n), false);
        stats.add(layer, &Routing::from_mask(none.view(), |_, _| 0.0));
    }
}

/// Multiplies `x` by the embedding's factor.
fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Queries, keys and values of one layer, and where its attention and its log-sums go.
pub(crate) struct Heads<'a> {
    pub(crate) a: &'a mut [f32],
    pub(crate) lse: &'a mut [f32],
    pub(crate) q: &'a mut [f32],
    pub(crate) k: &'a mut [f32],
    pub(crate) v: &'a mut [f32],
}
