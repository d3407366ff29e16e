//! `dsmoe bench ffn`: one FFN, dense and cut into experts.

use std::cell::RefCell;

use anyhow::{Result, bail};
use dsmoe_core::ffn::routes;
use dsmoe_kernels::Precision;
use dsmoe_kernels::expert_ffn::{self, Dims, PackedWeights, Saved, Scratch, WeightGrads, Weights};
use dsmoe_router::Routing;

use super::ceilings::Cost;
use super::checks::{check_active, check_experts, check_memory, check_size};
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
    let copies = if args.backward { 2 } else { 2 + args.experts.len() as u128 };
    check_memory(4 * (3 * hidden * intermediate * copies + 8 * tokens * (hidden + intermediate)))
}

pub(crate) fn run(args: &Ffn, output: &mut Output<'_>) -> Result<()> {
    let (hidden, intermediate) = (args.hidden, args.intermediate);
    let deviation = 1.0 / (hidden as f32).sqrt();
    let [gate, up, down] = [1, 2, 3].map(|seed| random(hidden * intermediate, deviation, seed));
    let weights = Weights { gate: &gate, up: &up, down: &down };
    for &precision in args.common.precisions(&BOTH) {
        let layer = Layer { hidden, intermediate, precision };
        if args.backward {
            let mut grads = [(); 3].map(|()| vec![0.0; hidden * intermediate]);
            for &tokens in &args.tokens {
                let contestants = contestants(args, tokens);
                let rows = layer.train(tokens, &contestants, &weights, &mut grads, args, output);
                output.extend(rows)?;
            }
        } else {
            let pack = |experts| PackedWeights::new(precision, &weights, hidden, intermediate, experts);
            let dense = pack(1);
            let packed: Vec<PackedWeights> = args.experts.iter().map(|&experts| pack(experts)).collect();
            for &tokens in &args.tokens {
                let contestants = contestants(args, tokens);
                let rows = layer.infer(tokens, &contestants, &dense, &packed, args, output);
                output.extend(rows)?;
            }
        }
    }
    Ok(())
}

/// A way to run the experts.
struct Contestant {
    /// Which of the numbers of experts.
    index: usize,
    /// Share of active pairs asked for.
    active: f64,
    routing: Routing,
}

fn contestants(args: &Ffn, tokens: usize) -> Vec<Contestant> {
    let mut contestants = Vec::new();
    for (index, &experts) in args.experts.iter().enumerate() {
        let shares = match args.routing {
            Routes::Random => args.active.clone(),
            Routes::OneExpert => vec![1.0 / experts as f64],
            Routes::None => vec![0.0],
        };
        for active in shares {
            contestants.push(Contestant {
                index,
                active,
                routing: routing(args.routing, tokens, experts, active),
            });
        }
    }
    contestants
}

#[derive(Clone, Copy)]
struct Layer {
    hidden: usize,
    intermediate: usize,
    precision: Precision,
}

impl Layer {
    fn dims(self, routing: &Routing) -> Dims {
        let Layer { hidden, intermediate, .. } = self;
        let (tokens, num_experts) = (routing.num_tokens, routing.num_experts);
        Dims { tokens, hidden, intermediate, num_experts, all_pairs: true }
    }

