//! One experiment on the claims of a paper, and the rule by which its numbers decide about a claim.
//!
//! ```text
//! d(seed, column, control) = control - row - margin
//! agrees      d > 0 at every seed, for every column and control
//! differs     mean over seeds of d <= 0 for some column and control
//! undecided   otherwise: the mean has the claim's sign, and some seed has not
//! ```

use std::fmt;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::lab::Lab;
use super::sketch::Sketch;

/// An experiment of a related system. All of its text is data; its numbers are of one seed.
pub(crate) struct Experiment {
    /// Its name in profiles, options and files.
    pub(crate) name: &'static str,
    /// The system's name.
    pub(crate) title: &'static str,
    /// The procedure, in whole sentences.
    pub(crate) setting: &'static str,
    /// The meaning of the numbers, with their unit; less is better.
    pub(crate) numbers: &'static str,
    pub(crate) claims: &'static [Claim],
    /// Lists the stages of one seed.
    pub(crate) plan: fn(&mut Sketch<'_>) -> Result<()>,
    /// Measures one seed. Work that takes seconds is a stage of the lab, so that an interrupted run continues behind it.
    pub(crate) measure: fn(&mut Lab<'_, '_>) -> Result<Vec<Value>>,
}

/// One number of an experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Value {
    pub(crate) row: String,
    pub(crate) column: String,
    pub(crate) value: f64,
}

impl Value {
    pub(crate) fn new(row: &str, column: &str, value: f64) -> Value {
        Value { row: row.to_owned(), column: column.to_owned(), value }
    }
}

/// A statement of a paper as a comparison of rows.
pub(crate) struct Claim {
    /// The paper's claim, and where it was read.
    pub(crate) paper: &'static str,
    /// The row that should be better than all controls.
    pub(crate) row: &'static str,
    /// Rows that could have been better.
    pub(crate) controls: &'static [&'static str],
    /// The columns in which it should be; one of numbers by text stands for all texts.
    pub(crate) columns: &'static [&'static str],
    /// The least difference that counts; below 0 the row may be worse by as much.
    pub(crate) margin: f64,
    /// Why the numbers may agree with the claim.
    pub(crate) agrees: &'static str,
    /// Why they may not.
    pub(crate) differs: &'static str,
}

/// The verdict of the numbers on a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    Agrees,
    Differs,
    Undecided,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Agrees => "yes",
            Verdict::Differs => "no",
            Verdict::Undecided => "undecided",
        })
    }
}

/// The numbers of all seeds.
pub(crate) struct Numbers<'a>(pub(crate) &'a [Vec<Value>]);

impl Numbers<'_> {
    /// Returns the number of every seed.
    ///
    /// # Errors
    /// A seed has none.
    pub(crate) fn of(&self, row: &str, column: &str) -> Result<Vec<f64>> {
        let find = |values: &Vec<Value>| {
            let found = values.iter().find(|value| value.row == row && value.column == column);
            match found {
                Some(found) if found.value.is_finite() => Ok(found.value),
                Some(_) => bail!("row {row:?} has no finite number in column {column:?}"),
                None => bail!("there is no row {row:?} with a column {column:?}"),
            }
        };
        self.0.iter().map(find).collect()
    }

    /// Lists the columns that a claim's column stands for: itself, or where a row has its numbers by text, `COLUMN on TEXT` for
    /// every text.
    fn columns(&self, row: &str, column: &str) -> Vec<String> {
        let of_row = self.0.first().into_iter().flatten().filter(|value| value.row == row);
        let texts = format!("{column} on ");
        let found: Vec<String> =
            of_row.map(|value| value.column.clone()).filter(|name| name.starts_with(&texts)).collect();
        if found.is_empty() { vec![column.to_owned()] } else { found }
    }
}

impl Claim {
    /// Lists the columns of numbers that decide.
    pub(crate) fn columns(&self, numbers: &Numbers<'_>) -> Vec<String> {
        self.columns.iter().flat_map(|column| numbers.columns(self.row, column)).collect()
    }

    /// Decides about the claim by the rule of this module, and words the numbers.
    pub(crate) fn decide(&self, numbers: &Numbers<'_>) -> Result<(Verdict, String)> {
        let (mut all, mut verdict) = (true, Verdict::Undecided);
        let mut words = Vec::new();
        for column in &self.columns(numbers) {
            let own = numbers.of(self.row, column)?;
            let mut nearest: Option<(f64, f64, &str)> = None;
            for control in self.controls {
                let other = numbers.of(control, column)?;
                let differences: Vec<f64> =
                    own.iter().zip(&other).map(|(own, other)| other - own - self.margin).collect();
                all &= differences.iter().all(|difference| *difference > 0.0);
                let difference = mean(&differences);
                if difference <= 0.0 {
                    verdict = Verdict::Differs;
                }
                if nearest.is_none_or(|(least, ..)| difference < least) {
                    nearest = Some((difference, mean(&other), control));
                }
            }
            if let Some((_, other, control)) = nearest {
                words.push(format!("{column}: {} against {} ({control})", shown(mean(&own)), shown(other)));
            }
        }
        let verdict = if all { Verdict::Agrees } else { verdict };
        Ok((verdict, format!("{}: {}", self.row, words.join("; "))))
    }

