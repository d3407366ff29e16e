//! The tables and figures of a report, and the measurements that each needs.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::profile::{MethodSpec, Role};

/// A table or figure of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// All outputs in the order of the report, with their names and the parts that they need.
const ALL: [(Output, &str, Part); 12] = [
    (Output::Table1, "table1", Part::Text),
    (Output::Table2, "table2", Part::Tasks),
    (Output::Table3, "table3", Part::Tasks),
    (Output::Table4, "table4", Part::Sweep),
    (Output::Table5, "table5", Part::Text),
    (Output::Table6, "table6", Part::Text),
    (Output::Figure2, "figure2", Part::Sweep),
    (Output::Figure3, "figure3", Part::Text),
    (Output::Speed, "speed", Part::Speed),
    (Output::Pareto, "pareto", Part::Text),
    (Output::Difficulty, "difficulty", Part::Difficulty),
    (Output::Budget, "budget", Part::Text),
];

impl Output {
    /// Lists all outputs in the order of the report.
    pub(crate) fn all() -> impl Iterator<Item = Output> {
        ALL.iter().map(|(output, ..)| *output)
    }

    pub(crate) const NAMES: [&'static str; 12] = {
        let mut names = [""; 12];
        let mut at = 0;
        while at < ALL.len() {
            names[at] = ALL[at].1;
            at += 1;
        }
        names
    };

    fn row(self) -> &'static (Output, &'static str, Part) {
        &ALL[self as usize]
    }

    pub(crate) fn name(self) -> &'static str {
        self.row().1
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
        let mut parts: Vec<Part> = shown.flat_map(|output| [Part::Text, output.row().2]).collect();
        parts.sort();
        parts.dedup();
        parts
    }
}

impl FromStr for Output {
    type Err = String;

    fn from_str(text: &str) -> Result<Output, String> {
        let found = ALL.iter().find(|(_, name, _)| *name == text);
        found
            .map(|(output, ..)| *output)
            .ok_or_else(|| format!("`{text}` is not an output; use {}", Output::NAMES.join(", ")))
    }
}
