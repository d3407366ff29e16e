//! Routes that a caller imposes on the FFN of a layer in place of its own choice.

/// The route of a layer for all tokens.
///
/// ```
/// use dsmoe_core::ffn::Route;
/// use dsmoe_core::init::preset;
/// use dsmoe_core::{Inference, Model};
/// use dsmoe_kernels::Precision;
///
/// let mut model = Inference::new(&Model::new(preset("tiny")?), Precision::F32);
/// let mut routes = vec![Route::Own; model.config().num_layers];
/// routes[0] = Route::Skip;
/// model.set_routes(&routes)?;
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Route {
    /// The FFN's own choice.
    #[default]
    Own,
    /// Nothing: the output is 0.
    Skip,
    /// The choice of that number, from 1 to [`PackedFfn::choices`](super::PackedFfn::choices).
    Choice(usize),
}
