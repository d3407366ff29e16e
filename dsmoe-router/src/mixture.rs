//! Routing of models that were trained as mixtures of experts (Mixtral, Qwen-MoE, OLMoE).
//!
//! ```text
//! probabilities  p = softmax of the logits z over all n experts
//! selected       the k largest of a token, lower expert index first among equals
//! coefficients   c_e = u_e p_e of the selected; renormalised: u_e p_e / sum over the selected of u p
//!                  u = 1, or the factor of an expert that fades out
//! balance loss   weight n sum over experts of f_e P_e
//!                  f_e = tokens that run e / T, P_e = mean over tokens of p_e      (Fedus et al. 2021)
//! gradients      with a_e = dc_e for the selected, 0 for the others
//!                  plain         dz_j = p_j (u_j a_j - sum_e u_e a_e p_e)
//!                  renormalised  dz_j = c_j (a_j - sum_e a_e c_e) for the selected, 0 for the others
//!                  balance       dz_j += weight n / T p_j (f_j - sum_e f_e p_e)
//! ```
//! The selection is held fixed in gradients, and so are the counts f. Sums are in f64.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use crate::{Error, Fade, Result, Routing};

/// Settings of the router of a mixture.
///
/// ```
/// use dsmoe_router::Fade;
/// use dsmoe_router::mixture::{MixtureConfig, MixtureRouted, route};
/// use ndarray::array;
///
/// let config = MixtureConfig::new(4, 2, true)?;
/// let routed: MixtureRouted = route(&config, array![[3.0, 0.0, 2.0, 1.0]].view(), Fade::NONE);
/// assert_eq!(routed.routing.offsets, [0, 1, 1, 2, 2]);
/// assert!((routed.routing.coefficients.iter().sum::<f32>() - 1.0).abs() < 1e-6);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixtureConfig {
    /// Experts that are chosen from (n).
    pub num_experts: usize,
    /// Experts chosen for each token (k).
    pub top_k: usize,
    /// True if the coefficients of a token are scaled to add up to 1.
    pub renormalise: bool,
}

/// The routing of one layer; kept for the backward pass.
///
/// ```
/// use dsmoe_router::Fade;
/// use dsmoe_router::mixture::{MixtureConfig, MixtureRouted, balance_loss, route};
/// use ndarray::array;
///
/// let config = MixtureConfig::new(2, 1, false)?;
/// let routed: MixtureRouted = route(&config, array![[2.0, 0.0], [0.0, 2.0]].view(), Fade::NONE);
/// // A coefficient is the probability of the selected expert.
/// assert_eq!(routed.routing.coefficients[0], routed.probabilities[[0, 0]] as f32);
/// // Each expert runs for one token, so that the loss has its least value, k.
/// assert!((balance_loss(&routed) - 1.0).abs() < 1e-12);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MixtureRouted {
    /// p `[T, n]`.
    pub probabilities: Array2<f64>,
    /// The selected pairs with their coefficients.
    pub routing: Routing,
    /// u p of the selected, 0 of the others, `[T, n]`; none where no expert fades out.
    faded: Option<Array2<f64>>,
}

impl MixtureRouted {
    /// Returns u p of a selected pair.
    fn value(&self, t: usize, e: usize) -> f64 {
        self.faded.as_ref().unwrap_or(&self.probabilities)[[t, e]]
    }
}

impl MixtureConfig {
    /// Makes a router of `num_experts` of which every token runs `top_k`.
    ///
    /// # Errors
    /// `top_k` is not in 1..=num_experts.
    pub fn new(num_experts: usize, top_k: usize, renormalise: bool) -> Result<MixtureConfig> {
        if !(1..=num_experts).contains(&top_k) {
            return Err(Error::range("top_k", top_k, format!("1 to the number of experts, {num_experts}")));
        }
        Ok(MixtureConfig { num_experts, top_k, renormalise })
    }

    /// Returns the sum that coefficients of a token are divided by.
    fn divisor(&self, routed: &MixtureRouted, t: usize) -> f64 {
        if !self.renormalise {
            return 1.0;
        }
        selected(&routed.routing, t).map(|(_, e)| routed.value(t, e)).sum()
    }
}

/// Returns the slots of a token and their experts.
fn selected(routing: &Routing, t: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
    let slots = &routing.slots[routing.token_offsets[t]..routing.token_offsets[t + 1]];
    slots.iter().map(|&slot| {
        let slot = slot as usize;
        (slot, routing.offsets.partition_point(|&start| start <= slot) - 1)
    })
}

