//! The routes that an oracle chooses among: for every layer an option, ascending in what it computes.

use std::str::FromStr;

use dsmoe_core::Inference;
use dsmoe_core::ffn::Route;
use serde::Serialize;

use crate::error::{Error, Result};

/// The options of every layer.
///
/// ```
/// use dsmoe_train::oracle::{RouteKind, RouteSpace};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let dense = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let kind: RouteKind = "big-skip".parse()?;
/// assert!(RouteSpace::of(kind, &dense).is_ok());
/// // A dense model has no experts to choose among.
/// assert!(RouteSpace::of(RouteKind::Experts, &dense).is_err());
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouteKind {
    /// The FFN as it is, or nothing: for every model.
    BigSkip,
    /// The second or the first of two choices.
    BigSmall,
    /// Nothing, or one of the FFN's choices: the experts of the k largest gates for every k.
    Experts,
}

impl FromStr for RouteKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<RouteKind> {
        match text {
            "big-skip" => Ok(RouteKind::BigSkip),
            "big-small" => Ok(RouteKind::BigSmall),
            "experts" => Ok(RouteKind::Experts),
            _ => Err(Error::field("routes", format!("{text:?}"), "big-skip, big-small or experts")),
        }
    }
}

/// A route: the number of each layer's option.
pub(crate) type Digits = Vec<u16>;

/// All routes of a model.
///
/// ```
/// use dsmoe_train::oracle::{RouteKind, RouteSpace};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// // Each of the 4 layers runs or is skipped; a level is the number of those that run.
/// let space = RouteSpace::of(RouteKind::BigSkip, &model)?;
/// assert_eq!((space.layers(), space.count(1 << 10), space.levels()), (4, Some(16), 5));
/// assert_eq!(space.count(15), None); // too many to measure them all
/// # Ok::<(), dsmoe_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RouteSpace {
    options: Vec<Vec<Route>>,
    /// The route of a model that nobody routes.
    default: Vec<Route>,
}

impl RouteSpace {
    /// Returns the routes of `model`.
    ///
    /// # Errors
    /// The model has no such options, or runs on a GPU.
    pub fn of(kind: RouteKind, model: &Inference) -> Result<RouteSpace> {
        let choices = model.choices()?;
        let fits = match kind {
            RouteKind::BigSkip => true,
            RouteKind::BigSmall => choices.iter().all(|&n| n == 2),
            RouteKind::Experts => choices.iter().all(|&n| n > 0),
        };
        if !fits {
            let found = format!("for layers with {choices:?} choices");
            let allowed = match kind {
                RouteKind::BigSmall => "it with a model of two choices in every layer, or big-skip",
                _ => "it with a model of experts, or big-skip",
            };
            return Err(Error::field("routes", found, allowed));
        }
        let options = choices.iter().map(|&n| match kind {
            RouteKind::BigSkip => vec![Route::Skip, Route::Own],
            RouteKind::BigSmall => vec![Route::Choice(1), Route::Choice(2)],
            RouteKind::Experts => [Route::Skip].into_iter().chain((1..=n).map(Route::Choice)).collect(),
        });
        let default = if kind == RouteKind::BigSmall { Route::Choice(2) } else { Route::Own };
        Ok(RouteSpace { default: vec![default; choices.len()], options: options.collect() })
    }

    /// Returns the number of layers.
    pub fn layers(&self) -> usize {
        self.options.len()
    }

    /// Returns the number of routes; none above `most`.
    pub fn count(&self, most: u64) -> Option<u64> {
        let product = |count: u64, options: &Vec<Route>| count.checked_mul(options.len() as u64);
        self.options.iter().try_fold(1, product).filter(|&count| count <= most)
    }

    /// Returns the number of levels: sums of options, from 0.
    pub fn levels(&self) -> usize {
        self.options.iter().map(|options| options.len() - 1).sum::<usize>() + 1
    }

