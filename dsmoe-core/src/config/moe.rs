//! The `dsmoe` object of config.json: experts, routers, and what stands beside them.

use std::sync::Arc;

use dsmoe_router::expert_map::ExpertMap;
use dsmoe_router::{GateValue, Rescale, RouterConfig, ZeroActive};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::experts::{experts_of_layers, lists_of_maps, maps_of_layers};
use super::fields::Fields;
use crate::error::{Error, Result, shown};

/// The format that has experts and routers alone.
const PLAIN_FORMAT: u64 = 1;
/// The format with the parts of [`MoeParts`].
const FORMAT_WITH_PARTS: u64 = 2;
const MOST_BUDGETS: usize = 256;

/// Order of the neurons in the stored FFN tensors.
///
/// ```
/// use dsmoe_core::config::PartitionKind;
/// use dsmoe_core::convert::{ConvertOptions, PartitionSpec, convert};
/// # let work = tempfile::tempdir()?;
/// # let (dense, moe) = (work.path().join("dense"), work.path().join("moe"));
/// # dsmoe_core::init::init(&dsmoe_core::init::preset("tiny")?, &dense, &Default::default(), &mut |_| {})?;
///
/// let options = ConvertOptions { partition: PartitionSpec::Random, ..ConvertOptions::new(8) };
/// convert(&dense, &moe, &options, &mut |_| {})?;
/// let config = dsmoe_core::Config::load(&moe)?;
/// // The directory holds the original places of the neurons.
/// assert_eq!(config.moe.unwrap().partition, PartitionKind::Permuted);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartitionKind {
    /// The original order; expert i is the i-th block.
    Contiguous,
    /// Permuted; `mlp.partition` of each layer holds the original indices.
    Permuted,
}

/// The `dsmoe` object of config.json.
///
/// ```
/// use dsmoe_core::config::{Budget, MoeConfig, MoeParts, PartitionKind};
/// use dsmoe_router::RouterConfig;
///
/// let budgets = vec![
///     Budget { active: 0.25, thresholds: vec![1.0] },
///     Budget { active: 0.5, thresholds: vec![0.0] },
/// ];
/// let parts = MoeParts { core: vec![1], budgets, ..MoeParts::default() };
/// let moe =
///     MoeConfig { partition: PartitionKind::Permuted, parts, ..MoeConfig::new(RouterConfig::new(8)) };
/// // Thresholds between two stored shares are interpolated.
/// assert_eq!((moe.core(0), moe.thresholds_for(0.375)?), (1, vec![0.5]));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Settings of the routers, with the number of all experts of a layer, the largest where layers differ.
    pub router: RouterConfig,
    /// Order of the neurons.
    pub partition: PartitionKind,
    /// True if routers have a bias.
    pub router_bias: bool,
    /// The share of experts to be active that the model was made for; training reaches it unless told otherwise.
    pub active_target: Option<f64>,
    /// True if no weight of the dense model was changed since the conversion.
    pub untrained: bool,
    /// The parts beside routed experts.
    pub parts: MoeParts,
}

