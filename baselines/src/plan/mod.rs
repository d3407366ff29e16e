//! Planning after MEMTL (Liang and others, 2023): one small network with several heads imitates or predicts what a request costs.
//!
//! The paper's users share a server's processor; here the requests to a model that serves several budgets do. What carries over is
//! the problem, the cheap imitator and the heads, each of a bootstrap sample, against inputs that drift. Radio and energy do not.
//!
//! - [`offload`]: the paper's problem, with its exact optimum in closed form.
//! - [`Curves`]: what each budget costs a request, and the choice of a budget by it.
//! - [`place`]: requests with deadlines on a processor and a server that they share.

mod budget;
mod network;
pub mod offload;
pub mod place;

pub use budget::{Curves, Policy, Predicted, at_mean_share, least_at_mean_share, mean_at};
pub use network::{Ensemble, Fit, Loss};
