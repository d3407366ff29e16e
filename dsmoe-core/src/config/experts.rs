//! The experts of a mixture, as config.json describes them.

use dsmoe_router::mixture::MixtureConfig;

/// n experts of one width, of which a router gives every token k, and an expert that all tokens run beside them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixtureSpec {
    /// The number of experts, k, and the rule of the coefficients.
    pub router: MixtureConfig,
    /// Neurons of an expert.
    pub width: usize,
    /// Neurons of the expert that every token runs, times the sigmoid of a gate of its own; none without it.
    pub shared: Option<usize>,
    /// Weight of the balance loss, which is a mean over layers.
    pub balance_weight: f64,
}

impl MixtureSpec {
    /// Returns the neurons of all experts that are chosen from.
    pub fn neurons(&self) -> usize {
        self.router.num_experts * self.width
    }
}
