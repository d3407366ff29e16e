//! A model seen layer by layer by calibration sequences: the states of all tokens are in memory, the weights of
//! one layer at a time.
//!
//! ```text
//! stream = open(dir, sequences)                          states = embed(sequences)
//! per layer:  weights = stream.layer(i)
//!             stream.forward(&weights, tap)              tap sees what each linear reads
//!             change weights
//!             stream.advance(&weights)                   states = layer(states)
//! or, for another FFN:
//!             stream.attend(&weights)                    states += attention(states)
//!             stream.see_ffn(&weights, see)              see sees what the FFN reads and its neurons, as often as needed
//!             stream.join_ffn(&weights, ffn)             states += ffn(states)
//! ```

mod experts;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, What, alone};
use dsmoe_kernels::matmul::{Mat, Packed};
use dsmoe_kernels::{Precision, add, attention, kept, linear, swiglu};

use crate::checkpoint::{
    Checkpoint, EMBEDDING, LayerNorm, LlamaTensors, WeightReader, attention_name, check_llama_tensors,
    ffn_name, open_model,
};
use crate::config::{CONFIG_FILE, Config};
use crate::error::{Error, Result};
use crate::ffn::OUTPUT_BIAS;
use crate::kept::LayerThresholds;
use crate::model::block::Block;
use crate::model::ropes::{Ropes, Turn};
use crate::model::tensors::{attention_dims, check_input, in_pool};
use crate::params::TensorSpec;
use crate::rounds::Rounds;
pub use experts::{ExpertStats, ExpertSums, LayerExperts};

/// A model's layers in order, and the hidden states of calibration sequences before the next one.
#[derive(Debug)]
pub struct LayerStream {
    config: Config,
    checkpoint: Checkpoint,
    names: LlamaTensors,
    ropes: Ropes,
    /// The precision that products round their operands to.
    precision: Precision,
    seq: usize,
    /// `[sequences, seq, hidden]`.
    states: Buf,
    scratch: Scratch,
    rounds: Rounds,
}

/// Input of some linears of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The states, normed where the family does that, read by q, k and v.
    Attention,
    /// The heads' outputs, read by o.
    Heads,
    /// The states after attention, normed where the family does that, read by gate and up.
    Ffn,
    /// The neurons' values, read by down.
    Neurons,
}

impl Input {
    /// All four, in the order of the forward pass.
    pub const ALL: [Input; 4] = [Input::Attention, Input::Heads, Input::Ffn, Input::Neurons];
}

/// Input of linears in one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Tap<'a> {
    /// Number of the sequence.
    pub sequence: usize,
    /// The linears that read it.
    pub input: Input,
    /// `[seq, inputs]`.
    pub x: &'a [f32],
    /// The residual stream `[seq, hidden]` that the outputs of these linears join.
    pub residual: &'a [f32],
}

/// The FFN of a layer in one sequence.
#[derive(Clone, Copy, Debug)]
pub struct FfnTap<'a> {
    /// Number of the sequence.
    pub sequence: usize,
    /// The residual stream `[seq, hidden]` that its output joins.
    pub residual: &'a [f32],
    /// Its input `[seq, hidden]`.
    pub x: &'a [f32],
    /// Its neurons' values `[seq, intermediate]`.
    pub neurons: &'a [f32],
}

/// A linear layer: `y = x W^T + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Name of the weight in the checkpoint.
    pub name: String,
    /// Rows of the weight.
    pub outputs: usize,
    /// Columns of the weight.
    pub inputs: usize,
    /// Its input.
    pub input: Input,
    /// W `[outputs, inputs]`, as stored.
    pub weight: Buf,
    /// b `[outputs]`, where the model has one; that of down may be the bias of the FFN's output.
    pub bias: Option<Buf>,
}

/// The weights of one layer, in f32.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// Number of the layer.
    pub layer: usize,
    /// Weights `[hidden]` of the norms before attention, after it, before the FFN and after it; none where the family
    /// has no such norm.
    pub norms: [Option<Buf>; 4],
    /// Weights of the norms of queries and of keys.
    pub qk_norms: Option<[Buf; 2]>,
    /// q, k, v, o, gate, up, down.
    pub linears: [Linear; 7],
    /// What the inputs of the linears have to exceed; none multiplies all.
    pub thresholds: Option<LayerThresholds>,
}

