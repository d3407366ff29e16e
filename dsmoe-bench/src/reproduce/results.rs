//! The results of a reproduction, as results.json holds them.

use serde::{Deserialize, Serialize};

use super::measure::Difficulty;
use super::outputs::Output;
use super::profile::{PaperRow, Role};
use super::records::{GridPoint, Machine};
use super::setup::Setup;
use super::statistics::Measured;

/// One row of the comparison, a mean over its seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MethodResult {
    pub(crate) name: String,
    pub(crate) role: Option<Role>,
    pub(crate) paper: Option<PaperRow>,
    /// Experts of a layer, if the method has a setting for it.
    pub(crate) experts: Option<usize>,
    pub(crate) seeds: Vec<u64>,
    pub(crate) reached_by: Option<String>,
    pub(crate) calibration_tokens: usize,
    pub(crate) tokens: u64,
    pub(crate) params_total: f64,
    pub(crate) params_activated: Measured,
    /// Activated parameters over the budget.
    pub(crate) of_budget: f64,
    pub(crate) flops_per_token: f64,
    pub(crate) active_ratio: Option<f64>,
    pub(crate) threshold: Option<f64>,
    pub(crate) ppl: Measured,
    pub(crate) nll: Measured,
    pub(crate) domains: Vec<DomainMean>,
    pub(crate) tasks: Vec<TaskMean>,
    /// Mean percentage of right items over tasks.
    pub(crate) tasks_mean: Option<f64>,
    pub(crate) milestones: Vec<MilestoneMean>,
    pub(crate) sweep: Vec<SweepMean>,
    pub(crate) difficulty: Option<Difficulty>,
    /// The budget of the row as a share of the dense FFN, in a profile with several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) active: Option<f64>,
    /// The name that rows of several budgets share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<String>,
    /// The row was measured as it was made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) untrained: bool,
    /// Speeds beside the dense model's, of the first seed. Only these depend on the machine's load.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) speeds: Vec<GridPoint>,
}

impl MethodResult {
    /// Reports whether the row is DSMoE as a whole, without an ablation.
    pub(crate) fn is_dsmoe(&self) -> bool {
        self.role.is_some_and(Role::is_dsmoe)
    }

    /// Reports whether the row is the dense model with continued training.
    pub(crate) fn is_dense(&self) -> bool {
        self.role == Some(Role::Dense)
    }

    /// Returns the number of experts that a share of them is.
    pub(crate) fn experts_of(&self, share: f64) -> f64 {
        share * self.experts.unwrap_or(1) as f64
    }

    /// Returns the mean number of active experts.
    pub(crate) fn active_experts(&self) -> Option<f64> {
        self.active_ratio.map(|share| self.experts_of(share))
    }

    /// Returns the percentage of right items of a task.
    pub(crate) fn percent(&self, task: &str) -> Option<f64> {
        self.tasks.iter().find(|one| one.task == task).map(|one| one.percent.mean)
    }

    /// Returns divergence from the dense model and share of equal first tokens, means over texts.
    pub(crate) fn agreement(&self) -> Option<(f64, f64)> {
        let of = |value: &dyn Fn(&DomainMean) -> Option<f64>| -> Option<f64> {
            self.domains.iter().map(|domain| Some(domain.share * value(domain)?)).sum()
        };
        of(&|domain| domain.kl).zip(of(&|domain| domain.top1))
    }

    /// Returns the result after a share of the training.
    pub(crate) fn milestone(&self, share: f64) -> Option<&MilestoneMean> {
        self.milestones.iter().find(|stone| (stone.share - share).abs() < 1e-9)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DomainMean {
    pub(crate) name: String,
    pub(crate) share: f64,
    pub(crate) ppl: f64,
    pub(crate) active_ratio: Option<f64>,
    /// Active experts of every layer.
    pub(crate) active_experts_per_layer: Vec<f64>,
    /// Divergence from the dense model, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kl: Option<f64>,
    /// Share of tokens for which the dense model finds the same token likeliest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) top1: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TaskMean {
    pub(crate) task: String,
    pub(crate) metric: String,
    pub(crate) shots: usize,
    pub(crate) items: usize,
    /// Percentage of right items.
    pub(crate) percent: Measured,
    /// Mean negative log-likelihood of the right answers, nats by item.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gold_nll: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) active_ratio: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MilestoneMean {
    pub(crate) share: f64,
    pub(crate) tokens: u64,
    pub(crate) ppl: Measured,
    pub(crate) active_ratio: Option<f64>,
    pub(crate) params_activated: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SweepMean {
    pub(crate) threshold: f64,
    pub(crate) ppl: Measured,
    pub(crate) active_ratio: f64,
    pub(crate) params_activated: f64,
}

/// The comparison of DSMoE with another method on the same held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Comparison {
    pub(crate) dsmoe: String,
    pub(crate) other: String,
    /// Mean of the other's loss minus DSMoE's in nats per token; DSMoE is better above 0.
    pub(crate) difference: f64,
    pub(crate) interval: Option<[f64; 2]>,
    pub(crate) p: Option<f64>,
    pub(crate) test: String,
    pub(crate) seeds: usize,
    pub(crate) verdict: Verdict,
}

/// The result of a comparison for DSMoE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict {
    #[serde(rename = "better")]
    Better,
    #[serde(rename = "worse")]
    Worse,
    #[serde(rename = "no significant difference")]
    NotSignificant,
}

impl Verdict {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::NotSignificant => "no significant difference",
        }
    }
}

/// A statement of the paper, and whether the results agree with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Direction {
    pub(crate) output: Output,
    pub(crate) method: String,
    pub(crate) statement: String,
    pub(crate) agrees: Option<bool>,
}

/// The similarity of the active experts of all layers to a W.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) method: String,
    pub(crate) domain: String,
    pub(crate) active_experts_per_layer: Vec<f64>,
    /// Correlation with a wave that is high at both ends and in the middle.
    pub(crate) correlation: Option<f64>,
    /// Share of all orders of these layers that correlate as much.
    pub(crate) p: Option<f64>,
    pub(crate) is_w: Option<bool>,
}

/// The contents of results.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) format_version: u32,
    pub(crate) setup: Setup,
    pub(crate) machines: Vec<Machine>,
    pub(crate) seeds: Vec<u64>,
    /// The dense model before continued training, then all methods.
    pub(crate) methods: Vec<MethodResult>,
    pub(crate) comparisons: Vec<Comparison>,
    pub(crate) shapes: Vec<Shape>,
    pub(crate) directions: Vec<Direction>,
}

impl Results {
    /// Returns the name of the row that methods are compared with in the main table.
    pub(crate) fn first_dsmoe(&self) -> Option<&str> {
        self.comparisons.first().map(|one| one.dsmoe.as_str())
    }

    /// Returns the verdict of that row on a method.
    pub(crate) fn verdict_on(&self, method: &MethodResult) -> Option<Verdict> {
        let first = self.first_dsmoe();
        let is_it = |one: &&Comparison| Some(&one.dsmoe[..]) == first && one.other == method.name;
        self.comparisons.iter().find(is_it).map(|one| one.verdict)
    }
}
