//! Gates: from router logits to a [`Routing`] (paper section 3.2).
//!
//! ```text
//! logits  z = x Y^T + b              computed by the caller: router weight Y [n, hidden], bias b [n] or none
//! gates   q = 1 / (1 + e^-z)
//! mask    m = [z > logit(threshold)] the same as [q > threshold], without the rounding of a sigmoid
//! value   S = q m  or  m             sigmoid or binary gates (eqs. 7, 10)
//! scale   c = 1  or  n / max(k, 1)   none or eq. 8; k = sum_i m_i per token
//! coefficient of an active pair = c S
//! ```
//! With [`ZeroActive::ForceArgmax`] a token with k = 0 gets its largest gate (the first of equals) into the mask.

use ndarray::{Array2, ArrayView1, ArrayView2};

use crate::{GateValue, Rescale, RouterConfig, Routing, ZeroActive};

/// The routing of one layer; kept for the backward pass.
///
/// ```
/// use dsmoe_router::{Routed, RouterConfig, route};
/// use ndarray::array;
///
/// let routed: Routed = route(&RouterConfig::new(2), array![[1.0, -1.0]].view());
/// assert_eq!(routed.mask, array![[true, false]]);
/// assert_eq!(routed.routing.coefficients, [routed.gates[[0, 0]]]);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    /// z, `[T, n]`.
    pub logits: Array2<f32>,
    /// q, `[T, n]`.
    pub gates: Array2<f32>,
    /// m, `[T, n]`.
    pub mask: Array2<bool>,
    /// The active pairs with their coefficients.
    pub routing: Routing,
}

/// Routes tokens by their `logits` `[T, n]`.
///
/// # Panics
/// `logits` has not `config.num_experts` columns.
pub fn route(config: &RouterConfig, logits: ArrayView2<'_, f32>) -> Routed {
    let mut routed = Routed::default();
    routed.rebuild(config, logits);
    routed
}

impl Routed {
    /// Does as [`route`], in the memory of `self`.
    ///
    /// # Panics
    /// Those of [`route`].
    pub fn rebuild(&mut self, config: &RouterConfig, logits: ArrayView2<'_, f32>) {
        self.rebuild_above(config, config.bar(), 0.0, logits);
    }

    /// Does as [`Routed::rebuild`] with `bar` in place of the logit of the threshold; without it every gate is open. Binary
    /// gates, whose q serves the gradient alone, are q = 1 / (1 + e^(centre - z)).
    ///
    /// # Panics
    /// Those of [`route`].
    pub fn rebuild_above(
        &mut self,
        config: &RouterConfig,
        bar: Option<f32>,
        centre: f32,
        logits: ArrayView2<'_, f32>,
    ) {
        let centre = if config.gate_value == GateValue::Binary { centre } else { 0.0 };
        self.set_gates(centre, logits);
        self.open(config, bar, logits);
    }

    /// Does as [`Routed::rebuild_above`] for a pass without a backward: binary gates, which only that needs, are not computed.
    ///
    /// # Panics
    /// Those of [`route`].
    pub fn rebuild_for_inference(
        &mut self,
        config: &RouterConfig,
        bar: Option<f32>,
        logits: ArrayView2<'_, f32>,
    ) {
        match config.gate_value {
            GateValue::Sigmoid => self.set_gates(0.0, logits),
            GateValue::Binary => assign(&mut self.gates, std::iter::empty(), (0, 0)),
        }
        self.open(config, bar, logits);
    }

    fn set_gates(&mut self, centre: f32, logits: ArrayView2<'_, f32>) {
        assign(&mut self.gates, logits.iter().map(|&z| 1.0 / (1.0 + (centre - z).exp())), logits.dim());
    }

