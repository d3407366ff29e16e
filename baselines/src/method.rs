//! What every method is to the rest: a dense model, calibration text and a budget in, a model out.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use dsmoe_core::Config;

use crate::controls;
use crate::error::{Error, Result};
use crate::llama_moe::LlamaMoe;
use crate::llm_pruner::{LlmPrunerBlock, LlmPrunerChannel};
use crate::moefication::MoEfication;
use crate::sparse::{Magnitude, SparseGpt, Wanda};

/// Activated parameters to reach, as methods.md's accounting counts them: tied embeddings once, routers included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// That many parameters.
    Params(f64),
    /// That share of the dense model's parameters.
    Share(f64),
}

impl Budget {
    /// The parameters meant for a dense model of `total`.
    pub fn params(self, total: u64) -> f64 {
        match self {
            Budget::Params(params) => params,
            Budget::Share(share) => share * total as f64,
        }
    }
}

impl FromStr for Budget {
    type Err = Error;

    /// `735M`, `3.93B`, `12k`, `735000000`, or a share of the dense model: `0.59`, `59%`.
    fn from_str(text: &str) -> Result<Budget> {
        let wrong = || Error::Budget {
            asked: text.to_owned(),
            problem: "is no budget".to_owned(),
            mend: "give parameters (735M) or a share of the dense model (0.59 or 59%)".to_owned(),
        };
        let (number, factor) = match text.trim().char_indices().next_back().ok_or_else(wrong)? {
            (at, 'k' | 'K') => (&text.trim()[..at], 1e3),
            (at, 'M' | 'm') => (&text.trim()[..at], 1e6),
            (at, 'B' | 'b' | 'G' | 'g') => (&text.trim()[..at], 1e9),
            (at, '%') => (&text.trim()[..at], 0.01),
            _ => (text.trim(), 1.0),
        };
        let value: f64 = number.parse().map_err(|_| wrong())?;
        let scaled = value * factor;
        if !(scaled.is_finite() && scaled > 0.0) {
            return Err(wrong());
        }
        match factor {
            0.01 if scaled <= 1.0 => Ok(Budget::Share(scaled)),
            0.01 => Err(wrong()),
            1.0 if scaled <= 1.0 => Ok(Budget::Share(scaled)),
            _ => Ok(Budget::Params(scaled)),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Budget::Share(share) => write!(f, "{share}"),
            Budget::Params(params) if params >= 1e9 => write!(f, "{}B", params / 1e9),
            Budget::Params(params) if params >= 1e6 => write!(f, "{}M", params / 1e6),
            Budget::Params(params) => write!(f, "{params}"),
        }
    }
}

/// A setting of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knob {
    /// Name, as in `--knob NAME=VALUE`.
    pub name: &'static str,
    /// Value when nothing is said; empty when the budget decides.
    pub default: &'static str,
    /// What it does and can take, one line.
    pub help: &'static str,
}

/// Values of a method's knobs: what was set, else the defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Knobs(Vec<(&'static Knob, String)>);

impl Knobs {
    /// Values for the knobs in `known`, from `NAME=VALUE` texts.
    ///
    /// # Errors
    /// A text without `=`, or a name that `known` lacks.
    pub fn parse<'a>(known: &'static [Knob], set: impl IntoIterator<Item = &'a str>) -> Result<Knobs> {
        let mut values: Vec<(&'static Knob, String)> =
            known.iter().map(|knob| (knob, knob.default.to_owned())).collect();
        for text in set {
            let names = || match known {
                [] => "this method has no knobs".to_owned(),
                _ => format!("use {}", known.iter().map(|knob| knob.name).collect::<Vec<_>>().join(", ")),
            };
            let Some((name, value)) = text.split_once('=') else {
                let problem = "is not NAME=VALUE".to_owned();
                return Err(Error::Knob { name: text.to_owned(), problem, mend: names() });
            };
            let Some(slot) = values.iter_mut().find(|(knob, _)| knob.name == name.trim()) else {
                let problem = "is no knob of this method".to_owned();
                return Err(Error::Knob { name: name.to_owned(), problem, mend: names() });
            };
            slot.1 = value.trim().to_owned();
        }
        Ok(Knobs(values))
    }

    /// The value of `name`; none when it is empty.
    ///
    /// # Errors
    /// The value is no `T`.
    ///
    /// # Panics
    /// The method has no knob of that name.
    pub fn get<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let (knob, value) = self.0.iter().find(|(knob, _)| knob.name == name).expect("a knob of this method");
        if value.is_empty() {
            return Ok(None);
        }
        value.parse().map(Some).map_err(|_| Error::Knob {
            name: knob.name.to_owned(),
            problem: format!("is {value:?}"),
            mend: knob.help.to_owned(),
        })
    }

    /// [`Knobs::get`] of a knob that has a default.
    ///
    /// # Errors
    /// The value is empty or no `T`.
    ///
    /// # Panics
    /// As [`Knobs::get`].
    pub fn need<T: FromStr>(&self, name: &str) -> Result<T> {
        self.get(name)?.ok_or_else(|| Error::Knob {
            name: name.to_owned(),
            problem: "is empty".to_owned(),
            mend: "give a value".to_owned(),
        })
    }

    /// All names with their values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(knob, value)| (knob.name, value.as_str()))
    }
}

