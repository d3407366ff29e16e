//! Sparsity loss of one layer (eqs. 17-19); the caller averages over layers.
//!
//! ```text
//! Active   L = 1/(T n) sum over tokens and experts of q m      the paper's: G stands in eq. 19, not q
//! All      L = 1/(T n) sum over tokens and experts of q        the mean gate, which also moves shut gates
//! ```
//! [`SparsityOver::Held`] is the gradient of `All` with a weight of the layer's own in addition: the one at which its gates as
//! a whole are neither opened nor closed. It is for gates whose thresholds hold the share, which a common shift of all logits
//! would only make move.
//!
//! The value is that of the sigmoid gate also where gates are binary. Sums are in f64 and in one order.

use crate::Routed;

/// Gates that the sparsity loss counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SparsityOver {
    /// Active ones (eq. 19): a shut gate gets no gradient.
    Active,
    /// Every gate.
    All,
    /// Every gate, with a further weight at which the logits' gradients of a layer sum to 0.
    Held,
}

/// The sparsity term of a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SparsityGrad {
    /// Derivative of the total loss by one counted gate: the loss's weight / (layers * tokens * experts).
    pub weight: f32,
    /// The gates counted.
    pub over: SparsityOver,
}

/// Computes the sparsity loss of the layer, in 0..=1; 0 without tokens. [`crate::ste::backward`] holds its gradient.
pub fn loss(routed: &Routed, over: SparsityOver) -> f64 {
    let counted = |active: bool| active || over != SparsityOver::Active;
    let pairs = routed.gates.iter().zip(&routed.mask);
    let sum: f64 = pairs.filter(|(_, active)| counted(**active)).map(|(&q, _)| f64::from(q)).sum();
    sum / routed.gates.len().max(1) as f64
}
