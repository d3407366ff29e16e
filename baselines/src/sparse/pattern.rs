//! Patterns of sparsity, the budgets that they reach, and the share to remove for a budget.

use std::fmt;
use std::str::FromStr;

use dsmoe_core::accounting::Accounting;
use dsmoe_core::checkpoint::tensor_names;
use dsmoe_core::{Config, Error as CoreError};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::method::{Budget, Plan};
use crate::settings::stored_as_text;

/// A budget that is missed by more than this is an error.
const TOLERANCE: f64 = 0.01;
/// The linears of a decoder layer that are pruned.
const LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// The places where zeros may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere.
    Unstructured,
    /// `removed` zeros in every `of` consecutive columns of a row.
    Group {
        /// Zeros.
        removed: usize,
        /// Columns.
        of: usize,
    },
}

impl FromStr for Pattern {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Pattern, ()> {
        match text {
            "unstructured" => Ok(Pattern::Unstructured),
            "2:4" => Ok(Pattern::Group { removed: 2, of: 4 }),
            "4:8" => Ok(Pattern::Group { removed: 4, of: 8 }),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Unstructured => f.write_str("unstructured"),
            Pattern::Group { removed, of } => write!(f, "{removed}:{of}"),
        }
    }
}

stored_as_text!(Pattern);

/// The weights among which the smallest scores are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Among {
    /// The weights of a row.
    Row,
    /// The weights of the matrix.
    Matrix,
    /// The weights of this many consecutive columns.
    #[serde(skip)]
    Columns(usize),
}

/// The weights that are removed from every matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sparsity {
    pub(crate) pattern: Pattern,
    pub(crate) among: Among,
    /// Share that is removed; a pattern of groups has its own.
    pub(crate) share: f64,
}

/// The number of `count` weights that `share` removes.
pub(crate) fn removed_of(count: usize, share: f64) -> usize {
    ((count as f64 * share) as usize).min(count)
}

impl Sparsity {
    /// Counts the weights removed from a `[rows, cols]` matrix.
    fn removed(&self, rows: usize, cols: usize) -> u64 {
        let count = match (self.pattern, self.among) {
            (Pattern::Group { removed, of }, _) => rows * (cols / of) * removed,
            (_, Among::Row) => rows * removed_of(cols, self.share),
            (_, Among::Matrix) => removed_of(rows * cols, self.share),
            (_, Among::Columns(block)) => {
                let block = block.min(cols);
                let rest = removed_of(rows * (cols % block), self.share);
                cols / block * removed_of(rows * block, self.share) + rest
            }
        };
        count as u64
    }
}

/// Lists names and shapes `[rows, cols]` of the matrices that are pruned.
fn matrices(config: &Config) -> impl Iterator<Item = (String, usize, usize)> + '_ {
    tensor_names(config).filter_map(|(name, shape)| {
        let module = name.strip_suffix(".weight")?.rsplit('.').next()?;
        LINEARS.contains(&module).then(|| (name, shape[0], shape[1]))
    })
}

/// The sparsity that reaches a budget, or comes nearest to it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) sparsity: Sparsity,
    pub(crate) plan: Plan,
}

impl Target {
    /// Finds the share that reaches `budget`: `density = (budget - the rest) / weights of the seven linears`. With
    /// `nearest`, a budget that is out of reach gives the nearest one.
    pub(crate) fn new(
        config: &Config,
        budget: Budget,
        pattern: Pattern,
        among: Among,
        nearest: bool,
    ) -> Result<Target> {
        if !config.is_dense() {
            let help = "use a dense model, such as the one that this was made from";
            return Err(CoreError::argument("the model has experts or thresholds already", help).into());
        }
        if let Pattern::Group { of, .. } = pattern
            && let Some((name, _, cols)) = matrices(config).find(|(.., cols)| cols % of != 0)
        {
            let problem = format!("is {pattern} and the {cols} columns of {name} are no multiple of {of}");
            return Err(Error::setting("pattern", problem, "use the pattern unstructured"));
        }
        let shapes: Vec<(usize, usize)> = matrices(config).map(|(_, rows, cols)| (rows, cols)).collect();
        let total = Accounting::of(config).total;
        let removed = |share: f64| -> u64 {
            let sparsity = Sparsity { pattern, among, share };
            shapes.iter().map(|&(rows, cols)| sparsity.removed(rows, cols)).sum()
        };
        let asked = budget.params(total);
        let wanted = total as f64 - asked;
        let share = nearest_share(&removed, wanted);
        let removed = removed(share);
        let activated = total as f64 - removed as f64;
        let pruned: u64 = shapes.iter().map(|&(rows, cols)| (rows * cols) as u64).sum();
        if (activated - asked).abs() > TOLERANCE * asked && !nearest {
            let problem = match pattern {
                Pattern::Unstructured => {
                    "is out of reach of zeros in the layers' linears; set nearest to true for the nearest"
                        .to_owned()
                }
                Pattern::Group { .. } => format!(
                    "pattern {pattern} reaches {activated} alone; set pattern to unstructured, or nearest to true"
                ),
            };
            let ends = match pattern {
                Pattern::Unstructured => [(total - pruned) as f64, total as f64],
                Pattern::Group { .. } => [activated; 2],
            };
            return Err(Error::out_of_reach(budget, problem, ends, total));
        }
        let density = 1.0 - removed as f64 / pruned as f64;
        let plan = Plan {
            total: total as f64,
            activated,
            reached_by: format!("density {density:.4} of the layers' linears"),
            masked: true,
            keeps_dense_compute: true,
            ..Plan::default()
        };
        Ok(Target { sparsity: Sparsity { pattern, among, share }, plan })
    }
}

/// Finds the share for which `removed`, which grows with it, is nearest to `wanted`.
fn nearest_share(removed: &dyn Fn(f64) -> u64, wanted: f64) -> f64 {
    if removed(0.0) as f64 >= wanted {
        return 0.0;
    }
    let (mut low, mut high) = (0.0, 1.0);
    while low < high {
        let middle = low + (high - low) / 2.0;
        if middle <= low || middle >= high {
            break;
        }
        if removed(middle) as f64 <= wanted { low = middle } else { high = middle }
    }
    let miss = |share: f64| (removed(share) as f64 - wanted).abs();
    if miss(low) <= miss(high) { low } else { high }
}
