//! The error of this crate.

/// An error in a router's configuration or initialisation.
///
/// ```
/// use dsmoe_router::{Error, Result, RouterConfig};
///
/// let checked: Result<()> = RouterConfig { threshold: 2.0, ..RouterConfig::new(8) }.validate();
/// let error = checked.unwrap_err();
/// assert!(matches!(error, Error::OutOfRange { field: "threshold", .. }), "{error}");
/// ```
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A number is outside the range its field allows.
    #[error("{field} is {found}; use {allowed}")]
    OutOfRange {
        /// Name of the field, as in the configuration.
        field: &'static str,
        /// The value found.
        found: String,
        /// The values allowed.
        allowed: String,
    },
    /// A word is not one of those its field allows.
    #[error("unknown {field} `{found}`; use {allowed}")]
    UnknownName {
        /// Name of the field, as in the configuration.
        field: &'static str,
        /// The word found.
        found: String,
        /// The words allowed.
        allowed: &'static str,
    },
    /// `centroid` was asked for without centroids.
    #[error("router init `centroid` needs the mean gate_proj row of every expert; use `random` or `open`")]
    NoCentroids,
    /// A centroid has no direction.
    #[error("centroid of expert {expert} in layer {layer} is zero or not finite; use router init `open`")]
    BadCentroid {
        /// Expert index.
        expert: usize,
        /// Layer index.
        layer: usize,
    },
}

impl Error {
    /// Makes an [`Error::OutOfRange`].
    pub fn range(field: &'static str, found: impl ToString, allowed: impl Into<String>) -> Error {
        Error::OutOfRange { field, found: found.to_string(), allowed: allowed.into() }
    }
}

/// Result of this crate.
///
/// ```
/// use dsmoe_router::{Result, RouterConfig};
///
/// fn router(threshold: f32) -> Result<RouterConfig> {
///     let config = RouterConfig { threshold, ..RouterConfig::new(8) };
///     config.validate()?;
///     Ok(config)
/// }
/// assert!(router(0.3).is_ok());
/// assert_eq!(router(1.5).unwrap_err().to_string(), "threshold is 1.5; use a number from 0 to 1");
/// ```
pub type Result<T> = std::result::Result<T, Error>;
