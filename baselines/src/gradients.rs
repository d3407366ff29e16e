//! Gradients of the language-model loss over calibration text, one sequence at a time.

use dsmoe_core::Model;
use dsmoe_core::calibrate::check_text;
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;

use crate::error::{Error, Result};

/// The sum of gradients of the sequences asked for, laid out as the model's parameters.
pub(crate) struct Gradients<'a> {
    model: &'a Model,
    pub(crate) calibration: &'a [Vec<u32>],
    workspace: TrainWorkspace,
    pub(crate) sum: Buf,
}

impl<'a> Gradients<'a> {
    /// Starts at zero.
    ///
    /// # Errors
    /// There is no sequence, or they are shorter than two tokens or of different lengths.
    pub(crate) fn new(model: &'a Model, calibration: &'a [Vec<u32>]) -> Result<Gradients<'a>> {
        check_text(calibration, 1, "gradients")?;
        let workspace = TrainWorkspace::new(model, calibration[0].len() - 1, Precision::F32);
        Ok(Gradients { model, calibration, workspace, sum: Buf::zeros(model.layout().len()) })
    }

    /// Adds the gradient of the mean loss of a sequence's predicted tokens; returns that loss.
    ///
    /// # Errors
    /// Tokens that the model has not, more of them than it has positions, or a value that is not finite.
    pub(crate) fn add(&mut self, sequence: usize) -> Result<f64> {
        let ids = &self.calibration[sequence];
        let (inputs, targets, seq) = (&ids[..ids.len() - 1], &ids[1..], ids.len() - 1);
        let args = StepArgs { loss_scale: 1.0 / seq as f32, balance_scale: 0.0, ..StepArgs::default() };
        let batch = Batch { inputs, targets, seq };
        let output = self.model.train_step(&mut self.sum, batch, &args, &mut self.workspace)?;
        match output.non_finite {
            None => Ok(output.loss_sum / seq as f64),
            Some(place) => {
                let place = format!("calibration sequence {sequence}, {place}");
                let help = "use an undamaged model, or other calibration text";
                Err(Error::numeric(place, "a value is not finite", help))
            }
        }
    }
}