/// What a method would make of a model, known before anything is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Parameters held.
    pub total: f64,
    /// Parameters used per token; the nearest to the budget that the method can reach.
    pub activated: f64,
    /// What reaches it, e.g. `density 0.4853` or `3 of 8 experts`.
    pub reached_by: String,
    /// Settings that were resolved, for reports.
    pub settings: Vec<(String, String)>,
}

/// How far a method is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: &'static str,
    /// Parts of it that are done.
    pub done: u64,
    /// Its parts.
    pub total: u64,
}

/// A method's work.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// Directory of the dense model.
    pub model: &'a Path,
    /// Directory to make; appears when it is complete.
    pub out: &'a Path,
    /// Replace an output directory that is not empty.
    pub force: bool,
    /// Activated parameters to reach.
    pub budget: Budget,
    /// Calibration text: sequences of one length, each with its token ids.
    pub calibration: &'a [Vec<u32>],
    /// Seed of everything random.
    pub seed: u64,
    /// Values of the method's knobs.
    pub knobs: &'a Knobs,
}

/// What was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// The plan, with the counts of the model as it is.
    pub plan: Plan,
    /// Measurements worth telling, e.g. the reconstruction error of each layer.
    pub measured: Vec<(String, f64)>,
}

/// A way from a dense model to one that activates fewer parameters.
pub trait Method: Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// One line: what it does, and in which steps budgets can be reached.
    fn summary(&self) -> &'static str;

    /// Its settings.
    fn knobs(&self) -> &'static [Knob];

    /// Whether it reads calibration text under these knobs.
    fn needs_calibration(&self, knobs: &Knobs) -> bool;

    /// What it would make of a dense model of `config`.
    ///
    /// # Errors
    /// The budget is out of reach, or a knob's value cannot be used.
    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan>;

    /// Does it. The result is a model directory like any other.
    ///
    /// # Errors
    /// As [`Method::plan`]; also a model that cannot be read or is not dense, calibration text that does not suffice,
    /// a computation without a result, or a file system that refuses. Nothing is left half-written.
    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made>;
}

/// All methods, in the order in which they are listed.
pub fn methods() -> &'static [&'static dyn Method] {
    &[
        &controls::PAPER,
        &LlmPrunerBlock,
        &LlmPrunerChannel,
        &SparseGpt,
        &Wanda,
        &Magnitude,
        &LlamaMoe { control: false },
        &MoEfication,
        &LlamaMoe { control: true },
        &controls::Dense,
        &controls::SmallDense,
        &controls::NO_STE,
        &controls::NO_THRESHOLD,
    ]
}

/// The method of that name.
///
/// # Errors
/// There is none.
pub fn method(name: &str) -> Result<&'static dyn Method> {
    methods().iter().copied().find(|method| method.name() == name).ok_or_else(|| Error::Knob {
        name: name.to_owned(),
        problem: "is no method".to_owned(),
        mend: format!("use {}", methods().iter().map(|method| method.name()).collect::<Vec<_>>().join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read() {
        for (text, want) in [
            ("735M", Budget::Params(735e6)),
            ("3.93B", Budget::Params(3.93e9)),
            ("12k", Budget::Params(12e3)),
            ("735000000", Budget::Params(735e6)),
            ("0.59", Budget::Share(0.59)),
            ("59%", Budget::Share(0.59)),
            ("1", Budget::Share(1.0)),
        ] {
            assert_eq!(text.parse::<Budget>().ok(), Some(want), "{text}");
        }
        for text in ["", "M", "-1", "0", "NaN", "inf", "120%", "many"] {
            let error = text.parse::<Budget>().expect_err(text).to_string();
            assert!(error.contains("give parameters"), "{error}");
        }
        assert_eq!(Budget::Share(0.59).params(1_235_814_400), 0.59 * 1_235_814_400.0);
    }

    #[test]
    fn knobs_are_set_or_default() {
        const KNOWN: &[Knob] = &[
            Knob { name: "damp", default: "0.01", help: "use a number above 0" },
            Knob { name: "layers", default: "", help: "use FIRST..LAST" },
        ];
        let knobs = Knobs::parse(KNOWN, ["damp=0.1"]).unwrap();
        assert_eq!(knobs.need::<f64>("damp").unwrap(), 0.1);
        assert_eq!(knobs.get::<usize>("layers").unwrap(), None);
        assert_eq!(knobs.iter().collect::<Vec<_>>(), [("damp", "0.1"), ("layers", "")]);
        for (set, parts) in
            [("damp", ["NAME=VALUE", "damp, layers"]), ("dump=1", ["no knob", "damp, layers"])]
        {
            let error = Knobs::parse(KNOWN, [set]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        let knobs = Knobs::parse(KNOWN, ["damp=lots"]).unwrap();
        assert!(knobs.need::<f64>("damp").unwrap_err().to_string().contains("use a number above 0"));
    }
}