/// Activations of one sequence.
#[derive(Debug, Default)]
struct Scratch {
    x: Buf,
    h: Buf,
    rstd: Buf,
    q: Buf,
    k: Buf,
    v: Buf,
    a: Buf,
    lse: Buf,
    y: Buf,
    gate: Buf,
    up: Buf,
    neurons: Buf,
}

/// A router that learns from fewer tokens is refused.
const FEWEST_TOKENS: usize = 256;

/// Checks that there are `at_least` sequences, all of one length of at least 2 tokens. `need` names their use.
///
/// # Errors
/// There are fewer, or they are shorter.
pub fn check_text(sequences: &[Vec<u32>], at_least: usize, need: &str) -> Result<()> {
    let problem = if sequences.len() < at_least {
        format!("{} sequences are too few for {need}", sequences.len())
    } else if let Some(i) = sequences.iter().position(|ids| ids.len() < 2 || ids.len() != sequences[0].len())
    {
        format!("sequence {i} has {} tokens and the first {}", sequences[i].len(), sequences[0].len())
    } else {
        return Ok(());
    };
    let help = format!("give {at_least} or more sequences of one length, at least 2 tokens");
    Err(Error::Calibration { problem, help })
}

/// Checks the text that routers learn from, and returns the number of its tokens.
///
/// # Errors
/// Those of [`check_text`]; there are fewer than 256 tokens.
pub fn check_router_text(sequences: &[Vec<u32>]) -> Result<usize> {
    check_text(sequences, 1, "routers")?;
    let tokens = sequences.iter().map(Vec::len).sum();
    match tokens < FEWEST_TOKENS {
        true => Err(Error::Calibration {
            problem: format!("{tokens} tokens are too few for routers"),
            help: format!("give {FEWEST_TOKENS} tokens or more"),
        }),
        false => Ok(tokens),
    }
}

const PROJECTIONS: [(&str, Input); 7] = [
    ("self_attn.q_proj", Input::Attention),
    ("self_attn.k_proj", Input::Attention),
    ("self_attn.v_proj", Input::Attention),
    ("self_attn.o_proj", Input::Heads),
    ("mlp.gate_proj", Input::Ffn),
    ("mlp.up_proj", Input::Ffn),
    ("mlp.down_proj", Input::Neurons),
];

impl LayerStream {
    /// Opens the dense model in `dir` and embeds `sequences`, which are of one length. Without sequences the stream
    /// gives weights alone.
    ///
    /// # Errors
    /// `dir` holds no dense LLaMA or cannot be read; sequences of different lengths, without tokens, longer than the
    /// model's positions, or with a token outside the vocabulary.
    pub fn open(dir: &Path, sequences: &[Vec<u32>]) -> Result<LayerStream> {
        LayerStream::open_on(alone(), dir, sequences)
    }

    /// Does as [`LayerStream::open`] on the processes of `comm`, which make the same calls on the same sequences. Each runs
    /// every n-th sequence, and all see and hold what a single process would.
    ///
    /// # Errors
    /// Those of [`LayerStream::open`].
    pub fn open_on(comm: &Arc<dyn Communicator>, dir: &Path, sequences: &[Vec<u32>]) -> Result<LayerStream> {
        let config = Config::load(dir)?;
        if !config.is_dense() {
            let help = "use a dense model, or export this one as a dense model first";
            return Err(Error::field(
                &dir.join(CONFIG_FILE),
                "model_type",
                "is of a model with experts or thresholds",
                help,
            ));
        }
        LayerStream::open_model(comm, dir, config, sequences)
    }

    fn open_model(
        comm: &Arc<dyn Communicator>,
        dir: &Path,
        config: Config,
        sequences: &[Vec<u32>],
    ) -> Result<LayerStream> {
        let checkpoint = open_model(dir, &config)?;
        let names = check_llama_tensors(&config, &checkpoint)?;
        let seq = sequences.first().map_or(0, Vec::len);
        for (i, ids) in sequences.iter().enumerate() {
            if ids.len() != seq || seq == 0 {
                return Err(Error::argument(
                    format!("calibration sequence {i} has {} tokens and the first {seq}", ids.len()),
                    "give sequences of one length",
                ));
            }
            check_input(&config, ids, 0, seq)?;
        }
        let ropes = Ropes::new(&config);
        let mut states = Buf::zeros(sequences.len() * seq * config.hidden);
        embed(&mut states, &config, &mut WeightReader::resume(names, &checkpoint), sequences)?;
        let (precision, scratch) = (Precision::F32, Scratch::default());
        let rounds = Rounds::new(comm);
        Ok(LayerStream { config, checkpoint, names, ropes, precision, seq, states, scratch, rounds })
    }

