//! Descriptions of what a call moves, for messages.

use std::fmt;

/// A description of the data that a call moves, as in "step 12, gradients, unit 7". All processes pass the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct What {
    /// The step of a training run; none outside of steps.
    pub step: Option<u64>,
    /// The data, such as "gradients".
    pub what: &'static str,
    /// The part of the model, where the data is moved part by part.
    pub unit: Option<usize>,
}

impl What {
    /// Describes data outside of the steps of a run.
    pub const fn of(what: &'static str) -> What {
        What { step: None, what, unit: None }
    }

    /// Describes data of step `step`.
    pub const fn at(step: u64, what: &'static str) -> What {
        What { step: Some(step), what, unit: None }
    }

    /// Describes the part `unit` of the data.
    pub const fn unit(self, unit: usize) -> What {
        What { unit: Some(unit), ..self }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(step) = self.step {
            write!(f, "step {step}, ")?;
        }
        f.write_str(self.what)?;
        match self.unit {
            Some(unit) => write!(f, ", unit {unit}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::What;

    #[test]
    fn descriptions_name_step_and_unit_where_there_are_some() {
        assert_eq!(What::of("settings").to_string(), "settings");
        assert_eq!(What::at(3, "norm").to_string(), "step 3, norm");
        assert_eq!(What::at(12, "gradients").unit(7).to_string(), "step 12, gradients, unit 7");
    }
}
