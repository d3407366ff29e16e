//! Budgets by request: what requests lose at each budget of a model, networks that predict it, and the comparison of the budgets
//! chosen by them with one budget for all. `dsmoe plan` and an experiment of `dsmoe reproduce` share it.

pub(crate) mod compare;
pub(crate) mod heads;
pub(crate) mod profiling;
pub(crate) mod requests;