/// The optional parts beside routed experts and their routers. The default has none.
///
/// ```
/// use dsmoe_core::Model;
/// use dsmoe_core::config::{MoeConfig, MoeParts};
/// use dsmoe_core::init::preset;
/// use dsmoe_router::RouterConfig;
///
/// // The first of 8 experts always runs in every layer, and routers have rank 4.
/// let mut config = preset("tiny")?;
/// let parts = MoeParts { core: vec![1; config.num_layers], router_rank: Some(4), ..MoeParts::default() };
/// config.moe = Some(MoeConfig { parts, ..MoeConfig::new(RouterConfig::new(8)) });
/// let router_params = |model: &Model| -> usize {
///     model.layout().entries().iter().filter(|entry| entry.spec.router).map(|entry| entry.spec.numel()).sum()
/// };
/// let small = router_params(&Model::new(config.clone()));
/// config.moe = Some(MoeConfig::new(RouterConfig::new(8)));
/// assert!(small < router_params(&Model::new(config)));
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MoeParts {
    /// The experts of each layer, the core included, where layers have different numbers of them; empty where all have as many.
    pub experts: Vec<usize>,
    /// The leading experts of each layer that every token runs with the factor 1 and that no router knows; empty for
    /// none at all.
    pub core: Vec<usize>,
    /// The expert of every gate, layer by layer, counted behind the core; none where each expert has a gate of its own.
    pub maps: Option<Vec<Arc<ExpertMap>>>,
    /// Rank r of the routers: their logits are a linear map of r values, which are a linear map of the input.
    pub router_rank: Option<usize>,
    /// True if a linear map of the router's r values is added to the output of every FFN.
    pub correction: bool,
    /// Thresholds by the share of active experts that they reach, ascending; empty where the router's threshold holds.
    pub budgets: Vec<Budget>,
}

/// Thresholds that leave a share of the experts active.
///
/// ```
/// use dsmoe_core::config::{Budget, MoeConfig};
/// use dsmoe_router::RouterConfig;
///
/// let mut moe = MoeConfig::new(RouterConfig::new(8));
/// moe.parts.budgets = vec![
///     Budget { active: 0.25, thresholds: vec![2.0, 1.0] },
///     Budget { active: 0.5, thresholds: vec![0.0, -1.0] },
/// ];
/// assert_eq!(moe.thresholds_for(0.5)?, [0.0, -1.0]);
/// // Below the smallest share there is no threshold.
/// assert!(moe.thresholds_for(0.1).is_err());
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// The active share of the experts of all layers, the core included, mean over tokens.
    pub active: f64,
    /// The threshold of the gates' logits in each layer. A gate is open where its logit is larger.
    pub thresholds: Vec<f32>,
}

/// [`MoeConfig`] as it is stored.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredMoe {
    format_version: u64,
    num_experts: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    experts_per_layer: Option<Vec<usize>>,
    threshold: f64,
    partition: PartitionKind,
    router_bias: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    core: Option<StoredCore>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert_map: Option<Vec<Vec<u32>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    router_rank: Option<usize>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    correction: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    budgets: Option<Vec<StoredBudget>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    active_target: Option<f64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    untrained: bool,
    gate_value: GateValue,
    rescale: Rescale,
    zero_active: ZeroActive,
    ste: bool,
}

/// The core of every layer, or of each.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StoredCore {
    Every(usize),
    Each(Vec<usize>),
}

/// [`Budget`] with the decimals of its numbers.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredBudget {
    active: f64,
    thresholds: Vec<f64>,
}

impl MoeConfig {
    /// Describes untrained experts in blocks of consecutive neurons, with nothing beside them.
    pub fn new(router: RouterConfig) -> MoeConfig {
        MoeConfig {
            router,
            partition: PartitionKind::Contiguous,
            router_bias: false,
            active_target: None,
            untrained: false,
            parts: MoeParts::default(),
        }
    }

    /// Returns the number of experts of a layer, the core included.
    ///
    /// ```
    /// use dsmoe_core::config::{MoeConfig, MoeParts};
    /// use dsmoe_router::RouterConfig;
    ///
    /// let parts = MoeParts { experts: vec![8, 6], ..MoeParts::default() };
    /// let moe = MoeConfig { parts, ..MoeConfig::new(RouterConfig::new(8)) };
    /// assert_eq!([moe.experts(0), moe.experts(1)], [8, 6]);
    /// ```
    pub fn experts(&self, layer: usize) -> usize {
        self.parts.experts.get(layer).copied().unwrap_or(self.router.num_experts)
    }

    /// Sets the number of experts of every layer, the core included.
    pub(crate) fn set_experts(&mut self, experts: Vec<usize>) {
        self.router.num_experts = experts.iter().copied().max().unwrap_or(0);
        let is_even = experts.iter().all(|&experts| experts == self.router.num_experts);
        self.parts.experts = if is_even { Vec::new() } else { experts };
    }

