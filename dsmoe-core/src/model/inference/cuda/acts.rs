//! Activations of inference on a device.

use dsmoe_kernels::cuda::ops::choice::{ExpertKernels, Passes};
use dsmoe_kernels::cuda::ops::gemv::FEW;
use dsmoe_kernels::cuda::ops::slots::{Shape, Slots};
use dsmoe_kernels::cuda::ops::{router, slot_ffn};
use dsmoe_kernels::cuda::{GpuBuf, View};
use dsmoe_router::RoutingStats;
use dsmoe_router::counts::BINS;
use half::bf16;

use super::weights::{CudaInference, Layer};
use crate::config::{Architecture, QkNorm};
use crate::error::Result;
use crate::ffn::DeviceFfn;
use crate::model::gpu::{by_lists, ffn_dims, slots_at_most, widest_heads};

/// Rows of logits at a time.
pub(super) const LOGIT_ROWS: usize = 1024;

/// Activations, made for the largest pass so far.
#[derive(Debug, Default)]
pub(crate) struct CudaWorkspace {
    acts: Option<Acts>,
}

/// Activations of a pass over up to `room` tokens: a row per token. Layers with fewer heads use less of theirs.
#[derive(Debug)]
pub(super) struct Acts {
    room: usize,
    pub(super) ids: GpuBuf<u32>,
    pub(super) x: GpuBuf<f32>,
    pub(super) x_mid: GpuBuf<f32>,
    pub(super) rstd: GpuBuf<f32>,
    pub(super) h: GpuBuf<bf16>,
    pub(super) qkv: GpuBuf<bf16>,
    pub(super) a: GpuBuf<bf16>,
    pub(super) lse: GpuBuf<f32>,
    pub(super) y: GpuBuf<f32>,
    /// Reciprocal deviations of the norms of queries, and of keys.
    pub(super) rstd_heads: GpuBuf<f32>,
    /// The output of a block before the norm that follows it, and that norm's reciprocal deviations.
    pub(super) raw: GpuBuf<f32>,
    pub(super) rstd_raw: GpuBuf<f32>,
    /// Ones: the reciprocal deviations, and the weight, of no norm.
    pub(super) ones: Ones,
    /// `[at most LOGIT_ROWS, vocab]`
    pub(super) logits: GpuBuf<f32>,
    pub(super) ffn: FfnActs,
}

/// A norm that changes nothing, where a router reads the residual stream itself.
#[derive(Debug)]
pub(super) struct Ones {
    pub(super) rstd: GpuBuf<f32>,
    pub(super) weight: GpuBuf<f32>,
}

/// Activations of FFNs, and statistics of their routing.
#[derive(Debug)]
pub(super) struct FfnActs {
    /// `[room, n]`
    pub(super) gate_logits: GpuBuf<f32>,
    /// The values between the products of routers of low rank, `[room, r]`, and the same rounded.
    pub(super) low: GpuBuf<f32>,
    pub(super) low_rounded: GpuBuf<bf16>,
    /// Ones, as many as `room` and as r.
    pub(super) low_ones: GpuBuf<f32>,
    pub(super) routed: Option<router::Routed>,
    /// Used by passes of more than a few tokens, and by FFNs with biases.
    pub(super) wide: Option<Wide>,
    /// Used by passes of a few tokens.
    pub(super) few: GpuBuf<f32>,
    /// Per layer the load of routed experts and the histogram of their number, up to `2 n + 1` values, n the most experts of a
    /// layer.
    pub(super) counts: GpuBuf<u64>,
    /// Per layer the counts of logits, where they are wanted.
    pub(super) bins: Option<GpuBuf<u64>>,
    pub(super) gate_sums: GpuBuf<f64>,
    /// The number of active routed experts of every token, summed over layers.
    pub(super) active: GpuBuf<u32>,
}

/// Activations of the FFNs of a pass of many tokens.
#[derive(Debug)]
pub(super) struct Wide {
    /// Gate and up projections, of cores and of FFNs that run all pairs.
    pub(super) a: GpuBuf<bf16>,
    pub(super) b: GpuBuf<bf16>,
    pub(super) c: GpuBuf<bf16>,
    /// The active pairs and their parts of the sums of tokens, of FFNs that run over lists.
    pub(super) lists: Option<router::Lists>,
    pub(super) parts: GpuBuf<bf16>,
    /// The active pairs and the values of passes over slots.
    pub(super) slots: Option<Slots>,
    pub(super) workspace: GpuBuf<bf16>,
}

impl CudaWorkspace {
    /// Returns activations with room for `tokens`.
    pub(super) fn acts(&mut self, model: &CudaInference, tokens: usize) -> Result<&mut Acts> {
        let CudaWorkspace { acts } = self;
        let fits = acts.as_ref().is_some_and(|acts| acts.room >= tokens && acts.fits(model));
        if !fits {
            // The old memory is freed before the new memory is allocated.
            *acts = None;
        }
        match acts {
            Some(acts) => Ok(acts),
            empty => Ok(empty.insert(Acts::new(model, tokens)?)),
        }
    }
}

