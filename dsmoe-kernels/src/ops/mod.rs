//! One folder per op. An op is a struct of named arguments; `run` computes it on the tier of [`Isa::current`], `run_on` on
//! a given tier.
//!
//! [`Isa::current`]: crate::Isa::current

/// Defines `run` for ops that have `run_on`.
macro_rules! run_on_current_tier {
    ($($op:ident),+) => {$(
        impl $op<'_> {
            /// Runs the op on the tier of [`Isa::current`](crate::Isa::current).
            ///
            /// # Panics
            /// Panics under the conditions of [`Self::run_on`].
            pub fn run(self) {
                self.run_on(crate::isa::Isa::current());
            }
        }
    )+};
}

pub mod adamw;
pub mod add;
pub mod attention;
pub(crate) mod blocks;
pub mod cross_entropy;
pub mod embedding;
pub mod expert_ffn;
pub mod kept;
pub mod linear;
pub mod matmul;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