    /// Returns the number of leading experts of a layer that every token runs.
    pub fn core(&self, layer: usize) -> usize {
        self.parts.core.get(layer).copied().unwrap_or(0)
    }

    /// Returns the expert of every gate of a layer, counted behind the core; none where each expert has a gate of its own.
    pub fn map(&self, layer: usize) -> Option<&Arc<ExpertMap>> {
        self.parts.maps.as_ref()?.get(layer)
    }

    /// Returns the threshold of the gates; none where a budget has thresholds by layer.
    pub fn threshold(&self) -> Option<f32> {
        self.parts.budgets.is_empty().then_some(self.router.threshold)
    }

    /// Returns the share of active experts whose stored thresholds hold; none without budgets.
    pub fn budget(&self) -> Option<f64> {
        self.active_target.filter(|_| !self.parts.budgets.is_empty())
    }

    /// Returns the thresholds of all layers, as logits, that leave the share `active` of experts active: those stored,
    /// or between two stored ones a linear mix of both.
    ///
    /// # Errors
    /// There are no budgets, or `active` is outside of them.
    pub fn thresholds_for(&self, active: f64) -> Result<Vec<f32>> {
        let budgets = &self.parts.budgets;
        let (Some(first), Some(last)) = (budgets.first(), budgets.last()) else {
            let help = "make one by converting with calibration text, or set the {threshold}";
            return Err(Error::argument("this model has no budgets to choose an active share from", help));
        };
        if !(first.active..=last.active).contains(&active) {
            let problem = format!("an active share of {active} is outside of the model's budgets");
            return Err(Error::argument(problem, format!("use {} to {}", first.active, last.active)));
        }
        let above = budgets.iter().position(|budget| budget.active >= active).unwrap_or(0);
        let (low, high) = (&budgets[above.saturating_sub(1)], &budgets[above]);
        if high.active == active || above == 0 {
            return Ok(high.thresholds.clone());
        }
        let part = ((active - low.active) / (high.active - low.active)) as f32;
        let mix = |(low, high): (&f32, &f32)| low + part * (high - low);
        Ok(low.thresholds.iter().zip(&high.thresholds).map(mix).collect())
    }

    /// Returns what the logits of the gates of a layer have to exceed for the share that the model was made for; none
    /// without budgets.
    pub fn threshold_logit(&self, layer: usize) -> Option<f32> {
        let thresholds = self.thresholds_for(self.budget()?).ok()?;
        thresholds.get(layer).copied()
    }

    /// Returns the object of config.json.
    pub(super) fn to_value(&self) -> Value {
        let (router, parts) = (&self.router, &self.parts);
        let core = match parts.core.first() {
            None => None,
            Some(0) if parts.core.iter().all(|&core| core == 0) => None,
            Some(&one) if parts.core.iter().all(|&core| core == one) => Some(StoredCore::Every(one)),
            Some(_) => Some(StoredCore::Each(parts.core.clone())),
        };
        let budget = |budget: &Budget| StoredBudget {
            active: budget.active,
            thresholds: budget.thresholds.iter().map(|&threshold| decimal(threshold)).collect(),
        };
        let budgets =
            (!parts.budgets.is_empty()).then(|| parts.budgets.iter().map(budget).collect::<Vec<_>>());
        let experts_per_layer = (!parts.experts.is_empty()).then(|| parts.experts.clone());
        let has_parts = experts_per_layer.is_some()
            || core.is_some()
            || parts.maps.is_some()
            || parts.router_rank.is_some()
            || parts.correction
            || budgets.is_some();
        json!(StoredMoe {
            format_version: if has_parts { FORMAT_WITH_PARTS } else { PLAIN_FORMAT },
            num_experts: router.num_experts,
            experts_per_layer,
            threshold: decimal(router.threshold),
            partition: self.partition,
            router_bias: self.router_bias,
            core,
            expert_map: parts.maps.as_deref().map(lists_of_maps),
            router_rank: parts.router_rank,
            correction: parts.correction,
            budgets,
            active_target: self.active_target,
            untrained: self.untrained,
            gate_value: router.gate_value,
            rescale: router.rescale,
            zero_active: router.zero_active,
            ste: router.ste,
        })
    }
}

