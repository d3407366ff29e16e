//! The tensors of an FFN in its part of an arena.

use crate::params::{TensorSpec, padded};

/// Returns the length of `tensors` in the arena.
pub fn block_len(tensors: &[TensorSpec]) -> usize {
    let len = tensors.iter().fold(0, |len, tensor| {
        let start = if tensor.joined { len } else { padded(len) };
        start + tensor.numel()
    });
    padded(len)
}

/// Returns the views of tensors with `lens` values in an FFN's part of an arena.
///
/// # Panics
/// The block is shorter than the tensors.
pub fn split<const N: usize>(mut block: &[f32], lens: [usize; N]) -> [&[f32]; N] {
    lens.map(|len| {
        let (tensor, rest) = block.split_at(padded(len));
        block = rest;
        &tensor[..len]
    })
}

/// Does as [`split`] for gradients.
///
/// # Panics
/// Those of [`split`].
pub fn split_mut<const N: usize>(block: &mut [f32], lens: [usize; N]) -> [&mut [f32]; N] {
    let mut rest = block;
    lens.map(|len| {
        let (tensor, tail) = std::mem::take(&mut rest).split_at_mut(padded(len));
        rest = tail;
        &mut tensor[..len]
    })
}

/// Name of the bias of the down projection. It belongs to no expert: every token gets it once.
pub(crate) const DOWN_BIAS: &str = "down_proj.bias";
/// Name of the bias of the FFN's output, in a model without biases of projections.
pub(crate) const OUTPUT_BIAS: &str = "output_bias";

/// Returns the three projections every FFN here has, `[intermediate, hidden]` each, the down projection transposed.
pub fn projections(hidden: usize, intermediate: usize) -> Vec<TensorSpec> {
    vec![
        TensorSpec::matrix("gate_proj.weight", intermediate, hidden),
        TensorSpec::matrix("up_proj.weight", intermediate, hidden),
        TensorSpec::matrix("down_proj.weight", intermediate, hidden).transposed(),
    ]
}
