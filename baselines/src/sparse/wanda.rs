//! Wanda (Sun et al., arXiv 2306.11695): weights with the smallest `|w| * ||x||` of their row are removed, nothing else
//! changes. x are the values of the weight's input over all tokens.

use dsmoe_core::Config;
use dsmoe_core::calibrate::Input;
use rayon::prelude::*;

use super::pattern::{Sparsity, Target};
use super::{Layer, NEAREST, PATTERN, calibration, run, score};
use crate::error::Result;
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};

/// Columns summed by one task.
const COLUMNS: usize = 64;

/// The method `wanda`.
#[derive(Clone, Copy, Debug)]
pub struct Wanda;

impl Method for Wanda {
    fn name(&self) -> &'static str {
        "wanda"
    }

    fn summary(&self) -> &'static str {
        "zeros where weight times norm of its input is smallest, no update; any budget, or half the linears"
    }

    fn knobs(&self) -> &'static [Knob] {
        const KNOBS: &[Knob] = &[
            PATTERN,
            NEAREST,
            Knob { name: "among", default: "row", help: "use row or matrix: what scores are compared in" },
        ];
        KNOBS
    }

    fn needs_calibration(&self, _knobs: &Knobs) -> bool {
        true
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        Ok(Target::new(config, budget, knobs.need("among")?, knobs)?.plan)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let Target { sparsity, plan } =
            Target::new(&config, job.budget, job.knobs.need("among")?, job.knobs)?;
        run(job, plan, calibration(job)?, progress, &|layer| prune(layer, &sparsity))
    }
}

fn prune(layer: &mut Layer<'_>, sparsity: &Sparsity) -> Result<()> {
    let mut squares = Input::ALL.map(|input| vec![0.0; layer.width(input)]);
    layer.stream.forward(&layer.weights, &mut |tap| {
        if let Some(at) = Input::ALL.iter().position(|&input| input == tap.input) {
            add_squares(&mut squares[at], tap.x);
        }
    });
    for (input, squares) in Input::ALL.into_iter().zip(squares) {
        let norms: Vec<f32> = squares.iter().map(|square| square.sqrt() as f32).collect();
        layer.prune(input, |linear| score::prune(&mut linear.weight, &norms, sparsity))?;
    }
    Ok(())
}

/// Adds to `squares` `[inputs]` the squares of the columns of `x` `[tokens, inputs]`.
fn add_squares(squares: &mut [f64], x: &[f32]) {
    let inputs = squares.len();
    squares.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, squares)| {
        for x in x.chunks_exact(inputs) {
            for (square, &x) in squares.iter_mut().zip(&x[task * COLUMNS..]) {
                *square += f64::from(x) * f64::from(x);
            }
        }
    });
}
