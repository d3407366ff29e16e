//! `dsmoe bench ffn`: times one FFN, dense and in experts.

use std::cell::RefCell;

use anyhow::{Result, bail};
use dsmoe_core::ffn::routes;
use dsmoe_kernels::crew::with_crew;
use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Pairs, Saved, Scratch, WeightGrads, Weights};
use dsmoe_kernels::{Activation, Precision, attention};
use dsmoe_router::Routing;

use super::ceilings::Cost;
use super::checks::{check_active, check_core, check_experts, check_memory, check_size};
use super::output::Output;
use super::routing::{experts_in_use, routing};
use super::row::{Row, bits, find_break_evens};
use super::turns::{Task, take_turns};
use super::values::{bytes_in, f32_bytes, product, random};
use crate::cli::bench::{BOTH, Ffn, Routes};

pub(crate) fn check(args: &Ffn) -> Result<()> {
    check_size("hidden", args.hidden)?;
    check_size("intermediate", args.intermediate)?;
    args.tokens.iter().try_for_each(|&tokens| check_size("tokens", tokens.max(1)))?;
    args.experts.iter().try_for_each(|&experts| check_experts(experts, args.intermediate))?;
    args.active.iter().try_for_each(|&active| check_active(active))?;
    check_core(args.core)?;
    if let Some(&experts) = args.experts.iter().max()
        && let Some(&tokens) = args.tokens.iter().max()
        && u32::try_from(experts as u128 * tokens as u128).is_err()
    {
        bail!("--tokens {tokens} times --experts {experts} is more pairs than can be routed; use fewer");
    }
    let [hidden, intermediate] = [args.hidden, args.intermediate].map(|size| size as u128);
    let tokens = args.tokens.iter().max().map_or(0, |&tokens| tokens as u128);
    // The weights and a copy for each number of experts and the dense one, or with their gradients; four rows of
    // each width per token, and as much again for the parts of a product.
    let shapes = args.experts.len() * if args.core > 0.0 { args.active.len() } else { 1 };
    let copies = if args.backward { 2 } else { 2 + shapes as u128 };
    check_memory(4 * (3 * hidden * intermediate * copies + 8 * tokens * (hidden + intermediate)))
}

pub(crate) fn run(args: &Ffn, output: &mut Output<'_>) -> Result<()> {
    let (hidden, intermediate) = (args.hidden, args.intermediate);
    let deviation = 1.0 / (hidden as f32).sqrt();
    let [gate, up, down] = [1, 2, 3].map(|seed| random(hidden * intermediate, deviation, seed));
    let weights = Weights { gate: &gate, up: &up, down: &down, biases: None };
    for &precision in args.common.precisions(&BOTH) {
        let layer = Layer { hidden, intermediate, precision };
        let shapes = shapes(args);
        // The dense FFN is the first.
        let packed: Vec<PackedWeights> = match args.backward {
            true => Vec::new(),
            false => std::iter::once(Shape::DENSE)
                .chain(shapes.iter().copied())
                .map(|shape| PackedWeights::new(precision, &weights, layer.dims(0, shape)))
                .collect(),
        };
        for &tokens in &args.tokens {
            let contestants = contestants(args, &shapes, tokens);
            let measured = match args.backward {
                true => layer.train(tokens, &contestants, &weights, args),
                false => layer.infer(tokens, &contestants, &packed, args),
            };
            let rows = layer.rows(measured, &contestants, args, output);
            output.extend(rows)?;
        }
    }
    Ok(())
}

/// The cut of an FFN into experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) experts: usize,
    /// The leading experts that run for every token.
    pub(crate) core: usize,
}

impl Shape {
    pub(crate) const DENSE: Shape = Shape { experts: 1, core: 0 };

    /// Returns the shape of `experts` experts, a share `active` of which runs, with the part `part` of these as the core.
    pub(crate) fn new(experts: usize, active: f64, part: f64) -> Shape {
        Shape { experts, core: (experts as f64 * active * part).round() as usize }
    }

    /// Counts the experts outside the core.
    pub(crate) fn routed(self) -> usize {
        self.experts - self.core
    }

    /// Returns the share of a token's experts that run, of which `active` are outside the core.
    fn share(self, active: f64) -> f64 {
        (self.core as f64 + active) / self.experts as f64
    }
}

/// A routing to time.
struct Contestant {
    shape: Shape,
    /// Index of the shape.
    index: usize,
    /// The share of active pairs asked for.
    active: f64,
    /// The routing covers the experts outside the core.
    routing: Routing,
}

/// Returns the shares of `experts` experts that are active in a routing.
fn shares(args: &Ffn, experts: usize) -> Vec<f64> {
    match args.routing {
        Routes::Random => args.active.clone(),
        Routes::OneExpert => vec![1.0 / experts as f64],
        Routes::None => vec![0.0],
    }
}

/// Returns the part of the active experts that is the core: random routings leave one to it.
fn core_part(args: &Ffn) -> f64 {
    if args.routing == Routes::Random { args.core } else { 0.0 }
}

