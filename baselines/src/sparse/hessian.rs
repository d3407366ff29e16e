//! The Hessian of a layer's squared output error, summed over calibration sequences.
//!
//! ```text
//! H = (2 / sequences) sum over sequences X^T X        X [seq, inputs]
//! H^-1 = R^T R                                        of the damped H; R upper triangular
//! ```

use std::sync::Arc;

use dsmoe_core::gram::Gram;
use dsmoe_kernels::comm::Communicator;

use crate::error::{Error, Result};
use crate::linalg::inverse_factor;

/// Dampings tried when one has no factorisation.
const DAMPINGS: [f64; 3] = [0.01, 0.1, 1.0];

/// H before its factor: the sums of products, and the number of sequences.
#[derive(Clone, Debug)]
pub struct Hessian {
    sums: Gram,
    sequences: usize,
}

/// H with its diagonal raised.
#[derive(Debug)]
struct Damped {
    /// `[inputs, inputs]`.
    values: Vec<f32>,
    /// Inputs that were zero in all tokens; their row and column are the identity's.
    dead: Vec<bool>,
}

/// The factor of the inverse of a damped Hessian.
#[derive(Clone, Debug, PartialEq)]
pub struct Factored {
    /// R transposed, `[inputs, inputs]`.
    pub factor: Vec<f32>,
    /// Inputs that were zero in all tokens.
    pub dead: Vec<bool>,
    /// The damping it took.
    pub damping: f64,
}

impl Hessian {
    /// Creates the Hessian of a layer of `inputs` columns, before any sequence.
    pub fn new(inputs: usize) -> Hessian {
        Hessian { sums: Gram::new(inputs), sequences: 0 }
    }

    /// Divides the sums among the processes of `comm`, which add the same sequences and then call [`Hessian::complete`].
    #[must_use]
    pub fn on(self, comm: &Arc<dyn Communicator>) -> Hessian {
        Hessian { sums: self.sums.on(comm), ..self }
    }

    /// Gives all processes all sums.
    ///
    /// # Errors
    /// Another process fails.
    pub fn complete(&mut self) -> Result<()> {
        Ok(self.sums.complete()?)
    }

    /// Adds a sequence `x` `[seq, inputs]`.
    ///
    /// # Panics
    /// `x` holds no whole number of rows.
    pub fn add(&mut self, x: &[f32]) {
        self.sequences += 1;
        self.sums.add(x);
    }

    /// Factorises with `damping`, a share of the diagonal's mean. If there is no factorisation it tries the larger
    /// ones of 0.01, 0.1 and 1. `place` is for messages.
    ///
    /// # Errors
    /// No damping suffices, or an input was not finite.
    pub fn factorise(&self, damping: f64, place: &str) -> Result<Factored> {
        let wrong = |problem: &str, help: &str| Error::numeric(place, problem, help);
        if !(0..self.sums.columns()).all(|i| self.sums.diagonal(i).is_finite()) {
            return Err(wrong("reads values that are not finite", "check the model with eval"));
        }
        let larger = DAMPINGS.into_iter().filter(|&next| next > damping);
        for damping in std::iter::once(damping).chain(larger) {
            let Damped { values, dead } = self.damped(damping);
            let n = dead.len();
            if let Ok(factor) = inverse_factor(values, n)
                && (0..n).all(|i| factor[i * n + i].is_normal())
            {
                return Ok(Factored { factor, dead, damping });
            }
        }
        let problem = "has a Hessian that is not positive definite even when damped";
        Err(wrong(problem, "give more calibration text or raise the setting damp above 1"))
    }

    /// H, 1 on the diagonal of inputs that were always zero, plus `damping` times the mean of the diagonal on the
    /// diagonal.
    fn damped(&self, damping: f64) -> Damped {
        let n = self.sums.columns();
        let scale = 2.0 / self.sequences.max(1) as f64;
        let dead: Vec<bool> = (0..n).map(|i| self.sums.diagonal(i) == 0.0).collect();
        let diagonal = |i: usize| if dead[i] { 1.0 } else { scale * f64::from(self.sums.diagonal(i)) };
        let damp = damping * (0..n).map(diagonal).sum::<f64>() / n.max(1) as f64;
        let mut values = self.sums.square(scale as f32);
        values.iter_mut().step_by(n + 1).enumerate().for_each(|(i, x)| *x = (diagonal(i) + damp) as f32);
        Damped { values, dead }
    }
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_close, normals};

    use super::*;

    #[test]
    fn it_is_the_mean_over_sequences_and_damped_by_its_own_diagonal() {
        for inputs in [1, 5, 40] {
            let (seq, count) = (11, 3);
            let mut x = normals(count * seq * inputs, inputs as u64);
            let dead = inputs / 2;
            if inputs > 1 {
                x.chunks_exact_mut(inputs).for_each(|row| row[dead] = 0.0);
            }
            let mut hessian = Hessian::new(inputs);
            x.chunks_exact(seq * inputs).for_each(|x| hessian.add(x));
            let mut want = vec![0.0; inputs * inputs];
            for row in x.chunks_exact(inputs) {
                for (at, want) in want.iter_mut().enumerate() {
                    let product = f64::from(row[at / inputs]) * f64::from(row[at % inputs]);
                    *want += product * 2.0 / count as f64;
                }
            }
            if inputs > 1 {
                want[dead * inputs + dead] = 1.0;
            }
            let mean = (0..inputs).map(|i| want[i * inputs + i]).sum::<f64>() / inputs as f64;
            (0..inputs).for_each(|i| want[i * inputs + i] += 0.01 * mean);
            let got = hessian.damped(0.01);
            assert_close("H", &got.values, &want, 1e-6);
            assert!((0..inputs).all(|i| got.dead[i] == (inputs > 1 && i == dead)));
        }
    }

    #[test]
    fn damping_is_raised_until_there_is_a_factorisation() {
        let mut hessian = Hessian::new(3);
        // One direction, large: f32 cannot tell it from a singular matrix at the first damping.
        hessian.add(&[1000.0, 999.0, 998.0]);
        assert_eq!(hessian.factorise(1e-12, "layer 0 o").unwrap().damping, 0.01);
        for odd in [f32::INFINITY, f32::NAN] {
            let mut hessian = Hessian::new(2);
            hessian.add(&[1.0, odd]);
            let error = hessian.factorise(0.01, "layer 0 o").unwrap_err().to_string();
            assert_eq!(error, "layer 0 o: reads values that are not finite; check the model with eval");
        }
    }

    #[test]
    fn the_factor_is_of_the_damped_inverse() {
        let mut hessian = Hessian::new(2);
        hessian.add(&[1.0, 0.5, -0.25, 1.0, 2.0, 0.75]);
        let Factored { factor, dead, damping } = hessian.factorise(0.01, "").unwrap();
        assert_eq!((dead, damping), (vec![false; 2], 0.01));
        // H = 2 X^T X = [[10.125, 3.5], [3.5, 3.625]], plus 0.01 * 6.875.
        let (a, b, c) = (10.193_75, 3.5, 3.693_75);
        let determinant = a * c - b * b;
        let inverse = [c / determinant, -b / determinant, -b / determinant, a / determinant];
        let l = factor;
        let product = [l[0] * l[0], l[0] * l[2], l[2] * l[0], l[2] * l[2] + l[3] * l[3]];
        assert_close("H^-1", &product, &inverse, 1e-6);
    }
}
