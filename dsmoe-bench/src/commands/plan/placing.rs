//! Requests that wait, made up from a profile, and where ways of placing put them.

use std::time::Instant;

use anyhow::{Result, bail};
use dsmoe_baselines::plan::place::{Placement, Request, Scene, Server, Speeds, Spot};
use dsmoe_kernels::rng::Rng;
use serde::Serialize;

use crate::cli::plan::ServerArgs;

/// Requests that wait together where the optimum is found, and where it is not.
const FEW: usize = 5;
const MANY: usize = 24;
const SCENE_STREAM: u64 = 0x7363_656e_6573;

/// The result of a placing rule, mean over all scenes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Placing {
    pub(super) requests: usize,
    pub(super) way: &'static str,
    /// Cost over that of the reference: the optimum, or the descent where there is none.
    pub(super) cost: f64,
    /// Share of the requests that miss their deadline.
    pub(super) missed: f64,
    /// Seconds of a decision.
    pub(super) seconds: f64,
}

/// Returns devices and prices.
pub(super) fn scene_of(args: &ServerArgs, processor: &Speeds) -> Result<Scene> {
    let budgets = processor.prefill.len();
    if !(args.mu >= 0.0 && args.mu.is_finite()) {
        bail!("--mu {}: use a number of 0 or more", args.mu);
    }
    let server = match args.server[..] {
        [] => None,
        [prefill, decode, start]
            if [prefill, decode].iter().all(|x| *x > 0.0 && x.is_finite())
                && start >= 0.0
                && start.is_finite() =>
        {
            let speeds = Speeds { prefill: vec![prefill; budgets], decode: vec![decode; budgets] };
            Some(Server { speeds, start })
        }
        _ => bail!("--server: use PREFILL,DECODE,START: two speeds above 0 and seconds"),
    };
    Ok(Scene { processor: processor.clone(), server, mu: args.mu })
}

/// Places `scenes` sets of requests in every way. `curves` are predictions for requests of a profile.
pub(super) fn compare(scene: &Scene, curves: &[Vec<f64>], scenes: usize, seed: u64) -> Vec<Placing> {
    let mut rows = Vec::new();
    for count in [FEW, MANY] {
        let mut ways: Vec<(&'static str, [f64; 3])> = Vec::new();
        for number in 0..scenes as u64 {
            let requests =
                draw(scene, curves, count, Rng::new(seed, SCENE_STREAM ^ number << 8 ^ count as u64));
            let placed = all_ways(scene, &requests, Rng::new(seed, SCENE_STREAM + 1 + number));
            let reference = placed.first().map_or(1.0, |(_, placed, _)| placed.cost);
            for (way, placed, seconds) in placed {
                let missed =
                    placed.times.iter().zip(&requests).filter(|(time, of)| **time > of.deadline * 1.000_001);
                let found = [placed.cost / reference, missed.count() as f64 / count as f64, seconds];
                match ways.iter_mut().find(|(name, _)| *name == way) {
                    Some((_, sums)) => sums.iter_mut().zip(found).for_each(|(sum, x)| *sum += x),
                    None => ways.push((way, found)),
                }
            }
        }
        rows.extend(ways.into_iter().map(|(way, sums)| {
            let [cost, missed, seconds] = sums.map(|sum| sum / scenes as f64);
            Placing { requests: count, way, cost, missed, seconds }
        }));
    }
    rows
}

/// Draws requests whose deadlines are between a fraction and more of what the largest budget takes on the processor.
fn draw(scene: &Scene, curves: &[Vec<f64>], count: usize, mut rng: Rng) -> Vec<Request> {
    let mut draw = |low: f64, high: f64| low + (high - low) * f64::from(rng.uniform());
    let request = |_| {
        let (prompt, wanted) = (draw(16.0, 512.0), draw(8.0, 128.0));
        let Speeds { prefill, decode } = &scene.processor;
        let largest = prompt / prefill[prefill.len() - 1] + wanted / decode[decode.len() - 1];
        let deadline = largest * draw(0.3, 1.5);
        let extra = &curves[(draw(0.0, 1.0) * curves.len() as f64) as usize % curves.len()];
        Request { prompt, wanted, deadline, weight: draw(0.5, 2.0), extra: extra.clone() }
    };
    (0..count).map(request).collect()
}

/// Places requests in every way, the reference first, and times the decisions.
fn all_ways(scene: &Scene, requests: &[Request], mut rng: Rng) -> Vec<(&'static str, Placement, f64)> {
    let budgets = scene.processor.prefill.len();
    let by_chance = || {
        let server = scene.server.is_some();
        let spots: Vec<Spot> = requests
            .iter()
            .map(|_| {
                let budget = rng.below(budgets as u64) as usize;
                if server && rng.below(2) == 1 { Spot::Server(budget) } else { Spot::Processor(budget) }
            })
            .collect();
        Some(scene.placed(requests, &spots))
    };
    let few = requests.len() <= FEW;
    let mut found = Vec::new();
    let mut add = |way, place: &mut dyn FnMut() -> Option<Placement>| {
        let started = Instant::now();
        if let Some(placed) = place() {
            found.push((way, placed, started.elapsed().as_secs_f64()));
        }
    };
    if few {
        add("optimum", &mut || scene.optimum(requests));
    }
    add("descent", &mut || Some(scene.descend(requests)));
    add("by urgency", &mut || Some(scene.by_urgency(requests)));
    if few {
        add("one budget for all", &mut || scene.one_budget(requests));
    }
    add("all on the processor", &mut || Some(scene.all_at_home(requests)));
    add("all on the server", &mut || scene.all_on_server(requests));
    let mut by_chance = by_chance;
    add("by chance", &mut by_chance);
    found
}