/// Routes tokens by their `logits` `[T, n]`, with experts that fade out.
///
/// # Panics
/// The shapes do not fit; `top_k` is not in 1..=num_experts.
pub fn route(config: &MixtureConfig, logits: ArrayView2<'_, f32>, fade: Fade) -> MixtureRouted {
    let ((num_tokens, n), k) = (logits.dim(), config.top_k);
    let fits = n == config.num_experts && (1..=n).contains(&k);
    assert!(fits, "mixture::route: logits [{num_tokens}, {n}] for {config:?}");
    let mut probabilities = logits.mapv(f64::from);
    let mut mask = Array2::from_elem((num_tokens, n), false);
    let mut divisors = vec![1.0; num_tokens];
    let mut faded = (fade.kept < k).then(|| Array2::zeros((num_tokens, n)));
    let mut order: Vec<usize> = Vec::with_capacity(n);
    for (t, z) in logits.outer_iter().enumerate() {
        order.clear();
        order.extend(0..n);
        order.sort_unstable_by(|&a, &b| z[b].total_cmp(&z[a]).then(a.cmp(&b)));
        let mut p = probabilities.row_mut(t);
        let most = f64::from(z[order[0]]);
        p.mapv_inplace(|z| (z - most).exp());
        let sum: f64 = p.sum();
        p.mapv_inplace(|p| p / sum);
        if config.renormalise {
            divisors[t] = order[..k].iter().enumerate().map(|(rank, &e)| fade.at(rank) * p[e]).sum();
        }
        for (rank, &e) in order[..k].iter().enumerate() {
            mask[[t, e]] = true;
            if let Some(faded) = &mut faded {
                faded[[t, e]] = fade.at(rank) * p[e];
            }
        }
    }
    let values = faded.as_ref().unwrap_or(&probabilities);
    let routing = Routing::from_mask(mask.view(), |t, e| (values[[t, e]] / divisors[t]) as f32);
    MixtureRouted { probabilities, routing, faded }
}

/// Returns the shares f of tokens that run each expert.
fn shares(routed: &MixtureRouted) -> Vec<f64> {
    let tokens = routed.routing.num_tokens.max(1) as f64;
    routed.routing.counts().map(|count| count as f64 / tokens).collect()
}

/// Computes n sum f P, which is k where all experts are used alike.
pub fn balance_loss(routed: &MixtureRouted) -> f64 {
    let (tokens, n) = routed.probabilities.dim();
    let mean = |e: usize| routed.probabilities.column(e).sum() / tokens.max(1) as f64;
    n as f64 * shares(routed).iter().enumerate().map(|(e, f)| f * mean(e)).sum::<f64>()
}

