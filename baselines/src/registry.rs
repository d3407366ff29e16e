//! The list of all methods.

use crate::error::{Error, Result};
use crate::method::Method;
use crate::{
    cmoe, controls, depth, dsmoe, duo, factorllm, llama_moe, llm_pruner, moefication, neurons, random_k,
    sparse, surgery, thresholds,
};

/// Lists all methods.
pub fn methods() -> &'static [&'static dyn Method] {
    static METHODS: &[&dyn Method] = &[
        &dsmoe::TUNED,
        &dsmoe::PAPER,
        &llm_pruner::BLOCK,
        &llm_pruner::CHANNEL,
        &neurons::FLAP,
        &depth::DEPTH,
        &sparse::SPARSEGPT,
        &sparse::WANDA,
        &sparse::MAGNITUDE,
        &thresholds::THRESHOLDS,
        &llama_moe::LLAMA_MOE,
        &moefication::MOEFICATION,
        &cmoe::CMOE,
        &factorllm::FACTORLLM,
        &duo::DUO,
        &duo::DUO_ROUTER,
        &dsmoe::LTE,
        &random_k::RANDOM_K,
        &controls::DENSE,
        &controls::SMALL_DENSE,
        &neurons::STATIC_CORE,
        &dsmoe::NO_STE,
        &dsmoe::NO_THRESHOLD,
        &surgery::HC_SMOE,
        &surgery::UNCURL,
        &surgery::SEER_MOE,
    ];
    METHODS
}

/// Finds the method of that name.
///
/// # Errors
/// There is none; the error lists the names.
pub fn method(name: &str) -> Result<&'static dyn Method> {
    methods().iter().copied().find(|method| method.name() == name).ok_or_else(|| Error::Method {
        name: name.to_owned(),
        known: methods().iter().map(|method| method.name()).collect(),
    })
}
