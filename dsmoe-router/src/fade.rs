//! Fewer experts for a token, step by step: coefficients of the experts that go fade out before k is lowered.

/// The factor on the coefficients of the experts of a token beyond the first `kept`, by falling logit. Coefficients that add up to
/// 1 do so with the factor.
///
/// ```
/// use dsmoe_router::Fade;
///
/// let fade = Fade { kept: 2, factor: 0.25 };
/// assert_eq!([0, 1, 2].map(|rank| fade.at(rank)), [1.0, 1.0, 0.25]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fade {
    /// Experts that stay.
    pub kept: usize,
    /// Factor of the others, 0 to 1.
    pub factor: f64,
}

impl Fade {
    /// All experts stay.
    pub const NONE: Fade = Fade { kept: usize::MAX, factor: 1.0 };

    /// Returns the factor of the expert at a place in the order of logits, the largest at 0.
    pub fn at(self, rank: usize) -> f64 {
        if rank < self.kept { 1.0 } else { self.factor }
    }
}
