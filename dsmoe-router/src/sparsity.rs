//! Sparsity loss of one layer (eqs. 17-19); the caller averages over layers.
//!
//! ```text
//! Active   L = 1/(T n) sum over tokens and experts of q m      the paper's: G stands in eq. 19, not q
//! All      L = 1/(T n) sum over tokens and experts of q        the mean gate, which also moves shut gates
//! ```
//! Gates whose thresholds hold the share need a further weight of `All`, at which they are neither opened nor closed as a whole:
//! a common shift of all logits would only make the thresholds move. [`SparsityOver::Held`] adds the weight at which this is true
//! of one layer; a [`Pull`] over all layers gives one weight for all of them.
//!
//! The value is that of the sigmoid gate also where gates are binary. Sums are in f64 and in one order.

use crate::Routed;

/// Gates that the sparsity loss counts.
///
/// ```
/// use dsmoe_router::sparsity::loss;
/// use dsmoe_router::{Pull, RouterConfig, SparsityGrad, SparsityOver, route, ste};
/// use ndarray::{Array2, array};
///
/// let config = RouterConfig::new(2);
/// let routed = route(&config, array![[0.0, 2.0]].view());
/// // Active gates alone, or all of them.
/// assert!(loss(&routed, SparsityOver::Active) < loss(&routed, SparsityOver::All));
/// let mut dlogits = Array2::zeros((1, 2));
/// let sparsity = SparsityGrad { weight: 0.0, over: SparsityOver::All };
/// let pull: Pull = ste::backward(&config, &routed, array![[-1.0, -1.0]].view(), sparsity, dlogits.view_mut());
/// // The rest of the loss opens the gates, and this weight would hold them.
/// assert!((pull.multiplier().unwrap() - 1.0).abs() < 1e-6);
/// ```
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
///
/// ```
/// use dsmoe_router::{RouterConfig, SparsityGrad, SparsityOver, route, ste};
/// use ndarray::{Array2, array};
///
/// let config = RouterConfig::new(2);
/// let routed = route(&config, array![[0.5, -0.5]].view());
/// let mut dlogits = Array2::zeros((1, 2));
/// let sparsity = SparsityGrad { weight: 0.1, over: SparsityOver::Active };
/// ste::backward(&config, &routed, Array2::zeros((1, 2)).view(), sparsity, dlogits.view_mut());
/// // The loss closes the open gate and leaves the shut one alone.
/// assert!(dlogits[[0, 0]] > 0.0);
/// assert_eq!(dlogits[[0, 1]], 0.0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SparsityGrad {
    /// Derivative of the total loss by one counted gate: the loss's weight / (layers * tokens * experts).
    pub weight: f32,
    /// The gates counted.
    pub over: SparsityOver,
}

/// The gradient of the rest of the loss on gates that thresholds hold, summed over tokens and gates.
///
/// ```
/// use dsmoe_router::Pull;
///
/// // Two layers of equal weight; the second has gates that nothing moves.
/// let mut pull = Pull { force: -0.3, slope: 0.5 };
/// pull.add(Pull { force: 0.0, slope: 0.5 }, 1.0);
/// assert_eq!(pull.multiplier(), Some(0.3));
/// // Saturated gates have no slope, so that no weight balances them.
/// assert_eq!(Pull::default().multiplier(), None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pull {
    /// The logits' gradients without that of the sparsity loss.
    pub force: f64,
    /// The part that the sparsity loss over all gates adds, for each unit of its weight.
    pub slope: f64,
}

impl Pull {
    /// Adds the sums of another layer, whose gates get `factor` times the weight.
    pub fn add(&mut self, layer: Pull, factor: f64) {
        self.force += layer.force;
        self.slope += factor * layer.slope;
    }

    /// Returns the weight of the sparsity loss at which the gradients sum to 0: the multiplier of the constraint that the
    /// thresholds enforce. It is none where no gate has a slope.
    pub fn multiplier(self) -> Option<f64> {
        Some(-self.force / self.slope).filter(|multiplier| self.slope > 0.0 && multiplier.is_finite())
    }
}

/// A loss on the distance of the mean gate from a share (Alizadeh et al., Duo-LLM), for gates whose mean is the share that runs.
///
/// ```text
/// loss    weight (mean - target)^2       mean over layers, tokens and experts of all gates
/// slope   2 weight (mean - target)       by the mean; by a single gate it is that over the number of gates
/// ```
/// It acts on the mean alone: tokens may differ from each other.
///
/// ```
/// use dsmoe_router::ShareLoss;
///
/// let gates = [0.9, 0.1, 0.5, 0.5];
/// let mean = gates.iter().sum::<f64>() / 4.0;
/// let loss = ShareLoss { weight: 1.0, target: 0.3 };
/// assert!((loss.square(mean) - 0.04).abs() < 1e-12);
/// // Every gate is pushed down alike.
/// assert!((loss.slope(mean) / 4.0 - 0.1).abs() < 1e-12);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShareLoss {
    /// Weight of the squared distance.
    pub weight: f64,
    /// The share that the mean gate is drawn to.
    pub target: f64,
}

impl ShareLoss {
    /// Returns the squared distance of the `mean` gate from the share, without the weight.
    pub fn square(self, mean: f64) -> f64 {
        (mean - self.target).powi(2)
    }

    /// Returns the derivative of the weighted squared distance by the `mean` gate.
    pub fn slope(self, mean: f64) -> f64 {
        2.0 * self.weight * (mean - self.target)
    }
}

/// Computes the sparsity loss of the layer, in 0..=1; 0 without tokens. [`crate::ste::backward`] holds its gradient.
pub fn loss(routed: &Routed, over: SparsityOver) -> f64 {
    let counted = |active: bool| active || over != SparsityOver::Active;
    let pairs = routed.gates.iter().zip(&routed.mask);
    let sum: f64 = pairs.filter(|(_, active)| counted(**active)).map(|(&q, _)| f64::from(q)).sum();
    sum / routed.gates.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_on_a_share_by_hand() {
        // The mean of 0.9, 0.1, 0.5 and 0.5 is 0.5: the distance from 0.3 is 0.2.
        let loss = ShareLoss { weight: 1.0, target: 0.3 };
        assert!((loss.square(0.5) - 0.04).abs() < 1e-15);
        assert!((loss.slope(0.5) / 4.0 - 0.1).abs() < 1e-15);
        // The weight is a factor of the slope; below the share gates are pulled up, at it they are left alone.
        let heavy = ShareLoss { weight: 3.0, ..loss };
        assert_eq!((heavy.square(0.5), heavy.slope(0.5)), (loss.square(0.5), 3.0 * loss.slope(0.5)));
        assert!(loss.slope(0.1) < 0.0 && loss.slope(0.3) == 0.0 && loss.square(0.3) == 0.0);
    }
}
