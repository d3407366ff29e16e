//! The straight-through estimator (eq. 10): the one place where a gradient is not a derivative.

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::gate::scale;
use crate::sparsity::{Pull, SparsityGrad, SparsityOver};
use crate::{GateValue, Routed, RouterConfig};

/// Sets `dlogits` `[T, n]`, the gradient of the loss by the router logits. Returns what its sum is without the sparsity loss, and
/// what each unit of [`SparsityGrad::weight`] over all gates adds to it.
///
/// `dcoefficients` `[T, n]` is the gradient by the coefficient of *every* pair, `<dy_t, o_i(x_t)>`, inactive ones
/// included: an inactive expert's output counts in the router's gradient although it does not in the forward pass. Those of
/// inactive pairs may be estimates ([`crate::estimator`]).
///
/// ```text
/// forward          S = sg(G) + q - sg(q)                     eq. 10: value G = q m (or m), derivative 1 everywhere
///                  y = sum_i c S_i o_i                       eq. 11, c of eq. 8 a constant
/// with STE         dq = c dcoefficient                       eq. 16, active or not
/// without          dq = c dcoefficient m                     sigmoid gates: the derivative of G
///                  dq = 0                                    binary gates
/// sparsity         dq += weight m   or   weight              Active (eq. 19) or All
///                  dq += weight - sum dq q (1 - q) / sum q (1 - q)     Held, sums over tokens and experts
///                  dz = dq q (1 - q)
/// ```
///
/// # Panics
/// The shapes differ from those of `routed`.
pub fn backward(
    config: &RouterConfig,
    routed: &Routed,
    dcoefficients: ArrayView2<'_, f32>,
    sparsity: SparsityGrad,
    mut dlogits: ArrayViewMut2<'_, f32>,
) -> Pull {
    let shape = routed.gates.dim();
    let dims = [dcoefficients.dim(), dlogits.dim()];
    assert_eq!(dims, [shape; 2], "ste::backward: dcoefficients and dlogits of gates {shape:?}");
    let mut pull = Pull::default();
    for (t, mut dz) in dlogits.outer_iter_mut().enumerate() {
        let mask = routed.mask.row(t);
        let scale = scale(config, mask);
        for (i, dz) in dz.iter_mut().enumerate() {
            let (q, active) = (routed.gates[[t, i]], mask[i]);
            let passes = config.ste || (active && config.gate_value == GateValue::Sigmoid);
            let mut dq = if passes { scale * dcoefficients[[t, i]] } else { 0.0 };
            pull.force += f64::from(dq * q * (1.0 - q));
            pull.slope += f64::from(q * (1.0 - q));
            if active && sparsity.over == SparsityOver::Active || sparsity.over == SparsityOver::All {
                dq += sparsity.weight;
            }
            *dz = dq * q * (1.0 - q);
        }
    }
    if sparsity.over == SparsityOver::Held && pull.slope > 0.0 {
        let dq = (f64::from(sparsity.weight) - pull.force / pull.slope) as f32;
        dlogits.zip_mut_with(&routed.gates, |dz, &q| *dz += dq * q * (1.0 - q));
    }
    pull
}
