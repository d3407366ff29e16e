//! The tables and figures of a report, and the measurements that each needs.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::profile::{MethodSpec, Role};

/// A table or figure of the report, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Output {
    Table1,
    Table2,
    Table3,
    Table4,
    Table5,
    Table6,
    Figure2,
    Figure3,
    Speed,
    Pareto,
    Difficulty,
    Budget,
}

/// A part of the measuring of a trained model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Perplexity, activated parameters and layers. Every output needs it.
    Text,
    Tasks,
    Sweep,
    Difficulty,
    Speed,
}

impl Output {
    /// Lists all outputs in the order of the report.
    pub(crate) fn all() -> impl Iterator<Item = Output> {
        Output::value_variants().iter().copied()
    }

    /// Returns the part of the measuring that the output needs.
    fn part(self) -> Part {
        match self {
            Output::Table2 | Output::Table3 => Part::Tasks,
            Output::Table4 | Output::Figure2 => Part::Sweep,
            Output::Speed => Part::Speed,
            Output::Difficulty => Part::Difficulty,
            _ => Part::Text,
        }
    }

    /// Reports whether the output shows that method.
    fn shows(self, method: &MethodSpec) -> bool {
        let role = method.role;
        match self {
            Output::Table1 | Output::Speed | Output::Pareto | Output::Budget => true,
            Output::Table2 => role != Role::WithoutThreshold,
            Output::Table3 => role.is_dsmoe() || role == Role::WithoutSte,
            Output::Figure2 => role.is_dsmoe() || role == Role::WithoutThreshold,
            Output::Table4 | Output::Table5 | Output::Table6 | Output::Figure3 | Output::Difficulty => {
                role.is_dsmoe()
            }
        }
    }

    /// Lists the parts that `outputs` need of a method; none if they do not show it.
    pub(crate) fn parts_of(outputs: &[Output], method: &MethodSpec) -> Vec<Part> {
        let shown = outputs.iter().filter(|output| output.shows(method));
        let mut parts: Vec<Part> = shown.flat_map(|output| [Part::Text, output.part()]).collect();
        parts.sort();
        parts.dedup();
        parts
    }
}
