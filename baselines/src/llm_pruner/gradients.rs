//! Gradients of the language-model loss over calibration text, one sequence at a time.

use dsmoe_core::Model;
use dsmoe_core::model::{Batch, StepArgs, TrainWorkspace};
use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_router::SparsityOver;

use crate::error::{Error, Result};

/// The sum of gradients of the sequences asked for, laid out as the model's parameters.
pub(crate) struct Gradients<'a> {
    model: &'a Model,
    calibration: &'a [Vec<u32>],
    workspace: TrainWorkspace,
    sum: Buf,
}

impl<'a> Gradients<'a> {
    pub(crate) fn new(model: &'a Model, calibration: &'a [Vec<u32>]) -> Result<Gradients<'a>> {
        let inputs = check_calibration(calibration)? - 1;
        let workspace = TrainWorkspace::new(model, inputs, Precision::F32);
        Ok(Gradients { model, calibration, workspace, sum: Buf::zeros(model.params().len()) })
    }

    pub(crate) fn sequences(&self) -> usize {
        self.calibration.len()
    }

    /// Adds the gradient of the mean loss of a sequence's predicted tokens; returns that loss.
    pub(crate) fn add(&mut self, sequence: usize) -> Result<f64> {
        let ids = &self.calibration[sequence];
        let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
        let args = StepArgs {
            loss_scale: 1.0 / inputs.len() as f32,
            sparsity_weight: 0.0,
            sparsity_over: SparsityOver::Active,
            balance_scale: 0.0,
            seed: 0,
        };
        let output = self.model.train_step(
            &mut self.sum,
            Batch { inputs, targets, seq: inputs.len() },
            &args,
            &mut self.workspace,
        )?;
        match output.non_finite {
            None => Ok(output.loss_sum / inputs.len() as f64),
            Some(place) => Err(Error::Numeric {
                place: format!("calibration sequence {sequence}, {place}"),
                problem: "a value is not finite".to_owned(),
                help: "use another model or other calibration text".to_owned(),
            }),
        }
    }

    pub(crate) fn sum(&self) -> &[f32] {
        &self.sum
    }

    pub(crate) fn clear(&mut self) {
        self.sum.fill(0.0);
    }
}

/// The length of all sequences.
///
/// # Errors
/// There is no sequence, they are shorter than two tokens or of different lengths.
pub(crate) fn check_calibration(calibration: &[Vec<u32>]) -> Result<usize> {
    let wrong = |problem: String, help: &str| Err(Error::Calibration { problem, help: help.to_owned() });
    let Some(first) = calibration.first() else {
        return wrong("there is no sequence".to_owned(), "give text for 128 sequences, at least for 1");
    };
    if first.len() < 2 {
        let problem = format!("sequences of {} tokens have nothing to predict", first.len());
        return wrong(problem, "use sequences of 2 tokens or more, better 1024");
    }
    match calibration.iter().find(|sequence| sequence.len() != first.len()) {
        None => Ok(first.len()),
        Some(other) => {
            let problem = format!("sequences of {} and {} tokens", first.len(), other.len());
            wrong(problem, "use sequences of one length")
        }
    }
}
