//! The rotation in config.json: the spellings of transformers 4 (`rope_theta` and `rope_scaling`) and of transformers 5
//! (`rope_parameters`), read and written.
//!
//! `rope_scaling` holds as a whole where it is there and not empty, otherwise `rope_parameters`. The base is the one
//! inside that object, else `rope_theta` beside it, else the family's.

use serde_json::{Map, Value, json};

use super::fields::{Fields, is_factor};
use super::rope::{Rope, RopeScaling, longrope_factor, yarn_factor};
use crate::error::{Result, shown};

/// Kinds of layers that have a rotation of their own, as config.json names them.
pub(crate) const FULL: &str = "full_attention";
pub(crate) const SLIDING: &str = "sliding_attention";

const V4: &str = "rope_scaling";
const V5: &str = "rope_parameters";

/// Keys of a rope object that are read.
const KNOWN: [&str; 18] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    // Written by transformers 4 beside the keys above; they say nothing new.
    "finetuned",
    "max_position_embeddings",
];

/// A family's defaults of its rotation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeRules {
    /// Base where config.json has none.
    pub(crate) theta: f64,
    /// True if `partial_rotary_factor` holds without scaling, too.
    pub(crate) partial: bool,
    /// Types that are other names of longrope.
    pub(crate) longrope_names: &'static [&'static str],
    /// Positions before scaling, where the key at the top comes first and this is its default.
    pub(crate) original_at_top: Option<usize>,
    /// True if a text that grows past the original positions of longrope is run again.
    pub(crate) longrope_restarts: bool,
    /// True if transformers 4 takes only the types linear and dynamic, as an object of `type` and a `factor` with a point.
    pub(crate) type_and_factor: bool,
    /// The family has a second rotation, for layers with a window: base in config.json, and default.
    pub(crate) sliding: Option<SlidingRope>,
}

/// The rotation of layers with a window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlidingRope {
    /// Key of its base in transformers 4; none where it has none.
    pub(crate) theta_key: Option<&'static str>,
    /// Base where config.json has none.
    pub(crate) theta: f64,
}

impl RopeRules {
    /// LLaMA's.
    pub(crate) const LLAMA: RopeRules = RopeRules {
        theta: 10_000.0,
        partial: false,
        longrope_names: &[],
        original_at_top: None,
        longrope_restarts: false,
        type_and_factor: false,
        sliding: None,
    };
}

/// Sizes that a rotation depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeSizes {
    pub(crate) head_dim: usize,
    pub(crate) max_position: usize,
}

/// Reads the rotations: one, or that of full layers and that of layers with a window.
pub(crate) fn read(top: &Fields<'_>, rules: &RopeRules, sizes: RopeSizes) -> Result<Vec<Rope>> {
    let reader = Reader { top, rules, sizes };
    match rules.sliding {
        None => Ok(vec![reader.one()?]),
        Some(sliding) => Ok(reader.two(sliding)?.into()),
    }
}

struct Reader<'a> {
    top: &'a Fields<'a>,
    rules: &'a RopeRules,
    sizes: RopeSizes,
}

/// Returns the object of that key, unless it is absent, null or empty.
fn object<'a>(top: &Fields<'a>, key: &'static str) -> Result<Option<&'a Map<String, Value>>> {
    Ok(top.object(key)?.filter(|map| !map.is_empty()))
}

/// Returns the object that holds, with its name.
fn chosen<'a>(top: &Fields<'a>) -> Result<Option<(&'static str, &'a Map<String, Value>)>> {
    let v4 = object(top, V4)?.map(|map| (V4, map));
    Ok(v4.or(object(top, V5)?.map(|map| (V5, map))))
}

fn prefix(key: &str) -> &'static str {
    if key == V4 { "rope_scaling." } else { "rope_parameters." }
}