/// Sets `dlogits` `[T, n]`. `dcoefficients` `[T, n]` is the gradient by the coefficients, read for selected pairs alone;
/// `balance_weight` the weight of [`balance_loss`] in the loss.
///
/// # Panics
/// The shapes differ from those of `routed`.
pub fn backward(
    config: &MixtureConfig,
    routed: &MixtureRouted,
    dcoefficients: ArrayView2<'_, f32>,
    balance_weight: f64,
    mut dlogits: ArrayViewMut2<'_, f32>,
) {
    let (tokens, n) = routed.probabilities.dim();
    let dims = [dcoefficients.dim(), dlogits.dim()];
    assert_eq!(dims, [(tokens, n); 2], "mixture::backward: dcoefficients and dlogits");
    let shares = shares(routed);
    let balance = balance_weight * n as f64 / tokens.max(1) as f64;
    let (mut dz, mut by) = (vec![0.0; n], vec![0.0; n]);
    for t in 0..tokens {
        let p = routed.probabilities.row(t);
        by.fill(0.0);
        for (_, e) in selected(&routed.routing, t) {
            by[e] = f64::from(dcoefficients[[t, e]]);
        }
        dz.fill(0.0);
        if config.renormalise {
            let sum = config.divisor(routed, t);
            let mean: f64 = selected(&routed.routing, t).map(|(_, e)| by[e] * routed.value(t, e) / sum).sum();
            for (_, e) in selected(&routed.routing, t) {
                dz[e] = routed.value(t, e) / sum * (by[e] - mean);
            }
        } else {
            let of = |e: usize| by[e] * routed.value(t, e);
            let mean: f64 = selected(&routed.routing, t).map(|(_, e)| of(e)).sum();
            for (e, dz) in dz.iter_mut().enumerate() {
                *dz = of(e) - p[e] * mean;
            }
        }
        if balance != 0.0 {
            let mean: f64 = shares.iter().zip(p).map(|(f, p)| f * p).sum();
            for (e, dz) in dz.iter_mut().enumerate() {
                *dz += balance * p[e] * (shares[e] - mean);
            }
        }
        dlogits.row_mut(t).iter_mut().zip(&dz).for_each(|(to, from)| *to = *from as f32);
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, f64s, finite_differences, normals};
    use ndarray::array;

    use super::*;

    #[test]
    fn a_token_by_hand() {
        // Softmax of (ln 4, ln 3, ln 2, ln 1) is (0.4, 0.3, 0.2, 0.1).
        let logits = array![[4.0f32.ln(), 3.0f32.ln(), 2.0f32.ln(), 0.0]];
        let plain = MixtureConfig::new(4, 2, false).unwrap();
        let routed = route(&plain, logits.view(), Fade::NONE);
        assert_eq!(routed.routing.offsets, [0, 1, 2, 2, 2]);
        assert_close("coefficients", &routed.routing.coefficients, &[0.4, 0.3], 1e-6);
        let renormalised = MixtureConfig { renormalise: true, ..plain };
        let coefficients = route(&renormalised, logits.view(), Fade::NONE).routing.coefficients;
        assert_close("renormalised", &coefficients, &[4.0 / 7.0, 3.0 / 7.0], 1e-6);
        // The second expert at half of its weight.
        let half = Fade { kept: 1, factor: 0.5 };
        let coefficients = route(&renormalised, logits.view(), half).routing.coefficients;
        assert_close("faded", &coefficients, &[0.4 / 0.55, 0.15 / 0.55], 1e-6);
        assert_close(
            "faded, plain",
            &route(&plain, logits.view(), half).routing.coefficients,
            &[0.4, 0.15],
            1e-6,
        );
        // At 0 the coefficients are those of a smaller k.
        let gone = route(&renormalised, logits.view(), Fade { factor: 0.0, ..half }).routing.coefficients;
        assert_eq!(gone, [1.0, 0.0]);
        // One token: f = (1, 1, 0, 0), P = p.
        assert!((balance_loss(&routed) - 4.0 * 0.7).abs() < 1e-6);
        // Equal logits: the experts of the lowest indices, and the loss of even use is not below k.
        let even = route(&plain, array![[0.0f32, 0.0, 0.0, 0.0]].view(), Fade::NONE);
        assert_eq!(even.routing.offsets, [0, 1, 2, 2, 2]);
        assert!((balance_loss(&even) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn k_is_from_one_to_n() {
        for k in [0, 5] {
            let error = MixtureConfig::new(4, k, true).unwrap_err().to_string();
            assert!(error.contains("top_k") && error.contains('4'), "{error}");
        }
    }

    #[test]
    fn gradients_are_differences_of_the_formulas() {
        const TOKENS: usize = 5;
        const EXPERTS: usize = 6;
        let logits = normals(TOKENS * EXPERTS, 3);
        let by = normals(TOKENS * EXPERTS, 4);
        let (z, a) = (
            ArrayView2::from_shape((TOKENS, EXPERTS), &logits[..]).unwrap(),
            ArrayView2::from_shape((TOKENS, EXPERTS), &by[..]).unwrap(),
        );
        let half = Fade { kept: 1, factor: 0.4 };
        for (renormalise, weight, fade) in [
            (false, 0.0, Fade::NONE),
            (false, 0.7, Fade::NONE),
            (true, 0.0, Fade::NONE),
            (true, 0.7, Fade::NONE),
            (false, 0.7, half),
            (true, 0.7, half),
        ] {
            let config = MixtureConfig::new(EXPERTS, 2, renormalise).unwrap();
            let routed = route(&config, z, fade);
            let shares = shares(&routed);
            let mut got = Array2::zeros((TOKENS, EXPERTS));
            backward(&config, &routed, a, weight, got.view_mut());
            // The loss for the pairs that are selected at `logits`.
            let loss = |z: &[f64]| {
                let mut loss = 0.0;
                for (t, z) in z.chunks_exact(EXPERTS).enumerate() {
                    let sum: f64 = z.iter().map(|z| z.exp()).sum();
                    let mut chosen: Vec<usize> = selected(&routed.routing, t).map(|(_, e)| e).collect();
                    chosen.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
                    let factors = [1.0, fade.factor];
                    let parts = chosen.iter().zip(factors).map(|(&e, factor)| (e, factor * z[e].exp() / sum));
                    let of: f64 = parts.clone().map(|(_, part)| part).sum();
                    let of = if renormalise { of } else { 1.0 };
                    loss += parts.map(|(e, part)| f64::from(a[[t, e]]) * part / of).sum::<f64>();
                    let used: f64 = z.iter().zip(&shares).map(|(z, f)| f * z.exp() / sum).sum();
                    loss += weight * EXPERTS as f64 * used / TOKENS as f64;
                }
                loss
            };
            let want = finite_differences(&f64s(&logits), 1e-5, loss);
            assert_close("dlogits", got.as_slice().unwrap(), &want, 1e-6);
        }
    }
}