    /// Returns the reason that goes with a verdict.
    pub(crate) fn why(&self, verdict: Verdict) -> String {
        match verdict {
            Verdict::Agrees => self.agrees.to_owned(),
            Verdict::Differs => self.differs.to_owned(),
            Verdict::Undecided => "seeds disagree with one another".to_owned(),
        }
    }
}

/// Returns the mean; NaN of nothing.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Formats a number with three decimals, or with as many digits as a large one has.
pub(crate) fn shown(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.3}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLAIM: Claim = Claim {
        paper: "a is better than b and c",
        row: "a",
        controls: &["b", "c"],
        columns: &["x"],
        margin: 0.0,
        agrees: "it is",
        differs: "it is not",
    };

    /// Seeds with numbers of a, b and c.
    fn seeds(numbers: &[[f64; 3]]) -> Vec<Vec<Value>> {
        let of = |numbers: &[f64; 3]| {
            ["a", "b", "c"].iter().zip(numbers).map(|(row, value)| Value::new(row, "x", *value)).collect()
        };
        numbers.iter().map(of).collect()
    }

    fn verdict(claim: &Claim, numbers: &[[f64; 3]]) -> Verdict {
        claim.decide(&Numbers(&seeds(numbers))).unwrap().0
    }

    #[test]
    fn every_seed_and_control_counts() {
        assert_eq!(verdict(&CLAIM, &[[1.0, 2.0, 3.0], [1.0, 1.5, 1.1]]), Verdict::Agrees);
        // One seed of two has the other sign, and the mean the claim's.
        assert_eq!(verdict(&CLAIM, &[[1.0, 2.0, 3.0], [1.0, 0.9, 3.0]]), Verdict::Undecided);
        assert_eq!(verdict(&CLAIM, &[[1.0, 2.0, 0.5], [1.0, 2.0, 1.2]]), Verdict::Differs);
        // Equal is not better.
        assert_eq!(verdict(&CLAIM, &[[1.0, 1.0, 3.0]]), Verdict::Differs);
    }

    #[test]
    fn a_margin_moves_the_rule() {
        let within = Claim { margin: -0.5, ..CLAIM };
        assert_eq!(verdict(&within, &[[1.4, 1.0, 3.0]]), Verdict::Agrees);
        assert_eq!(verdict(&within, &[[1.6, 1.0, 3.0]]), Verdict::Differs);
    }

    #[test]
    fn a_column_stands_for_those_of_all_texts() {
        let value = |row, text, value| Value::new(row, &format!("x on {text}"), value);
        let of = |last| {
            let own = [value("a", "web", 1.0), value("a", "code", 1.0)];
            let others = ["b", "c"].map(|row| [value(row, "web", 2.0), value(row, "code", last)]);
            vec![own.into_iter().chain(others.into_iter().flatten()).collect::<Vec<Value>>()]
        };
        assert_eq!(CLAIM.columns(&Numbers(&of(2.0))), ["x on web", "x on code"]);
        assert_eq!(CLAIM.decide(&Numbers(&of(2.0))).unwrap().0, Verdict::Agrees);
        assert_eq!(CLAIM.decide(&Numbers(&of(0.5))).unwrap().0, Verdict::Differs);
    }

    #[test]
    fn the_words_name_the_nearest_control_and_missing_numbers_are_errors() {
        let (_, words) = CLAIM.decide(&Numbers(&seeds(&[[1.0, 2.0, 1.25], [3.0, 4.0, 3.25]]))).unwrap();
        assert_eq!(words, "a: x: 2.000 against 2.250 (c)");
        let missing = Claim { columns: &["y"], ..CLAIM };
        let error = missing.decide(&Numbers(&seeds(&[[1.0, 2.0, 3.0]]))).unwrap_err();
        assert_eq!(error.to_string(), "there is no row \"a\" with a column \"y\"");
        let error = CLAIM.decide(&Numbers(&seeds(&[[1.0, f64::NAN, 3.0]]))).unwrap_err();
        assert_eq!(error.to_string(), "row \"b\" has no finite number in column \"x\"");
    }
}
