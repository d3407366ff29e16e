//! Gated expert FFN: experts of gated neurons that are row ranges of one dense FFN, computed for the active pairs alone.
//!
//! ```text
//! forward   a = x Wg^T (+ bg),  b = x Wu^T (+ bu),  c = act(a) * b    [T, intermediate]
//!           o_i = c_i Wd_i                                            expert i = rows i*w..(i+1)*w
//!           y_t = sum over active i of coef[t,i] * o_i(x_t) (+ bd)    set (eqs. 6, 11)
//! backward  B = dy Wd^T                                               [T, intermediate]
//!           dcoef[t,i] = sum over j of expert i of c[t,j] B[t,j]      set; of every pair when `all_pairs` (eq. 16)
//!           dc = coef * B                                             active pairs
//!           dWd_i += (coef c_i)^T dy                                  added to (eq. 13)
//!           da = dc * b * act'(a),   dWg_i += da^T x                  added to (eq. 14)
//!           db = dc * act(a),        dWu_i += db^T x                  added to (eq. 15)
//!           dx = da Wg + db Wu                                        set
//!           dbg += sum of da, dbu += sum of db, over active pairs; dbd += sum over t of dy_t
//! ```
//! act is silu or another [`Activation`](crate::Activation). The biases are optional; that of the down projection belongs to
//! no expert and is added once to every token.
//!
//! `w_down` is kept transposed, `[intermediate, hidden]`: a neuron is one row of all three matrices. f32
//! accumulation. A token without an active expert gets `y = 0` (or `bd`) and `dx = 0`.
//!
//! The leading `core` experts run for every token with coefficient 1. They are one dense FFN, with no routing, no
//! coefficients and no dcoef; the experts outside the core add to its y and dx.
//!
//! Work is cut by shape and routing alone and experts are summed in ascending order, so the result does not
//! depend on the number of threads. [`Pairs::Dense`] is the same op with one expert, always active with coefficient 1:
//! the dense FFN.
//!
//! [`PairDots`] computes dcoef of chosen pairs alone, which need not be active.
//!
//! `train.rs` has the passes of training, which keep a and b ([`Saved`]), and `infer.rs` the forward over packed weights:
//! that of the dense FFN, and in `open.rs` that of experts. Dense passes end in the combine of `combine.rs`, those over
//! experts in the sum of `strips.rs`, which adds the experts' outputs to the rows of their tokens.

mod combine;
mod dims;
mod dots;
mod infer;
mod kernel;
mod open;
mod outer;
mod packed;
mod plan;
pub mod reference;
mod scratch;
mod strips;
#[cfg(test)]
mod tests;
mod train;

pub use dims::{BiasGrads, Biases, Dims, Routes, Saved, WeightGrads, Weights};
pub use dots::PairDots;
pub use infer::ForwardPacked;
pub use packed::PackedWeights;
pub use plan::Pairs;
pub use scratch::Scratch;
pub use train::{Backward, ForwardTrain};
