//! What the FFN of a layer is made to do in place of its own choice.

/// The route of a layer for all tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Route {
    /// What the FFN does by itself.
    #[default]
    Own,
    /// Nothing: the output is 0.
    Skip,
    /// The choice of that number, from 1 to [`PackedFfn::choices`](super::PackedFfn::choices).
    Choice(usize),
}