impl Reader<'_> {
    fn one(&self) -> Result<Rope> {
        let Some((key, map)) = chosen(self.top)? else { return self.rope(None, self.theta_at_top()?, None) };
        let fields = Fields { prefix: prefix(key), map, ..*self.top };
        if let Some((key, _)) = map.iter().find(|(_, value)| value.is_object()) {
            let help = "use a model with one rotation for all layers";
            return Err(fields.wrong(&shown(key), "is an object, and this family has one rotation", help));
        }
        self.rope(Some(fields), self.theta_at_top()?, None)
    }

    fn two(&self, sliding: SlidingRope) -> Result<[Rope; 2]> {
        let by_kind = object(self.top, V5)?;
        let outer = by_kind.map(|map| Fields { prefix: prefix(V5), map, ..*self.top });
        if let Some(outer) = outer
            && outer.get(FULL).is_none()
            && outer.get(SLIDING).is_none()
        {
            let help = "give an object for full_attention and one for sliding_attention";
            return Err(self.top.wrong(V5, "has one rotation, and this family has two", help));
        }
        let of_kind = |kind: &str| outer.map(|outer| outer.object(kind)).transpose().map(Option::flatten);
        let truncate = outer.map(|outer| outer.flag("truncate")).transpose()?.flatten().unwrap_or(true);
        // `rope_scaling` holds for full layers; its keys win over those of `rope_parameters`.
        let mut full = of_kind(FULL)?.cloned().unwrap_or_default();
        let scaling = object(self.top, V4)?;
        full.extend(scaling.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        let place = if scaling.is_some() { "rope_scaling." } else { "rope_parameters.full_attention." };
        let full = Fields { prefix: place, map: &full, ..*self.top };
        let local = of_kind(SLIDING)?;
        let local =
            local.map(|map| Fields { prefix: "rope_parameters.sliding_attention.", map, ..*self.top });
        let at_top = sliding.theta_key.map(|key| self.top.positive(key)).transpose()?.flatten();
        Ok([
            self.rope(Some(full), self.theta_at_top()?, Some(truncate))?,
            self.rope(local, at_top.unwrap_or(sliding.theta), Some(truncate))?,
        ])
    }

    fn theta_at_top(&self) -> Result<f64> {
        Ok(self.top.positive("rope_theta")?.unwrap_or(self.rules.theta))
    }

    /// Reads one rope object; `theta` holds where it has no base, and `truncate` where that is not its own key.
    fn rope(&self, inner: Option<Fields<'_>>, theta: f64, truncate: Option<bool>) -> Result<Rope> {
        let Some(inner) = inner else {
            let width = self.width(self.top, None, "none")?;
            return Ok(Rope { theta, width, scaling: RopeScaling::None });
        };
        let theta = inner.positive("rope_theta")?.unwrap_or(theta);
        let key = if inner.get("rope_type").is_some() { "rope_type" } else { "type" };
        let kind = inner.text(key)?.unwrap_or("default");
        let kind = if self.rules.longrope_names.contains(&kind) { "longrope" } else { kind };
        let width = self.width(self.top, Some(&inner), kind)?;
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need(&inner, "factor")? },
            "dynamic" => {
                RopeScaling::Dynamic { factor: at_least_1(&inner)?, max_position: self.sizes.max_position }
            }
            "llama3" => self.llama3(&inner)?,
            "yarn" => self.yarn(&inner, theta, truncate)?,
            "longrope" => self.longrope(&inner, width)?,
            other => {
                let problem = format!("is {:?} and not supported", shown(other));
                let help = "use a model whose type is default, linear, dynamic, llama3, yarn or longrope";
                return Err(inner.wrong(key, problem, help));
            }
        };
        Ok(Rope { theta, width, scaling })
    }

    /// Returns how many values of a head are rotated.
    fn width(&self, top: &Fields<'_>, inner: Option<&Fields<'_>>, kind: &str) -> Result<usize> {
        const KEY: &str = "partial_rotary_factor";
        let inside = inner.map(|inner| inner.positive(KEY)).transpose()?.flatten();
        let (fields, share) = match inside {
            Some(share) => (inner.unwrap_or(top), share),
            None => (top, top.positive(KEY)?.unwrap_or(1.0)),
        };
        let plain = kind == "none" || kind == "default";
        if share != 1.0 && plain && !self.rules.partial {
            let problem = format!("is {share}, and this family rotates whole heads");
            return Err(fields.wrong(KEY, problem, "remove it"));
        }
        let width = (self.sizes.head_dim as f64 * share) as usize;
        if share > 1.0 || width == 0 || !width.is_multiple_of(2) {
            let problem = format!("is {share}, which rotates {width} of {} values", self.sizes.head_dim);
            return Err(fields.wrong(KEY, problem, "use a share of at most 1 that gives an even number"));
        }
        Ok(width)
    }

    /// Returns the positions before scaling, where they are given.
    fn original(&self, inner: &Fields<'_>) -> Result<Option<usize>> {
        const KEY: &str = "original_max_position_embeddings";
        if let Some(default) = self.rules.original_at_top {
            return self.top.dimension_or(KEY, default).map(Some);
        }
        let inside = inner.dimension_opt(KEY)?;
        Ok(if inside.is_some() { inside } else { self.top.dimension_opt(KEY)? })
    }

    /// Returns the factor of yarn and longrope, which is the growth of the positions where it is not given.
    fn factor(&self, inner: &Fields<'_>, original: Option<usize>) -> Result<f64> {
        match (inner.positive("factor")?, original) {
            (Some(factor), _) => Ok(factor),
            (None, Some(original)) => Ok(self.sizes.max_position as f64 / original as f64),
            (None, None) => Err(inner.wrong("factor", "is missing", "add it")),
        }
    }

    fn llama3(&self, inner: &Fields<'_>) -> Result<RopeScaling> {
        let (low, high) = (need(inner, "low_freq_factor")?, need(inner, "high_freq_factor")?);
        if low >= high {
            let problem = format!("is {low} and not below high_freq_factor {high}");
            return Err(inner.wrong("low_freq_factor", problem, "correct one of them"));
        }
        let original_max_position = self.original(inner)?.unwrap_or(self.sizes.max_position);
        Ok(RopeScaling::Llama3 {
            factor: need(inner, "factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position,
        })
    }

    fn yarn(&self, inner: &Fields<'_>, theta: f64, truncate: Option<bool>) -> Result<RopeScaling> {
        if theta == 1.0 {
            return Err(inner.wrong("rope_theta", "is 1, and yarn divides by its logarithm", "correct it"));
        }
        let original = self.original(inner)?;
        let factor = self.factor(inner, original)?;
        let [mscale, all] = [inner.not_negative("mscale")?, inner.not_negative("mscale_all_dim")?];
        let weights = mscale.filter(|&m| m != 0.0).zip(all.filter(|&m| m != 0.0));
        let by_weights = || match weights {
            Some((mscale, all)) => yarn_factor(factor, mscale) / yarn_factor(factor, all),
            None => yarn_factor(factor, 1.0),
        };
        let attention_factor = inner.factor("attention_factor")?.unwrap_or_else(by_weights);
        if !is_factor(attention_factor) {
            let problem = format!("makes a factor of cosines and sines of {attention_factor}");
            return Err(inner.wrong("mscale", problem, "correct mscale, mscale_all_dim and factor"));
        }
        let own_truncate = inner.flag("truncate")?.unwrap_or(true);
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position: original.unwrap_or(self.sizes.max_position),
            beta_fast: inner.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: inner.positive("beta_slow")?.unwrap_or(1.0),
            truncate: truncate.unwrap_or(own_truncate),
            attention_factor,
        })
    }

    fn longrope(&self, inner: &Fields<'_>, width: usize) -> Result<RopeScaling> {
        let list = |key: &str| {
            let list = inner.positives(key)?.ok_or_else(|| inner.wrong(key, "is missing", "add it"))?;
            if list.len() != width / 2 {
                let problem = format!("has {} numbers for {} pairs of values", list.len(), width / 2);
                return Err(inner.wrong(key, problem, "give one for each"));
            }
            Ok(list)
        };
        let original = self.original(inner)?;
        let factor = self.factor(inner, original)?;
        let original_max_position = original.unwrap_or(self.sizes.max_position);
        let given = inner.factor("attention_factor")?;
        if given.is_none() && factor > 1.0 && original_max_position < 2 {
            let problem = format!("is {original_max_position}, whose logarithm is 0");
            return Err(inner.wrong("original_max_position_embeddings", problem, "correct it"));
        }
        Ok(RopeScaling::LongRope {
            short: list("short_factor")?,
            long: list("long_factor")?,
            original_max_position,
            attention_factor: given.unwrap_or_else(|| longrope_factor(factor, original_max_position)),
            restart: self.rules.longrope_restarts,
        })
    }
}

