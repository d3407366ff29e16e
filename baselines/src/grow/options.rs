//! Options of growing, and the plan that follows from them.

use std::str::FromStr;

use dsmoe_core::Config;
use serde::Serialize;

use crate::error::{Error, Result};

/// The way in which new layers are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GrowMethod {
    /// Predicted from both neighbours.
    Lesa,
    /// The lower neighbour.
    Copy,
    /// The mean of both neighbours.
    Average,
    /// The lower neighbour with outputs of 0.
    Identity,
    /// Normal weights.
    Random,
    /// Lower layers and upper layers, overlapping.
    Stack,
}

/// The form of the matrices whose rows LESA's networks predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Space {
    /// V of the singular value decomposition over all layers.
    Svd,
    /// The weights themselves.
    Weights,
}

/// Norms of a new layer that is no copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GrownNorms {
    /// The mean of both neighbours.
    Parents,
    /// Those of the first layer.
    First,
}

/// Defines reading an option's words.
macro_rules! read_words {
    ($type:ident, $what:literal, $($word:literal => $variant:ident),+) => {
        impl FromStr for $type {
            type Err = Error;

            fn from_str(text: &str) -> Result<$type> {
                match text {
                    $($word => Ok($type::$variant),)+
                    _ => Err(Error::setting($what, format!("cannot be {text:?}"), concat!("use one of", $(" ", $word),+))),
                }
            }
        }
    };
}

read_words!(GrowMethod, "method", "lesa" => Lesa, "copy" => Copy, "average" => Average, "identity" => Identity,
    "random" => Random, "stack" => Stack);
read_words!(Space, "space", "svd" => Svd, "weights" => Weights);
read_words!(GrownNorms, "norms", "parents" => Parents, "first" => First);

/// Most passes of lesa over all rows.
const MOST_EPOCHS: usize = 10_000;

/// Options of growing.
#[derive(Clone, Debug, PartialEq)]
pub struct GrowOptions {
    /// Layers of the result; as many as the model has make a copy of it.
    pub layers: usize,
    /// The gaps that get a new layer.
    pub fill: Fill,
    /// The way in which new layers are made.
    pub method: GrowMethod,
    /// The form of the matrices whose rows LESA predicts.
    pub space: Space,
    /// Norms of new layers that are no copies.
    pub norms: GrownNorms,
    /// Passes of lesa over all rows, 1 to 10,000.
    pub epochs: usize,
    /// Weight of the difference of norms in lesa's loss, 0 to 1.
    pub penalty: f64,
    /// Seed of lesa's network and of random weights.
    pub seed: u64,
    /// Replace an output directory that is not empty.
    pub force: bool,
}

impl GrowOptions {
    /// Fills the last gaps by lesa with the settings of its code.
    pub fn new(layers: usize) -> GrowOptions {
        GrowOptions {
            layers,
            fill: Fill::Last,
            method: GrowMethod::Lesa,
            space: Space::Svd,
            norms: GrownNorms::Parents,
            epochs: 10,
            penalty: 5e-4,
            seed: 0,
            force: false,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        if !(1..=MOST_EPOCHS).contains(&self.epochs) {
            let help = format!("use 1 to {MOST_EPOCHS}");
            return Err(Error::setting("epochs", format!("is {}", self.epochs), help));
        }
        if !(0.0..=1.0).contains(&self.penalty) {
            return Err(Error::setting("penalty", format!("is {}", self.penalty), "use 0 to 1"));
        }
        Ok(())
    }
}

/// The gaps that get a new layer. Gap i is between the layers i and i + 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fill {
    /// The last ones.
    Last,
    /// Even distances.
    Even,
    /// These.
    Gaps(Vec<usize>),
}

/// The origin of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewLayer {
    /// A layer of the source.
    Old(usize),
    /// A new layer behind this layer of the source and before the next.
    Behind(usize),
}

impl NewLayer {
    /// Returns the layer of the source that it is, or that it is behind.
    pub fn source(&self) -> usize {
        match *self {
            NewLayer::Old(layer) | NewLayer::Behind(layer) => layer,
        }
    }
}

impl FromStr for Fill {
    type Err = Error;

    /// Reads `last`, `even`, or gaps as `2-3,3-4`.
    fn from_str(text: &str) -> Result<Fill> {
        match text {
            "last" => return Ok(Fill::Last),
            "even" => return Ok(Fill::Even),
            _ => {}
        }
        let gap = |pair: &str| -> Option<usize> {
            let (lower, upper) = pair.split_once('-')?;
            let (lower, upper) = (lower.trim().parse::<usize>().ok()?, upper.trim().parse::<usize>().ok()?);
            (lower.checked_add(1)? == upper).then_some(lower)
        };
        let gaps: Option<Vec<usize>> = text.split(',').map(gap).collect();
        let help = "use last, even, or pairs of neighbouring layers such as 2-3,3-4; the first layer is 0";
        gaps.map(Fill::Gaps).ok_or_else(|| Error::setting("fill", format!("cannot be {text:?}"), help))
    }
}

/// The deeper model, known before anything is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct GrowPlan {
    /// Where each layer comes from, in order.
    pub layers: Vec<NewLayer>,
    /// Parameters of the source.
    pub source_params: u64,
    /// Parameters of the result.
    pub params: u64,
    /// Layers of the source.
    pub source_layers: usize,
    pub(super) grown: Config,
}

impl GrowPlan {
    /// Reports whether no layer is added: the result is a copy of the source.
    pub fn is_unchanged(&self) -> bool {
        self.layers.len() == self.source_layers
    }
}
