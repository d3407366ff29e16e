//! The interface of all methods: a model, calibration text and a budget in, a model directory out.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use dsmoe_core::Config;
use dsmoe_kernels::comm::Communicator;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::partial::Partial;
use crate::settings::{SettingInfo, SettingValues};

/// The models that a method changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Dense models.
    Dense,
    /// Models with experts.
    Experts,
}

/// The parameters that a budget counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Counts {
    /// Those that a token uses.
    Activated,
    /// All that the model holds.
    Held,
}

/// A budget as a user gives it: with a word for what it counts, or without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Asked {
    budget: Budget,
    counts: Option<Counts>,
}

impl Asked {
    /// Returns the budget for `method`.
    ///
    /// # Errors
    /// The method counts other parameters than those that were asked for.
    pub fn of(self, method: &dyn Method) -> Result<Budget> {
        match (self.counts, method.counts()) {
            (Some(asked), counts) if asked != counts => {
                let problem = format!("{} counts {} parameters", method.name(), counts.word());
                Err(Error::budget(
                    self,
                    problem,
                    format!("give {}:{} or leave the word out", counts.word(), self.budget),
                ))
            }
            _ => Ok(self.budget),
        }
    }
}

impl Counts {
    /// Returns the word for it.
    pub fn word(self) -> &'static str {
        match self {
            Counts::Activated => "activated",
            Counts::Held => "held",
        }
    }
}

impl FromStr for Asked {
    type Err = Error;

    /// Reads a [`Budget`], after `held:`, `activated:` or nothing.
    fn from_str(text: &str) -> Result<Asked> {
        let counted = [Counts::Held, Counts::Activated].into_iter().find_map(|counts| {
            let rest = text.trim().strip_prefix(counts.word())?.strip_prefix(':')?;
            Some((counts, rest))
        });
        let wrong = |_| {
            let help =
                "give parameters (735M) or a share (0.59 or 59%), after `held:`, `activated:` or nothing";
            Error::budget(text, "is not a budget", help)
        };
        match counted {
            Some((counts, rest)) => Ok(Asked { budget: rest.parse().map_err(wrong)?, counts: Some(counts) }),
            None => Ok(Asked { budget: text.parse()?, counts: None }),
        }
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.counts {
            Some(counts) => write!(f, "{}:{}", counts.word(), self.budget),
            None => self.budget.fmt(f),
        }
    }
}

/// The number of parameters to reach, of those that a method counts ([`Method::counts`]). Tied embeddings count once; routers count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// A number of parameters.
    Params(f64),
    /// A share of the source's parameters.
    Share(f64),
}

impl Budget {
    /// Converts to parameters, for a source of `total`.
    pub fn params(self, total: u64) -> f64 {
        match self {
            Budget::Params(params) => params,
            Budget::Share(share) => share * total as f64,
        }
    }
}

/// Fewest parameters that a budget without a suffix asks for.
const LEAST_PARAMS: f64 = 1000.0;

impl FromStr for Budget {
    type Err = Error;

    /// Reads `735M`, `3.93B`, `12k`, `735000000`, or a share of the dense model: `0.59`, `59%`. Numbers without a suffix below
    /// 1,000 are mistaken shares.
    fn from_str(text: &str) -> Result<Budget> {
        let help = "give parameters (735M) or a share of the dense model (0.59 or 59%)".to_owned();
        let problem = "is not a budget".to_owned();
        let wrong = || Error::Budget { asked: text.to_owned(), problem, help };
        let text = text.trim();
        let (number, factor) = match text.char_indices().next_back() {
            Some((at, 'k' | 'K')) => (&text[..at], 1e3),
            Some((at, 'M' | 'm')) => (&text[..at], 1e6),
            Some((at, 'B' | 'b' | 'G' | 'g')) => (&text[..at], 1e9),
            Some((at, '%')) => (&text[..at], 0.01),
            _ => (text, 1.0),
        };
        match number.parse::<f64>().map(|number| number * factor) {
            Ok(scaled) if !(scaled.is_finite() && scaled > 0.0) => Err(wrong()),
            Ok(share) if factor <= 1.0 && share <= 1.0 => Ok(Budget::Share(share)),
            Ok(few) if factor == 1.0 && few < LEAST_PARAMS => {
                let help = format!("write {few}% for a share of the dense model, or {few}M for parameters");
                Err(Error::Budget { asked: text.to_owned(), problem: format!("is {few} parameters"), help })
            }
            Ok(params) if factor >= 1.0 => Ok(Budget::Params(params)),
            _ => Err(wrong()),
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

/// The model that a method would make, known before anything is computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Parameters of the model.
    pub total: f64,
    /// Parameters used per token; where the budget counts them, the nearest to it that the method can reach.
    pub activated: f64,
    /// The setting that reaches the budget, e.g. `density 0.4853` or `3 of 8 experts`.
    pub reached_by: String,
    /// Quantities that follow from the budget and the model, for reports.
    pub settings: Vec<(String, String)>,
    /// The model has masked weights that stay zero in training.
    pub masked: bool,
    /// The model computes as much as the dense one: zeros are multiplied like other weights.
    pub keeps_dense_compute: bool,
    /// The model is the dense model itself.
    pub unchanged: bool,
    /// The share of experts to be active that training has to reach.
    pub active_target: Option<f64>,
    /// Notices for the user about how the method makes the model, each in one line.
    pub notices: Vec<String>,
}

impl Plan {
    /// A plan of a dense model of `params` parameters, all of them used.
    pub(crate) fn dense(params: f64, reached_by: String) -> Plan {
        Plan { total: params, activated: params, reached_by, ..Plan::default() }
    }
}

/// The progress of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The current stage.
    pub stage: &'static str,
    /// The finished parts of the stage.
    pub done: u64,
    /// All parts of the stage.
    pub total: u64,
}

/// The input of a method.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// Directory of the source.
    pub model: &'a Path,
    /// Directory to write; it appears when it is complete.
    pub out: &'a Path,
    /// Replace an output directory that is not empty.
    pub force: bool,
    /// Parameters to reach, of those that the method counts.
    pub budget: Budget,
    /// Calibration text: token ids of sequences of one length.
    pub calibration: &'a [Vec<u32>],
    /// Seed of everything random.
    pub seed: u64,
    /// The processes that do the job together; each is given the same one. They divide the calibration text, and the first one
    /// writes. [`alone`](dsmoe_kernels::comm::alone) for a single process.
    pub comm: &'a Arc<dyn Communicator>,
    /// The parts that an interrupted job left. A method that continues ([`Configured::continues`]) reads them, and keeps its own
    /// there. Several processes have [`Partial::none`].
    pub partial: &'a Partial,
}

