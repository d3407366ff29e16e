//! Pruning by a score of each weight, without an update.
//!
//! Wanda (Sun et al., arXiv 2306.11695) removes the weights with the smallest `|w| * ||x||` of their row, where x are
//! the values of the weight's input over all tokens. Magnitude pruning removes the smallest `|w|`, by default of the
//! whole matrix, and reads no text.

use dsmoe_core::Config;
use dsmoe_core::calibrate::Input;
use dsmoe_core::masks::Mask;
use rayon::prelude::*;

use super::pattern::{Among, Pattern, Sparsity, Target, removed_of};
use super::select::{Smallest, mark_smallest};
use super::{Layer, calibration, run};
use crate::error::Result;
use crate::method::{Budget, Configured, Job, Made, Plan, Progress};
use crate::settings::{Entry, SettingValues, Settings as _, settings};

/// Columns summed by one task.
const COLUMNS: usize = 64;

/// The method `wanda`.
pub(crate) static WANDA: Entry<ScoreSettings> = Entry {
    name: "wanda",
    summary: "zeros where weight times norm of its input is smallest, no update; any budget, or half the linears",
    defaults: || ScoreSettings { among: Among::Row, ..ScoreSettings::default() },
    ..Entry::new(|settings| Ok(Box::new(ScorePruning { settings, by_inputs: true })))
};

/// The method `magnitude`.
pub(crate) static MAGNITUDE: Entry<ScoreSettings> = Entry {
    name: "magnitude",
    summary: "zeros where weights are smallest, no calibration; any budget, or half the linears",
    ..Entry::new(|settings| Ok(Box::new(ScorePruning { settings, by_inputs: false })))
};

settings! {
    /// Settings of Wanda and of magnitude pruning.
    pub struct ScoreSettings {
        /// Pattern of zeros: unstructured, or 2:4 or 4:8 (zeros in so many columns), which fix the density at 0.5.
        pub pattern: Pattern = Pattern::Unstructured,
        /// True accepts the nearest budget within reach; false refuses one that is more than 1 % off.
        pub nearest: bool = false,
        /// The weights whose scores are compared: those of a row or of a matrix.
        pub among: Among = Among::Matrix,
    }
}

/// Pruning by score, with its settings.
struct ScorePruning {
    settings: ScoreSettings,
    /// Scores are weighted by the norms of inputs.
    by_inputs: bool,
}

impl ScorePruning {
    fn target(&self, config: &Config, budget: Budget) -> Result<Target> {
        let ScoreSettings { pattern, nearest, among } = self.settings;
        Target::new(config, budget, pattern, among, nearest)
    }

    fn prune(&self, layer: &mut Layer<'_>, sparsity: &Sparsity) -> Result<()> {
        let first = if self.by_inputs { 0.0 } else { 1.0 };
        let mut squares = Input::ALL.map(|input| vec![first; layer.width(input)]);
        if self.by_inputs {
            layer.stream.forward(&layer.weights, &mut |tap| {
                if let Some(at) = Input::ALL.iter().position(|&input| input == tap.input) {
                    add_squares(&mut squares[at], tap.x);
                }
            })?;
        }
        for (input, squares) in Input::ALL.into_iter().zip(squares) {
            let norms: Vec<f32> = squares.iter().map(|square| square.sqrt() as f32).collect();
            layer.prune(input, |linear| prune(&mut linear.weight, &norms, sparsity))?;
        }
        Ok(())
    }
}

impl Configured for ScorePruning {
    fn needs_calibration(&self) -> bool {
        self.by_inputs
    }

    fn resolved(&self) -> SettingValues {
        self.settings.values()
    }

    fn plan(&self, config: &Config, budget: Budget) -> Result<Plan> {
        Ok(self.target(config, budget)?.plan)
    }