/// Returns the shortest decimal of a number, not the many digits that its f64 has.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Sizes of the model that the object describes experts of.
#[derive(Clone, Copy)]
pub(super) struct MoeSizes {
    pub(super) num_layers: usize,
    pub(super) hidden: usize,
}

/// Reads the `dsmoe` object, where there is one.
pub(super) fn read(fields: &Fields<'_>, sizes: MoeSizes) -> Result<Option<MoeConfig>> {
    let Some(stored) = fields.get("dsmoe") else { return Ok(None) };
    let version = stored.get("format_version").and_then(Value::as_u64);
    if let Some(version) = version.filter(|version| !(PLAIN_FORMAT..=FORMAT_WITH_PARTS).contains(version)) {
        let problem = format!("is {version} and this program reads {PLAIN_FORMAT} and {FORMAT_WITH_PARTS}");
        return Err(fields.wrong("dsmoe.format_version", problem, "update it, or convert the model again"));
    }
    let stored = StoredMoe::deserialize(stored)
        .map_err(|cause| fields.wrong("dsmoe", shown(&cause.to_string()), "convert the model again"))?;
    let router = RouterConfig {
        num_experts: stored.num_experts,
        threshold: stored.threshold as f32,
        gate_value: stored.gate_value,
        rescale: stored.rescale,
        zero_active: stored.zero_active,
        ste: stored.ste,
    };
    router.validate().map_err(|cause| Error::Field {
        path: fields.path.to_path_buf(),
        field: "dsmoe:".to_owned(),
        problem: cause.to_string(),
        help: "convert the model again".into(),
    })?;
    if let Some(share) = stored.active_target.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
        let problem = format!("is {share}");
        return Err(fields.wrong("dsmoe.active_target", problem, "use a share above 0 and up to 1"));
    }
    let parts = parts(fields, &stored, sizes)?;
    Ok(Some(MoeConfig {
        router,
        partition: stored.partition,
        router_bias: stored.router_bias,
        active_target: stored.active_target,
        untrained: stored.untrained,
        parts,
    }))
}

/// Checks and returns what stands beside routed experts.
fn parts(fields: &Fields<'_>, stored: &StoredMoe, sizes: MoeSizes) -> Result<MoeParts> {
    let keys = [
        ("experts_per_layer", stored.experts_per_layer.is_some()),
        ("core", stored.core.is_some()),
        ("expert_map", stored.expert_map.is_some()),
        ("router_rank", stored.router_rank.is_some()),
        ("correction", stored.correction),
        ("budgets", stored.budgets.is_some()),
    ];
    let used = keys.iter().find(|(_, is_used)| *is_used);
    if let Some((key, _)) = used.filter(|_| stored.format_version < FORMAT_WITH_PARTS) {
        let problem = format!("needs format_version {FORMAT_WITH_PARTS} and has {}", stored.format_version);
        return Err(fields.wrong(&format!("dsmoe.{key}"), problem, "convert the model again"));
    }
    let (most, prefix) = (stored.num_experts, format!("{}dsmoe.", fields.prefix));
    let experts = stored.experts_per_layer.as_deref();
    let experts = experts_of_layers(fields.path, &prefix, experts, [most, sizes.num_layers])?;
    let core = core(fields, stored, &experts)?;
    if let Some(rank) = stored.router_rank.filter(|rank| !(1..=sizes.hidden).contains(rank)) {
        let help = format!("use an integer from 1 to hidden_size {}", sizes.hidden);
        return Err(fields.wrong("dsmoe.router_rank", format!("is {rank}"), help));
    }
    if stored.correction && stored.router_rank.is_none() {
        let problem = "is true and maps the values of a router of low rank, which this model does not have";
        return Err(fields.wrong("dsmoe.correction", problem, "add router_rank, or set it to false"));
    }
    let budgets = budgets(fields, stored, sizes.num_layers)?;
    let routed: Vec<usize> = (0..experts.len()).map(|i| experts[i] - core.get(i).unwrap_or(&0)).collect();
    let maps = stored.expert_map.clone().map(|maps| maps_of_layers(fields.path, &prefix, maps, &routed));
    let maps = maps.transpose()?;
    // Equal numbers are those of the router.
    let experts = if experts.iter().all(|&experts| experts == most) { Vec::new() } else { experts };
    let StoredMoe { router_rank, correction, .. } = *stored;
    Ok(MoeParts { experts, core, maps, router_rank, correction, budgets })
}

