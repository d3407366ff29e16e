//! The keys of config.json that describe the experts of a family of mixtures.

use dsmoe_router::mixture::MixtureConfig;
use serde_json::{Map, Value, json};

use crate::checkpoint::Renames;
use crate::config::experts::MixtureSpec;
use crate::config::fields::Fields;
use crate::error::Result;

const TOP_K: &str = "num_experts_per_tok";
const SHARED_WIDTH: &str = "shared_expert_intermediate_size";
const BALANCE: &str = "router_aux_loss_coef";

/// The keys of the experts of a family, and the names of their tensors.
#[derive(Debug)]
pub(crate) struct Mixture {
    /// Keys of the number of experts. Where there are several they have one value.
    pub(crate) count: &'static [&'static str],
    /// Key of the width of an expert.
    pub(crate) width: &'static str,
    /// Key that says whether coefficients are renormalised, which is false without it; none where they always are.
    pub(crate) renormalise: Option<&'static str>,
    /// True if every layer has a shared expert.
    pub(crate) shared: bool,
    /// Weight of the balance loss where config.json has none.
    pub(crate) balance_weight: f64,
    /// Names of tensors in files.
    pub(crate) renames: Renames,
}

impl Mixture {
    /// Reads the experts of a model of `num_layers` layers.
    pub(crate) fn read(&self, fields: &Fields<'_>, num_layers: usize) -> Result<MixtureSpec> {
        refuse_dense_layers(fields)?;
        let num_experts = self.num_experts(fields)?;
        let top_k = fields.dimension(TOP_K)?;
        let renormalise = match self.renormalise {
            None => true,
            Some(key) => fields.flag(key)?.unwrap_or(false),
        };
        MixtureConfig::new(num_experts, top_k, renormalise).map_err(|_| {
            let problem = format!("is {top_k} and there are {num_experts} experts");
            fields.wrong(TOP_K, problem, format!("use an integer from 1 to {num_experts}"))
        })?;
        let shared = if self.shared { Some(fields.dimension(SHARED_WIDTH)?) } else { None };
        let width = fields.dimension(self.width)?;
        let balance_weight = fields.not_negative(BALANCE)?.unwrap_or(self.balance_weight);
        fields.bounded(self.width, width, num_experts)?;
        let experts = vec![num_experts; num_layers];
        Ok(MixtureSpec { top_k, renormalise, width, shared, balance_weight, experts, maps: None })
    }

    fn num_experts(&self, fields: &Fields<'_>) -> Result<usize> {
        let mut found: Option<(&str, usize)> = None;
        for &key in self.count {
            match (fields.dimension_opt(key)?, found) {
                (Some(count), None) => found = Some((key, count)),
                (Some(count), Some((other, before))) if count != before => {
                    let problem = format!("is {count} and {other} is {before}");
                    return Err(fields.wrong(key, problem, "correct one of them"));
                }
                _ => {}
            }
        }
        let (_, count) = found.ok_or_else(|| fields.wrong(self.count[0], "is missing", "add it"))?;
        Ok(count)
    }

    /// Writes the experts of a model, which the family's format holds, into its config.json.
    pub(crate) fn write(&self, raw: &mut Map<String, Value>, spec: &MixtureSpec) {
        let is_there = |key: &&&str| raw.contains_key(**key);
        let present: Vec<&str> = self.count.iter().filter(is_there).copied().collect();
        for key in if present.is_empty() { self.count } else { &present } {
            raw.insert((*key).to_owned(), json!(spec.most_experts()));
        }
        raw.insert(TOP_K.to_owned(), json!(spec.top_k));
        raw.insert(self.width.to_owned(), json!(spec.width));
        if let Some(width) = spec.shared {
            raw.insert(SHARED_WIDTH.to_owned(), json!(width));
        }
        if let Some(key) = self.renormalise {
            raw.insert(key.to_owned(), json!(spec.renormalise));
        }
        raw.insert(BALANCE.to_owned(), json!(spec.balance_weight));
    }

    /// Takes the experts out of a config.json that describes them in another object.
    pub(crate) fn remove(&self, raw: &mut Map<String, Value>) {
        let keys =
            self.count.iter().chain(&self.renormalise).chain([&TOP_K, &self.width, &SHARED_WIDTH, &BALANCE]);
        for key in keys {
            raw.shift_remove(*key);
        }
    }
}

/// Refuses models of which some layers have no experts.
fn refuse_dense_layers(fields: &Fields<'_>) -> Result<()> {
    const STEP: &str = "decoder_sparse_step";
    const DENSE: &str = "mlp_only_layers";
    let help = "use a model with experts in all layers";
    if let Some(step) = fields.dimension_opt(STEP)?.filter(|&step| step != 1) {
        return Err(fields.wrong(STEP, format!("is {step}: layers without experts are not supported"), help));
    }
    match fields.get(DENSE) {
        Some(Value::Array(layers)) if layers.is_empty() => Ok(()),
        None => Ok(()),
        Some(layers) => {
            let problem = format!("is {}: layers without experts are not supported", brief(layers));
            Err(fields.wrong(DENSE, problem, help))
        }
    }
}

fn brief(value: &Value) -> String {
    value.to_string().chars().take(40).collect()
}