    fn run(&self, job: &Job<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Made> {
        let Target { sparsity, plan } = self.target(&Config::load(job.model)?, job.budget)?;
        let text = if self.by_inputs { calibration(job)? } else { &[] };
        run(job, plan, text, progress, &|layer| self.prune(layer, &sparsity))
    }
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

/// Zeroes the weights of `weight` `[rows, cols]` with the smallest `|w| * scale[column]`.
///
/// # Panics
/// Shapes do not fit.
pub(crate) fn prune(weight: &mut [f32], scale: &[f32], sparsity: &Sparsity) -> Mask {
    let cols = scale.len();
    assert!(cols > 0 && weight.len().is_multiple_of(cols), "prune: {} weights, {cols} columns", weight.len());
    let rows = weight.len() / cols;
    let scores = |out: &mut [f32], w: &[f32]| {
        out.iter_mut().zip(w).zip(scale).for_each(|((out, w), scale)| *out = w.abs() * scale);
    };
    let of_matrix = match (sparsity.pattern, sparsity.among) {
        (Pattern::Unstructured, Among::Matrix) => {
            let mut all = vec![0.0; weight.len()];
            all.par_chunks_mut(cols).zip(weight.par_chunks(cols)).for_each(|(out, w)| scores(out, w));
            Some(Smallest::of(&all, removed_of(weight.len(), sparsity.share)))
        }
        _ => None,
    };
    let stride = cols.div_ceil(8);
    let mut kept = vec![0u8; rows * stride];
    let tasks = weight.par_chunks_mut(cols).zip(kept.par_chunks_mut(stride)).enumerate();
    tasks.for_each_init(Default::default, |(row_scores, removed, keys), (row, (w, bits))| {
        let (row_scores, removed): (&mut Vec<f32>, &mut Vec<bool>) = (row_scores, removed);
        row_scores.resize(cols, 0.0);
        removed.resize(cols, false);
        scores(row_scores, w);
        match (sparsity.pattern, of_matrix) {
            (Pattern::Group { removed: count, of }, _) => {
                for (removed, scores) in removed.chunks_exact_mut(of).zip(row_scores.chunks_exact(of)) {
                    mark_smallest(removed, scores, count);
                }
            }
            (Pattern::Unstructured, Some(smallest)) => smallest.mark(removed, row_scores, row * cols),
            (Pattern::Unstructured, None) => {
                let count = removed_of(cols, sparsity.share);
                Smallest::of_few(row_scores, count, keys).mark(removed, row_scores, 0);
            }
        }
        for (col, (w, &removed)) in w.iter_mut().zip(&*removed).enumerate() {
            if removed {
                *w = 0.0;
            } else {
                bits[col / 8] |= 1 << (col % 8);
            }
        }
    });
    Mask::from_bits(rows, cols, kept)
}

#[cfg(test)]
mod tests {
    use dsmoe_kernels::testing::{assert_same_on_threads, normals};

    use super::*;

    #[test]
    fn the_smallest_scores_go_and_the_first_of_equals() {
        let third = |among| Sparsity { pattern: Pattern::Unstructured, among, share: 1.0 / 3.0 };
        let pattern = Pattern::Group { removed: 2, of: 4 };
        let half = Sparsity { pattern, among: Among::Row, share: 0.5 };
        let six = [1.0, -2.0, 3.0, 4.0, 0.5, -1.0];
        let eight = [1.0, -2.0, 3.0, -4.0, 0.0, 0.0, 0.0, 0.0];
        for (weights, scale, sparsity, want, kept) in [
            // Scores [[3, 2, 1.5], [12, 0.5, 0.5]].
            (&six[..], &[3.0, 1.0, 0.5][..], third(Among::Row), &[2, 4][..], &[0b011, 0b101][..]),
            (&six, &[1.0; 3], third(Among::Matrix), &[0, 4], &[0b110, 0b101]),
            // A kept zero stays one of the kept.
            (&eight, &[1.0; 8], half, &[0, 1], &[0b1100_1100]),
        ] {
            let (mut got, mut left) = (weights.to_vec(), weights.to_vec());
            want.iter().for_each(|&removed: &usize| left[removed] = 0.0);
            let mask = prune(&mut got, scale, &sparsity);
            assert_eq!(got, left, "{sparsity:?}");
            assert_eq!(mask, Mask::from_bits(kept.len(), scale.len(), kept.to_vec()), "{sparsity:?}");
        }
    }

    #[test]
    fn nothing_and_everything() {
        for among in [Among::Row, Among::Matrix] {
            let dense = normals(5 * 13, 1);
            for (share, kept) in [(0.0, 65), (1.0, 0)] {
                let mut w = dense.clone();
                let sparsity = Sparsity { pattern: Pattern::Unstructured, among, share };
                assert_eq!(prune(&mut w, &[1.0; 13], &sparsity).kept(), kept);
                assert!(if kept > 0 { w == dense } else { w.iter().all(|&w| w == 0.0) });
            }
        }
    }

    #[test]
    fn threads_do_not_show() {
        let dense = normals(40 * 301, 9);
        for among in [Among::Row, Among::Matrix] {
            let sparsity = Sparsity { pattern: Pattern::Unstructured, among, share: 0.4 };
            assert_same_on_threads("prune", || {
                let mut w = dense.clone();
                (prune(&mut w, &[1.0; 301], &sparsity), w)
            });
        }
    }
}
