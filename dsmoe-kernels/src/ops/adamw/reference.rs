//! The definition of the update, in f64.

use super::Hyper;

/// Updates `p`, `m` and `v` in place; see the module's formula, line by line.
pub fn step(p: &mut [f64], m: &mut [f64], v: &mut [f64], grad: &[f64], grad_scale: f64, hyper: &Hyper) {
    let Hyper { lr, beta1, beta2, eps, weight_decay, step } = *hyper;
    for i in 0..p.len() {
        let g = grad_scale * grad[i];
        p[i] *= 1.0 - lr * weight_decay;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let m_hat = m[i] / (1.0 - beta1.powf(step as f64));
        let v_hat = v[i] / (1.0 - beta2.powf(step as f64));
        p[i] -= lr * m_hat / (v_hat.sqrt() + eps);
    }
}
