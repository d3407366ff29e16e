//! The start from a dense model and calibration text: experts of similar neurons, and routers that open the experts
//! whose outputs are large (see [`dsmoe_router::init::calibrated`]).

use std::path::Path;
use std::sync::Arc;

use dsmoe_kernels::comm::Communicator;
use dsmoe_kernels::linear;
use dsmoe_kernels::matmul::Precision;
use dsmoe_router::RouterValues;
use dsmoe_router::init::calibrated;

use super::ConvertProgress;
use crate::calibrate::{Input, LayerStream, LayerWeights, check_router_text};
use crate::error::{Error, Result};
use crate::partition::{Partition, check_divisible, clusters};

/// FFN inputs that a router is fitted to; of more inputs an even choice is taken.
const MOST_INPUTS: usize = 16_384;

/// Text that routers are fitted to.
///
/// ```
/// use dsmoe_core::convert::{Calibration, ConvertOptions, RouterStart};
///
/// // Routers that predict which half of the experts gives the largest outputs for these tokens.
/// let calibration = Calibration { sequences: vec![vec![1, 5, 9, 2]; 512], active: 0.5 };
/// let options =
///     ConvertOptions { routers: RouterStart::Calibrated(calibration), ..ConvertOptions::new(8) };
/// assert_eq!(options.router.num_experts, 8);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// Token ids of sequences of one length.
    pub sequences: Vec<Vec<u32>>,
    /// The share of experts that the routers open on the text.
    pub active: f64,
}

/// Forms experts of similar neurons in every layer of the dense model in `dir`: balanced k-means on the rows of
/// `gate_proj`.
pub(super) fn partitions(
    dir: &Path,
    num_experts: usize,
    seed: u64,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<Vec<Partition>> {
    let stream = LayerStream::open(dir, &[])?;
    let config = stream.config();
    let total = config.num_layers as u64;
    let of_layer = |i: usize| {
        progress(ConvertProgress { stage: "experts", done: i as u64, total });
        let [.., gate, _, _] = stream.layer(i)?.linears;
        check_divisible(gate.outputs, num_experts, None)?;
        let (order, _) = clusters::neurons(gate.weight.to_vec(), gate.inputs, num_experts, seed);
        Partition::from_order(order, num_experts)
    };
    (0..config.num_layers).map(of_layer).collect()
}

/// Fits the routers of the dense model in `dir`, cut by `partitions`.
pub(super) fn routers(
    comm: &Arc<dyn Communicator>,
    dir: &Path,
    partitions: &[Partition],
    calibration: &Calibration,
    progress: &mut dyn FnMut(ConvertProgress),
) -> Result<Vec<RouterValues>> {
    let tokens = check_router_text(&calibration.sequences)?;
    let mut stream = LayerStream::open_on(comm, dir, &calibration.sequences)?;
    let mut routers = Vec::with_capacity(partitions.len());
    for (i, partition) in partitions.iter().enumerate() {
        progress(ConvertProgress { stage: "routers", done: i as u64, total: partitions.len() as u64 });
        let weights = stream.layer(i)?;
        let (x, scores) = examples(&mut stream, &weights, partition, tokens)?;
        let router = calibrated(&x, &scores, partition.num_experts(), calibration.active);
        routers.push(router.ok_or_else(|| Error::Calibration {
            problem: format!("the router of layer {i} cannot be fitted: the FFN's values are not finite"),
            help: "use an undamaged model".to_owned(),
        })?);
        stream.advance(&weights)?;
    }
    Ok(routers)
}

/// Collects the inputs of a layer's FFN `[tokens, hidden]` and the logarithm of the norm of each expert's output
/// `[tokens, num_experts]`, for an even choice of the calibration tokens.
fn examples(
    stream: &mut LayerStream,
    weights: &LayerWeights,
    partition: &Partition,
    tokens: usize,
) -> Result<(Vec<f32>, Vec<f64>)> {
    let (hidden, num_experts, width) =
        (stream.config().hidden, partition.num_experts(), partition.expert_width());
    let intermediate = num_experts * width;
    let (every, seq) = (tokens.div_ceil(MOST_INPUTS), stream.seq());
    let down = &weights.linears[6].weight;
    let columns = |neurons: &[u32]| -> Vec<f32> {
        let row = |row: usize| neurons.iter().map(move |&j| down[row * intermediate + j as usize]);
        (0..hidden).flat_map(row).collect()
    };
    let experts = (0..num_experts).map(|expert| partition.expert(expert));
    let experts: Vec<(Vec<u32>, Vec<f32>)> =
        experts.map(|neurons| (neurons.clone(), columns(&neurons))).collect();
    let (mut x, mut scores) = (Vec::new(), Vec::new());
    stream.forward(weights, &mut |tap| {
        let first = tap.sequence * seq;
        let chosen: Vec<usize> = (0..seq).filter(|t| (first + t).is_multiple_of(every)).collect();
        match tap.input {
            Input::Ffn => chosen.iter().for_each(|t| x.extend_from_slice(&tap.x[t * hidden..][..hidden])),
            Input::Neurons => {
                let at = scores.len();
                scores.resize(at + chosen.len() * num_experts, 0.0);
                let dims = linear::Dims {
                    rows: chosen.len(),
                    inputs: width,
                    outputs: hidden,
                    precision: Precision::F32,
                };
                let mut y = vec![0.0; chosen.len() * hidden];
                for (i, (neurons, down)) in experts.iter().enumerate() {
                    let value = |t: usize, j: u32| tap.x[t * intermediate + j as usize];
                    let values: Vec<f32> =
                        chosen.iter().flat_map(|&t| neurons.iter().map(move |&j| value(t, j))).collect();
                    linear::Forward { y: &mut y, x: &values, w: down, bias: None, dims }.run();
                    for (t, y) in y.chunks_exact(hidden).enumerate() {
                        let square: f64 = y.iter().map(|&y| f64::from(y) * f64::from(y)).sum();
                        scores[at + t * num_experts + i] =
                            0.5 * square.max(f64::from(f32::MIN_POSITIVE)).ln();
                    }
                }
            }
            Input::Attention | Input::Heads => {}
        }
    })?;
    Ok((x, scores))
}
