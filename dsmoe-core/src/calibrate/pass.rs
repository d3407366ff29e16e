//! The forward pass of one layer over one sequence, which shows what its linears read.

use std::borrow::Cow;
use std::ops::Range;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::matmul::{Mat, Packed};
use dsmoe_kernels::{Precision, attention, kept, linear, swiglu};

use super::{Input, LayerWeights, Linear};
use crate::config::Config;
use crate::kept::LayerThresholds;
use crate::model::block::Block;
use crate::model::ropes::{Ropes, Turn};
use crate::model::tensors::attention_dims;

/// Activations of one sequence.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) x: Buf,
    pub(super) h: Buf,
    pub(super) rstd: Buf,
    pub(super) q: Buf,
    pub(super) k: Buf,
    pub(super) v: Buf,
    pub(super) a: Buf,
    pub(super) lse: Buf,
    pub(super) y: Buf,
    pub(super) gate: Buf,
    pub(super) up: Buf,
    pub(super) neurons: Buf,
}

/// A layer whose weights are ready for products: packed once for all sequences.
#[derive(Debug)]
pub(super) struct Ready<'a> {
    weights: Cow<'a, LayerWeights>,
    packed: [Option<Packed>; 7],
}

impl Ready<'static> {
    /// Packs all linears, and leaves their weights nowhere else.
    pub(super) fn owned(mut weights: LayerWeights, precision: Precision) -> Ready<'static> {
        let packed = Ready::new(&weights, 0..7, precision).packed;
        weights.linears.iter_mut().for_each(|linear| linear.weight = Buf::default());
        Ready { weights: Cow::Owned(weights), packed }
    }

    /// Sets what the inputs of the linears have to exceed.
    pub(super) fn set_thresholds(&mut self, thresholds: LayerThresholds) {
        self.weights.to_mut().thresholds = Some(thresholds);
    }
}

impl<'a> Ready<'a> {
    /// Packs some of the linears.
    pub(super) fn new(weights: &'a LayerWeights, which: Range<usize>, precision: Precision) -> Ready<'a> {
        let mut packed = [const { None }; 7];
        for i in which {
            let Linear { weight, outputs, inputs, .. } = &weights.linears[i];
            packed[i] = Some(Packed::new(precision, Mat::new(weight, *outputs, *inputs)));
        }
        Ready { weights: Cow::Borrowed(weights), packed }
    }

    /// Sets `y` `[tokens, outputs]` from `x` `[tokens, inputs]` by linear `i`, which is packed.
    pub(super) fn forward(&self, i: usize, y: &mut Buf, x: &[f32]) {
        let Linear { outputs, inputs, bias, .. } = &self.weights.linears[i];
        let Some(w) = &self.packed[i] else { unreachable!("calibrate: linear {i} is not packed") };
        let rows = x.len() / inputs;
        y.resize(rows * outputs);
        let threshold = self.weights.thresholds.map_or(0.0, |thresholds| thresholds.inputs[i]);
        if threshold > 0.0 {
            let mut masked = Buf::zeros(x.len());
            kept::mask(&mut masked, x, threshold);
            linear::ForwardPacked { y, x: &masked, w, bias: bias.as_deref(), rows }.run();
        } else {
            linear::ForwardPacked { y, x, w, bias: bias.as_deref(), rows }.run();
        }
    }
}

/// Receives an input of a layer's linears, and the residual stream that the output joins.
type See<'a> = dyn FnMut(Input, &[f32], &[f32]) + 'a;

impl Scratch {
    /// Sets `self.x` to the layer's output for one sequence of `states` `[seq, hidden]`.
    pub(super) fn layer(
        &mut self,
        states: &[f32],
        layer: &Ready<'_>,
        config: &Config,
        ropes: &Ropes,
        tap: &mut See<'_>,
    ) {
        self.attention(states, layer, config, ropes, tap);
        let weights: &LayerWeights = &layer.weights;
        let block = Block::of(config);
        // The residual stream is both read and shown while the scratch works on the neurons.
        let residual = std::mem::take(&mut self.x);
        self.read_by_ffn(&residual, layer, config);
        let Scratch { h, y, neurons, .. } = self;
        let input = if weights.norms[2].is_some() { &h[..] } else { &residual[..] };
        tap(Input::Ffn, input, &residual);
        tap(Input::Neurons, neurons, &residual);
        layer.forward(6, y, neurons);
        self.x = residual;
        let Scratch { x, h, rstd, y, .. } = self;
        block.join(x, y, weights.norms[3].as_deref(), h, rstd);
    }

