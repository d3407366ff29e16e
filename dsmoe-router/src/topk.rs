//! Softmax top-k routing with noise and a balance loss (LLaMA-MoE; Shazeer et al. 2017).
//!
//! ```text
//! noisy logits   h = z + e s                e ~ N(0, 1), s = softplus(raw) + 0.01; h = z without noise
//! selected       the k largest h of a token, lower expert index first among equals
//! scores         p = u exp(h) over the sum of the selected (or u for each), 0 elsewhere; u = 1, or the factor of an expert
//!                that fades out
//! coefficient    score_scale p; 1 for residual experts, which every token has besides
//! importance_i   sum over tokens of p_i
//! load_i         sum over tokens of P(i is selected when its own noise is drawn anew)
//!                  P = Phi((z_i - H) / s_i), H the (k+1)-th largest h for a selected i, the k-th for the others;
//!                  the plain count without noise or with k = n
//! balance loss   weight (cv2(importance) + cv2(load))
//! cv2(v)         var(v) / (mean(v)^2 + 1e-10), var with n - 1
//! ```
//! The selection is held fixed in gradients; everything else is differentiated, H included. Sums are in f64.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use serde::{Deserialize, Serialize};

use crate::{Error, Fade, Result, Routing};

/// Added to the softplus of the noise network.
const NOISE_FLOOR: f64 = 0.01;
const CV2_FLOOR: f64 = 1e-10;

/// Weights of the selected experts of a token.
///
/// ```
/// use dsmoe_router::Fade;
/// use dsmoe_router::topk::{Scores, TopKConfig, route};
/// use ndarray::array;
///
/// let softmax = TopKConfig::new(2, 2)?;
/// let one = TopKConfig { scores: Scores::One, ..softmax };
/// let logits = array![[0.0, 3f32.ln()]];
/// let scores = route(&softmax, logits.view(), None, Fade::NONE).scores;
/// assert!((scores[[0, 0]] - 0.25).abs() < 1e-6 && (scores[[0, 1]] - 0.75).abs() < 1e-6);
/// // Both experts in full are the dense FFN.
/// assert_eq!(route(&one, logits.view(), None, Fade::NONE).scores, array![[1.0, 1.0]]);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scores {
    /// The softmax over their logits (LLaMA-MoE).
    Softmax,
    /// 1 each (MoEfication): all experts together are then the dense FFN.
    One,
}

/// Settings of a top-k router.
///
/// ```
/// use dsmoe_router::Fade;
/// use dsmoe_router::topk::{Noise, Scores, TopKConfig, TopKRouted, noise_std, route};
/// use ndarray::array;
///
/// let config = TopKConfig { scores: Scores::One, ..TopKConfig::new(4, 2)? };
/// let logits = array![[3.0, 0.0, 2.0, 1.0]];
/// let routed: TopKRouted = route(&config, logits.view(), None, Fade::NONE);
/// assert_eq!(routed.scores, array![[1.0, 0.0, 1.0, 0.0]]);
/// // With noise another expert may be among the two.
/// let (std, draws) = (noise_std(logits.view()), array![[0.0, 0.0, -2.0, 2.0]]);
/// let noise = Noise { std: std.view(), draws: draws.view() };
/// assert_eq!(route(&config, logits.view(), Some(noise), Fade::NONE).scores, array![[1.0, 0.0, 0.0, 1.0]]);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopKConfig {
    /// Experts that are chosen from (n).
    pub num_experts: usize,
    /// Experts chosen for each token (k).
    pub top_k: usize,
    /// Experts that every token has besides, numbered after the others (LLaMA-MoE's residual experts).
    pub num_residual: usize,
    /// Weights of the chosen experts.
    pub scores: Scores,
    /// Factor on the scores: n / k in LLaMA-MoE, which gives 1/k of the dense output for even scores; n keeps it.
    pub score_scale: f32,
}

