//! `dsmoe bench kernels|ffn|train|decode`: how long kernels and models take, and how near that is to what the machine
//! can do.

pub(crate) mod ceilings;
pub(crate) mod checks;
pub(crate) mod decode;
pub(crate) mod decode_model;
pub(crate) mod ffn;
pub(crate) mod matmul;
pub(crate) mod model;
pub(crate) mod ops;
pub(crate) mod output;
pub(crate) mod resident;
pub(crate) mod routing;
pub(crate) mod row;
pub(crate) mod train;
pub(crate) mod turns;
pub(crate) mod values;