impl Acts {
    pub(super) fn new(model: &CudaInference, room: usize) -> Result<Acts> {
        let (gpu, config) = (&model.gpu, &model.config);
        let (heads, hidden) = (widest_heads(config), config.hidden);
        let architecture = &config.architecture;
        let only = |used: bool| if used { room } else { 0 };
        let after = only(architecture.norms_after());
        let ones = if architecture.norms_before() { [0; 2] } else { [room, hidden] };
        let [ones_rstd, ones_weight] = ones.map(|len| gpu.upload(&vec![1.0; len]));
        Ok(Acts {
            room,
            ids: gpu.zeros(room)?,
            x: gpu.zero_rows(room, hidden)?,
            x_mid: gpu.zero_rows(room, hidden)?,
            rstd: gpu.zeros(room)?,
            h: gpu.zero_rows(room, hidden)?,
            qkv: gpu.zero_rows(room, heads.joined_width())?,
            a: gpu.zero_rows(room, heads.width())?,
            lse: gpu.zero_rows(room, heads.heads)?,
            y: gpu.zero_rows(room, hidden)?,
            rstd_heads: gpu.zeros(only(architecture.qk_norm != QkNorm::None) * heads.heads)?,
            raw: gpu.zero_rows(after, hidden)?,
            rstd_raw: gpu.zeros(after)?,
            ones: Ones { rstd: ones_rstd?, weight: ones_weight? },
            logits: gpu.zero_rows(room.min(LOGIT_ROWS), config.vocab_size)?,
            ffn: FfnActs::new(model, room)?,
        })
    }

    /// Tells whether they have the sizes of `model`.
    fn fits(&self, model: &CudaInference) -> bool {
        let (config, heads) = (&model.config, widest_heads(&model.config));
        let n = model.num_experts().unwrap_or(0);
        let ffn = &self.ffn;
        self.x.len() == self.room * config.hidden
            && self.logits.len() == self.room.min(LOGIT_ROWS) * config.vocab_size
            && ffn.gate_logits.len() == self.room * n
            && ffn.low.len() == self.room * model.rank()
            && ffn.few.len() == few_len(model, self.room)
            && ffn.counts.len() == if n == 0 { 0 } else { (2 * n + 1) * config.num_layers }
            && self.a.len() == self.room * heads.width()
            && self.qkv.len() == self.room * heads.joined_width()
            && self.is_of(&config.architecture)
            && ffn.wide.as_ref().is_none_or(|wide| {
                let [workspace, slots] = [wide.workspace.len(), usize::from(wide.slots.is_some())];
                let shapes = slots_shapes(model, self.room);
                wide.c.len() == self.room * model.widest()
                    && [wide.a.len(), wide.parts.len(), workspace] == wide_lens(model, self.room)
                    && slots == usize::from(!shapes.is_empty())
                    && wide.slots.iter().all(|slots| shapes.iter().all(|shape| slots.has_room(shape)))
            })
    }

    /// Tells whether they have what the norms of `architecture` need.
    fn is_of(&self, architecture: &Architecture) -> bool {
        [
            (!self.rstd_heads.is_empty(), architecture.qk_norm != QkNorm::None),
            (!self.raw.is_empty(), architecture.norms_after()),
            (!self.ones.rstd.is_empty(), !architecture.norms_before()),
        ]
        .iter()
        .all(|(has, needs)| has == needs || self.room == 0)
    }

    /// Begins a pass over `ids` whose routing is for `stats`.
    pub(super) fn start(
        &mut self,
        model: &CudaInference,
        ids: &[u32],
        stats: Option<&RoutingStats>,
    ) -> Result<()> {
        self.ids.part_mut(0..ids.len()).upload_from(ids)?;
        let counted = stats.is_some_and(|stats| stats.logits().is_some());
        let bins = || model.gpu.zero_rows(model.config.num_layers, BINS);
        self.ffn.bins = counted.then(bins).transpose()?;
        self.ffn.clear_counts()
    }
}

impl FfnActs {
    fn new(model: &CudaInference, room: usize) -> Result<FfnActs> {
        let (gpu, n) = (&model.gpu, model.num_experts());
        let (rank, low_ones) = (model.rank(), room.max(model.rank()));
        let wide = room > FEW || model.layers.iter().any(|layer| layer.ffn.kind.gated().bias);
        let layers = if n.is_some() { model.config.num_layers } else { 0 };
        Ok(FfnActs {
            gate_logits: gpu.zero_rows(room, n.unwrap_or(0))?,
            low: gpu.zero_rows(room, rank)?,
            low_rounded: gpu.zero_rows(room, rank)?,
            low_ones: gpu.upload(&vec![1.0; if rank > 0 { low_ones } else { 0 }])?,
            routed: n.map(|n| router::Routed::with_room(gpu, room, n)).transpose()?,
            wide: wide.then(|| Wide::new(model, room)).transpose()?,
            few: gpu.zeros(few_len(model, room))?,
            counts: gpu.zero_rows(layers, 2 * n.unwrap_or(0) + 1)?,
            bins: None,
            gate_sums: gpu.zeros(2)?,
            active: gpu.zeros(if n.is_some() { room } else { 0 })?,
        })
    }

