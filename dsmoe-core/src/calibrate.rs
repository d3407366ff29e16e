//! A dense model seen layer by layer by calibration sequences: the states of all tokens are in memory, the weights of
//! one layer at a time.
//!
//! ```text
//! stream = open(dir, sequences)                          states = embed(sequences)
//! per layer:  weights = stream.layer(i)
//!             stream.forward(&weights, tap)              tap sees what each linear reads
//!             change weights
//!             stream.advance(&weights)                   states = layer(states)
//! ```

use std::path::Path;

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{Precision, add, attention, linear, rms_norm, rope, swiglu};

use crate::checkpoint::{Checkpoint, LlamaTensors, WeightReader, check_llama_tensors};
use crate::config::{CONFIG_FILE, Config};
use crate::error::{Error, Result};
use crate::model::tensors::{check_input, in_pool, rope_table};
use crate::params::TensorSpec;

/// A dense model's layers in order, and the hidden states of calibration sequences before the next one.
#[derive(Debug)]
pub struct LayerStream {
    config: Config,
    checkpoint: Checkpoint,
    names: LlamaTensors,
    rope: rope::Table,
    seq: usize,
    /// `[sequences, seq, hidden]`.
    states: Buf,
    scratch: Scratch,
}

/// Input of some linears of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The normed states, read by q, k and v.
    Attention,
    /// The heads' outputs, read by o.
    Heads,
    /// The normed states after attention, read by gate and up.
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
}

/// A linear layer without bias: `y = x W^T`.
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
}

