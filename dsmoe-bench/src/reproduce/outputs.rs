//! The tables and figures, and what has to be measured for each.

use std::str::FromStr;

use super::profile::{MethodSpec, PaperRow, Role};

/// A table or figure of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

/// What is measured of a trained model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Perplexity, activated parameters, layers: always.
    Text,
    Tasks,
    Sweep,
    Difficulty,
    Speed,
}

impl Output {
    pub(crate) const ALL: [Output; 12] = [
        Output::Table1,
        Output::Table2,
        Output::Table3,
        Output::Table4,
        Output::Table5,
        Output::Table6,
        Output::Figure2,
        Output::Figure3,
        Output::Speed,
        Output::Pareto,
        Output::Difficulty,
        Output::Budget,
    ];
    pub(crate) const NAMES: [&'static str; 12] = [
        "table1",
        "table2",
        "table3",
        "table4",
        "table5",
        "table6",
        "figure2",
        "figure3",
        "speed",
        "pareto",
        "difficulty",
        "budget",
    ];

    pub(crate) fn name(self) -> &'static str {
        Output::NAMES[Output::ALL.iter().position(|other| *other == self).unwrap_or(0)]
    }

    /// Whether it shows that method.
    pub(crate) fn shows(self, method: &MethodSpec) -> bool {
        let gated = matches!(method.role, Role::Dsmoe | Role::Paper);
        match self {
            Output::Table1 | Output::Speed | Output::Pareto | Output::Budget => true,
            Output::Table2 => !matches!(method.role, Role::WithoutThreshold),
            Output::Table3 => gated || method.role == Role::WithoutSte,
            Output::Figure2 => gated || method.role == Role::WithoutThreshold,
            Output::Table4 | Output::Table5 | Output::Table6 | Output::Figure3 | Output::Difficulty => gated,
        }
    }

    /// What it needs of a method that it shows, beside the text.
    fn part(self) -> Part {
        match self {
            Output::Table1
            | Output::Table5
            | Output::Table6
            | Output::Figure3
            | Output::Pareto
            | Output::Budget => Part::Text,
            Output::Table2 | Output::Table3 => Part::Tasks,
            Output::Table4 | Output::Figure2 => Part::Sweep,
            Output::Speed => Part::Speed,
            Output::Difficulty => Part::Difficulty,
        }
    }

    /// The parts that `outputs` need of a method; none when it is in none of them.
    pub(crate) fn parts_of(outputs: &[Output], method: &MethodSpec) -> Vec<Part> {
        let gates =
            matches!(method.role, Role::Dsmoe | Role::Paper | Role::WithoutSte | Role::WithoutThreshold);
        let mut parts = Vec::new();
        for output in outputs.iter().filter(|output| output.shows(method)) {
            for part in [Part::Text, output.part()] {
                let fits = gates || !matches!(part, Part::Sweep | Part::Difficulty);
                if fits && !parts.contains(&part) {
                    parts.push(part);
                }
            }
        }
        parts.sort();
        parts
    }
}

impl FromStr for Output {
    type Err = String;

    fn from_str(text: &str) -> Result<Output, String> {
        let at = Output::NAMES.iter().position(|name| *name == text);
        at.map(|at| Output::ALL[at])
            .ok_or_else(|| format!("no output `{text}`; use {}", Output::NAMES.join(", ")))
    }
}

impl PaperRow {
    /// What the paper calls it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            PaperRow::Dense => "dense",
            PaperRow::LlmPrunerChannel => "LLM-Pruner, channels",
            PaperRow::LlmPrunerBlock => "LLM-Pruner, blocks",
            PaperRow::Sparsegpt => "SparseGPT",
            PaperRow::LlamaMoe => "LLaMA-MoE",
            PaperRow::Dsmoe => "DSMoE",
        }
    }
}
