//! `dsmoe bench`: times kernels and models, and compares records of such times.

use std::process::ExitCode;

use anyhow::Result;
use dsmoe_kernels::Precision;

use crate::cli::bench::{BOTH, Bench, Kernels, Work};
use crate::regression::{compare, history, instructions, record};
use crate::timing::ceilings::Ceilings;
use crate::timing::output::Output;
use crate::timing::{decode, decode_model, ffn, matmul, ops, row, train};
use crate::ui::{Ui, plain};

pub(crate) fn run(args: &Bench, ui: &mut Ui) -> Result<ExitCode> {
    match &args.work {
        Work::Record(args) => record::run(args, ui)?,
        Work::Compare(args) => return compare::run(args, ui),
        Work::History(args) => history::run(args, ui)?,
        Work::Once(args) => instructions::once(args, ui)?,
        Work::Kernels(args) => {
            matmul::check(args)?;
            measure(args.common.precisions(&BOTH), ui, |output| kernels(args, output))?;
        }
        Work::Ffn(args) => {
            ffn::check(args)?;
            measure(args.common.precisions(&BOTH), ui, |output| ffn::run(args, output))?;
        }
        Work::Train(args) => {
            train::check(args)?;
            let precisions = args.common.precisions_on(args.device, &train::PRECISIONS);
            measure(precisions, ui, |output| train::run(args, output))?;
        }
        Work::Decode(args) => {
            let precisions = args.common.precisions_on(args.device, &decode::PRECISIONS);
            if let Some(model) = &args.model {
                decode_model::check(args, model)?;
                measure(precisions, ui, |output| decode_model::run(args, model, output))?;
            } else {
                decode::check(args)?;
                measure(precisions, ui, |output| decode::run(args, output))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures the machine and then `work`, and prints the rows.
fn measure(
    precisions: &[Precision],
    ui: &mut Ui,
    work: impl FnOnce(&mut Output<'_>) -> Result<()> + Send,
) -> Result<()> {
    // On a thread of the pool, where handing work to the others is cheapest.
    rayon::scope(|_| {
        let mut output = Output { ceilings: Ceilings::measure(precisions), ui, rows: Vec::new() };
        work(&mut output)?;
        if output.ui.json { Ok(()) } else { output.ui.text(&plain(&row::show(&output.rows))) }
    })
}

fn kernels(args: &Kernels, output: &mut Output<'_>) -> Result<()> {
    matmul::run(args, output)?;
    let any_shape = args.tokens.is_none() && args.hidden.is_none() && args.intermediate.is_none();
    if any_shape && args.common.precisions(&BOTH).contains(&Precision::F32) {
        ops::run(args, output)?;
    }
    Ok(())
}