/// Lists the shapes that are timed.
fn shapes(args: &Ffn) -> Vec<Shape> {
    let mut shapes = Vec::new();
    for &experts in &args.experts {
        for active in shares(args, experts) {
            let shape = Shape::new(experts, active, core_part(args));
            if !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
    }
    shapes
}

fn contestants(args: &Ffn, shapes: &[Shape], tokens: usize) -> Vec<Contestant> {
    let mut contestants = Vec::new();
    for &experts in &args.experts {
        for active in shares(args, experts) {
            let shape = Shape::new(experts, active, core_part(args));
            let index = shapes.iter().position(|&other| other == shape).expect("every shape is listed");
            let open = (experts as f64 * active - shape.core as f64).max(0.0);
            let routing = routing(args.routing, tokens, shape.routed(), open / shape.routed().max(1) as f64);
            contestants.push(Contestant { shape, index, active, routing });
        }
    }
    contestants
}

/// The sizes of an FFN.
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) precision: Precision,
}

/// The times of all contestants and the hashes of their results, the dense FFN first.
struct Measured {
    tokens: usize,
    times: Vec<f64>,
    hashes: Vec<Option<String>>,
}

impl Measured {
    fn new(
        tokens: usize,
        tasks: &mut [Task<'_>],
        args: &Ffn,
        hash: impl FnMut(&mut Task<'_>) -> Option<String>,
    ) -> Measured {
        let hashes = tasks.iter_mut().map(hash).collect();
        Measured { tokens, times: take_turns(tasks, usize::from(args.common.repeats)), hashes }
    }
}

/// Runs inference on packed weights: dense, or with a routing of the experts outside the core.
pub(crate) fn forward(
    y: &mut [f32],
    x: &[f32],
    weights: &PackedWeights,
    routing: Option<&Routing>,
    scratch: &mut Scratch,
) {
    let dims = Dims { tokens: x.len() / weights.dims().hidden, ..weights.dims() };
    let routes = routing.map(routes);
    let pairs = routes.as_ref().map_or(Pairs::Dense, Pairs::Routed);
    expert_ffn::ForwardPacked { y, x, weights, pairs, dims, scratch }.run();
}

/// The memory of a training pass.
pub(crate) struct TrainPass {
    layer: Layer,
    y: Vec<f32>,
    dx: Vec<f32>,
    dcoefficients: Vec<f32>,
    grads: [Vec<f32>; 3],
    saved: Saved,
    scratch: Scratch,
}

impl TrainPass {
    pub(crate) fn new(layer: Layer, tokens: usize) -> TrainPass {
        let [y, dx] = [(); 2].map(|()| vec![0.0; tokens * layer.hidden]);
        let grads = [(); 3].map(|()| vec![0.0; layer.hidden * layer.intermediate]);
        let (saved, scratch) = (Saved::default(), Scratch::new(layer.precision));
        TrainPass { layer, y, dx, dcoefficients: Vec::new(), grads, saved, scratch }
    }

    /// Runs forward and backward: dense, or with a routing of the experts outside a core of `core`.
    pub(crate) fn run(
        &mut self,
        x: &[f32],
        dy: &[f32],
        weights: &Weights<'_>,
        routing: Option<(&Routing, usize)>,
    ) {
        let shape = routing
            .map_or(Shape::DENSE, |(routing, core)| Shape { experts: routing.num_experts + core, core });
        let routing = routing.map(|(routing, _)| routing);
        let dims = self.layer.dims(x.len() / self.layer.hidden, shape);
        let routes = routing.map(routes);
        let TrainPass { y, dx, dcoefficients, grads: [gate, up, down], saved, scratch, .. } = self;
        dcoefficients.resize(routing.map_or(0, |routing| routing.num_tokens * routing.num_experts), 0.0);
        let pairs = || routes.as_ref().map_or(Pairs::Dense, Pairs::Routed);
        expert_ffn::ForwardTrain { y, saved, x, weights, pairs: pairs(), dims, scratch }.run();
        let (grads, pairs) = (WeightGrads { gate, up, down, biases: None }, pairs());
        let dcoefficients = routing.map(|_| &mut dcoefficients[..]);
        expert_ffn::Backward { dx, dcoefficients, grads, dy, saved, x, weights, pairs, dims, scratch }.run();
    }

    fn bits(&self) -> Option<String> {
        let [gate, up, down] = &self.grads;
        bits(&[&self.y, &self.dx, gate, up, down])
    }
}

impl Layer {
    pub(crate) fn dims(self, tokens: usize, Shape { experts, core }: Shape) -> Dims {
        let dense = Dims::dense(tokens, self.hidden, self.intermediate, Activation::Silu);
        Dims { num_experts: experts, core, ..dense }
    }

    fn infer(
        self,
        tokens: usize,
        contestants: &[Contestant],
        packed: &[PackedWeights],
        args: &Ffn,
    ) -> Measured {
        let run = || self.infer_here(tokens, contestants, packed, args);
        // As in a model: on a thread of the pool, with a crew for a few tokens.
        rayon::scope(|_| if tokens <= attention::DECODE_QUERIES { with_crew(run) } else { run() })
    }

    fn infer_here(
        self,
        tokens: usize,
        contestants: &[Contestant],
        packed: &[PackedWeights],
        args: &Ffn,
    ) -> Measured {
        let x = &random(tokens * self.hidden, 1.0, 4);
        let space = &RefCell::new((vec![0.0; x.len()], Scratch::default()));
        let call = |weights, routing| -> Task<'_> {
            Box::new(move || {
                let (y, scratch) = &mut *space.borrow_mut();
                forward(y, x, weights, routing, scratch);
            })
        };
        let split = contestants.iter().map(|one| call(&packed[1 + one.index], Some(&one.routing)));
        let mut tasks: Vec<Task<'_>> = [call(&packed[0], None)].into_iter().chain(split).collect();
        Measured::new(tokens, &mut tasks, args, |task| {
            task();
            bits(&[&space.borrow().0])
        })
    }

    fn train(self, tokens: usize, contestants: &[Contestant], weights: &Weights<'_>, args: &Ffn) -> Measured {
        let [x, dy] = &[4, 5].map(|seed| random(tokens * self.hidden, 1.0, seed));
        let pass = &RefCell::new(TrainPass::new(self, tokens));
        let call = |routing| -> Task<'_> { Box::new(move || pass.borrow_mut().run(x, dy, weights, routing)) };
        let split = contestants.iter().map(|one| call(Some((&one.routing, one.shape.core))));
        let mut tasks: Vec<Task<'_>> = [call(None)].into_iter().chain(split).collect();
        Measured::new(tokens, &mut tasks, args, |task| {
            pass.borrow_mut().grads.iter_mut().for_each(|grad| grad.fill(0.0));
            task();
            pass.borrow().bits()
        })
    }

    fn rows(
        self,
        Measured { tokens, times, hashes }: Measured,
        contestants: &[Contestant],
        args: &Ffn,
        output: &mut Output<'_>,
    ) -> Vec<Row> {
        let work = if args.backward { "ffn_train" } else { "ffn" };
        let dense = (None, 1, tokens, 1.0);
        let split = contestants.iter().map(|one| {
            let Shape { experts, core } = one.shape;
            let touched = one.shape.share(experts_in_use(&one.routing) as f64);
            (Some(one), experts, one.routing.num_routed() + core * tokens, touched)
        });
        let rows = [dense].into_iter().chain(split).zip(&times).zip(hashes);
        let of_dense = self.cost(tokens, tokens, 1, 1.0, args.backward).flops.max(1.0);
        let mut rows: Vec<Row> = rows
            .map(|(((contestant, experts, pairs, touched), &seconds), bits)| {
                let name = if contestant.is_some() { "dsmoe" } else { "dense" };
                let mut row = Row::new(work, name, tokens, self.hidden, self.precision);
                row.intermediate = Some(self.intermediate);
                row.experts = Some(experts);
                row.active = Some(contestant.map_or(1.0, |one| one.active));
                row.active_measured = Some(contestant.map_or(1.0, |one| {
                    one.shape.share(one.routing.num_routed() as f64 / tokens.max(1) as f64)
                }));
                row.routing = contestant.map(|_| match args.routing {
                    Routes::Random => "random",
                    Routes::OneExpert => "one-expert",
                    Routes::None => "none",
                });
                row.tokens_per_s = (tokens > 0).then_some(tokens as f64 / seconds);
                row.bits = bits;
                let cost = self.cost(tokens, pairs, experts, touched, args.backward);
                row.measured(seconds, cost, self.precision, &mut output.ceilings);
                row.against_dense(times[0], cost.flops / of_dense);
                row
            })
            .collect();
        find_break_evens(&mut rows);
        rows
    }

    /// Returns the cost for `pairs` active pairs in `touched`, a share of the experts.
    fn cost(self, tokens: usize, pairs: usize, experts: usize, touched: f64, backward: bool) -> Cost {
        if tokens == 0 {
            return Cost::default();
        }
        let area = product(&[self.hidden, self.intermediate]);
        let (rows, pairs) = (product(&[tokens, self.hidden]), pairs as f64 / experts as f64);
        if !backward {
            let bytes = bytes_in(self.precision, 3.0 * touched * area) + f32_bytes(2.0 * rows);
            return Cost { flops: 6.0 * pairs * area, bytes };
        }
        // Of every pair a, b and B; of the active ones c's product and the gradients of the weights, x and dc.
        let all = if experts == 1 { 0.0 } else { tokens as f64 - pairs };
        let flops = 18.0 * pairs * area + 6.0 * all * area;
        Cost { flops, bytes: f32_bytes((3.0 + 6.0 * touched) * area + 4.0 * rows) }
    }
}