impl TopKConfig {
    /// Makes a router with softmax scores, LLaMA-MoE's scale n / k and no residual experts.
    ///
    /// # Errors
    /// `top_k` is not in 1..=num_experts.
    pub fn new(num_experts: usize, top_k: usize) -> Result<TopKConfig> {
        if !(1..=num_experts).contains(&top_k) {
            return Err(Error::range("top_k", top_k, format!("1 to the number of experts, {num_experts}")));
        }
        let score_scale = num_experts as f32 / top_k as f32;
        Ok(TopKConfig { num_experts, top_k, num_residual: 0, scores: Scores::Softmax, score_scale })
    }
}

/// Noise on the logits during training; both `[T, n]`.
///
/// ```
/// use dsmoe_router::Fade;
/// use dsmoe_router::topk::{Noise, TopKConfig, route};
/// use ndarray::array;
///
/// let config = TopKConfig::new(2, 1)?;
/// let logits = array![[1.0, 0.0]];
/// // A draw of 3 standard deviations lifts the second expert above the first.
/// let (std, draws) = (array![[0.5, 0.5]], array![[0.0, 3.0]]);
/// let noise = Noise { std: std.view(), draws: draws.view() };
/// let routed = route(&config, logits.view(), Some(noise), Fade::NONE);
/// assert_eq!(routed.routing.offsets, [0, 0, 1]);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Noise<'a> {
    /// s, from [`noise_std`].
    pub std: ArrayView2<'a, f32>,
    /// e, standard normal.
    pub draws: ArrayView2<'a, f32>,
}

/// The top-k routing of one layer; kept for the backward pass.
///
/// ```
/// use dsmoe_router::Fade;
/// use dsmoe_router::topk::{TopKConfig, TopKRouted, balance_loss, route};
/// use ndarray::array;
///
/// let config = TopKConfig::new(4, 2)?;
/// let routed: TopKRouted = route(&config, array![[1.0, 1.0, 0.0, 0.0]].view(), None, Fade::NONE);
/// assert_eq!(routed.load, [1.0, 1.0, 0.0, 0.0]);
/// // Two even scores of 1/2, times n / k.
/// assert_eq!(routed.routing.coefficients, [1.0, 1.0]);
/// assert!(balance_loss(&routed) > 0.0);
/// # Ok::<(), dsmoe_router::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TopKRouted {
    /// p, `[T, n]`.
    pub scores: Array2<f64>,
    /// The selected pairs with their coefficients, `[T, n + num_residual]`.
    pub routing: Routing,
    /// importance, `[n]`.
    pub importance: Vec<f64>,
    /// load, `[n]`.
    pub load: Vec<f64>,
    /// `[T, min(k + 1, n)]`: experts by falling noisy logit; the first k are selected.
    ranking: Array2<usize>,
    /// z, s, e `[T, n]` where there is noise.
    noise: Option<NoisyLogits>,
}

#[derive(Clone, Debug)]
struct NoisyLogits {
    logits: Array2<f64>,
    std: Array2<f64>,
    draws: Array2<f64>,
}

impl NoisyLogits {
    fn noisy(&self, t: usize, i: usize) -> f64 {
        self.logits[[t, i]] + self.draws[[t, i]] * self.std[[t, i]]
    }

    /// Returns (z_i - H) / s_i and the expert whose noisy logit is H.
    fn margin(&self, t: usize, i: usize, ranking: &[usize], top_k: usize) -> (f64, usize) {
        let other = if ranking[..top_k].contains(&i) { ranking[top_k] } else { ranking[top_k - 1] };
        ((self.logits[[t, i]] - self.noisy(t, other)) / self.std[[t, i]], other)
    }
}

/// Computes the standard deviation s of the noise from the noise network's output: softplus(raw) + 0.01.
pub fn noise_std(raw: ArrayView2<'_, f32>) -> Array2<f32> {
    raw.mapv(|x| {
        let x = f64::from(x);
        (x.max(0.0) + (-x.abs()).exp().ln_1p() + NOISE_FLOOR) as f32
    })
}

