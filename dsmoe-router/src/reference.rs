//! The definition of the router, in f64 loops. Nothing else defines it again: the f32 code is tested against this.
//!
//! All arrays are row-major `[T, n]` with n = `config.num_experts`.

use crate::sparsity::SparsityOver;
use crate::{GateValue, Rescale, RouterConfig, ZeroActive};

/// [`crate::Routed`] in f64, dense.
///
/// ```
/// use dsmoe_router::RouterConfig;
/// use dsmoe_router::reference::{RoutedF64, route};
///
/// let RoutedF64 { mask, coef, .. } = route(&RouterConfig::new(2), &[1.0, -1.0]);
/// assert_eq!(mask, [true, false]);
/// assert_eq!(coef, [1.0 / (1.0 + (-1.0f64).exp()), 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RoutedF64 {
    /// q `[T, n]`.
    pub gates: Vec<f64>,
    /// m `[T, n]`.
    pub mask: Vec<bool>,
    /// c S `[T, n]`, 0 where inactive.
    pub coef: Vec<f64>,
}

/// Computes gates, mask and coefficients of `logits`.
///
/// # Panics
/// `logits` is not a number of rows of `config.num_experts`.
pub fn route(config: &RouterConfig, logits: &[f64]) -> RoutedF64 {
    // eq. 7, on logits: q > tau is z > logit(tau).
    let bar = if config.threshold == 0.0 { None } else { Some(config.threshold_logit()) };
    route_above(config, bar, 0.0, logits)
}

/// Does as [`route`] with another bar for the logits, without it every gate is open, and another centre of binary gates.
///
/// # Panics
/// Those of [`route`].
pub fn route_above(config: &RouterConfig, bar: Option<f64>, centre: f64, logits: &[f64]) -> RoutedF64 {
    let n = config.num_experts;
    assert_eq!(logits.len() % n, 0, "route: {} logits for {n} experts", logits.len());

    // q = sigmoid(z), for binary gates around the centre.
    let centre = if config.gate_value == GateValue::Binary { centre } else { 0.0 };
    let gates: Vec<f64> = logits.iter().map(|z| 1.0 / (1.0 + (centre - z).exp())).collect();

    let mut mask: Vec<bool> = logits.iter().map(|&z| bar.is_none_or(|bar| z > bar)).collect();

    if config.zero_active == ZeroActive::ForceArgmax {
        for (mask, z) in mask.chunks_mut(n).zip(logits.chunks(n)) {
            if !mask.contains(&true) {
                let best = (0..n).reduce(|best, i| if z[i] > z[best] { i } else { best }).expect("an expert");
                mask[best] = true;
            }
        }
    }

    // c S, with S = G in value (eq. 10) and c of eq. 8.
    let mut coef = vec![0.0; logits.len()];
    for (t, mask) in mask.chunks(n).enumerate() {
        for i in 0..n {
            let value = if config.gate_value == GateValue::Binary { 1.0 } else { gates[t * n + i] };
            coef[t * n + i] = if mask[i] { scale(config, mask) * value } else { 0.0 };
        }
    }
    RoutedF64 { gates, mask, coef }
}

/// Returns c of one token (eq. 8).
fn scale(config: &RouterConfig, mask: &[bool]) -> f64 {
    let k = mask.iter().filter(|m| **m).count();
    match config.rescale {
        Rescale::None => 1.0,
        Rescale::Eq8 => mask.len() as f64 / k.max(1) as f64,
    }
}

/// Computes the gradient by the logits from the gradient `dcoef` by the coefficient of every pair and the derivative
/// `weight` of the loss by each gate that the sparsity loss counts ([`crate::ste::backward`] states the formulas).
///
/// # Panics
/// The lengths differ.
pub fn backward(
    config: &RouterConfig,
    routed: &RoutedF64,
    dcoef: &[f64],
    weight: f64,
    over: SparsityOver,
) -> Vec<f64> {
    let n = config.num_experts;
    assert_eq!(dcoef.len(), routed.gates.len(), "backward: dcoef and gates");
    let mut dlogits = vec![0.0; dcoef.len()];
    for (t, mask) in routed.mask.chunks(n).enumerate() {
        for i in 0..n {
            let q = routed.gates[t * n + i];
            // forward: coef = c S; S passes the gradient to q everywhere (eq. 10), G only where active.
            let ds_dq = match (config.ste, config.gate_value) {
                (true, _) => 1.0,
                (false, GateValue::Sigmoid) => f64::from(u8::from(mask[i])),
                (false, GateValue::Binary) => 0.0,
            };
            let mut dq = dcoef[t * n + i] * scale(config, mask) * ds_dq;
            // forward: loss += weight * sum of the counted gates.
            if mask[i] || over != SparsityOver::Active {
                dq += weight;
            }
            // forward: q = sigmoid(z).
            dlogits[t * n + i] = dq * q * (1.0 - q);
        }
    }
    if over == SparsityOver::Held {
        // The weight of the sum of q at which the rest of the gradients sums to 0, in addition to `weight`.
        let slope = |q: f64| q * (1.0 - q);
        let slopes: f64 = routed.gates.iter().map(|&q| slope(q)).sum();
        let held = weight - dlogits.iter().sum::<f64>() / slopes.max(f64::MIN_POSITIVE);
        dlogits.iter_mut().zip(&routed.gates).for_each(|(dz, &q)| *dz += held * slope(q));
    }
    dlogits
}

/// Returns the sum of the logits' gradients without a sparsity loss, and what each unit of a weight of all gates adds to it.
pub fn pull(config: &RouterConfig, routed: &RoutedF64, dcoef: &[f64]) -> [f64; 2] {
    let force = backward(config, routed, dcoef, 0.0, SparsityOver::All).iter().sum();
    [force, routed.gates.iter().map(|q| q * (1.0 - q)).sum()]
}

/// Computes the sparsity loss of the layer: mean over tokens and experts of G (`Active`) or q (`All`); 0 without
/// tokens.
pub fn sparsity(routed: &RoutedF64, over: SparsityOver) -> f64 {
    let mut sum = 0.0;
    for (q, active) in routed.gates.iter().zip(&routed.mask) {
        if *active || over != SparsityOver::Active {
            sum += q;
        }
    }
    sum / routed.gates.len().max(1) as f64
}
