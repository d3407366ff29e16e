//! Results of experiments: what results.json holds, the table of claims, and the report.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::super::shipped::compare_experiments;
use super::experiment::{Claim, Experiment, Numbers, Value, Verdict, mean, shown};
use crate::format::{self, Table};
use crate::report::{Block, Cell, Chapter, Report, Tabular, markdown};

/// The contents of results.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) format_version: u32,
    pub(crate) setup: Setup,
    pub(crate) experiments: Vec<Found>,
}

/// The definition and the inputs of the experiments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) format_version: u32,
    pub(crate) program: String,
    /// Revision that the program was built from; `unknown` outside a repository.
    pub(crate) git_revision: String,
    pub(crate) profile: super::definition::Definition,
    /// Hashes of text and tokenizer.
    pub(crate) inputs: serde_json::Value,
    /// Hashes of the dense models, by seed.
    pub(crate) dense_models: Vec<String>,
    pub(crate) dense_params: u64,
}

/// The numbers of an experiment over seeds, and what they say about its claims.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) setting: String,
    pub(crate) numbers: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) claims: Vec<Decided>,
}

/// The numbers of one row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) cells: Vec<Measured>,
}

/// A number over seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) column: String,
    pub(crate) mean: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// In the order of the seeds.
    pub(crate) seeds: Vec<f64>,
}

/// A claim and what the numbers say about it, with all that decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Decided {
    pub(crate) paper: String,
    pub(crate) row: String,
    pub(crate) controls: Vec<String>,
    pub(crate) columns: Vec<String>,
    pub(crate) margin: f64,
    pub(crate) ours: String,
    pub(crate) agrees: Verdict,
    pub(crate) why: String,
}

impl Found {
    /// Combines the numbers of all seeds.
    ///
    /// # Errors
    /// A claim is about a number that a seed does not have.
    pub(crate) fn new(experiment: &Experiment, seeds: &[Vec<Value>]) -> Result<Found> {
        Found::by(experiment, seeds, experiment.claims.iter())
    }

    /// Combines numbers that were recorded, maybe by an earlier version: claims about rows that were added since are left out.
    ///
    /// # Errors
    /// A claim is about a number that a seed does not have in a row that there is.
    pub(crate) fn recorded(experiment: &Experiment, seeds: &[Vec<Value>]) -> Result<Found> {
        let has = |row: &str| seeds.iter().flatten().any(|value| value.row == row);
        let known = |claim: &&Claim| has(claim.row) && claim.controls.iter().all(|row| has(row));
        Found::by(experiment, seeds, experiment.claims.iter().filter(known))
    }

    fn by<'a>(
        experiment: &Experiment,
        seeds: &[Vec<Value>],
        claims: impl Iterator<Item = &'a Claim>,
    ) -> Result<Found> {
        let numbers = Numbers(seeds);
        let mut rows: Vec<Row> = Vec::new();
        for value in seeds.first().into_iter().flatten() {
            let seeds = numbers.of(&value.row, &value.column).context(experiment.name)?;
            let measured = Measured {
                column: value.column.clone(),
                mean: mean(&seeds),
                min: seeds.iter().copied().fold(f64::INFINITY, f64::min),
                max: seeds.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                seeds,
            };
            match rows.iter_mut().find(|row| row.name == value.row) {
                Some(row) => row.cells.push(measured),
                None => rows.push(Row { name: value.row.clone(), cells: vec![measured] }),
            }
        }
        let decide = |claim: &Claim| {
            let (agrees, ours) = claim.decide(&numbers).context(experiment.name)?;
            let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
            Ok(Decided {
                paper: claim.paper.to_owned(),
                row: claim.row.to_owned(),
                controls: owned(claim.controls),
                columns: claim.columns(&numbers),
                margin: claim.margin,
                ours,
                agrees,
                why: claim.why(agrees),
            })
        };
        Ok(Found {
            name: experiment.name.to_owned(),
            title: experiment.title.to_owned(),
            setting: experiment.setting.to_owned(),
            numbers: experiment.numbers.to_owned(),
            rows,
            claims: claims.map(decide).collect::<Result<_>>()?,
        })
    }

    /// Lists the columns in the order in which they occur.
    fn columns(&self) -> Vec<&str> {
        let mut columns: Vec<&str> = Vec::new();
        for cell in self.rows.iter().flat_map(|row| &row.cells) {
            if !columns.contains(&&*cell.column) {
                columns.push(&cell.column);
            }
        }
        columns
    }

    fn table(&self) -> Tabular {
        let columns = self.columns();
        let mut table = Tabular::new(&self.name, &self.numbers, "row").note(&*self.setting);
        table.extend(columns.iter().copied());
        for row in &self.rows {
            let cell = |column: &&str| match row.cells.iter().find(|cell| cell.column == *column) {
                Some(found) => Cell { text: found.text(), value: Some(found.mean), tip: None },
                None => "–".into(),
            };
            let cells = [row.name.as_str().into()].into_iter().chain(columns.iter().map(cell)).collect();
            table.row(cells);
        }
        table
    }
}