/// Routes tokens by their `logits` `[T, n]`, with experts that fade out; without `noise` as in evaluation.
///
/// # Panics
/// The shapes do not fit; `top_k` is not in 1..=num_experts.
pub fn route(
    config: &TopKConfig,
    logits: ArrayView2<'_, f32>,
    noise: Option<Noise<'_>>,
    fade: Fade,
) -> TopKRouted {
    let ((num_tokens, n), k) = (logits.dim(), config.top_k);
    let fits = n == config.num_experts && (1..=n).contains(&k);
    assert!(fits, "topk::route: logits [{num_tokens}, {n}] for {config:?}");
    let noise = noise.map(|Noise { std, draws }| {
        let dims = [std.dim(), draws.dim()];
        assert!(dims == [logits.dim(); 2], "topk::route: logits [{num_tokens}, {n}], noise {dims:?}");
        let [logits, std, draws] = [logits, std, draws].map(|values| values.mapv(f64::from));
        NoisyLogits { logits, std, draws }
    });
    let noisy = match &noise {
        None => logits.mapv(f64::from),
        Some(NoisyLogits { logits, std, draws }) => logits + draws * std,
    };

    let mut ranking = Array2::zeros((num_tokens, (k + 1).min(n)));
    let mut scores = Array2::zeros((num_tokens, n));
    let mut mask = Array2::from_shape_fn((num_tokens, n + config.num_residual), |(_, i)| i >= n);
    let mut order: Vec<usize> = Vec::with_capacity(n);
    for (t, h) in noisy.outer_iter().enumerate() {
        order.clear();
        order.extend(0..n);
        order.sort_unstable_by(|&a, &b| h[b].total_cmp(&h[a]).then(a.cmp(&b)));
        ranking.row_mut(t).iter_mut().zip(&order).for_each(|(slot, &expert)| *slot = expert);
        let selected = &order[..k];
        let exp = |rank: usize, i: usize| fade.at(rank) * (h[i] - h[order[0]]).exp();
        let sum: f64 = selected.iter().enumerate().map(|(rank, &i)| exp(rank, i)).sum();
        for (rank, &i) in selected.iter().enumerate() {
            let softmax = config.scores == Scores::Softmax;
            scores[[t, i]] = if softmax { exp(rank, i) / sum } else { fade.at(rank) };
            mask[[t, i]] = true;
        }
    }
    let scale = f64::from(config.score_scale);
    let coefficient = |t, i| if i < n { (scale * scores[[t, i]]) as f32 } else { 1.0 };
    let routing = Routing::from_mask(mask.view(), coefficient);

    let load = match &noise {
        Some(noise) if k < n => {
            let mut load = vec![0.0; n];
            for (t, ranking) in ranking.outer_iter().enumerate() {
                let ranking = ranking.to_slice().expect("standard layout");
                for (i, load) in load.iter_mut().enumerate() {
                    *load += normal_cdf(noise.margin(t, i, ranking, k).0);
                }
            }
            load
        }
        _ => routing.counts().take(n).map(|count| count as f64).collect(),
    };
    let importance = scores.outer_iter().fold(vec![0.0; n], |mut sum, row| {
        sum.iter_mut().zip(row).for_each(|(sum, p)| *sum += p);
        sum
    });
    TopKRouted { scores, routing, importance, load, ranking, noise }
}

/// Computes cv2(importance) + cv2(load); LLaMA-MoE weighs it by 0.01 and sums over layers.
pub fn balance_loss(routed: &TopKRouted) -> f64 {
    cv2(&routed.importance) + cv2(&routed.load)
}

