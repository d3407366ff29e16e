//! The weights of one layer, as calibration reads and changes them.

use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::matmul::{Mat, Packed};
use dsmoe_kernels::{Precision, linear};

use super::Input;
use crate::checkpoint::{Checkpoint, LayerNorm, WeightReader, attention_name, ffn_name};
use crate::config::Config;
use crate::error::Result;
use crate::ffn::OUTPUT_BIAS;
use crate::kept::LayerThresholds;
use crate::params::TensorSpec;

/// A linear layer: `y = x W^T + b`.
///
/// ```
/// use dsmoe_core::calibrate::{LayerStream, Linear};
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path();
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, dense, &Default::default(), &mut |_| {})?;
///
/// let mut weights = LayerStream::open(dense, &[])?.layer(0)?;
/// let Linear { name, outputs, inputs, weight, .. } = &mut weights.linears[4];
/// assert_eq!((&name[..], *outputs, *inputs), ("model.layers.0.mlp.gate_proj.weight", 512, 128));
/// // The first neuron goes.
/// weight[..*inputs].fill(0.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
///
/// ```
/// use dsmoe_core::calibrate::{LayerStream, LayerWeights};
/// # let work = tempfile::tempdir()?;
/// # let dense = work.path();
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, dense, &Default::default(), &mut |_| {})?;
///
/// let mut stream = LayerStream::open(dense, &[vec![1, 5, 9, 2]])?;
/// let mut weights: LayerWeights = stream.layer(0)?;
/// for linear in &mut weights.linears {
///     // Small weights are pruned.
///     linear.weight.iter_mut().filter(|w| w.abs() < 0.01).for_each(|w| *w = 0.0);
/// }
/// // The next layer is then seen behind the pruned one.
/// stream.advance(&weights)?;
/// assert_eq!(weights.layer, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    /// The thresholds that inputs of the linears have to exceed; none multiplies all.
    pub thresholds: Option<LayerThresholds>,
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

impl LayerWeights {
    /// Reads the weights of layer `i`; those of its FFN are empty in a model with experts.
    pub(super) fn read(
        mut reader: WeightReader<'_>,
        config: &Config,
        checkpoint: &Checkpoint,
        i: usize,
    ) -> Result<LayerWeights> {
        let architecture = &config.architecture;
        let mut norms = [const { None }; 4];
        for (values, norm) in norms.iter_mut().zip(LayerNorm::ALL) {
            let name = norm.name(architecture.norms, i);
            *values = name.map(|name| vector(&mut reader, name, config.hidden)).transpose()?;
        }
        let qk_norms = match config.qk_norm_widths(i) {
            Some([q, k]) => Some([
                vector(&mut reader, attention_name(i, "q_norm.weight"), q)?,
                vector(&mut reader, attention_name(i, "k_norm.weight"), k)?,
            ]),
            None => None,
        };
        let mut linears = Vec::with_capacity(PROJECTIONS.len());
        for (projection, input) in PROJECTIONS {
            let name = format!("model.layers.{i}.{projection}.weight");
            if !config.is_dense() && !matches!(input, Input::Attention | Input::Heads) {
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
            let shape = &checkpoint.need(&name)?.shape;
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

    /// Returns the linears that read `input`.
    pub fn reading(&mut self, input: Input) -> impl Iterator<Item = &mut Linear> {
        self.linears.iter_mut().filter(move |linear| linear.input == input)
    }
}

/// Reads a vector of `len` values.
pub(super) fn vector(reader: &mut WeightReader<'_>, name: String, len: usize) -> Result<Buf> {
    let mut values = Buf::zeros(len);
    reader.read(&TensorSpec::norm(name, len), &mut values)?;
    Ok(values)
}

/// A projection of neurons to outputs, packed.
///
/// ```
/// use dsmoe_core::calibrate::Down;
/// use dsmoe_kernels::Precision;
///
/// // Two outputs of three neurons, with a bias.
/// let down = Down::new(Precision::F32, &[1.0, 0.0, 2.0, 0.0, 1.0, 0.0], 3, Some(&[0.5, 0.0]));
/// let mut y = [0.0; 2];
/// down.forward(&mut y, &[1.0, 2.0, 3.0]);
/// assert_eq!(y, [7.5, 2.0]);
/// ```
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