    /// Inference on packed weights, the dense FFN first.
    fn infer(
        self,
        tokens: usize,
        contestants: &[Contestant],
        dense: &PackedWeights,
        packed: &[PackedWeights],
        args: &Ffn,
        output: &mut Output<'_>,
    ) -> Vec<Row> {
        let x = random(tokens * self.hidden, 1.0, 4);
        let y = RefCell::new(vec![0.0; x.len()]);
        let scratch = RefCell::new(Scratch::default());
        let mut tasks: Vec<Task<'_>> = vec![Box::new(|| {
            expert_ffn::ForwardPacked {
                y: &mut y.borrow_mut(),
                x: &x,
                weights: dense,
                pairs: expert_ffn::Pairs::Dense,
                dims: expert_ffn::Dims::dense(tokens, dense.hidden(), dense.intermediate()),
                scratch: &mut scratch.borrow_mut(),
            }
            .run();
        })];
        for Contestant { index, routing, .. } in contestants {
            let (weights, dims, x, y, scratch) = (&packed[*index], self.dims(routing), &x, &y, &scratch);
            tasks.push(Box::new(move || {
                let (mut y, mut scratch) = (y.borrow_mut(), scratch.borrow_mut());
                expert_ffn::ForwardPacked {
                    y: &mut y,
                    x,
                    weights,
                    pairs: expert_ffn::Pairs::Routed(&routes(routing)),
                    dims,
                    scratch: &mut scratch,
                }
                .run();
            }));
        }
        let hashes = tasks
            .iter_mut()
            .map(|task| {
                task();
                bits(&[&y.borrow()])
            })
            .collect();
        let times = take_turns(&mut tasks, usize::from(args.common.repeats));
        self.rows("ffn", tokens, contestants, &times, hashes, args, output)
    }

    /// Forward and backward.
    fn train(
        self,
        tokens: usize,
        contestants: &[Contestant],
        weights: &Weights<'_>,
        grads: &mut [Vec<f32>; 3],
        args: &Ffn,
        output: &mut Output<'_>,
    ) -> Vec<Row> {
        let Layer { hidden, intermediate, precision } = self;
        let [x, dy] = [4, 5].map(|seed| random(tokens * hidden, 1.0, seed));
        let space = RefCell::new(Space {
            y: vec![0.0; x.len()],
            dx: vec![0.0; x.len()],
            dcoefficients: Vec::new(),
            saved: Saved::default(),
            scratch: Scratch::new(precision),
            grads,
        });
        let (space, x, dy) = (&space, &x, &dy);
        let mut tasks: Vec<Task<'_>> = vec![Box::new(move || {
            let Space { y, dx, saved, scratch, grads, .. } = &mut *space.borrow_mut();
            expert_ffn::ForwardTrain {
                y,
                saved,
                x,
                weights,
                pairs: expert_ffn::Pairs::Dense,
                dims: expert_ffn::Dims::dense(tokens, hidden, intermediate),
                scratch,
            }
            .run();
            let grads = weight_grads(grads);
            expert_ffn::Backward {
                dx,
                dcoefficients: None,
                grads,
                dy,
                saved,
                x,
                weights,
                pairs: expert_ffn::Pairs::Dense,
                dims: expert_ffn::Dims::dense(tokens, hidden, intermediate),
                scratch,
            }
            .run();
        })];
        for Contestant { routing, .. } in contestants {
            let dims = self.dims(routing);
            tasks.push(Box::new(move || {
                let Space { y, dx, dcoefficients, saved, scratch, grads } = &mut *space.borrow_mut();
                let (routes, grads) = (routes(routing), weight_grads(grads));
                dcoefficients.resize(tokens * dims.num_experts, 0.0);
                expert_ffn::ForwardTrain {
                    y,
                    saved,
                    x,
                    weights,
                    pairs: expert_ffn::Pairs::Routed(&routes),
                    dims,
                    scratch,
                }
                .run();
                expert_ffn::Backward {
                    dx,
                    dcoefficients: Some(dcoefficients),
                    grads,
                    dy,
                    saved,
                    x,
                    weights,
                    pairs: expert_ffn::Pairs::Routed(&routes),
                    dims,
                    scratch,
                }
                .run();
            }));
        }
        let hashes = tasks
            .iter_mut()
            .map(|task| {
                space.borrow_mut().grads.iter_mut().for_each(|grad| grad.fill(0.0));
                task();
                let Space { y, dx, grads, .. } = &*space.borrow();
                bits(&[y, dx, &grads[0], &grads[1], &grads[2]])
            })
            .collect();
        let times = take_turns(&mut tasks, usize::from(args.common.repeats));
        self.rows("ffn_train", tokens, contestants, &times, hashes, args, output)
    }

    #[expect(clippy::too_many_arguments, reason = "what was measured, and where it goes")]
    fn rows(
        self,
        work: &'static str,
        tokens: usize,
        contestants: &[Contestant],
        times: &[f64],
        hashes: Vec<Option<String>>,
        args: &Ffn,
        output: &mut Output<'_>,
    ) -> Vec<Row> {
        let dense = (None, 1, tokens, 1.0);
        let split = contestants.iter().map(|one| {
            let touched = experts_in_use(&one.routing) as f64 / one.routing.num_experts as f64;
            (Some(one), one.routing.num_experts, one.routing.num_routed(), touched)
        });
        let rows = [dense].into_iter().chain(split).zip(times).zip(hashes);
        let mut rows: Vec<Row> = rows
            .map(|(((contestant, experts, pairs, touched), &seconds), bits)| {
                let name = if contestant.is_some() { "dsmoe" } else { "dense" };
                let mut row = Row::new(work, name, tokens, self.hidden, self.precision);
                row.intermediate = Some(self.intermediate);
                row.experts = Some(experts);
                row.active = Some(contestant.map_or(1.0, |one| one.active));
                row.active_measured = Some(contestant.map_or(1.0, |one| one.routing.active_ratio()));
                row.routing = contestant.map(|_| match args.routing {
                    Routes::Random => "random",
                    Routes::OneExpert => "one-expert",
                    Routes::None => "none",
                });
                row.tokens_per_s = (tokens > 0).then_some(tokens as f64 / seconds);
                row.bits = bits;
                let cost = self.cost(tokens, pairs, experts, touched, args.backward);
                row.measured(seconds, cost, self.precision, &mut output.ceilings);
                row.against_dense(times[0]);
                row
            })
            .collect();
        find_break_evens(&mut rows);
        rows
    }

    /// What the op has to do for `pairs` active pairs in `touched`, a share of the experts.
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

/// What a training pass writes.
struct Space<'a> {
    y: Vec<f32>,
    dx: Vec<f32>,
    dcoefficients: Vec<f32>,
    saved: Saved,
    scratch: Scratch,
    grads: &'a mut [Vec<f32>; 3],
}

fn weight_grads<'a>(grads: &'a mut [Vec<f32>; 3]) -> WeightGrads<'a> {
    let [gate, up, down] = grads;
    WeightGrads { gate, up, down }
}