impl Measured {
    fn text(&self) -> String {
        match self.seeds.len() {
            1 => shown(self.mean),
            _ => format!("{} ({} to {})", shown(self.mean), shown(self.min), shown(self.max)),
        }
    }
}

impl Outcome {
    /// Returns the table of all claims.
    pub(crate) fn claims(&self) -> Tabular {
        let seeds = self.seeds();
        let note = format!(
            "Numbers are means over {seeds} seed{}. A claim holds if its row is better than every control at every seed; it does not \
             if it is not better than one of them in the mean; otherwise the seeds disagree.",
            if seeds == 1 { "" } else { "s" }
        );
        let mut table =
            Tabular::new("claims", "Claims", "system | paper's claim | ours | agrees | why").note(note);
        for found in &self.experiments {
            for claim in &found.claims {
                let agrees = claim.agrees.to_string();
                table.row(
                    [&found.title, &claim.paper, &claim.ours, &agrees, &claim.why]
                        .map(|text| text.as_str().into())
                        .to_vec(),
                );
            }
        }
        table
    }

    fn seeds(&self) -> usize {
        self.experiments
            .iter()
            .flat_map(|found| &found.rows)
            .flat_map(|row| &row.cells)
            .next()
            .map_or(0, |cell| cell.seeds.len())
    }

    /// Writes what a document shows of the record at `dir`: all claims, or the numbers of the experiment of that name.
    pub(crate) fn block(&self, dir: &str, name: Option<&str>) -> Result<String> {
        let Setup { git_revision, profile, dense_params, .. } = &self.setup;
        let seeds = self.seeds();
        let mut table = match name {
            None => self.claims(),
            Some(name) => {
                let found = self.experiments.iter().find(|found| found.name == name);
                let names =
                    || self.experiments.iter().map(|found| &*found.name).collect::<Vec<_>>().join(", ");
                found
                    .with_context(|| format!("the record has no experiment {name}; it has {}", names()))?
                    .table()
            }
        };
        let _ = write!(
            table.note,
            " Profile {}, a dense model of {} parameters, {seeds} seed{}; `{dir}`, revision {git_revision}.",
            profile.name,
            format::amount(*dense_params as f64),
            if seeds == 1 { "" } else { "s" },
        );
        let head = name.map_or(String::new(), |_| format!("\n{}:\n", capital(&table.title)));
        Ok(format!("{head}\n{}\n", markdown::bare_table(&table)))
    }

    /// Returns the report.
    pub(crate) fn report(&self) -> Report {
        let mut claims: Vec<Block> = vec![self.claims().into()];
        if let Some(record) = compare_experiments(self) {
            claims.push(Block::Text(format!("Beside the record: {}.", record.text())));
        }
        let mut chapters = vec![Chapter::new("claims", "Claims", claims)];
        chapters.extend(
            self.experiments
                .iter()
                .map(|found| Chapter::new(&found.name, &found.title, vec![Block::Table(found.table())])),
        );
        Report {
            title: "Systems beside DSMoE".to_owned(),
            subtitle: format!("profile {}: {}", self.setup.profile.name, self.setup.profile.about),
            accent: vec!["DSMoE".to_owned()],
            chapters,
        }
    }

    /// Writes the table of claims for a console.
    pub(crate) fn show(&self) -> String {
        let mut table = Table::new(["system", "ours", "agrees"]);
        for found in &self.experiments {
            for claim in &found.claims {
                table.row([found.title.clone(), claim.ours.clone(), claim.agrees.to_string()]);
            }
        }
        table.show()
    }
}

/// Returns the text with a capital letter at its start.
fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::super::ALL;
    use super::*;

    #[test]
    fn claims_about_rows_that_a_record_lacks_are_left_out() {
        for experiment in &ALL {
            let of_claim = |claim: &Claim| {
                let rows = [claim.row].into_iter().chain(claim.controls.iter().copied());
                rows.flat_map(|row| claim.columns.iter().map(move |column| Value::new(row, column, 1.0)))
                    .collect::<Vec<_>>()
            };
            let all: Vec<Value> = experiment.claims.iter().flat_map(of_claim).collect();
            let whole = Found::new(experiment, std::slice::from_ref(&all)).unwrap();
            assert_eq!(Found::recorded(experiment, std::slice::from_ref(&all)).unwrap(), whole);
            let gone = experiment.claims[0].row;
            let earlier: Vec<Value> = all.into_iter().filter(|value| value.row != gone).collect();
            assert!(Found::new(experiment, std::slice::from_ref(&earlier)).is_err(), "{}", experiment.name);
            let found = Found::recorded(experiment, &[earlier]).unwrap();
            let known = |claim: &&Claim| claim.row != gone && !claim.controls.contains(&gone);
            let known: Vec<&str> = experiment.claims.iter().filter(known).map(|claim| claim.paper).collect();
            assert_eq!(found.claims.iter().map(|claim| &*claim.paper).collect::<Vec<_>>(), known);
        }
    }
}