/// Checks and returns the core of every layer of so many `experts`.
fn core(fields: &Fields<'_>, stored: &StoredMoe, experts: &[usize]) -> Result<Vec<usize>> {
    let num_layers = experts.len();
    let core = match &stored.core {
        None => return Ok(Vec::new()),
        Some(StoredCore::Every(core)) => vec![*core; num_layers],
        Some(StoredCore::Each(core)) => core.clone(),
    };
    if core.len() != num_layers {
        let problem = format!("has {} entries and num_hidden_layers is {num_layers}", core.len());
        return Err(fields.wrong("dsmoe.core", problem, "give one number, or one for each layer"));
    }
    match core.iter().zip(experts).position(|(core, experts)| core >= experts) {
        Some(layer) => {
            let problem = format!("is {} in layer {layer} of {} experts", core[layer], experts[layer]);
            let help = "leave at least one expert to the router";
            Err(fields.wrong("dsmoe.core", problem, help))
        }
        None => Ok(core),
    }
}

fn budgets(fields: &Fields<'_>, stored: &StoredMoe, num_layers: usize) -> Result<Vec<Budget>> {
    let Some(budgets) = &stored.budgets else { return Ok(Vec::new()) };
    if !(1..=MOST_BUDGETS).contains(&budgets.len()) {
        let problem = format!("has {} entries", budgets.len());
        return Err(fields.wrong("dsmoe.budgets", problem, format!("give 1 to {MOST_BUDGETS}")));
    }
    let mut checked = Vec::with_capacity(budgets.len());
    let mut before = 0.0;
    for (i, StoredBudget { active, thresholds }) in budgets.iter().enumerate() {
        let field = |key: &str| format!("dsmoe.budgets[{i}].{key}");
        if !(*active > before && *active <= 1.0) {
            let help = "list shares above 0 and up to 1 in ascending order";
            return Err(fields.wrong(&field("active"), format!("is {active}"), help));
        }
        before = *active;
        if thresholds.len() != num_layers {
            let problem = format!("has {} entries and num_hidden_layers is {num_layers}", thresholds.len());
            return Err(fields.wrong(&field("thresholds"), problem, "give one for each layer"));
        }
        let thresholds: Vec<f32> = thresholds.iter().map(|&threshold| threshold as f32).collect();
        if let Some(layer) = thresholds.iter().position(|threshold| !threshold.is_finite()) {
            let problem = format!("is {} for layer {layer}, which f32 cannot hold", thresholds[layer]);
            return Err(fields.wrong(&field("thresholds"), problem, "use finite logits"));
        }
        checked.push(Budget { active: *active, thresholds });
    }
    let (least, most) = (checked[0].active, before);
    match stored.active_target {
        Some(target) if (least..=most).contains(&target) => Ok(checked),
        Some(target) => {
            let problem = format!("is {target} and the budgets are {least} to {most}");
            Err(fields.wrong("dsmoe.active_target", problem, "use a share among the budgets"))
        }
        None => {
            let help = "add the share of one of the budgets";
            Err(fields.wrong("dsmoe.active_target", "is missing beside budgets", help))
        }
    }
}