    /// Rounds the operands of all products to `precision` instead of f32.
    #[must_use]
    pub fn in_precision(self, precision: Precision) -> LayerStream {
        LayerStream { precision, ..self }
    }

    /// Returns the precision that products round their operands to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns the model's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the model's files.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Returns the model's tensors in those files.
    pub fn tensors(&self) -> LlamaTensors {
        self.names
    }

    /// Returns the processes that divide the sequences.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        self.rounds.comm()
    }

    /// Returns the number of tokens of a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Returns the hidden states `[sequences, seq, hidden]` before the next layer.
    pub fn states(&self) -> &[f32] {
        &self.states
    }

    /// Reads the weights of layer `i`; those of its FFN are empty in a model with experts.
    ///
    /// # Errors
    /// A file that cannot be read, or a weight that is not finite.
    ///
    /// # Panics
    /// The model has no layer `i`.
    pub fn layer(&self, i: usize) -> Result<LayerWeights> {
        assert!(i < self.config.num_layers, "calibrate: layer {i} of {}", self.config.num_layers);
        let mut reader = WeightReader::resume(self.names, &self.checkpoint);
        let architecture = &self.config.architecture;
        let mut norms = [const { None }; 4];
        for (values, norm) in norms.iter_mut().zip(LayerNorm::ALL) {
            let name = norm.name(architecture.norms, i);
            *values = name.map(|name| vector(&mut reader, name, self.config.hidden)).transpose()?;
        }
        let qk_norms = match self.config.qk_norm_widths(i) {
            Some([q, k]) => Some([
                vector(&mut reader, attention_name(i, "q_norm.weight"), q)?,
                vector(&mut reader, attention_name(i, "k_norm.weight"), k)?,
            ]),
            None => None,
        };
        let mut linears = Vec::with_capacity(PROJECTIONS.len());
        for (projection, input) in PROJECTIONS {
            let name = format!("model.layers.{i}.{projection}.weight");
            if !self.config.is_dense() && !matches!(input, Input::Attention | Input::Heads) {
                // Experts are read by themselves.
                linears.push(Linear {
                    name,
                    outputs: 0,
                    inputs: 0,
                    input,
                    weight: Buf::default(),
                    bias: None,
                });
                continue;
            }
            let shape = &self.checkpoint.need(&name)?.shape;
            let (outputs, inputs) = (shape[0], shape[1]);
            let has_bias = match input {
                Input::Attention => architecture.qkv_bias,
                Input::Heads => architecture.o_bias,
                Input::Ffn | Input::Neurons => architecture.mlp_bias,
            };
            let (has_bias, bias) = match projection {
                "mlp.down_proj" if architecture.output_bias => (true, ffn_name(i, OUTPUT_BIAS)),
                _ => (has_bias, format!("model.layers.{i}.{projection}.bias")),
            };
            let bias = has_bias.then(|| vector(&mut reader, bias, outputs)).transpose()?;
            let mut weight = Buf::zeros(outputs * inputs);
            reader.read(&TensorSpec::matrix(name.clone(), outputs, inputs), &mut weight)?;
            linears.push(Linear { name, outputs, inputs, input, weight, bias });
        }
        let linears = linears.try_into().expect("seven projections");
        Ok(LayerWeights { layer: i, norms, qk_norms, linears, thresholds: None })
    }

    /// Runs all sequences through a layer of these weights and shows `tap` what its linears read, sequence by sequence
    /// in the order of [`Input::ALL`]. The states stay.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn forward(&mut self, weights: &LayerWeights, tap: &mut (dyn FnMut(Tap<'_>) + Send)) -> Result<()> {
        self.run(weights, Some(tap), false)
    }

    /// Replaces the states by the outputs of a layer of these weights, and shows `tap` what [`LayerStream::forward`] would.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn advance_seen(
        &mut self,
        weights: &LayerWeights,
        tap: &mut (dyn FnMut(Tap<'_>) + Send),
    ) -> Result<()> {
        self.run(weights, Some(tap), true)
    }

    /// Replaces the states by the outputs of a layer of these weights.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn advance(&mut self, weights: &LayerWeights) -> Result<()> {
        self.run(weights, None, true)
    }

    /// Shows `see` the outputs `[seq, hidden]` of a layer of these weights for the sequences that `is_seen` names. The states
    /// stay.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn outputs_of(
        &mut self,
        weights: &LayerWeights,
        is_seen: &(dyn Fn(usize) -> bool + Sync),
        see: &mut (dyn FnMut(usize, &[f32]) + Send),
    ) {
        let LayerStream { config, ropes, precision, seq, states, scratch, .. } = self;
        let len = (*seq * config.hidden).max(1);
        in_pool(|| {
            let layer = Ready::new(weights, 0..7, *precision);
            for (sequence, states) in states.chunks_exact(len).enumerate().filter(|(i, _)| is_seen(*i)) {
                scratch.layer(states, &layer, config, ropes, &mut |_, _, _| {});
                see(sequence, &scratch.x);
            }
        });
    }

    /// Adds the attention of a layer to the states. The FFN of the layer is then due: [`LayerStream::see_ffn`] and
    /// [`LayerStream::join_ffn`].
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn attend(&mut self, weights: &LayerWeights) -> Result<()> {
        let (len, all) = (self.sequence_len(), self.all());
        let LayerStream { config, ropes, precision, states, scratch, rounds, .. } = self;
        in_pool(|| {
            let layer = Ready::new(weights, 0..4, *precision);
            if rounds.is_alone() {
                for states in states.chunks_exact_mut(len) {
                    scratch.attention(states, &layer, config, ropes, &mut |_, _, _| {});
                    states.copy_from_slice(&scratch.x);
                }
                return Ok(());
            }
            let mut work = |states: &[f32], sequence: usize, out: &mut [f32]| {
                scratch.attention(&states[sequence * len..][..len], &layer, config, ropes, &mut |_, _, _| {});
                out.copy_from_slice(&scratch.x);
            };
            let mut see = |states: &mut [f32], sequence: usize, out: &[f32]| {
                states[sequence * len..][..len].copy_from_slice(out);
            };
            rounds.each((&all, len), of_layer(weights), states, &mut work, &mut see)
        })
    }

    /// Shows `see` the FFN of a layer, sequence by sequence, between [`LayerStream::attend`] and
    /// [`LayerStream::join_ffn`]. The states stay.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn see_ffn(
        &mut self,
        weights: &LayerWeights,
        see: &mut (dyn FnMut(FfnTap<'_>) + Send),
    ) -> Result<()> {
        self.see_ffn_of(weights, &|_| true, see)
    }

    /// Does the same as [`LayerStream::see_ffn`] for the sequences that `is_seen` names.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn see_ffn_of(
        &mut self,
        weights: &LayerWeights,
        is_seen: &(dyn Fn(usize) -> bool + Sync),
        see: &mut (dyn FnMut(FfnTap<'_>) + Send),
    ) -> Result<()> {
        let (len, mut seen) = (self.sequence_len(), self.all());
        seen.retain(|&sequence| is_seen(sequence));
        let width = self.seq * weights.linears[4].outputs;
        let LayerStream { config, precision, seq, states, scratch, rounds, .. } = self;
        in_pool(|| {
            let layer = Ready::new(weights, 4..6, *precision);
            if rounds.is_alone() {
                for sequence in seen {
                    let states = &states[sequence * len..][..len];
                    scratch.set_states(states, *seq);
                    let (x, neurons) = scratch.neurons(&layer, config);
                    see(FfnTap { sequence, residual: states, x, neurons });
                }
                return Ok(());
            }
            let mut work = |states: &[f32], sequence: usize, out: &mut [f32]| {
                scratch.set_states(&states[sequence * len..][..len], *seq);
                let (x, neurons) = scratch.neurons(&layer, config);
                out[..len].copy_from_slice(x);
                out[len..].copy_from_slice(neurons);
            };
            let mut show = |states: &mut [f32], sequence: usize, out: &[f32]| {
                let (x, neurons) = out.split_at(len);
                see(FfnTap { sequence, residual: &states[sequence * len..][..len], x, neurons });
            };
            rounds.each((&seen, len + width), of_layer(weights), states, &mut work, &mut show)
        })
    }

    /// Completes a layer after [`LayerStream::attend`]: adds to the states what `ffn` sets its first argument
    /// `[seq, hidden]` to, after the norm behind the FFN where there is one. `ffn` is called for the sequences of this process.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn join_ffn(
        &mut self,
        weights: &LayerWeights,
        ffn: &mut (dyn FnMut(&mut [f32], FfnTap<'_>) + Send),
    ) -> Result<()> {
        self.join_ffn_measured(weights, &mut |y, tap| {
            ffn(y, tap);
            []
        })
        .map(drop)
    }

    /// Does as [`LayerStream::join_ffn`], and returns what `ffn` returns for every sequence, in their order and in all processes.
    ///
    /// # Errors
    /// Another process fails.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn join_ffn_measured<const N: usize>(
        &mut self,
        weights: &LayerWeights,
        ffn: &mut (dyn FnMut(&mut [f32], FfnTap<'_>) -> [f64; N] + Send),
    ) -> Result<Vec<[f64; N]>> {
        let (len, all) = (self.sequence_len(), self.all());
        let LayerStream { config, precision, seq, states, scratch, rounds, .. } = self;
        let block = Block::of(config);
        let mut y = Buf::zeros(len);
        let mut measured = Vec::with_capacity(all.len());
        in_pool(|| {
            let layer = Ready::new(weights, 4..6, *precision);
            let mut join = |states: &mut [f32], sequence: usize| {
                scratch.set_states(states, *seq);
                let (x, neurons) = scratch.neurons(&layer, config);
                let found = ffn(&mut y, FfnTap { sequence, residual: states, x, neurons });
                let Scratch { h, rstd, .. } = scratch;
                block.join(states, &y, weights.norms[3].as_deref(), h, rstd);
                found
            };
            if rounds.is_alone() {
                let states = states.chunks_exact_mut(len).enumerate();
                measured.extend(states.map(|(sequence, states)| join(states, sequence)));
                return Ok(());
            }
            let mut work = |states: &[f32], sequence: usize, out: &mut [f32]| {
                let (values, found) = out.split_at_mut(len);
                values.copy_from_slice(&states[sequence * len..][..len]);
                let of_sequence = join(values, sequence);
                let halves = of_sequence.iter().flat_map(|value| halves(*value));
                found.iter_mut().zip(halves).for_each(|(to, half)| *to = half);
            };
            let mut see = |states: &mut [f32], sequence: usize, out: &[f32]| {
                let (values, found) = out.split_at(len);
                states[sequence * len..][..len].copy_from_slice(values);
                measured.push(std::array::from_fn(|at| whole([found[2 * at], found[2 * at + 1]])));
            };
            rounds.each((&all, len + 2 * N), of_layer(weights), states, &mut work, &mut see)
        })?;
        Ok(measured)
    }

    /// Returns the values of the states of a sequence.
    fn sequence_len(&self) -> usize {
        (self.seq * self.config.hidden).max(1)
    }

    /// Returns the numbers of all sequences.
    fn all(&self) -> Vec<usize> {
        (0..self.states.len() / self.sequence_len()).collect()
    }

    /// Appends copies of the first `sequences` sequences' states, `times` of each, all of the first copy first.
    pub(crate) fn repeat(&mut self, sequences: usize, times: usize) {
        let len = sequences * self.seq * self.config.hidden;
        let before = std::mem::take(&mut self.states);
        self.states = Buf::zeros(before.len() + times * len);
        let (old, new) = self.states.split_at_mut(before.len());
        old.copy_from_slice(&before);
        new.chunks_exact_mut(len.max(1)).for_each(|copy| copy.copy_from_slice(&before[..len]));
    }

    /// Replaces the states after the last layer by what the output head reads.
    ///
    /// # Errors
    /// The norm cannot be read.
    pub(crate) fn norm_last(&mut self) -> Result<()> {
        let mut reader = WeightReader::resume(self.names, &self.checkpoint);
        let weight = vector(&mut reader, "model.norm.weight".to_owned(), self.config.hidden)?;
        let LayerStream { config, seq, states, scratch, .. } = self;
        let len = (*seq * config.hidden).max(1);
        for states in states.chunks_exact_mut(len) {
            scratch.set_states(states, *seq);
            Block::of(config).norm(&weight, states, &mut scratch.rstd, &scratch.x);
        }
        Ok(())
    }

    /// Gives the rows of the output head, `[vocab, hidden]`, in order and in pieces.
    ///
    /// # Errors
    /// The head cannot be read.
    pub(crate) fn head(&self, sink: &mut dyn FnMut(&[f32])) -> Result<()> {
        let name = if self.config.tie_word_embeddings { EMBEDDING } else { "lm_head.weight" };
        let spec = TensorSpec::matrix(name, self.config.vocab_size, self.config.hidden);
        WeightReader::resume(self.names, &self.checkpoint).rows(&spec, sink)
    }

    /// Runs a layer, shows `tap` what its linears read, and replaces the states if asked to.
    fn run(
        &mut self,
        weights: &LayerWeights,
        mut tap: Option<&mut (dyn FnMut(Tap<'_>) + Send)>,
        replace: bool,
    ) -> Result<()> {
        let (len, all) = (self.sequence_len(), self.all());
        let LayerStream { config, ropes, precision, seq, states, scratch, rounds, .. } = self;
        let linear = |i: usize| *seq * weights.linears[i].inputs;
        // The output, what the FFN's output joins, and what the linears read.
        let parts = Parts { lens: [len, len, linear(0), linear(3), linear(4), linear(6)] };
        in_pool(|| {
            let layer = Ready::new(weights, 0..7, *precision);
            if rounds.is_alone() {
                for (sequence, states) in states.chunks_exact_mut(len).enumerate() {
                    let mut see = |input, x: &[f32], residual: &[f32]| {
                        if let Some(tap) = &mut tap {
                            tap(Tap { sequence, input, x, residual });
                        }
                    };
                    scratch.layer(states, &layer, config, ropes, &mut see);
                    if replace {
                        states.copy_from_slice(&scratch.x);
                    }
                }
                return Ok(());
            }
            let sent = if tap.is_some() { parts.lens.iter().sum() } else { len };
            let is_seen = tap.is_some();
            let mut work = |states: &[f32], sequence: usize, out: &mut [f32]| {
                let mut see = |input, x: &[f32], residual: &[f32]| {
                    if is_seen {
                        out[parts.of(input)].copy_from_slice(x);
                        out[parts.range(1)].copy_from_slice(residual);
                    }
                };
                scratch.layer(&states[sequence * len..][..len], &layer, config, ropes, &mut see);
                out[..len].copy_from_slice(&scratch.x);
            };
            let mut see = |states: &mut [f32], sequence: usize, out: &[f32]| {
                let states = &mut states[sequence * len..][..len];
                if let Some(tap) = &mut tap {
                    for input in Input::ALL {
                        let before = matches!(input, Input::Attention | Input::Heads);
                        let residual = if before { &*states } else { &out[parts.range(1)] };
                        tap(Tap { sequence, input, x: &out[parts.of(input)], residual });
                    }
                }
                if replace {
                    states.copy_from_slice(&out[..len]);
                }
            };
            rounds.each((&all, sent), of_layer(weights), states, &mut work, &mut see)
        })
    }
}

/// The values of a sequence that a process sends to the others.
struct Parts {
    lens: [usize; 6],
}

impl Parts {
    fn range(&self, part: usize) -> Range<usize> {
        let start = self.lens[..part].iter().sum();
        start..start + self.lens[part]
    }

    fn of(&self, input: Input) -> Range<usize> {
        self.range(match input {
            Input::Attention => 2,
            Input::Heads => 3,
            Input::Ffn => 4,
            Input::Neurons => 5,
        })
    }
}

/// Describes what processes send each other of a layer.
fn of_layer(weights: &LayerWeights) -> What {
    What::of("the calibration of a layer").unit(weights.layer)
}

/// Cuts the bits of a value into two values of half the size.
fn halves(value: f64) -> [f32; 2] {
    let bits = value.to_bits();
    [f32::from_bits((bits >> 32) as u32), f32::from_bits(bits as u32)]
}

/// Puts [`halves`] together.
fn whole([high, low]: [f32; 2]) -> f64 {
    f64::from_bits(u64::from(high.to_bits()) << 32 | u64::from(low.to_bits()))
}

fn vector(reader: &mut WeightReader<'_>, name: String, len: usize) -> Result<Buf> {
    let mut values = Buf::zeros(len);
    reader.read(&TensorSpec::norm(name, len), &mut values)?;
    Ok(values)
}

impl LayerWeights {
    /// Returns the linears that read `input`.
    pub fn reading(&mut self, input: Input) -> impl Iterator<Item = &mut Linear> {
        self.linears.iter_mut().filter(move |linear| linear.input == input)
    }
}

/// A layer whose weights are ready for products: packed once for all sequences.
struct Ready<'a> {
    weights: &'a LayerWeights,
    packed: [Option<Packed>; 7],
}

impl<'a> Ready<'a> {
    /// Packs some of the linears.
    fn new(weights: &'a LayerWeights, which: Range<usize>, precision: Precision) -> Ready<'a> {
        let mut packed = [const { None }; 7];
        for i in which {
            let Linear { weight, outputs, inputs, .. } = &weights.linears[i];
            packed[i] = Some(Packed::new(precision, Mat::new(weight, *outputs, *inputs)));
        }
        Ready { weights, packed }
    }

    /// Sets `y` `[tokens, outputs]` from `x` `[tokens, inputs]` by linear `i`, which is packed.
    fn forward(&self, i: usize, y: &mut Buf, x: &[f32]) {
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

/// A projection of neurons to outputs, packed.
#[derive(Debug)]
pub struct Down {
    packed: Packed,
    bias: Option<Vec<f32>>,
}

impl Down {
    /// Packs `weight` `[outputs, inputs]`.
    ///
    /// # Panics
    /// There are no inputs, or no whole number of outputs.
    pub fn new(precision: Precision, weight: &[f32], inputs: usize, bias: Option<&[f32]>) -> Down {
        let packed = Packed::new(precision, Mat::new(weight, weight.len() / inputs, inputs));
        Down { packed, bias: bias.map(<[f32]>::to_vec) }
    }

    /// Packs that of a layer.
    pub fn of(precision: Precision, weights: &LayerWeights) -> Down {
        let [.., down] = &weights.linears;
        Down::new(precision, &down.weight, down.inputs, down.bias.as_deref())
    }

    /// Sets `y` `[tokens, outputs]` to the output of `neurons` `[tokens, inputs]`.
    pub fn forward(&self, y: &mut [f32], neurons: &[f32]) {
        let rows = neurons.len() / self.packed.inputs();
        linear::ForwardPacked { y, x: neurons, w: &self.packed, bias: self.bias.as_deref(), rows }.run();
    }
}

/// Receives an input of a layer's linears, and the residual stream that the output joins.
type See<'a> = dyn FnMut(Input, &[f32], &[f32]) + 'a;

impl Scratch {
    /// Sets `self.x` to the layer's output for one sequence of `states` `[seq, hidden]`.
    fn layer(
        &mut self,
        states: &[f32],
        layer: &Ready<'_>,
        config: &Config,
        ropes: &Ropes,
        tap: &mut See<'_>,
    ) {
        self.attention(states, layer, config, ropes, tap);
        let weights = layer.weights;
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
    fn set_states(&mut self, states: &[f32], seq: usize) {
        self.x.resize(states.len());
        self.h.resize(states.len());
        self.rstd.resize(seq);
        self.x.copy_from_slice(states);
    }

    /// Returns what the FFN reads of `self.x`, and its neurons.
    fn neurons(&mut self, layer: &Ready<'_>, config: &Config) -> (&[f32], &[f32]) {
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
    fn attention(
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
        let weights = layer.weights;
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

/// Sets `states` to the embeddings of `sequences`; the table is read once, in pieces.
fn embed(
    states: &mut [f32],
    config: &Config,
    reader: &mut WeightReader<'_>,
    sequences: &[Vec<u32>],
) -> Result<()> {
    let hidden = config.hidden;
    let mut places: Vec<(u32, usize)> = sequences.iter().flatten().copied().zip(0..).collect();
    places.sort_unstable();
    let mut places = places.into_iter().peekable();
    if places.peek().is_none() {
        return Ok(());
    }
    let spec = TensorSpec::matrix(EMBEDDING, config.vocab_size, hidden);
    let mut first = 0;
    reader.rows(&spec, &mut |rows| {
        let end = first + rows.len() / hidden;
        while let Some((id, place)) = places.next_if(|&(id, _)| (id as usize) < end) {
            let row = &rows[(id as usize - first) * hidden..][..hidden];
            let state = &mut states[place * hidden..][..hidden];
            add::Scale { y: state, x: row, scale: config.architecture.embed_scale }.run();
        }
        first = end;
    })
}