    /// Sets all but the gates.
    fn open(&mut self, config: &RouterConfig, bar: Option<f32>, logits: ArrayView2<'_, f32>) {
        let Routed { logits: z, gates, mask, routing } = self;
        assert_eq!(logits.ncols(), config.num_experts, "route: logits {:?} for {config:?}", logits.dim());
        assign(z, logits.iter().copied(), logits.dim());
        assign(mask, logits.iter().map(|&z| bar.is_none_or(|bar| z > bar)), logits.dim());
        if config.zero_active == ZeroActive::ForceArgmax {
            let shut = z.outer_iter().zip(mask.outer_iter_mut()).filter(|(_, mask)| !mask.iter().any(|m| *m));
            shut.for_each(|(row, mut mask)| mask[first_max(row)] = true);
        }
        rebuild(routing, config, gates, mask);
    }
}

impl Routed {
    /// Replaces the open experts of every token by as many of the largest `scores` `[T, n]`, the first among equals. Gates
    /// and logits stay, and with them the factors of sigmoid gates.
    ///
    /// # Panics
    /// The scores are of other tokens or experts.
    pub fn reroute(&mut self, config: &RouterConfig, scores: ArrayView2<'_, f64>) {
        let Routed { gates, mask, routing, .. } = self;
        assert_eq!(scores.dim(), mask.dim(), "reroute: scores of the routed pairs");
        open_largest(mask, scores, |mask| mask.iter().filter(|open| **open).count());
        rebuild(routing, config, gates, mask);
    }

    /// Opens the `count` experts of the largest logits for every token, the first among equals, in place of those that are
    /// open.
    ///
    /// # Panics
    /// There are fewer experts.
    pub fn keep_largest(&mut self, config: &RouterConfig, count: usize) {
        let Routed { logits, gates, mask, routing } = self;
        open_largest(mask, logits.mapv(f64::from).view(), |_| count);
        rebuild(routing, config, gates, mask);
    }
}

/// Opens the `count` experts of the largest scores in every row of `mask`, the first among equals.
fn open_largest(
    mask: &mut Array2<bool>,
    scores: ArrayView2<'_, f64>,
    count: impl Fn(ArrayView1<'_, bool>) -> usize,
) {
    let mut order: Vec<usize> = Vec::with_capacity(mask.ncols());
    for (mut mask, scores) in mask.outer_iter_mut().zip(scores.outer_iter()) {
        let open = count(mask.view());
        order.clear();
        order.extend(0..scores.len());
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        mask.fill(false);
        order[..open].iter().for_each(|&i| mask[i] = true);
    }
}

/// Sets the coefficients of the open pairs.
fn rebuild(routing: &mut Routing, config: &RouterConfig, gates: &Array2<f32>, mask: &Array2<bool>) {
    routing.rebuild(mask.view(), |t, i| {
        let scale = scale(config, mask.row(t));
        match config.gate_value {
            GateValue::Sigmoid => gates[[t, i]] * scale,
            GateValue::Binary => scale,
        }
    });
}

/// Returns the factor c of a token with this mask (eq. 8), 1 without rescale.
pub(crate) fn scale(config: &RouterConfig, mask: ArrayView1<'_, bool>) -> f32 {
    match config.rescale {
        Rescale::None => 1.0,
        Rescale::Eq8 => mask.len() as f32 / mask.iter().filter(|m| **m).count().max(1) as f32,
    }
}

/// Returns the index of the largest value, the first among equals.
fn first_max(row: ArrayView1<'_, f32>) -> usize {
    (0..row.len()).reduce(|best, i| if row[i] > row[best] { i } else { best }).unwrap_or(0)
}

/// Sets `out` to `values` in row-major order, in its own memory where it is large enough.
fn assign<T>(out: &mut Array2<T>, values: impl Iterator<Item = T>, dim: (usize, usize)) {
    let (mut memory, _) = std::mem::replace(out, Array2::from_shape_vec((0, 0), Vec::new()).expect("empty"))
        .into_raw_vec_and_offset();
    memory.clear();
    memory.extend(values);
    *out = Array2::from_shape_vec(dim, memory).expect("one value per pair");
}
