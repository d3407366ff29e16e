//! The gated FFN of a dense model.

use std::any::Any;

use dsmoe_kernels::Precision;
use dsmoe_kernels::expert_ffn::{self, PackedWeights, Saved};

use super::{
    DeviceFfn, Ffn, FfnBackward, FfnForward, FfnInference, FfnKind, FfnReport, FfnScratch, Gated, PackedFfn,
    add_output_bias,
};
use crate::params::TensorSpec;

/// [`Gated`] as it is.
///
/// ```
/// use dsmoe_core::ffn::{DenseFfn, Ffn, Gated};
/// use dsmoe_kernels::Activation;
///
/// let gated = Gated { activation: Activation::GeluTanh, ..Gated::silu(16, 32) };
/// let ffn = DenseFfn::of(gated);
/// assert_eq!(ffn.num_experts(), None);
/// assert_eq!(ffn.tensors().len(), gated.tensors().len());
/// ```
#[derive(Clone, Debug)]
pub struct DenseFfn(Gated);

impl DenseFfn {
    /// Makes LLaMA's FFN for inputs of width `hidden` with `intermediate` neurons.
    pub fn new(hidden: usize, intermediate: usize) -> DenseFfn {
        DenseFfn(Gated::silu(hidden, intermediate))
    }

    /// Makes the FFN of any family.
    pub fn of(gated: Gated) -> DenseFfn {
        DenseFfn(gated)
    }
}

/// A dense FFN for inference.
#[derive(Debug)]
struct PackedDense {
    gated: Gated,
    weights: PackedWeights,
    /// The bias of the output; empty where there is none.
    output_bias: Vec<f32>,
}

impl PackedFfn for PackedDense {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, scratch, .. } = args;
        expert_ffn::ForwardPacked {
            y,
            x,
            weights: &self.weights,
            pairs: expert_ffn::Pairs::Dense,
            dims: self.gated.dims(x.len() / self.gated.hidden),
            scratch: &mut scratch.experts,
        }
        .run();
        add_output_bias(y, &self.output_bias);
    }

    fn bytes(&self) -> usize {
        self.weights.bytes() + 4 * self.output_bias.len()
    }
}

impl Ffn for DenseFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.0.tensors()
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Dense)
    }

    fn on_device(&self) -> Option<DeviceFfn> {
        Some(DeviceFfn::Dense(self.0))
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let weights = PackedWeights::new(precision, &self.0.weights(params), self.0.dims(0));
        Box::new(PackedDense { gated: self.0, weights, output_bias: self.0.output_bias(params).to_vec() })
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        Box::new(Saved::with_room(self.0.dims(tokens)))
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.0.dims(tokens));
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, scratch, .. } = args;
        let saved = saved.downcast_mut::<Saved>().expect("saved by a dense FFN");
        expert_ffn::ForwardTrain {
            y,
            saved,
            x,
            weights: &self.0.weights(params),
            pairs: expert_ffn::Pairs::Dense,
            dims: self.0.dims(x.len() / self.0.hidden),
            scratch: &mut scratch.experts,
        }
        .run();
        add_output_bias(y, self.0.output_bias(params));
        FfnReport::default()
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, scratch, .. } = args;
        let saved = saved.downcast_mut::<Saved>().expect("saved by a dense FFN");
        self.0.add_output_bias_grad(grads, dy);
        expert_ffn::Backward {
            dx,
            dcoefficients: None,
            grads: self.0.grads(grads),
            dy,
            saved,
            x,
            weights: &self.0.weights(params),
            pairs: expert_ffn::Pairs::Dense,
            dims: self.0.dims(x.len() / self.0.hidden),
            scratch: &mut scratch.experts,
        }
        .run();
    }
}
