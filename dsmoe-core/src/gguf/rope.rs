//! RoPE in GGUF's metadata and tensors.

use std::f64::consts::PI;
use std::io::{Read, Seek, SeekFrom};

use serde_json::{Map, Value as Json, json};

use super::config::Keys;
use super::types::TensorType;
use super::value::shortest;
use crate::config::rope::longrope_factor;
use crate::error::{Error, Result, shown};
use crate::files::open_regular;

/// Divisors of the frequencies, of Llama 3's scaling.
pub(crate) const DIVISORS: &str = "rope_freqs.weight";
/// Divisors below and above the original number of positions, of longrope.
pub(crate) const SHORT: &str = "rope_factors_short.weight";
pub(crate) const LONG: &str = "rope_factors_long.weight";

/// Settings that the divisors were made from, in files of this program: factor, low and high frequency factor.
pub(crate) const LLAMA3_KEYS: [&str; 3] = [
    "rope.scaling.llama3_factor",
    "rope.scaling.llama3_low_freq_factor",
    "rope.scaling.llama3_high_freq_factor",
];

/// The tensors that config.json holds in another form.
pub(crate) const TENSORS: [&str; 3] = [DIVISORS, SHORT, LONG];

const OTHER: &str = "use the original model, or its safetensors";
/// How far a divisor may be from the one that config.json gives.
const TOLERANCE: f64 = 1e-4;
/// Settings of Llama 3's scaling that published models have, and those nearby: positions and factors.
const POSITIONS: [f64; 5] = [8192.0, 4096.0, 16384.0, 2048.0, 32768.0];
const FACTORS: [(f64, f64); 4] = [(1.0, 4.0), (1.0, 8.0), (1.0, 2.0), (2.0, 4.0)];

/// Returns the keys of config.json about RoPE.
pub(crate) fn from_keys(keys: &Keys<'_>) -> Result<Map<String, Json>> {
    let mut map = Map::new();
    let gemma3 = keys.arch.model_type == "gemma3_text";
    let theta = keys.number("rope.freq_base")?.unwrap_or(if gemma3 { 1e6 } else { 1e4 });
    map.insert("rope_theta".into(), json!(theta));
    let (_, _, head_dim) = keys.heads()?;
    if let Some(width) = keys.count("rope.dimension_count")?.filter(|&width| width != head_dim) {
        if keys.arch.model_type != "phi3" || width > head_dim {
            let help = "use a model whose RoPE turns whole heads";
            return Err(keys.wrong("rope.dimension_count", format!("is {width} and not {head_dim}"), help));
        }
        map.insert("partial_rotary_factor".into(), json!(width as f64 / head_dim as f64));
    }
    let original = keys.count("rope.scaling.original_context_length")?;
    let scaling = match longrope(keys, original)? {
        Some(scaling) => {
            if let Some(original) = original {
                map.insert("original_max_position_embeddings".into(), json!(original));
            }
            scaling
        }
        None => scaling(keys, original, theta, head_dim)?,
    };
    map.insert("rope_scaling".into(), scaling);
    if keys.arch.model_type == "olmo3" {
        // llama.cpp turns layers with a window by the same base, without scaling.
        let plain = json!({ "rope_type": "default", "rope_theta": theta });
        map.insert("rope_parameters".into(), json!({ "sliding_attention": plain }));
    }
    Ok(map)
}

fn scaling(keys: &Keys<'_>, original: Option<u64>, theta: f64, head_dim: u64) -> Result<Json> {
    let factor = keys.number("rope.scaling.factor")?.or(keys.number("rope.scale_linear")?);
    let need_factor = || factor.ok_or_else(|| keys.wrong("rope.scaling.factor", "is missing", OTHER));
    let scaling = match keys.text("rope.scaling.type")? {
        None if keys.get("rope.scale_linear").is_some() => {
            json!({ "rope_type": "linear", "factor": need_factor()? })
        }
        Some("linear") => json!({ "rope_type": "linear", "factor": need_factor()? }),
        Some("yarn") => yarn(keys, need_factor()?, original)?,
        None | Some("none") => Json::Null,
        Some(other) => {
            let problem = format!("is {:?} and not supported", shown(other));
            return Err(keys.wrong("rope.scaling.type", problem, OTHER));
        }
    };
    let Some(divisors) = floats(keys, DIVISORS)? else { return Ok(scaling) };
    if divisors.iter().all(|&divisor| divisor == 1.0) {
        return Ok(scaling);
    }
    if !scaling.is_null() {
        return Err(Error::tensor(keys.path, DIVISORS, "is present beside rope.scaling.type", OTHER));
    }
    let [factor, low, high] = LLAMA3_KEYS.map(|key| keys.number(key));
    let stated = original.zip(factor?).zip(low?.zip(high?));
    let stated = stated.map(|((original, factor), (low, high))| [factor, low, high, original as f64]);
    let turns = Turns { theta, head_dim };
    llama3(&divisors, turns, stated, original.map(|n| n as f64)).ok_or_else(|| {
        let problem = "is not a scaling that config.json can state";
        Error::tensor(keys.path, DIVISORS, problem, OTHER)
    })
}

