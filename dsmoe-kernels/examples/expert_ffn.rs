//! A gated expert FFN with a share of its experts active, beside the dense FFN it was cut from.
//!
//! Run with `cargo run --release -p dsmoe-kernels --example expert_ffn`.
#![expect(clippy::print_stdout, reason = "an example prints its results")]

use std::time::Instant;

use dsmoe_kernels::Activation;
use dsmoe_kernels::expert_ffn::{
    Backward, Dims, ForwardTrain, Pairs, Routes, Saved, Scratch, WeightGrads, Weights,
};
use dsmoe_kernels::testing::{norm, normals};

const TOKENS: usize = 128;
const EXPERTS: usize = 8;
const DIMS: Dims = Dims {
    tokens: TOKENS,
    hidden: 128,
    intermediate: 512,
    num_experts: EXPERTS,
    core: 0,
    all_pairs: false,
    activation: Activation::Silu,
};

fn main() {
    let experts = [1, 2, 4, EXPERTS];
    run("dense", Pairs::Dense, Dims::dense(TOKENS, DIMS.hidden, DIMS.intermediate, Activation::Silu));
    for active in experts {
        // Token t goes to the experts i with (t + i) mod 8 below `active`; the lists are those of all pairs, in two orders.
        let is_active = |t: usize, i: usize| (t + i) % EXPERTS < active;
        let by_expert: Vec<(usize, usize)> = (0..EXPERTS)
            .flat_map(|i| (0..TOKENS).filter(move |&t| is_active(t, i)).map(move |t| (i, t)))
            .collect();
        let mut slots: Vec<u32> = (0..by_expert.len() as u32).collect();
        slots.sort_by_key(|&slot| by_expert[slot as usize].1);
        let routes = Routes {
            offsets: &std::array::from_fn::<_, { EXPERTS + 1 }, _>(|i| i * TOKENS * active / EXPERTS),
            tokens: &by_expert.iter().map(|&(_, t)| t as u32).collect::<Vec<_>>(),
            coefficients: &vec![1.0; by_expert.len()],
            token_offsets: &(0..=TOKENS).map(|t| t * active).collect::<Vec<_>>(),
            slots: &slots,
        };
        run(&format!("{active} of {EXPERTS} experts"), Pairs::Routed(&routes), DIMS);
    }
}

/// Takes one forward and one backward pass and prints the norms of y and dx and the time.
fn run(name: &str, pairs: Pairs<'_>, dims: Dims) {
    let len = dims.intermediate * dims.hidden;
    let [gate, up, down] =
        [1, 2, 3].map(|seed| normals(len, seed).iter().map(|w| w * 0.05).collect::<Vec<_>>());
    let weights = &Weights { gate: &gate, up: &up, down: &down, biases: None };
    let [x, dy] = [4, 5].map(|seed| normals(dims.tokens * dims.hidden, seed));
    let [mut y, mut dx] = [(); 2].map(|()| vec![0.0; x.len()]);
    let [mut dgate, mut dup, mut ddown] = [(); 3].map(|()| vec![0.0; len]);
    let (mut saved, mut scratch) = (Saved::default(), Scratch::default());
    let start = Instant::now();
    ForwardTrain { y: &mut y, saved: &mut saved, x: &x, weights, pairs, dims, scratch: &mut scratch }.run();
    let grads = WeightGrads { gate: &mut dgate, up: &mut dup, down: &mut ddown, biases: None };
    let (saved, scratch, dx_out) = (&saved, &mut scratch, &mut dx[..]);
    Backward { dx: dx_out, dcoefficients: None, grads, dy: &dy, saved, x: &x, weights, pairs, dims, scratch }
        .run();
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    println!("{name:16}  |y| {:7.2}  |dx| {:7.2}  {milliseconds:6.2} ms", norm(&y), norm(&dx));
}
