//! The form of a layer's FFN with experts.

use std::sync::Arc;

use dsmoe_router::RouterConfig;
use dsmoe_router::expert_map::ExpertMap;

use super::gating::Gating;
use crate::config::MoeConfig;

/// The form of a layer's FFN: its gates, and what stands beside the experts that they switch.
///
/// ```
/// use dsmoe_core::ffn::{DsmoeFfn, DsmoeForm, Ffn, Gated};
/// use dsmoe_router::RouterConfig;
///
/// let plain = DsmoeForm::new(RouterConfig::new(8), false);
/// let form = DsmoeForm { core: 2, router_rank: Some(4), ..plain };
/// assert_eq!((form.routed(), form.parts().len()), (6, 2));
/// // The router is two matrices of rank 4, for the experts behind the core.
/// let ffn = DsmoeFfn::of(Gated::silu(16, 32), form);
/// assert_eq!(ffn.tensors().iter().filter(|tensor| tensor.router).count(), 2);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct DsmoeForm {
    /// The gates, with the number of all experts of the layer.
    pub router: RouterConfig,
    /// The number of experts of the layer of its model that has most of them. The sparsity loss is a mean over layers of the means
    /// over their gates, and its weight is given for one gate among as many.
    pub most_experts: usize,
    /// True if the router has a bias.
    pub router_bias: bool,
    /// The leading experts that every token runs with the factor 1; the router has the others.
    pub core: usize,
    /// The expert of every gate, counted behind the core; none where each expert has a gate of its own.
    pub map: Option<Arc<ExpertMap>>,
    /// Rank of the router; none for a full one.
    pub router_rank: Option<usize>,
    /// True if a linear map of what a router of low rank computes first is added to the output.
    pub correction: bool,
}

impl DsmoeForm {
    /// Describes routed experts with a full router and nothing beside them.
    pub fn new(router: RouterConfig, router_bias: bool) -> DsmoeForm {
        let most_experts = router.num_experts;
        let (core, map, router_rank, correction) = (0, None, None, false);
        DsmoeForm { router, most_experts, router_bias, core, map, router_rank, correction }
    }

    /// Returns the form of a layer.
    pub(crate) fn of_layer(moe: &MoeConfig, layer: usize) -> DsmoeForm {
        DsmoeForm {
            router: RouterConfig { num_experts: moe.experts(layer), ..moe.router.clone() },
            most_experts: moe.router.num_experts,
            router_bias: moe.router_bias,
            core: moe.core(layer),
            map: moe.map(layer).cloned(),
            router_rank: moe.parts.router_rank,
            correction: moe.parts.correction,
        }
    }

    /// Returns the number of experts that have a gate.
    pub fn routed(&self) -> usize {
        self.router.num_experts - self.core
    }

    /// Returns the number of gates.
    pub fn num_gates(&self) -> usize {
        self.map.as_ref().map_or(self.routed(), |map| map.num_gates())
    }

    /// Names what it has beside routed experts and a full router.
    pub fn parts(&self) -> Vec<&'static str> {
        let parts = [
            (self.core > 0, "a core of experts that always run"),
            (self.map.is_some(), "gates that share experts"),
            (self.router_rank.is_some(), "routers of low rank"),
            (self.correction, "a correction of the output"),
        ];
        parts.into_iter().filter(|(is_there, _)| *is_there).map(|(_, name)| name).collect()
    }

    /// Returns the settings of the gates alone.
    pub(crate) fn gates(&self) -> RouterConfig {
        RouterConfig { num_experts: self.num_gates(), ..self.router.clone() }
    }

    /// Returns its router, and what is added to the output, for inputs of width `hidden`.
    pub(crate) fn gating(&self, hidden: usize) -> Gating {
        Gating {
            hidden,
            gates: self.num_gates(),
            rank: self.router_rank,
            bias: self.router_bias,
            correction: self.correction,
        }
    }

    /// Returns the factor of a layer's part in the sparsity loss, which is a mean over the gates that it has: the largest number of
    /// experts of a layer over that of the gates.
    pub(crate) fn sparsity_factor(&self) -> f32 {
        self.most_experts as f32 / self.num_gates() as f32
    }
}
