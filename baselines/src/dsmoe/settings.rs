//! Settings of the DSMoE methods.

use std::fmt;
use std::str::FromStr;

use dsmoe_core::convert::start::{RouterTarget, StartSettings, Widths};
use dsmoe_router::{GateValue, Rescale, RouterInit, ZeroActive};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::settings::{settings, stored_as_text};

settings! {
    /// Settings of DSMoE.
    pub struct Settings {
        /// Experts per layer, a divisor of intermediate_size; width(W): of W neurons; auto: of 16 with routers=fitted, else 8.
        pub experts: Experts = Experts::Count(8),
        /// An expert is active if its gate exceeds this number from 0 to 1.
        pub threshold: f64 = 0.5,
        /// Neurons of an expert: contiguous, random, taylor (sorted by importance) or clustering (similar neurons).
        pub order: Order = Order::Contiguous,
        /// Start of the routers: random, open, centroid, warm(K), calibrated (open the budget's share on the text) or
        /// fitted (with the core, the projections and the budgets below).
        pub routers: Routers = Routers::Untrained(RouterInit::Random),
        /// Factor of an active expert: sigmoid (its gate) or binary (1).
        pub gate_value: GateValue = GateValue::Sigmoid,
        /// Scale of the sum of experts: eq8 (experts over active ones) or none.
        pub rescale: Rescale = Rescale::None,
        /// Tokens without an active expert: skip (the FFN adds nothing) or force_argmax (the largest gate opens).
        pub zero_active: ZeroActive = ZeroActive::Skip,
        /// Share of the active experts that always run, the core; with routers=fitted, as all below.
        pub core: f64 = StartSettings::default().core,
        /// The same in the first layer, if that is less.
        pub core_first: f64 = StartSettings::default().core_first,
        /// Experts that run in a layer: kl (the shares that change the final distribution least) or uniform.
        pub widths: LayerWidths = LayerWidths(StartSettings::default().widths),
        /// Neurons with the largest output at first positions that join the core.
        pub massive: usize = StartSettings::default().massive,
        /// Quantity that routers predict of an expert's output: log-norm, norm or square.
        pub target: Target = Target(StartSettings::default().target),
        /// Ridge of the least squares of down_proj, a share of the mean of the diagonal at 16,384 tokens of text; 0 leaves
        /// down_proj as it is.
        pub ridge: f64 = StartSettings::default().least_squares.unwrap_or(0.0),
        /// The least squares have an intercept, the bias of the FFN's output.
        pub intercept: bool = StartSettings::default().intercept,
        /// The least squares weigh a token's error by its residual stream.
        pub relative: bool = StartSettings::default().relative,
        /// Shares of experts that thresholds are stored for, beside the budget's, separated by commas; auto: a ladder.
        pub budgets: Shares = Shares(StartSettings::default().budgets),
        /// The sequences of the text are fitted at the budgets in turn, so that down_proj serves all.
        pub elastic: bool = StartSettings::default().elastic,
    }
}

/// The number of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    /// That many.
    Count(usize),
    /// The number of experts follows from this number of neurons in each.
    Width(usize),
    /// The default of the start.
    Auto,
}

impl Serialize for Experts {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Experts::Count(experts) => experts.serialize(serializer),
            Experts::Width(width) => serializer.collect_str(&format_args!("width({width})")),
            Experts::Auto => serializer.serialize_str(AUTO),
        }
    }
}

impl<'de> Deserialize<'de> for Experts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Experts, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        match (count, value.as_str()) {
            (Some(count), _) => Ok(Experts::Count(count)),
            (None, Some(AUTO)) => Ok(Experts::Auto),
            (None, Some(text)) if width(text).is_some() => Ok(Experts::Width(width(text).unwrap_or(1))),
            _ => Err(serde::de::Error::custom(format!("{value} is no number, width(W) or auto"))),
        }
    }
}

const AUTO: &str = "auto";

/// Reads `width(W)`, W above 0.
fn width(text: &str) -> Option<usize> {
    let number = text.strip_prefix("width(")?.strip_suffix(')')?;
    number.parse().ok().filter(|&width| width > 0)
}

/// [`RouterTarget`] as a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target(pub RouterTarget);

stored_as_text!(Target);

impl FromStr for Target {
    type Err = dsmoe_core::Error;

    fn from_str(word: &str) -> std::result::Result<Target, dsmoe_core::Error> {
        word.parse().map(Target)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// [`Widths`] as a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerWidths(pub Widths);

stored_as_text!(LayerWidths);

impl FromStr for LayerWidths {
    type Err = dsmoe_core::Error;

    fn from_str(word: &str) -> std::result::Result<LayerWidths, dsmoe_core::Error> {
        word.parse().map(LayerWidths)
    }
}

impl fmt::Display for LayerWidths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Shares, separated by commas, or those of the start by default.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares(pub Option<Vec<f64>>);

impl Serialize for Shares {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Shares {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Shares, D::Error> {
        // One share reads as a number.
        let value = Value::deserialize(deserializer)?;
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl FromStr for Shares {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Shares, String> {
        if text == AUTO {
            return Ok(Shares(None));
        }
        let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
        let share = |word: &str| match word.parse::<f64>() {
            Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
            _ => Err(format!("`{word}` is no share above 0 and up to 1; write 0.25,0.5,1")),
        };
        words.map(share).collect::<std::result::Result<_, _>>().map(|shares| Shares(Some(shares)))
    }
}

impl fmt::Display for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => f.write_str(AUTO),
            Some(shares) => f.write_str(&shares.iter().map(f64::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

/// The choice of the neurons of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Contiguous blocks (eq. 6).
    Contiguous,
    /// A random partition.
    Random,
    /// Blocks of neurons sorted by Taylor importance.
    Taylor,
    /// Balanced k-means of the rows of `gate_proj`.
    Clustering,
}

/// The start of the routers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routers {
    /// A start that reads no text.
    Untrained(RouterInit),
    /// Fitted to calibration text, nothing else being changed.
    Calibrated,
    /// Fitted to calibration text, layer by layer, with a core and new projections.
    Fitted,
}

stored_as_text!(Routers);

impl FromStr for Routers {
    type Err = dsmoe_router::Error;

    fn from_str(name: &str) -> std::result::Result<Routers, dsmoe_router::Error> {
        match name {
            "calibrated" => Ok(Routers::Calibrated),
            "fitted" => Ok(Routers::Fitted),
            name => name.parse().map(Routers::Untrained),
        }
    }
}

impl fmt::Display for Routers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Routers::Untrained(init) => init.fmt(f),
            Routers::Calibrated => f.write_str("calibrated"),
            Routers::Fitted => f.write_str("fitted"),
        }
    }
}

impl Settings {
    /// Returns the settings of a fitted start.
    pub(super) fn start(&self) -> StartSettings {
        StartSettings {
            core: self.core,
            core_first: self.core_first,
            widths: self.widths.0,
            massive: self.massive,
            target: self.target.0,
            least_squares: Some(self.ridge).filter(|ridge| *ridge != 0.0),
            intercept: self.intercept,
            relative: self.relative,
            budgets: self.budgets.0.clone(),
            elastic: self.elastic,
        }
    }
}