    /// Returns the parts of the sums that a pass over slots left.
    ///
    /// # Panics
    /// The last pass of an FFN was none over slots.
    pub(super) fn parts(&self) -> (View<'_, bf16>, &Slots, &router::Routed) {
        let Wide { slots, workspace, .. } = self.wide.as_ref().expect("memory of many tokens");
        let (slots, routed) = slots.as_ref().zip(self.routed.as_ref()).expect("slots");
        (slot_ffn::parts(workspace, Passes::Inference, &slots.shape()), slots, routed)
    }

    pub(super) fn clear_counts(&mut self) -> Result<()> {
        self.active.fill_zero()?;
        Ok(self.counts.fill_zero()?)
    }

    /// Adds the routing of a pass to `stats`.
    pub(super) fn report(&self, model: &CudaInference, stats: Option<&mut RoutingStats>) -> Result<()> {
        let (Some(routed), Some(stats)) = (&self.routed, stats) else { return Ok(()) };
        let tokens = routed.tokens();
        let kinds = || model.layers.iter().map(|layer| &layer.ffn.kind);
        let cores: Vec<usize> = kinds().map(DeviceFfn::core).collect();
        let counts = self.counts.download()?;
        for ((layer, counts), kind) in counts.chunks_exact(self.counts.cols()).enumerate().zip(kinds()) {
            let n = kind.routed().unwrap_or(0);
            stats.add_counts_behind_core(layer, kind.core(), &counts[..n], &counts[n..=2 * n]);
        }
        if stats.is_traced() {
            let always = cores.iter().sum::<usize>() as u32;
            let mut active = self.active.part(0..tokens).download()?;
            active.iter_mut().for_each(|active| *active += always);
            stats.add_active_of_tokens(&active);
        }
        if let (Some(bins), Some(counts)) = (&self.bins, stats.logits_mut()) {
            for ((layer, bins), core) in bins.download()?.chunks_exact(BINS).enumerate().zip(cores) {
                counts.add_counts(layer, (core * tokens) as u64, bins);
            }
        }
        Ok(())
    }
}

impl Wide {
    fn new(model: &CudaInference, room: usize) -> Result<Wide> {
        let (gpu, n) = (&model.gpu, model.num_experts());
        let [all_pairs, parts, workspace] = wide_lens(model, room);
        let shapes = slots_shapes(model, room);
        Ok(Wide {
            a: gpu.zeros(all_pairs)?,
            b: gpu.zeros(all_pairs)?,
            c: gpu.zeros(room * model.widest())?,
            lists: n.filter(|_| parts > 0).map(|n| router::Lists::with_room(gpu, room, n)).transpose()?,
            parts: gpu.zeros(parts)?,
            slots: (!shapes.is_empty()).then(|| Slots::for_all(gpu, &shapes)).transpose()?,
            workspace: gpu.zeros(workspace)?,
        })
    }
}

/// Returns the number of values that passes of a few of `room` tokens work in.
fn few_len(model: &CudaInference, room: usize) -> usize {
    let of_layers = model.layers.iter().map(|layer| ffn_dims(&layer.ffn.kind, room.min(FEW)).gemv_scratch());
    of_layers.max().unwrap_or(0)
}

/// Returns the sizes of the layers of which passes of up to `room` tokens may choose slots.
fn slots_shapes(model: &CudaInference, room: usize) -> Vec<Shape> {
    model.layers.iter().filter_map(|layer| slots_at_most(&model.gpu, &layer.ffn.kind, room)).collect()
}

/// Returns the number of values of the projections of cores and of FFNs that run all pairs, of the parts of those that run over
/// lists, and of the values of those that run over slots.
fn wide_lens(model: &CudaInference, room: usize) -> [usize; 3] {
    let gpu = &model.gpu;
    let lists = |layer: &Layer| {
        let kind = &layer.ffn.kind;
        by_lists(gpu, kind, room).filter(|_| slots_at_most(gpu, kind, room).is_none())
    };
    // A pass may choose dense products, which depends on its number of tokens.
    let fixed = gpu.expert_kernels() == ExpertKernels::Lists;
    let neurons = |layer: &Layer| {
        let [core, rest] = layer.ffn.kind.cut();
        if lists(layer).is_some() && fixed { core } else { core + rest }
    };
    let parts = model.layers.iter().filter_map(lists).map(|dims| dims.parts());
    let workspace = slots_shapes(model, room).iter().map(|shape| Passes::Inference.workspace(shape)).max();
    [
        room * model.layers.iter().map(neurons).max().unwrap_or(0),
        parts.max().unwrap_or(0),
        workspace.unwrap_or(0),
    ]
}
