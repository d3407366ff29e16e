//! The kernels for the products of experts that a process asks for.

use super::error::{CudaError, Result};

/// The kernels that are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpertKernels {
    /// Those of [`super::ops::experts`].
    #[default]
    Lists,
    /// Those of [`super::ops::products`] where the device and the sizes take them, else as [`ExpertKernels::Lists`].
    Slots,
    /// Those of [`super::ops::products`] where the device and the sizes take them and dense products are not predicted to be faster,
    /// else dense products; on other devices and for other sizes as [`ExpertKernels::Lists`].
    Auto,
}

impl ExpertKernels {
    /// The environment variable that chooses for a whole process.
    pub const VARIABLE: &'static str = "DSMOE_EXPERT_KERNELS";

    /// All values.
    pub const ALL: [ExpertKernels; 3] = [ExpertKernels::Lists, ExpertKernels::Slots, ExpertKernels::Auto];

    /// Returns the value's name: `lists`, `slots` or `auto`.
    pub fn name(self) -> &'static str {
        match self {
            ExpertKernels::Lists => "lists",
            ExpertKernels::Slots => "slots",
            ExpertKernels::Auto => "auto",
        }
    }

    /// Returns what [`ExpertKernels::VARIABLE`] names, and [`ExpertKernels::Lists`] where it is not set.
    ///
    /// # Errors
    /// It names something else.
    pub fn from_env() -> Result<ExpertKernels> {
        ExpertKernels::read(std::env::var_os(ExpertKernels::VARIABLE).as_deref())
    }

    pub(crate) fn read(asked: Option<&std::ffi::OsStr>) -> Result<ExpertKernels> {
        let Some(asked) = asked else { return Ok(ExpertKernels::default()) };
        let found = ExpertKernels::ALL.into_iter().find(|kernels| asked == kernels.name());
        found.ok_or_else(|| CudaError::Setting {
            variable: ExpertKernels::VARIABLE,
            asked: asked.to_string_lossy().into_owned(),
            values: ExpertKernels::ALL.map(ExpertKernels::name).join(", "),
        })
    }
}
