//! The experts of a mixture, as config.json describes them, and the numbers of experts of layers.

use std::path::Path;
use std::sync::Arc;

use dsmoe_router::expert_map::ExpertMap;
use dsmoe_router::mixture::MixtureConfig;

use crate::error::{Error, Result};

/// Experts of one width in every layer, of which a router gives every token k, and an expert that all tokens run beside them.
///
/// Layers may hold different numbers of experts, and several gates of a router may share one.
///
/// ```
/// use dsmoe_core::config::MixtureSpec;
///
/// let (renormalise, balance_weight, maps) = (true, 0.01, None);
/// let spec =
///     MixtureSpec { top_k: 2, renormalise, width: 64, shared: None, balance_weight, experts: vec![8, 4], maps };
/// assert!(!spec.is_even());
/// assert_eq!((spec.router(1).num_experts, spec.neurons(1)), (4, 256));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct MixtureSpec {
    /// Gates that open for each token (k).
    pub top_k: usize,
    /// True if the coefficients of a token are scaled to add up to 1.
    pub renormalise: bool,
    /// Neurons of an expert.
    pub width: usize,
    /// Neurons of the expert that every token runs, times the sigmoid of a gate of its own; none without it.
    pub shared: Option<usize>,
    /// Weight of the balance loss, which is a mean over layers.
    pub balance_weight: f64,
    /// Experts that each layer holds.
    pub experts: Vec<usize>,
    /// The expert of every gate, layer by layer; none where each expert has a gate of its own.
    pub maps: Option<Vec<Arc<ExpertMap>>>,
}

impl MixtureSpec {
    /// Returns the largest number of experts that a layer holds.
    pub fn most_experts(&self) -> usize {
        self.experts.iter().copied().max().unwrap_or(0)
    }

    /// Returns whether all layers hold equally many experts.
    pub fn is_even(&self) -> bool {
        self.experts.iter().all(|&experts| experts == self.experts[0])
    }

    /// Returns the number of gates of a layer.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn gates(&self, layer: usize) -> usize {
        self.map(layer).map_or(self.experts[layer], |map| map.num_gates())
    }

    /// Returns the expert of every gate of a layer; none where each expert has its own.
    pub fn map(&self, layer: usize) -> Option<&Arc<ExpertMap>> {
        self.maps.as_ref().map(|maps| &maps[layer])
    }

    /// Returns the rule by which a layer chooses among its gates.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn router(&self, layer: usize) -> MixtureConfig {
        let MixtureSpec { top_k, renormalise, .. } = *self;
        MixtureConfig { num_experts: self.gates(layer), top_k, renormalise }
    }

    /// Returns the neurons of all experts that a layer chooses from.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn neurons(&self, layer: usize) -> usize {
        self.experts[layer] * self.width
    }

    /// Returns whether its family's own format holds it.
    pub(crate) fn fits_family(&self) -> bool {
        self.is_even() && self.maps.is_none()
    }
}

/// Returns the maps of the key `expert_map`: one list for each layer, of the expert of every gate, among so many `experts`. `path` is
/// that of config.json and `prefix` that of the key, for messages.
///
/// # Errors
/// There is not one list for each layer, a gate has an expert that there is not, or an expert has no gate.
pub fn maps_of_layers(
    path: &Path,
    prefix: &str,
    stored: Vec<Vec<u32>>,
    experts: &[usize],
) -> Result<Vec<Arc<ExpertMap>>> {
    let wrong = |problem: String, help: &'static str| {
        Error::field(path, format!("{prefix}expert_map"), problem, help)
    };
    if stored.len() != experts.len() {
        let problem = format!("has {} lists and num_hidden_layers is {}", stored.len(), experts.len());
        return Err(wrong(problem, "give one list for each layer"));
    }
    let map = |(layer, (of_gates, &experts)): (usize, (Vec<u32>, &usize))| {
        ExpertMap::new(of_gates, experts)
            .map(Arc::new)
            .map_err(|cause| wrong(format!("is wrong in layer {layer} ({cause})"), "make the model again"))
    };
    stored.into_iter().zip(experts).enumerate().map(map).collect()
}

/// Returns the lists of the key `expert_map`.
pub fn lists_of_maps(maps: &[Arc<ExpertMap>]) -> Vec<Vec<u32>> {
    maps.iter().map(|map| map.of_gates().to_vec()).collect()
}

/// Returns the number of experts of every layer: those of the key `experts_per_layer` where it is `stored`, of which `most`, the key
/// `num_experts`, is the largest, and otherwise as many in each. `path` is that of config.json and `prefix` that of both keys,
/// for messages.
///
/// # Errors
/// There is not one number for each layer, one is not from 1 to `most`, or none is `most`.
pub fn experts_of_layers(
    path: &Path,
    prefix: &str,
    stored: Option<&[usize]>,
    [most, num_layers]: [usize; 2],
) -> Result<Vec<usize>> {
    const KEY: &str = "experts_per_layer";
    let Some(experts) = stored else { return Ok(vec![most; num_layers]) };
    if experts.len() != num_layers {
        let problem = format!("has {} entries and num_hidden_layers is {num_layers}", experts.len());
        return Err(Error::field(path, format!("{prefix}{KEY}"), problem, "give one number for each layer"));
    }
    if let Some(layer) = experts.iter().position(|experts| !(1..=most).contains(experts)) {
        let problem = format!("is {} for layer {layer}", experts[layer]);
        return Err(Error::field(
            path,
            format!("{prefix}{KEY}"),
            problem,
            format!("use 1 to num_experts, {most}"),
        ));
    }
    if !experts.contains(&most) {
        let problem = format!("is {most} and no entry of {KEY} is");
        return Err(Error::field(path, format!("{prefix}num_experts"), problem, "use the largest of them"));
    }
    Ok(experts.to_vec())
}