/// The result of a method.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// The plan, with the counts of the model as it is.
    pub plan: Plan,
    /// Measurements, e.g. the reconstruction error of each layer.
    pub measured: Vec<(String, f64)>,
}

/// A way from a model to one that activates or holds fewer parameters.
pub trait Method: Sync {
    /// Returns the name.
    fn name(&self) -> &'static str;

    /// Describes the method in one line, and the budgets that it can reach.
    fn summary(&self) -> &'static str;

    /// Returns the models that it changes.
    fn source(&self) -> Source {
        Source::Dense
    }

    /// Returns the parameters that its budgets count.
    fn counts(&self) -> Counts {
        Counts::Activated
    }

    /// Lists the settings.
    fn settings(&self) -> Vec<SettingInfo>;

    /// Reads and checks settings; those not given have their defaults.
    ///
    /// # Errors
    /// A setting is unknown, or its value cannot be used. The error names it.
    fn configure(&self, values: &SettingValues) -> Result<Box<dyn Configured>>;
}

/// A method with its settings.
pub trait Configured {
    /// Returns true if the method reads calibration text.
    fn needs_calibration(&self) -> bool {
        false
    }

    /// Returns true if an interrupted job of the method continues from the parts that it left.
    fn continues(&self) -> bool {
        false
    }

    /// Returns all settings, defaults included.
    fn resolved(&self) -> SettingValues {
        SettingValues::new()
    }

    /// Plans the model that would be made of a model of `config`.
    ///
    /// # Errors
    /// The budget is out of reach, or a setting does not fit the model.
    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan>;

    /// Makes the model. The result is a model directory like any other.
    ///
    /// # Errors
    /// The errors of [`Configured::plan`]; also a model that cannot be read or is not what the method changes, calibration text that
    /// does not suffice, a computation without a result, or a file system that refuses. Nothing is left half-written.
    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made>;
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
        for text in ["25", "40.5", "999"] {
            let error = text.parse::<Budget>().expect_err(text).to_string();
            assert!(error.contains(&format!("write {text}% for a share")), "{error}");
        }
        assert_eq!(Budget::Share(0.59).params(1_235_814_400), 0.59 * 1_235_814_400.0);
    }

    #[test]
    fn budgets_say_what_they_count() {
        let of = |text: &str, name: &str| text.parse::<Asked>().unwrap().of(crate::method(name).unwrap());
        for text in ["75%", "held:75%", " held:0.75"] {
            assert_eq!(of(text, "hc-smoe").unwrap(), Budget::Share(0.75), "{text}");
        }
        assert_eq!(of("activated:12k", "wanda").unwrap(), Budget::Params(12e3));
        for (text, name, part) in [
            ("held:75%", "wanda", "held:0.75: wanda counts activated parameters; give activated:0.75"),
            ("activated:5M", "hc-smoe", "hc-smoe counts held parameters"),
        ] {
            let error = of(text, name).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for text in ["held:", "held:0", "kept:5M", "held"] {
            assert!(text.parse::<Asked>().is_err(), "{text}");
        }
    }
}
