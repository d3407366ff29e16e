//! How a task is prompted and scored.

use super::filter::Filter;
use super::metrics::{ExactMatch, Metric};
use super::template::Template;

/// The rules by which a task is prompted and scored.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// The beginning of a prompt.
    pub(crate) description: Template,
    /// The text after each example.
    pub(crate) delimiter: String,
    /// Texts that end a generated answer.
    pub(crate) until: &'static [&'static str],
    /// The filters for generated answers. Each is scored by itself.
    pub(crate) filters: Vec<Filter>,
    pub(crate) metrics: Vec<Metric>,
    pub(crate) exact: ExactMatch,
}