fn need(fields: &Fields<'_>, key: &str) -> Result<f64> {
    fields.positive(key)?.ok_or_else(|| fields.wrong(key, "is missing", "add it"))
}

fn at_least_1(fields: &Fields<'_>) -> Result<f64> {
    let factor = need(fields, "factor")?;
    if factor < 1.0 {
        return Err(fields.wrong("factor", format!("is {factor}"), "use a number of at least 1"));
    }
    Ok(factor)
}

/// Returns what in the rope keys may not be what their author meant.
pub(crate) fn notices(top: &Fields<'_>, rules: &RopeRules, ropes: &[Rope]) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(Some((key, map))) = chosen(top) else { return found };
    let by_kind = |map: &Map<String, Value>| map.values().any(Value::is_object);
    let objects = std::iter::once(map).chain(map.values().filter_map(Value::as_object));
    for (name, value) in objects.flatten() {
        if !value.is_object() && !KNOWN.contains(&name.as_str()) {
            found.push(format!("{key}: {} is not known and has no effect", shown(name)));
        }
    }
    // It puts a type of its own beside that of the file, under the other name.
    if rules.sliding.is_some() && key == V4 && map.contains_key("type") && !map.contains_key("rope_type") {
        found.push(format!(
            "{V4}: the key `type` is used here; transformers 5 reads only `rope_type` in this family and would ignore it"
        ));
    }
    if !by_kind(map)
        && let Some(other) = map.get("rope_theta").and_then(|_| top.get("rope_theta"))
    {
        let theta = ropes.first().map(|rope| rope.theta);
        if other.as_f64() != theta {
            let theta = theta.unwrap_or_default();
            found.push(format!("rope_theta {other} has no effect: {key} says {theta}"));
        }
    }
    if key == V4
        && let Ok(Some(other)) = object(top, V5)
        && !by_kind(other)
        && map.iter().any(|(name, value)| name != "type" && other.get(name).is_some_and(|it| it != value))
    {
        found.push(format!("{V5} differs from {V4}, which holds"));
    }
    found
}