/// Sets `dlogits` `[T, n]` and, where given, `dstd` `[T, n]`, the gradient by [`Noise::std`] (0 without noise).
///
/// `dcoefficients` `[T, n + num_residual]` is the gradient by the coefficients, read for selected pairs alone;
/// `balance_weight` the weight of [`balance_loss`] in the loss.
///
/// # Panics
/// The shapes differ from those of `routed`.
pub fn backward(
    config: &TopKConfig,
    routed: &TopKRouted,
    dcoefficients: ArrayView2<'_, f32>,
    balance_weight: f64,
    mut dlogits: ArrayViewMut2<'_, f32>,
    mut dstd: Option<ArrayViewMut2<'_, f32>>,
) {
    let shape = routed.scores.dim();
    let dims = (dcoefficients.dim(), dlogits.dim(), dstd.as_ref().map_or(shape, |dstd| dstd.dim()));
    let wanted = ((shape.0, shape.1 + config.num_residual), shape, shape);
    assert_eq!(dims, wanted, "topk::backward: dcoefficients, dlogits and dstd");
    let (k, n) = (config.top_k, config.num_experts);
    let dimportance = cv2_gradient(&routed.importance, balance_weight);
    let dload = cv2_gradient(&routed.load, balance_weight);
    let (mut dz, mut dh, mut ds) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
    for t in 0..shape.0 {
        let ranking = routed.ranking.row(t);
        let ranking = ranking.to_slice().expect("standard layout");
        dz.fill(0.0);
        dh.fill(0.0);
        ds.fill(0.0);

        // forward: p = softmax(h) over the selected, coefficient = score_scale p, importance += p; p = u is constant
        if config.scores == Scores::Softmax {
            let scores = routed.scores.row(t);
            let dp =
                |i: usize| f64::from(config.score_scale) * f64::from(dcoefficients[[t, i]]) + dimportance[i];
            let mean: f64 = ranking[..k].iter().map(|&i| scores[i] * dp(i)).sum();
            for &i in &ranking[..k] {
                dh[i] += scores[i] * (dp(i) - mean);
            }
        }

        if let Some(noise) = &routed.noise {
            // With k = n the load is a count.
            for i in (0..n).filter(|_| k < n) {
                // forward: load_i += Phi(a), a = (z_i - h_other) / s_i
                let (a, other) = noise.margin(t, i, ranking, k);
                let da = dload[i] * normal_density(a) / noise.std[[t, i]];
                dz[i] += da;
                dh[other] -= da;
                ds[i] -= da * a;
            }
            for i in 0..n {
                // forward: h = z + e s
                ds[i] += dh[i] * noise.draws[[t, i]];
            }
        }
        for i in 0..n {
            dlogits[[t, i]] = (dz[i] + dh[i]) as f32;
            if let Some(dstd) = &mut dstd {
                dstd[[t, i]] = ds[i] as f32;
            }
        }
    }
}

/// Computes the squared coefficient of variation; 0 for fewer than two values.
pub fn cv2(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let (mean, variance) = moments(values);
    variance / (mean * mean + CV2_FLOOR)
}

/// Computes `weight` times the gradient of [`cv2`].
fn cv2_gradient(values: &[f64], weight: f64) -> Vec<f64> {
    if values.len() < 2 {
        return vec![0.0; values.len()];
    }
    let n = values.len() as f64;
    let (mean, variance) = moments(values);
    let floor = mean * mean + CV2_FLOOR;
    let by_mean = -variance * 2.0 * mean / (floor * floor) / n;
    values.iter().map(|v| weight * (2.0 * (v - mean) / (n - 1.0) / floor + by_mean)).collect()
}

/// Computes the mean, and the variance with n - 1.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0))
}

fn normal_density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

