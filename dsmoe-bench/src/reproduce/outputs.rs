//! The tables and figures of a report, and the measurements that each needs.

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::profile::{MethodSpec, Profile, Role};

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
    Frontier,
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

    /// Lists the outputs of a profile.
    pub(crate) fn of_profile(profile: &Profile) -> Result<Vec<Output>> {
        let named = |name: &String| {
            Output::from_str(name, false)
                .map_err(|_| anyhow::anyhow!("profile {}: outputs has no {name:?}", profile.name))
        };
        match profile.outputs[..] {
            [] => Ok(Output::all().filter(|output| *output != Output::Frontier).collect()),
            _ => profile.outputs.iter().map(named).collect(),
        }
    }

    /// Lists the parts of the measuring that the output needs.
    pub(crate) fn parts(self) -> &'static [Part] {
        match self {
            Output::Table2 | Output::Table3 => &[Part::Text, Part::Tasks],
            Output::Table4 | Output::Figure2 => &[Part::Text, Part::Sweep],
            Output::Speed => &[Part::Text, Part::Speed],
            Output::Difficulty => &[Part::Text, Part::Difficulty],
            Output::Frontier => &[Part::Text, Part::Tasks, Part::Speed],
            _ => &[Part::Text],
        }
    }

    /// Reports whether the output shows that method.
    fn shows(self, method: &MethodSpec) -> bool {
        let role = method.role;
        match self {
            Output::Table1 | Output::Speed | Output::Pareto | Output::Budget | Output::Frontier => true,
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
        let mut parts: Vec<Part> = shown.flat_map(|output| output.parts()).copied().collect();
        // A router that stands in for the model's takes time of its own.
        parts.retain(|part| *part != Part::Speed || method.router.is_none());
        parts.sort();
        parts.dedup();
        parts
    }
}
