//! `dsmoe bench`: how long our kernels and models take, and how near that is to what the machine can do.

pub(crate) mod args;
mod decode;
mod ffn;
mod machine;
mod matmul;
mod model;
mod ops;
pub(crate) mod resident;
mod routing;
mod row;
mod timing;
mod track;
mod train;

use std::process::ExitCode;

use anyhow::{Result, bail};
use dsmoe_kernels::Precision;
use dsmoe_kernels::rng::Rng;
use rayon::prelude::*;

use crate::memory;
use crate::ui::Ui;
use args::{Bench, Kernels, Work};
use machine::Machine;
use row::Row;

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];
/// The largest size of a tensor's side that is taken.
const LARGEST: usize = 1 << 24;

/// Where rows go: out at once as JSON lines, or into a table at the end.
struct Output<'a> {
    ui: &'a mut Ui,
    machine: Machine,
    rows: Vec<Row>,
}

impl Output<'_> {
    /// Takes the rows of one shape.
    fn extend(&mut self, rows: Vec<Row>) -> Result<()> {
        if self.ui.json {
            return rows.iter().try_for_each(|row| self.ui.result(row, |_| String::new()));
        }
        if let Some(row) = rows.first() {
            self.ui.note(format_args!("{} of {} tokens in {}: done", row.work, row.tokens, row.dtype));
        }
        self.rows.extend(rows);
        Ok(())
    }
}

pub(crate) fn run(args: &Bench, ui: &mut Ui) -> Result<ExitCode> {
    match &args.work {
        Work::Record(args) => track::record::run(args, ui)?,
        Work::Compare(args) => return track::compare::run(args, ui),
        Work::History(args) => track::history::run(args, ui)?,
        Work::Once(args) => track::instructions::once(args, ui)?,
        Work::Kernels(_) | Work::Ffn(_) | Work::Train(_) | Work::Decode(_) => rows(args, ui)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The kinds of work that print rows.
fn rows(args: &Bench, ui: &mut Ui) -> Result<()> {
    let precisions = match &args.work {
        Work::Kernels(args) => matmul::check(args).map(|()| args.common.precisions(&BOTH))?,
        Work::Ffn(args) => ffn::check(args).map(|()| args.common.precisions(&BOTH))?,
        Work::Train(args) => {
            train::check(args).map(|()| args.common.precisions_on(args.device, &train::PRECISIONS))?
        }
        Work::Decode(args) => {
            decode::check(args).map(|()| args.common.precisions_on(args.device, &decode::PRECISIONS))?
        }
        Work::Record(_) | Work::Compare(_) | Work::History(_) | Work::Once(_) => return Ok(()),
    };
    // On a thread of the pool, where handing work to the others is cheapest.
    rayon::scope(|_| {
        let mut output = Output { machine: Machine::measure(precisions), ui, rows: Vec::new() };
        match &args.work {
            Work::Kernels(args) => kernels(args, &mut output)?,
            Work::Ffn(args) => ffn::run(args, &mut output)?,
            Work::Train(args) => train::run(args, &mut output)?,
            Work::Decode(args) => decode::run(args, &mut output)?,
            Work::Record(_) | Work::Compare(_) | Work::History(_) | Work::Once(_) => {}
        }
        if output.ui.json { Ok(()) } else { output.ui.text(&row::show(&output.rows)) }
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

/// Refuses a size that is 0 or absurd.
fn check_size(flag: &str, size: usize) -> Result<()> {
    match size {
        0 => bail!("--{flag} 0; use at least 1"),
        1..=LARGEST => Ok(()),
        _ => bail!("--{flag} {size} is more than {LARGEST}; use a smaller one"),
    }
}

/// Refuses experts that do not divide the width.
fn check_experts(experts: usize, intermediate: usize) -> Result<()> {
    if experts == 0 || !intermediate.is_multiple_of(experts) {
        bail!("--experts {experts} does not divide --intermediate {intermediate}; use a divisor");
    }
    Ok(())
}

fn check_active(active: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&active) {
        bail!("--active {active} is outside 0..1; use a share such as 0.375");
    }
    Ok(())
}

/// Refuses work whose tensors do not fit the machine.
fn check_memory(bytes: u128) -> Result<()> {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    memory::check("this shape", bytes, memory::total(), "use a smaller one")
}

/// `len` values as [`fill_random`] makes them.
fn random(len: usize, deviation: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    fill_random(&mut values, deviation, seed);
    values
}

/// Sets `values` to uniform ones around 0 with that standard deviation, a function of `seed`.
fn fill_random(values: &mut [f32], deviation: f32, seed: u64) {
    let width = 12f32.sqrt() * deviation;
    values.par_chunks_mut(1 << 14).enumerate().for_each(|(stream, values)| {
        let mut rng = Rng::new(seed, stream as u64);
        values.iter_mut().for_each(|x| *x = width * (rng.uniform() - 0.5));
    });
}

/// As a cost counts it.
fn product(sizes: &[usize]) -> f64 {
    sizes.iter().map(|&size| size as f64).product()
}

/// Bytes of f32 values.
fn f32_bytes(values: f64) -> f64 {
    4.0 * values
}

/// Bytes of values in a precision.
fn bytes_in(precision: Precision, values: f64) -> f64 {
    precision.bytes() as f64 * values
}
