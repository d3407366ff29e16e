//! Magnitude pruning: the smallest weights are removed, by default those of the whole matrix. No text is read.

use dsmoe_core::Config;
use dsmoe_core::calibrate::Input;

use super::pattern::Target;
use super::{NEAREST, PATTERN, run, score};
use crate::error::Result;
use crate::method::{Budget, Job, Knob, Knobs, Made, Method, Plan, Progress};

/// The method `magnitude`.
#[derive(Clone, Copy, Debug)]
pub struct Magnitude;

impl Method for Magnitude {
    fn name(&self) -> &'static str {
        "magnitude"
    }

    fn summary(&self) -> &'static str {
        "zeros where weights are smallest, no calibration; any budget, or half the linears"
    }

    fn knobs(&self) -> &'static [Knob] {
        const KNOBS: &[Knob] = &[
            PATTERN,
            NEAREST,
            Knob {
                name: "among",
                default: "matrix",
                help: "use row or matrix: what weights are compared in",
            },
        ];
        KNOBS
    }

    fn needs_calibration(&self, _knobs: &Knobs) -> bool {
        false
    }

    fn plan(&self, config: &Config, budget: Budget, knobs: &Knobs) -> Result<Plan> {
        Ok(Target::new(config, budget, knobs.need("among")?, knobs)?.plan)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let config = Config::load(job.model)?;
        let Target { sparsity, plan } =
            Target::new(&config, job.budget, job.knobs.need("among")?, job.knobs)?;
        run(job, plan, &[], progress, &|layer| {
            for input in Input::ALL {
                let ones = vec![1.0; layer.width(input)];
                layer.prune(input, |linear| score::prune(&mut linear.weight, &ones, &sparsity))?;
            }
            Ok(())
        })
    }
}