/// Writes both spellings into `raw`, in agreement with what [`read`] found in it.
pub(crate) fn write_both(raw: &mut Map<String, Value>, rules: &RopeRules, ropes: &[Rope]) {
    let object = |raw: &Map<String, Value>, key: &str| {
        raw.get(key).and_then(Value::as_object).filter(|map| !map.is_empty()).cloned()
    };
    let (v4, v5) = (object(raw, V4), object(raw, V5));
    let (Some(first), local) = (ropes.first(), ropes.get(1)) else { return };
    let mut inner = match (rules.sliding, v4) {
        (None, v4) => v4.or_else(|| v5.clone()).unwrap_or_default(),
        (Some(_), v4) => {
            let full = v5.as_ref().and_then(|map| map.get(FULL)).and_then(Value::as_object);
            let mut full = full.cloned().unwrap_or_default();
            full.extend(v4.into_iter().flatten());
            full
        }
    };
    state(&mut inner, first);
    raw.insert("rope_theta".to_owned(), json!(first.theta));
    const ORIGINAL: &str = "original_max_position_embeddings";
    if let RopeScaling::LongRope { original_max_position, attention_factor, .. } = &first.scaling {
        inner.shift_remove(ORIGINAL);
        inner.insert(ORIGINAL.to_owned(), json!(original_max_position));
        raw.insert(ORIGINAL.to_owned(), json!(original_max_position));
        // Beside that key transformers 4 takes the growth of the positions for the factor, whatever that is; the factor
        // matters to this one alone.
        if rules.original_at_top.is_none() && inner.get("factor").is_some_and(|factor| !factor.is_null()) {
            inner.insert("attention_factor".to_owned(), json!(attention_factor));
        }
    }
    if rules.type_and_factor
        && let RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } = &first.scaling
    {
        inner.insert("factor".to_owned(), json!(factor));
    }
    const PARTIAL: &str = "partial_rotary_factor";
    // Beside the objects it would hold for layers with a window too.
    if rules.sliding.is_none()
        && let Some(share) = inner.shift_remove(PARTIAL).or_else(|| raw.get(PARTIAL).cloned())
    {
        inner.insert(PARTIAL.to_owned(), share.clone());
        raw.insert(PARTIAL.to_owned(), share);
    }
    let is_plain = matches!(first.scaling, RopeScaling::None);
    let scaling = if is_plain { Value::Null } else { json!(v4_object(&inner, rules)) };
    raw.insert(V4.to_owned(), scaling);
    let new = match (rules.sliding, local) {
        (Some(sliding), Some(local)) => {
            let mut outer = v5.unwrap_or_default();
            let mut of_local = outer.get(SLIDING).and_then(Value::as_object).cloned().unwrap_or_default();
            state(&mut of_local, local);
            if let Some(key) = sliding.theta_key {
                raw.insert(key.to_owned(), json!(local.theta));
            }
            outer.insert(FULL.to_owned(), json!(inner));
            outer.insert(SLIDING.to_owned(), json!(of_local));
            outer
        }
        _ => inner,
    };
    raw.insert(V5.to_owned(), json!(new));
}

/// Returns a rope object as transformers 4 reads it: without the base, and of Phi-3 the keys that it accepts.
fn v4_object(inner: &Map<String, Value>, rules: &RopeRules) -> Map<String, Value> {
    let mut object = inner.clone();
    object.shift_remove("rope_theta");
    if rules.original_at_top.is_some()
        && let Some(kind) = object.shift_remove("rope_type")
    {
        object.shift_remove("original_max_position_embeddings");
        object.shift_remove("partial_rotary_factor");
        object.insert("type".to_owned(), kind);
    }
    if rules.type_and_factor
        && let (Some(kind @ ("linear" | "dynamic")), Some(factor)) =
            (inner.get("rope_type").and_then(Value::as_str), inner.get("factor"))
    {
        object = Map::new();
        object.insert("type".to_owned(), json!(kind));
        object.insert("factor".to_owned(), factor.clone());
    }
    object
}

/// States type and base of `rope` in its object.
fn state(object: &mut Map<String, Value>, rope: &Rope) {
    let kind = match rope.scaling {
        RopeScaling::None => "default",
        _ => rope.scaling.name(),
    };
    object.shift_remove("type");
    object.shift_remove("rope_theta");
    object.insert("rope_type".to_owned(), json!(kind));
    object.insert("rope_theta".to_owned(), json!(rope.theta));
}
