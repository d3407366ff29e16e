//! The list of all methods: those of this crate, and those that a program adds.

use std::sync::{LazyLock, PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::method::Method;
use crate::{
    cmoe, controls, depth, dsmoe, duo, factorllm, llama_moe, llm_pruner, moefication, neurons, random_k,
    sparse, surgery, thresholds,
};

/// Methods by their order in lists.
#[derive(Default)]
struct Registry(Vec<&'static dyn Method>);

impl Registry {
    /// Adds a method at the end. One that is there already stays where it is.
    fn add(&mut self, method: &'static dyn Method) -> Result<()> {
        match self.find(method.name()) {
            None => self.0.push(method),
            Some(known) if std::ptr::addr_eq(known, method) => {}
            Some(_) => return Err(Error::MethodTwice { name: method.name().to_owned() }),
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&'static dyn Method> {
        self.0.iter().copied().find(|method| method.name() == name)
    }
}

static METHODS: LazyLock<RwLock<Registry>> = LazyLock::new(|| {
    let own: [&'static dyn Method; _] = [
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
    let mut registry = Registry::default();
    for method in own {
        if let Err(cause) = registry.add(method) {
            panic!("{cause}");
        }
    }
    RwLock::new(registry)
});

/// Adds a method to those of this process. Adding it again changes nothing.
///
/// # Errors
/// Another method has its name.
pub fn add_method(method: &'static dyn Method) -> Result<()> {
    METHODS.write().unwrap_or_else(PoisonError::into_inner).add(method)
}

/// Lists all methods: those of this crate, then those that were added.
pub fn methods() -> Vec<&'static dyn Method> {
    METHODS.read().unwrap_or_else(PoisonError::into_inner).0.clone()
}

/// Finds the method of that name.
///
/// # Errors
/// There is none; the error lists the names.
pub fn method(name: &str) -> Result<&'static dyn Method> {
    let registry = METHODS.read().unwrap_or_else(PoisonError::into_inner);
    registry.find(name).ok_or_else(|| Error::Method {
        name: name.to_owned(),
        known: registry.0.iter().map(|method| method.name()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_given_once() {
        let mut registry = Registry::default();
        registry.add(&controls::DENSE).unwrap();
        registry.add(&controls::DENSE).unwrap();
        static OTHER: crate::Entry<controls::NoSettings> =
            crate::Entry { name: "dense", ..crate::Entry::new(|_| unreachable!("never configured")) };
        let error = registry.add(&OTHER).unwrap_err().to_string();
        assert_eq!(error, "the method \"dense\" is registered twice; give one of the two another name");
        assert_eq!(registry.0.len(), 1);
    }
}
