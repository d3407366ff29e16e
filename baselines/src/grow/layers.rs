//! Where the layers of a deeper model come from.

use super::options::{Fill, GrowMethod, GrowOptions, NewLayer};
use crate::error::{Error, Result};

/// Returns the layers of the model that the options ask for, of a source of `old` layers.
pub(super) fn choose(old: usize, options: &GrowOptions) -> Result<Vec<NewLayer>> {
    let Some(more) = options.layers.checked_sub(old) else {
        let problem = format!("is {}, and the model has {old}", options.layers);
        return Err(Error::setting("layers", problem, format!("use {old} to copy it, or more")));
    };
    if more == 0 {
        if let Fill::Gaps(gaps) = &options.fill {
            let problem = format!("names {} gaps, and no layer is to be added", gaps.len());
            return Err(Error::setting("fill", problem, "leave it out"));
        }
        return Ok((0..old).map(NewLayer::Old).collect());
    }
    if options.method == GrowMethod::Stack {
        return stacked(old, options.layers);
    }
    let fewest = if options.method == GrowMethod::Lesa { 3 } else { 2 };
    if old < fewest {
        return Err(Error::model(
            format!("has {old} layers, too few to fill gaps"),
            "use a model with 3 or more",
        ));
    }
    let most = old - 1;
    if more > most {
        let problem = format!("is {}, and {old} layers have {most} gaps", options.layers);
        return Err(Error::setting("layers", problem, format!("use at most {}", old + most)));
    }
    let gaps: Vec<usize> = match &options.fill {
        Fill::Last => (most - more..most).collect(),
        Fill::Even => (0..more).map(|i| (2 * i + 1) * most / (2 * more)).collect(),
        Fill::Gaps(gaps) => {
            let mut sorted = gaps.clone();
            sorted.sort_unstable();
            sorted.dedup();
            if let Some(gap) = sorted.iter().find(|&&gap| gap >= most) {
                let problem = format!("names the gap {gap}-{}, and the last layer is {most}", gap + 1);
                return Err(Error::setting("fill", problem, "name gaps of the model"));
            }
            if sorted.len() != more || gaps.len() != more {
                let problem = format!("names {} gaps, and {more} layers are to be added", gaps.len());
                return Err(Error::setting("fill", problem, format!("name {more}, each once")));
            }
            sorted
        }
    };
    let layer = |i: usize| {
        let behind = gaps.contains(&i).then_some(NewLayer::Behind(i));
        std::iter::once(NewLayer::Old(i)).chain(behind)
    };
    Ok((0..old).flat_map(layer).collect())
}

/// Returns the lower and the upper layers, half of the result each; both overlap.
fn stacked(old: usize, new: usize) -> Result<Vec<NewLayer>> {
    if new > 2 * old {
        let problem = format!("is {new}, and {old} layers twice are {}", 2 * old);
        return Err(Error::setting("layers", problem, format!("use at most {}", 2 * old)));
    }
    let lower = new.div_ceil(2);
    let upper = old - (new - lower)..old;
    Ok((0..lower).chain(upper).map(NewLayer::Old).collect())
}
