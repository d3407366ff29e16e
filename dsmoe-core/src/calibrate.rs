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
mod pass;
mod scorer;
mod weights;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::comm::{Communicator, What, alone};
use dsmoe_kernels::{Precision, add};

use crate::checkpoint::{Checkpoint, EMBEDDING, LlamaTensors, WeightReader, check_llama_tensors, open_model};
use crate::config::{CONFIG_FILE, Config};
use crate::error::{Error, Result};
use crate::model::block::Block;
use crate::model::ropes::Ropes;
use crate::model::tensors::{check_input, in_pool};
use crate::params::TensorSpec;
use crate::rounds::Rounds;
pub use experts::{ExpertStats, ExpertSums, LayerExperts};
use pass::{Ready, Scratch};
pub use scorer::StateScorer;
use weights::vector;
pub use weights::{Down, LayerWeights, Linear};

/// A model's layers in order, and the hidden states of calibration sequences before the next one.
///
/// ```
/// use dsmoe_core::calibrate::{Input, LayerStream, LayerWeights, Linear, Tap};
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path().join("dense");
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let mut stream = LayerStream::open(&dense, &[vec![1, 5, 9, 2]])?;
/// for i in 0..stream.config().num_layers {
///     let weights: LayerWeights = stream.layer(i)?;
///     let Linear { inputs, .. } = weights.linears[0];
///     let mut seen = 0;
///     stream.forward(&weights, &mut |tap: Tap<'_>| {
///         if tap.input == Input::Attention {
///             seen += tap.x.len() / inputs;
///         }
///     })?;
///     assert_eq!(seen, 4);
///     stream.advance(&weights)?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
///
/// ```
/// use dsmoe_core::calibrate::{Input, LayerStream};
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path();
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, dense, &Default::default(), &mut |_| {})?;
///
/// // Without sequences the stream gives weights alone.
/// let mut weights = LayerStream::open(dense, &[])?.layer(0)?;
/// let counts = Input::ALL.map(|input| weights.reading(input).count());
/// assert_eq!(counts, [3, 1, 2, 1]); // q, k, v; o; gate, up; down
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
///
/// ```
/// use dsmoe_core::calibrate::{Input, LayerStream, Tap};
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path();
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, dense, &Default::default(), &mut |_| {})?;
///
/// let mut stream = LayerStream::open(dense, &[vec![1, 5, 9, 2], vec![1, 7, 3, 8]])?;
/// let weights = stream.layer(0)?;
/// // The sums of squares of each channel that gate and up read, which Wanda's scores need.
/// let mut squares = vec![0.0; stream.config().hidden];
/// stream.forward(&weights, &mut |Tap { input, x, .. }: Tap<'_>| {
///     if input == Input::Ffn {
///         for x in x.chunks_exact(squares.len()) {
///             squares.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
///         }
///     }
/// })?;
/// assert!(squares.iter().all(|&sum| sum > 0.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
///
/// ```
/// use dsmoe_core::calibrate::{Down, FfnTap, LayerStream};
/// use dsmoe_kernels::Precision;
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path().join("dense");
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let mut stream = LayerStream::open(&dense, &[vec![1, 5, 9, 2]])?;
/// let weights = stream.layer(0)?;
/// let down = Down::of(Precision::F32, &weights);
/// stream.attend(&weights)?;
/// // The output of the FFN without the smallest neurons of each token.
/// stream.join_ffn(&weights, &mut |y: &mut [f32], tap: FfnTap<'_>| {
///     let large: Vec<f32> = tap.neurons.iter().map(|&n| if n.abs() < 1e-3 { 0.0 } else { n }).collect();
///     down.forward(y, &large);
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
            let help = "use a dense model, such as the one that this was made from";
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

    /// Replaces the hidden states by those that [`LayerStream::states`] returned in front of some layer, which comes next then.
    ///
    /// # Panics
    /// They are of another number of sequences or tokens.
    pub fn set_states(&mut self, states: &[f32]) {
        self.states.copy_from_slice(states);
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
        let reader = WeightReader::resume(self.names, &self.checkpoint);
        LayerWeights::read(reader, &self.config, &self.checkpoint, i)
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
