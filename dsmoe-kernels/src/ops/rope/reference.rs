//! The definition of the rotation, in f64.

/// Returns the plain frequencies `[width / 2]` of heads that are rotated in their first `width` values:
/// `base^(-2i / width)`.
pub fn frequencies(width: usize, base: f64) -> Vec<f64> {
    (0..width / 2).map(|i| base.powf(-2.0 * i as f64 / width as f64)).collect()
}

/// The rotation of rows of `heads` heads of `head_dim` values; row r is at position `positions[r]`.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// Radians per position of each pair of values, at most `head_dim / 2`.
    pub frequencies: &'a [f64],
    /// Multiplies sines and cosines.
    pub factor: f64,
    /// `[rows]`
    pub positions: &'a [usize],
    /// Heads in a row.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Rotation<'_> {
    /// Rotates `x` `[rows, heads * head_dim]` by `positions[row] * frequencies[i]`, with half = frequencies.len():
    /// `x_i <- factor (x_i cos - x_{i+half} sin)`, `x_{i+half} <- factor (x_{i+half} cos + x_i sin)`. The values of a head
    /// from 2 half on stay.
    pub fn forward(self, x: &[f64]) -> Vec<f64> {
        self.rotate(x, 1.0)
    }

    /// Returns dx from dy: the transpose of the rotation by an angle is the rotation by minus that angle, and the factor
    /// is its own transpose.
    pub fn backward(self, dy: &[f64]) -> Vec<f64> {
        self.rotate(dy, -1.0)
    }

    fn rotate(self, x: &[f64], direction: f64) -> Vec<f64> {
        let Rotation { frequencies, factor, positions, heads, head_dim } = self;
        let half = frequencies.len();
        let mut y = x.to_vec();
        for (r, &p) in positions.iter().enumerate() {
            for h in 0..heads {
                let first = (r * heads + h) * head_dim;
                for (i, f) in frequencies.iter().enumerate() {
                    let (sin, cos) = (direction * p as f64 * f).sin_cos();
                    let (a, b) = (x[first + i], x[first + half + i]);
                    y[first + i] = factor * (a * cos - b * sin);
                    y[first + half + i] = factor * (b * cos + a * sin);
                }
            }
        }
        y
    }
}