    /// Returns the route of that number; the option of the last layer changes first.
    pub(crate) fn nth(&self, mut number: u64) -> Digits {
        let mut digits = vec![0; self.layers()];
        for (digit, options) in digits.iter_mut().zip(&self.options).rev() {
            *digit = (number % options.len() as u64) as u16;
            number /= options.len() as u64;
        }
        digits
    }

    /// Returns all continuations of the routes `beams` by one layer.
    pub(crate) fn extended(&self, beams: &[Digits]) -> Vec<Digits> {
        let layer = beams.first().map_or(0, Vec::len);
        let options = 0..self.options[layer].len() as u16;
        let of = |beam: &Digits| {
            let beam = beam.clone();
            options.clone().map(move |option| beam.iter().copied().chain([option]).collect())
        };
        beams.iter().flat_map(of).collect()
    }

    /// Returns what layers do on a route; those behind its end do what they do by default.
    pub fn routes(&self, digits: &[u16]) -> Vec<Route> {
        let mut routes = self.default.clone();
        for ((route, options), &digit) in routes.iter_mut().zip(&self.options).zip(digits) {
            *route = options[usize::from(digit)];
        }
        routes
    }
}

/// Returns the level of a route.
pub(crate) fn level(digits: &[u16]) -> usize {
    digits.iter().copied().map(usize::from).sum()
}

/// Writes a route: a digit for each layer, separated where one has several digits.
pub(crate) fn name(digits: &[u16]) -> String {
    let separator = if digits.iter().any(|&digit| digit > 9) { "." } else { "" };
    digits.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

/// Keeps of every level the `each` routes of the lowest losses, the first among equals; in the order of levels.
pub(crate) fn keep_best(routes: Vec<(Digits, f64)>, each: usize) -> Vec<Digits> {
    let mut routes = routes;
    routes.sort_by(|a, b| {
        (level(&a.0), a.1).partial_cmp(&(level(&b.0), b.1)).unwrap_or(std::cmp::Ordering::Equal)
    });
    let mut kept: Vec<Digits> = Vec::new();
    for chunk in routes.chunk_by(|a, b| level(&a.0) == level(&b.0)) {
        kept.extend(chunk.iter().take(each).map(|(digits, _)| digits.clone()));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(options: &[usize]) -> RouteSpace {
        let of = |&n: &usize| [Route::Skip].into_iter().chain((1..n).map(Route::Choice)).collect();
        RouteSpace { options: options.iter().map(of).collect(), default: vec![Route::Own; options.len()] }
    }

    #[test]
    fn every_route_is_counted_once() {
        let space = space(&[2, 3, 2]);
        assert_eq!((space.count(12), space.count(11), space.levels()), (Some(12), None, 5));
        let all: Vec<Digits> = (0..12).map(|i| space.nth(i)).collect();
        assert_eq!(
            [&all[0], &all[1], &all[2], &all[11]],
            [&vec![0, 0, 0], &vec![0, 0, 1], &vec![0, 1, 0], &vec![1, 2, 1]]
        );
        let mut distinct = all.clone();
        distinct.dedup();
        assert!(all.is_sorted() && distinct.len() == 12);
        let one_by_one = (0..3).fold(vec![Digits::new()], |beams, _| space.extended(&beams));
        assert_eq!(one_by_one, all);
        assert_eq!(space.routes(&[0, 2]), [Route::Skip, Route::Choice(2), Route::Own]);
        assert_eq!([name(&[1, 0, 1]), name(&[1, 12])], ["101", "1.12"]);
        // Too many to count.
        assert_eq!(self::space(&[9; 80]).count(u64::MAX), None);
    }

    #[test]
    fn beams_keep_the_best_of_every_level() {
        let routes = vec![
            (vec![1, 0], 3.0),
            (vec![0, 1], 2.0),
            (vec![0, 0], 9.0),
            (vec![1, 1], 1.0),
            (vec![2, 0], 1.0),
        ];
        assert_eq!(keep_best(routes.clone(), 1), [vec![0, 0], vec![0, 1], vec![1, 1]]);
        assert_eq!(keep_best(routes, 5).len(), 5);
    }
}