/// Computes the standard normal distribution function to about 1e-15, by the series of Marsaglia (J. Stat. Softw.
/// 11(4), 2004): Phi(x) = 1/2 + density(x) (x + x^3/3 + x^5/15 + ...).
fn normal_cdf(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x.abs() > 8.3 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut sum, mut term, mut odd) = (x, x, 1.0);
    loop {
        odd += 2.0;
        term *= x * x / odd;
        let next = sum + term;
        if next == sum {
            return 0.5 + sum * normal_density(x);
        }
        sum = next;
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, normals};
    use ndarray::array;

    use super::*;

    #[test]
    fn normal_cdf_at_known_points() {
        for (x, want) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_542_9),
            (-1.0, 0.158_655_253_931_457_05),
            (2.0, 0.977_249_868_051_820_8),
            (-5.0, 2.866_515_718_791_94e-7),
            (9.0, 1.0),
            (f64::NEG_INFINITY, 0.0),
        ] {
            assert!((normal_cdf(x) - want).abs() < 1e-15, "Phi({x}) = {}", normal_cdf(x));
        }
    }

    #[test]
    fn unit_numbers() {
        assert!(noise_std(Array2::zeros((2, 3)).view()).iter().all(|s| (s - 0.703_147_2).abs() < 1e-6));
        assert!((cv2(&[2.0, 0.0]) - 2.0).abs() < 1e-9);
        assert!((cv2(&[1.2, 0.8, 0.5, 1.5]) - 0.193_333_3).abs() < 1e-7);
        assert_eq!(cv2(&[3.0]), 0.0);
    }

    #[test]
    fn load_estimate_by_hand() {
        let config = TopKConfig::new(2, 1).unwrap();
        let (ones, draws) = (array![[1.0, 1.0]], array![[1.0, -1.0]]);
        let noise = Noise { std: ones.view(), draws: draws.view() };
        let routed = route(&config, array![[0.0, 0.0]].view(), Some(noise), Fade::NONE);
        assert!((routed.load[0] - 0.841_345).abs() < 1e-6);
        assert!((routed.load[1] - 0.158_655).abs() < 1e-6);
        assert_eq!(routed.routing.offsets, [0, 1, 1]);
    }

    #[test]
    fn routes_by_hand() {
        let one = TopKConfig::new(2, 1).unwrap();
        let routed = route(&one, array![[1.0, 0.0], [3.0, 0.0]].view(), None, Fade::NONE);
        assert_eq!((&routed.importance[..], &routed.load[..]), (&[2.0, 0.0][..], &[2.0, 0.0][..]));
        assert!((0.01 * balance_loss(&routed) - 0.04).abs() < 1e-9);

        // All experts with even scores are the dense layer over n.
        let config = TopKConfig { score_scale: 1.0, ..TopKConfig::new(4, 4).unwrap() };
        let routed = route(&config, Array2::zeros((3, 4)).view(), None, Fade::NONE);
        assert_eq!(routed.routing.coefficients, [0.25; 12]);
        assert_eq!(TopKConfig::new(4, 2).unwrap().score_scale, 2.0);

        // Residual experts serve every token and are no part of the balance.
        let config = TopKConfig { num_residual: 2, scores: Scores::One, ..TopKConfig::new(3, 1).unwrap() };
        let routed = route(&config, array![[0.0, 5.0, 1.0], [2.0, 1.0, 1.0]].view(), None, Fade::NONE);
        assert_eq!(routed.routing.offsets, [0, 1, 2, 2, 4, 6]);
        assert_eq!(routed.routing.coefficients, [3.0, 3.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!((&routed.importance[..], &routed.load[..]), (&[1.0, 1.0, 0.0][..], &[1.0, 1.0, 0.0][..]));

        // Among equals the first.
        let config = TopKConfig::new(3, 2).unwrap();
        let routed = route(&config, array![[0.0, 5.0, 1.0], [2.0, 2.0, 2.0]].view(), None, Fade::NONE);
        let selected = routed.scores.mapv(|p| p > 0.0);
        assert_eq!(selected, array![[false, true, true], [true, true, false]]);
        let p = 1.0 / (1.0 + (-4.0f64).exp());
        assert!((routed.scores[[0, 1]] - p).abs() < 1e-12);
        assert!((f64::from(routed.routing.coefficients[1]) - 1.5 * p).abs() < 1e-6);
    }

    #[test]
    fn top_k_out_of_range_is_an_error() {
        for k in [0, 5] {
            let error = TopKConfig::new(4, k).unwrap_err().to_string();
            assert_eq!(error, format!("top_k is {k}; use 1 to the number of experts, 4"));
        }
    }

    /// Loss whose gradient [`backward`] gives, for finite differences; also the ranking, to see that it stays.
    fn loss(
        config: &TopKConfig,
        [logits, std, draws, dcoefficients]: [&Array2<f32>; 4],
        noisy: bool,
        balance_weight: f64,
    ) -> (f64, Array2<usize>) {
        let noise = noisy.then_some(Noise { std: std.view(), draws: draws.view() });
        let routed = route(config, logits.view(), noise, Fade::NONE);
        let pairs = routed.scores.indexed_iter();
        let output: f64 =
            pairs.map(|(at, p)| f64::from(config.score_scale) * p * f64::from(dcoefficients[at])).sum();
        (output + balance_weight * balance_loss(&routed), routed.ranking)
    }

    #[test]
    fn gradients_are_finite_differences_with_the_selection_held() {
        for (num_tokens, n, k, scores, num_residual, noisy, balance_weight) in [
            (5, 4, 2, Scores::Softmax, 0, true, 0.7),
            (5, 4, 2, Scores::Softmax, 2, true, 0.0),
            (6, 5, 1, Scores::Softmax, 0, true, 2.0),
            (4, 3, 3, Scores::Softmax, 1, true, 1.0),
            (5, 4, 2, Scores::Softmax, 0, false, 1.0),
            (5, 4, 2, Scores::One, 1, true, 1.0),
        ] {
            let config = TopKConfig { scores, num_residual, ..TopKConfig::new(n, k).unwrap() };
            let make = |width, seed| {
                Array2::from_shape_vec((num_tokens, width), normals(num_tokens * width, seed)).unwrap()
            };
            let (mut logits, draws, dcoefficients) = (make(n, 1), make(n, 2), make(n + num_residual, 3));
            let mut std = noise_std(make(n, 4).view());
            let noise = noisy.then_some(Noise { std: std.view(), draws: draws.view() });
            let routed = route(&config, logits.view(), noise, Fade::NONE);
            let (mut dlogits, mut dstd) = (Array2::zeros((num_tokens, n)), Array2::zeros((num_tokens, n)));
            let (dz, ds) = (dlogits.view_mut(), Some(dstd.view_mut()));
            backward(&config, &routed, dcoefficients.view(), balance_weight, dz, ds);
            for (name, got, by_std) in [("dlogits", &dlogits, false), ("dstd", &dstd, true)] {
                let mut want = Vec::new();
                for at in ndarray::indices((num_tokens, n)) {
                    // Inputs are f32, sums f64: dividing by the step really taken keeps f64 accuracy.
                    let mut at_step = |step: f32| {
                        let input = if by_std { &mut std } else { &mut logits };
                        let before = input[at];
                        input[at] = before + step;
                        let point = f64::from(input[at]);
                        let (value, ranking) =
                            loss(&config, [&logits, &std, &draws, &dcoefficients], noisy, balance_weight);
                        assert_eq!(ranking, routed.ranking, "the step changes the selection");
                        let input = if by_std { &mut std } else { &mut logits };
                        input[at] = before;
                        (point, value)
                    };
                    let ((x1, y1), (x0, y0)) = (at_step(1e-4), at_step(-1e-4));
                    want.push((y1 - y0) / (x1 - x0));
                }
                assert_close(name, got.as_slice().unwrap(), &want, 2e-6);
            }
        }
    }
}
