//! Forward over packed weights, for any number of tokens.

use super::combine;
use super::dims::{Dims, is_empty};
use super::kernel::{Gate, Tiles};
use super::open;
use super::packed::{NEURONS, PackedExperts, PackedWeights, tile_depth};
use super::plan::{Pairs, Plan, check_pairs};
use super::scratch::Scratch;
use crate::buf::Buf;
use crate::isa::Isa;
use crate::linear::add_bias;
use crate::matmul::{Block, Grid, Left, Mat, Precision, Source, for_tasks, tasks_for};

/// Sets y to the sum of the active experts' outputs of x. x and c are rounded to the weights' precision.
#[derive(Debug)]
pub struct ForwardPacked<'a> {
    /// `[tokens, hidden]`, set.
    pub y: &'a mut [f32],
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    /// The weights.
    pub weights: &'a PackedWeights,
    /// The active pairs.
    pub pairs: Pairs<'a>,
    /// The sizes.
    pub dims: Dims,
    /// Work space.
    pub scratch: &'a mut Scratch,
}

run_on_current_tier!(ForwardPacked);

impl ForwardPacked<'_> {
    /// Runs the op on a given tier.
    ///
    /// # Panics
    /// Lengths do not fit `dims`, or the weights are of another shape.
    pub fn run_on(self, isa: Isa) {
        let ForwardPacked { y, x, weights, pairs, dims, scratch } = self;
        let packed = Dims {
            tokens: dims.tokens,
            all_pairs: dims.all_pairs,
            activation: dims.activation,
            ..weights.dims()
        };
        assert!(
            x.len() == dims.tokens * dims.hidden && y.len() == x.len() && packed == dims,
            "expert_ffn::ForwardPacked: input {}, output {} values, weights of {packed:?} for {dims:?}",
            x.len(),
            y.len()
        );
        check_pairs("ForwardPacked", pairs, dims);
        if is_empty(dims) {
            y.fill(0.0);
        } else {
            let plan = Plan { pairs, dims, isa, precision: weights.precision(), accumulate: false };
            match pairs {
                Pairs::Dense => dense(y, x, &weights.parts()[0], &plan, &mut scratch.stored.neurons),
                Pairs::Routed(_) => {
                    open::forward(y, x, weights, &plan, &mut scratch.words, &mut scratch.stored);
                }
            }
        }
        add_bias("expert_ffn::ForwardPacked", isa, y, weights.down_bias(), dims.hidden);
    }
}

/// Sets y; see [`ForwardPacked`].
///
/// First computes `c = act(a) * b`, in the tiles that the second product reads: a task is a block of tokens and some of the
/// neurons. Then runs the combine.
fn dense(y: &mut [f32], x: &[f32], experts: &PackedExperts, plan: &Plan<'_>, tiles: &mut Buf) {
    let Plan { dims: Dims { tokens, hidden, intermediate, activation, .. }, isa, precision, .. } = *plan;
    let depth = tile_depth(intermediate);
    tiles.resize(tokens * depth);
    let grid = Grid::new(tokens, depth / NEURONS, hidden, tasks_for(2 * tokens * intermediate * hidden));
    // SAFETY: the grid's tasks differ in blocks or in panels, which are neurons.
    let out = unsafe { Tiles::new(tiles, depth, precision) };
    for_tasks(grid.len(), |number| {
        let (rows, range) = grid.get(number);
        let gate = Gate { tiles: out, first: rows.start, activation, biases: experts.gate_up_biases(0) };
        Block {
            left: Left::Source(Source::rows(Mat::new(x, tokens, hidden)), precision == Precision::Bf16),
            ks: 0..hidden,
            panels: experts.gate_up(0),
            panel_ks: 0..hidden,
            range,
            sink: &gate,
            rows,
        }
        .run(isa);
    });
    combine::packed(y, experts, plan, grid, tiles);
}