    /// Sets `self.x` to `states` `[seq, hidden]`.
    pub(super) fn set_states(&mut self, states: &[f32], seq: usize) {
        self.x.resize(states.len());
        self.h.resize(states.len());
        self.rstd.resize(seq);
        self.x.copy_from_slice(states);
    }

    /// Returns what the FFN reads of `self.x`, and its neurons.
    pub(super) fn neurons(&mut self, layer: &Ready<'_>, config: &Config) -> (&[f32], &[f32]) {
        let residual = std::mem::take(&mut self.x);
        self.read_by_ffn(&residual, layer, config);
        self.x = residual;
        let input = if layer.weights.norms[2].is_some() { &self.h } else { &self.x };
        (input, &self.neurons)
    }

    /// Sets the neurons, and `self.h` to what they read where that is not `residual` itself.
    fn read_by_ffn(&mut self, residual: &[f32], layer: &Ready<'_>, config: &Config) {
        let Scratch { h, rstd, gate, up, neurons, .. } = self;
        let input = Block::of(config).input(layer.weights.norms[2].as_deref(), h, rstd, residual);
        layer.forward(4, gate, input);
        layer.forward(5, up, input);
        neurons.resize(gate.len());
        let activation = config.architecture.activation;
        swiglu::Forward { c: neurons, a: gate, b: up, activation }.run();
        let threshold = layer.weights.thresholds.map_or(0.0, |thresholds| thresholds.gate);
        if threshold > 0.0 {
            // The gate by itself: times 1.
            let mut values = Buf::zeros(gate.len());
            up.fill(1.0);
            swiglu::Forward { c: &mut values, a: gate, b: up, activation }.run();
            let skipped = neurons.iter_mut().zip(&values[..]).filter(|(_, gate)| gate.abs() <= threshold);
            skipped.for_each(|(neuron, _)| *neuron = 0.0);
        }
    }

    /// Sets `self.x` to one sequence of `states` `[seq, hidden]` and the layer's attention to it.
    pub(super) fn attention(
        &mut self,
        states: &[f32],
        layer: &Ready<'_>,
        config: &Config,
        ropes: &Ropes,
        tap: &mut See<'_>,
    ) {
        let block = Block::of(config);
        let seq = states.len() / config.hidden;
        self.set_states(states, seq);
        let weights: &LayerWeights = &layer.weights;
        let [before_attention, after_attention, ..] = weights.norms.each_ref().map(Option::as_deref);
        let [wq, wk, ..] = &weights.linears;
        let Scratch { x, h, rstd, q, k, v, a, lse, y, .. } = self;

        let input = block.input(before_attention, h, rstd, x);
        tap(Input::Attention, input, states);
        layer.forward(0, q, input);
        layer.forward(1, k, input);
        layer.forward(2, v, input);
        let dims = attention_dims(config, weights.layer, 1, [seq, seq]);
        lse.resize(seq * dims.heads);
        for (i, (x, linear, heads)) in
            [(&mut *q, wq, dims.heads), (&mut *k, wk, dims.kv_heads)].into_iter().enumerate()
        {
            if let Some(norms) = &weights.qk_norms {
                block.norm_heads(x, linear.outputs, &norms[i], lse);
            }
            let turn = Turn { stride: linear.outputs, heads, seq, start: 0, positions: seq };
            ropes.forward(weights.layer, x, turn);
        }
        a.resize(q.len());
        attention::Forward { out: a, lse, q, k, v, dims }.run();
        tap(Input::Heads, a, states);
        layer.forward(3, y, a);
        block.join(x, y, after_attention, h, rstd);
    }
}
