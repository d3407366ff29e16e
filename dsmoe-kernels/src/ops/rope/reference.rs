//! The definition of the rotation, in f64.

/// Rotates `x` `[rows, heads * head_dim]` by `positions[row] * frequencies[i]`, `frequencies` `[head_dim / 2]`:
/// `x_i <- x_i cos - x_{i+half} sin`, `x_{i+half} <- x_{i+half} cos + x_i sin`.
pub fn forward(x: &[f64], frequencies: &[f64], positions: &[usize], heads: usize) -> Vec<f64> {
    rotate(x, frequencies, positions, heads, 1.0)
}

/// Returns dx from dy: the transpose of the rotation by an angle is the rotation by minus that angle.
pub fn backward(dy: &[f64], frequencies: &[f64], positions: &[usize], heads: usize) -> Vec<f64> {
    rotate(dy, frequencies, positions, heads, -1.0)
}

fn rotate(x: &[f64], frequencies: &[f64], positions: &[usize], heads: usize, direction: f64) -> Vec<f64> {
    let half = frequencies.len();
    let mut y = x.to_vec();
    for (r, &p) in positions.iter().enumerate() {
        for h in 0..heads {
            let first = (r * heads + h) * 2 * half;
            for (i, f) in frequencies.iter().enumerate() {
                let (sin, cos) = (direction * p as f64 * f).sin_cos();
                let (a, b) = (x[first + i], x[first + half + i]);
                y[first + i] = a * cos - b * sin;
                y[first + half + i] = b * cos + a * sin;
            }
        }
    }
    y
}