/// The weights of one layer, in f32.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// Number of the layer.
    pub layer: usize,
    /// Norm before attention `[hidden]`.
    pub input_norm: Buf,
    /// Norm before the FFN `[hidden]`.
    pub post_norm: Buf,
    /// q, k, v, o, gate, up, down.
    pub linears: [Linear; 7],
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
        let config = Config::load(dir)?;
        if !config.is_dense() {
            let help = "use a dense model, or export this one as a dense model first";
            return Err(Error::field(
                &dir.join(CONFIG_FILE),
                "model_type",
                "is of a model with experts",
                help,
            ));
        }
        let checkpoint = Checkpoint::open(dir)?;
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
        let rope = rope_table(&config);
        let mut states = Buf::zeros(sequences.len() * seq * config.hidden);
        embed(&mut states, &config, &mut WeightReader::resume(names, &checkpoint), sequences)?;
        Ok(LayerStream { config, checkpoint, names, rope, seq, states, scratch: Scratch::default() })
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

    /// Returns the number of tokens of a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Returns the hidden states `[sequences, seq, hidden]` before the next layer.
    pub fn states(&self) -> &[f32] {
        &self.states
    }

    /// Reads the weights of layer `i`.
    ///
    /// # Errors
    /// A file that cannot be read, or a weight that is not finite.
    ///
    /// # Panics
    /// The model has no layer `i`.
    pub fn layer(&self, i: usize) -> Result<LayerWeights> {
        assert!(i < self.config.num_layers, "calibrate: layer {i} of {}", self.config.num_layers);
        let mut reader = WeightReader::resume(self.names, &self.checkpoint);
        let mut norm = |which: &str| -> Result<Buf> {
            let name = format!("model.layers.{i}.{which}_layernorm.weight");
            let mut values = Buf::zeros(self.config.hidden);
            reader.read(&TensorSpec::norm(name, self.config.hidden), &mut values)?;
            Ok(values)
        };
        let [input_norm, post_norm] = [norm("input")?, norm("post_attention")?];
        let mut linears = Vec::with_capacity(PROJECTIONS.len());
        for (projection, input) in PROJECTIONS {
            let name = format!("model.layers.{i}.{projection}.weight");
            let shape = &self.checkpoint.need(&name)?.shape;
            let (outputs, inputs) = (shape[0], shape[1]);
            let mut weight = Buf::zeros(outputs * inputs);
            reader.read(&TensorSpec::matrix(name.clone(), outputs, inputs), &mut weight)?;
            linears.push(Linear { name, outputs, inputs, input, weight });
        }
        let linears = linears.try_into().expect("seven projections");
        Ok(LayerWeights { layer: i, input_norm, post_norm, linears })
    }

    /// Runs all sequences through a layer of these weights and shows `tap` what its linears read, sequence by sequence
    /// in the order of [`Input::ALL`]. The states stay.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn forward(&mut self, weights: &LayerWeights, tap: &mut (dyn FnMut(Tap<'_>) + Send)) {
        self.run(weights, tap, false);
    }

    /// Replaces the states by the outputs of a layer of these weights.
    ///
    /// # Panics
    /// The weights are not of this model.
    pub fn advance(&mut self, weights: &LayerWeights) {
        self.run(weights, &mut |_| {}, true);
    }

    fn run(&mut self, weights: &LayerWeights, tap: &mut (dyn FnMut(Tap<'_>) + Send), replace: bool) {
        let LayerStream { config, rope, seq, states, scratch, .. } = self;
        let len = *seq * config.hidden;
        if len == 0 {
            return;
        }
        in_pool(|| {
            for (sequence, states) in states.chunks_exact_mut(len).enumerate() {
                scratch.layer(states, weights, config, rope, &mut |input, x| tap(Tap { sequence, input, x }));
                if replace {
                    states.copy_from_slice(&scratch.x);
                }
            }
        });
    }
}

impl LayerWeights {
    /// Returns the linears that read `input`.
    pub fn reading(&mut self, input: Input) -> impl Iterator<Item = &mut Linear> {
        self.linears.iter_mut().filter(move |linear| linear.input == input)
    }
}

impl Linear {
    /// Sets `y` `[tokens, outputs]` from `x` `[tokens, inputs]`.
    fn forward(&self, y: &mut Buf, x: &[f32]) {
        let rows = x.len() / self.inputs;
        y.resize(rows * self.outputs);
        let dims =
            linear::Dims { rows, inputs: self.inputs, outputs: self.outputs, precision: Precision::F32 };
        linear::Forward { y, x, w: &self.weight, bias: None, dims }.run();
    }
}

impl Scratch {
    /// Sets `self.x` to the layer's output for one sequence of `states` `[seq, hidden]`.
    fn layer(
        &mut self,
        states: &[f32],
        weights: &LayerWeights,
        config: &Config,
        table: &rope::Table,
        tap: &mut dyn FnMut(Input, &[f32]),
    ) {
        let (hidden, head_dim, eps) = (config.hidden, config.head_dim, config.rms_norm_eps as f32);
        let seq = states.len() / hidden;
        let [wq, wk, wv, wo, wgate, wup, wdown] = &weights.linears;
        let (heads, kv_heads) = (wq.outputs / head_dim, wk.outputs / head_dim);
        let Scratch { x, h, rstd, q, k, v, a, lse, y, gate, up, neurons } = self;
        x.resize(states.len());
        h.resize(states.len());
        rstd.resize(seq);
        x.copy_from_slice(states);

        rms_norm::Forward { y: h, rstd, x, weight: &weights.input_norm, offset: 0.0, eps }.run();
        tap(Input::Attention, h);
        wq.forward(q, h);
        wk.forward(k, h);
        wv.forward(v, h);
        for (x, heads) in [(&mut *q, heads), (&mut *k, kv_heads)] {
            let args = rope::Args { table, seq, start: 0, heads, head_dim };
            rope::Forward { x, stride: args.width(), args }.run();
        }
        a.resize(q.len());
        lse.resize(seq * heads);
        let scores = attention::Scores::plain(head_dim);
        let dims = attention::Dims { batch: 1, queries: seq, keys: seq, heads, kv_heads, head_dim, scores };
        attention::Forward { out: a, lse, q, k, v, dims }.run();
        tap(Input::Heads, a);
        wo.forward(y, a);
        add::Add { y: x, x: y, scale: 1.0 }.run();

        rms_norm::Forward { y: h, rstd, x, weight: &weights.post_norm, offset: 0.0, eps }.run();
        tap(Input::Ffn, h);
        wgate.forward(gate, h);
        wup.forward(up, h);
        neurons.resize(gate.len());
        swiglu::Forward { c: neurons, a: gate, b: up, activation: swiglu::Activation::Silu }.run();
        tap(Input::Neurons, neurons);
        wdown.forward(y, neurons);
        add::Add { y: x, x: y, scale: 1.0 }.run();
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
    let spec = TensorSpec::matrix(crate::checkpoint::EMBEDDING, config.vocab_size, hidden);
    let mut first = 0;
    reader.rows(&spec, &mut |rows| {
        let end = first + rows.len() / hidden;
        while let Some((id, place)) = places.next_if(|&(id, _)| (id as usize) < end) {
            let row = &rows[(id as usize - first) * hidden..][..hidden];
            states[place * hidden..][..hidden].copy_from_slice(row);
        }
        first = end;
    })
}
