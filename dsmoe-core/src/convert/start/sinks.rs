//! Tokens that are left out of fits: the first of a sequence, and those whose output is of another size than all others.
//!
//! Models write massive values for the first position, whatever its token is, and many of them for the token between
//! documents as well. A few of these own every sum of squares of a layer, though later layers read next to nothing of them.

use crate::calibrate::Linear;

/// An output of more than so many times the median size is massive: ordinary ones reach 13 times, massive ones 50 to 800.
const MASSIVE: f64 = 20.0;

/// Finds the massive tokens of a layer.
pub(super) struct Sinks {
    /// Lengths of the columns of the down projection.
    pub(super) lengths: Vec<f64>,
}

impl Sinks {
    pub(super) fn new(down: &Linear) -> Sinks {
        let mut squares = vec![0.0; down.inputs];
        for row in down.weight.chunks_exact(down.inputs) {
            squares.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
        Sinks { lengths: squares.into_iter().map(f64::sqrt).collect() }
    }

    /// Returns for each token of a sequence with these values of the neurons whether fits leave it out.
    pub(super) fn of(&self, neurons: &[f32]) -> Vec<bool> {
        let size = |row: &[f32]| {
            let squares = row.iter().zip(&self.lengths).map(|(&h, length)| (f64::from(h) * length).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let sizes: Vec<f64> = neurons.chunks_exact(self.lengths.len()).map(size).collect();
        let mut sorted = sizes.get(1..).unwrap_or_default().to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
        sizes.iter().enumerate().map(|(t, &size)| t == 0 || median > 0.0 && size > MASSIVE * median).collect()
    }

    /// Returns the factors of the tokens of a sequence: 0 for those left out, 1 for the others.
    pub(super) fn factors(&self, neurons: &[f32]) -> Vec<f32> {
        self.of(neurons).into_iter().map(|is_left_out| if is_left_out { 0.0 } else { 1.0 }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::Input;
    use dsmoe_kernels::buf::Buf;

    #[test]
    fn the_first_token_and_massive_ones_are_left_out() {
        let mut weight = Buf::zeros(4);
        weight.copy_from_slice(&[3.0, 0.0, 4.0, 2.0]);
        let name = "down".to_owned();
        let down = Linear { name, outputs: 2, inputs: 2, input: Input::Neurons, weight, bias: None };
        let sinks = Sinks::new(&down);
        assert_eq!(sinks.lengths, [5.0, 2.0]);
        let neurons = [0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 19.0, 0.0, 0.0, 60.0, 0.2, 0.0];
        assert_eq!(sinks.of(&neurons), [true, false, false, false, true, false]);
        assert_eq!(sinks.factors(&neurons[..4]), [0.0, 1.0]);
        assert_eq!(sinks.of(&[0.0; 6]), [true, false, false]);
        assert!(sinks.of(&[]).is_empty());
    }
}
