//! The settings of a top-k FFN.

use dsmoe_router::topk::TopKConfig;
use serde::{Deserialize, Serialize};

/// An FFN that runs exactly k of n experts for every token, as in LLaMA-MoE and MoEfication.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopkSpec {
    /// The number of experts, k, and the factor of outputs.
    pub router: TopKConfig,
    /// The gate that computes logits.
    pub gate: GateSpec,
    /// Weight of the balance loss of a layer (LLaMA-MoE: 0.01).
    pub balance_weight: f64,
}

impl TopkSpec {
    /// The number of experts of a layer, residual ones included.
    pub fn all_experts(&self) -> usize {
        self.router.num_experts + self.router.num_residual
    }

    /// The settings with `num_experts` experts to choose from, and the same beside them. The first matrix of a gate of two and the
    /// factor of the scores stay: with experts that are never chosen gone, the function is the same.
    pub(crate) fn with_experts(&self, num_experts: usize) -> TopkSpec {
        let router = TopKConfig { num_experts, ..self.router };
        let rows = self.gate.hidden.unwrap_or(self.router.num_experts);
        let is_mlp = self.gate.network == GateNetwork::Mlp;
        let hidden = Some(rows).filter(|&rows| is_mlp && rows != num_experts);
        TopkSpec { router, gate: GateSpec { hidden, ..self.gate }, ..*self }
    }

    /// The number of experts that run for a token, residual ones included.
    pub(crate) fn active_experts(&self) -> usize {
        self.router.top_k + self.router.num_residual
    }
}

/// The network of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateNetwork {
    /// Two matrices with tanh between them.
    Mlp,
    /// One matrix.
    Linear,
    /// The magnitude of one neuron for each expert: a row of gate and one of up (CMoE).
    Neuron,
}

/// The logits that a gate computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateSpec {
    /// The network.
    pub network: GateNetwork,
    /// The network reads x / |x| in place of x.
    pub normalize: bool,
    /// Logits are noisy in training, with a trained standard deviation.
    pub noise: bool,
    /// A bias is added to the logits (FactorLLM).
    pub bias: bool,
    /// Rows of the first matrix of an mlp, which stay where experts go; none for one of each expert.
    pub hidden: Option<usize>,
}