/// llama.cpp multiplies YaRN's own factor of cos and sin, 1 + 0.1 ln(factor), by the one of the file.
fn yarn(keys: &Keys<'_>, factor: f64, original: Option<u64>) -> Result<Json> {
    let mut map = Map::new();
    map.insert("rope_type".into(), json!("yarn"));
    map.insert("factor".into(), json!(factor));
    if let Some(original) = original {
        map.insert("original_max_position_embeddings".into(), json!(original));
    }
    if let Some(extra) = keys.number("rope.scaling.attn_factor")?.filter(|extra| *extra != 1.0) {
        map.insert("attention_factor".into(), json!(extra * (1.0 + 0.1 * factor.ln())));
    }
    for (key, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
        if let Some(value) = keys.number(&format!("rope.scaling.{key}"))? {
            map.insert(name.into(), json!(value));
        }
    }
    if keys.number("rope.scaling.yarn_log_multiplier")?.is_some_and(|x| x != 0.0) {
        let problem = "is present and not supported";
        return Err(keys.wrong("rope.scaling.yarn_log_multiplier", problem, OTHER));
    }
    Ok(Json::Object(map))
}

fn longrope(keys: &Keys<'_>, original: Option<u64>) -> Result<Option<Json>> {
    let (Some(short), Some(long)) = (floats(keys, SHORT)?, floats(keys, LONG)?) else { return Ok(None) };
    let list = |values: &[f32]| values.iter().copied().map(shortest).collect::<Vec<f64>>();
    let mut map = Map::new();
    map.insert("rope_type".into(), json!("longrope"));
    map.insert("short_factor".into(), json!(list(&short)));
    map.insert("long_factor".into(), json!(list(&long)));
    if let Some(factor) = keys.number("rope.scaling.attn_factor")? {
        // Where config.json would have the same factor by itself, it keeps all digits of it.
        let positions = keys.count("context_length")?;
        let derived = positions.zip(original).filter(|&(_, original)| original > 1).map(|(all, original)| {
            longrope_factor(all as f64 / original as f64, usize::try_from(original).unwrap_or(usize::MAX))
        });
        if derived.is_none_or(|derived| derived as f32 != factor as f32) {
            map.insert("attention_factor".into(), json!(factor));
        }
    }
    Ok(Some(Json::Object(map)))
}

/// Returns Llama 3's divisor of the frequency `frequency`.
fn llama3_divisor(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength < original / high {
        1.0
    } else if wavelength > original / low {
        factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

/// Unscaled frequencies: base and width of a head.
#[derive(Clone, Copy)]
struct Turns {
    theta: f64,
    head_dim: u64,
}

/// Finds the settings of Llama 3's scaling that give `divisors`: those `stated` (factor, low, high, original positions), or
/// those of a published model, with the `original` positions if they are known.
fn llama3(divisors: &[f32], turns: Turns, stated: Option<[f64; 4]>, original: Option<f64>) -> Option<Json> {
    let largest = shortest(divisors.iter().fold(1.0f32, |most, &divisor| most.max(divisor)));
    let gives = |&[factor, low, high, original]: &[f64; 4]| {
        divisors.iter().enumerate().all(|(i, &divisor)| {
            let frequency = turns.theta.powf(-2.0 * i as f64 / turns.head_dim as f64);
            let expected = llama3_divisor(frequency, factor, low, high, original);
            (f64::from(divisor) / expected - 1.0).abs() < TOLERANCE
        })
    };
    if divisors.len() as u64 != turns.head_dim / 2 {
        return None;
    }
    let originals = original.into_iter().chain(POSITIONS);
    let published = originals.flat_map(|original| FACTORS.map(|(low, high)| [largest, low, high, original]));
    let [factor, low, high, original] = stated.into_iter().chain(published).find(gives)?;
    Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    }))
}

/// Reads a small f32 tensor.
fn floats(keys: &Keys<'_>, name: &str) -> Result<Option<Vec<f32>>> {
    const MOST: u64 = 1 << 16;
    let Some(place) = keys.container.tensor(name) else { return Ok(None) };
    let fail = |problem: String| Err(Error::tensor(keys.path, name, problem, OTHER));
    if place.kind != TensorType::F32 || place.numel() > MOST {
        return fail(format!("is {} {:?} and not a short list of F32", place.kind, place.shape));
    }
    let mut bytes = vec![0; place.numel() as usize * 4];
    let path = &keys.container.files[place.file];
    let mut file = open_regular(path)?;
    file.seek(SeekFrom::Start(place.offset))
        .and_then(|_| file.read_exact(&mut bytes))
        .map_err(Error::io(path))?;
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    if !values.iter().all(|value| value.is_finite() && *value > 0.0) {
        return fail("holds a value that is not a positive number".into());
    }
    Ok(Some(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_of_llama_3_come_back_from_the_divisors() {
        for (factor, low, high, original) in
            [(8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0), (4.0, 1.0, 4.0, 2048.0)]
        {
            let divisor = |i: usize| {
                llama3_divisor(5e5f64.powf(-2.0 * i as f64 / 64.0), factor, low, high, original) as f32
            };
            let divisors: Vec<f32> = (0..32).map(divisor).collect();
            let turns = Turns { theta: 5e5, head_dim: 64 };
            let found = llama3(&divisors, turns, None, None).unwrap();
            assert_eq!(found["factor"], json!(factor));
            assert_eq!(found["original_max_position_embeddings"], json!(original as u64));
            let mut other = divisors;
            other[20] *= 1.01;
            assert_eq!(llama3(&other, turns, None, None), None);
            assert_eq!(llama3(&other, turns, Some([factor, low, high, original]), None), None, "checked");
        }
    }
}
