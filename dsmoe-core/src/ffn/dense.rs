//! The SwiGLU FFN of a dense LLaMA.

use std::any::Any;

use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Saved, WeightGrads, Weights};
use dsmoe_kernels::{Activation, Precision};

use super::{
    DeviceFfn, Ffn, FfnBackward, FfnForward, FfnInference, FfnKind, FfnReport, FfnScratch, PackedFfn,
    projections, split, split_mut,
};
use crate::params::TensorSpec;

/// `y = (silu(x W_gate^T) * (x W_up^T)) W_down`.
#[derive(Clone, Debug)]
pub struct DenseFfn {
    hidden: usize,
    intermediate: usize,
}

impl DenseFfn {
    /// Makes the FFN for inputs of width `hidden` with `intermediate` neurons.
    pub fn new(hidden: usize, intermediate: usize) -> DenseFfn {
        DenseFfn { hidden, intermediate }
    }

    fn dims(&self, tokens: usize) -> Dims {
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        Dims { tokens, hidden, intermediate, num_experts: 1, all_pairs: true, activation: Activation::Silu }
    }

    fn lens(&self) -> [usize; 3] {
        [self.hidden * self.intermediate; 3]
    }
}

/// A dense FFN for inference.
#[derive(Debug)]
struct PackedDense(PackedWeights);

impl PackedFfn for PackedDense {
    fn forward(&self, args: FfnInference<'_>) {
        let FfnInference { y, x, scratch, .. } = args;
        let tokens = x.len() / self.0.hidden();
        expert_ffn::ForwardPacked {
            y,
            x,
            weights: &self.0,
            pairs: expert_ffn::Pairs::Dense,
            dims: expert_ffn::Dims::dense(tokens, self.0.hidden(), self.0.intermediate(), Activation::Silu),
            scratch: &mut scratch.experts,
        }
        .run();
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl Ffn for DenseFfn {
    fn tensors(&self) -> Vec<TensorSpec> {
        projections(self.hidden, self.intermediate)
    }

    fn kind(&self) -> Option<FfnKind> {
        Some(FfnKind::Dense)
    }

    fn on_device(&self) -> Option<DeviceFfn> {
        Some(DeviceFfn::Dense { hidden: self.hidden, intermediate: self.intermediate })
    }

    fn pack(&self, params: &[f32], precision: Precision) -> Box<dyn PackedFfn> {
        let [gate, up, down] = split(params, self.lens());
        let weights = Weights { gate, up, down, biases: None };
        Box::new(PackedDense(PackedWeights::new(precision, &weights, self.hidden, self.intermediate, 1)))
    }

    fn new_saved(&self, tokens: usize) -> Box<dyn Any + Send> {
        Box::new(Saved::with_room(self.dims(tokens)))
    }

    fn reserve(&self, scratch: &mut FfnScratch, tokens: usize) {
        scratch.experts.reserve(self.dims(tokens));
    }

    fn forward_train(&self, args: FfnForward<'_>) -> FfnReport {
        let FfnForward { y, saved, x, params, scratch, .. } = args;
        let saved = saved.downcast_mut::<Saved>().expect("saved by a dense FFN");
        let [gate, up, down] = split(params, self.lens());
        let tokens = x.len() / self.hidden;
        let weights = Weights { gate, up, down, biases: None };
        expert_ffn::ForwardTrain {
            y,
            saved,
            x,
            weights: &weights,
            pairs: expert_ffn::Pairs::Dense,
            dims: expert_ffn::Dims::dense(tokens, self.hidden, self.intermediate, Activation::Silu),
            scratch: &mut scratch.experts,
        }
        .run();
        FfnReport::default()
    }

    fn backward(&self, args: FfnBackward<'_>) {
        let FfnBackward { dx, grads, dy, saved, x, params, scratch, .. } = args;
        let saved = saved.downcast_mut::<Saved>().expect("saved by a dense FFN");
        let [gate, up, down] = split(params, self.lens());
        let [dgate, dup, ddown] = split_mut(grads, self.lens());
        let tokens = x.len() / self.hidden;
        expert_ffn::Backward {
            dx,
            dcoefficients: None,
            grads: WeightGrads { gate: dgate, up: dup, down: ddown, biases: None },
            dy,
            saved,
            x,
            weights: &Weights { gate, up, down, biases: None },
            pairs: expert_ffn::Pairs::Dense,
            dims: expert_ffn::Dims::dense(tokens, self.hidden, self.intermediate, Activation::Silu),
            scratch: &mut scratch.experts,
        }
        .run();
    }
}
