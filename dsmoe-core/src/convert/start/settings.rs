//! Settings of the start.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The shares of experts that thresholds are stored for by default.
pub const BUDGETS: [f64; 5] = [0.25, 0.375, 0.5, 0.75, 1.0];

/// The tokens at which a ridge is the share that it says: it weighs as much as this text, whatever the text is.
pub const RIDGE_TOKENS: usize = 16_384;

/// The settings of the start that is fitted to calibration text. Every part can be switched off.
///
/// ```
/// use dsmoe_core::convert::start::{StartSettings, Widths};
///
/// // No core, no least squares: routed experts alone, in layers of different shares.
/// let settings = StartSettings {
///     core: 0.0,
///     least_squares: None,
///     widths: Widths::Kl,
///     ..StartSettings::default()
/// };
/// settings.validate()?;
/// assert!(StartSettings { core: 1.5, ..settings }.validate().is_err());
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct StartSettings {
    /// The core's share of the experts that run; 0 for none.
    pub core: f64,
    /// The same in the first layer, where a smaller core serves better; not above `core`.
    pub core_first: f64,
    /// How layers share the budgets.
    pub widths: Widths,
    /// Neurons with the largest output at first positions that join the core, whatever they give elsewhere.
    pub massive: usize,
    /// The target of the routers.
    pub target: RouterTarget,
    /// Ridge of the least squares of the down projection, as a share of the mean of the diagonal over
    /// [`RIDGE_TOKENS`] tokens: of twice the text it is half of that. None keeps the projection.
    pub least_squares: Option<f64>,
    /// Whether the least squares have an intercept, the bias of the FFN's output.
    pub intercept: bool,
    /// Whether the error of a token counts relative to its residual stream, as the next norm sees it.
    pub relative: bool,
    /// Shares of experts that thresholds are stored for, beside that of the start; none for those of [`BUDGETS`] that are
    /// above the share of the core.
    pub budgets: Option<Vec<f64>>,
    /// If true, the fit takes the budgets in turn, one per sequence, so that the projections serve all budgets.
    pub elastic: bool,
}

/// How layers share a budget.
///
/// ```
/// use dsmoe_core::convert::start::{StartSettings, Widths};
///
/// let widths: Widths = "kl".parse()?;
/// assert_eq!(widths, Widths::Kl);
/// assert_eq!(StartSettings::default().widths.to_string(), "uniform");
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Widths {
    /// All layers run the same share of their experts.
    Uniform,
    /// The shares that change the model's output least, by the divergence of each layer changed alone.
    Kl,
}

/// The quantity that the router of an expert predicts.
///
/// ```
/// use dsmoe_core::convert::start::{RouterTarget, StartSettings};
///
/// let target: RouterTarget = "log-norm".parse()?;
/// assert_eq!(target, RouterTarget::LogNorm);
/// assert_eq!(StartSettings::default().target, RouterTarget::Norm);
/// assert!("size".parse::<RouterTarget>().is_err());
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouterTarget {
    /// The logarithm of the norm of the expert's output.
    LogNorm,
    /// The norm of the expert's output.
    Norm,
    /// The square of the norm.
    Square,
}

impl Default for StartSettings {
    fn default() -> StartSettings {
        StartSettings {
            core: 0.5,
            core_first: 1.0 / 3.0,
            widths: Widths::Uniform,
            massive: 16,
            target: RouterTarget::Norm,
            least_squares: Some(0.1),
            intercept: true,
            relative: false,
            budgets: None,
            elastic: true,
        }
    }
}

impl StartSettings {
    /// Checks the ranges of all fields.
    ///
    /// # Errors
    /// A field is out of range.
    pub fn validate(&self) -> Result<()> {
        for core in [self.core, self.core_first] {
            if !(0.0..=1.0).contains(&core) {
                return Err(Error::argument(format!("a core of {core}"), "use a share from 0 to 1"));
            }
        }
        if let Some(ridge) = self.least_squares.filter(|ridge| !(*ridge > 0.0 && ridge.is_finite())) {
            return Err(Error::argument(format!("a ridge of {ridge}"), "use a positive number, such as 0.1"));
        }
        Ok(())
    }
}

impl StartSettings {
    /// Returns the core's share of the experts that run in a layer.
    pub(super) fn core_of(&self, layer: usize) -> f64 {
        if layer == 0 { self.core.min(self.core_first) } else { self.core }
    }
}

impl FromStr for Widths {
    type Err = Error;

    fn from_str(word: &str) -> Result<Widths> {
        match word {
            "uniform" => Ok(Widths::Uniform),
            "kl" => Ok(Widths::Kl),
            _ => Err(Error::argument(format!("unknown widths of layers `{word}`"), "use kl or uniform")),
        }
    }
}

impl fmt::Display for Widths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Widths::Uniform => "uniform",
            Widths::Kl => "kl",
        })
    }
}

impl FromStr for RouterTarget {
    type Err = Error;

    fn from_str(word: &str) -> Result<RouterTarget> {
        match word {
            "log-norm" => Ok(RouterTarget::LogNorm),
            "norm" => Ok(RouterTarget::Norm),
            "square" => Ok(RouterTarget::Square),
            _ => Err(Error::argument(
                format!("unknown target of routers `{word}`"),
                "use log-norm, norm or square",
            )),
        }
    }
}

impl fmt::Display for RouterTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RouterTarget::LogNorm => "log-norm",
            RouterTarget::Norm => "norm",
            RouterTarget::Square => "square",
        })
    }
}

/// Returns the default width of experts for FFNs of these sizes: the largest common divisor of at most 16, or where that is
/// under 4 the smallest one above; the whole FFN where there is none.
pub fn default_width(intermediates: impl Iterator<Item = usize>) -> usize {
    let common = intermediates.fold(0, gcd);
    let divides = |width: &usize| common > 0 && common.is_multiple_of(*width);
    let small = (1..=16).rev().find(divides).unwrap_or(1);
    if small >= 4 { small } else { (17..=common).find(divides).unwrap_or(small) }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_width_divides_every_layer() {
        let of = |widths: &[usize]| default_width(widths.iter().copied());
        assert_eq!([of(&[1536]), of(&[8192]), of(&[344]), of(&[172])], [16, 16, 8, 4]);
        assert_eq!([of(&[2 * 23]), of(&[13]), of(&[97]), of(&[96, 88])], [23, 13, 97, 8]);
    }

    #[test]
    fn words_round_trip_and_ranges_are_checked() {
        for target in [RouterTarget::LogNorm, RouterTarget::Norm, RouterTarget::Square] {
            assert_eq!(target.to_string().parse::<RouterTarget>().unwrap(), target);
        }
        for widths in [Widths::Uniform, Widths::Kl] {
            assert_eq!(widths.to_string().parse::<Widths>().unwrap(), widths);
        }
        assert!("wide".parse::<Widths>().unwrap_err().to_string().contains("use kl or uniform"));
        assert!("size".parse::<RouterTarget>().unwrap_err().to_string().contains("log-norm"));
        assert!(StartSettings::default().validate().is_ok());
        for core in [-0.1, 1.1, f64::NAN] {
            assert!(StartSettings { core, ..StartSettings::default() }.validate().is_err());
            assert!(StartSettings { core_first: core, ..StartSettings::default() }.validate().is_err());
        }
        for ridge in [0.0, -1.0, f64::INFINITY] {
            let settings = StartSettings { least_squares: Some(ridge), ..StartSettings::default() };
            assert!(settings.validate().is_err());
        }
    }
}
