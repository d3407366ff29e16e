//! Inference on the host: scoring windows of text, and decoding with a cache.

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::matmul::Packed;
use dsmoe_kernels::{Precision, add, attention, cross_entropy, linear, rms_norm, rope};
use dsmoe_router::RoutingStats;
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::cache::Cache;
use super::pack::{Embedding, Layer, Parts, fill, pack, vector};
use crate::accounting::Accounting;
use crate::config::{Config, LayerShape};
use crate::error::Result;
use crate::ffn::{FfnInference, FfnScratch, Record};
use crate::model::tensors::{Batch, attention_dims, in_pool, rope_table, set_threshold};

/// A LLaMA decoder for inference: weight matrices packed in a [`Precision`], norms and routers in f32. With bf16
/// the operands of matrix products are rounded to it; sums, softmax and the residual stream are f32.
#[derive(Debug)]
pub(crate) struct CpuInference {
    pub(crate) config: Config,
    pub(crate) accounting: Accounting,
    pub(crate) precision: Precision,
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Buf,
    pub(crate) head: Packed,
    pub(crate) rope: rope::Table,
}

/// Activations of one forward pass; reused from call to call.
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
    #[cfg(feature = "cuda")]
    pub(crate) cuda: Option<Box<super::cuda::acts::CudaWorkspace>>,
}

impl Workspace {
    fn prepare(&mut self, config: &Config, tokens: usize) {
        for buf in [&mut self.x, &mut self.h, &mut self.y] {
            buf.resize(tokens * config.hidden);
        }
        self.rstd.resize(tokens);
        // The largest of any layer: narrower ones then take a part of it.
        self.prepare_heads(config.num_heads, config.num_kv_heads, config.head_dim, tokens);
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
            let q_width = config.layer(i).num_heads * config.head_dim;
            layers.push(Layer {
                input_norm: vector(source.part(&ranges.input_norm)?),
                q: pack(source, &ranges.q, hidden, precision)?,
                k: pack(source, &ranges.k, hidden, precision)?,
                v: pack(source, &ranges.v, hidden, precision)?,
                o: pack(source, &ranges.o, q_width, precision)?,
                post_norm: vector(source.part(&ranges.post_norm)?),
                ffn: ffn.pack(source.part(&ranges.ffn)?, precision),
            });
        }
        let norm = vector(source.part(&ranges.norm)?);
        let rope = rope_table(&config);
        Ok(CpuInference { config, accounting, precision, embedding, layers, norm, head, rope })
    }

    pub(crate) fn bytes(&self) -> usize {
        let layers = self.layers.iter().map(Layer::bytes).sum::<usize>();
        self.embedding.bytes() + layers + 4 * self.norm.len() + self.head.bytes()
    }

    pub(crate) fn num_experts(&self) -> Option<usize> {
        self.layers.first().and_then(|layer| layer.ffn.num_experts())
    }

    pub(crate) fn set_threshold(&mut self, threshold: f32) -> Result<()> {
        set_threshold(&mut self.config, threshold, || {
            self.layers.iter_mut().all(|layer| layer.ffn.set_threshold(threshold))
        })
    }

    pub(crate) fn score(
        &self,
        losses: &mut [f32],
        batch: Batch<'_>,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) {
        let Batch { inputs, targets, seq } = batch;
        in_pool(|| {
            self.hidden_states(inputs, seq, None, stats, workspace);
            let Workspace { h, logits, .. } = workspace;
            cross_entropy::ForwardPacked {
                losses,
                hidden_states: h,
                head: &self.head,
                targets,
                logits: cross_entropy::Logits::default(),
                space: logits,
            }
            .run();
        });
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
        in_pool(|| {
            self.hidden_states(ids, ids.len(), Some(cache), stats, workspace);
            let Workspace { h, logits, .. } = &mut *workspace;
            logits.resize(last * self.config.vocab_size);
            let h = &h[(ids.len() - last) * self.config.hidden..];
            linear::ForwardPacked { y: logits, x: h, w: &self.head, bias: None, rows: last }.run();
        });
    }

    /// Computes now what the first `positions` positions need, for calls that must not allocate.
    pub(crate) fn prepare(&self, positions: usize) {
        self.rope.prepare(positions);
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
        let at = |heads| rope::Args { table: &self.rope, seq, start, heads, head_dim: self.config.head_dim };
        self.forward(ids, stats, workspace, |i, Heads { a, lse, q, k, v }| {
            let shape = attention_dims(&self.config, i, ids.len() / seq, [seq, start + seq]);
            for (x, args) in [(&mut *q, at(shape.heads)), (&mut *k, at(shape.kv_heads))] {
                rope::Forward { x, stride: args.width(), args }.run();
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
        let (tokens, eps) = (ids.len(), self.config.rms_norm_eps as f32);
        workspace.prepare(&self.config, tokens);
        self.embedding.rows(&mut workspace.x, ids, &self.head);
        for (i, layer) in self.layers.iter().enumerate() {
            let LayerShape { num_heads, num_kv_heads, .. } = self.config.layer(i);
            workspace.prepare_heads(num_heads, num_kv_heads, self.config.head_dim, tokens);
            let Workspace { x, h, q, k, v, a, y, lse, rstd, ffn: scratch, .. } = &mut *workspace;
            rms_norm::Forward { y: h, rstd, x, weight: &layer.input_norm, offset: 0.0, eps }.run();
            linear::ForwardPacked { y: q, x: h, w: &layer.q, bias: None, rows: tokens }.run();
            linear::ForwardPacked { y: k, x: h, w: &layer.k, bias: None, rows: tokens }.run();
            linear::ForwardPacked { y: v, x: h, w: &layer.v, bias: None, rows: tokens }.run();
            attend(i, Heads { a, lse, q, k, v });
            linear::ForwardPacked { y, x: a, w: &layer.o, bias: None, rows: tokens }.run();
            add::Add { y: x, x: y, scale: 1.0 }.run();
            rms_norm::Forward { y: h, rstd, x, weight: &layer.post_norm, offset: 0.0, eps }.run();
            let record = stats.as_deref_mut().map(|stats| Record { stats, layer: i });
            layer.ffn.forward(FfnInference { y, x: h, record, scratch });
            add::Add { y: x, x: y, scale: 1.0 }.run();
        }
        let Workspace { x, h, rstd, .. } = workspace;
        rms_norm::Forward { y: h, rstd, x, weight: &self.norm, offset: 0.0, eps }.run();
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
